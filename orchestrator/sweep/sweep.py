"""A sweep, and the cells that it has."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.sections import CONTROL, settings, shown_coordinates
from orchestrator.sweep.tree import assign, copied, zipped_points

if TYPE_CHECKING:
    from orchestrator.sweep.sections import ResourceSpec, StoreSpec, TrackingSpec
    from orchestrator.sweep.space import OptunaSpec, RandomSpec


# Cells that come by themselves beside those of the sweep: what makes them of a cell, by name.
CONTROLS: dict[str, dict[str, Any]] = {
    "no_poison": {"attack.poison_rate": 0.0},
    "no_defense": {"defense.name": "none"},
}


@dataclass(frozen=True)
class Cell:
    """A point of the sweep, before it is resolved.

    varied: its coordinates, by dotted key; of a control also which one it is.
    """

    varied: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file.

    output: an absolute folder or a URL. grid: axes of which every combination is a cell. zipped:
    axes of which the i-th values go together. listed: cells one by one; an entry that lacks a key
    of another one has the file's value of it, if there is one. controls: names of `CONTROLS` that
    every cell gets. base: the settings of all cells.
    text: the file with the overrides applied, as YAML, for the record. Without `tracking`, whose
    URI may hold a password.
    """

    name: str
    output: str
    resources: ResourceSpec
    tracking: TrackingSpec
    store: StoreSpec
    grid: Mapping[str, list[Any]]
    zipped: Mapping[str, list[Any]]
    listed: Sequence[Mapping[str, Any]]
    random: RandomSpec | None
    optuna: OptunaSpec | None
    controls: tuple[str, ...]
    base: Mapping[str, Any]
    text: str

    @property
    def folder(self) -> str:
        """Where the sweep's own files are: ``<output>/<name>``."""
        return f"{self.output}/{self.name}"

    @property
    def store_location(self) -> str:
        """Where the results of all sweeps of the output folder are: ``<output>/store``."""
        return f"{self.output}/store"

    @property
    def axes(self) -> tuple[str, ...]:
        """Every key that cells vary, in the order of their coordinates."""
        spaces = [spec.space for spec in (self.optuna, self.random) if spec is not None]
        return tuple(dict.fromkeys(itertools.chain(*spaces, *self.listed, self.zipped, self.grid)))

    def cells(self) -> Iterator[Cell]:
        """Yield every point: random draws x list x zip x grid.

        Coordinates stand in that order, each section's as in the file, and the last one varies
        fastest. A sweep that Optuna searches yields nothing: its cells come from `expand`.
        """
        if self.optuna is None:
            yield from self._expand({})

    def expand(self, suggested: Mapping[str, Any]) -> list[Cell]:
        """Return the cells of one suggestion, whose coordinates come first."""
        return list(self._expand(suggested))

    def controls_of(self, cells: Iterable[Mapping[str, Any]]) -> Iterator[Cell]:
        """Yield the controls of cells, given by their coordinates; of equal ones the first.

        A control has the coordinates of its cell, but for those that make it one.
        """
        known = set()
        for varied, name in itertools.product(cells, self.controls):
            made = {**varied, **CONTROLS[name], CONTROL: name}
            acts = json.dumps(shown_coordinates(made), sort_keys=True)
            if acts not in known:
                known.add(acts)
                yield self.cell(made)

    def cell(self, varied: Mapping[str, Any]) -> Cell:
        """Return the cell with these coordinates, whether or not the sweep has it."""
        config = copied(self.base)
        for key, value in settings(varied).items():
            assign(config, key, value)
        return Cell(varied, config)

    def describe(self) -> str:
        """Return in words what is searched and how many cells that makes."""
        count = math.prod(map(len, self._parts()))
        cells = f"{count} cell{'s' * (count != 1)}"
        words = []
        if self.random is not None:
            words.append(f"{self.random.samples} random draws of {', '.join(self.random.space)}")
        if self.listed:
            words.append(f"list of {len(self.listed)}")
        if self.zipped:
            words.append(f"zip {' + '.join(self.zipped)}")
        if self.grid:
            words.append(f"grid {' x '.join(self.grid)}")
        others = " x ".join(words)
        if self.optuna is None:
            return f"{others} = {cells}" if others else "a single cell"
        searched = f"{self.optuna.sampler} over {', '.join(self.optuna.space)}"
        detail = f"{searched}; {others}" if others else searched
        return f"optuna: up to {self.optuna.trials} suggestions x {cells} ({detail})"

    def open_axes(self) -> dict[str, list[Any]]:
        """Return what has to be pinned to leave a single cell: values, or examples, by key."""
        found: dict[str, list[Any]] = {}
        if self.optuna is not None:
            found |= {key: domain.examples() for key, domain in self.optuna.space.items()}
        if self.random is not None and self.random.samples > 1:
            drawn = dataclasses.replace(self.random, samples=2).points()
            found |= {key: [point[key] for point in drawn] for key in self.random.space}
        if len(self.listed) > 1:
            for key, value in itertools.chain(*(entry.items() for entry in self.listed)):
                values = found.setdefault(key, [])
                if value not in values:
                    values.append(value)
        for axes in (self.zipped, self.grid):
            found |= {key: list(values) for key, values in axes.items() if len(values) > 1}
        return found

    def _parts(self) -> list[Sequence[Mapping[str, Any]]]:
        """Return the points of each section, in the order of the coordinates."""
        return [
            [{}] if self.random is None else self.random.points(),
            self.listed or [{}],
            zipped_points(self.zipped),
            [
                dict(zip(self.grid, values, strict=True))
                for values in itertools.product(*self.grid.values())
            ],
        ]

    def _expand(self, suggested: Mapping[str, Any]) -> Iterator[Cell]:
        for points in itertools.product(*self._parts()):
            varied = dict(suggested)
            for point in points:
                varied |= point
            yield self.cell(varied)
