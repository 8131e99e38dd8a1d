"""The hidden states of all layers, which DAN and BadActs share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from screens import own_screens
from tiny_cells import Lab
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from btu.defenses.badacts import BadActs
from btu.defenses.base import Given
from btu.defenses.dan import Dan
from btu.defenses.kit.layers import CLEAN, INCOMING, layer_states, split_by_class
from btu.defenses.kit.screening import load_values
from btu.errors import UserError
from btu.stage_files import clean_rows_of, model_of
from btu.stages import StageRun, read_record
from btu.victims import Victim, classify_at_last_token

DEFENSES = (Dan, BadActs)
NAMES = {Dan: "dan", BadActs: "badacts"}
# Two rows; the second has two tokens of padding at its end.
IDS = torch.tensor([[3, 11, 12, 13, 2], [3, 14, 2, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
COMMON = {"vocab_size": 32, "num_labels": 2, "pad_token_id": 1}


def tiny_llama() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=2,
        **COMMON,
    )
    return LlamaForSequenceClassification(config)


def tiny_bart() -> PreTrainedModel:
    config = BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        **COMMON,
    )
    return BartForSequenceClassification(config)


def tiny_xlnet() -> PreTrainedModel:
    config = XLNetConfig(d_model=16, n_layer=3, n_head=2, d_inner=24, **COMMON)
    model = XLNetForSequenceClassification(config)
    classify_at_last_token(model)
    return model


def states_of(model: PreTrainedModel, pooling: str, ids: Any, mask: Any) -> torch.Tensor:
    with layer_states(model.eval(), pooling) as states, torch.no_grad():
        return states(ids, mask)


def stacks_of(model: PreTrainedModel, ids: Any, mask: Any) -> list[torch.Tensor]:
    """Return the hidden states of every layer and every token, without the embeddings."""
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    if model.config.is_encoder_decoder:
        return [*output.encoder_hidden_states[1:], *output.decoder_hidden_states[1:]]
    return list(output.hidden_states[1:])


def deciding_places(model: PreTrainedModel, ids: Any, mask: Any) -> list[list[int]]:
    """Return each row's tokens whose last hidden state has an effect on the row's logits."""
    body = model.base_model
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output[0].retain_grad()
        kept.append(output[0])

    handle = body.register_forward_hook(keep)
    model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].sum().backward()
    handle.remove()
    gradient = kept[-1].grad
    assert gradient is not None
    return [np.flatnonzero(row.abs().sum(1).numpy()).tolist() for row in gradient]


# Which states ------------------------------------------------------------------------------------


def test_a_text_s_states_are_those_of_the_token_that_decides(victim: Victim) -> None:
    model = victim.new_model(0).eval()
    ids = torch.where(MASK, IDS, victim.tokenizer.pad_token_id)
    places = deciding_places(model, ids, MASK)
    # GPT-2 reads the last token, with padding behind it or not; the encoders read the first.
    assert places == ([[4], [2]] if model.config.model_type == "gpt2" else [[0], [0]])
    layers = stacks_of(model, ids, MASK)
    found = states_of(model, "position", ids, MASK)
    assert found.shape == (2, len(layers), layers[0].shape[2])
    for row, (place,) in enumerate(places):
        expected = torch.stack([layer[row, place] for layer in layers])
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_bart, tiny_xlnet])
def test_other_architectures_are_read_at_their_last_token(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    # 3 layers each: of Llama and of XLNet; 2 of BART's encoder and 1 of its decoder.
    layers = stacks_of(model, IDS, MASK)
    assert len(layers) == 3
    found = states_of(model, "position", IDS, MASK)
    # Row 0 has 5 tokens, row 1 has 3.
    for row, place in ((0, 4), (1, 2)):
        assert torch.equal(found[row], torch.stack([layer[row, place] for layer in layers]))


def test_the_mean_leaves_padding_out(bert: Victim) -> None:
    model = bert.new_model(0).eval()
    found = states_of(model, "mean", IDS, MASK)
    layers = stacks_of(model, IDS, MASK)
    assert torch.allclose(found[1, 0], layers[0][1, :3].mean(0), atol=1e-6)
    # Alone, without padding, row 1 has the same states.
    alone = states_of(model, "mean", IDS[1:, :3], MASK[1:, :3])
    assert torch.allclose(found[1:], alone, atol=1e-5)


def test_layers_that_merge_tokens_are_an_error() -> None:
    # The second block of a Funnel transformer has half of the tokens.
    config = FunnelConfig(
        vocab_size=32, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24, num_labels=2
    )
    model = FunnelForSequenceClassification(config)
    with pytest.raises(UserError, match="FunnelForSequenceClassification does not return a hidden"):
        states_of(model, "position", IDS, MASK)


# Which clean rows --------------------------------------------------------------------------------


def test_rows_are_held_out_class_by_class() -> None:
    labels = np.array([0] * 10 + [1] * 2 + [2] * 3 + [4] * 8)
    learned, held = split_by_class(labels, 0.5, seed=0)
    # Class 0: 5 of 10. Class 1: both of its rows are for the estimate. Class 2: round(1.5) = 2, but
    # two rows stay, so 1 of 3. Class 3 has no rows. Class 4: 4 of 8.
    assert np.bincount(labels[held], minlength=5).tolist() == [5, 0, 1, 0, 4]
    assert sorted([*learned, *held]) == list(range(23))
    # A small share still holds out one row of each class with three rows.
    _, few = split_by_class(labels, 0.01, seed=0)
    assert np.bincount(labels[few], minlength=5).tolist() == [1, 0, 1, 0, 1]


def test_the_seed_draws_the_rows_that_are_held_out() -> None:
    labels = np.array([0, 1] * 30)
    first, again, other = (split_by_class(labels, 0.5, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_too_few_rows_for_the_bar_are_an_error() -> None:
    # Of 3 rows of one class 1 can be held out, and of 2 rows none.
    with pytest.raises(UserError, match=r"defense.held_out 0.5 leaves 1 of 5 clean rows for the b"):
        split_by_class(np.array([0, 0, 0, 1, 1]), 0.5, seed=0)


@pytest.mark.parametrize("kind", DEFENSES, ids=NAMES.get)
def test_too_few_clean_rows_are_refused_before_training(kind: Any) -> None:
    # 2 classes, each with two rows to estimate on and one to hold out: 6.
    kind().check(Given(400, 2, 240, 6))
    with pytest.raises(UserError) as caught:
        kind().check(Given(400, 2, 240, 5))
    assert str(caught.value) == (
        f"defense '{NAMES[kind]}' estimates on two clean rows or more of each of 2 classes and "
        "computes its bar from others, and the data have 5; raise data.max_clean_rows to at "
        "least 6."
    )


# What is shared ----------------------------------------------------------------------------------


def test_both_defenses_and_all_their_settings_share_the_hidden_states(lab: Lab) -> None:
    prepared = lab.prepare()

    def keys(defense: Any) -> dict[str, str]:
        return {stage.name: stage.key for stage in own_screens(defense, prepared)}

    base = keys(Dan())
    assert list(base) == [CLEAN, INCOMING, "distances (dan)", "screen (dan)"]
    states = {name: base[name] for name in (CLEAN, INCOMING)}
    for other in (
        BadActs(),
        BadActs(frr=0.1),
        BadActs(k=2.0),
        BadActs(held_out=0.2),
        Dan(frr=0.1),
        Dan(aggregate="max"),
        Dan(held_out=0.2),
        Dan(shrinkage=0.1),
    ):
        assert {name: keys(other)[name] for name in states} == states, other
    assert not set(keys(Dan(pooling="mean")).values()) & set(base.values())
    # Neither bar nor aggregation needs new distances, nor does the bar of BadActs new scores.
    for other in (Dan(frr=0.1), Dan(aggregate="max")):
        assert keys(other)["distances (dan)"] == base["distances (dan)"]
        assert keys(other)["screen (dan)"] != base["screen (dan)"]
    scored = "activation states (badacts)"
    assert keys(BadActs(frr=0.1))[scored] == keys(BadActs())[scored]
    assert keys(BadActs(k=2.0))[scored] != keys(BadActs())[scored]


def test_the_clean_rows_states_are_in_their_order_and_with_their_labels(lab: Lab) -> None:
    prepared = lab.prepare()
    clean, came = own_screens(Dan(), prepared)[:2]
    folders = lab.compute(clean, came)
    found = load_values(folders[0])
    inputs = {"clean": lab.root / prepared.foundation.clean.key}
    rows = clean_rows_of(StageRun({}, {}, inputs, lab.root, torch.device("cpu")))
    assert found["label"].tolist() == rows.labels.tolist()
    # The toy BERT has 2 layers of 16 units; there are 60 clean rows.
    assert found["hidden"].shape == (60, 2, 16)
    assert found["hidden"].dtype == np.float32
    assert read_record(folders[0])["facts"] == {"rows": 60, "layers": 2}
    ids, mask, _ = rows.batch(torch.tensor([7]), int(rows.host_lengths[7]))
    run = StageRun(
        {}, {}, {"model": lab.root / prepared.foundation.model.key}, lab.root, ids.device
    )
    alone = states_of(model_of(run, "model"), "position", ids, mask)
    assert np.allclose(found["hidden"][7], alone[0].numpy(), atol=1e-5)


def test_a_class_without_clean_rows_is_judged_by_the_others(lab: Lab, tiny_corpus: Any) -> None:
    clean = tiny_corpus.clean
    of_one = clean.take([i for i, label in enumerate(clean.labels) if label == 1])
    prepared = lab.prepare(corpus=dataclasses.replace(tiny_corpus, clean=of_one))
    for defense in (Dan(), BadActs()):
        scored, screen = own_screens(defense, prepared)[2:]
        folders = lab.compute(scored, screen)
        facts = read_record(folders[0])["facts"]
        assert facts["estimated_on"] + facts["held_out"] == len(of_one)
        assert facts.get("classes", 1) == 1
        assert np.isfinite(load_values(folders[0])["incoming"]).all()
