"""Finished cells without training: scores from a generator, in a store as a launch leaves it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from btu.metrics import average_precision, row_detection, token_detection
from btu.result_files import RESULT, ROWS, TOKENS, dumps
from btu.rules.base import RULES
from btu.seeding import derive_seed
from orchestrator.results.folder import PLANS, SWEEP, Results


def config(
    attack: str = "badnets",
    rate: float = 0.1,
    seed: int = 0,
    rule: str = "contrast",
    threshold: Any = 4.5,
    rounds: list[int] | None = None,
    **defense: Any,
) -> dict[str, Any]:
    """Return the settings of a cell.

    threshold: alpha where the rule is ``top_fraction``. defense: further keys of its section.
    """
    top = rule == "top_fraction"
    return {
        "attack": {"name": attack, "poison_rate": rate},
        "defense": {
            "name": "btu",
            "rule": rule,
            "threshold": None if top else threshold,
            "alpha": threshold if top else None,
            "rounds": rounds or ([1, 2, 3] if top else [3]),
            **defense,
        },
        "seed": seed,
    }


def saved(
    attack: str, rate: float, seed: int, rule: str, tokens: int = 600, rows: int = 400
) -> tuple[pd.DataFrame, pd.DataFrame, int | None]:
    """Return the tokens, the rows and the number of trigger tokens of cells with such scores.

    Three trigger tokens, one of them too rare to be scored; ``style`` has no fixed ones.
    """
    rng = np.random.default_rng(derive_seed(seed, attack, str(rate), rule))
    scores = np.round(np.abs(rng.normal(0, 2.0, tokens)), 2)  # rounded: some are equal
    poisoned = rng.random(rows) < rate
    trigger = np.zeros(tokens, dtype=bool)
    if attack != "style" and poisoned.any():
        trigger[:2] = True
        scores[:2] += 3 + 40 * rate
    if rule == "top_fraction":
        # For a vocabulary twice as large: alpha = rank / vocabulary.
        scores = -(1.0 + np.argsort(np.argsort(-scores, kind="stable"))) / (2 * tokens)
    holds = rng.integers(0, tokens, (rows, 12))
    if trigger.any():
        holds[poisoned, 0] = rng.integers(0, 2, int(poisoned.sum()))
    tops = scores[holds].max(axis=1)
    tops[-1] = -np.inf  # a row of special tokens alone
    table = pd.DataFrame({"token_id": np.arange(tokens), "score": scores, "trigger": trigger})
    triggers = None if attack == "style" else 3 if poisoned.any() else 0
    return table, pd.DataFrame({"poisoned": poisoned, "top": tops}), triggers


def logged(
    tokens: pd.DataFrame, rows: pd.DataFrame, triggers: int | None, rule: str, threshold: float
) -> dict[str, float]:
    """Return the detection metrics as a trial computes them: by sets, for one threshold."""
    bar = RULES.load(rule).bar(threshold)
    flagged = set(tokens.token_id[tokens.score >= bar])
    truth = None
    if triggers is not None:
        # Those that were not scored are further ids.
        scored = set(tokens.token_id[tokens.trigger])
        truth = scored | {10**6 + i for i in range(triggers - len(scored))}
    found = {
        "flagged": len(flagged),
        **token_detection(flagged, truth).as_metrics("detection"),
        **row_detection((rows.top >= bar).to_numpy(), rows.poisoned.to_numpy()).as_metrics(
            "sample"
        ),
        "detection_auprc": average_precision(tokens.score.to_numpy(), truth),
    }
    return found if triggers is None else {**found, "triggers_cut_train": 0}


def shelve(
    runs: Path,
    cells: Iterable[tuple[Mapping[str, Any], Mapping[str, float]]],
    name: str = "made",
    tokens: int = 600,
) -> Results:
    """Put cells into the store of `runs` as the finished sweep `name`.

    cells: config, and the metrics that are not those of `logged`. tokens: of each cell.
    """
    results = Results(str(runs), name)
    results.store.prepare()
    planned = []
    for number, (settings, metrics) in enumerate(cells):
        attack, defense = settings["attack"], settings["defense"]
        scored, rows, triggers = saved(
            attack["name"], attack["poison_rate"], settings["seed"], defense["rule"], tokens
        )
        threshold = defense["threshold"] or defense["alpha"]
        alone = threshold[0] if isinstance(threshold, list) else threshold
        measured = logged(scored, rows, triggers, defense["rule"], alone)
        key = f"{number:024x}"
        made = results.store.workspace(key)
        scored.to_parquet(made / TOKENS, index=False)
        rows.to_parquet(made / ROWS, index=False)
        result = {
            "config": settings,
            "metrics": {**measured, **metrics},
            "tags": {},
            "notes": {},
            "history": [],
            "started": 1000.0 + number,
            "ended": 1010.0 + number,
        }
        (made / RESULT).write_text(dumps(result))
        results.store.publish(key, made, "cell", {})
        planned.append({"key": key, "varied": {}, "stages": []})
    plan = {
        "sweep": name, "keep": "results", "base": {}, "stages": {}, "cells": planned,
        "refused": [],
    }  # fmt: skip
    results.storage.write(f"{name}/{PLANS}/plan.json", json.dumps(plan).encode())
    results.storage.write(f"{name}/{SWEEP}", f"name: {name}\n".encode())
    return results
