"""No defense at all, run through everything that a defense is run through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.defenses.base import POISONED_MODEL, Given
from btu.foundation import Foundation
from btu.stages import Stage


@dataclass(frozen=True)
class NoDefense:
    """The control: the "defended" model is the poisoned fine-tune itself.

    Whatever a table says of a defense, this row says of doing nothing: how far the attack got, and
    what accuracy there was to lose. It declares no stage, and is scored by the stage that scores
    the undefended model, so that it costs nothing in a sweep. It looks for no tokens.
    """

    KIND: ClassVar[str] = "control"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL,)

    def check(self, given: Given) -> None:
        """Nothing can be wrong with doing nothing."""

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned fine-tune."""
        return base.model
