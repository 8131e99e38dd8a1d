"""Nested settings: reading and writing them by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btu.errors import UserError


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key. A list is a value: its items get no keys."""
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
        UserError: a parent of the key has a value instead of keys.
    """
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(
                f"key '{key}' does not fit: '{parent}' has the value {child!r} and no keys; set "
                f"'{parent}' itself."
            )
        node = child
    node[last] = value


# What `lookup` returns for a key that is not set; None is a value.
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
    """Return a copy of plain data that shares no mapping and no list with it."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value
