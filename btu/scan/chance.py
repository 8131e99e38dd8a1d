"""What chance alone gives the words of a scan: rule ``contrast``, as far as rows tell it."""

from __future__ import annotations

from btu.defenses.token_unlearning import candidate_tokens
from btu.reading import without_inserted
from btu.rules import contrast
from btu.rules.base import Evidence
from btu.rules.contrast import SPENT, Chance
from btu.rules.frequency import MIN_COUNT
from btu.training import Encoded
from btu.victims import Victim

# How many times its equal share of the flags by chance a token gets that moved furthest.
HIGHEST_WEIGHT = SPENT[0][1] / SPENT[0][0]


def chance_of(victim: Victim, exclude: str, train: Encoded, clean: Encoded) -> Chance:
    """Return what the rule will find in tokenized rows.

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
    return contrast.chance_of(evidence, candidates & (evidence.count >= MIN_COUNT))
