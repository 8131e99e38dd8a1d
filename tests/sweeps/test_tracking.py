"""MLflow as a projection of the results on disk, on a SQLite file. Records are made by hand."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from btu.errors import UserError
from orchestrator.config import Sweep, load_sweep
from orchestrator.results import Results
from orchestrator.store import dumps

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from orchestrator.tracking import Tracker

# What needs no store ---------------------------------------------------------------------------


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


def test_the_default_is_a_file_in_the_output_folder(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from orchestrator.tracking import default_uri, tracking_uri

    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert tracking_uri(load_sweep(make_sweep())) == uri == default_uri(str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"^output s3://b/runs is an object store.*tracking.uri"):
        tracking_uri(load_sweep(make_sweep(), ["output=s3://b/runs"]))


def test_the_ui_is_served_on_this_machine_only() -> None:
    from orchestrator.tracking import ui_command

    command = ui_command("sqlite:///x.db", 5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5001"
    assert command[command.index("--backend-store-uri") + 1] == "sqlite:///x.db"
    assert "0.0.0.0" not in command


def test_a_uri_is_shown_without_its_password() -> None:
    from orchestrator.tracking import shown

    assert shown("postgresql://me:secret@host/x") == "postgresql://host/x"
    assert shown("http://host:5000/a@b") == "http://host:5000/a@b"
    assert shown("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_no_error_and_told_within_seconds(
    make_sweep: Callable[..., Path], free_port: int
) -> None:
    from orchestrator import tracking

    sweep = load_sweep(make_sweep(), [f"tracking.uri=http://127.0.0.1:{free_port}"])
    began = time.monotonic()
    experiment, reason = tracking.prepare(sweep)
    # Two retries with a second of backoff; the defaults take minutes.
    assert time.monotonic() - began < 30
    assert experiment is None
    assert reason
    assert "\n" not in reason


@pytest.mark.parametrize("uri", ["nonsense://x", "postgresql://me:secret@127.0.0.1:1/x"])
def test_a_uri_that_is_none_is_named(make_sweep: Callable[..., Path], uri: str) -> None:
    from orchestrator import tracking

    shown = tracking.shown(uri)
    with pytest.raises(UserError, match=f"^tracking.uri {shown} ") as caught:
        tracking.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_store_that_cannot_be_made_is_named(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from orchestrator import tracking

    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/x.db"
    with pytest.raises(UserError, match=r"tracking.uri sqlite:///.*file/x.db .*leave it null"):
        tracking.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))
    with pytest.raises(UserError, match=r"tracking.uri sqlite:///.*file/x.db .*--uri"):
        tracking.experiment(uri, "tiny")


# On a real store -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store with its tables: creating them takes seconds, so one serves all tests."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).search_experiments()
    return uri


def prepared(make_sweep: Callable[..., Path], name: str, uri: str) -> tuple[Sweep, str]:
    from orchestrator import tracking

    sweep = load_sweep(make_sweep(name=name, grid={"seed": [0, 1]}), [f"tracking.uri={uri}"])
    experiment, reason = tracking.prepare(sweep)
    assert experiment is not None, reason
    return sweep, experiment


@pytest.mark.slow
def test_preparing_makes_a_database_in_the_output_folder(make_sweep: Callable[..., Path]) -> None:
    from mlflow import MlflowClient

    from orchestrator import tracking

    sweep = load_sweep(make_sweep(grid={"seed": [0, 1]}))
    Path(sweep.output).mkdir()
    experiment_id, reason = tracking.prepare(sweep)
    assert reason == ""
    path = Path(sweep.output) / "mlflow.db"
    with closing(sqlite3.connect(path)) as connection:
        # Readers do not wait for writers.
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    experiment = MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment(experiment_id)
    assert experiment.name == "tiny"
    # Not in the working directory of whoever writes.
    assert experiment.artifact_location == (path.parent / "mlartifacts" / "tiny").as_uri()
    note = experiment.tags["mlflow.note.content"]
    assert "Sweep **tiny** over `seed` [0, 1]." in note
    assert "One run per cell; table: `btu report tiny`." in note
    assert sweep.text in note


@pytest.mark.slow
def test_preparing_again_finds_the_same_experiment(
    make_sweep: Callable[..., Path], database: str
) -> None:
    from orchestrator import tracking

    first = prepared(make_sweep, "twice", database)[1]
    assert prepared(make_sweep, "twice", database)[1] == first
    assert tracking.experiment(database, "twice") == first
    assert tracking.experiment(database, "never launched") != first


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


# Records by hand: two cells, of which each test finishes or fails what it wants.
CELLS = {"a" * 24: 0, "b" * 24: 1}
FIRST, SECOND = CELLS
SHARED = "c" * 24
METRICS = {
    "asr": 0.75, "cacc": 0.5, "asr_n": 16.0, "detection_precision": 0.25,
    "seconds/poisoned fine-tune": 2.0, "seconds/clean tuning (control)": 1.0,
}  # fmt: skip
HISTORY = [
    {"stage": "poisoned fine-tune", "epoch": 1, "loss": 0.7, "accuracy": 0.5, "seconds": 1.0},
    {"stage": "poisoned fine-tune", "epoch": 2, "loss": 0.4, "accuracy": 0.8, "seconds": 2.0},
]


class Bench(NamedTuple):
    """A sweep with hand-made results, and an experiment on the shared MLflow store."""

    results: Results
    base: dict[str, Any]
    uri: str
    experiment: str
    client: MlflowClient

    def finish(self, key: str, began: float = 1000.0, **changes: Any) -> dict[str, Any]:
        """Commit a cell's result, ten seconds after it began; return its record."""
        config = {**self.base, "seed": CELLS[key]}
        result = {
            "config": config,
            "started": began,
            "ended": began + 10,
            "metrics": METRICS,
            "history": HISTORY,
            "notes": {"rows_train": 80},
            "tags": {"code": "0.1", "host": "h", "device": "cpu"},
            **changes,
        }
        folder = self.results.store.begin(key)
        (folder / "result.json").write_text(dumps(result))
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / "tokens.parquet").write_bytes(b"parquet")
        (folder / "drift.png").write_bytes(b"png")
        flagged = [{"token": "cf", "score": 2.0, "trigger": True}]
        (folder / "flagged_tokens.json").write_text(json.dumps(flagged))
        self.results.store.storage.remove(f"markers/{key}.json")
        self.results.store.publish(key, folder, "cell", {})
        (record,) = [r for r in self.results.records() if r["key"] == key]
        return record

    def fail(self, key: str, began: float = 1000.0, reason: str = "loss became nan") -> None:
        failure = {
            "key": key, "stage": "unlearn", "reason": reason, "traceback": "Traceback: x",
            "started": began, "ended": began + 1,
        }  # fmt: skip
        self.results.store.fail(key, failure)

    def failure(self) -> dict[str, Any]:
        (record,) = self.results.failures()
        return record

    def tracker(self) -> Tracker:
        from orchestrator.tracking import Tracker

        return Tracker(self.uri, self.experiment, self.results)

    def log(self, record: Mapping[str, Any]) -> bool:
        finished = record["status"] == "finished"
        folder = self.results.store.fetch(record["key"]) if finished else None
        return self.tracker().log(record, folder)

    def runs(self) -> list[Any]:
        return list(self.client.search_runs([self.experiment]))

    def statuses(self) -> list[tuple[str, str]]:
        return sorted((run.data.tags["cell"], run.info.status) for run in self.runs())

    def artifact(self, run: Any, name: str) -> str:
        return Path(self.client.download_artifacts(run.info.run_id, name)).read_text()

    def note(self, key: str) -> Path:
        (path,) = (Path(self.results.output) / "tiny" / "tracked").glob(f"*/{key}.json")
        return path

    def sync(self, live: Callable[[str], bool] = lambda key: False, **other: str) -> Any:
        from orchestrator.tracking import sync

        where = {"uri": self.uri, "experiment_id": self.experiment, **other}
        return sync(results=self.results, live=live, **where)  # type: ignore[arg-type]


@pytest.fixture
def bench(
    database: str, cell: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    from mlflow import MlflowClient

    from orchestrator import tracking

    monkeypatch.setattr(tracking, "_down", {})
    results = Results(str(tmp_path / "runs"), "tiny")
    results.store.prepare()
    base = {key: value for key, value in cell.items() if key != "seed"}
    cells = [
        {
            "key": key,
            "varied": {"attack.name": "badnets", "seed": seed},
            "stages": {SHARED: "poisoned fine-tune"},
        }
        for key, seed in CELLS.items()
    ]
    plan = json.dumps({"sweep": "tiny", "base": base, "cells": cells})
    results.storage.write("tiny/plans/p.json", plan.encode())
    client = MlflowClient(tracking_uri=database)
    experiment = client.create_experiment(str(tmp_path), (tmp_path / "mlartifacts").as_uri())
    return Bench(results, base, database, experiment, client)


# One run per cell ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_cell_is_one_run_with_everything(bench: Bench) -> None:
    assert bench.log(bench.finish(FIRST))
    (run,) = bench.runs()
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
    assert not [name for name in params if name.startswith("resources")]

    metrics = run.data.metrics
    for name in ("asr", "cacc", "asr_n", "detection_precision"):
        assert metrics[name] == METRICS[name]  # fractions
    assert metrics["seconds/poisoned_fine_tune"] == 2
    assert metrics["seconds/clean_tuning_control"] == 1  # MLflow takes no brackets
    assert metrics["data/rows_train"] == 80
    curve = bench.client.get_metric_history(run.info.run_id, "loss/poisoned_fine_tune")
    # Epochs end 1 and 1 + 2 seconds after the start.
    assert [(m.step, m.value, m.timestamp) for m in curve] == [
        (1, 0.7, 1_001_000), (2, 0.4, 1_003_000),
    ]  # fmt: skip
    assert metrics["accuracy/poisoned_fine_tune"] == 0.8

    tags = run.data.tags
    assert tags["cell"] == FIRST
    assert {name: tags[name] for name in ("code", "host", "device")} == {
        "code": "0.1", "host": "h", "device": "cpu",
    }  # fmt: skip
    note = tags["mlflow.note.content"]
    assert f"Cell `{FIRST}` of sweep `tiny`." in note
    assert "`btu trial SWEEP.yaml attack.name=badnets seed=0`" in note
    assert {entry.path for entry in bench.client.list_artifacts(run.info.run_id)} == {
        "config.yaml", "tokens.parquet", "drift.png", "result.json", "flagged_tokens.json",
    }  # fmt: skip
    table = json.loads(bench.artifact(run, "flagged_tokens.json"))
    assert table == {"columns": ["token", "score", "trigger"], "data": [["cf", 2.0, True]]}


@pytest.mark.slow
def test_an_undefined_metric_does_not_stop_the_run(bench: Bench) -> None:
    bench.log(bench.finish(FIRST, metrics={**METRICS, "detection_precision": float("nan")}))
    (run,) = bench.runs()
    assert run.info.status == "FINISHED"
    assert math.isnan(run.data.metrics["detection_precision"])
    assert run.data.metrics["asr"] == 0.75


@pytest.mark.slow
def test_many_epochs_are_logged_whole(bench: Bench) -> None:
    # MLflow takes 1,000 metrics a call: 600 epochs have 1,200.
    history = [{**HISTORY[0], "epoch": number} for number in range(1, 601)]
    bench.log(bench.finish(FIRST, history=history))
    (run,) = bench.runs()
    curve = bench.client.get_metric_history(run.info.run_id, "loss/poisoned_fine_tune")
    assert [metric.step for metric in curve] == list(range(1, 601))


@pytest.mark.slow
@pytest.mark.parametrize("note", ["kept", "lost", "torn", "without run"])
def test_a_cell_that_is_written_twice_is_one_run(bench: Bench, note: str) -> None:
    record = bench.finish(FIRST)
    assert bench.log(record)
    (first,) = bench.runs()
    path = bench.note(FIRST)
    written = json.loads(path.read_text())
    assert written == {"record": f"{FIRST}-1000000", "run_id": first.info.run_id}
    if note == "lost":  # killed before it was written, or the folder was moved
        path.unlink()
    if note == "torn":
        path.write_text('{"rec')
    if note == "without run":
        path.write_text(json.dumps({"record": written["record"]}))
    assert bench.tracker().is_logged(record) == (note == "kept")
    assert not bench.log(record)
    # MLflow has the run, so it is not written again but noted.
    (run,) = bench.runs()
    assert run.info.run_id == first.info.run_id
    assert json.loads(path.read_text()) == written


@pytest.mark.slow
@pytest.mark.parametrize("last", ["log_batch", "log_artifact", "log_table", "set_terminated"])
def test_a_run_that_was_cut_short_is_written_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    import mlflow

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("the worker died")

    record = bench.finish(FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, last, cut)
        with pytest.raises(ConnectionError):
            bench.log(record)
    assert bench.statuses() == [(FIRST, "RUNNING")]
    assert not bench.tracker().is_logged(record)
    assert bench.log(record)
    # What was left of the first one is not shown as if it still ran.
    assert bench.statuses() == [(FIRST, "FINISHED")]


@pytest.mark.slow
def test_a_cell_that_was_computed_again_replaces_its_run(bench: Bench) -> None:
    bench.log(bench.finish(FIRST))
    bench.log(bench.finish(SECOND))
    again = bench.finish(FIRST, 2000.0, metrics={**METRICS, "asr": 0.5})
    assert not bench.tracker().is_logged(again)
    assert bench.log(again)
    assert bench.statuses() == [(FIRST, "FINISHED"), (SECOND, "FINISHED")]
    (run,) = [run for run in bench.runs() if run.data.tags["cell"] == FIRST]
    assert (run.info.start_time, run.data.metrics["asr"]) == (2_000_000, 0.5)


@pytest.mark.slow
def test_a_failed_cell_is_a_failed_run_with_its_reason(bench: Bench) -> None:
    bench.fail(FIRST)
    assert bench.log(bench.failure())
    assert not bench.log(bench.failure())  # on a relaunch
    (run,) = bench.runs()
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == "loss became nan"
    assert run.data.tags["cell"] == FIRST
    assert run.data.params["attack"] == "badnets"
    assert run.data.params["seed"] == "0"
    assert bench.artifact(run, "traceback.txt") == "Traceback: x"
    assert "seed: 0" in bench.artifact(run, "config.yaml")


@pytest.mark.slow
def test_of_a_cell_that_failed_first_the_last_word_stays(bench: Bench) -> None:
    bench.fail(FIRST)
    bench.log(bench.failure())
    bench.fail(FIRST, 2000.0, "out of memory")
    assert bench.log(bench.failure())
    assert bench.statuses() == [(FIRST, "FAILED")]
    assert bench.runs()[0].data.tags["reason"] == "out of memory"
    assert bench.log(bench.finish(FIRST, 3000.0))
    assert bench.statuses() == [(FIRST, "FINISHED")]


@pytest.mark.slow
def test_the_failure_of_a_shared_stage_is_told_of_each_of_its_cells(bench: Bench) -> None:
    bench.fail(SHARED)
    assert bench.sync().written == 2
    assert bench.statuses() == [(FIRST, "FAILED"), (SECOND, "FAILED")]
    reasons = {run.data.tags["reason"] for run in bench.runs()}
    assert reasons == {"stage 'unlearn' failed: loss became nan"}


@pytest.mark.slow
def test_a_reason_and_a_param_of_any_length_are_taken(bench: Bench) -> None:
    bench.fail(FIRST, reason="long " * 5_000)
    record = bench.failure()
    record["config"]["attack"]["trigger"] = ["x" * 20_000]
    bench.log(record)
    (run,) = bench.runs()
    assert run.data.tags["reason"].startswith("long long")


# Synchronizing ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_sync_writes_what_is_missing_and_nothing_twice(bench: Bench) -> None:
    bench.log(bench.finish(FIRST))
    bench.finish(SECOND)
    for written in (1, 0):
        synced = bench.sync()
        assert (synced.written, synced.closed, synced.missing) == (written, 0, 0)
        assert synced.reason == ""
    assert bench.statuses() == [(FIRST, "FINISHED"), (SECOND, "FINISHED")]


@pytest.mark.slow
def test_another_store_gets_everything_as_well(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from mlflow import MlflowClient

    bench.finish(FIRST)
    bench.fail(SECOND)
    assert bench.sync().written == 2
    folder = tmp_path_factory.mktemp("other")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("tiny", (folder / "artifacts").as_uri())
    for written in (2, 0):
        assert bench.sync(uri=uri, experiment_id=experiment).written == written
    found = client.search_runs([experiment])
    assert sorted(run.info.status for run in found) == ["FAILED", "FINISHED"]
    assert len(bench.runs()) == 2


@pytest.mark.slow
def test_a_store_under_another_name_is_not_told_again(bench: Bench) -> None:
    # A moved output folder has another URI, and its store has all runs.
    bench.finish(FIRST)
    assert bench.sync().written == 1
    # Another spelling of the same file.
    other = bench.uri.replace("sqlite:///", "sqlite:////")
    assert bench.sync(uri=other).written == 0
    assert bench.statuses() == [(FIRST, "FINISHED")]


@pytest.mark.slow
def test_runs_of_dead_workers_are_closed_and_told_again(bench: Bench) -> None:
    bench.finish(FIRST)
    bench.finish(SECOND)
    for key in CELLS:
        bench.client.create_run(bench.experiment, tags={"cell": key})
    bench.client.create_run(bench.experiment, run_name="by hand")  # none of our business
    live = SECOND.__eq__
    synced = bench.sync(live)
    # The second cell's worker is at it: its run is its own to finish.
    assert (synced.written, synced.closed, synced.missing) == (1, 1, 0)
    runs = [(run.data.tags.get("cell"), run.info.status) for run in bench.runs()]
    assert sorted(runs, key=str) == sorted(
        [(FIRST, "FINISHED"), (SECOND, "RUNNING"), (None, "RUNNING")], key=str
    )
    synced = bench.sync()
    assert (synced.written, synced.closed, synced.missing) == (1, 1, 0)


@pytest.mark.slow
def test_one_bad_record_does_not_keep_the_others_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import Tracker

    tell = Tracker._tell_result

    def refuse(self: Tracker, run_id: str, record: Mapping[str, Any], folder: Path) -> None:
        if record["key"] == FIRST:
            raise ValueError("MLflow refuses this one")
        tell(self, run_id, record, folder)

    bench.finish(FIRST)
    bench.finish(SECOND)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_tell_result", refuse)
        synced = bench.sync()
    assert (synced.written, synced.missing) == (1, 1)
    assert synced.reason == "ValueError: MLflow refuses this one"
    synced = bench.sync()
    assert (synced.written, synced.missing) == (1, 0)
    assert bench.statuses() == [(FIRST, "FINISHED"), (SECOND, "FINISHED")]


@pytest.mark.slow
def test_a_damaged_result_counts_as_not_run(bench: Bench) -> None:
    bench.finish(FIRST)
    bench.finish(SECOND)
    folder = bench.results.store.fetch(FIRST)
    (folder / "result.json").write_text("{")
    synced = bench.sync()
    assert (synced.written, synced.missing) == (1, 0)
    assert bench.statuses() == [(SECOND, "FINISHED")]


@pytest.mark.slow
def test_a_dead_server_is_asked_once_and_then_left_alone(
    bench: Bench, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import tracking

    record = bench.finish(FIRST)
    uri = f"http://127.0.0.1:{free_port}"
    tracker = tracking.Tracker(uri, "1", bench.results)
    folder = bench.results.store.fetch(FIRST)
    with pytest.raises(Exception, match=str(free_port)):
        tracker.log(record, folder)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=str(free_port)):
        tracker.log(record, folder)
    assert time.monotonic() - began < 0.5
    # After a while it is asked again.
    later = time.monotonic() + tracking.DOWN_SECONDS + 1
    with monkeypatch.context() as patch:
        patch.setattr(tracking.time, "monotonic", lambda: later)
        with pytest.raises(Exception, match=str(free_port)) as caught:
            tracker.log(record, folder)
    assert not isinstance(caught.value, ConnectionError)
    assert not tracker.is_logged(record)


def test_a_file_that_refuses_once_is_not_left_alone() -> None:
    from orchestrator import tracking

    # A locked SQLite file is free again in a moment; a server that is away stays so for a while.
    for _ in range(2):
        with pytest.raises(OSError, match="locked"), tracking._breaker("sqlite:///x.db"):
            raise OSError("database is locked")


@pytest.mark.slow
def test_sync_gives_up_on_a_dead_server_and_counts_what_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import tracking

    asked: list[str] = []

    def away(self: tracking.Tracker, *_: object) -> None:
        asked.append(self.uri)
        raise ConnectionError("nobody there")

    # Six records on an experiment that can be listed, but takes no run.
    records = [{"key": f"{n:024x}", "status": "failed", "started": 1.0} for n in range(6)]
    monkeypatch.setattr(Results, "failures", lambda self: iter(records))
    monkeypatch.setattr(tracking.Tracker, "_whole_run", away)
    synced = bench.sync()
    assert len(asked) == tracking.GIVE_UP == 3
    assert (synced.written, synced.missing) == (0, 6)
    assert synced.reason == "ConnectionError: nobody there"
