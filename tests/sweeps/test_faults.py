"""Real faults in sweeps: afterwards all is as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from launching import (
    GRID,
    OWN,
    SHARED,
    Server,
    Workplace,
    all_measured,
    check,
    computed,
    holder,
    journal,
    names_by_key,
    own_stages,
    runs_at,
    wait_for,
)

from orchestrator.results.folder import find_sweep

pytestmark = pytest.mark.slow

# Seconds in which a stopped launch is gone, on a busy machine.
SOON = 60


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(tmp_path: Path, database: Path) -> Iterator[Workplace]:
    made = Workplace(tmp_path, database, faulty=True)
    yield made
    made.close()


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Workplace]:
    """A workplace without an MLflow store: the first launch makes it."""
    made = Workplace(tmp_path)
    yield made
    made.close()


@pytest.fixture
def sweep(make_sweep: Callable[..., Path]) -> Path:
    """Two cells of one grid, with results in ``runs`` beside the file."""
    return make_sweep(grid=GRID)


class Reference(NamedTuple):
    """An undisturbed sweep. metrics: by cell, in the order of the grid."""

    output: Path
    metrics: dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent
    return tmp_path_factory.mktemp("common")


@pytest.fixture(scope="module")
def reference(cell: dict[str, Any], common: Path, database: Path) -> Reference:
    """Launched by the first process that needs it."""
    import yaml
    from filelock import FileLock

    folder = common / "reference"
    with FileLock(common / "reference.lock"):
        if not folder.exists():
            folder.mkdir()
            file = folder / "tiny.yaml"
            file.write_text(yaml.safe_dump({"name": "tiny", **cell, "grid": GRID, "controls": []}))
            place = Workplace(folder, database)
            try:
                done = place.run("launch", file)
            finally:
                place.close()
            assert done.code == 0, done
    output = folder / "runs"
    assert sum(computed(output).values()) == SHARED + 2 * OWN
    results = find_sweep(output, "tiny")
    metrics = all_measured(results)
    check(output, metrics)
    # Not in that of the keys, which change with every version of a stage.
    alpha = {key: cell.varied["defense.alpha"] for key, cell in results.cells().items()}
    return Reference(output, {key: metrics[key] for key in sorted(metrics, key=alpha.get)})


# Killed and stopped ----------------------------------------------------------------------------


def test_workers_that_are_killed_are_replaced(
    sweep: Path, place: Workplace, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set where this process has imported the launcher: the launch has to set it itself.
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    # While it computes for all cells, while it computes for one, while it writes the run.
    stages = ("poisoned fine-tune", "unlearn")
    for stage in (*stages, "tracking"):
        place.fault(stage, held=True)
    launch = place.start("launch", sweep)
    for stage in stages:
        worker = wait_for(lambda stage=stage: holder(place, stage), launch)
        # It has as good a claim to a CPU as any process: Ray's own choice is to yield.
        assert worker.nice() == psutil.Process(launch.process.pid).nice()
        worker.kill()
        place.fault(stage)
    uri = f"sqlite:///{place.output / 'mlflow.db'}"
    (run, *_) = wait_for(lambda: place.output.exists() and begun_runs(uri), launch)
    cell = run.data.tags["cell"]
    assert place.results().store.is_committed(cell)
    wait_for(lambda: lease_holder(place, cell), launch).kill()
    place.fault("tracking")
    done = launch.end()
    assert done.code == 0, done
    assert "2 of 2 cells done, 0 failed, 0 not run" in done.out, done
    # The killed ones began once more; the cell was there already, only its run was not.
    check(place.output, reference.metrics, again=dict.fromkeys(stages, 1))


def begun_runs(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=uri).get_experiment_by_name("tiny")
    return [run for run in runs_at(uri) if run.info.status == "RUNNING"] if found else []


def lease_holder(place: Workplace, key: str) -> psutil.Process | None:
    facts = place.results().store.leases.held().get(key)
    return psutil.Process(facts["pid"]) if facts else None


def test_a_driver_that_is_killed_or_stopped_is_started_again(
    sweep: Path, place: Workplace, reference: Reference
) -> None:
    """SIGKILL in a shared stage, SIGTERM and SIGINT in stages of a cell, each time relaunched.

    While it is down for the second time, a model that is still needed loses a bit.
    """
    blows = {
        "poisoned fine-tune": signal.SIGKILL,
        "unlearn": signal.SIGTERM,
        "evaluate defended": signal.SIGINT,
    }
    for stage, blow in blows.items():
        place.fault(stage, held=True)
        launch = place.start("launch", sweep)
        worker = wait_for(lambda stage=stage: holder(place, stage), launch)
        launch.process.send_signal(blow)
        done = launch.end(SOON)
        if blow is not signal.SIGKILL:
            assert done.code == 1, done
            assert "Stopped: interrupted." in done.out, done
            assert "the same command continues where this one stopped" in done.out, done
            assert "Traceback" not in done.err, done
        # Ray ends the workers of a driver that is gone.
        wait_for(lambda worker=worker: not worker.is_running(), limit=SOON)
        place.fault(stage)
        if stage == "unlearn":
            key = own_stages(place.results(), next(iter(reference.metrics)))["poisoned fine-tune"]
            flip(place.results().store.fetch(key) / "model" / "model.safetensors")
        if stage == "evaluate defended":
            assert "'unlearn' needs inputs computed again: model (the stored result" in done.out
    done = place.run("launch", sweep)
    assert done.code == 0, done
    # What was being computed began once more: at each blow the held stage, and what the other
    # worker had at that moment. So did the damaged model.
    more = computed(place.output) - computed(reference.output)
    assert more["poisoned fine-tune"] == 2
    assert set(more) >= set(blows)
    assert sum(more.values()) <= 2 * len(blows) + 1
    assert (place.output / "store" / "damaged").is_dir()
    check(place.output, reference.metrics, again=more)


def test_a_node_that_is_lost_leaves_its_work_to_the_others(
    sweep: Path, place: Workplace, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES")  # for the nodes: they set it themselves
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as in docs/cluster.md
    place.fault("poisoned fine-tune", held=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        launch = place.start("launch", sweep, "--address", cluster.address)
        worker = wait_for(lambda: holder(place, "poisoned fine-tune"), launch)
        raylets = {raylet_of(node): node for node in nodes}
        lost = raylets[worker.ppid()]
        cluster.remove_node(lost, allow_graceful=False)
        wait_for(lambda: not worker.is_running(), launch)
        place.fault("poisoned fine-tune")
        done = launch.end()
    finally:
        cluster.shutdown()
    assert done.code == 0, done
    assert "2 of 2 cells done, 0 failed, 0 not run" in done.out, done
    more = computed(place.output) - computed(reference.output)
    assert more["poisoned fine-tune"] == 1
    check(place.output, reference.metrics, again=more)


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def test_two_launches_at_once_share_the_work_and_the_store_that_one_makes(
    sweep: Path, bare: Workplace, reference: Reference
) -> None:
    launches = [bare.start("launch", sweep) for _ in range(2)]
    for launch in launches:
        done = launch.end()
        assert done.code == 0, done
        assert "2 of 2 cells done, 0 failed, 0 not run" in done.out, done
        assert "not in MLflow" not in done.out, done
    check(bare.output, reference.metrics)
    assert len({event["launch"] for event in journal(bare.output)}) == 2
    assert not list(bare.output.glob(".mlflow.db.*"))


# MLflow away -----------------------------------------------------------------------------------


@pytest.fixture
def server(database: Path, tmp_path: Path, free_port: int) -> Iterator[Server]:
    """An MLflow server that is not started yet."""
    shutil.copy(database, tmp_path / "server.db")
    made = Server(tmp_path / "server.db", tmp_path, free_port)
    yield made
    made.stop()


def test_a_server_that_goes_away_is_told_when_it_is_back(
    sweep: Path, place: Workplace, reference: Reference, server: Server
) -> None:
    first, second = reference.metrics
    unlearn = own_stages(find_sweep(reference.output, "tiny"), second)["unlearn"]
    place.fault(unlearn, held=True)
    server.start()
    launch = place.start("launch", sweep, f"tracking.uri={server.uri}")
    wait_for(lambda: "poisoned fine-tune" in computed(place.output), launch)
    server.stop()
    wait_for(lambda: first in place.results().store.committed(), launch)
    told = wait_for(lambda: [e for e in journal(place.output) if ended(e, first)], launch)
    assert told[0]["outcome"] == "done"
    server.start()
    place.fault(unlearn)
    done = launch.end()
    assert done.code == 0, done
    assert "not in MLflow yet: alpha=" in done.out, done
    assert "not in MLflow (" not in done.out  # at the end it has all
    check(place.output, reference.metrics, uri=server.uri)


def ended(event: dict[str, Any], key: str) -> bool:
    return bool(event["event"] == "end" and event["key"] == key)


def test_a_sweep_without_a_server_is_synchronized_later(
    sweep: Path, place: Workplace, reference: Reference, server: Server
) -> None:
    done = place.run("launch", sweep, f"tracking.uri={server.uri}")
    assert done.code == 0, done
    assert f"MLflow at {server.uri} does not answer" in done.out, done
    assert "the sweep runs all the same. Results wait on disk: " in done.out, done
    assert f"btu sync tiny --uri {server.uri} writes them" in done.out, done
    assert "2 of 2 cells done" in done.out, done
    server.start()
    # Exit code 0 when nothing is missing; the first sync writes 2 cells.
    for written in (2, 0):
        synced = place.run("sync", "tiny", "--uri", server.uri)
        assert synced.code == 0, synced
        assert f"{written} runs written, 0 unfinished ones closed, 0 still missing" in synced.out
        check(place.output, reference.metrics, uri=server.uri)
    server.stop()
    synced = place.run("sync", "tiny", "--uri", server.uri)
    assert synced.code == 2, synced
    assert f"error: tracking.uri {server.uri} does not answer" in synced.err


# Damage ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, reference: Reference) -> Iterator[Workplace]:
    """A workplace with a finished sweep in it, and no fault."""
    made = Workplace(tmp_path, faulty=True)
    shutil.copytree(reference.output, made.output)
    yield made
    made.close()


@pytest.mark.parametrize("command", ["launch", "sync"])
def test_a_run_that_a_dead_worker_left_is_closed(
    sweep: Path, copied: Workplace, reference: Reference, command: str
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking.runs import ORIGIN_TAG

    uri = f"sqlite:///{copied.output / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (key, *_) = reference.metrics
    ours = find_sweep(str(copied.output), "tiny").origin()
    client.create_run(experiment, tags={"cell": key, ORIGIN_TAG: ours})
    # Not one of ours, so it stays.
    other = client.create_run(experiment, run_name="by hand").info.run_id
    done = copied.run(command, sweep if command == "launch" else "tiny")
    assert done.code == 0, done
    if command == "sync":
        assert "0 runs written, 1 unfinished ones closed, 0 still missing" in done.out, done
    assert client.get_run(other).info.status == "RUNNING"
    client.delete_run(other)
    check(copied.output, reference.metrics)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_results_are_set_aside_and_computed_again(
    sweep: Path, copied: Workplace, reference: Reference
) -> None:
    """Of both cells; of the first one also its stages, down to the dropped models."""
    first, second = reference.metrics
    store = copied.results().store
    stages = own_stages(copied.results(), first)

    def folder(key: str) -> Path:
        marker = store.marker(key, dropped=True)
        assert marker is not None
        return copied.output / "store" / marker.folder

    # A bit in one cell, half of the other; half a marker; half a file that a worker reads.
    flip(folder(first) / "result.json")
    cut(folder(second) / "result.json")
    cut(folder(stages["exposure round 1"]) / "drift.safetensors")
    cut(copied.output / "store" / "markers" / f"{stages['evaluate defended']}.json")
    # What a worker that was killed leaves: files without a marker.
    attempt = copied.output / "store" / "entries" / stages["unlearn"] / "0123"
    (attempt / "model").mkdir(parents=True)
    (attempt / "model" / "model.safetensors").write_bytes(b"half")
    before = len(journal(copied.output))

    done = copied.run("launch", sweep)
    assert done.code == 0, done
    assert "2 of 2 cells done, 0 failed, 0 not run" in done.out, done
    for key in (first, second):
        assert f"The stored result {key} is damaged" in done.out, done
    # What only workers read they find.
    assert "'cell' needs inputs computed again: " in done.out, done
    assert all_measured(copied.results()) == reference.metrics
    runs = runs_at(f"sqlite:///{copied.output / 'mlflow.db'}")
    assert sorted((r.data.tags["cell"], r.info.status) for r in runs) == [
        (key, "FINISHED") for key in sorted(reference.metrics)
    ]
    names = names_by_key(copied.results())
    again = [e for e in journal(copied.output)[before:] if e["event"] == "compute"]
    # The first cell's evaluation has no model to read any more: unlearning is done again, which
    # reads the poisoned model, gone as well, and round 1's drift. The cells come last.
    assert Counter(names[e["key"]] for e in again) == {
        "poisoned fine-tune": 1,
        "exposure round 1": 1,
        "unlearn": 1,
        "evaluate defended": 1,
        "cell": 2,
    }
    damaged = {path.name.partition("-")[0] for path in (copied.output / "store/damaged").iterdir()}
    assert damaged == {first, second, stages["exposure round 1"]} | (
        damaged & {stages["evaluate defended"]}
    )
    assert store.verify() == []


# A full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 260 MB: a sweep requires 200 MB free."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=260m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(opened, bytes(4096))
    except OSError:
        pass
    finally:
        os.close(opened)


def test_a_full_disk_stops_the_launch_and_harms_nothing(
    sweep: Path, place: Workplace, reference: Reference, small_disk: Path, database: Path
) -> None:
    output = small_disk / "runs"
    output.mkdir()
    shutil.copy(database, output / "mlflow.db")
    place.output = output
    place.fault("poisoned fine-tune", held=True)
    launch = place.start("launch", sweep, f"output={output}")
    wait_for(lambda: holder(place, "poisoned fine-tune"), launch)
    ballast = small_disk / "ballast"
    fill(ballast)
    assert os.statvfs(small_disk).f_bavail == 0
    place.fault("poisoned fine-tune")
    done = launch.end()
    assert done.code == 1, done
    assert "stopping: the disk is full (" in done.out, done
    assert "Stopped: the disk is full" in done.out, done
    assert "the same command continues where this one stopped" in done.out, done
    assert "0 failed" in done.out, done
    assert "Traceback" not in done.err, done
    store = place.results().store
    assert store.verify() == []
    assert not store.failed()

    refused = place.run("launch", sweep, f"output={output}")
    assert refused.code == 2, refused
    assert "0 MB free, a sweep needs 200 MB" in refused.err or "cannot be written" in refused.err
    ballast.unlink()
    done = place.run("launch", sweep, f"output={output}")
    assert done.code == 0, done
    more = computed(output) - computed(reference.output)
    check(output, reference.metrics, again=more)


# Errors inside stages --------------------------------------------------------------------------


def test_a_stage_that_raises_fails_its_cell_alone_until_it_is_retried(
    sweep: Path, place: Workplace, reference: Reference
) -> None:
    first, second = reference.metrics
    unlearn = own_stages(find_sweep(reference.output, "tiny"), first)["unlearn"]
    place.fault(unlearn, raises="the test wants it")
    done = place.run("launch", sweep)
    assert done.code == 1, done
    assert "1 of 2 cells done, 1 failed, 0 not run" in done.out, done
    assert "FAILED: stage 'unlearn' of alpha=0.01: RuntimeError: the test wants it" in done.out, (
        done
    )
    assert "what failed stays failed until --retry-failed" in done.out, done
    assert "Traceback" not in done.err, done
    uri = f"sqlite:///{place.output / 'mlflow.db'}"
    runs = {run.data.tags["cell"]: run for run in runs_at(uri)}
    assert {key: run.info.status for key, run in runs.items()} == {
        first: "FAILED", second: "FINISHED",
    }  # fmt: skip
    reason = "stage 'unlearn' failed: RuntimeError: the test wants it"
    assert runs[first].data.tags["reason"] == reason

    # It would fail again, so it is not run again: not even Ray is started.
    place.fault(unlearn)
    before = journal(place.output)
    done = place.run("launch", sweep, "--address", "127.0.0.1:1")
    assert done.code == 1, done
    assert "1 cells failed earlier and are not run again: stage 'unlearn' failed" in done.out, done
    assert journal(place.output) == before

    done = place.run("launch", sweep, "--retry-failed")
    assert done.code == 0, done
    # The poisoned model was removed when no stage seemed to need it any more.
    check(place.output, reference.metrics, again={"poisoned fine-tune": 1, "unlearn": 1})


def test_a_stage_without_memory_is_tried_in_smaller_parts(
    sweep: Path, place: Workplace, reference: Reference
) -> None:
    first, second = reference.metrics
    unlearn = own_stages(find_sweep(reference.output, "tiny"), first)["unlearn"]
    place.fault("poisoned fine-tune", parts=2)
    place.fault(unlearn, parts=16)  # more than are ever tried
    done = place.run("launch", sweep)
    assert done.code == 1, done
    assert "1 of 2 cells done, 1 failed, 0 not run" in done.out, done
    assert (
        "'poisoned fine-tune' ran out of memory; it is tried again alone, and then with" in done.out
    ), done
    assert "out of memory, even alone and in parts: out of memory, as the test wants" in done.out, (
        done
    )
    counts = computed(place.output)
    assert counts["poisoned fine-tune"] == 3  # as it is, alone, in 2 parts
    # as it is, alone, in 2, 4 and 8 parts; the other cell's at once
    assert counts["unlearn"] == 5 + 1
    (record,) = place.results().records()
    assert record["key"] == second
    assert record["tags"]["accumulation"] == "2"
    # The same batches, but other dropout masks on their parts: nearly the same loss.
    (loss,) = [e["loss"] for e in record["history"] if is_first_epoch(e)]
    (undisturbed,) = [
        e["loss"]
        for r in find_sweep(reference.output, "tiny").records()
        for e in r["history"]
        if r["key"] == second and is_first_epoch(e)
    ]
    assert loss == pytest.approx(undisturbed, rel=1e-2)


def is_first_epoch(epoch: dict[str, Any]) -> bool:
    return bool(epoch["stage"] == "poisoned fine-tune" and epoch["epoch"] == 1)
