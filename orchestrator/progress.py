"""What a person sees while something long runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from btu.types import Progress


def duration(seconds: float) -> str:
    """Return seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def label(varied: Mapping[str, Any]) -> str:
    """Return a cell's coordinates in short: ``badnets poison_rate=0.1 seed=0``."""
    if not varied:
        return "the cell"
    return " ".join(
        str(value) if key == "attack.name" else f"{key.split('.')[-1]}={value}"
        for key, value in varied.items()
    )


class SweepProgress:
    """One live line per sweep; in a log, a line per finished cell."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("cells", total=None, state="starting Ray", start=False)
        self._total = self._done = self._failed = 0
        self._running: set[str] = set()
        self._seconds: list[float] = []
        self._most = 1

    def begin(self, total: int, done: int) -> None:
        """Say how many cells there are and how many are on disk already."""
        self._total, self._done = total, done
        if done:
            self.note(f"{done} of {total} cells are done already and are not run again.")
        if done < total:
            self.note(f"{total - done} cells to run; results are kept as each one ends.")
            if self._console.is_terminal:
                self._bar.start()
            self._bar.start_task(self._task)
            self._bar.update(self._task, total=total, completed=done)

    def started(self, trial: str) -> None:
        """A cell runs, for the first time or after its worker died."""
        self._running.add(trial)
        self._most = max(self._most, len(self._running))
        self._refresh()

    def finished(self, trial: str, varied: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A cell ended, one way or the other."""
        self._running.discard(trial)
        if "trial_seconds" in result:
            self._seconds.append(result["trial_seconds"])
        if result.get("status") == "finished":
            self._done += 1
            text = f"asr {result['cell_asr']:.3f} cacc {result['cell_cacc']:.3f}"
            outcome = f"{text} in {duration(result['trial_seconds'])}"
        else:
            self._failed += 1
            reason = str(result.get("reason") or "no reason given").splitlines()[0]
            outcome = f"FAILED: {reason}"
        if result.get("untracked"):
            self.note(f"not in MLflow yet: {label(varied)} ({result['untracked']})")
        ended = self._done + self._failed
        if not self._console.is_terminal or result.get("status") != "finished":
            self.note(f"[{ended}/{self._total}] {label(varied)}: {outcome}{self._eta(', ETA ')}")
        self._refresh()

    def note(self, text: str) -> None:
        """Print a line above the live one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Stop the live line."""
        self._bar.stop()

    def _eta(self, lead: str) -> str:
        left = self._total - self._done - self._failed
        if not left or not self._seconds:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return lead + duration(mean * left / self._most)

    def _refresh(self) -> None:
        state = f"{self._done} done, {len(self._running)} running, {self._failed} failed"
        self._bar.update(
            self._task,
            completed=self._done + self._failed,
            state=f"{state} of {self._total}{self._eta(', ETA ')}",
        )


class StageProgress:
    """Lines for one trial in this process: every stage and epoch as it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()

    def __call__(self, event: Progress) -> None:
        metrics = " ".join(
            f"{name} {value:.4f}" for name, value in event.metrics.items() if name != "seconds"
        )
        clock = duration(time.monotonic() - self._began)
        step = f"{event.step}/{event.steps}" if event.steps > 1 else ""
        self._console.print(
            f"[dim]{clock:>12}[/dim]  {event.stage} {step} {metrics}", highlight=False
        )
