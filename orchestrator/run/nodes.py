"""The nodes that a launch runs on: whether they can take part, and what is passed on to them."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btu.errors import UserError
from btu.provenance import code_version
from orchestrator.store.storage import Storage
from orchestrator.store.store import Store
from orchestrator.sweep.labels import selects
from orchestrator.sweep.sections import OWN_RESOURCES, ResourceSpec

# Environment variables that affect a trial; a remote worker inherits none of the driver's.
PASSED_PREFIXES = ("MLFLOW_", "HF_", "BTU_", "AWS_", "FSSPEC_", "TRANSFORMERS_")
# Those that Ray reads before a trial starts. They are no secrets, and stand in command lines.
RAY_PREFIX = "RAY_ACCEL_"
# Of stages, by what they occupy. Those of kind "host" never need more than a "stage".
KINDS = ("stage", "cell")


class Environment:
    """Variables for a worker's process. Many are secrets: its text does not contain them.

    It travels as an argument of a trial. Ray's own way, `runtime_env`, writes variables into a
    command line and into a log that every user of the node may read.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = dict(variables or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._variables)} variables)"

    def enter(self) -> None:
        """Set the variables in this process, before the libraries that read them are imported."""
        os.environ.update(self._variables)
        if any(name.startswith("FSSPEC_") for name in self._variables):
            # Ray has imported fsspec by now, which reads its variables only then.
            config: Any = importlib.import_module("fsspec.config")
            config.set_conf_env(config.conf, self._variables)


def passed_environment() -> Environment:
    """Return what workers of a cluster get from this process."""
    own = {k: v for k, v in os.environ.items() if k.startswith(PASSED_PREFIXES)}
    return Environment({**own, **_cache()})


def local_environment() -> Environment:
    """Return what workers on this machine do not inherit."""
    return Environment(_cache())


def _cache() -> dict[str, str]:
    cache = os.environ.get("BTU_CACHE")
    # Workers start in folders of their own.
    return {"BTU_CACHE": str(Path(cache).expanduser().resolve())} if cache else {}


def ray_settings() -> dict[str, str]:
    """Return the variables that Ray itself has to know on every node."""
    return {k: v for k, v in os.environ.items() if k.startswith(RAY_PREFIX)}


def reach(address: str, seconds: float) -> None:
    """Connect once to HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        OSError: nothing accepts the connection in time.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


def check_answers(address: str | None) -> None:
    """Raise a `UserError` where nothing listens at HOST:PORT: ray itself tries for minutes."""
    if address is not None and address.startswith("ray://"):
        raise UserError(
            f"--address {address} is Ray Client, which sweeps do not use; run btu launch on a node "
            "of the cluster with --address auto."
        )
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        reach(f"{host}:{port}", 5)
    except OSError as error:
        raise UserError(
            f"Ray cluster {address} cannot be reached: {error}. Check --address, or leave it out "
            "for a local run."
        ) from error


def slots(nodes: Sequence[Mapping[str, Any]], resources: ResourceSpec) -> int:
    """Return how many stages run at once.

    Raises:
        UserError: no node has the resources and labels of one.
    """
    for kind in KINDS:
        if not any(holds(node, resources, kind) for node in nodes):
            raise UserError(
                f"no node can run a stage with {_asked(resources, kind)} (nodes: "
                f"{'; '.join(map(_has, nodes))}); lower resources, or use --address."
            )
    return max(1, sum(max(holds(node, resources, kind) for kind in KINDS) for node in nodes))


def node_lines(nodes: Sequence[Mapping[str, Any]], resources: ResourceSpec) -> list[str]:
    """Return a line for each node: what it has, and how many stages it holds at once."""
    lines = []
    for node in nodes:
        counts = {kind: holds(node, resources, kind) for kind in KINDS}
        shared, own = counts.values()
        missing = "" if all(counts.values()) else f"it lacks {', '.join(_missing(node, resources))}"
        if not any(counts.values()):
            what = f"holds no stage: {missing}"
        else:
            what = f"holds {shared} stage{'' if shared == 1 else 's'} at once"
            what += "" if shared == own else f", or {own} of a single cell"
            what += f" ({missing})" if missing else ""
        lines.append(f"node {node.get('NodeManagerHostname', '?')} ({_has(node)}) {what}.")
    return lines


def _matches(node: Mapping[str, Any], resources: ResourceSpec) -> bool:
    """Return whether a node has the labels that stages ask for."""
    has = node.get("Labels") or {}
    return all(selects(selector, has.get(key)) for key, selector in resources.labels.items())


def _demand(resources: ResourceSpec, kind: str) -> dict[str, float]:
    """Return what a stage occupies, by Ray's name of the resource."""
    cpu, gpu = resources.of(kind)
    return {"CPU": cpu, **({"GPU": gpu} if gpu > 0 else {}), **resources.custom}


def holds(node: Mapping[str, Any], resources: ResourceSpec, kind: str) -> int:
    """Return how many stages of a kind fit on a node."""
    if not _matches(node, resources):
        return 0
    has = node["Resources"]
    fits = min(has.get(name, 0) / amount for name, amount in _demand(resources, kind).items())
    return int(fits + 1e-9)


def _missing(node: Mapping[str, Any], resources: ResourceSpec) -> list[str]:
    """Return what keeps a node from holding the stages of a sweep."""
    has, labels = node["Resources"], node.get("Labels") or {}
    missing = [
        f"label {key}={selector}"
        for key, selector in resources.labels.items()
        if not selects(selector, labels.get(key))
    ]
    most: dict[str, float] = {}
    for kind in KINDS:
        for name, amount in _demand(resources, kind).items():
            most[name] = max(amount, most.get(name, 0.0))
    return missing + [f"{n:g} {name}" for name, n in most.items() if has.get(name, 0) < n]


def _asked(resources: ResourceSpec, kind: str) -> str:
    cpu, gpu = resources.of(kind)
    parts = [f"resources cpu={cpu:g} gpu={gpu:g}"]
    parts += [f"{name}={amount:g}" for name, amount in resources.custom.items()]
    parts += [f"label {key}={selector}" for key, selector in resources.labels.items()]
    return " ".join(parts)


def _has(node: Mapping[str, Any]) -> str:
    """Return what a node has, in the words of `ResourceSpec`."""
    has = node["Resources"]
    parts = [f"{has.get('CPU', 0):g} CPU / {has.get('GPU', 0):g} GPU"]
    parts += [
        f"{amount:g} {name}"
        for name, amount in sorted(has.items())
        # Ray adds some of its own: an address, a type of accelerator.
        if name.lower() not in OWN_RESOURCES and not name.startswith(("node:", "accelerator_type:"))
    ]
    parts += [
        f"{key}={value}"
        for key, value in sorted((node.get("Labels") or {}).items())
        if key != "ray.io/node-id"
    ]
    return ", ".join(parts)


def probe(location: str, folder: str, node: str, token: str) -> str:
    """Return what keeps this node from taking part, empty if nothing does.

    location: of the store.
    folder: in the store, where the driver and the nodes write for each other.
    node: id of this node.
    token: what the driver wrote.
    """
    try:
        storage = Store(location).storage
        if storage.read(f"{folder}/driver").decode() != token:
            return f"at {location} it sees another folder"
        storage.write(f"{folder}/{node}", code_version().encode())
    except FileNotFoundError:
        return f"it does not see {location}"
    except Exception as error:  # each client of an object store has its own
        return f"it cannot write to {location} ({error})"
    return ""


def unseen(storage: Storage, path: str) -> str:
    """Return what is wrong with the version that a node wrote, empty if nothing is."""
    try:
        written = storage.read(path).decode()
    except FileNotFoundError:
        return "what it writes there is not seen here"
    if written != code_version():
        return f"it runs code {written}, the driver {code_version()}"
    return ""
