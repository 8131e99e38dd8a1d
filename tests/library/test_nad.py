"""Neural Attention Distillation: maps, objective, teacher."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defending import Fitted, same_rows
from tiny_cells import Lab

from btu.defenses.attention_distillation import (
    AttentionDistillation,
    activations,
    attention_map,
    distillation,
    layer_number,
    map_distance,
    unit_readers,
)
from btu.defenses.base import Given
from btu.defenses.kit.neurons import find_filters
from btu.errors import UserError
from btu.recipe import Prepared
from btu.stage_files import clean_rows_of, model_of
from btu.stages import Stage, StageRun, compute, read_record
from btu.training import Encoded, cross_entropy, logits_of
from btu.victims import Victim

CPU = torch.device("cpu")


def batch(victim: Victim) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three rows of 6, 4 and 2 tokens, the shorter ones padded."""
    lengths = torch.tensor([6, 4, 2])
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.arange(18).view(3, 6) + 10
    return torch.where(mask, ids, victim.tokenizer.pad_token_id), mask, torch.tensor([0, 1, 1])


def test_a_map_is_the_strength_of_each_token_with_its_row_at_length_1() -> None:
    # Two tokens of two units: [3, 0] and [0, 4].
    hidden = torch.tensor([[[3.0, 0.0], [0.0, -4.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # p = 1: 3 and 4, norm 5.
    assert attention_map(hidden, mask, 1.0).tolist() == [pytest.approx([0.6, 0.8], abs=1e-5)]
    # p = 2: 9 and 16, norm sqrt(81 + 256) = 18.3576.
    assert attention_map(hidden, mask, 2.0).tolist() == [
        pytest.approx([0.49026, 0.87157], abs=1e-5)
    ]


def test_padding_is_no_part_of_a_map() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]]])
    mask = torch.tensor([[True, True, False]])
    assert attention_map(hidden, mask, 1.0).tolist() == [pytest.approx([0.6, 0.8, 0.0], abs=1e-5)]


def test_the_distance_is_a_mean_over_real_tokens() -> None:
    own, aim = torch.tensor([[0.6, 0.8, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    # (0.4^2 + 0.8^2) / 2 real tokens = 0.4.
    mask = torch.tensor([[True, True, False]])
    assert float(map_distance(own, aim, mask)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("layer", "depth", "number"),
    [(1 / 3, 6, 2), (2 / 3, 6, 4), (1.0, 6, 6), (1, 6, 1), (5, 6, 5), (0.1, 2, 1), (1 / 3, 12, 4)],
)
def test_a_layer_is_a_fraction_of_the_depth_or_a_number(
    layer: float, depth: int, number: int
) -> None:
    assert layer_number(layer, depth) == number


def test_a_layer_beyond_the_depth_is_an_error() -> None:
    with pytest.raises(UserError, match=r"layer 7, but the victim has 6; lower it"):
        layer_number(7, 6)


def test_maps_are_made_of_what_the_feed_forward_blocks_hold(victim: Victim) -> None:
    model = victim.new_model(0)
    filters = find_filters(model)
    ids, mask, _ = batch(victim)
    layers = [2, 1, 2]
    logits, found = activations(model, ids, mask, layers, unit_readers(model, layers))
    torch.testing.assert_close(logits, logits_of(model, ids, mask))
    units = filters["layer 1 units"].count
    assert [tuple(held.shape) for held in found] == [(3, 6, units)] * 3
    assert torch.equal(found[0], found[2])
    # Without the first block's units the second block contains something else, the first the same.
    with torch.no_grad():
        filters["layer 1 units"].weight.zero_()
    _, without = activations(model, ids, mask, [1, 2], unit_readers(model, [1, 2]))
    assert torch.equal(without[0], found[1])
    assert not torch.equal(without[1], found[0])


def test_maps_of_hidden_states_are_made_of_what_layers_give(victim: Victim) -> None:
    model = victim.new_model(0)
    ids, mask, _ = batch(victim)
    logits, (last,) = activations(model, ids, mask, [2], None)
    torch.testing.assert_close(logits, logits_of(model, ids, mask))
    states = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    torch.testing.assert_close(last, states.hidden_states[2])


def test_a_victim_that_lays_its_tokens_end_to_end_has_maps_too() -> None:
    """OPT's feed-forward blocks read (rows * tokens, units)."""
    from transformers import AutoModelForSequenceClassification, OPTConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [
            AutoModelForSequenceClassification.from_config(
                OPTConfig(
                    vocab_size=40,
                    hidden_size=16,
                    word_embed_proj_dim=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    ffn_dim=32,
                    max_position_embeddings=16,
                    num_labels=2,
                    pad_token_id=1,
                )
            ).eval()
            for _ in range(2)
        ]
    student, teacher = models
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    ids = torch.where(mask, torch.arange(18).view(3, 6) + 10, 1)
    _, found = activations(student, ids, mask, [1, 2], unit_readers(student, [1, 2]))
    assert [tuple(held.shape) for held in found] == [(3, 6, 32)] * 2
    # Each row's units are its own: alone it has the same.
    _, alone = activations(student, ids[1:2], mask[1:2], [2], unit_readers(student, [2]))
    torch.testing.assert_close(alone[0][0, :4], found[1][1, :4])
    loss, logits = distillation(teacher, [1, 2], [1.0, 1.0], 2.0, "ffn")(
        student, ids, mask, torch.tensor([0, 1, 1])
    )
    assert logits.shape == (3, 2)
    assert bool(torch.isfinite(loss))


def test_the_blocks_of_both_models_are_looked_for_once(
    bert: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("btu.defenses.attention_distillation")
    looked: list[Any] = []

    def spy(model: Any) -> Any:
        looked.append(model)
        return find_filters(model)

    monkeypatch.setattr(module, "find_filters", spy)
    student, teacher = bert.new_model(0), bert.new_model(1)
    objective = distillation(teacher, [1, 2], [1.0, 1.0], 2.0, "ffn")
    losses = [objective(student, *batch(bert))[0] for _ in range(3)]
    assert looked == [student, teacher]
    assert torch.equal(losses[0], losses[2])


def test_the_objective_adds_each_layers_distance_by_its_beta(victim: Victim) -> None:
    student, teacher = victim.new_model(0), victim.new_model(0)
    with torch.no_grad():
        # A fresh layer norm makes all tokens equally long, and all maps of p = 2 alike.
        for weight in teacher.parameters():
            weight += 0.1 * torch.arange(weight.numel()).view_as(weight).sin()
    rows = batch(victim)
    plain, _ = cross_entropy(student, *rows)

    def added(model: Any, betas: list[float]) -> float:
        loss, _ = distillation(model, [1, 2], betas, 2.0, "ffn")(student, *rows)
        return float((loss - plain).detach())

    first, second = added(teacher, [1e3, 0.0]), added(teacher, [0.0, 1e3])
    assert first > 1e-3
    assert second > 1e-3
    assert added(teacher, [2e3, 3e3]) == pytest.approx(2 * first + 3 * second, rel=1e-3)
    assert added(teacher, [0.0, 0.0]) == pytest.approx(0.0, abs=1e-6)
    # The distance of a model from itself is 0.
    assert added(victim.new_model(0), [1e3, 1e3]) == pytest.approx(0.0, abs=1e-5)


def test_the_teacher_gets_no_gradients_and_the_student_does(bert: Victim) -> None:
    student, teacher = bert.new_model(0), bert.new_model(1)
    loss, _ = distillation(teacher, [1], [1e6], 2.0, "ffn")(student, *batch(bert))
    torch.autograd.backward(loss)
    assert all(weight.grad is None for weight in teacher.parameters())
    assert student.get_input_embeddings().weight.grad.abs().sum() > 0


def maps_apart(prepared: Prepared, root: Path, **settings: Any) -> float:
    """Compute the defense; return how far student and teacher are apart on the clean rows."""
    defense = AttentionDistillation(**{"epochs": 4, "learning_rate": 1e-3, **settings})
    last = defense.stages(prepared.foundation)
    compute(last, root)
    inputs = {role: root / stage.key for role, stage in last.inputs.items()}
    run = StageRun({}, {}, {**inputs, "student": root / last.key}, root, CPU)
    data = clean_rows_of(run)
    ids, mask, labels = data.batch(torch.arange(len(data)), int(data.host_lengths.max()))
    teacher, student = model_of(run, "teacher"), model_of(run, "student")
    plain, _ = cross_entropy(student, ids, mask, labels)
    loss, _ = distillation(teacher, [1, 2], [1e6, 1e6], 2.0, "ffn")(student, ids, mask, labels)
    return float((loss - plain).detach()) / 1e6


def test_distillation_draws_the_student_to_the_teacher(lab: Lab) -> None:
    prepared = lab.prepare(rate=0.3)
    far = {"teacher": "poisoned", "teacher_learning_rate": 5e-3, "teacher_epochs": 3}
    alone = maps_apart(prepared, lab.root, beta=0.0, **far)
    drawn = maps_apart(prepared, lab.root, beta=1e5, **far)
    assert drawn < 0.7 * alone


def test_the_clean_tuned_control_is_the_poisoned_models_teacher_unless_settings_say_otherwise(
    lab: Lab,
) -> None:
    base = lab.prepare().foundation

    def teacher(epochs: int | None, learning_rate: float | None) -> Stage:
        return AttentionDistillation(
            teacher="poisoned", teacher_epochs=epochs, teacher_learning_rate=learning_rate
        ).teacher_stage(base)

    assert teacher(None, None) is base.tuned
    assert teacher(base.tuning.epochs, base.tuning.learning_rate) is base.tuned
    longer = teacher(base.tuning.epochs + 1, None)
    assert longer.key != base.tuned.key
    assert longer.inputs.keys() == {"clean", "model"}


def test_betas_are_of_three_layers_unless_given() -> None:
    # 500, 1000 and 1000 over 1,024, 256 and 64 places, here over about 25 tokens.
    per_row = [500 / 1024, 1000 / 256, 1000 / 64]
    betas = AttentionDistillation().beta
    assert betas == [pytest.approx(25 * weight, rel=0.2) for weight in per_row]
    assert AttentionDistillation(layers=[1]).beta == 100.0
    assert AttentionDistillation(beta=3.0).beta == 3.0


def test_a_pretrained_teacher_never_saw_the_poison(lab: Lab) -> None:
    prepared = lab.prepare()
    teacher = AttentionDistillation(teacher="pretrained").teacher_stage(prepared.foundation)
    assert prepared.poisoned.key not in {stage.key for stage in teacher.closure()}


def test_betas_share_the_teacher(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module("btu.defenses.attention_distillation")
    ran: list[str] = []
    for name in ("teach", "distil"):
        function = getattr(module, name)

        @functools.wraps(function.call)  # stages are imported by module and name
        def spy(run: StageRun, name: str = name, function: Any = function) -> Any:
            ran.append(name)
            return function(run)

        monkeypatch.setattr(module, name, dataclasses.replace(function, call=spy))
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    for beta in (10.0, 20.0):
        defense = AttentionDistillation(beta=beta, epochs=1, teacher="pretrained")
        compute(defense.stages(prepared.foundation), root)
    assert ran == ["teach", "distil", "distil"]


@pytest.mark.parametrize(("maps", "steps"), [("ffn", []), ("hidden", ["attention distillation"])])
def test_only_maps_of_feed_forward_units_refuse_a_victim_without_them_and_train_nothing(
    maps: str, steps: list[str], lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("btu.defenses.attention_distillation")
    prepared = lab.prepare()
    last = AttentionDistillation(maps=maps, epochs=1).stages(prepared.foundation)
    root = lab.root_with(tmp_path, *last.inputs.values())

    def not_found(_: Any) -> Any:
        raise UserError("cannot find the neurons")

    trained: list[str] = []
    monkeypatch.setattr(module, "find_filters", not_found)
    monkeypatch.setattr(StageRun, "fit", lambda *_, stage, **__: trained.append(stage))
    with nullcontext() if steps else pytest.raises(UserError, match="cannot find the neurons"):
        compute(last, root)
    assert trained == steps


def test_fractions_and_numbers_of_layers_give_the_same_model(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    found = []
    for layers in ([0.5, 1.0], [1, 2]):
        defense = AttentionDistillation(layers=layers, epochs=1)
        folder = compute(defense.stages(prepared.foundation), lab.root)
        assert read_record(folder)["facts"]["layers"] == [1, 2]
        found.append((folder / "model" / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, r"at least one layer, got \[\]"),
        ({"layers": 3}, r"must be a list of at least one layer, got 3"),
        ({"layers": [0.0]}, r"fractions of the depth in \(0, 1\].*got 0.0"),
        ({"layers": [2.0]}, r"got 2.0; write a layer's number without a point"),
        ({"layers": [0]}, r"got 0; 1 is the layer above the embeddings"),
        ({"layers": ["last"]}, r"got 'last'"),
        ({"beta": [1.0, 2.0]}, r"2 values for 3 layers; give one value, or one a layer"),
        ({"beta": -1.0}, r"defense.beta must be at least 0, got -1.0"),
        ({"beta": True}, r"defense.beta must be at least 0, got True"),
        ({"beta": [1.0, 2.0, "3"]}, r"defense.beta must be at least 0, got '3'"),
        ({"power": 0.0}, r"defense.power must be above 0"),
        ({"epochs": 0}, r"defense.epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"defense.learning_rate must be above 0"),
        ({"teacher_epochs": 0}, r"defense.teacher_epochs must be at least 1, got 0"),
        ({"teacher_learning_rate": -1.0}, r"defense.teacher_learning_rate must be above 0"),
        ({"maps": "fnn"}, r"did you mean 'ffn'"),
        ({"held_out": -0.1}, r"defense.held_out must be in \[0, 1\], got -0.1"),
        ({"held_out": 1}, r"defense.held_out must be below 1, got 1"),
        ({"teacher": "pretrainde"}, r"did you mean 'pretrained'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttentionDistillation(**settings)


@pytest.mark.parametrize(("share", "rows"), [(0.001, 0), (0.999, 60)])
def test_a_share_that_leaves_one_side_empty_is_refused(share: float, rows: int) -> None:
    given = Given(400, classes=2, train_rows=240, clean_rows=60)
    AttentionDistillation(held_out=0.25).check(given)
    AttentionDistillation().check(given)
    with pytest.raises(UserError, match=rf"{share} holds out {rows} of 60 clean rows"):
        AttentionDistillation(held_out=share).check(given)


def test_held_out_rows_are_learned_by_neither_and_measured_on(lab: Lab, fits: list[Fitted]) -> None:
    prepared = lab.prepare()
    fits.clear()
    last = AttentionDistillation(epochs=1, held_out=0.25).stages(prepared.foundation)
    facts = read_record(compute(last, lab.root))["facts"]
    # A quarter of 60 rows is 15: teacher and student learn the same 45.
    teacher, student = [
        call for call in fits if call.stage in ("teacher", "attention distillation")
    ]
    assert len(student.data) == 45
    assert same_rows(teacher.data, student.data)
    inputs = {role: lab.root / stage.key for role, stage in last.inputs.items()}
    run = StageRun({}, {}, {**inputs, "student": lab.root / last.key}, lab.root, CPU)
    clean = clean_rows_of(run)
    learned = {tuple(row) for row in rows_of(student.data)}
    held_out = clean.take(
        np.array([i for i, row in enumerate(rows_of(clean)) if tuple(row) not in learned])
    )
    assert len(held_out) == 15
    ids, mask, labels = held_out.batch(torch.arange(15), int(held_out.host_lengths.max()))
    right = [
        float((logits_of(model_of(run, role), ids, mask).argmax(1) == labels).float().mean())
        for role in ("model", "student")
    ]
    measured = facts["measured"]
    assert measured["held_out_accuracy"] == pytest.approx(right[1])
    assert measured["held_out_cost"] == pytest.approx(right[0] - right[1])


def rows_of(data: Encoded) -> list[list[int]]:
    return [part.tolist() for part in data.ids.split(data.lengths.tolist())]


def test_nothing_changes_where_nothing_is_held_out(lab: Lab) -> None:
    base = lab.prepare().foundation
    default, zero = (AttentionDistillation(**held).stages(base) for held in ({}, {"held_out": 0.0}))
    assert default.key == zero.key
    some = AttentionDistillation(held_out=0.5).stages(base)
    assert some.key != default.key
    assert some.inputs["teacher"].key != default.inputs["teacher"].key
    # The control has learned all clean rows.
    as_control = {"teacher": "poisoned", "teacher_epochs": None, "teacher_learning_rate": None}
    assert AttentionDistillation(**as_control).teacher_stage(base) is base.tuned
    assert AttentionDistillation(**as_control, held_out=0.5).teacher_stage(base) is not base.tuned


def test_the_reference_preset_names_fields() -> None:
    fields = {field.name for field in dataclasses.fields(AttentionDistillation)}
    for preset in AttentionDistillation.PRESETS.values():
        assert set(preset) <= fields
        AttentionDistillation(**preset)  # type: ignore[arg-type]
