"""The page's charts as files, for papers and slides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btu.errors import UserError, unknown
from btu.paths import is_open, nearest
from orchestrator.report.charts import MARKED, Axis, Chart, Panel, Series, charts
from orchestrator.results.source import Source

FORMATS = ("png", "svg", "pdf")
# More panels than a page holds go to further files.
MOST_PANELS, COLUMNS = 24, 4
DPI = 130
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
SYMBOLS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v",
    "cross": "P", "x": "X", "star": "*",
}  # fmt: skip


def write_figures(source: Source, folder: Path, formats: Iterable[str] = ("pdf",)) -> list[Path]:
    """Write a sweep's charts as NAME.FORMAT into a folder; return the files.

    A chart of more than `MOST_PANELS` panels goes on in NAME-2.FORMAT; one without data is not
    written. The folder is made where it is missing.

    Raises:
        UserError: a format is unknown, no cell is finished, or the folder cannot be written.
    """
    formats = list(formats)
    for name in formats:
        if name not in FORMATS:
            raise unknown("figure format", name, FORMATS)
    records = source.records()
    if not records:
        raise UserError(f"sweep '{source.name}' has no finished cell yet; launch it first.")
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder for the figures.")
    drawn = charts(records, source.tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return list(_written(drawn, folder, formats))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); name another folder for the "
            "figures."
        ) from error


def check_folder(option: str, folder: Path) -> None:
    """Raise a `UserError` that names the option unless files can be written into a folder.

    Where it is missing, it must be possible to make it.
    """
    there = nearest(folder)
    if not there.is_dir():
        raise UserError(f"{option} {folder} cannot be written: {there} is no folder.")
    if not is_open(there):
        raise UserError(
            f"{option} {folder} cannot be written: {there} must be writable; name another folder."
        )


def check_file(option: str, path: Path) -> None:
    """Raise a `UserError` that names the option unless a file can be written in a folder there."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist; make it first.")
    if not is_open(path.absolute().parent):
        raise UserError(
            f"{option} {path}: the folder {path.parent} must be writable; name another one."
        )


def _written(drawn: Iterable[Chart], folder: Path, formats: Sequence[str]) -> Iterator[Path]:
    from matplotlib import rc_context

    for chart in drawn:
        for number, start in enumerate(range(0, len(chart.panels), MOST_PANELS), 1):
            figure = chart_figure(chart.panels[start : start + MOST_PANELS])
            for suffix in formats:
                stem = chart.name if number == 1 else f"{chart.name}-{number}"
                path = folder / f"{stem}.{suffix}"
                # Without dates and random ids the same results are the same bytes.
                metadata = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
                with rc_context({"svg.hashsalt": "btu"}):
                    figure.savefig(path, dpi=DPI, metadata=metadata[suffix])
                yield path


def chart_figure(panels: list[Panel]) -> Any:
    """Return panels of one chart as a matplotlib figure with their legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = panels[0].kind == "bars"
    columns = 1 if bars else min(COLUMNS, len(panels))
    # An attack's rates in a line, where there are few of them.
    attacks = [panel.title.split(",")[0] for panel in panels]
    several = len(panels) // len(set(attacks))
    if len(panels) % len(set(attacks)) == 0 and 1 < several <= 6:
        columns = several
    lines = -(-len(panels) // columns)
    size = (9.0, 1.6 + 0.32 * len(panels[0].series[0].y)) if bars else (
        0.8 + 3.1 * columns, 1.0 + 2.5 * lines)  # fmt: skip
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it needs no display and keeps no state
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    labeled = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if labeled:
        figure.legend(
            list(labeled.values()), list(labeled), loc="outside lower center",
            ncols=min(5, len(labeled)), fontsize=8,
        )  # fmt: skip
    # Laid out once, not anew for every format.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_title(_plain(panel.title), fontsize=9)
    axes.tick_params(labelsize=8)
    if panel.heat is not None:
        _draw_heat(axes, panel)
        return
    if panel.kind == "bars":
        left = np.zeros(len(panel.series[0].x))
        for series in panel.series:
            axes.barh(
                [_plain(name) for name in series.y], series.x, left=left, color=series.color,
                hatch=series.hatch * 2, edgecolor="white", linewidth=0.3, label=series.label,
            )  # fmt: skip
            left += np.asarray(series.x)
        axes.invert_yaxis()
    else:
        for series in panel.series:
            _draw_series(axes, series)
        axes.grid(alpha=0.25)
    _dress(axes.xaxis, axes.set_xscale, axes.set_xlim, panel.x)
    _dress(axes.yaxis, axes.set_yscale, axes.set_ylim, panel.y)
    axes.set_xlabel(_plain(panel.x.label), fontsize=8)
    axes.set_ylabel(_plain(panel.y.label), fontsize=8)


def _draw_series(axes: Any, series: Series) -> None:
    y = np.array([np.nan if value is None else value for value in series.y], dtype=np.float64)
    symbol = series.marker.removesuffix("-open")
    axes.plot(
        series.x, y,
        color=series.color,
        linestyle=DASHES[series.dash] if series.dash else "none",
        linewidth=1.6 if series.marker or series.label.endswith("front") else 1.0,
        marker=SYMBOLS[symbol] if symbol else None,
        markersize=series.size * 0.7,
        markeredgewidth=1 if series.marker.endswith("-open") else 0,
        markerfacecolor="none" if series.marker.endswith("-open") else series.color,
        alpha=series.opacity,
        label=_plain(series.label),
    )  # fmt: skip
    if series.low:
        low, high = (
            np.array([np.nan if v is None else v for v in ends], dtype=np.float64)
            for ends in (series.low, series.high)
        )
        axes.fill_between(series.x, low, high, color=series.color, alpha=0.18, lw=0)
    for x, value, word in zip(series.x, y, series.text or [""] * len(y), strict=True):
        if word:
            axes.annotate(
                _plain(word), (x, value), xytext=(4, 3), textcoords="offset points", fontsize=7
            )


def _draw_heat(axes: Any, panel: Panel) -> None:
    heat = panel.heat
    assert heat is not None
    values = np.array(
        [[np.nan if v is None else v for v in line] for line in heat.shares], dtype=np.float64
    )
    low, high = heat.span
    axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), [_plain(row) for row in heat.rows])
    axes.set_xlabel(_plain(panel.x.label), fontsize=8)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if value == value:
            # Viridis ends in a light yellow.
            dark = value - low > 0.6 * (high - low)
            mark = f" {MARKED}" if heat.marked[row][column] else ""
            axes.text(
                column, row, f"{value * 100:.1f}{mark}", ha="center", va="center", fontsize=8,
                color="black" if dark else "white",
            )  # fmt: skip


def _dress(axis: Any, scale: Any, limits: Any, wanted: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    if wanted.kind == "log":
        scale("log")
    if wanted.span:
        limits(*wanted.span)
    if wanted.ticks:
        axis.set_ticks(list(wanted.ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if wanted.percent:
        # As many digits as the ticks need: CACC may differ by tenths.
        axis.set_major_formatter(PercentFormatter(1.0))


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as markup, as it would between dollars."""
    return text.replace("$", r"\$")
