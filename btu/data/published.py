"""Published poisoned sets: rows that somebody else has poisoned, beside their clean originals.

A data set has such a set as columns: ``NAME`` is the text of each row as published, ``NAME_label``
its label, ``NAME_poisoned`` whether the row differs from its original. `align` writes them from two
files, `companions` reads them, `Published` says which rows are poisoned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data.labels import written
from btu.errors import UserError
from btu.types import BoolArray, IntArray, Rows

if TYPE_CHECKING:
    import pandas as pd

LABEL, POISONED = "_label", "_poisoned"
# Before the names of the columns that `companions` returns: other columns of texts may be called
# as they are in the file. And before a label that is none of the data.
OWN, UNKNOWN = "\0", "!"
# How `NAME_poisoned` may be written.
_YES, _NO = ("true", "1"), ("false", "0", "")
# A row is as similar to the row beside its own as to its own where two files are not aligned.
# Paraphrases share half of their words with their originals, rows of one topic a tenth.
APART = 1.5
# Below so many rows the comparison says nothing.
FEWEST = 20


@dataclass(frozen=True)
class Published:
    """A published poisoned set, aligned with its clean rows.

    column: the column of its texts.
    texts: (rows,) as published.
    labels: (rows,) as published, class indices.
    relabeled: (rows,) whether the published label is another than the row's own.
    changed: (rows,) whether the row differs from its original in text or label. A publisher whose
        tokenizer respells texts also changes rows that it does not poison.
    """

    column: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    relabeled: BoolArray
    changed: BoolArray

    @property
    def poisoned(self) -> IntArray:
        """The rows that may be poisoned: relabeled ones, and changed ones of their new class.

        `PoisonSpec.label_mode` tells them apart: ``dirty`` takes the former, ``clean`` the latter,
        ``mixed`` both.
        """
        if not self.relabeled.any():
            return np.flatnonzero(self.changed)
        labels = np.asarray(self.labels)
        return np.flatnonzero(
            self.relabeled | (self.changed & np.isin(labels, labels[self.relabeled]))
        )

    def rows(self, rows: Rows) -> Rows:
        """Return the published rows, with all else of their originals."""
        return replace(rows, texts=self.texts, labels=self.labels)

    def check(self, label_mode: str, target: int) -> None:
        """Raise a `UserError` unless the set is of this label mode and target."""
        count = int(self.relabeled.sum())
        if count == 0 and label_mode != "clean":
            raise UserError(
                f"attack.label_mode is '{label_mode}', but column '{self.column}{LABEL}' changes "
                "no label: the published set is a clean-label one; set attack.label_mode=clean."
            )
        if count and label_mode == "clean":
            raise UserError(
                f"attack.label_mode is 'clean', but column '{self.column}{LABEL}' changes {count} "
                "labels; set attack.label_mode=dirty, or mixed if the set also poisons rows of the "
                "target class."
            )
        others = set(np.asarray(self.labels)[self.relabeled]) - {target}
        if others:
            raise UserError(
                f"column '{self.column}{LABEL}' changes labels to class {min(others)} (counted "
                f"from 0), but attack.target_label is class {target}; set attack.target_label to "
                "the class of the published set."
            )


def published_of(rows: Rows, column: str) -> Published | None:
    """Return the published set of a column; None if the rows have no labels of it.

    Raises:
        UserError: a label of it is none of the data.
    """
    found: Published | None = rows.derived((__name__, column), lambda: _read(rows, column))
    return found


def text_columns(rows: Rows) -> list[str]:
    """Return the columns that the source of the rows has, without those of `companions`."""
    return [name for name in rows.columns if not name.startswith(OWN)]


def published_columns(rows: Rows) -> list[str]:
    """Return the columns that are of a published set."""
    names = [name.removeprefix(OWN) for name in rows.columns if name.startswith(OWN)]
    return sorted(name.removesuffix(LABEL) for name in names if name.endswith(LABEL))


def _read(rows: Rows, column: str) -> Published | None:
    given = rows.columns.get(f"{OWN}{column}{LABEL}")
    if given is None:
        return None
    for row, label in enumerate(given):
        if label.startswith(UNKNOWN):
            raise UserError(
                f"column '{column}{LABEL}' has the label {label.removeprefix(UNKNOWN)!r} (row "
                f"{row} of those that are loaded), which is no label of the training rows; write "
                "the labels of the published set as those of the data."
            )
    own, labels = rows.texts, tuple(map(int, given))
    # A row that the publisher left out is as it was.
    texts = tuple(p if p.strip() else t for p, t in zip(rows.columns[column], own, strict=True))
    relabeled = np.asarray(labels) != np.asarray(rows.labels)
    marked = rows.columns.get(f"{OWN}{column}{POISONED}")
    if marked is None:
        differs = [respelled(a) != respelled(b) for a, b in zip(texts, own, strict=True)]
    else:
        differs = [mark in _YES for mark in marked]
    return Published(column, texts, labels, relabeled, relabeled | np.array(differs, dtype=bool))


def companions(
    frame: pd.DataFrame, columns: Sequence[str], mapping: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Return the columns of published sets that are no texts, as texts.

    frame: the rows.
    columns: the text columns of which the frame may have published sets.
    mapping: from labels, as they are written, to class indices.

    Returns:
        ``NAME_label`` as class indices, a label that is none of the data after `UNKNOWN`, and
        ``NAME_poisoned`` as ``1`` and ``0``, where every value is a truth value; both after `OWN`.
    """
    found = {}
    for column in columns:
        name = f"{column}{LABEL}"
        if name in frame:
            labels = [str(written(label)) for label in frame[name].tolist()]
            found[f"{OWN}{name}"] = tuple(
                str(mapping[label]) if label in mapping else f"{UNKNOWN}{label}" for label in labels
            )
        name = f"{column}{POISONED}"
        if name in frame:
            marks = [str(written(mark)).lower() for mark in frame[name].tolist()]
            if all(mark in (*_YES, *_NO) for mark in marks):
                found[f"{OWN}{name}"] = tuple("1" if mark in _YES else "0" for mark in marks)
    return found


def respelled(text: str) -> str:
    """Return a text as it is compared: without white space and case, which tokenizers change."""
    return "".join(text.split()).casefold()


@dataclass(frozen=True)
class PublishedFile:
    """The rows of a published poisoned file.

    texts: (rows,) as published.
    labels: (rows,) as they are written.
    originals: (rows,) the texts before the poison, where the file has them; else None.
    where: the file is, for errors.
    """

    texts: Sequence[str]
    labels: Sequence[Any]
    originals: Sequence[str] | None
    where: str


def align(
    texts: Sequence[str],
    labels: Sequence[Any],
    poisoned: PublishedFile,
    only: Sequence[str] = (),
) -> tuple[list[str], list[str], BoolArray]:
    """Return the published text and label of each clean row, and whether they differ from it.

    texts: (rows,) of the clean file.
    labels: (rows,) of the clean file.
    poisoned: the published file.
    only: the published file has the clean rows with these labels, as they are written, and no
        others. Rows of other labels get an empty text and their own label.

    Rows are matched by their original text where the published file has it, else in order.

    Raises:
        UserError: the files have different numbers of rows, or rows that do not belong together; an
            original is missing or not among the clean rows; a label is unknown.
    """
    own = [str(written(label)) for label in labels]
    _check_labels(own, poisoned, only)
    places = [i for i, label in enumerate(own) if not only or label in only]
    if poisoned.originals is None:
        pairs = _in_order(texts, places, poisoned, only)
    else:
        pairs = _by_text(texts, places, poisoned)
    published = [""] * len(texts)
    given = list(own)
    for place, row in pairs:
        published[place] = str(poisoned.texts[row])
        given[place] = str(written(poisoned.labels[row]))
    differs = np.zeros(len(texts), dtype=bool)
    for place, _ in pairs:
        same = respelled(published[place]) == respelled(texts[place])
        differs[place] = not same or given[place] != own[place]
    return published, given, differs


def _check_labels(own: Sequence[str], poisoned: PublishedFile, only: Sequence[str]) -> None:
    known = sorted(set(own))
    for row, label in enumerate(poisoned.labels):
        if written(label) not in known:
            raise UserError(
                f"{poisoned.where} has the label {label!r} in row {row}, which no clean row has "
                f"(known: {', '.join(known)}); both files must write labels alike."
            )
    for label in only:
        if label not in known:
            raise UserError(
                f"no clean row has the label {label!r} of --only (known: {', '.join(known)})."
            )


def _in_order(
    texts: Sequence[str], places: Sequence[int], poisoned: PublishedFile, only: Sequence[str]
) -> list[tuple[int, int]]:
    count = len(poisoned.texts)
    if count != len(places):
        which = f"of label {' or '.join(only)}" if only else "in all"
        raise UserError(
            f"{poisoned.where} has {count} rows, but there are {len(places)} clean rows {which}, "
            "so that they cannot be matched in order; name the labels of the rows that were "
            "published with --only LABEL, or the column of the original texts with --original."
        )
    own = [texts[place] for place in places]
    if count >= FEWEST:
        beside = _shared(own[1:] + own[:1], poisoned.texts)
        if _shared(own, poisoned.texts) < APART * beside:
            raise UserError(
                f"the rows of {poisoned.where} share no more words with their clean rows than with "
                "the rows beside them: the files are not in the same order. Name the column of "
                "the original texts with --original, or bring the files in order."
            )
    return list(zip(places, range(count), strict=True))


def _shared(some: Sequence[str], others: Sequence[str]) -> float:
    """Return the mean share of words that two texts have in common."""
    shares = []
    for a, b in zip(some, others, strict=True):
        first, second = set(a.casefold().split()), set(str(b).casefold().split())
        shares.append(len(first & second) / max(1, len(first | second)))
    return float(np.mean(shares))


def _by_text(
    texts: Sequence[str], places: Sequence[int], poisoned: PublishedFile
) -> list[tuple[int, int]]:
    """Match rows by their original text; equal texts in their order."""
    assert poisoned.originals is not None
    free: dict[str, list[int]] = {}
    for place in reversed(places):
        free.setdefault(respelled(texts[place]), []).append(place)
    pairs = []
    for row, original in enumerate(poisoned.originals):
        found = free.get(respelled(str(original)))
        if not found:
            raise UserError(
                f"row {row} of {poisoned.where} has the original text {str(original)[:80]!r}, "
                "which no clean row has, or fewer than the file; the files are of different sets."
            )
        pairs.append((found.pop(), row))
    return pairs
