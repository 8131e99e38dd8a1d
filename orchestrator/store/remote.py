"""Storage on an object store, or on anything else that fsspec can open."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from btu.errors import UserError
from btu.redaction import shown, shown_url
from orchestrator.store import places
from orchestrator.store.local import LocalStorage
from orchestrator.store.primitives import Found, digest, lines_of

# Prefix of local folders whose content is uploaded later; the process id follows in the name.
_WORKSPACE = "btu-workspace-"
_ABANDONED_AFTER = 24 * 3600.0
# A PUT to these is atomic. Elsewhere a file is written under another name and moved into place.
_OBJECT_STORES = {"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"}
# How many requests of a process are under way at once. S3 serves thousands; each takes a thread.
_AT_ONCE = 64
_T = TypeVar("_T")
_S = TypeVar("_S")


class RemoteStorage:
    """A URL that fsspec can open. Listings are never cached: other processes write too."""

    local = False

    def __init__(self, url: str) -> None:
        try:
            core: Any = importlib.import_module("fsspec.core")
            self._fs, root = core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True, **_options(url)
            )
        except ImportError as error:
            package = re.search(r"[Ii]nstall (\S+)", str(error))
            name = package[1] if package else (error.name or "fsspec")
            raise UserError(
                f"output {shown_url(url)} needs the package {name}, which is not installed; run "
                f"`pip install {name}`, or set output=FOLDER."
            ) from error
        except ValueError as error:
            raise UserError(
                f"output {shown_url(url)} cannot be opened ({shown(str(error))}); give a "
                "folder, or a URL such as s3://BUCKET/FOLDER."
            ) from error
        # For messages and the name of the cache: nothing is opened by it.
        self.location = shown_url(url.rstrip("/"))
        self._root = str(root).rstrip("/")
        named = self._fs.protocol
        names = {named} if isinstance(named, str) else set(named)
        self._atomic = self.objects = bool(names & _OBJECT_STORES)
        self.exclusive = False
        self._probed = self._swept = False
        # s3fs asks for a file's size first, to get large ones in parts. None that is read whole is.
        self._in_one = {"max_concurrency": 1} if self._takes("cat_file", "max_concurrency") else {}
        self._finds_prefixes = self._takes("find", "prefix")

    def _takes(self, method: str, name: str) -> bool:
        """Return whether a method of the file system has an argument of this name."""
        call = getattr(self._fs, f"_{method}", getattr(self._fs, method))
        return name in inspect.signature(call).parameters

    def read(self, path: str) -> bytes:
        data: bytes = self._fs.cat_file(self._at(path), **self._in_one)
        return data

    def digest(self, path: str) -> tuple[int, str]:
        with self._fs.open(self._at(path), "rb") as stream:
            return digest(stream)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        if self._atomic:
            self._fs.pipe_file(self._at(path), data)
            return
        with self._staged(data) as staged:
            self._fs.mv(staged, self._target(path))

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        if not self._atomic:
            return self._create_by_name(path, data)
        created = self._put_new(path, data)
        if created and not self._probed:
            # Once: a store that ignores the condition creates the same object again, and says so.
            self._probed = True
            self.exclusive = not self._put_new(path, data)
        return created

    def _put_new(self, path: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._at(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError:
            # Some stores report a failed condition as an invalid argument.
            if self.exists(path):
                return False
            raise
        except (TypeError, NotImplementedError):
            if self.exists(path):
                return False
            self.write(path, data)
        return True

    def _create_by_name(self, path: str, data: bytes) -> bool:
        target = self._target(path)
        with self._staged(data) as staged:
            if not hasattr(self._fs, "link"):
                taken = self.exists(path)
                if not taken:
                    self._fs.mv(staged, target)
                return not taken
            try:
                self._fs.link(staged, target)
            except FileExistsError:
                return False
        return True

    def append(self, path: str, *lines: str) -> None:
        text = "\n".join(line.rstrip("\n") for line in lines)
        self.write(f"{path}/{time.time_ns()}-{uuid.uuid4().hex}.jsonl", text.encode())

    def lines(self, path: str) -> list[str]:
        pieces = [f"{path}/{name}" for name in self.names(path)]
        if not pieces:
            try:
                # A copy from a local folder is one file.
                return lines_of(self.read(path))
            except (FileNotFoundError, IsADirectoryError):
                return []
        return [line for data in self.map(self.read, pieces) for line in lines_of(data)]

    def names(self, folder: str) -> list[str]:
        at = self._at(folder)
        self._fs.invalidate_cache(at)
        try:
            listed = self._fs.ls(at, detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # A folder may be listed as an object inside itself.
        inside = {str(name).rstrip("/") for name in listed} - {at}
        names = {path.rpartition("/")[2] for path in inside}
        return sorted(name for name in names if not name.startswith("."))

    def walk(self, folder: str) -> Iterator[Found]:
        at = self._at(folder)
        self._fs.invalidate_cache(at)
        try:
            if self._finds_prefixes and folder:
                # Otherwise a folder without files is looked for twice more, as a file.
                found = self._fs.find(self._root, detail=True, prefix=f"{folder}/")
            else:
                found = self._fs.find(at, detail=True)
        except FileNotFoundError:
            return
        for name, facts in found.items():
            path = str(name)[len(self._root) :].lstrip("/")
            if places.is_inside(path):  # what a server lists is data too
                version = str(facts.get("ETag") or facts.get("etag") or "")
                yield Found(path, int(facts.get("size") or 0), _modified(facts), version)

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache(self._at(path))
        return bool(self._fs.exists(self._at(path)))

    def move(self, source: str, target: str) -> bool:
        if not self.exists(source):
            return False
        at, to = self._at(source), self._target(target)
        try:
            if not self._atomic:
                self._fs.mv(at, to, recursive=bool(self._fs.isdir(at)))
                return True
            # Not mv() on a folder: on S3 it fails at subfolders, which are not objects there.
            for path in self._fs.find(at):
                self._fs.cp_file(path, to + str(path)[len(at) :])
        except FileNotFoundError:
            return False
        self.remove(source)
        return True

    def remove_files(self, *paths: str) -> None:
        targets = [self._at(path) for path in paths]
        with suppress(FileNotFoundError):
            if self._atomic and len(targets) > 1:
                self._fs.rm(targets)
                return
        for target in targets:
            with suppress(FileNotFoundError):
                self._fs.rm_file(target)

    def map(self, call: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
        futures = [self._pool.submit(call, item) for item in items]
        # All of them have ended when an error is raised: whoever handles it may remove the files
        # that the others would still be writing.
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        wait(futures)
        failed = [f for f in futures if not f.cancelled() and f.exception() is not None]
        return [future.result() for future in failed or futures]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="store")

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            if self.exists(path):
                at = self._at(path)
                self._fs.rm(at, recursive=bool(self._fs.isdir(at)))

    def prune(self, folder: str) -> None:
        # Object stores have no empty folders; other file systems refuse to remove a full one.
        if not self._atomic:
            with suppress(OSError):
                self._fs.rmdir(self._at(folder))

    def free_bytes(self) -> int | None:
        return None

    def workspace(self, path: str) -> Path:
        if not self._swept:
            self._swept = True
            _sweep_workspaces()
        made = tempfile.mkdtemp(prefix=f"{_WORKSPACE}{os.getpid()}-")
        folder = Path(made) / path.rpartition("/")[2]
        folder.mkdir()
        return folder

    def upload(
        self, folder: Path, path: str, *, skip: Collection[str] = (), durable: bool = True
    ) -> None:
        files = {
            file.relative_to(folder).as_posix(): file
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

        def put(name: str) -> None:
            self._fs.put_file(str(files[name]), self._target(f"{path}/{name}"))

        self.map(put, [name for name in files if name not in skip])

    def download(self, path: str, files: Iterable[str], cache: Path) -> Path:
        copies = LocalStorage(cache)
        folder = copies.workspace(path)

        def get(name: str) -> None:
            at = places.below(path, name)
            staged = Path(copies.workspace(at.rpartition("/")[0])) / f".{uuid.uuid4().hex}"
            try:
                self._fs.get_file(self._at(at), str(staged))
                os.replace(staged, folder / name)
            finally:
                staged.unlink(missing_ok=True)

        missing = [name for name in files if not copies.exists(places.below(path, name))]
        if missing:
            self.map(get, missing)
        return folder

    def _at(self, path: str) -> str:
        return "/".join((self._root, *places.parts(path)))

    def _target(self, path: str) -> str:
        at = self._at(path)
        # On an object store this would require the permission to create buckets.
        if not self._atomic:
            self._fs.makedirs(at.rpartition("/")[0], exist_ok=True)
        return at

    @contextmanager
    def _staged(self, data: bytes) -> Iterator[str]:
        name = places.temporary(uuid.uuid4().hex)
        try:
            self._fs.pipe_file(self._target(name), data)
            yield self._at(name)
        finally:
            with suppress(OSError):
                self.remove(name)


def _options(url: str) -> dict[str, Any]:
    """Return the options of a URL's client: as many connections as `RemoteStorage` has threads.

    What the user set for fsspec comes first.
    """
    if not url.startswith(("s3://", "s3a://")):
        return {}
    config: Any = importlib.import_module("fsspec.config")
    known = config.conf.get(url.partition(":")[0], {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": _AT_ONCE, **known}}


def _sweep_workspaces() -> None:
    """Remove workspaces that killed processes left behind.

    Only those older than a day whose process is gone: containers may share the folder, but have
    different process ids.
    """
    before = time.time() - _ABANDONED_AFTER
    for folder in Path(tempfile.gettempdir()).glob(f"{_WORKSPACE}*"):
        pid = folder.name.removeprefix(_WORKSPACE).partition("-")[0]
        with suppress(OSError):
            facts = folder.lstat()
            old = facts.st_uid == os.getuid() and facts.st_mtime < before
            if old and stat.S_ISDIR(facts.st_mode) and pid.isdigit() and not _runs(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _modified(facts: dict[str, Any]) -> float | None:
    """Return when a file changed, from the key that its file system uses."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = facts.get(key)
        if isinstance(value, str):
            with suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
