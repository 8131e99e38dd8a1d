"""MuScleLoRA: low-rank updates, their scalings, aligned gradients, merging."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_cells import Lab, easy_corpus
from torch import nn

from btu.defenses.base import Given
from btu.defenses.kit.low_rank import LowRank, group_factors, low_rank
from btu.defenses.low_rank_training import LowRankTraining, align, aligned
from btu.errors import UserError
from btu.recipe import Prepared, evaluation
from btu.settings import TrainSettings
from btu.stage_files import model_of
from btu.stages import StageRun, compute, read_record
from btu.training import Encoded, cross_entropy, logits_of
from btu.types import Corpus
from btu.victims import Victim

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"clean_rows": 30, "rank": 4, "epochs": 1}
# Enough for the tiny victim to learn the easy corpus through updates of rank 8.
LEARNING: dict[str, Any] = {"clean_rows": 30, "rank": 8, "epochs": 40, "learning_rate": 2e-3}


def training(**changes: Any) -> LowRankTraining:
    return LowRankTraining(**SMALL | changes)


@pytest.fixture(scope="module")
def poisoned(lab: Lab, tiny_corpus: Corpus) -> Prepared:
    """A cell whose task the tiny victim learns, with a trigger in 30 % of the rows."""
    train = TrainSettings(epochs=12, learning_rate=1e-2, batch_size=32, precision="fp32")
    return lab.prepare(corpus=easy_corpus(tiny_corpus), rate=0.3, train=train)


def facts_of(lab: Lab, prepared: Prepared, defense: LowRankTraining) -> dict[str, Any]:
    """The defense's own facts, and under ``scored`` those of its evaluation."""
    last = defense.stages(prepared.foundation)
    scored = read_record(compute(evaluation(prepared, last, "defended"), lab.root))["facts"]
    facts: dict[str, Any] = read_record(lab.root / last.key)["facts"]
    return {**facts, "scored": scored}


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 6, 4 and 2 tokens."""
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    return torch.arange(18).view(3, 6) + 10, mask


def test_outputs_are_grouped_in_order_with_a_factor_each() -> None:
    # 6 outputs in 3 groups of 2; 5 in 2 groups of 3 and 2.
    assert group_factors(6, [1.0, 2.0, 4.0]).tolist() == [1, 1, 2, 2, 4, 4]
    assert group_factors(5, [1.0, 3.0]).tolist() == [1, 1, 1, 3, 3]
    assert group_factors(3, [2.0]).tolist() == [2, 2, 2]


def test_an_update_is_its_matrix_applied() -> None:
    update = LowRank(2, 1, torch.tensor([1.0, 10.0]), torch.Generator().manual_seed(0))
    with torch.no_grad():
        update.down.copy_(torch.tensor([[1.0, 2.0]]))
        update.up.copy_(torch.tensor([[3.0], [4.0]]))
    # down @ (1, 1) = 3; up gives (9, 12), times the factors (9, 120).
    assert update(torch.ones(2)).tolist() == [9.0, 120.0]
    # (3, 4) times (1, 2), the second row times 10.
    assert update.update().tolist() == [[3.0, 6.0], [40.0, 80.0]]


def test_an_update_changes_nothing_at_first_and_is_merged_at_the_end(victim: Victim) -> None:
    model, fresh = victim.new_model(0), victim.new_model(0)
    inputs = ids_and_mask()
    with torch.no_grad():
        plain = logits_of(model, *inputs)
        with low_rank(model, 4, 8.0, [1.0, 2.0], seed=0) as updates:
            assert torch.equal(logits_of(model, *inputs), plain)
            for update in updates.values():
                update.up.normal_(0, 0.3)
            learned = logits_of(model, *inputs)
        merged = logits_of(model, *inputs)
    assert not torch.allclose(learned, plain, atol=1e-4)
    torch.testing.assert_close(merged, learned, atol=1e-5, rtol=1e-4)
    # A plain model again, all of it trainable, with another weight in every matrix but no other.
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    old = fresh.state_dict()
    changed = {name for name, value in model.state_dict().items() if not value.equal(old[name])}
    prefix = model.base_model_prefix
    assert changed == {f"{prefix}.{name}.weight" for name in updates}


def test_the_rank_of_a_merged_change_is_at_most_that_of_the_update(bert: Victim) -> None:
    model, fresh = bert.new_model(0), bert.new_model(0)
    with low_rank(model, 3, 6.0, [1.0, 2.0, 3.0], seed=0) as updates, torch.no_grad():
        for update in updates.values():
            update.up.normal_()
    for name in updates:
        first, second = (m.base_model.get_submodule(name).weight for m in (model, fresh))
        change = (first - second).detach()  # type: ignore[operator]
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3, name


def test_only_updates_and_classifier_learn(victim: Victim) -> None:
    model = victim.new_model(0)
    with low_rank(model, 2, 4.0, [1.0], seed=0) as updates:
        learn = {name for name, weight in model.named_parameters() if weight.requires_grad}
    prefix = model.base_model_prefix
    inside = {name for name in learn if name.startswith(f"{prefix}.")}
    assert inside == {
        f"{prefix}.{name}.low_rank.{part}" for name in updates for part in ("down", "up")
    }
    outside = {name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")}
    assert learn - inside == outside
    assert outside


def test_a_rank_that_is_not_low_is_an_error(bert: Victim) -> None:
    model = bert.new_model(0)
    message = r"rank must be below the smaller side of every matrix, got 16: encoder.* has 16"
    with pytest.raises(UserError, match=message), low_rank(model, 16, 1.0, [1.0], seed=0):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_a_classifier_of_its_own_is_an_error(bert: Victim) -> None:
    inner: Any = bert.new_model(0).base_model
    message = r"cannot tell the classifier of a BertModel"
    with pytest.raises(UserError, match=message), low_rank(inner, 2, 1.0, [1.0], seed=0):
        pass


@pytest.mark.parametrize(
    ("own", "share", "wanted"),
    [
        # guide (2, 0): <own, guide> = 6, / 4 = 1.5, so that the projection is (3, 0).
        ((3.0, 4.0), 1.0, (3.0, 0.0)),
        ((3.0, 4.0), 0.0, (3.0, 4.0)),
        # A quarter of (3, 4) and three of (3, 0).
        ((3.0, 4.0), 0.75, (3.0, 1.0)),
        # The two disagree: nothing of the projection is left.
        ((-3.0, 4.0), 1.0, (0.0, 0.0)),
        ((-3.0, 4.0), 0.5, (-1.5, 2.0)),
    ],
)
def test_a_gradient_is_partly_replaced_by_its_projection_on_the_guide(
    own: tuple[float, ...], share: float, wanted: tuple[float, ...]
) -> None:
    # All parameters are one vector: here they are two of one element each.
    given, guide = ([torch.tensor([v]) for v in values] for values in (own, (2.0, 0.0)))
    found = [float(g) for g in align(given, guide, share)]
    assert found == pytest.approx(wanted)


def test_a_guide_of_length_0_has_no_projection() -> None:
    found = align([torch.tensor([3.0])], [torch.tensor([0.0])], 0.5)
    assert found[0].tolist() == [1.5]


def test_the_objective_has_the_value_of_the_loss_and_the_aligned_gradients(bert: Victim) -> None:
    model = bert.new_model(0)
    guides = Encoded.from_lists([[2, 20, 21, 3], [2, 22, 3]], [1, 0], 0)
    ids, mask = ids_and_mask()
    labels = torch.tensor([0, 1, 1])
    loss, logits = cross_entropy(model, ids, mask, labels)
    parameters = list(model.parameters())
    own = torch.autograd.grad(loss, parameters, materialize_grads=True)
    # Both clean rows are drawn, since the batch has three; their order changes no mean.
    guide_loss = cross_entropy(model, *guides.batch(torch.tensor([0, 1]), 4))[0]
    guide = torch.autograd.grad(guide_loss, parameters, materialize_grads=True)
    value, found_logits = aligned(guides, 0.75, np.random.default_rng(0))(model, ids, mask, labels)
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert torch.equal(found_logits, logits)
    for parameter, wanted in zip(parameters, align(own, guide, 0.75), strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-4)


def test_the_model_differs_from_the_pretrained_one_in_matrices_and_classifier_only(
    lab: Lab, bert: Victim
) -> None:
    prepared = lab.prepare()
    last = training().stages(prepared.foundation)
    folder = compute(last, lab.root)
    model = model_of(StageRun({}, {}, {"it": folder}, folder, CPU), "it")
    fresh: nn.Module = bert.new_model(0)
    old = fresh.state_dict()
    changed = [name for name, value in model.state_dict().items() if not value.equal(old[name])]
    facts = read_record(folder)["facts"]
    # In each of 2 layers: query, key, value, output and two of feed-forward; and the pooler.
    assert facts["matrices"] == 2 * 6 + 1
    assert len(changed) == facts["matrices"] + 2
    assert {name for name in changed if not name.endswith(".weight")} == {"classifier.bias"}
    # The 16 x 16 matrices have updates of 2 * 4 * 16 numbers, the 16 x 32 ones of 4 * (16 + 32);
    # the classifier has 2 * 16 + 2.
    assert facts["trained_parameters"] == 9 * 128 + 4 * 192 + 34


def test_along_the_clean_gradients_the_trigger_is_not_learned(lab: Lab, poisoned: Prepared) -> None:
    plain = facts_of(lab, poisoned, training(**LEARNING, alignment=0.0))["scored"]
    guided = facts_of(lab, poisoned, training(**LEARNING, alignment=1.0))["scored"]
    assert plain["asr"]["hits"] >= 0.9 * plain["asr"]["n"]
    assert guided["asr"]["hits"] <= 0.3 * guided["asr"]["n"]
    assert guided["cacc"]["hits"] >= 0.7 * guided["cacc"]["n"]


def test_held_out_accuracy_is_that_of_the_rows_that_do_not_guide(
    lab: Lab, poisoned: Prepared
) -> None:
    some = facts_of(lab, poisoned, training())["measured"]["held_out_accuracy"]
    # 30 of the 60 clean rows are held out: a share of 30.
    assert some * 30 == pytest.approx(round(some * 30))
    none = facts_of(lab, poisoned, training(clean_rows=60))["measured"]["held_out_accuracy"]
    assert np.isnan(none)


def test_every_setting_acts(lab: Lab) -> None:
    foundation = lab.prepare().foundation
    changes: list[dict[str, Any]] = [
        {},
        {"clean_rows": 20},
        {"rank": 2},
        {"alpha": 8.0},
        {"scalings": [1]},
        {"alignment": 0.0},
        {"epochs": 2},
        {"learning_rate": 1e-4},
    ]
    folders = [compute(training(**c).stages(foundation), lab.root) for c in changes]
    weights = {(folder / "model" / "model.safetensors").read_bytes() for folder in folders}
    assert len(weights) == len(changes)
    # Null is the default, and a number is a list of one.
    keys = [training(scalings=s).stages(foundation).key for s in (None, [1, 2, 3, 4], 2, [2.0])]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_rows": 0}, r"defense.clean_rows must be at least 1, got 0"),
        ({"rank": 0}, r"defense.rank must be at least 1, got 0"),
        ({"epochs": 1.5}, r"defense.epochs must be a whole number of at least 1, got 1.5"),
        ({"alpha": 0.0}, r"defense.alpha must be above 0, got 0.0"),
        ({"learning_rate": -1.0}, r"defense.learning_rate must be above 0, got -1.0"),
        ({"alignment": 1.2}, r"defense.alignment must be in \[0, 1\], got 1.2"),
        ({"scalings": []}, r"defense.scalings must be a list of at least one factor, got \[\]"),
        ({"scalings": [1, 0]}, r"defense.scalings must be above 0, got 0"),
        ({"scalings": "1"}, r"defense.scalings must be above 0, got '1'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LowRankTraining(**settings)


def test_a_cell_with_too_few_clean_rows_is_refused() -> None:
    cell = Given(400, classes=2, train_rows=240, clean_rows=60)
    training(clean_rows=60).check(cell)
    with pytest.raises(UserError, match=r"at most the 60 clean rows that there are, got 128"):
        LowRankTraining().check(cell)
