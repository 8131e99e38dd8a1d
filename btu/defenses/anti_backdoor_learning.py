"""Anti-Backdoor Learning (ABL): isolate what is learned first, then unlearn it by gradient ascent.

Li, Lyu, Koren, Lyu, Li, Ma: Anti-Backdoor Learning: Training Clean Models on Poisoned Data
(NeurIPS 2021, arXiv 2110.11571). Reference code: bboylyg/ABL, read at fe9ff40 (isolation) and
3522945 (unlearning), for images only. No public port to text classifiers was found.

Backdoored rows are learned before the others, and all of them belong to one class. A model is
trained for a short while with a loss that cannot fall far below gamma; the rows that have the
lowest loss then are isolated; the model goes on learning the rest; at last, gradient ascent on the
isolated rows takes out of it what they taught. No clean rows are needed.

What differs from the reference code, and why:

====================  ======================  =====================  ===============================
choice                reference (CIFAR-10)    default                why the default differs
====================  ======================  =====================  ===============================
weights at the start  random                  the pretrained ones    as text classifiers are trained
isolation             10 epochs, SGD 0.1      0.25 epochs, AdamW     a pretrained model learns a
                                              5e-5, constant         trigger in some 30 steps, and
                                                                     the task soon after
method, gamma         flooding, 0.5           lga, 0.5               lga is the paper's. 0.5 is far
                                                                     below chance with ten classes
                                                                     (ln 10 = 2.303), not with two
                                                                     (ln 2 = 0.693): a knob
isolated              the 1 % lowest losses   the same, of the       a backdoor has one target class
                                              class most of them
                                              have
training on the rest  60 epochs, SGD          2 epochs, AdamW        as long as text classifiers are
                                                                     fine-tuned
unlearning            ascent, SGD 5e-4        ascent on the          see below
                                              isolated and descent
                                              on others, AdamW
its end               5 epochs, the first     the isolated rows      ascent has no end of its own
                      of which only tests     leave their class
its bound             none                    a row at chance        what is beyond it takes the
                                              pushes no further      class along
====================  ======================  =====================  ===============================

The reference scores rows in eval mode one by one, and so do we, in batches. It crops, flips and
cuts images while it trains on the rest, which text does not have. Its optimizer and its epochs on
the rest are not part of preset ``reference``.

Measured on SST-2 with MiniLM, BadNets at 10 %, seed 0. The losses' area under ROC against the
hidden mask was 0.924, 1.000 and 0.911 after 0.1, 0.25 and 0.5 epochs (a sample of 2,000 rows, with
warm-up); the default's, without, is 0.998 on all rows, and of the 1, 5 and 10 % lowest losses 100,
100 and 93 % were poisoned. The window is narrow, and 0.25 was picked with these numbers in sight:
what a defender sees does not tell it from its neighbours, as all isolated rows were of one class
each time. Of AddSent at seed 0 it is 1.000. Other seeds were not measured.

Ascent alone, as in the reference code, unlearns the class before the trigger. Three steps at 2e-5
on the poisoned fine-tune left all isolated rows in their class, while of 200 other rows those of
that class fell from 94 to 85 % right. So we descend on other rows meanwhile, as in the paper's
equation: most of the poison is among them, but it is a tenth of them, and all of the isolated.
With it, at 5e-5 and batches of 32, all isolated rows were in their class after 30 steps and none
after 36. There ASR was 0.000 (undefended 1.000), FTR 0.138 and CACC 0.859 (0.881 clean-tuned).

These numbers are of the unlearning alone, on the poisoned fine-tune, with the isolated rows of the
default: one run, stopped at the first look (every 6 steps) that met ``unlearning_stop``. After the
training on the rest, ascent without a bound goes far beyond chance (3 nats on average) and takes
the class with it. What was tried, and how the bound was chosen without a look at triggered rows, is
in ``docs/defenses.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import Given
from btu.errors import UserError, unknown
from btu.findings import Suspects
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import (
    TrainSettings,
    check_count,
    check_fraction,
    check_not_negative,
    check_positive,
)
from btu.stage_files import (
    model_of,
    read_table,
    save_model,
    training_rows_of,
    victim_of,
    write_table,
)
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from btu.training import Encoded, Objective


LOSSES = "losses.parquet"
# Rows that tell how far the ascent is, and what it costs; more would tell it hardly better.
ISOLATED_ROWS, REST_ROWS = 128, 512
CHOICES = {"method": ("lga", "flooding"), "pool": ("class", "all")}


@dataclass(frozen=True)
class AntiBackdoorLearning:
    """Anti-Backdoor Learning.

    method: how the isolation's loss L, the mean of a batch, is kept near gamma: ``lga``, local
        gradient ascent, minimizes sign(L - gamma) * L; ``flooding`` |L - gamma| + gamma. Their
        gradients are equal but where L = gamma: there ``lga`` rests.
    gamma: in nats, above 0. A uniform guess has ln(classes): from there on everything is unlearned.
    isolation_epochs: passes over the training rows before their losses are read, above 0; may be a
        part of one: 0.25 is its first quarter of steps.
    isolation_learning_rate: AdamW's, constant, without warm-up.
    isolation_ratio: share of the training rows that is isolated, in (0, 1).
    pool: ``class`` isolates rows of one class, that of most of the lowest losses; ``all`` the
        lowest losses of all classes, as the reference code does.
    rest_epochs, rest_learning_rate: of the training on all other rows, which goes on from the
        isolation's model; whatever else it takes from ``train``.
    unlearning_epochs: the most passes of gradient ascent over the isolated rows; 0 leaves it out
        (an ablation), and the settings below do not act.
    unlearning_learning_rate: of the ascent; AdamW's, constant, without warm-up.
    unlearning_descent: weight, at least 0, of descending on as many other rows in each step of the
        ascent, drawn anew: 1 as in the paper's equation, 0 as in its code.
    unlearning_cap: multiples of ln(classes), above 0: an isolated row whose loss is beyond pushes
        no further; null: all push to the end, as in the original.
    unlearning_stop: share of the isolated rows, in [0, 1), still predicted as they are labelled, at
        or under which the ascent ends, looked at after every step, in eval mode. Of up to 128 of
        them, drawn from the seed; where more are isolated, what is left of the others is not seen.
        Null: never, so that all epochs run, as in the original.
    """

    method: str = "lga"
    gamma: float = 0.5
    isolation_epochs: float = 0.25
    isolation_learning_rate: float = 5e-5
    isolation_ratio: float = 0.01
    pool: str = "class"
    rest_epochs: int = 2
    rest_learning_rate: float = 5e-5
    unlearning_epochs: int = 40
    unlearning_learning_rate: float = 5e-5
    unlearning_descent: float = 1.0
    unlearning_cap: float | None = 1.0
    unlearning_stop: float | None = 0.05

    KIND: ClassVar[str] = "during training"
    NEEDS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        # The code's, as far as they carry over: its optimizer, 60 epochs and crops do not.
        "reference": {
            "method": "flooding",
            "isolation_epochs": 10.0,
            "pool": "all",
            "unlearning_epochs": 4,
            "unlearning_descent": 0.0,
            "unlearning_cap": None,
            "unlearning_stop": None,
        },
    }

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(f"defense.{name}", getattr(self, name), choices)
        for name in (
            "gamma",
            "isolation_epochs",
            "isolation_learning_rate",
            "rest_learning_rate",
            "unlearning_learning_rate",
        ):
            check_positive(f"defense.{name}", getattr(self, name))
        if self.unlearning_cap is not None:
            check_positive("defense.unlearning_cap", self.unlearning_cap)
        for name, high in (("isolation_ratio", "everything"), ("unlearning_stop", "no step")):
            if getattr(self, name) is None and name == "unlearning_stop":
                continue
            check_fraction(f"defense.{name}", getattr(self, name), open_low=name[0] == "i")
            if getattr(self, name) == 1:
                raise UserError(f"defense.{name} must be below 1, got 1: that is {high}.")
        for name, least in (("rest_epochs", 1), ("unlearning_epochs", 0)):
            check_count(f"defense.{name}", getattr(self, name), least)
        check_not_negative("defense.unlearning_descent", self.unlearning_descent)

    def check(self, given: Given) -> None:
        """Raise a `UserError` where gamma is no floor or the ratio isolates nothing."""
        chance = math.log(given.classes)
        if self.gamma >= chance:
            raise UserError(
                f"defense.gamma {self.gamma} is not below ln({given.classes}) = {chance:.3f}, the "
                "loss of a uniform guess: nothing would be learned; lower it."
            )
        rows_isolated(self.isolation_ratio, given.train_rows)

    def stages(self, base: Foundation) -> Stage:
        """Declare isolation (shared by all ratios), training on the rest, and unlearning."""
        steps = TrainSettings(
            epochs=math.ceil(self.isolation_epochs),
            learning_rate=self.isolation_learning_rate,
            batch_size=base.train.batch_size,
            precision=base.train.precision,
            weight_decay=base.train.weight_decay,
            warmup_fraction=0.0,
            schedule="constant",
            max_grad_norm=base.train.max_grad_norm,
        )
        isolation = base.stage(
            isolate,
            "isolate (abl)",
            {
                "method": self.method,
                "gamma": self.gamma,
                "epochs": self.isolation_epochs,
                "train": as_config(steps),
            },
            {"rows": base.rows},
            # Trained on a part, then scored.
            units=math.ceil(base.train_rows * (self.isolation_epochs + 1 / 3)),
            model=True,
        )
        rest = base.stage(
            train_rest,
            "train on the rest (abl)",
            {
                "ratio": self.isolation_ratio,
                "pool": self.pool,
                "train": as_config(base.train)
                | {"epochs": self.rest_epochs, "learning_rate": self.rest_learning_rate},
            },
            {"rows": base.rows, "isolation": isolation},
            units=base.train_rows * self.rest_epochs,
            # The ascent's knobs share it; each ratio has its own.
            kind="cell",
            model=True,
        )
        isolated = math.ceil(base.train_rows * self.isolation_ratio)
        # Without an ascent the rows are predicted, and that is all.
        ascent: dict[str, Any] = {"ascent": False, "train": {"precision": base.train.precision}}
        if self.unlearning_epochs:
            ascent = {
                "ascent": True,
                "descent": self.unlearning_descent,
                "cap": self.unlearning_cap,
                "stop": self.unlearning_stop,
                "train": as_config(steps)
                | {
                    "epochs": self.unlearning_epochs,
                    "learning_rate": self.unlearning_learning_rate,
                },
            }
        return base.stage(
            unlearn,
            "unlearn (abl)",
            ascent,
            {"rows": base.rows, "rest": rest},
            # As many others are descended on.
            units=2 * isolated * self.unlearning_epochs,
            kind="cell",
            model=True,
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def isolate(run: StageRun) -> dict[str, Any]:
    """Train the victim for a while with the bent loss; write its model and every row's loss.

    Writes ``losses.parquet``: ``loss``, (training rows,) float64, nats, in eval mode.
    """
    from btu.training import resolve_precision

    settings = TrainSettings(**run.config["train"])
    data = training_rows_of(run)
    model = victim_of(run).new_model(derive_seed(run.config["seed"], "classifier"))
    steps = steps_of(run.config["epochs"], len(data), settings.batch_size)
    taken = 0

    def after_step(_: float) -> bool:
        nonlocal taken
        taken += 1
        return taken >= steps

    run.fit(
        model,
        data,
        settings,
        seed=derive_seed(run.config["seed"], "isolation"),
        stage="isolate (abl)",
        objective=bent(run.config["method"], run.config["gamma"]),
        after_step=after_step,
    )
    save_model(model, run.folder)
    logits = run.predict(model, data, precision=settings.precision, stage="losses (abl)")
    write_table(run.folder / LOSSES, {"loss": row_losses(logits, data.labels.numpy())})
    return {"steps": steps, "precision": resolve_precision(settings.precision, run.device)}


@stage(version=1)
def train_rest(run: StageRun) -> dict[str, Any]:
    """Isolate the rows of the lowest losses, and train on the others from the isolation's model.

    Raises:
        UserError: the ratio isolates nothing, or all rows of a class.
    """
    data = training_rows_of(run)
    losses = read_table(run.inputs["isolation"] / LOSSES)["loss"]
    found = lowest(losses, data.labels.numpy(), run.config["ratio"], run.config["pool"])
    model = model_of(run, "isolation")
    run.fit(
        model,
        data.take(np.flatnonzero(~found.taken)),
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "rest"),
        stage="train on the rest (abl)",
    )
    save_model(model, run.folder)
    suspects = Suspects(rows=-losses, taken=found.taken, target=found.target)
    return {**suspects.save(run.folder), "measured": {"isolated_purity": found.purity}}


@stage(version=2)
def unlearn(run: StageRun) -> dict[str, Any]:
    """Climb the loss of the isolated rows until they are not predicted as labelled any more.

    Meanwhile the loss of the others is held down. What is measured, ``isolated_kept`` and
    ``rest_cost``, is of a sample: up to 128 of the isolated rows and 512 of the others.
    """
    config = run.config
    settings = TrainSettings(**config["train"])
    facts = run.facts("rest")
    suspects = Suspects.load(run.inputs["rest"], facts)
    assert suspects is not None
    assert suspects.taken is not None
    data, model = training_rows_of(run), model_of(run, "rest")
    isolated = data.take(np.flatnonzero(suspects.taken))
    rest = data.take(np.flatnonzero(~suspects.taken))
    seed = derive_seed(config["seed"], "unlearning")
    watched = sample(isolated, ISOLATED_ROWS, seed)
    others = sample(rest, REST_ROWS, seed)
    before = accuracy(run, model, watched), accuracy(run, model, others)
    stop = config.get("stop")
    steps = 0

    def after_step(_: float) -> bool:
        nonlocal steps
        steps += 1
        if stop is None:
            return False
        left = accuracy(run, model, watched)
        model.train()
        return bool(left <= stop)

    if config["ascent"] and (stop is None or before[0] > stop):
        run.fit(
            model,
            isolated,
            settings,
            seed=seed,
            stage="unlearn (abl)",
            objective=climb(
                rest.to(run.device), config["descent"], config["cap"], np.random.default_rng(seed)
            ),
            after_step=after_step,
        )
    save_model(model, run.folder)
    measured = {
        **facts["measured"],
        "isolated_kept_before": before[0],
        "isolated_kept": accuracy(run, model, watched),
        "rest_cost": before[1] - accuracy(run, model, others),
        "unlearning_steps": float(steps),
    }
    return {**suspects.save(run.folder), "measured": measured}


@dataclass(frozen=True)
class Isolated:
    """taken: (rows,) the isolated. target: the class of most of the lowest losses.

    purity: the share of the lowest losses that this class has.
    """

    taken: BoolArray
    target: int
    purity: float


def lowest(losses: FloatArray, labels: IntArray, ratio: float, pool: str) -> Isolated:
    """Isolate the share `ratio` of the rows that has the lowest losses.

    losses, labels: (rows,). pool: see `AntiBackdoorLearning`. Equal losses in the order of rows.

    Raises:
        UserError: that is no row, or every row of a class.
    """
    count = rows_isolated(ratio, len(losses))
    order = np.argsort(losses, kind="stable")
    classes = np.bincount(labels[order[:count]])
    target = int(classes.argmax())
    if pool == "class":
        order = order[labels[order] == target]
    taken = np.zeros(len(losses), dtype=bool)
    taken[order[:count]] = True
    for label in np.unique(labels):
        if taken[labels == label].all():
            raise UserError(
                f"defense.isolation_ratio {ratio} isolates all {int((labels == label).sum())} rows "
                f"of class {label}: none is left to learn it from; lower it."
            )
    return Isolated(taken, target, float(classes[target] / count))


def rows_isolated(ratio: float, rows: int) -> int:
    """Return floor(ratio * rows).

    Raises:
        UserError: that is none.
    """
    # The nudge keeps ratio = k / rows, computed in floating point, at k.
    count = int(ratio * rows + 1e-9)
    if count < 1:
        raise UserError(
            f"defense.isolation_ratio {ratio} isolates nothing: {ratio} * {rows} training rows is "
            f"below 1; use at least {math.ceil(1e7 / rows) / 1e7:g}."
        )
    return count


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    """Return the steps in so many epochs, which may be a part of one; at least one."""
    return max(1, round(epochs * math.ceil(rows / batch_size)))


def bent(method: str, gamma: float) -> Objective:
    """Return the isolation's objective: cross-entropy that is bent at gamma."""
    from btu.training import cross_entropy

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, logits = cross_entropy(model, ids, mask, labels)
        return bend(loss, method, gamma), logits

    return objective


def bend(loss: torch.Tensor, method: str, gamma: float) -> torch.Tensor:
    """Bend a batch's mean loss at gamma: below it, what lowers the result raises the loss."""
    import torch

    if method == "lga":
        return torch.sign(loss.detach() - gamma) * loss
    return (loss - gamma).abs() + gamma


def climb(rest: Encoded, weight: float, cap: float | None, rng: np.random.Generator) -> Objective:
    """Return the unlearning's objective: weight * CE(other rows) - CE(isolated rows), both means.

    cap: see `AntiBackdoorLearning`; a row beyond it counts with the cap, which has no gradient.

    Each call draws as many rows of `rest`, which must be where the model is, as it is given.
    """
    from btu.training import cross_entropy

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        import torch

        loss, logits = cross_entropy(model, ids, mask, labels)
        if cap is not None:
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = losses.clamp(max=cap * math.log(logits.shape[1])).mean()
        if weight == 0:
            return -loss, logits
        drawn = rng.choice(len(rest), min(len(labels), len(rest)), replace=False)
        width = max(1, int(rest.host_lengths[drawn].max()))
        others = rest.batch(torch.from_numpy(drawn).to(rest.ids.device), width)
        return weight * cross_entropy(model, *others)[0] - loss, logits

    return objective


def row_losses(logits: FloatArray, labels: IntArray) -> FloatArray:
    """Return each row's cross-entropy: (rows, classes), (rows,) -> (rows,), in nats."""
    from scipy.special import log_softmax

    log_shares: FloatArray = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    losses: FloatArray = -log_shares[np.arange(len(labels)), labels]
    return losses


def sample(data: Encoded, rows: int, seed: int) -> Encoded:
    """Return at most so many rows, drawn from `seed`."""
    if len(data) <= rows:
        return data
    drawn = np.random.default_rng(seed).choice(len(data), rows, replace=False)
    return data.take(np.sort(drawn))


def accuracy(run: StageRun, model: PreTrainedModel, data: Encoded) -> float:
    """Return the share of rows that are predicted as labelled; leaves the model in eval mode."""
    precision = run.config["train"]["precision"]
    logits = run.predict(model, data, precision=precision, stage="unlearn (abl)")
    return float((logits.argmax(1) == data.labels.numpy()).mean())
