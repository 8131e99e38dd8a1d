"""`btu launch` and `btu trial`."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from btu.errors import UserError
from orchestrator.cli.plan import show_plan
from orchestrator.cli.shared import EXIT_INCOMPLETE, Overrides, SweepFile, console, print_data, say

REFINE_TRIALS = 24


class Curve(StrEnum):
    """What `btu launch --refine` can look at."""

    asr = "asr"
    cacc = "cacc"


def trial(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Run one cell in this process, without Ray or MLflow: what a debugger needs.

    The overrides must leave a single cell; a key that the sweep varies is pinned by naming it.
    Every stage is computed anew, in a temporary folder: nothing is read from or kept in a store.

    Example: `btu trial sweeps/quickstart.yaml attack.name=badnets defense.alpha=0.0005 seed=0`
    """
    import tempfile
    from dataclasses import replace

    from orchestrator.plan.planner import plan_sweep
    from orchestrator.run.progress import StageProgress
    from orchestrator.sweep.load import load_sweep
    from orchestrator.sweep.sections import pins

    # Controls would be further cells.
    loaded = replace(load_sweep(sweep, overrides or []), controls=())
    open_axes = loaded.open_axes()
    if open_axes:
        example = pins({key: values[0] for key, values in open_axes.items()})
        raise UserError(
            f"sweep '{loaded.name}' has several cells; pin its axes to run one, e.g. "
            f"btu trial {sweep} {example}"
        )
    (cell,) = plan_sweep(loaded).cells.values()

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


def launch(
    sweep: SweepFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, e.g. auto or ray-head:6379. Default: local Ray."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run again what failed in an earlier launch.")
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(min=1, help="Stop when so many stages have failed. Default: go on."),
    ] = None,
    refine: Annotated[
        list[Curve] | None,
        typer.Option(
            help="Place further detection thresholds where ASR falls, or CACC breaks; may be given "
            "twice."
        ),
    ] = None,
    refine_trials: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many cells --refine may add, all in all. Default: {REFINE_TRIALS}."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and stop, as btu plan does.")
    ] = False,
) -> None:
    """Run a sweep with Ray Tune and log it to MLflow.

    Whatever has a result in the store is not computed again: after an interruption, or with a
    longer grid, give the same command. Stages that cells share are computed once. What failed
    stays failed until `--retry-failed`. Exit code 0 only if every cell that can run is done.

    With `--refine` the sweep goes on after its grid: for every attack, rate, ... it bisects between
    the two neighbouring thresholds that differ most, until the change is located or
    `--refine-trials` cells were added. The same command resumes that too.

    Example: `btu launch sweeps/sst2_thresholds.yaml data.path=data/sst2 resources.gpu=0.25`

    Example: `btu launch sweeps/sst2_thresholds.yaml --refine asr --refine cacc --refine-trials 40`
    """
    from orchestrator.plan.planner import Planner, plan_sweep
    from orchestrator.run.progress import SweepProgress, duration, label
    from orchestrator.run.refine import RefineSpec, threshold_key
    from orchestrator.store.store import Store
    from orchestrator.sweep.load import load_sweep

    loaded = load_sweep(sweep, overrides or [])
    refined = None
    if refine:
        threshold_key(loaded)
        metrics = tuple(dict.fromkeys(curve.value for curve in refine))
        refined = RefineSpec(metrics, refine_trials or REFINE_TRIALS)
    elif refine_trials is not None:
        raise UserError(
            f"--refine-trials {refine_trials} needs --refine asr or --refine cacc; add one, or "
            "leave it out."
        )
    planner = Planner()
    if dry_run:
        show_plan(loaded, planner, plan_sweep(loaded, planner), 40)
        return
    # Before the data is read, which may take a while.
    Store(loaded.store_location).prepare()
    planned = plan_sweep(loaded, planner)
    say(f"Sweep {loaded.name}; results go to {loaded.folder}")
    print_data(planner)
    for refused in planned.refused:
        say(f"refused: {label(refused.varied)}: {refused.reason}")

    from orchestrator.run.on_ray import launch as run
    from orchestrator.tracking.server import shown

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
        say("Interrupted; the same command goes on where this one stopped.")
        raise typer.Exit(EXIT_INCOMPLETE) from None
    total = len(planned.cells)
    say(
        f"{result.done} of {total} cells done, {len(result.failed)} failed, {result.missing} not "
        f"run, in {duration(result.seconds)}. Results: {loaded.folder}"
    )
    for key, reason in list(result.failed.items())[:20]:
        say(f"failed: {label(planned.cells[key].varied)}: {reason.splitlines()[0]}")
    if len(result.failed) > 20:
        say(f"... and {len(result.failed) - 20} more; btu report {loaded.name} counts them all.")
    output = shlex.quote(loaded.output)
    default = "" if loaded.output == str(Path("runs").resolve()) else f" --output {output}"
    # A password is not printed: whoever gave it knows what to put back.
    uri = f" --uri {shlex.quote(shown(loaded.tracking.uri))}" if loaded.tracking.uri else default
    say(f"Table: btu report {loaded.name}{default}\nRuns:  btu ui{uri}")
    if not result.complete:
        why = f"Stopped: {result.stopped}. " if result.stopped else ""
        how = []
        if result.missing:
            how.append("the same command goes on where this one stopped")
        if result.failed:
            how.append("what failed stays failed until --retry-failed")
        say(f"{why}Not every cell is done; {'; '.join(how)}.")
        raise typer.Exit(EXIT_INCOMPLETE)
