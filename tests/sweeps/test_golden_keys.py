"""The keys of every stage of every shipped sweep, as people's stores have them.

A key that changes without its stage's version is a result that is lost: written down once, here.
When a version is raised on purpose, or a sweep gains cells, write the file again:

    python tests/sweeps/test_golden_keys.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import load_sweep, resolve
from orchestrator.graph import Graph

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "keys.json"
SWEEPS = [*sorted((HERE.parents[1] / "sweeps").glob("*.yaml")), HERE / "golden" / "all_parts.yaml"]

# Stand for the rows of each role, the victim's weights and the sizes of the corpus: no data are
# read, and a path is in no key.
ROWS = {"train": "t" * 64, "clean": "c" * 64, "eval": "e" * 64}
COUNTS = {"rows_train": 80, "rows_clean": 20, "rows_eval": 30}


def keys_of(path: Path) -> dict[str, list[str]]:
    """Return the keys of a sweep's stages by the stages' names; those of a name in order."""
    graph = Graph()
    found: dict[str, set[str]] = {}
    sweep = load_sweep(path)
    cells = list(sweep.cells())
    for cell in [*cells, *sweep.controls_of(cell.varied for cell in cells)]:
        last = graph.cell(resolve(cell.config), ROWS, "w" * 64, COUNTS, revision="r" * 64)
        for stage in last.closure():
            found.setdefault(stage.name, set()).add(stage.key)
    return {name: sorted(keys) for name, keys in sorted(found.items())}


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Any]:
    known: dict[str, Any] = json.loads(GOLDEN.read_text())
    return known


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_keys_are_those_that_stores_have(path: Path, golden: Mapping[str, Any]) -> None:
    assert keys_of(path) == golden[path.stem]


def test_every_sweep_is_written_down(golden: Mapping[str, Any]) -> None:
    assert sorted(golden) == sorted(path.stem for path in SWEEPS)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({path.stem: keys_of(path) for path in SWEEPS}, indent=1) + "\n")
