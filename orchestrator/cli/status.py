"""`btu status`: how sweeps stand."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from btu.errors import UserError
from btu.redaction import shown
from orchestrator.cli.live_page import LivePage
from orchestrator.cli.shared import (
    EXIT_INCOMPLETE,
    MLFLOW_STORE,
    Output,
    byte_size,
    cell_count,
    console,
    first_names,
    say,
)
from orchestrator.sweep.output import DEFAULT_OUTPUT, output_location, output_option

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from orchestrator.run.status import Computation, Launch, StageCosts, Status

EXIT_RUNNING = 3
WATCH_SECONDS = 5.0
# Reasons of failed and refused cells that are shown.
SHOWN = 20


def status(
    name: Annotated[
        str | None, typer.Argument(help="The sweep's name. Default: a line for each sweep.")
    ] = None,
    output: Output = DEFAULT_OUTPUT,
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help=MLFLOW_STORE)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole status as JSON, with every cell by key.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh every 5 s until no launch runs.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write the page of `btu report --html`: FILE.html. With --watch it is "
            "written again as cells end, and a browser reloads it."
        ),
    ] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Also show what each kind of stage took.")
    ] = False,
) -> None:
    """Show how a sweep stands, running or dead: done, running, failed, orphaned, left, ETA.

    Reads what is on disk and compares it with MLflow; changes nothing, and may run while the sweep
    runs elsewhere. *Orphaned*: the process that computed the cell is gone; the next launch
    computes it.

    Exit code 0: every cell is done; 3: a launch runs; 1: no launch runs, and cells failed or are
    left, or all were refused; 2: an error. Without NAME: 0.

    Example: `btu status main-table --watch --html main-table.html`
    """
    from orchestrator.run.status import SweepState, sweep_status

    if name is None:
        given = {
            "--watch": watch,
            "--html": html,
            "--stages": stages,
            "--tracking-uri": tracking_uri,
        }
        if option := next((option for option, value in given.items() if value), None):
            raise UserError(
                f"{option} needs the name of a sweep; btu status without one lists the sweeps."
            )
        _print_all(output, as_json)
        return
    if watch and as_json:
        raise UserError("--watch and --json exclude each other; leave one out.")
    page = None if html is None else LivePage(html, name, output, watch=watch)
    stand = _with_runs(sweep_status(output, name), output, tracking_uri)
    if page is not None:
        page.update(stand)
    if as_json:
        sys.stdout.write(json.dumps(stand.facts(), indent=1) + "\n")
    elif watch:
        with Live(_page(stand, stages), console=console, auto_refresh=False) as live:
            while stand.state is SweepState.running:
                time.sleep(WATCH_SECONDS)
                stand = _with_runs(sweep_status(output, name), output, tracking_uri, stand)
                live.update(_page(stand, stages), refresh=True)
                if page is not None:
                    page.update(stand)
    else:
        for part in _page(stand, stages).renderables:
            console.print(part, soft_wrap=isinstance(part, Text))
    if page is not None and not as_json:
        say(f"Page: {html}" if page.written else f"No page yet: no cell of {name} has ended.")
    if stand.state is SweepState.running:
        raise typer.Exit(EXIT_RUNNING)
    if stand.state is not SweepState.done:
        raise typer.Exit(EXIT_INCOMPLETE)


def _print_all(output: str, as_json: bool) -> None:
    """Print a line for each sweep of an output."""
    from orchestrator.run.status import all_statuses

    found = all_statuses(output)
    if as_json:
        sys.stdout.write(json.dumps([_brief_facts(s) for s in found], indent=1) + "\n")
    elif found:
        console.print(_overview(found))
    else:
        raise UserError(f"no sweep was launched with output {output}; name one with --output.")


def _with_runs(stand: Status, output: str, uri: str | None, before: Status | None = None) -> Status:
    """Return the status with the runs in MLflow, or with the reason why there are none.

    before: the status of the last look, whose runs are kept while MLflow does not answer.
    """
    from dataclasses import replace

    from orchestrator.results.folder import find_sweep
    from orchestrator.run.status import tracked
    from orchestrator.tracking import reader, server

    try:
        where = (
            server.absolute(uri)
            if uri
            else server.launched_uri(find_sweep(output, stand.name), "--tracking-uri")
        )
        states = reader.MlflowSource(where, stand.name).states()
    except UserError as error:
        if before is not None and before.runs is not None:
            return replace(stand, runs=before.runs, untracked=shown(str(error)))
        if uri is not None:
            raise
        return replace(stand, untracked=f"{shown(str(error))} --tracking-uri names another store.")
    origin = find_sweep(output, stand.name).known_origin()
    sync = f"btu sync {stand.name}{output_option(output_location(output))}"
    sync += f" --uri {shlex.quote(server.shown(uri))}" if uri else ""
    return replace(stand, runs=tracked(stand, server.shown(where), states, origin, sync))


def _brief_facts(stand: Status) -> dict[str, object]:
    facts = stand.facts()
    return {key: facts[key] for key in ("sweep", "state", "counts", "stages", "eta")}


def _overview(found: list[Status]) -> Table:
    from orchestrator.run.progress import duration
    from orchestrator.run.status import CellState

    table = Table("sweep", "state", header_style="bold")
    for column in ("cells", "refused", "ETA"):
        table.add_column(column, justify="left" if column == "cells" else "right")
    for stand in found:
        counts = [f"{n} {state}" for state, n in stand.counts.items() if n or state == "done"]
        going = stand.counts[CellState.done] < len(stand.cells) and stand.eta is not None
        table.add_row(
            escape(stand.name),
            stand.state.value,
            ", ".join(counts),
            str(len(stand.refused)),
            duration(stand.eta or 0.0) if going else "-",
        )
    return table


def _page(stand: Status, stages: bool = False) -> Group:
    from orchestrator.run.progress import label
    from orchestrator.run.status import CellState, SweepState

    counts = ", ".join(f"{count} {state}" for state, count in stand.counts.items())
    done, all_ = stand.stages
    suggested = " suggested by Optuna so far" if stand.optuna else ""
    lines = [
        f"{stand.name}: {stand.state}",
        # Killed launches matter only while cells are left.
        *(_launch_line(launch) for launch in stand.launches if stand.state is not SweepState.done),
        f"{cell_count(len(stand.cells))}{suggested}: {counts}; {len(stand.refused)} refused. "
        f"Stages: {done} of {all_} done.",
    ]
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if stand.work:
        parts.append(_work_table(stand.work))
    if stages and stand.costs:
        parts.append(_costs_table(stand.costs))
    failed = Counter(cell.reason.splitlines()[0] for cell in stand.cells if cell.reason)
    examples = {c.reason.splitlines()[0]: c.label for c in reversed(stand.cells) if c.reason}
    reasons = [
        f"failed: {examples[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
        for reason, count in failed.items()
    ]
    reasons += [f"refused: {label(cell.varied)}: {cell.reason}" for cell in stand.refused]
    more = len(reasons) - SHOWN
    lines = [
        *reasons[:SHOWN],
        *([f"... and {more} more; --json has them all."] if more > 0 else []),
    ]
    if stand.counts[CellState.done] + stand.counts[CellState.failed] < len(stand.cells):
        lines.append(_time_left(stand))
    lines.append(_mlflow_line(stand))
    parts.append(Text("\n".join(lines)))
    return Group(*parts)


def _launch_line(launch: Launch) -> str:
    from orchestrator.run.progress import duration

    where = f"launch {launch.id} on {launch.host} (pid {launch.pid})"
    silent = "" if launch.silent is None else f", last heartbeat {duration(launch.silent)} ago"
    return f"{where} {'is gone' if launch.lost else 'runs'}{silent}."


def _work_table(work: list[Computation]) -> Table:
    from orchestrator.run.progress import duration

    now = time.time()
    table = Table("stage", header_style="bold")
    for column in ("for cells", "node", "pid", "since", "state"):
        table.add_column(column, justify="right" if column in ("for cells", "pid") else "left")
    for item in work:
        since = "-" if item.since is None else duration(now - item.since)
        silent = "" if item.silent is None else f", silent for {duration(item.silent)}"
        state = f"[red]orphaned[/red]{silent}" if item.lost else "running"
        table.add_row(
            escape(item.stage), str(item.cells), escape(item.host), str(item.pid), since, state
        )
    return table


def _costs_table(costs: Iterable[StageCosts]) -> Table:
    from orchestrator.run.progress import duration

    table = Table("stage", header_style="bold")
    for column in ("computed", "mean time", "peak memory", "on the GPU"):
        table.add_column(column, justify="right")
    table.add_column("device")
    for of in costs:
        time_ = duration(of.seconds) if of.seconds >= 1 else f"{of.seconds:.2f} s"
        sizes = [byte_size(int(size)) if size else "-" for size in (of.memory, of.gpu_memory)]
        table.add_row(
            escape(of.stage), str(of.computed), time_, *sizes, escape(", ".join(of.devices))
        )
    return table


def _time_left(stand: Status) -> str:
    from orchestrator.run.progress import duration
    from orchestrator.run.status import SweepState

    if stand.unlisted:
        return (
            "Time left: unknown, since the plan is of an earlier version; the next launch of the "
            "sweep writes it again."
        )
    if stand.eta is None or stand.seconds_left is None:
        some = first_names(stand.untimed)
        return f"Time left: unknown until each kind of stage has run once ({some})."
    how = f"{duration(stand.seconds_left)} of computing"
    if stand.state is SweepState.running:
        return f"ETA: {duration(stand.eta)} ({how}, {stand.at_once} at once)."
    return f"Left: {how}; the command that launched the sweep continues it."


def _mlflow_line(stand: Status) -> str:
    runs = stand.runs
    if runs is None:
        return f"MLflow: {stand.untracked}"
    line = f"MLflow {runs.uri}: {runs.finished} finished, {runs.failed} failed"
    line += f", {runs.running} running" if runs.running else ""
    if runs.orphaned:
        line += f" ({len(runs.orphaned)} of them orphaned: {', '.join(runs.orphaned[:3])})"
    if runs.missing or runs.orphaned:
        gone = f" ({runs.deleted} of them deleted in MLflow)" if runs.deleted else ""
        line += f"; {runs.missing} missing{gone}. {runs.sync} writes and closes them"
        line += "; --respect-deleted leaves out the deleted ones" if runs.deleted else ""
    return f"{line}." + (f" As of an earlier look: {stand.untracked}" if stand.untracked else "")
