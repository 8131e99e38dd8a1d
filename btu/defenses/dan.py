"""DAN: reject texts whose hidden states are far from those of clean rows, in any class.

Chen, Yang, Zhang, Bi, Sun: Expose Backdoors on the Way: A Feature-Based Efficient Defense against
Textual Backdoor Attacks (Findings of EMNLP 2022, arXiv 2210.07907). Reference code: lancopku/DAN,
``extract_embeddings.py`` and ``evaluate_dan.py`` at 17653cb.

The hidden states of triggered texts differ from those of clean texts in the layers of a poisoned
model. For each layer, each class's mean and one covariance for all classes are estimated on clean
rows. The distance of a text in a layer is its squared Mahalanobis distance to the nearest mean.
Each layer's distances are normalized by mean and standard deviation over held-out clean rows, and
averaged over the layers. Texts with a higher score than the bar are rejected. The bar is a quantile
of the held-out rows' scores.

==================  =================  =============  ==============================================
hyperparameter      evaluate_dan.py    default        why the default differs
==================  =================  =============  ==============================================
pooling             mean over tokens   the position   the token that the classifier reads carries
                                       that is        the prediction; its states serve ``badacts``
                                       classified     too. ``mean`` is the code's
shrinkage           0.1                Ledoit-Wolf    there may be fewer clean rows than dimensions;
                                                      Ledoit and Wolf's estimate adapts to their
                                                      number
aggregate           mean               the same       the code's other value, ``min`` of negative
                                                      distances, is ``max`` here
held_out            0.2                0.5            a bar at 5 % needs more rows than the means do
frr                 0.005 to 0.1       0.05           a value that the code reports
==================  =================  =============  ==============================================

Deviations: The code evaluates only texts that are predicted as the target class, which a defender
does not know; here every text is screened. Rows are held out class by class, so that each class
keeps rows for its mean. A class without clean rows has no mean: its texts are judged by the nearest
mean of another class, and more of them are rejected. A layer in which the held-out rows' distances
do not vary does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.layers import (
    POOLINGS,
    check_clean_rows,
    layer_stages,
    split_by_class,
)
from btu.defenses.kit.screening import load_values, save_values
from btu.errors import unknown
from btu.findings import Screened
from btu.foundation import Foundation
from btu.settings import check_share
from btu.stages import Stage, StageRun, stage
from btu.types import FloatArray, IntArray

AGGREGATES = ("mean", "max")


@dataclass(frozen=True)
class Dan:
    """DAN: distance-based anomaly score.

    frr: share of clean texts that may be rejected, in (0, 1): the bar is the 1 - frr quantile of
        the held-out clean rows' scores.
    held_out: share of each class's clean rows, in (0, 1), for the normalization and the bar; the
        others are for means and covariances.
    aggregate: over the layers, ``mean`` or ``max`` of a text's normalized distances.
    pooling: ``position`` takes the hidden state of the token that the classifier reads, ``mean``
        the mean over a text's tokens.
    shrinkage: share of a scaled identity in the covariance, in (0, 1); null takes Ledoit and Wolf's
        estimate of it.
    """

    frr: float = 0.05
    held_out: float = 0.5
    aggregate: str = "mean"
    pooling: str = "position"
    shrinkage: float | None = None

    KIND: ClassVar[str] = "at inference"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {"held_out": 0.2, "pooling": "mean", "shrinkage": 0.1},
    }

    def __post_init__(self) -> None:
        check_share("defense.frr", self.frr)
        check_share("defense.held_out", self.held_out)
        if self.aggregate not in AGGREGATES:
            raise unknown("defense.aggregate", self.aggregate, AGGREGATES)
        if self.pooling not in POOLINGS:
            raise unknown("defense.pooling", self.pooling, POOLINGS)
        if self.shrinkage is not None:
            check_share("defense.shrinkage", self.shrinkage)

    def check(self, given: Given) -> None:
        """Raise a `UserError` if a class cannot have clean rows to estimate on and to hold out."""
        check_clean_rows("dan", given.clean_rows, given.classes)

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned model: the screen does not change it."""
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the hidden states and the distances, shared by all bars, and the screen."""
        distances = base.stage(
            layer_distances,
            "distances (dan)",
            {"held_out": self.held_out, "shrinkage": self.shrinkage},
            layer_stages(base, model, incoming, self.pooling),
            kind="host",
        )
        return base.stage(
            screen_texts,
            "screen (dan)",
            {"frr": self.frr, "aggregate": self.aggregate},
            {"distances": distances},
            kind="host",
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def layer_distances(run: StageRun) -> dict[str, Any]:
    """Write the distances of held-out clean rows and incoming texts: (rows, layers) each."""
    clean, came = (load_values(run.inputs[role]) for role in ("clean", "incoming"))
    labels = clean["label"]
    learned, held = split_by_class(labels, run.config["held_out"], run.config["seed"])
    layers = []
    for n in range(clean["hidden"].shape[1]):
        known, rows = clean["hidden"][:, n].astype(np.float64), came["hidden"][:, n]
        asked = np.concatenate([known[held], rows.astype(np.float64)])
        layers.append(distances(known[learned], labels[learned], asked, run.config["shrinkage"]))
    found = np.stack(layers, axis=1)
    save_values(run.folder, clean=found[: len(held)], incoming=found[len(held) :])
    classes = len(np.unique(labels[learned]))
    return {"estimated_on": len(learned), "held_out": len(held), "classes": classes}


@stage(version=1)
def screen_texts(run: StageRun) -> dict[str, Any]:
    """Reject the texts whose score is above the held-out clean rows' quantile."""
    found = load_values(run.inputs["distances"])
    clean, came = scores(found["clean"], found["incoming"], run.config["aggregate"])
    bar = float(np.quantile(clean, 1 - run.config["frr"]))
    rejected = came > bar
    Screened(~rejected).save(run.folder)
    return {"bar": bar, "turned_away": int(rejected.sum())}


def distances(
    known: FloatArray, labels: IntArray, rows: FloatArray, shrinkage: float | None
) -> FloatArray:
    """Return each row's squared Mahalanobis distance to the nearest class's mean: (rows,).

    It is 0 for all rows if the known rows of each class are equal.

    known: (known rows, hidden) the clean rows of one layer, of the classes `labels`.
    rows: (rows, hidden).
    shrinkage: share of the scaled identity in the covariance; None estimates it.
    """
    from sklearn.covariance import ledoit_wolf, shrunk_covariance

    classes, place = np.unique(labels, return_inverse=True)
    means = np.stack([known[labels == c].mean(axis=0) for c in classes])
    around = known - means[place]
    if not around.any():
        return np.zeros(len(rows))
    if shrinkage is None:
        covariance, _ = ledoit_wolf(around, assume_centered=True)
    else:
        covariance = shrunk_covariance(around.T @ around / len(around), shrinkage)
    # With L L' the covariance, the distance is the squared length of L^-1 (row - mean).
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, np.concatenate([rows, means]).T).T
    rows, means = white[: len(rows)], white[len(rows) :]
    nearest: FloatArray = np.min([((rows - mean) ** 2).sum(axis=1) for mean in means], axis=0)
    return nearest


def scores(clean: FloatArray, came: FloatArray, aggregate: str) -> tuple[FloatArray, FloatArray]:
    """Return the scores of clean rows and of texts: (rows,) each, higher is more suspicious.

    clean, came: (rows, layers) distances. The clean rows give each layer's mean and deviation.
    """
    mean, deviation = clean.mean(axis=0), clean.std(axis=0)
    varies = deviation > 0
    if not varies.any():
        return np.zeros(len(clean)), np.zeros(len(came))
    first, second = ((rows[:, varies] - mean[varies]) / deviation[varies] for rows in (clean, came))
    if aggregate == "max":
        return first.max(axis=1), second.max(axis=1)
    return first.mean(axis=1), second.mean(axis=1)
