"""The rule of the reference code: a fixed share of the vocabulary, on clean data too."""

from __future__ import annotations

import numpy as np

from btu.rules.base import Evidence, Rule
from btu.types import FloatArray


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return minus the smallest alpha at which each candidate is flagged: -rank / V."""
    scores = np.full(len(drift), np.nan)
    ids = np.flatnonzero(evidence.candidates)
    ids = ids[np.lexsort((ids, -drift[ids]))]
    scores[ids] = -np.arange(1, len(ids) + 1) / len(drift)
    return scores


def bar(alpha: float) -> float:
    """Return the lowest score of a token flagged at `alpha`."""
    # The small term makes alpha = k / V, computed in floating point, flag k tokens.
    return -alpha - 1e-14


RULE = Rule(
    score,
    threshold=0.0005,
    low=0.0,
    high=1.0,
    unit="the share of the vocabulary that a round flags",
    rounds=(1, 2, 3),
    bar=bar,
    combine=np.fmax,
)
