"""What the commands share: options, consoles, exit codes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.segment import Segment

from btu.printing import printable
from btu.redaction import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import ConsoleOptions, RenderableType
    from rich.text import Text

    from orchestrator.plan.planner import Planner
    from orchestrator.results.source import Source
    from orchestrator.sweep.sweep import Sweep

EXIT_INCOMPLETE, EXIT_USER_ERROR = 1, 2


class SafeConsole(Console):
    """A console on which no text controls the terminal: odd characters are shown as escapes.

    Labels, texts, names of columns and files come from data of unknown origin.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text, also one in a table, so that columns fit what is shown."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything else."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment._replace(text=text)


# Without emoji codes: ":red_circle:" in a label is a text.
console = SafeConsole(emoji=False)
errors = SafeConsole(stderr=True, emoji=False)


class Format(StrEnum):
    """How a table is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    latex = "latex"


SweepFile = Annotated[Path, typer.Argument(help="The sweep's YAML file.", metavar="SWEEP")]
SweepName = Annotated[str, typer.Argument(help="The sweep's name.", metavar="NAME")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys to override, dotted: attack.poison_rate=0.05 'grid.seed=[0,1]' output=/scratch",
        metavar="KEY=VALUE",
    ),
]
LargeGrid = Annotated[
    bool, typer.Option("--yes", "-y", help="Accept a sweep of more cells than the usual limit.")
]
Output = Annotated[
    str,
    typer.Option("--output", "-o", help="Output folder or URL of the sweeps (key `output`)."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="Read from this MLflow store alone, not from the output folder."
    ),
]
# For commands that use MLflow in addition to the output folder.
MLFLOW_STORE = "MLflow store. Default: that of the launch, e.g. SQLite in the output folder."
Style = Annotated[
    Format,
    typer.Option("--format", "-f", help="csv and json have fractions, the others percent."),
]
Mean = Annotated[bool, typer.Option("--mean", help="Mean and 95 % t interval over seeds.")]


def cell_count(count: int, which: str = "") -> str:
    return f"{count} {which}cell{'' if count == 1 else 's'}"


def first_names(names: Sequence[str], most: int = 4) -> str:
    """Return the first of some names, for a sentence."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def byte_size(count: float) -> str:
    from rich.filesize import decimal

    return decimal(int(count))


def say(text: str) -> None:
    """Print a line to standard output, without markup and without passwords of URLs."""
    console.print(shown(text), highlight=False, markup=False, soft_wrap=True)


def note(*notes: str) -> None:
    """Print lines beside a table, on the error output, so that a pipe gets the table alone."""
    for text in notes:
        errors.print(shown(text), highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning on the error output."""
    errors.print(shown(text), style="yellow", highlight=False, markup=False, soft_wrap=True)


def say_server(sweep: Sweep) -> None:
    """Print which server the environment names, where the sweep names none."""
    from orchestrator.sweep.trust import TRACKING_VARIABLE

    if TRACKING_VARIABLE in sweep.given:
        say(
            f"MLflow: {sweep.tracking.uri}, from {TRACKING_VARIABLE} in the environment, since the "
            "sweep names no tracking.uri."
        )


def print_data(planner: Planner) -> None:
    """Print each corpus with its counts, including left-out rows, and what looks wrong in it."""
    for name, counts in planner.counts():
        parts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items())
        say(f"data {name}: {parts}")
    for text in planner.warnings():
        warn(text)


def open_source(
    name: str,
    output: str,
    tracking_uri: str | None = None,
    warn: Callable[[str], None] | None = None,
) -> Source:
    """Return a sweep's results from the store under `output`, or from MLflow alone.

    tracking_uri: the MLflow store; None for the results on disk.
    warn: called with what is left out.

    Raises:
        UserError: no sweep of that name is there ("did you mean"), or MLflow does not answer.
    """
    if tracking_uri is None:
        from orchestrator.results.folder import find_sweep
        from orchestrator.results.source import StoreSource

        return StoreSource(find_sweep(output, name, warn))
    from orchestrator.tracking.reader import MlflowSource

    return MlflowSource(tracking_uri, name, warn)
