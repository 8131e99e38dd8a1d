"""Marks: warnings on a finished cell whose numbers are misleading, by fixed bars.

A guard does not mark a cell that lacks its values, or has NaN.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from btu.attacks.poisoning import GIVEN

# Below this undefended ASR the attack failed, and a low defended ASR is not due to the defense.
ATTACK_BAR = 0.5
# An undefended ASR must exceed FTR by this: otherwise the model predicts the target anyway.
FTR_MARGIN = 0.25
# CACC that a defense may cost, compared with the same model after clean tuning alone.
CACC_BAR = 0.05
# The share of poisoned rows that may have their trigger beyond max_length.
CUT_BAR = 0.05
# A value exactly at a bar is within it, despite rounding of the difference of two floats.
_ROUNDING = 1e-9

# Name -> the rule, and what it means for the reader. Marks of a cell have this order.
GUARDS: dict[str, tuple[str, str]] = {
    "attack failed": (
        f"undefended ASR under {ATTACK_BAR}, or less than {FTR_MARGIN} above FTR",
        "ASR there says nothing about a defense",
    ),
    "cacc collapse": (
        f"CACC more than {CACC_BAR} below the clean-tuned control's",
        "a low ASR there is bought with accuracy",
    ),
    "rate not reached": (
        "the training set's poison rate is more than a row off, or the victim does not see the "
        f"trigger in more than {CUT_BAR} of the poisoned rows",
        "read poison_rate_reached and triggers_cut_train there, not poison_rate alone",
    ),
    "nothing flagged": (
        "no token flagged and no row relabelled on a poisoned set",
        "the defense removed nothing there",
    ),
    "token vetoed": (
        "a flagged token is not cut: after clean tuning the cut costs more of the clean rows than "
        "defense.max_cut_cost",
        "detection counts such tokens as flagged, and the model keeps them; flagged_tokens.json "
        "names them (vetoed) and their costs (cost_tuned)",
    ),
    "overlap": (
        "texts stood in two roles",
        "they were dropped from the one that is not reported",
    ),
}


@dataclass(frozen=True)
class Mark:
    """A guard that a cell fails. name: one of `GUARDS`. detail: why, with the cell's numbers."""

    name: str
    detail: str


def marks(record: Mapping[str, Any]) -> list[Mark]:
    """Return the marks of a cell's record, in the order of `GUARDS`."""
    metrics, notes = (record.get(part) or {} for part in ("metrics", "notes"))
    defense = (record.get("config") or {}).get("defense") or {}
    rate = poison_rate(record)
    found = {}

    undefended = _number(metrics, "undefended_asr")
    plain = _number(metrics, "undefended_ftr")
    if rate > 0 and attack_failed(undefended, plain):
        below = f"under {ATTACK_BAR}"
        close = f"less than {FTR_MARGIN} above FTR {plain:.3f}"
        found["attack failed"] = (
            f"undefended ASR {undefended:.3f} is {below if undefended < ATTACK_BAR else close}"
        )

    cacc, tuned = _number(metrics, "cacc"), _number(metrics, "tuned_cacc")
    if tuned - cacc > CACC_BAR + _ROUNDING:
        found["cacc collapse"] = (
            f"CACC {cacc:.3f} is {tuned - cacc:.3f} below the clean-tuned control's {tuned:.3f}"
        )

    reached, rows = _number(metrics, "poison_rate_reached"), _number(notes, "rows_train")
    if rows > 0 and abs(reached - rate) > 1 / rows + _ROUNDING:
        found["rate not reached"] = f"poison rate {reached:.4g} instead of {rate:.4g}"
    else:
        cut = _number(metrics, "triggers_cut_train")
        # Cover rows have the trigger too; most cells have none and do not name them.
        poisoned = _number(metrics, "poisoned_rows") + float(metrics.get("cover_rows") or 0)
        if cut > CUT_BAR * poisoned:
            found["rate not reached"] = (
                f"the trigger lies beyond max_length in {cut:g} of {poisoned:g} poisoned rows"
            )

    # The second stage of btu acts on rows where there is no token.
    relabeled = _number(metrics, "rows_relabeled") > 0
    if rate > 0 and _number(metrics, "flagged") == 0 and not relabeled:
        found["nothing flagged"] = f"no token flagged at poison rate {rate:.4g}"

    vetoed = _number(metrics, "vetoed")
    if vetoed > 0:
        found["token vetoed"] = (
            f"{vetoed:g} of {_number(metrics, 'flagged'):g} flagged tokens "
            f"{'is' if vetoed == 1 else 'are'} not cut: after clean tuning the cut costs more than "
            f"{_number(defense, 'max_cut_cost'):g} of the clean rows"
        )

    dropped = {
        match[1]: notes[name]
        for name in notes
        if (match := re.fullmatch(r"dropped_(\w+)_overlap", name)) and _number(notes, name) > 0
    }
    if dropped:
        counts = ", ".join(f"{count:g} {role}" for role, count in dropped.items())
        found["overlap"] = f"{counts} texts stood in another role too and were dropped"
    return [Mark(name, found[name]) for name in GUARDS if name in found]


def poison_rate(record: Mapping[str, Any]) -> float:
    """Return the poison rate of a cell; of a published poisoned set, the one that it reaches."""
    attack = (record.get("config") or {}).get("attack") or {}
    if attack.get("poison_rate") == GIVEN:
        return _number(record.get("metrics") or {}, "poison_rate_reached")
    return _number(attack, "poison_rate")


def attack_failed(undefended_asr: float, undefended_ftr: float) -> bool:
    """Return whether an attack had no effect; an undefined rate (NaN) does not make it fail."""
    margin = undefended_asr - undefended_ftr
    return undefended_asr < ATTACK_BAR or margin < FTR_MARGIN - _ROUNDING


def joined(found: Iterable[Mark]) -> str:
    """Return the names of marks as one text."""
    return "; ".join(mark.name for mark in found)


def summary(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line per kind of mark: how many records have it, and what it means."""
    counts = Counter(mark.name for record in records for mark in marks(record))
    return [
        f"{counts[name]} cell{'' if counts[name] == 1 else 's'}: {name} ({rule}): {follows}"
        for name, (rule, follows) in GUARDS.items()
        if counts[name]
    ]


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")
