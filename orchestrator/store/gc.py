"""Disk usage of a store, and garbage collection."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.store import places
from orchestrator.store.cache import folder_sizes
from orchestrator.store.lease import LEFTOVER_S, Holder

if TYPE_CHECKING:
    from orchestrator.store.store import Store

HOLDERS = (places.LEASES, places.LAUNCHES)
# `Candidate.kind` of what a process left that computes or launches no more.
LEASE, LAUNCH = "lease", "registered launch"


@dataclass(frozen=True)
class Usage:
    """count: entries. bytes: their files."""

    count: int
    bytes: int


class Candidate(NamedTuple):
    """Something to remove. paths: in order of removal. why: said of it, after kind and size."""

    kind: str
    key: str
    paths: tuple[str, ...]
    bytes: int
    why: str


def usage(store: Store) -> dict[str, Usage]:
    """Return count and bytes by stage name, and for "(unfinished)" and "(damaged)" entries."""
    sizes = {f: size for f, (size, _) in folder_sizes(store.storage, places.ENTRIES, 3).items()}
    found: dict[str, list[int]] = {}
    for marker in store.markers(unsigned=True):
        # Small files are in the marker on an object store, where there may be no folder.
        packed = 0 if store.storage.local else sum(map(len, marker.small.values()))
        size = sizes.pop(marker.folder, None)
        if size is not None or marker.small:
            found.setdefault(marker.name, []).append(packed + (size or 0))
    for size in sizes.values():
        found.setdefault("(unfinished)", []).append(size)
    for size, _ in folder_sizes(store.storage, places.DAMAGED, 2).values():
        found.setdefault("(damaged)", []).append(size)
    return {stage: Usage(len(all_), sum(all_)) for stage, all_ in sorted(found.items())}


def gc_candidates(
    store: Store,
    *,
    keep: Collection[str] | None = None,
    older_than: float | None = None,
    max_bytes: int | None = None,
    now: float | None = None,
    watch: Callable[[list[Holder]], None] = lambda suspects: None,
) -> list[Candidate]:
    """Return what `gc` may remove. Nothing in use is included.

    Always included are left-overs older than LEFTOVER_S, and the leases and registrations of
    processes that are gone: a process of this machine that does not run, or one of another machine
    whose heartbeat did not change for TTL_S of this machine's time.

    store: the store to look at.
    keep: keys of results that stay. If it is the only limit, all other results are included.
    older_than: include results older than this many seconds.
    max_bytes: include the oldest results until the rest is below this size.
    now: Unix time in seconds; None is the present.
    watch: called with holders of other machines that have been silent for TTL_S, by the times of
        their files; waits for TTL_S. Without it they count as alive until LEFTOVER_S.
    """
    now = time.time() if now is None else now
    busy = store.leases.in_use(now)  # from here on, `store` watches every heartbeat
    suspects = _suspects(store, now)
    if suspects:
        watch(suspects)
        busy = store.leases.in_use(now)
    markers = sorted(store.markers(unsigned=True), key=lambda marker: marker.committed)
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


def gc(store: Store, candidates: Iterable[Candidate], now: float | None = None) -> int:
    """Remove what `gc_candidates` returned, unless it is in use by now; return the bytes freed.

    now: Unix time in seconds; None is the present.
    """
    busy: set[str] = set()
    live: set[str] = set()
    freed = 0
    for number, candidate in enumerate(candidates):
        if number % 50 == 0:  # removing takes a while, and a launch may start
            busy = store.leases.in_use(now)
            live = _live(store, now)
        if candidate.key in busy or live.intersection(candidate.paths):
            continue
        for path in candidate.paths:
            store.storage.remove(path)
        if candidate.key:
            store.storage.prune(places.above(candidate.paths[-1]))
        freed += candidate.bytes
    return freed


def _leftovers(store: Store, known: set[str], busy: set[str], now: float) -> list[Candidate]:
    found = []

    def add(kind: str, key: str, path: str, size: int, changed: float, why: str) -> None:
        if now - changed > LEFTOVER_S:
            found.append(Candidate(kind, key, (path,), size, why))

    for path, (size, changed) in folder_sizes(store.storage, places.ENTRIES, 3).items():
        key = path.split("/")[1]
        if path not in known and key not in busy:
            add("left-over", key, path, size, changed, "unfinished")
    for folder, why in ((places.DAMAGED, "damaged"), (places.TEMPORARY, "unfinished")):
        for path, (size, changed) in folder_sizes(store.storage, folder, 2).items():
            add("left-over", "", path, size, changed, why)
    return [*found, *_holders_gone(store, now)]


def _suspects(store: Store, now: float) -> list[Holder]:
    """Return holders of other machines that seem gone by the times of their files."""
    found = [holder for folder in HOLDERS for holder in store.leases.holders(folder, now)]
    return [holder for holder in found if holder.alive is None and holder.lost]


def _live(store: Store, now: float | None) -> set[str]:
    """Return the files of live leases and launches."""
    return {path for folder in HOLDERS for path in store.leases.live(folder, now)}


def _holders_gone(store: Store, now: float) -> list[Candidate]:
    """Return the files of leases and launches whose process is gone, and what belongs to none."""
    found = []
    for folder, kind in ((places.LEASES, LEASE), (places.LAUNCHES, LAUNCH)):
        files = folder_sizes(store.storage, folder, 2)
        holders = {f"{folder}/{h.name}": h for h in store.leases.holders(folder, now)}
        # After the holders: one that has come meanwhile is alive.
        live = {path.rpartition(".")[0] for path in store.leases.live(folder, now)}
        for stem, holder in holders.items():
            own = sorted(path for path in files if path.rpartition(".")[0] == stem)
            if stem not in live and own:
                size = sum(files[path][0] for path in own)
                found.append(Candidate(kind, "", tuple(own), size, _gone(holder, kind)))
        for path, (size, changed) in files.items():
            stem = path.rpartition(".")[0]
            if stem not in live and stem not in holders and now - changed > LEFTOVER_S:
                found.append(Candidate(kind, "", (path,), size, "of nobody alive"))
    return found


def _gone(holder: Holder, kind: str) -> str:
    """Return why a lease or launch counts as gone."""
    if kind == LEASE:
        return "of nobody alive"
    host, pid = holder.facts.get("host", "?"), holder.facts.get("pid", "?")
    silent = "" if holder.silent is None else f", silent for {holder.silent:.0f} s"
    return f"{holder.name} of host {host} (pid {pid}{silent}), which is gone"
