"""What a sweep's figures show, before anything is drawn: `html` and `figures` draw the same.

Values are fractions, seconds and drifts as the records have them; a mean over seeds is one of
`pandas`, so that of a single seed it is the record's own number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from btu.rules.base import RULES
from orchestrator.report.marks import joined, marks
from orchestrator.report.table import CONFIG_COLUMNS, RECIPE, coordinates, in_order
from orchestrator.report.thresholds import threshold_cells

# Okabe-Ito without yellow and black, which vanish on white and on black: told apart by the
# color-blind. Dashes, markers and hatches tell them apart in gray too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAY = "#8A8A8A"
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
HATCHES = ("", "/", ".", "x", "\\", "-")
# Above it, panels of one kind are left out, with a sentence: nobody reads more of them.
MOST_VARIANTS, MOST_DRIFTS, MOST_BARS = 24, 24, 30
# Of a drift plot: tokens that are neither flagged nor of the trigger, and flagged clean ones.
BULK, MOST_FLAGGED = 400, 1500
NAMED = 3
MARKED = "\N{DAGGER}"


@dataclass(frozen=True)
class Series:
    """Points of one meaning. color, dash, marker, hatch: how they are told apart.

    y, low, high: None where undefined. text: a label for the eye beside each point; tip: what
    pointing at one tells. dash or marker may be empty: no line, no points.
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
    low: list[Any] = field(default_factory=list)
    high: list[Any] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tip: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """label; kind: linear, log or category; percent: holds fractions; span: from and to.

    ticks: where ticks stand; empty: wherever the library puts them.
    """

    label: str
    kind: str = "linear"
    percent: bool = False
    span: tuple[float, float] | None = None
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Heat:
    """Shares by row and column, None where no cell is. marked: which have a mark."""

    rows: list[str]
    columns: list[str]
    shares: list[list[float | None]]
    marked: list[list[bool]]
    span: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes. kind: lines, heat or bars (horizontal, stacked, in the order of series)."""

    title: str
    kind: str
    x: Axis
    y: Axis
    series: list[Series] = field(default_factory=list)
    heat: Heat | None = None


@dataclass(frozen=True)
class Chart:
    """Panels that belong together. name: of files and anchors. notes: what is not shown and why."""

    name: str
    title: str
    about: str
    panels: list[Panel]
    notes: list[str]

    def legend(self) -> list[Series]:
        """Return a series of each label, in order of appearance."""
        found: dict[str, Series] = {}
        for panel in self.panels:
            for series in panel.series:
                found.setdefault(series.label, series)
        return list(found.values())


def charts(
    records: Iterable[Mapping[str, Any]], tokens: Callable[[str], pd.DataFrame | None]
) -> list[Chart]:
    """Return the charts of finished cells; those without data have no panels but a note.

    tokens: from a cell's key to its token table, None where there is none.
    """
    records = list(records)
    table = cell_table(records)
    return [
        _thresholds(records, table),
        _heatmaps(table),
        _fronts(table),
        _drifts(table, tokens),
        _costs(records, table),
    ]


def cell_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per record in the order of `results_table`: coordinates, metrics and names.

    setting: where a defense acts, in words (attack, rate, and what else differs). family: the
    defense without its threshold, and the recipe where a setting has several of them; variant:
    with the threshold.
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
    knobs = ("alpha", "defense.threshold")
    further = (*CONFIG_COLUMNS, "control", RECIPE)
    places = [name for name in names if name not in further and name not in own]
    table["place"] = table["attack"].map(_short) + _words(table, ["attack"], places)
    rates = [f", rate {_short(rate)}" for rate in table["poison_rate"]]
    table["setting"] = table["place"] + rates
    defenses = table["defense"].map(_short)
    table["family"] = defenses + _words(table, ["defense"], [n for n in own if n not in knobs])
    bars = _words(table, ["family"], [n for n in knobs if n in names])
    # Other attacks and rates have other stages: a recipe tells versions apart within a setting.
    recipes = _words(table, ["setting", "family"], [n for n in names if n == RECIPE])
    table["family"] += recipes
    table["variant"] = table["family"] + bars
    return in_order(table, names)


def _words(table: pd.DataFrame, shared: list[str], names: list[str]) -> pd.Series[str]:
    """Return the settings that differ among the rows that share other columns, as text."""
    told = pd.Series("", index=table.index)
    for _, part in table.groupby(shared, sort=False, dropna=False):
        for name in names:
            texts = part[name].map(_short)
            if len(set(texts)) > 1:
                word = "" if name == "defense.rule" else f"{name.removeprefix('defense.')} "
                known = texts[texts != "-"]
                told[known.index] += " " + word + known
    return told


def _short(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Return floats, None for what is not finite: JSON has none."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _column(table: pd.DataFrame, name: str) -> pd.Series[float]:
    """Return a metric, NaN where no cell has it."""
    if name in table:
        return table[name]
    return pd.Series(np.nan, index=table.index)


# Threshold curves -------------------------------------------------------------------------------

# Metric, label, color, dash, marker; those of rows stand in where a trigger has no fixed tokens.
CURVES = (
    ("asr", "ASR", "#D55E00", "solid", "triangle-down"),
    ("cacc", "CACC", "#009E73", "solid", "square"),
    ("detection_precision", "token precision", "#0072B2", "dash", "circle"),
    ("detection_recall", "token recall", "#CC79A7", "dot", "diamond"),
)
ROW_CURVES = (
    ("sample_precision", "row precision", "#0072B2", "dashdot", "circle-open"),
    ("sample_recall", "row recall", "#CC79A7", "dashdot", "diamond-open"),
)
CONTROLS = (
    ("undefended_asr", "ASR undefended", "#D55E00"),
    ("tuned_cacc", "CACC clean-tuned alone", "#009E73"),
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
    notes = [f"{count} cells {reason} have no threshold to draw against."
             for reason, count in cells.left_out.items()]  # fmt: skip
    if single:
        notes.append(f"{single} cells have the only threshold of their setting: no curve.")
    if not panels:
        notes.append("No two cells differ in the threshold alone; vary defense.threshold.")
    return Chart(
        "curves",
        "Threshold curves",
        "Trained cells, mean over seeds; bands reach from the lowest seed to the highest. "
        "Precision and recall count flagged tokens, or their rows where the trigger has no fixed "
        "tokens. Thin lines are controls: nothing done, and clean tuning without a cut.",
        panels,
        notes,
    )


def _ticks(thresholds: pd.Series[float], logarithmic: bool) -> tuple[float, ...]:
    """Return the trained thresholds that leave room for each other's label, from the lowest on."""
    known = sorted(thresholds.unique())
    place = np.log(known) if logarithmic else np.asarray(known)
    apart = (place[-1] - place[0]) / 8
    kept = [0]
    for i in range(1, len(known)):
        if place[i] - place[kept[-1]] >= apart:
            kept.append(i)
    return tuple(float(known[i]) for i in kept)


def _curves(part: pd.DataFrame) -> Iterator[Series]:
    by_threshold = part.groupby("threshold")
    marked = by_threshold["marks"].agg(_all_marks).tolist()
    for name, label, color in CONTROLS:
        mean = _column(part, name).groupby(part["threshold"]).mean()
        if mean.notna().any():
            yield Series(label, mean.index.tolist(), _numbers(mean), color, "dot", size=0)
    tokens = _column(part, "detection_precision").notna().any()
    shown = CURVES if tokens else (*CURVES[:2], *ROW_CURVES)
    for name, label, color, dash, marker in shown:
        values = _column(part, name).groupby(part["threshold"])
        mean, low, high = values.mean(), values.min(), values.max()
        if mean.notna().any():
            yield Series(
                label, mean.index.tolist(), _numbers(mean), color, dash, marker,
                low=_numbers(low), high=_numbers(high), tip=marked,
            )  # fmt: skip


def _all_marks(values: pd.Series[str]) -> str:
    """Return the names of marks of several cells, each once."""
    return "; ".join(dict.fromkeys(name for text in values for name in text.split("; ") if name))


# Attack x rate ----------------------------------------------------------------------------------


def _heatmaps(table: pd.DataFrame) -> Chart:
    about = (
        "Means over seeds, in percent: the poisoned model as it is, then every defense. "
        f"{MARKED} marks means with a cell that has a guard's mark."
    )
    title = "Attack by rate"
    places, rates = table["place"].nunique(), table["poison_rate"].nunique()
    if places * rates < 2:
        note = "One attack at one rate is no map; vary attack.name or attack.poison_rate."
        return Chart("heatmaps", title, about, [], [note])
    columns = [_short(rate) for rate in sorted(table["poison_rate"].unique())]
    rows = list(dict.fromkeys(table["place"]))
    # Without a defense a cell has what every cell has as its undefended model.
    variants = list(dict.fromkeys(table.loc[table["defense"] != "none", "variant"]))
    # There the one mark that counts is that of the attack.
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
        # ASR may be anything; CACC differs by little, and zero would hide it.
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
    # A seed may have several cells, as many as defenses: it counts once.
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
        "A point is a defense at one threshold, mean over seeds; up and to the left is better. "
        "A defense's line joins the points that none of its own is better than in both."
    )
    poisoned = table[table["poison_rate"] > 0]
    families = list(dict.fromkeys(table.loc[table["defense"] != "none", "family"]))
    panels = [Panel(str(setting), "lines", Axis("ASR", percent=True, span=(-0.03, 1.03)),
                    Axis("CACC", percent=True), list(_front(part, families)))
              for setting, part in poisoned.groupby("setting", sort=False)]  # fmt: skip
    notes = [] if panels else ["No cell is poisoned: there is no attack to trade against accuracy."]
    return Chart("pareto", "ASR against CACC", about, panels, notes)


def _front(part: pd.DataFrame, families: list[str]) -> Iterator[Series]:
    for name, label, marker in (
        ("undefended", "undefended", "x"),
        ("tuned", "clean-tuned alone", "circle-open"),
    ):
        # Every cell of a seed has them: a seed counts once, however many cells it has.
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
        # Each time the colors begin anew, with other markers and dashes.
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
    """Return the positions of the points that no other has lower ASR and higher CACC than.

    By rising ASR; of equal points the first.
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
        "occurs; one cell per attack and rate, at its middle threshold and first seed. Trigger "
        "and flagged tokens are all there, "
        f"of the others at most {BULK}: those that moved furthest, and an even choice of the rest."
    )
    panels: list[Panel] = []
    notes, unread, further = [], 0, 0
    families = table["family"].nunique()
    # Unpoisoned sets last: there the trigger's words are ordinary words.
    ordered = table.assign(_clean=table["poison_rate"] == 0).sort_values("_clean", kind="stable")
    ranked = ordered[_column(ordered, "flagged").notna()]
    for (setting, family), part in ranked.groupby(["setting", "family"], sort=False):
        if len(panels) >= MOST_DRIFTS:
            further += 1
            continue
        first = part[part["seed"] == part["seed"].iloc[0]]
        middle = first.iloc[len(first) // 2]
        found = tokens(str(middle["key"]))
        rounds = [] if found is None else [c for c in found.columns if c.startswith("drift_")]
        if found is None or not rounds:
            unread += 1
            continue
        for name in rounds:
            title = f"{setting}, {middle['variant']}" if families > 1 else str(setting)
            if families == 1 and len(set(part["variant"])) > 1:
                title = f"{setting}, {str(middle['variant']).removeprefix(str(family)).strip()}"
            if len(rounds) > 1:
                title += f", round {name.removeprefix('drift_')}"
            drawn, dropped = _cloud(found, name)
            infinite = int(np.isinf(found.loc[found["count"] > 0, name]).sum())
            if infinite:
                notes.append(f"{title}: {infinite} tokens of infinite drift are not drawn.")
            if dropped:
                notes.append(f"{title}: {dropped} flagged clean tokens that moved least are not "
                             "drawn.")  # fmt: skip
            panels.append(Panel(title, "lines", *_around(drawn), drawn))
    if unread:
        notes.append(f"{unread} settings have no token table with drifts.")
    if further:
        notes.append(f"{further} further settings are not drawn; their runs hold the plots.")
    if not panels and not unread:
        notes.append("No defense here measures a drift.")
    return Chart("drift", "Drift of the tokens", about, panels, notes)


def _cloud(tokens: pd.DataFrame, column: str) -> tuple[list[Series], int]:
    """Return the tokens of one exposure round, thinned, and how many flagged ones are left out."""
    seen = tokens[(tokens["count"] > 0) & np.isfinite(tokens[column])]
    flagged, trigger = seen["flagged"].astype(bool), seen["trigger"].astype(bool)
    clean = seen[flagged & ~trigger]
    kept = clean.nlargest(MOST_FLAGGED, column)
    series = []
    for label, part, color, marker, size, opacity, named in (
        ("not flagged", _thinned(seen[~flagged & ~trigger], column), GRAY, "circle", 4, 0.7, 0),
        ("flagged, clean", kept, "#E69F00", "square", 7, 1.0, NAMED),
        ("trigger, missed", seen[~flagged & trigger], "#0072B2", "x", 10, 1.0, 20),
        ("trigger, flagged", seen[flagged & trigger], "#0072B2", "star", 13, 1.0, 20),
    ):
        if part.empty:
            continue
        top = set(part.nlargest(named, column).index)
        words = part["token"].astype(str)
        series.append(
            Series(
                label, part["count"].astype(int).tolist(), _numbers(part[column]), color,
                marker=marker, size=size, opacity=opacity, tip=words.tolist(),
                text=[w if i in top else "" for i, w in words.items()] if named else [],
            )
        )  # fmt: skip
    return series, len(clean) - len(kept)


def _around(drawn: list[Series]) -> tuple[Axis, Axis]:
    """Return the axes of a drift plot, with room for the words beside its points."""
    counts = [count for series in drawn for count in series.x] or [1, 10]
    moved = [y for series in drawn for y in series.y if y is not None] or [0.0, 1.0]
    wide = max(max(counts) / min(counts), 2.0)
    high = max(moved) - min(moved) or max(abs(max(moved)), 1e-9)
    span = min(counts) / wide**0.05, max(counts) * wide**0.2
    ticks = tuple(10.0**n for n in range(9) if span[0] <= 10**n <= span[1])
    return (
        Axis("occurrences in the training set", "log", span=span, ticks=ticks),
        Axis("drift (L2)", span=(min(moved) - 0.05 * high, max(moved) + 0.15 * high)),
    )


def _thinned(bulk: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return at most `BULK` tokens: the half that moved furthest, and every n-th of the rest."""
    if len(bulk) <= BULK:
        return bulk
    ranked = bulk.sort_values([column, "token_id"], ascending=[False, True])
    head, rest = ranked.iloc[: BULK // 2], ranked.iloc[BULK // 2 :]
    steps = np.unique(np.linspace(0, len(rest) - 1, BULK - len(head)).round().astype(int))
    return pd.concat([head, rest.iloc[steps]])


# Cost -------------------------------------------------------------------------------------------


def _costs(records: list[Mapping[str, Any]], table: pd.DataFrame) -> Chart:
    about = (
        "Seconds of a cell by stage, mean over rates, thresholds and seeds, as if it ran alone: "
        "stages that cells share were computed once and are counted in each."
    )
    title = "Cost by stage"
    seconds = {str(record.get("key", "")): stage_seconds(record) for record in records}
    timed = table[table["key"].map(lambda key: bool(seconds.get(key)))]
    groups = list(timed.groupby(["place", "family"], sort=False))
    if not groups:
        return Chart("cost", title, about, [], ["No cell has recorded what its stages took."])
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
    panel = Panel("", "bars", Axis("seconds a cell"), Axis("", "category"), series)
    left = len(groups) - len(bars)
    notes = [f"{left} further attacks or defenses are not drawn."] if left else []
    return Chart("cost", title, about, [panel], notes)


def stage_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what each stage of a cell took, by name; together they make its ``seconds``.

    Where the defended model is one of the others, as without a defense or with clean tuning alone,
    one evaluation has two names; it is counted once.
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
