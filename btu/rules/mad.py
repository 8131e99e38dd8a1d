"""How many deviations the drift of a token is above the median drift."""

from __future__ import annotations

import math

import numpy as np

from btu.rules.base import Evidence, Rule, robust_z
from btu.types import FloatArray


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the drift's deviation from the candidates' median, over their MAD.

    The textbook rule for outliers. It also flags frequent tokens, since drift grows with the number
    of steps that move a row.
    """
    scores = np.full(len(drift), np.nan)
    scores[evidence.candidates] = robust_z(drift[evidence.candidates])
    return scores


RULE = Rule(score, threshold=15.0, low=0.0, high=math.inf, unit="sigmas above the median drift")
