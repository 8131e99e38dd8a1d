"""How a sweep stands, running or dead, from what is on disk. Looks only, and changes nothing.

Cells and what they rest on are in the plans, results and failures in the store, who works in leases
and registered launches, and when each stage began and ended in the journal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from btu.errors import UserError
from orchestrator.plan.graph import Graph
from orchestrator.plan.planner import RefusedCell
from orchestrator.plan.work import needed
from orchestrator.results.folder import PLANS, Launched, Results, find_sweep, store_location
from orchestrator.run.progress import label
from orchestrator.run.schedule import CELL
from orchestrator.store.lease import Holder
from orchestrator.store.storage import is_url, open_storage
from orchestrator.store.store import Store
from orchestrator.sweep.load import resolve
from orchestrator.sweep.sections import ResourceSpec

if TYPE_CHECKING:
    from orchestrator.tracking.reader import RunState


class CellState(StrEnum):
    """Where a cell stands.

    running: it, or a stage that it rests on, is computed right now. orphaned: whoever computed it
    is gone. open: neither has a result nor is anybody at it.
    """

    done = "done"
    running = "running"
    failed = "failed"
    orphaned = "orphaned"
    open = "not started"


class SweepState(StrEnum):
    """Where a sweep stands.

    failed: cells failed and none are left, or all were refused. stopped: cells are left, or none
    was launched yet, and no launch is at it.
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


class Work(NamedTuple):
    """A stage that somebody computes, or did until he was gone.

    cells: how many rest on it. since: Unix time at which computing began, None where no journal
    has it. silent: seconds since the last sign of life, None where unknown.
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


@dataclass(frozen=True)
class Status:
    """How a sweep stands.

    stages: distinct ones, as (done, all); one whose model was removed and is read again is not
    done. seconds_left: of computing, over all workers; None where a kind of stage that is left was
    never timed (`untimed`). at_once: how many stages the last launch ran at a time. optuna: its
    cells are chosen as it goes. held: keys with a live lease. untracked: why there are no `runs`,
    or why they are those of an earlier look.
    """

    name: str
    cells: list[Cell]
    refused: list[RefusedCell]
    work: list[Work]
    launches: list[Launch]
    stages: tuple[int, int]
    seconds_left: float | None
    untimed: tuple[str, ...]
    at_once: int
    optuna: bool
    held: frozenset[str] = frozenset()
    runs: Runs | None = None
    untracked: str = ""

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
        """Seconds until all is done, as long as that many stages run at once; None if unknown."""
        if self.seconds_left is None:
            return None
        ended = (CellState.done, CellState.failed)
        left = sum(cell.state not in ended for cell in self.cells)
        # The stages of one cell mostly wait for each other.
        return self.seconds_left / max(1, min(self.at_once, left))

    def facts(self) -> dict[str, Any]:
        """Return all of it as plain data, for JSON. Times are Unix seconds."""
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
            "launches": [launch._asdict() for launch in self.launches],
            "mlflow": None if self.runs is None else asdict(self.runs),
            "untracked": self.untracked,
        }


@dataclass(frozen=True)
class Runs:
    """What MLflow has of a sweep.

    orphaned: ids of runs that are RUNNING while nobody is at their cell. missing: cells with a
    result, or failed, and no run that says so.
    """

    uri: str
    finished: int
    failed: int
    running: int
    orphaned: list[str] = field(default_factory=list)
    missing: int = 0


def sweep_status(output: str, name: str, now: float | None = None) -> Status:
    """Return how a sweep stands. now: Unix seconds.

    Raises:
        UserError: no sweep of that name was launched ("did you mean").
    """
    return _status(find_sweep(output, name), now)


def all_statuses(output: str, now: float | None = None) -> list[Status]:
    """Return how every sweep of an output folder stands."""
    location = output if is_url(output) else str(Path(output).expanduser().resolve())
    storage, store = open_storage(location), Store(store_location(location))
    return [
        _status(Results(location, name, store), now)
        for name in storage.names("")
        if name != "store" and storage.names(f"{name}/{PLANS}")
    ]


def _status(results: Results, now: float | None) -> Status:
    now = time.time() if now is None else now
    store = results.store
    # Before the results: what ends meanwhile is then seen as done, not as not started.
    leases = store.holders("leases", now)
    launches = store.holders("launches", now)
    cells = results.cells()
    committed, dropped = store.committed(), store.dropped()
    ready = committed | dropped
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
    open_ = [c for c in found if c.state not in (CellState.done, CellState.failed)]
    left: dict[str, None] = {}
    graph = Graph()
    for cell in open_:
        stages = cells[cell.key].stages
        again = {k for k in stages if k in dropped}
        if again:
            again &= alive | _read_again(cells[cell.key], graph, committed, dropped)
        left |= dict.fromkeys(k for k in stages if k not in ready or k in again)
        left[cell.key] = None
    victims = {key: _victim(cell) for cell in cells.values() for key in (*cell.stages, cell.key)}
    timings = _Timings(journal, names, victims, store.timings(), _on_gpu(cells.values()))
    seconds, untimed = _left(left, names, victims, timings, work, now)
    done = sum(key in ready and key not in left for key in names)
    return Status(
        results.name,
        found,
        results.refused(),
        work,
        [_launch(holder) for holder in launches if holder.facts.get("sweep") == results.name],
        (done, len(names)),
        seconds,
        untimed,
        max(_peak(journal), len(alive)),
        "optuna" in (yaml.safe_load(_sweep_text(results)) or {}),
        frozenset(holder.name for holder in leases if not holder.lost),
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
) -> Work:
    facts = holder.facts
    since = [e["time"] for e in journal if e["event"] == "compute" and e["key"] == holder.name]
    return Work(
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
    """Return the journal of the sweep whose launch holds a lease: stages are shared by sweeps."""
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

# In the place of what a cell's data and weights are in its keys: who reads what does not depend on
# it, and they may be on another machine.
_ANY_DATA, _ANY_VICTIM = {"train": "train", "clean": "clean", "eval": "eval"}, "any"


def _read_again(
    cell: Launched, graph: Graph, committed: Collection[str], dropped: Collection[str]
) -> set[str]:
    """Return the stages of a cell that have to be computed, also again for the sake of their model.

    A plan does not keep who reads models: that is told by the stages which this version has for
    such a cell. Nothing where they are not those of the plan, since another version computes
    another cell, or cannot be had, as without a language model that a defense names.
    """
    try:
        stage = graph.cell(resolve(cell.config()), _ANY_DATA, _ANY_VICTIM, {})
    except (UserError, ValueError, OSError):
        return set()
    names = {part.key: part.name for part in stage.inputs.values()}
    keys = {name: key for key, name in cell.stages.items()}
    if sorted(names.values()) != sorted(keys) or len(keys) != len(cell.stages):
        return set()
    done, gone = (
        {k for k, name in names.items() if keys[name] in of} for of in (committed, dropped)
    )
    return {keys[names[key]] for key in needed([stage], done, gone) if key in names}


def _victim(cell: Launched) -> str:
    base = cell.base.get("victim") or {}
    return str(cell.varied.get("victim.name", base.get("name", "")))


def _on_gpu(cells: Iterable[Launched]) -> bool:
    cell = next(iter(cells), None)
    return cell is not None and ResourceSpec(**(cell.base.get("resources") or {})).gpu > 0


class _Timings:
    """Mean seconds of a stage: of this sweep's own, else of any in the store.

    A plan does not keep how many rows a stage passes over, so stages of one name count alike.
    """

    def __init__(
        self,
        journal: Iterable[Mapping[str, Any]],
        names: Mapping[str, str],
        victims: Mapping[str, str],
        rows: Iterable[Mapping[str, Any]],
        gpu: bool,
    ) -> None:
        # By order of preference: seconds and count by stage and victim, or by stage alone.
        self._sums: list[dict[tuple[str, str | None], list[float]]] = [{}, {}, {}]
        for key, seconds in _durations(journal):
            if key in names:
                self._add(0, names[key], victims[key], seconds, 1)
        for row in rows:
            # Of work on a GPU a CPU's times are at least a bound.
            level = 1 if (row["device"] != "cpu") == gpu else 2
            if level == 1 or gpu:
                self._add(level, row["stage"], row["victim"], row["seconds"], row["count"])

    def _add(self, level: int, stage: str, victim: str, seconds: float, count: float) -> None:
        for known in ((stage, victim), (stage, None)):
            sums = self._sums[level].setdefault(known, [0.0, 0.0])
            sums[0] += seconds
            sums[1] += count

    def seconds(self, stage: str, victim: str) -> float | None:
        """Return the expected seconds of a stage; None where none like it was timed."""
        for sums in self._sums:
            found = sums.get((stage, victim)) or sums.get((stage, None))
            if found is not None:
                return found[0] / found[1]
        return None


def _durations(journal: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, float]]:
    """Yield key and seconds of every stage that a journal saw computed to its end."""
    begun: dict[tuple[str, str], float] = {}
    for event in journal:
        at = (event.get("key", ""), event.get("launch", ""))
        if event["event"] == "compute":
            begun[at] = event["time"]
        elif event["event"] == "end":
            start = begun.pop(at, None)
            if start is not None and event.get("outcome") == "done":
                yield at[0], event["time"] - start


def _peak(journal: Iterable[Mapping[str, Any]]) -> int:
    """Return how many stages the last launch in a journal computed at once, at most."""
    events = [event for event in journal if event["event"] in ("compute", "end")]
    last = [event for event in events if event.get("launch") == events[-1].get("launch")]
    running: set[str] = set()
    peak = 0
    for event in last:
        if event["event"] == "compute":
            running.add(event["key"])
        else:
            running.discard(event["key"])
        peak = max(peak, len(running))
    return peak


def _left(
    left: Iterable[str],
    names: Mapping[str, str],
    victims: Mapping[str, str],
    timings: _Timings,
    work: Iterable[Work],
    now: float,
) -> tuple[float | None, tuple[str, ...]]:
    """Return the seconds of computing that are left, and names of stages that were never timed."""
    elapsed = {w.key: now - w.since for w in work if w.since is not None and not w.lost}
    total = 0.0
    untimed: dict[str, None] = {}
    for key in left:
        seconds = timings.seconds(names[key], victims[key])
        if seconds is None:
            untimed[names[key]] = None
        else:
            total += max(0.0, seconds - elapsed.get(key, 0.0))
    return (None if untimed else total), tuple(untimed)


# MLflow -----------------------------------------------------------------------------------------


def tracked(status: Status, uri: str, states: Iterable[RunState]) -> Runs:
    """Return what MLflow says of a sweep's cells beside what is on disk.

    states: of its runs, from `orchestrator.tracking.reader.MlflowSource`.
    """
    states = [run for run in states if run.cell]
    by_status = Counter(run.status for run in states)
    told = {run.cell for run in states if run.status in ("FINISHED", "FAILED")}
    ended = [c.key for c in status.cells if c.state in (CellState.done, CellState.failed)]
    return Runs(
        uri,
        by_status["FINISHED"],
        by_status["FAILED"],
        by_status["RUNNING"],
        [run.run_id for run in states if run.status == "RUNNING" and run.cell not in status.held],
        sum(key not in told for key in ended),
    )
