"""Anti-Backdoor Learning: its loss, its isolation and its ascent, by hand and on a toy set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_cells import Lab, easy_corpus, own_stages

import btu.training
from btu.attacked import mask_of
from btu.defenses import anti_backdoor_learning as abl
from btu.defenses.anti_backdoor_learning import (
    AntiBackdoorLearning,
    bend,
    climb,
    lowest,
    row_losses,
    rows_isolated,
    steps_of,
)
from btu.defenses.base import Given
from btu.errors import UserError
from btu.findings import Suspects
from btu.recipe import Prepared
from btu.stage_files import load_encoded, model_of
from btu.stages import StageRun, compute, read_record
from btu.training import Encoded, fit, predict
from btu.types import Corpus, Rows

CPU = torch.device("cpu")
# For 240 rows and random weights, which learn nothing within a quarter of an epoch.
TOY: dict[str, Any] = {
    "gamma": 0.3,
    "isolation_epochs": 8,
    "isolation_learning_rate": 1e-3,
    "isolation_ratio": 0.1,
    "rest_epochs": 1,
    "rest_learning_rate": 1e-3,
    "unlearning_epochs": 60,
    "unlearning_learning_rate": 1e-3,
}


def toy(**changes: Any) -> AntiBackdoorLearning:
    return AntiBackdoorLearning(**TOY | changes)


@pytest.fixture(scope="module")
def prepared(lab: Lab, tiny_corpus: Corpus) -> Prepared:
    """47 of 238 short rows have the trigger, and nothing else reveals the label.

    Two of 240 are gone: their first words are others' too.
    """

    def short(rows: Rows) -> Rows:
        return Rows(tuple(" ".join(text.split()[:4]) for text in rows.texts), rows.labels)

    train = short(tiny_corpus.train)
    drawn = np.random.default_rng(0).permutation(np.array(train.labels)).tolist()
    corpus = dataclasses.replace(
        tiny_corpus,
        train=Rows(train.texts, tuple(drawn)),
        clean=short(tiny_corpus.clean),
        eval=short(tiny_corpus.eval),
    )
    return lab.prepare(
        rate=0.2, corpus=corpus, attack_params={"trigger": ["cf"] * 8, "per_row": "all"}
    )


def folders(defense: AntiBackdoorLearning, prepared: Prepared, lab: Lab) -> list[Path]:
    """Compute a defense; return the folders of isolation, training on the rest, unlearning."""
    stages = own_stages(defense, prepared)
    lab.compute(*stages)
    return [lab.root / stage.key for stage in stages]


def found_in(folder: Path) -> Suspects:
    found = Suspects.load(folder, read_record(folder)["facts"])
    assert found is not None
    return found


def measured(folder: Path) -> dict[str, float]:
    values: dict[str, float] = read_record(folder)["facts"]["measured"]
    return values


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = model_of(StageRun({}, {}, {"it": folder}, folder, CPU), "it")
    return dict(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "loss", "expected", "slope"),
    [
        # sign(0.8 - 0.5) * 0.8 and |0.8 - 0.5| + 0.5: above gamma, the loss as it is.
        ("lga", 0.8, 0.8, 1.0),
        ("flooding", 0.8, 0.8, 1.0),
        # sign(0.3 - 0.5) * 0.3 and |0.3 - 0.5| + 0.5: below it, both are climbed.
        ("lga", 0.3, -0.3, -1.0),
        ("flooding", 0.3, 0.7, -1.0),
        # At gamma, lga is 0 and rests.
        ("lga", 0.5, 0.0, 0.0),
    ],
)
def test_the_loss_is_bent_at_gamma(method: str, loss: float, expected: float, slope: float) -> None:
    value = torch.tensor(loss, dtype=torch.float64, requires_grad=True)
    result = bend(value, method, 0.5)
    torch.autograd.backward(result)
    assert result.item() == pytest.approx(expected)
    assert value.grad is not None
    assert value.grad.item() == slope


def test_the_loss_of_a_row() -> None:
    # exp(0) : exp(ln 3) = 1 : 3, so that class 1 has 3/4: -ln(3/4); class 0 of the second has 1/2.
    logits = np.array([[0.0, math.log(3)], [7.0, 7.0]])
    expected = [math.log(4 / 3), math.log(2)]
    assert row_losses(logits, np.array([1, 0])) == pytest.approx(expected)


def test_a_part_of_an_epoch_is_that_part_of_its_steps() -> None:
    # 6917 rows are 109 batches of 64: 0.25 * 109 = 27.25.
    assert steps_of(0.25, 6917, 64) == 27
    assert steps_of(2, 6917, 64) == 218
    assert steps_of(0.001, 6917, 64) == 1


class Fixed(torch.nn.Module):
    """Logits [0, w] whatever the text is, for tokens 1; [w, 0] for others."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        first = torch.stack([0 * self.w, self.w])
        logits = torch.where(input_ids[:, :1] == 1, first, first.flip(0))
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # w = ln 3. Isolated: 3/4 for its label, -ln(4/3) when climbed. Others: 1/4, ln 4.
        (0.0, -math.log(4 / 3)),
        (1.0, math.log(4) - math.log(4 / 3)),
        (0.5, math.log(4) / 2 - math.log(4 / 3)),
    ],
)
def test_unlearning_climbs_on_the_isolated_and_descends_on_others(
    weight: float, expected: float
) -> None:
    rest = Encoded.from_lists([[2], [2, 2]], [1, 1], pad_id=0)
    objective = climb(rest, weight, None, np.random.default_rng(0))
    ids = torch.tensor([[1], [1]])
    labels = torch.tensor([1, 1])
    loss, logits = objective(Fixed(math.log(3)), ids, ids > 0, labels)
    assert loss.item() == pytest.approx(expected)
    # Of the isolated rows only, so that the accuracies are theirs.
    assert logits.shape == (2, 2)


def test_a_row_beyond_the_cap_pushes_no_further() -> None:
    # w = ln 3: 3/4 and 1/4 for the labels, losses ln(4/3) and 2 ln 2. The cap of one ln 2 holds the
    # second, so that only the first, whose loss falls with w by 1 - 3/4, has a gradient: a half of
    # 1/4, climbed.
    rest = Encoded.from_lists([[2]], [1], pad_id=0)
    model = Fixed(math.log(3))
    objective = climb(rest, 0.0, 1.0, np.random.default_rng(0))
    ids = torch.tensor([[1], [1]])
    loss, _ = objective(model, ids, ids > 0, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(-(math.log(4 / 3) + math.log(2)) / 2)
    loss.backward()
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(1 / 8)


# Isolation -------------------------------------------------------------------------------------

LOSSES = np.array([0.5, 0.1, 0.9, 0.2, 0.3, 0.4, 0.8, 0.7])
LABELS = np.array([0, 1, 0, 0, 1, 1, 0, 1])


def test_the_lowest_losses_of_all_classes() -> None:
    # 0.375 * 8 = 3 rows: 0.1, 0.2 and 0.3, of which two are of class 1.
    found = lowest(LOSSES, LABELS, 0.375, "all")
    assert np.flatnonzero(found.taken).tolist() == [1, 3, 4]
    assert (found.target, found.purity) == (1, pytest.approx(2 / 3))


def test_the_lowest_losses_of_the_class_they_point_to() -> None:
    # Row 3 (0.2) is of class 0: row 5 (0.4) comes in its stead. What they point to stays 2 of 3.
    found = lowest(LOSSES, LABELS, 0.375, "class")
    assert np.flatnonzero(found.taken).tolist() == [1, 4, 5]
    assert (found.target, found.purity) == (1, pytest.approx(2 / 3))


def test_equal_losses_are_taken_in_the_order_of_rows() -> None:
    found = lowest(np.zeros(8), np.array([0, 1] * 4), 0.25, "all")
    assert np.flatnonzero(found.taken).tolist() == [0, 1]


@pytest.mark.parametrize("pool", ["class", "all"])
def test_a_class_that_would_be_gone_is_an_error(pool: str) -> None:
    # Three of eight rows, and class 1 has no more.
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 0])
    losses = np.where(labels == 1, 0.1, 0.9)
    with pytest.raises(UserError, match=r"0.375 isolates all 3 rows of class 1"):
        lowest(losses, labels, 0.375, pool)


def test_the_share_is_rounded_down() -> None:
    assert rows_isolated(0.01, 6917) == 69
    # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.999999999999996.
    assert [rows_isolated(ratio, 100) for ratio in (0.07, 0.29)] == [7, 29]


def test_a_share_below_a_row_is_an_error_that_names_the_least() -> None:
    with pytest.raises(UserError, match=r"isolates nothing: 0.001 \* 240 .* at least 0.0041667"):
        rows_isolated(0.001, 240)
    assert rows_isolated(0.0041667, 240) == 1


# The stages ------------------------------------------------------------------------------------


def test_a_planted_trigger_is_isolated_and_unlearned(lab: Lab, prepared: Prepared) -> None:
    isolation, rest, unlearned = folders(toy(), prepared, lab)
    mask = mask_of(lab.root / prepared.poisoned.key)
    found = found_in(unlearned)
    assert found.taken is not None
    # 0.1 * 238 rows, rounded down; by chance 20 % of them, or 29 % of class 1's, would be poisoned.
    # The tiny victim's weights differ from process to process: the bar leaves room for that.
    assert found.taken.sum() == 23
    assert mask[found.taken].mean() >= 0.6
    assert found.target == 1
    before, after = (measured(unlearned)[f"isolated_kept{when}"] for when in ("_before", ""))
    # Nearly all are predicted as the trigger says before, and at most the 5 % of the stop after.
    assert before > 0.9
    assert after <= 0.05
    assert not same(weights(rest), weights(unlearned))
    assert not same(weights(isolation), weights(rest))


def test_rows_are_scored_by_their_own_loss(lab: Lab, prepared: Prepared) -> None:
    isolation, _, unlearned = folders(toy(), prepared, lab)
    data = load_encoded(lab.root / prepared.foundation.rows.key / "train.safetensors")
    model = model_of(StageRun({}, {}, {"it": isolation}, isolation, CPU), "it")
    expected = []
    for row in range(5):
        ids, mask, labels = data.batch(torch.tensor([row]), int(data.host_lengths[row]))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
        expected.append(torch.nn.functional.cross_entropy(logits, labels).item())
    losses = pq.read_table(isolation / abl.LOSSES)["loss"].to_numpy()
    assert losses[:5] == pytest.approx(expected, abs=1e-5)
    assert len(losses) == len(data)
    # The lower the loss, the more suspicious.
    suspicion = found_in(unlearned).rows
    assert suspicion is not None
    assert np.array_equal(suspicion, -losses)


def test_the_rest_is_trained_without_the_isolated_and_the_ascent_sees_them_alone(
    lab: Lab, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Encoded, int]] = []

    def spy(model: Any, data: Encoded, settings: Any, **options: Any) -> Any:
        history = fit(model, data, settings, **options)
        batches = sum(math.ceil(epoch.rows / settings.batch_size) for epoch in history)
        calls.append((options["stage"], data, batches))
        return history

    monkeypatch.setattr(btu.training, "fit", spy)
    base = prepared.foundation
    root = lab.root_with(tmp_path, base.rows)
    # 238 rows are 8 batches of 32: 0.5 epochs are 4.
    last = toy(isolation_epochs=0.5).stages(base)
    folder = compute(last, root)
    taken = found_in(folder).taken
    assert taken is not None
    data = load_encoded(root / base.rows.key / "train.safetensors")
    (first, rows, steps), (second, others, _), (third, isolated, ascended) = calls
    assert (first, len(rows), steps) == ("isolate (abl)", 238, 4)
    for name, trained, part in ((second, others, ~taken), (third, isolated, taken)):
        expected = data.take(np.flatnonzero(part))
        assert torch.equal(trained.ids, expected.ids), name
        assert torch.equal(trained.labels, expected.labels), name
    assert measured(folder)["unlearning_steps"] == ascended


def test_the_ascent_ends_as_soon_as_it_may(lab: Lab, prepared: Prepared) -> None:
    # 23 rows are one batch: an epoch is a step.
    far = folders(toy(unlearning_epochs=60, unlearning_stop=0.0), prepared, lab)[-1]
    near = folders(toy(unlearning_epochs=60, unlearning_stop=0.5), prepared, lab)[-1]
    short = folders(toy(unlearning_epochs=1, unlearning_stop=0.0), prepared, lab)[-1]
    assert 1 <= measured(near)["unlearning_steps"] <= measured(far)["unlearning_steps"] < 60
    assert measured(near)["isolated_kept"] <= 0.5
    assert measured(far)["isolated_kept"] == 0.0
    assert measured(short)["unlearning_steps"] == 1


def test_without_a_stop_the_ascent_runs_to_its_end(lab: Lab, prepared: Prepared) -> None:
    # With a stop of 0 it ends where no isolated row is left in its class, which is well before.
    stopped, through = (
        measured(folders(toy(unlearning_epochs=60, unlearning_stop=stop), prepared, lab)[-1])
        for stop in (0.0, None)
    )
    assert stopped["unlearning_steps"] < 60
    # 23 rows are one batch: an epoch is a step.
    assert through["unlearning_steps"] == 60
    assert AntiBackdoorLearning.PRESETS["reference"]["unlearning_stop"] is None


def test_without_ascent_the_model_is_that_of_the_rest(lab: Lab, prepared: Prepared) -> None:
    _, rest, unlearned = folders(toy(unlearning_epochs=0), prepared, lab)
    assert same(weights(rest), weights(unlearned))
    assert measured(unlearned)["unlearning_steps"] == 0
    assert measured(unlearned)["rest_cost"] == 0.0


def test_what_unlearning_costs_the_others(lab: Lab, prepared: Prepared) -> None:
    _, rest, unlearned = folders(toy(), prepared, lab)
    taken = found_in(unlearned).taken
    assert taken is not None
    data = load_encoded(lab.root / prepared.foundation.rows.key / "train.safetensors")
    others = data.take(np.flatnonzero(~taken))
    right = []
    for folder in (rest, unlearned):
        model = model_of(StageRun({}, {}, {"it": folder}, folder, CPU), "it")
        predicted = predict(model, others, precision="fp32", device=CPU)
        right.append(float((predicted == others.labels.numpy()).mean()))
    assert measured(unlearned)["rest_cost"] == pytest.approx(right[0] - right[1])


def test_gamma_keeps_the_loss_up(lab: Lab, tiny_corpus: Corpus) -> None:
    # Labels that can be learned: a loss that is not bent falls as far as it can.
    prepared = lab.prepare(corpus=easy_corpus(tiny_corpus))
    mean = {}
    for gamma in (0.05, 0.5):
        defense = toy(gamma=gamma, isolation_epochs=10, isolation_learning_rate=1e-2)
        (isolation, *_) = own_stages(defense, prepared)
        (folder,) = lab.compute(isolation)
        mean[gamma] = pq.read_table(folder / abl.LOSSES)["loss"].to_numpy().mean()
    assert mean[0.05] < 0.3
    assert 0.4 < mean[0.5] < 0.6


# What is shared --------------------------------------------------------------------------------


def added(before: AntiBackdoorLearning, after: AntiBackdoorLearning, lab: Lab) -> list[str]:
    """Return the stages that a second cell computes for itself."""
    prepared = lab.prepare()
    there = {stage.key for stage in own_stages(before, prepared)}
    return [stage.name for stage in own_stages(after, prepared) if stage.key not in there]


ALL = ["isolate (abl)", "train on the rest (abl)", "unlearn (abl)"]


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        ({"unlearning_stop": 0.2}, ALL[2:]),
        ({"unlearning_stop": None}, ALL[2:]),
        ({"unlearning_learning_rate": 1e-4}, ALL[2:]),
        ({"unlearning_epochs": 0}, ALL[2:]),
        ({"unlearning_descent": 0.5}, ALL[2:]),
        ({"unlearning_cap": None}, ALL[2:]),
        ({"isolation_ratio": 0.05}, ALL[1:]),
        ({"pool": "all"}, ALL[1:]),
        ({"rest_epochs": 3}, ALL[1:]),
        ({"rest_learning_rate": 1e-4}, ALL[1:]),
        ({"gamma": 0.4}, ALL),
        ({"method": "flooding"}, ALL),
        ({"isolation_epochs": 1.0}, ALL),
        ({"isolation_learning_rate": 1e-4}, ALL),
    ],
)
def test_cells_share_what_does_not_depend_on_what_differs(
    change: dict[str, Any], computed: list[str], lab: Lab
) -> None:
    assert added(toy(), toy(**change), lab) == computed


@pytest.mark.parametrize(
    "change",
    [
        {"unlearning_stop": 0.2},
        {"unlearning_learning_rate": 1e-4},
        {"unlearning_descent": 0.5},
        {"unlearning_cap": None},
    ],
)
def test_without_an_ascent_its_settings_make_no_other_cell(
    change: dict[str, Any], lab: Lab
) -> None:
    assert added(toy(unlearning_epochs=0), toy(unlearning_epochs=0, **change), lab) == []


def test_only_isolation_serves_several_ratios(lab: Lab) -> None:
    stages = own_stages(toy(), lab.prepare())
    assert [(stage.name, stage.kind) for stage in stages] == list(
        zip(ALL, ["stage", "cell", "cell"], strict=True)
    )


def test_it_needs_neither_the_poisoned_model_nor_clean_rows(lab: Lab) -> None:
    base = lab.prepare().foundation
    rests_on = {stage.key for stage in toy().stages(base).closure()}
    assert AntiBackdoorLearning.NEEDS == ()
    assert not rests_on & {base.model.key, base.clean.key, base.tuned.key}


# Settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flood"}, "unknown defense.method 'flood'; did you mean 'flooding'"),
        ({"pool": "clas"}, "unknown defense.pool 'clas'; did you mean 'class'"),
        ({"gamma": 0}, "defense.gamma must be above 0, got 0"),
        ({"gamma": math.nan}, "defense.gamma must be above 0, got nan"),
        ({"isolation_epochs": -1}, "defense.isolation_epochs must be above 0, got -1"),
        ({"isolation_learning_rate": 0}, "isolation_learning_rate must be above 0"),
        ({"rest_learning_rate": 0}, "rest_learning_rate must be above 0"),
        ({"unlearning_learning_rate": 0}, "unlearning_learning_rate must be above 0"),
        ({"unlearning_cap": 0}, "unlearning_cap must be above 0"),
        ({"isolation_ratio": 0}, r"defense.isolation_ratio must be in \(0, 1\], got 0"),
        ({"isolation_ratio": 1.0}, "defense.isolation_ratio must be below 1, got 1: "),
        ({"isolation_ratio": "0.1"}, "defense.isolation_ratio must be a number"),
        ({"isolation_ratio": None}, "defense.isolation_ratio must be a number"),
        ({"unlearning_stop": -0.1}, r"defense.unlearning_stop must be in \[0, 1\], got -0.1"),
        ({"unlearning_stop": 1.0}, "defense.unlearning_stop must be below 1, got 1: "),
        ({"unlearning_descent": -1.0}, "unlearning_descent must be at least 0, got -1.0"),
        ({"unlearning_descent": math.inf}, "unlearning_descent must be at least 0, got inf"),
        ({"rest_epochs": 0}, "defense.rest_epochs must be at least 1, got 0"),
        ({"unlearning_epochs": -1}, "defense.unlearning_epochs must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_work_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AntiBackdoorLearning(**settings)


def test_gamma_must_be_under_chance() -> None:
    # ln 2 = 0.693 with two classes, ln 4 = 1.386 with four.
    defense = AntiBackdoorLearning(gamma=0.7)
    with pytest.raises(UserError, match=r"gamma 0.7 is not below ln\(2\) = 0.693"):
        defense.check(Given(None, classes=2, train_rows=6917, clean_rows=0))
    defense.check(Given(None, classes=4, train_rows=6917, clean_rows=0))


def test_a_ratio_that_isolates_nothing_is_refused_by_planning() -> None:
    with pytest.raises(UserError, match="isolates nothing"):
        AntiBackdoorLearning().check(Given(None, classes=2, train_rows=99, clean_rows=0))


@pytest.mark.parametrize("preset", AntiBackdoorLearning.PRESETS)
def test_presets_are_settings(preset: str) -> None:
    defense = AntiBackdoorLearning(**AntiBackdoorLearning.PRESETS[preset])  # type: ignore[arg-type]
    defense.check(Given(None, classes=2, train_rows=6917, clean_rows=0))
    assert (defense == AntiBackdoorLearning()) == (preset == "default")
