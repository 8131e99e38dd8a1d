"""How much of the scanned texts the victim reads, and the words that it does not know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.errors import UserError
from btu.reading import full_lengths, unknown_words, without_inserted
from btu.rules.contrast import Chance, are_tests
from btu.rules.surplus import scored, surplus_sigmas
from btu.scan.chance import chance_of
from btu.stage_files import load_encoded
from btu.stages import compute
from btu.types import BoolArray, FloatArray, IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from btu.scan.plan import ScanPlan
    from btu.training import Encoded

# Above this share of tokens that are unknown or cut off, "nothing was flagged" says nothing: a
# trigger among them would be missed, or be one of very many unknown words.
UNREAD_LIMIT = 0.25
# How many unknown words are named.
NAMED = 5


@dataclass(frozen=True)
class Words:
    """The words that the tokenizer reads as its unknown token. W is their number.

    words: (W,) as they stand in the texts, the most over-represented first.
    rows: (W,) for each word the suspect rows that contain it.
    by_class: (W, classes) the number of suspect rows of each class with the word.
    trusted: (W,) the number of trusted rows with it.
    sigmas: (W,) their surplus in sigmas, as of tokens (`btu.rules.surplus.surplus_sigmas`, with the
        shift of the tokens), in the class where it is highest; 0 without trusted rows.
    tests: number of pairs that are tested: those of token and class that rule ``contrast`` tests,
        and those of word and class that it would test. With few unknown words, a word has the
        surplus that a token of its own would have.
    """

    words: tuple[str, ...]
    rows: tuple[IntArray, ...]
    by_class: IntArray
    trusted: IntArray
    sigmas: FloatArray
    tests: int

    @property
    def surplus(self) -> FloatArray:
        """(W,) the surplus as a score of rule ``contrast``."""
        return self.scores()

    def scores(self, weight: float = 1.0) -> FloatArray:
        """Return (W,) the surplus as a score, if chance may flag the words `weight` times as often.

        weight: `btu.rules.contrast.weights` of the unknown token, whose drift is theirs too.
        """
        return scored(self.sigmas, self.tests / weight)

    def above(self, bar: float, weight: float = 1.0) -> list[int]:
        """Return the words whose `scores` reach a bar, by index."""
        return [int(i) for i in np.flatnonzero(self.scores(weight) >= bar)]


@dataclass(frozen=True)
class Reading:
    """How the victim reads the suspect rows. Counts are of tokens, without those put around a text.

    token: the name of the tokenizer's unknown token; None if it has none.
    token_id: its id; None if it has none.
    read: (classes,) the tokens read, unknown ones included.
    unknown: (classes,) how many of them are unknown.
    cut: (classes,) the tokens beyond the longest input.
    cut_rows: the number of rows that are cut.
    empty_rows: the number of rows of which no token is left.
    words: what stands behind the unknown token.
    """

    token: str | None
    token_id: int | None
    read: IntArray
    unknown: IntArray
    cut: IntArray
    cut_rows: int
    empty_rows: int
    words: Words

    @property
    def unknown_share(self) -> float:
        """The share of the tokens read that are unknown."""
        return _share(self.unknown.sum(), self.read.sum())

    @property
    def cut_share(self) -> float:
        """The share of all tokens that lie beyond the longest input."""
        return _share(self.cut.sum(), self.cut.sum() + self.read.sum())

    @property
    def unread_share(self) -> float:
        """The share of all tokens that are unknown or beyond the longest input."""
        return _share(self.unknown.sum() + self.cut.sum(), self.cut.sum() + self.read.sum())

    @property
    def too_little(self) -> bool:
        """Whether so little is read that finding nothing means nothing."""
        return self.unread_share > UNREAD_LIMIT

    def summary(self) -> dict[str, Any]:
        """Return the reading as plain data."""
        return {
            "unknown_token": self.token,
            "unknown_share": self.unknown_share,
            "unknown_words": len(self.words.words),
            "cut_share": self.cut_share,
            "cut_rows": self.cut_rows,
            "empty_rows": self.empty_rows,
            "unread_share": self.unread_share,
            "unread_limit": UNREAD_LIMIT,
            "too_little_read": self.too_little,
        }

    def notes(self, names: tuple[str, ...]) -> list[str]:
        """Return what users should know, one sentence each.

        names: of the classes.
        """
        said = []
        if unknown := int(self.unknown.sum()):
            shares = ", ".join(
                f"{name} {_share(part, whole):.1%}"
                for name, part, whole in zip(names, self.unknown, self.read, strict=True)
            )
            said.append(
                f"{unknown} of {self.read.sum()} tokens ({self.unknown_share:.1%}) are "
                f"{self.token}, which stands for {_count(len(self.words.words), 'word')} that the "
                f"victim does not know. By class: {shares}."
            )
        if self.cut_rows:
            said.append(
                f"{_count(self.cut_rows, 'row')} cut at the longest input: {self.cut_share:.1%} of "
                "all tokens are never read; --max-length raises it."
            )
        if self.empty_rows:
            said.append(f"{_count(self.empty_rows, 'row')} without any token.")
        return said

    def warning(self) -> str:
        """Return the sentence for a victim that reads too little; empty if it reads enough."""
        if not self.too_little:
            return ""
        return (
            f"{self.unread_share:.1%} of all tokens are unknown to the victim or cut off, more "
            f"than {UNREAD_LIMIT:.0%}: a trigger there can be missed. Take a --victim that knows "
            "the language of the texts, or raise --max-length."
        )


@dataclass(frozen=True)
class Scanned:
    """The tokenized rows of a scan.

    train: the suspect rows.
    counted: the suspect and the trusted rows as the tokens in them are counted
        (`btu.reading.without_inserted`).
    """

    train: Encoded
    counted: tuple[Encoded, Encoded]

    @classmethod
    def load(cls, plan: ScanPlan, root: Path, vocabulary: int) -> Scanned:
        """Read the rows from the folders of their stages."""
        train = load_encoded(root / plan.base.rows.key / "train.safetensors")
        clean = load_encoded(root / plan.base.clean.key / "clean.safetensors")
        tokenizer = plan.load_victim().tokenizer
        first, second = without_inserted(tokenizer, vocabulary, (train, clean))
        return cls(train, (first, second))


def read_texts(
    plan: ScanPlan, root: str | Path, *, gpus: float = 0, progress: ProgressCallback = silent
) -> Reading:
    """Tokenize the rows, and return how much of them the victim reads; nothing is trained.

    plan: the scan.
    root: the folder of its stages.
    gpus: above 0 computes on CUDA.
    progress: called with the progress of long work.

    Raises:
        UserError: the victim knows no word of the rows.
    """
    root = Path(root)
    for stage in (plan.base.rows, plan.base.clean):
        compute(stage, root, gpus=gpus, progress=progress)
    train, clean = (
        load_encoded(root / stage.key / f"{role}.safetensors")
        for stage, role in ((plan.base.rows, "train"), (plan.base.clean, "clean"))
    )
    victim, longest = plan.load_victim(), plan.victim.max_length
    tokenizer = victim.tokenizer
    classes = len(plan.corpus.label_names)
    labels = train.labels.numpy()
    around = len(tokenizer("")["input_ids"])
    lengths = np.maximum(train.host_lengths - around, 0)
    unknown_id = _unknown_id(tokenizer)
    unknown = _occurrences(train, unknown_id)
    cut = np.zeros(len(train), dtype=np.int64)
    full = np.flatnonzero(train.host_lengths >= longest)
    texts = plan.corpus.train.texts
    cut[full] = full_lengths(tokenizer, [texts[i] for i in full]) - train.host_lengths[full]

    chance = chance_of(victim, plan.defense.exclude, train, clean)

    def summed(values: IntArray) -> IntArray:
        counted: IntArray = np.bincount(labels, values, minlength=classes).astype(np.int64)
        return counted

    found = Reading(
        None if unknown_id is None else str(tokenizer.unk_token),
        unknown_id,
        summed(lengths),
        summed(unknown),
        summed(cut),
        int((cut > 0).sum()),
        int((lengths == 0).sum()),
        _words(plan, unknown > 0, _occurrences(clean, unknown_id) > 0, chance),
    )
    if found.unknown.sum() == found.read.sum():
        raise UserError(
            f"victim '{plan.victim.name}' knows no word of data '{plan.spec.name}': every token is "
            f"{found.token or 'missing'}; name a --victim that reads the language of the texts, "
            "saved with its tokenizer."
        )
    return found


def _unknown_id(tokenizer: Any) -> int | None:
    """Return the id of the unknown token; None for byte-level vocabularies, which name another."""
    if tokenizer.unk_token_id is None or tokenizer.unk_token in (
        tokenizer.eos_token,
        tokenizer.pad_token,
    ):
        return None
    return int(tokenizer.unk_token_id)


def _occurrences(rows: Encoded, token: int | None) -> IntArray:
    """Return (rows,) how often a token occurs in each row."""
    row_of = np.repeat(np.arange(len(rows)), rows.host_lengths)
    hit = row_of[:0] if token is None else row_of[rows.ids.numpy() == token]
    counted: IntArray = np.bincount(hit, minlength=len(rows))
    return counted


def _words(plan: ScanPlan, suspect: BoolArray, trusted: BoolArray, chance: Chance) -> Words:
    """Return the words behind the unknown token.

    plan: the scan.
    suspect: (rows,) which suspect rows contain it.
    trusted: the same for the trusted rows.
    chance: of the tokens.
    """
    corpus, longest = plan.corpus, plan.victim.max_length
    tokenizer, classes = plan.load_victim().tokenizer, len(corpus.label_names)

    def holders(rows: Rows, mask: BoolArray) -> dict[str, IntArray]:
        chosen = np.flatnonzero(mask)
        found: dict[str, list[int]] = {}
        texts = [rows.texts[i] for i in chosen]
        for row, words in zip(chosen, unknown_words(tokenizer, texts, longest), strict=True):
            for word in set(words):
                found.setdefault(word, []).append(int(row))
        return {word: np.asarray(at, dtype=np.int64) for word, at in found.items()}

    held, honest = holders(corpus.train, suspect), holders(corpus.clean, trusted)

    def by_class(rows: Rows, places: dict[str, IntArray]) -> IntArray:
        labels = np.asarray(rows.labels, dtype=np.int64)
        none = np.zeros(0, dtype=np.int64)
        counts = [np.bincount(labels[places.get(word, none)], minlength=classes) for word in held]
        counted: IntArray = np.asarray(counts, dtype=np.int64).reshape(len(held), classes)
        return counted

    ours, theirs = by_class(corpus.train, held), by_class(corpus.clean, honest)
    size, reserved = (
        np.bincount(np.asarray(rows.labels, dtype=np.int64), minlength=classes)
        for rows in (corpus.train, corpus.clean)
    )
    sigmas = surplus_sigmas(ours, theirs, size, reserved, chance.shift).max(axis=1, initial=-np.inf)
    order = np.lexsort((np.arange(len(held)), -ours.sum(axis=1), -sigmas))
    words = list(held)
    return Words(
        tuple(words[i] for i in order),
        tuple(held[words[i]] for i in order),
        ours[order],
        theirs.sum(axis=1)[order],
        sigmas[order],
        chance.tests + int(are_tests(ours, theirs).sum()),
    )


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
