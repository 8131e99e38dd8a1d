"""`btu compare`: paired differences of two sweeps."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from btu.errors import UserError
from orchestrator.cli.shared import Format, Output, errors, open_source, warn


def compare(
    name_a: Annotated[str, typer.Argument(help="A sweep.", metavar="NAME_A")],
    name_b: Annotated[str, typer.Argument(help="Another, or the same.", metavar="NAME_B")],
    revision_a: Annotated[
        str | None,
        typer.Option(help="Only A's cells of this version: begin of a commit, recipe or data."),
    ] = None,
    revision_b: Annotated[str | None, typer.Option(help="The same for B.")] = None,
    cells: Annotated[bool, typer.Option("--cells", help="A row per cell and metric.")] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric to compare; may be given several times (btu list metrics)."),
    ] = None,
    across: Annotated[
        list[str] | None,
        typer.Option(help="Setting that need not be equal, e.g. defense.threshold; repeatable."),
    ] = None,
    style: Annotated[
        Format, typer.Option("--format", "-f", help="csv and json hold fractions; others percent.")
    ] = Format.table,
    output: Output = "runs",
    output_b: Annotated[
        str | None, typer.Option(help="Output folder of B. Default: that of A.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="Read from this MLflow store alone, not from disk.")
    ] = None,
    tracking_uri_b: Annotated[
        str | None, typer.Option(help="MLflow store of B. Default: that of A, or its --output-b.")
    ] = None,
) -> None:
    """Print what differs between two sweeps, or versions, over the same cells: A minus B.

    Cells are paired by the settings that both have, seed by seed: the mean difference, its 95 % t
    interval over seeds and p of the paired t test. What has no counterpart is told with the reason.

    Example: `btu compare sst2-contrast sst2-frequency`

    Example: `btu compare main main --revision-a 3fa9c1 --revision-b 77e0d2 --metric seconds`
    """
    from orchestrator.report import compare as comparing
    from orchestrator.report.table import render

    where_a = (name_a, output, tracking_uri)
    uri_b = tracking_uri_b or (None if output_b else tracking_uri)
    where_b = (name_b, output_b or output, uri_b)
    if where_a == where_b and revision_a == revision_b:
        raise UserError(
            f"'{name_a}' would be compared with itself; name another sweep, --output-b or "
            "--tracking-uri-b, or two versions with --revision-a and --revision-b."
        )
    sides = []
    for side, where, revision in (("A", where_a, revision_a), ("B", where_b, revision_b)):
        records = open_source(*where, warn=warn).records()
        if not records:
            raise UserError(f"sweep '{where[0]}' ({side}) has no finished cell yet; launch it.")
        if revision is not None:
            records = comparing.of_revision(records, revision, f"'{where[0]}' ({side})")
        sides.append(records)
    metrics = tuple(dict.fromkeys(metric or comparing.COMPARED))
    found = comparing.compare(sides[0], sides[1], metrics, across or ())
    table = (comparing.pair_table if cells else comparing.group_table)(found, metrics)
    raw = style in (Format.csv, Format.json)
    shown = table if raw else comparing.readable_differences(table)
    sys.stdout.write(render(shown, style.value, ()))
    for note in found.notes:
        errors.print(note, highlight=False, markup=False, soft_wrap=True)
