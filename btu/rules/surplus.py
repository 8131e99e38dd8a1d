"""How over-represented a token is in a class: sigmas that mean the same on every data set.

Three corrections lead from counts of rows to a score:

1. **Exact tails.** Where training and clean rows are draws of the same texts, the clean rows that
   hold a token are negative hypergeometric, given its training rows (Fisher's exact test). A normal
   or likelihood-ratio approximation is too generous for tokens that no clean row holds.
2. **Shift.** Clean rows come from another day or another source, and words come in topics: the
   frequency of every word differs by some factor. The variance of its logarithm is estimated from
   the tokens themselves, most of which are no trigger, as an empirical null is (Efron, Journal of
   the American Statistical Association, 2004). Counts are then beta-binomial, not binomial.
3. **The number of tests.** Among more tokens a higher maximum is chance. A score counts the tokens
   that would reach it by chance (Bonferroni's bound), so that one bar, or one
   ``defense.fdr``, means the same for every vocabulary and number of classes.
"""

from __future__ import annotations

import math

import numpy as np

from btu.types import BoolArray, FloatArray, IntArray

# A score of s stands for REFERENCE * P(a normal deviate exceeds s) tokens flagged by chance: 0.05
# for 4.5. With as many tests (tokens times classes) the score equals the sigmas.
REFERENCE = 15_000
# Sigmas below this are not told apart.
LOWEST = -8.0
# The tail of a token in more clean rows is that of a normal deviate.
LONGEST_SUM = 200
# In more than this share of the clean rows of a class a word is common there. The size of the class
# does not bound its counts: that is more careful, and a trigger is no common word.
COMMON = 0.1
# The shift is estimated from pairs of token and class with at least so many training and clean
# rows, if there are at least so many pairs: with fewer it is noise, and none is assumed.
ROWS_OF_SHIFT, PAIRS_OF_SHIFT = 10, 30
# The median of a squared normal deviate.
MEDIAN_SQUARE = 0.4549364


def class_sigmas(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray, shift: float = 0.0
) -> FloatArray:
    """Return how unlikely it is that so few clean rows hold a token, in sigmas.

    held: (V, classes) number of training rows with the token.
    clean: (V, classes) number of clean rows with the token.
    rows: (classes,) number of training rows.
    reserved: (classes,) number of clean rows.
    shift: `shift_of` all tokens.

    Returns:
        (V, classes): s where a normal deviate exceeds s as often as at most `clean` of the
        `reserved` rows hold a token that `held` of the `rows` hold. 0 in a class without clean
        rows, which says nothing, and -8 where no training row holds it.
    """
    from scipy.special import ndtri_exp

    some = (held > 0) & (reserved > 0)
    h, k = held[some].astype(np.float64), clean[some]
    n, m = (np.broadcast_to(size, held.shape)[some].astype(np.float64) for size in (rows, reserved))
    tail = np.zeros(len(h))
    summed = k <= LONGEST_SUM
    tail[summed] = _tail(h[summed], k[summed], n[summed], m[summed], shift)
    found = np.empty(len(h))
    found[summed] = -ndtri_exp(np.minimum(tail[summed], -1e-15))
    far = ~summed
    ratio = np.log(h[far] * m[far] / (n[far] * k[far]))
    found[far] = ratio / np.sqrt(shift + 1 / h[far] + 1 / k[far])
    sigmas = np.where(np.broadcast_to(reserved > 0, held.shape), LOWEST, 0.0)
    sigmas[some] = np.maximum(found, LOWEST)
    return sigmas


def _tail(h: FloatArray, k: IntArray, n: FloatArray, m: FloatArray, shift: float) -> FloatArray:
    """Return log P(at most k of m clean rows), given h of n training rows: (pairs,).

    The clean rows are beta-binomial with the parameters h and n - h + 1, which is Fisher's exact
    test; both are divided by 1 + h * shift, which adds `shift` to the variance of the logarithm of
    the frequency. For common words they are negative binomial: the same for an unbounded class.
    """
    from scipy.special import betaln

    alpha = h / (1 + h * shift)
    beta = (n - h + 1) / (1 + h * shift)
    mean = h * m / n
    bounded = k <= COMMON * m
    with np.errstate(divide="ignore"):
        term = np.where(
            bounded,
            betaln(alpha, beta + m) - betaln(alpha, beta),
            alpha * np.log(alpha / (alpha + mean)),
        )
    total, left, at = term.copy(), np.arange(len(h)), 0
    while True:
        left = left[k[left] > at]
        if not len(left):
            return np.minimum(total, 0.0)
        a = alpha[left]
        # The probability of one row more, over that of `at` rows.
        ratio = np.where(
            bounded[left],
            (m[left] - at) * (a + at) / ((at + 1) * (beta[left] + m[left] - at - 1)),
            (a + at) / (at + 1) * mean[left] / (a + mean[left]),
        )
        term[left] += np.log(ratio)
        total[left] = np.logaddexp(total[left], term[left])
        at += 1


def shift_of(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray, tested: BoolArray
) -> float:
    """Return the variance of the logarithm of a word's frequency, between training and clean rows.

    held, clean, rows, reserved: see `class_sigmas`.
    tested: (V,) the tokens to estimate it from.

    It makes the median of d^2 / (shift + v) that of a squared normal deviate, where d is the
    logarithm of the ratio of both shares, and v its variance by chance. A median is not moved by a
    few triggers. 0 where there are too few tokens to tell.
    """
    known = tested[:, None] & (held >= ROWS_OF_SHIFT) & (clean >= ROWS_OF_SHIFT)
    if known.sum() < PAIRS_OF_SHIFT:
        return 0.0
    h, k = held[known], clean[known]
    n, m = (np.broadcast_to(size, held.shape)[known] for size in (rows, reserved))
    squares = np.log(h * m / (n * k)) ** 2
    chance = 1 / h - 1 / n + 1 / k - 1 / m
    if np.median(squares / np.maximum(chance, 1e-12)) <= MEDIAN_SQUARE:
        return 0.0
    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        if np.median(squares / (middle + chance)) > MEDIAN_SQUARE:
            low = middle
        else:
            high = middle
    return high


def surplus_sigmas(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray, shift: float = 0.0
) -> FloatArray:
    """Return how over-represented each token is in each class and not in the others, in sigmas.

    held, clean, rows, reserved, shift: see `class_sigmas`.

    Returns:
        (V, classes): the sigmas minus the highest of the other classes, if positive. Subtracting it
        cancels what is more frequent in all classes, such as the name of a source. A trigger is
        more frequent in one.
    """
    sigmas = class_sigmas(held, clean, rows, reserved, shift)
    highest = np.sort(sigmas, axis=1)
    # The highest of the other classes: the second highest for the highest, else the highest.
    others = np.where(sigmas == highest[:, -1:], highest[:, -2:-1], highest[:, -1:])
    result: FloatArray = sigmas - np.maximum(others, 0.0)
    return result


def scored(sigmas: FloatArray, tests: float | FloatArray) -> FloatArray:
    """Return sigmas as scores: corrected for the number of tests.

    sigmas: any shape.
    tests: number of pairs of token and class that were tested; divided by the weight of each token
        if chance may not flag all alike.

    Returns:
        s with REFERENCE * P(deviate > s) = tests * P(deviate > sigmas). Where that is more than
        half of REFERENCE, s falls with its logarithm below 0.
    """
    from scipy.special import log_ndtr, ndtri_exp

    half = math.log(0.5)
    tail = log_ndtr(-sigmas) + np.log(np.maximum(tests, 1e-9) / REFERENCE)
    result: FloatArray = np.where(tail < half, -ndtri_exp(np.minimum(tail, half)), half - tail)
    return result


def expected_flags(score: float) -> float:
    """Return how many tokens reach `score` by chance, at most: REFERENCE * P(deviate > score)."""
    from scipy.special import ndtr

    return REFERENCE * float(ndtr(-score))


def score_at(flags: float) -> float:
    """Return the score that `flags` tokens, on average, reach by chance: see `expected_flags`."""
    from scipy.special import ndtri

    return float(-ndtri(flags / REFERENCE))
