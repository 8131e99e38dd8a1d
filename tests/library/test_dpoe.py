"""DPoE: the product, the shallow model, the denoising, the optimizer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from defending import Fitted, Outcome, defend, given, same_weights
from tiny_cells import Lab, easy_corpus
from torch import Tensor, nn

from btu.defenses.dpoe import DenoisedProductOfExperts as Dpoe
from btu.defenses.dpoe import certainty, denoised
from btu.defenses.kit.experts import Experts, adamw_of, divergence, keep_first_layers
from btu.errors import UserError
from btu.settings import TrainSettings
from btu.stages import compute
from btu.training import logits_of
from btu.types import Corpus
from btu.victims import Victim

LONG = TrainSettings(epochs=12, learning_rate=1e-2, batch_size=32, precision="fp32")


class Fixed(nn.Module):
    """A classifier with the same logits for every text, which are its parameters."""

    def __init__(self, *logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits).log())
        self.config = SimpleNamespace()
        self.passes = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.passes += 1
        return SimpleNamespace(logits=self.logits)


def fixed(main: list[list[float]], shallow: list[list[float]], beta: float = 1.0) -> Any:
    """Experts with these probabilities for each row, which each get as odds."""
    return Experts(Fixed(*main), Fixed(*shallow), beta)  # type: ignore[arg-type]


def rows(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, 3, dtype=torch.int64), torch.ones(count, 3, dtype=torch.bool)


# The product ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "product"),
    [
        # 0.6 * 0.8 = 0.48 and 0.4 * 0.2 = 0.08: shares 6 / 7 and 1 / 7.
        (1.0, [6 / 7, 1 / 7]),
        # 0.6 * 0.64 = 0.384 and 0.4 * 0.04 = 0.016: shares 0.96 and 0.04.
        (2.0, [0.96, 0.04]),
        # The main model alone.
        (0.0, [0.6, 0.4]),
    ],
)
def test_the_product_multiplies_probabilities_and_normalises(
    beta: float, product: list[float]
) -> None:
    # As odds: a softmax makes [0.6, 0.4] and [0.8, 0.2] of them.
    experts = fixed([[6.0, 4.0]], [[8.0, 2.0]], beta)
    found, main, _ = experts(*rows(1))
    assert found.exp().tolist() == [pytest.approx(product)]
    assert main.exp().tolist() == [pytest.approx([0.6, 0.4])]


def test_with_beta_0_the_shallow_model_is_not_computed() -> None:
    experts = fixed([[6.0, 4.0]], [[8.0, 2.0]], 0.0)
    _, _, shallow = experts(*rows(1))
    assert experts.shallow.passes == 0
    assert shallow.exp().tolist() == [pytest.approx([0.5, 0.5])]


def test_the_main_model_learns_little_where_the_shallow_one_is_certain() -> None:
    # The gradient of the cross-entropy by a main logit of the label is product - 1, over 2 rows.
    experts = fixed([[1.0, 1.0], [1.0, 1.0]], [[99.0, 1.0], [1.0, 1.0]])
    loss, _ = denoised("none", 0.0, 1.0)(experts, *rows(2), torch.tensor([0, 0]))
    torch.autograd.backward(loss)
    # Row 1: product 0.99; row 2: 0.5.
    assert experts.main.logits.grad[:, 0].tolist() == pytest.approx([-0.005, -0.25], rel=1e-4)
    # Both models get it: with equal exponents the same one.
    torch.testing.assert_close(experts.shallow.logits.grad, experts.main.logits.grad)


# The denoising ----------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy_of_the_product() -> None:
    experts = fixed([[6.0, 4.0], [1.0, 1.0]], [[8.0, 2.0], [1.0, 3.0]])
    loss, logits = denoised("none", 0.0, 1.0)(experts, *rows(2), torch.tensor([0, 0]))
    # Shares of the labels: 6 / 7 (above), and 0.5 * 0.25 over 0.5 = 0.25.
    assert float(loss.detach()) == pytest.approx((math.log(7 / 6) + math.log(4)) / 2)
    assert logits.argmax(1).tolist() == [0, 1]


def test_reweighting_leaves_out_rows_that_the_shallow_model_is_sure_of() -> None:
    # Shares of the labels to the shallow model: 0.8, 0.25 and 0.75.
    experts = fixed([[6.0, 4.0], [1.0, 1.0], [1.0, 1.0]], [[8.0, 2.0], [1.0, 3.0], [1.0, 3.0]])
    labels = torch.tensor([0, 0, 1])
    # Their losses: ln(7 / 6), ln 4, and ln(4 / 3). At 0.77 the first is left out; at 0.5 the last
    # too. The mean is over all three rows.
    for threshold, known in (
        (0.85, math.log(7 / 6) + math.log(4) + math.log(4 / 3)),
        (0.77, math.log(4) + math.log(4 / 3)),
        (0.5, math.log(4)),
    ):
        loss, _ = denoised("reweight", 0.0, threshold)(experts, *rows(3), labels)
        assert float(loss.detach()) == pytest.approx(known / 3)
    # A batch of which no row is left still has a gradient, 0.
    loss, _ = denoised("reweight", 0.0, 0.1)(experts, *rows(3), labels)
    torch.autograd.backward(loss)
    assert float(experts.main.logits.grad.abs().sum()) == 0


def test_the_divergence_is_the_mean_of_both_directions() -> None:
    one = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    other = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log()
    # KL(one, other) = (ln(5 / 8) + ln(5 / 2)) / 2 = ln(25 / 16) / 2 = 0.22314
    # KL(other, one) = 0.8 ln 1.6 + 0.2 ln 0.4 = 0.19274; their mean is 0.20794.
    assert divergence(one, other).tolist() == pytest.approx([0.20794, 0.0], abs=1e-5)
    assert divergence(other, one).tolist() == pytest.approx([0.20794, 0.0], abs=1e-5)


def test_r_drop_takes_two_passes_and_pulls_those_of_the_main_model_together() -> None:
    experts = fixed([[1.0, 1.0]], [[1.0, 1.0]])
    first, second = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[4.0, 1.0]]).log()

    def dropped(input_ids: Tensor, attention_mask: Tensor) -> Any:
        # As if dropout drew differently in the second pass.
        experts.main.passes += 1
        return SimpleNamespace(logits=first if experts.main.passes == 1 else second)

    experts.main.forward = dropped
    loss, logits = denoised("r_drop", 3.0, 1.0)(experts, *rows(1), torch.tensor([0]))
    # Cross-entropies ln 2 and ln(5 / 4); the divergence of (0.5, 0.5) and (0.8, 0.2) is 0.20794.
    known = (math.log(2) + math.log(5 / 4)) / 2 + 3 * 0.20794
    assert float(loss.detach()) == pytest.approx(known, abs=1e-4)
    assert experts.main.passes == experts.shallow.passes == 2
    # The first pass is the one that accuracy is measured on.
    assert logits.exp().tolist() == [pytest.approx([0.5, 0.5])]


def test_the_two_passes_differ_in_dropout(bert: Victim) -> None:
    experts = Experts(bert.new_model(0), bert.new_model(1), 1.0).train()
    ids, mask = torch.arange(12).view(2, 6) + 10, torch.ones(2, 6, dtype=torch.bool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        without, _ = denoised("r_drop", 0.0, 1.0)(experts, ids, mask, torch.tensor([0, 1]))
        torch.manual_seed(0)
        weighted, _ = denoised("r_drop", 3.0, 1.0)(experts, ids, mask, torch.tensor([0, 1]))
    assert float((weighted - without).detach()) > 0


# The shallow model ------------------------------------------------------------------------------


def test_a_cut_model_is_the_victims_first_layers_with_its_head(victim: Victim) -> None:
    model, cut = victim.new_model(0), victim.new_model(0)
    keep_first_layers(cut, 1)
    assert cut.config.num_hidden_layers == 1
    assert model.config.num_hidden_layers == 2
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    ids = torch.where(mask, torch.arange(12).view(2, 6) + 10, victim.tokenizer.pad_token_id)
    states = {
        name: one(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        for name, one in (("whole", model), ("cut", cut))
    }
    assert len(states["cut"].hidden_states) == 2  # the embeddings, and one layer
    torch.testing.assert_close(states["cut"].hidden_states[0], states["whole"].hidden_states[0])
    if model.config.model_type != "gpt2":  # there the last state is behind one more norm
        torch.testing.assert_close(states["cut"].hidden_states[1], states["whole"].hidden_states[1])
    # Fewer weights, each of them the whole model's.
    whole = dict(model.named_parameters())
    left = dict(cut.named_parameters())
    assert len(left) < len(whole)
    assert all(torch.equal(weight, whole[name]) for name, weight in left.items())
    assert not torch.allclose(logits_of(cut, ids, mask), logits_of(model, ids, mask))


def test_all_layers_are_no_cut(victim: Victim) -> None:
    cut = victim.new_model(0)
    keep_first_layers(cut, 2)
    assert same_weights(cut, victim.new_model(0))


def test_more_layers_than_the_victim_has_are_refused(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    root = lab.root_with(tmp_path, prepared.foundation.rows)
    with pytest.raises(UserError, match=r"defense.layers is 3, but the victim has 2 layers; lower"):
        compute(Dpoe(layers=3).stages(prepared.foundation), root)


def test_a_model_of_two_stacks_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "bart",
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(config)
    message = r"cannot cut a BartForSequenceClassification to 1 layers: it has 2 stacks of 2 layers"
    with pytest.raises(UserError, match=message):
        keep_first_layers(model, 1)


# The training -----------------------------------------------------------------------------------


def test_each_model_has_its_learning_rate_and_matrices_alone_decay(bert: Victim) -> None:
    experts = Experts(bert.new_model(0), bert.new_model(1), 1.0)
    weights = list(experts.parameters())
    groups = adamw_of(experts, 1e-3, 4e-3, 0.01)(weights).param_groups
    found = [(group["lr"], group["weight_decay"]) for group in groups]
    assert found == [(1e-3, 0.01), (1e-3, 0.0), (4e-3, 0.01), (4e-3, 0.0)]
    held = [{id(weight) for weight in group["params"]} for group in groups]
    assert held[0] | held[1] == {id(weight) for weight in experts.main.parameters()}
    assert sum(map(len, held)) == len(weights)
    assert all(weight.ndim > 1 for weight in groups[0]["params"] + groups[2]["params"])
    assert all(weight.ndim == 1 for weight in groups[1]["params"] + groups[3]["params"])


def test_with_beta_0_the_main_model_is_the_undefended_one(lab: Lab) -> None:
    prepared = lab.prepare()
    lab.compute(prepared.foundation.model)
    outcome = defend(Dpoe(layers=1, beta=0.0, denoise="none"), prepared, lab.root)
    assert same_weights(outcome.model, outcome.poisoned_model)


def test_null_settings_are_those_of_train_and_the_shallow_model_learns_faster(lab: Lab) -> None:
    base = lab.prepare().foundation
    config = Dpoe().stages(base).config
    assert config["train"] == dict(vars(base.train))
    assert config["shallow_learning_rate"] == 4 * base.train.learning_rate
    config = Dpoe(epochs=5, learning_rate=1e-4, shallow_learning_rate=2e-4).stages(base).config
    assert (config["train"]["epochs"], config["train"]["learning_rate"]) == (5, 1e-4)
    assert config["shallow_learning_rate"] == 2e-4
    assert Dpoe(learning_rate=1e-4).stages(base).config["shallow_learning_rate"] == 4e-4


def test_a_setting_is_part_of_the_key_where_it_acts(lab: Lab) -> None:
    base = lab.prepare().foundation

    def key(**settings: Any) -> str:
        return Dpoe(**settings).stages(base).key

    changes: list[dict[str, Any]] = [
        {},
        {"layers": 1},
        {"beta": 0.5},
        {"denoise": "none"},
        {"denoise": "reweight"},
        {"denoise": "reweight", "threshold": 0.8},
        {"r_drop_weight": 1.0},
        {"epochs": 5},
        {"learning_rate": 1e-4},
        {"shallow_learning_rate": 1e-4},
    ]
    assert len({key(**change) for change in changes}) == len(changes)
    # A setting without an effect makes no other model: such cells share theirs.
    assert key(threshold=0.8) == key()
    assert key(denoise="none", r_drop_weight=1.0) == key(denoise="none", threshold=0.8)
    assert set(Dpoe().stages(base).inputs) == {"rows"}


def test_both_models_are_trained_in_one_call(lab: Lab, tmp_path: Path, fits: list[Fitted]) -> None:
    prepared = lab.prepare()
    root = lab.root_with(tmp_path, prepared.foundation.rows)
    fits.clear()
    compute(Dpoe(layers=1).stages(prepared.foundation), root)
    (call,) = fits
    assert len(call.data) == prepared.foundation.train_rows
    parts = {name.partition(".")[0] for name in call.trainable}
    assert parts == {"main", "shallow"}


def trained(lab: Lab, corpus: Corpus, **settings: Any) -> Outcome:
    prepared = lab.prepare(corpus=corpus, rate=0.3, train=LONG)
    return defend(Dpoe(**{"layers": 1, **settings}), prepared, lab.root)


def test_rows_are_suspicious_as_the_shallow_model_is_certain_of_them(
    lab: Lab, tiny_corpus: Corpus
) -> None:
    outcome = trained(lab, easy_corpus(tiny_corpus), denoise="none")
    suspicion = outcome.suspects.rows
    assert suspicion is not None
    assert suspicion.shape == (240,)
    assert 0 <= suspicion.min() <= suspicion.max() <= 1
    assert outcome.suspects.taken is None
    assert outcome.suspects.flagged is None


def test_each_way_of_denoising_trains_another_model(lab: Lab, tiny_corpus: Corpus) -> None:
    easy = easy_corpus(tiny_corpus)
    models = [
        trained(lab, easy, **settings).model
        for settings in (
            {"denoise": "none"},
            {"denoise": "r_drop"},
            {"denoise": "reweight", "threshold": 0.9},
            {"denoise": "none", "beta": 0.5},
        )
    ]
    for number, model in enumerate(models):
        assert not any(same_weights(model, other) for other in models[:number])


def test_certainty_is_the_probability_of_the_label() -> None:
    # Odds of 3 : 1 and 1 : 4.
    logits = np.log([[3.0, 1.0], [1.0, 4.0]])
    assert certainty(logits, np.array([0, 0])).tolist() == pytest.approx([0.75, 0.2])


def test_the_same_seed_gives_the_same_model(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    last = Dpoe(layers=1).stages(prepared.foundation)
    files = []
    for name in "ab":
        root = lab.root_with(tmp_path / name, *last.inputs.values())
        folder = compute(last, root)
        files.append([(folder / "model" / "model.safetensors").read_bytes()])
        files[-1].append((folder / "rows.parquet").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, r"defense.layers must be at least 1, got 0"),
        ({"layers": 2.0}, r"defense.layers must be a whole number of at least 1, got 2.0"),
        ({"beta": -0.5}, r"defense.beta must be at least 0, got -0.5"),
        ({"denoise": "rdrop"}, r"did you mean 'r_drop'"),
        ({"r_drop_weight": -1.0}, r"defense.r_drop_weight must be at least 0, got -1.0"),
        ({"threshold": 1.0}, r"defense.threshold must be above 0 and below 1, got 1.0"),
        ({"threshold": 0.0}, r"defense.threshold must be above 0 and below 1, got 0.0"),
        ({"epochs": 0}, r"defense.epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"defense.learning_rate must be above 0, got 0.0"),
        ({"shallow_learning_rate": -1}, r"defense.shallow_learning_rate must be above 0, got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Dpoe(**settings)


def test_the_reference_preset_names_fields() -> None:
    fields = {field.name for field in dataclasses.fields(Dpoe)}
    for preset in Dpoe.PRESETS.values():
        assert set(preset) <= fields
        Dpoe(**preset).check(given(None))  # type: ignore[arg-type]
