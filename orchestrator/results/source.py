"""Where a sweep's results are read from: the store on disk, or MLflow alone.

Reports take a `Source` and do not depend on which of the two it is: both give exactly the same
records of a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from btu.errors import UserError
from btu.result_files import ROWS, TOKENS
from orchestrator.results.folder import Results, record_id
from orchestrator.store.store import Damaged, Missing

# The fields of a record. History and label names of a cell's result are left out: MLflow has them
# in a form of its own.
FIELDS = (
    "key", "sweep", "status", "run_id", "config", "varied", "metrics", "notes", "tags",
    "started", "ended",
)  # fmt: skip
FAILURE_FIELDS = (
    "key", "sweep", "status", "run_id", "config", "varied", "stage", "reason", "started", "ended",
)  # fmt: skip


class Source(Protocol):
    """A sweep's results, wherever they are."""

    @property
    def name(self) -> str:
        """The sweep's name."""
        ...

    def records(self) -> list[dict[str, Any]]:
        """Return the finished cells, by key, with those of `FIELDS` that a cell has.

        run_id: the MLflow run, "" if there is none. metrics, notes: floats. started, ended:
        seconds since 1970, to the millisecond.
        """
        ...

    def failures(self) -> list[dict[str, Any]]:
        """Return the failed cells, by key, with `FAILURE_FIELDS`: which stage failed, and why."""
        ...

    def tokens(self, key: str) -> pd.DataFrame | None:
        """Return a finished cell's table of tokens; None if it was not kept or is damaged."""
        ...

    def rows(self, key: str) -> pd.DataFrame | None:
        """Return a finished cell's table of training rows; None if not kept or damaged."""
        ...


class StoreSource:
    """A sweep's results in the store of its output folder."""

    def __init__(self, results: Results) -> None:
        self._results = results

    @property
    def name(self) -> str:
        return self._results.name

    def records(self) -> list[dict[str, Any]]:
        runs = self._results.runs()
        return [trimmed(record, FIELDS, runs) for record in self._results.records()]

    def failures(self) -> list[dict[str, Any]]:
        failures = list(self._results.failures())
        runs = self._results.runs() if failures else {}
        return [trimmed(record, FAILURE_FIELDS, runs) for record in failures]

    def tokens(self, key: str) -> pd.DataFrame | None:
        return self._table(key, TOKENS)

    def rows(self, key: str) -> pd.DataFrame | None:
        return self._table(key, ROWS)

    def _table(self, key: str, name: str) -> pd.DataFrame | None:
        try:
            return read_table(self._results.store.fetch(key) / name)
        except (Damaged, Missing):
            return None


class Snapshot:
    """A sweep's results at one moment, so that all outputs of a report agree.

    Records and failures are read at once, tables when they are asked for. Do not modify records.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source
        self._records, self._failures = source.records(), source.failures()

    def records(self) -> list[dict[str, Any]]:
        return list(self._records)

    def failures(self) -> list[dict[str, Any]]:
        return list(self._failures)

    def tokens(self, key: str) -> pd.DataFrame | None:
        return self._source.tokens(key)

    def rows(self, key: str) -> pd.DataFrame | None:
        return self._source.rows(key)


def records_or_refuse(source: Source, side: str = "") -> list[dict[str, Any]]:
    """Return the finished cells of a sweep.

    side: which one of several sweeps it is, for the message.

    Raises:
        UserError: no cell is finished.
    """
    records = source.records()
    if not records:
        which = f" ({side})" if side else ""
        raise UserError(f"sweep '{source.name}'{which} has no finished cell yet; launch it first.")
    return records


def read_table(path: Path) -> pd.DataFrame | None:
    """Return the table of a Parquet file; None if there is no such file."""
    return pd.read_parquet(path) if path.is_file() else None


def trimmed(
    record: Mapping[str, Any], fields: tuple[str, ...], runs: Mapping[str, str]
) -> dict[str, Any]:
    """Return a record of `Results` as a `Source` gives it. runs: ids of runs by `record_id`."""
    known = {**record, "run_id": runs.get(record_id(record), "")}
    for part in ("metrics", "notes"):
        if part in known:
            # MLflow has floats only.
            known[part] = {name: float(value) for name, value in known[part].items()}
    for moment in ("started", "ended"):
        if moment in known:
            known[moment] = int(known[moment] * 1000) / 1000
    return {name: known[name] for name in fields if name in known}
