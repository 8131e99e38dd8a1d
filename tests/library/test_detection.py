"""The contract that every detection rule keeps, and what each computes, by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from btu.defenses.token_unlearning import tokens_flagged, top_tokens
from btu.errors import UserError
from btu.rules import frequency, gap, mad, top_fraction
from btu.rules.base import (
    DEFAULT_RULE,
    RULES,
    Evidence,
    Rule,
    flag,
    robust_z,
    rows_and_tokens,
    rows_by_class,
    surplus_by_class,
    suspicion,
    suspicion_bar,
)
from btu.training import Encoded
from btu.types import FloatArray

NAN = math.nan
Lists = Sequence[Sequence[int]]


def encoded(*classes: Lists) -> Encoded:
    """The rows of class 0, then those of class 1, and so on."""
    labels = [label for label, rows in enumerate(classes) for _ in rows]
    return Encoded.from_lists([row for rows in classes for row in rows], labels, pad_id=0)


def drifted(drift: Sequence[float], candidates: Sequence[int] | None = None) -> Evidence:
    """The evidence of a rule that reads drifts only."""
    allowed = np.zeros(len(drift), dtype=bool)
    allowed[list(range(len(drift)) if candidates is None else candidates)] = True
    rows = encoded([[0]], [[0]])
    return Evidence({3: np.array(drift, dtype=np.float64)}, allowed, rows, rows)


# The contract ----------------------------------------------------------------------------------

VOCABULARY, TRIGGER = 80, 5


def planted() -> Evidence:
    """200 training and 200 clean rows; token 5 is in 20 rows of class 1, and moved far.

    Tokens 0 to 4 are not candidates, 60 to 79 do not occur, 55 to 59 do four times; the others
    as often as words do, by Zipf's law, some more and some less often than token 5.
    """
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 50)

    def rows() -> list[list[int]]:
        return [
            rng.choice(np.arange(6, 55), 12, p=share / share.sum()).tolist() for _ in range(100)
        ]

    negative, positive, clean = rows(), rows(), (rows(), rows())
    for row in positive[:20]:
        row[0] = TRIGGER
    for row in negative[:4]:
        row += range(55, 60)
    train = encoded(negative, positive)
    candidates = (train.counts(VOCABULARY) > 0) & (np.arange(VOCABULARY) > 4)
    drift = {}
    for number in (1, 3):
        drift[number] = np.exp(rng.normal(0, 0.1, VOCABULARY))
        drift[number][TRIGGER] = 8.0
        drift[number][60:] = 0.01
    return Evidence(drift, candidates, train, encoded(*clean))


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    """Each registered rule in turn."""
    return RULES.load(request.param)


def test_a_rule_scores_candidates_alone(rule: Rule) -> None:
    evidence = planted()
    scores = rule.scores(evidence)
    assert scores.shape == (VOCABULARY,)
    assert scores.dtype == np.float64
    assert not np.isinf(scores).any()
    assert np.isnan(scores[~evidence.candidates]).all()
    assert not np.isnan(scores).all()


def test_the_trigger_scores_highest(rule: Rule) -> None:
    evidence = planted()
    scores = rule.scores(evidence)
    assert np.nanargmax(scores) == TRIGGER
    # The default bar is between it and the others; but 0.0005 * 80 is 0.04 of a token.
    flagged = () if rule.unit.startswith("the share") else (TRIGGER,)
    assert flag(scores, rule.bar(rule.threshold)) == flagged


def test_a_rule_that_needs_clean_rows_says_so(rule: Rule) -> None:
    evidence = planted()
    alone = dataclasses.replace(evidence, clean=encoded())
    with_clean, without = rule.scores(evidence), rule.scores(alone)
    assert rule.needs_clean != np.array_equal(with_clean, without, equal_nan=True)
    if rule.needs_clean:
        assert flag(without, rule.bar(rule.threshold)) == ()


def test_the_same_evidence_gives_the_same_scores(rule: Rule) -> None:
    np.testing.assert_array_equal(rule.scores(planted()), rule.scores(planted()))


def test_a_rule_leaves_its_evidence_as_it_was(rule: Rule) -> None:
    evidence, before = planted(), planted()
    rule.scores(evidence)
    suspicion(evidence)
    assert evidence.drift.keys() == before.drift.keys()
    for number, drift in evidence.drift.items():
        np.testing.assert_array_equal(drift, before.drift[number])
    np.testing.assert_array_equal(evidence.candidates, before.candidates)
    for rows, same in ((evidence.train, before.train), (evidence.clean, before.clean)):
        for name in ("ids", "starts", "lengths", "labels"):
            assert getattr(rows, name).equal(getattr(same, name))
        np.testing.assert_array_equal(rows.host_lengths, same.host_lengths)


def test_a_higher_bar_flags_a_part_of_what_a_lower_one_flags(rule: Rule) -> None:
    scores = rule.scores(planted())
    known = np.unique(scores[~np.isnan(scores)])
    flags = [flag(scores, bar) for bar in known]
    # The first ones, in the same order: nothing else moves with a bar.
    assert all(low[: len(high)] == high for low, high in pairwise(flags))
    assert len(flags[0]) == np.isfinite(scores).sum()
    assert TRIGGER in flags[-1]
    assert flag(scores, known[-1] + 1) == ()


def test_a_stricter_threshold_is_a_higher_bar(rule: Rule) -> None:
    inside = [0.2, 0.5, 0.9] if rule.high == 1 else [1.5, 3.0, 40.0]
    bars = [rule.bar(threshold) for threshold in inside]
    # A lower share is stricter.
    assert bars == sorted(bars, reverse=rule.high == 1)
    assert len(set(bars)) == 3


def test_a_score_does_not_depend_on_the_other_rounds_order(rule: Rule) -> None:
    evidence = planted()
    turned = Evidence(
        dict(reversed(evidence.drift.items())), evidence.candidates, evidence.train, evidence.clean
    )
    np.testing.assert_array_equal(rule.scores(evidence), rule.scores(turned))


def test_a_rule_has_a_default_that_it_would_take(rule: Rule) -> None:
    rule.check(rule.threshold)
    assert rule.unit
    assert rule.rounds
    assert set(rule.rounds) <= {1, 2, 3}


@pytest.mark.parametrize("threshold", [NAN, math.inf, -math.inf, True, "5", None, [5.0]])
def test_a_threshold_is_a_number(rule: Rule, threshold: Any) -> None:
    with pytest.raises(UserError, match=r"^defense\.threshold must be above \d.*, got .*it counts"):
        rule.check(threshold)


@pytest.mark.parametrize(
    ("name", "threshold", "message"),
    [
        ("contrast", 0, "above 0, got 0; it counts sigmas of surplus, weighted by drift."),
        ("contrast", -1.5, "above 0, got -1.5; it counts sigmas of surplus, weighted by drift."),
        ("frequency", 0.0, "above 0, got 0.0; it counts sigmas above tokens as frequent."),
        ("mad", 0.0, "above 0, got 0.0; it counts sigmas above the median drift."),
        ("gap", 1.0, "above 1, got 1.0; it counts drift over the next token's drift."),
        (
            "top_fraction",
            1.0,
            "above 0 and below 1, got 1.0; it counts the share of the vocabulary that a round "
            "flags.",
        ),
        (
            "top_fraction",
            0.0,
            "above 0 and below 1, got 0.0; it counts the share of the vocabulary that a round "
            "flags.",
        ),
    ],
)
def test_a_threshold_out_of_range_is_an_error(name: str, threshold: float, message: str) -> None:
    with pytest.raises(UserError) as caught:
        RULES.load(name).check(threshold)
    assert str(caught.value) == f"defense.threshold must be {message}"


def test_an_unknown_rule_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"unknown rule 'contrst'; did you mean 'contrast'\?"):
        RULES.load("contrst")
    assert DEFAULT_RULE in RULES


def test_flags_fall_by_score_and_rise_by_id() -> None:
    scores = np.array([NAN, 3.0, 5.0, 3.0, 2.0, -math.inf])
    # 5.0 first, the two of 3.0 by id; 3.0 itself reaches the bar, NaN nothing.
    assert flag(scores, 3.0) == (2, 1, 3)
    assert flag(scores, -math.inf) == (2, 1, 3, 4, 5)
    assert flag(scores, 5.1) == ()
    assert all(type(token) is int for token in flag(scores, 3.0))  # JSON takes no numpy integers


# Several rounds --------------------------------------------------------------------------------


def two_rounds(first: Sequence[float], third: Sequence[float]) -> Evidence:
    rows = encoded([[0]], [[0]])
    drift = {1: np.array(first, dtype=np.float64), 3: np.array(third, dtype=np.float64)}
    return Evidence(drift, np.ones(len(first), dtype=bool), rows, rows)


def test_over_two_rounds_a_token_is_as_suspicious_as_in_the_milder_one() -> None:
    as_it_is = Rule(lambda _, drift: drift, 1.0, 0.0, math.inf, "nothing")
    scores = as_it_is.scores(two_rounds([5, 1, NAN, 2], [3, 4, 9, NAN]))
    # A score that one round lacks is unknown.
    np.testing.assert_array_equal(scores, [3, 1, NAN, NAN])


def test_mad_over_two_rounds_flags_what_stands_out_in_both() -> None:
    evidence = two_rounds([1, 2, 3, 4, 10], [10, 2, 3, 4, 10])
    # Round 1 as below: 0.6745 * (d - 3). Round 3: median 4, deviations 6, 2, 1, 0, 6 -> MAD 2:
    # 0.6745 / 2 * (d - 4) = 2.0235, -0.6745, -0.33725, 0, 2.0235.
    expected = [-1.349, -0.6745, -0.33725, 0.0, 2.0235]
    np.testing.assert_allclose(mad.RULE.scores(evidence), expected)


def test_top_fraction_over_two_rounds_is_the_better_rank() -> None:
    evidence = two_rounds([9, 1, 4, 4.5, 2], [0, 8, 1, 7, 2])
    # Ranks in round 1: 1, 5, 3, 2, 4; in round 3: 5, 1, 4, 2, 3.
    expected = np.array([-1, -1, -3, -2, -3]) / 5
    np.testing.assert_array_equal(top_fraction.RULE.scores(evidence), expected)


def test_the_bar_of_top_fraction_gives_the_union_of_each_rounds_top() -> None:
    rng = np.random.default_rng(0)
    drift = {1: rng.random(50), 3: rng.random(50)}
    candidates = rng.random(50) < 0.8
    rows = encoded([[0]], [[0]])
    scores = top_fraction.RULE.scores(Evidence(drift, candidates, rows, rows))
    for k in range(1, 30):
        union = {i for moved in drift.values() for i in top_tokens(moved, candidates, k)}
        assert set(flag(scores, top_fraction.RULE.bar(k / 50))) == union


# mad -------------------------------------------------------------------------------------------


def test_a_robust_z_is_the_deviation_over_the_mad() -> None:
    # Median 3; deviations 2, 1, 0, 1, 7 -> MAD 1: sigma is 1 / 0.6745.
    z = robust_z(np.array([1.0, 2.0, 3.0, 4.0, 10.0]))
    np.testing.assert_allclose(z, [-1.349, -0.6745, 0.0, 0.6745, 4.7215])


def test_where_most_values_are_equal_nothing_stands_out() -> None:
    # Median 1; deviations 0, 0, 0, 4 -> MAD 0.
    assert np.isnan(robust_z(np.array([1.0, 1.0, 1.0, 5.0]))).all()


def test_mad_is_over_the_candidates() -> None:
    # Token 0 is none: neither scored nor in the median.
    evidence = drifted([99, 1, 2, 3, 4, 10], [1, 2, 3, 4, 5])
    scores = mad.score(evidence, evidence.drift[3])
    np.testing.assert_allclose(scores, [NAN, -1.349, -0.6745, 0.0, 0.6745, 4.7215])


# gap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        # Gaps 8/4, 4/3, 3/2.9; below the last token there is none.
        ([8, 4, 3, 2.9], [2, 4 / 3, 3 / 2.9, 1]),
        # The same in another order of ids.
        ([3, 2.9, 8, 4], [3 / 2.9, 1, 2, 4 / 3]),
        # Gaps 8/7, 7/3, 3/2.9: whoever flags down to the large one flags what is above it.
        ([8, 7, 3, 2.9], [7 / 3, 7 / 3, 3 / 2.9, 1]),
        # There is no ratio to a drift of 0.
        ([8, 4, 0, 0], [2, 1, 1, 1]),
        ([5, 0, 0], [1, 1, 1]),
        # Equal drifts have no gap.
        ([2, 2, 1], [2, 2, 1]),
    ],
)
def test_a_gap_is_the_largest_at_or_below_a_token(
    drift: list[float], expected: list[float]
) -> None:
    evidence = drifted(drift)
    np.testing.assert_allclose(gap.score(evidence, evidence.drift[3]), expected)


def test_a_gap_is_between_candidates() -> None:
    # Without token 1, 8 stands over 3.
    evidence = drifted([8, 4, 3], [0, 2])
    np.testing.assert_allclose(gap.score(evidence, evidence.drift[3]), [8 / 3, NAN, 1])


@pytest.mark.parametrize(("tokens", "expected"), [(63, 63), (64, 64), (65, 0)])
def test_a_gap_below_the_64th_token_is_none(tokens: int, expected: int) -> None:
    # Drifts 1, 1, ... down to 100 tokens, of which the first few moved 5 times as far.
    evidence = drifted([5.0] * tokens + [1.0] * (100 - tokens))
    assert len(flag(gap.score(evidence, evidence.drift[3]), 2.0)) == expected


# top_fraction ----------------------------------------------------------------------------------


def test_top_fraction_is_minus_the_rank_over_the_vocabulary() -> None:
    # Token 0 moved most but is not a candidate; 2 and 3 moved alike: the lower id is first.
    evidence = drifted([9, 1, 4, 4, 2], [1, 2, 3, 4])
    scores = top_fraction.score(evidence, evidence.drift[3])
    np.testing.assert_array_equal(scores, [NAN, -4 / 5, -1 / 5, -2 / 5, -3 / 5])


@pytest.mark.parametrize("vocabulary", [299, 400, 28_996, 30_522, 50_257, 128_100])
def test_an_alpha_of_k_tokens_flags_k_tokens(vocabulary: int) -> None:
    evidence = drifted(np.linspace(2.0, 1.0, vocabulary).tolist())
    scores = top_fraction.score(evidence, evidence.drift[3])
    for k in [*range(1, 250), vocabulary // 2, vocabulary - 1]:
        # However it was computed: 1 / V times k may round to just below k / V.
        for alpha in (k / vocabulary, 1 / vocabulary * k):
            assert int((scores >= top_fraction.bar(alpha)).sum()) == k


def test_the_bar_flags_as_many_as_the_papers_k() -> None:
    evidence = drifted(np.linspace(2.0, 1.0, 30_522).tolist())
    scores = top_fraction.score(evidence, evidence.drift[3])
    for alpha in (0.0005, 0.0001, 0.001, 1 / 3, 0.1, 0.02, 0.99):
        found = int((scores >= top_fraction.bar(alpha)).sum())
        assert found == tokens_flagged(alpha, 30_522, 30_522)
    # 0.0005 * 30,522 = 15.26
    assert len(flag(scores, top_fraction.bar(0.0005))) == 15


# frequency -------------------------------------------------------------------------------------

COUNTS = [5, 10, 20, 40, 80, 160]


def counted(counts: Sequence[int], drift: Sequence[float]) -> Evidence:
    """Token i occurs counts[i] times."""
    row = [token for token, count in enumerate(counts) for _ in range(count)]
    train = encoded([row], [[]])
    return Evidence(
        {3: np.array(drift, dtype=np.float64)}, np.array(counts) > 0, train, encoded([[0]], [[0]])
    )


def curve(count: float) -> float:
    x = math.log(count)
    return -3.0 + 1.2 * x - 0.1 * x**2


def test_a_robust_fit_leaves_an_outlier_its_whole_deviation() -> None:
    x = np.log(np.arange(5.0, 65.0))
    y = -3.0 + 1.2 * x - 0.1 * x**2
    y[20] += 3.0
    expected = np.zeros(60)
    expected[20] = 3.0  # a plain least-squares fit would share it out
    np.testing.assert_allclose(frequency.residuals(x, y), expected, atol=1e-6)


def beside_the_curve(outlier: float) -> tuple[list[int], list[float]]:
    """Two tokens of each count, 0.1 above and 0.1 below the curve, and one far above it."""
    counts = [count for count in COUNTS for _ in range(2)] + [30]
    beside = [0.1, -0.1] * len(COUNTS) + [outlier]
    return counts, [math.exp(curve(c) + offset) for c, offset in zip(counts, beside, strict=True)]


def test_frequency_is_the_deviation_from_tokens_as_frequent() -> None:
    counts, drift = beside_the_curve(3.0)
    evidence = counted(counts, drift)
    scores = frequency.score(evidence, evidence.drift[3])
    # Whatever level the fit takes, the residuals differ by it alone. 6 of -0.1, 6 of 0.1, one of
    # 3.0: median 0.1, deviations 0.2, 0 and 2.9 -> MAD 0.2, sigma 0.2 / 0.6745.
    expected = [0.0, -0.6745] * 6 + [2.9 / 0.2 * 0.6745]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_rare_tokens_are_not_scored_and_do_not_act() -> None:
    counts, drift = beside_the_curve(3.0)
    evidence = counted(counts, drift)
    alone = frequency.score(evidence, evidence.drift[3])
    # 4 occurrences are too few, however far the token moved; so is no movement at all.
    more = counted([*counts, 4, 0, 50], [*drift, 1e6, 1.0, 0.0])
    scores = frequency.score(more, more.drift[3])
    np.testing.assert_array_equal(scores[:-3], alone)
    assert np.isnan(scores[-3:]).all()


def test_a_token_that_may_not_be_flagged_does_not_act() -> None:
    counts, drift = beside_the_curve(3.0)
    evidence = counted([*counts, 60], [*drift, 1e6])
    evidence.candidates[-1] = False
    scores = frequency.score(evidence, evidence.drift[3])
    assert np.isnan(scores[-1])
    assert scores[-2] == pytest.approx(2.9 / 0.2 * 0.6745)


def test_of_fewer_than_10_tokens_there_is_no_curve() -> None:
    counts, drift = beside_the_curve(3.0)
    nine, ten = counted(counts[-9:], drift[-9:]), counted(counts[-10:], drift[-10:])
    assert np.isnan(frequency.score(nine, nine.drift[3])).all()
    assert np.isfinite(frequency.score(ten, ten.drift[3])).all()


# Surplus ---------------------------------------------------------------------------------------

# 9 training rows and 1 clean one, where 5 and 5 were expected:
# 2 * (9 * ln(9/5) + 1 * ln(1/5)) = 2 * (5.2901 - 1.6094) = 7.3613, its root 2.7132.
NINE_TO_ONE = math.sqrt(2 * (9 * math.log(9 / 5) + math.log(1 / 5)))
# 6 and 4: 2 * (6 * ln(6/5) + 4 * ln(4/5)) = 2 * (1.0939 - 0.8926) = 0.4027, its root 0.6346.
SIX_TO_FOUR = math.sqrt(2 * (6 * math.log(6 / 5) + 4 * math.log(4 / 5)))


def surplus(held: list[int], clean: list[int], rows: list[int], reserved: list[int]) -> FloatArray:
    """The surplus of one token, by class."""
    (one,) = surplus_by_class(
        np.array([held]), np.array([clean]), np.array(rows), np.array(reserved)
    )
    return np.asarray(one)


@pytest.mark.parametrize(
    ("held", "clean", "expected"),
    [
        # In class 1 the token stands nowhere: 0, less the other class's surplus.
        ([9, 0], [1, 0], [NINE_TO_ONE, -NINE_TO_ONE]),
        ([0, 9], [0, 1], [-NINE_TO_ONE, NINE_TO_ONE]),
        # The same shift in both classes is not a trigger; the smaller of two is subtracted.
        ([9, 9], [1, 1], [0.0, 0.0]),
        ([9, 6], [1, 4], [NINE_TO_ONE - SIX_TO_FOUR, SIX_TO_FOUR - NINE_TO_ONE]),
        # A lack has a sign, and takes nothing off the other class.
        ([1, 0], [9, 0], [-NINE_TO_ONE, 0.0]),
        ([1, 9], [9, 1], [-2 * NINE_TO_ONE, NINE_TO_ONE]),
        ([5, 5], [5, 5], [0.0, 0.0]),
        ([0, 0], [0, 0], [0.0, 0.0]),
        # Of three, the highest of the others; two that are highest alike leave nothing.
        (
            [9, 6, 0],
            [1, 4, 0],
            [NINE_TO_ONE - SIX_TO_FOUR, SIX_TO_FOUR - NINE_TO_ONE, -NINE_TO_ONE],
        ),
        ([9, 9, 0], [1, 1, 0], [0.0, 0.0, -NINE_TO_ONE]),
    ],
)  # fmt: skip
def test_surplus_by_hand(held: list[int], clean: list[int], expected: list[float]) -> None:
    sizes = [10] * len(held)
    np.testing.assert_allclose(surplus(held, clean, sizes, sizes), expected, atol=1e-12)
    assert pytest.approx(2.7132, abs=1e-4) == NINE_TO_ONE
    assert pytest.approx(0.6346, abs=1e-4) == SIX_TO_FOUR


def test_surplus_counts_rows_of_each_kind() -> None:
    # 30 training rows to 10 clean ones: 3 to 1 is as expected.
    np.testing.assert_allclose(surplus([3, 0], [1, 0], [30, 10], [10, 10]), [0, 0], atol=1e-12)
    # 4 to 0 where 3 and 1 were expected: 2 * 4 * ln(4/3).
    expected = math.sqrt(8 * math.log(4 / 3))
    np.testing.assert_allclose(surplus([4, 0], [0, 0], [30, 10], [10, 10]), [expected, -expected])


def test_a_class_without_clean_rows_shows_no_surplus() -> None:
    np.testing.assert_array_equal(surplus([9, 0], [0, 0], [10, 10], [0, 10]), [0.0, 0.0])
    np.testing.assert_array_equal(surplus([9, 9], [0, 0], [10, 10], [0, 0]), [0.0, 0.0])


def test_rows_and_tokens_are_paired_once() -> None:
    rows = Encoded.from_lists([[5, 2, 5], [], [2], [5]], [0, 1, 1, 1], pad_id=0)
    row, token = rows_and_tokens(rows, 7)
    assert list(zip(row.tolist(), token.tolist(), strict=True)) == [(0, 2), (0, 5), (2, 2), (3, 5)]
    # Tokens 2 and 5 are in one row of each class, though 5 occurs twice in the first.
    expected = np.zeros((7, 2), dtype=np.int64)
    expected[[2, 5]] = [1, 1]
    np.testing.assert_array_equal(rows_by_class(rows, 7, 2), expected)


def test_evidence_counts_rows_and_tokens() -> None:
    train = encoded([[1, 1, 2], [2]], [[1], [3, 2], [3]])
    clean = encoded([[2]], [[1], [1, 1]], [[3]])
    evidence = Evidence({}, np.ones(4, dtype=bool), train, clean)
    assert evidence.classes == 3  # of whichever rows have the most
    assert evidence.count.tolist() == [0, 3, 3, 2]
    assert evidence.train_rows.tolist() == [[0, 0, 0], [1, 1, 0], [2, 1, 0], [0, 2, 0]]
    assert evidence.clean_rows.tolist() == [[0, 0, 0], [0, 2, 0], [1, 0, 0], [0, 0, 1]]
    assert evidence.class_rows.tolist() == [2, 3, 0]


# Rows ------------------------------------------------------------------------------------------

GOOD, BAD, PLANTED = 1, 2, 3


def test_suspicion_by_hand() -> None:
    # 4 of 8 rows of class 1 are bad ones with a trigger, relabeled.
    train = encoded([[BAD]] * 8, [[GOOD]] * 4 + [[BAD, PLANTED]] * 4)
    clean = encoded([[BAD]] * 8, [[GOOD]] * 8)
    found = suspicion(Evidence({}, np.ones(4, dtype=bool), train, clean))
    # BAD and PLANTED: 4 to 0 in class 1 where 2 and 2 were expected: sqrt(2 * 4 * ln(2)) = 2.3548
    # each, 0.8548 above the floor. GOOD lacks rows there, BAD has none too many in class 0.
    above = math.sqrt(8 * math.log(2)) - 1.5
    assert above == pytest.approx(0.8548, abs=1e-4)
    # BAD is in (8 + 1) / (8 + 2) of class 0 and 1 / 10 of class 1, GOOD the other way round,
    # PLANTED in 1 / 10 of both: the odds are ln(9), a quarter of which counts, for or against the
    # label.
    odds = math.log(9) / 4
    expected = [-odds] * 8 + [-odds] * 4 + [2 * above + odds] * 4
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_odds_are_of_shares_where_classes_differ_in_size() -> None:
    train = encoded([[BAD]] * 8, [[BAD]] * 2)
    clean = encoded([[BAD]] * 4 + [[GOOD]] * 4, [[BAD], [GOOD]])
    found = suspicion(Evidence({}, np.ones(3, dtype=bool), train, clean))
    # BAD: (4 + 1) / (8 + 2) of class 0 and (1 + 1) / (2 + 2) of class 1 are 0.5 both: no odds.
    # 8 to 4 of 8 and 8, where 6 and 6 were expected, are 2 * (8 * ln(4/3) + 4 * ln(2/3)) = 1.36,
    # and 2 to 1 of 2 and 2 less: all below the floor.
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_a_relabeled_row_is_more_suspicious_than_with_its_own_label() -> None:
    # The same words under both labels; the clean rows show that they are bad ones.
    train = encoded([[BAD, 3], [BAD]], [[BAD, 3], [GOOD]])
    clean = encoded([[BAD]] * 8, [[GOOD]] * 8)
    right, _, wrong, _ = suspicion(Evidence({}, np.ones(4, dtype=bool), train, clean))
    assert wrong > 0 > right


def test_of_three_classes_the_next_best_counts() -> None:
    # Token 1 is in 8, 4 and 0 of 8 clean rows: 9/10, 5/10 and 1/10.
    train = encoded([[1]], [[1]], [[1]])
    clean = encoded([[1]] * 8, [[1]] * 4 + [[0]] * 4, [[0]] * 8)
    found = suspicion(Evidence({}, np.ones(2, dtype=bool), train, clean))
    # 1 row to 8 clean ones is as expected, of 1 to 8 each. 1 to 4, where 5/9 and 40/9 were, has
    # the root 0.577; 1 to 0, where 1/9 and 8/9 were, sqrt(2 * ln(9)) = 2.096: above the floor,
    # with the other taken off.
    next_best = math.sqrt(2 * (math.log(9 / 5) + 4 * math.log(9 / 10)))
    above = math.sqrt(2 * math.log(9)) - next_best - 1.5
    odds = [math.log(5 / 9) / 4, math.log(9 / 5) / 4, math.log(9) / 4 + above]
    np.testing.assert_allclose(found, odds, rtol=1e-12)


def test_a_row_without_tokens_is_not_suspicious() -> None:
    train = encoded([[], [BAD]], [[GOOD]])
    clean = encoded([[BAD]] * 2, [[GOOD]] * 2)
    assert suspicion(Evidence({}, np.ones(4, dtype=bool), train, clean))[0] == 0


def test_the_bar_is_what_one_in_a_thousand_clean_rows_reaches() -> None:
    # A bad row among the good ones.
    train = encoded([[BAD]] * 4, [[GOOD]] * 4)
    clean = encoded([[BAD]] * 4, [[GOOD]] * 3 + [[BAD]])
    evidence = Evidence({}, np.ones(3, dtype=bool), train, clean)
    assert evidence.surplus.max() < 1.5  # the odds alone count
    # Of 4 rows each, BAD is in 4 and 1, GOOD in 0 and 3. For the other label (n + 1) / (4 + 2);
    # for its own, without the row itself, (n - 1 + 1) / (4 - 1 + 2): 2/6 to 4/5 for the 4 bad rows,
    # 1/6 to 3/5 for the 3 good ones, 5/6 to 1/5 for the bad one with the good label.
    second, highest = math.log(5 / 12) / 4, math.log(25 / 6) / 4
    # Of 8 values, the quantile 0.999 is 7 * 0.999 = 6.993 steps above the lowest.
    assert suspicion_bar(evidence) == pytest.approx(0.007 * second + 0.993 * highest, rel=1e-12)


def test_the_surplus_counts_in_the_bar_too() -> None:
    train = encoded([[]] * 10, [[PLANTED]] * 9 + [[]])
    clean = encoded([[]] * 10, [[PLANTED]] + [[]] * 9)
    bar = suspicion_bar(Evidence({}, np.ones(4, dtype=bool), train, clean))
    # One of 20 rows has a token: with 1 / 12 for the other label, and (1 - 1 + 1) / (10 - 1 + 2)
    # for its own. 19 * 0.999 = 18.981 steps above the lowest, the other 19 being 0.
    highest = NINE_TO_ONE - 1.5 + math.log(11 / 12) / 4
    assert bar == pytest.approx(0.981 * highest, rel=1e-12)


def test_without_clean_rows_there_is_no_bar() -> None:
    train = encoded([[BAD]], [[GOOD]])
    assert math.isnan(suspicion_bar(Evidence({}, np.ones(3, dtype=bool), train, encoded())))


def test_a_class_without_clean_rows_suits_no_row_better() -> None:
    # By the words of no rows at all every text would fit class 1, the longer the better.
    train = encoded([[GOOD, BAD, PLANTED]] * 8, [[GOOD]] * 8)
    clean = encoded([[GOOD]] * 8, [])
    evidence = Evidence({}, np.ones(4, dtype=bool), train, clean)
    # What is left is the surplus: of BAD and PLANTED 8 to 0 in class 0, where 4 and 4 were
    # expected: sqrt(2 * 8 * ln(2)) each. GOOD has none: 8 to 8.
    above = math.sqrt(16 * math.log(2)) - 1.5
    np.testing.assert_allclose(suspicion(evidence), [2 * above] * 8 + [0.0] * 8, atol=1e-12)
