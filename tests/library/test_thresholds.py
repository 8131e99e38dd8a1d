"""The threshold in a defense's settings, whichever setting that is."""

from __future__ import annotations

from dataclasses import fields

import pytest

from btu.defenses.token_unlearning import TokenUnlearning
from btu.rules.base import (
    RULES,
    THRESHOLD_KEYS,
    THRESHOLD_NAMES,
    Threshold,
    threshold_name,
    threshold_of,
)
from btu.stages import as_config


@pytest.mark.parametrize("rule", RULES)
def test_the_threshold_of_a_resolved_defense_is_the_default_of_its_rule(rule: str) -> None:
    found = threshold_of(as_config(TokenUnlearning(rule=rule)))
    assert found is not None
    assert (found.rule, found.value) == (rule, RULES.load(rule).threshold)


@pytest.mark.parametrize("rule", RULES)
def test_every_threshold_is_a_setting_of_the_defense(rule: str) -> None:
    assert threshold_name(rule) in THRESHOLD_NAMES
    assert set(THRESHOLD_NAMES) <= {field.name for field in fields(TokenUnlearning)}
    assert THRESHOLD_KEYS == ("defense.threshold", "defense.alpha")


def test_thresholds_of_rounds_that_differ_are_no_single_one() -> None:
    settings = {"rule": "top_fraction", "threshold": None, "rounds": [1, 3]}
    assert threshold_of({**settings, "alpha": [0.1, 0.2]}) == Threshold(
        "top_fraction", (0.1, 0.2), exact=True
    )
    several = threshold_of({**settings, "alpha": [0.1, 0.2]})
    assert several is not None
    assert several.value is None
    equal = threshold_of({**settings, "alpha": [0.1, 0.1]})
    assert equal is not None
    assert equal.value == 0.1


def test_scores_give_the_flags_of_every_threshold_but_with_round_2() -> None:
    # Round 2 runs without the tokens that round 1 flagged.
    share = {"rule": "top_fraction", "alpha": 0.1}
    exact = {
        rounds: found.exact
        for rounds in ((1, 3), (1, 2, 3))
        if (found := threshold_of({**share, "rounds": list(rounds)})) is not None
    }
    assert exact == {(1, 3): True, (1, 2, 3): False}
    assert threshold_of({"rule": "contrast", "threshold": 4}) == Threshold("contrast", (4.0,), True)


@pytest.mark.parametrize("settings", [{}, {"rule": None}, {"rule": "gone", "threshold": 1.0}])
def test_without_a_known_rule_there_is_no_threshold(settings: dict[str, object]) -> None:
    assert threshold_of(settings) is None
