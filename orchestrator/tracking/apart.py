"""The summary of a sweep, written by a process of its own.

Drawing takes seconds of Python code. In a thread of the driver it would slow down the scheduling:
one thread of a process runs Python at a time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

from btu.redaction import shown

# The process finds modules where this one does, and nowhere else: `-P` keeps the working folder,
# which others may write to, out of the path. The URI may contain a password, so it comes by stdin.
CODE = (
    "import json, sys; told = json.load(sys.stdin); sys.path[:] = told.pop('path'); "
    "from orchestrator.tracking.apart import write; write(**told)"
)


class Summaries:
    """Writes the summary of a sweep, whenever it is asked to, in another process.

    uri: of the MLflow store.
    experiment_id: of the sweep's experiment there.
    output: the sweep's output folder or URL.
    name: the sweep's name.
    """

    def __init__(self, uri: str, experiment_id: str, output: str, name: str) -> None:
        # Folders that are relative to a working folder are none for the other process.
        path = [str(Path(folder).resolve()) for folder in sys.path]
        told = {"uri": uri, "experiment_id": experiment_id, "output": output, "name": name}
        self._told = json.dumps({**told, "path": path})
        self._process: subprocess.Popen[str] | None = None
        self._ended = False

    def write(self) -> str:
        """Write the summary unless it is up to date. Return why that did not work, if so."""
        if self._ended:
            return ""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the driver, which ends this process.
            start_new_session=True,
        )
        if self._ended:  # meanwhile
            self._process.terminate()
        out, errors = self._process.communicate(self._told)
        if self._ended or self._process.returncode == 0:
            return ""
        last = (out.strip() or errors.strip()).splitlines()[-1:]
        return shown(last[0][:200]) if last else f"exit code {self._process.returncode}"

    def end(self, *, kill: bool = False) -> None:
        """End a process that writes; none is started any more.

        kill: do not let it remove its temporary files.
        """
        self._ended = True
        if self._process is not None:
            self._process.kill() if kill else self._process.terminate()


def write(uri: str, experiment_id: str, output: str, name: str) -> None:
    """Write the summary; print the reason and exit with code 1 where that does not work.

    Arguments as those of `Summaries`.
    """
    # Files that are being uploaded are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Whatever MLflow and matplotlib print, the last line of stdout is the reason.
    with redirect_stdout(sys.stderr):
        reason = _tried(uri, experiment_id, output, name)
    if reason:
        print(reason)
        sys.exit(1)


def _tried(uri: str, experiment_id: str, output: str, name: str) -> str:
    """Write the summary; return why that did not work, if so."""
    from orchestrator.results.folder import Results
    from orchestrator.tracking import server, sync

    try:
        sync.summarize(uri, experiment_id, Results(output, name))
    except Exception as error:  # of a server, of a disk or of a plot
        return server.brief(error)
    return ""
