"""Who makes what: leases on keys, registrations of launches, and whether their process lives.

::

    leases/<key>.json             somebody is making it
    launches/<id>.json, <id>.beat what running launches need

Both only save work: losing one is harmless, so none is flushed to disk.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from orchestrator.store.storage import Storage

HEARTBEAT_S = 5.0
# A lease whose content has not changed for so long is nobody's any more.
TTL_S = 30.0
# Unfinished files of this age are nobody's any more. Clocks of machines differ by less.
LEFTOVER_S = 3600.0


class Holder(NamedTuple):
    """Who says to make a key, or to run a launch.

    name: the key or the launch's id. alive: whether its process lives, None if that cannot be seen
    from here. silent: seconds since its last heartbeat by the times of its files, None where they
    are not known.
    """

    name: str
    facts: Mapping[str, Any]
    alive: bool | None
    silent: float | None

    @property
    def lost(self) -> bool:
        """Whether its process is gone, or has been silent for too long where none can look."""
        if self.alive is None:
            return self.silent is not None and self.silent >= TTL_S
        return not self.alive


class Leases:
    """The leases and running launches of one store.

    clock: monotonic seconds.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self.storage = storage
        self._clock = clock
        # When this process first saw the content that a heartbeat file has.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def lease(self, key: str, owner: str) -> Lease:
        """Return a lease, not acquired yet. `owner` names the launch and the work."""
        return Lease(self, key, owner)

    def held_by_other(self, key: str, owner: str) -> bool:
        """Return whether somebody else is making a key; looks only."""
        path = f"leases/{key}.json"
        data = self._peek(path)
        if data is None:
            self._seen.pop(path, None)
            return False
        return not self._is_stale(path, data, owner)

    def register_launch(self, launch_id: str, sweep_name: str, keys: Iterable[str]) -> None:
        """Say that a launch runs and needs `keys`."""
        facts = _holder(launch_id) | {"sweep": sweep_name, "keys": sorted(keys)}
        path = f"launches/{launch_id}.json"
        self.storage.write(path, json.dumps(facts).encode(), durable=False)

    def heartbeat_launch(self, launch_id: str) -> None:
        """Say that it still runs, every HEARTBEAT_S. Errors of the storage escape."""
        beat = uuid.uuid4().hex.encode()
        self.storage.write(f"launches/{launch_id}.beat", beat, durable=False)

    def release_launch(self, launch_id: str) -> None:
        """Say that it has ended."""
        self.storage.remove(f"launches/{launch_id}.json")
        self.storage.remove(f"launches/{launch_id}.beat")

    def leases(self, now: float | None = None) -> dict[str, dict[str, Any]]:
        """Return owner, host and the rest of each live lease by key. now: Unix time in s."""
        return {Path(path).stem: facts for path, facts in self.live("leases", now).items()}

    def leased(self) -> set[str]:
        """Return the keys that have a lease, live or stale, from one listing."""
        names = self.storage.names("leases")
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def in_use(self, now: float | None = None, *, but: str = "") -> set[str]:
        """Return the keys of live launches and of live leases. but: a launch to leave out.

        In doubt they are live: those of another machine until TTL_S after this object first saw
        them, or LEFTOVER_S after their last change.
        """
        found = self.live("launches", now).values()
        launches = [facts for facts in found if facts.get("owner") != but]
        keys = {key for facts in launches for key in facts.get("keys", ())}
        return keys | {k for k, facts in self.leases(now).items() if facts.get("owner") != but}

    def live(self, folder: str, now: float | None = None) -> dict[str, dict[str, Any]]:
        """Return what live holders say in ``leases`` or ``launches``, by path."""
        now = time.time() if now is None else now
        modified = {found.path: found.modified for found in self.storage.walk(folder)}
        live = {}
        for path in (path for path in modified if path.endswith(".json")):
            beat = path.removesuffix(".json") + ".beat"
            data = self._peek(path)
            if data is None:
                continue
            times = [modified[path], modified.get(beat)]
            age = now - max((t for t in times if t is not None), default=now)
            stale = self._is_stale(path, data + (self._peek(beat) or b""), None, data)
            alive = _is_alive(_facts_of(data))
            if alive or (alive is None and not stale and age <= LEFTOVER_S):
                live[path] = _facts_of(data)
        return live

    def holders(self, folder: str, now: float | None = None) -> list[Holder]:
        """Return who is in ``leases`` or ``launches``, dead ones too, by name. now: Unix s."""
        now = time.time() if now is None else now
        modified = {found.path: found.modified for found in self.storage.walk(folder)}
        found = []
        for path in sorted(path for path in modified if path.endswith(".json")):
            data = self._peek(path)
            if data is None:  # released meanwhile
                continue
            times = [modified[path], modified.get(path.removesuffix(".json") + ".beat")]
            last = max((t for t in times if t is not None), default=None)
            silent = None if last is None else max(0.0, now - last)
            facts = _facts_of(data)
            found.append(Holder(Path(path).stem, facts, _is_alive(facts), silent))
        return found

    def _is_stale(
        self, path: str, content: bytes, owner: str | None, facts: bytes | None = None
    ) -> bool:
        holder = _facts_of(content if facts is None else facts)
        # An earlier attempt of the same work: whoever starts a new one knows that it is dead.
        if owner is not None and holder.get("owner") == owner:
            return True
        if _is_alive(holder) is False:
            return True
        # No clocks are compared between machines: it is our time since we saw it change.
        seen = self._seen.get(path)
        if seen is None or seen[0] != content:
            self._seen[path] = (content, self._clock())
            return False
        return self._clock() - seen[1] >= TTL_S

    def _peek(self, path: str) -> bytes | None:
        try:
            return self.storage.read(path)
        except FileNotFoundError:
            return None


class Lease:
    """The right to make one key, kept by a heartbeat. Leaving the context releases it."""

    def __init__(self, leases: Leases, key: str, owner: str) -> None:
        self.key, self.owner, self.token = key, owner, uuid.uuid4().hex
        self._leases = leases
        self._storage = leases.storage
        self._path = f"leases/{key}.json"
        self._beat = 0
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
        """Take it if it is free or stale, and start the heartbeat. Does not wait."""
        if self._thread is None or not self._thread.is_alive():
            if not self._take():
                return False
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"lease {self.key}")
            self._thread.start()
        return True

    def beat(self) -> bool:
        """Rewrite the lease once; return whether it is still ours."""
        if not self._is_ours():
            return False
        self._beat += 1
        self._storage.write(self._path, self._content(), durable=False)
        return True

    def release(self) -> None:
        """Stop the heartbeat and remove the lease if it is still ours."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(timeout=HEARTBEAT_S)
        self._thread = None
        # What cannot be removed goes stale.
        with suppress(Exception):
            if self._is_ours():
                self._storage.remove(self._path)

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            # A full disk or a lost connection must not stop the work, and may pass.
            with suppress(Exception):
                if not self.beat():
                    return

    def _take(self) -> bool:
        leases, storage, content = self._leases, self._storage, self._content()
        held = leases._peek(self._path)
        if held is None:
            storage.create(self._path, content, durable=False)
        elif not leases._is_stale(self._path, held, self.owner):
            return False
        else:
            # Only who has the guard may replace a lease, and only the one that it saw stale:
            # otherwise the second of two would replace the fresh lease of the first.
            guard = self._path + ".guard"
            if not storage.create(guard, content, durable=False):
                guarding = leases._peek(guard)
                if guarding is not None and leases._is_stale(guard, guarding, self.owner):
                    storage.remove(guard)
                return False
            try:
                if leases._peek(self._path) != held:
                    return False
                storage.write(self._path, content, durable=False)
            finally:
                storage.remove(guard)
        # Some object stores cannot create exclusively, and let a later writer win.
        return self._is_ours()

    def _is_ours(self) -> bool:
        data = self._leases._peek(self._path)
        return data is not None and _facts_of(data).get("token") == self.token

    def _content(self) -> bytes:
        facts = _holder(self.owner) | {"token": self.token, "beat": self._beat}
        return json.dumps(facts).encode()


def _facts_of(data: bytes) -> dict[str, Any]:
    """Return what a lease says, nothing if it is no whole JSON object."""
    with suppress(ValueError):
        facts = json.loads(data)
        if isinstance(facts, dict):
            return facts
    return {}


def _holder(owner: str) -> dict[str, Any]:
    pid = os.getpid()
    return {"owner": owner, **_machine(), "pid": pid, "started": _started(pid)}


@cache
def _machine() -> dict[str, str]:
    """Return what makes a process id unique: host, boot and the container's numbering."""
    boot = numbering = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbering = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "numbering": numbering}


def _started(pid: int) -> str | None:
    """Return when a live process started (clock ticks since boot), None if there is none.

    Empty where the system does not say.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie has ended, its parent has only not looked yet. Fields 3 and 22 of proc(5).
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(holder: Mapping[str, Any]) -> bool | None:
    """Return whether a lease's process lives, None if that cannot be seen from here."""
    pid, machine = holder.get("pid"), _machine()
    if not isinstance(pid, int) or pid <= 0 or any(holder.get(k) != machine[k] for k in machine):
        return None
    started = _started(pid)
    if started is None:
        return False
    return None if not started or not holder.get("started") else started == holder["started"]
