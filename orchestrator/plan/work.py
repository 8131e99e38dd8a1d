"""What is left of a plan to compute, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from btu.errors import UserError
from btu.stages import Stage
from btu.victims import VictimSpec, find_victim, weight_files
from orchestrator.sweep.sections import ResourceSpec

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan

# What a stage takes on disk beside models: tables, token ids, records. Measured on SST-2.
SMALL_BYTES = 300_000


# What is left to do ------------------------------------------------------------------------------


def needed(
    cells: Iterable[Stage], committed: Collection[str], dropped: Collection[str]
) -> dict[str, Stage]:
    """Return the stages that have to be computed for `cells`, inputs first.

    committed: keys with a complete result. dropped: keys whose models were removed since; what
    reads no model from them still can.
    """
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        found_key = stage.key
        if found_key in found:
            return
        for role, before in stage.inputs.items():
            key = before.key
            light = role in stage.light
            if key not in committed and not (light and key in dropped):
                visit(before)
        found[found_key] = stage

    for cell in cells:
        if cell.key not in committed:
            visit(cell)
    return found


class Timings:
    """How long stages took: the basis of every estimate.

    rows: ``stage``, ``victim``, ``device``, ``units``, ``seconds`` and ``count`` of stages of a
    kind, summed. device: what stages compute on, ``cpu`` or another; times on the one say nothing
    of the other. cell_device: the same for the stages of a single cell; None is as `device`.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], device: str, cell_device: str | None = None
    ) -> None:
        self._cpu = {
            "host": True,
            "stage": device == "cpu",
            "cell": (cell_device or device) == "cpu",
        }
        self._sums: dict[tuple[bool, str, str | None], list[float]] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Learn from a row."""
        # By victim, and, for victims that have not been measured, by any.
        for victim in (row["victim"], None):
            known = (row["device"] == "cpu", row["stage"], victim)
            sums = self._sums.setdefault(known, [0.0, 0.0, 0.0])
            for index, name in enumerate(("seconds", "units", "count")):
                sums[index] += row[name]

    def estimate(self, group: Group, count: int, units: int) -> float | None:
        """Return the expected seconds of stages; None where nothing like them was measured.

        count, units: of them, summed.
        """
        cpu = self._cpu[group.kind]
        sums = self._sums.get((cpu, group.stage, group.victim))
        sums = sums or self._sums.get((cpu, group.stage, None))
        if sums is None:
            return None
        seconds, known_units, known_count = sums
        return seconds / known_units * units if known_units else seconds / known_count * count

    def seconds(self, stage: Stage) -> float | None:
        """Return the expected seconds of one stage."""
        return self.estimate(group_of(stage), 1, stage.units)


class Group(NamedTuple):
    """What stages are alike in, as far as their times go."""

    stage: str
    victim: str
    kind: str = "stage"


def group_of(stage: Stage) -> Group:
    """Return the group of a stage."""
    return Group(stage.name, victim_name(stage), stage.kind)


def timings_for(rows: Iterable[Mapping[str, Any]], resources: ResourceSpec) -> Timings:
    """Return the timings that are of use to a sweep with these resources."""
    shared, own = ("cpu" if resources.of(kind)[1] == 0 else "cuda" for kind in ("stage", "cell"))
    return Timings(rows, shared, own)


def victim_name(stage: Stage) -> str:
    """Return what timings are told apart by: the victim's name, empty where none acts."""
    victim = stage.where.get("victim") or stage.where.get("config", {}).get("victim", {})
    if victim:
        return str(victim["name"])
    return next(filter(None, map(victim_name, stage.inputs.values())), "")


@dataclass(frozen=True)
class Work:
    """What is left of a sweep, and what it would be without sharing.

    stages: distinct ones to compute, by name; naive: the same if every cell computed its own.
    seconds, naive_seconds: of computing, over all workers; None without timings.
    longest: the longest chain of stages that wait for each other. unmeasured: names of stages
    without timings. models, small: bytes of all models and of everything else. model_bytes: of the
    largest model. unsized: victims whose models are in neither, since their size is not known.
    """

    done: int
    failed: dict[str, str]
    stages: dict[str, int]
    naive: dict[str, int]
    seconds: float | None
    naive_seconds: float | None
    longest: float | None
    unmeasured: tuple[str, ...]
    models: int
    model_bytes: int
    small: int
    unsized: tuple[str, ...] = ()


def survey(
    plan: Plan,
    *,
    committed: Collection[str],
    dropped: Collection[str],
    failed: Mapping[str, str],
    timings: Timings,
) -> Work:
    """Count what a plan still has to compute.

    failed: reasons by key, of stages and cells: what rests on one is not run.
    """
    reasons = {
        cell.key: reason
        for cell in plan.cells.values()
        if cell.key not in committed and (reason := blocked(cell.stage, failed)) is not None
    }
    cells = [c.stage for c in plan.cells.values() if c.key not in reasons]
    done = sum(cell.key in committed for cell in cells)
    missing = [cell for cell in cells if cell.key not in committed]
    todo = needed(missing, committed, dropped)
    stages: dict[str, int] = {}
    naive: dict[str, int] = {}
    seconds = _by_key(timings.seconds)
    total = naive_total = 0.0
    unmeasured: dict[str, None] = {}
    chain: dict[str, float] = {}
    models = largest = 0
    unsized: dict[str, None] = {}
    for stage in todo.values():
        stages[stage.name] = stages.get(stage.name, 0) + 1
        took = seconds(stage)
        if took is None:
            unmeasured[stage.name] = None
        total += took or 0.0
        before = [chain.get(i.key, 0.0) for i in stage.inputs.values()]
        chain[stage.key] = (took or 0.0) + max(before, default=0.0)
        if stage.model:
            size = _model_bytes(stage.where["victim"])
            if size is None:
                unsized[stage.where["victim"]["name"]] = None
            models += size or 0
            largest = max(largest, size or 0)
    for cell in missing:
        # By key: without a defense one evaluation has two names.
        for stage in {s.key: s for s in (*cell.inputs.values(), cell)}.values():
            naive[stage.name] = naive.get(stage.name, 0) + 1
            naive_total += seconds(stage) or 0.0
    known = not unmeasured
    return Work(
        done,
        reasons,
        stages,
        naive,
        total if known else None,
        naive_total if known else None,
        max(chain.values(), default=0.0) if known else None,
        tuple(unmeasured),
        models,
        largest,
        len(todo) * SMALL_BYTES,
        tuple(unsized),
    )


def blocked(cell: Stage, failed: Mapping[str, str]) -> str | None:
    """Return why a cell cannot be had: its own failure, or that of a stage it rests on."""
    if not failed:
        return None
    if cell.key in failed:
        return failed[cell.key]
    for stage in cell.inputs.values():
        if stage.key in failed:
            return f"stage '{stage.name}' failed: {failed[stage.key]}"
    return None


def _by_key(function: Callable[[Stage], float | None]) -> Callable[[Stage], float | None]:
    """Return `function` with its answers kept by key."""
    known: dict[str, float | None] = {}

    def cached(stage: Stage) -> float | None:
        if stage.key not in known:
            known[stage.key] = function(stage)
        return known[stage.key]

    return cached


@lru_cache
def _weights(name: str, revision: str | None) -> int | None:
    location = find_victim(VictimSpec(name, revision=revision)).location
    folder = Path(location) if Path(location).is_dir() else _downloaded(location, revision)
    files = weight_files(folder, allow_pickle=True) if folder is not None else []
    if not files or not all(path.is_file() for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def _downloaded(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder in which the hub's client keeps a model, None if it has none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError:  # no such name can be on the hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def _model_bytes(victim: Mapping[str, Any]) -> int | None:
    """Return the size of a victim's weights; None of a hub model that is not here yet."""
    try:
        return _weights(victim["name"], victim.get("revision"))
    except UserError:
        return None
