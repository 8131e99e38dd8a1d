"""What a launch has of its own on this machine: folders and a token. Without Ray.

Each folder has a lock that its process holds as long as it lives. So a folder of a process that was
killed can be told from one in use, also where processes have ids of their own (containers).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from btu.errors import UserError

# Bytes that the path of an AF_UNIX socket may have.
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
# What Ray adds to its folder for the longest of its sockets; process ids have up to seven digits.
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PREFIX, INNER = "btu-ray-", "r"
# Of the folder for Tune's own files.
TUNE = "btu-tune-"
LOCK = ".lock"
# What may stand before it: mkdtemp adds eight letters to the prefix.
MOST_BYTES = SOCKET_BYTES - len(f"/{PREFIX}12345678/{INNER}{SOCKET}")
# Seconds for which processes of Ray may still write after it was shut down.
REMOVAL_SECONDS = 5.0
TOKEN = "RAY_AUTH_TOKEN"


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Make a folder for Ray's sockets and logs that no other user can enter; remove it at the end.

    Ray opens its own folders to everybody (0777): it gets one inside a private one.

    Raises:
        UserError: no folder for temporary files has a path that is short enough.
    """
    with _locked(_private_folder()) as private:
        yield private / INNER


@contextmanager
def tune_folder() -> Iterator[Path]:
    """Make a folder for Tune's own files, which only the driver writes; remove it at the end.

    Stages write no checkpoints of Tune's, so that no other node opens it, and nothing reads it.
    """
    with _locked(Path(tempfile.mkdtemp(prefix=TUNE))) as folder:
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Hold the lock of a new folder; remove the folder at the end."""
    # Under its name only once it is held: without a lock, nobody takes the folder for dead.
    made = folder / f"{LOCK}.new"
    lock = os.open(made, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made.rename(folder / LOCK)
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder that processes of Ray may still write to for a while."""
    until = time.monotonic() + REMOVAL_SECONDS
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Diverted:
    """A file with what this process and its libraries write to the standard error.

    named: whether a user was told of it. stays: whether the standard error stays in it at the end.
    """

    path: Path
    named: bool = False
    stays: bool = False

    def words(self) -> str:
        """Return a sentence for the user that names the file."""
        self.named = True
        return f"What Ray says: {self.path}."

    @property
    def empty(self) -> bool:
        return self.path.stat().st_size == 0


@contextmanager
def stderr_to(path: Path) -> Iterator[Diverted]:
    """Divert the standard error to a file, which is removed at the end unless it was named.

    Ray's client writes traces and dumps there, from C++ and from threads of its own.
    """
    diverted = Diverted(path)
    sys.stderr.flush()
    terminal = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield diverted
    finally:
        sys.stderr.flush()
        if diverted.stays:
            # Only what is written past Python stays there: errors of this process are for the user.
            sys.stderr = os.fdopen(terminal, "w")
        else:
            os.dup2(terminal, 2)
            os.close(terminal)
        if not diverted.named:
            path.unlink(missing_ok=True)


def dead_folders() -> list[Path]:
    """Return this user's folders on this machine whose launch was killed."""
    found = []
    for place in _places():
        for prefix in (PREFIX, TUNE):
            found += [path for path in sorted(Path(place).glob(f"{prefix}*")) if _is_dead(path)]
    return list(dict.fromkeys(found))


def _is_dead(folder: Path) -> bool:
    """Return whether the process that made a folder is gone; False where that is not certain."""
    with suppress(OSError):
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(lock)
        return True
    return False


def remove_dead_folder(folder: Path) -> None:
    """Remove a folder that `dead_folders` found."""
    shutil.rmtree(folder, ignore_errors=True)


def _places() -> list[str]:
    # Ray reads RAY_TMPDIR itself where it chooses the folder.
    places = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
    return list(dict.fromkeys(os.path.abspath(place) for place in places if place))


def _private_folder() -> Path:
    asked = _places()
    for place in asked:
        if len(os.fsencode(place)) <= MOST_BYTES:
            try:
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            except OSError:
                continue  # the next one may be writable
    raise UserError(
        f"Ray cannot put its sockets into {' or '.join(asked)}: the path of that folder may have "
        f"{MOST_BYTES} bytes, and you must be able to write to it. Set TMPDIR to such a folder."
    )


@cache
def _token() -> str:
    # One for all launches of this process: Ray reads it once.
    return secrets.token_hex(32)


@contextmanager
def ray_token() -> Iterator[None]:
    """Give Ray a token that only processes of this user know.

    It stands in the environment. Ray itself would write one to a file of the home folder that
    every user may read, and fail where that folder cannot be written.
    """
    before = os.environ.get(TOKEN)
    os.environ[TOKEN] = _token()
    try:
        yield
    finally:
        if before is None:
            del os.environ[TOKEN]
        else:
            os.environ[TOKEN] = before
