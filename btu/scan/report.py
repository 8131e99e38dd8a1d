"""What a scan found: tokens and rows as tables, and where they are written."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.defenses.token_unlearning import (
    candidate_tokens,
)
from btu.errors import UserError
from btu.findings import Suspects
from btu.paths import is_open, nearest
from btu.rules.base import RULES, rows_and_tokens, rows_by_class
from btu.scan.plan import prepare_scan
from btu.stage_files import (
    load_encoded,
)
from btu.stages import compute, read_record
from btu.types import IntArray, Progress, ProgressCallback, silent
from btu.victims import tokenizable

if TYPE_CHECKING:
    import pandas as pd

    from btu.scan.plan import ScanPlan
TABLES = (".csv", ".parquet", ".jsonl")
EXCERPT = 88
# Stages of a sweep are named after its attack; here nobody knows of one.
_SHOWN = {"poisoned fine-tune": "fine-tune", "clean tuning (defended)": "clean tuning"}


# The report --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A row that holds a token. row: its number. excerpt: its text, cut around the token."""

    row: int
    label: str
    excerpt: str


@dataclass(frozen=True)
class ScanReport:
    """What a scan found.

    root: where its stages are. bar: the score from which a token is flagged. flagged: how many are.
    tokens: a row per token of the suspect rows, most suspicious first: ``rank``, ``token_id``,
    ``token``, ``score`` (NaN where the rule has no opinion), ``flagged``, ``count``, ``rows``,
    ``class`` (in which it stands oftener than by chance), ``share`` (of its rows that are of that
    class), ``class_share`` (of all rows), ``clean_rows`` (trusted rows that hold it),
    ``rows[LABEL]``, and what the defense adds. rows: all suspect rows, most suspicious first:
    ``row``, ``suspicion`` (NaN without trusted rows), ``label``, ``flagged`` (the tokens of that
    kind that it holds), ``text``.
    """

    plan: ScanPlan
    root: Path
    bar: float
    flagged: int
    tokens: pd.DataFrame
    rows: pd.DataFrame

    @property
    def highest(self) -> float:
        """The highest score; NaN where no token could be scored."""
        return float(self.tokens["score"].max())

    @property
    def suspicious_rows(self) -> pd.DataFrame:
        """The rows that hold a flagged token."""
        return self.rows[self.rows["flagged"] != ""]

    def examples(self, token_id: int, count: int = 2) -> list[Example]:
        """Return the most suspicious rows that hold a token, those of its class first."""
        found = self.tokens[self.tokens["token_id"] == token_id]
        if found.empty:
            return []
        label = found["class"].iloc[0]
        rows, tokens = self._pairs
        held = set(rows[tokens == token_id].tolist())
        ranked = [i for i in self.rows.index if i in held]
        labels = self.rows["label"]
        ranked.sort(key=lambda i: labels[i] != label)  # stable
        tokenizer = self.plan.load_victim().tokenizer
        numbers, texts = self.rows["row"], self.plan.corpus.train.texts
        return [
            Example(int(numbers[i]), str(labels[i]), excerpt(tokenizer, texts[i], token_id))
            for i in ranked[:count]
        ]

    @cached_property
    def _pairs(self) -> tuple[IntArray, IntArray]:
        train = _train_rows(self.plan, self.root)
        return rows_and_tokens(train, 1 + int(train.ids.max()))

    def summary(self, top: int = 10) -> dict[str, Any]:
        """Return the report as plain data: the flagged tokens, and `top` if fewer are flagged."""
        plan = self.plan
        shown = self.tokens.head(max(top, self.flagged))
        records = json.loads(shown.to_json(orient="records"))
        for record in records:
            record["examples"] = [vars(e) for e in self.examples(record["token_id"])]
        return {
            "data": plan.spec.name,
            "data_fingerprint": plan.corpus.fingerprint(),
            "counts": plan.corpus.counts(),
            "labels": list(plan.corpus.label_names),
            "contradicted_rows": list(plan.data.contradicted),
            "trusted_from": plan.data.trusted,
            "victim": plan.victim.name,
            "victim_identity": plan.identity,
            "rule": plan.defense.rule,
            "threshold": plan.threshold,
            "bar": self.bar,
            "highest": None if math.isnan(self.highest) else self.highest,
            "least_rows": dict(plan.least),
            "flagged": self.flagged,
            "suspicious_rows": len(self.suspicious_rows),
            "tokens": records,
        }


def scan(
    data: str | Path,
    root: str | Path,
    *,
    gpus: float = 0,
    progress: ProgressCallback = silent,
    **settings: Any,
) -> ScanReport:
    """Scan a data set; settings: of `prepare_scan`. See `run_scan`."""
    return run_scan(prepare_scan(data, **settings), root, gpus=gpus, progress=progress)


def run_scan(
    plan: ScanPlan, root: str | Path, *, gpus: float = 0, progress: ProgressCallback = silent
) -> ScanReport:
    """Run the exposure, flag, and read off what was found.

    root: where stages are kept by what they are made of: what is there is not computed again.
    """
    root = Path(root)
    folder = compute(plan.detection, root, gpus=gpus, progress=renamed(progress))
    suspects = Suspects.load(folder, read_record(folder)["facts"])
    assert suspects is not None
    assert plan.defense.rule is not None
    bar = RULES.load(plan.defense.rule).bar(plan.threshold)
    tokens = _token_table(plan, root, suspects)
    rows = _row_table(plan, root, suspects)
    return ScanReport(plan, root, bar, len(suspects.tokens), tokens, rows)


def renamed(progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that is told a scan's names of stages."""

    def shown(event: Progress) -> None:
        progress(replace(event, stage=_SHOWN.get(event.stage, event.stage)))

    return shown


def _train_rows(plan: ScanPlan, root: Path) -> Any:
    return load_encoded(root / plan.base.rows.key / "train.safetensors")


def _token_table(plan: ScanPlan, root: Path, suspects: Suspects) -> pd.DataFrame:
    import pandas as pd

    assert suspects.scores is not None
    train, victim, names = _train_rows(plan, root), plan.load_victim(), plan.corpus.label_names
    vocabulary = len(suspects.scores)
    flagged = np.zeros(vocabulary, dtype=bool)
    flagged[list(suspects.tokens)] = True
    candidates = candidate_tokens(victim, train, vocabulary, plan.defense.exclude)
    ids = np.flatnonzero(candidates | flagged)
    low = np.where(np.isnan(suspects.scores), -np.inf, suspects.scores)
    ids = ids[np.lexsort((ids, -low[ids], ~flagged[ids]))]
    held = rows_by_class(train, vocabulary, len(names))[ids]
    rows = held.sum(axis=1)
    prior = plan.class_rows() / len(train)
    excess = held / rows[:, None] - prior
    label = excess.argmax(axis=1)
    columns: dict[str, Any] = {
        "rank": np.arange(1, len(ids) + 1),
        "token_id": ids,
        "token": victim.tokenizer.convert_ids_to_tokens(ids.tolist()),
        "score": suspects.scores[ids],
        "flagged": flagged[ids],
        "count": suspects.table["count"][ids],
        "rows": rows,
        "class": [names[i] for i in label],
        "share": held[np.arange(len(ids)), label] / rows,
        "class_share": prior[label],
        "clean_rows": suspects.table["clean_rows"][ids],
    }
    columns |= {f"rows[{name}]": held[:, index] for index, name in enumerate(names)}
    # Told above, by what the rows say without trusted ones too.
    told = (*columns, "train_rows", "label")
    columns |= {name: v[ids] for name, v in suspects.table.items() if name not in told}
    return pd.DataFrame(columns)


def _row_table(plan: ScanPlan, root: Path, suspects: Suspects) -> pd.DataFrame:
    """Return the suspect rows, most suspicious first; the index is their place in the corpus."""
    import pandas as pd

    assert suspects.scores is not None
    assert suspects.rows is not None
    train, victim, corpus = _train_rows(plan, root), plan.load_victim(), plan.corpus
    rows, tokens = rows_and_tokens(train, len(suspects.scores))
    holds = np.isin(tokens, list(suspects.tokens))
    names = victim.tokenizer.convert_ids_to_tokens(list(suspects.tokens))
    place = {token: rank for rank, token in enumerate(suspects.tokens)}
    held: dict[int, list[int]] = {}
    for row, token in zip(rows[holds].tolist(), tokens[holds].tolist(), strict=True):
        held.setdefault(row, []).append(place[token])
    # Where no row is known to be clean, none is more suspicious than another by its words; by its
    # most suspicious token it still is.
    top = np.full(len(train), -np.inf)
    scores = suspects.scores[tokens]
    np.maximum.at(top, rows, np.where(np.isnan(scores), -np.inf, scores))
    suspicion = suspects.rows if len(corpus.clean) else np.full(len(train), np.nan)
    order = np.lexsort((np.arange(len(train)), -top, -np.nan_to_num(suspicion)))
    table = pd.DataFrame(
        {
            "row": plan.data.numbers,
            "suspicion": suspicion,
            "label": [corpus.label_names[label] for label in corpus.train.labels],
            "flagged": [
                " ".join(names[rank] for rank in sorted(held.get(row, ())))
                for row in range(len(train))
            ],
            # pandas' own strings hold no lone surrogates, which occur in scraped text.
            "text": pd.Series(corpus.train.texts, dtype=object),
        }
    )
    return table.iloc[order]


def excerpt(tokenizer: Any, text: str, token_id: int, width: int = EXCERPT) -> str:
    """Return at most `width` characters of a text around a token, on one line.

    Without what is not printable: a text of unknown origin may steer a terminal.
    """
    start = 0
    if tokenizer.is_fast:
        encoded = tokenizer(tokenizable(text), return_offsets_mapping=True)
        if token_id in encoded["input_ids"]:
            start = encoded["offset_mapping"][encoded["input_ids"].index(token_id)][0]
    first = max(0, min(start - width // 3, len(text) - width))
    # An ellipsis each where something is left out, within the width.
    left, right = first > 0, first + width < len(text)
    part = text[first + left : first + width - right]
    line = "".join(c if c.isprintable() else " " for c in part)
    return f"{'…' if left else ''}{line}{'…' if right else ''}"


def score_text(score: float) -> str:
    """Return a score for people: two decimals, or three digits where these say nothing."""
    return f"{score:.2f}" if abs(score) >= 1 else f"{score:.3g}"


def write_report(frame: pd.DataFrame, path: Path) -> None:
    """Write a table of a report as CSV, Parquet or JSON lines, by the suffix.

    Raises:
        UserError: it cannot be written there.
    """
    check_table(path)
    storable = frame.copy()
    if "text" in storable:
        # No file holds lone surrogates either.
        storable["text"] = [
            text.encode("utf-8", "backslashreplace").decode() for text in storable["text"]
        ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            # A carriage return in a text, which the writer does not quote of itself, ends a row for
            # readers: whoever wrote the text could add rows.
            storable.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)
        elif path.suffix == ".parquet":
            storable.to_parquet(path, index=False)
        else:
            storable.to_json(path, orient="records", lines=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name another file."
        ) from error


def check_table(path: Path) -> None:
    """Raise a `UserError` unless `write_report` can write a table there; nothing is made."""
    if path.suffix not in TABLES:
        raise UserError(f"{path} must end in one of {', '.join(TABLES)}.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file in it, or another.")
    why = obstacle(path.parent)
    if not why and os.path.exists(path) and not os.access(path, os.W_OK):
        why = "it is read-only"
    if why:
        raise UserError(f"{path} cannot be written ({why}); name another file.")


def obstacle(folder: Path) -> str:
    """Return why no file can be made in a folder, there or not yet; empty where one can be."""
    place = nearest(folder)
    if not os.path.isdir(place):
        return f"{place} is no folder"
    return "" if is_open(place) else f"folder {place} is read-only"
