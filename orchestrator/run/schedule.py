"""Which stage runs next: one whose inputs are there, at the head of the longest chain.

Bookkeeping only: the driver asks for work and reports how it ended.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
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

    @property
    def leads_to(self) -> str:
        """The key of the cell that it is computed for; of itself where there are several."""
        return self.cell or self.stage.key


@dataclass(frozen=True)
class Task:
    """A stage to run now.

    alone: whether nothing else may run on its device, or on its node if it uses no GPU.
    accumulation: number of parts that each batch is cut into.
    again: whether it is computed for its model, which was removed or lost.
    same_as: key of a stage with an equal result, which this one can take; empty if there is none.
    """

    stage: Stage
    alone: bool
    accumulation: int
    again: bool = False
    same_as: str = ""


class Schedule:
    """The stages that are left to compute, and their order.

    Once `most_models` models are on disk and still needed, or are being written, the order changes:
    first the stages that write no model, then those that also read one. Both lead to where a model
    is no longer needed.

    Stages may turn out to be equal once the facts that they read are known
    (`Stage.key_by_facts`): thresholds that flag the same tokens, for example. Then the first is
    computed up to its cell, and the others wait and take its results.
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
        computed: Iterable[Stage] = (),
        facts: Callable[[str], str | None] = lambda key: None,
    ) -> None:
        """Schedule cells and the stages that they need.

        cells: the stages that cells end with.
        committed: keys with a complete result.
        dropped: keys whose models were removed; the rest of their results is there.
        failed: reasons by key.
        timings: expected times. They may improve as stages end.
        slots: how many stages run at once, about.
        computed: what cells end with that have a result: their stages may equal some of these.
        facts: from the key of a stage with a result to the `btu.stages.digest_of` its facts; None
            if they cannot be read.
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
        self._read_facts = facts
        self._facts: dict[str, str | None] = {}  # digests, by key
        self._equals = _Equals(computed, self._facts_of)
        # By what they wait for: keys of equal stages, each with its cell.
        self._waiting: dict[str, dict[str, str]] = {}
        self._held: Counter[str] = Counter()  # how many of them each cell has
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
            if not self._waits_for_equal(node):
                self._make_ready(node.stage.key)
        elif node.state is State.ready and node.missing:
            self._set(node, State.waiting)

    def _insert(self, stage: Stage, state: State) -> None:
        node = self._nodes[stage.key] = _Node(stage, group_of(stage), state)
        node.again = stage.key in self.dropped
        self._equals.add(stage)
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
        return self._task(chosen)

    def _task(self, node: _Node) -> Task:
        """Hand out a stage."""
        self._set(node, State.running)
        self.running[node.stage.key] = node.stage
        same_as = "" if node.again else self._same_as(node)
        return Task(node.stage, node.rung > 0, LADDER[node.rung], node.again, same_as)

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
        can = [
            node
            for node in unlocked.values()
            if node.cell == cell
            and node.rung == 0
            and fits(node.stage)
            # What it equals is known when its inputs are there, not before.
            and not (node.stage.reads and self._equals.others(node.stage))
            and self._awaited(node) is None
        ]
        if not can:
            return None
        # In one worker the order costs no time: first what needs no room for another model.
        return self._task(min(can, key=lambda node: (node.stage.model, -node.rank)))

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

    def done(self, key: str, facts: str = "", *, dropped: bool = False) -> list[str]:
        """A stage has its result. Returns the keys whose models no stage here needs any more.

        facts: the digest of its facts; empty if it is not known.
        dropped: whether the result has no model, which other stages of this kind have.
        """
        node = self._nodes[key]
        self._ended(key)
        self._set(node, State.done)
        if facts:
            self._facts[key] = facts
        (self.dropped if dropped else self.committed).add(key)
        if node.stage.model and not dropped:
            self._models.add(key)
        self._release(key)
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

    def _facts_of(self, key: str) -> str | None:
        """Return the digest of a stage's facts; None if it has no result, or they are unreadable.

        Read from the store at most once, and only for what an earlier launch has computed.
        """
        node = self._nodes.get(key)
        if node is not None and node.state not in (State.done, State.cached):
            return None
        if key not in self._facts:
            self._facts[key] = self._read_facts(key)
        return self._facts[key]

    def _waits_for_equal(self, node: _Node) -> bool:
        """Return whether an equal stage is on its way to its cell; note that this one waits."""
        goal = self._awaited(node)
        if goal is None or node.cell is None:
            return False
        waiting = self._waiting.setdefault(goal, {})
        if node.stage.key not in waiting:
            self._held[node.cell] += 1
            waiting[node.stage.key] = node.cell
        return True

    def _awaited(self, node: _Node) -> str | None:
        """Return the key of the cell after which a stage can take its results; None if none is."""
        first = None if node.again else self._nodes.get(self._equals.first(node.stage) or "")
        if first is None or first is node or node.cell is None:
            return None
        goal = self._nodes[first.leads_to]
        if goal.state is State.failed:
            self._equals.give_up(node.stage)
            return None
        # Cells that wait for each other, by different stages, would wait forever.
        if goal.state in ENDED or goal.stage.key == node.cell or self._held[goal.stage.key]:
            return None
        return goal.stage.key

    def _same_as(self, node: _Node) -> str:
        """Return the key of an equal stage that has its result, as has what follows from it."""
        key = self._equals.first(node.stage)
        if key is None or key == node.stage.key:
            return ""
        first = self._nodes.get(key)  # else of a cell that an earlier launch has computed
        there = first is None or self._nodes[first.leads_to].state in (State.done, State.cached)
        return key if there else ""

    def _release(self, key: str) -> None:
        """Let the stages go on that waited for this one to end."""
        waiting = self._waiting.pop(key, {})
        self._held.subtract(waiting.values())
        for one in waiting:
            self._settle(self._nodes[one])

    def drop(self, key: str) -> None:
        """A stage's model was removed from the store."""
        self.committed.discard(key)
        self.dropped.add(key)

    def fail(self, key: str, reason: str) -> list[str]:
        """A stage failed. Returns the cells that fail with it, or because of it."""
        self._ended(key)
        return self._fail(key, reason)

    def _fail(self, key: str, reason: str) -> list[str]:
        cells, ended = [], []
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
            ended.append(node.stage.key)
        for one in ended:
            self._release(one)
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


class _Equals:
    """Which stages have equal results, as far as the facts that they read are known.

    computed: what cells end with that have a result.
    facts: from a key to the digest of its facts, as in `Stage.key_by_facts`.
    """

    def __init__(self, computed: Iterable[Stage], facts: Callable[[str], str | None]) -> None:
        self._computed, self._facts = list(computed), facts
        self._stages: dict[str, dict[str, Stage]] = {}  # by shape and key
        self._old: dict[str, list[Stage]] = {}  # by shape: of earlier launches, not looked at yet
        self._first: dict[str, str] = {}  # by `key_by_facts`: key of the first stage that has it
        self._alone: set[str] = set()  # of `key_by_facts`: those that nobody waits for any more

    def add(self, stage: Stage) -> None:
        """Take in a stage."""
        if stage.may_be_equal:
            self._stages.setdefault(stage.shape, {})[stage.key] = stage
            self._sort_computed()

    def _sort_computed(self) -> None:
        # Only once it matters: a sweep of which all cells are done has nothing to compare.
        for cell in self._computed:
            for stage in cell.inputs.values():
                if stage.may_be_equal:
                    self._old.setdefault(stage.shape, []).append(stage)
        self._computed = []

    def others(self, stage: Stage) -> bool:
        """Return whether a stage may turn out to equal another one."""
        if not stage.may_be_equal:
            return False
        ours = self._stages.get(stage.shape, {})
        old = (one.key for one in self._old.get(stage.shape, ()))
        return any(key != stage.key for key in itertools.chain(ours, old))

    def first(self, stage: Stage) -> str | None:
        """Return the key of the first stage that equals this one: often its own.

        None if nothing can equal it, or if that is not known yet.
        """
        if not self.others(stage):
            return None
        own = stage.key_by_facts(self._facts)
        if own is None or own in self._alone:
            return None
        for one in self._old.pop(stage.shape, ()):
            self._stages.setdefault(stage.shape, {})[one.key] = one
            known = one.key_by_facts(self._facts)
            if known is not None:
                self._first.setdefault(known, one.key)
        return self._first.setdefault(own, stage.key)

    def give_up(self, stage: Stage) -> None:
        """Let the stages that equal this one go their own ways: the first led to no result.

        All at once: where each waited for the one before, they would fail one after the other.
        """
        own = stage.key_by_facts(self._facts)
        if own is not None:
            self._alone.add(own)


def most_models(slots: int) -> int:
    """Return the number of needed models, on disk or being written, at which no other is begun.

    Up to `slots` more may be there for a moment: models that wait to be evaluated.
    """
    return max(4, 2 * slots)


def _heavy(stage: Stage) -> list[Stage]:
    """Return the inputs of which a stage reads all files, the model included."""
    return [before for role, before in stage.inputs.items() if role not in stage.light]
