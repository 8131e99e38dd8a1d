"""``random: {samples: 50, seed: 0, space: {KEY: DOMAIN}}``: points drawn at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from btu.seeding import derive_seed
from orchestrator.sweep.modes.base import PlannedMode
from orchestrator.sweep.modes.written import Section, SpaceSection
from orchestrator.sweep.space import Domain, combinations, read_space
from orchestrator.sweep.typed import as_count, as_seed, check_section, field_names


@dataclass(frozen=True)
class RandomMode(PlannedMode):
    """Points drawn at random.

    The first samples of a longer search are those of a shorter one, and the draws of one key do
    not depend on the other keys.

    samples: how many points are drawn.
    seed: of the draws.
    space: the domain of each key.
    """

    name: ClassVar[str] = "random"
    where: ClassVar[str] = "random.space"
    form: ClassVar[type[Section]] = SpaceSection

    samples: int
    seed: int
    space: Mapping[str, Domain]

    @classmethod
    def read(cls, written: Any, base: Mapping[str, Any]) -> Self:
        check_section(cls.name, written, field_names(cls))
        return cls(
            as_count("random.samples", written.get("samples")),
            as_seed("random.seed", written.get("seed", 0)),
            read_space("random.space", written.get("space")),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.space)

    def count(self) -> int:
        return self.samples

    def sizes(self) -> str:
        return f"random.samples {self.samples}"

    def points(self) -> list[dict[str, Any]]:
        drawn = {
            key: np.random.default_rng(derive_seed(self.seed, "random search", key))
            .random(self.samples)
            .tolist()
            for key in self.space
        }
        return [
            {key: domain.at(drawn[key][index]) for key, domain in self.space.items()}
            for index in range(self.samples)
        ]

    def possible(self, keys: Collection[str]) -> list[dict[str, Any]]:
        return combinations(self.space, keys)

    def describe(self) -> str:
        return f"{self.samples} random draws of {', '.join(self.space)}"

    def open_axes(self) -> dict[str, list[Any]]:
        if self.samples == 1:
            return {}
        drawn = dataclasses.replace(self, samples=2).points()
        return {key: [point[key] for point in drawn] for key in self.space}
