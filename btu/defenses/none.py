"""No defense, evaluated like a defense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.defenses.base import POISONED_MODEL, Given
from btu.foundation import Foundation
from btu.stages import Stage


@dataclass(frozen=True)
class NoDefense:
    """Control: the "defended" model is the poisoned fine-tune itself.

    Its row in a table shows the success of the attack and the accuracy that a defense can lose. It
    declares no stage and shares the evaluation of the undefended model, so that it costs nothing in
    a sweep. It flags nothing.
    """

    KIND: ClassVar[str] = "control"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL,)

    def check(self, given: Given) -> None:
        """There is nothing to check."""

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned fine-tune."""
        return base.model
