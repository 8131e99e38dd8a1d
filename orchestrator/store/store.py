"""Results of stages by content key: committed whole or not at all, verified when they are read.

::

    markers/<key>.json            committed: every file of the entry with its size and SHA-256
    markers/<key>.dropped.json    the record is kept, the large files are not
    entries/<key>/<attempt>/      files
    leases/, launches/            see `orchestrator.store.lease`
    failed/<key>.json             why the last attempt failed
    damaged/<key>-<attempt>/      files that did not match their marker
    timings/<id>.json             seconds that stages took

The marker is written last and exclusively, so that one of two publishers wins, whatever the leases
say. A large entry is flushed to disk before its marker. Small entries are not: after a power cut
some of the last half minute may be found damaged when they are read, and are computed again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from btu.errors import UserError
from btu.redaction import shown
from btu.result_files import dumps, json_value, loads
from orchestrator.store.cache import CACHE_BYTES, Cache
from orchestrator.store.lease import Leases, peek
from orchestrator.store.storage import TEMPORARY, open_storage

# Files of an entry in this folder are large and may be dropped once every reader is done.
HEAVY = "model/"
# Checked before a sweep: a disk that fills up in the middle of one fails in odd ways.
LEAST_FREE_BYTES = 200_000_000
# Entries from this size are flushed to disk before they are committed. For a small entry flushing
# takes longer than the rest of publishing, a thousand times in a sweep.
DURABLE_BYTES = 1_000_000
DROPPED = ".dropped.json"
_FOLDERS = ("markers", "entries", "leases", "failed", "damaged", "launches", "timings")
_log = logging.getLogger(__name__)
# SHA-256 by path, mtime in ns and size, so that a process hashes each model once.
_hashes: dict[tuple[str, int, int], str] = {}


class Damaged(Exception):  # noqa: N818 - it is a state of the entry
    """A stored result did not match its marker. It was set aside and counts as missing."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"the stored result {key} was damaged ({reason}) and was set aside")
        self.key, self.reason = key, reason


class Missing(Exception):  # noqa: N818
    """The store has no such result."""

    def __init__(self, key: str) -> None:
        super().__init__(f"there is no stored result {key}")
        self.key = key


class FileFact(NamedTuple):
    """size: bytes. sha256: hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """The commit record of an entry.

    key: the stage's key.
    attempt: names the folder of its files.
    name: the stage's name.
    files: size and hash by path below the entry.
    info: small facts, as JSON.
    committed: Unix time in seconds.
    dropped: whether only the files in `files` are left.
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
        """The folder of the files, relative to the root of the store."""
        return f"entries/{self.key}/{self.attempt}"

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that belongs to the entry, in the order of removal.

        The marker comes first: files without a marker are left-overs, not a damaged result.
        """
        return (_marker(self.key), _dropped(self.key), self.folder)

    @property
    def bytes(self) -> int:
        """The total size of the files."""
        return sum(fact.size for fact in self.files.values())


class Store:
    """The results below one folder or URL; `leases` record who computes what.

    location: the folder, or a URL that fsspec can open.
    cache: local folder for copies of an object store's files.
    warn: called with a sentence when something is set aside.
    clock: returns monotonic seconds.
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
        self.leases = Leases(self.storage, clock)
        self.location = self.storage.location
        base = cache or Path(tempfile.gettempdir()) / f"btu-cache-{os.getuid()}"
        self._cache = Cache(base / hashlib.sha256(self.location.encode()).hexdigest()[:16])
        self._warn = warn

    def prepare(self, needed_bytes: int = LEAST_FREE_BYTES) -> None:
        """Create the folders, and check that they are writable and have `needed_bytes` free.

        Raises:
            UserError: they are not writable, or have too little space.
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
        # Each object-store client raises its own exceptions.
        except Exception as error:
            reason = shown(str(getattr(error, "strerror", None) or error))
            raise UserError(
                f"output folder {self.location} cannot be written ({reason}); set output=FOLDER "
                "to one that can."
            ) from error
        if not intact:
            raise UserError(
                f"output folder {self.location} returns other bytes than were written; set "
                "output=FOLDER to a working one."
            )
        if free is not None and free < needed_bytes:
            raise UserError(
                f"output folder {self.location} has {free / 1e6:.0f} MB free, a sweep needs "
                f"{needed_bytes / 1e6:.0f} MB; free some (btu store gc), or set output=FOLDER."
            )

    def exists(self) -> bool:
        """Return whether the store has any content."""
        return bool(self.storage.names(""))

    # Entries -----------------------------------------------------------------------------------

    def committed(self) -> set[str]:
        """Return the keys of all committed entries, from one listing."""
        names = self.storage.names("markers")
        return {_stem(n) for n in names if n.endswith(".json") and not n.endswith(DROPPED)}

    def dropped(self) -> set[str]:
        """Return the keys of dropped entries, which keep only their record."""
        names = set(self.storage.names("markers"))
        dropped = {n.removesuffix(DROPPED) for n in names if n.endswith(DROPPED)}
        return {key for key in dropped if f"{key}.json" not in names}

    def is_committed(self, key: str) -> bool:
        """Return whether a marker exists; `marker` checks that it is valid."""
        return self.storage.exists(_marker(key))

    def marker(self, key: str, *, dropped: bool = False) -> Marker | None:
        """Return the marker of an entry, or None.

        An invalid marker is set aside with a warning and counts as missing.

        dropped: return the marker of a dropped entry too.
        """
        for path in (_marker(key), _dropped(key)) if dropped else (_marker(key),):
            data = peek(self.storage, path)
            if data is not None:
                try:
                    return _parse_marker(key, data)
                except ValueError as error:
                    self.set_aside(key, str(error))
        return None

    def markers(self) -> list[Marker]:
        """Return all valid markers, including those of dropped entries, sorted by key."""
        keys = sorted(self.committed() | self.dropped())
        # An object store answers slowly, but serves many requests at once.
        with ThreadPoolExecutor(1 if self.storage.local else 16) as pool:
            found = pool.map(lambda key: self.marker(key, dropped=True), keys)
            return [marker for marker in found if marker is not None]

    def workspace(self, key: str) -> Path:
        """Return a new local folder for the files of one attempt."""
        return self.storage.workspace(f"entries/{key}/{uuid.uuid4().hex}")

    def publish(self, key: str, folder: Path, name: str, info: Mapping[str, Any]) -> Marker:
        """Commit the content of a folder from `workspace`. Return the entry's valid marker.

        A valid entry that exists already is kept, and the folder is discarded. If writing fails,
        nothing is committed, the folder is discarded and the error propagates.

        key: the stage's key.
        folder: contains the files.
        name: the stage's name.
        info: small facts, kept in the marker.
        """
        made = Marker(key, folder.name, name, {}, json.loads(dumps(info)), time.time())
        standing = None
        try:
            standing = self.marker(key)
            if standing is None:
                made = replace(made, files=_facts(folder))
                durable = made.bytes >= DURABLE_BYTES
                self.storage.upload(folder, made.folder, durable=durable)
            while standing is None:
                if self.storage.create(_marker(key), _dump_marker(made), durable=durable):
                    standing = made
                else:
                    standing = self.marker(key)
        except BaseException:
            # If the marker was in place before the failure, the entry is valid and stays. If that
            # cannot be determined, gc removes the files later.
            with suppress(Exception):
                self._abandon(made, folder)
            raise
        # The entry is committed. Stale files are harmless: `failed` and `dropped` ignore them.
        with suppress(Exception):
            if standing.attempt != made.attempt or not self.storage.local:
                self._abandon(made, folder)
            self.clear_failure(key)
            old = peek(self.storage, _dropped(key))
            if old is not None:
                self.storage.remove(_dropped(key))
                with suppress(ValueError):
                    self.storage.remove(_parse_marker(key, old).folder)
        return standing

    def discard(self, folder: Path) -> None:
        """Remove a folder from `workspace`, unless it was published."""
        if self.storage.local:
            standing = peek(self.storage, _marker(folder.parent.name))
            if standing is not None and folder.name.encode() in standing:
                return
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()

    def fetch(self, key: str, *, light: bool = False) -> Path:
        """Return a local folder with the entry's files, each verified by size and SHA-256.

        light: leave out the files in ``model/``, so that a dropped entry serves too.

        Raises:
            Missing: there is no such entry, or it was removed in the meantime.
            Damaged: a file is missing or differs; the entry was set aside.
        """
        marker = self.marker(key, dropped=light)
        if marker is None:
            raise Missing(key)
        files = {n: f for n, f in marker.files.items() if not (light and n.startswith(HEAVY))}
        for _ in range(2):
            try:
                if not self.storage.local:
                    self._cache.use(marker.folder, {n: fact.size for n, fact in files.items()})
                folder = self.storage.download(marker.folder, files, self._cache.folder)
                if all(_fact(folder / name) == fact for name, fact in files.items()):
                    return folder
            except FileNotFoundError:
                pass
            # The local copy may be damaged: the second try fetches a new one.
            if not self.storage.local:
                shutil.rmtree(self._cache.folder / marker.folder, ignore_errors=True)
        raise self._damaged(marker)

    def trim_cache(self, max_bytes: int = CACHE_BYTES) -> int:
        """Remove the least recently used local copies (`Cache.trim`); return the bytes removed.

        A local store has no copies.
        """
        return 0 if self.storage.local else self._cache.trim(max_bytes)

    def read_json(self, key: str, name: str) -> Any:
        """Return one small JSON file of an entry, committed or dropped, verified as by `fetch`.

        Raises:
            Missing: there is no such entry.
            FileNotFoundError: the entry has no such file, or no longer has it.
            Damaged: the file is missing or differs; the entry was set aside.
        """
        marker = self.marker(key, dropped=True)
        if marker is None:
            raise Missing(key)
        if name not in marker.files:
            raise FileNotFoundError(f"the stored result {key} has no file {name}")
        data = peek(self.storage, f"{marker.folder}/{name}")
        if data is None or hashlib.sha256(data).hexdigest() != marker.files[name].sha256:
            raise self._damaged(marker)
        return json.loads(data)

    def drop(self, key: str, keep: Collection[str] | None = None) -> int:
        """Drop the large files of an entry that no stage needs any more; return the bytes freed.

        keep: names of the files to keep; None keeps all outside ``model/``.
        """
        marker = self.marker(key, dropped=True)
        if marker is None:
            return 0
        kept = dict(marker.files)
        if not marker.dropped:  # otherwise finish a drop that was interrupted
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
        """Take an entry out of use: remove its marker, then move its files to ``damaged/``."""
        folders = []
        for path in (_marker(key), _dropped(key)):
            data = peek(self.storage, path)
            if data is not None:
                with suppress(ValueError):
                    folders.append(_parse_marker(key, data).folder)
                self.storage.remove(path)
        # Without a valid marker the attempt is unknown: gc removes all attempts.
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
        """Determine what is wrong with an entry that could not be read, and set it aside."""
        problem = self._check(marker)
        if self.marker(marker.key, dropped=marker.dropped) != marker:
            return Missing(marker.key)  # removed or dropped while it was being read
        if problem is None:
            place = f"{self.location}/{marker.folder}"
            return OSError(errno.EIO, "read differently twice; check disk and memory", place)
        self.set_aside(marker.key, problem)
        return Damaged(marker.key, problem)

    def _check(self, marker: Marker) -> str | None:
        """Return what is wrong with the files in the store; None if they are intact."""
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

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[tuple[str, str]]:
        """Hash every file. Set damaged entries aside and return their keys and reasons.

        progress: called with the number of entries verified, and of all entries.
        """
        damaged = []
        keys = sorted(self.committed() | self.dropped())
        for done, key in enumerate(keys, 1):
            data = peek(self.storage, _marker(key)) or peek(self.storage, _dropped(key))
            try:
                problem = data and self._check(_parse_marker(key, data))
            except ValueError as error:
                problem = str(error)
            # A process that removes the entry at this moment removes its marker first.
            now = (peek(self.storage, _marker(key)), peek(self.storage, _dropped(key)))
            if problem and data in now:
                self.set_aside(key, problem)
                damaged.append((key, problem))
            if progress:
                progress(done, len(keys))
        return damaged

    def _abandon(self, made: Marker, folder: Path) -> None:
        """Remove the local folder of an attempt, and its upload unless that is the entry."""
        self.discard(folder)
        if not self.storage.local:
            standing = self.marker(made.key)
            if standing is None or standing.attempt != made.attempt:
                self.storage.remove(made.folder)

    # Failures and timings ----------------------------------------------------------------------

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Write why computing a key failed, replacing an earlier failure.

        Errors of clients name their URL: it is written without its password.
        """
        told = {name: shown(text) for name, text in record.items() if isinstance(text, str)}
        self.storage.write(f"failed/{key}.json", dumps({**record, **told}).encode())

    def failure(self, key: str) -> dict[str, Any] | None:
        """Return the last failure of a key that is not committed, if any."""
        data = None if self.is_committed(key) else peek(self.storage, f"failed/{key}.json")
        return None if data is None else loads(data)

    def failed(self) -> set[str]:
        """Return the keys whose last attempt failed and that are not committed."""
        failed = {_stem(name) for name in self.storage.names("failed")}
        return failed - self.committed() if failed else failed

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the last failure of every key that is not committed, by key."""
        for key in sorted(self.failed()):
            data = peek(self.storage, f"failed/{key}.json")
            if data is not None:
                yield loads(data)

    def clear_failure(self, key: str) -> None:
        """Forget a failure."""
        self.storage.remove(f"failed/{key}.json")

    def add_timings(self, launch_id: str, rows: list[dict[str, Any]]) -> None:
        """Append timings of a launch's stages."""
        if rows:
            self.storage.append(f"timings/{launch_id}.json", json.dumps(json_value(rows)))

    def timings(self) -> list[dict[str, Any]]:
        """Return the timings of all launches."""
        rows: list[dict[str, Any]] = []
        for name in self.storage.names("timings"):
            for line in self.storage.lines(f"timings/{name}"):
                with suppress(ValueError):  # cut short by a full disk
                    rows += json.loads(line)
        return rows


def _marker(key: str) -> str:
    return f"markers/{key}.json"


def _dropped(key: str) -> str:
    return f"markers/{key}{DROPPED}"


def _dump_marker(marker: Marker) -> bytes:
    # Not asdict(): its deep copies would take most of the time.
    body = vars(marker)
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
