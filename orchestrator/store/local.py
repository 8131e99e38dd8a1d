"""Storage in a folder of this machine, or in one that several share."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from orchestrator.store import places, tree
from orchestrator.store.places import refused
from orchestrator.store.primitives import Found, digest, lines_of

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


_T = TypeVar("_T")
_S = TypeVar("_S")
# A path, and what the file system says of it.
Status = tuple[str, os.stat_result]


class LocalStorage:
    """A folder. It may be a symbolic link; links below it are refused (`Outside`)."""

    local = True
    objects = False
    exclusive = False

    def __init__(self, root: Path) -> None:
        self.location = os.path.abspath(root)
        # Resolved once: a root that becomes another link later leads nowhere else.
        self.root = Path(os.path.realpath(self.location))
        self._root = str(self.root)

    def read(self, path: str) -> bytes:
        # Not `_parent`: markers are read a thousand times in a row.
        folder, name = tree.open_parent(self._root, path)
        try:
            return tree.read_file(folder, name, path)
        finally:
            os.close(folder)

    def digest(self, path: str) -> tuple[int, str]:
        with self._parent(path) as (folder, name):
            opened, _ = tree.open_file(folder, name, os.O_RDONLY, self._shown(path))
            with os.fdopen(opened, "rb") as stream:
                return digest(stream)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        with self._staged(data, durable) as (source, staged), self._target(path) as (folder, name):
            os.replace(staged, name, src_dir_fd=source, dst_dir_fd=folder)
            if durable:
                _sync(folder)

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        with self._staged(data, durable) as (source, staged), self._target(path) as (folder, name):
            try:
                os.link(staged, name, src_dir_fd=source, dst_dir_fd=folder)
            except FileExistsError:
                # NFS repeats a request whose answer was lost: then the existing link is ours.
                return os.stat(staged, dir_fd=source).st_nlink == 2
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                try:
                    _write_new(folder, name, data)
                except FileExistsError:
                    return False
            if durable:
                _sync(folder)
        return True

    def append(self, path: str, *lines: str) -> None:
        data = "".join(line.rstrip("\n") + "\n" for line in lines).encode()
        with self._target(path) as (folder, name):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            opened, _ = tree.open_file(folder, name, flags, self._shown(path))
            try:
                if os.write(opened, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            finally:
                os.close(opened)

    def lines(self, path: str) -> list[str]:
        pieces = [f"{path}/{name}" for name in self.names(path)] or [path]
        found = []
        for piece in pieces:
            with suppress(FileNotFoundError):
                found += lines_of(self.read(piece))
        return found

    def names(self, folder: str) -> list[str]:
        try:
            opened = tree.open_folder(self._root, folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            return sorted(name for name in os.listdir(opened) if name[0] != ".")
        finally:
            os.close(opened)

    def walk(self, folder: str) -> Iterator[Found]:
        for path, status in self.statuses(folder):
            empty = stat.S_ISDIR(status.st_mode)
            yield Found(path, 0 if empty else status.st_size, status.st_mtime)

    def statuses(self, folder: str, *, folders: bool = False) -> Iterator[Status]:
        """Yield path and status of what is below a folder. Links are not followed.

        folders: with all folders; otherwise the empty ones only, as `walk` does.
        """
        left = [folder]
        while left:
            path = left.pop()
            try:
                opened = tree.open_folder(self._root, path)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # removed meanwhile, no folder, or private to another user
            try:
                inner, found, own = _list(opened)
            finally:
                os.close(opened)
            lead = f"{path}/" if path else ""
            left += [lead + name for name in reversed(inner)]
            if folders or not (inner or found):
                yield path, own
            for name, status in found:
                yield lead + name, status

    def exists(self, path: str) -> bool:
        try:
            with self._parent(path) as (folder, name):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def move(self, source: str, target: str) -> bool:
        try:
            with self._parent(source) as (folder, name), self._target(target) as (to, new):
                os.rename(name, new, src_dir_fd=folder, dst_dir_fd=to)
        except FileNotFoundError:
            return False
        return True

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError), self._parent(path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                try:
                    shutil.rmtree(name, dir_fd=folder)  # which follows no link either
                except RecursionError:
                    raise refused(self._shown(path), "is nested too deeply") from None
            else:
                os.unlink(name, dir_fd=folder)

    def remove_files(self, *paths: str) -> None:
        for path in paths:
            self.remove(path)

    def map(self, call: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
        return [call(item) for item in items]

    def prune(self, folder: str) -> None:
        with suppress(OSError), self._parent(folder) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.root).free

    def workspace(self, path: str) -> Path:
        os.close(tree.open_folder(self._root, path, make=True))
        return self.root / path

    def upload(
        self, folder: Path, path: str, *, skip: Collection[str] = (), durable: bool = True
    ) -> None:
        if folder != self.root / path:
            with self._target(path):
                shutil.copytree(folder, self.root / path, symlinks=True)
        for parent, _, files in os.walk(self.root / path) if durable else ():
            for name in files:
                _sync_path(os.path.join(parent, name))
            _sync_path(parent)

    def download(self, path: str, files: Iterable[str], cache: Path) -> Path:
        return self.root / path

    def open_folder(self, path: str) -> int:
        """Return a descriptor of a folder, which the caller closes."""
        return tree.open_folder(self._root, path)

    def _shown(self, path: str) -> str:
        return f"{self.location}/{path}"

    @contextmanager
    def _parent(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Yield an open folder, and the name in it that `path` ends with."""
        opened, name = tree.open_parent(self._root, path, make=make)
        try:
            yield opened, name
        finally:
            os.close(opened)

    @contextmanager
    def _target(self, path: str) -> Iterator[tuple[int, str]]:
        with self._parent(path, make=True) as found:
            yield found

    @contextmanager
    def _staged(self, data: bytes, durable: bool) -> Iterator[tuple[int, str]]:
        """Yield a temporary file that contains `data`, and its open folder; remove it after."""
        with self._target(places.temporary(uuid.uuid4().hex)) as (folder, name):
            try:
                _write_new(folder, name, data, durable)
                yield folder, name
            finally:
                # The result is in place; `gc` removes a left-over.
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)


def _write_new(folder: int, name: str, data: bytes, durable: bool = False) -> None:
    opened, _ = tree.open_file(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, name)
    with os.fdopen(opened, "wb") as stream:
        stream.write(data)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def _list(folder: int) -> tuple[list[str], list[tuple[str, os.stat_result]], os.stat_result]:
    """Return the folders in an open folder, the files with their status, and its own status."""
    inner, found = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    inner.append(entry.name)
                else:
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return sorted(inner), sorted(found), os.fstat(folder)


def _sync_path(path: str) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _sync(opened)
    finally:
        os.close(opened)


def _sync(opened: int) -> None:
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot sync folders; a full disk must not be ignored.
        if error.errno not in {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}:
            raise
