"""What a cluster needs beside Ray: PostgreSQL, an MLflow server on it, an S3 server."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
from hosts import NETWORK, ROOT, Host, Running
from launching import Done, wait_for
from test_deploy_server import PASSWORD, _is_user, postgres_programs

SERVER_PORT, S3_PORT = 5000, 9000
# Any will do for the S3 server.
S3_KEYS = {"AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": "made-up"}
BUCKET = "sweeps"


class Postgres:
    """A PostgreSQL server on a host, with the database `mlflow`; it can be restarted."""

    def __init__(self, host: Host, folder: Path) -> None:
        """Make the database and start the server. folder: for its files, with a short path."""
        self._host, self._folder = host, folder
        self._programs = postgres_programs()
        self._starts = 0
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if _is_user("postgres") else "nobody"
        folder.mkdir()
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            shutil.chown(path, self._user)
        self._data = folder / "data"
        options = "--username=mlflow --auth=scram-sha-256"
        done = self._run("initdb", *options.split(), f"--pwfile={folder}/password",
                         f"--pgdata={self._data}").end()  # fmt: skip
        assert done.code == 0, done
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {NETWORK}0/24 scram-sha-256\n")
        self._server = self.start()
        with self._connect("postgres") as connection:
            connection.execute("CREATE DATABASE mlflow")

    def _run(self, program: str, *options: str) -> Running:
        group = subprocess.run(
            ["id", "-g", self._user], capture_output=True, text=True, check=True
        ).stdout.strip()
        return self._host.start(
            "setpriv", f"--reuid={self._user}", f"--regid={group}", "--clear-groups",
            self._programs / program, *options,
        )  # fmt: skip

    def _connect(self, database: str) -> psycopg.Connection:
        address = f"host={self._folder} user=mlflow password={PASSWORD} dbname={database}"
        return psycopg.connect(address, autocommit=True)

    @property
    def uri(self) -> str:
        """The database as this process reaches it, through a socket in the file system.

        Another one after each start: MLflow keeps connections to a URI, which a stop ends.
        """
        address = f"postgresql://mlflow:{PASSWORD}@/mlflow?host={self._folder}"
        return f"{address}&application_name=start-{self._starts}"

    def start(self) -> Running:
        """Start the server and wait until it answers."""
        self._starts += 1
        self._server = self._run(
            "postgres", "-c", "listen_addresses=*", "-k", str(self._folder), "-D", str(self._data)
        )

        def answers() -> bool:
            try:
                self._connect("postgres").close()
            except psycopg.OperationalError:
                return False
            return True

        wait_for(answers, self._server, 60)
        return self._server

    def stop(self) -> None:
        """Stop the server at once; it waits for no client."""
        self._server.send(signal.SIGINT)
        assert self._server.end(60).code == 0


def documented(name: str) -> str:
    """Return the command of a program in docs/cluster.md, in one line."""
    text = (ROOT / "docs/cluster.md").read_text()
    (block,) = re.findall(rf"^(?:\w+=\S+ )?{name} (?:.*\\\n)*.*$", text, re.MULTILINE)
    return str(block).replace("\\\n", " ")


def start_mlflow(host: Host, artifacts: Path) -> str:
    """Start the MLflow server by the command of docs/cluster.md; return its URI."""
    command = documented("mlflow server")
    local = {
        "PGPASSWORD=PASSWORD": f"PGPASSWORD={PASSWORD}",
        " mlflow server": f" exec {sys.executable} -m mlflow server",
        "@DB_HOST/": f"@{host.address}/",
        "/shared/mlartifacts": str(artifacts),
        "MLFLOW_HOST:5000": f"{host.name}:{SERVER_PORT}",
        "10.0.0.5:5000": f"{host.address}:{SERVER_PORT}",
    }
    for old, new in local.items():
        assert command.count(old) == 1, (old, command)
        command = command.replace(old, new)
    # Of several workers, the supervisor ends those that a busy machine lets answer too late.
    server = host.start("bash", "-c", f"export {command} --workers 1".replace(" exec ", "; exec "))
    uri = f"http://{host.name}:{SERVER_PORT}"
    wait_answer(host, server, f"{uri}/health")
    return uri


def start_s3(host: Host) -> dict[str, str]:
    """Start moto's S3 server with an empty bucket; return the variables that its users need."""
    server = host.start(sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT))
    endpoint = f"http://{host.address}:{S3_PORT}"
    wait_answer(host, server, f"{endpoint}/moto-api/")
    made = ask(host, "PUT", f"{endpoint}/{BUCKET}")
    assert made.code == 0, made
    return {**S3_KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


def ask(host: Host, method: str, url: str) -> Done:
    """Send a request from a host; exit code 0 if the answer is a success."""
    code = (
        "import sys, urllib.request as u\n"
        "u.urlopen(u.Request(sys.argv[2], method=sys.argv[1]), timeout=10)"
    )
    return host.run(sys.executable, "-c", code, method, url)


def wait_answer(host: Host, server: Running, url: str) -> None:
    """Wait until a page answers; it may take a database's making."""

    def answers() -> bool:
        time.sleep(0.5)
        return ask(host, "GET", url).code == 0

    wait_for(answers, server, 300)
