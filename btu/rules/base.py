"""Detection rules: from what the exposure rounds and the rows know to a score per token.

A rule scores every token of the vocabulary; a token is flagged where its score reaches the
threshold. So one score array holds the flags of every threshold, and a finished run can be read off
at any of them without training anything again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import numpy as np

from btu.errors import UserError
from btu.registry import Registry
from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from btu.training import Encoded

# Of the suspicion of a row: chance surpluses below the floor would add up in long rows; the weight
# of the label's odds, whose tails are longer; the share of clean rows that reach the bar.
SURPLUS_FLOOR, CONTRADICTION, CLEAN_SUSPECTED = 1.5, 0.25, 0.001
# Share of a normal distribution's deviation that the median absolute deviation is.
MAD_PER_SIGMA = 0.6745


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at. V: the vocabulary's size.

    drift: by exposure round, (V,) how far each word row moved. candidates: (V,) what may be
    flagged: tokens that occur in the training rows, without special ones. train, clean: the
    training rows and the reserved clean ones.
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
        """(V, classes) training rows of each class that hold the token."""
        return self._by_class(self.train, self.pairs)

    def rows_with(self, token: int, label: int) -> IntArray:
        """Return in how many of the class's training rows with `token` each token stands: (V,)."""
        rows, tokens = self.pairs
        holds = np.zeros(len(self.train), dtype=bool)
        holds[rows[tokens == token]] = True
        holds &= self.train.labels.cpu().numpy() == label
        counted: IntArray = np.bincount(tokens[holds[rows]], minlength=len(self.candidates))
        return counted

    @cached_property
    def pairs(self) -> tuple[IntArray, IntArray]:
        """Every training row and token that occur together, once: two (pairs,)."""
        return rows_and_tokens(self.train, len(self.candidates))

    @cached_property
    def clean_pairs(self) -> tuple[IntArray, IntArray]:
        """Likewise of the clean rows."""
        return rows_and_tokens(self.clean, len(self.candidates))

    @cached_property
    def clean_rows(self) -> IntArray:
        """(V, classes) clean rows of each class that hold the token."""
        return self._by_class(self.clean, self.clean_pairs)

    def _by_class(self, rows: Encoded, pairs: tuple[IntArray, IntArray]) -> IntArray:
        return count_by_class(rows, pairs, len(self.candidates), self.classes)

    @cached_property
    def surplus(self) -> FloatArray:
        """(V, classes) `surplus_by_class` of the training rows over the clean ones."""
        return surplus_by_class(
            self.train_rows, self.clean_rows, self.class_rows, self.clean_class_rows
        )

    @cached_property
    def class_rows(self) -> IntArray:
        """(classes,) training rows of each class."""
        return self._sizes(self.train)

    @cached_property
    def clean_class_rows(self) -> IntArray:
        """(classes,) clean rows of each class."""
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

    score: of one round's drift, (V,); higher is more suspicious, NaN where the rule has no
    opinion. A token is flagged where it reaches `bar`. threshold: the default, as a config gives
    it. low, high: what a threshold may lie between. unit: what it counts, for people.
    rounds: the exposure rounds that run unless others are asked for.
    bar: from a threshold to the score that it asks for. combine: of two rounds' scores; as it
    stands, a token is as suspicious as in the milder one, and unknown where it is so in one.
    version: raised when the rule scores otherwise than before; results of it are then not reused.
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

    def scores(self, evidence: Evidence) -> FloatArray:
        """Return the (V,) score over all rounds that `evidence` holds."""
        several = (self.score(evidence, drift) for drift in evidence.drift.values())
        combined: FloatArray = reduce(self.combine, several)
        return combined

    def check(self, threshold: float) -> None:
        """Raise a `UserError` unless a threshold lies in the rule's range."""
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not math.isfinite(threshold) or not self.low < threshold < self.high:
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
            "surplus over the clean rows, confirmed by the drift",
        ),
        ("frequency", "btu.rules.frequency:RULE", "drift against tokens as frequent, over the MAD"),
        ("mad", "btu.rules.mad:RULE", "drift over median and MAD of all drifts"),
        ("gap", "btu.rules.gap:RULE", "everything above a relative gap in the falling drifts"),
        ("top_fraction", "btu.rules.top_fraction:RULE", "a fixed share of the vocabulary (paper)"),
    ],
)
DEFAULT_RULE = "contrast"


def flag(scores: FloatArray, bar: float) -> tuple[int, ...]:
    """Return the ids whose score reaches `bar`, the highest first; equal scores by rising id."""
    ids = np.flatnonzero(scores >= bar)  # NaN reaches nothing
    return tuple(int(i) for i in ids[np.lexsort((ids, -scores[ids]))])


def suspicion(evidence: Evidence) -> FloatArray:
    """Return how suspicious each training row is: (rows,), from its tokens alone.

    The sum of two things. The surplus of its tokens in the row's own class, as far as it is above
    1.5 sigmas: the row holds what the clean rows of its class do not. And, at a quarter of its
    weight, the log odds by the words of the clean rows that another class's label would have
    suited it better: a relabeled row reads like the class that it was taken from, whatever its
    trigger is.
    """
    return _suspicion(evidence, evidence.train, evidence.pairs, own=0)


def suspicion_bar(evidence: Evidence) -> float:
    """Return the suspicion that one in a thousand of the reserved clean rows reaches.

    Its own words are left out of the odds, but not of the surplus, which is therefore a little
    lower than a training row's: more than one in a thousand honest training rows reach the bar.
    Training rows from here up count as flagged. NaN without clean rows.
    """
    clean = evidence.clean
    if not len(clean):
        return math.nan
    scores = _suspicion(evidence, clean, evidence.clean_pairs, own=1)
    return float(np.quantile(scores, 1 - CLEAN_SUSPECTED))


def _suspicion(
    evidence: Evidence, data: Encoded, pairs: tuple[IntArray, IntArray], own: int
) -> FloatArray:
    """own: how many of the clean rows that are counted a row of `data` itself is, 0 or 1."""
    rows, tokens = pairs
    count = len(data)
    labels = data.labels.cpu().numpy()
    above = np.maximum(evidence.surplus[tokens, labels[rows]] - SURPLUS_FLOOR, 0.0)
    total = np.bincount(rows, above, minlength=count)
    # Naive Bayes over the words that occur, with one more row of each kind than there is.
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
    # A class without clean rows fits every row alike and says nothing.
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
    """Return every row and token that occur together, each pair once: two (pairs,)."""
    row = np.repeat(np.arange(len(rows)), rows.host_lengths)
    pairs = np.unique(row * vocabulary + rows.ids.cpu().numpy())
    return pairs // vocabulary, pairs % vocabulary


def rows_by_class(rows: Encoded, vocabulary: int, classes: int) -> IntArray:
    """Return how many rows of each class hold each token: (vocabulary, classes)."""
    return count_by_class(rows, rows_and_tokens(rows, vocabulary), vocabulary, classes)


def count_by_class(
    rows: Encoded, pairs: tuple[IntArray, IntArray], vocabulary: int, classes: int
) -> IntArray:
    """Return `rows_by_class` from the rows' `rows_and_tokens`, where these are known."""
    row, token = pairs
    labels = rows.labels.cpu().numpy()[row]
    counted = np.bincount(token * classes + labels, minlength=vocabulary * classes)
    return counted.astype(np.int64).reshape(vocabulary, classes)


def surplus_by_class(
    held: IntArray, clean: IntArray, rows: IntArray, reserved: IntArray
) -> FloatArray:
    """Return how much oftener a token stands in a class's training rows than its clean rows tell.

    held, clean: (V, classes) training and clean rows with the token. rows, reserved: (classes,)
    all of each. Returns (V, classes): the signed root of the deviance of two Poisson counts of
    one rate, normal with sigma 1 where training and clean rows are draws from the same texts;
    minus that of the class in which it is next highest, if positive. For texts of another day or
    source have other words, but in all classes, where a trigger has one. A class without clean
    rows shows no surplus of its own.
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
    """Return deviations from the median over the MAD, in units of a normal distribution's sigma.

    NaN everywhere where more than half of the values are equal: nothing stands out then.
    """
    centered = values - np.median(values)
    spread = np.median(np.abs(centered)) / MAD_PER_SIGMA
    if spread == 0:
        return np.full(len(values), np.nan)
    result: FloatArray = centered / spread
    return result
