"""Scan data of one's own: which tokens look like a trigger, and a model with those cut.

    report = scan("reviews.csv", "work", clean="trusted.csv")
    export(report, "cleaned-model")

No attack is simulated. `btu.recipe.prepare` would start from one even at rate 0: it asks for a
target label and evaluation rows, holds clean rows out of the suspect ones, and has the attack in
every key. So the two stages that give rows are declared here; what follows is what a sweep runs.
"""

from __future__ import annotations

import bisect
import csv
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data import DATASETS, SUFFIXES, DataSpec, SuspectCorpus, load_suspects
from btu.defense import Given, Suspects
from btu.defenses.token_unlearning import (
    TOP_FRACTION,
    TokenUnlearning,
    candidate_tokens,
    tokens_flagged,
)
from btu.detection import DEFAULT_RULE, RULES, rows_and_tokens, rows_by_class, surplus_by_class
from btu.errors import UserError
from btu.foundation import (
    TRAIN,
    Foundation,
    clean_rows_of,
    load_encoded,
    load_victim,
    model_of,
    victim_of,
    write_rows,
)
from btu.places import is_open, nearest
from btu.recipe import foundation
from btu.settings import TrainSettings, TuningSettings
from btu.stages import Stage, StageRun, compute, plain, read_record, stage
from btu.types import BoolArray, Corpus, IntArray, Progress, ProgressCallback, Rows, silent
from btu.victims import Victim, VictimSpec, tokenizable

if TYPE_CHECKING:
    import pandas as pd


# Rules that compare with trusted rows, and say nothing without them.
NEEDS_CLEAN = ("contrast",)
TABLES = (".csv", ".parquet", ".jsonl")
EXCERPT = 88
# Rows that are tokenized at once, where few of them may do.
CHUNK = 4096
# Stages of a sweep are named after its attack; here nobody knows of one.
_SHOWN = {"poisoned fine-tune": "fine-tune", "clean tuning (defended)": "clean tuning"}


@dataclass(frozen=True)
class ScanPlan:
    """A scan, checked and declared; nothing is trained yet.

    least: by class that has rows, in how many of them a token has to stand at least to be flagged
    if no trusted row holds it; None where no token can be. Empty for rules without such a limit.
    """

    spec: DataSpec
    data: SuspectCorpus
    victim: VictimSpec
    identity: str
    defense: TokenUnlearning
    base: Foundation
    least: Mapping[str, int | None]

    @property
    def corpus(self) -> Corpus:
        return self.data.corpus

    @property
    def detection(self) -> Stage:
        """The stage that flags."""
        return self.defense.detection(self.base)

    @property
    def threshold(self) -> float:
        """The rule's threshold, which `top_fraction` calls alpha."""
        defense = self.defense
        value = defense.alpha if defense.rule == TOP_FRACTION else defense.threshold
        assert value is not None  # resolved by the defense
        return float(value)

    def load_victim(self) -> Victim:
        """Return the victim, loaded once per process."""
        return load_victim(self.victim, len(self.corpus.label_names))

    def class_rows(self) -> IntArray:
        """Return (classes,) rows under suspicion of each class."""
        return _sizes(self.corpus.train.labels, self.corpus)

    def notes(self) -> list[str]:
        """Return what a person should know of the data, a sentence each."""
        corpus = self.corpus
        counted = ", ".join(
            f"{name} {size}"
            for name, size in zip(corpus.label_names, self.class_rows(), strict=True)
        )
        said = [f"{len(corpus.train)} rows under suspicion ({counted})."]
        if len(corpus.clean):
            said.append(f"{len(corpus.clean)} trusted rows, from {self.data.trusted}.")
        else:
            said.append("No trusted rows: rows are not ranked by suspicion.")
        for role, rows in (("train", "rows"), ("clean", "trusted rows")):
            if empty := corpus.notes.get(f"dropped_{role}_empty"):
                said.append(f"{empty} {rows} without text dropped.")
        if dropped := corpus.notes.get("dropped_train_overlap"):
            said.append(f"{dropped} rows not scanned, since their text is a trusted one.")
        if wrong := self.data.contradicted:
            some = ", ".join(map(str, wrong[:10])) + (" ..." if wrong[10:] else "")
            said.append(
                f"{len(wrong)} of them have another label than the trusted text: rows {some}."
            )
        if self.least:
            limits = ", ".join(
                f"{name} {'(never: too few rows)' if least is None else least}"
                for name, least in self.least.items()
            )
            said.append(
                f"To be found, a token must stand in at least so many rows of a class: {limits}."
            )
        if self.defense.rule == TOP_FRACTION:
            said.append(
                f"Rule '{TOP_FRACTION}' flags a fixed share of the vocabulary, on clean data too."
            )
        return said


def prepare_scan(
    data: str | Path,
    *,
    clean: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    split: str | None = None,
    victim: str = "offline",
    max_length: int = 128,
    rule: str | None = None,
    threshold: float | None = None,
    epochs: int = 1,
    seed: int = 0,
    train: TrainSettings | None = None,
    tuning: TuningSettings | None = None,
) -> ScanPlan:
    """Read and check all that a scan needs, and declare its stages.

    data: a folder, a file, a data set's name or a hub id. clean: the trusted rows, a file or a
    split of `data`; by default its split ``clean`` or ``test``. They are never taken out of the
    suspect rows: what is poisoned there would be trusted. text, label: columns. split: the one
    that is scanned. epochs: of the exposure. train, tuning: of the exported model.

    Raises:
        UserError: something is missing, or cannot be scanned.
    """
    rule = rule or DEFAULT_RULE
    RULES.load(rule)  # an unknown name, before anything is read
    limit: dict[str, Any] = {"alpha" if rule == TOP_FRACTION else "threshold": threshold}
    defense = TokenUnlearning(rule=rule, exposure_epochs=epochs, **limit)
    spec = _find_data(str(data), text, label, split)
    clean_file = None
    if clean is not None:
        one_file = spec.path is not None and Path(spec.path).is_file()
        if one_file or Path(clean).is_file() or Path(clean).suffix in SUFFIXES:
            clean_file = str(clean)
        else:
            spec = replace(spec, clean_split=str(clean))
    _loaded.cache_clear()  # the files may have changed since
    loaded = _loaded(spec, clean_file)
    corpus = loaded.corpus
    least = _check_trusted(spec, corpus, defense)
    victim_spec = VictimSpec(victim, max_length)
    found = load_victim(victim_spec, len(corpus.label_names))
    vocabulary = found.vocabulary_size
    defense.check(Given(vocabulary, len(corpus.label_names), len(corpus.train), len(corpus.clean)))
    if rule == TOP_FRACTION and vocabulary is not None:
        _check_alpha(defense, found, corpus.train, vocabulary)
    base = _foundation(spec, clean_file, corpus, found, train, tuning, seed)
    return ScanPlan(spec, loaded, victim_spec, found.source.identity, defense, base, least)


def _find_data(data: str, text: str | None, label: str | None, split: str | None) -> DataSpec:
    columns: dict[str, Any] = {"text_column": text, "label_column": label, "train_split": split}
    path = Path(data).expanduser()
    if path.is_file() or path.is_dir():
        place = path.resolve()
        return DataSpec(place.stem if path.is_file() else place.name, path=str(path), **columns)
    owner, _, rest = data.partition("/")
    hub = owner and rest and "/" not in rest and not data.startswith((".", "~"))
    if data in DATASETS or (hub and path.suffix not in SUFFIXES and not Path(owner).is_dir()):
        return DataSpec(data, **columns)
    near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*near, *DATASETS], n=1)
    meant = f"; did you mean '{close[0]}'?" if close else "."
    raise UserError(
        f"data '{data}' is no file, folder or known data set{meant} Give a file "
        f"({', '.join(SUFFIXES)}), a folder with one per split, one of {', '.join(DATASETS)}, or a "
        "hub id owner/data."
    )


def _check_trusted(
    spec: DataSpec, corpus: Corpus, defense: TokenUnlearning
) -> dict[str, int | None]:
    """Return the least rows by class (`ScanPlan`); refuse what could find nothing."""
    rule = defense.rule
    if rule not in NEEDS_CLEAN:
        return {}
    instead = "or take --rule frequency, which needs none and is less exact"
    if len(corpus.clean) == 0:
        raise UserError(
            f"data '{spec.name}' has no trusted rows (no split 'clean' or 'test'), with which rule "
            f"'{rule}' compares; name some with --clean FILE, {instead}. They are not taken out of "
            "the rows under suspicion: what is poisoned there would be trusted."
        )
    sizes, reserved = (_sizes(rows.labels, corpus) for rows in (corpus.train, corpus.clean))
    for name, size, trusted in zip(corpus.label_names, sizes, reserved, strict=True):
        if size and not trusted:
            raise UserError(
                f"the trusted rows have none of class '{name}', in which rule '{rule}' is then "
                f"blind; add some with --clean FILE, {instead}."
            )
    assert rule is not None
    assert defense.threshold is not None
    bar = RULES.load(rule).bar(defense.threshold)
    least = {
        name: least_rows(index, sizes, reserved, bar)
        for index, name in enumerate(corpus.label_names)
        if sizes[index]
    }
    if all(count is None for count in least.values()):
        raise UserError(
            f"with {len(corpus.train)} rows and {len(corpus.clean)} trusted ones rule '{rule}' can "
            f"flag no token at threshold {defense.threshold:g}, even one in every row; give more "
            f"of either, lower the threshold, {instead}."
        )
    return least


def least_rows(label: int, rows: IntArray, reserved: IntArray, bar: float) -> int | None:
    """Return in how many of a class's rows a token must stand for its surplus to reach `bar`.

    rows, reserved: (classes,) suspect and trusted rows. The token stands in no trusted row and in
    no other class; the drift that has to confirm it knows no limit. None: not even in all of them.
    """
    from btu.rules.frequency import MIN_COUNT

    def surplus(count: int) -> float:
        held = np.zeros((1, len(rows)), dtype=np.int64)
        held[0, label] = count
        return float(surplus_by_class(held, np.zeros_like(held), rows, reserved)[0, label])

    size = int(rows[label])
    least = max(MIN_COUNT, bisect.bisect_left(range(size + 1), bar, key=surplus))
    return least if least <= size else None


def _check_alpha(defense: TokenUnlearning, victim: Victim, rows: Rows, vocabulary: int) -> None:
    """Refuse an alpha that flags every token of the rows, as the exposure would at its end."""
    alpha = float(defense.alpha)
    most = tokens_flagged(alpha, vocabulary, vocabulary)
    found: BoolArray = np.zeros(vocabulary, dtype=bool)
    for start in range(0, len(rows), CHUNK):
        some = slice(start, start + CHUNK)
        encoded = victim.encode(Rows(rows.texts[some], rows.labels[some]))
        found |= candidate_tokens(victim, encoded, vocabulary, defense.exclude)
        if found.sum() > most:
            return  # there are more, however many
    tokens_flagged(alpha, vocabulary, int(found.sum()))


def _sizes(labels: tuple[int, ...], corpus: Corpus) -> IntArray:
    sizes: IntArray = np.bincount(
        np.asarray(labels, dtype=np.int64), minlength=len(corpus.label_names)
    )
    return sizes


def _foundation(
    spec: DataSpec,
    clean_file: str | None,
    corpus: Corpus,
    victim: Victim,
    train: TrainSettings | None,
    tuning: TuningSettings | None,
    seed: int,
) -> Foundation:
    prints = corpus.fingerprints()
    identity = victim.source.identity
    where = {"spec": plain(spec), "clean_file": clean_file}
    suspects = Stage(
        "suspect rows",
        suspect_rows,
        {"data": prints["train"]},
        where=where,
        kind="host",
    )
    trusted = Stage(
        "trusted rows",
        trusted_rows,
        {
            "data": prints["clean"],
            "victim": {"identity": identity, "max_length": victim.spec.max_length},
        },
        where={**where, "victim": plain(victim.spec)},
        kind="host",
    )
    return foundation(
        suspects,
        trusted,
        victim=victim.spec,
        victim_identity=identity,
        train=train or TrainSettings(),
        tuning=tuning or TuningSettings(),
        seed=seed,
        counts=corpus.counts(),
    )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def suspect_rows(run: StageRun) -> dict[str, Any]:
    """Write the rows under suspicion, where a sweep's defense finds its poisoned ones."""
    corpus = _corpus_of(run, "train")
    write_rows(run.folder / TRAIN, corpus.train)
    return {"rows": len(corpus.train), "label_names": list(corpus.label_names)}


@stage(version=1)
def trusted_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize the trusted rows, perhaps none."""
    from btu.training import Encoded

    corpus = _corpus_of(run, "clean")
    victim = victim_of(run, len(corpus.label_names))
    rows = corpus.clean
    pad = int(victim.tokenizer.pad_token_id or 0)
    encoded = victim.encode(rows) if len(rows) else Encoded.from_lists([], [], pad)
    encoded.save(run.folder / "clean.safetensors")
    return {"rows": len(rows)}


@stage(version=1)
def accuracy(run: StageRun) -> dict[str, Any]:
    """Count the trusted rows that a model classifies as labelled."""
    from btu.training import predict, resolve_precision

    rows = clean_rows_of(run)
    precision = run.config["precision"]
    predicted = predict(model_of(run, "model"), rows, precision=precision, device=run.device)
    run.precisions.add(resolve_precision(precision, run.device))
    return {"hits": int((predicted == rows.labels.numpy()).sum()), "n": len(rows)}


def _corpus_of(run: StageRun, role: str) -> Corpus:
    spec = DataSpec(**run.where["spec"])
    corpus = _loaded(spec, run.where["clean_file"]).corpus
    if corpus.fingerprints()[role] != run.config["data"]:
        raise UserError(f"the {role} rows of data '{spec.name}' changed meanwhile; scan again.")
    return corpus


@lru_cache(maxsize=1)
def _loaded(spec: DataSpec, clean_file: str | None) -> SuspectCorpus:
    return load_suspects(spec, clean_file)


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
