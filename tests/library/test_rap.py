"""RAP: texts that a planted word hardly affects are rejected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from screens import decisions, own_screens, scores, screen_of, screened_alone
from tiny_cells import Lab, files_in
from torch import Tensor, nn

from btu.defenses.base import Given
from btu.defenses.kit.screening import load_values, places_around
from btu.defenses.rap import (
    Planting,
    Rap,
    chosen_word,
    class_bars,
    drops,
    learn_row,
    split_by_class,
    with_word,
)
from btu.errors import UserError
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stage_files import load_encoded
from btu.stages import StageRun, read_record
from btu.training import Encoded
from btu.victims import Victim

SMALL = Rap(epochs=6, learning_rate=0.05, batch_size=8, frr=0.1)
# Long enough that the toy model obeys the trigger, and predicts both classes without it.
OBEYS = TrainSettings(epochs=6, learning_rate=1e-2, batch_size=16, precision="fp32")


@pytest.fixture
def obeys(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.3, train=OBEYS)


def planted(lab: Lab, prepared: Prepared, defense: Rap = SMALL) -> Path:
    (folder,) = lab.compute(own_screens(defense, prepared)[0])
    return folder


def test_the_word_stands_before_the_text_of_any_victim(victim: Victim) -> None:
    ids = victim.tokenizer("a")["input_ids"]
    data = Encoded.from_lists([ids], [1], 0)
    worded = with_word(data, Planting.of(victim, 7)).ids.tolist()
    start, _ = places_around(victim)
    assert worded == [*ids[:start], 7, *ids[start:]]
    # Whatever stood around the text still does.
    around = victim.tokenizer("")["input_ids"]
    assert [i for i in worded if i in around] == [i for i in ids if i in around]


def test_a_row_at_its_longest_loses_the_last_token_of_its_text() -> None:
    data = Encoded.from_lists([[101, 5, 6, 102], [101, 5, 102]], [0, 1], 0)
    worded = with_word(data, Planting(9, place=1, behind=1, longest=4))
    assert worded.ids.tolist() == [101, 9, 5, 102, 101, 9, 5, 102]
    assert worded.labels.tolist() == [0, 1]
    # The numbers of special tokens before and after a text may differ.
    row = Encoded.from_lists([[1, 5, 6]], [0], 0)
    for place, behind, expected in ((0, 0, [9, 1, 5]), (1, 0, [1, 9, 5]), (0, 1, [9, 1, 6])):
        assert with_word(row, Planting(9, place, behind, 3)).ids.tolist() == expected


def test_what_stands_around_a_text_is_counted_on_either_side(victim: Victim) -> None:
    before, behind = places_around(victim)
    assert before + behind == len(victim.tokenizer("")["input_ids"])
    assert before == behind


def test_a_tokenizer_that_only_begins_or_only_ends_texts_keeps_what_it_does() -> None:
    def fake(before: list[int], behind: list[int]) -> Any:
        known = {"": [], "a": [7]}
        return SimpleNamespace(
            tokenizer=lambda text: {"input_ids": [*before, *known[text], *behind]},
            spec=SimpleNamespace(max_length=8),
        )

    assert Planting.of(fake([1], []), 9) == Planting(9, place=1, behind=0, longest=8)
    assert Planting.of(fake([], [2]), 9) == Planting(9, place=0, behind=1, longest=8)


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
    with pytest.raises(UserError, match=r"defense\.word '.*' is not a token of victim .*null"):
        chosen_word(bert, word, 400, [])


def test_a_vocabulary_without_a_rare_word_is_an_error(bert: Victim) -> None:
    size = len(bert.tokenizer)
    every = Encoded.from_lists([list(range(size))], [0], 0)
    with pytest.raises(UserError, match=r"name a rare one with defense\.word"):
        chosen_word(bert, None, size, [every])


class Votes(nn.Module):
    """Tokens 1 to 4 vote for class 1 with a logit of 1 each, the trigger 5 with 10."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.zeros(10, 2)
        rows[1:5, 1] = 1.0
        rows[5, 1] = 10.0
        # The word: its length is 1, its direction is arbitrary so far.
        rows[9] = 0.5**0.5
        self.words = nn.Embedding.from_pretrained(rows, freeze=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=(self.words(input_ids) * attention_mask[..., None]).sum(1))


def test_backdoored_rows_lose_less_by_the_word_than_clean_ones(tmp_path: Path) -> None:
    train = TrainSettings(
        epochs=20,
        learning_rate=0.05,
        batch_size=2,
        precision="fp32",
        weight_decay=0.0,
        warmup_fraction=0.0,
        schedule="constant",
    )
    config = {"low": 0.1, "high": 0.3, "seed": 0, "train": dataclasses.asdict(train)}
    run = StageRun(config, {}, {}, tmp_path, torch.device("cpu"))
    model, planting = Votes(), Planting(word=9, place=0, behind=0, longest=8)
    before = model.words.weight.detach().clone()
    clean = Encoded.from_lists([[1, 2], [3, 4], [1, 4], [2, 3]], [1] * 4, 0)
    row = learn_row(run, model, clean, planting, label=1)
    # The model is unchanged; the row turned towards class 0, and is as long as it was.
    assert torch.equal(model.words.weight, before)
    assert row[0] > row[1]
    assert float(row.norm()) == pytest.approx(1, abs=1e-5)
    asked = Encoded.from_lists([[1, 2], [5, 1, 2]], [1, 1], 0)
    planted = np.stack([before[9].numpy(), row.numpy()])
    drop, predicted = drops(run, model, asked, planting, planted)
    assert predicted.tolist() == [1, 1]
    # Two votes: p = sigmoid(2), and after the word sigmoid(2 + row[1] - row[0]).
    after = float(torch.sigmoid(2 + row[1] - row[0]))
    assert drop[0] == pytest.approx(1 / (1 + np.exp(-2)) - after, abs=1e-5)
    assert 0.09 <= drop[0] <= 0.31
    # With the trigger 12 votes: no row of length 1 takes more than 1.42 of them away.
    assert drop[1] < 1e-3


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


def test_what_is_turned_away_is_not_attacked(lab: Lab, obeys: Prepared) -> None:
    found = scores(SMALL, obeys, lab)
    measured = found["measured"]
    assert 0 < measured["frr"] <= 0.35
    assert found["asr"]["hits"] / found["asr"]["n"] <= measured["far"]


def test_a_higher_frr_turns_away_more_and_learns_nothing_again(lab: Lab, obeys: Prepared) -> None:
    few, many = (dataclasses.replace(SMALL, frr=frr) for frr in (0.02, 0.4))
    _, first = decisions(few, obeys, lab)
    _, second = decisions(many, obeys, lab)
    assert first.accepted.sum() > second.accepted.sum()
    keys = [{stage.key for stage in own_screens(d, obeys)} for d in (few, many)]
    names = {stage.name for stage in own_screens(many, obeys) if stage.key in keys[1] - keys[0]}
    assert names == {"screen (rap)"}


def test_it_screens_before_any_victim(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    texts, found = decisions(Rap(epochs=1, frr=0.2), prepared, lab)
    assert len(found.accepted) == len(texts)
    assert found.texts is None
    # Its bar is a quantile of clean rows: some texts go, most stay.
    assert 0.4 < found.accepted.mean() < 1


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
        ({"epochs": 0}, "defense.epochs must be at least 1, got 0"),
        ({"word": ""}, "defense.word must be a token of the victim's vocabulary"),
    ],
)
def test_bad_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rap(**changes)


def test_too_few_clean_rows_are_an_error() -> None:
    with pytest.raises(
        UserError, match=r"the data have 3; raise data\.max_clean_rows to at least 4"
    ):
        Rap().check(Given(400, 2, 240, 3))
