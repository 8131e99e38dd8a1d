"""The user's cache: where it is, whose it must be, and what happens where there is none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from btu import cache_folder as module
from btu.cache_folder import cache_folder, cache_place
from btu.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("BTU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_temporaries", {})
    return home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_place_goes_by_the_environment(home: Path) -> None:
    assert cache_place() == home / ".cache" / "btu"
    assert cache_place({"XDG_CACHE_HOME": "/x"}) == Path("/x/btu")
    # The specification of XDG: a relative path is to be ignored.
    assert cache_place({"XDG_CACHE_HOME": "x"}) == home / ".cache" / "btu"
    assert cache_place({"XDG_CACHE_HOME": "/x", "BTU_CACHE": "~/c"}) == home / "c"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_it_is_made_for_its_owner_alone(home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert cache_folder("stores") == home / ".cache" / "btu" / "stores"
    finally:
        os.umask(before)
    assert mode(home / ".cache" / "btu") == mode(home / ".cache" / "btu" / "stores") == 0o700


def test_a_folder_of_an_earlier_version_is_closed(home: Path) -> None:
    (home / ".cache" / "btu").mkdir(parents=True)
    (home / ".cache" / "btu").chmod(0o777)
    cache_folder()
    assert mode(home / ".cache" / "btu") == 0o700


def test_a_named_folder_that_others_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "named"
    named.mkdir()
    named.chmod(0o777)
    monkeypatch.setenv("BTU_CACHE", str(named))
    with pytest.raises(UserError, match=r"other users can write to .*named; run `chmod go-w`"):
        cache_folder()
    assert mode(named) == 0o777  # it may serve other purposes: its owner decides
    named.chmod(0o755)
    assert cache_folder("stores") == named / "stores"


@pytest.mark.parametrize("which", ["", "stores"])
def test_a_link_is_refused(home: Path, tmp_path: Path, which: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    place = home / ".cache" / "btu" / which
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"is a symbolic link, which is not followed; set BTU_CACHE"
    ):
        cache_folder("stores")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(home: Path) -> None:
    place = home / ".cache" / "btu" / "stores"
    place.mkdir(parents=True)
    os.chown(place, 12345, 12345)
    with pytest.raises(UserError, match=r"stores belongs to another user \(id 12345\).*BTU_CACHE"):
        cache_folder("stores")


def test_a_home_that_cannot_be_written_gives_way_to_a_temporary_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache").write_text("in the way, for root too")
    said: list[str] = []
    folder = cache_folder("stores", said.append)
    assert folder.is_dir()
    assert mode(folder) == mode(folder.parent) == 0o700
    assert cache_folder("stores", said.append) == folder
    assert len(said) == 1
    assert said[0].startswith(f"The cache {home}/.cache/btu cannot be written (")
    assert "Set BTU_CACHE to a folder to keep it." in said[0]
    # One that was named is an error: it was wanted there.
    monkeypatch.setenv("BTU_CACHE", str(home / ".cache" / "named"))
    with pytest.raises(UserError, match=r"named cannot be made .*; set BTU_CACHE"):
        cache_folder("stores")


def test_the_temporary_folder_goes_with_the_process(home: Path) -> None:
    (home / ".cache").write_text("")
    code = "from btu.cache_folder import cache_folder; print(cache_folder('stores'))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "btu-cache-" in made.stdout
    assert not Path(made.stdout.strip()).parent.exists()


def test_the_copies_of_a_remote_store_are_in_it(home: Path, tmp_path: Path) -> None:
    from orchestrator.store.store import Store

    store = Store(f"local://{tmp_path}/store")
    store.prepare()
    assert not (home / ".cache").exists()  # until something is fetched
    folder = store.workspace("a" * 24)
    (folder / "result.json").write_text("{}")
    store.publish("a" * 24, folder, "cell", {})
    assert store.fetch("a" * 24).is_relative_to(home / ".cache" / "btu" / "stores")
    local = Store(tmp_path / "local")
    local.trim_cache(0)
    assert not list(home.glob("btu-cache*"))
