"""Place further detection thresholds where ASR falls or CACC breaks, by bisection.

The next threshold depends on what was measured and launched before, never on a process: the same
command continues an interrupted one, and has nothing to do after a finished one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from btu.defenses.base import is_control
from btu.errors import UserError
from btu.rules.base import THRESHOLD_KEYS
from orchestrator.run.progress import label
from orchestrator.run.study import Study, Suggestion
from orchestrator.sweep.sections import CONTROL
from orchestrator.sweep.sweep import Cell, Sweep

# How much neighbours have to differ to be worth a cell. On SST-2's test split a rate has a standard
# error of 0.017 (ASR of 0.5 on 912 triggered rows) or 0.007 (CACC of 0.9 on 1,821 rows), and the
# difference of two rates about 1.4 times that: a change below these floors may be chance.
FLOORS = {"asr": 0.02, "cacc": 0.01}
# Neighbours within 2 % look like one threshold to a reader, and flag nearly the same tokens.
NARROW = 1.02
VERBS = {"asr": "falls", "cacc": "breaks"}


@dataclass(frozen=True)
class RefineSpec:
    """What to refine.

    metrics: names in `FLOORS`; where they change is located.
    trials: how many cells may be added at most.
    """

    metrics: tuple[str, ...]
    trials: int


def threshold_key(sweep: Sweep) -> str:
    """Return the key of the threshold that a sweep varies.

    Raises:
        UserError: it varies none, or two, or has a sequential mode.
    """
    mode = sweep.sequential
    if mode is not None:
        raise UserError(
            f"--refine bisects the thresholds of a grid, and sweep '{sweep.name}' leaves its cells "
            f"to {mode.title}; drop --refine, or the search with {mode.name}=null."
        )
    keys = [key for key in THRESHOLD_KEYS if key in sweep.open_axes()]
    if len(keys) > 1:
        raise UserError(
            f"--refine bisects one threshold, and sweep '{sweep.name}' varies "
            f"{' and '.join(keys)}; pin one of them, e.g. {keys[0]}=VALUE."
        )
    if not keys:
        raise UserError(
            f"--refine needs an axis of thresholds, and sweep '{sweep.name}' varies neither "
            f"{' nor '.join(THRESHOLD_KEYS)}; give one at least two values, e.g. "
            f"'grid.{THRESHOLD_KEYS[-1]}=[0.0001,0.01]'."
        )
    return keys[0]


@dataclass
class _Point:
    """A threshold of a group.

    refined: whether the grid lacks it.
    means: by metric; {} if it has none, None until its cells have ended.
    """

    number: int
    threshold: float
    cells: list[Cell]
    refined: bool
    means: Mapping[str, float] | None = None


@dataclass
class _Group:
    """Cells that are equal in everything but threshold and seed.

    seeds: for each seed the coordinates of one cell.
    points: the thresholds whose cells have all been launched.
    partial: for a threshold that lacks the cells of later seeds, how many have been launched.
    refused: why a threshold cannot run, None if it can.
    """

    name: str
    seeds: dict[Any, Mapping[str, Any]] = field(default_factory=dict)
    points: dict[float, _Point] = field(default_factory=dict)
    partial: dict[float, int] = field(default_factory=dict)
    refused: dict[float, str | None] = field(default_factory=dict)

    @property
    def waiting(self) -> bool:
        """Whether cells of its thresholds have not ended."""
        return any(point.means is None for point in self.points.values())

    @property
    def refined_cells(self) -> int:
        """How many cells its refined thresholds have."""
        return sum(len(point.cells) for point in self.points.values() if point.refined)

    def pairs(self, metric: str) -> list[_Pair]:
        """Return the pairs of neighbours that have a metric, the largest difference first."""
        curve = sorted(
            (point.threshold, point.means[metric])
            for point in self.points.values()
            if point.means is not None and metric in point.means
        )
        span = max(self.points) - min(self.points)
        pairs = [_Pair(*low, *high, span) for low, high in itertools.pairwise(curve)]
        return sorted(pairs, key=lambda pair: (-pair.change, pair.low))

    def cost(self, threshold: float) -> int:
        """Return how many cells of a threshold have not been launched."""
        return len(self.seeds) - self.partial.get(threshold, 0)

    @property
    def least(self) -> int:
        """The lowest possible cost of a threshold."""
        return len(self.seeds) - max(self.partial.values(), default=0)


@dataclass(frozen=True)
class _Pair:
    """Neighbouring thresholds with a metric at each. span: between the group's outermost ones."""

    low: float
    at_low: float
    high: float
    at_high: float
    span: float

    @property
    def change(self) -> float:
        return abs(self.at_high - self.at_low)

    @property
    def width(self) -> float:
        """The distance between the thresholds: logarithmic, infinite if one is not positive."""
        return math.log(self.high / self.low) if self.low > 0 else math.inf

    @property
    def wide(self) -> bool:
        if self.low > 0:
            return self.high / self.low > NARROW
        # Around 0, a bisection by ratios would not end.
        return self.high - self.low > (NARROW - 1) * self.span

    def middle(self) -> float | None:
        """Return a number of few digits in the middle, None if no such number lies between."""
        middle = (self.low + self.high) / 2
        if self.low > 0:
            middle = math.sqrt(self.low) * math.sqrt(self.high)
        for digits in (3, 4):
            rounded = float(f"{middle:.{digits}g}")
            if self.low < rounded < self.high:
                return rounded
        return None


@dataclass(frozen=True)
class _Step:
    """The next threshold of a group.

    change: of the metric around it, in floors.
    width: of the pair that it bisects.
    """

    group: _Group
    threshold: float
    change: float
    width: float


class Refinement(Study):
    """Suggests thresholds, each with the cells of all seeds of its group.

    A group gets its next threshold when all its thresholds have ended; the groups do not wait for
    each other.
    """

    def __init__(
        self,
        sweep: Sweep,
        cells: Iterable[Mapping[str, Any]],
        spec: RefineSpec,
        launched: Mapping[str, Mapping[str, Any]],
        key_of: Callable[[Cell], str],
    ) -> None:
        """Recall what earlier launches have refined.

        sweep: whose thresholds are refined.
        cells: coordinates of the sweep's own cells. Controls are left out, also those of the grid:
            nobody asks what they do between two thresholds.
        spec: what to refine.
        launched: coordinates by key, of all cells ever launched under the sweep's name. Cells that
            differ from those of `cells` only in the threshold count as refined.
        key_of: gives the key of a cell, or raises the `UserError` for which it cannot run.

        Raises:
            UserError: no cells differ in a threshold alone.
        """
        self._sweep, self._spec, self._key_of = sweep, spec, key_of
        self._key = threshold_key(sweep)
        self._points: list[_Point] = []
        self._groups = self._grouped(cell for cell in cells if CONTROL not in cell)
        if not self._groups:
            raise UserError(
                f"--refine bisects between thresholds, and no two cells of sweep '{sweep.name}' "
                f"that are not controls differ in {self._key} alone; give it two values that run "
                f"at all seeds, e.g. 'grid.{self._key}=[LOW,HIGH]'."
            )
        self._recall(launched)
        self._steps: list[_Step] | None = None

    @property
    def open(self) -> int:
        """How many thresholds could be asked for right now."""
        return len(self._next())

    @property
    def exhausted(self) -> bool:
        """Whether no further threshold is suggested, whatever is measured."""
        left = self._left()
        waits = any(group.waiting and group.least <= left for group in self._groups)
        return not waits and not self._next()

    def asked(self) -> list[Suggestion]:
        """Return all thresholds so far: those of the grid, and the refined ones."""
        return [self._suggestion(point) for point in self._points]

    def untold(self) -> set[int]:
        """Return the numbers of the thresholds whose cells have not ended."""
        return {point.number for point in self._points if point.means is None}

    def ask(self) -> Suggestion | None:
        """Return the next threshold; None if there is none, or none before further results."""
        steps = self._next()
        if not steps:
            return None
        point = self._add(steps[0].group, steps[0].threshold, refined=True)
        return self._suggestion(point)

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        """Record what a threshold's cells measured; an earlier record is kept.

        results: metrics of every cell, none if one has failed. A metric that a cell lacks, or that
            is not finite, counts as not measured.

        Raises:
            KeyError: there is no such suggestion.
        """
        if not 0 <= number < len(self._points):
            raise KeyError(f"suggestion {number} was never asked for.")
        if self._points[number].means is not None:
            return
        columns = {m: [cell.get(m, math.nan) for cell in results] for m in self._spec.metrics}
        self._points[number].means = {
            metric: fmean(column)
            for metric, column in columns.items()
            if column and all(map(math.isfinite, column))
        }
        self._steps = None

    def findings(self) -> list[str]:
        """Return a line for each group and metric: where it changes most, and how precisely."""
        lines = []
        for group in self._groups:
            if group.waiting:
                continue
            lines += [f"{group.name}: {self._finding(group, m)}" for m in self._spec.metrics]
            lines += [
                f"{group.name}: {self._key}={threshold:g} is refused, and nothing else is tried "
                f"between its neighbours: {reason}"
                for threshold, reason in sorted(group.refused.items())
                if reason is not None
            ]
        if not self._next() and any(self._step(group) for group in self._groups):
            lines.append(
                f"{self._spec.trials - self._left()} of {self._spec.trials} cells are refined; a "
                "higher --refine-trials narrows this down further."
            )
        return lines

    def _grouped(self, cells: Iterable[Mapping[str, Any]]) -> list[_Group]:
        """Return the groups that have at least two thresholds."""
        groups: dict[str, _Group] = {}
        grids: dict[str, dict[float, dict[Any, Cell]]] = {}
        for varied in cells:
            if self._key not in varied:
                continue  # an entry of the list without a threshold, where others have one
            cell = self._sweep.cell(varied)
            if is_control((cell.config.get("defense") or {}).get("name")):
                continue
            threshold, seed = self._number(varied[self._key]), varied.get("seed")
            common = {k: v for k, v in varied.items() if k not in (self._key, "seed")}
            known = json.dumps(common, sort_keys=True)
            name = label(common) if common else self._sweep.name
            groups.setdefault(known, _Group(name)).seeds.setdefault(seed, varied)
            grid = grids.setdefault(known, {})
            grid.setdefault(threshold, {})[seed] = cell
        found = []
        for known, group in groups.items():
            # A threshold with a refused seed has no mean over the seeds.
            whole = [t for t, by_seed in grids[known].items() if len(by_seed) == len(group.seeds)]
            if len(whole) < 2:
                continue
            for threshold, by_seed in sorted(grids[known].items()):
                point = self._add(group, threshold, refined=False, cells=list(by_seed.values()))
                if threshold not in whole:
                    point.means = {}
            found.append(group)
        return found

    def _number(self, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise UserError(
                f"--refine bisects numbers, and {self._key} has the value {value!r}; write finite "
                "numbers only, without quotes."
            )
        return float(value)

    def _recall(self, launched: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in the thresholds that earlier launches refined.

        Cells are compared by key: coordinates may be written differently, and with another override
        the same coordinates are another cell.
        """
        values = [varied.get(self._key) for varied in launched.values()]
        seen = {float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)}
        for group in self._groups:
            for threshold in sorted(seen - group.points.keys()):
                try:
                    keys = [self._key_of(cell) for cell in self._cells(group, threshold)]
                except UserError:
                    continue
                there = sum(key in launched for key in keys)
                if there == len(keys):
                    self._add(group, threshold, refined=True)
                elif there:
                    group.partial[threshold] = there

    def _cells(self, group: _Group, threshold: float) -> list[Cell]:
        return [
            self._sweep.cell({**varied, self._key: threshold}) for varied in group.seeds.values()
        ]

    def _add(
        self, group: _Group, threshold: float, *, refined: bool, cells: list[Cell] | None = None
    ) -> _Point:
        group.partial.pop(threshold, None)
        made = cells or self._cells(group, threshold)
        point = group.points[threshold] = _Point(len(self._points), threshold, made, refined)
        self._points.append(point)
        self._steps = None
        return point

    def _suggestion(self, point: _Point) -> Suggestion:
        return Suggestion(point.number, {self._key: point.threshold}, point.cells)

    def _left(self) -> int:
        """Return how many cells may still be added, below 0 after a launch with more trials."""
        return self._spec.trials - sum(
            group.refined_cells + sum(group.partial.values()) for group in self._groups
        )

    def _next(self) -> list[_Step]:
        """Return the next threshold of every group that can have one, in the order of their turns.

        Groups take turns, the largest change first. Without turns, the first group would be located
        to the last digit before the second one starts.
        """
        if self._steps is None:
            left = self._left()
            steps = filter(None, map(self._step, self._groups))
            fitting = [step for step in steps if step.group.cost(step.threshold) <= left]
            self._steps = sorted(fitting, key=lambda s: (s.group.refined_cells, -s.change))
        return self._steps

    def _step(self, group: _Group) -> _Step | None:
        """Return a group's next threshold.

        Of several metrics, the one whose change is located least precisely has its turn.
        """
        if group.waiting:
            return None
        steps = [next(self._bisections(group, metric), None) for metric in self._spec.metrics]
        return max(filter(None, steps), key=lambda step: (step.width, step.change), default=None)

    def _bisections(self, group: _Group, metric: str) -> Iterator[_Step]:
        """Yield the thresholds that would locate a metric's changes, the largest first."""
        for pair in group.pairs(metric):
            if pair.change <= FLOORS[metric]:
                return
            threshold = pair.middle()
            if not pair.wide or threshold is None:
                continue
            # A threshold that is in the group and no end of this pair has failed, and would again.
            if threshold not in group.points and self._runs(group, threshold):
                yield _Step(group, threshold, pair.change / FLOORS[metric], pair.width)

    def _runs(self, group: _Group, threshold: float) -> bool:
        """Return whether a threshold's cells can run, and keep the reason if they cannot."""
        if threshold not in group.refused:
            try:
                for cell in self._cells(group, threshold):
                    self._key_of(cell)
                group.refused[threshold] = None
            except UserError as error:
                group.refused[threshold] = str(error)
        return group.refused[threshold] is None

    def _finding(self, group: _Group, metric: str) -> str:
        pairs = group.pairs(metric)
        if not pairs:
            return f"{metric} is known at fewer than two thresholds; nothing is refined."
        pair = pairs[0]
        ends = [(pair.at_low, pair.low), (pair.at_high, pair.high)]
        (before, start), (after, end) = sorted(ends, reverse=True)
        if pair.change <= FLOORS[metric]:
            return (
                f"{metric} changes by {pair.change:.3f} at most between neighbouring thresholds, "
                f"which is not above {FLOORS[metric]:g}; nothing is refined."
            )
        count = group.refined_cells
        how = f"refined with {count} cell{'s' * (count != 1)}"
        middle = pair.middle()
        if middle is not None and middle in group.points:
            how += f"; {middle:g} between them has no {metric}"
        return (
            f"{metric} {VERBS[metric]} from {before:.3f} to {after:.3f} between {start:g} and "
            f"{end:g} ({how})."
        )
