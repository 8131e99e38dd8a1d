"""Clean tuning alone: what a defense that ends with it has to be better than."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.foundation import Foundation
from btu.stages import Stage


@dataclass(frozen=True)
class CleanTuning:
    """The control: the poisoned model, fine-tuned on the reserved clean rows and nothing else.

    The same rows, settings (``tuning``) and seed as at the end of the defenses that tune. It
    declares no stage of its own: every cell has this model as its control. It looks for nothing.
    """

    KIND: ClassVar[str] = "control"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def check(self, given: Given) -> None:
        """Nothing can be wrong with it."""

    def stages(self, base: Foundation) -> Stage:
        """Return the clean-tuned poisoned model."""
        return base.tuned
