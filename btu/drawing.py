"""Panels as figures for files, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btu.panels import Axis, Heat, Panel, Series

FORMATS = ("png", "svg", "pdf")
# The columns of a figure whose panels do not fall into equal rows.
COLUMNS = 4
DPI = 130
DASHES = {"": "none", "solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
SYMBOLS = {
    "": None, "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^",
    "triangle-down": "v", "cross": "P", "x": "X", "star": "*",
}  # fmt: skip
# Sizes are in plotly's pixels, of which 96 are an inch; matplotlib counts in 72nds of an inch.
POINTS_PER_PIXEL = 0.7


def draw(panels: Sequence[Panel], size: tuple[float, float] = (3.1, 2.5)) -> Any:
    """Return panels as one matplotlib figure with one legend.

    size: the width and height of a panel in inches; bars take what they need.
    """
    # Not pyplot: it keeps state, and trials may run in threads without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(panels)
    rows = -(-len(panels) // columns)
    extent = (0.8 + size[0] * columns, 1.0 + size[1] * rows)
    if panels[0].kind == "bars":
        extent = (9.0, 1.6 + 0.32 * len(panels[0].series[0].y))
    figure = Figure(figsize=extent, layout="constrained")
    FigureCanvasAgg(figure)
    one_scale = panels[0].y.span is not None and len({panel.y for panel in panels}) == 1
    grid = figure.subplots(rows, columns, squeeze=False, sharey=one_scale)
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
    # One layout for every format that the figure is saved in.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's suffix, one of `FORMATS`."""
    from matplotlib import rc_context

    # Without dates and random ids the same results give the same bytes.
    metadata = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "btu"}):
        figure.savefig(path, dpi=DPI, metadata=metadata[path.suffix])


def _columns(panels: Sequence[Panel]) -> int:
    """Return the number of columns: panels of one attack make a row if that fills the grid.

    The attack is the title up to the first comma.
    """
    if panels[0].kind == "bars":
        return 1
    attacks = len({panel.title.split(",")[0] for panel in panels})
    several = len(panels) // attacks
    if len(panels) % attacks == 0 and 1 < several <= 6:
        return several
    return min(COLUMNS, len(panels))


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_title(_escaped(panel.title), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(_escaped(panel.x.label), fontsize=8)
    axes.set_ylabel(_escaped(panel.y.label), fontsize=8)
    if panel.heat is not None:
        _draw_heat(axes, panel.heat)
        return
    if panel.kind == "bars":
        _draw_bars(axes, panel.series)
    else:
        for series in panel.series:
            _draw_series(axes, series)
        axes.grid(alpha=0.25)
    _set_axis(axes.xaxis, axes.set_xscale, axes.set_xlim, panel.x)
    _set_axis(axes.yaxis, axes.set_yscale, axes.set_ylim, panel.y)


def _draw_series(axes: Any, series: Series) -> None:
    y, low, high = (np.array(v, dtype=np.float64) for v in (series.y, series.low, series.high))
    marker = series.marker.removesuffix("-open")
    is_open = marker != series.marker
    axes.plot(
        series.x, y,
        color=series.color,
        linestyle=DASHES[series.dash],
        linewidth=1.0 if series.thin else 1.6,
        marker=SYMBOLS[marker],
        markersize=series.size * POINTS_PER_PIXEL,
        markeredgewidth=1 if is_open else 0,
        markerfacecolor="none" if is_open else series.color,
        alpha=series.opacity,
        label=_escaped(series.label),
    )  # fmt: skip
    if series.low and series.dash:
        axes.fill_between(series.x, low, high, color=series.color, alpha=0.18, lw=0)
    elif series.low:
        # Rounding may put a mean outside its range.
        whiskers = np.maximum([y - low, high - y], 0.0)
        axes.errorbar(series.x, y, yerr=whiskers, fmt="none", ecolor=series.color, capsize=2)
    for x, value, word in zip(series.x, y, series.text or [""] * len(y), strict=True):
        if word:
            axes.annotate(
                _escaped(word), (x, value), xytext=(4, 3), textcoords="offset points", fontsize=7
            )


def _draw_bars(axes: Any, stacked: Sequence[Series]) -> None:
    left = np.zeros(len(stacked[0].x))
    for series in stacked:
        axes.barh(
            [_escaped(name) for name in series.y], series.x, left=left, color=series.color,
            hatch=series.hatch * 2, edgecolor="white", linewidth=0.3,
            label=_escaped(series.label),
        )  # fmt: skip
        left += np.asarray(series.x)
    axes.invert_yaxis()


def _draw_heat(axes: Any, heat: Heat) -> None:
    values = np.array(heat.shares, dtype=np.float64)
    low, high = heat.span
    axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), [_escaped(row) for row in heat.rows])
    texts = heat.texts()
    for row, column in np.ndindex(values.shape):
        # Viridis ends in a light yellow.
        light = values[row, column] - low > 0.6 * (high - low)
        axes.text(
            column, row, texts[row][column], ha="center", va="center", fontsize=8,
            color="black" if light else "white",
        )  # fmt: skip


def _set_axis(axis: Any, set_scale: Any, set_limits: Any, wanted: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    if wanted.kind == "log":
        set_scale("log")
    if wanted.span:
        set_limits(*wanted.span)
    if wanted.ticks:
        axis.set_ticks(list(wanted.ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if wanted.percent:
        # As many digits as the ticks need: CACC may differ by tenths.
        axis.set_major_formatter(PercentFormatter(1.0))


def _escaped(text: str) -> str:
    """Return text for matplotlib without its markup: dollar signs would enclose mathematics."""
    return text.replace("$", r"\$")
