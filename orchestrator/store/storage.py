"""File-system primitives on a local or shared folder, or on an object store by URL.

All paths are relative to the root and use ``/``. Listings leave out hidden names (``.tmp`` holds
unfinished files). File-system errors (`OSError`) propagate unless a docstring says otherwise.
Durable writes survive a power cut; other writes to a local folder are not flushed, which is several
times as fast. A crash of the process alone loses neither.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from btu.errors import UserError
from btu.redaction import shown, shown_url

TEMPORARY = ".tmp"
# Prefix of local folders whose content is uploaded later; the process id follows in the name.
_WORKSPACE = "btu-workspace-"
_ABANDONED_AFTER = 24 * 3600.0
# A PUT to these is atomic. Elsewhere a file is written under another name and moved into place.
_OBJECT_STORES = {"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Found(NamedTuple):
    """A file, or an empty folder. modified: Unix time in seconds, None where it is unknown."""

    path: str
    bytes: int
    modified: float | None


class Storage(Protocol):
    """A root folder and the operations on it.

    location: absolute path, or URL without user name, password and values of a query.
    local: whether the files can be opened by path.
    """

    location: str
    local: bool

    def read(self, path: str) -> bytes:
        """Return the content. Raises FileNotFoundError."""

    def digest(self, path: str) -> tuple[int, str]:
        """Return size in bytes and SHA-256 (hex) of a file. Raises FileNotFoundError."""

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Write atomically: a reader sees the old or the new content, never half."""

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a file that must not exist yet; return False if it does.

        Exclusive on a local folder and where the object store has conditional writes.
        """

    def append(self, path: str, line: str) -> None:
        """Append one line. On an object store each line is an object of its own below `path`."""

    def lines(self, path: str) -> list[str]:
        """Return the lines that `append` wrote. A full disk may have cut one short."""

    def names(self, folder: str) -> list[str]:
        """Return the sorted names directly inside a folder; [] if it does not exist."""

    def walk(self, folder: str) -> Iterator[Found]:
        """Yield every file below `folder` and, in a local store, every empty folder."""

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""

    def move(self, source: str, target: str) -> bool:
        """Move a file or folder, atomically in a local store. False if `source` is gone."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its content. A missing path is not an error."""

    def prune(self, folder: str) -> None:
        """Remove a folder if it is empty."""

    def free_bytes(self) -> int | None:
        """Return the free bytes; None where that has no meaning."""

    def workspace(self, path: str) -> Path:
        """Return a new local folder for files that `upload` will put at `path`."""

    def upload(self, folder: Path, path: str, *, durable: bool = True) -> None:
        """Put the files of a `workspace` at `path`."""

    def download(self, path: str, files: Iterable[str], cache: Path) -> Path:
        """Return a local folder with the named files of the folder `path`.

        A local store returns the folder itself and checks no file. Others fetch missing files into
        `cache`. Raises FileNotFoundError, also if the copy is removed in the meantime.
        """


def open_storage(location: str | Path) -> Storage:
    """Return the storage at a path, a ``file://`` URL or any URL that fsspec knows.

    Raises:
        UserError: nothing handles such a URL, or the package that does is missing.
    """
    text = str(location)
    if not is_url(text):
        return LocalStorage(Path(text))
    if text.startswith("file://"):
        return LocalStorage(Path(unquote(urlsplit(text).path)))
    return RemoteStorage(text)


def is_url(location: str) -> bool:
    """Return whether `location` names a protocol rather than a path."""
    return re.match(r"[A-Za-z][\w+.-]*(://|::)", location) is not None


def below(location: str | Path, *parts: str) -> str:
    """Return the path or URL of something below `location`."""
    return "/".join((str(location).rstrip("/"), *parts))


class LocalStorage:
    """A folder of this machine or a shared one."""

    local = True

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.location = str(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def digest(self, path: str) -> tuple[int, str]:
        with (self.root / path).open("rb") as stream:
            return _digest(stream)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        with self._staged(data, durable) as staged:
            os.replace(staged, self._target(path))
        if durable:
            _sync((self.root / path).parent)

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        target = self._target(path)
        with self._staged(data, durable) as staged:
            try:
                os.link(staged, target)
            except FileExistsError:
                # NFS repeats a request whose answer was lost: then the existing link is ours.
                return os.stat(staged).st_nlink == 2
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                try:
                    with target.open("xb") as stream:
                        stream.write(data)
                except FileExistsError:
                    return False
        if durable:
            _sync(target.parent)
        return True

    def append(self, path: str, line: str) -> None:
        data = (line.rstrip("\n") + "\n").encode()
        opened = os.open(self._target(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(opened, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        finally:
            os.close(opened)

    def lines(self, path: str) -> list[str]:
        parts = [f"{path}/{name}" for name in self.names(path)] or [path]
        return [line for part in parts if self.exists(part) for line in _lines(self.read(part))]

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(entry.name for entry in entries if entry.name[0] != ".")
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: str) -> Iterator[Found]:
        for parent, folders, files in os.walk(self.root / folder):
            for name in files or ([] if folders else [""]):
                found = os.path.join(parent, name) if name else parent
                with suppress(FileNotFoundError):
                    facts = os.lstat(found)
                    path = Path(found).relative_to(self.root).as_posix()
                    yield Found(path, facts.st_size if name else 0, facts.st_mtime)

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def move(self, source: str, target: str) -> bool:
        to = self._target(target)
        try:
            os.rename(self.root / source, to)
        except FileNotFoundError:
            return False
        return True

    def remove(self, path: str) -> None:
        target = self.root / path
        with suppress(FileNotFoundError):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()

    def prune(self, folder: str) -> None:
        with suppress(OSError):
            (self.root / folder).rmdir()

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.root).free

    def workspace(self, path: str) -> Path:
        folder = self.root / path
        _make(folder)
        return folder

    def upload(self, folder: Path, path: str, *, durable: bool = True) -> None:
        if folder != self.root / path:
            shutil.copytree(folder, self.root / path)
        for parent, _, files in os.walk(self.root / path) if durable else ():
            for name in files:
                _sync(Path(parent) / name)
            _sync(Path(parent))

    def download(self, path: str, files: Iterable[str], cache: Path) -> Path:
        return self.root / path

    def _target(self, path: str) -> Path:
        target = self.root / path
        if not target.parent.is_dir():
            _make(target.parent)
        return target

    @contextmanager
    def _staged(self, data: bytes, durable: bool) -> Iterator[Path]:
        """Yield a temporary file that contains `data`; remove it afterwards."""
        staged = self._target(f"{TEMPORARY}/{uuid.uuid4().hex}")
        try:
            with staged.open("xb") as stream:
                stream.write(data)
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            yield staged
        finally:
            # The result is in place; `gc` removes a left-over.
            with suppress(OSError):
                staged.unlink(missing_ok=True)


class RemoteStorage:
    """A URL that fsspec can open. Listings are never cached: other processes write too."""

    local = False

    def __init__(self, url: str) -> None:
        try:
            core: Any = importlib.import_module("fsspec.core")
            self._fs, root = core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
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
        self._atomic = bool(names & _OBJECT_STORES)
        self._swept = False

    def read(self, path: str) -> bytes:
        data: bytes = self._fs.cat_file(self._at(path))
        return data

    def digest(self, path: str) -> tuple[int, str]:
        with self._fs.open(self._at(path), "rb") as stream:
            return _digest(stream)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        if self._atomic:
            self._fs.pipe_file(self._at(path), data)
            return
        with self._staged(data) as staged:
            self._fs.mv(staged, self._target(path))

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        if not self._atomic:
            return self._create_by_name(path, data)
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

    def append(self, path: str, line: str) -> None:
        self.write(f"{path}/{time.time_ns()}-{uuid.uuid4().hex}.jsonl", line.encode())

    def lines(self, path: str) -> list[str]:
        # On some stores the listing of a file contains the file itself.
        if self._fs.isfile(self._at(path)):
            return _lines(self.read(path))
        paths = [self._at(f"{path}/{name}") for name in self.names(path)]
        # In one call where the file system supports it: single calls cost a round trip each.
        contents: dict[str, bytes] = self._fs.cat(paths) if paths else {}
        return [line for at in paths for line in _lines(contents[at])]

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
            found = self._fs.find(at, detail=True)
        except FileNotFoundError:
            return
        for name, facts in found.items():
            path = str(name)[len(self._root) :].lstrip("/")
            yield Found(path, int(facts.get("size") or 0), _modified(facts))

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

    def upload(self, folder: Path, path: str, *, durable: bool = True) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target = self._target(f"{path}/{file.relative_to(folder).as_posix()}")
                self._fs.put_file(str(file), target)

    def download(self, path: str, files: Iterable[str], cache: Path) -> Path:
        folder = cache / path
        _make(folder)
        for name in files:
            target = folder / name
            if target.is_file():
                continue
            _make(target.parent)
            staged = target.with_name(f".{uuid.uuid4().hex}")
            try:
                self._fs.get_file(self._at(f"{path}/{name}"), str(staged))
                os.replace(staged, target)
            finally:
                staged.unlink(missing_ok=True)
        return folder

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _target(self, path: str) -> str:
        at = self._at(path)
        # On an object store this would require the permission to create buckets.
        if not self._atomic:
            self._fs.makedirs(at.rpartition("/")[0], exist_ok=True)
        return at

    @contextmanager
    def _staged(self, data: bytes) -> Iterator[str]:
        name = f"{TEMPORARY}/{uuid.uuid4().hex}"
        try:
            self._fs.pipe_file(self._target(name), data)
            yield self._at(name)
        finally:
            with suppress(OSError):
                self.remove(name)


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


def _digest(stream: BinaryIO) -> tuple[int, str]:
    sha, size = hashlib.sha256(), 0
    while block := stream.read(1 << 20):
        sha.update(block)
        size += len(block)
    return size, sha.hexdigest()


def _lines(data: bytes) -> list[str]:
    # Not splitlines(): it also splits at characters that JSON allows inside a string.
    return [line for line in data.decode(errors="replace").split("\n") if line]


def _make(folder: Path) -> None:
    """Create a folder, even while another process prunes its empty parents."""
    for _ in range(5):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            return
    folder.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot sync folders; a full disk must not be ignored.
        if error.errno not in {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}:
            raise
    finally:
        os.close(opened)


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
