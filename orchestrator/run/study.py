"""Where the cells of a launch come from while it runs: a `Study`, and that of Optuna on disk.

``search/<study>/<number>.asked.json`` in the sweep's folder is a suggestion, ``.told.json`` beside
it the result of it. Each is written once, atomically, so a process may be killed at any time and
launches may run side by side. Optuna's model is rebuilt from these files for every suggestion: it
depends on them and on the seed, never on a process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from btu.errors import UserError
from btu.seeding import derive_seed
from orchestrator.plan.planner import Plan, PlannedCell, Planner
from orchestrator.plan.work import blocked
from orchestrator.results.folder import Results
from orchestrator.run.progress import label
from orchestrator.store.storage import open_storage
from orchestrator.sweep.modes.base import SequentialMode
from orchestrator.sweep.modes.optuna import OptunaMode
from orchestrator.sweep.space import Choice, Domain
from orchestrator.sweep.sweep import Cell, Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

# Metrics of a cell: the first is minimized, the second maximized.
OBJECTIVES = ("asr", "cacc")
ASKED, TOLD = ".asked.json", ".told.json"
# With Optuna's default of 50, a sweep of tens of suggestions would not get beyond the first
# generation, which is random.
POPULATION = 20


@dataclass(frozen=True)
class Suggestion:
    """Values to try.

    number: its place in the study, from 0.
    values: by searched key.
    cells: what has to be measured for it.
    """

    number: int
    values: Mapping[str, Any]
    cells: list[Cell]


class Study(Protocol):
    """Suggests cells while a sweep runs, from what the ones before have measured."""

    @property
    def open(self) -> int:
        """How many suggestions have no result yet, as far as that is known."""

    @property
    def exhausted(self) -> bool:
        """Whether `ask` gives nothing more, whatever the results."""

    def asked(self) -> list[Suggestion]:
        """Return the suggestions made so far, by this launch and by others."""

    def untold(self) -> set[int]:
        """Return the numbers of the suggestions without a result: interrupted, or running."""

    def ask(self) -> Suggestion | None:
        """Return a new suggestion; None if there is none before further results, or none at all."""

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        """Record what a suggestion's cells measured; an earlier record is kept.

        results: metrics of every cell; none if one has failed.
        """

    def findings(self) -> list[str]:
        """Return the results of the study, in lines for users."""


class NoStudy(Study):
    """Suggests nothing: for a sweep whose cells are all known."""

    open = 0
    exhausted = True

    def asked(self) -> list[Suggestion]:
        return []

    def untold(self) -> set[int]:
        return set()

    def ask(self) -> Suggestion | None:
        return None

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        raise KeyError(f"suggestion {number} was never asked for.")

    def findings(self) -> list[str]:
        return []


class Suggestions:
    """A study during one launch: the cells of its suggestions, and the results that it gets."""

    def __init__(
        self,
        study: Study,
        plan: Plan,
        planner: Planner,
        results: Results,
        note: Callable[[str], None],
    ) -> None:
        """Take in nothing yet.

        study: suggests cells.
        plan: grows by the cells.
        planner: checks the cells.
        results: where their metrics are read.
        note: prints a line for the user.
        """
        self.study = study
        self._plan, self._planner, self._results, self._note = plan, planner, results, note
        # By number, until all their cells have ended.
        self._waiting: dict[int, list[PlannedCell]] = {}
        self._own: set[int] = set()  # those of them that this launch asked for

    @property
    def searching(self) -> bool:
        """Whether further suggestions may come."""
        return not self.study.exhausted

    @property
    def running(self) -> int:
        """How many suggestions of this launch have cells that have not ended."""
        return len(self._own)

    def resume(self) -> None:
        """Take in the cells of every suggestion of earlier launches."""
        untold = self.study.untold()
        for suggestion in self.study.asked():
            cells = self._planned(suggestion)
            if cells and suggestion.number in untold:
                self._waiting[suggestion.number] = cells

    def ask(self) -> list[PlannedCell] | None:
        """Take in the cells of a new suggestion and return them.

        Returns [] if the suggestion cannot run, None if the study has none now.
        """
        suggestion = self.study.ask() if self.searching else None
        if suggestion is None:
            return None
        cells = self._planned(suggestion)
        if cells:
            self._waiting[suggestion.number] = cells
            self._own.add(suggestion.number)
        return cells

    def tell(
        self, committed: Collection[str], failed: Mapping[str, str], key: str | None = None
    ) -> None:
        """Tell the study of every suggestion whose cells have all ended.

        committed: keys with a result.
        failed: reasons by key.
        key: a cell that has just ended; only its suggestions are looked at. None: all are.
        """
        for number, cells in list(self._waiting.items()):
            if key is not None and all(cell.key != key for cell in cells):
                continue
            if any(c.key not in committed and blocked(c.stage, failed) is None for c in cells):
                continue
            records = [self._results.record(cell.key, cell.varied) for cell in cells]
            # A suggestion with a failed cell has no mean over its cells: it counts as failed.
            told = [record["metrics"] for record in records if record is not None]
            self.study.tell(number, told if len(told) == len(cells) else [])
            del self._waiting[number]
            self._own.discard(number)

    def _planned(self, suggestion: Suggestion) -> list[PlannedCell]:
        """Take a suggestion's cells into the plan; [] if one of them cannot run."""
        found = Plan()
        cells = self._planner.add(found, suggestion.cells)
        if found.refused:
            # Without one of its cells a suggestion has no mean over them.
            self._note(f"suggestion refused: {found.refused[0].reason}")
            self.study.tell(suggestion.number, [])
            return []
        return [self._plan.cells.setdefault(cell.key, cell) for cell in cells]


class StudySearch(Study):
    """The study of one search space, sampler, seed and config.

    A different number of trials continues the same study; any other change starts a new one.
    """

    def __init__(self, sweep: Sweep, folder: str | Path) -> None:
        """folder: path or URL of the sweep's folder.

        Raises:
            ValueError: Optuna does not search this sweep.
        """
        if sweep.optuna is None:
            raise ValueError(f"sweep '{sweep.name}' has no section optuna.")
        self._sweep, self._spec = sweep, sweep.optuna
        self._storage = open_storage(folder)
        self._folder = f"search/{_study_name(sweep, sweep.optuna)}"
        self._asked: dict[int, dict[str, Any]] = {}
        self._told: dict[int, dict[str, float] | None] = {}
        self._read()

    def asked(self) -> list[Suggestion]:
        """Return the suggestions made so far, with or without a result, up to `trials`."""
        return [self._suggestion(n) for n in sorted(self._asked) if n < self._spec.trials]

    def untold(self) -> set[int]:
        """Return the numbers of the suggestions without a result.

        They were left by a process that was interrupted, or another launch computes them, which
        does no harm.
        """
        return {n for n in self._asked if n < self._spec.trials and n not in self._told}

    @property
    def open(self) -> int:
        """How many of the `trials` have no result yet, asked for or not."""
        self._read()
        return sum(number not in self._told for number in range(self._spec.trials))

    @property
    def exhausted(self) -> bool:
        """Whether all of the `trials` have been asked for."""
        return all(number in self._asked for number in range(self._spec.trials))

    def retry_failed(self) -> None:
        """Forget which suggestions have failed: they have no result any more."""
        for number in [n for n, told in self._told.items() if told is None]:
            self._storage.remove(self._path(number, TOLD))
            del self._told[number]

    def ask(self) -> Suggestion | None:
        """Return the next suggestion that no launch has; None when all are used up.

        Raises:
            UserError: a file of the study is damaged.
        """
        while True:
            self._read()
            number = next(n for n in range(len(self._asked) + 1) if n not in self._asked)
            if number >= self._spec.trials:
                return None
            record = self._suggest(number)
            # False: another launch has just taken this number.
            if self._storage.create(self._path(number, ASKED), json.dumps(record).encode()):
                self._asked[number] = record
                return self._suggestion(number)

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        """Record what a suggestion's cells measured; an earlier record is kept.

        results: metrics of every cell. If there are none, or an ``asr`` or ``cacc`` is missing or
            not finite, the suggestion counts as failed.

        Raises:
            KeyError: there is no such suggestion.
        """
        if number not in self._asked:
            raise KeyError(f"suggestion {number} was never asked for.")
        columns = {name: [cell.get(name, math.nan) for cell in results] for name in OBJECTIVES}
        usable = results and all(map(math.isfinite, itertools.chain(*columns.values())))
        told = {name: fmean(column) for name, column in columns.items()} if usable else None
        if self._storage.create(self._path(number, TOLD), json.dumps(told).encode()):
            self._told[number] = told

    def best(self) -> list[dict[str, Any]]:
        """Return the Pareto front: ``number``, ``values`` and the mean ``asr`` and ``cacc``.

        Sorted by ASR. No other suggestion is at least as good in both and better in one.
        """
        self._read()
        done = [(number, told) for number, told in sorted(self._told.items()) if told is not None]
        front = [
            {"number": number, "values": self._asked[number]["values"], **told}
            for number, told in done
            if not any(_beats(other, told) for _, other in done)
        ]
        return sorted(front, key=lambda entry: (entry["asr"], entry["number"]))

    def findings(self) -> list[str]:
        """Return a line for each of the best."""
        return [
            f"best: asr {best['asr']:.3f} cacc {best['cacc']:.3f} with {label(best['values'])}"
            for best in self.best()
        ]

    def _read(self) -> None:
        """Read the files that were not read before."""
        for name in self._storage.names(self._folder):
            number = int(name.partition(".")[0])
            known: dict[int, Any] = self._asked if name.endswith(ASKED) else self._told
            if number in known:
                continue
            try:
                known[number] = json.loads(self._storage.read(f"{self._folder}/{name}"))
            except ValueError as error:
                raise UserError(
                    f"{self._storage.location}/{self._folder}/{name} is damaged ({error}); remove "
                    f"what is called {number:06d} there, and it is suggested again."
                ) from error

    def _path(self, number: int, suffix: str) -> str:
        return f"{self._folder}/{number:06d}{suffix}"

    def _suggestion(self, number: int) -> Suggestion:
        values = self._asked[number]["values"]
        return Suggestion(number, values, self._sweep.expand(values))

    def _suggest(self, number: int) -> dict[str, Any]:
        """Let Optuna suggest.

        Returns ``values`` by key, ``params``, the same in Optuna's terms, and ``system``, the notes
        of its sampler.
        """
        with warnings.catch_warnings():
            # Optuna announces new and experimental features, on import and on use.
            warnings.simplefilter("ignore")
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            study = optuna.create_study(
                directions=["minimize", "maximize"], sampler=self._sampler(number)
            )
            space = {key: _distribution(d) for key, d in sorted(self._spec.space.items())}
            study.add_trials([self._trial(n, space) for n in sorted(self._asked)])
            study.ask(space)
            trial = study.get_trials(deepcopy=False)[-1]
        return {
            "values": {key: _value(d, trial.params[key]) for key, d in self._spec.space.items()},
            "params": trial.params,
            "system": trial.system_attrs,
        }

    def _sampler(self, number: int) -> BaseSampler:
        from optuna import samplers

        seed = derive_seed(self._spec.seed, "optuna", number) % 2**32
        if self._spec.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if self._spec.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
        # Several suggestions run at once; this keeps them apart from each other.
        return samplers.TPESampler(seed=seed, constant_liar=True)

    def _trial(self, number: int, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        told = self._told.get(number)
        state = TrialState.COMPLETE if told else TrialState.RUNNING
        if number in self._told and not told:
            state = TrialState.FAIL
        return create_trial(
            state=state,
            values=[told[name] for name in OBJECTIVES] if told else None,
            params=self._asked[number]["params"],
            distributions=dict(space),
            system_attrs=self._asked[number]["system"],
        )


# A sequential mode -> the study that suggests its points.
STUDIES: dict[type[SequentialMode], type[StudySearch]] = {OptunaMode: StudySearch}


def study_of(mode: SequentialMode, sweep: Sweep) -> StudySearch:
    """Return the study of a sweep's sequential mode, from the sweep's folder."""
    return STUDIES[type(mode)](sweep, sweep.folder)


def _study_name(sweep: Sweep, spec: OptunaMode) -> str:
    # These three are always present, so that a study on disk keeps its name.
    axes: dict[str, Any] = {"grid": {}, "zip": {}, "list": []}
    axes |= {mode.name: mode.config() for mode in sweep.planned}
    acts = {
        "space": {key: [type(d).__name__, asdict(d)] for key, d in spec.space.items()},
        "sampler": spec.sampler,
        "seed": spec.seed,
        "config": {key: value for key, value in sweep.base.items() if key != "resources"},
        "axes": list(axes.values()),
    }
    text = json.dumps(acts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        # By position: Optuna accepts no lists, and treats 1 and true as equal.
        return CategoricalDistribution(range(len(domain.values)))
    if domain.whole:
        low, high, step = int(domain.low), int(domain.high), int(domain.step or 1)
        return IntDistribution(low, high, log=domain.log, step=step)
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def _value(domain: Domain, param: Any) -> Any:
    return domain.values[param] if isinstance(domain, Choice) else domain.snap(param)


def _beats(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is at least as good in both objectives and better in one."""
    return (
        one["asr"] <= other["asr"]
        and one["cacc"] >= other["cacc"]
        and (one["asr"] < other["asr"] or one["cacc"] > other["cacc"])
    )
