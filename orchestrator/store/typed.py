"""JSON from a store, with types: whoever may write to the store chose what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def parse(data: str | bytes) -> Any:
    """Return what JSON contains. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(data: str | bytes) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError if it is none."""
    found = parse(data)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def is_text(value: Any) -> bool:
    """Return whether a value is a string that can be written to a file or a terminal."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()  # not so for half of a surrogate pair, which JSON allows
    except UnicodeEncodeError:
        return False
    return True


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 0 that a file size can have."""
    return type(value) is int and 0 <= value < 2**63


def is_amount(value: Any) -> bool:
    """Return whether a value is a number that a float holds to the unit; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def holds(facts: Any, checks: Mapping[str, Check], required: Iterable[str] = ()) -> bool:
    """Return whether `facts` is an object whose known values have their types.

    facts: from `parse`.
    checks: by name; other names may have any value.
    required: names that must be there.
    """
    return (
        isinstance(facts, dict)
        and all(name in facts for name in required)
        and all(checks[name](value) for name, value in facts.items() if name in checks)
    )
