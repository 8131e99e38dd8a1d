"""A sweep's own folder: which cells it has, and their results and failures from the store.

``<output>/<sweep>/plans/*.json`` says which cells were launched under this name, ``tracked/`` which
of them MLflow has, ``journal.jsonl`` what ran when. Results are in the store, which all sweeps of
an output folder share.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.errors import UserError, unknown
from btu.result_files import FLAGGED, RESULT, loads, with_nan
from orchestrator.store.storage import Storage, open_storage
from orchestrator.store.store import Damaged, Missing, Store
from orchestrator.sweep.load import resolve
from orchestrator.sweep.sections import CONTROL, settings
from orchestrator.sweep.sweep import Sweep
from orchestrator.sweep.tree import assign

if TYPE_CHECKING:
    from orchestrator.plan.planner import PlannedCell, RefusedCell

PLANS, TRACKED, JOURNAL, ORIGIN = "plans", "tracked", "journal.jsonl", "origin"
# Of what a run of MLflow holds: raised with it, so that runs of before are written again.
RUN_VERSION = 2
# A sweep's own file, as it was launched last; a table of its summary in MLflow.
SWEEP, MEANS_TABLE = "sweep.yaml", "means.json"


@dataclass(frozen=True)
class Launched:
    """A cell as it was launched. stages: name by key. base: the sweep's settings without varied."""

    key: str
    varied: Mapping[str, Any]
    stages: Mapping[str, str]
    base: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        """Return the resolved config of the cell."""
        config = copy.deepcopy(dict(self.base))
        for key, value in settings(self.varied).items():
            assign(config, key, value)
        return resolve(config).config()


class Results:
    """The cells of one sweep."""

    def __init__(self, output: str, name: str, store: Store | None = None) -> None:
        self.output, self.name = output, name
        self.storage: Storage = open_storage(output)
        self.store = store or Store(store_location(output))

    def write_plan(
        self, sweep: Sweep, cells: Iterable[PlannedCell], refused: Iterable[RefusedCell] = ()
    ) -> None:
        """Note which cells a launch has, and which it refused.

        The same cells again are the same file.
        """
        plan = {
            "sweep": self.name,
            "keep": sweep.store.keep,
            "base": sweep.base,
            "cells": [
                {
                    "key": cell.key,
                    "varied": dict(cell.varied),
                    "stages": {s.key: s.name for s in cell.stage.inputs.values()},
                }
                for cell in cells
            ],
            "refused": [{"varied": dict(r.varied), "reason": r.reason} for r in refused],
        }
        text = json.dumps(plan)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = f"{self.name}/{PLANS}/{name}.json"
        if not self.storage.exists(path):
            self.storage.write(path, text.encode())
        self.storage.write(f"{self.name}/{SWEEP}", sweep.text.encode())

    def sweep_text(self) -> str:
        """Return the sweep's file, as it was launched last."""
        return self.storage.read(f"{self.name}/{SWEEP}").decode()

    def cells(self) -> dict[str, Launched]:
        """Return every cell that was ever launched under this name, by key."""
        found: dict[str, Launched] = {}
        for name in self.storage.names(f"{self.name}/{PLANS}"):
            plan = json.loads(self.storage.read(f"{self.name}/{PLANS}/{name}"))
            for cell in plan["cells"]:
                # What one launch had as a control, another asked for by itself.
                if cell["key"] in found and CONTROL in cell["varied"]:
                    continue
                found[cell["key"]] = Launched(
                    cell["key"], cell["varied"], cell["stages"], plan["base"]
                )
        return dict(sorted(found.items()))

    def refused(self) -> list[RefusedCell]:
        """Return the cells that launches refused, but for those that a launch took since."""
        from orchestrator.plan.planner import RefusedCell

        launched = {json.dumps(cell.varied) for cell in self.cells().values()}
        found: dict[str, RefusedCell] = {}
        for name in self.storage.names(f"{self.name}/{PLANS}"):
            plan = json.loads(self.storage.read(f"{self.name}/{PLANS}/{name}"))
            for cell in plan.get("refused", ()):  # plans of before lack it
                if json.dumps(cell["varied"]) not in launched:
                    found[json.dumps(cell)] = RefusedCell(cell["varied"], cell["reason"])
        return list(found.values())

    def wanted_elsewhere(self, committed: Collection[str]) -> set[str]:
        """Return the keys that other sweeps of this output want kept.

        All of those that keep their models, and what the cells rest on that others have not
        finished.
        """
        wanted: set[str] = set()
        for sweep in self.storage.names(""):
            if sweep == self.name:
                continue
            for name in self.storage.names(f"{sweep}/{PLANS}"):
                plan = json.loads(self.storage.read(f"{sweep}/{PLANS}/{name}"))
                for cell in plan["cells"]:
                    if plan["keep"] == "models" or cell["key"] not in committed:
                        wanted.update(cell["stages"])
        return wanted

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the result of every finished cell, by key.

        A damaged result is set aside with a warning and left out, as if it had not run.
        """
        committed = self.store.committed()
        for cell in self.cells().values():
            if cell.key in committed:
                record = self.record(cell.key, cell.varied)
                if record is not None:
                    yield record

    def record(self, key: str, varied: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a cell's result; None where there is none, or a damaged one."""
        try:
            result = self.store.read_json(key, RESULT)
        except (Damaged, Missing):
            return None
        return {
            "key": key,
            "sweep": self.name,
            "status": "finished",
            "varied": dict(varied),
            **with_nan(result),
        }

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield why each failed cell has no result: its own failure, or that of a stage of it."""
        failed = self.store.failed()
        if not failed:
            return
        committed = self.store.committed()
        for cell in self.cells().values():
            broken = [key for key in (cell.key, *cell.stages) if key in failed]
            if cell.key in committed or not broken:
                continue
            failure = self.store.failure(broken[0])
            if failure is not None:
                yield self._failure(cell, failure)

    def _failure(self, cell: Launched, failure: Mapping[str, Any]) -> dict[str, Any]:
        own = failure["key"] == cell.key
        lead = "" if own else f"stage '{failure['stage']}' failed: "
        known = dict(failure)
        # Of the code that failed, which is not that which reads this; earlier versions noted none.
        code = known.pop("code", None)
        return {
            **known,
            "key": cell.key,
            "sweep": self.name,
            "status": "failed",
            "varied": dict(cell.varied),
            "config": cell.config(),
            "reason": lead + failure["reason"],
            "failed": failure["key"],
            "tags": {} if code is None else {"code": code},
        }

    def origin(self) -> str:
        """Return the id of this sweep's folder, which a copy of the folder keeps."""
        path = f"{self.name}/{ORIGIN}"
        if not self.storage.exists(path):
            self.storage.create(path, uuid.uuid4().hex.encode())  # unless another has just done so
        return self.storage.read(path).decode()

    def runs(self) -> dict[str, str]:
        """Return the ids of the MLflow runs that were written from here, by `record_id`.

        Of a cell that several MLflow stores have, that in the store that has most of the cells.
        """
        known: list[dict[str, str]] = []
        for store in self.storage.names(f"{self.name}/{TRACKED}"):
            noted = {}
            for name in self.storage.names(f"{self.name}/{TRACKED}/{store}"):
                with suppress(ValueError, KeyError, FileNotFoundError):  # damaged, or replaced now
                    note = json.loads(self.storage.read(f"{self.name}/{TRACKED}/{store}/{name}"))
                    noted[note["record"]] = note["run_id"]
            known.append(noted)
        return {record: run for noted in sorted(known, key=len) for record, run in noted.items()}

    def note(self, event: str, **facts: Any) -> None:
        """Add a line to the sweep's journal."""
        line = json.dumps({"time": time.time(), "event": event, **facts})
        self.storage.append(f"{self.name}/{JOURNAL}", line)

    def journal(self) -> list[dict[str, Any]]:
        """Return the journal of all launches."""
        events = []
        for line in self.storage.lines(f"{self.name}/{JOURNAL}"):
            with suppress(ValueError):  # cut short by a full disk or a kill
                events.append(json.loads(line))
        return events


def record_id(record: Mapping[str, Any]) -> str:
    """Return what a run of MLflow must say to be of this record, and not of another of its cell.

    A cell that was launched as a control, and then by itself, is told as what it is now.
    """
    control = record["varied"].get(CONTROL)
    parts = (
        record["key"],
        int(record["started"] * 1000),
        RUN_VERSION,
        *([control] if control else []),
    )
    return "-".join(map(str, parts))


def store_location(output: str) -> str:
    """Return where the store of an output folder is."""
    return f"{output.rstrip('/')}/store"


def read_result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a cell's result and its flagged tokens, most suspicious first, from its folder."""
    flagged: list[dict[str, Any]] = json.loads((folder / FLAGGED).read_text())
    return loads((folder / RESULT).read_text()), flagged


def find_sweep(output: str | Path, name: str, warn: Callable[[str], None] | None = None) -> Results:
    """Return the results of a sweep. warn: told when a damaged result is set aside.

    Raises:
        UserError: no sweep of that name was launched ("did you mean").
    """
    location = str(output) if "://" in str(output) else str(Path(output).expanduser().resolve())
    storage = open_storage(location)
    if not storage.names(f"{name}/{PLANS}"):
        known = [n for n in storage.names("") if n != "store" and storage.names(f"{n}/{PLANS}")]
        raise UserError(f"{unknown(f'sweep in {output}', name, known)}; launch it first.")
    store = Store(store_location(location), warn=warn) if warn else None
    return Results(location, name, store)
