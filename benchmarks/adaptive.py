"""Attackers who know the detection: where it misses the trigger, and what evading costs them.

    python benchmarks/adaptive.py --data FOLDER/sst2 --plot FILE.png     # about an hour on 2 cores
    python benchmarks/adaptive.py 'list=[{attack.cover_rate: 0}]'        # one strength, hub data

Launches `sweeps/adaptive.yaml` with the given overrides, or resumes it, and prints a row per
strength of each evasion: precision and recall of the trigger's tokens, ASR without and with the
defense, CACC; means over seeds. Checks that every cell has a result, and that without an evasion
the detection finds the trigger and nothing else.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from figures import Judge, add_options

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "sweeps" / "adaptive.yaml"
# An evasion's key -> how its axis is called. Spread 1 and cover 0 are the attack without one.
EVASIONS = {
    "cover_rate": "cover rows (fraction of the training rows)",
    "spread": "trigger words (each in 1/N of the poisoned rows)",
    "camouflage": "rows of the target class with the trigger word",
}
IDLE = {"cover_rate": 0.0, "spread": 1.0, "camouflage": 0.0}
METRICS = ("detection_precision", "detection_recall", "undefended_asr", "asr", "cacc", "tuned_cacc")


def rows_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per cell and evasion: evasion, strength, seed, metrics as fractions.

    A cell without an evasion is the weakest of each. A metric that is not defined is None.
    """
    rows = []
    for record in records:
        attack, metrics = record["config"]["attack"], record["metrics"]
        # A sweep file's null is no evasion.
        strengths = {name: float(attack.get(name) or IDLE[name]) for name in EVASIONS}
        used = [name for name, value in strengths.items() if value != IDLE[name]]
        for name in used or EVASIONS:
            row = {"evasion": name, "strength": strengths[name], "seed": record["config"]["seed"]}
            rows.append({**row, **{metric: _defined(metrics[metric]) for metric in METRICS}})
    return sorted(rows, key=lambda row: (row["evasion"], row["strength"], row["seed"]))


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def means(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per evasion and strength: the seeds, and means of the metrics."""
    grouped = pd.DataFrame(rows).groupby(["evasion", "strength"], as_index=False)
    found = grouped[list(METRICS)].mean()  # what is not defined is left out
    return found.assign(seeds=grouped["seed"].nunique()["seed"])


def judge_cells(judge: Judge, cells: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Judge that each of so many cells has a result, and what is found without an evasion."""
    judge.structure(f"each of {cells} cells has a result", str(len(records)),
                    len(records) == cells)  # fmt: skip
    rows = rows_of(records)
    judge.figures["rows"] = rows
    plain = [row for row in rows if row["strength"] == IDLE[row["evasion"]]]
    if plain:
        worst = {name: min(row[name] or 0.0 for row in plain) for name in METRICS[:2]}
        judge.structure(
            "without an evasion the trigger is found, and nothing else",
            ", ".join(f"{name.removeprefix('detection_')} {worst[name]:.2f}" for name in worst),
            all(value == 1 for value in worst.values()),
        )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, in percent."""
    lines = ["| evasion | strength | precision | recall | ASR undefended | ASR | CACC |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in means(rows).itertuples():
        shown = [getattr(row, name) for name in METRICS[:5]]
        cells = ["-" if value != value else f"{100 * value:.1f}" for value in shown]
        lines.append(f"| `{row.evasion}` | {row.strength:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the table: a panel per evasion, lines over its strength."""
    from btu.drawing import draw, save
    from btu.panels import BLUE, GREEN, ORANGE, VERMILION, Axis, Panel
    from orchestrator.report.charts import over_seeds

    lines = (
        ("detection_recall", "recall", ORANGE, "solid", "circle"),
        # On top, since both are often equal.
        ("detection_precision", "precision", BLUE, "dot", "square"),
        ("undefended_asr", "ASR undefended", VERMILION, "dash", "triangle-down"),
        ("asr", "ASR", VERMILION, "solid", "triangle-down"),
        ("cacc", "CACC", GREEN, "dot", "circle"),
    )
    found = pd.DataFrame(rows).rename(columns={"strength": "threshold"})
    panels = []
    for name, label in EVASIONS.items():
        part = found[found["evasion"] == name]
        if part.empty:
            continue
        # Strengths are few and uneven: one step each.
        steps = {value: f"{value:g}" for value in sorted(part["threshold"].unique())}
        part = part.assign(threshold=part["threshold"].map(list(steps).index))
        series = [
            over_seeds(part, metric, text, color, dash=dash, marker=marker)
            for metric, text, color, dash, marker in lines
        ]
        series = [_named(one, list(steps.values())) for one in series]
        y = Axis("", percent=True, span=(-0.04, 1.04))
        panels.append(Panel(name, "lines", Axis(label, "category"), y, series))
    save(draw(panels, size=(3.6, 2.7)), path)


def _named(series: Any, names: list[str]) -> Any:
    from dataclasses import replace

    return replace(series, x=[names[place] for place in series.x])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[])
    parser.add_argument("--data", type=Path, help="a folder with SST-2's splits; default: the hub")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure: png, svg, pdf")
    add_options(parser)
    options = parser.parse_intermixed_args()
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.report.curve_figure import check_path
    from orchestrator.results.folder import find_sweep
    from orchestrator.sweep.load import load_sweep

    if options.plot:
        check_path(options.plot)
    overrides = [*([f"data.path={options.data}"] if options.data else []), *options.overrides]
    command = [sys.executable, "-m", "orchestrator.cli", "launch", str(SWEEP)]
    done = subprocess.run([*command, *overrides], check=False)
    judge = Judge.of("adaptive", options)
    judge.structure("btu launch ends well", f"exit code {done.returncode}", done.returncode == 0)
    sweep = load_sweep(SWEEP, overrides)
    cells = plan_sweep(sweep, Planner()).cells
    records = [r for r in find_sweep(sweep.output, sweep.name).records() if r["key"] in cells]
    judge_cells(judge, len(cells), records)
    print(table(judge.figures["rows"]))
    if options.plot:
        plot(judge.figures["rows"], options.plot)
    judge.end()


if __name__ == "__main__":
    main()
