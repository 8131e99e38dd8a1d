"""A launch that a test drives by hand: toy cells, a store on disk, reports instead of workers."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from btu.result_files import RESULT, dumps
from btu.stages import Stage, StageFunction
from orchestrator.plan.planner import Plan, PlannedCell, Planner, RefusedCell
from orchestrator.results.folder import Results
from orchestrator.run.driver import Driver, Idle
from orchestrator.run.progress import SweepProgress
from orchestrator.run.schedule import CELL, Task
from orchestrator.run.worker import Outcome, Report
from orchestrator.store.store import Store
from orchestrator.sweep.load import load_sweep, resolve
from orchestrator.sweep.sweep import Cell, Sweep

NOTHING = StageFunction(lambda run: {}, 1, "toys:none")
# The stages of a cell, inputs first. `SHARED` are those that all cells of a seed have in common.
SHARED, OWN = ("rows", "train"), ("unlearn", "evaluate", CELL)
# A folder that is not there: its size is unknown, and no hub is asked.
WHERE = {"victim": {"name": "/nowhere"}}
ALPHA = "defense.alpha"
# Sweep files of one cell and of two.
ONE = "seed: 0\ngrid: {defense.alpha: [0.01]}\n"
TWO = "grid: {defense.alpha: [0.01, 0.04]}\n"


def toy_cell(varied: Mapping[str, Any]) -> Stage:
    """Return a cell on four stages; two models, of which `unlearn` reads that of `train`."""
    seed = varied.get("seed", 0)
    rows = Stage("rows", NOTHING, {"rows of": seed}, kind="host", units=1)
    train = Stage(
        "train", NOTHING, {"seed": seed}, {"rows": rows}, WHERE, kind="stage", units=1, model=True
    )
    own = {"alpha": varied.get(ALPHA), "seed": seed}
    unlearn = Stage(
        "unlearn", NOTHING, own, {"model": train}, WHERE, kind="cell", units=1, model=True
    )
    evaluate = Stage("evaluate", NOTHING, own, {"model": unlearn}, kind="cell", units=1)
    inputs = {"rows": rows, "train": train, "unlearn": unlearn, "evaluate": evaluate}
    return Stage(CELL, NOTHING, own, inputs, light=tuple(inputs), kind="host")


class ToyPlanner(Planner):
    """Plans toy cells. refused: thresholds that cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[float] = set()

    def add(self, plan: Plan, cells: Iterable[Cell]) -> list[PlannedCell]:
        new = []
        for cell in cells:
            stage = toy_cell(cell.varied)
            if cell.varied.get(ALPHA) in self.refused:
                plan.refused.append(RefusedCell(cell.varied, "no such threshold."))
            elif stage.key not in plan.cells:
                new.append(PlannedCell(stage, resolve(cell.config), cell.varied))
                plan.cells[stage.key] = new[-1]
        return new


def metrics(varied: Mapping[str, Any]) -> dict[str, float]:
    """Return what a cell measures: ASR is 1 below a threshold of 0.02 and 0 from there on."""
    return {"asr": float(varied[ALPHA] < 0.02), "cacc": 0.9}


class ByHand:
    """A driver in the middle of its launch, and the store that it works on.

    now: its clock, in seconds. screen: what the user sees.
    """

    def __init__(self, sweep: Sweep, plan: Plan, planner: ToyPlanner, **options: Any) -> None:
        self.plan, self.now = plan, 1000.0
        self.screen = io.StringIO()
        progress = SweepProgress(Console(file=self.screen, width=500))
        self.store = Store(sweep.store_location, warn=progress.note, clock=lambda: self.now)
        self.results = Results(sweep.output, sweep.name, self.store)
        self.driver = Driver(
            sweep, plan, planner, progress, self.results, clock=lambda: self.now, **options
        )
        self._stack = ExitStack()
        self.driver.prepare()
        self._stack.enter_context(self.driver.underway())

    def leave(self) -> None:
        """End the launch, or act as if its process had ended."""
        self._stack.close()

    @property
    def said(self) -> str:
        """The screen, with runs of white space as one space."""
        return " ".join(self.screen.getvalue().split())

    def take(self, name: str | None = None) -> Task:
        """Take the next task, which a worker starts; check its name."""
        task = self.driver.next_task()
        assert isinstance(task, Task), task
        assert name in (None, task.stage.name), task.stage.name
        self.driver.started(task)
        return task

    def publish(self, stage: Stage) -> None:
        """Put a result into the store."""
        made = self.store.workspace(stage.key)
        if stage.model:
            (made / "model").mkdir()
            (made / "model" / "weights").write_text("big")
        if stage.name == CELL:
            varied = self.plan.cells[stage.key].varied
            config = {"attack": {"name": "badnets"}, "defense": {"name": "btu"}}
            result = {"config": config, "started": 1.0, "ended": 2.0, "metrics": metrics(varied)}
            (made / RESULT).write_text(dumps(result))
        else:
            (made / "out.txt").write_text(stage.name)
        self.store.publish(stage.key, made, stage.name, {})

    def finish(self, task: Task, **facts: Any) -> None:
        """Publish the result of a task and report it."""
        self.publish(task.stage)
        self.driver.ended(task, Report(Outcome.done, **{"seconds": 2.0, **facts}))

    def fails(self, task: Task, reason: str = "loss became nan") -> None:
        """Record and report a failure, as a worker does."""
        stage = task.stage
        self.store.fail(stage.key, {"key": stage.key, "stage": stage.name, "reason": reason})
        self.driver.ended(task, Report(Outcome.failed, reason=reason))

    def run_all(self) -> Counter[str]:
        """Run what is left, one after the other; return how often each stage ran, by name."""
        ran: Counter[str] = Counter()
        while isinstance(task := self.driver.next_task(), Task):
            self.driver.started(task)
            ran[task.stage.name] += 1
            self.finish(task)
        assert task is Idle.finished
        return ran

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind in the sweep's journal."""
        return [event for event in self.results.journal() if event["event"] == kind]


def begin(folder: Path, text: str, planner: ToyPlanner, **options: Any) -> ByHand:
    """Begin a launch of a sweep file's text, with results in `folder`."""
    file = folder / "toy.yaml"
    file.write_text(f"output: {folder / 'runs'}\ncontrols: []\n{text}")
    sweep = load_sweep(file)
    plan = Plan()
    planner.add(plan, sweep.cells())
    return ByHand(sweep, plan, planner, **options)


class Launches:
    """Launches of one sweep, one after the other, with results in `folder`.

    planner: plans their cells.
    """

    def __init__(self, folder: Path) -> None:
        self.planner = ToyPlanner()
        self._folder = folder
        self._made: list[ByHand] = []

    def __call__(self, text: str = TWO, **options: Any) -> ByHand:
        """Begin the next launch. text: of the sweep file. options: of the driver."""
        self._made.append(begin(self._folder, text, self.planner, **options))
        return self._made[-1]

    def leave(self) -> None:
        """End those that were not ended."""
        for made in self._made:
            made.leave()


def models(hand: ByHand) -> Counter[str]:
    """Return by stage how many models there are."""
    names = (marker.name for marker in hand.store.markers() if not marker.dropped)
    return Counter(name for name in names if name in ("train", "unlearn"))
