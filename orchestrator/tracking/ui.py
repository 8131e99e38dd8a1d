"""MLflow's UI of a local store, on this machine only and behind a password."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from btu.errors import UserError
from orchestrator.tracking.server import absolute, is_sqlite, shown

HOST, USER = "127.0.0.1", "btu"
# Seconds that a stopped server has to end; between looks at it.
STOP_SECONDS, LOOK_SECONDS = 10.0, 0.1
# Signals that end `btu ui`: Ctrl-C, a batch system or service manager, a closed terminal.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# MLflow's own settings that could undo these.
FOREIGN = ("MLFLOW_AUTH_ADMIN_", "MLFLOW_REGISTRY_STORE_URI", "MLFLOW_READ_REPLICA_")
SETTINGS = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{folder}/users.db
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 86400
"""


def local_uri(uri: str) -> str:
    """Return the URI of a store on this machine, with an absolute path.

    Raises:
        UserError: it is neither a SQLite file nor a folder.
    """
    if is_sqlite(uri) or uri.startswith("file:") or "://" not in uri:
        return absolute(uri)
    raise UserError(
        f"btu ui serves SQLite files (sqlite:///FILE) and folders of this machine, not "
        f"{shown(uri)}: start an MLflow server for it (docs/cluster.md), and give its address "
        "with --uri http://HOST:PORT."
    )


def check_port(port: int) -> None:
    """Raise a `UserError` where another process listens: it would be given the password."""
    with socket.socket() as probe:
        # As servers do: a connection that has just ended does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {HOST} cannot be used: {error.strerror}. Name another one with "
                "--port."
            ) from error


def new_password() -> str:
    return secrets.token_urlsafe(16)


def ui_command(port: int, *, auth: bool) -> list[str]:
    """Return the command that serves MLflow's UI on this machine only.

    Every user of the machine can read a command line: the store's URI, which may contain a
    password, and everything secret are in the environment that `ui_environment` gives.
    """
    return [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port),
        "--workers", "1", "--uvicorn-opts", "--log-level warning",
        *(["--app-name", "basic-auth"] if auth else []),
    ]  # fmt: skip


@contextmanager
def ui_environment(uri: str, password: str | None) -> Iterator[dict[str, str]]:
    """Give the environment for `ui_command`. Its files are in a folder that is removed at the end.

    uri: of the store.
    password: of the user `USER`; None lets everybody in.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own |= {
        "MLFLOW_BACKEND_STORE_URI": uri,
        # Nothing here gives the server jobs, and its runner would be a process more to end.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Of MLflow's own use of its libraries.
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
    if password is None:
        yield own
        return
    folder = Path(tempfile.mkdtemp(prefix="btu-ui-"))
    try:
        settings = folder / "settings.ini"
        settings.write_text(SETTINGS.format(folder=folder, user=USER, password=password))
        yield {
            **own,
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            # A route for which MLflow has no rule is refused.
            "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve_ui(uri: str, port: int, password: str | None) -> int:
    """Serve the MLflow UI until it ends or is stopped. Return the exit code for `btu ui`."""
    with ui_environment(uri, password) as environment:
        return _run(ui_command(port, auth=password is not None), environment)


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a command until it ends or this process is to stop; leave none of its processes.

    Returns its exit code; 0 after Ctrl-C, 128 and the signal's number after another one.
    """
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in STOPS}
    # In a group of its own: Ctrl-C reaches this process alone, and nothing of it is missed below.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while server.poll() is None and not caught:
            time.sleep(LOOK_SECONDS)
        if caught:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)
    finally:
        # A process of MLflow's may outlive the one that was started.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        code = server.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        return 0 if caught[0] == signal.SIGINT else 128 + caught[0]
    return code
