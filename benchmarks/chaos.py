"""A sweep under fire: 40 cells, 20 SIGKILLs of workers and drivers at random moments.

    python benchmarks/chaos.py                       # about 10 minutes on 2 cores
    python benchmarks/chaos.py --thresholds 1 --seeds 1 --kills 2 --pause 0 1

Runs the sweep undisturbed, then again in another folder while it kills a worker or the driver
every few seconds (seeded) and gives the same command again whenever the driver is gone. Checks that
the results are equal to the last digit, that every cell has one committed result and one FINISHED
run, that a stage was computed again only where a kill had cut it short, once for each such kill,
and never after its result was committed. Prints the time lost per kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checks import Kill, computations, runs_of, told, wrong_computations, wrong_runs
from figures import Judge, add_options, count

if TYPE_CHECKING:
    from orchestrator.results.folder import Results

ROOT = Path(__file__).resolve().parent.parent
ATTACKS = ("badnets", "addsent")
SWEEP = """
name: chaos
data: {{name: demo, max_train_rows: 120, max_clean_rows: 40, max_eval_rows: 60}}
victim: {{name: {victim}, max_length: 64}}
attack: {{name: badnets, poison_rate: 0.1, target_label: positive}}
train: {{epochs: {epochs}, learning_rate: 1.0e-4, batch_size: 32}}
grid:
  attack.name: [{attacks}]
  defense.alpha: {alphas}
  seed: {seeds}
controls: []
"""


def start(file: Path, output: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a launch whose output goes to a file."""
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "launch",
        str(file),
        f"output={output}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=ROOT)


def computing(results: Results, driver: int) -> tuple[str, dict[int, str]]:
    """Return the id of a driver's launch, and what each process computes for it, by process id.

    Nothing before the launch is registered: workers of a killed driver may still compute then.
    """
    leases = results.store.leases
    launches = [h.name for h in leases.holders("launches") if h.facts.get("pid") == driver]
    if not launches:
        return "", {}
    held = leases.held().items()
    return launches[0], {int(f["pid"]): key for key, f in held if f["owner"] == launches[0]}


def shoot(
    driver: subprocess.Popen[bytes], results: Results, victim: str, pause: float
) -> Kill | None:
    """Wait until the launch computes, and `pause` seconds more; then kill a worker or the driver.

    Return what that may have cut short; None if the launch had ended before.
    """
    until = None
    while driver.poll() is None:
        _, busy = computing(results, driver.pid)
        until = time.monotonic() + pause if busy and until is None else until
        if busy and until is not None and time.monotonic() >= until:
            target = next(iter(busy)) if victim == "worker" else driver.pid
            kill = _shot(target, driver.pid, results)
            if kill is not None:
                return kill
        time.sleep(0.05)
    return None


def _shot(target: int, driver: int, results: Results) -> Kill | None:
    """Kill a process of a launch that computes; None, and let it live, if it no longer does.

    It is halted first: what it computes cannot change while the store is read.
    """
    try:
        os.kill(target, signal.SIGSTOP)
    except ProcessLookupError:
        return None
    committed = frozenset(results.store.committed())
    launch, found = computing(results, driver)
    busy = {pid: key for pid, key in found.items() if key not in committed}
    now = time.time()
    if target == driver and busy:
        os.kill(target, signal.SIGKILL)
        return Kill(now, launch=launch, committed=committed)
    if target in busy:
        os.kill(target, signal.SIGKILL)
        return Kill(now, computing=frozenset({busy[target]}), committed=committed)
    os.kill(target, signal.SIGCONT)
    return None


def metrics_of(results: Results) -> dict[str, dict[str, str]]:
    """Return every cell's metrics, but for those of the clock. As text, so that NaN equals NaN."""
    return {
        r["key"]: {k: repr(v) for k, v in r["metrics"].items() if not k.startswith("seconds")}
        for r in results.records()
    }


def check(results: Results, cells: Sequence[str], kills: Sequence[Kill]) -> list[str]:
    """Return what is wrong with a finished sweep: its runs, and what was computed how often."""
    committed = {marker.key: marker.committed for marker in results.store.markers()}
    return [
        *(f"cell {key} has no result" for key in sorted(set(cells) - set(committed))),
        *wrong_runs(cells, runs_of(Path(results.output), results.name)),
        *wrong_computations(results.journal(), committed, kills),
    ]


def undisturbed(file: Path, output: Path, log: Path) -> tuple[Results, float]:
    """Launch the sweep and leave it alone; return its results and the seconds that it took."""
    from orchestrator.results.folder import find_sweep

    began = time.monotonic()
    if start(file, output, log).wait() != 0:
        raise SystemExit(f"the undisturbed launch failed:\n{log.read_text()[-2000:]}")
    return find_sweep(str(output), "chaos"), time.monotonic() - began


def disturbed(
    file: Path, output: Path, log: Path, options: argparse.Namespace
) -> tuple[Results, list[Kill], Counter[str], float]:
    """Launch the sweep and kill its processes, again and again, until it is done.

    Return its results, the kills, how many were of which kind, and the seconds that it took.
    """
    from orchestrator.results.folder import Results

    draw = random.Random(options.seed)
    kills: list[Kill] = []
    kinds: Counter[str] = Counter()
    results = Results(str(output), "chaos")
    began = time.monotonic()
    driver = start(file, output, log)
    for _ in range(options.kills):
        victim = "worker" if draw.random() < 0.6 else "driver"
        kill = shoot(driver, results, victim, draw.uniform(*options.pause))
        if kill is None:
            break  # the sweep was done before
        kills.append(kill)
        kinds[victim] += 1
        if victim == "driver":
            driver.wait()
            driver = start(file, output, log)
    if driver.wait() != 0:
        raise SystemExit(f"the last launch ended with an error:\n{log.read_text()[-2000:]}")
    return results, kills, kinds, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=count, default=20)
    parser.add_argument("--thresholds", type=count, default=10)
    parser.add_argument("--alpha", type=float, default=1e-4, help="the smallest threshold")
    parser.add_argument("--seeds", type=count, default=2)
    parser.add_argument("--epochs", type=count, default=2)
    parser.add_argument("--victim", default="offline")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=[2.0, 12.0], metavar=("LEAST", "MOST"),
        help="seconds of computing before a kill",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="draws whom to kill, and when")
    parser.add_argument("--keep", type=Path, help="a folder for results and logs, kept")
    add_options(parser)
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="btu-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "chaos.yaml"
    file.write_text(
        SWEEP.format(
            victim=options.victim,
            epochs=options.epochs,
            attacks=", ".join(ATTACKS),
            alphas=[round(options.alpha * (i + 1), 5) for i in range(options.thresholds)],
            seeds=list(range(options.seeds)),
        )
    )
    calm, calm_seconds = undisturbed(file, folder / "calm", folder / "calm.log")
    expected = metrics_of(calm)
    print(f"undisturbed: {len(expected)} cells in {calm_seconds:.0f} s", flush=True)
    wild, kills, kinds, wild_seconds = disturbed(
        file, folder / "wild", folder / "wild.log", options
    )
    judge = Judge.of("chaos", options)
    judge.figures = {
        "cells": len(expected),
        "workers killed": kinds["worker"],
        "drivers killed": kinds["driver"],
        "computed again": sum(computations(wild.journal()).values())
        - len(computations(wild.journal())),
        "seconds undisturbed": calm_seconds,
        "seconds disturbed": wild_seconds,
        "seconds lost per kill": (wild_seconds - calm_seconds) / max(1, len(kills)),
    }
    cells = len(ATTACKS) * options.thresholds * options.seeds
    judge.structure(f"{cells} cells are done undisturbed", str(len(expected)),
                    len(expected) == cells)  # fmt: skip
    judge.structure(
        f"{options.kills} kills while stages were computed",
        f"{kinds['worker']} workers and {kinds['driver']} drivers",
        len(kills) == options.kills,
    )
    calm_wrong = check(calm, list(expected), [])
    judge.structure("undisturbed, each stage is computed once and each cell has one run",
                    f"problems: {told(calm_wrong)}", not calm_wrong)  # fmt: skip
    wrong = check(wild, list(expected), kills)
    judge.structure(
        "only what a kill cut short is computed again, and each cell has one run",
        f"{judge.figures['computed again']} computed again; problems: {told(wrong)}",
        not wrong,
    )
    found = metrics_of(wild)
    differ = sorted(key for key in expected if found.get(key) != expected[key])
    judge.structure("all results are those of the undisturbed sweep, to the last digit",
                    f"{len(differ)} cells differ", not differ)  # fmt: skip
    print(f"time lost per kill: {judge.figures['seconds lost per kill']:.1f} s")
    judge.end()


if __name__ == "__main__":
    main()
