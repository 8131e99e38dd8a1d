"""The contract that every registered defense keeps, whatever its kind."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defending import (
    BARS,
    KEPT,
    LEARNING,
    SMALL,
    Declared,
    Fitted,
    Outcome,
    defend,
    given,
    same_rows,
    same_weights,
    spied,
    word_rows,
)
from tiny_cells import Lab, easy_corpus, files_in

from btu.attacked import HIDDEN
from btu.attacks.poisoning import PoisonSpec
from btu.defenses.base import (
    CLEAN_ROWS,
    DEFENSE_KINDS,
    DEFENSES,
    NEEDS,
    ORIGINALS,
    POISONED_MODEL,
    Defense,
    Screens,
    check_cell,
)
from btu.defenses.none import NoDefense
from btu.errors import UserError
from btu.findings import INCOMING, Suspects, incoming_of
from btu.foundation import Foundation, tune
from btu.recipe import Prepared, evaluation
from btu.rules.base import RULES
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import clean_rows_of, model_of, read_rows, texts_of, write_table
from btu.stages import compute, read_record, run_stage
from btu.types import Corpus, Rows
from btu.victims import Victim

pytestmark = pytest.mark.usefixtures("short_halves")

# On the easy corpus the victim then predicts all clean rows, and obeys the trigger in all others.
LONG = TrainSettings(epochs=12, learning_rate=1e-2, batch_size=32, precision="fp32")
# Every default in seconds; the other rules of btu and the other architectures with the slow tests.
PARAMS = [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("btu-frequency", "btu-mad", "btu-gap")
    else name
    for name in KEPT
]
VICTIMS = [
    name if name in ("bert", "gpt2") else pytest.param(name, marks=pytest.mark.slow)
    for name in ("bert", "gpt2", "roberta", "distilbert", "deberta-v2")
]
# Share of the 60 clean evaluation rows that a defense may cost where there is nothing to defend.
BOUND = 0.15


@pytest.fixture(scope="session")
def easy(tiny_corpus: Corpus) -> Corpus:
    return easy_corpus(tiny_corpus)


@pytest.fixture(params=PARAMS)
def defense(request: pytest.FixtureRequest) -> Defense:
    """Each registered defense in turn, btu with each registered rule."""
    name, settings = KEPT[request.param]
    built: Defense = DEFENSES.load(name)(**settings)
    return built


@pytest.fixture(params=PARAMS)
def learning(request: pytest.FixtureRequest) -> Defense:
    """The same, with settings that let a model of a defense's own learn the easy corpus."""
    name, settings = KEPT[request.param]
    built: Defense = DEFENSES.load(name)(**settings | LEARNING.get(name, {}))
    return built


def acts(defense: Defense) -> bool:
    """Return whether a defense has to do anything: all but the control that does nothing."""
    return not isinstance(defense, NoDefense)


def test_every_defense_has_small_settings_for_this_suite() -> None:
    assert set(SMALL) == set(DEFENSES)
    assert set(BARS) == set(RULES)
    assert {name for name, _ in KEPT.values()} == set(DEFENSES)


def test_a_defense_says_when_it_acts_and_what_it_needs(defense: Defense, lab: Lab) -> None:
    assert defense.KIND in DEFENSE_KINDS
    assert set(defense.NEEDS) <= set(NEEDS)
    assert isinstance(defense, Screens) == (defense.KIND == "at inference")
    # Only a control may read the rows before the poison.
    assert ORIGINALS not in defense.NEEDS or defense.KIND == "control"
    prepared = lab.prepare()
    base, declared = prepared.foundation, Declared.of(defense, prepared)
    tops = [declared.model] if declared.screen is None else [declared.model, declared.screen]
    read = {stage.key for top in tops for stage in top.closure()}
    assert (base.model.key in read) == (POISONED_MODEL in defense.NEEDS)
    assert (base.clean.key in read) == (CLEAN_ROWS in defense.NEEDS)
    assert (prepared.originals.key in read) == (ORIGINALS in defense.NEEDS)


def test_what_asks_no_model_and_makes_none_holds_no_accelerator(defense: Defense, lab: Lab) -> None:
    for stage in Declared.of(defense, lab.prepare()).own:
        asks = stage.units > 0 or any(before.model for before in stage.inputs.values())
        if not asks and not stage.model:
            assert stage.kind == "host", stage.name


def test_a_defense_without_what_it_needs_is_refused(defense: Defense) -> None:
    poor = dataclasses.replace(given(400), clean_rows=0)
    if CLEAN_ROWS not in defense.NEEDS:
        check_cell("it", defense, poor)
        return
    with pytest.raises(UserError, match="defense 'it' needs clean rows") as caught:
        check_cell("it", defense, poor)
    assert "btu list defenses" in str(caught.value)


@pytest.mark.parametrize("architecture", VICTIMS)
def test_a_defense_works_on_every_architecture_and_runs_what_it_declares(
    defense: Defense,
    architecture: str,
    make_victim: Callable[[str], Victim],
    lab: Lab,
    tmp_path: Path,
    fits: list[Fitted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = make_victim(architecture)
    prepared = lab.prepare(architecture)
    root = lab.base_root(tmp_path, prepared)
    base = prepared.foundation
    shared = [root / stage.key for stage in (base.rows, base.clean, base.model, base.tuned)]
    before = files_in(*shared)
    vocabulary = len(word_rows(victim.new_model(0)))
    check_cell("it", defense, given(vocabulary))
    declared = Declared.of(defense, prepared)
    ran = spied(declared.own, monkeypatch)
    fits.clear()
    outcome = defend(defense, prepared, root)
    # Every stage that was declared ran, once, and nothing else of the defense did.
    own = {stage.key for stage in declared.own}
    assert [key for key in ran if key in own] == [stage.key for stage in declared.own]
    # Whatever trained is in the history of its stage, in order.
    records = [read_record(root / stage.key) for stage in declared.own]
    history = [epoch for record in records for epoch in record["history"]]
    assert [epoch["stage"] for epoch in history if epoch["epoch"] == 1] == [
        call.stage for call in fits
    ]
    assert [record["stage"] for record in records] == [stage.name for stage in declared.own]
    assert all(record["seconds"] > 0 for record in records)
    # Rows and models serve other defenses too.
    assert files_in(*shared) == before
    assert changed(outcome) or defense.KIND == "at inference" or not acts(defense)
    check_found(outcome, victim, vocabulary)
    check_declaration(defense, prepared)


def changed(outcome: Outcome) -> bool:
    """Return whether a defense changed the model, or anything on its way to the model."""
    screened = outcome.screened
    if not same_weights(outcome.model, outcome.poisoned_model):
        return True
    if screened is None:
        return False
    came = incoming_of(outcome.root / outcome.prepared.incoming.key).texts
    return not screened.accepted.all() or screened.texts not in (None, came)


def check_declaration(defense: Defense, prepared: Prepared) -> None:
    base, declared = prepared.foundation, Declared.of(defense, prepared)
    cell = [
        evaluation(prepared, base.model, "undefended"),
        evaluation(prepared, base.tuned, "tuned"),
    ]
    stages = {stage.key: stage for top in (*cell, declared.last) for stage in top.closure()}
    names = [stage.name for stage in stages.values()]
    assert len(set(names)) == len(names), "stage names are unique within a cell"
    # MLflow refuses a run with another metric name; a report maps brackets.
    assert all(re.fullmatch(r"[\w .:/()-]+", name) for name in names)
    hidden = prepared.hidden
    assert hidden >= {s.key for s in (prepared.poisoned, prepared.triggered)}
    assert prepared.evaluation_rows.key in hidden
    originals = {s.key for s in prepared.originals.closure()} if ORIGINALS in defense.NEEDS else {}
    for stage in declared.own:
        assert json.loads(json.dumps(stage.node())) == stage.node()
        if stage.key in originals:
            continue
        assert not hidden & {before.key for before in stage.inputs.values()}, stage.name
        assert "attack" not in stage.where
        assert "data" not in stage.where  # from the path, the unpoisoned rows could be read
    assert declared.model.model
    assert declared.model.key == declared.last.inputs["model"].key


def check_found(outcome: Outcome, victim: Victim, vocabulary: int) -> None:
    found = Suspects.load(outcome.folder, read_record(outcome.folder)["facts"])
    if found is None:
        return
    if found.flagged is not None:
        assert len(set(found.flagged)) == len(found.flagged)
        assert all(0 <= token < vocabulary for token in found.flagged)
        assert not set(found.flagged) & set(victim.tokenizer.all_special_ids)
    if found.scores is not None:
        assert found.flagged
        assert found.scores.shape == (vocabulary,)
        # What was flagged was a candidate with a score, and no special token was one.
        assert not np.isnan(found.scores[list(found.flagged)]).any()
        assert np.isnan(found.scores[victim.tokenizer.all_special_ids]).all()
    for values in found.table.values():
        assert np.shape(values) == (vocabulary,)
    for rows in (found.rows, found.taken):
        if rows is not None:
            assert rows.shape == (len(outcome.train),)
            assert np.isfinite(rows).all()
    if found.taken is not None:
        assert found.taken.dtype == bool
    assert found.target is None or 0 <= found.target < victim.num_labels


def test_same_seed_same_defense(defense: Defense, lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    outcomes = [
        defend(defense, prepared, lab.base_root(tmp_path / name, prepared)) for name in "ab"
    ]
    for stage in Declared.of(defense, prepared).own:
        folders = [outcome.root / stage.key for outcome in outcomes]
        first, second = (
            {path.removeprefix(str(folder)): held for path, held in files_in(folder).items()}
            for folder in folders
        )
        # Byte for byte, except for the record, which contains the time.
        assert first.keys() == second.keys()
        assert [path for path in first if first[path] != second[path]] == ["/record.json"]
        facts = [read_record(folder)["facts"] for folder in folders]
        assert repr(facts[0]) == repr(facts[1])  # NaN is not equal to itself


def test_another_seed_is_another_defense(defense: Defense, lab: Lab) -> None:
    outcomes = [defend(defense, lab.prepare(seed=seed), lab.root) for seed in (0, 1)]
    assert not same_weights(outcomes[0].model, outcomes[1].model)


def test_a_defense_changes_something_where_the_poison_is_strong(
    learning: Defense, lab: Lab, easy: Corpus
) -> None:
    defense = learning
    prepared = lab.prepare(corpus=easy, rate=0.3, train=LONG)
    undefended = read_record(
        compute(evaluation(prepared, prepared.foundation.model, "undefended"), lab.root)
    )["facts"]
    # The attack works: a defense has something to do.
    assert undefended["asr"]["hits"] >= 0.9 * undefended["asr"]["n"]
    assert undefended["ftr"]["hits"] <= 0.1 * undefended["ftr"]["n"]
    outcome = defend(defense, prepared, lab.root)
    assert changed(outcome) == acts(defense)
    scored = outcome.score()
    for name in ("cacc", "asr", "ftr"):
        assert scored[name]["n"] == undefended[name]["n"]
        assert 0 <= scored[name]["hits"] <= scored[name]["n"]


def test_a_defense_costs_little_where_there_is_no_poison(
    learning: Defense, bert: Victim, lab: Lab, easy: Corpus
) -> None:
    defense = learning
    prepared = lab.prepare(corpus=easy, rate=0.0, train=LONG)
    outcome = defend(defense, prepared, lab.root)
    history = [e for stage in outcome.stages for e in read_record(lab.root / stage.key)["history"]]
    assert all(math.isfinite(epoch["loss"]) for epoch in history)
    check_found(outcome, bert, len(word_rows(outcome.model)))
    undefended = evaluation(prepared, prepared.foundation.model, "undefended")
    before = read_record(compute(undefended, lab.root))["facts"]["cacc"]
    assert before["hits"] >= 0.95 * before["n"]
    after = outcome.score()["cacc"]
    if getattr(defense, "rule", None) in ("mad", "gap", "top_fraction"):
        # With bars as low as here they flag benign words, which the default rule spares.
        assert after["hits"] < before["hits"]
        return
    assert after["hits"] >= before["hits"] - BOUND * before["n"]


def test_a_defense_reads_nothing_that_is_hidden(defense: Defense, lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path / "blind", prepared)
    # Not even a file of the poison is left.
    (root / prepared.poisoned.key).unlink()
    (root / prepared.poisoned.key).mkdir()
    assert not (root / prepared.poisoned.key / HIDDEN).exists()
    if isinstance(defense, Screens):
        lab.root_with(root, prepared.incoming)
        for stage in prepared.incoming.closure():
            if stage.name != "incoming texts":
                (root / stage.key).unlink(missing_ok=True)
                (root / stage.key).mkdir(exist_ok=True)
    blind = defend(defense, prepared, root)
    seeing = defend(defense, prepared, lab.base_root(tmp_path / "seeing", prepared))
    assert same_weights(blind.model, seeing.model)
    if blind.screened is not None:
        assert seeing.screened is not None
        assert blind.screened.accepted.tolist() == seeing.screened.accepted.tolist()
        assert blind.screened.texts == seeing.screened.texts
    read = {stage.key for stage in Declared.of(defense, prepared).model.closure()}
    assert prepared.evaluation_rows.key not in read
    assert not (root / prepared.evaluation_rows.key).exists()


def test_each_text_is_screened_for_itself(defense: Defense, lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    outcome = defend(defense, prepared, lab.root)
    declared = Declared.of(defense, prepared)
    if declared.screen is None:
        assert outcome.screened is None
        return
    # Every third text, in another order: its verdict does not change.
    came = lab.root / prepared.incoming.key
    texts = incoming_of(came).texts
    some = list(range(len(texts)))[::-3]
    fewer = tmp_path / "incoming"
    fewer.mkdir()
    write_table(fewer / INCOMING, {"text": [texts[i].encode() for i in some]})
    (fewer / "record.json").write_bytes((came / "record.json").read_bytes())
    folders = {prepared.incoming.key: fewer}
    for stage in declared.screen.closure():
        above = prepared.incoming.key in {part.key for part in stage.closure()}
        if stage.key in folders:
            continue
        if not above:
            folders[stage.key] = lab.root / stage.key
            continue
        folders[stage.key] = tmp_path / stage.key
        folders[stage.key].mkdir()
        inputs = {role: folders[before.key] for role, before in stage.inputs.items()}
        run_stage(stage.node(), inputs, folders[stage.key])
    whole = outcome.screened
    assert whole is not None
    part = type(whole).load(folders[declared.screen.key])
    assert part.accepted.tolist() == whole.accepted[some].tolist()
    if whole.texts is not None:
        assert part.texts == tuple(whole.texts[i] for i in some)


def test_a_defense_leaves_the_global_random_state_alone(
    defense: Defense, lab: Lab, tmp_path: Path, global_random_state: None
) -> None:
    prepared = lab.prepare()
    outcome = defend(defense, prepared, lab.base_root(tmp_path, prepared))
    assert (outcome.folder / "model").is_dir()


def test_progress_reaches_the_callback(
    defense: Defense, lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    declared = Declared.of(defense, prepared)
    starts = [stage.inputs.values() for stage in declared.own]
    own = {stage.key for stage in declared.own}
    before = [stage for inputs in starts for stage in inputs if stage.key not in own]
    root = lab.root_with(lab.base_root(tmp_path, prepared), *before)
    fits.clear()
    seen: list[Any] = []
    defend(defense, prepared, root, progress=seen.append)
    begun = dict.fromkeys(p.stage for p in seen if p.step == 0 and p.part == 0)
    names = [stage.name for stage in declared.own]
    assert [name for name in begun if name in names] == names
    trained = list(dict.fromkeys(p.stage for p in seen if p.step > 0 and "loss" in p.metrics))
    assert trained == list(dict.fromkeys(call.stage for call in fits))


# What they start from --------------------------------------------------------------------------


def test_no_defense_is_the_poisoned_model_scored_by_the_stage_that_scores_it_anyway(
    lab: Lab,
) -> None:
    prepared = lab.prepare()
    base = prepared.foundation
    assert NoDefense().stages(base) is base.model
    undefended = evaluation(prepared, base.model, "undefended")
    defended = evaluation(prepared, NoDefense().stages(base), "defended", kind="cell")
    assert defended.key == undefended.key
    # It looks for nothing, which is not the same as having found nothing.
    folder = defend(NoDefense(), prepared, lab.root).folder
    assert Suspects.load(folder, read_record(folder)["facts"]) is None


def test_the_originals_are_the_rows_that_no_attack_has_touched(lab: Lab) -> None:
    prepared, unpoisoned = lab.prepare(), lab.prepare(rate=0.0)
    # One and the same fine-tune: a sweep with both pays for it once.
    assert prepared.originals.key == unpoisoned.foundation.model.key
    assert prepared.originals.key != prepared.foundation.model.key
    assert prepared.foundation.originals is None
    assert prepared.foundation_for([ORIGINALS]).originals is prepared.originals


def test_the_foundation_has_no_place_for_the_poison_mask() -> None:
    fields = {field.name for field in dataclasses.fields(Foundation)}
    assert fields == {
        "rows",
        "clean",
        "model",
        "tuned",
        "victim",
        "where",
        "train",
        "tuning",
        "seed",
        "train_rows",
        "clean_rows",
        "originals",
    }
    # Of pairs it says which text gets a trigger if a row has one; which rows have one it does not.
    assert {field.name for field in dataclasses.fields(Rows)} == {
        "texts",
        "labels",
        "columns",
        "partners",
        "partner_first",
    }


def test_the_foundation_does_not_say_where_the_data_are(lab: Lab) -> None:
    # There, a defense would find the rows as they were before the poison.
    base = lab.prepare().foundation
    assert set(base.where) == {"victim"}
    for start in (base.rows, base.model, base.tuned):
        assert set(start.where) == {"victim"}


def test_paraphrase_columns_do_not_reach_a_defense(lab: Lab, tiny_corpus: Corpus) -> None:
    # A column equal to the text would reveal the poisoned rows of style and syntactic.
    assert tiny_corpus.train.columns.keys() == {"syntactic", "style"}
    prepared = lab.prepare(
        poison=PoisonSpec("style", poison_rate=0.2), attack_params={"column": None}
    )
    lab.compute(prepared.foundation.rows)
    rows = texts_of(Outcome(lab.root, prepared, [prepared.foundation.rows]).run())
    # 0.2 * 240 = 48 texts are their own paraphrase now.
    style = tiny_corpus.train.columns["style"]
    assert sum(a == b for a, b in zip(rows.texts, style, strict=True)) >= 48
    assert rows.columns == {}
    read = files_in(lab.root / prepared.foundation.rows.key)
    assert {Path(path).name for path in read} == {
        "train.parquet",
        "train.safetensors",
        "record.json",
    }
    folder = lab.root / prepared.foundation.rows.key
    assert read_rows(folder / "train.parquet") == rows


def test_clean_tuning_is_the_same_for_whoever_calls(
    lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    base = prepared.foundation
    lab.compute(base.tuned)
    outcome = Outcome(lab.root, prepared, [base.tuned])
    models = []
    for number in range(2):
        run = outcome.run({**base.tuning_config(), "seed": base.seed})
        models.append(model_of(run, "model"))
        torch.manual_seed(number)
        tune(run, models[-1], f"clean tuning ({number})")
        assert [epoch.stage for epoch in run.history] == [f"clean tuning ({number})"]
        assert {epoch.rows for epoch in run.history} == {60}
    assert same_weights(*models)
    assert not same_weights(models[0], outcome.poisoned_model)
    # The control is tuned by the same call.
    assert same_weights(models[0], outcome.model)
    assert fits[-1].settings == TuningSettings().applied_to(base.train)
    assert same_rows(fits[-1].data, clean_rows_of(outcome.run()))
