"""Between Tune, which knows trials, and the driver, which knows tasks. Without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from orchestrator.run.driver import Driver, Idle
from orchestrator.run.nodes import holds
from orchestrator.run.schedule import Task
from orchestrator.run.worker import Outcome, Report
from orchestrator.sweep.sections import ResourceSpec

# Instead of a trial: none is left to run.
FINISHED = "FINISHED"
# CPUs that a waiting trial reserves: nearly none, but Ray places no trial without a demand.
WAIT_CPUS = 0.001

P = ParamSpec("P")
R = TypeVar("R")


def _guarded(
    method: Callable[Concatenate[Trials, P], R],
) -> Callable[Concatenate[Trials, P], R | None]:
    """Stop the launch in order at an exception: raised inside Tune, it would hang or kill it."""

    @wraps(method)
    def call(self: Trials, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.error = self.error or error
            self._driver.stop(f"{type(error).__name__}: {error}")
            return None

    return call


class Trials:
    """Translates between Tune, which knows trials, and the driver, which knows tasks.

    error: the first exception that was raised here; it has stopped the driver.
    """

    def __init__(
        self,
        driver: Driver,
        resources: ResourceSpec,
        nodes: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """Hand out nothing yet.

        driver: of the launch.
        resources: what its stages ask for.
        nodes: returns the nodes of the cluster, as Ray describes them.
        """
        self._driver, self._resources, self._nodes = driver, resources, nodes
        # What has not ended of the trials that have not ended: tasks, in order. None is a trial
        # that only waits.
        self._tasks: dict[str, list[Task] | None] = {}
        self._progressed: set[str] = set()  # trials of which a stage has ended
        self.error: Exception | None = None

    @_guarded
    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial, None to be asked again, or `FINISHED`."""
        task = self._driver.next_task()
        if task is Idle.later:
            return None
        if task is Idle.finished:
            return FINISHED
        if task is Idle.elsewhere:
            # Without any trial, Tune would sleep for minutes, and not react to Ctrl-C.
            self._tasks[trial_id] = None
            return {"tasks": [], "held": {"cpu": WAIT_CPUS, "gpu": 0.0}}
        tasks = self._driver.chain(task)
        with self._or_back(tasks):
            calls = [self._driver.call(each).to_json() for each in tasks]
            config = {"tasks": calls, "held": self._held(task)}
        self._tasks[trial_id] = tasks
        return config

    @contextmanager
    def _or_back(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Put tasks back on an error: otherwise the driver would wait for their end."""
        try:
            yield
        except Exception:
            for task in tasks:
                self._driver.put_back(task)
            raise

    def _held(self, task: Task) -> dict[str, Any]:
        """Return the resources that Ray reserves for a task, and the labels of its node."""
        cpu, gpu = self._resources.of(task.stage.kind)
        if task.alone:
            # It ran out of memory: nothing else may run on its device, or on its node.
            nodes = [node for node in self._nodes() if node["Alive"]]
            kind = task.stage.kind
            fit = [node["Resources"] for node in nodes if holds(node, self._resources, kind)]
            if gpu > 0:
                gpu = 1.0
            else:
                cpu = max([cpu, *(node.get("CPU", 0) for node in fit)])
        held: dict[str, Any] = {"cpu": cpu, "gpu": gpu}
        if self._resources.custom:
            held["custom"] = dict(self._resources.custom)
        if self._resources.labels:
            held["labels"] = dict(self._resources.labels)
        return held

    @_guarded
    def started(self, trial_id: str) -> None:
        """A worker starts a trial, for the first time or after the previous worker died."""
        tasks = self._tasks.get(trial_id)
        if tasks:
            self._driver.started(tasks[0])

    @_guarded
    def reported(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial reports the stages that have ended so far, and goes on."""
        tasks = self._tasks.get(trial_id)
        if tasks and result.get("more"):
            self._progressed.add(trial_id)
            self._take_in(tasks, result)

    @_guarded
    def ended(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial has ended and reported."""
        if trial_id not in self._tasks:
            return
        tasks = self._tasks.pop(trial_id)
        self._progressed.discard(trial_id)
        if tasks is None:
            self._driver.waited()
        else:
            self._take_in(tasks, result)
            with self._or_back(tasks):
                if tasks:
                    raise RuntimeError(f"a worker said nothing of stage '{tasks[0].stage.name}'.")

    def _take_in(self, tasks: list[Task], result: Mapping[str, Any]) -> None:
        """Pass on how tasks of a trial ended, and remove them; one without a result ends it.

        tasks: that have not ended, in order.
        result: with the reports of the trial's stages by key. After a worker died, the next one
            reports again what the first had reported.
        """
        with self._or_back(tasks):
            reports = json.loads(result["reports"])
            while tasks and tasks[0].stage.key in reports:
                task = tasks.pop(0)
                report = Report.from_json(reports[task.stage.key])
                if report.outcome is not Outcome.done:
                    # First of all: what follows must not fail with it, but wait for it.
                    while tasks:
                        self._driver.put_back(tasks.pop())
                self._driver.ended(task, report)
                if tasks:
                    self._driver.started(tasks[0])

    @_guarded
    def gave_up(self, trial_id: str, error: str) -> None:
        """Every worker of a trial died."""
        if trial_id not in self._tasks:
            return
        tasks = self._tasks.pop(trial_id)
        progressed = trial_id in self._progressed
        self._progressed.discard(trial_id)
        if tasks:
            self._driver.chain_lost(tasks, error, progressed=progressed)
        else:
            self._driver.waited()

    @_guarded
    def looked(self) -> None:
        """Tune has looked whether a trial has ended; it does so many times a second."""
        self._driver.tick()
