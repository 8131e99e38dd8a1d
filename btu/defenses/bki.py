"""BKI, Backdoor Keyword Identification: drop the rows with the word that moves the model most.

Chen, Dai: Mitigating backdoor attacks in LSTM-based text classification systems by Backdoor
Keyword Identification (Neurocomputing 2021, arXiv 2007.12070). For transformers:
thunlp/OpenBackdoor, ``openbackdoor/defenders/bki_defender.py`` at 032daef.

A word is scored by how far the hidden state of the poisoned model moves when the word is removed
from a row. Each row's highest words are its keywords. A word that is a keyword of n rows and moves
them by a mean of f has the score f * log10(n) * log10(s / n). The word with the highest score is
the backdoor's keyword. The rows that have it among their keywords are dropped, and a model is
trained on the rest.

BKI always names a keyword, so it also drops rows from clean data.

Differences from the paper (P) or the code (C), and their reasons:

- The hidden state is the transformer's pooled one, as in C. (P uses that of an LSTM after every
  word, in a second score too.) The distance is the largest over units (P and C).
- s = (share * rows)^2, so that the weight log10(n) * log10(s / n) peaks where the number of rows
  with the word is the number that an attacker may have poisoned; `share` null leaves the second
  factor out, as C does.
- Removing every word from every row costs as many passes as there are words: 140,000 on SST-2. By
  default only `rows` drawn rows are scored, exactly: a trigger that matters is in many of them. The
  keywords of the other rows are then unknown, so all rows with the keyword are dropped, whether it
  moves them or not. With `rows` null all rows are scored, and the rule is that of P and C.
- Words are separated by white space (C) and keep their case. A row of one word is not scored,
  because nothing is left without the word. Words beyond the longest input move nothing.
- A new model is trained on the kept rows, as in P and C, with the undefended model's settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import POISONED_MODEL, SINGLE_TEXTS, Given
from btu.errors import UserError
from btu.findings import Suspects
from btu.foundation import Foundation, keep_rows
from btu.seeding import derive_seed
from btu.settings import check_count, check_fraction
from btu.stage_files import (
    model_of,
    read_table,
    texts_of,
    training_rows_of,
    victim_of,
    write_table,
)
from btu.stages import Stage, StageRun, stage
from btu.types import BoolArray, FloatArray, IntArray, Rows
from btu.victims import Victim, tokenizable

if TYPE_CHECKING:
    from btu.training import Encoded


SCORES = "words.parquet"
# Texts that are tokenized and predicted in one call.
BLOCK = 8192
# Words per row, for estimates of time.
WORDS = 20
# Number of words in the record, highest scores first.
NAMED = 10


@dataclass(frozen=True)
class KeywordIdentification:
    """Backdoor Keyword Identification.

    rows: number of training rows, at least 2, whose words are scored; they are drawn at random.
        Null scores all rows. A number at or above the row count does so too, under another stage
        key.
    top_words: number of a row's highest words that count as its keywords, at least 1.
    keywords: number of words taken to be the backdoor's keywords, at least 1; 1 in the paper.
    share: share of rows that may be poisoned, in (0, 1]. Words whose row share is closest to this
        value score highest. Null: weight by log10(count).
    """

    rows: int | None = 1000
    top_words: int = 5
    keywords: int = 1
    share: float | None = 0.1

    KIND: ClassVar[str] = "before training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, SINGLE_TEXTS)
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {"rows": None, "share": None},
    }

    def __post_init__(self) -> None:
        for name in ("top_words", "keywords"):
            check_count(f"defense.{name}", getattr(self, name))
        if self.rows is not None and self.rows < 2:
            raise UserError(
                f"defense.rows must be at least 2, or null for all, got {self.rows}: a word counts "
                "by the rows that contain it."
            )
        if self.share is not None:
            check_fraction("defense.share", self.share, open_low=True)

    def check(self, given: Given) -> None:
        """Raise a `UserError` if the share is less than two of the scored rows."""
        scored = min(self.rows or given.train_rows, given.train_rows)
        if self.share is not None and self.share * scored < 2:
            raise UserError(
                f"defense.share {self.share} of {scored} scored rows is below 2 rows: no word that "
                "several rows contain would have a score above 0; raise defense.rows or the share."
            )

    def stages(self, base: Foundation) -> Stage:
        """Declare the scoring of words, shared by all settings but `rows`, and the rest."""
        units = base.train_rows if self.rows is None else min(self.rows, base.train_rows)
        words = base.stage(
            score_words,
            "score words (bki)",
            {"rows": self.rows, "precision": base.train.precision},
            {"rows": base.rows, "model": base.model},
            units=units * WORDS,
        )
        found = base.stage(
            find_keywords,
            "find keywords (bki)",
            {"top_words": self.top_words, "keywords": self.keywords, "share": self.share},
            {"rows": base.rows, "words": words},
            kind="host",
        )
        return base.fine_tune("fine-tune (bki)", found)


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def score_words(run: StageRun) -> dict[str, Any]:
    """Measure how far the hidden state moves without each word of the drawn rows.

    Writes ``words.parquet``: ``row``, ``position`` (of the word in its row) and ``moved`` (the
    largest change of a unit), in the order of rows and words.
    """
    from btu.defenses.kit.representation import representations

    victim, model = victim_of(run), model_of(run, "model")
    texts = texts_of(run).texts
    limit = run.config["rows"]
    drawn = np.arange(len(texts))
    if limit is not None and limit < len(texts):
        rng = np.random.default_rng(derive_seed(run.config["seed"], "scored rows"))
        drawn = np.sort(rng.choice(len(texts), limit, replace=False))
    counts = [len(word_spans(texts[i])) for i in drawn]
    # A row of one word would be empty without it.
    counts = [count if count > 1 else 0 for count in counts]
    row = np.repeat(drawn, counts)
    position = np.concatenate([np.arange(count) for count in (*counts, 0)])
    # First the rows to compare with, then the shortened rows.
    whole, place = np.unique(row, return_inverse=True)
    moved = np.zeros(len(row))
    if len(row):
        with representations(model) as represent:

            def hidden(data: Encoded, of: tuple[int, int]) -> Any:
                return run.in_batches(
                    model,
                    data,
                    represent,
                    precision=run.config["precision"],
                    stage="score words",
                    of=of,
                )

            rows = encoded(victim, [texts[i] for i in whole])
            # Removing a word that was not read changes nothing.
            asked = np.flatnonzero(position < words_read(victim, texts, whole, rows)[place])
            starts = range(0, len(asked), BLOCK)
            before = hidden(rows, (0, len(starts) + 1))
            for number, start in enumerate(starts, 1):
                part = asked[start : start + BLOCK]
                without = one_word_less(texts, row[part], position[part])
                after = hidden(encoded(victim, without), (number, len(starts) + 1))
                moved[part] = np.abs(after - before[place[part]]).max(axis=1)
    write_table(run.folder / SCORES, {"row": row, "position": position, "moved": moved})
    return {"scored_rows": len(drawn), "scored_words": len(row)}


def encoded(victim: Victim, texts: Sequence[str]) -> Encoded:
    """Tokenize texts whose labels do not matter."""
    return victim.encode(Rows(tuple(texts), (0,) * len(texts)))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) of each word of a text, including the white space after it."""
    return [match.span() for match in re.finditer(r"\S+\s*", text)]


def one_word_less(texts: Sequence[str], row: IntArray, position: IntArray) -> list[str]:
    """Return, for each pair, the text of a row without its word at a position.

    row, position: (words,), sorted by row.
    """
    found: list[str] = []
    at, text, spans = -1, "", [(0, 0)]
    for i, place in zip(row.tolist(), position.tolist(), strict=True):
        if i != at:
            at, text, spans = i, texts[i], word_spans(texts[i])
        start, end = spans[place]
        found.append((text[:start] + text[end:]).rstrip())
    return found


def words_read(victim: Victim, texts: Sequence[str], whole: IntArray, rows: Encoded) -> IntArray:
    """Return how many leading words of each row a victim reads: (rows,).

    victim: tokenizes the texts.
    texts: the training texts.
    whole: (rows,) indices into `texts`.
    rows: the same texts, tokenized; those shorter than the longest input are read completely.
    """
    from btu.defenses.kit.language_model import words_of_tokens

    longest = victim.spec.max_length
    read = np.full(len(whole), np.iinfo(np.int64).max)
    # Slow tokenizers do not report which word a token belongs to.
    for number in np.flatnonzero(rows.host_lengths >= longest) if victim.tokenizer.is_fast else ():
        text = tokenizable(texts[whole[number]])
        offsets = victim.tokenizer(
            text, truncation=True, max_length=longest, return_offsets_mapping=True
        )["offset_mapping"]
        read[number] = words_of_tokens(text, offsets).max(initial=-1) + 1
    return read


@stage(version=1)
def find_keywords(run: StageRun) -> dict[str, Any]:
    """Score words over all rows, take the highest, and drop the rows with these keywords.

    Raises:
        UserError: nothing was scored, or every row is dropped.
    """
    config = run.config
    words = [text.split() for text in texts_of(run).texts]
    scored = run.facts("words")["scored_rows"]
    table = read_table(run.inputs["words"] / SCORES)
    row, position, moved = (table[name] for name in ("row", "position", "moved"))
    top = highest(row, moved, config["top_words"])
    keyed = [(int(i), words[i][p]) for i, p in zip(row[top], position[top], strict=True)]
    scores = score_of_words(keyed, moved[top], scored, config["share"])
    if not scores:
        raise UserError(
            "no training row has two words: bki has nothing to remove; use another defense."
        )
    ranked = sorted(scores, key=lambda word: (-scores[word][0], word))
    found = ranked[: config["keywords"]]
    if scored == len(words):
        taken = np.zeros(len(words), dtype=bool)
        taken[[i for i, word in keyed if word in found]] = True
    else:
        taken = np.array([not set(found).isdisjoint(held) for held in words])
    lowest = min(0.0, *(score for score, _ in scores.values()))
    rows = np.array(
        [
            max((scores[word][0] for word in held if word in scores), default=lowest)
            for held in words
        ]
    )
    suspects = Suspects(
        flagged=_tokens_of(run, victim_of(run), found),
        rows=rows,
        # A row is as suspicious as its highest word: at this bar or above it has a keyword.
        row_bar=scores[found[-1]][0],
        taken=taken,
    )
    keep_rows(run, ~taken)
    named = [[word, *scores[word]] for word in ranked[:NAMED]]
    return {**suspects.save(run.folder), "keywords": found, "words": named}


def highest(row: IntArray, values: FloatArray, count: int) -> IntArray:
    """Return the indices of each row's `count` highest values, in the order of the rows.

    row, values: (words,), sorted by row. The first of equal values wins.
    """
    order = np.lexsort((np.arange(len(row)), -values, row))
    _, starts, sizes = np.unique(row[order], return_index=True, return_counts=True)
    rank = np.arange(len(row)) - np.repeat(starts, sizes)
    kept: IntArray = order[rank < count]
    return kept


def score_of_words(
    keyed: list[tuple[int, str]], moved: FloatArray, rows: int, share: float | None
) -> dict[str, tuple[float, int]]:
    """Return each word's score over all rows, and n, the number of rows of which it is a keyword.

    The score is mean(moved) * log10(n) * log10(s / n) with s = (share * rows)^2, without the last
    factor if `share` is None.

    keyed: row and word of each keyword.
    moved: (keywords,) how far each moved its row.
    rows: number of scored rows.
    """
    total: dict[str, float] = {}
    times: dict[str, int] = {}
    holding: dict[str, set[int]] = {}
    for (row, word), value in zip(keyed, moved, strict=True):
        total[word] = total.get(word, 0.0) + float(value)
        times[word] = times.get(word, 0) + 1
        holding.setdefault(word, set()).add(row)
    found = {}
    for word, held in holding.items():
        n = len(held)
        weight = np.log10(n)
        if share is not None:
            weight *= np.log10((share * rows) ** 2 / n)
        found[word] = (float(total[word] / times[word] * weight), n)
    return found


def _tokens_of(run: StageRun, victim: Victim, words: list[str]) -> tuple[int, ...]:
    """Return the token ids of the words in the training rows, at a text's start or inside."""
    ids: dict[int, None] = {}
    for word in words:
        for text in map(tokenizable, (word, f" {word}")):
            ids |= dict.fromkeys(victim.tokenizer(text, add_special_tokens=False)["input_ids"])
    data = training_rows_of(run)
    occurs: BoolArray = data.counts(max([*ids, int(data.ids.max())]) + 1) > 0
    special = set(victim.tokenizer.all_special_ids)
    return tuple(i for i in ids if occurs[i] and i not in special)
