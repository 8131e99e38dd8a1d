"""The stages of a cell, in the paper's order: poison, fine-tune, defend, tune, evaluate.

`prepare` declares what every defense of a cell starts from, `Defense.stages` adds its own,
`evaluation` scores any model among them. Stages with equal keys are one stage: a sweep over a
defense's threshold pays for the poisoned model once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.data import DataSpec, load_corpus
from btu.errors import UserError
from btu.foundation import (
    TRAIN,
    Foundation,
    load_encoded,
    model_of,
    read_rows,
    save_model,
    training_rows_of,
    tune,
    victim_of,
    write_rows,
    write_table,
)
from btu.metrics import Proportion
from btu.poisoning import ATTACKS, Attack, PoisonSpec, poison, triggered_eval
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stages import Stage, StageRun, plain
from btu.types import BoolArray, Corpus
from btu.victims import VictimSpec, folder_identity, weight_files

if TYPE_CHECKING:
    from btu.evaluation import Scores

# Raised when what a stage computes changes: results of an earlier version are then not reused.
POISON_VERSION = 1
TRAINING_ROWS_VERSION = 1
EVALUATION_ROWS_VERSION = 1
FINE_TUNE_VERSION = 1
CLEAN_TUNE_VERSION = 1
EVALUATE_VERSION = 1

HIDDEN, TRIGGERED = "hidden.parquet", "triggered.parquet"


@dataclass(frozen=True)
class Prepared:
    """The stages before any defense. poisoned, evaluation_rows: not for defenses."""

    poisoned: Stage
    evaluation_rows: Stage
    foundation: Foundation
    eval_rows: int


def prepare(
    *,
    data: DataSpec,
    data_fingerprint: str,
    victim: VictimSpec,
    victim_identity: str,
    poison: PoisonSpec,
    attack_params: Mapping[str, Any],
    train: TrainSettings,
    tuning: TuningSettings,
    seed: int,
    counts: Mapping[str, int],
) -> Prepared:
    """Declare the stages that every defense of a cell shares. Imports no torch.

    data_fingerprint, victim_identity: what stands in the keys for rows and weights; a path does
    not act. counts: of the corpus (`Corpus.counts`), for estimates.
    """
    where = {"data": plain(data), "victim": plain(victim)}
    attack_class = ATTACKS.load(poison.name)
    model = attack_params.get("model")
    attack_acts = dict(attack_params)
    if model is not None:
        attack_acts["model"] = _model_identity(model)
    poisoned = Stage(
        "poison",
        "btu.recipe:poison_rows",
        POISON_VERSION,
        {
            "data": data_fingerprint,
            "attack": {**plain(poison), **attack_acts},
            "attack_version": getattr(attack_class, "VERSION", 1),
            "seed": seed,
        },
        where={"data": where["data"], "attack": dict(attack_params)},
        # A paraphrase model is worth a device; words are inserted without one.
        kind="host" if model is None else "stage",
    )
    extend = getattr(attack_class, "poison_stage", None)
    if extend is not None:
        poisoned = extend(attack_class(**attack_params), poisoned)
        if poisoned.name != "poison":
            raise ValueError(
                f"attack '{poison.name}': poison_stage must keep the name 'poison', by which the "
                f"scorer finds it, got '{poisoned.name}'."
            )
    reads = {"identity": victim_identity, "max_length": victim.max_length}
    rows = Stage(
        "training rows",
        "btu.recipe:training_rows",
        TRAINING_ROWS_VERSION,
        {"data": data_fingerprint, "victim": reads},
        {"poison": poisoned},
        where,
        kind="host",
    )
    evaluation_rows = Stage(
        "evaluation rows",
        "btu.recipe:evaluation_rows",
        EVALUATION_ROWS_VERSION,
        {
            "data": data_fingerprint,
            "victim": reads,
            "attack": {"name": poison.name, **attack_acts},
        },
        {"poison": poisoned},
        {**where, "attack": dict(attack_params)},
        kind="host",
    )
    fine_tuned = Stage(
        "poisoned fine-tune",
        "btu.recipe:fine_tune",
        FINE_TUNE_VERSION,
        {"victim": reads, "train": plain(train), "seed": seed},
        {"rows": rows},
        {"victim": where["victim"]},
        units=counts.get("rows_train", 0) * train.epochs,
        model=True,
    )
    tuned = Stage(
        "clean tuning (control)",
        "btu.recipe:clean_tune",
        CLEAN_TUNE_VERSION,
        {
            "victim": reads,
            "tuning": plain(tuning.applied_to(train)),
            "seed": seed,
        },
        {"rows": rows, "model": fine_tuned},
        {"victim": where["victim"]},
        units=counts.get("rows_clean", 0) * tuning.epochs,
        model=True,
    )
    base = Foundation(
        rows,
        fine_tuned,
        tuned,
        reads,
        where,
        train,
        tuning,
        seed,
        counts.get("rows_train", 0),
        counts.get("rows_clean", 0),
    )
    return Prepared(poisoned, evaluation_rows, base, counts.get("rows_eval", 0))


def evaluation(prepared: Prepared, model: Stage, name: str, kind: str = "stage") -> Stage:
    """Declare the scoring of a model: CACC, ASR and FTR."""
    return Stage(
        f"evaluate {name}",
        "btu.recipe:evaluate_model",
        EVALUATE_VERSION,
        {"precision": prepared.foundation.train.precision},
        {"rows": prepared.evaluation_rows, "model": model},
        # Whether code that comes with the model may be run.
        {"victim": prepared.foundation.where["victim"]},
        kind=kind,
        units=prepared.eval_rows,
    )


# What the stages do ------------------------------------------------------------------------------


def poison_rows(run: StageRun) -> dict[str, Any]:
    """Poison the training rows and trigger the evaluation rows."""
    corpus = corpus_of(run)
    spec, attack = _attack_of(run)
    target = corpus.label_index(spec.target_label)
    seed = run.config["seed"]
    poisoned = poison(attack, spec, corpus.train, target, seed, run.progress)
    triggered, plain = triggered_eval(attack, corpus.eval, target, seed, run.progress)
    write_rows(run.folder / TRAIN, poisoned.rows)
    write_table(run.folder / HIDDEN, {"poisoned": poisoned.mask})
    write_rows(run.folder / TRIGGERED, triggered)
    write_rows(run.folder / "plain.parquet", plain)
    return {
        "target": target,
        "poison_rate": poisoned.poison_rate,
        "poisoned_rows": int(poisoned.mask.sum()),
        "relabeled_rows": poisoned.relabeled,
        "counts": corpus.counts(),
        "label_names": list(corpus.label_names),
    }


def training_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize what the victim and the defender read; the mask stays behind."""
    corpus = corpus_of(run)
    victim = victim_of(run, len(corpus.label_names))
    rows = read_rows(run.inputs["poison"] / TRAIN)
    train = victim.encode(rows)
    train.save(run.folder / "train.safetensors")
    victim.encode(corpus.clean).save(run.folder / "clean.safetensors")
    write_rows(run.folder / TRAIN, rows)
    longest = victim.spec.max_length
    return {
        "classes": len(corpus.label_names),
        "rows": len(rows),
        "clean_rows": len(corpus.clean),
        "truncated_rows": int((train.host_lengths >= longest).sum()),
    }


def evaluation_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize what models are scored on, and the trigger's tokens, for the scorer alone."""
    corpus = corpus_of(run)
    victim = victim_of(run, len(corpus.label_names))
    poisoned = run.inputs["poison"]
    victim.encode(corpus.eval).save(run.folder / "clean.safetensors")
    for role in ("triggered", "plain"):
        rows = read_rows(poisoned / f"{role}.parquet")
        victim.encode(rows).save(run.folder / f"{role}.safetensors")
    params = run.where["attack"]
    attack: Attack = ATTACKS.load(run.config["attack"]["name"])(**params)
    trigger = attack.trigger_token_ids(victim.tokenizer)
    return {
        "target": run.facts("poison")["target"],
        "trigger": None if trigger is None else sorted(trigger),
    }


def fine_tune(run: StageRun) -> dict[str, Any]:
    """Fine-tune the victim on the poisoned rows: the undefended model."""
    victim = victim_of(run)
    model = victim.new_model(derive_seed(run.config["seed"], "classifier"))
    run.fit(
        model,
        training_rows_of(run),
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "fine-tune"),
        stage="poisoned fine-tune",
    )
    save_model(model, run.folder)
    return {}


def clean_tune(run: StageRun) -> dict[str, Any]:
    """Fine-tune a model on the clean rows: the control of the defenses that end with this."""
    model = model_of(run, "model")
    tune(run, model, "clean tuning (control)")
    save_model(model, run.folder)
    return {}


def evaluate_model(run: StageRun) -> dict[str, Any]:
    """Count the hits behind CACC, ASR and FTR."""
    from btu.evaluation import EvalSet, evaluate
    from btu.training import PREDICT_BATCH, resolve_precision

    folder = run.inputs["rows"]
    clean, triggered, plain = (
        load_encoded(folder / f"{role}.safetensors") for role in ("clean", "triggered", "plain")
    )
    target = run.facts("rows")["target"]
    precision = run.config["precision"]
    scores = evaluate(
        model_of(run, "model"),
        EvalSet(clean, triggered, plain, target),
        precision=precision,
        device=run.device,
        batch_size=max(1, PREDICT_BATCH // run.accumulation),
    )
    counts = {
        name: {"hits": getattr(scores, name).hits, "n": getattr(scores, name).n}
        for name in ("cacc", "asr", "ftr")
    }
    return {**counts, "precision": resolve_precision(precision, run.device)}


def scores_of(facts: Mapping[str, Any]) -> Scores:
    """Return the scores that an evaluation stage reported."""
    from btu.evaluation import Scores

    return Scores(**{name: Proportion(**facts[name]) for name in ("cacc", "asr", "ftr")})


def mask_of(folder: Path) -> BoolArray:
    """Return the (rows,) hidden mask of a ``poison`` stage's folder. For scorers alone."""
    import pyarrow.parquet as pq

    mask: BoolArray = pq.read_table(folder / HIDDEN)["poisoned"].to_numpy().astype(bool)
    return mask


def corpus_of(run: StageRun) -> Corpus:
    """Return the corpus, checked to be the one that was planned with.

    Raises:
        UserError: its rows differ from those that the key was made of.
    """
    spec = DataSpec(**run.where["data"])
    corpus, fingerprint = _corpus(spec)
    if fingerprint != run.config["data"]:
        # Planned after this process read it, perhaps.
        _corpus.cache_clear()
        corpus, fingerprint = _corpus(spec)
    if fingerprint != run.config["data"]:
        raise UserError(
            f"data '{spec.name}' has the rows {fingerprint[:12]} here, but the sweep was planned "
            f"with {run.config['data'][:12]}: they changed, or differ between nodes; launch "
            "again, with the same files everywhere."
        )
    return corpus


# A worker computes many stages of few corpora; nobody changes one.
@lru_cache(maxsize=2)
def _corpus(spec: DataSpec) -> tuple[Corpus, str]:
    corpus = load_corpus(spec)
    return corpus, corpus.fingerprint()


def _attack_of(run: StageRun) -> tuple[PoisonSpec, Attack]:
    names = [f.name for f in dataclasses.fields(PoisonSpec)]
    spec = PoisonSpec(**{name: run.config["attack"][name] for name in names})
    model, planned = run.where["attack"].get("model"), run.config["attack"].get("model")
    if model is not None and _model_identity(model) != planned:
        raise UserError(
            f"attack.model '{model}' is {_model_identity(model)[:20]} here, but the sweep was "
            f"planned with {planned[:20]}: its files changed, or differ between nodes; launch "
            "again, with the same files everywhere."
        )
    attack: Attack = ATTACKS.load(spec.name)(**run.where["attack"])
    return spec, attack


def _model_identity(model: str) -> str:
    """Return what stands for a paraphrase model in keys: its files' hash, or a hub name."""
    folder = Path(model)
    return folder_identity(folder, weight_files(folder)) if folder.is_dir() else model
