"""A sweep file -> validated, frozen trial specs.

OmegaConf parses and types; the schema is the library's own dataclasses, so a hyperparameter that
an attack or a defense gains is a config key from that moment on. Imports no torch, ray or mlflow.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btu.data import DataSpec
from btu.defense import DEFENSES, Defense, DefenseSpec
from btu.errors import UserError, did_you_mean, unknown
from btu.poisoning import ATTACKS, Attack, PoisonSpec
from btu.registry import Registry
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stages import plain
from btu.victims import VICTIMS, VictimSpec


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


# Cells that come by themselves beside those of the sweep: what makes them of a cell, by name.
CONTROLS: dict[str, dict[str, Any]] = {
    "no_poison": {"attack.poison_rate": 0.0},
    "no_defense": {"defense.name": "none"},
}
# The coordinate that says which control a cell is; no setting.
CONTROL = "control"


# Ways to search ----------------------------------------------------------------------------------

# In the order of a cell's coordinates: the first varies slowest, the grid fastest.
SEARCHES = ("optuna", "random", "list", "zip", "grid")
SAMPLERS = ("tpe", "nsga2", "random")


@dataclass(frozen=True)
class Choice:
    """A searched key that takes one of some values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at a share, in [0, 1), of the domain."""
        return self.values[int(share * len(self.values))]

    def examples(self) -> list[Any]:
        """Return values that the key may take."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A searched key that takes a number from low to high, both included.

    Whole numbers if both ends are integers. log: uniform in the logarithm. step: distance between
    the possible values, counted from low; None: 1 for whole numbers, else any number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it holds integers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, share: float) -> float:
        """Return the value at a share, in [0, 1), of the domain."""
        if self.log:
            # A whole number stands for all that rounds to it.
            half = 0.5 if self.whole else 0.0
            low, high = math.log(self.low - half), math.log(self.high + half)
            value = math.exp(low + share * (high - low))
            return self._within(round(value) if self.whole else value)
        step = self.step or (1 if self.whole else None)
        if step is None:
            return self._within(self.low + share * (self.high - self.low))
        return self._nth(int(share * (self._steps(step) + 1)), step)

    def snap(self, value: float) -> float:
        """Return the possible value next to `value`: free of what sums of steps round off."""
        if self.step is None:
            return self._within(round(value) if self.whole else value)
        steps = round((value - self.low) / self.step)
        return self._nth(min(max(steps, 0), self._steps(self.step)), self.step)

    def examples(self) -> list[Any]:
        """Return values that the key may take."""
        return [self.low, self.high]

    def _within(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def _steps(self, step: float) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(step)))

    def _nth(self, index: int, step: float) -> float:
        # In decimals: 0.1 + 2 x 0.1 is 0.3.
        value = Decimal(str(self.low)) + index * Decimal(str(step))
        return int(value) if self.whole else float(value)


Domain: TypeAlias = Choice | Range


@dataclass(frozen=True)
class RandomSpec:
    """Cells drawn at random.

    samples: how many. space: what each key may be. The first samples of a longer search are those
    of a shorter one, and what one key takes does not depend on the other keys.
    """

    samples: int
    seed: int
    space: Mapping[str, Domain]

    def points(self) -> list[dict[str, Any]]:
        """Return the drawn coordinates."""
        drawn = {
            key: np.random.default_rng(derive_seed(self.seed, "random search", key))
            .random(self.samples)
            .tolist()
            for key in self.space
        }
        return [
            {key: domain.at(drawn[key][index]) for key, domain in self.space.items()}
            for index in range(self.samples)
        ]


@dataclass(frozen=True)
class OptunaSpec:
    """Cells suggested as the sweep goes, from the results of earlier ones.

    trials: how many suggestions at most. sampler: ``tpe``, ``nsga2`` (generations of 20) or
    ``random``. The objectives are a low mean ASR and a high mean CACC over a suggestion's cells.
    """

    trials: int
    seed: int
    sampler: str
    space: Mapping[str, Domain]


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
            "data": plain(self.data),
            "victim": plain(self.victim),
            "attack": {**plain(self.poison), **self.attack_params},
            "defense": {**plain(self.defense), **preset, **self.defense_params},
            "train": plain(self.train),
            "tuning": plain(self.tuning),
            "seed": self.seed,
            "resources": plain(self.resources),
        }


@dataclass(frozen=True)
class Cell:
    """A point of the sweep, before it is resolved.

    varied: its coordinates, by dotted key; of a control also which one it is.
    """

    varied: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file.

    output: an absolute folder or a URL. grid: axes of which every combination is a cell. zipped:
    axes of which the i-th values go together. listed: cells one by one; an entry that lacks a key
    of another one has the file's value of it, if there is one. controls: names of `CONTROLS` that
    every cell gets. base: the settings of all cells.
    text: the file with the overrides applied, as YAML, for the record. Without `tracking`, whose
    URI may hold a password.
    """

    name: str
    output: str
    resources: ResourceSpec
    tracking: TrackingSpec
    store: StoreSpec
    grid: Mapping[str, list[Any]]
    zipped: Mapping[str, list[Any]]
    listed: Sequence[Mapping[str, Any]]
    random: RandomSpec | None
    optuna: OptunaSpec | None
    controls: tuple[str, ...]
    base: Mapping[str, Any]
    text: str

    @property
    def folder(self) -> str:
        """Where the sweep's own files are: ``<output>/<name>``."""
        return f"{self.output}/{self.name}"

    @property
    def store_location(self) -> str:
        """Where the results of all sweeps of the output folder are: ``<output>/store``."""
        return f"{self.output}/store"

    @property
    def axes(self) -> tuple[str, ...]:
        """Every key that cells vary, in the order of their coordinates."""
        spaces = [spec.space for spec in (self.optuna, self.random) if spec is not None]
        return tuple(dict.fromkeys(itertools.chain(*spaces, *self.listed, self.zipped, self.grid)))

    def cells(self) -> Iterator[Cell]:
        """Yield every point: random draws x list x zip x grid.

        Coordinates stand in that order, each section's as in the file, and the last one varies
        fastest. A sweep that Optuna searches yields nothing: its cells come from `expand`.
        """
        if self.optuna is None:
            yield from self._expand({})

    def expand(self, suggested: Mapping[str, Any]) -> list[Cell]:
        """Return the cells of one suggestion, whose coordinates come first."""
        return list(self._expand(suggested))

    def controls_of(self, cells: Iterable[Mapping[str, Any]]) -> Iterator[Cell]:
        """Yield the controls of cells, given by their coordinates; of equal ones the first.

        A control has the coordinates of its cell, but for those that make it one.
        """
        known = set()
        for varied, name in itertools.product(cells, self.controls):
            made = {**varied, **CONTROLS[name], CONTROL: name}
            acts = json.dumps(shown_coordinates(made), sort_keys=True)
            if acts not in known:
                known.add(acts)
                yield self.cell(made)

    def cell(self, varied: Mapping[str, Any]) -> Cell:
        """Return the cell with these coordinates, whether or not the sweep has it."""
        config = _copied(self.base)
        for key, value in settings(varied).items():
            assign(config, key, value)
        return Cell(varied, config)

    def describe(self) -> str:
        """Return in words what is searched and how many cells that makes."""
        count = math.prod(map(len, self._parts()))
        cells = f"{count} cell{'s' * (count != 1)}"
        words = []
        if self.random is not None:
            words.append(f"{self.random.samples} random draws of {', '.join(self.random.space)}")
        if self.listed:
            words.append(f"list of {len(self.listed)}")
        if self.zipped:
            words.append(f"zip {' + '.join(self.zipped)}")
        if self.grid:
            words.append(f"grid {' x '.join(self.grid)}")
        others = " x ".join(words)
        if self.optuna is None:
            return f"{others} = {cells}" if others else "a single cell"
        searched = f"{self.optuna.sampler} over {', '.join(self.optuna.space)}"
        detail = f"{searched}; {others}" if others else searched
        return f"optuna: up to {self.optuna.trials} suggestions x {cells} ({detail})"

    def open_axes(self) -> dict[str, list[Any]]:
        """Return what has to be pinned to leave a single cell: values, or examples, by key."""
        found: dict[str, list[Any]] = {}
        if self.optuna is not None:
            found |= {key: domain.examples() for key, domain in self.optuna.space.items()}
        if self.random is not None and self.random.samples > 1:
            drawn = dataclasses.replace(self.random, samples=2).points()
            found |= {key: [point[key] for point in drawn] for key in self.random.space}
        if len(self.listed) > 1:
            for key, value in itertools.chain(*(entry.items() for entry in self.listed)):
                values = found.setdefault(key, [])
                if value not in values:
                    values.append(value)
        for axes in (self.zipped, self.grid):
            found |= {key: list(values) for key, values in axes.items() if len(values) > 1}
        return found

    def _parts(self) -> list[Sequence[Mapping[str, Any]]]:
        """Return the points of each section, in the order of the coordinates."""
        return [
            [{}] if self.random is None else self.random.points(),
            self.listed or [{}],
            _zipped(self.zipped),
            [
                dict(zip(self.grid, values, strict=True))
                for values in itertools.product(*self.grid.values())
            ],
        ]

    def _expand(self, suggested: Mapping[str, Any]) -> Iterator[Cell]:
        for points in itertools.product(*self._parts()):
            varied = dict(suggested)
            for point in points:
                varied |= point
            yield self.cell(varied)


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Parse a sweep file and check every key in it.

    overrides: ``key=value`` with dotted keys. An axis is ``grid.<key>=[...]``,
    ``zip.<key>=[...]`` or ``random.space.<key>=...``, a setting of a search
    ``random.samples=50`` or ``optuna.trials=10``, the list as a whole ``list=[{...}]``.
    Overriding a key that an axis of any section varies replaces the axis by that value.

    Raises:
        UserError: the file is missing or no YAML mapping; a key, attack, defense or preset is
            unknown ("did you mean"); a value has the wrong type; a search is malformed.
    """
    config = _read(Path(path))
    search = _Search(config)
    pinned: dict[str, list[Any]] = {}
    for key, value in _parse_overrides(overrides):
        if not search.override(key, value):
            pinned.setdefault(key, []).extend([*search.pin(key), _lookup(config, key)])
            assign(config, key, value)
    search.finish()
    config.setdefault("name", Path(path).stem)
    names = _names_in_use(config, search, pinned)
    _check_keys(config, names)
    search.check(_swept(names))
    _check_shared_paraphrase(config, search)
    name, written = config.pop("name"), config.pop("output", "runs")
    output = _output(written)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        # It names a folder and an experiment, and stands in the commands that are printed.
        raise UserError(
            "name must be a plain word that can name a folder: letters, digits, '_', '-', '+' and "
            f"'.', the first a letter, digit or '_'; got {name!r}. No name: the file's is taken."
        )
    if name == "store":
        raise UserError(
            "name 'store' is taken: that folder of the output holds the results of all sweeps; "
            "use another name."
        )
    resources = _typed("resources", ResourceSpec, config.get("resources") or {})
    tracking = _typed("tracking", TrackingSpec, config.pop("tracking", None) or {})
    keeping = config.pop("store", None) or {}
    shown = {"name": name, "output": written, **config}
    optuna = search.optuna()
    controls = _controls(config, optuna)
    if keeping:
        shown["store"] = keeping
    return Sweep(
        name,
        output,
        resources,
        tracking,
        _typed("store", StoreSpec, keeping),
        search.grid,
        search.zipped,
        _filled(search.listed or [], config),
        search.random(),
        optuna,
        controls,
        config,
        yaml.safe_dump(shown | search.written(), sort_keys=False),
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
        if name not in NOT_IN_CELLS
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
    lm = defense_params.get("lm")
    if isinstance(lm, str) and Path(lm).expanduser().is_dir():
        defense_params["lm"] = str(Path(lm).expanduser().resolve())
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


def assign(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a nested config, in place.

    Raises:
        UserError: a parent of the key holds a value.
    """
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


_ABSENT: Any = object()


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or `_ABSENT`."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _copied(value: Any) -> Any:
    """Return plain data with mappings and lists of its own."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _zipped(axes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    rows = [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]
    return rows or [{}]


def _filled(
    entries: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the entries with one set of keys, as far as the file has values for them."""
    keys = dict.fromkeys(itertools.chain(*entries))
    filled = [{key: entry.get(key, _lookup(config, key)) for key in keys} for entry in entries]
    return [{k: v for k, v in entry.items() if v is not _ABSENT} for entry in filled]


def _controls(config: dict[str, Any], optuna: OptunaSpec | None) -> tuple[str, ...]:
    """Take the key `controls` out of the file; return the controls that its cells get.

    Raises:
        UserError: one is unknown, or the sweep cannot have any.
    """
    written = config.pop("controls", _ABSENT)
    if written is _ABSENT:
        # Suggestions are there to be compared with each other.
        return () if optuna is not None else tuple(CONTROLS)
    if written is None or written is False:
        return ()
    if not isinstance(written, list):
        raise UserError(
            f"controls must be a list of {' and '.join(CONTROLS)}, or false for none, got "
            f"{written!r}."
        )
    for name in written:
        if name not in list(CONTROLS):  # it may be anything, a mapping too
            raise unknown("control", str(name), CONTROLS)
    if written and optuna is not None:
        raise UserError(
            f"controls {', '.join(written)} cannot be had of cells that Optuna suggests; leave the "
            "key out, and launch a second sweep without optuna for them."
        )
    return tuple(dict.fromkeys(written))


def _output(written: Any) -> str:
    if not isinstance(written, str) or not written.strip():
        raise UserError(f"output must be a folder or a URL, got {written!r}.")
    if "://" not in written:
        return str(Path(written).expanduser().resolve())
    url = written.rstrip("/")
    if "://" not in url:
        raise UserError(f"output {written!r} names no place; give the URL of a folder.")
    return url


class _Search:
    """The search sections of a sweep file, taken out of it, while overrides change them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.grid = _mapping("grid", config.pop("grid", None), "keys to lists of values")
        self.zipped = _mapping("zip", config.pop("zip", None), "keys to lists of values")
        self.listed: Any = config.pop("list", None)
        self.sections = {
            name: _space_section(name, config.pop(name, None)) for name in ("random", "optuna")
        }
        self._emptied: set[str] = set()

    def override(self, key: str, value: Any) -> bool:
        """Apply an override of a search section; return False if `key` is none."""
        head, _, rest = key.partition(".")
        if head not in SEARCHES:
            return False
        if head in ("grid", "zip"):
            if not rest:
                raise UserError(f"override an axis of the {head} by its key: {head}.<key>=[...].")
            (self.grid if head == "grid" else self.zipped)[rest] = value
        elif head == "list":
            if rest:
                raise UserError(
                    f"override the list as a whole, list=[{{...}}], or pin the key for all of its "
                    f"entries, {rest}=VALUE."
                )
            self.listed = value
        elif not rest:
            self.sections[head] = _space_section(head, value)
        elif rest.startswith("space."):
            self.sections[head].setdefault("space", {})[rest.removeprefix("space.")] = value
        else:
            self.sections[head] = _space_section(head, {**self.sections[head], rest: value})
        return True

    def pin(self, key: str) -> list[Any]:
        """Take `key` off every axis; return the values that it had there."""
        taken: list[Any] = []
        for axes in (self.grid, self.zipped):
            values = axes.pop(key, [])
            taken += values if isinstance(values, list) else []
        for name, section in self.sections.items():
            if key in section.get("space", {}):
                domain = section["space"].pop(key)
                taken += domain if isinstance(domain, list) else []
                self._emptied.add(name)
        if any(key in entry for entry in self._entries()):
            taken += [entry.pop(key) for entry in self._entries() if key in entry]
            # What is left may be the same cell several times, or only what the file says.
            self.listed = [e for i, e in enumerate(self.listed) if e not in self.listed[:i]]
            if self.listed == [{}]:
                self.listed = None
        return taken

    def finish(self) -> None:
        """Drop the searches of which every key was pinned, and check what was overridden."""
        for name in self._emptied:
            if not self.sections[name].get("space"):
                self.sections[name] = {}
        if all(self.sections.values()):
            raise UserError("random and optuna exclude each other; keep one of them.")

    def values(self, key: str, config: Mapping[str, Any]) -> list[Any]:
        """Return what cells have for `key`, `_ABSENT` where nothing is set."""
        own = _lookup(config, key)
        for axes in (self.grid, self.zipped, *self._spaces()):
            if key in axes:
                return axes[key] if isinstance(axes[key], list) and axes[key] else [own]
        if any(key in entry for entry in self._entries()):
            return [entry.get(key, own) for entry in self._entries()]
        return [own]

    def points(self, keys: Collection[str]) -> Iterator[dict[str, Any]]:
        """Yield the combinations of values that cells have for those of `keys` that they vary."""

        def only(point: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in point.items() if key in keys}

        free = [
            [{key: value} for value in values]
            for axes in (self.grid, *self._spaces())
            for key, values in only(axes).items()
            if isinstance(values, list)
        ]
        tied = [list(map(only, self._entries())) or [{}], _zipped(only(self.zipped))]
        for parts in itertools.product(*free, *tied):
            yield {key: value for part in parts for key, value in part.items()}

    def check(self, swept: list[str]) -> None:
        """Check every axis.

        swept: the keys that may vary.

        Raises:
            UserError: a key is unknown or stands on two axes, a value has the wrong type or a
                rule is broken.
        """
        seen: dict[str, str] = {}
        for section, where, keys in (
            ("grid", "the grid", self.grid),
            ("zip", "the zip", self.zipped),
            ("list", "the list", dict.fromkeys(itertools.chain(*self._checked_entries()))),
            ("random", "random.space", self.sections["random"].get("space", {})),
            ("optuna", "optuna.space", self.sections["optuna"].get("space", {})),
        ):
            for key in keys:
                if key not in swept:
                    raise _unknown_key(key, swept, where)
                if key in seen:
                    raise UserError(
                        f"{key} is an axis of both {seen[key]} and {section}; keep it in one."
                    )
                seen[key] = section
        for section, axes in (("grid", self.grid), ("zip", self.zipped)):
            for key, values in axes.items():
                if not isinstance(values, list) or not values:
                    raise UserError(
                        f"{section}.{key} must be a list of at least one value, got {values!r}."
                    )
        if len({len(values) for values in self.zipped.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(v)}" for key, v in self.zipped.items())
            raise UserError(
                f"zip needs equally many values for every key ({lengths}); even them out, or use "
                "grid for every combination."
            )

    def random(self) -> RandomSpec | None:
        """Return the random search, checked."""
        section = self.sections["random"]
        if not section:
            return None
        _check_section("random", section, ("samples", "seed", "space"))
        return RandomSpec(
            _count("random.samples", section.get("samples")),
            _seed("random.seed", section.get("seed", 0)),
            _space("random.space", section.get("space")),
        )

    def optuna(self) -> OptunaSpec | None:
        """Return the search that Optuna leads, checked."""
        section = self.sections["optuna"]
        if not section:
            return None
        _check_section("optuna", section, ("trials", "seed", "sampler", "space"))
        sampler = section.get("sampler", "tpe")
        if sampler not in SAMPLERS:
            raise unknown("optuna.sampler", str(sampler), SAMPLERS)
        return OptunaSpec(
            _count("optuna.trials", section.get("trials")),
            _seed("optuna.seed", section.get("seed", 0)),
            sampler,
            _space("optuna.space", section.get("space")),
        )

    def written(self) -> dict[str, Any]:
        """Return the sections in the shape of a sweep file."""
        sections = {**self.sections, "list": self.listed, "zip": self.zipped}
        return {name: value for name, value in sections.items() if value} | {"grid": self.grid}

    def _spaces(self) -> list[dict[str, Any]]:
        return [section.get("space", {}) for section in self.sections.values()]

    def _entries(self) -> list[dict[str, Any]]:
        listed = self.listed if isinstance(self.listed, list) else []
        return [entry for entry in listed if isinstance(entry, dict)]

    def _checked_entries(self) -> list[dict[str, Any]]:
        if self.listed is None:
            return []
        if not isinstance(self.listed, list) or not self.listed:
            raise UserError(
                f"list must be a list of at least one mapping of keys to values, got "
                f"{self.listed!r}."
            )
        for index, entry in enumerate(self.listed):
            if not isinstance(entry, dict):
                raise UserError(f"list[{index}] must map keys to values, got {entry!r}.")
        return self.listed


def _mapping(name: str, value: Any, of: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} must map {of}, got {value!r}.")
    return value


def _space_section(name: str, value: Any) -> dict[str, Any]:
    section = _mapping(name, value, "its settings to values")
    if "space" in section:
        space = _mapping(f"{name}.space", section["space"], "keys to what they may be")
        section = {**section, "space": space}
    return section


def _check_section(name: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise _unknown_key(f"{name}.{key}", [f"{name}.{k}" for k in known], "the sweep")


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        missing = " (it has no default)" if value is None else ""
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}{missing}.")
    return value


def _seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be an integer, got {value!r}.")
    return value


def _space(where: str, space: Any) -> dict[str, Domain]:
    if not space:
        raise UserError(
            f"{where} must name at least one key, e.g. {where}.seed=[0,1,2], got {space!r}."
        )
    return {key: _domain(f"{where}.{key}", domain) for key, domain in space.items()}


def _domain(where: str, written: Any) -> Domain:
    """Return what a searched key may be.

    Raises:
        UserError: it is neither choices nor a range, or a range that holds nothing.
    """
    if isinstance(written, list) and written:
        return Choice(tuple(written))
    if not isinstance(written, dict):
        raise UserError(
            f"{where} must be a list of at least one choice, or a range {{low: ..., high: ...}}, "
            f"got {written!r}."
        )
    _check_section(where, written, _fields(Range))
    log, step = written.get("log", False), written.get("step")
    for key in ("low", "high", *(["step"] if step is not None else [])):
        value = written.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(typing.cast(float, value)):
            raise UserError(f"{where}.{key} must be a number, got {value!r}.")
    if not isinstance(log, bool):
        raise UserError(f"{where}.log must be true or false, got {log!r}.")
    domain = Range(written["low"], written["high"], log, step)
    if domain.low >= domain.high:
        raise UserError(f"{where}.low must be below high, got {domain.low} and {domain.high}.")
    if log and domain.low <= 0:
        raise UserError(
            f"{where}.low must be above 0 with log, got {domain.low}; raise it or drop log."
        )
    if step is None:
        return domain
    if log:
        raise UserError(f"{where} has both log and step {step}; drop one of them.")
    if not 0 < step <= domain.high - domain.low:
        raise UserError(
            f"{where}.step must be above 0 and at most high - low = "
            f"{domain.high - domain.low:g}, got {step}."
        )
    if domain.whole and not isinstance(step, int):
        raise UserError(
            f"{where}.step must be an integer between integers, got {step}; write low as "
            f"{domain.low}.0 for fractions."
        )
    return domain


def _names_in_use(
    config: Mapping[str, Any], search: _Search, pinned: Mapping[str, list[Any]]
) -> dict[str, list[str]]:
    """Return the attacks and defenses that any cell names; unknown ones are errors here.

    Names that an override replaced, on an axis or by themselves, count too: the file holds their
    keys.
    """
    names = {}
    for section, (schema, registry) in NAMED_SECTIONS.items():
        used = search.values(f"{section}.name", config) + pinned.get(f"{section}.name", [])
        used = [schema().name if name is _ABSENT else str(name) for name in used]
        for name in used:
            registry[name]
        names[section] = list(dict.fromkeys(used))
    return names


@lru_cache
def _fields(schema: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(schema))


def _section_keys(section: str, names: Mapping[str, list[str]]) -> list[str]:
    if section in FIXED_SECTIONS:
        return list(_fields(FIXED_SECTIONS[section]))
    schema, registry = NAMED_SECTIONS[section]
    keys = list(_fields(schema))
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
            raise _unknown_key(key, [*SCALARS, *sections, *SEARCHES], "the sweep file")
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"section '{key}' must be a mapping of keys to values, got {value!r}.")
        known = _section_keys(key, names)
        for inner in value:
            if inner not in known:
                raise _unknown_key(f"{key}.{inner}", [f"{key}.{k}" for k in known], "the sweep")


def _check_shared_paraphrase(config: Mapping[str, Any], search: _Search) -> None:
    """Refuse one paraphrase source for several paraphrase attacks: they would be the same one."""
    readers: dict[tuple[str, str], dict[str, None]] = {}
    sources = ("attack.column", "attack.model")
    for point in search.points(("attack.name", *sources)):
        name = point.get("attack.name", _lookup(config, "attack.name"))
        name = PoisonSpec().name if name is _ABSENT else str(name)
        if not hasattr(ATTACKS.load(name), "default_column"):
            continue
        for key in sources:
            value = point.get(key, _lookup(config, key))
            if value is not _ABSENT and value is not None:
                readers.setdefault((key, repr(value)), {})[name] = None
    for (key, value), names in readers.items():
        if len(names) > 1:
            raise UserError(
                f"{key} {value} would serve {' and '.join(names)} alike; launch them one by one, "
                f"e.g. attack.name={next(iter(names))} {key}=..., or pair names and sources by zip."
            )


def _swept(names: Mapping[str, list[str]]) -> list[str]:
    """Return the keys that may vary."""
    return ["seed"] + [
        f"{section}.{key}"
        for section in [*FIXED_SECTIONS, *NAMED_SECTIONS]
        if section not in NOT_SWEPT
        for key in _section_keys(section, names)
    ]


def _typed(section: str, schema: type, values: Mapping[str, Any]) -> Any:
    """Return a `schema` object of `values`, types checked and converted by OmegaConf.

    Cells have most sections in common, so objects are kept; they are shared, for reading only.
    """
    try:
        written = json.dumps(values)
    except (TypeError, ValueError):
        return _built(section, schema, values)
    found = _known(section, schema, written)
    if isinstance(found, UserError):
        raise UserError(str(found)) from found.__cause__
    return found


@lru_cache(maxsize=1 << 16)
def _known(section: str, schema: type, written: str) -> Any:
    try:
        return _built(section, schema, json.loads(written))
    except UserError as error:
        return error.with_traceback(None)


def _built(section: str, schema: type, values: Mapping[str, Any]) -> Any:
    if _is_exact(schema, values):
        return schema(**values)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), DictConfig(dict(values)))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{section}.{error.full_key}" if error.full_key else section
        raise UserError(f"{key}: {reason}.") from error


def _is_exact(schema: type, values: Mapping[str, Any]) -> bool:
    """Return whether OmegaConf, at 3 ms a section, would give every value back as it is."""
    hints = _hints(schema)
    return all(key in hints and _fits(hints[key], value) for key, value in values.items())


@lru_cache
def _hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {name: hints[name] for name in _fields(schema)}


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return type(value) is list and all(_fits(inner, one) for one in value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(inner, value) for inner in typing.get_args(hint))
    if hint is Any and type(value) in (int, float, bool):
        return True
    if type(value) is str and ("${" in value or "???" in value):
        return False  # OmegaConf's own syntax
    return type(value) is hint and hint in (int, float, bool, str, types.NoneType)


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
    built = _typed(section, part, given)
    return spec, {name: _copied(getattr(built, name)) for name in _fields(part)}, preset
