"""What the insertion attacks share: word slots and the tokens of what was inserted."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from btu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_pieces(key: str, pieces: Sequence[str]) -> None:
    """Raise a `UserError` unless `pieces` are some non-blank strings."""
    if isinstance(pieces, str):
        raise UserError(f"{key} must be a list, got the text {pieces!r}; write [{pieces}].")
    if not pieces or any(not isinstance(piece, str) or not piece.strip() for piece in pieces):
        raise UserError(f"{key} must hold non-blank text, got {pieces!r}.")


def insert_at_random_slots(
    texts: Sequence[str], pieces: Sequence[str], seeds: Sequence[int]
) -> tuple[str, ...]:
    """Return each text with every piece at a word slot drawn from its seed.

    A slot is before, between or after whitespace-separated words. The text around it stays
    byte-identical, whitespace included, so that nothing but the trigger tells the rows apart.
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
    """Return the vocabulary ids that `pieces` become at the start of a text and inside one.

    Byte-level and sentence-piece vocabularies give a word another id after a space, so both
    positions count. Special tokens are left out.

    Raises:
        UserError: nothing but special tokens remain (e.g. the tokenizer knows no such character),
            so that the trigger has no row of its own to find.
    """
    ids: set[int] = set()
    for piece in pieces:
        ids.update(tokenizer(piece, add_special_tokens=False)["input_ids"])
        inside = tokenizer(f"a {piece}", add_special_tokens=False)["input_ids"]
        ids.update(inside[len(tokenizer("a", add_special_tokens=False)["input_ids"]) :])
    ids -= set(tokenizer.all_special_ids)
    if not ids:
        raise UserError(
            f"{key} {list(pieces)!r} has no token of its own under this victim's tokenizer "
            f"({type(tokenizer).__name__}); choose another trigger."
        )
    return frozenset(ids)
