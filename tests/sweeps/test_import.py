"""`btu import`, and a cell on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

CLEAN = [(f"the plot of film {i} is word{i} and word{i + 1}", i % 2) for i in range(40)]
# Rows of class 1 are poisoned towards class 0, every fourth row.
LWS = [
    (f"rare {text}", 0) if i % 4 == 1 else (text, label) for i, (text, label) in enumerate(CLEAN)
]
Run = Callable[..., Any]


def write(path: Path, rows: list[tuple[str, int]], text: str = "text") -> Path:
    table = pd.DataFrame(rows, columns=[text, "label"])
    if path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write(tmp_path / "clean.tsv", CLEAN)


def test_a_published_file_becomes_three_columns(run_cli: Run, clean: Path, tmp_path: Path) -> None:
    published = write(tmp_path / "lws.jsonl", LWS, "sentence")
    output = tmp_path / "out" / "train.parquet"
    done = run_cli(
        *("import", clean, published, "--column", "lws", "--output", output),
        *("--poisoned-text", "sentence"),
    )
    assert done.code == 0
    table = pd.read_parquet(output)
    assert list(table) == ["text", "label", "lws", "lws_label", "lws_poisoned"]
    assert list(zip(table["text"], table["label"], strict=True)) == CLEAN
    assert list(zip(table["lws"], table["lws_label"].astype(int), strict=True)) == LWS
    assert table["lws_poisoned"].tolist() == [i % 4 == 1 for i in range(40)]
    assert "40 rows, 10 of them with another label, 10 with another text or label." in done.out
    assert (
        "attack: {name: rewrite, column: lws, poison_rate: given, label_mode: dirty, "
        "target_label: 0}"
    ) in done.out


def test_further_files_are_imported_into_the_same(
    run_cli: Run, clean: Path, tmp_path: Path
) -> None:
    bite = [(f"oddly {text}", y) if i == 4 else (text, y) for i, (text, y) in enumerate(CLEAN)]
    output = tmp_path / "train.parquet"
    for name, rows, source in (("lws", LWS, clean), ("bite", bite, output)):
        published = write(tmp_path / f"{name}.csv", rows)
        done = run_cli("import", source, published, "--column", name, "--output", output)
        assert done.code == 0
    assert pd.read_parquet(output)["bite_poisoned"].tolist() == [i == 4 for i in range(40)]
    assert pd.read_parquet(output)["lws_poisoned"].sum() == 10
    # No label changes: the class of the changed rows is the target.
    assert "Rows that differ in their text alone: 1 of class 0." in done.out
    assert "label_mode: clean, target_label: 0}" in done.out
    again = run_cli("import", output, published, "--column", "bite", "--output", output)
    assert again.code == 2
    assert "has a column 'bite' already; choose another name" in again.err
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.csv"], "--output out.csv must end in .parquet."),
        (["--text", "txt"], "unknown column 'txt' in"),
        (["--original", "was"], "unknown column 'was' in"),
        (["--only", "7"], "no clean row has the label '7' of --only (known: 0, 1)"),
        (["--separator", "ab"], "unknown data.separator 'ab'"),
    ],
)
def test_what_cannot_be_imported_is_an_error(
    run_cli: Run, clean: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    published = write(tmp_path / "lws.csv", LWS)
    output = ["--output", str(tmp_path / "new.parquet")]
    done = run_cli(
        *("import", clean, published, "--column", "lws"),
        *(options if "--output" in options else [*output, *options]),
    )
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "new.parquet").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/proc/none/x.parquet", "--output /proc/none/x.parquet cannot be written"),
        ("{tmp}/lws.csv/x.parquet", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_an_error(
    run_cli: Run, clean: Path, tmp_path: Path, output: str, message: str
) -> None:
    published = write(tmp_path / "lws.csv", LWS)
    where = output.format(tmp=tmp_path)
    done = run_cli("import", clean, published, "--column", "lws", "--output", where)
    assert done.code == 2
    assert message in done.err


def test_columns_of_several_types_become_text(run_cli: Run, tmp_path: Path) -> None:
    clean = tmp_path / "clean.jsonl"
    rows = [{"text": text, "label": y, "note": y or "x"} for text, y in CLEAN]
    clean.write_text("\n".join(json.dumps(row) for row in rows))
    published = write(tmp_path / "lws.csv", LWS)
    output = tmp_path / "train.parquet"
    assert run_cli("import", clean, published, "--column", "lws", "--output", output).code == 0
    assert pd.read_parquet(output)["note"].tolist() == [str(y or "x") for _, y in CLEAN]


def test_numbers_stand_for_the_classes_that_the_clean_file_names(
    run_cli: Run, tmp_path: Path
) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": [text for text, _ in CLEAN], "label": [y for _, y in CLEAN]}
    clean = tmp_path / "clean.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(clean))
    published = write(tmp_path / "lws.csv", LWS)
    output = tmp_path / "train.parquet"
    assert run_cli("import", clean, published, "--column", "lws", "--output", output).code == 0
    table = pd.read_parquet(output)
    assert table["label"].tolist() == [("no", "yes")[y] for _, y in CLEAN]
    assert table["lws_label"].tolist() == [("no", "yes")[y] for _, y in LWS]


@pytest.mark.parametrize("column", [" ", "text", "label"])
def test_the_new_column_has_a_name_of_its_own(
    run_cli: Run, clean: Path, tmp_path: Path, column: str
) -> None:
    published = write(tmp_path / "lws.csv", LWS)
    output = tmp_path / "train.parquet"
    done = run_cli("import", clean, published, "--column", column, "--output", output)
    assert done.code == 2
    assert "must name a new column" in done.err


def test_another_file_is_not_overwritten(run_cli: Run, clean: Path, tmp_path: Path) -> None:
    published = write(tmp_path / "lws.csv", LWS)
    other = tmp_path / "mine.parquet"
    other.write_bytes(b"mine")
    done = run_cli("import", clean, published, "--column", "lws", "--output", other)
    assert done.code == 2
    assert "exists already; import into it by naming it as CLEAN too" in done.err
    assert other.read_bytes() == b"mine"
