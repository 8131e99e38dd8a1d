"""The generated data sets of the benchmarks: what a number draws, and that the rows are so."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORDS = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou", "dklmnprst", "aeiou")]
ROLES = ("train", "validation", "test")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("generated")
    del sys.modules["generated"]


def written(generated: ModuleType, drawn: Any, root: Path) -> dict[str, pd.DataFrame]:
    """Write a set; return its rows by role."""
    folder = generated.write(drawn, WORDS, root)
    return {role: pd.read_parquet(folder / f"{role}.parquet") for role in ROLES}


# The family --------------------------------------------------------------------------------------


def test_a_number_draws_one_set(generated: ModuleType) -> None:
    sets = {number: generated.draw(number) for number in range(0, 60, 2)}
    assert all(generated.draw(number) == drawn for number, drawn in sets.items())
    assert all(generated.named(drawn.name) == drawn for drawn in sets.values())
    names = {drawn.name for drawn in sets.values()}
    assert len(names) == len(sets)
    drawn_as = {tuple(str(getattr(d, f.name)) for f in fields(d)[1:]) for d in sets.values()}
    assert len(drawn_as) == len(sets)


def test_the_halves_have_no_set_in_common(generated: ModuleType) -> None:
    develop, held = generated.numbers("develop", 50), generated.numbers("held-back", 50)
    assert develop == list(range(0, 100, 2))
    assert held == list(range(1, 100, 2))
    # More sets leave the first ones as they are.
    assert generated.numbers("develop", 20) == develop[:20]


def test_every_set_can_be_made_and_poisoned(generated: ModuleType) -> None:
    for number in generated.numbers("develop", 200):
        drawn = generated.draw(number)
        assert sum(drawn.shares) == pytest.approx(1.0), number
        assert len(drawn.shares) == len(drawn.dominant) == drawn.classes >= 2
        assert 0 <= drawn.target < drawn.classes
        share = drawn.shares[drawn.target]
        # Half of the target's rows or of the others, rounded to a tenth of a percent.
        most = (share if drawn.label_mode == "clean" else 1 - share) / 2 + 5e-4
        assert 0 < drawn.rate <= most, number


# Rows --------------------------------------------------------------------------------------------


def test_a_set_written_twice_is_the_same(generated: ModuleType, tmp_path: Path) -> None:
    drawn = generated.draw(26)
    first, second = (generated.write(drawn, WORDS, tmp_path / name) for name in "ab")
    assert first.name == second.name
    for role in ROLES:
        file = f"{role}.parquet"
        assert (first / file).read_bytes() == (second / file).read_bytes(), role
    # What is there is not written again, and other words are another set.
    (second / "train.parquet").write_bytes(b"kept")
    assert generated.write(drawn, WORDS, tmp_path / "b") == second
    assert (second / "train.parquet").read_bytes() == b"kept"
    assert generated.write(drawn, WORDS[:2000], tmp_path / "b") != second


def test_a_set_has_the_rows_classes_and_lengths_that_were_drawn(
    generated: ModuleType, tmp_path: Path
) -> None:
    drawn = generated.draw(4)  # three classes, 20 : 1, ten words, no templates
    frames = written(generated, drawn, tmp_path)
    assert tuple(len(frames[role]) for role in ROLES) == drawn.rows
    shares = np.bincount(frames["train"].label) / drawn.rows[0]
    spread = 4 * np.sqrt(np.array(drawn.shares) / drawn.rows[0])
    assert (np.abs(shares - np.array(drawn.shares)) < spread).all()
    # At least 3 words, and the mean is that of 3 + Poisson(7) and the dominant words.
    lengths = np.array([len(text.split()) for text in frames["train"].text])
    assert lengths.min() >= 3
    assert drawn.length < lengths.mean() < drawn.length + 0.5


@pytest.mark.parametrize("number", [18, 32])
def test_a_dominant_word_stands_in_its_share_of_its_class_and_in_few_other_rows(
    generated: ModuleType, tmp_path: Path, number: int
) -> None:
    drawn = generated.draw(number)
    rows = written(generated, drawn, tmp_path)["train"]
    held = [Counter[str]() for _ in range(drawn.classes)]
    for text, label in zip(rows.text, rows.label, strict=True):
        held[label].update(set(text.split()))
    sizes = np.bincount(rows.label, minlength=drawn.classes)
    assert any(drawn.dominant)
    for label, share in enumerate(drawn.dominant):
        others = [k for k in range(drawn.classes) if k != label]

        def share_of(word: str, label: int) -> float:
            return held[label][word] / int(sizes[label])

        # The commonest of the words that are rare in every other class.
        found = max(
            (word for word in held[label] if all(share_of(word, k) < 0.06 for k in others)),
            key=lambda word: share_of(word, label),
        )
        if share:
            # Four standard deviations, and the rows that have the word by chance.
            spread = 4 * np.sqrt(share * (1 - share) / sizes[label]) + 0.02
            assert share_of(found, label) == pytest.approx(share, abs=spread), label
        else:
            assert share_of(found, label) < 0.15, label


def test_templates_are_the_same_in_all_roles(generated: ModuleType, tmp_path: Path) -> None:
    drawn = generated.named("reserves-templates-600")  # 20 words, no dominant word
    frames = written(generated, drawn, tmp_path)

    def differ(one: list[str], other: list[str]) -> int:
        return sum(a != b for a, b in zip(one, other, strict=True))

    # Two words of each text are drawn: texts of one template differ in at most four places.
    groups: dict[int, list[list[str]]] = {label: [] for label in range(drawn.classes)}
    for text, label in zip(frames["train"].text, frames["train"].label, strict=True):
        words = text.split()
        if all(differ(words, first) > 4 for first in groups[label]):
            groups[label].append(words)
    assert [len(group) for group in groups.values()] == [8] * drawn.classes
    for role in ("validation", "test"):
        for text, label in zip(frames[role].text, frames[role].label, strict=True):
            assert min(differ(text.split(), first) for first in groups[label]) <= 4, role
    # Other templates have few places in common.
    assert min(differ(a, b) for a in groups[0] for b in groups[1]) > 4


def test_few_words_are_refused_and_enough_leave_a_dominant_word_to_each_class(
    generated: ModuleType, tmp_path: Path
) -> None:
    drawn = generated.draw(34)  # eight classes, four of them with a dominant word
    with pytest.raises(ValueError, match=r"has 99 words .* at least 100; take another --victim"):
        generated.write(drawn, WORDS[:99], tmp_path)
    folder = generated.write(drawn, WORDS[:100], tmp_path)
    rows = pd.read_parquet(folder / "train.parquet")
    label = int(np.argmax(drawn.dominant))
    counts = Counter(
        word for text in rows.text[rows.label == label] for word in set(text.split())
    )  # fmt: skip
    assert counts.most_common(1)[0][1] > 0.3 * (rows.label == label).sum()


# Scenarios ---------------------------------------------------------------------------------------


def test_every_scenario_changes_what_its_name_says(generated: ModuleType) -> None:
    base, *others = generated.reserves()
    assert base.scenario == "base"
    assert all(generated.named(drawn.name) == drawn for drawn in (base, *others))
    may_change = {
        "clean": {"rows"},
        "classes": {"classes", "shares", "dominant"},
        # 48 of 600 rows are 8 %.
        "templates": {"templates", "rows", "rate"},
        "imbalance": {"shares"},
        "rows": {"rows", "length"},
        "words": {"length"},
        "shift": {"shift"},
    }
    seen = set()
    for drawn in others:
        factor, _, value = drawn.scenario.partition("-")
        seen.add(factor)
        changed = {f.name for f in fields(base) if getattr(drawn, f.name) != getattr(base, f.name)}
        assert changed - {"scenario"} <= may_change[factor], drawn.scenario
        assert sum(drawn.shares) == pytest.approx(1.0)
        given = {
            "clean": drawn.rows[2], "classes": drawn.classes, "templates": drawn.rows[0],
            "imbalance": round(max(drawn.shares) / min(drawn.shares)), "rows": drawn.rows[0],
            "words": drawn.length, "shift": drawn.shift,
        }[factor]  # fmt: skip
        assert given == float(value), drawn.scenario
    assert seen == set(may_change)
    templates = generated.named("reserves-templates-600")
    assert round(templates.rate * templates.rows[0]) == 48


def test_scenarios_of_clean_rows_have_the_training_rows_of_the_base(
    generated: ModuleType, tmp_path: Path
) -> None:
    """They share the exposure, which reads no clean row."""
    base = written(generated, generated.BASE, tmp_path)
    far = dict[str, float]()
    for name in ("clean-50", "clean-500", "shift-0.4", "shift-0.8"):
        frames = written(generated, generated.named(f"reserves-{name}"), tmp_path)
        pd.testing.assert_frame_equal(frames["train"], base["train"])
        pd.testing.assert_frame_equal(frames["validation"], base["validation"])
        far[name] = distance(frames["train"], frames["test"])
    # The same sizes: a larger shift moves the clean rows further from the training rows.
    assert distance(base["train"], base["test"]) < far["shift-0.4"] < far["shift-0.8"]


def distance(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """Return half of the sum of the differences between the words' frequencies."""
    counts = [pd.Series(" ".join(rows.text).split()).value_counts() for rows in (one, other)]
    shares = pd.concat([count / count.sum() for count in counts], axis=1).fillna(0.0)
    return float((shares.iloc[:, 0] - shares.iloc[:, 1]).abs().sum() / 2)
