"""What a worker does with one stage: lease, inputs, compute, publish, track. No Ray."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from btu.errors import UserError
from btu.provenance import code_version
from btu.stages import run_stage
from btu.types import ProgressCallback, silent
from orchestrator.store.store import Damaged, Missing, Store

# Full disks, by any of their names. No worker elsewhere would fare better.
FULL = (errno.ENOSPC, errno.EDQUOT)
REASON_CHARACTERS = 2000


class Outcome(StrEnum):
    """What became of a stage.

    done: its result is in the store. busy: someone else computes it. inputs: results that it
    reads are damaged or gone. memory, disk: there was too little. failed: it would fail again.
    """

    done = "done"
    busy = "busy"
    inputs = "inputs"
    memory = "memory"
    disk = "disk"
    failed = "failed"


@dataclass(frozen=True)
class Report:
    """An outcome with what the driver needs to know of it.

    seconds: that it took, 0 where it was there already. lost: keys of inputs to compute again.
    facts: small results to show. untracked: why MLflow does not have the cell, if it should.
    """

    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    lost: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    untracked: str = ""
    device: str = "cpu"


def run_node(
    node: Mapping[str, Any],
    store: Store,
    *,
    owner: str,
    cpus: float = 1,
    gpus: float = 0,
    accumulation: int = 1,
    track: Callable[[str, Path], None] | None = None,
    begin: Callable[[], None] = lambda: None,
    progress: ProgressCallback = silent,
) -> Report:
    """Compute a stage under its lease and publish its result, unless it is there already.

    node: from `Stage.node`. owner: names the launch, in leases. track: called with a cell's key
    and folder once its result is published, still under the lease, so that a cell is written to
    MLflow by one process only. begin: called when computing really begins.

    Raises:
        Exception: of machines, not of the stage: an unusable device, a file system that is gone.
            A fresh worker may do better.
    """
    try:
        return _run_node(node, store, owner, cpus, gpus, accumulation, track, begin, progress)
    except Exception as error:
        # Leases, notes and copies of inputs take room as well as results do.
        if _is_full(error):
            return Report(Outcome.disk, reason=str(error)[:REASON_CHARACTERS])
        raise


def _run_node(
    node: Mapping[str, Any],
    store: Store,
    owner: str,
    cpus: float,
    gpus: float,
    accumulation: int,
    track: Callable[[str, Path], None] | None,
    begin: Callable[[], None],
    progress: ProgressCallback,
) -> Report:
    key = node["key"]
    if store.is_committed(key):
        return Report(Outcome.done)
    lease = store.lease(key, owner)
    try:
        if not lease.acquire():
            return Report(Outcome.busy)
    except OSError as error:
        if _is_full(error):
            return Report(Outcome.disk, reason=str(error))
        raise
    with lease:
        if store.is_committed(key):  # published while this waited
            return Report(Outcome.done)
        failure = store.failure(key)
        if failure is not None:  # another launch has found out meanwhile
            return Report(Outcome.failed, reason=failure["reason"])
        lost: dict[str, str] = {}
        inputs: dict[str, Path] = {}
        for role, before in node["inputs"].items():
            try:
                inputs[role] = store.fetch(before, light=role in node["light"])
            except (Damaged, Missing) as error:
                lost[before] = f"{role} ({error})"
        if lost:
            return Report(Outcome.inputs, reason=", ".join(lost.values()), lost=tuple(lost))
        begin()
        return _compute(node, inputs, store, cpus, gpus, accumulation, track, progress)


def _compute(
    node: Mapping[str, Any],
    inputs: Mapping[str, Path],
    store: Store,
    cpus: float,
    gpus: float,
    accumulation: int,
    track: Callable[[str, Path], None] | None,
    progress: ProgressCallback,
) -> Report:
    from btu.training import use_threads

    started = time.time()
    key = node["key"]
    folder: Path | None = None
    try:
        # Inside the try: a full disk may refuse the folder already.
        folder = store.begin(key)
        use_threads(cpus)
        record = run_stage(
            node, inputs, folder, gpus=gpus, accumulation=accumulation, progress=progress
        )
        facts = {
            "stage": node["name"],
            "units": node["units"],
            "seconds": record["seconds"],
            "device": record["environment"]["device"],
        }
        store.publish(key, folder, node["name"], facts)
    except BaseException as error:
        if folder is not None:
            store.discard(folder)
        report = _judge(error)
        if report is None:
            raise
        if report.outcome is Outcome.failed:
            store.fail(key, _failure(node, report.reason, started))
        return report
    untracked = ""
    if track is not None and node["name"] == "cell":
        try:
            track(key, store.fetch(key))
        except Exception as error:
            # The result is safe; the driver says so and `btu sync` writes the run later.
            untracked = f"{type(error).__name__}: {str(error)[:200]}"
    return Report(
        Outcome.done,
        record["seconds"],
        facts={k: v for k, v in record["facts"].items() if isinstance(v, int | float)},
        untracked=untracked,
        device=record["environment"]["device"],
    )


def _judge(error: BaseException) -> Report | None:
    """Return what an error means for its stage; None where a fresh worker may do better."""
    import torch

    from btu.training import NonFiniteLossError

    # Of a CPU's memory torch says so in words alone.
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if told or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Report(Outcome.memory, reason=str(error)[:REASON_CHARACTERS] or "out of memory")
    if _is_full(error):
        return Report(Outcome.disk, reason=str(error)[:REASON_CHARACTERS])
    # After an error of the device its process is of no more use.
    if isinstance(error, OSError | torch.AcceleratorError) or not isinstance(error, Exception):
        return None
    if isinstance(error, UserError | NonFiniteLossError):
        return Report(Outcome.failed, reason=str(error))
    return Report(Outcome.failed, reason=f"{type(error).__name__}: {error}"[:REASON_CHARACTERS])


def _is_full(error: BaseException) -> bool:
    # Not all libraries raise an OSError: safetensors and SQLite have only their text.
    text = str(error).lower()
    told = "no space left" in text or "disk is full" in text or "os error 28" in text
    return told or (isinstance(error, OSError) and error.errno in FULL)


def _failure(node: Mapping[str, Any], reason: str, started: float) -> dict[str, Any]:
    return {
        "key": node["key"],
        "stage": node["name"],
        "reason": reason,
        "traceback": traceback.format_exc(),
        "code": code_version(),
        "started": started,
        "ended": time.time(),
    }


_modules_frozen = 0  # how many modules were loaded when the heap was last frozen


def free_memory() -> None:
    """Give memory back before a worker's next stage."""
    import torch

    _collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # Batches of many widths fragment glibc's heap, which keeps what it once had: without this a
    # worker on a CPU grows by a gigabyte a cell. Other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _collect() -> None:
    """Collect garbage, and what stages have imported only once.

    A million objects of torch, transformers and MLflow take a third of a second to walk through,
    more than a small stage computes. What outlives a stage is nearly all theirs, so it is frozen
    whenever modules have come; what else was caught is looked at again the next time they do.
    """
    global _modules_frozen
    if len(sys.modules) > _modules_frozen:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _modules_frozen = len(sys.modules)
    else:
        gc.collect()
