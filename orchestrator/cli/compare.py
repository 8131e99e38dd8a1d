"""`btu compare`: paired differences of two sweeps."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NamedTuple

import typer

from btu.errors import UserError
from orchestrator.cli.shared import (
    Format,
    Output,
    Style,
    TrackingUri,
    note,
    open_source,
    warn,
)
from orchestrator.sweep.output import DEFAULT_OUTPUT


class _Side(NamedTuple):
    """One of the two sweeps: where it is, and which version of it."""

    name: str
    output: str
    tracking_uri: str | None
    revision: str | None


def compare(
    name_a: Annotated[str, typer.Argument(help="A sweep.", metavar="NAME_A")],
    name_b: Annotated[str, typer.Argument(help="Another, or the same.", metavar="NAME_B")],
    revision_a: Annotated[
        str | None,
        typer.Option(help="Only A's cells of this version: a prefix of a commit, recipe or data."),
    ] = None,
    revision_b: Annotated[str | None, typer.Option(help="The same for B.")] = None,
    cells: Annotated[bool, typer.Option("--cells", help="A row per cell and metric.")] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric to compare (btu list metrics); repeatable."),
    ] = None,
    across: Annotated[
        list[str] | None,
        typer.Option(help="Setting that may differ, e.g. defense.threshold; repeatable."),
    ] = None,
    style: Style = Format.table,
    output: Output = DEFAULT_OUTPUT,
    output_b: Annotated[
        str | None, typer.Option(help="Output folder of B. Default: that of A.")
    ] = None,
    tracking_uri: TrackingUri = None,
    tracking_uri_b: Annotated[
        str | None, typer.Option(help="MLflow store of B. Default: that of A, or its --output-b.")
    ] = None,
) -> None:
    """Print the differences between two sweeps, or versions, over the same cells: A minus B.

    Cells are paired by the settings that both have, seed by seed: the mean difference, its 95 % t
    interval over seeds and p of the paired t test. Cells without a counterpart are listed with the
    reason.

    Example: `btu compare sst2-contrast sst2-frequency`

    Example: `btu compare main main --revision-a 3fa9c1 --revision-b 77e0d2 --metric seconds`
    """
    from orchestrator.report import compare as comparing
    from orchestrator.report.table import render

    uri_b = tracking_uri_b or (None if output_b else tracking_uri)
    side_a = _Side(name_a, output, tracking_uri, revision_a)
    side_b = _Side(name_b, output_b or output, uri_b, revision_b)
    if side_a == side_b:
        raise UserError(
            f"'{name_a}' would be compared with itself; name another sweep, --output-b or "
            "--tracking-uri-b, or two versions with --revision-a and --revision-b."
        )
    metrics = tuple(dict.fromkeys(metric or comparing.COMPARED))
    found = comparing.compare(_records(side_a, "A"), _records(side_b, "B"), metrics, across or ())
    table = (comparing.pair_table if cells else comparing.group_table)(found, metrics)
    raw = style in (Format.csv, Format.json)
    shown = table if raw else comparing.readable_differences(table)
    sys.stdout.write(render(shown, style.value, ()))
    note(*found.notes)


def _records(side: _Side, letter: str) -> list[Any]:
    from orchestrator.report.compare import of_revision
    from orchestrator.results.source import records_or_refuse

    source = open_source(side.name, side.output, side.tracking_uri, warn)
    records = records_or_refuse(source, letter)
    if side.revision is None:
        return records
    return of_revision(records, side.revision, f"'{side.name}' ({letter})")
