"""How a plan and what is left of it are shown: tables and lines, without printing them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from orchestrator.cli.shared import byte_size, cell_count, first_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from orchestrator.plan.planner import Plan
    from orchestrator.plan.work import Work
    from orchestrator.sweep.sweep import Sweep


def cell_rows(
    planned: Plan, failed: Mapping[str, str], committed: Collection[str]
) -> list[tuple[str, str, str]]:
    """Return key, coordinates and state of every cell, refused ones first.

    failed: reasons by key. committed: keys with a complete result.
    """
    from orchestrator.run.progress import label

    rows = [
        ("-", label(refused.varied), f"[red]refused[/red]: {escape(refused.reason)}")
        for refused in planned.refused
    ]
    for cell in planned.cells.values():
        if cell.key in committed:
            state = "done"
        elif cell.key in failed:
            state = f"[red]failed[/red]: {escape(failed[cell.key].splitlines()[0])}"
        else:
            state = "to run"
        rows.append((cell.key, label(cell.varied), state))
    return rows


def cell_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """Return the table of some `cell_rows`."""
    table = Table("cell", "coordinates", "state", header_style="bold")
    for key, coordinates, state in rows:
        table.add_row(key, escape(coordinates), state)
    return table


def counts_line(planned: Plan, work: Work) -> str:
    """Return how many cells there are, by state."""
    total = len(planned.cells)
    to_run = total - work.done - len(work.failed)
    controls = f", {planned.controls} of them controls" if planned.controls else ""
    return (
        f"{cell_count(total)}{controls}: {work.done} done, {to_run} to run, "
        f"{len(work.failed)} failed earlier; "
        f"{len(planned.refused)} refused, {planned.duplicates} duplicates folded."
    )


def stage_table(work: Work) -> Table:
    """Return the table of the stages to compute, with and without sharing."""
    table = Table("stage", "to compute", "without sharing", header_style="bold")
    for name, count in work.stages.items():
        table.add_row(name, str(count), str(work.naive.get(name, count)))
    return table


def time_lines(sweep: Sweep, work: Work) -> list[str]:
    """Return what sharing saves and how long the work takes, as far as it is known."""
    from orchestrator.run.progress import duration

    distinct, naive = sum(work.stages.values()), sum(work.naive.values())
    saving = f"{distinct} stages instead of {naive}"
    if work.alike:
        saving += f", and up to {work.alike} fewer where thresholds flag the same tokens"
    if work.seconds is None or work.naive_seconds is None or work.longest is None:
        some = first_names(work.unmeasured)
        return [f"Sharing: {saving}. Time: unknown until each kind of stage has run once ({some})."]
    at_once = _at_once(sweep)
    expected = max(work.seconds / at_once, work.longest)
    less = 1 - work.seconds / work.naive_seconds if work.naive_seconds else 0.0
    return [
        f"Sharing: {saving}; {duration(work.seconds)} of computing instead of "
        f"{duration(work.naive_seconds)}, {less:.0%} less.",
        f"Time: about {duration(expected)} with {at_once} at once, as on this machine; not "
        f"under {duration(work.longest)}, the longest chain, on any cluster.",
    ]


def disk_line(sweep: Sweep, work: Work) -> str:
    """Return how much disk the results and models take."""
    everything = work.models + work.small
    if sweep.store.keep == "models":
        line = f"Disk: about {byte_size(everything)} with every model kept (store.keep=models)."
    else:
        at_most = min(work.models, _model_peak(work, _at_once(sweep)))
        line = (
            f"Disk: about {byte_size(at_most + work.small)} at most at once; "
            f"{byte_size(everything)} with store.keep=models."
        )
    if work.unsized:
        names = ", ".join(work.unsized)
        line += f" This is without the models of {names}, which are not here yet."
    return line


def _at_once(sweep: Sweep) -> int:
    """Return how many stages this machine runs at once, by its CPUs."""
    return max(1, int((os.cpu_count() or 1) / sweep.resources.cpu))


def _model_peak(work: Work, at_once: int) -> int:
    """Return the bytes of the models that the schedule allows on disk at once."""
    from orchestrator.run.schedule import most_models

    return work.model_bytes * (most_models(at_once) + at_once)
