"""SIGTERM at every process of a launch at once, as Slurm sends it at a job's time limit.

Ray goes down under its driver, whose calls would then block for a minute and end the process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from launching import GRID, Command, Done, Workplace, holder, wait_for

pytestmark = pytest.mark.slow

# The first stage: the test needs none that trains.
STAGE = "poison"
# Slurm kills 30 s after SIGTERM (KillWait). A busy machine may need longer to notice the end.
KILL_WAIT = 30


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    made = Workplace(tmp_path, faulty=True)
    (tmp_path / "scratch").mkdir()
    made.environment["TMPDIR"] = str(tmp_path / "scratch")
    made.fault(STAGE, held=True)
    yield made
    made.close()


def terminate(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue  # it went with another one


def tree(pid: int) -> list[int]:
    """Return a process and all that it has started, the youngest first."""
    children = psutil.Process(pid).children(recursive=True)
    return [*(child.pid for child in reversed(children)), pid]


def check_stopped(place: Workplace, done: Done) -> None:
    """Check that a launch said how it ended, and left nothing behind."""
    assert done.code == 1, done
    assert "0 of 2 cells done, 0 failed, 2 not run" in done.out, done
    assert "Stopped: interrupted. Not every cell is done; the same command continues" in done.out
    assert done.err == "", done
    assert list((place.output / "store" / "launches").iterdir()) == []
    assert not list((place.folder / "scratch").glob("btu-*"))
    left = {path.name.partition("-")[0] for path in (place.output / "tiny").iterdir()}
    assert left <= {"journal.jsonl", "origin", "plans", "sweep.yaml", "tracked", "ray"}


def begin(place: Workplace, launch: Command) -> psutil.Process:
    found: psutil.Process = wait_for(lambda: holder(place, STAGE), launch)
    return found


def test_a_local_launch_and_its_ray_are_terminated_at_once(
    make_sweep: Callable[..., Path], place: Workplace
) -> None:
    launch = place.start("launch", make_sweep(grid=GRID))
    worker = begin(place, launch)
    # Ray first: the driver is the last to be told.
    terminate(tree(launch.process.pid))
    check_stopped(place, launch.end(KILL_WAIT))
    wait_for(lambda: not worker.is_running(), limit=KILL_WAIT)
    # What it was computing is free for the next launch.
    assert place.results().store.leases.in_use() == set()


def test_a_launch_and_its_cluster_are_terminated_at_once(
    make_sweep: Callable[..., Path], place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    for name, value in place.environment.items():
        if name != "TMPDIR":  # its paths are too long for Ray's sockets
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        launch = place.start("launch", make_sweep(grid=GRID), "--address", cluster.address)
        begin(place, launch)
        ray = cluster.head_node.all_processes.values()
        pids = [pid for infos in ray for info in infos for pid in tree(info.process.pid)]
        terminate([*pids, launch.process.pid])
        check_stopped(place, launch.end(KILL_WAIT))
    finally:
        cluster.shutdown()


def test_a_launch_whose_own_ray_dies_stops_with_the_reason(
    make_sweep: Callable[..., Path], place: Workplace
) -> None:
    """Ray's client would end it silently; what Ray says is not on the screen."""
    launch = place.start("launch", make_sweep(grid=GRID))
    begin(place, launch)
    for process in psutil.Process(launch.process.pid).children(recursive=True):
        if process.name() == "raylet":
            process.kill()
    done = launch.end(KILL_WAIT)
    assert done.code == 1, done
    assert "Stopped: Ray's process on this machine has died" in done.out, done
    assert "0 of 2 cells done, 0 failed, 2 not run" in done.out, done
    assert done.err == "", done
    assert "state-dump" not in done.out
    assert list((place.output / "store" / "launches").iterdir()) == []
    assert not list((place.folder / "scratch").glob("btu-*"))
