"""What a defense returns: suspicious tokens and rows, and the verdicts of a screen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from btu.stage_files import read_table, rows_of_table, text_table, write_table
from btu.types import BoolArray, FloatArray, IntArray, Rows, as_bytes, as_texts

SUSPECTS, ROWS, SCREENED = "suspects.parquet", "rows.parquet", "screened.parquet"
INCOMING = "incoming.parquet"


@dataclass(frozen=True)
class Suspects:
    """The findings of a defense that searches the training set for the poison.

    flagged: vocabulary ids of the suspected trigger tokens, in the order of detection; None if the
        defense searches for rows only.
    scores: (vocabulary,) the score behind `flagged`: higher is more suspicious, NaN for tokens
        that are not candidates; None if there is no score.
    table: further (vocabulary,) columns to report, by name.
    rows: (training rows,) how suspicious each row is; None if the defense does not score rows.
    row_bar: the lowest score of a flagged row.
    taken: (training rows,) the rows that it isolated or removed; None if it takes none itself.
    target: the class index that it guesses to be the attack's target; None if it does not guess.
    """

    flagged: tuple[int, ...] | None = None
    scores: FloatArray | None = None
    table: Mapping[str, FloatArray | IntArray] = field(default_factory=dict)
    rows: FloatArray | None = None
    row_bar: float = math.nan
    taken: BoolArray | None = None
    target: int | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The flagged tokens; none if the defense searches for rows only."""
        return self.flagged or ()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the columns into a stage's folder; return the facts to report."""
        columns = {name: np.asarray(values) for name, values in self.table.items()}
        if self.scores is not None:
            columns["score"] = self.scores
        if columns:
            write_table(folder / SUSPECTS, columns)
        rows = {"suspicion": self.rows, "taken": self.taken}
        rows = {name: values for name, values in rows.items() if values is not None}
        if rows:
            write_table(folder / ROWS, rows)
        bar = None if math.isnan(self.row_bar) else self.row_bar
        flagged = None if self.flagged is None else list(self.flagged)
        facts = {"flagged": flagged, "row_bar": bar}
        return facts if self.target is None else {**facts, "target_guess": self.target}

    @classmethod
    def load(cls, folder: Path, facts: Mapping[str, Any]) -> Suspects | None:
        """Read what `save` wrote; None for a defense that does not search for the poison."""
        # Facts written before rows had a bar list the flagged tokens only.
        if "row_bar" not in facts and facts.get("flagged") is None:
            return None
        columns: dict[str, Any] = {}
        if (folder / SUSPECTS).is_file():
            columns = read_table(folder / SUSPECTS)
        rows: dict[str, Any] = {}
        if (folder / ROWS).is_file():
            rows = read_table(folder / ROWS)
        flagged, bar = facts["flagged"], facts.get("row_bar")
        return cls(
            None if flagged is None else tuple(flagged),
            columns.pop("score", None),
            columns,
            rows.get("suspicion"),
            math.nan if bar is None else bar,
            rows.get("taken"),
            facts.get("target_guess"),
        )


@dataclass(frozen=True)
class Screened:
    """The verdict of a screening defense on incoming texts, in their order.

    accepted: (texts,) False for a rejected text, which the model does not read.
    texts: what the model reads instead; None if the texts are not changed.
    """

    accepted: BoolArray
    texts: tuple[str, ...] | None = None

    def save(self, folder: Path) -> None:
        """Write into a screening stage's folder."""
        columns: dict[str, Any] = {"accepted": np.asarray(self.accepted, dtype=bool)}
        if self.texts is not None:
            columns["text"] = as_bytes(self.texts)
        write_table(folder / SCREENED, columns)

    @classmethod
    def load(cls, folder: Path) -> Screened:
        """Read what `save` wrote."""
        table = read_table(folder / SCREENED)
        return cls(table["accepted"], as_texts(table["text"]) if "text" in table else None)


def write_incoming(folder: Path, parts: Sequence[Rows]) -> int:
    """Write what a screening stage reads, and return how much: each text or pair of `parts` once.

    They are in the order of their hashes, which hides which are triggered.
    """
    texts = {row for rows in parts for row in rows.inputs}
    ordered = sorted(texts, key=lambda row: hashlib.sha256(b"\0".join(as_bytes(row))).digest())
    rows = parts[0].take([0] * len(ordered)).with_parts(list(zip(*ordered, strict=True)))
    write_table(folder / INCOMING, text_table(rows))
    return len(ordered)


def incoming_of(folder: Path) -> Rows:
    """Return the texts that a screening stage reads; all their labels are 0."""
    table = read_table(folder / INCOMING)
    return rows_of_table(table, (0,) * len(table["text"]))
