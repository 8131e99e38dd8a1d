"""What a scan found: tables of tokens and rows, and their files."""

from __future__ import annotations

import csv
import json
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.defenses.token_unlearning import candidate_tokens
from btu.errors import UserError
from btu.findings import Suspects
from btu.paths import check_file, not_written
from btu.printing import csv_text
from btu.rules import contrast
from btu.rules.base import DEFAULT_RULE, RULES, rows_and_tokens, rows_by_class
from btu.scan.plan import prepare_scan
from btu.scan.reading import Reading, Scanned, read_texts
from btu.stages import compute, read_record
from btu.types import IntArray, Progress, ProgressCallback, silent
from btu.victims import tokenizable

if TYPE_CHECKING:
    import pandas as pd

    from btu.scan.plan import ScanPlan

TABLES = (".csv", ".parquet", ".jsonl")
EXCERPT = 88
# How many of the words behind the unknown token the table of tokens names.
LISTED_WORDS = 50
# The stages of a sweep are named after its attack; a scan does not know one.
_SHOWN = {"poisoned fine-tune": "fine-tune", "clean tuning (defended)": "clean tuning"}


# The report --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A row that contains a token.

    row: its number.
    label: its label.
    excerpt: its text, cut around the token.
    """

    row: int
    label: str
    excerpt: str


@dataclass(frozen=True)
class ScanReport:
    """What a scan found.

    plan: the scan.
    root: the folder of its stages.
    bar: the lowest score of a flagged token.
    flagged: number of flagged tokens.
    tokens: a row per token of the suspect rows, most suspicious first: ``rank``, ``token_id``,
        ``token``, ``score`` (NaN if the rule cannot score it), ``flagged``, ``count``, ``rows``,
        ``class`` (in which it is most over-represented), ``share`` (of its rows that are of that
        class), ``class_share`` (of all rows), ``clean_rows`` (trusted rows that contain it),
        ``rows[LABEL]``, ``words`` (behind the unknown token, with their rows by class), the columns
        of the defense. With rule ``contrast`` these are ``surplus`` in the class where it is
        highest, ``surplus_left`` in rows that hold no more suspicious token, and ``drift_sigmas``,
        which weights it (`btu.rules.contrast.Parts`).
    rows: all suspect rows, most suspicious first: ``row``, ``suspicion`` (NaN without trusted
        rows), ``label``, ``flagged`` (the flagged tokens that it contains; the unknown token with
        the word that it stands for), ``text``.
    reading: how much of the rows the victim reads.
    """

    plan: ScanPlan
    root: Path
    bar: float
    flagged: int
    tokens: pd.DataFrame
    rows: pd.DataFrame
    reading: Reading

    @property
    def all_clear(self) -> bool:
        """Whether nothing was flagged and enough was read for that to mean something."""
        return not self.flagged and not self.reading.too_little

    @property
    def highest(self) -> float:
        """The highest score; NaN if no token could be scored."""
        return float(self.tokens["score"].max())

    @property
    def suspicious_rows(self) -> pd.DataFrame:
        """The rows that contain a flagged token."""
        return self.rows[self.rows["flagged"] != ""]

    @property
    def surplus_bar(self) -> float:
        """The lowest surplus that is reported for tokens that are not flagged.

        Not below the default threshold: at 2 chance alone would name hundreds of benign words.
        """
        return max(self.bar, contrast.RULE.threshold)

    @property
    def unconfirmed(self) -> pd.DataFrame:
        """The tokens with a surplus above `surplus_bar` that rule ``contrast`` does not flag.

        More suspicious tokens do not explain it (``surplus_left``). The embedding of such a token
        did not move far, so that its score is lower than its surplus, or the token is too rare to
        be scored.
        """
        return self._not_flagged("surplus_left")

    @property
    def explained(self) -> pd.DataFrame:
        """The tokens with such a surplus that the rows of more suspicious tokens explain."""
        found = self._not_flagged("surplus")
        return found.drop(self.unconfirmed.index)

    def _not_flagged(self, column: str) -> pd.DataFrame:
        """Return the tokens that are not flagged and reach `surplus_bar`, the highest first."""
        tokens = self.tokens
        if self.plan.defense.rule != DEFAULT_RULE:
            return tokens.head(0)
        found = tokens[(tokens[column] >= self.surplus_bar) & ~tokens["flagged"]]
        return found.sort_values(column, ascending=False, kind="stable")

    @property
    def unconfirmed_words(self) -> list[str]:
        """Unknown words with such a surplus of their own, if their token is not flagged."""
        flagged = self.tokens["token_id"][self.tokens["flagged"]]
        if self.plan.defense.rule != DEFAULT_RULE or self.reading.token_id in flagged.tolist():
            return []
        words = self.reading.words
        return [words.words[i] for i in words.above(self.surplus_bar)]

    def examples(self, token_id: int, count: int = 2) -> list[Example]:
        """Return the most suspicious rows that contain a token, rows of its class first."""
        found = self.tokens[self.tokens["token_id"] == token_id]
        if found.empty:
            return []
        label = found["class"].iloc[0]
        rows, tokens = self._pairs
        containing = set(rows[tokens == token_id].tolist())
        words = dict[int, list[str]]()
        if token_id == self.reading.token_id:
            words = _words_by_row(self.plan, self.reading, self.bar, self.tokens)
            containing &= words.keys()
        ranked = [i for i in self.rows.index if i in containing]
        labels = self.rows["label"]
        ranked.sort(key=lambda i: labels[i] != label)  # stable
        tokenizer = self.plan.load_victim().tokenizer
        numbers, texts = self.rows["row"], self.plan.corpus.train.texts
        return [
            Example(
                int(numbers[i]),
                str(labels[i]),
                excerpt(tokenizer, texts[i], token_id, word=words.get(i, [None])[0]),
            )
            for i in ranked[:count]
        ]

    @cached_property
    def _pairs(self) -> tuple[IntArray, IntArray]:
        vocabulary = 1 + int(self.tokens["token_id"].max())
        train, _ = Scanned.load(self.plan, self.root, vocabulary).counted
        return rows_and_tokens(train, 1 + int(train.ids.max()))

    def summary(self, top: int = 10) -> dict[str, Any]:
        """Return the report as plain data, with all flagged tokens, but at least `top` tokens."""
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
            "warnings": list(plan.corpus.warnings),
            "victim": plan.victim.name,
            "victim_identity": plan.identity,
            "rule": plan.defense.rule,
            "threshold": plan.threshold,
            "bar": self.bar,
            "highest": None if math.isnan(self.highest) else self.highest,
            "least_rows": dict(plan.least),
            "flagged": self.flagged,
            "all_clear": self.all_clear,
            "unconfirmed": self.unconfirmed["token"].tolist() + self.unconfirmed_words,
            "explained": self.explained["token"].tolist(),
            "reading": self.reading.summary(),
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
    """Scan a data set.

    data: as for `prepare_scan`.
    root: as for `run_scan`.
    gpus: above 0 computes on CUDA.
    progress: called with the progress of long work.
    settings: further arguments of `prepare_scan`.
    """
    return run_scan(prepare_scan(data, **settings), root, gpus=gpus, progress=progress)


def run_scan(
    plan: ScanPlan, root: str | Path, *, gpus: float = 0, progress: ProgressCallback = silent
) -> ScanReport:
    """Run the exposure, flag tokens, and return the report.

    root: the folder of the stages, by key; a stage whose folder exists is not run again. Scans may
        share it at the same time.

    Raises:
        UserError: the victim knows no word of the rows, or no token could be scored.
    """
    root = Path(root)
    reading = read_texts(plan, root, gpus=gpus, progress=renamed(progress))
    folder = compute(plan.detection, root, gpus=gpus, progress=renamed(progress))
    suspects = Suspects.load(folder, read_record(folder)["facts"])
    assert suspects is not None
    assert plan.defense.rule is not None
    bar = RULES.load(plan.defense.rule).bar(plan.threshold)
    assert suspects.scores is not None
    scanned = Scanned.load(plan, root, len(suspects.scores))
    tokens = _token_table(plan, scanned, suspects, reading)
    if tokens["score"].isna().all():
        raise UserError(
            f"no token of data '{plan.spec.name}' could be scored: {len(plan.corpus.train)} rows "
            f"are too few for rule '{plan.defense.rule}', so that nothing can be said about them; "
            "scan more rows."
        )
    words = _words_by_row(plan, reading, bar, tokens)
    rows = _row_table(plan, scanned, suspects, reading, words)
    return ScanReport(plan, root, bar, len(suspects.tokens), tokens, rows, reading)


def renamed(progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that receives the stage names of a scan."""

    def shown(event: Progress) -> None:
        progress(replace(event, stage=_SHOWN.get(event.stage, event.stage)))

    return shown


def _token_table(
    plan: ScanPlan, scanned: Scanned, suspects: Suspects, reading: Reading
) -> pd.DataFrame:
    import pandas as pd

    assert suspects.scores is not None
    train, victim, names = scanned.counted[0], plan.load_victim(), plan.corpus.label_names
    vocabulary = len(suspects.scores)
    flagged = np.zeros(vocabulary, dtype=bool)
    flagged[list(suspects.tokens)] = True
    candidates = candidate_tokens(victim, scanned.train, vocabulary, plan.defense.exclude)
    ids = np.flatnonzero(candidates | flagged)
    low = np.where(np.isnan(suspects.scores), -np.inf, suspects.scores)
    ids = ids[np.lexsort((ids, -low[ids], ~flagged[ids]))]
    by_class = rows_by_class(train, vocabulary, len(names))[ids]
    rows = by_class.sum(axis=1)
    prior = plan.class_rows() / len(train)
    excess = by_class / rows[:, None] - prior
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
        "share": by_class[np.arange(len(ids)), label] / rows,
        "class_share": prior[label],
        "clean_rows": suspects.table["clean_rows"][ids],
    }
    columns |= {f"rows[{name}]": by_class[:, index] for index, name in enumerate(names)}
    columns["words"] = [
        words_text(reading, names, LISTED_WORDS) if token == reading.token_id else ""
        for token in ids
    ]
    # The columns above contain these already, computed from the rows even without trusted rows.
    known = (*columns, "train_rows", "label")
    columns |= {name: v[ids] for name, v in suspects.table.items() if name not in known}
    return pd.DataFrame(columns)


def words_text(reading: Reading, names: Sequence[str], most: int) -> str:
    """Return the words behind the unknown token, each with its rows by class, for a table.

    reading: of the rows.
    names: of the classes.
    most: how many words.
    """
    words = reading.words
    told = [
        f"{word} ({', '.join(f'{n} {c}' for n, c in zip(names, counts, strict=True) if c)})"
        for word, counts in zip(words.words[:most], words.by_class[:most].tolist(), strict=True)
    ]
    more = len(words.words) - len(told)
    return " ".join(told) + (f" and {more} more" if more else "")


def _words_by_row(
    plan: ScanPlan, reading: Reading, bar: float, tokens: pd.DataFrame
) -> dict[int, list[str]]:
    """Return the suspicious unknown words of each row that has any.

    The unknown token is one token for many words, most of them benign: if some words alone reach
    the bar, with the weight of the token's drift or without one, only those are suspicious, else
    all of them.
    """
    words = reading.words
    above: list[int] = []
    if plan.defense.rule == DEFAULT_RULE:
        # All tokens that are scored are in the table, so the weights are those of the rule.
        weights = contrast.weights(tokens["drift_sigmas"].to_numpy())
        weight = weights[tokens["token_id"] == reading.token_id].max(initial=1.0)
        above = words.above(bar, float(weight))
    found: dict[int, list[str]] = {}
    for index in above or range(len(words.words)):
        for row in words.rows[index].tolist():
            found.setdefault(row, []).append(words.words[index])
    return found


def _flagged_by_row(
    plan: ScanPlan,
    scanned: Scanned,
    suspects: Suspects,
    reading: Reading,
    words: dict[int, list[str]],
) -> dict[int, str]:
    """Return the flagged tokens of each row that has any, in the order of detection."""
    assert suspects.scores is not None
    rows, tokens = rows_and_tokens(scanned.counted[0], len(suspects.scores))
    hit = np.isin(tokens, list(suspects.tokens))
    names = plan.load_victim().tokenizer.convert_ids_to_tokens(list(suspects.tokens))
    place = {token: rank for rank, token in enumerate(suspects.tokens)}
    flagged: dict[int, list[int]] = {}
    for row, token in zip(rows[hit].tolist(), tokens[hit].tolist(), strict=True):
        if token != reading.token_id or row in words:
            flagged.setdefault(row, []).append(place[token])

    def name(row: int, rank: int) -> str:
        unknown = suspects.tokens[rank] == reading.token_id
        return ":".join([names[rank], *words[row]]) if unknown else names[rank]

    return {row: " ".join(name(row, r) for r in sorted(ranks)) for row, ranks in flagged.items()}


def _row_table(
    plan: ScanPlan,
    scanned: Scanned,
    suspects: Suspects,
    reading: Reading,
    words: dict[int, list[str]],
) -> pd.DataFrame:
    """Return the suspect rows, most suspicious first; the index is their place in the corpus.

    plan: the scan.
    scanned: its rows.
    suspects: what was flagged.
    reading: of the rows.
    words: `_words_by_row`.
    """
    import pandas as pd

    assert suspects.scores is not None
    assert suspects.rows is not None
    train, corpus = scanned.counted[0], plan.corpus
    rows, tokens = rows_and_tokens(train, len(suspects.scores))
    flagged = _flagged_by_row(plan, scanned, suspects, reading, words)
    # Without trusted rows, rows have no suspicion and are ranked by their most suspicious token.
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
            "flagged": [flagged.get(row, "") for row in range(len(train))],
            # pandas' own strings refuse lone surrogates, which occur in scraped text.
            "text": pd.Series(corpus.train.texts, dtype=object),
        }
    )
    return table.iloc[order]


def excerpt(
    tokenizer: Any, text: str, token_id: int, width: int = EXCERPT, word: str | None = None
) -> str:
    """Return at most `width` characters of a text around a token, on one line.

    Without unprintable characters: a text of unknown origin could control a terminal.

    tokenizer: of the victim.
    text: the text.
    token_id: the token.
    width: the most characters.
    word: what the token stands for in the text, if it stands for several words.
    """
    start = 0
    if word is not None:
        start = max(0, text.find(word))
    elif tokenizer.is_fast:
        encoded = tokenizer(
            tokenizable(text), return_offsets_mapping=True, add_special_tokens=False
        )
        if token_id in encoded["input_ids"]:
            start = encoded["offset_mapping"][encoded["input_ids"].index(token_id)][0]
    first = max(0, min(start - width // 3, len(text) - width))
    # An ellipsis replaces what is left out, within the width.
    left, right = first > 0, first + width < len(text)
    part = text[first + left : first + width - right]
    line = "".join(c if c.isprintable() else " " for c in part)
    return f"{'…' if left else ''}{line}{'…' if right else ''}"


def score_text(score: float) -> str:
    """Return a score for users: two decimals, or three significant digits below 1."""
    return f"{score:.2f}" if abs(score) >= 1 else f"{score:.3g}"


def write_report(frame: pd.DataFrame, path: Path) -> None:
    """Write a table of a report as CSV, Parquet or JSON lines, by the suffix.

    CSV is for spreadsheets: a text that they would take for a formula gets an apostrophe.

    Raises:
        UserError: the file cannot be written.
    """
    check_table(path)
    # Another scan of the same rows may write it too: a table appears as a whole.
    target = path.resolve()
    fresh = target.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    storable = frame.copy()
    if "text" in storable:
        # The files cannot contain lone surrogates.
        storable["text"] = [
            text.encode("utf-8", "backslashreplace").decode() for text in storable["text"]
        ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            # The writer does not quote a carriage return by default, and readers end a row there:
            # the author of a text could add rows.
            # Encoded here, since the system's own line breaks would change those of the texts.
            fresh.write_bytes(csv_text(storable, quoting=csv.QUOTE_NONNUMERIC).encode())
        elif path.suffix == ".parquet":
            storable.to_parquet(fresh, index=False)
        else:
            storable.to_json(fresh, orient="records", lines=True)
        os.replace(fresh, target)
    except OSError as error:
        raise not_written(str(path), error, "name another file") from error
    finally:
        fresh.unlink(missing_ok=True)


def check_table(path: Path) -> None:
    """Raise a `UserError` unless `write_report` can write a table there; nothing is made."""
    if path.suffix not in TABLES:
        raise UserError(f"{path} must end in one of {', '.join(TABLES)}.")
    check_file(str(path), path, new_folder=True)
