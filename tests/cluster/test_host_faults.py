"""A sweep over three hosts, and faults of hosts and of what they need: one test for each.

After each, every cell has one result and one finished run, and nothing of a launch is left.
"""

from __future__ import annotations

import signal

import pytest
from hosts import Running
from launching import wait_for
from places import (
    CELLS,
    SEEDS,
    STAGE,
    Place,
    Reference,
    Site,
    check_all,
    check_finished,
    check_quiet,
    check_stopped,
    raylets,
    wait_gone,
)

pytestmark = pytest.mark.cluster

# Slurm kills 30 s after SIGTERM (KillWait).
KILL_WAIT = 30


def test_a_sweep_over_three_hosts_and_a_server_on_postgresql(
    reference: Reference, site: Site
) -> None:
    place = reference.place
    assert reference.hosts == {host.name for host in site.hosts}
    assert len(reference.metrics) == CELLS
    check_all(place, reference, site)
    status = place.btu(site.services, "status", place.name, "--stages", "--output", place.output)
    done = status.end()
    assert done.code == 0, done
    # Each row names its device, and has a peak of memory in place of "-".
    (row,) = [line for line in status.logs[0].read_text().splitlines() if f" {STAGE} " in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == [STAGE, str(len(SEEDS))], done
    assert cells[3].endswith("MB"), done
    assert cells[-1] == "cpu", done
    assert f"MLflow {site.uri}: {CELLS} finished, 0 failed." in done.out, done


def check_survived(place: Place, launch: Running, reference: Reference, site: Site) -> None:
    """Let a launch that has lost a host end, and check that it ended as an undisturbed one."""
    place.release()
    done = launch.end()
    check_finished(done)
    assert done.out.count("is lost") == 1, done
    place.gc(place.head)
    check_all(place, reference, site, {STAGE: 1})


def test_a_host_that_is_cut_off_and_comes_back(
    place: Place, reference: Reference, site: Site
) -> None:
    head, host, _ = place.hosts
    launch = place.begin(head)
    host.partition()
    wait_for(lambda: f"node {host.name} is lost; 2 nodes are left" in launch.text, launch)
    host.heal()
    # It learns that it counts as dead, and ends.
    wait_gone([host])
    joined = host.start_ray(head, place.environment).end()
    assert joined.code == 0, joined
    wait_for(lambda: f"node {host.name} is back; there are 3 nodes" in launch.text, launch)
    check_survived(place, launch, reference, site)


def test_a_killed_raylet(place: Place, reference: Reference, site: Site) -> None:
    head, host, _ = place.hosts
    launch = place.begin(head)
    (raylet,) = raylets(host)
    raylet.kill()
    lost = f"node {host.name} is lost; 2 nodes are left. Its stages start again elsewhere."
    wait_for(lambda: lost in launch.text, launch)
    check_survived(place, launch, reference, site)


def test_a_killed_raylet_under_the_launch(place: Place, reference: Reference, site: Site) -> None:
    """Ray's client would end the launch silently."""
    head, host, third = place.hosts
    launch = place.begin(host)
    (raylet,) = raylets(host)
    raylet.kill()
    check_stopped(launch.end(KILL_WAIT), "Ray's process on this machine has died")
    place.restart_ray(head)
    place.release()
    place.finish(third)
    place.gc(third)
    check_all(place, reference, site, {STAGE: 3})


@pytest.mark.parametrize("driver", ["on the head", "elsewhere"])
def test_a_killed_head_host(place: Place, reference: Reference, site: Site, driver: str) -> None:
    head, second, third = place.hosts
    launch = place.begin(head if driver == "on the head" else second)
    head.kill()
    if driver == "elsewhere":
        check_stopped(launch.end(), "Ray ")
    place.hosts = [second, third]
    place.restart_ray(second)
    place.release()
    place.finish(third)
    place.gc(third)
    # Each host held one.
    check_all(place, reference, site, {STAGE: 3})


@pytest.mark.parametrize("back", ["during the launch", "after it"])
def test_postgresql_goes_away(place: Place, reference: Reference, site: Site, back: str) -> None:
    head, _, third = place.hosts
    launch = place.begin(head)
    during = back == "during the launch"
    last = place.holders()[third.name]
    site.postgres.stop()
    try:
        if during:
            place.fault(last, held=True)
        place.release()
        if during:
            wait_for(lambda: "not in MLflow yet" in launch.text, launch)
        else:
            done = launch.end()
    finally:
        site.postgres.start()
    if during:
        place.fault(last)
        done = launch.end()
        assert "on disk but not in MLflow" not in done.out, done
    else:
        assert f"{CELLS} results are on disk but not in MLflow" in done.out, done
        assert place.finish(third).code == 0
    check_finished(done)
    check_all(place, reference, site)


def test_sigterm_at_the_launch(place: Place, reference: Reference, site: Site) -> None:
    head, second, _ = place.hosts
    launch = place.begin(head)
    launch.send(signal.SIGTERM)
    check_stopped(launch.end(KILL_WAIT), "interrupted")
    assert [name for name in place.left() if not name.startswith("leases/")] == []
    place.release()
    place.finish(second)
    check_all(place, reference, site, {STAGE: 3})


def test_sigterm_at_all_processes_of_the_head_host(
    place: Place, reference: Reference, site: Site
) -> None:
    head, second, third = place.hosts
    launch = place.begin(head)
    head.signal_all(signal.SIGTERM)
    done = launch.end(KILL_WAIT)
    check_stopped(done, "interrupted")
    assert f"0 of {CELLS} cells done, 0 failed, {CELLS} not run" in done.out, done
    check_quiet(done)
    assert [name for name in place.left() if not name.startswith("leases/")] == []
    place.restart_ray(second)
    place.release()
    place.finish(third)
    place.gc(third)
    check_all(place, reference, site, {STAGE: 3})
