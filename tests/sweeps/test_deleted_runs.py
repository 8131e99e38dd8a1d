"""Runs that a user changed in MLflow: deleted, restored, renamed, or without their files."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from published import NAME, Output, empty_database, forget

from btu.errors import UserError

__all__ = ["empty_database"]


class Place:
    """An output with two cells in MLflow, and its commands."""

    def __init__(self, output: Output, run_cli: Callable[..., Any]) -> None:
        self.output, self._run = output, run_cli

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.output.uri)

    def run(self, command: str, *options: object) -> Any:
        forget()
        done = self._run(command, NAME, "--output", self.output.folder, *options)
        forget()
        return done

    def mlflow_line(self) -> str:
        """Return what `btu status` prints about MLflow."""
        return str(self.run("status").out).partition("mlflow.db: ")[2]

    def id_of(self, name: str) -> str:
        """Return the id of the one active run of this name."""
        query = "SELECT name, run_uuid FROM runs WHERE lifecycle_stage = 'active'"
        (found,) = [run for one, run in self.output.rows(query) if one == name]
        return str(found)


SEED_0, SEED_1 = "badnets seed=0", "badnets seed=1"
ALL = [(SEED_0, "FINISHED"), (SEED_1, "FINISHED"), ("summary", "FINISHED")]


@pytest.fixture
def place(tmp_path: Path, empty_database: Path, run_cli: Callable[..., Any]) -> Place:
    output = Output(tmp_path / "runs", empty_database)
    output.compute(2)
    assert output.launch() == []
    assert output.runs() == ALL
    return Place(output, run_cli)


@pytest.mark.slow
def test_status_and_sync_agree_on_a_deleted_run(place: Place) -> None:
    assert place.mlflow_line() == "2 finished, 0 failed."
    place.client.delete_run(place.id_of(SEED_0))
    sync = f"btu sync {NAME} --output {place.output.folder}"
    missing = (
        "1 finished, 0 failed; 1 missing (1 of them deleted in MLflow). "
        f"{sync} writes and closes them; --respect-deleted leaves out the deleted ones."
    )
    assert place.mlflow_line() == missing
    done = place.run("sync", "--respect-deleted")
    assert done.code == 0, done.err
    assert done.out.startswith("0 runs written, 0 unfinished ones closed, 0 still missing in ")
    assert "Runs that had been deleted in MLflow: 1, left out." in done.out
    assert place.output.runs() == ALL[1:]
    assert place.mlflow_line() == missing
    done = place.run("sync")
    assert done.out.startswith("1 runs written, 0 unfinished ones closed, 0 still missing in ")
    assert "in MLflow: 1, written again; --respect-deleted leaves them out." in done.out
    assert place.output.runs() == ALL
    assert place.mlflow_line() == "2 finished, 0 failed."
    assert place.run("sync").out.startswith("0 runs written")


@pytest.mark.slow
def test_a_launch_writes_a_deleted_run_again(place: Place) -> None:
    for name in (SEED_1, "summary"):
        place.client.delete_run(place.id_of(name))
    assert place.output.launch() == []
    assert place.output.runs() == ALL


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["for good", "and not noted"])
def test_a_run_that_was_deleted_is_known_in_mlflow_or_on_disk(place: Place, gone: str) -> None:
    run = place.id_of(SEED_0)
    place.client.delete_run(run)
    if gone == "for good":  # as `mlflow gc` does
        for table, column in (
            ("metrics", "run_uuid"), ("latest_metrics", "run_uuid"), ("params", "run_uuid"),
            ("tags", "run_uuid"), ("runs", "run_uuid"),
        ):  # fmt: skip
            place.output.change(f"DELETE FROM {table} WHERE {column} = '{run}'")
    else:
        shutil.rmtree(place.output.folder / NAME / "tracked")
    done = place.run("sync", "--respect-deleted")
    assert "Runs that had been deleted in MLflow: 1, left out." in done.out
    assert place.output.runs() == ALL[1:]
    assert "1 missing" in place.mlflow_line()
    assert place.run("sync").out.startswith("1 runs written")
    assert place.output.runs() == ALL


@pytest.mark.slow
def test_a_run_that_is_restored_after_it_was_written_again_is_one(place: Place) -> None:
    run = place.id_of(SEED_0)
    place.client.delete_run(run)
    assert place.run("sync").out.startswith("1 runs written")
    place.client.restore_run(run)
    assert len(place.output.runs()) == 4
    assert place.run("sync").out.startswith("0 runs written")
    assert place.output.runs() == ALL


@pytest.mark.slow
@pytest.mark.parametrize("status", ["FAILED", "RUNNING", "KILLED", "SCHEDULED"])
def test_a_status_that_was_set_by_hand_is_set_right(place: Place, status: str) -> None:
    run = place.id_of(SEED_0)
    place.client.set_tag(run, "mine", "kept")
    place.client.update_run(run, status=status)
    assert "1 missing" in place.mlflow_line()
    report = place.run("report", "--tracking-uri", place.output.uri)
    assert report.code == 0, report.err
    by_hand = f"1 failed cells are not in the table: run {run} was set to FAILED in MLflow"
    assert (by_hand in report.err) == (status == "FAILED")
    done = place.run("sync")
    assert done.out.startswith("1 runs written, 0 unfinished ones closed, 0 still missing in ")
    assert place.output.runs() == ALL
    # The run itself, with what the user added to it.
    assert place.id_of(SEED_0) == run
    assert place.client.get_run(run).data.tags["mine"] == "kept"
    assert place.mlflow_line() == "2 finished, 0 failed."


@pytest.mark.slow
def test_a_renamed_run_is_the_same_run(place: Place) -> None:
    run = place.id_of(SEED_0)
    place.client.update_run(run, name="the good one")
    assert place.run("sync").out.startswith("0 runs written")
    assert place.id_of("the good one") == run
    assert place.mlflow_line() == "2 finished, 0 failed."


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_artifacts_that_were_removed_are_written_again(place: Place, how: str) -> None:
    before, runs = place.output.artifacts(), place.output.rows("SELECT run_uuid FROM runs")
    for folder in (place.output.folder / "mlartifacts").glob("*/*/artifacts"):
        shutil.rmtree(folder)
        if how == "emptied":
            folder.mkdir()
    assert place.run("sync").out.startswith("2 runs written")
    assert set(place.output.artifacts()) == set(before)
    assert place.output.rows("SELECT run_uuid FROM runs") == runs
    assert place.run("sync").out.startswith("0 runs written")


@pytest.mark.slow
def test_a_deleted_summary_is_written_again_or_left_out(place: Place) -> None:
    place.client.delete_run(place.id_of("summary"))
    done = place.run("sync", "--respect-deleted")
    assert done.code == 0
    assert place.output.runs() == ALL[:2]
    assert "The summary run was brought up to date." in place.run("sync").out
    assert place.output.runs() == ALL


@pytest.mark.slow
def test_a_deleted_experiment_is_restored_by_the_command_in_the_error(place: Place) -> None:
    place.client.delete_experiment("1")
    command = f"MLFLOW_TRACKING_URI={place.output.uri} mlflow experiments restore --experiment-id 1"
    for words in (("sync",), ("report", "--tracking-uri", place.output.uri)):
        done = place.run(*words)
        assert done.code == 2
        assert f"experiment '{NAME}' was deleted" in done.err
        assert command in done.err
    with pytest.raises(UserError, match="was deleted"):
        place.output.launch()
    from click.testing import CliRunner
    from mlflow.experiments import restore_experiment

    done = CliRunner().invoke(
        restore_experiment, ["--experiment-id", "1"], env={"MLFLOW_TRACKING_URI": place.output.uri}
    )
    assert done.exit_code == 0, done.output
    assert place.run("sync").code == 0
    assert place.output.runs() == ALL


# The database ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_database_that_is_locked_for_long_ends_no_launch(place: Place) -> None:
    place.output.compute(3)
    with closing(sqlite3.connect(place.output.database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        lines = place.output.launch()
        assert "database is locked" in lines[0]
        done = place.run("sync")
        assert done.code == 2
        assert "database is locked" in done.err
        assert "Start the server" not in done.err
        other.rollback()
    assert place.output.launch() == []
    assert len(place.output.runs()) == 4


@pytest.mark.slow
def test_a_database_of_another_mlflow_is_named_as_such(place: Place) -> None:
    import mlflow

    place.output.change("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(UserError) as caught:
        place.output.launch()
    assert "Another version of MLflow made the database" in str(caught.value)
    assert mlflow.__version__ in str(caught.value)
    assert "Start the server" not in str(caught.value)
    for words in (("sync",), ("report", "--tracking-uri", place.output.uri)):
        done = place.run(*words)
        assert (done.code, "Another version of MLflow" in done.err) == (2, True)


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import database

    def fingerprint() -> list[tuple[str, int]]:
        folder = place.output.folder
        return sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("mlflow.db*"))

    before = place.run("report", "--tracking-uri", place.output.uri)
    # As the file of somebody else. For root every file can be written.
    monkeypatch.setattr(database, "_can_write", lambda path: False)
    files = fingerprint()
    opened: list[str] = []
    connect = sqlite3.connect

    def note(name: str, *values: Any, **more: Any) -> Any:
        opened.append(name)
        return connect(name, *values, **more)

    monkeypatch.setattr(sqlite3, "connect", note)
    monkeypatch.setattr("sqlite3.dbapi2.connect", note)
    after = place.run("report", "--tracking-uri", place.output.uri)
    assert after == before
    assert place.mlflow_line() == "2 finished, 0 failed."
    assert opened
    assert all("immutable=1" in name and "mode=ro" in name for name in opened)
    assert fingerprint() == files
