"""Logged models: what MLflow ranks, one for the run of each cell whose model the store keeps.

A logged model names the place of the weights. They are not uploaded: the store has them, and a
second copy of a model of 7B parameters would take as long and as much room as the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import mlflow
from mlflow.entities import Dataset, LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run

from btu.redaction import shown_url
from btu.rules.base import THRESHOLD_NAMES
from orchestrator.store.places import HEAVY
from orchestrator.store.store import Store
from orchestrator.tracking.runs import (
    ORIGIN_TAG,
    PAGE,
    TAG_CHARACTERS,
    run_metrics,
    run_name,
    run_params,
)

# MLflow refuses the characters in a model's name, and databases a longer one.
REFUSED_CHARACTERS, NAME_CHARACTERS = "/:.%\"'", 500
# `mlflow.entities.LoggedModel.model_type` of all of them.
MODEL_TYPE = "defended"
# The metrics that models are ranked by.
RANKED = ("asr", "cacc", "ftr", "detection_precision")
# The params of a model, by their names in the run.
MODEL_PARAMS = ("victim", "attack", "poison_rate", "defense", *THRESHOLD_NAMES, "seed")


class Kept(NamedTuple):
    """The model of a stage that the store keeps.

    stage: its key.
    location: the folder of the model, or its URL without credentials.
    """

    stage: str
    location: str


def kept(store: Store, stage: str) -> Kept | None:
    """Return the model of a stage; None if the store does not have it, or no longer.

    stage: its key; empty if the cell's sweep does not keep models.
    """
    marker = store.marker(stage) if stage else None
    if marker is None or not any(name.startswith(HEAVY) for name in marker.files):
        return None
    return Kept(stage, shown_url(f"{store.location}/{marker.folder}/{HEAVY.rstrip('/')}"))


def model_name(record: Mapping[str, Any]) -> str:
    """Return the name of a cell's run with "_" for what MLflow refuses in a model's name."""
    refused = dict.fromkeys(map(ord, REFUSED_CHARACTERS), "_")
    return run_name(record).translate(refused)[:NAME_CHARACTERS]


def model_tags(record: Mapping[str, Any], model: Kept) -> dict[str, str]:
    """Return the tags that lead from a logged model to its cell and to its weights."""
    victim = record["config"].get("victim", {}).get("name", "the victim")
    note = (
        f"The model that cell `{record['key']}` of sweep `{record['sweep']}` ends with. MLflow has "
        f"no copy of its weights. They are in the store, as stage `{model.stage}`, in\n\n"
        f"    {model.location}\n\n"
        "`transformers.AutoModelForSequenceClassification.from_pretrained` loads that folder (of "
        f"an object store: a copy of it); the tokenizer is that of `{victim}`."
    )
    tags = {"mlflow.note.content": note, "stage": model.stage, "location": model.location}
    return {"cell": record["key"], **{k: v[:TAG_CHARACTERS] for k, v in tags.items()}}


def linked(metrics: Iterable[Metric], model_id: str, rows: Dataset | None) -> list[Metric]:
    """Return the metrics of a run, those in `RANKED` as the model's too.

    rows: the training rows of the cell, which the model's metrics name; None if not known.
    """
    found = []
    for metric in metrics:
        # MLflow would store an undefined metric of a model as 0, and rank the model by that.
        if metric.key in RANKED and not math.isnan(metric.value):
            name, digest = (None, None) if rows is None else (rows.name, rows.digest)
            of_run = (metric.key, metric.value, metric.timestamp, metric.step)
            metric = Metric(*of_run, model_id, name, digest)
        found.append(metric)
    return found


class LoggedModels:
    """The logged models of an experiment that were written from one output folder."""

    def __init__(self, client: mlflow.MlflowClient, experiment_id: str, origin: str) -> None:
        """Ask nothing yet. origin: id of the sweep's folder (`Results.origin`)."""
        self._client, self._id, self._origin = client, experiment_id, origin

    def begin(self, run_id: str, record: Mapping[str, Any], model: Kept) -> str:
        """Create the model of a run; return its id. It is PENDING until `finish`."""
        model_id = self._create(run_id, record, model)
        self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id

    def finish(self, model_id: str) -> None:
        """Mark a model as READY: it has everything, its metrics too."""
        self._client.finalize_logged_model(model_id, LoggedModelStatus.READY)

    def complete(
        self, run: Run, record: Mapping[str, Any], model: Kept, rows: Dataset | None
    ) -> bool:
        """Give a run that has everything else the model that it lacks. Return whether it did.

        rows: as for `linked`.
        """
        run_id = run.info.run_id
        models = self._search(f"source_run_id = '{run_id}'")
        if is_ready(models):
            return False
        model_id = chosen(models, run).model_id if models else self._create(run_id, record, model)
        if model_id not in _outputs(run):
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        metrics = linked(run_metrics(record), model_id, rows)
        # MLflow takes a metric again if nothing of it has changed.
        self._client.log_batch(run_id, [metric for metric in metrics if metric.model_id])
        self.finish(model_id)
        return True

    def by_run(self) -> dict[str, list[LoggedModel]]:
        """Return the models by the id of the run that they belong to."""
        found: dict[str, list[LoggedModel]] = {}
        for model in self._search(None):
            found.setdefault(str(model.source_run_id), []).append(model)
        return found

    def remove_strays(self, active: Callable[[], Mapping[str, Run]]) -> None:
        """Remove the models of runs that are gone, and the second one of a run.

        A worker that died left them, or a server that answered too late and was asked again.

        active: returns the runs that are not deleted, by id; called after models were listed, since
            a run is older than its model.
        """
        models = self.by_run()
        runs = active() if models else {}
        for run_id, of_run in models.items():
            run = runs.get(run_id)
            if run is not None and run.info.status == "RUNNING":
                continue  # its worker is at it
            stays = None if run is None else chosen(of_run, run)
            for model in of_run:
                if model is not stays:
                    self._client.delete_logged_model(model.model_id)

    def _create(self, run_id: str, record: Mapping[str, Any], model: Kept) -> str:
        params = {param.key: param.value for param in run_params(record)}
        made = self._client.create_logged_model(
            self._id,
            name=model_name(record),
            source_run_id=run_id,
            tags={**model_tags(record, model), ORIGIN_TAG: self._origin},
            params={name: params[name] for name in MODEL_PARAMS if name in params},
            model_type=MODEL_TYPE,
        )
        return str(made.model_id)

    def _search(self, query: str | None) -> list[LoggedModel]:
        found: list[LoggedModel] = []
        token = None
        while True:
            page = self._client.search_logged_models(
                [self._id], query, max_results=PAGE, page_token=token
            )
            found += [model for model in page if model.tags.get(ORIGIN_TAG) == self._origin]
            token = page.token
            if not token:
                return found


def is_ready(models: Iterable[LoggedModel]) -> bool:
    """Return whether one of the models of a run has everything."""
    return any(model.status == LoggedModelStatus.READY for model in models)


def chosen(models: Sequence[LoggedModel], run: Run) -> LoggedModel:
    """Return the model of a run that stays: a READY one, else one that the run names, else any."""
    named = _outputs(run)
    return max(models, key=lambda m: (is_ready([m]), m.model_id in named, m.model_id))


def was_deleted(models: Iterable[LoggedModel], run: Run) -> bool:
    """Return whether a user deleted the model of a run. models: those of the run that are left."""
    return not list(models) and bool(_outputs(run))


def _outputs(run: Run) -> set[str]:
    """Return the ids of the models that a run names, deleted ones too."""
    return set() if run.outputs is None else {out.model_id for out in run.outputs.model_outputs}
