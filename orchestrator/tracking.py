"""MLflow, as a projection of the results on disk. The only file that imports mlflow.

A run is written in one go from a committed result, with the times that it holds: the store is the
spool. Whatever the server misses is written later from there, by the next launch or `btu sync`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# The defaults retry a dead server for minutes per call; results wait on disk, so give up soon.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A bar for each of a thousand small files would be all that one sees.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import pandas as pd
import yaml
from alembic.util.exc import CommandError
from mlflow.entities import Experiment, Metric, Param, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from btu.errors import UserError, unknown
from btu.result_files import CONFIG, FLAGGED, PLOT, RESULT, ROWS, TOKENS
from orchestrator.config import CONTROL, Sweep, flatten, pins, settings, shown_coordinates
from orchestrator.guards import joined, marks
from orchestrator.lease import LEFTOVER_S
from orchestrator.results import MEANS_TABLE, TRACKED, Results, record_id
from orchestrator.source import StoreSource, read_table

if TYPE_CHECKING:
    from orchestrator.report.summary import Summary

logging.getLogger("mlflow").setLevel(logging.WARNING)
# It prints what a database refused, with a traceback, and raises it: callers say it in a line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

# How long a server that did not answer is left alone, and how many records in a row may fail.
DOWN_SECONDS, GIVE_UP = 60.0, 3
# Of a run. MLflow's UI lists no tag that begins with "mlflow.", and these are not for people: which
# record of the cell it is, and its settings, in as many numbered tags as they need.
RECORD_TAG, CELL_TAG = "mlflow.btu.record", "mlflow.btu.cell."
# The folder that a run was written from: people may launch sweeps of one name to one server, and
# the same cell has the same key for all of them. Nobody's runs are another's to remove.
ORIGIN_TAG = "mlflow.btu.origin"
# On our summary run alone: the highest step that it has metrics at.
STEP_TAG = "mlflow.btu.step"
# Raised when a summary says more, or otherwise, than before: those there are then written anew.
SUMMARY_VERSION = 1
KIND_TAG, TRIAL, SUMMARY = "kind", "trial", "summary"
# Of an experiment: ids of SQLite begin at 1 again in a new file, and a URI changes with a move.
ID_TAG = "btu.id"
# MLflow's runs table shows no metric by itself. With an address that names a view it does; its own
# "Share" button makes such views, as tags of the experiment.
VIEW = "btu"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_COLUMNS = (
    *(f"params.`{name}`" for name in ("attack", "poison_rate", "defense", "threshold", "seed")),
    *(f"metrics.`{name}`" for name in ("asr", "cacc", "detection_precision")),
)
SQLITE = "sqlite:///"
# What a store that cannot be used raises: MLflow, the database, its migrations, files, the URI.
_REFUSALS = (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ValueError)
# MLflow refuses longer values of params and tags.
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 5000
# The params of a run, short names for columns; beside them there are those that the sweep varies.
# All other settings are in its config.yaml: forty columns that never change hide those that do.
PARAMS = {
    "data.name": "data",
    "victim.name": "victim",
    "attack.name": "attack",
    "attack.poison_rate": "poison_rate",
    "attack.label_mode": "label_mode",
    "defense.name": "defense",
    "defense.preset": "preset",
    "defense.rule": "rule",
    "defense.threshold": "threshold",
    "defense.alpha": "alpha",
    "train.epochs": "epochs",
    "train.learning_rate": "learning_rate",
    "train.batch_size": "batch_size",
    "seed": "seed",
}
# First parts of the names of metrics that are notes on the data, and curves over epochs.
NOTES, CURVES = "data", ("loss", "accuracy")
# Tags that are made here; all others of a run are the record's own.
OWN_TAGS = ("cell", KIND_TAG, CONTROL, "marks", "reason")
# How many runs are asked for at once: an answer has to come within the timeout above.
PAGE = 250


def tracking_uri(sweep: Sweep) -> str:
    """Return where the sweep's runs go: its own choice, or SQLite in the output folder.

    Raises:
        UserError: the output folder is on an object store, where SQLite cannot be.
    """
    uri = sweep.tracking.uri
    return default_uri(sweep.output) if uri is None else absolute(uri)


def absolute(uri: str) -> str:
    """Return a URI that names the same SQLite file from everywhere; other URIs as they are."""
    if uri.startswith(SQLITE):
        # Workers start in folders of their own, where a relative file would be another one.
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).expanduser().resolve())
    return uri


def shown(text: str) -> str:
    """Return a URI, or a text with some, for people: without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def default_uri(output: str) -> str:
    """Return the SQLite store of an output folder.

    Raises:
        UserError: the output folder is on an object store.
    """
    if "://" in output:
        raise UserError(
            f"output {output} is an object store, where MLflow's SQLite file cannot be; name an "
            "MLflow server with tracking.uri (or --uri)."
        )
    return f"{SQLITE}{Path(output).expanduser().resolve() / 'mlflow.db'}"


def prepare(sweep: Sweep) -> tuple[str | None, str]:
    """Create store and experiment. Returns the experiment's id, and why there is none.

    Done once, before any worker: creating a database's tables takes seconds and must not race.
    A server that does not answer is no error: runs are written from the results on disk whenever
    it does.

    Raises:
        UserError: the URI cannot work, whoever answers: no such database, driver or experiment.
    """
    hint = "correct tracking.uri, or leave it null for a local SQLite file."
    return _open(tracking_uri(sweep), sweep.name, _experiment_note(sweep), hint)


def experiment(uri: str, name: str) -> str:
    """Return the id of a sweep's experiment, creating store and experiment where missing.

    Raises:
        UserError: the store does not answer, or the URI cannot work.
    """
    hint = "or correct --uri."
    experiment_id, reason = _open(uri, name, None, hint)
    if experiment_id is None:
        raise UserError(_no_answer(uri, reason, hint))
    return experiment_id


def _open(uri: str, name: str, note: str | None, hint: str) -> tuple[str | None, str]:
    """Create store and experiment. Returns its id, or none and why a server does not answer.

    note: the experiment's description, None to leave it. hint: what may be done about the URI.

    Raises:
        UserError: the URI cannot work, whoever answers.
    """
    try:
        database = _database_of(uri)
        if database is not None:
            _make_database(database)
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = _find_or_create(client, name, _artifacts(database, name), note)
        if found.lifecycle_stage != "active":
            raise UserError(
                f"experiment '{name}' was deleted in the MLflow store {shown(uri)}; "
                "restore it there, or give the sweep another name."
            )
        experiment_id = str(found.experiment_id)
        if note is not None and found.tags.get("mlflow.note.content") != note:
            _set_tag(client, experiment_id, "mlflow.note.content", note)
        if found.tags.get(VIEW_TAG) != _view():
            _set_tag(client, experiment_id, VIEW_TAG, _view())
        _identities[uri, experiment_id] = _identity(client, found)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"tracking.uri {shown(uri)} needs a package that is not installed: {error}. Install "
            "it (for PostgreSQL: pip install psycopg2-binary), or name an MLflow server (HTTP)."
        ) from error
    except _REFUSALS as error:
        reason = _reason(error)
        if uri.startswith(("http://", "https://")):
            return None, reason
        raise UserError(_no_answer(uri, reason, hint)) from error
    if database is not None:
        _use_wal(database)
    return experiment_id, ""


def _no_answer(uri: str, reason: str, hint: str) -> str:
    return f"tracking.uri {shown(uri)} does not answer: {reason} Start the server, {hint}"


def _find_or_create(
    client: mlflow.MlflowClient, name: str, artifacts: str | None, note: str | None
) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found
    # With its tags at once: launches that set them later could meet.
    tags = {ID_TAG: uuid.uuid4().hex, VIEW_TAG: _view()}
    if note is not None:
        tags["mlflow.note.content"] = note
    try:
        made = client.create_experiment(name, artifact_location=artifacts, tags=tags)
    except (MlflowException, SQLAlchemyError):
        # Another launch may have created it since.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found
    return client.get_experiment(made)


def _artifacts(database: Path | None, name: str) -> str | None:
    """Return where an experiment's files go: beside its database; a server knows by itself.

    MLflow's own choice would be a folder in the current directory.
    """
    return None if database is None else (database.parent / "mlartifacts" / name).as_uri()


def _set_tag(client: mlflow.MlflowClient, experiment_id: str, key: str, value: str) -> None:
    try:
        client.set_experiment_tag(experiment_id, key, value)
    except (MlflowException, SQLAlchemyError):
        # Of two that insert a tag at once one is refused; it finds the tag the second time.
        client.set_experiment_tag(experiment_id, key, value)


def _identity(client: mlflow.MlflowClient, found: Experiment) -> str:
    """Return what tells an experiment from all others, giving it to one that has none."""
    if ID_TAG not in found.tags:
        _set_tag(client, found.experiment_id, ID_TAG, uuid.uuid4().hex)
        found = client.get_experiment(found.experiment_id)
    return str(found.tags[ID_TAG])


def _database_of(uri: str) -> Path | None:
    """Return the file of a SQLite URI, None of any other."""
    name = make_url(uri).database if uri.startswith(SQLITE) else None
    return Path(name).resolve() if name and name != ":memory:" else None


def _make_database(path: Path) -> None:
    """Create a SQLite store with all its tables, unless there is one.

    The tables take seconds, and MLflow refuses a file that has only some of them ever after. So
    they are made aside and linked into place whole: neither a kill nor a second launch that does
    the same can leave such a file.

    Raises:
        OSError, SQLAlchemyError, MlflowException: it cannot be made.
    """
    _remove_leftovers(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a database that was removed without them: SQLite would write their pages into the new one.
    # Before the tables, not after: by then another launch may have linked its own and use it.
    _remove_companions(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        _make_tables(aside)
        # Closing the only connection leaves no -wal file, which a link would not take along.
        _use_wal(aside)
        try:
            os.link(aside, path)
        except FileExistsError:
            pass  # another process was first; its store is as good
        except OSError:
            # A disk without hard links, where the second of two cannot be kept from replacing.
            if not path.exists():
                aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
        _remove_companions(aside)


def _remove_companions(path: Path) -> None:
    """Remove the files that SQLite keeps beside a database, where that is gone."""
    for suffix in ("-wal", "-shm", "-journal"):
        if not path.exists():
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"{SQLITE}{path}"
    try:
        # Not by a client: the registry behind it keeps every store it ever made.
        store = SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())
        store.engine.dispose()
    finally:
        # MLflow keeps an engine for each URI; this one will never be asked for again.
        getattr(SqlAlchemyStore, "_engine_map", {}).pop(uri, None)


def _use_wal(path: Path) -> None:
    """Let readers no longer wait for writers: 1.9x the runs per second from several workers."""
    # Some network disks cannot, and a store that is busy in its old mode will next time.
    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed in `_make_database` left beside a database."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.new(-\w+)?")
    with suppress(OSError):  # no folder yet, or another launch removes the same
        for found in path.parent.iterdir():
            if left.fullmatch(found.name) and time.time() - found.stat().st_mtime > LEFTOVER_S:
                found.unlink()


def _experiment_note(sweep: Sweep) -> str:
    axes = ", ".join(f"`{key}` {values}" for key, values in sweep.grid.items())
    note = (
        f"Sweep **{sweep.name}** over {axes or 'a single cell'}.\n\n"
        f"One run per cell, and the run `{SUMMARY}` with means over seeds, tables and a page. In "
        f"the runs table the button *Columns* adds `asr`, `cacc`, `detection_precision`; search "
        f"for `tags.kind = 'trial'` to leave the summary out.\n\n"
        f"Table: `btu report {sweep.name} --mean`. Run it again, or go on with it: "
        "`btu launch sweep.yaml`, with "
    )
    whole = f"{note}this file:\n\n```yaml\n{sweep.text}```\n"
    # Longer than a description may be: the summary has it.
    return whole if len(whole) <= TAG_CHARACTERS else f"{note[:4000]}that artifact of the summary."


class Tracker:
    """Writes a sweep's cells as runs, each once.

    What was written is noted in the sweep's folder, so that a launch need not ask for it. Before a
    run is written MLflow is asked all the same: a worker may have died half-way, or before it could
    note anything.
    """

    def __init__(self, uri: str, experiment_id: str, results: Results) -> None:
        self.uri = uri
        self._id = experiment_id
        self._results = results
        self._client = mlflow.MlflowClient(tracking_uri=uri)

    def log(self, record: Mapping[str, Any], folder: Path | None) -> bool:
        """Write a cell's record, finished or failed, unless MLflow has it; return whether it did.

        folder: of the finished cell's files. A run of an earlier record of the cell is replaced.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        if self.is_logged(record):
            return False
        with _breaker(self.uri):
            self.identify()
            if self.is_logged(record):
                return False
            found = self._whole_run(record)
            run_id = found or self._write(record, folder)
            self._note(record["key"], {"record": record_id(record), "run_id": run_id})
        return found is None

    def is_logged(self, record: Mapping[str, Any]) -> bool:
        """Return whether MLflow has a record, from the sweep's folder alone.

        False until this process has once reached the experiment, whose notes they are.
        """
        if (self.uri, self._id) not in _identities:
            return False
        known = self._noted(record["key"])
        return known.get("record") == record_id(record) and "run_id" in known

    def identify(self) -> None:
        """Learn which experiment it is, whatever its store is called now; asks once a process.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        if (self.uri, self._id) not in _identities:
            found = self._client.get_experiment(self._id)
            _identities[self.uri, self._id] = _identity(self._client, found)

    def close_orphans(self, live: Callable[[str], bool], owner: str) -> int:
        """Remove the runs that dead workers left unfinished; returns how many.

        live: whether a cell's worker is at it right now. owner: of the leases that this takes. What
        they were to say is on disk and is told again, as a run of its own.
        """
        closed = 0
        running = self._client.search_runs(
            [self._id], "attributes.status = 'RUNNING'", max_results=50_000
        )
        for run in running:
            key = run.data.tags.get("cell")
            if key is None or not self._is_ours(run) or live(key):
                continue
            # A worker may have finished it since the search, and then let go of the cell.
            with self._results.store.lease(key, owner) as lease:
                if lease.acquire() and self._is_running(run.info.run_id):
                    self._client.set_terminated(run.info.run_id, "KILLED")
                    self._client.delete_run(run.info.run_id)
                    closed += 1
        return closed

    def _is_ours(self, run: Run) -> bool:
        # Runs that earlier versions wrote do not say whose they are.
        return bool(run.data.tags.get(ORIGIN_TAG, self._origin) == self._origin)

    @cached_property
    def _origin(self) -> str:
        return self._results.origin()

    def _is_running(self, run_id: str) -> bool:
        info = self._client.get_run(run_id).info
        return bool(info.status == "RUNNING" and info.lifecycle_stage == "active")

    def _write(self, record: Mapping[str, Any], folder: Path | None) -> str:
        run_id = self._start(record)
        if record["status"] == "finished":
            assert folder is not None
            self._tell_result(run_id, record, folder)
        else:
            self._tell_failure(run_id, record)
        self._client.set_tag(run_id, RECORD_TAG, record_id(record))
        status = "FINISHED" if record["status"] == "finished" else "FAILED"
        self._client.set_terminated(run_id, status, _milliseconds(record["ended"]))
        return run_id

    def _tell_result(self, run_id: str, record: Mapping[str, Any], folder: Path) -> None:
        self._client.log_batch(run_id, metrics=_metrics(record), params=_params(record))
        for name in (CONFIG, TOKENS, ROWS, PLOT, RESULT):
            if (folder / name).is_file():
                self._client.log_artifact(run_id, str(folder / name))
        if (folder / FLAGGED).is_file():
            flagged = pd.DataFrame(json.loads((folder / FLAGGED).read_text()))
            if len(flagged):
                self._client.log_table(run_id, flagged, FLAGGED)

    def _tell_failure(self, run_id: str, record: Mapping[str, Any]) -> None:
        self._client.log_batch(run_id, params=_params(record))
        self._client.log_text(run_id, record["traceback"], "traceback.txt")
        config = yaml.safe_dump(record["config"], sort_keys=False)
        self._client.log_text(run_id, config, CONFIG)
        self._client.set_tag(run_id, "reason", record["reason"][:TAG_CHARACTERS])

    def _start(self, record: Mapping[str, Any]) -> str:
        run = self._client.create_run(
            self._id,
            start_time=_milliseconds(record["started"]),
            tags={
                **{k: str(v)[:TAG_CHARACTERS] for k, v in run_tags(record).items()},
                ORIGIN_TAG: self._origin,
            },
            run_name=run_name(record),
        )
        return str(run.info.run_id)

    def _whole_run(self, record: Mapping[str, Any]) -> str | None:
        """Return the id of the run that has all of a record; remove the cell's other runs."""
        whole = None
        for run in self._client.search_runs([self._id], f"tags.cell = '{record['key']}'"):
            if not self._is_ours(run):
                continue
            same = run.data.tags.get(RECORD_TAG) == record_id(record)
            if whole is None and same and run.info.status in ("FINISHED", "FAILED"):
                whole = str(run.info.run_id)
            else:
                self._client.delete_run(run.info.run_id)
        return whole

    def summary_noted(self, told: str) -> bool:
        """Return whether the summary run says this, from the sweep's folder alone."""
        known = self._noted(SUMMARY)
        return known.get("record") == told and "run_id" in known

    def write_summary(self, made: Summary, told: str) -> None:
        """Bring the summary run up to date, or make it. told: the fingerprint of what it says.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        run = self._summary_run(made.metrics)
        now, run_id = int(time.time() * 1000), run.info.run_id
        logged = run.data.metrics
        # MLflow takes the value of the highest step for the latest, and cells may become fewer: a
        # damaged one is set aside.
        step = max(made.finished, int(run.data.tags[STEP_TAG]))
        # Only what changed: a long sweep is summarized a thousand times.
        metrics = [
            Metric(name, value, now, step)
            for name, value in made.metrics.items()
            if logged.get(name) != value
        ]
        with tempfile.TemporaryDirectory(prefix="btu-summary-") as folder:
            for name, content in made.files.items():
                path = Path(folder) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            self._client.log_artifacts(run_id, folder)
        self._client.log_batch(run_id, metrics=metrics)
        self._client.set_tag(run_id, "mlflow.note.content", made.note)
        self._client.set_tag(run_id, STEP_TAG, str(step))
        if MEANS_TABLE in made.files:
            tables = [{"path": MEANS_TABLE, "type": "table"}]
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(tables))
        self._client.set_terminated(run_id, "FINISHED", now)
        self._note(SUMMARY, {"record": told, "run_id": run_id})

    def _summary_run(self, metrics: Collection[str]) -> Run:
        """Return the summary run, of several launches that made one the oldest.

        One with metrics that are no longer said, since the sweep varies more now, is replaced:
        MLflow takes back no metric.
        """
        found = self._summary_runs()
        if not found or not set(found[0].data.metrics) <= set(metrics):
            for run in found:
                self._client.delete_run(run.info.run_id)
            tags = {
                "mlflow.source.name": "btu",
                KIND_TAG: SUMMARY,
                STEP_TAG: "0",
                ORIGIN_TAG: self._origin,
            }
            made = self._client.create_run(self._id, tags=tags, run_name=SUMMARY)
            self._client.set_terminated(made.info.run_id, "FINISHED")
            found = self._summary_runs()
        for run in found[1:]:
            self._client.delete_run(run.info.run_id)
        return found[0]

    def _summary_runs(self) -> list[Run]:
        tagged = self._client.search_runs([self._id], f"tags.{KIND_TAG} = '{SUMMARY}'")
        # A run that somebody else calls a summary is not ours to change or delete.
        runs = [run for run in tagged if STEP_TAG in run.data.tags and self._is_ours(run)]
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _path(self, key: str) -> str:
        # A note is about one experiment: the same sweep in another store is told everything.
        # As a hash, since a server may say anything.
        identity = _identities[self.uri, self._id]
        where = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return f"{self._results.name}/{TRACKED}/{where}/{key}.json"

    def _noted(self, key: str) -> dict[str, str]:
        try:
            noted: dict[str, str] = json.loads(self._results.storage.read(self._path(key)))
        except FileNotFoundError:
            return {}
        except ValueError:  # damaged: MLflow is asked
            return {"record": ""}
        return noted

    def _note(self, key: str, noted: Mapping[str, str]) -> None:
        self._results.storage.write(self._path(key), json.dumps(noted).encode())


# What experiments are, by URI and id there: known still when a server is away.
_identities: dict[tuple[str, str], str] = {}
_down: dict[str, tuple[float, str]] = {}


@contextmanager
def _breaker(uri: str) -> Iterator[None]:
    """Leave a server alone for a while after it did not answer: results wait on disk."""
    until, reason = _down.get(uri, (0.0, ""))
    if time.monotonic() < until:
        raise ConnectionError(reason)
    try:
        yield
    except Exception as error:
        if uri.startswith(("http://", "https://")):
            reason = shown(f"{type(error).__name__}: {error}")
            _down[uri] = (time.monotonic() + DOWN_SECONDS, reason)
        raise


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
    _down.pop(uri, None)
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
    with _breaker(uri):
        tracker.identify()
    cells, sweep = len(results.cells()), results.sweep_text()
    told = _fingerprint(source.records(), source.failures(), cells, sweep)
    if tracker.summary_noted(told):
        return False
    from orchestrator.report import summary  # draws: neither workers nor a resumed sweep need it

    made = summary.summarize(source, cells, sweep, TAG_CHARACTERS)
    with _breaker(uri):
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


def brief(error: Exception) -> str:
    """Return an error as a line for people, without passwords."""
    return f"{type(error).__name__}: {shown(str(error))[:200]}"


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


class RunState(NamedTuple):
    """Where a run stands. cell: its key, empty of a run of no cell. status: MLflow's word."""

    run_id: str
    cell: str
    status: str


class MlflowSource:
    """A sweep's results from its MLflow experiment alone: a `Source`.

    Numbers are the runs' metrics. Of several runs of a cell the newest finished one counts.
    """

    def __init__(self, uri: str, name: str, warn: Callable[[str], None] | None = None) -> None:
        """Find the experiment. warn: told of runs that are left out.

        Raises:
            UserError: MLflow does not answer, or has no such experiment ("did you mean").
        """
        self.uri, self._name, self._warn = absolute(uri), name, warn
        self._told_unreachable = False
        database = self.uri.removeprefix(SQLITE) if self.uri.startswith(SQLITE) else None
        if database is not None and not Path(database).is_file():
            # MLflow would make one.
            raise UserError(f"{shown(self.uri)} does not exist; correct --tracking-uri.")
        with self._answering():
            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            found = self._client.get_experiment_by_name(name)
            if found is None:
                known = [e.name for e in self._client.search_experiments() if e.name != "Default"]
                where = f"sweep in {shown(self.uri)}"
                raise UserError(f"{unknown(where, name, known)}; launch or sync it first.")
        if found.lifecycle_stage != "active":
            raise UserError(
                f"experiment '{name}' was deleted in the MLflow store {shown(self.uri)}; restore "
                "it there."
            )
        self._id = str(found.experiment_id)

    @property
    def name(self) -> str:
        return self._name

    def records(self) -> list[dict[str, Any]]:
        return [self._record(run) for run in self._cells.values() if run.info.status == "FINISHED"]

    def failures(self) -> list[dict[str, Any]]:
        return [self._record(run) for run in self._cells.values() if run.info.status == "FAILED"]

    def states(self) -> list[RunState]:
        """Return where every run of the sweep stands, unfinished ones too."""
        with self._answering():
            return [
                RunState(run.info.run_id, run.data.tags.get("cell", ""), run.info.status)
                for run in self._search()
            ]

    def tokens(self, key: str) -> pd.DataFrame | None:
        return self._table(key, TOKENS)

    def rows(self, key: str) -> pd.DataFrame | None:
        return self._table(key, ROWS)

    @cached_property
    def _cells(self) -> dict[str, Run]:
        """The run that counts of each cell, by key."""
        found: dict[str, Run] = {}
        older = 0
        with self._answering():
            runs = sorted(self._search(), key=lambda run: run.info.start_time)
        for run in runs:
            tags = run.data.tags
            if "cell" not in tags or run.info.status not in ("FINISHED", "FAILED"):
                continue  # a summary, what someone else logged here, or not written to its end
            if f"{CELL_TAG}0" not in tags or RECORD_TAG not in tags:
                older += 1
                continue
            before = found.get(tags["cell"])
            if before is None or run.info.status == "FINISHED" or before.info.status == "FAILED":
                found[tags["cell"]] = run
        if older and self._warn is not None:
            self._warn(
                f"{older} runs of sweep '{self._name}' were logged by an earlier version and are "
                f"left out; btu sync {self._name} writes them anew, where their results are."
            )
        return dict(sorted(found.items()))

    def _search(self) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs([self._id], max_results=PAGE, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _record(self, run: Run) -> dict[str, Any]:
        tags = run.data.tags
        cell = json.loads("".join(_numbered(tags, CELL_TAG)))
        finished = run.info.status == "FINISHED"
        record = {
            "key": tags["cell"],
            "sweep": self._name,
            "status": "finished" if finished else "failed",
            "run_id": run.info.run_id,
            "config": cell["config"],
            "varied": cell["varied"],
        }
        if finished:
            record |= {
                "metrics": {
                    cell["names"].get(name, name): value
                    for name, value in run.data.metrics.items()
                    if name.partition("/")[0] not in (NOTES, *CURVES)
                },
                "notes": {
                    name.removeprefix(f"{NOTES}/"): value
                    for name, value in run.data.metrics.items()
                    if name.startswith(f"{NOTES}/")
                },
                "tags": {
                    name: value
                    for name, value in tags.items()
                    if not name.startswith("mlflow.") and name not in OWN_TAGS
                },
            }
        else:
            record |= {"stage": cell["stage"], "reason": tags["reason"]}
        record["started"], record["ended"] = (
            moment / 1000 for moment in (run.info.start_time, run.info.end_time)
        )
        return record

    def _table(self, key: str, name: str) -> pd.DataFrame | None:
        run = self._cells.get(key)
        if run is None:
            return None
        run_id = run.info.run_id
        with self._answering(), tempfile.TemporaryDirectory(prefix="btu-mlflow-") as folder:
            kept = {entry.path for entry in self._client.list_artifacts(run_id)}
            if not kept:
                self._unreachable(run)
            if name not in kept:
                return None
            path = Path(self._client.download_artifacts(run_id, name, folder))
            try:
                return read_table(path)
            except (ValueError, OSError) as error:
                raise UserError(
                    f"artifact {name} of run {run_id} cannot be read ({_reason(error)}); write it "
                    "again, or delete the run."
                ) from error

    def _unreachable(self, run: Run) -> None:
        """Say once that artifacts are not where their store looks for them.

        MLflow lists nothing for a folder that is gone, as if nothing had ever been kept; but every
        finished run has its `RESULT`.
        """
        if not self._told_unreachable and self._warn is not None:
            self._warn(
                f"run {run.info.run_id} has no artifacts at {shown(run.info.artifact_uri)}: what "
                "needs token scores (curves, drift plots) leaves out it and others like it. Was "
                "the folder moved, or the database copied alone? Put it back, or name a server."
            )
        self._told_unreachable = True

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except ImportError as error:
            raise UserError(
                f"tracking URI {shown(self.uri)} needs a package that is not installed: {error}."
            ) from error
        except _REFUSALS as error:
            raise UserError(
                f"MLflow at {shown(self.uri)} does not answer: {_reason(error)} Start the server, "
                "or correct --tracking-uri."
            ) from error


def _numbered(tags: Mapping[str, str], prefix: str) -> Iterator[str]:
    number = 0
    while (name := f"{prefix}{number}") in tags:
        yield tags[name]
        number += 1


def _reason(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0])


def _view() -> str:
    return json.dumps({"selectedColumns": VIEW_COLUMNS})


def views(uri: str) -> dict[str, str]:
    """Return the address of each sweep's runs table behind a UI's own, newest sweep first, by name.

    Raises:
        UserError: the store cannot be read.
    """
    try:
        found = mlflow.MlflowClient(tracking_uri=uri).search_experiments(
            order_by=["last_update_time DESC"]
        )
    except _REFUSALS as error:
        raise UserError(
            f"the MLflow store {shown(uri)} cannot be read: {_reason(error)} Name another one with "
            "--uri."
        ) from error
    # Without the last parameter MLflow opens on its pages for language-model traces.
    return {
        each.name: f"/#/experiments/{each.experiment_id}/runs?viewStateShareKey={VIEW}"
        "&workflowType=machine_learning"
        for each in found
        if VIEW_TAG in each.tags
    }


def ui_command(uri: str, port: int) -> list[str]:
    """Return the command that serves the MLflow UI of a store, on this machine only."""
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri,
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip


def serve_ui(uri: str, port: int) -> int:
    """Serve the MLflow UI until it is stopped; return its exit code."""
    try:
        return subprocess.run(ui_command(uri, port), check=False).returncode
    except KeyboardInterrupt:
        return 0


def run_name(record: Mapping[str, Any]) -> str:
    """Return what tells the cell from its siblings: ``badnets poison_rate=0.1 seed=0``."""
    config, varied = record["config"], shown_coordinates(record["varied"])
    parts = [
        f"{key.split('.')[-1]}={value}" for key, value in varied.items() if key != "attack.name"
    ]
    return " ".join([config["attack"]["name"], *parts])


def run_tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is told apart and found by, and what speaks against reading it."""
    varied, found = record["varied"], marks(record)
    return {
        "mlflow.source.name": "btu",
        "mlflow.note.content": _run_note(record),
        **_cell_tags(record),
        KIND_TAG: TRIAL,
        "cell": record["key"],
        **({CONTROL: varied[CONTROL]} if CONTROL in varied else {}),
        **({"marks": joined(found)} if found else {}),
        **record["tags"],
    }


def _cell_tags(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what `MlflowSource` needs of a cell and neither params nor metrics hold exactly."""
    names = {_metric_name(name): name for name in record.get("metrics", {})}
    cell = {
        "config": record["config"],
        "varied": record["varied"],
        "names": {logged: name for logged, name in names.items() if logged != name},
        **({"stage": record["stage"]} if "stage" in record else {}),
    }
    text = json.dumps(cell, separators=(",", ":"))
    parts = range(0, len(text), TAG_CHARACTERS)
    return {f"{CELL_TAG}{i}": text[at : at + TAG_CHARACTERS] for i, at in enumerate(parts)}


def _run_note(record: Mapping[str, Any]) -> str:
    command = f"btu trial sweep.yaml {pins(record['varied'])}".rstrip()
    return (
        f"{_in_words(record['config'])}. Cell `{record['key']}` of sweep `{record['sweep']}`.\n\n"
        "Again, in one process: `btu trial config.yaml`, with the artifact; or "
        f"`{command}`, with that of the run `{SUMMARY}`."
        + "".join(f"\n\n**{mark.name}**: {mark.detail}." for mark in marks(record))
    )


def _in_words(config: Mapping[str, Any]) -> str:
    """Return what a cell is: ``Attack **badnets** at rate 0.1, defense **btu** (...), seed 0``."""
    attack, defense = config["attack"], config.get("defense", {})
    knobs = [
        f"{name} {defense[name]}"
        for name in ("preset", "rule", "threshold", "alpha")
        if defense.get(name) not in (None, "")
    ]
    where = [f"{role} {config[role]['name']}" for role in ("data", "victim") if role in config]
    parts = [
        f"Attack **{attack['name']}** at rate {attack['poison_rate']}",
        f"defense **{defense.get('name', 'none')}**" + (f" ({', '.join(knobs)})" if knobs else ""),
        *where,
        f"seed {config.get('seed', 0)}",
    ]
    return ", ".join(parts)


def _params(record: Mapping[str, Any]) -> list[Param]:
    flat = flatten(record["config"])
    names = {**PARAMS, **{key: PARAMS.get(key, key) for key in settings(record["varied"])}}
    # A key that is not set would only be an empty column in the runs table.
    return [
        Param(name, str(flat[key])[:PARAM_CHARACTERS])
        for key, name in names.items()
        if flat.get(key) not in (None, "")
    ]


def _metrics(record: Mapping[str, Any]) -> list[Metric]:
    ended = _milliseconds(record["ended"])
    metrics = [
        Metric(_metric_name(name), float(value), ended, 0)
        for name, value in record["metrics"].items()
    ]
    metrics += [
        Metric(f"{NOTES}/{name}", float(value), ended, 0) for name, value in record["notes"].items()
    ]
    clock = record["started"]
    for epoch in record["history"]:
        clock += epoch["seconds"]
        stage = _metric_name(epoch["stage"])
        for name in CURVES:
            metrics.append(
                Metric(f"{name}/{stage}", epoch[name], _milliseconds(clock), epoch["epoch"])
            )
    return metrics


def _metric_name(name: str) -> str:
    return name.replace(" ", "_").replace("(", "").replace(")", "").replace("-", "_")


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
