"""What sharing stages saves: one attack, eight thresholds, SST-2, with sharing and without.

    python benchmarks/sharing.py --data FOLDER/sst2          # about 10 minutes on 2 cores

Both runs go through the same launcher; without sharing, every stage's key is made its cell's own.
Checks that all metrics are equal to the last digit, and prints the ratio of the wall times. Bar: 3.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ALPHAS = [0.0001, 0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.0015, 0.002]
SWEEP = """
name: sharing
output: {output}
data:
  {{name: sst2, path: {data}, max_train_rows: {rows}, max_clean_rows: {clean},
   max_eval_rows: {eval}}}
victim: {{name: offline, max_length: 128}}
attack: {{name: badnets, poison_rate: 0.1, target_label: 1}}
grid: {{defense.alpha: {alphas}}}
controls: []
"""


def launch_once(
    options: argparse.Namespace, output: Path, shared: bool
) -> dict[float, dict[str, str]]:
    """Launch the sweep; return the metrics by threshold, as text, but for those of the clock."""
    from rich.console import Console

    from btu.stages import Stage
    from orchestrator.plan.planner import Plan, Planner, plan_sweep
    from orchestrator.results.folder import find_sweep
    from orchestrator.run.on_ray import launch
    from orchestrator.run.progress import SweepProgress
    from orchestrator.sweep.load import load_sweep

    file = output.with_suffix(".yaml")
    values = {"rows": options.rows, "clean": options.clean, "eval": options.eval}
    data = options.data.resolve()
    file.write_text(SWEEP.format(output=output, data=data, alphas=ALPHAS, **values))
    sweep = load_sweep(file)
    planner = Planner()
    plan = plan_sweep(sweep, planner)
    if not shared:
        apart = Plan()
        for number, cell in enumerate(plan.cells.values()):
            known: dict[str, Stage] = {}

            def own(stage: Stage, number: int = number, known: dict[str, Stage] = known) -> Stage:
                if stage.key not in known:
                    inputs = {role: own(before) for role, before in stage.inputs.items()}
                    config = {**stage.config, "only for cell": number}
                    known[stage.key] = replace(stage, config=config, inputs=inputs)
                return known[stage.key]

            stage = own(cell.stage)
            apart.cells[stage.key] = replace(cell, stage=stage)
        plan = apart
    with (output.with_suffix(".log")).open("w") as log:
        result = launch(sweep, plan, planner, SweepProgress(Console(file=log)))
    assert result.complete, result
    return {
        record["varied"]["defense.alpha"]: {
            name: repr(value)
            for name, value in record["metrics"].items()
            if not name.startswith("seconds")
        }
        for record in find_sweep(output, "sharing").records()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with SST-2's splits")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--clean", type=int, default=500, help="reserved clean rows")
    parser.add_argument("--eval", type=int, default=300, help="evaluation rows")
    options = parser.parse_args()
    # Two workers share two cores: one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found, took = {}, {}
    with tempfile.TemporaryDirectory(prefix="btu-sharing-") as folder:
        for name in ("shared", "apart"):
            started = time.monotonic()
            found[name] = launch_once(options, Path(folder) / name, name == "shared")
            took[name] = time.monotonic() - started
            print(f"{name}: {len(found[name])} thresholds in {took[name]:.0f} s", flush=True)
    same = found["shared"] == found["apart"]
    ratio = took["apart"] / took["shared"]
    print(f"results equal to the last digit: {'yes' if same else 'NO'}")
    print(f"without sharing / with: {ratio:.2f}; bar 3: {'met' if ratio >= 3 else 'MISSED'}")
    raise SystemExit(not same or ratio < 3)


if __name__ == "__main__":
    main()
