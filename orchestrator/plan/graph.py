"""A trial spec -> the stages it is computed from. Imports no torch, ray or mlflow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Hashable, Iterable, Mapping

from btu.defenses.base import CLEAN_ROWS, Screens
from btu.recipe import CellInputs, Prepared, evaluation, evaluation_screened, prepare
from btu.scoring import score_cell
from btu.stages import Stage
from btu.stealth import stealth_stage
from orchestrator.sweep.sections import TrialSpec


class Graph:
    """Builds the stages of cells. Stages that cells share are built and hashed once."""

    def __init__(self) -> None:
        self._prepared: dict[Hashable, Prepared] = {}
        self._controls: dict[Hashable, dict[str, Stage]] = {}
        self._stages: dict[str, Stage] = {}

    def cell(
        self,
        spec: TrialSpec,
        data_fingerprints: Mapping[str, str],
        victim_identity: str,
        counts: Mapping[str, int],
        *,
        revision: str = "",
    ) -> Stage:
        """Return the stage that a cell ends with; its key is the cell's.

        data_fingerprints: of the rows by role; they identify the rows in the keys.
        victim_identity: identifies the weights in the keys.
        counts: of the corpus, for estimates of time and for the cell's notes.
        revision: of all the data (`Corpus.fingerprint`), for the cell's tags.

        Raises:
            UserError: the cell asks for `stealth`, and the sentence encoder is missing.
            ValueError: two stages of the defense have the same name, or a stage of it reads what
                is hidden from defenses.
        """
        known = (
            *(spec.data, spec.victim, spec.poison, spec.train, spec.tuning, spec.seed),
            *(spec.measures_poison, json.dumps(dict(spec.attack_params)), victim_identity),
            *sorted(data_fingerprints.items()),
        )
        if known not in self._prepared:
            prepared = prepare(
                CellInputs(
                    data=spec.data,
                    data_fingerprints=data_fingerprints,
                    victim=spec.victim,
                    victim_identity=victim_identity,
                    poison=spec.poison,
                    attack_params=spec.attack_params,
                    train=spec.train,
                    tuning=spec.tuning,
                    seed=spec.seed,
                    counts=counts,
                )
            )
            base = prepared.foundation
            tops = [
                evaluation(prepared, base.model, "undefended"),
                evaluation(prepared, base.tuned, "tuned"),
            ]
            if spec.measures_poison:
                tops.append(stealth_stage(prepared))
                prepared = dataclasses.replace(prepared, measured=tops[-1])
            self._prepared[known] = prepared
            self._controls[known] = {s.name: s for last in tops for s in last.closure()}
        prepared = self._prepared[known]
        inputs = dict(self._controls[known])
        name, defense = spec.defense.name, spec.build_defense()
        base = prepared.foundation_for(defense.NEEDS)
        defended = defense.stages(base)
        own = list(defended.closure())
        _refuse_hidden(name, own, prepared, prepared.shared | _keys(base.originals))
        if isinstance(defense, Screens):
            came = prepared.incoming
            screened = defense.screen(base, defended, came)
            seen = {*prepared.shared, *_keys(came), *(stage.key for stage in own)}
            behind = [stage for stage in screened.closure() if stage.key not in seen]
            _refuse_hidden(name, behind, prepared, seen, may_read=came.key)
            own += behind
            last = evaluation_screened(prepared, defended, screened, "defended")
        else:
            last = evaluation(prepared, defended, "defended", kind="cell")
        # Stages that exist without the defense are not part of its cost.
        free = {s.key for top in (base.rows, base.clean, base.model) for s in top.closure()}
        cost = sorted({stage.name for stage in own if stage.key not in free})
        stages = list(last.closure())
        given = {stage.key: stage for stage in inputs.values()}
        for stage in stages:
            # One object per key, so that the key of a shared stage is computed once. Without a
            # defense, the evaluations of the defended and the undefended model are one stage.
            one = given.get(stage.key) or self._stages.setdefault(stage.key, stage)
            if inputs.setdefault(stage.name, one).key != one.key:
                raise ValueError(
                    f"defense '{spec.defense.name}' has two stages named '{stage.name}'."
                )
        return Stage(
            "cell",
            score_cell,
            {"defended": defended.name},
            inputs,
            {
                "config": spec.config(),
                "notes": dict(counts),
                "cost": {
                    "stages": cost,
                    "clean_rows": base.clean_rows if CLEAN_ROWS in defense.NEEDS else 0,
                },
                "revisions": {
                    "data": revision[:12],
                    "victim": victim_identity[:60],
                    "recipe": _recipe(inputs),
                },
            },
            # The scorer reads records and tables, but no model.
            light=tuple(inputs),
            kind="host",
        )


def _keys(stage: Stage | None) -> set[str]:
    return set() if stage is None else {part.key for part in stage.closure()}


def _refuse_hidden(
    name: str,
    stages: Iterable[Stage],
    prepared: Prepared,
    given: Collection[str],
    may_read: str | None = None,
) -> None:
    """Refuse a defense with a stage that reads the mask, the trigger or the evaluation rows.

    The stages that a defense starts from depend on the poison, so that it could reach these.

    name: of the defense.
    stages: its stages, and those they depend on.
    prepared: the cell without the defense.
    given: keys of stages that are not the defense's own.
    may_read: key of the texts that a screening stage gets.

    Raises:
        ValueError: a stage reads them, or could compute them again.
    """
    for stage in stages:
        if stage.key in given:
            continue
        for before in stage.inputs.values():
            if before.key in prepared.forbidden and before.key != may_read:
                raise ValueError(
                    f"defense '{name}': stage '{stage.name}' reads '{before.name}', which is "
                    "hidden from defenses; start from the foundation's own stages."
                )
        if {"data", "attack"} & stage.where.keys():
            raise ValueError(
                f"defense '{name}': stage '{stage.name}' has the location of the data or attack, "
                "which is hidden from defenses; declare it with the foundation's `stage`."
            )


def _recipe(stages: Mapping[str, Stage]) -> str:
    """Return a hash of the stages' versions: it differs between cells of equal settings."""
    versions = [
        [name, stage.function.id, stage.function.version] for name, stage in sorted(stages.items())
    ]
    return hashlib.sha256(json.dumps([*versions, score_cell.version]).encode()).hexdigest()[:8]
