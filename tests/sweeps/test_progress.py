"""What a person sees while a sweep runs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from btu.types import Progress
from orchestrator.progress import StageProgress, SweepProgress, duration, label


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
    ],
)  # fmt: skip
def test_a_cell_is_labelled_by_its_coordinates(varied: dict[str, Any], text: str) -> None:
    assert label(varied) == text


def finished(seconds: float = 10.0, **more: Any) -> dict[str, Any]:
    return {"status": "finished", "cell_asr": 0.25, "cell_cacc": 0.5, "reason": "",
            "trial_seconds": seconds, "untracked": "", **more}  # fmt: skip


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(log: io.StringIO) -> SweepProgress:
    """A sweep of four cells, one of them done before, in a log."""
    made = SweepProgress(Console(file=log, width=200))
    made.begin(total=4, done=1)
    return made


def test_a_log_gets_a_line_per_finished_cell(progress: SweepProgress, log: io.StringIO) -> None:
    progress.started("a")
    progress.finished("a", {"seed": 1}, finished())
    progress.end()
    lines = log.getvalue().splitlines()
    assert lines[0] == "1 of 4 cells are done already and are not run again."
    # 2 of 4 done; the 2 left take 10 s each, one at a time
    assert "[2/4] seed=1: asr 0.250 cacc 0.500 in 10 s, ETA 20 s" in lines
    assert log.getvalue().count("[") == 1


def test_cells_that_run_side_by_side_share_the_time(
    progress: SweepProgress, log: io.StringIO
) -> None:
    progress.started("a")
    progress.started("b")
    progress.finished("a", {"seed": 1}, finished())
    # 2 left x 10 s / 2 at once
    assert "ETA 10 s" in log.getvalue()


def test_a_failed_cell_shows_the_first_line_of_its_reason(
    progress: SweepProgress, log: io.StringIO
) -> None:
    progress.started("a")
    progress.finished("a", {}, {"status": "failed", "reason": "one [0, 1]\ntwo", "untracked": ""})
    assert "[2/4] the cell: FAILED: one [0, 1]" in log.getvalue()
    assert "two" not in log.getvalue()


def test_a_result_that_mlflow_missed_is_told(progress: SweepProgress, log: io.StringIO) -> None:
    progress.finished("a", {"seed": 1}, finished(untracked="ConnectionError: gone"))
    assert "not in MLflow yet: seed=1 (ConnectionError: gone)" in log.getvalue()


def test_an_undefined_rate_does_not_stop_the_sweep(
    progress: SweepProgress, log: io.StringIO
) -> None:
    # An exception in a Tune callback kills the whole sweep.
    progress.finished("a", {"seed": 1}, finished(cell_asr=float("nan")))
    assert "[2/4] seed=1: asr nan cacc 0.500" in log.getvalue()


def test_a_trial_that_ends_without_a_word_does_not_stop_the_sweep(
    progress: SweepProgress, log: io.StringIO
) -> None:
    progress.finished("a", {"seed": 1}, {})
    assert "[2/4] seed=1: FAILED" in log.getvalue()


def test_a_terminal_gets_one_live_line() -> None:
    screen = io.StringIO()
    progress = SweepProgress(Console(file=screen, width=120, force_terminal=True))
    progress.begin(total=2, done=0)
    progress.started("a")
    progress.finished("a", {"seed": 0}, finished())
    progress.end()
    shown = screen.getvalue()
    assert "1 done, 0 running, 0 failed of 2" in shown
    assert "[1/2]" not in shown  # the line says it already
    assert shown.count("\x1b[?25h") == shown.count("\x1b[?25l") == 1  # the cursor is back


def test_a_trial_tells_stage_epoch_and_metrics() -> None:
    log = io.StringIO()
    tell = StageProgress(Console(file=log, width=120))
    tell(Progress("poisoned fine-tune", 1, 3, {"loss": 0.5, "accuracy": 0.25, "seconds": 3.0}))
    tell(Progress("clean tuning", 1, 1))
    first, second = log.getvalue().splitlines()
    assert " ".join(first.split()) == "0 s poisoned fine-tune 1/3 loss 0.5000 accuracy 0.2500"
    assert " ".join(second.split()) == "0 s clean tuning"
