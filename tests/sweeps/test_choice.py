"""The choice of a threshold, in hindsight and as a defender."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import config, shelve

from btu.errors import UserError
from btu.rules.base import RULES
from orchestrator.report.choice import (
    NO_ORACLE,
    NONE_WITHIN,
    NOTHING_CUT,
    UNPOISONED,
    choices,
    deployable,
    recommended,
)
from orchestrator.report.thresholds import ThresholdCells, threshold_cells

CONTRAST, SHARE = RULES.load("contrast"), RULES.load("top_fraction")
NAN = float("nan")


def record(settings: Mapping[str, Any], **metrics: float) -> dict[str, Any]:
    known = {"undefended_asr": 1.0, "tuned_cacc": 0.9, "asr": 0.5, "cacc": 0.9, "cut_cost": 0.0}
    defense = settings["defense"]
    key = f"{settings['attack']} {settings['seed']} {defense['threshold']} {defense['alpha']}"
    measured = {**known, "flagged": 1, **metrics}
    return {"key": key, "varied": {}, "config": settings, "metrics": measured}


def group(*cells: tuple[float, int, float, float, float], **settings: Any) -> list[dict[str, Any]]:
    """Return records of one group: threshold, flagged, cut_cost, asr, cacc of each."""
    return [
        record(config(threshold=t, **settings), flagged=n, cut_cost=cost, asr=asr, cacc=cacc)
        for t, n, cost, asr, cacc in cells
    ]


def chosen(*records: dict[str, Any], loss: float = 0.01) -> list[dict[str, Any]]:
    table, _ = choices(threshold_cells(records), loss)
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


# What a defender would deploy ------------------------------------------------------------------


def deployed(
    thresholds: list[float], cut: list[int], cost: list[float], rule: Any = CONTRAST
) -> tuple[float, str]:
    position, note = deployable(
        np.array(thresholds), np.array(cut, dtype=float), np.array(cost), rule, 0.01
    )
    return thresholds[position], note


def test_the_deepest_cut_within_the_budget_is_deployed() -> None:
    # 3 cuts most but costs 2 points; 4 costs exactly the budget of 1.
    assert deployed([3, 4, 5], [30, 20, 2], [0.02, 0.01, 0.0]) == (4, "")


def test_a_deeper_cut_that_costs_less_is_taken_all_the_same() -> None:
    # The budget decides, not the cost: 4 is over it, 3 within.
    assert deployed([3, 4, 5], [30, 20, 2], [0.005, 0.02, 0.0]) == (3, "")


@pytest.mark.parametrize(("rule", "mild"), [(CONTRAST, 0.4), (SHARE, 0.2)])
def test_of_equal_cuts_the_one_that_asks_for_more_is_deployed(rule: Any, mild: float) -> None:
    # A higher score asks for more, a higher share for less.
    assert deployed([0.2, 0.4], [7, 7], [0.0, 0.0], rule) == (mild, "")


def test_a_threshold_that_cuts_nothing_is_not_deployed_while_another_is_within() -> None:
    assert deployed([4, 9], [1, 0], [0.0, 0.0]) == (4, "")


def test_where_none_qualifies_it_is_the_least_aggressive_one() -> None:
    assert deployed([3, 4, 5], [30, 20, 2], [0.3, 0.2, 0.1]) == (5, NONE_WITHIN)
    assert deployed([0.001, 0.01], [2, 30], [0.1, 0.3], SHARE) == (0.001, NONE_WITHIN)
    # 9 cuts nothing and costs nothing: not within, but the least aggressive.
    assert deployed([3, 9], [30, 0], [0.3, 0.0]) == (9, NONE_WITHIN)
    assert deployed([8, 9], [0, 0], [0.0, 0.0]) == (9, NOTHING_CUT)


def test_a_flagged_token_that_is_vetoed_is_not_cut() -> None:
    low, middle, high = group((3, 30, 0.0, 0.1, 0.9), (4, 20, 0.0, 0.2, 0.9), (5, 2, 0.0, 0.9, 0.9))
    low["metrics"]["vetoed"] = 28  # 3 cuts 2 of 30, 4 cuts 3 of 20
    middle["metrics"]["vetoed"] = 17
    high["metrics"]["vetoed"] = 0
    (row,) = chosen(low, middle, high)
    assert (row["deployable"], row["flagged"]) == (4, 20)
    # If 4 cuts none, 5 cuts as many as 3 and asks for more.
    middle["metrics"]["vetoed"] = 20
    assert [row["deployable"] for row in chosen(low, middle, high)] == [5]
    low["metrics"]["vetoed"], high["metrics"]["vetoed"] = 30, 2
    (row,) = chosen(low, middle, high)
    assert (row["deployable"], row["note"]) == (5, NOTHING_CUT)


def test_a_cost_that_is_not_known_is_above_every_budget() -> None:
    assert deployed([3, 4], [30, 20], [NAN, 0.0]) == (4, "")
    assert deployed([3, 4], [30, 20], [NAN, NAN]) == (4, NONE_WITHIN)


def test_the_deployable_choice_looks_at_nothing_that_a_defender_lacks() -> None:
    honest = [
        *group((3, 30, 0.02, 0.1, 0.8), (4, 20, 0.01, 0.2, 0.9), (5, 2, 0.0, 0.9, 0.9)),
        *group((3, 9, 0.0, 0.9, 0.9), (5, 1, 0.0, 0.1, 0.9), seed=1),
    ]
    for entry in honest:
        entry["metrics"]["vetoed"] = 0
    rng = np.random.default_rng(0)
    nonsense = []
    for entry in honest:
        kept = {"flagged", "cut_cost", "vetoed"}
        hidden = {
            name: float(rng.uniform(-5, 5))
            for name in (
                "asr", "cacc", "ftr", "tuned_asr", "tuned_cacc", "tuned_ftr", "undefended_asr",
                "undefended_cacc", "detection_precision", "detection_recall", "detection_f1",
                "detection_auprc", "sample_precision", "sample_recall", "sample_f1",
                "sample_auroc", "detection_recall_n", "poison_rate_reached", "poisoned_rows",
            )
        }  # fmt: skip
        seen = {name: entry["metrics"][name] for name in kept}
        nonsense.append({**entry, "metrics": seen | hidden})
    nothing = [
        {**entry, "metrics": {n: entry["metrics"][n] for n in ("flagged", "cut_cost", "vetoed")}}
        for entry in honest
    ]
    expected = [4, 3]
    for records in (honest, nonsense, nothing):
        assert [row["deployable"] for row in chosen(*records)] == expected
    # The oracle, which looks, does change.
    assert [row["oracle"] for row in chosen(*honest)] != [
        row["oracle"] for row in chosen(*nonsense)
    ]


# In hindsight ----------------------------------------------------------------------------------


def test_the_oracle_has_the_lowest_asr_within_the_loss() -> None:
    # Tuned CACC 0.9: 3 loses 2 points, 4 exactly 1, 5 none.
    (row,) = chosen(*group((3, 30, 0.0, 0.1, 0.88), (4, 20, 0.0, 0.2, 0.89), (5, 2, 0.0, 0.7, 0.9)))
    assert (row["oracle"], row["oracle_asr"], row["oracle_cacc"]) == (4, 0.2, 0.89)
    # Deployed is 3, all of whose costs are 0: ASR 0.1 - 0.2, CACC 0.88 - 0.89.
    assert row["deployable"] == 3
    assert row["gap"] == pytest.approx(-0.1)
    assert row["cacc_gap"] == pytest.approx(-0.01)
    assert row["note"] == ""


def test_of_equal_asr_the_oracle_takes_the_higher_cacc_then_the_fewer_flags() -> None:
    (row,) = chosen(*group((3, 30, 0.0, 0.1, 0.9), (4, 20, 0.0, 0.1, 0.91), (5, 2, 0.0, 0.1, 0.9)))
    assert row["oracle"] == 4
    (row,) = chosen(*group((3, 30, 0.0, 0.1, 0.9), (4, 20, 0.0, 0.1, 0.9), (5, 20, 0.0, 0.1, 0.9)))
    assert row["oracle"] == 5


def test_where_no_threshold_keeps_cacc_there_is_no_oracle() -> None:
    (row,) = chosen(*group((3, 30, 0.0, 0.1, 0.8), (4, 20, 0.0, 0.2, 0.7)))
    assert math.isnan(row["oracle"])
    assert math.isnan(row["gap"])
    assert (row["deployable"], row["note"]) == (3, NO_ORACLE)


def test_without_poison_there_is_no_oracle_but_a_choice() -> None:
    (row,) = chosen(*group((3, 30, 0.1, 0.1, 0.9), (4, 20, 0.0, 0.1, 0.9), rate=0.0))
    assert (row["deployable"], row["note"]) == (4, UNPOISONED)
    assert math.isnan(row["oracle_asr"])


# Groups ----------------------------------------------------------------------------------------


def test_a_group_is_equal_but_for_the_threshold() -> None:
    two = (3, 30, 0.0, 0.1, 0.9), (4, 20, 0.0, 0.2, 0.9)
    rows = chosen(
        *group(*two), *group(*two, seed=1), *group(*two, rate=0.2), *group(*two, rule="mad")
    )
    assert [(r["rule"], r["poison_rate"], r["seed"], r["thresholds"]) for r in rows] == [
        ("contrast", 0.1, 0, 2), ("contrast", 0.1, 1, 2), ("mad", 0.1, 0, 2),
        ("contrast", 0.2, 0, 2),
    ]  # fmt: skip


def test_a_group_of_one_threshold_is_left_out_and_counted() -> None:
    two = group((3, 30, 0.0, 0.1, 0.9), (4, 20, 0.0, 0.2, 0.9))
    table, notes = choices(threshold_cells([*two, *group((3, 1, 0, 0, 1), seed=1)]), 0.01)
    assert len(table) == 1
    assert notes == ["1 cells with the only threshold of their group are left out."]


def test_nothing_to_choose_from_is_an_error_that_says_what_to_vary() -> None:
    one = [*group((3, 1, 0, 0, 1)), *group((4, 1, 0, 0, 1), seed=1)]
    with pytest.raises(
        UserError, match=r"no two of 2 finished cells differ only .* vary defense\.threshold"
    ):
        choices(threshold_cells(one), 0.01)


# One threshold for a sweep ---------------------------------------------------------------------


def recommendation(
    records: list[dict[str, Any]],
) -> tuple[dict[str, Any], list[str], ThresholdCells]:
    cells = threshold_cells(records)
    table, notes = recommended(cells, choices(cells, 0.01)[0])
    (row,) = table.to_dict("records")
    return {str(k): v for k, v in row.items()}, notes, cells


def deploys(threshold: float, seed: int, **settings: Any) -> list[dict[str, Any]]:
    """A group of thresholds 3, 4, 5 and 8 of which `threshold` is what a defender deploys."""
    # Lower ones are above the budget. ASR 0.03, 0.04, ...; CACC is the tuned one minus 0.003, ...
    return group(
        *[
            (t, int(100 - 10 * t), 0.0 if t >= threshold else 0.5, t / 100, 0.9 - t / 1000)
            for t in (3.0, 4.0, 5.0, 8.0)
        ],
        seed=seed,
        **settings,
    )


def test_the_recommendation_is_the_median_of_what_is_deployed() -> None:
    records = [r for seed, t in enumerate((3, 4, 4, 5, 8)) for r in deploys(t, seed)]
    row, notes, _ = recommendation(records)
    assert (row["rule"], row["threshold"], row["groups"], row["measured"]) == ("contrast", 4, 5, 5)
    assert row["asr"] == pytest.approx(0.04)
    assert row["cacc_loss"] == pytest.approx(0.004)
    assert row["gap"] == pytest.approx(0.01)  # the oracle of every group is 3
    # 95 % of the medians of five draws from 3, 4, 4, 5, 8: a median is 3 where three or more of
    # five draws are the 3, chance 1 - (0.8^5 + 5 * 0.2 * 0.8^4 + 10 * 0.04 * 0.8^3) = 5.8 %,
    # and 8 as often: both are beyond 2.5 %.
    assert (row["low"], row["high"]) == (3, 8)
    assert notes == []


def test_a_median_between_two_becomes_the_next_trained_one_and_the_milder_of_two() -> None:
    # Median 4.5, as near to 4 as to 5.
    row, _, _ = recommendation([*deploys(4, 0), *deploys(5, 1)])
    assert row["threshold"] == 5
    assert (row["low"], row["high"]) == (4, 5)


def test_shares_are_averaged_by_ratio() -> None:
    # 0.001 and 0.1 are deployed: by ratio the middle is 0.01, by difference 0.05.
    def shares(best: float, seed: int) -> list[dict[str, Any]]:
        return group(
            *[
                (alpha, int(1000 * alpha), 0.0 if alpha <= best else 0.5, 0.1, 0.9)
                for alpha in (0.001, 0.01, 0.05, 0.1)
            ],
            seed=seed,
            rule="top_fraction",
        )

    row, _, _ = recommendation([*shares(0.001, 0), *shares(0.1, 1)])
    assert row["threshold"] == 0.01
    assert (row["low"], row["high"]) == (pytest.approx(0.001), pytest.approx(0.1))


def test_a_single_group_has_no_interval() -> None:
    row, _, _ = recommendation(deploys(4, 0))
    assert (row["threshold"], row["groups"]) == (4, 1)
    assert math.isnan(row["low"])
    assert math.isnan(row["high"])


def test_failed_attacks_and_unpoisoned_groups_are_left_out_and_counted() -> None:
    failed = deploys(8, 1)
    for entry in failed:
        entry["metrics"]["undefended_asr"] = 0.49
    records = [*deploys(4, 0), *failed, *deploys(8, 2, rate=0.0), *deploys(8, 3, rate=0.0)]
    row, notes, _ = recommendation(records)
    assert (row["threshold"], row["groups"]) == (4, 1)
    assert notes == [
        "1 groups whose attack fails undefended (ASR below 50%, or hardly above FTR) are left out "
        "of the recommendation.",
        "2 groups without poison are left out of the recommendation.",
    ]


def test_groups_that_did_not_train_the_recommended_threshold_are_not_measured_at_it() -> None:
    other = group((3.0, 9, 0.5, 0.9, 0.9), (4.5, 5, 0.0, 0.9, 0.9), seed=2)
    row, _, _ = recommendation([*deploys(4, 0), *deploys(4, 1), *other])
    assert (row["threshold"], row["groups"], row["measured"]) == (4, 3, 2)
    assert row["asr"] == pytest.approx(0.04)


def test_the_interval_is_the_same_every_time() -> None:
    records = [r for seed, t in enumerate((3, 4, 4, 5, 8, 3)) for r in deploys(t, seed)]
    assert recommendation(records)[0] == recommendation(records)[0]


def test_controls_and_cuts_of_nothing_are_no_candidates() -> None:
    # Of each the deepest threshold would be deployed: it costs nothing, and it defends nothing.
    others = [
        *deploys(3, 0, name="random_cut"),
        *deploys(3, 1, name="frequency_cut"),
        *deploys(3, 2, cut="none"),
    ]
    records = [*deploys(5, 0), *deploys(5, 1), *others]
    cells = threshold_cells(records, acting=True)
    table, notes = choices(cells, 0.01)
    assert table["deployable"].tolist() == [5, 5]
    assert notes == ["8 cells of controls are left out.", "4 cells that cut nothing are left out."]
    assert recommended(cells, table)[0]["groups"].tolist() == [2]
    # A curve is of scores, which they have all the same.
    assert len(threshold_cells(records).table) == len(records)


# The command -----------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    shared = {"undefended_asr": 1.0, "tuned_cacc": 0.9}
    cells = [
        (config(threshold=t, seed=seed), {**shared, "asr": t / 10, "cacc": 0.9, "cut_cost": cost})
        for seed in (0, 1)
        for t, cost in ((3.0, 0.015), (4.0, 0.0))
    ]
    shelve(tmp_path / "runs", cells)
    return tmp_path / "runs"


def test_the_command_prints_both_choices(run_cli: Callable[..., Any], runs: Path) -> None:
    done = run_cli("choose", "made", "-o", runs, "-f", "json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    # 3 costs a point and a half; in hindsight its ASR of 0.3 would have been had for nothing.
    assert [(r["seed"], r["deployable"], r["oracle"]) for r in rows] == [(0, 4, 3), (1, 4, 3)]
    assert rows[0]["gap"] == pytest.approx(0.1)
    more = run_cli("choose", "made", "-o", runs, "-f", "json", "--cacc-loss", 0.02)
    assert [row["deployable"] for row in json.loads(more.out)] == [3, 3]


@pytest.mark.parametrize("style", ["table", "csv", "markdown", "latex"])
@pytest.mark.parametrize("recommend", [(), ("--recommend",)])
def test_the_command_prints_in_every_format(
    run_cli: Callable[..., Any], runs: Path, style: str, recommend: tuple[str, ...]
) -> None:
    done = run_cli("choose", "made", "-o", runs, "-f", style, *recommend)
    assert done.code == 0, done.err
    assert "contrast" in done.out
    # ASR 0.4 at threshold 4: a fraction for programs, percent for people.
    assert ("0.4" if style == "csv" else "40.0") in done.out


def test_a_loss_that_is_no_fraction_is_refused(run_cli: Callable[..., Any], runs: Path) -> None:
    done = run_cli("choose", "made", "-o", runs, "--cacc-loss", 2)
    assert done.code == 2
    assert "--cacc-loss must be in [0, 1], got 2.0" in done.err


def test_a_sweep_whose_attacks_all_fail_recommends_nothing(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    cells = [(config(threshold=t), {"undefended_asr": 0.1}) for t in (3.0, 4.0)]
    shelve(tmp_path / "runs", cells)
    done = run_cli("choose", "made", "-o", tmp_path / "runs", "--recommend")
    assert done.code == 2
    assert "nothing to recommend a threshold from: 1 groups whose attack fails" in done.err
    assert "Attack at a higher rate, or train longer." in done.err
