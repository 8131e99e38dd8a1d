"""MLflow's SQLite database, created without a race between launches."""

from __future__ import annotations

import os
import re
import sqlite3
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL, make_url

from orchestrator.store.lease import LEFTOVER_S
from orchestrator.tracking.moved import ARTIFACTS
from orchestrator.tracking.server import is_sqlite, sqlite_uri


def database_of(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for any other URI."""
    name = make_url(uri).database if is_sqlite(uri) else None
    return Path(name).resolve() if name and name != ":memory:" else None


def reading_uri(uri: str) -> str:
    """Return the URI to read a store by: without a write, where a folder cannot be written.

    SQLite makes files beside a database even to read it, so that somebody else's output could not
    be read.
    """
    path = database_of(uri)
    if path is None or (_can_write(path.parent) and _can_write(path)):
        return uri
    if Path(f"{path}-wal").exists():
        return uri  # in use: the files are there, and without them the newest runs are missing
    # `immutable` is an option of SQLite's own URIs, which SQLAlchemy takes as a database's name.
    options = {"immutable": "1", "mode": "ro", "uri": "true"}
    name = f"file:{quote(str(path))}"
    return URL.create("sqlite+pysqlite", database=name, query=options).render_as_string()


def _can_write(path: Path) -> bool:
    return os.access(path, os.W_OK)


def make_database(path: Path) -> None:
    """Create a SQLite store with all its tables, unless it exists.

    Creating the tables takes seconds, and MLflow never accepts a file that has only some of them.
    So the database is created under another name and linked into place when it is complete: neither
    a kill nor a second launch at the same moment can leave an incomplete file.

    Raises:
        OSError, SQLAlchemyError, MlflowException: the database cannot be created.
    """
    _remove_leftovers(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A removed database may have left its journal: SQLite would write those pages into the new one.
    # This comes before the tables: afterwards another launch may already use the database.
    _remove_companions(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        _make_tables(aside)
        # Closing the only connection removes the -wal file, which a link would not include.
        use_wal(aside)
        try:
            os.link(aside, path)
        except FileExistsError:
            pass  # another process was first; its store is equally good
        except OSError:
            # The disk has no hard links: a second process may replace the file of the first.
            if not path.exists():
                aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
        _remove_companions(aside)


def _remove_companions(path: Path) -> None:
    """Remove the files that SQLite keeps beside a database that no longer exists."""
    for suffix in ("-wal", "-shm", "-journal"):
        if not path.exists():
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = sqlite_uri(path)
    try:
        # Not through a client: its registry keeps every store that it ever created.
        store = SqlAlchemyStore(uri, (path.parent / ARTIFACTS).as_uri())
        store.engine.dispose()
    finally:
        # MLflow keeps an engine per URI; this URI is not used again.
        getattr(SqlAlchemyStore, "_engine_map", {}).pop(uri, None)


def use_wal(path: Path) -> None:
    """Use write-ahead logging: readers no longer wait for writers (1.9x the runs per second)."""
    # Some network disks cannot. A store that is busy now is switched by a later launch.
    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")


def _remove_leftovers(path: Path) -> None:
    """Remove files of processes that were killed in `make_database`."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.new(-\w+)?")
    with suppress(OSError):  # no folder yet, or another launch removes the same
        for found in path.parent.iterdir():
            if left.fullmatch(found.name) and time.time() - found.stat().st_mtime > LEFTOVER_S:
                found.unlink()
