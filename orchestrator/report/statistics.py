"""Intervals and tests over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from btu.types import FloatArray

LEVEL = 0.05
# Differences up to this are equal: in floating point 0.9 - 0.8 is not 0.8 - 0.7.
ROUNDING = 1e-9


class Paired(NamedTuple):
    """The mean difference within pairs, over seeds.

    n: how many pairs have both values.
    mean: the mean difference; NaN without a pair.
    half_width: half of its 95 % interval; NaN with fewer than two pairs.
    p: of the two-sided paired t test; NaN with fewer than two pairs, and if all differences are
        equal, since the test needs a spread.
    """

    n: int
    mean: float
    half_width: float
    p: float

    @property
    def tie(self) -> bool:
        """Whether both sides tie: p is at least 0.05, or, without a test, they are equal."""
        if np.isnan(self.p):
            return abs(self.mean) <= ROUNDING
        return self.p >= LEVEL


def half_width(values: Iterable[float]) -> float:
    """Return half of Student's 95 % interval of the mean; NaN with fewer than two values.

    Undefined values (NaN) are left out.
    """
    # Not scipy.stats: every command that reports would take a second to import it.
    from scipy.special import stdtrit

    known = _known(values)
    if len(known) < 2:
        return float("nan")
    return float(stdtrit(len(known) - 1, 1 - LEVEL / 2) * known.std(ddof=1) / len(known) ** 0.5)


def paired(differences: Iterable[float]) -> Paired:
    """Return the mean of differences within pairs, its 95 % t interval and the t test against 0.

    A difference of NaN, where one side is undefined, is left out.
    """
    from scipy.special import stdtr

    known = _known(differences)
    n = len(known)
    nan = float("nan")
    if n == 0:
        return Paired(0, nan, nan, nan)
    mean = float(known.mean())
    if n == 1:
        return Paired(1, mean, nan, nan)
    width = half_width(known)
    if np.ptp(known) <= ROUNDING:
        return Paired(n, mean, width, nan)
    error = known.std(ddof=1) / n**0.5
    return Paired(n, mean, width, float(2 * stdtr(n - 1, -abs(mean) / error)))


def ties_with_best(
    values: Mapping[int, Mapping[int, float]], higher_is_better: bool
) -> tuple[int | None, set[int]]:
    """Return the row with the best mean, and all rows that tie with it, itself included.

    A row ties if a paired test over the seeds of both rows finds no difference (`Paired.tie`). Rows
    without a defined value neither win nor tie. Without any value there is no best row (None).

    values: by row, the value of each seed.
    higher_is_better: whether the best mean is the highest.
    """
    means = {row: float(_known(found.values()).mean()) for row, found in values.items()
             if len(_known(found.values()))}  # fmt: skip
    if not means:
        return None, set()
    sign = 1 if higher_is_better else -1
    best = max(means, key=lambda row: (sign * means[row], -row))
    tied = {best}
    for row in means:
        shared = values[best].keys() & values[row].keys()
        differences = [values[row][seed] - values[best][seed] for seed in sorted(shared)]
        if row != best and paired(differences).tie:
            tied.add(row)
    return best, tied


def _known(values: Iterable[float]) -> FloatArray:
    found = np.asarray(list(values), dtype=np.float64)
    return found[~np.isnan(found)]
