"""The hosts themselves: they see each other and nothing else, and a killed test run leaves none."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import PREFIX, ROOT, TMP, Network, remove_dead

pytestmark = pytest.mark.cluster

# A test run that dies with a booted host. Its helpers are where those of this process are.
RUN = """
import sys, time
sys.path[:0] = sys.argv[1:]
from hosts import Network
Network().add("lonely")[0].start("sleep", "600")
print("booted", flush=True)
time.sleep(600)
"""


def listed(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def test_the_network_of_the_machine_stays_as_it_is(network: Network) -> None:
    for words in (["-o", "link"], ["-o", "addr"], ["route"], ["rule"]):
        assert PREFIX not in listed(*words)
        assert "10.77.0." not in listed(*words)


def test_a_killed_test_run_leaves_no_host(network: Network) -> None:
    here = Path(__file__).parent
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(here), str(ROOT / "tests/sweeps"), str(ROOT)],
        stdout=subprocess.PIPE,
    )
    assert run.stdout is not None
    with run.stdout:
        assert run.stdout.readline() == b"booted\n"
    run.send_signal(signal.SIGKILL)
    run.wait(30)
    name = f"{PREFIX}-{run.pid}"
    assert f"{name}-lonely" in listed("netns", "list")
    remove_dead()
    assert name not in listed("netns", "list")
    assert not (TMP / name).exists()
    # That of this process stays.
    assert network.folder.is_dir()
    assert network.space("switch") in listed("netns", "list")
