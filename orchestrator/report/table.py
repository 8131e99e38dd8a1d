"""Tables of results: a row per cell, or per group of seeds, in all formats of `btu report`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd

from btu.attacks.poisoning import GIVEN
from btu.errors import unknown
from btu.metrics import COUNT, METRICS
from btu.printing import csv_text, printable
from btu.rules.base import FDR_KEY, THRESHOLD_KEYS
from orchestrator.report.marks import GUARDS, joined, marks, poison_rate
from orchestrator.report.statistics import half_width
from orchestrator.sweep.sections import CONTROL, NAMED_SECTIONS
from orchestrator.sweep.tree import flatten

FORMATS = ("table", "csv", "json", "markdown", "latex")
# Table column -> dotted config key.
CONFIG_COLUMNS = {
    "attack": "attack.name",
    "poison_rate": "attack.poison_rate",
    "defense": "defense.name",
    "alpha": "defense.alpha",
    "seed": "seed",
}
# The columns that are a threshold or state it. One without a fixed column has one where it varies.
THRESHOLD_COLUMNS = (
    *(name for name, key in CONFIG_COLUMNS.items() if key in THRESHOLD_KEYS),
    *(key for key in THRESHOLD_KEYS if key not in CONFIG_COLUMNS.values()),
    FDR_KEY,
)
METRIC_COLUMNS = tuple(name for name, entry in METRICS.items() if entry.always)
# Shown if one of the cells has the metric; those that no sweep asks for only in tables that compare
# defenses.
DEFENSE_COLUMNS = tuple(name for name, entry in METRICS.items() if entry.head and not entry.always)
ALL_METRICS = (*METRIC_COLUMNS, *DEFENSE_COLUMNS)
MARKS = "marks"
RECIPE = "revision.recipe"
# Shown as they are. Every other metric is a fraction and is shown in percent.
PLAIN = frozenset(name for name, entry in METRICS.items() if not entry.fraction)
# Markdown's characters that act within a line, in words too.
_MARKUP = str.maketrans({mark: f"\\{mark}" for mark in "\\|`*[]<>&$~"})
COUNTS = frozenset(name for name, entry in METRICS.items() if entry.unit == COUNT)


def results_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per cell: its coordinates, then its metrics as fractions.

    Beside the fixed columns there is a column for every other key that differs between cells:
    because the sweep varies it, because the cell is a control, or because the sweep was launched
    before with other settings. Rows with different settings must not look alike, nor be averaged.
    The last column has the marks of a row (`orchestrator.report.marks`).
    """
    records = [_as_shown(record) for record in records]
    extra = _further_keys(records)
    rows = []
    for record in records:
        row = {name: flat_value(_lookup(record, key)) for name, key in CONFIG_COLUMNS.items()}
        row |= {key: flat_value(_lookup(record, key)) for key in extra}
        metrics = record.get("metrics") or {}
        row |= {name: metrics.get(name, float("nan")) for name in ALL_METRICS}
        row[MARKS] = joined(marks(record))
        rows.append(row)
    order = [*list(CONFIG_COLUMNS)[:-1], *extra, "seed"]
    table = pd.DataFrame(rows, columns=[*order, *ALL_METRICS, MARKS])
    table = table[[*order, *metric_columns(table), MARKS]]
    return table.sort_values(order, key=_sortable, kind="stable").reset_index(drop=True)


def metric_columns(table: pd.DataFrame) -> list[str]:
    """Return the metrics that a table of cells shows, in order.

    Metrics that not every table has (`DEFENSE_COLUMNS`) are shown if a cell has the metric, and the
    table has several defenses or the sweep asked for it.

    table: a row per cell, with the column ``defense``.
    """
    several = len(set(table["defense"]) - {"none"}) > 1
    further = (name for name in DEFENSE_COLUMNS if several or METRICS[name].asked)
    shown = (name for name in further if name in table and table[name].notna().any())
    return [*METRIC_COLUMNS, *shown]


def coordinates(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the settings that `results_table` shows: a row per record, in the records' order."""
    records = [_as_shown(record) for record in records]
    keys = {**CONFIG_COLUMNS, **{key: key for key in _further_keys(records)}}
    keys["seed"] = keys.pop("seed")
    rows = [{name: flat_value(_lookup(r, key)) for name, key in keys.items()} for r in records]
    return pd.DataFrame(rows, columns=list(keys))


def in_order(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return the rows sorted by columns of numbers, texts or both."""
    return table.sort_values(by, key=_sortable, kind="stable").reset_index(drop=True)


def _further_keys(records: Collection[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys, without the fixed ones, in which the records differ."""
    keys = dict.fromkeys(key for record in records for key in record["varied"])
    keys |= dict.fromkeys(_differing([record["config"] for record in records]))
    if not _recomputed(records):
        # Recipes differ between defenses anyway, and other columns show which defense it is.
        keys.pop(RECIPE, None)
    return [key for key in keys if key not in CONFIG_COLUMNS.values()]


def _differing(configs: list[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys that affect results and differ among the configs that have them.

    Keys of an attack or a defense are compared within it: two defenses may each have a learning
    rate.
    """
    flat = [flatten(config) for config in configs]
    values: dict[str, dict[Any, set[str]]] = {}
    for config in flat:
        for key, value in config.items():
            section = key.partition(".")[0]
            own = section in NAMED_SECTIONS and key != f"{section}.name"
            of = config.get(f"{section}.name") if own else None
            values.setdefault(key, {}).setdefault(of, set()).add(str(value))
    return [
        key
        for key, found in values.items()
        if key != "data.path"
        and not key.startswith("resources.")
        and any(len(several) > 1 for several in found.values())
    ]


def _recomputed(records: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether cells with equal settings were computed by different versions of a stage."""
    recipes: dict[str, set[Any]] = {}
    for record in records:
        flat = flatten(record["config"])
        recipe = flat.pop(RECIPE, None)
        acts = {
            k: v for k, v in flat.items() if k != "data.path" and not k.startswith("resources.")
        }
        recipes.setdefault(str(sorted(acts.items())), set()).add(recipe)
    return any(len(found) > 1 for found in recipes.values())


def _as_shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with the revisions of rows, weights and recipe among its settings.

    The rate of a published poisoned set, which is as it was published, is the one that it reaches.
    Where `stealth` acts it is among them: a cell with it and one without must not look alike.
    """
    revisions = {
        "revision.data": record.get("tags", {}).get("data"),
        "revision.victim": record.get("tags", {}).get("victim"),
        RECIPE: record.get("tags", {}).get("recipe"),
    }
    known = {key: value for key, value in revisions.items() if value is not None}
    config = {**record["config"], **known}
    # Results of versions without cover rows do not name them.
    config["attack"] = {"cover_rate": 0.0, **config.get("attack", {})}
    if _lookup(record, "attack.poison_rate") == GIVEN:
        config["attack"] = {**config["attack"], "poison_rate": poison_rate(record)}
    if _lookup(record, "attack.poison_rate") != 0:
        config.setdefault("stealth", False)
    return {**record, "config": config}


def mean_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per group of seeds: how many, and mean and 95 % interval of each metric.

    The interval is Student's t over seeds, as a half width in ``<metric>_ci``; NaN for one seed.
    Seeds at which a metric is undefined are left out of its mean. Each mark comes with the number
    of seeds that have it.
    """
    groups = [c for c in table.columns if c not in (*ALL_METRICS, "seed", MARKS)]
    result = means(table, groups, [c for c in ALL_METRICS if c in table.columns])
    grouped = table.groupby(groups, sort=False, dropna=False)
    result[MARKS] = [_shares(group) for _, group in grouped]
    return result


def _shares(group: pd.DataFrame) -> str:
    """Return the marks of a group's rows, each with its number of seeds: ``overlap 2/3``."""
    seeds: dict[str, set[int]] = {name: set() for name in GUARDS}
    for names, seed in zip(group[MARKS], group["seed"], strict=True):
        for name in filter(None, names.split("; ")):
            seeds[name].add(seed)
    total = group["seed"].nunique()
    return "; ".join(f"{name} {len(found)}/{total}" for name, found in seeds.items() if found)


def means(table: pd.DataFrame, groups: list[str], metrics: Iterable[str]) -> pd.DataFrame:
    """Return a row per group: its seeds, and mean and interval as in `mean_over_seeds`."""
    grouped = table.groupby(groups, sort=False, dropna=False)
    result = grouped["seed"].nunique().rename("seeds").reset_index()
    for name in metrics:
        result[name] = grouped[name].mean().to_numpy()
        result[f"{name}_ci"] = grouped[name].apply(half_width).to_numpy()
    return result


def render(table: pd.DataFrame, style: str, metrics: Collection[str] = ALL_METRICS) -> str:
    """Return the table as text.

    The formats csv and json have fractions with all digits. The formats table, markdown and latex
    have percent with one decimal, and intervals as ``mean ± half width``.

    style: one of `FORMATS`.
    metrics: the columns with fractions or `PLAIN` numbers; other columns are shown as they are.

    Raises:
        UserError: `style` is not a format.
    """
    if style not in FORMATS:
        raise unknown("format", style, FORMATS)
    if style == "csv":
        return printable(csv_text(table))
    if style == "json":
        rows = [
            {str(k): None if pd.isna(v) else v for k, v in row.items()}
            for row in table.astype(object).to_dict("records")
        ]
        return json.dumps(rows, indent=1) + "\n"
    shown = readable(table, metrics)
    if style == "markdown":
        return markdown(shown) + "\n"
    if style == "latex":
        # A blank line within a cell would end a paragraph.
        one_line = shown.map(lambda text: " ".join(text.split()))
        return one_line.to_latex(index=False, escape=True)
    return _rich(shown)


def markdown(shown: pd.DataFrame) -> str:
    """Return a Markdown table of text cells, whose texts are shown as they are.

    Characters that would be markup or end a cell are escaped, and line breaks are ``<br>``.
    """
    plain = shown.rename(columns=_plain).map(_plain)
    text: str = plain.to_markdown(index=False, disable_numparse=True)
    return text


def _plain(text: str) -> str:
    return text.translate(_MARKUP).replace("\n", "<br>")


def readable(table: pd.DataFrame, metrics: Collection[str] = ALL_METRICS) -> pd.DataFrame:
    """Return the table as text cells, fractions in percent."""
    shown = pd.DataFrame(index=table.index)
    for name in table.columns:
        if name.endswith("_ci"):
            continue
        if name not in metrics:
            shown[printable(str(name))] = table[name].map(_text)
            continue
        header = name if name in PLAIN else f"{name} %"
        spread = table.get(f"{name}_ci", pd.Series(float("nan"), index=table.index))
        shown[header] = [
            reading(name, value) + ("" if pd.isna(half) else f" ± {reading(name, half, half=True)}")
            for value, half in zip(table[name], spread, strict=True)
        ]
    return shown


def reading(metric: str, value: float, *, half: bool = False) -> str:
    """Return a metric's value for reading, rounded once: ``12.3`` for 0.12345, ``-`` for NaN.

    half: whether the value is the half width of an interval.
    """
    if pd.isna(value):
        return "-"
    shown = value if metric in PLAIN else value * 100
    whole = metric in COUNTS and not half and float(shown).is_integer()
    return f"{shown:.0f}" if whole else f"{shown:.1f}"


def _text(value: Any) -> str:
    if value is None or value != value or value == "":
        return "-"  # the cell's attack or defense does not have the key, or the cell has no mark
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def _rich(shown: pd.DataFrame) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold")
    for name in shown.columns:
        # Column heads break at underscores, so that the table fits a terminal.
        table.add_column(
            name.replace("_", "\n").replace(" %", "\n%"),
            justify="left" if name in (*CONFIG_COLUMNS, CONTROL, MARKS) else "right",
            no_wrap=True,
        )
    for row in shown.itertuples(index=False):
        table.add_row(*(escape(str(value)) for value in row))
    # Wide enough for any table: a truncated number would be a different number.
    console = Console(width=10_000, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _lookup(record: Mapping[str, Any], key: str) -> Any:
    if key == CONTROL:
        return record["varied"].get(CONTROL)
    value: Any = record["config"]
    if key in value:
        return value[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def flat_value(value: Any) -> Any:
    """Return a setting's value for a cell of a table: a list as text, other values unchanged."""
    if isinstance(value, dict):
        return " ".join(f"{name} {one}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _sortable(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return sort keys: numbers sort by value, before texts. A threshold may be a list, as text."""

    def key(value: Any) -> tuple[bool, float, str]:
        if isinstance(value, int | float) and value == value:
            return False, float(value), ""
        return True, 0.0, str(value)

    ranks = {k: rank for rank, k in enumerate(sorted({key(value) for value in column}))}
    return column.map(lambda value: ranks[key(value)])
