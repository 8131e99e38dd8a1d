"""Neural Attention Distillation (NAD): a teacher tuned on clean rows corrects the poisoned model.

Li, Lyu, Koren, Lyu, Li, Ma: Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks (ICLR 2021, arXiv 2101.05930). Reference code: bboylyg/NAD at 6907ea2, for images.

The teacher is the poisoned model fine-tuned on the clean rows. The student starts as the poisoned
model and learns the clean rows with cross-entropy plus, at each layer l of `layers`,
beta_l * MSE(A_l(student), A_l(teacher)). A_l is the attention map: sum over channels of |F|^p,
L2-normalised.

The original, on CIFAR-10 with WRN-16-1 and 5 % clean data: p = 2, beta 500, 1000, 1000 for the
three residual groups, 20 epochs (the code's ``config.py`` has 0, 0, 5000), SGD with momentum 0.9 at
0.1, divided by 10 on the way; ASR 100 -> 3.6, accuracy 85.7 -> 82.1.

No port to text transformers was found. Differences here, and their reasons:

- F is, by default, the activations of a layer's feed-forward units after their nonlinearity, like a
  conv layer's channels after ReLU: (rows, tokens, units). Tokens correspond to places and units to
  channels, so a map is (rows, tokens): the sum over units of |a|^p. ``maps: hidden`` uses the
  layer's output instead; there layer norm gives all tokens about the same norm, and maps are nearly
  flat.
- A map is masked to real tokens before it is normalised, and the MSE is a mean over real tokens:
  padding is not part of a row.
- Layers at one third, two thirds and the end of the encoder replace the three residual groups.
- AdamW with warm-up and linear decay (as in `train`) replaces SGD, which hardly trains a
  transformer; hence a separate learning rate.
- Random crops, flips and cutout have no counterpart for text and are left out.
- The default betas give a row's squared distance the weight that it has in the original (`BETAS`).
  Preset ``reference`` has the original's raw values, 500, 1000 and 1000: over 25 tokens they give
  weights of 20, 40 and 40, where the original has 0.5, 4 and 16.
- The teacher is, by default, the victim as it was before the poison, fine-tuned on the clean rows:
  it never saw the trigger. The original fine-tunes the poisoned model, ``teacher: poisoned``; with
  its epochs and learning rate null that is the sweep's clean-tuned control (`Foundation.tuned`),
  which keeps the backdoor of a word-like trigger (ASR 1.00) and cannot teach the student to forget
  it.

``held_out`` keeps a share of the clean rows from teacher and student. The accuracy that the student
loses on them, compared with the poisoned model, is what a defender can choose a learning rate by.
The original uses all its clean rows, and so does the default.

On SST-2 with MiniLM the defaults do not remove BadNets; a learning rate that does costs accuracy.
``docs/defenses.md`` lists what was swept and how the defaults were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.neurons import find_filters
from btu.errors import UserError, unknown
from btu.foundation import Foundation, split_clean
from btu.seeding import derive_seed
from btu.settings import (
    TrainSettings,
    check_count,
    check_fraction,
    check_not_negative,
    check_positive,
    is_number,
)
from btu.stage_files import clean_rows_of, model_of, save_model, victim_of
from btu.stages import Stage, StageRun, as_config, stage

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from btu.training import Encoded


TEACHERS = ("poisoned", "pretrained")
MAPS = ("ffn", "hidden")
# Weights of a row's squared distance as in the original. Its MSE is a mean over maps of 1,024, 256
# and 64 places, and its betas are 500, 1000 and 1000: weights of 0.5, 4 and 16. Over the 25 tokens
# or so of a sentence, these betas give the same weights.
BETAS = (10.0, 100.0, 400.0)
OTHER_BETA = 100.0
# Keeps the map of a row without activation finite; as in the reference code.
EPSILON = 1e-6


@dataclass(frozen=True)
class AttentionDistillation:
    """Neural Attention Distillation.

    beta: weight, at least 0, of the maps' distance relative to the cross-entropy; one value, or one
        for each of `layers`. 0 is plain fine-tuning (an ablation). Null is 10, 100 and 400 for
        three layers, and 100 each for any other number.
    layers: the layers whose maps are compared: fractions of the encoder's depth in (0, 1], written
        with a point, or layer numbers from 1, written without. A layer that is named twice counts
        twice. Null is one third, two thirds and the last.
    maps: the source of the maps: ``ffn``, the units inside a layer's feed-forward block after their
        nonlinearity, or ``hidden``, the layer's output.
    power: p of the maps, above 0.
    epochs: passes of the student over the clean rows.
    learning_rate: the peak of the student's AdamW.
    teacher: the model that is fine-tuned on the clean rows to become the teacher: the ``poisoned``
        model, or the ``pretrained`` victim.
    teacher_epochs, teacher_learning_rate: for the teacher's fine-tune; null takes those of
        `tuning`. With ``poisoned`` and both null the teacher is the clean-tuned control, and costs
        nothing, unless rows are held out.
    held_out: share of the clean rows in [0, 1), drawn at random, on which ``held_out_accuracy`` and
        ``held_out_cost`` are measured; neither teacher nor student learns them. 0 measures nothing.
    """

    beta: Any = None
    layers: Any = None
    maps: str = "ffn"
    power: float = 2.0
    epochs: int = 3
    learning_rate: float = 5e-4
    teacher: str = "pretrained"
    teacher_epochs: int | None = 4
    teacher_learning_rate: float | None = 2e-4
    held_out: float = 0.0

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {
            # The raw values; the module's docstring has their weights over tokens.
            "beta": [500.0, 1000.0, 1000.0],
            "epochs": 20,
            "teacher": "poisoned",
            "teacher_epochs": None,
            "teacher_learning_rate": None,
        },
    }

    def __post_init__(self) -> None:
        if self.layers is None:
            # The dataclass is frozen; the values used then appear in the config.
            object.__setattr__(self, "layers", [1 / 3, 2 / 3, 1.0])
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise UserError(
                f"defense.layers must be a list of at least one layer, got {self.layers!r}; write "
                "[0.5, 1.0] for half and all of the depth, or [3, 6] for layers 3 and 6."
            )
        for layer in self.layers:
            _check_layer(layer)
        if self.beta is None:
            three = len(self.layers) == len(BETAS)
            object.__setattr__(self, "beta", list(BETAS) if three else OTHER_BETA)
        several = isinstance(self.beta, list | tuple)
        if several and len(self.beta) != len(self.layers):
            raise UserError(
                f"defense.beta has {len(self.beta)} values for {len(self.layers)} layers; give one "
                "value, or one a layer."
            )
        for beta in self._betas():
            check_not_negative("defense.beta", beta)
        check_positive("defense.power", self.power)
        check_positive("defense.learning_rate", self.learning_rate)
        if self.teacher_learning_rate is not None:
            check_positive("defense.teacher_learning_rate", self.teacher_learning_rate)
        for name in ("epochs", "teacher_epochs"):
            value = getattr(self, name)
            if value is not None:
                check_count(f"defense.{name}", value)
        if self.teacher not in TEACHERS:
            raise unknown("defense.teacher", self.teacher, TEACHERS)
        if self.maps not in MAPS:
            raise unknown("defense.maps", self.maps, MAPS)
        check_fraction("defense.held_out", self.held_out)
        if self.held_out == 1:
            raise UserError("defense.held_out must be below 1, got 1: no row is left to learn.")

    def check(self, given: Given) -> None:
        """Raise a `UserError` if the share holds out no row, or all of them.

        The depth of the victim is known only when it is loaded.
        """
        rows = rows_held_out(self.held_out, given.clean_rows)
        if self.held_out and not 0 < rows < given.clean_rows:
            raise UserError(
                f"defense.held_out {self.held_out:g} holds out {rows} of {given.clean_rows} clean "
                "rows, and it has to leave some on both sides; change it, or raise "
                "data.max_clean_rows."
            )

    def stages(self, base: Foundation) -> Stage:
        """Declare the teacher, unless it is the clean-tuned control, and the distillation."""
        settings = replace(base.train, epochs=self.epochs, learning_rate=self.learning_rate)
        return base.stage(
            distil,
            "attention distillation",
            {
                "beta": self._betas(),
                "layers": list(self.layers),
                "maps": self.maps,
                "power": self.power,
                "train": as_config(settings),
                **self._holding_out(),
            },
            {"clean": base.clean, "model": base.model, "teacher": self.teacher_stage(base)},
            # The teacher also passes over the rows, forward only.
            units=base.clean_rows * self.epochs * 4 // 3,
            kind="cell",
            model=True,
        )

    def teacher_stage(self, base: Foundation) -> Stage:
        """Return the teacher's stage, which all betas and layers share."""
        settings = base.tuning.applied_to(base.train)
        if self.teacher_epochs is not None:
            settings = replace(settings, epochs=self.teacher_epochs)
        if self.teacher_learning_rate is not None:
            settings = replace(settings, learning_rate=self.teacher_learning_rate)
        as_control = settings == base.tuning.applied_to(base.train) and not self.held_out
        if self.teacher == "poisoned" and as_control:
            return base.tuned
        inputs = {"clean": base.clean}
        if self.teacher == "poisoned":
            inputs["model"] = base.model
        return base.stage(
            teach,
            "teacher",
            {"teacher": self.teacher, "train": as_config(settings), **self._holding_out()},
            inputs,
            units=base.clean_rows * settings.epochs,
            model=True,
        )

    def _holding_out(self) -> dict[str, float]:
        # Left out where it is 0, as in the keys of earlier results.
        return {"held_out": self.held_out} if self.held_out else {}

    def _betas(self) -> list[Any]:
        several = isinstance(self.beta, list | tuple)
        return list(self.beta) if several else [self.beta] * len(self.layers)


def _check_layer(layer: Any) -> None:
    rule = (
        "defense.layers must be fractions of the depth in (0, 1], written with a point, or numbers "
        "of layers from 1"
    )
    if not is_number(layer):
        raise UserError(f"{rule}, got {layer!r}.")
    if isinstance(layer, float) and not 0 < layer <= 1:
        raise UserError(f"{rule}, got {layer}; write a layer's number without a point.")
    if isinstance(layer, int) and layer < 1:
        raise UserError(f"{rule}, got {layer}; 1 is the layer above the embeddings.")


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def teach(run: StageRun) -> dict[str, Any]:
    """Fine-tune the teacher on the clean rows."""
    if run.config["teacher"] == "poisoned":
        model = model_of(run, "model")
    else:
        victim = victim_of(run, run.facts("clean")["classes"])
        model = victim.new_model(derive_seed(run.config["seed"], "teacher classifier"))
    run.fit(
        model,
        _split(run)[0],
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "teacher"),
        stage="teacher",
    )
    save_model(model, run.folder)
    return {}


@stage(version=2)
def distil(run: StageRun) -> dict[str, Any]:
    """Fine-tune the poisoned model on the clean rows, and pull its maps towards the teacher's.

    Raises:
        UserError: a layer is beyond the victim's depth, or its feed-forward units are needed and
            cannot be found.
    """
    student = model_of(run, "model")
    if run.config["maps"] == "ffn":
        find_filters(student)
    teacher = model_of(run, "teacher").to(run.device).requires_grad_(False)
    depth = int(student.config.num_hidden_layers)
    layers = [layer_number(layer, depth) for layer in run.config["layers"]]
    learned, held_out = _split(run)
    before = _accuracy(run, student, held_out, 0)
    run.fit(
        student,
        learned,
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "distillation"),
        stage="attention distillation",
        objective=distillation(
            teacher, layers, run.config["beta"], run.config["power"], run.config["maps"]
        ),
    )
    save_model(student, run.folder)
    if not len(held_out):
        return {"layers": layers}
    after = _accuracy(run, student, held_out, 1)
    measured = {"held_out_accuracy": after, "held_out_cost": before - after}
    return {"layers": layers, "measured": measured}


def rows_held_out(share: float, rows: int) -> int:
    """Return the nearest number of rows to a share of them."""
    return round(share * rows)


def _split(run: StageRun) -> tuple[Encoded, Encoded]:
    """Return the clean rows to learn, and those held out."""
    count = rows_held_out(run.config.get("held_out", 0.0), len(clean_rows_of(run)))
    return split_clean(run, count)


def _accuracy(run: StageRun, model: PreTrainedModel, rows: Encoded, number: int) -> float:
    """Return the accuracy on rows; NaN without rows. number: of the pass, for progress."""
    if not len(rows):
        return math.nan
    precision = run.config["train"]["precision"]
    predicted = run.classes(
        model, rows, precision=precision, stage="attention distillation", of=(number, 2)
    )
    return float((predicted == rows.labels.numpy()).mean())


def layer_number(layer: float, depth: int) -> int:
    """Return the number, from 1 to `depth`, of a layer given as a fraction or a number.

    Raises:
        UserError: there is no such layer.
    """
    # The nearest one; an encoder of two layers has none at a third of its depth.
    number = max(1, round(layer * depth)) if isinstance(layer, float) else layer
    if number > depth:
        raise UserError(
            f"defense.layers has layer {number}, but the victim has {depth}; lower it, or give "
            "fractions of the depth."
        )
    return number


def distillation(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    betas: Sequence[float],
    power: float,
    maps: str,
) -> Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the objective: cross-entropy plus the maps' distances, weighted by beta."""
    import torch

    # Found once for student and teacher: finding them walks over all modules.
    @cache
    def blocks(model: nn.Module) -> list[nn.Module] | None:
        return None if maps == "hidden" else unit_readers(model, layers)

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, learned = activations(model, ids, mask, layers, blocks(model))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        with torch.no_grad():
            _, taught = activations(teacher, ids, mask, layers, blocks(teacher))
        for beta, one, other in zip(betas, learned, taught, strict=True):
            own, aim = attention_map(one, mask, power), attention_map(other, mask, power)
            loss = loss + beta * map_distance(own, aim, mask)
        return loss, logits

    return objective


def unit_readers(model: nn.Module, layers: Sequence[int]) -> list[nn.Module]:
    """Return each layer's matrix that reads the feed-forward units.

    Raises:
        UserError: the structure of the model's layers is unknown.
    """
    filters = find_filters(model)
    return [filters[f"layer {layer} units"].output for layer in layers]


def activations(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    layers: Sequence[int],
    blocks: Sequence[nn.Module] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the (rows, classes) logits and each layer's (rows, tokens, channels) activations.

    The activations are the inputs of `blocks` (`unit_readers`), feed-forward units after their
    nonlinearity; without `blocks` they are hidden states.
    """
    given = {"input_ids": ids, "attention_mask": mask.long()}
    if blocks is None:
        output = model(**given, output_hidden_states=True)
        # hidden_states[0] is the output of the embeddings.
        return output.logits.float(), [output.hidden_states[layer] for layer in layers]
    held: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Some victims, such as OPT, have (rows * tokens, units) there.
        held[block] = inputs[0].reshape(*ids.shape, -1)

    # Two entries may name the same layer.
    hooks = [block.register_forward_pre_hook(keep) for block in dict.fromkeys(blocks)]
    try:
        output = model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    return output.logits.float(), [held[block] for block in blocks]


def attention_map(active: Tensor, mask: Tensor, power: float) -> Tensor:
    """Return how strongly each real token is active, L2-normalised by row; 0 at padding.

    active: (rows, tokens, channels); mask: (rows, tokens) bool -> (rows, tokens).
    """
    strength = active.float().abs().pow(power).sum(dim=-1) * mask
    normalised: Tensor = strength / (strength.norm(dim=-1, keepdim=True) + EPSILON)
    return normalised


def map_distance(own: Tensor, aim: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared difference of two maps over real tokens, a scalar."""
    distance: Tensor = (own - aim).square().sum() / mask.sum()
    return distance
