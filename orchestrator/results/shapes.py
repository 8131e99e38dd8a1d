"""What the files of a sweep's folder and the results of cells contain.

Whoever may write to an output folder chose what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.store.places import is_key
from orchestrator.store.typed import Check, holds, is_amount, is_count, is_text


def _maps(check: Check) -> Check:
    """Return a check of an object: its names are texts, and its values pass `check`."""

    def passes(value: Any) -> bool:
        return isinstance(value, dict) and all(is_text(k) and check(v) for k, v in value.items())

    return passes


def _lists(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _object(checks: Mapping[str, Check], *required: str) -> Check:
    return lambda value: holds(value, checks, required)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not _is_bool(value) and abs(value) < 1e300


def _is_setting(value: Any) -> bool:
    """Return whether a value is one of a config: a scalar, or a list or an object of them."""
    if isinstance(value, dict | list):
        return _maps(_is_setting)(value) if isinstance(value, dict) else _lists(_is_setting)(value)
    return is_text(value) or value is None or isinstance(value, int | float)


_settings = _maps(_is_setting)
_NAMED = _object({"name": is_text}, "name")

# A note about an MLflow run.
NOTE: dict[str, Check] = dict.fromkeys(("record", "run_id"), is_text)
# A line of the journal.
EVENT: dict[str, Check] = {
    "time": is_amount,
    **dict.fromkeys(("event", "key", "stage", "launch", "outcome", "device"), is_text),
    **dict.fromkeys(("seconds", "memory", "gpu_memory"), is_amount),
}
_STAGE: dict[str, Check] = {
    "name": is_text,
    "inputs": _maps(is_key),
    "light": _lists(is_text),
    "kind": is_text,
    "units": is_count,
    "model": _is_bool,
    "victim": _maps(is_text),
}
_CELL: dict[str, Check] = {
    "key": is_key,
    "varied": _settings,
    # The previous version listed names by key.
    "stages": lambda stages: (
        _lists(is_key)(stages) or (_maps(is_text)(stages) and all(map(is_key, stages)))
    ),
    "model": is_key,
}
# A plan: which cells a launch has, and which it refused.
PLAN: dict[str, Check] = {
    "base": _settings,
    "keep": is_text,
    "stages": _maps(_object(_STAGE, "name")),
    "cells": _lists(_object(_CELL, "key", "varied", "stages")),
    "refused": _lists(_object({"varied": _settings, "reason": is_text}, "varied", "reason")),
}
# The result of a cell. A metric that is null is not defined.
RECORD: dict[str, Check] = {
    "config": lambda config: (
        _settings(config)
        and holds(config, {"attack": _NAMED, "defense": _NAMED}, ["attack", "defense"])
    ),
    "metrics": _maps(lambda value: value is None or _is_number(value)),
    "notes": _maps(_is_number),
    "tags": _maps(_is_setting),
    **dict.fromkeys(("started", "ended"), is_amount),
}
