"""The documents: the README's commands and snippet run as written, and whatever is named exists."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer.main
import yaml

from btu.types import Corpus
from orchestrator.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
MOST_WORDS = 1200
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")

# Commands of the README that are not run here as they stand, with the reason.
NOT_RUN = {
    "make quickstart": "it makes an environment and trains for minutes; .ci/run runs it",
    "make test": "it would run this file again; .ci/run runs it",
    ". .venv/bin/activate": "the tests run in an environment already",
    "btu ui": "it serves until Ctrl-C; tests/sweeps/test_cli.py runs it without the server",
}


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> Iterator[tuple[str, str]]:
    """Yield the fenced blocks and inline spans of a document, in order: language and content.

    The language of an inline span is "`".
    """
    position = 0
    for fence in FENCE.finditer(text):
        yield from _spans(text[position : fence.start()])
        yield fence[1], fence[2]
        position = fence.end()
    yield from _spans(text[position:])


def _spans(prose: str) -> Iterator[tuple[str, str]]:
    for paragraph in re.split(r"\n\s*\n", prose):
        for span in SPAN.finditer(paragraph):
            yield "`", " ".join(span[1].split())


def shell_lines(text: str) -> list[str]:
    """Return the commands of a document without their comments, continued lines as one."""
    found = []
    for language, content in code(text):
        if language in ("", "`", "sh"):
            for line in content.replace("\\\n", " ").splitlines():
                command = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ ")).strip()
                if language == "sh" or re.match(r"(btu|make|python) ", command):
                    found += [command] if command else []
    return found


def readme_commands() -> list[str]:
    return shell_lines(README)


def block(language: str) -> str:
    (content,) = [content for name, content in code(README) if name == language]
    return content


# Length, links and names ------------------------------------------------------------------------


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.split()) <= MOST_WORDS


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    prose = FENCE.sub("", document.read_text())
    heads = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


# A path in one of these folders is a file of this repository.
OWN_PATH = re.compile(
    r"(?<![\w./-])(?:btu|orchestrator|deploy|sweeps|tests|benchmarks|docs|\.ci)/[\w./*-]*[\w/]"
)
# Placeholders: btu/attacks/NAME.py.
PLACEHOLDER = re.compile(r"[A-Z]{2,}\.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = {
        path for path in OWN_PATH.findall(document.read_text()) if not PLACEHOLDER.search(path)
    }
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_python_name_that_is_given_exists(document: Path) -> None:
    """Names such as `btu.seeding.derive_seed`, and the imports of the Python blocks."""
    for language, content in code(document.read_text()):
        if language == "python":
            imports = [line for line in content.splitlines() if re.match(r"(from|import) ", line)]
            exec("\n".join(imports), {})
        called = content.partition("(")[0]
        if re.fullmatch(r"(btu|orchestrator)(\.\w+)+", called):
            _resolve(called)


def _resolve(name: str) -> None:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # Only what is not a module is an attribute; a missing package is an error.
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return
    raise AssertionError(f"{name} does not exist")


def file_map() -> Iterator[tuple[Path, str]]:
    """Yield the entries of the README's map: a path and its description."""
    folder = Path()
    for line in block("tree").splitlines():
        name, _, about = line.strip().partition(" ")
        folder = folder if line.startswith(" ") else Path(name)
        yield (folder / name if line.startswith(" ") else folder), about.strip()


def test_the_file_map_is_right_and_names_every_folder() -> None:
    mapped = dict(file_map())
    assert [str(path) for path in mapped if not (ROOT / path).exists()] == []
    assert all(mapped.values())
    folders = {
        file.parent.relative_to(ROOT)
        for package in ("btu", "orchestrator")
        for file in (ROOT / package).glob("*/__init__.py")
    }
    folders |= {
        Path(name) for name in ("deploy", "sweeps", "benchmarks", "tests", "docs", "docs/figures")
    }
    assert sorted(map(str, folders - set(mapped))) == []


# Commands and options ---------------------------------------------------------------------------


def _all_commands() -> dict[str, Any]:
    """Return the commands of `btu` by name; those of `btu store` as "store ls"."""
    root = typer.main.get_command(app)
    found: dict[str, Any] = {"": root}
    for name, command in root.commands.items():
        found[name] = command
        # `btu store` is a group of commands.
        found |= {f"{name} {part}": c for part, c in getattr(command, "commands", {}).items()}
    return found


COMMANDS = _all_commands()
# Every command has it.
HELP = {"-h", "--help"}


def options_of(name: str) -> set[str]:
    parameters = COMMANDS[name].params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | HELP


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_command_and_option_that_is_named_exists(document: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in shell_lines(document.read_text()):
        program, *words = shlex.split(line.replace("\\|", "|"))
        if program == "make":
            assert words[0] in targets or "=" in words[0], line
        elif program == "python" and words[0].startswith("benchmarks/"):
            # Every benchmark has the options of this one, too.
            text = (ROOT / words[0]).read_text() + (ROOT / "benchmarks/figures.py").read_text()
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), line
        elif program == "btu" and "..." not in words[0]:
            for name in _names(words):
                assert name in COMMANDS, line
                given = {word.partition("=")[0] for word in words if word.startswith("-")}
                assert given <= options_of(name), line


def _names(words: list[str]) -> list[str]:
    """Return the commands that a line calls: `btu store ls|du` calls two."""
    if words[0].startswith("-"):
        return [""]
    if words[0] == "store" and len(words) > 1:
        return [f"store {part}" for part in words[1].split("|")]
    return [words[0]]


def test_the_page_of_commands_agrees_with_help() -> None:
    """Every command has a section, and a section's options are those of its commands."""
    page = (ROOT / "docs/commands.md").read_text()
    head, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    shared = set(re.findall(r"--?[a-z][\w-]*", " ".join(_inline(head))))
    described: set[str] = set()
    for section in sections:
        title = section.splitlines()[0]
        names = [name for name in COMMANDS if name.split(" ")[0] in re.findall(r"\w+", title)]
        assert names, title
        described |= set(names)
        own = set().union(*(options_of(name) for name in names))
        told = set(re.findall(r"(?<!\w)--?[a-z][\w-]*", " ".join(_inline(section))))
        assert sorted(told - own) == [], title
        assert sorted(option for option in own - told - shared if option[1] == "-") == [], title
    assert sorted(set(COMMANDS) - described - {""}) == []
    assert options_of("") <= shared | HELP


def _inline(text: str) -> list[str]:
    return [content for language, content in code(text) if language == "`"]


# Running ----------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path, tiny_corpus: Corpus, victim_folder: Callable[[str], Path]) -> Path:
    """A folder in which the README's commands find what they name, all of it tiny."""
    roles = {"train": tiny_corpus.train, "validation": tiny_corpus.eval, "test": tiny_corpus.clean}
    (tmp_path / "data/sst2").mkdir(parents=True)
    for name, rows in roles.items():
        table = pd.DataFrame({"text": rows.texts, "label": rows.labels, **rows.columns})
        table.to_csv(tmp_path / f"data/sst2/{name}.csv", index=False)
    for name, role in (("reviews", "train"), ("trusted", "test")):
        table = pd.DataFrame({"review": roles[role].texts, "stars": roles[role].labels})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "sweeps").mkdir()
    _write_tiny(block("yaml"), tmp_path / "my-sweep.yaml", victim_folder("bert"))
    for file in ROOT.glob("sweeps/*.yaml"):
        _write_tiny(file.read_text(), tmp_path / "sweeps" / file.name, victim_folder("bert"))
    return tmp_path


def _write_tiny(text: str, file: Path, victim: Path) -> None:
    """Write a sweep with a tiny victim, one epoch, few rows, and two values of its defense's axes.

    All other axes have one value, so that the sweep has two cells and their controls.
    """
    tree = yaml.safe_load(text)
    tree["victim"] = {"name": str(victim), "max_length": 32}
    tree["data"] |= {"max_train_rows": 200, "max_clean_rows": 40, "max_eval_rows": 40}
    tree["train"]["epochs"] = 1
    for key, values in tree["grid"].items():
        tree["grid"][key] = values[: 2 if key.startswith("defense.") else 1]
    file.write_text(yaml.safe_dump(tree))


def run(command: str, folder: Path) -> str:
    """Run a command as written, with this environment's programs; return its output."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": programs},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def test_every_command_that_is_left_out_is_in_the_readme() -> None:
    assert set(NOT_RUN) <= set(readme_commands())
    assert all(NOT_RUN.values())


def test_the_readme_shows_a_sweep_that_can_run(workspace: Path) -> None:
    """The YAML block itself, in full: 2 attacks x 2 rates x 3 thresholds x 3 seeds = 36 cells."""
    (workspace / "my-sweep.yaml").write_text(block("yaml"))
    said = run("btu plan my-sweep.yaml controls=[]", workspace)
    assert "36 cells: 0 done, 36 to run, 0 failed earlier; 0 refused" in said


# What these read is what the launch before them has made: they run in its folder.
READERS = ("btu status ", "btu report ", "btu curves ", "btu store ")


def groups() -> list[list[str]]:
    """Return the README's commands that can run; a launch has those that read its results."""
    found: list[list[str]] = []
    for command in readme_commands():
        if command.startswith(READERS):
            # Not the last group, which may be a command between the two.
            next(g for g in reversed(found) if g[0].startswith("btu launch ")).append(command)
        elif command not in NOT_RUN:
            found.append([command])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("group", groups(), ids=lambda group: group[0].replace("/", " "))
def test_the_readme_s_commands_run_as_written(group: list[str], workspace: Path) -> None:
    said = {command: run(command, workspace) for command in group}
    if group[0].startswith("btu launch "):
        assert "0 failed, 0 not run" in said[group[0]]
    for command, file in (
        ("btu report threshold-figure --figures figures", "figures/curves.png"),
        ("btu scan data/sst2 --top 5", "runs/scan"),
    ):
        assert command not in group or (workspace / file).exists()


def test_the_groups_are_all_commands_but_those_left_out() -> None:
    ran = [command for group in groups() for command in group]
    assert sorted(ran) == sorted(c for c in readme_commands() if c not in NOT_RUN)
    assert sum(group[0].startswith("btu launch ") for group in groups()) == 3


def test_the_readme_s_snippet_runs_as_written(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(block("python"))
    said = run("python snippet.py", tmp_path)
    found = re.fullmatch(r"(\d+) of (\d+) rows carry the trigger\n", said)
    assert found, said
    # poison_rate=0.05, to the nearest row
    assert abs(int(found[1]) - 0.05 * int(found[2])) <= 0.5
