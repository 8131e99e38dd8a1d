"""What a launch may be led by (`Study`), and a study of Optuna: ask and tell, on disk.

``search/<study>/<number>.asked.json`` in the sweep's folder is a suggestion, ``.told.json`` beside
it what came of it. Each is written once, atomically, so a process may be killed at any time and
launches may run side by side. Optuna's model is built anew from these files for every suggestion:
it depends on them and on the seed, never on a process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from btu.errors import UserError
from btu.seeding import derive_seed
from orchestrator.run.progress import label
from orchestrator.store.storage import open_storage
from orchestrator.sweep.space import Choice, Domain, OptunaSpec
from orchestrator.sweep.sweep import Cell, Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

# Metrics of a cell: the first is to be low, the second high.
OBJECTIVES = ("asr", "cacc")
ASKED, TOLD = ".asked.json", ".told.json"
# Optuna's own 50 would leave a sweep of tens of suggestions in the random first generation.
POPULATION = 20


@dataclass(frozen=True)
class Suggestion:
    """number: in the study, from 0. values: of the searched keys. cells: to be measured for it."""

    number: int
    values: Mapping[str, Any]
    cells: list[Cell]


class Study(Protocol):
    """Suggests cells while a sweep runs, from what the ones before have measured."""

    @property
    def open(self) -> int:
        """How many suggestions are missing, as far as that is known."""

    @property
    def exhausted(self) -> bool:
        """Whether `ask` gives nothing more, whatever is told."""

    def asked(self) -> list[Suggestion]:
        """Return the suggestions made so far, by this launch and by earlier ones."""

    def untold(self) -> set[int]:
        """Return the numbers of those of which nothing was told: interrupted, or going on."""

    def ask(self) -> Suggestion | None:
        """Return a new suggestion; None if there is none before more is told, or none at all."""

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        """Say what a suggestion's cells measured: all of them, or nothing if one has failed.

        What was told of it earlier stands.
        """

    def findings(self) -> list[str]:
        """Return what came of it, in lines for people."""


class StudySearch:
    """The study of one search space, sampler, seed and config.

    Another number of trials goes on with the same study; whatever else changes starts a new one.
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
        """Return the suggestions made so far, told or not, as far as `trials` goes."""
        return [self._suggestion(n) for n in sorted(self._asked) if n < self._spec.trials]

    def untold(self) -> set[int]:
        """Return the numbers of those that were never told.

        Left by a process that was interrupted, or, to no harm, in the hands of another launch.
        """
        return {n for n in self._asked if n < self._spec.trials and n not in self._told}

    @property
    def open(self) -> int:
        """How many of the `trials` have not been told yet, asked for or not."""
        self._read()
        return sum(number not in self._told for number in range(self._spec.trials))

    @property
    def exhausted(self) -> bool:
        """Whether all of the `trials` have been asked for."""
        return all(number in self._asked for number in range(self._spec.trials))

    def retry_failed(self) -> None:
        """Take what was told as failed as never told."""
        for number in [n for n, told in self._told.items() if told is None]:
            self._storage.remove(self._path(number, TOLD))
            del self._told[number]

    def ask(self) -> Suggestion | None:
        """Return the next suggestion that nobody has; None when all are used up.

        Raises:
            UserError: a file of the study is damaged.
        """
        while True:
            self._read()
            number = next(n for n in range(len(self._asked) + 1) if n not in self._asked)
            if number >= self._spec.trials:
                return None
            record = self._suggest(number)
            # False: another launch has taken this number meanwhile.
            if self._storage.create(self._path(number, ASKED), json.dumps(record).encode()):
                self._asked[number] = record
                return self._suggestion(number)

    def tell(self, number: int, results: Sequence[Mapping[str, float]]) -> None:
        """Record what a suggestion's cells measured; what was told of it earlier stands.

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

        By rising ASR. No other suggestion is at least as good in both and better in one.
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
        """Take in the files that are not known yet."""
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
                    f"what is called {number:06d} there, and it is suggested anew."
                ) from error

    def _path(self, number: int, suffix: str) -> str:
        return f"{self._folder}/{number:06d}{suffix}"

    def _suggestion(self, number: int) -> Suggestion:
        values = self._asked[number]["values"]
        return Suggestion(number, values, self._sweep.expand(values))

    def _suggest(self, number: int) -> dict[str, Any]:
        """Let Optuna suggest. params: in its own terms. system: what its sampler noted."""
        with warnings.catch_warnings():
            # Announcements of what is new or experimental, on import and on use.
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
        # Several suggestions are out at once: they keep a distance from each other.
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


def _study_name(sweep: Sweep, spec: OptunaSpec) -> str:
    acts = {
        "space": {key: [type(d).__name__, asdict(d)] for key, d in spec.space.items()},
        "sampler": spec.sampler,
        "seed": spec.seed,
        "config": {key: value for key, value in sweep.base.items() if key != "resources"},
        "axes": [dict(sweep.grid), dict(sweep.zipped), list(sweep.listed)],
    }
    text = json.dumps(acts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        # By position: Optuna takes no lists, and takes 1 and true for the same.
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
