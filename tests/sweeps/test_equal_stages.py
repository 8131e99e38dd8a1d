"""Equal stages: thresholds that flag the same tokens share what follows from the flags."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from driving import ByHand, ToyPlanner, begin

from btu.stages import RECORD, Stage, StageRun, compute, digest_of, read_record
from btu.stages import stage as stage_function
from orchestrator.plan.planner import Plan, PlannedCell
from orchestrator.plan.work import Timings, survey
from orchestrator.run.driver import Driver, Idle
from orchestrator.run.schedule import CELL, Schedule, State, Task
from orchestrator.run.worker import Outcome, Report, run_node
from orchestrator.store import places
from orchestrator.store.store import Store
from orchestrator.sweep.load import resolve
from orchestrator.sweep.sweep import Cell

# Which stages were computed, by name and threshold.
CALLS: list[tuple[str, float]] = []


@stage_function(version=1)
def scored(run: StageRun) -> dict[str, Any]:
    CALLS.append(("score", 0.0))
    (run.folder / "scores.json").write_text("[5.0, 3.0, 1.0]")
    return {"tokens": 3}


@stage_function(version=1)
def flagged(run: StageRun) -> dict[str, Any]:
    CALLS.append(("flag", run.config["threshold"]))
    scores = json.loads((run.inputs["scores"] / "scores.json").read_text())
    return {"flagged": [i for i, score in enumerate(scores) if score >= run.config["threshold"]]}


@stage_function(version=1)
def cut(run: StageRun) -> dict[str, Any]:
    assert "flagged" not in run.inputs  # its facts alone
    tokens = run.facts("flagged")["flagged"]
    CALLS.append(("unlearn", float(len(tokens))))
    (run.folder / "model").mkdir()
    (run.folder / "model" / "weights").write_text(f"without {tokens}")
    (run.folder / "table.txt").write_text(f"{len(tokens)} cut")
    return {"cut": len(tokens)}


@stage_function(version=1)
def evaluated(run: StageRun) -> dict[str, Any]:
    CALLS.append(("evaluate", 0.0))
    return {"asr": len((run.inputs["model"] / "model" / "weights").read_text()) / 100}


@stage_function(version=1)
def put_together(run: StageRun) -> dict[str, Any]:
    CALLS.append((CELL, 0.0))
    (run.folder / "result.json").write_text(json.dumps({"metrics": run.facts("evaluate")}))
    return {**run.facts("evaluate"), "threshold": run.config["threshold"]}


WHERE = {"victim": {"name": "/nowhere"}}


def toy_cell(threshold: float, version: int = 0) -> Stage:
    """Return a cell that flags the tokens, of scores 5, 3 and 1, that reach a threshold."""
    scores = Stage("score", scored, {"version": version}, kind="host", units=1)
    flags = Stage("flag", flagged, {"threshold": threshold}, {"scores": scores}, kind="host")
    unlearn = Stage(
        "unlearn", cut, {}, {"scores": scores, "flagged": flags}, WHERE,
        kind="cell", units=1, model=True, reads=("flagged",),
    )  # fmt: skip
    evaluate = Stage("evaluate", evaluated, {}, {"model": unlearn}, kind="cell", units=1)
    inputs = {s.name: s for s in (scores, flags, unlearn, evaluate)}
    return Stage(
        CELL, put_together, {"threshold": threshold}, inputs, light=tuple(inputs), kind="host"
    )


@pytest.fixture(autouse=True)
def nothing_happened() -> None:
    CALLS.clear()


def calls() -> dict[str, int]:
    return dict(Counter(name for name, _ in CALLS))


# Keys ------------------------------------------------------------------------------------------


def test_stages_that_read_equal_facts_have_a_key_in_common() -> None:
    cells = {threshold: toy_cell(threshold) for threshold in (4.0, 4.5, 2.0)}
    # Of scores 5, 3 and 1 a threshold of 4 or 4.5 flags the first token, 2 the first two.
    facts = {
        cells[4.0].inputs["flag"].key: digest_of({"flagged": [0]}),
        cells[4.5].inputs["flag"].key: digest_of({"flagged": [0]}),
        cells[2.0].inputs["flag"].key: digest_of({"flagged": [0, 1]}),
    }
    for name in ("unlearn", "evaluate"):
        stages = [cell.inputs[name] for cell in cells.values()]
        assert len({stage.key for stage in stages}) == 3
        assert len({stage.shape for stage in stages}) == 1
        first, same, other = (stage.key_by_facts(facts.get) for stage in stages)
        assert first == same != other
        assert stages[0].key_by_facts(lambda key: None) is None


def test_only_stages_of_one_cell_that_read_facts_alone_may_be_equal() -> None:
    cell = toy_cell(4.0)
    may = {stage.name for stage in cell.closure() if stage.may_be_equal}
    assert may == {"unlearn", "evaluate"}
    for stage in cell.closure():
        if stage.name not in may:
            assert stage.shape == stage.key == stage.key_by_facts(lambda key: None)


def test_another_input_or_config_is_another_shape() -> None:
    one, other = (toy_cell(4.0, version=version).inputs["unlearn"] for version in (0, 1))
    assert one.shape != other.shape
    facts = lambda key: "the same"  # noqa: E731
    assert one.key_by_facts(facts) != other.key_by_facts(facts)


def test_a_stage_gets_the_facts_and_not_the_folder(tmp_path: Path) -> None:
    unlearn = toy_cell(2.0).inputs["unlearn"]
    folder = compute(unlearn, tmp_path)  # `cut` asserts that it has no folder of the flags
    assert read_record(folder)["facts"] == {"cut": 2}


# The schedule ----------------------------------------------------------------------------------


def schedule(
    cells: Iterable[Stage],
    *,
    committed: Collection[str] = (),
    dropped: Collection[str] = (),
    computed: Iterable[Stage] = (),
    facts: Callable[[str], str | None] = lambda key: None,
    slots: int = 4,
) -> Schedule:
    return Schedule(
        cells,
        committed=committed,
        dropped=dropped,
        failed={},
        timings=Timings([], "cpu"),
        slots=slots,
        computed=computed,
        facts=facts,
    )


def flags_of(stage: Stage) -> str:
    """Return the digest of the facts that a stage of a toy cell reports."""
    if stage.name != "flag":
        return digest_of({})
    threshold = stage.config["threshold"]
    return digest_of({"flagged": [i for i, s in enumerate((5.0, 3.0, 1.0)) if s >= threshold]})


def ready(made: Schedule) -> list[Task]:
    """Hand out all that is ready, each as a trial of its own."""
    tasks = []
    while (task := made.next()) is not None:
        tasks.append(task)
    return tasks


def end(made: Schedule, tasks: Iterable[Task], *, dropped: bool = False) -> None:
    for task in tasks:
        model = task.stage.model and dropped
        made.done(task.stage.key, flags_of(task.stage), dropped=model)


def named(tasks: Iterable[Task]) -> list[str]:
    return [task.stage.name for task in tasks]


def flagged_all(made: Schedule) -> None:
    """Run the scores and the flags of all cells."""
    tasks = ready(made)
    assert named(tasks) == ["score"]
    end(made, tasks)
    tasks = ready(made)
    assert set(named(tasks)) == {"flag"}
    end(made, tasks)


def test_equal_stages_wait_for_the_first_and_take_its_results() -> None:
    cells = [toy_cell(threshold) for threshold in (4.0, 4.5, 2.0)]
    made = schedule(cells)
    flagged_all(made)
    tasks = ready(made)
    # 4 and 4.5 flag the same token: one of them is computed, beside 2, which flags another set.
    assert [task.stage.key for task in tasks] == [cells[i].inputs["unlearn"].key for i in (0, 2)]
    assert [task.same_as for task in tasks] == ["", ""]
    end(made, tasks)
    tasks = ready(made)
    assert {task.stage.key for task in tasks} == {cells[i].inputs["evaluate"].key for i in (0, 2)}
    end(made, tasks)
    # It waits for the whole of the first cell: only then nothing of the rest is computed twice.
    tasks = ready(made)
    assert {task.stage.key for task in tasks} == {cells[0].key, cells[2].key}
    end(made, tasks)
    (task,) = ready(made)
    assert task.stage is cells[1].inputs["unlearn"]
    assert task.same_as == cells[0].inputs["unlearn"].key
    follower = made.follow([task], lambda stage: True)
    assert follower is not None
    assert follower.stage is cells[1].inputs["evaluate"]
    assert follower.same_as == cells[0].inputs["evaluate"].key
    last = made.follow([task, follower], lambda stage: True)
    assert last is not None
    assert (last.stage, last.same_as) == (cells[1], "")
    end(made, [task, follower, last], dropped=True)
    assert not made.unfinished


def test_a_chain_ends_before_what_may_be_equal_unless_it_is_alone() -> None:
    alone = schedule([toy_cell(4.0)])
    (task,) = ready(alone)
    chain = [task]
    while (follower := alone.follow(chain, lambda stage: True)) is not None:
        chain.append(follower)
    assert named(chain) == ["score", "flag", "unlearn", "evaluate", CELL]
    made = schedule([toy_cell(4.0), toy_cell(4.5)])
    end(made, ready(made))
    task, _ = ready(made)
    assert task.stage.name == "flag"
    assert made.follow([task], lambda stage: True) is None


def test_all_others_are_computed_where_the_first_fails() -> None:
    cells = [toy_cell(threshold) for threshold in (4.0, 4.3, 4.5)]
    made = schedule(cells)
    flagged_all(made)
    (first,) = ready(made)
    assert made.fail(first.stage.key, "broken") == [cells[0].key]
    # At once: if the inputs are why it failed, one would fail after the other.
    tasks = ready(made)
    assert [task.stage for task in tasks] == [cell.inputs["unlearn"] for cell in cells[1:]]
    assert [task.same_as for task in tasks] == ["", ""]


def test_what_a_failed_cell_has_is_not_taken_over() -> None:
    cells = [toy_cell(threshold) for threshold in (4.0, 4.5)]
    made = schedule(cells)
    flagged_all(made)
    end(made, ready(made))
    (task,) = ready(made)
    assert task.stage is cells[0].inputs["evaluate"]
    made.fail(task.stage.key, "broken")
    # Its unlearning has a result, but what follows would find no model.
    (other,) = ready(made)
    assert (other.stage, other.same_as) == (cells[1].inputs["unlearn"], "")


def test_a_stage_that_is_computed_for_its_model_does_not_take_one_over() -> None:
    cells = [toy_cell(4.0), toy_cell(4.5)]
    made = schedule(cells)
    flagged_all(made)
    while tasks := [task for task in ready(made) if not task.same_as]:
        end(made, tasks)
    unlearn, evaluate = (cells[1].inputs[name] for name in ("unlearn", "evaluate"))
    made.done(unlearn.key, digest_of({}), dropped=True)
    (task,) = ready(made)
    assert task.stage is evaluate
    # Say the equal evaluation is gone from the store: this one has to be computed, and its input
    # has no model.
    assert made.repair(evaluate.key, [unlearn.key])
    (task,) = ready(made)
    assert (task.stage, task.again, task.same_as) == (unlearn, True, "")


@pytest.mark.parametrize("seed", range(60))
def test_every_launch_ends_whatever_becomes_of_its_stages(seed: int) -> None:
    """Random cells and random ends: failures, lost inputs, too little memory, busy stages."""
    rng = random.Random(seed)
    make = rng.choice([toy_cell, two_branches])
    cells = [make(rng.choice([0.5, 2.0, 2.5, 4.0, 4.5, 6.0]) + i / 1000) for i in range(12)]
    old = cells[: rng.randint(0, 4)]
    done = {stage.key for cell in old for stage in cell.closure()}
    known = {stage.key: flags_of(stage) for cell in old for stage in cell.closure()}
    made = schedule(
        cells[len(old) :],
        committed=done,
        computed=old,
        facts=known.get,
        slots=rng.randint(1, 4),
    )
    running: list[list[Task]] = []
    for _ in range(3000):
        if rng.random() < 0.6 and (task := made.next()) is not None:
            chain = [task]
            while (follower := made.follow(chain, lambda stage: True)) is not None:
                chain.append(follower)
            running.append(chain)
        elif running:
            chain = running[rng.randrange(len(running))]
            task = chain[0]
            key = task.stage.key
            before = [stage.key for stage in task.stage.inputs.values()]
            fate = rng.random()
            if fate < 0.75:
                # What is taken over has no model; what follows is then taken over too.
                dropped = bool(task.same_as) and task.stage.model
                made.done(key, flags_of(task.stage), dropped=dropped)
            else:
                for left in reversed(chain[1:]):
                    made.again(left.stage.key)
                del chain[1:]
                lost = [rng.choice(before)] if before and fate < 0.9 else []
                if fate < 0.8:
                    made.fail(key, "broken")
                # Out of memory too often, or repaired too often: like a stage that is busy.
                elif not (made.out_of_memory(key) if fate < 0.85 else made.repair(key, lost)):
                    made.again(key)
            chain.pop(0)
            if not chain:
                running.remove(chain)
        elif not made.unfinished:
            break
    assert not made.unfinished, made.counts
    assert made.counts[True][State.done] + made.counts[True][State.failed] == len(cells) - len(old)


def test_results_of_earlier_launches_are_taken_over_too() -> None:
    old, new, other = toy_cell(4.0), toy_cell(4.5), toy_cell(2.0)
    done = {stage.key for stage in old.closure()}
    asked: list[str] = []

    def facts(key: str) -> str | None:
        asked.append(key)
        return flags_of(old.inputs["flag"])

    made = schedule([new, other], committed=done, computed=[old], facts=facts)
    tasks = ready(made)
    assert named(tasks) == ["flag", "flag"]
    assert asked == []
    end(made, tasks)
    same = {task.stage.key: task.same_as for task in ready(made)}
    assert same == {
        new.inputs["unlearn"].key: old.inputs["unlearn"].key,
        other.inputs["unlearn"].key: "",
    }
    # Read once, however many stages ask.
    assert asked == [old.inputs["flag"].key]


def test_flags_that_cannot_be_read_are_equal_to_none() -> None:
    old, new = toy_cell(4.0), toy_cell(4.5)
    done = {stage.key for stage in old.closure()}
    made = schedule([new], committed=done, computed=[old])
    end(made, ready(made))
    (task,) = ready(made)
    assert (task.stage, task.same_as) == (new.inputs["unlearn"], "")


def two_branches(threshold: float) -> Stage:
    """Return a cell with two stages that read facts, neither of which needs the other."""
    cell = toy_cell(threshold)
    scores = cell.inputs["score"]
    config = {"threshold": threshold, "again": True}
    again = Stage("flag again", flagged, config, {"scores": scores}, kind="host")
    more = Stage(
        "more",
        cut,
        {"second": True},
        {"scores": scores, "flagged": again},
        WHERE,
        kind="cell",
        units=1,
        reads=("flagged",),
    )
    inputs = {**cell.inputs, again.name: again, more.name: more}
    return Stage(CELL, put_together, dict(cell.config), inputs, light=tuple(inputs), kind="host")


def test_cells_do_not_wait_for_each_other() -> None:
    one, other = two_branches(4.0), two_branches(4.5)
    made = schedule([one, other])
    end(made, ready(made))
    flags = {task.stage.key: task for task in ready(made)}
    # The first cell is the first with one of its stages, the second with the other.
    same = digest_of({"flagged": [0]})
    for cell, name in ((one, "flag"), (other, "flag again"), (other, "flag"), (one, "flag again")):
        made.done(flags.pop(cell.inputs[name].key).stage.key, same)
    assert not flags
    # The second waits for the first with its unlearning; so the first must not wait for it.
    tasks = ready(made)
    keys = {one.inputs["unlearn"].key, one.inputs["more"].key, other.inputs["more"].key}
    assert {task.stage.key for task in tasks} == keys
    while tasks:
        end(made, tasks)
        tasks = ready(made)
    assert made.counts[True][State.done] == 2


# A worker --------------------------------------------------------------------------------------


def run_cell(store: Store, cell: Stage, same: Mapping[str, Stage] | None = None) -> list[Report]:
    """Compute the stages of a cell; `same`: by name, the stage whose result is taken over."""
    reports = []
    for stage in cell.closure():
        as_ = (same or {}).get(stage.name)
        report = run_node(
            stage.node(), store, owner="o", model=stage.model, again=False,
            same_as=as_.key if as_ else "",
        )  # fmt: skip
        assert report.outcome is Outcome.done
        reports.append(report)
    return reports


EQUAL = ("unlearn", "evaluate")


def equals(cell: Stage) -> dict[str, Stage]:
    return {name: cell.inputs[name] for name in EQUAL}


def test_an_equal_result_is_published_without_its_model(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = toy_cell(4.0), toy_cell(4.5)
    run_cell(store, first)
    CALLS.clear()
    reports = run_cell(store, second, equals(first))
    assert calls() == {"flag": 1, CELL: 1}
    by_name = dict(zip([s.name for s in second.closure()], reports, strict=True))
    assert by_name["unlearn"].dropped
    assert not by_name["evaluate"].dropped
    assert by_name["unlearn"].seconds == 0.0  # nothing to learn for estimates of time
    assert by_name["unlearn"].digest == digest_of({"cut": 1})
    unlearn = second.inputs["unlearn"]
    assert not store.is_committed(unlearn.key)
    assert unlearn.key in store.dropped()
    folder = store.fetch(unlearn.key, light=True)
    assert (folder / "table.txt").read_text() == "1 cut"
    assert not (folder / "model").exists()
    record, original = (
        read_record(store.fetch(cell.inputs["unlearn"].key, light=True)) for cell in (second, first)
    )
    assert record == {
        **original, "key": unlearn.key, "computed_as": first.inputs["unlearn"].key,
    }  # fmt: skip
    results = [
        json.loads((store.fetch(cell.key) / "result.json").read_text()) for cell in (first, second)
    ]
    assert results[0] == results[1]
    assert store.verify() == []


def test_a_copy_of_a_copy_names_what_was_computed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cells = [toy_cell(threshold) for threshold in (4.0, 4.3, 4.5)]
    run_cell(store, cells[0])
    run_cell(store, cells[1], equals(cells[0]))
    run_cell(store, cells[2], equals(cells[1]))
    record = store.read_json(cells[2].inputs["evaluate"].key, RECORD)
    assert record["computed_as"] == cells[0].inputs["evaluate"].key


def test_where_models_are_kept_it_comes_along(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = toy_cell(4.0).inputs["unlearn"], toy_cell(4.5).inputs["unlearn"]
    for stage in first.closure():
        run_node(stage.node(), store, owner="o", model=stage.model)
    report = run_node(second.node(), store, owner="o", same_as=first.key, keep=True)
    assert not report.dropped
    assert (store.fetch(second.key) / "model" / "weights").read_text() == "without [0]"


def test_a_source_that_goes_away_while_it_is_copied_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    first, second = toy_cell(4.0), toy_cell(4.5)
    run_cell(store, first)

    def gone(*args: Any, **options: Any) -> None:
        raise shutil.Error([("a", "b", "[Errno 2] No such file or directory: 'a'")])

    CALLS.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", gone)
        run_cell(store, second, equals(first))
    assert calls() == {"flag": 1, "unlearn": 1, "evaluate": 1, CELL: 1}

    def full(*args: Any, **options: Any) -> None:
        raise shutil.Error([("a", "b", "[Errno 122] Disk quota exceeded: 'b'")])

    third = toy_cell(4.6).inputs["unlearn"]
    run_node(toy_cell(4.6).inputs["flag"].node(), store, owner="o")
    monkeypatch.setattr(shutil, "copytree", full)
    report = run_node(
        third.node(), store, owner="o", same_as=first.inputs["unlearn"].key, again=False
    )
    assert report.outcome is Outcome.disk


def test_it_is_computed_where_the_equal_one_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = toy_cell(4.0), toy_cell(4.5)
    run_cell(store, second, equals(first))  # which nobody has computed
    assert calls() == {"score": 1, "flag": 1, "unlearn": 1, "evaluate": 1, CELL: 1}
    assert store.is_committed(second.inputs["unlearn"].key)


def test_a_damaged_equal_one_is_set_aside_and_computed(tmp_path: Path) -> None:
    told: list[str] = []
    store = Store(tmp_path, warn=told.append)
    first, second = toy_cell(4.0), toy_cell(4.5)
    run_cell(store, first)
    folder = store.fetch(first.inputs["unlearn"].key)
    (folder / "table.txt").write_text("x cut")
    fresh = Store(tmp_path, warn=told.append)
    CALLS.clear()
    run_cell(fresh, second, equals(first))
    assert calls()["unlearn"] == 1
    assert "table.txt has other content" in told[0]


def test_what_was_published_meanwhile_without_its_model_is_said_to_be(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = toy_cell(4.0), toy_cell(4.5)
    run_cell(store, first)
    run_cell(store, second, equals(first))
    node = second.inputs["unlearn"].node()
    report = run_node(node, store, owner="o", again=False, same_as=first.inputs["unlearn"].key)
    assert (report.outcome, report.dropped, report.seconds) == (Outcome.done, True, 0.0)


def test_a_crash_while_taking_over_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    first, second = toy_cell(4.0), toy_cell(4.5)
    run_cell(store, first)
    unlearn = second.inputs["unlearn"]
    with monkeypatch.context() as patch:

        def broken(*args: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(store, "publish", broken)
        report = run_node(
            unlearn.node(), store, owner="o", same_as=first.inputs["unlearn"].key, again=False
        )
    assert report.outcome is Outcome.disk
    assert store.look(unlearn.key) == (False, None, False)
    assert store.storage.names(places.attempts(unlearn.key)) == []
    run_cell(store, second, equals(first))
    assert store.is_committed(second.key)


# A launch --------------------------------------------------------------------------------------


class Planner(ToyPlanner):
    """Plans the cells of this file, by the threshold of the sweep."""

    def add(self, plan: Plan, cells: Iterable[Cell]) -> list[PlannedCell]:
        new = []
        for cell in cells:
            stage = toy_cell(float(cell.config["defense"]["threshold"]))
            if stage.key not in plan.cells:
                new.append(PlannedCell(stage, resolve(cell.config), cell.varied))
                plan.cells[stage.key] = new[-1]
        return new


def run_launch(driver: Driver, store: Store) -> list[Task]:
    """Run all tasks of a launch with real workers, in this process; return those taken over."""
    taken = []
    while not isinstance(task := driver.next_task(), Idle):
        for one in driver.chain(task):
            call = driver.call(one)
            driver.started(one)
            report = run_node(
                call.node, store, owner=driver.id, model=call.model, again=call.again,
                same_as=call.same_as, keep=call.keep,
            )  # fmt: skip
            taken += [one] if call.same_as else []
            driver.ended(one, report)
    assert task is Idle.finished
    return taken


SWEEP = "grid: {{defense.threshold: {}}}\nstore: {{keep: {}}}\n"


def launch(folder: Path, thresholds: list[float], keep: str = "results") -> ByHand:
    folder.mkdir(exist_ok=True)
    return begin(folder, SWEEP.format(thresholds, keep), Planner())


@pytest.mark.parametrize("keep", ["results", "models"])
def test_a_launch_computes_equal_stages_once(tmp_path: Path, keep: str) -> None:
    # Scores are 5, 3 and 1: four thresholds flag the first token, one the first two, one none.
    hand = launch(tmp_path, [3.5, 4.0, 4.3, 4.9, 2.0, 6.0], keep)
    store = hand.store
    taken = run_launch(hand.driver, store)
    assert calls() == {"score": 1, "flag": 6, "unlearn": 3, "evaluate": 3, CELL: 6}
    assert Counter(task.stage.name for task in taken) == {"unlearn": 3, "evaluate": 3}
    assert hand.driver.result().complete
    kept = {key for key in store.committed() if (store.fetch(key) / "model").exists()}
    assert len(kept) == (6 if keep == "models" else 0)
    hand.leave()
    # A later launch with more thresholds finds what the first has computed.
    CALLS.clear()
    hand = launch(tmp_path, [3.5, 4.6, 2.0, 2.5], keep)
    run_launch(hand.driver, hand.store)
    assert calls() == {"flag": 2, CELL: 2}
    hand.leave()


def test_the_results_are_those_of_computing_each(tmp_path: Path) -> None:
    thresholds = [3.5, 4.0, 2.0, 2.5]
    hand = launch(tmp_path / "sweep", thresholds)
    store = hand.store
    run_launch(hand.driver, store)
    hand.leave()
    for threshold in thresholds:
        cell = toy_cell(threshold)
        alone = compute(cell, tmp_path / f"alone {threshold}")
        shared = store.fetch(cell.key)
        assert (shared / "result.json").read_bytes() == (alone / "result.json").read_bytes()
        assert read_record(shared)["facts"] == read_record(alone)["facts"]


def test_a_model_that_another_launch_wants_comes_along(tmp_path: Path) -> None:
    hand = launch(tmp_path, [3.5, 4.0])
    wanted = toy_cell(4.0).inputs["unlearn"].key
    hand.store.leases.register_launch("another", "other", {wanted, toy_cell(4.0).key})
    run_launch(hand.driver, hand.store)
    assert (hand.store.fetch(wanted) / "model" / "weights").read_text() == "without [0]"
    hand.leave()


def test_a_chain_that_dies_after_taking_over_is_not_blamed_for_it(tmp_path: Path) -> None:
    hand = launch(tmp_path, [3.5, 4.0])
    driver, store = hand.driver, hand.store
    while True:
        task = driver.next_task()
        assert isinstance(task, Task)
        chain = driver.chain(task)
        if chain[0].same_as:
            break
        for one in chain:
            call = driver.call(one)
            driver.ended(one, run_node(call.node, store, owner=driver.id, model=call.model))
    assert [one.stage.name for one in chain] == ["unlearn", "evaluate", CELL]
    call = driver.call(chain[0])
    run_node(call.node, store, owner=driver.id, again=False, same_as=call.same_as)
    # Its workers die at the evaluation, and nobody has reported anything yet.
    driver.chain_lost(chain, "killed", progressed=False)
    assert list(store.failures()) == []
    taken = run_launch(driver, store)
    assert [one.stage.name for one in taken] == ["evaluate"]
    assert driver.result().complete
    hand.leave()


# The plan --------------------------------------------------------------------------------------


def test_a_plan_counts_what_may_be_equal(tmp_path: Path) -> None:
    hand = launch(tmp_path, [3.5, 4.0, 2.0])
    work = survey(
        hand.plan, committed=(), dropped=(), failed={}, timings=Timings([], "cpu"), sizes=False
    )
    # Two of three unlearnings, and two of three evaluations.
    assert work.alike == 4
    done = [s.key for s in next(iter(hand.plan.cells.values())).stage.closure()]
    work = survey(
        hand.plan, committed=done, dropped=(), failed={}, timings=Timings([], "cpu"), sizes=False
    )
    assert work.alike == 2
    hand.leave()
