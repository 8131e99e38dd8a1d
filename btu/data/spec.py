"""Which data a cell reads: the keys of `data`, and the data sets known by name."""

from __future__ import annotations

from dataclasses import dataclass

from btu.errors import UserError
from btu.registry import Registry
from btu.settings import check_fraction

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
# Usual names of each role's split; the first match wins. A `test` split is the clean set only if
# there is another split to report on.
SPLIT_NAMES = {
    "train": ("train",),
    "eval": ("eval", "validation", "valid", "dev", "test"),
    "clean": ("clean", "test"),
}
# A scan reports on no rows: a `test` split is always its clean set.
SCAN_ROLES = {role: SPLIT_NAMES[role] for role in ("train", "clean")}
LAYOUT_KEYS = ("text_column", "label_column", "train_split", "clean_split", "eval_split")
HUB_KEYS = ("hub_config", "revision")


@dataclass(frozen=True)
class DataSpec:
    """Which rows, from where, in which roles.

    name: ``demo``, a preset (``btu list datasets``), a hub id ``owner/data``, or any name with
        `path`.
    path: a folder with a file per split, or one file; null loads from the hub.
    text_column: null means ``text``, or the column of the preset.
    label_column: null means ``label``, or the column of the preset.
    train_split: null finds it by its usual name.
    clean_split: likewise.
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
    """

    name: str = "demo"
    path: str | None = None
    text_column: str | None = None
    label_column: str | None = None
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

    def __post_init__(self) -> None:
        check_fraction("data.clean_fraction", self.clean_fraction, open_low=True)
        check_fraction("data.eval_fraction", self.eval_fraction, open_low=True)
        if self.clean_fraction + self.eval_fraction >= 1:
            raise UserError(
                "data.clean_fraction + data.eval_fraction must be below 1, got "
                f"{self.clean_fraction} + {self.eval_fraction}: nothing would be left to train on."
            )
        if self.name == "demo" and self.path is None:
            self._refuse_set("the demo corpus has fixed columns and splits", LAYOUT_KEYS + HUB_KEYS)
        elif self.path is not None:
            self._refuse_set("data.path reads local files", HUB_KEYS)
        text_column, label_column = source_columns(self)
        if text_column == label_column:
            raise UserError(
                f"text and label of data set '{self.name}' are both column '{text_column}'; name "
                "two with data.text_column and data.label_column, or --text and --label in a scan."
            )
        for role in ("train", "clean", "eval"):
            limit = getattr(self, f"max_{role}_rows")
            if limit is not None and limit < 2:
                raise UserError(f"data.max_{role}_rows must be at least 2 or null, got {limit}.")

    def _refuse_set(self, because: str, keys: tuple[str, ...]) -> None:
        for key in keys:
            if getattr(self, key) is not None:
                raise UserError(
                    f"data.{key} is {getattr(self, key)!r}, but {because}; leave it null."
                )


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


# SST-2's test labels are hidden on the hub (all -1), so the clean set is held out of train.
SST2 = HubPreset("stanfordnlp/sst2", text_column="sentence", eval_split="validation")
AGNEWS = HubPreset("fancyzhx/ag_news", eval_split="test")
OLID = HubPreset("cardiffnlp/tweet_eval", "offensive", clean_split="test", eval_split="validation")
# For HSOL the reference code tunes and evaluates on one file; here both sets are held out of train.
HSOL = HubPreset("tdavidson/hate_speech_offensive", text_column="tweet", label_column="class")
IMDB = HubPreset("stanfordnlp/imdb", eval_split="test")

DATASETS: Registry[HubPreset] = Registry(
    "dataset",
    [
        ("demo", "btu.data.demo:generate", "embedded sentiment corpus, generated, no network"),
        ("sst2", "btu.data.spec:SST2", "Stanford Sentiment Treebank, 2 classes"),
        ("agnews", "btu.data.spec:AGNEWS", "AG News topics, 4 classes"),
        ("olid", "btu.data.spec:OLID", "offensive tweets (tweet_eval/offensive), 2 classes"),
        ("hsol", "btu.data.spec:HSOL", "hate speech and offensive language, 3 classes"),
        ("imdb", "btu.data.spec:IMDB", "IMDb film reviews, 2 classes"),
    ],
)

DEMO_ROWS = {"train": 2400, "clean": 600, "eval": 600}


def source_columns(spec: DataSpec) -> tuple[str, str]:
    """Return the names of the text and label columns at the source."""
    usual = HubPreset(spec.name)
    if spec.path is None and spec.name in DATASETS and spec.name != "demo":
        usual = DATASETS.load(spec.name)
    return spec.text_column or usual.text_column, spec.label_column or usual.label_column
