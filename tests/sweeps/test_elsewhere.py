"""A store that others can write to does not choose where the user's artifacts go."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from published import NAME, Output, empty_database
from store_fixtures import Stored

from btu.errors import UserError
from orchestrator.tracking.elsewhere import refuse_elsewhere, refuse_host
from orchestrator.tracking.server import default_uri, launched_uri

if TYPE_CHECKING:
    from conftest import Ran

__all__ = ["empty_database"]

HOSTS = ["s3://bucket/x", "http://host/api", "sftp://host/x", "dbfs:/x", "file://host/x", None]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir()
    path.touch(0o644)
    path.chmod(0o644)
    return path


def give_away(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a link belong to another user."""
    if os.geteuid() == 0:
        os.chown(link, 4321, 4321, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)


@pytest.mark.parametrize("mode", [0o664, 0o646])
@pytest.mark.parametrize(
    "address", ["file:///elsewhere", "/elsewhere", "{}/mlartifacts/../../x", "{}/x", *HOSTS]
)
def test_a_file_that_others_can_write_sends_nothing_elsewhere(
    database: Path, address: str | None, mode: int
) -> None:
    address = address and address.format(database.parent)
    # The user's own file: the address may be on purpose.
    refuse_elsewhere(database, address)
    database.chmod(mode)
    with pytest.raises(UserError, match=r"other users can write to the MLflow store"):
        refuse_elsewhere(database, address)
    for beside in ("/mlartifacts/a/b/artifacts", "/mlartifacts/a%20b"):
        refuse_elsewhere(database, f"file://{database.parent}{beside}")


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_what_sqlite_reads_with_the_file_counts_too(database: Path, suffix: str) -> None:
    beside = Path(f"{database}{suffix}")
    beside.touch()
    beside.chmod(0o666)
    with pytest.raises(UserError, match="other users can write"):
        refuse_elsewhere(database, "/elsewhere")


@pytest.mark.parametrize("address", HOSTS)
def test_nothing_is_read_from_a_host_that_others_name(database: Path, address: str) -> None:
    refuse_host(database, address)
    database.chmod(0o666)
    with pytest.raises(UserError, match="other users can write to the MLflow store"):
        refuse_host(database, address)
    refuse_host(database, "/elsewhere")


@pytest.mark.parametrize("place", ["mlartifacts", "mlartifacts/made", "mlartifacts/made/report"])
def test_links_of_another_user_are_not_followed(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    link = database.parent / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path)
    address = f"file://{database.parent}/mlartifacts/made"
    refuse_elsewhere(database, address)  # the user's own
    give_away(link, monkeypatch)
    with pytest.raises(UserError, match=f"{place} is a symbolic link of another user"):
        refuse_elsewhere(database, address)


def test_the_database_is_no_link_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "mlflow.db"
    link.symlink_to(tmp_path / "x.db")
    assert default_uri(str(tmp_path)).endswith("/mlflow.db")
    give_away(link, monkeypatch)
    with pytest.raises(UserError, match="is a symbolic link of another user"):
        default_uri(str(tmp_path))


@pytest.mark.parametrize("inside", [True, False])
def test_a_record_that_others_can_write_names_no_store_outside(
    stored: Stored, run_cli: Callable[..., Ran], tmp_path: Path, inside: bool
) -> None:
    folder = tmp_path / "runs" if inside else tmp_path / "home"
    uri = f"sqlite:///{folder / 'other.db'}"
    record = tmp_path / "runs" / "tiny" / "server.json"
    stored.results.record_server(uri)
    record.chmod(0o644)
    assert launched_uri(stored.results, "--uri") == uri
    record.chmod(0o664)
    if inside:
        assert launched_uri(stored.results, "--uri") == uri
        return
    ran = run_cli("sync", "tiny", "-o", tmp_path / "runs")
    assert "outside of the output folder, and other users can write that record" in ran.err
    assert not folder.exists()


@pytest.mark.parametrize("uri", ["/home/x", "file:///home/x", "sqlite:////x.db?uri=true", "x"])
def test_no_spelling_of_a_local_store_is_missed(stored: Stored, uri: str, tmp_path: Path) -> None:
    record = tmp_path / "runs" / "tiny" / "server.json"
    record.write_text(json.dumps({"uri": uri, "whole": True}))
    record.chmod(0o666)
    with pytest.raises(UserError, match="outside of the output folder"):
        launched_uri(stored.results, "--uri")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["experiments SET artifact_location", "runs SET artifact_uri"])
def test_a_launch_writes_nothing_where_others_say(
    tmp_path: Path, empty_database: Path, change: str
) -> None:
    made, home = Output(tmp_path / "runs", empty_database), tmp_path / "home"
    made.compute(1)
    made.launch()
    made.change(f"UPDATE {change} = 'file://{home}/x'")
    made.database.chmod(0o666)
    made.compute(2)
    said: Any = ""
    try:
        said = made.launch()
    except UserError as error:
        said = error
    assert "other users can write to the MLflow store" in str(said)
    assert not home.exists()
    assert not list(home.parent.glob(f"home/**/{NAME}"))
