"""Metrics: what is logged, which way is better, and the arithmetic behind it.

Fractions everywhere. What is not defined is NaN with n = 0, never 0.0.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from btu.errors import unknown
from btu.types import BoolArray, FloatArray


@dataclass(frozen=True)
class Metric:
    """A metric's meaning. higher_is_better: None where neither direction is good in itself.

    fraction: of 1, which reports show in percent; False of counts and seconds.
    """

    summary: str
    higher_is_better: bool | None
    fraction: bool = True


METRICS: dict[str, Metric] = {
    "asr": Metric("attack success rate: triggered non-target rows predicted as target", False),
    "cacc": Metric("clean accuracy on the evaluation rows", True),
    "ftr": Metric("false trigger rate: the same rows as asr, without the trigger", False),
    "detection_precision": Metric("flagged tokens that belong to the trigger", True),
    "detection_recall": Metric("trigger tokens that were flagged", True),
    "detection_f1": Metric("harmonic mean of token precision and recall", True),
    "detection_auprc": Metric(
        "average precision of the token ranking by score, over all thresholds", True
    ),
    "sample_precision": Metric("training rows holding a flagged token that are poisoned", True),
    "sample_recall": Metric("poisoned training rows that hold a flagged token", True),
    "sample_f1": Metric("harmonic mean of sample precision and recall", True),
    "sample_auroc": Metric("poisoned rows are more suspicious than others: area under ROC", True),
    "suspicion_precision": Metric(
        "training rows over the bar of suspicion that are poisoned", True
    ),
    "suspicion_recall": Metric("poisoned training rows that are over the bar of suspicion", True),
    "suspicion_f1": Metric("harmonic mean of suspicion precision and recall", True),
    "cut_cost": Metric("accuracy on the reserved clean rows that the cut alone costs", False),
    "cut_flips": Metric(
        "up to 512 training rows with a flagged token: leave their label by the cut", None
    ),
    "flagged": Metric("tokens flagged", None, fraction=False),
    "undefended_asr": Metric("asr of the poisoned model, nothing done", None),
    "undefended_cacc": Metric("cacc of the poisoned model, nothing done", None),
    "undefended_ftr": Metric("ftr of the poisoned model, nothing done", None),
    "tuned_asr": Metric("asr of the poisoned model after the sweep's clean tuning", None),
    "tuned_cacc": Metric("cacc of the poisoned model after the sweep's clean tuning", None),
    "tuned_ftr": Metric("ftr of the poisoned model after the sweep's clean tuning", None),
    "poison_rate_reached": Metric("poisoned rows over training rows", None),
    "poisoned_rows": Metric("training rows that carry the trigger", None, fraction=False),
    "relabeled_rows": Metric("poisoned rows whose label the attack changed", None, fraction=False),
    "triggers_cut_train": Metric(
        "poisoned rows that max_length left without a trigger", None, fraction=False
    ),
    "triggers_cut_eval": Metric(
        "triggered test rows that max_length left without a trigger", None, fraction=False
    ),
    "truncated_rows": Metric(
        "training rows as long as max_length or cut to it", None, fraction=False
    ),
    "rows_flagged": Metric(
        "training rows that the defense isolates or removes", None, fraction=False
    ),
    "rows_kept": Metric("training rows that the defense leaves in", None, fraction=False),
    "isolated_purity": Metric("lowest losses that belong to the class of most of them", None),
    "isolated_kept_before": Metric(
        "up to 128 isolated rows: predicted as labelled before unlearning", None
    ),
    "isolated_kept": Metric(
        "up to 128 isolated rows: predicted as labelled after unlearning", None
    ),
    "rest_cost": Metric(
        "accuracy lost by unlearning on up to 512 other training rows, poison left there included",
        None,
    ),
    "unlearning_steps": Metric(
        "steps of gradient ascent on the isolated rows", None, fraction=False
    ),
    "target_found": Metric("1 where the defense names the attack's target class, else 0", True),
    "frr": Metric("clean evaluation rows that an inference-time defense turns away", False),
    "far": Metric("triggered rows that an inference-time defense lets through", False),
    "changed_clean": Metric("clean evaluation rows that a defense changes on their way", False),
    "changed_triggered": Metric("triggered rows that a defense changes on their way", None),
    "tokens_removed_clean": Metric("tokens of clean rows that a defense takes out", False),
    "trigger_removed": Metric("triggered rows in which nothing of the trigger is left", True),
    "unlearned_accuracy": Metric(
        "rnp: accuracy on all reserved clean rows after unlearning some of them", None
    ),
    "recovered_accuracy": Metric("rnp: accuracy on the unlearned rows, masks learned", None),
    "neurons_pruned": Metric(
        "rnp: feed-forward units and attention heads pruned", None, fraction=False
    ),
    "prune_threshold": Metric("rnp: masks up to this were pruned; none where none was", None),
    "prune_cost": Metric("rnp: accuracy on held-out clean rows that pruning costs", False),
    "clean_rows_used": Metric(
        "reserved clean rows at the defense's disposal", False, fraction=False
    ),
    "seconds_defense": Metric("wall time of the defense's own stages", False, fraction=False),
    "seconds": Metric("wall time of the trial", False, fraction=False),
}
_PROPORTIONS = (
    [f"{state}{name}" for state in ("", "undefended_", "tuned_") for name in ("asr", "cacc", "ftr")]
    + [
        f"{what}_{name}"
        for what in ("detection", "sample", "suspicion")
        for name in ("precision", "recall")
    ]
    + ["frr", "far", "changed_clean", "changed_triggered", "trigger_removed"]
)
for _name in _PROPORTIONS:
    METRICS[f"{_name}_low"] = Metric(f"lower end of the 95 % Wilson interval of {_name}", None)
    METRICS[f"{_name}_high"] = Metric(f"upper end of the 95 % Wilson interval of {_name}", None)
    METRICS[f"{_name}_n"] = Metric(f"rows or tokens behind {_name}", None, fraction=False)


def metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        UserError: there is no such metric ("did you mean").
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


@dataclass(frozen=True)
class Proportion:
    """A count over a count, with its 95 % Wilson score interval. NaN where n is 0."""

    hits: int
    n: int

    @classmethod
    def of(cls, mask: BoolArray) -> Proportion:
        """Count a mask's True."""
        return cls(int(mask.sum()), len(mask))

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if self.n == 0:
            return math.nan, math.nan
        from scipy.stats import binomtest

        interval = binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)

    def as_metrics(self, name: str) -> dict[str, float]:
        """Return ``name``, ``name_low``, ``name_high`` and ``name_n``."""
        low, high = self.interval
        return {name: self.value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": self.n}


@dataclass(frozen=True)
class DetectionScore:
    """How well a flagged set matches the true one, from its counts. NaN where undefined.

    hits: flagged and true. flagged, true: all of each; `true` is None where no set is the true
    one, and everything is undefined.
    """

    hits: int
    flagged: int
    true: int | None

    @property
    def precision(self) -> float:
        return self._precision.value

    @property
    def recall(self) -> float:
        return self._recall.value

    @property
    def f1(self) -> float:
        if math.isnan(self.recall):
            return math.nan
        if self.hits == 0:
            return 0.0  # there was something to find and nothing right was flagged
        return 2 * self.precision * self.recall / (self.precision + self.recall)

    @property
    def _precision(self) -> Proportion:
        return Proportion(self.hits, 0 if self.true is None else self.flagged)

    @property
    def _recall(self) -> Proportion:
        return Proportion(self.hits, self.true or 0)

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Return precision and recall with Wilson intervals and n, and f1, led by `prefix`."""
        return {
            **self._precision.as_metrics(f"{prefix}_precision"),
            **self._recall.as_metrics(f"{prefix}_recall"),
            f"{prefix}_f1": self.f1,
        }


def token_detection(flagged: Collection[int], truth: Collection[int] | None) -> DetectionScore:
    """Score flagged tokens against the trigger's tokens.

    Precision is undefined where nothing is flagged, recall where there is nothing to find, and
    everything where `truth` is None: the trigger is not made of fixed tokens.
    """
    if truth is None:
        return DetectionScore(0, len(flagged), None)
    return DetectionScore(len(set(flagged) & set(truth)), len(flagged), len(truth))


def row_detection(flagged: BoolArray, poisoned: BoolArray) -> DetectionScore:
    """Score flagged training rows against the hidden poison mask, both (rows,)."""
    return DetectionScore(int((flagged & poisoned).sum()), int(flagged.sum()), int(poisoned.sum()))


def average_precision(scores: FloatArray, truth: Collection[int] | None) -> float:
    """Return the area under the precision-recall curve of a token ranking.

    scores: (vocabulary,) higher is more suspicious, NaN where a token is no candidate.
    NaN where no candidate is a trigger token. Trigger tokens that are no candidates count as found
    by no threshold.
    """
    if truth is None:
        return math.nan
    candidates = np.flatnonzero(~np.isnan(scores))
    positive = np.isin(candidates, list(truth))
    if not positive.any():
        return math.nan
    from sklearn.metrics import average_precision_score

    share = positive.sum() / len(set(truth))
    return float(average_precision_score(positive, scores[candidates]) * share)


def area_under_roc(scores: FloatArray, truth: BoolArray) -> float:
    """Return the chance that a true row scores higher than another; NaN where one kind is missing.

    scores, truth: (rows,).
    """
    if truth.all() or not truth.any():
        return math.nan
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores))
