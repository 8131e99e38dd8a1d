"""What is left of a plan to compute, and how long it will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from btu.errors import UserError
from btu.model_files import weight_files
from btu.stages import Stage
from btu.victims import VictimSpec, locate
from orchestrator.plan.listed import ListedPlan, ListedStage, victim_of
from orchestrator.sweep.sections import ResourceSpec

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan

# The size of a stage's files beside models: tables, token ids, records. Measured on SST-2.
SMALL_BYTES = 300_000
# The first estimate of a store without timings: rows per second of one CPU core without AMX, for
# this victim. Rows and seconds of the stages of sweeps/quickstart.yaml (their record.json), summed.
REFERENCE_VICTIM, REFERENCE_ROWS_PER_SECOND = "offline", 50.0

AnyStage: TypeAlias = Stage | ListedStage
S = TypeVar("S", bound=AnyStage)


# What is left to do ------------------------------------------------------------------------------


def needed(
    cells: Iterable[S], committed: Collection[str], dropped: Collection[str]
) -> dict[str, S]:
    """Return the stages that have to be computed for `cells`, inputs first.

    cells: the stages that cells end with.
    committed: keys with a complete result.
    dropped: keys whose models were removed; a stage that reads no model can still read them.
    """
    found: dict[str, Any] = {}

    def visit(stage: AnyStage) -> None:
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


class Basis(IntEnum):
    """What an estimate is based on, the best first.

    measured: stages of the same kind.
    rows: the rows per second of other stages.
    reference: `REFERENCE_ROWS_PER_SECOND`.
    """

    measured = 0
    rows = 1
    reference = 2


class Estimate(NamedTuple):
    """Expected seconds, and what they are based on."""

    seconds: float
    basis: Basis


class Timings:
    """How long stages took: the basis of every estimate.

    rows: ``stage``, ``victim``, ``device``, ``units``, ``seconds`` and ``count`` of stages of a
        kind, summed.
    device: what stages compute on, ``cpu`` or another. Times on one device are of no use for
        another.
    cell_device: the same for the stages of a single cell; None: as `device`.
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
        self._paces: dict[tuple[bool, str], list[float]] = {}  # seconds and units
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the times of a row."""
        # By victim, and over all victims, for those that have not been measured.
        for victim in (row["victim"], None):
            known = (row["device"] == "cpu", row["stage"], victim)
            sums = self._sums.setdefault(known, [0.0, 0.0, 0.0])
            for index, name in enumerate(("seconds", "units", "count")):
                sums[index] += row[name]
        if row["units"]:
            pace = self._paces.setdefault((row["device"] == "cpu", row["victim"]), [0.0, 0.0])
            pace[0] += row["seconds"]
            pace[1] += row["units"]

    def estimate(self, group: Group, count: int, units: int) -> float | None:
        """Return the expected seconds of stages of a group; None if it was never measured.

        count: how many stages. units: their rows, summed.
        """
        cpu = self._cpu[group.kind]
        sums = self._sums.get((cpu, group.stage, group.victim))
        sums = sums or self._sums.get((cpu, group.stage, None))
        if sums is None:
            return None
        seconds, known_units, known_count = sums
        return seconds / known_units * units if known_units else seconds / known_count * count

    def rough(self, group: Group, count: int, units: int) -> Estimate | None:
        """Return an estimate by rows where no stage of this kind was measured.

        None if the pace is unknown: for a victim without a timed stage, except the reference's on a
        CPU, and for stages without rows that are not of kind ``host``.
        """
        seconds = self.estimate(group, count, units)
        if seconds is not None:
            return Estimate(seconds, Basis.measured)
        if not units:
            # Tables and token ids: about a second each.
            return Estimate(float(count), Basis.rows) if group.kind == "host" else None
        cpu = self._cpu[group.kind]
        pace = self._paces.get((cpu, group.victim))
        if pace is not None:
            return Estimate(pace[0] / pace[1] * units, Basis.rows)
        if cpu and group.victim == REFERENCE_VICTIM:
            return Estimate(units / REFERENCE_ROWS_PER_SECOND, Basis.reference)
        return None

    def seconds(self, stage: AnyStage) -> float | None:
        """Return the expected seconds of one stage."""
        return self.estimate(group_of(stage), 1, stage.units)


class Group(NamedTuple):
    """What stages with comparable times have in common."""

    stage: str
    victim: str
    kind: str = "stage"


def group_of(stage: AnyStage) -> Group:
    """Return the group of a stage."""
    return Group(stage.name, victim_name(stage), stage.kind)


def timings_for(rows: Iterable[Mapping[str, Any]], resources: ResourceSpec) -> Timings:
    """Return the timings for a sweep with these resources."""
    shared, own = ("cpu" if resources.of(kind)[1] == 0 else "cuda" for kind in ("stage", "cell"))
    return Timings(rows, shared, own)


def victim_name(stage: AnyStage) -> str:
    """Return the victim's name, by which timings are kept; empty if no victim acts."""
    victim = victim_of(stage)
    if victim:
        return str(victim["name"])
    return next(filter(None, map(victim_name, stage.inputs.values())), "")


@dataclass(frozen=True)
class Work:
    """What is left of a sweep, and what it would be without sharing.

    done: cells with a result.
    failed: reasons by key, for the cells that depend on a failure.
    stages: distinct stages to compute, by name.
    naive: the same if every cell computed its own.
    seconds, naive_seconds: of computing, over all workers; None without timings.
    longest: seconds of the longest chain of stages that wait for each other.
    unmeasured: names of stages without timings.
    models, small: bytes of all models, and of everything else.
    model_bytes: bytes of the largest model.
    unsized: victims of unknown size, whose models are in neither of the two.
    todo: keys of the stages to compute.
    alike: how many of them are not computed if all stages are equal that may be (`Stage.shape`):
        where all thresholds flag the same tokens.
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
    todo: frozenset[str] = frozenset()
    alike: int = 0


def survey(
    plan: Plan | ListedPlan,
    *,
    committed: Collection[str],
    dropped: Collection[str],
    failed: Mapping[str, str],
    timings: Timings,
    sizes: bool = True,
) -> Work:
    """Count what a plan still has to compute.

    plan: its cells.
    committed: keys with a complete result.
    dropped: keys whose models were removed.
    failed: reasons by key, of stages and cells; a cell that depends on one is not run.
    timings: expected times.
    sizes: whether to look up the sizes of models, which reads the victims' weights. Without them,
        models take 0 bytes.
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
    seconds = _by_key(timings.seconds)
    # By key: without a defense one evaluation has two names.
    naive = [
        stage
        for cell in missing
        for stage in {s.key: s for s in (*cell.inputs.values(), cell)}.values()
    ]
    unmeasured = tuple(dict.fromkeys(s.name for s in todo.values() if seconds(s) is None))
    known = not unmeasured
    written = {s.key: _model_bytes(victim_of(s)) for s in todo.values() if s.model and sizes}
    models = [size for size in written.values() if size is not None]
    return Work(
        done,
        reasons,
        dict(Counter(stage.name for stage in todo.values())),
        dict(Counter(stage.name for stage in naive)),
        _total(todo.values(), seconds) if known else None,
        _total(naive, seconds) if known else None,
        _longest_chain(todo.values(), seconds) if known else None,
        unmeasured,
        sum(models),
        max(models, default=0),
        len(todo) * SMALL_BYTES,
        tuple(dict.fromkeys(victim_name(todo[key]) for key in written if written[key] is None)),
        frozenset(todo),
        _alike(todo.values()),
    )


def _alike(stages: Iterable[AnyStage]) -> int:
    # A plan file does not tell which stages may be equal.
    shapes = [s.shape for s in stages if isinstance(s, Stage) and s.may_be_equal]
    return len(shapes) - len(set(shapes))


def _total(stages: Iterable[AnyStage], seconds: Callable[[AnyStage], float | None]) -> float:
    return sum((seconds(stage) or 0.0 for stage in stages), 0.0)


def _longest_chain(
    stages: Iterable[AnyStage], seconds: Callable[[AnyStage], float | None]
) -> float:
    """Return the seconds of the longest chain of stages that wait for each other.

    stages: inputs before the stages that read them.
    """
    chain: dict[str, float] = {}
    for stage in stages:
        before = [chain.get(i.key, 0.0) for i in stage.inputs.values()]
        chain[stage.key] = (seconds(stage) or 0.0) + max(before, default=0.0)
    return max(chain.values(), default=0.0)


def blocked(cell: AnyStage, failed: Mapping[str, str]) -> str | None:
    """Return why a cell has no result: its own failure, or that of a stage it depends on."""
    if not failed:
        return None
    if cell.key in failed:
        return failed[cell.key]
    for stage in cell.inputs.values():
        if stage.key in failed:
            return f"stage '{stage.name}' failed: {failed[stage.key]}"
    return None


def _by_key(function: Callable[[AnyStage], float | None]) -> Callable[[AnyStage], float | None]:
    """Return `function` with a cache by key."""
    known: dict[str, float | None] = {}

    def cached(stage: AnyStage) -> float | None:
        if stage.key not in known:
            known[stage.key] = function(stage)
        return known[stage.key]

    return cached


@lru_cache
def _weights(name: str, revision: str | None) -> int | None:
    place = locate(VictimSpec(name, revision=revision))
    folder = place if isinstance(place, Path) else _downloaded(place, revision)
    files = weight_files(folder, allow_pickle=True) if folder is not None else []
    if not files or not all(path.is_file() for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def _downloaded(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the cache of the hub's client; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError:  # not a valid name on the hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def _model_bytes(victim: Mapping[str, Any]) -> int | None:
    """Return the size of a victim's weights; None for a hub model that is not downloaded yet."""
    try:
        return _weights(victim["name"], victim.get("revision"))
    except UserError:
        return None
