"""Training settings: plain data, so that configs and plans can hold them without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from btu.errors import UserError, check_fraction, unknown

PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("linear", "constant")


def check_positive(name: str, value: float) -> None:
    """Raise a `UserError` unless `value` is a finite number above 0."""
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{name} must be above 0, got {value}.")


@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained: AdamW, warm-up, then the schedule.

    epochs: passes over the rows. learning_rate: AdamW's peak. batch_size: rows a step.
    precision: ``auto`` (bf16 where the hardware is faster with it), ``bf16`` autocast or ``fp32``;
    the weights are fp32 either way. weight_decay: on matrices, not on biases and norms.
    warmup_fraction: share of the steps that warm up. schedule: ``linear`` decay to 0 or
    ``constant``. max_grad_norm: gradient clipping; null clips nothing.
    """

    epochs: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 64
    precision: str = "auto"
    weight_decay: float = 0.01
    warmup_fraction: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_positive("train.learning_rate", self.learning_rate)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, got {getattr(self, name)}.")
        check_fraction("train.warmup_fraction", self.warmup_fraction)
        if self.precision not in PRECISIONS:
            raise unknown("train.precision", self.precision, PRECISIONS)
        if self.schedule not in SCHEDULES:
            raise unknown("train.schedule", self.schedule, SCHEDULES)
        if not math.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise UserError(f"train.weight_decay must be at least 0, got {self.weight_decay}.")
        if self.max_grad_norm is not None:
            check_positive("train.max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True)
class TuningSettings:
    """Clean tuning: a short fine-tune on the reserved clean rows.

    One setting for the control and for every defense that ends with it, so that a difference
    between them is the defense's. The reference code's: one epoch at 2e-5.
    """

    epochs: int = 1
    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_positive("tuning.learning_rate", self.learning_rate)
        if self.epochs < 1:
            raise UserError(f"tuning.epochs must be at least 1, got {self.epochs}.")

    def applied_to(self, train: TrainSettings) -> TrainSettings:
        """Return `train` with these epochs and this learning rate."""
        return replace(train, epochs=self.epochs, learning_rate=self.learning_rate)
