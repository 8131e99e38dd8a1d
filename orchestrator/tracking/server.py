"""Which MLflow store a sweep is tracked in, and whether it answers."""

from __future__ import annotations

import os
import re
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from alembic.util.exc import CommandError
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from btu.errors import UserError
from btu.redaction import shown as shown
from btu.redaction import shown_url
from orchestrator.results.folder import LaunchedServer, Results
from orchestrator.sweep.output import DATABASE
from orchestrator.sweep.sweep import Sweep
from orchestrator.sweep.trust import TRACKING_VARIABLE, server_refusal
from orchestrator.tracking.runs import ID_TAG

# Seconds before a server that did not answer is asked again; records in a row that may fail.
DOWN_SECONDS, GIVE_UP = 60.0, 3
SQLITE = "sqlite:///"
# The same store, its driver named. MLflow makes the folder that the text after `SQLITE` names,
# without decoding it: for the folder "é" another one, "%C3%A9". After this prefix it makes none.
QUOTED = "sqlite+pysqlite:///"
# Options that a SQLite URL may have after "?".
SQLITE_OPTIONS = frozenset(
    ("cached_statements", "check_same_thread", "detect_types", "isolation_level", "timeout", "uri")
)
# What an unusable store raises: MLflow, the database, its migrations, files, the URI.
REFUSALS = (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ValueError)


def tracking_uri(sweep: Sweep) -> str:
    """Return the sweep's tracking URI: `tracking.uri`, or SQLite in the output folder.

    Raises:
        UserError: the output folder is on an object store, which cannot hold a SQLite file.
    """
    uri = sweep.tracking.uri
    return default_uri(sweep.output) if uri is None else absolute(uri)


def is_sqlite(uri: str) -> bool:
    return uri.startswith((SQLITE, QUOTED))


def sqlite_uri(path: str | Path) -> str:
    """Return the URI of a SQLite file, quoted where the path needs it.

    Raises:
        UserError: the path is not valid UTF-8, which no URI can name.
    """
    try:
        uri = URL.create("sqlite", database=str(path)).render_as_string()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{str(path)!r} is not valid UTF-8, so no address can name MLflow's database there; "
            "rename the folder, or name another output."
        ) from error
    return uri if uri == f"{SQLITE}{path}" else QUOTED + uri.removeprefix(SQLITE)


def absolute(uri: str) -> str:
    """Return a SQLite URI with an absolute path; other URIs as they are.

    Raises:
        UserError: it is a path that was not quoted.
    """
    if not is_sqlite(uri):
        return uri
    url = make_url(uri)
    strange = sorted(set(url.query) - SQLITE_OPTIONS)
    # SQLAlchemy drops options without a value.
    if strange or ("?" in uri and not url.query):
        option = strange[0] if strange else uri.partition("?")[2]
        raise UserError(
            f"tracking URI {shown(uri)}: {option!r} is no option of SQLite "
            f"({', '.join(sorted(SQLITE_OPTIONS))}); write a '?' of a path as %3F."
        )
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        return uri
    written, _, options = uri.partition("?")
    # Workers start in other folders, where a relative path would name another file.
    path = Path(url.database).expanduser().resolve()
    literal = Path(re.sub(r"^[^/]*///", "", written)).expanduser().resolve()
    # `os.path`, since a `Path` raises for a name that is too long.
    if os.path.isdir(literal.parent) and not os.path.isdir(path.parent):
        raise UserError(
            f"tracking URI {shown(uri)} names {path}, in no folder that exists; write a '%' of a "
            f"path as %25: {sqlite_uri(literal)}"
        )
    return sqlite_uri(path) + (f"?{options}" if options else "")


def default_uri(output: str) -> str:
    """Return the URI of the SQLite store in an output folder.

    Raises:
        UserError: the output folder is on an object store; a link of another user is there.
    """
    if "://" in output:
        raise UserError(
            f"output {shown_url(output)} is an object store, where MLflow's SQLite file cannot "
            "be; name an MLflow server with tracking.uri (or --uri)."
        )
    path = Path(output).expanduser().resolve() / DATABASE
    if path.is_symlink() and path.lstat().st_uid not in (os.geteuid(), 0):
        raise UserError(
            f"{path} is a symbolic link of another user; remove it, or name another MLflow store "
            "with tracking.uri (or --uri)."
        )
    return sqlite_uri(path)


def launched_uri(results: Results, option: str) -> str:
    """Return the store that a sweep was launched with: a server, or that of its output folder.

    option: what names another one to the command.

    Raises:
        UserError: the password of its URI is not on disk, or the user's credentials would go to a
            host that only the output folder names.
    """
    found = results.server()
    if found is None:
        return default_uri(results.output)
    # The environment may name the same server with its password, and the user trusts it.
    named = os.environ.get(TRACKING_VARIABLE, "")
    if named and shown_url(named) == found.uri:
        return absolute(named)
    if not found.whole:
        raise UserError(
            f"sweep '{results.name}' was launched with the MLflow store {found.uri}, whose "
            f"password is nowhere on disk; give the whole URI with {option}."
        )
    if (why := server_refusal(option, found.uri)) is not None:
        raise UserError(f"sweep '{results.name}' was launched with another MLflow store. {why}")
    if not (found.own or found.uri.startswith(("http://", "https://")) or _is_in(results, found)):
        raise UserError(
            f"{shown_url(results.output)}/{results.name} names the MLflow store "
            f"{shown(found.uri)}, which is outside of the output folder, and other users can write "
            f"that record; name the store yourself, with {option}."
        )
    return absolute(found.uri)


def _is_in(results: Results, found: LaunchedServer) -> bool:
    """Return whether a recorded SQLite store is in the output folder, without links on the way."""
    url = make_url(found.uri) if is_sqlite(found.uri) else None
    if url is None or not url.database or url.query or "://" in results.output:
        return False
    output, path = Path(results.output), Path(url.database)
    return path.resolve() == output.resolve() / path.name


def set_tag(client: mlflow.MlflowClient, experiment_id: str, key: str, value: str) -> None:
    try:
        client.set_experiment_tag(experiment_id, key, value)
    except (MlflowException, SQLAlchemyError):
        # Two processes may insert the tag at once: one is refused, and its second try updates it.
        client.set_experiment_tag(experiment_id, key, value)


def store_identity(client: mlflow.MlflowClient, found: Experiment) -> str:
    """Return the experiment's own id (`ID_TAG`); create it if the experiment has none."""
    if ID_TAG not in found.tags:
        set_tag(client, found.experiment_id, ID_TAG, uuid.uuid4().hex)
        found = client.get_experiment(found.experiment_id)
    return str(found.tags[ID_TAG])


# Ids of experiments (`store_identity`) by URI and MLflow's id: still known while a server is down.
identities: dict[tuple[str, str], str] = {}
# Servers that did not answer: until when (monotonic seconds) they are not asked, and why.
unanswered: dict[str, tuple[float, str]] = {}


@contextmanager
def breaker(uri: str) -> Iterator[None]:
    """Do not ask a server again for `DOWN_SECONDS` after it failed: the results are on disk."""
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
    """Return an error as one line, without passwords."""
    return f"{type(error).__name__}: {shown(str(error))[:200]}"


def reason_of(error: Exception) -> str:
    """Return the first line of an error's text, without passwords."""
    return shown((str(error).splitlines() or [type(error).__name__])[0])


def is_busy(error: Exception) -> bool:
    """Return whether a SQLite file refused because another process writes to it for long."""
    return "database is locked" in str(error)
