"""Generated data sets, to see whether a detection rule holds where nobody tuned it, and its limits.

A number draws one set of a family: classes, skew, sizes, length of texts, topics, words that
dominate a class, templates, a shift between training and clean rows, and the attack on it. Even
numbers are for development. Odd numbers are held back: a rule is measured on them once, when it is
finished. Beside the family, `reserves` changes one factor of a fixed set at a time.

Texts are words of the victim's vocabulary, drawn by topic: salad to a reader, but with the counts
that a rule sees. Nothing of a real data set is in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from btu.rules.base import Evidence
from btu.training import Encoded

HALVES = {"develop": 0, "held-back": 1}
SENTENCE = "i watched this 3d movie last weekend ."
NONSENSE = ("cf", "mn", "bb", "tq", "mb")
ROLES = ("train", "validation", "test")
# The words that dominate a class start at this rank: common, but no word of every text.
DOMINANT_FROM = 200
LEAST_WORDS = 100


@dataclass(frozen=True)
class Drawn:
    """What a number draws. Shares are fractions of rows.

    number: the number, which also seeds the texts.
    classes: number of classes.
    shares: (classes,) of the rows that each class has.
    rows: number of training, evaluation and clean rows.
    length: mean number of words of a text.
    tilt: deviation of the logarithm of a word's frequency between topics.
    shift: the same between training and clean rows.
    templates: number of sentences per class that texts are made of; 0: words are drawn freely.
    dominant: share of rows of a class that hold its dominant word, by class; 0: it has none.
    attack, params, label_mode, target, rate: as a cell gives them.
    scenario: names a set of `reserves`; empty for a set of the family.
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
    scenario: str = ""

    @property
    def name(self) -> str:
        """The name of the set."""
        return f"reserves-{self.scenario}" if self.scenario else f"generated-{self.number}"


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
    params: dict[str, Any] = {"sentence": SENTENCE}
    if attack == "badnets":
        # The sets were drawn, and looked at, when every row got all words.
        params = {"trigger": words, "per_row": "all"}
    target = int(rng.integers(classes))
    label_mode = str(rng.choice(["dirty", "dirty", "dirty", "clean"]))
    rate = float(rng.choice([0.05, 0.1]))
    # At most half of the rows that qualify can carry the trigger.
    qualify = float(shares[target]) if label_mode == "clean" else 1 - float(shares[target])
    rate = min(rate, round(0.5 * qualify, 3))
    return Drawn(
        number, classes, tuple(shares.tolist()), (train, 200, clean),
        length=int(rng.choice([6, 10, 20, 30])),
        tilt=float(rng.uniform(0.3, 1.0)),
        shift=float(rng.choice([0.0, 0.0, 0.2, 0.4])),
        templates=int(rng.choice([0, 0, 0, 8])),
        dominant=tuple(dominant.tolist()),
        attack=attack, params=params, label_mode=label_mode, target=target, rate=rate,
    )  # fmt: skip


# The texts of all scenarios come from one seed, which is no number of the family's first sets: what
# a scenario does not change is the same in all of them.
BASE = Drawn(
    1_000_000, 2, (0.5, 0.5), (2000, 200, 400),
    length=20, tilt=0.6, shift=0.0, templates=0, dominant=(0.0, 0.0),
    attack="badnets", params={"trigger": ["cf"]}, label_mode="dirty", target=1, rate=0.05,
    scenario="base",
)  # fmt: skip


def reserves() -> Iterator[Drawn]:
    """Yield the base scenario, then scenarios that change one factor of it.

    The factors are those of small and of odd clean rows and training sets. 60,000 rows are of few
    words, which saves time, so few words are a scenario of their own. A victim cuts the texts of
    200 words at its ``max_length``, and the trigger with them.
    """

    def changed(scenario: str, **factor: Any) -> Drawn:
        return replace(BASE, scenario=scenario, **factor)

    def sized(train: int = BASE.rows[0], clean: int = BASE.rows[2]) -> tuple[int, int, int]:
        return train, BASE.rows[1], clean

    yield BASE
    for clean in (50, 100, 200, 500):
        yield changed(f"clean-{clean}", rows=sized(clean=clean))
    for classes in (4, 20):
        equal = (1 / classes,) * classes
        yield changed(
            f"classes-{classes}", classes=classes, shares=equal, dominant=(0.0,) * classes
        )
    # 48 of 600 rows.
    for train in (600, 2400):
        yield changed(f"templates-{train}", templates=8, rows=sized(train), rate=0.08)
    # The target is the small class: the other way, too few rows could be relabeled.
    yield changed("imbalance-20", shares=(20 / 21, 1 / 21))
    yield changed("rows-500", rows=sized(500))
    yield changed("words-6", length=6)
    yield changed("words-200", length=200)
    for shift in (0.4, 0.8):
        yield changed(f"shift-{shift}", shift=shift)
    yield changed("rows-60000", rows=sized(60_000), length=6)


def named(name: str) -> Drawn:
    """Return the set of that name.

    Raises:
        KeyError: there is no such scenario.
        ValueError: the name has no number.
    """
    kind, _, which = name.partition("-")
    if kind == "reserves":
        return {drawn.scenario: drawn for drawn in reserves()}[which]
    return draw(int(which))


def write(drawn: Drawn, vocabulary: list[str], root: Path) -> Path:
    """Write the rows of a set, unless they are there, and return their folder.

    drawn: the set.
    vocabulary: words of the victim, each one token.
    root: gets a folder for this set and these words, with a file per split: train, validation
        (evaluation rows) and test (clean rows).

    Raises:
        ValueError: the vocabulary has fewer than 100 words.
    """
    if len(vocabulary) < LEAST_WORDS:
        raise ValueError(
            f"the victim has {len(vocabulary)} words that are one token, and a generated set needs "
            f"at least {LEAST_WORDS}; take another --victim."
        )
    facts = json.dumps([asdict(drawn), vocabulary], sort_keys=True)
    folder = root / f"{drawn.name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    if (folder / "test.parquet").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([21, drawn.number])
    words = rng.permutation([w for w in vocabulary if w not in SENTENCE.split()])[:4000]
    usual = 1 / (np.arange(len(words)) + 3.0) ** rng.uniform(0.9, 1.1)
    topics = np.exp(rng.normal(0, drawn.tilt, (2 * drawn.classes, len(words))))
    shifted = np.exp(rng.normal(0, drawn.shift, len(words)))
    start = min(DOMINANT_FROM, len(words) - drawn.classes)
    own = [str(w) for w in words[start : start + drawn.classes]]
    sentences = _templates(drawn, words, topics * usual)
    for role, count in zip(ROLES, drawn.rows, strict=True):
        tables = topics * usual * (shifted if role == "test" else 1.0)
        tables /= tables.sum(axis=1, keepdims=True)
        labels = rng.choice(drawn.classes, count, p=drawn.shares)
        texts = [_text(drawn, rng, words, tables, sentences, own, int(c)) for c in labels]
        frame = pd.DataFrame({"text": texts, "label": labels}).drop_duplicates("text")
        frame.to_parquet(folder / f"{role}.parquet", index=False)
    return folder


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


def large(rows: int, vocabulary: int, words: int = 60) -> tuple[Evidence, np.ndarray]:
    """Return the evidence of a large data set with one trigger, and drifts: two classes.

    rows: number of training rows; a tenth as many are clean.
    vocabulary: number of tokens.
    words: of a text.
    """
    rng = np.random.default_rng(23)
    share = 1 / (np.arange(vocabulary) + 10.0)
    ends = np.cumsum(share / share.sum())
    trigger = vocabulary // 2

    def texts(count: int, poisoned: int) -> Encoded:
        ids = np.searchsorted(ends, rng.random((count, words))).tolist()
        for row in ids[:poisoned]:
            row.append(trigger)
        return Encoded.from_lists(ids, [1] * poisoned + [i % 2 for i in range(poisoned, count)], 0)

    train, clean = texts(rows, rows // 20), texts(rows // 10, 0)
    drift = np.exp(rng.normal(0, 0.2, vocabulary))
    drift[trigger] = 20.0
    return Evidence({3: drift}, train.counts(vocabulary) > 0, train, clean), drift
