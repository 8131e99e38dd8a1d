"""A sweep on hosts: its files in the shared folder, Ray on each host, faults, and final checks."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import launching
import yaml
from hosts import RAY_PORT, ROOT, Host, Network, Running, soon
from launching import LIMIT, Done, Workplace, check, names_by_key, runs_at, wait_for
from services import Postgres

# What all hosts do once per cell and once for all cells is small; three cells share nothing but the
# corpus, so that three hosts have work at once.
SEEDS = [0, 1, 2]
GRID: dict[str, list[Any]] = {"seed": SEEDS, "defense.alpha": [0.01, 0.02]}
CELLS = 6
# Trains for each seed: with it held on all hosts, each of them has begun.
STAGE = "poisoned fine-tune"
# Ray's head asks each node every second, and counts it as lost after three answers that fail.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}


class Place(Workplace):
    """The sweep of one test, named after it.

    hosts: where Ray runs, the head first. environment: of Ray and of all commands.
    """

    def __init__(self, folder: Path, hosts: Sequence[Host], uri: str, victim: Path) -> None:
        folder.mkdir()
        super().__init__(folder, faulty=True)
        self.name, self.hosts, self.head = folder.name, list(hosts), hosts[0]
        self.uri, self.victim = uri, victim
        paths = (str(launching.FAULTS), str(ROOT))
        self.environment |= {
            "PYTHONPATH": ":".join(paths),
            "RAY_worker_niceness": "0",
            **HEALTH,
            **TOKEN,
        }
        self.environment.pop("RAY_OVERRIDE_RESOURCES", None)

    def sweep(self, grid: Mapping[str, list[Any]] = GRID, **more: Any) -> Path:
        """Write the sweep's file."""
        config: dict[str, Any] = {
            "name": self.name,
            "output": str(self.output),
            "tracking": {"uri": self.uri},
            "data": {
                "name": "demo", "max_train_rows": 80, "max_clean_rows": 20, "max_eval_rows": 30,
            },
            "victim": {"name": str(self.victim), "max_length": 64},
            "attack": {"name": "badnets", "poison_rate": 0.2, "target_label": 1},
            "defense": {"name": "btu", "alpha": 0.01},
            "train": {
                "epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "precision": "fp32",
            },
            "seed": 0,
            "controls": [],
            "grid": dict(grid),
            **more,
        }  # fmt: skip
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def start_ray(self, head: Host | None = None, cpus: int = 1) -> None:
        """Start Ray on all hosts. head: which has the head from now on. cpus: of the head."""
        self.head = head or self.head
        first = self.head.start_ray(self.head, self.environment, cpus).end()
        assert first.code == 0, first
        others = [host for host in self.hosts if host is not self.head]
        for running in [host.start_ray(self.head, self.environment) for host in others]:
            done = running.end()
            assert done.code == 0, done

    def restart_ray(self, head: Host, cpus: int = 1) -> None:
        """End what still runs on all hosts, and start Ray with another head."""
        for host in self.hosts:
            host.stop_ray()
        self.start_ray(head, cpus)

    def btu(self, host: Host, *arguments: object) -> Running:
        """Start ``btu <arguments>`` on a host."""
        words = [sys.executable, "-m", "orchestrator.cli", *arguments]
        return host.start(*words, more=self.environment)

    def launch(self, host: Host, *arguments: object) -> Running:
        """Start a launch on a host, with the cluster of `head`."""
        address = f"{self.head.address}:{RAY_PORT}"
        file = self.folder / "sweep.yaml"
        return self.btu(host, "launch", file, "--address", address, *arguments)

    def finish(self, host: Host) -> Done:
        """Launch the sweep and check that it ends with every cell done."""
        done = self.launch(host).end()
        check_finished(done)
        return done

    def holders(self, stage: str = STAGE) -> dict[str, str]:
        """Return the keys of a stage that are computed and not committed, by the host's name."""
        if not launching.planned(self.output, self.name):
            return {}
        found = {}
        leases = self.output / "store" / "leases"
        for key, name in names_by_key(self.results(self.name)).items():
            ready = list((self.output / "store" / "entries" / key).glob("*/record.json"))
            if name == stage and ready:
                try:
                    found[json.loads((leases / f"{key}.json").read_text())["host"]] = key
                except FileNotFoundError:
                    continue  # another one's now, or nobody's
        return found

    def begin(self, host: Host) -> Running:
        """Launch, and wait until every host holds a stage. `release` lets them go on."""
        self.fault(STAGE, held=True)
        launch = self.launch(host)
        wait_for(lambda: len(self.holders()) == len(self.hosts), launch)
        return launch

    def release(self) -> None:
        self.fault(STAGE)

    def gc(self, host: Host) -> None:
        """Remove what dead launches left, on every host: their temporary folders are there."""
        for one in [host, *(other for other in self.hosts if other is not host)]:
            done = self.btu(one, "store", "gc", "--yes", "--output", self.output).end()
            assert done.code == 0, done

    def left(self) -> list[str]:
        """Return the registrations, leases and temporary folders of launches that are left."""
        store = self.output / "store"
        files = [p for name in ("launches", "leases") for p in (store / name).glob("*")]
        found = [f"{path.parent.name}/{path.name}" for path in files]
        return sorted(found + [f"{h.name}:{name}" for h in self.hosts for name in h.scratch()])

    def journal(self) -> list[dict[str, Any]]:
        return launching.journal(self.output, self.name)


class Site(NamedTuple):
    """hosts: three for Ray. services: the host of PostgreSQL and MLflow, at `uri`."""

    network: Network
    hosts: list[Host]
    services: Host
    postgres: Postgres
    uri: str
    victim: Path


class Reference(NamedTuple):
    """An undisturbed sweep.

    hosts: names of those that computed at once.
    metrics: by cell.
    """

    place: Place
    hosts: set[str]
    metrics: dict[str, dict[str, str]]


def check_all(
    place: Place, reference: Reference, site: Site, again: Mapping[str, int] | None = None
) -> None:
    """Check that a sweep ended as the undisturbed one, and that nothing of its launches is left.

    again: by name, how often stages were begun after their first time.
    """
    uri = site.postgres.uri
    check(place.output, reference.metrics, again=again, uri=uri, name=place.name)
    assert place.left() == []


def finished_runs(uri: str, name: str) -> Counter[str]:
    """Return how many finished runs each cell of a sweep has, by key; fail if a run has not."""
    runs = runs_at(uri, name)
    assert {run.info.status for run in runs} == {"FINISHED"}
    return Counter(run.data.tags["cell"] for run in runs)


def check_finished(done: Done, cells: int = CELLS) -> None:
    """Check what a launch says that has ended with every cell done."""
    assert done.code == 0, done
    assert f"{cells} of {cells} cells done, 0 failed, 0 not run" in done.out, done
    check_quiet(done)


def check_quiet(done: Done) -> None:
    """Check that nothing of Ray's own, and no trace, is in the terminal."""
    assert done.err == "", done
    for words in (
        "Traceback",
        "state-dump",
        ".cc:",
        "Raylet",
        "(autoscaler",
        "*** SIG",
        "View run",
    ):
        assert words not in done.out, (words, done)


def check_stopped(done: Done, why: str) -> None:
    """Check what a launch says that was stopped. why: after "Stopped: ", the beginning."""
    assert done.code == 1, done
    assert f"Stopped: {why}" in done.out, done
    assert "the same command continues where this one stopped" in done.out, done
    check_quiet(done)


def raylets(host: Host) -> list[Any]:
    return list(host.processes("raylet"))


def wait_gone(hosts: Iterable[Host], limit: float = LIMIT) -> None:
    """Wait until no Ray runs on hosts any more."""
    soon(lambda: not any(raylets(host) for host in hosts), limit)
