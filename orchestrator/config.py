"""A sweep file -> validated, frozen trial specs.

OmegaConf parses and types; the schema is the library's own dataclasses, so a hyperparameter that
an attack or a defense gains is a config key from that moment on. Imports no torch, ray or mlflow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btu.data import DataSpec
from btu.defense import DEFENSES, Defense, DefenseSpec
from btu.errors import UserError, did_you_mean
from btu.poisoning import ATTACKS, Attack, PoisonSpec
from btu.registry import Registry
from btu.settings import TrainSettings, TuningSettings
from btu.victims import VICTIMS, VictimSpec, folder_identity, weight_files

# Raised when the recipe of a trial changes what it measures: finished cells then run again.
RECIPE_VERSION = 1


@dataclass(frozen=True)
class ResourceSpec:
    """What one trial holds in Ray. cpu: also its torch threads. gpu: may be a fraction."""

    cpu: float = 1
    gpu: float = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.cpu) or self.cpu <= 0:
            raise UserError(f"resources.cpu must be above 0, got {self.cpu}.")
        if not math.isfinite(self.gpu) or self.gpu < 0:
            raise UserError(f"resources.gpu must be at least 0, got {self.gpu}.")
        if self.gpu > 1:
            raise UserError(
                f"resources.gpu must be at most 1, got {self.gpu}: a trial runs on one device."
            )


@dataclass(frozen=True)
class TrackingSpec:
    """Where MLflow keeps runs. uri: null is a SQLite file in the output folder."""

    uri: str | None = None


# Sections whose keys never depend on another key.
FIXED_SECTIONS: dict[str, type] = {
    "data": DataSpec,
    "victim": VictimSpec,
    "train": TrainSettings,
    "tuning": TuningSettings,
    "resources": ResourceSpec,
    "tracking": TrackingSpec,
}
# Sections with keys of their own and those of the attack or defense that they name.
NAMED_SECTIONS: dict[str, tuple[type, Registry[Any]]] = {
    "attack": (PoisonSpec, ATTACKS),
    "defense": (DefenseSpec, DEFENSES),
}
SCALARS = ("name", "output", "seed")
NOT_SWEPT = ("name", "output", "resources", "tracking", "grid")


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
            "data": dataclasses.asdict(self.data),
            "victim": dataclasses.asdict(self.victim),
            "attack": {**dataclasses.asdict(self.poison), **self.attack_params},
            "defense": {**dataclasses.asdict(self.defense), **preset, **self.defense_params},
            "train": dataclasses.asdict(self.train),
            "tuning": dataclasses.asdict(self.tuning),
            "seed": self.seed,
            "resources": dataclasses.asdict(self.resources),
        }

    def key(self, data_fingerprint: str, victim_identity: str) -> str:
        """Return the cell's fingerprint: cells with equal ones must have equal results.

        Paths, names and resources do not act; the rows and the weights stand for themselves. A
        hub model is told by its name and revision: pin `victim.revision` where its weights may
        change. A local paraphrase model is told by its files.
        """
        acts = self.config()
        del acts["resources"]
        acts["defense"].pop("preset", None)
        model = self.attack_params.get("model")
        if model is not None and Path(model).is_dir():
            acts["attack"]["model"] = folder_identity(Path(model), weight_files(Path(model)))
        acts["data"] = data_fingerprint
        acts["victim"] = {"identity": victim_identity, "max_length": self.victim.max_length}
        acts["recipe"] = RECIPE_VERSION
        text = json.dumps(acts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Cell:
    """A point of the grid, before it is resolved. varied: its coordinates, by dotted key."""

    varied: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file.

    text: the file with the overrides applied, as YAML, for the record. Without `tracking`, whose
    URI may hold a password.
    """

    name: str
    output: Path
    resources: ResourceSpec
    tracking: TrackingSpec
    grid: Mapping[str, list[Any]]
    base: Mapping[str, Any]
    text: str

    @property
    def folder(self) -> Path:
        """Where the sweep's results are: ``<output>/<name>``."""
        return self.output / self.name

    def cells(self) -> Iterator[Cell]:
        """Yield every point of the grid, the last key of the file varying fastest."""
        for values in itertools.product(*self.grid.values()):
            varied = dict(zip(self.grid, values, strict=True))
            config = json.loads(json.dumps(self.base))
            for key, value in varied.items():
                _assign(config, key, value)
            yield Cell(varied, config)


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Parse a sweep file and check every key in it.

    overrides: ``key=value`` with dotted keys; a grid axis is ``grid.<key>=[...]``. Overriding a
    key that the grid varies replaces the axis by that value.

    Raises:
        UserError: the file is missing or no YAML mapping; a key, attack, defense or preset is
            unknown ("did you mean"); a value has the wrong type; the grid is malformed.
    """
    config = _read(Path(path))
    grid = config.pop("grid", None) or {}
    if not isinstance(grid, dict):
        raise UserError(f"grid must map keys to lists of values, got {grid!r}.")
    pinned: dict[str, Any] = {}
    for key, value in _parse_overrides(overrides):
        if key == "grid":
            raise UserError("override an axis of the grid by its key: grid.<key>=[...].")
        if key.startswith("grid."):
            grid[key.removeprefix("grid.")] = value
        else:
            if key in grid:
                pinned[key] = grid.pop(key)
            _assign(config, key, value)
    config.setdefault("name", Path(path).stem)
    names = _names_in_use(config, grid, pinned)
    _check_keys(config, names)
    _check_grid(grid, names)
    _check_shared_paraphrase(config, _names_in_use(config, grid, {})["attack"])
    name, output = config.pop("name"), config.pop("output", "runs")
    if not isinstance(output, str) or not output.strip():
        raise UserError(f"output must be a folder, got {output!r}.")
    if not isinstance(name, str) or not name.strip() or "/" in name or name.startswith("."):
        raise UserError(f"name must be a plain word that can name a folder, got {name!r}.")
    resources = _typed("resources", ResourceSpec, config.get("resources") or {})
    tracking = _typed("tracking", TrackingSpec, config.pop("tracking", None) or {})
    shown = {"name": name, "output": str(output), **config, "grid": grid}
    return Sweep(
        name,
        Path(output).expanduser().resolve(),
        resources,
        tracking,
        grid,
        config,
        yaml.safe_dump(shown, sort_keys=False),
    )


def resolve(config: Mapping[str, Any]) -> TrialSpec:
    """Turn the plain config of one cell into a spec.

    Keys of an attack or a defense that other cells of the sweep use are left out, so that one
    file can hold the parameters of all.

    Raises:
        UserError: a value has the wrong type or breaks a rule.
    """
    sections = {
        name: _typed(name, schema, config.get(name) or {})
        for name, schema in FIXED_SECTIONS.items()
        if name != "tracking"
    }
    data: DataSpec = sections["data"]
    if data.path is not None:
        # Workers start in folders of their own.
        data = dataclasses.replace(data, path=str(Path(data.path).expanduser().resolve()))
    victim: VictimSpec = sections["victim"]
    if victim.name not in VICTIMS and Path(victim.name).expanduser().is_dir():
        victim = dataclasses.replace(victim, name=str(Path(victim.name).expanduser().resolve()))
    poison, attack_params, _ = _named("attack", config.get("attack") or {})
    model = attack_params.get("model")
    if model is not None and Path(model).expanduser().is_dir():
        attack_params["model"] = str(Path(model).expanduser().resolve())
    defense, defense_params, preset = _named("defense", config.get("defense") or {})
    seed = config.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed must be an integer, got {seed!r}.")
    return TrialSpec(
        data=data,
        victim=victim,
        poison=poison,
        attack_params=attack_params,
        defense=defense,
        preset=preset,
        defense_params=defense_params,
        train=sections["train"],
        tuning=sections["tuning"],
        seed=seed,
        resources=sections["resources"],
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def pins(varied: Mapping[str, Any]) -> str:
    """Return coordinates as overrides that a shell takes as they are."""
    return " ".join(
        shlex.quote(f"{key}={json.dumps(v, separators=(',', ':')) if isinstance(v, list) else v}")
        for key, v in varied.items()
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"sweep file {path} does not exist; see sweeps/ for ready ones.")
    try:
        # OmegaConf's loader reads 2e-5 as a float, where plain YAML 1.1 gives a string.
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"sweep file {path} is no valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"sweep file {path} must be a mapping of keys to values.")
    return {str(key): value for key, value in loaded.items()}


def _parse_overrides(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override '{text}' must have the form key=value.")
        try:
            parsed = OmegaConf.from_dotlist([f"value={value}"])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"override '{text}' has no valid value: {error}") from error
        container = OmegaConf.to_container(parsed)
        assert isinstance(container, dict)
        yield key.strip(), container["value"]


def _assign(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"key '{key}' does not fit: '{parent}' holds the value {child!r}.")
        node = child
    node[last] = value


def _names_in_use(
    config: Mapping[str, Any], grid: Mapping[str, Any], pinned: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return the attacks and defenses that any cell names; unknown ones are errors here.

    Names on an axis that an override pinned count too: the file holds their keys.
    """
    names = {}
    for section, (schema, registry) in NAMED_SECTIONS.items():
        own = (config.get(section) or {}) if isinstance(config.get(section), dict | None) else {}
        axis = grid.get(f"{section}.name")
        used = list(axis) if isinstance(axis, list) else [own.get("name", schema().name)]
        used += pinned.get(f"{section}.name") or []
        for name in used:
            registry[str(name)]
        names[section] = list(dict.fromkeys(map(str, used)))
    return names


def _fields(schema: type) -> list[str]:
    return [f.name for f in dataclasses.fields(schema)]


def _section_keys(section: str, names: Mapping[str, list[str]]) -> list[str]:
    if section in FIXED_SECTIONS:
        return _fields(FIXED_SECTIONS[section])
    schema, registry = NAMED_SECTIONS[section]
    keys = _fields(schema)
    for name in names[section]:
        part = registry.load(name)
        keys += [*_fields(part), *(["preset"] if hasattr(part, "PRESETS") else [])]
    return list(dict.fromkeys(keys))


def _unknown_key(key: str, known: Iterable[str], where: str) -> UserError:
    known = list(known)
    return UserError(
        f"unknown key '{key}' in {where}{did_you_mean(key, known)} (known: {', '.join(known)})"
    )


def _check_keys(config: Mapping[str, Any], names: Mapping[str, list[str]]) -> None:
    sections = [*FIXED_SECTIONS, *NAMED_SECTIONS]
    for key, value in config.items():
        if key in SCALARS:
            continue
        if key not in sections:
            raise _unknown_key(key, [*SCALARS, *sections, "grid"], "the sweep file")
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"section '{key}' must be a mapping of keys to values, got {value!r}.")
        known = _section_keys(key, names)
        for inner in value:
            if inner not in known:
                raise _unknown_key(f"{key}.{inner}", [f"{key}.{k}" for k in known], "the sweep")


def _check_shared_paraphrase(config: Mapping[str, Any], names: list[str]) -> None:
    """Refuse one paraphrase source for several paraphrase attacks: they would be the same one.

    names: the attacks that cells really have, without those that an override pinned away.
    """
    readers = [name for name in names if hasattr(ATTACKS.load(name), "default_column")]
    section = config.get("attack") or {}
    for key in ("column", "model"):
        if section.get(key) is not None and len(readers) > 1:
            raise UserError(
                f"attack.{key} {section[key]!r} would serve {' and '.join(readers)} alike; launch "
                f"them one by one, e.g. attack.name={readers[0]} attack.{key}=..."
            )


def _check_grid(grid: Mapping[str, Any], names: Mapping[str, list[str]]) -> None:
    swept = ["seed"] + [
        f"{section}.{key}"
        for section in [*FIXED_SECTIONS, *NAMED_SECTIONS]
        if section not in NOT_SWEPT
        for key in _section_keys(section, names)
    ]
    for key, values in grid.items():
        if key not in swept:
            raise _unknown_key(key, swept, "the grid")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key} must be a list of at least one value, got {values!r}.")


def _typed(section: str, schema: type, values: Mapping[str, Any]) -> Any:
    """Return a `schema` object of `values`, types checked and converted by OmegaConf."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), DictConfig(dict(values)))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{section}.{error.full_key}" if error.full_key else section
        raise UserError(f"{key}: {reason}.") from error


def _named(section: str, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str | None]:
    """Return the section's own part, the named part's parameters, and the preset's name."""
    schema, registry = NAMED_SECTIONS[section]
    own = _fields(schema)
    spec = _typed(section, schema, {k: v for k, v in values.items() if k in own})
    part = registry.load(spec.name)
    given = {k: v for k, v in values.items() if k in _fields(part)}
    preset: str | None = None
    presets: Mapping[str, Mapping[str, Any]] | None = getattr(part, "PRESETS", None)
    if presets is not None:
        preset = str(values.get("preset") or "default")
        if preset not in presets:
            raise UserError(
                f"unknown {section}.preset '{preset}'{did_you_mean(preset, presets)} "
                f"(known: {', '.join(presets)})"
            )
        given = {**presets[preset], **given}
    return spec, dataclasses.asdict(_typed(section, part, given)), preset
