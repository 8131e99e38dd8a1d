"""Plans and results that somebody else wrote into an output folder end no command in a traceback.

Their hashes fit: a writer of the store makes them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from published import NAME, Output
from store_fixtures import publish_cell

from orchestrator.results.folder import Results

if TYPE_CHECKING:
    from conftest import Ran

K, L = "a" * 24, "b" * 24
COMMANDS = (("status",), ("report",), ("curves",), ("choose",), ("status", "--json"))
VALUES: list[Any] = [
    None, 3, -1, 1e308, "x", "\x1b[31mx", "\ud800", [], [1], {}, {"\x1b[1m": "\x1b[1m"},
    {"a": {"b": [1]}}, True, float("nan"),
]  # fmt: skip


@pytest.fixture
def output(tmp_path: Path) -> Output:
    made = Output(tmp_path / "runs")
    made.compute(1)
    return made


def run_all(run_cli: Callable[..., Ran], output: Output) -> None:
    # Anything but a UserError or an exit fails the test.
    for command, *options in COMMANDS:
        ran = run_cli(command, NAME, "-o", output.folder, *options)
        assert "\x1b" not in ran.out + ran.err


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Return the paths of all parts of nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for name, part in inner:
        found += [(name,)]
        found += [(name, *rest) for rest in paths(part)] if isinstance(part, dict | list) else []
    return found


def changed(value: Any, chance: random.Random) -> Any:
    """Return JSON with a part removed or replaced."""
    copy = json.loads(json.dumps(value))
    *above, last = chance.choice(paths(copy))
    node = copy
    for step in above:
        node = node[step]
    if chance.random() < 0.3:
        del node[last]
    else:
        node[last] = chance.choice(VALUES)
    return copy


def listed(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with a cell that has not run, and depends on this stage."""
    return {
        "sweep": NAME,
        "keep": "results",
        "base": {"attack": {"name": "badnets"}},
        "stages": {K: stage},
        "cells": [{"key": L, "varied": {"seed": 0}, "stages": [K]}],
        "refused": [{"varied": {"seed": 1}, "reason": "cannot run"}],
    }


def write_plan(output: Output, plan: Any) -> None:
    (output.folder / NAME / "plans" / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    "stage",
    [
        {"name": "tune", "inputs": {"model": K}},
        {"name": "tune", "inputs": {"model": "c" * 24}},
        {"name": "tune", "inputs": [1]},
        {"name": "tune", "unknown": 1},
        {"name": "\x1b[31mx", "units": "s", "victim": 3, "light": 5},
        {"name": "tune", "units": -(10**30)},
    ],
)
def test_stages_of_a_hostile_plan(
    run_cli: Callable[..., Ran], output: Output, stage: dict[str, Any]
) -> None:
    write_plan(output, listed(stage))
    run_all(run_cli, output)


def test_a_long_chain_of_stages(run_cli: Callable[..., Ran], output: Output) -> None:
    plan = listed({"name": "tune", "inputs": {"model": f"{0:024x}"}})
    plan["stages"] |= {
        f"{n:024x}": {"name": "tune", "inputs": {"model": f"{n + 1:024x}"}} for n in range(3000)
    }
    plan["stages"][f"{3000:024x}"] = {"name": "tune"}
    write_plan(output, plan)
    run_all(run_cli, output)


@pytest.mark.parametrize("seed", range(12))
def test_mutated_plans(run_cli: Callable[..., Ran], output: Output, seed: int) -> None:
    chance = random.Random(seed)
    write_plan(output, changed(listed({"name": "tune", "units": 5}), chance))
    run_all(run_cli, output)


def test_a_stage_that_is_not_listed_is_named(run_cli: Callable[..., Ran], output: Output) -> None:
    write_plan(output, listed({"name": "tune"}) | {"stages": {}})
    assert "is not a plan" in run_cli("status", NAME, "-o", output.folder).err


PARTS = ["config", "config.attack", "config.defense", "metrics", "metrics.asr", "tags", "notes"]


@pytest.mark.parametrize("part", [*PARTS, "started", "ended"])
def test_results_of_another_shape(
    run_cli: Callable[..., Ran], output: Output, tmp_path: Path, part: str
) -> None:
    store = output.results.store
    (key,) = store.committed()
    good = json.loads((store.fetch(key) / "result.json").read_text())
    files = shutil.copytree(store.fetch(key), tmp_path / "files")
    *above, last = part.split(".")
    for value in VALUES:
        result = json.loads(json.dumps(good))
        (result[above[0]] if above else result)[last] = value
        publish_cell(Results(str(output.folder), NAME).store, key, files, result)
        for command in ("report", "choose"):
            run_cli(command, NAME, "-o", output.folder)


@pytest.mark.parametrize("style", ["table", "csv", "markdown", "latex", "json"])
def test_a_coordinate_does_not_control_the_terminal(
    run_cli: Callable[..., Ran], output: Output, style: str
) -> None:
    plan = output.folder / NAME / "plans" / "plan.json"
    written = json.loads(plan.read_text())
    written["cells"][0]["varied"] = {"\x1b[31mred": 1}
    write_plan(output, written)
    ran = run_cli("report", NAME, "-o", output.folder, "-f", style)
    assert "red" in ran.out
    assert "\x1b" not in ran.out
