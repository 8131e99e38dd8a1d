"""Hooks, workflow and forms: they parse, and run what the Makefile and `.ci/run` define."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOKS = ".pre-commit-config.yaml"
WORKFLOW = ".github/workflows/ci.yml"
FORMS = ".github/ISSUE_TEMPLATE"


def read(name: str) -> dict[str, Any]:
    # BaseLoader keeps `on`, a key of workflows, from being read as a boolean.
    loaded = yaml.load((ROOT / name).read_text(encoding="utf-8"), yaml.BaseLoader)
    assert isinstance(loaded, dict)
    return loaded


def recipe(target: str) -> list[str]:
    """Return the commands of a Makefile target, with the value of ``BIN`` filled in."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    folder = re.search(r"^BIN := (.+)$", makefile, re.MULTILINE)
    lines = re.search(rf"^{target}:.*\n((?:\t.+\n)+)", makefile, re.MULTILINE)
    assert folder
    assert lines
    return [line.strip().replace("$(BIN)", folder[1]) for line in lines[1].splitlines()]


def test_the_hooks_run_the_commands_of_make_check() -> None:
    repositories = read(HOOKS)["repos"]
    # A hook of another repository would have a version of its own, beside the pinned one.
    assert [each["repo"] for each in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == recipe("check")
    for hook in hooks:
        assert (hook["language"], hook["pass_filenames"]) == ("system", "false")


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("btu/data.py", True),
        ("tests/conftest.py", True),
        ("pyproject.toml", True),
        ("constraints.txt", True),
        ("README.md", False),
        ("sweeps/quickstart.yaml", False),
    ],
)
def test_the_hooks_run_when_python_or_its_tools_changed(name: str, runs: bool) -> None:
    for hook in read(HOOKS)["repos"][0]["hooks"]:
        assert bool(re.search(hook["files"], name)) is runs


def test_the_workflow_runs_ci_on_main_and_on_pull_requests() -> None:
    workflow = read(WORKFLOW)
    assert workflow["on"]["push"]["branches"] == ["main"]
    assert "pull_request" in workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for option in job["env"]:
        assert re.search(rf"^{option} \?=", makefile, re.MULTILINE), option


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_has_fields_that_must_be_filled_in(name: str) -> None:
    form = read(f"{FORMS}/{name}.yml")
    assert form["name"]
    assert form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") == "true" for field in fields)


def test_the_chooser_of_issues_parses() -> None:
    assert read(f"{FORMS}/config.yml") == {"blank_issues_enabled": "true"}
