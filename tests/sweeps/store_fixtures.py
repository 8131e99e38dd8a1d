"""What the fixtures of sweeps hand out, and how a finished cell is put into a store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

    from btu.stages import Stage
    from orchestrator.plan.planner import Plan, PlannedCell
    from orchestrator.results.folder import Results
    from orchestrator.store.store import Store
    from orchestrator.sweep.sweep import Sweep


class Tried(NamedTuple):
    """A cell that `compute` computed. root: contains its stages. folder: its result.

    result, flagged: from `read_result`. tokens: the token table.
    """

    planned: PlannedCell
    root: Path
    folder: Path
    result: dict[str, Any]
    flagged: list[dict[str, Any]]
    tokens: pd.DataFrame

    @property
    def stage(self) -> Stage:
        return self.planned.stage

    @property
    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = self.result["metrics"]
        return metrics


class Stored(NamedTuple):
    """A launched sweep with a finished cell. record: as `results.records()` gives it."""

    results: Results
    sweep: Sweep
    plan: Plan
    key: str
    record: dict[str, Any]

    @property
    def store(self) -> Store:
        return self.results.store

    @property
    def folder(self) -> Path:
        """The finished cell's folder in the store."""
        return self.store.fetch(self.key)

    def rewrite(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the result of the finished cell; return its record."""
        publish_cell(self.store, self.key, self.folder, result)
        (record,) = [r for r in self.results.records() if r["key"] == self.key]
        return record


def key_of(name: str) -> str:
    """Return a key for a name of at most 12 letters; keys are in the order of their names."""
    return name.encode().hex().ljust(24, "0")


def publish_cell(
    store: Store, key: str, files: Path, result: Mapping[str, Any] | None = None
) -> None:
    """Commit a cell's result from the files of another one, and of `result` if given.

    What is committed under the key already is replaced.
    """
    from btu.result_files import RESULT, dumps

    made = store.workspace(key)
    shutil.copytree(files, made, dirs_exist_ok=True)
    if result is not None:
        (made / RESULT).write_text(dumps(result))
    store.storage.remove(f"markers/{key}.json")
    store.publish(key, made, "cell", {})
