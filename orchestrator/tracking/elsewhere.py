"""Artifacts that a SQLite store sends somewhere else than beside it.

Whoever may write to a store's file chooses where MLflow's client writes artifacts: a folder of the
user, or a host that gets the user's credentials. So an address elsewhere counts only in a file that
no other user can write to.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from btu.errors import UserError
from btu.redaction import shown
from orchestrator.store.owners import is_own
from orchestrator.tracking.moved import ARTIFACTS, local_path

# What SQLite writes beside a database, and reads back as a part of it.
COMPANIONS = ("-wal", "-shm", "-journal")


def refuse_elsewhere(database: Path, address: str | None) -> None:
    """Check that artifacts may be written to an address of a SQLite store.

    database: the store's file.
    address: of the artifacts of an experiment or a run.

    Raises:
        UserError: it is not beside the database, and another user may have written it; or a link
            of another user is on the way.
    """
    path = local_path(address)
    beside = database.parent / ARTIFACTS
    if path is not None and ".." not in path.parts and path.is_relative_to(beside):
        _refuse_links(database.parent, path)
    elif not _is_own(database):
        raise UserError(_reason(database, address))


def refuse_host(database: Path, address: str | None) -> None:
    """Check that artifacts may be read from an address of a SQLite store.

    Arguments are those of `refuse_elsewhere`. Folders may be read.

    Raises:
        UserError: it is not on this machine, and another user may have written it.
    """
    if local_path(address) is None and not _is_own(database):
        raise UserError(_reason(database, address))


def _is_own(database: Path) -> bool:
    return all(
        is_own(path)
        for path in (database, *(Path(f"{database}{suffix}") for suffix in COMPANIONS))
        if os.path.lexists(path)
    )


def _reason(database: Path, address: str | None) -> str:
    return (
        f"other users can write to the MLflow store {database}, and it names "
        f"{shown(str(address))} for artifacts, outside of its folder {ARTIFACTS}; if the address "
        f"is yours, make the store yours alone (chmod go-w {shlex.quote(str(database))}), else "
        "name another store."
    )


def _refuse_links(folder: Path, path: Path) -> None:
    """Raise a `UserError` if a link of another user is on the way to artifacts, or among them."""
    steps = path.relative_to(folder).parts
    found = [folder.joinpath(*steps[: count + 1]) for count in range(len(steps))]
    for parent, folders, files in os.walk(path):
        found += [Path(parent, name) for name in (*folders, *files)]
    for step in found:
        # The user's own may lead to another disk.
        if step.is_symlink() and step.lstat().st_uid not in (os.geteuid(), 0):
            raise UserError(
                f"{step} is a symbolic link of another user, so no artifacts are written there; "
                "remove it, or name another MLflow store."
            )
