"""The `btu` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from btu import __version__
from btu.errors import UserError
from orchestrator import pages_cli, scan_cli, store_cli
from orchestrator.pages_cli import Format

if TYPE_CHECKING:
    from orchestrator.config import Sweep
    from orchestrator.plan import Plan, Planner, Work

EXIT_INCOMPLETE, EXIT_USER_ERROR = 1, 2
REFINE_TRIALS = 24
# Sweeps whose runs `btu ui` gives an address of.
MOST_VIEWS = 10

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
    "    btu status quickstart                # how it stands, while it runs or after\n\n"
    "    btu report quickstart                # the table\n\n"
    "    btu curves quickstart                # detection at every threshold\n\n"
    "    btu scan DATA                        # a data set of your own, for triggers\n\n"
    "    btu ui                               # the runs, in MLflow\n\n"
    "Any key of the file can be overridden: `btu launch FILE train.epochs=1 'grid.seed=[0,1]'`.",
)
app.add_typer(store_cli.app, name="store")
app.command()(scan_cli.scan)
app.command()(pages_cli.status)
app.command()(pages_cli.compare)
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
    str, typer.Option("--output", "-o", help="Output folder that holds the sweep (key `output`).")
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="Read an MLflow store instead of the output folder, and it alone."
    ),
]


class Kind(StrEnum):
    """What `btu list` can show."""

    attacks = "attacks"
    defenses = "defenses"
    victims = "victims"
    datasets = "datasets"
    metrics = "metrics"
    rules = "rules"


class Curve(StrEnum):
    """What `btu launch --refine` can look at."""

    asr = "asr"
    cacc = "cacc"


StyleOption = Annotated[
    Format, typer.Option("--format", "-f", help="csv and json hold fractions; others percent.")
]


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
    from orchestrator.config import load_sweep
    from orchestrator.plan import Planner, plan_sweep

    loaded = load_sweep(sweep, overrides or [])
    planner = Planner()
    _show_plan(loaded, planner, plan_sweep(loaded, planner), cells)


def _show_plan(sweep: Sweep, planner: Planner, planned: Plan, limit: int) -> None:
    from orchestrator.plan import survey, timings_for
    from orchestrator.progress import duration, label
    from orchestrator.store import Store

    if sweep.optuna is not None:
        from orchestrator.plan import example_plan

        planned = example_plan(sweep, planner)
        from orchestrator.search import StudySearch

        left, trials = StudySearch(sweep, sweep.folder).open, sweep.optuna.trials
        _say(f"{trials - left} of {trials} suggestions are measured.")
        _say("The cells are chosen as the sweep goes; one suggestion, as an example:")
    store = Store(sweep.store_location, warn=_warn)
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
        _say(f"... and {_cells(len(rows) - limit, 'more ')} (--cells 0 shows all)")
    _print_data(planner)
    total = len(planned.cells)
    to_run = total - work.done - len(work.failed)
    _say(f"search: {sweep.describe()}")
    controls = f", {planned.controls} of them controls" if planned.controls else ""
    _say(
        f"{_cells(total)}{controls}: {work.done} done, {to_run} to run, "
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
        _say(f"Sharing: {saving}. Time: unknown until each kind of stage has run once ({some}).")
    else:
        at_once = _at_once(sweep)
        expected = max(work.seconds / at_once, work.longest)
        less = 1 - work.seconds / work.naive_seconds if work.naive_seconds else 0.0
        _say(
            f"Sharing: {saving}; {duration(work.seconds)} of computing instead of "
            f"{duration(work.naive_seconds)}, {less:.0%} less."
        )
        _say(
            f"Time: about {duration(expected)} with {at_once} at once, as on this machine; not "
            f"under {duration(work.longest)}, the longest chain, on any cluster."
        )
    kept = sweep.store.keep == "models"
    at_most = work.models if kept else min(work.models, _model_peak(work, _at_once(sweep)))
    _say(
        f"Disk: about {_bytes(at_most + work.small)}"
        + (
            " with every model kept (store.keep=models)."
            if kept
            else f" at most at once; {_bytes(work.models + work.small)} with store.keep=models."
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
    from orchestrator.schedule import most_models

    return work.model_bytes * (most_models(at_once) + at_once)


def _cells(count: int, which: str = "") -> str:
    return f"{count} {which}cell{'' if count == 1 else 's'}"


def _bytes(count: float) -> str:
    from rich.filesize import decimal

    return decimal(int(count))


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _warn(text: str) -> None:
    errors.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _print_data(planner: Planner) -> None:
    """Say what the data is and what loading it did: nothing is dropped silently."""
    for name, counts in planner.counts():
        parts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items())
        _say(f"data {name}: {parts}")


@app.command()
def trial(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Run one cell in this process, without Ray or MLflow: what a debugger needs.

    The overrides must leave a single cell; a key that the sweep varies is pinned by naming it.
    Every stage is computed anew, in a temporary folder: nothing is read from or kept in a store.

    Example: `btu trial sweeps/quickstart.yaml attack.name=badnets defense.alpha=0.0005 seed=0`
    """
    import tempfile
    from dataclasses import replace

    from orchestrator.config import load_sweep, pins
    from orchestrator.plan import plan_sweep
    from orchestrator.progress import StageProgress

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

    from btu.training import NonFiniteLossError
    from orchestrator.results import read_result
    from orchestrator.trial import run_trial

    cpus, gpus = loaded.resources.of("stage")
    with tempfile.TemporaryDirectory(prefix="btu-trial-") as folder:
        try:
            done = run_trial(
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
    _say(f"{len(flagged)} tokens flagged: {shown}")


@app.command()
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
    from orchestrator.config import load_sweep
    from orchestrator.plan import Planner, plan_sweep
    from orchestrator.progress import SweepProgress, duration, label
    from orchestrator.refine import RefineSpec, threshold_key
    from orchestrator.store import Store

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
        _show_plan(loaded, planner, plan_sweep(loaded, planner), 40)
        return
    # Before the data is read, which may take a while.
    Store(loaded.store_location).prepare()
    planned = plan_sweep(loaded, planner)
    _say(f"Sweep {loaded.name}; results go to {loaded.folder}")
    _print_data(planner)
    for refused in planned.refused:
        _say(f"refused: {label(refused.varied)}: {refused.reason}")

    from orchestrator.launch import launch as run
    from orchestrator.tracking import shown

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
        _say("Interrupted; the same command goes on where this one stopped.")
        raise typer.Exit(EXIT_INCOMPLETE) from None
    total = len(planned.cells)
    _say(
        f"{result.done} of {total} cells done, {len(result.failed)} failed, {result.missing} not "
        f"run, in {duration(result.seconds)}. Results: {loaded.folder}"
    )
    for key, reason in list(result.failed.items())[:20]:
        _say(f"failed: {label(planned.cells[key].varied)}: {reason.splitlines()[0]}")
    if len(result.failed) > 20:
        _say(f"... and {len(result.failed) - 20} more; btu report {loaded.name} counts them all.")
    output = shlex.quote(loaded.output)
    default = "" if loaded.output == str(Path("runs").resolve()) else f" --output {output}"
    # A password is not printed: whoever gave it knows what to put back.
    uri = f" --uri {shlex.quote(shown(loaded.tracking.uri))}" if loaded.tracking.uri else default
    _say(f"Table: btu report {loaded.name}{default}\nRuns:  btu ui{uri}")
    if not result.complete:
        why = f"Stopped: {result.stopped}. " if result.stopped else ""
        how = []
        if result.missing:
            how.append("the same command goes on where this one stopped")
        if result.failed:
            how.append("what failed stays failed until --retry-failed")
        _say(f"{why}Not every cell is done; {'; '.join(how)}.")
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def sync(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    output: Output = "runs",
    uri: Annotated[
        str | None, typer.Option(help="MLflow store. Default: the output folder's SQLite.")
    ] = None,
) -> None:
    """Write the runs that MLflow misses, from the results on disk; nothing is written twice.

    After a tracking server was away, or to tell another one: `--uri` names it.

    Example: `btu sync main-table --uri http://mlflow:5000`
    """
    from orchestrator.results import find_sweep

    results = find_sweep(output, name)
    from orchestrator import tracking

    where = tracking.absolute(uri) if uri else tracking.default_uri(results.output)

    def live(key: str) -> bool:
        return results.store.held_by_other(key, "btu sync")

    experiment = tracking.experiment(where, name)
    synced = tracking.sync(where, experiment, results, live)
    _say(
        f"{synced.written} runs written, {synced.closed} unfinished ones closed, "
        f"{synced.missing} still missing in {tracking.shown(where)}."
    )
    if synced.missing:
        raise UserError(f"MLflow does not have all runs: {synced.reason}")
    try:
        summarized = tracking.summarize(where, experiment, results)
    except Exception as error:  # of a server, of a disk or of a plot
        raise UserError(f"the summary run was not written: {tracking.brief(error)}") from error
    if summarized:
        _say("The summary run was brought up to date.")


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    style: StyleOption = Format.table,
    mean: Annotated[
        bool, typer.Option("--mean", help="Mean and 95 % t interval over seeds.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page too: charts, marks and table in one file."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page's charts too, as PNG, SVG and PDF."),
    ] = None,
    paper: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write LaTeX tables, figures, CSV and a methods paragraph too."
        ),
    ] = None,
    output: Output = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Print a sweep's results, a row per cell, and what speaks against reading some of them.

    The page opens from disk, in any browser, and needs no network.

    Example: `btu report quickstart --mean --format markdown > table.md`

    Example: `btu report quickstart --html quickstart.html --figures figures`

    Example: `btu report main-table --paper paper/results > table.txt`
    """
    from orchestrator.guards import summary
    from orchestrator.report.html import check_page, write_page
    from orchestrator.report.table import mean_over_seeds, render, results_table
    from orchestrator.source import Snapshot, open_source

    if html is not None:
        check_page(html)
    for option, folder in (("--figures", figures), ("--paper", paper)):
        if folder is not None:
            from orchestrator.report.figures import check_folder

            check_folder(option, folder)
    source = Snapshot(open_source(name, output, tracking_uri, _warn))
    records = source.records()
    table = results_table(records)
    if table.empty:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    text = render(mean_over_seeds(table) if mean else table, style.value)
    sys.stdout.write(text)
    if html is not None:
        write_page(source, html)
        _note([f"Page: {html}"])
    if figures is not None:
        from orchestrator.report.figures import FORMATS, write_figures

        written = write_figures(source, figures, FORMATS)
        _note([f"Figures: {len(written)} files in {figures}"])
    if paper is not None:
        from orchestrator.report.paper import write_pack

        packed = write_pack(source, paper)
        _note([f"Paper: {len(packed)} files in {paper}; its README.txt says what they are."])
    reasons = Counter(record["reason"].splitlines()[0] for record in source.failures())
    for reason, count in reasons.items():
        _warn(f"{count} failed cells are not in the table: {reason}")
    for line in summary(records):
        _warn(line)


@app.command()
def curves(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    thresholds: Annotated[
        int, typer.Option(min=2, help="How many thresholds, beside those that were trained.")
    ] = 50,
    style: StyleOption = Format.table,
    mean: Annotated[
        bool, typer.Option("--mean", help="Mean and 95 % t interval over seeds.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a figure too: FILE.png, .svg or .pdf.")
    ] = None,
    output: Output = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Print detection at every threshold, from the scores that a sweep has saved.

    Nothing is trained. A row per curve and threshold: precision, recall and F1 of the flagged
    tokens and of their training rows; ASR and CACC only where the threshold was trained.

    Example: `btu curves sst2-thresholds --mean --plot curves.png --format csv > curves.csv`
    """
    from orchestrator.report.cells import threshold_cells
    from orchestrator.report.curve_plot import check_path, curve_plot
    from orchestrator.report.curves import MEASURES, curve_means, read_saved, sweep_curves
    from orchestrator.report.table import render
    from orchestrator.source import open_source

    if plot is not None:
        check_path(plot)
    source = open_source(name, output, tracking_uri, _warn)
    records = source.records()
    if not records:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    table, notes = sweep_curves(threshold_cells(records), read_saved(source), thresholds)
    if plot is not None:
        curve_plot(table, plot)
        notes.append(f"Plot: {plot}")
    sys.stdout.write(render(curve_means(table) if mean else table, style.value, MEASURES))
    _note(notes)


@app.command()
def choose(
    name: Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")],
    cacc_loss: Annotated[
        float, typer.Option("--cacc-loss", help="Accuracy that a defense may cost, a fraction.")
    ] = 0.01,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="One threshold per rule, over the whole sweep.")
    ] = False,
    style: StyleOption = Format.table,
    output: Output = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Print which trained threshold one would choose, for cells that are equal but for it.

    `deployable` is chosen as a defender can, on clean rows and training data alone: the threshold
    that flags most while its cut costs no more than `--cacc-loss`. `oracle` is the best in
    hindsight, the lowest ASR within the same loss of CACC; `gap` is the ASR between the two.
    With `--recommend`: the median of the deployable ones over the sweep, with its 95 % interval.

    Example: `btu choose sst2-thresholds --cacc-loss 0.02 --recommend`
    """
    from btu.errors import check_fraction
    from orchestrator.report.cells import threshold_cells
    from orchestrator.report.choice import FRACTIONS, choices, recommended
    from orchestrator.report.table import render
    from orchestrator.source import open_source

    check_fraction("--cacc-loss", cacc_loss)
    source = open_source(name, output, tracking_uri, _warn)
    records = source.records()
    if not records:
        raise UserError(f"sweep '{name}' has no finished cell yet; launch it first.")
    cells = threshold_cells(records, acting=True)
    table, notes = choices(cells, cacc_loss)
    if recommend:
        table, further = recommended(cells, table)
        notes += further
        if table.empty:
            raise UserError(
                f"sweep '{name}' has nothing to recommend a threshold from: {' '.join(further)} "
                "Attack at a higher rate, or train longer."
            )
    sys.stdout.write(render(table, style.value, (*FRACTIONS, "flagged")))
    _note(notes)


def _note(notes: list[str]) -> None:
    """Tell what is not in a table beside it, so that a pipe gets the table alone."""
    for text in notes:
        errors.print(text, highlight=False, markup=False, soft_wrap=True)


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
    elif kind is Kind.rules:
        from btu.detection import RULES

        for column in ("what it is", "threshold", "unit of the threshold", "rounds"):
            table.add_column(column)
        for name in RULES:
            rule = RULES.load(name)
            rounds = ", ".join(map(str, rule.rounds))
            table.add_row(name, RULES[name].summary, f"{rule.threshold:g}", rule.unit, rounds)
    elif kind is Kind.defenses:
        _list_defenses(table)
        return
    else:
        registry = _registries()[kind]
        table.add_column("what it is")
        if kind is Kind.attacks:
            table.add_column("its own keys (default)")
        for name, entry in registry.items():
            keys = [_knobs(registry.load(name))] if kind is Kind.attacks else []
            table.add_row(name, entry.summary, *keys)
    console.print(table)


def _list_defenses(table: Table) -> None:
    """Print two tables: the keys of some defenses would leave no room for the rest."""
    from btu.defense import DEFENSES, KINDS

    for column in ("when", "needs", "what it is"):
        table.add_column(column)
    keys = Table(header_style="bold")
    keys.add_column(Kind.defenses.value, no_wrap=True)
    keys.add_column("its own keys (default)")
    loaded = {name: DEFENSES.load(name) for name in DEFENSES}
    # In the order of when they act; within that, as registered.
    for name in sorted(loaded, key=lambda name: list(KINDS).index(loaded[name].KIND)):
        defense = loaded[name]
        table.add_row(name, defense.KIND, ", ".join(defense.NEEDS), DEFENSES[name].summary)
        keys.add_row(name, _knobs(defense) or "-")
    console.print(table)
    console.print(keys)


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
    output: Output = "runs",
    uri: Annotated[
        str | None, typer.Option(help="Another MLflow store. Default: the output folder's SQLite.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on the sweeps' runs, on this machine only.

    Gives the address of each sweep's runs table with asr, cacc and detection_precision in it, which
    MLflow's own link leaves out. For a server that runs already, --uri gives the addresses alone.

    Example: `btu ui --port 5001`
    """
    database = Path(output) / "mlflow.db"
    if uri is None and "://" not in output and not database.is_file():
        raise UserError(
            f"{database} does not exist: no sweep has run with this output folder. "
            "Launch one, or name another folder with --output."
        )
    from orchestrator import tracking

    running = uri is not None and uri.startswith(("http://", "https://"))
    uri = uri or tracking.default_uri(output)
    server = tracking.shown(uri).rstrip("/") if running else f"http://127.0.0.1:{port}"
    views = tracking.views(uri)
    # Without the parameter MLflow opens on its pages for language-model traces.
    page = f"{server}/#/experiments?workflowType=machine_learning"
    told = "a running MLflow server; open it in a browser" if running else "Ctrl-C stops it"
    lines = [f"MLflow UI: {page} ({told})"]
    lines += [f"{name}: {server}{path}" for name, path in list(views.items())[:MOST_VIEWS]]
    if len(views) > MOST_VIEWS:
        lines.append(f"and {len(views) - MOST_VIEWS} older sweeps, in the UI's list")
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    if not running:
        raise typer.Exit(tracking.serve_ui(uri, port))


def main() -> None:
    """Run the command line; a user's mistake ends in a message, not in a traceback."""
    try:
        app()
    except UserError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(EXIT_USER_ERROR) from None


if __name__ == "__main__":
    main()
