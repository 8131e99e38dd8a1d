"""Detection curves as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from btu.drawing import FORMATS, draw, save
from btu.errors import UserError
from btu.panels import BLUE, GREEN, ORANGE, VERMILION, Axis, Panel, Series, labels, log_ticks
from btu.paths import check_file
from btu.rules.base import RULES
from orchestrator.report.charts import over_seeds
from orchestrator.report.curves import MEASURES

SUFFIXES = tuple(f".{name}" for name in FORMATS)
# Measure, label, color.
LINES = (("precision", "precision", BLUE), ("recall", "recall", ORANGE), ("f1", "F1", GREEN))
# Measure, label, color, marker: what is known only where a model was trained.
POINTS = (("asr", "ASR", VERMILION, "triangle-down"), ("cacc", "CACC", "#000000", "square"))
# The coordinates that every title has.
SHOWN = ("attack", "poison_rate")


def check_path(path: Path) -> None:
    """Raise a `UserError` unless a figure can be written there."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path} must end in {', '.join(SUFFIXES)}.")
    check_file(f"--plot {path}", path)


def curve_panels(curves: pd.DataFrame) -> list[Panel]:
    """Return precision, recall and F1 against the threshold, a panel per attack, rate and rule.

    Further coordinates that differ have panels of their own. Lines are means over seeds; bands and
    whiskers reach from the lowest seed to the highest. Where the trigger has no fixed tokens, the
    lines are those of the training rows.

    curves: from `sweep_curves`.
    """
    own = (*MEASURES, "seed", "threshold", "trained", "exact")
    coordinates = [name for name in curves.columns if name not in own]
    further = [name for name in coordinates if name not in SHOWN and _varies(curves, name)]
    short = {name: labels(curves[name].dropna().map(str)) for name in further}
    panels = []
    for _, part in curves.groupby(coordinates, sort=False, dropna=False):
        y = Axis("", percent=True, span=(-0.04, 1.04))
        title = _title(part, short)
        panels.append(Panel(title, "lines", _threshold_axis(part), y, list(_series(part))))
    return panels


def curve_plot(curves: pd.DataFrame, path: Path) -> None:
    """Write `curve_panels` to a path that `check_path` accepts.

    Raises:
        UserError: the figure cannot be written to disk.
    """
    figure = draw(curve_panels(curves))
    try:
        save(figure, path)
    except OSError as error:
        raise UserError(
            f"--plot {path} cannot be written ({error.strerror or error}); name another file."
        ) from error


def _varies(curves: pd.DataFrame, name: str) -> bool:
    """Return whether titles need a coordinate: several rules, or what differs within one rule."""
    if name == "rule":
        return len(curves[name].unique()) > 1
    return any(len(part[name].unique()) > 1 for _, part in curves.groupby("rule"))


def _title(part: pd.DataFrame, short: Mapping[str, Mapping[str, str]]) -> str:
    first = part.iloc[0]
    title = f"{first['attack']}, rate {first['poison_rate']:g}"
    for name, known in short.items():
        value = first[name]
        # None or NaN: the cells of this panel do not have the setting.
        if value is not None and value == value:
            title += f"\n{name} {known[str(value)]}"
    return title


def _threshold_axis(part: pd.DataFrame) -> Axis:
    rule, thresholds = str(part["rule"].iloc[0]), part["threshold"]
    label = f"{rule} threshold" if part["exact"].all() else f"{rule} threshold (approximate)"
    if RULES.load(rule).low != 0:
        return Axis(label)
    return Axis(label, "log", ticks=log_ticks(thresholds.min(), thresholds.max()))


def _series(part: pd.DataFrame) -> Iterator[Series]:
    tokens = part["precision"].notna().any()
    prefix, suffix, dash = ("", "", "solid") if tokens else ("sample_", " of rows", "dash")
    for name, label, color in LINES:
        yield over_seeds(part, f"{prefix}{name}", f"{label}{suffix}", color, dash=dash)
    trained = part[part["trained"]]
    for name, label, color, marker in POINTS:
        yield replace(over_seeds(trained, name, f"{label} (trained)", color, marker=marker), size=9)
