"""The choice among trained thresholds: in hindsight, and as a defender can make it.

The oracle uses ASR and CACC. A defender has neither triggered rows nor the poison mask, only the
training rows and reserved clean rows, and chooses by what the cut costs on the clean rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from btu.errors import UserError
from btu.rules.base import RULES, THRESHOLD_IN_WORDS, Rule
from btu.seeding import derive_seed
from btu.types import FloatArray
from orchestrator.report.marks import ATTACK_BAR, attack_failed
from orchestrator.report.thresholds import ThresholdCells, falls

# Losses are differences of fractions: in floating point 0.9 - 0.89 is above 0.01.
ROUNDING = 1e-9
RESAMPLES = 5000
# The columns with fractions, for reports.
FRACTIONS = (
    "cut_cost",
    "asr",
    "cacc",
    "tuned_cacc",
    "cacc_loss",
    "oracle_asr",
    "oracle_cacc",
    "gap",
    "cacc_gap",
)
NONE_WITHIN = "no threshold within the budget; the least aggressive"
NOTHING_CUT = "no threshold cuts anything; the least aggressive"
RELABELED = "rows relabelled: defense.contradicted=keep compares tokens alone"
UNPOISONED = "nothing poisoned: no oracle"
NO_ORACLE = "no threshold keeps CACC: no oracle"


class Chosen(NamedTuple):
    """A chosen threshold.

    position: among the thresholds.
    note: why the threshold is only a last resort; empty if it qualifies.
    """

    position: int
    note: str


def deployable(
    thresholds: FloatArray, cut: FloatArray, cut_cost: FloatArray, rule: Rule, loss: float
) -> Chosen:
    """Return the threshold that a defender would deploy.

    It is the most aggressive threshold that cuts something and costs at most `loss`: the one with
    most tokens cut, and among equals the one that demands a higher score (or a lower share).
    Cutting more tokens never helps the backdoor, so the best defense within a budget of accuracy is
    the deepest cut within it. That holds for the cut alone: groups in which the second stage of btu
    relabelled rows have a note.

    The cost is measured on the reserved clean rows before the clean tuning on the same rows: at
    that moment no weight was trained on them, and the tuning repairs part of the loss. At low
    thresholds the cost is a lower bound: a token that is in no clean row costs nothing there,
    whatever it costs elsewhere, and the rules that compare with the clean rows flag such tokens
    first.

    ASR, CACC, FTR and metrics that need the mask are not used. If no threshold qualifies, the least
    aggressive one is returned. An unknown cost (NaN) is above every budget.

    thresholds: in the rule's unit.
    cut: how many tokens each threshold cuts: the flagged ones that are not vetoed.
    cut_cost: the accuracy that the cut alone costs at each threshold.
    rule: the rule of the thresholds.
    loss: the budget of accuracy.
    """
    mildness = -thresholds if falls(rule) else thresholds
    within = np.flatnonzero((cut_cost <= loss + ROUNDING) & (cut > 0))
    if len(within):
        return Chosen(int(max(within, key=lambda i: (cut[i], mildness[i]))), "")
    least = min(range(len(thresholds)), key=lambda i: (cut[i], -mildness[i]))
    return Chosen(least, NONE_WITHIN if (cut > 0).any() else NOTHING_CUT)


def oracle(group: pd.DataFrame, rule: Rule, loss: float) -> int | None:
    """Return the position of the threshold with the lowest ASR among those that keep CACC.

    A threshold keeps CACC if it is within `loss` of the clean-tuned model's. Among equal ASRs the
    higher CACC is taken, then fewer flags. None if no threshold keeps CACC.
    """
    kept = (group["cacc"] >= group["tuned_cacc"] - loss - ROUNDING) & group["asr"].notna()
    within = np.flatnonzero(kept)
    if not len(within):
        return None
    asr, cacc, threshold, flagged = (
        group[name].to_numpy(dtype=np.float64) for name in ("asr", "cacc", "threshold", "flagged")
    )
    mildness = -threshold if falls(rule) else threshold
    return int(min(within, key=lambda i: (asr[i], -cacc[i], flagged[i], -mildness[i])))


def choices(cells: ThresholdCells, loss: float) -> tuple[pd.DataFrame, list[str]]:
    """Return both choices for every group of at least two thresholds, and notes on the other cells.

    Columns: the coordinates; thresholds (how many); deployable with its flagged, cut_cost, asr and
    cacc, and the group's tuned_cacc; oracle with oracle_asr and oracle_cacc; gap and cacc_gap
    (deployable minus oracle); note.

    cells: the cells that have a threshold.
    loss: the accuracy that a threshold may cost.

    Raises:
        UserError: no group has two thresholds.
    """
    rows = [_choose(group, cells.coordinates, loss) for group in _several(cells)]
    if not rows:
        raise UserError(
            f"no two of {len(cells.table) + sum(cells.left_out.values())} finished cells differ "
            "only in the detection threshold: there is nothing to choose from; vary "
            f"{THRESHOLD_IN_WORDS} in the grid and launch again."
        )
    notes = [f"{count} cells {reason} are left out." for reason, count in cells.left_out.items()]
    single = sum(len(group) < 2 for group in cells.groups())
    if single:
        notes.append(f"{single} cells with the only threshold of their group are left out.")
    return pd.DataFrame(rows), notes


def _several(cells: ThresholdCells) -> list[pd.DataFrame]:
    """Return the groups of at least two thresholds, each with rows 0, 1, ..."""
    return [group.reset_index(drop=True) for group in cells.groups() if len(group) > 1]


def _choose(group: pd.DataFrame, coordinates: list[str], loss: float) -> dict[str, Any]:
    rule = RULES.load(str(group["rule"].iloc[0]))
    threshold, flagged, cost = (
        group[name].to_numpy(dtype=np.float64) for name in ("threshold", "flagged", "cut_cost")
    )
    # Only cells with a bar on the cost of a cut have vetoes.
    cut = flagged - group["vetoed"].fillna(0).to_numpy(dtype=np.float64)
    deployed, note = deployable(threshold, cut, cost, rule, loss)
    taken = group.loc[deployed]
    row: dict[str, Any] = {name: taken[name] for name in coordinates}
    row |= {"thresholds": len(group), "deployable": taken["threshold"]}
    row |= {name: taken[name] for name in ("flagged", "cut_cost", "asr", "cacc", "tuned_cacc")}
    unpoisoned = taken["poison_rate"] == 0
    best = None if unpoisoned else oracle(group, rule, loss)
    nan = float("nan")
    row |= dict.fromkeys(("oracle", "oracle_asr", "oracle_cacc", "gap", "cacc_gap"), nan)
    if best is not None:
        known = group.loc[best]
        row |= {"oracle": known["threshold"], "oracle_asr": known["asr"]}
        row |= {"oracle_cacc": known["cacc"], "gap": taken["asr"] - known["asr"]}
        row |= {"cacc_gap": taken["cacc"] - known["cacc"]}
    missing = UNPOISONED if unpoisoned else NO_ORACLE if best is None else ""
    # The gate of the second stage depends on what is flagged: fewer tokens may then do more.
    acted = "rows_relabeled" in group and (group["rows_relabeled"] > 0).any()
    notes = (note, RELABELED if acted else "", missing)
    return {**row, "note": "; ".join(filter(None, notes))}


def recommended(cells: ThresholdCells, chosen: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return one threshold per rule with its interval and results, and notes on what is left out.

    The threshold is the trained one next to the median of what a defender would deploy in each
    group. A single threshold has to work for attacks, rates and seeds that are unknown beforehand,
    and neither a group in which nothing qualifies nor one in which everything does moves a median.
    Shares are compared by ratio, scores by difference.

    The choice within a group uses neither ASR nor CACC. Hindsight enters in two ways: it determines
    which groups count, and ``--refine`` places the thresholds to choose from by ASR or CACC.

    Groups without poison, and groups whose attack fails undefended, are left out.

    Columns: rule; threshold; low and high, from the 95 % percentile bootstrap over groups (NaN for
    a single group); groups; measured, how many of them trained this threshold; asr, cacc_loss
    (tuned minus defended) and gap (to each group's oracle), means over the measured groups.

    cells: the cells that have a threshold.
    chosen: the table of `choices`.
    """
    groups = _several(cells)
    undefended = [group[["undefended_asr", "undefended_ftr"]].iloc[0] for group in groups]
    took = pd.Series([not attack_failed(*rates) for rates in undefended], dtype=bool)
    unpoisoned = chosen["poison_rate"] == 0
    failed = ~unpoisoned & ~took
    notes = []
    if failed.any():
        notes.append(
            f"{int(failed.sum())} groups whose attack fails undefended (ASR below "
            f"{ATTACK_BAR:.0%}, or hardly above FTR) are left out of the recommendation."
        )
    if unpoisoned.any():
        notes.append(
            f"{int(unpoisoned.sum())} groups without poison are left out of the recommendation."
        )
    rows = [
        _recommend(str(name), part, [groups[i] for i in part.index])
        for name, part in chosen[~(failed | unpoisoned)].groupby("rule", sort=False)
    ]
    columns = ["rule", "threshold", "low", "high", "groups", "measured", "asr", "cacc_loss", "gap"]
    return pd.DataFrame(rows, columns=columns), notes


def _recommend(name: str, chosen: pd.DataFrame, groups: list[pd.DataFrame]) -> dict[str, Any]:
    rule = RULES.load(name)
    by_ratio = falls(rule)
    values = chosen["deployable"].to_numpy(dtype=np.float64)
    scaled = np.log(values) if by_ratio else values
    trained = np.unique(np.concatenate([group["threshold"].to_numpy() for group in groups]))
    middle = float(np.median(scaled))
    threshold = _nearest(trained, middle, by_ratio)
    low, high = _interval(scaled)
    asr, lost, gaps = [], [], []
    for group, best in zip(groups, chosen["oracle_asr"], strict=True):
        for _, cell in group[group["threshold"] == threshold].iterrows():
            asr.append(cell["asr"])
            lost.append(cell["tuned_cacc"] - cell["cacc"])
            gaps.append(cell["asr"] - best)
    return {
        "rule": name,
        "threshold": threshold,
        "low": float(np.exp(low)) if by_ratio else low,
        "high": float(np.exp(high)) if by_ratio else high,
        "groups": len(chosen),
        "measured": len(asr),
        "asr": _mean(asr),
        "cacc_loss": _mean(lost),
        "gap": _mean(gaps),
    }


def _nearest(trained: FloatArray, middle: float, by_ratio: bool) -> float:
    """Return the trained threshold next to `middle`; of two equally near, the less aggressive."""
    distance = np.abs((np.log(trained) if by_ratio else trained) - middle)
    ties = trained[distance <= distance.min() + ROUNDING]
    return float(ties.min() if by_ratio else ties.max())


def _interval(values: FloatArray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float("nan"), float("nan")
    drawn = bootstrap(
        (values,),
        np.median,
        n_resamples=RESAMPLES,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(derive_seed(0, "bootstrap of thresholds")),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the defined values; NaN without any."""
    return float(pd.Series(list(values), dtype=float).mean())
