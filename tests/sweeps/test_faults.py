"""Sweeps to which something happens, for real: afterwards all is as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import GRID, Workplace, all_measured, check, computed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(tmp_path: Path, database: Path) -> Iterator[Workplace]:
    made = Workplace(tmp_path, database, faulty=True)
    yield made
    made.close()


def test_time(make_sweep: Callable[..., Path], place: Workplace) -> None:
    done = place.run("launch", make_sweep(grid=GRID))
    print(done)
    print(computed(place.output))
    check(place.output, all_measured(place.results()))
    done = place.run("launch", make_sweep(grid=GRID))
    print(done)
