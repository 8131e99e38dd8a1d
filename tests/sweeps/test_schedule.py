"""Which stage runs next, on toy stages: nothing is computed here."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping

import pytest

from btu.stages import Stage, StageFunction
from orchestrator.plan.work import Timings
from orchestrator.run import schedule as scheduling
from orchestrator.run.schedule import CELL, ENDED, Schedule, State, most_models

NOTHING = StageFunction(lambda run: {}, 1, "toys:none")

VICTIM = {"victim": {"name": "v"}}


def toy(
    name: str,
    *inputs: Stage,
    light: Collection[Stage] = (),
    model: bool = False,
    units: int = 1,
    id: object = None,
) -> Stage:
    """Return a stage that reads `inputs`, and of `light` ones no model."""
    named = {f"{before.name} {before.key}": before for before in (*inputs, *light)}
    roles = tuple(role for role, before in named.items() if before in light)
    acts = {"name": name, "id": id}
    return Stage(name, NOTHING, acts, named, VICTIM, roles, "host", units, model)


def cell(*lasts: Stage, id: object = None) -> Stage:
    """Return a cell on these stages and all that they depend on; it reads no model."""
    inputs = {stage.key: stage for last in lasts for stage in last.closure()}
    return toy(CELL, light=list(inputs.values()), id=id, units=0)


def timings(**seconds: float) -> Timings:
    """Return the timings of stages whose name is `seconds` long a unit; cells take 1 s."""
    known = {CELL: 1.0, **seconds}
    return Timings(
        [
            {"stage": name, "victim": "v", "device": "cpu", "units": 0 if name == CELL else 1,
             "seconds": value, "count": 1}
            for name, value in known.items()
        ],
        "cpu",
    )  # fmt: skip


def schedule(
    cells: Iterable[Stage],
    *,
    committed: Collection[str] = (),
    dropped: Collection[str] = (),
    failed: Mapping[str, str] | None = None,
    times: Timings | None = None,
    slots: int = 1,
) -> Schedule:
    return Schedule(
        cells,
        committed=committed,
        dropped=dropped,
        failed=failed or {},
        timings=times or timings(),
        slots=slots,
    )


def take(made: Schedule, busy: Callable[[str], bool] = lambda key: False) -> Stage:
    task = made.next(busy)
    assert task is not None
    return task.stage


def run_all(made: Schedule) -> list[Stage]:
    """Run everything, one after the other; return the order."""
    order = []
    while (task := made.next()) is not None:
        made.done(task.stage.key)
        order.append(task.stage)
    return order


# Order -----------------------------------------------------------------------------------------


def test_the_longest_chain_goes_first() -> None:
    # Seconds of the chain that starts at a stage, its cell's 1 s included:
    # short 1 + 1 = 2, long 5 + 1 = 6, first 2 + 4 + 1 = 7, second 4 + 1 = 5.
    short, long, first = toy("short"), toy("long"), toy("first")
    second = toy("second", first)
    cells = [cell(short), cell(long), cell(second)]
    made = schedule(cells, times=timings(short=1, long=5, first=2, second=4))
    # Every cell goes as soon as it can: after its chain, before anything else.
    assert run_all(made) == [first, long, cells[1], second, cells[2], short, cells[0]]


def test_units_make_a_stage_longer() -> None:
    # 1 s a unit: 3 units last longer than 2.
    few, many = toy("work", units=2, id="few"), toy("work", units=3, id="many")
    made = schedule([cell(few), cell(many)], times=timings(work=1))
    assert take(made) is many


def test_a_stage_that_was_never_measured_still_makes_its_chain_longer() -> None:
    one = toy("unknown", id=0)
    before = toy("unknown", id=1)
    after = toy("unknown", before, id=2)
    made = schedule([cell(one), cell(after)])
    assert take(made) is before


def test_what_arrived_first_goes_first_among_equals() -> None:
    stages = [toy("a", id=number) for number in range(5)]
    made = schedule([cell(stage) for stage in stages])
    assert [take(made) for _ in stages] == stages


def test_a_ready_cell_goes_before_any_other_work() -> None:
    first, second = toy("a", id=0), toy("a", id=1)
    long = toy("long", second)
    cells = [cell(first), cell(long)]
    made = schedule(cells, times=timings(a=1, long=1000))
    assert take(made) is second
    assert take(made) is first
    made.done(first.key)
    made.done(second.key)
    # Ready now: the cell (1 s) and the long stage (1000 s).
    assert take(made) is cells[0]


def test_nothing_is_ready_while_its_inputs_run() -> None:
    left, right = toy("a", id="left"), toy("a", id="right")
    both = toy("b", left, right)
    made = schedule([cell(both)])
    assert {take(made).key, take(made).key} == {left.key, right.key}
    assert made.next() is None
    made.done(left.key)
    assert made.next() is None
    made.done(right.key)
    assert take(made) is both


def test_a_shared_stage_runs_once() -> None:
    shared = toy("shared")
    ends = [toy("own", shared, id=number) for number in range(3)]
    order = run_all(schedule([cell(end, id=n) for n, end in enumerate(ends)]))
    # 1 shared stage, 3 own ones, 3 cells.
    assert len(order) == len({stage.key for stage in order}) == 7
    assert order[0] is shared


# What is there already -------------------------------------------------------------------------


def test_committed_stages_are_not_run_again() -> None:
    first = toy("first")
    second = toy("second", first)
    end = cell(second)
    made = schedule([end], committed={first.key})
    assert run_all(made) == [second, end]
    assert made.counts[False][State.cached] == 1


def test_of_a_committed_stage_the_inputs_are_not_needed() -> None:
    first = toy("first")
    second = toy("second", first)
    made = schedule([cell(second)], committed={second.key, first.key})
    assert [stage.name for stage in run_all(made)] == [CELL]


def test_a_dropped_model_is_computed_again_for_who_reads_it_alone() -> None:
    base = toy("base", model=True)
    reads, glances = toy("reads", base), toy("glances", light=[base])
    assert [s.name for s in run_all(schedule([cell(glances)], dropped={base.key}))] == [
        "glances", CELL,
    ]  # fmt: skip
    assert [s.name for s in run_all(schedule([cell(reads)], dropped={base.key}))] == [
        "base", "reads", CELL,
    ]  # fmt: skip


def test_a_committed_cell_needs_nothing() -> None:
    end = cell(toy("a"))
    made = schedule([end], committed={end.key})
    assert made.next() is None
    assert made.unfinished == 0
    assert made.counts[True][State.cached] == 1


# Failures --------------------------------------------------------------------------------------


def test_a_failure_reaches_its_descendants_and_no_others() -> None:
    shared = toy("shared")
    broken, sound = toy("broken", shared), toy("sound", shared)
    after = toy("after", broken)
    cells = [cell(broken, id=0), cell(after, id=1), cell(sound, id=2), cell(broken, sound, id=3)]
    made = schedule(cells, times=timings(shared=1, broken=9, sound=1, after=1))
    made.done(take(made).key)
    assert take(made) is broken
    # Cells 0, 1 and 3 depend on it, cell 1 through `after`.
    failed = made.fail(broken.key, "bad luck")
    assert sorted(failed) == sorted(cells[index].key for index in (0, 1, 3))
    assert run_all(made) == [sound, cells[2]]
    assert made.counts[False][State.failed] == 2  # broken, after
    assert made.counts[True][State.failed] == 3
    assert made.unfinished == 0


def test_a_cell_that_fails_takes_nothing_with_it() -> None:
    stage = toy("a")
    cells = [cell(stage, id=0), cell(stage, id=1)]
    made = schedule(cells)
    made.done(take(made).key)
    assert made.fail(take(made).key, "no") == [cells[0].key]
    assert run_all(made) == [cells[1]]


def test_what_failed_earlier_is_not_run() -> None:
    broken, sound = toy("broken"), toy("sound")
    after = toy("after", broken)
    cells = [cell(after), cell(sound)]
    made = schedule(cells, failed={broken.key: "as before", "elsewhere": "no matter"})
    assert run_all(made) == [sound, cells[1]]
    assert made.counts[True] == {**dict.fromkeys(State, 0), State.failed: 1, State.done: 1}
    # broken and after
    assert made.counts[False][State.failed] == 2


# Busy, and out of memory -----------------------------------------------------------------------


def test_a_busy_stage_is_passed_over_and_stays_ready() -> None:
    long, short = toy("long"), toy("short")
    made = schedule([cell(long), cell(short)], times=timings(long=5, short=1))
    assert take(made, {long.key}.__contains__) is short
    assert made.next({long.key}.__contains__) is None
    assert made.counts[False][State.ready] == 1
    assert take(made) is long


def test_busy_writers_do_not_hide_what_else_is_ready() -> None:
    writer, other = toy("writer", model=True), toy("other")
    made = schedule([cell(writer), cell(other)], times=timings(writer=5, other=1))
    assert take(made, {writer.key}.__contains__) is other
    assert take(made) is writer


def test_what_turned_out_to_be_busy_is_ready_again() -> None:
    stage = toy("a")
    made = schedule([cell(stage)])
    assert take(made) is stage
    made.again(stage.key)
    assert made.running == {}
    assert take(made) is stage


def test_out_of_memory_is_tried_alone_and_then_in_parts() -> None:
    stage = toy("a")
    made = schedule([cell(stage)])
    tried = []
    again = True
    while again:
        task = made.next()
        assert task is not None
        tried.append((task.alone, task.accumulation))
        again = made.out_of_memory(stage.key)
    # First beside others; then alone, whole; then alone in 2, 4 and 8 parts.
    assert tried == [(False, 1), (True, 1), (True, 2), (True, 4), (True, 8)]
    assert made.fail(stage.key, "out of memory") != []
    assert made.unfinished == 0


def test_only_the_stage_that_ran_out_of_memory_is_alone() -> None:
    one, other = toy("a", id=0), toy("a", id=1)
    made = schedule([cell(one), cell(other)])
    assert take(made) is one
    assert made.out_of_memory(one.key)
    task = made.next()
    assert task is not None
    assert (task.stage, task.alone, task.accumulation) == (other, False, 1)


# Models on disk --------------------------------------------------------------------------------


def test_a_model_is_dropped_once_nobody_is_left_to_read_it() -> None:
    base = toy("base", model=True)
    first, second = toy("read", base, id=0), toy("read", base, id=1)
    made = schedule([cell(first), cell(second)])
    assert made.done(take(made).key) == []  # two are still to read it
    assert made.done(take(made).key) == []
    assert take(made).name == CELL  # reads no model: it does not keep it
    assert made.done(take(made).key) == [base.key]


def test_a_model_that_nobody_reads_is_dropped_at_once() -> None:
    base = toy("base", model=True)
    made = schedule([cell(base)])
    assert made.done(take(made).key) == [base.key]


def test_of_a_committed_model_the_last_reader_is_told() -> None:
    base = toy("base", model=True)
    reader = toy("read", base)
    made = schedule([cell(reader)], committed={base.key})
    assert made.done(take(made).key) == [base.key]


def test_models_that_are_read_by_nobody_to_come_do_not_crowd() -> None:
    # All stages are there, and only the cells are left: nothing waits for these five models.
    bases = [toy("base", model=True, id=number) for number in range(5)]
    reads = [toy("read", base) for base in bases]
    writer = toy("writer", model=True)
    other = toy("other")
    made = schedule(
        [*map(cell, reads), cell(writer), cell(other)],
        committed={stage.key for stage in (*bases, *reads)},
        times=timings(writer=5, other=1),
    )
    for _ in bases:
        made.done(take(made).key)
    # Crowded, `other` would go first.
    assert take(made) is writer


def test_the_failure_of_the_last_reader_lets_a_model_go() -> None:
    base = toy("base", model=True)
    broken, read, other = toy("broken", base), toy("read", base), toy("other")
    made = schedule(
        [cell(broken), cell(read), cell(other)], times=timings(base=9, broken=2, read=5, other=1)
    )
    assert take(made) is base
    made.done(base.key)
    assert [take(made), take(made)] == [read, broken]
    assert made.done(read.key) == []
    made.fail(broken.key, "no")
    # `fail` returns cells; the next `done` returns the model.
    assert made.done(take(made).key) == [base.key]


def foundations(models: int, cells: int) -> list[Stage]:
    """Return cells as they are in sweeps: a base model each, and a tuned and a scored one of it."""
    made = []
    for number in range(cells):
        base = toy("base", model=True, id=number % models)
        control = toy("evaluate tuned", toy("tuned", base, model=True, units=1))
        defended = toy("defended", base, model=True, id=number)
        made.append(
            cell(toy("evaluate", base), control, toy("evaluate defended", defended), id=number)
        )
    return made


def most_alive(made: Schedule, slots: int, seed: int = 0) -> int:
    """Run everything in `slots` workers; return how many models there were at once at most.

    Models that are being written count: their files may be there already.
    """
    dice = random.Random(seed)
    running: list[Stage] = []
    on_disk: set[str] = set()
    most = 0
    while True:
        while len(running) < slots and (task := made.next()) is not None:
            running.append(task.stage)
        most = max(most, len(on_disk) + sum(stage.model for stage in running))
        if not running:
            assert made.unfinished == 0
            assert on_disk == set()  # all were dropped again
            return most
        ended = running.pop(dice.randrange(len(running)))
        if ended.model:
            on_disk.add(ended.key)
        for key in made.done(ended.key):
            on_disk.remove(key)
            made.drop(key)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize(("models", "cells"), [(5, 50), (50, 50), (1, 50)])
@pytest.mark.parametrize("seed", range(3))
def test_models_do_not_pile_up(models: int, cells: int, slots: int, seed: int) -> None:
    # From most_models(slots) on no base is begun while anything else is ready. What else is ready
    # adds a model only if it reads one, and only while no evaluation is ready: then each model
    # that waits for no more than its evaluation has one running. With what is being written that
    # is one a slot, beyond most_models(slots).
    made = schedule(foundations(models, cells), slots=slots)
    assert most_alive(made, slots, seed) <= most_models(slots) + slots


def test_without_the_bound_models_would_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "most_models", lambda slots: 1000)
    # All 50 bases first, since their chains are the longest.
    assert most_alive(schedule(foundations(50, 50), slots=2), 2) >= 50


# Repairs ---------------------------------------------------------------------------------------


def test_a_lost_input_is_computed_again() -> None:
    first = toy("first")
    second = toy("second", first)
    end = cell(second)
    made = schedule([end], committed={first.key})
    assert take(made) is second
    assert made.repair(second.key, [first.key])
    assert made.running == {}
    assert run_all(made) == [first, second, end]


def test_of_a_lost_input_its_own_lost_inputs_come_first() -> None:
    # `base` is dropped: not enough for stages that read its model.
    base = toy("base", model=True)
    middle = toy("middle", base)
    last = toy("last", middle)
    made = schedule([cell(last)], committed={middle.key}, dropped={base.key})
    assert take(made) is last
    assert made.repair(last.key, [middle.key])
    assert [stage.name for stage in run_all(made)] == ["base", "middle", "last", CELL]


def test_whatever_else_reads_a_lost_input_waits_for_it() -> None:
    first = toy("first")
    readers = [toy("reader", first, id=number) for number in range(3)]
    made = schedule(map(cell, readers), committed={first.key})
    assert take(made) is readers[0]
    assert made.repair(readers[0].key, [first.key])
    assert take(made) is first
    assert made.next() is None
    made.done(first.key)
    assert {take(made).name for _ in readers} == {"reader"}


def test_repairs_end_after_three() -> None:
    first = toy("first")
    second = toy("second", first)
    made = schedule([cell(second)])
    made.done(take(made).key)
    for _ in range(3):
        assert take(made) is second
        assert made.repair(second.key, [first.key])
        made.done(take(made).key)
    assert take(made) is second
    assert not made.repair(second.key, [first.key])
    assert len(made.fail(second.key, "damaged again and again")) == 1
    assert made.unfinished == 0


def test_a_repair_that_fails_leaves_what_has_its_result() -> None:
    base = toy("base", model=True)
    early, late = toy("early", base), toy("late", base)
    cells = [cell(early, id=0), cell(late, id=1)]
    made = schedule(cells, times=timings(base=9, early=5, late=1))
    for expected in (base, early):
        assert take(made) is expected
        made.done(expected.key)
    assert take(made) is cells[0]
    made.done(cells[0].key)
    assert take(made) is late
    assert made.repair(late.key, [base.key])
    assert take(made) is base
    # The first cell was done before: only the second one is lost with the base.
    assert made.fail(base.key, "no more") == [cells[1].key]
    assert made.counts[True] == {**dict.fromkeys(State, 0), State.done: 1, State.failed: 1}
    assert made.unfinished == 0


def test_what_cannot_be_computed_is_not_repaired() -> None:
    base = toy("base")
    readers = [toy("reader", base, id=number) for number in range(2)]
    made = schedule(map(cell, readers), committed={base.key})
    assert [take(made), take(made)] == readers
    assert made.repair(readers[0].key, [base.key])
    assert take(made) is base
    made.fail(base.key, "no")
    # The second reader runs on: it may have read the base before.
    assert list(made.running) == [readers[1].key]
    assert not made.repair(readers[1].key, [base.key])
    made.fail(readers[1].key, "its input is gone")
    assert made.unfinished == 0


# Cells that come later -------------------------------------------------------------------------


def test_new_cells_share_what_is_done_runs_and_waits() -> None:
    base, other = toy("base"), toy("other")
    middle = toy("middle", base)
    times = timings(base=9, middle=6, other=1, new=3)
    made = schedule([cell(middle, id=0), cell(other, id=1)], times=times)
    made.done(take(made).key)
    assert take(made) is middle
    # The base is done, the middle stage runs, and `other` waits.
    on_base, on_middle = toy("new", base), toy("new", middle)
    cells = [cell(on_base, id=2), cell(on_middle, id=3), cell(other, id=4)]
    made.add(cells)
    assert take(made) is on_base
    assert take(made) is other
    assert made.next() is None
    made.done(middle.key)
    made.done(on_base.key)
    made.done(other.key)
    assert run_all(made)[-2:] == [on_middle, cells[1]]
    # base, other, middle and two new ones, each once; five cells
    assert made.counts[False] == {**dict.fromkeys(State, 0), State.done: 5}
    assert made.counts[True] == {**dict.fromkeys(State, 0), State.done: 5}


def test_new_cells_fail_with_what_failed_before() -> None:
    base = toy("base")
    middle = toy("middle", base)
    first = cell(middle, id=0)
    made = schedule([first])
    made.fail(take(made).key, "bad luck")
    # On the base itself, on what failed with it, and on a new stage of that.
    made.add([cell(base, id=1), cell(middle, id=2), cell(toy("new", middle), id=3)])
    assert made.next() is None
    assert made.unfinished == 0
    assert made.counts[True][State.failed] == 4
    assert made.counts[False][State.failed] == 3
    assert set(made.failed.values()) == {"bad luck"}


def test_a_model_that_was_dropped_meanwhile_is_computed_again() -> None:
    base = toy("base", model=True)
    first = cell(toy("read", base, id=0))
    made = schedule([first])
    made.done(take(made).key)
    for key in made.done(take(made).key):
        made.drop(key)
    made.done(take(made).key)
    assert base.key in made.dropped
    made.add([cell(toy("read", base, id=1))])
    assert [stage.name for stage in run_all(made)] == ["base", "read", CELL]


def test_a_cell_that_is_there_already_is_cached() -> None:
    first = toy("a")
    end = cell(first)
    made = schedule([], committed={first.key, end.key})
    made.add([end])
    assert made.next() is None
    assert made.counts[True][State.cached] == 1


def test_the_same_cells_again_change_nothing() -> None:
    cells = foundations(2, 4)
    made = schedule(cells)
    made.done(take(made).key)
    before = {kind: dict(counts) for kind, counts in made.counts.items()}
    made.add(cells)
    assert made.counts == before


# Time left -------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_all_stages_over_the_slots() -> None:
    # Two stages of 3 units at 2 s and two cells of 1 s: 14 s, on two slots 7 s.
    stages = [toy("work", units=3, id=number) for number in range(2)]
    made = schedule(map(cell, stages), times=timings(work=2), slots=2)
    assert made.seconds_left() == 7
    made.done(take(made).key)
    # One of them is done: (6 + 2 x 1) / 2
    assert made.seconds_left() == 4
    made.fail(take(made).key, "no")  # and a cell, which was ready
    made.fail(take(made).key, "no")  # with its cell
    assert made.seconds_left() == 0


def test_the_time_left_is_unknown_until_all_was_measured() -> None:
    made = schedule([cell(toy("new"))], times=timings())
    assert made.seconds_left() is None
    made.done(take(made).key)
    assert made.seconds_left() == 1  # the cell


# Everything at once ----------------------------------------------------------------------------


class World:
    """A store and its workers, whose failures the schedule has to handle."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.stages = self._dag()
        self.cells = self._cells()
        self.committed: set[str] = set()
        self.dropped: set[str] = set()
        self.failed: set[str] = set()
        self.done_times: dict[str, int] = {}
        self.lost_times: dict[str, int] = {}
        self.told: list[str] = []  # cells that were reported as failed

    def _dag(self) -> list[Stage]:
        stages: list[Stage] = []
        for number in range(30):
            count = min(len(stages), self.dice.choice((0, 1, 1, 2)))
            inputs = self.dice.sample(stages, count)
            light = [stage for stage in inputs if self.dice.random() < 0.3]
            heavy = [stage for stage in inputs if stage not in light]
            name = self.dice.choice("abc")
            model = self.dice.random() < 0.4
            units = self.dice.randint(1, 5)
            stages.append(toy(name, *heavy, light=light, model=model, units=units, id=f"{number}"))
        return stages

    def _cells(self) -> list[Stage]:
        return [
            cell(*self.dice.sample(self.stages, self.dice.randint(1, 3)), id=number)
            for number in range(20)
        ]

    def has(self, stage: Stage, light: bool) -> bool:
        return stage.key in self.committed or (light and stage.key in self.dropped)

    def lacks(self, stage: Stage) -> list[str]:
        return [
            before.key
            for role, before in stage.inputs.items()
            if not self.has(before, role in stage.light)
        ]

    def damage(self) -> None:
        """Lose a result, or its model, silently."""
        if self.committed and self.dice.random() < 0.15:
            key = self.dice.choice(sorted(self.committed))
            self.committed.discard(key)
            self.lost_times[key] = self.lost_times.get(key, 0) + 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["calm", "growing", "troubled"])
def test_every_stage_ends_whatever_happens(seed: int, mode: str) -> None:
    world = World(seed)
    dice, trouble = world.dice, mode == "troubled"
    # In a growing sweep half of the cells come later.
    known = 20 if mode == "calm" else 10
    early, late = world.cells[:known], world.cells[known:]
    slots = dice.randint(1, 4)
    made = schedule(early, times=timings(a=1, b=2, c=3), slots=slots)
    given = list(early)
    running: list[Stage] = []

    for _ in range(10_000):
        if late and dice.random() < 0.1:
            given.append(late[0])
            made.add([late.pop(0)])
        busy = {stage.key for stage in world.stages if trouble and dice.random() < 0.1}
        while len(running) < slots and (task := made.next(busy.__contains__)) is not None:
            stage = task.stage
            assert stage.key not in busy
            assert stage not in running
            assert stage.key not in world.failed
            # As far as the schedule was told, its inputs are there.
            for role, before in stage.inputs.items():
                there = before.key in made.committed
                assert there or (role in stage.light and before.key in made.dropped)
            running.append(stage)
        assert {stage.key for stage in running} == set(made.running)
        check_books(made, world)
        if not running:
            if made.unfinished or late:
                continue  # all that is ready is busy, or more is to come
            break
        stage = running.pop(dice.randrange(len(running)))
        step(made, world, stage, trouble)
    else:
        raise AssertionError("it does not end")

    assert made.next() is None
    assert made.seconds_left() == 0
    states = {key: node.state for key, node in made._nodes.items()}
    assert set(states.values()) <= set(ENDED)
    # Each cell has its result, or depends on a failure that was reported.
    for end in given:
        if states[end.key] is State.failed:
            assert {end.key, *(s.key for s in end.inputs.values())} & world.failed
            assert world.told.count(end.key) <= 1
        else:
            assert world.done_times[end.key] == 1
    # A stage runs again only if its model was dropped, or its result was lost.
    for key, times in world.done_times.items():
        assert times <= 1 + world.lost_times.get(key, 0)
    if trouble:
        return
    # Failures reach what depends on them, and nothing else.
    rests = {
        stage.key
        for end in given
        for stage in end.closure()
        if {before.key for before in stage.closure()} & world.failed
    }
    failed = {key for key, state in states.items() if state is State.failed}
    if mode == "growing":
        # A dropped model that cannot be recomputed leaves what was computed from it before.
        assert failed <= rests
        assert all(key in world.done_times for key in rests - failed)
    else:
        assert failed == rests
        assert set(world.done_times.values()) == {1}
        assert sorted(world.told) == sorted(end.key for end in given if end.key in rests)


def step(made: Schedule, world: World, stage: Stage, trouble: bool) -> None:
    """End a running stage in some way."""
    key, dice = stage.key, world.dice
    if trouble:
        world.damage()
        # Half of those whose input is damaged meanwhile have read it before.
        lost = world.lacks(stage)
        if lost and dice.random() < 0.5:
            if not made.repair(key, lost):
                fail(made, world, key)
            return
        if dice.random() < 0.1:
            made.again(key)
            return
        if dice.random() < 0.1:
            if not made.out_of_memory(key):
                fail(made, world, key)
            return
    if dice.random() < 0.04:
        fail(made, world, key)
        return
    world.committed.add(key)
    world.dropped.discard(key)
    world.done_times[key] = world.done_times.get(key, 0) + 1
    for freed in made.done(key):
        readers = [
            node.stage
            for node in made._nodes.values()
            for role, before in node.stage.inputs.items()
            if before.key == freed and role not in node.stage.light and node.state not in ENDED
        ]
        assert readers == []
        if freed in world.committed:
            world.committed.discard(freed)
            world.dropped.add(freed)
            world.lost_times[freed] = world.lost_times.get(freed, 0) + 1
        made.drop(freed)


def fail(made: Schedule, world: World, key: str) -> None:
    world.failed.add(key)
    world.told += made.fail(key, "bad luck")


def check_books(made: Schedule, world: World) -> None:
    """Compare the running sums with sums over all stages."""
    left = 0.0
    counts = {True: dict.fromkeys(State, 0), False: dict.fromkeys(State, 0)}
    for node in made._nodes.values():
        counts[node.stage.name == CELL][node.state] += 1
        if node.state not in ENDED:
            # Seconds a unit of a, b and c; a cell takes 1 s.
            each = {"a": 1, "b": 2, "c": 3, CELL: 1}[node.stage.name]
            left += each * (1 if node.stage.name == CELL else node.stage.units)
    assert made.counts == counts
    assert made.unfinished == sum(
        n for kind in counts.values() for state, n in kind.items() if state not in ENDED
    )
    assert made.seconds_left() == pytest.approx(left / made.slots)
    # The models counted as on disk are those that a stage will read, and no others.
    for key in made._models:
        assert any(made._waits_for_model(child, key) for child in made._nodes[key].children) or (
            key in made._released
        )


# Chains ----------------------------------------------------------------------------------------


def chain(made: Schedule, fits: Callable[[Stage], bool] = lambda stage: True) -> list[str]:
    """Hand out the next stage and all that can follow it; return their names."""
    task = made.next()
    tasks = []
    while task is not None:
        tasks.append(task)
        task = made.follow(tasks, fits)
    return [task.stage.name for task in tasks]


def test_the_stages_of_one_cell_follow_one_another() -> None:
    made = schedule([cell(toy("score", toy("tune", toy("cut"))))])
    assert chain(made) == ["cut", "tune", "score", CELL]
    assert made.next() is None


def test_what_several_cells_need_is_a_trial_of_its_own() -> None:
    rows = toy("rows")
    train = toy("train", rows)
    made = schedule([cell(toy("cut", train, id=i), id=i) for i in range(2)])
    assert chain(made) == ["rows"]
    made.done(rows.key)
    assert chain(made) == ["train"]
    made.done(train.key)
    assert chain(made) == chain(made) == ["cut", CELL]


def test_stages_that_can_run_side_by_side_are_no_chain() -> None:
    cut = toy("cut")
    a, b = toy("a", cut), toy("b", cut)
    made = schedule([cell(a, b)])
    assert chain(made) == ["cut"]
    made.done(cut.key)
    assert chain(made) == ["a"]  # the cell waits for both
    assert chain(made) == ["b"]
    made.done(a.key)
    made.done(b.key)
    assert chain(made) == [CELL]


def test_stages_side_by_side_follow_where_other_work_keeps_the_workers_busy() -> None:
    def forked(id: int) -> Stage:
        cut = toy("cut", id=id)
        return cell(toy("tuned", cut, model=True), toy("score", cut), id=id)

    made = schedule([forked(0), forked(1)])
    # Another cell can begin meanwhile. What writes no model comes first.
    assert chain(made) == ["cut", "score", "tuned", CELL]
    assert chain(made) == ["cut"]  # the last one is shared among the workers


def test_a_stage_that_waits_for_another_worker_does_not_follow() -> None:
    a, b = toy("a"), toy("b")
    made = schedule([cell(toy("join", a, b))])
    assert chain(made) == ["a"]
    made.done(a.key)
    assert chain(made) == ["b", "join", CELL]


def test_a_chain_ends_where_the_worker_lacks_what_a_stage_needs() -> None:
    made = schedule([cell(toy("tune", toy("cut")))])
    assert chain(made, lambda stage: stage.name != "tune") == ["cut"]


def test_a_stage_that_ran_out_of_memory_stays_alone() -> None:
    cut = toy("cut")
    made = schedule([cell(toy("tune", cut))])
    assert chain(made) == ["cut", "tune", CELL]
    (cell_key,) = (key for key, stage in made.running.items() if stage.name == CELL)
    tune = next(key for key, stage in made.running.items() if stage.name == "tune")
    made.done(cut.key)
    made.again(cell_key)
    made.out_of_memory(tune)
    assert chain(made) == ["tune"]  # alone
    made.done(tune)
    assert chain(made) == [CELL]


def test_what_only_one_cell_needs_any_more_follows() -> None:
    rows = toy("rows")
    cut = toy("cut", rows)
    shared = [cell(cut, id=0), cell(cut, id=1)]
    made = schedule(shared)
    assert chain(made) == ["rows"]
    made.done(rows.key)
    assert chain(made) == ["cut"]
    made.done(cut.key)
    assert chain(made) == [CELL]


def test_a_cell_that_is_added_later_makes_a_stage_shared() -> None:
    cut = toy("cut")
    tune = toy("tune", cut)
    made = schedule([cell(tune, id=0)])
    made.add([cell(tune, id=1)])
    assert chain(made) == ["cut"]
    made.done(cut.key)
    assert chain(made) == ["tune"]


@pytest.mark.parametrize("seed", range(20))
def test_every_stage_is_handed_out_once_in_chains_too(seed: int) -> None:
    random_ = random.Random(seed)
    stages = [toy("s0")]
    for number in range(1, 12):
        before = random_.sample(stages, min(len(stages), random_.randint(1, 2)))
        stages.append(toy(f"s{number}", *before))
    cells = [cell(random_.choice(stages), id=number) for number in range(4)]
    made = schedule(cells)
    wanted = {stage.key for top in cells for stage in top.closure()}
    ended: set[str] = set()
    while made.unfinished:
        tasks = []
        task = made.next()
        while task is not None:
            tasks.append(task)
            task = made.follow(tasks, lambda stage: True)
        assert tasks
        for each in tasks:
            # In this order each has its inputs.
            assert {before.key for before in each.stage.inputs.values()} <= ended
            made.done(each.stage.key)
            assert each.stage.key not in ended
            ended.add(each.stage.key)
    assert ended == wanted


def test_a_stage_that_goes_back_after_its_input_failed_fails_with_it() -> None:
    rows = toy("rows")
    cut = [toy("cut", rows, id=i) for i in range(2)]
    cells = [cell(one, id=i) for i, one in enumerate(cut)]
    made = schedule(cells)
    assert chain(made) == ["rows"]
    made.done(rows.key)
    assert chain(made) == chain(made) == ["cut", CELL]
    for top in cells:
        made.again(top.key)
    # The second finds its input damaged; computing it again fails, while the first still runs.
    assert made.repair(cut[1].key, [rows.key])
    assert chain(made) == ["rows"]
    made.fail(rows.key, "no memory")
    assert made.running.keys() == {cut[0].key}
    assert made.again(cut[0].key) == []  # its cell reads the input too, and has failed with it
    assert made.failed[cut[0].key] == "no memory"
    assert made.unfinished == 0


def test_a_task_tells_whether_a_model_is_computed_again() -> None:
    train = toy("train", model=True)
    cut = toy("cut", train)
    first = schedule([cell(cut)]).next()
    assert first is not None
    assert not first.again
    # Its model was removed by an earlier launch, and a new cell reads it.
    again = schedule([cell(cut)], dropped=[train.key]).next()
    assert again is not None
    assert (again.stage.name, again.again) == ("train", True)
    # Its model is lost while the launch runs.
    made = schedule([cell(cut)])
    assert chain(made) == ["train", "cut", CELL]
    made.done(train.key)
    made.again(cell(cut).key)
    assert made.repair(cut.key, [train.key])
    repaired = made.next()
    assert repaired is not None
    assert (repaired.stage.name, repaired.again) == ("train", True)
