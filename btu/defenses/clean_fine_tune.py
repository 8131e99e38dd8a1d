"""A model of the rows before the poison: the ceiling of every defense, and the floor of ASR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.defenses.base import ORIGINALS, Given
from btu.foundation import Foundation
from btu.stages import Stage


@dataclass(frozen=True)
class CleanFineTune:
    """Control: a model fine-tuned on the training rows as they were before the poison.

    It has the settings and the seed of the poisoned fine-tune. No defender has those rows: the
    control shows how much accuracy the poison costs, and how often the trigger leads to the target
    without a backdoor. It flags nothing.
    """

    KIND: ClassVar[str] = "control"
    NEEDS: ClassVar[tuple[str, ...]] = (ORIGINALS,)

    def check(self, given: Given) -> None:
        """There is nothing to check."""

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
