"""The `reference` preset beside the reference code's own measured run.

    python benchmarks/reference.py --data FOLDER/sst2 [--seeds 0 1 2] [--threads 2]

BadNets "cf", mixed labels, 10 %, one epoch at 2e-5 with the reference code's training settings
(AdamW, batch 64, constant rate, no clipping, fp32), MiniLM-L6 on SST-2. The reference code (at
7a63ece, its own settings, seed 1234, same victim and data) gave CACC 83.2 / ASR 100 without and
80.0 / 16.6 with BTU. About 4 minutes a seed on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from btu.stages import compute
from orchestrator.plan.planner import Plan, Planner
from orchestrator.results.folder import read_result
from orchestrator.sweep.sweep import Cell

MEASURED = {"undefended_cacc": 0.832, "undefended_asr": 1.0, "cacc": 0.800, "asr": 0.166}
BARS = {
    "undefended_asr": ("at least 0.99", lambda v: v >= 0.99),
    "cacc": ("within 0.02 of 0.800", lambda v: abs(v - 0.800) <= 0.02),
    "asr": ("at most 0.25", lambda v: v <= 0.25),
}


def cell(data: Path, seed: int) -> Cell:
    """Return the cell in the reference code's settings."""
    config = {
        "data": {"name": "sst2", "path": str(data)},
        "victim": {"name": "offline", "max_length": 128},
        "attack": {
            "name": "badnets", "poison_rate": 0.1, "target_label": 1, "label_mode": "mixed",
            "trigger": ["cf"],
        },
        "defense": {"name": "btu", "preset": "reference"},
        "train": {
            "epochs": 1, "learning_rate": 2e-5, "batch_size": 64, "precision": "fp32",
            "warmup_fraction": 0.0, "schedule": "constant", "max_grad_norm": None,
        },
        "tuning": {"epochs": 1, "learning_rate": 2e-5},
        "seed": seed,
    }  # fmt: skip
    return Cell({"seed": seed}, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2's splits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    columns = ["undefended_cacc", "undefended_asr", "tuned_cacc", "tuned_asr", "cacc", "asr"]
    columns += ["ftr", "flagged", "detection_recall", "seconds"]
    table = Table("run", *columns)
    runs = []
    for seed in arguments.seeds:
        (planned,) = Planner().add(Plan(), [cell(arguments.data, seed)])
        with tempfile.TemporaryDirectory(prefix="btu-reference-") as folder:
            done = compute(planned.stage, Path(folder), cpus=arguments.threads, gpus=0)
            metrics = read_result(done)[0]["metrics"]
        runs.append(metrics)
        table.add_row(f"seed {seed}", *(f"{metrics[c]:.3f}" for c in columns))
    mean = {c: statistics.fmean(run[c] for run in runs) for c in columns}
    table.add_row("mean", *(f"{mean[c]:.3f}" for c in columns))
    measured = (MEASURED.get(c, math.nan) for c in columns)
    table.add_row("reference code", *("-" if math.isnan(v) else f"{v:.3f}" for v in measured))
    console = Console(width=180)
    console.print(table)
    for name, (rule, holds) in BARS.items():
        verdict = "met" if holds(mean[name]) else "MISSED"
        console.print(f"mean {name} {mean[name]:.3f}: {rule}: {verdict}", highlight=False)


if __name__ == "__main__":
    main()
