"""How far each token's embedding row moved, as panels, and the plot of a cell."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from btu.drawing import draw, save
from btu.panels import BLUE, GRAY, ORANGE, Axis, Panel, Series, log_ticks

if TYPE_CHECKING:
    import pandas as pd

PREFIX = "drift_"
# Label, whether flagged, whether flagged and not cut, whether of the trigger, color, marker, size,
# opacity.
GROUPS = (
    ("not flagged", False, False, False, GRAY, "circle", 4, 0.7),
    ("flagged, clean", True, False, False, ORANGE, "square", 7, 1.0),
    ("flagged, clean, not cut", True, True, False, ORANGE, "square-open", 7, 1.0),
    ("trigger, missed", False, False, True, BLUE, "x", 10, 1.0),
    ("trigger, flagged", True, False, True, BLUE, "star", 13, 1.0),
    ("trigger, flagged, not cut", True, True, True, BLUE, "star-open", 13, 1.0),
)
# With more points than this they overlap and are drawn smaller.
CROWD = 2000
# How many flagged tokens are named in a cell's plot, in addition to the trigger's.
NAMED = 5


def drift_columns(tokens: pd.DataFrame) -> list[str]:
    """Return the columns of a token table that contain the drift of an exposure round."""
    # Not ``drift_sigmas``, which is no distance.
    return sorted(
        name
        for name in tokens.columns
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).isdigit()
    )


def drawable(tokens: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the tokens that occur in the training set and have a finite drift."""
    found: pd.DataFrame = tokens[(tokens["count"] > 0) & np.isfinite(tokens[column])]
    return found


def drift_panel(title: str, tokens: pd.DataFrame, column: str, named: Set[int]) -> Panel:
    """Return the drift in one exposure round against how often each token occurs.

    tokens: those to draw, of `drawable`.
    column: one of `drift_columns`.
    named: the index of the tokens that are named beside their point.
    """
    drawn = []
    # Only tables of a defense with a bar on the cost of a cut say which tokens are vetoed.
    vetoed = np.zeros(len(tokens), dtype=bool)
    if "vetoed" in tokens:
        vetoed = tokens["vetoed"].to_numpy() == 1
    for label, flagged, kept, trigger, color, marker, size, opacity in GROUPS:
        shared = (tokens["flagged"] == flagged) & (tokens["trigger"] == trigger)
        part = tokens[shared & (vetoed == kept)]
        if part.empty:
            continue
        words = part["token"].astype(str)
        text = [word if i in named else "" for i, word in words.items()]
        drawn.append(
            Series(
                label, part["count"].astype(int).tolist(), part[column].astype(float).tolist(),
                color, marker=marker, size=size if len(part) <= CROWD else size / 2,
                opacity=opacity, tip=words.tolist(),
                text=text if any(text) else [],
            )
        )  # fmt: skip
    return Panel(title, "lines", *_axes(tokens["count"], tokens[column]), drawn)


def _axes(counts: pd.Series[int], drifts: pd.Series[float]) -> tuple[Axis, Axis]:
    """Return axes with room for the words beside the points."""
    few, many = (counts.min(), counts.max()) if len(counts) else (1, 10)
    low, high = (drifts.min(), drifts.max()) if len(drifts) else (0.0, 1.0)
    wide = max(many / few, 2.0)
    height = high - low or max(abs(high), 1e-9)
    span = float(few / wide**0.05), float(many * wide**0.2)
    return (
        Axis("occurrences in the training set", "log", span=span, ticks=log_ticks(*span)),
        Axis(
            "embedding drift (L2)",
            span=(float(low - 0.05 * height), float(high + 0.15 * height)),
        ),
    )


def drift_plot(tokens: pd.DataFrame, path: Path) -> None:
    """Draw the drift of a cell's tokens, a panel per exposure round.

    The trigger's tokens and the flagged tokens that moved furthest are named. Without drift columns
    no file is written.

    tokens: from `btu.scoring.token_table`.
    """
    panels = []
    for column in drift_columns(tokens):
        seen = drawable(tokens, column)
        flagged = seen[seen["flagged"]].nlargest(NAMED, column)
        named = {*seen.index[seen["trigger"]], *flagged.index}
        title = f"exposure round {column.removeprefix(PREFIX)}"
        panels.append(drift_panel(title, seen, column, named))
    if panels:
        save(draw(panels, size=(4.0, 3.2)), path)
