"""A sweep's results from the store and from MLflow: the same records, whoever asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import config, shelve

from btu.errors import UserError
from orchestrator.results import TRACKED, Results, record_id
from orchestrator.source import open_source


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


def test_an_unknown_sweep_gets_a_suggestion(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UserError, match=r"unknown sweep .*'mode'.*did you mean 'made'"):
        open_source("mode", str(tmp_path))
