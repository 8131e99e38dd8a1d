"""Errors that a user can cause and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or a request.

    The message names the value, the rule that it breaks and the fix. The command line prints it
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
