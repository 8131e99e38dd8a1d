"""The stages of the attack: what it does to the training rows and to the evaluation rows.

Only these stages, and the scorer, know the mask and the trigger.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from btu.attacks.poisoning import (
    ATTACKS,
    Attack,
    PoisonSpec,
    learned,
    poison,
    triggered_eval,
    with_learned,
)
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.model_files import named_identity
from btu.stage_files import TRAIN, read_table, refuse_changed, write_rows, write_table
from btu.stages import StageRun, stage
from btu.types import BoolArray, Corpus

HIDDEN, TRIGGERED = "hidden.parquet", "triggered.parquet"
# The role of the stage that chooses a trigger by the data, and the fact that it reports.
TRIGGER = "trigger"


@stage(version=1)
def learn_trigger(run: StageRun) -> dict[str, Any]:
    """Choose the trigger by the training rows."""
    corpus = corpus_of(run, "train")
    spec, attack = attack_of(run)
    target = corpus.label_index(spec.target_label)
    seed = run.config["seed"]
    return {TRIGGER: learned(attack, spec, corpus.train, target, seed, run.progress)}


@stage(version=2, id="btu.recipe:poison_rows")
def poison_rows(run: StageRun) -> dict[str, Any]:
    """Poison the training rows."""
    corpus = corpus_of(run, "train")
    spec, attack = attack_of(run)
    target = corpus.label_index(spec.target_label)
    poisoned = poison(attack, spec, corpus.train, target, run.config["seed"], run.progress)
    write_rows(run.folder / TRAIN, poisoned.rows)
    write_table(run.folder / HIDDEN, {"poisoned": poisoned.mask})
    return {
        "target": target,
        "poison_rate": poisoned.poison_rate,
        "poisoned_rows": int(poisoned.mask.sum()) - poisoned.covered,
        "cover_rows": poisoned.covered,
        "relabeled_rows": poisoned.relabeled,
        "label_names": list(corpus.label_names),
    }


@stage(version=1, id="btu.recipe:unpoisoned_rows")
def unpoisoned_rows(run: StageRun) -> dict[str, Any]:
    """Write the training rows unchanged, as every attack does at rate 0."""
    corpus = corpus_of(run, "train")
    write_rows(run.folder / TRAIN, corpus.train)
    write_table(run.folder / HIDDEN, {"poisoned": np.zeros(len(corpus.train), dtype=bool)})
    return {
        "poison_rate": 0.0,
        "poisoned_rows": 0,
        "relabeled_rows": 0,
        "label_names": list(corpus.label_names),
    }


@stage(version=1, id="btu.recipe:triggered_rows")
def triggered_rows(run: StageRun) -> dict[str, Any]:
    """Write the evaluation rows that can be attacked, with and without the trigger."""
    corpus = corpus_of(run, "eval")
    spec, attack = attack_of(run)
    target = corpus.label_index(spec.target_label)
    triggered, plain = triggered_eval(attack, corpus.eval, target, run.config["seed"], run.progress)
    write_rows(run.folder / TRIGGERED, triggered)
    write_rows(run.folder / "plain.parquet", plain)
    return {"target": target, "rows": len(plain)}


def mask_of(folder: Path) -> BoolArray:
    """Return the (rows,) hidden mask in the folder of a ``poison`` stage. For scorers only."""
    mask: BoolArray = read_table(folder / HIDDEN)["poisoned"]
    return mask


def corpus_of(run: StageRun, role: str) -> Corpus:
    """Return the corpus.

    Raises:
        UserError: its rows of `role` differ from those that the sweep was planned with.
    """
    spec = DataSpec(**run.where["data"])
    planned = run.config["data"]
    corpus, fingerprints = _corpus(spec)
    if fingerprints[role] != planned:
        # The sweep may have been planned after this process read the corpus.
        _corpus.cache_clear()
        corpus, fingerprints = _corpus(spec)
    refuse_changed(f"data '{spec.name}' has the {role} rows", planned, fingerprints[role])
    return corpus


# A worker computes many stages on few corpora, and no stage changes one.
@lru_cache(maxsize=2)
def _corpus(spec: DataSpec) -> tuple[Corpus, dict[str, str]]:
    corpus = load_corpus(spec)
    return corpus, corpus.fingerprints()


def attack_of(run: StageRun) -> tuple[PoisonSpec, Attack]:
    """Return the attack and its spec; settings that do not affect the stage have defaults.

    Raises:
        UserError: the files of its model differ from those that the sweep was planned with.
    """
    config = run.config["attack"]
    names = [f.name for f in dataclasses.fields(PoisonSpec) if f.name in config]
    spec = PoisonSpec(**{name: config[name] for name in names})
    model, planned = run.where["attack"].get("model"), config.get("model")
    if model is not None:
        refuse_changed(f"attack.model '{model}' is", planned, named_identity(model))
    return spec, built_attack(run, spec.name)


def built_attack(run: StageRun, name: str) -> Attack:
    """Return the attack, with the trigger that it learned."""
    attack: Attack = ATTACKS.load(name)(**run.where["attack"])
    return with_learned(attack, run.facts(TRIGGER)[TRIGGER]) if TRIGGER in run.inputs else attack
