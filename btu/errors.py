"""Errors that a user can cause and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or a request.

    The message names the value, the rule it breaks and what to do. The command line prints it
    without a traceback and exits with 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not among `known`."""
    options = sorted(str(k) for k in known)
    known_names = ", ".join(options) or "none"
    return UserError(f"unknown {kind} '{name}'{did_you_mean(name, options)} (known: {known_names})")


def check_fraction(name: str, value: float, *, open_low: bool = False) -> float:
    """Return `value` as a float in [0, 1], or (0, 1] with `open_low`.

    Raises:
        UserError: `value` is no number or lies outside.
    """
    interval = "(0, 1]" if open_low else "[0, 1]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number in {interval}, got {value!r}.")
    if not 0 <= value <= 1 or (open_low and value == 0):
        raise UserError(f"{name} must be in {interval}, got {value}.")
    return float(value)
