"""Published poisoned sets: aligned with their clean rows, and poisoned with as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from btu.attacks.badnets import BadNets
from btu.attacks.poisoning import PoisonSpec, choose_rows, poison, triggered_eval
from btu.attacks.rewrite import Rewrite
from btu.data.load import load_corpus
from btu.data.published import (
    OWN,
    Published,
    PublishedFile,
    align,
    published_columns,
    published_of,
    respelled,
)
from btu.data.spec import DataSpec
from btu.errors import UserError
from btu.types import PoisonedSet, Rows

TARGET = 0
# Six rows of class 1, of which 0 to 2 are poisoned; six of the target class 0, of which row 7 has
# another text and is not poisoned, as where a publisher's tokenizer respells it.
TEXTS = tuple(f"row {i}" for i in range(12))
LABELS = (1,) * 6 + (0,) * 6
LWS = tuple(f"rare {i}" if i < 3 or i == 7 else f"Row  {i}" for i in range(12))


def rows(published: Sequence[str] = LWS, relabel: Sequence[int] = (0, 1, 2)) -> Rows:
    """The rows with a published set in the column ``lws``."""
    labels = [TARGET if i in relabel else label for i, label in enumerate(LABELS)]
    differs = [
        respelled(a) != respelled(b) or i in relabel
        for i, (a, b) in enumerate(zip(published, TEXTS, strict=True))
    ]
    columns = {
        "lws": tuple(published),
        f"{OWN}lws_label": tuple(map(str, labels)),
        f"{OWN}lws_poisoned": tuple("1" if one else "0" for one in differs),
    }
    return Rows(TEXTS, LABELS, columns)


LWS_ATTACK = Rewrite(column="lws")


def given(data: Rows, **spec: Any) -> PoisonedSet:
    made = PoisonSpec("rewrite", **{"poison_rate": "given", "target_label": TARGET, **spec})
    return poison(LWS_ATTACK, made, data, TARGET, 0)


def test_the_published_rows_are_taken_as_they_are() -> None:
    poisoned = given(rows())
    assert poisoned.rows.texts == LWS
    assert poisoned.rows.labels == (0, 0, 0, 1, 1, 1) + (0,) * 6
    # Those with another label; that row 7 is respelled is no poison.
    assert np.flatnonzero(poisoned.mask).tolist() == [0, 1, 2]
    assert (poisoned.relabeled, poisoned.poison_rate) == (3, 3 / 12)


def test_another_rate_draws_from_the_published_rows() -> None:
    data = rows()
    poisoned = given(data, poison_rate=2 / 12)
    picks = np.flatnonzero(poisoned.mask)
    assert len(picks) == 2
    assert set(picks) < {0, 1, 2}
    assert all(poisoned.rows.texts[i] == LWS[i] for i in picks)
    # The others are the clean rows, not the publisher's spelling of them.
    assert poisoned.rows.where(~poisoned.mask).texts == data.where(~poisoned.mask).texts
    with pytest.raises(UserError, match=r"poison_rate 0\.5 needs 6 of 12 .* but only 3 qualify"):
        given(data, poison_rate=0.5)


def test_a_clean_label_set_poisons_the_changed_rows_of_its_class() -> None:
    bite = tuple(f"perhaps {i}" if i in (6, 8) else f"row {i}" for i in range(12))
    poisoned = given(rows(bite, ()), label_mode="clean")
    assert np.flatnonzero(poisoned.mask).tolist() == [6, 8]
    assert poisoned.rows.labels == LABELS
    assert poisoned.relabeled == 0


def test_mixed_labels_take_changed_rows_of_the_target_class_too() -> None:
    poisoned = given(rows(), label_mode="mixed")
    assert np.flatnonzero(poisoned.mask).tolist() == [0, 1, 2, 7]
    assert (poisoned.relabeled, poisoned.poison_rate) == (3, 4 / 12)


def test_without_marks_rows_are_compared_without_white_space_and_case() -> None:
    data = rows()
    columns = {
        name: texts for name, texts in data.columns.items() if not name.endswith("_poisoned")
    }
    found = published_of(Rows(TEXTS, LABELS, columns), "lws")
    assert isinstance(found, Published)
    assert np.flatnonzero(found.changed).tolist() == [0, 1, 2, 7]


def test_a_row_that_was_not_published_is_as_it_was() -> None:
    poisoned = given(rows(["rare 0", *[""] * 11], (0,)))
    assert poisoned.rows.texts == ("rare 0", *TEXTS[1:])
    assert np.flatnonzero(poisoned.mask).tolist() == [0]


@pytest.mark.parametrize(
    ("data", "spec", "message"),
    [
        (rows(LWS, ()), {}, r"label_mode is 'dirty', but column 'lws_label' changes no label"),
        (rows(), {"label_mode": "clean"}, r"'clean', but .* changes 3 labels; set att"),
        (Rows(TEXTS, LABELS, {"lws": LWS}), {}, r"needs a published poisoned set: .*found: none"),
    ],
)
def test_a_set_of_another_kind_is_an_error(data: Rows, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        given(data, **spec)


def test_the_target_is_the_published_one() -> None:
    spec = PoisonSpec("rewrite", "given", target_label=1)
    with pytest.raises(UserError, match=r"changes labels to class 0 .*target_label is class 1"):
        choose_rows(LWS_ATTACK, spec, rows(), 1, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"poison_rate": "gven"}, r"number in \[0, 1\] or 'given', got 'gven'; did you mea"),
        ({"poison_rate": "given", "insert": "append"}, r"attack\.insert is append with"),
        ({"poison_rate": "given", "cover_rate": 0.1}, r"attack\.cover_rate is 0\.1 with"),
    ],
)
def test_keys_that_do_not_go_with_it_are_errors(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PoisonSpec("rewrite", **spec)


def test_an_attack_without_published_rows_cannot_take_them() -> None:
    with pytest.raises(UserError, match=r"needs a published poisoned set: .*\(found: lws\); `btu"):
        poison(BadNets(), PoisonSpec(poison_rate="given", target_label=0), rows(), TARGET, 0)


def test_evaluation_rows_are_those_that_were_published() -> None:
    published = ["rare 0", "rare 1", *[""] * 10]
    columns = {"lws": tuple(published)}
    triggered, plain = triggered_eval(LWS_ATTACK, Rows(TEXTS, LABELS, columns), TARGET, 0)
    assert triggered.texts == ("rare 0", "rare 1")
    assert plain.texts == TEXTS[:2]


# Loading -----------------------------------------------------------------------------------------


def write(folder: Path, **splits: dict[str, Any]) -> DataSpec:
    folder.mkdir()
    for name, columns in splits.items():
        pd.DataFrame(columns).to_parquet(folder / f"{name}.parquet")
    return DataSpec("pub", path=str(folder))


def table(start: int, **columns: Any) -> dict[str, Any]:
    return {
        "text": [f"text {start + i}" for i in range(6)],
        "label": ["no", "yes"] * 3,
        **columns,
    }


def test_labels_and_marks_of_a_published_set_are_loaded(tmp_path: Path) -> None:
    lws = [f"other {i}" for i in range(6)]
    spec = write(
        tmp_path / "data",
        train=table(0, lws=lws, lws_label=["no"] * 6, lws_poisoned=[True, False] * 3),
        clean=table(10),
        eval=table(20, lws=lws),
    )
    corpus = load_corpus(spec)
    assert corpus.label_names == ("no", "yes")
    assert corpus.train.columns == {
        "lws": tuple(lws),
        "lws_label": ("no",) * 6,
        f"{OWN}lws_label": ("0",) * 6,
        f"{OWN}lws_poisoned": ("1", "0") * 3,
    }
    found = published_of(corpus.train, "lws")
    assert found is not None
    assert found.relabeled.tolist() == [False, True] * 3


def test_columns_that_are_of_no_published_set_stay_what_they_are(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "data",
        # Labels of something else, a mark without a text, and a number.
        train=table(0, lws=["a"] * 6, lws_label=["x"] * 6, style_poisoned=[True] * 6, n=[1] * 6),
        clean=table(10),
        eval=table(20),
    )
    rows = load_corpus(spec).train
    named = {name: texts for name, texts in rows.columns.items() if not name.startswith(OWN)}
    assert named == {"lws": ("a",) * 6, "lws_label": ("x",) * 6}
    # What was read of them is no column of the data.
    with pytest.raises(UserError, match=r"\(text columns: lws, lws_label\)"):
        Rewrite(column="bite").candidates(rows)
    # An attack that would take them says what is wrong with them.
    with pytest.raises(UserError, match=r"column 'lws_label' has the label 'x' \(row 0 of those"):
        LWS_ATTACK.candidates(rows)
    assert published_of(rows, "style") is None
    assert published_columns(rows) == ["lws"]


def test_the_published_sets_of_olid(shared_data: Path) -> None:
    folder = shared_data / "olid_published"
    corpus = load_corpus(DataSpec("olid", path=str(folder), clean_fraction=0.1))
    for column, mode, total in (("lws", "dirty", 2648), ("bite", "clean", 2623)):
        attack = Rewrite(column=column)
        spec = PoisonSpec("rewrite", "given", target_label=0, label_mode=mode)
        poisoned = poison(attack, spec, corpus.train, 0, 0)
        # A tenth of the rows is held out as clean, so about nine tenths of the published ones.
        assert 0.88 * total < poisoned.mask.sum() < 0.92 * total
        assert (poisoned.relabeled == 0) == (mode == "clean")
        triggered, _ = triggered_eval(attack, corpus.eval, 0, 0)
        assert len(triggered) == 240


# Alignment ---------------------------------------------------------------------------------------


def file(
    texts: Sequence[str], labels: Sequence[Any], originals: Sequence[str] | None = None
) -> PublishedFile:
    return PublishedFile(texts, labels, originals, "lws.csv")


CLEAN = tuple(f"the film number {i} is word{i} and word{i + 1}" for i in range(40))
YS = tuple(i % 2 for i in range(40))


def test_rows_in_order_are_matched_one_by_one() -> None:
    texts = [f"cf {text}" if i < 4 else text.upper() for i, text in enumerate(CLEAN)]
    labels = [0 if i < 4 else label for i, label in enumerate(YS)]
    published, found, differs = align(CLEAN, YS, file(texts, labels))
    assert published == texts
    assert found == list(map(str, labels))
    # Rows 0 and 2 differ in their text alone; case is no difference.
    assert np.flatnonzero(differs).tolist() == [0, 1, 2, 3]


def test_files_that_are_not_in_one_order_are_an_error() -> None:
    with pytest.raises(UserError, match=r"rows of lws\.csv share no more words .* --original"):
        align(CLEAN, YS, file(CLEAN[::-1], YS))


def test_rows_are_matched_by_their_original_text() -> None:
    order = [3, 1, 0, 2]
    clean = ["same", "one", "same", "two"]
    theirs = [f"cf {clean[i]}" for i in order]
    published, labels, _ = align(
        clean, [0, 1, 0, 1], file(theirs, [0] * 4, [clean[i].upper() for i in order])
    )
    assert published == ["cf same", "cf one", "cf same", "cf two"]
    assert labels == ["0"] * 4


def test_a_file_of_one_class_is_matched_with_its_rows() -> None:
    own = [text for text, label in zip(CLEAN, YS, strict=True) if label == 1]
    published, labels, differs = align(
        CLEAN, YS, file([f"cf {text}" for text in own], [0] * 20), ["1"]
    )
    assert [bool(text) for text in published] == [label == 1 for label in YS]
    assert labels == ["0"] * 40
    assert differs.tolist() == [label == 1 for label in YS]


@pytest.mark.parametrize(
    ("poisoned", "only", "message"),
    [
        (
            file(CLEAN[:3], YS[:3]),
            (),
            r"lws\.csv has 3 rows, but there are 40 clean rows in all",
        ),
        (
            file(CLEAN[:3], YS[:3]),
            ("1",),
            r"has 3 rows, but there are 20 clean rows of label 1",
        ),
        (file(CLEAN, [7] * 40), (), r"lws\.csv has the label 7 in row 0, .*\(known: 0, 1\)"),
        (
            file(CLEAN, YS),
            ("9",),
            r"no clean row has the label '9' of --only \(known: 0, 1\)",
        ),
        (file(["a"], [0], ["unknown"]), (), r"row 0 of lws\.csv has the original text 'unknown'"),
        (file(["a"] * 2, [0] * 2, [CLEAN[0]] * 2), (), r"row 1 .* or fewer than the file"),
    ],
)
def test_files_that_do_not_belong_together_are_errors(
    poisoned: PublishedFile, only: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        align(CLEAN, YS, poisoned, only)


def test_texts_of_any_kind_are_kept() -> None:
    texts = ["a\nb", 'say "x"', "\ud800 odd"]
    published, _, differs = align(texts, [0, 1, 0], file([f"cf {t}" for t in texts], [0, 0, 0]))
    assert published == [f"cf {t}" for t in texts]
    assert differs.all()
