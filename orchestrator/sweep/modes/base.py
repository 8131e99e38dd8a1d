"""What a search mode is.

To add one: a class in a file of its own beside this one, and its line in
`orchestrator.sweep.search.MODES`. A mode that suggests cells while a sweep runs also needs its
`orchestrator.run.study.Study`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from orchestrator.sweep.modes.written import Section


class SearchMode(ABC):
    """A way to vary keys, read from a section of the sweep file. Modes are frozen dataclasses.

    name: the key of the section.
    where: what errors call the place of the varied keys.
    form: how the section is written.
    excluded: the sections that a sweep with this one cannot have.
    """

    name: ClassVar[str]
    where: ClassVar[str]
    form: ClassVar[type[Section]]
    excluded: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def read(cls, written: Any, base: Mapping[str, Any]) -> Self:
        """Return the mode of a section.

        written: the section in the form of a sweep file.
        base: the settings of all cells.

        Raises:
            UserError: a value of the section has the wrong type, or breaks a rule.
        """

    @property
    @abstractmethod
    def axes(self) -> tuple[str, ...]:
        """The keys that cells vary, in the order of their coordinates."""

    @abstractmethod
    def possible(self, keys: Collection[str]) -> list[dict[str, Any]]:
        """Return the combinations of values that cells may have for those of `keys` they vary."""

    @abstractmethod
    def describe(self) -> str:
        """Return in words what is searched."""

    @abstractmethod
    def open_axes(self) -> dict[str, list[Any]]:
        """Return what has to be pinned to leave one point: values, or examples, by key."""


@dataclass(frozen=True)
class PlannedMode(SearchMode):
    """A mode whose points are known before the sweep runs."""

    @abstractmethod
    def points(self) -> list[dict[str, Any]]:
        """Return the coordinates that this mode gives to cells, one mapping per point."""

    @abstractmethod
    def count(self) -> int:
        """Return how many points there are, without making them."""

    @abstractmethod
    def sizes(self) -> str:
        """Return in words what that number is made of."""

    def config(self) -> Any:
        """Return all that determines the points, as plain data."""
        return dataclasses.asdict(self)

    def possible(self, keys: Collection[str]) -> list[dict[str, Any]]:
        if not set(keys) & set(self.axes):
            return [{}]
        return [{k: v for k, v in point.items() if k in keys} for point in self.points()]


@dataclass(frozen=True)
class SequentialMode(SearchMode):
    """A mode that suggests points while the sweep runs, from the results of earlier ones.

    A suggestion is measured on every combination of the points of the other modes. A sweep has one
    sequential mode at most.

    title: what messages call the sampler.
    trials: how many suggestions there are at most.
    """

    title: ClassVar[str]

    trials: int
