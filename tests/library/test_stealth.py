"""What a poisoned set looks like: the measures, their stage, and who may read it."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cells import MAX_LENGTH, Lab

from btu import stealth
from btu.attacked import mask_of
from btu.attacks.poisoning import PoisonSpec
from btu.defenses.base import Given
from btu.defenses.onion import Onion
from btu.errors import UserError
from btu.metrics import METRICS
from btu.recipe import Prepared, evaluation
from btu.stage_files import read_rows
from btu.stages import StageRun, read_record
from btu.stealth import (
    check_stealth,
    find_encoder,
    mean,
    median,
    stealth_stage,
    word_distance,
)
from btu.types import Corpus, Rows
from btu.victims import OFFLINE_PACKAGE, Victim, VictimSource, VictimSpec, find_victim

CPU = torch.device("cpu")
GIVEN = Given(vocabulary=400, classes=2, train_rows=240, clean_rows=60)
NAMES = {"perplexity_rise", "edit_distance", "embedding_similarity", "label_flips"}


@pytest.fixture(autouse=True)
def tiny_encoder(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny BERT in place of the packaged MiniLM, which need not be installed."""
    spec = VictimSpec(lab.prepare().inputs.victim.name, MAX_LENGTH)
    monkeypatch.setattr(stealth, "ENCODER", spec)
    monkeypatch.setattr(stealth, "find_encoder", lambda: find_victim(spec))


# The measures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "distance"),
    [
        ("a good film", "a good film", 0),
        ("a good  film", " a good film\n", 0),  # words alone count
        ("a good film", "a cf good film", 1 / 4),  # 1 of the 4 words of the longer is inserted
        ("a cf good film", "a good film", 1 / 4),
        ("a good film", "a bad film", 1 / 3),  # replaced
        ("a good film", "film good a", 2 / 3),  # two words change places: both are replaced
        ("one two three", "four five", 1),  # two replaced and one deleted, of three
        ("", "cf", 1),
        ("cf", "", 1),
        ("", " ", 0),
        ("a a a", "a", 2 / 3),
    ],
)
def test_the_distance_is_the_share_of_words_edited(
    before: str, after: str, distance: float
) -> None:
    assert word_distance(before, after) == pytest.approx(distance)
    assert word_distance(after, before) == pytest.approx(distance)


def test_the_distance_is_levenshteins() -> None:
    def plain(a: list[str], b: list[str]) -> int:
        # The recurrence as it is defined, without numpy.
        rows = [list(range(len(b) + 1))]
        for i, word in enumerate(a):
            row = [i + 1]
            for j, other in enumerate(b):
                row.append(min(rows[-1][j] + (word != other), row[j] + 1, rows[-1][j + 1] + 1))
            rows.append(row)
        return rows[-1][-1]

    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = (list(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(2))
        expected = plain(one, other) / max(len(one), len(other))
        assert word_distance(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_what_has_no_values_is_undefined_and_not_0() -> None:
    assert math.isnan(mean([]))
    assert math.isnan(median([]))
    assert math.isnan(median([math.nan]))
    # A text that the language model does not read has no say.
    assert median([1.0, math.nan, 3.0]) == 2.0
    assert mean([True, False]) == 0.5


def test_an_embedding_is_the_mean_over_the_tokens_of_a_text(bert: Victim) -> None:
    run = StageRun(
        {"encoder": stealth.find_encoder().identity, "precision": "fp32"}, {}, {}, Path(), CPU
    )
    before = ["a good film", "it is a long and tedious film about nothing much", "a good film"]
    after = ["a cf good film", "bad", "a good film"]
    found = stealth._similarities(run, before, after)
    model = bert.new_model(0).base_model

    def alone(text: str) -> torch.Tensor:
        # Without padding, so that no mask is needed.
        ids = torch.tensor([bert.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden: torch.Tensor = model(input_ids=ids).last_hidden_state[0]
        return hidden.mean(0)

    pairs = [(alone(a), alone(b)) for a, b in zip(before, after, strict=True)]
    expected = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    assert list(found) == pytest.approx(expected, abs=1e-5)
    assert found[2] == pytest.approx(1, abs=1e-12)  # equal texts
    assert found[1] < 1 - 1e-3


# The stage -------------------------------------------------------------------------------------


def measured(lab: Lab, prepared: Prepared) -> dict[str, float]:
    stage = stealth_stage(prepared)
    (folder,) = lab.compute(stage)
    facts: dict[str, float] = read_record(folder)["facts"]
    assert facts.keys() == NAMES <= METRICS.keys()
    return facts


def poisoned_by(lab: Lab, name: str = "badnets", **spec: Any) -> Prepared:
    params = {"trigger": ["cf"]} if name == "badnets" else {}
    return lab.prepare(
        poison=PoisonSpec(name, **{"poison_rate": 0.2, **spec}), attack_params=params
    )


def test_an_inserted_word_is_one_of_the_words(lab: Lab, tiny_corpus: Corpus) -> None:
    prepared = poisoned_by(lab)
    facts = measured(lab, prepared)
    mask = mask_of(lab.root / prepared.poisoned.key)
    counts = [len(tiny_corpus.train.texts[i].split()) for i in np.flatnonzero(mask)]
    # One word is inserted into n.
    assert facts["edit_distance"] == pytest.approx(np.mean([1 / (n + 1) for n in counts]))
    assert 0 < facts["embedding_similarity"] < 1
    assert math.isfinite(facts["perplexity_rise"])
    # Rows of the other class alone, all relabelled.
    assert facts["label_flips"] == 1


@pytest.mark.parametrize("mode", ["clean", "mixed"])
def test_the_flips_are_the_relabeled_among_the_poisoned(lab: Lab, mode: str) -> None:
    prepared = poisoned_by(lab, label_mode=mode)
    flips = measured(lab, prepared)["label_flips"]
    poison = read_record(lab.root / prepared.poisoned.key)["facts"]
    # 0.2 of 240 rows; of the mixed ones those that were of the other class.
    assert poison["poisoned_rows"] == 48
    assert flips == pytest.approx(poison["relabeled_rows"] / 48)
    assert (flips == 0) == (mode == "clean")


@pytest.mark.parametrize("insert", ["replace", "append"])
def test_cover_rows_are_no_poisoned_rows(lab: Lab, insert: str) -> None:
    prepared = poisoned_by(lab, poison_rate=0.1, cover_rate=0.1, insert=insert)
    assert measured(lab, prepared)["label_flips"] == 1
    poison = read_record(lab.root / prepared.poisoned.key)["facts"]
    assert poison["poisoned_rows"] == poison["cover_rows"] > 0


def test_a_paraphrase_is_compared_with_its_original(lab: Lab, tiny_corpus: Corpus) -> None:
    prepared = poisoned_by(lab, "style")
    facts = measured(lab, prepared)
    rows = np.flatnonzero(mask_of(lab.root / prepared.poisoned.key))
    train = tiny_corpus.train
    expected = [word_distance(train.texts[i], train.columns["style"][i]) for i in rows]
    assert facts["edit_distance"] == pytest.approx(np.mean(expected))
    assert facts["label_flips"] == 1


def test_texts_that_stay_what_they_are_show_nothing_but_their_labels(
    lab: Lab, tiny_corpus: Corpus
) -> None:
    train = tiny_corpus.train
    same = dataclasses.replace(
        tiny_corpus, train=Rows(train.texts, train.labels, {"style": train.texts})
    )
    prepared = lab.prepare(
        corpus=same, poison=PoisonSpec("style", poison_rate=0.2), attack_params={}
    )
    facts = measured(lab, prepared)
    assert facts["embedding_similarity"] == pytest.approx(1, abs=1e-12)
    assert (facts["edit_distance"], facts["perplexity_rise"]) == (0, 0)
    assert facts["label_flips"] == 1


def test_appended_copies_are_compared_with_the_rows_that_they_are_copies_of(lab: Lab) -> None:
    # 48 of 240 rows in place; 48 copies are a sixth of 288. Rows are a prefix of one permutation
    # and triggers are drawn by row: the pairs are the same.
    inside, behind = (
        poisoned_by(lab, insert="replace", poison_rate=0.2),
        poisoned_by(lab, insert="append", poison_rate=1 / 6),
    )
    assert measured(lab, behind) == pytest.approx(measured(lab, inside), rel=1e-5)
    assert len(read_rows(lab.root / behind.poisoned.key / "train.parquet")) == 288


def test_progress_is_reported_under_one_name_and_only_rises(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btu.stages import run_stage

    monkeypatch.setattr("btu.training.REPORT_SECONDS", 0.0)
    stage = stealth_stage(poisoned_by(lab))
    lab.compute(*stage.inputs.values())
    inputs = {role: lab.root / before.key for role, before in stage.inputs.items()}
    heard = []
    run_stage(stage.node(), inputs, tmp_path, progress=heard.append)
    assert {progress.stage for progress in heard} == {"stealth"}
    shares = [(p.step + p.part) / p.steps for p in heard]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1


# Who shares it, and who may not read it ----------------------------------------------------------


def test_it_depends_on_the_poisoned_set_and_the_models_alone(lab: Lab) -> None:
    prepared = poisoned_by(lab)
    key = stealth_stage(prepared).key
    # The rows that are scored on, and how the victim is trained, have no say.
    inputs = prepared.inputs
    other_eval = {**inputs.data_fingerprints, "eval": "0" * 64}
    longer = dataclasses.replace(inputs.train, epochs=7)
    for change in ({"data_fingerprints": other_eval}, {"train": longer}):
        assert stealth_stage(lab.prepare(**{"poison": inputs.poison, **change})).key == key
    for change in ({"seed": 1}, {"poison": PoisonSpec(poison_rate=0.3)}):
        assert stealth_stage(lab.prepare(**{"poison": inputs.poison, **change})).key != key


def test_the_encoder_is_part_of_the_key(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = poisoned_by(lab)
    key = stealth_stage(prepared).key
    monkeypatch.setattr(stealth, "find_encoder", lambda: VictimSource("here", "m" * 64))
    assert stealth_stage(prepared).key != key


def test_an_encoder_that_changed_after_planning_is_refused(
    lab: Lab,
) -> None:
    run = StageRun({"encoder": "0" * 64, "precision": "fp32"}, {}, {}, Path(), CPU)
    with pytest.raises(UserError, match=r"the packaged MiniLM is .* was planned with 00000"):
        stealth._similarities(run, ["a"], ["b"])


def test_the_language_model_is_onions_own(lab: Lab) -> None:
    prepared = poisoned_by(lab)
    model = stealth_stage(prepared).inputs["language model"]
    assert model.key == Onion().learned(prepared.foundation).key
    # Another name, so that a cell may have an ONION with other settings.
    assert model.name == "language model (stealth)"
    assert Onion(epochs=1).learned(prepared.foundation).key != model.key


def test_no_defense_may_read_it_and_the_language_model_is_no_secret(lab: Lab) -> None:
    prepared = poisoned_by(lab)
    stage = stealth_stage(prepared)
    told = dataclasses.replace(prepared, measured=stage)
    assert told.hidden - prepared.hidden == {stage.key}
    assert stage.key in told.forbidden
    assert stage.inputs["language model"].key not in told.forbidden
    # What a cell without it has keeps its key.
    assert evaluation(told, told.foundation.model, "m").key == (
        evaluation(prepared, prepared.foundation.model, "m").key
    )


# What is refused ---------------------------------------------------------------------------------


def test_without_the_packaged_model_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    # `find_encoder` as imported above, before the tiny one took its place.
    monkeypatch.setattr(stealth, "find_encoder", find_encoder)
    with pytest.raises(
        UserError, match=r"packaged MiniLM, which is not installed; .* '\.\[offline\]', or leave"
    ):
        check_stealth(GIVEN, VictimSource("owner/model", "w" * 64))


@pytest.mark.parametrize("count", [0, 1])
def test_a_language_model_needs_clean_rows(count: int) -> None:
    few = dataclasses.replace(GIVEN, clean_rows=count)
    with pytest.raises(UserError, match=rf"the data have {count}; raise data.max_clean_rows"):
        check_stealth(few, VictimSource("owner/model", "w" * 64))


def test_a_victim_that_makes_no_language_model_is_refused(tmp_path: Path) -> None:
    # As ALBERT has it: narrow word embeddings, which no head can be tied to.
    (tmp_path / "config.json").write_text('{"embedding_size": 128, "hidden_size": 768}')
    victim = VictimSource(str(tmp_path), "w" * 64)
    with pytest.raises(UserError, match=r"of width 128 do not fit hidden states of 768"):
        check_stealth(GIVEN, victim)
    (tmp_path / "config.json").write_text('{"embedding_size": 768, "hidden_size": 768}')
    check_stealth(GIVEN, victim)


@pytest.mark.skipif(
    importlib.util.find_spec(OFFLINE_PACKAGE) is None, reason="needs the extra 'offline'"
)
def test_the_packaged_model_tells_a_paraphrase_from_another_subject(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stealth, "find_encoder", find_encoder)
    monkeypatch.setattr(stealth, "ENCODER", VictimSpec("offline", max_length=256))
    run = StageRun({"encoder": find_encoder().identity, "precision": "fp32"}, {}, {}, Path(), CPU)
    text = "a moving and well acted film"
    others = [text, "the movie is touching, and the actors are good", "my bicycle has a flat tyre"]
    same, near, far = stealth._similarities(run, [text] * 3, others)
    assert same == pytest.approx(1, abs=1e-12)
    assert same > near > far
