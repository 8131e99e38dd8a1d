"""The page and the figures of a sweep as files; `browser/test_page.py` opens the page."""

from __future__ import annotations

import base64
import copy
import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from formula_sweep import drifts, measured, settings, shelve_sweep
from parsed_page import Read

from btu.drawing import draw
from btu.errors import UserError
from btu.panels import Series
from btu.paths import check_folder
from orchestrator.cli.shared import open_source
from orchestrator.report import charts as charts_module
from orchestrator.report import figures as figures_module
from orchestrator.report.charts import BULK, Chart, charts, front, stage_seconds
from orchestrator.report.figures import write_figures
from orchestrator.report.html import check_page, figure, page, write_page
from orchestrator.report.table import METRIC_COLUMNS
from orchestrator.results.source import Source

CHARTS = ["curves", "heatmaps", "pareto", "drift", "cost"]


class Given:
    """A source with the records that a test gives it."""

    name = "given"

    def __init__(
        self, records: list[dict[str, Any]], failures: list[dict[str, Any]] | None = None
    ) -> None:
        self._records, self._failures = records, failures or []

    def records(self) -> list[dict[str, Any]]:
        return copy.deepcopy(self._records)

    def failures(self) -> list[dict[str, Any]]:
        return self._failures

    def tokens(self, key: str) -> pd.DataFrame | None:
        return None

    def rows(self, key: str) -> pd.DataFrame | None:
        return None


def records_of(*cells: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return a record per cell: attack, rate, seed, rule, threshold, and its own metrics."""
    made = []
    for number, (attack, rate, seed, rule, threshold, *own) in enumerate(cells):
        config = settings(attack, rate, seed, rule, threshold)
        metrics = measured(config) | (own[0] if own else {})
        made.append({"key": f"{number:04x}", "config": config, "varied": {}, "metrics": metrics,
                     "notes": {}, "tags": {}, "run_id": ""})  # fmt: skip
    return made


def chart(name: str, records: list[dict[str, Any]], tokens: Any = lambda key: None) -> Chart:
    (found,) = [made for made in charts(records, tokens) if made.name == name]
    return found


def series(panel: Any, label: str) -> Series:
    (found,) = [made for made in panel.series if made.label == label]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Two attacks, two rates, three thresholds and no defense, two seeds: 32 cells."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    shelve_sweep(runs)
    return open_source("likely", str(runs))


@pytest.fixture(scope="module")
def read(source: Source) -> Read:
    return Read(page(source))


# The page --------------------------------------------------------------------------------------


def test_every_cell_is_in_the_table_with_all_its_digits(source: Source, read: Read) -> None:
    records = source.records()
    assert len(records) == 32
    assert set(read.rows) == {record["key"] for record in records}
    for record in records:
        for name in METRIC_COLUMNS:
            shown, value = read.value(record["key"], name), record["metrics"].get(name, math.nan)
            # repr writes a float with all its digits.
            assert (float(shown) if shown else math.nan) == pytest.approx(value, abs=0, nan_ok=True)


def test_a_page_fetches_nothing(read: Read) -> None:
    assert [link for link in read.links if not link.startswith(("#", "data:,"))] == []
    assert read.policy.startswith("default-src 'none'")
    assert "connect-src" not in read.policy


def test_the_page_has_every_chart_and_a_figure_for_every_panel(read: Read) -> None:
    figures = read.figures
    assert list(figures) == CHARTS
    assert read.panels == [(name, i) for name in CHARTS for i in range(len(figures[name]))]
    # 2 attacks x 2 rates; ASR and CACC undefended and at 3 thresholds; one panel of bars.
    assert [len(figures[name]) for name in CHARTS] == [4, 8, 4, 4, 1]


def test_a_chart_says_where_its_numbers_are(read: Read) -> None:
    labels = read.labels
    here = [name for name, text in labels.items() if text.endswith("the table has its numbers")]
    assert here == ["curves", "heatmaps", "pareto"]
    assert labels["drift"].endswith("the token table among the cell's results has its numbers")
    assert labels["cost"].endswith("as seconds/STAGE")


def test_plotly_knows_every_property_of_the_figures(read: Read) -> None:
    import plotly.graph_objects as go

    for several in read.figures.values():
        for made in several:
            go.Figure(made)  # raises ValueError for a property that plotly does not have


def test_the_same_results_are_the_same_page(source: Source) -> None:
    assert page(source) == page(source)


def test_a_page_names_its_sweep_its_versions_and_how_to_make_it(read: Read) -> None:
    words = " ".join(read.words.split())
    assert "32 finished cells" in words
    assert "2 seeds" in words
    assert "0.1.0+0123456789ab" in words
    assert "btu launch SWEEP.yaml btu report likely --html likely.html" in words


def test_marks_are_listed_with_the_numbers_of_their_cells(read: Read) -> None:
    words = " ".join(read.words.split())
    # At rate 0.01 the made attacks reach 1 - exp(-0.6) = 0.45.
    assert re.search(r"16 cells: attack failed \(undefended ASR under 0\.5", words)
    assert re.search(r"attack failed: undefended ASR 0\.4\d\d is under 0\.5", words)


def test_names_are_text_and_no_markup() -> None:
    (record,) = records_of(("badnets", 0.1, 0, "contrast", 4.5))
    record["config"]["attack"]["name"] = "</script><script>alert(1)</script>"
    record["tags"] = {"code": "<img src=http://x>"}
    text = page(Given([record]))
    assert "<script>alert" not in text
    assert "<img" not in text
    read = Read(text)
    assert "</script><script>alert(1)" in read.words
    (bar,) = [y for trace in read.figures["cost"][0]["data"][:1] for y in trace["y"]]
    assert bar.startswith("&lt;/script&gt;")  # plotly interprets some HTML


def test_failed_cells_are_counted_by_reason() -> None:
    failed = [{"reason": "loss became nan\nepoch 2"}] * 2 + [{"reason": "out of memory"}]
    records = records_of(("badnets", 0.1, 0, "contrast", 4.5))
    words = " ".join(Read(page(Given(records, failed))).words.split())
    assert "3 failed" in words
    assert "2: loss became nan 1: out of memory" in words


def test_run_ids_are_shown_if_any_cell_has_one() -> None:
    records = records_of(("badnets", 0.1, 0, "contrast", 4.5), ("badnets", 0.1, 1, "contrast", 4.5))
    assert "run_id" not in Read(page(Given(records))).heads
    records[0]["run_id"] = "abc"
    read = Read(page(Given(records)))
    assert [read.value(key, "run_id") for key in ("0000", "0001")] == ["abc", ""]


def test_the_page_of_a_running_sweep_is_read_again(source: Source) -> None:
    assert 'http-equiv="refresh"' not in page(source)
    again = page(source, 30)
    assert '<meta http-equiv="refresh" content="30">' in again
    assert "the sweep runs; this page is read again every 30 s" in again


def test_without_a_finished_cell_there_is_no_page() -> None:
    with pytest.raises(UserError, match="sweep 'given' has no finished cell yet; launch it first"):
        page(Given([]))


# What is drawn ---------------------------------------------------------------------------------


def test_a_curve_of_one_seed_has_exactly_the_numbers_of_its_records() -> None:
    records = records_of(*(("badnets", 0.1, 0, "contrast", bar) for bar in (9.0, 2.0, 4.5)))
    (panel,) = chart("curves", records).panels
    assert panel.title == "badnets, rate 0.1"
    asr = series(panel, "ASR")
    assert asr.x == [2.0, 4.5, 9.0]
    assert asr.y == [records[i]["metrics"]["asr"] for i in (1, 2, 0)]
    precision = series(panel, "token precision")
    assert precision.y == [records[i]["metrics"]["detection_precision"] for i in (1, 2, 0)]


def test_a_band_reaches_from_the_lowest_seed_to_the_highest() -> None:
    # ASR 0.1, 0.2 and 0.6 at both thresholds: mean 0.3.
    records = records_of(*(("badnets", 0.1, seed, "contrast", bar, {"asr": asr})
                           for seed, asr in enumerate((0.2, 0.6, 0.1))
                           for bar in (2.0, 4.5)))  # fmt: skip
    (panel,) = chart("curves", records).panels
    asr = series(panel, "ASR")
    assert asr.y == pytest.approx([0.3, 0.3])
    assert (asr.low, asr.high) == ([0.1, 0.1], [0.6, 0.6])
    bands = [trace for trace in figure(panel)["data"] if trace.get("fill") == "toself"]
    (band,) = [trace for trace in bands if trace["name"] == "ASR"]
    assert band["x"] == [2.0, 4.5, 4.5, 2.0]
    assert band["y"] == [0.6, 0.6, 0.1, 0.1]


def test_without_fixed_trigger_tokens_the_rows_are_counted() -> None:
    records = records_of(*(("style", 0.1, 0, "contrast", bar) for bar in (2.0, 4.5)))
    (panel,) = chart("curves", records).panels
    labels = [made.label for made in panel.series]
    assert "row precision" in labels
    assert "token precision" not in labels


def test_each_rule_has_its_own_panel() -> None:
    records = records_of(*(("badnets", 0.1, 0, rule, bar) for rule in ("contrast", "mad")
                           for bar in (2.0, 4.5)))  # fmt: skip
    titles = [panel.title for panel in chart("curves", records).panels]
    assert titles == ["badnets, rate 0.1, btu contrast", "badnets, rate 0.1, btu mad"]


def test_settings_that_differ_are_not_averaged() -> None:
    records = records_of(*(("badnets", 0.1, 0, "contrast", bar) for bar in (2.0, 4.5)) , *(
        ("badnets", 0.1, 0, "contrast", bar) for bar in (2.0, 4.5)))  # fmt: skip
    for record in records[2:]:
        record["config"]["train"]["epochs"] = 1
    titles = [panel.title for panel in chart("curves", records).panels]
    assert titles == [
        "badnets train.epochs 1, rate 0.1",
        "badnets train.epochs 3, rate 0.1",
    ]


def test_versions_of_a_stage_distinguish_defenses_and_not_places() -> None:
    # btu at 4.5 has two versions at rate 0.1. Recipes also differ by defense and at rate 0.
    records = records_of(
        *(("badnets", 0.1, 0, "contrast", bar) for bar in (2.0, 4.5, 4.5)),
        ("badnets", 0.1, 0, None, None),
        ("badnets", 0.0, 0, "contrast", 4.5),
    )
    records[3]["config"]["defense"] = {"name": "onion", "bar": 0.5}
    for record, recipe in zip(records, ("1a", "1a", "2b", "3c", "4d"), strict=True):
        record["tags"] = {"recipe": recipe}
    (panel,) = chart("pareto", records).panels
    assert panel.title == "badnets, rate 0.1"
    assert [made.label for made in panel.series if made.marker and made.tip][2:] == [
        "btu revision.recipe 1a", "btu revision.recipe 2b", "onion",
    ]  # fmt: skip
    maps = [panel for panel in chart("heatmaps", records).panels if panel.title.startswith("ASR")]
    assert [panel.title for panel in maps] == [
        "ASR, undefended",
        "ASR, btu threshold 4.5",
        "ASR, btu revision.recipe 1a threshold 2",
        "ASR, btu revision.recipe 1a threshold 4.5",
        "ASR, btu revision.recipe 2b threshold 4.5",
        "ASR, onion",
    ]
    assert all(panel.heat is not None and panel.heat.rows == ["badnets"] for panel in maps)


def test_a_chart_without_data_has_a_note() -> None:
    made = charts(records_of(("badnets", 0.1, 0, None, None)), lambda key: None)
    notes = {one.name: " ".join(one.notes) for one in made if not one.panels}
    assert set(notes) == {"curves", "heatmaps", "drift"}
    assert "1 cells of no known detection rule have no threshold" in notes["curves"]
    assert "All cells have one attack and one rate" in notes["heatmaps"]
    assert "No defense here measures a drift" in notes["drift"]


def test_other_defenses_are_drawn_in_the_charts_that_they_have_numbers_for() -> None:
    records = records_of(("badnets", 0.1, 0, "contrast", 4.5), ("badnets", 0.1, 0, None, None),
                         ("badnets", 0.05, 0, None, None))  # fmt: skip
    records[1]["config"]["defense"] = {"name": "onion", "bar": 0.5}
    (_, panel) = chart("pareto", records).panels
    assert [made.label for made in panel.series] == [
        "undefended", "clean-tuned alone", "btu", "onion",
    ]  # fmt: skip
    titles = [panel.title for panel in chart("heatmaps", records).panels]
    assert titles == ["ASR, undefended", "ASR, btu", "ASR, onion",
                      "CACC, undefended", "CACC, btu", "CACC, onion"]  # fmt: skip


def test_a_map_has_the_mean_of_its_seeds_and_marks_it() -> None:
    # 0.2 and 0.4 at rate 0.1: mean 0.3. The second seed lost more than 0.05 of its accuracy.
    fine, lost = {"cacc": 0.9, "tuned_cacc": 0.9}, {"cacc": 0.8, "tuned_cacc": 0.9}
    records = records_of(
        ("badnets", 0.1, 0, "contrast", 4.5, {"asr": 0.2, **fine}),
        ("badnets", 0.1, 1, "contrast", 4.5, {"asr": 0.4, **lost}),
        ("addsent", 0.2, 0, "contrast", 4.5, {"asr": 0.7, **fine}),
    )
    heat = chart("heatmaps", records).panels[1].heat
    assert heat is not None
    assert (heat.rows, heat.columns) == (["addsent", "badnets"], ["0.1", "0.2"])
    assert heat.shares == [[None, 0.7], [pytest.approx(0.3), None]]
    assert heat.marked == [[False, False], [True, False]]
    (trace,) = figure(chart("heatmaps", records).panels[1])["data"]
    assert trace["text"] == [["", "70.0"], ["30.0 \N{DAGGER}", ""]]


def test_a_seed_with_more_cells_has_no_more_weight_in_metrics_that_all_cells_have() -> None:
    # Undefended 0.9 at seed 0, in three cells, and 0.5 at seed 1, in one: 0.7 over seeds, not the
    # 0.8 over cells. Tuned, in the same way: 0.8 and 0.4 give 0.6, not 0.7.
    first = {"undefended_asr": 0.9, "undefended_cacc": 0.9, "tuned_asr": 0.8, "tuned_cacc": 0.8}
    second = {"undefended_asr": 0.5, "undefended_cacc": 0.5, "tuned_asr": 0.4, "tuned_cacc": 0.4}
    records = records_of(
        *(("badnets", 0.1, 0, "contrast", bar, first) for bar in (2.0, 4.5, 9.0)),
        ("badnets", 0.1, 1, "contrast", 2.0, second),
        ("badnets", 0.2, 0, "contrast", 2.0, first),
    )
    heat = chart("heatmaps", records).panels[0].heat
    assert heat is not None
    assert heat.shares == [[pytest.approx(0.7), pytest.approx(0.9)]]
    panel = chart("pareto", records).panels[0]
    for label, mean in (("undefended", 0.7), ("clean-tuned alone", 0.6)):
        drawn = series(panel, label)
        assert (drawn.x, drawn.y) == ([pytest.approx(mean)], [pytest.approx(mean)])


def test_a_front_has_the_points_that_no_other_beats() -> None:
    # (0.1, 0.8), (0.2, 0.9), (0.5, 0.95) improve in turn; (0.3, 0.85) and the second (0.2, 0.9)
    # do not, and (0.1, 0.7) has the ASR of the first with less accuracy.
    asr, cacc = [0.5, 0.1, 0.3, 0.2, 0.2, 0.1], [0.95, 0.8, 0.85, 0.9, 0.9, 0.7]
    assert front(asr, cacc) == [1, 3, 0]


def test_no_two_of_many_defenses_look_the_same() -> None:
    # Seven: one more than there are colors.
    records = records_of(*[("badnets", 0.1, 0, None, None)] * 7)
    for number, record in enumerate(records):
        record["config"]["defense"] = {"name": f"defense {number}"}
    (panel,) = chart("pareto", records).panels
    looks = [(made.color, made.marker) for made in panel.series if made.label.startswith("def")]
    assert len(looks) == 7
    assert len(set(looks)) == 7


def test_unpoisoned_sets_have_no_front() -> None:
    made = chart("pareto", records_of(("badnets", 0.0, 0, "contrast", 4.5)))
    assert made.panels == []
    assert "No cell is poisoned" in made.notes[0]


# Drift -----------------------------------------------------------------------------------------


def drift_chart(tokens: pd.DataFrame) -> Chart:
    return chart("drift", records_of(("badnets", 0.1, 0, "contrast", 4.5)), lambda key: tokens)


def test_a_drift_plot_keeps_the_trigger_and_thins_the_bulk() -> None:
    tokens = drifts("badnets", 0.1, 0, 5000).assign(flagged=lambda t: t["score"] >= 4.5)
    (panel,) = drift_chart(tokens).panels
    (trigger,) = tokens[tokens["trigger"]].to_dict("records")
    drawn = series(panel, "trigger, flagged")
    assert (drawn.x, drawn.y) == ([trigger["count"]], [trigger["drift_3"]])
    assert drawn.text == ["cf"]
    bulk = series(panel, "not flagged")
    assert len(bulk.y) == BULK
    rest = tokens[~tokens["flagged"]].nlargest(BULK // 2, "drift_3")
    assert set(rest["drift_3"]) <= set(bulk.y)
    known = set(zip(tokens["count"], tokens["drift_3"], strict=True))
    assert set(zip(bulk.x, bulk.y, strict=True)) <= known


def test_long_arrays_keep_every_bit() -> None:
    tokens = drifts("badnets", 0.1, 0, 600).assign(flagged=False)
    (panel,) = drift_chart(tokens).panels
    (trace,) = [made for made in figure(panel)["data"] if made["name"] == "not flagged"]
    packed = np.frombuffer(base64.b64decode(trace["y"]["bdata"]), dtype="<f8")
    assert packed.tolist() == series(panel, "not flagged").y


def test_flagged_tokens_that_are_not_drawn_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts_module, "MOST_FLAGGED", 10)
    tokens = drifts("badnets", 0.1, 0, 600).assign(flagged=lambda t: t["token_id"] < 50)
    made = drift_chart(tokens)
    # 50 flagged, one of them the trigger's, which is not among the clean ones: 49 - 10.
    assert len(series(made.panels[0], "flagged, clean").y) == 10
    assert "39 flagged clean tokens that moved least are not drawn" in made.notes[0]


def test_a_vetoed_token_has_a_sign_in_the_drift_plot_and_is_counted_in_the_marks() -> None:
    tokens = drifts("badnets", 0.1, 0, 600).assign(flagged=lambda t: t["token_id"] < 2)
    (panel,) = drift_chart(tokens.assign(vetoed=[1] + [0] * 599)).panels
    assert series(panel, "flagged, clean").text == ["word1"]
    assert series(panel, "flagged, clean, not cut").text == ["word0"]
    # At rate 0.1 the made attack works.
    cell = ("badnets", 0.1, 0, "contrast", 4.5, {"flagged": 2, "vetoed": 1})
    (record,) = records_of(cell)
    record["config"]["defense"]["max_cut_cost"] = 0.02
    words = " ".join(Read(page(Given([record]))).words.split())
    assert "1 cell: token vetoed (a flagged token is not cut" in words
    assert (
        "token vetoed: 1 of 2 flagged tokens is not cut: after clean tuning the cut costs more "
        "than 0.02 of the clean rows"
    ) in words


def test_markup_in_a_token_is_shown_as_it_is() -> None:
    tokens = drifts("badnets", 0.1, 0, 600).assign(flagged=True)
    tokens["token"] = tokens["token"].where(~tokens["trigger"], "<b>$x$</b>")
    (panel,) = drift_chart(tokens).panels
    (trace,) = [t for t in figure(panel)["data"] if t["name"] == "trigger, flagged"]
    assert trace["text"] == ["&lt;b&gt;$x$&lt;/b&gt;"]
    draw([panel])  # matplotlib would raise on invalid mathematics


def test_tokens_of_infinite_drift_are_counted_and_not_drawn() -> None:
    tokens = drifts("badnets", 0.1, 0, 600).assign(flagged=lambda t: t["token_id"] < 50)
    tokens.loc[tokens.index[:2], ["drift_3", "count"]] = [math.inf, 7]
    made = drift_chart(tokens)
    assert "2 tokens with infinite drift are not drawn" in " ".join(made.notes)
    drawn = [y for one in made.panels[0].series for y in one.y]
    assert drawn
    assert all(math.isfinite(y) for y in drawn)
    json.dumps(figure(made.panels[0]), allow_nan=False)  # raises on what JSON lacks


# Cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["contrast", None])
def test_the_seconds_of_a_cell_are_the_sum_of_its_stages(rule: str | None) -> None:
    # Without a defense one evaluation has two names.
    (record,) = records_of(("badnets", 0.1, 0, rule, 4.5 if rule else None))
    assert sum(stage_seconds(record).values()) == pytest.approx(record["metrics"]["seconds"])


@pytest.mark.parametrize(("total", "counted"), [(11.0, False), (13.5, True)])
def test_clean_tuning_is_evaluated_once_under_two_names(total: float, counted: bool) -> None:
    # 2.6 + 2.5 + 5.9 = 11: the defended model is the tuned one. 13.5: the two are different models
    # that took equally long.
    took = {"evaluate undefended": 2.6, "evaluate tuned": 2.5, "evaluate defended": 2.5,
            "poisoned fine-tune": 5.9}  # fmt: skip
    metrics = {f"seconds/{name}": seconds for name, seconds in took.items()}
    found = stage_seconds({"metrics": metrics | {"seconds": total}})
    assert ("evaluate defended" in found) is counted
    assert sum(found.values()) == pytest.approx(total)


def test_bars_are_means_over_cells() -> None:
    records = records_of(("badnets", 0.1, 0, "contrast", 4.5), ("badnets", 0.1, 1, "contrast", 4.5))
    for record, seconds in zip(records, (1.0, 4.0), strict=True):
        record["metrics"]["seconds/unlearn"] = seconds
    (panel,) = chart("cost", records).panels
    assert series(panel, "unlearn").x == [2.5]


# Static figures --------------------------------------------------------------------------------


def test_figures_are_the_pages_charts_as_files(source: Source, tmp_path: Path) -> None:
    written = write_figures(source, tmp_path / "new" / "figures", ("svg",))
    assert [path.name for path in written] == [f"{name}.svg" for name in CHARTS]
    assert all(path.read_text().startswith("<?xml") for path in written)


def test_figures_of_the_same_results_are_the_same_bytes(tmp_path: Path) -> None:
    source = Given(records_of(*(("badnets", 0.1, 0, "contrast", bar) for bar in (2.0, 4.5))))
    for suffix in ("png", "svg", "pdf"):
        first, again = (
            write_figures(source, tmp_path / name, (suffix,))[0].read_bytes() for name in "ab"
        )
        assert first == again


def test_many_panels_go_on_in_further_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures_module, "MOST_PANELS", 2)
    source = Given(records_of(*(("badnets", rate, 0, "contrast", bar) for rate in (0.01, 0.05, 0.1)
                             for bar in (2.0, 4.5))))  # fmt: skip
    names = [path.name for path in write_figures(source, tmp_path, ("pdf",))]
    assert names[:2] == ["curves.pdf", "curves-2.pdf"]


def test_figures_refuse_what_they_cannot_write(tmp_path: Path) -> None:
    source = Given(records_of(("badnets", 0.1, 0, "contrast", 4.5)))
    with pytest.raises(UserError, match=r"unknown figure format 'jpg'.*known: pdf, png, svg"):
        write_figures(source, tmp_path, ("jpg",))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file; name a folder for the figures"):
        write_figures(source, file)
    with pytest.raises(UserError, match=r"file/in cannot be written \(Not a directory\)"):
        write_figures(source, file / "in")
    with pytest.raises(UserError, match="no finished cell yet"):
        write_figures(Given([]), tmp_path)


def test_a_page_that_the_disk_does_not_take_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    source = Given(records_of(("badnets", 0.1, 0, "contrast", 4.5)))
    error = r"--html \S+page\.html cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=error):
        write_page(source, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# The command -----------------------------------------------------------------------------------


def test_report_writes_page_and_figures_beside_the_table(
    tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    shelve_sweep(tmp_path / "runs", thresholds=(4.5,), seeds=(0,), controls=False, tokens=80)
    file = tmp_path / "page.html"
    ran = run_cli("report", "likely", "--output", tmp_path / "runs", "--format", "csv",
                  "--html", file, "--figures", tmp_path / "figures")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.out.startswith("attack,poison_rate,")
    assert f"Page: {file}" in ran.err
    assert "Figures: 12 files in" in ran.err  # four charts: one threshold is not a curve
    assert len(Read(file.read_text()).rows) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "page.html", "runs"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("page.pdf", r"page\.pdf must end in \.html or \.htm"),
        ("absent/page.html", r"the folder \S+absent does not exist; make it first"),
        ("folder.html", r"folder\.html is a folder; name a file in it"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_first(
    path: str, error: str, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    (tmp_path / "folder.html").mkdir()
    ran = run_cli("report", "no-such-sweep", "--output", tmp_path, "--html", tmp_path / path)
    assert ran.code == 2
    assert re.search(error, ran.err)


@pytest.mark.parametrize("option", ["--figures", "--paper"])
def test_a_folder_that_cannot_be_written_is_refused_first(
    option: str, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    (tmp_path / "file").touch()
    ran = run_cli("report", "no-such-sweep", "--output", tmp_path, option, tmp_path / "file" / "x")
    assert ran.code == 2
    error = rf"{option} \S+file/x cannot be written: \S+file is not a folder"
    assert re.search(error, ran.err)


def test_folders_without_permission_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so os.access is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"page\.html: the folder \S+ must be writable"):
        check_page(tmp_path / "page.html")
    with pytest.raises(UserError, match=r"--figures x/new/in cannot be written: \S+ must be"):
        check_folder("--figures x/new/in", tmp_path / "new" / "in")
    (tmp_path / "own").mkdir()
    check_folder("--figures x/own/in", tmp_path / "own" / "in")
