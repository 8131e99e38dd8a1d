"""Files at random: whatever their bytes, types and labels are, rows or a `UserError` come out.

Seeds are fixed, so that a failure can be repeated: the parameter of the test is the seed.
"""

from __future__ import annotations

import datetime
import gzip
import json
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.data.suspects import load_suspects
from btu.errors import UserError

ROWS = 12
FILES = 40
ODD = [
    b'"', b"\0", b"\n", b"\r", b",", b"\t", b"{", b"[", b"\xff\xfe", b"\xef\xbb\xbf", b"-1",
    b"null", b"NaN", b"1e999", b"\xed\xa0\x80", b"\\ud800", b"=1", b"9" * 5000,
]  # fmt: skip
LABELS: list[Any] = [
    0, 1, -1, 2**70, True, False, "0", "1", "01", "1.0", "N/A", "", " ", "neg", "neg ", "NEG",
    "\x1b[31m", "a\nb", "\u202e", "x" * 5000, 0.0, 1.5, float("nan"), float("inf"), None,
]  # fmt: skip
ENCODINGS = ["latin-1", "utf-16", "utf-16-le", "utf-32", "utf-7", "cp1252", "shift_jis", "ascii"]


def ends_well(path: Path, **settings: Any) -> bool:
    """Load a file in both ways. Return whether rows came out; any error but `UserError` passes."""
    spec = DataSpec(name="mine", path=str(path), **settings)
    loaded = []
    for load in (load_corpus, lambda spec: load_suspects(spec).corpus):
        try:
            corpus = load(spec)
        except UserError:
            loaded.append(False)
            continue
        # What is not text could not be hashed, nor written into keys.
        assert all(isinstance(text, str) for text in corpus.train.texts)
        assert all(name.encode() for name in corpus.label_names)
        assert corpus.fingerprint()
        loaded.append(True)
    return any(loaded)


def test_the_check_sees_rows_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(as_csv(random.Random(0)))
    assert ends_well(path)
    assert not ends_well(path, text_column="nothing")


def as_csv(rng: random.Random) -> bytes:
    rows = [f'"row ""{i}"", it;\tis",{i % 2},style {i}' for i in range(ROWS)]
    return "\n".join(["text,label,style", *rows]).encode()


def as_tsv(rng: random.Random) -> bytes:
    return "\n".join(["text\tlabel", *(f"row é {i}\t{i % 2}" for i in range(ROWS))]).encode()


def as_lines(rng: random.Random) -> bytes:
    return "\n".join(
        json.dumps({"text": f"row é {i}", "label": i % 2}) for i in range(ROWS)
    ).encode()


def as_array(rng: random.Random) -> bytes:
    return json.dumps([{"text": f"row {i}", "label": i % 2} for i in range(ROWS)]).encode()


def as_parquet(rng: random.Random) -> bytes:
    frame = pd.DataFrame({"text": [f"row é {i}" for i in range(ROWS)], "label": [0, 1] * 6})
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pandas(frame)
    sink = pa.BufferOutputStream()
    kept = {**table.schema.metadata, **{k.encode(): v.encode() for k, v in meta.items()}}
    pq.write_table(
        table.replace_schema_metadata(kept), sink, compression=rng.choice(["none", "snappy"])
    )
    return sink.getvalue().to_pybytes()


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "csv": as_csv,
    "tsv": as_tsv,
    "jsonl": as_lines,
    "json": as_array,
    "parquet": as_parquet,
    "csv.gz": lambda rng: gzip.compress(as_csv(rng)),
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change, insert and delete some bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif kind == 1:
            changed[place:place] = rng.choice(ODD)
        elif kind == 2:
            del changed[place : place + rng.randrange(1, 20)]
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def reading(kind: str, rng: random.Random) -> dict[str, Any]:
    """Return keys that read text files in some way."""
    keys: dict[str, Any] = {}
    if kind in ("csv", "tsv", "csv.gz"):
        if rng.random() < 0.2:
            keys["separator"] = rng.choice([";", "tab", "space", "|", ","])
        if rng.random() < 0.2:
            keys |= {"header": False, "text_column": "0", "label_column": "1"}
        if rng.random() < 0.2:
            keys["quoting"] = rng.random() < 0.5
    if rng.random() < 0.2:
        keys["encoding"] = rng.choice(ENCODINGS)
    return keys


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_rows_or_an_error(tmp_path: Path, kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    for number in range(FILES):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(mutated(KINDS[kind](rng), rng))
        ends_well(path, **reading(kind, rng))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_labels_at_random_end_in_rows_or_an_error(tmp_path: Path, kind: str, seed: int) -> None:
    rng = random.Random(f"labels {kind} {seed}")
    some = 0
    for number in range(FILES):
        few = rng.sample(LABELS, rng.randrange(2, 5))
        rows = [{"text": f"row {i}", "label": rng.choice(few)} for i in range(ROWS)]
        path = tmp_path / f"{number}.{kind}"
        if kind == "csv":
            pd.DataFrame(rows, dtype=object).to_csv(path, index=False)
        else:
            path.write_text(
                json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
            )
        some += ends_well(path)
    assert some  # labels that can be classes are among them


def values(rng: random.Random) -> Any:
    """Return an Arrow array of a type at random, sometimes with missing values."""
    day = datetime.date(2020, 1, 1)
    made: list[tuple[Any, list[Any]]] = [
        *((kind, [0, 1]) for kind in (pa.int8(), pa.uint64(), pa.float32(), pa.float64())),
        (pa.float64(), [float("nan"), float("inf")]),
        (pa.bool_(), [True, False]),
        (pa.decimal128(10, 2), [Decimal("0.00"), Decimal("1.50")]),
        *((kind, ["é", "no"]) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *((kind, [b"\xe9", b"no"]) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
        (pa.binary(2), [b"ab", b"cd"]),
        (pa.date32(), [day, day]),
        (pa.timestamp("ns", "UTC"), [0, 10**18]),
        (pa.duration("s"), [0, 10**9]),
        (pa.time64("us"), [0, 10**6]),
        (pa.list_(pa.string()), [["a"], []]),
        (pa.list_(pa.int64(), 1), [[1], [2]]),
        (pa.struct([("a", pa.string())]), [{"a": "x"}, {"a": None}]),
        (pa.map_(pa.string(), pa.int64()), [[("a", 1)], []]),
        (pa.null(), [None, None]),
    ]
    kind, pair = rng.choice(made)
    missing = rng.choice([0, 0, 0.2, 1])
    array = pa.array(
        [None if rng.random() < missing else rng.choice(pair) for _ in range(ROWS)], kind
    )
    encodable = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_binary(kind)
    return array.dictionary_encode() if encodable and rng.random() < 0.3 else array


@pytest.mark.parametrize("seed", range(4))
def test_columns_of_any_type_end_in_rows_or_an_error(tmp_path: Path, seed: int) -> None:
    rng = random.Random(f"types {seed}")
    fine = pa.array([f"row {i}" for i in range(ROWS)])
    some = 0
    for number in range(FILES):
        columns = {"text": fine, "label": values(rng), "further": values(rng)}
        if rng.random() < 0.5:
            columns |= {"text": values(rng), "label": pa.array([0, 1] * (ROWS // 2))}
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(columns), path)
        some += ends_well(path, **reading("parquet", rng))
    assert some
