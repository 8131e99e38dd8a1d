"""Differences of two sweeps over the same cells, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from synthetic import config, shelve

from btu.errors import UserError
from orchestrator.report.compare import (
    compare,
    group_table,
    of_revision,
    pair_table,
    readable_differences,
)
from orchestrator.report.statistics import half_width, paired, ties_with_best

if TYPE_CHECKING:
    from conftest import Ran

NAN = float("nan")


def record(
    key: str, metrics: dict[str, float], tags: dict[str, str] | None = None, **where: Any
) -> dict[str, Any]:
    return {
        "key": key,
        "run_id": f"run-{key}",
        "config": config(**where),
        "varied": {},
        "metrics": metrics,
        "tags": tags or {},
    }


def seeds(lead: str, values: Iterable[float], metric: str = "asr", **where: Any) -> list[Any]:
    return [
        record(f"{lead}{seed}", {metric: value}, seed=seed, **where)
        for seed, value in enumerate(values)
    ]


# Statistics -------------------------------------------------------------------------------------


def test_the_paired_interval_and_p_are_as_derived_by_hand() -> None:
    # Differences 0.1, 0.2, 0.6: mean 0.3, standard error sqrt(0.07 / 3) = 0.1527525, t = 1.963961.
    # For 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - 1.963961 / 2.420153 = 0.188497.
    found = paired([0.1, 0.2, 0.6])
    assert (found.n, found.mean) == (3, pytest.approx(0.3))
    assert found.half_width == pytest.approx(4.3026527 * 0.1527525)
    assert found.p == pytest.approx(0.188497, abs=1e-5)
    assert found.tie


def test_the_test_is_that_of_scipy() -> None:
    from scipy.stats import ttest_rel

    one, other = [0.91, 0.88, 0.9, 0.86], [0.87, 0.86, 0.89, 0.81]
    found = paired([a - b for a, b in zip(one, other, strict=True)])
    assert found.p == pytest.approx(ttest_rel(one, other).pvalue)


def test_one_pair_has_no_interval_and_no_test() -> None:
    found = paired([0.2, NAN])
    assert (found.n, found.mean) == (1, 0.2)
    assert math.isnan(found.half_width)
    assert math.isnan(found.p)
    assert not found.tie
    assert paired([0.0]).tie


def test_differences_without_spread_are_not_tested() -> None:
    # 0.9 - 0.8 and 0.8 - 0.7 differ by rounding alone, which is not a spread.
    found = paired([0.9 - 0.8, 0.8 - 0.7])
    assert math.isnan(found.p)
    assert not found.tie


def test_of_no_pair_nothing_is_known() -> None:
    found = paired([NAN])
    assert found.n == 0
    assert math.isnan(found.mean)
    assert not found.tie
    assert math.isnan(half_width([NAN, 0.1]))


def test_ties_are_told_by_the_paired_test() -> None:
    low = {0: 0.10, 1: 0.12, 2: 0.11}
    # Plus 0.01, 0.03 and -0.02: mean 0.0067, standard error 0.0145, p far above 0.05.
    near = {0: 0.11, 1: 0.15, 2: 0.09}
    # Plus 0.3 with hardly any spread: p far below.
    far = {0: 0.40, 1: 0.42, 2: 0.412}
    values = {0: low, 1: near, 2: far, 3: {0: NAN}}
    assert ties_with_best(values, higher_is_better=False) == (0, {0, 1})
    assert ties_with_best(values, higher_is_better=True) == (2, {2})
    assert ties_with_best({3: {0: NAN}}, higher_is_better=True) == (None, set())


def test_rows_of_other_seeds_do_not_tie() -> None:
    assert ties_with_best({0: {0: 0.1}, 1: {1: 0.1}}, higher_is_better=False) == (0, {0})


# Pairs ------------------------------------------------------------------------------------------


def test_groups_have_the_mean_difference_over_seeds() -> None:
    a, b = seeds("a", (0.5, 0.6, 0.7)), seeds("b", (0.4, 0.4, 0.1))
    (row,) = group_table(compare(a, b, ["asr"]), ["asr"]).to_dict("records")
    assert (row["attack"], row["poison_rate"], row["n"]) == ("badnets", 0.1, 3)
    assert (row["a"], row["b"]) == (pytest.approx(0.6), pytest.approx(0.3))
    # 0.1, 0.2, 0.6, as above
    assert row["difference"] == pytest.approx(0.3)
    assert row["difference_ci"] == pytest.approx(0.6572410, abs=1e-6)
    assert row["p"] == pytest.approx(0.188497, abs=1e-5)
    assert row["better"] == ""


def test_the_better_side_is_named_by_the_metric() -> None:
    # Minus 0.30, 0.31 and 0.32: a lower asr is better, a lower cacc is not.
    for metric, better in (("asr", "A"), ("cacc", "B")):
        a = seeds("a", (0.1, 0.1, 0.1), metric)
        b = seeds("b", (0.4, 0.41, 0.42), metric)
        assert group_table(compare(a, b, [metric]), [metric])["better"].tolist() == [better]


def test_equal_results_are_equal() -> None:
    a, b = seeds("a", (0.1, 0.2)), seeds("b", (0.1, 0.2))
    assert group_table(compare(a, b, ["asr"]), ["asr"])["better"].tolist() == ["="]


def test_undefined_values_leave_the_pair_out() -> None:
    a, b = seeds("a", (0.1, NAN, 0.3)), seeds("b", (0.2, 0.2, NAN))
    (row,) = group_table(compare(a, b, ["asr"]), ["asr"]).to_dict("records")
    assert (row["n"], row["a"], row["b"]) == (1, 0.1, 0.2)
    assert row["difference"] == pytest.approx(-0.1)
    assert math.isnan(row["difference_ci"])


def test_pairs_carry_keys_runs_and_every_digit() -> None:
    a, b = seeds("a", (0.123456789,)), seeds("b", (0.1,))
    (row,) = pair_table(compare(a, b, ["asr"]), ["asr"]).to_dict("records")
    assert (row["key_a"], row["key_b"]) == ("a0", "b0")
    assert (row["run_a"], row["run_b"]) == ("run-a0", "run-b0")
    assert (row["a"], row["difference"]) == (0.123456789, 0.123456789 - 0.1)


def test_what_each_side_has_one_value_of_is_what_is_compared() -> None:
    a = seeds("a", (0.1, 0.2), rule="contrast")
    b = seeds("b", (0.2, 0.2), rule="mad", threshold=3.0)
    found = compare(a, b, ["asr"])
    assert len(found.pairs) == 2
    assert "A and B differ in defense.rule: contrast and mad." in found.notes
    assert "A and B differ in defense.threshold: 4.5 and 3.0." in found.notes


def test_other_attacks_rates_and_seeds_are_never_the_same_cell() -> None:
    a = seeds("a", (0.1,))
    for where in ({"attack": "style"}, {"rate": 0.05}):
        with pytest.raises(UserError, match="no cell of A has a counterpart in B"):
            compare(a, seeds("b", (0.1,), **where), ["asr"])
    with pytest.raises(UserError, match="1 of 1 cells of B have no counterpart: no cell of A has "
                       "seed=7"):  # fmt: skip
        compare(a, [record("b", {}, seed=7)], ["asr"])


def test_what_has_no_counterpart_is_told_with_the_reason() -> None:
    a = [*seeds("a", (0.1, 0.2, 0.3)), *seeds("c", (0.1,), attack="style")]
    b = [*seeds("b", (0.1, 0.2)), *seeds("d", (0.5, 0.5), attack="addsent")]
    notes = compare(a, b, ["asr"]).notes
    assert "1 of 4 cells of A have no counterpart: no cell of B has seed=2." in notes
    assert "1 of 4 cells of A have no counterpart: no cell of B has attack.name=style." in notes
    assert "2 of 4 cells of B have no counterpart: no cell of A has attack.name=addsent." in notes


def test_settings_that_one_side_lacks_are_not_looked_at() -> None:
    a, b = seeds("a", (0.1, 0.2)), seeds("b", (0.2, 0.3))
    for one in a:
        one["config"]["train"] = {"schedule": "linear"}
    for one in (*a, *b):
        one["config"]["data"] = {"name": "sst2", "path": one["key"]}
        one["config"]["resources"] = {"cpu": one["key"]}
    assert len(compare(a, b, ["asr"]).pairs) == 2


def test_a_cell_may_have_several_counterparts() -> None:
    a = [c for t in (3.0, 4.5) for c in seeds(f"a{t}-", (t / 10, t / 10), threshold=t)]
    b = seeds("b", (0.1, 0.1))
    for one in b:
        one["config"]["defense"] = {"name": "none"}
    table = group_table(compare(a, b, ["asr"]), ["asr"])
    assert table["defense.threshold (A)"].tolist() == [3.0, 4.5]
    assert table["difference"].tolist() == pytest.approx([0.2, 0.35])


def bare(cells: list[Any], control: str | None = "no_defense") -> list[Any]:
    """Return the cells without a defense; control: what they were launched as."""
    for one in cells:
        one["config"]["defense"] = {"name": "none"}
        one["varied"] = {} if control is None else {"control": control, "defense.name": "none"}
    return cells


def test_controls_have_no_say_in_what_is_compared_and_pair_with_controls() -> None:
    a = [*seeds("a", (0.1, 0.2), rule="contrast"), *bare(seeds("c", (0.9, 0.9)))]
    b = [*seeds("b", (0.3, 0.5), rule="mad"), *bare(seeds("d", (0.9, 1.0)))]
    found = compare(a, b, ["asr"])
    assert found.notes[0] == "A and B differ in defense.rule: contrast and mad."
    assert [(row.key_a, row.key_b) for row in found.pairs.itertuples()] == [
        ("a0", "b0"), ("a1", "b1"), ("c0", "d0"), ("c1", "d1"),
    ]  # fmt: skip
    table = group_table(found, ["asr"])
    # Minus 0.2 and 0.3 of the defenses, 0 and 0.1 of the controls.
    assert table["control"].fillna("").tolist() == ["", "no_defense"]
    assert table["difference"].tolist() == pytest.approx([-0.25, -0.05])


def test_defenses_of_two_names_are_compared_beside_their_controls() -> None:
    a = [*seeds("a", (0.1, 0.2)), *bare(seeds("c", (0.9, 0.9)))]
    # There, the cells without a defense are cells of their own.
    b = [*seeds("b", (0.3, 0.5)), *bare(seeds("d", (0.9, 1.0)), control=None)]
    for one in b[:2]:
        one["config"]["defense"] = {"name": "rap"}
    found = compare(a, b, ["asr"])
    assert found.notes[0] == "A and B differ in defense.name: btu and rap."
    assert sorted(found.pairs["key_a"] + found.pairs["key_b"]) == ["a0b0", "a1b1", "c0d0", "c1d1"]
    # A control's counterpart is a control; without one a note reports it.
    notes = compare(a, b[:2], ["asr"]).notes
    assert "2 of 4 cells of A have no counterpart: no cell of B has control=no_defense." in notes
    # Controls alone are not defenses to compare with.
    assert list(compare(a[2:], b, ["asr"]).pairs["key_b"]) == ["d0", "d1"]


def test_unpoisoned_cells_pair_whatever_they_were_launched_as() -> None:
    a, b = seeds("a", (0.1, 0.2), rate=0.0), seeds("b", (0.1, 0.2), rate=0.0)
    for one in a:
        one["varied"] = {"control": "no_poison"}
    assert len(compare(a, b, ["asr"]).pairs) == 2
    # Those of a sweep that has no defense are what it compares.
    for one in bare(b, control=None):
        one["varied"] = {"control": "no_poison"}
    found = compare(a, b, ["asr"])
    assert (len(found.pairs), found.notes[0]) == (
        2,
        "A and B differ in defense.name: btu and none.",
    )


def test_a_setting_of_a_defense_without_a_counterpart_is_not_what_is_compared() -> None:
    a = [*seeds("a", (0.1,)), *seeds("c", (0.2,))]
    b = [*seeds("b", (0.1,)), *seeds("d", (0.2,))]
    a[1]["config"]["defense"] = {"name": "abl", "learning_rate": 1e-3}
    b[1]["config"]["defense"] = {"name": "nad", "learning_rate": 2e-5}
    found = compare(a, b, ["asr"])
    assert list(found.pairs["key_a"]) == ["a0"]
    assert not [note for note in found.notes if note.startswith("A and B differ")]


def test_several_on_both_sides_are_no_pairs_unless_told_apart() -> None:
    a = [c for t in (3.0, 4.5) for c in seeds(f"a{t}-", (0.1,), threshold=t)]
    b = [c for t in (2.0, 2.5) for c in seeds(f"b{t}-", (0.2,), threshold=t, attack="badnets")]
    with pytest.raises(UserError, match=r"no cell of B has defense\.threshold=3\.0"):
        compare(a, b, ["asr"])
    with pytest.raises(UserError, match="several of each side are equal in what both have"):
        compare(a, b, ["asr"], across=["defense.threshold"])
    # One of each: the thresholds are those of the sides.
    assert len(compare(a[:1], b, ["asr"], across=["defense.threshold"]).pairs) == 2


def test_results_of_several_versions_of_a_cell_are_no_further_pairs() -> None:
    # Seed 0 of B was computed again: it would count twice.
    a, b = seeds("a", (0.1, 0.2)), seeds("b", (0.2, 0.4))
    again = [record("b0-new", {"asr": 0.9}, {"recipe": "2"}, seed=0)]
    found = compare(a, [*b, *again], ["asr"])
    assert list(found.pairs["key_b"]) == ["b1"]
    assert (
        "2 of 3 cells of B have no counterpart: several of B are equal in all settings and differ "
        "in revisions; choose one with --revision-b."
    ) in found.notes
    assert (
        "1 of 2 cells of A have no counterpart: those of B differ in revisions alone."
    ) in found.notes
    with pytest.raises(UserError, match="choose one with --revision-b"):
        compare(a[:1], [*b[:1], *again], ["asr"])
    # A cell at another threshold is a different one, and stays.
    other = record("b0-3", {"asr": 0.5}, seed=0, threshold=3.0)
    found = compare(a, [*b, *again, other], ["asr"], across=["defense.threshold"])
    assert set(found.pairs["key_b"]) == {"b0-3", "b1"}


def test_groups_tell_how_many_seeds_bear_a_mark() -> None:
    a, b = seeds("a", (0.1, 0.2)), seeds("b", (0.2, 0.3))
    # An undefended ASR below 0.5 is a failed attack.
    a[0]["metrics"]["undefended_asr"] = 0.3
    table = group_table(compare(a, b, ["asr"]), ["asr"])
    assert table["marks"].tolist() == ["A attack failed 1/2"]
    cells = pair_table(compare(a, b, ["asr"]), ["asr"])
    assert cells["marks"].tolist() == ["A attack failed", ""]


def test_notes_say_what_to_mind() -> None:
    a = [record("same", {"asr": 0.1}, {"code": "0.1.0+abc", "device": "cpu"})]
    b = [record("same", {"asr": 0.1}, {"code": "0.1.0+def", "device": "H200"})]
    notes = " ".join(compare(a, b, ["asr"]).notes)
    assert "1 of 1 pairs are one and the same result" in notes
    assert "revision of code: A 0.1.0+abc; B 0.1.0+def." in notes
    assert "seconds were measured on different hardware: device differ" in notes
    assert "1 of 1 groups have a single seed" in notes


# Versions ---------------------------------------------------------------------------------------


def test_cells_of_one_sweep_are_told_apart_by_version() -> None:
    old = record("a", {}, {"code": "0.1.0+abcdef, 0.1.0+fedcba", "recipe": "1111"})
    new = record("b", {}, {"code": "0.1.0+012345", "recipe": "2222"})
    assert of_revision([old, new], "fed", "'x' (A)") == [old]
    assert of_revision([old, new], "0.1.0+0", "'x' (A)") == [new]
    assert of_revision([old, new], "2222", "'x' (A)") == [new]
    with pytest.raises(UserError, match=r"no cell of 'x' \(A\) is of revision '3333'.*known: "):
        of_revision([old, new], "3333", "'x' (A)")


def test_a_recomputed_cell_is_of_its_new_version_where_both_are_there() -> None:
    # The new one reused early stages that version A had computed.
    old = record("old", {"asr": 0.1}, {"code": "0.1.0+aaa", "recipe": "1"})
    new = record("new", {"asr": 0.3}, {"code": "0.1.0+aaa, 0.1.0+bbb", "recipe": "2"})
    # Only this cell is of version A.
    mixed = record("mixed", {"asr": 0.5}, {"code": "0.1.0+aaa, 0.1.0+bbb"}, seed=1)
    cells = [new, old, mixed]
    assert of_revision(cells, "aaa", "'x' (A)") == [old, mixed]
    assert of_revision(cells, "0.1.0+bbb", "'x' (B)") == [new, mixed]
    assert of_revision(cells, "2", "'x' (B)") == [new]
    a, b = (of_revision(cells[:2], name, "'x'") for name in ("aaa", "bbb"))
    (row,) = compare(a, b, ["asr"]).pairs.to_dict("records")
    assert (row["key_a"], row["key_b"]) == ("old", "new")


# Reading ----------------------------------------------------------------------------------------


def test_people_read_percent_points() -> None:
    a, b = seeds("a", (0.5, 0.6, 0.7)), seeds("b", (0.4, 0.4, 0.1))
    for number, one in enumerate((*a, *b)):
        one["metrics"]["seconds"] = 10.0 + number
    metrics = ["asr", "seconds", "ftr"]
    shown = readable_differences(group_table(compare(a, b, metrics), metrics))
    first, second, third = shown.to_dict("records")
    assert first["metric"] == "asr %"
    assert (first["A"], first["B"], first["A - B"]) == ("60.0", "30.0", "+30.0 ± 65.7")
    assert first["p"] == "0.188"
    # 10, 11, 12 against 13, 14, 15: always 3 s less, without spread.
    assert (second["metric"], second["A - B"], second["p"]) == ("seconds", "-3.0 ± 0.0", "-")
    assert (third["n"], third["A"], third["A - B"]) == (0, "-", "-")


def test_people_read_counts_as_they_are() -> None:
    a, b = seeds("a", (120.0, 122.0), "rows_flagged"), seeds("b", (100.0, 102.0), "rows_flagged")
    metrics = ["rows_flagged"]
    (row,) = readable_differences(group_table(compare(a, b, metrics), metrics)).to_dict("records")
    assert (row["metric"], row["A"], row["A - B"]) == ("rows_flagged", "121.0", "+20.0 ± 0.0")


@pytest.fixture
def shelves(tmp_path: Path) -> tuple[Path, Path]:
    """Two output folders: sweep ``a`` of seeds 0 to 2, and ``b`` with 0.1 more asr, without 2."""
    for name, more, count in (("a", 0.0, 3), ("b", 0.1, 2)):
        cells = [
            (config(seed=s), {"asr": 0.2 + more + s * s / 100, "cacc": 0.9}) for s in range(count)
        ]
        shelve(tmp_path / name, cells, name, tokens=50)
    return tmp_path / "a", tmp_path / "b"


def test_the_command_compares_two_outputs(
    shelves: tuple[Path, Path], run_cli: Callable[..., Ran]
) -> None:
    where = ("-o", shelves[0], "--output-b", shelves[1])
    done = run_cli("compare", "a", "b", *where, "--format", "json", "--metric", "asr")
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)
    assert row["n"] == 2
    assert row["difference"] == pytest.approx(-0.1)
    assert "1 of 3 cells of A have no counterpart: no cell of B has seed=2." in done.err
    cells = run_cli("compare", "a", "b", *where, "--cells", "--metric", "asr", "-f", "csv")
    assert cells.out.split()[0].startswith("attack,poison_rate,defense,seed,metric,a,b,difference")
    shown = run_cli("compare", "a", "b", *where)
    assert "-10.0 ± 0.0" in shown.out


def test_mistakes_are_told(shelves: tuple[Path, Path], run_cli: Callable[..., Ran]) -> None:
    where = ("-o", shelves[0])
    assert "compared with itself" in run_cli("compare", "a", "a", *where).err
    assert "unknown sweep" in run_cli("compare", "a", "c", *where).err
    both = (*where, "--output-b", shelves[1])
    done = run_cli("compare", "a", "b", *both, "--metric", "asrr")
    assert (done.code, "did you mean 'asr'?" in done.err) == (2, True)
    done = run_cli("compare", "a", "b", *both, "--across", "defense.treshold")
    assert "did you mean 'defense.threshold'?" in done.err
