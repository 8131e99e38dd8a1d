"""A sweep file -> validated, frozen trial specs.

OmegaConf parses and types; the schema is the library's own dataclasses, so a hyperparameter that
an attack or a defense gains is a config key from that moment on. Imports no torch, ray or mlflow.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btu.attacks.poisoning import ATTACKS, PoisonSpec
from btu.data.spec import DataSpec
from btu.errors import UserError, unknown
from btu.victims import VICTIMS, VictimSpec
from orchestrator.sweep.sections import (
    FIXED_SECTIONS,
    NAMED_SECTIONS,
    NOT_IN_CELLS,
    NOT_SWEPT,
    ResourceSpec,
    StoreSpec,
    TrackingSpec,
    TrialSpec,
)
from orchestrator.sweep.space import Search
from orchestrator.sweep.sweep import CONTROLS, Sweep
from orchestrator.sweep.tree import ABSENT, assign, fill_in, lookup
from orchestrator.sweep.typed import build_section, check_keys, named_section, section_keys

if TYPE_CHECKING:
    from orchestrator.sweep.space import OptunaSpec


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
    search = Search(config)
    pinned: dict[str, list[Any]] = {}
    for key, value in _parse_overrides(overrides):
        if not search.override(key, value):
            pinned.setdefault(key, []).extend([*search.pin(key), lookup(config, key)])
            assign(config, key, value)
    search.finish()
    config.setdefault("name", Path(path).stem)
    names = _names_in_use(config, search, pinned)
    check_keys(config, names)
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
    resources = build_section("resources", ResourceSpec, config.get("resources") or {})
    tracking = build_section("tracking", TrackingSpec, config.pop("tracking", None) or {})
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
        build_section("store", StoreSpec, keeping),
        search.grid,
        search.zipped,
        fill_in(search.listed or [], config),
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
        name: build_section(name, schema, config.get(name) or {})
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
    poison, attack_params, _ = named_section("attack", config.get("attack") or {})
    model = attack_params.get("model")
    if model is not None and Path(model).expanduser().is_dir():
        attack_params["model"] = str(Path(model).expanduser().resolve())
    defense, defense_params, preset = named_section("defense", config.get("defense") or {})
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


def _controls(config: dict[str, Any], optuna: OptunaSpec | None) -> tuple[str, ...]:
    """Take the key `controls` out of the file; return the controls that its cells get.

    Raises:
        UserError: one is unknown, or the sweep cannot have any.
    """
    written = config.pop("controls", ABSENT)
    if written is ABSENT:
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


def _names_in_use(
    config: Mapping[str, Any], search: Search, pinned: Mapping[str, list[Any]]
) -> dict[str, list[str]]:
    """Return the attacks and defenses that any cell names; unknown ones are errors here.

    Names that an override replaced, on an axis or by themselves, count too: the file holds their
    keys.
    """
    names = {}
    for section, (schema, registry) in NAMED_SECTIONS.items():
        used = search.values(f"{section}.name", config) + pinned.get(f"{section}.name", [])
        used = [schema().name if name is ABSENT else str(name) for name in used]
        for name in used:
            registry[name]
        names[section] = list(dict.fromkeys(used))
    return names


def _check_shared_paraphrase(config: Mapping[str, Any], search: Search) -> None:
    """Refuse one paraphrase source for several paraphrase attacks: they would be the same one."""
    readers: dict[tuple[str, str], dict[str, None]] = {}
    sources = ("attack.column", "attack.model")
    for point in search.points(("attack.name", *sources)):
        name = point.get("attack.name", lookup(config, "attack.name"))
        name = PoisonSpec().name if name is ABSENT else str(name)
        if not hasattr(ATTACKS.load(name), "default_column"):
            continue
        for key in sources:
            value = point.get(key, lookup(config, key))
            if value is not ABSENT and value is not None:
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
        for key in section_keys(section, names)
    ]
