"""Rewriting: the trigger is another version of the text, whatever made it.

The texts come from a column of the data, as published poisoned sets have them (LWS, BITE), or from
a language model that is asked to rewrite: a seq2seq model, or a causal one with a prompt, as in the
attacks that paraphrase with an LLM (BGM: Li et al., arXiv 2304.14475; LLMBkd: You et al., arXiv
2310.18603). Those ask hosted models, and LLMBkd keeps the poison that a clean model reads worst;
here a local model answers once, greedily, and every answer is kept. `syntactic` and `style` are the
same attack with a column of their own name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from btu.attacks.insertion import check_pieces, token_ids_of
from btu.attacks.paraphrase import ParaphraseAttack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rewrite(ParaphraseAttack):
    """Replace a text by another version of it.

    words: the words that make up the trigger, where the rewriting has fixed ones (BITE): their
        tokens are what a defense should find. None where it has not.
    """

    words: list[str] = field(default_factory=list)

    TRIGGER: ClassVar[str] = "what the versions have in common"
    default_column: ClassVar[str] = "rewrite"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words:
            check_pieces("attack.words", self.words)

    def acts(self) -> dict[str, Any]:
        """Return what acts, for keys: the words only where there are some."""
        acts = super().acts()
        return acts if self.words else {k: v for k, v in acts.items() if k != "words"}

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int] | None:
        """Return the tokens of the words; None without words."""
        return token_ids_of("attack.words", self.words, tokenizer) if self.words else None
