"""What to try if a text file cannot be read: the keys and options that would read it.

Nothing here changes how a file is read. An encoding or a separator that is guessed may be wrong, so
it is proposed, and the user decides.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from btu.data.spec import SEPARATORS, FileReading
from btu.printing import is_number

# How much of a file is looked at.
BYTES = 1 << 20
RECORDS = 300
# Share of the records that must have the same number of fields.
REGULAR = 0.9
# No column has a longer name.
LONGEST_NAME = 60
# How scans call the keys.
OPTIONS = {
    "encoding": "--encoding",
    "separator": "--separator",
    "text_column": "--text",
    "label_column": "--label",
}


def bad_bytes(raw: bytes, error: UnicodeError, encoding: str) -> str:
    """Return where bytes are in another encoding, for a sentence."""
    if not isinstance(error, UnicodeDecodeError):
        return f"bytes that are no {encoding} ({error})"
    name = "UTF-8" if encoding == "utf-8" else encoding
    line = raw.count(b"\n", 0, error.start) + 1
    return f"bytes that are no {name} (0x{raw[error.start]:02x} in line {line})"


def advice(content: bytes | str, path: Path, reading: FileReading) -> str:
    """Return a sentence with the keys to try, with a space before it; empty if none would help.

    content: of the file; bytes if it is not decoded.
    path: the file; its suffix tells the separator.
    reading: how the file was read, without success.
    """
    keys = proposal(content, path, reading)
    if not keys:
        return ""
    as_keys = " ".join(shlex.quote(f"data.{key}={value}") for key, value in keys.items())
    options = " ".join(
        "--no-header" if key == "header" else f"{OPTIONS[key]} {shlex.quote(value)}"
        for key, value in keys.items()
    )
    return f" It may be read with {as_keys}; in a scan: {options}."


def proposal(content: bytes | str, path: Path, reading: FileReading) -> dict[str, str]:
    """Return keys, without their section, that differ from `reading` and may read the file."""
    keys: dict[str, str] = {}
    if isinstance(content, bytes):
        encoding, text = _decoded(content, reading)
        if encoding != (reading.encoding or "utf-8"):
            keys["encoding"] = encoding
    else:
        text = content[:BYTES]
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        return {}
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if {".json", ".jsonl", ".parquet"} & set(suffixes):
        return keys
    usual = "\t" if ".tsv" in suffixes else "," if ".csv" in suffixes else None
    found = _separator(text, reading, usual)
    if found is None:
        return keys
    separator, records = found
    if separator != (reading.separator or usual):
        names = {character: name for name, character in SEPARATORS.items() if name.isalpha()}
        keys["separator"] = names[separator] if separator in "\t " else separator
    return keys | _columns(records, reading)


def _decoded(raw: bytes, reading: FileReading) -> tuple[str, str]:
    """Return the most likely encoding, and the first part of the text in it."""
    start = raw[:BYTES]
    # A cut may go through a character.
    part = start if len(raw) <= BYTES else start[: start.rfind(b"\n") + 1]
    asked = reading.encoding or "utf-8"
    marks = ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    marked = [name for mark, name in marks if raw.startswith(mark)]
    zeros = (part[::2].count(0), part[1::2].count(0))
    if marked:
        tried = [marked[0]]
    elif max(zeros) > len(part) // 8:
        tried = ["utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"]
    else:
        tried = [asked, "utf-8"]
    for name in tried:
        try:
            # All of it: a byte of another encoding may be at the end.
            (raw if name in ("utf-8", asked) else part).decode(name)
            return name, part.decode(name, "replace")
        except UnicodeError:
            continue
    return "latin-1", part.decode("latin-1")


def _separator(
    text: str, reading: FileReading, usual: str | None
) -> tuple[str, list[list[str]]] | None:
    """Return the separator that gives regular records, and the first records."""
    first = [reading.separator] if reading.separator else [usual] if usual else []
    regular: list[tuple[int, str, list[list[str]]]] = []
    for separator in dict.fromkeys([*first, "\t", ",", ";", "|"]):
        records = _records(text, separator, reading.quoting)
        if len(records) < 2:
            continue
        width, count = Counter(map(len, records)).most_common(1)[0]
        if width < 2 or count < REGULAR * len(records):
            continue
        if separator in first:
            return separator, records
        regular.append((width, separator, records))
    return max(regular, key=lambda found: found[0])[1:] if regular else None


def _records(text: str, separator: str, quoting: bool | None) -> list[list[str]]:
    quoted = separator != "\t" if quoting is None else quoting
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    records: list[list[str]] = []
    try:
        for fields in reader:
            if fields:
                records.append(fields)
            if len(records) > RECORDS:
                break
    except csv.Error:
        return []
    return records


def _columns(records: Sequence[list[str]], reading: FileReading) -> dict[str, str]:
    """Return the keys for the header and for the columns.

    records: of the file.
    reading: how the file was read.
    """
    width = Counter(map(len, records)).most_common(1)[0][0]
    rows = [fields for fields in records[1:] if len(fields) == width]
    names, keys = records[0], dict[str, str]()
    header = reading.header and not _is_row(names, rows)
    if not header:
        rows, names = [records[0], *rows], [str(number) for number in range(width)]
        if reading.header:
            keys["header"] = "false"
    wanted = {"text_column": reading.text_column, "label_column": reading.label_column}
    missing = [key for key, name in wanted.items() if name not in names]
    if missing:
        taken = [name for name in reading.columns if name in names]
        keys |= {
            key: name
            for key, name in _likely(rows, names, taken).items()
            if key in missing and name != wanted[key]
        }
    return keys


def _is_row(first: Sequence[str], rows: Sequence[list[str]]) -> bool:
    """Return whether the first record is a row like the others, and not a header."""
    if any(len(name) > LONGEST_NAME or is_number(name) for name in first):
        return True
    return any(
        name and name in {fields[place] for fields in rows}
        for place, name in enumerate(first)
        if all(place < len(fields) for fields in rows)
    )


def _likely(
    rows: Sequence[list[str]], names: Sequence[str], taken: Sequence[str]
) -> Mapping[str, str]:
    """Return the columns that look like texts (the longest) and like labels (few values)."""
    free = [place for place, name in enumerate(names) if name not in taken]
    values = {place: [row[place] for row in rows if place < len(row)] for place in free}
    lengths = {place: sum(map(len, found)) for place, found in values.items()}
    if not free or not max(lengths.values()):
        return {}
    text = max(free, key=lambda place: lengths[place])
    found = {"text_column": names[text]}
    kinds = {place: len(set(values[place])) for place in free if place != text}
    several = [place for place, count in kinds.items() if 1 < count <= max(2, len(rows) // 2)]
    if several:
        found["label_column"] = names[min(several, key=lambda place: kinds[place])]
    return found
