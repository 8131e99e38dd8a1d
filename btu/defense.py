"""The protocol of a defense, and what it hands back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from btu.errors import unknown
from btu.registry import Registry
from btu.types import FloatArray, IntArray

if TYPE_CHECKING:
    from btu.foundation import Foundation
    from btu.stages import Stage

DEFENSES: Registry[type[Defense]] = Registry(
    "defense",
    [
        ("btu", "btu.defenses.token_unlearning:TokenUnlearning", "Backdoor Token Unlearning"),
        ("none", "btu.defenses.none:NoDefense", "nothing is done: the control"),
    ],
)

SUSPECTS, ROWS = "suspects.parquet", "rows.parquet"


@dataclass(frozen=True)
class DefenseSpec:
    """Which defense runs; its own hyperparameters stand beside the name in a config."""

    name: str = "btu"

    def __post_init__(self) -> None:
        if self.name not in DEFENSES:
            raise unknown("defense", self.name, DEFENSES)


@dataclass(frozen=True)
class Suspects:
    """What a defense that looks for tokens found.

    flagged: vocabulary ids it took for trigger tokens, in the order of its finding.
    scores: (vocabulary,) the ranking behind `flagged`, higher is more suspicious, NaN for what is
    no candidate; None where there is no ranking. table: further (vocabulary,) columns worth
    keeping, by name. rows: (training rows,) how suspicious each row is; None where it is not said.
    row_bar: from where a row counts as flagged.
    """

    flagged: tuple[int, ...]
    scores: FloatArray | None = None
    table: Mapping[str, FloatArray | IntArray] = field(default_factory=dict)
    rows: FloatArray | None = None
    row_bar: float = math.nan

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the columns into a stage's folder; return what belongs into its facts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: np.asarray(values) for name, values in self.table.items()}
        if self.scores is not None:
            columns["score"] = self.scores
        if columns:
            pq.write_table(pa.table(columns), folder / SUSPECTS)
        if self.rows is not None:
            pq.write_table(pa.table({"suspicion": self.rows}), folder / ROWS)
        bar = None if math.isnan(self.row_bar) else self.row_bar
        return {"flagged": list(self.flagged), "row_bar": bar}

    @classmethod
    def load(cls, folder: Path, facts: Mapping[str, Any]) -> Suspects | None:
        """Read what `save` wrote; None of a defense that does not look for tokens."""
        import pyarrow.parquet as pq

        if facts.get("flagged") is None:
            return None
        columns: dict[str, Any] = {}
        if (folder / SUSPECTS).is_file():
            table = pq.read_table(folder / SUSPECTS)
            columns = {name: table[name].to_numpy() for name in table.column_names}
        rows = None
        if (folder / ROWS).is_file():
            rows = pq.read_table(folder / ROWS)["suspicion"].to_numpy()
        bar = facts.get("row_bar")
        return cls(
            tuple(facts["flagged"]),
            columns.pop("score", None),
            columns,
            rows,
            math.nan if bar is None else bar,
        )


class Defense(Protocol):
    """A defense: a frozen dataclass whose fields are its hyperparameters.

    A class attribute ``PRESETS`` (name -> values by field) lets a config name sets of them; one of
    the names is ``default``.
    """

    def check(self, vocabulary: int) -> None:
        """Raise a `UserError` where the hyperparameters cannot work on such a vocabulary.

        Called before anything is trained.
        """
        ...

    def stages(self, base: Foundation) -> Stage:
        """Declare the defense's stages and return the last one.

        Its result holds the defended model (`btu.foundation.save_model`) and, where the defense
        looks for tokens, what it found (`Suspects.save`, its return value among the stage's
        facts). One that changes nothing returns the foundation's own model. Whatever does not
        depend on a threshold belongs into stages of its own, which all thresholds then share.
        Names are unique within a cell. Called while planning: imports no
        torch.
        """
        ...
