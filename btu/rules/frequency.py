"""How far a token moved, relative to tokens of similar frequency."""

from __future__ import annotations

import math

import numpy as np

from btu.rules.base import Evidence, Rule, robust_z
from btu.types import FloatArray

# With fewer occurrences the drift of a token depends more on its sentences than on the token.
MIN_COUNT = 5
# Tukey's constant: 95 % efficient if the residuals are normal.
TUKEY = 4.685
ROUNDS = 30


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the residual of log drift on log count and its square, over the residuals' MAD.

    AdamW's steps are normalised: the path of an embedding row grows with the number of its steps,
    so the drift of a token is compared with tokens of its frequency. Tokens with fewer than 5
    occurrences are not scored; if fewer than 10 tokens are left, none is.
    """
    scores = np.full(len(drift), np.nan)
    known = np.flatnonzero(evidence.candidates & (evidence.count >= MIN_COUNT) & (drift > 0))
    if len(known) < 10:
        return scores
    scores[known] = robust_z(
        residuals(np.log(evidence.count[known].astype(np.float64)), np.log(drift[known]))
    )
    return scores


def residuals(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return y minus a quadratic in x, fitted by Tukey's biweight.

    Outliers do not affect the fit, unless their x is far from all others.
    """
    terms = np.stack([np.ones_like(x), x, x**2], axis=1)
    coefficients = np.linalg.lstsq(terms, y, rcond=None)[0]
    for _ in range(ROUNDS):
        z = robust_z(y - terms @ coefficients) / TUKEY
        if np.isnan(z).all():
            break  # at least half of the points lie on the curve
        weight = np.where(np.abs(z) < 1, 1 - z**2, 0.0)  # the root of the biweight
        coefficients = np.linalg.lstsq(terms * weight[:, None], y * weight, rcond=None)[0]
    left: FloatArray = y - terms @ coefficients
    return left


RULE = Rule(score, threshold=5.5, low=0.0, high=math.inf, unit="sigmas above tokens as frequent")
