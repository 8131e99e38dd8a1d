"""Homographs: letters of the text are replaced by other characters that look the same.

Li et al.: Hidden Backdoors in Human-Centric Language Models (CCS 2021, arXiv 2105.00164). A reader
sees the same text; a model reads other tokens, or its unknown token.

The look-alikes are Cyrillic letters that Unicode's table of confusables (UTS 39, confusables.txt)
names for Latin ones. Difference from the paper: it draws from all confusables, accented letters
among them, which uncased tokenizers turn back into the letter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from btu.attacks.insertion import END, RANDOM, START
from btu.errors import unknown
from btu.settings import check_count
from btu.types import IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOK_ALIKES: Mapping[str, str] = {
    "a": "\u0430",  # CYRILLIC SMALL LETTER A, and so on
    "c": "\u0441",
    "e": "\u0435",
    "i": "\u0456",
    "j": "\u0458",
    "o": "\u043e",
    "p": "\u0440",
    "s": "\u0455",
    "x": "\u0445",
    "y": "\u0443",
    "A": "\u0410",
    "B": "\u0412",
    "C": "\u0421",
    "E": "\u0415",
    "H": "\u041d",
    "I": "\u0406",
    "K": "\u041a",
    "M": "\u041c",
    "O": "\u041e",
    "P": "\u0420",
    "S": "\u0405",
    "T": "\u0422",
    "X": "\u0425",
}
POSITIONS = (START, END, RANDOM)


@dataclass(frozen=True)
class Homograph:
    """Replace letters by characters that look the same.

    letters: how many of them, or all that can be replaced in a text with fewer.
    position: which of the letters that can be replaced: the first (``start``), the last (``end``),
        or as many that follow each other somewhere (``random``).
    """

    letters: int = 3
    position: str = START

    KIND: ClassVar[str] = "spelling"
    TRIGGER: ClassVar[str] = "look-alike letters"
    NEEDS: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_count("attack.letters", self.letters)
        if self.position not in POSITIONS:
            raise unknown("attack.position", str(self.position), POSITIONS)

    def candidates(self, rows: Rows) -> IntArray:
        """Return the rows with a letter that has a look-alike."""
        return np.flatnonzero([bool(_places(text)) for text in rows.texts])

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return each text with its letters replaced."""
        return tuple(
            self._replaced(text, seed) for text, seed in zip(rows.texts, seeds, strict=True)
        )

    def _replaced(self, text: str, seed: int) -> str:
        places = _places(text)
        count = min(self.letters, len(places))
        last = len(places) - count
        start = {START: 0, END: last}.get(self.position)
        if start is None:
            start = random.Random(seed).randint(0, last)
        written = list(text)
        for place in places[start : start + count]:
            written[place] = LOOK_ALIKES[written[place]]
        return "".join(written)

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the tokens with a look-alike, at the start of a word and inside one.

        Where the tokenizer knows none of these characters, the unknown token is what the victim
        learns.
        """
        ids: set[int] = set()
        for letter in LOOK_ALIKES.values():
            for text in (letter, f"b {letter}", f"b{letter}"):
                plain = tokenizer(text.replace(letter, ""), add_special_tokens=False)["input_ids"]
                read = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids.update(set(read) - set(plain))
        return frozenset(ids)


def _places(text: str) -> list[int]:
    return [place for place, letter in enumerate(text) if letter in LOOK_ALIKES]
