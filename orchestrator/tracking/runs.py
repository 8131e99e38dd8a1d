"""The name, tags, params and metrics of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from btu.rules.base import THRESHOLD_KEYS, THRESHOLD_NAMES
from orchestrator.report.marks import joined, marks
from orchestrator.sweep.sections import CONTROL, pins, settings, shown_coordinates
from orchestrator.sweep.tree import flatten

# Run tags for our own use. The "mlflow." prefix hides them in the UI. They hold the record id and
# the cell's settings, split over numbered tags.
RECORD_TAG, CELL_TAG = "mlflow.btu.record", "mlflow.btu.cell."
# The output folder that a run was written from. Several people may launch sweeps of one name to one
# server, and equal cells have equal keys: only runs with our own origin may be removed.
ORIGIN_TAG = "mlflow.btu.origin"
# Only on the summary run: the highest step of its metrics.
STEP_TAG = "mlflow.btu.step"
KIND_TAG, TRIAL, SUMMARY = "kind", "trial", "summary"
# An experiment's id of ours: MLflow's ids start at 1 in each SQLite file, a move changes the URI.
ID_TAG = "btu.id"
# Runs per request: the answer has to arrive within MLFLOW_HTTP_REQUEST_TIMEOUT.
PAGE = 250
# MLflow refuses longer params and tags.
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 5000
# The params of a run by config key, with short column names. The sweep's varied keys are added.
# All other settings are in config.yaml: forty constant columns would hide those that vary.
PARAMS = {
    "data.name": "data",
    "victim.name": "victim",
    "attack.name": "attack",
    "attack.poison_rate": "poison_rate",
    "attack.label_mode": "label_mode",
    "defense.name": "defense",
    "defense.preset": "preset",
    "defense.rule": "rule",
    **dict(zip(THRESHOLD_KEYS, THRESHOLD_NAMES, strict=True)),
    "train.epochs": "epochs",
    "train.learning_rate": "learning_rate",
    "train.batch_size": "batch_size",
    "seed": "seed",
}
# First parts of metric names: notes on the data, and curves over epochs.
NOTES, CURVES = "data", ("loss", "accuracy")
# Notes on the data that MLflow shows with the training rows.
PROFILE = ("rows_train", "rows_clean", "rows_eval")
# Tags that this module adds; a run's other tags are those of the record.
OWN_TAGS = ("cell", KIND_TAG, CONTROL, "marks", "reason")


def run_name(record: Mapping[str, Any]) -> str:
    """Return the cell's attack and coordinates: ``badnets poison_rate=0.1 seed=0``."""
    config, varied = record["config"], shown_coordinates(record["varied"])
    parts = [
        f"{key.split('.')[-1]}={value}" for key, value in varied.items() if key != "attack.name"
    ]
    return " ".join([config["attack"]["name"], *parts])


def run_tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tags by which a run is found, and its marks (`orchestrator.report.marks`)."""
    varied, found = record["varied"], marks(record)
    return {
        "mlflow.source.name": "btu",
        "mlflow.note.content": _run_note(record),
        **_cell_tags(record),
        KIND_TAG: TRIAL,
        "cell": record["key"],
        **({CONTROL: varied[CONTROL]} if CONTROL in varied else {}),
        **({"marks": joined(found)} if found else {}),
        **record["tags"],
    }


def _cell_tags(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what `MlflowSource` needs of a cell and params and metrics do not keep exactly."""
    names = {_metric_name(name): name for name in record.get("metrics", {})}
    cell = {
        "config": record["config"],
        "varied": record["varied"],
        "names": {logged: name for logged, name in names.items() if logged != name},
        **({"stage": record["stage"]} if "stage" in record else {}),
    }
    text = json.dumps(cell, separators=(",", ":"))
    parts = range(0, len(text), TAG_CHARACTERS)
    return {f"{CELL_TAG}{i}": text[at : at + TAG_CHARACTERS] for i, at in enumerate(parts)}


def _run_note(record: Mapping[str, Any]) -> str:
    command = f"btu trial sweep.yaml {pins(record['varied'])}".rstrip()
    return (
        f"{_in_words(record['config'])}. Cell `{record['key']}` of sweep `{record['sweep']}`.\n\n"
        "Again, in one process: `btu trial config.yaml`, with the artifact; or "
        f"`{command}`, with that of the run `{SUMMARY}`."
        + "".join(f"\n\n**{mark.name}**: {mark.detail}." for mark in marks(record))
    )


def _in_words(config: Mapping[str, Any]) -> str:
    """Describe a cell: ``Attack **badnets** at rate 0.1, defense **btu** (...), seed 0``."""
    attack, defense = config["attack"], config.get("defense", {})
    knobs = [
        f"{name} {defense[name]}"
        for name in ("preset", "rule", *THRESHOLD_NAMES)
        if defense.get(name) not in (None, "")
    ]
    where = [f"{role} {config[role]['name']}" for role in ("data", "victim") if role in config]
    parts = [
        f"Attack **{attack['name']}** at rate {attack['poison_rate']}",
        f"defense **{defense.get('name', 'none')}**" + (f" ({', '.join(knobs)})" if knobs else ""),
        *where,
        f"seed {config.get('seed', 0)}",
    ]
    return ", ".join(parts)


def run_params(record: Mapping[str, Any]) -> list[Param]:
    flat = flatten(record["config"])
    names = {**PARAMS, **{key: PARAMS.get(key, key) for key in settings(record["varied"])}}
    # An unset key would only add an empty column to the runs table.
    return [
        Param(name, str(flat[key])[:PARAM_CHARACTERS])
        for key, name in names.items()
        if flat.get(key) not in (None, "")
    ]


def run_metrics(record: Mapping[str, Any]) -> list[Metric]:
    ended = milliseconds(record["ended"])
    metrics = [
        Metric(_metric_name(name), float(value), ended, 0)
        for name, value in record["metrics"].items()
    ]
    metrics += [
        Metric(f"{NOTES}/{name}", float(value), ended, 0) for name, value in record["notes"].items()
    ]
    clock = record["started"]
    for epoch in record["history"]:
        clock += epoch["seconds"]
        stage = _metric_name(epoch["stage"])
        for name in CURVES:
            metrics.append(
                Metric(f"{name}/{stage}", epoch[name], milliseconds(clock), epoch["epoch"])
            )
    return metrics


def training_input(record: Mapping[str, Any], digest: str) -> DatasetInput:
    """Return the training rows of a cell as an input of its run.

    Cells with equal rows have an equal name and digest: MLflow filters runs by both.

    digest: identifies the rows, poisoned (the key of the stage that poisons them).
    """
    config, notes = record["config"], record.get("notes", {})
    data, attack = config.get("data", {}).get("name", "data"), config["attack"]
    poison = {
        name: attack[name]
        for name in ("name", "poison_rate", "label_mode", "target_label")
        if name in attack
    }
    # Without poison all attacks have the same rows.
    how = [attack["name"], str(attack.get("poison_rate")), f"seed {config.get('seed', 0)}"]
    poisoned = attack.get("poison_rate") != 0
    dataset = Dataset(
        name=" ".join([data, *(how if poisoned else ["unpoisoned"])]),
        digest=digest,
        source_type="btu",
        source=json.dumps({"data": config.get("data"), "attack": poison if poisoned else None}),
        profile=json.dumps({name: notes[name] for name in PROFILE if name in notes}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _metric_name(name: str) -> str:
    return name.replace(" ", "_").replace("(", "").replace(")", "").replace("-", "_")


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
