"""Differences between two sweeps, or two versions of the code, over the same cells: A minus B."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from btu.errors import UserError, did_you_mean
from btu.metrics import METRICS, metric
from btu.rules.base import THRESHOLD_KEYS
from orchestrator.report.marks import marks
from orchestrator.report.statistics import LEVEL, ROUNDING, paired
from orchestrator.report.table import CONFIG_COLUMNS, PLAIN, flat_value, in_order
from orchestrator.sweep.sections import CONTROL
from orchestrator.sweep.tree import flatten

# The metrics that are compared unless others are named.
COMPARED = tuple(name for name, entry in METRICS.items() if entry.compared)
# Settings that identify a cell: cells that differ here are never paired. Any other setting is what
# the comparison is about if each side has a single value of it, and the two differ.
OF_THE_CELL = ("seed", "attack.", "data.", "victim.")
DEFENSE, NO_DEFENSE = "defense.name", json.dumps("none")
# The name of the control without a defense (`orchestrator.sweep.sweep.CONTROLS`).
IDLE = "no_defense"
# Setting -> the short name of its column.
_NAMES = {key: name for name, key in CONFIG_COLUMNS.items()}
# Tags with the versions of code, rows and weights that a cell was computed with.
REVISIONS = ("recipe", "code", "data", "victim")
HARDWARE = ("device", "threads", "host")


@dataclass(frozen=True)
class Comparison:
    """The cells of two sides in pairs.

    pairs: a row per pair: the coordinates, ``seed``, ``key_a``, ``key_b``, ``run_a``, ``run_b``,
        ``marks_a``, ``marks_b`` (lists of names), and ``<metric>_a`` and ``<metric>_b``.
    coordinates: the columns in which groups differ.
    notes: how the two sides differ as a whole, which cells have no counterpart and why, and what to
        consider when reading.
    """

    pairs: pd.DataFrame
    coordinates: list[str]
    notes: list[str]


def of_revision(records: Iterable[Mapping[str, Any]], revision: str, where: str) -> list[Any]:
    """Return the cells of one version: those with a tag in `REVISIONS` that begins with `revision`.

    A version of the code is also found by its commit: ``0.1.0+abc`` by ``abc``. A cell whose stages
    were computed by several versions of the code belongs to each of them. It is left out if a cell
    with equal settings belongs to this version only.

    records: the cells.
    revision: the beginning of a version.
    where: the name of the sweep, for the message.

    Raises:
        UserError: no cell has the version; the message names the versions there are.
    """
    records = list(records)
    found = [r for r in records if any(v.startswith(revision) for v in _revisions(r))]
    if not found:
        known = sorted({v for r in records for v in _revisions(r)})
        raise UserError(
            f"no cell of {where} is of revision '{revision}'{did_you_mean(revision, known)} "
            f"(known: {', '.join(known) or 'none'})"
        )
    # A cell that was recomputed also belongs to the old version if it reused some of its stages.
    alone = {_settings(_acts(r)) for r in found if _is_alone(r, revision)}
    return [r for r in found if _is_alone(r, revision) or _settings(_acts(r)) not in alone]


def _revisions(record: Mapping[str, Any]) -> list[str]:
    return [*_other_revisions(record), *(v for names in _versions(record) for v in names)]


def _other_revisions(record: Mapping[str, Any]) -> list[str]:
    tags = record.get("tags") or {}
    return [str(tags[name]) for name in REVISIONS if name != "code" and tags.get(name)]


def _versions(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the versions of the code that computed a cell, each with its commit alone."""
    versions = filter(None, str((record.get("tags") or {}).get("code", "")).split(", "))
    return [list(filter(None, (version, version.partition("+")[2]))) for version in versions]


def _is_alone(record: Mapping[str, Any], revision: str) -> bool:
    """Return whether a cell of a version belongs to no other version."""
    return any(v.startswith(revision) for v in _other_revisions(record)) or all(
        any(v.startswith(revision) for v in names) for names in _versions(record)
    )


def compare(
    a: Iterable[Mapping[str, Any]],
    b: Iterable[Mapping[str, Any]],
    metrics: Sequence[str] = COMPARED,
    across: Collection[str] = (),
) -> Comparison:
    """Pair the cells of A and B that have equal settings.

    Settings that exist on one side only (a key that one version lacks) are ignored, and so are
    those in `across`, paths, resources and revisions. A setting of `defense`, `train` or `tuning`
    need not be equal if each side has a single value of it, and the two differ: it is what is
    compared. Controls without a defense do not count there; they are paired with each other.

    A cell may have several counterparts, as a cell without a defense has for several thresholds.
    Cells of one side with equal settings and different versions have none: choose a version with
    `of_revision`.

    a, b: the finished cells of each side.
    metrics: the metrics to compare.
    across: settings that need not be equal.

    Raises:
        UserError: no cell has a counterpart; there is no such metric, or key of `across`.
    """
    for name in metrics:
        metric(name)
    sides = [_side(records) for records in (a, b)]
    keys = [_ordered_keys(side) for side in sides]
    for key in across:
        if key not in (*keys[0], *keys[1]):
            known = list(dict.fromkeys((*keys[0], *keys[1])))
            raise UserError(
                f"--across {key} is not a setting of these cells{did_you_mean(key, known)}"
            )
    common = [key for key in keys[0] if key in set(keys[1]) and key not in (*across, CONTROL)]
    treated = {key: values for key in common if (values := _treatment(key, sides)) is not None}
    matched = [key for key in (CONTROL, *common) if key not in treated and key not in across]
    pairs, notes = _pairs(sides, matched)
    lead = [
        f"A and B differ in {key}: {json.loads(values[0])} and {json.loads(values[1])}."
        for key, values in treated.items()
        # A setting of a defense without a counterpart is not compared.
        if not pairs or any(key in one[1] and key in other[1] for one, other in pairs)
    ]
    if not pairs:
        why = " ".join((*lead, *notes))
        raise UserError(f"no cell of A has a counterpart in B: nothing to compare. {why}")
    own = [_own_keys(side, matched, treated) for side in sides]
    table, coordinates = _table(pairs, matched, own, metrics)
    return Comparison(table, coordinates, [*lead, *notes, *_cautions(pairs, table, coordinates)])


def group_table(comparison: Comparison, metrics: Sequence[str] = COMPARED) -> pd.DataFrame:
    """Return a row per group of seeds and metric.

    Columns: the coordinates; metric; n (pairs in which both values are defined); a and b, the means
    over these pairs; difference, the mean of A minus B, and difference_ci, half of its 95 % t
    interval; p of the paired t test; better (A, B, ``=`` if all pairs are equal, empty if p is not
    below 0.05 or there is no test); marks.
    """
    rows = []
    for at, group in _groups(comparison):
        shares = "; ".join(filter(None, (_shares(group, side) for side in "ab")))
        for name in metrics:
            known = group[group[f"{name}_a"].notna() & group[f"{name}_b"].notna()]
            found = paired(known[f"{name}_a"] - known[f"{name}_b"])
            rows.append(
                {
                    **at,
                    "metric": name,
                    "n": found.n,
                    "a": known[f"{name}_a"].mean(),
                    "b": known[f"{name}_b"].mean(),
                    "difference": found.mean,
                    "difference_ci": found.half_width,
                    "p": found.p,
                    "better": _better(name, known, found.p, found.mean),
                    "marks": shares,
                }
            )
    return pd.DataFrame(rows)


def pair_table(comparison: Comparison, metrics: Sequence[str] = COMPARED) -> pd.DataFrame:
    """Return a row per pair and metric.

    Columns: the coordinates, seed, metric, a, b, difference, marks, the keys of both cells and the
    ids of their runs.
    """
    rows = []
    for row in comparison.pairs.to_dict("records"):
        said = "; ".join(f"{side.upper()} {name}" for side in "ab" for name in row[f"marks_{side}"])
        for name in metrics:
            a, b = row[f"{name}_a"], row[f"{name}_b"]
            at = {c: row[c] for c in (*comparison.coordinates, "seed")}
            values = {"metric": name, "a": a, "b": b, "difference": a - b, "marks": said}
            ids = {c: row[c] for c in ("key_a", "key_b", "run_a", "run_b")}
            rows.append({**at, **values, **ids})
    return pd.DataFrame(rows)


def readable_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of differences as text: fractions in percent, their differences in points.

    Keys and ids of runs are left out; the formats csv and json have them.
    """
    shown = pd.DataFrame(index=table.index)
    hidden = ("difference_ci", "key_a", "key_b", "run_a", "run_b")
    for name in (c for c in table.columns if c not in hidden):
        shown[{"a": "A", "b": "B", "difference": "A - B"}.get(str(name), name)] = [
            _cell(str(name), row) for row in table.to_dict("records")
        ]
    return shown


def _cell(column: str, row: Mapping[Any, Any]) -> Any:
    value, plain = row[column], row["metric"] in PLAIN
    if column == "metric":
        return value if plain else f"{value} %"
    if column not in ("a", "b", "difference", "p"):
        return value
    if pd.isna(value):
        return "-"
    if column == "p":
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    scale = 1 if plain else 100
    if column != "difference":
        return f"{value * scale:.1f}"
    half = row.get("difference_ci", float("nan"))
    return f"{value * scale:+.1f}" + ("" if pd.isna(half) else f" ± {half * scale:.1f}")


# Matching ---------------------------------------------------------------------------------------

_Side = list[tuple[Mapping[str, Any], dict[str, str]]]


def _side(records: Iterable[Mapping[str, Any]]) -> _Side:
    """Return the cells of a side with the settings that affect results.

    A control without a defense also gets the setting that it is one: if it was launched as a
    control, or is a cell without a defense beside others. At rate 0 the rate identifies a control.
    """
    side = [(record, _acts(record)) for record in records]
    several = any(acts.get(DEFENSE) != NO_DEFENSE for _, acts in side)
    for record, acts in side:
        launched = record["varied"].get(CONTROL) == IDLE
        if acts.get(DEFENSE) == NO_DEFENSE and (several or launched):
            acts[CONTROL] = json.dumps(IDLE)
    return side


def _settings(acts: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(acts.items())


def _acts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that affect results, as JSON text by dotted key."""
    flat = flatten(record["config"])
    return {
        key: json.dumps(value, sort_keys=True)
        for key, value in flat.items()
        if key != "data.path" and not key.startswith("resources.")
    }


def _ordered_keys(side: _Side) -> list[str]:
    return list(dict.fromkeys(key for _, acts in side for key in acts))


def _treatment(key: str, sides: Sequence[_Side]) -> tuple[str, str] | None:
    """Return both values of a setting that is compared; None for a setting that has to be equal.

    Controls without a defense do not count: they lack the settings of the defense.
    """
    if key.startswith(OF_THE_CELL):
        return None
    one, other = (
        {acts[key] for _, acts in side if key in acts and CONTROL not in acts} for side in sides
    )
    if len(one) != 1 or len(other) != 1 or one == other:
        return None
    return one.pop(), other.pop()


def _own_keys(side: _Side, matched: Collection[str], treated: Collection[str]) -> list[str]:
    """Return the settings in which the cells of one side differ, and that need not be equal."""
    return [
        key
        for key in _ordered_keys(side)
        if key not in matched
        and key not in treated
        and len({acts[key] for _, acts in side if key in acts}) > 1
    ]


_Pair = tuple[tuple[Mapping[str, Any], dict[str, str]], tuple[Mapping[str, Any], dict[str, str]]]


def _pairs(sides: Sequence[_Side], matched: Sequence[str]) -> tuple[list[_Pair], list[str]]:
    """Return the pairs, and a note for each reason that cells have no counterpart."""
    groups: list[dict[tuple[str | None, ...], _Side]] = [{}, {}]
    for side, found in zip(sides, groups, strict=True):
        for cell in side:
            found.setdefault(tuple(cell[1].get(key) for key in matched), []).append(cell)
    pairs: list[_Pair] = []
    reasons: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for at, ours in groups[0].items():
        theirs = groups[1].get(at, [])
        if not theirs:
            continue
        # Results of one cell from several versions are not independent samples.
        single = [_unrepeated(cells) for cells in (ours, theirs)]
        for which, cells in enumerate((ours, theirs)):
            name, other = "AB"[which], "BA"[which]
            if repeated := len(cells) - len(single[which]):
                choose = f"choose one with --revision-{name.lower()}"
                reasons[which][
                    f"several of {name} are equal in all settings and differ in revisions; {choose}"
                ] += repeated
            if not single[1 - which] and single[which]:
                reasons[which][f"those of {other} differ in revisions alone"] += len(single[which])
        if len(single[0]) > 1 and len(single[1]) > 1:
            apart = f"they differ in {_telling(single[0])}"
            for which, cells in enumerate(single):
                reasons[which][f"several of each side are equal in what both have: {apart}"] += len(
                    cells
                )
            continue
        pairs += [(one, other) for one in single[0] for other in single[1]]
    for which, (mine, others) in enumerate(((groups[0], groups[1]), (groups[1], groups[0]))):
        values = [{at[i] for at in others} for i in range(len(matched))]
        for at, cells in mine.items():
            if at not in others:
                reasons[which][_why(at, matched, values, "BA"[which])] += len(cells)
    notes = []
    for which, found_reasons in enumerate(reasons):
        for reason, count in found_reasons.items():
            notes.append(
                f"{count} of {len(sides[which])} cells of {'AB'[which]} have no counterpart: "
                f"{reason}."
            )
    return pairs, notes


def _unrepeated(cells: _Side) -> _Side:
    """Return the cells whose settings no other cell has."""
    settings = [_settings(acts) for _, acts in cells]
    times = Counter(settings)
    return [cell for cell, own in zip(cells, settings, strict=True) if times[own] == 1]


def _telling(cells: _Side) -> str:
    """Return a setting in which the cells differ."""
    keys = _ordered_keys(cells)
    return next(k for k in keys if len({acts.get(k) for _, acts in cells}) > 1)


def _why(
    at: Sequence[str | None], matched: Sequence[str], values: Sequence[set[str | None]], other: str
) -> str:
    lacking = [
        f"{key}={json.loads(value)}"
        for key, value, known in zip(matched, at, values, strict=True)
        if value not in known and value is not None
    ]
    if lacking:
        return f"no cell of {other} has {', '.join(lacking[:3])}"
    return f"{other} has each of its settings, but not together"


def _table(
    pairs: Sequence[_Pair],
    matched: Sequence[str],
    own: Sequence[Sequence[str]],
    metrics: Sequence[str],
) -> tuple[pd.DataFrame, list[str]]:
    shown = [key for key in CONFIG_COLUMNS.values() if key in matched and key != "seed"]
    varying = [k for k in matched if len({one[1].get(k) for one, _ in pairs}) > 1]
    # A threshold has a column only if it varies; the other fixed columns are always there.
    shown = [k for k in shown if k in varying or k not in THRESHOLD_KEYS]
    shown += [k for k in varying if k not in shown and k != "seed"]
    columns = [_NAMES.get(key, key) for key in shown]
    further = [
        (which, key)
        for which, keys in enumerate(own)
        for key in keys
        if len({pair[which][1].get(key) for pair in pairs}) > 1
    ]
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {
            name: _value(pair[0][1].get(key)) for name, key in zip(columns, shown, strict=True)
        }
        for which, key in further:
            row[f"{_NAMES.get(key, key)} ({'AB'[which]})"] = _value(pair[which][1].get(key))
        row["seed"] = _value(pair[0][1].get("seed"))
        for side, (record, _) in zip("ab", pair, strict=True):
            row[f"key_{side}"], row[f"run_{side}"] = record["key"], record.get("run_id", "")
            row[f"marks_{side}"] = [mark.name for mark in marks(record)]
            for name in metrics:
                row[f"{name}_{side}"] = (record.get("metrics") or {}).get(name, float("nan"))
        rows.append(row)
    coordinates = columns + [f"{_NAMES.get(key, key)} ({'AB'[which]})" for which, key in further]
    return in_order(pd.DataFrame(rows), [*coordinates, "seed"]), coordinates


def _value(text: str | None) -> Any:
    """Return the value of a setting from its text in `_acts`, for a cell of a table."""
    return flat_value(None if text is None else json.loads(text))


def _cautions(pairs: Sequence[_Pair], table: pd.DataFrame, coordinates: list[str]) -> list[str]:
    """Return notes on what to consider when reading the differences."""
    notes = []
    same = sum(one[0]["key"] == other[0]["key"] for one, other in pairs)
    if same:
        notes.append(
            f"{same} of {len(pairs)} pairs are one and the same result: both sides have that cell."
        )
    for name in REVISIONS:
        one, other = (sorted({str(p[i][0].get("tags", {}).get(name, "unknown")) for p in pairs})
                      for i in (0, 1))  # fmt: skip
        if one != other:
            notes.append(f"revision of {name}: A {', '.join(one[:3])}; B {', '.join(other[:3])}.")
    apart = [
        name
        for name in HARDWARE
        if any(
            one[0].get("tags", {}).get(name) != other[0].get("tags", {}).get(name)
            for one, other in pairs
        )
    ]
    if apart:
        notes.append(f"seconds were measured on different hardware: {', '.join(apart)} differ.")
    sizes = table.groupby(coordinates or ["seed"], dropna=False, sort=False)["seed"].nunique()
    single = int((sizes < 2).sum())
    if single:
        notes.append(
            f"{single} of {len(sizes)} groups have a single seed: a difference, but no interval "
            "and no test."
        )
    if (sizes >= 2).any():
        notes.append(
            "p: two-sided paired t test over seeds, each test on its own; with many rows some are "
            "below 0.05 by chance."
        )
    return notes


def _groups(comparison: Comparison) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    if not comparison.coordinates:
        yield {}, comparison.pairs
        return
    grouped = comparison.pairs.groupby(comparison.coordinates, sort=False, dropna=False)
    for _, group in grouped:
        yield {name: group.iloc[0][name] for name in comparison.coordinates}, group


def _shares(group: pd.DataFrame, side: str) -> str:
    counts = Counter(name for names in group[f"marks_{side}"] for name in names)
    return "; ".join(f"{side.upper()} {name} {n}/{len(group)}" for name, n in counts.items())


def _better(name: str, known: pd.DataFrame, p: float, mean: float) -> str:
    if len(known) and (known[f"{name}_a"] - known[f"{name}_b"]).abs().max() <= ROUNDING:
        return "="
    higher = METRICS[name].higher_is_better
    if pd.isna(p) or p >= LEVEL or higher is None:
        return ""
    return "A" if (mean > 0) == higher else "B"
