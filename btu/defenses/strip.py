"""STRIP: reject texts whose prediction does not change when they are mixed with others.

Gao, Xu, Wang, Chen, Ranasinghe, Nepal: STRIP: A Defence Against Trojan Attacks on Deep Neural
Networks (ACSAC 2019, arXiv 1902.06531); for text: Gao, Kim, Doan, Zhang, Zhang, Nepal, Ranasinghe,
Kim: Design and Evaluation of a Multi-Domain Trojan Detection Method on Deep Neural Networks
(arXiv 1911.10312). Reference code for text classifiers: lancopku/RAP, ``strip_vita.py`` at 2c35b33;
thunlp/OpenBackdoor, ``strip_defender.py`` at 1a101e2.

A backdoored text keeps its class even if most of it is replaced, as long as the trigger stays. So
each text is copied several times, a share of each copy's words is replaced by the words with the
highest tf-idf of a random clean text, and the entropy of the model's predictions is averaged over
the copies. Texts with an entropy below a bar are rejected; the bar is a quantile of clean texts'
entropies.

==================  ==============  ==============  ===============================================
hyperparameter      strip_vita.py   default         why the default differs
==================  ==============  ==============  ===============================================
copies              20              10              half the cost; OpenBackdoor takes 5
share               0.7             0.5             as in OpenBackdoor: with 0.7 most copies lose a
                                                    trigger of one token
frr                 0.005 to 0.05   0.05            the largest value that the code reports
==================  ==============  ==============  ===============================================

Deviations: tokens of the victim are replaced, where the code replaces words; this works alike for
any tokenizer. The bar comes from clean rows of every class and applies to every class, since the
defender does not know the target (the code gets the target and screens only that class). Donors are
clean rows that are not used for the bar. Each text draws its own donors and places, from the seed
and its own tokens, so that its decision does not depend on other texts. OpenBackdoor's average is
corrected: it reshapes the entropies of (texts, copies) as (copies, texts), which mixes copies of
different texts.

Measured once (SST-2, MiniLM, BadNets with "cf", 10 %, dirty label, seed 0): half of the triggered
rows are rejected (ASR 100 -> 54), and 5.3 % of the clean rows (CACC 88.1 -> 82.9). Half of the
copies lose a trigger of one token, and their predictions then vary as those of clean texts do:
sweep smaller values of ``share``. The default was set before this was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.screening import (
    around,
    content,
    halves,
    ids_by_row,
    load_values,
    save_values,
)
from btu.errors import UserError
from btu.findings import Screened, incoming_of
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import check_count, check_share
from btu.stage_files import clean_rows_of, model_of, victim_of
from btu.stages import Stage, StageRun, stage
from btu.types import FloatArray, IntArray
from btu.victims import Victim

if TYPE_CHECKING:
    import torch

    from btu.training import Encoded


@dataclass(frozen=True)
class Strip:
    """STRIP: strong intentional perturbation.

    copies: perturbed copies of each text, at least 1.
    share: share of a text's tokens that is replaced in each copy, in (0, 1); at least one token.
    frr: share of clean texts that may be rejected, in (0, 1): the bar is this quantile of the clean
        rows' entropies.
    rows: number of clean rows for the bar, at most half of them; the others are donors of words.
    """

    copies: int = 10
    share: float = 0.5
    frr: float = 0.05
    rows: int = 500

    KIND: ClassVar[str] = "at inference"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {"copies": 20, "share": 0.7},
    }

    def __post_init__(self) -> None:
        check_count("defense.copies", self.copies)
        check_share("defense.share", self.share)
        check_share("defense.frr", self.frr)
        check_count("defense.rows", self.rows)

    def check(self, given: Given) -> None:
        """Raise a `UserError` if no clean row is left to mix with."""
        if given.clean_rows < 2:
            raise UserError(
                f"defense 'strip' computes its bar from some clean rows and mixes with others, and "
                f"the data have {given.clean_rows}; raise data.max_clean_rows to at least 2."
            )

    def stages(self, base: Foundation) -> Stage:
        """Return the poisoned model: the screen does not change it."""
        return base.model

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the entropies of clean and incoming texts, shared by all bars, and the screen."""
        config = {
            "copies": self.copies,
            "share": self.share,
            "rows": self.rows,
            "precision": base.train.precision,
        }
        reads = {"clean": base.clean, "model": model}
        units = min(self.rows, base.clean_rows // 2) * self.copies
        clean = base.stage(clean_entropies, "clean entropies (strip)", config, reads, units=units)
        came = base.stage(
            incoming_entropies,
            "entropies (strip)",
            config,
            {**reads, "incoming": incoming},
        )
        return base.stage(
            screen_texts,
            "screen (strip)",
            {"frr": self.frr},
            {"clean entropies": clean, "entropies": came},
            kind="host",
        )


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def clean_entropies(run: StageRun) -> dict[str, Any]:
    """Write the (rows,) mean entropies, in nats, of the clean rows for the bar."""
    victim = victim_of(run, run.facts("clean")["classes"])
    clean = clean_rows_of(run)
    bar_rows, donors = halves(len(clean), run.config["rows"], run.config["seed"], "strip rows")
    entropies = _mixed_entropies(run, victim, clean.take(bar_rows), clean.take(donors))
    save_values(run.folder, entropy=entropies)
    return {"rows": len(bar_rows)}


@stage(version=1)
def incoming_entropies(run: StageRun) -> dict[str, Any]:
    """Write the (texts,) mean entropies, in nats, of the incoming texts."""
    victim = victim_of(run, run.facts("clean")["classes"])
    clean = clean_rows_of(run)
    _, donors = halves(len(clean), run.config["rows"], run.config["seed"], "strip rows")
    texts = victim.encode(incoming_of(run.inputs["incoming"]))
    entropies = _mixed_entropies(run, victim, texts, clean.take(donors))
    save_values(run.folder, entropy=entropies)
    return {"texts": len(texts)}


@stage(version=1)
def screen_texts(run: StageRun) -> dict[str, Any]:
    """Reject the texts whose entropy is below the clean rows' quantile."""
    clean = load_values(run.inputs["clean entropies"])["entropy"]
    came = load_values(run.inputs["entropies"])["entropy"]
    bar = float(np.quantile(clean, run.config["frr"]))
    rejected = came < bar
    Screened(~rejected).save(run.folder)
    return {"bar": bar, "turned_away": int(rejected.sum())}


def _mixed_entropies(run: StageRun, victim: Victim, rows: Encoded, donors: Encoded) -> FloatArray:
    """Return the mean entropy of each row's predictions over its copies: (rows,).

    Raises:
        UserError: no donor has a token of a text.
    """
    from btu.training import Encoded, logits_of

    config = run.config
    words = donor_words(victim, donors)
    if not words:
        raise UserError(
            "defense 'strip' has no words to mix with: the victim's tokenizer finds no token in "
            f"the clean rows that should provide them ({len(donors)}); give other clean rows."
        )
    copies: list[IntArray] = []
    special = around(victim)
    for ids in ids_by_row(rows):
        text = hashlib.sha256(ids.tobytes()).hexdigest()
        rng = np.random.default_rng(derive_seed(config["seed"], "strip", text))
        places = np.flatnonzero(content(ids, special))
        copies += mixed(ids, places, words, config["copies"], config["share"], rng)
    encoded = Encoded.from_lists([ids.tolist() for ids in copies], [0] * len(copies), rows.pad_id)
    model = model_of(run, "model")

    def entropy(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        log = logits_of(model, ids, mask).log_softmax(1)
        return -(log.exp() * log).sum(1)

    found = run.in_batches(
        model, encoded, entropy, precision=config["precision"], stage="entropies (strip)"
    )
    # (rows * copies,) -> (rows, copies) -> (rows,): the copies of one text are adjacent.
    mean: FloatArray = found.astype(np.float64).reshape(len(rows), config["copies"]).mean(axis=1)
    return mean


def donor_words(victim: Victim, rows: Encoded) -> list[IntArray]:
    """Return each row's distinct tokens, by falling tf-idf; ties by id."""
    found = []
    special = around(victim)
    texts = [ids[content(ids, special)] for ids in ids_by_row(rows)]
    counted = [np.unique(ids, return_counts=True) for ids in texts]
    held = np.bincount(np.concatenate([ids for ids, _ in counted]))
    for ids, counts in counted:
        weight = counts * (np.log(len(texts) / held[ids]) + 1)
        found.append(ids[np.lexsort((ids, -weight))])
    return [ids for ids in found if len(ids)]


def mixed(
    ids: IntArray,
    places: IntArray,
    words: Sequence[IntArray],
    copies: int,
    share: float,
    rng: np.random.Generator,
) -> list[IntArray]:
    """Return copies of a row, each with a share of `places` replaced by a donor's first words.

    A donor with too few words is followed by another.

    places: positions of the text's tokens. words: from `donor_words`.
    """
    count = min(len(places), max(1, round(share * len(places))))
    found = []
    for _ in range(copies):
        copy = ids.copy()
        new: list[int] = []
        while len(new) < count:
            new += words[int(rng.integers(len(words)))].tolist()
        copy[rng.choice(places, count, replace=False)] = new[:count]
        found.append(copy)
    return found
