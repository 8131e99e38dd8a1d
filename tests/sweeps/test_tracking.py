"""MLflow as a projection of the results on disk, on a SQLite file."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from btu.errors import UserError
from orchestrator.config import Sweep, load_sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What needs no store ---------------------------------------------------------------------------


def test_settings_are_flattened_by_dotted_key() -> None:
    from orchestrator.tracking import flatten

    config = {"attack": {"name": "badnets", "trigger": ["cf"]}, "a": {"b": {"c": None}}, "seed": 0}
    assert flatten(config) == {
        "attack.name": "badnets", "attack.trigger": ["cf"], "a.b.c": None, "seed": 0,
    }  # fmt: skip


def test_a_run_is_named_after_what_tells_it_from_its_siblings() -> None:
    from orchestrator.tracking import run_name

    record = {
        "config": {"attack": {"name": "style"}},
        "varied": {"attack.name": "style", "attack.poison_rate": 0.1, "seed": 2},
    }
    assert run_name(record) == "style poison_rate=0.1 seed=2"
    assert run_name({**record, "varied": {}}) == "style"


def test_a_relative_sqlite_uri_is_the_same_file_for_driver_and_workers(
    make_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import tracking_uri

    # Workers run in folders of their own.
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(make_sweep(), ["tracking.uri=sqlite:///my.db"])
    assert tracking_uri(sweep) == f"sqlite:///{tmp_path / 'my.db'}"


def test_the_ui_is_served_on_this_machine_only() -> None:
    from orchestrator.tracking import ui_command

    command = ui_command("sqlite:///x.db", 5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5001"
    assert command[command.index("--backend-store-uri") + 1] == "sqlite:///x.db"
    assert "0.0.0.0" not in command


def test_a_server_that_does_not_answer_is_named_within_seconds(
    make_sweep: Callable[..., Path], free_port: int
) -> None:
    from orchestrator import tracking

    uri = f"http://127.0.0.1:{free_port}"
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^tracking.uri {uri} does not answer: .*leave it null"):
        tracking.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))
    # Two retries with a second of backoff; the defaults take minutes.
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("uri", ["nonsense://x", "http://", "postgresql://127.0.0.1:1/x"])
def test_a_uri_that_is_none_is_named(make_sweep: Callable[..., Path], uri: str) -> None:
    from orchestrator import tracking

    with pytest.raises(UserError, match=f"tracking.uri {uri}"):
        tracking.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))


def test_a_store_that_cannot_be_made_is_named(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from orchestrator import tracking

    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/x.db"
    with pytest.raises(UserError, match=r"tracking.uri sqlite:///.*file/x.db"):
        tracking.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))


# On a real store -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store with its tables: creating them takes seconds, so one serves all tests."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).search_experiments()
    return uri


class Tracked(NamedTuple):
    uri: str
    experiment: str
    client: MlflowClient

    def runs(self) -> list[Any]:
        return list(self.client.search_runs([self.experiment]))

    def artifacts(self, run: Any) -> set[str]:
        return {entry.path for entry in self.client.list_artifacts(run.info.run_id)}


@pytest.fixture
def tracked(database: str, tmp_path: Path) -> Tracked:
    """A fresh experiment on the shared store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=database)
    location = (tmp_path / "mlartifacts").as_uri()
    return Tracked(database, client.create_experiment(tmp_path.name, location), client)


def prepared(make_sweep: Callable[..., Path], name: str, uri: str) -> tuple[Sweep, str]:
    from orchestrator import tracking

    sweep = load_sweep(make_sweep(name=name, grid={"seed": [0, 1]}), [f"tracking.uri={uri}"])
    return sweep, tracking.prepare(sweep)


@pytest.mark.slow
def test_preparing_makes_a_database_in_the_output_folder(make_sweep: Callable[..., Path]) -> None:
    from mlflow import MlflowClient

    from orchestrator import tracking

    sweep = load_sweep(make_sweep(grid={"seed": [0, 1]}))
    sweep.output.mkdir()
    experiment_id = tracking.prepare(sweep)
    path = sweep.output / "mlflow.db"
    assert tracking.tracking_uri(sweep) == tracking.default_uri(sweep.output) == f"sqlite:///{path}"
    with closing(sqlite3.connect(path)) as connection:
        # Readers do not wait for writers.
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    experiment = MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment(experiment_id)
    assert experiment.name == "tiny"
    # Not in the working directory of whoever writes.
    assert experiment.artifact_location == (sweep.output / "mlartifacts" / "tiny").as_uri()
    note = experiment.tags["mlflow.note.content"]
    assert "btu report tiny" in note
    assert "`seed` [0, 1]" in note
    assert sweep.text in note


@pytest.mark.slow
def test_preparing_again_finds_the_same_experiment(
    make_sweep: Callable[..., Path], database: str
) -> None:
    first = prepared(make_sweep, "twice", database)[1]
    assert prepared(make_sweep, "twice", database)[1] == first


@pytest.mark.slow
def test_a_deleted_experiment_is_told_as_such(
    make_sweep: Callable[..., Path], database: str
) -> None:
    from mlflow import MlflowClient

    deleted = prepared(make_sweep, "gone", database)[1]
    MlflowClient(tracking_uri=database).delete_experiment(deleted)
    with pytest.raises(UserError, match=r"^experiment 'gone' was deleted .*restore it") as caught:
        prepared(make_sweep, "gone", database)
    assert "does not answer" not in str(caught.value)  # it does


@pytest.mark.slow
def test_a_finished_cell_is_one_run_with_everything(stored: Any, tracked: Tracked) -> None:
    from orchestrator.tracking import log_cell

    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    (run,) = tracked.runs()
    assert run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == (1_000_000, 1_010_000)  # as the record has
    assert run.info.run_name == "badnets seed=0"

    params = run.data.params
    assert params["attack"] == "badnets"
    assert params["poison_rate"] == "0.2"
    assert params["defense"] == "btu"
    assert params["alpha"] == "0.01"
    assert params["seed"] == "0"
    assert params["train.learning_rate"] == "0.001"
    assert params["attack.trigger"] == "['cf']"
    assert not [name for name in params if name.startswith("resources")]

    metrics, record = run.data.metrics, stored.record["metrics"]
    for name in ("asr", "cacc", "ftr", "detection_precision", "undefended_asr", "tuned_cacc"):
        assert metrics[name] == pytest.approx(record[name])
    assert metrics["asr_n"] == record["asr_n"]
    assert 0 <= metrics["asr"] <= 1  # fractions
    assert metrics["seconds/poisoned_fine_tune"] > 0

    curve = tracked.client.get_metric_history(run.info.run_id, "loss/poisoned_fine_tune")
    told = [e for e in stored.record["history"] if e["stage"] == "poisoned fine-tune"]
    assert [(m.step, m.value) for m in curve] == [
        (e["epoch"], pytest.approx(e["loss"])) for e in told
    ]
    assert len(curve) == 2
    assert curve[0].timestamp <= curve[1].timestamp
    assert "accuracy/clean_tuning_control" in metrics

    tags = run.data.tags
    assert tags["cell"] == "k"
    assert {"code", "host", "device"} <= set(tags)
    assert tracked.artifacts(run) == {
        "config.yaml", "tokens.parquet", "drift.png", "result.json", "flagged_tokens.json",
    }  # fmt: skip
    table = json.loads(
        Path(tracked.client.download_artifacts(run.info.run_id, "flagged_tokens.json")).read_text()
    )
    assert {"token", "score", "trigger"} <= set(table["columns"])
    assert len(table["data"]) == record["flagged"]


@pytest.mark.slow
def test_an_undefined_metric_does_not_stop_the_run(stored: Any, tracked: Tracked) -> None:
    from orchestrator.store import RESULT, dumps
    from orchestrator.tracking import log_cell

    stored.record["metrics"]["detection_precision"] = float("nan")
    (stored.store.path("k") / RESULT).write_text(dumps(stored.record))
    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    (run,) = tracked.runs()
    assert run.info.status == "FINISHED"
    assert math.isnan(run.data.metrics["detection_precision"])
    assert not math.isnan(run.data.metrics["asr"])


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["kept", "lost", "torn"])
def test_a_cell_that_is_written_twice_is_one_run(
    stored: Any, tracked: Tracked, marker: str
) -> None:
    from orchestrator.tracking import TRACKED, log_cell

    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    path = stored.store.path("k") / TRACKED
    if marker == "lost":  # killed before the marker was written
        path.unlink()
    if marker == "torn":  # killed while it was written
        path.write_text("")
    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    (run,) = tracked.runs()
    assert json.loads(path.read_text()) == {"uri": tracked.uri, "run_id": run.info.run_id}


@pytest.mark.slow
def test_a_run_that_was_cut_short_is_written_again(
    stored: Any, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from orchestrator.tracking import RECORD_TAG, log_cell

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifact", cut)
        with pytest.raises(ConnectionError):
            log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    assert [RECORD_TAG in run.data.tags for run in tracked.runs()] == [False]
    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    whole = [run for run in tracked.runs() if RECORD_TAG in run.data.tags]
    assert [run.info.status for run in whole] == ["FINISHED"]
    # One run per cell: what was left of the first one is not shown as if it still ran.
    assert len(tracked.runs()) == 1


@pytest.mark.slow
def test_another_store_gets_the_cell_as_well(
    stored: Any, tracked: Tracked, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking import log_cell

    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    folder = tmp_path_factory.mktemp("other")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("tiny", (folder / "artifacts").as_uri())
    other = Tracked(f"sqlite:///{folder / 'mlflow.db'}", experiment, client)
    log_cell(other.uri, other.experiment, stored.store, "k")
    assert len(tracked.runs()) == len(other.runs()) == 1


@pytest.mark.slow
def test_many_epochs_are_logged_whole(stored: Any, tracked: Tracked) -> None:
    # MLflow takes 1,000 metrics a call: 600 epochs have 1,200.
    from orchestrator.store import RESULT, dumps
    from orchestrator.tracking import log_cell

    first = stored.record["history"][0]
    stored.record["history"] = [{**first, "epoch": n} for n in range(1, 601)]
    (stored.store.path("k") / RESULT).write_text(dumps(stored.record))
    log_cell(tracked.uri, tracked.experiment, stored.store, "k")
    (run,) = tracked.runs()
    curve = tracked.client.get_metric_history(run.info.run_id, "loss/poisoned_fine_tune")
    assert [m.step for m in curve] == list(range(1, 601))


@pytest.fixture
def failure(stored: Any) -> dict[str, Any]:
    record = {k: v for k, v in stored.record.items() if k not in ("metrics", "history", "notes")}
    return {**record, "status": "failed", "reason": "loss became nan", "traceback": "Traceback: x"}


@pytest.mark.slow
def test_a_failed_cell_is_a_failed_run_with_its_reason(
    failure: dict[str, Any], tracked: Tracked
) -> None:
    from orchestrator.tracking import log_failure

    log_failure(tracked.uri, tracked.experiment, failure)
    log_failure(tracked.uri, tracked.experiment, failure)  # on a relaunch
    (run,) = tracked.runs()
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == "loss became nan"
    assert run.data.tags["cell"] == "k"
    assert run.data.params["attack"] == "badnets"
    path = tracked.client.download_artifacts(run.info.run_id, "traceback.txt")
    assert Path(path).read_text() == "Traceback: x"


@pytest.mark.slow
def test_a_cell_that_fails_again_is_another_run(failure: dict[str, Any], tracked: Tracked) -> None:
    from orchestrator.tracking import log_failure

    log_failure(tracked.uri, tracked.experiment, failure)
    log_failure(tracked.uri, tracked.experiment, {**failure, "started": 2000.0, "ended": 2001.0})
    assert [run.info.status for run in tracked.runs()] == ["FAILED"] * 2


@pytest.mark.slow
def test_a_reason_of_any_length_is_taken(failure: dict[str, Any], tracked: Tracked) -> None:
    from orchestrator.tracking import log_failure

    failure["config"]["attack"]["trigger"] = ["x" * 20_000]
    log_failure(tracked.uri, tracked.experiment, {**failure, "reason": "long " * 5_000})
    (run,) = tracked.runs()
    assert run.data.tags["reason"].startswith("long long")


def test_a_uri_is_shown_without_its_password() -> None:
    from orchestrator.tracking import shown

    assert shown("postgresql://me:secret@host/x") == "postgresql://host/x"
    assert shown("http://host:5000/a@b") == "http://host:5000/a@b"
    assert shown("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"
