"""What a run shows: its name, tags, params and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.entities import Metric, Param

from orchestrator.report.marks import joined, marks
from orchestrator.sweep.sections import CONTROL, pins, settings, shown_coordinates
from orchestrator.sweep.tree import flatten

if TYPE_CHECKING:
    pass
# Of a run. MLflow's UI lists no tag that begins with "mlflow.", and these are not for people: which
# record of the cell it is, and its settings, in as many numbered tags as they need.
RECORD_TAG, CELL_TAG = "mlflow.btu.record", "mlflow.btu.cell."
# The folder that a run was written from: people may launch sweeps of one name to one server, and
# the same cell has the same key for all of them. Nobody's runs are another's to remove.
ORIGIN_TAG = "mlflow.btu.origin"
# On our summary run alone: the highest step that it has metrics at.
STEP_TAG = "mlflow.btu.step"
KIND_TAG, TRIAL, SUMMARY = "kind", "trial", "summary"
# Of an experiment: ids of SQLite begin at 1 again in a new file, and a URI changes with a move.
ID_TAG = "btu.id"
# MLflow refuses longer values of params and tags.
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 5000
# The params of a run, short names for columns; beside them there are those that the sweep varies.
# All other settings are in its config.yaml: forty columns that never change hide those that do.
PARAMS = {
    "data.name": "data",
    "victim.name": "victim",
    "attack.name": "attack",
    "attack.poison_rate": "poison_rate",
    "attack.label_mode": "label_mode",
    "defense.name": "defense",
    "defense.preset": "preset",
    "defense.rule": "rule",
    "defense.threshold": "threshold",
    "defense.alpha": "alpha",
    "train.epochs": "epochs",
    "train.learning_rate": "learning_rate",
    "train.batch_size": "batch_size",
    "seed": "seed",
}
# First parts of the names of metrics that are notes on the data, and curves over epochs.
NOTES, CURVES = "data", ("loss", "accuracy")
# Tags that are made here; all others of a run are the record's own.
OWN_TAGS = ("cell", KIND_TAG, CONTROL, "marks", "reason")


def run_name(record: Mapping[str, Any]) -> str:
    """Return what tells the cell from its siblings: ``badnets poison_rate=0.1 seed=0``."""
    config, varied = record["config"], shown_coordinates(record["varied"])
    parts = [
        f"{key.split('.')[-1]}={value}" for key, value in varied.items() if key != "attack.name"
    ]
    return " ".join([config["attack"]["name"], *parts])


def run_tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is told apart and found by, and what speaks against reading it."""
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
    """Return what `MlflowSource` needs of a cell and neither params nor metrics hold exactly."""
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
    """Return what a cell is: ``Attack **badnets** at rate 0.1, defense **btu** (...), seed 0``."""
    attack, defense = config["attack"], config.get("defense", {})
    knobs = [
        f"{name} {defense[name]}"
        for name in ("preset", "rule", "threshold", "alpha")
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
    # A key that is not set would only be an empty column in the runs table.
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


def _metric_name(name: str) -> str:
    return name.replace(" ", "_").replace("(", "").replace(")", "").replace("-", "_")


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
