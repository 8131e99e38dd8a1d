"""Which MLflow store a sweep is tracked in, and whether it answers."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from alembic.util.exc import CommandError
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from btu.errors import UserError
from orchestrator.sweep.sweep import Sweep
from orchestrator.tracking.runs import ID_TAG

if TYPE_CHECKING:
    pass

# How long a server that did not answer is left alone, and how many records in a row may fail.
DOWN_SECONDS, GIVE_UP = 60.0, 3
SQLITE = "sqlite:///"
# What a store that cannot be used raises: MLflow, the database, its migrations, files, the URI.
REFUSALS = (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ValueError)


def tracking_uri(sweep: Sweep) -> str:
    """Return where the sweep's runs go: its own choice, or SQLite in the output folder.

    Raises:
        UserError: the output folder is on an object store, where SQLite cannot be.
    """
    uri = sweep.tracking.uri
    return default_uri(sweep.output) if uri is None else absolute(uri)


def absolute(uri: str) -> str:
    """Return a URI that names the same SQLite file from everywhere; other URIs as they are."""
    if uri.startswith(SQLITE):
        # Workers start in folders of their own, where a relative file would be another one.
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).expanduser().resolve())
    return uri


def shown(text: str) -> str:
    """Return a URI, or a text with some, for people: without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def default_uri(output: str) -> str:
    """Return the SQLite store of an output folder.

    Raises:
        UserError: the output folder is on an object store.
    """
    if "://" in output:
        raise UserError(
            f"output {output} is an object store, where MLflow's SQLite file cannot be; name an "
            "MLflow server with tracking.uri (or --uri)."
        )
    return f"{SQLITE}{Path(output).expanduser().resolve() / 'mlflow.db'}"


def set_tag(client: mlflow.MlflowClient, experiment_id: str, key: str, value: str) -> None:
    try:
        client.set_experiment_tag(experiment_id, key, value)
    except (MlflowException, SQLAlchemyError):
        # Of two that insert a tag at once one is refused; it finds the tag the second time.
        client.set_experiment_tag(experiment_id, key, value)


def store_identity(client: mlflow.MlflowClient, found: Experiment) -> str:
    """Return what tells an experiment from all others, giving it to one that has none."""
    if ID_TAG not in found.tags:
        set_tag(client, found.experiment_id, ID_TAG, uuid.uuid4().hex)
        found = client.get_experiment(found.experiment_id)
    return str(found.tags[ID_TAG])


# What experiments are, by URI and id there: known still when a server is away.
identities: dict[tuple[str, str], str] = {}
unanswered: dict[str, tuple[float, str]] = {}


@contextmanager
def breaker(uri: str) -> Iterator[None]:
    """Leave a server alone for a while after it did not answer: results wait on disk."""
    until, reason = unanswered.get(uri, (0.0, ""))
    if time.monotonic() < until:
        raise ConnectionError(reason)
    try:
        yield
    except Exception as error:
        if uri.startswith(("http://", "https://")):
            reason = shown(f"{type(error).__name__}: {error}")
            unanswered[uri] = (time.monotonic() + DOWN_SECONDS, reason)
        raise


def brief(error: Exception) -> str:
    """Return an error as a line for people, without passwords."""
    return f"{type(error).__name__}: {shown(str(error))[:200]}"


def reason_of(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0])


def ui_command(uri: str, port: int) -> list[str]:
    """Return the command that serves the MLflow UI of a store, on this machine only."""
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri,
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip


def serve_ui(uri: str, port: int) -> int:
    """Serve the MLflow UI until it is stopped; return its exit code."""
    try:
        return subprocess.run(ui_command(uri, port), check=False).returncode
    except KeyboardInterrupt:
        return 0
