"""Nested settings by dotted key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from btu.errors import UserError


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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


ABSENT: Any = object()


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or `ABSENT`."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return ABSENT
        node = node[part]
    return node


def copied(value: Any) -> Any:
    """Return plain data with mappings and lists of its own."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def zipped_points(axes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    rows = [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]
    return rows or [{}]


def fill_in(
    entries: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the entries with one set of keys, as far as the file has values for them."""
    keys = dict.fromkeys(itertools.chain(*entries))
    filled = [{key: entry.get(key, lookup(config, key)) for key in keys} for entry in entries]
    return [{k: v for k, v in entry.items() if v is not ABSENT} for entry in filled]
