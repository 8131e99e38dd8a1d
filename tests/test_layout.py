"""The floor plan: folders of `orchestrator`, sizes of files and functions.

Import directions and circles are contracts of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("btu", "orchestrator") for path in (ROOT / folder).rglob("*.py")]
LAYERS = {"cli", "run", "tracking", "report", "results", "plan", "store", "sweep"}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and lines of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def test_orchestrator_has_its_eight_folders_and_no_file_beside_them() -> None:
    inside = {path.name for path in (ROOT / "orchestrator").iterdir()} - {"__pycache__"}
    assert inside == LAYERS | {"__init__.py", "py.typed"}


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 700} == {}
    assert statistics.median(lines.values()) <= 200


def test_few_functions_are_long() -> None:
    # A list: methods of several classes of a file may have one name.
    found = [item for path in FILES for item in functions(path)]
    long = {name: lines for name, lines in found if lines > 50}
    # 1.5 % of all; what is longer reads top to bottom, as a declaration of stages does.
    assert len(long) <= 0.015 * len(found), long
