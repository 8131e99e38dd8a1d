"""`btu report`, `btu curves` and `btu choose`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btu.errors import UserError
from orchestrator.cli.shared import (
    Format,
    Mean,
    Output,
    Style,
    SweepName,
    TrackingUri,
    note,
    open_source,
    warn,
)
from orchestrator.sweep.output import DEFAULT_OUTPUT

if TYPE_CHECKING:
    from orchestrator.results.source import Source


def report(
    name: SweepName,
    style: Style = Format.table,
    mean: Mean = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a page: charts, marks and table in a file."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the page's charts, as PNG, SVG and PDF."),
    ] = None,
    paper: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write LaTeX tables, figures, CSV and a methods paragraph."
        ),
    ] = None,
    output: Output = DEFAULT_OUTPUT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print a sweep's results, a row per cell, and warnings about numbers that mislead.

    The page opens from disk, in any browser, and needs no network.

    Example: `btu report quickstart --mean --format markdown > table.md`

    Example: `btu report quickstart --html quickstart.html --figures figures`

    Example: `btu report main-table --paper paper/results > table.txt`
    """
    from orchestrator.report.marks import summary
    from orchestrator.report.table import mean_over_seeds, render, results_table
    from orchestrator.results.source import Snapshot, records_or_refuse

    _check_paths(html, figures, paper)
    source = Snapshot(open_source(name, output, tracking_uri, warn))
    records = records_or_refuse(source)
    table = results_table(records)
    sys.stdout.write(render(mean_over_seeds(table) if mean else table, style.value))
    if html is not None:
        _write_page(source, html)
    if figures is not None:
        _write_figures(source, figures)
    if paper is not None:
        _write_paper(source, paper)
    reasons = Counter(record["reason"].splitlines()[0] for record in source.failures())
    for reason, count in reasons.items():
        warn(f"{count} failed cells are not in the table: {reason}")
    for line in summary(records):
        warn(line)


def _check_paths(html: Path | None, figures: Path | None, paper: Path | None) -> None:
    """Raise a `UserError` if one of them cannot be written."""
    from btu.paths import check_folder
    from orchestrator.report.html import check_page

    if html is not None:
        check_page(html)
    for option, folder in (("--figures", figures), ("--paper", paper)):
        if folder is not None:
            check_folder(f"{option} {folder}", folder)


def _write_page(source: Source, path: Path) -> None:
    from orchestrator.report.html import write_page

    write_page(source, path)
    note(f"Page: {path}")


def _write_figures(source: Source, folder: Path) -> None:
    from btu.drawing import FORMATS
    from orchestrator.report.figures import write_figures

    written = write_figures(source, folder, FORMATS)
    note(f"Figures: {len(written)} files in {folder}")


def _write_paper(source: Source, folder: Path) -> None:
    from orchestrator.report.paper import write_pack

    written = write_pack(source, folder)
    note(f"Paper: {len(written)} files in {folder}; its README.txt describes them.")


def curves(
    name: SweepName,
    thresholds: Annotated[
        int, typer.Option(min=2, help="How many thresholds, beside those that were trained.")
    ] = 50,
    style: Style = Format.table,
    mean: Mean = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also write a figure: FILE.png, .svg or .pdf.")
    ] = None,
    output: Output = DEFAULT_OUTPUT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print detection at every threshold, from the scores that a sweep has saved.

    Nothing is trained. A row per curve and threshold: precision, recall and F1 of the flagged
    tokens and of their training rows; ASR and CACC only at thresholds that were trained.

    Example: `btu curves sst2-thresholds --mean --plot curves.png --format csv > curves.csv`
    """
    from orchestrator.report.curve_figure import check_path, curve_plot
    from orchestrator.report.curves import MEASURES, curve_means, read_saved, sweep_curves
    from orchestrator.report.table import render
    from orchestrator.report.thresholds import threshold_cells
    from orchestrator.results.source import records_or_refuse

    if plot is not None:
        check_path(plot)
    source = open_source(name, output, tracking_uri, warn)
    cells = threshold_cells(records_or_refuse(source))
    table, notes = sweep_curves(cells, read_saved(source), thresholds)
    if plot is not None:
        curve_plot(table, plot)
        notes.append(f"Plot: {plot}")
    sys.stdout.write(render(curve_means(table) if mean else table, style.value, MEASURES))
    note(*notes)


def choose(
    name: SweepName,
    cacc_loss: Annotated[
        float, typer.Option("--cacc-loss", help="Accuracy that a defense may cost, a fraction.")
    ] = 0.01,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="One threshold per rule, over the whole sweep.")
    ] = False,
    style: Style = Format.table,
    output: Output = DEFAULT_OUTPUT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print which trained threshold to choose, for cells that differ in the threshold alone.

    `deployable` is the choice of a defender, who has clean rows and training data alone: the
    threshold that flags most while its cut costs no more than `--cacc-loss`. `oracle` is the best
    in hindsight: the lowest ASR within the same loss of CACC. `gap` is the ASR between the two.
    With `--recommend`: the median of the deployable ones over the sweep, with its 95 % interval.

    Example: `btu choose sst2-thresholds --cacc-loss 0.02 --recommend`
    """
    from btu.settings import check_fraction
    from orchestrator.report.choice import FRACTIONS, choices, recommended
    from orchestrator.report.table import render
    from orchestrator.report.thresholds import threshold_cells
    from orchestrator.results.source import records_or_refuse

    check_fraction("--cacc-loss", cacc_loss)
    source = open_source(name, output, tracking_uri, warn)
    cells = threshold_cells(records_or_refuse(source), acting=True)
    table, notes = choices(cells, cacc_loss)
    if recommend:
        table, further = recommended(cells, table)
        notes += further
        if table.empty:
            raise UserError(
                f"sweep '{name}' has nothing to recommend a threshold from: {' '.join(further)} "
                "Attack at a higher rate, or train longer."
            )
    sys.stdout.write(render(table, style.value, (*FRACTIONS, "flagged")))
    note(*notes)
