"""Labels of nodes, as `resources.labels` selects them: Ray's label selectors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from btu.errors import UserError

# Ray takes names and values as Kubernetes does.
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:{_WORD}/)?{_WORD}")
_SELECTOR = re.compile(rf"(!?)(?:in\(({_WORD}(?:, ?{_WORD})*)\)|({_WORD}))")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise a `UserError` unless each label has a name and a selector that Ray takes."""
    for key, selector in labels.items():
        if _KEY.fullmatch(key) is None:
            raise UserError(
                f"resources.labels has {key!r}, which is no name of a label; write NAME or "
                "PREFIX/NAME, such as ray.io/accelerator-type."
            )
        if _SELECTOR.fullmatch(selector) is None:
            raise UserError(
                f"resources.labels.{key} must be VALUE, !VALUE, in(A, B) or !in(A, B), got "
                f"{selector!r}."
            )


def selects(selector: str, value: str | None) -> bool:
    """Return whether a selector that `check_labels` accepts takes a node.

    value: of the node's label; None if it has none. A selector with ``!`` takes such a node.
    """
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        return False
    negated, several, one = found.groups()
    wanted = [word.strip() for word in several.split(",")] if several else [one]
    return (value in wanted) != bool(negated)
