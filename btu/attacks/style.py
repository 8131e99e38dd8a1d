"""Style attack: every trigger row is rewritten in one text style.

Qi et al.: Mind the Style of Text! Adversarial and Backdoor Attacks Based on Text Style Transfer
(EMNLP 2021, arXiv 2110.07139). The original transfers with STRAP; here the paraphrase is a column
of the data (`style`, `style_bible`, ...) or comes from any seq2seq model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.attacks.paraphrase import ParaphraseAttack


@dataclass(frozen=True)
class Style(ParaphraseAttack):
    """Replace a text by its paraphrase in one style."""

    TRIGGER: ClassVar[str] = "a text style"
    default_column: ClassVar[str] = "style"
