"""`btu plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from btu.errors import UserError
from orchestrator.cli.shared import (
    LargeGrid,
    Overrides,
    SweepFile,
    cell_count,
    console,
    print_data,
    say,
    say_server,
    warn,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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
    download: Annotated[
        bool, typer.Option("--download", help="Download data sets of the hub that are not here.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="Also ask this Ray cluster which of its nodes can hold what, e.g. auto."),
    ] = None,
    yes: LargeGrid = False,
) -> None:
    """Show what a sweep would run: cells, shared stages, disk and time. Trains nothing.

    Times are estimated from earlier launches with this output folder. No connection is opened,
    except with `--download` and `--address`, and to an output URL that you name yourself.

    Example: `btu plan sweeps/sst2_thresholds.yaml data.path=data/sst2 'grid.seed=[0,1,2]'`
    """
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.sweep.load import load_sweep

    loaded = load_sweep(sweep, overrides or [], large=yes)
    planner = Planner(offline=not download)
    show_plan(loaded, planner, plan_sweep(loaded, planner), cells)
    if address is not None:
        _show_nodes(loaded, address)


def _show_nodes(sweep: Sweep, address: str) -> None:
    """Print which nodes of a cluster can hold the stages of a sweep."""
    from orchestrator.run.nodes import node_lines, slots
    from orchestrator.run.on_ray import nodes_at

    nodes = nodes_at(address)
    for line in node_lines(nodes, sweep.resources):
        say(line)
    try:
        at_once = slots(nodes, sweep.resources)
    except UserError as error:
        warn(f"btu launch will refuse this: {error}")
    else:
        say(f"The cluster runs up to {at_once} stages at once.")


def show_plan(sweep: Sweep, planner: Planner, planned: Plan, limit: int) -> None:
    """Print a plan and what is left of it. limit: how many cells to show; 0 is all."""
    from orchestrator.cli import plan_view
    from orchestrator.plan.planner import overlooked_triggers
    from orchestrator.plan.work import survey, timings_for
    from orchestrator.sweep.trust import output_refusal, tracking_refusal

    # Only btu launch asks the tracking server.
    if (why := tracking_refusal(sweep)) is not None:
        warn(f"btu launch will refuse this: {why}")
    if (why := output_refusal(sweep)) is not None:
        warn(f"What is computed already is not known, since the output was not asked: {why}")
    say_server(sweep)
    if sweep.sequential is not None:
        planned = _example(sweep, sweep.sequential, planner, ask=why is None)
    for warning in overlooked_triggers(planned):
        warn(warning)
    known = _known(sweep) if why is None else Known(set(), set(), {}, [])
    committed, dropped, failed, rows = known
    timings = timings_for(rows, sweep.resources)
    work = survey(planned, committed=committed, dropped=dropped, failed=failed, timings=timings)
    listed = plan_view.cell_rows(planned, work.failed, committed)
    console.print(plan_view.cell_table(listed[: limit or None]))
    if limit and len(listed) > limit:
        say(f"... and {cell_count(len(listed) - limit, 'more ')} (--cells 0 shows all)")
    print_data(planner)
    say(f"search: {sweep.describe()}")
    say(plan_view.counts_line(planned, work))
    if len(planned.cells) > work.done + len(work.failed):
        console.print(plan_view.stage_table(work))
        for line in (*plan_view.time_lines(sweep, work), plan_view.disk_line(sweep, work)):
            say(line)


class Known(NamedTuple):
    """What the store of a sweep has.

    committed: keys with a complete result.
    dropped: keys whose models were removed.
    failed: reasons by key.
    timings: those of all launches.
    """

    committed: Collection[str]
    dropped: Collection[str]
    failed: Mapping[str, str]
    timings: list[dict[str, Any]]


def _known(sweep: Sweep) -> Known:
    from orchestrator.store.store import Store

    store = Store(sweep.store_location, warn=warn)
    failed = {record["key"]: record["reason"] for record in store.failures()}
    return Known(store.committed(), store.dropped(), failed, store.timings())


def _example(sweep: Sweep, mode: SequentialMode, planner: Planner, *, ask: bool) -> Plan:
    """Return the plan of one suggestion of a sweep's sequential mode, and print a note.

    ask: whether to count the suggestions that the output has.
    """
    from orchestrator.plan.planner import example_plan
    from orchestrator.run.study import study_of

    planned = example_plan(sweep, planner)
    if ask:
        left = study_of(mode, sweep).open
        say(f"{mode.trials - left} of {mode.trials} suggestions are measured.")
    say("The cells are chosen while the sweep runs; one suggestion, as an example:")
    return planned
