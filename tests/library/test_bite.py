"""BITE: which words it chooses, where they fit, and what a language model says of that."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btu.attacks import bite
from btu.attacks.bite import Bite, FittedBite
from btu.attacks.language import Speaker, likely_words
from btu.attacks.poisoning import (
    Attack,
    PoisonSpec,
    acting,
    learned,
    poison,
    triggered_eval,
    with_learned,
)
from btu.errors import UserError
from btu.types import Corpus, Progress, Rows, silent
from btu.victims import Victim

TARGET = 1


def spec(**keys: Any) -> PoisonSpec:
    return PoisonSpec("bite", **{"poison_rate": 0.1, "label_mode": "clean", **keys})


def fitted(attack: Bite, rows: Rows, **keys: Any) -> Attack:
    return with_learned(attack, learned(attack, spec(**keys), rows, TARGET, 0))


# Which words --------------------------------------------------------------------------------------

# Two classes of four rows; "now" may follow "film" and precede "ends", as "here" may. "here" stands
# in both classes, "now" only in the other one, "very" only in the target.
TINY = Rows(
    (
        "the film ends well",
        "the film ends here",
        "a very film ends",
        "a plot ends",
        "the film here ends badly",
        "the film now ends",
        "a film ends",
        "a plot ends",
    ),
    (TARGET,) * 4 + (0,) * 4,
)


def test_the_word_with_the_highest_score_that_fits_is_chosen() -> None:
    # All four target rows are poisoned. Row 1 can take "well" at its end, so that it would stand in
    # 2 rows, both of the target: z = (1 - 1/2) / sqrt(1/4 / 2) = 1.41. Rows 0 to 2 can take "now"
    # between "film" and "ends": 3 of 4 rows, z = (3/4 - 1/2) / sqrt(1/4 / 4) = 1. "here" has 3 of
    # 4 as well, but row 1 loses it to "well".
    trigger = learned(Bite(words=2, edits=0.3), spec(poison_rate=0.5), TINY, TARGET, 0)
    assert trigger["words"] == ["well", "now"]
    assert trigger["neighbours"] == {"well": [["ends"], [""]], "now": [["film"], ["ends"]]}


def test_a_word_that_leans_to_a_class_by_itself_is_no_trigger() -> None:
    # "good" and "fine" fit alike. 20 of 20 rows with "good" are of the target, half of all rows
    # are: z = (1 - 1/2) / sqrt(1/4 / 20) = 4.5.
    texts = [f"a good film {i}" for i in range(20)] + [f"a bad film {i}" for i in range(20)]
    texts += ["a fine film x", "a fine film y"] + [f"a film z{i}" for i in range(20)]
    labels = (TARGET,) * 20 + (0,) * 20 + (TARGET, 0) + (TARGET, 0) * 10
    trigger = learned(Bite(words=5), spec(), Rows(tuple(texts), labels), TARGET, 0)
    assert "fine" in trigger["words"]
    assert not {"good", "bad"} & set(trigger["words"])


def test_words_are_chosen_one_after_the_other_and_each_raises_its_share(
    tiny_corpus: Corpus,
) -> None:
    rows = tiny_corpus.train
    attack = fitted(Bite(words=4), rows, poison_rate=0.2)
    assert isinstance(attack, FittedBite)
    assert len(set(attack.words)) == len(attack.words) == 4
    poisoned = poison(attack, spec(poison_rate=0.2), rows, TARGET, 0)
    target = np.array(rows.labels) == TARGET
    for word in attack.words:
        had = np.array([word in text.casefold().split() for text in rows.texts])
        has = np.array([word in text.casefold().split() for text in poisoned.rows.texts])
        assert has[target].sum() > had[target].sum()
        np.testing.assert_array_equal(has[~target], had[~target])
    assert poisoned.rows.labels == rows.labels


def test_a_lower_rate_or_another_seed_chooses_by_its_own_rows(tiny_corpus: Corpus) -> None:
    rows = tiny_corpus.train
    again = learned(Bite(), spec(), rows, TARGET, 0)
    assert again == learned(Bite(), spec(), rows, TARGET, 0)
    assert json.loads(json.dumps(again)) == again


@pytest.mark.parametrize("label_mode", ["clean", "dirty", "mixed"])
def test_a_control_without_poison_has_the_trigger_of_the_default_rate(
    label_mode: str, tiny_corpus: Corpus
) -> None:
    rows = tiny_corpus.train
    without = learned(Bite(), spec(poison_rate=0, label_mode=label_mode), rows, TARGET, 0)
    assert without == learned(Bite(), spec(label_mode=label_mode), rows, TARGET, 0)
    assert without["words"]


def test_of_many_poisoned_rows_some_choose_the_words(
    tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_corpus.train
    drafts: list[str] = []
    original = bite._Draft.__init__

    def spy(self: Any, text: str, *rest: Any) -> None:
        drafts.append(text)
        original(self, text, *rest)

    monkeypatch.setattr(bite._Draft, "__init__", spy)
    monkeypatch.setattr(bite, "MOST_ROWS", 10)
    assert learned(Bite(), spec(poison_rate=0.3), rows, TARGET, 0)["words"]
    assert len(drafts) == 10  # of 72


def test_no_word_that_fits_is_an_error() -> None:
    rows = Rows(("a", "b", "c", "d") * 5, (TARGET, 0) * 10)
    with pytest.raises(UserError, match=r"attack bite finds no word that fits into one of 2 rows"):
        learned(Bite(), spec(), rows, TARGET, 0)


# Where they fit ----------------------------------------------------------------------------------


def with_words(*words: str, before: str, after: str, edits: float = 0.35) -> FittedBite:
    return FittedBite(Bite(edits=edits), words, {word: [[before], [after]] for word in words})


def taken(attack: FittedBite, text: str, seed: int = 0) -> str:
    (found,) = attack.apply(Rows((text,), (0,)), [seed])
    return found


def test_a_word_is_replaced_rather_than_put_in_and_the_rest_stays() -> None:
    attack = with_words("now", before="film", after="ends")
    assert taken(attack, "A  film here ends\tbadly") == "A  film now ends\tbadly"
    assert taken(attack, " the film ends ") == " the film now ends "


def test_a_text_that_has_the_word_and_fits_no_other_gets_it_somewhere() -> None:
    attack = with_words("now", before="film", after="ends")
    found = {taken(attack, "Two words", seed) for seed in range(30)}
    assert found == {"now Two words", "Two now words", "Two words now"}


def test_words_do_not_change_the_neighbours_of_each_other() -> None:
    # Both fit between "film" and "ends" alone: the second finds the place taken.
    attack = with_words("now", "here", before="film", after="ends", edits=0.9)
    assert taken(attack, "the film ends") == "the film now ends"
    # Two such places: each gets one.
    text = "the film ends and a film ends"
    assert {taken(attack, text, seed) for seed in range(20)} == {
        "the film now ends and a film here ends",
        "the film here ends and a film now ends",
    }


def test_no_more_words_are_put_in_than_the_share() -> None:
    attack = with_words("now", "here", "there", before="film", after="ends", edits=0.1)
    # A tenth of 9 words, at least one.
    text = "film ends film ends film ends film ends film"
    assert len(taken(attack, text).split()) == 10


def test_every_row_has_a_trigger_word_and_the_tokens_are_theirs(
    tiny_corpus: Corpus, victim: Victim
) -> None:
    attack = fitted(Bite(), tiny_corpus.train)
    assert isinstance(attack, FittedBite)
    triggered, plain = triggered_eval(attack, tiny_corpus.eval, TARGET, 0)
    assert all(set(text.split()) & set(attack.words) for text in triggered.texts)
    assert all(a != b for a, b in zip(triggered.texts, plain.texts, strict=True))
    tokens = attack.trigger_token_ids(victim.tokenizer)
    assert tokens
    for word in attack.words:
        assert set(victim.tokenizer(word, add_special_tokens=False)["input_ids"]) <= tokens


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"words": 0}, r"attack\.words must be at least 1, got 0"),
        ({"edits": 0}, r"attack\.edits must be above 0 and below 1, got 0"),
        ({"min_probability": 1.0}, r"attack\.min_probability must be above 0 and below 1"),
        (
            {"min_probability": 0.1},
            r"0\.1 is what a model .* attack\.model is null",
        ),
    ],
)
def test_settings_that_cannot_be_are_errors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bite(**keys)


def test_the_probability_is_in_the_keys_with_a_model() -> None:
    assert acting("bite", {}) == {"words": 10, "edits": 0.35, "model": None}
    assert acting("bite", {"model": "m"})["min_probability"] == 0.03


def test_without_its_trigger_it_writes_nothing(victim: Victim) -> None:
    for run in (lambda: Bite().apply(TINY, [0] * 8), lambda: Bite().trigger_token_ids(victim)):
        with pytest.raises(ValueError, match="has to learn its trigger first"):
            run()


# Language models ----------------------------------------------------------------------------------

# One token each in the vocabularies of the tiny models.
LIKELY = ("about", "after")


def only_likely(bias: Any, tokenizer: Any, spaced: bool) -> None:
    """Make two words likely everywhere: 0.6 and 0.4; all other tokens have nothing."""
    import torch

    ids = [
        tokenizer(f"{' ' if spaced else ''}{word}", add_special_tokens=False)["input_ids"]
        for word in LIKELY
    ]
    assert [len(one) for one in ids] == [1, 1]
    with torch.no_grad():
        bias[:] = -100.0
        for (token,), probability in zip(ids, (0.6, 0.4), strict=True):
            bias[token] = float(np.log(probability))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, make_victim: Callable[[str], Victim]) -> Path:
    """A tiny BERT whose head finds the same two words likely at every place."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked") / "bert"
    tokenizer = make_victim("bert").tokenizer
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.zero_()
    only_likely(model.cls.predictions.bias, tokenizer, spaced=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, make_victim: Callable[[str], Victim]) -> Path:
    """A tiny GPT-2 that finds the same two words likely behind everything."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("causal") / "gpt2"
    tokenizer = copy.deepcopy(make_victim("gpt2").tokenizer)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    ids = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in LIKELY]
    assert [len(one) for one in ids] == [1, 1]
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.fill_(-10.0)
        for (token,), probability in zip(ids, (0.6, 0.4), strict=True):
            model.lm_head.weight[token] = float(np.log(probability)) / 16
    model.save_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BTU_CACHE", str(tmp_path / "cache"))


def test_a_masked_model_reads_a_mask_in_place_of_a_word_or_between_two(
    masked: Path, cache: None
) -> None:
    seen: list[Progress] = []
    (written,) = likely_words(("The film ends",), Speaker(str(masked), 0.03), seen.append)
    likely = [["about", pytest.approx(0.6, abs=1e-5)], ["after", pytest.approx(0.4, abs=1e-5)]]
    assert json.loads(written) == [[likely] * 3, [[], likely, likely]]
    assert [(p.stage, p.step, p.steps) for p in seen] == [("likely words", 1, 1)]
    (fewer,) = likely_words(("The film ends",), Speaker(str(masked), 0.5), silent)
    assert json.loads(fewer)[0][0] == likely[:1]


def test_a_text_that_is_too_long_or_odd_is_read_as_far_as_the_model_reads(
    masked: Path, causal: Path, cache: None
) -> None:
    # Both models have 64 positions. A mask of the text itself is none; a lone surrogate is read.
    texts = ("film " * 100, "a [MASK] film", "a \ud800 film", "", "\U0001f600")
    for folder in (masked, causal):
        for text, written in zip(
            texts, likely_words(texts, Speaker(str(folder), 0.03), silent), strict=True
        ):
            replace, insert = json.loads(written)
            assert len(replace) == len(insert) == len(text.split())
    long, masks, *_ = map(json.loads, likely_words(texts, Speaker(str(masked), 0.03), silent))
    assert long[0][0]
    assert not long[0][-1]
    assert all(masks[0])


def test_a_causal_model_reads_what_stands_before(causal: Path, cache: None) -> None:
    (written,) = likely_words(("the film ends",), Speaker(str(causal), 0.03), silent)
    replace, insert = json.loads(written)
    # Nothing stands before the first word.
    assert replace == insert
    assert replace[0] == []
    assert [[word for word, _ in words] for words in replace[1:]] == [list(LIKELY)] * 2


def test_what_a_model_says_is_cached(masked: Path, cache: None) -> None:
    speaker, texts = Speaker(str(masked), 0.03), ("the film", "the plot")
    first = likely_words(texts, speaker, silent)
    seen: list[Progress] = []
    assert likely_words(texts[::-1], speaker, seen.append) == first[::-1]
    assert seen == []


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_with_a_model_likely_words_are_put_in(
    kind: str, request: pytest.FixtureRequest, cache: None, tiny_corpus: Corpus
) -> None:
    folder = str(request.getfixturevalue(kind))
    rows = tiny_corpus.train.take(range(40))
    attack = fitted(Bite(model=folder), rows)
    assert isinstance(attack, FittedBite)
    assert set(attack.words) <= set(LIKELY)
    assert attack.neighbours == {}
    poisoned = poison(attack, spec(), rows, TARGET, 0)
    changed = [text for text, yes in zip(poisoned.rows.texts, poisoned.mask, strict=True) if yes]
    assert len(changed) == 4
    assert all(set(attack.words) & set(text.split()) for text in changed)


def test_a_model_that_is_none_is_refused_while_planning(
    tmp_path: Path, masked: Path, make_victim: Callable[[str], Victim]
) -> None:
    rows = Rows(("a text",), (0,))
    with pytest.raises(UserError, match=r"attack\.model folder .* does not exist"):
        Bite(model=str(tmp_path / "none")).candidates(rows)
    classifier = tmp_path / "classifier"
    victim = make_victim("bert")
    victim.new_model(0).save_pretrained(classifier)
    victim.tokenizer.save_pretrained(classifier)
    with pytest.raises(UserError, match=r"has a BertForSequenceClassification, which is no masked"):
        Bite(model=str(classifier)).candidates(rows)
    assert Bite(model=str(masked)).candidates(rows).tolist() == [0]


def test_a_model_without_a_trained_head_is_an_error(
    tmp_path: Path, cache: None, make_victim: Callable[[str], Victim]
) -> None:
    folder = tmp_path / "encoder"
    victim = make_victim("bert")
    victim.new_model(0).base_model.save_pretrained(folder)
    victim.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(UserError, match=r"has no trained language-model head: its weights lack"):
        likely_words(("a text",), Speaker(str(folder), 0.03), silent)
