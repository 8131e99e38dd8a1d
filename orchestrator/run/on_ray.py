"""Running a sweep's stages as Ray Tune trials. The only file that imports ray.

The store is the truth: a stage that has a result there is not run again, so the same command
resumes whatever was interrupted. Tune schedules what `Schedule` hands out through a searcher;
`Tuner.restore` is not used: it reruns finished trials and cannot take a grown grid.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

# Read by ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The older output engine is the one that verbose=0 silences.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Stages report no common metric.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# Tune would write the state of all trials again and again; nothing here ever reads it.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")
# Ray has workers yield to everything else: beside a busy process on its CPU a stage gets 3 % of it
# (Linux weighs niceness 15 as 36, 0 as 1,024). Of a cluster its nodes say it (docs/cluster.md).
os.environ.setdefault("RAY_worker_niceness", "0")
# A trial with gpu: 0 must not see the node's GPUs.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import psutil
import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayError
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btu.errors import UserError
from btu.provenance import code_version
from orchestrator.plan.planner import Plan, PlannedCell, Planner
from orchestrator.plan.work import Timings, Work, blocked, survey, timings_for, victim_name
from orchestrator.results.folder import Results
from orchestrator.run.progress import SweepProgress
from orchestrator.run.refine import Refinement, RefineSpec
from orchestrator.run.schedule import CELL, Schedule, Task
from orchestrator.run.study import Study, StudySearch, Suggestion
from orchestrator.run.worker import Outcome, Report
from orchestrator.store.lease import HEARTBEAT_S
from orchestrator.store.store import Damaged, Missing, Store
from orchestrator.sweep.sweep import Cell, Sweep

# Of a worker that died Tune prints a page; the progress says in a line what became of it.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
# Environment variables that act in a trial; a remote worker inherits none of the driver's.
PASSED_PREFIXES = ("MLFLOW_", "HF_", "BTU_", "AWS_", "TRANSFORMERS_", "RAY_ACCEL_")
# A worker that dies (killed, node lost) is tried again; an error inside a stage is a result.
WORKER_RETRIES = 2
# Ray gives its own processes half a minute to start, which a busy machine may exceed.
START_TRIES = 3
# With so many stages given up in a row it is the machines, not the stages.
GIVEN_UP_IN_A_ROW = 3
# How long a node that only waits for another launch does so, and how often leases are listed.
WAIT_SECONDS, LEASES_SECONDS = 3.0, 1.0
# How long a node may take to answer whether it sees the store: a fresh worker has to start.
NODE_SECONDS = 120
# How often, in seconds, it is looked whether a summary is due.
SUMMARY_LOOK = 1.0
# CPUs that a waiting node holds: next to nothing, but Ray places nothing without a demand.
WAIT_CPUS = 0.001


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class LaunchResult:
    """done: cells with a result. failed: reasons by cell. missing: neither.

    stopped: why the launch ended before its work did, empty if it did not.
    """

    done: int
    failed: dict[str, str]
    missing: int
    seconds: float
    stopped: str = ""

    @property
    def complete(self) -> bool:
        return not self.failed and not self.missing


def launch(
    sweep: Sweep,
    plan: Plan,
    planner: Planner,
    progress: SweepProgress,
    *,
    address: str | None = None,
    retry_failed: bool = False,
    max_failures: int | None = None,
    refine: RefineSpec | None = None,
) -> LaunchResult:
    """Compute every stage and cell of a plan that has no result yet.

    address: of a Ray cluster; None starts a local one for the time of the call. retry_failed: run
    again what failed in an earlier launch. max_failures: stop when so many stages have failed.
    refine: place further thresholds where the plan's cells differ; `plan` grows by their cells.

    Raises:
        UserError: the output folder or tracking store cannot be used; no node can hold a stage;
            there are no thresholds to refine.
    """
    driver = _Driver(sweep, plan, planner, progress, max_failures, refine)
    with _sigterm_as_interrupt():
        return driver.run(address, retry_failed)


def _guarded(method: Callable[P, R]) -> Callable[P, R | None]:
    """Let an exception end the sweep in good order: raised inside Tune it would hang or kill it."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            driver = cast(_Driver, args[0])
            driver.error = driver.error or error
            driver.stop(f"{type(error).__name__}: {error}")
            return None

    return call


class _Driver:
    """The state of one launch: what to run, what ran, and what to tell."""

    def __init__(
        self,
        sweep: Sweep,
        plan: Plan,
        planner: Planner,
        progress: SweepProgress,
        max_failures: int | None,
        refine: RefineSpec | None = None,
    ) -> None:
        self.sweep, self.plan, self.planner, self.progress = sweep, plan, planner, progress
        self.id = f"{sweep.name}-{uuid.uuid4().hex[:12]}"
        self.store = Store(sweep.store_location, warn=progress.note)
        self.results = Results(sweep.output, sweep.name, self.store)
        self.max_failures, self.refine = max_failures, refine
        self.stopped = ""
        self.error: Exception | None = None
        self.schedule: Schedule
        self.timings: Timings
        self.study: Study | None = None
        self.tracking: dict[str, str] | None = None
        # By number, until all their cells have ended.
        self._suggestions: dict[int, list[PlannedCell]] = {}
        self._handed: set[int] = set()  # those of them that this launch asked for
        self._tasks: dict[str, Task | None] = {}  # by trial; None is a node that only waits
        self._ended: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._failures = self._given_up = 0
        self._leased: set[str] = set()
        self._leases_read = 0.0
        self._busy_until: dict[str, float] = {}
        self._unsummarized = threading.Event()
        self._summary_failed = False

    def run(self, address: str | None, retry_failed: bool) -> LaunchResult:
        from orchestrator.tracking import experiment, server

        started = time.monotonic()
        self.store.prepare()
        self._begin_study(retry_failed)
        uri = server.tracking_uri(self.sweep)
        experiment_id, reason = experiment.prepare(self.sweep)
        if experiment_id is None:
            self.progress.note(
                f"MLflow at {server.shown(uri)} does not answer ({reason[:150]}); the sweep runs "
                f"all the same. Results wait on disk: {self._sync_command()} writes them."
            )
        else:
            self.tracking = {"uri": uri, "id": experiment_id}
        self.results.write_plan(self.sweep, self.plan.cells.values(), self.plan.refused)
        # Before looking at what is there: from now on nobody removes what this launch needs.
        self._register()
        try:
            with self._heartbeat():
                self._prepare_schedule(retry_failed)
                try:
                    if self.schedule.unfinished or self._searching():
                        with self._summaries():
                            self._compute(address)
                    self._drop_models()
                    self._synchronize()
                finally:
                    self.progress.end()
        finally:
            self.store.release_launch(self.id)
        return self._result(time.monotonic() - started)

    # Before -------------------------------------------------------------------------------------

    def _prepare_schedule(self, retry_failed: bool) -> None:
        committed = self._verified()
        if retry_failed:
            self._forget_failures()
        dropped = self.store.dropped()
        failed = {record["key"]: record["reason"] for record in self.store.failures()}
        self.timings = timings_for(self.store.timings(), self.sweep.resources)
        work = survey(
            self.plan, committed=committed, dropped=dropped, failed=failed, timings=self.timings
        )
        todo = [
            cell.stage
            for cell in self.plan.cells.values()
            if cell.key not in committed and cell.key not in work.failed
        ]
        self.schedule = Schedule(
            todo, committed=committed, dropped=dropped, failed=failed, timings=self.timings
        )
        self._tell_study()
        self.progress.begin(work, self.schedule, len(self.plan.cells), self._searching())
        self._check_space(work)

    def _verified(self) -> set[str]:
        """Return the committed keys; results of this sweep's cells are read through and checked.

        Not on an object store, which checks its own and would send every file.
        """
        committed = self.store.committed()
        for key in self.plan.cells:
            if key in committed and self.store.storage.local:
                try:
                    self.store.fetch(key)
                except (Damaged, Missing):
                    committed.discard(key)
        return committed

    def _check_space(self, work: Work) -> None:
        """Say where the disk may become full; how much is really needed is an estimate."""
        free = self.store.storage.free_bytes()
        models = work.models if self.sweep.store.keep == "models" else work.model_bytes
        if free is not None and free < work.small + models:
            self.progress.note(
                f"{self.store.location} has {free / 1e9:.1f} GB free and the sweep may need more "
                f"(btu plan says how much); a full disk stops it, and loses nothing."
            )

    def _forget_failures(self) -> None:
        for key in self._keys() & self.store.failed():
            self.store.clear_failure(key)

    # Ray ----------------------------------------------------------------------------------------

    def _compute(self, address: str | None) -> None:
        environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED_PREFIXES)}
        if environment.get("BTU_CACHE"):
            # Workers start in folders of their own.
            cache = Path(environment["BTU_CACHE"]).expanduser().resolve()
            environment["BTU_CACHE"] = str(cache)
        attached = ray.is_initialized()
        if not attached:
            _check_answers(address)
            _connect(address, environment)
        # Tune wants to see one folder from all nodes; nothing here reads what it writes there.
        scratch = f"{self.sweep.folder}/.tune-{self.id}"
        state = scratch if address is not None else tempfile.mkdtemp(prefix="btu-tune-")
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            self._check_fits(nodes)
            if address is not None or len(nodes) > 1:
                self._check_nodes(nodes)
            # Once more: ray.init has put a handler of its own in the place of that of `launch`.
            with _sigterm_as_interrupt():
                Tuner(
                    tune.with_resources(
                        tune.with_parameters(_trial, launch=self._for_workers()), _resources
                    ),
                    tune_config=TuneConfig(
                        search_alg=_Gate(self),
                        num_samples=-1,
                        # One more than run: the next one is ready to take over a worker.
                        max_concurrent_trials=self.schedule.slots + 1,
                        # A fresh worker pays 5 s of imports per stage.
                        reuse_actors=True,
                        trial_dirname_creator=lambda trial: f"stage_{trial.trial_id}",
                    ),
                    run_config=RunConfig(
                        name="tune",
                        storage_path=state,
                        verbose=0,
                        callbacks=[_Events(self)],
                        failure_config=FailureConfig(max_failures=WORKER_RETRIES),
                    ),
                ).fit()
        finally:
            if not attached:
                _leave()
            if "://" in state:
                self.results.storage.remove(f"{self.sweep.name}/.tune-{self.id}")
            shutil.rmtree(state, ignore_errors=True)
            with suppress(OSError):  # a full disk: only the estimates would have profited
                self.store.add_timings(self.id, _condensed(self._rows))
        if self.error is not None:
            raise self.error
        if not self.stopped and self.schedule.unfinished:
            self.stopped = "interrupted"

    def _for_workers(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "store": self.sweep.store_location,
            "output": self.sweep.output,
            "sweep": self.sweep.name,
            "tracking": self.tracking,
        }

    def _keys(self) -> set[str]:
        """Return the keys of all cells of the plan and of what they rest on."""
        return {
            key
            for cell in self.plan.cells.values()
            for key in (cell.key, *(stage.key for stage in cell.stage.inputs.values()))
        }

    def _register(self) -> None:
        self.store.register_launch(self.id, self.sweep.name, self._keys())

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Tell other launches, and gc, that what this one needs is in use."""
        done = threading.Event()

        def beat() -> None:
            told = False
            while not done.wait(HEARTBEAT_S):
                try:
                    self.store.heartbeat_launch(self.id)
                except Exception as error:  # each client of an object store has its own
                    if not told:
                        self.progress.note(
                            f"{self.store.location} cannot be written ({error}); until it can, gc "
                            "on another machine may take this launch for dead."
                        )
                    told = True

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def _summaries(self) -> Iterator[None]:
        """Keep the sweep's summary in MLflow up to date while cells end, now and then.

        In a thread: neither drawing nor a slow server may keep Tune waiting. Of the end of the
        sweep `_synchronize` tells.
        """
        if self.tracking is None:
            yield
            return
        from orchestrator.tracking.sync import Pace

        # Its own view of the store: the driver's is for one thread.
        store = Store(self.sweep.store_location, warn=self.progress.note)
        results = Results(self.sweep.output, self.sweep.name, store)
        done, pace = threading.Event(), Pace()
        pace.took(time.monotonic(), time.monotonic())

        def update() -> None:
            while not done.wait(SUMMARY_LOOK):
                began = time.monotonic()
                if self._unsummarized.is_set() and pace.due(began):
                    self._unsummarized.clear()
                    self._summarize(results)
                    pace.took(began, time.monotonic())

        thread = threading.Thread(target=update, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            if self.stopped != "interrupted":  # who waits for a stop does not wait for drawings
                thread.join()

    def _summarize(self, results: Results) -> None:
        """Bring the summary run up to date; one that fails ends no sweep, and is told once."""
        from orchestrator.tracking import server, sync

        if self.tracking is None:
            return
        try:
            sync.summarize(self.tracking["uri"], self.tracking["id"], results)
        except Exception as error:  # of a server, of a disk or of a plot
            if not self._summary_failed:
                self.progress.note(
                    f"the sweep's summary in MLflow is not up to date ({server.brief(error)}); "
                    f"{self._sync_command()} writes it."
                )
            self._summary_failed = True

    def _check_fits(self, nodes: list[Any]) -> None:
        """Refuse resources that no node has; count how many stages run at once."""
        demands = [self.sweep.resources.of(kind) for kind in ("stage", "cell")]
        for cpu, gpu in demands:
            if not any(_holds(node, cpu, gpu) for node in nodes):
                have = ", ".join(
                    f"{n['Resources'].get('CPU', 0):g} CPU / {n['Resources'].get('GPU', 0):g} GPU"
                    for n in nodes
                )
                raise UserError(
                    f"no node can hold a stage with resources cpu={cpu:g} gpu={gpu:g} (nodes: "
                    f"{have}); lower resources, or use --address."
                )
        at_once = sum(max(_holds(node, cpu, gpu) for cpu, gpu in demands) for node in nodes)
        self.schedule.slots = max(1, at_once)

    def _check_nodes(self, nodes: list[Any]) -> None:
        """Let every node write to the store and read what the others wrote, before any work.

        Raises:
            UserError: a node does not see the store, or runs other code.
        """
        token = uuid.uuid4().hex
        probe = f"probes/{self.id}"
        self.store.storage.write(f"{probe}/driver", token.encode())
        try:
            asked = {}
            for node in nodes:
                if node["Resources"].get("CPU", 0) > 0:  # without, it runs nothing
                    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    task = ray.remote(_probe).options(num_cpus=0, scheduling_strategy=place)
                    asked[node["NodeID"]] = task.remote(
                        self.sweep.store_location, probe, node["NodeID"], token
                    )
            names = {node["NodeID"]: node.get("NodeManagerHostname") for node in nodes}
            for node_id, answer in asked.items():
                try:
                    problem = ray.get(answer, timeout=NODE_SECONDS)
                except (GetTimeoutError, RayError) as error:
                    problem = f"its check did not end ({type(error).__name__})"
                problem = problem or self._unseen(f"{probe}/{node_id}")
                if problem:
                    raise UserError(
                        f"node {names[node_id] or node_id} cannot take part: {problem}. Every node "
                        f"needs the same code, and {self.sweep.store_location} as a folder that "
                        "all share (or an object store URL as output)."
                    )
        finally:
            self.store.storage.remove(probe)

    def _unseen(self, path: str) -> str:
        """Return what is wrong with the version that a node wrote, empty if nothing is."""
        try:
            written = self.store.storage.read(path).decode()
        except FileNotFoundError:
            return "what it writes there is not seen here"
        if written != code_version():
            return f"it runs code {written}, the driver {code_version()}"
        return ""

    # What Tune asks and tells --------------------------------------------------------------------

    @_guarded
    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial, None to be asked again, or FINISHED."""
        if self.stopped:
            return None if self._open() else Searcher.FINISHED
        task = self.schedule.next(self._is_busy)
        while task is None and self._ask_study():
            task = self.schedule.next(self._is_busy)
        if task is not None:
            self._tasks[trial_id] = task
            return {"task": json.dumps(self._task(task)), "held": self._held(task)}
        if self._open():
            return None
        if self.schedule.unfinished:
            # All that is left is with another launch. Tune would sleep for minutes without a
            # trial to look after, deaf to Ctrl-C, so it gets one that only waits.
            if None not in self._tasks.values():
                self.progress.note("all that is left is with another launch; waiting for it.")
            self._tasks[trial_id] = None
            return {"task": "", "held": {"cpu": WAIT_CPUS, "gpu": 0.0}}
        return Searcher.FINISHED

    def _open(self) -> bool:
        return len(self._tasks) > len(self._ended)

    def _task(self, task: Task) -> dict[str, Any]:
        cell = self.plan.cells.get(task.stage.key)
        cpu, gpu = self.sweep.resources.of(task.stage.kind)
        return {
            "node": task.stage.node(),
            "cpus": cpu,
            "gpus": gpu,
            "accumulation": task.accumulation,
            "varied": dict(cell.varied) if cell else {},
        }

    def _held(self, task: Task) -> dict[str, float]:
        cpu, gpu = self.sweep.resources.of(task.stage.kind)
        if task.alone:
            # After running out of memory: nobody beside it on its device, or on its node.
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            if gpu > 0:
                gpu = 1.0
            else:
                cpu = max([cpu, *(node.get("CPU", 0) for node in nodes)])
        return {"cpu": cpu, "gpu": gpu}

    def _is_busy(self, key: str) -> bool:
        now = time.monotonic()
        if now - self._leases_read > LEASES_SECONDS:
            self._leased = self.store.leased()
            self._leases_read = now
        if key not in self._leased:
            return False
        if now < self._busy_until.get(key, 0.0) or self.store.held_by_other(key, self.id):
            return True
        # Nobody's any more, and watched from here for long enough to know; a worker would have to
        # watch it anew.
        with suppress(OSError), self.store.lease(key, self.id) as lease:
            lease.acquire()
        self._leased.discard(key)
        return False

    @_guarded
    def started(self, trial_id: str) -> None:
        """A worker begins, for the first time or after the one before it died."""
        task = self._tasks.get(trial_id)
        if task is not None:
            self.schedule.begin(task.stage.key)
            self._note("start", task)
        self.progress.refresh(self.schedule)

    @_guarded
    def ended(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial came to its end and reported."""
        if trial_id in self._ended:
            return
        self._ended.add(trial_id)
        task = self._tasks[trial_id]
        if task is None or "report" not in result:
            return
        report = Report(**json.loads(result["report"]))
        stage, key = task.stage, task.stage.key
        outcome = Outcome(report.outcome)
        self._note("end", task, outcome=outcome.value)
        if outcome is Outcome.done:
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
                self.timings.add(row)
            for unneeded in self.schedule.done(key):
                self._drop(unneeded)
            if stage.name == CELL:
                self._cell_ended(key, report)
        elif outcome is Outcome.busy:
            self._leases_read = 0.0
            self._busy_until[key] = time.monotonic() + WAIT_SECONDS
            self.schedule.again(key)
        elif outcome is Outcome.inputs:
            self.progress.note(f"'{stage.name}' needs inputs computed again: {report.reason}")
            if not self.schedule.repair(key, report.lost):
                broken = [k for k in report.lost if k in self.schedule.failed]
                if broken:
                    self._fail(task, f"an input failed: {self.schedule.failed[broken[0]]}")
                else:
                    self._failed(task, "its inputs were damaged again and again; check the disk.")
        elif outcome is Outcome.memory:
            if self.schedule.out_of_memory(key):
                self.progress.note(
                    f"'{stage.name}' ran out of memory; it is tried again alone, and then with "
                    "parts of a batch at a time."
                )
            else:
                self._failed(task, f"out of memory, even alone and in parts: {report.reason}")
        elif outcome is Outcome.disk:
            self.schedule.again(key)
            self.stop(f"the disk is full ({report.reason}); free some space")
        else:
            self._fail(task, report.reason)
        self.progress.refresh(self.schedule)

    def _note(self, event: str, task: Task, **facts: str) -> None:
        with suppress(OSError):  # a full disk stops the sweep by itself, and in good order
            stage = task.stage
            self.results.journal_event(
                event, key=stage.key, stage=stage.name, launch=self.id, **facts
            )

    @_guarded
    def gave_up(self, trial_id: str, error: str) -> None:
        """A trial's workers died, one after the other."""
        self._ended.add(trial_id)
        task = self._tasks.get(trial_id)
        if task is None:
            return
        self._note("end", task, outcome=Outcome.failed.value)
        last = error.strip().splitlines()[-1].strip() if error.strip() else "its worker died"
        self._failed(task, f"gave up after {WORKER_RETRIES + 1} tries: {last}", error)
        self._given_up += 1
        if self._given_up >= GIVEN_UP_IN_A_ROW:
            self.stop(f"the workers of {self._given_up} stages in a row died; see their failures")
        self.progress.refresh(self.schedule)

    def _failed(self, task: Task, reason: str, error: str = "") -> None:
        """Record a failure that no worker recorded."""
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
            self.store.fail(stage.key, failure)
        except OSError as problem:  # a full disk; raised here, it would end the sweep
            self.progress.note(f"the failure of {stage.key} was not recorded: {problem}")
        self._fail(task, reason)

    def _fail(self, task: Task, reason: str) -> None:
        stage = task.stage
        cells = self.schedule.fail(stage.key, reason)
        labels = [self.plan.cells[key].varied for key in cells if key in self.plan.cells]
        self.progress.failed(stage.name, labels, reason, self._failure_path(stage.key))
        for key in cells:
            self._tell_study(key)
        self._failures += 1
        if self.max_failures is not None and self._failures >= self.max_failures:
            self.stop(f"{self._failures} stages failed (--max-failures {self.max_failures})")

    def _failure_path(self, key: str) -> str:
        return f"{self.sweep.store_location}/failed/{key}.json"

    def _cell_ended(self, key: str, report: Report) -> None:
        cell = self.plan.cells[key]
        facts = report.facts
        if not facts:  # another launch computed it
            record = self.results.record(key, cell.varied)
            facts = record["metrics"] if record is not None else {}
        self.progress.finished(cell.varied, facts, self.schedule)
        if report.untracked:
            self.progress.untracked(cell.varied, report.untracked)
        self._unsummarized.set()
        self._tell_study(key)

    def stop(self, reason: str) -> None:
        """Hand out nothing more; what runs may end."""
        if not self.stopped:
            self.stopped = reason
            self.progress.note(f"stopping: {reason}.")

    # Search -------------------------------------------------------------------------------------

    def _begin_study(self, retry_failed: bool) -> None:
        """Take in the cells of every suggestion of earlier launches.

        Raises:
            UserError: there are no thresholds to refine.
        """
        if self.refine is not None:
            launched = {key: cell.varied for key, cell in self.results.cells().items()}
            coordinates = [cell.varied for cell in self.plan.cells.values()]
            self.study = Refinement(self.sweep, coordinates, self.refine, launched, self._key_of)
        elif self.sweep.optuna is not None:
            self.study = study = StudySearch(self.sweep, self.sweep.folder)
            if retry_failed:
                study.retry_failed()
        if self.study is None:
            return
        untold = self.study.untold()
        for suggestion in self.study.asked():
            cells = self._planned(suggestion)
            if cells and suggestion.number in untold:
                self._suggestions[suggestion.number] = cells

    def _key_of(self, cell: Cell) -> str:
        """Return the key of a cell.

        Raises:
            UserError: it cannot run.
        """
        found = Plan()
        self.planner.add(found, [cell])
        if found.refused:
            raise UserError(found.refused[0].reason)
        return next(iter(found.cells))

    def _planned(self, suggestion: Suggestion) -> list[PlannedCell]:
        """Take a suggestion's cells into the plan; [] if one of them cannot run."""
        found = Plan()
        cells = self.planner.add(found, suggestion.cells)
        if found.refused and self.study is not None:
            # Without one of its cells a suggestion has no mean over them.
            self.progress.note(f"suggestion refused: {found.refused[0].reason}")
            self.study.tell(suggestion.number, [])
            return []
        return [self.plan.cells.setdefault(cell.key, cell) for cell in cells]

    def _searching(self) -> bool:
        return self.study is not None and not self.study.exhausted

    def _ask_study(self) -> bool:
        """Take in a suggestion's cells, if there is room and the study has more."""
        if self.study is None or self.study.exhausted or len(self._handed) >= self.schedule.slots:
            return False
        suggestion = self.study.ask()
        if suggestion is None:
            return False
        cells = self._planned(suggestion)
        if cells:
            self._suggestions[suggestion.number] = cells
            self._handed.add(suggestion.number)
            self.results.write_plan(self.sweep, cells)
            self._register()
            self.schedule.add([cell.stage for cell in cells])
            self.progress.grown(len(self.plan.cells))
            self._tell_study()
        return True

    def _tell_study(self, key: str | None = None) -> None:
        """Tell the study of every suggestion whose cells have all ended; key: only of its own."""
        if self.study is None:
            return
        for number, cells in list(self._suggestions.items()):
            keys = [cell.key for cell in cells]
            if key is not None and key not in keys:
                continue
            broken = self._broken(cells)
            if all(k in self.schedule.committed or k in broken for k in keys):
                records = [self.results.record(cell.key, cell.varied) for cell in cells]
                # A suggestion with a failed cell has no mean over its cells: it counts as failed.
                told = [record["metrics"] for record in records if record is not None]
                self.study.tell(number, told if len(told) == len(cells) else [])
                del self._suggestions[number]
                self._handed.discard(number)

    def _broken(self, cells: list[PlannedCell]) -> set[str]:
        return {c.key for c in cells if blocked(c.stage, self.schedule.failed) is not None}

    # After --------------------------------------------------------------------------------------

    def _drop(self, key: str) -> None:
        """Remove a stage's model that nobody needs any more."""
        if self.sweep.store.keep == "models" or key in self._wanted_elsewhere:
            return
        if self._searching() and self.schedule.stage(key).kind != "cell":
            return  # the next suggestion may start from it
        if key in self.store.in_use(but=self.id):
            return
        try:
            self.store.drop(key)
        except OSError as error:
            self.progress.note(f"the model of {key} was not removed: {error}")
            return
        self.schedule.drop(key)

    @cached_property
    def _wanted_elsewhere(self) -> set[str]:
        return self.results.wanted_elsewhere(self.store.committed())

    def _drop_models(self) -> None:
        """Remove the models that an earlier, interrupted launch left and no cell needs now."""
        if self.sweep.store.keep == "models" or self.schedule.unfinished or self._searching():
            return
        committed = self.store.committed()
        stages = {
            stage.key: stage
            for cell in self.plan.cells.values()
            for stage in cell.stage.inputs.values()
            if stage.model and stage.key in committed
        }
        for key in stages:
            self._drop(key)

    def _sync_command(self) -> str:
        """Return the command that tells MLflow what it misses."""
        from orchestrator.tracking.server import shown

        words = ["btu", "sync", self.sweep.name]
        if self.sweep.output != str(Path("runs").resolve()):
            words += ["--output", self.sweep.output]
        if self.sweep.tracking.uri is not None:
            words += ["--uri", shown(self.sweep.tracking.uri)]
        return shlex.join(words)

    def _synchronize(self) -> None:
        """Write the runs that MLflow has missed; say how many it still misses."""
        from orchestrator.tracking import experiment, server, sync

        uri = server.tracking_uri(self.sweep)
        if self.stopped == "interrupted" and uri.startswith(("http://", "https://")):
            return  # who waits for a stop does not wait for a server; the next launch tells it
        experiment_id = self.tracking["id"] if self.tracking else None
        if experiment_id is None:
            experiment_id, _ = experiment.prepare(self.sweep)
            if experiment_id is None:
                return

        def live(key: str) -> bool:
            return self.store.held_by_other(key, self.id)

        synced = sync.sync(uri, experiment_id, self.results, live, self.id)
        if synced.missing:
            self.progress.note(
                f"{synced.missing} results are on disk but not in MLflow ({synced.reason}); "
                f"{self._sync_command()} writes them once {server.shown(uri)} answers."
            )
        self.tracking = {"uri": uri, "id": experiment_id}
        if self.stopped != "interrupted":  # who waits for a stop does not wait for drawings
            self._summarize(self.results)

    def _result(self, seconds: float) -> LaunchResult:
        committed = self.store.committed()
        reasons = {record["key"]: record["reason"] for record in self.store.failures()}
        failed = {}
        for cell in self.plan.cells.values():
            if cell.key not in committed:
                reason = blocked(cell.stage, reasons)
                if reason is not None:
                    failed[cell.key] = reason
        done = sum(key in committed for key in self.plan.cells)
        missing = len(self.plan.cells) - done - len(failed)
        if self.study is not None:
            # Not asked for yet, or in the hands of another launch.
            missing += self.study.open
            for line in self.study.findings():
                self.progress.note(line)
        return LaunchResult(done, failed, missing, seconds, self.stopped)


class _Gate(Searcher):  # type: ignore[misc]  # ray is untyped
    """Hands Tune the stages whose inputs are there."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__(metric=None, mode=None)
        self._driver = driver

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher into a state that nothing reads.
        return {}

    def suggest(self, trial_id: str) -> Any:
        return self._driver.suggest(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Of errors the callback knows more.
        if not error and result is not None:
            self._driver.ended(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class _Events(Callback):  # type: ignore[misc]  # ray is untyped
    """Passes Tune's events on."""

    def __init__(self, driver: _Driver) -> None:
        self._driver: _Driver | None = driver

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks; a live terminal display cannot be.
        return {"_driver": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._driver:
            self._driver.started(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._driver:
            self._driver.gave_up(trial.trial_id, str(trial.get_error() or ""))


def _resources(config: Mapping[str, Any]) -> dict[str, float]:
    held: dict[str, float] = config["held"]
    return held


def _trial(config: dict[str, Any], launch: dict[str, Any]) -> None:
    """Compute one stage in a Ray worker; the word to Tune comes last."""
    if not config["task"]:
        _wait(launch)
        return
    from orchestrator.run.worker import free_memory, run_node

    task = json.loads(config["task"])
    store = _store(launch["store"])
    results = Results(launch["output"], launch["sweep"], store)

    def track(key: str, folder: Path) -> None:
        from orchestrator.tracking.writer import Tracker

        where = launch["tracking"]
        record = results.record(key, task["varied"])
        if where is not None and record is not None:
            Tracker(where["uri"], where["id"], results).log(record, folder)

    def begin() -> None:
        with suppress(OSError):  # the journal of a full disk; the stage will say so
            results.journal_event("compute", key=task["node"]["key"], launch=launch["id"])

    report = run_node(
        task["node"],
        store,
        owner=launch["id"],
        cpus=task["cpus"],
        gpus=task["gpus"],
        accumulation=task["accumulation"],
        track=track,
        begin=begin,
    )
    free_memory()
    store.trim_cache()
    tune.report({"report": json.dumps(asdict(report))})


_stores: dict[str, Store] = {}


def _store(location: str) -> Store:
    # Kept for what it remembers: files that were verified already.
    return _stores.setdefault(location, Store(location))


def _wait(launch: Mapping[str, Any]) -> None:
    """Hold next to nothing until another launch has let go of something, or for a while."""
    store = _store(launch["store"])
    before = store.leased()
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until and before <= store.leased():
        time.sleep(0.2)
    tune.report({"waited": True})


def _probe(location: str, probe: str, node: str, token: str) -> str:
    """Return what keeps a node from taking part, empty if nothing does."""
    try:
        storage = Store(location).storage
        if storage.read(f"{probe}/driver").decode() != token:
            return f"at {location} it sees another folder"
        storage.write(f"{probe}/{node}", code_version().encode())
    except FileNotFoundError:
        return f"it does not see {location}"
    except Exception as error:  # each client of an object store has its own
        return f"it cannot write to {location} ({error})"
    return ""


def _connect(address: str | None, environment: dict[str, str]) -> None:
    """Start a local Ray, or join a cluster.

    Raises:
        UserError: it does not answer or does not start.
    """
    for tries_left in reversed(range(START_TRIES)):
        before = set(psutil.Process().children())
        try:
            ray.init(
                # Without "local", ray would join whatever cluster runs on this machine.
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": environment},
            )
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Ray cluster {address or '(local)'} cannot be reached: {error} Check --address, "
                "or leave it out for a local run."
            ) from error
        except Exception as error:
            # A bare Exception is how ray says that its processes did not start in time.
            if type(error) is not Exception:
                raise
            # Ray leaves those that did start until this process ends.
            for process in set(psutil.Process().children()) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not tries_left:
                raise UserError(
                    f"Ray did not start, {START_TRIES} times: {error} If this machine is busy, "
                    "give the same command again when it is less so."
                ) from error


def _leave() -> None:
    """Shut Ray down, with no garbage of it for another thread to collect meanwhile.

    What Tune leaves behind refers to objects of Ray. Where one of them is freed while Ray goes
    down, say by the thread that draws the summary, Ray ends this process, at once and without a
    word (a "quick exit": github.com/ray-project/ray/pull/19115).
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def _check_answers(address: str | None) -> None:
    """Raise a `UserError` where nothing listens at HOST:PORT: ray itself tries for minutes."""
    if address is not None and address.startswith("ray://"):
        raise UserError(
            f"--address {address} is Ray Client, which sweeps do not use; run btu launch on a node "
            "of the cluster with --address auto."
        )
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"Ray cluster {address} cannot be reached: {error}. Check --address, or leave it out "
            "for a local run."
        ) from error


def _holds(node: Mapping[str, Any], cpu: float, gpu: float) -> int:
    """Return how many stages with such a demand fit on a node."""
    resources = node["Resources"]
    fits = resources.get("CPU", 0) / cpu
    if gpu > 0:
        fits = min(fits, resources.get("GPU", 0) / gpu)
    return int(fits + 1e-9)


def _condensed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return timings summed by stage, victim and device."""
    sums: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        group = (row["stage"], row["victim"], row["device"])
        known = sums.setdefault(group, {**row, "units": 0, "seconds": 0.0, "count": 0})
        for name in ("units", "seconds", "count"):
            known[name] += row[name]
    return list(sums.values())


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, stop Tune as cleanly as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
