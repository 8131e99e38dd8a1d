"""A search space: the domain of each key that random draws or a sampler vary."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

from btu.errors import UserError
from orchestrator.sweep.typed import check_section, field_names


@dataclass(frozen=True)
class Choice:
    """A domain of listed values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at a share, in [0, 1), of the domain."""
        return self.values[int(share * len(self.values))]

    def examples(self) -> list[Any]:
        """Return values that the key may take."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A domain of numbers from low to high, both included.

    The numbers are whole if both ends are integers.

    low: the smallest value.
    high: the largest value.
    log: whether values are uniform in the logarithm.
    step: the distance between possible values, counted from low; None allows every number, or
        every whole number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the domain contains integers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, share: float) -> float:
        """Return the value at a share, in [0, 1), of the domain."""
        if self.log:
            # Each whole number gets the interval that rounds to it.
            half = 0.5 if self.whole else 0.0
            low, high = math.log(self.low - half), math.log(self.high + half)
            value = math.exp(low + share * (high - low))
            return self._within(round(value) if self.whole else value)
        step = self.step or (1 if self.whole else None)
        if step is None:
            return self._within(self.low + share * (self.high - self.low))
        return self._nth(int(share * (self._steps(step) + 1)), step)

    def snap(self, value: float) -> float:
        """Return the possible value nearest to `value`, without the rounding errors of sums."""
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
        # In decimals 0.1 + 2 x 0.1 is 0.3; in floats it is 0.30000000000000004.
        value = Decimal(str(self.low)) + index * Decimal(str(step))
        return int(value) if self.whole else float(value)


Domain: TypeAlias = Choice | Range


def read_space(where: str, space: Any) -> dict[str, Domain]:
    """Return the domains of a search space, by key.

    where: the space's own key in the sweep file, for errors.
    space: the space as the file writes it.

    Raises:
        UserError: the space is empty, or a domain is malformed.
    """
    if not space:
        raise UserError(
            f"{where} must name at least one key, e.g. {where}.seed=[0,1,2], got {space!r}."
        )
    return {key: _domain(f"{where}.{key}", domain) for key, domain in space.items()}


def combinations(space: Mapping[str, Domain], keys: Collection[str]) -> list[dict[str, Any]]:
    """Return every combination of the listed values of those of `keys` that are in the space.

    A range lists no values: it contributes none.
    """
    listed = {
        key: domain.values
        for key, domain in space.items()
        if key in keys and isinstance(domain, Choice)
    }
    return [dict(zip(listed, one, strict=True)) for one in itertools.product(*listed.values())]


def _domain(where: str, written: Any) -> Domain:
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
    _check_range(where, domain)
    return domain


def _check_range(where: str, domain: Range) -> None:
    low, high, step = domain.low, domain.high, domain.step
    if low >= high:
        raise UserError(f"{where}.low must be below high, got {low} and {high}.")
    if domain.log and low <= 0:
        raise UserError(f"{where}.low must be above 0 with log, got {low}; raise it or drop log.")
    if step is None:
        return
    if domain.log:
        raise UserError(f"{where} has both log and step {step}; drop one of them.")
    if not 0 < step <= high - low:
        raise UserError(
            f"{where}.step must be above 0 and at most high - low = {high - low:g}, got {step}."
        )
    if domain.whole and not isinstance(step, int):
        raise UserError(
            f"{where}.step must be an integer between integers, got {step}; write low as "
            f"{low}.0 for fractions."
        )
