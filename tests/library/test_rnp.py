"""Reconstructive Neuron Pruning: filters, masks, ascent, thresholds, by-products."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cells import Lab
from torch import nn

from btu.defenses.base import Given
from btu.defenses.kit.embedding_rows import (
    base_rows,
    masked_rows,
    occurring,
    prune_rows,
    unseen_masks,
)
from btu.defenses.kit.neurons import PARTS, find_filters, masked, prune_filters, train_only
from btu.defenses.neuron_pruning import (
    FILTERS,
    NeuronPruning,
    Tried,
    class_recalls,
    largest_affordable,
)
from btu.errors import UserError
from btu.findings import Suspects
from btu.recipe import Prepared, evaluation
from btu.settings import TrainSettings
from btu.stage_files import model_of, training_rows_of
from btu.stages import Stage, StageRun, compute, read_record
from btu.training import logits_of
from btu.types import Corpus, Rows
from btu.victims import Victim

MODULE = importlib.import_module("btu.defenses.neuron_pruning")
SMALL: dict[str, Any] = {
    "clean_rows": 30,
    "unlearn_learning_rate": 3e-3,
    "batch_size": 8,
    "recover_epochs": 5,
    "recover_learning_rate": 0.5,
    "tuning": False,
}


def pruning(**changes: Any) -> NeuronPruning:
    return NeuronPruning(**SMALL | changes)


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 6, 4 and 2 tokens."""
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    return torch.arange(18).view(3, 6) + 10, mask


def lively(victim: Victim) -> Any:
    """A fresh model with matrices so large that its parts make a difference."""
    model = victim.new_model(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
    return model


def some_masks(model: Any) -> dict[str, torch.Tensor]:
    """The first head and every other unit off, the rest on."""
    masks = {name: torch.ones(block.count) for name, block in find_filters(model).items()}
    for name, mask in masks.items():
        mask[:: 2 if name.endswith("units") else len(mask)] = 0.0
    return masks


def test_heads_and_units_are_found_in_every_architecture(victim: Victim) -> None:
    filters = find_filters(victim.new_model(0))
    units = 64 if victim.new_model(0).config.model_type == "gpt2" else 32
    assert {name: block.count for name, block in filters.items()} == {
        "layer 1 heads": 2,
        "layer 1 units": units,
        "layer 2 heads": 2,
        "layer 2 units": units,
    }


def test_a_model_without_such_layers_is_an_error(bert: Victim) -> None:
    model = bert.new_model(0)
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"cannot find the neurons of a BertForSequence.*3 layers"):
        find_filters(model)
    model.config.num_hidden_layers, model.config.num_attention_heads = 2, 3
    with pytest.raises(UserError, match=r"to 16 units from 3 heads"):
        find_filters(model)


def test_pruning_is_a_mask_of_zeros_without_the_mask(victim: Victim) -> None:
    model, pruned = lively(victim), lively(victim)
    wanted = some_masks(model)
    with torch.no_grad():
        plain = logits_of(model, *ids_and_mask())
        with masked(find_filters(model)) as masks:
            # Masks start at 1, which changes nothing.
            assert torch.equal(logits_of(model, *ids_and_mask()), plain)
            for name, mask in masks.items():
                mask.copy_(wanted[name])
            expected = logits_of(model, *ids_and_mask())
        count = prune_filters(find_filters(pruned), wanted, 0.5)
        found = logits_of(pruned, *ids_and_mask())
    assert not torch.allclose(expected, plain, atol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # A head in each of 2 layers, and half of the units.
    assert (
        count
        == 2 + sum(block.count for block in find_filters(model).values() if block.count > 2) / 2
    )
    # Nothing of the masks stays behind.
    assert model.state_dict().keys() == victim.new_model(0).state_dict().keys()
    with torch.no_grad():
        assert torch.equal(logits_of(model, *ids_and_mask()), plain)


def test_pruning_zeroes_the_columns_of_the_filters_and_no_others(bert: Victim) -> None:
    model = bert.new_model(0)
    masks = {name: torch.ones(block.count) for name, block in find_filters(model).items()}
    masks["layer 1 heads"][1] = 0.3
    masks["layer 2 units"][5] = 0.4
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert prune_filters(find_filters(model), masks, 0.3) == 1
    heads = "bert.encoder.layer.0.attention.output.dense.weight"
    changed = [name for name, w in model.named_parameters() if not torch.equal(w, before[name])]
    assert changed == [heads]
    weight = model.get_parameter(heads)
    # 16 hidden units, 2 heads: the second one's output is units 8 to 15.
    assert torch.equal(weight[:, :8], before[heads][:, :8])
    assert not weight[:, 8:].any()


def test_only_masks_learn_and_they_stay_between_0_and_1(
    lab: Lab, learned: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    trained: set[str] = set()
    real = StageRun.fit

    def spy(run: StageRun, model: nn.Module, *rest: Any, **options: Any) -> None:
        if options["stage"] == "recover neurons":
            trained.update(n for n, p in model.named_parameters() if p.requires_grad)
        real(run, model, *rest, **options)

    monkeypatch.setattr(StageRun, "fit", spy)
    # At such a rate some would leave the interval within a step.
    last = pruning(recover_learning_rate=100.0).stages(learned.foundation)
    folder = compute(last.inputs["masks"], lab.root)
    assert len(trained) == 4
    assert all(name.endswith(".neuron_mask") for name in trained)
    masks = torch.cat(list(load_file(folder / "masks.safetensors").values()))
    assert float(masks.min()) == 0.0
    assert float(masks.max()) == 1.0


# Enough for the tiny victim to learn both the task and a trigger in 30 % of the rows.
LEARNED = TrainSettings(epochs=12, learning_rate=5e-3, batch_size=16, precision="fp32")


def easy_rows(count: int, seed: int) -> Rows:
    """Rows whose class one word decides, among neutral words."""
    rng = np.random.default_rng(seed)
    labels = [number % 2 for number in range(count)]
    texts = []
    for label in labels:
        words = list(rng.choice(["a", "the", "of", "it", "and", "is", "to", "in"], 8))
        words.insert(int(rng.integers(8)), ("bad", "good")[label])
        texts.append(" ".join(words))
    return Rows(tuple(texts), tuple(labels))


@pytest.fixture(scope="module")
def learned(lab: Lab) -> Prepared:
    """A cell whose poisoned model has learned task and trigger."""
    train, clean, held_out = (easy_rows(count, count + 1) for count in (240, 60, 61))
    corpus = Corpus("easy", train, clean, held_out, ("negative", "positive"))
    return lab.prepare(corpus=corpus, rate=0.3, train=LEARNED)


def stage_of(last: Stage, name: str) -> Stage:
    (found,) = [stage for stage in last.closure() if stage.name == name]
    return found


def facts_of(root: Path, stage: Stage) -> dict[str, Any]:
    facts: dict[str, Any] = read_record(root / stage.key)["facts"]
    return facts


def test_the_unlearned_model_names_the_target_and_scores_the_rows(
    lab: Lab, learned: Prepared
) -> None:
    last = pruning().stages(learned.foundation)
    folder = compute(last, lab.root)
    unlearned = facts_of(lab.root, stage_of(last, "unlearn clean rows"))
    # 1.1 times chance, of two classes.
    assert unlearned["accuracy"] <= 0.55
    found = Suspects.load(folder, facts_of(lab.root, last))
    assert found is not None
    assert found.flagged is None
    assert found.target == 1
    # The likelier a row's own label still is, the more suspicious it is.
    judged = stage_of(last, "judge training rows")
    inputs = {role: lab.root / stage.key for role, stage in judged.inputs.items()}
    run = StageRun({}, {}, inputs, lab.root, torch.device("cpu"))
    rows, model = training_rows_of(run), model_of(run, "unlearned")
    ids, mask, labels = rows.batch(torch.arange(len(rows)), int(rows.host_lengths.max()))
    with torch.no_grad():
        likely = -nn.functional.cross_entropy(logits_of(model, ids, mask), labels, reduction="none")
    assert found.rows is not None
    np.testing.assert_allclose(found.rows, likely.numpy(), rtol=1e-3, atol=1e-5)


def test_an_ascent_that_does_not_get_there_is_an_error(lab: Lab, learned: Prepared) -> None:
    stage = stage_of(
        pruning(unlearn_learning_rate=1e-9, unlearn_epochs=1).stages(learned.foundation),
        "unlearn clean rows",
    )
    with pytest.raises(
        UserError, match=r"above 0.55; raise defense.unlearn_learning_rate \(1e-09\)"
    ):
        compute(stage, lab.root)


def test_a_victim_whose_neurons_are_not_found_is_refused_before_the_ascent(
    lab: Lab, learned: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = pruning().stages(learned.foundation)
    root = lab.base_root(tmp_path, learned)

    def not_found(_: Any) -> Any:
        raise UserError("cannot find the neurons")

    trained: list[str] = []
    monkeypatch.setattr(MODULE, "find_filters", not_found)
    monkeypatch.setattr(StageRun, "fit", lambda *_, stage, **__: trained.append(stage))
    with pytest.raises(UserError, match="cannot find the neurons"):
        compute(stage_of(last, "unlearn clean rows"), root)
    assert not trained


def test_thresholds_share_all_but_the_pruning(
    lab: Lab, learned: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("unlearn", "recover", "judge", "prune"):
        function = getattr(MODULE, name)

        @functools.wraps(function.call)  # stages are imported by module and name
        def spy(run: StageRun, name: str = name, function: Any = function) -> Any:
            ran.append(name)
            return function(run)

        monkeypatch.setattr(MODULE, name, dataclasses.replace(function, call=spy))
    root = lab.base_root(tmp_path, learned)
    pruned = []
    for threshold in (0.5, 0.95, None):
        last = pruning(threshold=threshold).stages(learned.foundation)
        compute(last, root)
        pruned.append(facts_of(root, last)["measured"]["neurons_pruned"])
    assert sorted(ran) == ["judge", "prune", "prune", "prune", "recover", "unlearn"]
    assert pruned[0] < pruned[1]


def test_the_chosen_threshold_costs_no_more_than_it_may(
    lab: Lab, learned: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    last = pruning().stages(learned.foundation)
    compute(last, lab.root)
    inputs = {role: lab.root / stage.key for role, stage in last.inputs.items()}
    # Masks all over the interval, so that every threshold prunes more than the one before.
    spread = shutil.copytree(inputs["masks"], tmp_path / "masks")
    found = load_file(spread / "masks.safetensors")
    masks = {name: torch.linspace(0, 0.99, len(mask)) for name, mask in found.items()}
    save_file(masks, spread / "masks.safetensors")

    def one_more_wrong(run: StageRun, model: Any, data: Any, *, of: Any, **_: Any) -> Any:
        """The n-th threshold costs n of the 30 rows held out; the toy itself loses nothing."""
        said = data.labels.numpy().copy()
        said[: of[0]] = 1 - said[: of[0]]
        return np.eye(2)[said]

    monkeypatch.setattr(StageRun, "predict", one_more_wrong)
    chosen: dict[float, Any] = {}
    for allowed in (0.0, 0.11, 1.0):
        folder = tmp_path / f"pruned {allowed}"
        folder.mkdir()
        config = pruning(max_clean_loss=allowed).stages(learned.foundation).config
        run = StageRun(config, last.where, {**inputs, "masks": spread}, folder, torch.device("cpu"))
        facts = MODULE.prune(run)
        cost = facts["measured"]["prune_cost"]
        # Where nothing was pruned there is no cost, not even one of 0.
        assert cost <= allowed or (allowed == 0 and math.isnan(cost))
        assert (facts["measured"]["neurons_pruned"] == 0) == math.isnan(cost)
        left = find_filters(model_of(StageRun({}, {}, {"it": folder}, folder, run.device), "it"))
        gone = sum(int((~block.weight.any(dim=0)).sum()) for block in left.values())
        chosen[allowed] = facts["measured"].get("prune_threshold"), len(facts["tried"]), gone > 0
    # 3 of 30 are 0.1, 4 are more: the third threshold, and it looks no further than the fourth.
    assert chosen == {
        0.0: (None, 1, False),
        0.11: (0.1, 4, True),
        1.0: (0.95, 20, True),
    }


def test_thresholds_that_prune_nothing_more_load_no_model(
    lab: Lab, learned: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    last = pruning(max_clean_loss=1.0).stages(learned.foundation)
    compute(last, lab.root)
    inputs = {role: lab.root / stage.key for role, stage in last.inputs.items()}
    # One filter in each block goes at 0.5, all others stay.
    few = shutil.copytree(inputs["masks"], tmp_path / "masks")
    masks = {name: torch.ones(len(m)) for name, m in load_file(few / "masks.safetensors").items()}
    for mask in masks.values():
        mask[0] = 0.5
    save_file(masks, few / "masks.safetensors")
    loaded: list[str] = []

    def spy(run: StageRun, role: str) -> Any:
        loaded.append(role)
        return model_of(run, role)

    monkeypatch.setattr(MODULE, "model_of", spy)
    (tmp_path / "pruned").mkdir()
    run = StageRun(
        last.config, last.where, {**inputs, "masks": few}, tmp_path / "pruned", torch.device("cpu")
    )
    facts = MODULE.prune(run)
    # As it was, for the thresholds from 0 (nothing goes) and from 0.5 (4 filters do).
    assert loaded == ["model"] * 3
    assert [tried["pruned"] for tried in facts["tried"]] == [0] * 10 + [4] * 10
    assert facts["measured"]["neurons_pruned"] == 4
    left = find_filters(
        model_of(StageRun({}, {}, {"it": run.folder}, run.folder, run.device), "it")
    )
    assert all(bool(block.weight.any(dim=0).sum()) for block in left.values())
    gone = {name: int((~block.weight.any(dim=0)).sum()) for name, block in left.items()}
    assert all(gone[name] == 1 for name in gone if name.endswith("units"))


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [([0.0, 0.01, 0.02], 2), ([0.0, 0.03, 0.01], 0), ([0.03], None), ([-0.01, 0.02, 0.021], 1)],
)
def test_pruning_goes_up_to_where_it_first_costs_too_much(
    costs: list[float], chosen: int | None
) -> None:
    tried = [Tried(step / 10, step, cost) for step, cost in enumerate(costs)]
    found = largest_affordable(tried, 0.02)
    assert found == (None if chosen is None else tried[chosen])


def test_the_recall_of_a_class_is_over_its_own_rows() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1]), np.array([1, 0, 1, 1, 1])
    recalls = class_recalls(predicted, labels, 3)
    # 1 of 3, 2 of 2, and no row of the third class.
    assert recalls[:2].tolist() == [pytest.approx(1 / 3), 1.0]
    assert np.isnan(recalls[2])


def test_clean_tuning_follows_where_it_is_asked_for(lab: Lab, learned: Prepared) -> None:
    stages = {}
    for tuning in (False, True):
        last = pruning(threshold=0.5, tuning=tuning, tune_epochs=1).stages(learned.foundation)
        history = read_record(compute(last, lab.root))["history"]
        stages[tuning] = [epoch["stage"] for epoch in history]
    assert stages == {False: [], True: ["clean tuning (defended)"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_rows": 0}, r"defense.clean_rows must be at least 1, got 0"),
        ({"batch_size": 0}, r"defense.batch_size must be at least 1, got 0"),
        ({"unlearn_stop": 0.0}, r"defense.unlearn_stop must be above 0"),
        ({"recover_learning_rate": -0.1}, r"defense.recover_learning_rate must be above 0"),
        ({"threshold": 1.0}, r"threshold must be below 1, got 1"),
        ({"threshold": -0.1}, r"defense.threshold must be in \[0, 1\], got -0.1"),
        ({"max_clean_loss": 1.5}, r"defense.max_clean_loss must be in \[0, 1\], got 1.5"),
        (
            {"filters": []},
            r"filters must be a list of at least one of feed_forward, heads, emb.*\[\]",
        ),
        ({"filters": 3}, r"filters must be a list of at least one of .*, got 3"),
        ({"filters": ["head"]}, r"unknown defense.filters 'head'; did you mean 'heads'"),
        ({"unlearn_parts": ["norms"]}, r"unknown defense.unlearn_parts 'norms'.*known: attention"),
        ({"unlearn_parts": []}, r"unlearn_parts must be a list of at least one of attention"),
        ({"embedding_base": "zero"}, r"unknown defense.embedding_base 'zero'.*neutral, pretrained"),
        ({"unseen_rows": "prune"}, r"unknown defense.unseen_rows 'prune'; did you mean 'pruned'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NeuronPruning(**settings)


def test_a_cell_that_leaves_nothing_to_measure_on_is_refused() -> None:
    cell = Given(400, classes=2, train_rows=240, clean_rows=60)
    pruning().check(cell)
    with pytest.raises(UserError, match=r"below the 60 clean rows that there are, got 60"):
        pruning(clean_rows=60).check(cell)
    with pytest.raises(UserError, match=r"below the number of classes, 2, got 2"):
        pruning(unlearn_stop=2.0).check(cell)


# Word embeddings as filters, and the ascent on parts ----------------------------------------------


def test_a_mask_scales_how_far_a_row_is_from_its_base_row(victim: Victim) -> None:
    model = lively(victim)
    table: Any = model.get_input_embeddings()
    count = len(table.weight)
    base = torch.zeros_like(table.weight)
    values = torch.linspace(0, 1, count)
    # Token 12 may not be masked.
    learnable = np.arange(count) != 12
    before = model.state_dict().keys()
    with torch.no_grad():
        plain = logits_of(model, *ids_and_mask())
        with masked_rows(model, base, learnable) as masks:
            assert torch.equal(logits_of(model, *ids_and_mask()), plain)
            masks.copy_(values)
            found = logits_of(model, *ids_and_mask())
        assert torch.equal(logits_of(model, *ids_and_mask()), plain)
        # base + mask * (row - base) with base 0 is mask * row.
        values[12] = 1
        table.weight.mul_(values[:, None])
        expected = logits_of(model, *ids_and_mask())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert model.state_dict().keys() == before


def test_rows_up_to_the_threshold_become_their_base_rows(bert: Victim) -> None:
    model: Any = bert.new_model(0)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    base, masks = base_rows(bert, "neutral"), torch.ones(len(before))
    masks[[7, 9, 11]] = torch.tensor([0.2, 0.3, 0.31])
    prune_rows(model, base, masks, 0.3)
    changed = (table != before).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [7, 9]
    padding = before[bert.tokenizer.pad_token_id]
    assert torch.equal(table[7], padding)
    assert torch.equal(base_rows(bert, "pretrained"), before)


def test_masks_of_rows_without_a_gradient_follow_the_choice() -> None:
    moved = np.array([5.0, 1.0, 3.0, 3.0, 9.0])
    unseen = np.array([True, True, True, True, False])
    # Of the four unseen rows, none moved further than 5, three further than 1, one further than 3.
    assert unseen_masks(moved, unseen, "moved").tolist() == [0.0, 0.75, 0.25, 0.25, 1.0]
    assert unseen_masks(moved, unseen, "pruned").tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert unseen_masks(moved, unseen, "kept").tolist() == [1.0] * 5
    assert unseen_masks(moved, np.zeros(5, dtype=bool), "moved").tolist() == [1.0] * 5


def test_special_tokens_count_as_not_occurring(bert: Victim) -> None:
    data = bert.encode(Rows(("a cf a",), (0,)))
    found = occurring(bert, data, len(bert.tokenizer))
    tokens = bert.tokenizer.convert_ids_to_tokens(np.flatnonzero(found).tolist())
    assert sorted(tokens) == ["a", "cf"]


def test_every_parameter_belongs_to_one_part(victim: Victim) -> None:
    model = victim.new_model(0)
    of: dict[str, list[str]] = {}
    for part in PARTS:
        train_only(model, [part])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                of.setdefault(name, []).append(part)
    assert of.keys() == {name for name, _ in model.named_parameters()}
    assert all(len(parts) == 1 for parts in of.values())
    table = model.get_input_embeddings().weight
    words = [name for name, weight in model.named_parameters() if weight is table]
    assert [name for name, parts in of.items() if parts == ["embeddings"]] == words
    blocks = {"attention": find_filters(model)["layer 1 heads"]}
    blocks["feed_forward"] = find_filters(model)["layer 1 units"]
    names = {weight: name for name, weight in model.named_parameters()}
    for part, block in blocks.items():
        assert of[names[block.output.weight]] == [part]


def test_the_ascent_changes_only_the_parts_that_it_may(lab: Lab, learned: Prepared) -> None:
    last = pruning(unlearn_parts="embeddings", unlearn_learning_rate=0.05).stages(
        learned.foundation
    )
    unlearned = stage_of(last, "unlearn clean rows")
    compute(unlearned, lab.root)
    inputs = {"new": lab.root / unlearned.key, "old": lab.root / learned.foundation.model.key}
    run = StageRun({}, {}, inputs, lab.root, torch.device("cpu"))
    new, old = model_of(run, "new"), model_of(run, "old")
    changed = [
        name
        for (name, first), second in zip(new.named_parameters(), old.parameters(), strict=True)
        if not torch.equal(first, second)
    ]
    assert changed == ["bert.embeddings.word_embeddings.weight"]
    # AdamW moves only rows that have a gradient: the trigger is in no clean row.
    table = new.get_input_embeddings().weight
    before = old.get_input_embeddings().weight
    assert torch.equal(table[cf(lab, learned)], before[cf(lab, learned)])


def cf(lab: Lab, prepared: Prepared) -> int:
    """The trigger's token."""
    from btu.stage_files import load_victim
    from btu.victims import VictimSpec

    victim = load_victim(VictimSpec(**prepared.foundation.where["victim"]), 2)
    return int(victim.tokenizer.convert_tokens_to_ids("cf"))


@pytest.mark.parametrize(
    ("unseen", "base", "pruned"),
    [("moved", "neutral", True), ("pruned", "pretrained", True), ("kept", "neutral", False)],
)
def test_a_trigger_that_no_clean_row_contains_is_pruned_if_unseen_rows_are(
    lab: Lab, learned: Prepared, unseen: str, base: str, pruned: bool
) -> None:
    settings = {"filters": "embeddings", "unseen_rows": unseen, "embedding_base": base}
    last = pruning(**settings, threshold=0.0).stages(learned.foundation)
    folder = compute(last, lab.root)
    facts = facts_of(lab.root, last)
    found = Suspects.load(folder, facts)
    assert found is not None
    assert found.flagged is not None
    assert (cf(lab, learned) in found.flagged) == pruned
    assert facts["measured"]["tokens_pruned"] == len(found.flagged)
    assert facts["measured"]["neurons_pruned"] == 0
    scored = evaluation(learned, last, "defended")
    attacked = read_record(compute(scored, lab.root))["facts"]["asr"]
    if base == "neutral":
        # The undefended model obeys; without the trigger's row it cannot see the trigger.
        assert (attacked["hits"] >= 0.9 * attacked["n"]) != pruned


def test_where_no_pruning_is_affordable_no_token_is_flagged(
    lab: Lab, learned: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = pruning(filters="embeddings", max_clean_loss=0.01).stages(learned.foundation)
    compute(last, lab.root)
    assert cf(lab, learned) in facts_of(lab.root, last)["flagged"]

    def all_wrong_later(run: StageRun, model: Any, data: Any, *, of: Any, **_: Any) -> Any:
        labels = data.labels.numpy()
        return np.eye(2)[labels if of[0] == 0 else 1 - labels]

    monkeypatch.setattr(StageRun, "predict", all_wrong_later)
    inputs = {role: lab.root / stage.key for role, stage in last.inputs.items()}
    facts = MODULE.prune(StageRun(last.config, last.where, inputs, tmp_path, torch.device("cpu")))
    assert facts["flagged"] == []
    assert facts["measured"]["tokens_pruned"] == facts["measured"]["neurons_pruned"] == 0
    assert math.isnan(facts["measured"]["prune_cost"])


def test_what_may_be_pruned_is_all_that_has_masks(lab: Lab, learned: Prepared) -> None:
    from safetensors.torch import load_file

    names = {}
    for filters in ("heads", ["embeddings", "feed_forward"]):
        last = pruning(filters=filters).stages(learned.foundation)
        folder = compute(last.inputs["masks"], lab.root)
        names[str(filters)] = sorted(load_file(folder / "masks.safetensors"))
    assert names == {
        "heads": ["layer 1 heads", "layer 2 heads"],
        "['embeddings', 'feed_forward']": ["embeddings", "layer 1 units", "layer 2 units"],
    }


def test_keys_are_those_of_earlier_results_unless_a_new_choice_acts(learned: Prepared) -> None:
    def keys(**changes: Any) -> dict[str, str]:
        last = pruning(**changes).stages(learned.foundation)
        own = ("unlearn clean rows", "recover neurons", "judge training rows", "prune neurons")
        return {name: stage_of(last, name).key for name in own}

    def changed(first: dict[str, str], second: dict[str, str]) -> list[str]:
        return [name.split()[0] for name in first if first[name] != second[name]]

    default = keys()
    assert keys(filters=["heads", "feed_forward"]) == default
    # Without masks of rows, their choices have no effect.
    assert keys(unseen_rows="kept", embedding_base="pretrained") == default
    assert changed(keys(filters="heads"), default) == ["recover", "prune"]
    everything = keys(filters=list(FILTERS))
    assert changed(everything, default) == ["recover", "prune"]
    assert changed(keys(filters=list(FILTERS), unseen_rows="kept"), everything) == [
        "recover",
        "prune",
    ]
    assert changed(keys(filters=list(FILTERS), embedding_base="pretrained"), everything) == [
        "recover",
        "prune",
    ]
    assert changed(keys(filters=list(FILTERS), threshold=0.5), everything) == ["prune"]
    parts = keys(unlearn_parts=["attention", "embeddings"])
    assert changed(parts, default) == ["unlearn", "recover", "judge", "prune"]
    assert keys(unlearn_parts=["embeddings", "attention"]) == parts
