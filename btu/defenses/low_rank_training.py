"""MuScleLoRA: train low-rank updates at several scales, along the gradients of clean rows.

Wu, Zhang, Cheng, Liu: Acquiring Clean Language Models from Backdoor Poisoned Datasets by
Downscaling Frequency Space (ACL 2024, arXiv 2402.12026). The authors' code, ZrW00/MuScleLoRA, is
under the GPL: it was not read, and this module is written from the paper's description alone.

A model learns functions of low frequency first, and the mapping from a trigger to its class has a
lower frequency than the task. Three means let the victim learn the task without the trigger:

1. Low rank. The pretrained weights are frozen. Each matrix W gets an update B A of low rank, which
   cannot represent everything that the poisoned rows teach.
2. Multiple radial scalings. The branch B A works at several scales: groups of its outputs read the
   input multiplied by a factor s each. A function of s x with s above 1 has its frequencies divided
   by s (Cai and Xu, arXiv 1910.11710), so that relatively high frequencies, those of the task, are
   learned earlier.
3. Gradient alignment. The gradient of a poisoned batch is partly replaced by its projection on the
   gradient of a batch of clean rows.

At the end the updates are merged into the weights: the saved model is a plain one.

What is not certain, and what differs, with the reasons:

- The paper's tables of hyperparameters were not available. Its number of clean rows was not
  certain either: 128 is within what others report for it (96 to 128). `rank`, `alpha`, `scalings`,
  `alignment`, `epochs` and `learning_rate` have defaults of this project, which are not the
  paper's. None was tuned on triggered rows.
- Scalings. Factors of 1, 2, 3 and 4 over contiguous groups of outputs of about equal size, without
  a search per layer. The branch is linear, so that scaling its input and scaling its output are
  the same: s B (A x). The factors act on how fast the groups learn: the gradients of both B and A
  grow with s. They are kept when the updates are merged.
- Alignment. g' = (1 - a) g + a max(0, <g, c> / <c, c>) c, with the gradient g of the poisoned
  batch, the gradient c of a clean batch and `alignment` a. All trained parameters are one vector.
  Where the two disagree (<g, c> < 0), the projection would raise the loss of the clean rows: it is
  left out. The paper aligns gradients too; its exact formula was not available.
- Each step draws a clean batch of the poisoned batch's size, or all clean rows if they are fewer.
  Where batches are cut into parts to save memory, each part is aligned for itself.
- Which matrices: all linear layers of the encoder, pooler included. Embeddings, norms and biases
  stay as they were pretrained. The classifier is new, so that it is trained as a whole; alignment
  applies to it too.
- AdamW with the sweep's warm-up, schedule and clipping, on the aligned gradients. The updates have
  no dropout of their own.
- Low-rank layers are the project's own (`btu.defenses.kit.low_rank`); no adapter library is needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, Given
from btu.errors import UserError
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_fraction, check_positive
from btu.stage_files import clean_rows_of, save_model, training_rows_of, victim_of
from btu.stages import Stage, StageRun, as_config, stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from btu.training import Encoded, Objective

SCALINGS = (1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class LowRankTraining:
    """MuScleLoRA: multi-scale low-rank training with aligned gradients.

    clean_rows: number of reserved clean rows, drawn at random, whose gradients guide the training.
    rank: of the update of every matrix; below the smaller side of each.
    alpha: an update is multiplied by alpha / rank, above 0.
    scalings: factors above 0 of the groups of outputs, one each; a list, or one number. 1 alone is
        plain low-rank training. Null is 1, 2, 3 and 4.
    alignment: share a of the projection on the clean gradient, in [0, 1]: 0 trains on the poisoned
        rows alone (an ablation), 1 along the clean gradient alone.
    epochs: passes over the training rows.
    learning_rate: AdamW's peak; its other settings are those of ``train``.
    """

    clean_rows: int = 128
    rank: int = 8
    alpha: float = 16.0
    scalings: Any = None
    alignment: float = 0.5
    epochs: int = 5
    learning_rate: float = 1e-3

    KIND: ClassVar[str] = "during training"
    NEEDS: ClassVar[tuple[str, ...]] = (CLEAN_ROWS,)

    def __post_init__(self) -> None:
        for name in ("clean_rows", "rank", "epochs"):
            check_count(f"defense.{name}", getattr(self, name))
        for name in ("alpha", "learning_rate"):
            check_positive(f"defense.{name}", getattr(self, name))
        check_fraction("defense.alignment", self.alignment)
        scalings = SCALINGS if self.scalings is None else self.scalings
        scalings = list(scalings) if isinstance(scalings, list | tuple) else [scalings]
        if not scalings:
            raise UserError(
                "defense.scalings must be a list of at least one factor, got []; write [1] for "
                "plain low-rank training."
            )
        for factor in scalings:
            check_positive("defense.scalings", factor)
        # The dataclass is frozen; the values used then appear in the config.
        object.__setattr__(self, "scalings", [float(factor) for factor in scalings])

    def check(self, given: Given) -> None:
        """Raise a `UserError` if there are fewer clean rows than asked for."""
        if given.clean_rows < self.clean_rows:
            raise UserError(
                f"defense.clean_rows must be at most the {given.clean_rows} clean rows that there "
                f"are, got {self.clean_rows}; lower it, or raise data.max_clean_rows."
            )

    def stages(self, base: Foundation) -> Stage:
        """Declare the training: nothing in it depends on a threshold."""
        settings = dataclasses.replace(
            base.train, epochs=self.epochs, learning_rate=self.learning_rate
        )
        return base.stage(
            train_low_rank,
            "low-rank training",
            {
                "clean_rows": self.clean_rows,
                "rank": self.rank,
                "alpha": self.alpha,
                "scalings": self.scalings,
                "alignment": self.alignment,
                "train": as_config(settings),
            },
            {"rows": base.rows, "clean": base.clean},
            # Each step also passes over as many clean rows.
            units=base.train_rows * self.epochs * 2,
            kind="cell",
            model=True,
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def train_low_rank(run: StageRun) -> dict[str, Any]:
    """Train low-rank updates and classifier on the poisoned rows; merge and save them.

    ``held_out_accuracy`` is that on the clean rows that guide nothing; NaN if all guide.

    Raises:
        UserError: the rank is too large for the victim, or its classifier cannot be found.
    """
    from btu.defenses.kit.low_rank import low_rank

    config, seed = run.config, run.config["seed"]
    model = victim_of(run).new_model(derive_seed(seed, "classifier"))
    rng = np.random.default_rng(derive_seed(seed, "guiding rows"))
    clean = clean_rows_of(run)
    drawn = rng.choice(len(clean), config["clean_rows"], replace=False)
    guides = clean.take(np.sort(drawn)).to(run.device)
    settings = TrainSettings(**config["train"])
    drawing = derive_seed(seed, "low-rank updates")
    with low_rank(model, config["rank"], config["alpha"], config["scalings"], drawing) as updates:
        run.fit(
            model,
            training_rows_of(run),
            settings,
            seed=derive_seed(seed, "fine-tune"),
            stage="low-rank training",
            objective=aligned(guides, config["alignment"], rng),
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        matrices = len(updates)
    save_model(model, run.folder)
    others = clean.take(np.setdiff1d(np.arange(len(clean)), drawn))
    held_out = math.nan
    if len(others):
        logits = run.predict(model, others, precision=settings.precision, stage="low-rank training")
        held_out = float((logits.argmax(axis=1) == others.labels.numpy()).mean())
    return {
        "matrices": matrices,
        "trained_parameters": trained,
        "measured": {"held_out_accuracy": held_out},
    }


def aligned(guides: Encoded, share: float, rng: np.random.Generator) -> Objective:
    """Return cross-entropy as an objective whose gradients are aligned with those of clean rows.

    guides: the clean rows, on the model's device. share: see `align`. rng: draws, for each batch,
    as many of them as it has rows.
    """
    from btu.training import cross_entropy

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        import torch

        loss, logits = cross_entropy(model, ids, mask, labels)
        if share == 0:
            return loss, logits
        drawn = rng.choice(len(guides), min(len(labels), len(guides)), replace=False)
        width = max(1, int(guides.host_lengths[drawn].max()))
        batch = guides.batch(torch.from_numpy(drawn).to(guides.ids.device), width)
        parameters = [p for p in model.parameters() if p.requires_grad]
        own = _gradients(loss, parameters)
        wanted = align(own, _gradients(cross_entropy(model, *batch)[0], parameters), share)
        # Its difference from itself is 0 and has the wanted gradients: the loss keeps its value.
        pull = sum((p * g).sum() for p, g in zip(parameters, wanted, strict=True))
        return loss.detach() + pull - pull.detach(), logits  # type: ignore[union-attr]

    return objective


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    import torch

    # A matrix that the model does not use has none.
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return list(found)


def align(own: Sequence[Tensor], guide: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return (1 - share) * own + share * (own projected on guide); 0 for an opposite projection.

    own, guide: the gradients of the same parameters; each is taken as one vector.
    """
    product = sum((a * b).sum() for a, b in zip(own, guide, strict=True))
    length = sum((b * b).sum() for b in guide)
    # A guide of length 0 has no direction.
    along = (product / length).clamp(min=0) if length > 0 else 0.0  # type: ignore[union-attr]
    return [(1 - share) * a + share * along * b for a, b in zip(own, guide, strict=True)]
