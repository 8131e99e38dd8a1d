"""Detection rules: a score per token from the exposure rounds and the rows.

A rule scores every token of the vocabulary; a token is flagged if its score reaches the threshold.
One array of scores therefore gives the flags at every threshold, and a finished run can be
evaluated at any of them without training again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.errors import UserError
from btu.registry import Registry
from btu.settings import is_number
from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from btu.training import Encoded

# The suspicion of a row ignores surpluses below this: chance ones would add up in long rows.
SURPLUS_FLOOR = 1.5
# The weight of the odds of another label in the suspicion of a row; their tails are longer.
CONTRADICTION = 0.25
# The share of clean rows that reach the bar of suspicion.
CLEAN_SUSPECTED = 0.001
# The median absolute deviation of a normal distribution, in standard deviations.
MAD_PER_SIGMA = 0.6745


@dataclass(frozen=True)
class Evidence:
    """What a rule may read. V is the size of the vocabulary.

    drift: by exposure round, (V,) how far each embedding row moved.
    candidates: (V,) the tokens that may be flagged: those that occur in the training rows, without
        special tokens.
    train: the training rows.
    clean: the reserved clean rows.
    """

    drift: Mapping[int, FloatArray]
    candidates: BoolArray
    train: Encoded
    clean: Encoded

    @cached_property
    def count(self) -> IntArray:
        """(V,) how often each token occurs in the training rows."""
        return self.train.counts(len(self.candidates))

    @cached_property
    def train_rows(self) -> IntArray:
        """(V, classes) the number of training rows of each class that contain each token."""
        return self._by_class(self.train, self.pairs)

    @cached_property
    def pairs(self) -> tuple[IntArray, IntArray]:
        """Every pair of a training row and a token in it, once: two (pairs,) arrays."""
        return rows_and_tokens(self.train, len(self.candidates))

    @cached_property
    def clean_pairs(self) -> tuple[IntArray, IntArray]:
        """The same for the clean rows."""
        return rows_and_tokens(self.clean, len(self.candidates))

    @cached_property
    def clean_rows(self) -> IntArray:
        """(V, classes) the number of clean rows of each class that contain each token."""
        return self._by_class(self.clean, self.clean_pairs)

    def _by_class(self, rows: Encoded, pairs: tuple[IntArray, IntArray]) -> IntArray:
        return count_by_class(rows, pairs, len(self.candidates), self.classes)

    @cached_property
    def surplus(self) -> FloatArray:
        """(V, classes) `surplus_by_class` of the training rows over the clean rows."""
        return surplus_by_class(
            self.train_rows, self.clean_rows, self.class_rows, self.clean_class_rows
        )

    @cached_property
    def class_rows(self) -> IntArray:
        """(classes,) the number of training rows of each class."""
        return self._sizes(self.train)

    @cached_property
    def clean_class_rows(self) -> IntArray:
        """(classes,) the number of clean rows of each class."""
        return self._sizes(self.clean)

    def _sizes(self, rows: Encoded) -> IntArray:
        sizes: IntArray = np.bincount(rows.labels.cpu().numpy(), minlength=self.classes)
        return sizes

    @cached_property
    def classes(self) -> int:
        """The number of classes."""
        return 1 + max(int(rows.labels.max()) for rows in (self.train, self.clean) if len(rows))


@dataclass(frozen=True)
class Rule:
    """A detection rule.

    score: (evidence, drift of one round) -> (V,) scores: higher is more suspicious, NaN if the rule
        cannot score the token. A token is flagged if its score reaches the `bar`.
    threshold: the default, as in a config.
    low: a threshold must be above it.
    high: a threshold must be below it.
    unit: what the threshold counts, shown to users.
    rounds: the exposure rounds that run by default.
    bar: from a threshold to the lowest score of a flagged token.
    combine: the scores of two rounds into one. By default a token gets the lower of the two, and
        NaN if one of them is NaN.
    version: increase it when the rule scores differently; results of earlier versions are then not
        reused.
    needs_clean: whether it compares with the reserved clean rows; without them it flags nothing.
    columns: (evidence, drift of the last round) -> (V,) columns behind the scores, for the table of
        tokens, by name; None if there are none.
    at_fdr: from a false-discovery rate to the threshold that keeps it; None if the scores of the
        rule are not probabilities.
    max_cut_cost: the default of the defense's key of that name.
    contradicted: likewise.
    """

    score: Callable[[Evidence, FloatArray], FloatArray]
    threshold: float
    low: float
    high: float
    unit: str
    rounds: tuple[int, ...] = (3,)
    bar: Callable[[float], float] = float
    combine: Callable[[FloatArray, FloatArray], FloatArray] = np.minimum
    version: int = 1
    needs_clean: bool = False
    columns: Callable[[Evidence, FloatArray], dict[str, FloatArray | IntArray]] | None = None
    at_fdr: Callable[[float], float] | None = None
    max_cut_cost: float = 1.0
    contradicted: str = "keep"

    def scores(self, evidence: Evidence) -> FloatArray:
        """Return the (V,) scores over all rounds of `evidence`."""
        several = (self.score(evidence, drift) for drift in evidence.drift.values())
        combined: FloatArray = reduce(self.combine, several)
        return combined

    def check(self, threshold: float) -> None:
        """Raise a `UserError` unless a threshold is in the rule's range."""
        if not is_number(threshold) or not self.low < threshold < self.high:
            high = "" if math.isinf(self.high) else f" and below {self.high:g}"
            raise UserError(
                f"defense.threshold must be above {self.low:g}{high}, got {threshold!r}; it counts "
                f"{self.unit}."
            )


RULES: Registry[Rule] = Registry(
    "rule",
    [
        (
            "contrast",
            "btu.rules.contrast:RULE",
            "surplus over the clean rows, weighted by the drift",
        ),
        ("frequency", "btu.rules.frequency:RULE", "drift against tokens as frequent, over the MAD"),
        ("mad", "btu.rules.mad:RULE", "drift over median and MAD of all drifts"),
        ("gap", "btu.rules.gap:RULE", "everything above a relative gap in the falling drifts"),
        ("top_fraction", "btu.rules.top_fraction:RULE", "a fixed share of the vocabulary (paper)"),
    ],
)
DEFAULT_RULE, TOP_FRACTION = "contrast", "top_fraction"
# The settings of a defense that are the threshold of a rule: `top_fraction` has its own.
THRESHOLD_NAMES = ("threshold", "alpha")
THRESHOLD_KEYS = tuple(f"defense.{name}" for name in THRESHOLD_NAMES)
# The setting that states a threshold as a false-discovery rate.
FDR_KEY = "defense.fdr"
THRESHOLD_IN_WORDS = f"{THRESHOLD_KEYS[0]} ({THRESHOLD_KEYS[1]} with rule {TOP_FRACTION})"


def threshold_name(rule: str) -> str:
    """Return which of the `THRESHOLD_NAMES` is the threshold of a rule."""
    return "alpha" if rule == TOP_FRACTION else "threshold"


@dataclass(frozen=True)
class Threshold:
    """The threshold of a rule, as the settings of a defense give it.

    rule: the rule's name.
    values: of each exposure round, or one for all of them.
    exact: whether the saved scores give the flags at every threshold. They do not with round 2 of
        ``top_fraction``, whose drift depends on what round 1 flagged.
    """

    rule: str
    values: tuple[float, ...]
    exact: bool

    @property
    def value(self) -> float | None:
        """The threshold of all rounds; None if they differ in it."""
        return self.values[0] if len(set(self.values)) == 1 else None


def threshold_of(defense: Mapping[str, Any]) -> Threshold | None:
    """Return the threshold in a defense's resolved settings; None without a known rule."""
    rule = defense.get("rule")
    if rule is None or rule not in RULES:
        return None
    given = defense[threshold_name(rule)]
    values = tuple(map(float, given if isinstance(given, list | tuple) else [given]))
    return Threshold(rule, values, exact=rule != TOP_FRACTION or 2 not in defense["rounds"])


def flag(scores: FloatArray, bar: float) -> tuple[int, ...]:
    """Return the ids whose score reaches `bar`, highest score first, equal scores by id."""
    ids = np.flatnonzero(scores >= bar)  # NaN reaches nothing
    return tuple(int(i) for i in ids[np.lexsort((ids, -scores[ids]))])


def suspicion(evidence: Evidence) -> FloatArray:
    """Return how suspicious each training row is: (rows,), from its tokens only.

    It is the sum of two terms. The first is the surplus of the row's tokens in its class, as far as
    it is above 1.5 sigmas: the row contains tokens that the clean rows of its class do not. The
    second, at a quarter of its weight, is the log odds that another label fits the row better, by
    the words of the clean rows: a relabeled row reads like its original class, with any trigger.
    """
    return _suspicion(evidence, evidence.train, evidence.pairs, own=0)


def suspicion_bar(evidence: Evidence) -> float:
    """Return the suspicion that one in a thousand of the reserved clean rows reaches.

    Training rows that reach it count as flagged. The words of a clean row are left out of its odds,
    but not out of its surplus, which is therefore slightly lower than that of a training row: more
    than one in a thousand benign training rows reach the bar. NaN without clean rows.
    """
    clean = evidence.clean
    if not len(clean):
        return math.nan
    scores = _suspicion(evidence, clean, evidence.clean_pairs, own=1)
    return float(np.quantile(scores, 1 - CLEAN_SUSPECTED))


def _suspicion(
    evidence: Evidence, data: Encoded, pairs: tuple[IntArray, IntArray], own: int
) -> FloatArray:
    """Return the suspicion of the rows of `data`.

    evidence: the counts to compare with.
    data: the rows.
    pairs: `rows_and_tokens` of `data`.
    own: 1 if the rows of `data` are among the clean rows that were counted, else 0.
    """
    rows, tokens = pairs
    count = len(data)
    labels = data.labels.cpu().numpy()
    above = np.maximum(evidence.surplus[tokens, labels[rows]] - SURPLUS_FLOOR, 0.0)
    total = np.bincount(rows, above, minlength=count)
    # Naive Bayes over the words that occur, with add-one smoothing.
    sizes = evidence.clean_class_rows
    occurs = np.log((evidence.clean_rows + 1) / (sizes + 2))
    fit = np.stack(
        [
            np.bincount(rows, occurs[tokens, label], minlength=count)
            for label in range(evidence.classes)
        ],
        axis=1,
    )
    at = np.arange(count), labels
    # A class without clean rows fits all rows equally and is left out.
    fit[:, sizes == 0] = -np.inf
    label_of = labels[rows]
    without = np.log(
        (evidence.clean_rows[tokens, label_of] - own + 1) / (sizes[label_of] - own + 2)
    )
    given = np.bincount(rows, without, minlength=count)
    fit[at] = -np.inf
    other = fit.max(axis=1)
    odds = np.where((sizes[labels] > 0) & np.isfinite(other), other - given, 0.0)
    result: FloatArray = total + CONTRADICTION * odds
    return result


def rows_and_tokens(rows: Encoded, vocabulary: int) -> tuple[IntArray, IntArray]:
    """Return every pair of a row and a token in it, once: two (pairs,) arrays."""
    row = np.repeat(np.arange(len(rows)), rows.host_lengths)
    # Sorted: `np.unique` of numbers hashes, which takes ten times as long for millions of pairs.
    pairs = np.sort(row * vocabulary + rows.ids.cpu().numpy())
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    return pairs // vocabulary, pairs % vocabulary


def rows_by_class(rows: Encoded, vocabulary: int, classes: int) -> IntArray:
    """Return how many rows of each class contain each token: (vocabulary, classes)."""
    return count_by_class(rows, rows_and_tokens(rows, vocabulary), vocabulary, classes)


def count_by_class(
    rows: Encoded, pairs: tuple[IntArray, IntArray], vocabulary: int, classes: int
) -> IntArray:
    """Return `rows_by_class`, given `rows_and_tokens` of the rows as `pairs`."""
    row, token = pairs
    labels = rows.labels.cpu().numpy()[row]
    counted = np.bincount(token * classes + labels, minlength=vocabulary * classes)
    return counted.astype(np.int64).reshape(vocabulary, classes)


def surplus_by_class(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray
) -> FloatArray:
    """Return how over-represented each token is in each class, relative to the clean rows.

    held: (V, classes) number of training rows with the token.
    clean: (V, classes) number of clean rows with the token.
    rows: (classes,) number of training rows.
    reserved: (classes,) number of clean rows.

    Returns:
        (V, classes): the signed root of the deviance of two Poisson counts of one rate, which is
        normal with sigma 1 if training and clean rows are draws from the same texts; minus the
        highest of the other classes, if positive. Subtracting it cancels shifts of topic or
        source, which affect all classes; a trigger affects one. A class without clean rows has no
        surplus of its own.
    """
    share = rows / np.maximum(rows + reserved, 1)
    together = held + clean
    deviance = 2 * (_terms(held, together * share) + _terms(clean, together * (1 - share)))
    roots = np.sign(held - together * share) * np.sqrt(np.maximum(deviance, 0.0))
    roots = np.where(reserved > 0, roots, 0.0)
    highest = np.sort(roots, axis=1)
    # The highest of the other classes: the second highest for the highest, else the highest.
    others = np.where(roots == highest[:, -1:], highest[:, -2:-1], highest[:, -1:])
    result: FloatArray = roots - np.maximum(others, 0.0)
    return result


def _terms(observed: IntArray, expected: FloatArray) -> FloatArray:
    """Return observed * log(observed / expected), 0 where nothing was observed."""
    ratio = np.divide(observed, expected, out=np.ones_like(expected), where=observed > 0)
    return np.asarray(observed * np.log(ratio), dtype=np.float64)


def robust_z(values: FloatArray) -> FloatArray:
    """Return deviations from the median, divided by the MAD, in sigmas of a normal distribution.

    NaN for all values if more than half of them are equal, since the MAD is then 0.
    """
    centered = values - np.median(values)
    spread = np.median(np.abs(centered)) / MAD_PER_SIGMA
    if spread == 0:
        return np.full(len(values), np.nan)
    result: FloatArray = centered / spread
    return result
