"""A colleague's sweep file and a colleague's result, written by another user of the machine."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from other_user import OtherUser, other_user  # noqa: F401  # a fixture
from store_fixtures import key_of

from orchestrator.store.marker import SIGNING_KEY
from orchestrator.store.store import Missing, Store

if TYPE_CHECKING:
    from conftest import Ran

SECRET = "wJalrXUtnFEMI-of-the-environment"
KEY = key_of("cell")


@pytest.fixture
def asked() -> Iterator[tuple[int, list[str]]]:
    """The port of an HTTP server, and what it was asked: paths and headers."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(f"{self.path}\n{self.headers}")
            self.send_error(404)

        do_POST = do_HEAD = do_PUT = do_GET  # noqa: N815 - names that the class looks for

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("command", ["plan", "launch"])
@pytest.mark.parametrize("path", ["", "/${oc.env:BTU_SECRET}"], ids=["host", "resolver"])
@pytest.mark.parametrize("key", ["tracking.uri", "output"])
def test_a_colleagues_sweep_file_sends_nothing_to_their_server(
    run_cli: Callable[..., Ran],
    other_user: OtherUser,  # noqa: F811
    asked: tuple[int, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    path: str,
    command: str,
) -> None:
    port, requests = asked
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BTU_SECRET", SECRET)
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    address = f"http://127.0.0.1:{port}{path}"
    section = f"tracking: {{uri: '{address}'}}" if key == "tracking.uri" else f"output: '{address}'"
    file = other_user.shared / f"theirs-{os.urandom(4).hex()}.yaml"
    text = f"name: theirs\ncontrols: []\n{section}\ndata: {{name: demo, max_train_rows: 40}}\n"
    wrote = other_user.run("sh", "-c", f"cat > {file} && chmod 644 {file}", input=text)
    assert wrote.returncode == 0, wrote.stderr
    done = run_cli(command, file)
    assert requests == []
    # Planning says what a launch refuses; a resolver is refused by both.
    assert done.code == (0 if command == "plan" and not path else 2)
    assert (
        f"127.0.0.1:{port}" in done.err if not path else "calls the resolver 'oc.env'" in done.err
    )
    assert SECRET not in done.out + done.err
    saved = [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    assert [text for text in saved if SECRET in text] == []


def test_a_result_that_a_colleague_forged_is_missing_where_results_are_signed(
    other_user: OtherUser,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SIGNING_KEY, "0123456789abcdef")
    folder = other_user.shared / f"runs-{os.urandom(4).hex()}" / "store"
    store = Store(folder)
    store.prepare()
    made = store.workspace(KEY)
    (made / "result.json").write_text('{"asr": 1}')
    store.publish(KEY, made, "cell", {})
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    marker = store.marker(KEY)
    assert marker is not None
    forged = '{"asr": 0}'
    record = json.loads(store.storage.read(f"markers/{KEY}.json"))
    sha = hashlib.sha256(forged.encode()).hexdigest()
    record["marker"]["files"]["result.json"] = [len(forged), sha]
    body = json.dumps(record["marker"], sort_keys=True).encode()
    record["sha256"] = hashlib.sha256(body).hexdigest()
    for path, text in (
        (folder / marker.folder / "result.json", forged),
        (folder / "markers" / f"{KEY}.json", json.dumps(record)),
    ):
        wrote = other_user.run("sh", "-c", f"cat > {path}", input=text)
        assert wrote.returncode == 0, wrote.stderr
    with pytest.raises(Missing):
        Store(folder).read_json(KEY, "result.json")
    # Without a key the hashes fit: they detect accidents.
    monkeypatch.delenv(SIGNING_KEY)
    assert Store(folder).read_json(KEY, "result.json") == {"asr": 0}
