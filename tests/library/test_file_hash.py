"""The SHA-256 of a victim's file is remembered while the file is the same, and no longer."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from btu.model_files import file_sha256


def test_a_swapped_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"0123456789")
    status = path.stat()
    assert file_sha256(path) == hashlib.sha256(b"0123456789").hexdigest()
    time.sleep(0.05)  # longer than the clock of a file system ticks
    path.write_bytes(b"9876543210")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"9876543210").hexdigest()
