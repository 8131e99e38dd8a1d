"""The MLflow server of deploy/mlflow/compose.yaml on a real PostgreSQL, where one is installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import psycopg
import pytest
import yaml

COMPOSE = Path(__file__).parents[1] / "deploy/mlflow/compose.yaml"
PASSWORD = "made-up"


def postgres_programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    found = shutil.which("initdb")
    known = [Path(found).parent] if found else []
    known += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if not known:
        pytest.skip("PostgreSQL is not installed")
    return known[0]


@pytest.fixture
def database() -> Iterator[str]:
    """A PostgreSQL server with an empty database `mlflow`: its HOST:PORT."""
    programs, port = postgres_programs(), free_port()
    # PostgreSQL refuses to run as root, and another user cannot enter pytest's own folders.
    user = ("postgres" if _is_user("postgres") else "nobody") if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="btu-postgres-"))
    (folder / "password").write_text(PASSWORD)
    if user:
        shutil.chown(folder, user)
        shutil.chown(folder / "password", user)
    data = folder / "data"
    options = f"--username=mlflow --auth=scram-sha-256 --pwfile={folder}/password --pgdata={data}"
    made = subprocess.run(
        [programs / "initdb", *options.split()],
        user=user, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -k {folder} -D {data}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [programs / "postgres", *settings.split()],
            user=user, cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        address = f"host=127.0.0.1 port={port} user=mlflow password={PASSWORD} dbname=postgres"
        connection = until(lambda: psycopg.connect(address, autocommit=True), 60)
        connection.execute("CREATE DATABASE mlflow")
        connection.close()
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)  # it waits for no client
        server.wait(60)
        shutil.rmtree(folder)


def _is_user(name: str) -> bool:
    return subprocess.run(["id", name], capture_output=True, check=False).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(attempt: Callable[[], Any], seconds: float) -> Any:
    """Return what an attempt gives, as soon as it raises no error of a connection."""
    end = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except (OSError, psycopg.OperationalError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def answer(url: str, host: str) -> tuple[int, str]:
    """Return status and text of a page, asked for under the name of a host."""
    request = urllib.request.Request(url, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_the_servers_command_runs_as_written(database: str, tmp_path: Path) -> None:
    """The command of compose.yaml on a real PostgreSQL, but for names, folders and ports."""
    port = free_port()
    here = f"127.0.0.1:{port}"
    local = {
        "@postgres/": f"@{database}/",
        "=/mlartifacts": f"={tmp_path / 'artifacts'}",
        "=0.0.0.0": "=127.0.0.1",
        "=5000": f"={port}",
    }
    program, *words = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]["command"]
    for old, new in local.items():
        assert sum(old in word for word in words) == 1
        words = [word.replace(old, new) for word in words]
    words = [re.sub(r"\$\{.*\}", f"{here},mlflow.example:5000", word) for word in words]
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    # Of several, the supervisor ends those that a busy machine lets answer too late.
    words.append("--workers=1")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [Path(sys.executable).parent / program, *words], env=environment, stdout=log, stderr=log
        )
    try:
        # The health check names a host that is not allowed.
        status, _ = until(lambda: answer(f"http://{here}/health", "localhost:5000"), 300)
        assert status == 200
        api = f"http://{here}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert answer(api, "mlflow.example:5000")[0] == 200
        status, text = answer(api, "elsewhere:5000")
        assert (status, text[:19]) == (403, "Invalid Host header")
        client = mlflow.MlflowClient(tracking_uri=f"http://{here}")
        run = client.create_run("0").info.run_id
        client.log_metric(run, "asr", 0.25)
        client.log_text(run, "flagged", "tokens.txt")
        assert client.get_run(run).data.metrics == {"asr": 0.25}
        assert list((tmp_path / "artifacts").rglob("tokens.txt"))
    finally:
        processes = [server, *psutil.Process(server.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        server.wait(60)
    host, _, at = database.partition(":")
    with psycopg.connect(host=host, port=at, user="mlflow", password=PASSWORD) as connection:
        assert connection.execute("SELECT key, value FROM metrics").fetchall() == [("asr", 0.25)]
