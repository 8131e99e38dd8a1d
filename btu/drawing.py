"""Panels as figures for files, drawn with matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from btu.panels import Axis, Heat, Panel, Series, labels

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
# Characters of a line, and of a label, in titles, beside rows and bars, and in the legend.
LINE = {"title": 34, "row": 26, "bar": 60, "legend": 60}
MOST = {"title": 120, "row": 78, "bar": 120, "legend": 60}
# Characters of a word beside its point.
WORD = 24
# The inches of a line and of a character of a label, at 8 points.
LINE_HEIGHT, CHARACTER = 0.15, 0.065


def draw(panels: Sequence[Panel], size: tuple[float, float] = (3.1, 2.5)) -> Any:
    """Return panels as one matplotlib figure with one legend.

    size: the width and height of a panel in inches; bars take what they need.
    """
    # Not pyplot: it keeps state, and trials may run in threads without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(panels)
    rows = -(-len(panels) // columns)
    legend = _legend(panels)
    extent = _extent(panels, columns, rows, size)
    beside = max(1, min(5, len(legend), int(extent[0] / _legend_width(legend))))
    below = LINE_HEIGHT * max(0, -(-len(legend) // beside) - 2)
    figure = Figure(figsize=(extent[0], extent[1] + below), layout="constrained")
    FigureCanvasAgg(figure)
    one_scale = panels[0].y.span is not None and len({panel.y for panel in panels}) == 1
    grid = figure.subplots(rows, columns, squeeze=False, sharey=one_scale)
    titles = _lines([panel.title for panel in panels], "title")
    for place, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        left = panels[place - place % columns]
        _draw(
            axes, panel, titles[panel.title], repeats=left is not panel and _same_rows(left, panel)
        )
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            list(handles.values()), [legend[label] for label in handles],
            loc="outside lower center", ncols=beside, fontsize=8,
        )  # fmt: skip
    # One layout for every format that the figure is saved in.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _legend(panels: Sequence[Panel]) -> dict[str, str]:
    return _lines([series.label for panel in panels for series in panel.series], "legend")


def _legend_width(legend: dict[str, str]) -> float:
    """Return the inches of the widest entry, with its line and the space around it."""
    return 0.6 + CHARACTER * max(map(len, legend.values()), default=0)


def _extent(
    panels: Sequence[Panel], columns: int, rows: int, size: tuple[float, float]
) -> tuple[float, float]:
    """Return the width and height of a figure in inches, without what a long legend adds.

    panels, size: as in `draw`.
    columns, rows: of the grid of panels.
    """
    width, height = size
    if panels[0].kind == "bars":
        lines = [text.count("\n") for text in _lines(panels[0].series[0].y, "bar").values()]
        return 9.0, 1.6 + 0.32 * len(lines) + LINE_HEIGHT * sum(lines)
    room = 0.0
    for heat in (panel.heat for panel in panels if panel.heat is not None):
        texts = list(_lines(heat.rows, "row").values())
        longest = max(len(line) for text in texts for line in text.split("\n"))
        # Short labels have their place in the panel.
        room = max(room, CHARACTER * (longest - 12))
        height = max(height, 0.8 + LINE_HEIGHT * sum(1 + text.count("\n") for text in texts))
    titles = _lines([panel.title for panel in panels], "title").values()
    # One settings line has its place above a panel.
    titled = max(0, max(title.count("\n") for title in titles) - 1)
    return 0.8 + room + width * columns, 1.0 + (height + LINE_HEIGHT * titled) * rows


def _same_rows(left: Panel, panel: Panel) -> bool:
    """Return whether two panels of a row are heat maps whose rows have the same labels."""
    return left.heat is not None and panel.heat is not None and left.heat.rows == panel.heat.rows


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


def _draw(axes: Any, panel: Panel, title: str, repeats: bool) -> None:
    """Draw a panel.

    title: as it is drawn.
    repeats: whether the panel to the left already labels the rows.
    """
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(_escaped(_known_glyphs(panel.x.label)), fontsize=8)
    axes.set_ylabel(_escaped(_known_glyphs(panel.y.label)), fontsize=8)
    if panel.heat is not None:
        _draw_heat(axes, panel.heat, repeats)
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
        label=series.label,
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
                _word(word), (x, value), xytext=(4, 3), textcoords="offset points", fontsize=7
            )


def _draw_bars(axes: Any, stacked: Sequence[Series]) -> None:
    names = _lines(stacked[0].y, "bar")
    left = np.zeros(len(names))
    for series in stacked:
        axes.barh(
            range(len(names)), series.x, left=left, color=series.color,
            hatch=series.hatch * 2, edgecolor="white", linewidth=0.3, label=series.label,
        )  # fmt: skip
        left += np.asarray(series.x)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()


def _draw_heat(axes: Any, heat: Heat, repeats: bool) -> None:
    values = np.array(heat.shares, dtype=np.float64)
    low, high = heat.span
    axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    names = [""] * len(heat.rows) if repeats else list(_lines(heat.rows, "row").values())
    axes.set_yticks(range(len(heat.rows)), names)
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


def _lines(texts: Sequence[str], place: str) -> dict[str, str]:
    """Return labels as they are drawn, by text: short, distinct, broken into lines, escaped.

    place: one of `LINE`.
    """
    known = {text: _known_glyphs(text) for text in texts}
    # Breaks that a text brings, as between a title and its settings, stay.
    short = labels((line for text in known.values() for line in text.split("\n")), MOST[place])
    return {
        text: _escaped(
            "\n".join(
                "\n".join(textwrap.wrap(short[line], LINE[place])) for line in shown.split("\n")
            )
        )
        for text, shown in known.items()
    }


def _word(text: str) -> str:
    (short,) = labels([_known_glyphs(text)], WORD).values()
    return _escaped(short)


def _known_glyphs(text: str) -> str:
    """Return a text whose characters are escapes where the figure's font does not have them."""
    return "".join(c if c == "\n" or ord(c) in _glyphs() else _code(c) for c in text)


def _code(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


@cache
def _glyphs() -> frozenset[int]:
    """Return the characters of the font that matplotlib draws with."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _escaped(text: str) -> str:
    """Return text for matplotlib without its markup: dollar signs would enclose mathematics."""
    return text.replace("$", r"\$")
