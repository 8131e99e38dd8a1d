"""Results on disk: the truth that tracking and reports are made from.

``<output>/<sweep>/cells/<key>/`` holds a finished cell, ``failed/<key>.json`` a failed one.
A cell's folder appears under its name in one rename, complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.errors import UserError, unknown

if TYPE_CHECKING:
    from orchestrator.trial import TrialResult

RESULT = "result.json"
TOKENS = "tokens.parquet"
FLAGGED = "flagged_tokens.json"
CONFIG = "config.yaml"
PLOT = "drift.png"
# A full disk fails in odd ways in the middle of a sweep; results, plots and runs are small.
LEAST_FREE_BYTES = 200_000_000


class ResultStore:
    """The results of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.failed = folder / "failed"

    def prepare(self) -> None:
        """Create the folders and check that they can be written.

        Raises:
            UserError: they cannot.
        """
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            self.failed.mkdir(exist_ok=True)
            probe = self.folder / f".probe-{uuid.uuid4().hex}"
            probe.write_text("written by the launch check")
            probe.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(
                f"output folder {self.folder} cannot be written ({error.strerror or error}); set "
                "output=FOLDER to one that can."
            ) from error
        if free < LEAST_FREE_BYTES:
            raise UserError(
                f"output folder {self.folder} has {free / 1e6:.0f} MB free, a sweep needs "
                f"{LEAST_FREE_BYTES / 1e6:.0f} MB; free some, or set output=FOLDER."
            )

    def path(self, key: str) -> Path:
        """Return the folder of a cell, finished or not."""
        return self.cells / key

    def is_done(self, key: str) -> bool:
        """Return whether the cell has a committed result."""
        return (self.path(key) / RESULT).is_file()

    def is_failed(self, key: str) -> bool:
        """Return whether the cell's last run failed."""
        return not self.is_done(key) and self._failure_path(key).is_file()

    def commit(self, record: dict[str, Any], result: TrialResult) -> Path:
        """Write a finished cell and return its folder. A result that is there already stays."""
        final = self.path(record["key"])
        staged = self.cells / f".tmp-{record['key']}-{uuid.uuid4().hex}"
        staged.mkdir(parents=True)
        try:
            result.write_files(staged)
            # Last, so that its presence says that the rest is there.
            (staged / RESULT).write_text(dumps(record))
            try:
                os.rename(staged, final)
            except OSError:
                if not self.is_done(record["key"]):
                    raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._failure_path(record["key"]).unlink(missing_ok=True)
        return final

    def commit_failure(self, record: dict[str, Any]) -> None:
        """Write why a cell failed, replacing an earlier failure."""
        self.failed.mkdir(parents=True, exist_ok=True)
        staged = self.failed / f".tmp-{uuid.uuid4().hex}"
        staged.write_text(dumps(record))
        os.replace(staged, self._failure_path(record["key"]))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the record of every finished cell, by key."""
        for path in sorted(self.cells.glob(f"[!.]*/{RESULT}")):
            yield read_record(path)

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the record of every failed cell, by key."""
        for path in sorted(self.failed.glob("[!.]*.json")):
            # A kill between a commit and its clean-up leaves the old failure behind.
            if not self.is_done(path.stem):
                yield read_record(path)

    def _failure_path(self, key: str) -> Path:
        return self.failed / f"{key}.json"


def find_sweep(output: Path, name: str) -> ResultStore:
    """Return the store of a sweep that has results.

    Raises:
        UserError: there is none of that name ("did you mean").
    """
    folder = output / name
    if not (folder / "cells").is_dir():
        known = sorted(p.parent.name for p in output.glob("*/cells")) if output.is_dir() else []
        raise UserError(f"{unknown(f'sweep in {output}', name, known)}; launch it first.")
    return ResultStore(folder)


def dumps(record: dict[str, Any]) -> str:
    """Return JSON with NaN as null: strict JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and value != value else value

    return json.dumps(plain(record), indent=1, allow_nan=False)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; a metric that is null is NaN again."""
    record: dict[str, Any] = json.loads(path.read_text())
    metrics = record.get("metrics", {})
    record["metrics"] = {k: float("nan") if v is None else v for k, v in metrics.items()}
    return record
