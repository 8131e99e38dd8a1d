"""A headless Chromium of the system, driven by Playwright. Nothing is downloaded."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str | None:
    """Return the path of this system's Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Give a Playwright browser.

    Raises:
        ImportError: Playwright or Chromium is not installed.
    """
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise ImportError("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield started
        finally:
            started.close()


class Ui(NamedTuple):
    """A running `btu ui`. url: of it. login: what Playwright's `http_credentials` takes."""

    url: str
    login: dict[str, str]


@contextmanager
def mlflow_ui(uri: str, log: Path, limit: float = 240.0) -> Iterator[Ui]:
    """Run `btu ui` for an MLflow store; give its address and log-in once it answers.

    log: gets what it prints. limit: seconds until it has to answer.

    Raises:
        RuntimeError: it ended, or did not answer in time; the text is what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "orchestrator.cli", "ui", "--uri", uri, "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + limit
            # MLflow answers there without a password.
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"no MLflow UI after {limit:.0f} s: {log.read_text()}")
                time.sleep(0.5)
            said = re.search(r"Log in as (\S+) with\s+the\s+password\s+(\S+)", log.read_text())
            assert said is not None, log.read_text()
            yield Ui(url, {"username": said[1], "password": said[2]})
        finally:
            server.terminate()
            server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
