"""How long `btu plan` takes on a sweep of 10,000 cells, as a process of its own. Bar: 5 s.

    python benchmarks/planning.py                            # the embedded corpus
    python benchmarks/planning.py --data FOLDER/sst2
    python benchmarks/planning.py --thresholds 2 --seeds 1   # 40 cells

Checks that the plan has all cells and refuses none. FOLDER/sst2 needs the columns of the two
paraphrase attacks (docs/data.md).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Judge, add_options, count

ATTACKS = ("badnets", "addsent", "syntactic", "style")
RATES = (0.01, 0.02, 0.05, 0.1, 0.15)
SWEEP = """
name: planning
output: {output}
data: {data}
attack: {{name: badnets, poison_rate: 0.1, target_label: {target}}}
grid:
  attack.name: [{attacks}]
  attack.poison_rate: {rates}
  defense.alpha: {alphas}
  seed: {seeds}
controls: []
"""
COUNTS = re.compile(r"^([\d,]+) cells?: .*; ([\d,]+) refused", re.MULTILINE)


def counts(said: str) -> tuple[int, int]:
    """Return how many cells `btu plan` says that there are, and how many it refuses."""
    found = COUNTS.search(" ".join(said.split("\n  ")))
    if found is None:
        raise ValueError(f"btu plan printed no number of cells:\n{said[-2000:]}")
    return tuple(int(number.replace(",", "")) for number in found.groups())  # type: ignore[return-value]


def judge_plan(judge: Judge, said: str, cells: int, took: list[float]) -> None:
    """Judge what `btu plan` printed of a sweep of so many cells, and the seconds that it took."""
    planned, refused = counts(said)
    median = sorted(took)[len(took) // 2]
    judge.figures |= {"cells": planned, "refused": refused, "seconds": took, "median": median}
    judge.structure(
        f"{cells:,} cells are planned, none is refused",
        f"{planned:,} planned, {refused:,} refused",
        (planned, refused) == (cells, 0),
    )
    each = ", ".join(f"{seconds:.1f}" for seconds in took)
    judge.fast("a plan within 5 s", f"{median:.1f} s (median of {each})", median < 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with SST-2's splits")
    parser.add_argument("--thresholds", type=count, default=50)
    parser.add_argument("--seeds", type=count, default=10)
    parser.add_argument("--repeats", type=count, default=3)
    add_options(parser)
    options = parser.parse_args()
    data = f"{{name: sst2, path: {options.data.resolve()}}}" if options.data else "{name: demo}"
    values = {
        "attacks": ", ".join(ATTACKS),
        "rates": list(RATES),
        "alphas": [round(1e-4 * (i + 1), 5) for i in range(options.thresholds)],
        "seeds": list(range(options.seeds)),
        "target": 1 if options.data else "positive",
    }
    with tempfile.TemporaryDirectory(prefix="btu-planning-") as folder:
        file = Path(folder) / "planning.yaml"
        file.write_text(SWEEP.format(output=folder, data=data, **values))
        command = [sys.executable, "-m", "orchestrator.cli", "plan", str(file), "--cells", "1"]
        took = []
        for _ in range(options.repeats):
            started = time.monotonic()
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True,
                cwd=Path(__file__).resolve().parent.parent,
            )  # fmt: skip
            took.append(time.monotonic() - started)
    print(next(line for line in done.stdout.splitlines() if line.startswith("Sharing")))
    judge = Judge.of("planning", options)
    cells = len(ATTACKS) * len(RATES) * options.thresholds * options.seeds
    judge_plan(judge, done.stdout, cells, took)
    judge.end()


if __name__ == "__main__":
    main()
