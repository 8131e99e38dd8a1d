"""The journal of a sweep: a line for each event, from all launches and workers.

In a folder each line is appended at once. On an object store a line would be a PUT, so the lines of
a process are collected: they are written together, at the latest FLUSH_S after the first of them,
when the journal is read and when the process ends. A killed process loses what it had not written;
the journal tells when what ran, and no result depends on it.
"""

from __future__ import annotations

import atexit
import threading
from contextlib import suppress

from orchestrator.store.storage import Storage

FLUSH_S = 3.0
MOST_LINES = 200


class Journal:
    """Writes the lines of this process. storage: contains the file `path`."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._lines: list[str] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        if storage.objects:
            atexit.register(self._last)

    def add(self, line: str) -> None:
        """Add a line."""
        if not self._storage.objects:
            self._storage.append(self._path, line)
            return
        with self._lock:
            self._lines.append(line)
            full = len(self._lines) >= MOST_LINES
            if not full and self._timer is None:
                self._timer = threading.Timer(FLUSH_S, self._last)
                self._timer.daemon = True
                self._timer.start()
        if full:
            self._last()

    def flush(self) -> None:
        """Write what was collected. If that fails, the lines stay for the next time.

        Raises:
            Exception: of the store.
        """
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._lines:
                self._storage.append(self._path, *self._lines)
                self._lines.clear()

    def _last(self) -> None:
        # A lost connection: the next event tries again. Nothing waits for the journal.
        with suppress(Exception):
            self.flush()


_journals: dict[tuple[str, str], Journal] = {}
_making = threading.Lock()


def journal_of(storage: Storage, path: str) -> Journal:
    """Return the journal at a path of a store; a process has one of each."""
    place = (storage.location, path)
    with _making:
        if place not in _journals:
            _journals[place] = Journal(storage, path)
        return _journals[place]
