"""Where the output folder of sweeps is, and the store in it."""

from __future__ import annotations

import shlex
from pathlib import Path

from btu.redaction import shown_url

# The output of a sweep file without the key `output`, and of a command without --output.
DEFAULT_OUTPUT = "runs"
STORE = "store"


def output_location(output: str | Path) -> str:
    """Return an output as an absolute folder, or its URL unchanged, without a final '/'."""
    text = str(output)
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().resolve())


def store_location(output: str) -> str:
    """Return the store of an output: the results of all its sweeps. output: a location."""
    return f"{output}/{STORE}"


def output_option(output: str) -> str:
    """Return the option that names an output to a command, with a space before it.

    Empty for the default. Without a password: the user who gave the URL has it. output: a location.
    """
    default = output_location(DEFAULT_OUTPUT)
    return "" if output == default else f" --output {shlex.quote(shown_url(output))}"
