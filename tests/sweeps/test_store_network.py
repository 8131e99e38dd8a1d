"""A store over a network: its requests, what a machine keeps, and what markers contain."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import key_of

from btu.result_files import RESULT
from btu.stages import Stage, StageRun, stage
from orchestrator.results import journal as journal_module
from orchestrator.results.folder import Results
from orchestrator.results.journal import Journal
from orchestrator.run.elsewhere import LEASES_REMOTE_SECONDS, Elsewhere
from orchestrator.run.worker import Outcome, run_node
from orchestrator.store import lease as lease_module
from orchestrator.store.gc import Usage, gc, gc_candidates, usage
from orchestrator.store.lease import LOOK_S
from orchestrator.store.marker import SIGNING_KEY
from orchestrator.store.packed import PACKED_BYTES
from orchestrator.store.storage import open_storage
from orchestrator.store.store import Damaged, Missing, Store

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
K = key_of("k")
LARGE = b"0" * (PACKED_BYTES + 1)
FILES = {"record.json": b'{"a": 1}', "model/config.json": b"{}", "model/weights": LARGE}


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The object store of `benchmarks/s3_costs.py`, at ``s3://``. It counts requests."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("s3_costs").FakeS3
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "s3", found)
    found.forget()
    yield found
    found.forget()
    del sys.modules["s3_costs"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_store(fake: Any, tmp_path: Path, clock: Clock) -> Callable[..., Store]:
    """A function that opens the store from a machine, by its name."""
    return lambda machine="here": Store(
        "s3://bucket/store", cache=tmp_path / machine, warn=lambda _: None, clock=clock
    )


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


def add(store: Store, key: str = K, **files: bytes) -> None:
    folder = store.workspace(key)
    for path, content in (files or FILES).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    store.publish(key, folder, "train", {})


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def requests(fake: Any, call: Callable[[], Any]) -> dict[str, int]:
    """Return the requests of a call, by kind."""
    before = Counter(fake.requests)
    call()
    return dict(Counter(fake.requests) - before)


def objects(fake: Any, below: str) -> list[str]:
    lead = f"bucket/store/{below}/"
    return sorted(name[len(lead) :] for name in fake.objects if name.startswith(lead))


# Packed files ----------------------------------------------------------------------------------


def test_small_files_are_in_the_marker_and_large_ones_are_objects(
    store: Store, make_store: Callable[..., Store], fake: Any
) -> None:
    add(store)
    marker = store.marker(K)
    assert marker is not None
    assert objects(fake, "entries") == [f"{K}/{marker.attempt}/model/weights"]
    assert marker.small == {name: FILES[name] for name in ("record.json", "model/config.json")}
    assert set(marker.files) == set(FILES)
    other = make_store("there")
    assert content(other.fetch(K)) == FILES
    assert content(make_store("third").fetch(K, light=True)) == {
        "record.json": FILES["record.json"]
    }


def test_the_smallest_files_go_first_and_together_they_fit(store: Store) -> None:
    # 10 + half fit; a second half would make 10 bytes too many.
    half = b"1" * (PACKED_BYTES // 2)
    add(store, a=half, b=half, c=b"0123456789")
    marker = store.marker(K)
    assert marker is not None
    assert sorted(marker.small) == ["a", "c"]


def test_a_folder_has_no_packed_files(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    add(store)
    marker = store.marker(K)
    assert marker is not None
    assert marker.small == {}
    assert content(store.fetch(K)) == FILES


def test_dropping_takes_packed_files_of_the_model(
    store: Store, make_store: Callable[..., Store], fake: Any
) -> None:
    add(store)
    assert store.drop(K) == len(LARGE) + len(FILES["model/config.json"])
    assert objects(fake, "entries") == []
    other = make_store("there")
    assert content(other.fetch(K, light=True)) == {"record.json": FILES["record.json"]}
    with pytest.raises(Missing):
        other.fetch(K)
    assert other.read_json(K, "record.json") == {"a": 1}


@pytest.mark.parametrize(
    ("small", "reason"),
    [
        ({"record.json": b64encode(b'{"a": 2}').decode()}, r"record\.json has other content"),
        ({"record.json": "?"}, r"record\.json has other content"),
        ({"record.json": 1}, r"record\.json has other content"),
        ({"../x": ""}, "its marker has wrong files"),
        ([], "its marker has wrong files"),
    ],
)
def test_packed_files_that_do_not_fit_make_the_marker_invalid(
    store: Store, make_store: Callable[..., Store], fake: Any, small: Any, reason: str
) -> None:
    add(store)
    path = f"markers/{K}.json"
    record = json.loads(store.storage.read(path))
    store.storage.write(path, json.dumps({**record, "small": small}).encode())
    told: list[str] = []
    other = make_store("there")
    other._warn = told.append
    with pytest.raises(Missing):
        other.fetch(K)
    assert len(told) == 1
    assert reason.replace("\\", "") in told[0]
    assert not store.is_committed(K)
    # The marker, with what it brought along, is kept for a look.
    kept = [name for name in objects(fake, "damaged") if name.endswith("marker.json")]
    assert len(kept) == 1


def test_a_damaged_entry_keeps_its_packed_files_for_a_look(
    store: Store, make_store: Callable[..., Store], fake: Any
) -> None:
    add(store)
    marker = store.marker(K)
    assert marker is not None
    store.storage.remove(f"{marker.folder}/model/weights")
    with pytest.raises(Damaged, match="model/weights is missing"):
        make_store("there").fetch(K)
    aside = f"{K}-{marker.attempt}"
    assert objects(fake, "damaged") == [
        f"{aside}/model/config.json", f"{aside}/reason.txt", f"{aside}/record.json",
    ]  # fmt: skip


def test_room_is_that_of_packed_files_too(store: Store) -> None:
    add(store)
    add(store, key_of("small"), a=b"12345")  # which has no object of its own
    size = sum(map(len, FILES.values()))
    assert usage(store) == {"train": Usage(2, size + 5)}
    assert store.verify() == []
    candidates = gc_candidates(store, keep=[K])
    assert gc(store, candidates) == 5
    assert store.committed() == {K}


def test_signing_keeps_packed_files(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(make_store())
    monkeypatch.setenv(SIGNING_KEY, "a secret of some length")
    store = make_store()
    with pytest.raises(Missing):
        store.fetch(K)
    # Nor does the copy that this machine has, whose marker is not signed either.
    with pytest.raises(Missing):
        store.input(K)
    assert store.sign(K) is None
    assert content(make_store("there").fetch(K)) == FILES


def test_a_copy_of_an_object_store_in_a_folder_works(
    store: Store, fake: Any, tmp_path: Path
) -> None:
    add(store)
    copy = tmp_path / "copy"
    for name, (data, _) in fake.objects.items():
        path = copy / name.removeprefix("bucket/store/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    local = Store(copy)
    assert local.read_json(K, "record.json") == {"a": 1}
    assert local.verify() == []
    assert content(local.fetch(K)) == FILES
    assert usage(local) == usage(store)


# Copies of a machine -----------------------------------------------------------------------------


def test_what_a_machine_has_written_or_read_it_does_not_fetch(
    store: Store, make_store: Callable[..., Store], fake: Any
) -> None:
    add(store)
    # The worker beside it is another process.
    neighbour = make_store()
    assert requests(fake, lambda: neighbour.input(K)) == {}
    assert content(neighbour.input(K)) == FILES
    other = make_store("there")
    # Its marker with the small files, and the large one.
    assert requests(fake, lambda: other.input(K)) == {"GET": 2}
    assert requests(fake, lambda: make_store("there").input(K)) == {}


def test_a_light_copy_lacks_the_model_and_the_rest_is_fetched(
    store: Store, make_store: Callable[..., Store], fake: Any
) -> None:
    add(store)
    other = make_store("there")
    assert requests(fake, lambda: other.input(K, light=True)) == {"GET": 1}
    assert requests(fake, lambda: other.input(K, light=True)) == {}
    assert requests(fake, lambda: other.input(K)) == {"GET": 2}
    assert content(other.input(K)) == FILES


def test_a_copy_is_checked_by_hash(store: Store, fake: Any) -> None:
    add(store)
    copy = store.input(K)
    (copy / "model" / "weights").write_bytes(b"1" * len(LARGE))
    assert content(store.input(K)) == FILES
    (copy / "record.json").unlink()
    assert content(store.input(K)) == FILES
    shutil.rmtree(store._cache.folder)
    assert content(store.input(K)) == FILES


def test_a_marker_of_a_copy_that_is_damaged_is_read_again(store: Store) -> None:
    add(store)
    (store._cache.folder / "markers" / f"{K}.json").write_bytes(b"{")
    assert content(store.input(K)) == FILES


def test_workers_that_fetch_at_once_all_get_it_whole(
    store: Store, make_store: Callable[..., Store], fake: Any
) -> None:
    add(store)
    fake.latency = 0.005
    try:
        found: list[dict[str, bytes]] = []
        stores = [make_store("there") for _ in range(8)]
        threads = [
            threading.Thread(target=lambda one=one: found.append(content(one.input(K))))
            for one in stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        fake.latency = 0.0
    # One may see the file that another is writing, under a hidden name.
    assert [{n: data for n, data in one.items() if "/." not in n} for one in found] == [FILES] * 8


def test_a_published_copy_counts_for_the_room_of_the_cache(store: Store, tmp_path: Path) -> None:
    add(store)
    assert (tmp_path / "here").is_dir()
    assert store.trim_cache(10**12) == 0  # the first looks, whatever was fetched
    add(store, key_of("b"))
    assert store._cache._fetched == sum(map(len, FILES.values()))


def test_a_cache_that_is_full_loses_no_result(
    store: Store, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store._cache, "adopt", full)
        add(store)
    assert content(make_store("there").fetch(K)) == FILES


# Requests ----------------------------------------------------------------------------------------


@stage(version=1, id="test_store_network:small")
def small(run: StageRun) -> dict[str, Any]:
    (run.folder / "record-of-its-own.json").write_text("{}")
    return {}


def test_a_stage_makes_few_requests(
    store: Store, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 600.0)  # a slow machine would beat
    first = Stage("first", small, {"n": 1})
    second = Stage("second", small, {"n": 2}, inputs={"before": first})

    def compute(stage: Stage, **named: Any) -> None:
        assert run_node(stage.node(), store, owner="launch", **named).outcome is Outcome.done

    # PUT: the lease, once more to see whether creating is exclusive, the marker. GET: the marker,
    # the failure and the dropped marker before it computes, the lease when it is released.
    assert requests(fake, lambda: compute(first)) == {"PUT": 3, "GET": 4, "DELETE": 1}
    # The input is on this machine; without a model there is no dropped marker.
    assert requests(fake, lambda: compute(second, model=False)) == {"PUT": 2, "GET": 3, "DELETE": 1}
    assert objects(fake, "leases") == []
    # A result that is there: lease, look and release.
    assert requests(fake, lambda: compute(second)) == {"PUT": 1, "GET": 4, "DELETE": 1}


def test_a_heartbeat_is_one_request_and_a_look_now_and_then(
    store: Store, fake: Any, clock: Clock
) -> None:
    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
        assert requests(fake, lease.beat) == {"PUT": 1}
        clock.seconds += LOOK_S
        assert requests(fake, lease.beat) == {"PUT": 1, "GET": 1}
        assert requests(fake, lease.beat) == {"PUT": 1}
    assert objects(fake, "leases") == []


def test_where_creating_is_not_exclusive_a_lease_is_read_back(
    store: Store, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = fake.pipe_file
    monkeypatch.setattr(fake, "pipe_file", lambda self, path, value, **_: pipe(self, path, value))
    with store.leases.lease(K, "me") as lease:
        assert lease.acquire()
    assert not store.storage.exclusive
    with store.leases.lease(K, "me") as lease:
        assert requests(fake, lease.acquire) == {"PUT": 1, "GET": 1}


def test_a_holder_that_beats_again_keeps_a_lease_that_seemed_dead(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"owner": "other", "host": "elsewhere", "pid": 1, "started": "1", "token": "t"}
    store.storage.write(f"leases/{K}.json", json.dumps(held).encode())
    assert store.leases.held_by_other(K, "me")
    clock.seconds += lease_module.TTL_S
    create = store.storage.create

    def slow(path: str, *arguments: Any, **named: Any) -> bool:
        if path.endswith(".guard"):  # it comes back while its lease is being taken
            store.storage.write(f"leases/{K}.beat", b'{"token": "t", "beat": 1}')
        return create(path, *arguments, **named)

    monkeypatch.setattr(store.storage, "create", slow)
    assert not store.leases.lease(K, "me").acquire()
    assert store.leases.held()[K]["beat"] == 1
    assert store.leases.held_by_other(K, "me")


def test_looks_cost_a_listing(store: Store, fake: Any) -> None:
    store.leases.register_launch("mine", "sweep", [K])
    assert requests(fake, store.leases.leased) == {"LIST": 1}
    assert requests(fake, store.failed) == {"LIST": 1}
    assert requests(fake, store.dropped) == {"LIST": 2}  # of no folder, its parent as well
    add(store)
    assert requests(fake, store.dropped) == {"LIST": 1}
    # Of the launches, and the lease, which is not there.
    assert requests(fake, lambda: store.leases.is_wanted(K, but="mine")) == {"LIST": 1, "GET": 1}


def test_a_launch_lists_the_leases_now_and_then(store: Store, fake: Any, clock: Clock) -> None:
    elsewhere = Elsewhere(store, "mine", clock)

    def computes() -> bool:
        return elsewhere.computes(K)

    assert requests(fake, computes) == {"LIST": 1}
    clock.seconds += LEASES_REMOTE_SECONDS
    assert requests(fake, computes) == {}
    clock.seconds += 1
    assert requests(fake, computes) == {"LIST": 1}
    # A worker has found the lease of another launch: the next look lists them, and reads it.
    held = {"owner": "other", "host": "elsewhere", "pid": 1, "started": "1", "token": "t"}
    store.storage.write(f"leases/{K}.json", json.dumps(held).encode())
    assert not computes()
    elsewhere.found(K)
    assert computes()


def test_another_launch_or_lease_wants_a_key(
    store: Store, make_store: Callable[..., Store]
) -> None:
    store.leases.register_launch("mine", "sweep", [K])
    assert not store.leases.is_wanted(K, but="mine")
    other = make_store("there")
    other.leases.register_launch("yours", "sweep", [K])
    assert store.leases.is_wanted(K, but="mine")
    assert not store.leases.is_wanted(key_of("else"), but="mine")
    other.leases.release_launch("yours")
    with other.leases.lease(K, "yours") as lease:
        assert lease.acquire()
        assert store.leases.is_wanted(K, but="mine")
    assert not store.leases.is_wanted(K, but="mine")


def test_records_are_read_once_until_they_change(store: Store, fake: Any) -> None:
    keys = [key_of(name) for name in "abc"]
    for key in keys:
        add(store, key, **{RESULT: b'{"n": 1}', "large": LARGE})

    def read() -> list[tuple[str, Any]]:
        return list(store.read_jsons([*keys, key_of("none")], RESULT))

    assert requests(fake, read) == {"LIST": 1, "GET": 3}
    assert requests(fake, read) == {"LIST": 1}
    store.set_aside(keys[0], "for a test")
    add(store, keys[0], **{RESULT: b'{"n": 2}'})
    assert read() == [(keys[0], {"n": 2}), (keys[1], {"n": 1}), (keys[2], {"n": 1})]
    store.drop(keys[1])
    store.set_aside(keys[2], "for a test")
    assert read() == [(keys[0], {"n": 2})]


def test_timings_of_many_launches_cost_a_listing(store: Store, fake: Any) -> None:
    row = {"stage": "s", "victim": "v", "device": "cpu", "units": 1, "seconds": 1.0, "count": 1}
    for launch in ("a", "b", "c"):
        store.add_timings(launch, [row])
    assert len(store.timings()) == 3
    assert requests(fake, store.timings) == {"LIST": 1, "GET": 3}


# The journal -------------------------------------------------------------------------------------


@pytest.fixture
def results(fake: Any, store: Store) -> Iterator[Results]:
    yield Results("s3://bucket/runs", "sweep", store)
    journal_module._journals.clear()


def test_lines_of_the_journal_are_written_together(results: Results, fake: Any) -> None:
    def events() -> None:
        for n in range(5):
            results.journal_event("start", key=K, n=n)

    assert requests(fake, events) == {}
    # Another look in this process sees them: it writes them first.
    other = Results("s3://bucket/runs", "sweep", results.store)
    found: list[dict[str, Any]] = []
    assert requests(fake, lambda: found.extend(other.journal())) == {"PUT": 1, "LIST": 1, "GET": 1}
    assert [event["n"] for event in found] == [0, 1, 2, 3, 4]
    assert requests(fake, lambda: results.journal_now("compute", key=K)) == {"PUT": 1}
    results.journal_event("end", key=K)
    assert requests(fake, results.end_journal) == {"PUT": 1}
    assert [event["event"] for event in results.journal()][5:] == ["compute", "end"]


def test_the_journal_is_written_after_a_while_and_when_it_is_long(
    results: Results, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MOST_LINES", 3)
    assert requests(fake, lambda: [results.journal_event("start", key=K) for _ in range(4)]) == {
        "PUT": 1
    }
    results.end_journal()
    monkeypatch.setattr(journal_module, "FLUSH_S", 0.01)
    before = fake.requests["PUT"]
    results.journal_event("start", key=K)
    until = time.monotonic() + 30
    while fake.requests["PUT"] == before and time.monotonic() < until:
        time.sleep(0.01)
    assert fake.requests["PUT"] == before + 1


def test_lines_that_could_not_be_written_wait(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise OSError("connection lost")

    results.journal_event("start", key=K)
    with monkeypatch.context() as patch:
        patch.setattr(results.storage, "append", lost)
        results.end_journal()
        with pytest.raises(OSError, match="connection lost"):
            results.journal_now("compute", key=K)
    assert [event["event"] for event in results.journal()] == ["start", "compute"]


def test_in_a_folder_each_line_is_written_at_once(tmp_path: Path) -> None:
    storage = Results(str(tmp_path), "sweep").storage
    Journal(storage, "sweep/journal.jsonl").add('{"n": 1}')
    assert (tmp_path / "sweep" / "journal.jsonl").read_text() == '{"n": 1}\n'


def test_a_journal_is_made_once_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    init = journal_module.Journal.__init__

    def counted(self: Any, storage: Any, path: str) -> None:
        made.append(path)
        init(self, storage, path)

    monkeypatch.setattr(journal_module.Journal, "__init__", counted)
    storage = open_storage("memory://journal-once")
    first = journal_module.journal_of(storage, "a/journal.jsonl")
    assert journal_module.journal_of(storage, "a/journal.jsonl") is first
    assert made == ["a/journal.jsonl"]


def test_lines_that_cannot_be_written_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("memory://journal-away")

    def away(*_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(storage, "append", away)
    monkeypatch.setattr(journal_module, "MOST_LINES", 2)
    made = journal_module.Journal(storage, "a/journal.jsonl")
    for _ in range(3):
        made.add("{}")
    monkeypatch.undo()
    made.flush()
    assert storage.lines("a/journal.jsonl") == ["{}"] * 3


def test_when_one_call_fails_none_of_the_others_runs_any_more() -> None:
    storage = open_storage("memory://map")
    running = threading.Event()
    ended: list[str] = []

    def call(name: str) -> str:
        if name == "fails":
            assert running.wait(60)
            raise FileNotFoundError(name)
        running.set()
        time.sleep(0.2)
        ended.append(name)
        return name

    with pytest.raises(FileNotFoundError, match="fails"):
        storage.map(call, ["slow", "fails"])
    assert ended == ["slow"]  # and not later, into a folder that is being removed
    assert storage.map(str.upper, ["a", "b"]) == ["A", "B"]
