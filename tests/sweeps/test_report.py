"""Records -> tables, checked by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from store_fixtures import Stored, publish_cell

from btu.errors import UserError
from orchestrator.report.table import mean_over_seeds, render, results_table

if TYPE_CHECKING:
    from orchestrator.plan.planner import Planner

NAN = float("nan")
# The columns that every table has, in their order.
COLUMNS = [
    "attack", "poison_rate", "defense", "alpha", "seed", "asr", "cacc", "ftr",
    "detection_precision", "detection_recall", "flagged", "undefended_asr", "undefended_cacc",
    "tuned_asr", "tuned_cacc", "seconds", "marks",
]  # fmt: skip
METRICS = COLUMNS[5:-1]


def record(
    attack: str = "badnets",
    rate: float = 0.1,
    alpha: Any = 0.0005,
    seed: int = 0,
    varied: tuple[str, ...] = (),
    train: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    **metrics: float,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "attack": {"name": attack, "poison_rate": rate, **(params or {})},
        "defense": {"name": "btu", "alpha": alpha},
        "train": train or {"epochs": 3},
        "seed": seed,
    }
    coordinates = {}
    for dotted in varied:
        section, _, name = dotted.partition(".")
        coordinates[dotted] = config[section].get(name) if name else config[section]
    return {"varied": coordinates, "config": config, "metrics": {**dict.fromkeys(METRICS, 0.5),
            **metrics}}  # fmt: skip


# The table -------------------------------------------------------------------------------------


def test_columns_stand_in_the_documented_order() -> None:
    assert list(results_table([record()]).columns) == COLUMNS


def test_a_varied_key_gets_a_column() -> None:
    rows = [record(varied=("train.epochs", "seed"), train={"epochs": n}) for n in (3, 1)]
    table = results_table(rows)
    assert list(table.columns)[:6] == [
        "attack", "poison_rate", "defense", "alpha", "train.epochs", "seed",
    ]  # fmt: skip
    assert table["train.epochs"].tolist() == [1, 3]


def of_defense(name: str, rate: float, **metrics: float) -> dict[str, Any]:
    made = record(**metrics)
    made["config"]["defense"] = {"name": name, "learning_rate": rate}
    return made


def test_a_table_of_several_defenses_shows_what_each_kind_measures() -> None:
    rows = [
        of_defense("abl", 1e-3, sample_precision=0.9, seconds_defense=70.0),
        of_defense("strip", 1e-5, frr=0.05, far=0.5, seconds_defense=7.0),
    ]
    table = results_table(rows)
    # Each has a learning rate of its own, so that the name alone identifies it.
    own = ["sample_precision", "frr", "far", "seconds_defense"]
    assert list(table.columns) == [*COLUMNS[:-1], *own, "marks"]
    assert table["frr"].isna().tolist() == [True, False]
    assert "70.0" in render(table, "markdown")
    assert "5.0" in render(table, "markdown")
    # The control without a defense is not a second one.
    assert list(results_table([rows[0], of_defense("none", 0.0)]).columns) == COLUMNS


def test_what_a_sweep_asks_for_is_shown_whatever_is_compared() -> None:
    own = {
        "perplexity_rise": 480.25,
        "edit_distance": 0.0625,
        "embedding_similarity": 0.875,
        "label_flips": 1.0,
    }
    asked = record(rate=0.2, **own)
    asked["config"]["stealth"] = True
    control = record(rate=0.0)
    table = results_table([asked, control])
    # Neither has the control a value, nor does it differ from the cell in the key: it acts where
    # something is poisoned.
    assert list(table.columns) == [*COLUMNS[:-1], *own, "marks"]
    assert table["perplexity_rise"].isna().tolist() == [True, False]
    shown = render(table, "markdown")
    # Perplexities as they are, all else in percent. Formats 0.0625 -> 6.2 (half to even).
    for text in ("480.2", "6.2", "87.5", "100.0", "embedding_similarity %"):
        assert text in shown.replace("\\", "")
    assert "perplexity_rise %" not in shown.replace("\\", "")


def test_a_cell_from_before_stealth_was_asked_for_does_not_look_like_one_after() -> None:
    before, after = record(), record(label_flips=1.0)
    after["config"]["stealth"] = True
    table = results_table([before, after])
    assert table["stealth"].tolist() == [False, True]
    # Where every cell is alike there is no such column.
    assert "stealth" not in results_table([before])
    assert "stealth" not in results_table([after])


def test_one_defense_with_two_settings_shows_them() -> None:
    table = results_table([of_defense("abl", rate) for rate in (1e-3, 1e-5)])
    assert table["defense.learning_rate"].tolist() == [1e-5, 1e-3]


def test_fixed_columns_are_not_doubled_when_they_vary() -> None:
    varied = ("attack.name", "attack.poison_rate", "defense.name", "defense.alpha", "seed")
    assert list(results_table([record(varied=varied)]).columns) == COLUMNS


def test_a_cell_from_before_the_grid_grew_has_its_value_too() -> None:
    before = record(train={"epochs": 3})
    after = record(varied=("train.epochs",), train={"epochs": 5})
    assert results_table([before, after])["train.epochs"].tolist() == [3, 5]


def test_rows_of_one_sweep_that_differ_are_told_apart() -> None:
    # The same sweep launched with train.epochs=1, then 3: neither file varies the key, but two
    # rows with equal coordinates and other results would not inform the reader.
    table = results_table([record(train={"epochs": 1}), record(train={"epochs": 3})])
    assert table["train.epochs"].tolist() == [1, 3]


def test_seeds_of_cells_that_differ_are_not_averaged() -> None:
    rows = [record(seed=s, train={"epochs": e}, asr=e / 10) for s in (0, 1) for e in (1, 3)]
    assert mean_over_seeds(results_table(rows))["asr"].tolist() == pytest.approx([0.1, 0.3])


def test_numbers_sort_as_numbers() -> None:
    rates = [0.1, 0.05, 1e-05, 0.01]
    seeds = [10, 9, 2]
    rows = [record(rate=r, seed=s) for r in rates for s in seeds]
    table = results_table(rows)
    assert table.poison_rate.unique().tolist() == [1e-05, 0.01, 0.05, 0.1]
    assert table.seed.tolist()[:3] == [2, 9, 10]


def test_numbers_sort_as_numbers_beside_lists() -> None:
    # As text, 1e-05 would sort after 0.002.
    rows = [record(alpha=a) for a in (0.002, 1e-05, [0.1, 0.2, 0.3], 0.0005)]
    assert results_table(rows).alpha.tolist() == [1e-05, 0.0005, 0.002, "0.1 0.2 0.3"]


def test_attacks_sort_by_name() -> None:
    rows = [record(attack=a) for a in ("style", "badnets", "addsent")]
    assert results_table(rows).attack.tolist() == ["addsent", "badnets", "style"]


def test_a_metric_that_a_defense_does_not_have_is_nan() -> None:
    row = record()
    del row["metrics"]["flagged"]
    assert math.isnan(results_table([row])["flagged"][0])


def test_no_records_give_an_empty_table() -> None:
    table = results_table([])
    assert table.empty
    assert list(table.columns) == COLUMNS


# Mean over seeds -------------------------------------------------------------------------------


def test_mean_and_t_interval_are_as_derived_by_hand() -> None:
    # asr 0.1, 0.2, 0.6: mean 0.3; squared deviations 0.04 + 0.01 + 0.09 = 0.14, / (3 - 1) = 0.07;
    # standard error sqrt(0.07 / 3) = 0.1527525; t(0.975, 2 degrees) = 4.3026527;
    # half width 4.3026527 * 0.1527525 = 0.6572410
    rows = [record(seed=s, asr=v) for s, v in enumerate((0.1, 0.2, 0.6))]
    (row,) = mean_over_seeds(results_table(rows)).to_dict("records")
    assert row["seeds"] == 3
    assert row["asr"] == pytest.approx(0.3)
    assert row["asr_ci"] == pytest.approx(0.6572410, abs=1e-6)
    assert row["cacc_ci"] == pytest.approx(0.0)  # 0.5 at every seed
    assert "seed" not in row


def test_two_seeds_have_the_wide_interval_of_one_degree_of_freedom() -> None:
    # 0.4 and 0.6: standard error |0.6 - 0.4| / 2 = 0.1; t(0.975, 1) = 12.7062047
    rows = [record(seed=s, asr=v) for s, v in enumerate((0.4, 0.6))]
    (row,) = mean_over_seeds(results_table(rows)).to_dict("records")
    assert row["asr_ci"] == pytest.approx(1.27062047)


def test_one_seed_has_no_interval() -> None:
    (row,) = mean_over_seeds(results_table([record(asr=0.25)])).to_dict("records")
    assert (row["seeds"], row["asr"]) == (1, 0.25)
    assert math.isnan(row["asr_ci"])


def test_seeds_without_the_metric_are_left_out_of_its_mean() -> None:
    # Precision undefined at seed 1: the mean of 0.2 and 0.4.
    rows = [record(seed=s, detection_precision=v) for s, v in enumerate((0.2, NAN, 0.4))]
    (row,) = mean_over_seeds(results_table(rows)).to_dict("records")
    assert row["detection_precision"] == pytest.approx(0.3)
    # 2 values: standard error 0.1, times t(0.975, 1)
    assert row["detection_precision_ci"] == pytest.approx(1.27062047)


def test_a_metric_that_is_never_defined_stays_nan() -> None:
    rows = [record(seed=s, detection_precision=NAN) for s in range(2)]
    (row,) = mean_over_seeds(results_table(rows)).to_dict("records")
    assert math.isnan(row["detection_precision"])
    assert math.isnan(row["detection_precision_ci"])


def test_groups_stay_apart_and_in_order() -> None:
    rows = [
        record(attack=a, rate=r, seed=s, asr=r + s / 10 + (a == "style"))
        for a in ("style", "badnets")
        for r in (0.1, 0.01)
        for s in (0, 1)
    ]
    means = mean_over_seeds(results_table(rows))
    # The mean over seeds 0 and 1 adds 0.05.
    assert means[["attack", "poison_rate"]].to_numpy().tolist() == [
        ["badnets", 0.01], ["badnets", 0.1], ["style", 0.01], ["style", 0.1],
    ]  # fmt: skip
    assert means.asr.tolist() == pytest.approx([0.06, 0.15, 1.06, 1.15])


def test_a_key_that_only_some_attacks_have_still_groups() -> None:
    rows = [
        record(attack="badnets", varied=("attack.trigger",), params={"trigger": ["cf"]}, seed=0),
        record(attack="badnets", varied=("attack.trigger",), params={"trigger": ["cf"]}, seed=1),
        record(attack="style", varied=("attack.trigger",), seed=0),
    ]
    means = mean_over_seeds(results_table(rows))
    assert means.seeds.tolist() == [2, 1]
    assert means["attack.trigger"].tolist()[0] == "cf"


# Controls and marks ----------------------------------------------------------------------------


def controlled(control: str, **what: Any) -> dict[str, Any]:
    made = record(varied=("attack.poison_rate", "seed"), **what)
    if control:
        made["varied"]["control"] = control
    if control == "no_defense":
        made["varied"]["defense.name"] = "none"
        made["config"]["defense"] = {"name": "none"}
    return made


def test_controls_are_told_in_a_column_of_their_own() -> None:
    rows = [
        controlled("", asr=0.1),
        controlled("no_defense", asr=1.0),
        controlled("no_poison", rate=0.0, asr=0.2),
    ]
    table = results_table(rows)
    assert list(table.columns)[:6] == [
        "attack", "poison_rate", "defense", "alpha", "control", "seed",
    ]  # fmt: skip
    found = dict(zip(table["control"].fillna("-"), table["asr"], strict=True))
    assert found == {"-": 0.1, "no_defense": 1.0, "no_poison": 0.2}
    header, *shown = markdown_rows(render(table, "markdown"))
    assert {row[header.index("control")] for row in shown} == {"-", "no_defense", "no_poison"}
    # Where there are none there is no column.
    assert "control" not in results_table(rows[:1])


def test_controls_are_not_averaged_with_other_cells() -> None:
    # A cell of the grid that has what makes another one a control, at another seed.
    rows = [
        controlled("", rate=0.0, seed=0, asr=0.1),
        controlled("no_poison", rate=0.0, seed=1, asr=0.3),
        controlled("no_poison", rate=0.0, seed=2, asr=0.5),
    ]
    means = mean_over_seeds(results_table(rows))
    assert means["seeds"].tolist() == [1, 2]
    assert means["asr"].tolist() == pytest.approx([0.1, 0.4])
    assert means["control"].tolist()[1] == "no_poison"


def test_marks_stand_beside_the_numbers() -> None:
    # cacc 0.4 is 0.1 below the tuned 0.5.
    rows = [record(seed=0), record(seed=1, undefended_asr=0.1, cacc=0.4)]
    table = results_table(rows)
    assert table["marks"].tolist() == ["", "attack failed; cacc collapse"]
    for style in ("markdown", "table", "latex"):
        first, second = (
            next(line for line in render(table[i : i + 1], style).splitlines() if "badnets" in line)
            for i in range(2)
        )
        assert "attack failed; cacc collapse" in second
        assert first.rstrip(r" \|│").endswith("-")
    found = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert [row["marks"] for row in found] == ["", "attack failed; cacc collapse"]
    assert json.loads(render(table, "json"))[0]["marks"] == ""


def test_a_mean_says_how_many_of_its_seeds_are_marked() -> None:
    rows = [
        record(seed=0, undefended_asr=0.1),
        record(seed=1, undefended_asr=0.2, cacc=0.4),
        record(seed=2),
        *(record("style", seed=seed) for seed in (0, 1)),
        record("addsent", seed=0, cacc=0.1),
    ]
    means = mean_over_seeds(results_table(rows))
    assert dict(zip(means["attack"], means["marks"], strict=True)) == {
        "addsent": "cacc collapse 1/1",
        "badnets": "attack failed 2/3; cacc collapse 1/3",
        "style": "",
    }
    # A mark does not split its group.
    assert means["seeds"].tolist() == [1, 3, 2]
    assert "attack failed 2/3; cacc collapse 1/3" in render(means, "markdown")


def test_a_record_without_metrics_is_a_row_of_dashes() -> None:
    made = record()
    del made["metrics"]
    (row,) = results_table([made]).to_dict("records")
    assert math.isnan(row["asr"])
    assert row["marks"] == ""


# Rendering -------------------------------------------------------------------------------------


@pytest.fixture
def table() -> pd.DataFrame:
    return results_table(
        [
            record(asr=1 / 3, flagged=15, seconds=12.345, detection_precision=NAN),
            record(attack="style", rate=0.01, asr=1e-7, cacc=0.9, flagged=NAN),
        ]
    )


def test_csv_keeps_fractions_and_every_digit(table: pd.DataFrame) -> None:
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert list(rows[0]) == COLUMNS
    assert float(rows[0]["asr"]) == 1 / 3
    assert float(rows[1]["asr"]) == 1e-7
    assert rows[0]["detection_precision"] == ""


def test_json_keeps_fractions_and_every_digit(table: pd.DataFrame) -> None:
    rows = json.loads(render(table, "json"))
    assert list(rows[0]) == COLUMNS
    assert rows[0]["asr"] == 1 / 3
    assert rows[1]["asr"] == 1e-7
    assert rows[0]["detection_precision"] is None
    assert (rows[0]["attack"], rows[1]["poison_rate"]) == ("badnets", 0.01)


def test_json_keeps_seconds_to_the_last_digit() -> None:
    table = results_table([record(seconds=12.345678901234567, asr=1 / 7)])
    (row,) = json.loads(render(table, "json"))
    assert (row["seconds"], row["asr"]) == (12.345678901234567, 1 / 7)


def markdown_rows(text: str) -> list[list[str]]:
    lines = text.splitlines()
    assert re.fullmatch(r"\|[:\-| ]+\|", lines[1])
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in [lines[0], *lines[2:]]
    ]


def test_markdown_is_a_table_in_percent(table: pd.DataFrame) -> None:
    header, first, second = markdown_rows(render(table, "markdown"))
    assert len(header) == len(first) == len(second) == len(COLUMNS)
    row = dict(zip(header, first, strict=True))
    assert row["asr %"] == "33.3"
    assert row["detection_precision %"] == "-"  # undefined, not 0
    assert (row["flagged"], row["seconds"]) == ("15", "12.3")  # neither is a fraction
    assert (row["poison_rate"], row["alpha"], row["seed"]) == ("0.1", "0.0005", "0")
    other = dict(zip(header, second, strict=True))
    assert (other["cacc %"], other["asr %"], other["flagged"]) == ("90.0", "0.0", "-")


def test_latex_is_a_table_in_percent(table: pd.DataFrame) -> None:
    text = render(table, "latex")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3  # header and two cells
    # As many cells in every row as the preamble has columns.
    (preamble,) = re.findall(r"\\begin\{tabular\}\{([lrc]+)\}", text)
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(preamble)} == {len(COLUMNS)}
    assert r"poison\_rate" in rows[0]
    assert r"asr \%" in rows[0]
    # An unescaped % would comment out the rest of the row.
    assert not re.search(r"(?<!\\)%", text)
    assert "33.3" in rows[1]


def test_the_terminal_table_holds_every_row_on_one_line(table: pd.DataFrame) -> None:
    lines = render(table, "table").splitlines()
    (first,) = [line for line in lines if "badnets" in line]
    (second,) = [line for line in lines if "style" in line]
    assert "33.3" in first
    assert " - " in first
    assert "0.01" in second
    assert all(line == line.rstrip() for line in lines)


def test_a_wide_terminal_table_is_not_cut_short(table: pd.DataFrame) -> None:
    wide = table.assign(note="x" * 300)
    assert "x" * 300 in render(wide, "table")


@pytest.mark.parametrize("style", ["table", "markdown", "latex"])
def test_intervals_stand_beside_their_means(style: str) -> None:
    rows = [record(seed=s, asr=v, flagged=n) for s, v, n in [(0, 0.4, 15), (1, 0.6, 16)]]
    text = render(mean_over_seeds(results_table(rows)), style)
    assert "50.0 ± 127.1" in text  # 100 * 0.5, 100 * 1.27062 (see above)
    assert "15.5 ± 6.4" in text  # 0.5 * 12.7062
    assert "_ci" not in text


def test_a_single_seed_shows_a_mean_without_an_interval() -> None:
    text = render(mean_over_seeds(results_table([record(asr=0.25)])), "markdown")
    assert "25.0" in text
    assert "±" not in text


def test_csv_of_means_has_the_interval_as_columns() -> None:
    rows = [record(seed=s, asr=v) for s, v in [(0, 0.4), (1, 0.6)]]
    (row,) = csv.DictReader(io.StringIO(render(mean_over_seeds(results_table(rows)), "csv")))
    assert float(row["asr_ci"]) == pytest.approx(1.27062047)
    assert row["seeds"] == "2"


@pytest.mark.parametrize("style", ["table", "markdown", "latex"])
def test_a_key_that_a_cell_does_not_have_shows_a_dash(style: str) -> None:
    rows = [
        record(varied=("attack.trigger",), params={"trigger": ["cf", "mn"]}),
        record(attack="style", varied=("attack.trigger",)),
    ]
    text = render(results_table(rows), style)
    assert "cf mn" in text
    assert "None" not in text
    assert "nan" not in text


def test_a_setting_that_maps_names_to_values_is_a_text() -> None:
    rows = [
        record(varied=("attack.position",), params={"position": position}, seed=seed)
        for position in ("start", {"slot": 3})
        for seed in (0, 1)
    ]
    for table in (results_table(rows), mean_over_seeds(results_table(rows))):
        text = render(table, "markdown")
        assert "slot 3" in text
        assert "start" in text
        assert "{" not in text


def test_an_unknown_format_names_the_known_ones(table: pd.DataFrame) -> None:
    with pytest.raises(
        UserError, match=r"unknown format 'markdwn'; did you mean 'markdown'\? \(known: csv, json"
    ):
        render(table, "markdwn")


def test_keys_that_only_some_attacks_have_tell_their_rows_apart() -> None:
    rows = [
        record("badnets"),
        record("style", params={"model": "a"}, asr=0.2),
        record("style", params={"model": "b"}, asr=0.4),
    ]
    table = results_table(rows)
    assert table["attack.model"].dropna().tolist() == ["a", "b"]
    # three groups of one seed each (badnets has 0.5), not two with style's averaged to 0.3
    assert mean_over_seeds(table)["asr"].tolist() == [0.5, 0.2, 0.4]


def test_rows_of_other_data_under_one_name_are_told_apart() -> None:
    one, other = record(), record()
    one["tags"], other["tags"] = {"data": "1a"}, {"data": "2b"}
    assert results_table([one, other])["revision.data"].tolist() == ["1a", "2b"]


def test_equal_settings_computed_by_other_versions_of_a_stage_are_told_apart() -> None:
    one, other = record(), record()
    one["tags"], other["tags"] = {"recipe": "1a"}, {"recipe": "2b"}
    assert results_table([one, other])["revision.recipe"].tolist() == ["1a", "2b"]
    # Other settings have other stages: their own columns distinguish them already.
    style = record("style")
    style["tags"] = {"recipe": "3c"}
    assert "revision.recipe" not in results_table([one, style])


# From a store ----------------------------------------------------------------------------------


def test_the_results_of_a_sweep_are_a_table(stored: Stored) -> None:
    (row,) = results_table(stored.results.records()).to_dict("records")
    metrics = stored.record["metrics"]
    assert (row["attack"], row["defense"], row["seed"]) == ("badnets", "btu", 0)
    assert (row["poison_rate"], row["alpha"]) == (0.2, 0.01)
    for name in METRICS:
        assert row[name] == metrics[name]


def test_cells_of_two_launches_are_rows_of_one_table(
    stored: Stored, make_sweep: Callable[..., Path], planner: Planner
) -> None:
    from orchestrator.plan.planner import plan_sweep
    from orchestrator.sweep.load import load_sweep

    # Launched again under the same name, with other epochs: no file varies the key.
    sweep = load_sweep(make_sweep(train={"epochs": 3}))
    plan = plan_sweep(sweep, planner)
    stored.results.write_plan(sweep, plan.cells.values())
    (cell,) = plan.cells.values()
    publish_cell(
        stored.store, cell.key, stored.folder, {**stored.record, "config": cell.spec.config()}
    )
    table = results_table(stored.results.records())
    assert table["train.epochs"].tolist() == [2, 3]
    # They are not averaged: one seed each.
    assert mean_over_seeds(table)["seeds"].tolist() == [1, 1]


def test_seeds_in_the_store_are_averaged(stored: Stored) -> None:
    other = next(cell for cell in stored.plan.cells.values() if cell.key != stored.key)
    metrics = {**stored.record["metrics"], "asr": stored.record["metrics"]["asr"] - 0.5}
    result = {**stored.record, "config": other.spec.config(), "metrics": metrics}
    publish_cell(stored.store, other.key, stored.folder, result)
    (row,) = mean_over_seeds(results_table(stored.results.records())).to_dict("records")
    assert row["seeds"] == 2
    # x and x - 0.5: a mean of x - 0.25; standard error 0.5 / 2, times t(0.975, 1) = 12.7062047
    assert row["asr"] == pytest.approx(stored.record["metrics"]["asr"] - 0.25)
    assert row["asr_ci"] == pytest.approx(0.25 * 12.7062047)
