"""`btu sync` and `btu ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btu.errors import UserError
from orchestrator.cli.shared import MLFLOW_STORE, Output, SweepName, console, say, warn
from orchestrator.sweep.output import DEFAULT_OUTPUT

# Sweeps whose addresses `btu ui` prints.
MOST_VIEWS = 10

Uri = Annotated[str | None, typer.Option("--uri", help=MLFLOW_STORE)]


def sync(
    name: SweepName,
    output: Output = DEFAULT_OUTPUT,
    uri: Uri = None,
    respect_deleted: Annotated[
        bool,
        typer.Option("--respect-deleted", help="Leave out runs that were deleted in MLflow."),
    ] = False,
) -> None:
    """Write the runs that MLflow lacks, from the results on disk; nothing is written twice.

    Use it after a tracking server was away, or to fill another one, which `--uri` names. Runs that
    were deleted in MLflow are written again, unless `--respect-deleted` leaves them out.

    Example: `btu sync main-table --uri http://mlflow:5000`
    """
    from orchestrator.results.folder import find_sweep

    results = find_sweep(output, name)
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server as server_module
    from orchestrator.tracking import sync as sync_module

    where = server_module.absolute(uri) if uri else server_module.launched_uri(results, "--uri")

    def live(key: str) -> bool:
        return results.store.leases.held_by_other(key, "btu sync")

    experiment = experiment_module.experiment(where, name, say)
    synced = sync_module.sync(where, experiment, results, live, respect_deleted=respect_deleted)
    say(
        f"{synced.written} runs written, {synced.closed} unfinished ones closed, "
        f"{synced.missing} still missing in {server_module.shown(where)}."
    )
    if synced.deleted:
        how = "left out" if respect_deleted else "written again; --respect-deleted leaves them out"
        say(f"Runs that had been deleted in MLflow: {synced.deleted}, {how}.")
    if synced.missing:
        raise UserError(f"MLflow does not have all runs: {synced.reason}")
    if synced.reason:
        raise UserError(
            f"Unfinished runs in MLflow were not looked for ({synced.reason}); give the same "
            "command again once it answers."
        )
    try:
        summarized = sync_module.summarize(
            where, experiment, results, respect_deleted=respect_deleted
        )
    except Exception as error:  # a server, disk or plotting error
        raise UserError(f"the summary run was not written: {server_module.brief(error)}") from error
    if summarized:
        say("The summary run was brought up to date.")


def ui(
    output: Output = DEFAULT_OUTPUT,
    uri: Uri = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Without a password: every user of this machine is let in."),
    ] = False,
) -> None:
    """Open the MLflow UI on the sweeps' runs, on this machine only.

    Prints the address of each sweep's runs table with the columns asr, cacc and
    detection_precision, which MLflow's own link leaves out, and a password that holds until the UI
    stops. If --uri names a running server, prints the addresses alone.

    Example: `btu ui --port 5001`
    """
    database = Path(output) / "mlflow.db"
    if uri is None and "://" not in output and not database.is_file():
        raise UserError(
            f"{database} does not exist: no sweep has run with this output folder. "
            "Launch one, or name another folder with --output."
        )
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server as server_module
    from orchestrator.tracking import ui as ui_module

    running = uri is not None and uri.startswith(("http://", "https://"))
    uri = uri or server_module.default_uri(output)
    if not running:
        uri = ui_module.local_uri(uri)
        ui_module.check_port(port)
    server = server_module.shown(uri).rstrip("/") if running else f"http://{ui_module.HOST}:{port}"
    _print_addresses(server, experiment_module.views(uri, say), running)
    if running:
        return
    password = None if no_auth else ui_module.new_password()
    if password is None:
        warn(
            "WARNING: --no-auth lets every user of this machine read all files that you can read, "
            "through MLflow's artifacts, and change and delete runs."
        )
    else:
        say(f"Log in as {ui_module.USER} with the password {password} (until the UI stops)")
    raise typer.Exit(ui_module.serve_ui(uri, port, password))


def _print_addresses(server: str, views: dict[str, str], running: bool) -> None:
    # Without the parameter MLflow opens on its pages for language-model traces.
    page = f"{server}/#/experiments?workflowType=machine_learning"
    how = "a running MLflow server; open it in a browser" if running else "Ctrl-C stops it"
    lines = [f"MLflow UI: {page} ({how})"]
    for name, path in list(views.items())[:MOST_VIEWS]:
        lines.append(f"{name}: {server}{path}")
    if len(views) > MOST_VIEWS:
        lines.append(f"and {len(views) - MOST_VIEWS} older sweeps, in the UI's list")
    # Not with `say`: the queries of these addresses are no secrets.
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
