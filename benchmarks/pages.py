"""How long the page of 1,000 finished runs takes: to make, to carry, to open.

    python benchmarks/pages.py
    python benchmarks/pages.py --ui                       # and MLflow's own table of them
    python benchmarks/pages.py --picture docs/page.png    # the picture of docs/pages.md

The runs are made by formula in a temporary folder. Prints seconds of `btu report NAME --html FILE`
as a process of its own (bar: 20 s), the page's size (bar: 5 MB), and how long headless Chromium
takes from opening it until the table sorts and the first charts are drawn (bar: 3 s; needs
Playwright for Python and a Chromium of the system, and is left out with a word without them). With
--ui the runs are written to a SQLite store too (minutes), and the runs table of the MLflow UI is
opened on it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "sweeps"
ATTACKS = ("badnets", "addsent", "syntactic", "style")
RATES = (0.01, 0.02, 0.03, 0.05, 0.1)
THRESHOLDS = (1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0, 8.0)
SEEDS = range(5)  # with the cells without a defense: 4 x 5 x 10 x 5 = 1,000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="write the page there and keep it")
    parser.add_argument("--picture", type=Path, help="write the picture of docs/pages.md, and stop")
    parser.add_argument("--ui", action="store_true", help="open MLflow's runs table too")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from formula_sweep import shelve_sweep

    if options.picture:
        _picture(options.picture)
        return
    with tempfile.TemporaryDirectory(prefix="btu-pages-") as folder:
        runs, page = Path(folder) / "runs", options.keep or Path(folder) / "page.html"
        started = time.monotonic()
        shelve_sweep(runs, "pages", ATTACKS, RATES, THRESHOLDS, SEEDS, tokens=5000)
        print(f"1,000 runs made in {time.monotonic() - started:.1f} s")
        command = [sys.executable, "-m", "orchestrator.cli", "report", "pages", "--output"]
        started = time.monotonic()
        subprocess.run(
            [*command, str(runs), "--format", "csv", "--html", str(page)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=HERE.parent,
        )  # fmt: skip
        took, size = time.monotonic() - started, page.stat().st_size
        met = [
            _judge("btu report --html under 20 s", f"{took:.1f} s", took < 20),
            _judge("the page under 5 MB", f"{size / 1e6:.2f} MB", size < 5e6),
        ]
        try:
            from browsing import browser

            with browser() as chromium:
                opened = [_open(chromium, page) for _ in range(3)]
        except ImportError as error:
            print(f"not opened in a browser: {error}")
        else:
            table, charts = (sorted(times)[1] for times in zip(*opened, strict=True))
            print(f"the table sorts after {table:.1f} s, medians of three")
            met.append(_judge("interactive in under 3 s", f"{charts:.1f} s", charts < 3))
        if options.ui:
            rows = _runs_table(runs, "pages", Path(folder))
            met.append(_judge("the MLflow runs table loads", rows, bool(rows)))
    raise SystemExit(not all(met))


def _runs_table(runs: Path, name: str, folder: Path) -> str:
    """Write the sweep to MLflow, and return what its runs table says once it is there."""
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
    with mlflow_ui(uri, folder / "ui.log") as ui, browser() as chromium:
        size = {"width": 2200, "height": 1200}
        tab = chromium.new_page(viewport=size, http_credentials=ui.login)
        started = time.monotonic()
        tab.goto(f"{ui.url}/#/experiments/{experiment}/runs?workflowType=machine_learning")
        tab.get_by_text("matching runs").wait_for(timeout=120_000)
        # Newest first, a hundred at a time: which attack they are of is left open.
        tab.get_by_role("link", name="poison_rate=").first.wait_for(timeout=120_000)
        said = " ".join(tab.get_by_text("matching runs").inner_text().split())
        return f"{said}, {time.monotonic() - started:.1f} s"


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


def _open(chromium: object, page: Path) -> tuple[float, float]:
    """Return the seconds until the table is sorted by a click, and until a chart is drawn.

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
    tab.close()
    return table, charts


def _until(tab: object, expression: str) -> None:
    """Wait until an expression is true on the page.

    Not by Playwright's own waiting: for a selector it asks whether the element can be seen, which
    lays out the whole table below the window, as no reader of the first charts would; for a
    function it needs eval, which the page's policy forbids.
    """
    while not tab.evaluate(f"() => {expression}"):  # type: ignore[attr-defined]
        time.sleep(0.01)


def _judge(bar: str, found: str, met: bool) -> bool:
    print(f"bar: {bar}: {found}, {'met' if met else 'MISSED'}")
    return met


if __name__ == "__main__":
    main()
