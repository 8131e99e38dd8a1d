"""`btu launch` and `btu trial`."""

from __future__ import annotations

import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table

from btu.errors import UserError
from orchestrator.cli.plan import SHOWN, show_plan
from orchestrator.cli.shared import (
    EXIT_INCOMPLETE,
    LargeGrid,
    Overrides,
    SweepFile,
    console,
    print_data,
    say,
    say_server,
    warn,
)
from orchestrator.sweep.output import output_option

if TYPE_CHECKING:
    from orchestrator.plan.planner import Plan
    from orchestrator.run.driver import LaunchResult
    from orchestrator.run.refine import RefineSpec
    from orchestrator.sweep.sweep import Sweep

REFINE_TRIALS = 24
# Failed cells whose reasons are printed.
FAILURES = 20


class Curve(StrEnum):
    """What `btu launch --refine` can refine."""

    asr = "asr"
    cacc = "cacc"


def trial(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Run one cell in this process, without Ray or MLflow, for a debugger.

    The overrides must leave a single cell; to pin a key that the sweep varies, name it. Every
    stage is computed again, in a temporary folder: no store is read or written.

    Example: `btu trial sweeps/quickstart.yaml attack.name=badnets defense.alpha=0.0005 seed=0`
    """
    import tempfile
    from dataclasses import replace

    from orchestrator.plan.planner import Planner, overlooked_triggers, plan_sweep
    from orchestrator.run.progress import StageProgress
    from orchestrator.sweep.load import load_sweep
    from orchestrator.sweep.sections import pins

    # Without controls, which are cells of their own.
    loaded = replace(load_sweep(sweep, overrides or [], large=True), controls=())
    open_axes = loaded.open_axes()
    if open_axes:
        example = pins({key: values[0] for key, values in open_axes.items()})
        raise UserError(
            f"sweep '{loaded.name}' has several cells; pin its axes to run one, e.g. "
            f"btu trial {shlex.quote(str(sweep))} {example}"
        )
    planner = Planner()
    planned = plan_sweep(loaded, planner)
    (cell,) = planned.cells.values()
    for warning in (*planner.warnings(), *overlooked_triggers(planned)):
        warn(warning)

    from btu.stages import compute
    from btu.training import NonFiniteLossError
    from orchestrator.results.folder import read_result

    cpus, gpus = loaded.resources.of("stage")
    with tempfile.TemporaryDirectory(prefix="btu-trial-") as folder:
        try:
            done = compute(
                cell.stage, Path(folder), cpus=cpus, gpus=gpus, progress=StageProgress(console)
            )
        except NonFiniteLossError as error:
            raise UserError(str(error)) from error
        result, flagged = read_result(done)
    table = Table("metric", "value", header_style="bold")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.6g}")
    console.print(table)
    shown = " ".join(str(token["token"]) for token in flagged[:60])
    say(f"{len(flagged)} tokens flagged: {shown}")
    vetoed = [token for token in flagged if token.get("vetoed")]
    if vetoed:
        costs = ", ".join(f"{token['token']} {token['cost_tuned']:.3g}" for token in vetoed[:60])
        bar = result["config"]["defense"]["max_cut_cost"]
        say(
            f"{len(vetoed)} of them not cut, since the cut costs more than defense.max_cut_cost "
            f"{bar:g} of the clean rows after clean tuning: {costs}"
        )


def launch(
    sweep: SweepFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, e.g. auto or ray-head:6379. Default: a local one."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the cells again that failed earlier.")
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many failed stages. Default: never."),
    ] = None,
    refine: Annotated[
        list[Curve] | None,
        typer.Option(
            help="Add detection thresholds where ASR falls, or CACC breaks; may be given twice."
        ),
    ] = None,
    refine_trials: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many cells --refine may add in total. Default: {REFINE_TRIALS}."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and stop, as btu plan does.")
    ] = False,
    yes: LargeGrid = False,
) -> None:
    """Run a sweep with Ray Tune and log it to MLflow.

    A stage that has a result in the store is not computed again: after an interruption, or with a
    longer grid, give the same command. Stages that cells share are computed once. A failed cell
    stays failed until `--retry-failed`. Exit code 0 only if every cell that can run is done.

    With `--refine` the sweep continues after its grid: for every attack, rate, ... it bisects
    between the two neighbouring thresholds that differ most, until the change is located or
    `--refine-trials` cells were added. The same command resumes that too.

    Example: `btu launch sweeps/sst2_thresholds.yaml data.path=data/sst2 resources.gpu=0.25`

    Example: `btu launch sweeps/sst2_thresholds.yaml --refine asr --refine cacc --refine-trials 40`
    """
    from orchestrator.plan.planner import Planner, overlooked_triggers, plan_sweep
    from orchestrator.run.progress import SweepProgress, label
    from orchestrator.store.store import Store
    from orchestrator.sweep.load import load_sweep
    from orchestrator.sweep.trust import check_hosts

    loaded = load_sweep(sweep, overrides or [], large=yes)
    refined = _refinement(loaded, refine or [], refine_trials)
    planner = Planner(offline=dry_run)
    if dry_run:
        show_plan(loaded, planner, plan_sweep(loaded, planner), SHOWN)
        return
    check_hosts(loaded)
    say_server(loaded)
    # Before the data is read, which may take a while.
    Store(loaded.store_location).prepare()
    planned = plan_sweep(loaded, planner)
    say(f"Sweep {loaded.name}; results go to {loaded.shown_folder}")
    print_data(planner)
    for warning in overlooked_triggers(planned):
        warn(warning)
    for refused in planned.refused:
        say(f"refused: {label(refused.varied)}: {refused.reason}")

    from orchestrator.run.on_ray import launch as run

    try:
        result = run(
            loaded,
            planned,
            planner,
            SweepProgress(console),
            address=address,
            retry_failed=retry_failed,
            max_failures=max_failures,
            refine=refined,
        )
    except KeyboardInterrupt:  # before the first stage, or after the last
        say("Interrupted; to continue, give the same command.")
        raise typer.Exit(EXIT_INCOMPLETE) from None
    _print_result(loaded, planned, result)
    if not result.complete:
        _print_incomplete(result)
    if result.ray_gone:
        _end(0 if result.complete else EXIT_INCOMPLETE)
    if not result.complete:
        raise typer.Exit(EXIT_INCOMPLETE)


def _end(code: int) -> NoReturn:
    """End this process without its exit handlers: Ray's wait for a Ray that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refinement(sweep: Sweep, curves: list[Curve], trials: int | None) -> RefineSpec | None:
    """Return what the options --refine and --refine-trials ask for.

    Raises:
        UserError: the sweep has no threshold to refine, or --refine-trials is given alone.
    """
    from orchestrator.run.refine import RefineSpec, threshold_key

    if curves:
        threshold_key(sweep)
        metrics = tuple(dict.fromkeys(curve.value for curve in curves))
        return RefineSpec(metrics, trials or REFINE_TRIALS)
    if trials is not None:
        raise UserError(
            f"--refine-trials {trials} needs --refine asr or --refine cacc; add one, or leave it "
            "out."
        )
    return None


def _print_result(sweep: Sweep, planned: Plan, result: LaunchResult) -> None:
    """Print how many cells ended how, the first failures, and the commands for the results."""
    from orchestrator.run.progress import duration, label
    from orchestrator.tracking.server import shown

    say(
        f"{result.done} of {len(planned.cells)} cells done, {len(result.failed)} failed, "
        f"{result.missing} not run, in {duration(result.seconds)}. Results: {sweep.shown_folder}"
    )
    for key, reason in list(result.failed.items())[:FAILURES]:
        say(f"failed: {label(planned.cells[key].varied)}: {reason.splitlines()[0]}")
    more = len(result.failed) - FAILURES
    if more > 0:
        say(f"... and {more} more; btu report {sweep.name} counts them all.")
    output = output_option(sweep.output)
    # Without the password: the user who gave the URI has it.
    uri = f" --uri {shlex.quote(shown(sweep.tracking.uri))}" if sweep.tracking.uri else output
    say(f"Table: btu report {sweep.name}{output}")
    if (sweep.tracking.uri or "sqlite:").startswith(("sqlite", "file:", "http:", "https:")):
        say(f"Runs:  btu ui{uri}")  # which serves no other databases


def _print_incomplete(result: LaunchResult) -> None:
    """Print why cells are left, and how to continue."""
    why = f"Stopped: {result.stopped}. " if result.stopped else ""
    how = []
    if result.missing:
        how.append("the same command continues where this one stopped")
    if result.failed:
        how.append("what failed stays failed until --retry-failed")
    say(f"{why}Not every cell is done; {'; '.join(how)}.")
