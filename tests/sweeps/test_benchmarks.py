"""The benchmarks: each fails where its claim is false, and runs in miniature with all checks."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
# What the others share; no benchmarks of their own.
HELPERS = {"checks", "figures", "generated", "generated_tables", "s3_costs"}
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in HELPERS)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A function from a name to the module of that name in benchmarks/."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in {*NAMES, *HELPERS} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def judge(load: Callable[[str], ModuleType]) -> Any:
    return load("figures").Judge("made")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_explains_itself(
    name: str,
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert module.__doc__ is not None
    # argparse breaks lines where it likes.
    told = " ".join(capsys.readouterr().out.split())
    assert module.__doc__.splitlines()[0] in told
    assert "--json FILE" in told
    assert "--no-bars" in told


# Judging ---------------------------------------------------------------------------------------


def test_a_missed_bar_is_exit_code_1(judge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    judge.structure("cells", "3", True)
    judge.fast("under 5 s", "6 s", False)
    with pytest.raises(SystemExit) as end:
        judge.end()
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert said == "bar: cells: 3, met\nbar: under 5 s: 6 s, MISSED\n"


def test_without_bars_speed_is_not_judged_and_structure_is(
    load: Callable[[str], ModuleType],
) -> None:
    for kind, code in (("fast", 0), ("structure", 1)):
        judge = load("figures").Judge("made", speed=False)
        getattr(judge, kind)("under 5", "6", False)
        with pytest.raises(SystemExit) as end:
            judge.end()
        assert end.value.code == code, kind


def test_figures_name_commit_machine_date_and_command_but_no_host_and_no_path(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures" / "made.json"
    words = ["--data", f"{tmp_path}/sst2", f"output={tmp_path}/runs", "--rows", "8"]
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "made.py"), *words, "--json", str(file)])
    judge = load("figures").Judge("made", json=file)
    judge.figures["cells"] = 3
    judge.structure("cells", "3", True)
    with pytest.raises(SystemExit):
        judge.end()
    text = file.read_text()
    written = json.loads(text)
    assert written["command"] == (
        "python benchmarks/made.py --data FOLDER/sst2 output=FOLDER/runs --rows 8"
    )
    assert written["figures"] == {"cells": 3}
    assert written["bars"] == [{"bar": "cells", "found": "3", "verdict": "met"}]
    assert written["commit"].startswith("0.")
    assert len(written["date"]) == len("2026-01-31")
    machine = written["machine"]
    assert machine["cores"] >= 1
    assert machine["amx"] in (True, False)
    assert {"cpu", "memory_gb", "python", "torch", "transformers", "ray", "mlflow"} <= set(machine)
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/data/sst2", "FOLDER/sst2"),
        ("data.path=../shared/sst2/", "data.path=FOLDER/sst2"),
        ("~/runs", "FOLDER/runs"),
        ("sweeps/quickstart.yaml", "sweeps/quickstart.yaml"),
        ("grid.attack.name=[badnets,addsent]", "grid.attack.name=[badnets,addsent]"),
    ],
)
def test_a_path_of_the_machine_is_not_in_a_command(
    load: Callable[[str], ModuleType], word: str, shown: str
) -> None:
    command = load("figures").command(["made.py", word, "--json=x.json"])
    assert command == f"python benchmarks/made.py {shown}"


# Runs and computations ---------------------------------------------------------------------------


def test_every_cell_has_one_finished_run(load: Callable[[str], ModuleType]) -> None:
    checks = load("checks")
    whole = [checks.Run("a", "FINISHED"), checks.Run("b", "FINISHED")]
    assert checks.wrong_runs(["a", "b"], whole) == []
    assert checks.wrong_runs(["a", "b"], whole[:1]) == ["cell b has no run"]
    assert checks.wrong_runs(["a", "b"], []) == ["cell a has no run", "cell b has no run"]
    twice = [*whole, checks.Run("a", "FINISHED")]
    assert checks.wrong_runs(["a", "b"], twice) == ["cell a has the runs FINISHED, FINISHED"]
    running = [whole[0], checks.Run("b", "RUNNING")]
    assert checks.wrong_runs(["a", "b"], running) == ["cell b has the runs RUNNING"]
    assert checks.wrong_runs(["a"], whole) == ["a run is of b, which is no cell of the sweep"]


def begun(*computed: tuple[str, float, str]) -> list[dict[str, Any]]:
    """A journal of computations: key, time, launch; with a driver's event, which does not count."""
    events = [{"event": "compute", "key": k, "time": t, "launch": one} for k, t, one in computed]
    return [{"event": "start", "key": "a", "time": 0.0, "launch": "L1"}, *events]


def test_a_stage_is_computed_once_and_again_for_each_kill_that_cut_it_short(
    load: Callable[[str], ModuleType],
) -> None:
    checks = load("checks")
    Kill, wrong = checks.Kill, checks.wrong_computations  # noqa: N806
    again = ["a was computed again, and no kill had cut it short"]
    once = begun(("a", 1.0, "L1"))
    assert wrong(once, {"a": 2.0}, []) == []
    twice = begun(("a", 1.0, "L1"), ("a", 5.0, "L1"))
    worker = Kill(3.0, computing=frozenset("a"))
    assert wrong(twice, {"a": 6.0}, [worker]) == []
    assert wrong(twice, {"a": 6.0}, []) == again
    # A kill of a worker that computed something else; one that came later.
    assert wrong(twice, {"a": 6.0}, [Kill(3.0, computing=frozenset("b"))]) == again
    assert wrong(twice, {"a": 7.0}, [Kill(5.5, computing=frozenset("a"))]) == again
    # One kill explains one computation, two explain two.
    thrice = begun(("a", 1.0, "L1"), ("a", 5.0, "L1"), ("a", 6.0, "L1"))
    assert wrong(thrice, {"a": 7.0}, [worker]) == again
    assert wrong(thrice, {"a": 7.0}, [worker, Kill(5.5, computing=frozenset("a"))]) == []


def test_a_killed_driver_cuts_short_what_its_launch_had_not_committed(
    load: Callable[[str], ModuleType],
) -> None:
    checks = load("checks")
    journal = begun(("a", 1.0, "L1"), ("b", 1.0, "L1"), ("a", 5.0, "L2"), ("b", 5.0, "L2"))
    committed = {"a": 6.0, "b": 6.0}
    wrong = checks.wrong_computations
    assert wrong(journal, committed, [checks.Kill(3.0, launch="L1")]) == []
    # b had its result when the driver was killed, and lost it: its marker is of the second time.
    kept = checks.Kill(3.0, launch="L1", committed=frozenset("b"))
    assert wrong(journal, committed, [kept]) == [
        "b was computed again, and no kill had cut it short"
    ]
    other = checks.Kill(3.0, launch="L0")
    assert len(wrong(journal, committed, [other])) == 2


def test_nothing_is_computed_after_its_result_was_committed(
    load: Callable[[str], ModuleType],
) -> None:
    checks = load("checks")
    journal = begun(("a", 1.0, "L1"), ("a", 5.0, "L2"))
    kill = checks.Kill(3.0, launch="L1")
    assert checks.wrong_computations(journal, {"a": 4.0}, [kill]) == [
        "a was computed again after its result was committed"
    ]
    assert checks.wrong_computations(begun(("a", 1.0, "L1")), {}, []) == [
        "a was computed, and has no result"
    ]


def test_problems_are_told_in_part(load: Callable[[str], ModuleType]) -> None:
    told = load("checks").told
    assert told([]) == "none"
    assert told(["x", "y"]) == "x; y"
    assert told(list("abcdefg")) == "a; b; c; d; e and 2 more"


# Each benchmark's own bars -----------------------------------------------------------------------


def test_overhead_fails_where_a_run_is_missing_or_a_cell_computed_twice(
    load: Callable[[str], ModuleType],
) -> None:
    overhead, judge_of = load("overhead"), load("figures").Judge
    assert overhead.wrong_counts(["a", "b"], {"a": 1, "b": 1}) == []
    assert overhead.wrong_counts(["a", "b"], {"a": 2}) == [
        "a was computed 2 times",
        "b was computed 0 times",
    ]
    good: dict[str, Any] = {"launch": 2.0, "relaunch": 0.1, "first": 0.1, "last": 0.1, "wrong": []}
    judge = judge_of("overhead")
    overhead.report(judge, 10, 20, {10: good, 20: {**good, "launch": 4.0}})
    assert judge.missed == []
    judge = judge_of("overhead")
    overhead.report(judge, 10, 20, {10: good, 20: {**good, "wrong": ["cell a has no run"]}})
    assert judge.missed == ["each of 20 cells was computed once and has one FINISHED run"]
    slow = {**good, "launch": 20.0, "relaunch": 11.0, "last": 0.2}
    judge = judge_of("overhead")
    overhead.report(judge, 10, 20, {10: good, 20: slow})
    assert len(judge.missed) == 4


def test_overhead_fails_where_chains_save_nothing(load: Callable[[str], ModuleType]) -> None:
    overhead, judge_of = load("overhead"), load("figures").Judge
    apart = {"driver": 4.0, "trials": 30, "stages": 30, "wrong": []}
    chains = {"driver": 2.0, "trials": 12, "stages": 30, "wrong": []}

    def missed(**changes: Any) -> list[str]:
        judge = judge_of("overhead")
        overhead.report_chains(judge, 10, {"stages": apart, "chains": chains | changes})
        return list(judge.missed)

    assert missed() == []
    assert missed(trials=30) == ["chains make fewer trials"]
    assert missed(driver=4.1) == ["chains cost the driver less"]
    assert missed(wrong=["a has no run"]) == [
        "each stage of 10 real cells was computed once, and each cell has one FINISHED run"
    ]


def test_a_tenth_of_few_cells_is_one(load: Callable[[str], ModuleType]) -> None:
    tenths = load("overhead").tenths
    assert tenths([1.0, 1.5, 3.5]) == {"first": 0.5, "last": 2.0}
    # Two cells each: (2 - 0) / 2 and (38 - 34) / 2.
    assert tenths([float(second) for second in range(0, 40, 2)]) == {"first": 2.0, "last": 2.0}


PLANNED = "Cells\n{}: 0 done, {} to run, 0 failed earlier; {} refused, 0 duplicates folded.\n"


@pytest.mark.parametrize(
    ("said", "took", "missed"),
    [
        (PLANNED.format("40 cells", 40, 0), [1.0, 2.0, 9.0], 0),
        (PLANNED.format("39 cells", 39, 0), [1.0, 2.0, 9.0], 1),
        (PLANNED.format("40 cells", 40, 3), [1.0, 2.0, 9.0], 1),
        (PLANNED.format("40 cells", 40, 0), [1.0, 6.0, 9.0], 1),
    ],
)
def test_planning_fails_where_cells_are_missing_or_it_takes_long(
    load: Callable[[str], ModuleType], judge: Any, said: str, took: list[float], missed: int
) -> None:
    load("planning").judge_plan(judge, said, 40, took)
    assert len(judge.missed) == missed


def test_object_store_fails_where_stages_make_many_requests_or_wait_long(
    load: Callable[[str], ModuleType],
) -> None:
    def found(ms: int, requests: float, seconds: float, **wrong: list[str]) -> dict[str, Any]:
        return {
            "ms": ms,
            "stage": {"requests": requests, "seconds": seconds, "wrong": wrong.get("stage", [])},
            "report": {"seconds": 2.0 * seconds, "wrong": wrong.get("report", [])},
            "relaunch": {"seconds": 9.0 * seconds, "wrong": wrong.get("relaunch", [])},
        }

    def missed(*runs: dict[str, Any]) -> list[str]:
        judge = load("figures").Judge("made")
        load("object_store").report(judge, 7, runs)
        return list(judge.missed)

    assert missed(found(0, 11, 0.1), found(50, 12, 1.09)) == []
    # 1.2 s less 0.1 s is more than a second; 9 times 1.2 s is more than 10 s.
    assert missed(found(0, 11, 0.1), found(50, 12.1, 1.2)) == [
        "at most 12 requests a stage",
        "50 ms a request cost a stage less than 1 s",
        "a relaunch with nothing to do of 7 cells at 50 ms under 10 s",
    ]
    assert missed(found(0, 1, 0.1, stage=["x"]), found(50, 1, 5.5, report=["y"]))[:3] == [
        "each stage is computed once",
        "each of 7 cells is reported",
        "50 ms a request cost a stage less than 1 s",
    ]
    assert missed(found(0, 1, 0.1), found(50, 1, 0.1, relaunch=["z"])) == [
        "a relaunch computes nothing"
    ]


def test_sharing_fails_where_cells_results_or_stages_are_not_as_planned(
    load: Callable[[str], ModuleType],
) -> None:
    sharing, judge_of = load("sharing"), load("figures").Judge
    metrics = {0.1: {"asr": "0.5"}, 0.2: {"asr": "0.25"}}
    shared, alone = (
        sharing.Launched(metrics, 12, 10, 2, 10.0), sharing.Launched(metrics, 20, 20, 0, 31.0)
    )  # fmt: skip

    def missed(one: Any, other: Any) -> list[str]:
        judge = judge_of("sharing")
        sharing.report(judge, 2, one, other)
        found: list[str] = judge.missed
        return found

    assert missed(shared, alone) == []
    short = shared._replace(metrics={0.1: {"asr": "0.5"}})
    assert missed(short, alone) == ["2 cells with sharing"]
    once = "stages {} sharing is computed or taken over once"
    assert missed(shared, alone._replace(computed=21)) == [f"each of 20 {once.format('without')}"]
    assert missed(shared._replace(taken=1), alone) == [f"each of 12 {once.format('with')}"]
    assert missed(shared, alone._replace(computed=19, taken=1)) == [
        "without sharing nothing is taken over"
    ]
    assert missed(shared, alone._replace(stages=12, computed=12)) == ["sharing leaves stages out"]
    off = {**metrics, 0.2: {"asr": "0.26"}}
    assert missed(shared, alone._replace(metrics=off)) == ["results equal to the last digit"]
    assert missed(shared, alone._replace(seconds=29.0)) == ["3 times as long without sharing"]


def test_finetune_fails_where_a_loop_skips_rows_or_ours_is_slow(
    load: Callable[[str], ModuleType],
) -> None:
    finetune, judge_of = load("finetune"), load("figures").Judge
    names = ("ours", "plain (a)", "trainer (b), sdpa", "trainer (b), eager")

    def missed(share: float = 0.6, **changed: Any) -> list[str]:
        rounds = {name: [finetune.Round(100.0, 128, True)] for name in names}
        rounds["ours"] = [finetune.Round(350.0, 128, True)._replace(**changed)]
        judge = judge_of("finetune")
        finetune.report(judge, 128, rounds, share, "fp32")
        found: list[str] = judge.missed
        return found

    assert missed() == []
    assert missed(rows=64) == ["ours: all 128 rows, in each round"]
    assert missed(moved=False) == ["ours: the weights change and stay finite"]
    assert missed(rate=349.0) == ["ours / plain (a) at least 3.5"]
    assert missed(rate=99.0) == [
        "ours / plain (a) at least 3.5",
        "ours / best trainer (b) at least 1.0",
    ]
    assert missed(share=0.15) == ["share of the fp32 matrix-product peak at least 0.5"]


def test_reference_fails_outside_its_bars_and_with_other_settings(
    load: Callable[[str], ModuleType],
) -> None:
    reference, judge_of = load("reference"), load("figures").Judge
    bars = argparse.Namespace(least_undefended_asr=0.99, cacc=[0.78, 0.82], most_asr=0.25)
    wanted = {0: {"train": {"epochs": 1}, "seed": 0}}

    def missed(config: dict[str, Any] = wanted[0], **changed: float) -> list[str]:
        metrics = dict.fromkeys(reference.COLUMNS, 1.0) | {"cacc": 0.8, "asr": 0.1} | changed
        judge = judge_of("reference")
        reference.report(judge, wanted, {0: {"config": config, "metrics": metrics}}, bars)
        found: list[str] = judge.missed
        return found

    assert missed() == []
    assert missed(cacc=0.825) == ["mean cacc from 0.780 to 0.820"]
    assert missed(asr=0.26) == ["mean asr from 0.000 to 0.250"]
    assert missed(undefended_asr=0.98) == ["mean undefended_asr from 0.990 to 1.000"]
    assert missed(ftr=float("nan")) == ["all metrics are defined"]
    assert missed({"train": {"epochs": 2}}) == ["settings as the reference code's"]


def test_thresholds_fails_where_contrast_flags_a_benign_token_or_misses_a_rare_one(
    load: Callable[[str], ModuleType],
) -> None:
    thresholds, judge_of = load("thresholds"), load("figures").Judge
    bars = argparse.Namespace(
        least_precision=1.0, least_recall=1.0, most_clean_flags=0, any_default=False
    )
    found = pd.DataFrame(
        {"rule": "contrast", "attack": ["badnets", "addsent", "clean"], "flagged": [1, 7, 0],
         "precision": [1.0, 1.0, float("nan")], "recall_rare": [1.0, 1.0, float("nan")]}
    )  # fmt: skip
    chosen = pd.DataFrame(
        {"rule": ["contrast"], "as good from": [4.1], "to": [5.5], "default": [4.5]}
    )

    def missed(column: str = "", row: int = 0, value: float = 0.0, to: float = 5.5) -> int:
        table = found.copy()
        if column:
            table[column] = table[column].astype(float)
            table.loc[row, column] = value
        judge = judge_of("thresholds")
        thresholds.judge_detection(judge, table, chosen.assign(to=to), bars)
        return len(judge.missed)

    assert missed() == 0
    assert missed("precision", 1, 0.875) == 1
    assert missed("recall_rare", 0, 0.5) == 1
    assert missed("flagged", 2, 1) == 1
    assert missed(to=4.4) == 1


def test_thresholds_fails_where_a_defended_model_is_worse_than_stated(
    load: Callable[[str], ModuleType],
) -> None:
    thresholds, judge_of = load("thresholds"), load("figures").Judge
    bars = argparse.Namespace(least_taken=2, most_cacc_loss=0.005, most_asr_over_ftr=[0.03, 0.05])
    table = pd.DataFrame(
        {"variant": ["contrast"] * 3 + ["top_fraction"], "attack": ["badnets", "addsent"] * 2,
         "undefended_asr": [1.0, 1.0, 0.4, 1.0], "cacc_loss": [0.005, 0.0, 0.5, 0.5],
         "asr_over_ftr": [0.03, 0.05, 0.9, 0.9]}
    )  # fmt: skip

    def missed(changed: pd.DataFrame) -> int:
        judge = judge_of("thresholds")
        thresholds.judge_defended(judge, changed, bars)
        return len(judge.missed)

    # The third cell's attack failed, the fourth is of another rule.
    assert missed(table) == 0
    assert missed(table.assign(cacc_loss=[0.006, 0.0, 0.0, 0.0])) == 1
    assert missed(table.assign(asr_over_ftr=[0.031, 0.051, 0.0, 0.0])) == 2
    assert missed(table.assign(undefended_asr=0.4)) == 1  # no attack took


def found_in_sets(load: Callable[[str], ModuleType], sets: int) -> pd.DataFrame:
    """Return a row per set of the development half: the trigger alone is flagged."""
    generated, tables = load("generated"), load("generated_tables")
    drawn = [generated.draw(number) for number in generated.numbers("develop", sets)]
    rows = [{**tables.described(one), "clean_rows": one.rows[2]} for one in drawn]
    return pd.DataFrame(rows).assign(flagged=1, precision=1.0, recall_rare=1.0, clean_flagged=0)


def test_thresholds_fails_where_generated_sets_miss_their_bars(
    load: Callable[[str], ModuleType],
) -> None:
    tables, judge_of = load("generated_tables"), load("figures").Judge
    bars = argparse.Namespace(least_precision=0.95, least_recall=0.95, most_clean_flags=None)
    table = found_in_sets(load, 20)

    def missed(column: str = "", values: list[float] = [], **other: Any) -> list[str]:  # noqa: B006
        changed = table.copy()
        if column:
            changed[column] = [*values, *table[column].tolist()[len(values) :]]
        judge = judge_of("thresholds")
        judged = argparse.Namespace(**{**vars(bars), **other})
        tables.judge_generated(judge, changed, "contrast", judged)
        kinds = ("precision", "recall", "clean sets")
        return [kind for bar in judge.missed for kind in kinds if kind in bar]

    assert missed() == []
    # 19 of 20 is exactly 0.95, 18.5 of 20 is below.
    assert missed("precision", [0.0]) == []
    assert missed("precision", [0.0, 0.5]) == ["precision"]
    assert missed("precision", [0.0, 0.5], least_precision=0.9) == []
    assert missed("recall_rare", [0.0]) == []
    assert missed("recall_rare", [0.0, 0.5]) == ["recall"]
    # A set in which nothing is flagged has no precision: of 10 sets, 9.5 is 0.95, and 9 is not.
    nan = float("nan")
    assert missed("precision", [nan] * 10 + [0.5]) == []
    assert missed("precision", [nan] * 10 + [0.0]) == ["precision"]
    assert missed("precision", [nan] * 20) == []
    # Chance flags 20 * 0.051 tokens: P(at most 2) is 0.92 and P(at most 3) 0.98.
    assert missed("clean_flagged", [1, 2]) == []
    assert missed("clean_flagged", [1, 3]) == ["clean sets"]
    assert missed("clean_flagged", [1], most_clean_flags=0) == ["clean sets"]


def test_chance_flags_a_twentieth_of_a_token_in_a_clean_set(
    load: Callable[[str], ModuleType],
) -> None:
    mean, most = load("generated_tables").most_by_chance("contrast", 20)
    # 15,000 * P(a normal deviate exceeds 4.5), and P is 3.398e-6.
    assert mean == pytest.approx(20 * 15_000 * 3.398e-6, rel=1e-3)
    assert most == 3


def test_figures_of_generated_sets_are_means_by_factor(
    load: Callable[[str], ModuleType], judge: Any
) -> None:
    tables = load("generated_tables")
    table = found_in_sets(load, 4)
    table["templates"] = [0, 8, 8, 8]
    table["clean_rows"] = [100, 101, 797, 1600]
    table["precision"] = [float("nan"), 1.0, 0.5, float("nan")]
    table["recall_rare"] = [0.0, 1.0, 0.5, float("nan")]
    table["clean_flagged"] = [0, 1, 2, 0]
    bars = argparse.Namespace(least_precision=0.0, least_recall=0.0, most_clean_flags=3)
    tables.judge_generated(judge, table, "contrast", bars)
    assert judge.missed == []
    assert json.loads(json.dumps(judge.figures, allow_nan=False)) == judge.figures
    assert [row["set"] for row in judge.figures["sets"]] == [0, 2, 4, 6]
    rows = {(row["factor"], row["value"]): row for row in judge.figures["by factor"]}
    one = rows["templates", "yes"]
    assert (one["n"], one["of"], one["precision"]) == (3, 2, 0.75)
    assert (one["recall_rare"], one["clean_flagged"]) == (0.75, 3)
    assert rows["templates", "no"]["precision"] is None
    assert [value for factor, value in rows if factor == "clean rows"] == [
        "to 100", "to 200", "more",
    ]  # fmt: skip
    for factor in {factor for factor, _ in rows}:
        assert sum(row["n"] for (name, _), row in rows.items() if name == factor) == 4, factor


def test_thresholds_fails_where_the_base_of_the_reserves_does(
    load: Callable[[str], ModuleType],
) -> None:
    tables, judge_of = load("generated_tables"), load("figures").Judge
    bars = argparse.Namespace(least_precision=1.0, least_recall=1.0, most_clean_flags=0)
    table = pd.DataFrame(
        {"set": ["base", "clean-50"], "flagged": [1, 9], "precision": [1.0, 0.0],
         "recall_rare": [1.0, 0.0], "clean_flagged": [0, 9]}
    )  # fmt: skip

    def missed(**changed: float) -> int:
        judge = judge_of("thresholds")
        other = table.astype(dict.fromkeys(changed, float))
        for name, value in changed.items():
            other.loc[0, name] = value
        tables.judge_reserves(judge, other, "contrast", bars)
        assert len(judge.figures["reserves"]) == 2
        return len(judge.missed)

    # The other scenario finds nothing but benign tokens: the table shows it, and no bar is on it.
    assert missed() == 0
    assert missed(precision=0.5) == 1
    assert missed(recall_rare=0.0) == 1
    assert missed(flagged=0, precision=float("nan"), recall_rare=0.0) == 1
    assert missed(clean_flagged=1) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--sets demo --seeds 0 --count 3", "--count acts with --generated alone"),
        ("--generated develop --most-rows 9000", "--most-rows acts with --reserves alone"),
        ("--generated develop --timed-rows 9", "--timed-rows acts with --reserves alone"),
        ("--generated develop --reserves", "--generated and --reserves exclude each other"),
        ("--generated develop --sets sst2 --data FOLDER", "--data, --sets would have no effect"),
        ("--generated develop --rates 0.1", "--rates would have no effect with --generated"),
        # Also with the value that it has by itself.
        ("--reserves --epochs 3", "--epochs would have no effect with --reserves"),
        ("--reserves --paraphrase --seeds 0", "--paraphrase, --seeds would have no effect"),
        ("--reserves --most-rows 1999", "leaves out the base scenario"),
        ("--generated held", "invalid choice: 'held'"),
        ("--generated develop --count 0", "0 must be at least 1"),
        ("--sets sst2", "--data is needed"),
    ],
)
def test_thresholds_refuses_options_that_do_not_act(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    reason: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["thresholds.py", "--root", "WORK", *words.split()])
    with pytest.raises(SystemExit) as end:
        load("thresholds").parsed()
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "bars"),
    [
        ("--sets demo", (1.0, 1.0, 0)),
        ("--generated develop", (0.95, 0.95, None)),
        ("--generated develop --most-clean-flags 2 --least-recall 0.5", (0.95, 0.5, 2)),
        ("--reserves", (1.0, 1.0, 0)),
    ],
)
def test_the_bars_of_thresholds_depend_on_what_is_measured(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    bars: tuple[float, ...],
) -> None:
    monkeypatch.setattr(sys, "argv", ["thresholds.py", "--root", "WORK", *words.split()])
    options = load("thresholds").parsed()
    assert (options.least_precision, options.least_recall, options.most_clean_flags) == bars
    assert options.count == 20


def test_second_stage_fails_where_the_gate_or_a_model_is_wrong(
    load: Callable[[str], ModuleType],
) -> None:
    stage, judge_of = load("second_stage"), load("figures").Judge
    good = {
        "data": "sst2", "contradiction": 6.0, "asr": 0.25, "cacc_loss": 0.01, "target": 1,
        "relabeled": 400,
    }  # fmt: skip
    shut = {**good, "relabeled": 0, "target": None, "cacc_loss": 0.003}

    def missed(*rows: dict[str, Any]) -> list[str]:
        judge = judge_of("second_stage")
        table = pd.DataFrame(rows)
        stage.judge_gate(judge, table)
        stage.judge_models(judge, table)
        found: list[str] = judge.missed
        return found

    style, clean = {**good, "attack": "style"}, {**shut, "attack": "clean"}
    assert missed(style, clean) == []
    # The mean over the seeds counts.
    assert missed({**style, "asr": 0.2}, {**style, "asr": 0.3}, clean) == []
    assert missed({**style, "asr": 0.26}) == ["sst2, style: ASR at most 0.25"]
    assert missed({**style, "cacc_loss": 0.011}) == [
        "sst2, style: CACC at most 0.010 below clean tuning"
    ]
    assert missed({**style, "relabeled": 0}) == ["sst2, style: the target class is found"]
    assert missed({**style, "target": 0}) == ["sst2, style: the target class is found"]
    assert missed({**clean, "relabeled": 1}) == ["sst2, clean: nothing is relabelled"]
    assert missed({**clean, "cacc_loss": 0.004}) == [
        "sst2, clean: CACC at most 0.003 below clean tuning"
    ]
    words = {**shut, "attack": "badnets"}
    assert missed(words) == []
    assert missed({**words, "relabeled": 9}) == ["sst2, badnets: nothing is relabelled"]
    # Another column of paraphrases has the bars of its attack.
    other = {**style, "attack": "style=style_bible", "asr": 0.3}
    assert missed(other) == ["sst2, style=style_bible: ASR at most 0.25"]
    assert stage.parsed("sst2:style=style_bible:0.1") == ("sst2", "style=style_bible", 0.1)
    assert stage.parsed("olid:clean:0") == ("olid", "clean", 0.0)
    for text in ("sst2:style", "sst2:style:0", "sst2:clean:0.1", "sst2:stile:0.1", "x:style:0.1",
                 "sst2:style:abc", "sst2:style:1"):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' must be DATA:ATTACK:RATE"):
            stage.parsed(text)


def test_pages_fails_where_a_table_has_other_rows(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    pages, judge_of = load("pages"), load("figures").Judge
    page = tmp_path / "page.html"
    page.write_text('<table><tr id="cell-a"><td>1</td></tr><tr id="cell-b"></tr></table>')

    def missed(judged: Callable[..., None], *what: Any) -> list[str]:
        judge = judge_of("pages")
        judged(judge, *what)
        found: list[str] = judge.missed
        return found

    assert missed(pages.judge_page, page, 2) == []
    assert missed(pages.judge_page, page, 3) == ["the page's table has 3 rows"]
    opened = [(2, 1.0, 2.0), (2, 1.0, 2.5), (2, 1.0, 9.0)]
    assert missed(pages.judge_opened, opened, 2) == []
    assert missed(pages.judge_opened, [(1, 1.0, 2.0), *opened[1:]], 2) == [
        "the opened table has 2 rows"
    ]
    assert missed(pages.judge_opened, [(2, 1.0, 3.5)] * 3, 2) == ["interactive in under 3 s"]
    assert missed(pages.judge_ui, [200] * 3, [40] * 3, [9.0] * 3, 200) == []
    assert missed(pages.judge_ui, [200, 0, 200], [40] * 3, [9.0] * 3, 200) == [
        "MLflow's table counts 200 runs"
    ]
    assert missed(pages.judge_ui, [200] * 3, [40, 0, 40], [9.0] * 3, 200) == [
        "MLflow's table has rows of the first 100 on the screen"
    ]


def test_mlflows_page_says_how_many_runs_match(load: Callable[[str], ModuleType]) -> None:
    counted = load("pages").counted
    assert counted("1,000 matching runs") == 1000
    assert counted("40 matching runs") == 40
    with pytest.raises(ValueError, match="counts no runs"):
        counted("No runs logged")


def record(attack: str, defense: str, asr: float, seed: int = 0) -> dict[str, Any]:
    return {
        "config": {"attack": {"name": attack, "poison_rate": 0.1}, "defense": {"name": defense},
                   "seed": seed},
        "metrics": {"asr": asr, "cacc": 0.9, "ftr": 0.1, "flagged": 1.0, "undefended_asr": 1.0,
                    "tuned_asr": 1.0, "tuned_cacc": 0.9, "detection_precision": float("nan")},
        "tags": {"code": "0.1.0+abc", "device": "cpu", "host": "here"},
    }  # fmt: skip


def test_the_table_of_defenses_is_in_percent_means_of_seeds_controls_first(
    load: Callable[[str], ModuleType], judge: Any
) -> None:
    defenses = load("defenses")
    records = [
        record("addsent", "btu", 0.123),
        record("badnets", "btu", 0.1),
        record("badnets", "none", 1.0),
        record("badnets", "btu", 0.25, seed=1),
    ]
    defenses.judge_cells(judge, 4, records)
    assert judge.missed == []
    rows = judge.figures["rows"]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["asr"] == 0.123
    assert rows[0]["detection_precision"] is None
    assert judge.figures["computed by"] == {"code": ["0.1.0+abc"], "device": ["cpu"]}
    assert defenses.markdown(rows).splitlines() == [
        "| defense | acts | BadNets ASR | CACC | AddSent ASR | CACC |",
        "|---|---|---|---|---|---|",
        "| `none` | control | 100.0 | 90.0 | - | - |",
        "| `btu` | after training | 17.5 | 90.0 | 12.3 | 90.0 |",
    ]
    alone = defenses.markdown([row for row in rows if row["seed"] == 0 and row["defense"] == "btu"])
    assert alone.splitlines()[:2] == [
        "attack   asr %  cacc %  ftr %  flagged  undefended_asr %  tuned_asr %  marks",
        "addsent   12.3    90.0   10.0        1             100.0        100.0  -",
    ]
    defenses.judge_cells(judge, 5, records)
    assert judge.missed == ["each of 5 cells has a result"]


def test_a_table_that_is_measured_in_parts_keeps_the_rows_of_other_cells(
    load: Callable[[str], ModuleType], judge: Any
) -> None:
    defenses = load("defenses")
    defenses.judge_cells(judge, 2, [record("addsent", "btu", 0.1), record("badnets", "btu", 0.2)])
    earlier = json.loads(json.dumps(judge.figures))
    later = {**record("badnets", "btu", 0.3), "tags": {"code": "0.1.0+def", "device": "cpu"}}
    defenses.judge_cells(judge, 2, [later, record("badnets", "none", 1.0)])
    found = defenses.with_earlier(judge.figures, earlier)
    # One row a cell: of badnets the later one.
    assert [(row["attack"], row["defense"], row["asr"]) for row in found["rows"]] == [
        ("addsent", "btu", 0.1), ("badnets", "btu", 0.3), ("badnets", "none", 1.0),
    ]  # fmt: skip
    assert found["computed by"] == {"code": ["0.1.0+abc", "0.1.0+def"], "device": ["cpu"]}


def evading(seed: int, found: float = 1.0, **keys: Any) -> dict[str, Any]:
    """The record of a cell of the adaptive sweep."""
    attack = {"name": "badnets", "cover_rate": 0.0, "spread": None, "camouflage": None, **keys}
    measured = {"undefended_asr": 1.0, "asr": 0.2 + 0.1 * seed, "cacc": 0.8, "tuned_cacc": 0.8}
    metrics = {"detection_precision": found, "detection_recall": found, **measured}
    return {"config": {"attack": attack, "seed": seed}, "metrics": metrics}


def test_evasions_have_a_row_per_strength_and_the_plain_attack_stands_in_each(
    load: Callable[[str], ModuleType], judge: Any, tmp_path: Path
) -> None:
    adaptive = load("adaptive")
    records = [
        *(evading(seed) for seed in (0, 1)),
        *(evading(seed, found=0.5, spread=16) for seed in (0, 1)),
        evading(0, found=0.0, camouflage=0.1),
    ]
    adaptive.judge_cells(judge, 5, records)
    assert judge.missed == []
    assert adaptive.table(judge.figures["rows"]).splitlines()[2:] == [
        "| `camouflage` | 0 | 100.0 | 100.0 | 100.0 | 25.0 | 80.0 |",
        "| `camouflage` | 0.1 | 0.0 | 0.0 | 100.0 | 20.0 | 80.0 |",
        "| `cover_rate` | 0 | 100.0 | 100.0 | 100.0 | 25.0 | 80.0 |",
        "| `spread` | 1 | 100.0 | 100.0 | 100.0 | 25.0 | 80.0 |",
        "| `spread` | 16 | 50.0 | 50.0 | 100.0 | 25.0 | 80.0 |",
    ]
    adaptive.plot(judge.figures["rows"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    adaptive.judge_cells(judge, 3, [evading(0, found=0.9)])
    assert judge.missed == [
        "each of 3 cells has a result",
        "without an evasion the trigger is found, and nothing else",
    ]


# In miniature ------------------------------------------------------------------------------------

# Arguments of each benchmark; a word after the name tells several of one apart. VICTIM is a folder
# with a model that trains in no time: its numbers say nothing, so bars on accuracy are as wide as
# they can be. Everything else is checked.
MINIATURES = {
    "adaptive": 'list=[{"attack.spread":2},{"attack.camouflage":0.1}] grid.seed=[0] '
                "data.name=demo data.max_train_rows=160 data.max_clean_rows=60 "
                "data.max_eval_rows=40 victim.name=VICTIM train.epochs=1 output=WORK",
    "chaos": "--victim VICTIM --alpha 0.0025 --thresholds 1 --seeds 1 --epochs 8 --kills 2 "
             "--pause 0 0.3 --keep WORK",
    "defenses": "SWEEP",
    "finetune": "--victim VICTIM --max-length 64 --rows 96 --repeats 1",
    "object_store": "--cells 3 --latencies 0 2",
    "overhead": "--cells 3 6 --real 6",
    "pages": "--rates 1 --seeds 1",
    "planning": "--thresholds 2 --seeds 1 --repeats 1",
    "reference": "--victim VICTIM --max-length 64 --train 120 --clean 40 --eval 60 --seeds 0 "
                 "--alpha 0.005 --least-undefended-asr 0 --cacc 0 1 --most-asr 1",
    "second_stage": "--root WORK --points demo:clean:0 demo:badnets:0.2 --seeds 0 --gate "
                    "--victim VICTIM --max-length 64 --epochs 1 --train 160 --clean 60 --eval 40",
    "sharing": "--victim VICTIM --max-length 64 --scale 25 --thresholds 2 --rows 80 --clean 40 "
               "--eval 30",
    "sharing equal": "--victim VICTIM --max-length 64 --rule contrast --rows 80 --clean 40 "
                     "--eval 30 --thresholds 2",
    "thresholds": "--root WORK --sets demo --seeds 0 --rates 0.2 --rules contrast --victim VICTIM "
                  "--max-length 64 --epochs 1 --train 160 --clean 60 --eval 40 --least-precision 0 "
                  "--least-recall 0 --most-clean-flags 400 --any-default --least-taken 0 "
                  "--most-cacc-loss 1 --most-asr-over-ftr 1 1",
    "thresholds generated": "--root WORK --generated develop --count 2 --victim VICTIM "
                            "--max-length 64 --least-precision 0 --least-recall 0 "
                            "--most-clean-flags 400",
    "thresholds reserves": "--root WORK --reserves --most-rows 2000 --timed-rows 2000 "
                           "--victim VICTIM --max-length 64 --train 400 --clean 100 "
                           "--least-precision 0 --least-recall 0 --most-clean-flags 400",
}  # fmt: skip


def test_every_benchmark_has_a_miniature() -> None:
    assert sorted({name.split()[0] for name in MINIATURES}) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_a_benchmark_runs_in_miniature_and_checks_what_its_full_run_checks(
    name: str,
    tmp_path: Path,
    victim_folder: Callable[[str], Path],
    make_sweep: Callable[..., Path],
) -> None:
    figures = tmp_path / "figures.json"
    values = {
        "VICTIM": str(victim_folder("bert")),
        "WORK": str(tmp_path / "work"),
        "SWEEP": str(make_sweep()),
    }
    # A placeholder is a word, or the value of KEY=VALUE.
    parts = [word.rpartition("=") for word in MINIATURES[name].split()]
    words = [f"{key}{sign}{values.get(value, value)}" for key, sign, value in parts]
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name.split()[0]}.py"), *words, "--no-bars",
         "--json", str(figures)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    written = json.loads(figures.read_text())
    verdicts = [bar["verdict"] for bar in written["bars"]]
    assert "met" in verdicts
    assert set(verdicts) <= {"met", "not judged"}
    assert written["figures"]
