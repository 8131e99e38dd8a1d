"""File-system primitives: the same guarantees on a folder and on what fsspec reaches."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from btu.errors import UserError
from orchestrator.store.places import TEMPORARY
from orchestrator.store.remote import _modified
from orchestrator.store.storage import (
    Found,
    LocalStorage,
    RemoteStorage,
    Storage,
    below,
    is_url,
    open_storage,
)


@pytest.fixture(params=["path", "local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder by path, the same by fsspec as if it were an object store, and one in memory."""
    if request.param == "memory":
        import fsspec

        yield f"memory://{uuid.uuid4().hex}/root"
        fsspec.filesystem("memory").store.clear()
        return
    yield f"{'local://' if request.param == 'local' else ''}{tmp_path}/root"


@pytest.fixture
def storage(location: str) -> Storage:
    return open_storage(location)


def unfinished(storage: Storage) -> list[Found]:
    return [found for found in storage.walk(TEMPORARY) if found.path != TEMPORARY]


# Files -----------------------------------------------------------------------------------------


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write("a/b.json", b"old")
    storage.write("a/b.json", b"new")
    assert storage.read("a/b.json") == b"new"
    assert storage.exists("a/b.json")
    assert storage.exists("a")
    assert unfinished(storage) == []


def test_a_missing_file_is_said_to_be_missing(storage: Storage) -> None:
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    with pytest.raises(FileNotFoundError):
        storage.digest("a")


def test_the_digest_is_size_and_sha_256(storage: Storage) -> None:
    storage.write("a", b"abc")
    # The first test vector of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.digest("a") == (3, expected)


def test_a_reader_never_sees_half_a_file(storage: Storage) -> None:
    big = 1 << 20
    storage.write("a", b"0" * big)
    done = threading.Event()
    seen = []

    def look() -> None:
        while not done.is_set():
            content = storage.read("a")
            seen.append((len(content), len(set(content))))

    reader = threading.Thread(target=look)
    reader.start()
    for digit in b"1234567890" * 3:
        storage.write("a", bytes([digit]) * big)
    done.set()
    reader.join()
    # Always all bytes, and always of one kind.
    assert set(seen) == {(big, 1)}


def test_a_file_is_created_once(storage: Storage) -> None:
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first"
    assert unfinished(storage) == []


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_of_many_at_once_one_creates(scheme: str, tmp_path: Path) -> None:
    storages = [open_storage(f"{scheme}{tmp_path}/root") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            won = list(
                pool.map(lambda s, n=str(round_): s.create(n, str(id(s)).encode()), storages)
            )
            assert sum(won) == 1
            winner = storages[won.index(True)]
            assert storages[0].read(str(round_)) == str(id(winner)).encode()


def test_lines_come_back_in_order(storage: Storage) -> None:
    assert storage.lines("log") == []
    for number in range(3):
        storage.append("log", f'{{"n": {number}, "text": "a\u2028b"}}')
    # U+2028 is a line's end for str.splitlines, not for JSON.
    assert storage.lines("log") == [f'{{"n": {n}, "text": "a\u2028b"}}' for n in range(3)]


def test_removing_takes_files_and_folders(storage: Storage) -> None:
    storage.write("a/b/c", b"1")
    storage.write("a/d", b"2")
    storage.remove("a/d")
    assert storage.names("a") == ["b"]
    storage.remove("a")
    storage.remove("a")  # missing is fine
    assert not storage.exists("a/b/c")
    assert storage.names("") == []


def test_moving_a_file_and_a_folder(storage: Storage) -> None:
    storage.write("a/b/c", b"1")
    assert storage.move("a/b", "x/y")
    assert storage.read("x/y/c") == b"1"
    assert not storage.exists("a/b/c")
    assert storage.move("x/y/c", "z/c")
    assert storage.read("z/c") == b"1"
    assert not storage.move("gone", "elsewhere")
    assert not storage.exists("elsewhere")


# Listings --------------------------------------------------------------------------------------


def test_names_are_sorted_and_one_level_deep(storage: Storage) -> None:
    assert storage.names("a") == []
    for path in ("a/2", "a/1", "a/.hidden", "a/b/c", "d"):
        storage.write(path, b"")
    assert storage.names("a") == ["1", "2", "b"]
    assert storage.names("") == ["a", "d"]
    assert storage.names("a/none") == []


def test_a_listing_shows_what_others_wrote(location: str) -> None:
    one, other = open_storage(location), open_storage(location)
    assert one.names("a") == []
    other.write("a/1", b"")
    assert one.names("a") == ["1"]
    other.remove("a/1")
    assert one.names("a") == []
    assert not one.exists("a/1")


def test_a_walk_gives_sizes_and_times(storage: Storage) -> None:
    before = time.time()
    storage.write("a/b/c", b"123")
    storage.write("a/d", b"")
    found = {item.path: (item.bytes, item.modified) for item in storage.walk("a")}
    assert {path: size for path, (size, _) in found.items()} == {"a/b/c": 3, "a/d": 0}
    for _, modified in found.values():
        # File systems round times, by far less than this.
        assert modified is not None
        assert before - 5 <= modified <= time.time() + 5
    assert list(storage.walk("none")) == []


def test_a_local_walk_shows_empty_folders(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.workspace("a/b")
    assert [(found.path, found.bytes) for found in storage.walk("a")] == [("a/b", 0)]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"mtime": 5.0}, 5.0),
        ({"LastModified": datetime.fromtimestamp(5, UTC)}, 5.0),  # s3fs
        ({"updated": "1970-01-01T00:00:05.000Z"}, 5.0),  # gcsfs
        ({"updated": "yesterday"}, None),
        ({}, None),
    ],
)
def test_the_time_of_a_change_goes_by_many_names(
    facts: dict[str, Any], expected: float | None
) -> None:
    assert _modified(facts) == expected


# Results ---------------------------------------------------------------------------------------


def test_a_folder_goes_up_and_comes_back(storage: Storage, tmp_path: Path) -> None:
    folder = storage.workspace("entries/k/1")
    assert list(folder.iterdir()) == []
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"w")
    (folder / "record.json").write_bytes(b"r")
    storage.upload(folder, "entries/k/1")
    assert storage.read("entries/k/1/model/weights") == b"w"

    names = ["model/weights", "record.json"]
    back = storage.download("entries/k/1", names, tmp_path / "cache")
    assert [(back / name).read_bytes() for name in names] == [b"w", b"r"]
    assert storage.local == (back == folder)


def test_workspaces_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    day_ago = time.time() - 25 * 3600
    made = {
        "of a killed one": (f"btu-workspace-{ended.pid}-a", day_ago),
        "of today": (f"btu-workspace-{ended.pid}-b", time.time()),
        "of one that runs": (f"btu-workspace-{os.getpid()}-c", day_ago),
        "of somebody else": ("btu-something", day_ago),
    }
    for name, changed in made.values():
        (tmp_path / name / "attempt").mkdir(parents=True)
        (tmp_path / name / "attempt" / "weights").write_bytes(b"w")
        os.utime(tmp_path / name, (changed, changed))
    storage = open_storage("memory://workspaces")
    folder = storage.workspace("entries/k/1")
    assert {what for what, (name, _) in made.items() if not (tmp_path / name).exists()} == {
        "of a killed one"
    }
    assert folder.parent.name.startswith(f"btu-workspace-{os.getpid()}-")


@pytest.mark.parametrize("location", ["local", "memory"], indirect=True)
def test_what_was_fetched_is_not_fetched_again(storage: Storage, tmp_path: Path) -> None:
    storage.write("e/a", b"1")
    storage.write("e/b", b"2")
    folder = storage.download("e", ["a"], tmp_path / "cache")
    assert [path.name for path in folder.iterdir()] == ["a"]
    storage.remove("e/a")
    assert storage.download("e", ["a", "b"], tmp_path / "cache") == folder
    assert (folder / "a").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError):
        storage.download("e", ["c"], tmp_path / "cache")
    # No half-fetched file stays.
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_only_an_empty_folder_is_pruned(tmp_path: Path) -> None:
    for storage in (open_storage(tmp_path / "1"), open_storage(f"local://{tmp_path}/2")):
        storage.write("a/b/c", b"1")
        storage.prune("a/b")
        assert storage.exists("a/b/c")
        storage.remove("a/b/c")
        storage.prune("a/b")
        assert not storage.exists("a/b")
        storage.prune("a/none")


# Only on a folder ------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write("a", b"new")
    with pytest.raises(OSError, match="No space"):
        storage.create("b", b"new")
    assert storage.read("a") == b"old"
    assert not storage.exists("b")
    assert unfinished(storage) == []


def test_without_hard_links_it_creates_once_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    storage = LocalStorage(tmp_path)
    assert storage.create("a", b"first")
    assert not storage.create("a", b"second")
    assert storage.read("a") == b"first"


def test_another_error_of_a_link_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(OSError, match="Input/output"):
        LocalStorage(tmp_path).create("a", b"first")


def test_a_line_that_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda _, data: len(data) - 1)
    with pytest.raises(OSError, match="No space"):
        LocalStorage(tmp_path).append("log", "line")


def test_lines_of_an_object_store_are_read_from_a_copy_on_disk(tmp_path: Path) -> None:
    remote = open_storage(f"local://{tmp_path}")
    remote.append("log", "1")
    remote.append("log", "2")
    assert LocalStorage(tmp_path).lines("log") == ["1", "2"]
    LocalStorage(tmp_path).append("other", "3")
    assert remote.lines("other") == ["3"]


def test_free_bytes_are_those_of_the_disk(tmp_path: Path) -> None:
    free = open_storage(tmp_path).free_bytes()
    assert free is not None
    assert free > 0
    assert open_storage("memory://x").free_bytes() is None


# Only on an object store -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        FileExistsError("412"),
        OSError(errno.EINVAL, "PreconditionFailed"),  # older s3fs
        TypeError("unexpected keyword argument 'mode'"),
    ],
)
def test_a_condition_is_told_apart_from_other_errors(
    answer: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = RemoteStorage(f"memory://{uuid.uuid4().hex}")
    write = storage._fs.pipe_file

    def conditional(path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise answer
        write(path, data)

    monkeypatch.setattr(storage._fs, "pipe_file", conditional)
    storage.write("a", b"old")
    assert not storage.create("a", b"new")
    assert storage.read("a") == b"old"
    if isinstance(answer, TypeError):  # no conditional writes: look, then write
        assert storage.create("b", b"new")
        assert storage.read("b") == b"new"
    elif not isinstance(answer, FileExistsError):
        with pytest.raises(OSError, match="PreconditionFailed"):
            storage.create("b", b"new")


def test_a_folder_moves_where_folders_are_no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(f"memory://{uuid.uuid4().hex}")
    copy = storage._fs.cp_file

    def only_objects(source: str, target: str, **_: object) -> None:
        if not storage._fs.isfile(source):  # as S3 answers
            raise FileNotFoundError(source)
        copy(source, target)

    monkeypatch.setattr(storage._fs, "cp_file", only_objects)
    storage.write("a/b/c", b"1")
    storage.write("a/d", b"2")
    assert storage.move("a", "x")
    assert [storage.read(path) for path in ("x/b/c", "x/d")] == [b"1", b"2"]
    assert not storage.exists("a")


def test_a_file_system_without_links_still_creates(tmp_path: Path) -> None:
    storage = RemoteStorage(f"local://{tmp_path}/root")

    class NoLinks:
        def __init__(self, fs: Any) -> None:
            self._fs = fs

        def __getattr__(self, name: str) -> Any:
            if name == "link":
                raise AttributeError(name)
            return getattr(self._fs, name)

    storage._fs = NoLinks(storage._fs)
    assert storage.create("a", b"first")
    assert not storage.create("a", b"second")
    assert storage.read("a") == b"first"
    assert unfinished(storage) == []


# Where -----------------------------------------------------------------------------------------


def test_the_kind_goes_by_the_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs").location == str(tmp_path / "runs")
    assert open_storage(f"file://{tmp_path}/a%20b").location == f"{tmp_path}/a b"
    assert isinstance(open_storage(Path("runs")), LocalStorage)
    remote = open_storage("memory://bucket/runs/")
    assert (remote.location, remote.local) == ("memory://bucket/runs", False)
    assert isinstance(open_storage(f"local://{tmp_path}"), RemoteStorage)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")  # fsspec's words

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://b/x needs the package s3fs.*pip install s3fs"):
        open_storage("s3://b/x")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match=r"nope://b cannot be opened .*nope.*s3://BUCKET/FOLDER"):
        open_storage("nope://b")


def test_paths_and_urls_are_told_apart() -> None:
    urls = ["s3://b", "file:///a", "simplecache::s3://b"]
    assert all(is_url(url) for url in urls)
    assert not any(is_url(path) for path in ["runs", "/runs", "./a:b", "C:\\runs", "~/runs"])
    assert below("s3://b/runs/", "store") == "s3://b/runs/store"
    assert below(Path("/runs"), "a", "b") == "/runs/a/b"
