"""A sweep under fire: 40 cells, 20 SIGKILLs of workers and drivers at random moments.

    python benchmarks/chaos.py                       # about 10 minutes on 2 cores

Runs the sweep undisturbed, then again in another folder while it kills a worker or the driver
every few seconds (seeded) and gives the same command again whenever the driver is gone. Checks that
the results are equal to the last digit, that every cell has one committed result and one FINISHED
run, and that nothing was computed again once it was committed; prints the time lost per kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SWEEP = """
name: chaos
data: {name: demo, max_train_rows: 120, max_clean_rows: 40, max_eval_rows: 60}
victim: {name: offline, max_length: 64}
attack: {name: badnets, poison_rate: 0.1, target_label: positive}
train: {epochs: 2, learning_rate: 1.0e-4, batch_size: 32}
grid:
  attack.name: [badnets, addsent]
  defense.alpha: [0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0007, 0.0008, 0.0009, 0.001]
  seed: [0, 1]
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


def workers(driver: int) -> list[int]:
    """Return the Ray workers that are inside a trial."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and ".train" in title:
            found.append(child.pid)
    return found


def aim(driver: subprocess.Popen[bytes], victim: str, pause: float) -> int | None:
    """Wait until the launch computes, and `pause` seconds more; return whom to kill."""
    until = None
    while driver.poll() is None:
        busy = workers(driver.pid)
        if busy and until is None:
            until = time.monotonic() + pause
        if busy and until is not None and time.monotonic() >= until:
            return busy[0] if victim == "worker" else driver.pid
        time.sleep(0.1)
    return None


def results(output: Path) -> dict[str, dict[str, str]]:
    """Return every cell's metrics, but for those of the clock. As text, so that NaN equals NaN."""
    from orchestrator.results.folder import find_sweep

    return {
        r["key"]: {k: repr(v) for k, v in r["metrics"].items() if not k.startswith("seconds")}
        for r in find_sweep(output, "chaos").records()
    }


def check(output: Path, cells: int, wasted: int) -> list[str]:
    """Return what is wrong with a finished sweep.

    wasted: computations that the kills may have cut short, and that were begun anew.
    """
    from mlflow import MlflowClient

    from orchestrator.results.folder import find_sweep

    wrong = []
    sweep = find_sweep(output, "chaos")
    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("chaos")
    runs = client.search_runs([experiment.experiment_id])
    finished = Counter(r.data.tags["cell"] for r in runs if r.info.status == "FINISHED")
    if len(finished) != cells or set(finished.values()) != {1} or len(runs) != cells:
        wrong.append(f"runs: {len(runs)}, finished by cell: {finished}")
    computed = Counter(e["key"] for e in sweep.journal() if e["event"] == "compute")
    again = sum(computed.values()) - len(computed)
    if again > wasted:
        wrong.append(f"{again} computations were repeated, of which kills explain {wasted}")
    committed = {marker.key: marker.committed for marker in sweep.store.markers()}
    for event in sweep.journal():
        if event["event"] == "compute" and event["time"] > committed.get(event["key"], 9e99):
            wrong.append(f"{event['key']} was computed again after it was committed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for results and logs, kept")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="btu-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "chaos.yaml"
    file.write_text(SWEEP)
    calm, wild = folder / "calm", folder / "wild"

    began = time.monotonic()
    assert start(file, calm, folder / "calm.log").wait() == 0, (folder / "calm.log").read_text()
    undisturbed = time.monotonic() - began
    expected = results(calm)
    print(f"undisturbed: {len(expected)} cells in {undisturbed:.0f} s", flush=True)

    draw = random.Random(options.seed)
    kinds: Counter[str] = Counter()
    began = time.monotonic()
    driver = start(file, wild, folder / "wild.log")
    launches = 1
    for _ in range(options.kills):
        victim = "worker" if draw.random() < 0.6 else "driver"
        pause = draw.uniform(2, 12)
        target = aim(driver, victim, pause)
        if target is None:
            break  # the sweep was done before
        os.kill(target, signal.SIGKILL)
        kinds[victim] += 1
        if victim == "driver":
            driver.wait()
            driver = start(file, wild, folder / "wild.log")
            launches += 1
    code = driver.wait()
    disturbed = time.monotonic() - began
    kills = sum(kinds.values())
    print(f"disturbed: {dict(kinds)} killed, {launches} launches, {disturbed:.0f} s, exit {code}")
    found = results(wild)
    # A driver takes both of its workers with it.
    wrong = check(wild, len(expected), kinds["worker"] + 2 * kinds["driver"])
    if found != expected:
        wrong.append(
            f"results differ in {sorted(k for k in expected if found.get(k) != expected[k])}"
        )
    if code != 0:
        wrong.append(
            f"the last launch ended with {code}: {(folder / 'wild.log').read_text()[-2000:]}"
        )
    print("invariant:", "holds" if not wrong else json.dumps(wrong, indent=1))
    print(f"time lost per kill: {(disturbed - undisturbed) / max(1, kills):.1f} s")
    if kills < options.kills:
        print(f"only {kills} of {options.kills} kills: the sweep was over before")
    raise SystemExit(bool(wrong) or kills < options.kills)


if __name__ == "__main__":
    main()
