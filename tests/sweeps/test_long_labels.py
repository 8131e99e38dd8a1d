"""Long and odd texts of a sweep: short and apart in figures, whole in tables, plain in Markdown."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from formula_sweep import shelve_sweep

from btu.drawing import draw
from orchestrator.report.charts import Chart, charts
from orchestrator.report.curve_figure import curve_panels
from orchestrator.report.curves import read_saved, sweep_curves
from orchestrator.report.figures import write_figures
from orchestrator.report.table import render, results_table
from orchestrator.report.thresholds import threshold_cells
from orchestrator.results.source import StoreSource

# No sentence is the start of another one, and several are equal where a short label shows them.
SENTENCES = (
    "<script>alert('x')</script> & \"quoted\", 100% {braces} $math$ \\input{/etc/passwd} #1_a^b~",
    "=cmd|' /C calc'!A0",
    "a very long sentence " * 16,
    "a very long sentence " * 17,
    "x" * 300,
    "two\nlines | a pipe \\ and $one dollar",
    "$\\frac{1}{2$ is no mathematics: ${x}",
    "\u65e5\u672c\u8a9e\u306e\u9577\u3044\u6587" * 10,  # a script that the figure's font lacks
    "a color \x1b[31m and [a link](javascript:alert(1))",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StoreSource:
    runs = tmp_path_factory.mktemp("runs")
    return StoreSource(shelve_sweep(
        runs, attacks=("addsent",), rates=(0.1,), thresholds=(2.0, 4.5), seeds=(0,),
        sentences=SENTENCES, tokens=80,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def drawn(source: StoreSource) -> list[Chart]:
    return charts(source.records(), source.tokens)


def outside(figure: Any) -> list[str]:
    """Return the texts of a figure that its edge cuts."""
    box = figure.bbox
    return [text for text, (left, low, right, high) in extents(figure)
            if left < box.x0 or low < box.y0 or right > box.x1 or high > box.y1]  # fmt: skip


def extents(figure: Any) -> list[tuple[str, tuple[float, float, float, float]]]:
    from matplotlib.text import Text

    # Ticks beyond an axis have a text too, and are not drawn: only texts with letters count.
    found = [text for text in figure.findobj(Text) if re.search("[a-z]", text.get_text())]
    return [(text.get_text(), tuple(text.get_window_extent().extents)) for text in found]


def test_figures_of_any_texts_are_drawn_without_a_warning(
    source: StoreSource, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = write_figures(source, tmp_path, ("png",))
    # Five charts, none of them with more panels than a file has.
    assert len(written) == 5


@pytest.mark.parametrize("name", ["curves", "heatmaps", "pareto", "cost"])
def test_no_label_of_a_figure_is_cut(drawn: list[Chart], name: str) -> None:
    (chart,) = (one for one in drawn if one.name == name)
    figure = draw(chart.panels)
    assert outside(figure) == []


def test_the_labels_of_rows_and_bars_do_not_meet(drawn: list[Chart]) -> None:
    for chart in drawn:
        if chart.name not in ("heatmaps", "cost"):
            continue
        figure = draw(chart.panels)
        names = [[tick for tick in axes.get_yticklabels() if tick.get_text()]
                 for axes in figure.axes]  # fmt: skip
        # The first panel of each of the two rows of heat maps has the labels.
        assert [len(labels) for labels in names if labels] == (
            [len(SENTENCES)] * 2 if chart.name == "heatmaps" else [2 * len(SENTENCES)]
        )
        for labels in filter(None, names):
            assert len({label.get_text() for label in labels}) == len(labels)
            spans = sorted(tuple(label.get_window_extent().intervaly) for label in labels)
            assert all(low >= high for (_, high), (low, _) in pairwise(spans))


def test_settings_that_look_alike_when_shortened_stay_apart(drawn: list[Chart]) -> None:
    (curves,) = (chart for chart in drawn if chart.name == "curves")
    # A panel for each sentence: none of them is merged with another.
    assert len({panel.title for panel in curves.panels}) == len(SENTENCES)
    assert max(len(panel.title) for panel in curves.panels) < 80


def test_the_titles_of_detection_curves_are_short_and_distinct(source: StoreSource) -> None:
    cells = threshold_cells(source.records())
    panels = curve_panels(sweep_curves(cells, read_saved(source), 3)[0])
    assert len({panel.title for panel in panels}) == len(SENTENCES)
    assert outside(draw(panels)) == []


def test_tables_have_the_whole_texts(source: StoreSource) -> None:
    table = results_table(source.records())
    assert set(table["attack.sentence"]) == set(SENTENCES)
    assert "x" * 300 in render(table, "table")
    assert "x" * 300 in render(table, "markdown")


def test_texts_do_not_change_the_columns_of_a_markdown_table(source: StoreSource) -> None:
    table = results_table(source.records())
    lines = render(table, "markdown").splitlines()
    # The head, the line below it, and a line for each cell.
    assert len(lines) == 2 + len(table)
    # A cell ends at a pipe that no backslash escapes; a backslash of a text is two.
    plain = [line.replace("\\\\", "").replace("\\|", "") for line in lines]
    assert {line.count("|") for line in plain} == {len(table.columns) + 1}


def test_markdown_shows_texts_as_they_are(source: StoreSource) -> None:
    text = render(results_table(source.records()), "markdown")
    assert "=cmd\\|' /C calc'!A0" in text
    assert "two<br>lines \\| a pipe \\\\ and \\$one dollar" in text
    assert "\\<script\\>alert('x')\\</script\\> \\& " in text
    assert "a color \\\\x1b\\[31m and \\[a link\\](javascript:alert(1))" in text
    assert "\x1b" not in text


def test_a_text_is_on_one_line_of_a_latex_table(source: StoreSource) -> None:
    text = render(results_table(source.records()), "latex")
    assert " & two lines | a pipe \\textbackslash " in text
