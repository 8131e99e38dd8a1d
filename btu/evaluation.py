"""CACC, ASR and FTR of one model, always on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from btu.metrics import Proportion
from btu.training import PREDICT_BATCH, Encoded, predict

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class EvalSet:
    """The rows that every model of a cell is scored on.

    clean: all evaluation rows.
    triggered: the evaluation rows of other classes than the target, with the trigger and their true
        labels.
    plain: the same rows without the trigger.
    target: index of the attack's target class.
    """

    clean: Encoded
    triggered: Encoded
    plain: Encoded
    target: int


@dataclass(frozen=True)
class Scores:
    """The scores of a model: cacc over all rows, asr and ftr over the non-target rows."""

    cacc: Proportion
    asr: Proportion
    ftr: Proportion

    def as_metrics(self, prefix: str = "") -> dict[str, float]:
        """Return each value with its Wilson interval and n, every name prefixed by `prefix`."""
        return (
            self.cacc.as_metrics(f"{prefix}cacc")
            | self.asr.as_metrics(f"{prefix}asr")
            | self.ftr.as_metrics(f"{prefix}ftr")
        )


def evaluate(
    model: nn.Module,
    rows: EvalSet,
    *,
    precision: str,
    device: torch.device,
    batch_size: int = PREDICT_BATCH,
) -> Scores:
    """Score a model without changing its weights."""

    def hits(data: Encoded, wanted: object) -> Proportion:
        predicted = predict(model, data, precision=precision, device=device, batch_size=batch_size)
        return Proportion(int((predicted == wanted).sum()), len(data))

    return Scores(
        cacc=hits(rows.clean, rows.clean.labels.numpy()),
        asr=hits(rows.triggered, rows.target),
        ftr=hits(rows.plain, rows.target),
    )
