"""Tables and bars of what a detection rule finds in generated data sets.

The tables that these functions take have a row per set: the columns of `described`, and what was
found in the poisoned set and in its clean twin (`thresholds.measured`).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import pandas as pd
from figures import Judge
from generated import BASE, Drawn

from btu.rules.base import RULES
from btu.rules.surplus import expected_flags

# With this probability chance flags no more tokens of clean sets than the bar.
QUANTILE = 0.95


def described(drawn: Drawn) -> dict[str, Any]:
    """Return what was drawn, as columns of a table. Sizes are not among them: duplicates go.

    skew: rows of the largest class over rows of the smallest.
    other_dominant: whether a word dominates another class than the target.
    """
    others = [share for label, share in enumerate(drawn.dominant) if label != drawn.target]
    return {
        "set": drawn.scenario or drawn.number,
        "classes": drawn.classes,
        "skew": max(drawn.shares) / min(drawn.shares),
        "words": drawn.length,
        "tilt": drawn.tilt,
        "shift": drawn.shift,
        "templates": drawn.templates,
        "other_dominant": "yes" if any(others) else "no",
        "attack": drawn.attack,
        "label_mode": drawn.label_mode,
        "rate": drawn.rate,
    }


def by_factor(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over the sets that share a factor; ``clean_flagged`` is a sum.

    n counts sets, and `of` those in which something was flagged: the others have no precision.
    Sets without a rare token have no recall of them, and are left out of that mean.
    """
    factors: dict[str, Any] = {
        "all": np.full(len(table), ""),
        "templates": np.where(table.templates > 0, "yes", "no"),
        "clean rows": pd.cut(
            table.clean_rows,
            [0, 100, 200, 400, np.inf],
            labels=["to 100", "to 200", "to 400", "more"],
        ),
        "classes": pd.cut(table.classes, [1, 2, 4, np.inf], labels=["2", "3 to 4", "5 to 20"]),
        "shift": np.where(table["shift"] > 0, "above 0", "0"),
        # Skews are 1, 3 and 20.
        "largest : smallest class": pd.cut(table["skew"], [0, 2, 10, 100], labels=["1", "3", "20"]),
        "attack": table.attack,
        "label mode": table.label_mode,
    }
    rows = []
    for factor, values in factors.items():
        for value, part in table.groupby(values, observed=True):
            rows.append(
                {
                    "factor": factor,
                    "value": value,
                    "n": len(part),
                    "precision": part.precision.mean(),
                    "of": int(part.precision.count()),
                    "recall_rare": part.recall_rare.mean(),
                    "clean_flagged": int(part.clean_flagged.sum()),
                }
            )
    return pd.DataFrame(rows)


def most_by_chance(rule: str, sets: int) -> tuple[float, int]:
    """Return how many tokens a rule flags of clean sets by chance: the mean, and 95 % of the time.

    rule: its scores count flags by chance (`btu.rules.surplus.expected_flags`).
    sets: the number of clean sets.
    """
    from scipy.stats import poisson

    mean = sets * expected_flags(RULES.load(rule).threshold)
    return mean, int(poisson.ppf(QUANTILE, mean))


def judge_generated(judge: Judge, table: pd.DataFrame, rule: str, bars: argparse.Namespace) -> None:
    """Judge a rule at its default threshold on sets of the family.

    judge: gets bars and figures.
    table: a row per set.
    rule: the rule's name.
    bars: least_precision, least_recall, and most_clean_flags, where None takes `most_by_chance`.
    """
    some, none = table.precision.dropna(), int(table.precision.isna().sum())
    # Tokens are not pooled: a set with many false flags would hide those with one.
    judge.structure(f"{rule}: mean of the sets' precision at least {bars.least_precision}",
                    f"{_mean(some)} of {len(some)} poisoned sets; nothing flagged of {none}",
                    # Nothing flagged is nothing benign flagged: recall tells.
                    not len(some) or bool(some.mean() >= bars.least_precision))  # fmt: skip
    recall = table.recall_rare.dropna()
    judge.structure(f"{rule}: mean recall of rare trigger tokens at least {bars.least_recall}",
                    f"{_mean(recall)} of {len(recall)} poisoned sets with such tokens",
                    not len(recall) or bool(recall.mean() >= bars.least_recall))  # fmt: skip
    mean, most = most_by_chance(rule, len(table))
    reason = f"chance flags {mean:.2f}, and at most so many in {QUANTILE:.0%}"
    if bars.most_clean_flags is not None:
        most, reason = bars.most_clean_flags, f"chance flags {mean:.2f}"
    flags = int(table.clean_flagged.sum())
    judge.structure(f"{rule}: at most {most} tokens flagged of {len(table)} clean sets ({reason})",
                    str(flags), flags <= most)  # fmt: skip
    judge.figures |= {"sets": rows_of(table), "by factor": rows_of(by_factor(table))}


def judge_reserves(judge: Judge, table: pd.DataFrame, rule: str, bars: argparse.Namespace) -> None:
    """Judge the base scenario, with which the others are compared.

    judge, rule, bars: see `judge_generated`; most_clean_flags is a number.
    table: a row per scenario.
    """
    name = BASE.scenario
    base = table.set_index("set").loc[name]
    judge.structure(f"{rule}, {name} scenario: precision at least {bars.least_precision}",
                    f"{base.precision:.3f} of {base.flagged} flagged tokens",
                    not base.flagged or bool(base.precision >= bars.least_precision))  # fmt: skip
    judge.structure(f"{rule}, {name} scenario: recall of rare tokens at least {bars.least_recall}",
                    f"{base.recall_rare:.3f}",
                    bool(base.recall_rare >= bars.least_recall))  # fmt: skip
    judge.structure(f"{rule}, {name} scenario: at most {bars.most_clean_flags} tokens flagged of "
                    "the clean set",
                    str(base.clean_flagged),
                    bool(base.clean_flagged <= bars.most_clean_flags))  # fmt: skip
    judge.figures["reserves"] = rows_of(table)


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows for JSON, undefined values as null."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return rows


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}" if len(values) else "none"
