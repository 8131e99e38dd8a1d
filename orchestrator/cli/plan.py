"""`btu plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.shared import (
    Overrides,
    SweepFile,
    cell_count,
    console,
    print_data,
    say,
    warn,
)

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan, Planner
    from orchestrator.sweep.modes.base import SequentialMode
    from orchestrator.sweep.sweep import Sweep

# Cells that a plan shows.
SHOWN = 40


def plan(
    sweep: SweepFile,
    overrides: Overrides = None,
    cells: Annotated[
        int, typer.Option(min=0, help="How many cells to show, refused ones first; 0 shows all.")
    ] = SHOWN,
) -> None:
    """Show what a sweep would run: cells, shared stages, disk and time. Trains nothing.

    Times are estimated from earlier launches with this output folder.

    Example: `btu plan sweeps/sst2_thresholds.yaml data.path=data/sst2 'grid.seed=[0,1,2]'`
    """
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.sweep.load import load_sweep

    loaded = load_sweep(sweep, overrides or [])
    planner = Planner()
    show_plan(loaded, planner, plan_sweep(loaded, planner), cells)


def show_plan(sweep: Sweep, planner: Planner, planned: Plan, limit: int) -> None:
    """Print a plan and what is left of it. limit: how many cells to show; 0 is all."""
    from orchestrator.cli import plan_view
    from orchestrator.plan.planner import overlooked_triggers
    from orchestrator.plan.work import survey, timings_for
    from orchestrator.store.store import Store

    if sweep.sequential is not None:
        planned = _example(sweep, sweep.sequential, planner)
    for warning in overlooked_triggers(planned):
        warn(warning)
    store = Store(sweep.store_location, warn=warn)
    committed, dropped = store.committed(), store.dropped()
    failed = {record["key"]: record["reason"] for record in store.failures()}
    timings = timings_for(store.timings(), sweep.resources)
    work = survey(planned, committed=committed, dropped=dropped, failed=failed, timings=timings)
    rows = plan_view.cell_rows(planned, work.failed, committed)
    console.print(plan_view.cell_table(rows[: limit or None]))
    if limit and len(rows) > limit:
        say(f"... and {cell_count(len(rows) - limit, 'more ')} (--cells 0 shows all)")
    print_data(planner)
    say(f"search: {sweep.describe()}")
    say(plan_view.counts_line(planned, work))
    if len(planned.cells) > work.done + len(work.failed):
        console.print(plan_view.stage_table(work))
        for line in (*plan_view.time_lines(sweep, work), plan_view.disk_line(sweep, work)):
            say(line)


def _example(sweep: Sweep, mode: SequentialMode, planner: Planner) -> Plan:
    """Return the plan of one suggestion of a sweep's sequential mode, and print a note."""
    from orchestrator.plan.planner import example_plan
    from orchestrator.run.study import study_of

    planned = example_plan(sweep, planner)
    left = study_of(mode, sweep).open
    say(f"{mode.trials - left} of {mode.trials} suggestions are measured.")
    say("The cells are chosen while the sweep runs; one suggestion, as an example:")
    return planned
