"""How a worker computes one stage: every way in which it can end, on toy stages."""

from __future__ import annotations

import errno
import gc
import json
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from btu.errors import UserError
from btu.provenance import code_version
from btu.stages import RECORD, Stage, StageFunction, StageRun, read_record
from btu.stages import stage as stage_function
from btu.training import NonFiniteLossError
from btu.types import Progress
from orchestrator.results.folder import Results
from orchestrator.run import worker
from orchestrator.run.worker import (
    Launch,
    Outcome,
    Report,
    StageCall,
    compute_call,
    free_memory,
    run_node,
    wait_for_others,
)
from orchestrator.store.store import Store

# What the stage functions below did: their labels, and the errors that they have to raise.
CALLS: list[str] = []
RAISES: list[BaseException] = []
DURING: list[Callable[[], object]] = []


@stage_function(version=1)
def work(run: StageRun) -> dict[str, Any]:
    """Write a file, and a model; then raise what the test wants raised."""
    CALLS.append(run.config["label"])
    (run.folder / "model").mkdir()
    (run.folder / "model" / "weights").write_text("big")
    (run.folder / "out.txt").write_text(run.config["label"])
    for act in DURING:
        act()
    for error in RAISES:
        raise error
    return {"asr": 0.25, "rows": 3, "label": run.config["label"], "parts": run.accumulation}


@stage_function(version=1)
def read(run: StageRun) -> dict[str, Any]:
    """Read all inputs; the models too, where there are any."""
    CALLS.append(run.config["label"])
    texts = [(folder / "out.txt").read_text() for folder in run.inputs.values()]
    models = [(folder / "model" / "weights").is_file() for folder in run.inputs.values()]
    return {"texts": texts, "models": models}


@pytest.fixture(autouse=True)
def nothing_happened() -> Iterator[None]:
    threads = torch.get_num_threads()
    CALLS.clear()
    RAISES.clear()
    DURING.clear()
    yield
    torch.set_num_threads(threads)


class Shop(NamedTuple):
    store: Store
    warnings: list[str]

    def run(self, stage: Stage, **more: Any) -> Report:
        return run_node(stage.node(), self.store, **{"owner": "me", **more})

    def attempts(self, stage: Stage) -> list[str]:
        """Return the names of the folders of all attempts at a stage."""
        return self.store.storage.names(f"entries/{stage.key}")

    def is_clean(self, stage: Stage) -> bool:
        """Return whether a stage left neither files nor a lease."""
        return self.attempts(stage) == [] and self.store.leases.leased() == set()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    warnings: list[str] = []
    store = Store(tmp_path / "store", warn=warnings.append)
    store.prepare()
    return Shop(store, warnings)


def stage(
    label: str = "a",
    *inputs: Stage,
    name: str = "toy",
    function: StageFunction | None = None,
    light: tuple[str, ...] = (),
) -> Stage:
    roles = {before.config["label"]: before for before in inputs}
    return Stage(
        name, function or work, {"label": label}, roles, light=light, kind="host", units=7,
    )  # fmt: skip


# Done ------------------------------------------------------------------------------------------


def test_a_stage_is_computed_and_published(shop: Shop) -> None:
    made = stage()
    report = shop.run(made)
    assert (report.outcome, report.reason, report.lost) == (Outcome.done, "", ())
    assert report.seconds > 0
    assert report.device == "cpu"
    # Numbers alone: they are shown, and travel.
    assert report.facts == {"asr": 0.25, "rows": 3, "parts": 1}
    folder = shop.store.fetch(made.key)
    assert (folder / "out.txt").read_text() == "a"
    record = read_record(folder)
    assert (record["key"], record["stage"], record["facts"]["label"]) == (made.key, "toy", "a")
    marker = shop.store.marker(made.key)
    assert marker is not None
    assert marker.name == "toy"
    assert marker.info == {
        "stage": "toy", "units": 7, "seconds": record["seconds"], "device": "cpu",
    }  # fmt: skip
    assert shop.store.leases.leased() == set()


def test_a_stage_tells_the_most_memory_that_it_took(shop: Shop) -> None:
    """Not what an earlier stage of the same process took."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux forgets an earlier peak")
    size = 300_000_000

    def take() -> None:
        # A size that the allocator gives back to the system at once.
        assert len(bytearray(b"x") * size) == size

    DURING.append(take)
    big = shop.run(stage("big")).memory
    DURING.clear()
    small = shop.run(stage("small")).memory
    assert big > size
    assert big - small > 0.9 * size
    assert shop.run(stage("small")).memory == 0  # it was there


def test_a_stage_reads_its_inputs(shop: Shop) -> None:
    first, second = stage("one"), stage("two")
    both = stage("both", first, second, function=read, light=("two",))
    for made in (first, second, both):
        assert shop.run(made).outcome is Outcome.done
    facts = read_record(shop.store.fetch(both.key))["facts"]
    assert facts["texts"] == ["one", "two"]


def test_a_result_that_is_there_is_not_computed(shop: Shop) -> None:
    made = stage()
    shop.run(made)
    begun: list[str] = []
    again = shop.run(made, begin=lambda: begun.append("x"))
    assert (again.outcome, again.seconds) == (Outcome.done, 0)
    assert CALLS == ["a"]
    assert begun == []
    assert len(shop.attempts(made)) == 1


def test_a_result_that_came_while_this_waited_is_not_computed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage()
    shop.run(made)
    # First the key is not there; with the lease in hand it is.
    answers = iter([False, True])
    monkeypatch.setattr(shop.store, "is_committed", lambda key: next(answers))
    assert shop.run(made).outcome is Outcome.done
    assert CALLS == ["a"]
    assert shop.store.leases.leased() == set()


def test_a_failure_that_came_meanwhile_is_not_repeated(shop: Shop) -> None:
    made = stage()
    shop.store.fail(made.key, {"key": made.key, "stage": "toy", "reason": "seen elsewhere"})
    report = shop.run(made)
    assert (report.outcome, report.reason) == (Outcome.failed, "seen elsewhere")
    assert CALLS == []
    assert shop.is_clean(made)


def test_computing_is_announced(shop: Shop) -> None:
    made = stage()
    begun: list[bool] = []
    told: list[Progress] = []
    shop.run(
        made,
        begin=lambda: begun.append(made.key in shop.store.leases.leased() and CALLS == []),
        progress=told.append,
    )
    assert begun == [True]  # once, under the lease, before the work
    assert [event.stage for event in told] == ["toy"]


def test_the_parts_of_a_batch_reach_the_stage_and_its_record(shop: Shop) -> None:
    whole, parts = stage("whole"), stage("parts")
    shop.run(whole)
    assert shop.run(parts, accumulation=4).facts["parts"] == 4
    assert read_record(shop.store.fetch(parts.key))["environment"]["accumulation"] == "4"
    assert "accumulation" not in read_record(shop.store.fetch(whole.key))["environment"]


@pytest.mark.parametrize(("cpus", "threads"), [(2, 2), (0.5, 1), (2.7, 2)])
def test_a_stage_has_as_many_threads_as_cpus(shop: Shop, cpus: float, threads: int) -> None:
    # At least one: a share of a CPU is not a thread.
    shop.run(stage(), cpus=cpus)
    assert torch.get_num_threads() == threads


# Not now ---------------------------------------------------------------------------------------


def test_what_another_launch_computes_is_busy(shop: Shop, tmp_path: Path) -> None:
    made = stage()
    with Store(tmp_path / "store").leases.lease(made.key, "another launch") as held:
        assert held.acquire()
        report = shop.run(made)
        assert report.outcome is Outcome.busy
        assert shop.store.leases.leased() == {made.key}  # theirs, untouched
    assert CALLS == []
    assert shop.attempts(made) == []


def test_a_missing_input_is_named(shop: Shop) -> None:
    one, two = stage("one"), stage("two")
    shop.run(two)
    both = stage("both", one, two, function=read)
    report = shop.run(both)
    assert (report.outcome, report.lost) == (Outcome.inputs, (one.key,))
    assert CALLS == ["two"]
    assert shop.is_clean(both)


def test_a_damaged_input_is_named_and_set_aside(shop: Shop) -> None:
    one, two = stage("one"), stage("two")
    for made in (one, two):
        shop.run(made)
        (shop.store.fetch(made.key) / "out.txt").write_text("changed")
    both = stage("both", one, two, function=read)
    report = shop.run(both)
    assert (report.outcome, report.lost) == (Outcome.inputs, (one.key, two.key))
    assert not shop.store.is_committed(one.key)
    assert len(shop.warnings) == 2
    assert shop.is_clean(both)
    # Computed again, they are good again.
    for made in (one, two, both):
        assert shop.run(made).outcome is Outcome.done


def test_a_dropped_model_is_missed_by_who_reads_it_alone(shop: Shop) -> None:
    one = stage("one")
    shop.run(one)
    shop.store.drop(one.key)
    heavy = stage("heavy", one, function=read)
    light = stage("light", one, function=read, light=("one",))
    assert shop.run(heavy).lost == (one.key,)
    assert shop.run(light).outcome is Outcome.done
    facts = read_record(shop.store.fetch(light.key))["facts"]
    assert facts == {"texts": ["one"], "models": [False]}


# Too little memory or disk ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_no_failure(shop: Shop, error: BaseException) -> None:
    RAISES.append(error)
    report = shop.run(stage())
    assert report.outcome is Outcome.memory
    assert report.reason == (str(error) or "out of memory")
    assert shop.is_clean(stage())
    assert shop.store.failed() == set()


class SafetensorError(Exception):
    """Of safetensors: it has the text of the system's error only."""


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("database or disk is full"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_no_failure(shop: Shop, error: BaseException) -> None:
    RAISES.append(error)
    report = shop.run(stage())
    assert (report.outcome, report.reason) == (Outcome.disk, str(error))
    assert shop.is_clean(stage())
    assert shop.store.failed() == set()


@pytest.mark.parametrize("method", ["workspace", "publish", "fetch", "lease", "note"])
def test_a_disk_may_be_full_at_every_step(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = stage("one")
    shop.run(one)
    made = stage("two", one, function=read)
    if method == "note":
        report = shop.run(made, begin=full)
    else:
        with monkeypatch.context() as patch:
            if method == "lease":
                patch.setattr(shop.store.storage, "create", full)
            else:
                patch.setattr(shop.store, method, full)
            report = shop.run(made)
    assert report.outcome is Outcome.disk
    assert "No space left" in report.reason
    assert shop.is_clean(made)
    assert shop.store.failed() == set()
    assert shop.run(made).outcome is Outcome.done  # once there is room


# Failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("alpha is odd; use another."), "alpha is odd; use another."),
        (NonFiniteLossError("loss became nan"), "loss became nan"),
        (ZeroDivisionError("deep inside"), "ZeroDivisionError: deep inside"),
    ],
)
def test_an_error_of_the_stage_is_recorded(shop: Shop, error: BaseException, reason: str) -> None:
    made = stage()
    RAISES.append(error)
    report = shop.run(made)
    assert (report.outcome, report.reason) == (Outcome.failed, reason)
    failure = shop.store.failure(made.key)
    assert failure is not None
    assert (failure["key"], failure["stage"], failure["reason"]) == (made.key, "toy", reason)
    assert "in work" in failure["traceback"]
    assert type(error).__name__ in failure["traceback"]
    assert failure["code"] == code_version()
    assert failure["started"] <= failure["ended"]
    assert shop.is_clean(made)


def test_a_long_reason_is_cut(shop: Shop) -> None:
    RAISES.append(ValueError("long " * 1000))
    assert len(shop.run(stage()).reason) == 2000


def test_facts_that_are_no_plain_data_are_a_failure(shop: Shop) -> None:
    made = Stage("toy", odd, {}, kind="host")
    report = shop.run(made)
    assert report.outcome is Outcome.failed
    assert report.reason.startswith("TypeError: ")
    assert shop.is_clean(made)


@stage_function(version=1)
def odd(run: StageRun) -> dict[str, Any]:
    """Return what JSON cannot contain."""
    return {"x": object()}


def test_a_success_clears_an_earlier_failure(shop: Shop) -> None:
    made = stage()
    RAISES.append(ValueError("once"))
    shop.run(made)
    RAISES.clear()
    shop.store.clear_failure(made.key)
    assert shop.run(made).outcome is Outcome.done
    assert shop.store.failed() == set()


# Errors of the machine -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        KeyboardInterrupt(),
        SystemExit(1),
    ],
)
def test_an_error_of_the_machine_escapes(shop: Shop, error: BaseException) -> None:
    made = stage()
    RAISES.append(error)
    with pytest.raises(type(error)):
        shop.run(made)
    assert shop.is_clean(made)
    assert shop.store.failed() == set()


def test_an_unreadable_store_escapes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stage("one")
    shop.run(one)
    made = stage("two", one, function=read)

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shop.store, "fetch", broken)
    with pytest.raises(OSError, match="Input/output"):
        shop.run(made)
    assert shop.is_clean(made)


def test_the_lease_is_held_while_the_stage_runs(shop: Shop, tmp_path: Path) -> None:
    made = stage()
    seen: list[bool] = []
    other = Store(tmp_path / "store")
    DURING.append(lambda: seen.append(other.leases.held_by_other(made.key, "another launch")))
    shop.run(made)
    assert seen == [True]


def test_a_result_that_another_worker_published_first_stands(shop: Shop, tmp_path: Path) -> None:
    made = stage()
    other = Store(tmp_path / "store")

    def publish() -> None:
        folder = other.workspace(made.key)
        (folder / RECORD).write_text(json.dumps({"facts": {}}))
        (folder / "out.txt").write_text("theirs")
        other.publish(made.key, folder, "toy", {})

    DURING.append(publish)
    assert shop.run(made).outcome is Outcome.done
    assert (shop.store.fetch(made.key) / "out.txt").read_text() == "theirs"
    assert len(shop.attempts(made)) == 1


# Tracking --------------------------------------------------------------------------------------


def test_a_cell_is_tracked_once_under_its_lease(shop: Shop) -> None:
    made = stage(name="cell")
    tracked: list[tuple[str, str, bool]] = []

    def track(key: str, folder: Path) -> None:
        tracked.append((key, (folder / "out.txt").read_text(), key in shop.store.leases.leased()))

    assert shop.run(made, track=track).untracked == ""
    assert shop.run(made, track=track).outcome is Outcome.done  # there already
    assert tracked == [(made.key, "a", True)]


def test_a_stage_is_not_tracked(shop: Shop) -> None:
    def track(key: str, folder: Path) -> None:
        raise AssertionError("a stage is no run")

    assert shop.run(stage(), track=track).untracked == ""


@pytest.mark.parametrize("error", [ConnectionError("gone"), OSError(28, "No space left")])
def test_a_cell_that_cannot_be_tracked_is_done(shop: Shop, error: Exception) -> None:
    def track(key: str, folder: Path) -> None:
        raise error

    made = stage(name="cell")
    report = shop.run(made, track=track)
    assert report.outcome is Outcome.done
    assert report.untracked == f"{type(error).__name__}: {error}"
    assert shop.store.is_committed(made.key)
    assert shop.store.leases.leased() == set()


def test_a_failed_cell_is_not_tracked(shop: Shop) -> None:
    tracked: list[str] = []
    RAISES.append(ValueError("no"))
    shop.run(stage(name="cell"), track=lambda key, folder: tracked.append(key))
    assert tracked == []


def test_a_report_travels_as_json(shop: Shop) -> None:
    report = asdict(shop.run(stage()))
    again = asdict(Report(**json.loads(json.dumps(report))))
    assert again == {**report, "lost": []}


class Part:
    """Something that only a collection frees."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_goes_though_what_was_imported_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_modules_frozen", 0)
    gc.unfreeze()  # other tests may have called it
    kept = Part()
    caught = weakref.ref(kept)
    try:
        free_memory()  # modules were imported: no live object is walked through any more
        assert gc.get_freeze_count() > 100_000
        first = weakref.ref(Part())
        del kept
        free_memory()
        assert first() is None
        assert caught() is not None  # frozen while it was alive
        # The next module that comes lets it go.
        monkeypatch.setitem(sys.modules, "one_more", sys)
        free_memory()
        assert caught() is None
    finally:
        gc.unfreeze()


# A worker of a launch --------------------------------------------------------------------------


@stage_function(version=1)
def score(run: StageRun) -> dict[str, Any]:
    """Write a cell's result."""
    config = {"attack": {"name": "badnets"}, "defense": {"name": "btu"}}
    result = {"config": config, "started": 1.0, "ended": 2.0, "metrics": {"asr": 0.5}}
    (run.folder / "result.json").write_text(json.dumps(result))
    return {"asr": 0.5}


def test_a_model_that_was_removed_since_is_not_computed_again(shop: Shop) -> None:
    """A worker of a chain died; what it had computed was read, and its model removed."""
    made = stage()
    shop.run(made)
    shop.store.drop(made.key)
    began: list[None] = []
    report = shop.run(made, again=False, begin=lambda: began.append(None))
    assert report == Report(Outcome.done, dropped=True)
    assert began == []
    # Where it is handed out for its model, it is computed.
    assert shop.run(made, again=True, begin=lambda: began.append(None)).outcome is Outcome.done
    assert len(began) == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_a_call_is_computed_written_down_and_tracked(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    logged: list[tuple[Any, ...]] = []

    class Tracker:
        def __init__(self, uri: str, experiment: str, results: Results, *, fresh: bool) -> None:
            self.where = uri, experiment, fresh

        def log(self, record: dict[str, Any], folder: Path, training_set: str, model: str) -> None:
            logged.append((*self.where, record["varied"], folder.name, training_set, model))

    module: Any = ModuleType("orchestrator.tracking.writer")
    module.Tracker = Tracker
    monkeypatch.setitem(sys.modules, "orchestrator.tracking.writer", module)
    rows = stage("poison")  # the label is its role, too
    shop.run(rows)
    made = replace(stage("a", rows, name="cell", function=score), config={"defended": "poison"})
    call = StageCall.from_json(StageCall(made.node(), varied={"seed": 1}).to_json())
    tracking = {"uri": "u", "id": "7", "fresh": True, "models": keeps}
    launch = Launch("L", str(tmp_path / "store"), str(tmp_path), "tiny", tracking)
    report = compute_call(call, launch)
    assert (report.outcome, report.facts, report.untracked) == (Outcome.done, {"asr": 0.5}, "")
    (found,) = logged
    assert found[:3] == ("u", "7", True)
    model = rows.key if keeps else ""  # the worker names it only where the store keeps it
    assert found[3:] == ({"seed": 1}, shop.store.fetch(made.key).name, rows.key, model)
    (event,) = Results(str(tmp_path), "tiny").journal()
    assert (event["event"], event["key"], event["launch"]) == ("compute", made.key, "L")
    # Once more it is there already: nothing is computed, and the report is shorter.
    again = Report.from_json(compute_call(call, launch).to_json())
    assert again == Report(Outcome.done)
    assert len(Results(str(tmp_path), "tiny").journal()) == len(logged) == 1


def test_a_call_needs_neither_mlflow_nor_a_journal(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Results, "journal_event", full)
    launch = Launch("L", str(tmp_path / "store"), str(tmp_path), "tiny", None)
    report = compute_call(StageCall(stage(name="cell", function=score).node()), launch)
    assert (report.outcome, report.untracked) == (Outcome.done, "")


def test_a_report_travels_as_text() -> None:
    report = Report(Outcome.inputs, 1.5, "gone", ("a", "b"), {"asr": 0.5}, "away", "cuda")
    assert Report.from_json(report.to_json()) == report


# Waiting ---------------------------------------------------------------------------------------


def test_a_wait_for_another_launch_ends_after_a_while(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WAIT_SECONDS", 0.3)
    with shop.store.leases.lease("a" * 24, "other") as lease:
        assert lease.acquire()
        began = time.monotonic()
        wait_for_others(shop.store.location)
        assert 0.3 <= time.monotonic() - began < 20


def test_a_wait_for_another_launch_ends_when_that_lets_go(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WAIT_SECONDS", 600.0)
    lease = shop.store.leases.lease("a" * 24, "other")
    assert lease.acquire()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            lease.release()

    monkeypatch.setattr(worker.time, "sleep", sleep)
    wait_for_others(shop.store.location)
    assert len(slept) == 2
