"""Settings checked against dataclasses: unknown keys, types, and what is suggested instead."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btu.errors import UserError, did_you_mean
from orchestrator.sweep.sections import FIXED_SECTIONS, NAMED_SECTIONS, SCALARS, SEARCHES
from orchestrator.sweep.tree import copied


def as_mapping(name: str, value: Any, of: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} must map {of}, got {value!r}.")
    return value


def check_section(name: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise unknown_key(f"{name}.{key}", [f"{name}.{k}" for k in known], "the sweep")


def as_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        missing = " (it has no default)" if value is None else ""
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}{missing}.")
    return value


def as_seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be an integer, got {value!r}.")
    return value


@lru_cache
def field_names(schema: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(schema))


def section_keys(section: str, names: Mapping[str, list[str]]) -> list[str]:
    if section in FIXED_SECTIONS:
        return list(field_names(FIXED_SECTIONS[section]))
    schema, registry = NAMED_SECTIONS[section]
    keys = list(field_names(schema))
    for name in names[section]:
        part = registry.load(name)
        keys += [*field_names(part), *(["preset"] if hasattr(part, "PRESETS") else [])]
    return list(dict.fromkeys(keys))


def unknown_key(key: str, known: Iterable[str], where: str) -> UserError:
    known = list(known)
    return UserError(
        f"unknown key '{key}' in {where}{did_you_mean(key, known)} (known: {', '.join(known)})"
    )


def check_keys(config: Mapping[str, Any], names: Mapping[str, list[str]]) -> None:
    sections = [*FIXED_SECTIONS, *NAMED_SECTIONS]
    for key, value in config.items():
        if key in SCALARS:
            continue
        if key not in sections:
            raise unknown_key(key, [*SCALARS, *sections, *SEARCHES], "the sweep file")
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"section '{key}' must be a mapping of keys to values, got {value!r}.")
        known = section_keys(key, names)
        for inner in value:
            if inner not in known:
                raise unknown_key(f"{key}.{inner}", [f"{key}.{k}" for k in known], "the sweep")


def build_section(section: str, schema: type, values: Mapping[str, Any]) -> Any:
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
    return {name: hints[name] for name in field_names(schema)}


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


def named_section(
    section: str, values: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], str | None]:
    """Return the section's own part, the named part's parameters, and the preset's name."""
    schema, registry = NAMED_SECTIONS[section]
    own = field_names(schema)
    spec = build_section(section, schema, {k: v for k, v in values.items() if k in own})
    part = registry.load(spec.name)
    given = {k: v for k, v in values.items() if k in field_names(part)}
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
    built = build_section(section, part, given)
    return spec, {name: copied(getattr(built, name)) for name in field_names(part)}, preset
