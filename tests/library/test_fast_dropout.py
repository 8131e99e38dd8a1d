"""Dropout and attention for the CPU do what torch's own do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from btu.fast_dropout import ATTENTION, FastDropout, attention, drop, fast_dropout
from btu.settings import TrainSettings
from btu.training import NonFiniteLossError, fit, logits_of
from btu.types import Corpus
from btu.victims import Victim

CPU = torch.device("cpu")


@pytest.fixture
def generator_seed() -> int:
    torch.manual_seed(0)
    return 0


def dropouts(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_element_is_kept_with_probability_1_minus_p_and_scaled(
    p: float, generator_seed: int
) -> None:
    n = 100_000
    dropped = drop(torch.ones(n), p)
    kept = dropped != 0
    # Kept is binomial: 5 standard deviations are 5 * sqrt(p * (1 - p) / n).
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / n) ** 0.5)
    assert dropped[kept].unique().tolist() == pytest.approx([1 / (1 - p)])


def test_neighbours_are_dropped_independently(generator_seed: int) -> None:
    # Four elements come from one 64-bit draw: each pair must agree by chance only.
    kept = (drop(torch.ones(400_000), 0.5) != 0).view(-1, 4).float()
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 100_000**0.5  # 5 standard errors


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 7)])
def test_any_shape_and_dtype_is_dropped(shape: tuple[int, ...], generator_seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        dropped = drop(torch.ones(shape, dtype=dtype), 0.25)
        assert dropped.shape == shape
        assert dropped.dtype == dtype


def test_dropping_all_and_nothing(generator_seed: int) -> None:
    assert not drop(torch.ones(9), 1.0).any()
    values = torch.randn(9)
    assert torch.equal(drop(values, 0.0), values)
    assert torch.equal(FastDropout(0.5).eval()(values), values)


def test_the_gradient_flows_through_what_was_kept(generator_seed: int) -> None:
    values = torch.ones(1000, requires_grad=True)
    dropped = drop(values, 0.5)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())  # 2 where kept, 0 elsewhere


def test_the_seed_fixes_the_draw() -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(drop(torch.ones(1000), 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_softmax_attention(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 4 // groups, 5, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :, 3:] = torch.finfo(torch.float32).min
    result, _ = attention(nn.Identity(), query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=mask,
    )
    torch.testing.assert_close(result, expected.transpose(1, 2))


def test_the_logits_are_those_of_the_models_own_attention(
    victim: Victim, tiny_corpus: Corpus
) -> None:
    model = victim.new_model(0)
    data = victim.encode(tiny_corpus.train.take(range(8)))
    # A batch with padding, and for GPT-2 with causality.
    ids, mask, _ = data.batch(torch.arange(8), int(data.host_lengths.max()))
    with torch.no_grad():
        before = logits_of(model, ids, mask)
        with fast_dropout(model, CPU):
            inside = logits_of(model, ids, mask)
        after = logits_of(model, ids, mask)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-4)
    assert torch.equal(after, before)


def test_a_model_is_as_it_was_after_training(victim: Victim, tiny_corpus: Corpus) -> None:
    model = victim.new_model(0)
    layers, implementation = dropouts(model), model.config._attn_implementation
    inside = []
    with fast_dropout(model, CPU):
        inside = dropouts(model)
        if implementation == "sdpa":
            assert model.config._attn_implementation == ATTENTION
    assert FastDropout in inside
    data = victim.encode(tiny_corpus.train.take(range(16)))
    fit(model, data, TrainSettings(epochs=1, precision="fp32"), seed=0, stage="t", device=CPU)
    assert dropouts(model) == layers
    assert model.config._attn_implementation == implementation


def test_a_model_is_as_it_was_after_training_failed(bert: Victim, tiny_corpus: Corpus) -> None:
    model = bert.new_model(0)
    layers, implementation = dropouts(model), model.config._attn_implementation
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    data = bert.encode(tiny_corpus.train.take(range(16)))
    with pytest.raises(NonFiniteLossError):
        fit(model, data, TrainSettings(epochs=1, precision="fp32"), seed=0, stage="t", device=CPU)
    assert dropouts(model) == layers
    assert model.config._attn_implementation == implementation


def test_other_devices_are_left_alone(bert: Victim) -> None:
    model = bert.new_model(0)
    with fast_dropout(model, torch.device("cuda")):
        assert FastDropout not in dropouts(model)
        assert model.config._attn_implementation != ATTENTION
