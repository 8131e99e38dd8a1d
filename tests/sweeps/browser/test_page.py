"""The page of a sweep in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formula_sweep import shelve_sweep

from orchestrator.cli.shared import open_source
from orchestrator.report.html import write_page
from orchestrator.results.source import Source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Two attacks, two rates, three thresholds and no defense, two seeds: 32 cells."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    shelve_sweep(runs)
    return open_source("likely", str(runs))


@pytest.fixture(scope="module")
def file(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "likely.html"
    write_page(source, path)
    return path


def shown(page: Any, column: str) -> list[str]:
    """Return a column of the rows that are shown, with all digits."""
    found: list[str] = page.evaluate(
        """name => {
            const heads = [...document.querySelectorAll("th")];
            const at = heads.findIndex((head) => head.dataset.name === name);
            const rows = [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
            return rows.map((row) => row.cells[at].dataset.v ?? row.cells[at].textContent);
        }""",
        column,
    )
    return found


def draw_all(page: Any) -> None:
    """Scroll through the page, so that every chart comes into view, and wait until it is drawn."""
    page.wait_for_selector("html[data-ready]", state="attached")
    for plot in page.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
        plot.wait_for_selector(".main-svg", state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_and_draws_every_chart(
    scheme: str, file: Path, open_tab: Callable[..., Any], screenshots: Path
) -> None:
    tab = open_tab(file.as_uri(), scheme)
    draw_all(tab.page)
    assert tab.page.locator(".plot .main-svg").count() > 0
    # Each kind of drawing: lines with points, maps, bars.
    for part in ("curves .scatterlayer .js-line", "curves .points path", "heatmaps .hm image, "
                 "#heatmaps .heatmaplayer", "pareto .points path", "drift .points path",
                 "drift .textpoint", "cost .barlayer .point"):  # fmt: skip
        assert tab.page.locator(f"#{part}").count() > 0, part
    assert "cf" in tab.page.locator("#drift .textpoint").all_text_contents()
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    tab.page.evaluate("scrollTo(0, 0)")
    tab.page.screenshot(path=screenshots / f"page-{scheme}.png", full_page=True)
    assert tab.page.locator("#trouble").is_hidden()
    assert tab.errors == []
    fetched = [url for url in tab.requests if not url.startswith(("data:", "blob:"))]
    assert fetched == [file.as_uri()]


def test_a_chart_that_fails_leaves_the_others(
    file: Path, open_tab: Callable[..., Any], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.html"
    start = 'id="figures">{"curves":[{"data":'
    text = file.read_text()
    assert f"{start}[" in text
    broken.write_text(text.replace(f"{start}[", f'{start}null,"was":['))
    tab = open_tab(broken.as_uri())
    plots = tab.page.locator(".plot")
    for i in range(1, plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
        plots.nth(i).locator(".main-svg").first.wait_for(state="attached")
    assert plots.nth(0).locator(".main-svg").count() == 0
    assert tab.page.locator("#trouble").inner_text().startswith("A chart cannot be drawn: ")
    tab.page.get_by_role("button", name="Use dark colors").click()
    assert tab.errors == []


def test_sorting_sorts_by_value_both_ways(
    file: Path, source: Source, open_tab: Callable[..., Any]
) -> None:
    page = open_tab(file.as_uri()).page
    expected = sorted(record["metrics"]["asr"] for record in source.records())
    head = page.locator('th[data-name="asr"]')
    head.locator("button").click()
    assert [float(text) for text in shown(page, "asr")] == expected
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert [float(text) for text in shown(page, "asr")] == expected[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    # Undefined values are last in both directions: cells without a defense have no flagged tokens.
    for _ in range(2):
        page.locator('th[data-name="flagged"] button').click()
        assert shown(page, "flagged")[-8:] == [""] * 8
    assert head.get_attribute("aria-sort") == "none"


def test_filters_keep_the_rows_that_match(
    file: Path, source: Source, open_tab: Callable[..., Any]
) -> None:
    page = open_tab(file.as_uri()).page
    page.fill("#search", "badnets asr<20")
    low = [r for r in source.records()
           if r["config"]["attack"]["name"] == "badnets" and r["metrics"]["asr"] < 0.2]  # fmt: skip
    assert 0 < len(low) < 16
    assert sorted(shown(page, "key")) == sorted(record["key"] for record in low)
    assert page.locator("#count").inner_text() == f"{len(low)} of 32 cells"
    # Shown with one digit after the point, of many.
    text = f"{low[0]['metrics']['asr'] * 100:.1f}"
    page.fill("#search", f"asr={text}")
    same = [r for r in source.records() if f"{r['metrics']['asr'] * 100:.1f}" == text]
    assert sorted(shown(page, "key")) == sorted(record["key"] for record in same)
    page.fill("#search", "badnets asr<20")
    page.get_by_label("seed").select_option("1")
    assert set(shown(page, "seed")) == {"1"}
    assert len(shown(page, "key")) == len([r for r in low if r["config"]["seed"] == 1])
    page.get_by_role("button", name="Clear").click()
    page.wait_for_selector("#count:text('32 of 32 cells')")
    page.get_by_label("only marked").check()
    assert all(shown(page, "marks"))
    assert page.locator("#count").inner_text() != "32 of 32 cells"


def test_the_theme_can_be_chosen(file: Path, open_tab: Callable[..., Any]) -> None:
    tab = open_tab(file.as_uri(), "dark")
    tab.page.wait_for_selector(".plot .main-svg", state="attached")
    paper = "document.querySelector('.plot .main-svg').style.background"
    assert tab.page.evaluate(paper) == "rgb(28, 33, 39)"
    tab.page.get_by_role("button", name="Use light colors").click()
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert tab.page.evaluate(paper) == "rgb(246, 248, 250)"
    assert tab.errors == []


def test_a_series_can_be_hidden(file: Path, open_tab: Callable[..., Any]) -> None:
    tab = open_tab(file.as_uri())
    draw_all(tab.page)
    lines = tab.page.locator("#curves .scatterlayer .trace")
    before = lines.count()
    button = tab.page.locator('#curves .legend button[data-series="token recall"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    # Each of four panels has one line, and a band where the seeds differ.
    assert lines.count() <= before - 4
    button.click()
    assert lines.count() == before
    assert tab.errors == []


def test_the_page_can_be_used_by_keyboard(file: Path, open_tab: Callable[..., Any]) -> None:
    tab = open_tab(file.as_uri())
    page = tab.page
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to the table"
    assert page.evaluate(f"{focused}.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.id") == "cells"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focused}.closest('th')?.dataset.name") == "cacc":
            break
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    values = [float(text) for text in shown(page, "cacc")]
    assert values == sorted(values)
    # Everything that is focused has a name.
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("main button, main input, main select")]
            .filter((one) => !one.textContent.trim() && !one.labels?.length).length"""
    )
    assert unnamed == 0
    assert tab.errors == []


def test_a_mark_leads_to_its_cell(file: Path, open_tab: Callable[..., Any]) -> None:
    page = open_tab(file.as_uri()).page
    # The frame shows only a part of the table, and the header has three lines.
    page.set_viewport_size({"width": 600, "height": 500})
    page.get_by_text("Each marked cell").click()
    links = page.locator(".marked a")
    keys = links.all_inner_texts()
    middle = next(key for key in shown(page, "key")[8:] if key in keys)
    link = links.nth(keys.index(middle))

    def seen() -> bool:
        """Return whether the row is visible between the header and the lower end of the frame."""
        row, head, frame = (page.locator(one).bounding_box() for one in
                            ("tr:target", "th >> nth=0", ".scroll"))  # fmt: skip
        if row is None:
            return False
        top, bottom = head["y"] + head["height"], frame["y"] + frame["height"]
        return bool(top <= row["y"] + 0.5 and row["y"] + row["height"] <= bottom)

    link.click()
    assert page.evaluate("document.querySelector('tr:target').id") == f"cell-{middle}"
    assert re.fullmatch(r"[0-9a-f]{24}", middle)
    assert seen()
    # Filters that hide the row are cleared, even if the address names the row already.
    for go in (link.click, links.first.click, page.go_back):
        page.fill("#search", "no such cell")
        page.wait_for_selector("#count:text('0 of 32 cells')")
        go()
        page.wait_for_selector("#count:text('32 of 32 cells')")
        assert page.input_value("#search") == ""
        assert seen()
    # A filter that shows the row is kept.
    page.fill("#search", middle)
    link.click()
    assert page.locator("#count").inner_text() == "1 of 32 cells"
