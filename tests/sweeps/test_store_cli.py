"""`btu store`: what it shows, what it refuses, and that it removes only with --yes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from store_fixtures import key_of
from typer.testing import CliRunner

from btu.errors import UserError
from orchestrator.cli import store as store_module
from orchestrator.run import local
from orchestrator.store import lease as lease_module
from orchestrator.store import packed
from orchestrator.store.lease import LEFTOVER_S
from orchestrator.store.marker import dump
from orchestrator.store.storage import below
from orchestrator.store.store import Store
from orchestrator.sweep.output import output_location

DAY = 86400.0


@pytest.fixture(params=["path", "memory"])
def output(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An output folder, and one on an object store."""
    if request.param == "memory":
        import fsspec

        # Small files here stand for large ones, which are objects of their own.
        monkeypatch.setattr(packed, "PACKED_BYTES", 0)
        yield f"memory://{uuid.uuid4().hex}/runs"
        fsspec.filesystem("memory").store.clear()
        return
    yield str(tmp_path / "runs")


@pytest.fixture
def store(output: str) -> Store:
    made = Store(below(output, "store"))
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder where launches keep temporary files."""
    monkeypatch.setattr(local, "_places", lambda: [str(tmp_path / "scratch")])
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def run(output: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A function that runs a command on the output folder: exit code and text in one line."""
    # As wide as the longest line: what is cut off cannot be compared.
    monkeypatch.setattr(store_module, "console", Console(width=200))
    monkeypatch.setattr(store_module, "errors", Console(width=200, stderr=True))

    def call(command: str, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(store_module.app, [command, "--output", output, *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return call


def add(store: Store, key: str, name: str = "train", days: float = 0, size: int = 1000) -> None:
    """Publish `size` bytes, half of them in ``model/``, as if `days` ago."""
    folder = store.workspace(key)
    (folder / "model").mkdir()
    (folder / "record.json").write_bytes(b" " * (size // 2))
    (folder / "model" / "weights").write_bytes(b" " * (size - size // 2))
    marker = store.publish(key, folder, name, {})
    old = replace(marker, committed=marker.committed - days * DAY)
    store.storage.write(f"markers/{key}.json", dump(old))


def plan(store: Store, output: str, sweep: str, cells: list[Any]) -> None:
    from orchestrator.store.storage import open_storage

    # The previous version listed names by key, in each cell.
    listed = {key: {"name": "train"} for cell in cells for key in cell["stages"]}
    content = json.dumps({"cells": cells, "stages": listed})
    open_storage(output).write(f"{sweep}/plans/1.json", content.encode())


def age_left_overs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LEFTOVER_S + 60)


# Looking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "du", "verify", "gc"])
def test_a_missing_store_is_named(run: Callable[..., Any], command: str, output: str) -> None:
    with pytest.raises(UserError, match=r"runs/store does not exist: no sweep has run with this"):
        run(command)


def test_the_list_is_newest_first_with_states(store: Store, run: Callable[..., Any]) -> None:
    add(store, key_of("whole"), "train")
    add(store, key_of("model_gone"), "defend")
    store.drop(key_of("model_gone"))
    store.fail(key_of("broken"), {"key": key_of("broken"), "stage": "cell", "reason": "x"})
    with store.leases.lease(key_of("running"), "launch-1") as lease:
        assert lease.acquire()
        code, text = run("ls")
    assert code == 0
    # 1000 bytes are 1.0 kB; of the dropped one the record's 500 are left.
    assert f"{key_of('whole')} │ train │ 1.0 kB │ 0 s │ committed" in text
    assert f"{key_of('model_gone')} │ defend │ 500 bytes │ 0 s │ dropped" in text
    assert f"{key_of('broken')} │ cell │ - │ 0 s │ failed" in text
    assert "leased by launch-1 on" in text
    assert "4 results." in text


def test_the_list_is_limited_to_the_newest(store: Store, run: Callable[..., Any]) -> None:
    for number in range(3):
        add(store, key_of(f"k{number}"), days=2 - number)
        time.sleep(0.02)  # so that the times differ on every file system
    _, text = run("ls", "--limit", "2")
    assert key_of("k0") not in text
    assert text.index(key_of("k2")) < text.index(key_of("k1"))
    assert "3 results, the newest 2 shown." in text
    assert f"{key_of('k0')} │ train │ 1.0 kB │ 2 d" in run("ls", "--limit", "0")[1]


def test_an_ended_lease_and_an_old_failure_are_not_listed(
    store: Store, run: Callable[..., Any]
) -> None:
    add(store, key_of("k"))
    store.fail(key_of("k"), {"key": key_of("k"), "reason": "before"})
    store.storage.write(
        f"leases/{key_of('dead')}.json",
        json.dumps(lease_module._machine() | {"pid": 2**22}).encode(),
    )
    _, text = run("ls")
    assert "1 result." in text
    assert "failed" not in text


def test_usage_by_stage(store: Store, run: Callable[..., Any]) -> None:
    add(store, key_of("a"), "train", size=3000)
    add(store, key_of("b"), "train", size=3000)
    add(store, key_of("c"), "[cell]")
    store.storage.write("entries/d/half/file", b"1234")
    _, text = run("du")
    assert "train │ 2 │ 6.0 kB" in text
    assert "[cell] │ 1 │ 1.0 kB" in text
    assert "(unfinished) │ 1 │ 4 bytes" in text
    # 2 * 3000 + 1000 + 4 bytes in 4 folders
    assert "all │ 4 │ 7.0 kB" in text


def test_verify_says_and_exits_with_one(store: Store, run: Callable[..., Any]) -> None:
    add(store, key_of("good"))
    add(store, key_of("bad"))
    assert run("verify") == (0, "All results are intact.")
    marker = store.marker(key_of("bad"))
    assert marker is not None
    store.storage.write(f"{marker.folder}/record.json", b"x" * 500)
    code, text = run("verify")
    assert code == 1
    assert f"The stored result {key_of('bad')} is damaged (record.json has other content)" in text
    assert "Set aside: 1 damaged result. Launch the sweeps again that need them." in text
    assert run("verify")[0] == 0


def test_a_disk_that_cannot_be_read_is_no_traceback(
    store: Store, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, key_of("k"))

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Store, "verify", broken)
    with pytest.raises(UserError, match=r"cannot be read to its end .*Input/output error"):
        run("verify")


# Making room -----------------------------------------------------------------------------------


def test_without_a_criterion_only_left_overs_go(
    store: Store, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, key_of("k"))
    store.storage.write("entries/d/half/file", b"1234")
    assert run("gc", "--yes") == (0, "Nothing to remove.")
    age_left_overs(monkeypatch)
    code, text = run("gc")
    assert code == 0
    assert text == (
        "1 left-over (4 bytes): unfinished "
        "This would free 4 bytes. Nothing was removed; --yes removes it."
    )
    assert store.storage.exists("entries/d/half/file")
    assert "Freed 4 bytes." in run("gc", "--yes")[1]
    assert not store.storage.exists("entries/d/half/file")
    assert store.committed() == {key_of("k")}


def test_older_results_go(store: Store, run: Callable[..., Any]) -> None:
    add(store, key_of("new"))
    add(store, key_of("old"), days=31)
    add(store, key_of("older"), days=300)
    _, text = run("gc", "--older-than", "30d")
    assert "2 results (2.0 kB): older than the given age" in text
    assert "Nothing was removed" in text
    assert store.committed() == set(map(key_of, ("new", "old", "older")))
    assert "Freed 2.0 kB." in run("gc", "--older-than", "30d", "--yes")[1]
    assert store.committed() == {key_of("new")}


def test_the_oldest_go_until_the_size_is_met(store: Store, run: Callable[..., Any]) -> None:
    for days in range(4):
        add(store, key_of(f"k{days}"), days=days)
    # 4 of 1 kB; below 2.5 kB there is room for two.
    _, text = run("gc", "--max-size", "2.5kB", "-y")
    assert "2 results (2.0 kB): the oldest, above the given size" in text
    assert store.committed() == {key_of("k0"), key_of("k1")}


def test_what_kept_sweeps_need_stays(store: Store, run: Callable[..., Any], output: str) -> None:
    for key in map(key_of, ("cell1", "stage1", "cell2", "stage2", "other")):
        add(store, key)
    plan(
        store, output, "one", [{"key": key_of("cell1"), "varied": {}, "stages": [key_of("stage1")]}]
    )
    plan(
        store,
        output,
        "two",
        [{"key": key_of("cell2"), "varied": {}, "stages": {key_of("stage2"): "train"}}],
    )
    _, text = run("gc", "--keep", "one", "--keep", "two")
    assert "1 result (1.0 kB): needed by no kept sweep" in text
    run("gc", "--keep", "one", "--yes")
    assert store.committed() == {key_of("cell1"), key_of("stage1")}


def test_an_unknown_sweep_removes_nothing(
    store: Store, run: Callable[..., Any], output: str
) -> None:
    add(store, key_of("k"))
    plan(store, output, "sst2", [])
    with pytest.raises(UserError, match=r"unknown sweep in .*runs 'sst'; did you mean 'sst2'\?"):
        run("gc", "--keep", "sst", "--yes")
    assert store.committed() == {key_of("k")}


@pytest.mark.parametrize("content", ["{", "[]", '{"cells": [{}]}', '{"cells": 1}'])
def test_a_broken_plan_removes_nothing(
    store: Store, run: Callable[..., Any], output: str, content: str
) -> None:
    from orchestrator.store.storage import open_storage

    add(store, key_of("k"))
    open_storage(output).write("one/plans/1.json", content.encode())
    with pytest.raises(UserError, match=r"one/plans/1.json is not a plan.*'one'.*launch the sweep"):
        run("gc", "--keep", "one", "--yes")
    assert store.committed() == {key_of("k")}


def test_a_running_launch_keeps_what_it_needs(store: Store, run: Callable[..., Any]) -> None:
    add(store, key_of("k"), days=100)
    store.leases.register_launch("l1", "one", [key_of("k")])
    assert run("gc", "--older-than", "1d", "--yes") == (0, "Nothing to remove.")
    assert store.committed() == {key_of("k")}


def test_what_a_dead_launch_left_is_named_and_goes(
    store: Store, run: Callable[..., Any], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TTL_S", 0.0)  # how long it watches
    launch = {"owner": "far", "host": "elsewhere", "pid": 7, "sweep": "s", "keys": []}
    text = json.dumps(launch).encode()
    store.storage.write("launches/far.json", text)
    folder = scratch / "btu-tune-x"
    folder.mkdir()
    (folder / ".lock").touch()  # nobody holds it
    (folder / "state").write_bytes(b"123")
    age_left_overs(monkeypatch)
    code, said = run("gc")
    assert code == 0
    assert "1 lease or launch of other machines last changed over 0 s ago; watching" in said
    registered = f"1 registered launch ({len(text)} bytes): far of host elsewhere (pid 7, silent"
    assert registered in said
    assert f"temporary folder (3 bytes): {folder}, of a launch that is gone" in said
    assert f"This would free {len(text) + 3} bytes. Nothing was removed" in said
    assert folder.exists()
    assert registered in run("gc", "--yes")[1]
    assert not folder.exists()
    assert store.storage.names("launches") == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * DAY), ("12h", 12 * 3600), ("1.5 H", 5400), ("2w", 14 * DAY), ("5m", 300)],
)
def test_ages(text: str, seconds: float) -> None:
    assert store_module.parse_age(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("20GB", 20 * 10**9), ("1.5 tb", 1_500 * 10**9), ("0B", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert store_module.parse_size(text) == size


@pytest.mark.parametrize("text", ["30", "d", "-3d", "30 days", ""])
def test_an_age_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--older-than '.*' is not an age such as 30d or 12h"):
        store_module.parse_age(text)


@pytest.mark.parametrize("text", ["20", "GB", "20GiB", "1e3MB"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-size '.*' is not a size such as 500MB or 20GB"):
        store_module.parse_size(text)


def test_the_help_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for arguments in ([], ["ls"], ["du"], ["verify"], ["gc"]):
        text = CliRunner().invoke(store_module.app, [*arguments, "--help"]).output
        assert f"btu store {arguments[0] if arguments else 'gc --older-than 30d'}" in text


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_location("~/runs") == str(tmp_path / "runs")
    assert output_location("s3://b/~/") == "s3://b/~"
