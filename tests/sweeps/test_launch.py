"""Whole sweeps on a real local Ray: what is computed, what is kept, and what the command prints.

Most run in this process, on one Ray that all tests share. What breaks is in ``test_faults``.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import (
    Workplace,
    all_measured,
    check,
    computed,
    journal,
    measured,
    own_stages,
    runs_at,
    wait_for,
)

from orchestrator.results.folder import find_sweep

# Both CPUs of the shared Ray for every stage: where it does not matter how many stages run at once,
# one worker imports torch and transformers, not two.
ONE_WORKER = {"cpu": 2}
# Three cells of one attack.
ALPHAS = {"defense.alpha": [0.01, 0.02, 0.03]}
# Nothing answers there; an address is looked at only where Ray is needed.
NOWHERE = ("--address", "127.0.0.1:1")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store: creating its tables takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(tmp_path: Path, database: Path) -> Iterator[Workplace]:
    """Where commands run as processes of their own."""
    made = Workplace(tmp_path, database)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray in this process, which a launch in this process uses: two workers at once."""
    # First: it sets what ray reads when it is imported.
    import orchestrator.run.on_ray  # noqa: F401, I001
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def uri_of(output: Path) -> str:
    return f"sqlite:///{output / 'mlflow.db'}"


# What is computed ------------------------------------------------------------------------------


def summary_at(uri: str) -> Any:
    """Return the summary run of a sweep; there is one."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run,) = client.search_runs([experiment], "tags.kind = 'summary'")
    return run


def ranked_at(uri: str) -> list[Any]:
    """Return the logged models of a sweep, the lowest ASR first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return list(client.search_logged_models([experiment], order_by=[{"field_name": "metrics.asr"}]))


@pytest.mark.slow
def test_a_sweep_shares_its_stages_grows_and_resumes(
    make_sweep: Callable[..., Path],
    place: Workplace,
    run_cli: Callable[..., Any],
    cluster: None,
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from btu.stages import compute
    from orchestrator.plan.planner import plan_sweep
    from orchestrator.results.folder import read_result
    from orchestrator.sweep.load import load_sweep

    sweep = make_sweep(grid=ALPHAS)
    first = run_cli("launch", sweep, "store.keep=models")
    assert first.code == 0, first
    assert "3 of 3 cells done, 0 failed, 0 not run" in first.out
    # One line a cell, where there is no terminal for a live one.
    assert all(f"[{n}/3] alpha=" in first.out for n in range(1, 4)), first
    # alpha has an effect from round 2 on: earlier stages are computed once for the three.
    assert computed(place.output) == {
        **dict.fromkeys(
            ("poison", "triggered rows", "training rows", "clean rows", "evaluation rows",
             "poisoned fine-tune", "clean tuning (control)", "exposure round 1", "exposure round 3",
             "score tokens", "evaluate undefended", "evaluate tuned"), 1,
        ),
        **dict.fromkeys(
            ("exposure round 2", "flag tokens", "unlearn", "evaluate defended", "cell"), 3
        ),
    }  # fmt: skip
    results = place.results()
    store = results.store
    metrics = all_measured(results)
    check(place.output, metrics)
    for record in results.records():
        names = {path.name for path in store.fetch(record["key"]).iterdir()}
        assert names >= {
            "result.json", "config.yaml", "tokens.parquet", "flagged_tokens.json", "drift.png",
        }  # fmt: skip
    for run in runs_at(uri_of(place.output)):
        asr = metrics[run.data.tags["cell"]]["asr"]
        assert run.data.metrics["asr"] == pytest.approx(float(asr))
    summary = summary_at(uri_of(place.output))
    assert summary.data.metrics["cells/finished"] == 3

    # A launched cell measures what the same cell does in this process, with as many threads.
    (planned,) = plan_sweep(load_sweep(sweep, ["defense.alpha=0.02"])).cells.values()
    threads = torch.get_num_threads()
    try:
        here, _ = read_result(compute(planned.stage, tmp_path / "trial", cpus=1, gpus=0))
    finally:
        torch.set_num_threads(threads)
    assert measured(here) == metrics[planned.key]
    assert {"asr", "detection_precision", "loss of poisoned fine-tune 1"} <= set(measured(here))

    # Kept, the models are ordinary ones; a grown grid reads them and computes what is new alone.
    stages = own_stages(results, planned.key)
    models = [stages[name] for name in ("poisoned fine-tune", "clean tuning (control)", "unlearn")]
    for key in models:
        folder = store.fetch(key) / "model"
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert loaded.config.num_labels == 2
    # MLflow ranks those that the cells end with, and names where the store has them.
    ranked = ranked_at(uri_of(place.output))
    assert {model.tags["stage"] for model in ranked} == {
        own_stages(results, key)["unlearn"] for key in metrics
    }
    asr = [float(metrics[model.tags["cell"]]["asr"]) for model in ranked]
    assert asr == sorted(asr)
    for model in ranked:
        assert Path(model.tags["location"]) == store.fetch(model.tags["stage"]) / "model"
    grown = run_cli(
        "launch", sweep, "store.keep=models", "grid.defense.alpha=[0.01,0.02,0.03,0.04]"
    )
    assert grown.code == 0, grown
    assert "3 of 4 cells are done already and are not run again" in grown.out
    assert "4 of 4 cells done" in grown.out
    counts = computed(place.output)
    assert counts["poisoned fine-tune"] == counts["exposure round 1"] == 1
    assert counts["unlearn"] == counts["cell"] == 4
    check(place.output, all_measured(results))
    assert {k: v for k, v in all_measured(results).items() if k in metrics} == metrics

    # With everything done a launch needs no Ray. Without store.keep it removes the models.
    before = journal(place.output)
    again = place.run("launch", sweep, "grid.defense.alpha=[0.01,0.02,0.03,0.04]", *NOWHERE)
    assert again.code == 0, again
    assert "4 of 4 cells are done already and are not run again" in again.out
    assert "[1/4]" not in again.out
    assert journal(place.output) == before
    assert not list((place.output / "store").rglob("*.safetensors.*"))
    assert not list((place.output / "store").rglob("model.safetensors"))
    assert store.dropped() >= set(models)
    # In MLflow they stay, each with its stage.
    assert {model.tags["stage"] for model in ranked_at(uri_of(place.output))} == {
        own_stages(results, key)["unlearn"] for key in all_measured(results)
    }
    assert store.verify() == []
    assert len(runs_at(uri_of(place.output))) == 4
    # The same summary, of the grown grid; that launch had nothing new to report.
    assert summary_at(uri_of(place.output)).info.run_id == summary.info.run_id
    assert summary_at(uri_of(place.output)).data.metrics["cells/finished"] == 4
    # Tune's own state is gone.
    left = {path.name for path in (place.output / "tiny").iterdir()}
    assert left == {"journal.jsonl", "origin", "plans", "sweep.yaml", "tracked"}


@pytest.mark.slow
def test_failures_take_their_own_cells_alone_and_stay(
    make_sweep: Callable[..., Path], place: Workplace, run_cli: Callable[..., Any], cluster: None
) -> None:
    # A shared stage fails: both cells at the learning rate of 1e30. A cell's own stage fails: half
    # of the vocabulary is more than there are candidates, which only the rows show.
    sweep = make_sweep(
        grid={"train.learning_rate": [1e30, 1e-3], "defense.alpha": [0.01, 0.9]},
        resources=ONE_WORKER,
    )
    done = run_cli("launch", sweep)
    assert done.code == 1, done
    assert "1 of 4 cells done, 3 failed, 0 not run" in done.out
    assert "FAILED: stage 'poisoned fine-tune' of learning_rate=1e+30 alpha=" in done.out
    assert "what failed stays failed until --retry-failed" in done.out
    assert "Traceback" not in done.err
    results = place.results()
    reasons = {tuple(f["varied"].values()): f["reason"] for f in results.failures()}
    assert set(reasons) == {(1e30, 0.01), (1e30, 0.9), (1e-3, 0.9)}
    for alpha in (0.01, 0.9):
        assert "stage 'poisoned fine-tune' failed: loss became" in reasons[1e30, alpha]
        assert "lower the learning rate" in reasons[1e30, alpha]
    assert "flags all of the" in reasons[1e-3, 0.9]
    runs = {run.data.tags["cell"]: run for run in runs_at(uri_of(place.output))}
    assert Counter(run.info.status for run in runs.values()) == {"FINISHED": 1, "FAILED": 3}
    for failure in results.failures():
        run = runs[failure["key"]]
        assert run.data.tags["reason"] == failure["reason"]
        assert float(run.data.params["learning_rate"]) == (failure["varied"]["train.learning_rate"])

    # The next launch reports that and runs nothing, not even Ray.
    before = journal(place.output)
    again = place.run("launch", sweep, *NOWHERE)
    assert again.code == 1, again
    assert "2 cells failed earlier and are not run again: stage 'poisoned" in again.out
    assert "--retry-failed runs them again." in again.out
    assert journal(place.output) == before

    # Unless --retry-failed asks for it; then it stops at --max-failures.
    retried = run_cli("launch", sweep, "--retry-failed", "--max-failures", "1")
    assert retried.code == 1, retried
    assert "stopping: 1 stages failed (--max-failures 1)." in retried.out
    assert "Stopped: 1 stages failed (--max-failures 1). Not every cell is done" in retried.out
    more = [event for event in journal(place.output)[len(before) :] if event["event"] == "end"]
    assert "failed" in {event["outcome"] for event in more}
    (finished,) = [r["key"] for r in results.records()]
    assert finished not in {event["key"] for event in more}
    # One run per cell, however often it failed.
    cells = [run.data.tags["cell"] for run in runs_at(uri_of(place.output))]
    assert len(cells) == len(set(cells))


@pytest.mark.slow
def test_refused_cells_are_named_and_the_others_run(
    make_sweep: Callable[..., Path],
    place: Workplace,
    run_cli: Callable[..., Any],
    plain_folder: Path,
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The database of a relative URI is one file, though workers start in folders of their own.
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep(
        grid={"attack.name": ["style", "badnets"]},
        data={"path": str(plain_folder)},
        resources=ONE_WORKER,
    )
    done = run_cli("launch", sweep, "tracking.uri=sqlite:///my.db", "seed=5")
    assert done.code == 0, done
    assert "refused: style: the style attack needs the paraphrase column 'style'" in done.out
    assert "1 of 1 cells done" in done.out
    assert "not in MLflow" not in done.out
    assert len(runs_at(f"sqlite:///{tmp_path / 'my.db'}")) == 1
    # The recorded file contains the overrides.
    recorded = place.output / "tiny" / "sweep.yaml"
    assert yaml.safe_load(recorded.read_text())["seed"] == 5
    again = place.run("launch", recorded, *NOWHERE)
    assert again.code == 0, again
    assert "1 of 1 cells are done already" in again.out


@pytest.mark.slow
def test_random_draws_lists_and_zips_run(
    make_sweep: Callable[..., Path], place: Workplace, run_cli: Callable[..., Any], cluster: None
) -> None:
    # 1 draw x 2 entries x 2 pairs = 4 cells
    sweep = make_sweep(
        random={"samples": 1, "space": {"attack.poison_rate": [0.2, 0.3]}},
        list=[{"defense.alpha": 0.01}, {"defense.alpha": 0.02, "defense.cut": "row"}],
        zip={"seed": [0, 1], "train.epochs": [1, 2]},
        resources=ONE_WORKER,
    )
    done = run_cli("launch", sweep)
    assert done.code == 0, done
    assert "4 of 4 cells done, 0 failed, 0 not run" in done.out
    records = list(place.results().records())
    rates = {record["varied"]["attack.poison_rate"] for record in records}
    assert len(rates) == 1
    assert rates < {0.2, 0.3}
    varied = [{k: v for k, v in r["varied"].items() if "rate" not in k} for r in records]
    pairs = [{"seed": 0, "train.epochs": 1}, {"seed": 1, "train.epochs": 2}]
    entries = [
        {"defense.alpha": 0.01, "defense.cut": "dimensional"},
        {"defense.alpha": 0.02, "defense.cut": "row"},
    ]
    wanted = [entry | pair for entry in entries for pair in pairs]
    assert sorted(map(str, map(known, varied))) == sorted(map(str, map(known, wanted)))
    check(place.output, all_measured(place.results()))


def known(varied: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return coordinates in one order; a default that is not written counts as written."""
    return sorted({"defense.cut": "dimensional", **varied}.items())


@pytest.mark.slow
def test_an_output_on_an_object_store(
    make_sweep: Callable[..., Path], run_cli: Callable[..., Any], cluster: None, tmp_path: Path
) -> None:
    """Every file goes through fsspec; a cell's own stages reserve, and compute with, two CPUs."""
    folder = tmp_path / "remote"
    sweep = make_sweep(output=f"local://{folder}", resources={"cpu": 1, "cell_cpu": 2})
    refused = run_cli("launch", sweep)
    assert refused.code == 2, refused
    assert "name an MLflow server with tracking.uri" in refused.err
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = run_cli("launch", sweep, f"tracking.uri={uri}")
    assert done.code == 0, done
    assert "1 of 1 cells done, 0 failed, 0 not run" in done.out
    results = find_sweep(f"local://{folder}", "tiny")
    (record,) = results.records()
    (run,) = runs_at(uri)
    assert (run.info.status, run.data.tags["cell"]) == ("FINISHED", record["key"])
    stages = own_stages(results, record["key"])
    threads = {
        name: results.store.read_json(stages[name], "record.json")["environment"]["threads"]
        for name in ("poisoned fine-tune", "unlearn", "evaluate defended")
    }
    assert threads == {"poisoned fine-tune": "1", "unlearn": "2", "evaluate defended": "2"}
    assert results.store.verify() == []
    assert not list(folder.rglob("model.safetensors"))  # dropped
    events = Counter(event["event"] for event in results.journal())
    # 12 shared stages and 5 of the cell
    assert events == {"start": 17, "compute": 17, "end": 17}
    again = run_cli("launch", sweep, f"tracking.uri={uri}", *NOWHERE)
    assert again.code == 0, again
    assert "1 of 1 cells are done already" in again.out
    assert len(results.journal()) == 3 * 17


# Search ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_goes_on_after_its_driver_was_killed(
    make_sweep: Callable[..., Path], place: Workplace, run_cli: Callable[..., Any], cluster: None
) -> None:
    # 3 suggestions x 2 seeds
    sweep = make_sweep(
        optuna={
            "trials": 3,
            "sampler": "tpe",
            "seed": 1,
            "space": {"defense.alpha": {"low": 0.01, "high": 0.1}},
        },
        grid={"seed": [0, 1]},
    )
    study = place.output / "tiny" / "search"
    launch = place.start("launch", sweep)
    wait_for(lambda: list(study.glob("*/*.told.json")), launch)
    launch.process.send_signal(signal.SIGKILL)
    launch.end(60)
    before = {path: path.read_text() for path in study.glob("*/*.json")}
    assert 2 <= len(before) < 6  # a suggestion told, and one or two that were not

    done = run_cli("launch", sweep)
    assert done.code == 0, done
    assert "6 of 6 cells done, 0 failed, 0 not run" in done.out
    assert "best: asr" in done.out
    after = {path: path.read_text() for path in study.glob("*/*.json")}
    assert {path: after[path] for path in before} == before  # the same study, nothing written again
    numbers = ("000000", "000001", "000002")
    assert sorted(path.name for path in after) == sorted(
        f"{number}.{what}.json" for number in numbers for what in ("asked", "told")
    )
    # The study gets the mean over the two seeds.
    records = list(place.results().records())
    for number in numbers:
        asked, told = (
            json.loads(next(study.glob(f"*/{number}.{what}.json")).read_text())
            for what in ("asked", "told")
        )
        alpha = asked["values"]["defense.alpha"]
        pair = [r["metrics"] for r in records if r["varied"]["defense.alpha"] == alpha]
        assert len(pair) == 2
        for name in ("asr", "cacc"):
            assert told[name] == pytest.approx(sum(metrics[name] for metrics in pair) / 2)
    check(
        place.output,
        all_measured(place.results()),
        again=computed(place.output) - Counter(once(place)),
    )

    # Nothing is left: no cluster is asked for.
    again = run_cli("launch", sweep, *NOWHERE)
    assert again.code == 0, again
    assert {path: path.read_text() for path in study.glob("*/*.json")} == after


@pytest.mark.slow
def test_thresholds_are_refined_within_the_budget_and_once(
    make_sweep: Callable[..., Path], place: Workplace, run_cli: Callable[..., Any], cluster: None
) -> None:
    # 25 epochs, so that the tiny victim learns something that a threshold of 0.4 unlearns.
    sweep = make_sweep(
        grid={"defense.alpha": [0.005, 0.4], "seed": [0, 1]},
        train={"epochs": 25, "learning_rate": 2e-3},
        resources=ONE_WORKER,
    )
    refine = ("--refine", "asr", "--refine", "cacc", "--refine-trials")
    done = run_cli("launch", sweep, *refine, 5)
    assert done.code == 0, done
    # 4 cells, and 2 thresholds at 2 seeds: of a budget of 5, a third one would need 6.
    assert "8 of 8 cells done, 0 failed, 0 not run" in done.out
    assert "4 of 5 cells are refined; a higher --refine-trials narrows" in done.out
    assert re.search(
        r"tiny: asr falls from [\d.]+ to [\d.]+ between \S+ and \S+ \(refined with 4", done.out
    )
    results = place.results()
    by_alpha: dict[float, dict[str, list[float]]] = {}
    for record in results.records():
        of = by_alpha.setdefault(record["varied"]["defense.alpha"], {"asr": [], "cacc": []})
        for metric, values in of.items():
            values.append(record["metrics"][metric])
    assert {len(of["asr"]) for of in by_alpha.values()} == {2}
    first, second = sorted(by_alpha.keys() - {0.005, 0.4}, key=lambda alpha: alpha != 0.0447)
    assert first == 0.0447  # sqrt(0.005 x 0.4) = 0.04472
    # The second is in the middle of one of the halves.
    assert second in (0.015, 0.134)  # sqrt(0.005 x 0.0447) = 0.01495, sqrt(0.0447 x 0.4) = 0.1337
    # What was found is the largest change of the means over the two seeds.
    means = {alpha: sum(of["asr"]) / 2 for alpha, of in sorted(by_alpha.items())}
    low, high = max(
        itertools.pairwise(means), key=lambda pair: round(abs(means[pair[0]] - means[pair[1]]), 9)
    )
    (start, a), (end, b) = sorted(((means[t], t) for t in (low, high)), reverse=True)
    assert f"asr falls from {start:.3f} to {end:.3f} between {a:g} and {b:g} (refined" in done.out
    # The models of the two seeds were there until the last threshold had read them; then they went.
    counts = computed(place.output)
    assert counts["poisoned fine-tune"] == counts["exposure round 1"] == 2
    assert counts["unlearn"] == counts["cell"] == 8
    assert not list((place.output / "store").rglob("model.safetensors"))
    check(place.output, all_measured(results))

    # Nothing is left: no cluster is asked for.
    before = journal(place.output)
    again = place.run("launch", sweep, *refine, 5, *NOWHERE)
    assert again.code == 0, again
    assert "8 of 8 cells are done already and are not run again" in again.out
    assert "suggested" not in again.out
    assert "refined with 4 cells" in again.out
    assert journal(place.output) == before


def once(place: Workplace) -> dict[str, int]:
    """Return by name how many stages a sweep has."""
    results = place.results()
    stages = {key: name for cell in results.cells().values() for key, name in cell.stages.items()}
    return {**Counter(stages.values()), "cell": len(results.cells())}


# What the command refuses ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "asked"),
    [
        ("resources.cpu=500", "cpu=500 gpu=0"),
        ("resources.cell_cpu=500", "cpu=500 gpu=0"),
        ("resources.gpu=1", "gpu=1"),
    ],
)
def test_resources_that_no_node_has_are_refused(
    make_sweep: Callable[..., Path],
    place: Workplace,
    run_cli: Callable[..., Any],
    cluster: None,
    override: str,
    asked: str,
) -> None:
    import ray

    if "gpu" in override and ray.cluster_resources().get("GPU", 0):
        pytest.skip("this machine has a GPU")
    done = run_cli("launch", make_sweep(), override)
    assert done.code == 2, done
    assert "error: no node can run a stage with resources" in done.err
    assert asked in done.err
    assert "Traceback" not in done.err
    assert not place.results().store.leases.in_use()


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(
    make_sweep: Callable[..., Path], place: Workplace, free_port: int
) -> None:
    # Ray itself tries for more than five minutes.
    done = place.run("launch", make_sweep(), "--address", f"127.0.0.1:{free_port}", limit=90)
    assert done.code == 2, done
    assert f"error: Ray cluster 127.0.0.1:{free_port} cannot be reached" in done.err
    assert "Traceback" not in done.err
    client = place.run("launch", make_sweep(), "--address", "ray://127.0.0.1:10001", limit=90)
    assert client.code == 2, client
    assert "is Ray Client, which sweeps do not use" in client.err


def test_a_dry_run_touches_nothing(
    make_sweep: Callable[..., Path], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    sweep = make_sweep(grid=ALPHAS)
    done = run_cli("launch", sweep, "--dry-run")
    assert done.code == 0, done
    assert "3 cells: 0 done, 3 to run, 0 failed earlier; 0 refused, 0 duplicates" in done.out
    assert sorted(tmp_path.rglob("*")) == sorted([*before, sweep])
