"""Folders whose names a URI has to quote: databases, artifacts and printed commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import Server
from published import NAME, Output, empty_database, forget

from btu.errors import UserError

__all__ = ["empty_database"]

# The last one takes 720 characters in a URI.
ODD = ("a%20b", "100%2Fx", "q?x#y", "é ü", "it's", "日" * 80)
# What a path may have: all but NUL. "." and "..", which resolve to other folders, are no names.
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda name: name not in (".", ".."))


def plain(text: str) -> str:
    return " ".join(text.split())


@given(st.lists(NAMES, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_uri_names_the_path_that_it_was_made_of(names: list[str]) -> None:
    from orchestrator.tracking.database import database_of
    from orchestrator.tracking.moved import local_path
    from orchestrator.tracking.server import absolute, sqlite_uri

    path = Path("/", *names)
    uri = sqlite_uri(path)
    assert database_of(uri) == path
    assert absolute(uri) == uri
    assert local_path(path.as_uri()) == path
    # MLflow makes the folder that follows this prefix, as it is written.
    if uri.startswith("sqlite:///"):
        assert uri == f"sqlite:///{path}"


def test_an_ordinary_path_is_written_as_it_is() -> None:
    from orchestrator.tracking.server import default_uri

    assert default_uri("/tmp/a b") == "sqlite:////tmp/a b/mlflow.db"
    assert default_uri("/tmp/100%2Fx") == "sqlite+pysqlite:////tmp/100%252Fx/mlflow.db"


def test_a_sqlite_uri_that_was_not_quoted_is_refused(tmp_path: Path) -> None:
    from orchestrator.tracking.server import absolute

    folder = tmp_path / "100%2Fx"
    folder.mkdir()
    with pytest.raises(UserError, match=r"write a '%' of a path as %25: .*/100%252Fx/my.db$"):
        absolute(f"sqlite:///{folder}/my.db")
    assert absolute(f"sqlite:///{tmp_path}/100%252Fx/my.db").endswith("/100%252Fx/my.db")
    with pytest.raises(UserError, match=r"'x#y/my.db' is no option of SQLite .*'\?' .* as %3F"):
        absolute("sqlite:////tmp/q?x#y/my.db")
    with pytest.raises(UserError, match=r"'x' is no option of SQLite \(cached_statements, .*uri\)"):
        absolute("sqlite:////tmp/q?x=1/my.db")
    # Options that it has are kept.
    assert absolute(f"sqlite:///{tmp_path}/my.db?timeout=30") == (
        f"sqlite:///{tmp_path}/my.db?timeout=30"
    )
    assert absolute("sqlite:///:memory:") == "sqlite:///:memory:"


def test_a_path_that_is_not_utf8_is_refused() -> None:
    from orchestrator.tracking.server import default_uri

    with pytest.raises(UserError, match=r"^'/tmp/\\udcff/mlflow.db' is not valid UTF-8.*rename"):
        default_uri("/tmp/\udcff")


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD, ids=[*ODD[:-1], "long"])
def test_a_sweep_is_tracked_in_a_folder_of_any_name(
    tmp_path: Path,
    empty_database: Path,
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    free_port: int,
    name: str,
) -> None:
    from orchestrator.tracking import ui

    beside = Output(tmp_path / "a b", empty_database)
    before = beside.database.read_bytes()
    made = Output(tmp_path / name, empty_database)
    made.compute(2)
    monkeypatch.chdir(made.folder)
    assert made.launch() == []
    here = (run_cli("report", NAME, "-o", made.folder), run_cli("curves", NAME, "-o", made.folder))
    done = run_cli("sync", NAME, "--output", made.folder)
    assert (done.code, done.err) == (0, "")
    # The address that is printed is one to give.
    printed = done.out.rpartition(" still missing in ")[2].removesuffix(".")
    assert printed == plain(made.uri)
    forget()
    there = [run_cli(command, NAME, "--tracking-uri", made.uri) for command in ("report", "curves")]
    assert [(done.code, done.out) for done in there] == [(done.code, done.out) for done in here]
    assert there[1].code == 0
    status = run_cli("status", NAME, "--output", made.folder)
    assert f"MLflow {printed}: 2 finished, 0 failed." in status.out
    served: list[str] = []
    monkeypatch.setattr(ui, "serve_ui", lambda uri, *_: served.append(uri) or 0)
    shown = run_cli("ui", "--output", made.folder, "--port", free_port)
    assert f"{NAME}: http://127.0.0.1:{free_port}/#/experiments/1/runs" in shown.out
    assert served == [made.uri]
    # Nothing is made beside the folder, in it by another name, or in its neighbour.
    assert {path.name for path in tmp_path.iterdir()} == {name, "a b"}
    kept = {path.name for path in made.folder.iterdir() if not path.name.startswith(".")}
    kept -= {"mlflow.db-wal", "mlflow.db-shm"}  # while it is open
    assert kept == {"made", "mlartifacts", "mlflow.db", "store"}
    assert beside.database.read_bytes() == before
    assert len(made.artifacts()) > 4


@pytest.mark.slow
def test_a_database_is_made_in_the_folder_and_a_server_reads_it(
    tmp_path: Path, free_port: int
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking.reader import MlflowSource

    made = Output(tmp_path / "100%2F?x#é")
    made.compute(1)
    assert made.launch() == []
    assert [path.name for path in tmp_path.iterdir()] == [made.folder.name]
    assert made.database.is_file()
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(made.database, folder, free_port)
    command = server._command
    command[command.index(f"sqlite:///{made.database}")] = made.uri
    try:
        server.start()
        source = MlflowSource(server.uri, NAME)
        (record,) = source.records()
        run = MlflowClient(tracking_uri=server.uri).get_run(record["run_id"])
        assert run.info.artifact_uri.startswith(made.folder.as_uri())
        tokens = source.tokens(record["key"])
        assert tokens is not None
        assert len(tokens) == 40
    finally:
        server.stop()
    assert {path.name for path in tmp_path.iterdir()} == {made.folder.name, "server"}
