"""How long the page of 1,000 finished runs takes: to make, to carry, to open.

    python benchmarks/pages.py
    python benchmarks/pages.py --ui                       # and MLflow's own table of them
    python benchmarks/pages.py --picture docs/page.png    # the picture of docs/pages.md
    python benchmarks/pages.py --rates 1 --seeds 1        # a page of 40 runs

The runs are made by formula in a temporary folder. Prints seconds of `btu report NAME --html FILE`
as a process of its own (bar: 20 s), the page's size (bar: 5 MB), and how long headless Chromium
takes from opening it until the table of all runs sorts and the first charts are drawn (bar: 3 s;
needs Playwright for Python and a Chromium of the system, and is left out with a word without them).
Checks that the page's table has a row for each run. With --ui the runs are written to a SQLite
store too (minutes), and the runs table of the MLflow UI is opened on it: it has to count all runs
and to show rows of the first 100, as many as it fetches at once. Every time is a median of three.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Judge, add_options, count

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "sweeps"
ATTACKS = ("badnets", "addsent", "syntactic", "style")
RATES = (0.01, 0.02, 0.03, 0.05, 0.1)
THRESHOLDS = (1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0, 8.0)
# What MLflow's runs table fetches at once.
FETCHED = 100
OPENED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="write the page there and keep it")
    parser.add_argument("--picture", type=Path, help="write the picture of docs/pages.md, and stop")
    parser.add_argument("--ui", action="store_true", help="open MLflow's runs table too")
    parser.add_argument("--rates", type=count, default=5, choices=range(1, len(RATES) + 1))
    parser.add_argument("--seeds", type=count, default=5)
    add_options(parser)
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))

    if options.picture:
        _picture(options.picture)
        return
    judge = Judge.of("pages", options)
    # With the cells without a defense: 4 x 5 x 10 x 5 = 1,000.
    cells = len(ATTACKS) * options.rates * (len(THRESHOLDS) + 1) * options.seeds
    with tempfile.TemporaryDirectory(prefix="btu-pages-") as folder:
        runs, page = Path(folder) / "runs", options.keep or Path(folder) / "page.html"
        _make(judge, runs, page, options)
        judge_page(judge, page, cells)
        try:
            from browsing import browser

            with browser() as chromium:
                opened = [_open(chromium, page) for _ in range(OPENED)]
        except ImportError as error:
            print(f"not opened in a browser: {error}")
        else:
            judge_opened(judge, opened, cells)
        if options.ui:
            judge_ui(judge, *_runs_table(runs, "pages", Path(folder)), cells)
    judge.end()


def _make(judge: Judge, runs: Path, page: Path, options: argparse.Namespace) -> None:
    """Make the runs and their page."""
    from formula_sweep import shelve_sweep

    started = time.monotonic()
    shelve_sweep(
        runs, "pages", ATTACKS, RATES[: options.rates], THRESHOLDS, range(options.seeds),
        tokens=5000,
    )  # fmt: skip
    print(f"runs made in {time.monotonic() - started:.1f} s")
    command = [sys.executable, "-m", "orchestrator.cli", "report", "pages", "--output"]
    started = time.monotonic()
    subprocess.run(
        [*command, str(runs), "--format", "csv", "--html", str(page)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=HERE.parent,
    )  # fmt: skip
    took = time.monotonic() - started
    judge.figures["seconds to make"] = took
    judge.fast("btu report --html under 20 s", f"{took:.1f} s", took < 20)


def judge_page(judge: Judge, page: Path, cells: int) -> None:
    """Judge the file: its size, and that its table has a row for each cell."""
    from parsed_page import Read

    size, rows = page.stat().st_size, len(Read(page.read_text()).rows)
    judge.figures |= {"cells": cells, "bytes": size}
    judge.structure(f"the page's table has {cells} rows", f"{rows}", rows == cells)
    judge.fast("the page under 5 MB", f"{size / 1e6:.2f} MB", size < 5e6)


def judge_opened(judge: Judge, opened: list[tuple[int, float, float]], cells: int) -> None:
    """Judge how the page opened: rows in its table, seconds until it sorts and until it draws."""
    rows, table, charts = (sorted(each)[len(each) // 2] for each in zip(*opened, strict=True))
    each = {one[0] for one in opened}
    judge.structure(f"the opened table has {cells} rows", str(sorted(each)), each == {cells})
    judge.figures |= {"seconds until the table sorts": table, "seconds until charts": charts}
    print(f"the table of {rows} rows sorts after {table:.1f} s, median of {len(opened)}")
    judge.fast("interactive in under 3 s", f"{charts:.1f} s", charts < 3)


def judge_ui(judge: Judge, matching: list[int], shown: list[int], seconds: list[float],
             cells: int) -> None:  # fmt: skip
    """Judge MLflow's runs table, opened several times.

    judge: gets bars and figures.
    matching: how many runs the table counted, each time.
    shown: how many of them it had rows of.
    seconds: until it had them.
    cells: how many runs there are.
    """
    least = min(FETCHED, cells)
    judge.structure(f"MLflow's table counts {cells} runs", str(matching),
                    all(number == cells for number in matching))  # fmt: skip
    judge.structure(f"MLflow's table has rows of the first {least} on the screen", str(shown),
                    all(1 <= number <= least for number in shown))  # fmt: skip
    median = sorted(seconds)[len(seconds) // 2]
    judge.figures["seconds of MLflow's table"] = median
    print(f"MLflow's table of the first {least} runs: {median:.1f} s, median of {len(seconds)}")


def _runs_table(runs: Path, name: str, folder: Path) -> tuple[list[int], list[int], list[float]]:
    """Write the sweep to MLflow, and open its runs table.

    Return how many runs it counts, how many it shows, and the seconds until then, of each opening.
    """
    from browsing import browser, mlflow_ui

    from orchestrator.results.folder import find_sweep
    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server
    from orchestrator.tracking.sync import sync

    results = find_sweep(runs, name)
    uri = server.default_uri(results.output)
    experiment = experiment_module.experiment(uri, name)
    started = time.monotonic()
    synced = sync.sync(uri, experiment, results, lambda key: False)
    print(f"{synced.written} runs written to MLflow in {time.monotonic() - started:.1f} s")
    found: list[tuple[int, int, float]] = []
    with mlflow_ui(uri, folder / "ui.log") as ui, browser() as chromium:
        for _ in range(OPENED):
            size = {"width": 2200, "height": 1200}
            tab = chromium.new_page(viewport=size, http_credentials=ui.login)
            started = time.monotonic()
            tab.goto(f"{ui.url}/#/experiments/{experiment}/runs?workflowType=machine_learning")
            tab.get_by_text("matching runs").wait_for(timeout=120_000)
            # Newest first: which attack they are of is left open.
            links = tab.get_by_role("link", name="poison_rate=")
            links.first.wait_for(timeout=120_000)
            took = time.monotonic() - started
            said = " ".join(tab.get_by_text("matching runs").inner_text().split())
            found.append((counted(said), links.count(), took))
            tab.close()
    matching, shown, seconds = (list(each) for each in zip(*found, strict=True))
    return matching, shown, seconds


def counted(said: str) -> int:
    """Return how many runs the line above MLflow's table counts: ``1,000 matching runs``."""
    found = re.search(r"([\d,]+)\s+matching runs", said)
    if found is None:
        raise ValueError(f"MLflow's page counts no runs: {said!r}")
    return int(found[1].replace(",", ""))


def _picture(path: Path) -> None:
    """Write what the upper part of a small sweep's page looks like."""
    from browsing import browser
    from formula_sweep import shelve_sweep

    from orchestrator.cli.shared import open_source
    from orchestrator.report.html import write_page

    with tempfile.TemporaryDirectory(prefix="btu-pages-") as folder, browser() as chromium:
        runs, page = Path(folder) / "runs", Path(folder) / "page.html"
        rates, thresholds = (0.02, 0.05, 0.1), (2.0, 4.5, 6.0, 9.0)
        shelve_sweep(runs, "likely", ("addsent", "badnets"), rates, thresholds, range(3))
        write_page(open_source("likely", str(runs)), page)
        size = {"width": 1120, "height": 900}
        tab = chromium.new_context(viewport=size, device_scale_factor=0.8).new_page()
        tab.goto(page.as_uri())
        # One attack of each chart is enough for a small picture.
        tab.add_style_tag(content="#curves figure:nth-child(n+4), #pareto figure:nth-child(n+4), "
                          "#drift figure:nth-child(n+4), #heatmaps figure:nth-child(n+4), "
                          "nav, details { display: none }")  # fmt: skip
        for plot in tab.query_selector_all(".plot"):
            if plot.is_visible():
                plot.scroll_into_view_if_needed()
                plot.wait_for_selector(".main-svg", state="attached", timeout=120_000)
        tab.evaluate("scrollTo(0, 0)")
        end = tab.query_selector("#cost").bounding_box()["y"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": end}
        tab.screenshot(path=path, full_page=True, clip=clip)
    from PIL import Image

    # A repository is cloned more often than its picture is looked at closely.
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def _open(chromium: object, page: Path) -> tuple[int, float, float]:
    """Return the rows of the table, and the seconds until it is sorted and until a chart is drawn.

    The chart waits for the sorting too.
    """
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    started = time.monotonic()
    tab.goto(page.resolve().as_uri(), wait_until="commit")
    _until(tab, "document.documentElement.dataset.table !== undefined")
    # Not by the mouse: that would scroll to the table, away from the first charts.
    tab.dispatch_event('th[data-name="asr"] button', "click")
    _until(tab, "document.querySelector('th[data-name=asr]').ariaSort === 'ascending'")
    table = time.monotonic() - started
    _until(tab, "document.querySelector('.plot .main-svg') !== null")
    charts = time.monotonic() - started
    rows = int(tab.evaluate("() => document.querySelectorAll('#cells tbody tr').length"))
    tab.close()
    return rows, table, charts


def _until(tab: object, expression: str) -> None:
    """Wait until an expression is true on the page.

    Not by Playwright's own waiting: for a selector it asks whether the element can be seen, which
    lays out the whole table below the window, as no reader of the first charts would; for a
    function it needs eval, which the page's policy forbids.
    """
    while not tab.evaluate(f"() => {expression}"):  # type: ignore[attr-defined]
        time.sleep(0.01)


if __name__ == "__main__":
    main()
