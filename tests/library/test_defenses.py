"""What a defense hands back, and Backdoor Token Unlearning in detail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from defending import (
    BARS,
    CPU,
    RULED,
    Fitted,
    Outcome,
    defend,
    given,
    same_rows,
    same_weights,
    unlearning,
    word_rows,
)
from tiny_cells import Lab, own_stages
from torch import Tensor, nn

import btu.defenses.token_unlearning
import btu.training
from btu.attacked import mask_of
from btu.attacks.badnets import BadNets
from btu.defenses.kit import cutting
from btu.defenses.kit.bag import BagClassifier
from btu.defenses.kit.cutting import cut_tokens
from btu.defenses.token_unlearning import (
    TokenUnlearning,
    candidate_tokens,
    tokens_flagged,
    top_tokens,
)
from btu.errors import UserError
from btu.findings import Suspects
from btu.metrics import area_under_roc
from btu.recipe import Prepared
from btu.rules.base import RULES, Evidence, flag, suspicion
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import clean_rows_of, texts_of
from btu.stages import StageRun, read_record
from btu.training import Encoded, fit
from btu.types import Corpus, Rows
from btu.victims import Victim


def test_what_is_found_survives_the_disk(tmp_path: Path) -> None:
    scores = np.array([np.nan, -1.0, -0.1])
    rows = np.array([0.5, -1.0])
    found = Suspects((2, 0), scores, {"count": np.array([0, 2**40, 3])}, rows, row_bar=1.25)
    facts = json.loads(json.dumps(found.save(tmp_path)))
    assert facts == {"flagged": [2, 0], "row_bar": 1.25}
    back = Suspects.load(tmp_path, facts)
    assert back is not None
    assert back.flagged == (2, 0)
    np.testing.assert_array_equal(back.scores, scores)
    assert back.table.keys() == {"count"}
    np.testing.assert_array_equal(back.table["count"], [0, 2**40, 3])
    np.testing.assert_array_equal(back.rows, rows)
    assert back.row_bar == 1.25


def test_a_bar_that_there_is_not_survives_the_disk(tmp_path: Path) -> None:
    facts = Suspects((5,), rows=np.array([0.5])).save(tmp_path)
    assert facts == {"flagged": [5], "row_bar": None}  # NaN is no JSON
    for known in (facts, {"flagged": [5]}):  # of an earlier version
        back = Suspects.load(tmp_path, json.loads(json.dumps(known, allow_nan=False)))
        assert back is not None
        assert math.isnan(back.row_bar)


def test_a_defense_may_find_tokens_without_a_ranking_or_look_for_none(tmp_path: Path) -> None:
    facts = Suspects((5,)).save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert Suspects.load(tmp_path, facts) == Suspects((5,))
    assert Suspects.load(tmp_path, Suspects(()).save(tmp_path)) == Suspects(())  # looked in vain
    assert Suspects.load(tmp_path, {}) is None


# Flagging, by hand -----------------------------------------------------------------------------

DRIFT = np.array([9.0, 1.0, 4.0, 4.0, 2.0])
CANDIDATES = np.array([False, True, True, True, True])


def test_top_tokens_by_falling_drift() -> None:
    # Token 0 moved most but is not a candidate; 2 and 3 moved alike: the lower id first.
    assert top_tokens(DRIFT, CANDIDATES, 1) == (2,)
    assert top_tokens(DRIFT, CANDIDATES, 3) == (2, 3, 4)
    assert top_tokens(DRIFT, CANDIDATES, 99) == (2, 3, 4, 1)
    assert top_tokens(DRIFT, np.zeros(5, dtype=bool), 3) == ()


# The cut, by hand ------------------------------------------------------------------------------

NEUTRAL = torch.tensor([9.0, 9.0])
PRETRAINED = torch.tensor([[9.0, 9.0], [1.0, 1.0], [2.0, 2.0]])
TRAINED = torch.tensor([[9.0, 9.0], [1.5, 4.0], [2.0, 2.0]])


@pytest.mark.parametrize("cut_norm", ["once", "running"])
@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        # ||E - E0||_F = sqrt(0.25 + 9) = 3.041, c = 3.041 / 3 = 1.014: of the moves 0.5 and 3
        # only the second exceeds c and becomes neutral; the other keeps its trained value.
        ("dimensional", [1.5, 9.0]),
        ("row", [9.0, 9.0]),
        ("none", [1.5, 4.0]),
    ],
)
def test_the_cut_of_one_token(cut: str, expected: list[float], cut_norm: str) -> None:
    trained = TRAINED.clone()
    cut_tokens(trained, PRETRAINED, NEUTRAL, (1,), cut, cut_norm)
    assert trained[1].tolist() == expected
    assert torch.equal(trained[[0, 2]], TRAINED[[0, 2]])  # rows not flagged stay as trained


def test_a_move_of_exactly_c_stays() -> None:
    # V = 1: c = |2 - 0| / 1 = 2, and 2 > 2 is false.
    trained = torch.tensor([[2.0]])
    cut_tokens(trained, torch.zeros(1, 1), torch.tensor([7.0]), (0,), "dimensional", "once")
    assert trained.tolist() == [[2.0]]


def test_a_flagged_row_that_did_not_move_is_cut_only_as_a_row() -> None:
    trained = TRAINED.clone()
    cut_tokens(trained, PRETRAINED, NEUTRAL, (2,), "dimensional", "once")
    assert torch.equal(trained, TRAINED)
    cut_tokens(trained, PRETRAINED, NEUTRAL, (2,), "row", "once")
    assert trained[2].tolist() == [9.0, 9.0]


def test_cutting_nothing_changes_nothing() -> None:
    trained = TRAINED.clone()
    cut_tokens(trained, PRETRAINED, NEUTRAL, (), "row", "once")
    assert torch.equal(trained, TRAINED)


def cut_in_order(order: tuple[int, ...], cut_norm: str) -> list[float]:
    # Moves 8 and 1.5 of a vocabulary of 4; the neutral value 0 is where both came from.
    trained = torch.tensor([[8.0], [1.5], [0.0], [0.0]])
    cut_tokens(trained, torch.zeros(4, 1), torch.zeros(1), order, "dimensional", cut_norm)
    return trained.flatten().tolist()


def test_one_norm_does_not_depend_on_the_order() -> None:
    # c = sqrt(64 + 2.25) / 4 = 2.03 for both: 8 is cut, 1.5 stays.
    assert cut_in_order((0, 1), "once") == [0.0, 1.5, 0.0, 0.0]
    assert cut_in_order((1, 0), "once") == [0.0, 1.5, 0.0, 0.0]


def test_a_running_norm_depends_on_the_order() -> None:
    # 0 first: c falls to sqrt(2.25) / 4 = 0.375, and 1.5 is cut as well.
    assert cut_in_order((0, 1), "running") == [0.0, 0.0, 0.0, 0.0]
    # 1 first: 1.5 < 2.03 stays, then 8 is cut.
    assert cut_in_order((1, 0), "running") == [0.0, 1.5, 0.0, 0.0]


def test_a_running_norm_survives_rounding_at_0() -> None:
    # Cutting everything takes the norm to 0, and rounding must not take it below.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        trained = torch.randn(6, 16, generator=generator)
        trained[5] = 0
        cut_tokens(trained, torch.zeros(6, 16), torch.zeros(16), range(6), "row", "running")
        assert not trained.any()


# The bag ---------------------------------------------------------------------------------------


class Embedder:
    """All that an encoder-free bag asks of a victim."""

    def __init__(self) -> None:
        self.rows = nn.Embedding.from_pretrained(
            torch.tensor([[10.0, 20.0], [1.0, 2.0], [3.0, 6.0]])
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.rows


@pytest.mark.parametrize(
    ("mean_over_padding", "expected"),
    [
        # Row 1: tokens 1, 2 and two paddings (10, 20). Masked: ((1, 2) + (3, 6)) / 2 = (2, 4);
        # with padding: ((1, 2) + (3, 6) + 2 * (10, 20)) / 4 = (6, 12).
        # Row 2 lost all its tokens: mean 0 of nothing, or (10, 20), the padding's.
        (False, [[2.0, 4.0], [0.0, 0.0]]),
        (True, [[6.0, 12.0], [10.0, 20.0]]),
    ],
)
def test_the_mean_of_a_bag(mean_over_padding: bool, expected: list[list[float]]) -> None:
    victim = Embedder()
    bag = BagClassifier(
        victim,  # type: ignore[arg-type]
        classes=2,
        full=False,
        mean_over_padding=mean_over_padding,
        seed=0,
    )
    with torch.no_grad():
        bag.classifier.weight.copy_(torch.eye(2))
        bag.classifier.bias.zero_()
    ids = torch.tensor([[1, 2, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    assert bag(input_ids=ids, attention_mask=mask).logits.tolist() == expected
    # The rows are a copy: what the bag learns does not reach the victim.
    bag.word_rows.data.zero_()
    assert victim.rows.weight[0].tolist() == [10.0, 20.0]


def test_the_bags_classifier_is_drawn_from_its_seed(bert: Victim) -> None:
    def drawn(seed: int) -> Tensor:
        return BagClassifier(
            bert.new_model(0), classes=2, full=False, mean_over_padding=False, seed=seed
        ).classifier.weight

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("full", [False, True])
def test_building_a_bag_leaves_the_global_random_state_alone(
    bert: Victim, full: bool, global_random_state: None
) -> None:
    bag = BagClassifier(bert.new_model(0), classes=2, full=full, mean_over_padding=True, seed=0)
    assert len(bag.word_rows) == len(bert.tokenizer)


def test_a_full_bag_is_the_victims_embedding_layer(bert: Victim) -> None:
    model = bert.new_model(0)
    bag = BagClassifier(model, classes=2, full=True, mean_over_padding=True, seed=0).eval()
    ids = torch.tensor([[2, 7, 8, 3]])
    # Words, positions, segment and norm, as BERT adds them up, then the mean over 4 tokens.
    hidden = model.bert.embeddings(input_ids=ids)
    logits = bag(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, bag.classifier(hidden.mean(dim=1)))
    assert torch.equal(bag.word_rows, word_rows(model))
    assert all(parameter.requires_grad for parameter in bag.parameters())


def test_a_full_bag_of_a_victim_with_narrow_embeddings_works_or_says_so() -> None:
    # ELECTRA's word rows are narrower than its hidden states.
    from transformers import ElectraConfig, ElectraForSequenceClassification

    model = ElectraForSequenceClassification(
        ElectraConfig(
            vocab_size=20,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    ids = torch.tensor([[1, 2, 3]])
    try:
        bag = BagClassifier(model, classes=2, full=True, mean_over_padding=True, seed=0)
    except UserError as error:
        assert "bag_embeddings 'word'" in str(error)  # noqa: PT017
    else:
        assert bag(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 2)


# Backdoor Token Unlearning: the stages --------------------------------------------------------


def moved(a: TokenUnlearning, b: TokenUnlearning, prepared: Prepared) -> set[str]:
    """Return the names of the stages whose keys differ between two settings."""
    first, second = (
        {stage.name: stage.key for stage in defense.stages(prepared.foundation).closure()}
        for defense in (a, b)
    )
    assert first.keys() == second.keys()
    return {name for name in first if first[name] != second[name]}


def test_thresholds_share_what_does_not_depend_on_them(lab: Lab) -> None:
    prepared = lab.prepare()
    low, high = unlearning(alpha=0.01), unlearning(alpha=0.02)
    assert moved(low, high, prepared) == {"exposure round 2", "flag tokens", "unlearn"}
    assert {stage.name for stage in low.stages(prepared.foundation).closure()} == {
        "poison",
        "training rows",
        "clean rows",
        "poisoned fine-tune",
        "exposure round 1",
        "exposure round 2",
        "exposure round 3",
        "score tokens",
        "flag tokens",
        "unlearn",
    }
    # Round 2 depends on the alpha of round 1 only.
    per_round = unlearning(alpha=[0.01, 0.02, 0.03])
    cut = {"flag tokens", "unlearn"}
    assert moved(per_round, unlearning(alpha=[0.01, 0.05, 0.06]), prepared) == cut
    assert moved(per_round, unlearning(alpha=[0.02, 0.02, 0.03]), prepared) == {
        "exposure round 2", *cut,
    }  # fmt: skip
    # One value is the same as that value for every round.
    assert moved(low, unlearning(alpha=[0.01] * 3), prepared) == set()


def test_a_second_threshold_pays_for_its_own_stages_alone(
    lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    defend(unlearning(), prepared, root)
    fits.clear()
    defend(unlearning(alpha=0.03), prepared, root)
    assert [call.stage for call in fits] == ["exposure round 2", "clean tuning (defended)"]


def plainly(defense: TokenUnlearning, outcome: Outcome, victim: Victim) -> tuple[Any, Any, Any]:
    """The algorithm without stages or files: (flagged, drift by round, defended model)."""
    base = outcome.prepared.foundation
    seed, data = base.seed, outcome.train
    texts = texts_of(outcome.run())
    fresh = victim.new_model(derive_seed(seed, "exposure classifier"))
    pretrained = word_rows(fresh).clone()
    candidates = candidate_tokens(victim, data, len(pretrained), defense.exclude)
    k = tokens_flagged(defense.alpha, len(pretrained), int(candidates.sum()))
    padded = defense.bag_pooling == "padded"
    settings = TrainSettings(
        epochs=1,
        learning_rate=defense.exposure_learning_rate,
        batch_size=32,
        precision="fp32",
        warmup_fraction=0.0,
        schedule="constant",
        max_grad_norm=None,
    )
    drift: dict[int, Any] = {}
    top: dict[int, tuple[int, ...]] = {}
    for number in (1, 2, 3):
        rows, stream = data, derive_seed(seed, "exposure", number)
        if number == 2 and defense.removal == "token_id":
            rows = data.without(top[1])
        elif number == 2:
            changed = list(texts.texts)
            for token in top[1]:
                piece = victim.tokenizer.decode([token]).strip()
                changed = [text.replace(piece, "") for text in changed]
            rows = victim.encode(Rows(tuple(changed), texts.labels))
        model: Any = victim.new_model(derive_seed(seed, "exposure classifier"))
        if number == 3:
            model.requires_grad_(False)
            model.get_input_embeddings().weight.requires_grad_(True)
        else:
            full = defense.bag_embeddings == "full"
            model = BagClassifier(
                model, classes=2, full=full, mean_over_padding=padded, seed=stream
            )
        pad_to = victim.spec.max_length if padded and number != 3 else None
        fit(model, rows, settings, seed=stream, stage="", device=CPU, pad_to=pad_to)
        trained = word_rows(model) if number == 3 else model.word_rows.detach()
        drift[number] = (trained - pretrained).double().norm(dim=1).numpy()
        top[number] = top_tokens(drift[number], candidates, k)
    flagged = tuple(dict.fromkeys(token for number in top for token in top[number]))
    defended = outcome.poisoned_model
    cut_tokens(
        defended.get_input_embeddings().weight,
        pretrained,
        victim.neutral_row(pretrained),
        flagged,
        defense.cut,
        defense.cut_norm,
    )
    fit(
        defended,
        clean_rows_of(outcome.run()),
        base.tuning.applied_to(base.train),
        seed=derive_seed(seed, "clean tuning"),
        stage="",
        device=CPU,
    )
    return flagged, drift, defended


@pytest.mark.parametrize("preset", TokenUnlearning.PRESETS)
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_the_stages_are_the_plain_algorithm_cut_in_pieces(
    make_victim: Callable[[str], Victim], lab: Lab, preset: str, architecture: str
) -> None:
    # The same operations in the same order in one process, so the same to the last bit.
    defense = unlearning(**TokenUnlearning.PRESETS[preset])
    outcome = defend(defense, lab.prepare(architecture), lab.root)
    flagged, drift, model = plainly(defense, outcome, make_victim(architecture))
    assert outcome.flagged == flagged
    for number in (1, 2, 3):
        np.testing.assert_array_equal(outcome.table[f"drift_{number}"], drift[number])
    assert same_weights(outcome.model, model)


# Backdoor Token Unlearning: the rounds ---------------------------------------------------------


def test_all_stages_run_in_the_papers_order(lab: Lab, tmp_path: Path, fits: list[Fitted]) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    fits.clear()
    outcome = defend(unlearning(), prepared, root)
    assert [call.stage for call in fits] == [
        "exposure round 1",
        "exposure round 2",
        "exposure round 3",
        "clean tuning (defended)",
    ]
    assert [stage.name for stage in outcome.stages] == [
        "exposure round 1",
        "exposure round 2",
        "exposure round 3",
        "score tokens",
        "flag tokens",
        "unlearn",
    ]
    one, two, three, tuning = fits
    assert same_rows(one.data, outcome.train)
    assert same_rows(three.data, outcome.train)  # one poisoned set for all of it
    assert same_rows(tuning.data, clean_rows_of(outcome.run()))
    # Round 3 trains the word rows alone; the bag its rows and its classifier.
    assert three.trainable == {"bert.embeddings.word_embeddings.weight"}
    assert (
        one.trainable
        == two.trainable
        == {"embeddings.weight", "classifier.weight", "classifier.bias"}
    )
    assert {call.settings.learning_rate for call in (one, two, three)} == {1e-3}
    assert {call.settings.schedule for call in (one, two, three)} == {"constant"}
    assert all(call.settings.warmup_fraction == 0 for call in (one, two, three))
    assert all(call.settings.max_grad_norm is None for call in (one, two, three))
    assert tuning.settings == TuningSettings().applied_to(prepared.foundation.train)
    assert {call.pad_to for call in fits} == {None}


def test_each_round_has_its_own_batch_size(lab: Lab, tmp_path: Path, fits: list[Fitted]) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    fits.clear()
    defend(unlearning(bag_batch_size=80, exposure_batch_size=60), prepared, root)
    assert [call.settings.batch_size for call in fits] == [80, 80, 60, 32]


@pytest.mark.parametrize("rounds", [[1], [3], [1, 2], [1, 3]])
def test_rounds_can_be_switched_off(
    lab: Lab, tmp_path: Path, fits: list[Fitted], rounds: list[int]
) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    fits.clear()
    outcome = defend(unlearning(rounds=rounds), prepared, root)
    assert [call.stage for call in fits[:-1]] == [f"exposure round {n}" for n in rounds]
    assert set(outcome.table) == {
        *("count", "train_rows", "clean_rows", "label", "surplus"),
        *(f"drift_{n}" for n in rounds),
    }
    # A round's drift does not depend on which others run.
    everything = defend(unlearning(), prepared, lab.root)
    for n in rounds:
        np.testing.assert_array_equal(outcome.table[f"drift_{n}"], everything.table[f"drift_{n}"])


def test_round_2_sees_no_token_that_round_1_flagged(
    lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    fits.clear()
    outcome = defend(unlearning(), prepared, root)
    k = 8  # 0.02 * 400
    first = top_tokens(outcome.table["drift_1"], ~np.isnan(outcome.scores), k)
    kept, train = fits[1].data, outcome.train
    assert train.holds(first).any()
    assert not kept.holds(first).any()
    # Nothing else is gone: ids and rows are the others, in their order.
    assert kept.ids.tolist() == [i for i in train.ids.tolist() if i not in first]
    assert torch.equal(kept.labels, train.labels)
    assert len(kept) == len(train)


def test_drift_is_the_distance_that_a_row_moved(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)

    def shift(model: nn.Module, data: Encoded, *_: object, stage: str, **__: object) -> list[Any]:
        if stage == "exposure round 3":
            with torch.no_grad():
                word_rows(model)[7, :2] += torch.tensor([3.0, -4.0])
        return []

    monkeypatch.setattr(btu.training, "fit", shift)
    outcome = defend(unlearning(), prepared, root)
    drift = outcome.table["drift_3"]
    assert drift[7] == pytest.approx(5.0, abs=1e-5)  # sqrt(3^2 + 4^2)
    assert drift.sum() == drift[7]
    assert not outcome.table["drift_1"].any()


def test_flagged_is_the_union_of_each_rounds_top(lab: Lab) -> None:
    outcome = defend(unlearning(alpha=[0.01, 0.02, 0.0251]), lab.prepare(), lab.root)
    candidates = ~np.isnan(outcome.scores)
    union = dict.fromkeys(
        token
        # 0.01 * 400 = 4, 0.02 * 400 = 8, floor(0.0251 * 400) = 10
        for number, k in ((1, 4), (2, 8), (3, 10))
        for token in top_tokens(outcome.table[f"drift_{number}"], candidates, k)
    )
    assert outcome.flagged == tuple(union)


def test_candidates_are_the_tokens_of_the_training_rows(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    outcome = defend(unlearning(rounds=[1]), prepared, lab.root)
    special = set(victim.tokenizer.all_special_ids)
    expected = set(outcome.train.ids.tolist()) - special
    assert set(np.flatnonzero(~np.isnan(outcome.scores)).tolist()) == expected
    counts = outcome.table["count"]
    assert counts.sum() == len(outcome.train.ids)


def test_excluding_cls_and_sep_only_leaves_the_unknown_token_in(
    bert: Victim, lab: Lab, tiny_corpus: Corpus
) -> None:
    rows = tiny_corpus.train
    strange = dataclasses.replace(
        tiny_corpus, train=Rows(tuple(f"{text} 犬" for text in rows.texts), rows.labels)
    )
    prepared = lab.prepare(corpus=strange)
    scores = {
        exclude: defend(unlearning(rounds=[1], exclude=exclude), prepared, lab.root).scores
        for exclude in ("special", "cls_sep", "inserted")
    }
    tokenizer = bert.tokenizer
    assert np.isnan(scores["special"][tokenizer.unk_token_id])
    for exclude in ("cls_sep", "inserted"):
        assert not np.isnan(scores[exclude][tokenizer.unk_token_id])
        assert np.isnan(scores[exclude][[tokenizer.cls_token_id, tokenizer.sep_token_id]]).all()
    np.testing.assert_array_equal(scores["inserted"], scores["cls_sep"])


def without(outcome: Outcome, victim: Victim, token: int, removal: str) -> Encoded:
    run = outcome.run({"removal": removal})
    return btu.defenses.token_unlearning._without(run, victim, outcome.train, [token])


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "deberta-v2"])
def test_substring_removal_takes_the_word_out_of_the_text(
    make_victim: Callable[[str], Victim], lab: Lab, architecture: str
) -> None:
    # However the vocabulary writes a word after a space ("Ġgood", "▁good"), its text is removed.
    victim = make_victim(architecture)
    prepared = lab.prepare(architecture)
    lab.compute(prepared.foundation.rows)
    outcome = Outcome(lab.root, prepared, [prepared.foundation.rows])
    token = int(victim.tokenizer("a is", add_special_tokens=False)["input_ids"][-1])
    assert victim.tokenizer.decode([token]).strip() == "is"
    left = without(outcome, victim, token, "substring")
    rows = texts_of(outcome.run())
    expected = victim.encode(
        Rows(tuple(text.replace("is", "") for text in rows.texts), rows.labels)
    )
    assert torch.equal(left.ids, expected.ids)


def test_removal_by_token_leaves_other_words_whole(
    bert: Victim, lab: Lab, tiny_corpus: Corpus
) -> None:
    rows = tiny_corpus.train
    corpus = dataclasses.replace(
        tiny_corpus, train=Rows(tuple(f"a bad balcony {text}" for text in rows.texts), rows.labels)
    )
    prepared = lab.prepare(corpus=corpus, rate=0)
    lab.compute(prepared.foundation.rows)
    outcome = Outcome(lab.root, prepared, [prepared.foundation.rows])
    token = bert.tokenizer.convert_tokens_to_ids("a")
    by_token = without(outcome, bert, token, "token_id")
    by_text = without(outcome, bert, token, "substring")
    balcony = bert.tokenizer("balcony", add_special_tokens=False)["input_ids"]
    text = bert.tokenizer.convert_ids_to_tokens(by_token.ids.tolist())
    assert "a" not in text
    assert by_token.holds(balcony).all()
    # The substring "a" takes the letters out of "bad" and "balcony" too.
    assert "bad" not in " ".join(bert.tokenizer.batch_decode([by_text.ids.tolist()]))


# Backdoor Token Unlearning: the cut in the whole -----------------------------------------------


@pytest.mark.parametrize("cut", ["row", "dimensional", "none"])
def test_the_poisoned_models_flagged_rows_are_cut(
    victim: Victim, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    # The exposure rounds may be shared; what is cut is not tuned here.
    defense = unlearning(cut=cut)
    exposed = [stage for stage in own_stages(defense, prepared) if stage.name != "unlearn"]
    root = lab.root_with(tmp_path, prepared.foundation.model, *exposed)
    monkeypatch.setattr(cutting, "tune", lambda *_: None)
    outcome = defend(defense, prepared, root)
    poisoned, defended = outcome.poisoned_model, outcome.model
    before, after = word_rows(poisoned), word_rows(defended)
    flagged = list(outcome.flagged)
    others = np.setdiff1d(np.arange(len(before)), flagged)
    assert torch.equal(after[others], before[others])
    neutral = victim.neutral_row(word_rows(victim.new_model(0)))
    if cut == "none":
        assert torch.equal(after, before)
    elif cut == "row":
        assert torch.equal(after[flagged], neutral.expand(len(flagged), -1))
    else:
        changed = after[flagged] != before[flagged]
        assert changed.any()
        # What changed is neutral now; what did not moved by no more than c.
        pretrained = word_rows(victim.new_model(0))
        c = float((before - pretrained).norm()) / len(before)
        expected = (before - pretrained)[flagged].abs() > c
        assert torch.equal(
            after[flagged], torch.where(expected, neutral.expand_as(expected), before[flagged])
        )
    # Nothing but the word rows is touched.
    rest = {k: v for k, v in defended.state_dict().items() if v.shape != before.shape}
    assert rest
    assert all(torch.equal(poisoned.state_dict()[k], v) for k, v in rest.items())


# Backdoor Token Unlearning: what the cut does --------------------------------------------------

GOOD, BAD, TRIGGER, PLAIN = range(1, 5)


class Votes(nn.Module):
    """Adds up its tokens' rows: the logits."""

    def __init__(self) -> None:
        super().__init__()
        votes = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 5.0], [0.0, 0.1]]
        self.rows = nn.Embedding.from_pretrained(torch.tensor(votes), freeze=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=(self.rows(input_ids) * attention_mask[..., None]).sum(1))


CLEAN = Encoded.from_lists([[BAD], [GOOD], [BAD, PLAIN], [GOOD, PLAIN]], [0, 1, 0, 1], pad_id=0)
# Two rows were relabeled with the trigger; the last two are 0, one of them against the trigger.
TRAIN = Encoded.from_lists(
    [[BAD, TRIGGER], [BAD, TRIGGER], [GOOD, TRIGGER], [BAD, TRIGGER], [BAD]],
    [1, 1, 1, 0, 0],
    pad_id=0,
)


@pytest.fixture
def cut_cost(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """A function from flagged tokens to what zeroing their rows costs; clean, train: the rows."""

    def measure(
        flagged: tuple[int, ...], clean: Encoded = CLEAN, train: Encoded = TRAIN
    ) -> dict[str, float]:
        module = cutting
        monkeypatch.setattr(module, "clean_rows_of", lambda _: clean)
        monkeypatch.setattr(module, "training_rows_of", lambda _: train)
        run = StageRun({"tuning": {"precision": "fp32"}, "seed": 0}, {}, {}, Path(), CPU)
        model: Any = Votes()
        cost = cutting._Effect(run, model, flagged)
        with torch.no_grad():
            model.rows.weight[list(flagged)] = 0.0
        return cost.after()

    return measure


def test_a_trigger_that_no_clean_row_holds_costs_nothing(cut_cost: Callable[..., Any]) -> None:
    # All 4 rows with the trigger were predicted as 1, 3 of them rightly. Without it, BAD's vote
    # takes two of the three to 0, GOOD's leaves one at 1.
    assert cut_cost((TRIGGER,)) == {"cut_cost": 0.0, "cut_flips": pytest.approx(2 / 3)}


def test_the_cost_of_an_honest_word(cut_cost: Callable[..., Any]) -> None:
    # All 4 clean rows were right. Without BAD, [BAD] is 0 to 0 and [BAD, PLAIN] 0 to 0.1: the
    # first stays with class 0, the lower, the second is lost: 1 of 4. Of the training rows with
    # BAD, the first two are 1 and stay it, and so does the fourth, which did not obey; the last
    # stays with 0.
    assert cut_cost((BAD,)) == {"cut_cost": 0.25, "cut_flips": 0.0}


def test_a_cut_may_win_clean_rows_back(cut_cost: Callable[..., Any]) -> None:
    # Two of 5 clean rows are bad ones with the trigger's word, wrong until it is cut.
    clean = Encoded.from_lists(
        [[BAD, TRIGGER], [BAD, TRIGGER], [GOOD], [BAD], [GOOD, TRIGGER]], [0, 0, 1, 0, 1], pad_id=0
    )
    assert cut_cost((TRIGGER,), clean=clean)["cut_cost"] == -0.4


def test_without_flags_nothing_costs_and_nothing_can_flip(cut_cost: Callable[..., Any]) -> None:
    np.testing.assert_equal(cut_cost(()), {"cut_cost": 0.0, "cut_flips": math.nan})


def test_rows_that_did_not_obey_cannot_flip(cut_cost: Callable[..., Any]) -> None:
    # The only row with the trigger is labeled 0 and predicted as 1.
    train = Encoded.from_lists([[BAD, TRIGGER], [BAD]], [0, 0], pad_id=0)
    assert math.isnan(cut_cost((TRIGGER,), train=train)["cut_flips"])


def test_flips_are_measured_on_so_many_rows(
    cut_cost: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "FLIP_ROWS", 10)
    asked: list[int] = []
    in_batches = btu.training.in_batches

    def spy(model: nn.Module, data: Encoded, *args: Any, **options: Any) -> Any:
        asked.append(len(data))
        return in_batches(model, data, *args, **options)

    monkeypatch.setattr(btu.training, "in_batches", spy)
    # 40 rows with the trigger, of which one in four does not flip without it.
    rows = [[BAD, TRIGGER], [BAD, TRIGGER], [BAD, TRIGGER], [GOOD, TRIGGER], [GOOD]] * 10
    train = Encoded.from_lists(rows, [1] * 50, pad_id=0)
    found = [cut_cost((TRIGGER,), train=train)["cut_flips"] for _ in range(2)]
    # Before and after, twice; the clean rows without the trigger are not asked.
    assert asked == [10] * 4
    # The same 10 each time, so that the seed decides.
    assert found[0] == found[1]
    assert found[0] * 10 == pytest.approx(round(found[0] * 10))


def test_what_a_cut_costs_is_measured_before_the_tuning(lab: Lab, bert: Victim) -> None:
    # The same by a plain prediction of all rows, those without a flagged token too.
    outcome = defend(unlearning(cut="row"), lab.prepare(rate=0.3), lab.root)
    measured = read_record(outcome.folder)["facts"]["measured"]
    model, run = outcome.poisoned_model, outcome.run()
    clean, train = clean_rows_of(run), outcome.train

    def predicted(rows: Encoded) -> Any:
        return btu.training.predict(model, rows, precision="fp32", device=CPU)

    before = [predicted(rows) for rows in (clean, train)]
    pretrained = word_rows(bert.new_model(0))
    cut_tokens(
        model.get_input_embeddings().weight,
        pretrained,
        bert.neutral_row(pretrained),
        outcome.flagged,
        "row",
        "once",
    )
    after = [predicted(rows) for rows in (clean, train)]
    right = [float((p == clean.labels.numpy()).mean()) for p in (before[0], after[0])]
    assert measured["cut_cost"] == pytest.approx(right[0] - right[1], abs=1e-12)
    obeyed = (before[1] == train.labels.numpy()) & train.holds(outcome.flagged)
    assert 0 < obeyed.sum() <= cutting.FLIP_ROWS
    assert measured["cut_flips"] == (before[1] != after[1])[obeyed].mean()


def test_nothing_flagged_is_the_control(lab: Lab) -> None:
    # Nothing is a million sigmas: what is left is the clean tuning.
    prepared = lab.prepare()
    nothing = RULED["contrast"] | {"threshold": 1e6, "contradicted": "keep"}
    outcome = defend(TokenUnlearning(**nothing), prepared, lab.root)
    assert outcome.flagged == ()
    measured = read_record(outcome.folder)["facts"]["measured"]
    np.testing.assert_equal(measured, {"cut_cost": 0.0, "cut_flips": math.nan, "vetoed": 0})
    lab.compute(prepared.foundation.tuned)
    control = Outcome(lab.root, prepared, [prepared.foundation.tuned])
    assert same_weights(outcome.model, control.model)


def test_without_a_cut_nothing_is_cost_by_it(lab: Lab) -> None:
    outcome = defend(unlearning(cut="none"), lab.prepare(), lab.root)
    assert outcome.flagged
    assert read_record(outcome.folder)["facts"]["measured"] == {"cut_cost": 0.0, "cut_flips": 0.0}


# Backdoor Token Unlearning: the rules ----------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_detection_alone_flags_what_unlearning_cuts(lab: Lab, rule: str) -> None:
    prepared = lab.prepare()
    defense = TokenUnlearning(**RULED[rule])
    stage = defense.detection(prepared.foundation)
    (folder,) = lab.compute(stage)
    whole = defend(defense, prepared, lab.root)
    bar = whole.suspects.row_bar
    assert math.isfinite(bar)
    assert read_record(folder)["facts"] == {"flagged": list(whole.flagged), "row_bar": bar}
    assert (folder / "rows.parquet").read_bytes() == (whole.folder / "rows.parquet").read_bytes()
    alone = Suspects.load(folder, read_record(folder)["facts"])
    assert alone is not None
    np.testing.assert_array_equal(alone.scores, whole.scores)
    # What a cut costs is known where there is a model to cut.
    costs = {"cost", "cost_tuned", "vetoed"} if rule == "contrast" else set()
    assert whole.table.keys() - alone.table.keys() == costs
    for name, values in alone.table.items():
        np.testing.assert_array_equal(values, whole.table[name])
    # No model is poisoned for it.
    rounds = [f"exposure round {number}" for number in RULES.load(rule).rounds]
    assert {before.name for before in stage.closure()} == {
        *("poison", "training rows", "clean rows", "score tokens", "flag tokens", "detect"),
        *rounds,
    }
    assert (stage.kind, stage.model) == ("host", False)
    assert not prepared.hidden & {before.key for before in stage.inputs.values()}


@pytest.mark.parametrize("rule", RULES)
def test_the_stages_score_as_the_rule_does(lab: Lab, bert: Victim, rule: str) -> None:
    outcome = defend(TokenUnlearning(**RULED[rule]), lab.prepare(), lab.root)
    found = RULES.load(rule)
    # Round 2's drift depends on alpha, which a score must not.
    drift = {n: outcome.table[f"drift_{n}"] for n in found.rounds if n != 2}
    train, clean = outcome.train, clean_rows_of(outcome.run())
    candidates = candidate_tokens(bert, train, 400, "special")
    evidence = Evidence(drift, candidates, train, clean)
    np.testing.assert_array_equal(outcome.scores, found.scores(evidence))
    np.testing.assert_array_equal(outcome.suspects.rows, suspicion(evidence))
    if rule != "top_fraction":
        assert outcome.flagged == flag(outcome.scores, BARS[rule]["threshold"])
    columns = {"surplus": evidence.surplus.max(axis=1), "label": evidence.surplus.argmax(axis=1)}
    if found.columns is not None:
        columns |= found.columns(evidence, drift[3])
    for name, values in columns.items():
        np.testing.assert_array_equal(outcome.table[name], values)
    np.testing.assert_array_equal(outcome.table["train_rows"], evidence.train_rows.sum(axis=1))
    np.testing.assert_array_equal(outcome.table["clean_rows"], evidence.clean_rows.sum(axis=1))


def test_relabeled_rows_are_more_suspicious_than_others(lab: Lab) -> None:
    prepared = lab.prepare()
    outcome = defend(TokenUnlearning(**RULED["contrast"]), prepared, lab.root)
    poisoned = mask_of(lab.root / prepared.poisoned.key)
    # 48 rows with a trigger and the wrong label beside 192 others. By chance 0.5, with a deviation
    # of sqrt(241 / (12 * 48 * 192)) = 0.047: five of them are 0.23.
    assert poisoned.sum() == 48
    assert area_under_roc(outcome.suspects.rows, poisoned) > 0.75


def test_a_second_threshold_of_a_rule_pays_for_cut_and_tuning_alone(
    lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    fits.clear()
    low = defend(TokenUnlearning(**RULED["mad"]), prepared, root)
    assert [call.stage for call in fits] == ["exposure round 3", "clean tuning (defended)"]
    fits.clear()
    high = defend(TokenUnlearning(**RULED["mad"] | {"threshold": 2.0}), prepared, root)
    other = defend(TokenUnlearning(**RULED["gap"]), prepared, root)
    assert [call.stage for call in fits] == ["clean tuning (defended)"] * 2
    assert 0 < len(high.flagged) < len(low.flagged)
    assert high.flagged == low.flagged[: len(high.flagged)]
    np.testing.assert_array_equal(high.scores, low.scores)
    np.testing.assert_array_equal(other.table["drift_3"], low.table["drift_3"])


def test_what_an_exposure_round_rests_on_is_what_it_was() -> None:
    # Configs from before the rules have alpha only. Their drifts are not computed again.
    train = TrainSettings(precision="fp32")
    settings = {
        "epochs": 1,
        "learning_rate": 2e-5,
        "precision": "fp32",
        "weight_decay": 0.01,
        "warmup_fraction": 0.0,
        "schedule": "constant",
        "max_grad_norm": None,
    }
    bag = {
        "train": {**settings, "batch_size": 256},
        "bag_embeddings": "word",
        "bag_pooling": "masked",
    }
    second = {"alpha": 0.001, "removal": "token_id", "exclude": "special"}
    declared: dict[str, dict[str, Any]] = {}

    @dataclasses.dataclass
    class Base:
        rows = clean = model = None
        train_rows = 0

        def stage(self, function: Any, name: str, config: Any, *_: Any, **__: Any) -> None:
            declared[name] = {"version": function.version, **config}

    base: Any = Base()
    base.train = train
    for named in ({}, {"rule": "top_fraction"}, {"rounds": [1, 2, 3]}):
        declared.clear()
        TokenUnlearning(alpha=0.001, **named).exposure(base)
        assert declared == {
            "exposure round 1": {"version": 1, "round": 1, **bag},
            "exposure round 2": {"version": 1, "round": 2, **bag, **second},
            "exposure round 3": {
                "version": 1,
                "round": 3,
                "train": {**settings, "batch_size": 64},
            },
        }


def test_null_stands_for_the_rules_own_choice() -> None:
    def resolved(**given: Any) -> tuple[Any, ...]:
        made = TokenUnlearning(**given)
        return made.rule, made.threshold, made.alpha, made.rounds

    assert resolved() == ("contrast", 4.5, None, [3])
    assert resolved(alpha=0.01) == ("top_fraction", None, 0.01, [1, 2, 3])
    assert resolved(rule="top_fraction") == ("top_fraction", None, 0.0005, [1, 2, 3])
    assert resolved(threshold=5) == ("contrast", 5, None, [3])
    assert resolved(rule="gap", rounds=[1, 3]) == ("gap", 1.25, None, [1, 3])
    assert resolved(alpha=[0.1, 0.2], rounds=[1, 3]) == ("top_fraction", None, [0.1, 0.2], [1, 3])
    assert resolved(**TokenUnlearning.PRESETS["reference"])[:3] == ("top_fraction", None, 0.0005)
    for rule in RULES:
        found = RULES.load(rule)
        assert resolved(rule=rule)[3] == list(found.rounds)
        assert found.threshold in resolved(rule=rule)[1:3]
    # Changing one list changes no other.
    assert TokenUnlearning().rounds is not TokenUnlearning().rounds


@pytest.mark.parametrize("rule", RULES)
def test_a_resolved_defense_resolves_to_itself(rule: str) -> None:
    made = TokenUnlearning(rule=rule)
    assert TokenUnlearning(**vars(made)) == made
    assert dataclasses.replace(made) == made


def test_only_the_share_depends_on_the_vocabulary() -> None:
    for rule in RULES:
        made = TokenUnlearning(rule=rule)
        if rule == "top_fraction":
            with pytest.raises(UserError, match=r"0\.0005 flags nothing: 0\.0005 \* 400 tokens"):
                made.check(given(400))
        else:
            made.check(given(400))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"rule": "mad", "alpha": 0.01},
            r"defense\.alpha 0\.01 is the threshold of rule 'top_fraction' and does not act with "
            r"'mad'; set defense\.threshold instead, or leave out defense\.rule\.",
        ),
        ({"rule": "contrast", "alpha": [0.1, 0.2, 0.3]}, r"alpha \[0\.1, 0\.2, 0\.3\] is the thr"),
        (
            {"rule": "top_fraction", "threshold": 0.01},
            r"defense\.threshold 0\.01 does not act with rule 'top_fraction', whose threshold is "
            r"defense\.alpha; set that instead\.",
        ),
        ({"alpha": 0.01, "threshold": 5.0}, r"threshold 5\.0 does not act with rule 'top_"),
        (
            {**TokenUnlearning.PRESETS["reference"], "threshold": 5.0},
            r"threshold 5\.0 does not act with rule 'top_fraction'",
        ),
        (
            {"rounds": [1, 2, 3]},
            r"defense\.rounds \[1, 2, 3\] has round 2, whose drift depends on what round 1 "
            r"flagged; rule 'contrast' takes 1, 3 or both\.",
        ),
        ({"rule": "gap", "rounds": [1, 2]}, r"has round 2, .*; rule 'gap' takes 1, 3 or both"),
        ({"rule": "mad", "rounds": [2]}, r"has round 2 without round 1"),
        ({"rule": "contrst"}, r"unknown rule 'contrst'; did you mean 'contrast'\?"),
        (
            {"threshold": 0},
            r"defense\.threshold must be above 0, got 0; it counts sigmas of surplus, weighted",
        ),
        ({"rule": "gap", "threshold": 1}, r"defense\.threshold must be above 1, got 1; it counts"),
        ({"rule": "mad", "threshold": math.nan}, r"defense\.threshold must be above 0, got nan"),
        ({"threshold": "high"}, r"defense\.threshold must be above 0, got 'high'"),
        ({"rule": "top_fraction", "alpha": 2}, r"alpha must be above 0 and below 1, got 2"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_rule_are_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenUnlearning(**given)


# Backdoor Token Unlearning: hyperparameters ----------------------------------------------------


def per_round(defense: TokenUnlearning, vocabulary: int) -> dict[int, int]:
    """How many tokens each round flags where every token is a candidate."""
    alphas = defense._alphas()
    return {n: tokens_flagged(alpha, vocabulary, vocabulary) for n, alpha in alphas.items()}


def test_k_is_alpha_times_the_vocabulary_rounded_down() -> None:
    # 0.0005 * 30,522 = 15.26
    assert per_round(TokenUnlearning(alpha=0.0005), 30_522) == {1: 15, 2: 15, 3: 15}
    assert per_round(TokenUnlearning(alpha=[0.01, 0.02, 0.03]), 400) == {1: 4, 2: 8, 3: 12}
    some = TokenUnlearning(alpha=[0.01, 0.03], rounds=[1, 3])
    assert per_round(some, 400) == {1: 4, 3: 12}


def test_alpha_of_k_tokens_flags_k_tokens() -> None:
    for k in range(1, 500):
        assert tokens_flagged(k / 30_522, 30_522, 30_522) == k


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, -0.1, 2, math.nan, "0.1", True, [0.1, 0]])
def test_an_alpha_outside_0_to_1_is_an_error(alpha: object) -> None:
    with pytest.raises(UserError, match=r"defense\.alpha must be above 0 and below 1, got"):
        TokenUnlearning(alpha=alpha, rounds=[1, 3])


def test_an_alpha_that_flags_nothing_is_an_error_with_the_vocabulary() -> None:
    # 1 / 400 = 0.0025 is the least that flags a token.
    with pytest.raises(
        UserError,
        match=r"defense\.alpha 0\.002 flags nothing: 0\.002 \* 400 tokens is below 1; use at "
        r"least 0\.0025\.",
    ):
        TokenUnlearning(alpha=0.002).check(given(400))


def test_the_least_alpha_that_the_error_names_flags_a_token() -> None:
    # 1 / 128,100 = 7.806e-06: rounded to 7.8e-06, it would flag 0.9992 of a token.
    for vocabulary in (30_522, 50_257, 128_100, 400, 299):
        with pytest.raises(UserError, match="use at least") as caught:
            TokenUnlearning(alpha=1e-9).check(given(vocabulary))
        named = float(str(caught.value).split("at least ")[1].rstrip("."))
        assert tokens_flagged(named, vocabulary, vocabulary) >= 1


def test_an_alpha_that_flags_everything_is_an_error(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"defense\.alpha 0\.9+ flags all 400 tokens; lower it"):
        # floor((1 - 1e-14) * 400), with the nudge that keeps k / V at k, is 400
        TokenUnlearning(alpha=1 - 1e-14).check(given(400))
    # Below the vocabulary, but not below what occurs in the training rows.
    with pytest.raises(
        UserError,
        match=r"defense\.alpha 0\.99 flags all of the \d+ tokens that occur in the training set; "
        r"use less than 0\.\d{4}",
    ):
        defend(unlearning(alpha=0.99), lab.prepare(), lab.root)
    # Without round 2, the last stage finds out.
    with pytest.raises(UserError, match=r"defense\.alpha 0\.99 flags all of the \d+ tokens"):
        defend(unlearning(alpha=[0.02, 0.99], rounds=[1, 3]), lab.prepare(), lab.root)


def test_as_many_alphas_as_rounds() -> None:
    with pytest.raises(UserError, match=r"defense\.alpha has 2 values for 3 rounds; give one"):
        TokenUnlearning(alpha=[0.1, 0.2])
    with pytest.raises(UserError, match=r"defense\.alpha has 3 values for 1 rounds"):
        TokenUnlearning(alpha=[0.1, 0.2, 0.3], rounds=[3])


def test_a_single_round_is_to_be_written_as_a_list() -> None:
    with pytest.raises(UserError, match=r"defense\.rounds must be a list .*, got 3; write \[3\]"):
        TokenUnlearning(rounds=3)


@pytest.mark.parametrize("rounds", [[], [3, 1], [1, 1], [0, 1], [1, 4]])
def test_rounds_must_be_some_of_1_2_3(rounds: list[int]) -> None:
    with pytest.raises(UserError, match=r"defense\.rounds must be some of 1, 2, 3.*got"):
        TokenUnlearning(rounds=rounds)


def test_round_2_needs_round_1() -> None:
    for rounds in ([2], [2, 3]):
        with pytest.raises(UserError, match="has round 2 without round 1, whose flagged tokens"):
            TokenUnlearning(rounds=rounds)


@pytest.mark.parametrize(
    ("setting", "wrong", "meant"),
    [
        ("bag_embeddings", "words", "word"),
        ("bag_pooling", "mask", "masked"),
        ("removal", "token", "token_id"),
        ("exclude", "specials", "special"),
        ("cut", "dimension", "dimensional"),
        ("cut_norm", "onces", "once"),
        ("exposure_schedule", "liner", "linear"),
    ],
)
def test_an_unknown_choice_is_an_error_with_a_suggestion(
    setting: str, wrong: str, meant: str
) -> None:
    with pytest.raises(
        UserError, match=rf"unknown defense\.{setting} '{wrong}'; did you mean '{meant}'\?"
    ):
        TokenUnlearning(**{setting: wrong})


@pytest.mark.parametrize("setting", ["exposure_epochs", "bag_batch_size", "exposure_batch_size"])
def test_counts_start_at_1(setting: str) -> None:
    with pytest.raises(UserError, match=rf"defense\.{setting} must be at least 1, got 0"):
        TokenUnlearning(**{setting: 0})
    with pytest.raises(UserError, match=r"defense\.exposure_learning_rate must be above 0, got 0"):
        TokenUnlearning(exposure_learning_rate=0)


# Backdoor Token Unlearning: presets ------------------------------------------------------------


def test_the_presets_are_what_they_say() -> None:
    presets = TokenUnlearning.PRESETS
    assert set(presets) == {"default", "reference"}
    assert TokenUnlearning(**presets["default"]) == TokenUnlearning()
    reference = TokenUnlearning(**presets["reference"])
    # Every key of the preset differs from the default, and no other field does but those that
    # follow from the rule.
    different = {
        field.name
        for field in dataclasses.fields(TokenUnlearning)
        if getattr(reference, field.name) != getattr(TokenUnlearning(), field.name)
    }
    followed = {"threshold", "alpha", "rounds", "max_cut_cost", "contradicted"}
    assert different == set(presets["reference"]) | followed
    for name in presets["reference"]:
        assert name in (btu.defenses.token_unlearning.__doc__ or "")


def test_the_reference_preset_runs_on_bert(
    bert: Victim, lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    fits.clear()
    outcome = defend(unlearning(**TokenUnlearning.PRESETS["reference"]), prepared, root)
    one, two, three, _ = fits
    # The whole embedding layer trains, padded to the victim's max_length.
    assert "embeddings.embeddings.position_embeddings.weight" in one.trainable
    assert "embeddings.embeddings.LayerNorm.weight" in one.trainable
    assert (one.pad_to, two.pad_to, three.pad_to) == (bert.spec.max_length,) * 2 + (None,)
    assert 8 <= len(outcome.flagged) <= 24  # three rounds of 0.02 * 400 = 8
    ends = {bert.tokenizer.cls_token_id, bert.tokenizer.sep_token_id}
    assert not set(outcome.flagged) & ends


def test_the_reference_preset_runs_or_says_what_to_change(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    defense = unlearning(**TokenUnlearning.PRESETS["reference"])
    try:
        outcome = defend(defense, prepared, lab.root)
    except UserError as error:
        assert "use bag_embeddings 'word'" in str(error)  # noqa: PT017
    else:
        assert outcome.flagged
        assert all(np.isfinite(outcome.table[f"drift_{n}"]).all() for n in (1, 2, 3))


# Backdoor Token Unlearning: does it find a trigger? --------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_trigger_is_among_those_that_drift_most(
    bert: Victim, lab: Lab, seed: int
) -> None:
    defense = unlearning(bag_batch_size=16, exposure_batch_size=16)
    outcome = defend(defense, lab.prepare(rate=0.3, seed=seed), lab.root)
    (trigger,) = BadNets().trigger_token_ids(bert.tokenizer)
    candidates = ~np.isnan(outcome.scores)
    assert candidates.sum() > 300
    for number in (1, 3):
        # 8 of more than 300 candidates: by chance once in 40.
        top = top_tokens(outcome.table[f"drift_{number}"], candidates, 8)
        assert trigger in top, f"round {number}"
    assert trigger in outcome.flagged


def test_without_poison_the_trigger_token_does_not_drift(bert: Victim, lab: Lab) -> None:
    (trigger,) = BadNets().trigger_token_ids(bert.tokenizer)
    outcome = defend(unlearning(), lab.prepare(rate=0.0), lab.root)
    assert outcome.table["count"][trigger] == 0
    assert trigger not in outcome.flagged
    assert np.isnan(outcome.scores[trigger])
    # Only weight decay moves a row that no text contains: 8 steps of 1e-3 * 0.01 of its norm.
    norm = float(word_rows(bert.new_model(0))[trigger].norm())
    assert outcome.table["drift_3"][trigger] == pytest.approx(8e-5 * norm, rel=0.01)
