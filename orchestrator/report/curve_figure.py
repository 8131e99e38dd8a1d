"""Detection curves as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from btu.errors import UserError
from btu.rules.base import RULES
from orchestrator.report.curves import MEASURES
from orchestrator.report.figures import check_file

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe-Ito: told apart by the color-blind.
LINES = {"precision": "#0072B2", "recall": "#E69F00", "f1": "#009E73"}
POINTS = {"asr": ("#D55E00", "v"), "cacc": ("#000000", "s")}
LABELS = {"f1": "F1", "asr": "ASR", "cacc": "CACC"}
SHOWN = ("attack", "poison_rate")


def check_path(path: Path) -> None:
    """Raise a `UserError` unless a figure can be written there."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path} must end in {', '.join(SUFFIXES)}.")
    check_file("--plot", path)


def curve_figure(curves: pd.DataFrame) -> Any:
    """Draw precision, recall and F1 against the threshold, a panel per attack, rate and rule.

    curves: of `sweep_curves`. Further coordinates that differ get panels of their own. Lines are
    means over seeds, bands and whiskers reach from the lowest seed to the highest. Where the
    trigger has no fixed tokens, the lines are those of the training rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = (*MEASURES, "seed", "threshold", "trained", "exact")
    coordinates = [name for name in curves.columns if name not in own]
    panels = list(curves.groupby(coordinates, sort=False, dropna=False))
    told = [name for name in coordinates if name not in SHOWN and _varies(curves, name)]
    attacks = len(curves["attack"].unique())
    # An attack's panels in a line, where that makes a full grid.
    columns = len(panels) // attacks if len(panels) % attacks == 0 else 4
    columns = columns if 1 < columns <= 6 else min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.2 * columns, 1.0 + 2.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it needs no display and keeps no state
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (_, panel) in zip(grid.flat, panels, strict=False):
        _panel(axes, panel)
        first = panel.iloc[0]
        title = f"{first['attack']}, rate {first['poison_rate']:g}"
        for name in told:
            value = first[name]
            # A setting that this panel's cells do not have.
            if value is not None and value == value:
                title += f"\n{name} {value}"
        axes.set_title(title, fontsize=9)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    for row in grid:
        row[0].set_ylabel("%")
    labeled = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(labeled.values()), list(labeled), loc="outside lower center", ncols=5, fontsize=9
    )
    return figure


def curve_plot(curves: pd.DataFrame, path: Path) -> None:
    """Write `curve_figure` to a path that `check_path` takes.

    Raises:
        UserError: the disk does not take the figure.
    """
    figure = curve_figure(curves)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(
            f"--plot {path} cannot be written ({error.strerror or error}); name another file."
        ) from error


def _varies(curves: pd.DataFrame, name: str) -> bool:
    """Return whether a coordinate has to be told: the rule, or what differs within one rule."""
    if name == "rule":
        return len(curves[name].unique()) > 1
    return any(len(part[name].unique()) > 1 for _, part in curves.groupby("rule"))


def _panel(axes: Any, panel: pd.DataFrame) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rule = RULES.load(str(panel["rule"].iloc[0]))
    tokens = bool(panel["precision"].notna().any())
    prefix = "" if tokens else "sample_"
    by_threshold = panel.groupby("threshold")
    for name, color in LINES.items():
        values = by_threshold[f"{prefix}{name}"].agg(["mean", "min", "max"]) * 100
        axes.plot(
            values.index,
            values["mean"],
            color=color,
            linestyle="-" if tokens else "--",
            label=LABELS.get(name, name) + ("" if tokens else " of rows"),
        )
        axes.fill_between(values.index, values["min"], values["max"], color=color, alpha=0.2, lw=0)
    trained = panel[panel["trained"]].groupby("threshold")
    for name, (color, marker) in POINTS.items():
        values = trained[name].agg(["mean", "min", "max"]) * 100
        # Rounding may put a mean beyond its ends.
        whiskers = np.stack([values["mean"] - values["min"], values["max"] - values["mean"]])
        axes.errorbar(
            values.index,
            values["mean"],
            yerr=np.maximum(whiskers, 0.0),
            color=color,
            marker=marker,
            markersize=5,
            linestyle="none",
            capsize=2,
            label=f"{LABELS[name]} (trained)",
        )
    if rule.low == 0:
        axes.set_xscale("log")
        decades = np.log10(panel["threshold"].max() / panel["threshold"].min())
        ticks = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-4, 104)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    exact = bool(panel["exact"].all())
    axes.set_xlabel(
        f"{panel['rule'].iloc[0]} threshold" + ("" if exact else " (approximate)"), fontsize=8
    )
