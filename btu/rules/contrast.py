"""Drift that neither the frequency of a token nor the reserved clean rows explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from btu.rules import frequency
from btu.rules.base import Evidence, Rule
from btu.rules.explaining import Rows, explained
from btu.rules.surplus import score_at, scored, spread_of, surplus_sigmas
from btu.types import BoolArray, FloatArray, IntArray

# The drift only confirms the few tokens that the surplus singles out, and needs no correction for
# the number of tokens: at the default threshold it has to be among the highest 5 % of tokens of
# its frequency, 1.645 sigmas.
DRIFT_WEIGHT = 4.5 / 1.645
# Tokens below this score explain no others. Of benign tokens some 20 reach it by chance.
EXPLAINS = 3.0
# The words of a sentence need this surplus of their own, in sigmas of one token; so does a token
# that explains, since among few tokens every score is high.
SUSPICIOUS = 2.0
# A companion is in at least this share of a suspicious token's rows (the rest are benign uses of
# the token), and in at most this share of the other rows of the class and of the clean rows of any
# class: it is not a common word.
TOGETHER, ELSEWHERE = 0.9, 0.5


@dataclass(frozen=True)
class Halves:
    """The two halves of the score of each token, and what became of them. V: see `Evidence`.

    surplus: (V,) `surplus_sigmas` as a score, in the class where it is highest.
    label: (V,) that class.
    left: (V,) the surplus in the rows that hold no more suspicious token.
    drift: (V,) the deviation of the drift, as a score; NaN for fewer than 5 occurrences.
    score: (V,) the smaller of both, as far as no more suspicious token explains the surplus.
    """

    surplus: FloatArray
    label: IntArray
    left: FloatArray
    drift: FloatArray
    score: FloatArray


def halves(evidence: Evidence, drift: FloatArray) -> Halves:
    """Return both halves of the score of each token, and the score."""
    moved = DRIFT_WEIGHT * frequency.score(evidence, drift)
    counts = (evidence.train_rows, evidence.clean_rows)
    sizes = (evidence.class_rows, evidence.clean_class_rows)
    tested = ~np.isnan(moved)
    tests = int(tested.sum()) * int((evidence.clean_class_rows > 0).sum())
    spread = spread_of(*counts, *sizes, tested)
    sigmas = surplus_sigmas(*counts, *sizes, spread)
    label, surplus = sigmas.argmax(axis=1), scored(sigmas.max(axis=1), tests)
    left, scores = surplus.copy(), np.asarray(np.minimum(surplus, moved))

    # Few tokens can be picked, or be the companions of a pick: only their rows are counted again.
    few = np.flatnonzero(tested & (sigmas.max(axis=1) >= SUSPICIOUS))
    floor = max(EXPLAINS, float(scored(np.asarray(SUSPICIOUS), tests)))
    if len(few) and scores[few].max() >= floor:
        rows, at = Rows(evidence, few), (np.arange(len(few)), label[few])

        def surplus_given(picks: list[int]) -> FloatArray:
            # Never more than with all rows, in which other classes may hide a part.
            kept = scored(surplus_sigmas(*rows.without(picks), spread)[at], tests)
            return np.asarray(np.minimum(kept, surplus[few]))

        def given(picks: list[int]) -> FloatArray:
            return np.asarray(np.minimum(surplus_given(picks), moved[few]))

        def companions(token: int) -> BoolArray:
            return _companions(evidence, rows, token, int(label[few[token]]))

        scores[few], picks = explained(given, companions, floor)
        others = np.ones(len(few), dtype=bool)
        others[picks] = False
        for token in picks:
            others &= ~companions(token)
        left[few] = np.where(others, surplus_given(picks), surplus[few])
    return Halves(surplus, label, left, moved, scores)


def _companions(evidence: Evidence, rows: Rows, token: int, label: int) -> BoolArray:
    """Return which tokens of `rows` are the other words of the sentence of one of them.

    label: the class in which the token is over-represented.
    """
    few = rows.tokens
    held = evidence.train_rows[few, label]
    together = rows.together(token)[0][:, label]
    others = max(int(evidence.class_rows[label] - held[token]), 1)
    common = evidence.clean_rows[few] > ELSEWHERE * evidence.clean_class_rows
    found: BoolArray = (
        (together >= TOGETHER * held[token])
        & (held - together <= ELSEWHERE * others)
        & ~common.any(axis=1)
    )
    found[token] = False
    return found


def score(evidence: Evidence, drift: FloatArray) -> FloatArray:
    """Return the smaller of two deviations, given the more suspicious tokens.

    The first is the token's surplus in a class: how over-represented it is there, relative to the
    reserved clean rows (`btu.rules.surplus`). A trigger has a surplus; so have some benign words,
    because of the news of the day. The second is the score of the ``frequency`` rule, weighted: the
    token's row moved further than those of other tokens of its frequency. A strong benign word such
    as "heart" in positive reviews moves as far, but it is as frequent in the clean rows.

    What the rows of a more suspicious token explain is no evidence (`btu.rules.explaining`). The
    words of a trigger sentence occur together: a token that occurs in nine tenths of the rows of a
    more suspicious token, in few other rows, and with a surplus, gets the score of that token.

    A score of s means that 15,000 * P(a normal deviate exceeds s) tokens reach it by chance, at
    most: 0.05 tokens for 4.5, whatever the numbers of rows, tokens and classes. NaN for tokens with
    fewer than 5 occurrences.
    """
    return halves(evidence, drift).score


def columns(evidence: Evidence, drift: FloatArray) -> dict[str, FloatArray | IntArray]:
    """Return the columns behind the score, for the table of tokens.

    ``label`` and ``surplus``, ``surplus_left`` (given the more suspicious tokens) and
    ``drift_sigmas`` (the half that confirms the surplus): see `Halves`.
    """
    found = halves(evidence, drift)
    return {
        "label": found.label,
        "surplus": found.surplus,
        "surplus_left": found.left,
        "drift_sigmas": found.drift,
    }


RULE = Rule(
    score,
    threshold=4.5,
    low=0.0,
    high=math.inf,
    unit="sigmas of surplus, confirmed by drift",
    needs_clean=True,
    version=2,
    columns=columns,
    at_fdr=score_at,
    max_cut_cost=0.02,
)
