"""Copies of a remote store's entries: the least recently used are removed, never those in use."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import key_of

from orchestrator.store.cache import CACHED_S
from orchestrator.store.store import Store

OLD = CACHED_S + 60
SIZE = 10  # bytes of an entry


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[[], Store]:
    """A function that opens the same remote store and cache, as another process would."""
    return lambda: Store(f"local://{tmp_path}/store", cache=tmp_path / "cache")


@pytest.fixture
def store(make_store: Callable[[], Store]) -> Store:
    made = make_store()
    made.prepare()
    return made


def add(store: Store, key: str) -> None:
    folder = store.workspace(key)
    (folder / "model").mkdir()
    (folder / "record.json").write_bytes(b"1234")
    (folder / "model" / "weights").write_bytes(b"567890")
    store.publish(key, folder, "train", {})


def fetched(store: Store, key: str, seconds: float = 0) -> Path:
    """Return the copy of a new entry, as if fetched that long ago."""
    add(store, key)
    copy = store.fetch(key)
    age(copy, seconds)
    return copy


def age(copy: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*copy.rglob("*"), copy):
        os.utime(path, (then, then))


def test_the_least_recently_used_go_until_the_rest_fits(store: Store) -> None:
    copies = [fetched(store, key_of(str(n)), OLD + 60 * n) for n in range(4)]
    store.fetch(key_of("3"))  # the oldest is used again
    # 4 entries of 10 bytes: 29 have room for two. By use the order is now 2, 1, 0, 3.
    assert store.trim_cache(3 * SIZE - 1) == 2 * SIZE
    assert [copy.exists() for copy in copies] == [True, False, False, True]
    # Nothing is left of the others, neither folders nor what was moved away.
    entries = copies[0].parent.parent
    assert sorted(path.name for path in entries.iterdir()) == [key_of("0"), key_of("3")]
    assert sorted(path.name for path in entries.parent.iterdir()) == ["entries", "locks", "markers"]
    assert sorted(path.name for path in (entries.parent / "markers").iterdir()) == [
        f"{key_of('0')}.json",
        f"{key_of('3')}.json",
    ]
    assert store.committed() == set(map(key_of, "0123"))


def test_what_fits_stays(store: Store) -> None:
    copy = fetched(store, key_of("k"), OLD)
    assert store.trim_cache(SIZE) == 0
    assert store.trim_cache() == 0
    assert copy.exists()


def test_what_was_used_within_the_hour_stays(store: Store) -> None:
    young, old = fetched(store, key_of("young"), CACHED_S - 60), fetched(store, key_of("old"), OLD)
    assert store.trim_cache(0) == SIZE
    assert young.exists()
    assert not old.exists()


def test_what_is_being_fetched_stays(store: Store) -> None:
    copy = fetched(store, key_of("k"), OLD)
    # The folder is old, the file that another process is writing is not.
    (copy / "model" / ".half").write_bytes(b"x")
    age(copy / "model", OLD)
    os.utime(copy / "model" / ".half")
    assert store.trim_cache(0) == 0
    assert copy.exists()


def test_what_went_is_fetched_again(store: Store) -> None:
    copy = fetched(store, key_of("k"), OLD)
    assert store.trim_cache(0) == SIZE
    assert store.fetch(key_of("k")) == copy
    assert (copy / "model" / "weights").read_bytes() == b"567890"


def test_another_stores_copies_stay(store: Store, tmp_path: Path) -> None:
    other = Store(f"local://{tmp_path}/other", cache=tmp_path / "cache")
    other.prepare()
    copy = fetched(other, key_of("k"), OLD)
    fetched(store, key_of("k"), OLD)
    assert store.trim_cache(0) == SIZE
    assert copy.exists()


def test_a_local_store_keeps_its_results(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", cache=tmp_path / "cache")
    store.prepare()
    age(fetched(store, key_of("k")), OLD)
    assert store.trim_cache(0) == 0
    assert store.fetch(key_of("k")).exists()


def test_an_empty_cache_is_trimmed(store: Store) -> None:
    assert store.trim_cache(0) == 0


def test_it_looks_only_when_enough_was_fetched(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def walk(folder: str, walk: Callable[[str], Any] = store._cache.storage.walk) -> Any:
        nonlocal looks
        looks += 1
        return walk(folder)

    monkeypatch.setattr(store._cache.storage, "walk", walk)
    # Of 1500 bytes a hundredth is 15: two entries of 10.
    limit = 1500
    store.trim_cache(limit)
    assert looks == 1  # what earlier processes left
    for name, expected in (("a", 1), ("b", 2), ("c", 2)):
        key = key_of(name)
        fetched(store, key)
        store.fetch(key)  # is there, and counts no more
        store.trim_cache(limit)
        assert looks == expected


@pytest.mark.parametrize("moment", ["listed", "moved"])
def test_a_folder_that_vanishes_is_no_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    first, second = fetched(store, key_of("first"), OLD + 60), fetched(store, key_of("second"), OLD)
    storage = store._cache.storage
    method = "walk" if moment == "listed" else "move"
    real = getattr(storage, method)

    def late(*arguments: Any) -> Any:
        found = real(*arguments) if moment == "moved" else list(real(*arguments))
        shutil.rmtree(second, ignore_errors=True)
        return found

    monkeypatch.setattr(storage, method, late)
    assert store.trim_cache(0) == SIZE  # of the first; the second was another's
    assert not first.exists()


def test_what_comes_into_use_meanwhile_stays(
    store: Store, make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fetched(store, key_of("first"), OLD + 60), fetched(store, key_of("second"), OLD)
    storage = store._cache.storage
    move = storage.move

    def late(*arguments: str) -> bool:
        make_store().fetch(key_of("second"))
        return move(*arguments)

    monkeypatch.setattr(storage, "move", late)
    assert store.trim_cache(0) == SIZE
    assert not first.exists()
    assert second.exists()


@pytest.mark.parametrize("moment", ["before a file", "after a file", "after all"])
def test_a_copy_that_vanishes_while_it_is_fetched_is_fetched_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    copy = fetched(store, key_of("k"))
    shutil.rmtree(copy.parent)
    storage: Any = store.storage
    download, get_file = storage.download, storage._fs.get_file
    removals = iter([copy])

    def remove() -> None:
        for folder in removals:  # only once
            # Aside first, as `trim` does: another file may be on its way into it.
            aside = folder.rename(folder.parent.parent / "aside")
            shutil.rmtree(aside)

    def loading(*arguments: Any) -> Any:
        if moment == "before a file":
            remove()
        get_file(*arguments)
        if moment == "after a file":
            remove()

    def loaded(*arguments: Any) -> Any:
        found = download(*arguments)
        if moment == "after all":
            remove()
        return found

    monkeypatch.setattr(storage._fs, "get_file", loading)
    monkeypatch.setattr(storage, "download", loaded)
    assert store.fetch(key_of("k")) == copy
    assert next(removals, None) is None
    assert (copy / "record.json").read_bytes() == b"1234"
    assert (copy / "model" / "weights").read_bytes() == b"567890"
    assert store.committed() == {key_of("k")}


def test_what_others_are_writing_stays(store: Store) -> None:
    fetched(store, key_of("k"))
    cache: Any = store._cache
    busy, left = (cache.folder / ".tmp" / name for name in ("busy", "left"))
    for folder in (busy, left):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("half")
    os.utime(left, (1.0, 1.0))  # a killed process left it
    cache.trim(0)
    assert busy.exists()
    assert not left.exists()
