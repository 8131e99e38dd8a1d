"""The folder of what can be made again: paraphrases, copies of a remote store."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from btu.errors import UserError

VARIABLE = "BTU_CACHE"
# Of this process, by the place that cannot be written.
_temporaries: dict[str, Path] = {}
_FIX = f"set {VARIABLE} to a folder that only you can write to"


def cache_place(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the cache is: $BTU_CACHE, $XDG_CACHE_HOME/btu or ~/.cache/btu."""
    named = environment.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    # The specification: a relative path is to be ignored.
    base = environment.get("XDG_CACHE_HOME", "")
    # Not Path.home(): it raises where a container's user has none.
    home = Path(os.path.expanduser("~"))
    return (Path(base) if os.path.isabs(base) else home / ".cache") / "btu"


def cache_folder(part: str = "", warn: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the cache, which is made if it is missing, for its owner alone.

    A home that cannot be written, as in some containers, gives way to a new temporary folder, which
    goes with the process.

    part: of a folder inside it.
    warn: called with a sentence where the cache is such a temporary folder.

    Raises:
        UserError: the folder is a symbolic link, or other users can change what is in it.
    """
    place = cache_place()
    own = not os.environ.get(VARIABLE)
    try:
        _make(place, tighten=own)
    except OSError as error:
        if not own:
            raise UserError(
                f"the cache {place} cannot be made ({error.strerror}); {_FIX}."
            ) from error
        place = _temporary(str(place), str(error.strerror), warn)
    folder = place / part
    if part:
        _make(folder, tighten=True)
    return folder


def _make(folder: Path, *, tighten: bool) -> None:
    """Make a folder of this user alone. tighten: take rights on it from others, else refuse."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # checked below
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise UserError(
            f"the cache {folder} is a symbolic link, which is not followed; {_FIX}, such as "
            "the one that it leads to."
        )
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"the cache {folder} is no folder; remove it, or {_FIX}.")
    if status.st_uid != os.geteuid():
        raise UserError(
            f"the cache {folder} belongs to another user (id {status.st_uid}), who could change "
            f"what is in it; {_FIX}."
        )
    if tighten and status.st_mode & 0o077:
        folder.chmod(0o700)
    elif status.st_mode & 0o022:
        raise UserError(
            f"other users can write to the cache {folder}; run `chmod go-w` on it, or {_FIX}."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(folder))


def _temporary(place: str, reason: str, warn: Callable[[str], None] | None) -> Path:
    if place not in _temporaries:
        made = tempfile.mkdtemp(prefix="btu-cache-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        _temporaries[place] = Path(made)
        if warn is not None:
            warn(
                f"The cache {place} cannot be written ({reason}): what is fetched is kept in "
                f"{made} and removed at the end. Set {VARIABLE} to a folder to keep it."
            )
    return _temporaries[place]
