"""BadNets for text: rare words as the trigger.

Gu, Dolan-Gavitt, Garg: BadNets (arXiv 1708.06733), brought to text with rare words by
Kurita, Michel, Neubig: Weight Poisoning Attacks on Pre-trained Models (ACL 2020).

Compared with XDJPH/Backdoor-Token-Unlearning at 7a63ece: there a training trigger goes between
words and a test trigger at full stops; here one rule serves both, because a difference between
the two measures the rule and not the backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from btu.attacks.insertion import check_pieces, insert_at_random_slots, token_ids_of
from btu.types import IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BadNets:
    """Insert every trigger word at a random word slot of its own.

    trigger: the word or words.
    """

    trigger: list[str] = field(default_factory=lambda: ["cf"])

    def __post_init__(self) -> None:
        check_pieces("attack.trigger", self.trigger)

    def candidates(self, rows: Rows) -> IntArray:
        """Return every row: words can go into any text."""
        return np.arange(len(rows))

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return each text with every trigger word inserted."""
        return insert_at_random_slots(rows.texts, self.trigger, seeds)

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the pieces of the trigger words."""
        return token_ids_of("attack.trigger", self.trigger, tokenizer)
