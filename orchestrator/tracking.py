"""MLflow, as a projection of the results on disk. The only file that imports mlflow.

A run is written in one go from a committed record, with the times that the record holds, so a
killed worker leaves no half-told run and writing it twice is found out by its tag.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

# The defaults retry a dead server for minutes per call; results wait on disk, so give up soon.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
import pandas as pd
import yaml
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from btu.errors import UserError
from orchestrator.config import Sweep, flatten, pins
from orchestrator.store import CONFIG, FLAGGED, PLOT, RESULT, TOKENS, ResultStore, read_record

logging.getLogger("mlflow").setLevel(logging.WARNING)

TRACKED = "tracked.json"
RECORD_TAG = "btu.record"
# MLflow refuses longer values of params and tags.
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 5000
# Params that get a column of their own under a short name; everything else keeps its dotted key.
SHORT = {
    "attack.name": "attack",
    "attack.poison_rate": "poison_rate",
    "defense.name": "defense",
    "defense.alpha": "alpha",
}
UNTRACKED_KEYS = ("resources",)


def tracking_uri(sweep: Sweep) -> str:
    """Return where the sweep's runs go: its own choice, or SQLite in the output folder."""
    uri = sweep.tracking.uri
    if uri is None:
        return default_uri(sweep.output)
    scheme = "sqlite:///"
    if uri.startswith(scheme):
        # Workers start in folders of their own, where a relative file would be another one.
        return scheme + str(Path(uri.removeprefix(scheme)).expanduser().resolve())
    return uri


def shown(uri: str) -> str:
    """Return a URI for people, without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def default_uri(output: Path) -> str:
    """Return the SQLite store of an output folder."""
    return f"sqlite:///{output.resolve() / 'mlflow.db'}"


def prepare(sweep: Sweep) -> str:
    """Create store and experiment, check that they answer, and return the experiment's id.

    Done once, before any worker: creating a database's tables takes seconds and must not race.

    Raises:
        UserError: the tracking server does not answer, or the URI is none.
    """
    uri = tracking_uri(sweep)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(sweep.name)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise UserError(
                    f"experiment '{sweep.name}' was deleted in the MLflow store {shown(uri)}; "
                    "restore it there, or give the sweep another name."
                )
            experiment_id = str(found.experiment_id)
        else:
            local = uri.startswith("sqlite:///")
            artifacts = (sweep.output / "mlartifacts" / sweep.name).as_uri() if local else None
            experiment_id = str(client.create_experiment(sweep.name, artifact_location=artifacts))
        client.set_experiment_tag(experiment_id, "mlflow.note.content", _experiment_note(sweep))
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"tracking.uri {shown(uri)} needs a package that is not installed: {error}. Install "
            "it (for PostgreSQL: pip install psycopg2-binary), or name an MLflow server (HTTP)."
        ) from error
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        raise UserError(
            f"tracking.uri {shown(uri)} does not answer: {str(error).splitlines()[0]} Start the "
            "server, correct tracking.uri, or leave it null for a local SQLite file."
        ) from error
    if uri.startswith("sqlite:///"):
        # Readers no longer wait for writers: 1.9x the runs per second from several workers.
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return experiment_id


def _experiment_note(sweep: Sweep) -> str:
    axes = ", ".join(f"`{key}` {values}" for key, values in sweep.grid.items())
    return (
        f"Sweep **{sweep.name}** over {axes or 'a single cell'}.\n\n"
        f"One run per cell; table: `btu report {sweep.name}`.\n\n```yaml\n{sweep.text}```\n"
    )


def log_cell(uri: str, experiment_id: str, store: ResultStore, key: str) -> None:
    """Write a finished cell as a run, unless it is there already."""
    folder = store.path(key)
    marker = folder / TRACKED
    if _tracked_in(marker) == uri:
        return
    record = read_record(folder / RESULT)
    client = mlflow.MlflowClient(tracking_uri=uri)
    run_id = _find(client, experiment_id, record)
    if run_id is None:
        run_id = _start(client, experiment_id, record)
        client.log_batch(run_id, metrics=_metrics(record), params=_params(record))
        for name in (CONFIG, TOKENS, PLOT, RESULT):
            if (folder / name).is_file():
                client.log_artifact(run_id, str(folder / name))
        flagged = pd.DataFrame(json.loads((folder / FLAGGED).read_text()))
        if len(flagged):
            client.log_table(run_id, flagged, FLAGGED)
        client.set_tag(run_id, RECORD_TAG, _record_id(record))
        client.set_terminated(run_id, "FINISHED", end_time=_milliseconds(record["ended"]))
    staged = marker.with_suffix(f".{uuid.uuid4().hex}")
    staged.write_text(json.dumps({"uri": uri, "run_id": run_id}))
    os.replace(staged, marker)


def _tracked_in(marker: Path) -> str | None:
    """Return the store that holds the cell's run; None if unknown, and MLflow is asked."""
    try:
        return str(json.loads(marker.read_text())["uri"])
    except (OSError, ValueError, KeyError):
        return None


def log_failure(uri: str, experiment_id: str, record: Mapping[str, Any]) -> None:
    """Write a failed cell as a run with status FAILED and its reason."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    if _find(client, experiment_id, record) is not None:
        return
    run_id = _start(client, experiment_id, record)
    client.log_batch(run_id, params=_params(record))
    client.log_text(run_id, record["traceback"], "traceback.txt")
    client.log_text(run_id, yaml.safe_dump(record["config"], sort_keys=False), CONFIG)
    client.set_tag(run_id, "reason", record["reason"][:TAG_CHARACTERS])
    client.set_tag(run_id, RECORD_TAG, _record_id(record))
    client.set_terminated(run_id, "FAILED", end_time=_milliseconds(record["ended"]))


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


def _find(client: mlflow.MlflowClient, experiment_id: str, record: Mapping[str, Any]) -> str | None:
    # The tag is set last, so a run that was cut short has none and is written again.
    runs = client.search_runs(
        [experiment_id], f"tags.`{RECORD_TAG}` = '{_record_id(record)}'", max_results=1
    )
    return str(runs[0].info.run_id) if runs else None


def _record_id(record: Mapping[str, Any]) -> str:
    return f"{record['key']}-{_milliseconds(record['started'])}"


def _start(client: mlflow.MlflowClient, experiment_id: str, record: Mapping[str, Any]) -> str:
    # What a killed worker left half-told is told again in whole.
    for run in client.search_runs([experiment_id], f"tags.cell = '{record['key']}'"):
        unfinished = RECORD_TAG not in run.data.tags
        if unfinished and run.info.start_time == _milliseconds(record["started"]):
            client.delete_run(run.info.run_id)
    tags = {
        "mlflow.source.name": "btu",
        "mlflow.note.content": _run_note(record),
        "cell": record["key"],
        **record["tags"],
    }
    run = client.create_run(
        experiment_id,
        start_time=_milliseconds(record["started"]),
        tags={k: str(v)[:TAG_CHARACTERS] for k, v in tags.items()},
        run_name=run_name(record),
    )
    return str(run.info.run_id)


def run_name(record: Mapping[str, Any]) -> str:
    """Return what tells the cell from its siblings: ``badnets poison_rate=0.1 seed=0``."""
    config, varied = record["config"], record["varied"]
    parts = [
        f"{key.split('.')[-1]}={value}" for key, value in varied.items() if key != "attack.name"
    ]
    return " ".join([config["attack"]["name"], *parts])


def _run_note(record: Mapping[str, Any]) -> str:
    return (
        f"Cell `{record['key']}` of sweep `{record['sweep']}`. Again, in one process: "
        f"`btu trial SWEEP.yaml {pins(record['varied'])}`, or with the artifact: "
        "`btu trial config.yaml`."
    )


def _params(record: Mapping[str, Any]) -> list[Param]:
    config = {k: v for k, v in record["config"].items() if k not in UNTRACKED_KEYS}
    flat = {SHORT.get(key, key): value for key, value in flatten(config).items()}
    # A key that is not set would only be an empty column in the runs table.
    return [
        Param(key, str(value)[:PARAM_CHARACTERS])
        for key, value in flat.items()
        if value is not None and value != ""
    ]


def _metrics(record: Mapping[str, Any]) -> list[Metric]:
    ended = _milliseconds(record["ended"])
    metrics = [
        Metric(_metric_name(name), float(value), ended, 0)
        for name, value in record["metrics"].items()
    ]
    metrics += [
        Metric(f"data/{name}", float(value), ended, 0) for name, value in record["notes"].items()
    ]
    clock = record["started"]
    for epoch in record["history"]:
        clock += epoch["seconds"]
        stage = _metric_name(epoch["stage"])
        for name in ("loss", "accuracy"):
            metrics.append(
                Metric(f"{name}/{stage}", epoch[name], _milliseconds(clock), epoch["epoch"])
            )
    return metrics


def _metric_name(name: str) -> str:
    return name.replace(" ", "_").replace("(", "").replace(")", "").replace("-", "_")


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
