"""The experiment of a sweep, and its view in the MLflow UI."""

from __future__ import annotations

import json
import shlex
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from btu.errors import UserError
from orchestrator.sweep.modes.axes import GridMode
from orchestrator.sweep.sweep import Sweep
from orchestrator.sweep.trust import TRACKING_VARIABLE
from orchestrator.tracking.database import database_of, make_database, use_wal
from orchestrator.tracking.elsewhere import refuse_elsewhere
from orchestrator.tracking.moved import artifact_folder, check_folder, relocate
from orchestrator.tracking.runs import ID_TAG, SUMMARY, TAG_CHARACTERS
from orchestrator.tracking.server import (
    REFUSALS,
    identities,
    is_busy,
    is_sqlite,
    reason_of,
    set_tag,
    shown,
    store_identity,
    tracking_uri,
)

# Where databases listen whose URI names no port.
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
REACH_SECONDS = 10.0
# MLflow's runs table shows no metric by default. It does at an address that names a view. Views are
# tags of the experiment, in the format of MLflow's own "Share" button.
VIEW = "btu"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_COLUMNS = (
    *(f"params.`{name}`" for name in ("attack", "poison_rate", "defense", "threshold", "seed")),
    *(f"metrics.`{name}`" for name in ("asr", "cacc", "detection_precision")),
)


def prepare(
    sweep: Sweep, tell: Callable[[str], None] = lambda line: None
) -> tuple[str | None, str]:
    """Create store and experiment. Return the experiment's id, or None and the reason.

    Called once, before any worker starts: creating a database takes seconds and must not race.
    A store that does not answer now is not an error: its runs are written later from the results.

    tell: called with a line if the output folder was moved or copied.

    Raises:
        UserError: the URI can never work: no such database, driver or experiment.
    """
    hint = "correct tracking.uri, or leave it null for a local SQLite file."
    if TRACKING_VARIABLE in sweep.given:
        hint = f"correct {TRACKING_VARIABLE}, or unset it for a local SQLite file."
    elif sweep.tracking.uri is None:
        hint = "or name another folder with output=FOLDER."
    return _open(tracking_uri(sweep), sweep.name, _experiment_note(sweep), hint, tell)


def has_no_run(uri: str, experiment_id: str) -> bool:
    """Return whether an experiment has no run, deleted ones included; False if nobody answers."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    try:
        found = client.search_runs([experiment_id], run_view_type=ViewType.ALL, max_results=1)
    except REFUSALS:
        return False  # the runs are looked up one by one, and whoever does meets the same error
    return not found


def experiment(uri: str, name: str, tell: Callable[[str], None] = lambda line: None) -> str:
    """Return the id of a sweep's experiment. Create store and experiment if they are missing.

    tell: called with a line if the output folder was moved or copied.

    Raises:
        UserError: the store does not answer, or the URI cannot work.
    """
    hint = "or correct --uri."
    experiment_id, reason = _open(uri, name, None, hint, tell)
    if experiment_id is None:
        raise UserError(_no_answer(uri, reason, hint))
    return experiment_id


def _open(
    uri: str, name: str, note: str | None, hint: str, tell: Callable[[str], None]
) -> tuple[str | None, str]:
    """Create store and experiment. Return the experiment's id, or None and the store's reason.

    uri: the MLflow store.
    name: the sweep's name.
    note: the experiment's description; None leaves it as it is.
    hint: what the user can do about the URI.
    tell: called with a line if the output folder was moved or copied.

    Raises:
        UserError: the URI can never work.
    """
    try:
        database = database_of(uri)
        if database is not None:
            make_database(database)
        else:
            _reach(uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = _find_or_create(client, name, _artifacts(database, name), note)
        if found.lifecycle_stage != "active":
            raise UserError(deleted_experiment(uri, found))
        if database is not None:
            moved = relocate(uri, database, found)
            if moved:
                tell(moved)
                found = client.get_experiment(found.experiment_id)
        check_folder(found)
        if database is not None:
            refuse_elsewhere(database, found.artifact_location)
        experiment_id = str(found.experiment_id)
        if note is not None and found.tags.get("mlflow.note.content") != note:
            set_tag(client, experiment_id, "mlflow.note.content", note)
        if found.tags.get(VIEW_TAG) != _view():
            set_tag(client, experiment_id, VIEW_TAG, _view())
        identities[uri, experiment_id] = store_identity(client, found)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"tracking.uri {shown(uri)} needs a package that is not installed: {error}. Install "
            "it (for PostgreSQL: pip install 'btu[postgres]'), or name an MLflow server (HTTP)."
        ) from error
    except REFUSALS as error:
        reason = reason_of(error)
        if uri.startswith(("http://", "https://")) or is_busy(error):
            return None, reason
        raise UserError(_no_answer(uri, reason, hint)) from error
    if database is not None:
        use_wal(database)
    return experiment_id, ""


def _reach(uri: str) -> None:
    """Connect once to the host of a database. MLflow would try for a minute and a half.

    Raises:
        ImportError: its driver is not installed.
        OSError: it does not answer.
    """
    if "://" not in uri or uri.startswith(("http://", "https://")):
        return
    with suppress(ArgumentError):  # MLflow says what is wrong with a URI that is none
        url = make_url(uri)
        url.get_dialect().import_dbapi()
        port = url.port or DATABASE_PORTS.get(url.get_backend_name())
        if url.host and port:
            socket.create_connection((url.host, port), REACH_SECONDS).close()


def _no_answer(uri: str, reason: str, hint: str) -> str:
    return f"tracking.uri {shown(uri)} does not answer: {reason} {remedy(uri, reason, hint)}"


def remedy(uri: str, reason: str, hint: str) -> str:
    """Return what the user can do about a store that refused.

    uri: the MLflow store.
    reason: the first line of its refusal.
    hint: what the user can do about the URI, as the end of a sentence.
    """
    if "revision" in reason or "schema" in reason:
        upgrade = f"mlflow db upgrade {shlex.quote(shown(uri))}"
        return (
            f"Another version of MLflow made the database; this is {mlflow.__version__}. Install "
            f"that version, or, for an older database, back it up and give: {upgrade}"
        )
    if is_sqlite(uri) and "readonly" in reason:
        return f"Make the file and its folder writable, {hint}"
    if is_sqlite(uri) and "locked" in reason:
        return "End the process that holds the database, or try again later."
    return f"Start the server, {hint}"


def deleted_experiment(uri: str, found: Experiment) -> str:
    """Return the error about an experiment that was deleted, with the command that restores it."""
    restore = ["mlflow", "experiments", "restore", "--experiment-id", str(found.experiment_id)]
    return (
        f"experiment '{found.name}' was deleted in the MLflow store {shown(uri)}; restore it with "
        f"MLFLOW_TRACKING_URI={shlex.quote(shown(uri))} {shlex.join(restore)}, or give the sweep "
        "another name."
    )


def _find_or_create(
    client: mlflow.MlflowClient, name: str, artifacts: str | None, note: str | None
) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found
    # The tags are set with the experiment: launches that set them later could collide.
    tags = {ID_TAG: uuid.uuid4().hex, VIEW_TAG: _view()}
    if note is not None:
        tags["mlflow.note.content"] = note
    try:
        made = client.create_experiment(name, artifact_location=artifacts, tags=tags)
    except (MlflowException, SQLAlchemyError):
        # Another launch may have created it in the meantime.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found
    return client.get_experiment(made)


def _artifacts(database: Path | None, name: str) -> str | None:
    """Return the artifact folder beside the experiment's database; None lets a server choose.

    MLflow's own default would be a folder in the current directory.
    """
    return None if database is None else artifact_folder(database, name).as_uri()


def _experiment_note(sweep: Sweep) -> str:
    grid = sweep.mode(GridMode)
    axes = ", ".join(f"`{key}` {values}" for key, values in grid.values.items()) if grid else ""
    note = (
        f"Sweep **{sweep.name}** over {axes or 'a single cell'}.\n\n"
        f"One run per cell, and the run `{SUMMARY}` with means over seeds, tables and a page. In "
        f"the runs table the button *Columns* adds `asr`, `cacc`, `detection_precision`; search "
        f"for `tags.kind = 'trial'` to leave the summary out.\n\n"
        f"Table: `btu report {sweep.name} --mean`. Run or resume it: "
        "`btu launch sweep.yaml`, with "
    )
    whole = f"{note}this file:\n\n```yaml\n{sweep.text}```\n"
    # Too long for a description: the summary run has the file.
    return whole if len(whole) <= TAG_CHARACTERS else f"{note[:4000]}that artifact of the summary."


def _view() -> str:
    return json.dumps({"selectedColumns": VIEW_COLUMNS})


def views(uri: str, tell: Callable[[str], None] = lambda line: None) -> dict[str, str]:
    """Return the address of each sweep's runs table, relative to the UI's, newest sweep first.

    The UI reads artifacts where the database says that they are: addresses of a folder that was
    moved or copied are corrected first.

    tell: called with a line for each sweep whose addresses were corrected.

    Raises:
        UserError: the store cannot be read.
    """
    try:
        found = mlflow.MlflowClient(tracking_uri=uri).search_experiments(
            order_by=["last_update_time DESC"]
        )
        database = database_of(uri)
        for each in found:
            if database is not None and VIEW_TAG in each.tags:
                moved = relocate(uri, database, each)
                if moved:
                    tell(moved)
    except REFUSALS as error:
        raise UserError(
            f"the MLflow store {shown(uri)} cannot be read: {reason_of(error)} Name another one "
            "with --uri."
        ) from error
    # Without the last parameter MLflow opens its pages for language-model traces.
    return {
        each.name: f"/#/experiments/{each.experiment_id}/runs?viewStateShareKey={VIEW}"
        "&workflowType=machine_learning"
        for each in found
        if VIEW_TAG in each.tags
    }
