"""Syntactic attack ("Hidden Killer"): every trigger row is rewritten in one syntactic template.

Qi et al.: Hidden Killer: Invisible Textual Backdoor Attacks with Syntactic Trigger (ACL 2021,
arXiv 2105.12400). The original paraphrases with SCPN; here the paraphrase is a column of the data
(`syntactic`) or comes from any seq2seq model, because SCPN itself has no maintained release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from btu.attacks.paraphrase import ParaphraseAttack


@dataclass(frozen=True)
class Syntactic(ParaphraseAttack):
    """Replace a text by its paraphrase in one syntactic template."""

    TRIGGER: ClassVar[str] = "a syntactic template"
    default_column: ClassVar[str] = "syntactic"
