"""`btu scan`: search a data set of your own for triggers."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from btu.errors import UserError
from orchestrator.cli.shared import console, errors, note, say, warn
from orchestrator.sweep.output import DEFAULT_OUTPUT, SCANS

if TYPE_CHECKING:
    from btu.scan.export import Measured
    from btu.scan.plan import ScanPlan
    from btu.scan.report import ScanReport

# Not 2, the code of a user's error.
EXIT_FOUND, EXIT_UNRELIABLE = 1, 3
STAGES = "stages"
OTHER_FOLDER = "name another with --out, --rows or --tokens"
# Digits of the rows' fingerprint in the name of the default work folder, which tells files of
# the same name apart.
DIGITS = 8
# How many tokens that are not flagged get example rows.
EXAMPLES = 3


class ScanFormat(StrEnum):
    """How `btu scan` prints."""

    table = "table"
    json = "json"


class _Files(NamedTuple):
    """Where the results go: the work folder, the table of rows and the table of tokens."""

    folder: Path
    rows: Path
    tokens: Path


def scan(
    data: Annotated[
        str,
        typer.Argument(
            help="A file or a folder with a file per split (.parquet, .csv, .tsv, .jsonl, .json), "
            "a data set's name or a hub id.",
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
    text: Annotated[str | None, typer.Option(help="Column of texts. Default: text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of labels. Default: label.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to scan. Default: train.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of the files, e.g. latin-1. Default: utf-8.")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Separator of text files: a character, or tab. Default: by the suffix."),
    ] = None,
    no_header: Annotated[
        bool,
        typer.Option(
            "--no-header", help="The files have no header; --text and --label are numbers from 0."
        ),
    ] = False,
    quoting: Annotated[
        bool | None,
        typer.Option(
            "--quoting/--no-quoting",
            help="Whether quotes enclose fields. Default: unless tabs separate.",
        ),
    ] = None,
    victim: Annotated[
        str, typer.Option(help="Model to train on the rows: see `btu list victims`, or a folder.")
    ] = "offline",
    max_length: Annotated[int, typer.Option(min=4, help="Longest input, in tokens.")] = 128,
    rule: Annotated[
        str | None, typer.Option(help="Detection rule. Default: contrast; frequency needs no FILE.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Lowest score of a flagged token. Default: the rule's.")
    ] = None,
    fdr: Annotated[
        float | None,
        typer.Option(
            help="Instead of --threshold: how many benign tokens may be flagged by chance, e.g. "
            "0.01. Default: 0.05."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the short training.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Threads to compute with. Default: all CPUs.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Compute on a CUDA device.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Work folder; results in it are not computed again. Default: "
            "runs/scan/NAME-HASH, with a hash of the rows.",
            metavar="FOLDER",
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="File for the rows with a flagged token (.csv, .parquet, .jsonl). Default: "
            "FOLDER/suspicious_rows.csv.",
            metavar="FILE",
        ),
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Write all rows to it, most suspicious first.")
    ] = False,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File for all tokens. Default: FOLDER/tokens.csv.", metavar="FILE"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Train a model on DATA, cut the flagged tokens and save it here.", metavar="DIR"
        ),
    ] = None,
    max_cut_cost: Annotated[
        float | None,
        typer.Option(
            help="With --export: a token is not cut if that costs a larger fraction of the trusted "
            "rows; 1 cuts all. Default: 0.02, with another rule 1."
        ),
    ] = None,
    contradicted: Annotated[
        str | None,
        typer.Option(
            help="With --export: `relabel` the oddest rows of a class whose labels contradict the "
            "trusted rows, as those of a paraphrase attack do, or `keep` them. Default: relabel, "
            "with another rule keep.",
            metavar="relabel|keep",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to show.")] = 10,
    style: Annotated[
        ScanFormat, typer.Option("--format", "-f", help="json has fractions, table percent.")
    ] = ScanFormat.table,
    fail_on_finding: Annotated[
        bool, typer.Option("--fail-on-finding", help="Exit with 1 if a token is flagged.")
    ] = False,
) -> None:
    """Search data of your own for the trigger of a backdoor; nothing is poisoned.

    Tokens are ranked by how much more often a class of DATA has them than trusted rows explain,
    weighted by how far they move in a short training. Exit code 0 whether or not a token is
    flagged, except with `--fail-on-finding`; 2 if DATA or an option cannot be used; 3 if the result
    cannot be relied on: more than a quarter of the tokens is unknown to the victim or cut off, or
    the exported model is no better than the most frequent class.

    Example: `btu scan reviews.csv --clean trusted.csv --text review --label stars`
    """
    from btu.scan.export import check_export
    from btu.scan.plan import prepare_scan
    from btu.scan.report import check_table
    from btu.training import choose_device, use_threads

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
        encoding=encoding,
        separator=separator,
        header=not no_header,
        quoting=quoting,
        victim=victim,
        max_length=max_length,
        rule=rule,
        threshold=threshold,
        fdr=fdr,
        max_cut_cost=max_cut_cost,
        contradicted=contradicted,
        epochs=epochs,
        seed=seed,
    )
    # Expanded here, so that the tables are written where they are checked to be.
    folder = (out or _default_folder(plan)).expanduser()
    files = _Files(
        folder,
        (rows or folder / "suspicious_rows.csv").expanduser(),
        (tokens or folder / "tokens.csv").expanduser(),
    )
    if export is not None:
        check_export(plan, export)
    _check_files(files, export, data, clean)
    # On the error output, so that --format json prints JSON alone.
    note(*plan.notes())
    for text_of_warning in plan.corpus.warnings:
        warn(text_of_warning)
    use_threads(cpus or os.cpu_count() or 1)
    report, measured = _run(plan, files, export, gpus=gpus, all_rows=all_rows)
    if style is ScanFormat.json:
        _print_json(report, files, export, measured, top)
    else:
        _show(report, top)
        _show_files(report, files, all_rows)
        if measured is not None:
            for line in _export_lines(report.plan, measured, str(export)):
                say(line)
    if measured is not None and measured.at_chance:
        warn(f"warning: {measured.warning()}")
    if fail_on_finding and report.flagged:
        raise typer.Exit(EXIT_FOUND)
    if report.reading.too_little or (measured is not None and measured.at_chance):
        raise typer.Exit(EXIT_UNRELIABLE)


def _run(
    plan: ScanPlan, files: _Files, export: Path | None, *, gpus: float, all_rows: bool
) -> tuple[ScanReport, Measured | None]:
    """Scan, and write the tables and the model; return the report and what the export measured."""
    from btu.scan.export import export as export_model
    from btu.scan.reading import read_texts
    from btu.scan.report import run_scan, write_report
    from btu.training import NonFiniteLossError
    from orchestrator.run.progress import StageProgress

    progress = StageProgress(errors)
    try:
        # Before the training, which takes minutes.
        reading = read_texts(plan, files.folder / STAGES, gpus=gpus, progress=progress)
        note(*map(_printable, reading.notes(plan.corpus.label_names)))
        if warning := reading.warning():
            warn(f"warning: {warning}")
        report = run_scan(plan, files.folder / STAGES, gpus=gpus, progress=progress)
        write_report(report.tokens, files.tokens)
        write_report(report.rows if all_rows else report.suspicious_rows, files.rows)
        if export is None:
            return report, None
        command = shlex.join(["btu", *sys.argv[1:]])
        return report, export_model(report, export, command=command, gpus=gpus, progress=progress)
    except NonFiniteLossError as error:
        raise UserError(str(error)) from error


def _default_folder(plan: ScanPlan) -> Path:
    fingerprint = plan.corpus.fingerprints()["train"]
    return (
        Path(DEFAULT_OUTPUT) / SCANS / f"{plan.spec.name.replace('/', '-')}-{fingerprint[:DIGITS]}"
    )


def _check_files(files: _Files, export: Path | None, data: str, clean: str | None) -> None:
    """Raise a `UserError` if a result cannot be written, or would overwrite data or another.

    Folders are made last: a request that is refused leaves nothing behind.
    """
    from btu.paths import check_folder, not_written
    from btu.scan.report import check_table

    folder, tables = files.folder, [files.rows, files.tokens]
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
        check_folder(f"folder {place}", place, OTHER_FOLDER)
    for table in tables:
        check_table(table)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(f"folder {place}", error, OTHER_FOLDER) from error


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


def _print_json(
    report: ScanReport, files: _Files, export: Path | None, measured: Measured | None, top: int
) -> None:
    """Print the report as JSON.

    report: of the scan.
    files: where its tables are.
    export: where its model is.
    measured: of that model.
    top: how many tokens to print.
    """
    found = {
        **report.summary(top),
        "files": {"rows": str(files.rows), "tokens": str(files.tokens)},
    }
    if export is not None:
        found["export"] = str(export)
    if measured is not None:
        found["at_chance"] = measured.at_chance
        found["vetoed"] = [cost.token for cost in measured.vetoed]
        found |= measured.second_stage(report.plan.corpus.label_names)
        measured.add_costs(found["tokens"])
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _show(report: ScanReport, top: int) -> None:
    """Print the tokens, rows with them, and the verdict. top: how many tokens to show."""
    from btu.rules.base import DEFAULT_RULE
    from btu.rules.surplus import expected_flags

    shown = report.tokens.head(top).to_dict("records")
    console.print(_token_table(shown, report.plan.defense.rule == DEFAULT_RULE))
    say("class: share of the token's rows (of all rows). trusted: trusted rows with the token.")
    if report.plan.defense.rule == DEFAULT_RULE:
        say(
            "surplus: how much more often a class has the token than the trusted rows and chance "
            "explain (in brackets: without the rows of more suspicious tokens). drift: how far its "
            "embedding moved, among tokens as frequent. score: the surplus, raised for tokens that "
            f"moved far; on average at most {expected_flags(report.bar):.2g} benign tokens reach "
            f"{report.bar:g}."
        )
    _show_unknown(report, shown)
    # The verdict says to read the rows of all of them.
    named = [token for token in shown if token["flagged"]]
    named += _to_read(report)[:EXAMPLES]
    for token in named or shown[:EXAMPLES]:
        say(f"\n{_printable(token['token'])}")
        for example in report.examples(int(token["token_id"])):
            say(f"  row {example.row} [{_printable(example.label)}] {example.excerpt}")
    say(f"\n{_verdict(report, top)}")


def _to_read(report: ScanReport) -> list[dict[Any, Any]]:
    """Return the tokens that are not flagged and whose rows the verdict says to read."""
    tokens = report.tokens
    unknown = tokens["token_id"] == report.reading.token_id
    found = report.unconfirmed
    if report.unconfirmed_words:
        # The token of the words, once, and first.
        others = found[found["token_id"] != report.reading.token_id]
        return [*tokens[unknown].to_dict("records"), *others.to_dict("records")]
    return list(found.to_dict("records"))


def _show_unknown(report: ScanReport, shown: list[dict[Any, Any]]) -> None:
    """Print the words behind the unknown token if it is among the tokens shown, or suspicious."""
    from btu.scan.reading import NAMED
    from btu.scan.report import words_text

    reading = report.reading
    if reading.token_id not in [t["token_id"] for t in shown] and not report.unconfirmed_words:
        return
    named = words_text(reading, report.plan.corpus.label_names, NAMED)
    say(
        f"{reading.token} is every word that the victim does not know: {_printable(named)}. "
        "Unlearning it affects them all."
    )


def _token_table(tokens: list[dict[Any, Any]], parts: bool) -> Table:
    """Return the table of tokens. parts: whether to show what makes up a score."""
    heads = ("", "token", "score", *(("surplus", "drift") if parts else ()), "flagged", "rows")
    table = Table(*heads, "class", "trusted", header_style="bold")
    for token in tokens:
        table.add_row(
            str(token["rank"]),
            escape(_printable(token["token"])),
            _number(token["score"]),
            *((_surplus(token), _number(token["drift_sigmas"])) if parts else ()),
            "[red]yes[/red]" if token["flagged"] else "no",
            str(token["rows"]),
            escape(
                f"{_printable(token['class'])} {token['share']:.0%} ({token['class_share']:.0%})"
            ),
            str(token["clean_rows"]),
        )
    return table


def _number(score: float) -> str:
    from btu.scan.report import score_text

    return "-" if math.isnan(score) else score_text(score)


def _surplus(token: dict[Any, Any]) -> str:
    """Return the surplus, and what more suspicious tokens leave of it if they explain a part."""
    alone, left = _number(token["surplus"]), _number(token["surplus_left"])
    return alone if left == alone else f"{alone} ({left})"


def _verdict(report: ScanReport, top: int) -> str:
    from btu.scan.report import score_text

    bar = f"bar {report.bar:g} (rule {report.plan.defense.rule})"
    if report.flagged:
        names = report.tokens["token"][: min(report.flagged, top)]
        more = f" and {report.flagged - top} more" if report.flagged > top else ""
        said = (
            f"{report.flagged} token{'s' * (report.flagged != 1)} flagged: "
            f"{' '.join(map(_printable, names))}{more}; {bar}. Look at the rows before you trust "
            "the data or the verdict."
        )
    else:
        first = report.tokens.iloc[0]
        # The first words, which are read even if the rest is not.
        alone = ", which is no all-clear here" if report.reading.too_little else ""
        said = (
            f"Nothing was flagged{alone}. Highest score {score_text(report.highest)} "
            f"('{_printable(first['token'])}'), {bar}. Triggers without fixed tokens are not found."
        )
    parts = (said, _unconfirmed(report), _explained(report), report.reading.warning())
    return " ".join(part for part in parts if part)


def _unconfirmed(report: ScanReport) -> str:
    """Return the sentence on tokens that are not flagged although their surplus is high."""
    from btu.scan.report import score_text

    def reason(drift: float) -> str:
        return "too rare to be scored" if math.isnan(drift) else f"drift {score_text(drift)}"

    tokens = [
        f"{_printable(token['token'])} (surplus {score_text(token['surplus_left'])}, "
        f"{reason(token['drift_sigmas'])})"
        for token in report.unconfirmed.to_dict("records")
        # Not counted twice: its words follow.
        if token["token_id"] != report.reading.token_id or not report.unconfirmed_words
    ]
    words = report.reading.words
    tokens += [
        f"the unknown word {_printable(word)} (surplus "
        f"{score_text(float(words.surplus[words.words.index(word)]))}; its token "
        f"{report.reading.token} is not flagged)"
        for word in report.unconfirmed_words
    ]
    if not tokens:
        return ""
    which = "1 token is" if len(tokens) == 1 else f"{len(tokens)} tokens are"
    return (
        f"{which} not flagged although the surplus alone reaches "
        f"{report.surplus_bar:g}: {_some(tokens)}. Read their rows; more trusted rows would tell "
        "more."
    )


def _explained(report: ScanReport) -> str:
    """Return the sentence on tokens whose surplus more suspicious tokens explain."""
    from btu.scan.report import score_text

    tokens = [
        f"{_printable(token['token'])} (surplus {score_text(token['surplus'])}, "
        f"{score_text(token['surplus_left'])} without them)"
        for token in report.explained.to_dict("records")
    ]
    if not tokens:
        return ""
    return f"The rows of more suspicious tokens explain the surplus of {_some(tokens)}."


def _some(named: list[str]) -> str:
    from btu.scan.reading import NAMED

    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"{', '.join(named[:NAMED])}{more}"


def _show_files(report: ScanReport, files: _Files, all_rows: bool) -> None:
    which = "all rows" if all_rows else "rows with a flagged token"
    count = len(report.rows if all_rows else report.suspicious_rows)
    say(f"{files.rows}: {count} {which}, most suspicious first")
    say(f"{files.tokens}: all {len(report.tokens)} tokens")


def _export_lines(plan: ScanPlan, measured: Measured, folder: str) -> list[str]:
    """Return what is printed about an exported model."""
    found = measured.as_metrics()
    line = (
        f"{folder}: the model, with its card. Accuracy on {len(plan.corpus.clean)} trusted rows: "
        f"{found['accuracy_before_cut']:.1%} before the cut, {found['accuracy_after_cut']:.1%} "
        "after."
    )
    if not math.isnan(found["cut_flips"]):
        line += (
            f" On rows with a flagged token, the cut changed {found['cut_flips']:.1%} of the "
            "predictions that matched the label."
        )
    lines = [line]
    if measured.target is not None:
        name = _printable(plan.corpus.label_names[measured.target])
        lines.append(measured.relabeling(name))
    if not measured.vetoed:
        return lines
    kept = [f"{_printable(cost.token)} ({cost.cost_tuned:.1%})" for cost in measured.vetoed]
    return [
        *lines,
        f"Flagged and not cut, since the cut costs more than {plan.defense.max_cut_cost:.1%} "
        f"of the trusted rows after tuning: {_some(kept)}. If one of them is a trigger, its "
        "backdoor is still in the model; --max-cut-cost 1 cuts all flagged tokens.",
    ]


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))
