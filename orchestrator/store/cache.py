"""The local cache of a remote store."""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.store.storage import TEMPORARY, LocalStorage, Storage

if TYPE_CHECKING:
    pass

# The size above which copies go. What was used within this time may still be read, here or in
# another process.
CACHE_BYTES = 20_000_000_000
CACHED_S = 3600.0


class Cache:
    """Copies of a remote store's entries in a folder that the processes of a machine share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._storage = LocalStorage(folder)
        # Bytes that this process fetched since it last looked; before it ever did, too many.
        self._fetched = math.inf

    def use(self, entry: str, files: Mapping[str, int]) -> None:
        """Note that files of an entry, with their sizes in bytes, are needed now."""
        copy = self.folder / entry
        with suppress(FileNotFoundError):
            os.utime(copy)
        self._fetched += sum(size for name, size in files.items() if not (copy / name).exists())

    def trim(self, max_bytes: int) -> int:
        """Remove the least recently used entries until at most `max_bytes` are left.

        Returns the bytes removed. What was used within CACHED_S stays, however much it is. Looks
        only once this process has fetched a hundredth of `max_bytes` since it last did, so it can
        be called often. Folders that another process removes meanwhile are no error.
        """
        if self._fetched < max_bytes / 100:
            return 0
        self._fetched = 0
        copies = []
        for entry, (size, changed) in folder_sizes(self._storage, "entries", 3).items():
            with suppress(FileNotFoundError):
                copies.append((max(changed, self._used(entry)), size, entry))
        above, freed = sum(size for _, size, _ in copies) - max_bytes, 0
        for used, size, entry in sorted(copies):
            if freed >= above or time.time() - used < CACHED_S:
                break
            with suppress(FileNotFoundError):
                # Moved away first: who wants it now finds it whole or not at all, and fetches it.
                aside = f"{TEMPORARY}/{uuid.uuid4().hex}"
                if self._used(entry) <= used and self._storage.move(entry, aside):
                    self._storage.prune(entry.rpartition("/")[0])
                    freed += size
        shutil.rmtree(self.folder / TEMPORARY, ignore_errors=True)
        return freed

    def _used(self, entry: str) -> float:
        return (self.folder / entry).stat().st_mtime


def folder_sizes(storage: Storage, folder: str, depth: int) -> dict[str, tuple[int, float]]:
    """Return bytes and last change of what lies below a folder, by paths of `depth` parts.

    The change is Unix time in seconds; where it is not known, nothing counts as old.
    """
    sizes: dict[str, tuple[int, float]] = {}
    for found in storage.walk(folder):
        path = "/".join(found.path.split("/")[:depth])
        if path != folder:
            size, changed = sizes.get(path, (0, 0.0))
            modified = time.time() if found.modified is None else found.modified
            sizes[path] = (size + found.bytes, max(changed, modified))
    return sizes
