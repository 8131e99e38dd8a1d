"""A sweep over three hosts that is killed many times: drivers, worker hosts, head hosts.

CLUSTER_CELLS and CLUSTER_KILLS set how large it is.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from checks import Kill, computations, wrong_computations
from conftest import open_place
from hosts import Host, Running
from launching import all_measured
from places import Place, Site, check_finished, finished_runs

from orchestrator.results.folder import Results

pytestmark = pytest.mark.cluster

CELLS = int(os.environ.get("CLUSTER_CELLS", "24"))
KILLS = int(os.environ.get("CLUSTER_KILLS", "5"))
SEEDS = 2
KINDS = ("driver", "worker host", "head host")
# Of computing before a kill.
MOST_SECONDS = 2.0


class Killing:
    """A sweep under fire. `launch` is the one that runs."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.results = Results(str(place.output), place.name)
        self.kills: list[Kill] = []
        self.kinds: Counter[str] = Counter()
        self._dead: set[str] = set()
        self._draw = random.Random(0)
        self.launch = self._start()

    def _start(self) -> Running:
        return self.place.launch(self.place.head)

    def _busy(self) -> dict[str, dict[str, Any]]:
        """Return the keys that the launch computes, with what their leases say."""
        held = self.results.store.leases.held()
        return {key: dict(f) for key, f in held.items() if f["owner"] not in self._dead}

    def strike(self) -> bool:
        """Kill what is next; False if the sweep ended before."""
        kind = KINDS[len(self.kills) % len(KINDS)]
        until = None
        while self.launch.process.poll() is None:
            busy = self._busy()
            if busy and until is None:
                until = time.monotonic() + self._draw.uniform(0, MOST_SECONDS)
            hosts = self._targets(kind, busy)
            if hosts and until is not None and time.monotonic() > until:
                self.kinds[kind] += 1
                self._kill(kind, self._draw.choice(hosts))
                return True
            time.sleep(0.05)
        return False

    def _targets(self, kind: str, busy: dict[str, dict[str, Any]]) -> list[Host]:
        if kind != "worker host":
            return [self.place.head] if busy else []
        names = {facts["host"] for facts in busy.values()}
        return [h for h in self.place.hosts if h is not self.place.head and h.name in names]

    def _kill(self, kind: str, host: Host) -> None:
        # Halted first: what the store says then is what the kill cuts short, at most.
        halted = self.launch.send if kind == "driver" else host.signal_all
        halted(signal.SIGSTOP)
        committed = frozenset(self.results.store.committed())
        busy = self._busy()
        if kind == "worker host":
            own = frozenset(key for key, facts in busy.items() if facts["host"] == host.name)
            self.kills.append(Kill(time.time(), computing=own, committed=committed))
            host.kill()
            host.boot()
            done = host.start_ray(self.place.head, self.place.environment).end()
            assert done.code == 0, done
            return
        (launch,) = {facts["owner"] for facts in busy.values()}
        self.kills.append(Kill(time.time(), launch=launch, committed=committed))
        self._dead.add(launch)
        if kind == "driver":
            self.launch.send(signal.SIGKILL)
            self.launch.process.wait(30)
        else:
            host.kill()
            host.boot()
            hosts = self.place.hosts
            self.place.restart_ray(hosts[(hosts.index(host) + 1) % len(hosts)])
        self.launch = self._start()


@pytest.fixture
def calm(site: Site) -> Iterator[Place]:
    yield from open_place(site, "calm")


@pytest.fixture
def wild(site: Site) -> Iterator[Place]:
    yield from open_place(site, "wild")


def grid() -> dict[str, list[Any]]:
    # Each flags one of the victim's 400 tokens more than the one before.
    alphas = [round(0.003 + number / 400, 4) for number in range(CELLS // SEEDS)]
    return {"seed": list(range(SEEDS)), "defense.alpha": alphas}


@pytest.mark.timeout(7200)
def test_a_sweep_that_is_killed_many_times(
    calm: Place, request: pytest.FixtureRequest, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    calm.sweep(grid())
    undisturbed = calm.launch(calm.head).end(3600)
    check_finished(undisturbed, CELLS)
    metrics = all_measured(calm.results("calm"))
    assert len(metrics) == CELLS

    place: Place = request.getfixturevalue("wild")
    place.sweep(grid())
    began = time.monotonic()
    killing = Killing(place)
    while len(killing.kills) < KILLS and killing.strike():
        pass
    done = killing.launch.end(3600)
    seconds = time.monotonic() - began
    check_finished(done, CELLS)
    assert sum(killing.kinds.values()) == KILLS
    place.gc(place.head)
    journal = place.journal()
    again = sum(computations(journal).values()) - len(computations(journal))
    with capsys.disabled():
        print(
            f"\n{CELLS} cells, {KILLS} kills ({dict(killing.kinds)}): {undisturbed.seconds:.0f} s "
            f"undisturbed, {seconds:.0f} s disturbed, "
            f"{(seconds - undisturbed.seconds) / KILLS:.1f} s lost per kill; "
            f"{again} of {sum(computations(journal).values())} stages were begun again"
        )
    results = place.results("wild")
    assert all_measured(results) == metrics
    assert finished_runs(site.postgres.uri, "wild") == dict.fromkeys(metrics, 1)
    committed = {marker.key: marker.committed for marker in results.store.markers()}
    assert wrong_computations(journal, committed, killing.kills) == []
    assert place.left() == []
