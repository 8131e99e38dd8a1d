"""Shared by all attacks: choosing rows, relabeling them, and building the triggered test rows.

An attack defines only how a text gets its trigger (`Attack.apply`) and which tokens the trigger has
(`Attack.trigger_token_ids`). Which rows are poisoned, how many and with which label, is decided
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from btu.errors import UserError, unknown
from btu.registry import Registry
from btu.seeding import derive_seed
from btu.settings import check_fraction
from btu.types import IntArray, PoisonedSet, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_MODES = ("dirty", "clean", "mixed")
INSERTS = ("replace", "append")

ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    [
        ("badnets", "btu.attacks.badnets:BadNets", "inserted trigger words"),
        ("addsent", "btu.attacks.addsent:AddSent", "an inserted sentence"),
        ("syntactic", "btu.attacks.syntactic:Syntactic", "paraphrase in one syntactic template"),
        ("style", "btu.attacks.style:Style", "paraphrase in one text style"),
        ("rewrite", "btu.attacks.rewrite:Rewrite", "another version of the text"),
    ],
)


class Attack(Protocol):
    """An attack: how a text gets its trigger.

    Attacks are frozen dataclasses: the fields are the hyperparameters that a config can set, and
    the methods take the data. A field with the metadata ``path`` may name a folder. An attack that
    reads its triggered texts has a class attribute `sources`: the fields that name their source.
    Two attacks with one source would be the same attack. A class attribute ``PRESETS`` (name ->
    values by field) defines named sets of hyperparameters, as for defenses. An attack whose fields
    do not always have an effect has a method ``acts``: it returns those that do, for keys.
    """

    def candidates(self, rows: Rows) -> IntArray:
        """Return the indices of the rows that the attack can trigger.

        Raises:
            UserError: the data lacks what the attack needs, e.g. a paraphrase column.
        """
        ...

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return the triggered text of every row, by the same rule in training and test.

        seeds: (rows,) a seed per row for random draws.
        """
        ...

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int] | None:
        """Return the token ids of the trigger, without special tokens.

        None if the trigger has no fixed tokens (style, syntax): token-level precision is then
        undefined.
        """
        ...


@dataclass(frozen=True)
class PoisonSpec:
    """How many rows are poisoned, and towards which label.

    name: the attack.
    poison_rate: fraction of the whole training set that gets the trigger.
    target_label: an original label value (or, for named labels, its index).
    label_mode: ``dirty`` takes non-target rows and relabels them; ``clean`` takes target rows
        and leaves their labels; ``mixed`` takes any row and labels it as the target.
    insert: ``replace`` triggers rows in place; ``append`` adds triggered copies at the end, as
        many as make up `poison_rate` of the grown set.
    """

    name: str = "badnets"
    poison_rate: float = 0.1
    target_label: int | str = 1
    label_mode: str = "dirty"
    insert: str = "replace"

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise unknown("attack", self.name, ATTACKS)
        check_fraction("attack.poison_rate", self.poison_rate)
        if self.label_mode not in LABEL_MODES:
            raise unknown("attack.label_mode", self.label_mode, LABEL_MODES)
        if self.insert not in INSERTS:
            raise unknown("attack.insert", self.insert, INSERTS)


def acting(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of an attack that have an effect on its texts, for keys."""
    attack = ATTACKS.load(name)
    acts: Callable[[Any], Mapping[str, Any]] | None = getattr(attack, "acts", None)
    return dict(params) if acts is None else dict(acts(attack(**params)))


def row_seeds(seed: int, role: str, indices: IntArray) -> list[int]:
    """Return a seed per row that does not depend on which other rows are triggered."""
    base = derive_seed(seed, "trigger", role)
    return [base ^ (int(i) * 0x9E3779B97F4A7C15 & (2**63 - 1)) for i in indices]


def choose_rows(attack: Attack, spec: PoisonSpec, rows: Rows, target: int, seed: int) -> IntArray:
    """Return the sorted indices of the rows to poison.

    The rows are a prefix of one seeded permutation. A lower rate therefore poisons a subset of the
    rows of a higher rate, so that comparisons between rates do not depend on the choice of rows.

    Raises:
        UserError: fewer rows qualify than the rate requires.
    """
    total = len(rows)
    if spec.insert == "replace":
        count = round(spec.poison_rate * total)
    elif spec.poison_rate < 1:
        count = round(spec.poison_rate * total / (1 - spec.poison_rate))
    else:
        raise UserError(
            "attack.poison_rate 1 cannot be reached with insert 'append': the original rows "
            "stay; use insert 'replace' or a rate below 1."
        )
    labels = np.asarray(rows.labels)
    qualifies = {
        "dirty": labels != target,
        "clean": labels == target,
        "mixed": np.ones(total, dtype=bool),
    }[spec.label_mode]
    candidates = attack.candidates(rows)
    candidates = candidates[qualifies[candidates]]
    if count == 0 and spec.poison_rate > 0:
        raise UserError(
            f"attack.poison_rate {spec.poison_rate} poisons none of {total} training rows; use at "
            f"least {math.ceil(1e4 / total) / 1e4:.4f}, or 0."
        )
    if count > len(candidates):
        reachable = len(candidates) / (
            total if spec.insert == "replace" else total + len(candidates)
        )
        reachable = math.floor(reachable * 1e4) / 1e4  # rounded up, it would not be reachable
        raise UserError(
            f"attack.poison_rate {spec.poison_rate} needs {count} of {total} training rows, but "
            f"only {len(candidates)} qualify with label_mode '{spec.label_mode}'; use a rate of "
            f"at most {reachable:.4f} or another label_mode."
        )
    rng = np.random.default_rng(derive_seed(seed, "poisoned rows"))
    return np.sort(rng.permutation(candidates)[:count])


def poison(
    attack: Attack,
    spec: PoisonSpec,
    rows: Rows,
    target: int,
    seed: int,
    progress: ProgressCallback = silent,
) -> PoisonedSet:
    """Poison a training set.

    Rows that are not chosen stay byte-identical and in order; `rows` itself is not changed. At rate
    0 the result equals `rows`.

    Raises:
        UserError: the rate cannot be met, or the attack cannot run on these rows.
    """
    chosen = choose_rows(attack, spec, rows, target, seed)
    originals = rows.take(chosen)
    triggered = attack.apply(originals, row_seeds(seed, "train", chosen), progress)
    relabeled = sum(label != target for label in originals.labels)
    if spec.insert == "append":
        mask = np.zeros(len(rows) + len(chosen), dtype=bool)
        mask[len(rows) :] = True
        grown = rows.take([*range(len(rows)), *chosen])
        targets = rows.labels + (target,) * len(chosen)
        poisoned = replace(grown, texts=rows.texts + triggered, labels=targets)
        return PoisonedSet(poisoned, mask, relabeled)
    texts, labels = list(rows.texts), list(rows.labels)
    for index, text in zip(chosen, triggered, strict=True):
        texts[index], labels[index] = text, target
    mask = np.zeros(len(rows), dtype=bool)
    mask[chosen] = True
    poisoned = replace(rows, texts=tuple(texts), labels=tuple(labels))
    return PoisonedSet(poisoned, mask, relabeled)


def triggered_eval(
    attack: Attack, rows: Rows, target: int, seed: int, progress: ProgressCallback = silent
) -> tuple[Rows, Rows]:
    """Return (triggered, plain) versions of the evaluation rows that ASR and FTR are counted on.

    Only rows whose true label is not the target: a row of the target class cannot be attacked. Both
    versions keep the true labels and have the same order.

    Raises:
        UserError: no row qualifies.
    """
    candidates = attack.candidates(rows)
    chosen = candidates[np.asarray(rows.labels)[candidates] != target]
    if len(chosen) == 0:
        raise UserError(
            "no evaluation row can be attacked: all are of the target class or without a "
            "paraphrase; ASR would be undefined. Choose another target_label or eval split."
        )
    plain = rows.take(chosen)
    texts = attack.apply(plain, row_seeds(seed, "eval", chosen), progress)
    return replace(plain, texts=texts), plain
