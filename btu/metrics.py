"""Metrics: what is logged, which direction is better, where it is shown, and the arithmetic.

Shares are fractions everywhere. An undefined metric is NaN with n = 0, never 0.0.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from btu.errors import unknown
from btu.types import BoolArray, FloatArray

# Units. Reports show fractions in percent, and all others as they are.
FRACTION, COUNT, SECONDS, NUMBER = "fraction", "count", "seconds", "number"


@dataclass(frozen=True)
class Metric:
    """What a metric means, and where reports show it.

    A metric with a `head` has a column in tables, pages and papers. A metric without one is only in
    the records, in MLflow and in the CSV of a paper.

    summary: what it measures, in one line.
    higher_is_better: None where neither direction is good in itself.
    unit: `FRACTION`, `COUNT`, `SECONDS` or `NUMBER`.
    interval: a proportion of rows or tokens, logged with the ends of its Wilson interval and n.
    head: the column's head in a paper; "" for no column.
    group: the group of columns in a paper that it belongs to (`GROUPS`); needed with a head.
    always: whether every table has the column. Otherwise only tables that compare defenses have
        it, if one of their cells has the metric.
    asked: a metric that a sweep asks for: every table has it if one of its cells has it.
    compared: whether `btu compare` shows it unless other metrics are named.
    summarized: whether a sweep's summary run in MLflow has its means as metrics; needs `always`.
    """

    summary: str
    higher_is_better: bool | None
    unit: str = FRACTION
    interval: bool = False
    head: str = ""
    group: str = ""
    always: bool = False
    asked: bool = False
    compared: bool = False
    summarized: bool = False

    def __post_init__(self) -> None:
        if bool(self.head) != (self.group in GROUPS):
            raise ValueError(
                f"metric '{self.summary}' has head '{self.head}' and group '{self.group}'; give "
                f"both or neither, and as group one of: {', '.join(GROUPS)}."
            )
        shown = self.always or self.asked
        if (shown and not self.head) or (self.summarized and not self.always):
            raise ValueError(
                f"metric '{self.summary}' has no column to show; always and asked need a head, and "
                "summarized needs always."
            )

    @property
    def fraction(self) -> bool:
        """Whether reports show it in percent."""
        return self.unit == FRACTION


# Groups of columns, in the order of a paper: the scores of three models, then detection, what the
# poisoned rows look like, and cost.
GROUPS = (
    "undefended",
    "clean-tuned",
    "defended",
    "flagged tokens",
    "flagged rows",
    "target",
    "screening",
    "poisoned rows",
    "cost",
)
METRICS: dict[str, Metric] = {
    "asr": Metric(
        "attack success rate: triggered non-target rows predicted as the target",
        False,
        interval=True,
        head="ASR",
        group="defended",
        always=True,
        compared=True,
        summarized=True,
    ),
    "cacc": Metric(
        "clean accuracy: evaluation rows predicted correctly",
        True,
        interval=True,
        head="CACC",
        group="defended",
        always=True,
        compared=True,
        summarized=True,
    ),
    "ftr": Metric(
        "false trigger rate: the rows of asr without the trigger, predicted as the target",
        False,
        interval=True,
        head="FTR",
        group="defended",
        always=True,
        compared=True,
    ),
    "detection_precision": Metric(
        "flagged tokens, vetoed ones included, that belong to the trigger",
        True,
        interval=True,
        head="precision",
        group="flagged tokens",
        always=True,
        compared=True,
        summarized=True,
    ),
    "detection_recall": Metric(
        "trigger tokens that are flagged, vetoed ones included",
        True,
        interval=True,
        head="recall",
        group="flagged tokens",
        always=True,
        summarized=True,
    ),
    "detection_f1": Metric("harmonic mean of token precision and recall", True),
    "detection_auprc": Metric(
        "average precision of the token ranking by score, over all thresholds", True
    ),
    "sample_precision": Metric(
        "flagged training rows that are poisoned",
        True,
        interval=True,
        head="precision",
        group="flagged rows",
    ),
    "sample_recall": Metric(
        "poisoned training rows that are flagged",
        True,
        interval=True,
        head="recall",
        group="flagged rows",
    ),
    "sample_f1": Metric("harmonic mean of row precision and recall", True),
    "sample_auroc": Metric(
        "area under the ROC curve of the training rows' suspicion, poisoned rows against others",
        True,
    ),
    "suspicion_precision": Metric(
        "training rows above the suspicion bar that are poisoned", True, interval=True
    ),
    "suspicion_recall": Metric(
        "poisoned training rows that are above the suspicion bar", True, interval=True
    ),
    "suspicion_f1": Metric("harmonic mean of suspicion precision and recall", True),
    "cut_cost": Metric("accuracy on the reserved clean rows that the cut alone costs", False),
    "cut_flips": Metric(
        "up to 512 training rows with a flagged token and predicted as labelled: predicted "
        "differently after the cut",
        None,
    ),
    "flagged": Metric(
        "tokens flagged, vetoed ones included",
        None,
        COUNT,
        head="flagged",
        group="flagged tokens",
        always=True,
    ),
    "vetoed": Metric(
        "flagged tokens that are not cut, since the cut would cost too many clean rows", None, COUNT
    ),
    "rows_relabeled": Metric(
        "training rows that the second stage of btu tunes on under another label",
        None,
        COUNT,
        head="relabelled",
        group="flagged rows",
    ),
    "contradiction": Metric(
        "how many standard errors the labels of the most suspicious class contradict the clean "
        "rows beyond chance; btu's second stage acts from 3.5 on",
        None,
    ),
    "contradiction_shift": Metric(
        "how many standard errors the contradicted rows of that class are unlike contradicted "
        "clean rows; btu's second stage acts from 3 on; undefined where contradiction is too low",
        None,
    ),
    "undefended_asr": Metric(
        "asr of the poisoned model, without a defense",
        None,
        interval=True,
        head="ASR",
        group="undefended",
        always=True,
    ),
    "undefended_cacc": Metric(
        "cacc of the poisoned model, without a defense",
        None,
        interval=True,
        head="CACC",
        group="undefended",
        always=True,
    ),
    "undefended_ftr": Metric("ftr of the poisoned model, without a defense", None, interval=True),
    "tuned_asr": Metric(
        "asr of the poisoned model after the sweep's clean tuning",
        None,
        interval=True,
        head="ASR",
        group="clean-tuned",
        always=True,
    ),
    "tuned_cacc": Metric(
        "cacc of the poisoned model after the sweep's clean tuning",
        None,
        interval=True,
        head="CACC",
        group="clean-tuned",
        always=True,
    ),
    "tuned_ftr": Metric(
        "ftr of the poisoned model after the sweep's clean tuning", None, interval=True
    ),
    "poison_rate_reached": Metric("poisoned rows over training rows", None),
    "poisoned_rows": Metric("training rows with the trigger and the target label", None, COUNT),
    "cover_rows": Metric("training rows with the trigger that keep another label", None, COUNT),
    "relabeled_rows": Metric("poisoned rows whose label the attack changed", None, COUNT),
    "perplexity_rise": Metric(
        "by how much the perplexity of a poisoned training text exceeds its original's (median)",
        None,
        NUMBER,
        head="perplexity",
        group="poisoned rows",
        asked=True,
    ),
    "edit_distance": Metric(
        "words edited between a poisoned training text and its original, over those of the longer "
        "(mean)",
        None,
        head="edits",
        group="poisoned rows",
        asked=True,
    ),
    "embedding_similarity": Metric(
        "cosine of the sentence embeddings of a poisoned training text and its original (mean)",
        None,
        head="similarity",
        group="poisoned rows",
        asked=True,
    ),
    "label_flips": Metric(
        "poisoned training rows whose label the attack changed",
        None,
        head="flips",
        group="poisoned rows",
        asked=True,
    ),
    "triggers_cut_train": Metric(
        "poisoned rows that have no trigger left after the cut to max_length", None, COUNT
    ),
    "triggers_cut_eval": Metric(
        "triggered evaluation rows that have no trigger left after the cut to max_length",
        None,
        COUNT,
    ),
    "truncated_rows": Metric("training rows as long as max_length, or cut to it", None, COUNT),
    "rows_flagged": Metric(
        "training rows that the defense isolates, removes or relabels, and those with a flagged "
        "token if it relabels",
        None,
        COUNT,
    ),
    "rows_kept": Metric("training rows that the defense keeps", None, COUNT),
    "isolated_purity": Metric(
        "isolated (lowest-loss) rows that belong to their most frequent class", None
    ),
    "isolated_kept_before": Metric(
        "up to 128 isolated rows: predicted as labelled before unlearning", None
    ),
    "isolated_kept": Metric(
        "up to 128 isolated rows: predicted as labelled after unlearning", None
    ),
    "rest_cost": Metric(
        "accuracy that unlearning costs on up to 512 rows that were not isolated, poisoned ones "
        "included",
        None,
    ),
    "unlearning_steps": Metric("steps of gradient ascent on the isolated rows", None, COUNT),
    "target_found": Metric(
        "1 if the defense names the attack's target class, else 0",
        True,
        head="found",
        group="target",
    ),
    "frr": Metric(
        "false rejection rate: clean evaluation rows that an inference-time defense rejects",
        False,
        interval=True,
        head="FRR",
        group="screening",
    ),
    "far": Metric(
        "false acceptance rate: triggered rows that an inference-time defense accepts",
        False,
        interval=True,
        head="FAR",
        group="screening",
    ),
    "changed_clean": Metric(
        "clean evaluation rows that an inference-time defense changes", False, interval=True
    ),
    "changed_triggered": Metric(
        "triggered rows that an inference-time defense changes", None, interval=True
    ),
    "tokens_removed_clean": Metric(
        "tokens of clean evaluation rows that an inference-time defense removes", False
    ),
    "trigger_removed": Metric(
        "triggered rows from which the whole trigger is removed",
        True,
        interval=True,
        head="removed",
        group="screening",
    ),
    "unlearned_accuracy": Metric(
        "rnp: accuracy on all reserved clean rows after unlearning some of them", None
    ),
    "recovered_accuracy": Metric(
        "rnp: accuracy on the unlearned rows after learning the masks", None
    ),
    "neurons_pruned": Metric("rnp: feed-forward units and attention heads pruned", None, COUNT),
    "tokens_pruned": Metric("rnp: word-embedding rows pruned", None, COUNT),
    "prune_threshold": Metric(
        "rnp: masks up to this value were pruned; none if nothing was pruned", None
    ),
    "prune_cost": Metric("rnp: accuracy on held-out clean rows that pruning costs", False),
    "mix_ratio": Metric(
        "fine_mixing: share of weights that keep the poisoned model's value; the others get their "
        "pretrained value",
        None,
    ),
    "mix_cost": Metric(
        "fine_mixing: accuracy on the reserved clean rows that purifying and mixing cost, before "
        "the tuning",
        False,
    ),
    "mix_held_out_cost": Metric(
        "fine_mixing: accuracy on held-out clean rows that the chosen ratio costs, after tuning on "
        "the others; none if the ratio is given",
        False,
    ),
    "held_out_accuracy": Metric(
        "musclelora, nad: accuracy on the reserved clean rows that they do not learn from", None
    ),
    "held_out_cost": Metric(
        "nad: accuracy on the held-out clean rows that the poisoned model had more", False
    ),
    "clean_rows_used": Metric("reserved clean rows that the defense may use", False, COUNT),
    "seconds_defense": Metric(
        "wall time of the defense's own stages", False, SECONDS, head="defense", group="cost"
    ),
    "seconds": Metric(
        "wall time of the cell, shared stages included",
        False,
        SECONDS,
        head="seconds",
        group="cost",
        always=True,
        compared=True,
    ),
}
for _name in [name for name, entry in METRICS.items() if entry.interval]:
    METRICS[f"{_name}_low"] = Metric(f"lower end of the 95 % Wilson interval of {_name}", None)
    METRICS[f"{_name}_high"] = Metric(f"upper end of the 95 % Wilson interval of {_name}", None)
    METRICS[f"{_name}_n"] = Metric(f"number of rows or tokens behind {_name}", None, COUNT)


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
    """A count over a count, with its 95 % Wilson score interval. NaN if n is 0."""

    hits: int
    n: int

    @classmethod
    def of(cls, mask: BoolArray) -> Proportion:
        """Return the proportion of True in a mask."""
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
    """How well a flagged set matches the true set, from their counts. NaN where undefined.

    hits: how many are flagged and true.
    flagged: how many are flagged.
    true: how many are true; None if there is no true set, which leaves everything undefined.
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
            return 0.0  # there is something to find, and none of it is flagged
        return 2 * self.precision * self.recall / (self.precision + self.recall)

    @property
    def _precision(self) -> Proportion:
        return Proportion(self.hits, 0 if self.true is None else self.flagged)

    @property
    def _recall(self) -> Proportion:
        return Proportion(self.hits, self.true or 0)

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Return precision and recall with Wilson intervals and n, and f1, prefixed by `prefix`."""
        return {
            **self._precision.as_metrics(f"{prefix}_precision"),
            **self._recall.as_metrics(f"{prefix}_recall"),
            f"{prefix}_f1": self.f1,
        }


def token_detection(flagged: Collection[int], truth: Collection[int] | None) -> DetectionScore:
    """Score flagged tokens against the trigger's tokens.

    Precision is undefined if nothing is flagged, recall if there is nothing to find. Everything is
    undefined if `truth` is None: the trigger is not made of fixed tokens.
    """
    if truth is None:
        return DetectionScore(0, len(flagged), None)
    return DetectionScore(len(set(flagged) & set(truth)), len(flagged), len(truth))


def row_detection(flagged: BoolArray, poisoned: BoolArray) -> DetectionScore:
    """Score flagged training rows against the hidden poison mask, both (rows,)."""
    return DetectionScore(int((flagged & poisoned).sum()), int(flagged.sum()), int(poisoned.sum()))


def average_precision(scores: FloatArray, truth: Collection[int] | None) -> float:
    """Return the area under the precision-recall curve of a token ranking.

    scores: (vocabulary,) higher is more suspicious, NaN for tokens that are not candidates.
    truth: the trigger's tokens; None if the trigger is not made of fixed tokens.

    NaN if no candidate is a trigger token. Trigger tokens that are not candidates count as never
    found, at any threshold.
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
    """Return the probability that a true row outscores another row; NaN if either kind is missing.

    scores, truth: (rows,).
    """
    if truth.all() or not truth.any():
        return math.nan
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores))
