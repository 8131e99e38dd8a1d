"""The second stage of BTU: training rows whose labels contradict the clean rows.

A paraphrase attack has no trigger token to cut, but its rows still carry a wrong label. Where it
comes from: this project; no paper describes it. It needs clean rows and training rows alone.

1. *Two models of the clean rows.* The victim is trained on each half of the clean rows. Each model
   predicts the training rows and the half that it has not seen. A row is contradicted if the
   prediction is not its label.
2. *A gate, by number.* Clean rows are contradicted too: the models are weak. A class is suspected
   if its training rows are contradicted more often than its clean rows are, and by more than the
   mean of the other classes, both by `GATE` standard errors. The first comparison fails where
   nothing is poisoned; the second where the training rows as a whole differ from the clean ones, in
   their source or in the care of their labels. Rows with a token that is cut are left out: where
   the first stage found the trigger, the others contradict nothing. With less than a few percent of
   poison, or with a clean-label attack, the gate stays shut.
3. *A gate, by likeness.* Labels that are careless in one class alone pass the first gate. Poisoned
   rows resemble each other in words and word order. So a logistic regression on single tokens and
   pairs of neighbours learns to tell the contradicted rows of the class from all other training
   rows, in five folds. Its scores of the contradicted training rows must be above those of the
   contradicted clean rows, as an AUROC, and by `SHIFT` standard errors more than they are among the
   rows that are not contradicted, where they tell how the two sources differ. Where good models
   contradict fewer than `LEAST_COMPARED` clean rows of the class, the clean rows to which they give
   another class take their place: an honest row with a wrong label looks like these.
4. *The oddest rows.* Half of the contradicted rows of the target are honest rows that the models
   misjudge. Those with the highest scores are taken: as many as are contradicted beyond the share
   that clean rows lead to expect.
5. *Relabelling.* The poisoned model is tuned on the clean rows and on the taken rows under the
   labels that the two models predict, with the settings of the fine-tune. It then learns that the
   paraphrase does not decide.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.defenses.kit.screening import ids_by_row
from btu.findings import Suspects
from btu.foundation import Foundation
from btu.metrics import area_under_roc
from btu.seeding import derive_seed
from btu.settings import TrainSettings
from btu.stage_files import (
    clean_rows_of,
    model_of,
    read_table,
    save_model,
    training_rows_of,
    victim_of,
    write_table,
)
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btu.training import Encoded

RELABEL, KEEP = "relabel", "keep"
CONTRADICTED = "contradicted"
PREDICTED, PREDICTED_CLEAN = "predicted.parquet", "predicted_clean.parquet"
# Clean rows without which there are no two halves.
LEAST_CLEAN = 2
# Standard errors. Chance alone passes it in 1 of 4,300 classes; the rest of the margin is for rows
# that are no random sample, as those of a test split are not.
GATE = 3.5
# Standard errors, too. Poisoned sets have 3.6 and more (SST-2, AG News); the class of OLID's clean
# set that passes the first gate has none.
SHIFT = 3.0
# Contradicted clean rows, below which others are compared with.
LEAST_COMPARED = 20
# Twice the epochs of the fine-tune, and at least so many steps: half of the clean rows are few.
# After 42 steps MiniLM predicts one class for all of OLID, after 90 it knows SST-2.
EPOCHS, LEAST_STEPS = 2, 80
# The regression: inverse strength of the penalty, folds, and rows that a feature must be in.
STRENGTH, FOLDS, LEAST_ROWS = 0.03, 5, 3
# Of the regression's logits.
DIGITS = 6


@dataclass(frozen=True)
class Relabeled:
    """What the second stage found.

    label: the class index that it takes for the target; None if the gate is shut.
    rows: (rows taken,) indices of training rows.
    labels: (rows taken,) their new labels.
    margin: how many standard errors the most suspicious class is beyond chance: the first gate
        opens at `GATE`.
    shift: how many standard errors its contradicted rows are unlike contradicted clean rows: the
        second gate opens at `SHIFT`. NaN if the first is shut.
    """

    label: int | None
    rows: IntArray
    labels: IntArray
    margin: float
    shift: float = math.nan

    @property
    def measured(self) -> dict[str, float]:
        """The metrics ``rows_relabeled``, ``contradiction`` and ``contradiction_shift``."""
        return {
            "rows_relabeled": len(self.rows),
            "contradiction": self.margin,
            "contradiction_shift": self.shift,
        }

    def tune(self, run: StageRun, model: PreTrainedModel) -> None:
        """Tune `model` in place on the clean rows and the relabelled ones."""
        taken = training_rows_of(run).take(self.rows)
        run.fit(
            model,
            clean_rows_of(run).joined(taken.relabeled(self.labels)),
            TrainSettings(**run.config["relabel"]["train"]),
            seed=derive_seed(run.config["seed"], "clean tuning"),
            stage="tuning on clean and relabelled rows",
        )


def contradictions(base: Foundation) -> Stage:
    """Declare the two models of the clean rows, and their predictions.

    The models depend on neither attack nor poison rate: all cells of a seed share them.
    """
    config = {"train": as_config(base.train), "epochs": EPOCHS, "least_steps": LEAST_STEPS}
    rows = base.clean_rows // 2
    epochs = epochs_for(rows, base.train, EPOCHS, LEAST_STEPS) if rows else 0
    models = {
        f"half {half}": base.stage(
            fit_half,
            f"model of clean half {half}",
            {"half": half, **config},
            {"clean": base.clean},
            units=rows * epochs,
            model=True,
        )
        for half in (1, 2)
    }
    return base.stage(
        predict_rows,
        "contradicted rows",
        {"precision": base.train.precision},
        {"rows": base.rows, "clean": base.clean, **models},
        units=2 * base.train_rows + base.clean_rows,
    )


def relabel_config(base: Foundation, second: Mapping[str, Stage]) -> dict[str, Any]:
    """Return what a stage that calls `relabeled_rows` has in its config; nothing without `second`.

    second: the stages behind the key ``contradicted``, by role.
    """
    if not second:
        return {}
    settings = {
        "gate": GATE,
        "shift": SHIFT,
        "least_compared": LEAST_COMPARED,
        "strength": STRENGTH,
        "folds": FOLDS,
        "least_rows": LEAST_ROWS,
    }
    return {"relabel": {**settings, "train": as_config(base.train)}}


# What the stages do ------------------------------------------------------------------------------


def epochs_for(rows: int, train: TrainSettings, times: int, least_steps: int) -> int:
    """Return the epochs of a model of `rows` clean rows, at least 1.

    `times` as many as those of the fine-tune, or more where these are fewer than `least_steps`.
    """
    return max(times * train.epochs, math.ceil(least_steps / math.ceil(rows / train.batch_size)))


@stage(version=1)
def fit_half(run: StageRun) -> dict[str, Any]:
    """Train the victim on a half of the clean rows."""
    clean = clean_rows_of(run)
    half = run.config["half"]
    inside = halves_of(clean, run.config["seed"]) == half
    train = TrainSettings(**run.config["train"])
    least = run.config["least_steps"]
    epochs = epochs_for(int(inside.sum()), train, run.config["epochs"], least)
    model = victim_of(run, run.facts("clean")["classes"]).new_model(
        derive_seed(run.config["seed"], "classifier")
    )
    run.fit(
        model,
        clean.take(np.flatnonzero(inside)),
        replace(train, epochs=epochs),
        seed=derive_seed(run.config["seed"], "model of clean rows", half),
        stage=f"model of clean half {half}",
    )
    save_model(model, run.folder)
    return {}


@stage(version=1)
def predict_rows(run: StageRun) -> dict[str, Any]:
    """Predict the training rows with both models, and the clean rows with the one not trained on.

    Writes ``predicted.parquet``, a row per training row: ``half_1`` and ``half_2``, the class that
    each model predicts, and ``both``, the class with the highest mean probability. And
    ``predicted_clean.parquet``: ``unseen``, the prediction of the other half's model.
    """
    import torch

    from btu.training import logits_of

    train, clean = training_rows_of(run), clean_rows_of(run)
    halves = halves_of(clean, run.config["seed"])
    unseen = np.zeros(len(clean), dtype=np.int64)
    columns: dict[str, IntArray] = {}
    total: FloatArray = np.zeros(0)
    for half in (1, 2):
        model = model_of(run, f"half {half}")

        def probabilities(
            ids: torch.Tensor, mask: torch.Tensor, model: PreTrainedModel = model
        ) -> torch.Tensor:
            return torch.softmax(logits_of(model, ids, mask).float(), dim=1)

        precision = run.config["precision"]
        others = np.flatnonzero(halves != half)
        found = run.in_batches(
            model, train, probabilities, precision=precision, stage=CONTRADICTED, of=(half - 1, 2)
        )
        columns[f"half_{half}"] = found.argmax(axis=1)
        total = found if half == 1 else total + found
        unseen[others] = run.classes(
            model, clean.take(others), precision=precision, stage="unseen clean rows"
        )
    write_table(run.folder / PREDICTED, {**columns, "both": total.argmax(axis=1)})
    write_table(run.folder / PREDICTED_CLEAN, {"unseen": unseen})
    return {}


def halves_of(clean: Encoded, seed: int) -> IntArray:
    """Return the half, 1 or 2, of every clean row: (rows,). Each class is halved, at random."""
    labels = clean.labels.numpy()
    order = np.random.default_rng(derive_seed(seed, "halves of the clean rows")).permutation(
        len(labels)
    )
    # By class, then alternating: classes of one row each do not all go to the first half.
    order = order[np.argsort(labels[order], kind="stable")]
    halves: IntArray = np.empty(len(labels), dtype=np.int64)
    halves[order] = 1 + np.arange(len(labels)) % 2
    return halves


# What a stage that tunes does with them ----------------------------------------------------------


def relabeled_rows(run: StageRun, flagged: Sequence[int]) -> Relabeled | None:
    """Return the rows to relabel; None if the stage has no input ``contradicted``.

    flagged: the tokens that the first stage cuts. The gate does not count rows that hold one; once
        it is open, these rows are taken like others.
    """
    if CONTRADICTED not in run.inputs:
        return None
    settings = run.config["relabel"]
    predicted = read_table(run.inputs[CONTRADICTED] / PREDICTED)
    unseen = read_table(run.inputs[CONTRADICTED] / PREDICTED_CLEAN)["unseen"]
    train, clean = training_rows_of(run), clean_rows_of(run)
    labels = train.labels.numpy()
    trusted = clean.labels.numpy()
    rest, rest_clean = ~train.holds(flagged), ~clean.holds(flagged)
    # The mean of both models' errors: that of their common prediction is lower, and would not
    # compare with the clean rows, which one model predicts.
    wrong = np.mean([predicted[f"half_{half}"] != labels for half in (1, 2)], axis=0)
    wrong_clean = unseen != trusted
    label, margin, expected = suspected_class(
        wrong[rest], labels[rest], wrong_clean[rest_clean], trusted[rest_clean]
    )
    none = np.zeros(0, dtype=np.int64)
    if label is None or margin < settings["gate"]:
        return Relabeled(None, none, none, margin)
    of_class, of_class_clean = labels == label, trusted == label
    contradicted = (predicted["both"] != labels) & of_class
    odd, odd_clean = oddness(
        train, clean, contradicted, settings, derive_seed(run.config["seed"], "folds")
    )
    compared = wrong_clean & of_class_clean & rest_clean
    if compared.sum() < settings["least_compared"]:
        compared = (unseen != label) & rest_clean
    shift = shift_of(
        (odd[contradicted & rest], odd_clean[compared]),
        (
            odd[~contradicted & of_class & rest],
            odd_clean[~wrong_clean & of_class_clean & rest_clean],
        ),
    )
    count = int(contradicted.sum()) - round(expected * int(of_class.sum()))
    if shift < settings["shift"] or count < 1:
        return Relabeled(None, none, none, margin, shift)
    order = np.argsort(-np.where(contradicted, odd, -np.inf), kind="stable")
    taken = np.sort(order[:count])
    return Relabeled(label, taken, predicted["both"][taken], margin, shift)


def suspected_class(
    wrong: FloatArray, labels: IntArray, wrong_clean: BoolArray, clean_labels: IntArray
) -> tuple[int | None, float, float]:
    """Return the most suspicious class, its margin, and the expected share of contradicted rows.

    wrong: (rows,) the share of the models that contradict each training row.
    labels: (rows,) of the training rows.
    wrong_clean: (clean rows,) whether the model of the other half contradicts a clean row.
    clean_labels: (clean rows,).

    The margin is the lower of two, in standard errors: the class's share over that of its clean
    rows, and this excess over the mean excess of the other classes, weighted by their training
    rows. Both errors are those of differences of proportions. Classes without training or clean
    rows are no candidates; with fewer than two classes there is none: (None, 0.0, nan).
    """
    known = [c for c in np.unique(labels) if (clean_labels == c).any()]
    found: tuple[int | None, float, float] = (None, 0.0, math.nan)
    if len(known) < 2:
        return found
    excesses = {c: _excess(wrong, labels == c, wrong_clean, clean_labels == c) for c in known}
    for label in known:
        own, own_variance = excesses[label]
        # Class by class: another mix of classes among the clean rows is no contradiction.
        others = [c for c in known if c != label]
        weights = np.array([(labels == c).sum() for c in others], dtype=np.float64)
        weights /= weights.sum()
        other = float(weights @ [excesses[c][0] for c in others])
        other_variance = float(weights**2 @ [excesses[c][1] for c in others])
        margin = min(
            own / math.sqrt(own_variance),
            (own - other) / math.sqrt(own_variance + other_variance),
        )
        if found[0] is None or margin > found[1]:
            expected = float(wrong_clean[clean_labels == label].mean())
            found = (int(label), float(margin), expected)
    return found


def _excess(
    wrong: FloatArray, rows: BoolArray, wrong_clean: BoolArray, clean: BoolArray
) -> tuple[float, float]:
    """Return how much larger a share is in training rows than in clean rows, and its variance."""
    n, m = int(rows.sum()), int(clean.sum())
    some, others = float(wrong[rows].sum()), float(wrong_clean[clean].sum())
    # Half a row more of each kind: shares of 0 and 1 of few rows would have no variance.
    pooled = (some + others + 1) / (n + m + 2)
    return some / n - others / m, pooled * (1 - pooled) * (1 / n + 1 / m)


def shift_of(
    contradicted: tuple[FloatArray, FloatArray], others: tuple[FloatArray, FloatArray]
) -> float:
    """Return by how many standard errors contradicted rows are unlike contradicted clean rows.

    contradicted: scores of contradicted training rows, and of contradicted clean rows.
    others: the same of the rows of the class that are not contradicted.

    It is the AUROC of the first pair minus that of the second, over the error that the two have if
    rows of one kind do not differ (Mann and Whitney's). 0 if a kind has no rows: nothing can then
    be said.
    """
    areas, variances = [], []
    for train, clean in (contradicted, others):
        n, m = len(train), len(clean)
        if not n or not m:
            return 0.0
        is_train = np.arange(n + m) < n
        areas.append(area_under_roc(np.concatenate([train, clean]), is_train))
        variances.append((n + m + 1) / (12 * n * m))
    return (areas[0] - areas[1]) / math.sqrt(sum(variances))


def oddness(
    train: Encoded,
    clean: Encoded,
    contradicted: BoolArray,
    settings: Mapping[str, Any],
    seed: int,
) -> tuple[FloatArray, FloatArray]:
    """Return how much each training row, and each clean row, resembles the contradicted ones.

    (rows,) and (clean rows,): the logit of a logistic regression on the presence of single tokens
    and of pairs of neighbours. A training row gets that of the model of the other folds, a clean
    row, which no model has seen, the mean of all. They are rounded: the last digits depend on the
    number of threads. With too few rows for the folds, or without a feature that is in enough rows,
    all are 0.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    scores, clean_scores = np.zeros(len(train)), np.zeros(len(clean))
    few = min(int(contradicted.sum()), int((~contradicted).sum()))
    texts = ids_by_row(train)
    held = Counter(feature for row in texts for feature in set(_tokens_and_pairs(row)))
    known = sorted(feature for feature, rows in held.items() if rows >= settings["least_rows"])
    if few < settings["folds"] or not known:
        return scores, clean_scores
    counter = CountVectorizer(analyzer=_tokens_and_pairs, binary=True, vocabulary=known)
    features, clean_features = counter.transform(texts), counter.transform(ids_by_row(clean))
    folds = StratifiedKFold(settings["folds"], shuffle=True, random_state=seed % 2**32)
    for others, fold in folds.split(features, contradicted):
        model = LogisticRegression(C=settings["strength"], max_iter=300)
        model.fit(features[others], contradicted[others])
        scores[fold] = model.decision_function(features[fold])
        clean_scores += model.decision_function(clean_features) / settings["folds"]
    return np.round(scores, DIGITS), np.round(clean_scores, DIGITS)


def _tokens_and_pairs(row: IntArray) -> list[tuple[int, ...]]:
    ids = row.tolist()
    return [*zip(ids, strict=True), *itertools.pairwise(ids)]


def with_relabeled(found: Suspects, train: Encoded, relabeled: Relabeled | None) -> Suspects:
    """Return `found` with the relabelled rows, those with a flagged token, and the target.

    Unchanged if no row is relabelled.
    """
    if relabeled is None or relabeled.label is None:
        return found
    taken = train.holds(found.tokens)
    taken[relabeled.rows] = True
    return replace(found, taken=taken, target=relabeled.label)
