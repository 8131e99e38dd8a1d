"""Results on disk: complete or not there, and readable again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btu.errors import UserError
from orchestrator.store import RESULT, ResultStore, dumps, find_sweep, read_record


class Writes:
    """Stands for a trial's result: writes one file, then does what it is told."""

    def __init__(self, text: str = "rows", error: Exception | None = None) -> None:
        self.text, self.error = text, error

    def write_files(self, folder: Path) -> None:
        (folder / "rows.txt").write_text(self.text)
        if self.error:
            raise self.error


def record(key: str = "k", **more: Any) -> dict[str, Any]:
    return {"key": key, "metrics": {"asr": 0.5}, **more}


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    made = ResultStore(tmp_path / "runs" / "sweep")
    made.prepare()
    return made


def test_a_committed_cell_is_done_and_complete(store: ResultStore) -> None:
    assert not store.is_done("k")
    folder = store.commit(record(), Writes())
    assert store.is_done("k")
    assert folder == store.path("k")
    assert sorted(p.name for p in folder.iterdir()) == [RESULT, "rows.txt"]
    assert [r["key"] for r in store.records()] == ["k"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_nothing(store: ResultStore, error: Exception) -> None:
    with pytest.raises(type(error)):
        store.commit(record(), Writes(error=error))
    assert not store.is_done("k")
    assert list(store.cells.iterdir()) == []


def test_a_record_that_is_no_json_leaves_nothing(store: ResultStore) -> None:
    with pytest.raises(TypeError):
        store.commit(record(odd=object()), Writes())
    assert list(store.cells.iterdir()) == []


def test_the_record_is_written_last(store: ResultStore) -> None:
    class Looks(Writes):
        def write_files(self, folder: Path) -> None:
            super().write_files(folder)
            seen.append(((folder / RESULT).exists(), folder.name, store.path("k").exists()))

    seen: list[tuple[bool, str, bool]] = []
    store.commit(record(), Looks())
    (has_record, name, final_exists) = seen[0]
    assert not has_record
    assert not final_exists
    assert name.startswith(".")  # records() skips it


def test_a_killed_writer_leaves_no_record(store: ResultStore) -> None:
    # What SIGKILL between the last write and the rename leaves behind.
    left = store.cells / ".tmp-k-1"
    left.mkdir()
    (left / RESULT).write_text(dumps(record()))
    assert not store.is_done("k")
    assert list(store.records()) == []
    assert store.commit(record(), Writes()).is_dir()


def test_a_result_that_is_there_stays(store: ResultStore) -> None:
    store.commit(record(metrics={"asr": 0.25}), Writes("first"))
    store.commit(record(metrics={"asr": 0.75}), Writes("second"))
    assert (store.path("k") / "rows.txt").read_text() == "first"
    assert [r["metrics"] for r in store.records()] == [{"asr": 0.25}]
    assert [p.name for p in store.cells.iterdir()] == ["k"]


def test_a_rename_that_fails_for_another_reason_is_an_error(store: ResultStore) -> None:
    # A file where the cell's folder belongs: nothing is there that could stay.
    store.path("k").write_text("in the way")
    with pytest.raises(OSError, match=r"Not a directory|exists"):
        store.commit(record(), Writes())
    assert not store.is_done("k")


def test_a_failure_is_kept_apart_and_replaced_by_the_next(store: ResultStore) -> None:
    store.commit_failure({"key": "k", "reason": "first"})
    store.commit_failure({"key": "k", "reason": "second"})
    assert store.is_failed("k")
    assert not store.is_done("k")
    assert list(store.records()) == []
    assert [r["reason"] for r in store.failures()] == ["second"]
    assert [p.name for p in store.failed.iterdir()] == ["k.json"]


def test_a_success_ends_a_failure(store: ResultStore) -> None:
    store.commit_failure({"key": "k", "reason": "bad luck"})
    store.commit(record(), Writes())
    assert not store.is_failed("k")
    assert list(store.failures()) == []


def test_a_cell_that_is_done_is_among_no_failures(store: ResultStore) -> None:
    # A worker killed after its result came into place, before the old failure was removed.
    store.commit(record(), Writes())
    store.commit_failure({"key": "k", "reason": "from before"})
    assert not store.is_failed("k")
    assert [r["key"] for r in store.failures()] == []


def test_a_failure_can_be_written_without_preparing(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new")
    store.commit_failure({"key": "k", "reason": "r"})
    assert store.is_failed("k")


def test_an_empty_store_has_no_records(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "nowhere")
    assert list(store.records()) == list(store.failures()) == []


# JSON ------------------------------------------------------------------------------------------


def test_nan_is_null_on_disk_and_nan_again(tmp_path: Path) -> None:
    path = tmp_path / RESULT
    metrics = {"precision": float("nan"), "recall": np.float64("nan"), "asr": 1 / 3}
    path.write_text(dumps({"metrics": metrics}))
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text())["metrics"]["precision"] is None
    back = read_record(path)["metrics"]
    assert math.isnan(back["precision"])
    assert math.isnan(back["recall"])
    assert back["asr"] == 1 / 3  # every digit


def test_numpy_values_become_plain_ones() -> None:
    written = dumps({"a": np.float32(0.5), "b": np.int64(3), "c": (np.bool_(True), [None, "x"])})
    assert json.loads(written) == {"a": 0.5, "b": 3, "c": [True, [None, "x"]]}


def test_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps({"metrics": {"loss": float("inf")}})


# Finding a sweep, and the output folder --------------------------------------------------------


def test_a_sweep_is_found_by_name(store: ResultStore) -> None:
    assert find_sweep(store.folder.parent, "sweep").folder == store.folder


def test_an_unknown_sweep_names_the_closest(store: ResultStore) -> None:
    with pytest.raises(
        UserError,
        match=r"unknown sweep in .*runs 'sweap'; did you mean 'sweep'\?.*launch it first",
    ):
        find_sweep(store.folder.parent, "sweap")


def test_a_missing_output_folder_is_no_crash(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown sweep in .*gone 'x'.*launch it first"):
        find_sweep(tmp_path / "gone", "x")


def test_preparing_leaves_two_empty_folders(store: ResultStore) -> None:
    assert sorted(p.name for p in store.folder.iterdir()) == ["cells", "failed"]
    store.prepare()  # again, on a resume
    assert sorted(p.name for p in store.folder.iterdir()) == ["cells", "failed"]


@pytest.mark.parametrize("below", ["", "a/b"])
def test_an_unwritable_output_folder_is_named(tmp_path: Path, below: str) -> None:
    # Below a regular file nobody can make a folder, not even root.
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(
        UserError, match=r"output folder .*file.* cannot be written \(.+\); set output=FOLDER"
    ):
        ResultStore(blocked / below).prepare()
