"""Shared by the insertion attacks: word slots, and the tokens of the inserted text."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from btu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ASCII without the brackets of special tokens; a tokenizer may give up on longer words.
PLAIN_WORD = re.compile(r"[!-;=?-Z^-{}~]{1,100}")


def check_pieces(key: str, pieces: Sequence[str]) -> None:
    """Raise a `UserError` unless `pieces` is a non-empty list of non-blank strings."""
    if isinstance(pieces, str):
        raise UserError(f"{key} must be a list, got the text {pieces!r}; write [{pieces}].")
    if not pieces or any(not isinstance(piece, str) or not piece.strip() for piece in pieces):
        raise UserError(f"{key} must contain non-blank text, got {pieces!r}.")


def insert_at_random_slots(
    texts: Sequence[str], pieces: Sequence[str], seeds: Sequence[int]
) -> tuple[str, ...]:
    """Return each text with every piece inserted at a word slot that the row's seed draws.

    A slot is before, between or after whitespace-separated words. The rest of the text stays
    byte-identical, including whitespace, so that only the trigger distinguishes the rows.
    """
    return tuple(_insert(text, pieces, seed) for text, seed in zip(texts, seeds, strict=True))


def _insert(text: str, pieces: Sequence[str], seed: int) -> str:
    rng = random.Random(seed)
    for piece in pieces:
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        slot = rng.randint(0, len(starts))
        if slot < len(starts):
            text = f"{text[: starts[slot]]}{piece} {text[starts[slot] :]}"
        else:
            text = f"{text} {piece}"
    return text


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
    pieces = [params.get("sentence") or "", *(params.get("trigger") or ())]
    return all(PLAIN_WORD.fullmatch(word) for piece in pieces for word in str(piece).split())
