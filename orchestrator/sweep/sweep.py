"""A sweep and its cells."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from btu.redaction import shown_url
from orchestrator.sweep.modes.base import PlannedMode, SearchMode, SequentialMode
from orchestrator.sweep.modes.optuna import OptunaMode
from orchestrator.sweep.output import store_location
from orchestrator.sweep.sections import CONTROL, hold_out, settings, shown_coordinates
from orchestrator.sweep.tree import assign, copied

if TYPE_CHECKING:
    from orchestrator.sweep.sections import ResourceSpec, StoreSpec, TrackingSpec

Mode = TypeVar("Mode", bound=SearchMode)

# Cells that a sweep gets in addition to its own, by name: the settings that turn a cell into one.
CONTROLS: dict[str, dict[str, Any]] = {
    "no_poison": {"attack.poison_rate": 0.0},
    "no_defense": {"defense.name": "none"},
}


@dataclass(frozen=True)
class Cell:
    """A point of the sweep, before it is resolved.

    varied: its coordinates by dotted key; a control also has the coordinate `CONTROL`.
    config: its settings, nested by section as in a sweep file.
    """

    varied: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file.

    name: of the sweep; also of its folder and of its MLflow experiment.
    output: an absolute folder or a URL.
    resources: what the stages of its cells occupy in Ray.
    tracking: where MLflow keeps its runs.
    store: what stays on disk.
    modes: the searches that make its cells, in the order of a cell's coordinates; none for a
        single cell.
    controls: the names of the `CONTROLS` that every cell gets.
    base: the settings of all cells, nested by section.
    text: the file with the overrides applied, as YAML, for the record. It lacks `tracking`, whose
        URI may contain a password, and has `output` without one.
    given: the keys that the user has set, which the file alone does not decide; the variable
        MLFLOW_TRACKING_URI, if it names the server.
    """

    name: str
    output: str
    resources: ResourceSpec
    tracking: TrackingSpec
    store: StoreSpec
    modes: tuple[SearchMode, ...]
    controls: tuple[str, ...]
    base: Mapping[str, Any]
    text: str
    given: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        """The folder of the sweep's own files: ``<output>/<name>``."""
        return f"{self.output}/{self.name}"

    @property
    def shown_folder(self) -> str:
        """The same for people, without a password."""
        return shown_url(self.folder)

    @property
    def store_location(self) -> str:
        """Where the results of all sweeps of the output folder are: ``<output>/store``."""
        return store_location(self.output)

    @property
    def axes(self) -> tuple[str, ...]:
        """Every key that cells vary, in the order of their coordinates."""
        return tuple(dict.fromkeys(itertools.chain(*(mode.axes for mode in self.modes))))

    @property
    def planned(self) -> list[PlannedMode]:
        """The modes whose points are known before the sweep runs."""
        return [mode for mode in self.modes if isinstance(mode, PlannedMode)]

    @property
    def count(self) -> int:
        """How many cells the planned modes make: all, or those of each suggestion."""
        return math.prod(mode.count() for mode in self.planned)

    @property
    def sequential(self) -> SequentialMode | None:
        """The mode that suggests points while the sweep runs, if there is one."""
        return next((mode for mode in self.modes if isinstance(mode, SequentialMode)), None)

    @property
    def optuna(self) -> OptunaMode | None:
        """The Optuna search, if there is one."""
        return self.mode(OptunaMode)

    def mode(self, kind: type[Mode]) -> Mode | None:
        """Return the mode of this class; None if the sweep has none."""
        return next((mode for mode in self.modes if isinstance(mode, kind)), None)

    def cells(self) -> Iterator[Cell]:
        """Yield every point of the product of the modes: random draws x list x zip x grid.

        Coordinates are in that order, those of a section as in the file, and the last one varies
        fastest. A sweep with a sequential mode yields nothing: `expand` gives the cells of a
        suggestion.
        """
        if self.sequential is None:
            yield from self._expand({})

    def expand(self, suggested: Mapping[str, Any]) -> list[Cell]:
        """Return the cells of one suggestion, whose coordinates come first."""
        return list(self._expand(suggested))

    def controls_of(self, cells: Iterable[Mapping[str, Any]]) -> Iterator[Cell]:
        """Yield the controls of cells, each once.

        A control has the coordinates of its cell except those that make it a control. Several
        cells may have the same control: it then has the coordinates of the first of them.

        cells: the coordinates of each cell.
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
        hold_out(config)
        return Cell(varied, config)

    def describe(self) -> str:
        """Return in words what is searched and how many cells that makes."""
        count = self.count
        cells = f"{count} cell{'s' * (count != 1)}"
        planned = " x ".join(mode.describe() for mode in self.planned)
        led = self.sequential
        if led is None:
            return f"{planned} = {cells}" if planned else "a single cell"
        detail = f"{led.describe()}; {planned}" if planned else led.describe()
        return f"{led.name}: up to {led.trials} suggestions x {cells} ({detail})"

    def open_axes(self) -> dict[str, list[Any]]:
        """Return what has to be pinned to leave a single cell: values, or examples, by key."""
        found: dict[str, list[Any]] = {}
        for mode in self.modes:
            found |= mode.open_axes()
        return found

    def _expand(self, suggested: Mapping[str, Any]) -> Iterator[Cell]:
        for points in itertools.product(*(mode.points() for mode in self.planned)):
            varied = dict(suggested)
            for point in points:
                varied |= point
            yield self.cell(varied)
