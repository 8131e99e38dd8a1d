"""The code, hardware and versions that a result was computed with."""

from __future__ import annotations

import platform
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import btu

if TYPE_CHECKING:
    import torch


@cache
def code_version() -> str:
    """Return the package version and, in a checkout, the commit ("+" marks local changes)."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:  # a checkout on a machine without git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return btu.__version__
    commit = git("rev-parse", "--short=12", "HEAD")
    dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{btu.__version__}+{commit}{dirty}" if commit else btu.__version__


def environment(device: torch.device, accumulation: int = 1) -> dict[str, str]:
    """Return code, host, device, threads and versions.

    accumulation: number of parts that each batch was cut into; recorded if above 1, since dropout
        is then drawn differently, which changes the results slightly.
    """
    import torch
    import transformers

    cuda = device.type == "cuda"
    found = {
        "code": code_version(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    if accumulation > 1:
        found["accumulation"] = str(accumulation)
    return found
