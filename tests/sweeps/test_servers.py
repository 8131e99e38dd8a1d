"""Which MLflow server a sweep uses where it names none, and which one commands ask later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import yaml
from store_fixtures import Stored

from btu.errors import UserError
from orchestrator.results.folder import LaunchedServer
from orchestrator.sweep.load import load_sweep
from orchestrator.tracking.server import launched_uri, tracking_uri

if TYPE_CHECKING:
    from conftest import Ran

SERVER = "http://server.example:5000"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without servers, credentials or a config."""
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.delenv("BTU_TRUSTED_HOSTS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def sweep_file(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "runs"), **config}))
    return path


@pytest.mark.parametrize("config", [{}, {"tracking": {}}, {"tracking": {"uri": None}}])
def test_the_environments_server_is_taken_where_the_sweep_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    path = sweep_file(tmp_path, config)
    own = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert tracking_uri(load_sweep(path)) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    assert tracking_uri(load_sweep(path)) == SERVER
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(load_sweep(path)) == own


def test_a_server_of_the_sweep_counts_before_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    named = load_sweep(sweep_file(tmp_path, {"tracking": {"uri": "http://other:1"}}))
    assert tracking_uri(named) == "http://other:1"
    assert tracking_uri(load_sweep(sweep_file(tmp_path, {}), ["tracking.uri=http://c:1"])) == (
        "http://c:1"
    )


def test_a_plan_says_which_server_the_environment_names(
    run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"data": {"name": "demo", "max_train_rows": 40, "max_eval_rows": 20}}
    path = sweep_file(tmp_path, small)
    assert "MLFLOW_TRACKING_URI" not in run_cli("plan", path).out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@server.example:5000")
    said = run_cli("plan", path).out
    assert "MLflow: http://server.example:5000, from MLFLOW_TRACKING_URI in the environment" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("uri", "recorded"),
    [
        (None, None),
        (SERVER, LaunchedServer(SERVER, True)),
        ("http://me:p@ss/w@server.example:5000", LaunchedServer(SERVER, False)),
        ("sqlite:////x/mlflow.db", LaunchedServer("sqlite:////x/mlflow.db", True)),
    ],
)
def test_a_launch_records_its_server_without_the_password(
    stored: Stored, tmp_path: Path, uri: str | None, recorded: LaunchedServer | None
) -> None:
    stored.results.record_server(uri)
    assert stored.results.server() == recorded
    found = [p.read_text() for p in (tmp_path / "runs" / "tiny").glob("server.json")]
    assert "ss/w" not in str(found)
    # A later launch without a server takes it back.
    stored.results.record_server(None)
    assert stored.results.server() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"uri": 3}', "{}"])
def test_a_damaged_record_counts_as_none(stored: Stored, content: str) -> None:
    stored.results.storage.write("tiny/server.json", content.encode())
    assert stored.results.server() is None


def test_sync_and_status_use_the_server_of_the_launch(
    run_cli: Callable[..., Ran], stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(uri: str, *_: object) -> NoReturn:
        asked.append(uri)
        raise UserError("it is away.")

    monkeypatch.setattr("orchestrator.tracking.experiment.experiment", refuse)
    monkeypatch.setattr("orchestrator.tracking.reader.MlflowSource", refuse)
    where = ("-o", tmp_path / "runs")
    stored.results.record_server(SERVER)
    assert "it is away" in run_cli("sync", "tiny", *where).err
    assert "it is away" in json.loads(run_cli("status", "tiny", *where, "--json").out)["untracked"]
    run_cli("sync", "tiny", *where, "--uri", "http://other:1")
    stored.results.record_server(None)
    run_cli("sync", "tiny", *where)
    own = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert asked == [SERVER, SERVER, "http://other:1", own]


def test_a_password_that_is_not_on_disk_is_asked_for(stored: Stored) -> None:
    stored.results.record_server("http://me:secret@server.example:5000")
    with pytest.raises(UserError) as refused:
        launched_uri(stored.results, "--uri")
    assert "whose password is nowhere on disk; give the whole URI with --uri" in str(refused.value)
    assert SERVER in str(refused.value)


def test_the_environment_has_the_password_of_the_launchs_server(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "http://me:secret@server.example:5000"
    stored.results.record_server(whole)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert launched_uri(stored.results, "--uri") == whole
    # The user named the server: credentials may go there.
    stored.results.record_server(SERVER)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    assert launched_uri(stored.results, "--uri") == SERVER
    # Of another server it says nothing.
    stored.results.record_server("http://other:1")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    assert launched_uri(stored.results, "--uri") == "http://other:1"


def test_a_folder_of_another_user_names_no_server_for_credentials(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.results.record_server(SERVER)
    assert launched_uri(stored.results, "--uri") == SERVER
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    with pytest.raises(UserError, match=r"--uri http://server\.example:5000 on the command line"):
        launched_uri(stored.results, "--uri")
    monkeypatch.setenv("BTU_TRUSTED_HOSTS", "server.example")
    assert launched_uri(stored.results, "--uri") == SERVER


@pytest.mark.slow
@pytest.mark.parametrize("named", ["nothing", "the environment", "the sweep"])
def test_the_advice_fits_what_names_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    from orchestrator.tracking import experiment

    (tmp_path / "runs").write_text("a file")
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    if named == "the environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = {"tracking": {"uri": uri}} if named == "the sweep" else {}
    with pytest.raises(UserError) as refused:
        experiment.prepare(load_sweep(sweep_file(tmp_path, config)))
    advice = {
        "nothing": "or name another folder with output=FOLDER",
        "the environment": "correct MLFLOW_TRACKING_URI, or unset it",
        "the sweep": "correct tracking.uri, or leave it null",
    }
    assert advice.pop(named) in str(refused.value)
    assert not any(other in str(refused.value) for other in advice.values())
