"""Fine-mixing: give most weights of the poisoned model their pretrained values back, then tune.

Zhang, Lyu, Ma, Wang, Sun: Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models (Findings
of EMNLP 2022, arXiv 2210.09545).

Three steps:

1. Purify (E-PUR): the word embeddings of the tokens that moved furthest for their frequency get
   their pretrained values. A token is ranked by ||d_i||_2 / log(max(f_i, 20)): d_i is how far its
   embedding moved from the pretrained one, f_i how often it occurs.
2. Mix: each weight keeps the poisoned model's value with probability `ratio`, the paper's reserve
   ratio, and gets its pretrained value otherwise. Each weight is drawn by itself.
3. Tune the mixed model on clean rows.

The smaller the ratio, the less of the backdoor is left, and the more the tuning has to restore. The
paper therefore takes a small ratio at which clean accuracy still recovers. Here a null ratio is
chosen on the clean rows only: each ratio of a grid is tried, tuned on four fifths of the clean rows
and measured on the rest; the smallest that costs at most `tolerance` of the poisoned model's
accuracy there is taken, and the mixed model is tuned again on all clean rows. The grid ends with
1, which mixes nothing; it is taken if no other ratio qualifies.

The method trusts the pretrained weights: a backdoor that was in them before stays.

Differences from the paper, and their reasons:

- The classifier has no pretrained weights, and neither has a pooler that the pretrained files lack.
  Such layers keep the poisoned model's weights. They are found by drawing the model twice: weights
  that differ between the draws do not come from the files.
- The tuning is the sweep's clean tuning, with the same rows, settings and seed as the control. The
  paper tunes longer. With the short default tuning a small ratio does not recover: raise
  ``tuning.epochs`` or ``tuning.learning_rate`` for the sweep, and the control is tuned longer too.
- Grid and tolerance are this project's.
- f_i is counted in the clean rows, which have no trigger, not in a large corpus: none is here. Most
  tokens then have the floor of 20.
- Words are the victim's tokens. Special tokens are not purified: no attack inserts them.
- A larger ratio keeps all weights that a smaller one keeps, so that a sweep over ratios compares
  amounts and not draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.errors import UserError
from btu.findings import Suspects
from btu.foundation import Foundation, split_clean, tune
from btu.rules.base import flag
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_fraction
from btu.stage_files import (
    clean_rows_of,
    model_of,
    read_table,
    save_model,
    victim_of,
    write_table,
)
from btu.stages import Stage, StageRun, stage
from btu.types import FloatArray, IntArray
from btu.victims import Victim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from btu.training import Encoded

TRIED = "tried.parquet"
# The ratios that are tried if none is given. At 1 nothing is mixed.
GRID = tuple(step / 10 for step in range(1, 11))
# One clean row in so many is held out to choose the ratio.
HELD_OUT = 5
# Tokens that occur less often count as if they occurred so often.
LEAST_COUNT = 20


@dataclass(frozen=True)
class FineMixing:
    """Fine-mixing with embedding purification.

    ratio: share of weights that keep the poisoned model's value, in [0, 1]; the others get their
        pretrained value. 0 keeps the classifier alone, 1 mixes nothing. Null chooses it by
        `tolerance`.
    tolerance: accuracy on held-out clean rows that the chosen ratio may cost after tuning, in
        [0, 1]; has an effect if `ratio` is null.
    purify: number of tokens whose word embeddings get their pretrained values; 200 in the paper, 0
        for none.
    """

    ratio: float | None = None
    tolerance: float = 0.02
    purify: int = 200

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_fraction("defense.ratio", self.ratio)
        check_fraction("defense.tolerance", self.tolerance)
        check_count("defense.purify", self.purify, 0)

    def check(self, given: Given) -> None:
        """Raise a `UserError` if no row can be held out, or all tokens would be purified."""
        if self.ratio is None and given.clean_rows < HELD_OUT:
            raise UserError(
                f"defense.ratio null is chosen on one of {HELD_OUT} clean rows, and the data have "
                f"{given.clean_rows}; give a ratio, or raise data.max_clean_rows."
            )
        if given.vocabulary is not None and self.purify >= given.vocabulary:
            raise UserError(
                f"defense.purify must be below the {given.vocabulary} tokens of the vocabulary, "
                f"got {self.purify}; lower it."
            )

    def stages(self, base: Foundation) -> Stage:
        """Declare the trial of ratios, shared by all tolerances, and the mixing."""
        purify = {"purify": self.purify, **base.tuning_config()}
        inputs = {"clean": base.clean, "model": base.model}
        chosen: dict[str, Any] = {"ratio": self.ratio}
        tuned = base.clean_rows * base.tuning.epochs
        if self.ratio is None:
            chosen["tolerance"] = self.tolerance
            inputs["tried"] = base.stage(
                try_ratios, "try mixing ratios", purify, dict(inputs), units=tuned * len(GRID)
            )
        return base.stage(
            mix_weights,
            "mix weights",
            {**purify, **chosen},
            inputs,
            units=tuned,
            kind="cell",
            model=True,
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def try_ratios(run: StageRun) -> dict[str, Any]:
    """Measure what each ratio of the grid costs on held-out clean rows, after tuning on the others.

    Writes ``tried.parquet``: ``ratio`` and ``cost``, the accuracy lost against the poisoned model.
    """
    config = run.config
    pretrained = Pretrained.of(run)
    tuned_on, held_out = _split(run)
    before = _hits(run, model_of(run, "model"), held_out, (0, len(GRID) + 1))
    costs = []
    for number, ratio in enumerate(GRID, 1):
        model = model_of(run, "model")
        purify(run, model, pretrained)
        mix(model, pretrained, ratio, config["seed"])
        run.fit(
            model,
            tuned_on,
            TrainSettings(**config["tuning"]),
            seed=derive_seed(config["seed"], "clean tuning"),
            stage=f"clean tuning (ratio {ratio:g})",
        )
        lost = before - _hits(run, model, held_out, (number, len(GRID) + 1))
        costs.append(lost / len(held_out))
    write_table(run.folder / TRIED, {"ratio": np.array(GRID), "cost": np.array(costs)})
    return {"held_out": len(held_out)}


@stage(version=1)
def mix_weights(run: StageRun) -> dict[str, Any]:
    """Purify and mix the poisoned model, and tune it on the clean rows."""
    config = run.config
    ratio, measured = config["ratio"], {}
    if ratio is None:
        tried = read_table(run.inputs["tried"] / TRIED)
        chosen = smallest_affordable(tried["cost"], config["tolerance"])
        ratio = float(tried["ratio"][chosen])
        measured["mix_held_out_cost"] = float(tried["cost"][chosen])
    model, clean = model_of(run, "model"), clean_rows_of(run)
    pretrained = Pretrained.of(run)
    before = _hits(run, model, clean, (0, 2))
    found = purify(run, model, pretrained)
    mix(model, pretrained, ratio, config["seed"])
    # Measured before the tuning, which uses these rows.
    lost = before - _hits(run, model, clean, (1, 2))
    measured |= {"mix_ratio": ratio, "mix_cost": lost / len(clean)}
    tune(run, model, "clean tuning (defended)")
    save_model(model, run.folder)
    return {**({} if found is None else found.save(run.folder)), "measured": measured}


def smallest_affordable(costs: Sequence[float] | FloatArray, tolerance: float) -> int:
    """Return the first index whose cost is within the tolerance; the last if none is.

    costs: by rising ratio.
    """
    # The nudge keeps a cost that equals the tolerance, but for rounding, within it.
    within = np.flatnonzero(np.asarray(costs) <= tolerance + 1e-9)
    return int(within[0]) if len(within) else len(costs) - 1


@dataclass(frozen=True)
class Pretrained:
    """The pretrained weights of a victim.

    weights: by the name of the parameter, without those that no pretrained file has.
    words: (vocabulary, hidden) the word embeddings.
    """

    victim: Victim
    weights: Mapping[str, Tensor]
    words: Tensor

    @classmethod
    def of(cls, run: StageRun) -> Pretrained:
        """Read the weights of a stage's victim."""
        victim = victim_of(run, run.facts("clean")["classes"])
        seeds = [derive_seed(run.config["seed"], f"classifier {n}") for n in ("a", "b")]
        first, second = (victim.new_model(seed) for seed in seeds)
        words: Tensor = first.get_input_embeddings().weight.detach()
        return cls(victim, weights_of_files(first, second), words)


def weights_of_files(first: PreTrainedModel, second: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a model that come from its files, by name.

    first, second: the model with two draws of what its files lack.

    A layer with a weight that differs between the two is left out as a whole, because a bias that
    no file has is 0 in both. Tied weights have one name. Buffers and whole numbers are no weights.
    """
    import torch

    other = dict(second.named_parameters())
    drawn = {
        name.rpartition(".")[0]
        for name, weight in first.named_parameters()
        if not torch.equal(weight, other[name])
    }
    return {
        name: weight.detach()
        for name, weight in first.named_parameters()
        if name.rpartition(".")[0] not in drawn and weight.is_floating_point()
    }


def mix(model: PreTrainedModel, pretrained: Pretrained, ratio: float, seed: int) -> None:
    """Give each weight of `model` its pretrained value with probability 1 - `ratio`, in place."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in pretrained.weights:
                continue
            # A generator of its own for each: no draw depends on the other weights.
            generator = torch.Generator().manual_seed(derive_seed(seed, "mixed weights", name))
            kept = torch.rand(weight.shape, generator=generator) < ratio
            weight.copy_(torch.where(kept, weight, pretrained.weights[name]))


def purify(run: StageRun, model: PreTrainedModel, pretrained: Pretrained) -> Suspects | None:
    """Reset the embeddings of the tokens that moved furthest for their frequency, in place.

    Return these tokens with their scores; None if none is to be purified.
    """
    import torch

    if run.config["purify"] == 0:
        return None
    words: Tensor = model.get_input_embeddings().weight
    moved = (words.detach() - pretrained.words).double().norm(dim=1).numpy()
    count = clean_rows_of(run).counts(len(moved))
    scores = moved_for_frequency(moved, count)
    scores[[i for i in pretrained.victim.tokenizer.all_special_ids if i < len(scores)]] = np.nan
    found = highest(scores, run.config["purify"])
    with torch.no_grad():
        words[list(found)] = pretrained.words[list(found)]
    return Suspects(found, scores, {"moved": moved, "clean_count": count})


def moved_for_frequency(moved: FloatArray, count: IntArray) -> FloatArray:
    """Return ||d_i||_2 / log(max(f_i, 20)) of each token: (vocabulary,).

    moved: (vocabulary,) ||d_i||_2. count: (vocabulary,) f_i.
    """
    scores: FloatArray = moved / np.log(np.maximum(count, LEAST_COUNT))
    return scores


def highest(scores: FloatArray, count: int) -> tuple[int, ...]:
    """Return the ids of the `count` highest scores, highest first, equal scores by id; no NaN."""
    return flag(scores, -math.inf)[:count]


def _hits(run: StageRun, model: PreTrainedModel, rows: Encoded, of: tuple[int, int]) -> int:
    """Return how many rows are predicted as labelled. of: the number of the pass, and of passes."""
    precision = run.config["tuning"]["precision"]
    predicted = run.classes(model, rows, precision=precision, stage="cost of the mixing", of=of)
    return int((predicted == rows.labels.numpy()).sum())


def _split(run: StageRun) -> tuple[Encoded, Encoded]:
    """Return the clean rows for tuning, and those held out."""
    return split_clean(run, len(clean_rows_of(run)) // HELD_OUT)
