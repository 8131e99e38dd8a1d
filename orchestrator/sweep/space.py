"""What a sweep searches: grids, lists, random draws and Optuna's space."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np

from btu.errors import UserError, unknown
from btu.seeding import derive_seed
from orchestrator.sweep.sections import SEARCHES
from orchestrator.sweep.tree import lookup, zipped_points
from orchestrator.sweep.typed import (
    as_count,
    as_mapping,
    as_seed,
    check_section,
    field_names,
    unknown_key,
)

SAMPLERS = ("tpe", "nsga2", "random")


@dataclass(frozen=True)
class Choice:
    """A searched key that takes one of some values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at a share, in [0, 1), of the domain."""
        return self.values[int(share * len(self.values))]

    def examples(self) -> list[Any]:
        """Return values that the key may take."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A searched key that takes a number from low to high, both included.

    Whole numbers if both ends are integers. log: uniform in the logarithm. step: distance between
    the possible values, counted from low; None: 1 for whole numbers, else any number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it holds integers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, share: float) -> float:
        """Return the value at a share, in [0, 1), of the domain."""
        if self.log:
            # A whole number stands for all that rounds to it.
            half = 0.5 if self.whole else 0.0
            low, high = math.log(self.low - half), math.log(self.high + half)
            value = math.exp(low + share * (high - low))
            return self._within(round(value) if self.whole else value)
        step = self.step or (1 if self.whole else None)
        if step is None:
            return self._within(self.low + share * (self.high - self.low))
        return self._nth(int(share * (self._steps(step) + 1)), step)

    def snap(self, value: float) -> float:
        """Return the possible value next to `value`: free of what sums of steps round off."""
        if self.step is None:
            return self._within(round(value) if self.whole else value)
        steps = round((value - self.low) / self.step)
        return self._nth(min(max(steps, 0), self._steps(self.step)), self.step)

    def examples(self) -> list[Any]:
        """Return values that the key may take."""
        return [self.low, self.high]

    def _within(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def _steps(self, step: float) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(step)))

    def _nth(self, index: int, step: float) -> float:
        # In decimals: 0.1 + 2 x 0.1 is 0.3.
        value = Decimal(str(self.low)) + index * Decimal(str(step))
        return int(value) if self.whole else float(value)


Domain: TypeAlias = Choice | Range


@dataclass(frozen=True)
class RandomSpec:
    """Cells drawn at random.

    samples: how many. space: what each key may be. The first samples of a longer search are those
    of a shorter one, and what one key takes does not depend on the other keys.
    """

    samples: int
    seed: int
    space: Mapping[str, Domain]

    def points(self) -> list[dict[str, Any]]:
        """Return the drawn coordinates."""
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


@dataclass(frozen=True)
class OptunaSpec:
    """Cells suggested as the sweep goes, from the results of earlier ones.

    trials: how many suggestions at most. sampler: ``tpe``, ``nsga2`` (generations of 20) or
    ``random``. The objectives are a low mean ASR and a high mean CACC over a suggestion's cells.
    """

    trials: int
    seed: int
    sampler: str
    space: Mapping[str, Domain]


class Search:
    """The search sections of a sweep file, taken out of it, while overrides change them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.grid = as_mapping("grid", config.pop("grid", None), "keys to lists of values")
        self.zipped = as_mapping("zip", config.pop("zip", None), "keys to lists of values")
        self.listed: Any = config.pop("list", None)
        self.sections = {
            name: _space_section(name, config.pop(name, None)) for name in ("random", "optuna")
        }
        self._emptied: set[str] = set()

    def override(self, key: str, value: Any) -> bool:
        """Apply an override of a search section; return False if `key` is none."""
        head, _, rest = key.partition(".")
        if head not in SEARCHES:
            return False
        if head in ("grid", "zip"):
            if not rest:
                raise UserError(f"override an axis of the {head} by its key: {head}.<key>=[...].")
            (self.grid if head == "grid" else self.zipped)[rest] = value
        elif head == "list":
            if rest:
                raise UserError(
                    f"override the list as a whole, list=[{{...}}], or pin the key for all of its "
                    f"entries, {rest}=VALUE."
                )
            self.listed = value
        elif not rest:
            self.sections[head] = _space_section(head, value)
        elif rest.startswith("space."):
            self.sections[head].setdefault("space", {})[rest.removeprefix("space.")] = value
        else:
            self.sections[head] = _space_section(head, {**self.sections[head], rest: value})
        return True

    def pin(self, key: str) -> list[Any]:
        """Take `key` off every axis; return the values that it had there."""
        taken: list[Any] = []
        for axes in (self.grid, self.zipped):
            values = axes.pop(key, [])
            taken += values if isinstance(values, list) else []
        for name, section in self.sections.items():
            if key in section.get("space", {}):
                domain = section["space"].pop(key)
                taken += domain if isinstance(domain, list) else []
                self._emptied.add(name)
        if any(key in entry for entry in self._entries()):
            taken += [entry.pop(key) for entry in self._entries() if key in entry]
            # What is left may be the same cell several times, or only what the file says.
            self.listed = [e for i, e in enumerate(self.listed) if e not in self.listed[:i]]
            if self.listed == [{}]:
                self.listed = None
        return taken

    def finish(self) -> None:
        """Drop the searches of which every key was pinned, and check what was overridden."""
        for name in self._emptied:
            if not self.sections[name].get("space"):
                self.sections[name] = {}
        if all(self.sections.values()):
            raise UserError("random and optuna exclude each other; keep one of them.")

    def values(self, key: str, config: Mapping[str, Any]) -> list[Any]:
        """Return what cells have for `key`, `ABSENT` where nothing is set."""
        own = lookup(config, key)
        for axes in (self.grid, self.zipped, *self._spaces()):
            if key in axes:
                return axes[key] if isinstance(axes[key], list) and axes[key] else [own]
        if any(key in entry for entry in self._entries()):
            return [entry.get(key, own) for entry in self._entries()]
        return [own]

    def points(self, keys: Collection[str]) -> Iterator[dict[str, Any]]:
        """Yield the combinations of values that cells have for those of `keys` that they vary."""

        def only(point: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in point.items() if key in keys}

        free = [
            [{key: value} for value in values]
            for axes in (self.grid, *self._spaces())
            for key, values in only(axes).items()
            if isinstance(values, list)
        ]
        tied = [list(map(only, self._entries())) or [{}], zipped_points(only(self.zipped))]
        for parts in itertools.product(*free, *tied):
            yield {key: value for part in parts for key, value in part.items()}

    def check(self, swept: list[str]) -> None:
        """Check every axis.

        swept: the keys that may vary.

        Raises:
            UserError: a key is unknown or stands on two axes, a value has the wrong type or a
                rule is broken.
        """
        seen: dict[str, str] = {}
        for section, where, keys in (
            ("grid", "the grid", self.grid),
            ("zip", "the zip", self.zipped),
            ("list", "the list", dict.fromkeys(itertools.chain(*self._checked_entries()))),
            ("random", "random.space", self.sections["random"].get("space", {})),
            ("optuna", "optuna.space", self.sections["optuna"].get("space", {})),
        ):
            for key in keys:
                if key not in swept:
                    raise unknown_key(key, swept, where)
                if key in seen:
                    raise UserError(
                        f"{key} is an axis of both {seen[key]} and {section}; keep it in one."
                    )
                seen[key] = section
        for section, axes in (("grid", self.grid), ("zip", self.zipped)):
            for key, values in axes.items():
                if not isinstance(values, list) or not values:
                    raise UserError(
                        f"{section}.{key} must be a list of at least one value, got {values!r}."
                    )
        if len({len(values) for values in self.zipped.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(v)}" for key, v in self.zipped.items())
            raise UserError(
                f"zip needs equally many values for every key ({lengths}); even them out, or use "
                "grid for every combination."
            )

    def random(self) -> RandomSpec | None:
        """Return the random search, checked."""
        section = self.sections["random"]
        if not section:
            return None
        check_section("random", section, ("samples", "seed", "space"))
        return RandomSpec(
            as_count("random.samples", section.get("samples")),
            as_seed("random.seed", section.get("seed", 0)),
            _space("random.space", section.get("space")),
        )

    def optuna(self) -> OptunaSpec | None:
        """Return the search that Optuna leads, checked."""
        section = self.sections["optuna"]
        if not section:
            return None
        check_section("optuna", section, ("trials", "seed", "sampler", "space"))
        sampler = section.get("sampler", "tpe")
        if sampler not in SAMPLERS:
            raise unknown("optuna.sampler", str(sampler), SAMPLERS)
        return OptunaSpec(
            as_count("optuna.trials", section.get("trials")),
            as_seed("optuna.seed", section.get("seed", 0)),
            sampler,
            _space("optuna.space", section.get("space")),
        )

    def written(self) -> dict[str, Any]:
        """Return the sections in the shape of a sweep file."""
        sections = {**self.sections, "list": self.listed, "zip": self.zipped}
        return {name: value for name, value in sections.items() if value} | {"grid": self.grid}

    def _spaces(self) -> list[dict[str, Any]]:
        return [section.get("space", {}) for section in self.sections.values()]

    def _entries(self) -> list[dict[str, Any]]:
        listed = self.listed if isinstance(self.listed, list) else []
        return [entry for entry in listed if isinstance(entry, dict)]

    def _checked_entries(self) -> list[dict[str, Any]]:
        if self.listed is None:
            return []
        if not isinstance(self.listed, list) or not self.listed:
            raise UserError(
                f"list must be a list of at least one mapping of keys to values, got "
                f"{self.listed!r}."
            )
        for index, entry in enumerate(self.listed):
            if not isinstance(entry, dict):
                raise UserError(f"list[{index}] must map keys to values, got {entry!r}.")
        return self.listed


def _space_section(name: str, value: Any) -> dict[str, Any]:
    section = as_mapping(name, value, "its settings to values")
    if "space" in section:
        space = as_mapping(f"{name}.space", section["space"], "keys to what they may be")
        section = {**section, "space": space}
    return section


def _space(where: str, space: Any) -> dict[str, Domain]:
    if not space:
        raise UserError(
            f"{where} must name at least one key, e.g. {where}.seed=[0,1,2], got {space!r}."
        )
    return {key: _domain(f"{where}.{key}", domain) for key, domain in space.items()}


def _domain(where: str, written: Any) -> Domain:
    """Return what a searched key may be.

    Raises:
        UserError: it is neither choices nor a range, or a range that holds nothing.
    """
    if isinstance(written, list) and written:
        return Choice(tuple(written))
    if not isinstance(written, dict):
        raise UserError(
            f"{where} must be a list of at least one choice, or a range {{low: ..., high: ...}}, "
            f"got {written!r}."
        )
    check_section(where, written, field_names(Range))
    log, step = written.get("log", False), written.get("step")
    for key in ("low", "high", *(["step"] if step is not None else [])):
        value = written.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(typing.cast(float, value)):
            raise UserError(f"{where}.{key} must be a number, got {value!r}.")
    if not isinstance(log, bool):
        raise UserError(f"{where}.log must be true or false, got {log!r}.")
    domain = Range(written["low"], written["high"], log, step)
    if domain.low >= domain.high:
        raise UserError(f"{where}.low must be below high, got {domain.low} and {domain.high}.")
    if log and domain.low <= 0:
        raise UserError(
            f"{where}.low must be above 0 with log, got {domain.low}; raise it or drop log."
        )
    if step is None:
        return domain
    if log:
        raise UserError(f"{where} has both log and step {step}; drop one of them.")
    if not 0 < step <= domain.high - domain.low:
        raise UserError(
            f"{where}.step must be above 0 and at most high - low = "
            f"{domain.high - domain.low:g}, got {step}."
        )
    if domain.whole and not isinstance(step, int):
        raise UserError(
            f"{where}.step must be an integer between integers, got {step}; write low as "
            f"{domain.low}.0 for fractions."
        )
    return domain
