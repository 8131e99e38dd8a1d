"""The figures of a sweep's table: launches the sweep, or resumes it, and reads its results.

    python benchmarks/defenses.py sweeps/quickstart.yaml --json docs/figures/quickstart.json
    python benchmarks/defenses.py sweeps/readme_defenses.yaml data.path=FOLDER/sst2 \\
        --json docs/figures/readme-defenses.json
    python benchmarks/defenses.py sweeps/readme_defenses.yaml data.path=FOLDER/sst2 \\
        'grid.attack.name=[addsent]' --json docs/figures/readme-defenses.json --add
    python benchmarks/defenses.py --markdown docs/figures/readme-defenses.json

The first three run `btu launch` with the given overrides; where every cell is done, nothing is
computed. The figures have a row per cell, as fractions, and the code, device and versions that
computed them. The third measures a part of a large table, and keeps the rows of other cells that
the file has. The last prints the table of the README from such a file: a row per defense and two
columns per attack where there are several defenses, else a row per attack. Checks that every cell
of the sweep is done.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Judge, add_options

ROOT = Path(__file__).resolve().parent.parent
METRICS = (
    "asr", "cacc", "ftr", "flagged", "undefended_asr", "undefended_cacc", "tuned_asr", "tuned_cacc",
    "detection_precision", "detection_recall", "sample_precision", "sample_recall", "seconds",
)  # fmt: skip
# Columns of the table of one defense; all but `flagged` are in percent.
SHORT = ("asr", "cacc", "ftr", "flagged", "undefended_asr", "tuned_asr")
NAMES = {"badnets": "BadNets", "addsent": "AddSent"}
# What tells the rows of a file apart.
CELL = ("attack", "defense", "seed")
# What computed a result, from its tags.
COMPUTED = ("code", "device", "threads", "python", "torch", "transformers", "precision")


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per cell: attack, defense, seed, metrics as fractions, marks.

    An undefined metric is null. A metric that the defense does not have is left out.
    """
    from orchestrator.report.marks import joined, marks

    rows = []
    for record in records:
        config, metrics = record["config"], record["metrics"]
        row = {
            "attack": config["attack"]["name"],
            "defense": config["defense"]["name"],
            "seed": config["seed"],
        }
        for name in METRICS:
            if name in metrics:
                row[name] = metrics[name] if math.isfinite(metrics[name]) else None
        rows.append({**row, "marks": joined(marks(record))})
    return sorted(rows, key=lambda row: tuple(row[name] for name in CELL))


def computed_by(records: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the code, hardware and versions of the results; several where they differ."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name in COMPUTED:
            if name in record["tags"]:
                found.setdefault(name, set()).add(str(record["tags"][name]))
    return {name: sorted(values) for name, values in found.items()}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the README from the rows of a figure's file."""
    by_defense: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by_defense.setdefault(row["defense"], {}).setdefault(row["attack"], []).append(row)
    attacks = sorted({row["attack"] for row in rows}, key=lambda name: (name != "badnets", name))
    if len(by_defense) == 1:
        return _by_attack(rows)
    from btu.defenses.base import DEFENSE_KINDS, DEFENSES

    kinds = {name: DEFENSES.load(name).KIND for name in by_defense}
    order = list(DEFENSE_KINDS)
    # Controls first, then by when a defense acts.
    order.insert(0, order.pop(order.index("control")))
    heads = [f"{NAMES.get(name, name)} ASR | CACC" for name in attacks]
    lines = [f"| defense | acts | {' | '.join(heads)} |", "|---|---|" + "---|---|" * len(attacks)]
    for name in sorted(by_defense, key=lambda name: (order.index(kinds[name]), name)):
        cells = [
            percent(_mean(by_defense[name].get(attack, ()), metric))
            for attack in attacks
            for metric in ("asr", "cacc")
        ]
        lines.append(f"| `{name}` | {kinds[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_attack(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the quick start: fixed columns, a row per attack."""
    heads = ["attack", *(name if name == "flagged" else f"{name} %" for name in SHORT), "marks"]
    table = [heads]
    for row in rows:
        values = [
            str(int(row[name])) if name == "flagged" else percent(row[name]) for name in SHORT
        ]
        table.append([row["attack"], *values, row["marks"] or "-"])
    widths = [max(len(line[at]) for line in table) for at in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if at in (0, len(heads) - 1) else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return sum(values) / len(values) if values else None


def percent(fraction: float | None) -> str:
    """Return a fraction in percent with one decimal; ``-`` if it is undefined."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def judge_cells(judge: Judge, cells: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Judge that each of so many cells has a result, and take its figures."""
    judge.structure(f"each of {cells} cells has a result", str(len(records)),
                    len(records) == cells)  # fmt: skip
    judge.figures |= {"computed by": computed_by(records), "rows": rows_of(records)}


def with_earlier(figures: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with those rows of earlier ones that are of other cells."""
    rows = {tuple(row[name] for name in CELL): row for row in earlier["rows"]}
    rows |= {tuple(row[name] for name in CELL): row for row in figures["rows"]}
    computed = {
        name: sorted({*figures["computed by"].get(name, ()), *earlier["computed by"].get(name, ())})
        for name in COMPUTED
    }
    return {
        "computed by": {name: values for name, values in computed.items() if values},
        "rows": [rows[cell] for cell in sorted(rows)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", help="a sweep file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the table of figures")
    parser.add_argument("--add", action="store_true", help="keep other rows of the file of --json")
    add_options(parser)
    options = parser.parse_intermixed_args()
    if options.add and options.json is None:
        parser.error("--add needs --json FILE, whose rows it keeps")
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())["figures"]["rows"]))
        return
    if options.sweep is None:
        parser.error("name a sweep file, or figures with --markdown FILE")
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.results.folder import find_sweep
    from orchestrator.sweep.load import load_sweep

    command = [sys.executable, "-m", "orchestrator.cli", "launch", options.sweep]
    done = subprocess.run([*command, *options.overrides], check=False)
    judge = Judge.of("defenses", options)
    judge.structure("btu launch ends well", f"exit code {done.returncode}", done.returncode == 0)
    sweep = load_sweep(Path(options.sweep), options.overrides)
    cells = plan_sweep(sweep, Planner()).cells
    records = [r for r in find_sweep(sweep.output, sweep.name).records() if r["key"] in cells]
    judge_cells(judge, len(cells), records)
    if options.add and options.json.exists():
        judge.figures |= with_earlier(
            judge.figures, json.loads(options.json.read_text())["figures"]
        )
    print(markdown(judge.figures["rows"]))
    judge.end()


if __name__ == "__main__":
    main()
