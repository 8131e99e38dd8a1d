"""The local cache of a remote store."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.store import places, tree
from orchestrator.store.local import LocalStorage
from orchestrator.store.primitives import Storage

# The size above which copies are removed. Copies used within CACHED_S seconds stay: this process or
# another may still read them.
CACHE_BYTES = 20_000_000_000
CACHED_S = 3600.0
# Locks that entries share, so that no lock need ever be removed.
LOCK_FOLDER, LOCKS = "locks", 256


class Cache:
    """Copies of a remote store's entries, in a folder that all processes of a machine share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = LocalStorage(folder)
        # Bytes fetched by this process since its last `trim`; infinite before the first.
        self._fetched = math.inf

    @contextmanager
    def locked(self, entry: str) -> Iterator[None]:
        """Let one process of this machine at a time fetch an entry, and compare its files.

        The others wait, and find it fetched. Without the lock they would see each other's files
        half replaced, and take the copy for damaged. Reading a copy needs no lock.
        """
        number = int(hashlib.sha256(entry.encode()).hexdigest(), 16) % LOCKS
        (self.folder / LOCK_FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        name = self.folder / LOCK_FOLDER / str(number)
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def use(self, entry: str, files: Mapping[str, int]) -> None:
        """Mark files of an entry, with their sizes in bytes, as used now."""
        copy = self.folder / entry
        with suppress(FileNotFoundError):
            os.utime(copy)
        self._fetched += sum(size for name, size in files.items() if not (copy / name).exists())

    def adopt(self, folder: Path, entry: str, size: int) -> None:
        """Make the files of an attempt the copy of the entry that was made from them.

        So the next stage on this machine need not fetch what the last one sent.

        folder: with the files; it is gone afterwards. entry: its folder. size: of all files, bytes.

        Raises:
            OSError: the cache is full or has a copy already. The copy is whole or not there.
        """
        os.close(tree.open_folder(str(self.folder), places.above(entry), make=True))
        target = self.folder / entry
        try:
            os.rename(folder, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            staged = self.folder / places.temporary(uuid.uuid4().hex)
            try:
                shutil.copytree(folder, staged)
                os.rename(staged, target)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        self._fetched += size

    def note(self, key: str, marker: bytes) -> None:
        """Keep the marker of a copy, so that `noted` finds the copy without asking the store."""
        if self.noted(key) != marker:
            self.storage.write(places.marker(key), marker, durable=False)

    def noted(self, key: str) -> bytes | None:
        """Return the marker of a copy; None if there is none."""
        try:
            return self.storage.read(places.marker(key))
        except FileNotFoundError:
            return None

    def trim(self, max_bytes: int) -> int:
        """Remove the least recently used entries until at most `max_bytes` are left.

        Return the bytes removed. Entries used within CACHED_S stay, whatever their size. Cheap to
        call often: it does nothing until this process has fetched a hundredth of `max_bytes` since
        the last call. It tolerates that another process removes the same folders.
        """
        if self._fetched < max_bytes / 100:
            return 0
        self._fetched = 0
        copies = []
        for entry, (size, changed) in folder_sizes(self.storage, places.ENTRIES, 3).items():
            with suppress(FileNotFoundError):
                copies.append((max(changed, self._used(entry)), size, entry))
        above, freed = sum(size for _, size, _ in copies) - max_bytes, 0
        for used, size, entry in sorted(copies):
            if freed >= above or time.time() - used < CACHED_S:
                break
            with suppress(FileNotFoundError):
                # Moved aside first: a reader finds the entry whole or not at all, and fetches it.
                aside = places.temporary(uuid.uuid4().hex)
                if self._used(entry) <= used and self.storage.move(entry, aside):
                    self.storage.prune(places.above(entry))
                    self.storage.remove(places.marker(entry.split("/")[1]))
                    freed += size
                shutil.rmtree(self.folder / aside, ignore_errors=True)
        self._remove_leftovers()
        return freed

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left unfinished; others are writing there now."""
        with suppress(FileNotFoundError):
            for left in (self.folder / places.TEMPORARY).iterdir():
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime <= CACHED_S:
                        continue
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink()
        with suppress(OSError):  # others are writing there
            (self.folder / places.TEMPORARY).rmdir()

    def _used(self, entry: str) -> float:
        return (self.folder / entry).stat().st_mtime


def folder_sizes(storage: Storage, folder: str, depth: int) -> dict[str, tuple[int, float]]:
    """Return bytes and time of last change below a folder, by path of `depth` parts.

    The time is Unix seconds; an unknown time counts as the present.
    """
    sizes: dict[str, tuple[int, float]] = {}
    for found in storage.walk(folder):
        path = "/".join(found.path.split("/")[:depth])
        if path != folder:
            size, changed = sizes.get(path, (0, 0.0))
            modified = time.time() if found.modified is None else found.modified
            sizes[path] = (size + found.bytes, max(changed, modified))
    return sizes
