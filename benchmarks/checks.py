"""What has to hold of a finished sweep: its runs in MLflow, and what was computed how often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

# Problems of one kind that are named; of more, only their number is told.
SHOWN = 5


class Run(NamedTuple):
    """A cell's run in MLflow: the cell's key, and the run's status."""

    cell: str
    status: str


def runs_of(output: Path, name: str) -> list[Run]:
    """Return the runs of the cells of a sweep in its output folder's SQLite store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return []
    found: list[Any] = []
    token = None
    while True:
        # The summary is a run too, of no cell.
        page = client.search_runs(
            [experiment.experiment_id], "tags.kind = 'trial'", max_results=1000, page_token=token
        )
        found += page
        token = page.token
        if not token:
            break
    return [Run(run.data.tags["cell"], run.info.status) for run in found]


def wrong_runs(cells: Collection[str], runs: Iterable[Run]) -> list[str]:
    """Return what is wrong with the runs: every cell has one, FINISHED, and there are no others."""
    by_cell: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        by_cell[run.cell].append(run.status)
    wrong = [f"cell {cell} has no run" for cell in sorted(set(cells) - set(by_cell))]
    for cell, states in sorted(by_cell.items()):
        if cell not in cells:
            wrong.append(f"a run is of {cell}, which is no cell of the sweep")
        elif states != ["FINISHED"]:
            wrong.append(f"cell {cell} has the runs {', '.join(sorted(states))}")
    return wrong


@dataclass(frozen=True)
class Kill:
    """A SIGKILL, and what it may have cut short.

    time: Unix time in seconds.
    launch: the id of the launch whose driver was killed, with all its workers; empty if one worker
        was killed.
    computing: keys that the killed worker computed. Unused for a driver.
    committed: keys that had a result when it was killed. No computation of these was cut short.
    """

    time: float
    launch: str = ""
    computing: frozenset[str] = frozenset()
    committed: frozenset[str] = frozenset()

    def cut_short(self, key: str, launch: str) -> bool:
        """Return whether the kill ended a computation of a key by a launch."""
        if key in self.committed:
            return False
        return launch == self.launch if self.launch else key in self.computing


def wrong_computations(
    journal: Iterable[Mapping[str, Any]],
    committed: Mapping[str, float],
    kills: Sequence[Kill],
) -> list[str]:
    """Return what is wrong with how often keys were computed.

    A key is computed once, and once more for each kill that cut a computation of it short. Nothing
    begins once its result is committed.

    journal: the events of a sweep.
    committed: Unix time of each commit, by key.
    kills: everything that was killed.
    """
    begun: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in journal:
        if event["event"] == "compute":
            begun[event["key"]].append(event)
    without = sorted(set(begun) - set(committed))
    wrong = [f"{key} was computed, and has no result" for key in without]
    for key, events in sorted(begun.items()):
        events.sort(key=lambda event: event["time"])
        unused = list(kills)
        for earlier, later in pairwise(events):
            explains = [kill for kill in unused if _explains(kill, earlier, later)]
            if explains:
                unused.remove(explains[0])
            else:
                wrong.append(f"{key} was computed again, and no kill had cut it short")
        if events[-1]["time"] > committed.get(key, float("inf")):
            wrong.append(f"{key} was computed again after its result was committed")
    return wrong


def _explains(kill: Kill, earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Return whether a kill is why a key was computed a second time."""
    return kill.time <= later["time"] and kill.cut_short(earlier["key"], earlier["launch"])


def computations(journal: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Return how often each key was computed."""
    return Counter(event["key"] for event in journal if event["event"] == "compute")


def told(problems: Sequence[str]) -> str:
    """Return some problems as a text; ``none`` where there are none."""
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more if problems else "none"
