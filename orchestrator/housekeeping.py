"""What takes the room in a store and in its cache, and what of it may go."""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.lease import LEFTOVER_S
from orchestrator.storage import TEMPORARY, LocalStorage, Storage

if TYPE_CHECKING:
    from orchestrator.store import Store

# The size above which copies go. What was used within this time may still be read, here or in
# another process.
CACHE_BYTES = 20_000_000_000
CACHED_S = 3600.0


@dataclass(frozen=True)
class Usage:
    """count: entries. bytes: their files."""

    count: int
    bytes: int


class Candidate(NamedTuple):
    """Something to remove. paths: in this order. why: completes "results that are ..."."""

    kind: str
    key: str
    paths: tuple[str, ...]
    bytes: int
    why: str


def usage(store: Store) -> dict[str, Usage]:
    """Return count and bytes by stage, and of "(unfinished)" and "(damaged)" ones."""
    stages = {marker.folder: marker.name for marker in store.markers()}
    found: dict[str, list[int]] = {}
    for folder, (size, _) in _sizes(store.storage, "entries", 3).items():
        found.setdefault(stages.get(folder, "(unfinished)"), []).append(size)
    for size, _ in _sizes(store.storage, "damaged", 2).values():
        found.setdefault("(damaged)", []).append(size)
    return {stage: Usage(len(all_), sum(all_)) for stage, all_ in sorted(found.items())}


def gc_candidates(
    store: Store,
    *,
    keep: Collection[str] | None = None,
    older_than: float | None = None,
    max_bytes: int | None = None,
    now: float | None = None,
) -> list[Candidate]:
    """Return what `gc` may remove, and nothing that is in use.

    Left-overs and stale leases older than LEFTOVER_S always; of the results, never those in
    `keep`, and of the others those that are older than `older_than` seconds and then the
    oldest until all are below `max_bytes`. With `keep` alone, all others. now: Unix time in s.
    """
    now = time.time() if now is None else now
    busy = store.in_use(now)
    markers = sorted(store.markers(), key=lambda marker: marker.committed)
    chosen = _leftovers(store, {marker.folder for marker in markers}, busy, now)
    total = sum(marker.bytes for marker in markers)
    for marker in markers:
        if marker.key in busy or (keep is not None and marker.key in keep):
            continue
        if older_than is not None and now - marker.committed > older_than:
            why = "older than the given age"
        elif max_bytes is not None and total > max_bytes:
            why = "the oldest, above the given size"
        elif keep is not None and older_than is None and max_bytes is None:
            why = "needed by no kept sweep"
        else:
            continue
        total -= marker.bytes
        chosen.append(Candidate("result", marker.key, marker.paths, marker.bytes, why))
    return chosen


def gc(store: Store, candidates: Iterable[Candidate]) -> int:
    """Remove what `gc_candidates` returned unless it has come into use; return the bytes."""
    busy: set[str] = set()
    freed = 0
    for number, candidate in enumerate(candidates):
        if number % 50 == 0:  # removing takes a while, in which a launch may begin
            busy = store.in_use()
        if candidate.key in busy:
            continue
        for path in candidate.paths:
            store.storage.remove(path)
        if candidate.key:
            store.storage.prune(f"entries/{candidate.key}")
        freed += candidate.bytes
    return freed


def _leftovers(store: Store, known: set[str], busy: set[str], now: float) -> list[Candidate]:
    found = []

    def add(kind: str, key: str, path: str, size: int, changed: float, why: str) -> None:
        if now - changed > LEFTOVER_S:
            found.append(Candidate(kind, key, (path,), size, why))

    for path, (size, changed) in _sizes(store.storage, "entries", 3).items():
        key = path.split("/")[1]
        if path not in known and key not in busy:
            add("left-over", key, path, size, changed, "unfinished")
    for folder, why in (("damaged", "damaged"), (TEMPORARY, "unfinished")):
        for path, (size, changed) in _sizes(store.storage, folder, 2).items():
            add("left-over", "", path, size, changed, why)
    for folder in ("leases", "launches"):
        live = {path.rpartition(".")[0] for path in store.live(folder, now)}
        for path, (size, changed) in _sizes(store.storage, folder, 2).items():
            if path.rpartition(".")[0] not in live:
                add("lease", "", path, size, changed, "of nobody alive")
    return found


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
        for entry, (size, changed) in _sizes(self._storage, "entries", 3).items():
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


def _sizes(storage: Storage, folder: str, depth: int) -> dict[str, tuple[int, float]]:
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
