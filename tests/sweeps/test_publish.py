"""What a launch writes to MLflow, and prints if it cannot; no server is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import wait_for

from orchestrator.results.folder import Results
from orchestrator.run import publish
from orchestrator.run.publish import Publisher
from orchestrator.sweep.load import load_sweep


class Desk:
    """A publisher with a fake MLflow, and the calls to it.

    answers: the experiment's id, None for a server that is away. missing: how many runs cannot be
    written. unwritten: why something could not. refuses: what a summary raises.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
        from orchestrator.tracking import apart, experiment, sync
        from orchestrator.tracking.server import brief

        file = folder / "tiny.yaml"
        file.write_text(f"name: tiny\noutput: {folder / 'runs'}\ntracking: {{uri: '{uri}'}}\n")
        sweep = load_sweep(file)
        self.answers: str | None = "7"
        self.reason = "Connection refused"
        self.missing, self.unwritten = 0, ""
        self.refuses: Exception | None = None
        self.prepared = 0
        self.synced: list[tuple[str, str, str]] = []
        self.live: Callable[[str], bool]
        self.summaries: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.results = Results(sweep.output, sweep.name)
        self.results.store.prepare()
        self.publisher = Publisher(sweep, self.results, self.notes.append)

        def prepare(sweep: Any, tell: Any) -> tuple[str | None, str]:
            self.prepared += 1
            return self.answers, "" if self.answers else self.reason

        def written(uri: str, id: str, results: Any, live: Any, owner: str) -> Any:
            assert results is self.results
            self.synced.append((uri, id, owner))
            self.live = live
            return SimpleNamespace(missing=self.missing, reason=self.unwritten)

        def summarize(uri: str, id: str, results: Any) -> None:
            self.summaries.append((uri, id))
            if self.refuses is not None:
                raise self.refuses

        def write(self_: Any) -> str:
            told = json.loads(self_._told)
            assert (told["output"], told["name"]) == (sweep.output, "tiny")
            try:
                summarize(told["uri"], told["experiment_id"], self.results)
            except Exception as error:
                return brief(error)
            return ""

        monkeypatch.setattr(experiment, "prepare", prepare)
        monkeypatch.setattr(experiment, "has_no_run", lambda *_: True)
        monkeypatch.setattr(sync, "sync", written)
        monkeypatch.setattr(apart.Summaries, "write", write)
        monkeypatch.setattr(sync, "summarize", summarize)
        monkeypatch.setattr(sync.Pace, "due", lambda self, now: True)
        monkeypatch.setattr(publish, "SUMMARY_LOOK", 0.001)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def build(uri: str = "http://me:secret@host") -> Desk:
        made.append(Desk(tmp_path, monkeypatch, uri))
        return made[-1]

    yield build
    for one in made:
        one.publisher.stop()


def test_a_summary_is_written_while_cells_end_and_its_failure_is_told_once(
    desk: Callable[..., Desk],
) -> None:
    made = desk()
    made.refuses = ConnectionError("http://me:secret@host is away")
    made.publisher.prepare()
    made.publisher.start()
    for count in (1, 2):
        assert len(made.summaries) == count - 1  # no further cell has ended
        made.publisher.cell_ended()
        wait_for(lambda count=count: len(made.summaries) == count, limit=60)
    made.publisher.stop()
    assert made.summaries == [("http://me:secret@host", "7")] * 2
    (note,) = made.notes
    assert note.startswith("the sweep's summary in MLflow is not up to date (ConnectionError: http")
    assert "btu sync tiny" in note
    assert "secret" not in note
    # Once it has stopped, nothing is written.
    made.publisher.cell_ended()
    time.sleep(0.02)  # it looked every 0.001 s
    assert len(made.summaries) == 2


def test_whoever_stops_a_launch_need_not_wait_for_a_summary(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import apart

    drawing, asked_to_end = threading.Event(), threading.Event()
    ends: list[bool] = []

    def draw(self: Any) -> str:
        drawing.set()
        assert asked_to_end.wait(60)
        return ""

    def end(self: Any, *, kill: bool = False) -> None:
        ends.append(kill)
        if kill or len(hard) == 0:
            asked_to_end.set()

    monkeypatch.setattr(apart.Summaries, "write", draw)
    monkeypatch.setattr(apart.Summaries, "end", end)
    monkeypatch.setattr(publish, "STOP_SECONDS", 0.05)
    hard = [True]  # it does not end when it is asked to
    made = desk()
    monkeypatch.setattr(apart.Summaries, "write", draw)
    made.publisher.prepare()
    made.publisher.start()
    made.publisher.cell_ended()
    assert drawing.wait(60)
    made.publisher.stop()
    assert ends == [False, True]
    assert made.notes == []


def process(uri: str, folder: Path) -> Any:
    """Return what writes the summary of a sweep without cells, to a store at `uri`."""
    from orchestrator.tracking.apart import Summaries

    Results(str(folder / "runs"), "tiny").store.prepare()
    return Summaries(uri, "7", str(folder / "runs"), "tiny")


@pytest.mark.slow
def test_the_reason_of_another_process_is_told_without_the_password(tmp_path: Path) -> None:
    reason = process("postgresql+nothing://me:secret@host/db", tmp_path).write()
    assert "nothing" in reason
    assert "secret" not in reason
    assert "\n" not in reason


def test_a_process_that_writes_a_summary_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import apart

    monkeypatch.setattr(apart, "CODE", "import time; time.sleep(600)")
    made = process("sqlite:///x.db", tmp_path)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(made.write()))
    thread.start()
    wait_for(lambda: made._process is not None, limit=60)
    made.end()
    thread.join(60)
    assert said == [""]  # nothing to tell: it was asked to
    assert made.write() == ""  # none is started any more
    assert made._process.returncode != 0


def test_the_process_finds_modules_where_this_one_does_and_hides_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import apart

    seen: list[list[str]] = []

    class Spied(apart.subprocess.Popen):  # type: ignore[misc,name-defined]
        def __init__(self, args: list[str], **options: Any) -> None:
            seen.append(args)
            super().__init__(args, **options)

    monkeypatch.setattr(apart.subprocess, "Popen", Spied)
    # The working folder is in the path of a `python -c`; another user may write to it.
    (tmp_path / "orchestrator.py").write_text("raise SystemExit('from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(apart, "CODE", apart.CODE.replace("write(**told)", "print('read')"))
    assert process("sqlite:///u:secret@x", tmp_path).write() == ""
    assert not any("secret" in word for word in seen[0])


def test_a_long_reason_of_a_server_ends_at_a_word(desk: Callable[..., Desk]) -> None:
    made = desk()
    # 143 letters and " ..." are 147 characters of at most 150; with "(host" they would be 153.
    made.answers, made.reason = None, f"{'a' * 143} (host port=5000)"
    made.publisher.prepare()
    assert f"({'a' * 143} ...)" in made.notes[0]


def test_a_server_that_is_away_is_named_and_asked_again_at_the_end(
    desk: Callable[..., Desk], tmp_path: Path
) -> None:
    made = desk()
    made.answers = None
    made.publisher.prepare()
    assert made.publisher.tracking is None
    command = f"btu sync tiny --output {tmp_path / 'runs'} --uri http://host"
    assert made.notes == [
        "MLflow at http://host does not answer (Connection refused); the sweep runs all the same. "
        f"Results wait on disk: {command} writes them."
    ]
    # Nothing is drawn meanwhile.
    made.publisher.start()
    made.publisher.cell_ended()
    made.publisher.stop()
    made.publisher.synchronize("me", interrupted=False)
    assert (made.prepared, made.synced, made.summaries) == (2, [], [])
    # Back again, it gets what it missed.
    made.answers = "8"
    made.publisher.synchronize("me", interrupted=False)
    assert made.synced == [("http://me:secret@host", "8", "me")]
    assert made.summaries == [("http://me:secret@host", "8")]
    assert made.publisher.tracking == {
        "uri": "http://me:secret@host", "id": "8", "fresh": False, "models": False,
    }  # fmt: skip


def test_the_server_is_recorded_before_it_is_asked(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take long to answer, and `btu status` may be asked meanwhile."""
    from orchestrator.tracking import experiment
    from orchestrator.tracking.server import launched_uri

    made = desk("http://host")
    asked: list[str] = []

    def prepare(*_: object) -> tuple[None, str]:
        asked.append(launched_uri(made.results, "--uri"))
        return None, "away"

    monkeypatch.setattr(experiment, "prepare", prepare)
    made.publisher.prepare()
    assert asked == ["http://host"]


def test_results_that_mlflow_misses_are_counted(desk: Callable[..., Desk], tmp_path: Path) -> None:
    made = desk()
    made.missing, made.unwritten = 3, "ConnectionError: away"
    made.publisher.prepare()
    made.publisher.synchronize("me", interrupted=False)
    made.missing = 0
    made.publisher.synchronize("me", interrupted=False)
    command = f"btu sync tiny --output {tmp_path / 'runs'} --uri http://host"
    assert made.notes == [
        f"3 results are on disk but not in MLflow (ConnectionError: away); {command} writes them "
        "once http://host answers.",
        f"Unfinished runs in MLflow were not looked for (ConnectionError: away); {command} closes "
        "them once http://host answers.",
    ]
    # The leases of other launches are live, its own are not: its workers have ended.
    with made.results.store.leases.lease("a" * 24, "other") as lease:
        assert lease.acquire()
        assert made.live("a" * 24)
    with made.results.store.leases.lease("a" * 24, "me") as lease:
        assert lease.acquire()
        assert not made.live("a" * 24)


def test_what_a_server_misses_is_counted_in_cells(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that goes away fails to close unfinished runs too; that is no further cell."""
    from orchestrator.tracking import sync
    from orchestrator.tracking.writer import Known

    made = desk()

    class Away:
        def __init__(self, *_: object) -> None: ...

        def identify(self) -> None: ...

        def known(self, *_: object, **__: object) -> Known:
            return Known()

        def close_orphans(self, *_: object) -> int:
            raise ConnectionError("away")

        def log(self, *_: object) -> bool:
            raise ConnectionError("away")

    monkeypatch.undo()  # the desk's own `sync`
    monkeypatch.setattr(sync, "Tracker", Away)
    finished = {"status": "finished", "varied": {}, "started": 1.0}
    records = {key: {"key": key, **finished} for key in ("a" * 24, "b" * 24)}
    monkeypatch.setattr(made.results, "records", lambda cells: iter(records.values()))
    monkeypatch.setattr(made.results, "record", lambda key, varied: records[key])
    monkeypatch.setattr(made.results.store, "fetch", lambda key: tmp_path)
    done = sync.sync("http://host", "7", made.results, lambda key: False)
    assert (done.missing, done.reason) == (2, "ConnectionError: away")
    # With all runs there, the reason is that of the unfinished runs.
    monkeypatch.setattr(Away, "log", lambda *_: True)
    done = sync.sync("http://host", "7", made.results, lambda key: False)
    assert (done.written, done.missing, done.reason) == (2, 0, "ConnectionError: away")


@pytest.mark.parametrize(
    ("uri", "synced"), [("http://host", 0), ("https://host", 0), ("sqlite:////tmp/x.db", 1)]
)
def test_an_interrupted_launch_asks_no_server_and_draws_nothing(
    desk: Callable[..., Desk], uri: str, synced: int
) -> None:
    made = desk(uri)
    made.publisher.prepare()
    made.publisher.synchronize("me", interrupted=True)
    assert len(made.synced) == synced
    assert made.summaries == []
