"""A sweep's own folder: which cells it has, and their results and failures from the store.

``<output>/<sweep>/plans/*.json`` list the cells that were launched under this name, ``tracked/``
the runs that were written to MLflow; ``journal.jsonl`` records what ran when. Results are in the
store, which all sweeps of an output folder share.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.errors import UserError, unknown
from btu.redaction import has_secret, shown_url
from btu.result_files import FLAGGED, RESULT, loads, with_nan
from orchestrator.plan.listed import ListedStage, StageList, list_stages
from orchestrator.results.journal import Journal, journal_of
from orchestrator.results.shapes import EVENT, NOTE, PLAN, RECORD
from orchestrator.store.owners import is_own
from orchestrator.store.storage import LocalStorage, Storage, below, open_storage
from orchestrator.store.store import Damaged, Missing, Store
from orchestrator.store.typed import holds, parse_object
from orchestrator.sweep.load import resolve
from orchestrator.sweep.output import STORE, output_location, store_location
from orchestrator.sweep.sections import CONTROL, settings
from orchestrator.sweep.sweep import Sweep
from orchestrator.sweep.tree import assign

if TYPE_CHECKING:
    from orchestrator.plan.planner import PlannedCell, RefusedCell

PLANS, TRACKED, JOURNAL, ORIGIN = "plans", "tracked", "journal.jsonl", "origin"
# Which MLflow store the last launch used.
SERVER = "server.json"
# Version of what an MLflow run contains. Raise it to have existing runs written again.
RUN_VERSION = 2
# The sweep's file of the last launch; a table of the sweep's summary in MLflow.
SWEEP, MEANS_TABLE = "sweep.yaml", "means.json"
# The stage that writes the training rows of a cell, poisoned: its key identifies them.
POISON = "poison"


@dataclass(frozen=True)
class LaunchedServer:
    """The MLflow store that a sweep was launched with.

    uri: its URI without user name, password and values of a query.
    whole: whether that is all of it.
    own: whether no other user can have written it: the record is a file of this user alone.
    """

    uri: str
    whole: bool
    own: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Launched:
    """A cell as it was launched.

    varied: its coordinates.
    stages: the names of the stages it depends on, by key.
    base: the settings of the sweep, without the coordinates.
    listed: the stages of all plans of the sweep.
    model: the key of the stage whose model it ends with, if a launch was to keep it; else empty.
    """

    key: str
    varied: Mapping[str, Any]
    stages: Mapping[str, str]
    base: Mapping[str, Any]
    listed: StageList
    model: str = ""

    @property
    def stage(self) -> ListedStage | None:
        """The stage that it ends with, to count and time what is left.

        None if the cell is only in plans of the previous version, which listed names alone.
        """
        return self.listed.cell(self.key, self.stages)

    @property
    def training_set(self) -> str:
        """The key of the stage that poisons its training rows; empty if it has none."""
        return next((key for key, name in self.stages.items() if name == POISON), "")

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
        """Write which cells a launch has, and which it refused.

        Stages that cells share are listed once. Writing the same cells again gives the same file.
        """
        cells = list(cells)
        keeps = sweep.store.keep == "models"
        plan = {
            "sweep": self.name,
            "keep": sweep.store.keep,
            "base": sweep.base,
            "stages": list_stages(cell.stage for cell in cells),
            "cells": [
                {
                    "key": cell.key,
                    "varied": dict(cell.varied),
                    "stages": list(dict.fromkeys(s.key for s in cell.stage.inputs.values())),
                    **({"model": defended_key(cell.stage.node())} if keeps else {}),
                }
                for cell in cells
            ],
            "refused": [{"varied": dict(r.varied), "reason": r.reason} for r in refused],
        }
        text = json.dumps(plan, separators=(",", ":"))
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = f"{self.name}/{PLANS}/{name}.json"
        if not self.storage.exists(path):
            self.storage.write(path, text.encode())
        self.storage.write(f"{self.name}/{SWEEP}", sweep.text.encode())

    def record_server(self, uri: str | None) -> None:
        """Record which MLflow store the launch tracks in, without a password.

        uri: of the store; None for that of the output folder.
        """
        path = f"{self.name}/{SERVER}"
        if uri is not None or self.storage.exists(path):
            known = {} if uri is None else {"uri": shown_url(uri), "whole": not has_secret(uri)}
            self.storage.write(path, json.dumps(known).encode())

    def server(self) -> LaunchedServer | None:
        """Return the MLflow store of the last launch; None for that of the output folder."""
        with suppress(FileNotFoundError, ValueError, AttributeError):
            path = f"{self.name}/{SERVER}"
            before = self._is_own(path)
            known = parse_object(self.storage.read(path))
            if isinstance(known.get("uri"), str):
                own = before and self._is_own(path)
                return LaunchedServer(known["uri"], known.get("whole") is True, own)
        return None

    def _is_own(self, path: str) -> bool:
        storage = self.storage
        return isinstance(storage, LocalStorage) and is_own(storage.root / path)

    def sweep_text(self) -> str:
        """Return the sweep's file of the last launch."""
        return self.storage.read(f"{self.name}/{SWEEP}").decode()

    def cells(self) -> dict[str, Launched]:
        """Return every cell that was ever launched under this name, by key."""
        plans = list(read_plans(self.storage, self.name))
        listed = StageList()
        for plan in plans:
            listed.add(plan.get("stages", {}))
        models = {c["key"]: c["model"] for plan in plans for c in plan["cells"] if "model" in c}
        found: dict[str, Launched] = {}
        for plan in plans:
            for cell in plan["cells"]:
                # A cell that is a control in one plan may be a cell of its own in another.
                if cell["key"] in found and CONTROL in cell["varied"]:
                    continue
                stages = cell["stages"]
                if not isinstance(stages, dict):  # a dict, of names: the previous version
                    stages = {key: listed.names[key] for key in stages}
                found[cell["key"]] = Launched(
                    cell["key"],
                    cell["varied"],
                    stages,
                    plan["base"],
                    listed,
                    models.get(cell["key"], ""),
                )
        return dict(sorted(found.items()))

    def refused(self) -> list[RefusedCell]:
        """Return the cells that launches refused, without those that a later launch accepted."""
        from orchestrator.plan.planner import RefusedCell

        plans = list(read_plans(self.storage, self.name))
        launched = {json.dumps(cell["varied"]) for plan in plans for cell in plan["cells"]}
        found: dict[str, RefusedCell] = {}
        for plan in plans:
            for cell in plan["refused"]:
                if json.dumps(cell["varied"]) not in launched:
                    found[json.dumps(cell)] = RefusedCell(cell["varied"], cell["reason"])
        return list(found.values())

    def wanted_elsewhere(self, committed: Collection[str]) -> set[str]:
        """Return the keys of stages whose models other sweeps of this output still need.

        These are all stages of sweeps that keep models, and those of unfinished cells of others.
        """
        wanted: set[str] = set()
        for sweep in sweep_names(self.storage):
            if sweep == self.name:
                continue
            for plan in read_plans(self.storage, sweep):
                for cell in plan["cells"]:
                    if plan["keep"] == "models" or cell["key"] not in committed:
                        wanted.update(cell["stages"])
        return wanted

    def records(self, cells: Mapping[str, Launched] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the result of every finished cell, by key.

        A damaged result is set aside with a warning and left out, as if the cell had not run.

        cells: from `cells`, where that was called already.
        """
        cells = self.cells() if cells is None else cells
        for key, result in self.store.read_jsons(cells, RESULT):
            record = self._record(key, cells[key].varied, result)
            if record is not None:
                yield record

    def record(self, key: str, varied: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a cell's result; None if it is missing or damaged."""
        try:
            result = self.store.read_json(key, RESULT)
        except (Damaged, Missing):
            return None
        return self._record(key, varied, result)

    def _record(self, key: str, varied: Mapping[str, Any], result: Any) -> dict[str, Any] | None:
        """Return the record of a cell; None, and set aside, where its result is none."""
        if not holds(result, RECORD, ["config", "started", "ended"]):
            self.store.set_aside(key, f"{RESULT} is no record of a cell")
            return None
        return {
            "key": key,
            "sweep": self.name,
            "status": "finished",
            "varied": dict(varied),
            **with_nan(result),
        }

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the failure of each failed cell: its own, or that of a stage it depends on."""
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
        # The version of the code that failed, not of the code that reads this.
        code = known.pop("code")
        return {
            **known,
            "key": cell.key,
            "sweep": self.name,
            "status": "failed",
            "varied": dict(cell.varied),
            "config": cell.config(),
            "reason": lead + failure["reason"],
            "failed": failure["key"],
            "tags": {"code": code},
        }

    def origin(self) -> str:
        """Return the id of this sweep's folder. A copy of the folder has the same id."""
        path = f"{self.name}/{ORIGIN}"
        if not self.storage.exists(path):
            self.storage.create(path, uuid.uuid4().hex.encode())  # does nothing if it exists by now
        return self.storage.read(path).decode()

    def known_origin(self) -> str:
        """Return the id of this sweep's folder; empty if it has none yet. Writes nothing."""
        path = f"{self.name}/{ORIGIN}"
        return self.storage.read(path).decode() if self.storage.exists(path) else ""

    def runs(self) -> dict[str, str]:
        """Return the ids of the MLflow runs that were written from here, by `record_id`.

        If several MLflow stores have a cell, the store with the most cells counts.
        """
        known: list[dict[str, str]] = []
        for store in self.storage.names(f"{self.name}/{TRACKED}"):
            noted = {}
            folder = f"{self.name}/{TRACKED}/{store}"
            paths = [f"{folder}/{name}" for name in self.storage.names(folder)]
            for note in filter(None, self.storage.map(self._tracked, paths)):
                noted[note["record"]] = note["run_id"]
            known.append(noted)
        return {record: run for noted in sorted(known, key=len) for record, run in noted.items()}

    def _tracked(self, path: str) -> dict[str, Any] | None:
        """Return the note about an MLflow run; None if it is damaged, or replaced now."""
        with suppress(ValueError, FileNotFoundError):
            note = parse_object(self.storage.read(path))
            if holds(note, NOTE, NOTE):
                return note
        return None

    def journal_event(self, event: str, **facts: Any) -> None:
        """Add a line to the sweep's journal. An object store may get it a few seconds later."""
        self._journal.add(json.dumps({"time": time.time(), "event": event, **facts}))

    def journal_now(self, event: str, **facts: Any) -> None:
        """Add a line to the sweep's journal, and write it before returning."""
        self.journal_event(event, **facts)
        self._journal.flush()

    def end_journal(self) -> None:
        """Write the lines that were collected. If that fails, they are lost with this process."""
        with suppress(Exception):  # each client of an object store has its own
            self._journal.flush()

    @property
    def _journal(self) -> Journal:
        return journal_of(self.storage, f"{self.name}/{JOURNAL}")

    def journal(self) -> list[dict[str, Any]]:
        """Return the journal of all launches."""
        self._journal.flush()
        events = []
        for line in self.storage.lines(f"{self.name}/{JOURNAL}"):
            with suppress(ValueError):  # cut short by a full disk or a kill
                event = parse_object(line)
                if holds(event, EVENT, ("time", "event", "key")):
                    events.append(event)
        if self.storage.objects:  # where each process writes its lines together
            events.sort(key=lambda event: float(event["time"]))
        return events


def record_id(record: Mapping[str, Any]) -> str:
    """Return the id that ties an MLflow run to a record; another record of the cell has another.

    A cell that was launched as a control, and later as a cell of its own, gets another id.
    """
    control = record["varied"].get(CONTROL)
    parts = (
        record["key"],
        int(record["started"] * 1000),
        RUN_VERSION,
        *([control] if control else []),
    )
    return "-".join(map(str, parts))


def defended_key(cell: Mapping[str, Any]) -> str:
    """Return the key of the stage whose model a cell ends with; empty if it names none.

    cell: the cell's stage, from `Stage.node`. Without a defense it is the undefended model's.
    """
    return str(cell["inputs"].get(cell["config"].get("defended"), ""))


def read_result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a cell's result and flagged tokens, most suspicious first, from its folder."""
    flagged: list[dict[str, Any]] = json.loads((folder / FLAGGED).read_text())
    return loads((folder / RESULT).read_text()), flagged


def sweep_names(storage: Storage) -> list[str]:
    """Return the names of the sweeps that were launched with an output."""
    return [
        name for name in storage.names("") if name != STORE and storage.names(f"{name}/{PLANS}")
    ]


def read_plans(storage: Storage, sweep: str) -> Iterator[dict[str, Any]]:
    """Yield the plans of all launches of a sweep.

    Raises:
        UserError: a file is not a plan.
    """
    for name in storage.names(f"{sweep}/{PLANS}"):
        path = f"{sweep}/{PLANS}/{name}"
        try:
            plan = parse_object(storage.read(path))
            if not holds(plan, PLAN, ["cells"]):
                raise ValueError("a part of it has another type")
            plan = {"base": {}, "refused": [], "stages": {}, "keep": "", **plan}
            for cell in plan["cells"]:
                if isinstance(cell["stages"], list) and not plan["stages"].keys() >= {
                    *cell["stages"]
                }:
                    raise ValueError("a stage of a cell is not listed")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{below(storage.location, path)} is not a plan, so the cells of sweep '{sweep}' "
                "are not known; remove the file and launch the sweep, which writes it again."
            ) from error
        yield plan


def find_sweep(output: str | Path, name: str, warn: Callable[[str], None] | None = None) -> Results:
    """Return the results of a sweep. warn: called when a damaged result is set aside.

    Raises:
        UserError: no sweep of that name was launched ("did you mean").
    """
    location = output_location(output)
    storage = open_storage(location)
    if name == STORE or not storage.names(f"{name}/{PLANS}"):
        known = sweep_names(storage)
        raise UserError(f"{unknown(f'sweep in {output}', name, known)}; launch it first.")
    store = Store(store_location(location), warn=warn) if warn else None
    return Results(location, name, store)
