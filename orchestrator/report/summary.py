"""The summary of a sweep, for its run in MLflow: means over seeds, tables, plots, a note."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from btu.metrics import METRICS
from btu.printing import csv_text
from orchestrator.report import marks
from orchestrator.report.charts import named_cells
from orchestrator.report.figures import write_figures
from orchestrator.report.html import page
from orchestrator.report.table import (
    ALL_METRICS,
    CONFIG_COLUMNS,
    MARKS,
    THRESHOLD_COLUMNS,
    coordinates,
    markdown,
    mean_over_seeds,
    metric_columns,
    readable,
    results_table,
)
from orchestrator.results.folder import MEANS_TABLE, SWEEP
from orchestrator.results.source import Snapshot, Source
from orchestrator.sweep.sections import CONTROL

# The metrics that the summary run has for each group of seeds; its tables have all metrics.
SHOWN = tuple(name for name, entry in METRICS.items() if entry.summarized)
# Limit of a group's label in a metric's name; MLflow allows 250 characters for the whole name.
LABEL_CHARACTERS = 200
MEANS, CELLS = "means.csv", "cells.csv"
PAGE = "report.html"


@dataclass(frozen=True)
class Summary:
    """What the summary run gets.

    finished: how many cells are finished.
    metrics: fractions, by names that MLflow accepts.
    note: the description, in Markdown.
    files: the artifacts, by name.
    """

    finished: int
    metrics: Mapping[str, float]
    note: str
    files: Mapping[str, bytes]


def summarize(source: Source, launched: int, sweep: str, limit: int) -> Summary:
    """Return a sweep's summary.

    source: the sweep's results.
    launched: how many cells the sweep has.
    sweep: the content of its file.
    limit: how many characters the note may have.
    """
    source = Snapshot(source)
    records, failures = source.records(), source.failures()
    metrics = {
        "cells/launched": float(launched),
        "cells/finished": float(len(records)),
        "cells/failed": float(len(failures)),
    }
    files = {SWEEP: sweep.encode()}
    table = ""
    if records:
        means = mean_over_seeds(results_table(records))
        metrics |= group_metrics(means)
        files[MEANS] = csv_text(means).encode()
        files[MEANS_TABLE] = table_json(means).encode()
        files[CELLS] = cells_csv(records)
        files |= pages(source)
        table = _markdown(means)
    note = _note(source.name, records, failures, launched)
    if table:
        more = "\n\nMean ± 95 % t interval over seeds"
        # A table that would make the description too long is only in the artifact.
        fits = len(note) + len(more) + len(table) + 10 < limit
        note += f"{more}:\n\n{table}" if fits else f"{more}: artifact `{MEANS}`."
    return Summary(len(records), metrics, note[:limit], files)


def pages(source: Source) -> dict[str, bytes]:
    """Return the page and the figures of a sweep with finished cells, by file name."""
    with tempfile.TemporaryDirectory(prefix="btu-summary-") as folder:
        drawn = write_figures(source, Path(folder), ("png",))
        figures = {f"figures/{path.name}": path.read_bytes() for path in drawn}
    return {PAGE: page(source).encode(), **figures}


def group_metrics(means: pd.DataFrame) -> dict[str, float]:
    """Return means and half widths by name: ``asr/badnets 0.1 btu``, ``asr_ci/badnets 0.1 btu``.

    Undefined values are left out.

    means: the result of `mean_over_seeds`.
    """
    found: dict[str, float] = {}
    used: set[str] = set()
    for row in means.to_dict("records"):
        label = _label({str(name): value for name, value in row.items()}, used)
        used.add(label)
        found[f"seeds/{label}"] = float(row["seeds"])
        for name in (part for metric in SHOWN for part in (metric, f"{metric}_ci")):
            if not pd.isna(row[name]):
                found[f"{name}/{label}"] = float(row[name])
    return found


def _label(row: Mapping[str, Any], used: Collection[str]) -> str:
    """Return a label that only this row of means has, in characters that MLflow accepts."""
    parts = []
    for name in coordinate_columns(row):
        value = row[name]
        if value is None or value != value or value == "":
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        # Attacks, rates, defenses and controls are clear without the name of the column.
        alone = name == CONTROL or (name in CONFIG_COLUMNS and name not in THRESHOLD_COLUMNS)
        parts.append(text if alone else f"{name.rpartition('.')[2]} {text}")
    exact = " ".join(parts)
    label = re.sub(r"[^\w.\- ]+", "_", exact, flags=re.ASCII)[:LABEL_CHARACTERS].strip()
    if label != exact or label in used:
        # Replaced or cut characters may have made two labels equal.
        given = json.dumps([str(row[name]) for name in coordinate_columns(row)])
        label += f" {hashlib.sha256(given.encode()).hexdigest()[:8]}"
    return label


def coordinate_columns(columns: Collection[str]) -> list[str]:
    """Return the columns of `mean_over_seeds` that identify the cells that a row averages."""
    measured = {part for name in ALL_METRICS for part in (name, f"{name}_ci")}
    return [name for name in columns if name not in (*measured, "seeds", "seed", MARKS)]


def cells_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a CSV with a row per cell: coordinates, metrics, marks, the cell's key and its run."""
    table = named_cells(list(records))
    names = [*coordinates(records).columns, *metric_columns(table), MARKS, "key", "run_id"]
    return csv_text(table.reindex(columns=names)).encode()


def table_json(table: pd.DataFrame) -> str:
    """Return a table in the JSON that MLflow's UI shows; fractions, with all digits."""
    known = table.astype(object).where(table.notna(), None)
    return json.dumps({"columns": list(table.columns), "data": known.to_numpy().tolist()})


def _markdown(means: pd.DataFrame) -> str:
    wanted = [*coordinate_columns(list(means.columns)), "seeds", *SHOWN, MARKS]
    spread = [f"{name}_ci" for name in SHOWN]
    return markdown(readable(means[[*wanted, *spread]]))


def _note(
    name: str,
    records: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    launched: int,
) -> str:
    failed = f", {len(failures)} failed" if failures else ""
    lines = [
        f"Summary of sweep **{name}**: {len(records)} of {launched} cells finished{failed}. Its "
        "cells are the other runs of this experiment (`tags.kind = 'trial'`).",
        f"Run it again, or go on with it: `btu launch {SWEEP}`, with the artifact. Charts: "
        f"`{PAGE}` and `figures`. Tables: `{MEANS}`, `{CELLS}`; in a terminal "
        f"`btu report {name} --mean --tracking-uri URI`.",
    ]
    lines += [f"**Mark** {line}." for line in marks.summary(records)]
    reasons = Counter(failure["reason"].splitlines()[0][:200] for failure in failures)
    lines += [f"**Failed** {count}: {reason}" for reason, count in reasons.most_common(5)]
    return "\n\n".join(lines)
