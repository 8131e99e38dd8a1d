"""Read the tables of local files: Parquet, delimited text and JSON, packed or not.

Every file ends in a table or in a `UserError`, whatever its bytes are.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data.advice import advice, bad_bytes
from btu.data.labels import numbers_of
from btu.data.spec import SUFFIXES, FileReading
from btu.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
# Files that describe a data set; they are no splits.
DESCRIPTIONS = ("dataset_info", "dataset_infos", "dataset_dict", "state")


def suffixes() -> str:
    return f"{', '.join(SUFFIXES)}, perhaps with {', '.join(PACKED)}"


def split_and_suffix(path: Path) -> tuple[str, str]:
    """Return the name of a file without suffixes, and the suffix that tells its format.

    The suffix is in lower case, and empty if it tells no format.
    """
    inner = Path(path.stem) if path.suffix.lower() in PACKED else path
    suffix = inner.suffix.lower()
    return (inner.stem, suffix) if suffix in SUFFIXES else (path.stem, "")


def is_readable(path: Path, reading: FileReading = FileReading()) -> bool:  # noqa: B008
    """Return whether a file can be read, by its suffix. A separator makes any file a table."""
    split, suffix = split_and_suffix(path)
    if suffix == ".json" and split in DESCRIPTIONS:
        return False
    return bool(suffix) or (reading.separator is not None and path.is_file())


def is_delimited(path: Path) -> bool:
    """Return whether a file that can be read is text with separators."""
    return split_and_suffix(path)[1] in (".csv", ".tsv", "")


def read_file(path: Path, reading: FileReading) -> pd.DataFrame:
    """Return the table of a file.

    Its ``attrs`` have: ``from``, its path; ``warnings``, what looks wrong in it; ``names``, the
    class names of the labels, if the file has some.

    Labels are as the file has them, with three exceptions. Labels of delimited text are numbers if
    all are whole numbers. Numbers with class names are replaced by these. A number that stands for
    a missing class is missing.
    """
    if not is_readable(path, reading):
        raise UserError(
            f"data file {path} must end in one of {suffixes()}. A file of another name is read as "
            f"delimited text with data.separator, --separator in a scan.{_advice(path, reading)}"
        )
    suffix = split_and_suffix(path)[1]
    try:
        if suffix == ".parquet":
            table = _parquet(path, reading)
        elif suffix in (".json", ".jsonl"):
            table = _json(path, _decoded(path, reading))
        else:
            table = _delimited(path, _decoded(path, reading), reading)
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, RecursionError) as error:
        kind = suffix[1:] or "delimited text"
        raise UserError(f"{path} cannot be read as {kind}: {_reason(error)}") from error
    table.columns = [str(name) for name in table.columns]
    for column in reading.columns:
        if list(table.columns).count(column) > 1:
            raise UserError(f"{path} has two columns '{column}'; rename one of them.")
    table.attrs.setdefault("warnings", [])
    table.attrs["from"] = str(path)
    for column, key in reading.text_columns.items():
        check_texts(table, column, str(path), key)
    return table


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "its values are nested too deeply."
    return f"{error}" or type(error).__name__


def _advice(path: Path, reading: FileReading) -> str:
    try:
        raw = _bytes(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return ""
    return advice(raw, path, reading)


def column_advice(path: Path, reading: FileReading) -> str:
    """Return what to try if a file lacks a column; empty if nothing would help."""
    return _advice(path, reading) if is_delimited(path) else ""


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    unpack = PACKED.get(path.suffix.lower())
    return raw if unpack is None else unpack(raw)


def _decoded(path: Path, reading: FileReading) -> str:
    raw = _bytes(path)
    encoding = reading.encoding or "utf-8"
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        more = advice(raw, path, reading)
        raise UserError(f"{path} has {bad_bytes(raw, error, encoding)}.{more}") from error
    return text.removeprefix("\ufeff")


# Delimited text ----------------------------------------------------------------------------------


def _delimited(path: Path, text: str, reading: FileReading) -> pd.DataFrame:
    import pandas as pd

    tabs = split_and_suffix(path)[1] == ".tsv"
    separator = reading.separator or ("\t" if tabs else ",")
    # TSV data sets do not quote, and a lone quote would swallow rows.
    quoted = separator != "\t" if reading.quoting is None else reading.quoting
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
                header=0 if reading.header else None,
                # As they are written: "007" is no 7, whatever the other rows have.
                dtype=_as_written(reading.columns, reading.header),
                # A row whose text is "null" or "NA" is a row, not a missing value.
                keep_default_na=False,
                # Otherwise pandas takes the first field of rows longer than the header as index.
                index_col=False,
                # Otherwise the type of a column may change between two parts of a file.
                low_memory=False,
            )
    except pd.errors.ParserWarning as error:
        raise UserError(
            f"{path} has rows with more fields than its header ({error}); quote texts "
            f"that contain the separator, or use Parquet.{advice(text, path, reading)}"
        ) from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} is empty: at least 2 rows are needed.") from error
    except pd.errors.ParserError as error:
        if "EOF inside string" not in str(error):
            raise
        line = _records(text, separator)[-1][0]
        raise UserError(
            f"{path} cannot be read as delimited text: the quote in line {line} is never closed. "
            f"{UNQUOTED}"
        ) from error
    table.columns = [str(name) for name in table.columns]
    if reading.label_column in table and list(table.columns).count(reading.label_column) == 1:
        labels = table[reading.label_column].tolist()
        if quoted and '"' in text:
            table.attrs["warnings"] = _swallowed(path, text, separator, table, labels, reading)
        table[reading.label_column] = pd.Series(numbers_of(labels), dtype=object)
    return table


UNQUOTED = (
    "If a quote is a character of the texts, read without quoting: data.quoting=false, "
    "--no-quoting in a scan."
)


def _as_written(columns: Iterable[str], header: bool) -> dict[Any, type]:
    if header:
        return dict.fromkeys(columns, object)
    return {int(column): object for column in columns if column.isdecimal()}


def _records(text: str, separator: str) -> list[tuple[int, int, list[str]]]:
    """Return the records of delimited text: first line, last line (from 1) and fields of each."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        records, line = [], 1
        for fields in reader:
            records.append((line, reader.line_num, fields))
            line = reader.line_num + 1
        return records
    finally:
        csv.field_size_limit(limit)


def _swallowed(
    path: Path,
    text: str,
    separator: str,
    table: pd.DataFrame,
    labels: list[Any],
    reading: FileReading,
) -> list[str]:
    """Return a warning if rows were read as a part of another row's text.

    path: the file, for the warning.
    text: of the file.
    separator: of its fields.
    table: as it was read.
    labels: of the table.
    reading: how it was read.

    Texts may have several lines. A line counts as a row if it is one when it is read alone, with as
    many fields as there are columns and a label that other rows have.
    """
    breaks = max(text.count("\n"), text.count("\r"))
    if breaks <= len(table) + reading.header:
        return []
    place, known = list(table.columns).index(reading.label_column), set(labels)
    lines = io.StringIO(text, newline=None).read().split("\n")
    found: list[int] = []
    spans: list[tuple[int, int]] = []
    for first, last, _ in _records(text, separator):
        inside = [
            number
            for number in range(first + 1, last + 1)
            if _is_row(lines[number - 1], separator, len(table.columns), place, known)
            # A text of several lines ends with a quote, too, and then with the other fields.
            and (number < last or f'"{separator}' not in lines[number - 1])
        ]
        if inside:
            found += inside
            spans.append((first, last))
    if not found:
        return []
    where = ", ".join(f"{first}-{last}" for first, last in spans[:5])
    return [
        f"{path}: {len(found)} lines look like rows but were read as a part of other rows' texts, "
        f"because they stand between two quotes (lines {where}{' ...' if spans[5:] else ''}). "
        f"{UNQUOTED}"
    ]


def _is_row(line: str, separator: str, width: int, place: int, labels: set[Any]) -> bool:
    fields = line.split(separator)
    if len(fields) != width and '"' in line:
        fields = next(csv.reader([line], delimiter=separator), [])
    return len(fields) == width and fields[place].strip('"') in labels


# JSON --------------------------------------------------------------------------------------------


def _json(path: Path, text: str) -> pd.DataFrame:
    """Return the table of an array of objects, or of an object per line."""
    import pandas as pd

    # One by one: pandas would guess types ("007" is a text, not a 7).
    if text.lstrip()[:1] == "[":
        records = json.loads(text)
        places = [f"item {number}" for number in range(len(records))]
    else:
        records, places = [], []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                records.append(_json_line(path, number, line))
                places.append(f"line {number}")
    if not records:
        raise UserError(f"{path} is empty: at least 2 rows are needed.")
    for record, place in zip(records, places, strict=True):
        if not isinstance(record, dict):
            raise UserError(
                f"{path}: {place} is {type(record).__name__}, not an object with a text and a "
                "label."
            )
    return pd.DataFrame(records, dtype=object)


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        kind = split_and_suffix(path)[1][1:]
        raise UserError(
            f"{path} cannot be read as {kind}: line {number}: {error}; needed is an object per "
            "line, or one array of objects."
        ) from error


# Parquet -----------------------------------------------------------------------------------------


def _parquet(path: Path, reading: FileReading) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    try:
        table = _checked(path, reading)
        schema = table.schema
        frame: pd.DataFrame = table.to_pandas()
    except (UserError, OSError, EOFError, zlib.error, lzma.LZMAError):
        raise
    except Exception as error:
        # Damaged files end in errors of many types, also from the metadata of other programs.
        raise UserError(f"{path} cannot be read as parquet: {_reason(error)}") from error
    for name in reading.columns:
        if name in frame.index.names:
            frame = frame.reset_index()
    for name in reading.columns:
        if schema.names.count(name) != 1 or name not in frame:
            continue
        kind = schema.field(name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name in reading.text_columns and _is_nested(value):
            raise UserError(
                f"column '{name}' of {path} is of type {kind}, not text; "
                f"{_another(reading.text_columns[name])}"
            )
        if _is_bytes(value):
            decoded = _decoded_values(frame[name].tolist(), name, path, reading)
            frame[name] = pd.Series(decoded, dtype=object, index=frame.index)
    names = _class_names(schema, reading.label_column)
    if names is not None and reading.label_column in frame:
        frame[reading.label_column] = named_labels(
            frame[reading.label_column], names, f"column '{reading.label_column}' of {path}"
        )
        frame.attrs["names"] = names
    return frame


def _checked(path: Path, reading: FileReading) -> Any:
    """Return the Arrow table of a file, with every string decoded.

    Parquet does not enforce that strings are UTF-8, and Arrow reads the bytes as they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():
        table = pq.read_table(path)  # the parts of one table
    else:
        table = pq.ParquetFile(io.BytesIO(_bytes(path))).read()
    for place, field in enumerate(table.schema):
        if not pa.types.is_string(field.type) and not pa.types.is_large_string(field.type):
            continue
        try:
            table.column(place).validate(full=True)
        except pa.ArrowInvalid:
            raw = table.column(place).cast(pa.large_binary()).to_pylist()
            values = _decoded_values(raw, field.name, path, reading)
            table = table.set_column(place, field.name, pa.array(values, pa.large_string()))
    table.validate(full=True)
    return table


def _is_nested(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_nested(kind))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks) or str(kind) == "binary_view"


def _decoded_values(
    raw: Iterable[Any], name: str, path: Path, reading: FileReading
) -> list[str | None]:
    encoding = reading.encoding or "utf-8"
    values: list[str | None] = []
    for row, value in enumerate(raw):
        if not isinstance(value, bytes):
            values.append(None)
            continue
        try:
            values.append(value.decode(encoding))
        except UnicodeError as error:
            raise UserError(
                f"column '{name}' of {path} has bytes that are no {encoding} in row {row}: "
                f"{error}. If they are in another encoding, name it: data.encoding=latin-1, "
                "--encoding latin-1 in a scan."
            ) from error
    return values


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Return the class names that Hugging Face's datasets keep in a file's schema."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return None
    try:
        feature = json.loads(written)["info"]["features"][column]
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # the file can be read without
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) if len(set(names)) == len(names) > 0 else None


def named_labels(labels: pd.Series[Any], names: tuple[str, ...], where: str) -> pd.Series[Any]:
    """Return labels with numbers replaced by their class names; -1 means missing.

    labels: numbers of classes.
    names: of the classes, by number.
    where: the labels are, for errors.
    """
    import pandas as pd

    values: list[Any] = []
    for row, value in enumerate(labels.tolist()):
        if value is None or value == -1 or (isinstance(value, float) and value != value):
            values.append(None)
        elif isinstance(value, int | float) and 0 <= value < len(names) and value == int(value):
            values.append(names[int(value)])
        else:
            raise UserError(
                f"{where} has the label {value!r} in row {row}, but its {len(names)} class names "
                f"are numbered 0 to {len(names) - 1}."
            )
    return pd.Series(values, dtype=object, index=labels.index)


def _another(key: str) -> str:
    option = " (--text in a scan)" if key == "text_column" else ""
    return f"name another with data.{key}{option}, or write each text as one string."


def check_texts(table: pd.DataFrame, column: str, where: str, key: str = "text_column") -> None:
    """Raise a `UserError` for texts that are lists, objects or bytes: their notation is no text.

    table: the rows.
    column: of the texts; a table without it is not checked.
    where: the rows are, for errors.
    key: names the column in a sweep file.
    """
    if column not in table:
        return
    for row, value in enumerate(table[column].tolist()):
        if isinstance(value, list | dict | tuple | set | bytes | np.ndarray):
            names: dict[type, str] = {dict: "an object", bytes: "bytes"}
            kind = names.get(type(value), "a list")
            raise UserError(
                f"column '{column}' of {where} has {kind} in row {row}, not text; {_another(key)}"
            )
