"""A cut at a gap in the falling drifts."""

from __future__ import annotations

import math

import numpy as np

from btu.rules.base import Evidence, Rule
from btu.types import FloatArray

# A gap after the 64th token does not separate triggers from the rest, however large it is.
DEEPEST = 64


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the largest relative gap at or below each token, among the 64 that moved furthest.

    With drifts d1 >= d2 >= ... the gap below token i is d_i / d_(i+1). A threshold t flags all
    tokens above the last gap of at least t. At the size of the largest gap these are the tokens
    above it, which is the usual form of the rule.
    """
    scores = np.full(len(drift), np.nan)
    ids = np.flatnonzero(evidence.candidates)
    ids = ids[np.lexsort((ids, -drift[ids]))]
    scores[ids] = 1.0
    top = drift[ids[: DEEPEST + 1]]
    top = top[top > 0]
    if len(top) > 1:
        gaps = top[:-1] / top[1:]
        scores[ids[: len(gaps)]] = np.maximum.accumulate(gaps[::-1])[::-1]
    return scores


RULE = Rule(score, threshold=1.25, low=1.0, high=math.inf, unit="drift over the next token's drift")
