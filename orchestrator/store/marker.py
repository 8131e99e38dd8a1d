"""Markers: the commit records of entries, checked when they are read, and signed where asked for.

The SHA-256 of a marker and of the files in it detect accidents: a bad disk, a copy cut short. They
do not detect forgery, since whoever writes a file can write its hash. With BTU_STORE_SIGNING_KEY in
the environment a marker has an HMAC-SHA256 with this key too, which only its holders can make.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from btu.errors import UserError
from orchestrator.store import places
from orchestrator.store.tree import FileFact
from orchestrator.store.typed import Check, is_amount, is_count, is_text, parse_object

# Not a key of sweep files: it would be saved with them.
SIGNING_KEY = "BTU_STORE_SIGNING_KEY"
LEAST_CHARACTERS = 16
_CONTEXT = b"btu marker 1\0"
_SHA256 = re.compile(r"[0-9a-f]{64}")
NAME_CHARACTERS = 200
NO_MARKER = "its marker is cut short or no marker"


class Unsigned(Exception):  # noqa: N818 - it is a state of the entry
    """A marker that the key in the environment did not sign."""


@dataclass(frozen=True)
class Marker:
    """The commit record of an entry.

    key: the stage's key.
    attempt: names the folder of its files.
    name: the stage's name.
    files: size and hash by path below the entry.
    info: small facts, as JSON.
    committed: Unix time in seconds.
    dropped: whether only the files in `files` are left.
    small: the contents of files that the marker has itself (`orchestrator.store.packed`). They are
        none of its statements: `files` has their hashes.
    """

    key: str
    attempt: str
    name: str
    files: Mapping[str, FileFact]
    info: Mapping[str, Any]
    committed: float
    dropped: bool = False
    small: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> str:
        """The folder of the files, relative to the root of the store."""
        return places.entry(self.key, self.attempt)

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that belongs to the entry, in the order of removal.

        The marker comes first: files without a marker are left-overs, not a damaged result.
        """
        return (places.marker(self.key), places.dropped(self.key), self.folder)

    @property
    def bytes(self) -> int:
        """The total size of the files."""
        return sum(fact.size for fact in self.files.values())


def _is_stage(name: Any) -> bool:
    return is_text(name) and name.isprintable() and len(name) <= NAME_CHARACTERS


def _are_files(files: Any) -> bool:
    return isinstance(files, dict) and all(map(_is_file, files.items()))


# What a marker has, and the type of each.
_FIELDS: dict[str, Check] = {
    "key": places.is_key,
    "attempt": places.is_attempt,
    "name": _is_stage,
    "files": _are_files,
    "info": lambda info: isinstance(info, dict),
    "committed": is_amount,
    "dropped": lambda dropped: isinstance(dropped, bool),
}


def signing_key(environment: Mapping[str, str] = os.environ) -> bytes | None:
    """Return the key that markers are signed with; None where none is set.

    Raises:
        UserError: it is too short to keep anybody from guessing it.
    """
    key = environment.get(SIGNING_KEY, "")
    if key and len(key) < LEAST_CHARACTERS:
        raise UserError(
            f"{SIGNING_KEY} has {len(key)} characters; it needs at least {LEAST_CHARACTERS}, as "
            "`openssl rand -hex 32` prints."
        )
    return key.encode(errors="surrogateescape") or None


def dump(marker: Marker, key: bytes | None = None) -> bytes:
    """Return the content of a marker's file. key: signs it."""
    # Not asdict(): its deep copies would take most of the time.
    body = {name: vars(marker)[name] for name in _FIELDS}
    text = _text(body)
    record = {"marker": body, "sha256": hashlib.sha256(text).hexdigest()}
    if marker.small:
        record["small"] = {name: b64encode(data).decode() for name, data in marker.small.items()}
    if key is not None:
        record["hmac"] = _sign(key, text)
    return json.dumps(record).encode()


def parse(key: str, data: bytes, *, dropped: bool, signed_with: bytes | None = None) -> Marker:
    """Read the content of a marker's file.

    key: of the entry.
    data: the content.
    dropped: whether it is the marker of a dropped entry.
    signed_with: the key that it must be signed with, if any.

    Raises:
        ValueError: it is not the marker of this entry; the text is the reason.
        Unsigned: it is, but it is not signed with the key.
    """
    try:
        record = parse_object(data)
        body = record["marker"]
        text = _text(body)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(NO_MARKER) from None
    if not isinstance(body, dict) or body.keys() != _FIELDS.keys():
        raise ValueError(NO_MARKER)
    if record.get("sha256") != hashlib.sha256(text).hexdigest() or body["key"] != key:
        raise ValueError("its marker was changed")
    wrong = next((name for name, check in _FIELDS.items() if not check(body[name])), None)
    if wrong is not None:
        raise ValueError(f"its marker has a wrong '{wrong}'")
    if body["dropped"] is not dropped:
        raise ValueError("its marker has the name of another kind")
    if signed_with is not None:
        signature = record.get("hmac")
        if not isinstance(signature, str) or not hmac.compare_digest(
            signature.encode(errors="replace"), _sign(signed_with, text).encode()
        ):
            raise Unsigned("not signed" if signature is None else "signed with another key")
    files = {name: FileFact(*fact) for name, fact in body["files"].items()}
    return Marker(**{**body, "files": files}, small=_small(record.get("small", {}), files))


def _small(packed: Any, files: Mapping[str, FileFact]) -> dict[str, bytes]:
    """Return the contents of packed files. Raises ValueError: one of them is not as `files` say."""
    if not isinstance(packed, dict) or not packed.keys() <= files.keys():
        raise ValueError("its marker has wrong files")
    contents = {}
    for name, text in packed.items():
        try:
            data = b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError):
            data = b""
        if FileFact(len(data), hashlib.sha256(data).hexdigest()) != files[name]:
            raise ValueError(f"{name} has other content")
        contents[name] = data
    return contents


def _is_file(item: tuple[str, Any]) -> bool:
    name, fact = item
    return (
        places.is_file(name)
        and isinstance(fact, list)
        and len(fact) == 2
        and is_count(fact[0])
        and isinstance(fact[1], str)
        and _SHA256.fullmatch(fact[1]) is not None
    )


def _text(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _sign(key: bytes, text: bytes) -> str:
    return hmac.new(key, _CONTEXT + text, hashlib.sha256).hexdigest()
