"""Results of stages by content key: committed whole or not at all, checked when they are read.

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

Who may write to a store may forge its results: the hashes detect accidents. Signed markers
(`orchestrator.store.marker`) detect forged results too. Either way nothing outside the store is
read, moved, removed or written because of what is in it (`orchestrator.store.places`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from btu.cache_folder import cache_folder
from btu.errors import UserError
from btu.redaction import shown
from btu.result_files import dumps
from orchestrator.store import places, tree
from orchestrator.store.cache import CACHE_BYTES, Cache
from orchestrator.store.lease import Leases, peek
from orchestrator.store.local import LocalStorage
from orchestrator.store.marker import SIGNING_KEY, Marker, Unsigned, dump, parse, signing_key
from orchestrator.store.places import HEAVY
from orchestrator.store.records import Records
from orchestrator.store.storage import open_storage
from orchestrator.store.tree import FileFact
from orchestrator.store.typed import parse as parse_json

# Checked before a sweep: a disk that fills up in the middle of one fails in odd ways.
LEAST_FREE_BYTES = 200_000_000
# Entries from this size are flushed to disk before they are committed. For a small entry flushing
# takes longer than the rest of publishing, a thousand times in a sweep.
DURABLE_BYTES = 1_000_000
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


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


class Store(Records):
    """The results below one folder or URL; `leases` record who computes what.

    location: the folder, or a URL that fsspec can open.
    cache: local folder for copies of an object store's files; None: see `cache_folder`.
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
        # Of a store by URL alone: a local one has no copies.
        self._base = cache
        self._warn = warn
        self._signing = signing_key()
        self._told_unsigned = False

    @cached_property
    def _cache(self) -> Cache:
        base = self._base or cache_folder("stores", self._warn)
        return Cache(base / hashlib.sha256(self.location.encode()).hexdigest()[:16])

    def prepare(self, needed_bytes: int = LEAST_FREE_BYTES) -> None:
        """Create the folders, and check that they are writable and have `needed_bytes` free.

        Raises:
            UserError: they are not writable, or have too little space.
        """
        probe, text = places.temporary(f"probe-{uuid.uuid4().hex}"), b"written by the launch check"
        try:
            if self.storage.local:
                for folder in places.FOLDERS:
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
        """Return the keys of all committed entries, from one listing.

        Where markers have to be signed, each is read.
        """
        return self._signed(self._keys(places.JSON))

    def dropped(self) -> set[str]:
        """Return the keys of dropped entries, which keep only their record."""
        return self._signed(self._keys(places.DROPPED)) - self.committed()

    def is_committed(self, key: str) -> bool:
        """Return whether a marker exists; `marker` checks that it is valid."""
        if not self.storage.exists(places.marker(key)):
            return False
        return self._signing is None or self.marker(key) is not None

    def marker(self, key: str, *, dropped: bool = False) -> Marker | None:
        """Return the marker of an entry, or None.

        An invalid marker is set aside with a warning and counts as missing. One that is not signed
        counts as missing too, where BTU_STORE_SIGNING_KEY is set, but stays where it is.

        dropped: return the marker of a dropped entry too.
        """
        for path, is_dropped in _paths(key)[: 2 if dropped else 1]:
            data = peek(self.storage, path)
            if data is not None:
                try:
                    return parse(key, data, dropped=is_dropped, signed_with=self._signing)
                except Unsigned as state:
                    self._tell_unsigned(key, state)
                except ValueError as error:
                    self.set_aside(key, str(error))
        return None

    def markers(self, *, unsigned: bool = False) -> list[Marker]:
        """Return all valid markers, including those of dropped entries, sorted by key.

        unsigned: those too that are not signed and therefore count as missing.
        """
        found = self._of_all(lambda key: self._read(key, unsigned=unsigned), self.listed())
        return [marker for marker in found if marker is not None]

    def listed(self) -> list[str]:
        """Return the keys of all markers, signed or not, sorted."""
        return sorted(self._keys(places.JSON) | self._keys(places.DROPPED))

    def unsigned(self) -> dict[str, str]:
        """Return what is wrong with the signature of each entry that is not signed, by key.

        Empty where BTU_STORE_SIGNING_KEY is not set.
        """
        keys = [] if self._signing is None else self.listed()
        states = self._of_all(self._signature, keys)
        return {key: state for key, state in zip(keys, states, strict=True) if state}

    def sign(self, key: str) -> str | None:
        """Sign an entry with BTU_STORE_SIGNING_KEY; return what is wrong with its files, if any.

        What is wrong is not signed.
        """
        marker = self._read(key, unsigned=True)
        if marker is None:
            return "it has no valid marker"
        problem = self._check(marker)
        if problem is None:
            path = places.dropped(key) if marker.dropped else places.marker(key)
            self.storage.write(path, dump(marker, self._signing))
        return problem

    def _keys(self, ending: str) -> set[str]:
        names = self.storage.names(places.MARKERS)
        return places.keys_of(names, ending)

    def _signed(self, keys: set[str]) -> set[str]:
        if self._signing is None:
            return keys
        return keys - self.unsigned().keys()

    def _signature(self, key: str) -> str | None:
        """Return what is wrong with an entry's signature; None if nothing is."""
        for path, is_dropped in _paths(key):
            data = peek(self.storage, path)
            if data is not None:
                with suppress(ValueError):  # an invalid marker, which is set aside when it is read
                    try:
                        parse(key, data, dropped=is_dropped, signed_with=self._signing)
                    except Unsigned as state:
                        return str(state)
                return None
        return None

    def _read(self, key: str, *, unsigned: bool) -> Marker | None:
        """Return the marker of an entry, dropped or not. unsigned: it need not be signed."""
        if unsigned:
            for path, is_dropped in _paths(key):
                data = peek(self.storage, path)
                with suppress(ValueError):
                    if data is not None:
                        return parse(key, data, dropped=is_dropped)
        return self.marker(key, dropped=True)

    def _of_all(self, call: Callable[[str], _T], keys: Iterable[str]) -> list[_T]:
        """Return what a function returns for each key."""
        if self.storage.local:
            return [call(key) for key in keys]
        # An object store answers slowly, but serves many requests at once.
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(call, keys))

    def _tell_unsigned(self, key: str, state: Unsigned) -> None:
        if not self._told_unsigned:
            self._told_unsigned = True
            self._warn(
                f"The stored result {key} is {state}, and {SIGNING_KEY} is set: results without "
                "its signature count as missing and stay where they are. `btu store verify` names "
                "them, `btu store sign` signs them."
            )

    def workspace(self, key: str) -> Path:
        """Return a new local folder for the files of one attempt."""
        return self.storage.workspace(places.entry(key, uuid.uuid4().hex))

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
                made = replace(made, files=self._facts(folder))
                durable = made.bytes >= DURABLE_BYTES
                self.storage.upload(folder, made.folder, durable=durable)
            while standing is None:
                content = dump(made, self._signing)
                if self.storage.create(places.marker(key), content, durable=durable):
                    standing = made
                else:
                    standing = self.marker(key)
                    if standing is None and self._signature(key):
                        self.set_aside(key, "a signed one takes its place", "not signed")
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
            old = peek(self.storage, places.dropped(key))
            if old is not None:
                self.storage.remove(places.dropped(key))
                with suppress(ValueError):
                    self.storage.remove(parse(key, old, dropped=True).folder)
        return standing

    def discard(self, folder: Path) -> None:
        """Remove a folder from `workspace`, unless it was published."""
        if self.storage.local:
            key, attempt = folder.parent.name, folder.name
            standing = peek(self.storage, places.marker(key))
            if standing is None or attempt.encode() not in standing:
                with suppress(OSError):
                    self.storage.remove(places.entry(key, attempt))
                self.storage.prune(places.attempts(key))
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
        if isinstance(self.storage, LocalStorage):
            with suppress(FileNotFoundError):
                if self._differs(self.storage, marker, light=light) is None:
                    return self.storage.download(marker.folder, (), self.storage.root)
            raise self._damaged(marker)
        files = {n: f for n, f in marker.files.items() if not (light and n.startswith(HEAVY))}
        copies = self._cache.storage
        for _ in range(2):
            with suppress(FileNotFoundError):
                self._cache.use(marker.folder, {n: fact.size for n, fact in files.items()})
                folder = self.storage.download(marker.folder, files, copies.root)
                if self._differs(copies, marker, light=light) is None:
                    return folder
            # The local copy may be damaged: the second try fetches a new one.
            copies.remove(marker.folder)
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
        data = peek(self.storage, places.below(marker.folder, name))
        if data is None or hashlib.sha256(data).hexdigest() != marker.files[name].sha256:
            raise self._damaged(marker)
        try:
            return parse_json(data)
        except ValueError as error:
            self.set_aside(key, f"{name} is no JSON")
            raise Damaged(key, f"{name} is no JSON") from error

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
            self.storage.write(places.dropped(key), dump(left, self._signing))
            self.storage.remove(places.marker(key))
        freed = 0
        for found in list(self.storage.walk(marker.folder)):
            if found.path.removeprefix(f"{marker.folder}/") not in kept:
                self.storage.remove(found.path)
                self.storage.prune(places.above(found.path))
                freed += found.bytes
        return freed

    def set_aside(self, key: str, reason: str, state: str = "damaged") -> None:
        """Take an entry out of use: remove its marker, then move its files to ``damaged/``.

        key: of the entry.
        reason: why.
        state: what it is, for the warning.
        """
        attempts = []
        for path, is_dropped in _paths(key):
            data = peek(self.storage, path)
            if data is not None:
                with suppress(ValueError):
                    attempts.append(parse(key, data, dropped=is_dropped).attempt)
                self.storage.remove(path)
        # Without a valid marker the attempt is unknown: gc removes all attempts.
        for attempt in attempts or [uuid.uuid4().hex]:
            with suppress(OSError):
                self.storage.move(places.entry(key, attempt), places.damaged(key, attempt))
                self.storage.write(places.reason(key, attempt), reason.encode())
        self._warn(
            f"The stored result {key} is {state} ({reason}); it was set aside in "
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
        if isinstance(self.storage, LocalStorage):
            try:
                return self._differs(self.storage, marker, remembered=False)
            except FileNotFoundError as error:
                return f"{error.filename} was removed while it was read"
        for name, fact in marker.files.items():
            try:
                found = FileFact(*self.storage.digest(places.below(marker.folder, name)))
            except FileNotFoundError:
                return f"{name} is missing"
            if found.size != fact.size:
                return f"{name} has {found.size} bytes, not {fact.size}"
            if found != fact:
                return f"{name} has other content"
        return None

    def _differs(
        self, copies: LocalStorage, marker: Marker, *, light: bool = False, remembered: bool = True
    ) -> str | None:
        """Return how the local files of an entry differ from its marker; None if they do not.

        copies: where they are.
        marker: of the entry.
        light: leave out the files in ``model/``.
        remembered: do not read unchanged files again that this process has read.
        """
        try:
            folder = copies.open_folder(marker.folder)
        except FileNotFoundError:
            names = [n for n in marker.files if not (light and n.startswith(HEAVY))]
            return f"{min(names)} is missing" if names else None
        except places.Outside:
            # A link of the whole folder is for the user to mend: no result is damaged.
            os.close(copies.open_folder(places.ENTRIES))
            return "its folder is a symbolic link"
        try:
            # What an interrupted drop left is no damage.
            return tree.difference(
                folder,
                marker.files,
                skip=HEAVY if light else None,
                more=marker.dropped,
                remembered=remembered,
            )
        finally:
            os.close(folder)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[tuple[str, str]]:
        """Hash every file. Set damaged entries aside and return their keys and reasons.

        progress: called with the number of entries verified, and of all entries.
        """
        damaged = []
        keys = self.listed()
        for done, key in enumerate(keys, 1):
            before = self._contents(key)
            problem = None
            for data, is_dropped in before[:1]:
                try:
                    problem = self._check(parse(key, data, dropped=is_dropped))
                except ValueError as error:
                    problem = str(error)
            # A process that removes the entry at this moment removes its marker first.
            if problem and before[0] in self._contents(key):
                self.set_aside(key, problem)
                damaged.append((key, problem))
            if progress:
                progress(done, len(keys))
        return damaged

    def _contents(self, key: str) -> list[tuple[bytes, bool]]:
        """Return the content of an entry's markers, and whether each is of a dropped entry."""
        found = ((peek(self.storage, path), is_dropped) for path, is_dropped in _paths(key))
        return [(data, is_dropped) for data, is_dropped in found if data is not None]

    def _facts(self, folder: Path) -> dict[str, FileFact]:
        """Return size and hash of the files of an attempt, whose folder `workspace` made."""
        if isinstance(self.storage, LocalStorage):
            opened = self.storage.open_folder(places.entry(folder.parent.name, folder.name))
        else:
            opened = os.open(folder, tree.FOLDER)
        try:
            return tree.facts_of(opened)
        finally:
            os.close(opened)

    def _abandon(self, made: Marker, folder: Path) -> None:
        """Remove the local folder of an attempt, and its upload unless that is the entry."""
        self.discard(folder)
        if not self.storage.local:
            standing = self.marker(made.key)
            if standing is None or standing.attempt != made.attempt:
                self.storage.remove(made.folder)


def _paths(key: str) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Return the paths of an entry's markers, and whether each is that of a dropped entry."""
    return (places.marker(key), False), (places.dropped(key), True)
