"""`btu ui` as a process: who gets in, and what is left when it stops. With a real MLflow server."""

from __future__ import annotations

import base64
import re
import shutil
import signal
import socket
import stat
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from launching import Command, Workplace, wait_for
from other_user import OtherUser, other_user  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow

SECRET = "what only its owner may read"
# What a user needs who wants another one's file, without any package: an experiment whose
# artifacts are in a folder of theirs, a run, and a link in place of its artifacts.
THEFT = """
    import base64, json, os, sys, urllib.request
    url, login, folder, target = sys.argv[1:]
    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        if login:
            coded = base64.b64encode(login.encode()).decode()
            request.add_header("Authorization", "Basic " + coded)
        try:
            return urllib.request.urlopen(request, timeout=60).read()
        except urllib.error.HTTPError as error:
            sys.exit(f"HTTP {error.code}")
    api = "/ajax-api/2.0/mlflow/"
    place = {"name": "theirs-" + os.urandom(4).hex(), "artifact_location": "file://" + folder}
    made = json.loads(ask(api + "experiments/create", place))
    run = json.loads(ask(api + "runs/create", {"experiment_id": made["experiment_id"]}))
    run = run["run"]["info"]["run_id"]
    os.makedirs(f"{folder}/{run}")
    os.symlink(os.path.dirname(target), f"{folder}/{run}/artifacts")
    file = os.path.basename(target)
    print(ask(f"/get-artifact?path={file}&run_uuid={run}").decode())
"""


class Serving(NamedTuple):
    """A running `btu ui`. temporary: its folder for temporary files."""

    command: Command
    port: int
    password: str
    temporary: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self, path: str, login: str = "") -> int:
        """Return the HTTP status of a page."""
        request = urllib.request.Request(self.url + path)
        if login:
            request.add_header(
                "Authorization", f"Basic {base64.b64encode(login.encode()).decode()}"
            )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.command.process.pid)
        return [own, *own.children(recursive=True)]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with an experiment."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").create_experiment("tiny")
    return path


@pytest.fixture
def serve(tmp_path: Path, database: Path, free_port: int) -> Iterator[Callable[..., Serving]]:
    """A function that runs `btu ui` with options, and gives it once it answers."""
    place = Workplace(tmp_path, database)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    place.environment |= {"TMPDIR": str(temporary), "MLFLOW_AUTH_ADMIN_PASSWORD": "of-a-server-1"}

    def start(*options: str) -> Serving:
        command = place.start("ui", "--port", free_port, *options)
        made = Serving(command, free_port, "", temporary)

        def answers() -> bool:
            try:
                return made.status("/health") == 200
            except OSError:
                return False

        wait_for(answers, command)
        said = next(tmp_path.glob("*.out")).read_text()
        found = re.search(r"as btu with the password (\S+) ", said)
        return made._replace(password=found[1] if found else "")

    yield start
    place.close()


@pytest.fixture
def owned_file() -> Iterator[Path]:
    """A file that only its owner may read, in a folder that everybody may enter."""
    # Not below pytest's own folder, which is private.
    folder = Path(tempfile.mkdtemp(prefix="btu-owned-"))
    folder.chmod(0o755)
    file = folder / "secret.txt"
    file.write_text(SECRET)
    file.chmod(0o600)
    yield file
    shutil.rmtree(folder)


def test_the_ui_asks_for_its_password_and_keeps_it_from_other_users(
    serve: Callable[..., Serving],
    other_user: OtherUser,  # noqa: F811
    owned_file: Path,
) -> None:
    ui = serve()
    assert len(ui.password) >= 22
    search = "/ajax-api/2.0/mlflow/experiments/search?max_results=5"
    # The last one: what a server's own settings in the environment say.
    for login in ("", "btu:wrong-password", "admin:of-a-server-1", "btu:of-a-server-1"):
        for path in ("/", search, "/get-artifact?path=x&run_uuid=y", "/version",
                     "/ajax-api/3.0/mlflow/assistant/config",
                     "/api/2.0/mlflow-artifacts/artifacts"):  # fmt: skip
            assert ui.status(path, login) == 401, (path, login)
    # The user of `btu ui` sees what others wrote.
    for path in ("/", search):
        assert ui.status(path, f"btu:{ui.password}") == 200

    (folder,) = ui.temporary.glob("btu-ui-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    arguments = [word for process in ui.processes() for word in process.cmdline()]
    assert not [word for word in arguments if ui.password in word or "mlflow.db" in word]

    script = other_user.shared / "theft.py"
    script.write_text(textwrap.dedent(THEFT))
    place = other_user.shared / "artifacts"
    for login in ("", "btu:guess-the-password"):
        tried = other_user.run("python3", str(script), ui.url, login, str(place), str(owned_file))
        assert tried.stderr.strip() == "HTTP 401"
        assert SECRET not in tried.stdout
    lines = other_user.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ")
    assert "--app-name" in lines.stdout  # it does see the process
    assert ui.password not in lines.stdout


def test_a_page_of_another_site_reads_and_changes_nothing(serve: Callable[..., Serving]) -> None:
    # A browser sends the password along, whichever page asks.
    ui = serve()
    coded = base64.b64encode(f"btu:{ui.password}".encode()).decode()

    def ask(path: str, headers: dict[str, str], body: bytes | None = None) -> tuple[int, Message]:
        request = urllib.request.Request(ui.url + path, body, headers)
        request.add_header("Authorization", f"Basic {coded}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    search = "/ajax-api/2.0/mlflow/experiments/search?max_results=5"
    create, body = "/ajax-api/2.0/mlflow/experiments/create", b'{"name": "theirs"}'
    site = {"Origin": "https://site.example"}
    assert ask(search, {})[0] == 200
    # A name that leads to 127.0.0.1 makes the page part of the same site (DNS rebinding).
    assert ask(search, {"Host": "site.example"})[0] == 403
    # The browser gives the page no answer without this header.
    assert ask(search, site)[1]["Access-Control-Allow-Origin"] is None
    assert ask("/", site)[1]["X-Frame-Options"] == "SAMEORIGIN"
    # What a form or a script may send without asking first.
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        assert ask(create, {**site, "Content-Type": kind}, body)[0] == 403, kind
    assert ask(create, {"Content-Type": "text/plain"}, body)[0] == 400
    assert ask(create, {"Content-Type": "application/json"}, body)[0] == 200


def test_no_auth_is_what_it_says(
    serve: Callable[..., Serving],
    other_user: OtherUser,  # noqa: F811
    owned_file: Path,
) -> None:
    """The theft that the password prevents. Without it, it works: the warning is true."""
    ui = serve("--no-auth")
    script = other_user.shared / "theft.py"
    assert other_user.run("cat", str(owned_file)).returncode != 0
    script.write_text(textwrap.dedent(THEFT))
    place = other_user.shared / "artifacts"
    got = other_user.run("python3", str(script), ui.url, "", str(place), str(owned_file))
    assert got.stdout.strip() == SECRET, got


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0), (signal.SIGHUP, 129)]
)
def test_a_stopped_ui_leaves_no_process_no_port_and_no_file(
    serve: Callable[..., Serving], number: signal.Signals, code: int
) -> None:
    ui = serve()
    processes = ui.processes()
    assert len(processes) >= 2
    ui.command.process.send_signal(number)
    done = ui.command.end(60)
    assert done.code == code, done
    assert [process for process in processes if process.is_running()] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ui.port)) != 0
    assert list(ui.temporary.glob("btu-ui-*")) == []
    assert "Traceback" not in done.err
