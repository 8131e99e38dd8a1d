"""``optuna: {trials: 30, seed: 0, sampler: tpe, space: {KEY: DOMAIN}}``: suggested points."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from btu.errors import unknown
from orchestrator.sweep.modes.base import SequentialMode
from orchestrator.sweep.modes.written import Section, SpaceSection
from orchestrator.sweep.space import Domain, combinations, read_space
from orchestrator.sweep.typed import as_count, as_seed, check_section, field_names

SAMPLERS = ("tpe", "nsga2", "random")


@dataclass(frozen=True)
class OptunaMode(SequentialMode):
    """Points that a sampler of Optuna suggests.

    The objectives are a low mean ASR and a high mean CACC over the cells of a suggestion.

    trials: how many suggestions there are at most.
    seed: of the sampler.
    sampler: ``tpe``, ``nsga2`` (generations of 20) or ``random``.
    space: the domain of each key.
    """

    name: ClassVar[str] = "optuna"
    where: ClassVar[str] = "optuna.space"
    form: ClassVar[type[Section]] = SpaceSection
    excluded: ClassVar[tuple[str, ...]] = ("random",)
    title: ClassVar[str] = "Optuna"

    seed: int
    sampler: str
    space: Mapping[str, Domain]

    @classmethod
    def read(cls, written: Any, base: Mapping[str, Any]) -> Self:
        check_section(cls.name, written, field_names(cls))
        sampler = written.get("sampler", "tpe")
        if sampler not in SAMPLERS:
            raise unknown("optuna.sampler", str(sampler), SAMPLERS)
        return cls(
            as_count("optuna.trials", written.get("trials")),
            as_seed("optuna.seed", written.get("seed", 0)),
            sampler,
            read_space("optuna.space", written.get("space")),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.space)

    def possible(self, keys: Collection[str]) -> list[dict[str, Any]]:
        return combinations(self.space, keys)

    def describe(self) -> str:
        return f"{self.sampler} over {', '.join(self.space)}"

    def open_axes(self) -> dict[str, list[Any]]:
        return {key: domain.examples() for key, domain in self.space.items()}
