"""Files of every kind: encodings, separators, headers, quotes, packed files, types of columns."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btu.data.load import load_corpus
from btu.data.spec import HELD_OUT, DataSpec
from btu.data.suspects import load_suspects
from btu.errors import UserError
from btu.types import Corpus

COUNT = 20


def texts(word: str = "row", count: int = COUNT) -> list[str]:
    return [f"{word} number {i}" for i in range(count)]


def alternating(labels: tuple[Any, ...], count: int = COUNT) -> list[Any]:
    return [labels[i % len(labels)] for i in range(count)]


def load(path: Path, **settings: Any) -> Corpus:
    return load_corpus(DataSpec(name="mine", path=str(path), **settings))


def everything(corpus: Corpus) -> set[tuple[str, str]]:
    """All texts with the names of their labels, from all roles."""
    return {
        (text, corpus.label_names[label])
        for rows in (corpus.train, corpus.clean, corpus.eval)
        for text, label in zip(rows.texts, rows.labels, strict=True)
    }


def expected(labels: tuple[str, ...], word: str = "row") -> set[tuple[str, str]]:
    return set(zip(texts(word), alternating(labels), strict=True))


def csv_lines(
    separator: str = ",", labels: tuple[str, ...] = ("no", "yes"), head: str | None = "text,label"
) -> str:
    rows = [f"{t}{separator}{v}" for t, v in zip(texts(), alternating(labels), strict=True)]
    first = [] if head is None else [head.replace(",", separator)]
    return "\n".join([*first, *rows]) + "\n"


def json_rows(labels: tuple[Any, ...] = ("no", "yes")) -> list[dict[str, Any]]:
    return [{"text": t, "label": v} for t, v in zip(texts(), alternating(labels), strict=True)]


def json_lines(labels: tuple[Any, ...] = ("no", "yes")) -> str:
    return "\n".join(map(json.dumps, json_rows(labels)))


# Files that are read as they are -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.CSV", csv_lines().encode()),
        ("mine.Tsv", csv_lines("\t").encode()),
        ("mine.csv", b"\xef\xbb\xbf" + csv_lines().encode()),
        ("mine.tsv", b"\xef\xbb\xbf" + csv_lines("\t").encode()),
        ("mine.csv", csv_lines().replace("\n", "\r\n").encode()),
        ("mine.csv", csv_lines().replace("\n", "\r").encode()),
        ("mine.jsonl", b"\xef\xbb\xbf" + json_lines().encode()),
        ("mine.jsonl", json_lines().replace("\n", "\r\n").encode()),
        ("mine.json", json_lines().encode()),
        ("mine.json", json.dumps(json_rows(), indent=2).encode()),
        ("mine.jsonl", b"\n " + json.dumps(json_rows()).encode()),
        ("mine.csv.gz", gzip.compress(csv_lines().encode())),
        ("mine.JSONL.BZ2", bz2.compress(json_lines().encode())),
        ("mine.tsv.xz", lzma.compress(csv_lines("\t").encode())),
    ],
)
def test_files_are_read_as_they_are(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    corpus = load(path)
    assert everything(corpus) == expected(("no", "yes"))
    assert corpus.warnings == ()


def test_a_packed_parquet_file_is_a_split_too(tmp_path: Path) -> None:
    table = pd.DataFrame({"text": texts(), "label": alternating((0, 1))})
    table.to_parquet(tmp_path / "train.parquet")
    packed = gzip.compress((tmp_path / "train.parquet").read_bytes())
    (tmp_path / "train.parquet").rename(tmp_path / "other.parquet")
    (tmp_path / "train.parquet.gz").write_bytes(packed)
    assert everything(load(tmp_path)) == expected(("0", "1"))


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("mine.csv", csv_lines(";"), {"separator": ";"}),
        ("mine.csv", csv_lines(";"), {"separator": "semicolon"}),
        ("mine.csv", csv_lines("|"), {"separator": "pipe"}),
        ("mine.csv", csv_lines("\t"), {"separator": "\\t"}),
        ("mine.csv", csv_lines("\t"), {"separator": "\t"}),
        ("mine", csv_lines("\t"), {"separator": "tab"}),
        ("mine.txt", csv_lines(), {"separator": ","}),
        (
            "mine.tsv",
            csv_lines("\t", head=None),
            {"header": False, "text_column": "0", "label_column": "1"},
        ),
    ],
)
def test_separators_and_headers_are_keys(
    tmp_path: Path, name: str, content: str, settings: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(content)
    assert everything(load(tmp_path / name, **settings)) == expected(("no", "yes"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_encodings_are_a_key(tmp_path: Path, encoding: str, suffix: str) -> None:
    content = {
        "csv": csv_lines(labels=("nö", "£")),
        "tsv": csv_lines("\t", labels=("nö", "£")),
        "jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in json_rows(("nö", "£"))),
    }[suffix]
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(content.encode(encoding))
    assert everything(load(path, encoding=encoding)) == expected(("nö", "£"))


def test_how_a_file_is_read_is_in_the_keys_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    # 0x80 is a control character in latin-1 and the euro sign in cp1252.
    path.write_bytes(csv_lines().encode().replace(b"number", b"\x80"))
    prints = {name: load(path, encoding=name).fingerprints() for name in ("latin-1", "cp1252")}
    assert prints["latin-1"] != prints["cp1252"]
    # Another key that reads the same rows has the same keys: their results are the same.
    assert load(path, encoding="cp1252", separator=",").fingerprints() == prints["cp1252"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "latin"}, None),
        ({"encoding": "lattin-1"}, r"data\.encoding 'lattin-1' is no text .*mean 'latin-1'\? Name"),
        ({"encoding": "rot13"}, r"data\.encoding 'rot13' is no text encoding\. Name one"),
        ({"encoding": "unicode_escape"}, r"data\.encoding 'unicode_escape' is no text encoding"),
        ({"separator": "semicolons"}, r"data\.separator 'semicolons'; did you mean 'semicolon'"),
        ({"separator": "x"}, r"data\.separator 'x' cannot separate fields"),
        ({"separator": "\n"}, r"data\.separator '\\n' cannot separate fields"),
        ({"separator": "§"}, r"data\.separator '§' cannot separate fields"),
    ],
)
def test_values_that_read_nothing_are_errors(
    tmp_path: Path, settings: dict[str, Any], message: str | None
) -> None:
    (tmp_path / "mine.csv").write_text(csv_lines())
    if message is None:
        assert everything(load(tmp_path / "mine.csv", **settings)) == expected(("no", "yes"))
        return
    with pytest.raises(UserError, match=message):
        load(tmp_path / "mine.csv", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "latin-1"}, r"data\.encoding is 'latin-1', but the demo corpus has fixed"),
        ({"header": False}, r"data\.header is False, but the demo corpus"),
        ({"name": "owner/data", "separator": ";"}, r"data\.separator is ';', but only local files"),
    ],
)
def test_only_local_files_are_read_that_way(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separator": ";"}, r"data\.separator is ;, but .*mine\.jsonl is no delimited text"),
        ({"header": False}, r"data\.header is false, but .*mine\.jsonl is no delimited text"),
        ({"quoting": False}, r"data\.quoting is false, but .*mine\.jsonl is no delimited text"),
    ],
)
def test_a_key_that_changes_nothing_is_an_error(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(json_lines())
    with pytest.raises(UserError, match=message):
        load(tmp_path / "mine.jsonl", **settings)


# What the error proposes -------------------------------------------------------------------------


def tweets() -> str:
    """Rows like those of Sentiment140: no header, the label first, the text last."""
    return "".join(
        f'"{(0, 4)[i % 2]}","{i}","Mon Apr 06","NO_QUERY","user{i}","caf\xe9 {i} , at home"\n'
        for i in range(COUNT)
    )


def messages() -> str:
    """Rows like those of the SMS Spam Collection: no header, no suffix, the label first."""
    return "".join(f"{('ham', 'spam')[i % 2]}\tgo until jurong {i}\n" for i in range(COUNT))


@pytest.mark.parametrize(
    ("name", "content", "keys", "options"),
    [
        (
            "tweets.csv",
            tweets().encode("latin-1"),
            "data.encoding=latin-1 data.header=false data.text_column=5 data.label_column=0",
            "--encoding latin-1 --no-header --text 5 --label 0",
        ),
        (
            "tweets.csv",
            tweets().encode(),
            "data.header=false data.text_column=5 data.label_column=0",
            "--no-header --text 5 --label 0",
        ),
        (
            "SMSSpamCollection",
            messages().encode(),
            "data.separator=tab data.header=false data.text_column=1 data.label_column=0",
            "--separator tab --no-header --text 1 --label 0",
        ),
        ("mine.csv", csv_lines(";").encode(), "'data.separator=;'", "--separator ';'"),
        (
            "mine.csv",
            csv_lines(head="v2,v1").replace("number", "\xa3").encode("latin-1"),
            "data.encoding=latin-1 data.text_column=v2 data.label_column=v1",
            "--encoding latin-1 --text v2 --label v1",
        ),
        (
            "mine.csv",
            csv_lines(head="v2,v1").encode(),
            "data.text_column=v2 data.label_column=v1",
            "--text v2 --label v1",
        ),
        ("mine.csv", csv_lines().encode("utf-16"), "data.encoding=utf-16", "--encoding utf-16"),
        (
            "mine.csv",
            csv_lines().encode("utf-16-le"),
            "data.encoding=utf-16-le",
            "--encoding utf-16-le",
        ),
    ],
)
def test_an_error_proposes_the_keys_that_read_the_file(
    tmp_path: Path, name: str, content: bytes, keys: str, options: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).endswith(f"It may be read with {keys}; in a scan: {options}.")
    given = [pair.strip("'").removeprefix("data.").split("=", 1) for pair in keys.split()]
    settings: dict[str, Any] = {key: False if v == "false" else v for key, v in given}
    # The proposal holds: all rows are there.
    assert len(everything(load(path, **settings))) == COUNT


def test_bytes_of_another_encoding_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(csv_lines().encode().replace(b"row number 7", b"row \xe9"))
    # The header is line 1 and row 0 line 2.
    with pytest.raises(UserError, match=r"bytes that are no UTF-8 \(0xe9 in line 9\)"):
        load(path)


def test_an_unknown_column_shows_few_and_short_names(tmp_path: Path) -> None:
    names = [f"column{i}{'x' * 200}" for i in range(50)]
    pd.DataFrame({name: [1, 2] for name in names}).to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(UserError, match=r"and 38 more\)") as caught:
        load(tmp_path / "mine.csv")
    assert len(str(caught.value)) < 1500


# Quotes ------------------------------------------------------------------------------------------


def with_quotes(*rows: int) -> str:
    lines = csv_lines().splitlines()
    for row in rows:
        lines[row + 1] = '"' + lines[row + 1]
    return "\n".join(lines) + "\n"


def test_rows_between_two_lone_quotes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    lines = csv_lines().splitlines()
    # The quote that opens in row 3 (line 5) is closed by that before row 9 (line 11).
    lines[4], lines[10] = f'"{lines[4]}', lines[10].replace("row", 'row"')
    path.write_text("\n".join(lines) + "\n")
    corpus = load(path)
    assert sum(corpus.counts()[f"rows_{role}"] for role in ("train", "clean", "eval")) == COUNT - 6
    (warning,) = corpus.warnings
    # Lines 6 to 10 are rows; line 11 is, too, but for the quote.
    assert "mine.csv: 6 lines look like rows but were read as a part of other" in warning
    assert "(lines 5-11)" in warning
    assert "data.quoting=false, --no-quoting in a scan" in warning
    assert len(everything(load(path, quoting=False))) == COUNT


def test_a_quote_that_is_never_closed_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(with_quotes(7))
    with pytest.raises(UserError, match=r"quote in line 9 is never closed\..*data\.quoting=false"):
        load(tmp_path / "mine.csv")
    assert len(everything(load(tmp_path / "mine.csv", quoting=False))) == COUNT


def test_texts_of_several_lines_are_no_lost_rows(tmp_path: Path) -> None:
    table = pd.DataFrame({"text": texts(), "label": alternating((0, 1))})
    table["text"] += "\nit was good, and so on, 7\nnice, we go again\n\n- pros: 1"
    table.to_csv(tmp_path / "mine.csv", index=False)
    corpus = load(tmp_path / "mine.csv")
    assert corpus.warnings == ()
    assert len(everything(corpus)) == COUNT


def test_tsv_can_be_read_with_quoting(tmp_path: Path) -> None:
    table = pd.DataFrame({"text": [f"{t}\tend" for t in texts()], "label": alternating((0, 1))})
    table.to_csv(tmp_path / "mine.tsv", index=False, sep="\t")
    assert "row number 3\tend" in {
        t for t, _ in everything(load(tmp_path / "mine.tsv", quoting=True))
    }


# Types of Parquet columns ------------------------------------------------------------------------


def parquet(path: Path, text: Any, label: Any, metadata: dict[str, str] | None = None) -> Path:
    table = pa.table({"text": text, "label": label})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


TEXT_TYPES = [pa.binary(), pa.large_binary(), pa.string(), pa.large_string(), pa.string_view()]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_texts_of_every_type_are_read(tmp_path: Path, kind: Any) -> None:
    text = [t.replace("row", "röw") for t in texts()]
    values = [t.encode() for t in text] if "binary" in str(kind) else text
    path = parquet(tmp_path / "mine.parquet", pa.array(values, kind), alternating((0, 1)))
    assert everything(load(path)) == expected(("0", "1"), "röw")


def test_dictionaries_of_bytes_are_read(tmp_path: Path) -> None:
    text = pa.array([t.encode() for t in texts()]).dictionary_encode()
    label = pa.array(alternating((b"no", b"yes"))).dictionary_encode()
    assert everything(load(parquet(tmp_path / "mine.parquet", text, label))) == expected(
        ("no", "yes")
    )


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    values = [t.encode() for t in texts()]
    values[5] = b"caf\xe9"
    path = parquet(tmp_path / "mine.parquet", pa.array(values), alternating((0, 1)))
    with pytest.raises(
        UserError, match=r"column 'text' of .*mine\.parquet has bytes that are no utf-8 in row 5"
    ):
        load(path)
    assert ("café", "1") in everything(load(path, encoding="latin-1"))


def test_strings_that_are_no_utf8_are_an_error(tmp_path: Path) -> None:
    # Writers that do not check put other encodings into columns of strings.
    values = [t.encode() for t in texts()]
    values[5] = b"caf\xe9"
    strings = pa.array(values).view(pa.string())
    path = parquet(tmp_path / "mine.parquet", strings, alternating((0, 1)))
    with pytest.raises(UserError, match=r"column 'text' of .* bytes that are no utf-8 in row 5"):
        load(path)
    assert ("café", "1") in everything(load(path, encoding="latin-1"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([["a", "b"]] * COUNT, r"list<element: string>"),
        ([{"title": "a", "body": "b"}] * COUNT, r"struct<.*>"),
    ],
)
def test_texts_that_are_lists_or_structs_are_refused(
    tmp_path: Path, values: list[Any], kind: str
) -> None:
    path = parquet(tmp_path / "mine.parquet", pa.array(values), alternating((0, 1)))
    with pytest.raises(UserError, match=rf"column 'text' of .* is of type {kind}, not text"):
        load(path)
    rows = [{"text": v, "label": i % 2} for i, v in enumerate(values)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"column 'text' of .* has (a list|an object) in row 0"):
        load(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((True, False), ("False", "True")),
        ((b"yes", b"no"), ("no", "yes")),
        ((Decimal("1"), Decimal("0")), ("0", "1")),
        ((1.0, 0.0), ("0", "1")),
    ],
)
def test_labels_of_every_type_keep_what_is_written(
    tmp_path: Path, values: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    path = parquet(tmp_path / "mine.parquet", texts(), pa.array(alternating(values)))
    assert load(path).label_names == names


def test_a_text_that_is_the_index_is_a_column(tmp_path: Path) -> None:
    table = pd.DataFrame({"label": alternating((0, 1))}, index=pd.Index(texts(), name="text"))
    table.to_parquet(tmp_path / "mine.parquet")
    assert everything(load(tmp_path / "mine.parquet")) == expected(("0", "1"))


def class_label(names: list[str], kind: str = "ClassLabel") -> dict[str, str]:
    feature = {"names": names, "_type": kind}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


def test_class_names_in_the_schema_are_used(tmp_path: Path) -> None:
    # In the order of their numbers, which is not that of the alphabet.
    meta = class_label(["pos", "neg"])
    parquet(tmp_path / "train.parquet", texts(), alternating((0, 1)), meta)
    # Another file may number the same names otherwise, or have the names or numbers alone.
    parquet(tmp_path / "dev.parquet", texts("d"), alternating((1, 0)), class_label(["neg", "pos"]))
    rows = zip(texts("t"), alternating(("pos", "neg")), strict=True)
    (tmp_path / "test.csv").write_text("\n".join(["text,label", *map(",".join, rows)]))
    corpus = load(tmp_path)
    assert corpus.label_names == ("pos", "neg")
    for rows_of in (corpus.train, corpus.eval, corpus.clean):
        assert rows_of.labels == tuple(alternating((0, 1)))
    table = pd.DataFrame({"text": texts("s"), "label": alternating((0, 1))})
    table.to_parquet(tmp_path / "trusted.parquet")
    spec = DataSpec("mine", path=str(tmp_path / "train.parquet"))
    found = load_suspects(spec, str(tmp_path / "trusted.parquet"))
    assert found.corpus.clean.labels == tuple(alternating((0, 1)))


def test_a_number_without_a_class_name_is_an_error(tmp_path: Path) -> None:
    meta = class_label(["neg", "pos"])
    path = parquet(tmp_path / "mine.parquet", texts(), alternating((0, 1, 2)), meta)
    with pytest.raises(UserError, match=r"has the label 2 in row 2, but its 2 class names"):
        load(path)


@pytest.mark.parametrize(
    "meta",
    [
        {"huggingface": "{"},
        {"huggingface": "[1]"},
        class_label(["a", "a"]),
        class_label([], "Value"),
    ],
)
def test_metadata_without_class_names_are_ignored(tmp_path: Path, meta: dict[str, str]) -> None:
    path = parquet(tmp_path / "mine.parquet", texts(), alternating((0, 1)), meta)
    assert load(path).label_names == ("0", "1")


# Labels by what is written -----------------------------------------------------------------------


def write(path: Path, labels: tuple[Any, ...], word: str) -> None:
    rows = [{"text": t, "label": v} for t, v in zip(texts(word), alternating(labels), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False)


@pytest.mark.parametrize(
    ("train", "labels", "other", "others"),
    [
        ("train.csv", (0, 1), "test.jsonl", ("0", "1")),
        ("train.jsonl", ("0", "1"), "test.csv", (0, 1)),
        ("train.csv", ("0", "1", "N/A", "1"), "test.csv", (0, 1)),
        ("train.csv", (0, 1), "test.parquet", (0.0, 1.0)),
        ("train.csv", (0.0, 1.0), "test.csv", (0, 1)),
        ("train.csv", ("0.0", "1.0", "N/A", "1.0"), "test.csv", (0, 1)),
        ("train.csv", (False, True), "test.parquet", (False, True)),
        ("train.csv", ("007", "010"), "test.jsonl", ("007", "010")),
    ],
)
def test_labels_have_one_type_in_all_roles(
    tmp_path: Path, train: str, labels: tuple[Any, ...], other: str, others: tuple[Any, ...]
) -> None:
    write(tmp_path / train, labels, "a")
    write(tmp_path / other, others, "b")
    corpus = load(tmp_path)
    assert corpus.eval.labels == tuple(alternating((0, 1)))


def test_a_number_that_is_written_otherwise_is_another_label(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ("007", "010"), "a")
    write(tmp_path / "test.csv", ("7", "10"), "b")
    with pytest.raises(
        UserError, match=r"label 7 of the eval rows does not occur in the .* \(007, 010\)"
    ):
        load(tmp_path)
    write(tmp_path / "train.csv", (0, 1), "a")
    write(tmp_path / "test.csv", (True, False), "b")
    with pytest.raises(UserError, match=r"label 'True' of the eval rows does not occur"):
        load(tmp_path)


def test_labels_that_differ_in_case_or_space_are_named(tmp_path: Path) -> None:
    labels = ("neg", "neg ", "NEG", "pos")
    write(tmp_path / "train.jsonl", labels, "a")
    corpus = load(tmp_path)
    (warning,) = corpus.warnings
    # 20 rows go round 4 labels.
    assert "'NEG' (5 rows) and 'neg' (5 rows) and 'neg ' (5 rows)." in warning
    assert "'pos'" not in warning
    assert len(corpus.label_names) == 4
    assert load_suspects(DataSpec("mine", path=str(tmp_path))).corpus.warnings == (warning,)


def test_long_and_odd_labels_are_short_in_messages(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ("n" * 5000, "a\nb"), "a")
    write(tmp_path / "test.jsonl", ("p" * 5000, "a\nb"), "b")
    with pytest.raises(UserError, match=r"does not occur in the training labels") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


# Splits without labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [
        ((-1,), "all its labels in column 'label' are -1"),
        ((None,), "in column 'label' are missing"),
    ],
)
def test_a_split_without_labels_is_not_chosen_by_itself(
    tmp_path: Path, hidden: tuple[Any, ...], reason: str
) -> None:
    write(tmp_path / "train.parquet", (0, 1), "a")
    write(tmp_path / "validation.parquet", (0, 1), "b")
    write(tmp_path / "test.parquet", hidden, "c")
    corpus = load(tmp_path)
    # 0.1 of the 20 train rows is held out.
    assert corpus.notes == {"held_out_clean": 2}
    (warning,) = corpus.warnings
    assert warning.startswith("Split 'test' of folder")
    assert reason in warning
    with pytest.raises(
        UserError,
        match=rf"split 'test' .* cannot be the clean rows: .*{reason}.*data.clean_split=null",
    ):
        load(tmp_path, clean_split="test")


def test_a_test_split_without_the_label_column_is_named_too(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", (0, 1), "a")
    (tmp_path / "test.csv").write_text("id,text\n1,one\n2,two\n")
    corpus = load(tmp_path)
    assert corpus.notes == {"held_out_eval": 2, "held_out_clean": 2}
    assert "Split 'test'" in corpus.warnings[0]
    assert "it has no column 'label'" in corpus.warnings[0]


def test_minus_one_is_a_label_where_train_has_it(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", (-1, 1), "a")
    write(tmp_path / "test.csv", (-1,), "b")
    corpus = load(tmp_path)
    assert corpus.eval.labels == (0,) * COUNT
    assert corpus.warnings == ()


def test_train_without_labels_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", (-1,), "a")
    with pytest.raises(
        UserError, match=r"split 'train' .* cannot be the train rows: all its labels"
    ):
        load(tmp_path)


def test_a_role_can_be_held_out_though_its_split_exists(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.csv", (0, 1), split)
    corpus = load(tmp_path, clean_split=HELD_OUT)
    assert corpus.notes == {"held_out_clean": 2}
    assert len(corpus.eval) == COUNT
    assert load(tmp_path, eval_split=HELD_OUT, clean_split="test").notes == {"held_out_eval": 2}


def test_a_saved_dataset_folder_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"was saved by datasets\.save_to_disk.*to_parquet"):
        load(tmp_path)


def test_descriptions_beside_the_splits_are_no_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", (0, 1), "a")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert load(tmp_path).notes == {"held_out_eval": 2, "held_out_clean": 2}


MakeBad = Callable[[Path], None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}\n[1]", r"line 2 is list, not an object"),
        ("a.json", "[1, 2]", r"item 0 is int, not an object"),
        ("a.json", "[]", r"is empty: at least 2 rows"),
        ("a.jsonl", '{"text": 1}\n{"text"', r"read as jsonl: line 2: .*one array of objects"),
        ("a.json", "[" * 100_000, r"nested too deeply"),
        ("a.csv.gz", "no gzip", r"cannot be read as csv"),
        ("a.csv.xz", "no xz", r"cannot be read as csv"),
    ],
)
def test_damaged_text_files_are_errors(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    columns = [pa.array(texts()), pa.array(texts("b")), pa.array(alternating((0, 1)))]
    table = pa.Table.from_arrays(columns, names=["text", "text", "label"])
    pq.write_table(table, tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=r"mine\.parquet has two columns 'text'"):
        load(tmp_path / "mine.parquet")
