"""What the commands share: options, consoles, exit codes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.plan.planner import Planner
    from orchestrator.results.source import Source

EXIT_INCOMPLETE, EXIT_USER_ERROR = 1, 2
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


class Format(StrEnum):
    """How a table is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    latex = "latex"


def cell_count(count: int, which: str = "") -> str:
    return f"{count} {which}cell{'' if count == 1 else 's'}"


def byte_size(count: float) -> str:
    from rich.filesize import decimal

    return decimal(int(count))


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    errors.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def print_data(planner: Planner) -> None:
    """Say what the data is and what loading it did: nothing is dropped silently."""
    for name, counts in planner.counts():
        parts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items())
        say(f"data {name}: {parts}")


def note(*notes: str) -> None:
    """Tell what is not in a table beside it, so that a pipe gets the table alone."""
    for text in notes:
        errors.print(text, highlight=False, markup=False, soft_wrap=True)


def open_source(
    name: str,
    output: str,
    tracking_uri: str | None = None,
    warn: Callable[[str], None] | None = None,
) -> Source:
    """Return a sweep's results from the store under `output`, or from MLflow alone.

    tracking_uri: of the MLflow store; None for the results on disk. warn: told of what is left out.

    Raises:
        UserError: no sweep of that name is there ("did you mean"), or MLflow does not answer.
    """
    if tracking_uri is None:
        from orchestrator.results.folder import find_sweep
        from orchestrator.results.source import StoreSource

        return StoreSource(find_sweep(output, name, warn))
    from orchestrator.tracking.reader import MlflowSource

    return MlflowSource(tracking_uri, name, warn)
