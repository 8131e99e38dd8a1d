"""Opens the storage at a path or a URL."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.store.local import LocalStorage
from orchestrator.store.primitives import Found, Storage
from orchestrator.store.remote import RemoteStorage

__all__ = [
    "Found", "LocalStorage", "RemoteStorage", "Storage", "below", "is_url", "open_storage",
]  # fmt: skip


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
