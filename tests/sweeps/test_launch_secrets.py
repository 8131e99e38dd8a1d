"""Who can read the secrets of a launch, and reach its Ray, while it runs. With a real Ray."""

from __future__ import annotations

import ipaddress
import json
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from launching import Command, Workplace, holder, wait_for
from other_user import OtherUser, other_user  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow

SECRETS = {
    "HF_TOKEN": "hf_Sxq7Lm2Vt9",
    "MLFLOW_TRACKING_PASSWORD": "ml_Kd83nPw0Zr",
    "AWS_SECRET_ACCESS_KEY": "aws_Yb5Tj41Qh",
    "BTU_EXAMPLE": "btu_Gc6Rf28Mv",
}


class Held(NamedTuple):
    """A launch that waits inside a stage.

    place: where it runs. command: the process. told: the environment of the stage's worker.
    ray, scratch: where Ray and Tune may write. processes: of the launch and its Ray.
    """

    place: Workplace
    command: Command
    told: dict[str, str]
    ray: Path
    scratch: Path
    processes: list[psutil.Process]

    @property
    def secrets(self) -> list[str]:
        return [*SECRETS.values(), self.told["RAY_AUTH_TOKEN"]]


def start(
    folder: Path, sweep: Path, environment: dict[str, str], *address: str
) -> tuple[Workplace, Command]:
    place = Workplace(folder, faulty=True)
    place.environment |= environment
    place.fault("poison", held=True, tells=str(folder / "told.json"))
    return place, place.start("launch", sweep, *address)


def settled(place: Workplace, command: Command, folder: Path) -> tuple[int, dict[str, str]]:
    """Wait until the stage is computed. Return its worker's process id and environment."""
    worker = wait_for(lambda: holder(place, "poison"), command)
    return worker.pid, json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def sweep_file(
    cell: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    import yaml

    def write(folder: Path) -> Path:
        file = folder / "tiny.yaml"
        file.write_text(yaml.safe_dump({"name": "tiny", **cell, "seed": 0, "controls": []}))
        return file

    return write


@pytest.fixture(scope="module")
def held(
    sweep_file: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Held]:
    """A launch on a local Ray, with secrets and with a home that cannot be written."""
    folder = tmp_path_factory.mktemp("held")
    ray, scratch = Path(tempfile.mkdtemp(prefix="t-")), folder / ("scratch" * 10)
    # Every user may look into it: what is inside has to be private by itself.
    ray.chmod(0o755)
    scratch.mkdir()
    place, command = start(
        folder,
        sweep_file(folder),
        {
            **SECRETS,
            "RAY_TMPDIR": str(ray),
            # A folder of a batch job, too long for sockets.
            "TMPDIR": str(scratch),
            "HOME": "/proc/none",
            "HF_HOME": str(folder / "hub"),
        },
    )
    try:
        _, told = settled(place, command, folder)
        processes = [
            psutil.Process(command.process.pid),
            *psutil.Process(command.process.pid).children(recursive=True),
        ]
        yield Held(place, command, told, ray, scratch, processes)
    finally:
        place.close()
        shutil.rmtree(ray, ignore_errors=True)


def leaks(secrets: list[str], *folders: Path) -> list[str]:
    """Return the files that contain a secret, and the processes that have one as an argument."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        found += [f"process {process.info['pid']}: {s[:4]}" for s in secrets if s in line]
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path}: {s[:4]}" for s in secrets if s.encode() in content]
    return found


def test_workers_of_a_local_ray_have_the_secrets_and_nothing_else_has(held: Held) -> None:
    assert {name: held.told[name] for name in SECRETS} == SECRETS
    # There is something to search: Ray's logs, Tune's state, the store and the journal.
    for folder in (held.ray, held.scratch, held.place.output):
        assert any(path.is_file() for path in folder.rglob("*"))
    assert leaks(held.secrets, held.ray, held.scratch, held.place.output) == []


def test_a_local_ray_listens_on_the_loopback_interface_alone(held: Held) -> None:
    listening = {}
    for process in held.processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or not connection.raddr:
                address = ipaddress.ip_address(connection.laddr.ip)
                mapped = getattr(address, "ipv4_mapped", None)
                listening[process.name(), connection.laddr.port] = mapped or address
    # GCS, raylet, agents, driver and worker.
    assert len(listening) >= 5
    assert {k: str(v) for k, v in listening.items() if not v.is_loopback} == {}


def test_the_folder_of_a_local_ray_is_private(held: Held) -> None:
    (private,) = held.ray.iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert list(private.rglob("sockets/plasma_store"))


def test_another_user_finds_no_secret(
    held: Held,
    other_user: OtherUser,  # noqa: F811
) -> None:
    lines = other_user.run(
        "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '"
    )
    # It does see the processes.
    assert "raylet" in lines.stdout
    assert [s[:4] for s in held.secrets if s in lines.stdout] == []
    files = other_user.run("find", str(held.ray), "-type", "f")
    assert files.stdout == ""
    assert "Permission denied" in files.stderr
    tokens = other_user.run(
        "sh", "-c", f"find /root /home /tmp -name auth_token -exec cat {{}} + 2>/dev/null; "
        f"grep -rl {held.told['RAY_AUTH_TOKEN']} {held.ray} {held.scratch}"
    )  # fmt: skip
    assert held.told["RAY_AUTH_TOKEN"] not in tokens.stdout


def test_a_cluster_gets_the_secrets_as_an_argument(
    sweep_file: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    ray = Path(tempfile.mkdtemp(prefix="t-"))
    place = Workplace(tmp_path, faulty=True)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES")
    monkeypatch.setenv("RAY_TMPDIR", str(ray))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        address = ("--address", cluster.address)
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        environment = {**SECRETS, "TMPDIR": str(scratch)}
        place, command = start(tmp_path, sweep_file(tmp_path), environment, *address)
        try:
            pid, told = settled(place, command, tmp_path)
            # The worker was started without them.
            assert not SECRETS.keys() & psutil.Process(pid).environ().keys()
            assert {name: told[name] for name in SECRETS} == SECRETS
            assert any(path.is_file() for path in scratch.glob("btu-tune-*/**/*"))
            assert any(path.is_file() for path in ray.rglob("*.log"))
            assert leaks(list(SECRETS.values()), ray, scratch, place.output) == []
        finally:
            place.close()
    finally:
        cluster.shutdown()
        shutil.rmtree(ray, ignore_errors=True)


def test_a_stopped_launch_takes_its_folders_away(held: Held) -> None:
    # Last: it ends the launch of the others.
    held.command.process.send_signal(signal.SIGTERM)
    done = held.command.end()
    assert done.code == 1, done
    assert "Traceback" not in done.err, done
    assert list(held.ray.iterdir()) == []
    assert list(held.scratch.glob("btu-tune-*")) == []
    assert leaks(held.secrets, held.place.folder / "runs") == []
