"""What chance alone gives the words of a scan: rule ``contrast``, as far as rows tell it."""

from __future__ import annotations

from dataclasses import dataclass

from btu.defenses.token_unlearning import candidate_tokens
from btu.reading import without_inserted
from btu.rules.base import Evidence
from btu.rules.contrast import SPENT
from btu.rules.frequency import MIN_COUNT
from btu.rules.surplus import shift_of
from btu.training import Encoded
from btu.types import IntArray
from btu.victims import Victim

# How many times its equal share of the flags by chance a token gets that moved furthest.
HIGHEST_WEIGHT = SPENT[0][1] / SPENT[0][0]


@dataclass(frozen=True)
class Chance:
    """What scores are corrected for (`btu.rules.surplus`).

    tests: the number of pairs of token and class that rule ``contrast`` tests.
    shift: the variance of the logarithm of a word's frequency, between suspect and trusted rows.
    """

    tests: int
    shift: float


def chance_of(victim: Victim, exclude: str, train: Encoded, clean: Encoded) -> Chance:
    """Return what the rule will find in tokenized rows; no drift is needed for it.

    victim: that tokenized them.
    exclude: the tokens that are never flagged, as in `TokenUnlearning`.
    train: suspect rows.
    clean: trusted rows.

    In a part of the rows there are at most as many tests as in all of them.
    """
    ids = [int(rows.ids.max()) for rows in (train, clean) if len(rows.ids)]
    vocabulary = 1 + max(ids, default=0)
    candidates = candidate_tokens(victim, train, vocabulary, exclude)
    parts = without_inserted(victim.tokenizer, vocabulary, (train, clean))
    evidence = Evidence({}, candidates, *parts)
    counts = (evidence.train_rows, evidence.clean_rows)
    tested = candidates & (evidence.count >= MIN_COUNT)
    sizes = (evidence.class_rows, evidence.clean_class_rows)
    tests = count_tests(*(counted[tested] for counted in counts))
    return Chance(tests, shift_of(*counts, *sizes, tested))


def count_tests(held: IntArray, clean: IntArray) -> int:
    """Return the number of tests: pairs of a word and a class that are together in 5 rows or more.

    held: (W, classes) the number of suspect rows with each word.
    clean: the same of the trusted rows.
    """
    return int((held + clean >= MIN_COUNT).sum())
