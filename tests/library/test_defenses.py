"""The contract that every registered defense keeps, and Backdoor Token Unlearning in detail."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import btu.training
from btu.attacks.badnets import BadNets
from btu.bag import BagClassifier
from btu.defense import DEFENSES, Defense, DefenseContext, DefenseOutcome
from btu.defenses.token_unlearning import TokenUnlearning, cut_tokens, ranking, top_tokens
from btu.errors import UserError
from btu.poisoning import PoisonSpec, poison
from btu.settings import TrainSettings, TuningSettings
from btu.training import Encoded, fit
from btu.types import Corpus, Rows
from btu.victims import Victim

CPU = torch.device("cpu")
TARGET = 1
# Hyperparameters that suit a vocabulary of 400 to 500 tokens and 240 rows, by defense. A new
# defense gets its line here, {} if its defaults will do.
SMALL: dict[str, dict[str, Any]] = {
    "btu": {
        "alpha": 0.02,
        "exposure_learning_rate": 1e-3,
        "bag_batch_size": 32,
        "exposure_batch_size": 32,
    }
}
BTU = SMALL["btu"]


def unlearning(**changes: Any) -> TokenUnlearning:
    return TokenUnlearning(**BTU | changes)


def make_context(
    victim: Victim, corpus: Corpus, *, rate: float = 0.2, seed: int = 0, columns: bool = False
) -> DefenseContext:
    """A context with a poisoned set; its model is not trained, which no stage depends on."""
    rows = poison(BadNets(), PoisonSpec(poison_rate=rate), corpus.train, TARGET, seed).rows
    settings = TrainSettings(epochs=1, learning_rate=1e-3, batch_size=32, precision="fp32")
    return DefenseContext(
        victim=victim,
        train_rows=rows if columns else Rows(rows.texts, rows.labels),
        train=victim.encode(rows),
        clean=victim.encode(corpus.clean),
        model=victim.new_model(1),
        settings=settings,
        tuning=TuningSettings(),
        seed=seed,
        device=CPU,
    )


@dataclasses.dataclass
class Fitted:
    """One call of `fit`, as the spy saw it. trainable: names of what required gradients."""

    stage: str
    data: Encoded
    settings: TrainSettings
    pad_to: int | None
    trainable: set[str]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fitted]:
    """Every call of `fit`, in order."""
    calls: list[Fitted] = []

    def spy(
        model: nn.Module, data: Encoded, settings: TrainSettings, **kwargs: Any
    ) -> list[btu.training.Epoch]:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        calls.append(Fitted(kwargs["stage"], data, settings, kwargs.get("pad_to"), trainable))
        return fit(model, data, settings, **kwargs)

    monkeypatch.setattr(btu.training, "fit", spy)
    return calls


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def word_rows(model: nn.Module) -> Tensor:
    return model.get_input_embeddings().weight.detach()  # type: ignore[operator]


# The contract ----------------------------------------------------------------------------------


@pytest.fixture(params=DEFENSES)
def defense(request: pytest.FixtureRequest) -> Defense:
    """Each registered defense in turn."""
    built: Defense = DEFENSES.load(request.param)(**SMALL[request.param])
    return built


def test_every_defense_has_small_settings_for_this_suite() -> None:
    assert set(SMALL) == set(DEFENSES)


def test_a_defense_works_on_every_architecture_and_runs_what_it_records(
    defense: Defense, victim: Victim, tiny_corpus: Corpus, fits: list[Fitted]
) -> None:
    context = make_context(victim, tiny_corpus)
    before = copy.deepcopy(context.model)
    vocabulary = len(word_rows(before))
    defense.check(vocabulary)
    outcome = defense.defend(context)
    # Every stage that trained is in the history, in order, and was timed.
    assert [e.stage for e in context.history if e.epoch == 1] == [call.stage for call in fits]
    assert fits
    assert {call.stage for call in fits} <= set(context.seconds)
    assert all(seconds >= 0 for seconds in context.seconds.values())
    # The poisoned model serves others too.
    assert same_weights(context.model, before)
    assert outcome.model is not context.model
    assert not same_weights(outcome.model, before)
    assert not outcome.model.training
    check_tokens(outcome, victim, vocabulary)


def check_tokens(outcome: DefenseOutcome, victim: Victim, vocabulary: int) -> None:
    if outcome.flagged is not None:
        assert outcome.flagged
        assert len(set(outcome.flagged)) == len(outcome.flagged)
        assert all(0 <= token < vocabulary for token in outcome.flagged)
        assert not set(outcome.flagged) & set(victim.tokenizer.all_special_ids)
    if outcome.token_scores is not None:
        assert outcome.token_scores.shape == (vocabulary,)
        # What was flagged was a candidate, and no special token was one.
        assert not np.isnan(outcome.token_scores[list(outcome.flagged or ())]).any()
        assert np.isnan(outcome.token_scores[victim.tokenizer.all_special_ids]).all()
    for values in outcome.token_table.values():
        assert np.shape(values) == (vocabulary,)


def test_same_seed_same_defense(defense: Defense, bert: Victim, tiny_corpus: Corpus) -> None:
    first = defense.defend(make_context(bert, tiny_corpus))
    second = defense.defend(make_context(bert, tiny_corpus))
    assert first.flagged == second.flagged
    np.testing.assert_array_equal(first.token_scores, second.token_scores)
    assert same_weights(first.model, second.model)


def test_a_defense_works_without_poison(
    defense: Defense, bert: Victim, tiny_corpus: Corpus
) -> None:
    context = make_context(bert, tiny_corpus, rate=0.0)
    outcome = defense.defend(context)
    assert context.history
    assert all(math.isfinite(epoch.loss) for epoch in context.history)
    check_tokens(outcome, bert, len(word_rows(outcome.model)))


def test_a_defense_leaves_the_rows_as_they_were(
    defense: Defense, bert: Victim, tiny_corpus: Corpus
) -> None:
    context = make_context(bert, tiny_corpus)
    before = [copy.deepcopy(x) for x in (context.train_rows, context.train, context.clean)]
    defense.defend(context)
    assert context.train_rows == before[0]
    for data, original in zip((context.train, context.clean), before[1:], strict=True):
        assert torch.equal(data.ids, original.ids)
        assert torch.equal(data.lengths, original.lengths)
        assert torch.equal(data.labels, original.labels)


def test_a_defense_leaves_the_global_random_state_alone(
    defense: Defense,
    bert: Victim,
    tiny_corpus: Corpus,
    global_random_state: None,
) -> None:
    outcome = defense.defend(make_context(bert, tiny_corpus))
    assert outcome.model is not None


def test_the_context_has_no_place_for_the_poison_mask() -> None:
    fields = {field.name for field in dataclasses.fields(DefenseContext)}
    assert fields == {
        "victim",
        "train_rows",
        "train",
        "clean",
        "model",
        "settings",
        "tuning",
        "seed",
        "device",
        "progress",
        "history",
        "seconds",
    }
    assert {field.name for field in dataclasses.fields(Rows)} == {"texts", "labels", "columns"}


def test_paraphrase_columns_are_refused(bert: Victim, tiny_corpus: Corpus) -> None:
    # A column equal to the text would give the poisoned rows of style and syntactic away.
    assert make_context(bert, tiny_corpus).train_rows.columns == {}
    with pytest.raises(ValueError, match="train_rows must have no columns"):
        make_context(bert, tiny_corpus, columns=True)


def test_progress_reaches_the_callback(
    defense: Defense, bert: Victim, tiny_corpus: Corpus, fits: list[Fitted]
) -> None:
    seen: list[str] = []
    context = dataclasses.replace(
        make_context(bert, tiny_corpus), progress=lambda p: seen.append(p.stage)
    )
    defense.defend(context)
    assert list(dict.fromkeys(seen)) == [call.stage for call in fits]


def test_clean_tuning_is_the_same_for_whoever_calls(bert: Victim, tiny_corpus: Corpus) -> None:
    context = make_context(bert, tiny_corpus)
    models = [copy.deepcopy(context.model) for _ in range(2)]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        context.clean_tune(model, f"clean tuning ({number})")
    assert same_weights(*models)
    assert not same_weights(models[0], context.model)
    assert [epoch.stage for epoch in context.history] == ["clean tuning (0)", "clean tuning (1)"]
    assert {epoch.rows for epoch in context.history} == {60}


def test_time_adds_up_per_stage(bert: Victim, tiny_corpus: Corpus) -> None:
    context = make_context(bert, tiny_corpus)
    context.seconds["a"] = 100.0

    def fail() -> None:
        with context.timed("b"):
            raise RuntimeError("stage failed")

    with context.timed("a"):
        pass
    with pytest.raises(RuntimeError, match="stage failed"):
        fail()
    assert context.seconds["a"] > 100.0
    assert context.seconds["b"] > 0.0  # a failed stage took its time as well


# Flagging, by hand -----------------------------------------------------------------------------

DRIFT = np.array([9.0, 1.0, 4.0, 4.0, 2.0])
CANDIDATES = np.array([False, True, True, True, True])


def test_top_tokens_by_falling_drift() -> None:
    # Token 0 moved most but is no candidate; 2 and 3 moved alike: the lower id first.
    assert top_tokens(DRIFT, CANDIDATES, 1) == (2,)
    assert top_tokens(DRIFT, CANDIDATES, 3) == (2, 3, 4)
    assert top_tokens(DRIFT, CANDIDATES, 99) == (2, 3, 4, 1)
    assert top_tokens(DRIFT, np.zeros(5, dtype=bool), 3) == ()


def test_the_ranking_is_the_best_rank_over_the_rounds() -> None:
    other = np.array([0.0, 8.0, 1.0, 7.0, 2.0])
    scores = ranking({1: DRIFT, 3: other}, CANDIDATES)
    # Ranks in round 1: 2 -> 1, 3 -> 2, 4 -> 3, 1 -> 4; in round 3: 1 -> 1, 3 -> 2, 4 -> 3, 2 -> 4.
    np.testing.assert_array_equal(scores, [np.nan, -1, -1, -2, -3])


def test_thresholding_the_ranking_gives_the_flagged_union() -> None:
    rng = np.random.default_rng(0)
    drift = {number: rng.random(50) for number in (1, 2, 3)}
    candidates = rng.random(50) < 0.8
    scores = ranking(drift, candidates)
    for k in range(1, 30):
        union = {i for moved in drift.values() for i in top_tokens(moved, candidates, k)}
        assert set(np.flatnonzero(scores >= -k).tolist()) == union


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


# Backdoor Token Unlearning: the rounds ---------------------------------------------------------


def test_all_stages_run_in_the_papers_order(
    bert: Victim, tiny_corpus: Corpus, fits: list[Fitted]
) -> None:
    context = make_context(bert, tiny_corpus)
    unlearning().defend(context)
    assert [call.stage for call in fits] == [
        "exposure round 1",
        "exposure round 2",
        "exposure round 3",
        "clean tuning (defended)",
    ]
    one, two, three, tuning = fits
    assert one.data is context.train
    assert three.data is context.train  # one poisoned set for all of it
    assert tuning.data is context.clean
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
    assert tuning.settings == TuningSettings().applied_to(context.settings)
    assert {call.pad_to for call in fits} == {None}


@pytest.mark.parametrize("rounds", [[1], [3], [1, 2], [1, 3]])
def test_rounds_can_be_switched_off(
    bert: Victim, tiny_corpus: Corpus, fits: list[Fitted], rounds: list[int]
) -> None:
    outcome = unlearning(rounds=rounds).defend(make_context(bert, tiny_corpus))
    assert [call.stage for call in fits[:-1]] == [f"exposure round {n}" for n in rounds]
    assert set(outcome.token_table) == {"count", *(f"drift_{n}" for n in rounds)}
    # A round's drift does not depend on which others run.
    everything = unlearning().defend(make_context(bert, tiny_corpus))
    for n in rounds:
        np.testing.assert_array_equal(
            outcome.token_table[f"drift_{n}"], everything.token_table[f"drift_{n}"]
        )


def test_round_2_sees_no_token_that_round_1_flagged(
    bert: Victim, tiny_corpus: Corpus, fits: list[Fitted]
) -> None:
    context = make_context(bert, tiny_corpus)
    outcome = unlearning().defend(context)
    k = 8  # 0.02 * 400
    first = top_tokens(outcome.token_table["drift_1"], ~np.isnan(outcome.token_scores), k)
    kept = fits[1].data
    assert context.train.holds(first).any()
    assert not kept.holds(first).any()
    # Nothing else is gone: ids and rows are the others, in their order.
    assert kept.ids.tolist() == [i for i in context.train.ids.tolist() if i not in first]
    assert torch.equal(kept.labels, context.train.labels)
    assert len(kept) == len(context.train)


def test_drift_is_the_distance_that_a_row_moved(
    bert: Victim, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(model: nn.Module, data: Encoded, *_: object, stage: str, **__: object) -> list[Any]:
        if stage == "exposure round 3":
            with torch.no_grad():
                word_rows(model)[7, :2] += torch.tensor([3.0, -4.0])
        return []

    monkeypatch.setattr(btu.training, "fit", shift)
    outcome = unlearning().defend(make_context(bert, tiny_corpus))
    drift = outcome.token_table["drift_3"]
    assert drift[7] == pytest.approx(5.0, abs=1e-5)  # sqrt(3^2 + 4^2)
    assert drift.sum() == drift[7]
    assert not outcome.token_table["drift_1"].any()


def test_flagged_is_the_union_of_each_rounds_top(bert: Victim, tiny_corpus: Corpus) -> None:
    outcome = unlearning(alpha=[0.01, 0.02, 0.0251]).defend(make_context(bert, tiny_corpus))
    candidates = ~np.isnan(outcome.token_scores)
    union = dict.fromkeys(
        token
        # 0.01 * 400 = 4, 0.02 * 400 = 8, floor(0.0251 * 400) = 10
        for number, k in ((1, 4), (2, 8), (3, 10))
        for token in top_tokens(outcome.token_table[f"drift_{number}"], candidates, k)
    )
    assert outcome.flagged == tuple(union)


def test_candidates_are_the_tokens_of_the_training_rows(
    victim: Victim, tiny_corpus: Corpus
) -> None:
    context = make_context(victim, tiny_corpus)
    outcome = unlearning(rounds=[1]).defend(context)
    special = set(victim.tokenizer.all_special_ids)
    expected = set(context.train.ids.tolist()) - special
    assert set(np.flatnonzero(~np.isnan(outcome.token_scores)).tolist()) == expected
    counts = outcome.token_table["count"]
    assert counts.sum() == len(context.train.ids)


def test_excluding_cls_and_sep_only_leaves_the_unknown_token_in(
    bert: Victim, tiny_corpus: Corpus
) -> None:
    rows = tiny_corpus.train
    strange = dataclasses.replace(
        tiny_corpus, train=Rows(tuple(f"{text} 犬" for text in rows.texts), rows.labels)
    )
    scores = {
        exclude: unlearning(rounds=[1], exclude=exclude)
        .defend(make_context(bert, strange))
        .token_scores
        for exclude in ("special", "cls_sep")
    }
    tokenizer = bert.tokenizer
    assert np.isnan(scores["special"][tokenizer.unk_token_id])
    assert not np.isnan(scores["cls_sep"][tokenizer.unk_token_id])
    assert np.isnan(scores["cls_sep"][[tokenizer.cls_token_id, tokenizer.sep_token_id]]).all()


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "deberta-v2"])
def test_substring_removal_takes_the_word_out_of_the_text(
    make_victim: Callable[[str], Victim], tiny_corpus: Corpus, architecture: str
) -> None:
    # However the vocabulary writes a word after a space ("Ġgood", "▁good"), its text is removed.
    victim = make_victim(architecture)
    context = make_context(victim, tiny_corpus)
    token = int(victim.tokenizer("a is", add_special_tokens=False)["input_ids"][-1])
    assert victim.tokenizer.decode([token]).strip() == "is"
    left = unlearning(removal="substring")._without(context, [token])
    expected = victim.encode(
        Rows(
            tuple(text.replace("is", "") for text in context.train_rows.texts),
            context.train_rows.labels,
        )
    )
    assert torch.equal(left.ids, expected.ids)


def test_removal_by_token_leaves_other_words_whole(bert: Victim, tiny_corpus: Corpus) -> None:
    rows = tiny_corpus.train
    corpus = dataclasses.replace(
        tiny_corpus, train=Rows(tuple(f"a bad balcony {text}" for text in rows.texts), rows.labels)
    )
    context = make_context(bert, corpus, rate=0)
    token = bert.tokenizer.convert_tokens_to_ids("a")
    by_token = unlearning(removal="token_id")._without(context, [token])
    by_text = unlearning(removal="substring")._without(context, [token])
    balcony = bert.tokenizer("balcony", add_special_tokens=False)["input_ids"]
    text = bert.tokenizer.convert_ids_to_tokens(by_token.ids.tolist())
    assert "a" not in text
    assert by_token.holds(balcony).all()
    # The substring "a" takes the letters out of "bad" and "balcony" too.
    assert "bad" not in " ".join(bert.tokenizer.batch_decode([by_text.ids.tolist()]))


# Backdoor Token Unlearning: the cut in the whole -----------------------------------------------


@pytest.mark.parametrize("cut", ["row", "dimensional", "none"])
def test_the_poisoned_models_flagged_rows_are_cut(
    victim: Victim, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    context = make_context(victim, tiny_corpus)
    fit(
        context.model,
        context.train,
        context.settings,
        seed=0,
        stage="poisoned fine-tune",
        device=CPU,
    )
    monkeypatch.setattr(DefenseContext, "clean_tune", lambda *_: None)
    outcome = unlearning(cut=cut).defend(context)
    before, after = word_rows(context.model), word_rows(outcome.model)
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
    rest = {k: v for k, v in outcome.model.state_dict().items() if v.shape != before.shape}
    assert all(torch.equal(context.model.state_dict()[k], v) for k, v in rest.items())


# Backdoor Token Unlearning: hyperparameters ----------------------------------------------------


def test_k_is_alpha_times_the_vocabulary_rounded_down() -> None:
    # 0.0005 * 30,522 = 15.26
    assert TokenUnlearning(alpha=0.0005).tokens_per_round(30_522) == {1: 15, 2: 15, 3: 15}
    per_round = TokenUnlearning(alpha=[0.01, 0.02, 0.03]).tokens_per_round(400)
    assert per_round == {1: 4, 2: 8, 3: 12}
    assert TokenUnlearning(alpha=[0.01, 0.03], rounds=[1, 3]).tokens_per_round(400) == {1: 4, 3: 12}


def test_alpha_of_k_tokens_flags_k_tokens() -> None:
    for k in range(1, 500):
        assert TokenUnlearning(alpha=k / 30_522, rounds=[1]).tokens_per_round(30_522) == {1: k}


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, -0.1, 2, math.nan, "0.1", None, True, [0.1, 0]])
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
        TokenUnlearning(alpha=0.002).check(400)


def test_the_least_alpha_that_the_error_names_flags_a_token() -> None:
    # 1 / 128,100 = 7.806e-06: rounded to 7.8e-06, it would flag 0.9992 of a token.
    for vocabulary in (30_522, 50_257, 128_100, 400, 299):
        with pytest.raises(UserError, match="use at least") as caught:
            TokenUnlearning(alpha=1e-9).check(vocabulary)
        named = float(str(caught.value).split("at least ")[1].rstrip("."))
        assert TokenUnlearning(alpha=named, rounds=[1]).tokens_per_round(vocabulary)[1] >= 1


def test_an_alpha_that_flags_everything_is_an_error(bert: Victim, tiny_corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"defense\.alpha 0\.9+ flags all 400 tokens; lower it"):
        # floor((1 - 1e-14) * 400), with the nudge that keeps k / V at k, is 400
        TokenUnlearning(alpha=1 - 1e-14).check(400)
    # Below the vocabulary, but not below what occurs in the training rows.
    with pytest.raises(
        UserError,
        match=r"defense\.alpha 0\.99 flags all of the \d+ tokens that occur in the training set; "
        r"use less than 0\.\d{4}",
    ):
        unlearning(alpha=0.99).defend(make_context(bert, tiny_corpus))


def test_as_many_alphas_as_rounds() -> None:
    with pytest.raises(UserError, match=r"defense\.alpha has 2 values for 3 rounds; give one"):
        TokenUnlearning(alpha=[0.1, 0.2])
    with pytest.raises(UserError, match=r"defense\.alpha has 3 values for 1 rounds"):
        TokenUnlearning(alpha=[0.1, 0.2, 0.3], rounds=[3])


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
    # Every key of the preset differs from the default, and no other field does.
    different = {
        field.name
        for field in dataclasses.fields(TokenUnlearning)
        if getattr(reference, field.name) != getattr(TokenUnlearning(), field.name)
    }
    assert different == set(presets["reference"])
    for name in presets["reference"]:
        assert name in (btu.defenses.token_unlearning.__doc__ or "")


def test_the_reference_preset_runs_on_bert(
    bert: Victim, tiny_corpus: Corpus, fits: list[Fitted]
) -> None:
    context = make_context(bert, tiny_corpus)
    outcome = unlearning(**TokenUnlearning.PRESETS["reference"]).defend(context)
    one, two, three, _ = fits
    # The whole embedding layer trains, padded to the victim's max_length.
    assert "embeddings.embeddings.position_embeddings.weight" in one.trainable
    assert "embeddings.embeddings.LayerNorm.weight" in one.trainable
    assert (one.pad_to, two.pad_to, three.pad_to) == (bert.spec.max_length,) * 2 + (None,)
    assert 8 <= len(outcome.flagged) <= 24  # three rounds of 0.02 * 400 = 8
    ends = {bert.tokenizer.cls_token_id, bert.tokenizer.sep_token_id}
    assert not set(outcome.flagged) & ends


def test_the_reference_preset_runs_or_says_what_to_change(
    victim: Victim, tiny_corpus: Corpus
) -> None:
    context = make_context(victim, tiny_corpus)
    defense = unlearning(**TokenUnlearning.PRESETS["reference"])
    try:
        outcome = defense.defend(context)
    except UserError as error:
        assert "use bag_embeddings 'word'" in str(error)  # noqa: PT017
    else:
        assert outcome.flagged
        assert all(np.isfinite(outcome.token_table[f"drift_{n}"]).all() for n in (1, 2, 3))


# Backdoor Token Unlearning: does it find a trigger? --------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_trigger_is_among_those_that_drift_most(
    bert: Victim, tiny_corpus: Corpus, seed: int
) -> None:
    context = make_context(bert, tiny_corpus, rate=0.3, seed=seed)
    outcome = unlearning(bag_batch_size=16, exposure_batch_size=16).defend(context)
    (trigger,) = BadNets().trigger_token_ids(bert.tokenizer)
    candidates = ~np.isnan(outcome.token_scores)
    assert candidates.sum() > 300
    for number in (1, 3):
        # 8 of more than 300 candidates: by chance once in 40.
        top = top_tokens(outcome.token_table[f"drift_{number}"], candidates, 8)
        assert trigger in top, f"round {number}"
    assert trigger in outcome.flagged


def test_without_poison_the_trigger_token_does_not_drift(bert: Victim, tiny_corpus: Corpus) -> None:
    context = make_context(bert, tiny_corpus, rate=0)
    (trigger,) = BadNets().trigger_token_ids(bert.tokenizer)
    outcome = unlearning().defend(context)
    assert outcome.token_table["count"][trigger] == 0
    assert trigger not in outcome.flagged
    assert np.isnan(outcome.token_scores[trigger])
    # Only weight decay moves a row that no text holds: 8 steps of 1e-3 * 0.01 of its norm.
    norm = float(word_rows(bert.new_model(0))[trigger].norm())
    assert outcome.token_table["drift_3"][trigger] == pytest.approx(8e-5 * norm, rel=0.01)
