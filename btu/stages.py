"""Stages: the pieces that a cell is computed from, and that other cells share.

A stage is a pure function of its config slice and its inputs. Its key is a hash of everything that
affects the result. Equal keys mean equal results if the arithmetic is the same: CPUs of one kind,
the same number of threads, the same precision (``auto`` depends on the hardware) and the same
versions of the libraries. With other hardware or versions, sums are rounded differently; every
record names device, threads, precision and versions. The weights of a hub model enter keys by name
and revision. This module does not depend on where results are stored: `compute` runs a graph of
stages in this process, and a scheduler may run it elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.private_folder import private_folder, publish
from btu.provenance import environment
from btu.types import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    import torch
    from torch import nn

    from btu.settings import TrainSettings
    from btu.training import Encoded, Epoch

RECORD = "record.json"
# Outputs in this folder are large; a store may drop them, since they can be recomputed.
MODEL = "model"
RESOURCE_KINDS = ("host", "stage", "cell")


@dataclass(frozen=True)
class StageFunction:
    """A function that computes a stage, and how keys name it. Made by `stage`.

    call: writes its result into ``run.folder`` and returns small facts about it, as plain data.
    version: as given to `stage`.
    id: as given to `stage`.
    """

    call: Callable[[StageRun], Mapping[str, Any]]
    version: int
    id: str

    @property
    def path(self) -> str:
        """The import path, as ``module:attribute``. Not part of any key."""
        return f"{self.call.__module__}:{self.call.__qualname__}"

    def __call__(self, run: StageRun) -> Mapping[str, Any]:
        return self.call(run)


def stage(
    *, version: int, id: str | None = None
) -> Callable[[Callable[[StageRun], Mapping[str, Any]]], StageFunction]:
    """Return a decorator that makes a function a `StageFunction`.

    version: increase it when the function computes something different; results of earlier
        versions are then not reused.
    id: names the function in keys; ``module:name`` if None. A function that is moved or renamed
        keeps its first id, so that results in existing stores stay valid.
    """

    def decorate(call: Callable[[StageRun], Mapping[str, Any]]) -> StageFunction:
        return StageFunction(call, version, id or f"{call.__module__}:{call.__qualname__}")

    return decorate


@dataclass(frozen=True, eq=False)
class Stage:
    """A piece of work, declared; nothing runs until it is computed.

    name: shown to users; times are grouped by it.
    function: computes it; its version and id are part of the key.
    config: everything that affects the result, as plain data.
    inputs: the stages that it reads, by role.
    where: inputs that do not affect the result (paths, loading options); not part of the key.
    light: roles of the inputs whose files in ``model/`` are not read.
    kind: which resources it uses: ``host`` needs no accelerator, ``stage`` is shared by cells,
        ``cell`` belongs to one cell.
    units: rows that it processes, for estimates of time.
    model: whether it writes files in ``model/``.
    reads: roles of the inputs of which it reads the facts alone. Stages that differ in nothing but
        the keys of these inputs have equal results if these facts are equal (`key_by_facts`).
    """

    name: str
    function: StageFunction
    config: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    light: tuple[str, ...] = ()
    kind: str = "stage"
    units: int = 0
    model: bool = False
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in RESOURCE_KINDS:
            raise ValueError(f"stage kind must be one of {RESOURCE_KINDS}, got {self.kind!r}.")

    @cached_property
    def key(self) -> str:
        """The fingerprint: 24 hex digits, the same in every process and on every machine."""
        return self._key_with({role: stage.key for role, stage in self.inputs.items()})

    def _key_with(self, inputs: Mapping[str, str]) -> str:
        acts = {
            "function": self.function.id,
            "version": self.function.version,
            "config": self.config,
            "inputs": inputs,
        }
        # No default=str: a value that JSON cannot represent has no stable text either.
        return _digest(acts)

    @cached_property
    def may_be_equal(self) -> bool:
        """Whether its result may equal that of a stage with another key.

        So it is for a stage of one cell that reads the facts alone of an input, and for what
        follows from it. Stages that cells share have one key anyway.
        """
        before = self.inputs.values()
        return self.kind == "cell" and (bool(self.reads) or any(b.may_be_equal for b in before))

    @cached_property
    def shape(self) -> str:
        """What stages have in common whose results may be equal: a key without what `reads` is."""
        if not self.may_be_equal:
            return self.key
        return self._key_with({r: b.shape for r, b in self.inputs.items() if r not in self.reads})

    def key_by_facts(self, facts: Callable[[str], str | None]) -> str | None:
        """Return a key that stages share whose results are equal; None if not yet known.

        facts: from the key of a stage to the `digest_of` its facts; None if they are unknown.
        """
        if not self.may_be_equal:
            return self.key
        inputs = {}
        for role, before in self.inputs.items():
            known = facts(before.key) if role in self.reads else before.key_by_facts(facts)
            if known is None:
                return None
            inputs[role] = known
        return self._key_with(inputs)

    def node(self) -> dict[str, Any]:
        """Return the stage as plain data, its inputs by key."""
        return {
            "key": self.key,
            "name": self.name,
            "function": self.function.path,
            "config": dict(self.config),
            "where": dict(self.where),
            "inputs": {role: stage.key for role, stage in self.inputs.items()},
            "light": list(self.light),
            "reads": list(self.reads),
            "kind": self.kind,
            "units": self.units,
        }

    def closure(self) -> Iterator[Stage]:
        """Yield this stage and all stages that it depends on, inputs first, each key once."""
        seen: set[str] = set()

        def walk(stage: Stage) -> Iterator[Stage]:
            if stage.key in seen:
                return
            seen.add(stage.key)
            for before in stage.inputs.values():
                yield from walk(before)
            yield stage

        yield from walk(self)


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return the fingerprint of the facts that a stage reported: 24 hex digits."""
    return _digest(facts)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def as_config(settings: Any) -> dict[str, Any]:
    """Return a dataclass of plain values as a dict, for a config slice.

    Not `dataclasses.asdict`: its deep copies would dominate the time of planning a large sweep.
    """
    return dict(vars(settings))


@dataclass
class StageRun:
    """What a stage function receives.

    config: the `Stage`'s.
    where: the `Stage`'s.
    inputs: a folder per role, read-only; none for the roles that the `Stage` `reads`.
    folder: empty; what is written here is the result.
    device: where to compute.
    accumulation: number of parts that each batch is cut into, to save memory.
    progress: called with the progress of long work.
    history: `fit` appends its epochs here.
    precisions: the precisions used so far, ``auto`` resolved.
    known: the facts of the inputs of which nothing else is read, by role.
    """

    config: Mapping[str, Any]
    where: Mapping[str, Any]
    inputs: Mapping[str, Path]
    folder: Path
    device: torch.device
    accumulation: int = 1
    progress: ProgressCallback = silent
    history: list[Epoch] = field(default_factory=list)
    precisions: set[str] = field(default_factory=set)
    known: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def fit(
        self,
        model: nn.Module,
        data: Encoded,
        settings: TrainSettings,
        *,
        seed: int,
        stage: str,
        **options: Any,
    ) -> None:
        """Train `model` in place; record the history and the precision.

        options: further arguments of `btu.training.fit`.
        """
        from btu.training import fit, resolve_precision

        self.precisions.add(resolve_precision(settings.precision, self.device))
        self.history += fit(
            model,
            data,
            settings,
            seed=seed,
            stage=stage,
            device=self.device,
            progress=self.progress,
            accumulation=self.accumulation,
            **options,
        )

    def in_batches(
        self,
        model: nn.Module,
        data: Encoded,
        function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        precision: str,
        stage: str,
        of: tuple[int, int] = (0, 1),
    ) -> Any:
        """Compute `function` for every row (`btu.training.in_batches`); record the precision.

        model: the model that `function` uses.
        data: the rows.
        function: (ids, mask) of a batch -> a tensor with a row for each of its rows.
        precision: ``auto``, ``bf16`` or ``fp32``.
        stage: the name for progress.
        of: the number of this pass and the number of passes, for progress.
        """
        from btu.training import PREDICT_BATCH, in_batches, resolve_precision

        self.precisions.add(resolve_precision(precision, self.device))
        number, passes = of
        return in_batches(
            model,
            data,
            function,
            precision=precision,
            device=self.device,
            batch_size=max(1, PREDICT_BATCH // self.accumulation),
            progress=lambda part: self.progress(Progress(stage, number, passes, part=part)),
        )

    def predict(
        self,
        model: nn.Module,
        data: Encoded,
        *,
        precision: str,
        stage: str,
        of: tuple[int, int] = (0, 1),
    ) -> Any:
        """Return the (rows, classes) logits of every row, in its order."""
        from btu.training import logits_of

        return self.in_batches(
            model,
            data,
            lambda ids, mask: logits_of(model, ids, mask),
            precision=precision,
            stage=stage,
            of=of,
        )

    def classes(
        self,
        model: nn.Module,
        data: Encoded,
        *,
        precision: str,
        stage: str,
        of: tuple[int, int] = (0, 1),
    ) -> Any:
        """Return the (rows,) predicted class of every row, in its order."""
        from btu.training import logits_of

        return self.in_batches(
            model,
            data,
            lambda ids, mask: logits_of(model, ids, mask).argmax(1),
            precision=precision,
            stage=stage,
            of=of,
        )

    def facts(self, role: str) -> dict[str, Any]:
        """Return the facts that the stage of an input reported."""
        if role in self.known:
            return self.known[role]
        facts: dict[str, Any] = read_record(self.inputs[role])["facts"]
        return facts


def run_stage(
    node: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    *,
    gpus: float = 0,
    accumulation: int = 1,
    progress: ProgressCallback = silent,
) -> dict[str, Any]:
    """Run one stage, write its files and its record into `folder`, and return the record.

    node: the stage, as `Stage.node` returns it.
    inputs: a folder per role.
    folder: empty.
    gpus: above 0 computes on CUDA.
    accumulation: number of parts that each batch is cut into.
    progress: called with the progress of long work.

    Raises:
        UserError: the stage cannot run with these settings.
        NonFiniteLossError: training diverged.
    """
    from btu.training import choose_device

    started = time.time()
    clock = time.perf_counter()
    module, attribute = node["function"].split(":")
    function: StageFunction = getattr(importlib.import_module(module), attribute)
    device = choose_device(0 if node["kind"] == "host" else gpus)
    progress(Progress(node["name"], 0, 1))
    # The folder is kept from the stage: what it read there would make equal facts unequal results.
    known = {role: read_record(inputs[role])["facts"] for role in node["reads"]}
    run = StageRun(
        node["config"],
        node["where"],
        {role: place for role, place in inputs.items() if role not in known},
        folder,
        device,
        accumulation,
        progress,
        known=known,
    )
    facts = dict(function(run))
    record = {
        "key": node["key"],
        "stage": node["name"],
        "kind": node["kind"],
        "facts": facts,
        "history": [dataclasses.asdict(epoch) for epoch in run.history],
        "started": started,
        "seconds": time.perf_counter() - clock,
        "units": node["units"],
        "environment": environment(device, accumulation),
        # A stage may train more than once.
        "precisions": sorted(run.precisions),
    }
    write_record(folder, record)
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a stage's result."""
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a stage's result."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return record


def compute(
    stage: Stage,
    root: Path,
    *,
    cpus: float | None = None,
    gpus: float = 0,
    progress: ProgressCallback = silent,
) -> Path:
    """Compute a stage and all that it depends on, in this process; return its result's folder.

    stage: the stage.
    root: gets a folder per stage, named by its key. A stage whose folder exists is not run again:
        stages computed under one root share their work. Processes may share a root, too: each
        computes in a folder of its own, and the first result is kept.
    cpus: number of threads; None leaves the process as it is.
    gpus: above 0 computes on CUDA.
    progress: called with the progress of long work.

    Raises:
        UserError: a stage cannot run with these settings.
        NonFiniteLossError: training diverged.
    """
    if cpus is not None:
        from btu.training import use_threads

        use_threads(cpus)
    for part in stage.closure():
        folder = root / part.key
        if folder.exists():
            continue
        inputs = {role: root / before.key for role, before in part.inputs.items()}
        with private_folder(root, part.key) as staged:
            run_stage(part.node(), inputs, staged, gpus=gpus, progress=progress)
            publish(staged, folder)
    return root / stage.key
