"""Runs that MLflow missed, and the summary of a sweep."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.results.folder import Results, record_id
from orchestrator.results.source import StoreSource
from orchestrator.tracking.runs import TAG_CHARACTERS
from orchestrator.tracking.server import GIVE_UP, breaker, brief, unanswered
from orchestrator.tracking.writer import Tracker

if TYPE_CHECKING:
    pass
# Raised when a summary says more, or otherwise, than before: those there are then written anew.
SUMMARY_VERSION = 1


@dataclass(frozen=True)
class Synced:
    """What a `sync` did: runs written and closed, those still missing, and why."""

    written: int
    closed: int
    missing: int
    reason: str


def sync(
    uri: str,
    experiment_id: str,
    results: Results,
    live: Callable[[str], bool],
    owner: str | None = None,
) -> Synced:
    """Write every run that MLflow misses, and close those that dead workers left running.

    live: whether a cell's worker is at it right now; it writes the run itself. owner: the launch
    that asks, whose workers have ended; their leases are its own.
    """
    owner = owner or f"sync-{uuid.uuid4().hex}"
    tracker = Tracker(uri, experiment_id, results)
    written = closed = 0
    missed: list[str] = []
    unanswered.pop(uri, None)
    try:
        tracker.identify()
        closed = tracker.close_orphans(live, owner)
    except Exception as error:
        missed.append(brief(error))
    for record in (*results.records(), *results.failures()):
        if live(record["key"]) or tracker.is_logged(record):
            continue
        # One bad record must not keep the others out; a dead server is not asked for each.
        if len(missed) >= GIVE_UP:
            missed.append(missed[-1])
            continue
        try:
            # Under the cell's lease: another launch, or its worker, may be about to write it too.
            with results.store.lease(record["key"], owner) as lease:
                if not lease.acquire():
                    missed.append(f"{record['key']} is being written by another process")
                    continue
                now = _reread(results, record)
                if now is not None and not tracker.is_logged(now):
                    folder = None
                    if now["status"] == "finished":
                        folder = results.store.fetch(now["key"])
                    written += tracker.log(now, folder)
        except Exception as error:
            missed.append(brief(error))
    return Synced(written, closed, len(missed), missed[0] if missed else "")


def summarize(uri: str, experiment_id: str, results: Results) -> bool:
    """Write the sweep's summary run, unless it says all that is known; return whether it did.

    There is one such run. It is never RUNNING: whoever updates it may die.

    Raises:
        Exception: the server cannot be reached, or refuses.
    """
    tracker = Tracker(uri, experiment_id, results)
    source = StoreSource(results)
    with breaker(uri):
        tracker.identify()
    cells, sweep = len(results.cells()), results.sweep_text()
    told = _fingerprint(source.records(), source.failures(), cells, sweep)
    if tracker.summary_noted(told):
        return False
    from orchestrator.report import summary  # draws: neither workers nor a resumed sweep need it

    made = summary.summarize(source, cells, sweep, TAG_CHARACTERS)
    with breaker(uri):
        tracker.write_summary(made, told)
    return True


def _fingerprint(
    records: list[dict[str, Any]], failures: list[dict[str, Any]], cells: int, sweep: str
) -> str:
    """Return what changes whenever a summary of these records would.

    cells: launched so far. sweep: the file's text.
    """
    ids = [f"{record_id(record)} {record['run_id']}" for record in records]
    ids += [f"{record_id(failure)} {failure['reason']}" for failure in failures]
    known = [SUMMARY_VERSION, cells, sweep, *sorted(ids)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]


@dataclass
class Pace:
    """When a running sweep's summary is due again.

    interval: seconds between two. share: of the time that summaries may take, so that those of a
    large sweep, which draw for long, do not slow its trials.
    """

    interval: float = 30.0
    share: float = 0.05
    _next: float = 0.0

    def due(self, now: float) -> bool:
        return now >= self._next

    def took(self, began: float, ended: float) -> None:
        """Note that a summary was written between two moments."""
        self._next = max(began + self.interval, ended + (ended - began) / self.share)


def _reread(results: Results, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a cell's record as it is now, None where it has none any more.

    It is right as long as the cell's lease is held. Since the records were listed another launch
    may have retried the cell: its failure must not replace the run of its result.
    """
    key = record["key"]
    if record["status"] == "finished" or results.store.is_committed(key):
        return results.record(key, record["varied"])
    failure = results.store.failure(record["failed"])
    if failure is not None and failure["started"] == record["started"]:
        return dict(record)
    return next((found for found in results.failures() if found["key"] == key), None)
