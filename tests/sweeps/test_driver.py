"""A launch without Ray: what runs next, and what follows from every outcome.

Nothing is computed: tests report what workers would.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from driving import ALPHA, ONE, OWN, SHARED, TWO, Launches, ToyPlanner, begin, models
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
from orchestrator.run.schedule import CELL, Task
from orchestrator.run.worker import WAIT_SECONDS, Outcome, Report, StageCall
from orchestrator.store.lease import Leases
from orchestrator.store.store import Store
from orchestrator.sweep.load import load_sweep


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launches]:
    """A function that begins a launch. Called again, it is the next launch of the same sweep."""
    made = Launches(tmp_path)
    yield made
    made.leave()


# Done ------------------------------------------------------------------------------------------


def test_every_stage_runs_once_after_its_inputs(launch: Launches) -> None:
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


def test_there_is_nothing_to_run_while_an_input_is_computed(launch: Launches) -> None:
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
    launch: Launches,
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


def test_the_next_launch_runs_what_is_left(launch: Launches) -> None:
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


def test_what_another_launch_computed_is_shown_as_well(launch: Launches) -> None:
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


def test_a_cell_that_mlflow_misses_is_named(launch: Launches) -> None:
    hand = launch(ONE)
    while (task := hand.take()).stage.name != CELL:
        hand.finish(task)
    hand.finish(task, facts={"asr": 0.5}, untracked="ConnectionError: away")
    assert "[1/1] alpha=0.01: asr 0.500" in hand.said
    assert "not in MLflow yet: alpha=0.01 (ConnectionError: away)" in hand.said


def test_a_damaged_result_is_computed_again(launch: Launches) -> None:
    first = launch(ONE)
    first.run_all()
    first.leave()
    (key,) = first.plan.cells
    (first.store.fetch(key) / "result.json").write_text("{}")
    second = launch(ONE)
    assert f"The stored result {key} is damaged" in second.said
    assert second.run_all() == {CELL: 1}


def test_times_are_kept_for_estimates_summed_by_stage(launch: Launches) -> None:
    hand = launch()
    hand.run_all()
    hand.driver.save_timings()
    rows = {row["stage"]: row for row in hand.store.timings()}
    # Two of 2 s each; the cell's rows are not work of its own.
    assert rows["unlearn"] == {
        "stage": "unlearn", "victim": "/nowhere", "device": "cpu", "units": 2, "seconds": 4.0,
        "count": 2,
    }  # fmt: skip
    assert rows["train"]["seconds"] == 2.0


def test_a_disk_too_full_for_the_times_is_no_error(
    launch: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    hand.run_all()
    monkeypatch.setattr(hand.store, "add_timings", full)
    hand.driver.save_timings()
    assert hand.store.timings() == []


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_nothing_from_the_journal_alone(
    launch: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    monkeypatch.setattr(hand.results.storage, "append", full)
    hand.run_all()
    assert hand.driver.result().complete


# Another launch --------------------------------------------------------------------------------


def test_what_another_launch_computes_is_passed_over(launch: Launches) -> None:
    hand = launch("grid: {seed: [0, 1], defense.alpha: [0.01]}\n")
    other = Store(hand.store.location)
    first = hand.plan.cells[next(iter(hand.plan.cells))].stage.inputs["rows"]
    with other.leases.lease(first.key, "other") as lease:
        assert lease.acquire()
        assert hand.take("rows").stage.key != first.key
        assert hand.driver.next_task() is Idle.later
    assert hand.take("rows").stage.key == first.key


def test_where_all_is_with_another_launch_a_node_waits_for_it(
    launch: Launches,
) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    other = Store(hand.store.location)
    lease = other.leases.lease(cell.stage.inputs["rows"].key, "other")
    assert lease.acquire()
    assert hand.driver.next_task() is Idle.elsewhere
    # One wait at a time.
    assert hand.driver.next_task() is Idle.later
    hand.driver.waited()
    assert hand.driver.next_task() is Idle.elsewhere
    assert hand.said.count("another launch computes all that is left; waiting for it.") == 1
    lease.release()
    hand.driver.waited()
    hand.now += 2
    assert hand.run_all()[CELL] == 1


def test_a_stage_that_a_worker_found_busy_is_left_alone_for_a_while(
    launch: Launches,
) -> None:
    hand = launch(ONE)
    task = hand.take("rows")
    other = Store(hand.store.location)
    # Its holder is on another machine, and silent: it may still be alive.
    other.storage.write(f"leases/{task.stage.key}.json", json.dumps({"owner": "other"}).encode())
    hand.driver.ended(task, Report(Outcome.busy))
    assert hand.events("end")[-1]["outcome"] == "busy"
    assert hand.driver.next_task() is Idle.elsewhere
    hand.driver.waited()
    other.storage.remove(f"leases/{task.stage.key}.json")
    hand.now += WAIT_SECONDS + 1
    assert hand.take("rows").stage is task.stage
    assert hand.driver.result().failed == {}


def test_an_expired_lease_is_removed_and_its_stage_runs(launch: Launches) -> None:
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


def test_lost_inputs_are_computed_again(launch: Launches) -> None:
    hand = launch(ONE)
    for name in SHARED:
        hand.finish(hand.take(name))
    task = hand.take("unlearn")
    lost = task.stage.inputs["model"].key
    hand.driver.ended(task, Report(Outcome.inputs, reason="model (damaged)", lost=(lost,)))
    assert "'unlearn' needs inputs computed again: model (damaged)" in hand.said
    assert hand.run_all() == {"train": 1, **dict.fromkeys(OWN, 1)}


def test_inputs_that_are_damaged_again_and_again_are_a_failure(
    launch: Launches,
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
    launch: Launches,
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


def test_without_memory_a_stage_is_tried_alone_and_in_parts(launch: Launches) -> None:
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


def test_a_full_disk_stops_the_launch_and_fails_nothing(launch: Launches) -> None:
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
    launch: Launches, monkeypatch: pytest.MonkeyPatch
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


def test_a_failure_takes_its_own_cells_alone_and_stays(launch: Launches) -> None:
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
    # Not run again unless it is asked for.
    again = launch()
    assert "1 cells failed earlier and are not run again: stage 'unlearn' failed" in again.said
    assert not again.driver.has_work
    again.leave()
    retried = launch(retry_failed=True)
    # The shared model was removed when no stage seemed to need it any more.
    assert retried.run_all() == {"train": 1, **dict.fromkeys(OWN, 1)}
    assert retried.driver.result().complete


def test_so_many_failures_stop_the_launch(launch: Launches) -> None:
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
def test_a_stage_that_is_given_up_is_a_failure(launch: Launches, error: str, last: str) -> None:
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
    launch: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch("grid: {seed: [0, 1], defense.alpha: [0.01]}\n")
    monkeypatch.setattr(hand.store, "fail", full)
    hand.driver.worker_lost(hand.take("rows"), "")
    assert "was not recorded: [Errno 28] No space left" in hand.said
    assert hand.driver.stopped == ""
    assert hand.run_all()[CELL] == 1


def test_workers_that_die_in_a_row_stop_the_sweep(launch: Launches) -> None:
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


def test_a_launch_is_there_for_others_until_it_ends(launch: Launches) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    keys = {stage.key for stage in cell.stage.closure()}
    assert hand.store.leases.in_use() == keys
    assert hand.store.leases.in_use(but=hand.driver.id) == set()
    hand.leave()
    assert hand.store.leases.in_use() == set()


def test_a_launch_beats_and_reports_once_that_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.001)
    beats = threading.Semaphore(0)

    def refused(self: Leases, launch_id: str) -> None:
        beats.release()
        raise ConnectionError("away")

    monkeypatch.setattr(Leases, "heartbeat_launch", refused)
    hand = begin(tmp_path, ONE, ToyPlanner())
    for _ in range(3):
        assert beats.acquire(timeout=60)
    hand.leave()
    assert hand.said.count("cannot be written (away); until it can, gc on another machine") == 1


def test_a_launch_that_breaks_off_leaves_the_terminal_and_the_store(
    tmp_path: Path,
) -> None:
    # Otherwise the terminal is left without a cursor.
    file = tmp_path / "toy.yaml"
    file.write_text(f"output: {tmp_path / 'runs'}\ncontrols: []\n{ONE}")
    sweep, plan = load_sweep(file), Plan()
    planner = ToyPlanner()
    planner.add(plan, sweep.cells())
    screen = io.StringIO()
    progress = SweepProgress(Console(file=screen, width=120, force_terminal=True))
    results = Results(sweep.output, sweep.name)
    driver = Driver(sweep, plan, planner, progress, results)
    driver.prepare()
    with pytest.raises(UserError, match="no node"), driver.underway():
        raise UserError("no node can run a stage.")
    try:
        assert screen.getvalue().count("\x1b[?25h") == screen.getvalue().count("\x1b[?25l") == 1
    finally:
        progress.end()
    assert results.store.leases.in_use() == set()


def test_what_nobody_stopped_and_is_not_done_was_interrupted(
    launch: Launches,
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


def test_a_task_that_reached_no_worker_is_ready_again(launch: Launches) -> None:
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


def test_models_go_with_their_last_reader(launch: Launches) -> None:
    hand = launch()
    ran = []
    while isinstance(task := hand.driver.next_task(), Task):
        hand.finish(task)
        ran.append((task.stage.name, dict(models(hand))))
    assert ("train", {"train": 1}) in ran
    assert ran[-1] == (CELL, {})
    # The shared model went when the second one had been unlearned from it.
    assert max(sum(there.values()) for _, there in ran) == 2


def test_models_stay_where_they_are_to_be_kept(launch: Launches) -> None:
    hand = launch(TWO + "store: {keep: models}\n")
    hand.run_all()
    hand.driver.drop_models()
    assert models(hand) == {"train": 1, "unlearn": 2}
    hand.leave()
    # A launch that keeps none removes what is left, though it runs nothing.
    again = launch()
    again.driver.drop_models()
    assert models(again) == {}


def test_models_stay_while_something_is_left_to_run(launch: Launches) -> None:
    hand = launch(TWO + "store: {keep: models}\n")
    hand.run_all()
    hand.leave()
    more = launch("grid: {defense.alpha: [0.01, 0.04, 0.05]}\n")
    more.driver.drop_models()
    assert models(more) == {"train": 1, "unlearn": 2}


def test_models_stay_that_another_launch_needs(launch: Launches) -> None:
    hand = launch(ONE)
    (cell,) = hand.plan.cells.values()
    train = cell.stage.inputs["train"].key
    hand.store.leases.register_launch("other", "other", [train])
    hand.run_all()
    assert models(hand) == {"train": 1}
    hand.store.leases.release_launch("other")
    hand.driver.drop_models()
    assert models(hand) == {}


def test_models_stay_that_another_sweep_has_not_finished_with(
    launch: Launches,
) -> None:
    # Launched, and stopped before anything ran.
    launch("name: other\ngrid: {defense.alpha: [0.07]}\n").leave()
    hand = launch()
    hand.run_all()
    hand.driver.drop_models()
    assert models(hand) == {"train": 1}


def test_a_model_that_cannot_be_removed_is_named(
    launch: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = launch(ONE)
    monkeypatch.setattr(hand.store, "drop", full)
    hand.run_all()
    assert hand.said.count("was not removed: [Errno 28] No space left on device") == 2
    assert hand.driver.result().complete
