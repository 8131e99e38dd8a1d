"""MLflow's SQLite database, made without a race between launches."""

from __future__ import annotations

import os
import re
import sqlite3
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import make_url

from orchestrator.store.lease import LEFTOVER_S
from orchestrator.tracking.server import SQLITE

if TYPE_CHECKING:
    pass


def database_of(uri: str) -> Path | None:
    """Return the file of a SQLite URI, None of any other."""
    name = make_url(uri).database if uri.startswith(SQLITE) else None
    return Path(name).resolve() if name and name != ":memory:" else None


def make_database(path: Path) -> None:
    """Create a SQLite store with all its tables, unless there is one.

    The tables take seconds, and MLflow refuses a file that has only some of them ever after. So
    they are made aside and linked into place whole: neither a kill nor a second launch that does
    the same can leave such a file.

    Raises:
        OSError, SQLAlchemyError, MlflowException: it cannot be made.
    """
    _remove_leftovers(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a database that was removed without them: SQLite would write their pages into the new one.
    # Before the tables, not after: by then another launch may have linked its own and use it.
    _remove_companions(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        _make_tables(aside)
        # Closing the only connection leaves no -wal file, which a link would not take along.
        use_wal(aside)
        try:
            os.link(aside, path)
        except FileExistsError:
            pass  # another process was first; its store is as good
        except OSError:
            # A disk without hard links, where the second of two cannot be kept from replacing.
            if not path.exists():
                aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
        _remove_companions(aside)


def _remove_companions(path: Path) -> None:
    """Remove the files that SQLite keeps beside a database, where that is gone."""
    for suffix in ("-wal", "-shm", "-journal"):
        if not path.exists():
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"{SQLITE}{path}"
    try:
        # Not by a client: the registry behind it keeps every store it ever made.
        store = SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())
        store.engine.dispose()
    finally:
        # MLflow keeps an engine for each URI; this one will never be asked for again.
        getattr(SqlAlchemyStore, "_engine_map", {}).pop(uri, None)


def use_wal(path: Path) -> None:
    """Let readers no longer wait for writers: 1.9x the runs per second from several workers."""
    # Some network disks cannot, and a store that is busy in its old mode will next time.
    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed in `make_database` left beside a database."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.new(-\w+)?")
    with suppress(OSError):  # no folder yet, or another launch removes the same
        for found in path.parent.iterdir():
            if left.fullmatch(found.name) and time.time() - found.stat().st_mtime > LEFTOVER_S:
                found.unlink()
