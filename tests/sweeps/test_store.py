"""Results by key: committed whole or not there, checked when read, made by one at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_fixtures import key_of

from btu.errors import UserError
from btu.result_files import dumps, loads
from orchestrator.store import lease as lease_module
from orchestrator.store import packed, tree
from orchestrator.store.gc import Usage, gc, gc_candidates, usage
from orchestrator.store.lease import LEFTOVER_S, LOOK_S, TTL_S, Holder, Lease
from orchestrator.store.marker import dump
from orchestrator.store.places import FOLDERS
from orchestrator.store.store import Damaged, Missing, Store

K = key_of("k")
ATTEMPT = "a" * 32
SHARED = ["path", "local"]  # what several processes can use
FILES = {"record.json": b'{"a": 1}', "model/weights": b"0123456789"}
RECORD_BYTES, MODEL_BYTES = 8, 10  # of the two above
BYTES = RECORD_BYTES + MODEL_BYTES
LATER = LEFTOVER_S + 60


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(params=[*SHARED, "memory"])
def location(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A folder by path, the same by fsspec, and an object store in memory.

    The small files here stand for large ones: none is packed (tests/sweeps/test_store_network.py).
    """
    if request.param == "memory":
        import fsspec

        monkeypatch.setattr(packed, "PACKED_BYTES", 0)
        yield f"memory://{uuid.uuid4().hex}/store"
        fsspec.filesystem("memory").store.clear()
        return
    yield f"{'local://' if request.param == 'local' else ''}{tmp_path}/store"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def make_store(
    location: str, tmp_path: Path, warnings: list[str], clock: Clock
) -> Callable[[], Store]:
    """A function that opens the same store again, as another process would."""
    return lambda: Store(location, cache=tmp_path / "cache", warn=warnings.append, clock=clock)


@pytest.fixture
def store(make_store: Callable[[], Store]) -> Store:
    made = make_store()
    made.prepare()
    return made


def add(store: Store, key: str = K, name: str = "train", **files: bytes) -> Path:
    """Publish `FILES`, or `files`, and return the folder that they were written to."""
    folder = store.workspace(key)
    for path, content in (files or FILES).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    store.publish(key, folder, name, {"seconds": 1.5})
    return folder


def spoil(store: Store, path: str, change: Callable[[bytes], bytes]) -> None:
    store.storage.write(path, change(store.storage.read(path)))
    forget(store)


def forget(store: Store) -> None:
    """Remove this machine's copies, which serve where the store's files are damaged."""
    if not store.storage.local:
        shutil.rmtree(store._cache.folder, ignore_errors=True)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def attempts(store: Store, key: str = K) -> list[str]:
    return store.storage.names(f"entries/{key}")


def model_of(store: Store, key: str = K) -> str:
    marker = store.marker(key)
    assert marker is not None
    return f"{marker.folder}/model/weights"


def age(store: Store, key: str, seconds: float) -> None:
    """Make a committed entry older."""
    marker = store.marker(key)
    assert marker is not None
    old = replace(marker, committed=marker.committed - seconds)
    store.storage.write(f"markers/{key}.json", dump(old))


def snapshot(store: Store) -> dict[str, bytes]:
    top = store.storage.names("")
    found = [found.path for name in top for found in store.storage.walk(name)]
    files = [p for p in found if not store.storage.names(p) and p.count("/") > 0]
    return {path: store.storage.read(path) for path in files}


# Commit ----------------------------------------------------------------------------------------


def test_a_published_entry_is_committed_and_whole(store: Store) -> None:
    assert not store.is_committed(K)
    assert store.committed() == set()
    before = time.time()
    add(store)
    assert store.is_committed(K)
    assert store.committed() == {K}
    folder = store.fetch(K)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    marker = store.marker(K)
    assert marker is not None
    assert (marker.key, marker.name, marker.info) == (K, "train", {"seconds": 1.5})
    assert marker.bytes == BYTES
    assert before <= marker.committed <= time.time()
    assert store.read_json(K, "record.json") == {"a": 1}


def test_another_process_sees_it(store: Store, make_store: Callable[[], Store]) -> None:
    other = make_store()
    assert other.committed() == set()
    add(store)
    assert other.committed() == {K}
    assert (other.fetch(K) / "record.json").read_bytes() == FILES["record.json"]


def test_undefined_facts_are_null(store: Store) -> None:
    folder = store.workspace(K)
    marker = store.publish(K, folder, "cell", {"asr": float("nan"), "n": np.int64(3)})
    assert marker.info == {"asr": None, "n": 3}
    assert store.marker(K) == marker


def test_files_without_a_marker_are_not_there(store: Store) -> None:
    folder = store.workspace(K)
    (folder / "record.json").write_bytes(b"{}")
    store.storage.upload(folder, f"entries/{K}/{ATTEMPT}")
    assert store.committed() == set()
    assert store.marker(K) is None
    with pytest.raises(Missing) as missing:
        store.fetch(K)
    assert missing.value.key == K
    with pytest.raises(Missing):
        store.read_json(K, "record.json")


def test_what_is_there_stays_and_the_second_is_discarded(store: Store) -> None:
    add(store)
    standing = store.marker(K)
    folder = store.workspace(K)
    (folder / "record.json").write_bytes(b"other")
    assert store.publish(K, folder, "train", {}) == standing
    assert not folder.exists()
    assert len(attempts(store)) == 1
    assert store.read_json(K, "record.json") == {"a": 1}


def test_a_success_ends_a_failure(store: Store) -> None:
    store.fail(K, {"key": K, "reason": "first"})
    store.fail(K, {"key": K, "reason": "second", "metrics": {"asr": float("nan")}})
    assert store.failed() == {K}
    failure = store.failure(K)
    assert failure is not None
    assert failure["reason"] == "second"
    assert math.isnan(failure["metrics"]["asr"])
    assert [f["reason"] for f in store.failures()] == ["second"]
    add(store)
    # From a worker that was killed in between, or was slow.
    store.fail(K, {"key": K, "reason": "from before"})
    assert store.failed() == set()
    assert store.failure(K) is None
    assert list(store.failures()) == []


def test_a_failure_can_be_cleared(store: Store) -> None:
    store.fail(K, {"reason": "x"})
    store.clear_failure(K)
    store.clear_failure(K)
    assert store.failed() == set()


@pytest.mark.parametrize("step", ["upload", "create"])
def test_a_full_disk_commits_nothing(
    store: Store, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = store.workspace(K)
    (folder / "record.json").write_bytes(b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(store.storage, step, full)
        with pytest.raises(OSError, match="No space") as raised:
            store.publish(K, folder, "train", {})
    assert raised.value.errno == errno.ENOSPC
    assert not store.is_committed(K)
    assert not folder.exists()
    assert attempts(store) == []
    add(store)  # once there is room
    assert store.is_committed(K)


def test_breaking_off_after_the_marker_keeps_the_entry(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.storage.create

    def interrupted(*arguments: Any, **named: Any) -> bool:
        create(*arguments, **named)
        raise KeyboardInterrupt

    folder = store.workspace(K)
    (folder / "record.json").write_bytes(b'{"a": 1}')
    with monkeypatch.context() as patch:
        patch.setattr(store.storage, "create", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.publish(K, folder, "train", {})
    store.discard(folder)  # as a caller does after any error
    assert store.is_committed(K)
    assert (store.fetch(K) / "record.json").read_bytes() == b'{"a": 1}'


def test_a_discarded_attempt_leaves_nothing(store: Store) -> None:
    folder = store.workspace(K)
    (folder / "half").write_bytes(b"x")
    store.discard(folder)
    assert not folder.parent.exists()
    assert attempts(store) == []


@pytest.mark.parametrize("location", ["path"], indirect=True)
@pytest.mark.parametrize(("size", "flushed"), [(999_992, False), (999_993, True)])
def test_only_a_large_entry_is_flushed(
    store: Store, size: int, flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, link = os.fsync, os.link

    def syncing(opened: int) -> None:
        calls.append("sync")
        sync(opened)

    def linking(*arguments: Any, **named: Any) -> None:
        calls.append("link")
        link(*arguments, **named)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "link", linking)
    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
        assert calls == ["link"]
        calls.clear()
        # From a million bytes on, 7 of them in the record: 2 files and their folders, then the
        # marker's content, and its folder once it is there.
        add(store, K, **{"record.json": b'{"a":1}', "model/weights": b"0" * size})
    assert calls == (["sync"] * 5 + ["link", "sync"] if flushed else ["link"])


# Damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], r"model/weights has 9 bytes, not 10"),
        (flip, r"model/weights has other content"),
        (None, r"model/weights is missing"),
    ],
)
def test_a_damaged_file_sets_the_entry_aside(
    store: Store, change: Callable[[bytes], bytes] | None, reason: str, warnings: list[str]
) -> None:
    add(store)
    path = model_of(store)
    attempt = attempts(store)[0]
    if change:
        spoil(store, path, change)
    else:
        store.storage.remove(path)
        forget(store)
    with pytest.raises(Damaged, match=reason) as damaged:
        store.fetch(K)
    assert damaged.value.key == K
    assert len(warnings) == 1
    assert f"The stored result {K} is damaged" in warnings[0]
    # It counts as missing, its files are kept for a look, and it can be made again.
    assert store.committed() == set()
    names = store.storage.names(f"damaged/{K}-{attempt}")
    assert {"record.json", "reason.txt"} <= set(names)
    assert attempts(store) == []
    with pytest.raises(Missing):
        store.fetch(K)
    add(store)
    assert (store.fetch(K) / "model/weights").read_bytes() == FILES["model/weights"]


def test_a_damaged_record_is_not_read(store: Store) -> None:
    add(store)
    spoil(store, f"entries/{K}/{attempts(store)[0]}/record.json", flip)
    with pytest.raises(Damaged, match=r"record\.json has other content"):
        store.read_json(K, "record.json")
    assert not store.is_committed(K)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b'{"marker": [], "sha256": ""}',
        lambda data: data.replace(b"1.5", b"2.5"),  # valid JSON, except for its checksum
        lambda data: b"\xff" + data,
    ],
)
def test_an_invalid_marker_counts_as_missing(
    store: Store, change: Callable[[bytes], bytes], warnings: list[str]
) -> None:
    add(store)
    spoil(store, f"markers/{K}.json", change)
    assert store.marker(K) is None
    assert not store.is_committed(K)
    assert len(warnings) == 1
    assert "marker" in warnings[0]
    add(store)
    assert store.fetch(K)


def test_a_marker_of_another_key_is_invalid(store: Store) -> None:
    add(store)
    store.storage.write(f"markers/{key_of('other')}.json", store.storage.read(f"markers/{K}.json"))
    assert store.marker(key_of("other")) is None
    assert store.is_committed(K)


def test_an_invalid_marker_does_not_stop_a_publisher(store: Store) -> None:
    store.storage.write(f"markers/{K}.json", b"{")
    add(store)
    assert store.marker(K) is not None


@pytest.mark.parametrize("location", ["local", "memory"], indirect=True)
def test_a_damaged_copy_is_fetched_again(store: Store, warnings: list[str]) -> None:
    add(store)
    copy = store.fetch(K) / "model/weights"
    copy.write_bytes(b"x")
    assert store.fetch(K) / "model/weights" == copy
    assert copy.read_bytes() == FILES["model/weights"]
    assert warnings == []


def test_an_entry_removed_while_it_is_read_is_missing(
    store: Store, make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store)
    forget(store)
    method = "open_folder" if store.storage.local else "download"
    read = getattr(store.storage, method)

    def removed_first(*arguments: Any) -> Any:
        make_store().drop(K)
        return read(*arguments)

    monkeypatch.setattr(store.storage, method, removed_first)
    with pytest.raises(Missing):
        store.fetch(K)
    assert store.dropped() == {K}


def test_a_failing_disk_sets_nothing_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store)

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tree, "files_of", broken)
    with pytest.raises(OSError, match="Input/output"):
        store.fetch(K)
    assert store.is_committed(K)


def test_what_reads_differently_twice_is_not_called_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store)
    differs = tree.difference

    def once_each(*arguments: Any, remembered: bool = True, **named: Any) -> str | None:
        # What a fetch reads is wrong, the look at the disk that follows is not.
        return "other" if remembered else differs(*arguments, remembered=False, **named)

    monkeypatch.setattr(tree, "difference", once_each)
    with pytest.raises(OSError, match="read differently twice"):
        store.fetch(K)
    assert store.is_committed(K)


def test_a_model_is_hashed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store)
    store.fetch(K)

    def again(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(tree, "_hash", again)
    assert store.fetch(K)


def test_verify_reads_everything(store: Store, warnings: list[str]) -> None:
    for key in map(key_of, ("good", "flipped", "dropped", "cut")):
        add(store, key)
        store.fetch(key)  # a remembered check must not count
    dropped = key_of("dropped")
    store.drop(dropped)
    spoil(store, model_of(store, key_of("flipped")), flip)
    spoil(store, f"entries/{dropped}/{attempts(store, dropped)[0]}/record.json", flip)
    spoil(store, f"markers/{key_of('cut')}.json", lambda data: data[:9])
    seen: list[tuple[int, int]] = []
    assert store.verify(lambda *at: seen.append(at)) == [
        (key_of("cut"), "its marker is cut short or no marker"),
        (dropped, "record.json has other content"),
        (key_of("flipped"), "model/weights has other content"),
    ]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(warnings) == 3
    assert store.committed() == {key_of("good")}
    assert store.dropped() == set()
    assert store.verify() == []


# Dropping --------------------------------------------------------------------------------------


def test_dropping_keeps_the_record(store: Store) -> None:
    add(store)
    assert store.drop(K) == MODEL_BYTES
    assert store.committed() == set()
    assert store.dropped() == {K}
    assert store.read_json(K, "record.json") == {"a": 1}
    with pytest.raises(FileNotFoundError, match=rf"{K} has no file model/weights"):
        store.read_json(K, "model/weights")
    with pytest.raises(Missing):
        store.fetch(K)
    marker = store.marker(K, dropped=True)
    assert marker is not None
    assert (marker.dropped, marker.bytes) == (True, RECORD_BYTES)
    assert store.drop(K) == 0
    assert store.drop(key_of("none")) == 0


def test_a_light_fetch_does_without_the_model(store: Store) -> None:
    add(store)
    spoil(store, model_of(store), flip)
    assert (store.fetch(K, light=True) / "record.json").is_file()  # the model is not read
    store.drop(K)
    assert (store.fetch(K, light=True) / "record.json").is_file()


def test_only_what_is_named_is_kept(store: Store) -> None:
    add(store, K, **{"a": b"1", "b": b"22", "model/w": b"333"})
    # b and model/w go: 2 + 3 bytes.
    assert store.drop(K, keep=["a", "none"]) == 5
    marker = store.marker(K, dropped=True)
    assert marker is not None
    assert list(marker.files) == ["a"]


def test_dropping_that_broke_off_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_remove_all", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.drop(K)
    assert store.dropped() == {K}
    assert store.drop(K) == MODEL_BYTES


def test_a_dropped_entry_can_be_made_again(store: Store) -> None:
    add(store)
    store.drop(K)
    add(store)
    assert store.committed() == {K}
    assert store.dropped() == set()
    assert store.storage.names("markers") == [f"{K}.json"]
    assert len(attempts(store)) == 1  # the rest of the dropped one is gone
    assert (store.fetch(K) / "model/weights").read_bytes() == FILES["model/weights"]


# Several processes -----------------------------------------------------------------------------


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    lead = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from orchestrator.store.store import Store\n"
        "store = Store(sys.argv[1], cache=Path(sys.argv[2]))\n"
        f"K = {K!r}\n"
        "key_of = lambda name: name.encode().hex().ljust(24, '0')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", lead + code, *arguments], stdout=subprocess.PIPE, text=True
    )


def wait_for(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("location", SHARED, indirect=True)
def test_of_two_publishers_at_once_one_wins(store: Store, location: str, tmp_path: Path) -> None:
    code = """
for n in range(20):
    folder = store.workspace(key_of(f"k{n}"))
    (folder / "record.json").write_text(folder.name)
    Path(f"{sys.argv[3]}-{n}").touch()
    while not Path(f"{sys.argv[4]}-{n}").exists():
        pass
    print(store.publish(key_of(f"k{n}"), folder, "train", {}).attempt, flush=True)
"""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    cache = str(tmp_path / "cache")
    processes = [run(code, location, cache, one, two), run(code, location, cache, two, one)]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # Both name the same winner, whose files alone are there.
    assert len(told[0]) == 20
    assert told[0] == told[1]
    for n, winner in enumerate(told[0]):
        assert attempts(store, key_of(f"k{n}")) == [winner]
        assert (store.fetch(key_of(f"k{n}")) / "record.json").read_text() == winner


@pytest.mark.parametrize("location", SHARED, indirect=True)
def test_a_publisher_killed_before_the_marker_leaves_no_entry(
    store: Store, location: str, tmp_path: Path
) -> None:
    code = """
folder = store.workspace(K)
(folder / "record.json").write_text("{}")
store.storage.create = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
store.publish(K, folder, "train", {})
"""
    killed = run(code, location, str(tmp_path / "cache"))
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(attempts(store)) == 1
    assert store.committed() == set()
    assert store.marker(K) is None
    add(store)
    assert store.read_json(K, "record.json") == {"a": 1}
    # What it left is removed after an hour, and nothing else.
    assert gc_candidates(store) == []
    late = gc_candidates(store, now=time.time() + LATER)
    assert [candidate.kind for candidate in late] == ["left-over"]
    assert gc(store, late) == 2  # the bytes of "{}"
    assert store.fetch(K)


@pytest.mark.parametrize("location", SHARED, indirect=True)
def test_when_the_leader_is_killed_one_of_the_others_takes_over(
    store: Store, location: str, tmp_path: Path
) -> None:
    code = """
folder, log = Path(sys.argv[3]), Path(sys.argv[4])
while not store.is_committed(K):
    lease = store.leases.lease(K, f"launch-{os.getpid()}")
    if not lease.acquire():
        time.sleep(0.005)
        continue
    with lease:
        if store.is_committed(K):
            break
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\\n")
        while not Path(sys.argv[3]).exists():  # the leader waits for its end here
            time.sleep(0.01)
        folder = store.workspace(K)
        (folder / "record.json").write_text(str(os.getpid()))
        store.publish(K, folder, "train", {})
"""
    killed, log = tmp_path / "killed", tmp_path / "log"
    arguments = (location, str(tmp_path / "cache"), str(killed), str(log))
    processes = [run(code, *arguments) for _ in range(6)]
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"), "nobody leads")
    time.sleep(0.5)  # the others try and must not get it
    (leader,) = log.read_text().split()
    os.kill(int(leader), signal.SIGKILL)
    killed.touch()
    for process in processes:
        process.communicate(timeout=120)
    # The leader is the one of six that was killed; the others end well.
    codes = {process.pid: process.returncode for process in processes}
    assert codes.pop(int(leader)) == -signal.SIGKILL
    assert set(codes.values()) == {0}
    # One leader and exactly one that took over, which published.
    _, successor = log.read_text().split()
    assert len(attempts(store)) == 1
    assert (store.fetch(K) / "record.json").read_text() == successor
    assert store.storage.names("leases") == []


# Leases ----------------------------------------------------------------------------------------


def foreign(store: Store, name: str = f"{K}.json", beat: int = 0, **facts: Any) -> None:
    """Write the lease of a process on another machine."""
    held = {"owner": "other", "host": "elsewhere", "pid": 1, "started": "1", "token": "t"}
    store.storage.write(f"leases/{name}", json.dumps({**held, "beat": beat, **facts}).encode())


def test_a_lease_is_for_one_at_a_time(store: Store, make_store: Callable[[], Store]) -> None:
    with store.leases.lease(K, "me") as mine:
        assert mine.acquire()
        assert mine.acquire()  # again is fine
        other = make_store()
        assert not other.leases.lease(K, "you").acquire()
        assert other.leases.held_by_other(K, "you")
        assert not other.leases.held_by_other(K, "me")
        assert not other.leases.held_by_other(key_of("else"), "you")
        assert store.leases.in_use() == {K}
        assert store.leases.held()[K]["owner"] == "me"
    assert store.storage.names("leases") == []
    with store.leases.lease(K, "you") as yours:
        assert yours.acquire()


def test_looking_takes_nothing(store: Store) -> None:
    assert not store.leases.held_by_other(K, "me")
    assert store.storage.names("leases") == []


def test_the_same_owner_takes_its_earlier_lease(store: Store) -> None:
    foreign(store, owner="launch-1/k")
    assert not store.leases.lease(K, "launch-2/k").acquire()
    with store.leases.lease(K, "launch-1/k") as lease:
        assert lease.acquire()


@pytest.mark.parametrize("started", ["gone", "another"])
def test_a_lease_of_a_dead_process_is_stale_at_once(store: Store, started: str) -> None:
    if started == "gone":
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        facts = {"pid": ended.pid, "started": "1"}
    else:  # the number was given to another process
        facts = {"pid": os.getpid(), "started": "1"}
    foreign(store, **lease_module._machine(), **facts)
    assert not store.leases.held_by_other(K, "me")
    assert store.leases.in_use() == set()
    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
    assert store.storage.names("leases") == []  # no guard stays either


def test_a_zombie_is_dead(store: Store) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    started = lease_module._started(zombie.pid)
    wait_for(lambda: lease_module._started(zombie.pid) is None, "it never ended")
    foreign(store, **lease_module._machine(), pid=zombie.pid, started=started)
    assert not store.leases.held_by_other(K, "me")
    zombie.wait()


def test_a_process_of_the_same_number_elsewhere_is_another(store: Store, clock: Clock) -> None:
    # A container shares the host's name and boot but numbers its own processes.
    foreign(store, **{**lease_module._machine(), "numbering": "pid:[1]"}, pid=2**22 - 1)
    assert store.leases.held_by_other(K, "me")
    clock.seconds += TTL_S
    assert not store.leases.held_by_other(K, "me")


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b'{"pid": "x"}'])
def test_a_lease_that_does_not_change_is_stale_after_a_while(
    store: Store, content: bytes | None, clock: Clock
) -> None:
    foreign(store)
    if content is not None:  # broken ones too
        store.storage.write(f"leases/{K}.json", content)
    lease = store.leases.lease(K, "me")
    assert not lease.acquire()  # seen for the first time
    clock.seconds += TTL_S - 1
    assert not lease.acquire()
    clock.seconds += 1
    with lease:
        assert lease.acquire()


def test_a_lease_with_a_heartbeat_is_not_stale(store: Store, clock: Clock) -> None:
    for beat in range(10):
        foreign(store, beat=beat)
        assert store.leases.held_by_other(K, "me")
        clock.seconds += TTL_S - 1
        assert store.leases.held_by_other(K, "me")


def test_the_time_runs_from_when_we_first_saw_it(
    store: Store, make_store: Callable[[], Store], clock: Clock
) -> None:
    foreign(store)
    assert store.leases.held_by_other(K, "me")
    clock.seconds += TTL_S
    assert not store.leases.held_by_other(K, "me")
    assert make_store().leases.held_by_other(K, "me")  # it has not seen how long


def test_the_heartbeat_changes_the_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
        wait_for(lambda: store.leases.held().get(K, {}).get("beat", 0) >= 3, "no heartbeat")
    assert lease._thread is None
    assert store.storage.names("leases") == []


def test_a_full_disk_does_not_end_the_heartbeat(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    tried = threading.Event()

    def full(*_: object, **__: object) -> None:
        tried.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(store.storage, "write", full)
            assert tried.wait(30)
        before = store.leases.held()[K]["beat"]
        wait_for(lambda: store.leases.held()[K]["beat"] > before, "no heartbeat after it")


def test_a_lost_lease_is_neither_rewritten_nor_released(store: Store, clock: Clock) -> None:
    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
        foreign(store)
        taken = store.storage.read(f"leases/{K}.json")
        clock.seconds += LOOK_S - 1
        assert lease.beat()  # it has not looked yet
        assert store.storage.read(f"leases/{K}.json") == taken
        clock.seconds += 1
        assert not lease.beat()
    assert store.storage.read(f"leases/{K}.json") == taken
    assert not store.leases.lease(K, "me").acquire()


def test_a_lease_that_changed_meanwhile_is_not_taken(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(store)
    assert store.leases.held_by_other(K, "me")
    clock.seconds += TTL_S
    create = store.storage.create

    def slow(*arguments: Any, **named: Any) -> bool:
        foreign(store, token="a third's")  # which was faster
        return create(*arguments, **named)

    monkeypatch.setattr(store.storage, "create", slow)
    assert not store.leases.lease(K, "me").acquire()
    assert store.leases.held()[K]["token"] == "a third's"
    assert store.storage.names("leases") == [f"{K}.json"]


def test_who_died_while_taking_over_blocks_nobody_for_long(store: Store, clock: Clock) -> None:
    foreign(store)
    foreign(store, f"{K}.json.guard")
    lease = store.leases.lease(K, "me")
    assert not lease.acquire()
    clock.seconds += TTL_S
    assert not lease.acquire()  # sees the guard for the first time
    clock.seconds += TTL_S
    assert not lease.acquire()  # removes it
    with lease:
        assert lease.acquire()


def test_where_creating_is_not_exclusive_the_later_writer_has_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: object, **__: object) -> bool:
        foreign(store)
        return True

    monkeypatch.setattr(store.storage, "create", overtaken)
    assert not store.leases.lease(K, "me").acquire()


def test_a_release_that_fails_is_no_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, store.leases.lease(K, "me") as lease:
        assert lease.acquire()
        patch.setattr(store.storage, "remove_files", gone)
    assert isinstance(lease, Lease)
    assert store.storage.names("leases") == [f"{K}.json"]


# Launches --------------------------------------------------------------------------------------


def test_what_a_launch_needs_is_in_use(store: Store, make_store: Callable[[], Store]) -> None:
    store.leases.register_launch("l1", "sweep", [key_of("a"), key_of("b")])
    assert make_store().leases.in_use() == {key_of("a"), key_of("b")}
    # This process lives, however long ago that was written.
    assert make_store().leases.in_use(now=time.time() + LATER) == {key_of("a"), key_of("b")}
    store.leases.release_launch("l1")
    store.leases.release_launch("l1")
    assert store.leases.in_use() == set()
    assert store.storage.names("launches") == []


def test_a_launch_elsewhere_is_in_use_while_it_beats(store: Store, clock: Clock) -> None:
    held = {"owner": "l1", "host": "elsewhere", "pid": 1, "started": "1", "keys": [key_of("a")]}
    store.storage.write("launches/l1.json", json.dumps(held).encode())
    assert store.leases.in_use() == {key_of("a")}
    for _ in range(3):
        clock.seconds += TTL_S
        store.leases.heartbeat_launch("l1")
        assert store.leases.in_use() == {key_of("a")}
    clock.seconds += TTL_S
    assert store.leases.in_use() == set()


def test_a_launch_elsewhere_without_a_change_for_an_hour_has_ended(store: Store) -> None:
    held = {"owner": "l1", "host": "elsewhere", "pid": 1, "started": "1", "keys": [key_of("a")]}
    store.storage.write("launches/l1.json", json.dumps(held).encode())
    store.storage.write("launches/l2.json", b"{")  # broken: its keys are unknown
    assert store.leases.in_use(now=time.time() + LATER) == set()


def test_a_heartbeat_that_fails_is_for_the_launch_to_tell(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.storage, "write", full)
    with pytest.raises(OSError, match="No space left"):
        store.leases.heartbeat_launch("l1")


def test_timings_of_all_launches(store: Store) -> None:
    assert store.timings() == []
    row = {"victim": "bert", "device": "cpu", "units": 3, "seconds": 1.5, "count": 1}
    store.add_timings("l1", [{**row, "stage": "train"}, {**row, "stage": "cell"}])
    store.add_timings("l1", [])
    store.add_timings("l1", [{**row, "stage": "defend"}])
    store.add_timings("l1", [{**row, "stage": "unmeasured", "seconds": float("nan")}])
    store.add_timings("l2", [{**row, "stage": "poison"}])
    rows = sorted(store.timings(), key=lambda row: row["stage"])
    assert [row["stage"] for row in rows] == ["cell", "defend", "poison", "train"]
    assert rows[1] == {**row, "stage": "defend"}
    store.storage.append("timings/l2.json", '[{"stage": "cut sho')
    assert len(store.timings()) == 4


# Room ------------------------------------------------------------------------------------------


def test_usage_by_stage(store: Store) -> None:
    add(store, key_of("a"), "train")
    add(store, key_of("b"), "train")
    add(store, key_of("c"), "defend")
    store.drop(key_of("c"))
    store.storage.write("entries/d/half/file", b"123")
    store.storage.write("damaged/e-1/file", b"12345")
    assert usage(store) == {
        "(damaged)": Usage(1, 5),
        "(unfinished)": Usage(1, 3),
        "defend": Usage(1, RECORD_BYTES),
        "train": Usage(2, 2 * BYTES),
    }


def removed(store: Store, **criteria: Any) -> set[str]:
    """Collect garbage, and return the keys that are gone."""
    before = snapshot(store)
    keys = store.committed() | store.dropped()
    candidates = gc_candidates(store, **criteria)
    assert snapshot(store) == before  # looking removes nothing
    expected = sum(candidate.bytes for candidate in candidates)
    assert gc(store, candidates) == expected
    return keys - store.committed() - store.dropped()


def test_without_a_criterion_no_result_goes(store: Store) -> None:
    add(store, key_of("a"))
    assert removed(store, now=time.time() + LATER) == set()


def test_what_no_kept_sweep_needs_goes(store: Store) -> None:
    for key in map(key_of, "abc"):
        add(store, key)
    store.drop(key_of("c"))
    assert removed(store, keep={key_of("b")}) == {key_of("a"), key_of("c")}
    assert [found.path.split("/")[1] for found in store.storage.walk("entries")] == [
        key_of("b")
    ] * 2
    assert store.storage.names("markers") == [f"{key_of('b')}.json"]
    assert store.fetch(key_of("b"))


def test_what_is_older_goes(store: Store) -> None:
    for days, key in enumerate(map(key_of, ("new", "day", "month"))):
        add(store, key)
        age(store, key, 86400.0 * days)
    assert removed(store, older_than=1.5 * 86400) == {key_of("month")}


def test_the_oldest_go_until_the_rest_fits(store: Store) -> None:
    for days, key in enumerate(map(key_of, "abcd")):
        add(store, key)
        age(store, key, 86400.0 * days)
    # 4 results of 18 bytes: below 2 * 18 + 17 bytes there is room for two.
    assert removed(store, max_bytes=2 * BYTES + BYTES - 1) == {key_of("c"), key_of("d")}
    assert removed(store, max_bytes=2 * BYTES) == set()


def test_age_and_size_add_up_and_kept_ones_stay(store: Store) -> None:
    for days, key in enumerate(map(key_of, "abcd")):
        add(store, key)
        age(store, key, 86400.0 * days)
    # d is too old but kept; c is the oldest of the others.
    assert removed(store, older_than=2.5 * 86400, max_bytes=3 * BYTES, keep={key_of("d")}) == {
        key_of("c")
    }
    # With an age limit, what is not needed is removed only if it is old too.
    assert removed(store, older_than=2.5 * 86400, keep={key_of("d")}) == set()
    assert removed(store, older_than=0.5 * 86400) == {key_of("b"), key_of("d")}


def test_what_is_in_use_is_never_touched(store: Store, make_store: Callable[[], Store]) -> None:
    for key in map(key_of, ("launched", "leased", "free")):
        add(store, key)
    half = f"entries/{key_of('leased')}/half/file"
    store.storage.write(half, b"123")
    store.leases.register_launch("l1", "sweep", [key_of("launched")])
    late = time.time() + LATER
    with store.leases.lease(key_of("leased"), "me") as lease:
        assert lease.acquire()
        assert removed(make_store(), keep=set(), older_than=0.0, max_bytes=0, now=late) == {
            key_of("free")
        }
        assert store.storage.exists(half)
    assert store.fetch(key_of("launched"))
    assert store.fetch(key_of("leased"))


def test_what_comes_into_use_meanwhile_is_spared(store: Store) -> None:
    add(store, key_of("a"))
    candidates = gc_candidates(store, keep=set())
    store.leases.register_launch("l1", "sweep", [key_of("a")])
    assert gc(store, candidates) == 0
    assert store.fetch(key_of("a"))


def test_what_a_dead_process_registered_goes_at_once(store: Store) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    dead = {**lease_module._machine(), "pid": int(gone.stdout), "started": "1"}
    foreign(store, **dead)
    launch = {**dead, "owner": "l1", "sweep": "s", "keys": []}
    store.storage.write("launches/l1.json", json.dumps(launch).encode())
    store.storage.write("launches/l1.beat", b"1")
    store.leases.register_launch("l2", "sweep", [])  # this process lives
    store.leases.heartbeat_launch("l2")
    found = gc_candidates(store)
    assert {c.kind: c.paths for c in found} == {
        "lease": (f"leases/{K}.json",),
        "registered launch": ("launches/l1.beat", "launches/l1.json"),
    }
    host = lease_module._machine()["host"]
    assert found[1].why.startswith(f"l1 of host {host} (pid {int(gone.stdout)}, silent for ")
    gc(store, found)
    assert store.storage.names("leases") == []
    assert sorted(store.storage.names("launches")) == ["l2.beat", "l2.json"]


@pytest.mark.parametrize("lives", [True, False])
def test_a_silent_launch_of_another_machine_is_watched_first(
    store: Store, clock: Clock, lives: bool
) -> None:
    """Clocks of machines differ: the times of files alone say nothing for certain."""
    launch = {"owner": "far", "host": "elsewhere", "pid": 1, "started": "1", "sweep": "s"}
    store.storage.write("launches/far.json", json.dumps(launch).encode())
    store.storage.write("launches/far.beat", b"1")
    watched: list[str] = []

    def watch(suspects: list[Holder]) -> None:
        watched.extend(holder.name for holder in suspects)
        clock.seconds += TTL_S
        if lives:
            store.storage.write("launches/far.beat", b"2")

    # Not silent for long enough.
    assert gc_candidates(store, now=time.time() + TTL_S - 5, watch=watch) == []
    assert watched == []
    found = gc_candidates(store, now=time.time() + TTL_S + 5, watch=watch)
    assert watched == ["far"]
    assert [c.kind for c in found] == ([] if lives else ["registered launch"])
    # A launch that was cut off and is back before the removal is spared.
    store.storage.write("launches/far.beat", b"3")
    gc(store, found)
    assert sorted(store.storage.names("launches")) == ["far.beat", "far.json"]
    clock.seconds += TTL_S
    gc(store, found)
    assert bool(store.storage.names("launches")) == lives


def test_left_overs_go_after_an_hour(store: Store) -> None:
    add(store, key_of("whole"))
    add(store, key_of("dropped"))
    store.drop(key_of("dropped"))
    store.storage.write("entries/half/1/file", b"123")
    store.storage.write(f"entries/{key_of('whole')}/2/file", b"1234")  # beside a committed attempt
    store.storage.write(f"damaged/{K}-1/file", b"12345")
    store.storage.write(".tmp/1", b"123456")
    foreign(store, f"{key_of('dead')}.json")
    store.storage.write(f"leases/{key_of('dead')}.json.guard", b"")
    store.storage.write("launches/dead.json", b"{}")
    store.storage.write("launches/dead.beat", b"1")
    assert gc_candidates(store) == []
    late = gc_candidates(store, now=time.time() + LATER)
    assert sorted((c.kind, c.bytes) for c in late if c.kind == "left-over") == [
        ("left-over", size) for size in (3, 4, 5, 6)
    ]
    held = [c for c in late if c.kind in ("lease", "registered launch")]
    assert sorted(path for c in held for path in c.paths) == [
        "launches/dead.beat", "launches/dead.json", f"leases/{key_of('dead')}.json",
        f"leases/{key_of('dead')}.json.guard",
    ]  # fmt: skip
    gc(store, late, now=time.time() + LATER)
    kept = [found.path.split("/")[1] for found in store.storage.walk("entries")]
    assert sorted(kept) == [key_of("dropped"), key_of("whole"), key_of("whole")]
    assert [n for f in ("damaged", "leases", "launches") for n in store.storage.names(f)] == []
    assert store.fetch(key_of("whole"))
    assert store.read_json(key_of("dropped"), "record.json") == {"a": 1}


# The folder ------------------------------------------------------------------------------------


def test_preparing_leaves_empty_folders(store: Store, location: str) -> None:
    store.prepare()  # again, on a resume
    if store.storage.local:
        assert store.storage.names("") == sorted(FOLDERS)
    assert snapshot(store) == {}


def test_a_store_is_there_once_something_is_in_it(make_store: Callable[[], Store]) -> None:
    store = make_store()
    assert not store.exists()
    add(store)
    assert make_store().exists()


def test_an_empty_store_has_nothing(make_store: Callable[[], Store]) -> None:
    store = make_store()
    assert store.committed() == store.dropped() == store.failed() == store.leases.in_use() == set()
    assert store.markers() == store.timings() == store.verify() == gc_candidates(store) == []
    assert usage(store) == {}


@pytest.mark.parametrize("below", ["", "/a/b"])
@pytest.mark.parametrize("scheme", ["", "local://"])
def test_an_unwritable_output_folder_is_named(tmp_path: Path, scheme: str, below: str) -> None:
    # Nobody can make a folder below a regular file, not even root.
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(
        UserError, match=r"output folder .*file.* cannot be written \(.+\); set output=FOLDER"
    ):
        Store(f"{scheme}{blocked}{below}").prepare()


def test_a_disk_with_too_little_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MB free, a sweep needs 1000000000000 MB; .*output="):
        Store(tmp_path).prepare(needed_bytes=10**18)


def test_a_disk_that_gives_back_other_bytes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(store.storage, "read", lambda _: b"other")
    with pytest.raises(UserError, match="returns other bytes"):
        store.prepare()


@pytest.mark.parametrize("location", SHARED, indirect=True)
def test_a_copied_store_works(store: Store, tmp_path: Path) -> None:
    add(store)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    assert (Store(tmp_path / "copy").fetch(K) / "record.json").read_bytes() == b'{"a": 1}'


# JSON ------------------------------------------------------------------------------------------


def test_nan_is_null_on_disk_and_nan_again(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    metrics = {"precision": float("nan"), "recall": np.float64("nan"), "asr": 1 / 3}
    path.write_text(dumps({"metrics": metrics}))
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text())["metrics"]["precision"] is None
    back = loads(path.read_text())["metrics"]
    assert math.isnan(back["precision"])
    assert math.isnan(back["recall"])
    assert back["asr"] == 1 / 3  # every digit
    assert loads("{}") == {"metrics": {}}


def test_numpy_values_become_plain_ones() -> None:
    written = dumps({"a": np.float32(0.5), "b": np.int64(3), "c": (np.bool_(True), [None, "x"])})
    assert json.loads(written) == {"a": 0.5, "b": 3, "c": [True, [None, "x"]]}


def test_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps({"metrics": {"loss": float("inf")}})


def test_an_odd_object_is_refused() -> None:
    with pytest.raises(TypeError):
        dumps({"odd": object()})
