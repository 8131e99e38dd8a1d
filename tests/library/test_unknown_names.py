"""Errors about unknown names, which may come from data: on one line, and not endless."""

from __future__ import annotations

from btu.errors import unknown


def test_long_names_and_line_breaks_are_shown_on_one_short_line() -> None:
    message = str(unknown("target_label", "x\ny", ["n" * 500, "a\nb", "tab\there"]))
    assert message == (
        "unknown target_label 'x\\ny' (known: a\\nb, " + "n" * 80 + "..., tab\\there)"
    )


def test_of_very_many_names_the_first_are_shown() -> None:
    message = str(unknown("target_label", "x", [f"{number:03d}" for number in range(400)]))
    assert message.endswith("098, 099, and 300 more)")


def test_a_similar_name_is_proposed_on_one_line() -> None:
    assert "did you mean 'posi\\ntive'?" in str(unknown("label", "posi tive", ["posi\ntive"]))
