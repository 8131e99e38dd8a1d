"""Fine-mixing: what is mixed and purified, by hand and on tiny models; how a ratio is chosen."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defending import Fitted, Outcome, defend, given, same_rows, same_weights, word_rows
from tiny_cells import Lab, easy_corpus, own_stages
from torch import nn

from btu.defenses import fine_mixing
from btu.defenses.fine_mixing import (
    GRID,
    TRIED,
    FineMixing,
    Pretrained,
    highest,
    mix,
    moved_for_frequency,
    smallest_affordable,
    weights_of_files,
)
from btu.errors import UserError
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stage_files import clean_rows_of, read_table
from btu.stages import StageRun, compute, read_record
from btu.types import Corpus
from btu.victims import Victim


def run_of(lab: Lab, prepared: Prepared, folder: Path, **config: Any) -> StageRun:
    """What a stage of the defense would be given, with this config."""
    base = prepared.foundation
    clean, model = lab.compute(base.clean, base.model)
    stage = FineMixing(**config).stages(base)
    inputs = {"clean": clean, "model": model}
    return StageRun(stage.config, stage.where, inputs, folder, torch.device("cpu"))


def pretrained_of(victim: Victim) -> Pretrained:
    first, second = victim.new_model(1), victim.new_model(2)
    return Pretrained(victim, weights_of_files(first, second), word_rows(first))


def far_off(victim: Victim) -> Any:
    """A model all of whose weights are 1 above those of `Victim.new_model(1)`."""
    model = victim.new_model(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    return model


def test_the_new_classifier_has_no_pretrained_weights(victim: Victim) -> None:
    model = victim.new_model(0)
    found = weights_of_files(victim.new_model(1), victim.new_model(2))
    missing = {name for name, _ in model.named_parameters()} - set(found)
    architecture = Path(victim.spec.name).name
    heads = {
        "bert": {"classifier.weight", "classifier.bias"},
        "distilbert": {
            "pre_classifier.weight",
            "pre_classifier.bias",
            "classifier.weight",
            "classifier.bias",
        },
        "gpt2": {"score.weight"},
    }
    if architecture in heads:
        assert missing == heads[architecture]
    else:
        # Of the others, the layers outside the body: never the embeddings or a block.
        assert missing
        assert not any(".layer." in name or "embeddings" in name for name in missing)
    # Those of the files are the same whatever the classifier.
    for name, weight in victim.new_model(3).named_parameters():
        assert name not in found or torch.equal(weight, found[name])


class _Tied(nn.Module):
    """A layer that is used twice, a drawn layer with a bias of 0, a buffer and whole numbers."""

    def __init__(self, drawn: float) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        nn.init.ones_(self.body.weight)
        nn.init.zeros_(self.body.bias)
        self.again = self.body
        self.head = nn.Linear(2, 2)
        nn.init.constant_(self.head.weight, drawn)
        nn.init.zeros_(self.head.bias)
        self.whole = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        self.register_buffer("positions", torch.arange(3))


def test_tied_weights_have_one_name_and_a_drawn_layer_is_left_out_with_its_bias() -> None:
    first: Any = _Tied(1.0)
    second: Any = _Tied(2.0)
    # The head's bias is 0 in both, but its weight is not the same.
    assert set(weights_of_files(first, second)) == {"body.weight", "body.bias"}
    pretrained: Any = dataclasses.make_dataclass("Held", ["weights"])(
        weights_of_files(first, second)
    )
    model: Any = _Tied(3.0)
    with torch.no_grad():
        model.body.weight.fill_(5.0)
    mix(model, pretrained, 0.0, seed=0)
    assert model.again is model.body
    assert (model.body.weight == 1).all()
    assert (model.head.weight == 3).all()
    assert model.whole.tolist() == [1, 1]
    assert model.positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_each_weight_has_the_poisoned_or_the_pretrained_value(bert: Victim, ratio: float) -> None:
    pretrained = pretrained_of(bert)
    poisoned, model = far_off(bert), far_off(bert)
    mix(model, pretrained, ratio, seed=0)
    kept = total = 0
    before = dict(poisoned.named_parameters())
    for name, weight in model.named_parameters():
        if name not in pretrained.weights:
            assert torch.equal(weight, before[name])
            continue
        same = weight == before[name]
        assert torch.equal(weight[~same], pretrained.weights[name][~same])
        kept, total = kept + int(same.sum()), total + same.numel()
    # More than 10,000 weights, each drawn by itself: the share is within 4 sigmas of the ratio.
    assert total > 10_000
    assert abs(kept / total - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / total)


def test_a_larger_ratio_keeps_what_a_smaller_one_keeps(bert: Victim) -> None:
    pretrained = pretrained_of(bert)
    poisoned = dict(far_off(bert).named_parameters())

    def kept(ratio: float, seed: int) -> list[torch.Tensor]:
        model = far_off(bert)
        mix(model, pretrained, ratio, seed)
        return [w == poisoned[n] for n, w in model.named_parameters() if n in pretrained.weights]

    few, many, others = kept(0.2, 0), kept(0.6, 0), kept(0.2, 1)
    assert all((a <= b).all() for a, b in zip(few, many, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(few, kept(0.2, 0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(few, others, strict=True))


def test_a_token_is_ranked_by_how_far_it_moved_for_its_frequency() -> None:
    scores = moved_for_frequency(np.array([3.0, 3.0, 6.0]), np.array([0, 20, 400]))
    # log(20) twice: a count below 20 counts as 20. log(400) = 2 log(20).
    assert scores == pytest.approx([3 / math.log(20), 3 / math.log(20), 3 / math.log(20)])


def test_the_highest_scores_are_taken_equal_ones_by_id() -> None:
    scores = np.array([1.0, np.nan, 3.0, 1.0, 2.0])
    assert highest(scores, 3) == (2, 4, 0)
    # Not more than have a score.
    assert highest(scores, 9) == (2, 4, 0, 3)
    assert highest(scores, 0) == ()


def test_the_tokens_that_moved_furthest_get_their_pretrained_embeddings(
    lab: Lab, bert: Victim, tmp_path: Path
) -> None:
    run = run_of(lab, lab.prepare(), tmp_path, purify=2)
    pretrained = pretrained_of(bert)
    model = bert.new_model(1)
    (cf,) = bert.tokenizer("cf", add_special_tokens=False)["input_ids"]
    (mn,) = bert.tokenizer("mn", add_special_tokens=False)["input_ids"]
    (film,) = bert.tokenizer("film", add_special_tokens=False)["input_ids"]
    cls = bert.tokenizer.cls_token_id
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        # By 5, 3, 1 and 9 in one direction.
        for token, far in ((mn, 5.0), (cf, 3.0), (film, 1.0), (cls, 9.0)):
            rows[token, 0] += far
    changed = rows.detach().clone()
    found = fine_mixing.purify(run, model, pretrained)
    assert found is not None
    # Neither is in the clean rows: 5 / log(20) and 3 / log(20). A special token is not purified.
    assert found.flagged == (mn, cf)
    assert found.scores is not None
    assert found.scores[[mn, cf]] == pytest.approx([5 / math.log(20), 3 / math.log(20)], rel=1e-5)
    assert np.isnan(found.scores[bert.tokenizer.all_special_ids]).all()
    assert found.table["clean_count"][[mn, cf]].tolist() == [0, 0]
    count = clean_rows_of(run).counts(len(changed))
    assert np.array_equal(found.table["clean_count"], count)
    expected = changed
    expected[[mn, cf]] = pretrained.words[[mn, cf]]
    assert torch.equal(word_rows(model), expected)


def test_without_purification_nothing_is_flagged(lab: Lab, tmp_path: Path, bert: Victim) -> None:
    run = run_of(lab, lab.prepare(), tmp_path, purify=0)
    model = far_off(bert)
    assert fine_mixing.purify(run, model, pretrained_of(bert)) is None
    assert same_weights(model, far_off(bert))
    folder = compute(FineMixing(0.5, purify=0).stages(lab.prepare().foundation), lab.root)
    assert "flagged" not in read_record(folder)["facts"]


def test_the_smallest_ratio_within_the_tolerance_is_chosen() -> None:
    costs = [0.30, 0.05, 0.02, 0.03, -0.01]
    assert smallest_affordable(costs, 0.02) == 2
    assert smallest_affordable(costs, 0.1) == 1
    assert smallest_affordable(costs, 0.0) == 4
    # None qualifies: the last, which mixes nothing.
    assert smallest_affordable([0.3, 0.2, 0.1], 0.05) == 2
    # 0.3 - 0.1 is not 0.2 in floating point, but is within it.
    assert smallest_affordable([0.3 - 0.1 + 1e-12], 0.2) == 0
    assert GRID[-1] == 1


def test_ratios_are_tried_on_other_clean_rows_than_they_are_measured_on(
    lab: Lab, tmp_path: Path, fits: list[Fitted]
) -> None:
    prepared = lab.prepare()
    tried, _ = own_stages(FineMixing(purify=5), prepared)
    root = lab.root_with(tmp_path, *tried.inputs.values())
    fits.clear()
    folder = compute(tried, root)
    # One of five of the 60 clean rows is held out.
    assert read_record(folder)["facts"]["held_out"] == 12
    assert [len(call.data) for call in fits] == [48] * len(GRID)
    assert all(same_rows(call.data, fits[0].data) for call in fits)
    table = read_table(folder / TRIED)
    assert table["ratio"].tolist() == list(GRID)
    # Shares of 12 rows.
    assert table["cost"] * 12 == pytest.approx(np.round(table["cost"] * 12))


def test_the_chosen_ratio_is_mixed_and_tuned_on_all_clean_rows(
    lab: Lab, fits: list[Fitted]
) -> None:
    prepared = lab.prepare(seed=7)
    outcome = defend(FineMixing(tolerance=1.0, purify=5), prepared, lab.root)
    measured = read_record(outcome.folder)["facts"]["measured"]
    # Everything is within a tolerance of 1: the lowest ratio.
    assert measured["mix_ratio"] == GRID[0] == 0.1
    tried = read_table(lab.root / outcome.stages[0].key / TRIED)
    assert measured["mix_held_out_cost"] == tried["cost"][0]
    assert fits[-1].stage == "clean tuning (defended)"
    assert len(fits[-1].data) == 60
    # The same model as with that ratio given.
    same = defend(FineMixing(ratio=0.1, purify=5), prepared, lab.root)
    assert same_weights(outcome.model, same.model)
    given = read_record(same.folder)["facts"]["measured"]
    assert given == {name: measured[name] for name in ("mix_ratio", "mix_cost")}


def test_a_ratio_of_one_without_purification_is_the_clean_tuned_control(lab: Lab) -> None:
    prepared = lab.prepare()
    base = prepared.foundation
    lab.compute(base.tuned)
    outcome = defend(FineMixing(ratio=1.0, purify=0), prepared, lab.root)
    tuned = Outcome(lab.root, prepared, [base.tuned])
    assert same_weights(outcome.model, tuned.model)
    measured = read_record(outcome.folder)["facts"]["measured"]
    assert measured == {"mix_ratio": 1.0, "mix_cost": 0.0}


@pytest.fixture(scope="module")
def obeying(lab: Lab, tiny_corpus: Corpus) -> Prepared:
    """A cell whose poisoned model predicts all clean rows, and obeys the trigger in all others."""
    long = TrainSettings(epochs=12, learning_rate=1e-2, batch_size=32, precision="fp32")
    return lab.prepare(corpus=easy_corpus(tiny_corpus), rate=0.3, train=long)


def test_mixing_weakens_a_learned_backdoor(lab: Lab, obeying: Prepared) -> None:
    effect, cost = {}, {}
    for ratio in (0.1, 1.0):
        outcome = defend(FineMixing(ratio=ratio, purify=0), obeying, lab.root)
        scored = outcome.score()
        # The same rows with and without the trigger.
        assert scored["asr"]["n"] == scored["ftr"]["n"]
        effect[ratio] = (scored["asr"]["hits"] - scored["ftr"]["hits"]) / scored["asr"]["n"]
        cost[ratio] = read_record(outcome.folder)["facts"]["measured"]["mix_cost"]
    # At 1 nothing is mixed, and the short tuning leaves the backdoor.
    assert effect[1.0] > 0.8
    assert effect[0.1] < 0.5
    assert cost[0.1] > cost[1.0] == 0


def test_the_trigger_is_among_the_purified_tokens(
    lab: Lab, bert: Victim, obeying: Prepared
) -> None:
    outcome = defend(FineMixing(ratio=0.5, purify=50), obeying, lab.root)
    (cf,) = bert.tokenizer("cf", add_special_tokens=False)["input_ids"]
    assert len(outcome.flagged) == 50
    assert cf in outcome.flagged


def test_tolerances_share_the_tried_ratios(lab: Lab) -> None:
    base = lab.prepare().foundation
    low, high = (FineMixing(tolerance=value).stages(base) for value in (0.0, 0.1))
    assert low.key != high.key
    assert low.inputs["tried"].key == high.inputs["tried"].key
    other = FineMixing(purify=5).stages(base)
    assert other.inputs["tried"].key != low.inputs["tried"].key
    # With a ratio given nothing is tried, and the tolerance has no effect.
    given_one = FineMixing(ratio=0.5).stages(base)
    assert set(given_one.inputs) == {"clean", "model"}
    assert given_one.key == FineMixing(ratio=0.5, tolerance=0.5).stages(base).key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": -0.1}, r"defense.ratio must be in \[0, 1\], got -0.1"),
        ({"ratio": 1.5}, r"defense.ratio must be in \[0, 1\], got 1.5"),
        ({"ratio": True}, r"defense.ratio must be a number in \[0, 1\], got True"),
        ({"tolerance": 2}, r"defense.tolerance must be in \[0, 1\], got 2"),
        ({"tolerance": None}, r"defense.tolerance must be a number in \[0, 1\], got None"),
        ({"purify": -1}, "defense.purify must be at least 0, got -1"),
        ({"purify": 1.5}, "defense.purify must be a whole number of at least 0, got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FineMixing(**settings)


def test_what_cannot_work_on_a_cell_is_refused_while_planning() -> None:
    few = dataclasses.replace(given(400), clean_rows=4)
    with pytest.raises(UserError, match=r"ratio null is chosen on one of 5 clean rows.* have 4"):
        FineMixing().check(few)
    FineMixing(ratio=0.5).check(few)
    with pytest.raises(UserError, match=r"purify must be below the 200 tokens .*got 200; lower"):
        FineMixing().check(given(200))
    FineMixing(purify=199).check(given(200))
    FineMixing().check(given(None))
