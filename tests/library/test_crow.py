"""CROW: the consistency loss, its perturbation, the objective, the rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from defending import defend, given, same_weights
from tiny_cells import Lab
from torch import Tensor

from btu.defenses.crow import Crow, consistency_loss, consistent, drawn_rows, layer_states
from btu.errors import UserError
from btu.stage_files import clean_rows_of
from btu.stages import compute, read_record
from btu.training import cross_entropy, logits_of
from btu.victims import Victim

SMALL: dict[str, Any] = {"clean_rows": 30, "epochs": 2, "learning_rate": 1e-3}


def batch(victim: Victim) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows of 6, 4 and 2 tokens, the shorter ones padded."""
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    ids = torch.arange(18).view(3, 6) + 10
    return torch.where(mask, ids, victim.tokenizer.pad_token_id), mask, torch.tensor([0, 1, 1])


# The loss ---------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_1_minus_cosine_over_tokens_and_pairs() -> None:
    # One row of two tokens, three layers.
    first = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    second = torch.tensor([[[0.0, 2.0], [6.0, 8.0]]])
    third = torch.tensor([[[0.0, -1.0], [4.0, -3.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # Token 1: cosines 0 and -1; token 2: 1 and (24 - 24) / 50 = 0.
    # 1 - cosine: 1, 2, 0, 1; their mean is 1.
    assert float(consistency_loss([first, second, third], mask)) == pytest.approx(1.0)
    # Of the first pair alone: (1 + 0) / 2.
    assert float(consistency_loss([first, second], mask)) == pytest.approx(0.5)


def test_padding_is_no_part_of_the_loss() -> None:
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    second = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    # Real tokens: 1, 0 and 0; the padding would add 2.
    assert float(consistency_loss([first, second], mask)) == pytest.approx(1 / 3)


# The passes -------------------------------------------------------------------------------------


def test_a_pass_gives_the_models_own_logits_and_states(victim: Victim) -> None:
    model = victim.new_model(0)
    ids, mask, _ = batch(victim)
    logits, states, embedded = layer_states(model, ids, mask)
    torch.testing.assert_close(logits, logits_of(model, ids, mask))
    output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    assert len(states) == model.config.num_hidden_layers
    for found, known in zip(states, output.hidden_states[1:], strict=True):
        torch.testing.assert_close(found, known)
    torch.testing.assert_close(embedded, model.get_input_embeddings()(ids))
    # The hook is gone again.
    assert not model.get_input_embeddings()._forward_hooks


def test_what_is_added_moves_the_input_embeddings(victim: Victim) -> None:
    model = victim.new_model(0)
    ids, mask, _ = batch(victim)
    _, states, embedded = layer_states(model, ids, mask)
    added = 0.5 * torch.ones_like(embedded).cumsum(-1).sin()
    _, moved, there = layer_states(model, ids, mask, added)
    torch.testing.assert_close(there, embedded + added)
    assert not torch.allclose(moved[0], states[0])
    _, still, _ = layer_states(model, ids, mask, 0 * added)
    torch.testing.assert_close(still[-1], states[-1])


def test_padding_has_no_slope(victim: Victim) -> None:
    model = victim.new_model(0)
    ids, mask, _ = batch(victim)
    _, states, embedded = layer_states(model, ids, mask)
    (slope,) = torch.autograd.grad(consistency_loss(states, mask), [embedded])
    assert bool((slope[~mask] == 0).all())
    assert bool((slope[mask] != 0).any(dim=-1).all())


# The objective ----------------------------------------------------------------------------------


def test_the_objective_is_the_tasks_loss_and_alpha_times_the_consistency_loss(
    victim: Victim,
) -> None:
    model = victim.new_model(0)
    rows = batch(victim)
    plain, logits = cross_entropy(model, *rows)
    _, states, _ = layer_states(model, *rows[:2])
    apart = consistency_loss(states, rows[1])
    loss, found = consistent(3.0, 0.0)(model, *rows)
    torch.testing.assert_close(found, logits)
    # Without a perturbation: the states are those of the rows themselves.
    torch.testing.assert_close(loss, plain + 3.0 * apart)


def test_the_perturbation_is_epsilon_times_the_sign_of_the_slope(victim: Victim) -> None:
    model = victim.new_model(0)
    ids, mask, labels = batch(victim)
    plain, _ = cross_entropy(model, ids, mask, labels)
    _, states, embedded = layer_states(model, ids, mask)
    before = consistency_loss(states, mask)
    (slope,) = torch.autograd.grad(before, [embedded], retain_graph=True)
    _, moved, _ = layer_states(model, ids, mask, 1e-3 * slope.sign())
    after = consistency_loss(moved, mask)
    loss, _ = consistent(2.0, 1e-3)(model, ids, mask, labels)
    torch.testing.assert_close(loss, plain + 2.0 * after)
    # A small step along the slope: the loss grows by about epsilon * sum |slope|.
    grown = 1e-3 * float(slope.abs().sum())
    assert float((after - before).detach()) == pytest.approx(grown, rel=0.3)


def test_the_gradient_is_that_of_the_sum_and_reaches_the_embeddings(bert: Victim) -> None:
    rows = batch(bert)
    model, other = bert.new_model(0), bert.new_model(0)
    loss, _ = consistent(2.0, 0.0)(model, *rows)
    torch.autograd.backward(loss)
    # Without a perturbation the same sum can be written in one pass; the slope leaves no trace.
    logits, states, _ = layer_states(other, *rows[:2])
    known = torch.nn.functional.cross_entropy(logits, rows[2])
    torch.autograd.backward(known + 2.0 * consistency_loss(states, rows[1]))
    for (name, weight), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert weight.grad is not None, name
        assert twin.grad is not None, name
        torch.testing.assert_close(weight.grad, twin.grad, msg=name)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_alpha_0_is_plain_fine_tuning() -> None:
    assert consistent(0.0, 0.1) is cross_entropy


# The defense ------------------------------------------------------------------------------------


def consistency(lab: Lab, **settings: Any) -> tuple[float, Any]:
    """Return the consistency loss of a defended model on all clean rows, and the outcome."""
    outcome = defend(Crow(**SMALL | settings), lab.prepare(rate=0.3), lab.root)
    data = clean_rows_of(outcome.run())
    ids, mask, _ = data.batch(torch.arange(len(data)), int(data.host_lengths.max()))
    with torch.no_grad():
        _, states, _ = layer_states(outcome.model, ids, mask)
    return float(consistency_loss(states, mask)), outcome


def test_training_makes_layers_more_consistent_than_plain_fine_tuning_does(lab: Lab) -> None:
    plain, without = consistency(lab, alpha=0.0)
    regular, defended = consistency(lab)
    _, unmoved = consistency(lab, epsilon=0.0)
    assert regular < 0.9 * plain
    assert not same_weights(defended.model, defended.poisoned_model)
    assert not same_weights(defended.model, without.model)
    assert not same_weights(defended.model, unmoved.model)


def test_it_trains_on_as_many_clean_rows_as_it_is_told(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    for rows, used in ((30, 30), (60, 60), (None, 60)):  # the tiny corpus has 60 clean rows
        outcome = defend(Crow(epochs=1, clean_rows=rows), prepared, lab.root)
        record = read_record(outcome.folder)
        assert record["facts"]["rows"] == used
        assert [epoch["rows"] for epoch in record["history"]] == [used]


def test_rows_are_drawn_from_the_seed_without_repeats_and_in_their_order(lab: Lab) -> None:
    data = clean_rows_of(defend(Crow(**SMALL), lab.prepare(), lab.root).run())
    marked = dataclasses.replace(data, labels=torch.arange(len(data)))
    first = drawn_rows(marked, 20, 0).labels.tolist()
    assert len(set(first)) == 20
    assert first == sorted(first)
    assert drawn_rows(marked, 20, 0).labels.tolist() == first
    assert drawn_rows(marked, 20, 1).labels.tolist() != first
    for every in (None, 60, 100):
        assert drawn_rows(marked, every, 0).labels.tolist() == list(range(60))


def test_every_setting_is_part_of_the_key_of_the_one_stage(lab: Lab) -> None:
    base = lab.prepare().foundation
    changes: list[dict[str, Any]] = [
        {},
        {"alpha": 1.0},
        {"epsilon": 0.2},
        {"epochs": 5},
        {"learning_rate": 1e-4},
        {"batch_size": 4},
        {"clean_rows": 10},
        {"clean_rows": None},
    ]
    last = [Crow(**SMALL | change).stages(base) for change in changes]
    assert len({stage.key for stage in last}) == len(changes)
    assert all(set(stage.inputs.values()) == {base.clean, base.model} for stage in last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, r"defense.alpha must be at least 0, got -1.0"),
        ({"alpha": "5"}, r"defense.alpha must be at least 0, got '5'"),
        ({"epsilon": -0.1}, r"defense.epsilon must be at least 0, got -0.1"),
        ({"epsilon": float("nan")}, r"defense.epsilon must be at least 0, got nan"),
        ({"epochs": 0}, r"defense.epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"defense.learning_rate must be above 0, got 0.0"),
        ({"batch_size": 0}, r"defense.batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, r"defense.batch_size must be a whole number of at least 1, got 2.5"),
        ({"clean_rows": 0}, r"defense.clean_rows must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Crow(**settings)


def test_more_rows_than_there_are_are_refused_while_planning() -> None:
    message = r"defense.clean_rows must be at most the 60 clean rows.*got 61; lower it, write null"
    with pytest.raises(UserError, match=message):
        Crow(clean_rows=61).check(given(400))
    for rows in (60, None):
        Crow(clean_rows=rows).check(given(400))


def tiny(kind: str, **sizes: Any) -> Any:
    """A random classifier of another family."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(kind, vocab_size=40, num_labels=2, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (
            "bert",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
            r"a BertForSequenceClassification returns the states of 1 layers for each token; use "
            r"an encoder or a decoder of at least two layers, or another defense",
        ),
        (
            "bart",
            {
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
            },
            r"a BartForSequenceClassification returns the states of 0 layers",
        ),
    ],
)
def test_a_victim_without_neighbouring_layers_is_refused(
    kind: str, sizes: dict[str, Any], message: str
) -> None:
    # Each row ends with the end-of-text token, at which BART classifies.
    ids = torch.tensor([[10, 11, 12, 2], [13, 14, 15, 2]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(UserError, match=message):
        consistent(5.5, 0.1)(tiny(kind, **sizes), ids, mask, torch.tensor([0, 1]))


def test_the_same_seed_gives_the_same_model(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    last = Crow(**SMALL).stages(prepared.foundation)
    files = []
    for name in "ab":
        root = lab.root_with(tmp_path / name, *last.inputs.values())
        files.append((compute(last, root) / "model" / "model.safetensors").read_bytes())
    assert files[0] == files[1]
