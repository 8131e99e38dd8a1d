"""``grid`` and ``zip``: keys, each with a list of values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from btu.errors import UserError
from orchestrator.sweep.modes.base import PlannedMode
from orchestrator.sweep.modes.written import AxesSection, Section


@dataclass(frozen=True)
class AxesMode(PlannedMode):
    """Points built from one list of values per key.

    values: the values of each key.
    """

    form: ClassVar[type[Section]] = AxesSection

    values: Mapping[str, list[Any]]

    @classmethod
    def read(cls, written: Any, base: Mapping[str, Any]) -> Self:
        for key, values in written.items():
            if not isinstance(values, list) or not values:
                raise UserError(
                    f"{cls.name}.{key} must be a list of at least one value, got {values!r}."
                )
        return cls(written)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.values)

    def sizes(self) -> str:
        sizes = ", ".join(f"{key} {len(values)}" for key, values in self.values.items())
        return f"{self.name} of {sizes}"

    def config(self) -> dict[str, list[Any]]:
        return dict(self.values)

    def open_axes(self) -> dict[str, list[Any]]:
        return {key: list(values) for key, values in self.values.items() if len(values) > 1}


@dataclass(frozen=True)
class GridMode(AxesMode):
    """Every combination of the values; the last key varies fastest."""

    name: ClassVar[str] = "grid"
    where: ClassVar[str] = "the grid"

    def count(self) -> int:
        return math.prod(map(len, self.values.values()))

    def points(self) -> list[dict[str, Any]]:
        combined = itertools.product(*self.values.values())
        return [dict(zip(self.values, point, strict=True)) for point in combined]

    def possible(self, keys: Collection[str]) -> list[dict[str, Any]]:
        # Restricted first, because the product of all keys may be large.
        return GridMode({k: v for k, v in self.values.items() if k in keys}).points()

    def describe(self) -> str:
        return f"grid {' x '.join(self.values)}"


@dataclass(frozen=True)
class ZipMode(AxesMode):
    """The first values of all keys, then the second ones, and so on."""

    name: ClassVar[str] = "zip"
    where: ClassVar[str] = "the zip"

    def count(self) -> int:
        return min(map(len, self.values.values()))

    @classmethod
    def read(cls, written: Any, base: Mapping[str, Any]) -> Self:
        mode = super().read(written, base)
        if len({len(values) for values in mode.values.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(v)}" for key, v in mode.values.items())
            raise UserError(
                f"zip needs equally many values for every key ({lengths}); even them out, or use "
                "grid for every combination."
            )
        return mode

    def points(self) -> list[dict[str, Any]]:
        rows = zip(*self.values.values(), strict=True)
        return [dict(zip(self.values, row, strict=True)) for row in rows]

    def describe(self) -> str:
        return f"zip {' + '.join(self.values)}"
