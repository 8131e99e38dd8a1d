"""docs/claims.md: what backs a claim exists, and the README's numbers are in docs/figures/."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from orchestrator.cli.main import app

ROOT = Path(__file__).parents[1]
CLAIMS = (ROOT / "docs/claims.md").read_text()
README = (ROOT / "README.md").read_text()
FIGURES = {
    file.stem: json.loads(file.read_text()) for file in (ROOT / "docs/figures").glob("*.json")
}
SEEN = re.compile(r"CI|`[0-9a-f]{7}`, [ABC](; .+)?|not finished yet")
ABSOLUTE = re.compile(r"\b(never|nothing|no|every|all|always|only|any)\b", re.IGNORECASE)


class Claim(NamedTuple):
    """A row: the claim, the pages that make it, what backs it, and where it was last seen."""

    claim: str
    pages: str
    backing: str
    seen: str


def table_rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the Markdown tables of a text, without heads."""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        ruled = at + 1 < len(lines) and re.fullmatch(r"\|[-:|]+\|", lines[at + 1])
        if line.startswith("|") and not ruled and not re.fullmatch(r"\|[-:|]+\|", line):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


ROWS = [Claim(*row) for row in table_rows(CLAIMS.partition("\n## Not tested\n")[0])]


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def missing(backing: str) -> str:
    """Return why what backs a claim does not exist; empty if it does."""
    if "::" in backing:
        file, _, name = backing.partition("::")
        path = ROOT / file
        if not path.is_file():
            return f"there is no file {file}"
        return "" if name in functions(path) else f"{file} has no test {name}"
    program, *words = shlex.split(backing)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return "" if words[0] in targets else f"the Makefile has no target {words[0]}"
    files = [word for word in words if re.match(r"(benchmarks|sweeps)/", word)]
    absent = [file for file in files if not (ROOT / file).is_file()]
    if absent:
        return f"there is no file {absent[0]}"
    options = {word for word in words if word.startswith("--")}
    if program == "python" and files:
        text = (ROOT / files[0]).read_text() + (ROOT / "benchmarks/figures.py").read_text()
        unknown = [option for option in options if f'"{option}"' not in text]
        return f"{files[0]} has no option {unknown[0]}" if unknown else ""
    if program == "btu":
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        if words[0] not in commands:
            return f"btu has no command {words[0]}"
        known = {option for parameter in commands[words[0]].params for option in parameter.opts}
        unknown = sorted(options - known)
        return f"btu {words[0]} has no option {unknown[0]}" if unknown else ""
    return f"{backing} is neither a test nor a command"


def test_there_is_a_row_for_most_of_what_is_promised() -> None:
    assert len(ROWS) >= 60
    assert all(len(set(row)) == 4 and all(row) for row in ROWS)
    claims = [row.claim for row in ROWS]
    assert len(set(claims)) == len(claims)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.claim[:60])
def test_what_backs_a_claim_exists(row: Claim) -> None:
    backings = re.findall(r"`([^`]+)`", row.backing)
    if row.backing.startswith("no command"):
        assert not ABSOLUTE.search(row.claim), "an absolute claim needs a test or a command"
    else:
        assert backings
    assert [reason for backing in backings if (reason := missing(backing))] == []
    assert SEEN.fullmatch(row.seen), row.seen
    tested = all("::" in backing for backing in backings)
    assert row.seen != "CI" or (backings and tested), "CI runs tests only"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.claim[:60])
def test_a_claim_stands_in_pages_that_exist(row: Claim) -> None:
    for page in row.pages.split(", "):
        assert page == "README" or (ROOT / f"docs/{page}.md").is_file(), page


@pytest.mark.parametrize(
    ("backing", "reason"),
    [
        ("tests/test_claims.py::test_what_backs_a_claim_exists", ""),
        ("tests/test_claims.py::test_gone", "tests/test_claims.py has no test test_gone"),
        ("tests/test_gone.py::test_x", "there is no file tests/test_gone.py"),
        ("make quickstart", ""),
        ("make gone", "the Makefile has no target gone"),
        ("python benchmarks/pages.py --ui --no-bars", ""),
        ("python benchmarks/pages.py --gone", "benchmarks/pages.py has no option --gone"),
        ("python benchmarks/gone.py", "there is no file benchmarks/gone.py"),
        ("btu launch sweeps/gone.yaml", "there is no file sweeps/gone.yaml"),
        ("btu gone", "btu has no command gone"),
        ("btu report made --gone", "btu report has no option --gone"),
        ("somebody said so", "somebody said so is neither a test nor a command"),
    ],
)
def test_a_backing_that_is_gone_is_named(backing: str, reason: str) -> None:
    assert missing(backing) == reason


TEST = re.compile(r"`(tests/[\w/]+\.py::\w+)`")


def test_every_test_that_security_names_exists() -> None:
    pages = [ROOT / "docs/security.md", ROOT / "SECURITY.md"]
    named = [test for page in pages for test in TEST.findall(page.read_text())]
    assert len(named) >= 40
    assert [reason for test in named if (reason := missing(test))] == []


def test_every_limit_of_a_stranger_has_a_test() -> None:
    rows = list(table_rows((ROOT / "docs/security.md").read_text()))
    assert len(rows) >= 30
    assert [row[0] for row in rows if not TEST.search(row[1])] == []


def test_the_contents_name_every_section() -> None:
    sections = re.findall(r"^## (.+)$", CLAIMS, re.MULTILINE)
    assert re.findall(r"^- \[(.+)\]\(#", CLAIMS, re.MULTILINE) == sections


# Figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_say_how_they_were_made(name: str) -> None:
    written = FIGURES[name]
    keys = {"benchmark", "command", "date", "commit", "machine", "bars", "figures"}
    assert set(written) == keys
    assert missing(written["command"]) == ""
    assert "MISSED" not in {bar["verdict"] for bar in written["bars"]}
    assert written["machine"]["cores"] >= 1


def numbers(value: Any) -> Iterator[float]:
    """Yield all numbers inside a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def shown(text: str) -> list[str]:
    """Return the numbers in the tables of a document: Markdown tables and ``text`` blocks."""
    cells = [cell for row in table_rows(text) for cell in row]
    for block in re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        cells += block.split()
    return [cell for cell in cells if re.fullmatch(r"[\d,]+(\.\d+)?", cell)]


def without_figure(text: str, figures: dict[str, Any]) -> list[str]:
    """Return the numbers in the tables of a document that no figure has.

    Fractions are shown in percent with one decimal, counts as they are.
    """
    known = [n for written in figures.values() for n in numbers(written["figures"])]
    forms = {f"{100 * n:.1f}" for n in known} | {f"{n:,.0f}" for n in known if n == int(n)}
    return [number for number in shown(text) if number not in forms]


def test_every_number_in_the_readmes_tables_is_in_a_figure() -> None:
    assert len(shown(README)) >= 24  # 4 attacks x 6 columns
    assert without_figure(README, FIGURES) == []


def test_a_number_without_a_figure_is_found() -> None:
    figures = {"made": {"figures": {"asr": 0.1666, "flagged": 7}}}
    assert without_figure("| a | asr |\n|---|---|\n| x | 16.7 |\n", figures) == []
    assert without_figure("| a | asr |\n|---|---|\n| x | 16.6 |\n", figures) == ["16.6"]
    assert without_figure("```text\nattack asr\nx 16.7 7\n```\n", figures) == []
    assert without_figure("```text\nattack asr\nx 16.7 8\n```\n", figures) == ["8"]


def test_the_readmes_tables_are_what_the_figures_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("defenses").markdown
    assert table(FIGURES["quickstart"]["figures"]["rows"]) in README
    # Where the README has a table of defenses, it is that of its sweep.
    defenses = [row for row in table_rows(README) if len(row) == 10 and row[0].startswith("`")]
    if defenses:
        assert table(FIGURES["readme-defenses"]["figures"]["rows"]) in README
