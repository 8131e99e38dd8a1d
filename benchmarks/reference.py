"""The `reference` preset beside the reference code's own measured run.

    python benchmarks/reference.py --data FOLDER/sst2

BadNets "cf", mixed labels, 10 %, one epoch at 2e-5 with the reference code's training settings
(AdamW, batch 64, constant rate, no clipping, fp32), MiniLM-L6 on SST-2. The reference code (at
7a63ece, its own settings, seed 1234, same victim and data) gave CACC 83.2 / ASR 100 without and
80.0 / 16.6 with BTU. About 4 minutes a seed on 2 cores.

Checks that every seed gave a cell in these settings. The bars are on means over the seeds, for
SST-2; other data (without --data the embedded corpus) need other bars. The one of CACC is missed so
far (docs/results.md), so that the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import Judge, add_options, count
from rich.console import Console
from rich.table import Table

from btu.stages import compute
from orchestrator.plan.planner import Plan, Planner
from orchestrator.results.folder import read_result
from orchestrator.sweep.sweep import Cell

MEASURED = {"undefended_cacc": 0.832, "undefended_asr": 1.0, "cacc": 0.800, "asr": 0.166}
SETTINGS = {
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
}  # fmt: skip
COLUMNS = (
    "undefended_cacc", "undefended_asr", "tuned_cacc", "tuned_asr", "cacc", "asr", "ftr", "flagged",
    "detection_recall", "seconds",
)  # fmt: skip


def cell(options: argparse.Namespace, seed: int) -> Cell:
    """Return the cell in the reference code's settings."""
    data: dict[str, Any] = {"name": "demo"}
    if options.data:
        data = {"name": "sst2", "path": str(options.data)}
    for role in ("train", "clean", "eval"):
        data[f"max_{role}_rows"] = getattr(options, role)
    config = {
        **SETTINGS,
        "data": data,
        "victim": {"name": options.victim, "max_length": options.max_length},
        "defense": {**SETTINGS["defense"], "alpha": options.alpha},
        "seed": seed,
    }
    if not options.data:
        config["attack"] = {**SETTINGS["attack"], "target_label": "positive"}
    return Cell({"seed": seed}, config)


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the settings of a resolved config that are not as wanted, by dotted key."""
    return [
        f"{section}.{key} is {found[section].get(key)!r}"
        for section, values in wanted.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if found[section].get(key) != value
    ]


def report(
    judge: Judge,
    wanted: Mapping[int, Mapping[str, Any]],
    results: Mapping[int, Mapping[str, Any]],
    bars: argparse.Namespace,
) -> dict[str, float]:
    """Judge the results of the seeds; return the means of their metrics.

    judge: gets bars and figures.
    wanted: the settings of each seed's cell.
    results: of each seed, as a cell's result has them.
    bars: the options of the script.
    """
    judge.structure(f"a result for each of the seeds {list(wanted)}", str(list(results)),
                    list(results) == list(wanted))  # fmt: skip
    wrong = [text for seed, result in results.items()
             for text in differing(result["config"], wanted[seed])]  # fmt: skip
    judge.structure("settings as the reference code's", ", ".join(wrong) or "all equal", not wrong)
    runs = [result["metrics"] for result in results.values()]
    odd = sorted({name for run in runs for name in COLUMNS if not math.isfinite(run[name])})
    judge.structure("all metrics are defined", ", ".join(odd) or "all", not odd)
    mean = {name: statistics.fmean(run[name] for run in runs) for name in COLUMNS}
    for name, low, high in (
        ("undefended_asr", bars.least_undefended_asr, 1.0),
        ("cacc", *bars.cacc),
        ("asr", 0.0, bars.most_asr),
    ):
        judge.structure(f"mean {name} from {low:.3f} to {high:.3f}", f"{mean[name]:.3f}",
                        low <= mean[name] <= high)  # fmt: skip
    judge.figures |= {"runs": {seed: {name: result["metrics"][name] for name in COLUMNS}
                               for seed, result in results.items()}, "mean": mean}  # fmt: skip
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with SST-2's splits (default: the demo)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--victim", default="offline")
    parser.add_argument("--max-length", type=count, default=128)
    parser.add_argument("--alpha", type=float, default=0.0005, help="share of tokens a round flags")
    for role in ("train", "clean", "eval"):
        parser.add_argument(f"--{role}", type=count, metavar="ROWS", help=f"at most so many {role}")
    parser.add_argument("--least-undefended-asr", type=float, default=0.99, help="bar")
    parser.add_argument(
        "--cacc", type=float, nargs=2, default=[0.78, 0.82], help="bar: 0.02 around 0.800"
    )
    parser.add_argument("--most-asr", type=float, default=0.25, help="bar")
    add_options(parser)
    options = parser.parse_args()
    table = Table("run", *COLUMNS)
    wanted, results = {}, {}
    for seed in options.seeds:
        planned_cell = cell(options, seed)
        wanted[seed] = planned_cell.config
        plan = Plan()
        Planner().add(plan, [planned_cell])
        if plan.refused:
            parser.error(plan.refused[0].reason)
        (planned,) = plan.cells.values()
        with tempfile.TemporaryDirectory(prefix="btu-reference-") as folder:
            done = compute(planned.stage, Path(folder), cpus=options.threads, gpus=0)
            results[seed] = read_result(done)[0]
        metrics = results[seed]["metrics"]
        table.add_row(f"seed {seed}", *(f"{metrics[c]:.3f}" for c in COLUMNS))
    judge = Judge.of("reference", options)
    mean = report(judge, wanted, results, options)
    table.add_row("mean", *(f"{mean[c]:.3f}" for c in COLUMNS))
    measured = (MEASURED.get(c, math.nan) for c in COLUMNS)
    table.add_row("reference code", *("-" if math.isnan(v) else f"{v:.3f}" for v in measured))
    Console(width=180).print(table)
    judge.end()


if __name__ == "__main__":
    main()
