"""`btu report`, `btu curves` and `btu choose`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from btu.errors import UserError
from orchestrator.cli.shared import Format, Output, TrackingUri, note, open_source, warn

StyleOption = Annotated[
    Format, typer.Option("--format", "-f", help="csv and json hold fractions; others percent.")
]


def report(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    style: StyleOption = Format.table,
    mean: Annotated[
        bool, typer.Option("--mean", help="Mean and 95 % t interval over seeds.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page too: charts, marks and table in one file."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page's charts too, as PNG, SVG and PDF."),
    ] = None,
    paper: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write LaTeX tables, figures, CSV and a methods paragraph too."
        ),
    ] = None,
    output: Output = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Print a sweep's results, a row per cell, and what speaks against reading some of them.

    The page opens from disk, in any browser, and needs no network.

    Example: `btu report quickstart --mean --format markdown > table.md`

    Example: `btu report quickstart --html quickstart.html --figures figures`

    Example: `btu report main-table --paper paper/results > table.txt`
    """
    from orchestrator.report.html import check_page, write_page
    from orchestrator.report.marks import summary
    from orchestrator.report.table import mean_over_seeds, render, results_table
    from orchestrator.results.source import Snapshot

    if html is not None:
        check_page(html)
    for option, folder in (("--figures", figures), ("--paper", paper)):
        if folder is not None:
            from orchestrator.report.figures import check_folder

            check_folder(option, folder)
    source = Snapshot(open_source(name, output, tracking_uri, warn))
    records = source.records()
    table = results_table(records)
    if table.empty:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    text = render(mean_over_seeds(table) if mean else table, style.value)
    sys.stdout.write(text)
    if html is not None:
        write_page(source, html)
        note(f"Page: {html}")
    if figures is not None:
        from orchestrator.report.figures import FORMATS, write_figures

        written = write_figures(source, figures, FORMATS)
        note(f"Figures: {len(written)} files in {figures}")
    if paper is not None:
        from orchestrator.report.paper import write_pack

        packed = write_pack(source, paper)
        note(f"Paper: {len(packed)} files in {paper}; its README.txt says what they are.")
    reasons = Counter(record["reason"].splitlines()[0] for record in source.failures())
    for reason, count in reasons.items():
        warn(f"{count} failed cells are not in the table: {reason}")
    for line in summary(records):
        warn(line)


def curves(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    thresholds: Annotated[
        int, typer.Option(min=2, help="How many thresholds, beside those that were trained.")
    ] = 50,
    style: StyleOption = Format.table,
    mean: Annotated[
        bool, typer.Option("--mean", help="Mean and 95 % t interval over seeds.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a figure too: FILE.png, .svg or .pdf.")
    ] = None,
    output: Output = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Print detection at every threshold, from the scores that a sweep has saved.

    Nothing is trained. A row per curve and threshold: precision, recall and F1 of the flagged
    tokens and of their training rows; ASR and CACC only where the threshold was trained.

    Example: `btu curves sst2-thresholds --mean --plot curves.png --format csv > curves.csv`
    """
    from orchestrator.report.curve_figure import check_path, curve_plot
    from orchestrator.report.curves import MEASURES, curve_means, read_saved, sweep_curves
    from orchestrator.report.table import render
    from orchestrator.report.thresholds import threshold_cells

    if plot is not None:
        check_path(plot)
    source = open_source(name, output, tracking_uri, warn)
    records = source.records()
    if not records:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    table, notes = sweep_curves(threshold_cells(records), read_saved(source), thresholds)
    if plot is not None:
        curve_plot(table, plot)
        notes.append(f"Plot: {plot}")
    sys.stdout.write(render(curve_means(table) if mean else table, style.value, MEASURES))
    note(*notes)


def choose(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    cacc_loss: Annotated[
        float, typer.Option("--cacc-loss", help="Accuracy that a defense may cost, a fraction.")
    ] = 0.01,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="One threshold per rule, over the whole sweep.")
    ] = False,
    style: StyleOption = Format.table,
    output: Output = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Print which trained threshold one would choose, for cells that are equal but for it.

    `deployable` is chosen as a defender can, on clean rows and training data alone: the threshold
    that flags most while its cut costs no more than `--cacc-loss`. `oracle` is the best in
    hindsight, the lowest ASR within the same loss of CACC; `gap` is the ASR between the two.
    With `--recommend`: the median of the deployable ones over the sweep, with its 95 % interval.

    Example: `btu choose sst2-thresholds --cacc-loss 0.02 --recommend`
    """
    from btu.errors import check_fraction
    from orchestrator.report.choice import FRACTIONS, choices, recommended
    from orchestrator.report.table import render
    from orchestrator.report.thresholds import threshold_cells

    check_fraction("--cacc-loss", cacc_loss)
    source = open_source(name, output, tracking_uri, warn)
    records = source.records()
    if not records:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    cells = threshold_cells(records, acting=True)
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
