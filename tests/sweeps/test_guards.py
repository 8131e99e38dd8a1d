"""Which cells are marked, and with which text."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.report.marks import GUARDS, Mark, joined, marks, summary

NAN = float("nan")
# A cell with which nothing is wrong: 8 of 80 rows poisoned, an attack that works, a defense that
# flags and costs nothing.
FINE = {
    "poison_rate_reached": 0.1, "undefended_asr": 1.0, "cacc": 0.9, "tuned_cacc": 0.9,
    "flagged": 15, "asr": 0.1,
}  # fmt: skip


def record(
    rate: float = 0.1, notes: dict[str, int] | None = None, **metrics: Any
) -> dict[str, Any]:
    return {
        "config": {"attack": {"name": "badnets", "poison_rate": rate}},
        "notes": {"rows_train": 80, **(notes or {})},
        "metrics": {**FINE, **metrics},
    }


def names(*arguments: Any, **more: Any) -> list[str]:
    return [mark.name for mark in marks(record(*arguments, **more))]


def test_a_cell_with_which_nothing_is_wrong_has_no_mark() -> None:
    assert names() == []


@pytest.mark.parametrize(
    ("asr", "marked"),
    [(0.499, True), (0.0, True), (0.5, False), (1.0, False), (NAN, False)],
)
def test_an_attack_that_failed(asr: float, marked: bool) -> None:
    assert names(undefended_asr=asr) == ["attack failed"] * marked
    # Without poison nothing was to succeed.
    assert names(0.0, undefended_asr=asr, poison_rate_reached=0.0) == []


def test_the_attack_at_one_percent_of_minilm_is_marked() -> None:
    # As measured on SST-2: 17.5 % undefended, of which 14.5 % flip without a trigger too.
    (mark,) = marks(record(0.01, undefended_asr=0.175, poison_rate_reached=0.0125))
    assert mark == Mark("attack failed", "undefended ASR 0.175 is under 0.5")


@pytest.mark.parametrize(
    ("cacc", "tuned", "marked"),
    [
        (0.849, 0.9, True),
        (0.85, 0.9, False),  # exactly at the bar, though 0.9 - 0.85 is 0.05000000000000004
        (0.65, 0.7, False),
        (0.95, 0.9, False),
        (0.5, 0.9, True),
        (NAN, 0.9, False),
        (0.5, NAN, False),
    ],
)
def test_a_cacc_that_collapsed(cacc: float, tuned: float, marked: bool) -> None:
    assert names(cacc=cacc, tuned_cacc=tuned) == ["cacc collapse"] * marked
    # It is a collapse even if nothing was poisoned.
    assert names(0.0, cacc=cacc, tuned_cacc=tuned, poison_rate_reached=0.0) == (
        ["cacc collapse"] * marked
    )


@pytest.mark.parametrize(
    ("rate", "reached", "marked"),
    [
        (0.1, 0.1, False),
        (0.11, 0.1125, False),  # 8.8 of 80 rows are 9
        (0.1, 0.1125, False),  # one row off
        (0.1, 0.125, True),  # two rows off
        (0.1, 0.05, True),
        (0.0, 0.1, True),
        (0.1, NAN, False),
    ],
)
def test_a_rate_that_was_not_reached(rate: float, reached: float, marked: bool) -> None:
    assert names(rate, poison_rate_reached=reached) == ["rate not reached"] * marked


@pytest.mark.parametrize(
    ("cut", "marked"), [(0, False), (2, False), (3, True), (40, True), (NAN, False)]
)
def test_triggers_that_the_victim_does_not_see(cut: float, marked: bool) -> None:
    # 2 of 40 poisoned rows are exactly 5 %.
    made = record(poisoned_rows=40, triggers_cut_train=cut)
    found = marks(made)
    assert [mark.name for mark in found] == ["rate not reached"] * marked
    if marked:
        assert found[0].detail == (
            f"the trigger lies beyond max_length in {cut} of 40 poisoned rows"
        )


def test_cover_rows_have_a_trigger_that_may_lie_too_far_back_too() -> None:
    # 3 of 40 poisoned and 40 cover rows are less than 5 %.
    assert names(poisoned_rows=40, cover_rows=40, triggers_cut_train=3) == []
    assert names(poisoned_rows=40, cover_rows=0, triggers_cut_train=3) == ["rate not reached"]


def test_how_much_a_row_is_depends_on_how_many_there_are() -> None:
    # 0.102 instead of 0.1: 0.16 of 80 rows, but 2 of 1,000.
    assert names(poison_rate_reached=0.102) == []
    assert names(notes={"rows_train": 1000}, poison_rate_reached=0.102) == ["rate not reached"]
    # Without their number nothing can be said.
    assert marks({**record(poison_rate_reached=0.9), "notes": {}}) == []


@pytest.mark.parametrize(("flagged", "marked"), [(0, True), (1, False), (NAN, False)])
def test_nothing_flagged(flagged: float, marked: bool) -> None:
    assert names(flagged=flagged) == ["nothing flagged"] * marked
    assert names(flagged=flagged, rows_relabeled=0) == ["nothing flagged"] * marked
    # The second stage of btu has acted.
    assert names(flagged=flagged, rows_relabeled=9) == []
    assert names(0.0, flagged=flagged, poison_rate_reached=0.0) == []


@pytest.mark.parametrize(
    ("vetoed", "detail"),
    [
        (0, None),
        (NAN, None),
        (1, "1 of 15 flagged tokens is not cut"),
        (3, "3 of 15 flagged tokens are not cut"),
    ],
)
def test_flagged_tokens_that_are_not_cut(vetoed: float, detail: str | None) -> None:
    made = record(vetoed=vetoed)
    made["config"]["defense"] = {"name": "btu", "max_cut_cost": 0.02}
    why = ": after clean tuning the cut costs more than 0.02 of the clean rows"
    assert marks(made) == ([Mark("token vetoed", detail + why)] if detail else [])


def test_a_defense_that_looks_for_no_tokens_has_not_looked_in_vain() -> None:
    made = record()
    del made["metrics"]["flagged"]
    assert marks(made) == []


def test_texts_in_two_roles_are_told_by_role() -> None:
    notes = {"dropped_clean_overlap": 3, "dropped_train_overlap": 12, "dropped_eval_empty": 7}
    (mark,) = marks(record(notes=notes))
    assert mark.name == "overlap"
    assert mark.detail == "3 clean, 12 train texts stood in another role too and were dropped"
    # Empty texts were in no second role, and a count of 0 marks nothing.
    assert names(notes={"dropped_train_empty": 7, "dropped_train_overlap": 0}) == []


def test_several_marks_stand_in_one_order() -> None:
    found = marks(
        record(
            notes={"dropped_train_overlap": 1},
            undefended_asr=0.1,
            cacc=0.5,
            poison_rate_reached=0.5,
            flagged=0,
        )
    )
    # Without a flagged token there is none that could be vetoed.
    assert [mark.name for mark in found] == [name for name in GUARDS if name != "token vetoed"]
    assert joined(found) == (
        "attack failed; cacc collapse; rate not reached; nothing flagged; overlap"
    )
    assert joined([]) == ""


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"metrics": None, "config": None, "notes": None},
        {"metrics": {}, "config": {}, "notes": {}},
        {
            "metrics": {"undefended_asr": 0.1, "flagged": 0, "cacc": None},
            "config": {"attack": None},
        },
        {"status": "failed", "config": {"attack": {"poison_rate": 0.1}}, "reason": "nan"},
        {"metrics": {"undefended_asr": "low"}, "config": {"attack": {"poison_rate": "some"}}},
    ],
)
def test_a_record_without_the_values_is_not_marked(damaged: dict[str, Any]) -> None:
    assert marks(damaged) == []


def test_a_summary_has_a_line_for_each_kind() -> None:
    records = [record(undefended_asr=0.2), record(), record(undefended_asr=0.3, flagged=0), {}]
    assert summary(records) == [
        "2 cells: attack failed (undefended ASR under 0.5, or less than 0.25 above FTR): ASR there "
        "says nothing about a defense",
        "1 cell: nothing flagged (no token flagged and no row relabelled on a poisoned set): the "
        "defense removed nothing there",
    ]
    assert summary([record()]) == summary([]) == []


def test_a_model_that_says_the_target_anyway_is_no_attack() -> None:
    assert names(undefended_asr=1.0, undefended_ftr=0.76) == ["attack failed"]  # 0.24 apart
    assert names(undefended_asr=1.0, undefended_ftr=0.75) == []
