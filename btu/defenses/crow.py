"""CROW: fine-tunes on clean rows so that neighbouring layers stay consistent under perturbation.

Min, Pham, Li, Sun: CROW: Eliminating Backdoors from Large Language Models via Internal Consistency
Regularization (ICML 2025, arXiv 2411.12768). Reference code: NayMyatMin/CROW at b786381, for
generative language models with LoRA.

The observation of the paper: in a clean model the hidden states of a token change little from one
layer to the next, and a trigger makes them change abruptly. For each batch of clean rows:

1. The consistency loss is the mean of 1 - cos(h_l, h_{l+1}) over tokens and pairs of neighbouring
   layers.
2. The input embeddings move by epsilon * sign(gradient of that loss), as in FGSM.
3. The model is trained on the task's loss of the unperturbed rows plus alpha times the consistency
   loss of the perturbed rows.

The original, on Llama-2, CodeLlama and Mistral with 100 clean instructions: epsilon 0.1, alpha 5.5.

Differences here, and their reasons:

- The task's loss is the cross-entropy of the classes, since the victim is a classifier. The
  original has the loss of the next token.
- All weights are trained. The original trains LoRA matrices, to save memory at 7 billion weights; a
  classifier of the size of BERT does not need them.
- Padding is left out of the consistency loss, so that a row does not depend on the others of its
  batch. The reference code passes no attention mask in the perturbed pass and averages over padding
  too.
- All pairs of layers count, from the first to the last, as in the paper's equation. The reference
  code leaves out the last hidden state; in a model of two layers no pair would be left. The output
  of the embeddings is not a layer in either.
- The reference code at that commit measures consistency by the KL divergence of softmaxed states,
  and has the cosine commented out. The cosine is the paper's.
- The task's loss and the first consistency loss come from one forward pass. The reference code runs
  two, which differ in the draws of dropout alone.
- AdamW with warm-up and decay as in `train`, with a learning rate and a batch size of its own.

epsilon is absolute, as in the original: each number of a token's word embedding moves by epsilon.
Its effect depends on the victim's scale. In MiniLM these numbers have a standard deviation of 0.056
(measured), so that 0.1 is a large move there.

Learning rate and epochs were chosen on clean rows alone, with batches of 16. On SST-2 with MiniLM
the defaults do not remove BadNets: ASR stays 1.00. ``docs/defenses.md`` has what was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.errors import UserError
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_not_negative, check_positive
from btu.stage_files import clean_rows_of, model_of, save_model
from btu.stages import Stage, StageRun, as_config, stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from btu.training import Encoded, Objective


@dataclass(frozen=True)
class Crow:
    """CROW: internal consistency regularization.

    alpha: weight, at least 0, of the perturbed rows' consistency loss relative to the
        cross-entropy. 0 is plain fine-tuning (an ablation); epsilon then has no effect.
    epsilon: how far each number of an input embedding moves, at least 0, in the units of the
        victim's word embeddings. 0 leaves the rows unperturbed (an ablation).
    epochs: passes over the clean rows.
    learning_rate: AdamW's peak learning rate.
    batch_size: rows per step.
    clean_rows: number of reserved clean rows to train on, drawn at random; null takes all.
    """

    alpha: float = 5.5
    epsilon: float = 0.1
    epochs: int = 10
    learning_rate: float = 5e-5
    batch_size: int = 16
    clean_rows: int | None = 100

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def __post_init__(self) -> None:
        for name in ("alpha", "epsilon"):
            check_not_negative(f"defense.{name}", getattr(self, name))
        check_positive("defense.learning_rate", self.learning_rate)
        for name in ("epochs", "batch_size"):
            check_count(f"defense.{name}", getattr(self, name))
        if self.clean_rows is not None:
            check_count("defense.clean_rows", self.clean_rows)

    def check(self, given: Given) -> None:
        """Raise a `UserError` if there are fewer clean rows than are to be drawn."""
        if self.clean_rows is not None and self.clean_rows > given.clean_rows:
            raise UserError(
                f"defense.clean_rows must be at most the {given.clean_rows} clean rows that there "
                f"are, got {self.clean_rows}; lower it, write null for all, or raise "
                "data.max_clean_rows."
            )

    def stages(self, base: Foundation) -> Stage:
        """Declare the fine-tune, the only stage: there is nothing that a threshold could share."""
        settings = replace(
            base.train,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
        )
        rows = base.clean_rows if self.clean_rows is None else self.clean_rows
        return base.stage(
            regularize,
            "consistency (crow)",
            {
                "alpha": self.alpha,
                "epsilon": self.epsilon,
                "clean_rows": self.clean_rows,
                "train": as_config(settings),
            },
            {"clean": base.clean, "model": base.model},
            # Two passes forward and two backward, of which the first reaches the inputs only.
            units=rows * self.epochs * 2,
            kind="cell",
            model=True,
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def regularize(run: StageRun) -> dict[str, Any]:
    """Fine-tune the poisoned model on clean rows with the consistency loss.

    Raises:
        UserError: the victim has fewer than two layers, or does not return their states.
    """
    model = model_of(run, "model")
    data = drawn_rows(clean_rows_of(run), run.config["clean_rows"], run.config["seed"])
    run.fit(
        model,
        data,
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "consistency"),
        stage="consistency (crow)",
        objective=consistent(run.config["alpha"], run.config["epsilon"]),
    )
    save_model(model, run.folder)
    return {"rows": len(data)}


def drawn_rows(clean: Encoded, rows: int | None, seed: int) -> Encoded:
    """Return `rows` of the clean rows, drawn from `seed` and in their order; all if None."""
    if rows is None or rows >= len(clean):
        return clean
    rng = np.random.default_rng(derive_seed(seed, "clean rows (crow)"))
    return clean.take(np.sort(rng.choice(len(clean), rows, replace=False)))


def consistent(alpha: float, epsilon: float) -> Objective:
    """Return the objective: cross-entropy + alpha * consistency loss of the perturbed rows."""
    import torch

    from btu.training import cross_entropy

    if alpha == 0:
        return cross_entropy

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, states, embedded = layer_states(model, ids, mask)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        # The task's loss goes back through the same pass later.
        (slope,) = torch.autograd.grad(
            consistency_loss(states, mask), [embedded], retain_graph=True
        )
        _, perturbed, _ = layer_states(model, ids, mask, epsilon * slope.sign())
        return loss + alpha * consistency_loss(perturbed, mask), logits

    return objective


def layer_states(
    model: nn.Module, ids: Tensor, mask: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """Return the logits, each layer's (rows, tokens, hidden) output, and the input embeddings.

    added: moves the input embeddings, if given: (rows, tokens, embedding).

    The rows are passed as ids, and moved where the word embeddings leave their table: a model that
    finds positions or its last token by the ids does so for moved rows too.

    Raises:
        UserError: fewer than two layers, or no states of theirs for each token.
    """
    embedded: list[Tensor] = []

    def move(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        embedded.append(output if added is None else output + added)
        return embedded[-1]

    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hook = table.register_forward_hook(move)
    try:
        output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    finally:
        hook.remove()
    # The first is the output of the embeddings.
    states = (getattr(output, "hidden_states", None) or ())[1:]
    read = sum(state.shape[:2] == ids.shape for state in states)
    if len(embedded) != 1 or read < max(2, len(states)):
        raise UserError(
            f"CROW compares neighbouring layers, and a {type(model).__name__} returns the states "
            f"of {read} layers for each token; use an encoder or a decoder of at least two layers, "
            "or another defense."
        )
    return output.logits.float(), states, embedded[0]


def consistency_loss(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean of 1 - cosine of neighbouring layers' states, a scalar from 0 to 2.

    states: at least two, each (rows, tokens, hidden).
    mask: (rows, tokens) bool; the mean is over its tokens.
    """
    import torch

    cosine = torch.nn.functional.cosine_similarity
    pairs = list(pairwise(states))
    apart = [1 - cosine(one.float(), other.float(), dim=-1) for one, other in pairs]
    mean: Tensor = (torch.stack(apart) * mask).sum() / (len(pairs) * mask.sum())
    return mean
