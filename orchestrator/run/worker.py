"""What a worker does with one stage: lease, inputs, compute, publish, track. Without Ray."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from btu.errors import UserError
from btu.provenance import code_version
from btu.stages import MODEL, digest_of, read_record, run_stage, write_record
from btu.types import ProgressCallback, silent
from orchestrator.results.folder import POISON, Results, defended_key
from orchestrator.run.memory import Peak
from orchestrator.run.nodes import Environment
from orchestrator.run.schedule import CELL
from orchestrator.store.store import Damaged, Missing, Store

# What a full disk raises. Another worker would find it full as well.
FULL = (errno.ENOSPC, errno.EDQUOT)
REASON_CHARACTERS = 2000
# Seconds for which a stage that another launch computes is left to it.
WAIT_SECONDS = 3.0


class Outcome(StrEnum):
    """How a stage ended.

    done: its result is in the store.
    busy: another launch computes it.
    inputs: results that it reads are damaged or gone.
    memory, disk: there was too little.
    failed: it raised an error, and would again.
    """

    done = "done"
    busy = "busy"
    inputs = "inputs"
    memory = "memory"
    disk = "disk"
    failed = "failed"


@dataclass(frozen=True)
class Launch:
    """What workers need of a launch.

    id: names it, in leases.
    store: where the store is.
    output: the sweep's output folder or URL.
    sweep: the sweep's name.
    tracking: `Publisher.tracking`; None if MLflow does not answer.
    environment: variables of a worker's process, to be set before anything else is imported.
    """

    id: str
    # URLs and URIs may contain a password.
    store: str = field(repr=False)
    output: str = field(repr=False)
    sweep: str
    tracking: Mapping[str, Any] | None = field(repr=False)
    environment: Environment = field(default_factory=Environment)


@dataclass(frozen=True)
class StageCall:
    """A stage as it travels to a worker.

    node: from `Stage.node`.
    cpus: how many CPUs it may use.
    gpus: how many GPUs, or which share of one.
    accumulation: number of parts that each batch is cut into, to save memory.
    varied: the coordinates of a cell, by dotted key.
    model: whether it has a model, which may have been dropped.
    again: whether it is computed for its model, which was dropped before it was handed out.
    same_as: key of a stage with an equal result, which is taken over; empty if there is none.
    keep: whether its model stays in the store: a result is then taken over with its model.
    """

    node: Mapping[str, Any]
    cpus: float = 1
    gpus: float = 0
    accumulation: int = 1
    varied: Mapping[str, Any] = field(default_factory=dict)
    model: bool = True
    again: bool = False
    same_as: str = ""
    keep: bool = False

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> StageCall:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Report:
    """The outcome of a stage, and its details for the driver.

    seconds: how long it took; 0 if the result was there already.
    reason: why there is no result, shown to users.
    lost: keys of inputs to compute again.
    facts: small results to show.
    untracked: why MLflow does not have the cell, if it should.
    device: where it was computed.
    memory, gpu_memory: the most bytes that it took, of its process and on the device.
    digest: `btu.stages.digest_of` its facts; empty if the result was there already.
    dropped: whether the result is without its model.
    """

    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    lost: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    untracked: str = ""
    device: str = "cpu"
    memory: int = 0
    gpu_memory: int = 0
    digest: str = ""
    dropped: bool = False

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        facts = json.loads(text)
        return cls(**{**facts, "outcome": Outcome(facts["outcome"]), "lost": tuple(facts["lost"])})


_stores: dict[str, Store] = {}


def _store(location: str) -> Store:
    # Kept for the next stage: it remembers which files were verified.
    if location not in _stores:
        _stores[location] = Store(location)
    return _stores[location]


_sweeps: dict[tuple[str, str, str], Results] = {}


def _results(launch: Launch) -> Results:
    # Kept as well: on an object store each has connections of its own.
    place = (launch.store, launch.output, launch.sweep)
    if place not in _sweeps:
        _sweeps[place] = Results(launch.output, launch.sweep, _store(launch.store))
    return _sweeps[place]


def compute_call(call: StageCall, launch: Launch) -> Report:
    """Compute a stage of a launch, and write the run of a cell to MLflow."""
    results = _results(launch)
    store = results.store

    def track(key: str, folder: Path) -> None:
        from orchestrator.tracking.writer import Tracker

        where = launch.tracking
        record = results.record(key, call.varied)
        if where is not None and record is not None:
            tracker = Tracker(where["uri"], where["id"], results, fresh=where["fresh"])
            model = defended_key(call.node) if where["models"] else ""
            tracker.log(record, folder, call.node["inputs"].get(POISON, ""), model)

    def begin() -> None:
        with suppress(Exception):  # a full disk, a lost store: the stage will report it
            # Now: whoever dies while computing has begun to.
            results.journal_now("compute", key=call.node["key"], launch=launch.id)

    report = run_node(
        call.node,
        store,
        owner=launch.id,
        cpus=call.cpus,
        gpus=call.gpus,
        accumulation=call.accumulation,
        model=call.model,
        again=call.again,
        same_as=call.same_as,
        keep=call.keep,
        track=track,
        begin=begin,
    )
    free_memory()
    store.trim_cache()
    return report


def wait_for_others(location: str) -> None:
    """Wait until another launch has released a lease of a store, or for WAIT_SECONDS."""
    store = _store(location)
    before = store.leases.leased()
    until = time.monotonic() + WAIT_SECONDS
    pause = 1.0 if store.storage.objects else 0.2  # on an object store each look is a request
    while time.monotonic() < until and before <= store.leases.leased():
        time.sleep(pause)


def run_node(
    node: Mapping[str, Any],
    store: Store,
    *,
    owner: str,
    cpus: float = 1,
    gpus: float = 0,
    accumulation: int = 1,
    model: bool = True,
    again: bool = True,
    same_as: str = "",
    keep: bool = False,
    track: Callable[[str, Path], None] | None = None,
    begin: Callable[[], None] = lambda: None,
    progress: ProgressCallback = silent,
) -> Report:
    """Compute a stage under its lease and publish its result, unless it is there already.

    node: from `Stage.node`.
    store: where inputs are read and the result goes.
    owner: names the launch, in leases.
    cpus: how many threads torch uses.
    gpus: above 0 computes on CUDA.
    accumulation: number of parts that each batch is cut into, to save memory.
    model: whether it has a model, which may have been dropped.
    again: whether to compute it if that is so.
    same_as: as in `StageCall`.
    keep: likewise.
    track: called with a cell's key and folder once its result is published, still under the lease,
        so that only one process writes a cell to MLflow.
    begin: called when computing begins, not if the result is there already.
    progress: called while it computes.

    Raises:
        Exception: of machines, not of the stage: an unusable device, a file system that is gone.
            A fresh worker may do better.
    """
    call = StageCall(
        node, cpus, gpus, accumulation, model=model, again=again, same_as=same_as, keep=keep
    )
    try:
        return _Attempt(call, store, track, begin, progress).run(owner)
    except Exception as error:
        # Leases, notes and copies of inputs take up space too, not only results.
        if _is_full(error):
            return Report(Outcome.disk, reason=str(error)[:REASON_CHARACTERS])
        raise


@dataclass(frozen=True)
class _Attempt:
    """One try at a stage. Attributes as the arguments of `run_node`."""

    call: StageCall
    store: Store
    track: Callable[[str, Path], None] | None
    begin: Callable[[], None]
    progress: ProgressCallback

    @property
    def key(self) -> str:
        return str(self.call.node["key"])

    def run(self, owner: str) -> Report:
        """Take the lease and compute, unless the stage has ended or somebody else has the lease."""
        lease = self.store.leases.lease(self.key, owner)
        # The lease first: whoever hands out a stage has just seen that it has no result.
        if not lease.acquire():
            done = self.store.is_committed(self.key)
            return Report(Outcome.done if done else Outcome.busy)
        with lease:
            seen = self.store.look(self.key, dropped=self.call.model)
            # Published meanwhile; or by a worker of the same chain that died, and nobody needs its
            # model any more.
            if seen.committed or (seen.dropped and not self.call.again):
                return Report(Outcome.done, dropped=not seen.committed)
            if seen.failure is not None:  # another launch ran it meanwhile
                return Report(Outcome.failed, reason=seen.failure["reason"])
            if self.call.same_as and not seen.dropped:
                taken = self._take_over(self.call.same_as)
                if taken is not None:
                    return taken
            inputs, lost = self._inputs()
            if lost:
                return Report(Outcome.inputs, reason=", ".join(lost.values()), lost=tuple(lost))
            self.begin()
            return self._compute(inputs, new=not seen.dropped)

    def _take_over(self, key: str) -> Report | None:
        """Publish the result of an equal stage as this one's; None if the store has it no more.

        Without the model, as a result whose model was dropped, unless models are kept: what follows
        from equal stages is equal too, and is taken over as well.
        """
        store, node = self.store, self.call.node
        light = self.call.model and not self.call.keep
        try:
            source = store.input(key, light=light)
            record = read_record(source)
        except (Damaged, Missing, FileNotFoundError):
            return None
        # Facts, history and seconds are those of the computation, wherever it took place.
        record |= {"key": self.key, "computed_as": record.get("computed_as", key)}
        folder = store.workspace(self.key)
        try:
            shutil.copytree(
                source,
                folder,
                ignore=lambda place, names: {MODEL} if light and Path(place) == source else set(),
                dirs_exist_ok=True,
            )
            write_record(folder, record)
            info = _info(node, record)
            store.publish(self.key, folder, node["name"], info, new=True, dropped=light)
        except BaseException as error:
            store.discard(folder)
            # Removed while it was copied, for example: then it is computed.
            if isinstance(error, shutil.Error) and not _is_full(error):
                return None
            raise
        digest = digest_of(record["facts"])
        return Report(Outcome.done, digest=digest, dropped=light)

    def _inputs(self) -> tuple[dict[str, Path], dict[str, str]]:
        """Return the folders of the inputs by role, and what is wrong with the lost ones by key."""
        node = self.call.node
        inputs: dict[str, Path] = {}
        lost: dict[str, str] = {}
        for role, before in node["inputs"].items():
            try:
                inputs[role] = self.store.input(before, light=role in node["light"])
            except (Damaged, Missing) as error:
                lost[before] = f"{role} ({error})"
        return inputs, lost

    def _compute(self, inputs: Mapping[str, Path], *, new: bool) -> Report:
        """Compute and publish. new: whether the store has nothing of the stage."""
        from btu.training import use_threads

        started = time.time()
        call, node, store = self.call, self.call.node, self.store
        folder: Path | None = None
        try:
            # Inside the try: a full disk may refuse the folder already.
            folder = store.workspace(self.key)
            use_threads(call.cpus)
            peak = Peak(gpu=call.gpus > 0)
            record = run_stage(
                node,
                inputs,
                folder,
                gpus=call.gpus,
                accumulation=call.accumulation,
                progress=self.progress,
            )
            memory, gpu_memory = peak.bytes, peak.gpu_bytes
            store.publish(self.key, folder, node["name"], _info(node, record), new=new)
        except BaseException as error:
            if folder is not None:
                store.discard(folder)
            report = _judge(error)
            if report is None:
                raise
            if report.outcome is Outcome.failed:
                store.fail(self.key, _failure(node, report.reason, started))
            return report
        return Report(
            Outcome.done,
            record["seconds"],
            facts={k: v for k, v in record["facts"].items() if isinstance(v, int | float)},
            untracked=self._track(),
            device=record["environment"]["device"],
            memory=memory,
            gpu_memory=gpu_memory,
            digest=digest_of(record["facts"]),
        )

    def _track(self) -> str:
        """Write the run of a cell to MLflow; return why that did not work."""
        if self.track is None or self.call.node["name"] != CELL:
            return ""
        try:
            self.track(self.key, self.store.input(self.key))
        except Exception as error:
            # The result is safe; the driver reports it, and `btu sync` writes the run later.
            return f"{type(error).__name__}: {str(error)[:200]}"
        return ""


def _info(node: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the small facts of a stage that its marker keeps."""
    return {
        "stage": node["name"],
        "units": node["units"],
        "seconds": record["seconds"],
        "device": record["environment"]["device"],
    }


def _judge(error: BaseException) -> Report | None:
    """Return what an error means for its stage; None where a fresh worker may do better."""
    import torch

    from btu.training import NonFiniteLossError

    # When a CPU runs out of memory, only torch's message says so.
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if told or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Report(Outcome.memory, reason=str(error)[:REASON_CHARACTERS] or "out of memory")
    if _is_full(error):
        return Report(Outcome.disk, reason=str(error)[:REASON_CHARACTERS])
    # After an error of the device, its process is no longer usable.
    if isinstance(error, OSError | torch.AcceleratorError) or not isinstance(error, Exception):
        return None
    if isinstance(error, UserError | NonFiniteLossError):
        return Report(Outcome.failed, reason=str(error))
    return Report(Outcome.failed, reason=f"{type(error).__name__}: {error}"[:REASON_CHARACTERS])


def _is_full(error: BaseException) -> bool:
    # Not all libraries raise an OSError: safetensors and SQLite have only their text.
    text = str(error).lower()
    signs = ("no space left", "disk is full", "os error 28", "quota exceeded")
    told = any(sign in text for sign in signs)
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
    # Batches of many widths fragment glibc's heap, which keeps memory that it once had: without
    # this a worker on a CPU grows by a gigabyte per cell. Other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _collect() -> None:
    """Collect garbage, but look at the objects of imported modules only once.

    A million objects of torch, transformers and MLflow take a third of a second to walk through,
    longer than a small stage computes. Nearly all objects that outlive a stage are theirs, so
    whenever modules were imported, all objects are frozen. Other objects that this freezes are
    looked at again after the next import.
    """
    global _modules_frozen
    if len(sys.modules) > _modules_frozen:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _modules_frozen = len(sys.modules)
    else:
        gc.collect()
