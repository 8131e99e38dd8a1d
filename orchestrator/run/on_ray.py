"""A launch's stages as Ray Tune trials, one or a chain at a time. The only file that imports ray.

`Driver` decides what runs. Tune asks for it through a searcher, and reports through a callback.
`Tuner.restore` is not used: it reruns finished trials, and cannot continue with a larger grid.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Read by ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The older output engine is the one that verbose=0 silences.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Stages report no common metric.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# Tune would write the state of all trials again and again, and nothing here reads it.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")
# Ray lowers its workers' priority: next to a busy process a stage would get 3 % of the CPU (Linux
# weighs niceness 15 as 36, 0 as 1,024). On a cluster, set this on each node (docs/cluster.md).
os.environ.setdefault("RAY_worker_niceness", "0")
# A trial with gpu: 0 must not see the node's GPUs.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import psutil
import ray
from ray import tune
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayError
from ray.tune import (
    Callback,
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    TuneConfig,
    Tuner,
)
from ray.tune.execution import class_cache
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btu.errors import UserError
from orchestrator.plan.planner import Plan, Planner
from orchestrator.results.folder import Results
from orchestrator.run.driver import (
    INTERRUPTED,
    WORKER_RETRIES,
    Driver,
    LaunchResult,
)
from orchestrator.run.local import Diverted, ray_folder, ray_token, stderr_to, tune_folder
from orchestrator.run.nodes import (
    PASSED_PREFIXES,
    Environment,
    check_answers,
    local_environment,
    passed_environment,
    probe,
    ray_settings,
    slots,
    unseen,
)
from orchestrator.run.outage import Watch, answers, run_under
from orchestrator.run.progress import SweepProgress
from orchestrator.run.publish import Publisher
from orchestrator.run.refine import RefineSpec
from orchestrator.run.signals import signals, sigterm_as_interrupt
from orchestrator.run.trials import FINISHED, Trials
from orchestrator.run.worker import (
    Launch,
    Outcome,
    StageCall,
    compute_call,
    wait_for_others,
)
from orchestrator.store.storage import LocalStorage, Storage
from orchestrator.store.store import Store
from orchestrator.sweep.sweep import Sweep

# Tune passes credentials of AWS on by way of a command line; `Launch.environment` has them.
class_cache.ENV_VARS_TO_PROPAGATE = {
    name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith(PASSED_PREFIXES)
}
# Tune prints a page when a worker dies; our progress line says the same.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
# Ray gives its own processes half a minute to start, which a busy machine may exceed.
START_TRIES = 3
# Seconds that a node has to answer whether it sees the store: a new worker has to start there.
NODE_SECONDS = 120
# A chain that has computed for longer since its last report reports again; before a stage that may
# take long, sooner, so that the driver knows what runs.
REPORT_SECONDS, REPORT_BEFORE_LONG_SECONDS = 5.0, 0.5
# Seconds for a Ray to shut down in.
LEAVE_SECONDS = 20.0
# Not `ray.tune.tune`, which is a function of the same name.
_TUNE: Any = importlib.import_module("ray.tune.tune")
# Ray prints the last words of a dead node to the standard output, once for each of its agents.
_WORKER: Any = importlib.import_module("ray._private.worker")
_PRINT = _WORKER.print_worker_logs
_WORKER.print_worker_logs = lambda data, _, *more, **named: _PRINT(data, sys.stderr, *more, **named)


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

    sweep: where results go, and with which resources.
    plan: the cells. It grows by those that a study or `refine` suggests.
    planner: checks those.
    progress: shows the launch to the user.
    address: of a Ray cluster; None starts a local one for the duration of the call.
    retry_failed: run again what failed in an earlier launch.
    max_failures: stop when this many stages have failed.
    refine: place further thresholds where the plan's cells differ.

    Raises:
        UserError: the output folder or tracking store cannot be used; no node can run a stage;
            there are no thresholds to refine.
    """
    store = Store(sweep.store_location, warn=progress.note)
    results = Results(sweep.output, sweep.name, store)
    publisher = Publisher(sweep, results, progress.note)
    driver = Driver(
        sweep,
        plan,
        planner,
        progress,
        results,
        max_failures=max_failures,
        refine=refine,
        retry_failed=retry_failed,
        cell_ended=publisher.cell_ended,
    )
    with sigterm_as_interrupt():
        driver.prepare()
        publisher.prepare()
        with driver.underway():
            gone = False
            if driver.has_work:
                publisher.start()
                try:
                    gone = _compute(driver, sweep, results, publisher.tracking, address, progress)
                finally:
                    publisher.stop()
            driver.drop_models()
            publisher.synchronize(driver.id, interrupted=driver.stopped == INTERRUPTED)
        return replace(driver.result(), ray_gone=gone)


def _compute(
    driver: Driver,
    sweep: Sweep,
    results: Results,
    tracking: Mapping[str, Any] | None,
    address: str | None,
    progress: SweepProgress,
) -> bool:
    """Run the driver's tasks on Ray until it has none left; return whether Ray went away before.

    driver: of the launch.
    sweep: what is launched.
    results: of the sweep, with the store that all nodes must see.
    tracking: `Publisher.tracking`; None if MLflow does not answer.
    address: of a cluster; None for a local Ray.
    progress: shows the launch to the user.

    Raises:
        UserError: Ray does not answer, or its nodes cannot run the sweep.
    """
    # The name is looked up at each call, as ray is.
    trials = Trials(driver, sweep.resources, lambda: ray.nodes())
    log = _log_file(sweep, results, driver.id)
    # Ray goes before the folder that it writes to.
    try:
        with tune_folder() as state, signals() as told, _joined(address, log) as joined:
            told.interrupt()
            launch = Launch(
                driver.id,
                sweep.store_location,
                sweep.output,
                sweep.name,
                tracking,
                joined.environment,
            )
            nodes = [node for node in ray.nodes() if node["Alive"]]
            driver.slots = slots(nodes, sweep.resources)
            if address is not None or len(nodes) > 1:
                _check_nodes(nodes, launch, results.store.storage)
            watch = Watch(_look(), progress.note, joined.words, _own_raylet())
            told.to(watch.stopping)
            with watch.looking():
                tuner = _tuner(
                    trials, launch, driver.slots, watch.stopping, str(state), own=bool(joined.own)
                )
                # What Ray raises of itself: its client ends the process so, where its node died.
                why = run_under(watch, tuner.fit, (RayError, SystemExit))
            if why:
                joined.abandon()
                words = joined.words() if joined.log and not joined.log.empty else ""
                said = f"{why}. {words}".strip()
                if watch.stopping.is_set():
                    progress.note(said)
                else:
                    driver.stop(said.removesuffix("."))
    finally:
        driver.save_timings()
    if trials.error is not None:
        raise trials.error
    driver.all_ended()
    return joined.gone


def _log_file(sweep: Sweep, results: Results, launch: str) -> Path:
    """Return where Ray's own words go: the sweep's folder, or a temporary one for a URL."""
    at = results.storage
    folder = at.root / sweep.name if isinstance(at, LocalStorage) else Path(tempfile.gettempdir())
    return folder / f"ray-{launch}.log"


def _own_raylet() -> Callable[[], bool]:
    """Return what returns whether the Ray process of this machine, which this one uses, runs."""
    own = raylets_at(str(_WORKER.global_worker.node.raylet_socket_name))

    def runs() -> bool:
        try:
            # It may be in another container, where it is not seen.
            return not own or own[0].status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return runs


def raylets_at(socket: str) -> list[psutil.Process]:
    """Return Ray's processes of this machine that listen at a socket."""
    # To the end: those of further nodes on one machine are at the same path and a number.
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet"
        and any(word.endswith(f"={socket}") for word in process.info["cmdline"] or ())
    ]


def nodes_at(address: str) -> list[dict[str, Any]]:
    """Return the nodes of a Ray cluster that are alive, as Ray describes them.

    Raises:
        UserError: it does not answer.
    """
    log = Path(tempfile.gettempdir()) / f"ray-{uuid.uuid4().hex}.log"
    with _joined(address, log):
        return [node for node in ray.nodes() if node["Alive"]]


def _look() -> Callable[[], dict[str, str] | None]:
    """Return what returns the names of Ray's nodes by id, None if it does not answer."""
    head = ray.get_runtime_context().gcs_address

    def look() -> dict[str, str] | None:
        # First: Ray's own call would block, and end this process after a minute.
        if not answers(head):
            return None
        alive = [node for node in ray.nodes() if node["Alive"]]
        return {node["NodeID"]: node["NodeManagerHostname"] for node in alive}

    return look


def _tuner(
    trials: Trials,
    launch: Launch,
    at_once: int,
    stop: threading.Event,
    state: str,
    *,
    own: bool,
) -> Tuner:
    """Return what runs the trials.

    at_once: how many run at once, about.
    stop: ends them.
    state: path of Tune's own files.
    own: whether Ray is this launch's own.
    """
    # Tune sets it at a signal, but catches signals only in the main thread.
    _TUNE._setup_signal_catching = lambda: stop
    return Tuner(
        tune.with_resources(_trainable(launch, own=own), _resources),
        tune_config=TuneConfig(
            search_alg=_Gate(trials),
            num_samples=-1,
            # One more than run at once: the next one can take over a worker without delay.
            max_concurrent_trials=at_once + 1,
            # A new worker imports for 5 s; a reused one does not.
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"stage_{trial.trial_id}",
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=state,
            verbose=0,
            callbacks=[_Events(trials)],
            failure_config=FailureConfig(max_failures=WORKER_RETRIES),
        ),
    )


def _trainable(launch: Launch, *, own: bool) -> Callable[[dict[str, Any]], None]:
    """Return what runs in a worker: `compute_stage` for a launch.

    own: whether Ray is this launch's own.
    """
    if not own:
        # Not a part of the function: Ray's head keeps functions where every user of the cluster can
        # read them, and a launch may hold passwords. Nor an object that this process stores, as
        # `tune.with_parameters` makes: see below. What a task returns stays in this process.
        known = ray.remote(_same).options(num_cpus=0).remote(ray.put(launch))
        ray.wait([known], timeout=NODE_SECONDS)

        def compute_there(config: dict[str, Any]) -> None:
            compute_stage(config, ray.get(known))

        return compute_there

    # A part of the function: objects make Ray's client end this process at once and silently where
    # its node goes down under it, which it then writes to (plasma's `exit_on_connection_failure`).
    def compute(config: dict[str, Any]) -> None:
        compute_stage(config, launch)

    return compute


def _same(launch: Launch) -> Launch:
    return launch


# Tune asks and answers --------------------------------------------------------------------------


class _Gate(Searcher):  # type: ignore[misc]  # ray is untyped
    """Gives Tune the trials to run."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(metric=None, mode=None)
        self._trials = trials

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher into a file that nothing reads.
        return {}

    def suggest(self, trial_id: str) -> Any:
        config = self._trials.suggest(trial_id)
        return Searcher.FINISHED if config == FINISHED else config

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._trials.reported(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # `_Events` gets the errors, with their text.
        if not error and result is not None:
            self._trials.ended(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class _Events(Callback):  # type: ignore[misc]  # ray is untyped
    """Receives Tune's events."""

    def __init__(self, trials: Trials) -> None:
        self._trials: Trials | None = trials

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks, and a live terminal display cannot be pickled.
        return {"_trials": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._trials:
            self._trials.started(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._trials:
            self._trials.looked()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._trials:
            self._trials.gave_up(trial.trial_id, str(trial.get_error() or ""))


# In a worker ------------------------------------------------------------------------------------


def _resources(config: Mapping[str, Any]) -> PlacementGroupFactory:
    held: Mapping[str, Any] = config["held"]
    bundle = {"CPU": held["cpu"], "GPU": held["gpu"], **held.get("custom", {})}
    labels = {"bundle_label_selector": [held["labels"]]} if "labels" in held else {}
    return PlacementGroupFactory([bundle], **labels)


def compute_stage(config: dict[str, Any], launch: Launch) -> None:
    """Compute a chain of stages in a Ray worker, or wait. The last report to Tune ends the trial.

    In between, a chain reports now and then, so that people see what runs and models that are no
    longer needed are removed. Each report costs the driver some milliseconds.
    """
    launch.environment.enter()
    if not config["tasks"]:
        wait_for_others(launch.store)
        tune.report({"waited": True})
        return
    # As text: Tune flattens a dict.
    reports: dict[str, str] = {}
    told = time.monotonic()
    for text in config["tasks"]:
        call = StageCall.from_json(text)
        pause = REPORT_BEFORE_LONG_SECONDS if call.node["units"] else REPORT_SECONDS
        if reports and time.monotonic() - told > pause:
            tune.report({"reports": json.dumps(reports), "more": True})
            told = time.monotonic()
        report = compute_call(call, launch)
        reports[call.node["key"]] = report.to_json()
        if report.outcome is not Outcome.done:
            break
    tune.report({"reports": json.dumps(reports)})


# Nodes ------------------------------------------------------------------------------------------


def _probe(environment: Environment, location: str, folder: str, node: str, token: str) -> str:
    """Set the variables of the launch, which an object store may need; then as `nodes.probe`."""
    environment.enter()
    return probe(location, folder, node, token)


def _check_nodes(nodes: list[Any], launch: Launch, storage: Storage) -> None:
    """Check that every node can read and write the store, and runs the same code, before any work.

    Raises:
        UserError: a node does not see the store, or runs other code.
    """
    token = uuid.uuid4().hex
    folder = f"probes/{launch.id}"
    storage.write(f"{folder}/driver", token.encode())
    # By reference: a small argument would become part of the task's description.
    known = ray.put(launch.environment), ray.put(launch.store)
    try:
        asked = {}
        for node in nodes:
            if node["Resources"].get("CPU", 0) > 0:  # without, it runs nothing
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(_probe).options(num_cpus=0, scheduling_strategy=place)
                asked[node["NodeID"]] = task.remote(*known, folder, node["NodeID"], token)
        names = {node["NodeID"]: node.get("NodeManagerHostname") for node in nodes}
        for node_id, answer in asked.items():
            try:
                problem = ray.get(answer, timeout=NODE_SECONDS)
            except (GetTimeoutError, RayError) as error:
                problem = f"its check did not end ({type(error).__name__})"
            problem = problem or unseen(storage, f"{folder}/{node_id}")
            if problem:
                raise UserError(
                    f"node {names[node_id] or node_id} cannot take part: {problem}. Every node "
                    f"needs the same code, and {launch.store} as a folder that all share (or an "
                    "object store URL as output)."
                )
    finally:
        storage.remove(folder)


# Coming and going -------------------------------------------------------------------------------


@dataclass
class Joined:
    """A connection to Ray.

    environment: the variables that workers do not inherit.
    log: what Ray says; None if it is not this launch's Ray.
    own: the processes of a Ray that this launch has started.
    gone: whether Ray is left alone, since it does not answer.
    """

    environment: Environment
    log: Diverted | None = None
    own: list[psutil.Process] = field(default_factory=list)
    gone: bool = False

    def words(self) -> str:
        """Return a sentence on where Ray's words are; empty if they are where they always were."""
        return self.log.words() if self.log is not None else ""

    def abandon(self) -> None:
        """Leave Ray alone from now on, and end what is left of an own one."""
        self.gone = True
        if self.log is not None:
            self.log.stays = True
        for process in self.own:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        """Leave Ray, unless it is gone or goes meanwhile."""
        if self.gone:
            return
        left = threading.Event()

        def shut_down() -> None:
            with suppress(Exception):
                leave()
            left.set()

        threading.Thread(target=shut_down, daemon=True, name="leave Ray").start()
        if not left.wait(LEAVE_SECONDS):
            self.abandon()


@contextmanager
def _joined(address: str | None, log: Path) -> Iterator[Joined]:
    """Start a local Ray or join a cluster, and leave it at the end.

    A process that is in one already stays in it.

    log: the file for what Ray writes to the standard error of this process.

    Raises:
        UserError: it does not answer or does not start.
    """
    if ray.is_initialized():
        yield Joined(passed_environment())
        return
    with ExitStack() as stack:
        folder = None
        before = set(psutil.Process().children())
        if address is None:
            folder = stack.enter_context(ray_folder())
            stack.enter_context(ray_token())
        else:
            check_answers(address)
        joined = Joined(passed_environment() if address else local_environment())
        joined.log = stack.enter_context(stderr_to(log))
        connect(address, folder)
        stack.callback(joined.close)
        if address is None:
            joined.own = sorted(set(psutil.Process().children()) - before, key=lambda p: p.pid)
        yield joined


def connect(address: str | None, folder: Path | None = None) -> None:
    """Start a local Ray, or join a cluster.

    address: of the cluster; None starts a local Ray.
    folder: for the sockets and logs of a local Ray.

    Raises:
        UserError: it does not answer or does not start.
    """
    for tries_left in reversed(range(START_TRIES)):
        before = set(psutil.Process().children())
        try:
            with nullcontext() if address else _loopback():
                ray.init(
                    # Without "local", ray would join whatever cluster runs on this machine.
                    address=address or "local",
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    # Workers of a local Ray inherit the environment of this process.
                    runtime_env={"env_vars": ray_settings()} if address else None,
                    _temp_dir=str(folder) if folder else None,
                )
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Ray cluster {address or '(local)'} cannot be reached: {error} Check --address, "
                "or leave it out for a local run."
            ) from error
        except Exception as error:
            # Ray raises a bare Exception if its processes did not start in time.
            if type(error) is not Exception:
                raise
            # Ray leaves the processes that did start running until this one ends.
            for process in set(psutil.Process().children()) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not tries_left:
                raise UserError(
                    f"Ray did not start, {START_TRIES} times: {error} If this machine is busy, "
                    "give the same command again when it is less so."
                ) from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Let a Ray that starts meanwhile listen on the loopback interface alone.

    On Linux Ray replaces a loopback address by that of a network interface, in case other machines
    should join. This constant, which is false on macOS and Windows, tells it that none will.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def leave() -> None:
    """Shut Ray down after collecting its garbage, so that no other thread does so meanwhile.

    What Tune leaves behind refers to objects of Ray. If another thread, such as the one that draws
    the summary, frees one of them while Ray shuts down, Ray ends this process at once and silently
    (a "quick exit": github.com/ray-project/ray/pull/19115).
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
