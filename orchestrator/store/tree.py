"""Folders and files of a local store, opened without following a symbolic link.

Each step of a path is opened relative to the folder before it, so a link is noticed at whatever
moment somebody puts it there. Descriptors that a function returns belong to its caller.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from orchestrator.store.places import Outside, parts, refused

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a named pipe would wait for its writer.
FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LINK, _SPECIAL = "is a symbolic link", "is neither a file nor a folder"
_DEEPEST, _DEEP = 32, "is nested too deeply"
_SMALL = 1 << 18
# SHA-256 of files that this process has read, so that it hashes each model once. A program that
# exchanges a file can set its size and its mtime, but not its ctime.
_hashes: dict[tuple[int, int, int, int, int], str] = {}


class FileFact(NamedTuple):
    """size: bytes. sha256: hexadecimal."""

    size: int
    sha256: str


def open_folder(root: str, path: str, *, make: bool = False) -> int:
    """Return a descriptor of the folder at `path` below `root`. `root` may be a link.

    make: create what is missing.

    Raises:
        Outside: a step of `path` is a link, or leads out.
        FileNotFoundError: there is no such folder.
    """
    return _open(root, parts(path), make)


def open_parent(root: str, path: str, *, make: bool = False) -> tuple[int, str]:
    """Return a descriptor of the folder that `path` is in, and the name that it ends with.

    Arguments and errors are those of `open_folder`.
    """
    steps = parts(path)
    if not steps:
        raise refused(root, "is the folder itself, not something in it")
    return _open(root, steps[:-1], make), steps[-1]


def _open(root: str, steps: list[str], make: bool) -> int:
    for _ in range(5):
        try:
            return _descend(root, steps, make)
        except FileNotFoundError:
            if not make:
                raise
            # The root is missing, or another process prunes empty folders.
            os.makedirs(root, exist_ok=True)
    return _descend(root, steps, make)


def _descend(root: str, steps: list[str], make: bool) -> int:
    # The first step with the root, whose own links are followed: that saves a call.
    path = f"{root}/{steps[0]}" if steps else f"{root}/."
    opened = _enter(None, path, path, make)
    try:
        for step in steps[1:]:
            path = f"{path}/{step}"
            inner = _enter(opened, step, path, make)
            os.close(opened)
            opened = inner
    except BaseException:
        os.close(opened)
        raise
    return opened


def _enter(folder: int | None, name: str, shown: str, make: bool = False) -> int:
    """Open the folder of a name in an open folder.

    folder: the open one; None: `name` is a path.
    name: of the folder to open.
    shown: its path, for errors.
    make: create it if it is missing.
    """
    try:
        return os.open(name, FOLDER, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    except OSError as error:
        if is_link(folder, name):
            raise refused(shown, _LINK) from error
        raise
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
    return _enter(folder, name, shown)


def open_file(folder: int, name: str, flags: int, shown: str) -> tuple[int, os.stat_result]:
    """Return a descriptor of a regular file in an open folder, and the file's status.

    shown: its path, for errors.

    Raises:
        Outside: it is a link, a pipe or a device.
    """
    try:
        opened = os.open(name, flags | FILE, 0o666, dir_fd=folder)
    except FileExistsError:
        raise
    except OSError as error:
        if is_link(folder, name):
            raise refused(shown, _LINK) from error
        if error.errno == errno.ENXIO:  # a pipe without a reader, or a socket
            raise refused(shown, _SPECIAL) from error
        raise
    status = os.fstat(opened)
    if stat.S_ISREG(status.st_mode):
        return opened, status
    os.close(opened)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), shown)
    raise refused(shown, _SPECIAL)


def is_link(folder: int | None, name: str) -> bool:
    """Return whether a name in an open folder is a symbolic link."""
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def read_file(folder: int, name: str, shown: str) -> bytes:
    """Return the content of a file in an open folder. shown: its path, for errors."""
    opened, status = open_file(folder, name, os.O_RDONLY, shown)
    try:
        return _read(opened, status.st_size)
    finally:
        os.close(opened)


def _read(opened: int, size: int) -> bytes:
    """Return the content of an open file of this size, up to where it ended then."""
    data = os.read(opened, size)
    while len(data) < size and (block := os.read(opened, size - len(data))):
        data += block
    return data


def files_of(
    folder: int, prefix: str = "", *, skip: str | None = None, depth: int = 0
) -> Iterator[tuple[str, int, str, os.stat_result]]:
    """Yield the files below an open folder: path, open folder of the file, its name, its status.

    folder: the open folder.
    prefix: put before the paths.
    skip: the start of paths that are left out.
    depth: how many folders it is in.

    Raises:
        Outside: there is a link, a pipe or a device, or more than _DEEPEST folders in each other.
    """
    if depth > _DEEPEST:
        raise refused(prefix, _DEEP)
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if skip is not None and f"{path}/".startswith(skip):
                continue
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                yield path, folder, entry.name, status
            elif stat.S_ISDIR(status.st_mode):
                inner = _enter(folder, entry.name, path)
                try:
                    yield from files_of(inner, f"{path}/", skip=skip, depth=depth + 1)
                finally:
                    os.close(inner)
            else:
                raise refused(path, _LINK if stat.S_ISLNK(status.st_mode) else _SPECIAL)


def facts_of(folder: int) -> dict[str, FileFact]:
    """Return size and hash of every file below an open folder, by path."""
    facts = {path: _hash(inside, name, path) for path, inside, name, _ in files_of(folder)}
    return dict(sorted(facts.items()))


def difference(
    folder: int,
    files: Mapping[str, FileFact],
    *,
    skip: str | None = None,
    more: bool = False,
    remembered: bool = True,
) -> str | None:
    """Return how the files below an open folder differ from their marker; None if they do not.

    Hidden files that the marker does not name, such as those of a file manager, are no difference.

    folder: of the entry.
    files: what the marker says.
    skip: the start of paths that are left out.
    more: whether there may be files that the marker does not name.
    remembered: take the hash of a file that this process has read before.
    """
    found = 0
    try:
        for path, inside, name, status in files_of(folder, skip=skip):
            expected = files.get(path)
            if expected is None:
                if not more and not name.startswith("."):
                    return f"{path!r} is there, but not in its marker"
                continue
            found += 1
            if status.st_size != expected.size:
                return f"{path} has {status.st_size} bytes, not {expected.size}"
            known = _hashes.get(_identity(status)) if remembered else None
            if (known or _hash(inside, name, path).sha256) != expected.sha256:
                return f"{path} has other content"
    except Outside as error:
        return str(error).partition(". ")[0]
    # Each was found once: a folder has a name once.
    wanted = [path for path in files if skip is None or not path.startswith(skip)]
    if found == len(wanted):
        return None
    there = {path for path, *_ in files_of(folder, skip=skip)}
    return f"{min(set(wanted) - there, default='a file')} is missing"


def _hash(folder: int, name: str, shown: str) -> FileFact:
    """Read a file in an open folder, remember its SHA-256, and return it. shown: for errors."""
    opened, status = open_file(folder, name, os.O_RDONLY, shown)
    try:
        if status.st_size <= _SMALL:
            # The buffer of file_digest would take longer than the file.
            sha256 = hashlib.sha256(_read(opened, status.st_size)).hexdigest()
        else:
            with os.fdopen(opened, "rb", closefd=False) as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        # Not of a file that somebody changes meanwhile.
        if _identity(os.fstat(opened)) == _identity(status):
            _hashes[_identity(status)] = sha256
    finally:
        os.close(opened)
    return FileFact(status.st_size, sha256)


def _identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return (
        status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size,
    )  # fmt: skip
