"""The page of a sweep that may still run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from btu.errors import UserError
from orchestrator.cli.shared import open_source

if TYPE_CHECKING:
    from orchestrator.run.status import Status

# Seconds between two versions of a page, and after which a browser reads it again.
PAGE_SECONDS = 30.0
# How many times longer than drawing it, at least, until it is drawn again.
REST = 10.0


class LivePage:
    """Writes the page again whenever cells have ended, but not too often.

    written: whether there is a page yet.
    """

    def __init__(self, path: Path, name: str, output: str, *, watch: bool) -> None:
        """Write nothing yet.

        path: of the page.
        name: of the sweep.
        output: of the sweep.
        watch: whether it is written again: a browser then reloads it while a launch runs.

        Raises:
            UserError: no page can be written there.
        """
        from orchestrator.report.html import check_page

        check_page(path)
        self._path, self._name, self._output = path, name, output
        self._watch, self._due = watch, 0.0
        self._shown: tuple[int, bool] | None = None  # cells with a result, whether a launch ran
        self.written = False

    def update(self, stand: Status) -> None:
        """Write the page if it is due. The last one, once no launch runs, does not reload."""
        from orchestrator.report.html import write_page
        from orchestrator.results.source import Snapshot
        from orchestrator.run.status import CellState, SweepState

        running = stand.state is SweepState.running
        shows = (stand.counts[CellState.done], running)
        began = time.monotonic()
        if not shows[0] or shows == self._shown or (running and began < self._due):
            return
        try:
            source = Snapshot(open_source(self._name, self._output))
            write_page(source, self._path, int(PAGE_SECONDS) if running and self._watch else 0)
        except UserError:
            if not self.written:
                raise
            return  # the disk may be full for a while; the page is as it was
        ended = time.monotonic()
        self._shown, self.written = shows, True
        self._due = max(began + PAGE_SECONDS, ended + REST * (ended - began))
