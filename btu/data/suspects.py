"""The data of a scan: suspect rows, and trusted rows if there are any."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data.load import (
    check_frames,
    drop_overlaps,
    label_mapping,
    read_file,
    rename_columns,
    same_text,
    split_frames,
    suffixes,
    to_rows,
)
from btu.data.spec import SCAN_ROLES, SPLIT_NAMES, source_columns
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
        UserError: as `load_corpus`, or a class has a single row.
    """
    frames, label_names = split_frames(spec, SCAN_ROLES)
    frames = {role: frames[role] for role in SCAN_ROLES if role in frames}
    if clean_file is not None:
        path = Path(clean_file).expanduser()
        if not path.is_file():
            raise UserError(f"trusted rows {path} do not exist; give a file ({suffixes()}).")
        frames["clean"] = read_file(path)
        if spec.path is None:
            frames["clean"] = _trusted_as_hub(frames["clean"], spec)
    text_column, label_column = check_frames(spec, frames)
    notes: dict[str, int] = {}
    mapping = label_mapping(spec, frames["train"][label_column], label_names)
    if len(mapping) < 2:
        raise _one_class(spec, mapping, notes)
    trusted = str(frames["clean"].attrs.get("from", "clean")) if "clean" in frames else "none"
    roles = {role: Rows((), ()) for role in SPLIT_NAMES}
    for role, frame in frames.items():
        # The number is a column, so that it stays with its row.
        part = frame[[text_column, label_column]].assign(
            **{_NUMBER: [str(number) for number in range(len(frame))]}
        )
        known = mapping
        if role == "clean" and clean_file is not None and label_names is not None:
            known = _mapping_with_names(label_names, part[label_column])
        roles[role] = to_rows(part, text_column, label_column, known, role, notes)
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
    names = tuple(label_names or (str(value) for value in mapping))
    _check_classes(spec, train, names, label_column, notes)
    corpus = Corpus(spec.name, train, clean, none, names, notes)
    return SuspectCorpus(corpus, numbers, contradicted, trusted)


_NUMBER = "\0number"


def _trusted_as_hub(frame: pd.DataFrame, spec: DataSpec) -> pd.DataFrame:
    """Return the trusted rows of a file, with columns renamed as those of loaded hub data."""
    columns = {}
    asked = (spec.text_column, spec.label_column)
    for given, source, usual in zip(asked, source_columns(spec), ("text", "label"), strict=True):
        # Without a named column the usual names are accepted: users need not know a preset's.
        plain = not given and source not in frame and usual in frame
        columns[usual if plain else source] = usual
    return rename_columns(frame, columns, f"trusted rows {frame.attrs['from']}")


def _mapping_with_names(names: tuple[str, ...], labels: pd.Series[Any]) -> dict[Hashable, int]:
    """Map the class numbers of the hub, and the class names, to class indices."""
    mapping: dict[Hashable, int] = {index: index for index in range(len(names))}
    mapping |= {name: index for index, name in enumerate(names)}
    for value in labels.tolist():
        named = mapping.get(str(value))
        if isinstance(value, int) and named is not None and named != value:
            raise UserError(
                f"label {value} of the trusted rows may be the class of that name or class number "
                f"{value} ({', '.join(names)}, from 0); give the names as text in Parquet or JSON "
                "lines."
            )
    return mapping


def _check_classes(
    spec: DataSpec,
    rows: Rows,
    names: tuple[str, ...],
    label_column: str,
    notes: Mapping[str, int],
) -> None:
    sizes = np.bincount(np.asarray(rows.labels, dtype=np.int64), minlength=len(names))
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
        f"{', '.join(map(str, names))}){left}; a classifier needs at least two."
    )
