"""The command line: help by example, lists, and mistakes that end in a message."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from rich.filesize import decimal
from store_fixtures import Stored

import btu
from btu.attacks.addsent import AddSent
from btu.attacks.poisoning import ATTACKS
from btu.data.spec import DATASETS
from btu.defenses.base import DEFENSE_KINDS, DEFENSES
from btu.defenses.kit import cutting
from btu.defenses.kit.cutting import Costs
from btu.metrics import METRICS
from btu.rules.base import RULES
from btu.victims import VICTIMS
from orchestrator.plan.work import SMALL_BYTES

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan, Planner
    from orchestrator.sweep.sweep import Sweep

COMMANDS = ("scan", "plan", "trial", "launch", "sync", "report", "list", "ui")
STORE_COMMANDS = ("ls", "du", "verify", "gc")


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


def test_the_help_of_a_launch_teaches_refinement(run_cli: Callable[..., Any]) -> None:
    out = run_cli("launch", "--help").out
    assert "--refine asr --refine cacc --refine-trials 40" in out
    assert "Default: 24" in out


@pytest.mark.parametrize("command", STORE_COMMANDS)
def test_the_store_has_commands_of_its_own(run_cli: Callable[..., Any], command: str) -> None:
    assert f" btu store {command} " in run_cli("store", "--help").out
    done = run_cli("store", command, "-h")
    assert done.code == 0
    assert re.search(rf"Examples?: +btu store {command} ", done.out)


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
        ("rules", RULES),
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
    assert "preset (default | reference)" in defenses
    # As resolved: what a sweep file without these keys runs.
    assert "rule (contrast), threshold (4.5), fdr (None), alpha (None), rounds ([3])" in defenses
    assert re.search(r"max_cut_cost (│ │ )?\(0\.02\)", defenses)  # lines may break there


def test_defenses_are_listed_with_kind_and_needs() -> None:
    lines = shell("list", "defenses", COLUMNS="100").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    told: dict[str, list[list[str]]] = {}
    name = ""
    for line in lines:
        cells = [cell.strip() for cell in line.strip("│┃").split("│")]
        if not line.startswith("│"):
            continue
        # A row goes over several lines where its words do not fit.
        if cells[0]:
            name = cells[0]
            told.setdefault(name, []).append(cells[1:])
        else:
            row = told[name][-1]
            told[name][-1] = [f"{a} {b}".strip() for a, b in zip(row, cells[1:], strict=True)]
    assert set(told) == set(DEFENSES)
    for name in DEFENSES:
        defense = DEFENSES.load(name)
        (kind, needs, _), (keys,) = told[name]
        assert kind == defense.KIND
        assert needs == ", ".join(defense.NEEDS)
        assert (keys == "-") == (not dataclasses.fields(defense))
    assert told["bki"][1] == [
        "preset (default | reference), rows (1000), top_words (5), keywords (1), share (0.1)"
    ]
    # When they act: before, during, after training, at inference, control.
    kinds = [list(DEFENSE_KINDS).index(DEFENSES.load(name).KIND) for name in told]
    assert kinds == sorted(kinds)


def test_rules_are_listed_with_threshold_unit_and_rounds() -> None:
    done = shell("list", "rules")
    assert done.returncode == 0, done.stderr
    # A row goes over several lines where its words do not fit.
    rows: list[list[str]] = []
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if not line.startswith("│"):
            continue
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
    told = {name: rest for name, _, *rest in rows}
    assert told["contrast"] == ["4.5", "sigmas of surplus, weighted by drift", "3"]
    assert told["top_fraction"] == [
        "0.0005", "the share of the vocabulary that a round flags", "1, 2, 3"
    ]  # fmt: skip


def test_metrics_are_listed_with_their_better_direction() -> None:
    lines = shell("list", "metrics").stdout.splitlines()
    (asr,) = [line for line in lines if re.search(r"│ asr +│", line)]
    (cacc,) = [line for line in lines if re.search(r"│ cacc +│", line)]
    assert "lower" in asr
    assert "higher" in cacc


@pytest.mark.parametrize("kind", ["attacks", "rules"])
def test_lists_do_not_pay_for_torch(kind: str) -> None:
    code = (
        f"import sys\nsys.argv = ['btu', 'list', '{kind}']\n"
        "from orchestrator.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_without_what_a_command_imports() -> None:
    code = (
        "import sys, orchestrator.cli.main\n"
        "heavy = {'numpy', 'omegaconf', 'pandas', 'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
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
        (("sync", "gone"), "error: unknown sweep in runs 'gone' (known: none); launch it first."),
        (("store", "ls"), "runs/store does not exist: no sweep has run with this output folder"),
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


@pytest.fixture
def launched_plan(
    make_sweep: Callable[..., Path], planner: Planner
) -> Callable[..., tuple[Path, Sweep, Plan]]:
    """A function from a grid to its sweep file, the sweep and its plan."""
    from orchestrator.plan.planner import plan_sweep
    from orchestrator.sweep.load import load_sweep

    def build(**grid: list[Any]) -> tuple[Path, Sweep, Plan]:
        path = make_sweep(grid={key.replace("__", "."): v for key, v in grid.items()})
        sweep = load_sweep(path)
        return path, sweep, plan_sweep(sweep, planner)

    return build


def store_of(sweep: Sweep) -> Any:
    from orchestrator.store.store import Store

    store = Store(sweep.store_location)
    store.prepare()
    return store


def commit(store: Any, *stages: Any) -> None:
    for stage in stages:
        store.publish(stage.key, store.workspace(stage.key), stage.name, {})


def a_second_each(plan: Plan) -> list[dict[str, Any]]:
    """Return timings by which each stage of a plan takes a second."""
    stages = {s.name: s for cell in plan.cells.values() for s in cell.stage.closure()}
    return [
        {"stage": name, "victim": "", "device": "cpu", "units": stage.units, "seconds": 1.0,
         "count": 1}
        for name, stage in stages.items()
    ]  # fmt: skip


def test_plan_shows_what_would_run_and_what_cannot(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"attack.poison_rate": [0.1, 0.9], "seed": [0, 0]})
    done = run_cli("plan", sweep)
    assert done.code == 0
    assert "1 cell: 0 done, 1 to run, 0 failed earlier; 2 refused, 1 duplicates folded." in done.out
    assert "search: grid attack.poison_rate x seed = 4 cells" in done.out
    assert "data tiny: rows train 80, rows clean 20, rows eval 30" in done.out
    assert re.search(r"poison_rate=0.9 seed=0 +│ refused: ", done.out)
    assert not (tmp_path / "runs").exists()  # it only looks


def test_plan_says_how_many_cells_are_controls(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    sweep = make_sweep(grid={"seed": [0, 1]}, controls=["no_poison", "no_defense"])
    done = run_cli("plan", sweep)
    # Each seed has both.
    assert "6 cells, 4 of them controls: 0 done, 6 to run, 0 failed earlier; 0 ref" in done.out
    assert "search: grid seed = 2 cells" in done.out
    assert "seed=1 poison_rate=0.0 control=no_poison" in done.out
    assert "seed=1 control=no_defense" in done.out
    done = run_cli("plan", sweep, "controls=[]")
    assert "2 cells: 0 done, 2 to run" in done.out


def test_plan_knows_what_is_done_and_what_failed(
    run_cli: Callable[..., Any], launched_plan: Callable[..., Any]
) -> None:
    path, sweep, plan = launched_plan(seed=[0, 1, 2, 3])
    first, second, third, _ = (cell.stage for cell in plan.cells.values())
    store = store_of(sweep)
    commit(store, first)
    store.fail(second.key, {"key": second.key, "stage": "cell", "reason": "bad luck\nTraceback"})
    shared = third.inputs["poison"]
    store.fail(shared.key, {"key": shared.key, "stage": "poison", "reason": "no [0, 1] rows"})
    done = run_cli("plan", path)
    assert "4 cells: 1 done, 1 to run, 2 failed earlier; 0 refused" in done.out
    assert re.search(r"seed=0 +│ done", done.out)
    assert re.search(r"seed=1 +│ failed: bad luck │", done.out)
    assert re.search(r"seed=2 +│ failed: stage 'poison' failed:", done.out)
    assert re.search(r"seed=3 +│ to run", done.out)


@pytest.mark.parametrize(
    ("limit", "shown", "more"),
    [
        (2, 2, "... and 2 more cells (--cells 0 shows all)"),
        (3, 3, "... and 1 more cell (--cells 0 shows all)"),
        (0, 4, ""),
    ],
)
def test_plan_shows_as_many_cells_as_asked_refused_ones_first(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    limit: int,
    shown: int,
    more: str,
) -> None:
    sweep = make_sweep(grid={"attack.poison_rate": [0.1, 0.15, 0.2, 0.9]})
    done = run_cli("plan", sweep, "--cells", limit)
    assert len(re.findall(r"│ poison_rate=", done.out)) == shown
    assert "poison_rate=0.9" in done.out
    assert more in done.out
    assert ("more cell" in done.out) == bool(more)


def test_plan_refuses_to_show_fewer_cells_than_none(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    done = run_cli("plan", make_sweep(), "--cells", -1)
    assert done.code == 2
    assert "greater than or equal to 0" in done.err or "x>=0" in done.err


def test_plan_counts_what_sharing_saves(
    run_cli: Callable[..., Any], launched_plan: Callable[..., Any]
) -> None:
    path, _, _ = launched_plan(seed=[0, 1], defense__alpha=[0.01, 0.05])
    done = run_cli("plan", path)
    # A cell has 17 stages; alpha reaches 5 of them, the seed all but the clean rows:
    # 1 + 11 x 2 + 5 x 4 instead of 17 x 4.
    assert "Sharing: 43 stages instead of 68. Time: unknown until each kind of stage" in done.out
    assert re.search(r"│ poisoned fine-tune +│ 2 +│ 4 +│", done.out)
    assert re.search(r"│ unlearn +│ 4 +│ 4 +│", done.out)


def test_plan_says_what_equal_flags_may_save(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    # Each alpha has a round 2 of its own.
    assert "up to" not in run_cli("plan", make_sweep(grid={"defense.alpha": [0.01, 0.05]})).out
    grid = {"defense.threshold": [3.5, 4.5, 6]}
    done = run_cli("plan", make_sweep(grid=grid, defense={"alpha": None}))
    # Three unlearnings and three evaluations, of which one each may be enough.
    assert "and up to 4 fewer where thresholds flag the same tokens. Time" in done.out


def test_plan_tells_the_time_once_stages_were_measured(
    run_cli: Callable[..., Any],
    launched_plan: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path, sweep, plan = launched_plan(seed=[0, 1], defense__alpha=[0.01, 0.05])
    store_of(sweep).add_timings("earlier", a_second_each(plan))
    done = run_cli("plan", path)
    # 1 - 43 / 68 = 37 % less
    assert (
        "Sharing: 43 stages instead of 68; 43 s of computing instead of 1 min 08 s, 37% less."
        in done.out
    )
    # On 2 CPUs 43 / 2; poison, training rows, rounds 1 and 2, flags, unlearn, evaluate, cell: 8.
    assert "Time: about 22 s with 2 at once, as on this machine; not under 8 s" in done.out
    # Twice the CPUs a stage: one at a time.
    again = run_cli("plan", path, "resources.cpu=2")
    assert "Time: about 43 s with 1 at once" in again.out


def test_plan_is_not_faster_than_the_longest_chain(
    run_cli: Callable[..., Any],
    launched_plan: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    path, sweep, plan = launched_plan(seed=[0, 1])
    store_of(sweep).add_timings("earlier", a_second_each(plan))
    assert "Time: about 8 s with 64 at once" in run_cli("plan", path).out


def test_plan_tells_the_room_that_models_take(
    run_cli: Callable[..., Any],
    launched_plan: Callable[..., Any],
    victim_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path, _, _ = launched_plan(seed=[0, 1], defense__alpha=[0.01, 0.05])
    weights = (victim_folder("bert") / "model.safetensors").stat().st_size
    # 2 fine-tuned, 2 tuned and 4 unlearned models; of 43 stages the rest. With 2 at once there
    # are at most 4 + 2 models (see `most_models`).
    most, least = 8 * weights + 43 * SMALL_BYTES, 6 * weights + 43 * SMALL_BYTES
    assert (
        f"Disk: about {decimal(least)} at most at once; {decimal(most)} with store.keep=models."
        in run_cli("plan", path).out
    )
    kept = run_cli("plan", path, "store.keep=models")
    assert f"Disk: about {decimal(most)} with every model kept (store.keep=models)." in kept.out


def test_plan_names_the_models_whose_size_it_cannot_know(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    done = run_cli("plan", make_sweep(victim={"name": "nobody/no-such-model"}))
    assert done.code == 0
    assert "without the models of nobody/no-such-model, which are not here yet." in done.out
    assert "without the models" not in run_cli("plan", make_sweep()).out


def test_plan_says_no_more_where_nothing_is_left(
    run_cli: Callable[..., Any], launched_plan: Callable[..., Any]
) -> None:
    path, sweep, plan = launched_plan(seed=[0])
    commit(store_of(sweep), *(cell.stage for cell in plan.cells.values()))
    done = run_cli("plan", path)
    assert "1 cell: 1 done, 0 to run" in done.out
    assert "Sharing" not in done.out
    assert "Disk" not in done.out


def test_plan_of_a_search_shows_one_suggestion(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    optuna = {"trials": 7, "space": {"defense.alpha": {"low": 0.01, "high": 0.05}}}
    done = run_cli("plan", make_sweep(grid={"seed": [0, 1]}, optuna=optuna))
    assert done.code == 0
    assert "one suggestion, as an example" in done.out
    assert "search: optuna: up to 7 suggestions x 2 cells" in done.out
    assert "alpha=0.01 seed=1" in done.out


def test_a_dry_run_is_a_plan(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"seed": [0, 1]})
    dry = run_cli("launch", sweep, "--dry-run")
    assert dry == run_cli("plan", sweep)
    assert dry.code == 0
    assert "2 cells: 0 done, 2 to run" in dry.out
    assert not (tmp_path / "runs").exists()


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
    assert "1 cell:" in done.stdout


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
    # Controls are not part of it.
    sweep = make_sweep(grid={"attack.name": ["badnets", "style"]}, controls=["no_defense"])
    done = run_cli("trial", sweep, "attack.name=badnets")
    assert done.code == 0, done.err
    assert re.search(r"│ asr +│ [\d.]+", done.out)
    assert re.search(r"\d+ tokens flagged: \S+", done.out)
    assert "poisoned fine-tune 2/2 loss" in done.out
    assert not (tmp_path / "runs").exists()  # a folder of its own, gone again


def test_a_trial_says_which_flagged_tokens_are_not_cut(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Any, model: Any, cutter: Any, flagged: list[int], bar: float) -> Costs:
        return Costs({flagged[0]: 0.5}, {flagged[0]: 0.35}, (flagged[0],))

    monkeypatch.setattr(cutting, "costs_of", refuse)
    done = run_cli("trial", make_sweep(), "defense.max_cut_cost=0.02")
    assert done.code == 0, done.err
    assert re.search(
        r"\d+ tokens flagged: \S.* 1 of them not cut, since the cut costs more than "
        r"defense\.max_cut_cost 0\.02 of the clean rows after clean tuning: \S+ 0\.35$",
        done.out,
    )


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
        assert "1 cell: 0 done, 1 to run, 0 failed earlier" in done.out


def test_a_trial_that_diverges_ends_in_a_message(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path]
) -> None:
    done = run_cli("trial", make_sweep(), "train.learning_rate=1e30")
    assert done.code == 2
    assert "lower the learning rate" in done.err


# report ----------------------------------------------------------------------------------------


def test_an_unknown_sweep_names_the_closest(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path
) -> None:
    done = run_cli("report", "tinny", "-o", tmp_path / "runs")
    assert done.code == 2
    assert "did you mean 'tiny'?" in done.err


def test_a_sweep_without_results_says_so(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "runs" / "store")
    done = run_cli("report", "tiny", "-o", tmp_path / "runs")
    assert done.code == 2
    assert "sweep 'tiny' has no finished cell yet" in done.err


@pytest.mark.parametrize("style", ["table", "csv", "json", "markdown", "latex"])
def test_a_report_prints_in_every_format(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path, style: str
) -> None:
    _unmarked(stored)
    done = run_cli("report", "tiny", "-f", style, "--output", tmp_path / "runs")
    assert done.code == 0, done.err
    assert "badnets" in done.out
    assert done.err == ""


def _unmarked(stored: Stored) -> None:
    """Give the tiny cell, on which no attack works, numbers that no guard marks."""
    good = {"undefended_asr": 1.0, "undefended_ftr": 0.1, "cacc": 0.9, "tuned_cacc": 0.9}
    stored.rewrite({**stored.record, "metrics": {**stored.record["metrics"], **good}})


def test_a_report_as_json_is_json_alone(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path
) -> None:
    _unmarked(stored)
    (other,) = [cell for cell in stored.plan.cells.values() if cell.key != stored.key]
    shared = other.stage.inputs["unlearn"]
    failure = {
        "key": shared.key,
        "stage": "unlearn",
        "reason": "bad [1] luck\nmore",
        "code": "0.1+then",
        "started": 0.0,
    }
    stored.store.fail(shared.key, failure)
    done = run_cli("report", "tiny", "-f", "json", "-o", tmp_path / "runs", "--mean")
    (row,) = json.loads(done.out)
    assert row["asr"] == pytest.approx(stored.record["metrics"]["asr"])
    assert row["seeds"] == 1
    # Notes beside the table report what it lacks.
    assert done.err == ("1 failed cells are not in the table: stage 'unlearn' failed: bad [1] luck")


def test_a_report_says_what_speaks_against_its_cells(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path
) -> None:
    metrics = {**stored.record["metrics"], "undefended_asr": 0.1, "cacc": 0.9, "tuned_cacc": 0.9}
    stored.rewrite({**stored.record, "metrics": metrics})
    done = run_cli("report", "tiny", "-f", "csv", "-o", tmp_path / "runs")
    assert done.out.endswith(",attack failed")
    assert done.err == (
        "1 cell: attack failed (undefended ASR under 0.5, or less than 0.25 above FTR): ASR there "
        "says nothing about a defense"
    )


def test_a_report_says_what_it_had_to_set_aside(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path
) -> None:
    (stored.folder / "result.json").write_text("{}")
    done = run_cli("report", "tiny", "-o", tmp_path / "runs")
    assert done.code == 2
    assert f"The stored result {stored.key} is damaged" in done.err
    assert "has no finished cell yet" in done.err


def test_an_unknown_format_is_refused(run_cli: Callable[..., Any]) -> None:
    done = run_cli("report", "x", "-f", "xml")
    assert done.code == 2
    assert "markdown" in done.err


# ui --------------------------------------------------------------------------------------------


VIEWS = {f"sweep-{i}": f"/#/experiments/{i}/runs?viewStateShareKey=btu" for i in range(12)}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str | None]]:
    """What `btu ui` serves, instead of serving it: URI, port and password."""
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import ui

    found: list[tuple[str, int, str | None]] = []
    monkeypatch.setattr(ui, "serve_ui", lambda *asked: found.append(asked) or 0)
    monkeypatch.setattr(experiment_module, "views", lambda uri, _: VIEWS)
    return found


def test_the_ui_serves_the_sweeps_store_behind_a_new_password(
    run_cli: Callable[..., Any],
    served: list[tuple[str, int, str | None]],
    tmp_path: Path,
    free_port: int,
) -> None:
    (tmp_path / "mlflow.db").write_text("")
    done = run_cli("ui", "-o", tmp_path, "--port", free_port)
    assert done.code == 0
    ((uri, port, password),) = served
    assert (uri, port) == (f"sqlite:///{tmp_path / 'mlflow.db'}", free_port)
    assert password is not None
    assert len(password) >= 22  # 128 bits, six a character
    assert f"Log in as btu with the password {password} (until the UI stops)" in done.out
    assert f"MLflow UI: http://127.0.0.1:{free_port}/#/experiments?workflowType" in done.out
    address = f"http://127.0.0.1:{free_port}/#/experiments/9/runs?viewStateShareKey=btu"
    assert f"sweep-9: {address}" in done.out
    assert "sweep-10" not in done.out
    assert "and 2 older sweeps, in the UI's list" in done.out
    run_cli("ui", "-o", tmp_path, "--port", free_port)
    assert served[1][2] not in (None, password)


def test_a_ui_without_a_password_says_whom_it_lets_in(
    run_cli: Callable[..., Any],
    served: list[tuple[str, int, str | None]],
    tmp_path: Path,
    free_port: int,
) -> None:
    (tmp_path / "mlflow.db").write_text("")
    done = run_cli("ui", "-o", tmp_path, "--port", free_port, "--no-auth")
    assert served[0][2] is None
    assert "WARNING: --no-auth lets every user of this machine read all files" in done.err
    assert "password" not in done.out


def test_the_ui_of_a_server_points_at_it(
    run_cli: Callable[..., Any], served: list[tuple[str, int, str | None]]
) -> None:
    done = run_cli("ui", "--uri", "http://me:secret@host:5000/")
    assert done.code == 0
    assert served == []  # it runs already
    assert "a running MLflow server; open it in a browser" in done.out
    assert "sweep-0: http://host:5000/#/experiments/0/runs" in done.out
    assert "secret" not in done.out
    assert "password" not in done.out


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("postgresql://me:secret@host/mlflow", "postgresql://host/mlflow"),
        ("mysql+pymysql://me:secret@host/mlflow", "mysql+pymysql://host/mlflow"),
        ("databricks://me", "databricks://me"),
        ("s3://bucket/runs", "s3://bucket/runs"),
    ],
)
def test_the_ui_serves_local_stores_only(
    run_cli: Callable[..., Any],
    served: list[tuple[str, int, str | None]],
    uri: str,
    named: str,
) -> None:
    done = run_cli("ui", "--uri", uri)
    assert done.code == 2
    assert served == []
    assert f"folders of this machine, not {named}: start an MLflow server for it" in done.err
    assert "secret" not in done.err


def test_the_ui_takes_no_port_at_which_another_process_listens(
    run_cli: Callable[..., Any], served: list[tuple[str, int, str | None]], tmp_path: Path
) -> None:
    # It would be given the password.
    (tmp_path / "mlflow.db").write_text("")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_cli("ui", "-o", tmp_path, "--port", port)
    assert done.code == 2
    assert served == []
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in done.err
    assert "--port" in done.err


# launch, with the running itself left out (see test_launch.py) ----------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets how every launch of the test ends; no Ray is started."""

    def ends(
        done: int,
        failed: dict[str, str],
        missing: int,
        stopped: str = "",
        ray_gone: bool = False,
    ) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        result = SimpleNamespace(
            done=done,
            failed=failed,
            missing=missing,
            seconds=5.0,
            stopped=stopped,
            complete=not failed and not missing,
            ray_gone=ray_gone,
        )

        def run(sweep: Any, plan: Any, *_: object, **options: Any) -> SimpleNamespace:
            # Reasons are by cell: "" means the first one.
            first = next(iter(plan.cells))
            result.failed = {key or first: reason for key, reason in failed.items()}
            calls.append({"sweep": sweep, "plan": plan, **options})
            return result

        module: Any = ModuleType("orchestrator.run.on_ray")
        module.launch = run
        monkeypatch.setitem(sys.modules, "orchestrator.run.on_ray", module)
        return calls

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


def test_a_launch_of_another_server_names_it_without_its_password(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], launched: Callable[..., None]
) -> None:
    launched(done=1, failed={}, missing=0)
    done = run_cli("launch", make_sweep(), "tracking.uri=http://me:secret@host:5000")
    assert "btu ui --uri http://host:5000" in done.out
    assert "secret" not in done.out


def test_a_launch_that_is_tracked_in_a_database_names_no_ui_that_would_refuse_it(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], launched: Callable[..., None]
) -> None:
    launched(done=1, failed={}, missing=0)
    done = run_cli("launch", make_sweep(), "tracking.uri=postgresql://me:secret@host/mlflow")
    assert "Table: btu report tiny" in done.out
    assert "btu ui" not in done.out


def test_a_launch_whose_ray_is_gone_ends_without_waiting_for_it(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    launched: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched(done=0, failed={}, missing=1, stopped="interrupted", ray_gone=True)
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr("orchestrator.cli.launch._end", end)
    done = run_cli("launch", make_sweep())
    assert (done.code, ended) == (1, [1])
    assert "Stopped: interrupted. Not every cell is done; the same command continues" in done.out


def test_the_options_of_a_launch_reach_it(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], launched: Callable[..., Any]
) -> None:
    calls = launched(done=1, failed={}, missing=0)
    sweep = make_sweep()
    run_cli("launch", sweep)
    run_cli("launch", sweep, "--retry-failed", "--max-failures", 3, "--address", "auto")
    given = [{k: call[k] for k in ("retry_failed", "max_failures", "address")} for call in calls]
    assert given == [
        {"retry_failed": False, "max_failures": None, "address": None},
        {"retry_failed": True, "max_failures": 3, "address": "auto"},
    ]
    assert calls[0]["sweep"].name == "tiny"
    assert len(calls[0]["plan"].cells) == 1


def test_what_a_launch_refines_reaches_it(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], launched: Callable[..., Any]
) -> None:
    from orchestrator.run.refine import RefineSpec

    calls = launched(done=2, failed={}, missing=0)
    sweep = make_sweep(grid={"defense.alpha": [0.01, 0.02]})
    run_cli("launch", sweep)
    run_cli("launch", sweep, "--refine", "asr")
    both = ("--refine", "cacc", "--refine", "asr", "--refine", "cacc")
    run_cli("launch", sweep, *both, "--refine-trials", 3)
    assert [call["refine"] for call in calls] == [
        None,
        RefineSpec(("asr",), 24),
        RefineSpec(("cacc", "asr"), 3),
    ]


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({"seed": [0, 1]}, ["--refine", "asr"], "--refine needs an axis of thresholds"),
        ({"seed": [0, 1]}, ["--refine", "asr", "--dry-run"], "--refine needs an axis of thresh"),
        ({"defense.alpha": [0.01, 0.02]}, ["--refine", "auc"], "'auc' is not one of 'asr'"),
        (
            {"defense.alpha": [0.01, 0.02]},
            ["--refine-trials", 9],
            "--refine-trials 9 needs --refine asr or --refine cacc; add one, or leave it out.",
        ),
    ],
)
def test_what_cannot_be_refined_is_refused_before_anything_is_done(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    launched: Callable[..., Any],
    tmp_path: Path,
    grid: dict[str, Any],
    options: list[Any],
    message: str,
) -> None:
    calls = launched(done=2, failed={}, missing=0)
    done = run_cli("launch", make_sweep(grid=grid), *options)
    assert done.code == 2
    assert message in done.err
    assert calls == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("failed", "missing", "message", "how"),
    [
        (
            {"": "loss became [nan]\nmore"},
            0,
            "0 of 1 cells done, 1 failed, 0 not run, in 5 s",
            "what failed stays failed until --retry-failed",
        ),
        (
            {},
            1,
            "0 of 1 cells done, 0 failed, 1 not run, in 5 s",
            "the same command continues where this one stopped",
        ),
    ],
)
def test_a_launch_that_is_not_complete_exits_with_1(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    launched: Callable[..., None],
    failed: dict[str, str],
    missing: int,
    message: str,
    how: str,
) -> None:
    launched(done=0, failed=failed, missing=missing, stopped="the disk is full")
    done = run_cli("launch", make_sweep())
    assert done.code == 1
    assert message in done.out
    assert f"Stopped: the disk is full. Not every cell is done; {how}." in done.out
    if failed:
        assert "failed: the cell: loss became [nan]" in done.out
        assert "more" not in done.out


def test_of_many_failures_the_first_are_told(
    run_cli: Callable[..., Any],
    make_sweep: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(sweep: Any, plan: Any, *_: object, **__: object) -> SimpleNamespace:
        failed = dict.fromkeys(plan.cells, "bad luck")
        return SimpleNamespace(
            done=0,
            failed=failed,
            missing=0,
            seconds=1.0,
            stopped="",
            complete=False,
            ray_gone=False,
        )

    module: Any = ModuleType("orchestrator.run.on_ray")
    module.launch = run
    monkeypatch.setitem(sys.modules, "orchestrator.run.on_ray", module)
    done = run_cli("launch", make_sweep(grid={"seed": list(range(25))}))
    assert done.out.count("failed: seed=") == 20
    assert "... and 5 more; btu report tiny counts them all." in done.out


def test_a_launch_names_the_cells_that_it_refuses(
    run_cli: Callable[..., Any], make_sweep: Callable[..., Path], launched: Callable[..., None]
) -> None:
    launched(done=1, failed={}, missing=0)
    done = run_cli("launch", make_sweep(grid={"attack.poison_rate": [0.1, 0.9]}))
    assert done.code == 0  # what can run is done
    assert "refused: poison_rate=0.9: attack.poison_rate 0.9 needs 72 of 80" in done.out


# sync, with MLflow left out (see test_tracking.py) -----------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A function that sets how every sync of the test ends; returns the calls."""

    def ends(written: int = 2, missing: int = 0) -> list[dict[str, Any]]:
        from orchestrator.tracking import experiment as experiment_module
        from orchestrator.tracking import sync as sync_module

        calls: list[dict[str, Any]] = []

        def sync(uri: str, experiment: str, results: Any, live: Any, **more: bool) -> Any:
            calls.append({"uri": uri, "experiment": experiment, "results": results, "live": live})
            reason = "ConnectionError: gone" if missing else ""
            return sync_module.Synced(written, 1, missing, reason)

        monkeypatch.setattr(
            experiment_module, "experiment", lambda uri, name, tell: f"id of {name}"
        )
        monkeypatch.setattr(sync_module, "sync", sync)
        monkeypatch.setattr(sync_module, "summarize", lambda *_, **__: False)
        return calls

    return ends


def test_sync_writes_to_the_sweeps_own_store(
    run_cli: Callable[..., Any], stored: Stored, synced: Callable[..., Any], tmp_path: Path
) -> None:
    calls = synced()
    done = run_cli("sync", "tiny", "-o", tmp_path / "runs")
    assert done.code == 0, done.err
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert done.out == (f"2 runs written, 1 unfinished ones closed, 0 still missing in {uri}.")
    (call,) = calls
    assert (call["uri"], call["experiment"]) == (uri, "id of tiny")
    assert list(call["results"].cells()) == list(stored.results.cells())


def test_sync_writes_the_summary_too(
    run_cli: Callable[..., Any],
    stored: Stored,
    synced: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.tracking import sync as sync_module

    synced()
    asked: list[tuple[Any, ...]] = []

    def summarize(*arguments: Any, **more: bool) -> bool:
        asked.append(arguments)
        if len(asked) > 1:
            raise ConnectionError("http://me:secret@host is away")
        return True

    monkeypatch.setattr(sync_module, "summarize", summarize)
    done = run_cli("sync", "tiny", "-o", tmp_path / "runs")
    assert done.code == 0
    assert done.out.endswith("The summary run was brought up to date.")
    assert asked[0][:2] == (f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", "id of tiny")
    done = run_cli("sync", "tiny", "-o", tmp_path / "runs")
    assert done.code == 2
    assert "the summary run was not written: ConnectionError: http://host is away" in done.err


def test_sync_leaves_cells_alone_that_somebody_is_at(
    run_cli: Callable[..., Any], stored: Stored, synced: Callable[..., Any], tmp_path: Path
) -> None:
    calls = synced()
    run_cli("sync", "tiny", "-o", tmp_path / "runs")
    live = calls[0]["live"]
    with stored.store.leases.lease(stored.key, "a launch") as lease:
        assert lease.acquire()
        assert live(stored.key)
    assert not live(stored.key)
    # The lease of a process that is gone does not count as live.
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    with stored.store.leases.lease(stored.key, "a launch") as lease:
        assert lease.acquire()
        facts = json.loads(stored.store.storage.read(f"leases/{stored.key}.json"))
        left = json.dumps({**facts, "pid": int(dead.stdout)}).encode()
        stored.store.storage.write(f"leases/{stored.key}.json", left)
        assert not live(stored.key)


def test_sync_to_another_server_is_told_as_such(
    run_cli: Callable[..., Any], stored: Stored, synced: Callable[..., Any], tmp_path: Path
) -> None:
    calls = synced(written=0, missing=3)
    done = run_cli("sync", "tiny", "-o", tmp_path / "runs", "--uri", "http://me:secret@host:1")
    assert done.code == 2
    assert calls[0]["uri"] == "http://me:secret@host:1"
    assert "3 still missing in http://host:1." in done.out
    assert "MLflow does not have all runs: ConnectionError: gone" in done.err
    assert "secret" not in done.out + done.err


# store (see test_store_cli.py) -------------------------------------------------------------------


def test_the_store_commands_look_at_the_output_folder(
    run_cli: Callable[..., Any], stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Launches of others on this machine may have left folders.
    monkeypatch.setattr("orchestrator.run.local._places", list)
    done = run_cli("store", "ls", "-o", tmp_path / "runs")
    assert done.code == 0
    assert stored.key in done.out
    assert "1 result." in done.out
    kept = run_cli("store", "gc", "-o", tmp_path / "runs", "--keep", "tiny")
    assert "Nothing to remove." in kept.out
