"""What a cell costs beside its own work: cells that do nothing, two at a time, tracked to SQLite.

    python benchmarks/overhead.py                    # 100 and 1,000 cells

Prints wall seconds a cell, all in (planning left out, Ray's start included), how that grows with
the number of cells, the driver's peak memory, and how long a relaunch with nothing to do takes.
Bars: at most 0.35 s a cell; a cell costs at most 20 % more at 1,000 cells than at 100; a relaunch
takes less than 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from btu.stages import Stage, StageRun, stage

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


def measure(cells: int, folder: Path) -> dict[str, float]:
    """Launch a sweep of so many cells, then launch it again."""
    # By the name under which workers import it: this process runs it as __main__.
    from overhead import nothing
    from rich.console import Console

    from orchestrator.plan.planner import Plan, PlannedCell, Planner
    from orchestrator.run.on_ray import launch
    from orchestrator.run.progress import SweepProgress
    from orchestrator.sweep.load import load_sweep, resolve

    file = folder / "overhead.yaml"
    file.write_text(
        f"name: n{cells}\noutput: {folder / 'runs'}\ngrid: {{seed: {list(range(cells))}}}\n"
        "controls: []\n"
    )
    sweep = load_sweep(file)
    plan = Plan()
    for cell in sweep.cells():
        where = {"config": dict(cell.config)}
        stage = Stage("cell", nothing, {"n": cells, **cell.varied}, where=where)
        plan.cells[stage.key] = PlannedCell(stage, resolve(cell.config), cell.varied)
    took = []
    with (folder / f"log-{cells}.txt").open("w") as log:
        for _ in range(2):
            started = time.monotonic()
            result = launch(sweep, plan, Planner(), SweepProgress(Console(file=log)))
            took.append(time.monotonic() - started)
            assert result.complete, result
            assert result.done == cells, result
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The journal tells when each cell ended: what one costs at the start, and at the end.
    journal = (folder / "runs" / sweep.name / "journal.jsonl").read_text().splitlines()
    ends = [e["time"] for e in map(json.loads, journal) if e["event"] == "end"]
    part = len(ends) // 10
    return {
        "launch": took[0],
        "relaunch": took[1],
        "peak": float(peak),
        "first": (ends[part] - ends[0]) / part,
        "last": (ends[-1] - ends[-1 - part]) / part,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs=2, default=[100, 1000], metavar=("FEW", "MANY"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.folder)))
        return
    found = {}
    # Workers import this file; the pinned thread count keeps two of them from sharing cores.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1"}
    for cells in options.cells:
        with tempfile.TemporaryDirectory(prefix="btu-overhead-") as folder:
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(cells), "--folder", folder],
                env=environment, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
        found[cells] = json.loads(done.stdout.splitlines()[-1])
        wall = found[cells]
        print(
            f"{cells:6} cells: {wall['launch']:.1f} s, {wall['launch'] / cells:.3f} s a cell; "
            f"relaunch {wall['relaunch']:.1f} s; driver's peak memory {wall['peak'] / 1e6:.0f} MB"
        )
    few, many = options.cells
    cost = found[many]["launch"] / many
    first, last = found[many]["first"], found[many]["last"]
    total = cost / (found[few]["launch"] / few) - 1
    print(f"of {many}: {first:.3f} s a cell in the first tenth, {last:.3f} s in the last")
    met = [
        _judge("at most 0.35 s a cell", f"{cost:.3f} s", cost <= 0.35),
        _judge(f"at most 20 % more a cell at {many} than at {few}", f"{total:+.0%}", total <= 0.2),
        # Ray's start, shared by more cells, hides growth above; it is not in this one.
        _judge("the last tenth against the first", f"{last / first - 1:+.0%}", last <= 1.2 * first),
        _judge("a relaunch under 10 s", f"{found[many]['relaunch']:.1f} s",
               found[many]["relaunch"] < 10),
    ]  # fmt: skip
    raise SystemExit(not all(met))


def _judge(bar: str, found: str, met: bool) -> bool:
    print(f"bar: {bar}: {found}, {'met' if met else 'MISSED'}")
    return met


if __name__ == "__main__":
    main()
