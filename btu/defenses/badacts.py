"""BadActs: reject texts that move many neurons out of the range of clean rows.

Yi, Chen, Li, Li, Zhang, Liu: BadActs: A Universal Backdoor Defense in the Activation Space
(Findings of ACL 2024, arXiv 2405.11227). Reference code: clearloveclearlove/BadActs,
``openbackdoor/defenders/badacts_defender.py`` and ``BadActs_detection.py`` at a80d242.

The neurons are the hidden states of all layers at the token that the classifier reads. The
activation of each neuron on clean rows is taken as normal: its mean and standard deviation are
estimated on half of the clean rows. The score of a text (neuron activation state) is the share of
neurons whose activation is within ``k`` standard deviations of the mean. Texts with a lower score
than the bar are rejected. The bar is a quantile of the scores of the other half.

The defaults are those of the original: ``k`` is 3 as in its script (2 in its class), half of the
clean rows are held out, and the FRR is 0.05.

Only the detection is built. The original then reads a rejected text again with a changed model,
which limits every activation of every token to an interval that is learned on clean rows. A screen
accepts, rejects or rewrites texts and does not change the model. A rejected text counts as neither
correct nor attacked.

Deviations: Rows are held out class by class. The bar is the interpolated quantile, where the code
takes the row of that rank. In a model that classifies a text's last token, such as GPT-2, that
token replaces the first. A neuron whose activation is the same on all clean rows has no range: any
other value is out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.layers import check_clean_rows, layer_stages, split_by_class
from btu.defenses.kit.screening import load_values, save_values
from btu.findings import Screened
from btu.foundation import Foundation
from btu.settings import check_positive, check_share
from btu.stages import Stage, StageRun, stage
from btu.types import FloatArray


@dataclass(frozen=True)
class BadActs:
    """BadActs, the detection.

    frr: share of clean texts that may be rejected, in (0, 1): the bar is this quantile of the
        held-out clean rows' scores.
    k: half the width of a neuron's range, in standard deviations, above 0.
    held_out: share of each class's clean rows, in (0, 1), for the bar; the others are for the
        ranges.
    """

    frr: float = 0.05
    k: float = 3.0
    held_out: float = 0.5

    KIND: ClassVar[str] = "at inference"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def __post_init__(self) -> None:
        check_share("defense.frr", self.frr)
        check_positive("defense.k", self.k)
        check_share("defense.held_out", self.held_out)

    def check(self, given: Given) -> None:
        """Raise a `UserError` if a class cannot have clean rows to estimate on and to hold out."""
        check_clean_rows("badacts", given.clean_rows, given.classes)

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned model: the screen does not change it."""
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the hidden states, which `dan` shares, the scores and the screen."""
        scored = base.stage(
            activation_states,
            "activation states (badacts)",
            {"held_out": self.held_out, "k": self.k},
            layer_stages(base, model, incoming),
            kind="host",
        )
        return base.stage(
            screen_texts,
            "screen (badacts)",
            {"frr": self.frr},
            {"scores": scored},
            kind="host",
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def activation_states(run: StageRun) -> dict[str, Any]:
    """Write the scores of held-out clean rows and incoming texts: (rows,) each."""
    clean, came = (load_values(run.inputs[role]) for role in ("clean", "incoming"))
    learned, held = split_by_class(clean["label"], run.config["held_out"], run.config["seed"])
    known = clean["hidden"][learned]
    save_values(
        run.folder,
        clean=states(known, clean["hidden"][held], run.config["k"]),
        incoming=states(known, came["hidden"], run.config["k"]),
    )
    return {"estimated_on": len(learned), "held_out": len(held)}


@stage(version=1)
def screen_texts(run: StageRun) -> dict[str, Any]:
    """Reject the texts whose score is below the held-out clean rows' quantile."""
    found = load_values(run.inputs["scores"])
    bar = float(np.quantile(found["clean"], run.config["frr"]))
    rejected = found["incoming"] < bar
    Screened(~rejected).save(run.folder)
    return {"bar": bar, "turned_away": int(rejected.sum())}


def states(known: FloatArray, rows: FloatArray, k: float) -> FloatArray:
    """Return the share of each row's neurons that are within `k` deviations of the mean: (rows,).

    known: (known rows, layers, hidden) the activations that give means and deviations.
    rows: (rows, layers, hidden).
    """
    mean = known.mean(axis=0, dtype=np.float64)
    reach = k * known.std(axis=0, dtype=np.float64)
    # One row at a time, to save memory.
    return np.array([(np.abs(row - mean) <= reach).mean() for row in rows])
