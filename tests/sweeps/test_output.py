"""What `btu` does where its output cannot be printed: other encodings, full disks, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def btu(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **options.pop("env", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-m", "orchestrator.cli", *arguments]
    return subprocess.run(command, env=environment, check=False, **options)  # type: ignore[call-overload]


@needs_full
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        # A table, help by the library of commands, and text that is not printed by rich.
        (("list", "metrics"), ""),
        (("--help",), ""),
        (("status", "--json"), ""),
        # Then the error comes from writing, not from a flush.
        (("list", "metrics"), "1"),
        (("status", "--json"), "1"),
    ],
)
def test_a_full_disk_under_the_output_is_a_line(
    tmp_path: Path, arguments: tuple[str, ...], unbuffered: str
) -> None:
    if arguments[0] == "status":
        (tmp_path / "runs").mkdir()
    with FULL.open("w") as full:
        done = btu(
            *arguments,
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    text = " ".join(done.stderr.decode().split())
    assert text == (
        "error: the output cannot be written: No space left on device. Free space there, or send "
        "it to another file."
    )


@needs_full
def test_a_full_disk_under_everything_ends_with_a_code() -> None:
    with FULL.open("w") as full:
        assert btu("list", "metrics", stdout=full, stderr=full).returncode == 2


@pytest.mark.parametrize("arguments", [("list", "metrics"), ("--help",)])
def test_a_reader_that_goes_away_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = btu(*arguments, stdout=pipe, stderr=subprocess.PIPE)
    assert done.stderr == b""
    assert done.returncode == 1


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "name: tiny\ncontrols: []\ndata: {name: demo, max_train_rows: 40}\nseed: 0\n"
        "grid: {attack.trigger: [['ünïcode'], [cf]]}\n",
        encoding="utf-8",
    )
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = btu("plan", file.name, cwd=tmp_path, env=ascii_only, capture_output=True)
    assert done.returncode == 0, done
    assert b"\\xfcn\\xefcode" in done.stdout
    # A warning about the trigger; nothing else.
    assert b"\\xfcn\\xefcode" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_an_error_of_another_file_is_not_the_outputs() -> None:
    from orchestrator.cli.output import orderly_output

    with pytest.raises(OSError, match="No such file"), orderly_output():
        Path("/nowhere/file").write_text("")
