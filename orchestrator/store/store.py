"""Results of stages by content key: committed whole or not at all, checked when they are read.

::

    markers/<key>.json            committed: every file of the entry with its size and SHA-256;
                                  on an object store also the contents of the small ones
    markers/<key>.dropped.json    the record is kept, the large files are not
    entries/<key>/<attempt>/      files
    leases/, launches/            see `orchestrator.store.lease`
    failed/<key>.json             why the last attempt failed
    damaged/<key>-<attempt>/      files that did not match their marker
    timings/<id>.json             seconds that stages took

On an object store every request costs a round trip, and often money: a stage makes about ten. So
nobody asks whether a file exists where the next call says so, and what a machine has written or
read once it has in its local cache (`orchestrator.store.cache`), which its workers share.

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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from btu.cache_folder import cache_folder
from btu.errors import UserError
from btu.redaction import shown
from btu.result_files import dumps
from orchestrator.store import places, tree
from orchestrator.store.cache import CACHE_BYTES, Cache
from orchestrator.store.lease import Leases, peek
from orchestrator.store.local import LocalStorage
from orchestrator.store.marker import SIGNING_KEY, Marker, Unsigned, dump, parse, signing_key
from orchestrator.store.packed import pack, separate, unpack
from orchestrator.store.places import HEAVY
from orchestrator.store.records import Look, Records
from orchestrator.store.storage import open_storage
from orchestrator.store.tree import FileFact
from orchestrator.store.typed import parse as parse_json

# Checked before a sweep: a disk that fills up in the middle of one fails in odd ways.
LEAST_FREE_BYTES = 200_000_000
# Entries from this size are flushed to disk before they are committed. For a small entry flushing
# takes longer than the rest of publishing, a thousand times in a sweep.
DURABLE_BYTES = 1_000_000
# How many records are read at once, from a store with many.
_AT_ONCE = 256
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
        # Files that `read_jsons` has read from an object store, with the versions of their markers.
        self._read_before: dict[tuple[str, str], tuple[tuple[Any, ...], bytes]] = {}

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
        names = self.storage.names(places.MARKERS)
        committed = places.keys_of(names, places.JSON)
        keys = self._signed(places.keys_of(names, places.DROPPED) | committed)
        return keys - committed

    def is_committed(self, key: str) -> bool:
        """Return whether a marker exists; `marker` checks that it is valid."""
        if not self.storage.exists(places.marker(key)):
            return False
        return self._signing is None or self.marker(key) is not None

    def look(self, key: str, *, dropped: bool = True) -> Look:
        """Return what the store has of a key now.

        dropped: look for a dropped entry as well.
        """
        paths = [places.marker(key), places.failure(key)]
        paths += [places.dropped(key)] if dropped else []
        found = self.storage.map(lambda path: peek(self.storage, path), paths)
        marker, failure, rest = found[0], found[1], found[2:]
        committed = marker is not None
        if committed and self._signing is not None:
            committed = self.marker(key) is not None
        known = None if committed or failure is None else self._as_failure(key, failure)
        return Look(committed, known, any(data is not None for data in rest))

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
        found = self.storage.map(lambda key: self._read(key, unsigned=unsigned), self.listed())
        return [marker for marker in found if marker is not None]

    def listed(self) -> list[str]:
        """Return the keys of all markers, signed or not, sorted."""
        return sorted(self._keys(places.JSON) | self._keys(places.DROPPED))

    def unsigned(self) -> dict[str, str]:
        """Return what is wrong with the signature of each entry that is not signed, by key.

        Empty where BTU_STORE_SIGNING_KEY is not set.
        """
        keys = [] if self._signing is None else self.listed()
        states = self.storage.map(self._signature, keys)
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

    def publish(
        self,
        key: str,
        folder: Path,
        name: str,
        info: Mapping[str, Any],
        *,
        new: bool = False,
        dropped: bool = False,
    ) -> Marker:
        """Commit the content of a folder from `workspace`. Return the entry's valid marker.

        A valid entry that exists already is kept, and the folder is discarded. If writing fails,
        nothing is committed, the folder is discarded and the error propagates.

        key: the stage's key.
        folder: contains the files.
        name: the stage's name.
        info: small facts, kept in the marker.
        new: the caller has seen under its lease that the store has nothing of the key (`look`), so
            nothing is asked before, and nothing cleaned up after.
        dropped: the entry is one whose large files were dropped; only together with `new`.
        """
        made = Marker(key, folder.name, name, {}, json.loads(dumps(info)), time.time(), dropped)
        path = places.dropped(key) if dropped else places.marker(key)
        standing = None
        try:
            standing = None if new else self.marker(key)
            if standing is None:
                made = replace(made, files=self._facts(folder))
                if self.storage.objects:
                    made = replace(made, small=pack(folder, made.files))
                durable = made.bytes >= DURABLE_BYTES
                self.storage.upload(folder, made.folder, skip=made.small, durable=durable)
            while standing is None:
                content = dump(made, self._signing)
                if self.storage.create(path, content, durable=durable):
                    standing = made
                else:
                    standing = self.marker(key, dropped=dropped)
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
            if standing.attempt != made.attempt:
                self._abandon(made, folder)
            elif not self.storage.local:
                self._keep_copy(made, folder)
            if new:
                return standing
            self.clear_failure(key)
            old = peek(self.storage, places.dropped(key))
            if old is not None:
                self.storage.remove_files(places.dropped(key))
                with suppress(ValueError):
                    self.storage.remove(parse(key, old, dropped=True).folder)
        return standing

    def _keep_copy(self, marker: Marker, folder: Path) -> None:
        """Keep the files of a published entry on this machine; a full disk is no error here."""
        try:
            self._cache.adopt(folder, marker.folder, marker.bytes)
            self._note(marker)
        except OSError as error:
            _log.debug("no copy of %s is kept: %s", marker.key, error)
        finally:
            self.discard(folder)

    def _note(self, marker: Marker) -> None:
        if not marker.dropped:
            self._cache.note(marker.key, dump(replace(marker, small={}), self._signing))

    def discard(self, folder: Path) -> None:
        """Remove a folder from `workspace`, unless it was published."""
        if self.storage.local:
            key, attempt = folder.parent.name, folder.name
            standing = (peek(self.storage, path) or b"" for path, _ in _paths(key))
            if not any(attempt.encode() in marker for marker in standing):
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
            unpack(self.storage, marker, light=light)  # a copy of an object store
            with suppress(FileNotFoundError):
                if self._differs(self.storage, marker, light=light) is None:
                    return self.storage.download(marker.folder, (), self.storage.root)
            raise self._damaged(marker)
        files = _wanted(separate(marker), light)
        copies = self._cache.storage
        with self._cache.locked(marker.folder):
            for _ in range(2):
                with suppress(FileNotFoundError):
                    self._use(marker, light)
                    folder = self.storage.download(marker.folder, files, copies.root)
                    unpack(copies, marker, light=light)
                    if self._differs(copies, marker, light=light) is None:
                        self._note(marker)
                        return folder
                # The local copy may be damaged: the second try fetches a new one.
                copies.remove(marker.folder)
        raise self._damaged(marker)

    def input(self, key: str, *, light: bool = False) -> Path:
        """Return what `fetch` does, without asking an object store if this machine has a copy.

        The copy is as good as the entry: its files are verified by the hashes in its marker, which
        this machine has read or written. It serves even if the entry was removed since.
        """
        noted = None if self.storage.local else self._cache.noted(key)
        if noted is not None:
            with suppress(ValueError, Unsigned, FileNotFoundError):
                marker = parse(key, noted, dropped=False, signed_with=self._signing)
                if self._differs(self._cache.storage, marker, light=light) is None:
                    self._use(marker, light)
                    return self._cache.folder / marker.folder
        return self.fetch(key, light=light)

    def _use(self, marker: Marker, light: bool) -> None:
        sizes = {name: fact.size for name, fact in _wanted(marker.files, light).items()}
        self._cache.use(marker.folder, sizes)

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
        return self._parsed(key, name, self._read_file(key, name))

    def read_jsons(self, keys: Collection[str], name: str) -> Iterator[tuple[str, Any]]:
        """Yield one small JSON file of each committed entry, as `read_json` returns it.

        Entries that are missing, damaged or without the file are left out. Of an object store only
        what has changed since this object last read it is read again.
        """
        versions = self._versions()
        wanted = [key for key in keys if key in versions]

        def read(key: str) -> tuple[str, Any] | None:
            version, before = versions[key], self._read_before.get((key, name))
            try:
                if before is not None and before[0] == version:
                    return key, parse_json(before[1])
                data = self._read_file(key, name)
                value = self._parsed(key, name, data)
            except (Damaged, Missing, FileNotFoundError):
                return None
            if version:
                self._read_before[key, name] = version, data
            return key, value

        for start in range(0, len(wanted), _AT_ONCE):
            found = self.storage.map(read, wanted[start : start + _AT_ONCE])
            yield from (item for item in found if item is not None)

    def _versions(self) -> dict[str, tuple[Any, ...]]:
        """Return the version of each committed entry's marker, by key; () where it has none."""
        if self.storage.local:
            return dict.fromkeys(self._keys(places.JSON), ())
        found = {}
        for path, size, modified, version in self.storage.walk(places.MARKERS):
            key = places.key_of(path.rpartition("/")[2])
            if key is not None:
                known = bool(version) or modified is not None
                found[key] = (size, modified, version) if known else ()
        return found

    def _read_file(self, key: str, name: str) -> bytes:
        """Return the verified content of a small file. Errors are those of `read_json`."""
        marker = self.marker(key, dropped=True)
        if marker is None:
            raise Missing(key)
        if name not in marker.files:
            raise FileNotFoundError(f"the stored result {key} has no file {name}")
        if name in marker.small:
            return marker.small[name]
        data = peek(self.storage, places.below(marker.folder, name))
        if data is None or hashlib.sha256(data).hexdigest() != marker.files[name].sha256:
            raise self._damaged(marker)
        return data

    def _parsed(self, key: str, name: str, data: bytes) -> Any:
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
        kept, large = dict(marker.files), separate(marker)
        if not marker.dropped:  # otherwise finish a drop that was interrupted
            stays = (lambda n: not n.startswith(HEAVY)) if keep is None else keep.__contains__
            kept = {name: fact for name, fact in kept.items() if stays(name)}
            small = {name: data for name, data in marker.small.items() if name in kept}
            left = replace(marker, files=kept, small=small, dropped=True)
            self.storage.write(places.dropped(key), dump(left, self._signing))
            self.storage.remove_files(places.marker(key))
        freed = 0
        if self.storage.objects and not marker.dropped:
            # Its objects are known: a listing would be a request more.
            there = {places.below(marker.folder, name): fact.size for name, fact in large.items()}
            freed = sum(len(data) for name, data in marker.small.items() if name not in kept)
        else:
            there = {found.path: found.bytes for found in self.storage.walk(marker.folder)}
        gone = {p: n for p, n in there.items() if p.removeprefix(f"{marker.folder}/") not in kept}
        if gone:
            self._remove_all(gone)
        return freed + sum(gone.values())

    def _remove_all(self, paths: Collection[str]) -> None:
        """Remove files, and the folders that are empty then."""
        self.storage.remove_files(*paths)
        for path in paths if not self.storage.objects else ():
            self.storage.prune(places.above(path))

    def set_aside(self, key: str, reason: str, state: str = "damaged") -> None:
        """Take an entry out of use: remove its marker, then move its files to ``damaged/``.

        key: of the entry.
        reason: why.
        state: what it is, for the warning.
        """
        attempts: dict[str, Mapping[str, bytes]] = {}
        for path, is_dropped in _paths(key):
            data = peek(self.storage, path)
            if data is not None:
                # Without a valid marker the attempt is unknown: gc removes all attempts.
                attempt, small = uuid.uuid4().hex, {"marker.json": data}
                with suppress(ValueError):
                    marker = parse(key, data, dropped=is_dropped)
                    attempt, small = marker.attempt, {**marker.small}
                attempts[attempt] = small if self.storage.objects else {}
                self.storage.remove_files(path)
        for attempt, packed in (attempts or {uuid.uuid4().hex: {}}).items():
            with suppress(OSError):
                self.storage.move(places.entry(key, attempt), places.damaged(key, attempt))
                for name, data in packed.items():
                    self.storage.write(places.below(places.damaged(key, attempt), name), data)
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
                unpack(self.storage, marker)
                return self._differs(self.storage, marker, remembered=False)
            except FileNotFoundError as error:
                return f"{error.filename} was removed while it was read"
        for name, fact in separate(marker).items():  # `parse` has checked the others
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
            standing = self.marker(made.key, dropped=made.dropped)
            if standing is None or standing.attempt != made.attempt:
                self.storage.remove(made.folder)


def _wanted(files: Mapping[str, FileFact], light: bool) -> dict[str, FileFact]:
    """Return the files that a fetch brings. light: without those in ``model/``."""
    return {n: fact for n, fact in files.items() if not (light and n.startswith(HEAVY))}


def _paths(key: str) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Return the paths of an entry's markers, and whether each is that of a dropped entry."""
    return (places.marker(key), False), (places.dropped(key), True)
