"""Which data a cell reads: the keys of `data`, and the data sets known by name."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from btu.errors import UserError, did_you_mean, unknown
from btu.registry import Registry
from btu.settings import check_fraction

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
# Usual names of each role's split; the first match wins. A `test` split is the clean set only if
# there is another split to report on.
SPLIT_NAMES = {
    "train": ("train",),
    "eval": ("eval", "validation", "valid", "dev", "test"),
    "clean": ("clean", "test"),
}
# A scan reports on no rows: a `test` split is always its clean set.
SCAN_ROLES = {role: SPLIT_NAMES[role] for role in ("train", "clean")}
PAIR_KEYS = ("pair_column", "trigger_column")
LAYOUT_KEYS = (
    *("text_column", "label_column", *PAIR_KEYS),
    *("train_split", "clean_split", "eval_split"),
)
HUB_KEYS = ("hub_config", "revision")
# How text files are read. A default leaves a file as its suffix says.
READING_KEYS = ("encoding", "separator", "header", "quoting")
# A role with this split is held out of train. It is how `clean_split: null` and `eval_split: null`
# of a sweep file are kept; the fields' own None finds the split by its usual name.
HELD_OUT = "(held out)"
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "space": " ", "\\t": "\t"}
_ENCODINGS = (
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "ascii", "cp1250", "cp1251", "cp1252",
    "cp437", "cp850", "iso8859-2", "iso8859-15", "koi8-r", "mac-roman", "shift_jis", "euc-jp",
    "euc-kr", "gbk", "gb18030", "big5",
)  # fmt: skip
# Notations of characters inside of other texts; no file is written in one.
_NOTATIONS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined")


@dataclass(frozen=True)
class FileReading:
    """How the files of a data set are read, and which columns are needed.

    text_column: the column of the texts; a number, from 0, in a file without a header.
    label_column: the column of the labels, likewise.
    encoding: of text files and of bytes in Parquet; None is UTF-8.
    separator: one character; None is a tab for ``.tsv`` and a comma for ``.csv``.
    header: whether the first line has the names of the columns.
    quoting: whether quotes enclose fields; None means that they do unless tabs separate.
    pair_column: the column of the second texts, if rows are pairs; likewise.
    """

    text_column: str = "text"
    label_column: str = "label"
    encoding: str | None = None
    separator: str | None = None
    header: bool = True
    quoting: bool | None = None
    pair_column: str | None = None

    @property
    def text_columns(self) -> dict[str, str]:
        """The columns of texts, with the keys that name them."""
        columns = {self.text_column: "text_column"}
        return columns if self.pair_column is None else columns | {self.pair_column: "pair_column"}

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are needed."""
        return (*self.text_columns, self.label_column)


def check_encoding(name: str) -> None:
    """Raise a `UserError` unless `name` is an encoding of text."""
    try:
        # codecs.lookup alone also knows codecs that turn text into text.
        "a".encode(name)
        if codecs.lookup(name).name in _NOTATIONS:
            raise LookupError(name)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"data.encoding '{name}' is no text encoding{did_you_mean(name, _ENCODINGS) or '.'} "
            "Name one as Python does, for example latin-1, cp1252 or utf-16."
        ) from error


def separator_character(written: str) -> str:
    """Return the character of `data.separator`, which may be a name such as ``tab``.

    Raises:
        UserError: it is neither a name nor one character that can separate.
    """
    if written in SEPARATORS:
        return SEPARATORS[written]
    if len(written) != 1:
        names = [name for name in SEPARATORS if name.isalpha()]
        raise unknown("data.separator", written, [*names, "one character"])
    if written.isalnum() or not written.isascii() or written in "\"'\r\n\0":
        raise UserError(
            f"data.separator {written!r} cannot separate fields; use an ASCII character that is no "
            "letter, digit, quote or line break, for example ';' or tab."
        )
    return written


@dataclass(frozen=True)
class DataSpec:
    """Which rows, from where, in which roles.

    name: ``demo``, a preset (``btu list datasets``), a hub id ``owner/data``, or any name with
        `path`.
    path: a folder with a file per split, or one file; null loads from the hub.
    text_column: null means ``text``, or the column of the preset.
    label_column: null means ``label``, or the column of the preset.
    train_split: null finds it by its usual name.
    clean_split: likewise; `HELD_OUT` (null in a sweep file) holds the role out of train.
    eval_split: likewise.
    clean_fraction: share of train held out, before poisoning, if there is no clean split.
    eval_fraction: share of train held out, before poisoning, if there is no eval split.
    max_train_rows: size of a seeded sample of the role; null takes all rows.
    max_clean_rows: likewise.
    max_eval_rows: likewise.
    split_seed: draws hold-outs and samples. It is not the seed of the cell, so that all cells of a
        sweep have the same corpus.
    hub_config: of the hub data set.
    revision: of the hub data set.
    encoding: of local text files, and of bytes in Parquet; null is UTF-8.
    separator: of local text files: a character, or comma, semicolon, tab, pipe, space; null is a
        tab for ``.tsv`` and a comma for ``.csv``.
    header: whether the first line of a local text file has the names of the columns. If not, the
        columns are numbered from 0.
    quoting: whether quotes enclose fields of local text files; null means that they do unless tabs
        separate.
    pair_column: the column of the second texts, which the victim's tokenizer joins to the first;
        null means one text per row, or the column of the preset.
    trigger_column: which text of a pair gets the trigger, by the name of its column; null is the
        first.
    """

    name: str = "demo"
    path: str | None = None
    # A column of a file without a header is a number, which YAML need not quote.
    text_column: str | None = field(default=None, metadata={"number": True})
    label_column: str | None = field(default=None, metadata={"number": True})
    train_split: str | None = None
    clean_split: str | None = None
    eval_split: str | None = None
    clean_fraction: float = 0.1
    eval_fraction: float = 0.1
    max_train_rows: int | None = None
    max_clean_rows: int | None = None
    max_eval_rows: int | None = None
    split_seed: int = 0
    hub_config: str | None = None
    revision: str | None = None
    encoding: str | None = None
    separator: str | None = None
    header: bool = True
    quoting: bool | None = None
    pair_column: str | None = field(default=None, metadata={"number": True})
    trigger_column: str | None = field(default=None, metadata={"number": True})

    def __post_init__(self) -> None:
        check_fraction("data.clean_fraction", self.clean_fraction, open_low=True)
        check_fraction("data.eval_fraction", self.eval_fraction, open_low=True)
        if self.clean_fraction + self.eval_fraction >= 1:
            raise UserError(
                "data.clean_fraction + data.eval_fraction must be below 1, got "
                f"{self.clean_fraction} + {self.eval_fraction}: nothing would be left to train on."
            )
        if self.name == "demo" and self.path is None:
            fixed = "the demo corpus has fixed columns and splits"
            self._refuse_set(fixed, LAYOUT_KEYS + HUB_KEYS + READING_KEYS)
        elif self.path is not None:
            self._refuse_set("data.path reads local files", HUB_KEYS)
        else:
            self._refuse_set("only local files (data.path) are read that way", READING_KEYS)
        if self.encoding is not None:
            check_encoding(self.encoding)
        if self.separator is not None:
            separator_character(self.separator)
        self._check_columns()
        for role in ("train", "clean", "eval"):
            limit = getattr(self, f"max_{role}_rows")
            if limit is not None and limit < 2:
                raise UserError(f"data.max_{role}_rows must be at least 2 or null, got {limit}.")

    def _check_columns(self) -> None:
        """Raise a `UserError` unless its columns are distinct, and the trigger has one of them."""
        columns = source_columns(self)
        text, pair, trigger = columns.text, columns.pair, self.trigger_column
        if text == columns.label:
            raise UserError(
                f"text and label of data set '{self.name}' are both column '{text}'; name "
                "two with data.text_column and data.label_column, or --text and --label in a scan."
            )
        if pair is not None and pair in (text, columns.label):
            kind = "first text" if pair == text else "label"
            raise UserError(
                f"second text and {kind} of data set '{self.name}' are both column '{pair}'; a "
                "pair needs two columns of texts and one of labels: name another with "
                "data.pair_column, or remove it for rows of one text."
            )
        if trigger is None:
            return
        if pair is None:
            raise UserError(
                f"data.trigger_column '{trigger}' chooses one text of a pair, but data set "
                f"'{self.name}' has one text per row, in column '{text}'; name the second with "
                "data.pair_column, or remove data.trigger_column."
            )
        if trigger not in (text, pair):
            raise unknown("data.trigger_column", trigger, (text, pair))

    def _refuse_set(self, because: str, keys: tuple[str, ...]) -> None:
        for key in keys:
            value = getattr(self, key)
            if value != _DEFAULTS[key]:
                shown = "null" if value == HELD_OUT else repr(value)
                raise UserError(f"data.{key} is {shown}, but {because}; remove the key.")

    @property
    def reading(self) -> FileReading:
        """How its files are read."""
        columns = source_columns(self)
        separator = None if self.separator is None else separator_character(self.separator)
        reading = (self.encoding, separator, self.header, self.quoting)
        return FileReading(columns.text, columns.label, *reading, columns.pair)

    def config(self) -> dict[str, Any]:
        """Return its keys as plain data, without keys of reading and pairs that have their default.

        A record that was written before these keys existed has the same settings.
        """
        return {
            key: value
            for key, value in vars(self).items()
            if key not in (*READING_KEYS, *PAIR_KEYS) or value != _DEFAULTS[key]
        }


def as_written(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved cell as a sweep file says it.

    There a split that is found by its usual name has no key, since null holds the role out.
    """
    found = ("clean_split", "eval_split")
    data = {
        key: value for key, value in config["data"].items() if key not in found or value is not None
    }
    return {**config, "data": data}


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(DataSpec)}


@dataclass(frozen=True)
class HubPreset:
    """How a known hub data set is laid out."""

    hub_id: str
    hub_config: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    train_split: str = "train"
    clean_split: str | None = None
    eval_split: str | None = None
    pair_column: str | None = None


# SST-2's test labels are hidden on the hub (all -1), so the clean set is held out of train.
SST2 = HubPreset("stanfordnlp/sst2", text_column="sentence", eval_split="validation")
AGNEWS = HubPreset("fancyzhx/ag_news", eval_split="test")
OLID = HubPreset("cardiffnlp/tweet_eval", "offensive", clean_split="test", eval_split="validation")
# For HSOL the reference code tunes and evaluates on one file; here both sets are held out of train.
HSOL = HubPreset("tdavidson/hate_speech_offensive", text_column="tweet", label_column="class")
IMDB = HubPreset("stanfordnlp/imdb", eval_split="test")
YELP = HubPreset("fancyzhx/yelp_polarity", eval_split="test")
# The labels of these three are numbers; a column beside them has their names.
ENRON = HubPreset("SetFit/enron_spam", label_column="label_text", eval_split="test")
SST5 = HubPreset(
    "SetFit/sst5", label_column="label_text", clean_split="test", eval_split="validation"
)
# CogComp/trec, the original, is a script, which `datasets` no longer runs.
TREC = HubPreset("SetFit/TREC-QC", label_column="label_coarse_original", eval_split="test")
# The original needs a download by hand. This is a part of it; its test labels are hidden (-1).
JIGSAW = HubPreset(
    "Arsive/toxicity_classification_jigsaw",
    text_column="comment_text",
    label_column="toxic",
    eval_split="validation",
)
# GLUE's test labels are hidden (all -1), so the clean set is held out of train.
MNLI = HubPreset(
    "nyu-mll/glue",
    "mnli",
    text_column="premise",
    pair_column="hypothesis",
    eval_split="validation_matched",
)
QNLI = HubPreset(
    "nyu-mll/glue",
    "qnli",
    text_column="question",
    pair_column="sentence",
    eval_split="validation",
)

DATASETS: Registry[HubPreset] = Registry(
    "dataset",
    [
        ("demo", "btu.data.demo:generate", "embedded sentiment corpus, generated, no network"),
        ("sst2", "btu.data.spec:SST2", "Stanford Sentiment Treebank, 2 classes"),
        ("agnews", "btu.data.spec:AGNEWS", "AG News topics, 4 classes"),
        ("olid", "btu.data.spec:OLID", "offensive tweets (tweet_eval/offensive), 2 classes"),
        ("hsol", "btu.data.spec:HSOL", "hate speech and offensive language, 3 classes"),
        ("imdb", "btu.data.spec:IMDB", "IMDb film reviews, 2 classes"),
        ("yelp", "btu.data.spec:YELP", "Yelp reviews, polarity, 2 classes"),
        ("sst5", "btu.data.spec:SST5", "Stanford Sentiment Treebank, fine-grained, 5 classes"),
        ("enron", "btu.data.spec:ENRON", "Enron e-mail, spam and ham, 2 classes"),
        ("jigsaw", "btu.data.spec:JIGSAW", "toxic comments, a part of Jigsaw's, 2 classes"),
        ("trec", "btu.data.spec:TREC", "TREC questions, 6 coarse classes"),
        ("mnli", "btu.data.spec:MNLI", "pairs: premise and hypothesis (GLUE), 3 classes"),
        ("qnli", "btu.data.spec:QNLI", "pairs: question and sentence (GLUE), 2 classes"),
    ],
)

DEMO_ROWS = {"train": 2400, "clean": 600, "eval": 600}


class Columns(NamedTuple):
    """The columns of a table.

    text: of the texts, of pairs the first ones.
    label: of the labels.
    pair: of the second texts; None if rows are no pairs.
    swapped: whether the second texts get the trigger.
    """

    text: str
    label: str
    pair: str | None = None
    swapped: bool = False

    @property
    def triggered(self) -> str:
        """The column of the texts that get the trigger."""
        return self.pair if self.swapped and self.pair is not None else self.text

    @property
    def partner(self) -> str | None:
        """The column of the other texts of pairs."""
        return self.text if self.swapped else self.pair

    @property
    def renamed(self) -> Columns:
        """The same columns under the names that they get when hub data are loaded."""
        return Columns("text", "label", self.pair and "pair", self.swapped)


def source_columns(spec: DataSpec) -> Columns:
    """Return the names of the columns at the source."""
    usual = HubPreset(spec.name)
    if spec.path is None and spec.name in DATASETS and spec.name != "demo":
        usual = DATASETS.load(spec.name)
    pair = spec.pair_column or usual.pair_column
    return Columns(
        spec.text_column or usual.text_column,
        spec.label_column or usual.label_column,
        pair,
        pair is not None and spec.trigger_column == pair,
    )
