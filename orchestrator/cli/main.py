"""The `btu` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

from typing import Annotated

import typer

from btu import __version__
from btu.errors import UserError
from btu.redaction import shown
from orchestrator.cli import store
from orchestrator.cli.compare import compare
from orchestrator.cli.import_ import import_
from orchestrator.cli.launch import launch, trial
from orchestrator.cli.output import orderly_output
from orchestrator.cli.parts import list_
from orchestrator.cli.plan import plan
from orchestrator.cli.report import choose, curves, report
from orchestrator.cli.scan import scan
from orchestrator.cli.shared import EXIT_USER_ERROR, console, errors
from orchestrator.cli.status import status
from orchestrator.cli.tracking import sync, ui

app = typer.Typer(
    name="btu",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sweeps of textual-backdoor defenses: attack, defend, measure, compare.\n\n"
    "A sweep is a YAML file (see sweeps/). Start with one on an embedded corpus:\n\n"
    "    btu plan sweeps/quickstart.yaml      # show what would run, and what cannot\n\n"
    "    btu launch sweeps/quickstart.yaml    # run it on local Ray; the same command resumes\n\n"
    "    btu status quickstart                # show how it stands, while it runs or after\n\n"
    "    btu report quickstart                # print the table of results\n\n"
    "    btu curves quickstart                # print detection at every threshold\n\n"
    "    btu scan DATA                        # search your own data for triggers\n\n"
    "    btu ui                               # open the runs in MLflow\n\n"
    "Any key of the file can be overridden: `btu launch FILE train.epochs=1 'grid.seed=[0,1]'`.",
)
for command in (
    plan, launch, status, report, curves, choose, compare, scan, trial, ui, sync,
):  # fmt: skip
    app.command()(command)
app.command(name="list")(list_)
app.command(name="import")(import_)
app.add_typer(store.app, name="store")


def _version(show: bool) -> None:
    if show:
        console.print(f"btu {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@orderly_output()
def main() -> None:
    """Run the command line. A `UserError` is printed as a message, without a traceback."""
    try:
        app()
    except UserError as error:
        text = f"error: {shown(str(error))}"
        errors.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(EXIT_USER_ERROR) from None
