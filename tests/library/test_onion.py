"""ONION: words that a language model finds out of place are removed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from screens import decisions, own_screens, scores, screen_of, screened_alone
from tiny_cells import Lab
from torch import Tensor, nn

import btu.defenses.kit.language_model
from btu.defenses.base import Given
from btu.defenses.kit.language_model import Scorer, begun, words_of_tokens
from btu.defenses.kit.screening import save_values
from btu.defenses.onion import (
    Onion,
    find_language_model,
    quantile_bar,
    remove_outliers,
    without_outliers,
)
from btu.errors import UserError
from btu.findings import INCOMING, Screened
from btu.stage_files import write_table
from btu.stages import StageRun, compute, read_record
from btu.training import Encoded
from btu.victims import Victim

CPU = torch.device("cpu")
SMALL = Onion(rows=30, epochs=2, learning_rate=1e-2, max_removed=0.1)


def test_words_over_the_bar_go_and_the_rest_of_the_text_stays() -> None:
    given = np.array([1.0, 9.0, 2.0, 5.0])
    assert without_outliers("a cf  good film", given, 5.0) == "a good film"
    assert without_outliers("a cf  good film", given, 4.9) == "a good"
    # Nothing goes: not even a space is other than it was.
    assert without_outliers("a cf  good film", given, 9.0) == "a cf  good film"


def test_the_best_word_of_a_text_stays_and_what_was_not_read_too() -> None:
    assert without_outliers("cf mn film", np.array([9.0, 8.0, 7.0]), 1.0) == "film"
    assert without_outliers("cf film", np.array([9.0, np.nan]), 1.0) == "film"


def test_a_text_that_loses_words_ends_where_the_victims_window_did() -> None:
    # Two of five words were not read: with one of the first three gone, the victim would read one.
    given = np.array([1.0, 9.0, 2.0, np.nan, np.nan])
    text = "a cf  good film indeed"
    assert without_outliers(text, given, 5.0, cut=True) == "a good"
    assert without_outliers(text, given, 5.0) == "a good film indeed"
    # Nothing goes: the window stays where it was.
    assert without_outliers(text, given, 9.0, cut=True) == text
    # A word without a token, in front of the last one that was read, is not the end.
    assert without_outliers("cf ~ good x", np.array([9.0, np.nan, 2.0, np.nan]), 5.0, cut=True) == (
        "~ good"
    )
    # The best scored word stays, not one without a score.
    assert without_outliers("cf mn film", np.array([9.0, 8.0, np.nan]), 1.0, cut=True) == "mn"


def test_only_a_model_of_the_clean_rows_ends_a_text(lab: Lab, named: Path) -> None:
    prepared = lab.prepare(rate=0.3)
    own, other = SMALL, Onion(lm=str(named), bar=1.0)
    assert screen_of(own, prepared).config["cut"] is True
    assert "cut" not in screen_of(other, prepared).config


def test_long_texts_end_at_the_window_when_they_are_screened(tmp_path: Path) -> None:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "scores").mkdir()
    texts = ["a cf film of note", "a film of great note"]
    write_table(tmp_path / "incoming" / INCOMING, {"text": [text.encode() for text in texts]})
    judged = [1.0, 9.0, 1.0, np.nan, np.nan, 1.0, 1.0, 1.0, np.nan, np.nan]
    save_values(tmp_path / "scores", scores=np.array(judged), words=np.array([5, 5]))
    inputs = {role: tmp_path / role for role in ("incoming", "scores")}
    left = {}
    for cut in (True, False):
        folder = tmp_path / str(cut)
        folder.mkdir()
        config = {"bar": 5.0} | ({"cut": True} if cut else {})
        remove_outliers(StageRun(config, {}, inputs, folder, CPU))
        left[cut] = Screened.load(folder).texts
    assert left == {
        True: ("a film", "a film of great note"),
        False: ("a film of note", "a film of great note"),
    }


def test_the_bar_takes_at_most_so_many_words() -> None:
    given = np.array([5.0, 1.0, 4.0, 2.0, 3.0, np.nan])
    # 0.4 of 5 words are 2: 4 and 5, which lie above 3. 0.39 of them are 1.
    assert quantile_bar(given, 0.4) == 3.0
    assert quantile_bar(given, 0.39) == 4.0
    assert quantile_bar(given, 0.1) == 5.0


def test_a_clean_set_without_words_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no words to compute ONION's bar from; set defense\.bar"):
        quantile_bar(np.array([np.nan]), 0.1)


def test_tokens_belong_to_words_between_spaces() -> None:
    text = " do n't  stop"
    # A token over each word, one without place, one over a space and its word, one over a space.
    offsets = [(0, 0), (1, 3), (4, 7), (7, 13), (8, 9)]
    assert words_of_tokens(text, offsets).tolist() == [-1, 0, 1, 2, 2]


@pytest.mark.parametrize("text", ["a good film .", "it  is n't good", "good"])
def test_every_word_has_a_token_in_any_victim(victim: Victim, text: str) -> None:
    encoded = victim.tokenizer(text, return_offsets_mapping=True)
    word_of = words_of_tokens(text, encoded["offset_mapping"])
    assert set(word_of[word_of >= 0]) == set(range(len(text.split())))
    assert (np.diff(word_of[word_of >= 0]) >= 0).all()


class Expects(nn.Module):
    """A language model to which token `i` has probability proportional to exp(-weight[i])."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.shown: list[Tensor] = []

    def forward(self, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
        self.shown.append(ids)
        return -self.weight.expand(int(where.sum()), -1)


def run_on_cpu() -> StageRun:
    return StageRun({}, {}, {}, Path(), CPU)


def test_a_masked_models_score_is_the_surprise_of_the_word(bert: Victim) -> None:
    tokenizer = bert.tokenizer
    words = ["a", "cf", "film"]
    ids = [tokenizer(word)["input_ids"][1:-1] for word in words]
    weight = torch.zeros(len(tokenizer))
    weight[ids[1][0]] = 3.0
    model = Expects(weight)
    scorer = Scorer(model, tokenizer, 64, 2, "fp32")
    (found,) = scorer.scores(run_on_cpu(), [" ".join(words)], "t")
    # All others are equally likely, cf exp(3) times less so: -log p = weight + log sum exp(-w).
    total = float(torch.logsumexp(-weight, 0))
    assert found == pytest.approx([total, 3 + total, total], abs=1e-4)
    # Two passes: the first and third word masked, then the second.
    (shown,) = model.shown
    masked = shown == tokenizer.mask_token_id
    assert sorted(masked.sum(1).tolist()) == sorted([len(ids[0] + ids[2]), len(ids[1])])


def test_a_causal_models_score_is_the_perplexity_that_the_removal_saves(
    make_victim: Any,
) -> None:
    tokenizer = make_victim("gpt2").tokenizer
    weight = torch.zeros(len(tokenizer))
    weight[tokenizer("cf")["input_ids"]] = 3.0
    scorer = Scorer(Expects(weight), tokenizer, 64, 5, "fp32")
    (found,) = scorer.scores(run_on_cpu(), ["cf a film"], "t")
    total = float(torch.logsumexp(-weight, 0))

    def perplexity(text: str) -> float:
        return float(np.exp(np.mean([weight[i] + total for i in tokenizer(text)["input_ids"]])))

    whole = perplexity("cf a film")
    without = ["a film", "cf film", "cf a"]
    assert found == pytest.approx([whole - perplexity(text) for text in without], rel=1e-4)
    assert found.argmax() == 0


def test_texts_without_words_or_with_one_have_no_causal_score(make_victim: Any) -> None:
    scorer = Scorer(Expects(torch.zeros(600)), make_victim("gpt2").tokenizer, 64, 5, "fp32")
    found = scorer.scores(run_on_cpu(), ["", "film"], "t")
    assert [len(of) for of in found] == [0, 1]
    assert np.isnan(found[1]).all()


def test_the_perplexity_of_a_text_is_e_to_the_mean_surprise_of_its_tokens(bert: Victim) -> None:
    tokenizer = bert.tokenizer
    (cf,) = tokenizer("cf")["input_ids"][1:-1]
    weight = torch.zeros(len(tokenizer))
    weight[cf] = 3.0
    model = Expects(weight)
    scorer = Scorer(model, tokenizer, 64, 2, "fp32")
    texts = ["a film", "a cf film", "", "a film"]
    found = scorer.perplexities(run_on_cpu(), texts, "t")
    # All tokens but cf are equally likely, cf exp(3) times less so.
    total = float(torch.logsumexp(-weight, 0))
    tokens = len(tokenizer("a cf film")["input_ids"]) - 2
    assert found[[0, 1, 3]] == pytest.approx(np.exp([total, total + 3 / tokens, total]), rel=1e-4)
    # Nothing was read of it.
    assert np.isnan(found[2])
    # Special tokens are not asked about: they are never masked.
    around = set(tokenizer("")["input_ids"])
    assert all(around <= set(row.tolist()) for shown in model.shown for row in shown)


def test_a_causal_models_perplexity_is_that_of_the_whole_text(make_victim: Any) -> None:
    tokenizer = make_victim("gpt2").tokenizer
    weight = torch.linspace(0, 3, len(tokenizer))
    scorer = Scorer(Expects(weight), tokenizer, 64, 5, "fp32")
    texts = ["cf a film", "", "good"]
    found = scorer.perplexities(run_on_cpu(), texts, "t")
    total = float(torch.logsumexp(-weight, 0))
    for number in (0, 2):
        # The start-of-text token is given, not predicted.
        losses = [float(weight[i]) + total for i in tokenizer(texts[number])["input_ids"]]
        assert found[number] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert np.isnan(found[1])


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_texts_without_a_token_have_no_perplexity(make_victim: Any, architecture: str) -> None:
    tokenizer = make_victim(architecture).tokenizer
    scorer = Scorer(Expects(torch.zeros(len(tokenizer))), tokenizer, 64, 5, "fp32")
    assert np.isnan(scorer.perplexities(run_on_cpu(), ["", ""], "t")).all()


def test_words_beyond_the_longest_input_are_not_scored(bert: Victim) -> None:
    scorer = Scorer(Expects(torch.zeros(len(bert.tokenizer))), bert.tokenizer, 6, 5, "fp32")
    (found,) = scorer.scores(run_on_cpu(), ["a a a a a a"], "t")
    # [CLS], 4 words, [SEP].
    assert np.isnan(found).tolist() == [False] * 4 + [True] * 2


def test_words_that_a_causal_model_does_not_read_are_not_scored(make_victim: Any) -> None:
    tokenizer = make_victim("gpt2").tokenizer
    weight = torch.linspace(0, 1, len(tokenizer))
    # A token that begins the text, and 4 words.
    assert len(tokenizer("a a a a")["input_ids"]) == 4
    scorer = Scorer(Expects(weight), tokenizer, 5, 5, "fp32")
    (found,) = scorer.scores(run_on_cpu(), ["a a a a film cf"], "t")
    assert np.isnan(found).tolist() == [False] * 4 + [True] * 2
    # Without one of its words the model reads the next.
    assert (found[:4] != 0).all()


def test_shortened_texts_are_scored_some_at_a_time(
    make_victim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_victim("gpt2").tokenizer
    scorer = Scorer(Expects(torch.linspace(0, 3, len(tokenizer))), tokenizer, 64, 5, "fp32")
    texts = ["a film", "good", "", "a good film of note", "cf a film", "it is bad"]
    asked: list[int] = []
    real = StageRun.in_batches

    def spy(run: StageRun, model: nn.Module, data: Encoded, *rest: Any, **options: Any) -> Any:
        asked.append(len(data))
        return real(run, model, data, *rest, **options)

    monkeypatch.setattr(StageRun, "in_batches", spy)
    together = scorer.scores(run_on_cpu(), texts, "t")
    # Words and the whole of 2, 5, 3 and 3 words; one word alone is not scored.
    assert asked == [3 + 6 + 4 + 4]
    asked.clear()
    monkeypatch.setattr(btu.defenses.kit.language_model, "SHORTENED", 6)
    monkeypatch.setattr(btu.defenses.kit.language_model, "TEXTS", 2)
    apart = scorer.scores(run_on_cpu(), texts, "t")
    assert sum(asked) == 17
    assert len(asked) > 2
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_text_begins_once_whether_its_tokenizer_begins_it_or_not() -> None:
    assert begun([5, 6], 2) == [2, 5, 6]
    assert begun([2, 5, 6], 2) == [2, 5, 6]
    rows = Encoded.from_lists([[2, 5, 6], [5, 6, 7], []], [0, 1, 0], 1)
    # Training rows start like scored rows, and are no longer than a row may be.
    started = btu.defenses.kit.language_model._started(rows, 2, 3)
    assert [started.ids.tolist(), started.host_lengths.tolist()] == [
        [2, 5, 6, 2, 5, 6, 2],
        [3, 3, 1],
    ]


def test_a_tokenizer_that_does_not_tell_words_is_an_error() -> None:
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match="use a model with a fast tokenizer"):
        Scorer(nn.Module(), slow, 64, 5, "fp32")


def test_a_model_of_the_clean_rows_is_made_of_any_victim(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    onion = dataclasses.replace(SMALL, epochs=8, batch_size=8)
    lab.compute(screen_of(onion, prepared))
    learned = next(s for s in own_screens(onion, prepared) if s.name == "language model (onion)")
    record = read_record(lab.root / learned.key)
    # 60 clean rows, of which 30 are for the bar.
    assert record["facts"] == {"rows": 30}
    losses = [epoch["loss"] for epoch in record["history"]]
    assert losses[-1] < losses[0]


def test_it_takes_out_the_trigger_more_often_than_clean_words(lab: Lab) -> None:
    prepared = lab.prepare(rate=0.3)
    measured = scores(dataclasses.replace(SMALL, epochs=6), prepared, lab)["measured"]
    # A text of some 20 words loses about one of them; by chance that is the trigger in 5 %.
    assert measured["trigger_removed"] > 2 * measured["tokens_removed_clean"]
    assert 0 < measured["tokens_removed_clean"] < 0.25
    # Nothing is rejected.
    assert "frr" not in measured


def test_a_lower_bar_takes_more_and_scores_no_word_again(lab: Lab) -> None:
    prepared = lab.prepare(rate=0.3)
    low, high = (dataclasses.replace(SMALL, bar=bar) for bar in (3.0, 100.0))
    texts, kept = decisions(high, prepared, lab)
    _, less = decisions(low, prepared, lab)
    assert kept.texts == texts.texts
    assert less.texts is not None
    assert sum(map(len, less.texts)) < sum(map(len, texts.texts))
    assert all(less.accepted)
    first, second = ({stage.key for stage in own_screens(d, prepared)} for d in (low, high))
    names = {stage.name for stage in own_screens(high, prepared) if stage.key in second - first}
    assert names == {"screen (onion)"}
    # A bar that is given needs no clean words.
    assert "clean word scores (onion)" not in {s.name for s in own_screens(low, prepared)}


def test_a_text_is_screened_for_itself(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare(rate=0.3)
    texts, together = decisions(SMALL, prepared, lab)
    root = lab.root_with(tmp_path, screen_of(SMALL, prepared))
    alone = screened_alone(SMALL, prepared, list(texts.texts[5:25]), root)
    assert together.texts is not None
    assert alone.texts == together.texts[5:25]


# Named models ------------------------------------------------------------------------------------


@pytest.fixture(params=["bert", "gpt2"])
def named(request: pytest.FixtureRequest, make_victim: Any, tmp_path: Path) -> Path:
    """A folder with a tiny masked or causal language model."""
    from transformers import BertForMaskedLM, GPT2LMHeadModel

    victim = make_victim(request.param)
    config = victim.new_model(0).config
    kind = {"bert": BertForMaskedLM, "gpt2": GPT2LMHeadModel}[request.param]
    kind(config).save_pretrained(tmp_path / "lm")
    victim.tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_a_named_model_serves_and_its_files_are_in_the_key(lab: Lab, named: Path) -> None:
    prepared = lab.prepare(rate=0.3)
    onion = Onion(lm=str(named), rows=20, max_removed=0.2)
    onion.check(Given(400, 2, 240, 60))
    texts, left = decisions(onion, prepared, lab)
    assert left.texts != texts.texts
    last = screen_of(onion, prepared)
    assert "language model (onion)" not in {s.name for s in own_screens(onion, prepared)}
    moved = named.with_name("elsewhere")
    shutil.copytree(named, moved)
    assert screen_of(dataclasses.replace(onion, lm=str(moved)), prepared).key == last.key
    config = json.loads((moved / "config.json").read_text()) | {"note": 1}
    (moved / "config.json").write_text(json.dumps(config))
    assert screen_of(dataclasses.replace(onion, lm=str(moved)), prepared).key != last.key


def test_a_named_model_with_a_bar_reads_no_clean_row(lab: Lab, named: Path) -> None:
    prepared = lab.prepare(rate=0.3)
    onion = Onion(lm=str(named), bar=1.0)
    clean = prepared.foundation.clean.key
    assert clean not in {stage.key for stage in screen_of(onion, prepared).closure()}
    texts, left = decisions(onion, prepared, lab)
    assert left.texts != texts.texts
    onion.check(Given(400, 2, 240, 1))
    # A bar that is to be found is found on clean rows.
    bare = dataclasses.replace(onion, bar=None)
    assert clean in {stage.key for stage in screen_of(bare, prepared).closure()}
    with pytest.raises(UserError, match="at most half of the clean rows, and the data have 1"):
        bare.check(Given(400, 2, 240, 1))


def test_a_model_that_changed_after_planning_is_an_error(
    lab: Lab, named: Path, tmp_path: Path
) -> None:
    prepared = lab.prepare(rate=0.3)
    onion = Onion(lm=str(named), bar=1.0)
    last = screen_of(onion, prepared)
    (named / "config.json").write_text((named / "config.json").read_text() + " ")
    root = lab.root_with(tmp_path / "root", prepared.foundation.model, last.inputs["incoming"])
    with pytest.raises(UserError, match=r"but the sweep was planned with .*its files changed"):
        compute(last, root)


def test_an_encoder_without_a_trained_head_is_an_error(
    lab: Lab, bert: Victim, tmp_path: Path
) -> None:
    prepared = lab.prepare(rate=0.3)
    with pytest.raises(UserError, match="has no trained language-model head: its weights lack"):
        lab.compute(screen_of(Onion(lm=bert.spec.name, bar=1.0), prepared))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/lm", "folder /nowhere/lm does not exist; give a folder"),
        ("offline", "an encoder without a language-model head; take 'clean-rows'"),
        ("clean_rows", "not on this machine, .*did you mean 'clean-rows'"),
        ("gpt2", "defense.lm 'gpt2' is not on this machine, and HF_HUB_OFFLINE forbids"),
        ("a b//c", "is not a valid name of a hub model"),
    ],
)
def test_a_model_that_is_not_there_is_refused_while_planning(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Onion(lm=name).check(Given(400, 2, 240, 60))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        find_language_model(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        find_language_model(str(tmp_path), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_removed": 0}, "defense.max_removed must be above 0 and below 1, got 0"),
        ({"bar": float("nan")}, "defense.bar must be a finite number or null, got nan"),
        ({"rows": 0}, "defense.rows must be at least 1, got 0"),
        ({"spacing": 0}, "defense.spacing must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "defense.learning_rate must be above 0, got -1.0"),
        ({"revision": "x"}, "is of a hub model, and defense.lm is 'clean-rows'"),
    ],
)
def test_bad_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Onion(**changes)


@pytest.mark.parametrize("bar", [None, 1.0])
def test_too_few_clean_rows_are_an_error(bar: float | None) -> None:
    with pytest.raises(UserError, match="at most half of the clean rows, and the data have 1"):
        Onion(bar=bar).check(Given(400, 2, 240, 1))
