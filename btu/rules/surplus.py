"""How over-represented a token is in a class: sigmas that mean the same on every data set.

Three corrections lead from counts of rows to a score:

1. **Exact tails.** Where training and clean rows are draws of the same texts, the training rows
   among the n rows with a token are binomial. Sigmas are those of the exact tail, since a normal
   or likelihood-ratio approximation is too generous for tokens that no clean row contains.
2. **Spread.** Words come in topics, and clean rows come from another day or another source: counts
   vary more than binomial ones. The variance of a share of n rows grows by the design effect
   1 + (n - 1) rho (Kish, Survey Sampling, 1965). rho is estimated from the tokens themselves, most
   of which are no trigger, as an empirical null is (Efron, Journal of the American Statistical
   Association, 2004).
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
# Sigmas below this are not told apart; so is the exact tail of the largest ones.
LOWEST, SMALLEST_TAIL = -8.0, 1e-290
# The spread is estimated from pairs of token and class in at least so many rows, if there are at
# least so many pairs: with fewer it is noise, and none is assumed.
ROWS_OF_SPREAD, PAIRS_OF_SPREAD = 30, 30
# The median of a squared normal deviate.
MEDIAN_SQUARE = 0.4549364


def binomial_sigmas(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray
) -> FloatArray:
    """Return how unlikely so many training rows are, in sigmas of a normal deviate.

    held: (V, classes) number of training rows with the token.
    clean: (V, classes) number of clean rows with the token.
    rows: (classes,) number of training rows.
    reserved: (classes,) number of clean rows.

    Returns:
        (V, classes): s where a normal deviate exceeds s as often as at least `held` of the
        `held + clean` rows are training rows, if training and clean rows are draws of the same
        texts. 0 in a class without clean rows, which says nothing.
    """
    from scipy.special import betainc, ndtri

    share = rows / np.maximum(rows + reserved, 1)
    share = np.broadcast_to(np.where(reserved > 0, share, 0.5), held.shape)
    some = held > 0
    # P(at least h of n) as an incomplete beta function; 1 for h = 0.
    tail = np.ones(held.shape)
    tail[some] = betainc(held[some], clean[some] + 1.0, share[some])
    sigmas = np.maximum(-ndtri(np.maximum(tail, SMALLEST_TAIL)), LOWEST)
    far = some & (tail <= SMALLEST_TAIL)
    if far.any():
        # Beyond the range of a float the signed root of the deviance is as good.
        h, k, q = held[far], clean[far], share[far]
        n = h + k
        terms = h * np.log(h / (n * q)) + np.where(
            k > 0, k * np.log(np.maximum(k, 1) / (n - n * q)), 0
        )
        sigmas[far] = np.sqrt(2 * terms)
    result: FloatArray = np.where(reserved > 0, sigmas, 0.0)
    return result


def spread_of(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray, tested: BoolArray
) -> float:
    """Return rho: how much more shares vary between training and clean rows than binomial ones.

    held, clean, rows, reserved: see `binomial_sigmas`.
    tested: (V,) the tokens to estimate it from.

    rho makes the median of s^2 / (1 + (n - 1) rho) that of a squared normal deviate. A median is
    not moved by a few triggers. 0 where there are too few tokens to tell.
    """
    counts = held + clean
    known = tested[:, None] & (counts >= ROWS_OF_SPREAD) & (reserved > 0)
    if known.sum() < PAIRS_OF_SPREAD:
        return 0.0
    # Between the tail with the observed count and that without: on average neither high nor low.
    upper = binomial_sigmas(held, clean, rows, reserved)[known]
    lower = binomial_sigmas(held + 1, np.maximum(clean - 1, 0), rows, reserved)[known]
    squares, n = (np.where(clean[known] > 0, (upper + lower) / 2, upper)) ** 2, counts[known] - 1.0
    if np.median(squares) <= MEDIAN_SQUARE:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if np.median(squares / (1 + n * middle)) > MEDIAN_SQUARE:
            low = middle
        else:
            high = middle
    return high


def surplus_sigmas(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray, spread: float = 0.0
) -> FloatArray:
    """Return how over-represented each token is in each class and not in the others, in sigmas.

    held, clean, rows, reserved: see `binomial_sigmas`.
    spread: `spread_of` all tokens.

    Returns:
        (V, classes): sigmas over the root of the design effect, minus the highest of the other
        classes, if positive. Subtracting it cancels shifts of topic or source, which affect all
        classes. A trigger affects one.
    """
    sigmas = binomial_sigmas(held, clean, rows, reserved)
    effect = np.sqrt(1 + np.maximum(held + clean - 1, 0) * spread)
    sigmas = np.where(sigmas > 0, sigmas / effect, sigmas)
    highest = np.sort(sigmas, axis=1)
    # The highest of the other classes: the second highest for the highest, else the highest.
    others = np.where(sigmas == highest[:, -1:], highest[:, -2:-1], highest[:, -1:])
    result: FloatArray = sigmas - np.maximum(others, 0.0)
    return result


def scored(sigmas: FloatArray, tests: int) -> FloatArray:
    """Return sigmas as scores: corrected for the number of tests.

    sigmas: any shape.
    tests: number of tokens times number of classes that were tested.

    Returns:
        s with REFERENCE * P(deviate > s) = tests * P(deviate > sigmas). Where that is more than
        half of REFERENCE, s falls with its logarithm below 0.
    """
    from scipy.special import log_ndtr, ndtri_exp

    half = math.log(0.5)
    tail = log_ndtr(-sigmas) + math.log(max(tests, 1) / REFERENCE)
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
