"""A sweep's own folder: its cells, and their results and failures out of the store."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from store_fixtures import Stored, publish_cell

from btu.errors import UserError
from btu.result_files import RESULT
from orchestrator.plan.planner import Plan, Planner, plan_sweep
from orchestrator.results.folder import Results, find_sweep, read_result
from orchestrator.store.store import Store
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.output import store_location

if TYPE_CHECKING:
    from orchestrator.plan.planner import PlannedCell

NAN = float("nan")


@pytest.fixture(params=["path", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An output folder, and one on an object store."""
    if request.param == "memory":
        import fsspec

        yield f"memory://{uuid.uuid4().hex}/runs"
        fsspec.filesystem("memory").store.clear()
        return
    yield str(tmp_path / "runs")


@pytest.fixture
def launch(
    output: str, make_sweep: Callable[..., Path], planner: Planner
) -> Callable[..., tuple[Results, Plan]]:
    """A function that writes the plan of a launch of a grid, as `btu launch` does."""

    def build(name: str = "tiny", **grid: list[Any]) -> tuple[Results, Plan]:
        axes = {key.replace("__", "."): values for key, values in grid.items()}
        sweep = load_sweep(make_sweep(name, axes), [f"output={output}"])
        plan = plan_sweep(sweep, planner)
        results = Results(sweep.output, sweep.name)
        results.store.prepare()
        results.write_plan(sweep, plan.cells.values())
        return results, plan

    return build


def finish(results: Results, cell: PlannedCell, folder: Path, **metrics: Any) -> None:
    """Commit a result of a cell that has these metrics alone."""
    folder.mkdir(exist_ok=True)
    result = {"config": cell.spec.config(), "metrics": metrics, "started": 1.0, "ended": 2.0}
    publish_cell(results.store, cell.key, folder, result)


def fail(results: Results, key: str, stage: str, reason: str = "bad luck") -> None:
    record = {"key": key, "stage": stage, "reason": reason, "traceback": "Traceback: x",
              "code": "0.1+then", "started": 1.0, "ended": 2.0}  # fmt: skip
    results.store.fail(key, record)


# Plans -----------------------------------------------------------------------------------------


def test_the_same_launch_again_is_the_same_file(launch: Callable[..., Any]) -> None:
    results, plan = launch(seed=[0, 1])
    (name,) = results.storage.names("tiny/plans")
    launch(seed=[0, 1])
    assert results.storage.names("tiny/plans") == [name]
    written = json.loads(results.storage.read(f"tiny/plans/{name}"))
    assert [cell["key"] for cell in written["cells"]] == list(plan.cells)


def test_the_file_of_the_last_launch_is_kept(launch: Callable[..., Any]) -> None:
    launch(seed=[0, 1])
    results, _ = launch(seed=[0, 1, 2])
    text = results.storage.read("tiny/sweep.yaml").decode()
    assert "- 2" in text
    assert "name: tiny" in text


def test_cells_of_all_launches_are_known(launch: Callable[..., Any]) -> None:
    _, first = launch(seed=[0, 1])
    results, second = launch(seed=[1], defense__alpha=[0.01, 0.05])
    assert len(results.storage.names("tiny/plans")) == 2
    cells = results.cells()
    # Seed 1 at alpha 0.01 is a cell of both: 2 + 2 - 1.
    assert list(cells) == sorted({*first.cells, *second.cells})
    assert len(cells) == 3
    for key, planned in second.cells.items():
        stages = {s.key: s.name for s in planned.stage.inputs.values()}
        assert cells[key].stages == stages
        assert cells[key].config() == planned.spec.config()
    for key in first.cells.keys() - second.cells.keys():
        assert cells[key].varied == {"seed": 0}


@pytest.mark.parametrize("keep", ["results", "models"])
def test_a_plan_says_which_model_a_cell_ends_with_if_it_is_kept(
    make_sweep: Callable[..., Path], planner: Planner, keep: str
) -> None:
    grid = {"defense.name": ["btu", "none", "clean_tuning", "strip"]}
    sweep = load_sweep(make_sweep(grid=grid), [f"store.keep={keep}"])
    plan = plan_sweep(sweep, planner)
    results = Results(sweep.output, sweep.name)
    results.write_plan(sweep, plan.cells.values())
    cells = results.cells()
    assert len(cells) == 4
    for key, planned in plan.cells.items():
        # What is evaluated as the defended model; of a screen, the one behind it.
        scored = planned.stage.inputs["evaluate defended"].inputs["model"]
        assert cells[key].model == (scored.key if keep == "models" else "")


def test_a_control_is_a_cell_with_its_coordinates(
    make_sweep: Callable[..., Path], planner: Planner
) -> None:
    sweep = load_sweep(make_sweep(controls=["no_poison", "no_defense"]))
    plan = plan_sweep(sweep, planner)
    results = Results(sweep.output, sweep.name)
    results.write_plan(sweep, plan.cells.values())
    cells = results.cells()
    assert {cell.varied.get("control") for cell in cells.values()} == {
        None, "no_poison", "no_defense",
    }  # fmt: skip
    for key, planned in plan.cells.items():
        assert cells[key].config() == planned.spec.config()
        assert set(cells[key].stages) == {s.key for s in planned.stage.inputs.values()}


def test_what_any_launch_asks_for_by_itself_is_no_control(
    make_sweep: Callable[..., Path], planner: Planner
) -> None:
    sweeps = [
        load_sweep(make_sweep(grid={"attack.poison_rate": rates}, controls=controls))
        for rates, controls in (([0.2], ["no_poison"]), ([0.2, 0], []))
    ]
    results = Results(sweeps[0].output, "tiny")
    for sweep in sweeps:
        results.write_plan(sweep, plan_sweep(sweep, planner).cells.values())
    first, second = results.storage.names("tiny/plans")
    plans = [results.storage.read(f"tiny/plans/{name}") for name in (first, second)]
    # Whichever of the two plans is read first.
    for one, other in (plans, plans[::-1]):
        results.storage.write(f"tiny/plans/{first}", one)
        results.storage.write(f"tiny/plans/{second}", other)
        found = [dict(cell.varied) for cell in results.cells().values()]
        found.sort(key=lambda varied: varied["attack.poison_rate"])
        assert found == [{"attack.poison_rate": 0}, {"attack.poison_rate": 0.2}]


def test_sweeps_of_one_output_have_their_own_cells(launch: Callable[..., Any]) -> None:
    one, first = launch("one", seed=[0])
    other, second = launch("other", seed=[1])
    assert list(one.cells()) == list(first.cells)
    assert list(other.cells()) == list(second.cells)
    assert one.store.location == other.store.location


def test_what_other_sweeps_want_is_told(launch: Callable[..., Any], tmp_path: Path) -> None:
    one, first = launch("one", seed=[0])
    other, second = launch("other", seed=[1])
    (cell,) = first.cells.values()
    stages = {stage.key for stage in cell.stage.inputs.values()}
    (sibling,) = second.cells.values()
    # The cell of `one` is not finished: its stages are wanted, but not by `one` itself.
    assert other.wanted_elsewhere(committed=()) == stages
    assert other.wanted_elsewhere(committed=[cell.key]) == set()
    wanted = one.wanted_elsewhere(committed=())
    assert wanted == {stage.key for stage in sibling.stage.inputs.values()}


def test_models_that_a_finished_sweep_keeps_are_wanted(
    output: str, make_sweep: Callable[..., Path], launch: Callable[..., Any], planner: Planner
) -> None:
    keeper = load_sweep(make_sweep("keeper", store={"keep": "models"}), [f"output={output}"])
    plan = plan_sweep(keeper, planner)
    Results(keeper.output, keeper.name).write_plan(keeper, plan.cells.values())
    other, _ = launch("other", seed=[1])
    (cell,) = plan.cells.values()
    wanted = other.wanted_elsewhere(committed=[cell.key])
    assert wanted == {stage.key for stage in cell.stage.inputs.values()}


# Records ---------------------------------------------------------------------------------------


def test_finished_cells_are_records(launch: Callable[..., Any], tmp_path: Path) -> None:
    results, plan = launch(seed=[0, 1, 2])
    first, second, _ = plan.cells.values()
    assert list(results.records()) == []
    finish(results, first, tmp_path / "files", asr=0.25, detection_recall=NAN)
    finish(results, second, tmp_path / "files", asr=0.5)
    records = {record["varied"]["seed"]: record for record in results.records()}
    assert set(records) == {0, 1}
    assert records[1]["metrics"] == {"asr": 0.5}
    zero = records[0]
    assert (zero["key"], zero["sweep"], zero["status"]) == (first.key, "tiny", "finished")
    assert zero["config"] == first.spec.config()
    assert zero["metrics"]["asr"] == 0.25
    assert math.isnan(zero["metrics"]["detection_recall"])  # JSON has no NaN


def test_a_result_serves_every_sweep_that_has_its_cell(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    one, plan = launch("one", seed=[0])
    other, _ = launch("other", seed=[0, 1])
    (cell,) = plan.cells.values()
    finish(one, cell, tmp_path / "files", asr=0.25)
    (record,) = other.records()
    assert (record["key"], record["sweep"]) == (cell.key, "other")


def test_results_of_an_earlier_grid_stay_in_the_table(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    results, plan = launch(seed=[0])
    (cell,) = plan.cells.values()
    finish(results, cell, tmp_path / "files", asr=0.25)
    results, grown = launch(defense__alpha=[0.02, 0.05])
    for number, planned in enumerate(grown.cells.values()):
        finish(results, planned, tmp_path / "files", asr=float(number))
    assert sorted(record["metrics"]["asr"] for record in results.records()) == [0.0, 0.25, 1.0]


def test_a_damaged_result_is_set_aside_and_left_out(
    make_sweep: Callable[..., Path], planner: Planner, tmp_path: Path
) -> None:
    sweep = load_sweep(make_sweep(grid={"seed": [0, 1]}))
    plan = plan_sweep(sweep, planner)
    Results(sweep.output, "tiny").write_plan(sweep, plan.cells.values())
    warnings: list[str] = []
    results = find_sweep(sweep.output, "tiny", warnings.append)
    results.store.prepare()
    first, second = plan.cells.values()
    for cell in (first, second):
        finish(results, cell, tmp_path / "files", asr=0.25)
    (results.store.fetch(first.key) / RESULT).write_text('{"metrics": {"asr": 0.99}}')
    assert [record["key"] for record in results.records()] == [second.key]
    (warning,) = warnings
    assert first.key in warning
    assert "set aside" in warning
    # As if it had not run: reported once, and computed again by the next launch.
    assert [record["key"] for record in results.records()] == [second.key]
    assert len(warnings) == 1
    assert not results.store.is_committed(first.key)
    assert results.record(first.key, {}) is None


def test_a_result_without_its_files_is_none(stored: Stored) -> None:
    (stored.folder / RESULT).unlink()
    assert stored.results.record(stored.key, {}) is None


# Failures --------------------------------------------------------------------------------------


def test_a_failed_cell_is_a_record_with_its_config(launch: Callable[..., Any]) -> None:
    results, plan = launch(seed=[0, 1])
    first, _ = plan.cells.values()
    assert list(results.failures()) == []
    fail(results, first.key, "cell", "KeyError: 'count'")
    (failure,) = results.failures()
    assert (failure["status"], failure["sweep"]) == ("failed", "tiny")
    assert (failure["key"], failure["failed"]) == (first.key, first.key)
    assert failure["reason"] == "KeyError: 'count'"
    assert failure["varied"] == {"seed": 0}
    assert failure["config"] == first.spec.config()
    assert failure["traceback"] == "Traceback: x"
    assert failure["tags"] == {"code": "0.1+then"}  # not of the code that reads it
    assert "code" not in failure


def test_a_sweeps_folder_has_an_id_of_its_own(tmp_path: Path) -> None:
    here = Results(str(tmp_path / "here"), "tiny")
    there = Results(str(tmp_path / "there"), "tiny")
    assert here.origin() == Results(str(tmp_path / "here"), "tiny").origin() != there.origin()
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    assert Results(str(tmp_path / "copy"), "tiny").origin() == here.origin()


def test_the_failure_of_a_stage_is_that_of_every_cell_on_it(launch: Callable[..., Any]) -> None:
    results, plan = launch(seed=[0, 1], defense__alpha=[0.01, 0.05])
    cells = list(plan.cells.values())
    shared = cells[0].stage.inputs["poisoned fine-tune"]  # of seed 0, with both alphas
    fail(results, shared.key, shared.name)
    failures = list(results.failures())
    assert {failure["key"] for failure in failures} == {cells[0].key, cells[1].key}
    for failure in failures:
        assert failure["reason"] == "stage 'poisoned fine-tune' failed: bad luck"
        assert failure["failed"] == shared.key
        assert failure["varied"]["seed"] == 0


def test_the_failure_of_a_cell_itself_comes_first(launch: Callable[..., Any]) -> None:
    results, plan = launch(seed=[0])
    (cell,) = plan.cells.values()
    fail(results, cell.stage.inputs["poison"].key, "poison", "of the stage")
    fail(results, cell.key, "cell", "of its own")
    (failure,) = results.failures()
    assert failure["reason"] == "of its own"


def test_a_finished_cell_has_no_failure(launch: Callable[..., Any], tmp_path: Path) -> None:
    results, plan = launch(seed=[0])
    (cell,) = plan.cells.values()
    finish(results, cell, tmp_path / "files", asr=0.25)
    fail(results, cell.stage.inputs["poison"].key, "poison")
    assert list(results.failures()) == []
    assert len(list(results.records())) == 1


def test_failures_of_other_sweeps_are_not_told(launch: Callable[..., Any]) -> None:
    one, plan = launch("one", seed=[0])
    other, _ = launch("other", seed=[1])
    fail(one, next(iter(plan.cells)), "cell")
    assert len(list(one.failures())) == 1
    assert list(other.failures()) == []


# The journal -----------------------------------------------------------------------------------


def test_the_journal_gives_back_what_was_noted(launch: Callable[..., Any]) -> None:
    results, _ = launch(seed=[0])
    assert results.journal() == []
    results.journal_event("start", key="k", stage="unlearn\u2028odd", launch="l-1")
    results.journal_event("end", key="k", outcome="done")
    first, second = results.journal()
    assert first["time"] <= second["time"]
    assert {k: v for k, v in first.items() if k != "time"} == {
        "event": "start", "key": "k", "stage": "unlearn\u2028odd", "launch": "l-1",
    }  # fmt: skip
    assert (second["event"], second["outcome"]) == ("end", "done")


# Finding a sweep -------------------------------------------------------------------------------


def test_a_sweep_is_found_by_name(launch: Callable[..., Any], output: str) -> None:
    results, plan = launch(seed=[0])
    found = find_sweep(output, "tiny")
    assert list(found.cells()) == list(plan.cells)
    assert found.store.location == results.store.location == store_location(output)


def test_a_relative_output_is_the_same_place(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(find_sweep("runs", "tiny").cells()) == list(stored.results.cells())


def test_an_unknown_sweep_names_the_closest(launch: Callable[..., Any], output: str) -> None:
    launch("tiny", seed=[0])
    launch("other", seed=[0])
    with pytest.raises(
        UserError,
        match=r"unknown sweep in .* 'tinny'; did you mean 'tiny'\? \(known: other, tiny\); launch",
    ):
        find_sweep(output, "tinny")


@pytest.mark.parametrize("name", ["store", "mlartifacts"])
def test_a_folder_that_is_no_sweep_is_unknown(stored: Stored, tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "mlartifacts").mkdir()
    with pytest.raises(UserError, match=r"\(known: tiny\)"):
        find_sweep(str(tmp_path / "runs"), name)


def test_an_empty_output_has_no_sweeps(output: str) -> None:
    with pytest.raises(UserError, match=r"\(known: none\); launch it first"):
        find_sweep(output, "tiny")


def test_a_cells_folder_is_read_without_a_store(stored: Stored) -> None:
    metrics = {"asr": 0.5, "detection_recall": NAN}
    stored.rewrite({**stored.record, "metrics": metrics})
    result, flagged = read_result(stored.folder)
    assert result["metrics"]["asr"] == 0.5
    assert math.isnan(result["metrics"]["detection_recall"])
    assert "NaN" not in (stored.folder / RESULT).read_text()
    scores = [token["score"] for token in flagged]
    assert scores == sorted(scores, reverse=True)
    assert all(token["flagged"] for token in flagged)


def test_results_can_share_a_store(stored: Stored) -> None:
    store = Store(stored.store.location)
    assert Results(stored.results.output, "tiny", store).store is store
