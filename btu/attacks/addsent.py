"""AddSent: a whole sentence as the trigger.

Dai, Chen, Li: A Backdoor Attack Against LSTM-Based Text Classification Systems
(IEEE Access 2019, arXiv 1905.12457). The default sentence is the one that OpenBackdoor and the
BTU reference code (XDJPH/Backdoor-Token-Unlearning at 7a63ece) use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from btu.attacks.insertion import check_pieces, insert_at_random_slots, token_ids_of
from btu.types import IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AddSent:
    """Insert one fixed sentence at a random word slot.

    sentence: the trigger sentence. It goes in whole, so its words stay together.
    """

    sentence: str = "i watched this 3d movie last weekend ."

    def __post_init__(self) -> None:
        check_pieces("attack.sentence", [self.sentence])

    def candidates(self, rows: Rows) -> IntArray:
        """Return every row: a sentence can go into any text."""
        return np.arange(len(rows))

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return each text with the sentence inserted."""
        return insert_at_random_slots(rows.texts, [self.sentence], seeds)

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the pieces of the sentence, its common words and punctuation included."""
        return token_ids_of("attack.sentence", [self.sentence], tokenizer)
