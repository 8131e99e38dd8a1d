"""What SIGTERM and Ctrl-C do to a launch. Without Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def _as_interrupt(*_: object) -> None:
    """Do what Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, stop a launch as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Signals:
    """What SIGTERM and Ctrl-C do while Ray runs."""

    def interrupt(self) -> None:
        """Let both interrupt. Ray's client has taken SIGTERM over, and would end the process."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _as_interrupt)

    def to(self, stop: threading.Event) -> None:
        """Let them set an event. A second Ctrl-C interrupts: the user does not want to wait."""

        def interrupt(*_: object) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            stop.set()

        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def signals() -> Iterator[Signals]:
    """Restore at the end what SIGTERM and Ctrl-C do; not before Ray is left, which has its own."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield Signals()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
