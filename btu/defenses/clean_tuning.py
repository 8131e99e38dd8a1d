"""Clean tuning alone: the baseline of every defense that ends with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.foundation import Foundation
from btu.stages import Stage


@dataclass(frozen=True)
class CleanTuning:
    """Control: the poisoned model, fine-tuned on the reserved clean rows.

    Rows, settings (``tuning``) and seed are those of the defenses that end with clean tuning. It
    declares no stage: every cell has this model as its control. It flags nothing.
    """

    KIND: ClassVar[str] = "control"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def check(self, given: Given) -> None:
        """There is nothing to check."""

    def stages(self, base: Foundation) -> Stage:
        """Return the clean-tuned poisoned model."""
        return base.tuned
