"""The finished cells of a sweep by detection threshold, in groups that are equal but for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from btu.defenses.base import is_control
from btu.defenses.token_unlearning import TOP_FRACTION
from btu.rules.base import RULES, Rule
from orchestrator.report.table import coordinates, in_order

# Columns of `coordinates` that are the threshold or say its rule; a group has one rule.
OWN = ("alpha", "defense.threshold", "defense.rule")
# A measure of `orchestrator.report.curves` -> the metric that a cell logs at its own threshold.
LOGGED = {"flagged": "flagged"} | {
    f"{ours}{name}": f"{theirs}_{name}"
    for ours, theirs in (("", "detection"), ("sample_", "sample"))
    for name in ("precision", "recall", "f1")
}
METRICS = (
    "asr",
    "cacc",
    "undefended_asr",
    "undefended_ftr",
    "tuned_cacc",
    "cut_cost",
    "detection_recall_n",
    "triggers_cut_train",
    *LOGGED.values(),
)


@dataclass(frozen=True)
class Cells:
    """Cells with a rule and one threshold.

    table: a row each: key, the coordinates, rule, threshold, exact, `METRICS`. coordinates: the
    columns that are equal within a group. left_out: how many other cells there are, by reason.
    """

    table: pd.DataFrame
    coordinates: list[str]
    left_out: Mapping[str, int]

    def groups(self) -> Iterable[pd.DataFrame]:
        """Yield the cells of each group, by rising threshold."""
        for _, group in self.table.groupby(self.coordinates, sort=False, dropna=False):
            yield group.drop_duplicates("threshold")


def threshold_cells(records: Iterable[Mapping[str, Any]], *, acting: bool = False) -> Cells:
    """Return the cells that have a threshold, sorted by coordinates.

    acting: only those whose defense cuts what it flags. A control's cut is of other tokens, that of
    an ablation none: neither costs what a defense at that threshold does.
    """
    records = list(records)
    left_out: Counter[str] = Counter()
    rows = []
    for record in records:
        defense = record["config"]["defense"]
        read = _threshold(defense)
        if acting and not isinstance(read, str):
            read = _idle(defense) or read
        if isinstance(read, str):
            left_out[read] += 1
        rule, threshold, exact = (None, None, None) if isinstance(read, str) else read
        own = {"key": record["key"], "rule": rule, "threshold": threshold, "exact": exact}
        rows.append(own | {m: record["metrics"].get(m, float("nan")) for m in METRICS})
    found = pd.DataFrame(rows, columns=["key", "rule", "threshold", "exact", *METRICS])
    where = coordinates(records).drop(columns=list(OWN), errors="ignore")
    where.insert(list(where.columns).index("defense") + 1, "rule", found.pop("rule"))
    names = list(where.columns)
    table = pd.concat([where, found], axis=1)
    table = table[table["rule"].notna()].astype({"threshold": float, "exact": bool})
    return Cells(in_order(table, [*names, "threshold"]), names, dict(left_out))


def falls(rule: Rule) -> bool:
    """Return whether a higher threshold flags more, as a share does and a score does not."""
    return rule.bar(0.75) < rule.bar(0.25)


def _idle(defense: Mapping[str, Any]) -> str:
    """Return why a defense does not cut what its rule flags, empty if it does."""
    if is_control(defense.get("name")):
        return "of controls"
    return "that cut nothing" if defense.get("cut") == "none" else ""


def _threshold(defense: Mapping[str, Any]) -> tuple[str, float, bool] | str:
    """Return a defense's rule, its threshold and whether its saved scores know all its flags.

    Or why it has none: a text.
    """
    rule = defense.get("rule")
    if rule is None or rule not in RULES:
        return "of no known detection rule"
    if rule != TOP_FRACTION:
        return rule, float(defense["threshold"]), True
    alpha = defense["alpha"]
    alphas = set(alpha) if isinstance(alpha, list) else {alpha}
    if len(alphas) > 1:
        return "with a threshold for each round"
    # Round 2's drift depends on what round 1 flagged, so that no score over all thresholds has it.
    return rule, float(alphas.pop()), 2 not in defense["rounds"]
