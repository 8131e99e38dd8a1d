"""MLflow as a projection of the results on disk, on a SQLite file. Records are made by hand."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest

from btu.errors import UserError
from btu.result_files import dumps
from orchestrator.results.folder import Results
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.sweep import Sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from store_fixtures import Stored

    from orchestrator.tracking.writer import Tracker

# What needs no store ---------------------------------------------------------------------------


def test_a_run_is_named_after_what_tells_it_from_its_siblings() -> None:
    from orchestrator.tracking.runs import run_name

    record = {
        "config": {"attack": {"name": "style"}},
        "varied": {"attack.name": "style", "attack.poison_rate": 0.1, "seed": 2},
    }
    assert run_name(record) == "style poison_rate=0.1 seed=2"
    assert run_name({**record, "varied": {}}) == "style"
    control = {"defense.alpha": 0.1, "seed": 2, "defense.name": "none", "control": "no_defense"}
    assert run_name({**record, "varied": control}) == "style seed=2 control=no_defense"


def test_importing_mlflow_does_not_bring_its_chatter_back() -> None:
    # In a process of its own: here another test may have imported mlflow first.
    levels = (
        "import logging; from orchestrator.tracking import runs; "
        "print(*(logging.getLogger(n).level for n in ('mlflow', 'mlflow.store.db.utils')))"
    )
    done = subprocess.run([sys.executable, "-c", levels], capture_output=True, text=True)
    assert done.stdout.split() == ["30", "50"], done.stderr  # WARNING, CRITICAL


RECORD: dict[str, Any] = {
    "key": "a" * 24,
    "sweep": "tiny",
    "status": "finished",
    "varied": {"seed": 0},
    "config": {"attack": {"name": "style", "poison_rate": 0.1}},
    "metrics": {"undefended_asr": 0.75, "cacc": 0.5, "tuned_cacc": 0.5},
    "notes": {"rows_train": 80},
    "tags": {"host": "h"},
}


def test_a_run_is_tagged_with_what_speaks_against_its_cell() -> None:
    from orchestrator.tracking.runs import run_tags

    tags = run_tags(RECORD)
    assert (tags["cell"], tags["host"]) == ("a" * 24, "h")
    assert not {"marks", "control"} & set(tags)
    weak = {"undefended_asr": 0.25, "cacc": 0.5, "tuned_cacc": 0.75}
    tags = run_tags({**RECORD, "metrics": weak})
    assert tags["marks"] == "attack failed; cacc collapse"
    note = tags["mlflow.note.content"]
    assert "**attack failed**: undefended ASR 0.250 is under 0.5." in note
    assert "**cacc collapse**: CACC 0.500 is 0.250 below" in note
    config = {**RECORD["config"], "defense": {"name": "btu", "max_cut_cost": 0.02}}
    tags = run_tags({**RECORD, "config": config, "metrics": {"flagged": 2, "vetoed": 1}})
    assert tags["marks"] == "token vetoed"
    assert (
        "**token vetoed**: 1 of 2 flagged tokens is not cut: after clean tuning the cut costs more "
        "than 0.02 of the clean rows."
    ) in tags["mlflow.note.content"]
    # A failed cell has no numbers that could speak against it.
    failed = {key: value for key, value in RECORD.items() if key not in ("metrics", "notes")}
    assert "marks" not in run_tags({**failed, "status": "failed"})


def test_a_control_is_tagged_and_runs_again_by_its_note() -> None:
    from orchestrator.tracking.runs import run_tags

    varied = {"attack.poison_rate": 0.0, "seed": 0, "control": "no_poison"}
    tags = run_tags({**RECORD, "varied": varied})
    assert tags["control"] == "no_poison"
    again = "`btu trial sweep.yaml attack.poison_rate=0.0 seed=0`"
    assert again in tags["mlflow.note.content"]


def test_a_relative_sqlite_uri_is_the_same_file_for_driver_and_workers(
    make_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking.server import tracking_uri

    # Workers run in folders of their own.
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(make_sweep(), ["tracking.uri=sqlite:///my.db"])
    assert tracking_uri(sweep) == f"sqlite:///{tmp_path / 'my.db'}"


def test_the_default_is_a_file_in_the_output_folder(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from orchestrator.tracking.server import default_uri, tracking_uri

    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert tracking_uri(load_sweep(make_sweep())) == uri == default_uri(str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"^output s3://b/runs is an object store.*tracking.uri"):
        tracking_uri(load_sweep(make_sweep(), ["output=s3://b/runs"]))


def test_an_experiment_says_how_its_sweep_runs_again(make_sweep: Callable[..., Path]) -> None:
    from orchestrator.tracking.experiment import _experiment_note
    from orchestrator.tracking.runs import TAG_CHARACTERS

    note = _experiment_note(load_sweep(make_sweep()))
    assert "`btu launch sweep.yaml`, with this file:\n\n```yaml\nname: tiny\n" in note
    assert "`btu report tiny --mean`" in note
    # A file that is longer than a description may be is an artifact.
    words = ",".join(f"word{number}" for number in range(900))
    note = _experiment_note(load_sweep(make_sweep(), [f"attack.trigger=[{words}]"]))
    assert "```" not in note
    assert note.endswith("with that artifact of the summary.")
    assert len(note) <= TAG_CHARACTERS


def test_a_uri_is_shown_without_its_password() -> None:
    from orchestrator.tracking.server import shown

    assert shown("postgresql://me:secret@host/x") == "postgresql://host/x"
    assert shown("http://host:5000/a@b") == "http://host:5000/a@b"
    assert shown("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_no_error_and_told_within_seconds(
    make_sweep: Callable[..., Path], free_port: int
) -> None:
    from orchestrator.tracking import experiment as experiment_module

    sweep = load_sweep(make_sweep(), [f"tracking.uri=http://127.0.0.1:{free_port}"])
    began = time.monotonic()
    experiment, reason = experiment_module.prepare(sweep)
    # Two retries with a second of backoff; the defaults take minutes.
    assert time.monotonic() - began < 60
    assert experiment is None
    assert reason
    assert "\n" not in reason


@pytest.mark.parametrize("uri", ["nonsense://x", "postgresql://me:secret@127.0.0.1:1/x"])
def test_a_uri_that_is_none_is_named(make_sweep: Callable[..., Path], uri: str) -> None:
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server

    shown = server.shown(uri)
    with pytest.raises(UserError, match=f"^tracking.uri {shown} ") as caught:
        experiment_module.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_store_that_cannot_be_made_is_named(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from orchestrator.tracking import experiment as experiment_module

    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/x.db"
    with pytest.raises(UserError, match=r"tracking.uri sqlite:///.*file/x.db .*leave it null"):
        experiment_module.prepare(load_sweep(make_sweep(), [f"tracking.uri={uri}"]))
    with pytest.raises(UserError, match=r"tracking.uri sqlite:///.*file/x.db .*--uri"):
        experiment_module.experiment(uri, "tiny")


# On a real store -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store with its tables: creating them takes seconds, so one serves all tests."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).search_experiments()
    return uri


def copied(database: str, path: Path) -> str:
    """Copy a store that may be open; return the URI of the copy."""
    path.parent.mkdir(exist_ok=True)
    with (
        closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as source,
        closing(sqlite3.connect(path)) as target,
    ):
        source.backup(target)
    return f"sqlite:///{path}"


def prepared(make_sweep: Callable[..., Path], name: str, uri: str) -> tuple[Sweep, str]:
    from orchestrator.tracking import experiment as experiment_module

    sweep = load_sweep(make_sweep(name=name, grid={"seed": [0, 1]}), [f"tracking.uri={uri}"])
    experiment, reason = experiment_module.prepare(sweep)
    assert experiment is not None, reason
    return sweep, experiment


@pytest.mark.slow
def test_preparing_makes_a_database_in_the_output_folder(make_sweep: Callable[..., Path]) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module

    sweep = load_sweep(make_sweep(grid={"seed": [0, 1]}))
    Path(sweep.output).mkdir()
    experiment_id, reason = experiment_module.prepare(sweep)
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
    assert "One run per cell, and the run `summary` with means over seeds" in note
    assert sweep.text in note


@pytest.mark.slow
def test_preparing_again_finds_the_same_experiment(
    make_sweep: Callable[..., Path], database: str
) -> None:
    from orchestrator.tracking import experiment as experiment_module

    first = prepared(make_sweep, "twice", database)[1]
    assert prepared(make_sweep, "twice", database)[1] == first
    assert experiment_module.experiment(database, "twice") == first
    assert experiment_module.experiment(database, "never launched") != first


@pytest.mark.slow
def test_a_launch_that_is_killed_while_it_makes_the_database_leaves_none(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from orchestrator.tracking import experiment as experiment_module

    file, folder = make_sweep(), tmp_path / "runs"
    launch = (
        "import signal; from orchestrator.tracking.experiment import prepare;"
        "from orchestrator.sweep.load import load_sweep;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # some shells have it ignored
        f"prepare(load_sweep({str(file)!r}))"
    )

    def begun() -> set[Path]:
        return {path for path in folder.glob(".mlflow.db.*.new") if path.stat().st_size}

    for blow in (signal.SIGKILL, signal.SIGINT):
        known = begun()
        process = subprocess.Popen([sys.executable, "-c", launch], stderr=subprocess.DEVNULL)
        while begun() == known:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)  # in the midst of its tables
        process.send_signal(blow)
        assert process.wait() != 0
        assert not (folder / "mlflow.db").exists()
        assert len(begun()) == 1  # only SIGKILL leaves anything
    left = list(folder.glob(".mlflow.db.*"))
    other = folder / ".mlflow.db.mine.new"
    other.write_text("")
    for path in (*left, other):
        os.utime(path, (time.time() - 7200,) * 2)
    assert experiment_module.prepare(load_sweep(file))[0] is not None
    # Two hours old: abandoned. Another name: never ours.
    assert [path for path in left if path.exists()] == []
    other.unlink()
    assert not list(folder.glob(".mlflow.db.*"))


@pytest.mark.slow
def test_a_young_file_of_another_launch_is_left_alone(
    make_sweep: Callable[..., Path], database: str, tmp_path: Path
) -> None:
    from orchestrator.tracking import experiment as experiment_module

    copied(database, tmp_path / "runs" / "mlflow.db")
    young = tmp_path / "runs" / f".mlflow.db.{'a' * 32}.new"
    young.write_text("")
    assert experiment_module.prepare(load_sweep(make_sweep()))[0] is not None
    assert young.exists()


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_of_two_launches_that_make_a_database_the_first_ones_is_used(
    make_sweep: Callable[..., Path],
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    links: bool,
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking import database as database_module
    from orchestrator.tracking import experiment as experiment_module

    theirs = MlflowClient(tracking_uri=database).create_experiment(f"theirs {links}")
    folder, link = tmp_path / "runs", os.link

    def late(source: Path, target: Path) -> None:
        copied(database, target)
        if not links:  # a disk that has none
            raise PermissionError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(database_module, "_make_tables", lambda path: copied(database, path))
    monkeypatch.setattr(database_module.os, "link", late)
    assert experiment_module.prepare(load_sweep(make_sweep()))[0] is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    assert client.get_experiment(theirs).name == f"theirs {links}"
    assert not list(folder.glob(".mlflow.db.*"))


@pytest.mark.slow
def test_a_disk_without_hard_links_gets_its_database(
    make_sweep: Callable[..., Path], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import database as database_module
    from orchestrator.tracking import experiment as experiment_module

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(database_module, "_make_tables", lambda path: copied(database, path))
    monkeypatch.setattr(database_module.os, "link", refuse)
    assert experiment_module.prepare(load_sweep(make_sweep()))[0] is not None
    assert not list((tmp_path / "runs").glob(".mlflow.db.*"))


@pytest.mark.slow
def test_what_a_removed_database_left_does_not_get_into_the_new_one(
    make_sweep: Callable[..., Path], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import database as database_module
    from orchestrator.tracking import experiment as experiment_module

    folder, removed = tmp_path / "runs", tmp_path / "removed.db"
    folder.mkdir()
    with closing(sqlite3.connect(removed)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE other (x)")
        connection.commit()
        # As a killed process leaves it: closing would take it away.
        shutil.copy(f"{removed}-wal", folder / "mlflow.db-wal")
    monkeypatch.setattr(database_module, "_make_tables", lambda path: copied(database, path))
    assert experiment_module.prepare(load_sweep(make_sweep()))[0] is not None
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "experiments" in tables
    assert "other" not in tables


@pytest.mark.slow
def test_a_new_database_is_one_whole_file_that_nobody_has_open(tmp_path: Path) -> None:
    from orchestrator.tracking import database as database_module

    database_module.make_database(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    opened = [file.path for file in psutil.Process().open_files()]
    assert not [name for name in opened if name.startswith(str(tmp_path))]


@pytest.mark.slow
def test_two_first_launches_at_once_have_one_experiment(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    launch = (
        "from orchestrator.sweep.load import load_sweep;"
        "from orchestrator.tracking.experiment import prepare;"
        f"print(prepare(load_sweep({str(make_sweep())!r}))[0])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", launch], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert said == [client.get_experiment_by_name("tiny").experiment_id] * 2
    assert not list((tmp_path / "runs").glob(".mlflow.db.*"))


@pytest.mark.slow
def test_an_experiment_that_another_launch_created_meanwhile_is_used(
    make_sweep: Callable[..., Path], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    create, theirs = mlflow.MlflowClient.create_experiment, []

    def late(self: MlflowClient, name: str, *values: Any, **more: Any) -> str:
        theirs.append(create(self, name))
        return create(self, name, *values, **more)  # refused: there is one of that name

    monkeypatch.setattr(mlflow.MlflowClient, "create_experiment", late)
    sweep, ours = prepared(make_sweep, "met", database)
    assert [ours] == theirs
    tags = mlflow.MlflowClient(tracking_uri=database).get_experiment(ours).tags
    # It was made by hand, without ours.
    assert sweep.text in tags["mlflow.note.content"]
    assert re.fullmatch("[0-9a-f]{32}", tags["btu.id"])


@pytest.mark.slow
def test_an_experiment_that_cannot_be_created_is_told_as_such(
    make_sweep: Callable[..., Path], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    def refuse(*_: object, **__: object) -> str:
        raise MlflowException("no room")

    monkeypatch.setattr(mlflow.MlflowClient, "create_experiment", refuse)
    with pytest.raises(UserError, match=r"^tracking.uri sqlite:.* does not answer: no room Start"):
        prepared(make_sweep, "refused", database)


@pytest.mark.slow
def test_an_experiment_keeps_its_id(make_sweep: Callable[..., Path], database: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=database)
    old = client.create_experiment("old")  # by a version that gave none
    assert prepared(make_sweep, "old", database)[1] == old
    given = client.get_experiment(old).tags["btu.id"]
    prepared(make_sweep, "old", database)
    assert client.get_experiment(old).tags["btu.id"] == given
    other = prepared(make_sweep, "young", database)[1]
    assert client.get_experiment(other).tags["btu.id"] != given


@pytest.mark.slow
def test_each_sweep_has_the_address_of_its_runs_table(
    make_sweep: Callable[..., Path], database: str
) -> None:
    import json

    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module

    client = MlflowClient(tracking_uri=database)
    client.create_experiment("somebody else's")
    old = client.create_experiment("seen-before-views")
    made = {name: prepared(make_sweep, name, database)[1] for name in ("seen", "seen-before-views")}
    assert made["seen-before-views"] == old
    found = experiment_module.views(database)
    assert "somebody else's" not in found
    for name, experiment in made.items():
        assert found[name] == (
            f"/#/experiments/{experiment}/runs?viewStateShareKey=btu&workflowType=machine_learning"
        )
        view = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.btu"])
        assert {f"metrics.`{name}`" for name in ("asr", "cacc", "detection_precision")} <= set(
            view["selectedColumns"]
        )


def test_views_of_what_is_no_store_are_an_error(tmp_path: Path) -> None:
    from orchestrator.tracking import experiment as experiment_module

    path = tmp_path / "mlflow.db"
    path.write_text("not a database, and longer than the sixteen bytes of a header")
    with pytest.raises(UserError, match=r"^the MLflow store sqlite:.*cannot be read: .*--uri"):
        experiment_module.views(f"sqlite:///{path}")


@pytest.mark.slow
def test_a_tag_that_two_insert_at_once_is_set(
    make_sweep: Callable[..., Path], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=database)
    made = client.create_experiment("tagged-twice")
    real, refused = mlflow.MlflowClient.set_experiment_tag, []

    def once(self: MlflowClient, experiment: str, key: str, value: str) -> None:
        if key not in refused:
            refused.append(key)
            raise MlflowException("UNIQUE constraint failed: experiment_tags")
        real(self, experiment, key, value)

    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", once)
    assert prepared(make_sweep, "tagged-twice", database)[1] == made
    assert set(refused) <= set(client.get_experiment(made).tags)
    assert "btu.id" in refused


@pytest.mark.slow
def test_a_store_of_another_version_is_told_as_such(
    make_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic.util.exc import CommandError

    from orchestrator.tracking import database as database_module
    from orchestrator.tracking import experiment as experiment_module

    def refuse(path: Path) -> None:
        raise CommandError("Can't locate revision identified by 'f00'")

    monkeypatch.setattr(database_module, "_make_tables", refuse)
    with pytest.raises(UserError, match=r"^tracking.uri sqlite:.*Can't locate revision"):
        experiment_module.prepare(load_sweep(make_sweep()))


@pytest.mark.slow
def test_sync_to_a_database_of_its_own_leaves_the_current_directory_alone(
    stored: Stored,
    run_cli: Callable[..., Any],
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    uri = copied(database, there / "x.db")
    monkeypatch.chdir(here)
    done = run_cli("sync", "tiny", "-o", tmp_path / "runs", "--uri", "sqlite:///../there/x.db")
    assert done.code == 0, done
    assert "1 runs written, 0 unfinished ones closed, 0 still missing" in done.out
    assert list(here.iterdir()) == []
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("tiny")
    assert found.artifact_location == (there / "mlartifacts" / "tiny").as_uri()
    with closing(sqlite3.connect(there / "x.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.slow
def test_sync_names_what_it_cannot_use_without_its_password(
    database: str, free_port: int, make_sweep: Callable[..., Path]
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module

    uri = f"http://me:secret@127.0.0.1:{free_port}"
    match = f"^tracking.uri http://127.0.0.1:{free_port} does not answer: .*or correct --uri"
    with pytest.raises(UserError, match=match) as caught:
        experiment_module.experiment(uri, "tiny")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match=r"needs a package that is not installed"):
        experiment_module.experiment("mssql+pymssql://me:secret@127.0.0.1:1/x", "tiny")
    gone = prepared(make_sweep, "gone-too", database)[1]
    MlflowClient(tracking_uri=database).delete_experiment(gone)
    with pytest.raises(UserError, match=r"^experiment 'gone-too' was deleted"):
        experiment_module.experiment(database, "gone-too")


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
SHARED, ROWS = "c" * 24, "d" * 24
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
        folder = self.results.store.workspace(key)
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
            "code": "0.1+then", "started": began, "ended": began + 1,
        }  # fmt: skip
        self.results.store.fail(key, failure)

    def failure(self) -> dict[str, Any]:
        (record,) = self.results.failures()
        return record

    def tags(self, key: str) -> dict[str, str]:
        """Return the tags of a cell's run that was begun and not finished."""
        from orchestrator.tracking.runs import ORIGIN_TAG

        return {"cell": key, ORIGIN_TAG: self.results.origin()}

    def tracker(self) -> Tracker:
        from orchestrator.tracking.writer import Tracker

        return Tracker(self.uri, self.experiment, self.results)

    def log(self, record: Mapping[str, Any], training_set: str = ROWS) -> bool:
        finished = record["status"] == "finished"
        folder = self.results.store.fetch(record["key"]) if finished else None
        return self.tracker().log(record, folder, training_set)

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
        from orchestrator.tracking.sync import sync

        where = {"uri": self.uri, "experiment_id": self.experiment, **other}
        return sync(results=self.results, live=live, **where)  # type: ignore[arg-type]


@pytest.fixture
def bench(
    database: str, cell: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    from mlflow import MlflowClient

    from orchestrator.tracking import server

    server.unanswered.clear()
    server.identities.clear()
    results = Results(str(tmp_path / "runs"), "tiny")
    results.store.prepare()
    base = {key: value for key, value in cell.items() if key != "seed"}
    cells = [
        {
            "key": key,
            "varied": {"attack.name": "badnets", "seed": seed},
            "stages": {SHARED: "poisoned fine-tune", ROWS: "poison"},
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
    assert params["learning_rate"] == "0.001"
    # Few columns; the other settings are in the artifact.
    assert not [name for name in params if "." in name]

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
    assert not {"marks", "control"} & set(tags)
    note = tags["mlflow.note.content"]
    assert f"Cell `{FIRST}` of sweep `tiny`." in note
    assert note.startswith("Attack **badnets** at rate 0.2, defense **btu** (")
    assert "`btu trial sweep.yaml attack.name=badnets seed=0`" in note
    assert tags["kind"] == "trial"
    assert {entry.path for entry in bench.client.list_artifacts(run.info.run_id)} == {
        "config.yaml", "tokens.parquet", "drift.png", "result.json", "flagged_tokens.json",
    }  # fmt: skip
    table = json.loads(bench.artifact(run, "flagged_tokens.json"))
    assert table == {"columns": ["token", "score", "trigger"], "data": [["cf", 2.0, True]]}
    # By this tag of MLflow's own, the UI shows it as a table.
    shown = json.loads(tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "flagged_tokens.json", "type": "table"}]


@pytest.mark.slow
def test_runs_are_found_by_the_rows_that_they_trained_on(bench: Bench) -> None:
    bench.log(bench.finish(FIRST))
    bench.log(bench.finish(SECOND), "e" * 24)

    def found(query: str) -> list[str]:
        return [r.data.tags["cell"] for r in bench.client.search_runs([bench.experiment], query)]

    assert found(f"dataset.digest = '{ROWS}'") == [FIRST]
    assert found("dataset.name = 'tiny badnets 0.2 seed 1'") == [SECOND]
    assert sorted(found("dataset.context = 'training'")) == [FIRST, SECOND]
    (run,) = (run for run in bench.runs() if run.data.tags["cell"] == FIRST)
    (used,) = run.inputs.dataset_inputs
    assert json.loads(used.dataset.source)["attack"]["poison_rate"] == 0.2
    assert json.loads(used.dataset.profile) == {"rows_train": 80}


@pytest.mark.slow
def test_a_run_that_is_written_later_names_its_rows_too(bench: Bench) -> None:
    bench.finish(FIRST)
    assert bench.sync().written == 1
    (run,) = bench.runs()
    assert [used.dataset.digest for used in run.inputs.dataset_inputs] == [ROWS]


@pytest.mark.parametrize("attack", ["badnets", "style"])
def test_without_poison_all_attacks_have_the_same_rows(attack: str) -> None:
    from orchestrator.tracking.runs import training_input

    config = {"data": {"name": "sst2"}, "attack": {"name": attack, "poison_rate": 0.0}, "seed": 3}
    used = training_input({"config": config}, ROWS).dataset
    assert (used.name, used.digest) == ("sst2 unpoisoned", ROWS)
    assert json.loads(used.source)["attack"] is None


@pytest.mark.slow
def test_an_experiment_without_runs_is_not_searched_for_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking.experiment import has_no_run
    from orchestrator.tracking.writer import Tracker

    assert has_no_run(bench.uri, bench.experiment)
    record = bench.finish(FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_runs", lambda *_, **__: 1 / 0)
        fresh = Tracker(bench.uri, bench.experiment, bench.results, fresh=True)
        assert fresh.log(record, bench.results.store.fetch(FIRST), ROWS)
        with pytest.raises(ZeroDivisionError):
            bench.log(record)
    assert bench.statuses() == [(FIRST, "FINISHED")]
    assert not has_no_run(bench.uri, bench.experiment)
    # A deleted run is one: a user may have deleted it on purpose.
    bench.client.delete_run(bench.runs()[0].info.run_id)
    assert not has_no_run(bench.uri, bench.experiment)


@pytest.mark.slow
def test_a_run_that_a_fresh_launch_left_unfinished_is_replaced_at_its_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from orchestrator.tracking.writer import Tracker

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("the worker died")

    record = bench.finish(FIRST)
    fresh = Tracker(bench.uri, bench.experiment, bench.results, fresh=True)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_terminated", cut)
        with pytest.raises(ConnectionError):
            fresh.log(record, bench.results.store.fetch(FIRST), ROWS)
    assert bench.sync().written == 1
    assert bench.statuses() == [(FIRST, "FINISHED")]


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
    assert written == {"record": f"{FIRST}-1000000-2", "run_id": first.info.run_id}
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
@pytest.mark.parametrize("last", ["log_batch", "log_artifacts", "log_inputs", "set_terminated"])
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
def test_what_another_folder_has_told_stays(bench: Bench, tmp_path: Path) -> None:
    # Two people, one server, one sweep: the same cells have the same keys.
    bench.log(bench.finish(FIRST))
    folder = tmp_path / "theirs"
    shutil.copytree(bench.results.output, folder)
    for own in ("origin", "tracked"):
        path = folder / "tiny" / own
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    theirs = bench._replace(results=Results(str(folder), "tiny"))
    theirs.client.create_run(  # being written
        bench.experiment, tags={"cell": SECOND, "mlflow.btu.origin": theirs.results.origin()}
    )
    ours = bench.runs()[-1].info.run_id
    again = theirs.finish(FIRST, 2000.0)
    assert theirs.log(again)
    assert bench.sync().closed == 0
    assert bench.statuses() == [(FIRST, "FINISHED"), (FIRST, "FINISHED"), (SECOND, "RUNNING")]
    assert ours in {run.info.run_id for run in bench.runs()}
    # Its own are replaced as ever.
    theirs.log(theirs.finish(FIRST, 3000.0))
    assert theirs.sync().closed == 1
    assert bench.statuses() == [(FIRST, "FINISHED"), (FIRST, "FINISHED")]


@pytest.mark.slow
def test_runs_of_an_earlier_version_are_written_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.results import folder as folder_module

    record = bench.finish(FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "RUN_VERSION", 1)
        assert bench.log(record)
        assert not bench.log(record)
    (before,) = bench.runs()
    assert bench.sync().written == 1
    (run,) = bench.runs()
    assert run.info.run_id != before.info.run_id


@pytest.mark.slow
def test_a_control_that_is_asked_for_by_itself_is_no_control_in_mlflow_either(
    bench: Bench,
) -> None:
    record = bench.finish(FIRST)
    bench.log({**record, "varied": {**record["varied"], "control": "no_poison"}})
    assert [run.data.tags.get("control") for run in bench.runs()] == ["no_poison"]
    assert bench.sync().written == 1
    assert [run.data.tags.get("control") for run in bench.runs()] == [None]


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
        bench.client.create_run(bench.experiment, tags=bench.tags(key))
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
def test_a_run_that_its_worker_finishes_just_now_is_kept(bench: Bench) -> None:
    record = bench.finish(FIRST)
    tags = {**bench.tags(FIRST), "mlflow.btu.record": f"{FIRST}-1000000-2"}
    run = bench.client.create_run(bench.experiment, tags=tags).info.run_id
    bench.client.log_text(run, "seed: 0", "config.yaml")

    def live(key: str) -> bool:
        # The worker is done between the look at its run and the look at its lease.
        bench.client.set_terminated(run, "FINISHED")
        return False

    synced = bench.sync(live)
    assert (synced.written, synced.closed, synced.missing) == (0, 0, 0)
    assert bench.statuses() == [(FIRST, "FINISHED")]
    assert bench.runs()[0].info.run_id == run
    assert bench.tracker().is_logged(record)


@pytest.mark.slow
def test_a_run_whose_cell_somebody_took_just_now_is_kept(bench: Bench) -> None:
    run = bench.client.create_run(bench.experiment, tags=bench.tags(FIRST)).info.run_id
    with bench.results.store.leases.lease(FIRST, "another launch") as lease:
        assert lease.acquire()
        synced = bench.sync()  # and did not see the lease yet
    assert synced.closed == 0
    assert bench.client.get_run(run).info.status == "RUNNING"
    assert bench.sync().closed == 1


@pytest.mark.slow
def test_a_failure_that_was_retried_meanwhile_replaces_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Results.failures
    bench.fail(FIRST)
    bench.fail(SECOND)
    listed = list(bench.results.failures())
    stale = [listed]
    monkeypatch.setattr(
        Results, "failures", lambda self: iter(stale.pop()) if stale else real(self)
    )
    # Since they were listed another launch has finished one cell and is at the other one again,
    assert bench.log(bench.finish(FIRST, 2000.0))
    bench.results.store.clear_failure(SECOND)
    synced = bench.sync()
    assert (synced.written, synced.missing) == (0, 0)
    assert bench.statuses() == [(FIRST, "FINISHED")]
    # which fails for another reason.
    bench.fail(SECOND, 3000.0, "out of memory")
    stale.append(listed)
    assert bench.sync().written == 1
    assert stale == []
    assert bench.statuses() == [(FIRST, "FINISHED"), (SECOND, "FAILED")]
    assert {run.data.tags.get("reason") for run in bench.runs()} == {None, "out of memory"}


@pytest.mark.slow
def test_a_database_that_was_removed_is_filled_again(
    bench: Bench, database: str, tmp_path: Path
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from orchestrator.tracking import experiment as experiment_module

    path = tmp_path / "removed" / "mlflow.db"
    uri = f"sqlite:///{path}"
    bench.finish(FIRST)
    ids = []
    for _ in range(2):
        copied(database, path)
        ids.append(experiment_module.experiment(uri, "again"))
        for written in (1, 0):
            assert bench.sync(uri=uri, experiment_id=ids[-1]).written == written
        SqlAlchemyStore._engine_map[uri].dispose()  # as a process that ends does
        shutil.rmtree(path.parent)
    assert ids[0] == ids[1]  # of SQLite, which starts over


@pytest.mark.slow
def test_a_moved_folder_keeps_its_notes(bench: Bench, database: str, tmp_path: Path) -> None:
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import writer

    bench.finish(FIRST)
    uris = [f"sqlite:///{tmp_path / name / 'mlflow.db'}" for name in ("before", "after")]
    copied(database, tmp_path / "before" / "mlflow.db")
    made = experiment_module.experiment(uris[0], "moved")
    assert bench.sync(uri=uris[0], experiment_id=made).written == 1
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    assert experiment_module.experiment(uris[1], "moved") == made
    (record,) = bench.results.records()
    assert writer.Tracker(uris[1], made, bench.results).is_logged(record)


@pytest.mark.slow
def test_one_bad_record_does_not_keep_the_others_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking.writer import Tracker

    tell = Tracker._write

    def refuse(self: Tracker, record: Mapping[str, Any], *rest: Any) -> str:
        if record["key"] == FIRST:
            raise ValueError("MLflow refuses this one")
        return tell(self, record, *rest)

    bench.finish(FIRST)
    bench.finish(SECOND)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_write", refuse)
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
    from orchestrator.tracking import server, writer

    record = bench.finish(FIRST)
    uri = f"http://127.0.0.1:{free_port}"
    tracker = writer.Tracker(uri, "1", bench.results)
    folder = bench.results.store.fetch(FIRST)
    with pytest.raises(Exception, match=str(free_port)):
        tracker.log(record, folder)
    # Python's own error: nothing was asked this time, and nobody waited for an answer.
    with pytest.raises(ConnectionError, match=str(free_port)):
        tracker.log(record, folder)
    # After a while it is asked again.
    later = time.monotonic() + server.DOWN_SECONDS + 1
    with monkeypatch.context() as patch:
        patch.setattr(server.time, "monotonic", lambda: later)
        with pytest.raises(Exception, match=str(free_port)) as caught:
            tracker.log(record, folder)
    assert not isinstance(caught.value, ConnectionError)
    assert not tracker.is_logged(record)


def test_a_file_that_refuses_once_is_not_left_alone() -> None:
    from orchestrator.tracking import server

    # A locked SQLite file is free again in a moment; a server that is away stays so for a while.
    for _ in range(2):
        with pytest.raises(OSError, match="locked"), server.breaker("sqlite:///x.db"):
            raise OSError("database is locked")


@pytest.mark.slow
def test_sync_gives_up_on_a_dead_server_and_counts_what_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import server, writer
    from orchestrator.tracking import sync as sync_module

    asked: list[str] = []

    def away(self: writer.Tracker, *_: object) -> None:
        asked.append(self.uri)
        raise ConnectionError("nobody there")

    # Six records on an experiment that can be listed, but takes no run.
    records = [
        {"key": f"{n:024x}", "status": "failed", "started": 1.0, "varied": {}} for n in range(6)
    ]
    monkeypatch.setattr(Results, "failures", lambda self: iter(records))
    monkeypatch.setattr(sync_module, "_reread", lambda results, record: record)
    monkeypatch.setattr(writer.Tracker, "_whole_run", away)
    synced = bench.sync()
    assert len(asked) == server.GIVE_UP == 3
    assert (synced.written, synced.missing) == (0, 6)
    assert synced.reason == "ConnectionError: nobody there"
