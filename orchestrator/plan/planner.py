"""A sweep -> the cells that can run, as stages, and the cells that cannot, with reasons.

Loads the data (the rules about rates and columns need the rows) but no torch, ray or mlflow.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from btu.attacks.insertion import inserts_plain_words
from btu.attacks.poisoning import choose_rows, cover_rows
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.defenses.base import Given, check_cell
from btu.errors import UserError
from btu.stages import Stage
from btu.stealth import check_stealth
from btu.types import Corpus
from btu.victims import VictimSource, VictimSpec, check_length, find_victim
from orchestrator.plan.graph import Graph
from orchestrator.plan.offline import load_downloaded
from orchestrator.sweep.load import resolve
from orchestrator.sweep.sections import CONTROL, TrialSpec
from orchestrator.sweep.sweep import Cell, Sweep


@dataclass(frozen=True)
class PlannedCell:
    """A cell that can run. stage: what it ends with. varied: its coordinates, by dotted key."""

    stage: Stage
    spec: TrialSpec
    varied: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The cell's fingerprint."""
        return self.stage.key


@dataclass(frozen=True)
class RefusedCell:
    """A cell that cannot run, with the reason."""

    varied: Mapping[str, Any]
    reason: str


@dataclass
class Plan:
    """The cells of a sweep.

    cells: those that can run, by key.
    refused: those that cannot.
    duplicates: how many cells equal another in all keys that affect them; each runs once. Controls
        that equal a cell are not counted.
    """

    cells: dict[str, PlannedCell] = field(default_factory=dict)
    refused: list[RefusedCell] = field(default_factory=list)
    duplicates: int = 0

    @property
    def controls(self) -> int:
        """How many of the cells are controls."""
        return sum(CONTROL in cell.varied for cell in self.cells.values())


class _Loaded(NamedTuple):
    """A corpus. fingerprints: of its rows by role, for keys. revision: of all rows, for tags."""

    corpus: Corpus
    fingerprints: Mapping[str, str]
    revision: str


class Planner:
    """Turns cells into stages and checks each against its data and victim.

    What cells share, such as corpora and victims, is loaded and checked once.
    """

    def __init__(self, *, offline: bool = False) -> None:
        """offline: whether to open no connection, so that the hub's data must be here already."""
        self._load = load_downloaded if offline else load_corpus
        self._graph = Graph()
        self._corpora: dict[DataSpec, _Loaded | UserError] = {}
        self._victims: dict[VictimSpec, VictimSource | UserError] = {}
        self._attackable: dict[Hashable, UserError | None] = {}
        self._measurable: set[tuple[Given, VictimSource]] = set()

    def add(self, plan: Plan, cells: Iterable[Cell]) -> list[PlannedCell]:
        """Resolve and check cells, and add them to `plan`. Return those that are new in it."""
        new = []
        for cell in cells:
            try:
                spec = resolve(cell.config)
                stage = self._stage(spec)
            except UserError as error:
                plan.refused.append(RefusedCell(cell.varied, str(error)))
                continue
            if stage.key in plan.cells:
                plan.duplicates += CONTROL not in cell.varied
                continue
            planned = plan.cells[stage.key] = PlannedCell(stage, spec, cell.varied)
            new.append(planned)
        return new

    def counts(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        """Return the name and counts of every corpus that could be loaded."""
        loaded = [found for found in self._corpora.values() if isinstance(found, _Loaded)]
        return tuple((found.corpus.name, found.corpus.counts()) for found in loaded)

    def warnings(self) -> tuple[str, ...]:
        """Return what looks wrong in the data that could be loaded, each sentence once."""
        loaded = [found for found in self._corpora.values() if isinstance(found, _Loaded)]
        return tuple(dict.fromkeys(text for found in loaded for text in found.corpus.warnings))

    def _stage(self, spec: TrialSpec) -> Stage:
        """Return the stage that a cell ends with, after every check that needs no training.

        Raises:
            UserError: the cell cannot run, with the reason.
        """
        corpus, fingerprints, revision = self._corpus(spec.data)
        self._check_attack(spec, corpus)
        victim = self._victim(spec.victim)
        counts = corpus.counts()
        given = Given(
            _vocabulary(victim),
            len(corpus.label_names),
            counts["rows_train"],
            counts["rows_clean"],
            pairs=corpus.train.partners is not None,
        )
        check_cell(spec.defense.name, spec.build_defense(), given)
        if spec.measures_poison and (given, victim) not in self._measurable:
            check_stealth(given, victim)
            self._measurable.add((given, victim))
        return self._graph.cell(spec, fingerprints, victim.identity, counts, revision=revision)

    def _corpus(self, spec: DataSpec) -> _Loaded:
        if spec not in self._corpora:
            try:
                corpus = self._load(spec)
                self._corpora[spec] = _Loaded(corpus, corpus.fingerprints(), corpus.fingerprint())
            except UserError as error:
                self._corpora[spec] = error
        found = self._corpora[spec]
        if isinstance(found, UserError):
            raise found
        return found

    def _victim(self, spec: VictimSpec) -> VictimSource:
        if spec not in self._victims:
            try:
                source = find_victim(spec)
                check_length(spec, source.longest_input())
                self._victims[spec] = source
            except UserError as error:
                self._victims[spec] = error
        found = self._victims[spec]
        if isinstance(found, UserError):
            raise found
        return found

    def _check_attack(self, spec: TrialSpec, corpus: Corpus) -> None:
        known = (spec.data, spec.poison, json.dumps(dict(spec.attack_params)), spec.seed)
        if known not in self._attackable:
            try:
                _refuse_impossible_rate(spec, corpus)
                self._attackable[known] = None
            except UserError as error:
                self._attackable[known] = error
        refusal = self._attackable[known]
        if refusal is not None:
            raise refusal


def _refuse_impossible_rate(spec: TrialSpec, corpus: Corpus) -> None:
    """Raise a `UserError` if too few rows can be poisoned, or none can be attacked."""
    target = corpus.label_index(spec.poison.target_label)
    attack = spec.build_attack()
    check = getattr(attack, "check", None)
    if check is not None:
        check(corpus.train, target)
    if spec.poison.poisons:
        rows = corpus.train
        chosen = choose_rows(attack, spec.poison, rows, target, spec.seed)
        cover_rows(attack, spec.poison, rows, target, spec.seed, chosen)
    attackable = attack.candidates(corpus.eval)
    if not (np.asarray(corpus.eval.labels)[attackable] != target).any():
        raise UserError(
            "no evaluation row can be attacked: all are of the target class or without a "
            "paraphrase; choose another target_label or eval split."
        )


@lru_cache
def _vocabulary(victim: VictimSource) -> int | None:
    return victim.vocabulary_size()


def plan_sweep(sweep: Sweep, planner: Planner | None = None) -> Plan:
    """Resolve and check every cell of a sweep, and the controls of those that can run.

    The plan of a sweep with a sequential mode is empty: its cells are suggested while it runs. One
    suggestion is checked as an example (`example_plan`).

    Raises:
        UserError: no cell can run; the message gives the reasons.
    """
    planner = planner or Planner()
    if sweep.sequential is not None:
        example_plan(sweep, planner)
        return Plan()
    plan = Plan()
    planner.add(plan, sweep.cells())
    _refuse_empty(sweep, plan)
    planner.add(plan, sweep.controls_of([cell.varied for cell in plan.cells.values()]))
    return plan


def overlooked_triggers(plan: Plan) -> list[str]:
    """Return a warning if a trigger may be unknown to the tokenizer and a defense leaves that out.

    Whether it is unknown, only the victim's tokenizer tells, which a plan does not load.
    """
    keys = {
        str(spec.attack_params.get("trigger") or spec.attack_params.get("sentence"))
        for spec in (cell.spec for cell in plan.cells.values())
        if not inserts_plain_words(spec.attack_params)
        and spec.defense_params.get("exclude") == "special"
    }
    return [
        f"warning: trigger {trigger} may be unknown to the victim's tokenizer, and the defense "
        "never flags an unknown token; set defense.exclude=inserted to have it scored."
        for trigger in sorted(keys)
    ]


def example_plan(sweep: Sweep, planner: Planner) -> Plan:
    """Return the plan of one suggestion of a sweep's sequential mode.

    Raises:
        UserError: none of its cells can run.
    """
    axes = {} if sweep.sequential is None else sweep.sequential.open_axes()
    plan = Plan()
    planner.add(plan, sweep.expand({key: examples[0] for key, examples in axes.items()}))
    _refuse_empty(sweep, plan)
    return plan


def _refuse_empty(sweep: Sweep, plan: Plan) -> None:
    if plan.cells or not plan.refused:
        return
    reasons = list(dict.fromkeys(cell.reason for cell in plan.refused))
    if len(reasons) == 1:
        raise UserError(reasons[0])
    raise UserError(
        f"none of the {len(plan.refused)} cells of sweep '{sweep.name}' can run:\n  "
        + "\n  ".join(reasons)
    )
