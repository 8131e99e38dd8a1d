"""`btu plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.shared import (
    Overrides,
    SweepFile,
    byte_size,
    cell_count,
    console,
    print_data,
    say,
    warn,
)

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan, Planner
    from orchestrator.plan.work import Work
    from orchestrator.sweep.sweep import Sweep


def plan(
    sweep: SweepFile,
    overrides: Overrides = None,
    cells: Annotated[
        int, typer.Option(min=0, help="How many cells to show; refused ones first, 0 shows all.")
    ] = 40,
) -> None:
    """Show what a sweep comes to: cells, shared stages, disk and time. Trains nothing.

    Times come from what earlier launches with this output folder took.

    Example: `btu plan sweeps/sst2_thresholds.yaml data.path=data/sst2 'grid.seed=[0,1,2]'`
    """
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.sweep.load import load_sweep

    loaded = load_sweep(sweep, overrides or [])
    planner = Planner()
    show_plan(loaded, planner, plan_sweep(loaded, planner), cells)


def show_plan(sweep: Sweep, planner: Planner, planned: Plan, limit: int) -> None:
    from orchestrator.plan.work import survey, timings_for
    from orchestrator.run.progress import duration, label
    from orchestrator.store.store import Store

    if sweep.optuna is not None:
        from orchestrator.plan.planner import example_plan

        planned = example_plan(sweep, planner)
        from orchestrator.run.study import StudySearch

        left, trials = StudySearch(sweep, sweep.folder).open, sweep.optuna.trials
        say(f"{trials - left} of {trials} suggestions are measured.")
        say("The cells are chosen as the sweep goes; one suggestion, as an example:")
    store = Store(sweep.store_location, warn=warn)
    committed, dropped = store.committed(), store.dropped()
    failed = {record["key"]: record["reason"] for record in store.failures()}
    timings = timings_for(store.timings(), sweep.resources)
    work = survey(planned, committed=committed, dropped=dropped, failed=failed, timings=timings)
    table = Table("cell", "coordinates", "state", header_style="bold")
    rows = [
        ("-", label(refused.varied), f"[red]refused[/red]: {escape(refused.reason)}")
        for refused in planned.refused
    ]
    for cell in planned.cells.values():
        if cell.key in committed:
            state = "done"
        elif cell.key in work.failed:
            state = f"[red]failed[/red]: {escape(work.failed[cell.key].splitlines()[0])}"
        else:
            state = "to run"
        rows.append((cell.key, label(cell.varied), state))
    for key, coordinates, state in rows[: limit or None]:
        table.add_row(key, escape(coordinates), state)
    console.print(table)
    if limit and len(rows) > limit:
        say(f"... and {cell_count(len(rows) - limit, 'more ')} (--cells 0 shows all)")
    print_data(planner)
    total = len(planned.cells)
    to_run = total - work.done - len(work.failed)
    say(f"search: {sweep.describe()}")
    controls = f", {planned.controls} of them controls" if planned.controls else ""
    say(
        f"{cell_count(total)}{controls}: {work.done} done, {to_run} to run, "
        f"{len(work.failed)} failed earlier; "
        f"{len(planned.refused)} refused, {planned.duplicates} duplicates folded."
    )
    if not to_run:
        return
    stages = Table("stage", "to compute", "without sharing", header_style="bold")
    for name, count in work.stages.items():
        stages.add_row(name, str(count), str(work.naive.get(name, count)))
    console.print(stages)
    distinct, naive = sum(work.stages.values()), sum(work.naive.values())
    saving = f"{distinct} stages instead of {naive}"
    if work.seconds is None or work.naive_seconds is None or work.longest is None:
        some = ", ".join(work.unmeasured[:4]) + (" ..." if len(work.unmeasured) > 4 else "")
        say(f"Sharing: {saving}. Time: unknown until each kind of stage has run once ({some}).")
    else:
        at_once = _at_once(sweep)
        expected = max(work.seconds / at_once, work.longest)
        less = 1 - work.seconds / work.naive_seconds if work.naive_seconds else 0.0
        say(
            f"Sharing: {saving}; {duration(work.seconds)} of computing instead of "
            f"{duration(work.naive_seconds)}, {less:.0%} less."
        )
        say(
            f"Time: about {duration(expected)} with {at_once} at once, as on this machine; not "
            f"under {duration(work.longest)}, the longest chain, on any cluster."
        )
    kept = sweep.store.keep == "models"
    at_most = work.models if kept else min(work.models, _model_peak(work, _at_once(sweep)))
    say(
        f"Disk: about {byte_size(at_most + work.small)}"
        + (
            " with every model kept (store.keep=models)."
            if kept
            else f" at most at once; {byte_size(work.models + work.small)} with store.keep=models."
        )
        + (
            f" This is without the models of {', '.join(work.unsized)}, which are not here yet."
            if work.unsized
            else ""
        )
    )


def _at_once(sweep: Sweep) -> int:
    """Return how many stages this machine runs at once, by its CPUs."""
    import os

    return max(1, int((os.cpu_count() or 1) / sweep.resources.cpu))


def _model_peak(work: Work, at_once: int) -> int:
    """Return the bytes of the models that the schedule lets be on disk at once."""
    from orchestrator.run.schedule import most_models

    return work.model_bytes * (most_models(at_once) + at_once)
