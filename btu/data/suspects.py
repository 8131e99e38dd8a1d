"""The data of a scan: suspect rows, and trusted rows if there are any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data.files import read_file, suffixes
from btu.data.labels import alike, class_mapping, counted, shown
from btu.data.load import (
    Classes,
    check_frames,
    drop_overlaps,
    frame_warnings,
    rename_columns,
    same_text,
    split_frames,
    to_rows,
)
from btu.data.spec import READING_KEYS, SCAN_ROLES, SPLIT_NAMES, FileReading, source_columns
from btu.errors import UserError
from btu.types import Corpus, Rows

if TYPE_CHECKING:
    import pandas as pd

    from btu.data.spec import DataSpec


@dataclass(frozen=True)
class SuspectCorpus:
    """Suspect rows and trusted rows.

    corpus: ``train`` contains the suspect rows, ``clean`` the trusted rows, perhaps none; ``eval``
        is empty.
    numbers: (train,) the number of each suspect row in its table, from 0.
    contradicted: the numbers of suspect rows that were dropped because their text is trusted, and
        whose label differs from the trusted one.
    trusted: where the trusted rows come from, shown to users.
    """

    corpus: Corpus
    numbers: tuple[int, ...]
    contradicted: tuple[int, ...]
    trusted: str


def load_suspects(spec: DataSpec, clean_file: str | None = None) -> SuspectCorpus:
    """Load all rows to be scanned: none is held out, sampled or reported on.

    spec: where the rows are.
    clean_file: a table of trusted rows, instead of a split. Without either there are none.

    A trusted text is dropped from the suspect rows, as in `load_corpus`.

    Raises:
        UserError: as `load_corpus`, or a class has a single row, or rows are pairs of texts.
    """
    _refuse_pairs(spec)
    frames, label_names = split_frames(spec, SCAN_ROLES)
    frames = {role: frames[role] for role in SCAN_ROLES if role in frames}
    if clean_file is not None:
        path = Path(clean_file).expanduser()
        if not path.is_file():
            raise UserError(f"trusted rows {path} do not exist; give a file ({suffixes()}).")
        frames["clean"] = (
            _trusted(path, spec) if spec.path is not None else _trusted_as_hub(path, spec)
        )
    columns = check_frames(spec, frames)
    text_column, label_column = columns.text, columns.label
    notes: dict[str, int] = {}
    mapping = class_mapping(spec.name, frames["train"][label_column].tolist(), label_names)
    classes = Classes(mapping, label_names)
    if len(mapping) < 2:
        raise _one_class(spec, mapping, notes)
    trusted = str(frames["clean"].attrs.get("from", "clean")) if "clean" in frames else "none"
    roles = {role: Rows((), ()) for role in SPLIT_NAMES}
    for role, frame in frames.items():
        # The number is a column, so that it stays with its row.
        part = frame[[text_column, label_column]].assign(
            **{_NUMBER: [str(number) for number in range(len(frame))]}
        )
        roles[role] = to_rows(part, text_column, label_column, classes, role, notes)
    labels: dict[str, set[int]] = {}
    for text, value in zip(roles["clean"].texts, roles["clean"].labels, strict=True):
        labels.setdefault(same_text(text), set()).add(value)
    suspects = roles["train"]
    contradicted = tuple(
        int(number)
        for text, value, number in zip(
            suspects.texts, suspects.labels, suspects.columns[_NUMBER], strict=True
        )
        if value not in labels.get(same_text(text), {value})
    )
    drop_overlaps(roles, notes)
    numbers = tuple(int(number) for number in roles["train"].columns[_NUMBER])
    train, clean, none = (
        Rows(rows.texts, rows.labels) for rows in (roles[r] for r in ("train", "clean", "eval"))
    )
    names = tuple(mapping)
    _check_classes(spec, train, names, label_column, notes)
    said = frame_warnings(frames)
    if similar := alike(names, counted(train.labels)):
        said.append(similar)
    corpus = Corpus(spec.name, train, clean, none, names, notes, tuple(said))
    return SuspectCorpus(corpus, numbers, contradicted, trusted)


_NUMBER = "\0number"


def _refuse_pairs(spec: DataSpec) -> None:
    columns = source_columns(spec)
    if columns.pair is not None:
        raise UserError(
            f"data set '{spec.name}' has two texts per row ({columns.text} and {columns.pair}), "
            "and a scan reads one; write its rows to a file and name one of the columns with "
            "--text, or run defense btu on the pairs in a sweep."
        )


def _trusted(path: Path, spec: DataSpec) -> pd.DataFrame:
    try:
        return read_file(path, spec.reading)
    except UserError as error:
        if all(getattr(spec.reading, key) == getattr(FileReading(), key) for key in READING_KEYS):
            raise
        raise UserError(
            f"{error} The trusted file is read with the same options as the data; if it is written "
            "in another way, give it as Parquet or JSON lines."
        ) from error


def _trusted_as_hub(path: Path, spec: DataSpec) -> pd.DataFrame:
    """Return the trusted rows of a file, with columns renamed as those of loaded hub data."""
    reading = spec.reading
    present = read_file(path, reading).columns
    columns = {}
    asked, known = (spec.text_column, spec.label_column), source_columns(spec)[:2]
    for given, source, usual in zip(asked, known, ("text", "label"), strict=True):
        # Without a named column the usual names are accepted: users need not know a preset's.
        plain = not given and source not in present and usual in present
        columns[usual if plain else source] = usual
    text_column, label_column = columns
    # Again, since texts and labels are read as they are written.
    frame = read_file(path, replace(reading, text_column=text_column, label_column=label_column))
    return rename_columns(frame, columns, f"trusted rows {path}")


def _check_classes(
    spec: DataSpec,
    rows: Rows,
    names: tuple[str, ...],
    label_column: str,
    notes: Mapping[str, int],
) -> None:
    sizes = np.bincount(np.asarray(rows.labels, dtype=np.int64), minlength=len(names))
    if not sizes.sum() and notes.get("dropped_train_overlap"):
        raise UserError(
            f"no row of data set '{spec.name}' is left to scan: the texts of all of them "
            f"({notes['dropped_train_overlap']}) are also among the trusted rows; name other "
            "trusted rows."
        )
    if (sizes > 0).sum() < 2:
        raise _one_class(spec, names, notes)
    single = [name for name, size in zip(names, sizes, strict=True) if size == 1]
    if single:
        some = ", ".join(f"'{name}'" for name in single[:5]) + (" ..." if single[5:] else "")
        raise UserError(
            f"{len(single)} of {len(names)} classes of data set '{spec.name}' have one row only "
            f"({some}), and at least 2 are needed; drop or merge them, or name another label "
            f"column than '{label_column}'."
        )


def _one_class(spec: DataSpec, names: Iterable[Any], notes: Mapping[str, int]) -> UserError:
    left = f" ({', '.join(f'{name}: {count}' for name, count in notes.items())})" if notes else ""
    return UserError(
        f"the rows of data set '{spec.name}' have fewer than two classes (labels: "
        f"{shown(names)}){left}; a classifier needs at least two."
    )
