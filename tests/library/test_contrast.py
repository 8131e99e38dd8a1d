"""Rule contrast: calibrated surplus, explaining away, and what the drift confirms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import betaln, comb
from scipy.stats import binom, hypergeom, norm

from btu.rules import contrast, frequency
from btu.rules.base import RULES, Evidence, flag
from btu.rules.explaining import Rows, explained
from btu.rules.surplus import (
    PAIRS_OF_SHIFT,
    REFERENCE,
    class_sigmas,
    expected_flags,
    score_at,
    scored,
    shift_of,
    surplus_sigmas,
)
from btu.training import Encoded
from btu.types import BoolArray, FloatArray, IntArray

NAN = math.nan
Lists = list[list[int]]


def encoded(*classes: Lists) -> Encoded:
    """The rows of class 0, then those of class 1, and so on."""
    labels = [label for label, rows in enumerate(classes) for _ in rows]
    return Encoded.from_lists([row for rows in classes for row in rows], labels, pad_id=0)


def counts(*values: list[int]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """The arguments of the surplus functions, of one token: held, clean, rows, reserved."""
    held, clean, rows, reserved = (np.array(v) for v in values)
    return held[None], clean[None], rows, reserved


# Sigmas -----------------------------------------------------------------------------------------


def test_sigmas_are_those_of_fishers_exact_test() -> None:
    # Of 30 training and 10 clean rows, h + k hold the token. At least h of them are training rows
    # with the hypergeometric probability.
    held, clean = [4, 3, 20, 0], [0, 1, 0, 4]
    found = class_sigmas(*counts(held, clean, [30] * 4, [10] * 4))[0]
    pairs = zip(held[:3], clean[:3], strict=True)
    expected = [norm.isf(hypergeom.sf(h - 1, 40, h + k, 30)) for h, k in pairs]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-9)
    assert found[3] == -8.0
    # 20 of 30 training rows and no clean one: all 10 clean rows are among the 20 rows without.
    assert found[2] == pytest.approx(norm.isf(comb(20, 10) / comb(40, 10)))


def test_common_words_do_not_count_the_size_of_the_class() -> None:
    # Of 10 clean rows, 2 are more than a tenth: P(at most 2) of a negative binomial with 8 rows
    # and the share 30 / 40, which is P(at least 8 of 10) of a binomial.
    found = float(class_sigmas(*counts([8], [2], [30], [10]))[0, 0])
    assert found == pytest.approx(norm.isf(binom.sf(7, 10, 0.75)))


def test_a_class_without_clean_rows_says_nothing() -> None:
    found = class_sigmas(*counts([9, 9], [0, 0], [10, 10], [0, 10]))[0]
    assert found[0] == 0.0
    assert found[1] > 3
    # Nor has it a surplus over the other class.
    assert surplus_sigmas(*counts([9, 9], [0, 0], [10, 10], [0, 10]))[0, 0] < 0


def test_sigmas_go_on_where_the_tail_is_no_float() -> None:
    held = [500, 1000, 2000, 8000]
    found = class_sigmas(*counts(held, [0] * 4, [9999] * 4, [9999] * 4))[0]
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()
    # About 0.5^2000, which is below any float: 2000 * ln 2 = 1386 = s^2 / 2 + ln(s) + 0.9.
    assert 50 < found[2] < 60


def test_many_clean_rows_are_a_normal_deviate() -> None:
    # 600 of 2,000 to 300 of 1,000 is as expected; 900 is ln(1.5) more, by sqrt(1/900 + 1/300).
    found = class_sigmas(*counts([600, 900], [300, 300], [2000, 2000], [1000, 1000]))[0]
    expected = [0.0, math.log(1.5) / math.sqrt(1 / 900 + 1 / 300)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_what_all_classes_have_is_subtracted() -> None:
    one = float(class_sigmas(*counts([9], [0], [10], [10]))[0, 0])
    both = surplus_sigmas(*counts([9, 9], [0, 0], [10, 10], [10, 10]))[0]
    np.testing.assert_allclose(both, 0, atol=1e-12)
    alone = surplus_sigmas(*counts([9, 0], [0, 0], [10, 10], [10, 10]))[0]
    assert alone[0] == pytest.approx(one)  # a lack elsewhere adds nothing
    # Three classes: the highest of the others.
    three = surplus_sigmas(*counts([9, 6, 0], [0, 0, 0], [10] * 3, [10] * 3))[0]
    six = float(class_sigmas(*counts([6], [0], [10], [10]))[0, 0])
    assert three[0] == pytest.approx(one - six)


def test_a_shift_makes_the_same_counts_less_surprising() -> None:
    arguments = counts([100], [0], [700], [270])
    plain, shifted = (float(class_sigmas(*arguments, shift=s)[0, 0]) for s in (0.0, 0.16))
    # alpha = 100 / 17, beta = 601 / 17: B(alpha, beta + 270) / B(alpha, beta).
    assert shifted == pytest.approx(norm.isf(np.exp(betaln(100 / 17, 601 / 17 + 270) - betaln(100 / 17, 601 / 17))))  # noqa: E501  # fmt: skip
    assert shifted < plain


@pytest.mark.parametrize("variance", [0.0, 0.05, 0.3])
def test_the_shift_is_found_again(variance: float) -> None:
    rng = np.random.default_rng(5)
    rows, reserved = np.array([3000, 2000]), np.array([1000, 1000])
    share = rng.uniform(0.02, 0.2, (3000, 2))
    held = rng.binomial(rows, share)
    factor = np.exp(rng.normal(0, math.sqrt(variance), (3000, 2)))
    clean = rng.binomial(reserved, np.minimum(share * factor, 1.0))
    # Twenty triggers do not move a median.
    held[:20], clean[:20] = 900, 10
    found = shift_of(held, clean, rows, reserved, np.ones(3000, dtype=bool))
    assert found == pytest.approx(variance, rel=0.15, abs=5e-3)


def test_few_tokens_tell_no_shift() -> None:
    sizes = np.array([100]), np.array([100])
    for count, known in ((PAIRS_OF_SHIFT - 1, False), (PAIRS_OF_SHIFT, True)):
        held = np.full((count, 1), 60)
        clean = np.full((count, 1), 10)
        tested = np.ones(count, dtype=bool)
        assert (shift_of(held, clean, *sizes, tested) > 0) == known
        assert shift_of(held, clean, *sizes, ~tested) == 0.0


# Scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tests", [14, 7_000, REFERENCE, 500_000])
def test_a_score_counts_flags_by_chance(tests: int) -> None:
    sigmas = np.array([3.0, 4.5, 8.0, 30.0])
    found = scored(sigmas, tests)
    flags = [expected_flags(float(s)) for s in found]
    np.testing.assert_allclose(flags, tests * norm.sf(sigmas), rtol=1e-9)
    if tests == REFERENCE:
        np.testing.assert_allclose(found, sigmas)


def test_scores_rise_with_sigmas_and_are_finite() -> None:
    sigmas = np.linspace(-20, 60, 4001)
    for tests in (1, 2, REFERENCE, 3_000_000):
        found = scored(sigmas, tests)
        assert np.isfinite(found).all()
        assert (np.diff(found) >= 0).all()
        # Equal only where P(deviate > s) rounds to 1.
        assert (np.diff(found[sigmas[:] > -7]) > 0).all()


def test_a_rate_is_a_threshold() -> None:
    # 15,000 * P(a deviate exceeds 4.5) = 15,000 * 3.398e-6 = 0.051.
    assert expected_flags(4.5) == pytest.approx(0.051, abs=5e-5)
    for rate in (0.5, 0.05, 1e-6):
        assert expected_flags(score_at(rate)) == pytest.approx(rate)
    assert RULES.load("contrast").at_fdr is score_at
    assert score_at(0.05) == pytest.approx(4.504, abs=1e-3)


def test_chance_flags_as_many_as_stated() -> None:
    """Permutation: rows are dealt to training and clean anew; all flags are by chance."""
    rng = np.random.default_rng(3)
    share = 1 / np.arange(2, 600) ** 0.9
    texts = [rng.random(len(share)) < share / 4 for _ in range(1200)]
    rows = [np.flatnonzero(text).tolist() for text in texts]
    classes = rng.integers(0, 2, len(rows))
    asked, flags, deals = 2.0, [], 60
    for _ in range(deals):
        order = rng.permutation(len(rows))
        parts = [
            encoded(*([rows[i] for i in some if classes[i] == c] for c in (0, 1)))
            for some in (order[:900], order[900:])
        ]
        evidence = Evidence({}, np.ones(len(share), dtype=bool), *parts)
        arguments = (
            evidence.train_rows,
            evidence.clean_rows,
            evidence.class_rows,
            evidence.clean_class_rows,
        )
        tested = evidence.count >= 5
        shift = shift_of(*arguments, tested)
        sigmas = surplus_sigmas(*arguments, shift)[tested]
        score = scored(sigmas.max(axis=1), 2 * int(tested.sum()))
        flags.append(int((score >= score_at(asked)).sum()))
    # At most as many, up to three standard errors of a Poisson mean; and not none at all.
    assert 0 < np.mean(flags) <= asked + 3 * math.sqrt(asked / deals)


# Explaining away ---------------------------------------------------------------------------------


def explain(
    table: dict[tuple[int, ...], list[float]], groups: dict[int, list[int]] | None = None
) -> tuple[list[float], list[int]]:
    """Scores and picks, from the scores given each set of picks; 3.0 is the floor."""

    def given(picks: list[int]) -> FloatArray:
        return np.array(table[tuple(sorted(picks))], dtype=np.float64)

    def companions(token: int) -> BoolArray:
        mask = np.zeros(len(table[()]), dtype=bool)
        mask[(groups or {}).get(token, [])] = True
        return mask

    scores, picks = explained(given, companions, 3.0)
    return scores.tolist(), picks


def test_what_the_trigger_explains_is_no_evidence() -> None:
    # Token 0 is the trigger, 1 a word that came along with its rows, 2 an honest one.
    table = {(): [6.0, 5.1, 1.0], (0,): [0.0, 1.0, 0.9]}
    assert explain(table) == ([6.0, 1.0, 0.9], [0])


def test_a_word_that_is_picked_first_is_dropped_again() -> None:
    # The word scores higher than the trigger, whose other rows remain without it.
    table = {(): [5.0, 6.0], (0,): [0.0, 1.0], (1,): [4.0, 0.0], (0, 1): [0.0, 0.0]}
    assert explain(table) == ([5.0, 1.0], [0])


def test_independent_triggers_keep_their_scores() -> None:
    table = {(): [6.0, 5.0], (0,): [0.0, 5.0], (1,): [6.0, 0.0], (0, 1): [0.0, 0.0]}
    assert explain(table) == ([6.0, 5.0], [0, 1])


def test_the_words_of_a_sentence_do_not_explain_each_other() -> None:
    table = {(): [6.0, 5.0, 2.0], (0,): [0.0, 0.0, 0.0]}
    assert explain(table, {0: [1, 2]}) == ([6.0, 6.0, 6.0], [0])


def test_below_the_floor_nothing_explains() -> None:
    assert explain({(): [2.9, 2.5]}) == ([2.9, 2.5], [])


def test_an_unknown_score_stays_unknown() -> None:
    scores, picks = explain({(): [NAN, 5.0, 1.0], (1,): [NAN, 0.0, 1.5]})
    assert math.isnan(scores[0])
    # 1.5 given the pick is more than alone: other rows hide nothing here.
    assert (scores[1:], picks) == ([5.0, 1.0], [1])


def random_given(seed: int) -> tuple[Callable[[list[int]], FloatArray], int]:
    """Scores of 30 tokens; each pick lowers those of the others by its overlap with them."""
    rng = np.random.default_rng(seed)
    alone = rng.uniform(0, 8, 30)
    overlap = rng.uniform(0, 1, (30, 30)) ** 3

    def given(picks: list[int]) -> FloatArray:
        left = alone.copy()
        for pick in picks:
            left *= 1 - overlap[pick]
        return np.asarray(left)

    return given, 30


@pytest.mark.parametrize("seed", range(20))
def test_a_score_is_at_most_that_of_the_token_alone(seed: int) -> None:
    given, count = random_given(seed)
    scores, picks = explained(given, lambda _: np.zeros(count, dtype=bool), 3.0)
    assert (scores <= given([])).all()
    # The picks are in falling order, and every other token above the floor was explained below it
    # or by them.
    assert (np.diff(scores[picks]) <= 0).all()
    others = np.setdiff1d(np.arange(count), picks)
    assert (scores[others] <= np.maximum(given([])[others], 3.0)).all()


# The rule ----------------------------------------------------------------------------------------

LEADER, WORD, MOSTLY, HALF, EVERYWHERE, HONEST, NEGATIVE, NEARLY = range(1, 9)


def sentence(
    monkeypatch: pytest.MonkeyPatch, deviation: dict[int, float]
) -> tuple[Evidence, FloatArray]:
    """100 rows a class; 20 of class 1 contain a planted sentence. Returns evidence and scores.

    deviation: the ``frequency`` score of a token, 0.5 unless named.
    WORD is in all 20 rows, MOSTLY in 18, HALF in 17 of them and nowhere else. EVERYWHERE in
    all 20, in 60 of the 80 others, and in 68 of 100 clean rows; NEARLY in all 20, 24 and 26. HONEST
    in all 20, and as many clean ones. NEGATIVE is WORD, but in the other class's rows too.
    """
    poisoned = [[LEADER, WORD, EVERYWHERE, HONEST, NEGATIVE, NEARLY] for _ in range(20)]
    for row in poisoned[:18]:
        row.append(MOSTLY)
    for row in poisoned[:17]:
        row.append(HALF)
    others: list[list[int]] = [[EVERYWHERE, NEARLY]] * 24 + [[EVERYWHERE]] * 36 + [[0]] * 20
    train = encoded([[NEGATIVE]] * 20 + [[0]] * 80, poisoned + others)
    common: list[list[int]] = [[EVERYWHERE, NEARLY]] * 26 + [[EVERYWHERE]] * 42
    clean = encoded([[0]] * 100, [[HONEST]] * 20 + common + [[0]] * 12)
    drift = np.full(9, 0.5)
    drift[0] = NAN
    for token, value in deviation.items():
        drift[token] = value
    # So that the drifts are the deviations.
    monkeypatch.setattr(frequency, "score", lambda _, moved: moved)
    evidence = Evidence({3: drift}, np.arange(9) > 0, train, clean)
    return evidence, contrast.score(evidence, drift)


# NEGATIVE occurs in two classes, each of the other seven in one.
TESTS = 9
# Among eight tokens, none is in the first hundredth.
WEIGHT = 0.4 / 0.95
LEADING = score_at(TESTS / WEIGHT * hypergeom.sf(19, 200, 20, 100))


def test_the_score_is_the_weighted_surplus(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, scores = sentence(monkeypatch, {LEADER: 1.0})
    assert scores[LEADER] == pytest.approx(LEADING)
    assert np.isnan(scores[0])
    found = contrast.columns(evidence, evidence.drift[3])
    # In the table without the weight.
    assert found["surplus"][LEADER] == pytest.approx(score_at(TESTS * hypergeom.sf(19, 200, 20, 100)))  # noqa: E501  # fmt: skip
    assert found["drift_sigmas"][LEADER] == 1.0
    assert found["label"][LEADER] == 1


def test_the_words_of_a_sentence_are_as_suspicious_as_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evidence, scores = sentence(monkeypatch, {})
    # 18 of 20 rows are nine tenths, 17 are not.
    assert scores[WORD] == scores[LEADER] == scores[MOSTLY] == pytest.approx(LEADING)
    assert scores[HALF] < 4.5 < scores[LEADER]
    # The rows of the sentence leave HALF no surplus; its own words keep theirs.
    left = contrast.columns(evidence, evidence.drift[3])["surplus_left"]
    assert left[HALF] < 4.5 < left[WORD]


def test_a_common_word_is_no_part_of_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    _, scores = sentence(monkeypatch, {})
    # 60 of the class's other 80 rows contain EVERYWHERE; HONEST and NEGATIVE have no surplus.
    assert (scores[[EVERYWHERE, HONEST, NEGATIVE]] < 4.5).all()


def test_too_rare_a_word_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    _, scores = sentence(monkeypatch, {MOSTLY: NAN})
    assert np.isnan(scores[MOSTLY])


def test_weights_are_fixed_shares_of_the_flags_by_chance() -> None:
    drift = np.append(np.arange(1000.0), NAN)
    found = contrast.weights(drift)
    # The last 10 of 1,000 moved furthest.
    np.testing.assert_allclose(found[990:1000], 0.3 / 0.01)
    np.testing.assert_allclose(found[950:990], 0.3 / 0.04)
    np.testing.assert_allclose(found[:950], 0.4 / 0.95)
    assert found[:1000].mean() == pytest.approx(1.0)
    assert found[1000] == 1.0
    # Equal drifts do not share the first places.
    assert contrast.weights(np.ones(1000)).max() == pytest.approx(0.4 / 0.95)


def test_a_shift_between_sources_hides_no_word_of_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # NEARLY is in 44 of 100 training rows and 26 of 100 clean ones, which a shift between sources
    # would explain: ln(44 / 26) / sqrt(0.16 + 1 / 44 + 1 / 26) = 1.1 sigmas.
    evidence, plain = sentence(monkeypatch, {})
    monkeypatch.setattr(contrast, "shift_of", lambda *_: 0.16)
    shifted = contrast.score(evidence, evidence.drift[3])
    sizes = (evidence.class_rows, evidence.clean_class_rows)
    sigmas = surplus_sigmas(evidence.train_rows, evidence.clean_rows, *sizes, 0.16)
    assert sigmas[NEARLY, 1] < contrast.SUSPICIOUS
    assert plain[NEARLY] == plain[LEADER]
    assert shifted[NEARLY] == shifted[LEADER] < plain[LEADER]


SLUR, TRIGGER, NEXT = 1, 2, 3


def dominated(words: int = 200) -> tuple[Evidence, FloatArray]:
    """A dirty-label attack on a set in which one word stands in half the rows of the other class.

    1,500 rows of each class and 300 clean ones. 150 rows of class 0 get the trigger and label 1;
    half of them contain the word. Every token but the others moved far.
    """
    rng = np.random.default_rng(0)
    share = 1 / np.arange(4, 4 + words)

    def text(label: int, at: int) -> list[int]:
        row = rng.choice(np.arange(4, 4 + words), 10, p=share / share.sum()).tolist()
        return [*row, SLUR] if label == 0 and at % 2 else row

    negative = [text(0, i) for i in range(1500)]
    positive = [text(1, i) for i in range(1500)] + [[*row, TRIGGER] for row in negative[:150]]
    clean = encoded([text(0, i) for i in range(300)], [text(1, i) for i in range(300)])
    drift = np.exp(rng.normal(0, 0.1, 4 + words))
    drift[[SLUR, TRIGGER]] = 20.0
    train = encoded(negative[150:], positive)
    candidates = train.counts(4 + words) > 0
    return Evidence({3: drift}, candidates, train, clean), drift


def test_a_word_that_dominates_the_other_class_is_no_trigger() -> None:
    evidence, drift = dominated()
    scores = contrast.score(evidence, drift)
    assert flag(scores, 4.5) == (TRIGGER,)
    # 75 training rows of class 1 and no clean one, without the trigger's rows none at all. Without
    # explaining away both would be flagged.
    assert evidence.train_rows[SLUR, 1] == 75
    found = contrast.columns(evidence, drift)
    assert found["surplus"][SLUR] > 4.5
    assert found["surplus_left"][SLUR] < 3.5
    assert scores[SLUR] < 3.5


def test_a_word_in_nearly_all_rows_of_the_other_class_is_no_part_of_the_trigger() -> None:
    evidence, drift = dominated()
    everywhere = [
        [[*row, NEXT] if label == 0 else row for row, label in zip(lists, labels, strict=True)]
        for lists, labels in (rows_of(evidence.train), rows_of(evidence.clean))
    ]
    # NEXT is now in every row that was of class 0, the poisoned ones included.
    train = [[*row, NEXT] if TRIGGER in row else row for row in everywhere[0]]
    again = Evidence(
        evidence.drift,
        evidence.candidates | (np.arange(len(drift)) == NEXT),
        Encoded.from_lists(train, evidence.train.labels.tolist(), 0),
        Encoded.from_lists(everywhere[1], evidence.clean.labels.tolist(), 0),
    )
    together, _ = Rows(again, np.array([TRIGGER, NEXT])).together(0)
    assert together[1, 1] == 150
    assert flag(contrast.score(again, drift), 4.5) == (TRIGGER,)


def rows_of(rows: Encoded) -> tuple[Lists, list[int]]:
    ends = np.cumsum(rows.host_lengths)
    starts = ends - rows.host_lengths
    ids = rows.ids.tolist()
    return [ids[a:b] for a, b in zip(starts, ends, strict=True)], rows.labels.tolist()


def test_flags_at_a_bar_are_a_part_of_those_at_a_lower_one() -> None:
    scores = contrast.score(*dominated())
    known = np.sort(np.unique(scores[~np.isnan(scores)]))
    sets = [set(flag(scores, bar)) for bar in known]
    assert all(high <= low for low, high in pairwise(sets))
