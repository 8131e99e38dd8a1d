"""Writes cells as MLflow runs.

A run is written at once from a committed result, with the times in it. Runs that the server misses
are written later from the store, by the next launch or by `btu sync`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
import yaml
from mlflow.entities import DatasetInput, Metric, Run, RunTag, ViewType

from btu.result_files import CONFIG, FLAGGED, PLOT, RESULT, ROWS, TOKENS
from orchestrator.results.folder import MEANS_TABLE, TRACKED, Results, record_id
from orchestrator.tracking.database import database_of
from orchestrator.tracking.elsewhere import refuse_elsewhere
from orchestrator.tracking.models import Kept, LoggedModels, is_ready, kept, linked, was_deleted
from orchestrator.tracking.moved import local_path
from orchestrator.tracking.runs import (
    KIND_TAG,
    ORIGIN_TAG,
    PAGE,
    RECORD_TAG,
    STEP_TAG,
    SUMMARY,
    TAG_CHARACTERS,
    milliseconds,
    run_metrics,
    run_name,
    run_params,
    run_tags,
    training_input,
)
from orchestrator.tracking.server import breaker, identities, store_identity

if TYPE_CHECKING:
    from orchestrator.report.summary import Summary


# Which artifacts the UI shows as tables.
TABLES_TAG = "mlflow.loggedArtifacts"
# MLflow sends at most 1,000 metrics, params and tags at a time, and at most 100 of the last two.
BATCH_METRICS = 800


@dataclass
class Known:
    """What MLflow has of a sweep, of the runs that were written from its folder.

    whole: ids of records that have a run with everything, and no other run in the way.
    present: ids of records that have a run of any kind.
    deleted: ids of records whose run was deleted by a user.
    """

    whole: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)


class Tracker:
    """Writes each cell of a sweep as a run, once.

    MLflow is asked which runs it has: users delete runs, and a worker may have died before it noted
    the run that it wrote. The sweep's folder notes the ids of the runs, for reports.
    """

    def __init__(
        self, uri: str, experiment_id: str, results: Results, *, fresh: bool = False
    ) -> None:
        """Ask nothing yet.

        uri: of the MLflow store.
        experiment_id: of the sweep's experiment there.
        results: of the sweep.
        fresh: whether the experiment had no run of the sweep when the launch began. Then no cell is
            looked up before its run is written: a launch computes a cell once, and `sync`, at its
            end, removes what a worker that died has left.
        """
        self.uri, self._fresh = uri, fresh
        self._id = experiment_id
        self._results = results
        self._client = mlflow.MlflowClient(tracking_uri=uri)

    def log(
        self,
        record: Mapping[str, Any],
        folder: Path | None,
        training_set: str = "",
        model: str = "",
    ) -> bool:
        """Write a cell's record, finished or failed, unless MLflow has it. Return whether it wrote.

        A run of an earlier record of the cell is replaced. A run of this record whose status was
        changed, whose files were removed, or that lacks its model, is completed.

        folder: the files of a finished cell.
        training_set: the digest of its training rows, poisoned; empty where that is not known.
        model: the key of the stage whose model the cell ends with; empty if it is not to be kept.
            Where the store has it, the run gets a logged model.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        rows = training_input(record, training_set) if training_set else None
        there = None if folder is None else kept(self._results.store, model)
        with breaker(self.uri):
            self.identify()
            found = None if self._fresh else self._whole_run(record)
            if found is None:
                run_id, wrote = self._write(record, folder, rows, there), True
            else:
                run_id, wrote = str(found.info.run_id), self._complete(found, record, folder)
                if there is not None:
                    dataset = None if rows is None else rows.dataset
                    wrote |= self._models.complete(found, record, there, dataset)
            self._note(record["key"], {"record": record_id(record), "run_id": run_id})
        return wrote

    def known(
        self,
        records: Collection[Mapping[str, Any]],
        with_model: Collection[str] = (),
        *,
        respect_deleted: bool = False,
    ) -> Known:
        """Ask MLflow which of these records it has.

        with_model: keys of the cells whose runs are whole only with a model.
        respect_deleted: a run is whole too if a user deleted its model.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        found = Known()
        status = {record_id(record): _status(record) for record in records}
        cells: dict[str, list[Run]] = {}
        for run in self._all_runs():
            record, gone = run.data.tags.get(RECORD_TAG), run.info.lifecycle_stage != "active"
            if not gone:
                cells.setdefault(run.data.tags.get("cell", ""), []).append(run)
                found.present.add(record or "")
            # Runs that were cut short are deleted by `close_orphans`, not by a user.
            elif record is not None and run.info.status in ("FINISHED", "FAILED"):
                found.deleted.add(record)
        models = self._models.by_run() if with_model else {}
        for key, runs in cells.items():
            record, of_run = (
                runs[0].data.tags.get(RECORD_TAG, ""),
                models.get(runs[0].info.run_id, []),
            )
            right = runs[0].info.status == status.get(record)
            if key in with_model and not is_ready(of_run):
                right &= respect_deleted and was_deleted(of_run, runs[0])
            if len(runs) == 1 and right and not self._lacks_files(runs[0]):
                found.whole.add(record)
        for record in records:
            # One that was deleted for good is noted in the folder alone. A note is a file: those of
            # runs that are there, usually all, are not read.
            if record_id(record) not in found.present and self.is_logged(record):
                found.deleted.add(record_id(record))
        found.deleted -= found.present
        return found

    def is_logged(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record was written to MLflow, according to the sweep's folder alone.

        False until this process has reached the experiment once: notes are kept per experiment.
        """
        if (self.uri, self._id) not in identities:
            return False
        known = self._noted(record["key"])
        return known.get("record") == record_id(record) and "run_id" in known

    def identify(self) -> None:
        """Read the experiment's own id, which survives a move of its store; once per process.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        if (self.uri, self._id) not in identities:
            found = self._client.get_experiment(self._id)
            identities[self.uri, self._id] = store_identity(self._client, found)

    def close_orphans(
        self, live: Callable[[str], bool], owner: str, whole: Collection[str] = ()
    ) -> int:
        """Remove the runs that dead workers left unfinished. Return how many.

        Their content is in the store and is written again as new runs.

        live: whether a worker is writing the cell's run right now.
        owner: the owner of the leases that this takes.
        whole: ids of records; a run of one of them lacks its status alone, which `log` sets.
        """
        closed = 0
        running = self._client.search_runs(
            [self._id], "attributes.status = 'RUNNING'", max_results=50_000
        )
        for run in running:
            key = run.data.tags.get("cell")
            if key is None or not self._is_ours(run) or live(key):
                continue
            if run.data.tags.get(RECORD_TAG) in whole:
                continue
            # A worker may have finished the run since the search, and released its lease.
            with self._results.store.leases.lease(key, owner) as lease:
                if lease.acquire() and self._is_running(run.info.run_id):
                    self._client.set_terminated(run.info.run_id, "KILLED")
                    self._client.delete_run(run.info.run_id)
                    closed += 1
        return closed

    def remove_stray_models(self) -> None:
        """Remove the models of runs that were deleted, and the second one of a run.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        self._models.remove_strays(
            lambda: {
                run.info.run_id: run
                for run in self._all_runs()
                if run.info.lifecycle_stage == "active"
            }
        )

    @cached_property
    def _models(self) -> LoggedModels:
        return LoggedModels(self._client, self._id, self._origin)

    def _is_ours(self, run: Run) -> bool:
        return bool(run.data.tags.get(ORIGIN_TAG) == self._origin)

    @cached_property
    def _origin(self) -> str:
        return self._results.origin()

    def _is_running(self, run_id: str) -> bool:
        info = self._client.get_run(run_id).info
        return bool(info.status == "RUNNING" and info.lifecycle_stage == "active")

    def _write(
        self,
        record: Mapping[str, Any],
        folder: Path | None,
        rows: DatasetInput | None,
        model: Kept | None,
    ) -> str:
        flagged = None if folder is None else _flagged(folder)
        run_id = self._start(record, table=flagged is not None)
        metrics: list[Metric] = []
        if record["status"] == "finished":
            assert folder is not None
            self._log_files(run_id, folder, flagged)
            metrics = run_metrics(record)
        else:
            self._log_failure(run_id, record)
        if rows is not None:
            self._client.log_inputs(run_id, [rows])
        model_id = None if model is None else self._models.begin(run_id, record, model)
        if model_id is not None:
            metrics = linked(metrics, model_id, None if rows is None else rows.dataset)
        # The last thing that a run gets before its own and its model's status. In one request with
        # the rest, unless that is split: the metrics of further requests would come after the tag.
        tag = RunTag(RECORD_TAG, record_id(record))
        whole = len(metrics) <= BATCH_METRICS
        self._client.log_batch(run_id, metrics, run_params(record), [tag] if whole else [])
        if not whole:
            self._client.set_tag(run_id, tag.key, tag.value)
        if model_id is not None:
            self._models.finish(model_id)
        self._client.set_terminated(run_id, _status(record), milliseconds(record["ended"]))
        return run_id

    def _complete(self, run: Run, record: Mapping[str, Any], folder: Path | None) -> bool:
        """Give a run of a record the status and files that it lacks. Return whether it did."""
        run_id, lacks_files = run.info.run_id, self._lacks_files(run)
        self._refuse_elsewhere(run)
        if lacks_files and folder is not None:
            self._log_files(run_id, folder, _flagged(folder))
        elif lacks_files:
            self._log_failure_files(run_id, record)
        right = run.info.status == _status(record)
        if not right:
            self._client.set_terminated(run_id, _status(record), milliseconds(record["ended"]))
        return lacks_files or not right

    def _lacks_files(self, run: Run) -> bool:
        """Return whether a run's artifacts were removed. Only known beside a SQLite file."""
        path = local_path(run.info.artifact_uri) if self._is_local else None
        return path is not None and not (os.path.isdir(path) and os.listdir(path))

    @cached_property
    def _database(self) -> Path | None:
        return database_of(self.uri)

    @property
    def _is_local(self) -> bool:
        return self._database is not None

    def _refuse_elsewhere(self, run: Run) -> None:
        """Raise a `UserError` if another user may have chosen where a run's artifacts go."""
        if self._database is not None:
            refuse_elsewhere(self._database, run.info.artifact_uri)

    def _log_files(self, run_id: str, folder: Path, flagged: pd.DataFrame | None) -> None:
        """Log the files of a finished cell, all at once. flagged: its table (`_flagged`)."""
        with tempfile.TemporaryDirectory(prefix="btu-run-") as staged:
            for name in (CONFIG, TOKENS, ROWS, PLOT, RESULT):
                if (folder / name).is_file():
                    os.symlink((folder / name).resolve(), Path(staged) / name)
            if flagged is not None:
                flagged.to_json(Path(staged) / FLAGGED, orient="split", index=False)
            self._client.log_artifacts(run_id, staged)

    def _log_failure(self, run_id: str, record: Mapping[str, Any]) -> None:
        self._log_failure_files(run_id, record)
        self._client.set_tag(run_id, "reason", record["reason"][:TAG_CHARACTERS])

    def _log_failure_files(self, run_id: str, record: Mapping[str, Any]) -> None:
        self._client.log_text(run_id, record["traceback"], "traceback.txt")
        config = yaml.safe_dump(record["config"], sort_keys=False)
        self._client.log_text(run_id, config, CONFIG)

    def _start(self, record: Mapping[str, Any], *, table: bool) -> str:
        """Create the run of a record. table: whether it gets a table of flagged tokens."""
        tables = [{"path": FLAGGED, "type": "table"}]
        run = self._client.create_run(
            self._id,
            start_time=milliseconds(record["started"]),
            tags={
                **{k: str(v)[:TAG_CHARACTERS] for k, v in run_tags(record).items()},
                ORIGIN_TAG: self._origin,
                **({TABLES_TAG: json.dumps(tables)} if table else {}),
            },
            run_name=run_name(record),
        )
        self._refuse_elsewhere(run)
        return str(run.info.run_id)

    def _all_runs(self) -> Iterator[Run]:
        """Yield every run that was written from this folder, deleted ones too."""
        token = None
        while True:
            page = self._client.search_runs(
                [self._id], run_view_type=ViewType.ALL, max_results=PAGE, page_token=token
            )
            yield from (run for run in page if self._is_ours(run))
            token = page.token
            if not token:
                return

    def _whole_run(self, record: Mapping[str, Any]) -> Run | None:
        """Return the run that contains the whole record; remove the cell's other runs."""
        whole = None
        for run in self._client.search_runs([self._id], f"tags.cell = '{record['key']}'"):
            if not self._is_ours(run):
                continue
            # This tag is the last thing that a run gets before its status.
            if whole is None and run.data.tags.get(RECORD_TAG) == record_id(record):
                whole = run
            else:
                self._client.delete_run(run.info.run_id)
        return whole

    def summary_is_current(self, fingerprint: str) -> bool:
        """Return whether MLflow has the summary run with this content.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        known, found = self._noted(SUMMARY), self._summary_runs()
        return (
            known.get("record") == fingerprint
            and [run.info.run_id for run in found] == [known.get("run_id")]
            and found[0].info.status == "FINISHED"
            and not self._lacks_files(found[0])
        )

    def summary_was_deleted(self) -> bool:
        """Return whether a user deleted the summary run.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        return "run_id" in self._noted(SUMMARY) and not self._summary_runs()

    def write_summary(self, made: Summary, fingerprint: str) -> None:
        """Update the summary run, or create it. fingerprint: identifies its content.

        Raises:
            Exception: the server cannot be reached, or refuses.
        """
        run = self._summary_run(made.metrics)
        self._refuse_elsewhere(run)
        now, run_id = int(time.time() * 1000), run.info.run_id
        logged = run.data.metrics
        # MLflow treats the value of the highest step as the latest, and fewer cells may be finished
        # than before: a damaged result is set aside.
        step = max(made.finished, int(run.data.tags[STEP_TAG]))
        # Only metrics that changed: a long sweep is summarized a thousand times.
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
            self._client.set_tag(run_id, TABLES_TAG, json.dumps(tables))
        self._client.set_terminated(run_id, "FINISHED", now)
        self._note(SUMMARY, {"record": fingerprint, "run_id": run_id})

    def _summary_run(self, metrics: Collection[str]) -> Run:
        """Return the summary run; the oldest if several launches created one.

        A run is replaced if it has metrics that the summary no longer has, because the sweep varies
        more keys now: MLflow cannot delete a metric. So is one whose files are elsewhere, because
        the database was copied without them: they belong to the original.
        """
        found = self._summary_runs()
        if (
            not found
            or not set(found[0].data.metrics) <= set(metrics)
            or self._is_elsewhere(found[0])
        ):
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

    def _is_elsewhere(self, run: Run) -> bool:
        """Return whether a run's files are not where the experiment's are. Only of SQLite files."""
        path = local_path(run.info.artifact_uri) if self._is_local else None
        if path is None:
            return False
        location = local_path(self._client.get_experiment(self._id).artifact_location)
        return location is not None and not path.is_relative_to(location)

    def _summary_runs(self) -> list[Run]:
        tagged = self._client.search_runs([self._id], f"tags.{KIND_TAG} = '{SUMMARY}'")
        # Another user's run may be tagged as a summary: it must not be changed or deleted.
        runs = [run for run in tagged if STEP_TAG in run.data.tags and self._is_ours(run)]
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _path(self, key: str) -> str:
        # Notes are kept per experiment, so that another MLflow store gets all runs. The id is
        # hashed because a server may use any characters.
        identity = identities[self.uri, self._id]
        where = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return f"{self._results.name}/{TRACKED}/{where}/{key}.json"

    def _noted(self, key: str) -> dict[str, str]:
        try:
            noted: dict[str, str] = json.loads(self._results.storage.read(self._path(key)))
        except FileNotFoundError:
            return {}
        except ValueError:  # damaged: ask MLflow
            return {"record": ""}
        return noted

    def _note(self, key: str, noted: Mapping[str, str]) -> None:
        self._results.storage.write(self._path(key), json.dumps(noted).encode())


def _flagged(folder: Path) -> pd.DataFrame | None:
    """Return the table of a cell's flagged tokens; None if it has none."""
    if not (folder / FLAGGED).is_file():
        return None
    flagged = pd.DataFrame(json.loads((folder / FLAGGED).read_text()))
    return flagged if len(flagged) else None


def _status(record: Mapping[str, Any]) -> str:
    """Return the status that the run of a record has in MLflow."""
    return "FINISHED" if record["status"] == "finished" else "FAILED"
