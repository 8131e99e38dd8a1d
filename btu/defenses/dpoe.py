"""DPoE: a shallow model takes the shortcut of the trigger, so that the main model need not.

Liu, Wang, Xiao, Chen: From Shortcuts to Triggers: Backdoor Defense with Denoised PoE (NAACL 2024,
arXiv 2305.14910). Reference code: luka-group/DPoE, without a licence. This module was written from
the method's description; of that repository only the settings in ``run_train.sh`` (at 79d790a) were
read.

A trigger is a shortcut that few layers suffice to learn. A main model and a shallow one, the first
layers of the same architecture, are trained together on the poisoned rows as a product of experts:

    log p = log-softmax(log p_main + beta * log p_shallow)

The cross-entropy of p trains both. Where the shallow model is already certain of a row's label, the
main model gets little gradient, so that it learns little from rows with the trigger. Only the main
model is used afterwards. No clean rows are needed.

Poisoned rows with flipped labels remain, as label noise, and the paper adds a denoising step to the
product. Two of its choices are here:

- ``r_drop`` (Liang et al., NeurIPS 2021, in whose form it is built): each batch passes twice, with
  other draws of dropout. The loss is the mean of both cross-entropies plus ``r_drop_weight`` times
  the mean of the two Kullback-Leibler divergences between the passes.
- ``reweight``: rows whose label the shallow model gives a probability above ``threshold`` get
  weight 0 in their step.

The original's script, on BERT base: 2 to 5 layers, beta 1, R-Drop weight 3, 3 epochs, batches of
16, learning rates of 2e-5 (main) and 8e-5 (shallow).

Differences here, and their reasons:

- The divergence of ``r_drop`` compares the main model's two distributions, since that model is
  kept. Whether the original compares these or the product's was not known when this was written.
- The weights of ``reweight`` are 0 and 1, and follow the shallow model of the same step. The
  paper's exact weights were not known either. The loss stays a mean over all rows of a batch.
- Label smoothing, another of the paper's choices, is not here.
- The paper's pseudo development set, by which it chooses the number of layers and other settings
  from the shallow model's certainty, is not here: `layers` is a key to sweep. The default is the
  lowest of the paper's range, and was not tuned.
- Epochs, batch size and the main model's learning rate are those of `train` unless given: a
  difference to the undefended model then comes from the defense. With ``beta: 0`` and ``denoise:
  none`` the main model is the undefended one. The shallow model's learning rate is four times as
  large, as in the original.
- Gradients are clipped by the norm of both models together.

How likely the shallow model finds a training row's label is the row's suspicion, since the shallow
model is to learn the trigger (`Suspects.rows`). The defaults were not measured on real data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import Given
from btu.errors import unknown
from btu.findings import Suspects
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import (
    TrainSettings,
    check_count,
    check_not_negative,
    check_positive,
    check_share,
)
from btu.stage_files import save_model, training_rows_of, victim_of
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import FloatArray, IntArray

if TYPE_CHECKING:
    from torch import Tensor, nn

    from btu.training import Objective


DENOISE = ("none", "r_drop", "reweight")
# The shallow model's learning rate relative to the main one's, as in the original.
FASTER = 4.0


@dataclass(frozen=True)
class DenoisedProductOfExperts:
    """Denoised product of experts.

    layers: depth of the shallow model, at most that of the victim.
    beta: exponent, at least 0, of the shallow model's probabilities in the product. 0 trains the
        main model alone (an ablation), and the rows' suspicion then has no meaning.
    denoise: ``r_drop``, ``reweight`` or ``none``.
    r_drop_weight: weight, at least 0, of the divergence; has an effect with ``r_drop``.
    threshold: in (0, 1): a row whose label is more probable to the shallow model gets weight 0; has
        an effect with ``reweight``.
    epochs: passes over the training rows; null takes those of ``train``.
    learning_rate: AdamW's peak for the main model; null takes that of ``train``.
    shallow_learning_rate: the same for the shallow model; null is four times the main model's.
    """

    layers: int = 2
    beta: float = 1.0
    denoise: str = "r_drop"
    r_drop_weight: float = 3.0
    threshold: float = 0.9
    epochs: int | None = None
    learning_rate: float | None = None
    shallow_learning_rate: float | None = None

    KIND: ClassVar[str] = "during training"
    NEEDS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        # Its batches of 16 are `train.batch_size`.
        "reference": {
            "denoise": "r_drop",
            "r_drop_weight": 3.0,
            "epochs": 3,
            "learning_rate": 2e-5,
            "shallow_learning_rate": 8e-5,
        },
    }

    def __post_init__(self) -> None:
        check_count("defense.layers", self.layers)
        check_not_negative("defense.beta", self.beta)
        check_not_negative("defense.r_drop_weight", self.r_drop_weight)
        check_share("defense.threshold", self.threshold)
        if self.denoise not in DENOISE:
            raise unknown("defense.denoise", self.denoise, DENOISE)
        if self.epochs is not None:
            check_count("defense.epochs", self.epochs)
        for name in ("learning_rate", "shallow_learning_rate"):
            if getattr(self, name) is not None:
                check_positive(f"defense.{name}", getattr(self, name))

    def check(self, given: Given) -> None:
        """Check nothing: the depth of the victim is known only when it is loaded."""

    def stages(self, base: Foundation) -> Stage:
        """Declare the training of both models, the only stage: the threshold acts in each step."""
        settings = base.train
        if self.epochs is not None:
            settings = replace(settings, epochs=self.epochs)
        if self.learning_rate is not None:
            settings = replace(settings, learning_rate=self.learning_rate)
        denoise: dict[str, Any] = {"denoise": self.denoise}
        if self.denoise == "r_drop":
            denoise["r_drop_weight"] = self.r_drop_weight
        elif self.denoise == "reweight":
            denoise["threshold"] = self.threshold
        shallow = self.shallow_learning_rate
        passes = 2 if self.denoise == "r_drop" else 1
        return base.stage(
            train_experts,
            "product of experts (dpoe)",
            {
                "layers": self.layers,
                "beta": self.beta,
                **denoise,
                "train": as_config(settings),
                "shallow_learning_rate": FASTER * settings.learning_rate
                if shallow is None
                else shallow,
            },
            {"rows": base.rows},
            # The shallow model adds about a third, and reads the rows once more at the end.
            units=base.train_rows * settings.epochs * passes * 4 // 3,
            kind="cell",
            model=True,
        )


# What the stage does -----------------------------------------------------------------------------


@stage(version=1)
def train_experts(run: StageRun) -> dict[str, Any]:
    """Train the main and the shallow model as a product; keep the main model.

    Raises:
        UserError: the victim has fewer layers than the shallow model, or not one stack of them.
    """
    from btu.defenses.kit.experts import Experts, adamw_of, keep_first_layers

    config = run.config
    settings = TrainSettings(**config["train"])
    data, victim = training_rows_of(run), victim_of(run)
    shallow = victim.new_model(derive_seed(config["seed"], "shallow classifier"))
    keep_first_layers(shallow, config["layers"])
    # Classifier, batches and dropout as in the undefended model.
    main = victim.new_model(derive_seed(config["seed"], "classifier"))
    experts = Experts(main, shallow, config["beta"])
    run.fit(
        experts,
        data,
        settings,
        seed=derive_seed(config["seed"], "fine-tune"),
        stage="product of experts (dpoe)",
        objective=denoised(
            config["denoise"], config.get("r_drop_weight", 0.0), config.get("threshold", 1.0)
        ),
        optimizer_of=adamw_of(
            experts,
            settings.learning_rate,
            config["shallow_learning_rate"],
            settings.weight_decay,
        ),
    )
    save_model(main, run.folder)
    logits = run.predict(
        shallow, data, precision=settings.precision, stage="product of experts (dpoe)"
    )
    return Suspects(rows=certainty(logits, data.labels.numpy())).save(run.folder)


def certainty(logits: FloatArray, labels: IntArray) -> FloatArray:
    """Return the probability of each row's label: (rows, classes), (rows,) -> (rows,)."""
    from scipy.special import softmax

    shares = softmax(np.asarray(logits, dtype=np.float64), axis=1)
    found: FloatArray = shares[np.arange(len(labels)), labels]
    return found


def denoised(denoise: str, weight: float, threshold: float) -> Objective:
    """Return the objective of an `Experts`: the product's cross-entropy, denoised.

    denoise: see `DenoisedProductOfExperts`.
    weight: of the divergence with ``r_drop``.
    threshold: of the shallow model's probability with ``reweight``.
    """
    from torch.nn.functional import nll_loss

    from btu.defenses.kit.experts import divergence

    def objective(
        experts: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        product, main, shallow = experts(ids, mask)
        losses = nll_loss(product, labels, reduction="none")
        if denoise == "reweight":
            sure = shallow.detach().gather(1, labels[:, None])[:, 0].exp() > threshold
            losses = losses * ~sure
        elif denoise == "r_drop":
            again, twin, _ = experts(ids, mask)
            other = nll_loss(again, labels, reduction="none")
            losses = (losses + other) / 2 + weight * divergence(main, twin)
        return losses.mean(), product

    return objective
