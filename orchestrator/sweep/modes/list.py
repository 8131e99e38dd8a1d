"""``list: [{KEY: VALUE, ...}, ...]``: exactly these points."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from btu.errors import UserError
from orchestrator.sweep.modes.base import PlannedMode
from orchestrator.sweep.modes.written import EntriesSection, Section
from orchestrator.sweep.tree import ABSENT, lookup


@dataclass(frozen=True)
class ListMode(PlannedMode):
    """Points that the file lists one by one.

    entries: the points. An entry that lacks a key of another entry has the file's value of that
        key, if the file sets one.
    """

    name: ClassVar[str] = "list"
    where: ClassVar[str] = "the list"
    form: ClassVar[type[Section]] = EntriesSection

    entries: list[dict[str, Any]]

    @classmethod
    def read(cls, written: Any, base: Mapping[str, Any]) -> Self:
        if not isinstance(written, list) or not written:
            raise UserError(
                f"list must be a list of at least one mapping of keys to values, got {written!r}."
            )
        for index, entry in enumerate(written):
            if not isinstance(entry, dict):
                raise UserError(f"list[{index}] must map keys to values, got {entry!r}.")
        keys = dict.fromkeys(itertools.chain(*written))
        filled = [{key: entry.get(key, lookup(base, key)) for key in keys} for entry in written]
        return cls([{k: v for k, v in entry.items() if v is not ABSENT} for entry in filled])

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(itertools.chain(*self.entries)))

    def count(self) -> int:
        return len(self.entries)

    def sizes(self) -> str:
        return self.describe()

    def points(self) -> list[dict[str, Any]]:
        return self.entries

    def config(self) -> list[dict[str, Any]]:
        return self.entries

    def describe(self) -> str:
        return f"list of {len(self.entries)}"

    def open_axes(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        if len(self.entries) > 1:
            for key, value in itertools.chain(*(entry.items() for entry in self.entries)):
                values = found.setdefault(key, [])
                if value not in values:
                    values.append(value)
        return found
