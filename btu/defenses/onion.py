"""ONION: remove the words of a text that a language model finds out of place.

Qi, Chen, Li, Yao, Liu, Sun: ONION: A Simple and Effective Defense Against Textual Backdoor Attacks
(EMNLP 2021, arXiv 2011.10369). Reference code: thunlp/ONION, ``experiments/test_defense.py`` at
08efa14, with GPT-2 large.

Words whose removal lowers the perplexity of a text by more than a bar are dropped, and the model
reads the rest. No text is rejected.

Any causal or masked language model can be used (``lm``):

- A causal model scores as the code does: the perplexity of the text minus that without the word. A
  start-of-text token is put before the text, so that its first word has a probability too.
- A masked model cannot give the perplexity of a text in one pass. Its score is how surprising the
  word is in its place: -log p of its most surprising token, in nats, with all its tokens masked.
  Every ``spacing``-th word is masked in the same pass, which costs a fraction of the passes.
- ``clean-rows``, the default, needs no other model: the victim's pretrained weights (never those
  that were fine-tuned on the poison) with a head tied to its word embeddings learn to fill in
  masked words of the reserved clean rows, except those for the bar. A victim without a mask token
  learns to predict the next token instead, and scores as a causal model. The training rows are not
  used: in them a trigger is a frequent word, and would be expected.

Deviations: the code sweeps the bar on the test set from -100 to 0 (there a removal that lowers the
perplexity counts as negative), and thunlp/OpenBackdoor's ``onion_defender.py`` at 0c5a560 sets it
to 0 without looking at data. Here the bar removes at most ``max_removed`` of the words of held-out
clean rows, which needs no victim; or it is a number, to be swept. Training texts could be filtered
in the same way; this defense acts only at inference. The last word of a text is kept: a model
cannot classify an empty text.

The clean rows are decoded from the victim's tokens, since only these are stored, while incoming
texts are scored as they are. With an uncased victim the bar thus comes from lower-cased texts
without accents, in which punctuation marks are separate words ("do n ' t", "film ."), cut at the
victim's ``max_length``. Incoming texts of another form, for example with capitals that a named
cased model knows, have other words and other scores: the share of their words above the bar need
not be ``max_removed``. It is about that for texts like SST-2's, which are already lower-cased and
split into words and marks, except for contractions ("n't"). A victim whose tokens decode to the
original text (RoBERTa, GPT-2), or a ``bar``, avoids the difference.

Words beyond the longest input are not read and not scored. If words of such a text are removed and
the language model is ``clean-rows``, which reads as far as the victim does, the text is cut after
the last scored word: otherwise the victim would read unscored words in place of the removed ones. A
named model may read fewer words than the victim, and its texts are not cut.

Measured once (SST-2, MiniLM, BadNets with "cf", 10 %, dirty label, seed 0): ``clean-rows`` removes
"cf" from 97 % of the triggered rows, ASR 100 -> 22 (FTR 19), CACC 88.1 -> 86.1, and 54 % of the
clean rows lose a word. With ``max_removed`` 0.02: 88 %, ASR 27 (FTR 16), CACC 87.4. The default was
set before either result was known. AddSent's sentence is fluent: it is completely removed from no
row, and ASR stays at 100 (seed 0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, LANGUAGE_MODEL, POISONED_MODEL, SINGLE_TEXTS, Given
from btu.defenses.kit.screening import (
    halves,
    ids_by_row,
    load_values,
    save_values,
)
from btu.errors import UserError, did_you_mean
from btu.findings import Screened, incoming_of
from btu.foundation import Foundation
from btu.model_files import (
    folder_identity,
    has_vocabulary,
    read_config,
    refuse_redirection,
    weight_files,
)
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_positive, check_share
from btu.stage_files import clean_rows_of, refuse_changed, victim_of
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray
from btu.victims import VICTIMS, VictimSource

if TYPE_CHECKING:
    from btu.defenses.kit.language_model import Scorer


OF_CLEAN_ROWS = "clean-rows"
# The share that is masked when words are scored with the default spacing.
MASKED_SHARE = 0.2


@dataclass(frozen=True)
class Onion:
    """ONION: outlier words are removed.

    lm: the language model: ``clean-rows`` trains one on the reserved clean rows; otherwise the hub
        name or folder of a causal or masked model.
    revision: of a hub model.
    bar: words with a higher score are dropped: the perplexity that removal saves (causal), or nats
        of surprise (masked). Null computes the bar from ``max_removed``.
    max_removed: the share of the words of clean rows, in (0, 1), that the bar may drop; has an
        effect if ``bar`` is null.
    rows: number of clean rows for the bar, at most half of them; ``clean-rows`` learns on the
        others. It has an effect with a null ``bar`` or ``clean-rows``.
    spacing: every ``spacing``-th word is masked together, at least 1; a number as large as a text
        masks one word at a time. It has an effect for masked models. For a causal model it changes
        no score, but it is part of the key: the kind of a model is known only when it is loaded.
    epochs, learning_rate, batch_size: for training ``clean-rows``.

    With a named model and a bar no clean row is read. `NEEDS` belongs to the class, so a cell
    without clean rows is refused anyway.
    """

    lm: str = field(default=OF_CLEAN_ROWS, metadata={"path": True})
    revision: str | None = None
    bar: float | None = None
    max_removed: float = 0.05
    rows: int = 300
    spacing: int = 5
    epochs: int = 3
    learning_rate: float = 2e-4
    batch_size: int = 32

    KIND: ClassVar[str] = "at inference"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS, LANGUAGE_MODEL, SINGLE_TEXTS)

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
        """Raise a `UserError` if the language model, or rows to train it on, are missing."""
        if self.lm != OF_CLEAN_ROWS:
            find_language_model(self.lm, self.revision)
        if given.clean_rows < 2 and (self.lm == OF_CLEAN_ROWS or self.bar is None):
            raise UserError(
                "defense 'onion' computes its bar from at most half of the clean rows, and the "
                f"data have {given.clean_rows}; raise data.max_clean_rows to at least 2, or name a "
                "language model with defense.lm and set defense.bar."
            )

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned model: only its input is changed."""
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the language model and the word scores, shared by all bars, and the removal."""
        asks: dict[str, Any] = {"precision": base.train.precision, "spacing": self.spacing}
        reads: dict[str, Stage] = {}
        if self.lm == OF_CLEAN_ROWS:
            # The facts of the clean rows include the number of classes.
            reads = {"clean": base.clean, "language model": self.learned(base)}
        else:
            asks["lm"] = find_language_model(self.lm, self.revision).identity
        scores = base.stage(
            score_incoming,
            "word scores (onion)",
            asks,
            {**reads, "incoming": incoming},
        )
        inputs = {"incoming": incoming, "scores": self._located(scores)}
        # It reads as far as the victim: the victim must not read words that were not scored.
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

    def learned(self, base: Foundation) -> Stage:
        """Declare the training of a language model on the clean rows (``clean-rows``)."""
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
        """Add the location of a named model: its content is part of the key, the path is not."""
        if self.lm == OF_CLEAN_ROWS:
            return stage
        where = {**stage.where, "lm": {"name": self.lm, "revision": self.revision}}
        return dataclasses.replace(stage, where=where)


def find_language_model(name: str, revision: str | None) -> VictimSource:
    """Locate a named language model. Imports neither torch nor transformers; uses no network.

    Raises:
        UserError: a folder lacks a config or weights, or does not exist; or the hub is offline
            (``HF_HUB_OFFLINE``) and its client has no copy of the model.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"defense.lm folder {folder} has no config.json; it is not a saved model."
            )
        written = read_config(folder)
        refuse_redirection(f"defense.lm folder {folder}", written, folder)
        weights = weight_files(folder)
        if not weights or not all(path.is_file() for path in weights):
            raise UserError(
                f"defense.lm folder {folder} has no model.safetensors; save the model there with "
                "save_pretrained."
            )
        if not has_vocabulary(folder, written):
            raise UserError(
                f"defense.lm folder {folder} has no tokenizer: no tokenizer.json, vocabulary or "
                "sentencepiece model; save the model's tokenizer there with save_pretrained."
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
            f"defense.lm '{name}' is not a valid name of a hub model ({error})"
            f"{did_you_mean(name, [OF_CLEAN_ROWS, *VICTIMS])}"
        ) from error
    if constants.HF_HUB_OFFLINE and not isinstance(config, str):
        raise UserError(
            f"defense.lm '{name}' is not on this machine, and HF_HUB_OFFLINE forbids downloading "
            f"it{did_you_mean(name, [OF_CLEAN_ROWS, *VICTIMS])}; give a folder, or "
            f"'{OF_CLEAN_ROWS}'."
        )
    return VictimSource(hub_id, f"{hub_id}@{revision or 'main'}")


# What the stages do ------------------------------------------------------------------------------


@stage(version=2)
def learn(run: StageRun) -> dict[str, Any]:
    """Train a language model on the clean rows that are not used for the bar."""
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
    """Write the (words,) scores of the clean rows for the bar."""
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
    """Write the (words,) scores of the incoming texts."""
    texts = incoming_of(run.inputs["incoming"]).texts
    return _score(run, texts, "word scores (onion)")


@stage(version=1)
def remove_outliers(run: StageRun) -> dict[str, Any]:
    """Drop the words with a score above the bar."""
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
    """Return the lowest bar that at most `max_removed` of the scores exceed."""
    known = np.sort(scores[~np.isnan(scores)])
    if not len(known):
        raise UserError(
            "the clean rows have no words to compute ONION's bar from; set defense.bar."
        )
    over = math.floor(max_removed * len(known))
    return float(known[len(known) - 1 - over])


def without_outliers(text: str, scores: FloatArray, bar: float, *, cut: bool = False) -> str:
    """Return a text without the words whose score is above `bar`; unchanged if there are none.

    If all words would be dropped, the one with the lowest score is kept.

    text: the text.
    scores: (words,), NaN for words that were not read.
    bar: the highest score that stays.
    cut: end the text after the last word that was read; otherwise words that were not read stay.
    """
    # NaN: not read, so not scored.
    outlier: BoolArray = scores > bar
    if not outlier.any():
        return text
    if cut:
        end = int(np.flatnonzero(~np.isnan(scores))[-1]) + 1
        scores, outlier = scores[:end], outlier[:end]
    if outlier.all():
        outlier[int(scores.argmin())] = False
    # A cut text has more words than scores.
    return " ".join(word for word, out in zip(text.split(), outlier, strict=False) if not out)


def _score(run: StageRun, texts: Sequence[str], stage: str) -> dict[str, Any]:
    scores = scorer_of(run).scores(run, texts, stage)
    words = np.array([len(of) for of in scores], dtype=np.int64)
    save_values(run.folder, scores=np.concatenate(scores), words=words)
    return {"texts": len(texts), "words": int(words.sum())}


def scorer_of(run: StageRun) -> Scorer:
    """Return the scorer with the stage's language model.

    Without ``config['lm']`` that is the result of `learn`, the input ``language model``.

    Raises:
        UserError: a named model cannot be loaded, or its files differ from those at planning.
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
