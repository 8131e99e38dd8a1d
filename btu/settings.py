"""Training settings as plain data, and the checks of numbers in settings. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from btu.errors import UserError, unknown

PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("linear", "constant")


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(name: str, value: Any) -> None:
    """Raise a `UserError` unless `value` is a finite number above 0."""
    if not is_number(value) or value <= 0:
        raise UserError(f"{name} must be above 0, got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
    """Raise a `UserError` unless `value` is a finite number of at least 0."""
    if not is_number(value) or value < 0:
        raise UserError(f"{name} must be at least 0, got {value!r}.")


def is_whole(value: Any, least: int) -> bool:
    """Return whether `value` is a whole number of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise a `UserError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}.")


def check_share(name: str, value: Any) -> None:
    """Raise a `UserError` unless `value` is above 0 and below 1."""
    if not is_number(value) or not 0 < value < 1:
        raise UserError(f"{name} must be above 0 and below 1, got {value!r}.")


def check_fraction(name: str, value: Any, *, open_low: bool = False) -> float:
    """Return `value` as a float in [0, 1], or in (0, 1] with `open_low`.

    Raises:
        UserError: `value` is not a number or lies outside.
    """
    interval = "(0, 1]" if open_low else "[0, 1]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number in {interval}, got {value!r}.")
    if not 0 <= value <= 1 or (open_low and value == 0):
        raise UserError(f"{name} must be in {interval}, got {value}.")
    return float(value)


@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained: AdamW, warm-up, then the schedule.

    epochs: passes over the rows.
    learning_rate: AdamW's peak learning rate.
    batch_size: rows per step.
    precision: ``auto`` (bf16 if the hardware is faster with it), ``bf16`` autocast or ``fp32``;
        the weights are fp32 in all cases.
    weight_decay: of matrices; biases and norms have none.
    warmup_fraction: share of the steps that warm up.
    schedule: ``linear`` decay to 0 or ``constant``.
    max_grad_norm: the norm that gradients are clipped to; null does not clip.
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
            check_count(f"train.{name}", getattr(self, name))
        check_fraction("train.warmup_fraction", self.warmup_fraction)
        if self.precision not in PRECISIONS:
            raise unknown("train.precision", self.precision, PRECISIONS)
        if self.schedule not in SCHEDULES:
            raise unknown("train.schedule", self.schedule, SCHEDULES)
        check_not_negative("train.weight_decay", self.weight_decay)
        if self.max_grad_norm is not None:
            check_positive("train.max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True)
class TuningSettings:
    """Clean tuning: a short fine-tune on the reserved clean rows.

    The control and every defense that ends with clean tuning use the same settings: a difference
    between them comes from the defense. The defaults are those of the reference code.

    epochs: passes over the clean rows.
    learning_rate: AdamW's peak learning rate.
    """

    epochs: int = 1
    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_positive("tuning.learning_rate", self.learning_rate)
        check_count("tuning.epochs", self.epochs)

    def applied_to(self, train: TrainSettings) -> TrainSettings:
        """Return `train` with these epochs and this learning rate."""
        return replace(train, epochs=self.epochs, learning_rate=self.learning_rate)
