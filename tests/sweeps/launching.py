"""Launches in processes of their own, faults on demand, and checks of what is left afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from orchestrator.results.folder import Results, find_sweep

# A cold start of Ray with two workers that import torch, on a busy machine.
LIMIT = 300.0
FAULTS = Path(__file__).parent / "faults"
# Two cells that share twelve stages; each has five more of its own.
ALPHAS = [0.01, 0.02]
GRID: dict[str, list[Any]] = {"defense.alpha": ALPHAS}
SHARED, OWN = 12, 5


class Done:
    """A command that has ended. out, err: runs of white space are one space."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.seconds = code, seconds
        self.out, self.err = (" ".join(text.split()) for text in (out, err))

    def __repr__(self) -> str:
        return f"exit {self.code} after {self.seconds:.0f} s\n{self.out}\n{self.err}"


class Command:
    """A running ``btu`` command."""

    def __init__(self, arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.started = time.monotonic()
        # Files, not pipes: a pipe stays open while any process of a dead driver lives.
        self._logs = [folder / f"{time.time_ns()}.{name}" for name in ("out", "err")]
        with self._logs[0].open("wb") as out, self._logs[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", *arguments],
                cwd=folder,
                env={**os.environ, **environment},
                stdout=out,
                stderr=err,
            )

    def end(self, limit: float = LIMIT) -> Done:
        code = self.process.wait(limit)
        out, err = (log.read_text() for log in self._logs)
        return Done(code, out, err, time.monotonic() - self.started)

    def workers(self) -> list[psutil.Process]:
        """Return the Ray workers that are inside a trial."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                # Ray names a worker after what it executes: "ray::ImplicitFunc.train".
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if title.startswith("ray::") and ".train" in title:
                found.append(child)
        return found


class Workplace:
    """Starts commands in a folder, and ends those that still run.

    output: where the sweeps' results go. faulty: whether `fault` acts on the commands.
    """

    def __init__(self, folder: Path, database: Path | None = None, *, faulty: bool = False) -> None:
        self.folder, self.output = folder, folder / "runs"
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            # One worker: each spends ten CPU seconds on imports, far more than it computes here.
            "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',
        }
        self._faults: dict[str, dict[str, Any]] = {}
        self._running: list[Command] = []
        if faulty:
            self.environment["BTU_FAULTS"] = str(folder / "faults.json")
            paths = [str(FAULTS), os.environ.get("PYTHONPATH", "")]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            self.fault()
        if database is not None:
            # Creating the tables takes seconds, in every test.
            self.output.mkdir()
            shutil.copy(database, self.output / "mlflow.db")

    def fault(self, stage: str = "", **what: Any) -> None:
        """Set the fault of a stage from now on. Without `what`, the stage has none.

        stage: its name or key. "tracking" is the writing of a run: it is held after MLflow has
            created the run, before anything is logged to it.
        held: the stage computes, and then waits until this changes.
        raises: the text of a RuntimeError that the stage raises.
        parts: the stage runs out of memory until batches are cut into so many parts.
        tells: a file where the stage writes the environment of its process, as JSON.
        """
        if what.get("held"):
            # It keeps its worker: other stages need a second one.
            self.environment.pop("RAY_OVERRIDE_RESOURCES", None)
        self._faults[stage] = what
        staged = self.folder / "faults.new"
        staged.write_text(json.dumps(self._faults))
        staged.replace(self.folder / "faults.json")

    def start(self, *arguments: object) -> Command:
        """Start ``btu <arguments>``."""
        self._running.append(Command([str(a) for a in arguments], self.folder, self.environment))
        return self._running[-1]

    def run(self, *arguments: object, limit: float = LIMIT) -> Done:
        """Run ``btu <arguments>`` to its end."""
        return self.start(*arguments).end(limit)

    def results(self, name: str = "tiny") -> Results:
        return find_sweep(self.output, name)

    def close(self) -> None:
        for command in self._running:
            end_tree(command.process)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of this test that still runs, and its children."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            if child.is_running():
                child.kill()


def wait_for(what: Callable[[], Any], command: Command | None = None, limit: float = LIMIT) -> Any:
    """Return a function's first true value; fail if the command ends before, or after `limit`."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended = command is not None and command.process.poll() is not None
        found = what()
        if found:
            return found
        assert not ended, command and command.end(1)
        time.sleep(0.1)
    raise AssertionError(f"waited {limit:.0f} s in vain; {command and command.process.poll()}")


def planned(output: Path, name: str) -> bool:
    """Return whether a sweep has a plan. Its folder exists a moment earlier."""
    return any((output / name / "plans").glob("[!.]*"))


def holder(place: Workplace, stage: str, but: int = 0) -> psutil.Process | None:
    """Return the process that has computed a stage but not committed it.

    stage: its name or key. but: a process id to ignore.
    """
    if not planned(place.output, "tiny"):
        return None
    for key, name in names_by_key(place.results()).items():
        lease = place.output / "store" / "leases" / f"{key}.json"
        computed = list((place.output / "store" / "entries" / key).glob("*/record.json"))
        if stage in (key, name) and computed and lease.exists():
            pid = json.loads(lease.read_text())["pid"]
            if pid != but and psutil.pid_exists(pid):
                return psutil.Process(pid)
    return None


def own_stages(results: Results, cell: str) -> dict[str, str]:
    """Return the keys of a cell's stages, by name."""
    return {name: key for key, name in results.cells()[cell].stages.items()}


class Server:
    """An MLflow server that can be stopped and restarted.

    database: its SQLite file. folder: where its log and its artifacts go.
    """

    def __init__(self, database: Path, folder: Path, port: int) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri",
            f"sqlite:///{database}", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        ]  # fmt: skip
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        import urllib.request

        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log
            )

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        wait_for(answers, limit=120)

    def stop(self) -> None:
        if self._process is not None:
            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            self._process.wait()
            for child in children:
                if child.is_running():
                    child.kill()
            psutil.wait_procs(children, timeout=10)
            self._process = None


def journal(output: Path, name: str = "tiny") -> list[dict[str, Any]]:
    """Return a sweep's journal; an empty one if the sweep has not begun."""
    path = output / name / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def names_by_key(results: Results) -> dict[str, str]:
    """Return the name of every stage and cell of a sweep."""
    names: dict[str, str] = {}
    for cell in results.cells().values():
        names |= {**cell.stages, cell.key: "cell"}
    return names


def computed(output: Path, name: str = "tiny") -> Counter[str]:
    """Return by name how often stages were begun."""
    if not planned(output, name):
        return Counter()
    names = names_by_key(find_sweep(output, name))
    events = journal(output, name)
    return Counter(names[e["key"]] for e in events if e["event"] == "compute")


def measured(record: Mapping[str, Any]) -> dict[str, str]:
    """Return metrics and losses, without times, as their repr: then NaN equals NaN."""
    found = {k: repr(v) for k, v in record["metrics"].items() if not k.startswith("seconds")}
    for epoch in record["history"]:
        # Rates are coarse; a loss shows every difference.
        found[f"loss of {epoch['stage']} {epoch['epoch']}"] = repr(epoch["loss"])
    return found


def all_measured(results: Results) -> dict[str, dict[str, str]]:
    return {record["key"]: measured(record) for record in results.records()}


def runs_at(uri: str, name: str = "tiny") -> list[Any]:
    """Return the runs of a sweep that are not deleted, without its summary."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return [run for run in runs if run.data.tags.get("kind") != "summary"]


def check(
    output: Path,
    expected: Mapping[str, Mapping[str, str]],
    *,
    again: Mapping[str, int] | None = None,
    uri: str | None = None,
    name: str = "tiny",
) -> None:
    """Check that a sweep ended as an undisturbed one does.

    output: its output folder.
    expected: metrics by cell, of an undisturbed sweep.
    again: by name, how often stages were begun after their first time.
    uri: of the MLflow store; None is the one in the output folder.
    name: of the sweep.
    """
    results = find_sweep(output, name)
    assert all_measured(results) == expected
    runs = runs_at(uri or f"sqlite:///{output / 'mlflow.db'}", name)
    assert Counter((r.data.tags["cell"], r.info.status) for r in runs) == {
        (key, "FINISHED"): 1 for key in expected
    }
    committed = {marker.key: marker.committed for marker in results.store.markers()}
    begun = [event for event in journal(output, name) if event["event"] == "compute"]
    assert {e["key"] for e in begun} == set(committed)
    assert [e for e in begun if e["time"] > committed[e["key"]]] == []
    names = names_by_key(results)
    more: Counter[str] = Counter()
    for key, count in Counter(event["key"] for event in begun).items():
        more[names[key]] += count - 1
    assert +more == (again or {})
    # No half-written entry is left, and no lease.
    entries = {(p.parent.name, p.name) for p in (output / "store" / "entries").glob("*/*")}
    assert {key for key, _ in entries} == set(committed)
    # A killed process leaves its lease or launch as a file, which has expired.
    assert results.store.leases.in_use() == set()
