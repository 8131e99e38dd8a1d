"""Settings checked against dataclasses: unknown keys, types, and "did you mean"."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btu.errors import UserError, did_you_mean
from orchestrator.sweep.interpolation import refuse_growth, refuse_resolvers
from orchestrator.sweep.sections import FIXED_SECTIONS, NAMED_SECTIONS, SCALARS
from orchestrator.sweep.tree import copied


def as_mapping(name: str, value: Any, of: str) -> dict[str, Any]:
    """Return a value that must be a mapping; {} for None.

    name: the key of the value, for errors.
    value: as the file writes it.
    of: what the mapping maps, for errors: "keys to lists of values".

    Raises:
        UserError: it is not a mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} must map {of}, got {value!r}.")
    return value


def check_section(name: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a `UserError` if a section has a key that is not `known`."""
    for key in section:
        if key not in known:
            raise unknown_key(f"{name}.{key}", [f"{name}.{k}" for k in known], "the sweep")


def as_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1; raise a `UserError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        missing = " (it has no default)" if value is None else ""
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}{missing}.")
    return value


def as_seed(name: str, value: Any) -> int:
    """Return an integer; raise a `UserError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be an integer, got {value!r}.")
    return value


@lru_cache
def field_names(schema: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields, which are its config keys."""
    return tuple(f.name for f in dataclasses.fields(schema))


def section_keys(section: str, names: Mapping[str, list[str]]) -> list[str]:
    """Return the keys of a section.

    section: its name in the sweep file.
    names: the attacks and the defenses that cells use, by section.
    """
    if section in FIXED_SECTIONS:
        return list(field_names(FIXED_SECTIONS[section]))
    schema, registry = NAMED_SECTIONS[section]
    keys = list(field_names(schema))
    for name in names[section]:
        part = registry.load(name)
        keys += [*field_names(part), *(["preset"] if hasattr(part, "PRESETS") else [])]
    return list(dict.fromkeys(keys))


def unknown_key(key: str, known: Iterable[str], where: str) -> UserError:
    """Return the error for an unknown key, which suggests the most similar known one."""
    known = list(known)
    return UserError(
        f"unknown key '{key}' in {where}{did_you_mean(key, known)} (known: {', '.join(known)})"
    )


def check_keys(
    config: Mapping[str, Any], names: Mapping[str, list[str]], searches: Sequence[str]
) -> None:
    """Check the keys of a sweep file.

    config: the file, without its search sections.
    names: the attacks and the defenses that cells use, by section.
    searches: the names of the search sections, to suggest one of them for an unknown key.

    Raises:
        UserError: a key is unknown, or a section is not a mapping.
    """
    sections = [*FIXED_SECTIONS, *NAMED_SECTIONS]
    for key, value in config.items():
        if key in SCALARS:
            continue
        if key not in sections:
            raise unknown_key(key, [*SCALARS, *sections, *searches], "the sweep file")
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"section '{key}' must be a mapping of keys to values, got {value!r}.")
        known = section_keys(key, names)
        for inner in value:
            if inner not in known:
                raise unknown_key(f"{key}.{inner}", [f"{key}.{k}" for k in known], "the sweep")


def build_section(section: str, schema: type, values: Mapping[str, Any]) -> Any:
    """Return a `schema` object with `values`, their types checked and converted by OmegaConf.

    Equal sections give the same object, because cells have most sections in common. Callers must
    not change it.

    section: the name of the section, for errors.
    schema: a dataclass.
    values: its fields, as the file writes them.

    Raises:
        UserError: a value has the wrong type, or breaks a rule of the dataclass.
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
    return schema(**values) if _is_exact(schema, values) else _converted(section, schema, values)


def _converted(section: str, schema: type, values: Mapping[str, Any]) -> Any:
    # A plan of another user is read without its sweep file, so that this is the only check.
    refuse_resolvers(values, section)
    refuse_growth(values)
    for name, hint in _hints(schema).items():
        if name in values:
            _refuse_mapping(f"{section}.{name}", hint, values[name])
        if name in values and name not in _numbers(schema):
            _refuse_untexted(f"{section}.{name}", hint, values[name])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), DictConfig(dict(values)))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{section}.{error.full_key}" if error.full_key else section
        raise UserError(f"{key}: {reason}.") from error


@cache
def _numbers(schema: type) -> frozenset[str]:
    """Return the texts of a section that may be written as a number (metadata ``number``)."""
    marked = [one.name for one in dataclasses.fields(schema) if one.metadata.get("number")]
    return frozenset(marked)


def _refuse_mapping(key: str, hint: Any, value: Any) -> None:
    """Raise a `UserError` for a mapping in place of a list, of which OmegaConf has no good word."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(value, Mapping) and any(typing.get_origin(kind) is list for kind in kinds):
        raise UserError(f"{key} must be a list, such as [a, b], got {dict(value)!r}.")


def _refuse_untexted(key: str, hint: Any, value: Any) -> None:
    """Check that no text was written as what YAML reads as a number or a truth value.

    OmegaConf would turn it into a text, but another one: no into 'False', 007 into '7'.

    key: of the value.
    hint: the type of its field.
    value: as the file or an override has it.

    Raises:
        UserError: it has to be quoted.
    """
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    listed = [kind for kind in kinds if typing.get_origin(kind) is list]
    if listed and isinstance(value, list):
        for index, one in enumerate(value):
            _refuse_untexted(f"{key}[{index}]", typing.get_args(listed[0])[0], one)
        return
    if str not in kinds or type(value) in kinds or type(value) not in (*_WRITTEN, int, float):
        return
    what = _WRITTEN.get(type(value), lambda number: f"the number {number!r}")(value)
    raise UserError(
        f"{key} must be a text, and YAML reads what is written as {what}; quote it as it should "
        f'stand: "..." in the file, KEY=\'"..."\' on the command line.'
    )


# How values that are no texts may have been written.
_WRITTEN: dict[type, Callable[[Any], str]] = {
    bool: lambda on: f"{on} (so it does {'yes, on and true' if on else 'no, off and false'})",
    types.NoneType: lambda _: "nothing (so it does null, ~ and an empty place)",
}


# OmegaConf takes about 3 ms for a section. Cells of a grid have few different sections, but 10,000
# random draws of a threshold have 10,000: half a minute. To measure it:
# python -m timeit -p -n 100 -s 'from btu.defenses.token_unlearning import TokenUnlearning as T' \
#     -s 'from orchestrator.sweep.typed import _converted' '_converted("defense", T, {"alpha": .1})'
def _is_exact(schema: type, values: Mapping[str, Any]) -> bool:
    """Return whether OmegaConf would leave every value as it is, so that it can be skipped."""
    hints = _hints(schema)
    return all(key in hints and _fits(hints[key], value) for key, value in values.items())


@lru_cache
def _hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    # OmegaConf knows no union with a list: such a field is declared as Any, and marked.
    marked = {
        f.name: str | list[str] for f in dataclasses.fields(schema) if f.metadata.get("texts")
    }
    return {name: marked.get(name, hints[name]) for name in field_names(schema)}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return type(value) is list and all(_fits(inner, one) for one in value)
    if _is_union(hint):
        return any(_fits(inner, value) for inner in typing.get_args(hint))
    if hint is Any and type(value) in (int, float, bool):
        return True
    if type(value) is str and ("${" in value or "???" in value):
        return False  # OmegaConf's own syntax
    return type(value) is hint and hint in (int, float, bool, str, types.NoneType)


def named_section(
    section: str, values: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], str | None]:
    """Return the settings of a section that names an attack or a defense, in three parts.

    section: ``attack`` or ``defense``.
    values: the section of a cell. Keys of other attacks or defenses are left out.

    Returns:
        The section's own settings, all parameters of the attack or defense, and the name of the
        preset; None if the attack or defense has no presets.

    Raises:
        UserError: a name is unknown, or a value has the wrong type or breaks a rule.
    """
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
