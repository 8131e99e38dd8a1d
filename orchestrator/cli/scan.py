"""`btu scan`: a data set of one's own, searched for triggers."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from btu.errors import UserError
from orchestrator.cli.shared import console, errors, note, say

if TYPE_CHECKING:
    from btu.scan.export import Measured
    from btu.scan.plan import ScanPlan
    from btu.scan.report import ScanReport

EXIT_FOUND = 1
STAGES = "stages"
# Digits of the rows' fingerprint in the default work folder: files of one name share none.
DIGITS = 8
# Of how many tokens examples are shown where nothing is flagged.
EXAMPLES = 3


class Format(StrEnum):
    """How `btu scan` prints."""

    table = "table"
    json = "json"


def scan(
    data: Annotated[
        str,
        typer.Argument(
            help="A file or a folder with a file per split (.parquet, .csv, .tsv, .jsonl), a "
            "data set's name or a hub id.",
            metavar="DATA",
        ),
    ],
    clean: Annotated[
        str | None,
        typer.Option(
            help="Trusted rows: a file, or a split of DATA. Default: its split clean or test.",
            metavar="FILE",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts. Default: text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of labels. Default: label.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split that is scanned. Default: train.")
    ] = None,
    victim: Annotated[
        str, typer.Option(help="Model that the rows train: see `btu list victims`, or a folder.")
    ] = "offline",
    max_length: Annotated[int, typer.Option(min=4, help="Longest input, in tokens.")] = 128,
    rule: Annotated[
        str | None, typer.Option(help="Detection rule. Default: contrast; frequency needs no FILE.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score from which a token is flagged. Default: the rule's.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of the exposure.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Threads to compute with. Default: all CPUs.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Compute on a CUDA device.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Work folder; what is there is not computed again. Default: runs/scan/NAME-HASH, "
            "of the rows.",
            metavar="FOLDER",
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Where rows with a flagged token go (.csv, .parquet, .jsonl). Default: "
            "FOLDER/suspicious_rows.csv.",
            metavar="FILE",
        ),
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Write all rows there, most suspicious first.")
    ] = False,
    tokens: Annotated[
        Path | None,
        typer.Option(help="Where all tokens go. Default: FOLDER/tokens.csv.", metavar="FILE"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Train a model on DATA, cut the flagged tokens, save it here.", metavar="DIR"
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to show.")] = 10,
    style: Annotated[
        Format, typer.Option("--format", "-f", help="json holds fractions, table percent.")
    ] = Format.table,
    fail_on_finding: Annotated[
        bool, typer.Option("--fail-on-finding", help="Exit with 1 if a token is flagged.")
    ] = False,
) -> None:
    """Search data of your own for the trigger of a backdoor; nothing is poisoned.

    Tokens are ranked by how they move in a short training on DATA, beside what trusted rows
    explain. Exit code 0 whether or not something is found, but for `--fail-on-finding`; 2 if DATA
    or an option cannot be used.

    Example: `btu scan reviews.csv --clean trusted.csv --text review --label stars`
    """
    from btu.scan.export import check_export
    from btu.scan.export import export as export_model
    from btu.scan.plan import prepare_scan
    from btu.scan.report import check_table, run_scan, write_report
    from btu.training import NonFiniteLossError, choose_device, use_threads
    from orchestrator.run.progress import StageProgress

    for table in (rows, tokens):
        if table is not None:
            check_table(table)
    gpus = 1.0 if gpu else 0.0
    choose_device(gpus)
    plan = prepare_scan(
        data,
        clean=clean,
        text=text,
        label=label,
        split=split,
        victim=victim,
        max_length=max_length,
        rule=rule,
        threshold=threshold,
        epochs=epochs,
        seed=seed,
    )
    # As the export: the tables are written where they are checked to be.
    folder = (out or _default_folder(plan)).expanduser()
    row_file = (rows or folder / "suspicious_rows.csv").expanduser()
    token_file = (tokens or folder / "tokens.csv").expanduser()
    if export is not None:
        check_export(plan, export)
    _check_files(folder, [row_file, token_file], export, data, clean)
    # What is printed as JSON stands alone on the output.
    note(*plan.notes())
    use_threads(cpus or os.cpu_count() or 1)
    progress = StageProgress(errors)
    measured = None
    try:
        report = run_scan(plan, folder / STAGES, gpus=gpus, progress=progress)
        write_report(report.tokens, token_file)
        write_report(report.rows if all_rows else report.suspicious_rows, row_file)
        if export is not None:
            command = shlex.join(["btu", *sys.argv[1:]])
            measured = export_model(report, export, command=command, gpus=gpus, progress=progress)
    except NonFiniteLossError as error:
        raise UserError(str(error)) from error
    if style is Format.json:
        files = {"rows": str(row_file), "tokens": str(token_file)}
        found = {**report.summary(top), "files": files}
        if export is not None:
            found["export"] = str(export)
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        _show(report, top)
        which = "all rows" if all_rows else "rows with a flagged token"
        count = len(report.rows if all_rows else report.suspicious_rows)
        say(f"{row_file}: {count} {which}, most suspicious first")
        say(f"{token_file}: all {len(report.tokens)} tokens")
        if measured is not None:
            _show_export(report.plan, measured, str(export))
    if fail_on_finding and report.flagged:
        raise typer.Exit(EXIT_FOUND)


def _default_folder(plan: ScanPlan) -> Path:
    fingerprint = plan.corpus.fingerprints()["train"]
    return Path("runs") / "scan" / f"{plan.spec.name.replace('/', '-')}-{fingerprint[:DIGITS]}"


def _check_files(
    folder: Path, tables: list[Path], export: Path | None, data: str, clean: str | None
) -> None:
    """Raise a `UserError` if a result cannot be written, or would overwrite data or another.

    Folders are made last: a request that is refused leaves nothing behind.
    """
    from btu.scan.report import check_table, obstacle

    if len(set(map(_place, tables))) < len(tables):
        raise UserError(f"--rows and --tokens are both {tables[0]}; name two files.")
    inputs = [Path(name).expanduser() for name in (data, clean) if name is not None]
    for table in tables:
        where = _place(table)
        for source in inputs:
            if where == source.resolve():
                raise UserError(f"{table} would overwrite data that is scanned; name another file.")
            if source.is_dir() and where.parent == source.resolve():
                raise UserError(
                    f"{table} is in the folder of the data, where the next scan would take it for "
                    "a split; name another file."
                )
    _check_apart(folder, tables, export)
    places = (folder / STAGES, *(table.parent for table in tables))
    for place in places:
        if why := obstacle(place):
            raise _no_folder(place, why)
    for table in tables:
        check_table(table)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_folder(place, str(error.strerror)) from error


def _check_apart(folder: Path, tables: list[Path], export: Path | None) -> None:
    """Raise a `UserError` if one result would be in the way of another."""
    if export is not None:
        model = _place(export)
        if model == _place(folder):
            raise UserError(f"--export {export} is the work folder; name another.")
        for path in (folder, folder / STAGES, *tables):
            if _place(path).is_relative_to(model):
                raise UserError(
                    f"{path} is in the folder of --export {export}, which is the model's alone; "
                    "name another with --export, --out, --rows or --tokens."
                )
    folders = [folder, *(table.parent for table in tables), *([] if export is None else [export])]
    for table in tables:
        for place in folders:
            if _place(place).is_relative_to(_place(table)):
                raise UserError(
                    f"{table} is a table, and cannot be the folder {place} too; name another file "
                    "with --rows or --tokens."
                )


def _place(path: Path) -> Path:
    return path.expanduser().resolve()


def _no_folder(folder: Path, why: str) -> UserError:
    return UserError(
        f"folder {folder} cannot be written ({why}); name another with --out, --rows or --tokens."
    )


def _show(report: ScanReport, top: int) -> None:
    from btu.scan.report import score_text

    table = Table("", "token", "score", "flagged", "rows", "class", "trusted", header_style="bold")
    shown = report.tokens.head(top).to_dict("records")
    for token in shown:
        table.add_row(
            str(token["rank"]),
            escape(_printable(token["token"])),
            "-" if math.isnan(token["score"]) else score_text(token["score"]),
            "[red]yes[/red]" if token["flagged"] else "no",
            str(token["rows"]),
            escape(
                f"{_printable(token['class'])} {token['share']:.0%} ({token['class_share']:.0%})"
            ),
            str(token["clean_rows"]),
        )
    console.print(table)
    say("class: share of the token's rows (of all rows). trusted: trusted rows that hold it.")
    for token in [t for t in shown if t["flagged"]] or shown[:EXAMPLES]:
        say(f"\n{_printable(token['token'])}")
        for example in report.examples(int(token["token_id"])):
            say(f"  row {example.row} [{_printable(example.label)}] {example.excerpt}")
    defense = report.plan.defense
    bar = f"bar {report.bar:g} (rule {defense.rule})"
    if report.flagged:
        names = report.tokens["token"][: min(report.flagged, top)]
        more = f" and {report.flagged - top} more" if report.flagged > top else ""
        say(
            f"\n{report.flagged} token{'s' * (report.flagged != 1)} flagged: "
            f"{' '.join(map(_printable, names))}{more}; {bar}. Look at the rows before you trust "
            "the data or the verdict."
        )
    elif math.isnan(report.highest):
        say(f"\nNothing was flagged: no token stands in enough rows to be scored; {bar}.")
    else:
        first = report.tokens.iloc[0]
        say(
            f"\nNothing was flagged. Highest score {score_text(report.highest)} "
            f"('{_printable(first['token'])}'), {bar}. Triggers without fixed tokens are not found."
        )


def _show_export(plan: ScanPlan, measured: Measured, folder: str) -> None:
    found = measured.as_metrics()
    flips = found["cut_flips"]
    say(
        f"{folder}: the model, with its card. On {len(plan.corpus.clean)} trusted rows the cut "
        f"took the accuracy from {found['accuracy_before_cut']:.1%} to "
        f"{found['accuracy_after_cut']:.1%}"
        + (
            "."
            if math.isnan(flips)
            else f"; of rows with a flagged token that obeyed their label it changed {flips:.1%}."
        )
    )


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))
