"""Results of stages by content key: committed whole or not there, checked when they are read.

::

    markers/<key>.json            committed: every file of the entry with its size and SHA-256
    markers/<key>.dropped.json    the record is still there, the big files are not
    entries/<key>/<attempt>/      files
    leases/<key>.json             somebody is making it
    failed/<key>.json             why its last run failed
    damaged/<key>-<attempt>/      files that did not match their marker
    launches/<id>.json, <id>.beat what running launches need
    timings/<id>.json             what stages took

The marker is written last and exclusively, so that of two publishers one wins, whatever leases
say. Leases only save work: losing one is harmless.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache as cached
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from btu.errors import UserError
from orchestrator.storage import TEMPORARY, open_storage

# The folder of an entry whose files are large and can be done without once all have read them.
HEAVY = "model/"
# A full disk fails in odd ways in the middle of a sweep.
LEAST_FREE_BYTES = 200_000_000
HEARTBEAT_S = 5.0
# A lease whose content has not changed for so long is nobody's any more.
TTL_S = 30.0
# Unfinished files of this age are nobody's any more. Clocks of machines differ by less.
LEFTOVER_S = 3600.0
DROPPED = ".dropped.json"
_FOLDERS = ("markers", "entries", "leases", "failed", "damaged", "launches", "timings")
_log = logging.getLogger(__name__)
# SHA-256 by path, mtime in ns and size, so that a process hashes a model once.
_hashes: dict[tuple[str, int, int], str] = {}


class Damaged(Exception):  # noqa: N818 - it is a state of the entry
    """A stored result did not match its marker. It was set aside and now counts as missing."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"the stored result {key} was damaged ({reason}) and was set aside")
        self.key, self.reason = key, reason


class Missing(Exception):  # noqa: N818
    """There is no such result."""

    def __init__(self, key: str) -> None:
        super().__init__(f"there is no stored result {key}")
        self.key = key


class FileFact(NamedTuple):
    """size: bytes. sha256: hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """What says that an entry is committed.

    name: the stage. files: by path below the entry. info: small facts, JSON. committed: Unix time
    in seconds. dropped: only the files in `files` are left of it.
    """

    key: str
    attempt: str
    name: str
    files: Mapping[str, FileFact]
    info: Mapping[str, Any]
    committed: float
    dropped: bool = False

    @property
    def folder(self) -> str:
        """Where the files are, below the root of the store."""
        return f"entries/{self.key}/{self.attempt}"

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(fact.size for fact in self.files.values())


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


class Store:
    """The results below one folder or URL.

    cache: where files of an object store are kept on this machine. warn: called with a sentence
    when something is set aside. clock: monotonic seconds.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        cache: Path | None = None,
        warn: Callable[[str], None] = _log.warning,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage = open_storage(location)
        self.location = self.storage.location
        base = cache or Path(tempfile.gettempdir()) / f"btu-cache-{os.getuid()}"
        self._cache = base / hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._warn = warn
        self._clock = clock
        # When this process first saw the content that a heartbeat file has.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def prepare(self, needed_bytes: int = LEAST_FREE_BYTES) -> None:
        """Create the folders and check that they can be written and have `needed_bytes` free.

        Raises:
            UserError: they cannot, or have not.
        """
        probe, text = f"{TEMPORARY}/probe-{uuid.uuid4().hex}", b"written by the launch check"
        try:
            if self.storage.local:
                for folder in _FOLDERS:
                    self.storage.workspace(folder)
            self.storage.write(probe, text)
            intact = self.storage.read(probe) == text
            self.storage.remove(probe)
            free = self.storage.free_bytes()
        # Each client of an object store has errors of its own.
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"output folder {self.location} cannot be written ({reason}); set output=FOLDER "
                "to one that can."
            ) from error
        if not intact:
            raise UserError(
                f"output folder {self.location} gives back other bytes than were written; set "
                "output=FOLDER to a sound one."
            )
        if free is not None and free < needed_bytes:
            raise UserError(
                f"output folder {self.location} has {free / 1e6:.0f} MB free, a sweep needs "
                f"{needed_bytes / 1e6:.0f} MB; free some (btu store gc), or set output=FOLDER."
            )

    def exists(self) -> bool:
        """Return whether there is anything in the store."""
        return bool(self.storage.names(""))

    # Entries -----------------------------------------------------------------------------------

    def committed(self) -> set[str]:
        """Return the keys of all committed entries, from one listing."""
        names = self.storage.names("markers")
        return {_stem(n) for n in names if n.endswith(".json") and not n.endswith(DROPPED)}

    def dropped(self) -> set[str]:
        """Return the keys of which only the record is left."""
        names = set(self.storage.names("markers"))
        dropped = {n.removesuffix(DROPPED) for n in names if n.endswith(DROPPED)}
        return {key for key in dropped if f"{key}.json" not in names}

    def is_committed(self, key: str) -> bool:
        """Return whether there is a marker. Whether it is valid, `marker` says."""
        return self.storage.exists(_marker(key))

    def marker(self, key: str, *, dropped: bool = False) -> Marker | None:
        """Return the marker, None if there is none; with `dropped`, that of a dropped entry too.

        An invalid one is set aside with a warning and counts as missing.
        """
        for path in (_marker(key), _dropped(key)) if dropped else (_marker(key),):
            data = self._peek(path)
            if data is not None:
                try:
                    return _parse_marker(key, data)
                except ValueError as error:
                    self.set_aside(key, str(error))
        return None

    def markers(self) -> list[Marker]:
        """Return all valid markers, by key, with those of dropped entries."""
        keys = sorted(self.committed() | self.dropped())
        # An object store answers slowly, but many at once.
        with ThreadPoolExecutor(1 if self.storage.local else 16) as pool:
            found = pool.map(lambda key: self.marker(key, dropped=True), keys)
            return [marker for marker in found if marker is not None]

    def begin(self, key: str) -> Path:
        """Return a new local folder for the files of one attempt."""
        return self.storage.workspace(f"entries/{key}/{uuid.uuid4().hex}")

    def publish(self, key: str, folder: Path, name: str, info: Mapping[str, Any]) -> Marker:
        """Commit what was written to a folder of `begin`, and return the marker that stands.

        A valid entry that is there already stays, and the folder is discarded. When writing
        breaks off, nothing is committed, the folder is discarded and the error escapes.
        """
        made = Marker(key, folder.name, name, {}, json.loads(dumps(info)), time.time())
        standing = None
        try:
            standing = self.marker(key)
            if standing is None:
                made = replace(made, files=_facts(folder))
                self.storage.upload(folder, made.folder)
            while standing is None:
                if self.storage.create(_marker(key), _dump_marker(made)):
                    standing = made
                else:
                    standing = self.marker(key)
        except BaseException:
            # Broken off after it came into place, it stands. If even that cannot be found out,
            # the files are left to gc.
            with suppress(Exception):
                self._abandon(made, folder)
            raise
        # It is committed: what is stale now is only untidy, and `failed` and `dropped` know it.
        with suppress(Exception):
            if standing.attempt != made.attempt or not self.storage.local:
                self._abandon(made, folder)
            self.clear_failure(key)
            old = self._peek(_dropped(key))
            if old is not None:
                self.storage.remove(_dropped(key))
                with suppress(ValueError):
                    self.storage.remove(_parse_marker(key, old).folder)
        return standing

    def discard(self, folder: Path) -> None:
        """Remove a folder of `begin`, unless it was published after all."""
        if self.storage.local:
            standing = self._peek(_marker(folder.parent.name))
            if standing is not None and folder.name.encode() in standing:
                return
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()

    def fetch(self, key: str, *, light: bool = False) -> Path:
        """Return a local folder with the entry's files, each checked for size and SHA-256.

        light: without those in ``model/``, which a dropped entry still has.

        Raises:
            Missing: there is no such entry, or it was removed meanwhile.
            Damaged: a file is missing or differs; the entry was set aside.
        """
        marker = self.marker(key, dropped=light)
        if marker is None:
            raise Missing(key)
        files = {n: f for n, f in marker.files.items() if not (light and n.startswith(HEAVY))}
        for _ in range(2):
            try:
                folder = self.storage.download(marker.folder, files, self._cache)
                if all(_fact(folder / name) == fact for name, fact in files.items()):
                    return folder
            except FileNotFoundError:
                pass
            # It may be the copy here that is damaged; the second time it is a new one.
            if not self.storage.local:
                shutil.rmtree(self._cache / marker.folder, ignore_errors=True)
        raise self._damaged(marker)

    def read_json(self, key: str, name: str) -> Any:
        """Return one small JSON file of an entry, committed or dropped, checked as by `fetch`.

        Raises:
            Missing: there is no such entry.
            FileNotFoundError: it has, or after dropping still has, no such file.
            Damaged: the file is missing or differs; the entry was set aside.
        """
        marker = self.marker(key, dropped=True)
        if marker is None:
            raise Missing(key)
        if name not in marker.files:
            raise FileNotFoundError(f"the stored result {key} has no file {name}")
        data = self._peek(f"{marker.folder}/{name}")
        if data is None or hashlib.sha256(data).hexdigest() != marker.files[name].sha256:
            raise self._damaged(marker)
        return json.loads(data)

    def drop(self, key: str, keep: Collection[str] | None = None) -> int:
        """Remove files of an entry that is needed no more; return the bytes freed.

        keep: names of the files that stay. None: all outside ``model/``.
        """
        marker = self.marker(key, dropped=True)
        if marker is None:
            return 0
        kept = dict(marker.files)
        if not marker.dropped:  # otherwise what was perhaps broken off goes on
            stays = (lambda n: not n.startswith(HEAVY)) if keep is None else keep.__contains__
            kept = {name: fact for name, fact in kept.items() if stays(name)}
            left = replace(marker, files=kept, dropped=True)
            self.storage.write(_dropped(key), _dump_marker(left))
            self.storage.remove(_marker(key))
        freed = 0
        for found in list(self.storage.walk(marker.folder)):
            if found.path.removeprefix(f"{marker.folder}/") not in kept:
                self.storage.remove(found.path)
                self.storage.prune(found.path.rpartition("/")[0])
                freed += found.bytes
        return freed

    def set_aside(self, key: str, reason: str) -> None:
        """Take an entry out of use: its marker goes first, its files to ``damaged/``."""
        folders = []
        for path in (_marker(key), _dropped(key)):
            data = self._peek(path)
            if data is not None:
                with suppress(ValueError):
                    folders.append(_parse_marker(key, data).folder)
                self.storage.remove(path)
        # Without a valid marker nobody knows which attempt it was: all are left to gc.
        for folder in folders or [f"entries/{key}/{uuid.uuid4().hex}"]:
            target = f"damaged/{key}-{folder.rpartition('/')[2]}"
            with suppress(OSError):
                self.storage.move(folder, target)
                self.storage.write(f"{target}/reason.txt", reason.encode())
        self._warn(
            f"The stored result {key} is damaged ({reason}); it was set aside in "
            f"{self.location}/damaged and counts as missing."
        )

    def _damaged(self, marker: Marker) -> Exception:
        """Find out what is wrong with an entry that could not be read, and set it aside."""
        problem = self._check(marker)
        if self.marker(marker.key, dropped=marker.dropped) != marker:
            return Missing(marker.key)  # removed or dropped while it was read
        if problem is None:
            place = f"{self.location}/{marker.folder}"
            return OSError(errno.EIO, "read differently twice; check disk and memory", place)
        self.set_aside(marker.key, problem)
        return Damaged(marker.key, problem)

    def _check(self, marker: Marker) -> str | None:
        """Return what is wrong with the files in the store itself, None if nothing is."""
        for name, fact in marker.files.items():
            try:
                found = FileFact(*self.storage.digest(f"{marker.folder}/{name}"))
            except FileNotFoundError:
                return f"{name} is missing"
            if found.size != fact.size:
                return f"{name} has {found.size} bytes, not {fact.size}"
            if found != fact:
                return f"{name} has other content"
        return None

    def _abandon(self, made: Marker, folder: Path) -> None:
        """Remove the local folder of an attempt, and its upload if that did not get to stand."""
        self.discard(folder)
        if not self.storage.local:
            standing = self.marker(made.key)
            if standing is None or standing.attempt != made.attempt:
                self.storage.remove(made.folder)

    def _peek(self, path: str) -> bytes | None:
        try:
            return self.storage.read(path)
        except FileNotFoundError:
            return None

    # Failures and timings ----------------------------------------------------------------------

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Write why a key's run failed, replacing an earlier failure."""
        self.storage.write(f"failed/{key}.json", dumps(record).encode())

    def failure(self, key: str) -> dict[str, Any] | None:
        """Return the last failure of a key that is not committed, if any."""
        data = None if self.is_committed(key) else self._peek(f"failed/{key}.json")
        return None if data is None else loads(data)

    def failed(self) -> set[str]:
        """Return the keys whose last run failed and that are not committed."""
        failed = {_stem(name) for name in self.storage.names("failed")}
        return failed - self.committed() if failed else failed

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the last failure of every key that is not committed, by key."""
        for key in sorted(self.failed()):
            data = self._peek(f"failed/{key}.json")
            if data is not None:
                yield loads(data)

    def clear_failure(self, key: str) -> None:
        """Forget a failure."""
        self.storage.remove(f"failed/{key}.json")

    def add_timings(self, launch_id: str, rows: list[dict[str, Any]]) -> None:
        """Add what stages of a launch took."""
        if rows:
            self.storage.append(f"timings/{launch_id}.json", json.dumps(_plain(rows)))

    def timings(self) -> list[dict[str, Any]]:
        """Return the timings of all launches."""
        rows: list[dict[str, Any]] = []
        for name in self.storage.names("timings"):
            for line in self.storage.lines(f"timings/{name}"):
                with suppress(ValueError):  # cut short by a full disk
                    rows += json.loads(line)
        return rows

    # Leases and launches -----------------------------------------------------------------------

    def lease(self, key: str, owner: str) -> Lease:
        """Return a lease, not acquired yet. `owner` names the launch and the work."""
        return Lease(self, key, owner)

    def held_by_other(self, key: str, owner: str) -> bool:
        """Return whether somebody else is making a key; looks only."""
        path = f"leases/{key}.json"
        data = self._peek(path)
        if data is None:
            self._seen.pop(path, None)
            return False
        return not self._is_stale(path, data, owner)

    def register_launch(self, launch_id: str, sweep_name: str, keys: Iterable[str]) -> None:
        """Say that a launch runs and needs `keys`."""
        facts = _holder(launch_id) | {"sweep": sweep_name, "keys": sorted(keys)}
        self.storage.write(f"launches/{launch_id}.json", json.dumps(facts).encode())

    def heartbeat_launch(self, launch_id: str) -> None:
        """Say that it still runs, every HEARTBEAT_S. Errors are left for the next time."""
        with suppress(Exception):
            self.storage.write(f"launches/{launch_id}.beat", uuid.uuid4().hex.encode())

    def release_launch(self, launch_id: str) -> None:
        """Say that it has ended."""
        self.storage.remove(f"launches/{launch_id}.json")
        self.storage.remove(f"launches/{launch_id}.beat")

    def leases(self, now: float | None = None) -> dict[str, dict[str, Any]]:
        """Return owner, host and the rest of each live lease by key. now: Unix time in s."""
        return {_stem(Path(p).name): facts for p, facts in self._live("leases", now).items()}

    def leased(self) -> set[str]:
        """Return the keys that have a lease, live or stale, from one listing."""
        names = self.storage.names("leases")
        return {_stem(name) for name in names if name.endswith(".json")}

    def in_use(self, now: float | None = None, *, but: str = "") -> set[str]:
        """Return the keys of live launches and of live leases. but: a launch to leave out.

        In doubt they are live: those of another machine until TTL_S after this object first saw
        them, or LEFTOVER_S after their last change.
        """
        found = self._live("launches", now).values()
        launches = [facts for facts in found if facts.get("owner") != but]
        keys = {key for facts in launches for key in facts.get("keys", ())}
        return keys | {k for k, facts in self.leases(now).items() if facts.get("owner") != but}

    def _live(self, folder: str, now: float | None) -> dict[str, dict[str, Any]]:
        now = time.time() if now is None else now
        modified = {found.path: found.modified for found in self.storage.walk(folder)}
        live = {}
        for path in (path for path in modified if path.endswith(".json")):
            beat = path.removesuffix(".json") + ".beat"
            data = self._peek(path)
            if data is None:
                continue
            times = [modified[path], modified.get(beat)]
            age = now - max((t for t in times if t is not None), default=now)
            stale = self._is_stale(path, data + (self._peek(beat) or b""), None, data)
            alive = _is_alive(_facts_of(data))
            if alive or (alive is None and not stale and age <= LEFTOVER_S):
                live[path] = _facts_of(data)
        return live

    def _is_stale(
        self, path: str, content: bytes, owner: str | None, facts: bytes | None = None
    ) -> bool:
        holder = _facts_of(content if facts is None else facts)
        # An earlier attempt of the same work: whoever starts a new one knows that it is dead.
        if owner is not None and holder.get("owner") == owner:
            return True
        if _is_alive(holder) is False:
            return True
        # No clocks are compared between machines: it is our time since we saw it change.
        seen = self._seen.get(path)
        if seen is None or seen[0] != content:
            self._seen[path] = (content, self._clock())
            return False
        return self._clock() - seen[1] >= TTL_S

    # Housekeeping ------------------------------------------------------------------------------

    def usage(self) -> dict[str, Usage]:
        """Return count and bytes by stage, and of "(unfinished)" and "(damaged)" ones."""
        stages = {(marker.key, marker.attempt): marker.name for marker in self.markers()}
        found: dict[str, dict[str, int]] = {}
        for (key, attempt), (size, _) in self._attempts().items():
            stage = stages.get((key, attempt), "(unfinished)")
            found.setdefault(stage, {})[f"{key}/{attempt}"] = size
        for folder, (size, _) in self._sizes("damaged", 2).items():
            found.setdefault("(damaged)", {})[folder] = size
        return {s: Usage(len(sizes), sum(sizes.values())) for s, sizes in sorted(found.items())}

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[tuple[str, str]]:
        """Hash every file; set the damaged entries aside and return their keys and reasons.

        progress: called with the number of entries done and of all.
        """
        damaged = []
        keys = sorted(self.committed() | self.dropped())
        for done, key in enumerate(keys, 1):
            data = self._peek(_marker(key)) or self._peek(_dropped(key))
            try:
                problem = data and self._check(_parse_marker(key, data))
            except ValueError as error:
                problem = str(error)
            # Whoever removes an entry meanwhile takes its marker first.
            if problem and data in (self._peek(_marker(key)), self._peek(_dropped(key))):
                self.set_aside(key, problem)
                damaged.append((key, problem))
            if progress:
                progress(done, len(keys))
        return damaged

    def gc_candidates(
        self,
        *,
        keep: Collection[str] | None = None,
        older_than: float | None = None,
        max_bytes: int | None = None,
        now: float | None = None,
    ) -> list[Candidate]:
        """Return what `gc` may remove, and nothing that is in use.

        Left-overs and stale leases older than LEFTOVER_S always; of the results, never those in
        `keep`, and of the others those that are older than `older_than` seconds and then the
        oldest until all are below `max_bytes`. With `keep` alone, all others.
        """
        now = time.time() if now is None else now
        busy = self.in_use(now)
        markers = sorted(self.markers(), key=lambda marker: marker.committed)
        chosen = self._leftovers({(m.key, m.attempt) for m in markers}, busy, now)
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
            # The marker first: what is left without it is a left-over, not a damaged result.
            paths = (_marker(marker.key), _dropped(marker.key), marker.folder)
            chosen.append(Candidate("result", marker.key, paths, marker.bytes, why))
        return chosen

    def gc(self, candidates: Iterable[Candidate]) -> int:
        """Remove what `gc_candidates` returned unless it has come into use; return the bytes."""
        busy, freed = self.in_use(), 0
        for candidate in candidates:
            if candidate.key in busy:
                continue
            for path in candidate.paths:
                self.storage.remove(path)
            if candidate.key:
                self.storage.prune(f"entries/{candidate.key}")
            freed += candidate.bytes
        return freed

    def _leftovers(
        self, known: set[tuple[str, str]], busy: set[str], now: float
    ) -> list[Candidate]:
        found = []

        def add(kind: str, key: str, path: str, size: int, changed: float, why: str) -> None:
            if now - changed > LEFTOVER_S:
                found.append(Candidate(kind, key, (path,), size, why))

        for (key, attempt), (size, changed) in self._attempts().items():
            if (key, attempt) not in known and key not in busy:
                path = f"entries/{key}/{attempt}".rstrip("/")
                add("left-over", key, path, size, changed, "unfinished")
        for folder, why in (("damaged", "damaged"), (TEMPORARY, "unfinished")):
            for path, (size, changed) in self._sizes(folder, 2).items():
                add("left-over", "", path, size, changed, why)
        for folder in ("leases", "launches"):
            live = {path.rpartition(".")[0] for path in self._live(folder, now)}
            for path, (size, changed) in self._sizes(folder, 2).items():
                if path.rpartition(".")[0] not in live:
                    add("lease", "", path, size, changed, "of nobody alive")
        return found

    def _attempts(self) -> dict[tuple[str, str], tuple[int, float]]:
        sizes = self._sizes("entries", 3)
        return {(p.split("/")[1], "/".join(p.split("/")[2:])): size for p, size in sizes.items()}

    def _sizes(self, folder: str, depth: int) -> dict[str, tuple[int, float]]:
        """Return bytes and last change of what lies below a folder, by paths of that depth."""
        sizes: dict[str, tuple[int, float]] = {}
        for found in self.storage.walk(folder):
            path = "/".join(found.path.split("/")[:depth])
            if path == folder:
                continue
            size, changed = sizes.get(path, (0, 0.0))
            # Where the time is not known, nothing counts as old.
            modified = time.time() if found.modified is None else found.modified
            sizes[path] = (size + found.bytes, max(changed, modified))
        return sizes


class Lease:
    """The right to make one key, kept by a heartbeat. Leaving the context releases it."""

    def __init__(self, store: Store, key: str, owner: str) -> None:
        self.key, self.owner, self.token = key, owner, uuid.uuid4().hex
        self._store = store
        self._path = f"leases/{key}.json"
        self._beat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> bool:
        """Take it if it is free or stale, and start the heartbeat. Does not wait."""
        if self._thread is None or not self._thread.is_alive():
            if not self._take():
                return False
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"lease {self.key}")
            self._thread.start()
        return True

    def beat(self) -> bool:
        """Rewrite the lease once; return whether it is still ours."""
        if not self._is_ours():
            return False
        self._beat += 1
        self._store.storage.write(self._path, self._content())
        return True

    def release(self) -> None:
        """Stop the heartbeat and remove the lease if it is still ours."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(timeout=HEARTBEAT_S)
        self._thread = None
        # What cannot be removed goes stale.
        with suppress(Exception):
            if self._is_ours():
                self._store.storage.remove(self._path)

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            # A full disk or a lost connection must not stop the work, and may pass.
            with suppress(Exception):
                if not self.beat():
                    return

    def _take(self) -> bool:
        store, storage, content = self._store, self._store.storage, self._content()
        held = store._peek(self._path)
        if held is None:
            storage.create(self._path, content)
        elif not store._is_stale(self._path, held, self.owner):
            return False
        else:
            # Only who has the guard may replace a lease, and only the one that it saw stale:
            # otherwise the second of two would replace the fresh lease of the first.
            guard = self._path + ".guard"
            if not storage.create(guard, content):
                guarding = store._peek(guard)
                if guarding is not None and store._is_stale(guard, guarding, self.owner):
                    storage.remove(guard)
                return False
            try:
                if store._peek(self._path) != held:
                    return False
                storage.write(self._path, content)
            finally:
                storage.remove(guard)
        # Some object stores cannot create exclusively, and let a later writer win.
        return self._is_ours()

    def _is_ours(self) -> bool:
        data = self._store._peek(self._path)
        return data is not None and _facts_of(data).get("token") == self.token

    def _content(self) -> bytes:
        facts = _holder(self.owner) | {"token": self.token, "beat": self._beat}
        return json.dumps(facts).encode()


def dumps(record: Mapping[str, Any]) -> str:
    """Return JSON with NaN as null: strict JSON has no NaN."""
    return json.dumps(_plain(record), indent=1, allow_nan=False)


def loads(text: str | bytes) -> dict[str, Any]:
    """Read a record that `dumps` wrote; a metric that is null is NaN again."""
    record: dict[str, Any] = json.loads(text)
    metrics = record.get("metrics", {})
    record["metrics"] = {k: float("nan") if v is None else v for k, v in metrics.items()}
    return record


def read_record(path: Path) -> dict[str, Any]:
    """Read a record from a file; a metric that is null is NaN again."""
    return loads(path.read_text())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    # NumPy's scalars, without importing it.
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def _marker(key: str) -> str:
    return f"markers/{key}.json"


def _dropped(key: str) -> str:
    return f"markers/{key}{DROPPED}"


def _dump_marker(marker: Marker) -> bytes:
    body = asdict(marker)
    return json.dumps({"marker": body, "sha256": _sha256(body)}).encode()


def _parse_marker(key: str, data: bytes) -> Marker:
    """Read a marker file's content. Raises ValueError with a reason."""
    try:
        record = json.loads(data)
        body = record["marker"]
        intact = record["sha256"] == _sha256(body) and body["key"] == key
        files = {name: FileFact(*fact) for name, fact in body["files"].items()}
        marker = Marker(**{**body, "files": files})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its marker is cut short or no marker") from None
    if not intact:
        raise ValueError("its marker was changed")
    return marker


def _stem(name: str) -> str:
    return name.removesuffix(".json")


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _facts(folder: Path) -> dict[str, FileFact]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _fact(path) for path in files}


def _fact(path: Path) -> FileFact:
    facts = path.stat()
    key = (str(path), facts.st_mtime_ns, facts.st_size)
    if key not in _hashes:
        with path.open("rb") as stream:
            _hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileFact(facts.st_size, _hashes[key])


def _facts_of(data: bytes) -> dict[str, Any]:
    """Return what a lease says, nothing if it is no whole JSON object."""
    with suppress(ValueError):
        facts = json.loads(data)
        if isinstance(facts, dict):
            return facts
    return {}


def _holder(owner: str) -> dict[str, Any]:
    pid = os.getpid()
    return {"owner": owner, **_machine(), "pid": pid, "started": _started(pid)}


@cached
def _machine() -> dict[str, str]:
    """Return what makes a process id unique: host, boot and the container's numbering."""
    boot = numbering = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbering = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "numbering": numbering}


def _started(pid: int) -> str | None:
    """Return when a live process started (clock ticks since boot), None if there is none.

    Empty where the system does not say.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie has ended, its parent has only not looked yet. Fields 3 and 22 of proc(5).
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(holder: Mapping[str, Any]) -> bool | None:
    """Return whether a lease's process lives, None if that cannot be seen from here."""
    pid, machine = holder.get("pid"), _machine()
    if not isinstance(pid, int) or pid <= 0 or any(holder.get(k) != machine[k] for k in machine):
        return None
    started = _started(pid)
    if started is None:
        return False
    return None if not started or not holder.get("started") else started == holder["started"]
