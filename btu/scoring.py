"""The last stage of a cell: it scores the defense's findings against the hidden mask.

Planning declares this stage for every cell, so importing this module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from btu.attacked import mask_of
from btu.data.spec import as_written
from btu.drift_plot import drift_plot
from btu.findings import Suspects
from btu.metrics import (
    DetectionScore,
    area_under_roc,
    average_precision,
    row_detection,
    token_detection,
)
from btu.recipe import scores_of
from btu.result_files import CONFIG, FLAGGED, PLOT, RESULT, ROWS, TOKENS, dumps
from btu.stage_files import load_encoded, load_victim
from btu.stages import StageRun, read_record, stage
from btu.stealth import STEALTH
from btu.types import BoolArray
from btu.victims import Victim, VictimSpec

if TYPE_CHECKING:
    import pandas as pd

    from btu.training import Encoded

# Prefix of a model's metrics -> the stage that scored it.
SCORED = {"": "evaluate defended", "undefended_": "evaluate undefended", "tuned_": "evaluate tuned"}


@stage(version=4, id="orchestrator.trial:score_cell")
def score_cell(run: StageRun) -> dict[str, Any]:
    """Assemble a cell's result from its stages; only here do findings meet the hidden mask.

    Writes ``result.json`` (metrics, history and tags), a table and a plot of the tokens, a table of
    the rows, and the config.
    """
    records = {name: read_record(folder) for name, folder in run.inputs.items()}
    facts = {name: record["facts"] for name, record in records.items()}
    poisoned = facts["poison"]
    mask = mask_of(run.inputs["poison"])
    train = load_encoded(run.inputs["training rows"] / "train.safetensors")
    trigger = facts["evaluation rows"]["trigger"]
    trigger_ids = None if trigger is None else frozenset(trigger)
    # Without poisoned rows there is nothing to find: the trigger's words are ordinary words.
    truth = trigger_ids if trigger_ids is None or mask.any() else frozenset()
    defended = run.config["defended"]
    suspects = Suspects.load(run.inputs[defended], facts[defended])

    metrics: dict[str, float] = {}
    for prefix, scored in SCORED.items():
        metrics |= scores_of(facts[scored]).as_metrics(prefix)
    metrics |= detection_metrics(suspects, mask, truth, train)
    if suspects is not None and suspects.target is not None:
        # Without poison there is no target.
        named = float(suspects.target == facts["evaluation rows"]["target"])
        metrics["target_found"] = named if mask.any() else math.nan
    # What the defense measured on rows that it may see, then what its screen did.
    measured = facts[defended].get("measured", {})
    if known := sorted(measured.keys() & metrics.keys()):
        raise ValueError(
            f"stage '{defended}' measures {known}, which only the scorer may; rename them there."
        )
    metrics |= measured
    metrics |= facts[SCORED[""]].get("measured", {})
    metrics |= {
        "poison_rate_reached": poisoned["poison_rate"],
        "poisoned_rows": poisoned["poisoned_rows"],
        "relabeled_rows": poisoned["relabeled_rows"],
        # Results of versions without cover rows do not name them.
        **({"cover_rows": poisoned["cover_rows"]} if poisoned.get("cover_rows") else {}),
        "truncated_rows": facts["training rows"]["truncated_rows"],
    }
    metrics |= facts.get(STEALTH, {})
    if trigger_ids is not None:
        # The victim does not see a trigger beyond max_length; these counts tell how many it misses.
        triggered = load_encoded(run.inputs["evaluation rows"] / "triggered.safetensors")
        metrics["triggers_cut_train"] = int((mask & ~train.holds(list(trigger_ids))).sum())
        metrics["triggers_cut_eval"] = int((~triggered.holds(list(trigger_ids))).sum())
    metrics |= {f"seconds/{name}": record["seconds"] for name, record in records.items()}
    # The cost of the cell alone: a shared stage counts in every cell that needs it. Stages are
    # counted by key, because without a defense one evaluation has two names.
    metrics["seconds"] = sum({r["key"]: r["seconds"] for r in records.values()}.values())
    cost = run.where["cost"]
    metrics["seconds_defense"] = sum(
        {records[name]["key"]: records[name]["seconds"] for name in cost["stages"]}.values()
    )
    metrics["clean_rows_used"] = cost["clean_rows"]

    config = run.where["config"]
    victim = load_victim(VictimSpec(**config["victim"]), facts["training rows"]["classes"])
    tokens = token_table(suspects, victim, truth)
    started, ended = _span(records.values())
    result = {
        "config": config,
        "started": started,
        "ended": ended,
        "metrics": metrics,
        "history": [epoch for record in records.values() for epoch in record["history"]],
        "notes": run.where["notes"],
        "label_names": poisoned["label_names"],
        "tags": {
            **_environment(records.values()),
            "precision": _precisions(records.values()),
            **run.where["revisions"],
            "labels": " ".join(poisoned["label_names"]),
        },
    }
    (run.folder / RESULT).write_text(dumps(result))
    (run.folder / CONFIG).write_text(yaml.safe_dump(as_written(config), sort_keys=False))
    tokens.to_parquet(run.folder / TOKENS, index=False)
    row_table(suspects, mask, train).to_parquet(run.folder / ROWS, index=False)
    flagged_table(tokens).to_json(run.folder / FLAGGED, orient="records", indent=1)
    drift_plot(tokens, run.folder / PLOT)
    return {name: metrics[name] for name in ("asr", "cacc")}


def _span(records: Collection[Mapping[str, Any]]) -> tuple[float, float]:
    """Return when a cell began, with its own first stage, and when it ended: Unix seconds."""
    # Not those that were taken over from an equal stage: they were computed for another cell.
    here = [record for record in records if "computed_as" not in record]
    begun = [record["started"] for record in here if record["kind"] == "cell"]
    if not begun:
        # Where all of its own was taken over, it began with the last stage before.
        first = min if len(here) == len(records) else max
        begun = [first(record["started"] for record in here)]
    return min(begun), max(record["started"] + record["seconds"] for record in here)


def detection_metrics(
    suspects: Suspects | None, mask: BoolArray, truth: frozenset[int] | None, train: Encoded
) -> dict[str, float]:
    """Score a defense's findings: tokens against the trigger, rows against the hidden mask."""
    if suspects is None:
        return {}
    found: dict[str, float] = {}
    taken = suspects.taken
    if suspects.flagged is not None:
        found["flagged"] = len(suspects.flagged)
        found |= token_detection(suspects.flagged, truth).as_metrics("detection")
        # A defense that flags tokens flags the rows with these tokens.
        taken = train.holds(suspects.flagged) if taken is None else taken
    if taken is not None:
        found |= row_detection(taken, mask).as_metrics("sample")
    if suspects.taken is not None:
        found["rows_flagged"] = int(suspects.taken.sum())
    if suspects.scores is not None:
        found["detection_auprc"] = average_precision(suspects.scores, truth)
    if suspects.rows is not None:
        found["sample_auroc"] = area_under_roc(suspects.rows, mask)
        over = row_detection(suspects.rows >= suspects.row_bar, mask)
        if math.isnan(suspects.row_bar):
            over = DetectionScore(0, 0, None)  # without a bar no row can be missed
        found |= over.as_metrics("suspicion")
    return found


def row_table(suspects: Suspects | None, mask: BoolArray, train: Encoded) -> pd.DataFrame:
    """Return a table with a row per training row.

    Columns, those after the first only if the defense provides them:

    poisoned: the hidden mask.
    suspicion: the defense's score of the row.
    taken: whether the defense isolated or removed the row.
    top: the highest score among the row's tokens. A row has a flagged token if its `top` reaches
        the bar of the threshold.
    """
    import pandas as pd

    columns: dict[str, Any] = {"poisoned": mask}
    if suspects is not None and suspects.rows is not None:
        columns["suspicion"] = suspects.rows
    if suspects is not None and suspects.taken is not None:
        columns["taken"] = suspects.taken
    if suspects is not None and suspects.scores is not None:
        scores = np.where(np.isnan(suspects.scores), -np.inf, suspects.scores)
        top = np.full(len(mask), -np.inf)
        row = np.repeat(np.arange(len(mask)), train.host_lengths)
        np.maximum.at(top, row, scores[train.ids.numpy()])
        columns["top"] = top
    return pd.DataFrame(columns)


def token_table(
    suspects: Suspects | None, victim: Victim, truth: frozenset[int] | None
) -> pd.DataFrame:
    """Return a table with a row per candidate or flagged token, from what the defense found."""
    import pandas as pd

    found = suspects or Suspects()
    flagged = list(found.tokens)
    if found.scores is None:
        ids = np.asarray(sorted(flagged), dtype=np.int64)
        scores = np.full(len(ids), np.nan)
    else:
        known = ~np.isnan(found.scores)
        known[flagged] = True
        ids = np.flatnonzero(known)
        scores = found.scores[ids]
    columns: dict[str, Any] = {
        "token_id": ids,
        "token": victim.tokenizer.convert_ids_to_tokens(ids.tolist()),
        "score": scores,
        "flagged": np.isin(ids, flagged),
        "trigger": np.isin(ids, list(truth or ())),
    }
    columns |= {name: values[ids] for name, values in found.table.items()}
    return pd.DataFrame(columns)


def flagged_table(tokens: pd.DataFrame) -> pd.DataFrame:
    """Return the flagged tokens, most suspicious first."""
    return tokens[tokens.flagged].sort_values(["score", "token_id"], ascending=[False, True])


def _environment(records: Any) -> dict[str, str]:
    """Return what the stages were computed with; several values if stages differ."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in record["environment"].items():
            values.setdefault(name, {})[value] = None
    return {name: ", ".join(sorted(several)) for name, several in values.items()}


def _precisions(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the precision of the stages; several if they ran on different hardware."""
    return ", ".join(sorted({name for record in records for name in record["precisions"]}))
