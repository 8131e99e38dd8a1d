"""Leases on keys, registrations of launches, and whether their processes are alive.

::

    leases/<key>.json, <key>.beat a process is computing this key
    launches/<id>.json, <id>.beat the keys that a running launch needs

Both only avoid duplicate work. Losing one is harmless, so neither is flushed to disk.

A heartbeat writes the second file and reads nothing: only who takes a lease writes the first, so a
process that lost its lease without knowing it cannot take it back by a heartbeat.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from btu.errors import UserError
from orchestrator.store import places
from orchestrator.store.primitives import Storage
from orchestrator.store.typed import Check, is_count, is_text, parse_object

HEARTBEAT_S = 5.0
# A lease unchanged for this long has expired.
TTL_S = 30.0
# How often the holder of a lease looks whether it still has it.
LOOK_S = TTL_S / 2
# Unfinished files of this age are abandoned. Clocks of machines differ by less.
LEFTOVER_S = 3600.0


class Holder(NamedTuple):
    """The process that holds a lease or runs a launch.

    name: the key, or the launch's id.
    facts: the content of its file: owner, host, pid.
    alive: whether the process is alive; None if that cannot be seen from this machine.
    silent: seconds since its last heartbeat by file times; None if they are unknown.
    """

    name: str
    facts: Mapping[str, Any]
    alive: bool | None
    silent: float | None

    @property
    def lost(self) -> bool:
        """Whether the process is gone; if that cannot be seen, whether its heartbeat expired."""
        if self.alive is None:
            return self.silent is not None and self.silent >= TTL_S
        return not self.alive


def peek(storage: Storage, path: str) -> bytes | None:
    """Return the content of a file; None if there is no such file.

    A symbolic link, a folder or a pipe of this name is like a file that is cut short: empty.

    Raises:
        UserError: this user may not read it.
    """
    try:
        return storage.read(path)
    except FileNotFoundError:
        return None
    except (places.Outside, IsADirectoryError):
        return b""
    except PermissionError as error:
        raise UserError(
            f"{storage.location}/{path} cannot be read ({error.strerror}); its owner can let you, "
            "with `chmod -R g+rX` on the store, or use another output folder."
        ) from error


class Leases:
    """The leases and running launches of one store.

    storage: the store's files.
    clock: returns monotonic seconds.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self.storage = storage
        self.clock = clock
        # The content of each heartbeat file, and when this process first saw it.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def lease(self, key: str, owner: str) -> Lease:
        """Return a lease that is not acquired yet. owner: names the launch."""
        return Lease(self, key, owner)

    def held_by_other(self, key: str, owner: str) -> bool:
        """Return whether another owner holds a live lease on a key. Takes nothing."""
        path = places.lease(key)
        data = peek(self.storage, path)
        if data is None:
            self._seen.pop(path, None)
            return False
        return not self.is_free(path, data, owner)

    def is_wanted(self, key: str, *, but: str) -> bool:
        """Return whether a live lease or launch needs a key. but: the id of a launch to leave out.

        Like `in_use` for one key, with two requests where no other launch runs.
        """
        files = [name for name in self.storage.names(places.LAUNCHES) if name.endswith(places.JSON)]
        if any(name.removesuffix(places.JSON) != but for name in files):
            return key in self.in_use(but=but)
        return self.held_by_other(key, but)

    def register_launch(self, launch_id: str, sweep_name: str, keys: Iterable[str]) -> None:
        """Record that a launch is running and needs `keys`."""
        facts = _holder(launch_id) | {"sweep": sweep_name, "keys": sorted(keys)}
        self.storage.write(places.launch(launch_id), json.dumps(facts).encode(), durable=False)

    def heartbeat_launch(self, launch_id: str) -> None:
        """Record that a launch still runs; call every HEARTBEAT_S. Storage errors propagate."""
        beat = uuid.uuid4().hex.encode()
        self.storage.write(places.beat(launch_id), beat, durable=False)

    def release_launch(self, launch_id: str) -> None:
        """Record that a launch has ended."""
        self.storage.remove_files(places.launch(launch_id), places.beat(launch_id))

    def held(self, now: float | None = None) -> dict[str, dict[str, Any]]:
        """Return the content of each live lease by key. now: Unix time in seconds."""
        return {Path(path).stem: facts for path, facts in self.live(places.LEASES, now).items()}

    def leased(self) -> set[str]:
        """Return the keys that have a lease, live or expired, from one listing."""
        # Not `names`: of a folder that is empty, a listing of its files is cheaper.
        files = (found.path.rpartition("/")[2] for found in self.storage.walk(places.LEASES))
        return set(filter(None, map(places.key_of, files)))

    def in_use(self, now: float | None = None, *, but: str = "") -> set[str]:
        """Return the keys of live launches and of live leases.

        Those of another machine count as live until TTL_S after this object first saw them, or
        LEFTOVER_S after their last change.

        now: Unix time in seconds; None is the present.
        but: the id of a launch to leave out.
        """
        found = self.live(places.LAUNCHES, now).values()
        launches = [facts for facts in found if facts.get("owner") != but]
        keys = {key for facts in launches for key in facts.get("keys", ())}
        return keys | {k for k, facts in self.held(now).items() if facts.get("owner") != but}

    def live(self, folder: str, now: float | None = None) -> dict[str, dict[str, Any]]:
        """Return the content of live files in ``leases`` or ``launches``, by path."""
        now = time.time() if now is None else now
        modified = {found.path: found.modified for found in self.storage.walk(folder)}
        live = {}
        for path, data, beat in self._holding(modified):
            times = [modified[path], modified.get(places.beat_of(path))]
            age = now - max((t for t in times if t is not None), default=now)
            stale = self.is_stale(path, data + beat, None, data)
            facts = _facts_of(data)
            alive = _is_alive(facts)
            if alive or (alive is None and not stale and age <= LEFTOVER_S):
                beaten = _facts_of(beat)
                if "token" in facts and beaten.get("token") == facts["token"]:
                    facts["beat"] = beaten.get("beat", 0)
                live[path] = facts
        return live

    def _holding(self, listed: Collection[str]) -> list[tuple[str, bytes, bytes]]:
        """Return path, content and heartbeat of leases or launches. listed: paths of all files."""
        paths = [path for path in listed if places.is_holder(path)]
        beats = [beat for path in paths if (beat := places.beat_of(path)) in listed]
        read = [*paths, *beats]
        # In one go: each costs a round trip on an object store.
        found = dict(
            zip(read, self.storage.map(lambda path: peek(self.storage, path), read), strict=True)
        )
        return [
            (path, data, found.get(places.beat_of(path)) or b"")
            for path in paths
            if (data := found[path]) is not None  # otherwise it was released meanwhile
        ]

    def holders(self, folder: str, now: float | None = None) -> list[Holder]:
        """Return all holders in ``leases`` or ``launches``, dead ones too, sorted by name."""
        now = time.time() if now is None else now
        modified = {found.path: found.modified for found in self.storage.walk(folder)}
        found = []
        for path, data, _ in sorted(self._holding(modified)):
            times = [modified[path], modified.get(places.beat_of(path))]
            last = max((t for t in times if t is not None), default=None)
            silent = None if last is None else max(0.0, now - last)
            facts = _facts_of(data)
            found.append(Holder(Path(path).stem, facts, _is_alive(facts), silent))
        return found

    def is_free(self, path: str, data: bytes, owner: str) -> bool:
        """Return whether a lease has expired, or was an earlier one of `owner`. data: its file."""
        beat = peek(self.storage, places.beat_of(path)) or b""
        return self.is_stale(path, data + beat, owner, data)

    def is_stale(
        self, path: str, content: bytes, owner: str | None, facts: bytes | None = None
    ) -> bool:
        """Return whether a lease or launch has expired.

        path: of its file.
        content: of its file, with that of the heartbeat.
        owner: whose own files count as expired; None if no owner's do.
        facts: the part of `content` that names the holder; None is all of it.
        """
        holder = _facts_of(content if facts is None else facts)
        # The same owner: an earlier attempt, which the owner knows to be dead.
        if owner is not None and holder.get("owner") == owner:
            return True
        if _is_alive(holder) is False:
            return True
        # Clocks of machines are not compared: this measures our time since the content changed.
        seen = self._seen.get(path)
        if seen is None or seen[0] != content:
            self._seen[path] = (content, self.clock())
            return False
        return self.clock() - seen[1] >= TTL_S


class Lease:
    """The right to compute one key, kept alive by a heartbeat. Leaving the context releases it."""

    def __init__(self, leases: Leases, key: str, owner: str) -> None:
        self.key, self.owner, self.token = key, owner, uuid.uuid4().hex
        self._leases = leases
        self._storage = leases.storage
        self._path = places.lease(key)
        self._beats = 0
        self._looked = 0.0  # when it was last known to be ours
        self._replaced = False  # another process's lease, whose heartbeat may be there still
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> bool:
        """Take the lease if it is free or expired, and start the heartbeat. Does not wait."""
        if self._thread is None or not self._thread.is_alive():
            if not self._take():
                return False
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"lease {self.key}")
            self._thread.start()
        return True

    def beat(self) -> bool:
        """Write the heartbeat once. Return whether this process still holds the lease.

        It looks every LOOK_S seconds only: a lease that was lost less long ago counts as held.
        """
        now = self._leases.clock()
        if now - self._looked >= LOOK_S:
            if not self._is_ours():
                return False
            self._looked = now
        self._beats += 1
        content = json.dumps({"token": self.token, "beat": self._beats}).encode()
        self._storage.write(places.beat_of(self._path), content, durable=False)
        return True

    def release(self) -> None:
        """Stop the heartbeat, and remove the lease if this process still holds it."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(timeout=HEARTBEAT_S)
        self._thread = None
        # A lease that cannot be removed expires.
        with suppress(Exception):
            if self._is_ours():
                beaten = self._beats or self._replaced
                beat = [places.beat_of(self._path)] if beaten else []
                self._storage.remove_files(self._path, *beat)

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            # A full disk or a lost connection may be temporary, and must not stop the computation.
            with suppress(Exception):
                if not self.beat():
                    return

    def _take(self) -> bool:
        leases, storage, content = self._leases, self._storage, self._content()
        self._looked = leases.clock()
        self._replaced = False
        if storage.create(self._path, content, durable=False):
            # Where creating may not be exclusive, the last writer wins.
            return storage.exclusive or self._is_ours()
        held = peek(storage, self._path)
        if held is None or not leases.is_free(self._path, held, self.owner):
            return False
        # Only the holder of the guard may replace a lease, and only the expired one that it read:
        # otherwise the second of two processes would replace the first one's new lease.
        guard = places.guard(self._path)
        if not storage.create(guard, content, durable=False):
            guarding = peek(storage, guard)
            if guarding is not None and leases.is_stale(guard, guarding, self.owner):
                storage.remove_files(guard)
            return False
        try:
            # It may have changed hands meanwhile, or its holder may be back.
            if peek(storage, self._path) != held or not leases.is_free(
                self._path, held, self.owner
            ):
                return False
            storage.write(self._path, content, durable=False)
            self._replaced = True
        finally:
            storage.remove_files(guard)
        return self._is_ours()

    def _is_ours(self) -> bool:
        data = peek(self._storage, self._path)
        return data is not None and _facts_of(data).get("token") == self.token

    def _content(self) -> bytes:
        facts = _holder(self.owner) | {"token": self.token, "beat": 0}
        return json.dumps(facts).encode()


def _is_pid(value: Any) -> bool:
    return is_count(value) and 0 < value < 2**31


def _are_keys(value: Any) -> bool:
    return isinstance(value, list) and all(map(places.is_key, value))


def _is_word(value: Any) -> bool:
    return is_text(value) and value.isprintable()


# What the files of leases and launches contain.
_FACTS: dict[str, Check] = {
    **dict.fromkeys(("owner", "host", "boot", "numbering", "token", "sweep"), _is_word),
    "started": lambda value: value is None or _is_word(value),
    "pid": _is_pid,
    "beat": is_count,
    "keys": _are_keys,
}


def _facts_of(data: bytes) -> dict[str, Any]:
    """Return the content of a lease or a launch, without what has another type.

    Empty if it is not a complete JSON object.
    """
    try:
        found = parse_object(data)
    except ValueError:
        return {}
    return {name: found[name] for name in _FACTS.keys() & found.keys() if _FACTS[name](found[name])}


def _holder(owner: str) -> dict[str, Any]:
    pid = os.getpid()
    return {"owner": owner, **_machine(), "pid": pid, "started": _started(pid)}


@cache
def _machine() -> dict[str, str]:
    """Return what makes a process id unique: host, boot and PID namespace."""
    boot = numbering = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbering = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "numbering": numbering}


def _started(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it is not alive.

    Empty if the system does not report it.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it belongs to another user
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie has ended but was not reaped. Fields 3 and 22 of proc(5).
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(holder: Mapping[str, Any]) -> bool | None:
    """Return whether a lease's process is alive; None if this machine cannot see it."""
    pid, machine = holder.get("pid"), _machine()
    if not isinstance(pid, int) or pid <= 0 or any(holder.get(k) != machine[k] for k in machine):
        return None
    started = _started(pid)
    if started is None:
        return False
    return None if not started or not holder.get("started") else started == holder["started"]
