"""A cell's spec -> its stages: what affects them, what is shared. Without data and weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from btu import stealth
from btu.defenses.base import DEFENSES, Given
from btu.foundation import Foundation
from btu.scoring import score_cell
from btu.stages import Stage, StageFunction
from btu.victims import VictimSource
from orchestrator.plan import graph as graphs
from orchestrator.plan.graph import Graph
from orchestrator.sweep.load import resolve
from orchestrator.sweep.sections import TrialSpec

NOTHING = StageFunction(lambda run: {}, 1, "toys:none")
NOTHING_ELSE = StageFunction(lambda run: {}, 2, "toys:none")

COUNTS = {"rows_train": 80, "rows_clean": 20, "rows_eval": 30}
ROWS = {"train": "t" * 64, "clean": "c" * 64, "eval": "e" * 64}
CONFIG: dict[str, Any] = {
    "data": {"name": "tiny", "path": "data"},
    "victim": {"name": "offline"},
    "attack": {"name": "badnets", "poison_rate": 0.2},
    "defense": {"name": "btu", "alpha": 0.01},
    "train": {"epochs": 2},
    "seed": 0,
}


def config(**sections: Any) -> dict[str, Any]:
    made = copy.deepcopy(CONFIG)
    for key, value in sections.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def cell(
    graph: Graph | None = None,
    rows: Mapping[str, str] = ROWS,
    weights: str = "w" * 64,
    **sections: Any,
) -> Stage:
    spec = resolve(config(**sections))
    return (graph or Graph()).cell(spec, rows, weights, COUNTS, revision="r" * 64)


def other_stages(one: Stage, other: Stage) -> set[str]:
    """Return the names of the stages that two cells do not share."""
    assert one.inputs.keys() == other.inputs.keys()
    return {name for name, stage in one.inputs.items() if stage.key != other.inputs[name].key}


BEFORE = {"poison", "triggered rows", "training rows", "evaluation rows"}
MODELS = {
    "poisoned fine-tune", "evaluate undefended", "clean tuning (control)", "evaluate tuned",
    "unlearn", "evaluate defended",
}  # fmt: skip
SCORES = {name for name in MODELS if name.startswith("evaluate")}
TUNED = {"clean tuning (control)", "evaluate tuned", "unlearn", "evaluate defended"}
ROUNDS = {"exposure round 1", "exposure round 2", "exposure round 3"}
FLAGS = {"score tokens", "flag tokens"}
DEFENDED = {"unlearn", "evaluate defended"}


def test_a_cell_has_its_stages_by_name() -> None:
    made = cell()
    assert set(made.inputs) == BEFORE | MODELS | ROUNDS | FLAGS | {"clean rows"}
    assert all(stage.name == name for name, stage in made.inputs.items())
    # Whatever a stage rests on is a stage of the cell.
    assert {s.key for s in made.closure()} == {made.key, *(s.key for s in made.inputs.values())}
    # It is put together on any node, from records and tables.
    assert (made.name, made.kind, made.model) == ("cell", "host", False)
    assert set(made.light) == set(made.inputs)


def test_the_same_spec_is_the_same_cell() -> None:
    assert cell().key == cell().key


# Of the cell above, as they were when rate 0 got a stage of its own. Results in people's stores go
# by them: a difference means that all of these are computed again, as with a raised version.
KEYS = {
    "poison": "ded16b33e89d21969f16e0ce",
    "triggered rows": "dcb6f8ab86314abc1d6e5d80",
    "training rows": "6621bd6d14e2812af05cf6d5",
    "clean rows": "8c969040a34c0e7c62ff6c33",
    "evaluation rows": "c88807b679c533ffe1874ff1",
    "poisoned fine-tune": "4335deb8ce488e43776c2cc9",
    "clean tuning (control)": "460e4ca40b38434a58ea35b7",
    "evaluate undefended": "1b55ced3ee603681ad41c99d",
    "evaluate tuned": "b74f3cfa046dbd9f678cfe10",
}


def test_keys_of_poisoned_cells_stay_what_they_are() -> None:
    made = cell()
    assert {name: made.inputs[name].key for name in KEYS} == KEYS


def test_without_poison_attacks_differ_in_what_is_scored_alone() -> None:
    one, other = (cell(attack={"name": n, "poison_rate": 0}) for n in ("badnets", "addsent"))
    assert other_stages(one, other) == {"triggered rows", "evaluation rows"} | SCORES
    assert one.key != other.key
    # How rows are chosen has no effect where none is.
    same = cell(attack={"poison_rate": 0, "label_mode": "mixed", "insert": "append"})
    assert same.key == one.key
    assert cell().key != one.key


def test_without_a_defense_one_evaluation_stands_under_two_names() -> None:
    graph = Graph()
    btu, none = cell(graph), cell(graph, defense={"name": "none"})
    assert set(none.inputs) == set(btu.inputs) - ROUNDS - FLAGS - {"unlearn"}
    assert none.inputs["evaluate defended"] is none.inputs["evaluate undefended"]
    # It adds no stage but the cell itself.
    mine = {stage.key for stage in none.closure()} - {none.key}
    assert mine < {stage.key for stage in btu.closure()}
    assert none.config == {"defended": "poisoned fine-tune"}
    # Settings of other defenses do not act.
    assert cell(graph, defense={"name": "none", "alpha": 0.5}).key == none.key


@pytest.mark.parametrize(
    ("sections", "reached"),
    [
        ({"seed": 1}, BEFORE | MODELS | ROUNDS | FLAGS),
        # The rows that are scored carry the trigger at any rate.
        (
            {"attack": {"poison_rate": 0.3}},
            {"poison", "training rows"} | MODELS | ROUNDS | FLAGS,
        ),
        ({"attack": {"trigger": ["mn"]}}, BEFORE | MODELS | ROUNDS | FLAGS),
        (
            {"victim": {"max_length": 64}},
            {"training rows", "clean rows", "evaluation rows"} | MODELS | ROUNDS | FLAGS,
        ),
        # Exposure has settings of its own and starts from the pretrained model.
        ({"train": {"epochs": 3}}, MODELS),
        ({"tuning": {"epochs": 3}}, TUNED),
        ({"defense": {"alpha": 0.02}}, {"exposure round 2", "flag tokens"} | DEFENDED),
        ({"defense": {"cut": "row"}}, DEFENDED),
        # Bags are trained in rounds 1 and 2 alone.
        (
            {"defense": {"bag_batch_size": 8}},
            {"exposure round 1", "exposure round 2"} | FLAGS | DEFENDED,
        ),
    ],
)
def test_a_setting_reaches_what_it_acts_on(sections: dict[str, Any], reached: set[str]) -> None:
    one, other = cell(), cell(**sections)
    assert other_stages(one, other) == reached
    assert one.key != other.key


@pytest.mark.parametrize(
    "sections",
    [
        {"resources": {"cpu": 4, "gpu": 0.5}},
        {"data": {"path": "elsewhere"}},
        {"defense": {"preset": "default"}},
        {"victim": {"trust_remote_code": True}},
        {"attack": {"sentence": "of another attack"}},
    ],
)
def test_what_does_not_act_is_no_other_cell(sections: dict[str, Any]) -> None:
    one, other = cell(), cell(**sections)
    assert other_stages(one, other) == set()
    assert one.key == other.key


def test_rows_and_weights_act() -> None:
    reached = {role: other_stages(cell(), cell(rows={**ROWS, role: "q" * 64})) for role in ROWS}
    assert reached == {
        "train": {"poison", "training rows"} | MODELS | ROUNDS | FLAGS,
        "clean": {"clean rows"} | TUNED | FLAGS,
        # Scoring on other rows trains nothing.
        "eval": {"triggered rows", "evaluation rows"} | SCORES,
    }
    assert other_stages(cell(), cell(weights="v" * 64)) == (
        {"training rows", "clean rows", "evaluation rows"} | MODELS | ROUNDS | FLAGS
    )
    revisions = cell().where["revisions"]
    assert (revisions["data"], revisions["victim"]) == ("r" * 12, "w" * 60)
    # The recipe depends on the versions of the stages only, not on the settings.
    other = cell(rows=dict.fromkeys(ROWS, "q" * 64), seed=5)
    assert revisions["recipe"] == other.where["revisions"]["recipe"]


def test_another_scoring_is_another_cell_on_the_same_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = cell()
    monkeypatch.setattr(graphs, "score_cell", replace(score_cell, version=score_cell.version + 1))
    after = cell()
    assert before.key != after.key
    assert other_stages(before, after) == set()


def test_cells_of_one_graph_share_their_stages() -> None:
    graph = Graph()
    one, other = cell(graph), cell(graph, defense={"alpha": 0.02})
    same = set(one.inputs) - other_stages(one, other)
    # The same objects: their keys are computed once.
    assert all(one.inputs[name] is other.inputs[name] for name in same)
    assert len(same) == 12


def test_where_a_graph_was_used_before_does_not_matter() -> None:
    graph = Graph()
    cell(graph, seed=3)
    cell(graph, data={"path": "elsewhere"})
    assert cell(graph).key == cell().key
    # The paths are those of the cell itself, not of the one that came first.
    first = cell(graph).inputs["poison"]
    assert str(first.where["data"]["path"]).endswith("data")


def test_a_cell_keeps_its_whole_config() -> None:
    made = cell()
    assert made.where["config"] == resolve(CONFIG).config()
    # What loading did to the rows belongs to no role.
    assert made.where["notes"] == COUNTS
    json.dumps(made.node())  # it travels


@dataclass(frozen=True)
class Twice:
    """A defense whose two stages have one name."""

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = ()

    def check(self, given: Given) -> None:
        pass

    def stages(self, base: Foundation) -> Stage:
        first = base.stage(NOTHING, "same", {}, {"rows": base.rows})
        return base.stage(NOTHING_ELSE, "same", {}, {"model": first})


def test_two_stages_of_one_name_are_a_mistake_of_the_defense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))
    DEFENSES.register("twice", f"{__name__}:Twice", "has two stages of one name")
    made = {**CONFIG, "defense": {"name": "twice"}}
    with pytest.raises(ValueError, match="defense 'twice' has two stages named 'same'"):
        Graph().cell(resolve(made), ROWS, "weights", COUNTS)


@dataclass(frozen=True)
class Peeks:
    """A defense that reads a stage which it should not. what: found through the poisoned rows."""

    what: str = "poison"

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {"default": {}}

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = ()

    def check(self, given: Given) -> None:
        pass

    def stages(self, base: Foundation) -> Stage:
        poisoned = base.rows.inputs["poison"]
        found = {
            "poison": poisoned,
            # Built again from its plain data: the key is the same.
            "copy": replace(poisoned, inputs=dict(poisoned.inputs)),
            "nothing": base.rows,
        }[self.what]
        first = base.stage(NOTHING, "peek", {}, {"rows": base.rows, "other": found})
        return base.stage(NOTHING, "last", {}, {"clean": base.clean, "peek": first})


def test_a_defense_that_reads_what_is_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))
    DEFENSES.register("peeks", f"{__name__}:Peeks", "reads the mask")

    def planned(what: str) -> Stage:
        made = {**CONFIG, "defense": {"name": "peeks", "what": what}}
        return Graph().cell(resolve(made), ROWS, "weights", COUNTS)

    for what in ("poison", "copy"):
        with pytest.raises(
            ValueError, match="defense 'peeks': stage 'peek' reads 'poison', which is hidden"
        ):
            planned(what)
    assert "peek" in planned("nothing").inputs


@dataclass(frozen=True)
class Reads:
    """A defense of one stage, which reads the one that it was given."""

    stage: Stage

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = ()

    def stages(self, base: Foundation) -> Stage:
        return base.stage(NOTHING, "told", {}, {"stage": self.stage})


@pytest.mark.parametrize("name", ["poison", "triggered rows", "evaluation rows"])
def test_whatever_way_a_hidden_stage_is_got_at_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    defense = Reads(cell().inputs[name])
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: defense)
    with pytest.raises(ValueError, match=f"stage 'told' reads '{name}', which is hidden"):
        cell()


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence encoder, whether or not one is installed."""
    monkeypatch.setattr(stealth, "find_encoder", lambda: VictimSource("here", "m" * 64))


MEASURES = {"stealth", "language model (stealth)"}


def test_without_stealth_no_key_and_no_record_changes() -> None:
    plain, off = cell(), cell(stealth=False)
    assert off.key == plain.key
    assert off.where == plain.where
    assert "stealth" not in off.where["config"]
    assert not MEASURES & off.inputs.keys()


def test_stealth_adds_two_stages_to_a_cell_and_changes_none(encoder: None) -> None:
    plain, on = cell(), cell(stealth=True)
    assert on.inputs.keys() - plain.inputs.keys() == MEASURES
    assert all(on.inputs[name].key == stage.key for name, stage in plain.inputs.items())
    assert on.key != plain.key
    # The cell can be computed again from its record.
    assert on.where["config"]["stealth"] is True
    # They are no cost of the defense.
    assert not MEASURES & set(on.where["cost"]["stages"])


def test_cells_of_all_defenses_share_what_stealth_measures(encoder: None) -> None:
    graph = Graph()
    defenses: list[dict[str, Any]] = [
        {"alpha": 0.01},
        {"alpha": 0.02},
        {"name": "onion"},
        {"name": "onion", "epochs": 1},
        {"name": "finetune_clean"},
    ]
    cells = [cell(graph, stealth=True, defense={"alpha": None} | d) for d in defenses]
    for name in MEASURES:
        assert len({one.inputs[name].key for one in cells}) == 1
    # ONION with its defaults has the same language model, under its own name too.
    onions = [cells[i].inputs["language model (onion)"].key for i in (2, 3)]
    shared = cells[0].inputs["language model (stealth)"].key
    assert [key == shared for key in onions] == [True, False]
    assert "language model (onion)" in cells[2].where["cost"]["stages"]


def test_without_poison_there_is_nothing_to_measure(encoder: None) -> None:
    # A control keeps its key and its result, whether or not the sweep asks.
    clean = {"poison_rate": 0.0}
    asked, plain = cell(stealth=True, attack=clean), cell(attack=clean)
    assert asked.key == plain.key
    assert asked.where == plain.where


def test_a_defense_that_reads_what_stealth_measures_is_refused(
    encoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cell(stealth=True)
    model = Reads(made.inputs["language model (stealth)"])
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: model)
    assert "told" in cell(stealth=True).inputs
    measures = Reads(made.inputs["stealth"])
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: measures)
    with pytest.raises(ValueError, match="stage 'told' reads 'stealth', which is hidden"):
        cell(stealth=True)


@dataclass(frozen=True)
class Listens(Reads):
    """A defense that screens, and reads one more stage than it is asked about.

    what: role of an input of the incoming texts; empty reads those alone.
    """

    what: str = "texts"

    def stages(self, base: Foundation) -> Stage:
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        more = {"more": incoming.inputs[self.what]} if self.what else {}
        return base.stage(NOTHING, "told", {}, {"incoming": incoming, **more})


def test_a_screen_reads_what_comes_in_and_not_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = cell().inputs["training rows"]
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: Listens(some, ""))
    assert "told" in cell().inputs["evaluate defended"].inputs["screened"].name
    # There the triggered texts stand apart from the others, with labels.
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: Listens(some))
    with pytest.raises(ValueError, match="stage 'told' reads 'evaluation texts', which is hidden"):
        cell()


def test_a_defense_that_would_poison_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # With another version it is another stage, but it writes the same mask.
    poison = cell().inputs["poison"]
    again = replace(poison, function=replace(poison.function, version=99), name="again")
    defense = Reads(again)
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: defense)
    with pytest.raises(ValueError, match="stage 'again' has the location of the data or attack"):
        cell()


@pytest.mark.parametrize(
    "name", ["training rows", "clean rows", "poisoned fine-tune", "clean tuning (control)"]
)
def test_what_the_foundation_has_may_be_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    defense = Reads(cell().inputs[name])
    monkeypatch.setattr(TrialSpec, "build_defense", lambda _: defense)
    assert cell().inputs["told"].inputs["stage"].name == name
