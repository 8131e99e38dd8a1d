"""Which stage runs next: one whose inputs are there, at the head of the longest chain.

Bookkeeping only: the driver asks for work and reports how it ended.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from btu.stages import Stage
from orchestrator.plan.work import Basis, Estimate, Group, Timings, group_of, needed

# Number of parts that a batch is cut into, at each try of a stage that ran out of memory. From the
# second try on, the stage is alone on its device.
LADDER = (1, 1, 2, 4, 8)
CELL = "cell"


class State(StrEnum):
    """The state of a stage. cached: its result was there before this launch."""

    waiting = "waiting"
    ready = "ready"
    running = "running"
    done = "done"
    cached = "cached"
    failed = "failed"


ENDED = (State.done, State.cached, State.failed)
_Queue: TypeAlias = list[tuple[float, int, str]]


@dataclass
class _Node:
    stage: Stage
    group: Group  # what timings are kept by
    state: State = State.waiting
    missing: set[str] = field(default_factory=set)  # inputs that are not there yet
    # An ordered set: equal chains run in the order of arrival, in every process.
    children: dict[str, None] = field(default_factory=dict)
    rank: float = 0.0  # seconds of the longest chain that starts here
    cell: str | None = None  # key of the only cell that needs it; None where several do
    rung: int = 0  # of LADDER
    again: bool = False  # its model is gone, and is needed again
    repairs: int = 0


@dataclass(frozen=True)
class Task:
    """A stage to run now.

    alone: whether nothing else may run on its device, or on its node if it uses no GPU.
    accumulation: number of parts that each batch is cut into.
    again: whether it is computed for its model, which was removed or lost.
    """

    stage: Stage
    alone: bool
    accumulation: int
    again: bool = False


class Schedule:
    """The stages that are left to compute, and their order.

    Once `most_models` models are on disk and still needed, or are being written, the order changes:
    first the stages that write no model, then those that also read one. Both lead to where a model
    is no longer needed.
    """

    def __init__(
        self,
        cells: Iterable[Stage],
        *,
        committed: Collection[str],
        dropped: Collection[str],
        failed: Mapping[str, str],
        timings: Timings,
        slots: int = 1,
    ) -> None:
        """Schedule cells and the stages that they need.

        cells: the stages that cells end with.
        committed: keys with a complete result.
        dropped: keys whose models were removed; the rest of their results is there.
        failed: reasons by key.
        timings: expected times. They may improve as stages end.
        slots: how many stages run at once, about.
        """
        self.committed = set(committed)
        self.dropped = set(dropped)
        self.failed = dict(failed)
        self.running: dict[str, Stage] = {}  # handed out; some may still wait for a worker
        self.begun: set[str] = set()  # those of them that a worker computes
        self.slots = slots
        self._timings = timings
        self._nodes: dict[str, _Node] = {}
        # See `_queue_of`. An entry is minus rank, order of arrival, key.
        self._ready: tuple[_Queue, ...] = ([], [], [])
        self._order = itertools.count()
        self._models: set[str] = set()  # on disk, and read by a stage that has not ended
        self._released: set[str] = set()  # those with a reader that ended since the last `done`
        # Updated at each change: a sweep may have many thousands of stages to count.
        self.counts = {True: dict.fromkeys(State, 0), False: dict.fromkeys(State, 0)}
        self._left: dict[Group, list[int]] = {}  # by group: stages and their units
        self.add(cells)

    def add(self, cells: Iterable[Stage]) -> None:
        """Take in further cells, with whatever stages they need."""
        cells = list(cells)
        self._open(needed(cells, self.committed, self.dropped))
        for cell in cells:
            if cell.key not in self._nodes:
                self._insert(cell, State.cached)

    def _open(self, stages: Mapping[str, Stage]) -> None:
        """Schedule stages, also those that were done and are needed again.

        stages: inputs before what reads them.
        """
        fresh = []
        for key, stage in stages.items():
            if key not in self._nodes:
                self._insert(stage, State.waiting)
                fresh.append(key)
            elif self._nodes[key].state in (State.done, State.cached):
                self._set(self._nodes[key], State.waiting)
                self._nodes[key].again = True
                fresh.append(key)
            elif self._nodes[key].state in (State.waiting, State.ready):
                fresh.append(key)
        for key in fresh:
            self._connect(key)
        # In reverse, children come before their inputs: every child's rank and cell are known.
        for key in reversed(list(stages)):
            self._rank(key)
            self._nodes[key].cell = self._only_cell(key)
        for key in fresh:
            node = self._nodes[key]
            if node.state is State.failed:
                continue  # it failed together with one of its inputs
            broken = [k for k in (key, *node.missing) if k in self.failed]
            if broken:
                self._fail(key, self.failed[broken[0]])
            else:
                self._settle(node)

    def _settle(self, node: _Node) -> None:
        """Make a stage that has not begun ready if and only if all its inputs are there."""
        if node.state is State.waiting and not node.missing:
            self._make_ready(node.stage.key)
        elif node.state is State.ready and node.missing:
            self._set(node, State.waiting)

    def _insert(self, stage: Stage, state: State) -> None:
        node = self._nodes[stage.key] = _Node(stage, group_of(stage), state)
        node.again = stage.key in self.dropped
        self.counts[stage.name == CELL][state] += 1
        if state not in ENDED:
            self._count_left(node, 1)

    def _count_left(self, node: _Node, sign: int) -> None:
        left = self._left.setdefault(node.group, [0, 0])
        left[0] += sign
        left[1] += sign * node.stage.units

    def _connect(self, key: str) -> None:
        """Link a node with its inputs, and note which of them are not there yet."""
        heavy = _heavy(self._nodes[key].stage)
        for before in self._nodes[key].stage.inputs.values():
            if before.key not in self._nodes:
                self._insert(before, State.cached)
            other = self._nodes[before.key]
            other.children[key] = None
            if other.state not in (State.done, State.cached):
                self._nodes[key].missing.add(before.key)
            elif before.model and before in heavy and before.key in self.committed:
                self._models.add(before.key)

    def _set(self, node: _Node, state: State) -> None:
        counts = self.counts[node.stage.name == CELL]
        counts[node.state] -= 1
        counts[state] += 1
        if (node.state in ENDED) != (state in ENDED):
            self._count_left(node, -1 if state in ENDED else 1)
        node.state = state

    def _rank(self, key: str) -> None:
        node = self._nodes[key]
        # A stage that was never measured still makes its chain longer.
        own = self._timings.estimate(node.group, 1, node.stage.units) or 1.0
        node.rank = own + max((self._nodes[child].rank for child in node.children), default=0.0)

    def _only_cell(self, key: str) -> str | None:
        """Return the only cell that still needs a stage; None where several do."""
        node = self._nodes[key]
        if node.stage.name == CELL:
            return key
        children = (self._nodes[child] for child in node.children)
        cells = {child.cell for child in children if child.state not in ENDED}
        return cells.pop() if len(cells) == 1 else None

    def _make_ready(self, key: str) -> None:
        node = self._nodes[key]
        self._set(node, State.ready)
        # A cell only puts its result together: it costs next to nothing, and people wait for it.
        # Everything else goes by the length of its chain.
        rank = math.inf if node.stage.name == CELL else node.rank
        heapq.heappush(self._queue_of(node), (-rank, next(self._order), key))

    def _queue_of(self, node: _Node) -> _Queue:
        """Return the queue of a stage: those that write no model, read and write, or only write."""
        stage = node.stage
        reads = any(before.model for before in _heavy(stage))
        return self._ready[0 if not stage.model else 1 if reads else 2]

    def next(self, busy: Callable[[str], bool] = lambda key: False) -> Task | None:
        """Return the next stage to run, marked as running; None if none is ready.

        busy: whether another launch computes a stage right now; such stages are passed over.
        """
        passed = []
        chosen = None
        while chosen is None and (queue := self._next_queue()):
            entry = heapq.heappop(queue)
            if self._nodes[entry[2]].state is not State.ready:
                continue  # failed since, with one of its inputs
            if busy(entry[2]):
                passed.append(entry)
            else:
                chosen = self._nodes[entry[2]]
        for entry in passed:
            heapq.heappush(self._queue_of(self._nodes[entry[2]]), entry)
        if chosen is None:
            return None
        self._set(chosen, State.running)
        self.running[chosen.stage.key] = chosen.stage
        return Task(chosen.stage, chosen.rung > 0, LADDER[chosen.rung], chosen.again)

    def follow(self, tasks: Sequence[Task], fits: Callable[[Stage], bool]) -> Task | None:
        """Return the stage that can follow some that run, in the same worker, marked as running.

        A worker that goes on at once saves what it costs to schedule a trial. That is done only for
        stages of one cell, which need nothing but what the worker has computed. Shared stages stay
        trials of their own, since others wait for them. So do stages that can run side by side,
        unless other work keeps the other workers busy.

        tasks: handed out to one worker, in order, the last of them without a follower yet.
        fits: whether the worker has what a stage needs.

        Returns None where no stage can follow.
        """
        cell = self._nodes[tasks[-1].stage.key].cell
        if tasks[0].alone or cell is None:
            return None
        ours = {task.stage.key for task in tasks}
        after = (self._nodes[key] for task in tasks for key in self._nodes[task.stage.key].children)
        unlocked = {
            node.stage.key: node
            for node in after
            if node.state is State.waiting and node.missing <= ours
        }
        others = sum(counts[State.ready] for counts in self.counts.values())
        if len(unlocked) > 1 and others < self.slots:
            return None
        can = [n for n in unlocked.values() if n.cell == cell and n.rung == 0 and fits(n.stage)]
        if not can:
            return None
        # In one worker the order costs no time: first what needs no room for another model.
        node = min(can, key=lambda node: (node.stage.model, -node.rank))
        self._set(node, State.running)
        self.running[node.stage.key] = node.stage
        return Task(node.stage, False, LADDER[0], node.again)

    def _next_queue(self) -> _Queue:
        """Return the queue to take from, an empty one if all are empty."""
        queues = [queue for queue in self._ready if queue]
        if not queues:
            return []
        # Evaluations free models. Without this rule, chains of equal length would pile models up.
        written = sum(stage.model for stage in self.running.values())
        crowded = len(self._models) + written >= most_models(self.slots)
        return queues[0] if crowded else min(queues, key=lambda queue: queue[0])

    def mark_running(self, key: str) -> None:
        """A worker computes a stage that was handed out."""
        if key in self.running:
            self.begun.add(key)

    def _ended(self, key: str) -> None:
        self.running.pop(key, None)
        self.begun.discard(key)

    def done(self, key: str) -> list[str]:
        """A stage has its result. Returns the keys whose models no stage here needs any more."""
        node = self._nodes[key]
        self._ended(key)
        self._set(node, State.done)
        self.committed.add(key)
        if node.stage.model:
            self._models.add(key)
        for child in node.children:
            other = self._nodes[child]
            other.missing.discard(key)
            self._settle(other)
        self._released |= {key, *(before.key for before in _heavy(node.stage))}
        released, self._released = self._released, set()
        return self._unneeded(released)

    def _unneeded(self, keys: Iterable[str]) -> list[str]:
        freed = []
        for key in sorted(set(keys) & self._models):
            if not any(self._waits_for_model(child, key) for child in self._nodes[key].children):
                self._models.discard(key)
                freed.append(key)
        return freed

    def _waits_for_model(self, child: str, key: str) -> bool:
        node = self._nodes[child]
        reads = any(before.key == key for before in _heavy(node.stage))
        return reads and node.state not in ENDED

    def drop(self, key: str) -> None:
        """A stage's model was removed from the store."""
        self.committed.discard(key)
        self.dropped.add(key)

    def fail(self, key: str, reason: str) -> list[str]:
        """A stage failed. Returns the cells that fail with it, or because of it."""
        self._ended(key)
        return self._fail(key, reason)

    def _fail(self, key: str, reason: str) -> list[str]:
        cells = []
        todo = [key]
        while todo:
            node = self._nodes[todo.pop()]
            # After a failed repair, finished stages keep results, and running ones have inputs.
            spared = (State.failed,) if node.stage.key == key else (*ENDED, State.running)
            if node.state in spared:
                continue
            self.failed[node.stage.key] = reason
            self._set(node, State.failed)
            self._released |= {before.key for before in _heavy(node.stage)}
            if node.stage.name == CELL:
                cells.append(node.stage.key)
            todo += node.children
        return cells

    def out_of_memory(self, key: str) -> bool:
        """A stage ran out of memory. Returns whether it is tried again, with less."""
        node = self._nodes[key]
        if node.rung + 1 >= len(LADDER):
            return False
        node.rung += 1
        self.again(key)
        return True

    def again(self, key: str) -> list[str]:
        """A stage could not run, for external reasons: it is ready again.

        Returns the cells that fail because one of its inputs failed meanwhile.
        """
        node = self._nodes[key]
        self._ended(key)
        self._set(node, State.waiting)
        failed = sorted(node.missing & self.failed.keys())
        if failed:
            return self._fail(key, self.failed[failed[0]])
        self._settle(node)
        return []

    def repair(self, key: str, lost: Iterable[str]) -> bool:
        """A stage's inputs `lost` are damaged or gone: compute them again before it.

        Returns False where that was tried too often, or one of them cannot be computed.
        """
        node = self._nodes[key]
        node.repairs += 1
        if node.repairs > 3:
            return False
        gone = set(lost)
        again = needed([node.stage], self.committed - gone, self.dropped - gone)
        if any(before in self.failed for before in again):
            return False
        self.committed -= gone
        self.dropped -= gone
        self._models -= gone
        self._ended(key)
        self._set(node, State.waiting)
        self._open(again)
        # The other stages that read them wait as well.
        for before in gone:
            for child in self._nodes[before].children:
                other = self._nodes[child]
                if other.state not in ENDED:
                    other.missing.add(before)
                    self._settle(other)
        return True

    def stage(self, key: str) -> Stage:
        """Return a stage that was added, by its key."""
        return self._nodes[key].stage

    @property
    def unfinished(self) -> int:
        """How many stages and cells are neither done nor failed."""
        return sum(
            count
            for counts in self.counts.values()
            for state, count in counts.items()
            if state not in ENDED
        )

    def seconds_left(self) -> float | None:
        """Return the expected seconds until all is done; None where a time is unknown."""
        expected = self.rough_left()
        return expected.seconds if expected and expected.basis is Basis.measured else None

    def rough_left(self) -> Estimate | None:
        """Return the same also where times are only estimated by rows; None without any pace."""
        total, basis = 0.0, Basis.measured
        for group, (count, units) in self._left.items():
            if count:
                expected = self._timings.rough(group, count, units)
                if expected is None:
                    return None
                total += expected.seconds
                basis = max(basis, expected.basis)
        return Estimate(total / max(1, self.slots), basis)


def most_models(slots: int) -> int:
    """Return the number of needed models, on disk or being written, at which no other is begun.

    Up to `slots` more may be there for a moment: models that wait to be evaluated.
    """
    return max(4, 2 * slots)


def _heavy(stage: Stage) -> list[Stage]:
    """Return the inputs of which a stage reads all files, the model included."""
    return [before for role, before in stage.inputs.items() if role not in stage.light]
