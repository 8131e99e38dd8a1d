"""ONION: words that a language model finds out of place are taken out of a text.

Qi, Chen, Li, Yao, Liu, Sun: ONION: A Simple and Effective Defense Against Textual Backdoor Attacks
(EMNLP 2021, arXiv 2011.10369). Reference code: thunlp/ONION, ``experiments/test_defense.py`` at
08efa14, with GPT-2 large.

A word whose removal lowers the perplexity of a text by more than a bar is dropped; what is left is
what the model reads. Nothing is turned away.

Any causal or masked language model serves (``lm``):

- A causal one scores as the code does: the perplexity of the text minus that without the word. A
  token that begins a text is put before it, so that its first word has a probability too.
- A masked one has no perplexity of a text that one pass would tell. Its score is how surprising the
  word is where it stands: -log p of its most surprising token, in nats, with all its tokens masked.
  Every ``spacing``-th word is masked in the same pass, which costs a fraction of the passes.
- ``clean-rows``, the default, needs no model from elsewhere: the victim's pretrained weights (never
  those that were fine-tuned on the poison) with a head tied to its word embeddings learn to fill in
  masked words of the reserved clean rows, those left out that the bar is taken on. A victim without
  a mask token learns to go on instead, and scores as a causal one. The training rows are not used:
  in them a trigger is a frequent word, and would be expected.

Deviations: the code sweeps the bar on the test set from -100 to 0 (there a removal that lowers the
perplexity counts as negative), and thunlp/OpenBackdoor's ``onion_defender.py`` at 0c5a560 sets it
to 0 without looking at data. Here it is the one that takes at most ``max_removed`` of the words of
held-out clean rows, which asks no victim; or a number, to be swept. Training texts could be
filtered the same way; this acts at inference alone. The last word of a text stays: an empty text is
nothing that a model could be asked.

The clean rows are read back from the victim's tokens, which is all that is kept of them, and what
comes in is scored as it came. With an uncased victim the bar is thus taken on lower-cased texts
without accents, in which a sign is a word of its own ("do n ' t", "film ."), and cut at its
``max_length``. Texts that come in otherwise, say with capitals that a named cased model knows, have
other words and other scores: the share of their words above the bar need not be ``max_removed``. It
holds for texts like SST-2's, which are lower-cased and cut into words and signs already, but for
their contractions ("n't"). A victim whose tokens give the text back (RoBERTa, GPT-2), or ``bar``,
does without.

Words behind the longest input are not read, so that nobody judges them. Where words of such a text
go and the language model is ``clean-rows``, which reads as far as the victim does, the text ends
with the last word that was judged: as many words from behind would be read in place of those that
went. A named model may read less far than the victim, and its texts stay as long as they are.

Measured once (SST-2, MiniLM, BadNets with "cf", 10 %, dirty label, seed 0): ``clean-rows`` takes
"cf" out of 97 % of the triggered rows, ASR 100 -> 22 (FTR 19), CACC 88.1 -> 86.1, and 54 % of the
clean rows lose a word. With ``max_removed`` 0.02: 88 %, ASR 27 (FTR 16), CACC 87.4. The default was
set before either was seen. AddSent's sentence is fluent: it is taken out whole of no row, and ASR
stays at 100 (seed 0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, LANGUAGE_MODEL, POISONED_MODEL, Given
from btu.defenses.kit.screening import (
    halves,
    ids_by_row,
    load_values,
    save_values,
)
from btu.errors import UserError, did_you_mean
from btu.findings import Screened, incoming_of
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_positive, check_share
from btu.stage_files import clean_rows_of, refuse_changed, victim_of
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray
from btu.victims import VICTIMS, VictimSource, folder_identity, weight_files

if TYPE_CHECKING:
    from btu.defenses.kit.language_model import Scorer


OF_CLEAN_ROWS = "clean-rows"
# As large a share as is masked when words are scored with the default spacing.
MASKED_SHARE = 0.2


@dataclass(frozen=True)
class Onion:
    """ONION: outlier words are removed.

    lm: the language model: ``clean-rows`` makes one of the reserved clean rows; else a causal or
        masked one by hub name, or a folder. revision: of a hub model.
    bar: the score from which a word is dropped: perplexity that its removal saves (causal), or
        nats of surprise (masked). Null is the bar that drops at most ``max_removed`` of the words
        of clean rows, a share in (0, 1), which acts where the bar is null.
    rows: clean rows that the bar is taken on, at most half of them; ``clean-rows`` learns on the
        others. It acts for these two.
    spacing: every that many words are masked together, at least 1; with as many as a text has, one
        at a time. It acts for masked models. Of a causal one it changes no score, but each value is
        computed: which of the two a model is shows when it is loaded.
    epochs, learning_rate, batch_size: of the learning; they act for ``clean-rows``.

    With a named model and a bar no clean row is read. `NEEDS` is of the class, so that a cell
    without any is refused all the same.
    """

    lm: str = OF_CLEAN_ROWS
    revision: str | None = None
    bar: float | None = None
    max_removed: float = 0.05
    rows: int = 300
    spacing: int = 5
    epochs: int = 3
    learning_rate: float = 2e-4
    batch_size: int = 32

    KIND: ClassVar[str] = "at inference"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS, LANGUAGE_MODEL)

    def __post_init__(self) -> None:
        check_share("defense.max_removed", self.max_removed)
        if self.bar is not None and not math.isfinite(self.bar):
            raise UserError(f"defense.bar must be a finite number or null, got {self.bar}.")
        for name in ("rows", "spacing", "epochs", "batch_size"):
            check_count(f"defense.{name}", getattr(self, name))
        check_positive("defense.learning_rate", self.learning_rate)
        if self.revision is not None and self.lm == OF_CLEAN_ROWS:
            raise UserError(
                f"defense.revision '{self.revision}' is of a hub model, and defense.lm is "
                f"'{OF_CLEAN_ROWS}'; leave it null."
            )

    def check(self, given: Given) -> None:
        """Raise a `UserError` where the language model, or rows to make it of, are not there."""
        if self.lm != OF_CLEAN_ROWS:
            find_language_model(self.lm, self.revision)
        if given.clean_rows < 2 and (self.lm == OF_CLEAN_ROWS or self.bar is None):
            raise UserError(
                "defense 'onion' takes its bar on at most half of the clean rows, and the data "
                f"have {given.clean_rows}; raise data.max_clean_rows to at least 2, or name a "
                "language model with defense.lm and set defense.bar."
            )

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned model: only what it reads is changed."""
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the language model and the word scores, shared by all bars, then the removal."""
        asks: dict[str, Any] = {"precision": base.train.precision, "spacing": self.spacing}
        reads: dict[str, Stage] = {}
        if self.lm == OF_CLEAN_ROWS:
            # Their facts tell how many classes the victim has.
            reads = {"clean": base.clean, "language model": self._learned(base)}
        else:
            asks["lm"] = find_language_model(self.lm, self.revision).identity
        scores = base.stage(
            score_incoming,
            "word scores (onion)",
            asks,
            {**reads, "incoming": incoming},
        )
        inputs = {"incoming": incoming, "scores": self._located(scores)}
        # It reads as far as the victim: what it has not judged, the victim need not read.
        config: dict[str, Any] = {"cut": True} if self.lm == OF_CLEAN_ROWS else {}
        if self.bar is not None:
            config["bar"] = self.bar
        else:
            config["max_removed"] = self.max_removed
            inputs["clean scores"] = self._located(
                base.stage(
                    score_clean,
                    "clean word scores (onion)",
                    {**asks, "rows": self.rows},
                    {**reads, "clean": base.clean},
                    units=min(self.rows, base.clean_rows // 2) * self.spacing,
                )
            )
        return base.stage(
            remove_outliers,
            "screen (onion)",
            config,
            inputs,
            kind="host",
        )

    def _learned(self, base: Foundation) -> Stage:
        settings = TrainSettings(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            precision=base.train.precision,
        )
        return base.stage(
            learn,
            "language model (onion)",
            {"train": as_config(settings), "rows": self.rows},
            {"clean": base.clean},
            units=self.epochs * base.clean_rows,
            model=True,
        )

    def _located(self, stage: Stage) -> Stage:
        """Say where a named model is: the path does not act, its content does."""
        if self.lm == OF_CLEAN_ROWS:
            return stage
        where = {**stage.where, "lm": {"name": self.lm, "revision": self.revision}}
        return dataclasses.replace(stage, where=where)


def find_language_model(name: str, revision: str | None) -> VictimSource:
    """Locate a named language model. Imports neither torch nor transformers, asks no network.

    Raises:
        UserError: a folder lacks a config or weights, or does not exist; or the hub cannot be
            reached (``HF_HUB_OFFLINE``) and its client does not hold the model.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"defense.lm folder {folder} has no config.json; it is no saved model.")
        weights = weight_files(folder)
        if not weights or not all(path.is_file() for path in weights):
            raise UserError(
                f"defense.lm folder {folder} has no model.safetensors; save the model there with "
                "save_pretrained."
            )
        return VictimSource(str(folder), folder_identity(folder, weights))
    if name.startswith((".", "/", "~")):
        raise UserError(
            f"defense.lm folder {folder} does not exist; give a folder, a hub name, or "
            f"'{OF_CLEAN_ROWS}'."
        )
    if name == "offline":
        raise UserError(
            "defense.lm 'offline' is an encoder without a language-model head; take "
            f"'{OF_CLEAN_ROWS}', which makes a language model of it."
        )
    hub_id = VICTIMS.load(name) if name in VICTIMS else name
    try:
        config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError as error:
        raise UserError(
            f"defense.lm '{name}' is no name that a hub model can have ({error})"
            f"{did_you_mean(name, [OF_CLEAN_ROWS, *VICTIMS])}"
        ) from error
    if constants.HF_HUB_OFFLINE and not isinstance(config, str):
        raise UserError(
            f"defense.lm '{name}' is not on this machine, and HF_HUB_OFFLINE forbids to download "
            f"it{did_you_mean(name, [OF_CLEAN_ROWS, *VICTIMS])}; give a folder, or "
            f"'{OF_CLEAN_ROWS}'."
        )
    return VictimSource(hub_id, f"{hub_id}@{revision or 'main'}")


# What the stages do ------------------------------------------------------------------------------


@stage(version=2)
def learn(run: StageRun) -> dict[str, Any]:
    """Make a language model of the clean rows that the bar is not taken on."""
    from btu.defenses.kit.language_model import fit_tied, new_tied, save_tied

    victim = victim_of(run, run.facts("clean")["classes"])
    clean = clean_rows_of(run)
    _, rows = halves(len(clean), run.config["rows"], run.config["seed"], "onion rows")
    seed = derive_seed(run.config["seed"], "onion language model")
    model = new_tied(victim, seed)
    fit_tied(run, victim, model, clean.take(rows), MASKED_SHARE, seed)
    save_tied(model, run.folder)
    return {"rows": len(rows)}


@stage(version=2)
def score_clean(run: StageRun) -> dict[str, Any]:
    """Write the (words,) scores of the clean rows that the bar is taken on."""
    victim = victim_of(run, run.facts("clean")["classes"])
    clean = clean_rows_of(run)
    rows, _ = halves(len(clean), run.config["rows"], run.config["seed"], "onion rows")
    texts = [
        victim.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in ids_by_row(clean.take(rows))
    ]
    return _score(run, texts, "clean word scores (onion)")


@stage(version=2)
def score_incoming(run: StageRun) -> dict[str, Any]:
    """Write the (words,) scores of the texts that come in."""
    texts = incoming_of(run.inputs["incoming"]).texts
    return _score(run, texts, "word scores (onion)")


@stage(version=1)
def remove_outliers(run: StageRun) -> dict[str, Any]:
    """Drop the words of a score above the bar."""
    bar = run.config.get("bar")
    if bar is None:
        clean = load_values(run.inputs["clean scores"])["scores"]
        bar = quantile_bar(clean, run.config["max_removed"])
    held = load_values(run.inputs["scores"])
    scores = np.split(held["scores"], np.cumsum(held["words"])[:-1])
    texts = incoming_of(run.inputs["incoming"]).texts
    cut = run.config.get("cut", False)
    left = tuple(
        without_outliers(text, of, bar, cut=cut) for text, of in zip(texts, scores, strict=True)
    )
    Screened(np.ones(len(texts), dtype=bool), left).save(run.folder)
    removed = sum(len(a.split()) - len(b.split()) for a, b in zip(texts, left, strict=True))
    return {"bar": bar, "words": int(held["words"].sum()), "removed": removed}


def quantile_bar(scores: FloatArray, max_removed: float) -> float:
    """Return the lowest bar above which at most `max_removed` of the scores lie."""
    known = np.sort(scores[~np.isnan(scores)])
    if not len(known):
        raise UserError("the clean rows have no words to take ONION's bar on; set defense.bar.")
    over = math.floor(max_removed * len(known))
    return float(known[len(known) - 1 - over])


def without_outliers(text: str, scores: FloatArray, bar: float, *, cut: bool = False) -> str:
    """Return a text without its words of a score above `bar`; untouched where there is none.

    scores: (words,). Where every word would go, the one that fits best stays. cut: what is left
    ends with the last word that was read; else words that were not read stay.
    """
    # Not a number: not read, so not judged.
    outlier: BoolArray = scores > bar
    if not outlier.any():
        return text
    if cut:
        end = int(np.flatnonzero(~np.isnan(scores))[-1]) + 1
        scores, outlier = scores[:end], outlier[:end]
    if outlier.all():
        outlier[int(scores.argmin())] = False
    # The words of a cut text outnumber its scores.
    return " ".join(word for word, out in zip(text.split(), outlier, strict=False) if not out)


def _score(run: StageRun, texts: Sequence[str], stage: str) -> dict[str, Any]:
    scores = _scorer(run).scores(run, texts, stage)
    words = np.array([len(of) for of in scores], dtype=np.int64)
    save_values(run.folder, scores=np.concatenate(scores), words=words)
    return {"texts": len(texts), "words": int(words.sum())}


def _scorer(run: StageRun) -> Scorer:
    """Return what scores words with the stage's language model.

    Raises:
        UserError: a named model cannot be loaded, or its files are not those planned with.
    """
    from btu.defenses.kit.language_model import Scorer, load_named, load_tied

    spacing, precision = run.config["spacing"], run.config["precision"]
    if "lm" not in run.config:
        victim = victim_of(run, run.facts("clean")["classes"])
        model = load_tied(victim, run.inputs["language model"])
        return Scorer(model, victim.tokenizer, victim.spec.max_length, spacing, precision)
    at = run.where["lm"]
    source = find_language_model(at["name"], at["revision"])
    refuse_changed(f"defense.lm '{at['name']}' is", run.config["lm"], source.identity)
    named, tokenizer, longest = load_named(source, at["revision"])
    return Scorer(named, tokenizer, longest, spacing, precision)
