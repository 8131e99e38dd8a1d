"""Hosts, services and sweeps for the cluster suite: `make cluster`."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
for helpers in (TESTS, TESTS / "sweeps", TESTS.parent / "benchmarks"):
    sys.path.append(str(helpers))

from hosts import Network, why_not  # noqa: E402
from launching import all_measured  # noqa: E402
from places import Place, Reference, Site, check_finished  # noqa: E402
from services import Postgres, start_mlflow  # noqa: E402


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    made = Network()
    yield made
    made.close()


@pytest.fixture(scope="session")
def site(network: Network, victim_folder: Callable[[str], Path]) -> Site:
    *hosts, services = network.add("one", "two", "three", "services")
    victim = network.shared / "victim"
    shutil.copytree(victim_folder("bert"), victim)
    postgres = Postgres(services, network.shared / "postgres")
    uri = start_mlflow(services, network.shared / "artifacts")
    return Site(network, hosts, services, postgres, uri, victim)


def open_place(site: Site, name: str) -> Iterator[Place]:
    """Yield a place with its sweep and Ray on freshly booted hosts."""
    for host in site.hosts:
        host.boot()
    place = Place(site.network.shared / name, site.hosts, site.uri, site.victim)
    place.sweep()
    place.start_ray()
    yield place
    for host in site.hosts:
        host.heal()
        host.kill()


@pytest.fixture
def place(site: Site, request: pytest.FixtureRequest) -> Iterator[Place]:
    """The sweep of one test."""
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    yield from open_place(site, name)


@pytest.fixture(scope="session")
def reference(site: Site) -> Reference:
    """Launched by the first test that needs it."""
    with_place = open_place(site, "undisturbed")
    place = next(with_place)
    launch = place.begin(place.head)
    hosts = set(place.holders())
    place.release()
    done = launch.end()
    check_finished(done)
    assert place.left() == []
    next(with_place, None)
    return Reference(place, hosts, all_measured(place.results(place.name)))
