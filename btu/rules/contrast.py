"""Drift that neither a token's frequency nor the reserved clean rows explain."""

from __future__ import annotations

import math

import numpy as np

from btu.rules import frequency
from btu.rules.base import Evidence, Rule
from btu.types import FloatArray

# The surplus is calibrated and carries the evidence; the drift has to confirm it. On small data,
# where every other word belongs to a class, no word stands out by much more than 3 sigmas.
DRIFT_WEIGHT = 1.5
# Below this many sigmas there are dozens of honest words; what goes with one of them is not asked.
SUSPICIOUS = 2.0
# Share of a suspicious token's rows that a companion stands in, at least: all but honest uses. And
# of its class's other rows, at most: what stands in most rows anyway is nobody's companion.
TOGETHER, ELSEWHERE = 0.9, 0.5


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the smaller of two deviations, in sigmas.

    One is the token's surplus in a class: how far it stands there oftener than the reserved clean
    rows let expect (`surplus_by_class`). A trigger has it, and by chance or for the news of the day
    some honest words. The other is one and a half times the ``frequency`` rule's: the surplus has
    moved the token's row as nothing else of its frequency does. A strong honest word has that too,
    "heart" in positive reviews; but it is as strong in the clean rows. Neither grows with the
    vocabulary or with a word's frequency, so one bar serves several data sets.

    The words of a trigger sentence come together: a token that stands in nine tenths of a more
    suspicious one's rows, in few others, and has a surplus, is as suspicious as that one. NaN for
    tokens of fewer than 5 occurrences.
    """
    surplus = evidence.surplus.max(axis=1)
    own = np.minimum(DRIFT_WEIGHT * frequency.score(evidence, drift), surplus)
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
    score, threshold=4.5, low=0.0, high=math.inf, unit="sigmas of surplus, confirmed by drift"
)
