"""The charts of a sweep, as panels that `html` and `figures` draw.

Values are fractions, seconds and drifts as in the records. The mean of a single seed is exactly the
record's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from btu.drift_plot import PREFIX, drawable, drift_columns, drift_panel
from btu.panels import (
    BLUE,
    GRAY,
    GREEN,
    MARKED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Axis,
    Heat,
    Panel,
    Series,
    labels,
)
from btu.rules.base import RULES
from orchestrator.report.marks import joined, marks
from orchestrator.report.table import (
    CONFIG_COLUMNS,
    RECIPE,
    THRESHOLD_COLUMNS,
    coordinates,
    in_order,
)
from orchestrator.report.thresholds import threshold_cells

# Defenses and stages differ in color and in one of the others, to be distinct in gray too.
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
HATCHES = ("", "/", ".", "x", "\\", "-")
# The most panels or bars of a chart. A note counts those that are left out.
MOST_VARIANTS, MOST_DRIFTS, MOST_BARS = 24, 24, 30
# The most points of a drift panel: tokens neither flagged nor of the trigger, and flagged clean
# tokens.
BULK, MOST_FLAGGED = 400, 1500
# The most names of a drift panel: flagged clean tokens, and tokens of each trigger group.
NAMED, NAMED_TRIGGERS = 3, 20


@dataclass(frozen=True)
class Chart:
    """Panels that belong together.

    name: of the file and of the anchor in the page.
    about: what the panels show.
    notes: what is not shown and why.
    numbers: where a reader finds the numbers behind the panels.
    """

    name: str
    title: str
    about: str
    panels: list[Panel]
    notes: list[str]
    numbers: str = "the table has its numbers"

    def legend(self) -> list[Series]:
        """Return the first series with each label, in order of appearance."""
        found: dict[str, Series] = {}
        for panel in self.panels:
            for series in panel.series:
                found.setdefault(series.label, series)
        return list(found.values())


def charts(
    records: Iterable[Mapping[str, Any]], tokens: Callable[[str], pd.DataFrame | None]
) -> list[Chart]:
    """Return the charts of finished cells. A chart without data has a note and no panels.

    tokens: gives the token table of a cell's key, None where there is none.
    """
    records = list(records)
    table = named_cells(records)
    return [
        _thresholds(records, table),
        _heatmaps(table),
        _fronts(table),
        _drifts(table, tokens),
        _costs(records, table),
    ]


def named_cells(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per record: coordinates, metrics and names, in the order of `results_table`.

    The columns of names:

    place: the attack, and the settings outside the defense that differ among its cells.
    setting: the place and the poison rate.
    family: the defense without its threshold, and the recipe where a setting has several recipes.
    variant: the family and the threshold.

    Long values are shortened in them; different values stay different.
    """
    where = coordinates(records)
    names = list(where.columns)
    metrics = pd.DataFrame([record.get("metrics") or {} for record in records])
    table = pd.concat([where, metrics.drop(columns=names, errors="ignore")], axis=1)
    table["marks"] = [joined(marks(record)) for record in records]
    table["key"] = [record.get("key", "") for record in records]
    table["run_id"] = [record.get("run_id", "") for record in records]
    if table.empty:
        return table.assign(setting="", family="", variant="", place="")
    own = [n for n in names if n.startswith("defense.")]
    further = (*CONFIG_COLUMNS, "control", RECIPE)
    places = [name for name in names if name not in further and name not in own]
    table["place"] = table["attack"].map(_short) + _words(table, ["attack"], places)
    rates = [f", rate {_short(rate)}" for rate in table["poison_rate"]]
    table["setting"] = table["place"] + rates
    defenses = table["defense"].map(_short)
    table["family"] = defenses + _words(
        table, ["defense"], [n for n in own if n not in THRESHOLD_COLUMNS]
    )
    bars = _words(table, ["family"], [n for n in THRESHOLD_COLUMNS if n in names])
    # Other attacks and rates have other stages: a recipe tells versions apart within a setting.
    recipes = _words(table, ["setting", "family"], [n for n in names if n == RECIPE])
    table["family"] += recipes
    table["variant"] = table["family"] + bars
    return in_order(table, names)


def _words(table: pd.DataFrame, shared: list[str], names: list[str]) -> pd.Series[str]:
    """Return as text which settings differ among the rows that are equal in the shared columns."""
    words = pd.Series("", index=table.index)
    # Over the whole table: a value has one label in all groups.
    short = {name: labels(table[name].map(_short)) for name in names}
    for _, part in table.groupby(shared, sort=False, dropna=False):
        for name in names:
            texts = part[name].map(_short).map(short[name])
            if len(set(texts)) > 1:
                prefix = "" if name == "defense.rule" else f"{name.removeprefix('defense.')} "
                known = texts[texts != "-"]
                words[known.index] += " " + prefix + known
    return words


def _short(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Return floats, with None for NaN and infinity, which JSON lacks."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _column(table: pd.DataFrame, name: str) -> pd.Series[float]:
    """Return a metric; all NaN if no cell has it."""
    if name in table:
        return table[name]
    return pd.Series(np.nan, index=table.index)


# Threshold curves -------------------------------------------------------------------------------

# Metric, label, color, dash, marker. `ROW_CURVES` replace the curves of tokens where a trigger has
# no fixed tokens.
CURVES = (
    ("asr", "ASR", VERMILION, "solid", "triangle-down"),
    ("cacc", "CACC", GREEN, "solid", "square"),
    ("detection_precision", "token precision", BLUE, "dash", "circle"),
    ("detection_recall", "token recall", PURPLE, "dot", "diamond"),
)
ROW_CURVES = (
    ("sample_precision", "row precision", BLUE, "dashdot", "circle-open"),
    ("sample_recall", "row recall", PURPLE, "dashdot", "diamond-open"),
)
CONTROLS = (
    ("undefended_asr", "ASR undefended", VERMILION),
    ("tuned_cacc", "CACC clean-tuned alone", GREEN),
)


def _thresholds(records: list[Mapping[str, Any]], table: pd.DataFrame) -> Chart:
    cells = threshold_cells(records)
    named = cells.table[["key", "rule", "threshold"]].merge(
        table.drop(columns=["rule", "threshold"], errors="ignore"), on="key"
    )
    panels, single = [], 0
    families = named["family"].nunique()
    for (setting, family, rule), part in named.groupby(["setting", "family", "rule"], sort=False):
        if part["threshold"].nunique() < 2:
            single += len(part)
            continue
        title = f"{setting}, {family}" if families > 1 else str(setting)
        logarithmic = RULES.load(str(rule)).low == 0
        kind = "log" if logarithmic else "linear"
        x = Axis(f"{rule} threshold", kind, ticks=_ticks(part["threshold"], logarithmic))
        y = Axis("", percent=True, span=(-0.03, 1.03))
        panels.append(Panel(title, "lines", x, y, list(_curves(part))))
    notes = [f"{count} cells {reason} have no threshold and are in no curve."
             for reason, count in cells.left_out.items()]  # fmt: skip
    if single:
        notes.append(f"{single} cells are in no curve: their setting has a single threshold.")
    if not panels:
        notes.append("No two cells differ only in the threshold; vary defense.threshold.")
    return Chart(
        "curves",
        "Threshold curves",
        "Trained cells, mean over seeds; bands reach from the lowest seed to the highest. "
        "Precision and recall count flagged tokens, or their training rows where the trigger has "
        "no fixed tokens. Thin lines are controls: no defense, and clean tuning without a cut.",
        panels,
        notes,
    )


def _ticks(thresholds: pd.Series[float], logarithmic: bool) -> tuple[float, ...]:
    """Return the trained thresholds whose labels do not overlap, starting with the lowest."""
    known = sorted(thresholds.unique())
    place = np.log(known) if logarithmic else np.asarray(known)
    apart = (place[-1] - place[0]) / 8
    kept = [0]
    for i in range(1, len(known)):
        if place[i] - place[kept[-1]] >= apart:
            kept.append(i)
    return tuple(float(known[i]) for i in kept)


def _curves(part: pd.DataFrame) -> Iterator[Series]:
    marked = part.groupby("threshold")["marks"].agg(_all_marks).tolist()
    for name, label, color in CONTROLS:
        made = over_seeds(part, name, label, color, dash="dot")
        if _is_defined(made):
            yield replace(made, thin=True, low=[], high=[])
    tokens = _column(part, "detection_precision").notna().any()
    shown = CURVES if tokens else (*CURVES[:2], *ROW_CURVES)
    for name, label, color, dash, marker in shown:
        made = over_seeds(part, name, label, color, dash, marker)
        if _is_defined(made):
            yield replace(made, tip=marked)


def over_seeds(
    part: pd.DataFrame, metric: str, label: str, color: str, dash: str = "", marker: str = ""
) -> Series:
    """Return a metric against the threshold: mean over seeds, and the lowest and highest seed.

    part: rows with a threshold each.
    metric: a column; where it is missing, no point is defined.
    label, color, dash, marker: of the `Series`.
    """
    values = _column(part, metric).groupby(part["threshold"]).agg(["mean", "min", "max"])
    mean, low, high = (_numbers(values[name]) for name in ("mean", "min", "max"))
    return Series(label, values.index.tolist(), mean, color, dash, marker, low=low, high=high)


def _is_defined(series: Series) -> bool:
    """Return whether any point has a value."""
    return any(y is not None for y in series.y)


def _all_marks(values: pd.Series[str]) -> str:
    """Return the names of several cells' marks, each once."""
    return "; ".join(dict.fromkeys(name for text in values for name in text.split("; ") if name))


# Attack x rate ----------------------------------------------------------------------------------


def _heatmaps(table: pd.DataFrame) -> Chart:
    about = (
        "Mean over seeds, in percent: the undefended model, then each defense. "
        f"{MARKED} follows the mean if one of its cells has a mark."
    )
    title = "Attack by rate"
    places, rates = table["place"].nunique(), table["poison_rate"].nunique()
    if places * rates < 2:
        note = "All cells have one attack and one rate; vary attack.name or attack.poison_rate."
        return Chart("heatmaps", title, about, [], [note])
    columns = [_short(rate) for rate in sorted(table["poison_rate"].unique())]
    rows = list(dict.fromkeys(table["place"]))
    # A cell without a defense repeats the undefended model that every cell has.
    variants = list(dict.fromkeys(table.loc[table["defense"] != "none", "variant"]))
    # Of all marks, only a failed attack concerns the undefended model.
    failed = table["marks"].str.contains("attack failed")
    undefended = table.assign(marks=failed.map({True: "attack failed", False: ""}))
    drawn = [("undefended", undefended, "undefended_")]
    drawn += [(v, table[table["variant"] == v], "") for v in variants[: MOST_VARIANTS - 1]]
    panels = []
    for name, shown in (("asr", "ASR"), ("cacc", "CACC")):
        grids = []
        for variant, part, prefix in drawn:
            value = _column(part, f"{prefix}{name}")
            if value.notna().any():
                grids.append((variant, _grid(part, value, rows, columns)))
        known = [v for _, heat in grids for line in heat[0] for v in line if v is not None]
        # CACC differs by little: a scale from zero would hide the differences.
        low = 0.0 if name == "asr" else np.floor(min(known, default=0.0) * 20) / 20
        for variant, (values, marked) in grids:
            heat = Heat(rows, columns, values, marked, (float(low), 1.0))
            panels.append(
                Panel(f"{shown}, {variant}", "heat", Axis("poison rate", "category"),
                      Axis("", "category"), heat=heat)
            )  # fmt: skip
    left = len(variants) - (len(drawn) - 1)
    notes = [f"{left} further defenses or thresholds are in the table only."] if left else []
    return Chart("heatmaps", title, about, panels, notes)


def _grid(
    part: pd.DataFrame, value: pd.Series[float], rows: list[str], columns: list[str]
) -> tuple[list[list[float | None]], list[list[bool]]]:
    keys = [part["place"], part["poison_rate"].map(_short)]
    # A seed with several cells, one for each defense, counts once.
    mean = value.groupby([*keys, part["seed"]]).mean().groupby(level=[0, 1]).mean()
    marked = (part["marks"] != "").groupby(keys).any()
    found = {key: None if v != v else float(v) for key, v in mean.items()}
    flags = dict(marked.items())
    return (
        [[found.get((row, column)) for column in columns] for row in rows],
        [[bool(flags.get((row, column), False)) for column in columns] for row in rows],
    )


# ASR and CACC -----------------------------------------------------------------------------------


def _fronts(table: pd.DataFrame) -> Chart:
    about = (
        "Each point is a defense at one threshold, mean over seeds; up and to the left is better. "
        "A line joins the points of a defense that none of its other points beats in both."
    )
    poisoned = table[table["poison_rate"] > 0]
    families = list(dict.fromkeys(table.loc[table["defense"] != "none", "family"]))
    panels = [Panel(str(setting), "lines", Axis("ASR", percent=True, span=(-0.03, 1.03)),
                    Axis("CACC", percent=True), list(_front(part, families)))
              for setting, part in poisoned.groupby("setting", sort=False)]  # fmt: skip
    notes = [] if panels else ["No cell is poisoned, so there is no attack to defend against."]
    return Chart("pareto", "ASR against CACC", about, panels, notes)


def _front(part: pd.DataFrame, families: list[str]) -> Iterator[Series]:
    for name, label, marker in (
        ("undefended", "undefended", "x"),
        ("tuned", "clean-tuned alone", "circle-open"),
    ):
        # All cells of a seed have these metrics; the seed counts once.
        x, y = (
            _column(part, f"{name}_{metric}").groupby(part["seed"]).mean().mean()
            for metric in ("asr", "cacc")
        )
        if x == x and y == y:
            yield Series(label, [float(x)], [float(y)], GRAY, marker=marker, size=10, tip=[label])
    for family, mine in part[part["defense"] != "none"].groupby("family", sort=False):
        points = mine.groupby("variant", sort=False).agg(
            asr=("asr", "mean"), cacc=("cacc", "mean"), marks=("marks", _all_marks)
        )
        points = points.dropna(subset=["asr", "cacc"])
        if points.empty:
            continue
        tips = [f"{v}; {m}" if m else str(v) for v, m in points["marks"].items()]
        number = families.index(str(family))
        color = COLORS[number % len(COLORS)]
        # When the colors start over, the markers and dashes are shifted by one.
        other = number + number // len(COLORS)
        marker, dash = MARKERS[other % len(MARKERS)], DASHES[other % len(DASHES)]
        asr, cacc = points["asr"].tolist(), points["cacc"].tolist()
        yield Series(str(family), asr, cacc, color, marker=marker, size=9, tip=tips)
        best = front(asr, cacc)
        if len(best) > 1:
            yield Series(
                f"{family}: front", [asr[i] for i in best], [cacc[i] for i in best],
                color, dash,
            )  # fmt: skip


def front(asr: list[float], cacc: list[float]) -> list[int]:
    """Return the positions of the points on the Pareto front: low ASR, high CACC.

    They are in order of rising ASR. Among equal points the first is on the front.
    """
    best: list[int] = []
    for i in sorted(range(len(asr)), key=lambda i: (asr[i], -cacc[i])):
        if not best or cacc[i] > cacc[best[-1]]:
            best.append(i)
    return best


# Drift ------------------------------------------------------------------------------------------


def _drifts(table: pd.DataFrame, tokens: Callable[[str], pd.DataFrame | None]) -> Chart:
    about = (
        "How far each token's embedding row moved in the exposure, against how often the token "
        "occurs. One cell per attack and rate: the first seed at the middle threshold. Trigger and "
        f"flagged tokens are drawn, and at most {BULK} of the others: the {BULK // 2} that moved "
        "furthest, and an even sample of the rest."
    )
    panels: list[Panel] = []
    notes, unread, further = [], 0, 0
    # Unpoisoned sets come last: in them the trigger's words are ordinary words.
    ordered = table.assign(_clean=table["poison_rate"] == 0).sort_values("_clean", kind="stable")
    ranked = ordered[_column(ordered, "flagged").notna()]
    families = table["family"].nunique()
    for (setting, family), part in ranked.groupby(["setting", "family"], sort=False):
        if len(panels) >= MOST_DRIFTS:
            further += 1
            continue
        first = part[part["seed"] == part["seed"].iloc[0]]
        middle = first.iloc[len(first) // 2]
        found = tokens(str(middle["key"]))
        if found is None or not drift_columns(found):
            unread += 1
            continue
        title = str(setting)
        if families > 1:
            title = f"{setting}, {middle['variant']}"
        elif len(set(part["variant"])) > 1:
            title = f"{setting}, {str(middle['variant']).removeprefix(str(family)).strip()}"
        drawn, left_out = _rounds(title, found)
        panels += drawn
        notes += left_out
    if unread:
        notes.append(f"{unread} settings have no token table with drifts.")
    if further:
        notes.append(f"{further} further settings are not drawn; their runs have the plots.")
    if not panels and not unread:
        notes.append("No defense here measures a drift.")
    numbers = "the token table among the cell's results has its numbers"
    return Chart("drift", "Drift of the tokens", about, panels, notes, numbers)


def _rounds(setting: str, tokens: pd.DataFrame) -> tuple[list[Panel], list[str]]:
    """Return a panel per exposure round of a cell, and notes on the tokens that are left out."""
    panels, notes = [], []
    rounds = drift_columns(tokens)
    for name in rounds:
        title = setting if len(rounds) == 1 else f"{setting}, round {name.removeprefix(PREFIX)}"
        shown, named, dropped = _chosen(drawable(tokens, name), name)
        infinite = int(np.isinf(tokens.loc[tokens["count"] > 0, name]).sum())
        if infinite:
            notes.append(f"{title}: {infinite} tokens with infinite drift are not drawn.")
        if dropped:
            notes.append(f"{title}: {dropped} flagged clean tokens that moved least are not drawn.")
        panels.append(drift_panel(title, shown, name, named))
    return panels, notes


def _chosen(seen: pd.DataFrame, column: str) -> tuple[pd.DataFrame, set[int], int]:
    """Return the tokens to draw, the index of those to name, and how many are left out."""
    flagged, trigger = seen["flagged"].astype(bool), seen["trigger"].astype(bool)
    clean = seen[flagged & ~trigger]
    kept = clean.nlargest(MOST_FLAGGED, column)
    missed, hit = seen[~flagged & trigger], seen[flagged & trigger]
    named = set(kept.index[:NAMED])
    for part in (missed, hit):
        named |= set(part.nlargest(NAMED_TRIGGERS, column).index)
    shown = pd.concat([_thinned(seen[~flagged & ~trigger], column), kept, missed, hit])
    return shown, named, len(clean) - len(kept)


def _thinned(bulk: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return at most `BULK` tokens: half moved furthest, the rest are evenly spaced by rank."""
    if len(bulk) <= BULK:
        return bulk
    ranked = bulk.sort_values([column, "token_id"], ascending=[False, True])
    head, rest = ranked.iloc[: BULK // 2], ranked.iloc[BULK // 2 :]
    steps = np.unique(np.linspace(0, len(rest) - 1, BULK - len(head)).round().astype(int))
    return pd.concat([head, rest.iloc[steps]])


# Cost -------------------------------------------------------------------------------------------


def _costs(records: list[Mapping[str, Any]], table: pd.DataFrame) -> Chart:
    about = (
        "Seconds of a cell by stage, mean over rates, thresholds and seeds, as if each cell ran "
        "alone: a stage that cells share was computed once and counts in each of them."
    )
    title = "Cost by stage"
    numbers = "the metrics of the cells have its numbers, as seconds/STAGE"
    seconds = {str(record.get("key", "")): stage_seconds(record) for record in records}
    timed = table[table["key"].map(lambda key: bool(seconds.get(key)))]
    groups = list(timed.groupby(["place", "family"], sort=False))
    if not groups:
        return Chart("cost", title, about, [], ["No cell has recorded the seconds of its stages."])
    stages: dict[str, None] = {}
    bars: dict[str, dict[str, float]] = {}
    for (place, family), part in groups[:MOST_BARS]:
        frame = pd.DataFrame([seconds[key] for key in part["key"]]).fillna(0.0)
        stages |= dict.fromkeys(frame.columns)
        bars[f"{place}, {family}"] = {str(k): float(v) for k, v in frame.mean().items()}
    series = [
        Series(stage, [bars[bar].get(stage, 0.0) for bar in bars], list(bars),
               COLORS[i % len(COLORS)], hatch=HATCHES[i // len(COLORS) % len(HATCHES)])
        for i, stage in enumerate(stages)
    ]  # fmt: skip
    panel = Panel("", "bars", Axis("seconds per cell"), Axis("", "category"), series)
    left = len(groups) - len(bars)
    notes = [f"{left} further attacks or defenses are not drawn."] if left else []
    return Chart("cost", title, about, [panel], notes, numbers)


def stage_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each stage of a cell by name; their sum is the metric ``seconds``.

    If the defended model is also the undefended or the tuned model, one evaluation has two names.
    It is counted once.
    """
    metrics = record.get("metrics") or {}
    lead = "seconds/"
    found = {n.removeprefix(lead): float(v) for n, v in metrics.items() if n.startswith(lead)}
    twice = found.get("evaluate defended")
    others = [found.get(f"evaluate {name}") for name in ("undefended", "tuned")]
    if twice is not None and twice in others:
        total = float(metrics.get("seconds", float("nan")))
        if abs(sum(found.values()) - twice - total) < abs(sum(found.values()) - total):
            del found["evaluate defended"]
    return found
