"""Stages as a plan file lists them: enough to count and time them, not to compute them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from btu.stages import Stage


@dataclass(eq=False, slots=True)
class ListedStage:
    """A stage that was read from a plan file.

    victim: name and revision of the victim that it loads; empty if it loads none. The other fields
    are those of `Stage`.
    """

    key: str
    name: str
    inputs: Mapping[str, ListedStage] = field(default_factory=dict)
    light: Collection[str] = ()
    kind: str = "stage"
    units: int = 0
    model: bool = False
    victim: Mapping[str, Any] = field(default_factory=dict)


_FIELDS = {one.name for one in fields(ListedStage)} - {"key"}
# How many stages of a plan may depend on each other in a row: a cell has eight at most.
DEEPEST = 50


@dataclass(frozen=True)
class ListedCell:
    """A cell that was read from a plan file. stage: what it ends with."""

    stage: ListedStage

    @property
    def key(self) -> str:
        """The cell's fingerprint."""
        return self.stage.key


@dataclass(frozen=True)
class ListedPlan:
    """Cells that were read from plan files, by key."""

    cells: Mapping[str, ListedCell]


def victim_of(stage: Stage | ListedStage) -> Mapping[str, Any]:
    """Return the victim that a stage itself loads; empty if it loads none."""
    if isinstance(stage, ListedStage):
        return stage.victim
    where = stage.where
    victim: Mapping[str, Any] = where.get("victim") or where.get("config", {}).get("victim", {})
    return victim


def list_stages(cells: Iterable[Stage]) -> dict[str, dict[str, Any]]:
    """Return the stages of cells as plain data by key, inputs first; defaults are left out."""
    found: dict[str, dict[str, Any]] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in found:
            for before in stage.inputs.values():
                visit(before)
            found[stage.key] = _facts(stage)

    for cell in cells:
        for stage in cell.inputs.values():
            visit(stage)
    return found


def _facts(stage: Stage) -> dict[str, Any]:
    victim = victim_of(stage)
    facts = {
        "inputs": {role: before.key for role, before in stage.inputs.items()},
        "light": list(stage.light),
        "kind": "" if stage.kind == "stage" else stage.kind,
        "units": stage.units,
        "model": stage.model,
        "victim": {name: victim[name] for name in ("name", "revision") if victim.get(name)},
    }
    return {"name": stage.name} | {name: value for name, value in facts.items() if value}


class StageList:
    """The stages of plan files, built when they are asked for: most readers need names only.

    names: their names, by key.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._built: dict[str, ListedStage] = {}

    def add(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what `list_stages` returned."""
        self._facts |= facts
        self.names |= {key: one["name"] for key, one in facts.items()}

    def cell(self, key: str, stages: Collection[str]) -> ListedStage | None:
        """Return the stage that a cell ends with; None where a stage of it is not listed.

        key: the cell's. stages: keys of the stages it depends on.
        """
        if key not in self._built:
            try:
                inputs = {stage: self._stage(stage) for stage in stages}
            except KeyError:
                return None
            # As in `Graph.cell`: the scorer reads no model.
            self._built[key] = ListedStage(key, "cell", inputs, tuple(inputs), "host")
        return self._built[key]

    def _stage(self, key: str, depth: int = 0) -> ListedStage:
        """Return a stage. Raises KeyError if it is not listed, or too many depend on each other."""
        if depth > DEEPEST:  # as where a plan says that a stage depends on itself
            raise KeyError(key)
        if key not in self._built:
            facts = {name: fact for name, fact in self._facts[key].items() if name in _FIELDS}
            before = facts.pop("inputs", {})
            inputs = {role: self._stage(other, depth + 1) for role, other in before.items()}
            self._built[key] = ListedStage(key, inputs=inputs, **facts)
        return self._built[key]
