"""Folders that a process writes into before others may see the result."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Beside its folder. The process that writes there holds a lock on it.
LOCK = ".lock"


@contextmanager
def private_folder(root: Path, name: str) -> Iterator[Path]:
    """Make an empty folder in `root` that no other process uses, and remove it at the end.

    root: made if it is missing.
    name: of the result that is prepared. Folders that killed processes left for it are removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root, name)
    made = root / f".{name}-{uuid.uuid4().hex}"
    lock = Path(f"{made}{LOCK}")
    try:
        with _locked(lock):
            made.mkdir()
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        lock.unlink(missing_ok=True)


def publish(made: Path, target: Path) -> None:
    """Move a finished folder to `target`, unless another process was first."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file; the system releases it if the process dies."""
    # The file appears under its name when it is locked already.
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w") as file:
        # Some network file systems have no locks: nothing is ever cleaned up there.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fresh.rename(path)
        try:
            yield
        finally:
            fresh.unlink(missing_ok=True)


def _remove_abandoned(root: Path, name: str) -> None:
    for lock in root.glob(f".{name}-*{LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(str(lock).removesuffix(LOCK), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except OSError:
            continue  # in use, or gone meanwhile
