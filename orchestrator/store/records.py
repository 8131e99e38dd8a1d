"""What a store says of stages beside their results: why they failed, and how long they took."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from btu.redaction import shown
from btu.result_files import dumps, json_value, with_nan
from orchestrator.store import places
from orchestrator.store.lease import peek
from orchestrator.store.primitives import Storage, lines_of
from orchestrator.store.typed import Check, holds, is_amount, is_text, parse, parse_object

# What records of failures and timings contain.
_FAILURE: dict[str, Check] = {
    **dict.fromkeys(("key", "stage", "reason", "traceback", "code"), is_text),
    "metrics": lambda value: isinstance(value, dict),
    **dict.fromkeys(("started", "ended"), is_amount),
}
_TIMING: dict[str, Check] = {
    **dict.fromkeys(("stage", "victim", "device"), is_text),
    **dict.fromkeys(("units", "seconds"), lambda value: is_amount(value) and value >= 0),
    "count": lambda value: is_amount(value) and value > 0,
}


class Look(NamedTuple):
    """What a store has of a key at one moment, from one round trip.

    committed: whether it has a result.
    failure: the last failure, if it has no result.
    dropped: whether it has a dropped entry.
    """

    committed: bool
    failure: dict[str, Any] | None
    dropped: bool


class Records(ABC):
    """Failures and timings of a store. storage: its files."""

    storage: Storage

    @abstractmethod
    def is_committed(self, key: str) -> bool:
        """Return whether a key has a result."""

    @abstractmethod
    def committed(self) -> set[str]:
        """Return the keys that have a result."""

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Write why computing a key failed, replacing an earlier failure.

        Errors of clients name their URL: it is written without its password.
        """
        told = {name: shown(text) for name, text in record.items() if isinstance(text, str)}
        self.storage.write(places.failure(key), dumps({**record, **told}).encode())

    def failure(self, key: str) -> dict[str, Any] | None:
        """Return the last failure of a key that is not committed, if any."""
        return None if self.is_committed(key) else self._failure(key)

    def failed(self) -> set[str]:
        """Return the keys whose last attempt failed and that are not committed."""
        names = (found.path.rpartition("/")[2] for found in self.storage.walk(places.FAILED))
        failed = {key for name in names if (key := places.key_of(name)) is not None}
        return failed - self.committed() if failed else failed

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the last failure of every key that is not committed, by key."""
        found = self.storage.map(self._failure, sorted(self.failed()))
        yield from (failure for failure in found if failure is not None)

    def _failure(self, key: str) -> dict[str, Any] | None:
        """Return the record of a failure; None if there is none, or if it is no such record."""
        return self._as_failure(key, peek(self.storage, places.failure(key)) or b"")

    def _as_failure(self, key: str, data: bytes) -> dict[str, Any] | None:
        """Return the record of a failure from its file; None if it is no such record."""
        with suppress(ValueError):
            record = parse_object(data)
            known = {"key": key, "stage": "?", "code": "", "started": 0.0, "ended": 0.0, **record}
            if known["key"] == key and holds(known, _FAILURE, ["reason"]):
                return with_nan(known)
        return None

    def clear_failure(self, key: str) -> None:
        """Forget a failure."""
        self.storage.remove_files(places.failure(key))

    def add_timings(self, launch_id: str, rows: list[dict[str, Any]]) -> None:
        """Append timings of a launch's stages."""
        if rows:
            self.storage.append(places.timings(launch_id), json.dumps(json_value(rows)))

    def timings(self) -> list[dict[str, Any]]:
        """Return the timings of all launches, without what is none: they serve estimates alone."""
        rows: list[dict[str, Any]] = []
        # One listing for all launches: on an object store each has a folder of its own.
        paths = [found.path for found in self.storage.walk(places.TIMINGS)]
        contents = self.storage.map(lambda path: peek(self.storage, path) or b"", paths)
        for line in (line for data in contents for line in lines_of(data)):
            with suppress(ValueError):  # cut short by a full disk
                found = parse(line)
                if isinstance(found, list):
                    rows += [row for row in found if holds(row, _TIMING, _TIMING)]
        return rows
