"""What a figure shows, before anything is drawn. `btu.drawing` and the HTML page both draw it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from btu.printing import printable

# The Okabe-Ito colors, which color-blind readers can tell apart. Yellow and black are left out:
# they vanish on white and on black.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
GRAY = "#8A8A8A"
# Follows a number that a guard marks.
MARKED = "\N{DAGGER}"
# Characters of a setting's value in a label; tables show it whole.
VALUE = 32


@dataclass(frozen=True)
class Series:
    """Points with one meaning.

    x, y: the coordinates; None in y where the value is undefined.
    dash: solid, dash, dot or dashdot; empty: no line.
    marker: a plotly symbol; empty: no points.
    hatch: the pattern of bars.
    size: of the points, in pixels.
    thin: whether the line is thinner than others.
    low, high: the range at each point. A line has a band, points without a line have whiskers.
    text: a label beside each point; empty: none.
    tip: what the page shows when the pointer is on a point.
    """

    label: str
    x: list[Any]
    y: list[Any]
    color: str
    dash: str = ""
    marker: str = ""
    hatch: str = ""
    size: float = 7
    opacity: float = 1.0
    thin: bool = False
    low: list[Any] = field(default_factory=list)
    high: list[Any] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tip: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """An axis.

    kind: linear, log or category.
    percent: whether the values are fractions that are shown in percent.
    span: the first and the last value; None: from the data.
    ticks: the values with a tick; empty: the renderer chooses.
    """

    label: str
    kind: str = "linear"
    percent: bool = False
    span: tuple[float, float] | None = None
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Heat:
    """Shares by row and column.

    shares: None where there is no cell.
    marked: whether the share is shown with `MARKED`.
    span: the shares at the ends of the color scale.
    """

    rows: list[str]
    columns: list[str]
    shares: list[list[float | None]]
    marked: list[list[bool]]
    span: tuple[float, float]

    def texts(self) -> list[list[str]]:
        """Return what each field shows: percent and mark; empty where there is no cell."""
        return [
            ["" if share is None else f"{share * 100:.1f}{f' {MARKED}' if mark else ''}"
             for share, mark in zip(shares, marked, strict=True)]
            for shares, marked in zip(self.shares, self.marked, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    kind: lines, heat or bars. Bars are horizontal and stacked in the order of the series.
    """

    title: str
    kind: str
    x: Axis
    y: Axis
    series: list[Series] = field(default_factory=list)
    heat: Heat | None = None


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return round values from low to high; both must be positive."""
    decades = math.log10(high / low)
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
    kept = tuple(tick for tick in ticks if low <= tick <= high)
    return kept if len(kept) > 1 else (low, high)


def labels(texts: Iterable[str], most: int = VALUE) -> dict[str, str]:
    """Return a short text for each text. Different texts get different ones.

    A short text is on one line; an ellipsis replaces its middle. A number tells apart the texts
    that would look alike.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(texts):
        short, number = _shortened(text, most), 1
        while short in taken:
            number += 1
            suffix = f" ({number})"
            short = _shortened(text, most - len(suffix)) + suffix
        taken.add(short)
        found[text] = short
    return found


def _shortened(text: str, most: int) -> str:
    line = " ".join(printable(text).split())
    if len(line) <= most:
        return line
    tail = (most - 1) // 3
    return f"{line[: most - 1 - tail].rstrip()}\N{HORIZONTAL ELLIPSIS}{line[-tail:].lstrip()}"
