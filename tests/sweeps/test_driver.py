"""A launch without Ray: what runs next, and what becomes of every outcome. Nothing is computed."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from driving import ALPHA, OWN, SHARED, ByHand, ToyPlanner, begin, metrics
from rich.console import Console

from btu.errors import UserError
from btu.provenance import code_version
from orchestrator.plan.planner import Plan
from orchestrator.results.folder import Results
from orchestrator.run import driver as module
from orchestrator.run.driver import (
    GIVEN_UP_IN_A_ROW,
    INTERRUPTED,
    WORKER_RETRIES,
    Driver,
    Idle,
)
from orchestrator.run.progress import SweepProgress
from orchestrator.run.refine import RefineSpec
from orchestrator.run.schedule import CELL, Task
from orchestrator.run.worker import WAIT_SECONDS, Outcome, Report, StageCall
from orchestrator.store.store import Store
from orchestrator.sweep.load import load_sweep

ONE = "seed: 0\ngrid: {defense.alpha: [0.01]}\n"
TWO = "grid: {defense.alpha: [0.01, 0.04]}\n"
SEARCHED = """
seed: 0
grid: {seed: [0, 1]}
optuna:
  trials: 3
  sampler: random
  space: {defense.alpha: {low: 0.01, high: 0.04}}
"""


@pytest.fixture
def planner() -> ToyPlanner:
    return ToyPlanner()


@pytest.fixture
def launch(tmp_path: Path, planner: ToyPlanner) -> Iterator[Callable[..., ByHand]]:
    """A function that begins a launch. Called again, it is the next launch of the same sweep."""
    made: list[ByHand] = []

    def build(text: str = TWO, **options: Any) -> ByHand:
        made.append(begin(tmp_path, text, planner, **options))
        return made[-1]

    yield build
    for hand in made:
        hand.leave()


# Done ------------------------------------------------------------------------------------------


def test_every_stage_runs_once_after_its_inputs(launch: Callable[..., ByHand]) -> None:
    ended: list[None] = []
    hand = launch(cell_ended=lambda: ended.append(None))
    assert hand.driver.has_work
    assert hand.run_all() == {**dict.fromkeys(SHARED, 1), **dict.fromkeys(OWN, 2)}
    assert not hand.driver.has_work
    assert len(ended) == 2
    hand.now += 60
    result = hand.driver.result()
    assert (result.done, result.failed, result.missing, result.stopped) == (2, {}, 0, "")
    assert result.complete
    assert result.seconds == 60
    assert "[1/2] alpha=0.01: asr 1.000 cacc 0.900" in hand.said
    assert "[2/2] alpha=0.04: asr 0.000 cacc 0.900" in hand.said
    # The journal has a start and an end of each, in this order.
    events = hand.results.journal()
    assert [(e["event"], e["stage"]) for e in events[:4]] == [
        ("start", "rows"), ("end", "rows"), ("start", "train"), ("end", "train"),
    ]  # fmt: skip
    assert len(events) == 2 * (len(SHARED) + 2 * len(OWN))
    assert {e["launch"] for e in events} == {hand.driver.id}
    assert {e["outcome"] for e in hand.events("end")} == {"done"}


def test_there_is_nothing_to_run_while_an_input_is_computed(launch: Callable[..., ByHand]) -> None:
    hand = launch()
    rows = hand.take("rows")
    assert hand.driver.next_task() is Idle.later
    hand.finish(rows)
    train = hand.take("train")
    assert hand.driver.next_task() is Idle.later
    hand.finish(train)
    first, second = hand.take("unlearn"), hand.take("unlearn")
    assert first.stage.key != second.stage.key
    assert hand.driver.next_task() is Idle.later


def test_a_worker_gets_a_stage_as_plain_data_with_its_resources(
    launch: Callable[..., ByHand],
) -> None:
    hand = launch(ONE + "resources: {cpu: 2, gpu: 0.5, cell_cpu: 1, cell_gpu: 0}\n")
    calls = {}
    while isinstance(task := hand.driver.next_task(), Task):
        calls[task.stage.name] = hand.driver.call(task)
        assert StageCall.from_json(calls[task.stage.name].to_json()) == calls[task.stage.name]
        hand.finish(task)
    assert {name: (call.cpus, call.gpus) for name, call in calls.items()} == {
        "rows": (2, 0), "train": (2, 0.5), "unlearn": (1, 0), "evaluate": (1, 0), CELL: (2, 0),
    }  # fmt: skip
    assert calls[CELL].varied == {ALPHA: 0.01}
    assert calls["train"].varied == {}
    assert calls["train"].accumulation == 1
    assert calls["train"].node["name"] == "train"


def test_the_next_launch_runs_what_is_left(launch: Callable[..., ByHand]) -> None:
    first = launch()
    while (task := first.take()).stage.name != "evaluate":
        first.finish(task)
    # Stopped in the first evaluation. The shared model went once both had been unlearned from it;
    # a third cell needs it again.
    first.leave()
    second = launch("grid: {defense.alpha: [0.01, 0.04, 0.05]}\n")
    assert second.run_all() == {"train": 1, "unlearn": 1, "evaluate": 3, CELL: 3}
    second.leave()
    third = launch("grid: {defense.alpha: [0.01, 0.04, 0.05]}\n")
    assert "3 of 3 cells are done already and are not run again" in third.said
    assert not third.driver.has_work
    assert third.driver.next_task() is Idle.finished
    assert third.driver.result().done == 3


def test_what_another_launch_computed_is_shown_as_well(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    while (task := hand.take()).stage.name != CELL:
        hand.finish(task)
    hand.publish(task.stage)
    # A worker that finds the result there reports no facts and no seconds.
    hand.driver.ended(task, Report(Outcome.done))
    assert "[1/1] alpha=0.01: asr 1.000 cacc 0.900" in hand.said
    hand.driver.save_timings()
    assert {row["stage"] for row in hand.store.timings()} == {
        "rows",
        "train",
        "unlearn",
        "evaluate",
    }


def test_a_cell_that_mlflow_misses_is_named(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    while (task := hand.take()).stage.name != CELL:
        hand.finish(task)
    hand.finish(task, facts={"asr": 0.5}, untracked="ConnectionError: away")
    assert "[1/1] alpha=0.01: asr 0.500" in hand.said
    assert "not in MLflow yet: alpha=0.01 (ConnectionError: away)" in hand.said


def test_a_damaged_result_is_computed_again(launch: Callable[..., ByHand]) -> None:
    first = launch(ONE)
    first.run_all()
    first.leave()
    (key,) = first.plan.cells
    (first.store.fetch(key) / "result.json").write_text("{}")
    second = launch(ONE)
    assert f"The stored result {key} is damaged" in second.said
    assert second.run_all() == {CELL: 1}


def test_times_are_kept_for_estimates_summed_by_stage(launch: Callable[..., ByHand]) -> None:
    hand = launch()
    hand.run_all()
    hand.driver.save_timings()
    rows = {row["stage"]: row for row in hand.store.timings()}
    # Two of 2 s each; the cell's rows are no work of its own.
    assert rows["unlearn"] == {
        "stage": "unlearn", "victim": "/nowhere", "device": "cpu", "units": 2, "seconds": 4.0,
        "count": 2,
    }  # fmt: skip
    assert rows["train"]["seconds"] == 2.0


def test_a_disk_too_full_for_the_times_is_no_error(
    launch: Callable[..., ByHand], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    hand.run_all()
    monkeypatch.setattr(hand.store, "add_timings", full)
    hand.driver.save_timings()
    assert hand.store.timings() == []


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_nothing_from_the_journal_alone(
    launch: Callable[..., ByHand], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    monkeypatch.setattr(hand.results.storage, "append", full)
    hand.run_all()
    assert hand.driver.result().complete


# Another launch --------------------------------------------------------------------------------


def test_what_another_launch_computes_is_passed_over(launch: Callable[..., ByHand]) -> None:
    hand = launch("grid: {seed: [0, 1], defense.alpha: [0.01]}\n")
    other = Store(hand.store.location)
    first = hand.plan.cells[next(iter(hand.plan.cells))].stage.inputs["rows"]
    with other.lease(first.key, "other") as lease:
        assert lease.acquire()
        assert hand.take("rows").stage.key != first.key
        assert hand.driver.next_task() is Idle.later
    assert hand.take("rows").stage.key == first.key


def test_where_all_is_with_another_launch_a_node_waits_for_it(
    launch: Callable[..., ByHand],
) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    other = Store(hand.store.location)
    lease = other.lease(cell.stage.inputs["rows"].key, "other")
    assert lease.acquire()
    assert hand.driver.next_task() is Idle.elsewhere
    # One wait at a time.
    assert hand.driver.next_task() is Idle.later
    hand.driver.waited()
    assert hand.driver.next_task() is Idle.elsewhere
    assert hand.said.count("all that is left is with another launch; waiting for it.") == 1
    lease.release()
    hand.driver.waited()
    hand.now += 2
    assert hand.run_all()[CELL] == 1


def test_a_stage_that_a_worker_found_busy_is_left_alone_for_a_while(
    launch: Callable[..., ByHand],
) -> None:
    hand = launch(ONE)
    task = hand.take("rows")
    other = Store(hand.store.location)
    # Its holder is of another machine, and silent: nobody can tell yet that it is dead.
    other.storage.write(f"leases/{task.stage.key}.json", json.dumps({"owner": "other"}).encode())
    hand.driver.ended(task, Report(Outcome.busy))
    assert hand.events("end")[-1]["outcome"] == "busy"
    assert hand.driver.next_task() is Idle.elsewhere
    hand.driver.waited()
    other.storage.remove(f"leases/{task.stage.key}.json")
    hand.now += WAIT_SECONDS + 1
    assert hand.take("rows").stage is task.stage
    assert hand.driver.result().failed == {}


def test_an_expired_lease_is_removed_and_its_stage_runs(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    path = f"leases/{cell.stage.inputs['rows'].key}.json"
    hand.store.storage.write(path, json.dumps({"owner": "other", "host": "gone"}).encode())
    assert hand.driver.next_task() is Idle.elsewhere
    hand.driver.waited()
    hand.now += 60  # watched for long enough, and it never changed
    hand.take("rows")
    assert not hand.store.storage.exists(path)


# Inputs, memory, disk --------------------------------------------------------------------------


def test_lost_inputs_are_computed_again(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    for name in SHARED:
        hand.finish(hand.take(name))
    task = hand.take("unlearn")
    lost = task.stage.inputs["model"].key
    hand.driver.ended(task, Report(Outcome.inputs, reason="model (damaged)", lost=(lost,)))
    assert "'unlearn' needs inputs computed again: model (damaged)" in hand.said
    assert hand.run_all() == {"train": 1, **dict.fromkeys(OWN, 1)}


def test_inputs_that_are_damaged_again_and_again_are_a_failure(
    launch: Callable[..., ByHand],
) -> None:
    hand = launch(ONE)
    for name in SHARED:
        hand.finish(hand.take(name))
    for _ in range(4):  # three repairs
        task = hand.take("unlearn")
        report = Report(Outcome.inputs, lost=(task.stage.inputs["model"].key,))
        hand.driver.ended(task, report)
        if isinstance(repaired := hand.driver.next_task(), Task):
            hand.finish(repaired)
    (record,) = hand.store.failures()
    assert record["reason"] == "its inputs were damaged again and again; check the disk."
    (reason,) = hand.driver.result().failed.values()
    assert reason == f"stage 'unlearn' failed: {record['reason']}"


def test_an_input_that_cannot_be_had_again_fails_what_reads_it(
    launch: Callable[..., ByHand],
) -> None:
    hand = launch()
    for name in SHARED:
        hand.finish(hand.take(name))
    first, second = hand.take("unlearn"), hand.take("unlearn")
    lost = Report(Outcome.inputs, lost=(first.stage.inputs["model"].key,))
    hand.store.set_aside(lost.lost[0], "a bit was flipped")
    hand.driver.ended(first, lost)
    hand.fails(hand.take("train"), "no memory")
    hand.driver.ended(second, lost)
    assert "an input failed: no memory" in hand.said
    result = hand.driver.result()
    assert (result.done, len(result.failed), result.missing) == (0, 2, 0)


def test_without_memory_a_stage_is_tried_alone_and_in_parts(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    hand.finish(hand.take("rows"))
    tries = []
    for _ in range(5):
        task = hand.take("train")
        tries.append((task.alone, task.accumulation, hand.driver.call(task).accumulation))
        hand.driver.ended(task, Report(Outcome.memory, reason="CUDA out of memory"))
    assert tries == [(False, 1, 1), (True, 1, 1), (True, 2, 2), (True, 4, 4), (True, 8, 8)]
    assert hand.said.count("'train' ran out of memory; it is tried again alone, and then") == 4
    (record,) = hand.store.failures()
    assert record["reason"] == "out of memory, even alone and in parts: CUDA out of memory"
    assert hand.driver.next_task() is Idle.finished
    assert len(hand.driver.result().failed) == 1


def test_a_full_disk_stops_the_launch_and_fails_nothing(launch: Callable[..., ByHand]) -> None:
    hand = launch()
    hand.finish(hand.take("rows"))
    hand.finish(hand.take("train"))
    first, second = hand.take("unlearn"), hand.take("unlearn")
    hand.driver.ended(first, Report(Outcome.disk, reason="No space left on device"))
    stopped = "the disk is full (No space left on device); free some space"
    assert f"stopping: {stopped}." in hand.said
    # What runs may end; nothing else is handed out.
    assert hand.driver.next_task() is Idle.later
    hand.finish(second)
    assert hand.driver.next_task() is Idle.finished
    hand.driver.all_ended()
    result = hand.driver.result()
    assert (result.done, result.failed, result.missing) == (0, {}, 2)
    assert result.stopped == stopped
    hand.leave()
    assert launch().run_all() == {"unlearn": 1, "evaluate": 2, CELL: 2}


def test_a_disk_that_may_become_full_is_announced(
    launch: Callable[..., ByHand], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    assert "GB free" not in hand.said
    hand.leave()
    # Enough to begin, and too little for 60 cells: 122 stages of 0.3 MB are 37 MB.
    monkeypatch.setattr("orchestrator.store.store.LEAST_FREE_BYTES", 0)
    used = shutil.disk_usage("/")._replace(free=30_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used)
    monkeypatch.setattr(Store, "prepare", lambda self: None)
    many = launch(f"grid: {{defense.alpha: {[n / 100 for n in range(1, 61)]}}}\n")
    assert "has 0.0 GB free and the sweep may need more" in many.said


# Failures --------------------------------------------------------------------------------------


def test_a_failure_takes_its_own_cells_alone_and_stays(launch: Callable[..., ByHand]) -> None:
    hand = launch()
    for name in SHARED:
        hand.finish(hand.take(name))
    hand.fails(hand.take("unlearn"))
    hand.run_all()
    failed = "FAILED: stage 'unlearn' of alpha=0.01: loss became nan"
    (record,) = hand.store.failures()
    assert f"{failed} ({hand.store.location}/failed/{record['key']}.json)" in hand.said
    result = hand.driver.result()
    assert (result.done, result.missing) == (1, 0)
    assert not result.complete
    (reason,) = result.failed.values()
    assert reason == "stage 'unlearn' failed: loss became nan"
    hand.leave()
    # Not run again by itself; again if it is asked for.
    again = launch()
    assert "1 cells failed earlier and are not run again: stage 'unlearn' failed" in again.said
    assert not again.driver.has_work
    again.leave()
    retried = launch(retry_failed=True)
    # The shared model went when nobody seemed to need it any more.
    assert retried.run_all() == {"train": 1, **dict.fromkeys(OWN, 1)}
    assert retried.driver.result().complete


def test_so_many_failures_stop_the_launch(launch: Callable[..., ByHand]) -> None:
    hand = launch("grid: {defense.alpha: [0.01, 0.02, 0.03]}\n", max_failures=2)
    for name in SHARED:
        hand.finish(hand.take(name))
    hand.fails(hand.take("unlearn"))
    assert hand.driver.stopped == ""
    hand.fails(hand.take("unlearn"))
    assert hand.driver.stopped == "2 stages failed (--max-failures 2)"
    assert hand.driver.next_task() is Idle.finished
    # The first reason stands.
    hand.driver.stop("something else")
    result = hand.driver.result()
    assert (result.stopped, len(result.failed), result.missing) == (hand.driver.stopped, 2, 1)


@pytest.mark.parametrize(
    ("error", "last"),
    [("", "its worker died"), ("  \n", "its worker died"), ("OSError: a\nb", "b")],
)
def test_a_stage_that_is_given_up_is_a_failure(
    launch: Callable[..., ByHand], error: str, last: str
) -> None:
    hand = launch(ONE)
    task = hand.take("rows")
    hand.driver.started(task)  # by the worker after the one that died
    hand.driver.worker_lost(task, error)
    assert len(hand.events("start")) == 2
    (record,) = hand.store.failures()
    assert record["code"] == code_version()
    # It is over: `btu status` counts what began and has no end as running at once.
    (event,) = hand.events("end")
    assert (event["key"], event["outcome"]) == (record["key"], "failed")
    assert record["stage"] == "rows"
    assert record["reason"] == f"gave up after {WORKER_RETRIES + 1} tries: {last}"
    assert record["traceback"] == (error or record["reason"])
    assert f"FAILED: stage 'rows' of alpha=0.01: gave up after 3 tries: {last}" in hand.said
    # Its cell fails with it, and there is nothing else to do.
    (cell,) = hand.driver.result().failed.values()
    assert cell.startswith("stage 'rows' failed: gave up")
    assert hand.driver.next_task() is Idle.finished


def test_a_failure_that_cannot_be_recorded_is_told_and_does_not_end_the_sweep(
    launch: Callable[..., ByHand], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch("grid: {seed: [0, 1], defense.alpha: [0.01]}\n")
    monkeypatch.setattr(hand.store, "fail", full)
    hand.driver.worker_lost(hand.take("rows"), "")
    assert "was not recorded: [Errno 28] No space left" in hand.said
    assert hand.driver.stopped == ""
    assert hand.run_all()[CELL] == 1


def test_workers_that_die_in_a_row_stop_the_sweep(launch: Callable[..., ByHand]) -> None:
    # Not the stages, the machines: whatever is tried dies.
    hand = launch("grid: {seed: [0, 1, 2, 3, 4, 5], defense.alpha: [0.01]}\n")
    for _ in range(GIVEN_UP_IN_A_ROW - 1):
        hand.driver.worker_lost(hand.take("rows"), "")
    hand.finish(hand.take())  # a worker that lives
    for _ in range(GIVEN_UP_IN_A_ROW):
        assert hand.driver.stopped == ""
        hand.driver.worker_lost(hand.take(), "")
    assert "the workers of 3 stages in a row died" in hand.driver.stopped
    assert hand.driver.next_task() is Idle.finished


# Beginning and ending --------------------------------------------------------------------------


def test_a_launch_is_there_for_others_until_it_ends(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    keys = {stage.key for stage in cell.stage.closure()}
    assert hand.store.in_use() == keys
    assert hand.store.in_use(but=hand.driver.id) == set()
    hand.leave()
    assert hand.store.in_use() == set()


def test_a_launch_beats_and_reports_once_that_it_cannot(
    tmp_path: Path, planner: ToyPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.001)
    beats = threading.Semaphore(0)

    def refused(self: Store, launch_id: str) -> None:
        beats.release()
        raise ConnectionError("away")

    monkeypatch.setattr(Store, "heartbeat_launch", refused)
    hand = begin(tmp_path, ONE, planner)
    for _ in range(3):
        assert beats.acquire(timeout=60)
    hand.leave()
    assert hand.said.count("cannot be written (away); until it can, gc on another machine") == 1


def test_a_launch_that_breaks_off_leaves_the_terminal_and_the_store(
    tmp_path: Path, planner: ToyPlanner
) -> None:
    # Otherwise the terminal is left without a cursor.
    file = tmp_path / "toy.yaml"
    file.write_text(f"output: {tmp_path / 'runs'}\ncontrols: []\n{ONE}")
    sweep, plan = load_sweep(file), Plan()
    planner.add(plan, sweep.cells())
    screen = io.StringIO()
    progress = SweepProgress(Console(file=screen, width=120, force_terminal=True))
    results = Results(sweep.output, sweep.name)
    driver = Driver(sweep, plan, planner, progress, results)
    driver.prepare()
    with pytest.raises(UserError, match="no node"), driver.underway():
        raise UserError("no node can hold a stage.")
    try:
        assert screen.getvalue().count("\x1b[?25h") == screen.getvalue().count("\x1b[?25l") == 1
    finally:
        progress.end()
    assert results.store.in_use() == set()


def test_what_nobody_stopped_and_is_not_done_was_interrupted(
    launch: Callable[..., ByHand],
) -> None:
    hand = launch(ONE)
    hand.take("rows")
    hand.driver.all_ended()
    result = hand.driver.result()
    assert (result.stopped, result.missing) == (INTERRUPTED, 1)
    hand.leave()
    done = launch(ONE)
    done.run_all()
    done.driver.all_ended()
    assert done.driver.result().stopped == ""


def test_a_task_that_reached_no_worker_is_ready_again(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    task = hand.driver.next_task()
    assert isinstance(task, Task)
    hand.driver.put_back(task)
    assert hand.run_all()["rows"] == 1
    stopped = launch("grid: {defense.alpha: [0.3]}\n")
    task = stopped.driver.next_task()
    assert isinstance(task, Task)
    stopped.driver.stop("no Ray")
    assert stopped.driver.next_task() is Idle.later
    stopped.driver.put_back(task)
    assert stopped.driver.next_task() is Idle.finished


def test_no_ray_is_imported() -> None:
    code = (
        "import sys\nimport orchestrator.run.driver, orchestrator.run.publish\n"
        "assert not {'ray', 'mlflow', 'torch', 'optuna'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Models ----------------------------------------------------------------------------------------


def models(hand: ByHand) -> Counter[str]:
    """Return by stage how many models there are."""
    names = (marker.name for marker in hand.store.markers() if not marker.dropped)
    return Counter(name for name in names if name in ("train", "unlearn"))


def test_models_go_with_their_last_reader(launch: Callable[..., ByHand]) -> None:
    hand = launch()
    ran = []
    while isinstance(task := hand.driver.next_task(), Task):
        hand.finish(task)
        ran.append((task.stage.name, dict(models(hand))))
    assert ("train", {"train": 1}) in ran
    assert ran[-1] == (CELL, {})
    # The shared model went when the second one had been unlearned from it.
    assert max(sum(there.values()) for _, there in ran) == 2


def test_models_stay_where_they_are_to_be_kept(launch: Callable[..., ByHand]) -> None:
    hand = launch(TWO + "store: {keep: models}\n")
    hand.run_all()
    hand.driver.drop_models()
    assert models(hand) == {"train": 1, "unlearn": 2}
    hand.leave()
    # A launch that keeps none removes what is left, though it runs nothing.
    again = launch()
    again.driver.drop_models()
    assert models(again) == {}


def test_models_stay_while_something_is_left_to_run(launch: Callable[..., ByHand]) -> None:
    hand = launch(TWO + "store: {keep: models}\n")
    hand.run_all()
    hand.leave()
    more = launch("grid: {defense.alpha: [0.01, 0.04, 0.05]}\n")
    more.driver.drop_models()
    assert models(more) == {"train": 1, "unlearn": 2}


def test_models_stay_that_another_launch_needs(launch: Callable[..., ByHand]) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    train = cell.stage.inputs["train"].key
    hand.store.register_launch("other", "other", [train])
    hand.run_all()
    assert models(hand) == {"train": 1}
    hand.store.release_launch("other")
    hand.driver.drop_models()
    assert models(hand) == {}


def test_models_stay_that_another_sweep_has_not_finished_with(
    launch: Callable[..., ByHand],
) -> None:
    # Launched, and stopped before anything ran.
    launch("name: other\ngrid: {defense.alpha: [0.07]}\n").leave()
    hand = launch()
    hand.run_all()
    hand.driver.drop_models()
    assert models(hand) == {"train": 1}


def test_a_model_that_cannot_be_removed_is_named(
    launch: Callable[..., ByHand], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    monkeypatch.setattr(hand.store, "drop", full)
    hand.run_all()
    assert hand.said.count("was not removed: [Errno 28] No space left on device") == 2
    assert hand.driver.result().complete


# A study of Optuna -----------------------------------------------------------------------------


def test_a_study_suggests_as_many_at_once_as_run(launch: Callable[..., ByHand]) -> None:
    hand = launch(SEARCHED)
    assert "Further cells are suggested as the sweep goes." in hand.said
    assert hand.driver.has_work
    assert hand.plan.cells == {}
    hand.driver.slots = 1
    tasks = [hand.take("rows"), hand.take("rows")]  # of two seeds
    assert hand.driver.next_task() is Idle.later
    assert len(hand.plan.cells) == 2
    # What was suggested is on disk, and nobody removes what it needs.
    assert set(hand.results.cells()) == set(hand.plan.cells)
    assert set(hand.plan.cells) <= hand.store.in_use()
    hand.driver.slots = 2
    assert hand.driver.next_task() is Idle.later  # the second shares the stages of both seeds
    assert len(hand.plan.cells) == 4
    for task in tasks:
        hand.finish(task)
    assert hand.run_all()[CELL] == 6
    result = hand.driver.result()
    assert (result.done, result.failed, result.missing) == (6, {}, 0)
    assert hand.said.count("best: asr ") >= 1


def told(folder: Path) -> dict[str, Any]:
    """Return what the study was told, by number."""
    files = (folder / "runs" / "toy" / "search").glob("*/*.told.json")
    return {file.name.partition(".")[0]: json.loads(file.read_text()) for file in files}


def test_a_study_is_told_the_means_once_all_cells_have_ended(
    launch: Callable[..., ByHand], tmp_path: Path
) -> None:
    hand = launch(SEARCHED)
    seen = 0
    while isinstance(task := hand.driver.next_task(), Task):
        hand.finish(task)
        if task.stage.name == CELL:
            seen += 1
            assert len(told(tmp_path)) == seen // 2
    assert sorted(told(tmp_path)) == ["000000", "000001", "000002"]
    alphas = {cell.varied[ALPHA] for cell in hand.plan.cells.values()}
    expected = [metrics({ALPHA: alpha}) for alpha in sorted(alphas)]
    assert sorted(map(str, told(tmp_path).values())) == sorted(map(str, expected))


def test_a_suggestion_with_a_failed_cell_has_failed(
    launch: Callable[..., ByHand], tmp_path: Path
) -> None:
    hand = launch(SEARCHED)
    while (task := hand.take()).stage.name != "unlearn":
        hand.finish(task)
    hand.fails(task)
    hand.run_all()
    found = told(tmp_path)
    assert len(found) == 3
    assert [number for number, values in found.items() if values is None] == ["000000"]
    result = hand.driver.result()
    assert (result.done, len(result.failed), result.missing) == (5, 1, 0)
    hand.leave()
    # Asked again, it counts as open until its cells have ended.
    again = launch(SEARCHED, retry_failed=True)
    assert again.driver.result().missing == 1 + 1  # its cell, and the suggestion
    again.run_all()
    assert None not in told(tmp_path).values()
    assert again.driver.result().complete


def test_the_next_launch_goes_on_with_a_study(
    launch: Callable[..., ByHand], tmp_path: Path
) -> None:
    first = launch(SEARCHED)
    first.finish(first.take("rows"))
    first.take()
    first.leave()
    second = launch(SEARCHED)
    assert set(second.plan.cells) == set(first.plan.cells)  # of what was suggested
    assert second.driver.result().missing == 2 + 3  # its cells, and the suggestions
    second.run_all()
    assert len(told(tmp_path)) == 3
    assert second.driver.result().complete
    second.leave()
    third = launch(SEARCHED)
    assert not third.driver.has_work
    assert third.driver.result().done == 6


def test_a_suggestion_that_cannot_run_is_told_as_failed_and_the_next_is_asked_for(
    launch: Callable[..., ByHand], tmp_path: Path, planner: ToyPlanner
) -> None:
    text = SEARCHED.replace("{low: 0.01, high: 0.04}", "[0.01, 0.02]").replace("random", "tpe")
    planner.refused = {0.01}
    hand = launch(text.replace("trials: 3", "trials: 8"))
    hand.run_all()
    assert "suggestion refused: no such threshold." in hand.said
    values = list(told(tmp_path).values())
    assert len(values) == 8
    assert {str(value) for value in values} == {"None", str(metrics({ALPHA: 0.02}))}
    assert hand.driver.result().complete  # two cells: all suggestions are the same


# Refinement ------------------------------------------------------------------------------------


@pytest.fixture
def refining(launch: Callable[..., ByHand]) -> Callable[[int], ByHand]:
    """A function that begins a launch which refines, on a sweep whose grid is done.

    ASR is 1 at 0.01 and 0 at 0.04. Called again, it is the next launch of the same sweep.
    """
    grid = launch()
    grid.run_all()
    grid.leave()
    return lambda trials: launch(refine=RefineSpec(("asr",), trials))


def test_a_driver_asks_for_a_threshold_and_the_next_launch_knows_it(
    refining: Callable[[int], ByHand],
) -> None:
    hand = refining(1)
    assert hand.driver.has_work
    assert "Further cells are suggested as the sweep goes." in hand.said
    assert hand.take("train").stage  # its model is gone, that of the new cell starts from it
    (asked,) = (c for c in hand.results.cells().values() if c.varied[ALPHA] == 0.02)
    assert asked.key in hand.plan.cells  # sqrt(0.01 x 0.04)
    hand.leave()
    # As after kill -9: its cell is to be run, and nothing else; the budget is used up.
    again = refining(1)
    assert set(again.plan.cells) == set(hand.plan.cells)
    assert "Further cells" not in again.said
    assert again.run_all() == {"train": 1, **dict.fromkeys(OWN, 1)}
    assert again.driver.result().done == 3
    again.leave()
    assert not refining(1).driver.has_work


def test_shared_models_stay_while_thresholds_may_follow(
    refining: Callable[[int], ByHand],
) -> None:
    hand = refining(2)
    for name in ("train", "unlearn", "evaluate"):
        hand.finish(hand.take(name))
    # Its own model has gone; the shared one stays for the second threshold.
    assert models(hand) == {"train": 1}
    assert hand.run_all() == {CELL: 2, "unlearn": 1, "evaluate": 1}
    assert models(hand) == {}


def test_a_failed_threshold_is_told_and_ends_the_search(refining: Callable[[int], ByHand]) -> None:
    hand = refining(9)
    hand.driver.worker_lost(hand.take("train"), "")  # the first stage of the new cell
    assert hand.driver.next_task() is Idle.finished
    assert not hand.driver.has_work
    result = hand.driver.result()
    assert (result.done, len(result.failed), result.missing) == (2, 1, 0)
    found = "between 0.01 and 0.04 (refined with 1 cell; 0.02 between them has no asr)"
    assert found in hand.said
    hand.leave()
    assert not refining(9).driver.has_work


def test_a_refused_threshold_ends_the_search_with_a_note(
    refining: Callable[[int], ByHand], planner: ToyPlanner
) -> None:
    planner.refused = {0.02}
    hand = refining(9)
    assert not hand.driver.has_work
    assert hand.driver.result().complete
    assert "defense.alpha=0.02 is refused" in hand.said


def test_a_sweep_without_thresholds_is_refused(launch: Callable[..., ByHand]) -> None:
    with pytest.raises(UserError, match="--refine needs an axis of thresholds"):
        launch("grid: {seed: [0, 1]}\n", refine=RefineSpec(("asr",), 9))
