"""Detection at every threshold, from saved scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from store_fixtures import Stored
from synthetic import config, logged, saved, shelve

from btu.drawing import draw
from btu.errors import UserError
from btu.rules.base import RULES
from orchestrator.report.curve_figure import check_path, curve_panels, curve_plot
from orchestrator.report.curves import (
    LOGGED,
    MEASURES,
    Saved,
    curve,
    curve_means,
    read_saved,
    spanning,
    sweep_curves,
)
from orchestrator.report.table import render
from orchestrator.report.thresholds import threshold_cells
from orchestrator.results.source import StoreSource

NAN = float("nan")
CONTRAST, SHARE = RULES.load("contrast"), RULES.load("top_fraction")

# Ten tokens; 0 and 3 belong to the trigger, and so does one that was never scored.
TOKENS = pd.DataFrame(
    {
        "score": [9.0, 7.0, 5.0, 5.0, 1.0, 0.0, NAN, -1.0, -2.0, -3.0],
        "trigger": [i in (0, 3) for i in range(10)],
    }
)
# Six rows by their highest token; the first three are poisoned, the last has no token.
ROWS = pd.DataFrame(
    {"top": [9.0, 9.0, 5.0, 7.0, 5.0, -np.inf], "poisoned": [True] * 3 + [False] * 3}
)
MADE = Saved(TOKENS, ROWS)


def made_curve(threshold: float, triggers: int | None = 3) -> dict[Any, Any]:
    (row,) = curve(MADE, [threshold], CONTRAST, triggers).to_dict("records")
    return row


# One curve -------------------------------------------------------------------------------------


def test_a_row_of_a_curve_is_as_counted_by_hand() -> None:
    # >= 5: tokens 9, 7, 5, 5, of which 2 are the trigger's: precision 2/4, recall 2/3,
    # F1 = 2 * 2 / (4 + 3). Rows 9, 9, 5 of the poisoned and 7, 5 of the others: 3/5, 3/3, 6/8.
    assert made_curve(5.0) == {
        "threshold": 5.0,
        "flagged": 4,
        "precision": 0.5,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7),
        "sample_precision": 0.6,
        "sample_recall": 1.0,
        "sample_f1": 0.75,
    }


def test_where_nothing_is_flagged_precision_is_undefined_and_recall_zero() -> None:
    row = made_curve(9.5)
    assert row["flagged"] == 0
    assert math.isnan(row["precision"])
    assert math.isnan(row["sample_precision"])
    assert (row["recall"], row["f1"], row["sample_recall"], row["sample_f1"]) == (0, 0, 0, 0)


def test_a_trigger_without_fixed_tokens_leaves_the_rows_curve() -> None:
    row = made_curve(5.0, triggers=None)
    assert all(math.isnan(row[name]) for name in ("precision", "recall", "f1"))
    assert (row["flagged"], row["sample_precision"]) == (4, 0.6)


def test_without_poison_every_flag_is_wrong_and_there_is_nothing_to_recall() -> None:
    clean = Saved(TOKENS.assign(trigger=False), ROWS.assign(poisoned=False))
    (row,) = curve(clean, [5.0], CONTRAST, 0).to_dict("records")
    assert (row["flagged"], row["precision"], row["sample_precision"]) == (4, 0.0, 0.0)
    assert all(
        math.isnan(row[f"{of}{name}"]) for of in ("", "sample_") for name in ("recall", "f1")
    )


def test_a_share_flags_as_many_tokens_as_it_says() -> None:
    # 5 candidates of a vocabulary of 10: alpha 0.3 is k = 3, and 0.1 * 3 in floating point as well.
    tokens = pd.DataFrame(
        {"score": [-0.1, -0.2, -0.3, -0.4, -0.5], "trigger": [True] + [False] * 4}
    )
    rows = pd.DataFrame({"top": [-0.1, -0.3], "poisoned": [True, False]})
    table = curve(Saved(tokens, rows), [0.1, 0.3, 0.1 * 3, 0.39, 0.4], SHARE, 1)
    assert table["flagged"].tolist() == [1, 3, 3, 3, 4]
    assert table["precision"].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 1 / 4])


# Default thresholds ----------------------------------------------------------------------------


def test_default_thresholds_reach_from_a_hundredth_flagged_to_none() -> None:
    # 1000 scores 0.01 ... 10: a hundredth is 10 tokens, 9.91 and above; a fiftieth of the
    # range above the last score, 10 + 0.02 * 0.09, none is flagged.
    scores = np.arange(1, 1001) / 100
    found = spanning(CONTRAST, [scores], [], 20)
    assert len(found) == 20
    assert (scores >= found[0]).sum() == 10
    assert (scores >= found[-2]).sum() >= 1
    assert (scores >= found[-1]).sum() == 0
    assert found[-1] == pytest.approx(10.0018)
    assert (np.diff(found) > 0).all()


def test_default_shares_begin_at_one_token() -> None:
    # Ranks 1 to 1000 of a vocabulary of 3000; a hundredth of the candidates is 10 tokens.
    scores = -np.arange(1, 1001) / 3000
    found = spanning(SHARE, [scores], [], 20)
    flags = [int((scores >= SHARE.bar(alpha)).sum()) for alpha in found]
    assert (flags[0], flags[-1]) == (1, 10)
    ratios = found[1:] / found[:-1]
    assert ratios.tolist() == pytest.approx([10 ** (1 / 19)] * 19)


def test_default_thresholds_hold_the_trained_ones_and_reach_them() -> None:
    scores = np.arange(1, 1001) / 100
    found = spanning(CONTRAST, [scores], {2.5, 20.0}, 20)
    assert {2.5, 20.0} <= set(found)
    assert (found.min(), found.max()) == (2.5, pytest.approx(20 + 0.02 * 17.5))


@pytest.mark.parametrize("rule", list(RULES))
def test_default_thresholds_are_ones_that_a_config_takes(rule: str) -> None:
    # The last: nothing stands out anywhere, so that only the rule's own default is left.
    for scores in (np.array([0.3, 0.5, 1.4, 30.0]), -np.arange(1, 50) / 100, np.zeros(9)):
        for threshold in spanning(RULES.load(rule), [scores], [], 10):
            RULES.load(rule).check(float(threshold))


# A sweep ---------------------------------------------------------------------------------------


def test_a_sweep_is_read_off_as_a_naive_implementation_does(tmp_path: Path) -> None:
    # 2 attacks x 2 rates x 3 seeds x 5 thresholds = 60 cells of 6,000 tokens.
    settings = [
        config(attack, rate, seed, threshold=threshold)
        for attack, rate, seed, threshold in product(
            ("badnets", "style"), (0.1, 0.0), (0, 1, 2), (3.0, 4.0, 5.0, 6.0, 9.0)
        )
    ]
    results = shelve(
        tmp_path, [(cell, {"asr": n / 100, "cacc": 0.9}) for n, cell in enumerate(settings)],
        tokens=6000,
    )  # fmt: skip
    cells = threshold_cells(results.records())
    table, notes = sweep_curves(cells, read_saved(StoreSource(results)), 50)
    assert notes == [
        "60 cells, 12 curves: cells that differ only in the threshold have the same scores."
    ]
    # 50, of which the lowest is the trained 3.0, and the other four.
    assert len(table) == 12 * (50 + 4)
    made = {
        where: saved(*where, "contrast", tokens=6000)
        for where in product(("badnets", "style"), (0.1, 0.0), (0, 1, 2))
    }
    for row in table.to_dict("records"):
        frames = made[row["attack"], row["poison_rate"], row["seed"]]
        expected = logged(*frames, "contrast", row["threshold"])
        for measure, name in {**LOGGED, "auprc": "detection_auprc"}.items():
            assert row[measure] == pytest.approx(expected[name], nan_ok=True), (row, name)
    at_trained = table[table.trained]
    assert at_trained["asr"].sort_values().tolist() == [n / 100 for n in range(60)]
    assert table[~table.trained][["asr", "cacc"]].isna().all(axis=None)
    assert table["exact"].all()


def sweep_of(runs: Path, *settings: dict[str, Any], **metrics: float) -> pd.DataFrame:
    results = shelve(runs, [(cell, metrics) for cell in settings])
    return sweep_curves(threshold_cells(results.records()), read_saved(StoreSource(results)), 5)[0]


def test_scores_of_cells_that_differ_in_the_threshold_are_read_once(tmp_path: Path) -> None:
    results = shelve(tmp_path, [(config(threshold=t), {}) for t in (3.0, 4.0, 5.0)])
    read, asked = read_saved(StoreSource(results)), []

    def counting(key: str) -> Saved | None:
        asked.append(key)
        return read(key)

    sweep_curves(threshold_cells(results.records()), counting, 5)
    assert len(asked) == 1


def test_a_cell_whose_scores_are_damaged_leaves_its_curve_to_another(tmp_path: Path) -> None:
    results = shelve(tmp_path, [(config(threshold=t), {}) for t in (3.0, 4.0)])
    records = list(results.records())
    (results.store.fetch(records[0]["key"]) / "tokens.parquet").write_bytes(b"")
    table, _ = sweep_curves(threshold_cells(records), read_saved(StoreSource(results)), 5)
    assert results.store.committed() == {records[1]["key"]}  # it was set aside
    assert table["trained"].sum() == 2


def test_round_two_makes_a_curve_approximate(tmp_path: Path) -> None:
    table = sweep_of(
        tmp_path,
        config(rule="top_fraction", threshold=0.002),
        config(rule="top_fraction", threshold=0.002, rounds=[1, 3]),
        config(),
    )
    exact = table.groupby(["rule", "defense.rounds"])["exact"].all().to_dict()
    assert exact == {
        ("contrast", "3"): True, ("top_fraction", "1 2 3"): False, ("top_fraction", "1 3"): True,
    }  # fmt: skip


def test_one_alpha_for_all_rounds_is_a_threshold_and_several_are_none() -> None:
    def cells(alpha: Any) -> Any:
        made = config(rule="top_fraction", threshold=alpha)
        return threshold_cells([{"key": "a", "varied": {}, "config": made, "metrics": {}}])

    assert cells([0.01, 0.01, 0.01]).table["threshold"].tolist() == [0.01]
    several = cells([0.01, 0.01, 0.02])
    assert several.table.empty
    assert several.left_out == {"with a threshold for each round": 1}


def test_a_cell_that_logged_other_flags_than_its_scores_give_is_told(tmp_path: Path) -> None:
    results = shelve(
        tmp_path, [(config(threshold=3.0), {}), (config(threshold=4.0), {"flagged": 599})]
    )
    _, notes = sweep_curves(threshold_cells(results.records()), read_saved(StoreSource(results)), 5)
    assert notes[-1].startswith("1 cells logged other detection metrics than the scores")


@pytest.mark.parametrize(("relabeled", "told"), [(9, False), (0, True)])
def test_relabelled_rows_are_no_difference(tmp_path: Path, relabeled: int, told: bool) -> None:
    # Such a cell logs the rows of its tokens and those that the second stage took.
    logged = {"rows_relabeled": relabeled, "sample_precision": 0.123}
    results = shelve(tmp_path, [(config(threshold=3.0), logged)])
    _, notes = sweep_curves(threshold_cells(results.records()), read_saved(StoreSource(results)), 5)
    assert notes[-1].startswith("1 cells logged other") is told


def test_relabelled_rows_excuse_no_other_tokens(tmp_path: Path) -> None:
    results = shelve(tmp_path, [(config(threshold=3.0), {"rows_relabeled": 9, "flagged": 599})])
    _, notes = sweep_curves(threshold_cells(results.records()), read_saved(StoreSource(results)), 5)
    assert notes[-1].startswith("1 cells logged other")


def test_a_curve_counts_flagged_tokens_whether_they_are_cut_or_not(tmp_path: Path) -> None:
    settings = [config(threshold=t, max_cut_cost=0.02) for t in (3.0, 4.0)]
    results = shelve(tmp_path, [(cell, {"vetoed": 2}) for cell in settings])
    records = list(results.records())
    table, notes = sweep_curves(threshold_cells(records), read_saved(StoreSource(results)), 5)
    flagged = [record["metrics"]["flagged"] for record in records]
    assert min(flagged) > 2
    assert table[table.trained]["flagged"].tolist() == flagged
    assert notes == [
        "2 cells, 1 curves: cells that differ only in the threshold have the same scores."
    ]


def test_rates_are_thresholds_of_one_curve(tmp_path: Path) -> None:
    # 15,000 * P(a normal deviate exceeds 4.5041 or 4.8347) = 0.05 or 0.01.
    rates = {0.05: 4.5041, 0.01: 4.8347}
    settings = [config(threshold=t, fdr=rate) for rate, t in rates.items()]
    results = shelve(tmp_path, [(cell, {}) for cell in settings])
    records = [
        {**record, "varied": {"defense.fdr": record["config"]["defense"]["fdr"]}}
        for record in results.records()
    ]
    table, _ = sweep_curves(threshold_cells(records), read_saved(StoreSource(results)), 5)
    assert table[table.trained]["threshold"].tolist() == [4.5041, 4.8347]
    assert "defense.fdr" not in table


def test_no_token_scores_is_an_error_that_says_what_gives_them(tmp_path: Path) -> None:
    results = shelve(tmp_path, [(config(), {})])
    with pytest.raises(
        UserError, match=r"none of 1 finished cells has token scores; curves need .*defense\.rule"
    ):
        sweep_curves(threshold_cells(results.records()), lambda key: None, 5)


def test_means_are_over_seeds_and_asr_over_those_that_trained(tmp_path: Path) -> None:
    settings = [config(seed=0), config(seed=1), config(seed=0, threshold=6.0)]
    results = shelve(tmp_path, [(s, {"asr": n / 10}) for n, s in enumerate(settings)])
    table, _ = sweep_curves(threshold_cells(results.records()), read_saved(StoreSource(results)), 5)
    rows = curve_means(table)
    # 5 thresholds, of which the lowest is the trained 4.5, and 6.0
    assert (len(rows), len(table)) == (6, 12)
    one = rows[rows.threshold == 4.5].iloc[0]
    both = table[table.threshold == 4.5]
    assert one["recall"] == pytest.approx(both["recall"].mean())
    assert (one["seeds"], one["trained"], one["asr"]) == (2, True, pytest.approx(0.05))
    assert rows[rows.threshold == 6.0].iloc[0]["asr"] == pytest.approx(0.2)  # seed 0 alone
    assert rows["trained"].sum() == 2
    assert "± " in render(rows, "markdown", MEASURES)


# The figure ------------------------------------------------------------------------------------


def test_a_figure_has_a_panel_for_each_attack_and_rate(tmp_path: Path) -> None:
    table = sweep_of(
        tmp_path,
        *[config(a, r, s) for a in ("badnets", "style") for r in (0.0, 0.1) for s in (0, 1)],
        asr=0.2,
        cacc=0.9,
    )
    panels = draw(curve_panels(table)).axes
    assert [axes.get_title() for axes in panels] == [
        "badnets, rate 0", "badnets, rate 0.1", "style, rate 0", "style, rate 0.1",
    ]  # fmt: skip
    lines = {line.get_label(): line for line in panels[1].lines}
    mean = table[(table.attack == "badnets") & (table.poison_rate == 0.1)]
    recall = mean.groupby("threshold")["recall"].mean()
    assert lines["recall"].get_xdata().tolist() == recall.index.tolist()
    assert lines["recall"].get_ydata().tolist() == pytest.approx(recall.tolist())
    # Without fixed trigger tokens there are the rows.
    assert "recall of rows" in {line.get_label() for line in panels[3].lines}
    ((x, y),) = lines["ASR (trained)"].get_xydata()
    assert (x, y) == (4.5, pytest.approx(0.2))


def test_a_figure_of_several_rules_names_them_and_where_they_are_approximate(
    tmp_path: Path,
) -> None:
    table = sweep_of(tmp_path, config(), config(rule="top_fraction", threshold=0.01))
    first, second = draw(curve_panels(table)).axes
    # The rounds differ as well, but go with the rule.
    assert first.get_title() == "badnets, rate 0.1\nrule contrast"
    assert second.get_title() == "badnets, rate 0.1\nrule top_fraction"
    assert second.get_xlabel() == "top_fraction threshold (approximate)"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_is_written_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    table = sweep_of(tmp_path / "runs", config(), asr=0.2, cacc=0.9)
    path = tmp_path / f"curves.{suffix}"
    curve_plot(table, path)
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(magic[suffix])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("curves.gif", r"must end in \.png, \.svg, \.pdf"),
        ("gone/curves.png", "gone does not exist"),
        ("folder.png", r"folder\.png is a folder; name a file in it"),
    ],
)
def test_a_figure_that_cannot_be_written_is_refused_first(
    path: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        check_path(tmp_path / path)


def test_a_figure_in_a_folder_without_permission_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_path(tmp_path / "curves.png")
    # Root may write anywhere, so the answer is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"curves\.png: the folder \S+ must be writable"):
        check_path(tmp_path / "curves.png")


def test_a_figure_that_the_disk_does_not_take_is_told(tmp_path: Path) -> None:
    table = sweep_of(tmp_path / "runs", config(), asr=0.2, cacc=0.9)
    # As if made since it was checked.
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"--plot \S+ cannot be written \(Is a directory\)"):
        curve_plot(table, tmp_path / "curves.png")


# The command -----------------------------------------------------------------------------------


def test_the_command_gives_the_table_alone_and_notes_beside_it(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    shelve(tmp_path / "runs", [(config(threshold=t), {"asr": t / 10}) for t in (3.0, 4.0)])
    figure = tmp_path / "curves.svg"
    done = run_cli(
        "curves", "made", "-o", tmp_path / "runs", "-f", "json", "--thresholds", 7, "--plot", figure
    )
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert list(rows[0]) == [
        "attack", "poison_rate", "defense", "rule", "seed", "threshold", "trained", "exact",
        *MEASURES,
    ]  # fmt: skip
    assert {row["threshold"]: row["asr"] for row in rows if row["trained"]} == {3.0: 0.3, 4.0: 0.4}
    assert "2 cells, 1 curves" in done.err
    assert f"Plot: {figure}" in done.err
    assert figure.is_file()


@pytest.mark.parametrize("style", ["table", "csv", "markdown", "latex"])
def test_the_command_prints_in_every_format(
    run_cli: Callable[..., Any], tmp_path: Path, style: str
) -> None:
    shelve(tmp_path / "runs", [(config(), {})])
    done = run_cli("curves", "made", "-o", tmp_path / "runs", "-f", style, "--mean")
    assert done.code == 0, done.err
    assert "badnets" in done.out


def test_a_trained_cell_lies_on_its_own_curve(stored: Stored) -> None:
    # From a trial, not from a generator: alpha 0.01 with round 2.
    cells = threshold_cells(stored.results.records())
    table, notes = sweep_curves(cells, read_saved(StoreSource(stored.results)), 5)
    (row,) = table[table.trained].to_dict("records")
    metrics = stored.record["metrics"]
    assert (row["threshold"], row["exact"]) == (0.01, False)
    assert (row["asr"], row["auprc"]) == (metrics["asr"], metrics["detection_auprc"])
    assert any("approximate, round 2 depends on the threshold" in note for note in notes)


def test_an_exact_trained_cell_has_its_own_metrics_on_the_curve(
    cell: dict[str, Any], try_cell: Callable[..., Any]
) -> None:
    made = {**cell, "defense": {"name": "btu", "rule": "mad", "threshold": 1.0}}
    tried = try_cell(made)
    record = {"key": "a", "varied": {}, **tried.result}
    frames = Saved(tried.tokens, pd.read_parquet(tried.folder / "rows.parquet"))
    table, notes = sweep_curves(threshold_cells([record]), lambda key: frames, 5)
    (row,) = table[table.trained].to_dict("records")
    assert row["flagged"] > 0
    for measure, name in {**LOGGED, "auprc": "detection_auprc"}.items():
        assert row[measure] == pytest.approx(tried.metrics[name], nan_ok=True)
    assert len(notes) == 1  # nothing differs


def test_an_unknown_sweep_and_one_without_cells_are_told(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    shelve(tmp_path / "runs", [], name="empty")
    for command in ("curves", "choose"):
        done = run_cli(command, "emty", "-o", tmp_path / "runs")
        assert done.code == 2
        assert "did you mean 'empty'?" in done.err
        done = run_cli(command, "empty", "-o", tmp_path / "runs")
        assert "sweep 'empty' has no finished cell yet; launch it first." in done.err
