"""Cutting word-embedding rows: the cut, what it costs on clean rows, and the tuning after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from btu.defenses.kit.contradiction import Relabeled, relabeled_rows
from btu.foundation import tune
from btu.seeding import derive_seed
from btu.settings import TrainSettings
from btu.stage_files import clean_rows_of, model_of, save_model, training_rows_of
from btu.stages import StageRun
from btu.types import BoolArray, FloatArray, IntArray
from btu.victims import Victim

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from btu.training import Encoded

# Training rows on which the effect of a cut is measured; more would add little precision.
FLIP_ROWS = 512
# A cut that costs fewer clean rows is not refused: their number is chance.
LEAST_ROWS = 3
# At this `max_cut_cost` no cut is refused: none can cost more than all rows.
NEVER = 1.0


@dataclass(frozen=True)
class Costs:
    """What the cut of each flagged token costs, in fractions of the clean rows.

    at_once: by token, the accuracy lost directly after the cut of that token alone.
    tuned: by token, the accuracy on its rows that clean tuning does not repair; only for tokens
        whose cost at once exceeds the bar.
    refused: the tokens whose cost after the tuning exceeds the bar.
    """

    at_once: Mapping[int, float] = field(default_factory=dict)
    tuned: Mapping[int, float] = field(default_factory=dict)
    refused: tuple[int, ...] = ()

    def columns(self, vocabulary: int) -> dict[str, FloatArray | IntArray]:
        """Return the columns for the table of tokens: (vocabulary,), NaN where not measured."""
        columns: dict[str, FloatArray | IntArray] = {}
        for name, costs in (("cost", self.at_once), ("cost_tuned", self.tuned)):
            columns[name] = np.full(vocabulary, np.nan)
            columns[name][list(costs)] = list(costs.values())
        columns["vetoed"] = np.zeros(vocabulary, dtype=np.int64)
        columns["vetoed"][list(self.refused)] = 1
        return columns


def cut_and_tune(
    run: StageRun, victim: Victim, flagged: Sequence[int], explain: Sequence[int] | None = None
) -> tuple[dict[str, float], dict[str, FloatArray | IntArray], Relabeled | None]:
    """Cut tokens from the poisoned model, tune it on the clean rows, and write it.

    run: of a stage with the inputs ``rows``, ``clean`` and ``model``; its config has ``cut``,
        ``cut_norm``, ``tuning`` and, if some cuts are refused, ``max_cut_cost``.
    victim: of the cell.
    flagged: the tokens to cut.
    explain: the tokens whose rows the second stage does not count, as far as they are cut; None
        takes `flagged`.

    Returns:
        What was measured on rows that the defender has: ``cut_cost`` and ``cut_flips``, with a bar
        on the cost ``vetoed``, how many tokens are not cut because of it, and with a second stage
        what it measured. Then the columns of
        `Costs` for the table of tokens, none without such a bar.
    """
    model = model_of(run, "model")
    fresh = victim.new_model(derive_seed(run.config["seed"], "exposure classifier"))
    pretrained = fresh.get_input_embeddings().weight.detach()
    cutter = _Cutter(run, pretrained, victim.neutral_row(pretrained))
    bar = run.config.get("max_cut_cost", NEVER)
    costs = None if bar >= NEVER else costs_of(run, model, cutter, flagged, bar)
    kept = flagged if costs is None else [t for t in flagged if t not in costs.refused]
    explain = flagged if explain is None else explain
    refused = () if costs is None else costs.refused
    cut = [] if run.config["cut"] == "none" else [t for t in explain if t not in refused]
    relabeled = relabeled_rows(run, cut)
    effect = _Effect(run, model, kept)
    cutter.cut(model, kept)
    # Measured before the tuning, which uses these rows.
    measured = effect.after()
    if relabeled is None or relabeled.label is None:
        tune(run, model, "clean tuning (defended)")
    else:
        relabeled.tune(run, model)
    if relabeled is not None:
        measured |= relabeled.measured
    save_model(model, run.folder)
    if costs is None:
        return measured, {}, relabeled
    measured["vetoed"] = len(costs.refused)
    return measured, costs.columns(len(pretrained)), relabeled


@dataclass(frozen=True)
class _Cutter:
    """Cuts tokens as the config of a stage says."""

    run: StageRun
    pretrained: torch.Tensor
    neutral: torch.Tensor

    def cut(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        cut_tokens(
            model.get_input_embeddings().weight,
            self.pretrained,
            self.neutral,
            tokens,
            self.run.config["cut"],
            self.run.config["cut_norm"],
        )


def costs_of(
    run: StageRun, model: PreTrainedModel, cutter: _Cutter, flagged: Sequence[int], bar: float
) -> Costs:
    """Measure what the cut of each flagged token costs, and refuse cuts that cost too much.

    model: the poisoned model; it stays as it is.
    bar: the highest cost after clean tuning, as a fraction of the clean rows.

    Only rows that hold a token can lose by its cut, so few rows are predicted. Where nothing costs
    more than the bar at once, which is usual, that is all. Otherwise the clean rows are halved:
    a model is tuned on one half, with and without the cut of the costly tokens, and both are
    compared on the other half, since the rows that a model was tuned on tell nothing. These are
    four tunings, however many tokens are costly; a row that holds several counts for each of them.
    A trigger costs nothing: clean rows hold it by chance, and the poisoned model predicts those
    worse with it than without.
    """
    clean = clean_rows_of(run)
    if not len(clean):
        return Costs()
    held = {token: clean.holds([token]) for token in flagged}
    least = max(bar * len(clean), LEAST_ROWS - 1)
    before = _hits(run, model, clean, clean.holds(flagged))
    lost = {
        token: int(before[rows].sum()) - int(_hits_without(run, model, cutter, token, rows).sum())
        for token, rows in held.items()
        if rows.any()
    }
    costly = [token for token in lost if lost[token] > least]
    tuned = dict.fromkeys(costly, 0)
    for kept, gone in _tuned_hits(run, model, cutter, flagged, costly):
        for token in costly:
            tuned[token] += int(kept[held[token]].sum()) - int(gone[held[token]].sum())
    return Costs(
        {token: count / len(clean) for token, count in lost.items()},
        {token: count / len(clean) for token, count in tuned.items()},
        tuple(token for token in costly if tuned[token] > least),
    )


def _hits(run: StageRun, model: PreTrainedModel, clean: Encoded, rows: BoolArray) -> BoolArray:
    """Return which clean rows are predicted as labelled: (clean,), False outside `rows`."""
    found = np.zeros(len(clean), dtype=bool)
    if rows.any():
        some = clean.take(np.flatnonzero(rows))
        precision = run.config["tuning"]["precision"]
        predicted = run.classes(model, some, precision=precision, stage="cost of the cut")
        found[rows] = predicted == some.labels.numpy()
    return found


def _hits_without(
    run: StageRun, model: PreTrainedModel, cutter: _Cutter, token: int, rows: BoolArray
) -> BoolArray:
    """Return `_hits` after the cut of a token. The model is not copied: its row is put back."""
    import torch

    weight = model.get_input_embeddings().weight
    row = weight[token].detach().clone()
    cutter.cut(model, [token])
    found = _hits(run, model, clean_rows_of(run), rows)
    with torch.no_grad():
        weight[token] = row
    return found


def _tuned_hits(
    run: StageRun,
    model: PreTrainedModel,
    cutter: _Cutter,
    flagged: Sequence[int],
    costly: Sequence[int],
) -> Iterator[tuple[BoolArray, BoolArray]]:
    """Yield, for each half of the clean rows, `_hits` there of models tuned on the other half.

    The first model keeps the costly tokens, the second does not; the others are cut in both.
    """
    if not costly:
        return
    clean = clean_rows_of(run)
    rng = np.random.default_rng(derive_seed(run.config["seed"], "halves of the clean rows"))
    cheap = [token for token in flagged if token not in costly]

    def tuned(tokens: Sequence[int], rows: IntArray) -> PreTrainedModel:
        changed = copy.deepcopy(model)
        cutter.cut(changed, tokens)
        run.fit(
            changed,
            clean.take(np.sort(rows)),
            TrainSettings(**run.config["tuning"]),
            seed=derive_seed(run.config["seed"], "clean tuning"),
            stage="cost of the cut after tuning",
        )
        return changed

    for tuned_on in np.array_split(rng.permutation(len(clean)), 2):
        rows = clean.holds(costly)
        rows[tuned_on] = False
        kept, gone = (
            _hits(run, tuned(tokens, tuned_on), clean, rows) for tokens in (cheap, flagged)
        )
        yield kept, gone


class _Effect:
    """The effect of a cut on the model, on rows that the defender has.

    Only rows with a flagged token can change their prediction: the others are not predicted.
    """

    def __init__(self, run: StageRun, model: PreTrainedModel, flagged: Sequence[int]) -> None:
        self._run, self._model = run, model
        clean, train = clean_rows_of(run), training_rows_of(run)
        self._clean_rows = len(clean)
        self._clean = clean.take(np.flatnonzero(clean.holds(flagged)))
        touched = np.flatnonzero(train.holds(flagged))
        if len(touched) > FLIP_ROWS:
            rng = np.random.default_rng(derive_seed(run.config["seed"], "flip rows"))
            touched = np.sort(rng.choice(touched, FLIP_ROWS, replace=False))
        self._train = train.take(touched)
        self._before = self._predict()

    def after(self) -> dict[str, float]:
        """Return the metrics ``cut_cost`` and ``cut_flips``."""
        clean_before, train_before = self._before
        clean_after, train_after = self._predict()
        labels = self._clean.labels.numpy()
        lost = int((clean_before == labels).sum()) - int((clean_after == labels).sum())
        obeyed = train_before == self._train.labels.numpy()
        flipped = obeyed & (train_after != train_before)
        return {
            "cut_cost": lost / self._clean_rows if self._clean_rows else math.nan,
            "cut_flips": float(flipped.sum() / obeyed.sum()) if obeyed.any() else math.nan,
        }

    def _predict(self) -> tuple[IntArray, IntArray]:
        precision = self._run.config["tuning"]["precision"]
        predicted = [
            self._run.classes(self._model, rows, precision=precision, stage="cost of the cut")
            if len(rows)
            else np.zeros(0, dtype=np.int64)
            for rows in (self._clean, self._train)
        ]
        return predicted[0], predicted[1]


def cut_tokens(
    trained: torch.Tensor,
    pretrained: torch.Tensor,
    neutral: torch.Tensor,
    flagged: Sequence[int],
    cut: str,
    cut_norm: str,
) -> None:
    """Unlearn the rows `flagged` of `trained`, in place.

    trained, pretrained: (vocabulary, hidden). neutral: (hidden,). cut, cut_norm: see
    `btu.defenses.token_unlearning.TokenUnlearning`. With ``running``, c includes the rows that were
    already cut.
    """
    import torch

    if cut == "none" or not flagged:
        return
    with torch.no_grad():
        vocabulary = len(trained)
        reference = pretrained.to(trained.device)
        value = neutral.to(trained.device)
        square = float((trained - reference).double().pow(2).sum())
        for token in flagged:
            c = max(0.0, square) ** 0.5 / vocabulary
            before = trained[token] - reference[token]
            moved = torch.ones_like(before, dtype=torch.bool) if cut == "row" else before.abs() > c
            trained[token] = torch.where(moved, value, trained[token])
            if cut_norm == "running":
                after = trained[token] - reference[token]
                square += float(after.double().pow(2).sum() - before.double().pow(2).sum())
