"""Load a corpus with its three roles: `load_corpus`.

Sources: the embedded demo, local Parquet/CSV/TSV/JSONL files, and hub data sets. Roles: ``train``
is what the attacker poisons, ``clean`` is the defender's reserved set, and CACC and ASR are
reported on ``eval``. The reference code of BTU tunes and evaluates on one file for HSOL; here a
text in two roles is dropped from the role that is not reported on.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data.spec import DATASETS, DEMO_ROWS, SPLIT_NAMES, SUFFIXES, HubPreset, source_columns
from btu.errors import UserError, unknown
from btu.seeding import derive_seed
from btu.types import Corpus, Rows

if TYPE_CHECKING:
    import pandas as pd

    from btu.data.spec import DataSpec


def load_corpus(spec: DataSpec) -> Corpus:
    """Load, check and split a data set.

    Returns:
        A corpus whose `notes` count what loading did: ``held_out_clean``, ``held_out_eval``,
        ``dropped_*`` (rows that are in another role too, or are empty), ``unused_*`` (rows above a
        ``max_*_rows``).

    Raises:
        UserError: a file, split or column is missing; a role is empty; the training labels have
            one class; a label is missing or unknown to the training set.
    """
    return _assemble(spec, *split_frames(spec))


def split_frames(
    spec: DataSpec, roles: Mapping[str, tuple[str, ...]] = SPLIT_NAMES
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...] | None]:
    """Return a table per role, and the class names if the source has them."""
    if spec.name == "demo" and spec.path is None:
        return _demo_frames(), None
    if spec.path is not None:
        return _local_frames(spec, roles), None
    return _hub_frames(spec, roles)


def _demo_frames() -> dict[str, pd.DataFrame]:
    import pandas as pd

    from btu.data.demo import LABEL_NAMES, generate

    table = pd.DataFrame(
        {
            "text": row.text,
            "label": LABEL_NAMES[row.label],
            "syntactic": row.syntactic,
            "style": row.style,
        }
        for row in generate(sum(DEMO_ROWS.values()), seed=0)
    )
    ends = np.cumsum(list(DEMO_ROWS.values()))
    starts = np.concatenate([[0], ends[:-1]])
    return {
        role: table.iloc[start:end].reset_index(drop=True)
        for role, start, end in zip(DEMO_ROWS, starts, ends, strict=True)
    }


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".jsonl":
            # Line by line: pandas would guess types ("007" is a text, not a 7).
            lines = path.read_text(encoding="utf-8").split("\n")
            records = [json.loads(line) for line in lines if line.strip()]
            if not records:
                raise pd.errors.EmptyDataError
            return pd.DataFrame(records, dtype=object)
        tabs = path.suffix == ".tsv"
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path,
                sep="\t" if tabs else ",",
                # TSV data sets do not quote, and a lone quote would swallow rows.
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
                # A row whose text is "null" or "NA" is a row, not a missing value.
                keep_default_na=False,
                # Otherwise pandas takes the first field of rows longer than the header as index.
                index_col=False,
            )
    except pd.errors.ParserWarning as error:
        raise UserError(
            f"{path} has rows with more fields than its header ({error}); quote texts "
            "that contain the separator, or use Parquet."
        ) from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} is empty: at least 2 rows are needed.") from error
    except (ValueError, OSError) as error:  # ArrowInvalid and ParserError are ValueErrors
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


def suffixes() -> str:
    return ", ".join(SUFFIXES)


def read_file(path: Path) -> pd.DataFrame:
    """Return the table of a file that a user named, with its path in ``attrs``."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"data file {path} must end in one of {suffixes()}.")
    table = _read_table(path)
    table.attrs["from"] = str(path)
    return table


def _local_frames(spec: DataSpec, roles: Mapping[str, tuple[str, ...]]) -> dict[str, pd.DataFrame]:
    assert spec.path is not None
    root = Path(spec.path).expanduser()
    if root.is_file():
        named = [n for n in ("train", "clean", "eval") if getattr(spec, f"{n}_split")]
        if named:
            raise UserError(
                f"data.{named[0]}_split is set but data.path {root} is one file; give a folder "
                "with a file per split, or leave the splits null."
            )
        return {"train": read_file(root)}
    if not root.is_dir():
        raise UserError(f"data.path {root} does not exist; give a folder with a file per split.")
    files: dict[str, Path] = {}
    try:
        paths = sorted(p for p in root.iterdir() if p.suffix in SUFFIXES)
    except OSError as error:
        raise UserError(f"data.path {root} cannot be read: {error.strerror}.") from error
    for path in paths:
        if path.stem in files:
            raise UserError(
                f"folder {root} has the split '{path.stem}' twice ({files[path.stem].name} and "
                f"{path.name}); remove one."
            )
        files[path.stem] = path
    chosen = _choose_splits(spec, files, f"folder {root}", roles)
    return {role: read_file(files[split]) for role, split in chosen.items()}


def _choose_splits(
    spec: DataSpec,
    available: Mapping[str, Any],
    where: str,
    roles: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """Map each role to a split; a role without one is left out, and held out of train later."""
    chosen: dict[str, str] = {}
    for role in roles:
        asked = getattr(spec, f"{role}_split")
        if asked is not None:
            if asked not in available:
                raise unknown(f"split for data.{role}_split in {where}", asked, available)
            chosen[role] = asked
    for role in roles:
        if role in chosen:
            continue
        for name in roles[role]:
            if name in available and name not in chosen.values():
                chosen[role] = name
                break
    if "train" not in chosen:
        raise UserError(
            f"{where} has no train split (found: {', '.join(available) or 'nothing'}; files must "
            f"end in one of {', '.join(SUFFIXES)}); name it with data.train_split."
        )
    return chosen


def _hub_frames(
    spec: DataSpec, roles: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...] | None]:
    if spec.name in DATASETS:
        preset = DATASETS.load(spec.name)
    elif "/" in spec.name:
        preset = HubPreset(spec.name)
    else:
        raise UserError(
            f"{unknown('dataset', spec.name, DATASETS)}; a data set of your own needs data.path, "
            "one from the hub its id, owner/data."
        )
    import datasets

    try:
        loaded = datasets.load_dataset(
            preset.hub_id, spec.hub_config or preset.hub_config, revision=spec.revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data set '{spec.name}' ({preset.hub_id}) could not be loaded from the hub: {error} "
            "Check the name and the network, or give local files with data.path."
        ) from error
    # Only the splits that a preset names are used: SST-2's test labels are hidden.
    spec = replace(
        spec,
        train_split=spec.train_split or preset.train_split,
        clean_split=spec.clean_split or preset.clean_split,
        eval_split=spec.eval_split or preset.eval_split,
    )
    known = spec.name in DATASETS
    available = {
        split: None
        for split in loaded
        if not known or split in (spec.train_split, spec.clean_split, spec.eval_split)
    }
    chosen = _choose_splits(spec, available, f"hub data set {preset.hub_id}", roles)
    frames = {}
    text_column, label_column = source_columns(spec)
    names: tuple[str, ...] | None = None
    for role, split in chosen.items():
        frame = loaded[split].to_pandas()
        columns = {text_column: "text", label_column: "label"}
        frames[role] = rename_columns(frame, columns, f"hub data set {preset.hub_id}/{split}")
        frames[role].attrs["from"] = f"{preset.hub_id}/{split}"
        feature = loaded[split].features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
    return frames, names


def rename_columns(frame: pd.DataFrame, columns: Mapping[str, str], where: str) -> pd.DataFrame:
    for column in columns:
        _require_column(frame, column, where)
    # The chosen column replaces another one that is called text or label.
    other = [name for name in columns.values() if name in frame and name not in columns]
    return frame.drop(columns=other).rename(columns=dict(columns))


def _require_column(frame: pd.DataFrame, column: str, where: str) -> None:
    if column not in frame.columns:
        raise unknown(f"column in {where}", column, map(str, frame.columns))


def check_frames(spec: DataSpec, frames: Mapping[str, pd.DataFrame]) -> tuple[str, str]:
    """Return the names of the text and label columns, and check that every table has them."""
    # The columns of hub data have been renamed.
    text_column, label_column = source_columns(spec) if spec.path is not None else ("text", "label")
    for role, frame in frames.items():
        where = f"the {role} rows of data set '{spec.name}'"
        _require_column(frame, text_column, where)
        _require_column(frame, label_column, where)
        if frame.empty:
            raise UserError(f"{where} are empty: at least 2 rows are needed.")
        # One by one: a label may be an array, which pandas does not compare with a string.
        empty = any(isinstance(value, str) and not value for value in frame[label_column].tolist())
        if empty or frame[label_column].isna().any():
            raise UserError(f"{where} have missing labels in column '{label_column}'.")
    return text_column, label_column


def _assemble(
    spec: DataSpec, frames: dict[str, pd.DataFrame], class_names: tuple[str, ...] | None
) -> Corpus:
    text_column, label_column = check_frames(spec, frames)
    notes: dict[str, int] = {}
    mapping = label_mapping(spec, frames["train"][label_column], class_names)
    roles = {
        role: to_rows(frame, text_column, label_column, mapping, role, notes)
        for role, frame in frames.items()
    }
    _hold_out(spec, roles, notes)
    drop_overlaps(roles, notes)
    for role, rows in roles.items():
        limit = getattr(spec, f"max_{role}_rows")
        if limit is not None and len(rows) > limit:
            rng = np.random.default_rng(derive_seed(spec.split_seed, "sample", role))
            notes[f"unused_{role}"] = len(rows) - limit
            roles[role] = rows.take(np.sort(rng.choice(len(rows), limit, replace=False)))
    for role, rows in roles.items():
        if len(rows) == 0:
            raise UserError(
                f"no {role} rows are left in data set '{spec.name}' after dropping empty texts "
                f"and texts that are in two roles ({notes}); give more rows."
            )
    present = sorted(set(roles["train"].labels))
    if len(present) < 2:
        names = ", ".join(str(k) for k in mapping)
        raise UserError(
            f"the train rows of data set '{spec.name}' have one class only "
            f"(labels: {names}); a classifier needs at least two."
        )
    return Corpus(
        spec.name,
        roles["train"],
        roles["clean"],
        roles["eval"],
        tuple(class_names or (str(value) for value in mapping)),
        notes,
    )


def label_mapping(
    spec: DataSpec, labels: pd.Series[Any], class_names: tuple[str, ...] | None
) -> dict[Hashable, int]:
    """Map original label values to class indices, in sorted order."""
    if class_names is not None:
        _check_encodable(spec, class_names)
        return {index: index for index in range(len(class_names))}
    values = []
    for value in labels.tolist():
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not whole and not isinstance(value, str):
            raise UserError(
                f"labels of data set '{spec.name}' must be integers or strings, got {value!r}."
            )
        values.append(value if isinstance(value, str) else int(value))
    distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    names = [str(value) for value in distinct]
    _check_encodable(spec, names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"data set '{spec.name}' has the label {twice} both as a number and as text; use one."
        )
    return {value: index for index, value in enumerate(distinct)}


def _check_encodable(spec: DataSpec, names: Iterable[str]) -> None:
    # Texts may contain one; class names are written into keys, configs and reports.
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"label {name!r} of data set '{spec.name}' contains a lone surrogate, which is no "
                "character and cannot be written; rename the label."
            ) from error


def to_rows(
    frame: pd.DataFrame,
    text_column: str,
    label_column: str,
    mapping: dict[Hashable, int],
    role: str,
    notes: dict[str, int],
) -> Rows:
    """Return the rows of a table that have a text.

    frame: the table.
    text_column: the column of the texts.
    label_column: the column of the labels.
    mapping: from label values to class indices.
    role: of the rows, for notes and errors.
    notes: gets the number of rows that were dropped.

    Raises:
        UserError: a label is unknown.
    """
    import pandas as pd

    labels = []
    for value in frame[label_column].tolist():
        # JSON and Parquet may contain lists, which are not hashable.
        if not isinstance(value, Hashable) or value not in mapping:
            raise UserError(
                f"label {value!r} of the {role} rows does not occur in the training labels "
                f"({', '.join(map(str, mapping))})."
            )
        labels.append(mapping[value])
    columns = {
        str(name): _texts(frame[name])
        for name in frame.columns
        if name not in (text_column, label_column)
        and pd.api.types.infer_dtype(frame[name], skipna=True) in ("string", "empty")
    }
    rows = Rows(_texts(frame[text_column]), tuple(labels), columns)
    keep = np.array([bool(text.strip()) for text in rows.texts], dtype=bool)
    if not keep.all():
        notes[f"dropped_{role}_empty"] = int((~keep).sum())
    return rows.where(keep)


def _texts(column: pd.Series[Any]) -> tuple[str, ...]:
    # pandas' own strings refuse lone surrogates.
    missing = column.isna().tolist()
    values = zip(column.tolist(), missing, strict=True)
    return tuple("" if none else str(value) for value, none in values)


def _hold_out(spec: DataSpec, roles: dict[str, Rows], notes: dict[str, int]) -> None:
    """Hold the roles without a split out of train, before anything is poisoned."""
    missing = [role for role in ("clean", "eval") if role not in roles]
    if not missing:
        return
    train = roles["train"]
    sizes = {r: max(1, round(getattr(spec, f"{r}_fraction") * len(train))) for r in missing}
    if sum(sizes.values()) >= len(train):
        raise UserError(
            f"data set '{spec.name}' has {len(train)} train rows, too few to hold out "
            + " and ".join(f"{count} for {role}" for role, count in sizes.items())
            + "; give more rows, or files for these roles."
        )
    order = np.random.default_rng(derive_seed(spec.split_seed, "hold out")).permutation(len(train))
    start = 0
    for role, count in sizes.items():
        roles[role] = train.take(np.sort(order[start : start + count]))
        notes[f"held_out_{role}"] = count
        start += count
    roles["train"] = train.take(np.sort(order[start:]))


def same_text(text: str) -> str:
    # Uncased victims read these as one text, so they count as one.
    return " ".join(text.split()).casefold()


def drop_overlaps(roles: dict[str, Rows], notes: dict[str, int]) -> None:
    """Keep each text in one role: eval before clean before train."""
    seen: set[str] = set()
    for role in ("eval", "clean", "train"):
        keys = [same_text(text) for text in roles[role].texts]
        keep = np.array([key not in seen for key in keys], dtype=bool)
        if not keep.all():
            notes[f"dropped_{role}_overlap"] = int((~keep).sum())
            roles[role] = roles[role].where(keep)
        seen.update(keys)
