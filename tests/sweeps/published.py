"""A tiny sweep whose results are on disk, and what a launch does to MLflow for it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import config, shelve

from orchestrator.results.folder import Results

NAME = "made"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store without sweeps: creating its tables takes seconds."""
    from orchestrator.tracking.database import make_database

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_database(path)
    return path


def forget() -> None:
    """Forget what a process keeps of MLflow stores: each command is a process of its own."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service import utils
    from mlflow.tracking._tracking_service.registry import TrackingStoreRegistry

    from orchestrator.tracking import server

    server.unanswered.clear()
    server.identities.clear()
    utils._artifact_repos_cache.clear()
    TrackingStoreRegistry._get_store_with_resolved_uri.cache_clear()
    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()
    SqlAlchemyStore._engine_map.clear()


class Output:
    """An output folder with the sweep `NAME`, its results without training."""

    def __init__(self, folder: Path, database: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        if database is not None:
            shutil.copy(database, self.database)

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    @property
    def uri(self) -> str:
        from orchestrator.tracking.server import default_uri

        return default_uri(str(self.folder))

    @property
    def results(self) -> Results:
        return Results(str(self.folder), NAME)

    def compute(self, cells: int) -> None:
        """Have so many finished cells, one per seed."""
        made: list[Any] = [
            (config(seed=seed, threshold=4.5), {"asr": 0.5, "cacc": 0.75, "undefended_asr": 1.0})
            for seed in range(cells)
        ]
        shelve(self.folder, made, NAME, tokens=40)
        plan = self.folder / NAME / "plans" / "plan.json"
        listed = json.loads(plan.read_text())
        for seed, cell in enumerate(listed["cells"]):
            cell["varied"] = {"seed": seed}
        plan.write_text(json.dumps(listed))

    def launch(self, uri: str | None = None) -> list[str]:
        """Write to MLflow as a launch does; return the lines that it prints."""
        from orchestrator.run.publish import Publisher
        from orchestrator.sweep.load import load_sweep

        forget()
        file = self.folder / NAME / "again.yaml"
        file.write_text(yaml.safe_dump({"name": NAME, "output": str(self.folder)}))
        lines: list[str] = []
        sweep = load_sweep(file, [f"tracking.uri={uri}"] if uri else [])
        publisher = Publisher(sweep, self.results, lines.append)
        publisher.prepare()
        publisher.synchronize("me", interrupted=False)
        forget()
        return lines

    def rows(self, query: str) -> list[Any]:
        """Return what a query of the database gives, without MLflow."""
        with closing(sqlite3.connect(self.database)) as connection:
            return list(connection.execute(query))

    def change(self, statement: str) -> None:
        with closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute(statement)

    def runs(self) -> list[tuple[str, str]]:
        """Return the names and statuses of the runs that are not deleted."""
        found = self.rows("SELECT name, status FROM runs WHERE lifecycle_stage = 'active'")
        return sorted(found)

    def locations(self) -> list[str]:
        """Return the addresses of the artifacts of the experiment and of all runs."""
        query = f"SELECT artifact_location FROM experiments WHERE name = '{NAME}'"
        runs = "SELECT artifact_uri FROM runs"
        return [address for (address,) in (*self.rows(query), *self.rows(runs))]

    def artifacts(self) -> dict[str, bytes]:
        """Return the content of every file below ``mlartifacts``, by path."""
        root = self.folder / "mlartifacts"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
