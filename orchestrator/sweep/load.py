"""A sweep file -> a `Sweep`, and a cell's settings -> a frozen `TrialSpec`.

OmegaConf parses the file and converts values. The schema is the library's own dataclasses, so every
field of an attack or a defense is a config key. Imports no torch, ray or mlflow.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from btu.attacks.poisoning import ATTACKS, PoisonSpec
from btu.data.spec import DataSpec
from btu.errors import UserError, unknown
from btu.paths import written_path
from btu.redaction import shown_url
from btu.victims import VICTIMS, VictimSpec
from orchestrator.sweep.interpolation import refuse_growth, refuse_resolvers, unreadable
from orchestrator.sweep.modes.base import SearchMode, SequentialMode
from orchestrator.sweep.output import (
    DEFAULT_OUTPUT,
    MOST_NAME_BYTES,
    output_location,
    taken_name,
)
from orchestrator.sweep.search import (
    SEARCHES,
    SearchSections,
    check_axes_known,
    possible_points,
    refuse_large,
)
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
from orchestrator.sweep.sweep import CONTROLS, Sweep
from orchestrator.sweep.tree import ABSENT, assign, lookup
from orchestrator.sweep.trust import TRACKING_VARIABLE, refuse_code
from orchestrator.sweep.typed import build_section, check_keys, named_section, section_keys


def load_sweep(path: str | Path, overrides: Iterable[str] = (), *, large: bool = False) -> Sweep:
    """Parse a sweep file and check every key in it.

    path: of the sweep file.
    overrides: ``key=value`` with dotted keys. An axis is ``grid.<key>=[...]``,
        ``zip.<key>=[...]`` or ``random.space.<key>=...``; a setting of a search is
        ``random.samples=50`` or ``optuna.trials=10``; the list is given as a whole,
        ``list=[{...}]``. Overriding a key that a section varies replaces the axis by that value.
    large: whether the sweep may have more than `MOST_CELLS` cells.

    Raises:
        UserError: the file is missing or not a YAML mapping; a key, attack, defense or preset is
            unknown ("did you mean"); a value has the wrong type; a search is malformed; there are
            too many cells; the file alone lets a victim run code.
    """
    config = _read(Path(path))
    search = SearchSections(config)
    pinned: dict[str, list[Any]] = {}
    given: set[str] = set()
    for key, value in _parse_overrides(overrides):
        given.update(_keys_of(key, value))
        if not search.override(key, value):
            pinned.setdefault(key, []).extend([*search.pin(key), lookup(config, key)])
            assign(config, key, value)
    config.setdefault("name", Path(path).stem)
    modes = search.modes(config)
    if not large:
        refuse_large(modes)
    names = _names_in_use(config, modes, pinned)
    check_keys(config, names, SEARCHES)
    check_axes_known(modes, _swept(names))
    _check_shared_sources(config, modes, names["attack"])
    refuse_code(config, modes, given)
    name, written = _name(config.pop("name")), config.pop("output", DEFAULT_OUTPUT)
    output = _output(written)
    tracking = build_section("tracking", TrackingSpec, config.pop("tracking", None) or {})
    tracking = _tracked(tracking, given)
    keeping = config.pop("store", None) or {}
    shown = {"name": name, "output": shown_url(written), **config}
    if keeping:
        shown["store"] = keeping
    controls = config.pop("controls", ABSENT)
    sequential = next((mode for mode in modes if isinstance(mode, SequentialMode)), None)
    return Sweep(
        name=name,
        output=output,
        resources=build_section("resources", ResourceSpec, config.get("resources") or {}),
        tracking=tracking,
        store=build_section("store", StoreSpec, keeping),
        modes=modes,
        controls=_controls(controls, sequential),
        base=config,
        given=frozenset(given),
        text=yaml.safe_dump(shown | search.written(), sort_keys=False),
    )


def resolve(config: Mapping[str, Any]) -> TrialSpec:
    """Return the spec of a cell.

    Paths become absolute, because workers start in folders of their own. Keys of attacks and
    defenses that only other cells use are left out, so that one file can set the parameters of all.

    config: the settings of the cell, nested by section (`Cell.config`).

    Raises:
        UserError: a value has the wrong type, or breaks a rule.
    """
    sections = {
        name: build_section(name, schema, config.get(name) or {})
        for name, schema in FIXED_SECTIONS.items()
        if name not in NOT_IN_CELLS
    }
    data: DataSpec = sections["data"]
    if data.path is not None:
        data = dataclasses.replace(data, path=str(written_path("data.path", data.path).resolve()))
    victim: VictimSpec = sections["victim"]
    if victim.name not in VICTIMS:
        victim = dataclasses.replace(victim, name=_as_folder("victim.name", victim.name))
    poison, attack_params, attack_preset = named_section("attack", config.get("attack") or {})
    defense, defense_params, preset = named_section("defense", config.get("defense") or {})
    seed = config.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed must be an integer, got {seed!r}.")
    stealth = config.get("stealth", False)
    if not isinstance(stealth, bool):
        raise UserError(f"stealth must be true or false, got {stealth!r}.")
    return TrialSpec(
        data=data,
        victim=victim,
        poison=poison,
        attack_preset=attack_preset,
        attack_params=_with_folders("attack", poison.name, attack_params),
        defense=defense,
        preset=preset,
        defense_params=_with_folders("defense", defense.name, defense_params),
        train=sections["train"],
        tuning=sections["tuning"],
        seed=seed,
        resources=sections["resources"],
        stealth=stealth,
    )


def _with_folders(section: str, name: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of an attack or a defense with absolute folders.

    A field may name a folder if the class marks it with the metadata ``path``.
    """
    part = NAMED_SECTIONS[section][1].load(name)
    marked = [field.name for field in dataclasses.fields(part) if field.metadata.get("path")]
    return params | {key: _as_folder(f"{section}.{key}", params[key]) for key in marked}


def _as_folder(named: str, value: Any) -> Any:
    """Return the absolute path of a folder, and any other value, e.g. a hub name, unchanged.

    named: the key of the value.
    """
    if isinstance(value, str):
        folder = written_path(named, value)
        # Unlike Path.is_dir, it is false for a name that is too long for a folder.
        if os.path.isdir(folder):
            return str(folder.resolve())
    return value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"sweep file {path} does not exist; see sweeps/ for ready ones.")
    try:
        # OmegaConf's loader reads 2e-5 as a float, where plain YAML 1.1 gives a string.
        read = OmegaConf.load(path)
        # Before anything is resolved, and after, for what resolving has put together.
        written = OmegaConf.to_container(read)
        refuse_resolvers(written)
        refuse_growth(written)
        loaded = OmegaConf.to_container(read, resolve=True)
        refuse_resolvers(loaded)
    except GrammarParseError as error:
        raise unreadable(str(error.full_key), error) from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"sweep file {path} is not valid YAML: {error}") from error
    except RecursionError:
        raise UserError(
            f"sweep file {path} is nested too deeply; a sweep file needs five levels at most."
        ) from None
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
        except GrammarParseError as error:
            raise unreadable(f"override {key.strip()}", error) from error
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"override '{text}' has no valid value: {error}") from error
        container = OmegaConf.to_container(parsed)
        assert isinstance(container, dict)
        refuse_resolvers(container["value"], f"override {key.strip()}")
        yield key.strip(), container["value"]


def _keys_of(key: str, value: Any) -> Iterator[str]:
    """Yield the keys that an override sets: its own, those in its value, those of axes."""
    for mode in SEARCHES:
        for section in (f"{mode}.space", mode):
            if key == section or key.startswith(f"{section}."):
                key = key.removeprefix(section).lstrip(".")
                break
    if key:
        yield key
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            for inner, below in entry.items():
                yield from _keys_of(f"{key}.{inner}" if key else str(inner), below)


def _name(written: Any) -> str:
    # It names a folder and an experiment, and is part of the commands that are printed.
    if not isinstance(written, str) or not re.fullmatch(r"\w[\w.+-]*", written):
        raise UserError(
            "name must be a plain word that can name a folder: letters, digits, '_', '-', '+' and "
            f"'.', the first a letter, digit or '_'; got {written!r}. Remove the key to use the "
            "name of the file."
        )
    if (what := taken_name(written)) is not None:
        raise UserError(
            f"name '{written}' is taken: under that name the output folder has {what}; use another "
            "name."
        )
    if (size := len(written.encode())) > MOST_NAME_BYTES:
        raise UserError(
            f"name '{written[:40]}...' has {size} bytes; a folder of that name needs at most "
            f"{MOST_NAME_BYTES}. Shorten it."
        )
    return written


def _output(written: Any) -> str:
    if not isinstance(written, str) or not written.strip():
        raise UserError(f"output must be a folder or a URL, got {written!r}.")
    location = output_location(written)
    if "://" in written and "://" not in location:
        raise UserError(f"output {shown_url(written)!r} names no folder; give the URL of one.")
    return location


def _tracked(tracking: TrackingSpec, given: set[str]) -> TrackingSpec:
    """Return where runs go: to the environment's server where the sweep names none.

    given: the keys that the user has set; gets the key, and the variable, if that is so.
    """
    uri = os.environ.get(TRACKING_VARIABLE)
    if tracking.uri is not None or not uri:
        return tracking
    given.update(("tracking.uri", TRACKING_VARIABLE))
    return TrackingSpec(uri)


def _controls(written: Any, sequential: SequentialMode | None) -> tuple[str, ...]:
    """Return the controls that every cell gets.

    written: the key ``controls`` of the file, or `ABSENT`.
    sequential: the mode that suggests the cells, if there is one.

    Raises:
        UserError: a control is unknown, or the sweep cannot have any.
    """
    if written is ABSENT:
        # Suggestions are compared with each other.
        return tuple(CONTROLS) if sequential is None else ()
    if written is None or written is False:
        return ()
    if not isinstance(written, list):
        raise UserError(
            f"controls must be a list of {' and '.join(CONTROLS)}, or false for none, got "
            f"{written!r}."
        )
    for name in written:
        if name not in list(CONTROLS):  # a list, because an item may be anything, a mapping too
            raise unknown("control", str(name), CONTROLS)
    if written and sequential is not None:
        raise UserError(
            f"controls {', '.join(written)}: cells that {sequential.title} suggests get no "
            f"controls; remove the key, and launch a second sweep without {sequential.name} for "
            "them."
        )
    return tuple(dict.fromkeys(written))


def _names_in_use(
    config: Mapping[str, Any], modes: Sequence[SearchMode], pinned: Mapping[str, list[Any]]
) -> dict[str, list[str]]:
    """Return the attacks and the defenses that cells name, by section.

    A name that an override replaced counts too, because the file may set keys of its own.

    config: the settings of all cells.
    modes: the searches of the sweep.
    pinned: the values that overrides replaced, by key.

    Raises:
        UserError: a name is unknown.
    """
    names = {}
    for section, (schema, registry) in NAMED_SECTIONS.items():
        key = f"{section}.name"
        used = [point.get(key, lookup(config, key)) for point in possible_points(modes, (key,))]
        used += pinned.get(key, [])
        used = [schema().name if name is ABSENT else str(name) for name in used]
        for name in used:
            registry[name]
        names[section] = list(dict.fromkeys(used))
    return names


def _check_shared_sources(
    config: Mapping[str, Any], modes: Sequence[SearchMode], attacks: Iterable[str]
) -> None:
    """Check that no two attacks read their texts from one source: they would be the same attack.

    An attack class names the keys of its sources (`sources`).

    config: the settings of all cells.
    modes: the searches of the sweep.
    attacks: the names of the attacks that cells use.

    Raises:
        UserError: one source would serve several attacks.
    """
    sources = {
        name: [f"attack.{key}" for key in getattr(ATTACKS.load(name), "sources", ())]
        for name in attacks
    }
    keys = {key for own in sources.values() for key in own}
    readers: dict[tuple[str, str], dict[str, None]] = {}
    for point in possible_points(modes, {"attack.name", *keys}):
        name = point.get("attack.name", lookup(config, "attack.name"))
        name = PoisonSpec().name if name is ABSENT else str(name)
        for key in sources[name]:
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
