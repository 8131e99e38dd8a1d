"""When a launch leaves its Ray, and what it says of nodes; no Ray runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from orchestrator.run import outage
from orchestrator.run.outage import Watch, answers, run_under


class Cluster:
    """Nodes as a watch sees them. nodes: names by id; None while nothing answers."""

    def __init__(self) -> None:
        self.nodes: Mapping[str, str] | None = {"1": "head", "2": "left"}
        self.notes: list[str] = []
        self.now, self.runs = 0.0, True
        self.watch = Watch(
            lambda: self.nodes,
            self.notes.append,
            lambda: "What Ray says: FILE.",
            lambda: self.runs,
            clock=lambda: self.now,
        )

    def at(self, seconds: float, nodes: Mapping[str, str] | None) -> str:
        """Look every second until a time; return why the launch must leave."""
        self.nodes, why = nodes, ""
        while self.now < seconds and not why:
            self.now = min(self.now + 1, seconds)
            self.watch.look()
            why = self.watch.gone
        return why


def test_lost_and_regained_nodes_have_a_line_each() -> None:
    cluster = Cluster()
    both, alone = {"1": "head", "2": "left"}, {"1": "head"}
    again = {"1": "head", "3": "left"}
    for at, nodes in enumerate((both, both, alone, alone, again, {**again, "4": "right"})):
        assert cluster.at(at + 1, nodes) == ""
    # A node that is back has another id.
    assert cluster.notes == [
        "node left is lost; 1 node is left. Its stages start again elsewhere. What Ray says: FILE.",
        "node left is back; there are 2 nodes.",
        "node right has joined; there are 3 nodes.",
    ]


def test_an_answer_that_fails_to_come_says_nothing_of_nodes() -> None:
    cluster = Cluster()
    cluster.at(1, {"1": "head"})
    cluster.at(3, None)
    cluster.at(5, {"1": "head"})
    assert cluster.notes == []


def test_a_ray_that_is_silent_is_left_before_its_client_ends_the_process() -> None:
    cluster = Cluster()
    assert cluster.at(1, {"1": "head"}) == ""
    assert cluster.at(11, None) == ""
    assert cluster.notes == []
    assert cluster.at(12, None) == ""
    assert cluster.at(14, None) == ""
    (note,) = cluster.notes
    assert note.startswith("Ray does not answer; the launch stops if that lasts 45 s.")
    assert cluster.at(46, None) == ""
    assert cluster.at(47, None) == "Ray has not answered for 45 s"
    assert cluster.watch.gone
    # Ray's client waits for 60 s.
    assert outage.SILENT_SECONDS + outage.LOOK_SECONDS + outage.CONNECT_SECONDS < 60


def test_a_launch_that_was_suspended_has_missed_the_answers() -> None:
    cluster = Cluster()
    cluster.at(1, {"1": "head"})
    cluster.now = 600.0  # Ctrl-Z, and fg
    assert cluster.watch.gone == ""
    assert cluster.at(610, {"1": "head"}) == ""
    assert cluster.notes == []


def test_a_ray_that_answers_again_is_kept() -> None:
    cluster = Cluster()
    cluster.at(1, {"1": "head"})
    cluster.at(30, None)
    assert cluster.at(31, {"1": "head"}) == ""
    assert cluster.notes[-1] == "Ray answers again."
    assert cluster.at(60, None) == ""


def test_a_ray_without_nodes_is_gone_too() -> None:
    """Its head answers, but its own node died: Tune would wait for ever."""
    cluster = Cluster()
    cluster.at(1, {"1": "here"})
    assert cluster.at(10, {}) == ""
    assert cluster.notes == ["node here is lost; 0 nodes are left. What Ray says: FILE."]
    assert cluster.at(47, {}) == "Ray has not answered for 45 s"


def test_a_stop_does_not_wait_for_a_ray_that_was_stopped_too() -> None:
    cluster = Cluster()
    cluster.at(1, {"1": "head", "2": "left"})
    cluster.watch.stopping.set()
    assert cluster.at(2, {"1": "head"}) == ""
    assert cluster.at(8, None) == ""
    assert cluster.at(9, None) == "Ray went down at the same time"
    assert cluster.notes == []  # the nodes were told to go


@pytest.mark.parametrize("stopping", [True, False])
def test_a_ray_whose_process_here_has_died_is_left_at_once(stopping: bool) -> None:
    """The next call of its client would end this process, silently."""
    cluster = Cluster()
    cluster.at(1, {"1": "here"})
    if stopping:
        cluster.watch.stopping.set()
    cluster.runs = False
    died = "Ray went down at the same time"
    assert cluster.watch.gone == (died if stopping else "Ray's process on this machine has died")


def test_a_stop_has_its_time() -> None:
    cluster = Cluster()
    cluster.at(1, {"1": "head"})
    cluster.watch.stopping.set()
    assert cluster.at(22, {"1": "head"}) == ""
    assert cluster.at(23, {"1": "head"}) == "Ray did not stop within 20 s"
    # Slurm kills 30 s after SIGTERM.
    assert outage.STOP_SECONDS < 30


def test_work_that_hangs_is_left() -> None:
    cluster, hang = Cluster(), threading.Event()

    def fail() -> None:
        raise RuntimeError("of the work")

    def leave() -> None:
        raise SystemExit(1)

    assert run_under(cluster.watch, lambda: None, ()) == ""
    with pytest.raises(RuntimeError, match="of the work"):
        run_under(cluster.watch, fail, (SystemExit,))
    # Ray's client ends the process so when its node has died.
    assert run_under(cluster.watch, leave, (SystemExit,)) == "Ray is gone (SystemExit: 1)"
    cluster.watch.stopping.set()
    assert cluster.watch.gone == ""
    cluster.now = 9.0
    assert run_under(cluster.watch, lambda: hang.wait(60), ()) == "Ray went down at the same time"
    hang.set()


def test_it_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(outage, "LOOK_SECONDS", 0.01)

    def look() -> dict[str, str]:
        looked.set()
        return {"1": "here"}

    with Watch(look, print).looking():
        assert looked.wait(30)


def test_an_address_answers_or_not(free_port: int) -> None:
    import socket

    assert not answers(f"127.0.0.1:{free_port}")
    with socket.create_server(("127.0.0.1", free_port)):
        assert answers(f"127.0.0.1:{free_port}")
