"""`btu import`: a published poisoned file beside its clean one, as a column."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btu.errors import UserError
from orchestrator.cli.shared import say

if TYPE_CHECKING:
    import pandas as pd

    from btu.types import BoolArray


def import_(
    clean: Annotated[
        Path,
        typer.Argument(
            help="The clean rows: a file (.parquet, .csv, .tsv, .jsonl, .json).", metavar="CLEAN"
        ),
    ],
    poisoned: Annotated[
        Path, typer.Argument(help="The published rows: such a file.", metavar="POISONED")
    ],
    column: Annotated[
        str, typer.Option(help="Name of the new column, e.g. that of the attack.", metavar="NAME")
    ],
    output: Annotated[
        Path, typer.Option(help="The Parquet file to write; may be CLEAN.", metavar="FILE")
    ],
    text: Annotated[str, typer.Option(help="Column of texts in CLEAN.")] = "text",
    label: Annotated[str, typer.Option(help="Column of labels in CLEAN.")] = "label",
    poisoned_text: Annotated[
        str | None, typer.Option(help="Column of texts in POISONED. Default: as in CLEAN.")
    ] = None,
    poisoned_label: Annotated[
        str | None, typer.Option(help="Column of labels in POISONED. Default: as in CLEAN.")
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="Column of POISONED with the texts before the poison, by which rows are matched. "
            "Default: rows are matched in order."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="POISONED has the rows of this label alone, as test files of attacks do. May be "
            "given several times.",
            metavar="LABEL",
        ),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of the files, e.g. latin-1. Default: utf-8.")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Separator of text files: a character, or tab. Default: by the suffix."),
    ] = None,
) -> None:
    """Put a published poisoned file beside its clean rows, for the attack `rewrite`.

    Writes CLEAN with the columns NAME (the published text), NAME_label (its label) and
    NAME_poisoned (whether the row differs). Import further files into the same output.

    Example: `btu import train.tsv train_lws.tsv --column lws --output olid/train.parquet`
    """
    from btu.data.files import read_file
    from btu.data.load import texts_of
    from btu.data.published import LABEL, POISONED, PublishedFile, align
    from btu.data.spec import FileReading, check_encoding, separator_character

    if encoding is not None:
        check_encoding(encoding)
    mark = None if separator is None else separator_character(separator)
    _check_output(output, clean)
    if not column.strip() or column in (text, label):
        raise UserError(
            f"--column {column!r} must name a new column, other than those of texts and labels."
        )
    own = read_file(clean, FileReading(text, label, encoding, mark))
    names = (poisoned_text or text, poisoned_label or label)
    theirs = read_file(poisoned, FileReading(*names, encoding, mark))
    for table, where, needed in (
        (own, clean, (text, label)),
        (theirs, poisoned, (*names, *([original] if original else []))),
    ):
        _check_columns(table, where, needed)
    new = [column, f"{column}{LABEL}", f"{column}{POISONED}"]
    taken = [name for name in new if name in own.columns]
    if taken:
        raise UserError(
            f"{clean} has a column '{taken[0]}' already; choose another name with --column, or "
            "import into the file without it."
        )
    published, labels, differs = align(
        texts_of(own[text]),
        own[label].tolist(),
        PublishedFile(
            texts_of(theirs[names[0]]),
            _given_labels(theirs, names[1], own.attrs.get("names"), str(poisoned)),
            texts_of(theirs[original]) if original else None,
            str(poisoned),
        ),
        only or (),
    )
    written = own.copy()
    written[new[0]], written[new[1]], written[new[2]] = published, labels, differs
    _write(written, output, [text, label])
    _tell(written, label, new, differs, output)


def _check_output(output: Path, clean: Path) -> None:
    if output.suffix.lower() != ".parquet":
        raise UserError(f"--output {output} must end in .parquet.")
    if output.exists() and output.resolve() != clean.resolve():
        raise UserError(
            f"--output {output} exists already; import into it by naming it as CLEAN too, or "
            "choose another name."
        )


def _given_labels(
    theirs: pd.DataFrame, column: str, names: tuple[str, ...] | None, where: str
) -> list[Any]:
    """Return the published labels; numbers by name where the clean file alone names its classes."""
    from btu.data.files import named_labels

    labels = theirs[column]
    numbered = all(isinstance(value, int) for value in labels.tolist())
    if names and numbered and not theirs.attrs.get("names"):
        labels = named_labels(labels, names, where)
    found: list[Any] = labels.tolist()
    return found


def _check_columns(table: pd.DataFrame, where: Path, needed: tuple[str, ...]) -> None:
    from btu.errors import did_you_mean

    for name in needed:
        if name not in table.columns:
            known = list(map(str, table.columns))
            raise UserError(
                f"unknown column '{name}' in {where}{did_you_mean(name, known)} (known: "
                f"{', '.join(known)}); name the columns with --text and --label, --poisoned-text "
                "and --poisoned-label, --original."
            )


def _write(table: pd.DataFrame, output: Path, named: list[str]) -> None:
    """Write the table whole or not at all: the output may be the only copy of earlier imports."""
    import pyarrow as pa

    part = output.with_name(f".{output.name}.part")
    order = [*named, *(name for name in table.columns if name not in named)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _of_one_type(table)[order].to_parquet(part, index=False)
        part.replace(output)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror or error}); name another file."
        ) from error
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise UserError(
            f"the rows cannot be written as Parquet ({error}); a column has values that are no "
            "text, or characters that cannot be written. Mend the files first."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _of_one_type(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with text in each column of several types: Parquet has one for each."""
    found = table.copy()
    for name in table.columns:
        values = table[name].tolist()
        kinds = {type(value) for value in values if value is not None and value == value}
        if len(kinds) > 1 and kinds <= {str, int, float, bool}:
            found[name] = [None if v is None or v != v else str(v) for v in values]
    return found


def _tell(
    table: pd.DataFrame, label: str, new: list[str], differs: BoolArray, output: Path
) -> None:
    """Print what was imported, and the keys with which a sweep takes it."""
    from btu.data.labels import written

    own = [str(written(value)) for value in table[label]]
    given = [str(value) for value in table[new[1]]]
    flips = [(a, b) for a, b in zip(own, given, strict=True) if a != b]
    say(
        f"{output}: {len(own)} rows, {len(flips)} of them with another label, {int(differs.sum())} "
        f"with another text or label."
    )
    targets = sorted({b for _, b in flips})
    if len(targets) > 1:
        say(f"Labels change to several classes ({', '.join(targets)}); a backdoor has one target.")
        return
    kept = Counter(a for d, a, b in zip(differs, own, given, strict=True) if d and a == b)
    if kept:
        counted = ", ".join(f"{count} of class {name}" for name, count in kept.most_common())
        say(
            f"Rows that differ in their text alone: {counted}."
            + (
                " A tokenizer that respells texts is no poison; if the attack poisons its target "
                "class too, set label_mode: mixed."
                if flips
                else ""
            )
        )
    if not targets and not kept:
        say("No row differs: there is nothing to attack with.")
        return
    mode = "dirty" if targets else "clean"
    target = targets[0] if targets else kept.most_common(1)[0][0]
    say(
        f"attack: {{name: rewrite, column: {new[0]}, poison_rate: given, label_mode: {mode}, "
        f"target_label: {target}}}"
    )
