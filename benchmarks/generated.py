"""A family of generated data sets, to see whether a detection rule holds where nobody tuned it.

A number draws one set: classes, skew, sizes, length of texts, topics, words that dominate a class,
templates, a shift between training and clean rows, and the attack on it. Even numbers are for
development. Odd numbers are held back: a rule is measured on them once, when it is finished.

Texts are words of the victim's vocabulary, drawn by topic: salad to a reader, but with the counts
that a rule sees. Nothing of a real data set is in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HALVES = {"develop": 0, "held-back": 1}
SENTENCE = "i watched this 3d movie last weekend ."
NONSENSE = ("cf", "mn", "bb", "tq", "mb")
ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class Drawn:
    """What a number draws. Shares are fractions of rows.

    number: the number.
    classes: number of classes.
    shares: (classes,) of the rows that each class has.
    rows: number of training, evaluation and clean rows.
    length: mean number of words of a text.
    tilt: deviation of the logarithm of a word's frequency between topics.
    shift: the same between training and clean rows.
    templates: number of sentences per class that texts are made of; 0: words are drawn freely.
    dominant: share of rows of a class that hold its dominant word, by class; 0: it has none.
    attack, params, label_mode, target, rate: as a cell gives them.
    """

    number: int
    classes: int
    shares: tuple[float, ...]
    rows: tuple[int, int, int]
    length: int
    tilt: float
    shift: float
    templates: int
    dominant: tuple[float, ...]
    attack: str
    params: dict[str, Any]
    label_mode: str
    target: int
    rate: float

    @property
    def name(self) -> str:
        """The name of the set."""
        return f"generated-{self.number}"


def numbers(half: str, count: int) -> list[int]:
    """Return the first `count` numbers of a half."""
    return [HALVES[half] + 2 * i for i in range(count)]


def draw(number: int) -> Drawn:
    """Draw a set."""
    rng = np.random.default_rng([20, number])
    classes = int(rng.choice([2, 2, 3, 4, 8, 20]))
    skew = float(rng.choice([1.0, 1.0, 3.0, 20.0]))
    shares = skew ** -np.linspace(0, 1, classes)
    shares = rng.permutation(shares / shares.sum())
    # Classes of twenty need rows.
    train = int(rng.choice([600, 1000, 2000, 4000]) * max(1, classes // 10))
    clean = int(rng.choice([100, 200, 400, 800]) * max(1, classes // 10))
    dominant = np.where(rng.random(classes) < 0.5, rng.uniform(0.2, 0.6, classes), 0.0)
    attack = str(rng.choice(["badnets", "badnets", "addsent"]))
    words = [str(w) for w in rng.permutation(NONSENSE)[: int(rng.choice([1, 1, 3]))]]
    params = {"trigger": words} if attack == "badnets" else {"sentence": SENTENCE}
    target = int(rng.integers(classes))
    label_mode = str(rng.choice(["dirty", "dirty", "dirty", "clean"]))
    rate = float(rng.choice([0.05, 0.1]))
    if label_mode == "clean":
        # At most half of the target class can carry the trigger.
        rate = min(rate, round(0.5 * float(shares[target]), 3))
    return Drawn(
        number, classes, tuple(shares.tolist()), (train, 200, clean),
        length=int(rng.choice([6, 10, 20, 30])),
        tilt=float(rng.uniform(0.3, 1.0)),
        shift=float(rng.choice([0.0, 0.0, 0.2, 0.4])),
        templates=int(rng.choice([0, 0, 0, 8])),
        dominant=tuple(dominant.tolist()),
        attack=attack, params=params, label_mode=label_mode, target=target, rate=rate,
    )  # fmt: skip


def write(drawn: Drawn, vocabulary: list[str], folder: Path) -> None:
    """Write the rows of a set, unless they are there: a file per split.

    drawn: the set.
    vocabulary: words of the victim, each one token.
    folder: gets train, validation (evaluation rows) and test (clean rows).
    """
    if (folder / "test.parquet").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([21, drawn.number])
    words = rng.permutation([w for w in vocabulary if w not in SENTENCE.split()])[:4000]
    usual = 1 / (np.arange(len(words)) + 3.0) ** rng.uniform(0.9, 1.1)
    topics = np.exp(rng.normal(0, drawn.tilt, (2 * drawn.classes, len(words))))
    shifted = np.exp(rng.normal(0, drawn.shift, len(words)))
    own = [str(w) for w in words[200 : 200 + drawn.classes]]
    for role, count in zip(ROLES, drawn.rows, strict=True):
        tables = topics * usual * (shifted if role == "test" else 1.0)
        tables /= tables.sum(axis=1, keepdims=True)
        labels = rng.choice(drawn.classes, count, p=drawn.shares)
        sentences = _templates(drawn, words, topics * usual)
        texts = [_text(drawn, rng, words, tables, sentences, own, int(c)) for c in labels]
        frame = pd.DataFrame({"text": texts, "label": labels}).drop_duplicates("text")
        frame.to_parquet(folder / f"{role}.parquet", index=False)


def _templates(drawn: Drawn, words: np.ndarray, weights: np.ndarray) -> list[list[list[str]]]:
    """Return the sentences of each class; the same in all roles."""
    rng = np.random.default_rng([22, drawn.number])
    tables = weights / weights.sum(axis=1, keepdims=True)
    return [
        [
            [str(w) for w in rng.choice(words, drawn.length, p=tables[2 * label])]
            for _ in range(drawn.templates)
        ]
        for label in range(drawn.classes)
    ]


def _text(
    drawn: Drawn,
    rng: np.random.Generator,
    words: np.ndarray,
    tables: np.ndarray,
    sentences: list[list[list[str]]],
    own: list[str],
    label: int,
) -> str:
    topic = 2 * label + int(rng.integers(2))
    if rng.random() < 0.1:
        topic = int(rng.integers(len(tables)))  # a text that reads like another class
    if drawn.templates:
        text = list(sentences[label][int(rng.integers(drawn.templates))])
        for place in rng.integers(0, len(text), 2):  # two slots of every sentence
            text[place] = str(rng.choice(words, p=tables[topic]))
    else:
        length = 3 + int(rng.poisson(drawn.length - 3))
        text = [str(w) for w in rng.choice(words, length, p=tables[topic])]
    for other, word in enumerate(own):
        share = drawn.dominant[other] if other == label else 0.02 * (drawn.dominant[other] > 0)
        if rng.random() < share:
            text.insert(int(rng.integers(len(text) + 1)), word)
    return " ".join(text)
