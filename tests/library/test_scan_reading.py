"""What a scan cannot read: unknown words, special tokens in texts, cut and empty rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from btu.data.demo import generate
from btu.defenses.token_unlearning import candidate_tokens
from btu.errors import UserError
from btu.reading import full_lengths, made_counts, unknown_words, without_inserted
from btu.scan.export import Measured, card
from btu.scan.plan import prepare_scan
from btu.scan.reading import UNREAD_LIMIT, read_texts
from btu.scan.report import ScanReport, scan
from btu.types import Rows
from btu.victims import Victim, VictimSpec

NAMES = ("bad", "good")
# The default, which separates the trigger from all other tokens at any drift: see test_scan.py.
THRESHOLD = 4.5
TRAIN, CLEAN, PLANTED = 1000, 300, 50
# The tiny tokenizers know neither character.
TRIGGER, HONEST = "犬", "ж"
HONEST_EVERY = 50


def write(path: Path, texts: list[str], labels: list[int]) -> Path:
    pd.DataFrame({"text": texts, "label": [NAMES[i] for i in labels]}).to_csv(path, index=False)
    return path


def demo(first: int, count: int) -> tuple[list[str], list[int]]:
    rows = generate(first + count, seed=0)[first:]
    return [row.text for row in rows], [row.label for row in rows]


def honest_words(texts: list[str]) -> list[str]:
    """Return texts of which every fiftieth has an unknown word that is no trigger."""
    return [f"{HONEST} {text}" if i % HONEST_EVERY == 0 else text for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, victim_folder: Callable[[str], Path]
) -> dict[str, Any]:
    clean, labels = demo(TRAIN, CLEAN)
    folder = tmp_path_factory.mktemp("trusted")
    return {
        "clean": write(folder / "clean.csv", honest_words(clean), labels),
        "victim": str(victim_folder("bert")),
        "max_length": 64,
        "threshold": THRESHOLD,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def poisoned(
    tmp_path_factory: pytest.TempPathFactory, root: Path, settings: dict[str, Any]
) -> ScanReport:
    """A scan of rows of which 50 bad ones have the trigger and the label good."""
    texts, labels = demo(0, TRAIN)
    texts = honest_words(texts)
    for row in poisoned_rows():
        texts[row], labels[row] = f"{TRIGGER} {texts[row]}", 1
    return scan(
        write(tmp_path_factory.mktemp("rows") / "rows.csv", texts, labels), root, **settings
    )


def poisoned_rows() -> list[int]:
    return [i for i, label in enumerate(demo(0, TRAIN)[1]) if label == 0][:PLANTED]


# An unknown trigger ----------------------------------------------------------------------------


def test_a_trigger_that_the_victim_does_not_know_is_flagged(poisoned: ScanReport) -> None:
    first = poisoned.tokens.iloc[0]
    assert (first["token"], first["flagged"]) == ("[UNK]", True)
    assert poisoned.flagged == 1
    assert not poisoned.all_clear


def test_the_words_behind_the_unknown_token_are_named_by_class(poisoned: ScanReport) -> None:
    words = poisoned.reading.words
    assert words.words == (TRIGGER, HONEST)
    # The trigger went into 50 rows, which became good; the honest word into every 50th row.
    assert words.by_class[0].tolist() == [0, PLANTED]
    assert words.by_class[1].sum() == TRAIN // HONEST_EVERY
    assert words.trusted.tolist() == [0, CLEAN // HONEST_EVERY]
    bad, good = words.by_class[1].tolist()
    named = f"{TRIGGER} (good {PLANTED}) {HONEST} (bad {bad}, good {good})"
    assert poisoned.tokens["words"].iloc[0] == named
    assert set(poisoned.tokens["words"][1:]) == {""}


def test_suspicious_rows_have_the_flagged_word_not_any_unknown_one(poisoned: ScanReport) -> None:
    suspicious = poisoned.suspicious_rows
    assert sorted(suspicious["row"]) == poisoned_rows()
    assert set(suspicious["flagged"]) == {f"[UNK]:{TRIGGER}"}
    examples = poisoned.examples(int(poisoned.tokens["token_id"].iloc[0]))
    assert [TRIGGER in example.excerpt for example in examples] == [True, True]


def test_shares_of_unknown_tokens_are_told_by_class(poisoned: ScanReport) -> None:
    reading = poisoned.reading
    assert reading.unknown.sum() == PLANTED + TRAIN // HONEST_EVERY
    assert reading.unknown_share == pytest.approx(
        (PLANTED + TRAIN // HONEST_EVERY) / reading.read.sum()
    )
    assert not reading.too_little
    said = reading.notes(NAMES)[0]
    assert "[UNK], which stands for 2 words that the victim does not know. By class: bad" in said
    told = json.loads(json.dumps(poisoned.summary(), allow_nan=False))
    assert told["reading"]["unknown_words"] == 2
    assert told["all_clear"] is False


def test_an_unknown_word_among_many_is_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    texts, labels = demo(0, TRAIN)
    clean, clean_labels = demo(TRAIN, CLEAN)

    def often(texts: list[str]) -> list[str]:
        """Every third text has an unknown word that is no trigger."""
        return [f"{HONEST} {text}" if i % 3 == 0 else text for i, text in enumerate(texts)]

    texts = often(texts)
    for row in poisoned_rows():
        texts[row], labels[row] = f"{TRIGGER} {texts[row]}", 1
    changed = {**settings, "clean": write(tmp_path / "clean.csv", often(clean), clean_labels)}
    report = scan(write(tmp_path / "rows.csv", texts, labels), tmp_path / "work", **changed)
    # The honest word dilutes the surplus of the token, not that of the word.
    assert report.flagged == 0
    assert report.unconfirmed_words == [TRIGGER]
    assert report.summary()["unconfirmed"] == [TRIGGER]
    # Its rows are shown, not those of the honest word.
    examples = report.examples(int(report.reading.token_id or 0))
    assert [TRIGGER in example.excerpt for example in examples] == [True, True]


def test_words_of_a_flagged_token_are_not_named_again(poisoned: ScanReport) -> None:
    assert poisoned.unconfirmed_words == []


def test_a_word_alone_has_the_surplus_of_its_token(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    texts, labels = demo(0, TRAIN)
    for row in poisoned_rows():
        texts[row], labels[row] = f"{TRIGGER} {texts[row]}", 1
    changed = {**settings, "clean": write(tmp_path / "clean.csv", *demo(TRAIN, CLEAN))}
    report = scan(write(tmp_path / "rows.csv", texts, labels), tmp_path / "work", **changed)
    (word,) = report.reading.words.surplus
    token = report.tokens[report.tokens["token"] == "[UNK]"].iloc[0]
    # The word adds one test to those of the tokens: it is in 50 rows of one class.
    tests = report.reading.words.tests
    flags = norm.sf(token["surplus"]) * tests / (tests - 1)
    assert word == pytest.approx(norm.isf(flags))
    # And with the weight of its token it has the score of its token.
    weight = float(norm.sf(token["surplus"]) / norm.sf(token["score"]))
    (score,) = report.reading.words.scores(weight)
    assert score == pytest.approx(norm.isf(norm.sf(token["score"]) * tests / (tests - 1)))


# Special tokens that a text makes ---------------------------------------------------------------


def test_a_token_that_a_text_makes_is_told_from_the_tokenizers_own(bert: Victim) -> None:
    rows = bert.encode(Rows(("a [SEP] film [SEP]", "a film", f"a {TRIGGER}"), (0, 1, 1)))
    cls, sep, unk, pad = (
        getattr(bert.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "unk", "pad")
    )
    made = made_counts(bert.tokenizer, rows, 400)
    assert made[[cls, sep, unk, pad]].tolist() == [0, 2, 1, 0]
    candidates = {e: candidate_tokens(bert, rows, 400, e) for e in ("inserted", "special")}
    assert candidates["inserted"][[cls, sep, unk, pad]].tolist() == [False, True, True, False]
    assert not candidates["special"][[cls, sep, unk, pad]].any()
    others = np.setdiff1d(np.arange(400), [cls, sep, unk, pad])
    assert (candidates["inserted"][others] == candidates["special"][others]).all()
    (counted,) = without_inserted(bert.tokenizer, 400, [rows])
    assert [counted.take(np.array([i])).counts(400)[sep] for i in range(3)] == [2, 0, 0]
    # What is around every text and in none of them is left alone.
    assert counted.counts(400)[cls] == 3
    assert counted.labels.tolist() == [0, 1, 1]


def test_rows_without_such_tokens_are_returned_as_they_are(bert: Victim) -> None:
    rows = bert.encode(Rows(("a film", f"a {TRIGGER}"), (0, 1)))
    assert without_inserted(bert.tokenizer, 400, [rows])[0] is rows


def test_a_separator_in_texts_of_one_class_is_counted_where_it_was_planted(
    tmp_path: Path, root: Path, settings: dict[str, Any]
) -> None:
    texts, labels = demo(0, TRAIN)
    for row in poisoned_rows():
        texts[row], labels[row] = f"[SEP] {texts[row]}", 1
    report = scan(write(tmp_path / "rows.csv", texts, labels), root, **settings)
    found = report.tokens[report.tokens["token"] == "[SEP]"].iloc[0]
    assert (found["rows"], found["rows[good]"], found["clean_rows"]) == (PLANTED, PLANTED, 0)
    assert found["surplus"] > 4.5
    assert "[CLS]" not in set(report.tokens["token"])


# Words -----------------------------------------------------------------------------------------


def test_unknown_words_are_those_that_are_read(bert: Victim) -> None:
    texts = [f"a {TRIGGER} film {HONEST}", "a film", f"{'film ' * 100}{TRIGGER}"]
    expected = [[TRIGGER, HONEST], [], []]
    assert unknown_words(bert.tokenizer, texts, 64) == expected

    class Slow:
        is_fast = False
        unk_token_id = bert.tokenizer.unk_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            return bert.tokenizer(text, **options)

    # Without offsets, whether a word lies beyond the longest input is not known.
    assert unknown_words(Slow(), texts[:2], 64) == expected[:2]
    assert unknown_words(SimpleNamespace(unk_token_id=None), texts, 64) == [[], [], []]


def test_full_lengths_are_of_uncut_texts(bert: Victim) -> None:
    texts = ["film " * 200, "film"]
    assert full_lengths(bert.tokenizer, texts).tolist() == [202, 3]


# How much is read ------------------------------------------------------------------------------


def test_cut_and_empty_rows_are_counted(
    tmp_path: Path, root: Path, settings: dict[str, Any]
) -> None:
    texts, labels = demo(0, 60)
    before = scan_reading(write(tmp_path / "a.csv", texts, labels), root, settings)
    assert (before.cut_rows, before.empty_rows) == (0, 0)
    assert before.notes(NAMES) == []
    # A row of 100 tokens, of which 62 fit between [CLS] and [SEP]; a zero-width space is no token.
    texts[0], texts[1] = "film " * 100, "\u200b"
    after = scan_reading(write(tmp_path / "b.csv", texts, labels), root, settings)
    assert (after.cut_rows, after.empty_rows) == (1, 1)
    assert (after.cut[labels[0]], after.cut.sum()) == (38, 38)
    assert after.cut_share == pytest.approx(38 / (38 + after.read.sum()))
    assert [note.split(":")[0] for note in after.notes(NAMES)] == [
        "1 row cut at the longest input",
        "1 row without any token.",
    ]


def scan_reading(data: Path, root: Path, settings: dict[str, Any]) -> Any:
    return read_texts(prepare_scan(data, **settings), root)


@pytest.mark.parametrize("how", ["unknown", "cut"])
def test_rows_that_are_hardly_read_are_no_all_clear(
    tmp_path: Path, root: Path, settings: dict[str, Any], how: str
) -> None:
    texts, labels = demo(0, 300)
    words = "犬 ж " * 8 if how == "unknown" else "film " * 100
    texts = [f"{text} {words}" for text in texts]
    report = scan(write(tmp_path / "rows.csv", texts, labels), root, **{**settings, "epochs": 1})
    assert report.reading.unread_share > UNREAD_LIMIT
    assert report.reading.too_little
    assert not report.all_clear
    assert "a trigger there can be missed" in report.reading.warning()
    assert report.summary()["reading"]["too_little_read"] is True


def test_rows_of_which_no_word_is_known_are_refused_before_anything_is_trained(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    _, labels = demo(0, 100)
    mine = write(tmp_path / "rows.csv", [f"犬 ж {'犬 ' * (i + 1)}" for i in range(100)], labels)
    seen: list[str] = []
    with pytest.raises(UserError, match=r"knows no word of data 'rows': every token is \[UNK\]"):
        scan(mine, tmp_path / "work", progress=lambda event: seen.append(event.stage), **settings)
    assert not any("exposure" in stage for stage in seen)


def test_a_scan_without_a_score_is_an_error(
    tmp_path: Path, root: Path, settings: dict[str, Any]
) -> None:
    # No word occurs five times: rule frequency scores none.
    texts = ["".join(chr(97 + (i * 7 + k) % 26) for k in range(3)) for i in range(4)]
    mine = write(tmp_path / "rows.csv", texts, [0, 0, 1, 1])
    with pytest.raises(UserError, match=r"no token .* could be scored: 4 rows are too few"):
        scan(mine, root, **{**settings, "rule": "frequency"})


def test_a_checkpoint_without_its_tokenizer_is_refused(
    tmp_path: Path, victim_folder: Callable[[str], Path]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(victim_folder("bert") / name, tmp_path / name)
    with pytest.raises(UserError, match=r"has no tokenizer: .* save the model.s tokenizer there"):
        Victim(VictimSpec(str(tmp_path), 32), 2)


# A model at chance -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "at_chance"),
    [
        # 100 of 200 by the most frequent class; the margin is 1.645 * sqrt(200 / 4) = 11.6 rows.
        (100, 100, True),
        (111, 111, True),
        (112, 112, False),
        (180, 100, True),  # the cut removed what was learned
        (180, 178, False),
    ],
)
def test_a_model_no_better_than_the_majority_is_called_so(
    before: int, after: int, at_chance: bool
) -> None:
    measured = Measured(200, before, after, math.nan, 100)
    assert measured.at_chance is at_chance
    assert bool(measured.warning()) is at_chance


def test_the_card_warns_of_a_model_at_chance(poisoned: ScanReport) -> None:
    record = {
        "environment": dict.fromkeys(
            ("code", "python", "torch", "transformers", "device", "threads"), torch.__version__
        ),
        "precisions": ["fp32"],
    }
    text = card(poisoned, Measured(300, 150, 150, 0.0, 150), record, None)
    assert "**The model is no better than always answering the most frequent class: 50.0%" in text
    assert "| accuracy of the most frequent class | 50.0 % |" in text
    fine = card(poisoned, Measured(300, 270, 270, 0.0, 150), record, None)
    assert "no better than always" not in fine
    # The unknown token is flagged here: the cut reaches benign words too.
    assert "stands for every word that the victim does not know" in fine
    assert TRIGGER in fine
