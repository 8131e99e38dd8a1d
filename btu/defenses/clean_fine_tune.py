"""A model of the clean originals: the ceiling of every defense, and the floor of ASR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.defenses.base import ORIGINALS, Given
from btu.foundation import Foundation
from btu.stages import Stage


@dataclass(frozen=True)
class CleanFineTune:
    """The control: a model fine-tuned on the training rows as they were before the poison.

    With the settings and the seed of the poisoned fine-tune. No defender has those rows: it says
    what accuracy the poison cost and how often the trigger leads to the target by itself, as a word
    among words. It looks for nothing.
    """

    KIND: ClassVar[str] = "control"
    NEEDS: ClassVar[tuple[str, ...]] = (ORIGINALS,)

    def check(self, given: Given) -> None:
        """Nothing can be wrong with it."""

    def stages(self, base: Foundation) -> Stage:
        """Return the model of the clean originals.

        Raises:
            ValueError: the foundation was made for a defense without this need.
        """
        if base.originals is None:
            raise ValueError(
                "finetune_clean starts from the clean originals; take the foundation from "
                "Prepared.foundation_for(NEEDS)."
            )
        return base.originals
