"""Anti-Backdoor Learning (ABL): isolate what is learned first, then unlearn it by gradient ascent.

Li, Lyu, Koren, Lyu, Li, Ma: Anti-Backdoor Learning: Training Clean Models on Poisoned Data
(NeurIPS 2021, arXiv 2110.11571). Reference code: bboylyg/ABL, read at fe9ff40 (isolation) and
3522945 (unlearning), for images only. No public port to text classifiers was found.

A model learns backdoored rows before the others, and all of them belong to one class. So a model is
trained briefly with a loss that cannot fall far below gamma; the rows with the lowest loss are
isolated; training continues on the rest; and gradient ascent on the isolated rows removes what they
taught. No clean rows are needed.

Differences from the reference code, and their reasons:

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
                                                                     (ln 2 = 0.693): tune it
isolated              the 1 % lowest losses   the same, of their     a backdoor has one target class
                                              most frequent class
training on the rest  60 epochs, SGD          2 epochs, AdamW        as long as text classifiers are
                                                                     fine-tuned
unlearning            ascent, SGD 5e-4        ascent on the          see below
                                              isolated and descent
                                              on others, AdamW
its end               5 epochs, the first     the isolated rows      ascent does not converge
                      of which only tests     leave their class
its bound             none                    a row at chance has    ascent beyond chance damages
                                              no gradient            the whole class
====================  ======================  =====================  ===============================

The reference code scores rows in eval mode one by one; this code does so in batches. The reference
code crops, flips and cuts images while it trains on the rest, which has no counterpart for text.
Its optimizer and its epochs on the rest are not part of preset ``reference``.

Measured on SST-2 with MiniLM, BadNets at 10 %, seed 0. The losses' area under ROC against the
hidden mask was 0.924, 1.000 and 0.911 after 0.1, 0.25 and 0.5 epochs (a sample of 2,000 rows, with
warm-up). The default, without warm-up, reaches 0.998 on all rows, and 100, 100 and 93 % of the 1, 5
and 10 % lowest losses were poisoned. The window is narrow, and 0.25 was chosen with knowledge of
these numbers: a defender could not distinguish it from its neighbours, because all isolated rows
were of one class each time. For AddSent at seed 0 the area is 1.000. Other seeds were not measured.

Ascent alone, as in the reference code, unlearns the class before the trigger. Three steps at 2e-5
on the poisoned fine-tune left all isolated rows in their class, while the accuracy on other rows of
that class (among 200 other rows) fell from 94 to 85 %. So each step also descends on other rows, as
in the paper's equation: most of the poison is among them, but it is a tenth of them, and all of the
isolated rows. With descent, at 5e-5 and batches of 32, all isolated rows were in their class after
30 steps and none after 36. ASR was then 0.000 (undefended 1.000), FTR 0.138 and CACC 0.859 (0.881
clean-tuned).

These numbers are for the unlearning alone, on the poisoned fine-tune, with the isolated rows of the
default: one run, stopped at the first check (every 6 steps) that met ``unlearning_stop``. After the
training on the rest, ascent without a bound goes far beyond chance (3 nats on average) and damages
the class. What was tried, and how the bound was chosen without triggered rows, is in
``docs/defenses.md``.
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
# Rows on which progress and cost of the ascent are measured; more would add little precision.
ISOLATED_ROWS, REST_ROWS = 128, 512
CHOICES = {"method": ("lga", "flooding"), "pool": ("class", "all")}


@dataclass(frozen=True)
class AntiBackdoorLearning:
    """Anti-Backdoor Learning.

    method: how the isolation's loss L, the mean of a batch, is kept near gamma: ``lga``, local
        gradient ascent, minimizes sign(L - gamma) * L; ``flooding`` |L - gamma| + gamma. Their
        gradients are equal.
    gamma: in nats, above 0. A uniform guess has ln(classes): at gamma above that, everything is
        unlearned.
    isolation_epochs: passes over the training rows before their losses are read, above 0; a
        fraction such as 0.25 runs the first quarter of an epoch's steps.
    isolation_learning_rate: AdamW's, constant, without warm-up.
    isolation_ratio: share of the training rows that is isolated, in (0, 1).
    pool: ``class`` isolates rows of one class, the most frequent among the lowest losses; ``all``
        the lowest losses of all classes, as the reference code does.
    rest_epochs, rest_learning_rate: for the training on all other rows, which continues from the
        isolation's model; its other settings are those of ``train``.
    unlearning_epochs: the most passes of gradient ascent over the isolated rows; 0 leaves it out
        (an ablation), and the settings below have no effect.
    unlearning_learning_rate: AdamW's for the ascent, constant, without warm-up.
    unlearning_descent: weight, at least 0, of descending on as many other rows in each step of the
        ascent, drawn for each step: 1 as in the paper's equation, 0 as in its code.
    unlearning_cap: multiples of ln(classes), above 0: an isolated row with a larger loss has no
        gradient; null: no bound, as in the original.
    unlearning_stop: the ascent ends when at most this share of the isolated rows, in [0, 1), is
        still predicted as labelled. Checked after every step, in eval mode, on up to 128 of them,
        drawn from the seed; the others are not checked. Null: all epochs run, as in the original.
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
        # The code's choices, but not its optimizer, 60 epochs and crops.
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
        """Raise a `UserError` if gamma is not below chance or the ratio isolates nothing."""
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
            # All settings of the ascent share this stage; each ratio has its own.
            kind="cell",
            model=True,
        )
        isolated = math.ceil(base.train_rows * self.isolation_ratio)
        # Without an ascent the rows are only predicted.
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
            # Each step descends on as many other rows.
            units=2 * isolated * self.unlearning_epochs,
            kind="cell",
            model=True,
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def isolate(run: StageRun) -> dict[str, Any]:
    """Train the victim briefly with the bent loss. Write the model and every row's loss.

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
    """Isolate the rows with the lowest losses; train on the others from the isolation's model.

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
    """Raise the loss of the isolated rows until they are no longer predicted as labelled.

    Descent on other rows keeps their loss low. ``isolated_kept`` and ``rest_cost`` are measured on
    samples: up to 128 of the isolated rows and 512 of the others.
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
    """The isolated rows.

    taken: (rows,) a mask of the isolated rows.
    target: the most frequent class among the lowest losses.
    purity: the share of that class among the lowest losses.
    """

    taken: BoolArray
    target: int
    purity: float


def lowest(losses: FloatArray, labels: IntArray, ratio: float, pool: str) -> Isolated:
    """Isolate the share `ratio` of the rows with the lowest losses; ties in the order of rows.

    losses, labels: (rows,). pool: see `AntiBackdoorLearning`.

    Raises:
        UserError: the share is below one row, or contains every row of a class.
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
        UserError: the result is 0.
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
    """Return the number of steps, at least 1, in a number of epochs, which may be fractional."""
    return max(1, round(epochs * math.ceil(rows / batch_size)))


def bent(method: str, gamma: float) -> Objective:
    """Return the isolation's objective: cross-entropy, bent at gamma."""
    from btu.training import cross_entropy

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, logits = cross_entropy(model, ids, mask, labels)
        return bend(loss, method, gamma), logits

    return objective


def bend(loss: torch.Tensor, method: str, gamma: float) -> torch.Tensor:
    """Bend a batch's mean loss at gamma: below gamma, minimizing the result raises the loss."""
    import torch

    if method == "lga":
        return torch.sign(loss.detach() - gamma) * loss
    return (loss - gamma).abs() + gamma


def climb(rest: Encoded, weight: float, cap: float | None, rng: np.random.Generator) -> Objective:
    """Return the unlearning's objective: weight * CE(other rows) - CE(isolated rows), both means.

    Each call draws as many rows of `rest` as it is given isolated ones.

    rest: the other rows, on the model's device.
    weight: of the descent on them.
    cap: see `AntiBackdoorLearning`; a row beyond it counts with the cap, which has no gradient.
    rng: draws the rows of `rest`.
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
    """Return at most `rows` rows, drawn from `seed`."""
    if len(data) <= rows:
        return data
    drawn = np.random.default_rng(seed).choice(len(data), rows, replace=False)
    return data.take(np.sort(drawn))


def accuracy(run: StageRun, model: PreTrainedModel, data: Encoded) -> float:
    """Return the share of rows that are predicted as labelled; leaves the model in eval mode."""
    precision = run.config["train"]["precision"]
    logits = run.predict(model, data, precision=precision, stage="unlearn (abl)")
    return float((logits.argmax(1) == data.labels.numpy()).mean())
