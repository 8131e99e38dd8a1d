"""What an output on an object store costs: requests and seconds of a stage, report and relaunch.

    python benchmarks/object_store.py --before FOLDER    # a checkout to compare with
    python benchmarks/object_store.py --cells 3 --latencies 0 5 --no-bars

Two cells of eight stages, with files as the quick start has them, are computed one after the other
by a launch's driver and worker, without Ray and MLflow. Heartbeats are left out: they are a PUT in
five seconds, however many stages there are. Then `btu report` and a launch with nothing to do run
on 1,000 finished cells, tracked to SQLite; of the checkout to compare with on 100, since each cell
costs the same there. Every request is counted and takes the latency given. The store is in memory
and charges each call of its file system what it costs s3fs (benchmarks/s3_costs.py, checked against
a server).

Bars of structure: each stage is computed once and each cell is reported; at most 12 requests a
stage; a relaunch computes nothing. Bars of speed, at the highest latency: a stage takes less than a
second more than without latency; `btu report` and the relaunch take less than 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checks import computations, told
from figures import Judge, add_options, count
from s3_costs import FakeS3

from btu.stages import Stage, StageRun, stage

HERE = Path(__file__).resolve().parent
MOST_REQUESTS, MOST_SECONDS, MOST_WHOLE = 12, 1.0, 10.0
# Stages of a cell: the input's role and stage, and the bytes of its files. A model is smaller than
# a real one, which changes no count.
STAGES: dict[str, tuple[str | None, dict[str, int]]] = {
    "poison": (None, {"train.parquet": 30_344, "hidden.parquet": 477}),
    "training rows": ("poison", {"train.parquet": 29_232, "train.safetensors": 53_212}),
    "poisoned fine-tune": (
        "training rows", {"model/config.json": 881, "model/model.safetensors": 900_000},
    ),
    "exposure": ("poisoned fine-tune", {"drift.safetensors": 244_256}),
    "unlearn": (
        "exposure",
        {"rows.parquet": 14_586, "suspects.parquet": 364_539, "model/config.json": 881,
         "model/model.safetensors": 900_000},
    ),
    "tuned": ("unlearn", {"model/config.json": 881, "model/model.safetensors": 900_000}),
    "evaluate": ("tuned", {}),
    "cell": (
        "evaluate",
        {"config.yaml": 1_189, "drift.png": 33_684, "flagged_tokens.json": 2,
         "rows.parquet": 19_279, "tokens.parquet": 42_637},
    ),
}  # fmt: skip


@stage(version=1, id="object_store:files")
def files(run: StageRun) -> dict[str, Any]:
    """Write files of the stated sizes; a cell also the smallest result that a report can show."""
    for name, size in run.config["files"].items():
        path = run.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"[]" if name == "flagged_tokens.json" else os.urandom(size))
    if run.config["name"] == "cell":
        (run.folder / "result.json").write_text(json.dumps(result_of(run.where["config"])))
    return {"asr": 0.0, "cacc": 1.0}


def result_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with as many metrics as a cell has."""
    now = time.time()
    metrics = {"asr": 0.0, "cacc": 1.0} | {f"metric_{i}": float(i) for i in range(28)}
    return {
        "config": config, "started": now, "ended": now, "metrics": metrics, "history": [],
        "notes": {}, "label_names": ["0", "1"], "tags": {},
    }  # fmt: skip


def chain(seed: int, where: Mapping[str, Any]) -> Stage:
    """Return the last of the eight stages of a cell."""
    # By the name under which workers import it: this process runs it as __main__.
    from object_store import files

    made: dict[str, Stage] = {}
    for name, (before, sizes) in STAGES.items():
        made[name] = Stage(
            name,
            files,
            {"name": name, "seed": seed, "files": sizes},
            inputs={} if before is None else {before: made[before]},
            where=where,
            kind="cell" if name == "cell" else "stage",
            model=any(file.startswith("model/") for file in sizes),
        )
    return made["cell"]


def planned(folder: Path, name: str, cells: int) -> tuple[Any, Any]:
    """Return a sweep of so many seeds with its output on the object store, and its plan."""
    from orchestrator.plan.planner import Plan, PlannedCell
    from orchestrator.sweep.load import load_sweep, resolve

    file = folder / f"{name}.yaml"
    file.write_text(f"name: {name}\ngrid: {{seed: {list(range(cells))}}}\ncontrols: []\n")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    sweep = load_sweep(file, [f"output=s3://bench/{name}", f"tracking.uri={uri}"])
    plan = Plan()
    for cell in sweep.cells():
        resolved = resolve(cell.config)
        stage = chain(int(cell.varied["seed"]), {"config": resolved.config()})
        plan.cells[stage.key] = PlannedCell(stage, resolved, cell.varied)
    return sweep, plan


@contextmanager
def measuring(found: dict[str, Any], per: int) -> Iterator[None]:
    """Add requests by kind and seconds of what happens, each per `per`."""
    before, began = Counter(FakeS3.requests), time.monotonic()
    yield
    found["seconds"] = (time.monotonic() - began) / per
    kinds = Counter(FakeS3.requests) - before
    found["kinds"] = {kind: number / per for kind, number in sorted(kinds.items())}
    found["requests"] = sum(kinds.values()) / per


def stages(folder: Path, latency: float) -> dict[str, Any]:
    """Compute two cells; return requests and seconds a stage, and what is wrong."""
    from rich.console import Console

    from orchestrator.plan.planner import Planner
    from orchestrator.results.folder import Results
    from orchestrator.run import driver as driver_module
    from orchestrator.run.driver import Driver, Idle
    from orchestrator.run.progress import SweepProgress
    from orchestrator.run.worker import Launch, compute_call
    from orchestrator.store import lease as lease_module
    from orchestrator.store.store import Store

    for module in (driver_module, lease_module):
        module.HEARTBEAT_S = 3600.0
    name = f"stages-{len(list(folder.glob('stages-*')))}"
    sweep, plan = planned(folder, name, 2)
    results = Results(sweep.output, sweep.name, Store(sweep.store_location))
    found: dict[str, Any] = {}
    with (folder / "log.txt").open("w") as log:
        progress = SweepProgress(Console(file=log))
        driver = Driver(sweep, plan, Planner(), progress, results)
        driver.prepare()
        launch = Launch(driver.id, sweep.store_location, sweep.output, sweep.name, None)
        with driver.underway():
            driver.slots = 1
            FakeS3.latency = latency
            with measuring(found, len(plan.cells) * len(STAGES)):
                while not isinstance(task := driver.next_task(), Idle):
                    driver.started(task)
                    driver.ended(task, compute_call(driver.call(task), launch))
                # The journal may be written a little later: all of it belongs to the stages.
                before = Counter(FakeS3.requests)
                FakeS3.latency = 0.0
                journal = results.journal()
                put = FakeS3.requests["PUT"] - before["PUT"]
                FakeS3.requests.clear()
                FakeS3.requests.update(before + Counter(PUT=put))
        complete = driver.result().complete
    computed = computations(journal)
    wrong = [f"{key} was computed {times} times" for key, times in computed.items() if times != 1]
    if len(computed) != len(plan.cells) * len(STAGES) or not complete:
        wrong.append(f"{len(computed)} stages were computed")
    return {**found, "wrong": wrong}


def whole(folder: Path, cells: int, latencies: Sequence[float]) -> list[dict[str, Any]]:
    """Put finished cells into a store; return what a report and a relaunch cost by latency."""
    from rich.console import Console

    from orchestrator.plan.planner import Planner
    from orchestrator.results.folder import Results
    from orchestrator.run.on_ray import launch
    from orchestrator.run.progress import SweepProgress
    from orchestrator.store.store import Store

    FakeS3.latency = 0.0
    sweep, plan = planned(folder, "whole", cells)
    store = Store(sweep.store_location)
    results = Results(sweep.output, sweep.name, store)
    results.write_plan(sweep, plan.cells.values())
    for cell in plan.cells.values():
        made = store.workspace(cell.key)
        # Neither tables nor a figure: nothing here reads one.
        (made / "flagged_tokens.json").write_text("[]")
        (made / "config.yaml").write_text("{}")
        result = result_of({**cell.spec.config(), "seed": cell.varied["seed"]})
        (made / "result.json").write_text(json.dumps(result))
        store.publish(cell.key, made, "cell", {"stage": "cell"})
    with (folder / "log.txt").open("a") as log:

        def relaunch() -> bool:
            return launch(sweep, plan, Planner(), SweepProgress(Console(file=log))).complete

        relaunch()  # which writes the runs
        runs = []
        for latency in latencies:
            report, again = dict[str, Any](), dict[str, Any]()
            FakeS3.latency = latency
            with measuring(report, 1):
                reported = _reported(sweep, folder / f"cache-{latency}")
            with measuring(again, 1):
                complete = relaunch()
            FakeS3.latency = 0.0
            report["wrong"] = [] if reported == cells else [f"{reported} cells are reported"]
            journal = results.journal()
            again["wrong"] = [f"computed {key}" for key in computations(journal)]
            again["wrong"] += [] if complete else ["it is not complete"]
            runs.append({"report": report, "relaunch": again})
    return runs


def _reported(sweep: Any, cache: Path) -> int:
    """Return how many rows `btu report` prints, on a machine that has read nothing before."""
    from typer.testing import CliRunner

    from orchestrator.cli.main import app

    words = ["report", sweep.name, "--output", sweep.output, "--format", "csv"]
    done = CliRunner().invoke(app, words, env={"BTU_CACHE": str(cache)}, catch_exceptions=False)
    return len(done.stdout.splitlines()) - 1


def measure(cells: int, latencies: Sequence[float], folder: Path) -> list[dict[str, Any]]:
    """Return for each latency what a stage, a report and a relaunch cost."""
    FakeS3.use()
    stages(folder, 0.0)  # imports, and memory that grows at first, are no stage's
    FakeS3.forget()
    by_stage = [stages(folder, latency) for latency in latencies]
    FakeS3.forget()
    by_whole = whole(folder, cells, latencies)
    return [
        {"ms": round(latency * 1000), "stage": one, **all_}
        for latency, one, all_ in zip(latencies, by_stage, by_whole, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=count, default=1000, help="finished cells of the report")
    parser.add_argument(
        "--latencies", type=int, nargs="+", default=[0, 10, 50], metavar="MS",
        help="milliseconds of a request",
    )  # fmt: skip
    parser.add_argument(
        "--before", type=Path, metavar="FOLDER", help="a checkout to measure as well, first"
    )
    parser.add_argument(
        "--before-cells", type=count, default=100, metavar="CELLS",
        help="finished cells of that checkout",
    )  # fmt: skip
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.one:
        seconds = [ms / 1000 for ms in options.latencies]
        print(json.dumps(measure(options.cells, seconds, options.one)))
        return
    judge = Judge.of("object_store", options)
    measured = (
        ("before", options.before, options.before_cells),
        ("now", HERE.parent, options.cells),
    )
    for label, code, cells in measured:
        if code is not None:
            found = _measured_apart(code, cells, options.latencies)
            judge.figures[label] = {"cells": cells, "costs": found}
            show(label, cells, found)
    report(judge, options.cells, judge.figures["now"]["costs"])
    judge.end()


def _measured_apart(code: Path, cells: int, latencies: Sequence[int]) -> list[dict[str, Any]]:
    """Measure a checkout in a process of its own. code: its folder."""
    with tempfile.TemporaryDirectory(prefix="btu-objects-") as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(code.resolve()), str(HERE)]),
            "BTU_CACHE": f"{folder}/cache",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--one", folder, "--cells", str(cells), "--latencies",
             *map(str, latencies)],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(label: str, cells: int, found: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of one checkout."""
    for run in found:
        for what in ("stage", "report", "relaunch"):
            cost, of = run[what], "" if what == "stage" else f" of {cells} cells"
            kinds = ", ".join(f"{n:.4g} {kind}" for kind, n in cost["kinds"].items())
            print(
                f"{label:6} {run['ms']:3} ms  {what + of:22} {cost['requests']:8.1f} requests, "
                f"{cost['seconds']:7.2f} s  ({kinds})",
                flush=True,
            )


def report(judge: Judge, cells: int, found: Sequence[Mapping[str, Any]]) -> None:
    """Judge what was measured: by latency, the lowest first."""
    wrong = [f"{run['ms']} ms: {text}" for run in found for text in run["stage"]["wrong"]]
    judge.structure("each stage is computed once", f"problems: {told(wrong)}", not wrong)
    wrong = [f"{run['ms']} ms: {text}" for run in found for text in run["report"]["wrong"]]
    judge.structure(f"each of {cells} cells is reported", f"problems: {told(wrong)}", not wrong)
    wrong = [f"{run['ms']} ms: {text}" for run in found for text in run["relaunch"]["wrong"]]
    judge.structure("a relaunch computes nothing", f"problems: {told(wrong)}", not wrong)
    most = max(run["stage"]["requests"] for run in found)
    judge.structure(
        f"at most {MOST_REQUESTS} requests a stage", f"{most:.1f}", most <= MOST_REQUESTS
    )
    first, last = found[0], found[-1]
    more = last["stage"]["seconds"] - first["stage"]["seconds"]
    judge.fast(
        f"{last['ms']} ms a request cost a stage less than {MOST_SECONDS:.0f} s",
        f"{more:.2f} s",
        more < MOST_SECONDS,
    )
    for what, name in (("report", "btu report"), ("relaunch", "a relaunch with nothing to do")):
        seconds = last[what]["seconds"]
        judge.fast(
            f"{name} of {cells} cells at {last['ms']} ms under {MOST_WHOLE:.0f} s",
            f"{seconds:.1f} s",
            seconds < MOST_WHOLE,
        )


if __name__ == "__main__":
    main()
