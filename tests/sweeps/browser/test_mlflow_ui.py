"""What a reviewer looks for in the MLflow UI, on a store that the tracking code wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browsing import mlflow_ui
from formula_sweep import shelve_sweep

pytestmark = pytest.mark.slow


class Served(NamedTuple):
    """An MLflow UI. url: of it. experiment: the sweep's id. runs: names by id. summary: its id.

    view: the address of the sweep's runs table, behind the UI's. login: user and password.
    """

    url: str
    experiment: str
    runs: dict[str, str]
    summary: str
    view: str
    login: dict[str, str]

    def at(self, path: str) -> str:
        # Without the parameter MLflow opens on its pages for language-model traces.
        return f"{self.url}/#/experiments/{self.experiment}{path}?workflowType=machine_learning"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, chromium: Any) -> Iterator[Served]:
    """Eight cells of the sweep ``likely``, served from a SQLite store."""
    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server, sync

    folder = tmp_path_factory.mktemp("ui")
    results = shelve_sweep(folder / "runs", rates=(0.1,), thresholds=(4.5,))
    uri = server.default_uri(results.output)
    experiment = experiment_module.experiment(uri, results.name)
    synced = sync.sync(uri, experiment, results, lambda key: False)
    assert (synced.written, synced.missing) == (8, 0)
    found = MlflowClient(tracking_uri=uri).search_runs([experiment], "tags.kind = 'trial'")
    assert sync.summarize(uri, experiment, results)
    (summary,) = MlflowClient(tracking_uri=uri).search_runs([experiment], "tags.kind = 'summary'")
    names = {run.info.run_id: run.info.run_name for run in found}
    with mlflow_ui(uri, folder / "log.txt") as ui:
        view = experiment_module.views(uri)[results.name]
        yield Served(ui.url, experiment, names, summary.info.run_id, view, ui.login)


def test_the_runs_are_listed_with_what_they_found(
    served: Served, open_tab: Callable[..., Any], screenshots: Path
) -> None:
    # The address that `btu ui` prints. The table draws the columns that are in view alone.
    tab = open_tab(served.url + served.view, width=2200, login=served.login)
    for name in served.runs.values():
        tab.page.get_by_text(name, exact=True).first.wait_for()
    for column in ("asr", "cacc", "detection_preci", "attack", "poison_rate", "defense", "seed"):
        tab.page.locator(f'[role="columnheader"]:has-text("{column}")').first.wait_for()
    tab.page.screenshot(path=screenshots / "mlflow-runs.png")


def test_a_runs_artifacts_open(
    served: Served, open_tab: Callable[..., Any], screenshots: Path
) -> None:
    run_id = next(iter(served.runs))
    tab = open_tab(served.at(f"/runs/{run_id}/artifacts"), login=served.login)
    tab.page.get_by_text("config.yaml").first.click()
    tab.page.get_by_text("poison_rate").first.wait_for()
    tab.page.screenshot(path=screenshots / "mlflow-artifacts.png")


def test_the_summary_run_says_what_the_sweep_came_to(
    served: Served, open_tab: Callable[..., Any], screenshots: Path
) -> None:
    tab = open_tab(served.at(f"/runs/{served.summary}"), width=1600, login=served.login)
    # Its description, and the mean of a group among its metrics.
    tab.page.get_by_text("mean", exact=False).first.wait_for()
    tab.page.get_by_text(re.compile("^asr/badnets")).first.wait_for()
    tab.page.screenshot(path=screenshots / "mlflow-summary.png")
    tab = open_tab(served.at(f"/runs/{served.summary}/artifacts"), width=1600, login=served.login)
    for name in ("means.csv", "cells.csv", "report.html", "sweep.yaml"):
        tab.page.get_by_text(name).first.wait_for()
    tab.page.get_by_text("means.json").first.click()
    tab.page.get_by_text("undefended_asr").first.wait_for()
    tab.page.screenshot(path=screenshots / "mlflow-summary-table.png")


def test_runs_are_compared(served: Served, open_tab: Callable[..., Any], screenshots: Path) -> None:
    ids = list(served.runs)[:3]
    quoted = "[" + ",".join(f"%22{run_id}%22" for run_id in ids) + "]"
    url = (
        f"{served.url}/#/compare-runs?runs={quoted}"
        f"&experiments=[%22{served.experiment}%22]&workflowType=machine_learning"
    )
    tab = open_tab(url, login=served.login)
    tab.page.get_by_text(re.compile("Comparing 3 Runs")).first.wait_for()
    tab.page.get_by_text("detection_precision", exact=True).first.wait_for(state="attached")
    tab.page.screenshot(path=screenshots / "mlflow-compare.png", full_page=True)
