"""A sweep's results from the store and from MLflow: the same records from both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import pytest
from launching import Server
from synthetic import config, shelve

from btu.errors import UserError
from orchestrator.cli.shared import open_source
from orchestrator.report.table import mean_over_seeds, render, results_table
from orchestrator.results.folder import PLANS, TRACKED, Results, record_id
from orchestrator.results.source import Snapshot, Source

if TYPE_CHECKING:
    from mlflow import MlflowClient


def made(runs: Path, count: int = 3) -> Results:
    cells: list[Any] = [
        (config(seed=seed), {"asr": 0.1 + seed / 7, "cacc": 0.9}) for seed in range(count)
    ]
    return shelve(runs, cells, tokens=40)


def test_the_stores_records_are_those_of_the_results(tmp_path: Path) -> None:
    results = made(tmp_path)
    source = open_source("made", str(tmp_path))
    assert source.name == "made"
    records = source.records()
    assert [r["config"] for r in records] == [r["config"] for r in results.records()]
    assert [r["metrics"]["asr"] for r in records] == [0.1, 0.1 + 1 / 7, 0.1 + 2 / 7]
    assert all(type(value) is float for r in records for value in r["metrics"].values())
    assert {r["run_id"] for r in records} == {""}  # nothing was tracked
    assert source.failures() == []


def test_tables_are_none_where_there_are_none(tmp_path: Path) -> None:
    results = made(tmp_path)
    source = open_source("made", str(tmp_path))
    key = source.records()[0]["key"]
    tokens, rows = source.tokens(key), source.rows(key)
    assert tokens is not None
    assert rows is not None
    assert len(tokens) == 40
    assert "poisoned" in rows
    (results.store.fetch(key) / "tokens.parquet").unlink()
    assert open_source("made", str(tmp_path)).tokens(key) is None  # damaged
    assert source.tokens("f" * 24) is None


def test_a_record_knows_the_run_that_it_was_written_to(tmp_path: Path) -> None:
    results = made(tmp_path)
    first, second, _ = results.records()

    def note(store: str, record: dict[str, Any], run: str) -> None:
        text = json.dumps({"record": record_id(record), "run_id": run})
        path = f"made/{TRACKED}/{store}/{record['key']}.json"
        results.storage.write(path, text.encode())

    note("s1", first, "run-1")
    note("s1", {**second, "started": second["started"] + 9}, "of another time")
    results.storage.write(f"made/{TRACKED}/s1/damaged.json", b"{")
    runs = [record["run_id"] for record in open_source("made", str(tmp_path)).records()]
    assert runs == ["run-1", "", ""]
    # Another MLflow store has more of the sweep.
    for number, record in enumerate(results.records()):
        note("s0", record, f"other-{number}")
    runs = [record["run_id"] for record in open_source("made", str(tmp_path)).records()]
    assert runs == ["other-0", "other-1", "other-2"]


def test_a_snapshot_stays_what_it_was_while_the_sweep_goes_on(tmp_path: Path) -> None:
    made(tmp_path, 2)
    source = open_source("made", str(tmp_path))
    then = Snapshot(source)
    key = then.records()[0]["key"]
    made(tmp_path, 3)
    assert [len(one.records()) for one in (source, then)] == [3, 2]
    assert then.name == "made"
    tokens = then.tokens(key)
    assert tokens is not None
    assert len(tokens) == 40


def test_an_unknown_sweep_gets_a_suggestion(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UserError, match=r"unknown sweep .*'mode'.*did you mean 'made'"):
        open_source("mode", str(tmp_path))


# From MLflow alone -----------------------------------------------------------------------------

ODD = {
    # Floats without a short decimal form, a whole number, an undefined one, odd names.
    "asr": 0.1 + 0.2, "cacc": 2 / 3, "detection_f1": float("nan"), "poisoned_rows": 7,
    "seconds/clean tuning (control)": 1 / 3, "seconds/poisoned fine-tune": 2.0, "seconds": 1e9 / 7,
}  # fmt: skip
# What no shell takes as it is, longer than a tag.
WORDS = [f'word {number}\'s "quote" é' for number in range(400)]
FAILED = "f" * 24


class Written(NamedTuple):
    """A sweep of three finished cells and one that failed, in a store and in MLflow."""

    results: Results
    uri: str
    experiment: str
    client: MlflowClient

    def here(self) -> Source:
        return open_source(self.results.name, self.results.output)

    def there(self, warn: Callable[[str], None] | None = None) -> Source:
        return open_source(self.results.name, "nowhere", self.uri, warn)

    def sync(self) -> None:
        from orchestrator.tracking.sync import sync

        assert sync(self.uri, self.experiment, self.results, lambda key: False).missing == 0


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    from orchestrator.tracking import experiment as experiment_module

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    experiment_module.experiment(uri, "other")
    return uri


@pytest.fixture
def written(
    tmp_path: Path, database: str, cell: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Written:
    from orchestrator.tracking import server as server_module

    server_module.unanswered.clear()
    server_module.identities.clear()
    return write(tmp_path, database, cell)


def write(tmp_path: Path, uri: str, cell: dict[str, Any]) -> Written:
    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module

    cells: list[Any] = []
    for seed in range(3):
        settings = config(seed=seed, threshold=4.5 if seed else 3)
        settings["attack"]["trigger"] = WORDS
        settings["data"] = {"name": "demo", "path": None, "revision": "12e5"}
        cells.append((settings, ODD if seed else {"asr": 1.0}))
    results = shelve(tmp_path, cells, name=f"made-{tmp_path.name}", tokens=40)
    plan = tmp_path / results.name / PLANS / "plan.json"
    launched = json.loads(plan.read_text())
    for number, one in enumerate(launched["cells"]):
        one["varied"] = {"defense.threshold": 4.5 if number else 3, "seed": number}
    launched["cells"][2]["varied"]["control"] = "no_poison"
    base = {key: value for key, value in cell.items() if key != "seed"}
    launched["base"] = base
    launched["cells"].append({"key": FAILED, "varied": {"seed": 9}, "stages": {}})
    plan.write_text(json.dumps(launched))
    failure = {
        "key": FAILED, "stage": "unlearn", "reason": "loss became nan\nin epoch 2",
        "traceback": "Traceback: x", "code": "0.1+then", "started": 1000.1234, "ended": 1001.5678,
    }  # fmt: skip
    results.store.fail(FAILED, failure)
    experiment = experiment_module.experiment(uri, results.name)
    made = Written(results, uri, experiment, MlflowClient(tracking_uri=uri))
    made.sync()
    return made


@pytest.mark.slow
def test_mlflow_alone_gives_the_same_records_to_the_last_digit(written: Written) -> None:
    here, there = written.here().records(), written.there().records()
    assert len(there) == 3
    assert all(record["run_id"] for record in there)
    assert there[1]["metrics"]["asr"] == 0.1 + 0.2 != 0.3
    assert there[1]["metrics"]["seconds/clean tuning (control)"] == 1 / 3
    assert there[1]["config"]["attack"]["trigger"] == WORDS
    # As text: NaN is not equal to itself, and every digit counts.
    assert json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True)
    table, again = results_table(here), results_table(there)
    assert render(again, "csv") == render(table, "csv")
    assert render(mean_over_seeds(again), "csv") == render(mean_over_seeds(table), "csv")


@pytest.mark.slow
def test_mlflow_alone_gives_the_same_failures(written: Written) -> None:
    (failure,) = written.there().failures()
    assert failure["reason"] == "loss became nan\nin epoch 2"
    assert failure["stage"] == "unlearn"
    assert [failure] == written.here().failures()


@pytest.mark.slow
def test_mlflow_alone_gives_the_tables_of_a_cell(written: Written) -> None:
    key = written.here().records()[0]["key"]
    pd.testing.assert_frame_equal(written.there().tokens(key), written.here().tokens(key))
    pd.testing.assert_frame_equal(written.there().rows(key), written.here().rows(key))
    assert written.there().tokens(FAILED) is None
    assert written.there().tokens("0" * 20) is None


@pytest.mark.slow
def test_of_several_runs_of_a_cell_the_newest_finished_one_counts(written: Written) -> None:
    first = written.there().records()[0]
    tags = dict(written.client.get_run(first["run_id"]).data.tags)

    def again(started: int, status: str, asr: float) -> str:
        run = written.client.create_run(written.experiment, start_time=started, tags=tags)
        written.client.log_metric(run.info.run_id, "asr", asr)
        if status != "RUNNING":
            written.client.set_terminated(run.info.run_id, status, started + 1)
        return str(run.info.run_id)

    began = int(first["started"] * 1000)
    again(began - 1000, "FINISHED", 0.25)  # older
    newest = again(began + 1000, "FINISHED", 0.5)
    again(began + 2000, "FAILED", 0.75)
    again(began + 3000, "RUNNING", 0.875)  # half-written
    found = written.there().records()[0]
    assert (found["run_id"], found["metrics"]) == (newest, {"asr": 0.5})
    assert len(written.there().records()) == 3
    assert len(written.there().failures()) == 1


@pytest.mark.slow
def test_runs_that_are_no_cells_are_none(written: Written) -> None:
    from orchestrator.tracking.runs import CELL_TAG

    run = written.client.create_run(written.experiment, tags={"kind": "summary"})
    written.client.set_terminated(run.info.run_id)
    told: list[str] = []
    assert len(written.there(told.append).records()) == 3
    assert told == []
    # Another tool's: it lacks the settings, which are in no param or metric.
    first = written.there().records()[0]
    written.client.delete_tag(first["run_id"], f"{CELL_TAG}0")
    assert len(written.there(told.append).records()) == 2
    assert told == []


@pytest.mark.slow
def test_a_damaged_artifact_is_told_as_such(written: Written) -> None:
    first = written.there().records()[0]
    written.client.log_text(first["run_id"], "no parquet", "tokens.parquet")
    with pytest.raises(UserError, match=rf"tokens.parquet of run {first['run_id']} cannot be read"):
        written.there().tokens(first["key"])


@pytest.mark.slow
def test_artifacts_that_are_gone_are_told_once(written: Written) -> None:
    told: list[str] = []
    source = written.there(told.append)
    for record in source.records():
        folder = written.client.get_run(record["run_id"]).info.artifact_uri
        shutil.rmtree(folder.removeprefix("file://"))
        assert source.tokens(record["key"]) is None
    (text,) = told
    assert "has no artifacts at file://" in text
    assert "Was the folder moved" in text
    # Numbers are metrics, which are in the database.
    assert len(source.records()) == 3


@pytest.mark.slow
def test_what_mlflow_does_not_have_is_named(written: Written, tmp_path: Path) -> None:
    name = written.results.name
    with pytest.raises(UserError, match=rf"did you mean '{name}'"):
        open_source(f"{name}x", "", written.uri)
    absent = tmp_path / "absent.db"
    with pytest.raises(UserError, match=r"sqlite:///.*absent.db does not exist; .*--tracking-uri"):
        open_source(name, "", f"sqlite:///{absent}")
    assert not absent.exists()
    garbage = tmp_path / "garbage.db"
    garbage.write_text("no database at all" * 100)
    with pytest.raises(UserError, match=r"^MLflow at sqlite:///.*garbage.db does not answer"):
        open_source(name, "", f"sqlite:///{garbage}")
    written.client.delete_experiment(written.experiment)
    with pytest.raises(UserError, match=r"was deleted in the MLflow store"):
        open_source(name, "", written.uri)


@pytest.mark.slow
def test_tables_are_printed_from_mlflow_alone(
    written: Written, run_cli: Callable[..., Any]
) -> None:
    name, there = written.results.name, ("--tracking-uri", written.uri, "--output", "nowhere")
    here = ("--output", written.results.output)
    for command in (
        ("report", name, "--format", "csv"),
        ("report", name, "--mean", "--format", "csv"),
        ("curves", name, "--format", "csv"),
    ):
        near, far = run_cli(*command, *here), run_cli(*command, *there)
        assert far.code == 0, far
        assert far.out == near.out
        assert far.err == near.err


@pytest.mark.slow
def test_thresholds_are_chosen_from_mlflow_alone(
    tmp_path: Path, database: str, run_cli: Callable[..., Any]
) -> None:
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking.sync import sync

    # Threshold 3 costs a defender more than a point; in hindsight its ASR is the lower one.
    shared = {"undefended_asr": 1.0, "tuned_cacc": 0.9, "cacc": 0.9}
    cells: list[Any] = [
        (config(threshold=t, seed=seed), {**shared, "asr": t / 10, "cut_cost": cost})
        for seed in (0, 1)
        for t, cost in ((3.0, 0.015), (4.0, 0.0))
    ]
    results = shelve(tmp_path, cells, name=f"chosen-{tmp_path.name}")
    experiment = experiment_module.experiment(database, results.name)
    assert sync(database, experiment, results, lambda key: False).missing == 0
    here = ("--output", results.output)
    there = ("--tracking-uri", database, "--output", "nowhere")
    for more in ((), ("--recommend",), ("--cacc-loss", "0.02")):
        command = ("choose", results.name, "--format", "json", *more)
        near, far = run_cli(*command, *here), run_cli(*command, *there)
        assert near.code == far.code == 0, near
        assert far.out == near.out
        assert far.err == near.err
        chosen = [row.get("deployable", row.get("threshold")) for row in json.loads(far.out)]
        assert chosen == {(): [4, 4], ("--recommend",): [4]}.get(more, [3, 3])


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_named_without_its_password(free_port: int) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port}"
    with pytest.raises(UserError, match=rf"^MLflow at http://127.0.0.1:{free_port} does") as caught:
        open_source("made", "", uri)
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_server_gives_the_same_as_the_store(
    tmp_path: Path, database: str, cell: dict[str, Any], free_port: int
) -> None:
    from orchestrator.tracking.sync import summarize

    path = tmp_path / "server.db"
    shutil.copy(database.removeprefix("sqlite:///"), path)
    server = Server(path, tmp_path, free_port)
    try:
        server.start()
        written = write(tmp_path, server.uri, cell)
        here, there = written.here(), written.there()
        records = there.records()
        assert json.dumps(records, sort_keys=True) == json.dumps(here.records(), sort_keys=True)
        assert there.failures() == here.failures()
        key = records[0]["key"]
        pd.testing.assert_frame_equal(there.tokens(key), here.tokens(key))
        assert summarize(server.uri, written.experiment, written.results)
        (run,) = written.client.search_runs([written.experiment], "tags.kind = 'summary'")
        kept = {entry.path for entry in written.client.list_artifacts(run.info.run_id)}
        assert {"means.csv", "report.html", "figures"} <= kept
        assert len(written.there().records()) == 3
    finally:
        server.stop()
