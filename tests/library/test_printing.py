"""Texts of unknown origin on a terminal and in a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest

from btu.printing import csv_text, guarded, printable
from btu.scan.report import write_report


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("neg\x1b[31m", r"neg\x1b[31m"),
        ("pos\x1b]0;x\x07", r"pos\x1b]0;x\x07"),
        ("a\rb", r"a\rb"),
        ("\x9b31m", r"\x9b31m"),  # a C1 code, which some terminals take for ESC [
        ("abc\u202etxt", r"abc\u202etxt"),  # writes the rest from right to left
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),  # a tag, which nothing shows
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("é ü 日本\u3000語 \u200d नमस्ते می\u200cخواهم 👩\u200d💻", None),  # noqa: RUF001
        ("plain", None),
    ],
)
def test_odd_characters_become_escapes(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize(
    "text",
    [
        "=cmd|' /C calc'!A0",
        "+1+cmd",
        "-2+3+cmd|' /C calc'!A0",
        "@SUM(1+1)",
        "\t=1",
        "\r=1",
        "  =HYPERLINK(1)",
        "＝1+1",  # noqa: RUF001
    ],
)
def test_formulas_are_guarded(text: str) -> None:
    assert guarded(text) == f"'{text}"


@pytest.mark.parametrize("value", ["-1", "+1.5e3", "a = b", "x-y", "", "'", None, -1, 1.5, True])
def test_what_is_no_formula_stays(value: object) -> None:
    assert guarded(value) is value


def test_tables_as_csv_are_guarded_in_every_text_and_head() -> None:
    table = pd.DataFrame(
        {
            "=head": ["=1+1", "fine"],
            "score": [-1.5, float("nan")],
            "text": pd.Series(["@a", None], dtype=object),
            "kind": pd.Categorical(["+x", "y"]),
        }
    )
    rows = list(csv.reader(io.StringIO(csv_text(table))))
    assert rows == [
        ["'=head", "score", "text", "kind"],
        ["'=1+1", "-1.5", "'@a", "'+x"],
        ["fine", "", "", "y"],
    ]
    assert table["text"].tolist() == ["@a", None]  # the table itself is unchanged


def test_the_tables_of_a_scan_are_guarded_in_csv_alone(tmp_path: Path) -> None:
    table = pd.DataFrame({"row": [0], "label": ["=A1"], "text": ["-great film , @me"]})
    for suffix in ("csv", "parquet", "jsonl"):
        write_report(table, tmp_path / f"rows.{suffix}")
    assert pd.read_csv(tmp_path / "rows.csv").to_dict("records") == [
        {"row": 0, "label": "'=A1", "text": "'-great film , @me"}
    ]
    assert pd.read_parquet(tmp_path / "rows.parquet").equals(table)
    assert pd.read_json(tmp_path / "rows.jsonl", lines=True).to_dict("records") == table.to_dict(
        "records"
    )
