"""Errors that a user can cause and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Characters of a name, and names, that a message shows: names may come from data.
LONGEST, MOST_SHOWN = 80, 100


class UserError(ValueError):
    """A mistake in a config, a file or a request.

    The message names the value, the rule that it breaks and the fix. The command line prints it
    without a traceback and exits with 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{_one_line(close[0])}'?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not among `known`."""
    options = sorted(str(k) for k in known)
    shown = [_one_line(option) for option in options[:MOST_SHOWN]]
    if len(options) > MOST_SHOWN:
        shown.append(f"and {len(options) - MOST_SHOWN} more")
    return UserError(
        f"unknown {kind} '{_one_line(name)}'{did_you_mean(name, options)} "
        f"(known: {', '.join(shown) or 'none'})"
    )


def _one_line(name: str) -> str:
    cut = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    return "".join(repr(c)[1:-1] if c in "\r\n\t\v\f" else c for c in cut)
