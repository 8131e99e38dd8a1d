"""The finished cells of a sweep that have a threshold, in groups that differ only in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from btu.defenses.base import is_control
from btu.metrics import METRICS
from btu.rules.base import Rule, Threshold, threshold_of
from orchestrator.report.table import THRESHOLD_COLUMNS, coordinates, in_order

# Columns of `coordinates` that are the threshold or name its rule. A group has one rule.
OWN = (*THRESHOLD_COLUMNS, "defense.rule")


@dataclass(frozen=True)
class ThresholdCells:
    """Cells with a rule and one threshold.

    table: a row per cell: key, the coordinates, rule, threshold, exact, and every metric of
        `btu.metrics.METRICS`.
    coordinates: the columns that are equal within a group.
    left_out: how many other cells there are, by reason.
    """

    table: pd.DataFrame
    coordinates: list[str]
    left_out: Mapping[str, int]

    def groups(self) -> Iterable[pd.DataFrame]:
        """Yield the cells of each group, by rising threshold."""
        for _, group in self.table.groupby(self.coordinates, sort=False, dropna=False):
            yield group.drop_duplicates("threshold")


def threshold_cells(
    records: Iterable[Mapping[str, Any]], *, acting: bool = False
) -> ThresholdCells:
    """Return the cells that have a threshold, sorted by coordinates.

    acting: only those whose defense cuts what it flags. A control cuts other tokens, and an
        ablation cuts none: neither costs what the defense costs at that threshold.
    """
    records = list(records)
    left_out: Counter[str] = Counter()
    rows = []
    for record in records:
        defense = record["config"]["defense"]
        found = threshold_of(defense)
        reason = _left_out(defense, found, acting)
        if reason:
            left_out[reason] += 1
        row: dict[str, Any] = {"key": record["key"], "rule": None, "threshold": None, "exact": None}
        if found is not None and not reason:
            row |= {"rule": found.rule, "threshold": found.value, "exact": found.exact}
        rows.append(row | {name: record["metrics"].get(name, float("nan")) for name in METRICS})
    cells = pd.DataFrame(rows, columns=["key", "rule", "threshold", "exact", *METRICS])
    where = coordinates(records).drop(columns=list(OWN), errors="ignore")
    where.insert(list(where.columns).index("defense") + 1, "rule", cells.pop("rule"))
    names = list(where.columns)
    table = pd.concat([where, cells], axis=1)
    table = table[table["rule"].notna()].astype({"threshold": float, "exact": bool})
    return ThresholdCells(in_order(table, [*names, "threshold"]), names, dict(left_out))


def falls(rule: Rule) -> bool:
    """Return whether a higher threshold flags more: it does for a share, not for a score."""
    return rule.bar(0.75) < rule.bar(0.25)


def _left_out(defense: Mapping[str, Any], threshold: Threshold | None, acting: bool) -> str:
    """Return why a cell is left out, empty if it is not."""
    if threshold is None:
        return "of no known detection rule"
    if threshold.value is None:
        return "with a threshold for each round"
    if acting and is_control(defense.get("name")):
        return "of controls"
    return "that cut nothing" if acting and defense.get("cut") == "none" else ""
