"""The layer between Ray and a launch, without a running Ray."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from driving import ByHand, ToyPlanner, begin

from btu.errors import UserError
from btu.provenance import code_version
from orchestrator.run import local, nodes
from orchestrator.run.schedule import CELL
from orchestrator.run.trials import FINISHED, Trials
from orchestrator.run.worker import Launch, Outcome, Report, StageCall
from orchestrator.store.store import Store
from orchestrator.sweep.sections import ResourceSpec

# Coming and going ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "tries", "refused"),
    [
        (2, 3, None),  # a busy machine; the third time it is up
        (9, 3, r"Ray did not start, 3 times: timed out.* give the same command again"),
    ],
)
def test_a_ray_that_does_not_start_in_time_is_started_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, tries: int, refused: str | None
) -> None:
    from orchestrator.run import on_ray

    asked: list[str] = []
    started: list[subprocess.Popen[bytes]] = []

    def init(*, address: str, **_: Any) -> None:
        asked.append(address)
        if len(asked) <= failures:
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
            raise Exception("timed out.")

    monkeypatch.setattr(on_ray.ray, "init", init)
    expected = pytest.raises(UserError, match=refused) if refused else nullcontext()
    with expected:
        on_ray.connect(None)
    assert asked == ["local"] * tries
    # What came up of Ray in vain does not burden the next try.
    assert [process.wait(60) for process in started] == [-signal.SIGKILL] * min(failures, tries)


def test_of_several_nodes_on_one_machine_the_own_one_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psutil

    from orchestrator.run.on_ray import raylets_at

    def process(name: str, socket: str) -> SimpleNamespace:
        words = [f"/ray/{name}", f"--raylet_socket_name={socket}", f"--agent=x --raylet={socket} y"]
        return SimpleNamespace(info={"name": name, "cmdline": words})

    # Process ids may have begun again from low ones: the head's is not always the first.
    other, own = process("raylet", "/r/sockets/raylet.1"), process("raylet", "/r/sockets/raylet")
    elsewhere = process("raylet", "/q/r/sockets/raylet")
    hidden = SimpleNamespace(info={"name": "raylet", "cmdline": None})
    found = [other, elsewhere, hidden, process("python", "/r/sockets/raylet"), own]
    monkeypatch.setattr(psutil, "process_iter", lambda _: iter(found))
    assert raylets_at("/r/sockets/raylet") == [own]
    assert raylets_at("/r/sockets/raylet.1") == [other]


def test_a_cluster_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.run import on_ray

    asked: list[str] = []

    def init(*, address: str, **_: Any) -> None:
        asked.append(address)
        raise ConnectionError("nobody there.")

    monkeypatch.setattr(on_ray.ray, "init", init)
    with pytest.raises(UserError, match="Ray cluster head:6379 cannot be reached: nobody there"):
        on_ray.connect("head:6379")
    assert asked == ["head:6379"]


def test_ray_goes_down_with_nothing_left_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed by another thread at that moment, a reference of Ray's ends the process."""
    from orchestrator.run import on_ray

    class Part:
        me: Any

    part = Part()
    part.me = part
    alive = weakref.ref(part)
    del part
    seen = []
    monkeypatch.setattr(
        on_ray.ray, "shutdown", lambda: seen.append((alive() is None, gc.isenabled()))
    )
    on_ray.leave()
    assert seen == [(True, False)]
    assert gc.isenabled()


# Trials ----------------------------------------------------------------------------------------


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[ByHand]:
    """A launch of one toy cell, in which nothing has run."""
    made = begin(tmp_path, "grid: {defense.alpha: [0.01]}\n", ToyPlanner())
    yield made
    made.leave()


@pytest.fixture
def trials(hand: ByHand) -> Any:
    """The trials of that launch, of two CPUs each."""
    return Trials(hand.driver, ResourceSpec(cpu=2), list)


def nodes_in(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stages that a trial is to compute, as plain data."""
    return [dict(StageCall.from_json(call).node) for call in config["tasks"]]


def names_in(config: dict[str, Any]) -> list[str]:
    """Return the names of the stages that a trial is to compute."""
    return [node["name"] for node in nodes_in(config)]


def answer(config: dict[str, Any], *outcomes: Outcome, **facts: Any) -> dict[str, Any]:
    """Return a trial's result as its worker reports it, for its first stages. facts: of each."""
    ended = zip(nodes_in(config), outcomes, strict=False)
    reports = {node["key"]: Report(how, **facts).to_json() for node, how in ended}
    return {"reports": json.dumps(reports)}


def published(hand: ByHand, *names: str) -> None:
    """Publish results of stages of the only cell, by name."""
    (cell,) = hand.plan.cells.values()
    for name in names:
        hand.publish(cell.stage if name == CELL else cell.stage.inputs[name])


def ends(hand: ByHand) -> list[tuple[str, str]]:
    """Return the ends in the journal: stage and outcome."""
    return [(event["stage"], event["outcome"]) for event in hand.events("end")]


def test_trials_of_tune_are_chains_of_the_drivers_tasks(hand: ByHand, trials: Any) -> None:
    config = trials.suggest("a")
    assert config["held"] == {"cpu": 2, "gpu": 0.0}
    # The only cell needs each of them, and each needs the one before.
    assert names_in(config) == ["rows", "train", "unlearn", "evaluate", CELL]
    trials.started("a")
    assert trials.suggest("b") is None
    published(hand, "rows", "train")
    # What has ended so far is taken in at once, whatever becomes of the rest.
    trials.reported("a", answer(config, Outcome.done, Outcome.done, seconds=1.0) | {"more": True})
    assert ends(hand) == [("rows", "done"), ("train", "done")]
    assert [event["stage"] for event in hand.events("start")] == ["rows", "train", "unlearn"]
    published(hand, "unlearn", "evaluate", CELL)
    trials.ended("a", answer(config, *[Outcome.done] * 5, seconds=1.0))
    # Tune may report an end twice.
    trials.ended("a", answer(config, Outcome.failed, reason="late"))
    trials.gave_up("a", "late")
    trials.started("a")
    assert trials.suggest("b") == FINISHED
    assert [name for name, _ in ends(hand)] == ["rows", "train", "unlearn", "evaluate", CELL]
    assert hand.driver.result().complete
    assert trials.error is None


def test_a_chain_ends_at_its_first_failure(hand: ByHand, trials: Any) -> None:
    config = trials.suggest("a")
    trials.started("a")
    published(hand, "rows")
    key = nodes_in(config)[1]["key"]
    hand.store.fail(key, {"key": key, "stage": "train", "reason": "loss became nan"})
    trials.ended("a", answer(config, Outcome.done, Outcome.failed, reason="loss became nan"))
    assert ends(hand) == [("rows", "done"), ("train", "failed")]
    assert trials.suggest("b") == FINISHED
    (reason,) = hand.driver.result().failed.values()
    assert reason == "stage 'train' failed: loss became nan"


def test_what_a_chain_did_not_get_to_runs_later(hand: ByHand, trials: Any) -> None:
    config = trials.suggest("a")
    trials.started("a")
    published(hand, "rows")
    trials.ended("a", answer(config, Outcome.done, Outcome.memory))
    # It is alone on its device now; what needs it waits for how that ends.
    assert names_in(trials.suggest("b")) == ["train"]
    assert trials.suggest("c") is None


def test_a_chain_whose_workers_die_fails_where_they_died(hand: ByHand, trials: Any) -> None:
    trials.suggest("a")
    trials.started("a")
    published(hand, "rows", "train")  # by the workers, which reported nothing of it
    trials.gave_up("a", "ActorDiedError: killed")
    assert ends(hand) == [("rows", "done"), ("train", "done")]
    # Workers are counted for the whole chain: those that died earlier count for no later stage.
    assert names_in(trials.suggest("b")) == ["unlearn", "evaluate", CELL]
    trials.started("b")
    trials.gave_up("b", "ActorDiedError: killed")
    assert trials.suggest("c") == FINISHED
    assert ends(hand)[2:] == [("unlearn", "failed")]
    (record,) = hand.store.failures()
    assert record["stage"] == "unlearn"
    assert record["reason"] == "gave up after 3 tries: ActorDiedError: killed"
    assert trials.error is None


def test_a_new_worker_of_a_chain_reports_again_what_is_known(hand: ByHand, trials: Any) -> None:
    config = trials.suggest("a")
    trials.started("a")
    published(hand, "rows")
    trials.reported("a", answer(config, Outcome.done, seconds=1.0) | {"more": True})
    trials.started("a")  # by the worker after the one that died
    assert [event["stage"] for event in hand.events("start")] == ["rows", "train", "train"]
    published(hand, "train")
    trials.reported("a", answer(config, Outcome.done, Outcome.done) | {"more": True})
    assert ends(hand) == [("rows", "done"), ("train", "done")]


@pytest.mark.parametrize("end", ["ended", "gave_up"])
def test_a_trial_that_waits_needs_next_to_nothing(hand: ByHand, trials: Any, end: str) -> None:
    (cell,) = hand.plan.cells.values()
    lease = Store(hand.store.location).leases.lease(cell.stage.inputs["rows"].key, "other")
    assert lease.acquire()
    assert trials.suggest("a") == {"tasks": [], "held": {"cpu": 0.001, "gpu": 0.0}}
    assert trials.suggest("b") is None
    trials.started("a")
    lease.release()
    trials.ended("a", {"waited": True}) if end == "ended" else trials.gave_up("a", "killed")
    hand.now += 2
    assert names_in(trials.suggest("b"))[0] == "rows"
    assert not hand.events("end")
    assert not list(hand.store.failures())


@pytest.mark.parametrize(("gpu", "held"), [(0.0, (16, 0.0)), (0.25, (2, 1.0))])
def test_a_stage_that_ran_out_of_memory_has_a_device_of_its_own(
    hand: ByHand, gpu: float, held: tuple[float, float]
) -> None:
    there = [
        {"Alive": True, "Resources": {"CPU": 16.0}},
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": False, "Resources": {"CPU": 99.0}},
    ]
    trials = Trials(hand.driver, ResourceSpec(cpu=2, gpu=gpu), lambda: there)
    config = trials.suggest("a")
    hand.publish(next(iter(hand.plan.cells.values())).stage.inputs["rows"])
    trials.ended("a", answer(config, Outcome.done, Outcome.busy))
    hand.now += 10
    config = trials.suggest("b")
    assert config["held"] == {"cpu": 2, "gpu": gpu}
    trials.ended("b", answer(config, Outcome.memory))
    assert trials.suggest("c")["held"] == dict(zip(("cpu", "gpu"), held, strict=True))


def test_a_stage_alone_on_its_node_asks_for_a_node_that_there_is(hand: ByHand) -> None:
    there = [
        {"Alive": True, "Resources": {"CPU": 64.0}},  # the largest, without a license
        {"Alive": True, "Resources": {"CPU": 8.0, "license": 1.0}},
    ]
    asked = ResourceSpec(cpu=2, custom={"license": 1})
    trials = Trials(hand.driver, asked, lambda: there)
    config = trials.suggest("a")
    trials.ended("a", answer(config, Outcome.memory))
    assert trials.suggest("b")["held"] == {"cpu": 8, "gpu": 0.0, "custom": {"license": 1}}


def test_an_error_between_tune_and_the_driver_stops_the_launch(
    hand: ByHand, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Raised inside Tune it would hang the launch or kill it.
    config = trials.suggest("a")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bad disk")

    monkeypatch.setattr(hand.driver, "_done", broken)
    trials.ended("a", answer(config, Outcome.done))
    assert str(trials.error) == "bad disk"
    assert hand.driver.stopped == "RuntimeError: bad disk"
    assert trials.suggest("b") == FINISHED
    # The first one stands.
    monkeypatch.setattr(hand.driver, "next_task", lambda: 1 / 0)
    assert trials.suggest("c") is None
    assert str(trials.error) == "bad disk"


def test_a_task_that_cannot_be_handed_to_tune_keeps_nothing_waiting(
    hand: ByHand, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr(hand.driver, "call", broken)
    assert trials.suggest("a") is None
    assert hand.driver.stopped == "RuntimeError: no such node"
    assert trials.suggest("a") == FINISHED


def test_a_trial_without_a_report_keeps_nothing_waiting(hand: ByHand, trials: Any) -> None:
    trials.suggest("a")
    trials.ended("a", {})
    assert hand.driver.stopped == "KeyError: 'reports'"
    assert isinstance(trials.error, KeyError)
    assert trials.suggest("b") == FINISHED


def test_a_chain_that_had_progressed_is_tried_again(hand: ByHand, trials: Any) -> None:
    config = trials.suggest("a")
    trials.started("a")
    published(hand, "rows")
    trials.reported("a", answer(config, Outcome.done) | {"more": True})
    trials.gave_up("a", "ActorDiedError: killed")
    assert not list(hand.store.failures())
    assert names_in(trials.suggest("b"))[0] == "train"
    assert trials.error is None


def test_a_chain_that_is_given_up_while_the_store_is_away_keeps_nothing_waiting(
    hand: ByHand, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("no route to the store")

    trials.suggest("a")
    with monkeypatch.context() as patch:
        patch.setattr(hand.store, "is_committed", away)
        patch.setattr(hand.store, "fail", away)
        trials.gave_up("a", "OSError: no route")
    assert "was not recorded: no route to the store" in hand.said
    assert trials.suggest("b") == FINISHED
    assert trials.error is None


def test_the_driver_knows_what_runs_before_a_long_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.run import on_ray

    told: list[tuple[list[str], bool]] = []
    computed: list[str] = []
    clock = iter([0.0, 2.0, 2.0, 3.0, 9.0, 9.0])

    def compute(call: StageCall, launch: Launch) -> Report:
        computed.append(call.node["key"])
        return Report(Outcome.done)

    def report(result: dict[str, Any]) -> None:
        told.append((sorted(json.loads(result["reports"])), "more" in result))

    monkeypatch.setattr(on_ray, "compute_call", compute)
    monkeypatch.setattr(on_ray.tune, "report", report)
    monkeypatch.setattr(on_ray.time, "monotonic", lambda: next(clock))
    # 2 s for a, which is told before b, since b has rows to compute; c and d have none. At c a
    # second has passed since, at d seven.
    units = {"a": 0, "b": 5, "c": 0, "d": 0}
    calls = [StageCall({"key": key, "units": rows}).to_json() for key, rows in units.items()]
    on_ray.compute_stage({"tasks": calls}, Launch("L", "store", "runs", "tiny", None))
    assert computed == ["a", "b", "c", "d"]
    assert told == [(["a"], True), (["a", "b", "c"], True), (["a", "b", "c", "d"], False)]


def test_a_trial_that_reports_too_little_keeps_nothing_waiting(hand: ByHand, trials: Any) -> None:
    config = trials.suggest("a")
    published(hand, "rows")
    trials.ended("a", answer(config, Outcome.done))
    assert hand.driver.stopped == "RuntimeError: a worker said nothing of stage 'train'."
    assert trials.suggest("b") == FINISHED


# Nodes -----------------------------------------------------------------------------------------


def node(cpu: float, gpu: float | None = None) -> dict[str, Any]:
    return {"Resources": {"CPU": cpu, **({} if gpu is None else {"GPU": gpu})}}


@pytest.mark.parametrize(
    ("there", "asked", "count"),
    [
        ([node(2)], {}, 2),
        ([node(4), node(3)], {"cpu": 2}, 3),
        ([node(8, 1)], {"gpu": 0.25}, 4),
        ([node(0), node(2)], {}, 2),  # a head that runs nothing
        # Where the stages of a cell need less, more of them run.
        ([node(4)], {"cpu": 4, "cell_cpu": 1}, 4),
        ([node(3)], {"cpu": 0.3}, 10),  # 3 / 0.3 is 9.999... or 10.000...
    ],
)
def test_slots_are_the_stages_that_fit_at_once(
    there: list[dict[str, Any]], asked: dict[str, float], count: int
) -> None:
    assert nodes.slots(there, ResourceSpec(**asked)) == count


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"cpu": 5}, "cpu=5 gpu=0"), ({"gpu": 1}, "cpu=1 gpu=1"), ({"cell_cpu": 5}, "cpu=5 gpu=0")],
)
def test_resources_that_no_node_has_are_refused(asked: dict[str, float], named: str) -> None:
    there = r"nodes: 4 CPU / 0 GPU; 2 CPU / 0\.5 GPU"
    with pytest.raises(UserError, match=rf"no node can run .* {named} \({there}\); lower"):
        nodes.slots([node(4), node(2, 0.5)], ResourceSpec(**asked))


LABELED = [
    {**node(8, 1), "NodeManagerHostname": "big",
     "Labels": {"ray.io/accelerator-type": "A100", "region": "eu"}},
    {**node(4), "NodeManagerHostname": "small", "Labels": {"ray.io/node-id": "x"}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        ({}, 12),
        ({"ray.io/accelerator-type": "A100"}, 8),
        ({"ray.io/accelerator-type": "in(H100, A100)", "region": "eu"}, 8),
        ({"region": "!eu"}, 4),  # a node without the label too, as Ray has it
        ({"region": "!in(us, eu)"}, 4),
        ({"region": "!us"}, 12),
    ],
)
def test_only_nodes_with_the_labels_hold_stages(labels: dict[str, str], count: int) -> None:
    assert nodes.slots(LABELED, ResourceSpec(labels=labels)) == count


def test_a_label_or_a_resource_that_no_node_has_is_refused() -> None:
    asked = ResourceSpec(labels={"region": "us"}, custom={"license": 1})
    there = (
        r"nodes: 8 CPU / 1 GPU, ray\.io/accelerator-type=A100, region=eu; 4 CPU / 0 GPU\); lower"
    )
    with pytest.raises(UserError, match=rf"license=1 label region=us \({there}"):
        nodes.slots(LABELED, asked)
    owner = {"Resources": {"CPU": 4.0, "license": 3.0, "node:10.0.0.1": 1.0, "memory": 1e9}}
    # 3 licenses for 4 CPUs
    assert nodes.slots([owner], ResourceSpec(custom={"license": 1})) == 3
    with pytest.raises(UserError, match=r"nodes: 4 CPU / 0 GPU, 3 license\)"):
        nodes.slots([owner], ResourceSpec(custom={"license": 4}))


def test_a_plan_says_which_nodes_can_hold_what() -> None:
    asked = ResourceSpec(cpu=2, cell_cpu=1, labels={"region": "eu"})
    assert nodes.node_lines(LABELED, asked) == [
        "node big (8 CPU / 1 GPU, ray.io/accelerator-type=A100, region=eu) holds 4 stages at once, "
        "or 8 of a single cell.",
        "node small (4 CPU / 0 GPU) holds no stage: it lacks label region=eu.",
    ]
    assert nodes.node_lines(LABELED[1:], ResourceSpec(gpu=0.5, custom={"license": 2})) == [
        "node small (4 CPU / 0 GPU) holds no stage: it lacks 0.5 GPU, 2 license."
    ]
    # Stages of a single cell run there.
    assert nodes.node_lines(LABELED[1:], ResourceSpec(gpu=1, cell_gpu=0)) == [
        "node small (4 CPU / 0 GPU) holds 0 stages at once, or 4 of a single cell (it lacks 1 GPU)."
    ]


def test_an_address_of_ipv6_is_reached() -> None:
    from orchestrator.run.outage import answers

    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert answers(f"[::1]:{server.getsockname()[1]}")


def test_a_trial_asks_ray_for_labels_and_own_resources(hand: ByHand) -> None:
    from ray.tune import PlacementGroupFactory

    from orchestrator.run import on_ray

    labels, custom = {"region": "in(eu, us)"}, {"license": 2.0}
    trials = Trials(hand.driver, ResourceSpec(labels=labels, custom=custom), list)
    config = trials.suggest("a")
    assert config["held"] == {"cpu": 1, "gpu": 0.0, "labels": labels, "custom": custom}
    assert on_ray._resources(config) == PlacementGroupFactory(
        [{"CPU": 1.0, "license": 2.0}], bundle_label_selector=[labels]
    )
    assert on_ray._resources({"held": {"cpu": 1, "gpu": 0.5}}) == PlacementGroupFactory(
        [{"CPU": 1.0, "GPU": 0.5}]
    )


def test_workers_of_a_cluster_get_the_variables_that_act_on_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("BTU_CACHE", "cache")
    monkeypatch.setenv("SECRET_OF_ANOTHER_PROGRAM", "x")
    passed, inherited = nodes.passed_environment(), nodes.local_environment()
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "BTU_CACHE", "SECRET_OF_ANOTHER_PROGRAM"):
        monkeypatch.delenv(name)
    inherited.enter()
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    # Workers start in folders of their own.
    assert os.environ["BTU_CACHE"] == str(tmp_path / "cache")
    passed.enter()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert os.environ["BTU_CACHE"] == str(tmp_path / "cache")
    assert "SECRET_OF_ANOTHER_PROGRAM" not in os.environ


def test_a_worker_asks_the_endpoint_that_fsspecs_variables_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its Ray has imported fsspec by then, which reads the variables only at that time."""
    import fsspec.config

    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://store:9000")
    passed = nodes.passed_environment()
    monkeypatch.delenv("FSSPEC_S3_ENDPOINT_URL")
    assert fsspec.config.conf == {}
    passed.enter()
    assert os.environ["FSSPEC_S3_ENDPOINT_URL"] == "http://store:9000"
    assert fsspec.config.conf == {"s3": {"endpoint_url": "http://store:9000"}}


def test_a_worker_has_its_variables_before_it_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator.run import on_ray

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    launch = Launch("L", "store", "runs", "tiny", None, nodes.passed_environment())
    monkeypatch.delenv("HF_TOKEN")
    seen: list[str | None] = []

    def compute(*_: object) -> Report:
        seen.append(os.environ.get("HF_TOKEN"))
        return Report(Outcome.done)

    monkeypatch.setattr(on_ray, "compute_call", compute)
    monkeypatch.setattr(on_ray.tune, "report", lambda _: None)
    # It travels: Ray pickles it.
    on_ray.compute_stage(
        {"tasks": [StageCall({"key": "k", "units": 1}).to_json()]},
        pickle.loads(pickle.dumps(launch)),
    )
    assert seen == ["hf_secret"]


def test_a_node_is_asked_with_the_variables_of_the_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.run import on_ray

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_secret")
    environment = nodes.passed_environment()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(on_ray, "probe", lambda *ask: os.environ["AWS_SECRET_ACCESS_KEY"])
    assert on_ray._probe(environment, "s3://bucket", "probes/x", "n1", "token") == "aws_secret"


def test_a_launch_has_no_text_of_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tracking = {"uri": "http://me:pw_secret@host:5000", "id": "7"}
    launch = Launch("L", "store", "runs", "tiny", tracking, nodes.passed_environment())
    for text in (repr(launch), str(launch), f"{launch}", repr([launch.environment])):
        assert "secret" not in text
    assert "sweep='tiny'" in repr(launch)


# What a local Ray has of its own ---------------------------------------------------------------


def test_a_local_ray_has_a_private_folder_for_a_while() -> None:
    with local.ray_folder() as folder:
        folder.mkdir()
        folder.chmod(0o777)  # as Ray does
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        # Ray refuses longer ones: AF_UNIX allows 107 bytes on Linux.
        assert len(str(folder) + local.SOCKET) <= local.SOCKET_BYTES
        kept = folder.parent
    assert not kept.exists()


def test_folders_of_a_killed_launch_are_told_from_those_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(local, "_places", lambda: [str(tmp_path)])
    hold = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from orchestrator.run import local\n"
        "local._places, local.MOST_BYTES = lambda: [sys.argv[1]], 1000\n"
        "with local.tune_folder(), local.ray_folder():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    # A folder without a lock may be just being made, or somebody else's.
    (tmp_path / "btu-tune-strange").mkdir()
    with local.tune_folder() as own:
        assert local.dead_folders() == []
        other.kill()
        other.wait(60)
        other.stdout.close()
        dead = local.dead_folders()
        assert [path.name[:8] for path in dead] == ["btu-ray-", "btu-tune"]
        for path in dead:
            local.remove_dead_folder(path)
        assert sorted(tmp_path.iterdir()) == sorted([own, tmp_path / "btu-tune-strange"])
    assert not own.exists()


@pytest.mark.parametrize("named", [True, False])
def test_what_ray_prints_goes_to_a_file_that_stays_if_it_was_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], named: bool
) -> None:
    path = tmp_path / "ray.log"
    with local.stderr_to(path) as diverted:
        assert diverted.empty
        os.write(2, b"state dump\n")  # as C++ does
        assert not diverted.empty
        if named:
            assert diverted.words() == f"What Ray says: {path}."
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"
    assert path.exists() == named
    assert not named or path.read_text() == "state dump\n"


def test_what_a_gone_ray_prints_stays_out_of_the_terminal(tmp_path: Path) -> None:
    """In a process of its own: it ends with its standard error in the file."""
    path = tmp_path / "ray.log"
    code = (
        "import os, sys; from pathlib import Path; from orchestrator.run import local\n"
        "with local.stderr_to(Path(sys.argv[1])) as diverted:\n"
        "    diverted.words()\n"
        "    diverted.stays = True\n"
        "os.write(2, b'a trace of C++')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    assert (done.stderr, path.read_bytes()) == (b"", b"a trace of C++")


@pytest.mark.parametrize("length", [65, 200])
def test_a_long_temporary_folder_does_without_rays_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int
) -> None:
    long = tmp_path / ("x" * (length - len(str(tmp_path)) - 1) or "x")
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with local.ray_folder() as folder:
        assert folder.parent.parent == Path("/tmp")
    # Where /tmp cannot be used either, the way out is named.
    monkeypatch.setattr(local, "MOST_BYTES", 3)
    expected = rf"Ray cannot put its sockets into {long} or /tmp: .* 3 bytes.* Set TMPDIR"
    with pytest.raises(UserError, match=expected), local.ray_folder():
        pass


def test_a_local_ray_has_a_token_in_its_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with local.ray_token():
        token = os.environ["RAY_AUTH_TOKEN"]
        assert len(token) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ
    # That of a cluster comes back. Ray keeps the first one that it reads.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-a-cluster")
    with local.ray_token():
        assert os.environ["RAY_AUTH_TOKEN"] == token
    assert os.environ["RAY_AUTH_TOKEN"] == "of-a-cluster"


def test_an_address_that_does_not_answer_is_refused(free_port: int) -> None:
    with pytest.raises(UserError, match=rf"Ray cluster 127\.0\.0\.1:{free_port} cannot be reached"):
        nodes.check_answers(f"127.0.0.1:{free_port}")
    with pytest.raises(UserError, match="is Ray Client, which sweeps do not use"):
        nodes.check_answers("ray://127.0.0.1:10001")
    # Without a port there is nothing to ask.
    for address in (None, "auto", "local"):
        nodes.check_answers(address)


def test_a_node_takes_part_that_sees_the_store_and_runs_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    store.storage.write("probes/x/driver", b"token")
    ask = (store.location, "probes/x", "n1", "token")
    assert nodes.probe(*ask) == ""
    assert nodes.unseen(store.storage, "probes/x/n1") == ""
    assert "is not seen here" in nodes.unseen(store.storage, "probes/x/n2")
    store.storage.write("probes/x/n3", b"0.0.0")
    told = f"it runs code 0.0.0, the driver {code_version()}"
    assert nodes.unseen(store.storage, "probes/x/n3") == told
    # A folder of the same name, but not the same one; none at all; one that cannot be written.
    assert "it sees another folder" in nodes.probe(*ask[:3], "another")
    assert nodes.probe(str(tmp_path / "none"), *ask[1:]) == f"it does not see {tmp_path / 'none'}"
    monkeypatch.setattr(type(store.storage), "write", full)
    assert nodes.probe(*ask).startswith(f"it cannot write to {store.location} ([Errno 30]")


def full(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")
