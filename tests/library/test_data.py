"""Loading: every source, the three roles, and every way the data can be wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from btu.data.load import load_corpus
from btu.data.spec import DATASETS, DEMO_ROWS, HELD_OUT, DataSpec
from btu.data.suspects import load_suspects
from btu.errors import UserError
from btu.types import Corpus, Rows

WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    "parquet": lambda frame, path: frame.to_parquet(path),
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    # TSV has no quoting: a quote is a character, and a text cannot contain a tab.
    "tsv": lambda frame, path: frame.replace("\t", " ", regex=True).to_csv(
        path, index=False, sep="\t", quoting=csv.QUOTE_NONE
    ),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
}


def table(count: int, labels: tuple[object, ...] = (0, 1), word: str = "row") -> pd.DataFrame:
    """`count` distinct texts whose labels go round."""
    return pd.DataFrame(
        {
            "text": [f"{word} number {i}" for i in range(count)],
            "label": [labels[i % len(labels)] for i in range(count)],
        }
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A function that writes one Parquet file per keyword and returns the folder."""

    def build(**splits: pd.DataFrame) -> str:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, frame in splits.items():
            frame.to_parquet(folder / f"{name}.parquet")
        return str(folder)

    return build


def load(path: str | Path, **settings: Any) -> Corpus:
    return load_corpus(DataSpec(name="mine", path=str(path), **settings))


def sizes(corpus: Corpus) -> tuple[int, int, int]:
    return len(corpus.train), len(corpus.clean), len(corpus.eval)


# The demo --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Corpus:
    return load_corpus(DataSpec())


def test_the_demo_has_three_roles_and_both_paraphrases(demo: Corpus) -> None:
    dropped = sum(n for name, n in demo.notes.items() if name.startswith("dropped_"))
    assert sum(sizes(demo)) == sum(DEMO_ROWS.values()) - dropped
    assert dropped <= 0.01 * sum(DEMO_ROWS.values())
    assert len(demo.eval) == DEMO_ROWS["eval"]  # the reported role keeps all its rows
    assert demo.label_names == ("negative", "positive")
    for rows in (demo.train, demo.clean, demo.eval):
        assert set(rows.columns) == {"syntactic", "style"}
        assert all(text.strip() for column in rows.columns.values() for text in column)


def test_the_demo_is_the_same_every_time(demo: Corpus) -> None:
    assert load_corpus(DataSpec()).fingerprint() == demo.fingerprint()


def test_target_labels_by_value_and_by_index(demo: Corpus) -> None:
    assert demo.label_index("positive") == 1
    # A number can only mean a position where the labels are words ...
    assert demo.label_index(1) == 1
    # ... and never where they are numbers themselves.
    numbered = Corpus("x", demo.train, demo.clean, demo.eval, ("-1", "3"))
    assert numbered.label_index(3) == 1
    assert numbered.label_index("-1") == 0
    with pytest.raises(UserError, match=r"unknown target_label '1'.*known: -1, 3"):
        numbered.label_index(1)


def test_a_target_label_that_is_no_label_is_an_error(demo: Corpus) -> None:
    with pytest.raises(
        UserError, match=r"unknown target_label 'positiv'; did you mean 'positive'\? \(known: neg"
    ):
        demo.label_index("positiv")
    with pytest.raises(UserError, match=r"unknown target_label '2'"):
        demo.label_index(2)
    with pytest.raises(UserError, match=r"unknown target_label '-1'"):
        demo.label_index(-1)


# Local files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [(3, 7), ("neg", "pos")], ids=["int", "str"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_round_trips_with_its_own_columns(
    tmp_path: Path, suffix: str, labels: tuple[object, ...]
) -> None:
    gap = " " if suffix == "tsv" else "\t"
    texts = [f'tabs{gap}and "quotes", row {i} ü' for i in range(4)]
    for split, word in (("train", "a"), ("validation", "b"), ("test", "c")):
        frame = pd.DataFrame(
            {
                "body": [f"{word} {text}" for text in texts],
                "klass": [labels[1], labels[0], labels[1], labels[0]],
                "bible": [f"lo , {i}" for i in range(4)],
                "stars": [1, 2, 3, 4],
            }
        )
        WRITERS[suffix](frame, tmp_path / f"{split}.{suffix}")
    corpus = load(tmp_path, text_column="body", label_column="klass")
    # Original values in sorted order: 3 -> 0, 7 -> 1; neg -> 0, pos -> 1.
    assert corpus.label_names == tuple(map(str, labels))
    assert corpus.train == Rows(
        tuple(f"a {text}" for text in texts),
        (1, 0, 1, 0),
        {"bible": ("lo , 0", "lo , 1", "lo , 2", "lo , 3")},  # a number column is not a paraphrase
    )
    assert corpus.eval.texts[0] == f"b {texts[0]}"
    assert corpus.clean.texts[0] == f"c {texts[0]}"
    assert corpus.notes == {}


def test_texts_that_look_like_missing_values_are_texts(tmp_path: Path) -> None:
    frame = table(20)
    frame.loc[0, "text"] = "NA"
    frame.loc[1, "text"] = "null"
    frame.to_csv(tmp_path / "train.csv", index=False)
    corpus = load(tmp_path)
    everything = corpus.train.texts + corpus.clean.texts + corpus.eval.texts
    assert {"NA", "null"} <= set(everything)
    assert len(everything) == 20


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([True, False], id="bool"),
        pytest.param([1.0, 0.0], id="whole floats"),
        pytest.param(pd.Categorical([1, 0]), id="categorical"),
    ],
)
def test_label_columns_of_other_types_are_read(
    write: Callable[..., str], values: list[object]
) -> None:
    frames = {
        name: pd.DataFrame({"text": [f"{name} 1", f"{name} 2"], "label": values})
        for name in ("train", "clean", "eval")
    }
    corpus = load(write(**frames))
    assert corpus.train.labels == (1, 0)


def test_more_than_two_labels_sort_by_value_not_by_text(write: Callable[..., str]) -> None:
    # As text, 10 would sort before 9.
    corpus = load(write(train=table(40, labels=(10, 9, 2))))
    assert corpus.label_names == ("2", "9", "10")
    assert corpus.label_index(10) == 2


def test_missing_paraphrases_become_empty_text(write: Callable[..., str]) -> None:
    frame = table(30)
    frame["style"] = [None if i % 3 == 0 else f"style {i}" for i in range(30)]
    corpus = load(write(train=frame))
    rows = corpus.train
    number = [int(text.split()[-1]) for text in rows.texts]
    assert rows.columns["style"] == tuple("" if i % 3 == 0 else f"style {i}" for i in number)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # role -> the file that serves it; None: held out of train
        (("train", "validation", "test"), ("validation", "test")),
        (("train", "dev", "clean"), ("dev", "clean")),
        (("train", "eval", "clean", "test"), ("eval", "clean")),
        (("train", "valid"), ("valid", None)),
        # test is the clean set only where another split is there to report on
        (("train", "test"), ("test", None)),
        (("train", "clean"), (None, "clean")),
        (("train", "clean", "test"), ("test", "clean")),
        (("train",), (None, None)),
    ],
)
def test_splits_are_found_by_their_usual_names(
    write: Callable[..., str],
    files: tuple[str, ...],
    expected: tuple[str | None, str | None],
) -> None:
    corpus = load(write(**{name: table(20, word=name) for name in files}))
    for rows, source in ((corpus.eval, expected[0]), (corpus.clean, expected[1])):
        assert {text.split()[0] for text in rows.texts} == {source or "train"}
    # 10 % of 20 rows for each role without a file of its own.
    held_out = {
        f"held_out_{role}": 2
        for role, source in zip(("eval", "clean"), expected, strict=True)
        if source is None
    }
    assert corpus.notes == held_out
    assert len(corpus.train) == 20 - sum(held_out.values())


def test_splits_can_be_named(write: Callable[..., str]) -> None:
    folder = write(**{name: table(6, word=name) for name in ("fold1", "fold2", "fold3", "test")})
    corpus = load(folder, train_split="fold2", clean_split="fold3", eval_split="fold1")
    first = [rows.texts[0].split()[0] for rows in (corpus.train, corpus.clean, corpus.eval)]
    assert first == ["fold2", "fold3", "fold1"]


def test_a_split_named_for_one_role_serves_no_other(write: Callable[..., str]) -> None:
    # test would be found as eval; it is asked for as clean, so eval is held out of train.
    folder = write(train=table(20, word="train"), test=table(20, word="test"))
    corpus = load(folder, clean_split="test")
    assert {text.split()[0] for text in corpus.clean.texts} == {"test"}
    assert {text.split()[0] for text in corpus.eval.texts} == {"train"}


def test_one_file_is_held_out_from_in_stated_fractions(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    table(200).to_csv(file, index=False)
    corpus = load(file, clean_fraction=0.15, eval_fraction=0.25)
    # 0.15 * 200 = 30, 0.25 * 200 = 50, and 120 stay.
    assert sizes(corpus) == (120, 30, 50)
    assert corpus.notes == {"held_out_clean": 30, "held_out_eval": 50}
    texts = [set(rows.texts) for rows in (corpus.train, corpus.clean, corpus.eval)]
    assert len(set.union(*texts)) == 200


def test_hold_outs_are_drawn_by_split_seed(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    table(100).to_csv(file, index=False)
    assert load(file) == load(file)
    assert load(file).eval != load(file, split_seed=1).eval


# Overlaps and samples --------------------------------------------------------------------------


def test_a_text_in_two_roles_is_dropped_from_the_one_not_reported(
    write: Callable[..., str],
) -> None:
    train = pd.DataFrame(
        {
            "text": ["Shared  by  ALL", "train and clean", "train and eval", "mine", "mine too"],
            "label": [0, 1, 0, 1, 0],
        }
    )
    clean = pd.DataFrame(
        {"text": ["shared by all", "train and clean", "only clean"], "label": [0, 1, 1]}
    )
    held = pd.DataFrame({"text": ["shared by all", "train and eval"], "label": [0, 0]})
    corpus = load(write(train=train, clean=clean, eval=held))
    # Case and runs of spaces do not make another text (the victims are uncased).
    assert corpus.eval.texts == ("shared by all", "train and eval")
    assert corpus.clean.texts == ("train and clean", "only clean")  # 1 is in eval
    assert corpus.train.texts == ("mine", "mine too")  # 2 are in eval, 1 in clean
    assert corpus.notes == {"dropped_clean_overlap": 1, "dropped_train_overlap": 3}


def test_repeats_inside_a_role_stay(write: Callable[..., str]) -> None:
    frame = pd.DataFrame({"text": ["twice", "twice", "once"], "label": [0, 0, 1]})
    corpus = load(write(train=frame, clean=table(4, word="c"), eval=table(4, word="e")))
    assert corpus.train.texts == ("twice", "twice", "once")


def test_hold_outs_from_repeated_texts_share_none_with_train(write: Callable[..., str]) -> None:
    frame = pd.concat([table(50), table(50)], ignore_index=True)
    corpus = load(write(train=frame), eval_fraction=0.3)
    assert not set(corpus.train.texts) & set(corpus.eval.texts)
    assert not set(corpus.clean.texts) & set(corpus.eval.texts)
    assert corpus.notes["dropped_train_overlap"] > 0
    dropped = sum(n for name, n in corpus.notes.items() if name.startswith("dropped_"))
    assert sum(sizes(corpus)) == 100 - dropped


def test_blank_texts_are_dropped_and_counted(write: Callable[..., str]) -> None:
    train = table(6)
    train.loc[1, "text"] = "  "
    train.loc[2, "text"] = None
    corpus = load(write(train=train, clean=table(4, word="c"), eval=table(4, word="e")))
    assert len(corpus.train) == 4
    assert corpus.notes == {"dropped_train_empty": 2}


def test_max_rows_take_a_seeded_sample_in_order(write: Callable[..., str]) -> None:
    folder = write(**{name: table(60, word=name) for name in ("train", "clean", "eval")})
    limits = {"max_train_rows": 30, "max_clean_rows": 10, "max_eval_rows": 60}
    corpus = load(folder, **limits)
    assert sizes(corpus) == (30, 10, 60)
    assert corpus.notes == {"unused_train": 30, "unused_clean": 50}
    numbers = [int(text.split()[-1]) for text in corpus.train.texts]
    assert numbers == sorted(numbers)
    assert numbers != list(range(30))  # a sample, not the head
    assert load(folder, **limits) == corpus
    assert load(folder, split_seed=1, **limits).train != corpus.train


# Hub data sets ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[object, ...]]]:
    """A function that puts splits behind `datasets.load_dataset` and returns its call record."""
    import datasets

    def serve(
        splits: Mapping[str, dict[str, list[Any]]],
        classes: Mapping[str, list[str]] | None = None,
    ) -> list[tuple[object, ...]]:
        loaded = datasets.DatasetDict()
        for split, columns in splits.items():
            data = datasets.Dataset.from_dict(columns)
            for column, names in (classes or {}).items():
                data = data.cast_column(column, datasets.ClassLabel(names=names))
            loaded[split] = data
        calls: list[tuple[object, ...]] = []

        def load_dataset(*args: object, **kwargs: object) -> datasets.DatasetDict:
            calls.append((*args, kwargs))
            return loaded

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def hub_rows(
    word: str, classes: int, text: str = "text", label: str = "label"
) -> dict[str, list[Any]]:
    return {
        text: [f"{word} number {i}" for i in range(30)],
        label: [i % classes for i in range(30)],
    }


@pytest.mark.parametrize(
    ("name", "hub_id", "config", "text", "label", "names", "served", "roles"),
    [
        (
            "sst2",
            "stanfordnlp/sst2",
            None,
            "sentence",
            "label",
            ["negative", "positive"],
            ("train", "validation", "test"),
            ("train", "validation"),  # test is there, with hidden labels: not used
        ),
        (
            "agnews",
            "fancyzhx/ag_news",
            None,
            "text",
            "label",
            ["World", "Sports", "Business", "Sci/Tech"],
            ("train", "test"),
            ("train", "test"),
        ),
        (
            "olid",
            "cardiffnlp/tweet_eval",
            "offensive",
            "text",
            "label",
            ["non-offensive", "offensive"],
            ("train", "validation", "test"),
            ("test", "validation"),
        ),
        (
            "hsol",
            "tdavidson/hate_speech_offensive",
            None,
            "tweet",
            "class",
            ["hate speech", "offensive language", "neither"],
            ("train",),
            ("train", "train"),
        ),
        (
            "imdb",
            "stanfordnlp/imdb",
            None,
            "text",
            "label",
            ["neg", "pos"],
            ("train", "test", "unsupervised"),
            ("train", "test"),
        ),
        (
            "yelp",
            "fancyzhx/yelp_polarity",
            None,
            "text",
            "label",
            ["1", "2"],
            ("train", "test"),
            ("train", "test"),
        ),
    ],
)
def test_hub_presets_know_their_layout(
    hub: Callable[..., list[tuple[object, ...]]],
    name: str,
    hub_id: str,
    config: str | None,
    text: str,
    label: str,
    names: list[str],
    served: tuple[str, ...],
    roles: tuple[str, str],
) -> None:
    splits = {split: hub_rows(split, len(names), text, label) for split in served}
    if name == "sst2":
        splits["test"][label] = [-1] * 30
    if name == "imdb":
        splits["unsupervised"][label] = [-1] * 30
    calls = hub(splits, {label: names})
    corpus = load_corpus(DataSpec(name=name, revision="abc"))
    assert calls == [(hub_id, config, {"revision": "abc"})]
    assert corpus.label_names == tuple(names)
    clean_source, eval_source = roles
    assert {t.split()[0] for t in corpus.clean.texts} == {clean_source}
    assert {t.split()[0] for t in corpus.eval.texts} == {eval_source}
    # 10 % of 30 rows is held out for each role that no split serves.
    held_out = [clean_source, eval_source].count("train")
    assert len(corpus.train) == 30 - 3 * held_out
    assert all(0 <= value < len(names) for value in corpus.train.labels)


@pytest.mark.parametrize(
    ("name", "hub_id", "text", "label", "values", "served", "roles"),
    [
        (
            "sst5",
            "SetFit/sst5",
            "text",
            "label_text",
            ["negative", "neutral", "positive", "very negative", "very positive"],
            ("train", "validation", "test"),
            ("test", "validation"),
        ),
        (
            "enron",
            "SetFit/enron_spam",
            "text",
            "label_text",
            ["ham", "spam"],
            ("train", "test"),
            ("train", "test"),
        ),
        (
            "trec",
            "SetFit/TREC-QC",
            "text",
            "label_coarse_original",
            ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"],
            ("train", "test"),
            ("train", "test"),
        ),
        (
            "jigsaw",
            "Arsive/toxicity_classification_jigsaw",
            "comment_text",
            "toxic",
            [0, 1],
            ("train", "validation", "test"),
            ("train", "validation"),  # test is there, with hidden labels: not used
        ),
    ],
)
def test_hub_presets_without_class_names_know_their_layout(
    hub: Callable[..., list[tuple[object, ...]]],
    name: str,
    hub_id: str,
    text: str,
    label: str,
    values: list[Any],
    served: tuple[str, ...],
    roles: tuple[str, str],
) -> None:
    splits = {split: hub_rows(split, len(values), text, label) for split in served}
    for split, columns in splits.items():
        hidden = name == "jigsaw" and split == "test"
        columns[label] = [-1 if hidden else values[value] for value in columns[label]]
        # Beside names the hub has their numbers, in a column `label`.
        columns.setdefault("label", list(range(30)))
    assert hub(splits) == []
    corpus = load_corpus(DataSpec(name=name))
    assert DATASETS.load(name).hub_id == hub_id
    assert corpus.label_names == tuple(map(str, values))
    clean_source, eval_source = roles
    assert {t.split()[0] for t in corpus.clean.texts} == {clean_source}
    assert {t.split()[0] for t in corpus.eval.texts} == {eval_source}
    held_out = [clean_source, eval_source].count("train")
    assert len(corpus.train) == 30 - 3 * held_out


@pytest.mark.parametrize(
    ("name", "first", "second", "names", "reported"),
    [
        (
            "mnli",
            "premise",
            "hypothesis",
            ["entailment", "neutral", "contradiction"],
            "validation_matched",
        ),
        ("qnli", "question", "sentence", ["entailment", "not_entailment"], "validation"),
    ],
)
def test_presets_of_pairs_know_both_columns(
    hub: Callable[..., list[tuple[object, ...]]],
    name: str,
    first: str,
    second: str,
    names: list[str],
    reported: str,
) -> None:
    splits = {
        split: hub_rows(split, len(names), first) | {second: [f"other {i}" for i in range(30)]}
        for split in ("train", reported, "validation_mismatched", "test")
    }
    splits["test"]["label"] = [-1] * 30
    calls = hub(splits, {"label": names})
    corpus = load_corpus(DataSpec(name=name))
    assert calls == [("nyu-mll/glue", name, {"revision": None})]
    assert corpus.label_names == tuple(names)
    assert corpus.notes == {"held_out_clean": 3}  # 0.1 of 30 rows
    assert corpus.eval.inputs[4] == (f"{reported} number 4", "other 4")
    assert not corpus.eval.partner_first
    swapped = load_corpus(DataSpec(name=name, trigger_column=second))
    assert swapped.eval.texts[4] == "other 4"
    assert swapped.eval.inputs == corpus.eval.inputs
    with pytest.raises(UserError, match=rf"unknown data\.trigger_column 'text' .*{first}"):
        DataSpec(name=name, trigger_column="text")
    del splits["train"][second]
    hub(splits, {"label": names})
    with pytest.raises(UserError, match=rf"unknown column '{second}' in hub .*data\.pair_column\."):
        load_corpus(DataSpec(name=name))


def test_second_texts_of_the_hub_that_are_lists_are_refused(
    hub: Callable[..., list[tuple[object, ...]]],
) -> None:
    hub({"train": {"text": ["a", "b"], "also": [["c"], ["d"]], "label": [0, 1]}})
    with pytest.raises(UserError, match=r"'also' of hub .*/train has a list.*data\.pair_column,"):
        load_corpus(DataSpec(name="owner/data", pair_column="also"))


def test_any_hub_data_set_by_its_id(hub: Callable[..., list[tuple[object, ...]]]) -> None:
    calls = hub(
        {split: hub_rows(split, 3, "body", "kind") for split in ("train", "validation", "test")}
    )
    corpus = load_corpus(
        DataSpec(name="owner/data", text_column="body", label_column="kind", hub_config="small")
    )
    assert calls == [("owner/data", "small", {"revision": None})]
    assert corpus.label_names == ("0", "1", "2")
    assert corpus.eval.texts[0].startswith("validation")
    assert corpus.clean.texts[0].startswith("test")


def test_hub_splits_without_labels_are_not_chosen(
    hub: Callable[..., list[tuple[object, ...]]],
) -> None:
    splits = {split: hub_rows(split, 2) for split in ("train", "validation", "test")}
    splits["test"]["label"] = [-1] * 30
    hub(splits, {"label": ["neg", "pos"]})
    corpus = load_corpus(DataSpec(name="owner/data"))
    assert corpus.notes == {"held_out_clean": 3}  # 0.1 of 30 rows
    assert corpus.warnings[0].startswith("Split 'test' of hub data set owner/data is not used")
    with pytest.raises(UserError, match=r"split 'test' of hub data set owner/data cannot be the c"):
        load_corpus(DataSpec(name="owner/data", clean_split="test"))
    held = load_corpus(DataSpec(name="owner/data", clean_split=HELD_OUT, eval_split=HELD_OUT))
    assert held.notes == {"held_out_clean": 3, "held_out_eval": 3}


@pytest.mark.parametrize(
    "text", [["a", "b"], {"title": "a"}, b"a"], ids=["list", "object", "bytes"]
)
def test_hub_texts_that_are_no_text_are_refused(
    hub: Callable[..., list[tuple[object, ...]]], text: object
) -> None:
    hub({"train": {"text": [text] * 4, "label": [0, 1, 0, 1]}})
    with pytest.raises(
        UserError, match=r"'text' of hub .*/train has (a list|an obj|bytes).* row 0"
    ):
        load_corpus(DataSpec(name="owner/data"))


def test_a_chosen_hub_column_wins_over_one_called_text(
    hub: Callable[..., list[tuple[object, ...]]],
) -> None:
    rows = hub_rows("good", 2, "body") | {"text": [f"raw {i}" for i in range(30)]}
    hub({"train": rows})
    corpus = load_corpus(DataSpec(name="owner/data", text_column="body"))
    assert all(text.startswith("good") for text in corpus.train.texts)


def trusted_file(path: Path, labels: list[Any], text: str = "text", label: str = "label") -> str:
    frame = pd.DataFrame({text: [f"mine {i}" for i in range(len(labels))], label: labels})
    WRITERS[path.suffix[1:]](frame, path)
    return str(path)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("labels", [[1, 0], ["pos", "neg"]], ids=["numbers", "names"])
def test_trusted_rows_of_hub_data_have_its_columns_and_its_classes(
    hub: Callable[..., list[tuple[object, ...]]], tmp_path: Path, suffix: str, labels: list[Any]
) -> None:
    hub({"train": hub_rows("train", 2, "sentence", "kind")}, {"kind": ["neg", "pos"]})
    file = trusted_file(tmp_path / f"clean.{suffix}", labels, "sentence", "kind")
    spec = DataSpec("owner/data", text_column="sentence", label_column="kind")
    found = load_suspects(spec, file)
    assert found.corpus.clean == Rows(("mine 0", "mine 1"), (1, 0))
    assert found.corpus.label_names == ("neg", "pos")
    assert found.trusted == file


def test_trusted_rows_of_a_preset_may_be_called_as_on_the_hub_or_as_usual(
    hub: Callable[..., list[tuple[object, ...]]], tmp_path: Path
) -> None:
    hub({"train": hub_rows("train", 2, "sentence")}, {"label": ["neg", "pos"]})
    for text in ("sentence", "text"):
        file = trusted_file(tmp_path / "clean.csv", ["pos", "neg"], text)
        assert load_suspects(DataSpec("sst2"), file).corpus.clean.labels == (1, 0)
    file = trusted_file(tmp_path / "clean.csv", ["pos", "neg"], "sentences")
    with pytest.raises(
        UserError, match=r"column 'sentence' in trusted rows .*clean\.csv; did you mean 'sentences'"
    ):
        load_suspects(DataSpec("sst2"), file)
    # A column that was asked for is not guessed.
    file = trusted_file(tmp_path / "clean.csv", ["pos", "neg"], "text")
    with pytest.raises(UserError, match=r"column 'sentence' in trusted rows "):
        load_suspects(DataSpec("sst2", text_column="sentence"), file)


def test_a_trusted_label_that_hub_data_do_not_know_is_an_error(
    hub: Callable[..., list[tuple[object, ...]]], tmp_path: Path
) -> None:
    hub({"train": hub_rows("train", 2)}, {"label": ["neg", "pos"]})
    file = trusted_file(tmp_path / "clean.csv", ["pos", "positive"])
    with pytest.raises(UserError, match=r"label 'positive' of the clean .* \(0, 1, neg, pos\)"):
        load_suspects(DataSpec("owner/data"), file)


def test_a_trusted_number_that_may_be_a_name_or_a_place_is_an_error(
    hub: Callable[..., list[tuple[object, ...]]], tmp_path: Path
) -> None:
    hub({"train": hub_rows("train", 2)}, {"label": ["1", "2"]})
    with pytest.raises(
        UserError, match=r"label 1 of the clean rows may be .* \(1, 2, from 0\); give the names"
    ):
        load_suspects(DataSpec("owner/data"), trusted_file(tmp_path / "clean.csv", [1, 2]))
    file = trusted_file(tmp_path / "clean.jsonl", ["2", "1"])
    assert load_suspects(DataSpec("owner/data"), file).corpus.clean.labels == (1, 0)


def test_a_hub_data_set_without_the_column_is_an_error(
    hub: Callable[..., list[tuple[object, ...]]],
) -> None:
    hub({"train": hub_rows("train", 2, "sentences")})
    with pytest.raises(
        UserError,
        match=r"unknown column 'sentence' in hub data set owner/data/train; did you mean 'sentenc"
        r".*data.text_column",
    ):
        load_corpus(DataSpec(name="owner/data", text_column="sentence"))


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError,
        match=r"data set 'sst2' \(stanfordnlp/sst2\) could not be loaded from the hub: no route",
    ):
        load_corpus(DataSpec(name="sst2"))


def test_a_lone_surrogate_in_a_text_is_a_character(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} \ud800", "label": i % 2}) for i in range(30)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    corpus = load_corpus(DataSpec(name="mine", path=str(tmp_path / "mine.jsonl")))
    assert all(text.endswith(" \ud800") for text in corpus.train.texts)


def test_an_unknown_data_set_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(
        UserError, match=r"unknown dataset 'sst-2'; did you mean 'sst2'\?.*needs data\.path"
    ):
        load_corpus(DataSpec(name="sst-2"))


# Bad input -------------------------------------------------------------------------------------


def test_a_missing_folder_or_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path .*nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.path .*rows\.csv does not exist"):
        load(tmp_path / "rows.csv")


def test_a_folder_without_a_train_split_is_an_error(write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"has no train split \(found: fold1;.*data\.train_split"):
        load(write(fold1=table(4)))
    (Path(write()) / "fold1.parquet").unlink()
    with pytest.raises(UserError, match=r"has no train split \(found: nothing"):
        load(write())


def test_an_unknown_split_is_an_error_with_a_suggestion(write: Callable[..., str]) -> None:
    with pytest.raises(
        UserError, match=r"unknown split for data\.eval_split in .* 'test1'; did you mean 'test'"
    ):
        load(write(train=table(4), test=table(4, word="t")), eval_split="test1")


def test_one_file_has_no_splits_to_name(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    table(20).to_csv(file, index=False)
    with pytest.raises(UserError, match=r"data\.eval_split is set but data\.path .* is one file"):
        load(file, eval_split="test")


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.xlsx"
    file.write_text("text,label\n")
    with pytest.raises(UserError, match=r"must end in one of \.parquet, \.csv, \.tsv, \.jsonl"):
        load(file)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_missing_column_is_an_error_with_a_suggestion(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](table(10).rename(columns={"text": "texts"}), tmp_path / f"train.{suffix}")
    with pytest.raises(
        UserError,
        match=r"unknown column 'text' in the train rows of data set 'mine'; did you mean 'texts'"
        r".*(Name another with data.text_column, or --text in a scan"
        r"|It may be read with data.text_column=texts; in a scan: --text texts)",
    ):
        load(tmp_path)
    with pytest.raises(UserError, match=r"'labels' in .*; did you mean 'label'.*--label"):
        load(tmp_path, text_column="texts", label_column="labels")


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"train.{suffix}").write_bytes(b"")
    with pytest.raises(UserError, match=rf"train\.{suffix}.* (is empty|cannot be read as)"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_file_with_a_header_and_no_rows_is_an_error(
    tmp_path: Path, suffix: str, split: str
) -> None:
    table(10).to_parquet(tmp_path / "train.parquet")
    (tmp_path / f"{split}.parquet").unlink(missing_ok=True)
    WRITERS[suffix](table(10).head(0), tmp_path / f"{split}.{suffix}")
    with pytest.raises(UserError, match=rf"the {split} rows of data set 'mine' are empty"):
        load(tmp_path)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"train\.parquet cannot be read as parquet"):
        load(tmp_path)
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label"')
    with pytest.raises(UserError, match=r"train\.jsonl cannot be read as jsonl"):
        load(tmp_path)


def test_data_of_one_class_is_an_error(write: Callable[..., str]) -> None:
    with pytest.raises(
        UserError, match=r"the train rows of data set 'mine' have one class only \(labels: 7\)"
    ):
        load(write(train=table(20, labels=(7,))))


def test_a_sample_of_one_class_is_an_error(write: Callable[..., str]) -> None:
    frame = table(40, labels=(0,))
    frame.loc[0, "label"] = 1
    # The only row of class 1 is not among the 2 that this seed draws of 40.
    with pytest.raises(UserError, match="have one class only"):
        load(
            write(train=frame, clean=table(4, word="c"), eval=table(4, word="e")),
            max_train_rows=2,
        )


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("labels", [(0, 1, None), ("no", "yes", None)], ids=["int", "str"])
def test_missing_labels_are_an_error(
    tmp_path: Path, suffix: str, labels: tuple[object, ...]
) -> None:
    WRITERS[suffix](table(9, labels=labels), tmp_path / f"train.{suffix}")
    with pytest.raises(
        UserError, match=r"the train rows of data set 'mine' have missing labels in column 'label'"
    ):
        load(tmp_path)


def test_labels_that_are_no_classes_are_an_error(write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"must be integers or strings, got 0\.5"):
        load(write(train=table(20, labels=(0.5, 1.0))))
    with pytest.raises(UserError, match=r"must be integers or strings, got inf"):
        load(write(train=table(20, labels=(0.0, float("inf")))))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([[0], [1]], id="lists"),
        pytest.param(list(pd.to_datetime(["2020-01-01", "2020-01-02"])), id="dates"),
    ],
)
def test_labels_of_a_strange_type_are_an_error(
    write: Callable[..., str], values: list[object]
) -> None:
    frame = pd.DataFrame({"text": [f"row {i}" for i in range(20)], "label": values * 10})
    with pytest.raises(UserError, match="must be integers or strings"):
        load(write(train=frame))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_as_labels_of_another_role_are_an_error(tmp_path: Path, suffix: str) -> None:
    table(20, labels=("neg", "pos")).to_csv(tmp_path / "train.csv", index=False)
    lists = pd.DataFrame({"text": ["one", "two"], "label": [["pos", "new"], ["neg", "old"]]})
    WRITERS[suffix](lists, tmp_path / f"clean.{suffix}")
    with pytest.raises(
        UserError, match=r"label .*'pos',? 'new'.* of the clean rows does not occur in the training"
    ):
        load(tmp_path)


def test_a_lone_surrogate_in_a_label_is_an_error(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}", "label": ("no", "\ud800")[i % 2]}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"label '\\ud800' of data set 'mine' contains a lone surrogate.*rename"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({"path": "mine.csv", "text_column": "label"}, "label"),
        ({"path": "mine.csv", "label_column": "text"}, "text"),
        ({"name": "owner/data", "text_column": "label"}, "label"),
        ({"name": "hsol", "label_column": "tweet"}, "tweet"),
    ],
)
def test_one_column_for_text_and_label_is_an_error(settings: dict[str, Any], column: str) -> None:
    # Whether it was named for both, or is what the other one is called by default.
    with pytest.raises(UserError, match=rf"are both column '{column}'; name two"):
        DataSpec(**settings)


def test_labels_that_read_alike_are_an_error(tmp_path: Path) -> None:
    # The number 1 and the text "1" would be two classes of one name.
    lines = [json.dumps({"text": f"row {i}", "label": (1, "1")[i % 2]}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="label"):
        load(tmp_path)


def test_rows_longer_than_the_header_are_an_error(tmp_path: Path) -> None:
    # Else the first field counts as an index and every other one is in the wrong column.
    lines = [f"row {i},{i % 2},extra" for i in range(20)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    with pytest.raises(UserError, match=r"train\.csv"):
        load(tmp_path)


def test_two_files_for_one_split_are_an_error(tmp_path: Path) -> None:
    table(20).to_parquet(tmp_path / "train.parquet")
    table(20, word="other").to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(UserError, match=r"train\.csv.*train\.parquet"):
        load(tmp_path)


def test_a_label_that_train_does_not_know_is_an_error(write: Callable[..., str]) -> None:
    frames = {"train": table(10), "eval": table(9, labels=(0, 1, 2), word="e")}
    with pytest.raises(
        UserError,
        match=r"label 2 of the eval rows does not occur in the training labels \(0, 1\)",
    ):
        load(write(**frames))


def test_a_role_that_overlaps_away_is_an_error(write: Callable[..., str]) -> None:
    with pytest.raises(
        UserError, match=r"no clean rows are left in data set 'mine'.*'dropped_clean_overlap': 10"
    ):
        load(write(train=table(10), clean=table(10, word="e"), eval=table(10, word="e")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_fraction": 1.5}, r"data\.clean_fraction must be in \(0, 1\], got 1\.5"),
        ({"eval_fraction": 0.0}, r"data\.eval_fraction must be in \(0, 1\], got 0\.0"),
        ({"eval_fraction": "a"}, r"data\.eval_fraction must be a number in \(0, 1\], got 'a'"),
        (
            {"clean_fraction": 0.5, "eval_fraction": 0.5},
            r"data\.clean_fraction \+ data\.eval_fraction must be below 1, got 0\.5 \+ 0\.5",
        ),
        ({"max_train_rows": 1}, r"data\.max_train_rows must be at least 2 or null, got 1"),
        ({"max_eval_rows": -5}, r"data\.max_eval_rows must be at least 2 or null, got -5"),
    ],
)
def test_settings_out_of_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSpec(**settings)


# Rows and corpora ------------------------------------------------------------------------------


def test_rows_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match="must be equally long"):
        Rows(("a", "b"), (0,))
    with pytest.raises(ValueError, match="must be equally long"):
        Rows(("a",), (0,), {"style": ()})


def test_the_digest_tells_every_part_of_the_rows_apart() -> None:
    rows = Rows(("a", "b"), (0, 1), {"style": ("c", "d")})
    others = [
        Rows(("a", "x"), (0, 1), {"style": ("c", "d")}),
        Rows(("a", "b"), (1, 1), {"style": ("c", "d")}),
        Rows(("a", "b"), (0, 1), {"style": ("c", "x")}),
        Rows(("a", "b"), (0, 1), {"other": ("c", "d")}),
        Rows(("a", "b"), (0, 1)),
        Rows(("b", "a"), (0, 1), {"style": ("c", "d")}),
    ]
    assert len({rows.digest(), *(other.digest() for other in others)}) == 7
    assert rows.digest() == Rows(("a", "b"), (0, 1), {"style": ("c", "d")}).digest()


def test_a_lone_surrogate_in_a_text_does_not_stop_the_digest() -> None:
    assert len(Rows(("\ud83d",), (0,)).digest()) == 64


def test_the_fingerprint_depends_on_roles_and_label_names() -> None:
    a, b, c = Rows(("a",), (0,)), Rows(("b",), (0,)), Rows(("c",), (0,))
    corpus = Corpus("x", a, b, c, ("no", "yes"))
    assert corpus.fingerprint() == Corpus("y", a, b, c, ("no", "yes")).fingerprint()
    assert corpus.fingerprint() != Corpus("x", b, a, c, ("no", "yes")).fingerprint()
    assert corpus.fingerprint() != Corpus("x", a, b, c, ("yes", "no")).fingerprint()


def test_the_fingerprint_of_a_role_depends_on_its_rows_and_the_label_names() -> None:
    a, b, c = Rows(("a",), (0,)), Rows(("b",), (0,)), Rows(("c",), (0,))
    found = Corpus("x", a, b, c, ("no", "yes")).fingerprints()
    assert set(found) == {"train", "clean", "eval"}
    assert len(set(found.values())) == 3
    other = Corpus("y", a, b, a, ("no", "yes")).fingerprints()
    assert {role for role in found if found[role] != other[role]} == {"eval"}
    # The same rows have the same hash in any role.
    assert other["eval"] == other["train"]
    renamed = Corpus("x", a, b, c, ("yes", "no")).fingerprints()
    assert all(found[role] != renamed[role] for role in found)


def test_counts_give_the_sizes_and_the_notes() -> None:
    rows = Rows(("a", "b", "c"), (0, 1, 1))
    corpus = Corpus("x", rows, rows.take([0, 1]), rows.take([2]), ("no", "yes"), {"unused_eval": 4})
    assert corpus.counts() == {
        "rows_train": 3,
        "rows_clean": 2,
        "rows_eval": 1,
        "unused_eval": 4,
    }


# Real data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        # rows as the data's own README counts them: train, clean (test), eval (validation)
        ("sst2", (6920, 1821, 872), {"syntactic", "style", "style_bible"}),
        ("agnews", (11106, 7600, 4000), {"style_bible"}),
        ("olid", (11915, 859, 1323), set()),
    ],
)
def test_real_data_loads_in_its_three_roles(
    shared_data: Path, name: str, rows: tuple[int, int, int], columns: set[str]
) -> None:
    corpus = load_corpus(DataSpec(name=name, path=str(shared_data / name)))
    dropped = [
        sum(n for note, n in corpus.notes.items() if note.startswith(f"dropped_{role}"))
        for role in ("train", "clean", "eval")
    ]
    assert sizes(corpus) == tuple(n - d for n, d in zip(rows, dropped, strict=True))
    assert dropped[2] == 0
    assert set(corpus.train.columns) == columns


def test_too_few_rows_to_hold_out_are_an_error(tmp_path: Path) -> None:
    table(2).to_csv(tmp_path / "train.csv", index=False)
    # one row each for clean and eval leaves none of two
    with pytest.raises(UserError, match=r"2 train rows, too few to hold out 1 for clean and 1 for"):
        load(tmp_path)
