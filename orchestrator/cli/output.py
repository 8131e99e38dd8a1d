"""Output that a terminal, a pipe or a disk does not take ends a command in order."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

from orchestrator.cli.shared import EXIT_INCOMPLETE, EXIT_USER_ERROR, errors

# Modules that write to the standard streams; files are written by others.
PRINTERS = ("rich.", "typer.", "click.", "orchestrator.cli.")


@contextmanager
def orderly_output() -> Iterator[None]:
    """Run a command: escape what the output's encoding lacks; no traceback if it cannot be written.

    A reader that closes its end of a pipe, as `head` does, is no error to be told.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:
        if not _printing(error):
            raise
        _end(error)
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError as error:
            _end(error)
        raise


def _printing(error: OSError) -> bool:
    """Return whether an error is one of printing, not one of a file that the command writes."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__")) if trace is not None else ""
    return error.filename is None and module.startswith(PRINTERS)


def _drop(stream: TextIO) -> None:
    """Drop what a stream does not take: Python would flush it once more, and print the error."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end(error: OSError) -> NoReturn:
    """Leave, with one line unless the reader has gone."""
    gone = error.errno == errno.EPIPE
    if not gone:
        text = (
            f"error: the output cannot be written: {error.strerror}. Free space there, or send it "
            "to another file."
        )
        with suppress(OSError):
            errors.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
    for stream in (sys.stdout, sys.stderr):
        _drop(stream)
    raise SystemExit(EXIT_INCOMPLETE if gone else EXIT_USER_ERROR) from None
