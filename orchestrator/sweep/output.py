"""Where the output folder of sweeps is, and the store in it."""

from __future__ import annotations

import shlex
from pathlib import Path

from btu.paths import written_path
from btu.redaction import shown_url

# The output of a sweep file without the key `output`, and of a command without --output.
DEFAULT_OUTPUT = "runs"
STORE = "store"
# What else the output folder has: MLflow's database, with the files that SQLite puts beside it, and
# its artifacts; the work folders of btu scan.
DATABASE, ARTIFACTS, SCANS = "mlflow.db", "mlartifacts", "scan"
# Bytes of a sweep's name: file systems allow 255, and MLflow 256 characters.
MOST_NAME_BYTES = 200


def taken_name(name: str) -> str | None:
    """Return what an output folder has under a name of its own; None if a sweep may have it."""
    # Some file systems do not tell cases apart.
    plain = name.casefold()
    if plain == STORE:
        return "the results of all sweeps"
    if plain == SCANS:
        return "the work folders of btu scan"
    if plain.startswith((DATABASE, ARTIFACTS)):
        return "the files of MLflow"
    return None


def output_location(output: str | Path) -> str:
    """Return an output as an absolute folder, or its URL unchanged, without a final '/'.

    Raises:
        UserError: no folder can have that name.
    """
    text = str(output)
    return text.rstrip("/") if "://" in text else str(written_path("output", text).resolve())


def store_location(output: str) -> str:
    """Return the store of an output: the results of all its sweeps. output: a location."""
    return f"{output}/{STORE}"


def output_option(output: str) -> str:
    """Return the option that names an output to a command, with a space before it.

    Empty for the default. Without a password: the user who gave the URL has it. output: a location.
    """
    default = output_location(DEFAULT_OUTPUT)
    return "" if output == default else f" --output {shlex.quote(shown_url(output))}"
