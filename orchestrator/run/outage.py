"""Whether Ray still answers, and which of its nodes are there. Without Ray.

A launch cannot wait for a Ray that is gone: the calls of its client block for a minute, and then
end the process, whatever it holds. So a thread looks, and the launch leaves in time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from orchestrator.run.nodes import reach

# Between two looks.
LOOK_SECONDS = 2.0
# For how long Ray may be silent: while the launch runs, and while it stops. Ray's client gives up
# after 60 s.
SILENT_SECONDS, SILENT_STOPPING_SECONDS = 45.0, 6.0
# From when on the user is told.
QUIET_SECONDS = 10.0
# A launch that was not asked for this long was suspended itself: it missed Ray's answers.
SUSPENDED_SECONDS = 10.0
# In how many seconds a stop has to be over. Slurm kills 30 s after SIGTERM.
STOP_SECONDS = 20.0
# Between two looks whether the work has ended.
LOOP_SECONDS = 0.2
DIED_TOO = "Ray went down at the same time"
# Of what Ray says, in a line.
REASON_CHARACTERS = 200
# For how long an address may take to accept a connection.
CONNECT_SECONDS = 2.0


def answers(address: str) -> bool:
    """Return whether something accepts connections at HOST:PORT."""
    try:
        reach(address, CONNECT_SECONDS)
    except OSError:
        return False
    return True


class Watch:
    """Looks at Ray's nodes, and says in a line each which are lost and which have come.

    stopping: the launch was told to stop: nodes may go without a line.
    """

    def __init__(
        self,
        look: Callable[[], Mapping[str, str] | None],
        note: Callable[[str], None],
        words: Callable[[], str] = lambda: "",
        runs: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look at nothing yet.

        look: returns the names of the nodes that are alive by id; None if Ray does not answer. It
            may block.
        note: prints a line for the user.
        words: returns a sentence on where to read more.
        runs: returns whether Ray's process on this machine runs, at once.
        clock: monotonic seconds.
        """
        self._look, self._note, self._clock = look, note, clock
        self._words, self._runs = words, runs
        self.stopping = threading.Event()
        self._done = threading.Event()
        self._answered = clock()
        self._asked = clock()  # when `gone` was last read
        self._stopped: float | None = None  # when `stopping` was first seen
        self._known: dict[str, str] | None = None  # before the first look
        self._lost: set[str] = set()  # names
        self._told = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look in a thread of its own."""
        thread = threading.Thread(target=self._run, daemon=True, name="watch of Ray")
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            # It may hang in a call to a Ray that is gone.
            thread.join(LOOK_SECONDS)

    def _run(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Look once."""
        try:
            found = self._look()
        except Exception:  # of a Ray that goes down in this moment
            found = None
        if self._done.is_set():
            return
        if found is not None and not self.stopping.is_set():
            self._compare(found)
        if found:  # without a node, nothing runs any more, and neither does this launch's own part
            self._answered = self._clock()

    def _compare(self, found: Mapping[str, str]) -> None:
        known, self._known = self._known, dict(found)
        if known is None:
            return
        for node, name in known.items():
            if node not in found:
                self._lost.add(name)
                left = "1 node is" if len(found) == 1 else f"{len(found)} nodes are"
                again = " Its stages start again elsewhere." if found else ""
                self._note(f"node {name} is lost; {left} left.{again} {self._words()}".strip())
        for node, name in found.items():
            if node not in known:
                came = "is back" if name in self._lost else "has joined"
                self._lost.discard(name)
                self._note(f"node {name} {came}; there are {len(found)} nodes.")

    @property
    def gone(self) -> str:
        """Why the launch must leave Ray alone now; empty if it need not. To be asked often."""
        now = self._clock()
        if now - self._asked > SUSPENDED_SECONDS:
            self._answered = now
        self._asked = now
        if not self._runs():  # the next call to it would end this process
            return DIED_TOO if self.stopping.is_set() else "Ray's process on this machine has died"
        silent = now - self._answered
        if self.stopping.is_set():
            if self._stopped is None:
                self._stopped = now
            if silent > SILENT_STOPPING_SECONDS:
                return DIED_TOO
            if now - self._stopped > STOP_SECONDS:
                return f"Ray did not stop within {STOP_SECONDS:.0f} s"
            return ""
        if silent > SILENT_SECONDS:
            return f"Ray has not answered for {SILENT_SECONDS:.0f} s"
        if silent > QUIET_SECONDS and not self._told:
            self._told = True
            what = f"Ray does not answer; the launch stops if that lasts {SILENT_SECONDS:.0f} s."
            self._note(f"{what} {self._words()}".strip())
        elif silent <= QUIET_SECONDS and self._told:
            self._told = False
            self._note("Ray answers again.")
        return ""


def run_under(
    watch: Watch, work: Callable[[], object], of_ray: tuple[type[BaseException], ...]
) -> str:
    """Run what needs Ray in a thread, since its calls do not return where Ray is gone.

    watch: says when to leave it there.
    work: what needs Ray.
    of_ray: exceptions that it raises where Ray is gone.

    Returns why the work was left before its end; empty if it has ended.

    Raises:
        BaseException: another one that `work` raises.
    """
    ended = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again below
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True, name="work on Ray").start()
    while not ended.wait(LOOP_SECONDS):
        if why := watch.gone:
            return why
    if not errors:
        return ""
    if not isinstance(errors[0], of_ray):
        raise errors[0]
    text = str(errors[0]).strip().partition("\n")[0][:REASON_CHARACTERS]
    return f"Ray is gone ({type(errors[0]).__name__}: {text})"
