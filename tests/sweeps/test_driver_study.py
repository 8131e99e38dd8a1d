"""A launch whose cells are suggested while it runs, by Optuna or by a refinement; without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from driving import ALPHA, OWN, ByHand, Launches, metrics, models

from btu.errors import UserError
from orchestrator.run.driver import Idle
from orchestrator.run.refine import RefineSpec
from orchestrator.run.schedule import CELL, Task

SEARCHED = """
seed: 0
grid: {seed: [0, 1]}
optuna:
  trials: 3
  sampler: random
  space: {defense.alpha: {low: 0.01, high: 0.04}}
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launches]:
    """A function that begins a launch. Called again, it is the next launch of the same sweep."""
    made = Launches(tmp_path)
    yield made
    made.leave()


# A study of Optuna -----------------------------------------------------------------------------


def test_a_study_suggests_as_many_at_once_as_run(launch: Launches) -> None:
    hand = launch(SEARCHED)
    assert "Further cells are suggested while the sweep runs." in hand.said
    assert hand.driver.has_work
    assert hand.plan.cells == {}
    hand.driver.slots = 1
    tasks = [hand.take("rows"), hand.take("rows")]  # of two seeds
    assert hand.driver.next_task() is Idle.later
    assert len(hand.plan.cells) == 2
    # What was suggested is on disk, and nobody removes what it needs.
    assert set(hand.results.cells()) == set(hand.plan.cells)
    assert set(hand.plan.cells) <= hand.store.leases.in_use()
    hand.driver.slots = 2
    assert hand.driver.next_task() is Idle.later  # the second shares the stages of both seeds
    assert len(hand.plan.cells) == 4
    for task in tasks:
        hand.finish(task)
    assert hand.run_all()[CELL] == 6
    result = hand.driver.result()
    assert (result.done, result.failed, result.missing) == (6, {}, 0)
    assert hand.said.count("best: asr ") >= 1


def told(folder: Path) -> dict[str, Any]:
    """Return the results that the study got, by number."""
    files = (folder / "runs" / "toy" / "search").glob("*/*.told.json")
    return {file.name.partition(".")[0]: json.loads(file.read_text()) for file in files}


def test_a_study_is_told_the_means_once_all_cells_have_ended(
    launch: Launches, tmp_path: Path
) -> None:
    hand = launch(SEARCHED)
    seen = 0
    while isinstance(task := hand.driver.next_task(), Task):
        hand.finish(task)
        if task.stage.name == CELL:
            seen += 1
            assert len(told(tmp_path)) == seen // 2
    assert sorted(told(tmp_path)) == ["000000", "000001", "000002"]
    alphas = {cell.varied[ALPHA] for cell in hand.plan.cells.values()}
    expected = [metrics({ALPHA: alpha}) for alpha in sorted(alphas)]
    assert sorted(map(str, told(tmp_path).values())) == sorted(map(str, expected))


def test_a_suggestion_with_a_failed_cell_has_failed(launch: Launches, tmp_path: Path) -> None:
    hand = launch(SEARCHED)
    while (task := hand.take()).stage.name != "unlearn":
        hand.finish(task)
    hand.fails(task)
    hand.run_all()
    found = told(tmp_path)
    assert len(found) == 3
    assert [number for number, values in found.items() if values is None] == ["000000"]
    result = hand.driver.result()
    assert (result.done, len(result.failed), result.missing) == (5, 1, 0)
    hand.leave()
    # Asked again, it counts as open until its cells have ended.
    again = launch(SEARCHED, retry_failed=True)
    assert again.driver.result().missing == 1 + 1  # its cell, and the suggestion
    again.run_all()
    assert None not in told(tmp_path).values()
    assert again.driver.result().complete


def test_the_next_launch_goes_on_with_a_study(launch: Launches, tmp_path: Path) -> None:
    first = launch(SEARCHED)
    first.finish(first.take("rows"))
    first.take()
    first.leave()
    second = launch(SEARCHED)
    assert set(second.plan.cells) == set(first.plan.cells)  # of what was suggested
    assert second.driver.result().missing == 2 + 3  # its cells, and the suggestions
    second.run_all()
    assert len(told(tmp_path)) == 3
    assert second.driver.result().complete
    second.leave()
    third = launch(SEARCHED)
    assert not third.driver.has_work
    assert third.driver.result().done == 6


def test_a_suggestion_that_cannot_run_is_told_as_failed_and_the_next_is_asked_for(
    launch: Launches, tmp_path: Path
) -> None:
    text = SEARCHED.replace("{low: 0.01, high: 0.04}", "[0.01, 0.02]").replace("random", "tpe")
    launch.planner.refused = {0.01}
    hand = launch(text.replace("trials: 3", "trials: 8"))
    hand.run_all()
    assert "suggestion refused: no such threshold." in hand.said
    values = list(told(tmp_path).values())
    assert len(values) == 8
    assert {str(value) for value in values} == {"None", str(metrics({ALPHA: 0.02}))}
    assert hand.driver.result().complete  # two cells: all suggestions are the same


# Refinement ------------------------------------------------------------------------------------


@pytest.fixture
def refining(launch: Launches) -> Callable[[int], ByHand]:
    """A function that begins a launch which refines, on a sweep whose grid is done.

    ASR is 1 at 0.01 and 0 at 0.04. Called again, it is the next launch of the same sweep.
    """
    grid = launch()
    grid.run_all()
    grid.leave()
    return lambda trials: launch(refine=RefineSpec(("asr",), trials))


def test_a_driver_asks_for_a_threshold_and_the_next_launch_knows_it(
    refining: Callable[[int], ByHand],
) -> None:
    hand = refining(1)
    assert hand.driver.has_work
    assert "Further cells are suggested while the sweep runs." in hand.said
    assert hand.take("train").stage  # its model is gone, that of the new cell starts from it
    (asked,) = (c for c in hand.results.cells().values() if c.varied[ALPHA] == 0.02)
    assert asked.key in hand.plan.cells  # sqrt(0.01 x 0.04)
    hand.leave()
    # As after kill -9: its cell is to be run, and nothing else; the budget is used up.
    again = refining(1)
    assert set(again.plan.cells) == set(hand.plan.cells)
    assert "Further cells" not in again.said
    assert again.run_all() == {"train": 1, **dict.fromkeys(OWN, 1)}
    assert again.driver.result().done == 3
    again.leave()
    assert not refining(1).driver.has_work


def test_shared_models_stay_while_thresholds_may_follow(
    refining: Callable[[int], ByHand],
) -> None:
    hand = refining(2)
    for name in ("train", "unlearn", "evaluate"):
        hand.finish(hand.take(name))
    # Its own model has gone; the shared one stays for the second threshold.
    assert models(hand) == {"train": 1}
    assert hand.run_all() == {CELL: 2, "unlearn": 1, "evaluate": 1}
    assert models(hand) == {}


def test_a_failed_threshold_is_told_and_ends_the_search(refining: Callable[[int], ByHand]) -> None:
    hand = refining(9)
    hand.driver.worker_lost(hand.take("train"), "")  # the first stage of the new cell
    assert hand.driver.next_task() is Idle.finished
    assert not hand.driver.has_work
    result = hand.driver.result()
    assert (result.done, len(result.failed), result.missing) == (2, 1, 0)
    found = "between 0.01 and 0.04 (refined with 1 cell; 0.02 between them has no asr)"
    assert found in hand.said
    hand.leave()
    assert not refining(9).driver.has_work


def test_a_refused_threshold_ends_the_search_with_a_note(
    refining: Callable[[int], ByHand], launch: Launches
) -> None:
    launch.planner.refused = {0.02}
    hand = refining(9)
    assert not hand.driver.has_work
    assert hand.driver.result().complete
    assert "defense.alpha=0.02 is refused" in hand.said


def test_a_sweep_without_thresholds_is_refused(launch: Launches) -> None:
    with pytest.raises(UserError, match="--refine needs an axis of thresholds"):
        launch("grid: {seed: [0, 1]}\n", refine=RefineSpec(("asr",), 9))
