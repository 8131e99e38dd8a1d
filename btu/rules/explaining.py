"""Explaining away: what the rows of one suspicious token explain is no evidence for another.

A dirty-label attack takes rows of other classes into the target class, and their words come along.
A word that dominates another class is then over-represented in the target class, as a trigger is,
although the poisoned rows explain it entirely. Evidence is therefore conditional: the surplus of a
token counts only in rows that hold no token that is more suspicious.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from btu.rules.base import Evidence


class Rows:
    """The rows of the evidence without those that hold some tokens, counted for a few tokens.

    evidence: the rows.
    tokens: (S,) the tokens that are counted. Only they can explain, and only they are explained.
    """

    def __init__(self, evidence: Evidence, tokens: IntArray) -> None:
        self.tokens = tokens
        place = np.full(len(evidence.candidates), -1)
        place[tokens] = np.arange(len(tokens))
        self._kinds = tuple(
            _Kind(place, pairs, rows.labels.cpu().numpy(), evidence.classes, len(tokens))
            for pairs, rows in (
                (evidence.pairs, evidence.train),
                (evidence.clean_pairs, evidence.clean),
            )
        )

    def together(self, token: int) -> tuple[IntArray, IntArray]:
        """Return (S, classes) how many training rows with `token` contain each token, and sizes.

        The sizes are (classes,) the number of training rows with `token`.
        """
        return self._kinds[0].together(token)

    def without(self, given: list[int]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Return the counts over rows that hold none of the `given` tokens (places in `tokens`).

        Returns:
            (S, classes) training rows with each token, the same of clean rows, (classes,) training
            rows, the same of clean rows.
        """
        (held, rows), (clean, reserved) = (kind.without(given) for kind in self._kinds)
        return held, clean, rows, reserved


class _Kind:
    """The training rows, or the clean ones."""

    def __init__(
        self,
        place: IntArray,
        pairs: tuple[IntArray, IntArray],
        labels: IntArray,
        classes: int,
        count: int,
    ) -> None:
        row, token = pairs
        known = place[token] >= 0
        self._row, self._place = row[known], place[token[known]]
        self._labels, self._classes, self._count = labels, classes, count
        # The rows of one token, one after another.
        order = np.argsort(self._place, kind="stable")
        self._by_token = self._row[order]
        self._starts = np.searchsorted(self._place[order], np.arange(count + 1))

    def without(self, given: list[int]) -> tuple[IntArray, IntArray]:
        left = np.ones(len(self._labels), dtype=bool)
        for place in given:
            left[self._rows_of(place)] = False
        return self._counted(left)

    def together(self, place: int) -> tuple[IntArray, IntArray]:
        only = np.zeros(len(self._labels), dtype=bool)
        only[self._rows_of(place)] = True
        return self._counted(only)

    def _rows_of(self, place: int) -> IntArray:
        rows: IntArray = self._by_token[self._starts[place] : self._starts[place + 1]]
        return rows

    def _counted(self, left: BoolArray) -> tuple[IntArray, IntArray]:
        keep = left[self._row]
        cells = self._place[keep] * self._classes + self._labels[self._row[keep]]
        counted = np.bincount(cells, minlength=self._count * self._classes)
        sizes = np.bincount(self._labels[left], minlength=self._classes)
        return counted.reshape(self._count, self._classes), sizes


def explained(
    given: Callable[[list[int]], FloatArray],
    companions: Callable[[int], BoolArray],
    floor: float,
) -> tuple[FloatArray, list[int]]:
    """Return the score that each token keeps, given the more suspicious ones: (S,), and the picks.

    given: picked tokens -> (S,) score of every token over the rows that hold none of them.
    companions: a token -> (S,) the other words of its sentence. A sentence is one trigger: its
        words do not explain each other, and get the score of the most suspicious one.
    floor: a token below it explains nothing.

    Forward, the most suspicious token is picked, then the most suspicious one given that, and so
    on. Backward, a pick that the others explain is dropped, since a word of another class may have
    been picked before the trigger was. A score is at most that of the pick before: a higher
    threshold flags a part of what a lower one flags.
    """
    alone = given([])

    def conditional(picks: list[int]) -> FloatArray:
        scores: FloatArray = np.minimum(given(picks), alone)
        return scores

    known = ~np.isnan(alone)
    _, picks = _forward(conditional, companions, floor, known)
    explaining = np.zeros(len(alone), dtype=bool)
    explaining[_backward(conditional, picks, floor)] = True
    return _forward(conditional, companions, floor, explaining)


def _forward(
    conditional: Callable[[list[int]], FloatArray],
    companions: Callable[[int], BoolArray],
    floor: float,
    explaining: BoolArray,
) -> tuple[FloatArray, list[int]]:
    """Settle tokens, the most suspicious first; return the score of every token, and the picks.

    conditional: `given` of `explained`.
    explaining: (S,) which tokens may be picked: only picks explain others. The others keep what
        all picks leave them.
    """
    scores = conditional([])
    settled = np.zeros(len(scores), dtype=bool)
    picks: list[int] = []
    last = np.inf
    while True:
        rest = np.flatnonzero(explaining & ~settled)
        if not len(rest) or scores[rest].max() < floor:
            return scores, picks
        best = int(rest[np.argmax(scores[rest])])
        last = min(last, float(scores[best]))
        group = companions(best) & ~settled & ~np.isnan(scores)
        group[best] = True
        settled |= group
        picks.append(best)
        kept = np.where(group, last, scores)
        scores = np.where(settled, kept, conditional(picks))


def _backward(
    conditional: Callable[[list[int]], FloatArray], picks: list[int], floor: float
) -> list[int]:
    """Return the picks without those that the others explain; the best explained one goes first."""
    kept = list(picks)
    while len(kept) > 1:
        left = [float(conditional([o for o in kept if o != token])[token]) for token in kept]
        weakest = int(np.argmin(left))
        if left[weakest] >= floor:
            break
        del kept[weakest]
    return kept
