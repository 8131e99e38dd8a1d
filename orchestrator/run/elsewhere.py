"""Which stages other launches compute right now, by their leases."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

from orchestrator.run.worker import WAIT_SECONDS
from orchestrator.store.store import Store

# Seconds between listings of the leases in a folder, and on an object store, where it is a request.
# A stage that another launch has taken meanwhile is handed out in vain: its worker finds the lease.
LEASES_SECONDS = 1.0
LEASES_REMOTE_SECONDS = 5.0


class Elsewhere:
    """Looks up which stages other launches compute right now.

    owner: id of the launch that asks. clock: monotonic seconds.
    """

    def __init__(self, store: Store, owner: str, clock: Callable[[], float]) -> None:
        self._store, self._owner, self._clock = store, owner, clock
        self._leased: set[str] = set()
        self._every = LEASES_REMOTE_SECONDS if store.storage.objects else LEASES_SECONDS
        self._listed = -math.inf  # when
        self._busy_until: dict[str, float] = {}

    def computes(self, key: str) -> bool:
        """Return whether another launch computes a stage."""
        now = self._clock()
        if now - self._listed > self._every:
            self._leased = self._store.leases.leased()
            self._listed = now
        if key not in self._leased:
            return False
        if now < self._busy_until.get(key, 0.0):
            return True
        if self._store.leases.held_by_other(key, self._owner):
            return True
        # The lease has expired. This process has watched it for long enough to know; a worker would
        # have to watch it from the start. So it is removed here: taken over, and released.
        with suppress(OSError), self._store.leases.lease(key, self._owner) as lease:
            lease.acquire()
        self._leased.discard(key)
        return False

    def found(self, key: str) -> None:
        """A worker has found that another launch computes a stage."""
        self._listed = -math.inf
        self._busy_until[key] = self._clock() + WAIT_SECONDS
