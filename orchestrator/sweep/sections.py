"""The sections of a sweep file, and the resolved spec of a cell."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

from btu.attacks.poisoning import ATTACKS, Attack, PoisonSpec
from btu.data.spec import HELD_OUT, DataSpec
from btu.defenses.base import DEFENSES, Defense, DefenseSpec
from btu.errors import UserError, unknown
from btu.registry import Registry
from btu.settings import TrainSettings, TuningSettings
from btu.stages import as_config
from btu.victims import VictimSpec
from orchestrator.sweep.labels import check_labels

# Resources that Ray gives every node, in lower case.
OWN_RESOURCES = ("cpu", "gpu", "memory", "object_store_memory")


@dataclass(frozen=True)
class ResourceSpec:
    """What a stage occupies in Ray.

    cpu: the CPUs of a stage that cells share; also its number of torch threads.
    gpu: the GPUs of a stage that cells share; may be a fraction of one device.
    cell_cpu: the CPUs of a stage of a single cell (unlearning, clean tuning, evaluation); null
        means `cpu`.
    cell_gpu: the GPUs of a stage of a single cell; null means `gpu`.
    labels: a stage runs only on nodes with these labels. A value is VALUE, !VALUE, in(A, B) or
        !in(A, B), as Ray's label selectors are.
    custom: how much of a cluster's own resources a stage occupies, by name.
    """

    cpu: float = 1
    gpu: float = 0
    cell_cpu: float | None = None
    cell_gpu: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    custom: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_labels(self.labels)
        for name, amount in self.custom.items():
            if name.lower() in OWN_RESOURCES:
                raise UserError(
                    f"resources.custom has {name}, which is no resource of a cluster's own; use "
                    "resources.cpu or resources.gpu."
                )
            if not math.isfinite(amount) or amount <= 0 or (amount > 1 and amount % 1):
                raise UserError(
                    f"resources.custom.{name} must be above 0, and a whole number above 1, got "
                    f"{amount}."
                )
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
        """Return the CPUs and GPUs of a stage.

        kind: ``stage`` for one that cells share, ``cell`` for one of a single cell, ``host`` for a
            shared one without a GPU.

        Raises:
            ValueError: there is no such kind.
        """
        if kind == "stage":
            return self.cpu, self.gpu
        if kind == "host":
            return self.cpu, 0.0
        if kind != "cell":
            raise ValueError(f"unknown kind of stage '{kind}'; use stage, cell or host.")
        return (
            self.cpu if self.cell_cpu is None else self.cell_cpu,
            self.gpu if self.cell_gpu is None else self.cell_gpu,
        )


@dataclass(frozen=True)
class TrackingSpec:
    """Where MLflow keeps runs.

    uri: of the MLflow store; null means a SQLite file in the output folder.
    """

    uri: str | None = None


KEEPS = ("results", "models")


@dataclass(frozen=True)
class StoreSpec:
    """What stays on disk.

    keep: ``results`` removes models and other large stage outputs once no pending cell needs them;
        ``models`` removes nothing.
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
# Sections with keys of their own, and with the keys of the attack or defense that they name.
NAMED_SECTIONS: dict[str, tuple[type, Registry[Any]]] = {
    "attack": (PoisonSpec, ATTACKS),
    "defense": (DefenseSpec, DEFENSES),
}
SCALARS = ("name", "output", "seed", "stealth", "controls")
NOT_SWEPT = ("resources", "tracking", "store")
# Sections that apply to the whole sweep; the settings of a cell lack them.
NOT_IN_CELLS = ("tracking", "store")
# The coordinate whose value is the name of a control. It is not a setting.
CONTROL = "control"


@dataclass(frozen=True)
class TrialSpec:
    """Everything that defines one cell.

    data: the dataset, its splits and its sizes.
    victim: the model that is poisoned.
    poison: the attack's name, and how much is poisoned.
    attack_preset: the set of hyperparameters that completed `attack_params`; a label without
        effect.
    attack_params: all hyperparameters of the attack.
    defense: the defense's name.
    preset: the same for `defense_params`.
    defense_params: all hyperparameters of the defense.
    train: the settings of the fine-tuning.
    tuning: the settings of the clean tuning.
    seed: of the random choices in its stages.
    resources: what its stages occupy in Ray.
    stealth: whether its poisoned rows are measured (`btu.stealth`), if there are any.
    """

    data: DataSpec
    victim: VictimSpec
    poison: PoisonSpec
    attack_preset: str | None
    attack_params: Mapping[str, Any]
    defense: DefenseSpec
    preset: str | None
    defense_params: Mapping[str, Any]
    train: TrainSettings
    tuning: TuningSettings
    seed: int
    resources: ResourceSpec = field(default_factory=ResourceSpec)
    stealth: bool = False

    @property
    def measures_poison(self) -> bool:
        """Whether `stealth` acts: without poison there is nothing to measure."""
        return self.stealth and self.poison.poisons

    def build_attack(self) -> Attack:
        """Return the attack; a hyperparameter that breaks a rule raises a `UserError`."""
        attack: Attack = ATTACKS.load(self.poison.name)(**self.attack_params)
        return attack

    def build_defense(self) -> Defense:
        """Return the defense; a hyperparameter that breaks a rule raises a `UserError`."""
        defense: Defense = DEFENSES.load(self.defense.name)(**self.defense_params)
        return defense

    def config(self) -> dict[str, Any]:
        """Return the resolved cell in the form of a sweep file, as plain data."""
        presets = [
            {} if name is None else {"preset": name} for name in (self.attack_preset, self.preset)
        ]
        return {
            "data": self.data.config(),
            "victim": as_config(self.victim),
            "attack": {**as_config(self.poison), **presets[0], **self.attack_params},
            "defense": {**as_config(self.defense), **presets[1], **self.defense_params},
            "train": as_config(self.train),
            "tuning": as_config(self.tuning),
            "seed": self.seed,
            # Cells without it have the records that they had before there was this key.
            **({"stealth": True} if self.measures_poison else {}),
            "resources": as_config(self.resources),
        }


def hold_out(config: dict[str, Any]) -> None:
    """Write `HELD_OUT` for each split that is null in the settings of a cell, as a file has them.

    A resolved config keeps None for a split that is found by its usual name.
    """
    data = config.get("data")
    for role in ("clean_split", "eval_split"):
        if isinstance(data, dict) and role in data and data[role] is None:
            data[role] = HELD_OUT


def settings(varied: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coordinates that are settings: all but `CONTROL`."""
    return {key: value for key, value in varied.items() if key != CONTROL}


def shown_coordinates(varied: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coordinates that distinguish a cell: without a defense, none of its settings."""
    idle = varied.get(CONTROL) == "no_defense"
    return {key: v for key, v in varied.items() if not (idle and key.startswith("defense."))}


def pins(varied: Mapping[str, Any]) -> str:
    """Return coordinates as overrides, quoted for a shell, and for YAML where it is needed."""
    return " ".join(
        shlex.quote(f"{key}={_as_override(value)}") for key, value in settings(varied).items()
    )


def _as_override(value: Any) -> str:
    if isinstance(value, str):
        # YAML would read "no" as False; whatever may be a number is quoted without a look at it.
        plain = value.strip() == value and not value[:1].isdigit() and value[:1] not in "+-."
        with suppress(yaml.YAMLError):
            if plain and yaml.safe_load(value) == value:
                return value
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, separators=(",", ":"))
