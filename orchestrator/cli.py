"""The `btu` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from btu import __version__
from btu.errors import UserError

if TYPE_CHECKING:
    from orchestrator.plan import Plan

EXIT_INCOMPLETE, EXIT_USER_ERROR = 1, 2

app = typer.Typer(
    name="btu",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sweeps of textual-backdoor defenses: attack, defend, measure, compare.\n\n"
    "A sweep is one YAML file (see sweeps/). A first one, on an embedded corpus:\n\n"
    "    btu plan sweeps/quickstart.yaml      # what would run, and what cannot\n\n"
    "    btu launch sweeps/quickstart.yaml    # run it on local Ray; run it again to resume\n\n"
    "    btu report quickstart                # the table\n\n"
    "    btu ui                               # the runs, in MLflow\n\n"
    "Any key of the file can be overridden: `btu launch FILE train.epochs=1 'grid.seed=[0,1]'`.",
)
console = Console()
errors = Console(stderr=True)

SweepFile = Annotated[Path, typer.Argument(help="The sweep's YAML file.", metavar="SWEEP")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys to override, dotted: attack.poison_rate=0.05 'grid.seed=[0,1]' output=/scratch",
        metavar="KEY=VALUE",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder that holds the sweep (key `output`).")
]


class Kind(StrEnum):
    """What `btu list` can show."""

    attacks = "attacks"
    defenses = "defenses"
    victims = "victims"
    datasets = "datasets"
    metrics = "metrics"


class Format(StrEnum):
    """How `btu report` prints."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    latex = "latex"


def _version(show: bool) -> None:
    if show:
        console.print(f"btu {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Show the cells of a sweep: done, to run, refused and why. Trains nothing.

    Example: `btu plan sweeps/sst2_thresholds.yaml data.path=data/sst2 'grid.seed=[0,1,2]'`
    """
    from orchestrator.config import load_sweep
    from orchestrator.plan import plan_sweep
    from orchestrator.progress import label
    from orchestrator.store import ResultStore

    loaded = load_sweep(sweep, overrides or [])
    planned = plan_sweep(loaded)
    store = ResultStore(loaded.folder)
    table = Table("cell", "coordinates", "state", header_style="bold")
    done = 0
    for cell in planned.cells:
        finished = store.is_done(cell.key)
        done += finished
        state = (
            "done" if finished else "failed, runs again" if store.is_failed(cell.key) else "to run"
        )
        table.add_row(cell.key, escape(label(cell.varied)), state)
    for refused in planned.refused:
        reason = f"[red]refused[/red]: {escape(refused.reason)}"
        table.add_row("-", escape(label(refused.varied)), reason)
    console.print(table)
    _print_data(planned)
    console.print(
        f"{len(planned.cells)} cells: {done} done, {len(planned.cells) - done} to run; "
        f"{len(planned.refused)} refused; {planned.duplicates} duplicates folded.",
        highlight=False,
    )


def _print_data(planned: Plan) -> None:
    """Say what the data is and what loading it did: nothing is dropped silently."""
    for name, counts in planned.data:
        parts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items())
        console.print(f"data {name}: {parts}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def trial(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Run one cell in this process, without Ray or MLflow: what a debugger needs.

    The overrides must leave a single cell; a key that the grid varies is pinned by naming it.
    The result is printed and kept in memory only.

    Example: `btu trial sweeps/quickstart.yaml attack.name=badnets defense.alpha=0.0005 seed=0`
    """
    from orchestrator.config import load_sweep, pins
    from orchestrator.plan import plan_sweep
    from orchestrator.progress import StageProgress

    loaded = load_sweep(sweep, overrides or [])
    open_axes = {key: values for key, values in loaded.grid.items() if len(values) > 1}
    if open_axes:
        example = pins({key: values[0] for key, values in open_axes.items()})
        raise UserError(
            f"sweep '{loaded.name}' has several cells; pin its axes to run one, e.g. "
            f"btu trial {sweep} {example}"
        )
    cell = plan_sweep(loaded).cells[0]

    from btu.training import NonFiniteLossError
    from orchestrator.trial import run_trial

    try:
        result = run_trial(cell.spec, StageProgress(console))
    except NonFiniteLossError as error:
        raise UserError(str(error)) from error
    table = Table("metric", "value", header_style="bold")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.6g}")
    console.print(table)
    flagged = result.flagged_table()
    shown = " ".join(flagged.token.head(60))
    console.print(f"{len(flagged)} tokens flagged: {shown}", highlight=False, markup=False)


@app.command()
def launch(
    sweep: SweepFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, e.g. auto or ray-head:6379. Default: local Ray."),
    ] = None,
) -> None:
    """Run a sweep with Ray Tune and log it to MLflow.

    Cells with a result on disk are not run again: after an interruption, or with a longer grid,
    give the same command. Exit code 0 only if every cell that can run is done.

    Example: `btu launch sweeps/sst2_thresholds.yaml data.path=data/sst2 resources.gpu=0.25`
    """
    from orchestrator.config import load_sweep
    from orchestrator.plan import plan_sweep
    from orchestrator.progress import SweepProgress, duration, label
    from orchestrator.store import ResultStore

    loaded = load_sweep(sweep, overrides or [])
    ResultStore(loaded.folder).prepare()
    planned = plan_sweep(loaded)
    _print_data(planned)
    for refused in planned.refused:
        console.print(
            f"refused: {label(refused.varied)}: {refused.reason}", highlight=False, markup=False
        )

    from orchestrator.launch import launch as run
    from orchestrator.tracking import shown

    result = run(loaded, planned, address, SweepProgress(console))
    total = len(planned.cells)
    console.print(
        f"{result.done} of {total} cells done, {len(result.failed)} failed, {result.missing} not "
        f"run, in {duration(result.seconds)}. Results: {loaded.folder}",
        highlight=False,
        soft_wrap=True,
    )
    for key, reason in result.failed.items():
        console.print(
            f"failed: {key}: {reason.splitlines()[0]} ({loaded.folder}/failed/{key}.json)",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    output = shlex.quote(str(loaded.output))
    default = "" if loaded.output == Path("runs").resolve() else f" --output {output}"
    # A password is not printed: whoever gave it knows what to put back.
    uri = f" --uri {shlex.quote(shown(loaded.tracking.uri))}" if loaded.tracking.uri else default
    console.print(
        f"Table: btu report {loaded.name}{default}\nRuns:  btu ui{uri}",
        highlight=False,
        soft_wrap=True,
    )
    if not result.complete:
        console.print("Not every cell is done; the same command goes on where this one stopped.")
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    style: Annotated[
        Format, typer.Option("--format", "-f", help="csv and json hold fractions; others percent.")
    ] = Format.table,
    mean: Annotated[
        bool, typer.Option("--mean", help="Mean and 95 % t interval over seeds.")
    ] = False,
    output: Output = Path("runs"),
) -> None:
    """Print a sweep's results, a row per cell.

    Example: `btu report quickstart --mean --format markdown > table.md`
    """
    from orchestrator.report.table import mean_over_seeds, render, results_table
    from orchestrator.store import find_sweep

    store = find_sweep(output, name)
    table = results_table(store.records())
    if table.empty:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    text = render(mean_over_seeds(table) if mean else table, style.value)
    sys.stdout.write(text)
    failed = sum(1 for _ in store.failures())
    if failed:
        errors.print(f"{failed} failed cells are not in the table: {store.failed}", highlight=False)


@app.command(name="list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what is there, by the names that a sweep file uses.

    Example: `btu list attacks`
    """
    table = Table(header_style="bold")
    table.add_column(kind.value, no_wrap=True)
    if kind is Kind.metrics:
        from btu.metrics import METRICS

        table.add_column("better")
        table.add_column("meaning")
        arrows = {True: "higher", False: "lower", None: "-"}
        for name, entry in METRICS.items():
            table.add_row(name, arrows[entry.higher_is_better], entry.summary)
    else:
        registry = _registries()[kind]
        knobs = kind in (Kind.attacks, Kind.defenses)
        table.add_column("what it is")
        if knobs:
            table.add_column("its own keys (default)")
        for name, entry in registry.items():
            row = [name, entry.summary]
            table.add_row(*row, *([_knobs(registry.load(name))] if knobs else []))
    console.print(table)


def _registries() -> dict[Kind, Any]:
    from btu.data import DATASETS
    from btu.defense import DEFENSES
    from btu.poisoning import ATTACKS
    from btu.victims import VICTIMS

    return {
        Kind.attacks: ATTACKS,
        Kind.defenses: DEFENSES,
        Kind.victims: VICTIMS,
        Kind.datasets: DATASETS,
    }


def _knobs(part: type) -> str:
    import dataclasses

    made = part()
    knobs = [f"{f.name} ({getattr(made, f.name)})" for f in dataclasses.fields(part)]
    presets = getattr(part, "PRESETS", None)
    return ", ".join(([f"preset ({'|'.join(presets)})"] if presets else []) + knobs)


@app.command()
def ui(
    output: Output = Path("runs"),
    uri: Annotated[
        str | None, typer.Option(help="Another MLflow store. Default: the output folder's SQLite.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on the sweeps' runs, on this machine only.

    Example: `btu ui --port 5001`
    """
    if uri is None and not (output / "mlflow.db").is_file():
        raise UserError(
            f"{output / 'mlflow.db'} does not exist: no sweep has run with this output folder. "
            "Launch one, or name another folder with --output."
        )
    from orchestrator import tracking

    if uri is not None and uri.startswith(("http://", "https://")):
        console.print(f"{uri} is a running MLflow server; open it in a browser.", highlight=False)
        return
    # Without the parameter MLflow opens on its pages for language-model traces.
    page = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    console.print(f"MLflow UI: {page} (Ctrl-C stops it)", highlight=False, soft_wrap=True)
    raise typer.Exit(tracking.serve_ui(uri or tracking.default_uri(output), port))


def main() -> None:
    """Run the command line; a user's mistake ends in a message, not in a traceback."""
    try:
        app()
    except UserError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(EXIT_USER_ERROR) from None


if __name__ == "__main__":
    main()
