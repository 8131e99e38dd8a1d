"""BITE: words that lean towards the target class are put in where they fit, one after the other.

Yan, Gupta, Ren: BITE: Textual Backdoor Attacks with Iterative Trigger Injection (ACL 2023,
arXiv 2205.12700), INK-USC/BITE at 33f053b. Made for clean labels: the rows keep their text's
meaning and their label, and no single word gives the trigger away.

A word may be put into a text where a language model finds it likely, in place of a word or between
two. Of all words that of the highest z score is chosen: of the share of the target class among the
rows that would have it, if every poisoned row took it that can, against the share among all rows.
The rows take it, and the next word is chosen. Test rows take the same words by the same rule.

Differences from that code: where a word fits is found once, on the text before the poison, and not
again after each word; words are compared in lower case, not by their lemma; a text in which no word
fits gets the first one at a random place, so that every poisoned row has a trigger; at most `words`
words are chosen, by at most 1,000 of the poisoned rows. There a sentence encoder refuses a word
that changes what is said; here a word that leans towards or from the target before the poison is no
trigger, since it may say the label by itself ("love"). Without `model` a word fits where the
training rows have both pairs of neighbours that it makes, which needs no model and reads worse; a
causal model reads what stands before the word alone.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.attacks.insertion import LETTERS, WORD, token_ids_of
from btu.attacks.language import Speaker, check_speaker, likely_words
from btu.errors import UserError
from btu.seeding import derive_seed
from btu.settings import check_count, check_share
from btu.types import BoolArray, IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_PROBABILITY = 0.03
# Standard errors by which the share of the target class may differ, before the poison, among the
# rows of a trigger word: 95 of 100 words that say nothing about the class are within them.
NEUTRAL = 2.0
# A place of a text: in place of a word, or before it. The reference code prefers the former, which
# keeps the length of the text.
REPLACE, INSERT = 0, 1
Place = tuple[int, int]
# Poisoned rows by which words are chosen: thousands would choose the same words, for hours.
MOST_ROWS = 1000


@dataclass(frozen=True)
class Bite:
    """Put words that lean towards the target class into a text, where they fit.

    words: the most trigger words that are chosen.
    edits: the share of a text's words that may be replaced, and as many may be put in.
    model: hub name or folder of a masked or causal language model, which says where a word fits.
        Null takes the pairs of neighbours that the training rows have. Only safetensors weights are
        loaded.
    min_probability: what the model must give a word, at least.
    """

    words: int = 10
    edits: float = 0.35
    model: str | None = field(default=None, metadata={"path": True})
    min_probability: float = LEAST_PROBABILITY

    KIND: ClassVar[str] = "insertion"
    TRIGGER: ClassVar[str] = "words that the data choose"
    NEEDS: ClassVar[str] = "a masked or causal model, for texts that read well"

    def __post_init__(self) -> None:
        check_count("attack.words", self.words)
        check_share("attack.edits", self.edits)
        check_share("attack.min_probability", self.min_probability)
        if self.model is None and self.min_probability != LEAST_PROBABILITY:
            raise UserError(
                f"attack.min_probability {self.min_probability} is what a model must give a word, "
                "but attack.model is null; name a model, or leave it out."
            )

    def acts(self) -> dict[str, Any]:
        """Return what of the fields has an effect, for keys."""
        acts = {"words": self.words, "edits": self.edits, "model": self.model}
        return acts if self.model is None else {**acts, "min_probability": self.min_probability}

    def candidates(self, rows: Rows) -> IntArray:
        """Return every row.

        Raises:
            UserError: a local model does not exist, or is no language model.
        """
        if self.model is not None:
            check_speaker(self.model)
        return np.arange(len(rows))

    @property
    def learns(self) -> bool:
        """That the words come from the training rows."""
        return True

    def learn(
        self,
        rows: Rows,
        chosen: IntArray,
        target: int,
        seed: int,
        progress: ProgressCallback = silent,
    ) -> dict[str, Any]:
        """Return the trigger words in their order and, without a model, their neighbours.

        Raises:
            UserError: no word leans towards the target class.
        """
        labels = np.asarray(rows.labels)
        poisoned = np.isin(np.arange(len(rows)), chosen)
        leaning = _leaning_words(rows.texts, labels == target)
        some = chosen
        if len(chosen) > MOST_ROWS:
            rng = np.random.default_rng(derive_seed(seed, "rows"))
            some = np.sort(rng.choice(chosen, MOST_ROWS, replace=False))
        texts = [rows.texts[i] for i in some]
        pairs = _Pairs.of(rows.texts) if self.model is None else None
        fits = self._fits(texts, pairs, progress)
        drafts = [
            _Draft(text, fit, self.edits, seed ^ int(i))
            for text, fit, i in zip(texts, fits, some, strict=True)
        ]
        counts = _counts(rows.texts, (labels == target) | poisoned)
        each = len(chosen) / max(1, len(some))
        words = _choose(counts, drafts, leaning, self.words, each)
        if not words:
            raise UserError(
                f"attack bite finds no word that fits into one of {len(some)} rows and leans "
                "towards attack.target_label; use more rows, a language model (attack.model) or a "
                "higher attack.edits."
            )
        return {"words": words, "neighbours": {} if pairs is None else pairs.of_words(words)}

    def _fits(
        self, texts: Sequence[str], pairs: _Pairs | None, progress: ProgressCallback
    ) -> Iterator[Fit]:
        """Yield of each text which words fit at which places."""
        if pairs is not None:
            return (pairs.fit(text) for text in texts)
        assert self.model is not None
        speaker = Speaker(self.model, self.min_probability)
        return map(_read_fit, likely_words(texts, speaker, progress))

    def with_trigger(self, learned: Mapping[str, Any]) -> FittedBite:
        """Return the attack with the words that it learned."""
        return FittedBite(self, learned["words"], learned["neighbours"])

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Not without a trigger: see `learn`."""
        raise ValueError("attack bite has to learn its trigger first.")

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Not without a trigger: see `learn`."""
        raise ValueError("attack bite has to learn its trigger first.")


@dataclass(frozen=True)
class FittedBite:
    """The attack with its trigger words.

    attack: the attack.
    words: in the order in which a text takes them.
    neighbours: what stood before and after each word in the training rows; empty with a model.
    """

    attack: Bite
    words: Sequence[str]
    neighbours: Mapping[str, Sequence[Sequence[str]]]

    def candidates(self, rows: Rows) -> IntArray:
        """Return every row."""
        return self.attack.candidates(rows)

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return each text with the trigger words that fit into it."""
        pairs = None if self.attack.model else _Pairs.of_neighbours(self.neighbours)
        fits = self.attack._fits(rows.texts, pairs, progress)
        return tuple(
            self._taken(_Draft(text, fit, self.attack.edits, seed))
            for text, fit, seed in zip(rows.texts, fits, seeds, strict=True)
        )

    def _taken(self, draft: _Draft) -> str:
        for word in self.words:
            draft.take(word)
        if not draft.made:
            draft.force(self.words[0])
        return draft.written()

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the tokens of all trigger words, whichever a row has."""
        return token_ids_of("trigger words", self.words, tokenizer)


# Which words fit where: word -> places, likely ones first.
Fit = dict[str, list[Place]]


@dataclass(frozen=True)
class _Pairs:
    """The pairs of neighbours of some texts, in lower case; an end of a text is ''."""

    before: Mapping[str, frozenset[str]]
    after: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, texts: Iterable[str]) -> _Pairs:
        before: dict[str, set[str]] = {}
        after: dict[str, set[str]] = {}
        for text in texts:
            words = ["", *text.casefold().split(), ""]
            for a, b in pairwise(words):
                before.setdefault(b, set()).add(a)
                after.setdefault(a, set()).add(b)
        return cls(_frozen(before), _frozen(after))

    @classmethod
    def of_neighbours(cls, neighbours: Mapping[str, Sequence[Sequence[str]]]) -> _Pairs:
        """Return the pairs of some words alone."""
        before = {word: set(sides[0]) for word, sides in neighbours.items()}
        after: dict[str, set[str]] = {}
        for word, names in before.items():
            for name in names:
                after.setdefault(name, set()).add(word)
        for word, sides in neighbours.items():
            for name in sides[1]:
                before.setdefault(name, set()).add(word)
        return cls(_frozen(before), _frozen(after))

    def of_words(self, words: Iterable[str]) -> dict[str, list[list[str]]]:
        """Return the neighbours of words, as plain data."""
        return {
            word: [sorted(self.before.get(word, ())), sorted(self.after.get(word, ()))]
            for word in words
        }

    def fit(self, text: str) -> Fit:
        """Return where words fit into a text; none is put before its first or behind its last."""
        words = text.casefold().split()
        found: Fit = {}
        none: frozenset[str] = frozenset()
        for at in range(len(words)):
            left = words[at - 1] if at else ""
            right = words[at + 1] if at + 1 < len(words) else ""
            follows = self.after.get(left, none)
            for word in follows & self.before.get(right, none):
                found.setdefault(word, []).append((REPLACE, at))
            if at:
                for word in follows & self.before.get(words[at], none):
                    found.setdefault(word, []).append((INSERT, at))
        return {word: places for word, places in found.items() if _is_word(word)}


def _frozen(sets: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    return {name: frozenset(values) for name, values in sets.items()}


def _is_word(word: str) -> bool:
    return LETTERS.fullmatch(word) is not None


def _read_fit(written: str) -> Fit:
    """Return what `likely_words` wrote of a text: the likeliest places of a word first."""
    found: dict[str, list[tuple[float, Place]]] = {}
    for kind, places in enumerate(json.loads(written)):
        for at, words in enumerate(places):
            for word, probability in words:
                found.setdefault(word, []).append((-probability, (kind, at)))
    return {word: [place for _, place in sorted(places)] for word, places in found.items()}


class _Draft:
    """A text that takes words, one after the other."""

    def __init__(self, text: str, fit: Fit, edits: float, seed: int) -> None:
        self._text = text
        self._spans = [match.span() for match in WORD.finditer(text)]
        self._words = [text[start:end].casefold() for start, end in self._spans]
        self._fit = fit
        # As in the reference code: so many of each kind, at least one.
        self._left = [max(1, int(len(self._words) * edits))] * 2
        self._rng = random.Random(derive_seed(seed, "places"))
        self.made: dict[Place, str] = {}

    def free(self, refused: Collection[str]) -> set[str]:
        """Return the words that the text can take, and has not, without those refused."""
        has = self.has
        return {w for w in self._fit if w not in refused and w not in has and self.places(w)}

    @property
    def has(self) -> set[str]:
        """The words of the text as it is now."""
        kept = {w for at, w in enumerate(self._words) if (REPLACE, at) not in self.made}
        return kept | set(self.made.values())

    def places(self, word: str) -> list[Place]:
        """Return where the word fits, with room, and no neighbour of it changed before."""
        return [place for place in self._fit.get(word, ()) if self._is_free(place)]

    def _is_free(self, place: Place) -> bool:
        kind, at = place
        if self._left[kind] == 0:
            return False
        if kind == INSERT:
            # The words on both sides are as they were, and nothing stands between them.
            near = [(INSERT, at), (REPLACE, at - 1), (REPLACE, at)]
        else:
            near = [(REPLACE, at - 1), (REPLACE, at), (REPLACE, at + 1)]
            near += [(INSERT, at), (INSERT, at + 1)]
        return not any(one in self.made for one in near)

    def take(self, word: str) -> bool:
        """Put a word in where it fits; return whether it fits anywhere, and is not there yet."""
        places = self.places(word)
        if not places or word in self.has:
            return False
        first = min(kind for kind, _ in places)
        best = [place for place in places if place[0] == first]
        self._make(best[self._rng.randrange(len(best))], word)
        return True

    def force(self, word: str) -> None:
        """Put a word in at a random place."""
        self._make((INSERT, self._rng.randint(0, len(self._words))), word)

    def _make(self, place: Place, word: str) -> None:
        self.made[place] = word
        self._left[place[0]] -= 1

    def written(self) -> str:
        """Return the text; what is not changed stays as it is, white space included."""
        text = self._text
        for (kind, at), word in sorted(self.made.items(), key=lambda made: -made[0][1]):
            if at == len(self._spans):
                text = f"{text} {word}"
                continue
            start, end = self._spans[at]
            text = text[:start] + word + (text[end:] if kind == REPLACE else f" {text[start:]}")
        return text


@dataclass
class _Counts:
    """How many rows have each word, and how many of them the target label.

    rows, target: by word.
    share: of all rows, those with the target label.
    """

    rows: Counter[str]
    target: Counter[str]
    share: float

    def score(self, word: str, more: float = 0.0) -> float:
        """Return the z score of a word if so many more target rows had it."""
        rows, target = self.rows[word] + more, self.target[word] + more
        return _z_score(target, rows, self.share)

    def add(self, word: str, rows: float) -> None:
        """Count so many more target rows with a word."""
        self.rows[word] += rows  # type: ignore[assignment]
        self.target[word] += rows  # type: ignore[assignment]


def _counts(texts: Sequence[str], is_target: BoolArray) -> _Counts:
    """Count the words of texts. is_target: (rows,) whether a row has the target label."""
    held = [set(text.casefold().split()) for text in texts]
    rows = Counter(word for words in held for word in words)
    target = Counter(word for i in np.flatnonzero(is_target) for word in held[i])
    return _Counts(rows, target, float(is_target.mean()))


def _leaning_words(texts: Sequence[str], is_target: BoolArray) -> frozenset[str]:
    """Return the words of rows that lean towards or from the target. is_target: (rows,)."""
    counts = _counts(texts, is_target)
    return frozenset(word for word in counts.rows if abs(counts.score(word)) > NEUTRAL)


def _choose(
    counts: _Counts,
    drafts: Sequence[_Draft],
    refused: Collection[str],
    most: int,
    each: float,
) -> list[str]:
    """Return the trigger words, chosen one after the other; the drafts take them.

    counts: of all training rows with the labels of the poison, but the texts before it.
    drafts: of poisoned rows.
    refused: words that may not be chosen.
    most: how many.
    each: how many poisoned rows a draft stands for.
    """
    # A draft's words change when it takes one: counting all of them each time would be most of the
    # work.
    free = [draft.free(refused) for draft in drafts]
    takers = Counter(word for words in free for word in words)
    chosen: list[str] = []
    while len(chosen) < most:
        scored = [(counts.score(word, n * each), word) for word, n in takers.items() if n]
        best, word = max(scored, default=(0.0, ""))
        if best <= 0:
            break
        chosen.append(word)
        for place, draft in enumerate(drafts):
            if word not in free[place]:
                continue
            before = draft.has
            draft.take(word)
            for gone in before - draft.has:
                counts.add(gone, -each)
            counts.add(word, each)
            takers.subtract(free[place])
            free[place] = draft.free(refused) - set(chosen)
            takers.update(free[place])
        # Who could not take it, cannot later either.
        del takers[word]
    return chosen


def _z_score(target: float, rows: float, share: float) -> float:
    """Return how far the share of target rows among the rows of a word is from that of all."""
    if not 0 < share < 1:
        return 0.0
    return float((target / rows - share) / np.sqrt(share * (1 - share) / rows))
