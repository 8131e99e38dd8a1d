"""What local and remote storage have in common.

All paths are relative to the root and use ``/``; none leads out of it (`places.parts`). Listings
leave out hidden names (``.tmp`` holds unfinished files). File-system errors (`OSError`) propagate
unless a docstring says otherwise. Durable writes survive a power cut; other writes to a local
folder are not flushed, which is several times as fast. A crash of the process alone loses neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

_T = TypeVar("_T")
_S = TypeVar("_S")


class Found(NamedTuple):
    """A file, or an empty folder.

    modified: Unix time in seconds, None where it is unknown.
    version: what an object store calls its content (ETag); empty where it has no name for it.
    """

    path: str
    bytes: int
    modified: float | None
    version: str = ""


class Storage(Protocol):
    """A root folder and the operations on it.

    location: absolute path, or URL without user name, password and values of a query.
    local: whether the files can be opened by path.
    objects: whether it is an object store: a PUT is atomic, and each request costs a round trip.
    exclusive: whether `create` was seen to refuse what exists. A local folder does not say: there
        reading what was created costs nothing.
    """

    location: str
    local: bool
    objects: bool
    exclusive: bool

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

    def append(self, path: str, *lines: str) -> None:
        """Append lines. On an object store each call makes an object of its own below `path`."""

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

    def remove_files(self, *paths: str) -> None:
        """Remove files, on an object store in one request. A missing file is not an error."""

    def map(self, call: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
        """Return what a function returns for each item.

        A store over a network answers slowly, but serves many requests at once: there the calls
        run in threads. `call` must not call `map`.
        """

    def prune(self, folder: str) -> None:
        """Remove a folder if it is empty."""

    def free_bytes(self) -> int | None:
        """Return the free bytes; None where that has no meaning."""

    def workspace(self, path: str) -> Path:
        """Return a new local folder for files that `upload` will put at `path`."""

    def upload(
        self, folder: Path, path: str, *, skip: Collection[str] = (), durable: bool = True
    ) -> None:
        """Put the files of a `workspace` at `path`.

        skip: paths below the folder that need not be put there. A local store keeps all.
        """

    def download(self, path: str, files: Iterable[str], cache: Path) -> Path:
        """Return a local folder with the named files of the folder `path`.

        A local store returns the folder itself and checks no file. Others fetch missing files into
        `cache`. Raises FileNotFoundError, also if the copy is removed in the meantime.
        """


def digest(stream: BinaryIO) -> tuple[int, str]:
    """Return size in bytes and SHA-256 (hex) of what a stream gives."""
    sha, size = hashlib.sha256(), 0
    while block := stream.read(1 << 20):
        sha.update(block)
        size += len(block)
    return size, sha.hexdigest()


def lines_of(data: bytes) -> list[str]:
    """Return the lines of a file that `Storage.append` wrote."""
    # Not splitlines(): it also splits at characters that JSON allows inside a string.
    return [line for line in data.decode(errors="replace").split("\n") if line]
