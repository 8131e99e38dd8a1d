"""Artifacts of a SQLite store whose folder was moved or copied.

MLflow records the place of artifacts as an absolute address, per experiment and per run. In a copy
of an output folder these addresses still name the original: new runs would be written there, and
the summary of the original would be replaced. Addresses of the form ``<folder>/mlartifacts/<name>``
are therefore compared with the folder of the database. Other addresses were chosen by a user or a
server and are never changed.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow.entities import Experiment
from sqlalchemy import Connection, create_engine, select, update

from btu.errors import UserError

ARTIFACTS = "mlartifacts"


def artifact_folder(database: Path, name: str) -> Path:
    """Return where the artifacts of an experiment are: beside its database."""
    return database.parent / ARTIFACTS / name


def local_path(address: str | None) -> Path | None:
    """Return the folder of an artifact address; None if it is not on this machine."""
    parts = urlsplit(address or "")
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    return Path(address) if address and address.startswith("/") else None


def folder_beside(database: Path, address: str | None) -> Path | None:
    """Return the folder beside the database that stands for a run's artifacts elsewhere.

    None if the address is right as it is, or the folder does not exist.
    """
    recorded = local_path(address)
    if recorded is None or len(recorded.parts) < 5:
        return None
    beside = _beside(database, recorded, depth=4)
    return beside if beside is not None and os.path.isdir(beside) else None


def relocate(uri: str, database: Path, found: Experiment) -> str:
    """Bring the artifact addresses of an experiment and of its runs to the database's folder.

    All of them change in one transaction. A run keeps its address if its artifacts are there and
    not here: the database was copied alone.

    uri, database: the SQLite store, and its file.
    found: the experiment.

    Returns:
        A line for the user; empty if nothing changed.

    Raises:
        SQLAlchemyError: the database cannot be written.
    """
    old = local_path(found.artifact_location)
    if old is None:
        return ""
    new = _new_location(database, found.name, old)
    engine = create_engine(uri)
    try:
        with engine.begin() as connection:
            runs = _move_runs(connection, database, int(found.experiment_id), new or old)
            if new is not None:
                _move_models(connection, int(found.experiment_id), old, new)
                _move_experiment(connection, int(found.experiment_id), new)
    finally:
        engine.dispose()
    if new is None and not runs:
        return ""
    was = f"was {old.parent.parent}" if new is not None else "was moved or copied"
    return (
        f"The output folder {was}: in MLflow, artifacts of experiment '{found.name}' and of {runs} "
        f"runs are now in {database.parent / ARTIFACTS}."
    )


def check_folder(found: Experiment) -> None:
    """Raise a `UserError` if the artifacts of an experiment are to go where no folder can be."""
    path = local_path(found.artifact_location)
    for folder in () if path is None else (path, *path.parents):
        # A link to nowhere does not exist either, but its name is taken.
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise UserError(
                f"{folder} is no folder (a file, or a link to nowhere), but MLflow's artifacts of "
                f"experiment '{found.name}' go there; move it away, or name another output."
            )


def _new_location(database: Path, name: str, old: Path) -> Path | None:
    """Return the artifact folder of an experiment beside its database; None if `old` stays."""
    # MLflow's own folders are named after the number of the experiment.
    if len(old.parts) < 3 or (old.name.isdigit() and old.name != name):
        return None
    new = _beside(database, old, depth=2)
    if new is None:
        return None
    # `os.path`, since a `Path` raises where a folder may not be read.
    here, there = os.path.isdir(new), os.path.exists(old)
    # Artifacts only there: put there on purpose, unless another database there uses them.
    shared = there and not here and not os.path.isfile(old.parent.parent / database.name)
    return None if shared else new


def _beside(database: Path, recorded: Path, depth: int) -> Path | None:
    """Return the path in the database's folder that stands for a recorded one.

    None if the recorded one is not of the form ``<folder>/mlartifacts/...``, or is in that folder.

    depth: how many parts the path has from ``mlartifacts`` on.
    """
    tail = recorded.parts[-depth:]
    folder = Path(*recorded.parts[:-depth])
    if tail[0] != ARTIFACTS or folder == database.parent:
        return None
    # One folder by two paths: a link, or a second mount.
    if os.path.isdir(folder) and os.path.samefile(folder, database.parent):
        return None
    return database.parent.joinpath(*tail)


def _move_runs(connection: Connection, database: Path, experiment: int, location: Path) -> int:
    from mlflow.store.tracking.dbmodels.models import SqlRun

    rows = connection.execute(
        select(SqlRun.run_uuid, SqlRun.artifact_uri).where(SqlRun.experiment_id == experiment)
    ).all()
    moved = 0
    for run, address in rows:
        target = _target(database, location, address)
        if target is not None:
            moved += connection.execute(
                update(SqlRun)
                .where(SqlRun.run_uuid == run, SqlRun.artifact_uri == address)
                .values(artifact_uri=target.as_uri())
            ).rowcount
    return moved


def _move_models(connection: Connection, experiment: int, old: Path, new: Path) -> None:
    """Have files that a user adds to a logged model go where those of its experiment are."""
    from mlflow.store.tracking.dbmodels.models import SqlLoggedModel

    rows = connection.execute(
        select(SqlLoggedModel.model_id, SqlLoggedModel.artifact_location).where(
            SqlLoggedModel.experiment_id == experiment
        )
    ).all()
    for model, address in rows:
        recorded = local_path(address)
        if recorded is not None and recorded.is_relative_to(old):
            connection.execute(
                update(SqlLoggedModel)
                .where(SqlLoggedModel.model_id == model)
                .values(artifact_location=(new / recorded.relative_to(old)).as_uri())
            )


def _target(database: Path, location: Path, address: str | None) -> Path | None:
    """Return where the artifacts of a run are to be; None if its address stays as it is.

    location: where those of its experiment are.
    """
    recorded = local_path(address)
    if recorded is None or len(recorded.parts) < 5 or recorded.is_relative_to(location):
        return None
    target = _beside(database, recorded, depth=4)
    if target is None or (os.path.isdir(recorded) and not os.path.isdir(target)):
        return None
    return target


def _move_experiment(connection: Connection, experiment: int, new: Path) -> None:
    from mlflow.store.tracking.dbmodels.models import SqlExperiment

    connection.execute(
        update(SqlExperiment)
        .where(SqlExperiment.experiment_id == experiment)
        .values(artifact_location=new.as_uri())
    )
