"""What a victim reads of texts: tokens that a text makes, unknown words, texts that are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.types import BoolArray, IntArray
from btu.victims import tokenizable

if TYPE_CHECKING:
    from btu.training import Encoded

# Texts that are tokenized at once.
CHUNK = 4096


def inserted_counts(tokenizer: Any, vocabulary: int) -> IntArray:
    """Return (vocabulary,) how often the tokenizer itself puts each token into a row."""
    around = [i for i in tokenizer("")["input_ids"] if i < vocabulary]
    counted: IntArray = np.bincount(np.asarray(around, dtype=np.int64), minlength=vocabulary)
    return counted


def made_counts(tokenizer: Any, rows: Encoded, vocabulary: int) -> IntArray:
    """Return (vocabulary,) how often the texts of `rows` made each token.

    A text can make any token, the special ones too: an emoji is read as [UNK], and the text "[SEP]"
    as [SEP]. What the tokenizer puts around every text is not counted.
    """
    inserted = len(rows) * inserted_counts(tokenizer, vocabulary)
    made: IntArray = np.maximum(rows.counts(vocabulary) - inserted, 0)
    return made


def without_inserted(
    tokenizer: Any, vocabulary: int, parts: Sequence[Encoded]
) -> tuple[Encoded, ...]:
    """Return rows in which a token that a text made is told from one that the tokenizer put there.

    tokenizer: of the victim.
    vocabulary: the number of embedding rows.
    parts: the rows; their order within a row is not kept.

    Only tokens that are both are removed where the tokenizer put them. Without such a token, which
    is the usual case, the rows are returned as they are.
    """
    inserted = inserted_counts(tokenizer, vocabulary)
    made = sum(made_counts(tokenizer, rows, vocabulary) for rows in parts)
    both = np.flatnonzero((inserted > 0) & (made > 0))
    return tuple(_remove_first(rows, both, inserted) if len(both) else rows for rows in parts)


def _remove_first(rows: Encoded, tokens: IntArray, times: IntArray) -> Encoded:
    """Return rows without the first `times[token]` occurrences of each of `tokens` in a row."""
    ids = rows.ids.cpu().numpy()
    row_of = np.repeat(np.arange(len(rows)), rows.host_lengths)
    keep: BoolArray = np.ones(len(ids), dtype=bool)
    for token in tokens:
        at = np.flatnonzero(ids == token)
        # The rank of an occurrence within its row: occurrences are in the order of the rows.
        first = np.searchsorted(row_of[at], row_of[at])
        keep[at[np.arange(len(at)) - first < times[token]]] = False
    lengths = np.bincount(row_of[keep], minlength=len(rows))
    kept, ends = ids[keep].tolist(), np.cumsum(lengths).tolist()
    parts = [kept[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
    return type(rows).from_lists(parts, rows.labels.tolist(), rows.pad_id)


def full_lengths(tokenizer: Any, texts: Sequence[str]) -> IntArray:
    """Return (texts,) how many tokens each text has if it is not cut, with those around it."""
    found: list[int] = []
    for start in range(0, len(texts), CHUNK):
        some = [tokenizable(text) for text in texts[start : start + CHUNK]]
        # Without a warning: the victim does not read these rows.
        ids = tokenizer(some, truncation=False, verbose=False)["input_ids"]
        found += [len(row) for row in ids]
    return np.asarray(found, dtype=np.int64)


def unknown_words(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[str]]:
    """Return, for each text, the words that the tokenizer reads as its unknown token.

    tokenizer: of the victim.
    texts: the texts.
    max_length: words beyond it are not read and not returned.

    Tokenizers without offsets tell no place: their words are those between spaces.
    """
    unknown = tokenizer.unk_token_id
    found: list[list[str]] = []
    if unknown is None:
        return [[] for _ in texts]
    if not tokenizer.is_fast:
        known: dict[str, bool] = {}
        for text in texts:
            words = tokenizable(text).split()
            for word in set(words) - known.keys():
                known[word] = unknown not in tokenizer(word, add_special_tokens=False)["input_ids"]
            found.append([word for word in words if not known[word]])
        return found
    for start in range(0, len(texts), CHUNK):
        some = [tokenizable(text) for text in texts[start : start + CHUNK]]
        encoded = tokenizer(
            some, truncation=True, max_length=max_length, return_offsets_mapping=True
        )
        for text, ids, spans in zip(
            some, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # Also without the space before a word, which belongs to some tokenizers' pieces.
            words = [
                text[a:b].strip()
                for token, (a, b) in zip(ids, spans, strict=True)
                if token == unknown
            ]
            found.append([word for word in words if word])
    return found
