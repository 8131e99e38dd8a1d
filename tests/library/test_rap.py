"""RAP: what a planted word does not unsettle is turned away."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import Lab, files_in
from screens import decisions, own_screens, scores, screen_of, screened_alone

from btu.defense import Given
from btu.defenses.rap import Rap, chosen_word, class_bars, split_by_class, with_word
from btu.errors import UserError
from btu.foundation import load_encoded
from btu.recipe import Prepared
from btu.screening import first_place, load_values
from btu.settings import TrainSettings
from btu.stages import read_record
from btu.training import Encoded
from btu.victims import Victim

SMALL = Rap(epochs=6, learning_rate=0.05, batch_size=8, frr=0.1)
OBEYS = TrainSettings(epochs=6, learning_rate=3e-3, batch_size=32, precision="fp32")


@pytest.fixture
def obeys(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.3, train=OBEYS)


def planted(lab: Lab, prepared: Prepared, defense: Rap = SMALL) -> Path:
    (folder,) = lab.compute(own_screens(defense, prepared)[0])
    return folder


def test_the_word_stands_before_the_text_of_any_victim(victim: Victim) -> None:
    ids = victim.tokenizer("a")["input_ids"]
    data = Encoded.from_lists([ids], [1], 0)
    worded = with_word(data, 7, first_place(victim), 64).ids.tolist()
    start = first_place(victim)
    assert worded == [*ids[:start], 7, *ids[start:]]
    # Whatever stood around the text still does.
    around = victim.tokenizer("")["input_ids"]
    assert [i for i in worded if i in around] == [i for i in ids if i in around]


def test_a_row_at_its_longest_loses_the_last_token_of_its_text() -> None:
    data = Encoded.from_lists([[101, 5, 6, 102], [101, 5, 102]], [0, 1], 0)
    worded = with_word(data, 9, 1, 4)
    assert worded.ids.tolist() == [101, 9, 5, 102, 101, 9, 5, 102]
    assert worded.labels.tolist() == [0, 1]
    # Without anything around the text it is the very last.
    assert with_word(Encoded.from_lists([[5, 6]], [0], 0), 9, 0, 2).ids.tolist() == [9, 5]


def test_each_class_has_a_bar_from_the_clean_rows_predicted_as_it() -> None:
    drop = np.array([0.1, 0.2, 0.3, 0.5, 0.7])
    predicted = np.array([0, 0, 0, 1, 1])
    # Medians of 0.1, 0.2, 0.3, of 0.5, 0.7, and of all where a class is never predicted.
    assert class_bars(drop, predicted, 3, 0.5) == pytest.approx([0.2, 0.6, 0.3])


def test_rows_of_every_class_are_held_out() -> None:
    learned, held = split_by_class(np.array([0, 0, 0, 0, 1, 1]), 2, 0.5, 0)
    assert [len(rows) for rows in learned] == [2, 1]
    assert len(held) == 3
    assert sorted(np.concatenate([*learned, held])) == [0, 1, 2, 3, 4, 5]


def test_a_class_with_one_clean_row_is_an_error() -> None:
    with pytest.raises(UserError, match="at least two clean rows of each class, and class 1 has 1"):
        split_by_class(np.array([0, 0, 1]), 2, 0.5, 0)


def test_the_planted_word_occurs_in_no_row(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    base = prepared.foundation
    lab.compute(base.rows, base.clean)
    held = [
        load_encoded(lab.root / base.rows.key / "train.safetensors"),
        load_encoded(lab.root / base.clean.key / "clean.safetensors"),
    ]
    vocabulary = len(victim.new_model(0).get_input_embeddings().weight)
    word = chosen_word(victim, None, vocabulary, held)
    assert not any(data.holds([word]).any() for data in held)
    assert word not in victim.tokenizer.all_special_ids
    assert word == chosen_word(victim, None, vocabulary, held)


def test_a_named_word_is_taken(bert: Victim) -> None:
    assert chosen_word(bert, "mn", 400, []) == bert.tokenizer.get_vocab()["mn"]


@pytest.mark.parametrize("word", ["[CLS]", "moviee"])
def test_a_word_that_cannot_be_planted_is_an_error(bert: Victim, word: str) -> None:
    with pytest.raises(UserError, match=r"defense\.word '.*' is no token of victim .*null"):
        chosen_word(bert, word, 400, [])


def test_a_vocabulary_without_a_rare_word_is_an_error(bert: Victim) -> None:
    size = len(bert.tokenizer)
    every = Encoded.from_lists([list(range(size))], [0], 0)
    with pytest.raises(UserError, match="name a rare one with defense.word"):
        chosen_word(bert, None, size, [every])


def test_clean_rows_lose_more_by_a_learned_word(lab: Lab, obeys: Prepared) -> None:
    learned = read_record(planted(lab, obeys))
    still = dataclasses.replace(SMALL, epochs=1, learning_rate=1e-9)
    before = read_record(planted(lab, obeys, still))
    pairs = list(zip(learned["facts"]["mean_drop"], before["facts"]["mean_drop"], strict=True))
    assert all(after > given for after, given in pairs)
    losses = [epoch["loss"] for epoch in learned["history"]]
    # A class after the other, 6 epochs each.
    assert losses[5] < losses[0]
    assert losses[11] < losses[6]


def test_only_the_words_row_is_learned_and_its_norm_is_kept(lab: Lab, obeys: Prepared) -> None:
    folder = planted(lab, obeys)
    word = read_record(folder)["facts"]["word"]
    model_folder = lab.root / obeys.foundation.model.key
    before = files_in(model_folder)
    decisions(SMALL, obeys, lab)
    assert files_in(model_folder) == before
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder / "model")
    row = model.get_input_embeddings().weight[word].detach()
    rows = torch.from_numpy(load_values(folder)["rows"])
    assert rows.norm(dim=1).tolist() == pytest.approx([float(row.norm())] * 2, rel=1e-4)
    assert not torch.allclose(rows[0], rows[1])


def test_it_turns_away_more_triggered_rows_than_clean_ones(lab: Lab, obeys: Prepared) -> None:
    found = scores(SMALL, obeys, lab)
    measured = found["measured"]
    assert measured["frr"] <= 0.35
    assert 1 - measured["far"] > measured["frr"]
    assert found["asr"]["hits"] / found["asr"]["n"] <= measured["far"]


def test_a_higher_frr_turns_away_more_and_learns_nothing_again(lab: Lab, obeys: Prepared) -> None:
    few, many = (dataclasses.replace(SMALL, frr=frr) for frr in (0.02, 0.4))
    _, first = decisions(few, obeys, lab)
    _, second = decisions(many, obeys, lab)
    assert first.accepted.sum() > second.accepted.sum()
    keys = [{stage.key for stage in own_screens(d, obeys)} for d in (few, many)]
    names = {stage.name for stage in own_screens(many, obeys) if stage.key in keys[1] - keys[0]}
    assert names == {"screen (rap)"}


def test_a_text_is_screened_for_itself(lab: Lab, obeys: Prepared, tmp_path: Path) -> None:
    texts, together = decisions(SMALL, obeys, lab)
    some = list(texts.texts[5:25])
    root = lab.root_with(tmp_path, screen_of(SMALL, obeys))
    alone = screened_alone(SMALL, obeys, some, root)
    assert alone.accepted.tolist() == together.accepted[5:25].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 0.4}, "defense.low 0.4 is above defense.high 0.3"),
        ({"high": 1}, "defense.high must be above 0 and below 1, got 1"),
        ({"frr": 0.0}, "defense.frr must be above 0 and below 1, got 0.0"),
        ({"learning_rate": 0.0}, "defense.learning_rate must be above 0, got 0.0"),
        ({"epochs": 0}, "defense.epochs must be a whole number of at least 1, got 0"),
        ({"word": ""}, "defense.word must be a token of the victim's vocabulary"),
    ],
)
def test_bad_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rap(**changes)


def test_too_few_clean_rows_are_an_error() -> None:
    with pytest.raises(UserError, match="the data have 3; raise data.max_clean_rows to at least 4"):
        Rap().check(Given(400, 2, 240, 3))
