"""Where further detection thresholds go: where ASR falls or CACC breaks, by bisection.

What comes next depends on what was measured and on what was launched before, never on a process:
the same command goes on where an interrupted one stopped, and finds nothing to do after its end.
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
from orchestrator.run.progress import label
from orchestrator.run.study import Suggestion
from orchestrator.sweep.sections import CONTROL
from orchestrator.sweep.sweep import Cell, Sweep

THRESHOLD_KEYS = ("defense.threshold", "defense.alpha")
# How far neighbours have to differ to be worth a cell. On SST-2's test split a rate has a standard
# error of 0.017 (ASR of 0.5 on 912 triggered rows) or 0.007 (CACC of 0.9 on 1,821 rows), the
# difference of two about 1.4 times that: below these floors a change may be the rows' alone.
FLOORS = {"asr": 0.02, "cacc": 0.01}
# Neighbours within 2 % are one threshold to a reader, and flag nearly the same tokens.
NARROW = 1.02
VERBS = {"asr": "falls", "cacc": "breaks"}


@dataclass(frozen=True)
class RefineSpec:
    """metrics: of `FLOORS`, whose change is located. trials: how many further cells at most."""

    metrics: tuple[str, ...]
    trials: int


def threshold_key(sweep: Sweep) -> str:
    """Return the key of the threshold that a sweep varies.

    Raises:
        UserError: it varies none, or two, or leaves its cells to Optuna.
    """
    if sweep.optuna is not None:
        raise UserError(
            f"--refine bisects the thresholds of a grid, and sweep '{sweep.name}' leaves its cells "
            "to Optuna; drop --refine, or the search with optuna=null."
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
            "'grid.defense.alpha=[0.0001,0.01]'."
        )
    return keys[0]


@dataclass
class _Point:
    """A threshold of a group. means: by metric, {} where it has none, None until its cells ended.

    refined: whether it is none of the grid's.
    """

    number: int
    threshold: float
    cells: list[Cell]
    refined: bool
    means: Mapping[str, float] | None = None


@dataclass
class _Group:
    """Cells that are equal in everything but threshold and seed.

    seeds: coordinates of a cell for each of its seeds. partial: how many cells were launched of
    thresholds that lack others, of seeds that came later. refused: why a threshold cannot run,
    None if it can.
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
        """Return the neighbours that have a metric, those that differ most first."""
        curve = sorted(
            (point.threshold, point.means[metric])
            for point in self.points.values()
            if point.means is not None and metric in point.means
        )
        span = max(self.points) - min(self.points)
        pairs = [_Pair(*low, *high, span) for low, high in itertools.pairwise(curve)]
        return sorted(pairs, key=lambda pair: (-pair.change, pair.low))

    def cost(self, threshold: float) -> int:
        """Return how many cells a threshold adds to those launched."""
        return len(self.seeds) - self.partial.get(threshold, 0)

    @property
    def least(self) -> int:
        """The lowest cost of a threshold."""
        return len(self.seeds) - max(self.partial.values(), default=0)


@dataclass(frozen=True)
class _Pair:
    """Neighbouring thresholds with a metric at each. span: of all thresholds of the group."""

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
        """Distance on the scale of thresholds, which is logarithmic where it can be."""
        return math.log(self.high / self.low) if self.low > 0 else math.inf

    @property
    def wide(self) -> bool:
        if self.low > 0:
            return self.high / self.low > NARROW
        # Around 0 ratios never come to an end.
        return self.high - self.low > (NARROW - 1) * self.span

    def middle(self) -> float | None:
        """Return a short number in the middle, None where nothing short lies between."""
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
    """The threshold that a group would have next. change: in floors of its metric."""

    group: _Group
    threshold: float
    change: float
    width: float


class Refinement:
    """Suggests thresholds, each with the cells of all seeds of its group.

    A group is asked about only when all its thresholds have ended; meanwhile the others go on.
    """

    def __init__(
        self,
        sweep: Sweep,
        cells: Iterable[Mapping[str, Any]],
        spec: RefineSpec,
        launched: Mapping[str, Mapping[str, Any]],
        key_of: Callable[[Cell], str],
    ) -> None:
        """cells: coordinates of the cells that the sweep itself has. Controls are left out, also
        those of the grid: what they do between two thresholds answers no question of the sweep's.

        launched: coordinates by key, of all cells ever launched under the sweep's name. Those of
        `cells` but for a threshold that is not theirs count as refined. key_of: gives the key of a
        cell, or raises the `UserError` for which it cannot run.

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
                f"that are no controls differ in {self._key} alone; give it two values that run at "
                f"all seeds, e.g. 'grid.{self._key}=[LOW,HIGH]'."
            )
        self._recall(launched)
        self._steps: list[_Step] | None = None

    @property
    def open(self) -> int:
        """How many thresholds could be asked for right now."""
        return len(self._next())

    @property
    def exhausted(self) -> bool:
        """Whether nothing more is suggested, whatever is told."""
        left = self._left()
        waits = any(group.waiting and group.least <= left for group in self._groups)
        return not waits and not self._next()

    def asked(self) -> list[Suggestion]:
        """Return the thresholds that there are: of the grid, and those refined so far."""
        return [self._suggestion(point) for point in self._points]

    def untold(self) -> set[int]:
        """Return the numbers of those whose cells have not ended."""
        return {point.number for point in self._points if point.means is None}

    def ask(self) -> Suggestion | None:
        """Return the next threshold; None if there is none, or none before more is told."""
        steps = self._next()
        if not steps:
            return None
        point = self._add(steps[0].group, steps[0].threshold, refined=True)
        return self._suggestion(point)

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        """Say what a threshold's cells measured; what was said of it earlier stands.

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
        """Return a line for each group and metric: where it changes most, and how that is known."""
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
        """Return the groups that have thresholds to bisect between."""
        groups: dict[str, _Group] = {}
        grids: dict[str, dict[float, dict[Any, Cell]]] = {}
        for varied in cells:
            if self._key not in varied:
                continue  # of a list whose other entries have one
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
            # Without one of its seeds, which was refused, a threshold has no mean over them.
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
        """Take in what earlier launches refined.

        By key: coordinates may be written in other ways, and the same ones stand for another cell
        where an override acted.
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
        """Return how many cells may still be refined, below 0 after a launch with more trials."""
        return self._spec.trials - sum(
            group.refined_cells + sum(group.partial.values()) for group in self._groups
        )

    def _next(self) -> list[_Step]:
        """Return the next threshold of every group that can have one, whose turn it is first.

        Groups take turns, in order of their change: else the first would be known to the last
        digit before the second is looked at.
        """
        if self._steps is None:
            left = self._left()
            steps = filter(None, map(self._step, self._groups))
            fitting = [step for step in steps if step.group.cost(step.threshold) <= left]
            self._steps = sorted(fitting, key=lambda s: (s.group.refined_cells, -s.change))
        return self._steps

    def _step(self, group: _Group) -> _Step | None:
        """Return a group's next threshold.

        Of several metrics, that whose change is the least located has its turn.
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
            # One that is known and no neighbour of these has failed, and would fail again.
            if threshold not in group.points and self._runs(group, threshold):
                yield _Step(group, threshold, pair.change / FLOORS[metric], pair.width)

    def _runs(self, group: _Group, threshold: float) -> bool:
        """Return whether a threshold's cells can run; keep the reason if they cannot."""
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
