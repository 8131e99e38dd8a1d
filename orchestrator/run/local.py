"""What a Ray of this machine needs of its own: a private folder and a token. Without Ray."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from btu.errors import UserError

# Bytes that the path of an AF_UNIX socket may have.
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
# What Ray adds to its folder for the longest of its sockets; process ids have up to seven digits.
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PREFIX, INNER = "btu-ray-", "r"
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
    private = _private_folder()
    try:
        yield private / INNER
    finally:
        until = time.monotonic() + REMOVAL_SECONDS
        shutil.rmtree(private, ignore_errors=True)
        while private.exists() and time.monotonic() < until:
            time.sleep(0.1)
            shutil.rmtree(private, ignore_errors=True)


def _private_folder() -> Path:
    # Ray reads RAY_TMPDIR itself where it chooses the folder.
    places = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
    asked = list(dict.fromkeys(place for place in places if place))
    for place in asked:
        if len(os.fsencode(os.path.abspath(place))) <= MOST_BYTES:
            try:
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=os.path.abspath(place)))
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
