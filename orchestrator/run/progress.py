"""The display of a running sweep or trial."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from btu.redaction import shown
from btu.types import Progress
from orchestrator.plan.work import REFERENCE_ROWS_PER_SECOND, REFERENCE_VICTIM, Basis
from orchestrator.run.schedule import CELL, ENDED, Schedule, State
from orchestrator.sweep.sections import shown_coordinates

if TYPE_CHECKING:
    from orchestrator.plan.work import Work

# A log gets a line on where the sweep stands this often.
LOG_SECONDS = 60.0
BASES = {
    Basis.measured: "from the times of such stages",
    Basis.rows: "a rough estimate, from the rows per second of other stages",
    Basis.reference: (
        f"a rough estimate: no stage is timed here yet, and {REFERENCE_ROWS_PER_SECOND:g} rows per "
        f"second are what one CPU core without AMX does with victim '{REFERENCE_VICTIM}'"
    ),
}


def duration(seconds: float) -> str:
    """Return seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def label(varied: Mapping[str, Any]) -> str:
    """Return a cell's coordinates in a short form: ``badnets poison_rate=0.1 seed=0``."""
    if not varied:
        return "the cell"
    return " ".join(
        str(value) if key == "attack.name" else f"{key.split('.')[-1]}={value}"
        for key, value in shown_coordinates(varied).items()
    )


class SweepProgress:
    """Two live lines per sweep, stages and cells; in a log, a line per ended cell.

    Both get an estimate of the computing at the start, and of the time when the first stage begins;
    a log also gets, every minute, a line on where the sweep stands.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description:>6}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._stages = self._bar.add_task("stages", total=None, state="starting Ray", start=False)
        self._cells = self._bar.add_task("cells", total=None, state="", start=False)
        self._total = self._cached = 0
        self._estimated = self._searching = False
        self._due = 0.0  # when a log gets its next line

    def begin(self, work: Work, schedule: Schedule, total: int, searching: bool = False) -> None:
        """Print what there is to do and what is done already, and start the live lines.

        work: what the plan has left.
        schedule: of the launch.
        total: how many cells the sweep has, with those that are done.
        searching: whether more cells are suggested while it runs.
        """
        self._total, self._cached, self._searching = total, work.done, searching
        if work.done:
            self.note(f"{work.done} of {total} cells are done already and are not run again.")
        for reason, count in Counter(work.failed.values()).items():
            self.note(f"{count} cells failed earlier and are not run again: {_first(reason)}")
        if work.failed:
            self.note("--retry-failed runs them again.")
        if searching:
            self.note("Further cells are suggested while the sweep runs.")
        elif not schedule.unfinished:
            return
        stages, cells = schedule.counts[False], schedule.counts[True]
        open_ = sum(count for state, count in cells.items() if state not in ENDED)
        todo = sum(count for state, count in stages.items() if state not in ENDED)
        if open_:
            self.note(f"{open_} cells to run, on {todo} stages; results are kept as each one ends.")
            self._note_computing(schedule)
        if self._console.is_terminal:
            self._bar.start()
        for task in (self._stages, self._cells):
            self._bar.start_task(task)
        self.refresh(schedule)

    def grown(self, total: int) -> None:
        """Further cells were suggested."""
        self._total = total

    def refresh(self, schedule: Schedule) -> None:
        """Update the live lines."""
        begun = [schedule.running[key].name for key in schedule.begun]
        states = []
        for task, cells in ((self._stages, False), (self._cells, True)):
            counts = schedule.counts[cells]
            ended = sum(counts[state] for state in ENDED)
            shown = {state: counts[state] for state in (State.done, State.failed, State.cached)}
            shown[State.running] = sum((name == CELL) == cells for name in begun)
            parts = [
                f"{shown[state]} {state.value}"
                for state in (State.done, State.running, State.failed, State.cached)
                if shown[state] or state is State.done
            ]
            eta = self._eta(schedule, ", ETA ") if task == self._cells else _running(schedule)
            total = sum(counts.values())
            states.append(f"{', '.join(parts)} of {total}{eta}")
            self._bar.update(task, total=total, completed=ended, state=states[-1])
        if begun and not self._estimated:
            self._estimated = True
            self._due = time.monotonic() + LOG_SECONDS
            self._note_estimate(schedule)
        if self._is_due():
            self._due = time.monotonic() + LOG_SECONDS
            self.note("stages {}; cells {}".format(*states))

    def tick(self, schedule: Schedule) -> None:
        """Time has passed: give a log its line, if it is due."""
        if self._is_due():
            self.refresh(schedule)

    def _is_due(self) -> bool:
        return self._estimated and not self._console.is_terminal and time.monotonic() >= self._due

    def _note_estimate(self, schedule: Schedule) -> None:
        """Print how long the sweep takes, now that it is known how many stages run at once."""
        expected = schedule.rough_left()
        if expected is not None and expected.seconds:
            at_once = f"{schedule.slots} stage{'' if schedule.slots == 1 else 's'} at once"
            self.note(f"With {at_once}: about {duration(expected.seconds)} to go.")

    def _note_computing(self, schedule: Schedule) -> None:
        """Print how much there is to compute, and the basis of the estimate."""
        expected = schedule.rough_left()
        if expected is None:
            self.note("The time is estimated once the first stage that trains has ended.")
        elif expected.seconds:
            seconds = duration(expected.seconds * max(1, schedule.slots))
            of = " for the cells suggested so far" if self._searching else ""
            self.note(f"About {seconds} of computing{of} ({BASES[expected.basis]}).")

    def finished(
        self,
        varied: Mapping[str, Any],
        facts: Mapping[str, float],
        schedule: Schedule,
    ) -> None:
        """A cell has its result."""
        if not self._console.is_terminal:
            shown = " ".join(
                f"{name} {facts[name]:.3f}" for name in ("asr", "cacc") if name in facts
            )
            counts = schedule.counts[True]
            ended = self._cached + sum(counts[state] for state in ENDED)
            eta = self._eta(schedule, ", ETA ")
            self.note(f"[{ended}/{self._total}] {label(varied)}: {shown}{eta}")

    def failed(
        self, stage: str, cells: Sequence[Mapping[str, Any]], reason: str, path: str
    ) -> None:
        """A stage failed, and with it the cells that depend on it.

        stage: its name.
        cells: coordinates of the cells.
        reason: why it failed; its first line is printed.
        path: where the failure is recorded.
        """
        named = ", ".join(map(label, cells[:3]))
        more = f" and {len(cells) - 3} more cells" if len(cells) > 3 else ""
        what = named + more if stage == CELL else f"stage '{stage}' of {named}{more}"
        self.note(f"FAILED: {what}: {_first(reason)} ({path})")

    def untracked(self, varied: Mapping[str, Any], reason: str) -> None:
        """A cell has its result, but MLflow has no run of it."""
        self.note(f"not in MLflow yet: {label(varied)} ({_first(reason)})")

    def note(self, text: str) -> None:
        """Print a line above the live lines, without passwords of URLs."""
        self._console.print(shown(text), highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Stop the live lines."""
        if self._console.is_terminal:
            self._bar.stop()

    def _eta(self, schedule: Schedule, lead: str) -> str:
        expected = schedule.rough_left()
        if expected is None or not expected.seconds:
            return ""
        about = "" if expected.basis is Basis.measured else "about "
        return lead + about + duration(expected.seconds)


def _running(schedule: Schedule) -> str:
    """Return which stages run right now: ``: 2 x unlearn, poisoned fine-tune``."""
    begun = [schedule.running[key].name for key in schedule.begun]
    names = Counter(name for name in begun if name != CELL)
    shown = [f"{count} x {name}" if count > 1 else name for name, count in sorted(names.items())]
    more = f" and {len(shown) - 3} others" if len(shown) > 3 else ""
    return f": {', '.join(shown[:3])}{more}" if shown else ""


def _first(reason: str) -> str:
    return reason.splitlines()[0] if reason else "no reason given"


class StageProgress:
    """Lines for a trial in this process: one for every stage and epoch that ends.

    Long ones report in between, with the time that is left for the stage at the pace so far.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._stage_began = time.monotonic()
        self._stage = ""

    def __call__(self, event: Progress) -> None:
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._stage_began = event.stage, now
        said = [f"{name} {value:.4f}" for name, value in event.metrics.items() if name != "seconds"]
        if event.part:
            done = (event.step + event.part) / event.steps
            left = (now - self._stage_began) * (1 - done) / done
            said.append(f"{done:.0%}, {duration(left)} left")
        elif event.steps > 1:
            said.insert(0, f"{event.step}/{event.steps}")
        clock = duration(now - self._began)
        self._console.print(
            f"[dim]{clock:>12}[/dim]  {event.stage} {' '.join(said)}", highlight=False
        )
