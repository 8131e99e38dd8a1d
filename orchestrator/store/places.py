"""The names and paths of a store. Nothing else joins them.

Everybody who may write to a shared store chooses the names in it and what its files contain. So a
name passes one of these functions before it becomes part of a path. They refuse what could lead out
of the store: ``..``, an absolute path, a name with a slash. `LocalStorage` refuses symbolic links
on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from btu.errors import UserError

MARKERS, ENTRIES, LEASES, LAUNCHES = "markers", "entries", "leases", "launches"
FAILED, DAMAGED, TIMINGS, TEMPORARY = "failed", "damaged", "timings", ".tmp"
FOLDERS = (MARKERS, ENTRIES, LEASES, FAILED, DAMAGED, LAUNCHES, TIMINGS)
JSON, DROPPED, BEAT = ".json", ".dropped.json", ".beat"
# Files of an entry in this folder are large and may be dropped once every reader is done.
HEAVY = "model/"

KEY_CHARACTERS = 24
_KEY = re.compile(r"[0-9a-f]{24}")
_ATTEMPT = re.compile(r"[0-9a-f]{32}")
_PART = r"(?!\.{1,2}(?:/|\Z))[^/\\]{1,255}"
_FILE = re.compile(rf"{_PART}(?:/{_PART})*")
_STEPS = {"", ".", ".."}


class Outside(OSError, UserError):  # noqa: N818 - it is a property of the path
    """A path that leads, or may lead, out of the store: a name with ``..``, a symbolic link."""


def refused(path: object, reason: str) -> Outside:
    """Return the error about a path. reason: completes "PATH ..."."""
    return Outside(
        f"{path!s:.300} {reason}. It may lead out of the output folder, so nothing there is read "
        "or changed; remove it, or use another output folder."
    )


def is_key(name: object) -> bool:
    """Return whether a name is the key of a stage: 24 hexadecimal digits."""
    return isinstance(name, str) and _KEY.fullmatch(name) is not None


def is_attempt(name: object) -> bool:
    """Return whether a name is that of an attempt: 32 hexadecimal digits."""
    return isinstance(name, str) and _ATTEMPT.fullmatch(name) is not None


def is_name(name: object) -> bool:
    """Return whether a name can be that of a launch: one part of a path, printable."""
    return isinstance(name, str) and "/" not in name and is_file(name)


def is_file(name: object) -> bool:
    """Return whether a name can be that of a file of an entry: a relative POSIX path, printable.

    It has no ``..``, no empty part and no backslash. `str.isprintable` excludes NUL, control
    characters, which act on a terminal, and halves of surrogate pairs, which no file name has.
    """
    return isinstance(name, str) and _is_file(name)


@lru_cache(4096)  # most entries have files of the same names
def _is_file(name: str) -> bool:
    if len(name) > 1000 or not name.isprintable() or _FILE.fullmatch(name) is None:
        return False
    return name.isascii() or all(len(part.encode()) <= 255 for part in name.split("/"))


def is_inside(path: str) -> bool:
    """Return whether a path leads below the root that it is relative to."""
    return bool(path) and _STEPS.isdisjoint(path.split("/")) and "\0" not in path


def parts(path: str) -> list[str]:
    """Return the names that a path below a root consists of; [] for the root itself.

    Raises:
        Outside: the path is absolute, or has a step such as ``..``.
    """
    if not path:
        return []
    if not is_inside(path):
        raise refused(repr(path), "is no path below the folder that it is in")
    return path.split("/")


def below(folder: str, name: str) -> str:
    """Return the path of a file of an entry. folder: from `entry`.

    Raises:
        Outside: `name` is no name of a file.
    """
    if not is_file(name):
        raise refused(repr(name), "is no name of a file of a result")
    return f"{folder}/{name}"


def marker(key: str) -> str:
    """Return the path of the marker of a committed entry."""
    return f"{MARKERS}/{_key(key)}{JSON}"


def dropped(key: str) -> str:
    """Return the path of the marker of a dropped entry."""
    return f"{MARKERS}/{_key(key)}{DROPPED}"


def attempts(key: str) -> str:
    """Return the folder of all attempts at a key."""
    return f"{ENTRIES}/{_key(key)}"


def entry(key: str, attempt: str) -> str:
    """Return the folder with the files of one attempt."""
    return f"{ENTRIES}/{_key(key)}/{_attempt(attempt)}"


def damaged(key: str, attempt: str) -> str:
    """Return where the files of a damaged entry go."""
    return f"{DAMAGED}/{_key(key)}-{_attempt(attempt)}"


def reason(key: str, attempt: str) -> str:
    """Return the file that says why an entry was set aside."""
    return f"{damaged(key, attempt)}/reason.txt"


def failure(key: str) -> str:
    """Return the file that says why computing a key failed."""
    return f"{FAILED}/{_key(key)}{JSON}"


def lease(key: str) -> str:
    """Return the file of a lease."""
    return f"{LEASES}/{_key(key)}{JSON}"


def guard(lease_path: str) -> str:
    """Return the file whose holder may replace an expired lease. lease_path: from `lease`."""
    return f"{lease_path}.guard"


def launch(launch_id: str) -> str:
    """Return the file of a running launch."""
    return f"{LAUNCHES}/{_name(launch_id)}{JSON}"


def beat(launch_id: str) -> str:
    """Return the file that a running launch rewrites."""
    return f"{LAUNCHES}/{_name(launch_id)}{BEAT}"


def above(path: str) -> str:
    """Return the folder that a file or folder is in."""
    return path.rpartition("/")[0]


def is_holder(path: str) -> bool:
    """Return whether a path is that of a lease or of a running launch."""
    folder, _, name = path.partition("/")
    if folder == LEASES:
        return key_of(name) is not None
    return folder == LAUNCHES and name.endswith(JSON) and is_name(name)


def beat_of(path: str) -> str:
    """Return the file that the holder with this path rewrites. path: for which `is_holder`."""
    return path.removesuffix(JSON) + BEAT


def timings(launch_id: str) -> str:
    """Return the file with the timings of a launch."""
    return f"{TIMINGS}/{_name(launch_id)}{JSON}"


def temporary(name: str) -> str:
    """Return the path of an unfinished file."""
    return f"{TEMPORARY}/{_name(name)}"


def key_of(file_name: str, ending: str = JSON) -> str | None:
    """Return the key that a file is named by; None if it is no such file."""
    stem = file_name.removesuffix(ending)
    return stem if stem != file_name and is_key(stem) else None


def keys_of(file_names: Iterable[str], ending: str) -> set[str]:
    """Return the keys that files with this ending are named by; other names are left out."""
    length = KEY_CHARACTERS + len(ending)
    stems = [n[:KEY_CHARACTERS] for n in file_names if len(n) == length and n.endswith(ending)]
    return {stem for stem in stems if _KEY.fullmatch(stem)}


def _key(key: str) -> str:
    if _KEY.fullmatch(key) is None:
        raise refused(repr(key), "is no key of a result: a key has 24 hexadecimal digits")
    return key


def _attempt(attempt: str) -> str:
    if _ATTEMPT.fullmatch(attempt) is None:
        raise refused(repr(attempt), "is no attempt of a result: it has 32 hexadecimal digits")
    return attempt


def _name(name: str) -> str:
    if not is_name(name):
        raise refused(repr(name), "is no name of a file of a store")
    return name
