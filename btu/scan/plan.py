"""Scan data of one's own: which tokens look like a trigger, and a model with those cut.

    report = scan("reviews.csv", "work", clean="trusted.csv")
    export(report, "cleaned-model")

No attack is simulated. `btu.recipe.prepare` would start from one even at rate 0: it asks for a
target label and evaluation rows, holds clean rows out of the suspect ones, and has the attack in
every key. So the two stages that give rows are declared here; what follows is what a sweep runs.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.data.spec import DATASETS, SUFFIXES, DataSpec
from btu.data.suspects import SuspectCorpus
from btu.defenses.base import Given
from btu.defenses.token_unlearning import (
    TOP_FRACTION,
    TokenUnlearning,
    candidate_tokens,
    tokens_flagged,
)
from btu.errors import UserError
from btu.foundation import Foundation
from btu.recipe import foundation
from btu.rules.base import DEFAULT_RULE, RULES, surplus_by_class
from btu.scan.stages import loaded_suspects, suspect_rows, trusted_rows
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import (
    load_victim,
)
from btu.stages import Stage, plain
from btu.types import BoolArray, Corpus, IntArray, Rows
from btu.victims import Victim, VictimSpec

if TYPE_CHECKING:
    pass


# Rules that compare with trusted rows, and say nothing without them.
NEEDS_CLEAN = ("contrast",)
# Rows that are tokenized at once, where few of them may do.
CHUNK = 4096


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
    loaded_suspects.cache_clear()  # the files may have changed since
    loaded = loaded_suspects(spec, clean_file)
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
