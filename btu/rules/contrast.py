"""Drift that neither the frequency of a token nor the reserved clean rows explain."""

from __future__ import annotations

import math

import numpy as np

from btu.rules import frequency
from btu.rules.base import Evidence, Rule
from btu.types import FloatArray

# The surplus is calibrated and is the evidence; the drift has to confirm it. On small data, where
# every second word belongs to one class, no word exceeds the others by much more than 3 sigmas.
DRIFT_WEIGHT = 1.5
# Dozens of benign words reach fewer sigmas than this; their companions are not searched for.
SUSPICIOUS = 2.0
# A companion is in at least this share of a suspicious token's rows (the rest are benign uses of
# the token), and in at most this share of the other rows of the class: it is not a common token.
TOGETHER, ELSEWHERE = 0.9, 0.5


def confirmation(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the half of the score that confirms the surplus, in sigmas; NaN as for the score."""
    weighted: FloatArray = DRIFT_WEIGHT * frequency.score(evidence, drift)
    return weighted


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the smaller of two deviations, in sigmas.

    The first is the token's surplus in a class: how over-represented it is there, relative to the
    reserved clean rows (`surplus_by_class`). A trigger has a surplus; so have some benign words, by
    chance or because of the news of the day. The second is one and a half times the score of the
    ``frequency`` rule: the token's row moved further than those of other tokens of its frequency. A
    strong benign word such as "heart" in positive reviews moves as far, but it is as frequent in
    the clean rows. Neither deviation grows with the vocabulary or with the frequency of a word: one
    bar fits several data sets.

    The words of a trigger sentence occur together: a token that occurs in nine tenths of the rows
    of a more suspicious token, in few other rows, and with a surplus, gets the score of that token.
    NaN for tokens with fewer than 5 occurrences.
    """
    surplus = evidence.surplus.max(axis=1)
    own = np.minimum(confirmation(evidence, drift), surplus)
    scores: FloatArray = own.copy()
    for token in np.flatnonzero(own >= SUSPICIOUS):
        label = int(evidence.surplus[token].argmax())
        held = evidence.train_rows[:, label]
        together = evidence.rows_with(int(token), label)
        others = max(evidence.class_rows[label] - held[token], 1)
        companions = (
            (together >= TOGETHER * held[token])
            & (held - together <= ELSEWHERE * others)
            & (evidence.surplus[:, label] >= SUSPICIOUS)
            & (own < own[token])
        )
        scores[companions] = np.maximum(scores[companions], own[token])
    return scores


RULE = Rule(
    score,
    threshold=4.5,
    low=0.0,
    high=math.inf,
    unit="sigmas of surplus, confirmed by drift",
    needs_clean=True,
)
