"""Which cells a sweep has, what they share, what is left to compute, and what that will cost.

Loads the data (the rules about rates and columns need the rows) but no torch, ray or mlflow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btu.data import DataSpec, load_corpus
from btu.defense import Given, check_cell
from btu.errors import UserError
from btu.poisoning import choose_rows
from btu.stages import Stage
from btu.types import Corpus
from btu.victims import VictimSource, VictimSpec, find_victim, weight_files
from orchestrator.config import CONTROL, Cell, ResourceSpec, Sweep, TrialSpec, resolve
from orchestrator.graph import Graph

# What a stage takes on disk beside models: tables, token ids, records. Measured on SST-2.
SMALL_BYTES = 300_000
# The first estimate of a store without timings: what one CPU core without AMX does with this
# victim. Rows and seconds of the stages of sweeps/quickstart.yaml (their record.json), summed.
REFERENCE_VICTIM, REFERENCE_ROWS_PER_SECOND = "offline", 50.0


@dataclass(frozen=True)
class PlannedCell:
    """A cell that can run. varied: its coordinates by dotted key. stage: what it ends with."""

    stage: Stage
    spec: TrialSpec
    varied: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The cell's fingerprint."""
        return self.stage.key


@dataclass(frozen=True)
class RefusedCell:
    """A cell that cannot run, with the reason."""

    varied: Mapping[str, Any]
    reason: str


@dataclass
class Plan:
    """What a sweep comes to.

    duplicates: cells that differ in keys that do not act for them; each runs once. Controls that
    are there already are not counted.
    """

    cells: dict[str, PlannedCell] = field(default_factory=dict)
    refused: list[RefusedCell] = field(default_factory=list)
    duplicates: int = 0

    @property
    def controls(self) -> int:
        """How many of the cells are controls."""
        return sum(CONTROL in cell.varied for cell in self.cells.values())


class _Loaded(NamedTuple):
    """A corpus. fingerprints: by role, for keys. revision: of all of it, for tags."""

    corpus: Corpus
    fingerprints: Mapping[str, str]
    revision: str


class Planner:
    """Turns cells into stages, checking each against its data and victim.

    Corpora, victims and whatever else cells have in common are loaded and checked once.
    """

    def __init__(self) -> None:
        self._graph = Graph()
        self._corpora: dict[DataSpec, _Loaded | UserError] = {}
        self._victims: dict[VictimSpec, VictimSource | UserError] = {}
        self._attackable: dict[Hashable, UserError | None] = {}

    def add(self, plan: Plan, cells: Iterable[Cell]) -> list[PlannedCell]:
        """Resolve and check cells, and add them to `plan`. Returns those that are new in it."""
        new = []
        for cell in cells:
            try:
                spec = resolve(cell.config)
                stage = self._stage(spec)
            except UserError as error:
                plan.refused.append(RefusedCell(cell.varied, str(error)))
                continue
            if stage.key in plan.cells:
                plan.duplicates += CONTROL not in cell.varied
                continue
            planned = plan.cells[stage.key] = PlannedCell(stage, spec, cell.varied)
            new.append(planned)
        return new

    def counts(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        """Return the name and counts of every corpus that could be loaded."""
        loaded = [found for found in self._corpora.values() if isinstance(found, _Loaded)]
        return tuple((found.corpus.name, found.corpus.counts()) for found in loaded)

    def _stage(self, spec: TrialSpec) -> Stage:
        """Return the stage that a cell ends with, after every check that needs no training.

        Raises:
            UserError: the cell cannot run, with the reason.
        """
        corpus, fingerprints, revision = self._corpus(spec.data)
        self._check_attack(spec, corpus)
        victim = self._victim(spec.victim)
        counts = corpus.counts()
        given = Given(
            _vocabulary(victim),
            len(corpus.label_names),
            counts["rows_train"],
            counts["rows_clean"],
        )
        check_cell(spec.defense.name, spec.build_defense(), given)
        return self._graph.cell(spec, fingerprints, victim.identity, counts, revision=revision)

    def _corpus(self, spec: DataSpec) -> _Loaded:
        if spec not in self._corpora:
            try:
                corpus = load_corpus(spec)
                self._corpora[spec] = _Loaded(corpus, corpus.fingerprints(), corpus.fingerprint())
            except UserError as error:
                self._corpora[spec] = error
        found = self._corpora[spec]
        if isinstance(found, UserError):
            raise found
        return found

    def _victim(self, spec: VictimSpec) -> VictimSource:
        if spec not in self._victims:
            try:
                self._victims[spec] = find_victim(spec)
            except UserError as error:
                self._victims[spec] = error
        found = self._victims[spec]
        if isinstance(found, UserError):
            raise found
        return found

    def _check_attack(self, spec: TrialSpec, corpus: Corpus) -> None:
        known = (spec.data, spec.poison, json.dumps(dict(spec.attack_params)), spec.seed)
        if known not in self._attackable:
            try:
                _check_attack(spec, corpus)
                self._attackable[known] = None
            except UserError as error:
                self._attackable[known] = error
        refusal = self._attackable[known]
        if refusal is not None:
            raise refusal


def _check_attack(spec: TrialSpec, corpus: Corpus) -> None:
    target = corpus.label_index(spec.poison.target_label)
    attack = spec.build_attack()
    if spec.poison.poison_rate > 0:
        choose_rows(attack, spec.poison, corpus.train, target, spec.seed)
    attackable = attack.candidates(corpus.eval)
    if not (np.asarray(corpus.eval.labels)[attackable] != target).any():
        raise UserError(
            "no evaluation row can be attacked: all are of the target class or without a "
            "paraphrase; choose another target_label or eval split."
        )


@lru_cache
def _vocabulary(victim: VictimSource) -> int | None:
    return victim.vocabulary_size()


def plan_sweep(sweep: Sweep, planner: Planner | None = None) -> Plan:
    """Resolve and check every cell of a sweep, and the controls of those that can run.

    The plan of a sweep that Optuna searches is empty: its cells come as it goes. One suggestion is
    checked as an example (`example_plan`).

    Raises:
        UserError: no cell can run; the message gives the reasons.
    """
    planner = planner or Planner()
    if sweep.optuna is not None:
        example_plan(sweep, planner)
        return Plan()
    plan = Plan()
    planner.add(plan, sweep.cells())
    _refuse_empty(sweep, plan)
    planner.add(plan, sweep.controls_of([cell.varied for cell in plan.cells.values()]))
    return plan


def example_plan(sweep: Sweep, planner: Planner) -> Plan:
    """Return the plan of one suggestion of a sweep that Optuna searches.

    Raises:
        UserError: none of its cells can run.
    """
    space = sweep.optuna.space if sweep.optuna is not None else {}
    plan = Plan()
    planner.add(plan, sweep.expand({key: domain.examples()[0] for key, domain in space.items()}))
    _refuse_empty(sweep, plan)
    return plan


def _refuse_empty(sweep: Sweep, plan: Plan) -> None:
    if plan.cells or not plan.refused:
        return
    reasons = list(dict.fromkeys(cell.reason for cell in plan.refused))
    if len(reasons) == 1:
        raise UserError(reasons[0])
    raise UserError(
        f"none of the {len(plan.refused)} cells of sweep '{sweep.name}' can run:\n  "
        + "\n  ".join(reasons)
    )


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


class Basis(IntEnum):
    """What an estimate rests on, the best first.

    measured: stages of the same kind. rows: the rows a second of other stages. reference:
    `REFERENCE_ROWS_PER_SECOND`.
    """

    measured = 0
    rows = 1
    reference = 2


class Estimate(NamedTuple):
    """Expected seconds, and what they rest on."""

    seconds: float
    basis: Basis


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
        self._paces: dict[tuple[bool, str], list[float]] = {}  # seconds and units
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
        if row["units"]:
            pace = self._paces.setdefault((row["device"] == "cpu", row["victim"]), [0.0, 0.0])
            pace[0] += row["seconds"]
            pace[1] += row["units"]

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

    def rough(self, group: Group, count: int, units: int) -> Estimate | None:
        """Return an estimate also where nothing like these stages was measured, by their rows.

        None where there is no pace: of a victim without a timed stage, except the reference's on
        a CPU, and of stages without rows that are not of kind ``host``.
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
