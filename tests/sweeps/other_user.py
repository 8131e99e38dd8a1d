"""A second user of the machine, for tests of what such a user can read and change."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class OtherUser(NamedTuple):
    """uid: of the user. shared: a folder that everybody may write to, as a lab's scratch disk."""

    uid: int
    shared: Path

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command as this user, from the shared folder, and return its output.

        The user can read neither pytest's temporary files nor a virtual environment in a private
        home: use programs of the system (`sh`, `cat`), and files in `shared`.
        """
        return subprocess.run(
            command,
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            cwd=self.shared,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.shared)},
            capture_output=True,
            text=True,
            **options,  # type: ignore[call-overload]
        )


@pytest.fixture(scope="session")
def other_user() -> Iterator[OtherUser]:
    """A user who is made for the tests and removed afterwards. Needs root and `useradd`."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a second user")
    if shutil.which("useradd") is None or shutil.which("userdel") is None:
        pytest.skip("this machine has no useradd and userdel")
    name = f"btu-{uuid.uuid4().hex[:8]}"
    subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/sh", name], check=True)
    shared = Path(tempfile.mkdtemp(prefix="btu-shared-"))
    shared.chmod(0o1777)
    try:
        yield OtherUser(pwd.getpwnam(name).pw_uid, shared)
    finally:
        shutil.rmtree(shared)
        subprocess.run(["userdel", name], check=True)
