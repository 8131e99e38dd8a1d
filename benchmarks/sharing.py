"""What sharing stages saves: one attack, eight thresholds, SST-2, with sharing and without.

    python benchmarks/sharing.py --data FOLDER/sst2                  # about 10 minutes on 2 cores
    python benchmarks/sharing.py --data FOLDER/sst2 --rule contrast
    python benchmarks/sharing.py --thresholds 2 --no-bars            # the embedded corpus

Both runs go through the same launcher; without sharing, every stage's key is made its cell's own.
Each threshold of `top_fraction` flags other tokens; neighbouring ones of `contrast` often flag the
same, and what follows is then computed once. Checks that both runs have all cells, that each stage
was computed once or taken over from an equal one, and that all metrics are equal to the last digit.
Prints the ratio of the wall times. Bar of speed: 3.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from checks import computations
from figures import Judge, add_options, count

if TYPE_CHECKING:
    from btu.stages import Stage
    from orchestrator.plan.planner import Plan

# By rule: the key of its threshold, and thresholds around the default.
THRESHOLDS = {
    "top_fraction": ("alpha", [1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3]),
    "contrast": ("threshold", [3.0, 3.5, 4.0, 4.5, 4.83, 5.0, 5.5, 6.0]),
}
SWEEP = """
name: sharing
output: {output}
data: {{{data}, max_train_rows: {rows}, max_clean_rows: {clean}, max_eval_rows: {eval}}}
victim: {{name: {victim}, max_length: {length}}}
attack: {{name: badnets, poison_rate: 0.1, target_label: {target}}}
grid: {{defense.{key}: {values}}}
controls: []
"""


class Launched(NamedTuple):
    """metrics: by threshold, as text, but for those of the clock. stages: how many the plan has.

    computed: how many were computed. taken: how many took the result of an equal one over.
    seconds: how long the launch took.
    """

    metrics: dict[float, dict[str, str]]
    stages: int
    computed: int
    taken: int
    seconds: float


def launch_once(options: argparse.Namespace, output: Path, shared: bool) -> Launched:
    """Launch the sweep; without sharing, with stages of its own for each cell."""
    from rich.console import Console

    from btu.stages import RECORD
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.results.folder import find_sweep
    from orchestrator.run.on_ray import launch
    from orchestrator.run.progress import SweepProgress
    from orchestrator.sweep.load import load_sweep

    key, values = THRESHOLDS[options.rule]
    if options.rule == "top_fraction":
        values = [round(value * options.scale, 6) for value in values]
    file = output.with_suffix(".yaml")
    file.write_text(
        SWEEP.format(
            output=output,
            data=f"name: sst2, path: {options.data.resolve()}" if options.data else "name: demo",
            target=1 if options.data else "positive",
            key=key,
            values=values[: options.thresholds],
            rows=options.rows,
            clean=options.clean,
            eval=options.eval,
            victim=options.victim,
            length=options.max_length,
        )
    )
    sweep = load_sweep(file)
    planner = Planner()
    plan = plan_sweep(sweep, planner)
    if not shared:
        plan = apart(plan)
    stages = {stage.key: stage for c in plan.cells.values() for stage in c.stage.closure()}
    started = time.monotonic()
    with (output.with_suffix(".log")).open("w") as log:
        result = launch(sweep, plan, planner, SweepProgress(Console(file=log)))
    took = time.monotonic() - started
    if not result.complete:
        raise SystemExit(f"the launch did not end well: {result}")
    results = find_sweep(output, "sharing")
    metrics = {
        record["varied"][f"defense.{key}"]: {
            name: repr(value)
            for name, value in record["metrics"].items()
            if not name.startswith("seconds")
        }
        for record in results.records()
    }
    computed = sum(computations(results.journal()).values())
    may = [key for key, stage in stages.items() if stage.may_be_equal]
    taken = sum("computed_as" in results.store.read_json(key, RECORD) for key in may)
    return Launched(metrics, len(stages), computed, taken, took)


def apart(plan: Plan) -> Plan:
    """Return a plan whose cells share no stage: each stage's key is made its cell's own."""
    from orchestrator.plan.planner import Plan

    found = Plan()
    for number, cell in enumerate(plan.cells.values()):
        stage = _own(cell.stage, number, {})
        found.cells[stage.key] = replace(cell, stage=stage)
    return found


def _own(stage: Stage, number: int, known: dict[str, Stage]) -> Stage:
    if stage.key not in known:
        inputs = {role: _own(before, number, known) for role, before in stage.inputs.items()}
        config = {**stage.config, "only for cell": number}
        known[stage.key] = replace(stage, config=config, inputs=inputs)
    return known[stage.key]


def report(judge: Judge, thresholds: int, shared: Launched, alone: Launched) -> None:
    """Judge what both launches of so many thresholds gave."""
    for name, launched in (("with", shared), ("without", alone)):
        judge.structure(
            f"{thresholds} cells {name} sharing",
            str(len(launched.metrics)),
            len(launched.metrics) == thresholds,
        )
        judge.structure(
            f"each of {launched.stages} stages {name} sharing is computed or taken over once",
            f"{launched.computed} computed, {launched.taken} taken over",
            launched.computed + launched.taken == launched.stages,
        )
    judge.structure("without sharing nothing is taken over", str(alone.taken), alone.taken == 0)
    judge.structure("sharing leaves stages out", f"{shared.stages} instead of {alone.stages}",
                    shared.stages < alone.stages)  # fmt: skip
    differ = sorted(k for k in shared.metrics if shared.metrics[k] != alone.metrics.get(k))
    judge.structure("results equal to the last digit", f"{len(differ)} cells differ", not differ)
    ratio = alone.seconds / shared.seconds
    judge.fast(
        "3 times as long without sharing",
        f"{alone.seconds:.0f} s / {shared.seconds:.0f} s = {ratio:.2f}",
        ratio >= 3,
    )
    judge.figures |= {
        "cells": thresholds,
        "stages": {"with sharing": shared.stages, "without": alone.stages},
        "taken over": shared.taken,
        "seconds": {"with sharing": shared.seconds, "without": alone.seconds},
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with SST-2's splits; default: the demo")
    parser.add_argument("--thresholds", type=count, default=8, choices=range(2, 9))
    parser.add_argument("--rule", default="top_fraction", choices=THRESHOLDS)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies alphas: small victims")
    parser.add_argument("--rows", type=count, default=2000, help="training rows")
    parser.add_argument("--clean", type=count, default=500, help="reserved clean rows")
    parser.add_argument("--eval", type=count, default=300, help="evaluation rows")
    parser.add_argument("--victim", default="offline")
    parser.add_argument("--max-length", type=count, default=128)
    add_options(parser)
    options = parser.parse_args()
    if options.scale != 1 and options.rule != "top_fraction":
        parser.error("--scale multiplies alphas, the thresholds of --rule top_fraction alone")
    # Two workers share two cores: one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with tempfile.TemporaryDirectory(prefix="btu-sharing-") as folder:
        for name in ("shared", "apart"):
            found[name] = launch_once(options, Path(folder) / name, name == "shared")
            print(f"{name}: {len(found[name].metrics)} thresholds in {found[name].seconds:.0f} s",
                  flush=True)  # fmt: skip
    judge = Judge.of("sharing", options)
    report(judge, options.thresholds, found["shared"], found["apart"])
    judge.end()


if __name__ == "__main__":
    main()
