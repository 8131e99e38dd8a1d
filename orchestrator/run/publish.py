"""What a launch writes to MLflow itself: the experiment, the summary, and runs that are missing."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from btu.redaction import shown_url
from orchestrator.results.folder import Results
from orchestrator.sweep.sweep import Sweep

if TYPE_CHECKING:
    from orchestrator.tracking.apart import Summaries
    from orchestrator.tracking.sync import Pace

# Seconds between checks for a due summary.
SUMMARY_LOOK = 1.0
# Seconds that an update of the summary has to end in; a request to a server may take longer.
STOP_SECONDS = 5.0


class Publisher:
    """Keeps MLflow up to date with one launch. No failure of MLflow ends the launch.

    tracking: URI, experiment id, whether it had no run yet (``fresh``) and whether the store keeps
    models (``models``), for the workers, which write the runs of cells; None while the server does
    not answer.
    """

    def __init__(self, sweep: Sweep, results: Results, note: Callable[[str], None]) -> None:
        """Ask no server yet.

        sweep: whose experiment it is.
        results: where `synchronize` reads the sweep's results.
        note: prints a line for the user.
        """
        self._sweep, self._results, self._note = sweep, results, note
        self.tracking: dict[str, Any] | None = None
        self._due = threading.Event()  # a cell has ended since the last summary
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._summaries: Summaries | None = None
        self._summary_failed = False

    def prepare(self) -> None:
        """Create store and experiment where they are missing.

        Raises:
            UserError: the URI cannot work, whichever server answers.
        """
        from orchestrator.tracking import experiment, server

        uri = server.tracking_uri(self._sweep)
        # First: a server may take long to answer, and `btu status` may ask meanwhile.
        self._results.record_server(None if self._sweep.tracking.uri is None else uri)
        experiment_id, reason = experiment.prepare(self._sweep, self._note)
        if experiment_id is None:
            reason = shorten(reason, 150, placeholder=" ...")
            self._note(
                f"MLflow at {server.shown(uri)} does not answer ({reason}); the sweep runs "
                f"all the same. Results wait on disk: {self._sync_command()} writes them."
            )
        else:
            fresh = experiment.has_no_run(uri, experiment_id)
            self.tracking = self._tracked(uri, experiment_id, fresh=fresh)

    def start(self) -> None:
        """Start to update the summary whenever cells have ended.

        Another process does it, and a thread waits for it: neither drawing nor a slow server may
        delay the scheduling.
        """
        if self.tracking is None:
            return
        from orchestrator.tracking.apart import Summaries
        from orchestrator.tracking.sync import Pace

        where = self.tracking["uri"], self.tracking["id"]
        self._summaries = Summaries(*where, self._sweep.output, self._sweep.name)
        pace = Pace()
        pace.took(time.monotonic(), time.monotonic())
        arguments = (self._summaries, pace)
        self._thread = threading.Thread(target=self._update, args=arguments, daemon=True)
        self._thread.start()

    def cell_ended(self) -> None:
        """A cell has ended: the summary is out of date."""
        self._due.set()

    def stop(self) -> None:
        """Stop updating the summary. An update that has started is broken off.

        `synchronize`, the next launch or `btu sync` writes the summary again.
        """
        self._done.set()
        if self._summaries is None or self._thread is None:
            return
        self._summaries.end()
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            self._summaries.end(kill=True)
            self._thread.join()

    def synchronize(self, owner: str, *, interrupted: bool) -> None:
        """Write the runs that MLflow lacks, and the summary; print how many are still missing.

        owner: id of the launch. Its own leases do not keep a run from being written.
        interrupted: whether the user is waiting for the launch to stop. Then no server is asked and
            nothing is drawn; the next launch does it.
        """
        from orchestrator.tracking import experiment, server, sync

        uri = server.tracking_uri(self._sweep)
        if interrupted and not server.is_sqlite(uri):
            return
        experiment_id = self.tracking["id"] if self.tracking else None
        if experiment_id is None:
            experiment_id, _ = experiment.prepare(self._sweep, self._note)
            if experiment_id is None:
                return

        def live(key: str) -> bool:
            return self._results.store.leases.held_by_other(key, owner)

        synced = sync.sync(uri, experiment_id, self._results, live, owner)
        if synced.missing:
            many = "1 result is" if synced.missing == 1 else f"{synced.missing} results are"
            self._note(
                f"{many} on disk but not in MLflow ({synced.reason}); "
                f"{self._sync_command()} writes them once {server.shown(uri)} answers."
            )
        elif synced.reason:
            self._note(
                f"Unfinished runs in MLflow were not looked for ({synced.reason}); "
                f"{self._sync_command()} closes them once {server.shown(uri)} answers."
            )
        self.tracking = self._tracked(uri, experiment_id, fresh=False)
        if not interrupted:
            self._summarize()

    def _tracked(self, uri: str, experiment_id: str, *, fresh: bool) -> dict[str, Any]:
        models = self._sweep.store.keep == "models"
        return {"uri": uri, "id": experiment_id, "fresh": fresh, "models": models}

    def _update(self, summaries: Summaries, pace: Pace) -> None:
        while not self._done.wait(SUMMARY_LOOK):
            began = time.monotonic()
            if self._due.is_set() and pace.due(began):
                self._due.clear()
                self._told(summaries.write())
                pace.took(began, time.monotonic())

    def _summarize(self) -> None:
        """Update the summary run, in this process; print the first failure only."""
        from orchestrator.tracking import server, sync

        if self.tracking is None:
            return
        try:
            sync.summarize(self.tracking["uri"], self.tracking["id"], self._results)
        except Exception as error:  # of a server, of a disk or of a plot
            self._told(server.brief(error))

    def _told(self, reason: str) -> None:
        """Print why the summary was not written, the first time. reason: empty if it was."""
        if reason and not self._summary_failed:
            self._summary_failed = True
            self._note(
                f"the sweep's summary in MLflow is not up to date ({reason}); "
                f"{self._sync_command()} writes it."
            )

    def _sync_command(self) -> str:
        """Return the command that writes what MLflow misses."""
        words = ["btu", "sync", self._sweep.name]
        if self._sweep.output != str(Path("runs").resolve()):
            words += ["--output", shown_url(self._sweep.output)]
        if self._sweep.tracking.uri is not None:
            words += ["--uri", shown_url(self._sweep.tracking.uri)]
        return shlex.join(words)
