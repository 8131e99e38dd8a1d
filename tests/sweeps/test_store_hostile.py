"""A store that a stranger writes to: nothing outside it is read, moved, removed or written."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from other_user import OtherUser, other_user  # noqa: F401 - a fixture
from store_fixtures import key_of
from typer.testing import CliRunner

from btu.errors import UserError
from orchestrator.cli.main import app
from orchestrator.results.folder import Results
from orchestrator.store import places
from orchestrator.store.gc import gc, gc_candidates, usage
from orchestrator.store.lease import LEFTOVER_S
from orchestrator.store.remote import RemoteStorage
from orchestrator.store.storage import LocalStorage, open_storage
from orchestrator.store.store import Damaged, Missing, Store

if TYPE_CHECKING:
    from orchestrator.plan.planner import Planner

K = key_of("k")
GOOD = "0123456789abcdef" * 2
LATER = LEFTOVER_S + 60
SECRET = b"precious"


class World(NamedTuple):
    """home: what is outside. store: what the stranger writes to. said: the store's warnings."""

    home: Path
    store: Store
    said: list[str]

    @property
    def root(self) -> Path:
        return Path(self.store.location)

    def outside(self) -> dict[str, bytes]:
        """Everything beside the output folder: paths, and the content of files."""
        top = self.home.parent
        found = [path for path in top.rglob("*") if not path.is_relative_to(self.root.parent)]
        return {
            str(path.relative_to(top)): path.read_bytes() if path.is_file() else b""
            for path in found
        }

    def forge(self, path: str = f"markers/{K}.json", **changes: Any) -> None:
        """Write a marker whose checksum is right. changes: to what a marker has."""
        secret = [len(SECRET), hashlib.sha256(SECRET).hexdigest()]
        body = {"key": K, "attempt": GOOD, "name": "cell", "files": {"secret": secret},
                "info": {}, "committed": 1000.0, "dropped": False} | changes  # fmt: skip
        text = json.dumps(body, sort_keys=True)
        record = {"marker": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        (self.root / path).write_text(json.dumps(record))


@pytest.fixture
def world(tmp_path: Path) -> World:
    home = tmp_path / "home"
    (home / "x").mkdir(parents=True)
    (home / "x" / "secret").write_bytes(SECRET)
    (home / "keys").write_bytes(b"ssh-rsa")
    said: list[str] = []
    store = Store(tmp_path / "runs" / "store", warn=said.append)
    store.prepare()
    (store.storage.root / "entries" / K / GOOD).mkdir(parents=True)  # type: ignore[attr-defined]
    return World(home, store, said)


def act(store: Store) -> None:
    """Do all that reads, moves, removes or writes because of what a store contains."""
    steps: list[Callable[[], object]] = [
        store.committed, store.dropped, store.markers, store.failed,
        lambda: list(store.failures()), store.timings, store.leases.in_use,
        lambda: store.leases.holders("leases"), lambda: store.leases.holders("launches"),
        lambda: store.leases.held_by_other(K, "me"),
        lambda: usage(store),
        lambda: store.fetch(K), lambda: store.fetch(K, light=True),
        lambda: store.read_json(K, "secret"),
        lambda: store.drop(K),
        store.verify,
        lambda: store.set_aside(K, "asked"),
        lambda: gc(store, gc_candidates(store, keep=set(), now=time.time() + LATER)),
    ]  # fmt: skip
    for step in steps:
        with suppress(Missing, Damaged, FileNotFoundError, UserError):  # an answer by name
            step()


# Markers ---------------------------------------------------------------------------------------

SHA = hashlib.sha256(SECRET).hexdigest()
FILE = [len(SECRET), SHA]
HOSTILE: list[dict[str, Any]] = [
    *({"attempt": attempt} for attempt in (
        "../../../../home/x", "..", ".", "", "/etc", "a/b", GOOD + "/..",
        GOOD + "\n", GOOD.upper(), "\0", 5, None, [GOOD],
    )),
    *({"files": {name: FILE}} for name in (
        "../../../../../home/keys", "/etc/passwd", "..", ".", "", "a//b", "a/../b", "a/", "/a",
        "a\\b", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 256, "\u00e9" * 200, "a/" * 3000 + "a",
    )),
    *({"files": {"secret": fact}} for fact in (
        None, [], [8], [8, SHA, 1], [-1, SHA], [True, SHA], [8.0, SHA], ["8", SHA], [2**64, SHA],
        [8, SHA[:-1]], [8, SHA.upper()], [8, None], [8, SHA + "\n"], {"size": 8},
    )),
    {"files": []}, {"files": None}, {"files": {"secret": FILE}, "more": 1},
    {"name": 5}, {"name": "\x1b]0;owned\x07"}, {"name": "x" * 201}, {"name": None},
    {"info": []}, {"info": None}, {"info": "x"},
    *({"committed": moment} for moment in (
        "x", None, True, 10**400, [], float("inf"), float("nan"),
    )),
    {"dropped": 1}, {"dropped": None}, {"dropped": "no"}, {"dropped": True},
    {"key": key_of("other")}, {"key": "../../../../home"}, {"key": None},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: ascii(changes)[:60])
def test_a_hostile_marker_is_no_marker(world: World, changes: dict[str, Any]) -> None:
    world.forge(**changes)
    before = world.outside()
    assert world.store.marker(K) is None
    assert len(world.said) == 1
    assert f"The stored result {K} is damaged (its marker " in world.said[0]
    assert world.store.storage.names("markers") == []
    assert (world.root / "entries" / K / GOOD).is_dir()  # what it points at, even inside, stays
    assert world.outside() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt": "../../../../home/x"},
        {"attempt": "../../../../home"},
        {"attempt": "../../../../home/x", "files": {"gone": FILE}},
        {"files": {"../../../../../home/keys": [7, hashlib.sha256(b"ssh-rsa").hexdigest()]}},
    ],
)
@pytest.mark.parametrize("kind", ["", "dropped"])
def test_nothing_outside_changes(world: World, changes: dict[str, Any], kind: str) -> None:
    name = f"markers/{K}.{f'{kind}.' if kind else ''}json"
    before = world.outside()
    for again in range(2):  # what one step sets aside, another may read
        world.forge(name, dropped=bool(kind), **changes)
        act(world.store)
        assert world.outside() == before, again


def test_verify_names_it_and_publishing_replaces_it(world: World) -> None:
    world.forge(attempt="../../../../home/x")
    assert world.store.verify() == [(K, "its marker has a wrong 'attempt'")]
    world.forge(attempt="../../../../home/x")
    folder = world.store.workspace(K)
    (folder / "result.json").write_bytes(b"{}")
    marker = world.store.publish(K, folder, "cell", {})
    assert marker.attempt == folder.name
    assert world.store.read_json(K, "result.json") == {}


def test_names_that_are_no_keys_are_no_results(world: World) -> None:
    for name in ("evil", "A" * 24, "0" * 25, ".." + "0" * 22, "\x1b[2J"):
        world.forge(f"markers/{name}.json")
        (world.root / "leases" / f"{name}.json").write_text("{}")
        (world.root / "failed" / f"{name}.json").write_text('{"reason": "x"}')
    store = world.store
    assert store.committed() == store.dropped() == store.failed() == store.leases.leased() == set()
    assert store.markers() == []


# Mutations -------------------------------------------------------------------------------------

ODD = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "..", "../../../../home/x", "/",
    "a\0b", "\ud800", "\x1b[2J", [], {}, [[]], {"a": {}}, ["../../../../home/x"], "x" * 5000,
]  # fmt: skip


def mutated(value: Any, chance: random.Random) -> Any:
    """Return JSON with one or a few parts exchanged for odd ones."""
    if chance.random() < 0.15:
        return chance.choice(ODD)
    if isinstance(value, dict):
        items = [
            (mutated_name(name, chance), mutated(inner, chance)) for name, inner in value.items()
        ]
        return dict(item for item in items if chance.random() > 0.05)
    if isinstance(value, list):
        return [mutated(inner, chance) for inner in value if chance.random() > 0.05]
    return value


def mutated_name(name: str, chance: random.Random) -> str:
    odd = [text for text in ODD if isinstance(text, str)]
    return chance.choice(odd) if chance.random() < 0.1 else name


def spoilt(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with some changed, cut out or repeated."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(found) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            found[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del found[at : at + chance.randint(1, 30)]
        elif kind == 2:
            found[at:at] = found[at : at + 20]
        else:
            found[at:at] = chance.choice(
                [b"[" * 30_000, b'{"a":', b"\xff", b"9" * 5000, b"\\ud800"]
            )
    return bytes(found)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_markers_change_nothing_outside(world: World, seed: int) -> None:
    chance = random.Random(seed)
    before = world.outside()
    for number in range(75):
        body = {"key": K, "attempt": GOOD, "name": "cell", "files": {"secret": FILE, "a/b": FILE},
                "info": {"n": 1}, "committed": 1000.0, "dropped": number % 2 == 1}  # fmt: skip
        (world.root / "entries" / K / GOOD).mkdir(parents=True, exist_ok=True)
        world.forge(f"markers/{K}.{'dropped.' if number % 2 else ''}json", **{
            name: mutated(value, chance) for name, value in body.items()
        })  # fmt: skip
        act(world.store)
        assert world.outside() == before, number


FILES_OF_STRANGERS = {
    f"markers/{K}.json": {"marker": {"key": K}, "sha256": "0"},
    f"leases/{K}.json": {"owner": "o", "host": "h", "boot": "b", "numbering": "n", "pid": 7,
                         "started": "1", "token": "t", "beat": 3},
    "launches/l-1.json": {"owner": "l-1", "host": "h", "pid": 7, "sweep": "s", "keys": [K]},
    f"failed/{K}.json": {"key": K, "stage": "cell", "reason": "r", "traceback": "t", "code": "c",
                         "started": 1.0, "ended": 2.0, "metrics": {"asr": None}},
    "timings/l-1.json": [{"stage": "s", "victim": "v", "device": "cpu", "units": 1, "seconds": 2.0,
                          "count": 1}],
}  # fmt: skip


@pytest.mark.parametrize("how", ["mutated", "spoilt"])
@pytest.mark.parametrize("path", FILES_OF_STRANGERS)
def test_mutated_files_are_no_traceback(world: World, path: str, how: str) -> None:
    from orchestrator.plan.work import Timings

    chance = random.Random(f"{path} {how}")
    before = world.outside()
    for number in range(30):
        value = FILES_OF_STRANGERS[path]
        if how == "mutated":
            data = json.dumps(mutated(value, chance)).encode()
        else:
            data = spoilt(json.dumps(value).encode(), chance)
        (world.root / path).parent.mkdir(exist_ok=True)
        (world.root / path).write_bytes(data)
        act(world.store)
        Timings(world.store.timings(), "cpu")
        for holder in world.store.leases.holders("leases"):
            assert isinstance(holder.facts.get("pid", 0), int)
        for failure in world.store.failures():
            assert f"{failure['key']} {failure['stage']} {failure['reason']}".isascii()
        assert world.outside() == before, number
    Store(world.root).leases.lease(K, "me").acquire()


@pytest.mark.parametrize("how", ["mutated", "spoilt"])
def test_a_mutated_journal_is_no_traceback(world: World, how: str) -> None:
    chance = random.Random(how)
    results = Results(str(world.root.parent), "sweep", world.store)
    event = {"time": 1.0, "event": "compute", "key": K, "launch": "l-1", "seconds": 1.0}
    (world.root.parent / "sweep").mkdir()
    for _ in range(100):
        line = json.dumps(mutated(event, chance)).encode()
        if how == "spoilt":
            line = spoilt(json.dumps(event).encode(), chance)
        (world.root.parent / "sweep" / "journal.jsonl").write_bytes(line + b"\n")
        for found in results.journal():
            assert isinstance(found["time"], int | float)
            assert {type(found["event"]), type(found["key"])} == {str}


@pytest.mark.parametrize("content", ["{", "[" * 30_000, "5", "[]", '{"metrics": []}', "\xff"])
def test_a_result_that_is_no_record_is_damage(world: World, content: str) -> None:
    folder = world.store.workspace(K)
    (folder / "result.json").write_text(content, encoding="latin-1")
    world.store.publish(K, folder, "cell", {})
    results = Results(str(world.root.parent), "sweep", world.store)
    assert results.record(K, {}) is None
    assert re.search(rf"The stored result {K} is damaged \(result.json is no ", world.said[-1])
    assert world.store.committed() == set()


@pytest.mark.parametrize("plan", [
    '{"cells": [{"key": "../../x", "stages": []}]}',
    f'{{"cells": [{{"key": "{K}", "stages": ["../../x"]}}]}}',
    f'{{"cells": [{{"key": "{K}", "stages": [5]}}]}}',
    '{"cells": [], "stages": []}', '{"cells": [], "stages": {"a": {"name": 5}}}',
    '{"cells": [], "base": []}', '{"cells": [], "refused": 1}', "[" * 30_000, "5",
])  # fmt: skip
def test_a_hostile_plan_is_named(world: World, plan: str) -> None:
    (world.root.parent / "sweep" / "plans").mkdir(parents=True)
    (world.root.parent / "sweep" / "plans" / "1.json").write_text(plan)
    results = Results(str(world.root.parent), "sweep", world.store)
    with pytest.raises(UserError, match=r"sweep/plans/1\.json is not a plan"):
        list(results.cells())


# Links -----------------------------------------------------------------------------------------


def linked(world: World, kind: str) -> None:
    """Put a symbolic link to the home into the store."""
    root, home = world.root, world.home
    if kind == "entry":
        world.forge()
        (root / "entries" / K / GOOD).rmdir()
        (root / "entries" / K / GOOD).symlink_to(home / "x")
    elif kind == "key":
        world.forge()
        (home / GOOD).mkdir()
        (home / GOOD / "secret").write_bytes(SECRET)
        (root / "entries" / K / GOOD).rmdir()
        (root / "entries" / K).rmdir()
        (root / "entries" / K).symlink_to(home)
    elif kind == "file":
        world.forge()
        (root / "entries" / K / GOOD / "secret").symlink_to(home / "x" / "secret")
    elif kind == "file beside":
        world.forge()
        (root / "entries" / K / GOOD / "secret").write_bytes(SECRET)
        (root / "entries" / K / GOOD / "model.safetensors").symlink_to(home / "keys")
    elif kind == "marker":
        world.forge()
        (root / "markers" / f"{K}.json").rename(home / "marker")
        (root / "markers" / f"{K}.json").symlink_to(home / "marker")
    else:  # a folder of the store
        if (root / kind).exists():
            for found in sorted((root / kind).rglob("*"), reverse=True):
                found.rmdir() if found.is_dir() else found.unlink()
            (root / kind).rmdir()
        (root / kind).symlink_to(home)
        if kind != "markers":
            world.forge()


LINKS = ["entry", "key", "file", "file beside", "marker", *places.FOLDERS, ".tmp"]


@pytest.mark.parametrize("kind", LINKS)
def test_links_are_not_followed(world: World, kind: str) -> None:
    linked(world, kind)
    before = world.outside()
    act(world.store)
    assert world.outside() == before


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("entry", "its folder is a symbolic link"),
        ("key", "its folder is a symbolic link"),
        ("file", "secret is a symbolic link"),
        ("file beside", "model.safetensors is a symbolic link"),
        ("marker", "its marker is cut short or no marker"),
    ],
)
def test_an_entry_with_a_link_is_set_aside(world: World, kind: str, reason: str) -> None:
    linked(world, kind)
    with pytest.raises((Damaged, Missing)):
        world.store.fetch(K)
    assert any(reason in said for said in world.said)
    assert world.store.committed() == set()


def test_a_linked_folder_of_the_store_is_named_and_no_result_is_lost(world: World) -> None:
    folder = world.store.workspace(K)
    (folder / "secret").write_bytes(SECRET)
    world.store.publish(K, folder, "cell", {})
    (world.root / "entries").rename(world.home / "entries")
    (world.root / "entries").symlink_to(world.home / "entries")
    with pytest.raises(UserError, match=r"store/entries is a symbolic link.*remove it, or use"):
        world.store.fetch(K)
    assert world.store.committed() == {K}


def test_the_store_itself_may_be_a_link(world: World, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(world.root)
    store = Store(tmp_path / "linked")
    folder = store.workspace(K)
    (folder / "record.json").write_bytes(b"{}")
    store.publish(K, folder, "cell", {})
    assert store.read_json(K, "record.json") == {}
    assert store.verify() == []
    assert store.location == str(tmp_path / "linked")


def test_a_line_is_not_appended_through_a_link(world: World) -> None:
    results = Results(str(world.root.parent), "sweep", world.store)
    results.journal_event("compute", key=K)
    journal = world.root.parent / "sweep" / "journal.jsonl"
    journal.unlink()
    journal.symlink_to(world.home / "keys")
    timings = world.root / "timings" / "l-1.json"
    timings.symlink_to(world.home / "keys")
    before = world.outside()
    with pytest.raises(UserError, match=r"journal\.jsonl is a symbolic link"):
        results.journal_event("compute", key=K)
    with pytest.raises(UserError, match=r"l-1\.json is a symbolic link"):
        world.store.add_timings("l-1", [{"stage": "x"}])
    with pytest.raises(UserError, match=r"journal\.jsonl is a symbolic link"):
        results.journal()
    assert world.store.timings() == []
    assert world.outside() == before


def test_a_pipe_is_not_waited_for(world: World) -> None:
    os.mkfifo(world.root / "markers" / f"{K}.json")
    os.mkfifo(world.root / "timings" / "l-1.json")
    done = threading.Thread(target=lambda: act(world.store), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive()
    assert world.store.committed() == set()


def test_a_marker_that_this_user_may_not_read_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def private(*_: object) -> bytes:  # root may read everything, so the answer is made up
        raise PermissionError(13, "Permission denied")

    world.forge()
    monkeypatch.setattr(world.store.storage, "read", private)
    with pytest.raises(
        UserError, match=rf"{K}\.json cannot be read \(Permission denied\); its owner"
    ):
        world.store.marker(K)
    assert world.store.committed() == {K}


def test_a_file_that_the_marker_does_not_name_is_damage(world: World) -> None:
    folder = world.store.workspace(K)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"w")
    world.store.publish(K, folder, "train", {})
    (folder / ".DS_Store").write_bytes(b"of a file manager")
    assert world.store.fetch(K) == folder
    (folder / "model" / "modeling.py").write_bytes(b"import os")
    with pytest.raises(Damaged, match=r"'model/modeling.py' is there, but not in its marker"):
        world.store.fetch(K)


def test_a_swapped_file_of_the_same_size_and_time_is_noticed(world: World) -> None:
    folder = world.store.workspace(K)
    (folder / "weights").write_bytes(b"0123456789")
    world.store.publish(K, folder, "train", {})
    world.store.fetch(K)
    status = (folder / "weights").stat()
    time.sleep(0.05)  # longer than the clock of a file system ticks
    (folder / "weights").write_bytes(b"9876543210")
    os.utime(folder / "weights", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(Damaged, match="weights has other content"):
        world.store.fetch(K)


# A store by URL --------------------------------------------------------------------------------


def test_a_download_stays_in_the_cache(tmp_path: Path) -> None:
    import fsspec

    store = Store("memory://hostile/store", cache=tmp_path / "a" / "cache")
    store.prepare()
    fsspec.filesystem("memory").pipe_file("/hostile/store/secret", SECRET)
    for name in ("../../../../../out", f"{tmp_path}/out", "a/../../out"):
        body = {"key": K, "attempt": GOOD, "name": "c", "files": {name: FILE}, "info": {},
                "committed": 1.0, "dropped": False}  # fmt: skip
        sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        store.storage.write(
            f"markers/{K}.json", json.dumps({"marker": body, "sha256": sha}).encode()
        )
        with pytest.raises(Missing):
            store.fetch(K)
        storage = RemoteStorage("memory://hostile/store")
        with pytest.raises(UserError, match="is no name of a file of a result"):
            storage.download(f"entries/{K}/{GOOD}", [name], tmp_path / "a" / "cache")
    assert not list(tmp_path.rglob("out"))
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "a/./b", "a\0b"])
@pytest.mark.parametrize("location", ["memory://inside/store", "path"])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, path: str, location: str) -> None:
    storage = open_storage(tmp_path / "store" if location == "path" else location)
    for call in (
        lambda: storage.read(path), lambda: storage.write(path, b""),
        lambda: storage.create(path, b""), lambda: storage.remove(path),
        lambda: storage.append(path, "x"), lambda: storage.move(path, "y"),
        lambda: list(storage.walk(path)), lambda: storage.names(path),
        lambda: storage.exists(path), lambda: storage.digest(path),
    ):  # fmt: skip
        with pytest.raises(UserError, match="is no path below"):
            call()
    storage.write("y", b"")
    with pytest.raises(UserError, match="is no path below"):
        storage.move("y", path)
    assert [found.name for found in tmp_path.iterdir()] in ([], ["store"])


def test_listings_of_a_server_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage("memory://inside/store")
    storage.write("a/b", b"1")
    found = {f"{storage._root}/a/b": {"size": 1}, f"{storage._root}/../../etc/x": {"size": 1}}
    monkeypatch.setattr(storage._fs, "find", lambda *_, **__: found)
    assert [path for path, *_ in storage.walk("")] == ["a/b"]


# One place -------------------------------------------------------------------------------------

SOURCES = Path(__file__).parents[2] / "orchestrator"
OPERATIONS = {"read", "digest", "write", "create", "append", "lines", "names", "walk", "exists",
              "move", "remove", "prune", "workspace", "upload", "download"}  # fmt: skip


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the strings of a program and their lines, but for docstrings."""
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [] if id(node) in documents else [(node.lineno, node.value)]


def test_one_module_makes_the_paths_of_a_store() -> None:
    joins = re.compile(rf"(^|\}})/?({'|'.join(re.escape(f) for f in places.FOLDERS)}|\.tmp)/")
    wrong = []
    for path in sorted(SOURCES.rglob("*.py")):
        if path.name == "places.py":
            continue
        tree = ast.parse(path.read_text())
        wrong += [f"{path}:{line}: {text}" for line, text in strings(tree) if joins.search(text)]
        if path.parent.name != "store" or path.name in ("local.py", "remote.py"):
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            to_storage = ast.unparse(node.func.value).endswith("storage")
            if to_storage and node.func.attr in OPERATIONS:
                made = [a for a in node.args if isinstance(a, ast.JoinedStr | ast.BinOp)]
                wrong += [f"{path}:{node.lineno}: {ast.unparse(a)}" for a in made]
    assert wrong == []


# Another user ----------------------------------------------------------------------------------


@pytest.fixture
def group_store(other_user: OtherUser, tmp_path: Path) -> Iterator[Path]:  # noqa: F811
    """An output folder that both users may write to, with a finished result of ours."""
    output = other_user.shared / f"runs-{tmp_path.name}"
    store = Store(output / "store")
    store.prepare()
    folder = store.workspace(K)
    (folder / "secret").write_bytes(SECRET)
    store.publish(K, folder, "cell", {})
    for path in (output, *output.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    yield output
    LocalStorage(other_user.shared).remove(output.name)


def btu(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_another_user_of_a_shared_store_reaches_nothing_of_ours(
    other_user: OtherUser,  # noqa: F811
    group_store: Path,
    tmp_path: Path,
    make_sweep: Callable[..., Path],
    planner: Planner,
) -> None:
    from orchestrator.plan.planner import plan_sweep
    from orchestrator.sweep.load import load_sweep

    home = tmp_path / "home"
    (home / "x").mkdir(parents=True)
    (home / "x" / "secret").write_bytes(SECRET)
    sweep = make_sweep(output=str(group_store))
    (key,) = plan_sweep(load_sweep(sweep, []), planner).cells  # a cell that the sweep asks for
    store = group_store / "store"
    climb = "../" * (len(store.parts) + 1) + str(home / "x").lstrip("/")
    body = {"key": key, "attempt": climb, "name": "cell", "files": {"gone": [1, SHA]}, "info": {},
            "committed": 1.0, "dropped": False}  # fmt: skip
    sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    forged = json.dumps({"marker": body, "sha256": sha})
    forge = f"printf '%s' '{forged}' > markers/{key}.json"
    script = (
        f"cd store && {forge} && mkdir -p entries/{key} && "
        f"rm -rf markers/{K}.dropped.json damaged && ln -s {home} damaged && "
        f"ln -s {home}/x entries/{key}/{GOOD} && ln -s {home}/x/secret timings/l-1.json"
    )
    wrote = other_user.run("sh", "-c", f"cd {group_store} && {script}")
    assert wrote.returncode == 0, wrote.stderr

    for command in (
        ("store", "verify", "--output", str(group_store)),
        ("store", "ls", "--output", str(group_store)),
        ("store", "gc", "--older-than", "0m", "--yes", "--output", str(group_store)),
        ("plan", str(sweep)),
        ("store", "verify", "--owner", "--output", str(group_store)),
    ):
        again = other_user.run("sh", "-c", f"cd {store} && {forge}")
        assert again.returncode == 0, again.stderr
        code, text = btu(*command)
        assert code in (0, 1, 2), text
        with pytest.raises(Missing):  # as a launch reads what is committed
            Store(store).fetch(key)
        assert [str(p.relative_to(home)) for p in sorted(home.rglob("*"))] == ["x", "x/secret"]
        assert (home / "x" / "secret").read_bytes() == SECRET


def test_owners_are_named(other_user: OtherUser, group_store: Path) -> None:  # noqa: F811
    code, text = btu("store", "verify", "--owner", "--output", str(group_store))
    assert (code, text) == (0, "All results are intact.")
    marker = group_store / "store" / "markers" / f"{K}.json"
    copied = other_user.run("sh", "-c", f"cp {marker} {marker}.new && mv -f {marker}.new {marker}")
    assert copied.returncode == 0, copied.stderr
    code, text = btu("store", "verify", "--owner", "--output", str(group_store))
    assert code == 1
    assert re.search(rf"{K} has files of btu-\w+ \(id {other_user.uid}\)\.", text)
    assert "Of other users: 1 result." in text
    assert btu("store", "verify", "--output", str(group_store))[0] == 0


def test_a_store_by_url_has_no_owners() -> None:
    storage = RemoteStorage("memory://owners/store")
    storage.write("a/b", b"1")
    code, text = btu("store", "verify", "--owner", "--output", "memory://owners")
    assert code == 2
    assert "--owner names Unix users, which memory://owners/store does not have" in text
