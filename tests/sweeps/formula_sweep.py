"""A finished sweep with likely numbers, made by formula in the store of an output folder.

What the pages show of it looks like a real sweep: ASR that falls with the threshold, triggers that
drift, stages that took time. Nothing is trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from btu.result_files import CONFIG, FLAGGED, PLOT, RESULT, ROWS, TOKENS, dumps
from btu.seeding import derive_seed
from orchestrator.results.folder import PLANS, SWEEP, Results

# Attack -> its trigger's tokens, and the threshold above which they are missed.
TRIGGERS = {
    "badnets": (["cf"], 11.0),
    "addsent": (["3d", "movie", "weekend", "watched"], 7.5),
    "style": ([], 0.0),
    "syntactic": ([], 0.0),
}
TAGS = {
    "code": "0.1.0+0123456789ab", "host": "node", "device": "cpu", "threads": "1",
    "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "precision": "bf16",
    "data": "1d77cca028cc", "victim": "83a12806d413",
}  # fmt: skip
STAGES = {
    "poison": 0.2, "training rows": 1.5, "poisoned fine-tune": 22.0, "evaluate undefended": 2.6,
    "clean rows": 0.6, "clean tuning (control)": 6.5, "evaluate tuned": 2.5,
    "exposure round 3": 7.4, "unlearn": 6.1, "evaluate defended": 4.4,
}  # fmt: skip


def settings(
    attack: str, rate: float, seed: int, rule: str | None, threshold: float | None
) -> dict[str, Any]:
    """Return a cell's config; rule None: without a defense."""
    defense: dict[str, Any] = {"name": "none"}
    if rule is not None:
        defense = {"name": "btu", "rule": rule, "threshold": threshold, "alpha": None,
                   "rounds": [3]}  # fmt: skip
    return {
        "data": {"name": "sst2"},
        "victim": {"name": "offline", "max_length": 128},
        "attack": {"name": attack, "poison_rate": rate, "target_label": 1, "label_mode": "dirty"},
        "defense": defense,
        "train": {"epochs": 3},
        "seed": seed,
    }


def measured(config: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a cell."""
    attack, defense, seed = config["attack"], config["defense"], config["seed"]
    name, rate = attack["name"], attack["poison_rate"]
    rng = np.random.default_rng(derive_seed(seed, name, str(rate), str(defense)))
    noise = [float(v) for v in rng.normal(0, 0.008, 8)]
    words, bar = TRIGGERS[name]
    took = (1 - math.exp(-60 * rate)) * {"badnets": 1.0, "addsent": 1.0}.get(name, 0.85)
    threshold = defense.get("threshold")
    missed = 1 / (1 + math.exp(-2 * (threshold - bar))) if words and threshold else 0.9
    harm = 0.12 * math.exp(-threshold / 1.5) if threshold else 0.0
    asr, cacc = 0.12 + (took - 0.12) * missed + noise[0], 0.885 - harm + noise[1]
    found: dict[str, float] = {
        "cacc": cacc, "asr": min(1.0, max(0.0, asr)), "ftr": 0.12 + noise[2],
        "undefended_asr": min(1.0, max(0.0, took + noise[3])), "undefended_cacc": 0.88 + noise[4],
        "undefended_ftr": 0.1, "tuned_asr": min(1.0, max(0.0, 0.98 * took + noise[5])),
        "tuned_cacc": 0.884 + noise[6], "tuned_ftr": 0.1, "poison_rate_reached": rate,
    }  # fmt: skip
    for metric in list(found)[:3]:
        found |= {f"{metric}_low": found[metric] - 0.02, f"{metric}_high": found[metric] + 0.02}
    stages = dict(STAGES)
    if threshold is None:
        found["asr"], found["cacc"] = found["undefended_asr"], found["undefended_cacc"]
        del stages["exposure round 3"], stages["unlearn"]
        stages["evaluate defended"] = stages["evaluate undefended"]
    else:
        hits = len(words) * (1 - missed) if rate else 0.0
        wrong = round(300 * math.exp(-threshold / 0.8))
        flagged = round(hits) + wrong
        found |= {"flagged": flagged, "cut_cost": max(0.0, harm + noise[7])}
        nan = float("nan")
        found["detection_precision"] = round(hits) / flagged if words and flagged else nan
        found["detection_recall"] = round(hits) / len(words) if words and rate else nan
        found["sample_precision"] = 1 - 0.5 * math.exp(-threshold / 3) if rate else 0.0
        found["sample_recall"] = 1 - missed if rate else nan
        found["detection_recall_n"] = len(words)
        if words:
            found["triggers_cut_train"] = 0
    spent = {stage: seconds * (1 + abs(noise[0])) for stage, seconds in stages.items()}
    found["seconds"] = sum(spent.values())
    if threshold is None:
        found["seconds"] -= spent["evaluate defended"]
    return {**found, **{f"seconds/{stage}": seconds for stage, seconds in spent.items()}}


@cache
def drifts(attack: str, rate: float, seed: int, count: int) -> pd.DataFrame:
    """Return a token table without its flags."""
    rng = np.random.default_rng(derive_seed(seed, attack, str(rate), "tokens"))
    words = TRIGGERS[attack][0] if rate else []
    occurrences = np.sort((5 / rng.random(count) ** 1.1).astype(np.int64))[::-1].clip(5, 20_000)
    drift = 0.0014 * (1 + 0.06 * np.log(occurrences)) * rng.lognormal(0, 0.11, count)
    tokens = [f"word{i}" for i in range(count)]
    for place, word in enumerate(words):
        where = 40 + 7 * place
        tokens[where], drift[where] = word, 0.0014 * (4.2 - 0.5 * place) * (0.8 + 2 * rate)
        occurrences[where] = int(6000 * rate) + 30 * place
    score = 9 * (drift / np.median(drift) - 1)
    return pd.DataFrame({
        "token_id": np.arange(count), "token": tokens, "score": score,
        "trigger": np.isin(tokens, words), "count": occurrences, "drift_3": drift,
    })  # fmt: skip


def shelve_sweep(
    runs: Path,
    name: str = "likely",
    attacks: Iterable[str] = ("badnets", "addsent"),
    rates: Iterable[float] = (0.01, 0.1),
    thresholds: Iterable[float] = (2.0, 4.5, 9.0),
    seeds: Iterable[int] = (0, 1),
    controls: bool = True,
    tokens: int = 800,
    sentences: Iterable[str | None] = (None,),
) -> Results:
    """Put a finished sweep into the store of `runs`.

    controls: whether there are cells without a defense, too.
    tokens: the rows of a cell's token table.
    sentences: the axis ``attack.sentence``; None: without this key.
    """
    results = Results(str(runs), name)
    results.store.prepare()
    # A list of the axes that differ: what the cell is called in MLflow.
    bars: list[float | None] = [*([None] if controls else []), *thresholds]
    planned = []
    grid = product(attacks, rates, bars, seeds, sentences)
    for number, (attack, rate, bar, seed, sentence) in enumerate(grid):
        config = settings(attack, rate, seed, None if bar is None else "contrast", bar)
        if sentence is not None:
            config["attack"]["sentence"] = sentence
        metrics = measured(config)
        table = drifts(attack, rate, seed, tokens)
        table = table.assign(flagged=False if bar is None else table["score"] >= bar)
        if bar is None:
            table = table.iloc[:0].drop(columns=["count", "drift_3"])
        key = f"{derive_seed(number, name) % 16**12:012x}{number:012x}"
        folder = results.store.workspace(key)
        table.to_parquet(folder / TOKENS, index=False)
        pd.DataFrame({"poisoned": [True, False], "top": [9.0, 0.0]}).to_parquet(
            folder / ROWS, index=False
        )
        table[table["flagged"]].to_json(folder / FLAGGED, orient="records")
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / PLOT).write_bytes(_pixel())
        result = {
            "config": config, "metrics": metrics, "tags": TAGS, "label_names": ["0", "1"],
            "notes": {"rows_train": 6000}, "started": 1.79e9 + number, "ended": 1.79e9 + number + 9,
            "history": [{"stage": "poisoned fine-tune", "epoch": epoch, "loss": 0.6 / epoch,
                         "accuracy": 0.8, "seconds": 7.0, "rows": 6000} for epoch in (1, 2, 3)],
        }  # fmt: skip
        (folder / RESULT).write_text(dumps(result))
        results.store.publish(key, folder, "cell", {})
        varied = {"attack.name": attack, "attack.poison_rate": rate, "seed": seed}
        if sentence is not None:
            varied["attack.sentence"] = sentence
        varied |= {"control": "no_defense"} if bar is None else {"defense.threshold": bar}
        planned.append({"key": key, "varied": varied, "stages": []})
    base = settings("badnets", 0.1, 0, "contrast", 4.5)
    plan = {
        "sweep": name, "keep": "results", "base": base, "stages": {}, "cells": planned,
        "refused": [],
    }  # fmt: skip
    results.storage.write(f"{name}/{PLANS}/plan.json", json.dumps(plan).encode())
    results.storage.write(f"{name}/{SWEEP}", f"name: {name}\n".encode())
    return results


@cache
def _pixel() -> bytes:
    """Return a PNG that replaces a drift plot."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, stream = Figure(figsize=(1, 1)), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format="png")
    return stream.getvalue()
