"""Signed stores: with a key in the environment, results that it did not sign count as missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import key_of
from typer.testing import CliRunner

from btu.errors import UserError
from orchestrator.cli import store as cli
from orchestrator.store import packed
from orchestrator.store.gc import gc_candidates
from orchestrator.store.lease import LEFTOVER_S
from orchestrator.store.marker import SIGNING_KEY, Unsigned, dump, parse, signing_key
from orchestrator.store.store import Missing, Store

KEY = "0123456789abcdef"
A, B = key_of("a"), key_of("b")


@pytest.fixture(params=["path", "memory"])
def output(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "memory":
        import fsspec

        # Small files here stand for large ones, which are objects of their own.
        monkeypatch.setattr(packed, "PACKED_BYTES", 0)
        yield "memory://signing"
        fsspec.filesystem("memory").store.clear()
        return
    yield str(tmp_path / "runs")


@pytest.fixture
def open_store(output: str, tmp_path: Path) -> Callable[[], Store]:
    """A function that opens the store with the key of the moment, as another process would."""

    def build() -> Store:
        store = Store(f"{output}/store", cache=tmp_path / "cache", warn=said.append)
        store.prepare()
        return store

    said: list[str] = []
    build.said = said  # type: ignore[attr-defined]
    return build


def add(store: Store, key: str, content: str = '{"asr": 1}') -> None:
    folder = store.workspace(key)
    (folder / "result.json").write_text(content)
    store.publish(key, folder, "cell", {})


def run(output: str, command: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [command, "--output", output, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_what_was_signed_is_read(
    open_store: Callable[[], Store], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY, KEY)
    add(open_store(), A)
    store = open_store()
    assert store.committed() == {A}
    assert store.read_json(A, "result.json") == {"asr": 1}
    assert store.fetch(A)
    store.drop(A)
    assert store.dropped() == {A}
    assert store.read_json(A, "result.json") == {"asr": 1}
    assert run(output, "verify") == (0, "All results are intact.")
    # Without the key it is an ordinary store.
    monkeypatch.delenv(SIGNING_KEY)
    assert open_store().dropped() == {A}


def test_a_forged_result_is_noticed(
    open_store: Callable[[], Store], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY, KEY)
    add(open_store(), A)
    # A writer of the store, who has no key, exchanges the result and makes the hashes fit.
    store = open_store()
    marker = store.marker(A)
    assert marker is not None
    forged = b'{"asr": 0}'
    store.storage.write(f"{marker.folder}/result.json", forged)
    path = f"markers/{A}.json"
    record = json.loads(store.storage.read(path))
    record["marker"]["files"]["result.json"] = [len(forged), hashlib.sha256(forged).hexdigest()]
    text = json.dumps(record["marker"], sort_keys=True).encode()
    record["sha256"] = hashlib.sha256(text).hexdigest()
    store.storage.write(path, json.dumps(record).encode())

    reader = open_store()
    assert reader.marker(A) is None
    assert reader.committed() == set()
    assert not reader.is_committed(A)
    with pytest.raises(Missing):
        reader.read_json(A, "result.json")
    code, text_ = run(output, "verify")
    assert code == 1
    assert f"{A} is signed with another key" in text_
    # Nobody but the holders of a key notices: without one the hashes fit.
    monkeypatch.delenv(SIGNING_KEY)
    assert open_store().read_json(A, "result.json") == {"asr": 0}


def test_a_store_from_before_the_key_stays_whole(
    open_store: Callable[[], Store], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(open_store(), A)
    monkeypatch.setenv(SIGNING_KEY, KEY)
    store = open_store()
    add(store, B)
    assert store.committed() == {B}
    with pytest.raises(Missing):
        store.fetch(A)
    said = open_store.said  # type: ignore[attr-defined]
    assert len(said) == 1
    assert f"The stored result {A} is not signed, and {SIGNING_KEY} is set" in said[0]
    assert "`btu store sign` signs them" in said[0]
    # Neither verify nor gc touches it, however old it is.
    code, text = run(output, "verify")
    assert code == 1
    assert f"{A} is not signed. Not signed with {SIGNING_KEY}: 1 result." in text
    late = gc_candidates(store, now=10**10 + LEFTOVER_S)
    assert [candidate for candidate in late if candidate.key == A] == []
    assert f"{A} │ - │ -" in run(output, "ls")[1]
    monkeypatch.delenv(SIGNING_KEY)
    assert open_store().read_json(A, "result.json") == {"asr": 1}


def test_sign_signs_what_is_whole(
    open_store: Callable[[], Store], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    add(store, A)
    add(store, B)
    marker = store.marker(B)
    assert marker is not None
    store.storage.write(f"{marker.folder}/result.json", b'{"asr": 9}')
    with pytest.raises(UserError, match=rf"{SIGNING_KEY} is not set, so there is nothing to sign"):
        run(output, "sign")
    monkeypatch.setenv(SIGNING_KEY, KEY)
    code, text = run(output, "sign")
    assert (code, "2 results. Nothing was signed; --yes signs them." in text) == (0, True)
    assert open_store().committed() == set()
    code, text = run(output, "sign", "--yes")
    assert code == 1
    assert f"{B} is not signed: result.json has other content." in text
    assert "Signed: 1 result." in text
    assert open_store().committed() == {A}
    assert open_store().read_json(A, "result.json") == {"asr": 1}


def test_a_signed_result_takes_the_place_of_an_unsigned_one(
    open_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(open_store(), A, '{"asr": 0}')
    monkeypatch.setenv(SIGNING_KEY, KEY)
    add(open_store(), A, '{"asr": 1}')
    assert open_store().read_json(A, "result.json") == {"asr": 1}
    (aside,) = open_store().storage.names("damaged")
    assert aside.startswith(A)


@pytest.mark.parametrize("other", ["fedcba9876543210", KEY + " "])
def test_another_key_signs_differently(other: str) -> None:
    marker = parse(A, dump(_marker(), KEY.encode()), dropped=False, signed_with=KEY.encode())
    assert marker == _marker()
    with pytest.raises(Unsigned, match="signed with another key"):
        parse(A, dump(_marker(), KEY.encode()), dropped=False, signed_with=other.encode())
    with pytest.raises(Unsigned, match="not signed"):
        parse(A, dump(_marker()), dropped=False, signed_with=KEY.encode())


@pytest.mark.parametrize("signature", [None, 5, "", "\ud800", [], "0" * 64])
def test_an_odd_signature_is_none(signature: Any) -> None:
    record = json.loads(dump(_marker(), KEY.encode())) | {"hmac": signature}
    with pytest.raises(Unsigned):
        parse(A, json.dumps(record).encode(), dropped=False, signed_with=KEY.encode())


def test_the_signature_is_an_hmac_of_the_marker() -> None:
    """Computed by hand, from RFC 2104: H(K ^ opad, H(K ^ ipad, text)), with blocks of 64 bytes."""
    record = json.loads(dump(_marker(), KEY.encode()))
    text = b"btu marker 1\0" + json.dumps(record["marker"], sort_keys=True).encode()
    block = KEY.encode().ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in block) + text).digest()
    assert record["hmac"] == hashlib.sha256(bytes(b ^ 0x5C for b in block) + inner).hexdigest()


def test_a_short_key_is_refused_and_not_shown() -> None:
    assert signing_key({}) is None
    assert signing_key({SIGNING_KEY: ""}) is None
    with pytest.raises(UserError, match=r"has 6 characters; it needs at least 16") as refused:
        signing_key({SIGNING_KEY: "secret"})
    assert "secret" not in str(refused.value).replace(SIGNING_KEY, "")


def test_the_key_is_written_nowhere(
    open_store: Callable[[], Store], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY, KEY)
    store = open_store()
    add(store, A)
    store.leases.register_launch("l-1", "sweep", [A])
    with store.leases.lease(B, "l-1") as lease:
        assert lease.acquire()
        for name in store.storage.names(""):
            for path, *_ in store.storage.walk(name):
                if not store.storage.names(path) and path.count("/"):
                    assert KEY.encode() not in store.storage.read(path)


def _marker() -> Any:
    from orchestrator.store.marker import Marker

    return Marker(A, "0" * 32, "cell", {}, {}, 1000.0)
