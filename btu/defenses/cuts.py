"""Controls for the cut of Backdoor Token Unlearning: as many tokens, but other ones.

Any cut removes something from the model, and the clean tuning after it repairs some of the
poisoning. These controls measure how much of BTU's effect comes from that: they flag tokens as BTU
does with the same settings, and then cut the same number of other tokens, with the same cut and
the same clean tuning. If BTU flags nothing, they cut nothing and equal the clean-tuned control,
unless the second stage relabels rows: it does so for them as for BTU (``contradicted``).

No paper defines them. `random_cut` draws from all tokens that could be flagged and were not; most
of them are rare. `frequency_cut` takes for each flagged token one that occurs about as often in the
training rows, since cutting a common word costs more than cutting a rare one.

Tokens that BTU flags are not drawn, so `detection_precision` is not that of chance: it is 0 by
construction if BTU finds the whole trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from btu.defenses.kit.contradiction import relabel_config, with_relabeled
from btu.defenses.kit.cutting import cut_and_tune
from btu.defenses.token_unlearning import FLAGGED, TokenUnlearning, candidate_tokens
from btu.errors import UserError
from btu.findings import Suspects
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.stage_files import training_rows_of, victim_of
from btu.stages import Stage, StageRun, stage
from btu.types import IntArray

RANDOM, FREQUENCY = "random", "frequency"


@dataclass(frozen=True)
class _OtherCut(TokenUnlearning):
    """Shared by both controls; every field has the effect that it has in `TokenUnlearning`."""

    KIND: ClassVar[str] = "control"
    DRAW: ClassVar[str]

    def stages(self, base: Foundation) -> Stage:
        """Declare BTU's exposure and flagging, then the cut of other tokens and the tuning.

        Rows are relabelled as BTU relabels them: the controls differ from it in the tokens alone.
        """
        second = self.second_stage(base)
        return base.stage(
            cut_others,
            f"cut other tokens ({self.DRAW})",
            {
                "draw": self.DRAW,
                "exclude": self.exclude,
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
                FLAGGED: self.flags(base),
                **second,
            },
            units=base.clean_rows * base.tuning.epochs,
            kind="cell",
            model=True,
            reads=(FLAGGED,),
        )


@dataclass(frozen=True)
class RandomCut(_OtherCut):
    """Control: cuts as many tokens as BTU flags, drawn at random from the others."""

    DRAW: ClassVar[str] = RANDOM


@dataclass(frozen=True)
class FrequencyCut(_OtherCut):
    """Control: for each token that BTU flags, cuts another that occurs about as often."""

    DRAW: ClassVar[str] = FREQUENCY


# What the stages do ------------------------------------------------------------------------------


@stage(version=2)
def cut_others(run: StageRun) -> dict[str, Any]:
    """Draw as many tokens as were flagged from the others; cut them and tune.

    Raises:
        UserError: there are fewer others than flagged tokens.
    """
    victim, data = victim_of(run), training_rows_of(run)
    flagged, vocabulary = (run.facts(FLAGGED)[name] for name in ("flagged", "vocabulary"))
    allowed = candidate_tokens(victim, data, vocabulary, run.config["exclude"])
    allowed[flagged] = False
    others = np.flatnonzero(allowed)
    if len(flagged) > len(others):
        raise UserError(
            f"{len(flagged)} tokens are flagged and only {len(others)} are left to be cut in "
            "their place; raise the threshold."
        )
    rng = np.random.default_rng(derive_seed(run.config["seed"], "other tokens"))
    if run.config["draw"] == RANDOM:
        drawn = [int(i) for i in rng.choice(others, len(flagged), replace=False)]
    else:
        drawn = as_frequent(flagged, others, data.counts(vocabulary), rng)
    measured, columns, relabeled = cut_and_tune(run, victim, drawn, flagged)
    suspects = with_relabeled(Suspects(flagged=tuple(drawn), table=columns), data, relabeled)
    return {**suspects.save(run.folder), "measured": measured}


def as_frequent(
    flagged: Sequence[int], others: IntArray, counts: IntArray, rng: np.random.Generator
) -> list[int]:
    """Return for each flagged token one of `others` that occurs about as often, each at most once.

    Distances are between logarithms of counts; ties are broken by the draw. Tokens that come first
    in `flagged` choose first.

    others: (tokens,) ids to choose from.
    counts: (vocabulary,) occurrences, at least 1 for each flagged or other token.
    """
    # Sorting is stable: the order of equal counts is random, from the shuffle before.
    others = rng.permutation(others)
    logs = np.log(counts[others])
    free = np.ones(len(others), dtype=bool)
    chosen = []
    for token in flagged:
        distance = np.where(free, np.abs(logs - np.log(counts[token])), np.inf)
        nearest = int(distance.argmin())
        free[nearest] = False
        chosen.append(int(others[nearest]))
    return chosen
