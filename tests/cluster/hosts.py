"""Hosts of a cluster on one Linux machine, and the network between them. Needs root.

A host is a network namespace with an address, a name, processes, a ``/tmp`` and a ``/dev/shm`` of
its own. Hosts see each other through a bridge in another namespace: nothing of the machine's own
network is touched, and none of it is reached from a host. The file system is otherwise shared.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from launching import LIMIT, Done, wait_for

ROOT = Path(__file__).parents[2]
# Of namespaces and folders. The process id follows: what a killed test run left can be told.
PREFIX = "btuc"
NETWORK = "10.77.0."
BRIDGE = "br0"
RAY_PORT = 6379
TMP = Path("/tmp")
# Variables that would take a host's requests, Ray or results elsewhere.
FOREIGN = ("AWS_", "BTU_", "FSSPEC_", "MLFLOW_", "RAY_", "PYTEST_")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")
# The first process of a host: it collects orphans, and its end is that of all others.
# $0: the host's name. $1: its folder for /tmp. $2: its /etc/hosts. Others: what it sees in /tmp.
INIT = """
set -e
hostname "$0"
for path in "${@:3}"; do
    mkdir -p "$1/${path#/tmp/}"
    mount --rbind "$path" "$1/${path#/tmp/}"
done
mount --bind "$2" /etc/hosts
mount --rbind "$1" /tmp
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
touch /tmp/.booted
while :; do sleep 3600 & wait $! || true; done
"""


def ip(*words: str) -> None:
    """Run ``ip <words>``.

    Raises:
        RuntimeError: it fails.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def why_not() -> str:
    """Return why this machine can have no hosts; empty if it can."""
    if sys.platform != "linux":
        return "hosts are network namespaces, which need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if not shutil.which(name)]
    if missing:
        return f"hosts need {', '.join(missing)} (Debian: iproute2, util-linux)"
    try:
        name = f"{PREFIX}-{os.getpid()}-probe"
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", BRIDGE, "type", "bridge")
        finally:
            ip("netns", "del", name)
    except RuntimeError as error:
        return f"network namespaces cannot be made ({error})"
    return ""


def remove_dead() -> None:
    """Remove hosts and folders of test runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        name = line.split()[0]
        if _is_dead(name):
            _remove_namespace(name)
    for folder in TMP.glob(f"{PREFIX}-*"):
        if _is_dead(folder.name):
            shutil.rmtree(folder)


def _is_dead(name: str) -> bool:
    prefix, _, rest = name.partition("-")
    pid = rest.partition("-")[0]
    return prefix == PREFIX and pid.isdigit() and not psutil.pid_exists(int(pid))


def _remove_namespace(name: str) -> None:
    def ended() -> bool:
        words = ["ip", "netns", "pids", name]
        inside = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        for pid in map(int, inside):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not inside

    wait_for(ended, limit=30)
    ip("netns", "del", name)


class Running:
    """A command that runs on a host."""

    def __init__(self, process: subprocess.Popen[bytes], logs: tuple[Path, Path]) -> None:
        self.process, self.logs = process, logs
        self.started = time.monotonic()

    @property
    def text(self) -> str:
        """What it has printed so far, as `Done.out`."""
        return " ".join(self.logs[0].read_text().split())

    def send(self, what: signal.Signals) -> None:
        """Send the command itself a signal: `nsenter`, which has started it, passes none on."""
        (command,) = psutil.Process(self.process.pid).children()
        command.send_signal(what)
        if what is signal.SIGKILL:
            self.wake()

    def wake(self) -> None:
        """Let `nsenter` see the end of its command: it halts where that was halted."""
        self.process.send_signal(signal.SIGCONT)

    def end(self, limit: float = LIMIT) -> Done:
        code = self.process.wait(limit)
        out, err = (log.read_text() for log in self.logs)
        return Done(code, out, err, time.monotonic() - self.started)


class Host:
    """A host. Made by `Network.add`, which boots it."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        """Make the network namespace of a host and connect it; nothing runs on it yet."""
        self.name, self.address = name, f"{NETWORK}{number}"
        self._network = network
        self._space = network.space(name)
        self._port = f"to-{name}"[:15]  # interfaces have short names
        self._tmp = network.folder / "tmp" / name
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._started: list[Running] = []
        switch = network.space("switch")
        ip("netns", "add", self._space)
        ip("-n", switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0",
           "netns", self._space)  # fmt: skip
        ip("-n", switch, "link", "set", self._port, "master", BRIDGE, "up")
        ip("-n", self._space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self._space, "link", "set", "eth0", "up")

    def boot(self) -> None:
        """Start the host, with an empty /tmp."""
        self.kill()
        shutil.rmtree(self._tmp, ignore_errors=True)
        self._tmp.mkdir(parents=True)
        self._tmp.chmod(0o1777)
        names = self._network.folder / "hosts"
        words = ["ip", "netns", "exec", self._space, "unshare", "--mount", "--uts", "--ipc",
                 "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", INIT, self.name,
                 self._tmp, names, *self._network.seen]  # fmt: skip
        with (self._network.folder / "boot.log").open("ab") as log:
            self._init = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment({})
            )
        wait_for((self._tmp / ".booted").exists, limit=30)
        (first,) = psutil.Process(self._init.pid).children()
        self._pid = first.pid

    def kill(self) -> None:
        """SIGKILL every process of the host."""
        if self._init is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # the kernel ends the others with the first
            for running in self._started:
                running.wake()  # the first ends once all others were waited for
            self._init.wait(30)
            self._init = None
        for running in self._started:
            running.process.wait(30)
        self._started.clear()

    def close(self) -> None:
        """End the host for good."""
        self.kill()
        _remove_namespace(self._space)

    def start(self, *words: object, more: Mapping[str, str] | None = None) -> Running:
        """Start a command. more: environment variables."""
        assert self._init is not None, f"{self.name} is not booted"
        logs = self._network.folder / "logs"
        logs.mkdir(exist_ok=True)
        out, err = (logs / f"{time.time_ns()}-{self.name}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                ["nsenter", f"--target={self._pid}", "--mount", "--uts", "--ipc", "--net", "--pid",
                 "env", "--chdir=/tmp", *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                env=environment(more or {}),
            )  # fmt: skip
        self._started.append(Running(process, (out, err)))
        return self._started[-1]

    def run(
        self, *words: object, more: Mapping[str, str] | None = None, limit: float = LIMIT
    ) -> Done:
        """Run a command to its end. more: environment variables."""
        return self.start(*words, more=more).end(limit)

    def signal_all(self, what: signal.Signals) -> None:
        """Send a signal to every process of the host at once, as Slurm does to those of a job."""
        done = self.run("bash", "-c", f"kill -{what.value} -1", limit=30)
        assert done.code == 0, done

    def processes(self, name: str = "") -> Iterator[psutil.Process]:
        """Yield the host's processes of a name, all by default, without its first."""
        space = os.readlink(f"/proc/{self._pid}/ns/pid")
        for process in psutil.process_iter(["name"]):
            with suppress(OSError):  # it has ended meanwhile
                there = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if there and process.pid != self._pid and name in ("", process.info["name"]):
                    yield process

    def scratch(self) -> list[str]:
        """Return the names of folders of launches in the host's /tmp."""
        return sorted(path.name for path in self._tmp.glob("btu-*"))

    def partition(self) -> None:
        """Cut the host off the network."""
        ip("-n", self._network.space("switch"), "link", "set", self._port, "down")

    def heal(self) -> None:
        """Connect it again."""
        ip("-n", self._network.space("switch"), "link", "set", self._port, "up")

    def start_ray(self, head: Host, more: Mapping[str, str], cpus: int = 1) -> Running:
        """Start Ray: the head where it is this host, else a node of its cluster."""
        where = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        if head is not self:
            where = [f"--address={head.address}:{RAY_PORT}"]
        return self.start(
            sys.executable, "-m", "ray.scripts.scripts", "start", *where,
            f"--node-ip-address={self.address}", f"--num-cpus={cpus}",
            "--object-store-memory=80000000", "--disable-usage-stats", more=more,
        )  # fmt: skip

    def stop_ray(self) -> None:
        """SIGKILL every process of the host but its first; it stays booted."""
        self.signal_all(signal.SIGKILL)


class Network:
    """Hosts and the switch between them.

    folder: under /tmp, with ``shared``, which all hosts see at the same path.
    seen: what hosts see in /tmp besides their own files.
    """

    def __init__(self) -> None:
        remove_dead()
        self.folder = TMP / f"{PREFIX}-{os.getpid()}"
        self.shared = self.folder / "shared"
        self.shared.mkdir(parents=True)
        self._hosts: list[Host] = []
        code = {ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.path)}
        inside = [path for path in sorted(code) if path.is_dir() and TMP in path.parents]
        outer = [p for p in inside if not any(q in p.parents for q in inside)]
        self.seen = [self.shared, *outer]
        switch = self.space("switch")
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", BRIDGE, "type", "bridge")
        ip("-n", switch, "link", "set", BRIDGE, "up")

    def space(self, name: str) -> str:
        """Return the name of a network namespace."""
        return f"{PREFIX}-{os.getpid()}-{name}"

    def add(self, *names: str) -> list[Host]:
        """Add hosts and boot them. All of a network are added at once: they know each other."""
        made = [Host(self, name, number) for number, name in enumerate(names, start=1)]
        self._hosts += made
        known = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in made)]
        (self.folder / "hosts").write_text("\n".join(known) + "\n")
        for host in made:
            host.boot()
        return made

    def close(self) -> None:
        """End all hosts and remove their files."""
        for host in self._hosts:
            host.close()
        ip("netns", "del", self.space("switch"))
        shutil.rmtree(self.folder)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a host's command. more: those to add."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and name.lower() not in PROXIES
    }
    return {
        **kept,
        "HOME": str(TMP),
        "NO_PROXY": "*",
        "no_proxy": "*",
        "TMPDIR": str(TMP),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def soon(what: Callable[[], Any], limit: float = 60.0) -> Any:
    """Return a function's first true value, within `limit` seconds."""
    return wait_for(what, limit=limit)
