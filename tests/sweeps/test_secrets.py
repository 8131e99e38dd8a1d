"""The password of an output's URL: used, and neither saved, printed nor sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from btu.redaction import shown_url
from orchestrator.plan.planner import Plan, Planner
from orchestrator.results.folder import Results
from orchestrator.run.driver import Driver, LaunchResult
from orchestrator.run.progress import SweepProgress
from orchestrator.run.publish import Publisher
from orchestrator.run.schedule import Task
from orchestrator.run.worker import Outcome, Report
from orchestrator.store.store import Store
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.sweep import Sweep

if TYPE_CHECKING:
    from conftest import Ran

# What a URL may hold unescaped, and what stands in none of the other texts.
USER, PASSWORD, TOKEN = "wilma-user", "pa:ss@w-0rd", "t0ken-of-query"


class Vault(LocalFileSystem):
    """Files of this machine behind URLs with a password: vault://USER:PASSWORD@host/PATH."""

    protocol = "vault"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path)
        if text.startswith("vault://"):
            assert f"{USER}:{PASSWORD}@host" in text, "the file system got no password"
            text = urlsplit(text).path
        return str(super()._strip_protocol(text))


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    fsspec.register_implementation("vault", Vault, clobber=True)
    yield f"vault://{USER}:{PASSWORD}@host{tmp_path}/vault?token={TOKEN}"
    _registry.pop("vault", None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Sweep]:
    """Replace Ray: of a launch's tasks the first one fails with an error that names the URL."""
    sweeps: list[Sweep] = []

    def run(
        sweep: Sweep, plan: Plan, planner: Planner, progress: SweepProgress, **_: Any
    ) -> LaunchResult:
        sweeps.append(sweep)
        store = Store(sweep.store_location, warn=progress.note)
        results = Results(sweep.output, sweep.name, store)
        publisher = Publisher(sweep, results, progress.note)
        driver = Driver(sweep, plan, planner, progress, results)
        driver.prepare()
        publisher.prepare()
        with driver.underway():
            task = driver.next_task()
            if isinstance(task, Task):  # the second launch has none
                driver.started(task)
                reason = f"OSError: {sweep.store_location}/entries is away"
                failure = {"key": task.stage.key, "stage": task.stage.name, "code": "1"}
                failure |= {"started": 1.0, "ended": 2.0}
                store.fail(
                    task.stage.key, {**failure, "reason": reason, "traceback": f"{reason}\n"}
                )
                driver.ended(task, Report(Outcome.failed, reason=reason))
            progress.note(f"{sweep.output} is slow")
            driver.stop(f"{sweep.output} cannot be read")
            publisher.synchronize(driver.id, interrupted=False)
        return driver.result()

    module: Any = ModuleType("orchestrator.run.on_ray")
    module.launch = run
    monkeypatch.setitem(sys.modules, "orchestrator.run.on_ray", module)
    return sweeps


def leaks(text: str) -> list[str]:
    return [secret for secret in (USER, PASSWORD, "w-0rd", TOKEN) if secret in text]


def test_the_password_of_an_output_is_saved_printed_and_sent_nowhere(
    run_cli: Callable[..., Ran],
    make_sweep: Callable[..., Path],
    launched: list[Sweep],
    tmp_path: Path,
    url: str,
) -> None:
    file = make_sweep(output=url.replace("?token=" + TOKEN, ""))
    location = file.read_text().partition("output: ")[2].splitlines()[0].strip("'\"")
    database = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    spoken = [
        run_cli("plan", file, f"output={location}"),
        run_cli("launch", file, f"output={location}", database),
        run_cli("launch", file, f"output={location}", database),
        run_cli("status", "tiny", "-o", location),
        run_cli("status", "-o", location),
        run_cli("report", "tiny", "-o", location),
        run_cli("report", "tony", "-o", location),
        run_cli("store", "ls", "-o", location),
        run_cli("store", "ls", "-o", f"{location}-none"),
        run_cli("sync", "tiny", "-o", location, "--uri", f"sqlite:///{tmp_path / 'mlflow.db'}"),
        run_cli("sync", "tiny", "-o", location),
        # The file alone.
        run_cli("plan", file),
        run_cli("launch", file),
    ]
    # The launch had the whole URL.
    assert launched[0].output == location
    assert [done for done in spoken if leaks(done.out + done.err)] == []
    assert spoken[1].code == 1
    assert "Sweep tiny; results go to vault://host" in spoken[1].out
    assert "OSError: vault://host" in spoken[1].out
    assert "btu report tiny --output vault://host" in spoken[1].out
    saved = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    names = {path.name for path in saved}
    assert {"sweep.yaml", "journal.jsonl", "mlflow.db"} <= names | {p.parent.name for p in saved}
    assert [str(p) for p in saved if leaks(p.read_bytes().decode(errors="replace"))] == []
    assert [str(path) for path in saved if leaks(str(path))] == []


def test_the_recorded_sweep_has_the_output_without_its_password(tmp_path: Path, url: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"output: '{url}'")
    sweep = load_sweep(path)
    assert sweep.output == url
    assert leaks(sweep.text) == []
    assert f"output: {shown_url(url)}" in sweep.text.replace("'", "")


def test_a_failure_is_recorded_without_the_password(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    text = f"OSError: sftp://{USER}:{PASSWORD}@host/x?token={TOKEN} is away"
    store.fail("a" * 24, {"key": "a" * 24, "reason": text, "traceback": f"line\n{text}", "n": 1})
    found = store.failure("a" * 24)
    assert found is not None
    assert found["reason"] == "OSError: sftp://host/x?token=*** is away"
    assert leaks(str(found)) == []
    assert found["n"] == 1
