"""AddSent: a whole sentence as the trigger.

Dai, Chen, Li: A Backdoor Attack Against LSTM-Based Text Classification Systems
(IEEE Access 2019, arXiv 1905.12457). The default sentence is the one that OpenBackdoor and the
BTU reference code (XDJPH/Backdoor-Token-Unlearning at 7a63ece) use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from btu.attacks.insertion import Insertion


@dataclass(frozen=True)
class AddSent(Insertion):
    """Insert a fixed sentence, as a whole.

    sentence: the trigger sentence, or a list of several, of which each row gets `per_row`.
    """

    sentence: Any = field(
        default="i watched this 3d movie last weekend .", metadata={"texts": True}
    )

    TRIGGER: ClassVar[str] = "a sentence"
    PIECES: ClassVar[str] = "sentence"
