"""A sweep's results, read from MLflow."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pandas as pd
from mlflow.entities import Run, ViewType

from btu.errors import UserError, unknown
from btu.result_files import ROWS, TOKENS
from orchestrator.results.source import read_table
from orchestrator.tracking.database import database_of, reading_uri
from orchestrator.tracking.elsewhere import refuse_host
from orchestrator.tracking.experiment import deleted_experiment, remedy
from orchestrator.tracking.moved import folder_beside
from orchestrator.tracking.runs import (
    CELL_TAG,
    CURVES,
    NOTES,
    ORIGIN_TAG,
    OWN_TAGS,
    PAGE,
    RECORD_TAG,
)
from orchestrator.tracking.server import REFUSALS, absolute, reason_of, shown


class RunState(NamedTuple):
    """The state of a run.

    cell: the key, empty for a run of no cell.
    status: as in MLflow.
    origin: the id of the folder that it was written from.
    whole: everything was written to it.
    deleted: a user, or a newer run of the cell, has deleted it.
    """

    run_id: str
    cell: str
    status: str
    origin: str = ""
    whole: bool = True
    deleted: bool = False


class MlflowSource:
    """A `Source` that reads a sweep's results from its MLflow experiment alone.

    Metrics are those of the runs. If a cell has several runs, the newest finished one counts.
    """

    def __init__(self, uri: str, name: str, warn: Callable[[str], None] | None = None) -> None:
        """Find the experiment. warn: called with a sentence about runs that are left out.

        Raises:
            UserError: MLflow does not answer, or has no such experiment ("did you mean").
        """
        self.uri, self._name, self._warn = absolute(uri), name, warn
        self._told_unreachable = False
        self._database = database_of(self.uri)
        if self._database is not None and not os.access(self._database, os.R_OK):
            # MLflow would create it.
            how = "cannot be read" if os.path.lexists(self._database) else "does not exist"
            raise UserError(f"{shown(self.uri)} {how}; correct --tracking-uri.")
        with self._answering():
            self._client = mlflow.MlflowClient(tracking_uri=reading_uri(self.uri))
            found = self._client.get_experiment_by_name(name)
            if found is None:
                known = [e.name for e in self._client.search_experiments() if e.name != "Default"]
                where = f"sweep in {shown(self.uri)}"
                raise UserError(f"{unknown(where, name, known)}; launch or sync it first.")
        if found.lifecycle_stage != "active":
            raise UserError(deleted_experiment(self.uri, found))
        self._id = str(found.experiment_id)

    @property
    def name(self) -> str:
        return self._name

    def records(self) -> list[dict[str, Any]]:
        return [self._record(run) for run in self._cells.values() if _is_finished(run)]

    def failures(self) -> list[dict[str, Any]]:
        return [self._record(run) for run in self._cells.values() if not _is_finished(run)]

    def states(self) -> list[RunState]:
        """Return the state of every run of the sweep, including unfinished and deleted ones."""
        with self._answering():
            return [
                RunState(
                    run.info.run_id,
                    run.data.tags.get("cell", ""),
                    run.info.status,
                    run.data.tags.get(ORIGIN_TAG, ""),
                    RECORD_TAG in run.data.tags,
                    run.info.lifecycle_stage != "active",
                )
                for run in self._search(ViewType.ALL)
            ]

    def tokens(self, key: str) -> pd.DataFrame | None:
        return self._table(key, TOKENS)

    def rows(self, key: str) -> pd.DataFrame | None:
        return self._table(key, ROWS)

    @cached_property
    def _cells(self) -> dict[str, Run]:
        """Each cell's run that counts, by key."""
        found: dict[str, Run] = {}
        with self._answering():
            runs = sorted(self._search(), key=lambda run: run.info.start_time)
        for run in runs:
            tags = run.data.tags
            if f"{CELL_TAG}0" not in tags or run.info.status not in ("FINISHED", "FAILED"):
                continue  # a summary, another tool's run, or one that was not completed
            before = found.get(tags["cell"])
            if before is None or _is_finished(run) or not _is_finished(before):
                found[tags["cell"]] = run
        return dict(sorted(found.items()))

    def _search(self, which: int = ViewType.ACTIVE_ONLY) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._id], run_view_type=which, max_results=PAGE, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _record(self, run: Run) -> dict[str, Any]:
        tags = run.data.tags
        cell = json.loads("".join(_numbered(tags, CELL_TAG)))
        finished = _is_finished(run)
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
            # The status of a finished cell's run may have been set by hand.
            by_hand = (
                f"run {run.info.run_id} was set to {run.info.status} in MLflow; btu sync undoes it"
            )
            record |= {
                "stage": cell.get("stage", "cell"),
                "reason": tags.get("reason", by_hand),
            }
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
            path = self._file(run, name, Path(folder))
            if path is None:
                return None
            try:
                return read_table(path)
            except (ValueError, OSError) as error:
                raise UserError(
                    f"artifact {name} of run {run_id} cannot be read ({reason_of(error)}); write "
                    "it again, or delete the run."
                ) from error

    def _file(self, run: Run, name: str, folder: Path) -> Path | None:
        """Return an artifact of a run as a file, in `folder` if it is fetched; None if none."""
        beside = self._database and folder_beside(self._database, run.info.artifact_uri)
        if beside is not None:
            # Of a moved or copied folder. Only a launch or a sync changes what MLflow has recorded.
            return beside / name if (beside / name).is_file() else None
        if self._database is not None:
            refuse_host(self._database, run.info.artifact_uri)
        kept = {entry.path for entry in self._client.list_artifacts(run.info.run_id)}
        if not kept:
            self._unreachable(run)
        if name not in kept:
            return None
        return Path(self._client.download_artifacts(run.info.run_id, name, str(folder)))

    def _unreachable(self, run: Run) -> None:
        """Warn once that artifacts are missing.

        MLflow lists nothing for a missing artifact folder, as if none had been logged; but every
        finished run has a `RESULT`.
        """
        if not self._told_unreachable and self._warn is not None:
            self._warn(
                f"run {run.info.run_id} has no artifacts at {shown(run.info.artifact_uri)}: what "
                "needs token scores (curves, drift plots) leaves out this run and similar ones. "
                "Was the folder moved, or the database copied alone? Put it back, or have btu sync "
                "write it again from the results on disk."
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
        except REFUSALS as error:
            reason = reason_of(error)
            raise UserError(
                f"MLflow at {shown(self.uri)} does not answer: {reason} "
                f"{remedy(self.uri, reason, 'or correct --tracking-uri.')}"
            ) from error


def _is_finished(run: Run) -> bool:
    """Return whether a run that ended has a result. Its status may have been set by hand."""
    return run.info.status == "FINISHED" and "reason" not in run.data.tags


def _numbered(tags: Mapping[str, str], prefix: str) -> Iterator[str]:
    number = 0
    while (name := f"{prefix}{number}") in tags:
        yield tags[name]
        number += 1
