"""Load a corpus with its three roles: `load_corpus`.

Sources: the embedded demo, local files (`btu.data.files`), and hub data sets. Roles: ``train``
is what the attacker poisons, ``clean`` is the defender's reserved set, and CACC and ASR are
reported on ``eval``. The reference code of BTU tunes and evaluates on one file for HSOL; here a
text in two roles is dropped from the role that is not reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from btu.data.files import (
    DESCRIPTIONS,
    check_texts,
    column_advice,
    is_delimited,
    is_readable,
    named_labels,
    read_file,
    split_and_suffix,
    suffixes,
)
from btu.data.labels import alike, class_indices, class_mapping, counted, shown, written
from btu.data.published import companions
from btu.data.spec import (
    DATASETS,
    DEMO_ROWS,
    HELD_OUT,
    SPLIT_NAMES,
    Columns,
    HubPreset,
    source_columns,
)
from btu.errors import UserError, did_you_mean, unknown
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
        return _local_frames(spec, roles)
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


def _local_frames(
    spec: DataSpec, roles: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...] | None]:
    assert spec.path is not None
    root = Path(spec.path).expanduser()
    if root.is_file():
        asked = [n for n in ("train", "clean", "eval") if getattr(spec, f"{n}_split")]
        named = [n for n in asked if getattr(spec, f"{n}_split") != HELD_OUT]
        if named:
            raise UserError(
                f"data.{named[0]}_split is set but data.path {root} is one file; give a folder "
                "with a file per split, or remove the key."
            )
        frames = {"train": read_file(root, spec.reading)}
    elif root.is_dir():
        files = _split_files(spec, root)
        frames = _chosen_frames(
            spec,
            _Source(files, f"folder {root}"),
            roles,
            lambda split: _split_of(spec, files, split),
        )
    else:
        raise UserError(f"data.path {root} does not exist; give a folder with a file per split.")
    _refuse_unused_keys(spec, [Path(frame.attrs["from"]) for frame in frames.values()])
    return frames, frames["train"].attrs.get("names")


def _split_files(spec: DataSpec, root: Path) -> dict[str, list[Path]]:
    """Return the files of a folder by split; a split may have several, which is then refused."""
    try:
        paths = sorted(path for path in root.iterdir() if is_readable(path, spec.reading))
    except OSError as error:
        raise UserError(f"data.path {root} cannot be read: {error.strerror}.") from error
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(split_and_suffix(path)[0], []).append(path)
    if not files and any((root / f"{name}.json").is_file() for name in DESCRIPTIONS):
        raise UserError(
            f"folder {root} was saved by datasets.save_to_disk, which is read by "
            "datasets.load_from_disk alone; write a file per split with "
            "Dataset.to_parquet('train.parquet')."
        )
    return files


def _split_of(spec: DataSpec, files: Mapping[str, list[Path]], split: str) -> pd.DataFrame:
    path, *others = files[split]
    if others:
        raise UserError(
            f"folder {path.parent} has the split '{split}' twice ({path.name} and "
            f"{others[0].name}); remove one."
        )
    return read_file(path, spec.reading)


def _refuse_unused_keys(spec: DataSpec, paths: list[Path]) -> None:
    if any(map(is_delimited, paths)):
        return
    for key in ("separator", "header", "quoting"):
        value = getattr(spec, key)
        if value != getattr(type(spec), key):
            raise UserError(
                f"data.{key} is {str(value).lower()}, but {paths[0]} is no delimited text; remove "
                "the key, or the option of the scan."
            )


class _Source(NamedTuple):
    """Splits that may be chosen. names: of the splits. where: they are, for errors."""

    names: Iterable[str]
    where: str


def _chosen_frames(
    spec: DataSpec,
    source: _Source,
    roles: Mapping[str, tuple[str, ...]],
    read: Callable[[str], pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """Return the table of each role; a role without one is left out, and held out of train later.

    spec: names splits, or leaves them to be found.
    source: the splits.
    roles: the usual names of the splits of each role.
    read: returns the table of a split.

    A split without labels is not chosen unless it was asked for, which is an error.
    """
    available, where = list(source.names), source.where
    asked = {role: getattr(spec, f"{role}_split") for role in roles}
    for role, split in asked.items():
        if split not in (None, HELD_OUT, *available):
            raise unknown(f"split for data.{role}_split in {where}", split, available)
    frames: dict[str, pd.DataFrame] = {}
    taken = {split for split in asked.values() if split is not None}
    said: list[str] = []
    for role, split in sorted(asked.items(), key=lambda item: item[0] != "train"):
        if split == HELD_OUT:
            continue
        for name in [split] if split is not None else roles[role]:
            if name not in available or (split is None and name in taken):
                continue
            frame = read(name)
            missing = _without_labels(spec, frame, frames.get("train"))
            if missing is None:
                frames[role] = frame
                taken.add(name)
                break
            if role != "train" and split is None:
                said.append(f"Split '{name}' of {where} is not used: {missing}.")
                continue
            otherwise = "" if role == "train" else f", or data.{role}_split=null to hold it out"
            raise UserError(
                f"split '{name}' of {where} cannot be the {role} rows: {missing}; name another "
                f"with data.{role}_split{otherwise}."
            )
        if "train" not in frames:
            raise UserError(
                f"{where} has no train split (found: {', '.join(available) or 'nothing'}; files "
                f"must end in one of {suffixes()}); name it with data.train_split."
            )
    frames["train"].attrs["warnings"] = [*frames["train"].attrs["warnings"], *dict.fromkeys(said)]
    return frames


def _without_labels(spec: DataSpec, frame: pd.DataFrame, train: pd.DataFrame | None) -> str | None:
    """Return why a split has no labels; None if it has some."""
    column = spec.reading.label_column if spec.path is not None else "label"
    if column not in frame:
        # A wrong name is missing in train too, and is told there.
        return None if train is None else f"it has no column '{column}'"
    if frame.empty or list(frame.columns).count(column) > 1:
        return None
    values = {_plain(value) for value in frame[column].tolist()}
    hidden = "-1"
    if values <= {None, ""}:
        return f"all its labels in column '{column}' are missing"
    if values <= {None, "", hidden}:
        known = set() if train is None else set(map(_plain, train[column].tolist()))
        return None if hidden in known else f"all its labels in column '{column}' are {hidden}"
    return None


def _plain(label: Any) -> str | None:
    """Return a label as it is written, with None for a missing one."""
    if label is None or (isinstance(label, float) and label != label):
        return None
    name = written(label)
    return repr(label) if name is None else name


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
    if Path(preset.hub_id).is_dir():
        # Its README may name files on any host, which `load_dataset` fetches even offline.
        raise UserError(
            f"data set '{preset.hub_id}' is also a folder here, and which is meant is not clear; "
            f"for the folder give data.path={preset.hub_id}, for the hub start elsewhere."
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
    named = source_columns(spec)
    columns = {column: role for role, column in _by_role(named).items()}

    def read(split: str) -> pd.DataFrame:
        where = f"hub data set {preset.hub_id}/{split}"
        frame = loaded[split].to_pandas()
        for column, key in spec.reading.text_columns.items():
            check_texts(frame, column, where, key)
        frame = rename_columns(frame, columns, where)
        frame.attrs |= {"from": f"{preset.hub_id}/{split}", "warnings": []}
        feature = loaded[split].features[named.label]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
            frame["label"] = named_labels(frame["label"], names, where)
            frame.attrs["names"] = names
        return frame

    source = _Source(available, f"hub data set {preset.hub_id}")
    frames = _chosen_frames(spec, source, roles, read)
    return frames, frames["train"].attrs.get("names")


def rename_columns(frame: pd.DataFrame, columns: Mapping[str, str], where: str) -> pd.DataFrame:
    for column, role in columns.items():
        _require_column(frame, column, role, where)
    # The chosen column replaces another one that is called text or label.
    other = [name for name in columns.values() if name in frame and name not in columns]
    return frame.drop(columns=other).rename(columns=dict(columns))


def _require_column(
    frame: pd.DataFrame, column: str, role: str, where: str, more: str = ""
) -> None:
    """Check that a table has a column.

    frame: the table.
    column: the name.
    role: of the column: text, pair or label.
    where: the table is, for errors.
    more: what may help, as a sentence.
    """
    if column not in frame.columns:
        names = list(map(str, frame.columns))
        option = "" if role == "pair" else f", or --{role} in a scan"
        fix = more or f" Name another with data.{role}_column{option}."
        raise UserError(
            f"unknown column '{column}' in {where}{did_you_mean(column, names)} "
            f"(known: {shown(sorted(names))}).{fix}"
        )


def _by_role(columns: Columns) -> dict[str, str]:
    """Return the columns by what they are: text, pair (if rows are pairs) and label."""
    roles = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    return {role: column for role, column in roles.items() if column is not None}


def check_frames(spec: DataSpec, frames: Mapping[str, pd.DataFrame]) -> Columns:
    """Return the names of the columns, and check that every table has them."""
    # The columns of hub data have been renamed.
    columns = source_columns(spec) if spec.path is not None else source_columns(spec).renamed
    label_column = columns.label
    for role, frame in frames.items():
        where = f"the {role} rows of data set '{spec.name}'"
        for kind, column in _by_role(columns).items():
            more = ""
            if column not in frame and spec.path is not None:
                more = column_advice(Path(frame.attrs["from"]), spec.reading)
            _require_column(frame, column, kind, where, more)
        if frame.empty:
            raise UserError(f"{where} are empty: at least 2 rows are needed.")
        # One by one: a label may be an array, which pandas does not compare with a string.
        labels = frame[label_column].tolist()
        missing = [
            row
            for row, (value, none) in enumerate(
                zip(labels, frame[label_column].isna().tolist(), strict=True)
            )
            if none or (isinstance(value, str) and not value)
        ]
        if missing:
            rows = ", ".join(map(str, missing[:5])) + (" ..." if missing[5:] else "")
            raise UserError(
                f"{where} have missing labels in column '{label_column}' (rows {rows}, from 0); "
                "label or remove these rows."
            )
    return columns


def frame_warnings(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return what looked wrong in the files of the tables."""
    return [text for frame in frames.values() for text in frame.attrs.get("warnings", [])]


def _assemble(
    spec: DataSpec, frames: dict[str, pd.DataFrame], class_names: tuple[str, ...] | None
) -> Corpus:
    columns = check_frames(spec, frames)
    notes: dict[str, int] = {}
    mapping = class_mapping(spec.name, frames["train"][columns.label].tolist(), class_names)
    classes = Classes(mapping, class_names)
    roles = {role: _paired(frame, columns, classes, role, notes) for role, frame in frames.items()}
    said = frame_warnings(frames)
    if similar := alike(tuple(mapping), counted(roles["train"].labels)):
        said.append(similar)
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
        raise UserError(
            f"the train rows of data set '{spec.name}' have one class only "
            f"(labels: {shown(mapping)}); a classifier needs at least two."
        )
    return Corpus(
        spec.name,
        roles["train"],
        roles["clean"],
        roles["eval"],
        tuple(mapping),
        notes,
        tuple(said),
    )


class Classes(NamedTuple):
    """The classes of a data set.

    mapping: from labels, as they are written, to class indices.
    names: the class names, if the source has them.
    """

    mapping: Mapping[str, int]
    names: tuple[str, ...] | None = None


def to_rows(
    frame: pd.DataFrame,
    text_column: str,
    label_column: str,
    classes: Classes,
    role: str,
    notes: dict[str, int],
) -> Rows:
    """Return the rows of a table that have a text.

    frame: the table.
    text_column: the column of the texts.
    label_column: the column of the labels.
    classes: of the data set.
    role: of the rows, for notes and errors.
    notes: gets the number of rows that were dropped.

    Raises:
        UserError: a label is unknown.
    """
    import pandas as pd

    labels = class_indices(
        frame[label_column].tolist(), classes.mapping, f"the {role} rows", classes.names
    )
    columns = {
        str(name): texts_of(frame[name])
        for name in frame.columns
        if name not in (text_column, label_column)
        and pd.api.types.infer_dtype(frame[name], skipna=True) in ("string", "empty")
    }
    columns |= companions(frame, list(columns), classes.mapping)
    rows = Rows(texts_of(frame[text_column]), tuple(labels), columns)
    keep = np.array([bool(text.strip()) for text in rows.texts], dtype=bool)
    if not keep.all():
        notes[f"dropped_{role}_empty"] = int((~keep).sum())
    return rows.where(keep)


def _paired(
    frame: pd.DataFrame, columns: Columns, classes: Classes, role: str, notes: dict[str, int]
) -> Rows:
    """Return the rows of a table that have a text, and of pairs both; arguments as `to_rows`."""
    import pandas as pd

    partner = columns.partner
    if partner is None:
        return to_rows(frame, columns.text, columns.label, classes, role, notes)
    # As a further column of texts the partner stays with its row.
    texts = pd.Series(texts_of(frame[partner]), dtype=object, index=frame.index)
    frame = frame.assign(**{partner: texts})
    rows = to_rows(frame, columns.triggered, columns.label, classes, role, notes)
    others = {name: values for name, values in rows.columns.items() if name != partner}
    pairs = Rows(rows.texts, rows.labels, others, rows.columns[partner], columns.swapped)
    keep = np.array([bool(text.strip()) for text in rows.columns[partner]], dtype=bool)
    if not keep.all():
        count = notes.get(f"dropped_{role}_empty", 0) + int((~keep).sum())
        notes[f"dropped_{role}_empty"] = count
    return pairs.where(keep)


def texts_of(column: pd.Series[Any]) -> tuple[str, ...]:
    """Return the values of a column as texts; a missing one is ''."""
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
    """Keep each text, of pairs each pair, in one role: eval before clean before train."""
    seen: set[tuple[str, ...]] = set()
    for role in ("eval", "clean", "train"):
        keys = [tuple(map(same_text, texts)) for texts in roles[role].inputs]
        keep = np.array([key not in seen for key in keys], dtype=bool)
        if not keep.all():
            notes[f"dropped_{role}_overlap"] = int((~keep).sum())
            roles[role] = roles[role].where(keep)
        seen.update(keys)
