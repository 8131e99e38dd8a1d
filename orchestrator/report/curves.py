"""Detection metrics at every threshold, from the scores that finished cells have saved.

Nothing is trained: a token is flagged if its score reaches the rule's bar, a row if its highest
token does. ASR and CACC need a trained model and are known only at thresholds that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from btu.errors import UserError
from btu.metrics import average_precision
from btu.rules.base import RULES, Rule
from btu.types import FloatArray, IntArray
from orchestrator.report.table import means
from orchestrator.report.thresholds import ThresholdCells, falls
from orchestrator.results.source import Source

# The share of the candidates that a curve flags at its most aggressive default threshold.
DEEPEST = 0.01
# The last default threshold lies above the highest score by this share of the range: it flags
# nothing.
ABOVE = 0.02
DETECTION = ("flagged", "precision", "recall", "f1")
SAMPLES = ("sample_precision", "sample_recall", "sample_f1")
MEASURES = (*DETECTION, *SAMPLES, "auprc", "asr", "cacc")
# A measure of a curve -> the metric that a cell logs at its own threshold.
LOGGED = {"flagged": "flagged"} | {
    f"{ours}{name}": f"{theirs}_{name}"
    for ours, theirs in (("", "detection"), ("sample_", "sample"))
    for name in ("precision", "recall", "f1")
}


class Saved(NamedTuple):
    """What a cell has saved: tokens (score, trigger) and training rows (top, poisoned)."""

    tokens: pd.DataFrame
    rows: pd.DataFrame


def curve(
    saved: Saved, thresholds: Iterable[float], rule: Rule, triggers: int | None
) -> pd.DataFrame:
    """Return a row per threshold: how many tokens are flagged, and the detection metrics.

    Undefined metrics are NaN, as in `btu.metrics.DetectionScore`.

    saved: the scores of a cell.
    thresholds: in the rule's unit.
    rule: the rule that gave the scores.
    triggers: how many tokens the trigger has, scored or not; None if it is not made of fixed
        tokens, so that token metrics are undefined.
    """
    thresholds = np.asarray(list(thresholds), dtype=np.float64)
    bars = np.array([rule.bar(float(threshold)) for threshold in thresholds])
    scores, top = saved.tokens["score"].to_numpy(), saved.rows["top"].to_numpy()
    trigger, poisoned = saved.tokens["trigger"].to_numpy(), saved.rows["poisoned"].to_numpy()
    flagged = reaching(scores, bars)
    columns: dict[str, FloatArray | IntArray] = {"threshold": thresholds, "flagged": flagged}
    columns |= _measures("", reaching(scores[trigger], bars), flagged, triggers)
    columns |= _measures(
        "sample_", reaching(top[poisoned], bars), reaching(top, bars), int(poisoned.sum())
    )
    return pd.DataFrame(columns)


def reaching(scores: FloatArray, bars: FloatArray) -> IntArray:
    """Return how many scores reach each bar; NaN reaches none."""
    known = np.sort(scores[~np.isnan(scores)])
    count: IntArray = len(known) - np.searchsorted(known, bars, side="left")
    return count


def _measures(
    prefix: str, hits: IntArray, flagged: IntArray, true: int | None
) -> dict[str, FloatArray]:
    """Return precision, recall and F1 by name, each with a value per threshold."""
    unknown = np.full(len(hits), np.nan)
    precision, recall, f1 = unknown, unknown, unknown
    if true is not None:
        precision = np.divide(hits, flagged, out=unknown.copy(), where=flagged > 0)
    if true:
        recall = hits / true
        # Equals 2pr / (p + r), but is 0 without a hit even if nothing is flagged.
        f1 = 2 * hits / (flagged + true)
    return {f"{prefix}precision": precision, f"{prefix}recall": recall, f"{prefix}f1": f1}


def spanning(
    rule: Rule, scores: Iterable[FloatArray], trained: Collection[float], count: int
) -> FloatArray:
    """Return `count` thresholds over the range in which the flags change, and the trained ones.

    The range goes from flagging a hundredth of the candidates to flagging nothing, and includes all
    trained thresholds. For a share of the vocabulary it starts at one token. Neighbours have equal
    ratios: low scores are the most frequent, and a share counts ranks.

    rule: the rule that gave the scores.
    scores: the scores of each curve.
    trained: the thresholds that ran.
    count: how many thresholds beside the trained ones.
    """
    sign = -1.0 if falls(rule) else 1.0
    ends = list(trained)
    for several in scores:
        known = np.sort(several[np.isfinite(several)])[::-1]
        known = sign * known[: max(1, int(np.ceil(DEEPEST * len(known))))]
        known = known[(known > rule.low) & (known < rule.high)]
        ends += [float(end) for end in (known.min(), known.max())] if len(known) else []
    low, high = (min(ends), max(ends)) if ends else (rule.threshold, rule.threshold)
    if not falls(rule):
        high += ABOVE * (high - (low if low < high else rule.low))
    # The ends must be exact: rounding could lose the single token of the lowest share.
    inner = rule.low + np.geomspace(low - rule.low, high - rule.low, count)[1:-1]
    spanned: FloatArray = np.union1d(np.concatenate([[low], inner, [high]]), list(trained))
    return spanned


def read_saved(source: Source) -> Callable[[str], Saved | None]:
    """Return a function from a cell's key to its scores, None if there are none or damaged ones."""

    def read(key: str) -> Saved | None:
        tokens, rows = source.tokens(key), source.rows(key)
        if tokens is None or rows is None or not tokens["score"].notna().any():
            return None  # the tables were not kept, or the defense does not rank tokens
        return Saved(tokens[["score", "trigger"]], rows[["top", "poisoned"]])

    return read


def sweep_curves(
    cells: ThresholdCells, read: Callable[[str], Saved | None], count: int
) -> tuple[pd.DataFrame, list[str]]:
    """Return the curve of every group of cells, a row per threshold, and notes on them.

    Cells that differ only in the threshold have the same scores: one of them is read. All groups
    with the same rule have the same thresholds, so that seeds can be averaged.

    Columns: the coordinates, threshold, trained, exact, `MEASURES`. exact: whether the saved scores
    give the flags at every threshold (`btu.rules.base.Threshold`). auprc: of the whole ranking.

    cells: the cells that have a threshold.
    read: from a cell's key to its scores.
    count: how many thresholds beside the trained ones.

    Raises:
        UserError: no cell has token scores.
    """
    groups: list[tuple[pd.DataFrame, Saved]] = []
    unread = 0
    for group in cells.groups():
        saved = next((found for key in group["key"] if (found := read(key)) is not None), None)
        if saved is None:
            unread += len(group)
        else:
            groups.append((group, saved))
    if not groups:
        raise UserError(
            f"none of {len(cells.table) + sum(cells.left_out.values())} finished cells has token "
            "scores; curves need a defense that ranks tokens (defense.name=btu with a defense.rule "
            "of its own), launched with this version."
        )
    by_rule: dict[str, list[tuple[pd.DataFrame, Saved]]] = {}
    for group, saved in groups:
        by_rule.setdefault(str(group["rule"].iloc[0]), []).append((group, saved))
    grids = {
        name: spanning(
            RULES.load(name),
            [saved.tokens["score"].to_numpy() for _, saved in members],
            {float(value) for group, _ in members for value in group["threshold"]},
            count,
        )
        for name, members in by_rule.items()
    }
    curves, differing = [], 0
    for group, saved in groups:
        name = str(group["rule"].iloc[0])
        part = _with_trained(group, saved, grids[name])
        differing += _differing(group, part)
        where = pd.concat([group[cells.coordinates].iloc[:1]] * len(part), ignore_index=True)
        curves.append(pd.concat([where, part], axis=1))
    table = pd.concat(curves, ignore_index=True)
    read_cells = sum(len(group) for group, _ in groups)
    notes = [f"{count} cells {reason} have no curve." for reason, count in cells.left_out.items()]
    if unread:
        notes.append(f"{unread} cells without token scores have no curve.")
    notes.append(
        f"{read_cells} cells, {len(groups)} curves: cells that differ only in the threshold have "
        "the same scores."
    )
    if not table["exact"].all():
        notes.append("Where exact is false: approximate, round 2 depends on the threshold.")
    if differing:
        notes.append(
            f"{differing} cells logged other detection metrics than the scores of their curve give "
            "at their threshold: they were computed by other versions or on other hardware. "
            "Their curves are one cell's."
        )
    return table, notes


def _with_trained(group: pd.DataFrame, saved: Saved, thresholds: FloatArray) -> pd.DataFrame:
    first = group.iloc[0]
    # Cells log this metric if the trigger is made of fixed tokens, even without poisoned rows.
    fixed = not np.isnan(first["triggers_cut_train"])
    triggers = int(first["detection_recall_n"]) if fixed else None
    part = curve(saved, thresholds, RULES.load(first["rule"]), triggers)
    known = np.flatnonzero(saved.tokens["trigger"]).tolist()
    # Trigger tokens without a score are not in the saved table, and no threshold flags them.
    share = len(known) / triggers if triggers else 1.0
    part["auprc"] = share * average_precision(saved.tokens["score"].to_numpy(), known)
    part.insert(1, "trained", part["threshold"].isin(group["threshold"]))
    part.insert(2, "exact", bool(first["exact"]))
    return part.merge(group[["threshold", "asr", "cacc"]], on="threshold", how="left")


def _differing(group: pd.DataFrame, part: pd.DataFrame) -> int:
    """Return how many cells logged other metrics than their exact curve has at their threshold."""
    here = part[part["trained"] & part["exact"]][list(LOGGED)].to_numpy(dtype=np.float64)
    if not len(here):
        return 0
    group = group.sort_values("threshold")
    logged = group[list(LOGGED.values())].to_numpy(dtype=np.float64)
    apart = ~np.isclose(here, logged, equal_nan=True)
    if "rows_relabeled" in group:
        # The cell logged these rows too; a curve counts the rows of tokens.
        relabeled = group["rows_relabeled"].to_numpy(dtype=np.float64) > 0
        apart &= ~(relabeled[:, None] & np.isin(list(LOGGED), SAMPLES))
    return int(apart.any(axis=1).sum())


def curve_means(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the curves' means over seeds, with the intervals of `mean_over_seeds`.

    trained: whether the threshold ran at one seed or more. ASR and CACC are means over these seeds.
    """
    groups = [name for name in curves.columns if name not in (*MEASURES, "seed", "trained")]
    table = means(curves, groups, MEASURES)
    trained = curves.groupby(groups, sort=False, dropna=False)["trained"].any().to_numpy()
    table.insert(list(table.columns).index("threshold") + 1, "trained", trained)
    return table
