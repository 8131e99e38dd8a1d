"""What a cell costs beside its own work: cells that do nothing, two at a time, tracked to SQLite.

    python benchmarks/overhead.py                    # 100 and 1,000 cells, 200 of the quick start
    python benchmarks/overhead.py --cells 4 8 --real 4 --no-bars

Prints wall seconds a cell, all in (planning left out, Ray's start included), how that grows with
the number of cells, the driver's peak memory, and how long a relaunch with nothing to do takes.
Then the same for cells on the stages of the quick start, which do nothing either, with each stage
as a trial of its own and with chains of stages as trials: wall seconds, CPU seconds of the driver,
and trials.
Checks that every cell was computed once and has one FINISHED run in the SQLite store, and that
chains make fewer trials.
Bars of speed: at most 0.35 s a cell; a cell costs at most 20 % more at 1,000 cells than at 100; a
relaunch takes less than 10 s; chains cost the driver less CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks import computations, runs_of, told, wrong_runs
from figures import Judge, add_options, count

from btu.stages import Stage, StageRun, stage

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan
    from orchestrator.sweep.sweep import Sweep

HERE = Path(__file__).resolve().parent
FOLDERS = [str(HERE), str(HERE.parent)]


@stage(version=1, id="overhead:nothing")
def nothing(run: StageRun) -> dict[str, Any]:
    """Write the smallest result that a report or a run can be made of."""
    now = time.time()
    result = {
        "config": run.where["config"],
        "started": now,
        "ended": now,
        # 30 metrics and a dozen parameters, as a cell has.
        "metrics": {"asr": 0.0, "cacc": 1.0} | {f"metric_{i}": float(i) for i in range(28)},
        "history": [],
        "notes": {},
        "label_names": ["0", "1"],
        "tags": {},
    }
    (run.folder / "result.json").write_text(json.dumps(result))
    return {"asr": 0.0, "cacc": 1.0}


@stage(version=1, id="overhead:small")
def small(run: StageRun) -> dict[str, Any]:
    """Write the smallest result of a stage that is no cell."""
    (run.folder / "out.txt").write_text("nothing")
    return {}


def alone(cells: int, folder: Path) -> tuple[Sweep, Plan]:
    """Return a sweep of cells without any stages."""
    # By the name under which workers import it: this process runs it as __main__.
    from overhead import nothing

    from orchestrator.plan.planner import Plan, PlannedCell
    from orchestrator.sweep.load import load_sweep, resolve

    file = folder / "overhead.yaml"
    file.write_text(
        f"name: n{cells}\noutput: {folder / 'runs'}\ngrid: {{seed: {list(range(cells))}}}\n"
        "controls: []\n"
    )
    sweep = load_sweep(file)
    plan = Plan()
    for cell in sweep.cells():
        resolved = resolve(cell.config)
        # A run names the attack, the defense and the data: all of the resolved config.
        where = {"config": resolved.config()}
        stage = Stage("cell", nothing, {"n": cells, **cell.varied}, where=where)
        plan.cells[stage.key] = PlannedCell(stage, resolved, cell.varied)
    return sweep, plan


def real(cells: int, folder: Path) -> tuple[Sweep, Plan]:
    """Return a sweep of cells on the stages of the quick start, which do nothing."""
    from overhead import nothing, small

    from orchestrator.plan.planner import Plan, PlannedCell, Planner, plan_sweep
    from orchestrator.sweep.load import load_sweep

    # Four attacks a seed.
    seeds = f"grid.seed={list(range(-(-cells // 4)))}"
    overrides = [f"name=real{cells}", f"output={folder / 'runs'}", seeds]
    sweep = load_sweep(HERE.parent / "sweeps" / "quickstart.yaml", overrides)
    planned = plan_sweep(sweep, Planner())
    idle: dict[str, Stage] = {}

    def of(stage: Stage, config: Mapping[str, Any]) -> Stage:
        inputs = {role: idle[before.key] for role, before in stage.inputs.items()}
        cell = stage.name == "cell"
        where = {"config": config} if cell else {"victim": stage.where.get("victim", {})}
        made = nothing if cell else small
        return dataclasses.replace(
            stage, function=made, config={"of": stage.key}, inputs=inputs, where=where
        )

    plan = Plan()
    for cell in list(planned.cells.values())[:cells]:
        for before in cell.stage.closure():
            if before.key not in idle:
                idle[before.key] = of(before, cell.spec.config())
        top = idle[cell.stage.key]
        plan.cells[top.key] = PlannedCell(top, cell.spec, cell.varied)
    return sweep, plan


SHAPES = {"alone": alone, "stages": real, "chains": real}


def measure(shape: str, cells: int, folder: Path) -> dict[str, Any]:
    """Launch a sweep of so many cells, then launch it again."""
    from rich.console import Console

    from orchestrator.plan.planner import Planner
    from orchestrator.results.folder import find_sweep
    from orchestrator.run import on_ray
    from orchestrator.run.progress import SweepProgress
    from orchestrator.run.schedule import Schedule
    from orchestrator.run.trials import Trials

    if shape == "stages":
        Schedule.follow = lambda *_: None  # type: ignore[method-assign]
    trials = [0]
    suggest = Trials.suggest

    def counted(self: Any, trial_id: str) -> Any:
        config = suggest(self, trial_id)
        trials[0] += isinstance(config, dict) and bool(config["tasks"])
        return config

    Trials.suggest = counted  # type: ignore[method-assign]
    sweep, plan = SHAPES[shape](cells, folder)
    took, driver = [], []
    with (folder / f"log-{cells}.txt").open("w") as log:
        for _ in range(2):
            started, worked = time.monotonic(), time.process_time()
            result = on_ray.launch(sweep, plan, Planner(), SweepProgress(Console(file=log)))
            took.append(time.monotonic() - started)
            driver.append(time.process_time() - worked)
            assert result.complete, result
            assert result.done == cells, result
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results = find_sweep(folder / "runs", sweep.name)
    journal = results.journal()
    computed = computations(journal)
    return {
        "launch": took[0],
        "relaunch": took[1],
        "driver": driver[0],
        "trials": trials[0],
        "stages": len(computed),
        "peak": float(peak),
        **tenths([event["time"] for event in journal if event["event"] == "end"]),
        "wrong": [
            *wrong_runs(list(plan.cells), runs_of(folder / "runs", sweep.name)),
            *wrong_counts(sorted(_all_keys(plan)), computed),
        ],
    }


def _all_keys(plan: Plan) -> set[str]:
    return {stage.key for cell in plan.cells.values() for stage in cell.stage.closure()}


def tenths(ends: Sequence[float]) -> dict[str, float]:
    """Return what a cell costs in the first and the last tenth, from the times at which they ended.

    Of fewer than ten cells, a tenth is one.
    """
    part = max(1, len(ends) // 10)
    return {
        "first": (ends[part] - ends[0]) / part,
        "last": (ends[-1] - ends[-1 - part]) / part,
    }


def wrong_counts(cells: Sequence[str], computed: Mapping[str, int]) -> list[str]:
    """Return the stages and cells that were not computed exactly once."""
    return [
        f"{key} was computed {computed.get(key, 0)} times"
        for key in sorted({*cells, *computed})
        if computed.get(key, 0) != 1 or key not in cells
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells", type=count, nargs=2, default=[100, 1000], metavar=("FEW", "MANY")
    )
    parser.add_argument("--real", type=count, default=200, metavar="N",
                        help="cells on the stages of the quick start")  # fmt: skip
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, default="alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.shape, options.one, options.folder)))
        return
    few, many = options.cells
    if not 2 <= few < many:
        parser.error(f"--cells {few} {many}: two numbers from 2 on, the smaller first")
    found = {cells: _measured_apart("alone", cells) for cells in options.cells}
    shaped = {shape: _measured_apart(shape, options.real) for shape in ("stages", "chains")}
    judge = Judge.of("overhead", options)
    judge.figures = {f"{cells} cells": wall for cells, wall in found.items()}
    judge.figures |= {f"{options.real} real cells, {shape}": it for shape, it in shaped.items()}
    report(judge, few, many, found)
    report_chains(judge, options.real, shaped)
    judge.end()


def _measured_apart(shape: str, cells: int) -> dict[str, Any]:
    """Measure in a process of its own, since memory is that of a process."""
    # Workers import this file; the pinned thread count keeps two of them from sharing cores.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="btu-overhead-") as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(cells), "--shape", shape, "--folder", folder],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    wall: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{cells:6} cells ({shape}): {wall['launch']:.1f} s, "
        f"{wall['launch'] / cells:.3f} s a cell; "
        f"driver {wall['driver'] / cells:.3f} s a cell; "
        f"{wall['stages'] / cells:.1f} stages a cell in {wall['trials'] / cells:.1f} trials; "
        f"relaunch {wall['relaunch']:.1f} s; driver's peak memory {wall['peak'] / 1e6:.0f} MB"
    )
    return wall


def report(judge: Judge, few: int, many: int, found: Mapping[int, Mapping[str, Any]]) -> None:
    """Judge what was measured of a small and of a large sweep."""
    for cells in (few, many):
        wrong = found[cells]["wrong"]
        judge.structure(
            f"each of {cells} cells was computed once and has one FINISHED run",
            f"problems: {told(wrong)}",
            not wrong,
        )
    cost = found[many]["launch"] / many
    growth = cost / (found[few]["launch"] / few) - 1
    first, last = found[many]["first"], found[many]["last"]
    print(f"of {many}: {first:.3f} s a cell in the first tenth, {last:.3f} s in the last")
    judge.fast("at most 0.35 s a cell", f"{cost:.3f} s", cost <= 0.35)
    judge.fast(f"at most 20 % more a cell at {many} than at {few}", f"{growth:+.0%}", growth <= 0.2)
    # Ray's start, shared by more cells, hides growth above; it is not in this one.
    judge.fast("the last tenth against the first", f"{last / max(first, 1e-9) - 1:+.0%}",
               last <= 1.2 * first)  # fmt: skip
    relaunch = found[many]["relaunch"]
    judge.fast("a relaunch under 10 s", f"{relaunch:.1f} s", relaunch < 10)


def report_chains(judge: Judge, cells: int, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Judge chains of stages against a trial for each stage, on the stages of the quick start."""
    stages, chains = found["stages"], found["chains"]
    wrong = [*stages["wrong"], *chains["wrong"]]
    judge.structure(
        f"each stage of {cells} real cells was computed once, and each cell has one FINISHED run",
        f"problems: {told(wrong)}",
        not wrong,
    )
    judge.structure(
        "chains make fewer trials",
        f"{chains['trials']} instead of {stages['trials']}, for {chains['stages']} stages",
        chains["trials"] < stages["trials"] == stages["stages"],
    )
    cost, before = chains["driver"] / cells, stages["driver"] / cells
    judge.fast("chains cost the driver less", f"{cost:.3f} s a cell instead of {before:.3f} s",
               cost < before)  # fmt: skip


if __name__ == "__main__":
    main()
