"""A sweep's summary run in MLflow."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import pytest
from synthetic import config, shelve

from orchestrator.cli.shared import open_source
from orchestrator.report.summary import Summary, group_metrics, summarize
from orchestrator.results.folder import SWEEP, Results

if TYPE_CHECKING:
    from mlflow import MlflowClient


def summarized(runs: Path, cells: list[Any], limit: int = 5000) -> Summary:
    results = shelve(runs, cells, tokens=60)
    return summarize(open_source("made", str(runs)), 9, results.sweep_text(), limit)


# ASR 0.1, 0.2 and 0.6: mean 0.3; its standard deviation is sqrt((0.04 + 0.01 + 0.09) / 2), and
# t for 95 % and two degrees of freedom is 4.302652729911275.
SEEDS: list[Any] = [
    (config(seed=seed), {"asr": asr, "cacc": 0.9}) for seed, asr in enumerate((0.1, 0.2, 0.6))
]
HALF = 4.302652729911275 * math.sqrt(0.07 / 3)


def test_a_summary_has_mean_and_interval_over_seeds(tmp_path: Path) -> None:
    made = summarized(tmp_path, SEEDS)
    metrics = made.metrics
    assert metrics["asr/badnets 0.1 btu"] == pytest.approx(0.3)
    assert metrics["asr_ci/badnets 0.1 btu"] == pytest.approx(HALF)
    assert metrics["cacc/badnets 0.1 btu"] == 0.9
    assert metrics["seeds/badnets 0.1 btu"] == 3
    assert (metrics["cells/launched"], metrics["cells/finished"]) == (9, 3)
    means = pd.read_csv(io.BytesIO(made.files["means.csv"]))
    # The very same numbers, each with all its digits.
    assert means["asr"].tolist() == [metrics["asr/badnets 0.1 btu"]]
    assert means["asr_ci"].tolist() == [metrics["asr_ci/badnets 0.1 btu"]]
    table = json.loads(made.files["means.json"])
    (row,) = table["data"]
    assert row[table["columns"].index("asr")] == metrics["asr/badnets 0.1 btu"]
    assert row[table["columns"].index("undefended_asr")] is None  # not measured
    cells = pd.read_csv(io.BytesIO(made.files["cells.csv"]), dtype={"key": str})
    assert cells["asr"].tolist() == [0.1, 0.2, 0.6]
    assert cells["key"].tolist() == [f"{number:024x}" for number in range(3)]
    assert made.files["report.html"].startswith(b"<!")
    assert [name for name in made.files if name.startswith("figures/")]
    assert made.files["sweep.yaml"] == b"name: made\n"


def test_the_text_says_what_there_is_and_how_to_run_it_again(tmp_path: Path) -> None:
    weak = {"asr": 0.1, "cacc": 0.9, "undefended_asr": 0.2, "undefended_ftr": 0.1}
    note = summarized(tmp_path, [(config(), weak)]).note
    assert note.startswith("Summary of sweep **made**: 1 of 9 cells finished.")
    assert "`btu launch sweep.yaml`" in note
    assert "1 cell: attack failed" in note
    assert "| badnets" in note


def test_a_table_that_is_longer_than_a_description_is_left_to_the_artifact(tmp_path: Path) -> None:
    cells: list[Any] = [(config(threshold=t / 8), {"asr": 0.5, "cacc": 0.9}) for t in range(8, 48)]
    note = summarized(tmp_path, cells, 2000).note
    assert len(note) <= 2000
    assert "| badnets" not in note
    assert "artifact `means.csv`" in note


def test_groups_that_differ_have_metrics_that_differ() -> None:
    row = {
        "attack": "style", "poison_rate": 0.05, "defense": "btu", "alpha": None,
        "data.path": "a/b=c", "control": None, "seeds": 2,
        **dict.fromkeys(("asr", "cacc", "detection_precision", "detection_recall"), 0.5),
        **dict.fromkeys(
            ("asr_ci", "cacc_ci", "detection_precision_ci", "detection_recall_ci"), math.nan
        ),
    }  # fmt: skip
    # Characters that MLflow rejects become the same one; the labels must stay distinct.
    means = pd.DataFrame([row, {**row, "data.path": "a/b:c"}, {**row, "control": "no_poison"}])
    names = [name for name in group_metrics(means) if name.startswith("asr/")]
    assert len(set(names)) == 3
    assert all(name.startswith("asr/style 0.05 btu path a_b_c") for name in names[:2])
    assert "no_poison" in names[2]
    from mlflow.utils.validation import _validate_metric_name

    for name in group_metrics(means):
        _validate_metric_name(name)
    # Undefined is nothing, not 0.
    assert not [name for name in group_metrics(means) if "_ci/" in name]


# In MLflow -------------------------------------------------------------------------------------


class Summed(NamedTuple):
    """A sweep of which MLflow has what is finished. cells: those that are finished so far."""

    results: Results
    uri: str
    experiment: str
    client: MlflowClient

    def finish(self, cells: list[Any]) -> None:
        shelve(Path(self.results.output), cells, name=self.results.name, tokens=40)

    def summarize(self) -> bool:
        from orchestrator.tracking.sync import summarize, sync

        fresh = Results(self.results.output, self.results.name)
        assert sync(self.uri, self.experiment, fresh, lambda key: False).missing == 0
        return summarize(self.uri, self.experiment, fresh)

    def summaries(self) -> list[Any]:
        return list(self.client.search_runs([self.experiment], "tags.kind = 'summary'"))

    def trials(self) -> list[Any]:
        return list(self.client.search_runs([self.experiment], "tags.kind = 'trial'"))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    from orchestrator.tracking import experiment as experiment_module

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    experiment_module.experiment(uri, "other")
    return uri


@pytest.fixture
def summed(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Summed:
    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server

    server.unanswered.clear()
    server.identities.clear()
    name = f"made-{tmp_path.name}"
    experiment = experiment_module.experiment(database, name)
    client = MlflowClient(tracking_uri=database)
    return Summed(Results(str(tmp_path), name), database, experiment, client)


@pytest.mark.slow
def test_one_run_is_brought_up_to_date_as_cells_finish(summed: Summed) -> None:
    summed.finish(SEEDS[:1])
    assert summed.summarize()
    (first,) = summed.summaries()
    assert (first.info.status, first.info.run_name) == ("FINISHED", "summary")
    assert first.data.metrics["asr/badnets 0.1 btu"] == 0.1
    assert "cell" not in first.data.tags
    assert not summed.summarize()  # nothing is new

    summed.finish(SEEDS)
    assert summed.summarize()
    (run,) = summed.summaries()
    assert run.info.run_id == first.info.run_id
    assert run.data.metrics["asr/badnets 0.1 btu"] == pytest.approx(0.3)
    history = summed.client.get_metric_history(run.info.run_id, "asr/badnets 0.1 btu")
    assert [metric.step for metric in history] == [1, 3]  # cells finished by then
    # CACC is the same all along: said once.
    assert len(summed.client.get_metric_history(run.info.run_id, "cacc/badnets 0.1 btu")) == 1
    assert "3 of 3 cells finished" in run.data.tags["mlflow.note.content"]
    assert {entry.path for entry in summed.client.list_artifacts(run.info.run_id)} == {
        "means.csv", "means.json", "cells.csv", "report.html", "sweep.yaml", "figures",
    }  # fmt: skip
    folder = Path(summed.client.download_artifacts(run.info.run_id, "cells.csv"))
    ids = {trial.info.run_id for trial in summed.trials()}
    assert set(pd.read_csv(folder)["run_id"]) == ids
    assert len(ids) == 3


@pytest.mark.slow
def test_a_summary_is_no_cell_anywhere(summed: Summed) -> None:
    from orchestrator.tracking.sync import sync
    from orchestrator.tracking.writer import Tracker

    summed.finish(SEEDS)
    assert summed.summarize()
    found = open_source(summed.results.name, "", summed.uri)
    assert len(found.records()) == 3
    synced = sync(summed.uri, summed.experiment, summed.results, lambda key: False)
    assert (synced.written, synced.closed, synced.missing) == (0, 0, 0)
    tracker = Tracker(summed.uri, summed.experiment, summed.results)
    assert tracker.close_orphans(lambda key: False, "test") == 0
    assert len(summed.summaries()) == 1


@pytest.mark.slow
def test_of_two_summaries_that_were_made_at_once_one_is_left(summed: Summed) -> None:
    summed.finish(SEEDS[:2])
    assert summed.summarize()
    (first,) = summed.summaries()
    from orchestrator.tracking.runs import ORIGIN_TAG, STEP_TAG

    tags = {"kind": "summary", STEP_TAG: "0", ORIGIN_TAG: summed.results.origin()}
    summed.client.create_run(summed.experiment, tags=tags, run_name="summary")
    # A colleague's own summary run is left alone.
    other = summed.client.create_run(summed.experiment, tags={"kind": "summary"})
    summed.finish(SEEDS)
    assert summed.summarize()
    left = {run.info.run_id for run in summed.summaries()}
    assert left == {first.info.run_id, other.info.run_id}


@pytest.mark.slow
def test_what_was_launched_since_is_said_before_it_is_finished(summed: Summed) -> None:
    summed.finish(SEEDS)
    assert summed.summarize()
    name = summed.results.name
    summed.results.storage.write(f"{name}/{SWEEP}", f"name: {name}\nseed: 7\n".encode())
    assert summed.summarize()
    (run,) = summed.summaries()
    file = Path(summed.client.download_artifacts(run.info.run_id, SWEEP))
    assert "seed: 7" in file.read_text()


@pytest.mark.slow
def test_a_sweep_that_varies_more_than_before_leaves_no_metric_of_before(summed: Summed) -> None:
    summed.finish(SEEDS)
    assert summed.summarize()
    summed.finish([*SEEDS, (config(threshold=6.0), {"asr": 0.4, "cacc": 0.9})])
    assert summed.summarize()
    (run,) = summed.summaries()
    names = {name for name in run.data.metrics if name.startswith("asr/")}
    assert names == {"asr/badnets 0.1 btu threshold 4.5", "asr/badnets 0.1 btu threshold 6"}


@pytest.mark.slow
def test_a_sweep_without_a_finished_cell_has_a_summary_too(summed: Summed) -> None:
    summed.finish([])
    assert summed.summarize()
    (run,) = summed.summaries()
    assert run.data.metrics["cells/finished"] == 0
    assert [e.path for e in summed.client.list_artifacts(run.info.run_id)] == ["sweep.yaml"]


def test_summaries_are_written_now_and_then_and_take_a_small_share_of_the_time() -> None:
    from orchestrator.tracking.sync import Pace

    pace = Pace(interval=30, share=0.05)
    pace.took(100, 101)
    assert not pace.due(129)
    assert pace.due(130)
    # 4 s are 5 % of 80.
    pace.took(130, 134)
    assert not pace.due(213)
    assert pace.due(214)
