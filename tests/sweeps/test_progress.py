"""The display of a running sweep."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from btu.stages import Stage, StageFunction
from btu.types import Progress
from orchestrator.plan.work import Timings, Work
from orchestrator.run.progress import StageProgress, SweepProgress, duration, label
from orchestrator.run.schedule import CELL, Schedule

NOTHING = StageFunction(lambda run: {}, 1, "toys:none")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations_read_like_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("varied", "text"),
    [
        ({}, "the cell"),
        ({"attack.name": "badnets", "attack.poison_rate": 0.1, "seed": 0},
         "badnets poison_rate=0.1 seed=0"),
        ({"defense.name": "btu", "seed": 1}, "name=btu seed=1"),
        ({"attack.poison_rate": 0.0, "defense.alpha": 0.1, "control": "no_poison"},
         "poison_rate=0.0 alpha=0.1 control=no_poison"),
        # Settings of the defense that is left out would mislead.
        ({"defense.alpha": 0.1, "seed": 1, "defense.name": "none", "control": "no_defense"},
         "seed=1 control=no_defense"),
    ],
)  # fmt: skip
def test_a_cell_is_labelled_by_its_coordinates(varied: dict[str, Any], text: str) -> None:
    assert label(varied) == text


def toy(name: str, *inputs: Stage, id: object = None) -> Stage:
    """Return a stage that takes a second; a cell reads no model."""
    named = {f"{before.name} {before.key}": before for before in inputs}
    acts = {"name": name, "id": id}
    return Stage(name, NOTHING, acts, named, light=tuple(named), kind="host", units=1)


def row(name: str, seconds: float = 1.0) -> dict[str, Any]:
    return {"stage": name, "victim": "", "device": "cpu", "units": 1, "seconds": seconds,
            "count": 1}  # fmt: skip


def times(*names: str) -> Timings:
    return Timings(map(row, names), "cpu")


class Sweep:
    """Three cells on a stage each and a shared one, a fourth that is done already."""

    def __init__(self, console: Console, *, known: bool = True, failed: int = 0) -> None:
        self.shared = toy("shared")
        self.own = [toy("own", self.shared, id=number) for number in range(3)]
        self.cells = [toy(CELL, self.shared, own, id=n) for n, own in enumerate(self.own)]
        self.timings = times("shared", "own", CELL) if known else times()
        self.schedule = Schedule(
            self.cells,
            committed=(),
            dropped=(),
            failed={},
            timings=self.timings,
        )
        self.work = Work(
            done=1,
            failed={f"f{n}": "lr too high\nTraceback" for n in range(failed)},
            stages={},
            naive={},
            seconds=None,
            naive_seconds=None,
            longest=None,
            unmeasured=(),
            models=0,
            model_bytes=0,
            small=0,
        )
        self.progress = SweepProgress(console)
        self.progress.begin(self.work, self.schedule, 4 + failed)

    def run(self, stage: Stage) -> None:
        """Start a stage in its turn, and end it successfully."""
        self.begin(stage)
        self.schedule.done(stage.key)
        self.progress.refresh(self.schedule)

    def begin(self, stage: Stage) -> None:
        task = self.schedule.next()
        assert task is not None
        assert task.stage is stage
        self.schedule.mark_running(stage.key)
        self.progress.refresh(self.schedule)


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def sweep(log: io.StringIO) -> Sweep:
    """A sweep in a log."""
    return Sweep(Console(file=log, width=200))


FACTS = {"asr": 0.25, "cacc": 0.5}


def test_a_log_says_first_what_there_is_to_do(sweep: Sweep, log: io.StringIO) -> None:
    assert log.getvalue().splitlines() == [
        "1 of 4 cells are done already and are not run again.",
        # The shared stage, and three of their own.
        "3 cells to run, on 4 stages; results are kept as each one ends.",
        "About 7 s of computing (from the times of such stages).",
    ]


def test_a_log_says_what_failed_earlier(log: io.StringIO) -> None:
    Sweep(Console(file=log, width=200), failed=2)
    assert "2 cells failed earlier and are not run again: lr too high" in log.getvalue()
    assert "--retry-failed runs them again." in log.getvalue()
    assert "Traceback" not in log.getvalue()


def test_with_nothing_to_do_nothing_is_promised(log: io.StringIO) -> None:
    made = Sweep(Console(file=log, width=200))
    log.truncate(log.seek(0))
    done = Schedule([], committed=(), dropped=(), failed={}, timings=times())
    made.progress.begin(made.work, done, 1)
    made.progress.end()
    assert log.getvalue() == "1 of 1 cells are done already and are not run again.\n"


def test_a_log_gets_a_line_per_finished_cell(sweep: Sweep, log: io.StringIO) -> None:
    for stage in (sweep.shared, sweep.own[0], sweep.cells[0]):
        sweep.run(stage)
    sweep.progress.finished({"seed": 1}, FACTS, sweep.schedule)
    sweep.progress.end()
    # 2 of 4 done; 2 x (own, cell) left, a second each, one at a time
    assert "[2/4] seed=1: asr 0.250 cacc 0.500, ETA 4 s" in log.getvalue().splitlines()
    assert log.getvalue().count("[") == 1


def test_stages_that_run_side_by_side_share_the_time(sweep: Sweep, log: io.StringIO) -> None:
    sweep.schedule.slots = 2
    for stage in (sweep.shared, sweep.own[0], sweep.cells[0]):
        sweep.run(stage)
    sweep.progress.finished({"seed": 1}, FACTS, sweep.schedule)
    # 4 s of work, two at once
    assert "ETA 2 s" in log.getvalue()


def test_without_measured_times_nothing_is_guessed(log: io.StringIO) -> None:
    sweep = Sweep(Console(file=log, width=200), known=False)
    sweep.progress.finished({"seed": 1}, FACTS, sweep.schedule)
    assert "asr 0.250 cacc 0.500\n" in log.getvalue()
    assert "ETA" not in log.getvalue()


def test_the_first_stage_brings_the_expected_time(sweep: Sweep, log: io.StringIO) -> None:
    assert "at once" not in log.getvalue()  # how many run at once is not known before
    sweep.schedule.slots = 2
    sweep.begin(sweep.shared)
    # 7 s of work, two at once
    assert log.getvalue().splitlines()[-1] == "With 2 stages at once: about 4 s to go."
    sweep.schedule.done(sweep.shared.key)
    sweep.run(sweep.own[0])
    assert log.getvalue().count("at once") == 1


def test_a_search_is_estimated_as_far_as_it_goes(sweep: Sweep, log: io.StringIO) -> None:
    sweep.progress.begin(sweep.work, sweep.schedule, 4, searching=True)
    assert "About 7 s of computing for the cells suggested so far (from" in log.getvalue()


def test_a_new_kind_of_stage_is_estimated_by_its_rows(log: io.StringIO) -> None:
    sweep = Sweep(Console(file=log, width=200), known=False)
    assert "The time is estimated once the first stage that trains has ended." in log.getvalue()
    sweep.begin(sweep.shared)
    sweep.timings.add(row("shared", 5.0))
    sweep.schedule.done(sweep.shared.key)
    sweep.progress.finished({"seed": 1}, FACTS, sweep.schedule)
    # 6 rows are left, at 5 s a row
    assert "asr 0.250 cacc 0.500, ETA about 30 s\n" in log.getvalue()


def test_before_any_timing_the_offline_victim_has_its_reference(log: io.StringIO) -> None:
    where = {"victim": {"name": "offline"}}
    stage = Stage(CELL, NOTHING, {}, where=where, units=9000)
    schedule = Schedule([stage], committed=(), dropped=(), failed={}, timings=times())
    work = Work(0, {}, {}, {}, None, None, None, (), 0, 0, 0)
    SweepProgress(Console(file=log, width=300)).begin(work, schedule, 1)
    # 9,000 rows at 50 a second
    assert "About 3 min 00 s of computing (a rough estimate: no stage is timed" in log.getvalue()
    assert "50 rows per second are what one CPU core without AMX does" in log.getvalue()


def test_a_log_says_every_minute_where_the_sweep_stands(
    sweep: Sweep, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while nothing begins or ends: time passes."""
    sweep.begin(sweep.shared)
    began = time.monotonic()
    shown = []
    for seconds in (10, 59, 61, 62, 119, 122, 190, 249, 251):
        monkeypatch.setattr("orchestrator.run.progress.time.monotonic", lambda: began + seconds)  # noqa: B023
        log.truncate(log.seek(0))
        sweep.progress.tick(sweep.schedule)
        if log.getvalue():
            shown.append(seconds)
            line = log.getvalue()
    # 60 s after the first stage began, then 60 s after the line before: 61 + 60 < 122 + 60 < 190.
    assert shown == [61, 122, 190, 251]
    assert line == "stages 0 done, 1 running of 4: shared; cells 0 done of 3, ETA 7 s\n"


def test_failed_cells_count_as_ended(sweep: Sweep, log: io.StringIO) -> None:
    sweep.run(sweep.shared)
    sweep.begin(sweep.own[0])
    sweep.schedule.fail(sweep.own[0].key, "no")
    for stage in (sweep.own[1], sweep.cells[1]):
        sweep.run(stage)
    sweep.progress.finished({"seed": 1}, FACTS, sweep.schedule)
    # One done before, one failed, one done now.
    assert "[3/4] seed=1" in log.getvalue()


def test_a_search_that_grows_counts_what_was_there(sweep: Sweep, log: io.StringIO) -> None:
    # A suggestion of a cell that an earlier sweep has finished, and of one that is new.
    old, new = toy(CELL, sweep.shared, id="old"), toy(CELL, sweep.shared, id="new")
    sweep.schedule.committed.add(old.key)
    sweep.schedule.add([old, new])
    sweep.progress.grown(6)
    sweep.run(sweep.shared)
    sweep.run(new)
    sweep.progress.finished({}, FACTS, sweep.schedule)
    # One done before the launch, the old one, the new one.
    assert "[3/6] the cell: asr 0.250" in log.getvalue()


def test_a_failed_stage_names_the_cells_that_fall_with_it(sweep: Sweep, log: io.StringIO) -> None:
    cells = [{"seed": number} for number in range(5)]
    sweep.progress.failed("unlearn", cells, "loss [0, 1]\nmore", "store/failed/k.json")
    assert (
        "FAILED: stage 'unlearn' of seed=0, seed=1, seed=2 and 2 more cells: loss [0, 1] "
        "(store/failed/k.json)"
    ) in log.getvalue()
    assert "\nmore" not in log.getvalue()


def test_a_failed_cell_shows_the_first_line_of_its_reason(sweep: Sweep, log: io.StringIO) -> None:
    sweep.progress.failed(CELL, [{}], "one [0, 1]\ntwo", "p")
    assert "FAILED: the cell: one [0, 1] (p)" in log.getvalue()
    assert "two" not in log.getvalue()


def test_a_failure_without_a_reason_does_not_stop_the_sweep(sweep: Sweep, log: io.StringIO) -> None:
    # An exception in a Tune callback kills the whole sweep.
    sweep.progress.failed("unlearn", [], "", "p")
    assert "no reason given" in log.getvalue()


def test_a_result_that_mlflow_missed_is_told(sweep: Sweep, log: io.StringIO) -> None:
    sweep.progress.untracked({"seed": 1}, "ConnectionError: gone\nand more")
    assert "not in MLflow yet: seed=1 (ConnectionError: gone)\n" in log.getvalue()


def test_an_undefined_rate_does_not_stop_the_sweep(sweep: Sweep, log: io.StringIO) -> None:
    sweep.progress.finished({"seed": 1}, {"asr": float("nan"), "cacc": 0.5}, sweep.schedule)
    assert "[1/4] seed=1: asr nan cacc 0.500" in log.getvalue()


def test_a_cell_that_ends_without_a_word_does_not_stop_the_sweep(
    sweep: Sweep, log: io.StringIO
) -> None:
    sweep.progress.finished({"seed": 1}, {}, sweep.schedule)
    assert "[1/4] seed=1:" in log.getvalue()


def test_a_terminal_gets_two_live_lines() -> None:
    screen = io.StringIO()
    sweep = Sweep(Console(file=screen, width=120, force_terminal=True))
    for stage in (sweep.shared, sweep.own[0], sweep.cells[0]):
        sweep.run(stage)
    sweep.begin(sweep.own[1])
    sweep.progress.finished({"seed": 0}, FACTS, sweep.schedule)
    sweep.progress.end()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    # 2 of 4 stages and 1 of 3 cells are done, one stage runs; 2 x (own, cell) are left.
    assert "2 done, 1 running of 4: own" in shown
    assert "1 done of 3, ETA 4 s" in shown
    assert "[2/4]" not in shown  # the line shows it already
    # The cursor is back.
    assert screen.getvalue().count("\x1b[?25h") == screen.getvalue().count("\x1b[?25l") == 1


def test_what_runs_is_named_with_its_number() -> None:
    screen = io.StringIO()
    sweep = Sweep(Console(file=screen, width=160, force_terminal=True))
    sweep.run(sweep.shared)
    for stage in sweep.own:
        sweep.begin(stage)
    sweep.progress.end()
    assert "1 done, 3 running of 4: 3 x own" in re.sub(r"\x1b\[[0-9;?]*m", "", screen.getvalue())


def test_a_trial_tells_stage_epoch_and_metrics() -> None:
    log = io.StringIO()
    tell = StageProgress(Console(file=log, width=120))
    tell(Progress("poisoned fine-tune", 1, 3, {"loss": 0.5, "accuracy": 0.25, "seconds": 3.0}))
    tell(Progress("clean tuning", 1, 1))
    first, second = log.getvalue().splitlines()
    assert " ".join(first.split()) == "0 s poisoned fine-tune 1/3 loss 0.5000 accuracy 0.2500"
    assert " ".join(second.split()) == "0 s clean tuning"


def test_a_long_epoch_says_when_its_stage_will_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 30.0])
    monkeypatch.setattr("orchestrator.run.progress.time.monotonic", lambda: next(clock))
    log = io.StringIO()
    tell = StageProgress(Console(file=log, width=120))
    tell(Progress("poisoned fine-tune", 0, 3))
    tell(Progress("poisoned fine-tune", 1, 3, part=0.5))
    # 1.5 of 3 epochs in 30 s: half is done, and as much time is left.
    assert " ".join(log.getvalue().splitlines()[1].split()) == (
        "30 s poisoned fine-tune 50%, 30 s left"
    )
