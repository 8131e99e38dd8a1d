"""The training loop and prediction."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from btu.errors import UserError
from btu.evaluation import EvalSet, evaluate
from btu.fast_dropout import fast_dropout
from btu.settings import TrainSettings
from btu.training import (
    CHUNK_BATCHES,
    PREDICT_BATCH,
    Encoded,
    NonFiniteLossError,
    _schedule,
    choose_device,
    fit,
    logits_of,
    plan_batches,
    predict,
    resolve_precision,
    use_threads,
)
from btu.types import Corpus, Progress
from btu.victims import Victim

CPU = torch.device("cpu")


def settings(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "epochs": 1,
        "learning_rate": 1e-3,
        "batch_size": 8,
        "precision": "fp32",
    }
    return TrainSettings(**values | changes)  # type: ignore[arg-type]


class Toy(nn.Module):
    """Logits from the mean of the real tokens' embeddings; records the widths that it sees."""

    def __init__(self, vocabulary: int = 10, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, 4)
        self.classifier = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.seen: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.seen.append(tuple(input_ids.shape))
        self.modes.append(self.training)
        weight = attention_mask[..., None].float()
        mean = (self.embedding(input_ids) * weight).sum(1) / weight.sum(1).clamp(min=1)
        return SimpleNamespace(logits=self.classifier(self.dropout(mean)))


@pytest.fixture
def toy() -> Toy:
    return Toy()


def toy_data(count: int = 64) -> Encoded:
    """Class 1 contains token 7, class 0 token 3; lengths 1 to 5 go round."""
    rows = [[7 if i % 2 else 3] + [5] * (i % 5) for i in range(count)]
    return Encoded.from_lists(rows, [i % 2 for i in range(count)], pad_id=0)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Encoded rows ----------------------------------------------------------------------------------


@pytest.fixture
def three() -> Encoded:
    return Encoded.from_lists([[5, 6, 7], [8], [5, 5]], [1, 0, 1], pad_id=9)


def test_rows_lie_end_to_end(three: Encoded) -> None:
    assert three.ids.tolist() == [5, 6, 7, 8, 5, 5]
    assert three.starts.tolist() == [0, 3, 4]
    assert three.lengths.tolist() == three.host_lengths.tolist() == [3, 1, 2]
    assert len(three) == 3


def test_a_batch_is_padded_and_masked(three: Encoded) -> None:
    ids, mask, labels = three.batch(torch.tensor([2, 0]), width=4)
    assert ids.tolist() == [[5, 5, 9, 9], [5, 6, 7, 9]]
    assert mask.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert labels.tolist() == [1, 1]


def test_a_batch_narrower_than_a_row_cuts_it(three: Encoded) -> None:
    ids, mask, _ = three.batch(torch.tensor([0, 1]), width=2)
    assert ids.tolist() == [[5, 6], [8, 9]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_tokens_can_be_removed(three: Encoded) -> None:
    left = three.without([5, 8])
    # Rows 5 6 7 -> 6 7, 8 -> nothing, 5 5 -> nothing; labels and row order stay.
    assert left.ids.tolist() == [6, 7]
    assert left.lengths.tolist() == left.host_lengths.tolist() == [2, 0, 0]
    assert left.starts.tolist() == [0, 2, 2]
    assert left.labels.tolist() == [1, 0, 1]
    ids, mask, _ = left.batch(torch.tensor([0, 1, 2]), width=2)
    assert ids.tolist() == [[6, 7], [9, 9], [9, 9]]
    assert mask.tolist() == [[True, True], [False, False], [False, False]]
    assert three.ids.tolist() == [5, 6, 7, 8, 5, 5]  # the original is unchanged


def test_removing_nothing_changes_nothing(three: Encoded) -> None:
    left = three.without([])
    assert left.ids.tolist() == three.ids.tolist()
    assert left.starts.tolist() == three.starts.tolist()
    assert left.lengths.tolist() == three.lengths.tolist()


def test_rows_emptied_of_every_token_still_make_a_batch(three: Encoded) -> None:
    left = three.without([5, 6, 7, 8])
    ids, mask, _ = left.batch(torch.tensor([0, 2]), width=1)
    assert ids.tolist() == [[9], [9]]
    assert not mask.any()


def test_tokens_are_counted(three: Encoded) -> None:
    # 5 three times, 6, 7 and 8 once; the padding id is in no row
    assert three.counts(10).tolist() == [0, 0, 0, 0, 0, 3, 1, 1, 1, 0]


def test_rows_that_hold_a_token_are_found(three: Encoded) -> None:
    assert three.holds([5]).tolist() == [True, False, True]
    assert three.holds([6, 8]).tolist() == [True, True, False]
    assert three.holds([]).tolist() == [False, False, False]
    assert three.without([5]).holds([5]).tolist() == [False, False, False]


def test_rows_can_be_taken_in_any_order(three: Encoded) -> None:
    taken = three.take(np.array([2, 0, 2]))
    assert as_lists(taken) == [[5, 5], [5, 6, 7], [5, 5]]
    assert taken.labels.tolist() == [1, 1, 1]
    assert taken.host_lengths.tolist() == taken.lengths.tolist() == [2, 3, 2]
    assert taken.pad_id == 9
    ids, mask, _ = taken.batch(torch.tensor([1, 0]), width=3)
    assert ids.tolist() == [[5, 6, 7], [5, 5, 9]]
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    assert as_lists(three) == [[5, 6, 7], [8], [5, 5]]  # the original is unchanged


def test_of_taken_rows_the_others_tokens_are_gone(three: Encoded, tmp_path: Path) -> None:
    taken = three.take(np.array([1, 2]))
    assert taken.counts(10).tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 1, 0]
    assert taken.holds([5, 6]).tolist() == [False, True]
    assert as_lists(taken.without([8])) == [[], [5, 5]]
    taken.save(tmp_path / "rows.safetensors")
    assert as_lists(Encoded.load(tmp_path / "rows.safetensors")) == [[8], [5, 5]]


def test_no_rows_may_be_taken(three: Encoded) -> None:
    for rows in (three, Encoded.from_lists([], [], pad_id=9)):
        none = rows.take(np.flatnonzero(np.zeros(len(rows), dtype=bool)))
        assert len(none) == len(none.ids) == len(none.labels) == 0
        assert not none.holds([5]).any()


def test_rows_that_lost_tokens_can_be_taken(three: Encoded) -> None:
    assert as_lists(three.without([5, 8]).take(np.array([1, 0]))) == [[], [6, 7]]


def test_no_rows_are_no_rows() -> None:
    empty = Encoded.from_lists([], [], pad_id=0)
    assert len(empty) == 0
    assert len(empty.starts) == 0


def as_lists(data: Encoded) -> list[list[int]]:
    return [data.ids[s : s + n].tolist() for s, n in zip(data.starts, data.lengths, strict=True)]


@pytest.mark.parametrize(
    "rows",
    [[[5, 6, 7], [], [8], [], [5, 2**31 - 1]], [[], []], []],
    ids=["ragged", "all empty", "none"],
)
def test_rows_survive_the_disk(rows: list[list[int]], tmp_path: Path) -> None:
    data = Encoded.from_lists(rows, [i % 3 for i in range(len(rows))], pad_id=9)
    data.save(tmp_path / "rows.safetensors")
    back = Encoded.load(tmp_path / "rows.safetensors")
    assert as_lists(back) == rows
    for name in ("ids", "starts", "lengths", "labels"):
        assert torch.equal(getattr(back, name), getattr(data, name))
        assert getattr(back, name).dtype == torch.int64
    assert back.host_lengths.tolist() == data.host_lengths.tolist()
    assert back.host_lengths.dtype == data.host_lengths.dtype
    assert back.pad_id == 9
    assert len(back) == len(rows)


def test_rows_that_lost_tokens_survive_the_disk(three: Encoded, tmp_path: Path) -> None:
    three.without([5, 8]).save(tmp_path / "rows.safetensors")
    back = Encoded.load(tmp_path / "rows.safetensors")
    assert as_lists(back) == [[6, 7], [], []]
    ids, mask, labels = back.batch(torch.tensor([0, 1]), width=2)
    assert ids.tolist() == [[6, 7], [9, 9]]
    assert mask.tolist() == [[True, True], [False, False]]
    assert labels.tolist() == [1, 0]


# Batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 300, 1000])
def test_an_epoch_covers_each_row_once(count: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, count)
    batches = plan_batches(lengths, 8, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == math.ceil(count / 8)
    assert max(len(batch) for batch in batches) <= 8


def test_batches_hold_rows_of_similar_length() -> None:
    batch_size, span = 16, 60
    lengths = np.random.default_rng(0).integers(1, span + 1, 10 * batch_size * CHUNK_BATCHES)
    batches = plan_batches(lengths, batch_size, np.random.default_rng(1))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    padding = padded - int(lengths.sum())
    # Sorted in chunks of 32 batches, the spans of a chunk's batches add up to `span` at the most,
    # so padding per chunk is below batch_size * span; a chunk has 32 * 16 rows of mean ~30.
    assert padding < 10 * batch_size * span
    assert padding / padded < 0.06  # 16 * 60 / (32 * 16 * 30.5) = 0.061
    # In arrival order it would be nearly half: the longest of 16 is near 60, the mean near 30.
    arrival = lengths.reshape(-1, batch_size)
    assert 1 - lengths.sum() / (arrival.max(axis=1).sum() * batch_size) > 0.4


def test_batches_differ_from_epoch_to_epoch_and_are_not_sorted() -> None:
    lengths = np.arange(200)
    rng = np.random.default_rng(0)
    first, second = plan_batches(lengths, 8, rng), plan_batches(lengths, 8, rng)
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    longest = [int(lengths[batch].max()) for batch in first]
    assert longest != sorted(longest)


def test_each_batch_is_as_wide_as_its_longest_row_or_as_asked() -> None:
    free, fixed = Toy(), Toy()
    fit(free, toy_data(), settings(), seed=0, stage="test", device=CPU)
    fit(fixed, toy_data(), settings(), seed=0, stage="test", device=CPU, pad_to=9)
    # 64 rows of lengths 1 to 5, sorted: 8 batches of 8, the shortest of which needs one column.
    assert len(free.seen) == 8
    assert {width for _, width in free.seen} == {1, 2, 3, 4, 5}
    assert set(fixed.seen) == {(8, 9)}


# The learning rate -----------------------------------------------------------------------------


def rates(steps: int, **changes: object) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = _schedule(optimizer, settings(**changes), steps)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_linear_schedule() -> None:
    # 10 steps, 0.2 of them warm up: 1/3 and 2/3, then from the peak down in eighths.
    expected = [1 / 3, 2 / 3, 8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates(10, schedule="linear", warmup_fraction=0.2) == pytest.approx(expected)


def test_constant_schedule() -> None:
    assert rates(4, schedule="constant", warmup_fraction=0.25) == [0.5, 1.0, 1.0, 1.0]
    assert rates(3, schedule="constant", warmup_fraction=0.0) == [1.0, 1.0, 1.0]


def test_no_step_is_lost_to_the_schedule() -> None:
    for steps in (1, 2, 5):
        assert all(rate > 0 for rate in rates(steps, warmup_fraction=0.06))
        assert all(rate > 0 for rate in rates(steps, warmup_fraction=1.0))


# Training --------------------------------------------------------------------------------------


def test_a_separable_problem_is_learned_and_the_history_says_so() -> None:
    model = Toy()
    history = fit(
        model,
        toy_data(),
        settings(epochs=12, learning_rate=0.1),
        seed=0,
        stage="toy",
        device=CPU,
    )
    assert [(e.stage, e.epoch, e.rows) for e in history] == [("toy", i + 1, 64) for i in range(12)]
    assert history[0].loss == pytest.approx(math.log(2), abs=0.25)  # starts at chance
    assert history[-1].loss < 0.05
    assert history[-1].accuracy == 1.0
    assert all(e.seconds > 0 for e in history)
    predicted = predict(model, toy_data(), precision="fp32", device=CPU)
    assert np.array_equal(predicted, toy_data().labels.numpy())


def test_loss_and_accuracy_are_means_over_rows_not_over_batches() -> None:
    class Fixed(nn.Module):
        # Logits (2, 0) for a row of one token, (0, 2) for a longer one; nothing moves them.
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(1, 1))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            longer = attention_mask.sum(1, keepdim=True) > 1
            logits = torch.where(longer, torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0]))
            return SimpleNamespace(logits=logits + 0.0 * self.idle)

    # 3 rows of class 0 in one batch, 1 in the other; that one is predicted as class 1.
    data = Encoded.from_lists([[1], [1], [1], [1, 1]], [0, 0, 0, 0], pad_id=0)
    (epoch,) = fit(Fixed(), data, settings(batch_size=3), seed=0, stage="test", device=CPU)
    # Right: ln(1 + e^-2) = 0.126928; wrong: ln(1 + e^2) = 2.126928.
    # (3 * 0.126928 + 2.126928) / 4 = 0.626928; the mean of batch means would be 1.126928.
    assert epoch.loss == pytest.approx(0.626928, abs=1e-5)
    assert epoch.accuracy == 0.75


def test_training_is_deterministic_for_a_seed(victim: Victim, tiny_corpus: Corpus) -> None:
    data = victim.encode(tiny_corpus.train.take(range(64)))
    results = []
    for seed in (0, 0, 1):
        model = victim.new_model(0)
        torch.manual_seed(len(results))  # earlier draws have no effect
        history = fit(
            model, data, settings(epochs=2, batch_size=16), seed=seed, stage="t", device=CPU
        )
        results.append((weights(model), [(e.loss, e.accuracy) for e in history]))
    assert same(results[0][0], results[1][0])  # bitwise
    assert results[0][1] == results[1][1]
    assert not same(results[0][0], results[2][0])


def test_the_global_random_state_is_left_alone(toy: Toy, global_random_state: None) -> None:
    fit(toy, toy_data(), settings(), seed=0, stage="test", device=CPU)
    assert any(toy.modes)  # dropout was drawn


def test_a_failed_fit_leaves_the_global_random_state_alone(
    toy: Toy, global_random_state: None
) -> None:
    toy.classifier.weight.data.fill_(math.inf)
    with pytest.raises(NonFiniteLossError):
        fit(toy, toy_data(), settings(), seed=0, stage="test", device=CPU)


def test_frozen_parameters_do_not_change() -> None:
    model = Toy()
    model.classifier.requires_grad_(False)
    before = weights(model)
    # Weight decay would move a frozen matrix too if the optimizer held it.
    fit(model, toy_data(), settings(weight_decay=0.5), seed=0, stage="test", device=CPU)
    assert torch.equal(model.classifier.weight, before["classifier.weight"])
    assert torch.equal(model.classifier.bias, before["classifier.bias"])
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])


def test_weight_decay_acts_on_matrices_and_not_on_biases() -> None:
    model = Toy()
    with torch.no_grad():
        model.classifier.bias.fill_(1.0)
        model.embedding.weight[9] = 1.0  # token 9 is in no row: decay alone moves it
    # One step at 0.1 with decay 0.5 takes 1 to 1 - 0.1 * 0.5 = 0.95.
    fit(
        model,
        toy_data(8),
        settings(learning_rate=0.1, weight_decay=0.5, warmup_fraction=0.0, batch_size=8),
        seed=0,
        stage="test",
        device=CPU,
    )
    assert model.embedding.weight[9].tolist() == pytest.approx([0.95] * 4)
    # Adam's first step is 0.1 up or down, whatever the gradient; no decay: 1.1 or 0.9.
    assert (model.classifier.bias - 1).abs().tolist() == pytest.approx([0.1, 0.1], abs=1e-4)


def test_gradients_are_clipped_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = nn.utils.clip_grad_norm_

    def spy(parameters: object, max_norm: float, **kwargs: object) -> Tensor:
        norms.append(max_norm)
        total: Tensor = original(parameters, max_norm, **kwargs)
        return total

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    fit(Toy(), toy_data(16), settings(max_grad_norm=0.25), seed=0, stage="test", device=CPU)
    assert norms == [0.25, 0.25]  # 16 rows in 2 steps
    fit(Toy(), toy_data(16), settings(max_grad_norm=None), seed=0, stage="test", device=CPU)
    assert norms == [0.25, 0.25]


def test_progress_is_reported_once_an_epoch() -> None:
    seen: list[Progress] = []
    history = fit(
        Toy(),
        toy_data(),
        settings(epochs=3),
        seed=0,
        stage="toy",
        device=CPU,
        progress=seen.append,
    )
    assert [(p.stage, p.step, p.steps) for p in seen] == [("toy", i, 3) for i in (1, 2, 3)]
    assert [p.metrics["loss"] for p in seen] == [e.loss for e in history]
    assert [p.metrics["accuracy"] for p in seen] == [e.accuracy for e in history]


def test_a_long_epoch_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btu.training.REPORT_SECONDS", 0.0)
    seen: list[Progress] = []
    fit(
        Toy(),
        toy_data(16),  # 2 steps an epoch
        settings(epochs=2),
        seed=0,
        stage="toy",
        device=CPU,
        progress=seen.append,
    )
    assert [(p.step, p.part) for p in seen] == [
        *((0, 0.5), (0, 1.0), (1, 0.0)),
        *((1, 0.5), (1, 1.0), (2, 0.0)),
    ]


def test_the_model_trains_in_train_mode_and_is_left_in_eval_mode() -> None:
    model = Toy()
    fit(model, toy_data(), settings(), seed=0, stage="test", device=CPU)
    assert all(model.modes)
    assert not model.training


def test_no_rows_are_an_error() -> None:
    with pytest.raises(UserError, match="stage 'clean tuning' has no rows to train on"):
        fit(
            Toy(),
            Encoded.from_lists([], [], 0),
            settings(),
            seed=0,
            stage="clean tuning",
            device=CPU,
        )


def test_a_loss_that_is_not_finite_names_stage_step_and_settings() -> None:
    model = Toy()
    with torch.no_grad():
        model.embedding.weight[7] = math.nan  # every batch has a row of class 1
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss became nan in stage 'poisoned fine-tune' at step 1 \(epoch 1\) with "
        r"TrainSettings\(epochs=1, learning_rate=0\.001, .*lower the learning rate",
    ):
        fit(model, toy_data(), settings(), seed=0, stage="poisoned fine-tune", device=CPU)


def test_the_step_that_diverged_is_counted_over_epochs() -> None:
    class Breaks(Toy):
        # Fine for 10 steps, infinite from the 11th on.
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            output = super().forward(input_ids, attention_mask)
            return SimpleNamespace(logits=output.logits * (1 if len(self.seen) <= 10 else math.nan))

    with pytest.raises(NonFiniteLossError, match=r"at step 11 \(epoch 2\)"):
        # 64 rows by 8: 8 steps an epoch, so step 11 is the third of epoch 2.
        fit(Breaks(), toy_data(), settings(epochs=3), seed=0, stage="test", device=CPU)


@pytest.mark.parametrize("rows", [64, 8], ids=["many steps", "one step"])
def test_a_learning_rate_that_blows_up_is_an_error(rows: int) -> None:
    # With one step the loss is still finite: what the step left behind is not.
    with pytest.raises(NonFiniteLossError, match="in stage 'test' at step"):
        fit(
            Toy(),
            toy_data(rows),
            settings(learning_rate=1e39, warmup_fraction=0.0),
            seed=0,
            stage="test",
            device=CPU,
        )


# Batches in parts ------------------------------------------------------------------------------


def plain_fit(model: nn.Module, data: Encoded, given: TrainSettings, seed: int) -> list[float]:
    """The loop without parts: forward, backward and step, a batch at a time. Returns the losses."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": given.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=given.learning_rate,
        fused=True,
    )
    steps = math.ceil(len(data) / given.batch_size)
    scheduler = _schedule(optimizer, given, steps * given.epochs)
    rng = np.random.default_rng(seed)
    history = []
    with torch.random.fork_rng(devices=[]), fast_dropout(model, CPU):
        torch.manual_seed(seed)
        for _ in range(given.epochs):
            plan = plan_batches(data.host_lengths, given.batch_size, rng)
            losses = []
            for rows in plan:
                width = int(data.host_lengths[rows].max())
                ids, mask, labels = data.batch(torch.from_numpy(rows), width)
                loss = nn.functional.cross_entropy(logits_of(model, ids, mask), labels)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), given.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                losses.append(loss.detach())
            sizes = torch.tensor([len(rows) for rows in plan])
            history.append(float((torch.stack(losses) * sizes).sum() / len(data)))
    model.eval()
    return history


def test_one_part_is_the_plain_loop(bert: Victim, tiny_corpus: Corpus) -> None:
    # Bitwise, dropout included: a batch that is not cut is not scaled either.
    given = settings(epochs=2, batch_size=24)
    for data, new in (
        (toy_data(70), Toy),
        (bert.encode(tiny_corpus.train.take(range(70))), lambda: bert.new_model(0)),
    ):
        runs = []
        for options in ({}, {"accumulation": 1}):
            model = new()
            history = fit(model, data, given, seed=3, stage="t", device=CPU, **options)
            runs.append(([epoch.loss for epoch in history], weights(model)))
        model = new()
        expected = plain_fit(model, data, given, seed=3)
        for losses, found in runs:
            assert losses == expected
            assert same(found, weights(model))


def no_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norm of the gradient at every step that was taken."""
    found: list[float] = []
    original = nn.utils.clip_grad_norm_

    def spy(parameters: object, max_norm: float, **kwargs: object) -> Tensor:
        total: Tensor = original(parameters, max_norm, **kwargs)
        found.append(float(total))
        return total

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    return found


@pytest.mark.parametrize("parts", [2, 3, 8, 100])
@pytest.mark.parametrize("name", ["toy", "bert"])
def test_batches_in_parts_take_the_same_steps(
    bert: Victim, tiny_corpus: Corpus, norms: list[float], name: str, parts: int
) -> None:
    # Batches of 8 and, since 44 = 5 * 8 + 4, one of 4: 3 parts are of 3, 3 and 2 rows, so each
    # has to count by its rows; 8 and 100 parts are single rows, some of them none.
    rows = tiny_corpus.train.take(range(44))
    data = toy_data(44) if name == "toy" else bert.encode(rows)
    given = settings(epochs=2, batch_size=8)
    runs = []
    for accumulation in (1, parts):
        model = no_dropout(Toy() if name == "toy" else bert.new_model(0))
        norms.clear()
        history = fit(model, data, given, seed=0, stage="t", device=CPU, accumulation=accumulation)
        runs.append((history, list(norms), weights(model)))
    (one, one_norms, one_weights), (cut, cut_norms, cut_weights) = runs
    assert len(one_norms) == len(cut_norms) == 12  # 6 batches an epoch
    # fp32 rounds at 1.2e-7 of a value. Gradients are sums of terms up to about 1 that cancel out
    # to 1e-3 and less here, so they agree to a few 1e-7, not to a share of themselves.
    assert cut_norms == pytest.approx(one_norms, rel=1e-5, abs=1e-6)
    assert [e.loss for e in cut] == pytest.approx([e.loss for e in one], rel=1e-5)
    assert [e.accuracy for e in cut] == [e.accuracy for e in one]
    assert [e.rows for e in cut] == [44, 44]
    # A step moves a weight by up to the learning rate, 1e-3: all of them agree to 1 % of a step.
    for weight, expected in one_weights.items():
        torch.testing.assert_close(cut_weights[weight], expected, atol=1e-5, rtol=0)


def test_parts_are_what_is_in_memory_at_once() -> None:
    model = Toy()
    fit(model, toy_data(20), settings(), seed=0, stage="t", device=CPU, accumulation=3)
    # Two batches of 8 in 3, 3 and 2 rows, in whatever order the one of 4 comes: 2, 1 and 1.
    sizes = [rows for rows, _ in model.seen]
    assert len(sizes) == 9
    assert sorted(sizes) == sorted([3, 3, 2, 3, 3, 2, 2, 1, 1])


def test_a_batch_smaller_than_its_parts_works() -> None:
    model = Toy()
    (epoch,) = fit(model, toy_data(2), settings(), seed=0, stage="t", device=CPU, accumulation=5)
    assert [rows for rows, _ in model.seen] == [1, 1]
    assert epoch.rows == 2
    assert math.isfinite(epoch.loss)


def test_each_part_is_padded_to_its_own_longest_row_or_as_asked() -> None:
    # One batch of lengths 1 1 2 2, sorted: two parts of two rows each.
    data = Encoded.from_lists([[3, 5], [7], [7, 5], [3]], [0, 1, 1, 0], pad_id=0)
    free, fixed = Toy(), Toy()
    fit(free, data, settings(), seed=0, stage="t", device=CPU, accumulation=2)
    fit(fixed, data, settings(), seed=0, stage="t", device=CPU, accumulation=2, pad_to=9)
    assert free.seen == [(2, 1), (2, 2)]
    assert fixed.seen == [(2, 9), (2, 9)]


def test_a_loss_that_is_not_finite_is_found_in_any_part() -> None:
    model = Toy()
    with torch.no_grad():
        model.embedding.weight[9] = math.nan
    # The long row with token 9 is the last of its batch, so in the last part.
    data = Encoded.from_lists([[3]] * 7 + [[9] * 6], [0, 1] * 4, pad_id=0)
    with pytest.raises(NonFiniteLossError, match=r"became nan in stage 't' at step 1 \(epoch 1\)"):
        fit(model, data, settings(), seed=0, stage="t", device=CPU, accumulation=4)


# Prediction ------------------------------------------------------------------------------------


def test_predictions_do_not_depend_on_how_rows_are_batched() -> None:
    count = 2 * PREDICT_BATCH + 44  # three batches
    data, model = toy_data(count), Toy()
    fit(model, data, settings(epochs=3, learning_rate=0.1), seed=0, stage="t", device=CPU)
    model.seen.clear()
    together = predict(model, data, precision="fp32", device=CPU)
    assert sum(rows for rows, _ in model.seen) == count
    assert len(model.seen) == 3
    assert set(together) == {0, 1}
    rows = [data.ids[s : s + n].tolist() for s, n in zip(data.starts, data.lengths, strict=True)]
    alone = [
        int(predict(model, Encoded.from_lists([row], [0], 0), precision="fp32", device=CPU)[0])
        for row in rows
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("batch_size", [1, 7, 300, 1000])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    data, model = toy_data(300), Toy()
    fit(model, data, settings(epochs=3, learning_rate=0.1), seed=0, stage="t", device=CPU)
    expected = predict(model, data, precision="fp32", device=CPU)
    model.seen.clear()
    found = predict(model, data, precision="fp32", device=CPU, batch_size=batch_size)
    np.testing.assert_array_equal(found, expected)
    assert set(found) == {0, 1}
    assert len(model.seen) == math.ceil(300 / batch_size)
    assert max(rows for rows, _ in model.seen) == min(batch_size, 300)


def test_scores_do_not_depend_on_the_batch_size() -> None:
    data, model = toy_data(50), Toy()
    rows = EvalSet(data, data, data, target=1)
    scores = [
        evaluate(model, rows, precision="fp32", device=CPU, batch_size=size) for size in (3, 128)
    ]
    assert scores[0] == scores[1]


def test_prediction_runs_in_eval_mode_and_changes_no_weight() -> None:
    model = Toy().train()
    before = weights(model)
    predict(model, toy_data(), precision="fp32", device=CPU)
    assert not any(model.modes)
    assert same(weights(model), before)


def test_a_model_can_be_trained_after_it_predicted() -> None:
    model = Toy()
    predict(model, toy_data(), precision="fp32", device=CPU)
    before = weights(model)
    fit(model, toy_data(), settings(), seed=0, stage="test", device=CPU)
    assert not same(weights(model), before)


def test_scores_are_counted_by_hand() -> None:
    class Says(nn.Module):
        # Predicts the row's first token.
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=nn.functional.one_hot(input_ids[:, 0], 3).float())

    clean = Encoded.from_lists([[0], [1], [2], [1, 1]], [0, 1, 1, 0], pad_id=0)
    triggered = Encoded.from_lists([[2], [2], [0], [2, 1]], [0, 1, 0, 1], pad_id=0)
    plain = Encoded.from_lists([[2], [1], [0], [0, 1]], [0, 1, 0, 1], pad_id=0)
    scores = evaluate(
        Says(), EvalSet(clean, triggered, plain, target=2), precision="fp32", device=CPU
    )
    # clean: 0, 1 right, 2 and 1 wrong -> 2 of 4; triggered: 3 of 4 give 2; plain: 1 of 4 gives 2
    assert (scores.cacc.value, scores.asr.value, scores.ftr.value) == (0.5, 0.75, 0.25)
    logged = scores.as_metrics("undefended_")
    assert logged["undefended_asr"] == 0.75
    assert logged["undefended_asr_n"] == 4
    assert len(logged) == 12  # three values, each with two ends and an n


# Devices and precision -------------------------------------------------------------------------


def test_without_a_gpu_asked_for_the_cpu_is_taken() -> None:
    assert choose_device(0).type == "cpu"


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpus in (1, 0.25):
        with pytest.raises(
            UserError,
            match=rf"resources\.gpu is {gpus} but no CUDA device is visible; install a CUDA build",
        ):
            choose_device(gpus)


def test_precision_follows_the_hardware_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"avx512_bf16": True}, "fp32"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx2": True}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_precision("auto", CPU) == expected
        assert resolve_precision("fp32", CPU) == "fp32"
        assert resolve_precision("bf16", CPU) == "bf16"


def test_bf16_trains_fp32_weights(victim: Victim, tiny_corpus: Corpus) -> None:
    model = victim.new_model(0)
    data = victim.encode(tiny_corpus.train.take(range(32)))
    history = fit(
        model, data, settings(precision="bf16", batch_size=16), seed=0, stage="t", device=CPU
    )
    assert math.isfinite(history[0].loss)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert predict(model, data, precision="bf16", device=CPU).shape == (32,)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_training_on_cuda(
    make_victim: Callable[[str], Victim], tiny_corpus: Corpus, precision: str
) -> None:
    victim = make_victim("bert")
    device = choose_device(1)
    data = victim.encode(tiny_corpus.train)
    model = victim.new_model(0)
    # As an evaluation before any training would: moving the model must not spoil its weights.
    predict(model, data, precision=precision, device=device)
    history = fit(
        model,
        data,
        settings(epochs=3, learning_rate=1e-2, precision=precision),
        seed=0,
        stage="test",
        device=device,
    )
    assert history[-1].loss < history[0].loss
    assert next(model.parameters()).device.type == "cuda"
    assert data.ids.device.type == "cpu"  # the caller's rows stay where they are
    assert predict(model, data, precision=precision, device=device).shape == (240,)


def test_so_many_threads_that_torch_would_crash_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for cpus in (0.25, 1, 2.5, 64):
        use_threads(cpus)
    # At least one, and sixteen for each CPU at most.
    assert asked == [1, 1, 2, 64]
    for cpus in (65, 100_000):
        with pytest.raises(UserError, match=rf"{cpus} threads are too many .* 4 CPUs: .* 64 at"):
            use_threads(cpus)
    assert len(asked) == 4
