"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from btu.errors import UserError
from btu.metrics import (
    GROUPS,
    METRICS,
    Metric,
    Proportion,
    area_under_roc,
    average_precision,
    metric,
    row_detection,
    token_detection,
)

NAN = math.nan


def test_proportion_and_its_wilson_interval() -> None:
    scored = Proportion(8, 10)
    # 8 of 10 -> 0.8. Wilson with z = 1.959964, z^2 = 3.841459:
    #   centre = (0.8 + 3.841459 / 20) / (1 + 3.841459 / 10) = 0.992073 / 1.384146 = 0.716740
    #   half = 1.959964 * sqrt(0.8 * 0.2 / 10 + 3.841459 / 400) / 1.384146
    #        = 1.959964 * sqrt(0.016 + 0.00960365) / 1.384146 = 0.226578
    assert scored.value == 0.8
    low, high = scored.interval
    assert low == pytest.approx(0.716740 - 0.226578, abs=2e-6)
    assert high == pytest.approx(0.716740 + 0.226578, abs=2e-6)


def test_the_interval_of_a_certain_outcome_stays_inside_0_and_1() -> None:
    # p = 1, n = 4: low = 1 / (1 + z^2 / 4) = 4 / 7.841459 = 0.510109, high = 1
    low, high = Proportion(4, 4).interval
    assert low == pytest.approx(0.510109, abs=1e-6)
    assert high == pytest.approx(1.0)
    # p = 0 is its mirror image: high = 1 - 0.510109
    low, high = Proportion(0, 4).interval
    assert low == pytest.approx(0.0)
    assert high == pytest.approx(0.489891, abs=1e-6)


def test_a_proportion_of_nothing_is_nan_with_n_0() -> None:
    logged = Proportion(0, 0).as_metrics("asr")
    assert logged["asr_n"] == 0
    assert all(math.isnan(logged[name]) for name in ("asr", "asr_low", "asr_high"))


def test_a_proportion_logs_value_interval_and_n() -> None:
    logged = Proportion(3, 4).as_metrics("asr")  # 3 of 4 triggered rows -> asr = 0.75
    assert list(logged) == ["asr", "asr_low", "asr_high", "asr_n"]
    assert logged["asr"] == 0.75
    assert logged["asr_n"] == 4
    assert logged["asr_low"] < 0.75 < logged["asr_high"]


def test_token_detection() -> None:
    score = token_detection([5, 7, 9, 11], {7, 8})
    # hits {7}: precision 1 / 4, recall 1 / 2, f1 = 2 * (1/4) * (1/2) / (3/4) = 1 / 3
    assert (score.precision, score.recall) == (0.25, 0.5)
    assert score.f1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("flagged", "truth", "expected"),
    [
        # No fixed trigger tokens: nothing is defined, least of all as 0.
        ((1, 2), None, (NAN, NAN, NAN)),
        # Nothing flagged: no precision; the trigger was missed.
        ((), {1, 2}, (NAN, 0.0, 0.0)),
        # Nothing to find: every flag is wrong, recall is undefined, and f1 with it.
        ((1,), set(), (0.0, NAN, NAN)),
        ((), set(), (NAN, NAN, NAN)),
        # All flags wrong, and something was there: f1 = 0, no division by 0.
        ((3,), {1}, (0.0, 0.0, 0.0)),
        ((1, 2), {2, 1}, (1.0, 1.0, 1.0)),
    ],
)
def test_undefined_detection_is_nan_and_wrong_detection_is_0(
    flagged: tuple[int, ...],
    truth: set[int] | None,
    expected: tuple[float, float, float],
) -> None:
    score = token_detection(flagged, truth)
    np.testing.assert_equal((score.precision, score.recall, score.f1), expected)


def test_row_detection() -> None:
    flagged = np.array([True, True, True, False, False])
    poisoned = np.array([True, False, False, True, False])
    score = row_detection(flagged, poisoned)
    # 1 of 3 flagged rows is poisoned, 1 of 2 poisoned rows is flagged
    # f1 = 2 * (1/3) * (1/2) / (5/6) = 2 / 5
    assert score.precision == pytest.approx(1 / 3)
    assert score.recall == 0.5
    assert score.f1 == pytest.approx(0.4)


def test_row_detection_without_poison_or_without_flags() -> None:
    none, some = np.zeros(3, dtype=bool), np.array([True, False, False])
    clean = row_detection(some, none)
    np.testing.assert_equal((clean.precision, clean.recall, clean.f1), (0.0, NAN, NAN))
    blind = row_detection(none, some)
    np.testing.assert_equal((blind.precision, blind.recall, blind.f1), (NAN, 0.0, 0.0))


def test_average_precision_of_a_small_ranking() -> None:
    scores = np.array([0.9, NAN, 0.7, 0.8, 0.1])
    # By score: 0, 3, 2, 4. Trigger tokens 0 and 2 stand at ranks 1 and 3:
    # (1/1 + 2/3) / 2 = 5 / 6
    assert average_precision(scores, {0, 2}) == pytest.approx(5 / 6)
    # The worst order for one of four candidates: rank 4 -> 1 / 4
    assert average_precision(scores, {4}) == pytest.approx(0.25)


def test_a_trigger_token_that_is_no_candidate_is_found_by_no_threshold() -> None:
    scores = np.array([0.9, NAN, 0.7, 0.8, 0.1])
    # As above, but recall ends at 2 of 3: (1/1 + 2/3) / 3 = 5 / 9
    assert average_precision(scores, {0, 1, 2}) == pytest.approx(5 / 9)
    # The first place is half of what there was to find.
    assert average_precision(scores, {0, 1}) == pytest.approx(0.5)


def test_average_precision_is_undefined_without_a_trigger_among_the_candidates() -> None:
    scores = np.array([0.9, NAN, 0.7])
    assert math.isnan(average_precision(scores, None))
    assert math.isnan(average_precision(scores, set()))
    assert math.isnan(average_precision(scores, {1}))  # token 1 was no candidate


def test_the_area_under_roc_is_the_share_of_pairs_in_order() -> None:
    scores, truth = np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True])
    # 2 is above 1 but not above 3, 4 is above both: 3 of 4 pairs.
    assert area_under_roc(scores, truth) == pytest.approx(0.75)
    assert area_under_roc(scores, ~truth) == pytest.approx(0.25)
    # Equal scores are half in order.
    assert area_under_roc(np.zeros(4), truth) == pytest.approx(0.5)


def test_the_area_under_roc_needs_rows_of_both_kinds() -> None:
    scores = np.array([1.0, 2.0])
    assert math.isnan(area_under_roc(scores, np.array([True, True])))
    assert math.isnan(area_under_roc(scores, np.array([False, False])))


def test_an_unknown_metric_is_an_error_with_a_suggestion() -> None:
    # Similarity 2 * matches / length: "acs" and "asr" 2 * 2 / 6 = 0.67, "cacc" 2 * 2 / 7 = 0.57.
    with pytest.raises(UserError, match=r"unknown metric 'acs'; did you mean 'asr'\?"):
        metric("acs")


def test_every_metric_says_what_it_is_and_which_way_is_better() -> None:
    assert metric("asr").higher_is_better is False
    assert metric("cacc").higher_is_better is True
    assert metric("detection_precision").higher_is_better is True
    assert all(entry.summary.strip() for entry in METRICS.values())


@pytest.mark.parametrize("state", ["", "undefended_", "tuned_"])
@pytest.mark.parametrize("name", ["asr", "cacc", "ftr"])
def test_whatever_a_proportion_logs_is_a_known_metric(state: str, name: str) -> None:
    logged = Proportion(1, 2).as_metrics(f"{state}{name}")
    assert set(logged) <= set(METRICS)


def test_counts_seconds_and_numbers_are_no_fractions() -> None:
    counted = {name for name, entry in METRICS.items() if not entry.fraction}
    named = {n for n in METRICS if re.match(r"rows_|seconds|.*_(n|rows)$", n)}
    assert named <= counted
    assert counted - named == {
        "flagged",
        "vetoed",
        "unlearning_steps",
        "neurons_pruned",
        "tokens_pruned",
        "clean_rows_used",
        "triggers_cut_train",
        "triggers_cut_eval",
        "perplexity_rise",
    }


def test_every_group_of_columns_has_a_metric() -> None:
    assert {entry.group for entry in METRICS.values() if entry.head} == set(GROUPS)


def test_a_column_needs_a_head_and_a_group() -> None:
    with pytest.raises(ValueError, match="has head 'X' and group ''; give both or neither"):
        Metric("made", None, head="X")
    with pytest.raises(ValueError, match="has head 'X' and group 'flaged'"):
        Metric("made", None, head="X", group="flaged")
    with pytest.raises(ValueError, match="always and asked need a head"):
        Metric("made", None, always=True)
    with pytest.raises(ValueError, match="always and asked need a head"):
        Metric("made", None, asked=True)
    with pytest.raises(ValueError, match="summarized needs always"):
        Metric("made", None, head="X", group="cost", summarized=True)
