"""What a defense hands back: suspicious tokens and rows, and what a screen lets through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.types import BoolArray, FloatArray, IntArray, Rows, as_bytes, as_texts

if TYPE_CHECKING:
    pass

SUSPECTS, ROWS, SCREENED = "suspects.parquet", "rows.parquet", "screened.parquet"
INCOMING = "incoming.parquet"


@dataclass(frozen=True)
class Suspects:
    """What a defense that looks for the poison found in the training set.

    flagged: vocabulary ids it took for trigger tokens, in the order of its finding; None where it
    looks for rows alone.
    scores: (vocabulary,) the ranking behind `flagged`, higher is more suspicious, NaN for what is
    no candidate; None where there is no ranking. table: further (vocabulary,) columns worth
    keeping, by name. rows: (training rows,) how suspicious each row is; None where it is not said.
    row_bar: from where a row counts as flagged. taken: (training rows,) those that it isolated or
    removed; None where it takes none by itself. target: the class index that it takes for the
    attack's target; None where it does not guess.
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
        """The flagged tokens; none where it looks for rows alone."""
        return self.flagged or ()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the columns into a stage's folder; return what belongs into its facts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: np.asarray(values) for name, values in self.table.items()}
        if self.scores is not None:
            columns["score"] = self.scores
        if columns:
            pq.write_table(pa.table(columns), folder / SUSPECTS)
        rows = {"suspicion": self.rows, "taken": self.taken}
        rows = {name: values for name, values in rows.items() if values is not None}
        if rows:
            pq.write_table(pa.table(rows), folder / ROWS)
        bar = None if math.isnan(self.row_bar) else self.row_bar
        flagged = None if self.flagged is None else list(self.flagged)
        facts = {"flagged": flagged, "row_bar": bar}
        return facts if self.target is None else {**facts, "target_guess": self.target}

    @classmethod
    def load(cls, folder: Path, facts: Mapping[str, Any]) -> Suspects | None:
        """Read what `save` wrote; None of a defense that looks for nothing."""
        import pyarrow.parquet as pq

        # Tokens alone: facts of before there was a bar of rows.
        if "row_bar" not in facts and facts.get("flagged") is None:
            return None
        columns: dict[str, Any] = {}
        if (folder / SUSPECTS).is_file():
            table = pq.read_table(folder / SUSPECTS)
            columns = {name: table[name].to_numpy() for name in table.column_names}
        rows: dict[str, Any] = {}
        if (folder / ROWS).is_file():
            table = pq.read_table(folder / ROWS)
            rows = {name: table[name].to_numpy() for name in table.column_names}
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
    """What a defense makes of texts on their way to the model, in the order of their coming.

    accepted: (texts,) False is turned away: the model is not asked. texts: what the model reads
    instead; None where they stay as they came.
    """

    accepted: BoolArray
    texts: tuple[str, ...] | None = None

    def save(self, folder: Path) -> None:
        """Write into a screening stage's folder."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"accepted": np.asarray(self.accepted, dtype=bool)}
        if self.texts is not None:
            columns["text"] = pa.array(as_bytes(self.texts), pa.binary())
        pq.write_table(pa.table(columns), folder / SCREENED)

    @classmethod
    def load(cls, folder: Path) -> Screened:
        """Read what `save` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(folder / SCREENED)
        texts = None
        if "text" in table.column_names:
            texts = as_texts(table["text"].to_pylist())
        return cls(table["accepted"].to_numpy(), texts)


def incoming_of(folder: Path) -> Rows:
    """Return the texts that a screening stage reads; all their labels are 0."""
    import pyarrow.parquet as pq

    texts = as_texts(pq.read_table(folder / INCOMING)["text"].to_pylist())
    return Rows(texts, (0,) * len(texts))
