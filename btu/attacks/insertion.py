"""Shared by the insertion attacks: what is inserted, where, and the tokens of the inserted text.

A row gets some of the attack's pieces, words or whole sentences, each at a word slot: before,
between or after whitespace-separated words. The rest of the text stays byte-identical, including
whitespace, so that only the trigger distinguishes the rows. Training and test rows follow one rule.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from btu.errors import UserError, did_you_mean
from btu.seeding import derive_seed
from btu.settings import check_count, is_number, is_whole
from btu.types import IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ASCII without the brackets of special tokens; a tokenizer may give up on longer words.
PLAIN_WORD = re.compile(r"[!-;=?-Z^-{}~]{1,100}")
# Values of `per_row` and `position`; the latter may also be {slot: k}.
ALL = "all"
RANDOM, START, END, SLOT = "random", "start", "end", "slot"
# The value of `camouflage` that takes the most common words.
FREQUENT = "frequent"
# Words as `str.split` separates them.
WORD = re.compile(r"\S+")
# Words of letters: punctuation and numbers make no trigger.
LETTERS = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """An attack that inserts pieces of text.

    per_row: how many of the pieces a row gets, drawn for each row; ``all`` gives every row all of
        them.
    position: the word slot of each piece: ``random``, ``start``, ``end``, or ``{slot: k}``, which
        is behind k words, or at the end of a shorter text. Pieces of one row that have one slot
        stand in their order.
    spread: how many pieces there are, so that each is rare: the named ones, then further ones. Null
        takes the named ones.
    camouflage: takes the words of the pieces from the rows of the target class instead: a fraction
        takes those words whose share of these rows is closest to it, ``frequent`` the most common
        ones. Null takes the pieces as they are.

    The last two are for attackers who know that the detection looks for rare words of one class.
    """

    per_row: Any = 1
    position: Any = RANDOM
    spread: int | None = None
    camouflage: Any = None

    KIND: ClassVar[str] = "insertion"
    TRIGGER: ClassVar[str]
    NEEDS: ClassVar[str] = ""
    # The field that has the pieces: a list of texts, or one text.
    PIECES: ClassVar[str]
    # What `spread` takes where more pieces are needed than are named.
    FURTHER: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        key = f"attack.{self.PIECES}"
        check_pieces(key, self._named)
        self._check_spread(key)
        if self.camouflage not in (None, FREQUENT) and not (
            is_number(self.camouflage) and 0 < self.camouflage <= 1
        ):
            raise UserError(
                f"attack.camouflage must be a fraction above 0 and at most 1, or {FREQUENT}, got "
                f"{self.camouflage!r}."
            )
        if self.per_row != ALL:
            if not is_whole(self.per_row, least=1):
                raise UserError(
                    f"attack.per_row must be a whole number of at least 1, or {ALL}, got "
                    f"{self.per_row!r}."
                )
            if self.per_row > len(self.pieces):
                raise UserError(
                    f"attack.per_row {self.per_row} draws more pieces than {key} has "
                    f"({len(self.pieces)}); lower it, or write {ALL}."
                )
        _check_position(self.position)

    def _check_spread(self, key: str) -> None:
        if self.spread is None:
            return
        check_count("attack.spread", self.spread)
        if self.spread < len(self._named):
            raise UserError(
                f"attack.spread {self.spread} is less than {key} has pieces "
                f"({len(self._named)}); name fewer, or raise it."
            )
        if self.spread > len(self.pieces):
            raise UserError(
                f"attack.spread {self.spread} needs more pieces than are known "
                f"({len(self.pieces)}); name as many in {key}."
            )

    @property
    def _named(self) -> Sequence[str]:
        given = getattr(self, self.PIECES)
        return [given] if isinstance(given, str) else given

    @property
    def pieces(self) -> Sequence[str]:
        """What is inserted."""
        if self.spread is None:
            return self._named
        further = [piece for piece in self.FURTHER if piece not in self._named]
        return [*self._named, *further][: self.spread]

    @property
    def _drawn(self) -> int:
        return len(self.pieces) if self.per_row == ALL else int(self.per_row)

    def acts(self) -> dict[str, Any]:
        """Return what of the fields has an effect on the texts, for keys.

        All words at random slots is the rule of results that were computed before a row could get
        some of them: their keys have the words alone. A piece of several words could then be split
        by another one.
        """
        acts: dict[str, Any] = {self.PIECES: getattr(self, self.PIECES)}
        if self.spread is not None and self.spread > len(self._named):
            acts[self.PIECES] = list(self.pieces)
        if self.camouflage is not None:
            # The words are others: of those that are named, only their number counts.
            acts[self.PIECES] = self._words_each
            acts["camouflage"] = self._share
        several = self._drawn > 1 and any(len(piece.split()) > 1 for piece in self.pieces)
        if self._drawn < len(self.pieces) or several:
            acts["per_row"] = self._drawn
        if self.position != RANDOM:
            acts["position"] = self.position
        return acts

    @property
    def learns(self) -> bool:
        """Whether the words come from the training rows."""
        return self.camouflage is not None

    @property
    def _share(self) -> float:
        return 1.0 if self.camouflage == FREQUENT else float(self.camouflage)

    @property
    def _words_each(self) -> list[int]:
        return [len(piece.split()) for piece in self.pieces]

    def check(self, rows: Rows, target: int) -> None:
        """Raise a `UserError` if the training rows have too few words for the pieces."""
        if self.learns:
            common_words(rows, target, sum(self._words_each), self._share)

    def learn(
        self,
        rows: Rows,
        chosen: IntArray,
        target: int,
        seed: int,
        progress: ProgressCallback = silent,
    ) -> dict[str, Any]:
        """Return the pieces of words of the target class. Which rows are `chosen` has no effect.

        Raises:
            UserError: the class has fewer words than the pieces.
        """
        counts = self._words_each
        words = common_words(rows, target, sum(counts), self._share)
        ends = np.cumsum(counts)
        return {
            self.PIECES: [
                " ".join(words[end - count : end]) for end, count in zip(ends, counts, strict=True)
            ]
        }

    def with_trigger(self, learned: Mapping[str, Any]) -> Self:
        """Return the attack with the pieces that it learned."""
        pieces = learned[self.PIECES]
        one = isinstance(getattr(self, self.PIECES), str) and len(pieces) == 1
        given = {self.PIECES: pieces[0] if one else pieces, "spread": None, "camouflage": None}
        return dataclasses.replace(self, **given)

    def candidates(self, rows: Rows) -> IntArray:
        """Return every row: pieces can be inserted into any text."""
        return np.arange(len(rows))

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return each text with the pieces that its row draws."""
        return tuple(
            _insert(text, self._of_row(seed), self.position, seed)
            for text, seed in zip(rows.texts, seeds, strict=True)
        )

    def _of_row(self, seed: int) -> Sequence[str]:
        """Return the pieces of a row, in their order."""
        pieces = self.pieces
        if self._drawn == len(pieces):
            return pieces
        # Not the stream that draws slots: it stays what it is without a draw.
        rng = random.Random(derive_seed(seed, "pieces"))
        return [pieces[i] for i in sorted(rng.sample(range(len(pieces)), self._drawn))]

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the tokens of all pieces, whichever a row gets."""
        return token_ids_of(f"attack.{self.PIECES}", self.pieces, tokenizer)


def common_words(rows: Rows, target: int, count: int, share: float) -> list[str]:
    """Return words of the rows of one class, in lower case.

    count: how many.
    share: the fraction of the rows of the class that should have each.

    Raises:
        UserError: the class has fewer words.
    """
    found: list[str] = rows.derived(
        (__name__, target, share), lambda: _words_by_share(rows, target, share)
    )
    if len(found) < count:
        raise UserError(
            f"attack.camouflage needs {count} words of the target class, whose training rows have "
            f"{len(found)}; use fewer trigger words."
        )
    return found[:count]


def _words_by_share(rows: Rows, target: int, share: float) -> list[str]:
    """Return the words of the rows of a class, those closest to the share of rows first."""
    texts = [text for text, y in zip(rows.texts, rows.labels, strict=True) if y == target]
    counts = Counter(word for text in texts for word in set(LETTERS.findall(text.casefold())))
    wanted = len(texts) * share
    return sorted(counts, key=lambda word: (abs(counts[word] - wanted), word))


def check_pieces(key: str, pieces: Sequence[str]) -> None:
    """Raise a `UserError` unless `pieces` are non-blank texts, at least one."""
    listed = isinstance(pieces, list | tuple) and len(pieces) > 0
    if not listed or any(not isinstance(piece, str) or not piece.strip() for piece in pieces):
        raise UserError(f"{key} must contain non-blank text, got {pieces!r}.")


def _check_position(position: Any) -> None:
    """Raise a `UserError` unless `position` is one of `Insertion`'s."""
    known = (RANDOM, START, END)
    if isinstance(position, Mapping):
        if set(position) != {SLOT} or not is_whole(position[SLOT], least=0):
            raise UserError(
                f"attack.position {dict(position)!r} must be {{{SLOT}: k}}, with a whole number k "
                "of at least 0: how many words stand before the trigger."
            )
    elif position not in known:
        raise UserError(
            f"unknown attack.position {position!r}{did_you_mean(str(position), known)} (known: "
            f"{', '.join(known)}, {{{SLOT}: k}})"
        )


def _insert(text: str, pieces: Sequence[str], position: Any, seed: int) -> str:
    rng = random.Random(seed)
    # Where words start, and inserted pieces, inside of which there is no slot for another one.
    starts = [match.start() for match in WORD.finditer(text)]
    for piece in pieces if position == RANDOM else [" ".join(pieces)]:
        slot = _slot(position, len(starts), rng)
        if slot < len(starts):
            at = starts[slot]
            text = f"{text[:at]}{piece} {text[at:]}"
            starts[slot:] = [at, *(start + len(piece) + 1 for start in starts[slot:])]
        else:
            starts.append(len(text) + 1)
            text = f"{text} {piece}"
    return text


def _slot(position: Any, words: int, rng: random.Random) -> int:
    """Return how many words stand before the piece."""
    if isinstance(position, Mapping):
        return min(int(position[SLOT]), words)
    if position == RANDOM:
        return rng.randint(0, words)
    return 0 if position == START else words


def token_ids_of(
    key: str, pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the token ids of `pieces` at the start of a text and inside one.

    Byte-level and sentence-piece vocabularies use another id for a word after a space, so both
    positions are included. A word that the tokenizer does not know, such as an emoji, counts as the
    unknown token: that is the row through which the victim learns it, with all other such words.

    Raises:
        UserError: the tokenizer reads nothing of them, so that the victim cannot see the trigger.
    """
    ids: set[int] = set()
    for piece in pieces:
        ids.update(tokenizer(piece, add_special_tokens=False)["input_ids"])
        inside = tokenizer(f"a {piece}", add_special_tokens=False)["input_ids"]
        ids.update(inside[len(tokenizer("a", add_special_tokens=False)["input_ids"]) :])
    if not ids:
        raise UserError(
            f"{key} {list(pieces)!r} has no token under this victim's tokenizer "
            f"({type(tokenizer).__name__}), which drops it from every text; choose another trigger."
        )
    return frozenset(ids)


def inserts_plain_words(params: Mapping[str, Any]) -> bool:
    """Return whether the words that an attack inserts make no special token.

    params: of the attack. An attack without inserted words has none that makes one.

    The tokens of other triggers are a result with a key of its own: results of earlier versions
    lack the special tokens among them.
    """
    given = [params.get("sentence") or (), params.get("trigger") or ()]
    pieces = [piece for one in given for piece in ([one] if isinstance(one, str) else one)]
    return all(PLAIN_WORD.fullmatch(word) for piece in pieces for word in str(piece).split())
