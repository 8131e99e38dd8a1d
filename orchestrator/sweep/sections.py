"""The sections of a sweep file, and the resolved spec of a cell."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from btu.attacks.poisoning import ATTACKS, Attack, PoisonSpec
from btu.data.spec import DataSpec
from btu.defenses.base import DEFENSES, Defense, DefenseSpec
from btu.errors import UserError, unknown
from btu.registry import Registry
from btu.settings import TrainSettings, TuningSettings
from btu.stages import as_config
from btu.victims import VictimSpec


@dataclass(frozen=True)
class ResourceSpec:
    """What a node of the work holds in Ray.

    cpu, gpu: of a shared stage. cpu is its number of torch threads too, gpu may be a fraction of
    one device. cell_cpu, cell_gpu: of the nodes of a single cell (unlearning, clean tuning,
    evaluation); null: as cpu and gpu.
    """

    cpu: float = 1
    gpu: float = 0
    cell_cpu: float | None = None
    cell_gpu: float | None = None

    def __post_init__(self) -> None:
        for name in ("cpu", "cell_cpu"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value <= 0):
                raise UserError(f"resources.{name} must be above 0, got {value}.")
        for name in ("gpu", "cell_gpu"):
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0:
                raise UserError(f"resources.{name} must be at least 0, got {value}.")
            if value > 1:
                raise UserError(
                    f"resources.{name} must be at most 1, got {value}: a trial runs on one device."
                )

    def of(self, kind: str) -> tuple[float, float]:
        """Return the CPUs and GPUs of a node. kind: ``stage``, ``cell`` or ``host`` (no GPU).

        Raises:
            ValueError: there is no such kind.
        """
        if kind == "stage":
            return self.cpu, self.gpu
        if kind == "host":
            return self.cpu, 0.0
        if kind != "cell":
            raise ValueError(f"unknown kind of node '{kind}'; use stage, cell or host.")
        return (
            self.cpu if self.cell_cpu is None else self.cell_cpu,
            self.gpu if self.cell_gpu is None else self.cell_gpu,
        )


@dataclass(frozen=True)
class TrackingSpec:
    """Where MLflow keeps runs. uri: null is a SQLite file in the output folder."""

    uri: str | None = None


KEEPS = ("results", "models")


@dataclass(frozen=True)
class StoreSpec:
    """What stays on disk.

    keep: ``results`` (models and other large stage outputs go once no pending cell needs them) or
    ``models`` (all stays).
    """

    keep: str = "results"

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise unknown("store.keep", self.keep, KEEPS)


# Sections whose keys never depend on another key.
FIXED_SECTIONS: dict[str, type] = {
    "data": DataSpec,
    "victim": VictimSpec,
    "train": TrainSettings,
    "tuning": TuningSettings,
    "resources": ResourceSpec,
    "tracking": TrackingSpec,
    "store": StoreSpec,
}
# Sections with keys of their own and those of the attack or defense that they name.
NAMED_SECTIONS: dict[str, tuple[type, Registry[Any]]] = {
    "attack": (PoisonSpec, ATTACKS),
    "defense": (DefenseSpec, DEFENSES),
}
SCALARS = ("name", "output", "seed", "controls")
NOT_SWEPT = ("resources", "tracking", "store")
# Of the sweep as a whole: no part of what a cell is.
NOT_IN_CELLS = ("tracking", "store")
# The coordinate that says which control a cell is; no setting.
CONTROL = "control"


# Ways to search ----------------------------------------------------------------------------------

# In the order of a cell's coordinates: the first varies slowest, the grid fastest.
SEARCHES = ("optuna", "random", "list", "zip", "grid")


@dataclass(frozen=True)
class TrialSpec:
    """One cell: everything that one trial needs.

    attack_params, defense_params: the hyperparameters of the named attack and defense, complete.
    preset: what `defense_params` were filled up from; a label, it does not act.
    """

    data: DataSpec
    victim: VictimSpec
    poison: PoisonSpec
    attack_params: Mapping[str, Any]
    defense: DefenseSpec
    preset: str | None
    defense_params: Mapping[str, Any]
    train: TrainSettings
    tuning: TuningSettings
    seed: int
    resources: ResourceSpec = field(default_factory=ResourceSpec)

    def build_attack(self) -> Attack:
        attack: Attack = ATTACKS.load(self.poison.name)(**self.attack_params)
        return attack

    def build_defense(self) -> Defense:
        defense: Defense = DEFENSES.load(self.defense.name)(**self.defense_params)
        return defense

    def config(self) -> dict[str, Any]:
        """Return the resolved cell in the shape of a sweep file, as plain data."""
        preset = {} if self.preset is None else {"preset": self.preset}
        return {
            "data": as_config(self.data),
            "victim": as_config(self.victim),
            "attack": {**as_config(self.poison), **self.attack_params},
            "defense": {**as_config(self.defense), **preset, **self.defense_params},
            "train": as_config(self.train),
            "tuning": as_config(self.tuning),
            "seed": self.seed,
            "resources": as_config(self.resources),
        }


def settings(varied: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coordinates that are settings: all but which control a cell is."""
    return {key: value for key, value in varied.items() if key != CONTROL}


def shown_coordinates(varied: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coordinates that tell a cell from others; of no defense there are no settings."""
    idle = varied.get(CONTROL) == "no_defense"
    return {key: v for key, v in varied.items() if not (idle and key.startswith("defense."))}


def pins(varied: Mapping[str, Any]) -> str:
    """Return coordinates as overrides that a shell takes as they are."""
    return " ".join(
        shlex.quote(f"{key}={v if isinstance(v, str) else json.dumps(v, separators=(',', ':'))}")
        for key, v in settings(varied).items()
    )
