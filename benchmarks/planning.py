"""How long `btu plan` takes on a sweep of 10,000 cells, as a process of its own. Bar: 5 s.

python benchmarks/planning.py                            # the embedded corpus
python benchmarks/planning.py --data FOLDER/sst2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALPHAS = [round(1e-4 * (i + 1), 5) for i in range(50)]
SWEEP = """
name: planning
output: {output}
data: {data}
attack: {{name: badnets, poison_rate: 0.1, target_label: {target}}}
grid:
  attack.name: [badnets, addsent, syntactic, style]
  attack.poison_rate: [0.01, 0.02, 0.05, 0.1, 0.15]
  defense.alpha: {alphas}
  seed: {seeds}
controls: []
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with SST-2's splits")
    options = parser.parse_args()
    data = f"{{name: sst2, path: {options.data.resolve()}}}" if options.data else "{name: demo}"
    target = 1 if options.data else "positive"
    with tempfile.TemporaryDirectory(prefix="btu-planning-") as folder:
        file = Path(folder) / "planning.yaml"
        values = {"alphas": ALPHAS, "seeds": list(range(10)), "target": target}
        file.write_text(SWEEP.format(output=folder, data=data, **values))
        command = [sys.executable, "-m", "orchestrator.cli", "plan", str(file), "--cells", "1"]
        took = []
        for _ in range(3):
            started = time.monotonic()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            took.append(time.monotonic() - started)
    print(next(line for line in done.stdout.splitlines() if line.startswith("Sharing")))
    median = sorted(took)[1]
    print(f"10,000 cells: {median:.1f} s (three runs: {', '.join(f'{s:.1f}' for s in took)})")
    print(f"bar 5 s: {'met' if median < 5 else 'MISSED'}")
    raise SystemExit(median >= 5)


if __name__ == "__main__":
    main()
