"""Logged models in MLflow, of cells whose models the store keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published import NAME, Output, empty_database, forget
from synthetic import config, shelve

from btu.errors import UserError
from orchestrator.results.folder import Results
from orchestrator.store.store import Store

__all__ = ["empty_database"]

# What `Tracker` asks of MLflow for a run that it need not look up, and then for its model.
RUN = ("create_run", "log_artifacts", "log_inputs", "log_batch", "set_terminated")
MODEL = ("create_logged_model", "log_outputs", "finalize_logged_model")
ROWS = "d" * 24
# ASR by seed, and the undefined precision of a cell that flags nothing.
ASR = {0: 0.75, 1: 0.25, 2: 0.5}
UNDEFINED = 1


def model_key(seed: int) -> str:
    return f"{seed + 100:024x}"


class Made:
    """A sweep with a finished cell per seed, and its models in the store."""

    def __init__(self, folder: Path, database: Path, *, keep: bool = True) -> None:
        self.output = Output(folder, database)
        shelve(
            folder,
            [
                (
                    {**config(seed=seed), "victim": {"name": "offline"}, "data": {"name": "sst2"}},
                    {
                        "asr": asr, "cacc": 0.75, "undefended_asr": 1.0,
                        **({"detection_precision": math.nan} if seed == UNDEFINED else {}),
                    },
                )
                for seed, asr in ASR.items()
            ],
            NAME,
            tokens=40,
        )  # fmt: skip
        self.results = Results(str(folder), NAME)
        plan = folder / NAME / "plans" / "plan.json"
        listed = json.loads(plan.read_text())
        listed |= {"keep": "models" if keep else "results", "stages": {ROWS: {"name": "poison"}}}
        for seed, cell in enumerate(listed["cells"]):
            cell |= {"varied": {"seed": seed, "attack.poison_rate": 0.1}, "stages": [ROWS]}
            if keep:
                cell["model"] = model_key(seed)
            self.publish(seed)
        plan.write_text(json.dumps(listed))

    def publish(self, seed: int) -> None:
        store = self.results.store
        made = store.workspace(model_key(seed))
        (made / "model").mkdir()
        (made / "model" / "model.safetensors").write_bytes(b"weights")
        (made / "record.json").write_text("{}")
        store.publish(model_key(seed), made, "tune", {})

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.output.uri)

    @property
    def experiment(self) -> str:
        return str(self.client.get_experiment_by_name(NAME).experiment_id)

    def record(self, seed: int) -> dict[str, Any]:
        (found,) = [r for r in self.results.records() if r["config"]["seed"] == seed]
        return found

    def log(self, seed: int, *, keep: bool = True, fresh: bool = True) -> bool:
        """Write a cell's run as its worker does."""
        from orchestrator.tracking.experiment import experiment
        from orchestrator.tracking.writer import Tracker

        tracker = Tracker(
            self.output.uri, experiment(self.output.uri, NAME), self.results, fresh=fresh
        )
        record = self.record(seed)
        folder = self.results.store.fetch(record["key"])
        return tracker.log(record, folder, ROWS, model_key(seed) if keep else "")

    def models(self, metric: str = "asr", **order: Any) -> list[Any]:
        by = [{"field_name": f"metrics.{metric}", **order}]
        return list(self.client.search_logged_models([self.experiment], order_by=by))

    def runs(self) -> dict[int, Any]:
        """Return the active runs of cells by seed, and fail if a cell has two."""
        found = self.client.search_runs([self.experiment], "tags.kind = 'trial'")
        by_seed = {int(run.data.params["seed"]): run for run in found}
        assert len(found) == len(by_seed)
        return by_seed

    def whole(self) -> None:
        """Check that each cell has one finished run with one model, which has all its metrics."""
        runs = self.runs()
        assert {seed: run.info.status for seed, run in runs.items()} == dict.fromkeys(
            ASR, "FINISHED"
        )
        models = {model.source_run_id: model for model in self.models()}
        assert len(models) == len(self.models()) == len(ASR)
        for seed, run in runs.items():
            model = models[run.info.run_id]
            assert str(model.status) == "READY"
            metrics = {metric.key: metric.value for metric in model.metrics}
            assert len(metrics) == len(model.metrics)
            assert metrics["asr"] == ASR[seed]
            assert model.model_id in {out.model_id for out in run.outputs.model_outputs}


@pytest.fixture
def made(tmp_path: Path, empty_database: Path) -> Made:
    forget()
    return Made(tmp_path / "runs", empty_database)


def cut(patch: pytest.MonkeyPatch, name: str, *, after: bool) -> None:
    """Have the process end before, or after, MLflow carries out a request."""
    import mlflow

    real = getattr(mlflow.MlflowClient, name)

    def die(*values: Any, **more: Any) -> None:
        if after:
            real(*values, **more)
        raise ConnectionError("the worker died")

    patch.setattr(mlflow.MlflowClient, name, die)


# What a model is called and has ----------------------------------------------------------------


def test_a_model_is_named_after_its_run_within_mlflows_rules() -> None:
    from mlflow.utils.validation import _validate_logged_model_name

    from orchestrator.tracking.models import model_name

    varied = {"attack.poison_rate": 0.1, "defense.threshold": 4.5, "seed": 2}
    record = {"config": {"attack": {"name": "badnets"}}, "varied": varied}
    name = model_name(record)
    assert name == "badnets poison_rate=0_1 threshold=4_5 seed=2"
    _validate_logged_model_name(name)
    hard = {**record, "varied": {"victim.name": "org/a:b%\"c'" + "x" * 600}}
    assert model_name(hard).startswith("badnets name=org_a_b__c_xxx")
    assert len(model_name(hard)) == 500  # the column of the database
    _validate_logged_model_name(model_name(hard))


def test_the_place_of_a_model_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.store.marker import Marker
    from orchestrator.store.tree import FileFact
    from orchestrator.tracking.models import kept, model_tags

    files = {"model/model.safetensors": FileFact(1, "0" * 64)}
    marker = Marker("a" * 24, "b" * 32, "tune", files, {}, 0.0)

    class Remote:
        location = "s3://me:secret@bucket/runs/store"

        def marker(self, key: str) -> Marker | None:
            return marker if key == marker.key else None

    store: Any = Remote()
    found = kept(store, marker.key)
    assert found is not None
    assert found.location == f"s3://bucket/runs/store/entries/{'a' * 24}/{'b' * 32}/model"
    record = {"key": "c" * 24, "sweep": "tiny", "config": {"victim": {"name": "offline"}}}
    tags = model_tags(record, found)
    assert (tags["stage"], tags["cell"]) == ("a" * 24, "c" * 24)
    assert "secret" not in "".join(tags.values())
    assert found.location in tags["mlflow.note.content"]
    assert kept(store, "d" * 24) is None
    assert kept(store, "") is None


def test_a_model_that_was_dropped_is_not_kept(tmp_path: Path) -> None:
    from orchestrator.tracking.models import kept

    store = Store(str(tmp_path))
    store.prepare()
    folder = store.workspace("a" * 24)
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "record.json").write_text("{}")
    store.publish("a" * 24, folder, "tune", {})
    found = kept(store, "a" * 24)
    assert found is not None
    assert (Path(found.location) / "model.safetensors").read_bytes() == b"weights"
    store.drop("a" * 24)
    assert kept(store, "a" * 24) is None


# In MLflow -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_are_ranked_by_the_metrics_of_their_cells(made: Made) -> None:
    assert made.output.launch() == []
    made.whole()

    def seeds(metric: str, **order: Any) -> list[int]:
        return [int(model.params["seed"]) for model in made.models(metric, **order)]

    best_first = sorted(ASR, key=lambda seed: ASR[seed])
    assert seeds("asr", ascending=True) == best_first
    assert seeds("asr", ascending=False) == best_first[::-1]
    # An undefined precision is no 0: that model is last in either order.
    for ascending in (True, False):
        assert seeds("detection_precision", ascending=ascending)[-1] == UNDEFINED
    # The rows of seed 0 alone: MLflow sorts the models without them behind.
    rows = {"dataset_name": "sst2 badnets 0.1 seed 0", "dataset_digest": ROWS}
    assert seeds("asr", ascending=True, **rows)[0] == 0
    query = [{"dataset_name": rows["dataset_name"]}]
    found = made.client.search_logged_models([made.experiment], "metrics.asr > 0.5", query)
    assert [int(model.params["seed"]) for model in found] == [0]


@pytest.mark.slow
def test_a_model_leads_to_its_cell_and_its_weights(made: Made) -> None:
    assert made.output.launch() == []
    (model,) = [model for model in made.models() if model.params["seed"] == "0"]
    assert model.name == "badnets seed=0 poison_rate=0_1"
    assert model.params == {
        "attack": "badnets", "poison_rate": "0.1", "defense": "btu", "threshold": "4.5",
        "seed": "0", "victim": "offline",
    }  # fmt: skip
    assert model.tags["stage"] == model_key(0)
    assert model.tags["cell"] == made.record(0)["key"]
    weights = Path(model.tags["location"]) / "model.safetensors"
    assert weights.read_bytes() == b"weights"
    assert {metric.key for metric in model.metrics} == {"asr", "cacc", "detection_precision"}
    # A second copy of the weights is what this avoids.
    assert not list((made.output.folder / "mlartifacts").rglob("*.safetensors"))


@pytest.mark.slow
def test_without_kept_models_nothing_more_is_asked(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    forget()
    made = Made(tmp_path / "runs", empty_database, keep=False)
    asked: list[str] = []
    watched = (*RUN, *MODEL, "search_logged_models", "search_runs", "get_run", "set_tag")

    def watch(name: str) -> Callable[..., Any]:
        real = getattr(mlflow.MlflowClient, name)

        def ask(*values: Any, **more: Any) -> Any:
            asked.append(name)
            return real(*values, **more)

        return ask

    with monkeypatch.context() as patch:
        for name in watched:
            patch.setattr(mlflow.MlflowClient, name, watch(name))
        assert made.log(0, keep=False)
        assert asked == list(RUN)
        # The store has the model, but the sweep is not to keep it: it may go at any moment.
        assert made.output.launch() == []
        assert not {*MODEL, "search_logged_models"} & set(asked)
        assert made.models() == []
        assert set(made.runs()) == set(ASR)
        asked.clear()
        assert made.log(0)  # kept: these are added, and no others
        assert sorted(asked) == sorted((*RUN, *MODEL))


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", [*RUN, *MODEL])
def test_a_worker_that_dies_between_two_requests_leaves_no_second_model(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    with monkeypatch.context() as patch:
        cut(patch, name, after=after)
        with pytest.raises(ConnectionError):
            made.log(0)
    assert made.output.launch() == []
    made.whole()
    models = {model.model_id for model in made.models()}
    runs = {run.info.run_id for run in made.runs().values()}
    # Once more, nothing is left to do.
    assert made.output.launch() == []
    assert not made.log(0, fresh=False)
    assert {model.model_id for model in made.models()} == models
    assert {run.info.run_id for run in made.runs().values()} == runs
    made.whole()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["create_logged_model", "log_outputs", "log_batch", MODEL[-1]])
def test_a_run_from_before_models_were_kept_gets_one(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    made.log(0, keep=False)
    (run,) = made.runs().values()
    assert made.models() == []
    with monkeypatch.context() as patch:
        cut(patch, name, after=after)
        with pytest.raises(ConnectionError):
            made.log(0, fresh=False)
    assert made.output.launch() == []
    made.whole()
    assert made.runs()[0].info.run_id == run.info.run_id
    history = made.client.get_metric_history(run.info.run_id, "asr")
    assert [metric.value for metric in history] == [ASR[0]]


@pytest.mark.slow
def test_a_model_that_the_store_no_longer_has_is_not_logged(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking.writer import Tracker

    made.results.store.drop(model_key(0))
    assert made.output.launch() == []
    assert sorted(int(model.params["seed"]) for model in made.models()) == [1, 2]
    # One that goes later stays in MLflow, with the key of its stage.
    made.results.store.drop(model_key(1))
    # Neither run lacks anything: no cell is looked at again.
    monkeypatch.setattr(Tracker, "log", lambda *_, **__: 1 / 0)
    assert made.output.launch() == []
    assert sorted(model.tags["stage"] for model in made.models()) == [model_key(1), model_key(2)]


@pytest.mark.slow
def test_a_server_that_was_asked_twice_has_one_model_in_the_end(made: Made) -> None:
    assert made.output.launch() == []
    stays = {model.model_id for model in made.models()}
    first = made.models()[0]
    made.client.create_logged_model(
        made.experiment, "twice", source_run_id=first.source_run_id, tags=first.tags
    )
    theirs = made.client.create_logged_model(made.experiment, "by hand")  # none of our business
    assert made.output.launch() == []
    assert {model.model_id for model in made.models()} == {*stays, theirs.model_id}


@pytest.mark.slow
def test_a_deleted_run_takes_its_model_along(made: Made, run_cli: Callable[..., Any]) -> None:
    def sync(*options: str) -> Any:
        forget()
        done = run_cli("sync", NAME, "--output", made.output.folder, *options)
        forget()
        assert done.code == 0, done
        return done

    assert made.output.launch() == []
    run = made.runs()[0].info.run_id
    made.client.delete_run(run)
    sync("--respect-deleted")
    assert sorted(int(model.params["seed"]) for model in made.models()) == [1, 2]
    # It gets another one, if it is restored or written again.
    made.client.restore_run(run)
    assert sync().out.startswith("1 runs written")
    made.whole()
    made.client.delete_run(run)
    assert sync().out.startswith("1 runs written")
    made.whole()
    assert made.runs()[0].info.run_id != run


@pytest.mark.slow
def test_a_deleted_model_is_written_again_unless_that_is_respected(
    made: Made, run_cli: Callable[..., Any]
) -> None:
    assert made.output.launch() == []
    runs = made.runs()
    gone = made.models()[0]
    made.client.delete_logged_model(gone.model_id)
    forget()
    done = run_cli("sync", NAME, "--output", made.output.folder, "--respect-deleted")
    assert done.out.startswith("0 runs written"), done
    assert len(made.models()) == len(ASR) - 1
    assert made.output.launch() == []
    made.whole()
    assert {s: r.info.run_id for s, r in made.runs().items()} == {
        s: r.info.run_id for s, r in runs.items()
    }


@pytest.mark.slow
def test_models_of_a_copied_folder_are_its_own(made: Made, tmp_path: Path) -> None:
    import shutil

    assert made.output.launch() == []
    before = [model.artifact_location for model in made.models()]
    assert all(str(made.output.folder) in place for place in before)
    forget()
    shutil.copytree(made.output.folder, tmp_path / "copy")
    copy = Output(tmp_path / "copy")
    assert any("moved or copied" in line or "was" in line for line in copy.launch())
    table = "SELECT artifact_location FROM logged_models"
    places = [place for (place,) in copy.rows(table)]
    assert sorted(places) == sorted(
        place.replace(str(made.output.folder), str(copy.folder)) for place in before
    )
    assert sorted(place for (place,) in made.output.rows(table)) == sorted(before)


@pytest.mark.slow
def test_a_store_of_another_user_is_refused_before_a_model_is_logged(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import elsewhere

    assert made.output.launch() == []
    made.output.change("UPDATE experiments SET artifact_location = 'file:///tmp/theirs'")
    monkeypatch.setattr(elsewhere, "is_own", lambda path: False)
    forget()
    with pytest.raises(UserError, match="other users can write"):
        made.log(0)
    assert len(made.models()) == len(ASR)
