"""What of a local store belongs to other Unix users."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from orchestrator.store import places
from orchestrator.store.local import LocalStorage
from orchestrator.store.store import Store


def foreign_entries(store: Store) -> dict[str, list[str]]:
    """Return the owners of each entry's marker, folders and files, but for this user, by key.

    Who owns a folder may exchange what is in it. A store by URL has no owners.
    """
    found: dict[str, set[int]] = {}
    if isinstance(store.storage, LocalStorage):
        for folder in (places.MARKERS, places.ENTRIES):
            for path, status in store.storage.statuses(folder, folders=True):
                key = path.removeprefix(f"{folder}/").partition("/")[0].partition(".")[0]
                if places.is_key(key) and status.st_uid != os.geteuid():
                    found.setdefault(key, set()).add(status.st_uid)
    return {key: sorted(map(_name, users)) for key, users in sorted(found.items())}


def is_own(path: Path) -> bool:
    """Return whether a path is a regular file of this user that no other user can write to."""
    try:
        status = path.lstat()
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return own and not status.st_mode & others


def _name(user: int) -> str:
    try:
        return f"{pwd.getpwuid(user).pw_name} (id {user})"
    except KeyError:
        return f"user id {user}"
