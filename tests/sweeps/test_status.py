"""How a sweep stands: plans, leases, failures and a journal as launches leave them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from btu.errors import UserError
from orchestrator.plan.listed import ListedCell, ListedPlan
from orchestrator.plan.planner import Plan, RefusedCell, plan_sweep
from orchestrator.plan.work import Timings, needed, survey, victim_name
from orchestrator.results.folder import Results
from orchestrator.run.status import (
    CellState,
    Status,
    SweepState,
    all_statuses,
    sweep_status,
    tracked,
)
from orchestrator.sweep.load import load_sweep
from orchestrator.tracking.reader import RunState

if TYPE_CHECKING:
    from conftest import Ran

    from orchestrator.plan.planner import PlannedCell, Planner

NOW = 10_000.0


class Made:
    """A sweep of three seeds that was never run, and ways to change its state."""

    def __init__(self, results: Results, plan: Plan) -> None:
        self.results, self.plan, self.store = results, plan, results.store
        self.cells: list[PlannedCell] = list(plan.cells.values())

    def finish(self, key: str, name: str = "cell") -> None:
        folder = self.store.workspace(key)
        (folder / "record.json").write_text("{}")
        self.store.publish(key, folder, name, {})

    def status(self) -> Status:
        return sweep_status(self.results.output, self.results.name, NOW)

    def state_of(self, cell: PlannedCell) -> CellState:
        (state,) = [found.state for found in self.status().cells if found.key == cell.key]
        return state

    def leave(self, path: str, owner: str, **facts: Any) -> None:
        """Leave a lease or a launch as a process that has ended does."""
        gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        lease = self.store.leases.lease("a" * 24, owner)
        facts = json.loads(lease._content()) | facts
        self.store.storage.write(path, json.dumps({**facts, "pid": int(gone.stdout)}).encode())

    def note(self, time: float, event: str, key: str, launch: str = "l", **facts: Any) -> None:
        line = json.dumps({"time": time, "event": event, "key": key, "launch": launch, **facts})
        self.results.storage.append(f"{self.results.name}/journal.jsonl", line)


def stage_of(cell: PlannedCell, name: str) -> str:
    """Return the key of a cell's stage."""
    return next(stage.key for stage in cell.stage.inputs.values() if stage.name == name)


@pytest.fixture
def made(make_sweep: Callable[..., Path], planner: Planner) -> Made:
    sweep = load_sweep(make_sweep(grid={"seed": [0, 1, 2]}))
    plan = plan_sweep(sweep, planner)
    results = Results(sweep.output, sweep.name)
    results.store.prepare()
    results.write_plan(sweep, plan.cells.values())
    return Made(results, plan)


def test_what_nobody_ran_is_not_started(made: Made) -> None:
    status = made.status()
    assert status.state is SweepState.stopped
    assert status.counts[CellState.open] == 3
    assert status.stages[0] == 0


def test_a_finished_sweep_is_done(made: Made) -> None:
    for cell in made.cells:
        made.finish(cell.key)
    assert made.status().state is SweepState.done
    assert made.status().eta == 0.0


def test_a_failed_stage_fails_its_cell_with_its_reason(made: Made) -> None:
    first, *others = made.cells
    stage = stage_of(first, "poisoned fine-tune")
    failure = {"stage": "poisoned fine-tune", "reason": "loss is NaN", "code": "0.1+then"}
    made.store.fail(stage, {"key": stage, **failure})
    assert made.state_of(first) is CellState.failed
    (reason,) = [cell.reason for cell in made.status().cells if cell.reason]
    assert reason == "stage 'poisoned fine-tune' failed: loss is NaN"
    # Cells are left: the sweep did not come to its end.
    assert made.status().state is SweepState.stopped
    for cell in others:
        made.finish(cell.key)
    assert made.status().state is SweepState.failed


def test_what_a_live_process_computes_is_running(made: Made) -> None:
    cell = made.cells[0]
    stage = stage_of(cell, "poisoned fine-tune")
    made.note(9_900.0, "compute", stage)
    with made.store.leases.lease(stage, "tiny-1") as lease:
        assert lease.acquire()
        assert made.state_of(cell) is CellState.running
        (work,) = made.status().work
    assert (work.stage, work.pid, work.since) == ("poisoned fine-tune", os.getpid(), 9_900.0)
    assert not work.lost


def test_a_lease_of_a_dead_process_orphans_its_cell(made: Made) -> None:
    cell = made.cells[0]
    made.leave(f"leases/{cell.key}.json", "tiny-1")
    assert made.state_of(cell) is CellState.orphaned
    assert made.status().work[0].lost


def test_elsewhere_a_lease_is_lost_once_it_is_silent(made: Made) -> None:
    # Another machine's processes cannot be seen; its file was written at most 30 s ago, or not.
    cell = made.cells[0]
    path = f"leases/{cell.key}.json"
    made.leave(path, "tiny-1", host="another")
    file = Path(made.store.location) / path
    for silent, state in ((29.0, CellState.running), (31.0, CellState.orphaned)):
        os.utime(file, (NOW - silent, NOW - silent))
        assert made.state_of(cell) is state


def test_a_registered_launch_makes_it_running_until_its_process_is_gone(made: Made) -> None:
    made.store.leases.register_launch("tiny-1", "tiny", [])
    assert made.status().state is SweepState.running
    made.leave("launches/tiny-1.json", "tiny-1", sweep="tiny", keys=[])
    assert made.status().state is SweepState.stopped
    assert made.status().launches[0].lost


def test_launches_of_other_sweeps_are_none_of_its(made: Made) -> None:
    made.store.leases.register_launch("other-1", "other", [])
    assert made.status().launches == []
    assert made.status().state is SweepState.stopped


def test_refused_cells_are_told_until_a_launch_takes_them(
    made: Made, make_sweep: Callable[..., Path]
) -> None:
    sweep = load_sweep(make_sweep(grid={"seed": [0, 1, 2]}))
    taken = made.cells[0].varied
    refused = [RefusedCell({"seed": 9}, "no such rows"), RefusedCell(taken, "was too long")]
    made.results.write_plan(sweep, made.cells, refused)
    assert made.status().refused == [RefusedCell({"seed": 9}, "no such rows")]


def test_a_sweep_of_refused_cells_alone_failed(
    made: Made, make_sweep: Callable[..., Path], run_cli: Callable[..., Ran], tmp_path: Path
) -> None:
    sweep = load_sweep(make_sweep(grid={"seed": [0, 1, 2]}))
    bare = Results(sweep.output, "bare", made.store)
    bare.write_plan(sweep, [], [RefusedCell({"seed": 9}, "no such rows")])
    status = sweep_status(sweep.output, "bare", NOW)
    assert (status.cells, status.state) == ([], SweepState.failed)
    # Killed before its first cell: nothing was refused, and nothing is done.
    assert replace(status, refused=[]).state is SweepState.stopped
    done = run_cli("status", "bare", "--output", tmp_path / "runs")
    assert (done.code, "bare: failed" in done.out) == (1, True)


# Time -------------------------------------------------------------------------------------------


def time_all(made: Made, seconds: float, launch: str = "l") -> None:
    """Record these times for each kind of stage, in the first cell, one after the other."""
    cell = made.cells[0]
    clock = 0.0
    for stage in (*cell.stage.inputs.values(), cell.stage):
        made.note(clock, "compute", stage.key, launch)
        clock += seconds
        made.note(clock, "end", stage.key, launch, outcome="done")


def test_time_left_is_that_of_the_stages_left(made: Made) -> None:
    time_all(made, 10.0)
    first = made.cells[0]
    for stage in (*first.stage.inputs.values(), first.stage):
        made.finish(stage.key, stage.name)
    status = made.status()
    done, all_ = status.stages
    # Every stage takes 10 s, and one ran at a time.
    assert status.seconds_left == pytest.approx(10.0 * (all_ - done))
    assert status.eta == status.seconds_left


def test_what_runs_has_come_so_far(made: Made) -> None:
    time_all(made, 10.0)
    before = made.status().seconds_left
    stage = stage_of(made.cells[1], "poisoned fine-tune")
    made.note(NOW - 4.0, "compute", stage)
    with made.store.leases.lease(stage, "l") as lease:
        assert lease.acquire()
        after = made.status().seconds_left
    assert before is not None
    assert after == pytest.approx(before - 4.0)


def test_two_at_once_take_half_the_time(made: Made) -> None:
    time_all(made, 10.0, launch="before")
    for cell in made.cells[:2]:
        made.note(9_000.0, "compute", stage_of(cell, "poison"), launch="last")
    status = made.status()
    assert status.seconds_left is not None
    assert status.at_once == 2
    assert status.eta == pytest.approx(status.seconds_left / 2)


def test_without_timings_there_is_no_eta(made: Made) -> None:
    status = made.status()
    assert status.seconds_left is None
    assert status.eta is None
    assert "poisoned fine-tune" in status.untimed


def test_timings_of_the_store_serve_until_there_are_own(made: Made) -> None:
    stages = {stage.name for stage in made.cells[0].stage.closure()}
    # 20 s for 2 stages: 10 s each.
    rows = [
        {"stage": s, "victim": "x", "device": "cpu", "units": 0, "seconds": 20.0, "count": 2}
        for s in stages
    ]
    made.store.add_timings("old", rows)
    status = made.status()
    assert status.seconds_left == pytest.approx(10.0 * status.stages[1])


def drop(made: Made, *stages: str) -> None:
    """Let the first cell have these stages, of which the models are gone since."""
    for name in stages:
        key = stage_of(made.cells[0], name)
        made.finish(key, name)
        made.store.drop(key)


def test_a_removed_model_that_is_read_again_is_left(made: Made) -> None:
    time_all(made, 10.0)
    drop(made, "poisoned fine-tune")
    everything = made.status().stages[1]
    # Nothing else is there: clean tuning, evaluation and exposure read the model.
    assert made.status().stages == (0, everything)
    assert made.status().seconds_left == pytest.approx(10.0 * everything)


@pytest.mark.parametrize("missing", [(), ("evaluate defended",), ("unlearn", "evaluate defended")])
def test_what_is_left_is_what_a_launch_would_compute(made: Made, missing: tuple[str, ...]) -> None:
    time_all(made, 10.0)
    first, *others = made.cells
    for cell in others:
        made.finish(cell.key)
    models = [stage.name for stage in first.stage.inputs.values() if stage.model]
    for stage in first.stage.inputs.values():
        if stage.name not in (*models, *missing):
            made.finish(stage.key, stage.name)
    drop(made, *(name for name in models if name not in missing))
    todo = needed([first.stage], made.store.committed(), made.store.dropped())
    # The scorer reads no model, whose records are there.
    assert bool(missing) == any(stage.model for stage in todo.values())
    assert made.status().seconds_left == pytest.approx(10.0 * len(todo))


def test_stages_take_as_long_as_their_rows(made: Made) -> None:
    stages = list(made.cells[0].stage.closure())
    # A second for each row, and for each stage without rows.
    rows = [
        {"stage": s.name, "victim": "x", "device": "cpu", "units": s.units,
         "seconds": float(s.units or 1), "count": 1}
        for s in stages
    ]  # fmt: skip
    made.store.add_timings("old", rows)
    work = survey(made.plan, committed=(), dropped=(), failed={}, timings=Timings(rows, "cpu"))
    assert made.status().seconds_left == work.seconds
    assert work.seconds is not None
    assert work.seconds > 3 * len(stages)


def test_a_plan_that_was_read_is_surveyed_like_the_plan_itself(made: Made) -> None:
    first = made.cells[0].stage
    dropped = {stage.key for stage in first.closure() if stage.model}
    committed = {stage.key for stage in made.cells[1].stage.closure()} - dropped
    rows = [{"stage": s.name, "victim": victim_name(s), "device": "cpu", "units": s.units,
             "seconds": 3.0, "count": 1} for s in first.closure()]  # fmt: skip
    known: dict[str, Any] = {
        "committed": committed, "dropped": dropped, "timings": Timings(rows, "cpu"),
        "failed": {stage_of(made.cells[2], "unlearn"): "bad luck"},
    }  # fmt: skip
    read = {key: cell.stage for key, cell in made.results.cells().items()}
    plan = ListedPlan({key: ListedCell(read[key]) for key in made.plan.cells if read[key]})
    found = survey(plan, **known)
    assert found == survey(made.plan, **known)
    assert found.seconds
    assert found.model_bytes
    assert len(found.failed) == 1


# A plan of the version before --------------------------------------------------------------------


def write_old_plan(made: Made) -> None:
    """Write the plan as the previous version did: with the names of stages alone."""
    (name,) = made.results.storage.names("tiny/plans")
    path = f"tiny/plans/{name}"
    plan = json.loads(made.results.storage.read(path))
    stages = plan.pop("stages")
    for cell in plan["cells"]:
        cell["stages"] = {key: stages[key]["name"] for key in cell["stages"]}
    made.results.storage.write(path, json.dumps(plan).encode())


def test_of_an_old_plan_all_but_the_time_is_known(
    made: Made, run_cli: Callable[..., Ran], tmp_path: Path
) -> None:
    time_all(made, 10.0)
    drop(made, "poisoned fine-tune")
    made.finish(made.cells[1].key)
    made.leave(f"leases/{made.cells[2].key}.json", "tiny-1")
    new = made.status()
    write_old_plan(made)
    old = made.status()
    assert (old.cells, old.work, old.stages[1]) == (new.cells, new.work, new.stages[1])
    # Whether the removed model is needed again is not known: it counts as done.
    assert (new.stages[0], old.stages[0]) == (1, 2)
    assert (old.seconds_left, old.eta, old.unlisted) == (None, None, 2)
    done = run_cli("status", "tiny", "--output", tmp_path / "runs")
    assert done.code == 1
    assert "the plan is of an earlier version; the next launch" in " ".join(done.out.split())


def test_the_next_launch_lists_the_stages_of_an_old_plan(
    made: Made, make_sweep: Callable[..., Path]
) -> None:
    time_all(made, 10.0)
    before = made.status()
    write_old_plan(made)
    (name,) = made.results.storage.names("tiny/plans")
    # Whichever of the two plans is read first.
    for moved in ("tiny/plans/0.json", "tiny/plans/z.json"):
        made.results.storage.write(moved, made.results.storage.read(f"tiny/plans/{name}"))
    made.results.storage.remove(f"tiny/plans/{name}")
    made.results.write_plan(
        load_sweep(make_sweep(grid={"seed": [0, 1, 2]})), made.plan.cells.values()
    )
    assert made.status() == before


def test_a_finished_sweep_of_an_old_plan_is_done(made: Made) -> None:
    write_old_plan(made)
    for cell in made.cells:
        made.finish(cell.key)
    status = made.status()
    assert (status.state, status.unlisted, status.eta) == (SweepState.done, 0, 0.0)


# MLflow -----------------------------------------------------------------------------------------


def test_mlflow_is_held_against_the_disk(made: Made) -> None:
    one, two, three = made.cells
    made.finish(one.key)
    made.finish(two.key)
    runs = [
        RunState("a", one.key, "FINISHED"),
        RunState("b", three.key, "RUNNING"),
        RunState("c", "", "RUNNING"),
    ]
    found = tracked(made.status(), "here", runs)
    # `two` has a result and no run; no process computes `three`; a run of no cell does not count.
    assert (found.finished, found.running, found.orphaned, found.missing) == (1, 1, ["b"], 1)
    with made.store.leases.lease(three.key, "tiny-1") as lease:
        assert lease.acquire()
        assert tracked(made.status(), "here", runs).orphaned == []


def test_what_a_sync_would_write_is_missing(made: Made) -> None:
    one, two, three = made.cells
    for cell in made.cells:
        made.finish(cell.key)
    runs = [
        RunState("a", one.key, "FINISHED", "ours"),
        RunState("b", one.key, "FINISHED", "ours", deleted=True),  # of an earlier result
        RunState("c", two.key, "FINISHED", "ours", deleted=True),
        RunState("d", three.key, "FINISHED", "theirs"),
    ]
    found = tracked(made.status(), "here", runs, "ours", "btu sync tiny")
    assert (found.finished, found.missing, found.deleted) == (2, 2, 1)
    assert found.sync == "btu sync tiny"
    # Of another status than the result, or cut short: a sync completes or replaces it.
    for changed in (
        RunState("a", one.key, "FAILED", "ours"),
        RunState("a", one.key, "RUNNING", "ours"),
        RunState("a", one.key, "FINISHED", "ours", whole=False),
    ):
        found = tracked(made.status(), "here", [changed, *runs[1:]], "ours")
        assert (found.missing, found.deleted) == (3, 2 if not changed.whole else 1)
    # Runs that were cut short are deleted by a sync.
    for cut in (runs[2]._replace(whole=False), runs[2]._replace(status="KILLED")):
        assert tracked(made.status(), "here", [cut], "ours").deleted == 0


# Command ----------------------------------------------------------------------------------------


def test_the_command_tells_and_exits_by_the_state(
    made: Made, run_cli: Callable[..., Ran], tmp_path: Path
) -> None:
    done = run_cli("status", "tiny", "--output", tmp_path / "runs")
    assert done.code == 1
    assert "tiny: stopped" in done.out
    assert "3 cells: 0 done, 0 running, 0 failed, 0 orphaned, 3 not started; 0 refused" in done.out
    made.store.leases.register_launch("tiny-1", "tiny", [])
    assert run_cli("status", "tiny", "--output", tmp_path / "runs").code == 3
    made.store.leases.release_launch("tiny-1")
    for cell in made.cells:
        made.finish(cell.key)
    assert run_cli("status", "tiny", "--output", tmp_path / "runs", "--watch").code == 0


def test_watching_outlasts_a_server_that_does_not_answer(
    made: Made, run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.store.leases.register_launch("tiny-1", "tiny", [])
    answers = iter([[RunState("a", made.cells[0].key, "FINISHED")]])

    class Server:
        def __init__(self, *_: object) -> None:
            self.found = next(answers, None)
            if self.found is None:
                raise UserError("the server does not answer.")

        def states(self) -> list[RunState] | None:
            return self.found

    def end(_: float) -> None:
        made.store.leases.release_launch("tiny-1")

    monkeypatch.setattr("orchestrator.tracking.reader.MlflowSource", Server)
    monkeypatch.setattr("orchestrator.cli.status.time.sleep", end)
    where = ("--output", tmp_path / "runs", "--tracking-uri", "http://127.0.0.1:9")
    done = run_cli("status", "tiny", *where, "--watch")
    assert done.code == 1, done.err
    shown = " ".join(done.out.split())
    assert "1 finished, 0 failed. As of an earlier look: the server does not answer." in shown
    # The first look has nothing to fall back on.
    done = run_cli("status", "tiny", *where)
    assert (done.code, "does not answer" in done.err) == (2, True)


def test_what_stages_took_is_shown(made: Made, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    first, second = made.cells[:2]
    # 2 s and 4 s, 1 and 3 GB; what was there already took nothing.
    for at, (cell, seconds, memory) in enumerate(((first, 2.0, 1e9), (second, 4.0, 3e9))):
        took = {"seconds": seconds, "memory": memory, "gpu_memory": 0, "device": "cpu"}
        made.note(at, "end", stage_of(cell, "poisoned fine-tune"), outcome="done", **took)
    took = {"seconds": 0.25, "memory": 1e9, "gpu_memory": 5e8, "device": "cuda:0"}
    made.note(3, "end", first.key, outcome="done", **took)
    made.note(4, "end", stage_of(first, "poison"), outcome="done")
    costs = made.status().costs
    assert costs == (
        ("poisoned fine-tune", 2, 3.0, 3e9, 0, ("cpu",)), ("cell", 1, 0.25, 1e9, 5e8, ("cuda:0",)),
    )  # fmt: skip
    shown = run_cli("status", "tiny", "--output", tmp_path / "runs", "--stages").out
    for said in ("3.0 GB", "500.0 MB", "0.25 s", "cuda:0"):
        assert said in shown
    assert "3.0 GB" not in run_cli("status", "tiny", "--output", tmp_path / "runs").out


@pytest.mark.parametrize("watch", [True, False])
def test_the_page_of_a_running_sweep_is_read_again_until_it_ends(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: bool
) -> None:
    from orchestrator.cli import live_page

    written: list[int] = []
    clock = [0.0]

    def write(source: object, path: Path, reload: int) -> None:
        written.append(reload)
        clock[0] += 1.0  # it takes a second to draw

    monkeypatch.setattr("orchestrator.report.html.write_page", write)
    monkeypatch.setattr("orchestrator.results.source.Snapshot", lambda source: source)
    monkeypatch.setattr(live_page.time, "monotonic", lambda: clock[0])
    page = live_page.LivePage(tmp_path / "x.html", "tiny", str(tmp_path / "runs"), watch=watch)
    made.store.leases.register_launch("tiny-1", "tiny", [])

    def at(seconds: float) -> int:
        clock[0] = seconds
        page.update(made.status())
        return len(written)

    assert (at(0), page.written) == (0, False)  # no cell has ended
    made.finish(made.cells[0].key)
    assert (at(5), page.written) == (1, True)
    assert at(60) == 1  # nothing new
    made.finish(made.cells[1].key)
    assert at(61) == 2
    made.finish(made.cells[2].key)
    assert at(70) == 2  # not within 30 s
    assert at(92) == 3
    made.store.leases.release_launch("tiny-1")
    assert at(93) == 4
    assert at(200) == 4
    assert written == [30, 30, 30, 0] if watch else [0, 0, 0, 0]


def test_json_has_every_cell(made: Made, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    made.finish(made.cells[0].key)
    found = json.loads(run_cli("status", "tiny", "--output", tmp_path / "runs", "--json").out)
    states = {cell["key"]: cell["state"] for cell in found["cells"]}
    assert states == {cell.key: "not started" for cell in made.cells} | {made.cells[0].key: "done"}
    assert found["mlflow"] is None
    assert "--tracking-uri names another store" in found["untracked"]
    assert "poisoned fine-tune" in found["untimed"]


def test_without_a_name_every_sweep_has_a_line(
    made: Made, run_cli: Callable[..., Ran], tmp_path: Path
) -> None:
    done = run_cli("status", "--output", tmp_path / "runs")
    assert done.code == 0
    assert "tiny" in done.out
    assert "3 not started" in done.out
    assert [status.name for status in all_statuses(str(tmp_path / "runs"))] == ["tiny"]


def test_looking_changes_nothing(made: Made, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    made.leave(f"leases/{made.cells[0].key}.json", "tiny-1")
    made.finish(made.cells[1].key)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    run_cli("status", "tiny", "--output", tmp_path / "runs")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")} == before


def test_looking_reads_no_weights(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("the weights are on another machine")

    monkeypatch.setattr("orchestrator.plan.work._weights", refused)
    assert made.status().counts[CellState.open] == 3


def test_mistakes_are_told(made: Made, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown sweep in .* 'tini'; did you mean 'tiny'\?"):
        sweep_status(str(tmp_path / "runs"), "tini")
    assert "no sweep was launched" in run_cli("status", "--output", tmp_path / "none").err
    output = ("--output", tmp_path / "runs")
    assert "needs the name of a sweep" in run_cli("status", *output, "--watch").err
    assert "exclude each other" in run_cli("status", "tiny", *output, "--watch", "--json").err
    uri = f"sqlite:///{tmp_path}/none.db"
    assert "does not exist" in run_cli("status", "tiny", *output, "--tracking-uri", uri).err
    assert not (tmp_path / "none.db").exists()
