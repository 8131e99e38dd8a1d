"""Running a sweep's cells as Ray Tune trials. The only file that imports ray.

The results on disk are the truth: a cell that has one is not run again, so the same command
resumes whatever was interrupted. `Tuner.restore` is not used: it reruns finished trials and
cannot take a grown grid.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Read by ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The older output engine is the one that verbose=0 silences.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# A trial with gpu: 0 must not see the node's GPUs.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner

from btu.errors import UserError
from orchestrator.config import RECIPE_VERSION, Sweep, resolve
from orchestrator.plan import Plan
from orchestrator.progress import SweepProgress
from orchestrator.store import ResultStore

# Environment variables that act in a trial; a remote worker inherits none of the driver's.
PASSED_PREFIXES = ("MLFLOW_", "HF_", "BTU_", "AWS_", "TRANSFORMERS_", "RAY_ACCEL_")
# A worker that dies (killed, node lost) is tried again; an error inside a trial is a result.
WORKER_RETRIES = 2
# One bad record must not keep the others out of MLflow; a dead server must not be asked for each.
GIVE_UP_TRACKING = 3


@dataclasses.dataclass(frozen=True)
class LaunchResult:
    """done: cells with a result on disk. failed: reasons by cell. missing: neither."""

    done: int
    failed: dict[str, str]
    missing: int
    seconds: float

    @property
    def complete(self) -> bool:
        return not self.failed and not self.missing


def launch(sweep: Sweep, plan: Plan, address: str | None, progress: SweepProgress) -> LaunchResult:
    """Run every planned cell that has no result yet.

    address: of a Ray cluster; None starts a local one for the time of the call.

    Raises:
        UserError: the output folder or tracking store cannot be used; no node can hold a trial.
    """
    from orchestrator import tracking

    started = time.monotonic()
    store = ResultStore(sweep.folder)
    store.prepare()
    (sweep.folder / "sweep.yaml").write_text(sweep.text)
    experiment_id = tracking.prepare(sweep)
    uri = tracking.tracking_uri(sweep)
    todo = [cell for cell in plan.cells if not store.is_done(cell.key)]
    progress.begin(total=len(plan.cells), done=len(plan.cells) - len(todo))
    task = {"folder": str(sweep.folder), "sweep": sweep.name, "uri": uri, "id": experiment_id}
    cells = [
        {"key": cell.key, "varied": dict(cell.varied), "config": cell.spec.config()}
        for cell in todo
    ]
    try:
        if cells:
            _run(sweep, task, cells, address, progress)
        _track_missing(store, plan, uri, experiment_id, progress)
    finally:
        progress.end()
    keys = {cell.key for cell in plan.cells}
    failed = {r["key"]: r["reason"] for r in store.failures() if r["key"] in keys}
    done = sum(store.is_done(key) for key in keys)
    missing = len(keys) - done - len(failed)
    return LaunchResult(done, failed, missing, time.monotonic() - started)


def _run(
    sweep: Sweep,
    task: Mapping[str, Any],
    cells: list[dict[str, Any]],
    address: str | None,
    progress: SweepProgress,
) -> None:
    environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED_PREFIXES)}
    if environment.get("BTU_CACHE"):
        # Workers start in folders of their own.
        cache = Path(environment["BTU_CACHE"]).expanduser().resolve()
        environment["BTU_CACHE"] = str(cache)
    attached = ray.is_initialized()
    if not attached:
        _check_answers(address)
        try:
            ray.init(
                # Without "local", ray would join whatever cluster runs on this machine.
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": environment},
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Ray cluster {address or '(local)'} cannot be reached: {error} Check --address, "
                "or leave it out for a local run."
            ) from error
    state = sweep.folder / f".ray-{uuid.uuid4().hex[:8]}"
    try:
        _check_fits(sweep)
        with _sigterm_as_interrupt():
            Tuner(
                tune.with_resources(
                    tune.with_parameters(_trial, task=dict(task)),
                    {"cpu": sweep.resources.cpu, "gpu": sweep.resources.gpu},
                ),
                param_space={"cell": tune.grid_search(cells)},
                # A fresh worker pays 5 s of imports per cell.
                tune_config=TuneConfig(reuse_actors=True, trial_dirname_creator=_trial_folder),
                run_config=RunConfig(
                    name="tune",
                    storage_path=str(state),
                    verbose=0,
                    callbacks=[_ProgressCallback(progress, sweep.name, ResultStore(sweep.folder))],
                    failure_config=FailureConfig(max_failures=WORKER_RETRIES),
                ),
            ).fit()
    finally:
        if not attached:
            ray.shutdown()
        # Tune's own state serves nothing here: results are committed by the workers.
        shutil.rmtree(state, ignore_errors=True)


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


def _check_fits(sweep: Sweep) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": sweep.resources.cpu, "GPU": sweep.resources.gpu}
    if not any(all(node.get(k, 0) >= v for k, v in asked.items()) for node in nodes):
        have = ", ".join(f"{n.get('CPU', 0):g} CPU / {n.get('GPU', 0):g} GPU" for n in nodes)
        raise UserError(
            f"no node can hold a trial with resources cpu={sweep.resources.cpu:g} "
            f"gpu={sweep.resources.gpu:g} (nodes: {have}); lower resources, or use --address."
        )


def _trial_folder(trial: Any) -> str:
    # Tune's default name spells out the parameters, beyond what file systems allow.
    return f"cell_{trial.trial_id}"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, stop Tune as cleanly as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _trial(config: dict[str, Any], task: dict[str, Any]) -> None:
    """Run one cell in a Ray worker: result to disk, then to MLflow, then the word to Tune."""
    from orchestrator import tracking
    from orchestrator.trial import run_and_store

    cell = config["cell"]
    store = ResultStore(Path(task["folder"]))
    record = run_and_store(
        resolve(cell["config"]), cell["key"], task["sweep"], cell["varied"], store
    )
    try:
        if record["status"] == "finished":
            tracking.log_cell(task["uri"], task["id"], store, cell["key"])
        else:
            tracking.log_failure(task["uri"], task["id"], record)
        untracked = ""
    except Exception as error:
        # The result is safe on disk; the driver reports this and writes the run at the end.
        untracked = f"{type(error).__name__}: {str(error)[:200]}"
    _free_memory()
    tune.report(
        {
            "status": record["status"],
            "reason": record.get("reason", ""),
            "untracked": untracked,
            "trial_seconds": record["ended"] - record["started"],
            **{f"cell_{k}": record.get("metrics", {}).get(k) for k in ("asr", "cacc")},
        }
    )


def _free_memory() -> None:
    """Give memory back before the worker's next cell."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # Batches of many widths fragment glibc's heap, which keeps what it once had: without this a
    # worker on a CPU grows by a gigabyte a cell. Other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _track_missing(
    store: ResultStore, plan: Plan, uri: str, experiment_id: str, progress: SweepProgress
) -> None:
    """Write the runs that MLflow has missed; say how many it still misses."""
    from orchestrator import tracking

    writes: list[Callable[[], None]] = [
        partial(tracking.log_cell, uri, experiment_id, store, cell.key)
        for cell in plan.cells
        if store.is_done(cell.key)
    ]
    writes += [
        partial(tracking.log_failure, uri, experiment_id, record) for record in store.failures()
    ]
    missed = []
    for write in writes:
        try:
            write()
        except Exception as error:
            missed.append(f"{type(error).__name__}: {str(error)[:200]}")
            if len(missed) == GIVE_UP_TRACKING:
                break
    if missed:
        progress.note(
            f"some results are on disk but not in MLflow ({missed[0]}); the same command writes "
            f"them once {tracking.shown(uri)} answers."
        )


class _ProgressCallback(Callback):  # type: ignore[misc]  # ray is untyped
    """Passes Tune's events to the progress line, and records trials that Tune gave up."""

    def __init__(self, progress: SweepProgress, sweep_name: str, store: ResultStore) -> None:
        self._progress: SweepProgress | None = progress
        self._sweep_name = sweep_name
        self._store = store

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks; a live terminal display cannot be.
        return {**self.__dict__, "_progress": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._progress:
            self._progress.started(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._progress:
            varied = trial.config["cell"]["varied"]
            self._progress.finished(trial.trial_id, varied, trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        cell = trial.config["cell"]
        error = str(trial.get_error() or "").strip() or "its worker died"
        reason = f"gave up after {WORKER_RETRIES + 1} tries: {error.splitlines()[-1].strip()}"
        if not self._store.is_done(cell["key"]):
            self._record(cell, trial.run_metadata.start_time or time.time(), reason, error)
        if self._progress:
            self._progress.finished(
                trial.trial_id, cell["varied"], {"status": "failed", "reason": reason}
            )

    def _record(self, cell: dict[str, Any], started: float, reason: str, error: str) -> None:
        from orchestrator.trial import failure_tags

        record = {
            **cell,
            "recipe": RECIPE_VERSION,
            "sweep": self._sweep_name,
            "status": "failed",
            "started": started,
            "ended": time.time(),
            "reason": reason,
            "traceback": error,
            "tags": failure_tags(resolve(cell["config"])),
        }
        try:
            self._store.commit_failure(record)
        except OSError as problem:  # a full disk; raised in a callback, it would end the sweep
            if self._progress:
                self._progress.note(f"the failure of {cell['key']} was not recorded: {problem}")
