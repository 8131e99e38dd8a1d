"""RAP: reject texts whose prediction a planted word does not change enough.

Yang, Lin, Li, Zhou, Sun: RAP: Robustness-Aware Perturbations for Defending against Backdoor Attacks
on NLP Models (EMNLP 2021, arXiv 2110.07831). Reference code: lancopku/RAP, ``rap_defense.py`` and
``evaluate_rap_performance.py`` at e769495.

The embedding row of a rare word is learned so that clean texts of a class lose a little of that
class's probability when the word is put before them. Backdoored texts are predicted so confidently
that they lose less. The bar is a low quantile of the loss in probability of clean rows.

The defaults are the settings of the original: target drops between 0.1 and 0.3 (``low``, ``high``),
5 epochs, batches of 32, bars at FRR 0.005 to 0.05 (``frr``, here 0.05).

Deviations:

- The code gets the class to protect. A defender does not know the target, so one row is learned for
  every class, and a text is screened with the row of its predicted class. All rows use the same
  word, one at a time.
- AdamW with ``learning_rate`` (without weight decay, so that no other row moves) replaces gradient
  descent at 1e-2 with gradients that are never reset. The row keeps its norm, as in the code.
- No dropout while the row is learned, because the objective is a difference of two predictions.
- The bar comes from clean rows on which the row was not learned; the code uses the same rows.
- The word is one token at the first place of the row. With a null `word` it is one that no training
  row and no clean row contains, so that it changes none of their texts; the code plants "cf", which
  may be the trigger itself.
- The predicted class has the highest probability, not one above 0.5; with two classes that is
  the same.

The predicting model is not changed: only the screen's own copy has the planted rows.

Measured once (SST-2, MiniLM, BadNets with "cf", 10 %, dirty label, seed 0): every triggered row is
rejected (ASR 100 -> 0, FAR 0), and 5.8 % of the clean rows (CACC 88.1 -> 82.6, since rejected rows
are not correct). Held-out clean rows lose 0.23 and 0.17 by the word, within the target range;
epochs and learning rate were not tuned further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.screening import (
    ids_by_row,
    load_values,
    places_around,
    save_values,
)
from btu.errors import UserError, did_you_mean
from btu.findings import Screened, incoming_of
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_positive, check_share
from btu.stage_files import clean_rows_of, model_of, training_rows_of, victim_of
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray, IntArray
from btu.victims import Victim

if TYPE_CHECKING:
    import torch
    from torch import nn

    from btu.training import Encoded


@dataclass(frozen=True)
class Rap:
    """Robustness-aware perturbations.

    word: the token to plant, as written in the victim's vocabulary; null takes one that no training
        row and no clean row contains.
    low, high: range of the probability that clean texts of a class should lose by the word,
        0 < low <= high < 1.
    frr: share of clean texts that may be rejected, in (0, 1): each class's bar is this quantile of
        the drops of held-out clean rows.
    epochs, learning_rate, batch_size: for learning each class's row.
    held_out: share of each class's clean rows, in (0, 1), for the bars.
    """

    word: str | None = None
    low: float = 0.1
    high: float = 0.3
    frr: float = 0.05
    epochs: int = 5
    learning_rate: float = 1e-2
    batch_size: int = 32
    held_out: float = 0.5

    KIND: ClassVar[str] = "at inference"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def __post_init__(self) -> None:
        for name in ("low", "high", "frr", "held_out"):
            check_share(f"defense.{name}", getattr(self, name))
        if self.low > self.high:
            raise UserError(
                f"defense.low {self.low} is above defense.high {self.high}: clean texts are to "
                "lose between the two; swap them."
            )
        check_positive("defense.learning_rate", self.learning_rate)
        for name in ("epochs", "batch_size"):
            check_count(f"defense.{name}", getattr(self, name))
        if self.word is not None and not self.word:
            raise UserError("defense.word must be a token of the victim's vocabulary, got ''.")

    def check(self, given: Given) -> None:
        """Raise a `UserError` if a class cannot have clean rows to learn on and to hold out."""
        if given.clean_rows < 2 * given.classes:
            raise UserError(
                f"defense 'rap' learns on clean rows of each of {given.classes} classes and "
                f"computes its bar from others, and the data have {given.clean_rows}; raise "
                f"data.max_clean_rows to at least {2 * given.classes}."
            )

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned model: the screen does not change it."""
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the planting and the drops, shared by all bars, and the screen."""
        settings = TrainSettings(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            precision=base.train.precision,
            # Weight decay would shrink all other rows.
            weight_decay=0.0,
            warmup_fraction=0.0,
            schedule="constant",
            max_grad_norm=None,
        )
        reads = {"clean": base.clean, "model": model}
        planted = base.stage(
            plant,
            "plant word (rap)",
            {
                "train": as_config(settings),
                "word": self.word,
                "low": self.low,
                "high": self.high,
                "held_out": self.held_out,
            },
            # Only tokens that the training rows do not contain can be planted.
            {**reads, **({} if self.word else {"rows": base.rows})},
            units=2 * self.epochs * base.clean_rows,
        )
        drops = base.stage(
            incoming_drops,
            "drops (rap)",
            {"precision": base.train.precision},
            {**reads, "planted": planted, "incoming": incoming},
        )
        return base.stage(
            screen_texts,
            "screen (rap)",
            {"frr": self.frr},
            {"planted": planted, "drops": drops},
            kind="host",
        )


@dataclass(frozen=True)
class Planting:
    """Where the word is planted.

    word: its token id.
    place: its position in a row, after the special tokens before a text.
    behind: number of special tokens after a text.
    longest: tokens of the longest row.
    """

    word: int
    place: int
    behind: int
    longest: int

    @classmethod
    def of(cls, victim: Victim, word: int) -> Planting:
        """Return the planting of a word for a victim."""
        return cls(word, *places_around(victim), victim.spec.max_length)


# What the stages do ------------------------------------------------------------------------------


@stage(version=2)
def plant(run: StageRun) -> dict[str, Any]:
    """Learn the word's row for every class, and measure the drops of held-out clean rows.

    Writes ``rows``, (classes, hidden), and ``drop`` and ``predicted``, (held-out rows,).

    Raises:
        UserError: the word is not a token, every token occurs, or a class has too few clean rows.
    """
    config = run.config
    classes = run.facts("clean")["classes"]
    victim = victim_of(run, classes)
    clean = clean_rows_of(run)
    model = model_of(run, "model")
    held = [clean] if config["word"] else [clean, training_rows_of(run)]
    vocabulary = len(model.get_input_embeddings().weight)
    word = chosen_word(victim, config["word"], vocabulary, held)
    learned, kept_back = split_by_class(
        clean.labels.numpy(), classes, config["held_out"], config["seed"]
    )
    planting = Planting.of(victim, word)
    rows = np.stack(
        [learn_row(run, model, clean.take(learned[c]), planting, c).numpy() for c in range(classes)]
    )
    drop, predicted = drops(run, model, clean.take(kept_back), planting, rows)
    save_values(run.folder, rows=rows, drop=drop, predicted=predicted)
    return {
        "word": word,
        "token": victim.tokenizer.convert_ids_to_tokens(word),
        "mean_drop": [
            float(drop[predicted == c].mean()) if (predicted == c).any() else None
            for c in range(classes)
        ],
    }


@stage(version=2)
def incoming_drops(run: StageRun) -> dict[str, Any]:
    """Write the predicted class of each incoming text, and its drop in probability."""
    victim = victim_of(run, run.facts("clean")["classes"])
    texts = victim.encode(incoming_of(run.inputs["incoming"]))
    planted = load_values(run.inputs["planted"])
    word = run.facts("planted")["word"]
    planting = Planting.of(victim, word)
    drop, predicted = drops(run, model_of(run, "model"), texts, planting, planted["rows"])
    save_values(run.folder, drop=drop, predicted=predicted)
    return {"texts": len(texts)}


@stage(version=1)
def screen_texts(run: StageRun) -> dict[str, Any]:
    """Reject the texts whose drop is below the bar of their predicted class."""
    clean, came = (load_values(run.inputs[role]) for role in ("planted", "drops"))
    bars = class_bars(clean["drop"], clean["predicted"], len(clean["rows"]), run.config["frr"])
    rejected = came["drop"] < bars[came["predicted"]]
    Screened(~rejected).save(run.folder)
    return {"bars": bars.tolist(), "turned_away": int(rejected.sum())}


def class_bars(drop: FloatArray, predicted: IntArray, classes: int, frr: float) -> FloatArray:
    """Return each class's bar: the `frr` quantile of the drops of clean rows predicted as it.

    A class that is predicted for no held-out row gets the quantile over all rows.
    """
    found = [drop[predicted == c] if (predicted == c).any() else drop for c in range(classes)]
    return np.array([np.quantile(drops, frr) for drops in found])


def chosen_word(victim: Victim, word: str | None, vocabulary: int, held: Sequence[Encoded]) -> int:
    """Return the id of the token to plant: the last whole word that none of `held` contains.

    Vocabularies are ordered by frequency or by merges, so rare tokens come last. If all whole words
    occur, it is the last word piece that does not.

    Raises:
        UserError: `word` is not a token that can be planted, or every token occurs.
    """
    tokenizer = victim.tokenizer
    known = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    if word is not None:
        if known.get(word, vocabulary) >= vocabulary or known[word] in special:
            raise UserError(
                f"defense.word '{word}' is not a token of victim '{victim.spec.name}' that can be "
                f"planted{did_you_mean(word, known)}; name one as its vocabulary writes it, or "
                "leave it null."
            )
        return int(known[word])
    absent: BoolArray = np.sum([data.counts(vocabulary) for data in held], axis=0) == 0
    free = [i for i in np.flatnonzero(absent)[::-1].tolist() if i not in special]
    free = [i for i in free if i < len(tokenizer)]
    if not free:
        raise UserError(
            f"defense 'rap' plants a token that no row contains, and the rows contain all "
            f"{vocabulary} of victim '{victim.spec.name}'; name a rare one with defense.word."
        )
    whole = (i for i in free if _is_word(tokenizer.decode([i]).strip()))
    return int(next(whole, free[0]))


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and len(text) > 1


def split_by_class(
    labels: IntArray, classes: int, held_out: float, seed: int
) -> tuple[list[IntArray], IntArray]:
    """Return the clean rows to learn on, by class, and all held-out rows.

    Raises:
        UserError: a class has fewer than two rows.
    """
    rng = np.random.default_rng(derive_seed(seed, "rap rows"))
    learned, held = [], []
    for c in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == c))
        if len(rows) < 2:
            raise UserError(
                f"defense 'rap' needs at least two clean rows of each class, and class {c} has "
                f"{len(rows)}; raise data.max_clean_rows."
            )
        count = min(len(rows) - 1, max(1, round(held_out * len(rows))))
        held.append(rows[:count])
        learned.append(np.sort(rows[count:]))
    return learned, np.sort(np.concatenate(held))


def with_word(data: Encoded, planting: Planting) -> Encoded:
    """Return the rows with the word planted.

    A row that would be too long loses the last token of its text; special tokens after the text
    stay.
    """
    from btu.training import Encoded

    rows = []
    for ids in ids_by_row(data):
        place = planting.place
        new = np.concatenate([ids[:place], [planting.word], ids[place:]])
        if len(new) > planting.longest:
            new = np.delete(new, len(new) - 1 - planting.behind)
        rows.append(new.tolist())
    return Encoded.from_lists(rows, data.labels.tolist(), data.pad_id)


def learn_row(
    run: StageRun, model: nn.Module, rows: Encoded, planting: Planting, label: int
) -> torch.Tensor:
    """Return the word's (hidden,) row that lowers the probability of `label` for its clean rows.

    The model is restored afterwards.
    """
    import torch

    low, high = run.config["low"], run.config["high"]
    word, place = planting.word, planting.place
    weight = word_rows(model)
    before = weight.detach()[word].clone()
    norm = before.norm()
    model.requires_grad_(False)
    weight.requires_grad_(True)
    only = torch.zeros(len(weight), 1)
    only[word] = 1
    hook = weight.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient * only.to(gradient.device)
    )

    def objective(
        model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from btu.training import logits_of

        # `fit` sets train mode.
        model.eval()
        with torch.no_grad():
            plain = [torch.cat([x[:, :place], x[:, place + 1 :]], 1) for x in (ids, mask)]
            given = logits_of(model, plain[0], plain[1]).softmax(1)[:, label]
        logits = logits_of(model, ids, mask)
        lost = given - logits.softmax(1)[:, label]
        return ((low - lost).relu() + (lost - high).relu()).mean(), logits

    def keep_norm(_: float) -> bool:
        with torch.no_grad():
            weight[word] *= norm.to(weight.device) / weight[word].norm()
        return False

    run.fit(
        model,
        with_word(rows, planting),
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "rap", label),
        stage=f"plant word for class {label}",
        objective=objective,
        after_step=keep_norm,
    )
    hook.remove()
    row = weight.detach()[word].cpu().clone()
    with torch.no_grad():
        weight[word] = before.to(weight.device)
    return row


def word_rows(model: nn.Module) -> torch.Tensor:
    """Return the writable (vocabulary, hidden) word embeddings of a model."""
    found: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: torch.Tensor = found.weight
    return weight


def drops(
    run: StageRun, model: nn.Module, rows: Encoded, planting: Planting, planted: FloatArray
) -> tuple[FloatArray, IntArray]:
    """Return each row's drop in the probability of its predicted class, and that class.

    Both are (rows,).

    planted: (classes, hidden), the word's row for each class; the model keeps the last one used.
    """
    import torch

    from btu.training import logits_of

    train = run.config.get("train")
    precision = run.config["precision"] if train is None else train["precision"]

    def probabilities(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return logits_of(model, ids, mask).softmax(1)

    def asked(data: Encoded, number: int) -> Any:
        passes = (number, 1 + len(planted))
        return run.in_batches(
            model, data, probabilities, precision=precision, stage="drops (rap)", of=passes
        )

    given = asked(rows, 0)
    predicted: IntArray = given.argmax(axis=1).astype(np.int64)
    drop = np.zeros(len(rows))
    worded, weight = with_word(rows, planting), word_rows(model)
    for label, row in enumerate(planted):
        of_class = np.flatnonzero(predicted == label)
        if not len(of_class):
            continue
        with torch.no_grad():
            weight[planting.word] = torch.from_numpy(row).to(weight.device)
        after = asked(worded.take(of_class), label + 1)
        drop[of_class] = given[of_class, label].astype(np.float64) - after[:, label]
    return drop, predicted
