"""Which cells a sweep has, which are refused and why, before anything is trained.

Loads the data (the rules about rates and columns need the rows) but no torch, ray or mlflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from btu.data import DataSpec, load_corpus
from btu.errors import UserError
from btu.poisoning import choose_rows
from btu.types import Corpus
from btu.victims import VictimSource, VictimSpec, find_victim
from orchestrator.config import Sweep, TrialSpec, resolve


@dataclass(frozen=True)
class PlannedCell:
    """A cell that can run. varied: its grid coordinates by dotted key. key: its fingerprint."""

    key: str
    spec: TrialSpec
    varied: Mapping[str, Any]


@dataclass(frozen=True)
class RefusedCell:
    """A cell that cannot run, with the reason."""

    varied: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a sweep comes to.

    duplicates: cells that differ in keys that do not act for them; each runs once. data: the
    counts of every corpus (`btu.types.Corpus.counts`), by its data set's name.
    """

    cells: tuple[PlannedCell, ...]
    refused: tuple[RefusedCell, ...]
    duplicates: int
    data: tuple[tuple[str, Mapping[str, int]], ...]


class Preflight:
    """Checks cells against their data and victim, loading each of these once."""

    def __init__(self) -> None:
        self._corpora: dict[DataSpec, tuple[Corpus, str] | UserError] = {}
        self._victims: dict[VictimSpec, VictimSource | UserError] = {}

    def corpus(self, spec: DataSpec) -> tuple[Corpus, str]:
        """Return the corpus and its fingerprint."""
        if spec not in self._corpora:
            try:
                corpus = load_corpus(spec)
                self._corpora[spec] = (corpus, corpus.fingerprint())
            except UserError as error:
                self._corpora[spec] = error
        found = self._corpora[spec]
        if isinstance(found, UserError):
            raise found
        return found

    def counts(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        """Return the name and counts of every corpus that could be loaded."""
        loaded = [found[0] for found in self._corpora.values() if isinstance(found, tuple)]
        return tuple((corpus.name, corpus.counts()) for corpus in loaded)

    def victim(self, spec: VictimSpec) -> VictimSource:
        """Return the checked source of the victim's weights."""
        if spec not in self._victims:
            try:
                self._victims[spec] = find_victim(spec)
            except UserError as error:
                self._victims[spec] = error
        found = self._victims[spec]
        if isinstance(found, UserError):
            raise found
        return found

    def key(self, spec: TrialSpec) -> str:
        """Return the cell's fingerprint after every check that needs no training.

        Raises:
            UserError: the cell cannot run, with the reason.
        """
        corpus, fingerprint = self.corpus(spec.data)
        target = corpus.label_index(spec.poison.target_label)
        attack = spec.build_attack()
        choose_rows(attack, spec.poison, corpus.train, target, spec.seed)
        attackable = attack.candidates(corpus.eval)
        if not (np.asarray(corpus.eval.labels)[attackable] != target).any():
            raise UserError(
                "no evaluation row can be attacked: all are of the target class or without a "
                "paraphrase; choose another target_label or eval split."
            )
        victim = self.victim(spec.victim)
        defense = spec.build_defense()
        vocabulary = victim.vocabulary_size()
        if vocabulary is not None:
            defense.check(vocabulary)
        return spec.key(fingerprint, victim.identity)


def plan_sweep(sweep: Sweep) -> Plan:
    """Resolve and check every cell of a sweep.

    Raises:
        UserError: no cell can run; the message gives the reasons.
    """
    preflight = Preflight()
    planned: dict[str, PlannedCell] = {}
    refused: list[RefusedCell] = []
    duplicates = 0
    for cell in sweep.cells():
        try:
            spec = resolve(cell.config)
            key = preflight.key(spec)
        except UserError as error:
            refused.append(RefusedCell(cell.varied, str(error)))
            continue
        if key in planned:
            duplicates += 1
        else:
            planned[key] = PlannedCell(key, spec, cell.varied)
    if not planned:
        reasons = list(dict.fromkeys(cell.reason for cell in refused))
        if len(reasons) == 1:
            raise UserError(reasons[0])
        raise UserError(
            f"none of the {len(refused)} cells of sweep '{sweep.name}' can run:\n  "
            + "\n  ".join(reasons)
        )
    return Plan(tuple(planned.values()), tuple(refused), duplicates, preflight.counts())
