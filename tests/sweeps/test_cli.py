"""The command line: help by example, lists, and mistakes that end in a message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import btu
from btu.attacks.addsent import AddSent
from btu.data import DATASETS
from btu.defense import DEFENSES
from btu.metrics import METRICS
from btu.poisoning import ATTACKS
from btu.victims import VICTIMS

COMMANDS = ("plan", "trial", "launch", "report", "list", "ui")


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# Help ------------------------------------------------------------------------------------------


def test_help_names_every_command_and_a_first_sweep(run_cli: Callable[..., Any]) -> None:
    done = run_cli("--help")
    assert done.code == 0
    assert all(f" {command} " in done.out for command in COMMANDS)
    assert "btu launch sweeps/quickstart.yaml" in done.out
    assert "train.epochs=1 'grid.seed=[0,1]'" in done.out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command_shows_an_example(
    run_cli: Callable[..., Any], command: str, flag: str
) -> None:
    done = run_cli(command, flag)
    assert done.code == 0
    assert f"Example: btu {command} " in done.out


def test_no_arguments_show_the_help(run_cli: Callable[..., Any]) -> None:
    done = run_cli()
    assert "btu launch sweeps/quickstart.yaml" in done.out + done.err


def test_the_version_is_the_package_version(run_cli: Callable[..., Any]) -> None:
    assert run_cli("--version") == (0, f"btu {btu.__version__}", "")


def test_the_files_that_help_names_exist(run_cli: Callable[..., Any]) -> None:
    out = " ".join(run_cli(c, "--help").out for c in COMMANDS) + run_cli("--help").out
    named = set(re.findall(r"sweeps/\w+\.yaml", out))
    assert named
    assert [name for name in named if not Path(name).is_file()] == []


# Lists -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("attacks", ATTACKS),
        ("defenses", DEFENSES),
        ("victims", VICTIMS),
        ("datasets", DATASETS),
        ("metrics", METRICS),
    ],
)
def test_a_list_has_every_name(run_cli: Callable[..., Any], kind: str, names: Any) -> None:
    done = run_cli("list", kind)
    assert done.code == 0
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", done.out)] == []


def test_attacks_and_defenses_are_listed_with_their_own_keys() -> None:
    done = shell("list", "attacks")
    assert "trigger (['cf'])" in done.stdout
    assert f"sentence ({AddSent().sentence})" in " ".join(done.stdout.split())
    assert "poison_rate" not in done.stdout  # every attack has it
    defenses = " ".join(shell("list", "defenses").stdout.split())
    assert "preset (default|reference)" in defenses
    assert "alpha (0.0005)" in defenses


def test_metrics_are_listed_with_their_better_direction() -> None:
    lines = shell("list", "metrics").stdout.splitlines()
    (asr,) = [line for line in lines if re.search(r"│ asr +│", line)]
    (cacc,) = [line for line in lines if re.search(r"│ cacc +│", line)]
    assert "lower" in asr
    assert "higher" in cacc


def test_lists_do_not_pay_for_torch() -> None:
    code = (
        "import sys\nsys.argv = ['btu', 'list', 'attacks']\n"
        "from orchestrator.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_kind_is_refused(run_cli: Callable[..., Any]) -> None:
    done = run_cli("list", "atacks")
    assert done.code == 2
    assert "attacks" in done.err


# Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "gone.yaml"), "error: sweep file gone.yaml does not exist"),
        (("launch", "gone.yaml"), "error: sweep file gone.yaml does not exist"),
        (("trial", "gone.yaml"), "error: sweep file gone.yaml does not exist"),
        (("report", "gone"), "error: unknown sweep in runs 'gone'"),
        (("ui",), "error: runs/mlflow.db does not exist: no sweep has run"),
        (("ui", "-o", "else"), "error: else/mlflow.db does not exist"),
    ],
)
def test_a_mistake_ends_in_a_message(
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(
    make_sweep: Callable[..., Path],
) -> None:
    done = shell("plan", make_sweep(), "attack.poison_rat=1")
    assert done.returncode == 2
    assert "did you mean 'attack.poison_rate'?" in done.stderr
    assert "Traceback" not in done.stderr
    # One line, whatever the width of the terminal: it can be searched and pasted.
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_message_keeps_its_brackets(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    done = run_cli("plan", make_sweep(), "attack.poison_rate=1.5")
    assert "attack.poison_rate must be in [0, 1], got 1.5." in done.err


def test_an_unwritable_output_folder_is_refused_before_anything_runs(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("launch", make_sweep(), f"output={tmp_path / 'file'}/out")
    assert done.code == 2
    assert "cannot be written" in done.err
    assert "set output=FOLDER" in done.err


# plan ------------------------------------------------------------------------------------------


def test_plan_shows_what_would_run_and_what_cannot(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"attack.poison_rate": [0.1, 0.9], "seed": [0, 0]})
    done = run_cli("plan", sweep)
    assert done.code == 0
    assert "1 cells: 0 done, 1 to run; 2 refused; 1 duplicates folded." in done.out
    assert (
        "needs 72 of 80" in done.out.replace("│", " ").replace("  ", " ") or "refused" in done.out
    )
    assert not (tmp_path / "runs").exists()  # it only looks


def test_plan_knows_what_is_done_and_what_failed(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    from orchestrator.config import load_sweep
    from orchestrator.plan import plan_sweep
    from orchestrator.store import RESULT, ResultStore

    sweep = load_sweep(make_sweep(grid={"seed": [0, 1, 2]}))
    store = ResultStore(sweep.folder)
    store.prepare()
    first, second, _ = plan_sweep(sweep).cells
    store.path(first.key).mkdir()
    (store.path(first.key) / RESULT).write_text("{}")
    store.commit_failure({"key": second.key, "reason": "bad luck"})
    done = run_cli("plan", sweep.output.parent / "tiny.yaml")
    assert "3 cells: 1 done, 2 to run; 0 refused" in done.out
    assert re.search(r"seed=0 +│ done", done.out)
    assert re.search(r"seed=1 +│ failed, runs again", done.out)
    assert re.search(r"seed=2 +│ to run", done.out)


def test_plan_shows_values_that_look_like_markup(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    done = run_cli("plan", make_sweep(grid={"attack.trigger": [["cf"], ["[/b]"], ["[red]x"]]}))
    assert done.code == 0
    assert "[/b]" in done.out
    assert "[red]x" in done.out


# trial -----------------------------------------------------------------------------------------


def test_a_trial_of_many_cells_tells_how_to_pin_one(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    sweep = make_sweep(grid={"attack.name": ["badnets", "style"], "seed": [0, 1]})
    done = run_cli("trial", sweep)
    assert done.code == 2
    assert f"btu trial {sweep} attack.name=badnets seed=0" in done.err


def test_the_pins_that_a_trial_names_work(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    # Lists among them: what is printed must be what can be typed.
    sweep = make_sweep(
        grid={"defense.alpha": [[0.01, 0.02, 0.03], 0.01], "attack.trigger": [["cf", "mn"], ["cf"]]}
    )
    suggestion = run_cli("trial", sweep).err.split("btu trial ")[1]
    done = shell_line(f"plan {suggestion}")
    assert done.returncode == 0, done.stderr
    assert "1 cells" in done.stdout


def shell_line(line: str) -> subprocess.CompletedProcess[str]:
    """Run ``btu <line>`` as typed into a shell."""
    return subprocess.run(
        f"{sys.executable} -m orchestrator.cli {line}",
        shell=True,
        executable="/bin/sh",
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_pinned_trial_prints_its_metrics_and_tokens(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"attack.name": ["badnets", "style"]})
    done = run_cli("trial", sweep, "attack.name=badnets")
    assert done.code == 0, done.err
    assert re.search(r"│ asr +│ [\d.]+", done.out)
    assert re.search(r"\d+ tokens flagged: \S+", done.out)
    assert "poisoned fine-tune 2/2 loss" in done.out
    assert not (tmp_path / "runs").exists()  # kept in memory only


def test_any_cell_of_a_grid_can_be_pinned(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    # The file sets a key of badnets; pinning another attack of its grid must still work.
    sweep = make_sweep(
        grid={"attack.name": ["badnets", "addsent", "style"]}, attack={"trigger": ["cf"]}
    )
    for name in ("badnets", "addsent", "style"):
        done = run_cli("plan", sweep, f"attack.name={name}")
        assert done.code == 0, done.err
        assert "1 cells: 0 done, 1 to run" in done.out


def test_a_trial_that_diverges_ends_in_a_message(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    done = run_cli("trial", make_sweep(), "train.learning_rate=1e30")
    assert done.code == 2
    assert "lower the learning rate" in done.err


# report ----------------------------------------------------------------------------------------


def test_an_unknown_sweep_names_the_closest(
    run_cli: Callable[..., Any], stored: Any, tmp_path: Path
) -> None:
    done = run_cli("report", "tinny", "-o", tmp_path / "runs")
    assert done.code == 2
    assert "did you mean 'tiny'?" in done.err


def test_a_sweep_without_results_says_so(
    run_cli: Callable[..., Any], stored: Any, tmp_path: Path
) -> None:
    import shutil

    shutil.rmtree(stored.store.path("k"))
    done = run_cli("report", "tiny", "-o", tmp_path / "runs")
    assert done.code == 2
    assert "sweep 'tiny' has no finished cell yet" in done.err


@pytest.mark.parametrize("style", ["table", "csv", "json", "markdown", "latex"])
def test_a_report_prints_in_every_format(
    run_cli: Callable[..., Any], stored: Any, tmp_path: Path, style: str
) -> None:
    done = run_cli("report", "tiny", "-f", style, "--output", tmp_path / "runs")
    assert done.code == 0, done.err
    assert "badnets" in done.out
    assert done.err == ""


def test_a_report_as_json_is_json_alone(
    run_cli: Callable[..., Any], stored: Any, tmp_path: Path
) -> None:
    stored.store.commit_failure({"key": "other", "reason": "r"})
    done = run_cli("report", "tiny", "-f", "json", "-o", tmp_path / "runs", "--mean")
    (row,) = json.loads(done.out)
    assert row["asr"] == pytest.approx(stored.record["metrics"]["asr"])
    assert row["seeds"] == 1
    # What is missing from the table is told beside it, not in it.
    assert "1 failed cells are not in the table" in done.err


def test_an_unknown_format_is_refused(run_cli: Callable[..., Any]) -> None:
    done = run_cli("report", "x", "-f", "xml")
    assert done.code == 2
    assert "markdown" in done.err


# ui --------------------------------------------------------------------------------------------


def test_the_ui_serves_the_sweeps_store(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator import tracking

    served = []
    monkeypatch.setattr(tracking, "serve_ui", lambda uri, port: served.append((uri, port)) or 0)
    (tmp_path / "mlflow.db").write_text("")
    done = run_cli("ui", "-o", tmp_path, "--port", 5001)
    assert done.code == 0
    assert served == [(f"sqlite:///{tmp_path / 'mlflow.db'}", 5001)]
    assert "http://127.0.0.1:5001" in done.out


def test_the_ui_of_a_server_points_at_it(run_cli: Callable[..., Any]) -> None:
    done = run_cli("ui", "--uri", "http://host:5000")
    assert done.code == 0
    assert "http://host:5000 is a running MLflow server" in done.out


# launch, with the running itself left out (see test_launch.py) ----------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that says how every launch of the test ends; no Ray is started."""

    def ends(done: int, failed: dict[str, str], missing: int) -> None:
        result = SimpleNamespace(
            done=done,
            failed=failed,
            missing=missing,
            seconds=5.0,
            complete=not failed and not missing,
        )
        module: Any = ModuleType("orchestrator.launch")
        module.launch = lambda *_: result
        monkeypatch.setitem(sys.modules, "orchestrator.launch", module)

    return ends


def test_a_launch_ends_with_commands_that_can_be_pasted(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    launched: Callable[..., None],
    tmp_path: Path,
) -> None:
    launched(done=1, failed={}, missing=0)
    output = tmp_path / "a-folder-with-a-long-name" / "and-another-one-below-it" / "runs"
    done = run_cli("launch", make_sweep(), f"output={output}")
    assert done.code == 0
    assert f"btu report tiny --output {output}" in done.out
    assert f"btu ui --output {output}" in done.out


@pytest.mark.parametrize(
    ("failed", "missing", "message"),
    [
        ({"k": "loss became [nan]\nmore"}, 0, "0 of 1 cells done, 1 failed, 0 not run, in 5 s"),
        ({}, 1, "0 of 1 cells done, 0 failed, 1 not run, in 5 s"),
    ],
)
def test_a_launch_that_is_not_complete_exits_with_1(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    launched: Callable[..., None],
    failed: dict[str, str],
    missing: int,
    message: str,
) -> None:
    launched(done=0, failed=failed, missing=missing)
    done = run_cli("launch", make_sweep())
    assert done.code == 1
    assert message in done.out
    assert "the same command goes on where this one stopped" in done.out
    if failed:
        assert "failed: k: loss became [nan]" in done.out
        assert "failed/k.json" in done.out
        assert "more" not in done.out


def test_a_launch_names_the_cells_that_it_refuses(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], launched: Callable[..., None]
) -> None:
    launched(done=1, failed={}, missing=0)
    done = run_cli("launch", make_sweep(grid={"attack.poison_rate": [0.1, 0.9]}))
    assert done.code == 0  # what can run is done
    assert "refused: poison_rate=0.9: attack.poison_rate 0.9 needs 72 of 80" in done.out
