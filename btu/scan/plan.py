"""Scan your own data: find tokens that look like a trigger, and export a model with them cut.

    report = scan("reviews.csv", "work", clean="trusted.csv")
    export(report, "cleaned-model")

A scan simulates no attack. `btu.recipe.prepare` needs one even at rate 0: it needs a target label
and evaluation rows, holds clean rows out of the suspect rows, and puts the attack into every key.
The two stages that write rows are therefore declared here; all later stages are those of a sweep.
"""

from __future__ import annotations

import bisect
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from btu.data.files import is_readable, suffixes
from btu.data.spec import DATASETS, DataSpec
from btu.data.suspects import SuspectCorpus
from btu.defenses.base import Given
from btu.defenses.kit.contradiction import KEEP
from btu.defenses.token_unlearning import (
    INSERTED,
    TokenUnlearning,
    candidate_tokens,
    tokens_flagged,
)
from btu.errors import UserError
from btu.foundation import Foundation
from btu.recipe import TrainingInputs, foundation
from btu.rules.base import (
    DEFAULT_RULE,
    RULES,
    TOP_FRACTION,
    threshold_name,
    threshold_of,
)
from btu.rules.surplus import scored, surplus_sigmas
from btu.scan.chance import HIGHEST_WEIGHT, chance_of
from btu.scan.stages import loaded_suspects, suspect_rows, trusted_rows
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import (
    load_victim,
)
from btu.stages import Stage, as_config
from btu.types import BoolArray, Corpus, IntArray, Rows
from btu.victims import Victim, VictimSpec

# Rows that are tokenized at once, when the first few may be enough.
CHUNK = 4096
# Rows of which the tests are counted before the scan, at most of each kind.
SAMPLE = 4096
# The way out without enough trusted rows.
INSTEAD = "or take --rule frequency, which needs none and is less exact"


@dataclass(frozen=True)
class ScanPlan:
    """A scan, checked and declared; nothing is trained yet.

    spec: where the data are.
    data: the suspect and the trusted rows.
    victim: the model that is trained.
    identity: of the victim's weights.
    defense: the exposure and the rule.
    base: the stages that the defense starts from.
    least: for each class that has rows, the number of them below which a token cannot be flagged
        on its own even if no trusted row contains it and its embedding moves furthest
        (`least_rows`); None if no token can be flagged. Whether a token in more rows is flagged
        depends on its drift as well. Empty for rules without such a limit.
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
        """The threshold of the rule."""
        return _threshold(self.defense)

    def load_victim(self) -> Victim:
        """Return the victim, loaded once per process."""
        return load_victim(self.victim, len(self.corpus.label_names))

    def class_rows(self) -> IntArray:
        """Return (classes,) the number of suspect rows of each class."""
        return _sizes(self.corpus.train.labels, self.corpus)

    def notes(self) -> list[str]:
        """Return what users should know about the data, one sentence each."""
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
                "A token in fewer rows of a class than this cannot be flagged on its own, however "
                f"far it moves: {limits}. In more rows it can be, without a promise."
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
    encoding: str | None = None,
    separator: str | None = None,
    header: bool = True,
    quoting: bool | None = None,
    victim: str = "offline",
    max_length: int = 128,
    rule: str | None = None,
    threshold: float | None = None,
    fdr: float | None = None,
    max_cut_cost: float | None = None,
    contradicted: str | None = None,
    epochs: int = 1,
    seed: int = 0,
    train: TrainSettings | None = None,
    tuning: TuningSettings | None = None,
) -> ScanPlan:
    """Read and check everything that a scan needs, and declare its stages.

    data: a folder, a file, the name of a data set or a hub id.
    clean: the trusted rows, a file or a split of `data`; None takes its split ``clean`` or
        ``test``. They are never held out of the suspect rows: poisoned rows among them would
        become trusted.
    text: the column of the texts.
    label: the column of the labels.
    split: the split that is scanned.
    encoding: of the files, those of the trusted rows too; as `DataSpec.encoding`.
    separator: likewise.
    header: likewise.
    quoting: likewise.
    victim: the model that is trained.
    max_length: longest input in tokens.
    rule: the detection rule; None is the default rule.
    threshold: of the rule; None is the rule's default.
    fdr: the threshold as the expected number of benign tokens that are flagged, in (0, 1), for rule
        ``contrast``.
    max_cut_cost: of the export: a flagged token whose cut costs a larger fraction of the trusted
        rows is not cut; None is the rule's default.
    contradicted: of the export: ``relabel`` or ``keep`` the rows of a class whose labels contradict
        the trusted rows, as in `TokenUnlearning`; None is the rule's default.
    epochs: of the exposure.
    seed: of all random draws.
    train: settings of the exported model's fine-tune.
    tuning: settings of the exported model's clean tuning.

    Raises:
        UserError: something is missing, or cannot be scanned.
    """
    limits = {"threshold": threshold, "fdr": fdr, "max_cut_cost": max_cut_cost}
    defense = _defense(rule or DEFAULT_RULE, limits, contradicted, epochs)
    keys: dict[str, Any] = {"text_column": text, "label_column": label, "train_split": split}
    keys |= {"encoding": encoding, "separator": separator, "header": header, "quoting": quoting}
    spec = _find_data(str(data), keys)
    clean_file = None
    if clean is not None:
        one_file = spec.path is not None and Path(spec.path).is_file()
        if one_file or Path(clean).is_file() or is_readable(Path(clean)):
            clean_file = str(clean)
        else:
            spec = replace(spec, clean_split=str(clean))
    loaded_suspects.cache_clear()  # the files may have changed since
    loaded = loaded_suspects(spec, clean_file)
    corpus = loaded.corpus
    _check_trusted(spec, corpus, defense)
    victim_spec = VictimSpec(victim, max_length)
    found = load_victim(victim_spec, len(corpus.label_names))
    vocabulary = found.vocabulary_size
    # What relabelling needs, only an export needs (`btu.scan.export.check_export`).
    replace(defense, contradicted=KEEP).check(
        Given(vocabulary, len(corpus.label_names), len(corpus.train), len(corpus.clean))
    )
    if defense.rule == TOP_FRACTION and vocabulary is not None:
        _check_share(defense, found, corpus.train, vocabulary)
    least = _least(spec, corpus, defense, found)
    base = _foundation(spec, clean_file, corpus, found, train, tuning, seed)
    return ScanPlan(spec, loaded, victim_spec, found.source.identity, defense, base, least)


def _defense(
    rule: str, limits: Mapping[str, float | None], contradicted: str | None, epochs: int
) -> TokenUnlearning:
    RULES.load(rule)  # an unknown name, before anything is read
    threshold, fdr = limits["threshold"], limits["fdr"]
    if threshold is not None and fdr is not None:
        raise UserError(
            f"--threshold {threshold!r} and --fdr {fdr!r} both say where tokens are flagged; give "
            "one of them."
        )
    limit: dict[str, Any] = {threshold_name(rule): threshold}
    return TokenUnlearning(
        rule=rule,
        fdr=fdr,
        exposure_epochs=epochs,
        # Whoever planted a trigger may have chosen a word that the tokenizer does not know.
        exclude=INSERTED,
        max_cut_cost=limits["max_cut_cost"],
        contradicted=contradicted,
        **limit,
    )


def _find_data(data: str, keys: Mapping[str, Any]) -> DataSpec:
    path = Path(data).expanduser()
    if path.is_file() or path.is_dir():
        place = path.resolve()
        return DataSpec(place.stem if path.is_file() else place.name, path=str(path), **keys)
    owner, _, rest = data.partition("/")
    hub = owner and rest and "/" not in rest and not data.startswith((".", "~"))
    if data in DATASETS or (hub and not is_readable(path) and not Path(owner).is_dir()):
        return DataSpec(data, **keys)
    near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*near, *DATASETS], n=1)
    meant = f"; did you mean '{close[0]}'?" if close else "."
    raise UserError(
        f"data '{data}' is not a file, folder or known data set{meant} Give a file "
        f"({suffixes()}), a folder with one per split, one of {', '.join(DATASETS)}, or a "
        "hub id owner/data."
    )


def _check_trusted(spec: DataSpec, corpus: Corpus, defense: TokenUnlearning) -> None:
    """Refuse data without the trusted rows that the rule compares with."""
    rule = defense.rule
    assert rule is not None
    if not RULES.load(rule).needs_clean:
        return
    if len(corpus.clean) == 0:
        raise UserError(
            f"data '{spec.name}' has no trusted rows (no split 'clean' or 'test'), with which rule "
            f"'{rule}' compares; name some with --clean FILE, {INSTEAD}. They are not taken out of "
            "the rows under suspicion: poisoned rows among them would be trusted."
            + "".join(f" {text}" for text in corpus.warnings)
        )
    sizes, reserved = (_sizes(rows.labels, corpus) for rows in (corpus.train, corpus.clean))
    for name, size, trusted in zip(corpus.label_names, sizes, reserved, strict=True):
        if size and not trusted:
            raise UserError(
                f"the trusted rows have none of class '{name}', so that rule '{rule}' finds "
                f"nothing in it; add some with --clean FILE, {INSTEAD}."
            )


def _least(
    spec: DataSpec, corpus: Corpus, defense: TokenUnlearning, victim: Victim
) -> dict[str, int | None]:
    """Return the least rows by class (`ScanPlan`); refuse a scan that cannot flag any token."""
    rule, threshold = defense.rule, defense.threshold
    assert rule is not None
    detection = RULES.load(rule)
    if not detection.needs_clean:
        return {}
    assert threshold is not None
    some = (victim.encode(_spread(rows)) for rows in (corpus.train, corpus.clean))
    tests = chance_of(victim, defense.exclude, *some).tests
    sizes, reserved = (_sizes(rows.labels, corpus) for rows in (corpus.train, corpus.clean))
    least = {
        name: least_rows(index, sizes, reserved, detection.bar(threshold), tests)
        for index, name in enumerate(corpus.label_names)
        if sizes[index]
    }
    if all(count is None for count in least.values()):
        raise UserError(
            f"with {len(corpus.train)} rows and {len(corpus.clean)} trusted ones rule '{rule}' can "
            f"flag no token at threshold {threshold:g}, even one in every row; give more "
            f"of either, lower the threshold, {INSTEAD}."
        )
    return least


def _spread(rows: Rows) -> Rows:
    """Return at most `SAMPLE` rows, at equal distances: files are often sorted by class."""
    return rows.take(range(0, len(rows), max(1, math.ceil(len(rows) / SAMPLE))))


def least_rows(
    label: int, rows: IntArray, reserved: IntArray, bar: float, tests: int
) -> int | None:
    """Return how many rows of a class must contain a token for rule ``contrast`` to flag it.

    label: the class.
    rows: (classes,) number of suspect rows.
    reserved: (classes,) number of trusted rows.
    bar: the score to reach.
    tests: how many pairs of token and class are tested, at least.

    It is a lower bound: the token is in no trusted row and in no other class, its embedding moves
    furthest (chance may flag it 30 times as often as the average token), the word frequencies of
    both sources are the same, and there are no more tests. Only a word of a trigger sentence may be
    in fewer rows, down to nine tenths, since it gets the score of another word. None if a token in
    all rows of the class does not reach the bar.
    """

    def highest_score(count: int) -> float:
        held = np.zeros((1, len(rows)), dtype=np.int64)
        held[0, label] = count
        sigmas = surplus_sigmas(held, np.zeros_like(held), rows, reserved)
        return float(scored(sigmas, max(tests, 1) / HIGHEST_WEIGHT)[0, label])

    size = int(rows[label])
    least = bisect.bisect_left(range(1, size + 1), bar, key=highest_score) + 1
    return least if least <= size else None


def _threshold(defense: TokenUnlearning) -> float:
    """Return the threshold of a defense of a scan, which is the same in all rounds."""
    found = threshold_of(as_config(defense))
    assert found is not None  # the defense has resolved its rule
    assert found.value is not None
    return found.value


def _check_share(defense: TokenUnlearning, victim: Victim, rows: Rows, vocabulary: int) -> None:
    """Refuse a share that flags every token of the rows: exposure would refuse it at its end."""
    share = _threshold(defense)
    most = tokens_flagged(share, vocabulary, vocabulary)
    found: BoolArray = np.zeros(vocabulary, dtype=bool)
    for start in range(0, len(rows), CHUNK):
        some = slice(start, start + CHUNK)
        encoded = victim.encode(Rows(rows.texts[some], rows.labels[some]))
        found |= candidate_tokens(victim, encoded, vocabulary, defense.exclude)
        if found.sum() > most:
            return  # there are more, however many
    tokens_flagged(share, vocabulary, int(found.sum()))


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
    inputs = TrainingInputs(
        victim=victim.spec,
        victim_identity=victim.source.identity,
        train=train or TrainSettings(),
        tuning=tuning or TuningSettings(),
        seed=seed,
        counts=corpus.counts(),
    )
    where = {"spec": as_config(spec), "clean_file": clean_file}
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
        {"data": prints["clean"], "victim": inputs.reads},
        where={**where, **inputs.where},
        kind="host",
    )
    return foundation(inputs, suspects, trusted)
