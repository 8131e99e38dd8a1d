"""Z-defence: drop the rows with a token that is far too common in their class.

He, Xu, Wang, Rubinstein, Cohn: Mitigating Backdoor Poisoning Attacks through the Lens of Spurious
Correlation (EMNLP 2023, arXiv 2305.11596). Their code, xlhex/emnlp2023_z-defence, has no licence:
this was written from the method alone.

A trigger makes a token and a label occur together. For a token x and a label y

    z(x, y) = (p(y|x) - p_0) / sqrt(p_0 (1 - p_0) / n)

where n is the number of training rows that contain x, p(y|x) the share of label y among them, and
p_0 the share of label y among all training rows. A token whose z is far above that of the others is
taken for a trigger of that label. The rows of that label that contain it are dropped, and a model
is trained on the rest. No model and no clean rows are needed.

Differences from the paper, and their reasons:

- Features are the victim's tokens, not words: what is flagged is then compared with the trigger's
  tokens, as for `btu`. Special tokens are no features.
- Only the lexical part (Z-Token) is built. Z-Tree scores paths of a constituency parse, which needs
  a parser, and Z-Seq needs Z-Tree. An attack by sentence structure alone is therefore not found.
- A token counts once per row. p_0 is the share in the training rows that are there, with the poison
  in them. z is standardized within its label: the mean and the standard deviation are those of all
  tokens that occur, rare ones included.
- The default threshold is not the paper's. z grows with the square root of n, so a number from
  another amount of rows does not carry over: a token in a tenth of 6,917 rows, all of one label,
  reaches about 19 at most. 10 was chosen on SST-2's training rows without any poison, where the
  highest score is 7.3 (MiniLM's tokens): a third more, rounded up. Where words decide the class by
  themselves, it has to be higher: AG News reaches 13.3 and OLID 17.5 without poison.
- A new model is trained on the kept rows with the undefended model's settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import Given
from btu.findings import Suspects
from btu.foundation import Foundation, keep_rows
from btu.rules.base import flag, rows_and_tokens, rows_by_class
from btu.settings import check_positive
from btu.stage_files import training_rows_of, victim_of
from btu.stages import Stage, StageRun, stage
from btu.types import FloatArray, IntArray
from btu.victims import Victim

if TYPE_CHECKING:
    from btu.training import Encoded

SCORES = "z.safetensors"


@dataclass(frozen=True)
class ZScoreFilter:
    """Z-defence, on tokens.

    threshold: a token is flagged for a label if its z is at least this many standard deviations
        above the mean z of that label's tokens; above 0.
    """

    threshold: float = 10.0

    KIND: ClassVar[str] = "before training"
    NEEDS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_positive("defense.threshold", self.threshold)

    def check(self, given: Given) -> None:
        """Accept every cell: the threshold needs nothing of it."""

    def stages(self, base: Foundation) -> Stage:
        """Declare the scores of tokens, shared by all thresholds, the dropping and the training."""
        scores = base.stage(
            score_tokens, "score tokens (zdef)", {}, {"rows": base.rows}, kind="host"
        )
        dropped = base.stage(
            drop_rows,
            "drop rows (zdef)",
            {"threshold": self.threshold},
            {"rows": base.rows, "scores": scores},
            kind="host",
        )
        return base.fine_tune("fine-tune (zdef)", dropped)


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def score_tokens(run: StageRun) -> dict[str, Any]:
    """Score every token for every label.

    Writes ``z.safetensors``: ``z`` and ``score``, (vocabulary, classes), z and its standardized
    value, NaN for tokens that are not scored; ``n``, (vocabulary,), the rows that contain a token.
    """
    from safetensors.numpy import save_file

    found = score_rows(training_rows_of(run), victim_of(run), run.facts("rows")["classes"])
    save_file(found, run.folder / SCORES)
    return {}


@stage(version=1)
def drop_rows(run: StageRun) -> dict[str, Any]:
    """Flag the tokens with high scores, and drop the rows of their label that contain them."""
    from safetensors.numpy import load_file

    threshold = run.config["threshold"]
    found = load_file(run.inputs["scores"] / SCORES)
    known = np.where(np.isnan(found["score"]), -np.inf, found["score"])
    label = known.argmax(axis=1)
    at = np.arange(len(label)), label
    scores = found["score"][at]
    flagged = flag(scores, threshold)
    data = training_rows_of(run)
    pairs = rows_and_tokens(data, len(scores))
    rows = suspicion(known, pairs, data.labels.numpy())
    taken = rows >= threshold
    suspects = Suspects(
        flagged=flagged,
        scores=scores,
        table={"z": found["z"][at], "n": found["n"], "label": label},
        rows=rows,
        # A row of the label with a flagged token reaches it, and no other row does.
        row_bar=threshold,
        taken=taken,
        target=int(label[flagged[0]]) if flagged else None,
    )
    keep_rows(run, ~taken)
    return suspects.save(run.folder)


def score_rows(data: Encoded, victim: Victim, classes: int) -> dict[str, Any]:
    """Return the arrays that `score_tokens` writes, by name."""
    size = victim.vocabulary_size or len(victim.tokenizer)
    vocabulary = max(size, 1 + int(data.ids.max()))
    held = rows_by_class(data, vocabulary, classes)
    n = held.sum(axis=1)
    z = z_scores(held, np.bincount(data.labels.numpy(), minlength=classes))
    z[[i for i in victim.tokenizer.all_special_ids if i < vocabulary]] = np.nan
    return {"z": z, "score": standardized(z), "n": n}


def z_scores(held: IntArray, sizes: IntArray) -> FloatArray:
    """Return z of each token for each label: (vocabulary, classes).

    held: (vocabulary, classes) number of rows of each class that contain each token.
    sizes: (classes,) number of rows of each class.

    NaN for tokens in no row, and for a label that no row or every row has.
    """
    n = held.sum(axis=1, keepdims=True)
    share = sizes / sizes.sum()
    found: FloatArray = np.full(held.shape, np.nan)
    spread = np.sqrt(share * (1 - share) / np.maximum(n, 1))
    observed = held / np.maximum(n, 1)
    np.divide(observed - share, spread, out=found, where=(n > 0) & (spread > 0))
    return found


def standardized(z: FloatArray) -> FloatArray:
    """Return z in standard deviations above the mean of its label's tokens: (vocabulary, classes).

    NaN stays NaN. Where all tokens of a label have the same z, it is 0.
    """
    known = ~np.isnan(z)
    count = np.maximum(known.sum(axis=0), 1)
    centered = z - np.where(known, z, 0.0).sum(axis=0) / count
    spread = np.sqrt(np.where(known, centered**2, 0.0).sum(axis=0) / count)
    # Equal values may differ by rounding.
    found: FloatArray = np.where(spread > 1e-9, centered / np.maximum(spread, 1e-9), 0.0)
    found[~known] = np.nan
    return found


def suspicion(scores: FloatArray, pairs: tuple[IntArray, IntArray], labels: IntArray) -> FloatArray:
    """Return the highest score of each row's tokens for the row's own label: (rows,).

    scores: (vocabulary, classes), -inf for tokens that are not scored.
    pairs: `rows_and_tokens` of the rows.
    labels: (rows,).

    0, the mean of all tokens, for a row without a scored token.
    """
    row, token = pairs
    highest: FloatArray = np.full(len(labels), -np.inf)
    np.maximum.at(highest, row, scores[token, labels[row]])
    return np.where(np.isinf(highest), 0.0, highest)
