"""Shared by all attacks: choosing rows, relabeling them, and building the triggered test rows.

An attack defines only how a text gets its trigger (`Attack.apply`) and which tokens the trigger has
(`Attack.trigger_token_ids`). Which rows are poisoned, how many and with which label, is decided
here; rows that were poisoned elsewhere and published are taken as they are (`Published`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np

from btu.data.published import LABEL, Published, published_columns
from btu.errors import UserError, did_you_mean, unknown
from btu.registry import Registry
from btu.seeding import derive_seed
from btu.settings import check_fraction
from btu.types import IntArray, PoisonedSet, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What an attack does to a text.
ATTACK_KINDS = {
    "insertion": "puts something into the text",
    "rewriting": "takes another version of the text",
    "spelling": "writes the text with other characters",
}
LABEL_MODES = ("dirty", "clean", "mixed")
INSERTS = ("replace", "append")
# The poison rate of a published poisoned set: all its rows, with its labels.
GIVEN = "given"

ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    [
        ("badnets", "btu.attacks.badnets:BadNets", "inserted trigger words"),
        ("addsent", "btu.attacks.addsent:AddSent", "an inserted sentence"),
        ("syntactic", "btu.attacks.syntactic:Syntactic", "paraphrase in one syntactic template"),
        ("style", "btu.attacks.style:Style", "paraphrase in one text style"),
        ("rewrite", "btu.attacks.rewrite:Rewrite", "another version of the text"),
        ("bite", "btu.attacks.bite:Bite", "words that lean towards the target, where they fit"),
        ("homograph", "btu.attacks.homograph:Homograph", "letters replaced by look-alikes"),
    ],
)


class Attack(Protocol):
    """An attack: how a text gets its trigger.

    KIND: one of `ATTACK_KINDS`.
    TRIGGER: what the trigger is, in a few words.
    NEEDS: what the attack cannot do without, in a few words; empty if nothing.

    Attacks are frozen dataclasses: the fields are the hyperparameters that a config can set, and
    the methods take the data. A field with the metadata ``path`` may name a folder. An attack that
    reads its triggered texts has a class attribute `sources`: the fields that name their source.
    Two attacks with one source would be the same attack. A class attribute ``PRESETS`` (name ->
    values by field) defines named sets of hyperparameters, as for defenses. An attack whose fields
    do not always have an effect has a method ``acts``: it returns those that do, for keys. An
    attack whose trigger depends on the data `Learns` it. A method ``check(rows, target)`` raises a
    `UserError` while planning if the training rows lack what the trigger needs.
    """

    KIND: ClassVar[str]
    TRIGGER: ClassVar[str]
    NEEDS: ClassVar[str]

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


class Learns(Protocol):
    """An attack whose trigger depends on the training rows."""

    @property
    def learns(self) -> bool:
        """Whether it does so with its values."""
        ...

    def learn(
        self,
        rows: Rows,
        chosen: IntArray,
        target: int,
        seed: int,
        progress: ProgressCallback = silent,
    ) -> Mapping[str, Any]:
        """Return what the trigger is, as plain data.

        rows: the training rows before the poison.
        chosen: the indices of the rows that will be poisoned; without poison, of those that would
            be at the default rate.
        """
        ...

    def with_trigger(self, learned: Mapping[str, Any]) -> Attack:
        """Return the attack with the trigger that `learn` returned; it learns no more."""
        ...


@dataclass(frozen=True)
class PoisonSpec:
    """How many rows are poisoned, and towards which label.

    name: the attack.
    poison_rate: fraction of the whole training set that gets the trigger and the target label;
        ``given`` takes all poisoned rows of a published set, with the published texts and labels
        of the others.
    target_label: an original label value (or, for named labels, its index).
    label_mode: ``dirty`` takes non-target rows and relabels them; ``clean`` takes target rows
        and leaves their labels; ``mixed`` takes any row and labels it as the target.
    insert: ``replace`` triggers rows in place; ``append`` adds triggered copies at the end, as
        many as make up `poison_rate` of the grown set.
    cover_rate: fraction of the training set that gets the trigger and keeps its label, which is not
        the target: the cover of an attacker who evades detection (Qi et al., ICLR 2023). It has no
        effect at `poison_rate` 0.
    """

    name: str = "badnets"
    poison_rate: Any = 0.1
    target_label: int | str = 1
    label_mode: str = "dirty"
    insert: str = "replace"
    cover_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise unknown("attack", self.name, ATTACKS)
        if not self.given:
            # A rate may be written 0, 1 or "0.1": one value, one key.
            object.__setattr__(self, "poison_rate", _rate(self.poison_rate))
        check_fraction("attack.cover_rate", self.cover_rate)
        self._refuse_beside_given("insert", "replace")
        self._refuse_beside_given("cover_rate", 0)
        if self.label_mode not in LABEL_MODES:
            raise unknown("attack.label_mode", self.label_mode, LABEL_MODES)
        if self.insert not in INSERTS:
            raise unknown("attack.insert", self.insert, INSERTS)

    def _refuse_beside_given(self, name: str, idle: Any) -> None:
        value = getattr(self, name)
        if self.given and value != idle:
            raise UserError(
                f"attack.{name} is {value} with attack.poison_rate '{GIVEN}', which takes the "
                "published rows as they are; remove the key, or name a rate."
            )

    @property
    def given(self) -> bool:
        """Whether the rows of a published set are taken as they are."""
        return bool(self.poison_rate == GIVEN)

    @property
    def poisons(self) -> bool:
        """Whether there is any poison."""
        return bool(self.poison_rate != 0)

    def acts(self) -> dict[str, Any]:
        """Return what has an effect, for keys: a cover only where there is one."""
        acts = dict(vars(self))
        if not self.cover_rate or not self.poisons:
            del acts["cover_rate"]
        return acts


def _rate(written: Any) -> float:
    """Return a poison rate as a number."""
    value = written
    if isinstance(written, str):
        try:
            value = float(written)
        except ValueError as error:
            raise UserError(
                f"attack.poison_rate must be a number in [0, 1] or '{GIVEN}', got "
                f"{written!r}{did_you_mean(written, [GIVEN]) or '.'}"
            ) from error
    return check_fraction("attack.poison_rate", value)


def acting(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of an attack that have an effect on its texts, for keys."""
    attack = ATTACKS.load(name)
    acts: Callable[[Any], Mapping[str, Any]] | None = getattr(attack, "acts", None)
    return dict(params) if acts is None else dict(acts(attack(**params)))


def row_seeds(seed: int, role: str, indices: IntArray) -> list[int]:
    """Return a seed per row that does not depend on which other rows are triggered."""
    base = derive_seed(seed, "trigger", role)
    return [base ^ (int(i) * 0x9E3779B97F4A7C15 & (2**63 - 1)) for i in indices]


def learned(
    attack: Attack,
    spec: PoisonSpec,
    rows: Rows,
    target: int,
    seed: int,
    progress: ProgressCallback = silent,
) -> dict[str, Any]:
    """Return the trigger that an attack takes from the training rows; {} if it takes none.

    Raises:
        UserError: the rate cannot be met, or the rows lack what the attack needs.
    """
    if not learns(attack):
        return {}
    if spec.poisons:
        chosen = choose_rows(attack, spec, rows, target, seed)
    else:
        # The rows of the default rate: a control without poison then has the usual trigger.
        candidates = _qualified(attack, spec, rows, target)
        count = max(1, round(PoisonSpec.poison_rate * len(rows)))
        chosen = _drawn(candidates, min(count, len(candidates)), seed)
    learner = cast(Learns, attack)
    return dict(learner.learn(rows, chosen, target, derive_seed(seed, "trigger words"), progress))


def learns(attack: Attack) -> bool:
    """Return whether the trigger depends on the training rows."""
    # Not isinstance: an attack that lacks a method of `Learns` must not pass for one that has none.
    return bool(getattr(attack, "learns", False))


def with_learned(attack: Attack, trigger: Mapping[str, Any]) -> Attack:
    """Return an attack with the trigger that it has `learned`."""
    return cast(Learns, attack).with_trigger(trigger) if trigger else attack


def choose_rows(attack: Attack, spec: PoisonSpec, rows: Rows, target: int, seed: int) -> IntArray:
    """Return the sorted indices of the rows to poison.

    The rows are a prefix of one seeded permutation. A lower rate therefore poisons a subset of the
    rows of a higher rate, so that comparisons between rates do not depend on the choice of rows.

    Raises:
        UserError: fewer rows qualify than the rate requires.
    """
    candidates = _qualified(attack, spec, rows, target)
    if spec.given:
        published_by(attack, rows)
        return candidates
    total = len(rows)
    count = _count("poison_rate", spec, spec.poison_rate, total)
    if count > len(candidates):
        reachable = len(candidates) / total
        if spec.insert == "append":
            # Of what the cover leaves.
            reachable = len(candidates) * (1 - spec.cover_rate) / (total + len(candidates))
        reachable = math.floor(reachable * 1e4) / 1e4  # rounded up, it would not be reachable
        raise UserError(
            f"attack.poison_rate {spec.poison_rate} needs {count} of {total} training rows, but "
            f"only {len(candidates)} qualify with label_mode '{spec.label_mode}'; use a rate of "
            f"at most {reachable:.4f} or another label_mode."
        )
    return _drawn(candidates, count, seed)


def _drawn(candidates: IntArray, count: int, seed: int) -> IntArray:
    rng = np.random.default_rng(derive_seed(seed, "poisoned rows"))
    return np.sort(rng.permutation(candidates)[:count])


def cover_rows(
    attack: Attack, spec: PoisonSpec, rows: Rows, target: int, seed: int, poisoned: IntArray
) -> IntArray:
    """Return the sorted indices of the rows that get the trigger and keep their label.

    poisoned: the rows that are poisoned; they are no cover.

    They are of other classes than the target: there the trigger contradicts the poison.

    Raises:
        UserError: fewer rows qualify than `PoisonSpec.cover_rate` requires.
    """
    if spec.cover_rate == 0 or not spec.poisons:
        return np.array([], dtype=np.int64)
    total = len(rows)
    count = _count("cover_rate", spec, spec.cover_rate, total)
    candidates = attack.candidates(rows)
    candidates = candidates[np.asarray(rows.labels)[candidates] != target]
    rng = np.random.default_rng(derive_seed(seed, "cover rows"))
    order = rng.permutation(candidates)
    order = order[~np.isin(order, poisoned)]
    if count > len(order):
        raise UserError(
            f"attack.cover_rate {spec.cover_rate} needs {count} of {total} training rows, but only "
            f"{len(order)} of other classes than the target are left beside {len(poisoned)} "
            "poisoned rows; lower it, or attack.poison_rate."
        )
    return np.sort(order[:count])


def _count(key: str, spec: PoisonSpec, rate: float, total: int) -> int:
    """Return how many rows of `total` make up a rate of the set, which `append` makes larger."""
    kept = 1.0
    if spec.insert == "append":
        kept = 1 - spec.poison_rate - spec.cover_rate
        if kept <= 0:
            added = "attack.poison_rate 1"
            if spec.cover_rate:
                added = f"attack.poison_rate {spec.poison_rate} with cover_rate {spec.cover_rate}"
            raise UserError(
                f"{added} cannot be reached with insert 'append': the original rows "
                "stay; use insert 'replace' or a rate below 1."
            )
    count = round(rate * total / kept)
    if count == 0 and rate > 0:
        raise UserError(
            f"attack.{key} {rate} poisons none of {total} training rows; use at "
            f"least {math.ceil(1e4 / total) / 1e4:.4f}, or 0."
        )
    return count


def _qualified(attack: Attack, spec: PoisonSpec, rows: Rows, target: int) -> IntArray:
    """Return the rows that the attack can trigger, and that `label_mode` allows."""
    candidates = attack.candidates(rows)
    published = _published(attack, rows)
    if published is not None:
        published.check(spec.label_mode, target)
    labels = np.asarray(rows.labels)
    qualifies = {
        "dirty": labels != target,
        "clean": labels == target,
        "mixed": np.ones(len(rows), dtype=bool),
    }[spec.label_mode]
    picked: IntArray = candidates[qualifies[candidates]]
    return picked


def _published(attack: Attack, rows: Rows) -> Published | None:
    find: Callable[[Rows], Published | None] | None = getattr(attack, "published", None)
    return None if find is None else find(rows)


def published_by(attack: Attack, rows: Rows) -> Published:
    """Return the published poisoned set that an attack takes its rows from.

    Raises:
        UserError: there is none.
    """
    found = _published(attack, rows)
    if found is None:
        known = ", ".join(published_columns(rows))
        raise UserError(
            f"attack.poison_rate '{GIVEN}' needs a published poisoned set: attack rewrite with a "
            f"column NAME of its texts, and its labels in NAME{LABEL} (found: {known or 'none'}); "
            "`btu import` writes both."
        )
    return found


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
    0 the result equals `rows`. With rate ``given`` all rows are the published ones.

    attack: with what it has `learned`.

    Raises:
        UserError: the rate cannot be met, or the attack cannot run on these rows.
    """
    chosen = choose_rows(attack, spec, rows, target, seed)
    if spec.given:
        published = published_by(attack, rows)
        mask = np.zeros(len(rows), dtype=bool)
        mask[chosen] = True
        return PoisonedSet(published.rows(rows), mask, int(published.relabeled.sum()))
    covered = cover_rows(attack, spec, rows, target, seed, chosen)
    changed = np.concatenate([chosen, covered])
    originals = rows.take(changed)
    triggered = attack.apply(originals, row_seeds(seed, "train", changed), progress)
    given = (target,) * len(chosen) + originals.labels[len(chosen) :]
    relabeled = sum(old != new for old, new in zip(originals.labels, given, strict=True))
    if spec.insert == "append":
        mask = np.zeros(len(rows) + len(changed), dtype=bool)
        mask[len(rows) :] = True
        grown = rows.take([*range(len(rows)), *changed])
        poisoned = replace(grown, texts=rows.texts + triggered, labels=rows.labels + given)
        return PoisonedSet(poisoned, mask, relabeled, len(covered))
    texts, labels = list(rows.texts), list(rows.labels)
    for index, text, label in zip(changed, triggered, given, strict=True):
        texts[index], labels[index] = text, label
    mask = np.zeros(len(rows), dtype=bool)
    mask[changed] = True
    poisoned = replace(rows, texts=tuple(texts), labels=tuple(labels))
    return PoisonedSet(poisoned, mask, relabeled, len(covered))


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
