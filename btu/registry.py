"""Registries: attacks, defenses, rules, victims and data sets by name.

An entry names its target as ``module:attribute`` and is imported on first use, so that listing and
planning stay light. To add an attack or a defense: one file, one line in its registry, one test.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from btu.errors import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A registered part: its import path and a summary of one line."""

    target: str
    summary: str


class Registry(Mapping[str, Entry], Generic[T]):
    """Named entries of one kind, in registration order.

    Raises:
        UserError: an unknown name is looked up ("did you mean").
        ValueError: a name is registered twice.
    """

    def __init__(self, kind: str, entries: list[tuple[str, str, str]]) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        for name, target, summary in entries:
            self.register(name, target, summary)

    def register(self, name: str, target: str, summary: str) -> None:
        """Add an entry; `target` is ``"module:attribute"``."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered already; pick another name.")
        self._entries[name] = Entry(target, summary)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> T:
        """Import and return the target of `name`."""
        module, attribute = self[name].target.split(":")
        loaded: Any = getattr(importlib.import_module(module), attribute)
        return loaded  # type: ignore[no-any-return]
