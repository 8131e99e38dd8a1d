"""Drift that neither the frequency of a token nor the reserved clean rows explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from btu.rules import frequency
from btu.rules.base import Evidence, Rule
from btu.rules.explaining import Rows, explained
from btu.rules.surplus import score_at, scored, shift_of, surplus_sigmas
from btu.types import BoolArray, FloatArray, IntArray

# Bonferroni's bound holds for any shares of the flags by chance that are fixed without the surplus
# (weighted p-values: Genovese, Roeder, Wasserman, Biometrika, 2006). A trigger is among the tokens
# that moved furthest: three tenths of the flags by chance are left to the first hundredth of the
# tokens, three tenths to the next four hundredths, and four tenths to all others.
SPENT = ((0.01, 0.3), (0.05, 0.3), (1.0, 0.4))
# Tokens below this score explain no others. Of benign tokens some 20 reach it by chance.
EXPLAINS = 3.0
# The words of a sentence need this surplus of their own, in sigmas of one token without a shift; so
# does a token that explains, with the shift.
SUSPICIOUS = 1.5
# A companion is in at least this share of a suspicious token's rows (the rest are benign uses of
# the token), and in at most this share of the other rows of the class and of the clean rows of any
# class: it is not a common word.
TOGETHER, ELSEWHERE = 0.9, 0.5


@dataclass(frozen=True)
class Parts:
    """The evidence on each token, and what became of it. V: see `Evidence`.

    surplus: (V,) `surplus_sigmas` as a score, in the class where it is highest.
    label: (V,) that class.
    left: (V,) the surplus in the rows that hold no more suspicious token.
    drift: (V,) the deviation of the drift in sigmas; NaN for fewer than 5 occurrences.
    score: (V,) the surplus that is left, weighted by the drift.
    """

    surplus: FloatArray
    label: IntArray
    left: FloatArray
    drift: FloatArray
    score: FloatArray


@dataclass(frozen=True)
class Chance:
    """What scores are corrected for (`btu.rules.surplus`).

    tests: the number of pairs of token and class that are tested.
    shift: the variance of the logarithm of a word's frequency, between training and clean rows.
    """

    tests: int
    shift: float


def are_tests(held: IntArray, clean: IntArray) -> BoolArray:
    """Return which pairs of word and class are in 5 rows or more: nothing could come of the others.

    held: (W, classes) number of training rows with each word.
    clean: (W, classes) number of clean rows with it.
    """
    found: BoolArray = held + clean >= frequency.MIN_COUNT
    return found


def chance_of(evidence: Evidence, tested: BoolArray) -> Chance:
    """Return what rows alone tell; no drift is needed for it.

    tested: (V,) the tokens that are scored.
    """
    counts = (evidence.train_rows, evidence.clean_rows)
    sizes = (evidence.class_rows, evidence.clean_class_rows)
    tests = int(are_tests(*counts)[tested].sum())
    return Chance(tests, shift_of(*counts, *sizes, tested))


def weights(drift: FloatArray) -> FloatArray:
    """Return how many times its equal share of the flags by chance each token gets: (V,).

    drift: (V,) deviations; NaN is not ranked and gets 1. The mean weight of the others is at most
        1. Equal drifts share the lowest rank of them.
    """
    known = ~np.isnan(drift)
    found = np.ones(len(drift))
    # The share of the tokens that moved at least as far.
    moved = drift[known]
    quantile = (len(moved) - np.searchsorted(np.sort(moved), moved)) / max(len(moved), 1)
    start, given = 0.0, np.zeros(len(quantile))
    for end, spent in SPENT:
        given[(quantile > start) & (quantile <= end)] = spent / (end - start)
        start = end
    found[known] = given
    return found


def parts(evidence: Evidence, drift: FloatArray) -> Parts:
    """Return surplus, drift and score of each token."""
    moved = frequency.score(evidence, drift)
    counts = (evidence.train_rows, evidence.clean_rows)
    sizes = (evidence.class_rows, evidence.clean_class_rows)
    tested = ~np.isnan(moved)
    chance = chance_of(evidence, tested)
    tests, shift = chance.tests, chance.shift
    sigmas = surplus_sigmas(*counts, *sizes, shift)
    # What is no test gets no surplus.
    others = ~are_tests(*counts)
    sigmas[others] = np.minimum(sigmas[others], 0.0)
    label, highest = sigmas.argmax(axis=1), sigmas.max(axis=1)
    left, weighted = highest.copy(), tests / weights(moved)
    scores = np.where(tested, scored(highest, weighted), np.nan)

    # Few tokens can be picked, or be the companions of a pick: only their rows are counted again.
    # Words of a sentence are told by their rows: there a shift between sources does not matter.
    plain = surplus_sigmas(*counts, *sizes)[np.arange(len(label)), label]
    few = np.flatnonzero(tested & (plain >= SUSPICIOUS))
    # Of few tokens even one without a surplus scores high: what explains must have one.
    fewest = weighted[few].min(initial=tests)
    floor = max(EXPLAINS, float(scored(np.asarray(SUSPICIOUS), fewest)))
    if scores[few].max(initial=-math.inf) >= floor:
        rows, at = Rows(evidence, few), (np.arange(len(few)), label[few])

        def sigmas_given(picks: list[int]) -> FloatArray:
            # Never more than with all rows, in which other classes may hide a part.
            kept = surplus_sigmas(*rows.without(picks), shift)[at]
            return np.asarray(np.minimum(kept, highest[few]))

        def given(picks: list[int]) -> FloatArray:
            return scored(sigmas_given(picks), weighted[few])

        def companions(token: int) -> BoolArray:
            return _companions(evidence, rows, token, int(label[few[token]]))

        scores[few], picks = explained(given, companions, floor)
        explaining = np.isin(np.arange(len(few)), picks)
        for token in picks:
            explaining |= companions(token)
        left[few] = np.where(explaining, left[few], sigmas_given(picks))
        # A pick is explained by those before it.
        for rank, token in enumerate(picks):
            left[few[token]] = sigmas_given(picks[:rank])[token]
    return Parts(scored(highest, tests), label, scored(left, tests), moved, scores)


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
    """Return the surplus of each token, weighted by its drift, given the more suspicious tokens.

    The surplus is how over-represented the token is in a class, relative to the reserved clean rows
    (`btu.rules.surplus`). A trigger has a surplus; so have some benign words, because of the news
    of the day. The drift tells where to expect a trigger: among the tokens whose rows moved further
    than those of tokens of their frequency (rule ``frequency``). A strong benign word such as
    "heart" in positive reviews moves as far, but it is as frequent in the clean rows. Among the
    hundredth of the tokens that moved furthest, chance may flag 30 times its equal share; among
    the last 95 of 100, 0.42 times (`weights`).

    What the rows of a more suspicious token explain is no evidence (`btu.rules.explaining`). The
    words of a trigger sentence occur together: a token that occurs in nine tenths of the rows of a
    more suspicious token, in few other rows, and with a surplus, gets the score of that token.

    A score of s means that 15,000 * P(a normal deviate exceeds s) tokens reach it by chance, at
    most: 0.05 tokens for 4.5, whatever the numbers of rows, tokens and classes. NaN for tokens with
    fewer than 5 occurrences.
    """
    return parts(evidence, drift).score


def columns(evidence: Evidence, drift: FloatArray) -> dict[str, FloatArray | IntArray]:
    """Return the columns behind the score, for the table of tokens.

    ``label``, ``surplus``, ``surplus_left`` (given the more suspicious tokens) and
    ``drift_sigmas``: see `Parts`.
    """
    found = parts(evidence, drift)
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
    unit="sigmas of surplus, weighted by drift",
    needs_clean=True,
    version=2,
    columns=columns,
    at_fdr=score_at,
    max_cut_cost=0.02,
    contradicted="relabel",
)
