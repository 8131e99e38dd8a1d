"""One launch as a state machine: which stage runs next, and what follows from how it ended.

Without Ray. Whoever runs the stages asks `Driver.next_task` for work, and reports when a worker
starts it (`started`) and how it ended (`ended`, or `worker_lost` if its workers died). The store is
authoritative: a stage with a result there is not run again. So a launch may be killed at any
moment, and the same command resumes it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from btu.errors import UserError
from btu.provenance import code_version
from btu.stages import RECORD, digest_of
from orchestrator.plan.planner import Plan, Planner
from orchestrator.plan.work import Timings, Work, blocked, survey, timings_for, victim_name
from orchestrator.results.folder import Results
from orchestrator.run.elsewhere import Elsewhere
from orchestrator.run.progress import SweepProgress
from orchestrator.run.refine import Refinement, RefineSpec
from orchestrator.run.schedule import CELL, Schedule, Task
from orchestrator.run.study import NoStudy, Study, Suggestions, study_of
from orchestrator.run.worker import Outcome, Report, StageCall
from orchestrator.store import places
from orchestrator.store.lease import HEARTBEAT_S
from orchestrator.store.storage import below
from orchestrator.store.store import Damaged, Missing
from orchestrator.sweep.sweep import Cell, Sweep

# How often a stage is tried again after its worker died (killed, node lost). An error that a stage
# raises is a result, and not tried again.
WORKER_RETRIES = 2
# When the workers of this many stages in a row die, the machines are at fault, not the stages.
GIVEN_UP_IN_A_ROW = 3
# `LaunchResult.stopped` of a launch that ended before its work did, with no other reason.
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class LaunchResult:
    """The end of a launch.

    done: how many cells have a result.
    failed: reasons by cell.
    missing: how many cells have neither.
    seconds: how long the launch took.
    stopped: why it ended before its work did; empty if it did not.
    ray_gone: whether Ray went away under it: its client would keep this process from ending.
    """

    done: int
    failed: dict[str, str]
    missing: int
    seconds: float
    stopped: str = ""
    ray_gone: bool = False

    @property
    def complete(self) -> bool:
        return not self.failed and not self.missing


class Idle(StrEnum):
    """Why there is no task to run.

    later: nothing can start before a running stage has ended.
    elsewhere: another launch computes all that is left. Wait a while, then call `Driver.waited`.
    finished: nothing is left to run, or the launch was stopped and nothing runs any more.
    """

    later = "later"
    elsewhere = "elsewhere"
    finished = "finished"


class Driver:
    """The state of one launch.

    id: names the launch, in leases and in the journal.
    stopped: why no further task is handed out; empty while tasks are.
    slots: how many stages run at once, about. Set it once the nodes are known.
    """

    def __init__(
        self,
        sweep: Sweep,
        plan: Plan,
        planner: Planner,
        progress: SweepProgress,
        results: Results,
        *,
        max_failures: int | None = None,
        refine: RefineSpec | None = None,
        retry_failed: bool = False,
        cell_ended: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read and write nothing yet.

        sweep: what is launched.
        plan: its cells. It grows by those that a study suggests.
        planner: checks suggested cells.
        progress: shows the launch to the user.
        results: of the sweep, with the store that the stages are published in.
        max_failures: stop after this many failed stages.
        refine: place further thresholds where the plan's cells differ.
        retry_failed: run again what failed in an earlier launch.
        cell_ended: called whenever a cell has its result.
        clock: monotonic seconds.
        """
        self._sweep, self._plan, self._planner, self._progress = sweep, plan, planner, progress
        self._results, self._store = results, results.store
        self._max_failures, self._refine, self._retry_failed = max_failures, refine, retry_failed
        self._on_cell, self._clock, self._began = cell_ended, clock, clock()
        self.id = f"{sweep.name}-{uuid.uuid4().hex[:12]}"
        self.stopped = ""
        self._elsewhere = Elsewhere(self._store, self.id, clock)
        self._suggestions: Suggestions
        self._schedule: Schedule
        self._timings: Timings
        self._running: set[str] = set()  # keys of tasks that were handed out and have not ended
        self._waiting = self._waited = False  # for another launch: now, and ever
        self._rows: list[dict[str, Any]] = []  # timings of this launch
        self._failures = self._given_up = 0

    # Before -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check the store and take in what earlier launches of a study suggested.

        Raises:
            UserError: the store cannot be used; there are no thresholds to refine.
        """
        self._store.prepare()
        self._suggestions = Suggestions(
            self._study(), self._plan, self._planner, self._results, self._progress.note
        )
        self._suggestions.resume()

    @contextmanager
    def underway(self) -> Iterator[None]:
        """Register the launch, keep it alive for others to see, and schedule its stages.

        On leaving, the launch has ended.
        """
        self._results.write_plan(self._sweep, self._plan.cells.values(), self._plan.refused)
        # Before looking at the store: from now on nobody removes what this launch needs.
        self._register()
        try:
            with self._heartbeat():
                self._make_schedule()
                try:
                    yield
                finally:
                    self._progress.end()
        finally:
            self._results.end_journal()
            self._store.leases.release_launch(self.id)

    @property
    def has_work(self) -> bool:
        """Whether stages are left to run, or may still be suggested."""
        return bool(self._schedule.unfinished) or self._suggestions.searching

    @property
    def slots(self) -> int:
        return self._schedule.slots

    @slots.setter
    def slots(self, count: int) -> None:
        self._schedule.slots = count

    def _study(self) -> Study:
        if self._refine is not None:
            launched = {key: cell.varied for key, cell in self._results.cells().items()}
            coordinates = [cell.varied for cell in self._plan.cells.values()]
            return Refinement(self._sweep, coordinates, self._refine, launched, self._key_of)
        if self._sweep.sequential is None:
            return NoStudy()
        study = study_of(self._sweep.sequential, self._sweep)
        if self._retry_failed:
            study.retry_failed()
        return study

    def _key_of(self, cell: Cell) -> str:
        """Return the key of a cell.

        Raises:
            UserError: it cannot run.
        """
        found = Plan()
        self._planner.add(found, [cell])
        if found.refused:
            raise UserError(found.refused[0].reason)
        return next(iter(found.cells))

    def _make_schedule(self) -> None:
        store, plan = self._store, self._plan
        committed = self._verified()
        if self._retry_failed:
            for key in self._keys() & store.failed():
                store.clear_failure(key)
        dropped = store.dropped()
        failed = {record["key"]: record["reason"] for record in store.failures()}
        timings = self._timings = timings_for(store.timings(), self._sweep.resources)
        work = survey(plan, committed=committed, dropped=dropped, failed=failed, timings=timings)
        todo = [
            cell.stage
            for cell in plan.cells.values()
            if cell.key not in committed and cell.key not in work.failed
        ]
        self._schedule = Schedule(
            todo,
            committed=committed,
            dropped=dropped,
            failed=failed,
            timings=timings,
            computed=[cell.stage for cell in plan.cells.values() if cell.key in committed],
            facts=self._facts_of,
        )
        self._tell_study()
        self._progress.begin(work, self._schedule, len(plan.cells), self._suggestions.searching)
        self._check_space(work)

    def _facts_of(self, key: str) -> str | None:
        """Return the digest of the facts that a stage reported; None if they cannot be read."""
        try:
            return digest_of(self._store.read_json(key, RECORD)["facts"])
        except (Damaged, Missing, FileNotFoundError):
            return None

    def _verified(self) -> set[str]:
        """Return the committed keys, after reading and checking the results of this sweep's cells.

        An object store checks its own files, and would have to send all of them: there the results
        are not read.
        """
        committed = self._store.committed()
        for key in self._plan.cells:
            if key in committed and self._store.storage.local:
                try:
                    self._store.fetch(key)
                except (Damaged, Missing):
                    committed.discard(key)
        return committed

    def _check_space(self, work: Work) -> None:
        """Warn if the disk may become full. Only a warning: the bytes needed are an estimate."""
        free = self._store.storage.free_bytes()
        models = work.models if self._sweep.store.keep == "models" else work.model_bytes
        if free is not None and free < work.small + models:
            self._progress.note(
                f"{self._store.location} has {free / 1e9:.1f} GB free and the sweep may need more "
                f"(btu plan estimates how much); a full disk stops it, but no result is lost."
            )

    def _keys(self) -> set[str]:
        """Return the keys of all cells of the plan and of the stages they depend on."""
        return {
            key
            for cell in self._plan.cells.values()
            for key in (cell.key, *(stage.key for stage in cell.stage.inputs.values()))
        }

    def _register(self) -> None:
        self._store.leases.register_launch(self.id, self._sweep.name, self._keys())

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Show other launches, and gc, that this one still runs."""
        done = threading.Event()

        def beat() -> None:
            warned = False
            while not done.wait(HEARTBEAT_S):
                try:
                    self._store.leases.heartbeat_launch(self.id)
                except Exception as error:  # each client of an object store has its own
                    if not warned:
                        self._progress.note(
                            f"{self._store.location} cannot be written ({error}); until it can, "
                            "gc on another machine may take this launch for dead."
                        )
                    warned = True

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # What runs ----------------------------------------------------------------------------------

    def next_task(self) -> Task | Idle:
        """Return a stage to run now, or why there is none.

        A task stays handed out until `ended`, `worker_lost` or `put_back` is called with it.
        """
        task = None if self.stopped else self._next()
        if task is not None:
            self._running.add(task.stage.key)
            return task
        if self._running or self._waiting:
            return Idle.later
        if self.stopped or not self._schedule.unfinished:
            return Idle.finished
        if not self._waited:
            self._progress.note("another launch computes all that is left; waiting for it.")
        self._waiting = self._waited = True
        return Idle.elsewhere

    def _next(self) -> Task | None:
        task = self._schedule.next(self._elsewhere.computes)
        while task is None and self._ask_study():
            task = self._schedule.next(self._elsewhere.computes)
        return task

    def chain(self, task: Task) -> list[Task]:
        """Return a task and those that the same worker runs after it, all of them handed out.

        Each of them ends on its own: see `next_task`. They stay within the resources of the first;
        the cell itself, which only puts its result together, may hold a GPU for that moment.
        """
        resources = self._sweep.resources
        held = resources.of(task.stage.kind)
        tasks: list[Task] = []
        follower: Task | None = task
        while follower is not None:
            tasks.append(follower)
            self._running.add(follower.stage.key)
            follower = self._schedule.follow(
                tasks, lambda stage: stage.name == CELL or resources.of(stage.kind) == held
            )
        return tasks

    def call(self, task: Task) -> StageCall:
        """Return what a worker needs to compute a task."""
        cell = self._plan.cells.get(task.stage.key)
        cpus, gpus = self._sweep.resources.of(task.stage.kind)
        varied = dict(cell.varied) if cell else {}
        stage = task.stage
        return StageCall(
            stage.node(),
            cpus,
            gpus,
            task.accumulation,
            varied,
            stage.model,
            task.again,
            task.same_as,
            self._keeps(task),
        )

    def _keeps(self, task: Task) -> bool:
        """Return whether a result that is taken over needs its model, here or in another sweep."""
        if self._sweep.store.keep == "models":
            return True
        key = task.stage.key
        if not task.same_as or not task.stage.model:
            return False
        return key in self._wanted_elsewhere or self._store.leases.is_wanted(key, but=self.id)

    def put_back(self, task: Task) -> None:
        """A task could not be passed on to a worker: it is ready again."""
        self._running.discard(task.stage.key)
        self._again(task)

    def _again(self, task: Task) -> None:
        """A stage is ready again, unless one of its inputs has failed meanwhile."""
        for cell in self._schedule.again(task.stage.key):
            self._tell_study(cell)

    def waited(self) -> None:
        """The wait after `Idle.elsewhere` is over."""
        self._waiting = False

    def started(self, task: Task) -> None:
        """A worker starts a task, for the first time or after the previous worker died."""
        self._schedule.mark_running(task.stage.key)
        self._journal("start", task)
        self._progress.refresh(self._schedule)

    def tick(self) -> None:
        """Time has passed: show where the launch stands, if that is due."""
        self._progress.tick(self._schedule)

    def stop(self, reason: str) -> None:
        """Hand out no further task; what was handed out may end, chains included.

        The first reason is kept.
        """
        if not self.stopped:
            self.stopped = reason
            self._progress.note(f"stopping: {reason}.")

    # What became of it --------------------------------------------------------------------------

    def ended(self, task: Task, report: Report) -> None:
        """A worker reported how a task ended."""
        self._running.discard(task.stage.key)
        # Not all of a chain's ends are reported at once: the time of this line is not the stage's.
        self._journal("end", task, outcome=report.outcome.value, **_costs(report))
        handlers = {
            Outcome.done: self._done,
            Outcome.busy: self._busy,
            Outcome.inputs: self._inputs_lost,
            Outcome.memory: self._out_of_memory,
            Outcome.disk: self._disk_full,
            Outcome.failed: self._raised,
        }
        handlers[report.outcome](task, report)
        self._progress.refresh(self._schedule)

    def worker_lost(self, task: Task, error: str) -> None:
        """Every worker of a task died. error: the error of the last one, empty if unknown."""
        self._running.discard(task.stage.key)
        self._journal("end", task, outcome=Outcome.failed.value)
        last = error.strip().splitlines()[-1].strip() if error.strip() else "its worker died"
        self._record_failure(task, f"gave up after {WORKER_RETRIES + 1} tries: {last}", error)
        self._given_up += 1
        if self._given_up >= GIVEN_UP_IN_A_ROW:
            self.stop(f"the workers of {self._given_up} stages in a row died; see their failures")
        self._progress.refresh(self._schedule)

    def chain_lost(self, tasks: Sequence[Task], error: str, *, progressed: bool) -> None:
        """Every worker of a chain died: at the first stage without a result.

        Workers are counted for the whole chain. So this stage has failed only if all of them died
        at it; otherwise it gets as many again.

        tasks: those of the chain that have not ended, in order.
        error: the error of the last worker, empty if unknown.
        progressed: whether one of the chain had ended before.
        """
        left = list(tasks)
        while len(left) > 1 and (report := self._result_of(left[0])) is not None:
            self.ended(left.pop(0), report)
        again = progressed or len(left) < len(tasks)
        for task in reversed(left[0 if again else 1 :]):
            self.put_back(task)
        if not again:
            self.worker_lost(left[0], error)

    def _result_of(self, task: Task) -> Report | None:
        """Return what a worker that died had to report of a stage; None without a result."""
        try:
            seen = self._store.look(task.stage.key)
        except Exception:  # the store may be why the workers died
            return None
        # Taken over, or read by then, and without its model.
        dropped = seen.dropped and not seen.committed and not task.again
        return Report(Outcome.done, dropped=dropped) if seen.committed or dropped else None

    def _done(self, task: Task, report: Report) -> None:
        stage = task.stage
        self._given_up = 0
        if report.seconds:
            row = {
                "stage": stage.name,
                "victim": victim_name(stage),
                "device": report.device,
                "units": stage.units,
                "seconds": report.seconds,
                "count": 1,
            }
            self._rows.append(row)
            self._timings.add(row)
        for unneeded in self._schedule.done(stage.key, report.digest, dropped=report.dropped):
            self._drop(unneeded)
        if stage.name == CELL:
            self._cell_done(stage.key, report)

    def _cell_done(self, key: str, report: Report) -> None:
        cell = self._plan.cells[key]
        facts = report.facts
        if not facts:  # another launch computed it
            record = self._results.record(key, cell.varied)
            facts = record["metrics"] if record is not None else {}
        self._progress.finished(cell.varied, facts, self._schedule)
        if report.untracked:
            self._progress.untracked(cell.varied, report.untracked)
        self._on_cell()
        self._tell_study(key)

    def _busy(self, task: Task, report: Report) -> None:
        self._elsewhere.found(task.stage.key)
        self._again(task)

    def _inputs_lost(self, task: Task, report: Report) -> None:
        self._progress.note(f"'{task.stage.name}' needs inputs computed again: {report.reason}")
        if self._schedule.repair(task.stage.key, report.lost):
            return
        broken = [key for key in report.lost if key in self._schedule.failed]
        if broken:
            self._fail(task, f"an input failed: {self._schedule.failed[broken[0]]}")
        else:
            self._record_failure(task, "its inputs were damaged again and again; check the disk.")

    def _out_of_memory(self, task: Task, report: Report) -> None:
        if self._schedule.out_of_memory(task.stage.key):
            self._progress.note(
                f"'{task.stage.name}' ran out of memory; it is tried again alone, and then with "
                "parts of a batch at a time."
            )
        else:
            reason = f"out of memory, even alone and in parts: {report.reason}"
            self._record_failure(task, reason)

    def _disk_full(self, task: Task, report: Report) -> None:
        self._again(task)
        self.stop(f"the disk is full ({report.reason}); free some space")

    def _raised(self, task: Task, report: Report) -> None:
        self._fail(task, report.reason)  # its worker has recorded it

    def _record_failure(self, task: Task, reason: str, error: str = "") -> None:
        """Record a failure that no worker has recorded. error: a traceback, if there is one."""
        stage = task.stage
        now = time.time()
        failure = {
            "key": stage.key,
            "stage": stage.name,
            "reason": reason,
            "traceback": error or reason,
            "code": code_version(),
            "started": now,
            "ended": now,
        }
        try:
            self._store.fail(stage.key, failure)
        except Exception as problem:
            # A full disk, a lost store; raised here, it would end the launch.
            self._progress.note(f"the failure of {stage.key} was not recorded: {problem}")
        self._fail(task, reason)

    def _fail(self, task: Task, reason: str) -> None:
        stage = task.stage
        cells = self._schedule.fail(stage.key, reason)
        labels = [self._plan.cells[key].varied for key in cells if key in self._plan.cells]
        path = below(self._sweep.store_location, places.failure(stage.key))
        self._progress.failed(stage.name, labels, reason, path)
        for key in cells:
            self._tell_study(key)
        self._failures += 1
        if self._max_failures is not None and self._failures >= self._max_failures:
            self.stop(f"{self._failures} stages failed (--max-failures {self._max_failures})")

    def _journal(self, event: str, task: Task, **facts: str | float) -> None:
        # A full disk or a lost store: the stages report it, and stop the launch in order.
        with suppress(Exception):
            stage = task.stage
            self._results.journal_event(
                event, key=stage.key, stage=stage.name, launch=self.id, **facts
            )

    # What a study suggests ----------------------------------------------------------------------

    def _ask_study(self) -> bool:
        """Schedule a suggestion's cells, if there is room; return whether the study had one."""
        if self._suggestions.running >= self.slots:
            return False
        cells = self._suggestions.ask()
        if cells:
            self._results.write_plan(self._sweep, cells)
            self._register()
            self._schedule.add([cell.stage for cell in cells])
            self._progress.grown(len(self._plan.cells))
            self._tell_study()
        return cells is not None

    def _tell_study(self, key: str | None = None) -> None:
        """Tell the study of the suggestions that have ended. key: only of those with this cell."""
        self._suggestions.tell(self._schedule.committed, self._schedule.failed, key)

    # Models that nobody needs -------------------------------------------------------------------

    def _drop(self, key: str) -> None:
        """Remove a stage's model, unless it may be needed elsewhere or later."""
        if self._sweep.store.keep == "models" or key in self._wanted_elsewhere:
            return
        if self._suggestions.searching and self._schedule.stage(key).kind != "cell":
            return  # the next suggestion may start from it
        if self._store.leases.is_wanted(key, but=self.id):
            return
        try:
            self._store.drop(key)
        except Exception as error:  # each client of an object store has its own
            self._progress.note(f"the model of {key} was not removed: {error}")
            return
        self._schedule.drop(key)

    @cached_property
    def _wanted_elsewhere(self) -> set[str]:
        return self._results.wanted_elsewhere(self._store.committed())

    def drop_models(self) -> None:
        """Remove models that an earlier, interrupted launch has left and no cell needs."""
        if self._sweep.store.keep == "models" or self.has_work:
            return
        committed = self._store.committed()
        stages = {
            stage.key: stage
            for cell in self._plan.cells.values()
            for stage in cell.stage.inputs.values()
            if stage.model and stage.key in committed
        }
        for key in stages:
            self._drop(key)

    # After --------------------------------------------------------------------------------------

    def save_timings(self) -> None:
        """Save how long the stages of this launch took, for later estimates."""
        with suppress(Exception):  # a full disk, a lost store: the estimates can do without
            self._store.add_timings(self.id, _condensed(self._rows))

    def all_ended(self) -> None:
        """No stage runs any more, and none will. What is left then was interrupted."""
        if not self.stopped and self._schedule.unfinished:
            self.stopped = INTERRUPTED

    def result(self) -> LaunchResult:
        """Return how the launch ended, and print the findings of its study."""
        committed = self._store.committed()
        reasons = {record["key"]: record["reason"] for record in self._store.failures()}
        failed = {}
        for cell in self._plan.cells.values():
            if cell.key not in committed:
                reason = blocked(cell.stage, reasons)
                if reason is not None:
                    failed[cell.key] = reason
        done = sum(key in committed for key in self._plan.cells)
        # Suggestions may be missing too: not asked for yet, or computed by another launch.
        missing = len(self._plan.cells) - done - len(failed) + self._suggestions.study.open
        for line in self._suggestions.study.findings():
            self._progress.note(line)
        return LaunchResult(done, failed, missing, self._clock() - self._began, self.stopped)


def _costs(report: Report) -> dict[str, str | float]:
    """Return what the journal keeps of a stage that was computed; empty if it was there already."""
    if not report.seconds:
        return {}
    return {
        "seconds": report.seconds,
        "device": report.device,
        "memory": report.memory,
        "gpu_memory": report.gpu_memory,
    }


def _condensed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return timings summed by stage, victim and device."""
    sums: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        group = (row["stage"], row["victim"], row["device"])
        known = sums.setdefault(group, {**row, "units": 0, "seconds": 0.0, "count": 0})
        for name in ("units", "seconds", "count"):
            known[name] += row[name]
    return list(sums.values())
