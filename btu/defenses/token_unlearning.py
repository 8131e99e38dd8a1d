"""Backdoor Token Unlearning (BTU): expose the trigger's embedding rows, then unlearn them.

Jiang, Lyu, Li, Ma: Backdoor Token Unlearning: Exposing and Defending Backdoors in Pretrained
Language Models (AAAI 2025, arXiv 2501.03272). Reference code: XDJPH/Backdoor-Token-Unlearning
at 7a63ece, for BERT only.

While a model learns a poisoned set, the word-embedding rows of the trigger's tokens move
differently from those of clean tokens. Three short exposure rounds measure the movement, the
rows that moved most are flagged, and in the poisoned model they are replaced by a neutral row.

Every choice of the reference code is a hyperparameter here; preset ``reference`` takes its
choices, preset ``default`` ours:

==================  ======================  ==============  =======================================
hyperparameter      reference               default         why the default differs
==================  ======================  ==============  =======================================
bag_embeddings      full                    word            only word rows are read off; positions
                                                            and norm share the movement otherwise
bag_pooling         padded                  masked          with padding in the mean, a token's
                                                            gradient shrinks as its row gets shorter
removal             substring               token_id        deleting "a" as a substring mutilates
                                                            46,833 places of SST-2's 4,343 words
exclude             cls_sep                 special         padding, unknown: no triggers
cut_norm            running                 once            with c recomputed after every token the
                                                            result depends on the tokens' order
==================  ======================  ==============  =======================================

Plain bugs of the reference code that both presets mend: k comes from the vocabulary's real size
(the code's 35,022 gave 17 instead of 15 tokens at alpha 0.0005); detection and fine-tune see one
and the same poisoned set, and both are seeded (the code draws two, the first unseeded); no row of
the file is lost; a rate of 0 poisons nothing. The bag's batches are padded to the victim's
``max_length`` with ``padded``, 128 in the reference code.

Further differences, in both presets: only tokens that occur in the training set can be flagged
(others move by weight decay alone); weight decay spares biases and norms; no batch is dropped;
clean tuning starts a fresh optimizer, where the code goes on with the fine-tune's; on OLID the code
never flags "@" and "user", by hand. Fine-tune and clean tuning take warm-up, schedule and clipping
from ``train``: the code's are ``warmup_fraction: 0, schedule: constant, max_grad_norm: null`` (as
``benchmarks/reference.py`` sets them).

What depends on ``alpha``: the flagged set, round 2 (through round 1's flagged tokens), the cut
and the clean tuning. Rounds 1 and 3 do not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defense import DefenseContext, DefenseOutcome
from btu.errors import UserError, unknown
from btu.seeding import derive_seed
from btu.settings import SCHEDULES, TrainSettings, check_positive
from btu.types import BoolArray, FloatArray, Rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from btu.training import Encoded

ROUNDS = (1, 2, 3)
CHOICES = {
    "exposure_schedule": SCHEDULES,
    "bag_embeddings": ("word", "full"),
    "bag_pooling": ("masked", "padded"),
    "removal": ("token_id", "substring"),
    "exclude": ("special", "cls_sep"),
    "cut": ("dimensional", "row", "none"),
    "cut_norm": ("once", "running"),
}


@dataclass(frozen=True)
class TokenUnlearning:
    """Backdoor Token Unlearning.

    alpha: share of the vocabulary that each round flags, in (0, 1); one value, or one a round.
    rounds: exposure rounds that run. 1 trains a bag of embeddings, 2 the same without the tokens
        that round 1 flagged, 3 the word embeddings alone under the whole frozen model.
    exposure_epochs, exposure_learning_rate, exposure_schedule: of every round (AdamW, no warm-up,
        no clipping; the reference code's 1, 2e-5, constant).
    bag_batch_size: rows a step in rounds 1 and 2. exposure_batch_size: in round 3; the reference
        code takes 64 on SST-2, 32 on OLID, else 10.
    bag_embeddings: ``word`` trains word rows and classifier; ``full`` the victim's whole embedding
        layer (positions, norms) too.
    bag_pooling: ``masked`` averages real tokens; ``padded`` pads to max_length and averages all.
    removal: how round 2 drops round 1's tokens: ``token_id`` or ``substring`` of the raw text.
    exclude: never flagged: all ``special`` tokens, or the first and last of a row (``cls_sep``).
    cut: ``dimensional`` replaces, in a flagged row, the dimensions that moved by more than c;
        ``row`` all of it; ``none`` cuts nothing (an ablation: clean tuning alone).
    cut_norm: c = ||E - E0||_F / V, computed ``once``, or ``running`` after every token. It is
        the reference code's formula: a norm over all rows divided by V, not a mean row norm.
    """

    alpha: Any = 0.0005
    rounds: list[int] = field(default_factory=lambda: [1, 2, 3])
    exposure_epochs: int = 1
    exposure_learning_rate: float = 2e-5
    exposure_schedule: str = "constant"
    bag_batch_size: int = 256
    exposure_batch_size: int = 64
    bag_embeddings: str = "word"
    bag_pooling: str = "masked"
    removal: str = "token_id"
    exclude: str = "special"
    cut: str = "dimensional"
    cut_norm: str = "once"

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {
            "bag_embeddings": "full",
            "bag_pooling": "padded",
            "removal": "substring",
            "exclude": "cls_sep",
            "cut_norm": "running",
        },
    }

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(f"defense.{name}", getattr(self, name), choices)
        if not self.rounds or sorted(set(self.rounds)) != list(self.rounds):
            raise UserError(
                f"defense.rounds must be some of 1, 2, 3 in ascending order, got {self.rounds}."
            )
        if not set(self.rounds) <= set(ROUNDS):
            raise UserError(f"defense.rounds must be some of 1, 2, 3, got {self.rounds}.")
        if 2 in self.rounds and 1 not in self.rounds:
            raise UserError(
                f"defense.rounds {self.rounds} has round 2 without round 1, whose flagged tokens "
                "it removes; add 1 or leave out 2."
            )
        alphas = self.alpha if isinstance(self.alpha, list | tuple) else [self.alpha]
        if isinstance(self.alpha, list | tuple) and len(alphas) != len(self.rounds):
            raise UserError(
                f"defense.alpha has {len(alphas)} values for {len(self.rounds)} rounds; give one "
                "value, or one a round."
            )
        for alpha in alphas:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
                raise UserError(
                    f"defense.alpha must be above 0 and below 1, got {alpha!r}: 0 flags nothing "
                    "and 1 everything."
                )
        check_positive("defense.exposure_learning_rate", self.exposure_learning_rate)
        for name in ("exposure_epochs", "bag_batch_size", "exposure_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"defense.{name} must be at least 1, got {getattr(self, name)}.")

    def tokens_per_round(self, vocabulary: int) -> dict[int, int]:
        """Return k = floor(alpha * V) of every round that runs.

        Raises:
            UserError: alpha flags nothing, or everything.
        """
        alphas = (
            self.alpha if isinstance(self.alpha, list | tuple) else [self.alpha] * len(self.rounds)
        )
        counts = {}
        for number, alpha in zip(self.rounds, alphas, strict=True):
            # The nudge keeps alpha = k / V, computed in floating point, at k.
            k = int(alpha * vocabulary + 1e-9)
            if k < 1:
                raise UserError(
                    f"defense.alpha {alpha} flags nothing: {alpha} * {vocabulary} tokens is below "
                    f"1; use at least {math.ceil(1e7 / vocabulary) / 1e7:g}."
                )
            if k >= vocabulary:
                raise UserError(f"defense.alpha {alpha} flags all {vocabulary} tokens; lower it.")
            counts[number] = k
        return counts

    def check(self, vocabulary: int) -> None:
        """Raise a `UserError` where alpha flags nothing or everything of such a vocabulary."""
        self.tokens_per_round(vocabulary)

    def defend(self, context: DefenseContext) -> DefenseOutcome:
        """Expose, flag, cut, tune: the algorithm in the paper's order.

        Raises:
            UserError: alpha flags nothing, or every token of the training set.
        """
        exposure = self._expose(context)
        model = copy.deepcopy(context.model)
        with context.timed("unlearn"):
            cut_tokens(
                model.get_input_embeddings().weight,
                exposure.pretrained,
                context.victim.neutral_row(exposure.pretrained),
                exposure.flagged,
                self.cut,
                self.cut_norm,
            )
        context.clean_tune(model, "clean tuning (defended)")
        table: dict[str, Any] = {"count": context.train.counts(len(exposure.pretrained))}
        for number, drift in exposure.drift.items():
            table[f"drift_{number}"] = drift
        # Round 2's drift depends on alpha, so that it would make the ranking depend on it too.
        free = {number: moved for number, moved in exposure.drift.items() if number != 2}
        scores = ranking(free, exposure.candidates)
        return DefenseOutcome(model, exposure.flagged, scores, table)

    def _expose(self, context: DefenseContext) -> Exposure:
        """Run the exposure rounds and flag each one's top k."""
        victim = context.victim
        fresh = victim.new_model(derive_seed(context.seed, "exposure classifier"))
        pretrained = fresh.get_input_embeddings().weight.detach().clone()
        vocabulary = len(pretrained)
        per_round = self.tokens_per_round(vocabulary)
        candidates = self._candidates(context, vocabulary)
        if max(per_round.values()) >= candidates.sum():
            raise UserError(
                f"defense.alpha {self.alpha} flags all of the {candidates.sum()} tokens that occur "
                f"in the training set; use less than {candidates.sum() / vocabulary:.6f}."
            )
        drift: dict[int, FloatArray] = {}
        top: dict[int, tuple[int, ...]] = {}
        for number in self.rounds:
            data = context.train
            if number == 2:
                data = self._without(context, top[1])
            with context.timed(f"exposure round {number}"):
                trained = (
                    self._train_whole(context, fresh, data)
                    if number == 3
                    else self._train_bag(context, fresh, data, number)
                )
                moved = (trained.cpu() - pretrained).double().norm(dim=1)
            drift[number] = moved.numpy()
            top[number] = top_tokens(drift[number], candidates, per_round[number])
        flagged = dict.fromkeys(token for number in self.rounds for token in top[number])
        return Exposure(pretrained, candidates, drift, tuple(flagged))

    def _candidates(self, context: DefenseContext, vocabulary: int) -> BoolArray:
        """Return a (vocabulary,) mask of what may be flagged: it occurs and is not excluded."""
        tokenizer = context.victim.tokenizer
        mask: BoolArray = context.train.counts(vocabulary) > 0
        excluded = tokenizer.all_special_ids
        if self.exclude == "cls_sep":
            # Whatever the tokenizer puts around a text, under any name.
            excluded = tokenizer("")["input_ids"]
        mask[[i for i in excluded if i < vocabulary]] = False
        return mask

    def _without(self, context: DefenseContext, tokens: Sequence[int]) -> Encoded:
        """Return round 2's rows: the same texts without round 1's tokens."""
        if self.removal == "token_id":
            return context.train.without(tokens)
        # As in the reference code: a word piece "##x" never matches, a word matches inside others.
        pieces = [context.victim.tokenizer.decode([token]).strip() for token in tokens]
        texts = context.train_rows.texts
        for piece in pieces:
            texts = tuple(text.replace(piece, "") for text in texts)
        return context.victim.encode(Rows(texts, context.train_rows.labels))

    def _settings(self, context: DefenseContext, batch_size: int) -> TrainSettings:
        return TrainSettings(
            epochs=self.exposure_epochs,
            learning_rate=self.exposure_learning_rate,
            batch_size=batch_size,
            precision=context.settings.precision,
            weight_decay=context.settings.weight_decay,
            warmup_fraction=0.0,
            schedule=self.exposure_schedule,
            max_grad_norm=None,
        )

    def _train_bag(
        self, context: DefenseContext, fresh: PreTrainedModel, data: Encoded, number: int
    ) -> torch.Tensor:
        from btu.bag import BagClassifier
        from btu.training import fit

        seed = derive_seed(context.seed, "exposure", number)
        bag = BagClassifier(
            fresh,
            classes=context.victim.num_labels,
            full=self.bag_embeddings == "full",
            mean_over_padding=self.bag_pooling == "padded",
            seed=seed,
        )
        context.history += fit(
            bag,
            data,
            self._settings(context, self.bag_batch_size),
            seed=seed,
            stage=f"exposure round {number}",
            device=context.device,
            progress=context.progress,
            pad_to=context.victim.spec.max_length if self.bag_pooling == "padded" else None,
        )
        return bag.word_rows.detach()

    def _train_whole(
        self, context: DefenseContext, fresh: PreTrainedModel, data: Encoded
    ) -> torch.Tensor:
        from btu.training import fit

        model = copy.deepcopy(fresh)
        # The new classifier stays as drawn: only the word rows can learn the labels.
        model.requires_grad_(False)
        word_rows: torch.Tensor = model.get_input_embeddings().weight
        word_rows.requires_grad_(True)
        context.history += fit(
            model,
            data,
            self._settings(context, self.exposure_batch_size),
            seed=derive_seed(context.seed, "exposure", 3),
            stage="exposure round 3",
            device=context.device,
            progress=context.progress,
        )
        return word_rows.detach()


@dataclass(frozen=True)
class Exposure:
    """What the rounds saw.

    pretrained: (vocabulary, hidden) E0. candidates: (vocabulary,) what could be flagged.
    drift: by round, (vocabulary,) ||E[i] - E0[i]||_2. flagged: union over the rounds, in the
    order of round and drift.
    """

    pretrained: torch.Tensor
    candidates: BoolArray
    drift: Mapping[int, FloatArray]
    flagged: tuple[int, ...]


def _order(drift: FloatArray, candidates: BoolArray) -> np.ndarray:
    """Return the candidates' ids by falling drift; equal drifts by rising id."""
    ids = np.flatnonzero(candidates)
    return ids[np.lexsort((ids, -drift[ids]))]


def top_tokens(drift: FloatArray, candidates: BoolArray, k: int) -> tuple[int, ...]:
    """Return the ids of the `k` candidates that moved most, the furthest first."""
    return tuple(int(i) for i in _order(drift, candidates)[:k])


def ranking(drift: Mapping[int, FloatArray], candidates: BoolArray) -> FloatArray:
    """Return the (vocabulary,) score that the union rule thresholds: minus the best rank.

    With one alpha for all of these rounds a token is flagged at k exactly if its score is at
    least -k.
    """
    best = np.full(len(candidates), np.nan)
    for moved in drift.values():
        order = _order(moved, candidates)
        ranks = np.empty(len(order))
        ranks[:] = np.arange(1, len(order) + 1)
        best[order] = np.fmax(best[order], -ranks)
    return best


def cut_tokens(
    trained: torch.Tensor,
    pretrained: torch.Tensor,
    neutral: torch.Tensor,
    flagged: Sequence[int],
    cut: str,
    cut_norm: str,
) -> None:
    """Unlearn the rows `flagged` of `trained`, in place.

    trained, pretrained: (vocabulary, hidden). neutral: (hidden,). cut, cut_norm: see
    `TokenUnlearning`. With ``running``, c includes the rows that were already cut.
    """
    import torch

    if cut == "none" or not flagged:
        return
    with torch.no_grad():
        vocabulary = len(trained)
        reference = pretrained.to(trained.device)
        value = neutral.to(trained.device)
        square = float((trained - reference).double().pow(2).sum())
        for token in flagged:
            c = max(0.0, square) ** 0.5 / vocabulary
            before = trained[token] - reference[token]
            moved = torch.ones_like(before, dtype=torch.bool) if cut == "row" else before.abs() > c
            trained[token] = torch.where(moved, value, trained[token])
            if cut_norm == "running":
                after = trained[token] - reference[token]
                square += float(after.double().pow(2).sum() - before.double().pow(2).sum())
