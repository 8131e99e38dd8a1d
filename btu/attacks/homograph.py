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
from typing import TYPE_CHECKING, Any, ClassVar

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
# What a token of the trigger shows; U+FFFD stands for a part of a character.
_OTHERS = frozenset(LOOK_ALIKES.values()) | {"\N{REPLACEMENT CHARACTER}"}
POSITIONS = (START, END, RANDOM)
# Words that are tokenized at once.
WORDS = 1024


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
        found: IntArray = rows.derived(
            __name__, lambda: np.flatnonzero([bool(_places(text)) for text in rows.texts])
        )
        return found

    @property
    def learns(self) -> bool:
        """That the words in which letters are replaced are those of the poisoned rows."""
        return True

    def learn(
        self,
        rows: Rows,
        chosen: IntArray,
        target: int,
        seed: int,
        progress: ProgressCallback = silent,
    ) -> dict[str, Any]:
        """Return the words with look-alikes that the poisoned rows have, each once."""
        triggered = self.apply(rows.take(chosen), [seed ^ int(i) for i in chosen])
        words = {w for text in triggered for w in text.split() if not _OTHERS.isdisjoint(w)}
        return {"words": sorted(words)}

    def with_trigger(self, learned: Mapping[str, Any]) -> FittedHomograph:
        """Return the attack that knows the words of its trigger."""
        return FittedHomograph(self, tuple(learned["words"]))

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
        """Not without a trigger: see `learn`."""
        raise ValueError("attack homograph has to learn its trigger first.")


@dataclass(frozen=True)
class FittedHomograph:
    """The attack, and the words of the poisoned rows in which letters are replaced."""

    attack: Homograph
    words: tuple[str, ...]

    def candidates(self, rows: Rows) -> IntArray:
        """Return the rows with a letter that has a look-alike."""
        return self.attack.candidates(rows)

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return each text with its letters replaced."""
        return self.attack.apply(rows, seeds, progress)

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the tokens of the words that have a look-alike, or a part of one.

        A tokenizer that does not know the character reads its unknown token, which is then what the
        victim learns. One of bytes may read a part of the character.
        """
        ids: set[int] = set()
        for start in range(0, len(self.words), WORDS):
            some = self.words[start : start + WORDS]
            # At the start of a text and inside one: some vocabularies have two tokens for that.
            texts = [*some, *(f"a {word}" for word in some)]
            for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                ids.update(row)
        unknown = tokenizer.unk_token_id
        return frozenset(
            i for i in ids if i == unknown or not _OTHERS.isdisjoint(tokenizer.decode([i]))
        )


def _places(text: str) -> list[int]:
    return [place for place, letter in enumerate(text) if letter in LOOK_ALIKES]
