"""BKI: cases made by hand, and what it does on a strongly poisoned toy set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_cells import Lab, easy_corpus, own_stages

from btu.attacked import mask_of
from btu.defenses import bki
from btu.defenses.base import Given
from btu.defenses.bki import (
    SCORES,
    KeywordIdentification,
    encoded,
    highest,
    one_word_less,
    score_of_words,
    word_spans,
    words_read,
)
from btu.errors import UserError
from btu.findings import Suspects
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stage_files import read_rows
from btu.stages import Stage, StageRun, compute, read_record
from btu.types import Corpus, Rows
from btu.victims import Victim

# As in the contract of all defenses: the victim then obeys the trigger.
LONG = TrainSettings(epochs=12, learning_rate=1e-2, batch_size=32, precision="fp32")
POISONED = 72  # 0.3 of 240 rows


@pytest.fixture(scope="module")
def poisoned(lab: Lab, tiny_corpus: Corpus) -> Prepared:
    return lab.prepare(corpus=easy_corpus(tiny_corpus), rate=0.3, train=LONG)


def own(defense: KeywordIdentification, prepared: Prepared) -> dict[str, Stage]:
    return {stage.name: stage for stage in own_stages(defense, prepared)}


def found_by(lab: Lab, prepared: Prepared, **settings: Any) -> tuple[dict[str, Any], Suspects]:
    """Compute what a defense drops, without the training on the rest."""
    stages = own(KeywordIdentification(**settings), prepared)
    (folder,) = lab.compute(stages["find keywords (bki)"])
    facts = read_record(folder)["facts"]
    found = Suspects.load(folder, facts)
    assert found is not None
    return facts, found


def texts(lab: Lab, prepared: Prepared) -> tuple[str, ...]:
    rows = lab.root / prepared.foundation.rows.key / "train.parquet"
    return read_rows(rows).texts


def test_each_word_is_left_out_once() -> None:
    texts = ["a  fine film", " ", "so bad"]
    assert [len(word_spans(text)) for text in texts] == [3, 0, 2]
    row, position = np.array([0, 0, 0, 2, 2]), np.array([0, 1, 2, 0, 1])
    assert one_word_less(texts, row, position) == ["fine film", "a  film", "a  fine", "bad", "so"]


def test_words_count_as_read_up_to_the_longest_input(victim: Victim) -> None:
    # 64 tokens, of which the special ones around a text are none of its words.
    read = victim.spec.max_length - len(victim.tokenizer("")["input_ids"])
    held = ["film", " ".join("a" * 100), "a film"]
    whole = np.array([1, 2])
    rows = encoded(victim, [held[i] for i in whole])
    assert words_read(victim, held, whole, rows)[0] == read
    # A row that is not cut is read to its end.
    assert words_read(victim, held, whole, rows)[1] >= 2
    # Without a word behind that, the victim reads what it read.
    without = encoded(victim, one_word_less(held, np.array([1, 1]), np.array([read, read - 1])))
    assert torch.equal(without.take(np.array([0])).ids, rows.take(np.array([0])).ids)


def test_only_words_that_are_read_are_taken_out(
    lab: Lab, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 62 tokens of a text are read, and no word has less than one.
    train = tiny_corpus.train.take(range(40))
    long = Rows((" ".join(train.texts), *train.texts[1:]), train.labels)
    prepared = lab.prepare(corpus=dataclasses.replace(tiny_corpus, train=long), rate=0.0)
    stage = own(KeywordIdentification(rows=None, share=None), prepared)["score words (bki)"]
    lab.compute(*stage.inputs.values())
    asked: list[int] = []
    real = StageRun.in_batches

    def spy(run: StageRun, model: Any, data: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(data))
        return real(run, model, data, *rest, **options)

    monkeypatch.setattr(StageRun, "in_batches", spy)
    monkeypatch.setattr(bki, "BLOCK", 100)
    table = pq.read_table(compute(stage, lab.root_with(tmp_path, *stage.inputs.values())) / SCORES)
    row, position, moved = (table[name].to_numpy() for name in ("row", "position", "moved"))
    words = [len(text.split()) for text in texts(lab, prepared)]
    assert np.bincount(row).tolist() == words
    first = row == 0
    assert words[0] > 300
    read = int(position[first & (moved > 0)].max()) + 1
    assert 20 < read <= 62
    assert (moved[first][:read] > 0).all()
    assert not moved[first][read:].any()
    # The rows, then their shortened texts, a hundred at a time.
    assert asked[0] == 40
    assert sum(asked[1:]) == (moved > 0).sum() < len(moved)
    assert max(asked[1:]) == 100


def test_a_keyword_with_a_lone_surrogate_has_tokens_like_any_other(
    lab: Lab, poisoned: Prepared, bert: Victim
) -> None:
    base = poisoned.foundation
    lab.compute(base.rows)
    run = StageRun({}, {}, {"rows": lab.root / base.rows.key}, lab.root, torch.device("cpu"))
    # The tiny BERT drops the character that replaces the surrogate.
    held = bki._tokens_of(run, bert, ["cf\ud800"])
    assert held == tuple(bert.tokenizer("cf", add_special_tokens=False)["input_ids"])


def test_the_highest_words_of_each_row_are_taken() -> None:
    row, moved = np.array([0, 0, 0, 2, 2]), np.array([1.0, 3.0, 3.0, 0.5, 0.7])
    # Row 0: its second and third word, the first of equal ones first; row 2: both of its two.
    assert highest(row, moved, 2).tolist() == [1, 2, 4, 3]
    assert highest(row, moved, 1).tolist() == [1, 4]


def test_a_word_is_scored_by_movement_and_by_the_rows_that_have_it() -> None:
    keyed = [(0, "cf"), (1, "cf"), (1, "film"), (2, "cf"), (2, "cf")]
    moved = np.array([4.0, 2.0, 9.0, 1.0, 1.0])
    scores = score_of_words(keyed, moved, 100, 0.1)
    # "cf": mean 2, in n = 3 rows, s = (0.1 * 100)^2 = 100; "film": log10(1) = 0.
    assert scores["cf"] == (pytest.approx(2 * math.log10(3) * math.log10(100 / 3)), 3)
    assert scores["film"] == (0.0, 1)
    # Without a share the second factor is 1.
    assert score_of_words(keyed, moved, 100, None)["cf"][0] == pytest.approx(2 * math.log10(3))


def test_the_weight_is_highest_where_as_many_rows_have_the_word_as_may_be_poisoned() -> None:
    def weight(n: int) -> float:
        keyed = [(row, "w") for row in range(n)]
        return score_of_words(keyed, np.ones(n), 1000, 0.1)["w"][0]

    # 0.1 of 1,000 rows is 100.
    assert weight(50) < weight(100) > weight(200)


@pytest.mark.parametrize("rows", [None, 120])
def test_bki_drops_the_rows_with_the_trigger_and_trains_without_them(
    lab: Lab, bert: Victim, poisoned: Prepared, rows: int | None
) -> None:
    facts, found = found_by(lab, poisoned, rows=rows, share=0.3)
    assert facts["keywords"] == ["cf"]
    assert found.flagged == tuple(bert.tokenizer("cf", add_special_tokens=False)["input_ids"])
    mask = mask_of(lab.root / poisoned.poisoned.key)
    held = np.array(["cf" in text.split() for text in texts(lab, poisoned)])
    assert held.sum() == mask.sum() == POISONED
    assert found.taken is not None
    assert found.rows is not None
    if rows is None:
        # Rows in which it is one of the five words that move them most.
        assert (found.taken & mask).sum() > POISONED / 2
        assert not (found.taken & ~mask).any()
    else:
        assert np.array_equal(found.taken, held)
    # The bar is the keyword's score: rows that contain it reach it, and no others.
    assert np.array_equal(found.rows >= found.row_bar, held)
    defense = KeywordIdentification(rows=rows, share=0.3)
    record = read_record(compute(defense.stages(poisoned.foundation), lab.root))
    assert {epoch["rows"] for epoch in record["history"]} == {240 - int(found.taken.sum())}
    assert record["facts"]["flagged"] == list(found.flagged)


def test_as_many_rows_are_scored_as_were_asked_for(lab: Lab, poisoned: Prepared) -> None:
    stages = own(KeywordIdentification(rows=50), poisoned)
    folder = lab.compute(stages["score words (bki)"])[0]
    table = pq.read_table(folder / SCORES)
    rows = table["row"].to_numpy()
    assert len(set(rows.tolist())) == read_record(folder)["facts"]["scored_rows"] == 50
    words = {i: len(text.split()) for i, text in enumerate(texts(lab, poisoned))}
    # Every word of every row that was drawn, in order.
    expected = [(i, p) for i in sorted(set(rows.tolist())) for p in range(words[i])]
    assert list(zip(rows, table["position"].to_numpy(), strict=True)) == expected
    assert (table["moved"].to_numpy() > 0).all()


def test_another_seed_draws_other_rows(lab: Lab, poisoned: Prepared) -> None:
    drawn = []
    for seed in (0, 1):
        # The same poisoned model for both: only the seed of the defense differs.
        stage = own(KeywordIdentification(rows=30), poisoned)["score words (bki)"]
        config = {**stage.config, "seed": seed}
        other = dataclasses.replace(stage, config=config)
        (folder,) = lab.compute(other)
        drawn.append(set(pq.read_table(folder / SCORES)["row"].to_pylist()))
    assert drawn[0] != drawn[1]


def test_settings_share_the_scores_of_the_words(poisoned: Prepared) -> None:
    one = own(KeywordIdentification(), poisoned)
    other = own(KeywordIdentification(keywords=2, top_words=3, share=0.2), poisoned)
    assert one["score words (bki)"].key == other["score words (bki)"].key
    assert one["find keywords (bki)"].key != other["find keywords (bki)"].key
    more = own(KeywordIdentification(rows=None), poisoned)
    assert more["score words (bki)"].key != one["score words (bki)"].key


def test_more_keywords_drop_more_rows(lab: Lab, poisoned: Prepared) -> None:
    one, two = (found_by(lab, poisoned, rows=120, share=0.3, keywords=n) for n in (1, 2))
    assert [len(facts["keywords"]) for facts, _ in (one, two)] == [1, 2]
    assert two[0]["keywords"][0] == one[0]["keywords"][0]
    dropped = [found.taken.sum() for _, found in (one, two) if found.taken is not None]
    assert dropped[0] < dropped[1]


def test_rows_without_two_words_leave_nothing_to_score(lab: Lab, tiny_corpus: Corpus) -> None:
    train = Rows(("film", "bad") * 20, (1, 0) * 20)
    corpus = dataclasses.replace(tiny_corpus, train=train)
    prepared = lab.prepare(corpus=corpus, rate=0.0)
    with pytest.raises(UserError, match="no training row has two words"):
        lab.compute(KeywordIdentification(rows=None, share=None).stages(prepared.foundation))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 1}, "defense.rows must be at least 2, or null for all, got 1"),
        ({"top_words": 0}, "defense.top_words must be at least 1, got 0"),
        ({"keywords": 0}, "defense.keywords must be at least 1, got 0"),
        ({"share": 0}, r"defense.share must be in \(0, 1\], got 0"),
        ({"share": 1.5}, r"defense.share must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KeywordIdentification(**settings)


def test_a_share_of_less_than_two_rows_is_refused_while_planning() -> None:
    cell = Given(None, classes=2, train_rows=150, clean_rows=0)
    with pytest.raises(UserError, match=r"share 0.01 of 150 scored rows is below 2 rows"):
        KeywordIdentification(share=0.01).check(cell)
    KeywordIdentification(share=0.02).check(cell)
    KeywordIdentification(share=None).check(cell)
