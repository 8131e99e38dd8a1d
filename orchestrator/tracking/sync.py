"""Runs that MLflow missed, and the summary of a sweep."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.results.folder import Launched, Results, record_id
from orchestrator.results.source import StoreSource
from orchestrator.tracking.runs import TAG_CHARACTERS
from orchestrator.tracking.server import GIVE_UP, breaker, brief, unanswered
from orchestrator.tracking.writer import Tracker

# Bump when the summary's content changes; existing summaries are then rewritten.
SUMMARY_VERSION = 1


@dataclass(frozen=True)
class Synced:
    """What `sync` did.

    written: how many runs.
    closed: how many runs that dead workers had left unfinished.
    missing: how many cells still have no run that shows how they ended.
    reason: why; or why runs were not closed, or models not removed. Empty if all was done.
    deleted: cells whose runs a user deleted; they were written again, or left out.
    """

    written: int
    closed: int
    missing: int
    reason: str
    deleted: int = 0


def sync(
    uri: str,
    experiment_id: str,
    results: Results,
    live: Callable[[str], bool],
    owner: str | None = None,
    *,
    respect_deleted: bool = False,
) -> Synced:
    """Write every run that MLflow misses, and close those that dead workers left running.

    MLflow is asked which runs it has. A run whose status was changed is set right, and one that
    lacks its model gets it, where the store keeps it. Models of runs that are gone are removed.

    uri: the MLflow store.
    experiment_id: the sweep's experiment there.
    results: the sweep's results.
    live: whether a cell's worker is running right now; it writes the run itself.
    owner: the launch that calls, whose workers have ended, so that it may take their leases; None
        takes leases under a new name.
    respect_deleted: leave out cells whose runs a user deleted in MLflow.
    """
    owner = owner or f"sync-{uuid.uuid4().hex}"
    tracker = Tracker(uri, experiment_id, results)
    written = closed = deleted = 0
    missed: list[str] = []
    unanswered.pop(uri, None)
    # Once: reading the plans takes long.
    cells = results.cells()
    records = [*results.records(cells), *results.failures()]
    with_model = _with_model(results, cells, records)
    try:
        tracker.identify()
        known = tracker.known(records, with_model, respect_deleted=respect_deleted)
    except Exception as error:
        missing = sum(not tracker.is_logged(record) for record in records)
        return Synced(0, 0, missing, brief(error))
    unclosed = ""
    try:
        closed = tracker.close_orphans(live, owner, {record_id(record) for record in records})
    except Exception as error:
        unclosed = brief(error)
    for record in records:
        # What is whole first: whether somebody has the lease costs a request.
        if record_id(record) in known.whole or live(record["key"]):
            continue
        was_deleted = record_id(record) in known.deleted
        deleted += was_deleted
        if was_deleted and respect_deleted:
            continue
        # One bad record must not block the others; a dead server is not asked for each.
        if len(missed) >= GIVE_UP:
            missed.append(missed[-1])
            continue
        try:
            # Under the cell's lease: another launch, or the cell's worker, may write it too.
            with results.store.leases.lease(record["key"], owner) as lease:
                if not lease.acquire():
                    missed.append(f"{record['key']} is being written by another process")
                    continue
                now = _reread(results, record)
                if now is not None:
                    written += _log(tracker, results, now, cells.get(now["key"]))
        except Exception as error:
            missed.append(brief(error))
    if any(cell.model for cell in cells.values()) and len(missed) < GIVE_UP:
        try:
            tracker.remove_stray_models()
        except Exception as error:
            unclosed = unclosed or brief(error)
    return Synced(written, closed, len(missed), missed[0] if missed else unclosed, deleted)


def _log(
    tracker: Tracker, results: Results, record: Mapping[str, Any], cell: Launched | None
) -> bool:
    """Write a record. cell: as it was launched; None if no plan has it. Arguments as in `sync`."""
    folder = results.store.fetch(record["key"]) if record["status"] == "finished" else None
    keys = ("", "") if cell is None else (cell.training_set, cell.model)
    return tracker.log(record, folder, *keys)


def _with_model(
    results: Results, cells: Mapping[str, Launched], records: list[dict[str, Any]]
) -> set[str]:
    """Return the keys of the finished cells whose models the store has, and is to keep."""
    models = {
        key: cells[key].model
        for key in (record["key"] for record in records if record["status"] == "finished")
        if key in cells and cells[key].model
    }
    committed = results.store.committed() if models else set()
    return {key for key, model in models.items() if model in committed}


def summarize(
    uri: str, experiment_id: str, results: Results, *, respect_deleted: bool = False
) -> bool:
    """Write the sweep's summary run unless it is up to date. Return whether it was written.

    There is one such run. Its status is never RUNNING: the process that updates it may die.

    respect_deleted: do not write it if a user deleted it in MLflow.

    Raises:
        Exception: the server cannot be reached, or refuses.
    """
    tracker = Tracker(uri, experiment_id, results)
    source = StoreSource(results)
    with breaker(uri):
        tracker.identify()
    cells, sweep = len(results.cells()), results.sweep_text()
    fingerprint = _fingerprint(source.records(), source.failures(), cells, sweep)
    with breaker(uri):
        if tracker.summary_is_current(fingerprint):
            return False
        if respect_deleted and tracker.summary_was_deleted():
            return False
    from orchestrator.report import summary  # imports plotting, which workers do not need

    made = summary.summarize(source, cells, sweep, TAG_CHARACTERS)
    with breaker(uri):
        tracker.write_summary(made, fingerprint)
    return True


def _fingerprint(
    records: list[dict[str, Any]], failures: list[dict[str, Any]], cells: int, sweep: str
) -> str:
    """Return a hash that changes whenever the summary of these records would.

    cells: number of cells launched so far.
    sweep: the text of the sweep file.
    """
    ids = [f"{record_id(record)} {record['run_id']}" for record in records]
    ids += [f"{record_id(failure)} {failure['reason']}" for failure in failures]
    known = [SUMMARY_VERSION, cells, sweep, *sorted(ids)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]


@dataclass
class Pace:
    """When the summary of a running sweep is due again.

    interval: least seconds between two summaries.
    share: fraction of the time that summaries may take. Those of a large sweep take long to draw
        and would slow its trials.
    """

    interval: float = 30.0
    share: float = 0.05
    _next: float = 0.0

    def due(self, now: float) -> bool:
        return now >= self._next

    def took(self, began: float, ended: float) -> None:
        """Record that a summary was written from `began` to `ended`, in seconds."""
        self._next = max(began + self.interval, ended + (ended - began) / self.share)


def _reread(results: Results, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a cell's current record; None if it no longer has one.

    Valid while the cell's lease is held. Another launch may have retried the cell since the records
    were listed: the old failure must not replace the run of the new result.
    """
    key = record["key"]
    if record["status"] == "finished" or results.store.is_committed(key):
        return results.record(key, record["varied"])
    failure = results.store.failure(record["failed"])
    if failure is not None and failure["started"] == record["started"]:
        return dict(record)
    return next((found for found in results.failures() if found["key"] == key), None)
