"""Whole sweeps on a real local Ray: done, resumed, failed, killed and interrupted.

The command line runs as a process of its own, as a person starts it.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml
from rich.console import Console

from orchestrator.progress import SweepProgress
from orchestrator.store import ResultStore

pytestmark = pytest.mark.slow

# A cold start of Ray with two workers that import torch, on a busy machine.
LIMIT = 300
LONG = {"train": {"epochs": 200}}  # some seconds: time enough to be killed in


class Done:
    """A launch that ended. out, err: white space as single spaces."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.seconds = code, seconds
        self.out, self.err = (" ".join(text.split()) for text in (out, err))

    def __repr__(self) -> str:
        return f"exit {self.code} after {self.seconds:.0f} s\n{self.out}\n{self.err}"


class Launch:
    """A launch that runs."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "launch", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, limit: float = LIMIT) -> Done:
        out, err = self.process.communicate(timeout=limit)
        return Done(self.process.returncode, out, err, time.monotonic() - self.started)

    def worker(self) -> int:
        """Wait for a Ray worker that is inside a trial and return its process id."""
        import psutil

        while self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    title = " ".join(child.cmdline())
                    # Ray names a worker after what it executes: "ray::ImplicitFunc.train".
                    if title.startswith("ray::") and ".train" in title:
                        return int(child.pid)
                except psutil.Error:
                    continue
            if time.monotonic() - self.started > LIMIT:
                break
            time.sleep(0.1)
        raise AssertionError(f"no worker ran a trial: {self.end(20)}")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """A function that starts ``btu launch <arguments>`` in `tmp_path`."""
    running: list[Launch] = []

    def begin(*arguments: object) -> Launch:
        running.append(Launch([str(a) for a in arguments], tmp_path))
        return running[-1]

    yield begin
    for launch in running:
        if launch.process.poll() is None:
            launch.process.send_signal(signal.SIGINT)
            try:
                launch.process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                launch.process.kill()
                launch.process.communicate()


def runs_of(tmp_path: Path, name: str = "tiny") -> list[Any]:
    """Return the sweep's runs in the SQLite store of ``tmp_path/runs``."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def statuses(tmp_path: Path) -> list[str]:
    return sorted(run.info.status for run in runs_of(tmp_path))


def measured(metrics: dict[str, float]) -> dict[str, str]:
    """Return the metrics that do not depend on the clock; repr, so that NaN equals NaN."""
    return {k: repr(v) for k, v in metrics.items() if not k.startswith("seconds")}


def test_a_grid_runs_grows_and_resumes(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"attack.name": ["badnets", "style"], "seed": [0, 1]})
    first = start(sweep).end()
    assert first.code == 0, first
    assert "4 of 4 cells done, 0 failed, 0 not run" in first.out
    # One line a cell, where there is no terminal for a live one.
    assert all(f"[{n}/4]" in first.out for n in range(1, 5))
    assert "badnets seed=1: asr" in first.out
    store = ResultStore(tmp_path / "runs" / "tiny")
    records = {r["key"]: r for r in store.records()}
    assert sorted((r["config"]["attack"]["name"], r["config"]["seed"]) for r in records.values()) \
        == [("badnets", 0), ("badnets", 1), ("style", 0), ("style", 1)]  # fmt: skip
    for key in records:
        assert {p.name for p in store.path(key).iterdir()} >= {
            "result.json", "config.yaml", "tokens.parquet", "flagged_tokens.json", "drift.png",
        }  # fmt: skip
    # Tune's own state is gone.
    assert sorted(p.name for p in store.folder.iterdir()) == ["cells", "failed", "sweep.yaml"]

    runs = runs_of(tmp_path)
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert {run.data.tags["cell"] for run in runs} == set(records)
    for run in runs:
        asr = records[run.data.tags["cell"]]["metrics"]["asr"]
        assert run.data.metrics["asr"] == pytest.approx(asr)

    # A launched cell measures what the same cell does in this process, with as many threads.
    import torch

    from orchestrator.config import resolve
    from orchestrator.trial import run_trial

    threads = torch.get_num_threads()
    one = next(r for r in records.values() if r["varied"] == {"attack.name": "badnets", "seed": 1})
    try:
        here = run_trial(resolve(one["config"]))
    finally:
        torch.set_num_threads(threads)
    assert measured(one["metrics"]) == measured(dict(here.metrics))
    assert {"asr", "detection_precision"} <= set(here.metrics)

    # Again: nothing runs.
    again = start(sweep).end()
    assert again.code == 0, again
    assert "4 of 4 cells are done already and are not run again" in again.out
    assert "[1/4]" not in again.out
    assert again.seconds < first.seconds  # no Ray is started
    assert {r["key"]: r["started"] for r in store.records()} == {
        key: r["started"] for key, r in records.items()
    }
    assert statuses(tmp_path) == ["FINISHED"] * 4

    # A grown grid runs the new cells alone.
    grown = start(sweep, "grid.seed=[0,1,2]").end()
    assert grown.code == 0, grown
    assert "4 of 6 cells are done already" in grown.out
    assert "6 of 6 cells done" in grown.out
    after = {r["key"]: r["started"] for r in store.records()}
    assert len(after) == 6
    assert {key: after[key] for key in records} == {k: r["started"] for k, r in records.items()}
    assert statuses(tmp_path) == ["FINISHED"] * 6


def test_a_relaunch_with_nothing_to_do_needs_no_cluster(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], tmp_path: Path
) -> None:
    # Nothing answers at this address; it is needed only to run cells.
    sweep = make_sweep()
    assert start(sweep).end().code == 0
    done = start(sweep, "--address", "127.0.0.1:1").end()
    assert done.code == 0, done
    assert "1 of 1 cells done" in done.out


def test_a_failing_cell_does_not_stop_the_others(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"train.learning_rate": [1e30, 1e-3]})
    done = start(sweep).end()
    assert done.code == 1, done
    assert "1 of 2 cells done, 1 failed, 0 not run" in done.out
    assert "FAILED: loss became nan" in done.out or "FAILED: loss became inf" in done.out
    assert "Traceback" not in done.err
    store = ResultStore(tmp_path / "runs" / "tiny")
    (failure,) = store.failures()
    assert failure["varied"] == {"train.learning_rate": 1e30}
    assert failure["key"] in done.out
    failed, finished = sorted(runs_of(tmp_path), key=lambda run: run.info.status)
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert failed.data.tags["reason"] == failure["reason"]
    assert "lower the learning rate" in failed.data.tags["reason"]
    assert float(failed.data.params["train.learning_rate"]) == 1e30


def test_refused_cells_are_named_and_the_others_run(
    make_sweep: Callable[..., Path],
    start: Callable[..., Launch],
    plain_folder: Path,
    tmp_path: Path,
) -> None:
    sweep = make_sweep(grid={"attack.name": ["style", "badnets"]}, data={"path": str(plain_folder)})
    done = start(sweep).end()
    assert done.code == 0, done
    assert "refused: style: the style attack needs the paraphrase column 'style'" in done.out
    assert "1 of 1 cells done" in done.out


def test_a_killed_worker_is_tried_again(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], tmp_path: Path
) -> None:
    launch = start(make_sweep(grid={"seed": [0, 1]}, **LONG))
    worker = launch.worker()
    store = ResultStore(tmp_path / "runs" / "tiny")
    assert list(store.records()) == []
    os.kill(worker, signal.SIGKILL)
    done = launch.end()
    assert done.code == 0, done
    assert "2 of 2 cells done, 0 failed, 0 not run" in done.out
    assert len(list(store.records())) == 2
    assert [p.name for p in store.cells.iterdir() if p.name.startswith(".")] == []
    assert statuses(tmp_path) == ["FINISHED"] * 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_sweep_stops_and_goes_on(
    make_sweep: Callable[..., Path],
    start: Callable[..., Launch],
    tmp_path: Path,
    sent: signal.Signals,
) -> None:
    sweep = make_sweep(grid={"seed": [0, 1]}, **LONG)
    store = ResultStore(tmp_path / "runs" / "tiny")
    launch = start(sweep)
    worker = launch.worker()
    launch.process.send_signal(sent)
    began = time.monotonic()
    stopped = launch.end(60)
    assert time.monotonic() - began < 20
    assert stopped.code == 1, stopped
    assert "the same command goes on where this one stopped" in stopped.out
    assert "Traceback" not in stopped.err
    left = len(list(store.records()))
    assert left < 2
    import psutil

    gone_by = time.monotonic() + 10
    while psutil.pid_exists(worker) and time.monotonic() < gone_by:
        time.sleep(0.2)
    assert not psutil.pid_exists(worker)

    done = start(sweep).end()
    assert done.code == 0, done
    assert "2 of 2 cells done" in done.out
    assert statuses(tmp_path) == ["FINISHED"] * 2


def test_a_dead_tracking_server_stops_the_launch_before_ray(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], free_port: int
) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    done = start(make_sweep(), f"tracking.uri={uri}").end(120)
    assert done.code == 2, done
    assert f"error: tracking.uri {uri} does not answer" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("override", "asked"), [("resources.cpu=500", "cpu=500 gpu=0"), ("resources.gpu=1", "gpu=1")]
)
def test_resources_that_no_node_has_are_refused(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], override: str, asked: str
) -> None:
    if "gpu" in override:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    done = start(make_sweep(), override).end()
    assert done.code == 2, done
    assert "error: no node can hold a trial with resources" in done.err
    assert asked in done.err
    assert "Traceback" not in done.err


def test_a_cluster_that_does_not_answer_is_named(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], free_port: int
) -> None:
    # Ray itself goes on trying for more than five minutes.
    done = start(make_sweep(), "--address", f"127.0.0.1:{free_port}").end(90)
    assert done.code == 2, done
    assert f"error: Ray cluster 127.0.0.1:{free_port} cannot be reached" in done.err
    assert "Traceback" not in done.err


def test_a_relative_sqlite_uri_is_one_database(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], tmp_path: Path
) -> None:
    # Workers run in folders of their own.
    done = start(make_sweep(), "tracking.uri=sqlite:///my.db").end()
    assert done.code == 0, done
    assert "not in MLflow yet" not in done.out
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'my.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_the_recorded_sweep_file_gives_the_same_cells(
    make_sweep: Callable[..., Path], start: Callable[..., Launch], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"seed": [0, 1]})
    assert start(sweep, "seed=5").end().code == 0
    recorded = tmp_path / "runs" / "tiny" / "sweep.yaml"
    assert yaml.safe_load(recorded.read_text())["seed"] == 5
    again = start(recorded).end()
    assert again.code == 0, again
    assert "1 of 1 cells are done already" in again.out


def test_the_live_line_ends_when_the_launch_fails(
    make_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise the terminal is left without a cursor.
    import io

    from rich.console import Console

    import orchestrator.launch as launching
    from btu.errors import UserError
    from orchestrator import tracking
    from orchestrator.config import load_sweep
    from orchestrator.plan import plan_sweep
    from orchestrator.progress import SweepProgress

    def refuse(*_: object) -> None:
        raise UserError("no node can hold a trial.")

    monkeypatch.setattr(launching, "_run", refuse)
    monkeypatch.setattr(tracking, "prepare", lambda _: "0")
    sweep = load_sweep(make_sweep())
    screen = io.StringIO()
    progress = SweepProgress(Console(file=screen, width=120, force_terminal=True))
    try:
        with pytest.raises(UserError, match="no node"):
            launching.launch(sweep, plan_sweep(sweep), None, progress)
        assert screen.getvalue().count("\x1b[?25h") == screen.getvalue().count("\x1b[?25l") == 1
    finally:
        progress.end()


class GivenUp:
    """What Tune hands over for a trial that failed too often."""

    trial_id = "t"
    last_result: ClassVar[dict[str, Any]] = {}
    run_metadata = SimpleNamespace(start_time=None)

    def __init__(self, cell: dict[str, Any], error: Exception | None) -> None:
        self.config = {"cell": {"key": "k", "varied": {"seed": 0}, "config": cell}}
        self.error = error

    def get_error(self) -> Exception | None:
        return self.error


@pytest.mark.parametrize(
    ("error", "last"),
    [(None, "its worker died"), (RuntimeError(""), "its worker died"), (OSError("a\nb"), "b")],
)
def test_a_trial_that_is_given_up_is_a_failed_record(
    cell: dict[str, Any], tmp_path: Path, error: Exception | None, last: str
) -> None:
    from orchestrator.launch import WORKER_RETRIES, _ProgressCallback

    store = ResultStore(tmp_path)
    progress = SweepProgress(Console(file=io.StringIO()))
    _ProgressCallback(progress, "tiny", store).on_trial_error(0, [], GivenUp(cell, error))
    (record,) = store.failures()
    assert record["reason"] == f"gave up after {WORKER_RETRIES + 1} tries: {last}"
    assert (record["status"], record["sweep"], record["varied"]) == ("failed", "tiny", {"seed": 0})


def test_a_failure_that_cannot_be_recorded_is_told_and_does_not_end_the_sweep(
    cell: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.launch import _ProgressCallback

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResultStore, "commit_failure", full)
    told = io.StringIO()
    callback = _ProgressCallback(SweepProgress(Console(file=told)), "tiny", ResultStore(tmp_path))
    callback.on_trial_error(0, [], GivenUp(cell, None))
    assert "the failure of k was not recorded: [Errno 28] No space left" in told.getvalue()
