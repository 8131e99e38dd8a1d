"""How a sweep stands, running or dead, from what is on disk. Only reads.

Cells and their stages are in the plans, results and failures in the store. Leases and registered
launches show who computes; the journal records when each stage began and ended.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from orchestrator.plan.listed import ListedCell, ListedPlan, ListedStage
from orchestrator.plan.planner import RefusedCell
from orchestrator.plan.work import Timings, Work, survey, timings_for, victim_name
from orchestrator.results.folder import Launched, Results, find_sweep, sweep_names
from orchestrator.run.progress import label
from orchestrator.run.schedule import CELL
from orchestrator.store.lease import Holder
from orchestrator.store.storage import open_storage
from orchestrator.store.store import Store
from orchestrator.sweep.output import output_location, store_location
from orchestrator.sweep.sections import ResourceSpec
from orchestrator.sweep.typed import build_section

if TYPE_CHECKING:
    from orchestrator.tracking.reader import RunState


class CellState(StrEnum):
    """Where a cell stands.

    running: the cell, or a stage that it depends on, is being computed.
    orphaned: the process that computed it is gone.
    open: it has no result, and no process computes it.
    """

    done = "done"
    running = "running"
    failed = "failed"
    orphaned = "orphaned"
    open = "not started"


class SweepState(StrEnum):
    """Where a sweep stands.

    failed: cells failed and none are left, or all were refused.
    stopped: no launch runs, and cells are left or none was launched yet.
    """

    done = "done"
    running = "running"
    failed = "failed"
    stopped = "stopped"


class Cell(NamedTuple):
    """A launched cell. label: its coordinates. reason: why it failed, else empty."""

    key: str
    label: str
    state: CellState
    reason: str


class Computation(NamedTuple):
    """A stage that a process computes, or computed until it died.

    cells: how many depend on it.
    since: Unix time at which computing began; None where no journal has it.
    silent: seconds since the last sign of life; None where unknown.
    lost: the process is gone.
    """

    key: str
    stage: str
    cells: int
    host: str
    pid: int
    launch: str
    since: float | None
    silent: float | None
    lost: bool


class Launch(NamedTuple):
    """A registered launch of the sweep. lost: its process is gone."""

    id: str
    host: str
    pid: int
    silent: float | None
    lost: bool


class StageCosts(NamedTuple):
    """What the stages of a kind took that were computed for a sweep.

    computed: how many. seconds: their mean. memory, gpu_memory: the most bytes that one of them
    took, of its process and on its device. devices: what they were computed on.
    """

    stage: str
    computed: int
    seconds: float
    memory: float
    gpu_memory: float
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """How a sweep stands.

    work: the stages that are being computed, or were until their process died.
    stages: distinct ones, as (done, all). A stage whose model was removed and is needed again is
        not done.
    seconds_left: of computing, over all workers; None where a kind of stage that is left was never
        timed (`untimed`), or where it is not known which stages are left (`unlisted`).
    at_once: how many stages the last launch ran at a time.
    optuna: Optuna suggests the cells while the sweep runs.
    held: keys with a live lease.
    untracked: why there are no `runs`, or why they are those of an earlier look.
    unlisted: how many of the cells that are left have their stages in no plan of this version.
    costs: of the stages that were computed for it, by kind.
    """

    name: str
    cells: list[Cell]
    refused: list[RefusedCell]
    work: list[Computation]
    launches: list[Launch]
    stages: tuple[int, int]
    seconds_left: float | None
    untimed: tuple[str, ...]
    at_once: int
    optuna: bool
    held: frozenset[str] = frozenset()
    runs: Runs | None = None
    untracked: str = ""
    unlisted: int = 0
    costs: tuple[StageCosts, ...] = ()

    @property
    def counts(self) -> dict[CellState, int]:
        """How many cells are in each state."""
        found = Counter(cell.state for cell in self.cells)
        return {state: found[state] for state in CellState}

    @property
    def state(self) -> SweepState:
        """Where the sweep as a whole stands."""
        if any(not launch.lost for launch in self.launches):
            return SweepState.running
        if not self.cells:
            return SweepState.failed if self.refused else SweepState.stopped
        counts = self.counts
        if counts[CellState.done] == len(self.cells):
            return SweepState.done
        if counts[CellState.done] + counts[CellState.failed] == len(self.cells):
            return SweepState.failed
        return SweepState.stopped

    @property
    def eta(self) -> float | None:
        """Seconds until all is done if `at_once` stages run at a time; None if unknown."""
        if self.seconds_left is None:
            return None
        ended = (CellState.done, CellState.failed)
        left = sum(cell.state not in ended for cell in self.cells)
        # At most one stage per cell: the stages of a cell mostly wait for each other.
        return self.seconds_left / max(1, min(self.at_once, left))

    def facts(self) -> dict[str, Any]:
        """Return the status as plain data, for JSON. Times are Unix seconds."""
        return {
            "sweep": self.name,
            "state": self.state.value,
            "counts": {state.value: count for state, count in self.counts.items()},
            "stages": {"done": self.stages[0], "all": self.stages[1]},
            "seconds_left": self.seconds_left,
            "eta": self.eta,
            "untimed": list(self.untimed),
            "cells": [cell._asdict() for cell in self.cells],
            "refused": [
                {"varied": dict(cell.varied), "reason": cell.reason} for cell in self.refused
            ],
            "work": [work._asdict() for work in self.work],
            "costs": [costs._asdict() for costs in self.costs],
            "launches": [launch._asdict() for launch in self.launches],
            "mlflow": None if self.runs is None else asdict(self.runs),
            "untracked": self.untracked,
        }


@dataclass(frozen=True)
class Runs:
    """What MLflow has of a sweep.

    orphaned: ids of runs that are RUNNING although no process computes their cell.
    missing: how many finished and failed cells have no run of this folder that says so; `btu sync`
        writes these.
    deleted: how many of those had a run that was deleted in MLflow.
    sync: the command that writes what is missing.
    """

    uri: str
    finished: int
    failed: int
    running: int
    orphaned: list[str] = field(default_factory=list)
    missing: int = 0
    deleted: int = 0
    sync: str = ""


def sweep_status(output: str, name: str, now: float | None = None) -> Status:
    """Return how a sweep stands. now: Unix seconds.

    Raises:
        UserError: no sweep of that name was launched ("did you mean").
    """
    return _status(find_sweep(output, name), now)


def all_statuses(output: str, now: float | None = None) -> list[Status]:
    """Return how every sweep of an output folder stands."""
    location = output_location(output)
    store = Store(store_location(location))
    return [
        _status(Results(location, name, store), now) for name in sweep_names(open_storage(location))
    ]


def _status(results: Results, now: float | None) -> Status:
    now = time.time() if now is None else now
    store = results.store
    # Leases before results: a stage that ends in between is then done, not "not started".
    leases = store.leases.holders("leases", now)
    launches = store.leases.holders("launches", now)
    cells = results.cells()
    committed, dropped = store.committed(), store.dropped()
    reasons = {record["key"]: record["reason"] for record in results.failures()}
    journal = results.journal()

    names = {key: name for cell in cells.values() for key, name in cell.stages.items()}
    names |= dict.fromkeys(cells, CELL)
    held = [holder for holder in leases if holder.name in names and holder.name not in committed]
    users = Counter(key for cell in cells.values() for key in cell.stages)
    journals = {results.name: journal}
    sweeps = {launch.name: str(launch.facts.get("sweep")) for launch in launches}
    work = [
        _work(holder, names, users, _journal_of(results, sweeps, journals, holder))
        for holder in held
    ]

    alive = {w.key for w in work if not w.lost}
    lost = {w.key for w in work if w.lost}
    found = [_cell(cell, committed, reasons, alive, lost) for cell in cells.values()]
    listed = {
        stage.key: stage
        for last in (cell.stage for cell in cells.values())
        if last is not None
        for stage in (*last.inputs.values(), last)
    }
    timings = _timings(journal, listed, store.timings(), _resources(cells.values()))
    open_ = [c.key for c in found if c.state not in (CellState.done, CellState.failed)]
    left = survey(
        ListedPlan({key: ListedCell(listed[key]) for key in open_ if key in listed}),
        committed=committed,
        dropped=dropped,
        failed={},
        timings=timings,
        sizes=False,  # the weights may be elsewhere, and a look must not wait for their hashes
    )
    ready = (committed | dropped) - left.todo
    unlisted = sum(key not in listed for key in open_)
    return Status(
        results.name,
        found,
        results.refused(),
        work,
        [_launch(holder) for holder in launches if holder.facts.get("sweep") == results.name],
        (sum(key in ready for key in names), len(names)),
        None if unlisted else _seconds_left(left, listed, timings, work, now),
        left.unmeasured,
        max(_peak(journal), len(alive)),
        "optuna" in (yaml.safe_load(_sweep_text(results)) or {}),
        frozenset(holder.name for holder in leases if not holder.lost),
        unlisted=unlisted,
        costs=_costs(journal, names),
    )


def _costs(
    journal: Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[StageCosts, ...]:
    """Return what stages took, in the order in which their kinds first ended.

    names: of stages by key.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for event in journal:
        if event["event"] == "end" and event.get("seconds") and event["key"] in names:
            kinds.setdefault(names[event["key"]], []).append(event)
    return tuple(
        StageCosts(
            name,
            len(ended),
            sum(event["seconds"] for event in ended) / len(ended),
            max(event.get("memory", 0) for event in ended),
            max(event.get("gpu_memory", 0) for event in ended),
            tuple(sorted({event.get("device", "") for event in ended} - {""})),
        )
        for name, ended in kinds.items()
    )


def _cell(
    cell: Launched,
    committed: Collection[str],
    reasons: Mapping[str, str],
    alive: Collection[str],
    lost: Collection[str],
) -> Cell:
    keys = {cell.key, *cell.stages}
    if cell.key in committed:
        state = CellState.done
    elif keys & set(alive):
        state = CellState.running
    elif cell.key in reasons:
        state = CellState.failed
    elif keys & set(lost):
        state = CellState.orphaned
    else:
        state = CellState.open
    reason = reasons.get(cell.key, "") if state is CellState.failed else ""
    return Cell(cell.key, label(cell.varied), state, reason)


def _work(
    holder: Holder,
    names: Mapping[str, str],
    users: Mapping[str, int],
    journal: Iterable[Mapping[str, Any]],
) -> Computation:
    facts = holder.facts
    since = [e["time"] for e in journal if e["event"] == "compute" and e["key"] == holder.name]
    return Computation(
        holder.name,
        names[holder.name],
        max(1, users[holder.name]),
        str(facts.get("host", "?")),
        int(facts.get("pid", 0)),
        str(facts.get("owner", "?")),
        since[-1] if since else None,
        holder.silent,
        holder.lost,
    )


def _launch(holder: Holder) -> Launch:
    facts = holder.facts
    host, pid = str(facts.get("host", "?")), int(facts.get("pid", 0))
    return Launch(holder.name, host, pid, holder.silent, holder.lost)


def _journal_of(
    results: Results,
    sweeps: Mapping[str, str],
    journals: dict[str, list[dict[str, Any]]],
    holder: Holder,
) -> list[dict[str, Any]]:
    """Return the journal of the sweep whose launch has a lease: sweeps share stages."""
    sweep = sweeps.get(str(holder.facts.get("owner")), results.name)
    if sweep not in journals:
        journals[sweep] = Results(results.output, sweep, results.store).journal()
    return journals[sweep]


def _sweep_text(results: Results) -> str:
    try:
        return results.storage.read(f"{results.name}/sweep.yaml").decode()
    except FileNotFoundError:  # killed between the plan and it
        return ""


# What is left -----------------------------------------------------------------------------------


def _resources(cells: Iterable[Launched]) -> ResourceSpec:
    cell = next(iter(cells), None)
    written = {} if cell is None else cell.base.get("resources") or {}
    built: ResourceSpec = build_section("resources", ResourceSpec, written)
    return built


def _timings(
    journal: Iterable[Mapping[str, Any]],
    listed: Mapping[str, ListedStage],
    rows: Iterable[Mapping[str, Any]],
    resources: ResourceSpec,
) -> Timings:
    """Return the times of this sweep's stages, and the store's of stages it has not timed yet.

    listed: stages by key. rows: the timings of the store.
    """
    own = [
        {
            "stage": stage.name,
            "victim": victim_name(stage),
            "device": "cpu" if resources.of(stage.kind)[1] == 0 else "cuda",
            "units": stage.units,
            "seconds": seconds,
            "count": 1,
        }
        for key, seconds in _durations(journal)
        if (stage := listed.get(key)) is not None
    ]
    names = {row["stage"] for row in own}
    return timings_for([*own, *(row for row in rows if row["stage"] not in names)], resources)


def _durations(journal: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, float]]:
    """Yield the key and the seconds of every stage that was computed to its end."""
    for key, begun, ended, outcome in _spans(journal):
        if outcome == "done":
            yield key, ended - begun


def _spans(journal: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float, float, str]]:
    """Yield key, begin, end and outcome of every computation; those that have not ended last.

    Times are Unix times; the end of a computation that has not ended is infinite.
    """
    begun: dict[tuple[str, str], float] = {}
    for event in journal:
        at = (event.get("key", ""), event.get("launch", ""))
        if event["event"] == "compute":
            begun[at] = event["time"]
        elif event["event"] == "end" and at in begun:
            start = begun.pop(at)
            # The ends of a chain are journaled together; its stages have their seconds.
            ended = start + event["seconds"] if event.get("seconds") else event["time"]
            yield at[0], start, ended, event.get("outcome", "")
    for (key, _), start in begun.items():
        yield key, start, math.inf, ""


def _peak(journal: Sequence[Mapping[str, Any]]) -> int:
    """Return how many stages the last launch in a journal computed at a time, at most."""
    events = [event for event in journal if event["event"] in ("compute", "end")]
    last = [event for event in events if event.get("launch") == events[-1].get("launch")]
    edges = []
    for _, begun, ended, _ in _spans(last):
        edges += [(begun, 1), (ended, -1)]
    # At one time, ends come first: a worker begins its next stage when it has ended one.
    counts = itertools.accumulate(change for _, change in sorted(edges))
    return max(counts, default=0)


def _seconds_left(
    left: Work,
    listed: Mapping[str, ListedStage],
    timings: Timings,
    work: Iterable[Computation],
    now: float,
) -> float | None:
    """Return the seconds of computing that are left, minus those that running stages have taken.

    left: the stages to compute.
    listed: stages by key.
    work: the stages that are being computed.
    now: Unix seconds.
    """
    if left.seconds is None:
        return None
    elapsed = {w.key: now - w.since for w in work if w.since is not None and not w.lost}
    return left.seconds - sum(
        min(seconds, timings.seconds(listed[key]) or 0.0)
        for key, seconds in elapsed.items()
        if key in left.todo
    )


# MLflow -----------------------------------------------------------------------------------------


def tracked(
    status: Status,
    uri: str,
    states: Iterable[RunState],
    origin: str | None = None,
    sync: str = "",
) -> Runs:
    """Return what MLflow has of a sweep's cells, compared with what is on disk.

    status: how the sweep stands on disk.
    uri: of the MLflow store, as it is shown.
    states: those of its runs, from `orchestrator.tracking.reader.MlflowSource`.
    origin: id of the sweep's folder; runs of other folders are no runs of its cells. None: all are.
    sync: the command that writes what is missing.
    """
    cells = [run for run in states if run.cell]
    active = [run for run in cells if not run.deleted]
    by_status = Counter(run.status for run in active)
    own = [run for run in cells if run.whole and origin in (None, run.origin)]
    recorded = {(run.cell, run.status) for run in own if not run.deleted}
    # Runs that were cut short are deleted by a sync, not by a user.
    gone = {run.cell for run in own if run.deleted and run.status in ("FINISHED", "FAILED")}
    expected = {CellState.done: "FINISHED", CellState.failed: "FAILED"}
    missing = [
        cell.key
        for cell in status.cells
        if cell.state in expected and (cell.key, expected[cell.state]) not in recorded
    ]
    present = {run.cell for run in own if not run.deleted}
    return Runs(
        uri,
        by_status["FINISHED"],
        by_status["FAILED"],
        by_status["RUNNING"],
        [run.run_id for run in active if run.status == "RUNNING" and run.cell not in status.held],
        len(missing),
        sum(key in gone and key not in present for key in missing),
        sync,
    )
