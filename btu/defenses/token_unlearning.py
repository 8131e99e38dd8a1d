"""Backdoor Token Unlearning (BTU): expose the trigger's embedding rows, then unlearn them.

Jiang, Lyu, Li, Ma: Backdoor Token Unlearning: Exposing and Defending Backdoors in Pretrained
Language Models (AAAI 2025, arXiv 2501.03272). Reference code: XDJPH/Backdoor-Token-Unlearning
at 7a63ece, for BERT only.

While a model learns a poisoned set, the word-embedding rows of the trigger's tokens move
differently from those of clean tokens. Short exposure rounds measure the movement. A detection rule
(`btu.rules.base.RULES`) flags the rows that moved abnormally, and a neutral row replaces them in
the poisoned model.

Every choice of the reference code is a hyperparameter. Preset ``reference`` has the choices of the
reference code; preset ``default`` differs:

==================  ======================  ==============  =======================================
hyperparameter      reference               default         why the default differs
==================  ======================  ==============  =======================================
rule                top_fraction            contrast        a fixed share of the vocabulary flags
                                                            30 clean tokens to catch one trigger
rounds              1, 2, 3                 3               the bag's rounds separate a trigger from
                                                            a strong benign word no better
                                                            (measured)
bag_embeddings      full                    word            only word rows are measured; positions
                                                            and norm would share the movement
bag_pooling         padded                  masked          with padding in the mean, a token's
                                                            gradient shrinks as its row gets shorter
removal             substring               token_id        deleting "a" as a substring mutilates
                                                            46,833 places of SST-2's 4,343 words
exclude             cls_sep                 special         padding and unknown are no triggers
cut_norm            running                 once            with c recomputed after every token the
                                                            result depends on the tokens' order
max_cut_cost        1                       0.02            a cut that clean tuning does not repair
                                                            is refused
contradicted        keep                    relabel         a paraphrase attack has no token to cut
==================  ======================  ==============  =======================================

Both presets fix bugs of the reference code: k is computed from the real size of the vocabulary (the
code's 35,022 gave 17 instead of 15 tokens at alpha 0.0005); detection and fine-tune use the same
poisoned set, and both are seeded (the code draws two sets, the first unseeded); no row of the file
is lost; a rate of 0 poisons nothing. With ``padded``, the bag's batches are padded to the victim's
``max_length``, which is 128 in the reference code.

Further differences, in both presets: only tokens that occur in the training set can be flagged
(others move by weight decay alone); weight decay does not apply to biases and norms; no batch is
dropped; clean tuning starts a fresh optimizer, where the code continues with the fine-tune's; on
OLID the code excludes "@" and "user" by hand. Fine-tune and clean tuning take warm-up, schedule and
clipping from ``train``: the code's are ``warmup_fraction: 0, schedule: constant, max_grad_norm:
null`` (``benchmarks/reference.py`` sets them).

The flagged set, round 2 (through the tokens that round 1 flagged; only rule ``top_fraction`` has
it), the cut and the clean tuning depend on the threshold. Rounds 1 and 3 and the scores do not. The
cut and the clean tuning depend on it through the flagged set alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.contradiction import (
    CONTRADICTED,
    KEEP,
    LEAST_CLEAN,
    RELABEL,
    contradictions,
    relabel_config,
    with_relabeled,
)
from btu.defenses.kit.cutting import NEVER, cut_and_tune
from btu.errors import UserError, unknown
from btu.findings import Suspects
from btu.foundation import Foundation
from btu.reading import made_counts, without_inserted
from btu.rules.base import (
    DEFAULT_RULE,
    RULES,
    TOP_FRACTION,
    Evidence,
    Rule,
    flag,
    suspicion,
    suspicion_bar,
    threshold_name,
)
from btu.seeding import derive_seed
from btu.settings import SCHEDULES, TrainSettings, check_count, check_positive, is_number
from btu.stage_files import (
    clean_rows_of,
    texts_of,
    training_rows_of,
    victim_of,
)
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray
from btu.victims import Victim

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from btu.training import Encoded


DRIFT = "drift.safetensors"
# Roles of inputs: the scores, the tokens that a threshold flags, and the round that depends on one.
SCORES, FLAGGED, ROUND_2 = "scores", "flagged", "round 2"
INSERTED = "inserted"
ROUNDS = (1, 2, 3)
CHOICES = {
    "exposure_schedule": SCHEDULES,
    "bag_embeddings": ("word", "full"),
    "bag_pooling": ("masked", "padded"),
    "removal": ("token_id", "substring"),
    "exclude": (INSERTED, "special", "cls_sep"),
    "cut": ("dimensional", "row", "none"),
    "cut_norm": ("once", "running"),
    "contradicted": (RELABEL, KEEP),
}


@dataclass(frozen=True)
class TokenUnlearning:
    """Backdoor Token Unlearning.

    rule: how the drifts become flags (`btu.rules.base.RULES`); null takes ``contrast``, or
        ``top_fraction`` where alpha is given.
    threshold: tokens with at least this score are flagged, in the rule's unit; null is its default.
    fdr: states the threshold of rule ``contrast`` as a false-discovery rate in (0, 1): the expected
        number of benign tokens that it flags in a data set. It then replaces `threshold`: 0.05 is
        4.5, 0.01 is 4.83.
    alpha: the threshold of ``top_fraction``: the share of the vocabulary that each round flags, in
        (0, 1); one value, or one per round. Null is 0.0005.
    rounds: exposure rounds that run. 1 trains a bag of embeddings, 2 the same without the tokens
        that round 1 flagged, 3 the word embeddings alone under the whole frozen model. Null is
        the rule's default: all three for ``top_fraction``, which flags the tokens of any round;
        3 for the other rules, which flag tokens that stand out in every round and cannot use 2.
    exposure_epochs, exposure_learning_rate, exposure_schedule: for every round (AdamW, no warm-up,
        no clipping; the reference code's 1, 2e-5, constant).
    bag_batch_size: rows per step in rounds 1 and 2. Like the other keys of the bag and
        ``removal``, it has an effect only where these rounds run.
    exposure_batch_size: rows per step in round 3; the reference code uses 64 on SST-2, 32 on OLID,
        else 10.
    bag_embeddings: ``word`` trains word rows and classifier; ``full`` the victim's whole embedding
        layer (positions, norms) too.
    bag_pooling: ``masked`` averages real tokens; ``padded`` pads to max_length and averages all.
    removal: how round 2 drops round 1's tokens: ``token_id`` or ``substring`` of the raw text.
    exclude: tokens that are never flagged: what the tokenizer ``inserted`` around a text, unless
        the text made the same token; all ``special`` ones, the unknown token too; or those around
        a text wherever they are (``cls_sep``).
    cut: ``dimensional`` replaces, in a flagged row, the dimensions that moved by more than c;
        ``row`` all of it; ``none`` cuts nothing (an ablation: clean tuning alone).
    max_cut_cost: a flagged token is not cut if its cut costs more than this fraction of the clean
        rows, and at least 3 rows, both at once and after clean tuning, where all tokens that cost
        so much at once are cut together; the table of tokens marks it as ``vetoed``. 1 cuts every
        flagged token. Null is the rule's default: 0.02 for ``contrast``, 1 for the others.
    contradicted: the second stage, for paraphrase attacks, which have no trigger token.
        ``relabel`` looks for a class whose rows without a flagged token contradict the clean rows
        more often than chance allows, and tunes on the clean rows together with the oddest of
        these rows under the labels that models of the clean rows predict
        (`btu.defenses.kit.contradiction`); where no class stands out it changes nothing. ``keep``
        does not look. Null is ``relabel`` for rule ``contrast`` if tokens are cut, else ``keep``.
    cut_norm: c = ||E - E0||_F / V, computed ``once``, or ``running`` after every token. It is
        the reference code's formula: a norm over all rows divided by V, not a mean row norm.
    """

    rule: str | None = None
    threshold: float | None = None
    fdr: float | None = None
    alpha: Any = None
    rounds: Any = None
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
    max_cut_cost: float | None = None
    contradicted: str | None = None

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {
            "rule": TOP_FRACTION,
            "bag_embeddings": "full",
            "bag_pooling": "padded",
            "removal": "substring",
            "exclude": "cls_sep",
            "cut_norm": "running",
        },
    }

    def __post_init__(self) -> None:
        self._resolve_rule()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(f"defense.{name}", getattr(self, name), choices)
        rounds = self._rounds
        if not isinstance(rounds, list | tuple):
            raise UserError(
                f"defense.rounds must be a list of rounds, got {rounds!r}; write [{rounds}]."
            )
        if not rounds or sorted(set(rounds)) != list(rounds):
            raise UserError(
                f"defense.rounds must be some of 1, 2, 3 in ascending order, got {self.rounds}."
            )
        if not set(rounds) <= set(ROUNDS):
            raise UserError(f"defense.rounds must be some of 1, 2, 3, got {self.rounds}.")
        if 2 in rounds and 1 not in rounds:
            raise UserError(
                f"defense.rounds {self.rounds} has round 2 without round 1, whose flagged tokens "
                "it removes; add 1 or leave out 2."
            )
        if self.rule == TOP_FRACTION:
            self._check_alpha()
        elif 2 in rounds:
            raise UserError(
                f"defense.rounds {self.rounds} has round 2, whose drift depends on what round 1 "
                f"flagged; rule '{self.rule}' takes 1, 3 or both."
            )
        assert self.max_cut_cost is not None  # resolved by now
        if not is_number(self.max_cut_cost) or not 0 <= self.max_cut_cost <= NEVER:
            raise UserError(
                f"defense.max_cut_cost must be between 0 and 1, got {self.max_cut_cost!r}: it is a "
                "fraction of the clean rows; 1 cuts every flagged token."
            )
        check_positive("defense.exposure_learning_rate", self.exposure_learning_rate)
        for name in ("exposure_epochs", "bag_batch_size", "exposure_batch_size"):
            check_count(f"defense.{name}", getattr(self, name))

    def _resolve_rule(self) -> None:
        """Replace null in rule, threshold and other keys by the values used, for the config."""
        rule = self.rule or (DEFAULT_RULE if self.alpha is None else TOP_FRACTION)
        found = RULES.load(rule)
        if rule == TOP_FRACTION:
            if self.threshold is not None:
                raise UserError(
                    f"defense.threshold {self.threshold!r} does not act with rule "
                    f"'{TOP_FRACTION}', whose threshold is defense.alpha; set that instead."
                )
            resolved: dict[str, Any] = {"alpha": found.threshold}
        else:
            if self.alpha is not None:
                raise UserError(
                    f"defense.alpha {self.alpha!r} is the threshold of rule '{TOP_FRACTION}' and "
                    f"does not act with '{rule}'; set defense.threshold instead, or leave out "
                    "defense.rule."
                )
            resolved = {"threshold": found.threshold}
        if self.fdr is not None:
            resolved["threshold"] = self._threshold_at(self.fdr, rule, found)
        resolved |= {
            "rule": rule,
            "rounds": list(found.rounds),
            "max_cut_cost": found.max_cut_cost,
            "contradicted": KEEP if self.cut == "none" else found.contradicted,
        }
        for name, value in resolved.items():
            if getattr(self, name) is None:
                # Frozen for everyone else.
                object.__setattr__(self, name, value)
        if rule != TOP_FRACTION:
            assert self.threshold is not None
            found.check(self.threshold)

    def _threshold_at(self, fdr: float, rule: str, found: Rule) -> float:
        if found.at_fdr is None:
            raise UserError(
                f"defense.fdr {fdr!r} does not act with rule '{rule}', whose scores are no "
                f"probabilities; set defense.{threshold_name(rule)}, or take rule '{DEFAULT_RULE}'."
            )
        if not is_number(fdr) or not 0 < fdr < 1:
            raise UserError(
                f"defense.fdr must be above 0 and below 1, got {fdr!r}: it is the number of "
                "benign tokens that are flagged in a data set, on average."
            )
        threshold = round(found.at_fdr(fdr), 4)
        # A resolved config has both.
        if self.threshold not in (None, threshold):
            raise UserError(
                f"defense.fdr {fdr!r} and defense.threshold {self.threshold!r} both say where "
                "tokens are flagged; give one of them."
            )
        return threshold

    @property
    def _rounds(self) -> list[int]:
        rounds: list[int] = self.rounds  # resolved by now
        return rounds

    def _check_alpha(self) -> None:
        several = isinstance(self.alpha, list | tuple)
        alphas = self.alpha if several else [self.alpha]
        if several and len(alphas) != len(self._rounds):
            raise UserError(
                f"defense.alpha has {len(alphas)} values for {len(self._rounds)} rounds; give one "
                "value, or one a round."
            )
        for alpha in alphas:
            if not is_number(alpha) or not 0 < alpha < 1:
                raise UserError(
                    f"defense.alpha must be above 0 and below 1, got {alpha!r}: 0 flags nothing "
                    "and 1 everything."
                )

    def check(self, given: Given) -> None:
        """Raise a `UserError` if alpha flags nothing or everything of such a vocabulary.

        Or if there are too few clean rows to train the two models of ``relabel`` on, or if tokens
        that the tokenizer inserts between the texts of a pair would count as those of a text.
        """
        if self.exclude == INSERTED and given.pairs:
            raise UserError(
                f"defense.exclude {INSERTED} knows what the tokenizer puts around one text, and "
                "the rows of these data are pairs (data.pair_column), with more in between; use "
                "defense.exclude=special."
            )
        if self.contradicted == RELABEL and given.clean_rows < LEAST_CLEAN:
            raise UserError(
                f"defense.contradicted {RELABEL} trains one model on each half of the clean rows, "
                f"and the data have {given.clean_rows}; give at least {LEAST_CLEAN}, or set "
                f"defense.contradicted={KEEP}."
            )
        if self.rule == TOP_FRACTION and given.vocabulary is not None:
            for alpha in self._alphas().values():
                tokens_flagged(alpha, given.vocabulary, given.vocabulary)

    def stages(self, base: Foundation) -> Stage:
        """Declare a stage per exposure round, the scores, the flags, then cut and tuning.

        Round 2 depends on round 1's alpha; rounds 1 and 3 and the scores are shared by all
        thresholds. So are the stages behind ``contradicted: relabel``; its models of the clean rows
        are shared by attacks and poison rates too. Thresholds that flag the same tokens have equal
        models, since the cut reads the flags alone.
        """
        second = self.second_stage(base)
        return base.stage(
            unlearn,
            "unlearn",
            {
                "cut": self.cut,
                "cut_norm": self.cut_norm,
                **self.veto_config(),
                **base.tuning_config(),
                **relabel_config(base, second),
            },
            {
                "rows": base.rows,
                "clean": base.clean,
                "model": base.model,
                **self._found(base),
                **second,
            },
            units=base.clean_rows * base.tuning.epochs,
            kind="cell",
            model=True,
            reads=(FLAGGED,),
        )

    def detection(self, base: Foundation) -> Stage:
        """Declare the exposure rounds and the flagging only: no model is fine-tuned or cut."""
        return base.stage(detect, "detect", {}, self._found(base), kind="host")

    def flags(self, base: Foundation) -> Stage:
        """Declare the exposure rounds and which tokens they flag, without scores and columns."""
        return self._found(base)[FLAGGED]

    def _found(self, base: Foundation) -> dict[str, Stage]:
        """Declare scores and flags, by role, and round 2, which is a column of the table alone."""
        rounds = self.exposure(base)
        # Not round 2: its drift depends on alpha, and scores must not depend on a threshold.
        free = {role: done for role, done in rounds.items() if role != ROUND_2}
        assert self.rule is not None  # resolved by now
        scores = base.stage(
            score,
            "score tokens",
            {
                "rule": self.rule,
                "rule_version": RULES.load(self.rule).version,
                "exclude": self.exclude,
            },
            {"rows": base.rows, "clean": base.clean, **free},
            kind="host",
        )
        fraction = self.rule == TOP_FRACTION
        flagged = base.stage(
            flag_tokens,
            "flag tokens",
            {
                "rule": self.rule,
                **({"alpha": list(map(list, self._alphas().items()))} if fraction else {}),
                **({} if fraction else {"threshold": self.threshold}),
            },
            {SCORES: scores, **(rounds if fraction else {})},
            kind="host",
        )
        late = {role: done for role, done in rounds.items() if role == ROUND_2}
        return {**late, SCORES: scores, FLAGGED: flagged}

    def exposure(self, base: Foundation) -> dict[str, Stage]:
        """Declare the exposure rounds, by role."""
        rounds: dict[str, Stage] = {}
        for number in self._rounds:
            inputs = {"rows": base.rows}
            config = {"round": number, **self._exposure_config(base.train, number)}
            if number == 2:
                inputs["round 1"] = rounds["round 1"]
                config |= {
                    "alpha": self._alphas()[1],
                    "removal": self.removal,
                    "exclude": self.exclude,
                }
            rounds[f"round {number}"] = base.stage(
                expose,
                f"exposure round {number}",
                config,
                inputs,
                units=base.train_rows * self.exposure_epochs,
                # Each threshold has its own round 2.
                kind="cell" if number == 2 else "stage",
            )
        return rounds

    def second_stage(self, base: Foundation) -> dict[str, Stage]:
        """Declare the stages behind ``contradicted``, by role; none with ``keep``."""
        return {CONTRADICTED: contradictions(base)} if self.contradicted == RELABEL else {}

    def veto_config(self) -> dict[str, Any]:
        """Return the bar on the cost of a cut; nothing where no cut is refused."""
        return {} if self.max_cut_cost == NEVER else {"max_cut_cost": self.max_cut_cost}

    def _alphas(self) -> dict[int, float]:
        """Return the share that each round flags, by round."""
        several = isinstance(self.alpha, list | tuple)
        values = self.alpha if several else [self.alpha] * len(self._rounds)
        return dict(zip(self._rounds, values, strict=True))

    def _exposure_config(self, train: TrainSettings, number: int) -> dict[str, Any]:
        """Return what affects a round: settings of the bag in 1 and 2, of the model in 3."""
        settings = TrainSettings(
            epochs=self.exposure_epochs,
            learning_rate=self.exposure_learning_rate,
            batch_size=self.exposure_batch_size if number == 3 else self.bag_batch_size,
            precision=train.precision,
            weight_decay=train.weight_decay,
            warmup_fraction=0.0,
            schedule=self.exposure_schedule,
            max_grad_norm=None,
        )
        config: dict[str, Any] = {"train": as_config(settings)}
        if number != 3:
            config |= {"bag_embeddings": self.bag_embeddings, "bag_pooling": self.bag_pooling}
        return config


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def expose(run: StageRun) -> dict[str, Any]:
    """Run one exposure round. Write how far each word row moved.

    Writes ``drift.safetensors``: ``drift``, (vocabulary,) float64, ||E[i] - E0[i]||_2.

    Raises:
        UserError: round 1 flags every token of the training set.
    """
    import torch
    from safetensors.numpy import save_file

    victim = victim_of(run)
    number = run.config["round"]
    fresh = victim.new_model(derive_seed(run.config["seed"], "exposure classifier"))
    pretrained = fresh.get_input_embeddings().weight.detach().clone()
    data = training_rows_of(run)
    if number == 2:
        candidates = candidate_tokens(victim, data, len(pretrained), run.config["exclude"])
        k = tokens_flagged(run.config["alpha"], len(pretrained), int(candidates.sum()))
        first = top_tokens(_drift(run, 1), candidates, k)
        data = _without(run, victim, data, first)
    trained = (
        _train_whole(run, fresh, data)
        if number == 3
        else _train_bag(run, victim, fresh, data, number)
    )
    with torch.no_grad():
        moved = (trained.cpu() - pretrained).double().norm(dim=1)
    save_file({"drift": moved.numpy()}, run.folder / DRIFT)
    return {}


@stage(version=1)
def score(run: StageRun) -> dict[str, Any]:
    """Score every candidate token and every training row.

    Writes what `Suspects.save` does, with no token flagged, and the columns behind the scores.
    """
    config, victim, data = run.config, victim_of(run), training_rows_of(run)
    drift = {number: _drift(run, number) for number in ROUNDS if f"round {number}" in run.inputs}
    vocabulary = len(next(iter(drift.values())))
    candidates = candidate_tokens(victim, data, vocabulary, config["exclude"])
    clean = clean_rows_of(run)
    if config["exclude"] == INSERTED:
        data, clean = without_inserted(victim.tokenizer, vocabulary, (data, clean))
    evidence = Evidence(drift, candidates, data, clean)
    rule = RULES.load(config["rule"])
    table: dict[str, Any] = {"count": evidence.count}
    table |= {f"drift_{number}": moved for number, moved in drift.items()}
    table |= {
        "train_rows": evidence.train_rows.sum(axis=1),
        "clean_rows": evidence.clean_rows.sum(axis=1),
        "label": evidence.surplus.argmax(axis=1),
        "surplus": evidence.surplus.max(axis=1),
    }
    if rule.columns is not None:
        table |= rule.columns(evidence, next(reversed(drift.values())))
    suspects = Suspects(
        None, rule.scores(evidence), table, suspicion(evidence), suspicion_bar(evidence)
    )
    return suspects.save(run.folder)


@stage(version=1)
def flag_tokens(run: StageRun) -> dict[str, Any]:
    """Flag the tokens that moved abnormally, by their scores; report them and nothing else.

    What follows reads these facts alone, so that thresholds with equal flags share it.

    Raises:
        UserError: alpha flags nothing, or every token of the training set.
    """
    config, scores = run.config, _scored(run).scores
    assert scores is not None
    if config["rule"] != TOP_FRACTION:
        flagged = flag(scores, RULES.load(config["rule"]).bar(config["threshold"]))
        return {"flagged": list(flagged), "vocabulary": len(scores)}
    candidates = ~np.isnan(scores)
    found: dict[int, None] = {}
    for number, alpha in config["alpha"]:
        k = tokens_flagged(alpha, len(scores), int(candidates.sum()))
        found |= dict.fromkeys(top_tokens(_drift(run, number), candidates, k))
    return {"flagged": list(found), "vocabulary": len(scores)}


@stage(version=2)
def detect(run: StageRun) -> dict[str, Any]:
    """Put scores and flags together."""
    return _suspects(run).save(run.folder)


@stage(version=3)
def unlearn(run: StageRun) -> dict[str, Any]:
    """Cut the flagged tokens from the poisoned model, and tune it."""
    victim, suspects = victim_of(run), _suspects(run)
    measured, columns, relabeled = cut_and_tune(run, victim, suspects.tokens)
    suspects = with_relabeled(suspects, training_rows_of(run), relabeled)
    suspects = replace(suspects, table={**suspects.table, **columns})
    return {**suspects.save(run.folder), "measured": measured}


def _scored(run: StageRun) -> Suspects:
    """Return what `score` wrote."""
    found = Suspects.load(run.inputs[SCORES], run.facts(SCORES))
    assert found is not None
    return found


def _suspects(run: StageRun) -> Suspects:
    """Return the flagged tokens, every candidate's score, and the columns behind the scores."""
    found = _scored(run)
    late = {"drift_2": _drift(run, 2)} if ROUND_2 in run.inputs else {}
    flagged = tuple(run.facts(FLAGGED)["flagged"])
    return replace(found, flagged=flagged, table={**found.table, **late})


def tokens_flagged(alpha: float, vocabulary: int, candidates: int) -> int:
    """Return k = floor(alpha * V), the number of tokens that a round flags.

    Raises:
        UserError: alpha flags nothing, or every candidate.
    """
    # The nudge keeps alpha = k / V, computed in floating point, at k.
    k = int(alpha * vocabulary + 1e-9)
    if k < 1:
        raise UserError(
            f"defense.alpha {alpha} flags nothing: {alpha} * {vocabulary} tokens is below "
            f"1; use at least {math.ceil(1e7 / vocabulary) / 1e7:g}."
        )
    if k >= vocabulary:
        raise UserError(f"defense.alpha {alpha} flags all {vocabulary} tokens; lower it.")
    if k >= candidates:
        raise UserError(
            f"defense.alpha {alpha} flags all of the {candidates} tokens that occur "
            f"in the training set; use less than {candidates / vocabulary:.6f}."
        )
    return k


def candidate_tokens(victim: Victim, data: Encoded, vocabulary: int, exclude: str) -> BoolArray:
    """Return a (vocabulary,) mask of tokens that occur and are not excluded from flagging."""
    if exclude == INSERTED:
        made: BoolArray = made_counts(victim.tokenizer, data, vocabulary) > 0
        return made
    mask: BoolArray = data.counts(vocabulary) > 0
    excluded = victim.tokenizer.all_special_ids
    if exclude == "cls_sep":
        # The tokens that the tokenizer puts around a text, whatever their names.
        excluded = victim.tokenizer("")["input_ids"]
    mask[[i for i in excluded if i < vocabulary]] = False
    return mask


def _drift(run: StageRun, number: int) -> FloatArray:
    from safetensors.numpy import load_file

    drift: FloatArray = load_file(run.inputs[f"round {number}"] / DRIFT)["drift"]
    return drift


def _without(run: StageRun, victim: Victim, data: Encoded, tokens: Sequence[int]) -> Encoded:
    """Return round 2's rows: the same texts without round 1's tokens."""
    if run.config["removal"] == "token_id":
        return data.without(tokens)
    # As in the reference code: a word piece "##x" never matches, a word matches inside others.
    pieces = [victim.tokenizer.decode([token]).strip() for token in tokens]
    rows = texts_of(run)
    for piece in pieces:
        # Of both texts of a pair: a defender does not know which one may have the trigger.
        left = [tuple(text.replace(piece, "") for text in texts) for texts in rows.parts]
        rows = rows.with_parts(left)
    return victim.encode(rows)


def _train_bag(
    run: StageRun, victim: Victim, fresh: PreTrainedModel, data: Encoded, number: int
) -> torch.Tensor:
    from btu.defenses.kit.bag import BagClassifier

    seed = derive_seed(run.config["seed"], "exposure", number)
    padded = run.config["bag_pooling"] == "padded"
    bag = BagClassifier(
        fresh,
        classes=victim.num_labels,
        full=run.config["bag_embeddings"] == "full",
        mean_over_padding=padded,
        seed=seed,
    )
    run.fit(
        bag,
        data,
        TrainSettings(**run.config["train"]),
        seed=seed,
        stage=f"exposure round {number}",
        pad_to=victim.spec.max_length if padded else None,
    )
    return bag.word_rows.detach()


def _train_whole(run: StageRun, model: PreTrainedModel, data: Encoded) -> torch.Tensor:
    # The new classifier stays frozen as drawn: only the word rows can learn the labels.
    model.requires_grad_(False)
    word_rows: torch.Tensor = model.get_input_embeddings().weight
    word_rows.requires_grad_(True)
    run.fit(
        model,
        data,
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "exposure", 3),
        stage="exposure round 3",
    )
    return word_rows.detach()


def top_tokens(drift: FloatArray, candidates: BoolArray, k: int) -> tuple[int, ...]:
    """Return the ids of the `k` candidates that moved furthest, in falling order."""
    ids = np.flatnonzero(candidates)
    # Equal drifts: lower ids first.
    return tuple(int(i) for i in ids[np.lexsort((ids, -drift[ids]))][:k])
