"""The stages of a cell, in the paper's order: poison, fine-tune, defend, tune, evaluate.

`prepare` declares what every defense of a cell starts from, `Defense.stages` adds its own,
`evaluation` scores any model among them. Stages with equal keys are one stage: a sweep over a
defense's threshold pays for the poisoned model once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.attacked import (
    TRIGGER,
    built_attack,
    corpus_of,
    learn_trigger,
    poison_rows,
    triggered_rows,
    unpoisoned_rows,
)
from btu.attacks.insertion import inserts_plain_words
from btu.attacks.poisoning import ATTACKS, PoisonSpec, acting, learns
from btu.data.spec import DataSpec
from btu.defenses.base import ORIGINALS
from btu.defenses.kit.screening import ids_by_row
from btu.findings import Screened, incoming_of, write_incoming
from btu.foundation import Foundation, tune
from btu.metrics import Proportion
from btu.model_files import named_identity
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import (
    TRAIN,
    load_encoded,
    model_of,
    read_rows,
    save_model,
    training_rows_of,
    victim_of,
    write_rows,
)
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray
from btu.victims import VictimSpec

if TYPE_CHECKING:
    from btu.evaluation import Scores
    from btu.training import Encoded


# The measures of a model, by the rows that they are counted on.
MEASURED = {"clean": "cacc", "triggered": "asr", "plain": "ftr"}


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a victim is trained with, whatever the data are.

    victim: the pretrained model.
    victim_identity: identifies its weights in keys; its path is not part of them.
    train: settings of the fine-tune.
    tuning: settings of the clean tuning.
    seed: the seed of the cell.
    counts: rows of each role (`Corpus.counts`), for estimates of time.
    """

    victim: VictimSpec
    victim_identity: str
    train: TrainSettings
    tuning: TuningSettings
    seed: int
    counts: Mapping[str, int]

    @property
    def reads(self) -> dict[str, Any]:
        """What affects how the victim reads rows, for keys."""
        return {"identity": self.victim_identity, "max_length": self.victim.max_length}

    @property
    def where(self) -> dict[str, Any]:
        """Where the victim is."""
        return {"victim": as_config(self.victim)}


@dataclass(frozen=True, kw_only=True)
class CellInputs(TrainingInputs):
    """What the stages of a cell are declared from, before any defense.

    data: where the rows are.
    data_fingerprints: identify the rows of each role in keys (`Corpus.fingerprints`). The key of a
        stage contains the fingerprint of the role that it reads: more rows in one role do not
        invalidate the stages that depend on other roles.
    poison: the attack, and how it poisons.
    attack_params: the attack's own parameters.
    """

    data: DataSpec
    data_fingerprints: Mapping[str, str]
    poison: PoisonSpec
    attack_params: Mapping[str, Any]

    @property
    def where_data(self) -> dict[str, Any]:
        """Where the data are."""
        return {"data": as_config(self.data)}

    @property
    def where_attack(self) -> dict[str, Any]:
        """Where the data and the attack's model are."""
        return {**self.where_data, "attack": dict(self.attack_params)}

    @cached_property
    def attack_config(self) -> dict[str, Any]:
        """The attack's parameters as in keys: those that act, a model by its identity."""
        config = acting(self.poison.name, self.attack_params)
        if config.get("model") is not None:
            config["model"] = named_identity(config["model"])
        return config


@dataclass(frozen=True)
class Prepared:
    """The stages before any defense. A defense gets `foundation` alone.

    inputs: what they were declared from.
    poisoned: poisons the training rows.
    triggered: writes the evaluation rows that can be attacked, with and without the trigger.
    evaluation_rows: tokenizes the rows that models are scored on.
    foundation: what a defense starts from.
    originals: the model fine-tuned on the rows before the poison, for controls that declare the
        need.
    measured: what the poisoned rows are measured by, for the scorer (`btu.stealth`); None unless
        asked for.
    """

    inputs: CellInputs
    poisoned: Stage
    triggered: Stage
    evaluation_rows: Stage
    foundation: Foundation
    originals: Stage
    measured: Stage | None = None

    @cached_property
    def hidden(self) -> frozenset[str]:
        """The keys of the stages that no defense may read.

        They contain the mask, the trigger, or the rows that scores are reported on.
        """
        tops = (self.poisoned, self.evaluation_rows)
        # What is measured with is no secret: a defense may have the same language model.
        own = set() if self.measured is None else {self.measured.key}
        return frozenset(own | {stage.key for top in tops for stage in top.closure()})

    @cached_property
    def shared(self) -> frozenset[str]:
        """The keys of the stages that every defense of the cell shares, without evaluations."""
        base = self.foundation
        tops = (base.rows, base.clean, base.model, base.tuned)
        return self.hidden | {stage.key for top in tops for stage in top.closure()}

    @cached_property
    def incoming(self) -> Stage:
        """The texts that a defense screens at inference, without anything else about them."""
        rows = self.evaluation_rows
        texts = Stage(
            "evaluation texts",
            evaluation_texts,
            {"data": rows.config["data"]},
            {"triggered": self.triggered},
            {"data": rows.where["data"]},
            kind="host",
        )
        return Stage("incoming texts", incoming_texts, {}, {"texts": texts}, kind="host")

    @cached_property
    def forbidden(self) -> frozenset[str]:
        """The keys that no stage of a defense may read, except `incoming` for a screen."""
        base = self.foundation
        # Without poison the originals are the training rows, which every defense may read.
        tops = (base.rows, base.clean, base.tuned)
        given = {stage.key for top in tops for stage in top.closure()}
        kept = {stage.key for top in (self.incoming, self.originals) for stage in top.closure()}
        return self.hidden | (kept - given)

    def foundation_for(self, needs: Collection[str]) -> Foundation:
        """Return what a defense with these needs starts from."""
        if ORIGINALS not in needs:
            return self.foundation
        return dataclasses.replace(self.foundation, originals=self.originals)


def prepare(inputs: CellInputs) -> Prepared:
    """Declare the stages that every defense of a cell shares. Imports no torch."""
    poisoned, triggered = _attacked(inputs)
    if not inputs.poison.poisons:
        # No attack changes these rows: all attacks share one clean model.
        poisoned = _unpoisoned(inputs, "poison")
    base = foundation(inputs, poisoned, _clean(inputs))
    originals = _fine_tuned(
        inputs,
        _unpoisoned(inputs, "clean originals"),
        ("training rows (clean originals)", "fine-tune on clean originals"),
    )
    return Prepared(inputs, poisoned, triggered, _scored(inputs, triggered), base, originals)


def _attacked(inputs: CellInputs) -> tuple[Stage, Stage]:
    """Declare the poisoning of the training rows, and the triggered evaluation rows.

    An attack whose trigger depends on the training rows (`Learns`) has a stage before them.
    """
    poison, params = inputs.poison, inputs.attack_params
    attack_class = ATTACKS.load(poison.name)
    # A language model benefits from an accelerator; inserting words does not.
    kind = "host" if params.get("model") is None else "stage"
    config = {
        "data": inputs.data_fingerprints["train"],
        "attack": {**poison.acts(), **inputs.attack_config},
        "attack_version": getattr(attack_class, "VERSION", 1),
        "seed": inputs.seed,
    }
    before = {}
    if learns(attack_class(**params)):
        where = inputs.where_attack
        before = {TRIGGER: Stage("trigger", learn_trigger, config, where=where, kind=kind)}
    poisoned = Stage("poison", poison_rows, config, before, inputs.where_attack, kind=kind)
    # The poison rate and the label mode do not affect these rows.
    triggered = Stage(
        "triggered rows",
        triggered_rows,
        {
            **config,
            "data": inputs.data_fingerprints["eval"],
            "attack": {
                "name": poison.name,
                "target_label": poison.target_label,
                **inputs.attack_config,
            },
        },
        before,
        inputs.where_attack,
        kind=kind,
    )
    return poisoned, triggered


def _unpoisoned(inputs: CellInputs, name: str) -> Stage:
    """Declare the training rows as they are."""
    return Stage(
        name,
        unpoisoned_rows,
        {"data": inputs.data_fingerprints["train"]},
        where=inputs.where_data,
        kind="host",
    )


def _clean(inputs: CellInputs) -> Stage:
    """Declare the tokenizing of the reserved clean rows."""
    return Stage(
        "clean rows",
        clean_rows,
        {"data": inputs.data_fingerprints["clean"], "victim": inputs.reads},
        where={**inputs.where_data, **inputs.where},
        kind="host",
    )


def _scored(inputs: CellInputs, triggered: Stage) -> Stage:
    """Declare the tokenizing of the evaluation rows."""
    config = {
        "data": inputs.data_fingerprints["eval"],
        "victim": inputs.reads,
        "attack": {"name": inputs.poison.name, **inputs.attack_config},
    }
    if not inserts_plain_words(inputs.attack_params):
        config["special_tokens"] = "count"
    return Stage(
        "evaluation rows",
        evaluation_rows,
        config,
        {**triggered.inputs, "triggered": triggered},
        {**inputs.where_attack, **inputs.where},
        kind="host",
    )


def _fine_tuned(inputs: TrainingInputs, poisoned: Stage, names: tuple[str, str]) -> Stage:
    """Declare the tokenizing of training rows and a fine-tune on them.

    names: of the two stages.
    """
    rows = Stage(
        names[0],
        training_rows,
        {"victim": inputs.reads},
        {"poison": poisoned},
        inputs.where,
        kind="host",
    )
    return Stage(
        names[1],
        fine_tune,
        {"victim": inputs.reads, "train": as_config(inputs.train), "seed": inputs.seed},
        {"rows": rows},
        inputs.where,
        units=inputs.counts.get("rows_train", 0) * inputs.train.epochs,
        model=True,
    )


def foundation(inputs: TrainingInputs, poisoned: Stage, clean_rows: Stage) -> Foundation:
    """Declare what a defense starts from.

    poisoned: writes the training rows as `poison_rows` does.
    clean_rows: writes the reserved clean rows as `clean_rows` does.
    """
    train, tuning = inputs.train, inputs.tuning
    fine_tuned = _fine_tuned(inputs, poisoned, ("training rows", "poisoned fine-tune"))
    rows = fine_tuned.inputs["rows"]
    clean_count = inputs.counts.get("rows_clean", 0)
    tuned = Stage(
        "clean tuning (control)",
        clean_tune,
        {
            "victim": inputs.reads,
            "tuning": as_config(tuning.applied_to(train)),
            "seed": inputs.seed,
        },
        {"clean": clean_rows, "model": fine_tuned},
        inputs.where,
        units=clean_count * tuning.epochs,
        model=True,
    )
    return Foundation(
        rows=rows,
        clean=clean_rows,
        model=fine_tuned,
        tuned=tuned,
        victim=inputs.reads,
        # A defense does not need the location of the data: the rows before the poison are there.
        where=inputs.where,
        train=train,
        tuning=tuning,
        seed=inputs.seed,
        train_rows=inputs.counts.get("rows_train", 0),
        clean_rows=clean_count,
    )


def evaluation(prepared: Prepared, model: Stage, name: str, kind: str = "stage") -> Stage:
    """Declare the scoring of a model: CACC, ASR and FTR."""
    inputs = prepared.inputs
    return Stage(
        f"evaluate {name}",
        evaluate_model,
        {"precision": inputs.train.precision},
        {"rows": prepared.evaluation_rows, "model": model},
        # Whether code that comes with the model may be run.
        inputs.where,
        kind=kind,
        units=inputs.counts.get("rows_eval", 0),
    )


def evaluation_screened(prepared: Prepared, model: Stage, screened: Stage, name: str) -> Stage:
    """Declare the scoring of a model behind a screen.

    prepared: the stages before the defense.
    model: the model that reads what the screen accepts.
    screened: what `Screens.screen` returned for `Prepared.incoming`.
    name: of the model.
    """
    inputs, came = prepared.inputs, prepared.incoming
    return Stage(
        f"evaluate {name}",
        evaluate_screened,
        {"precision": inputs.train.precision, "victim": inputs.reads},
        {
            "rows": prepared.evaluation_rows,
            "texts": came.inputs["texts"],
            "incoming": came,
            "screened": screened,
            "model": model,
        },
        inputs.where,
        kind="cell",
        units=inputs.counts.get("rows_eval", 0),
    )


# What the stages do ------------------------------------------------------------------------------


@stage(version=2)
def training_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize the rows for the victim and the defender, without the mask."""
    classes = len(run.facts("poison")["label_names"])
    victim = victim_of(run, classes)
    rows = read_rows(run.inputs["poison"] / TRAIN)
    train = victim.encode(rows)
    train.save(run.folder / "train.safetensors")
    write_rows(run.folder / TRAIN, rows)
    longest = victim.spec.max_length
    return {
        "classes": classes,
        "rows": len(rows),
        "truncated_rows": int((train.host_lengths >= longest).sum()),
    }


@stage(version=1)
def clean_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize the reserved clean rows."""
    corpus = corpus_of(run, "clean")
    classes = len(corpus.label_names)
    victim_of(run, classes).encode(corpus.clean).save(run.folder / "clean.safetensors")
    return {"classes": classes, "rows": len(corpus.clean)}


@stage(version=2)
def evaluation_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize the rows that models are scored on, and the trigger, for the scorer only."""
    corpus = corpus_of(run, "eval")
    victim = victim_of(run, len(corpus.label_names))
    victim.encode(corpus.eval).save(run.folder / "clean.safetensors")
    for role in ("triggered", "plain"):
        rows = read_rows(run.inputs["triggered"] / f"{role}.parquet")
        victim.encode(rows).save(run.folder / f"{role}.safetensors")
    attack = built_attack(run, run.config["attack"]["name"])
    trigger = attack.trigger_token_ids(victim.tokenizer)
    return {
        "target": run.facts("triggered")["target"],
        "trigger": None if trigger is None else sorted(trigger),
    }


@stage(version=1)
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


@stage(version=1)
def clean_tune(run: StageRun) -> dict[str, Any]:
    """Fine-tune the model on the clean rows: the control of defenses that end with clean tuning."""
    model = model_of(run, "model")
    tune(run, model, "clean tuning (control)")
    save_model(model, run.folder)
    return {}


@stage(version=1)
def evaluate_model(run: StageRun) -> dict[str, Any]:
    """Count the hits behind CACC, ASR and FTR."""
    from btu.evaluation import EvalSet, evaluate
    from btu.training import PREDICT_BATCH

    folder = run.inputs["rows"]
    clean, triggered, plain = (load_encoded(folder / f"{role}.safetensors") for role in MEASURED)
    target = run.facts("rows")["target"]
    scores = evaluate(
        model_of(run, "model"),
        EvalSet(clean, triggered, plain, target),
        precision=run.config["precision"],
        device=run.device,
        batch_size=max(1, PREDICT_BATCH // run.accumulation),
    )
    return _counted(run, vars(scores))


def _counted(run: StageRun, scores: Mapping[str, Proportion]) -> dict[str, Any]:
    """Return the facts of an evaluation: hits and rows of each score, and the precision."""
    from btu.training import resolve_precision

    resolved = resolve_precision(run.config["precision"], run.device)
    run.precisions.add(resolved)
    counts = {name: {"hits": score.hits, "n": score.n} for name, score in scores.items()}
    return {**counts, "precision": resolved}


@stage(version=1)
def evaluation_texts(run: StageRun) -> dict[str, Any]:
    """Write the texts of the evaluation rows, a file per measure."""
    corpus = corpus_of(run, "eval")
    write_rows(run.folder / "clean.parquet", corpus.eval)
    for role in ("triggered", "plain"):
        name = f"{role}.parquet"
        write_rows(run.folder / name, read_rows(run.inputs["triggered"] / name))
    return {}


@stage(version=1)
def incoming_texts(run: StageRun) -> dict[str, Any]:
    """Write each text once, in an order that hides which are triggered."""
    parts = [read_rows(run.inputs["texts"] / f"{role}.parquet") for role in MEASURED]
    return {"texts": write_incoming(run.folder, parts)}


@stage(version=1)
def evaluate_screened(run: StageRun) -> dict[str, Any]:
    """Count the hits behind CACC, ASR and FTR of a model behind a screen.

    CACC, ASR and FTR are shares of all rows; a rejected text counts as a row without a hit. FRR is
    the share of clean rows that are rejected, FAR that of triggered rows that are accepted; both
    are reported only if the screen rejects texts. If it changes texts, the shares of changed texts
    and removed tokens are reported, and the share of triggered rows without any inserted token.
    """
    screened = Screened.load(run.inputs["screened"])
    place = {text: i for i, text in enumerate(incoming_of(run.inputs["incoming"]).inputs)}
    if len(screened.accepted) != len(place):
        raise ValueError(f"{len(place)} texts came in, {len(screened.accepted)} were screened.")
    model = model_of(run, "model")
    victim = victim_of(run, model.config.num_labels)
    target, trigger = run.facts("rows")["target"], run.facts("rows")["trigger"]
    precision = run.config["precision"]
    accepted: dict[str, BoolArray] = {}
    changed: dict[str, BoolArray] = {}
    given: dict[str, Encoded] = {}
    read: dict[str, Encoded] = {}
    scores: dict[str, Proportion] = {}
    for number, (role, measure) in enumerate(MEASURED.items()):
        rows = read_rows(run.inputs["texts"] / f"{role}.parquet")
        at = np.array([place[text] for text in rows.inputs])
        accepted[role] = screened.accepted[at]
        given[role] = read[role] = load_encoded(run.inputs["rows"] / f"{role}.safetensors")
        if screened.texts is not None:
            texts = tuple(screened.texts[i] for i in at)
            read[role] = victim.encode(dataclasses.replace(rows, texts=texts))
            changed[role] = np.array([a != b for a, b in zip(texts, rows.texts, strict=True)])
        predicted = run.classes(
            model, read[role], precision=precision, stage="evaluate", of=(number, len(MEASURED))
        )
        hit = predicted == (read[role].labels.numpy() if role == "clean" else target)
        scores[measure] = Proportion.of(hit & accepted[role])
    measured: dict[str, float] = {}
    if not screened.accepted.all() or screened.texts is None:
        measured |= Proportion.of(~accepted["clean"]).as_metrics("frr")
        measured |= Proportion.of(accepted["triggered"]).as_metrics("far")
    if screened.texts is not None:
        measured |= Proportion.of(changed["clean"]).as_metrics("changed_clean")
        measured |= Proportion.of(changed["triggered"]).as_metrics("changed_triggered")
        measured["tokens_removed_clean"] = float(
            1 - read["clean"].host_lengths.sum() / given["clean"].host_lengths.sum()
        )
        if trigger is not None:
            gone = _inserted_gone(given["plain"], given["triggered"], read["triggered"])
            measured |= gone.as_metrics("trigger_removed")
    return {**_counted(run, scores), "measured": measured}


def _inserted_gone(plain: Encoded, triggered: Encoded, read: Encoded) -> Proportion:
    """Count the rows that lost all tokens that the insertion of the trigger added.

    Tokens are compared as multisets: the text itself may contain the trigger's words.
    """
    gone, rows = 0, 0
    for before, attacked, after in zip(*map(_bags, (plain, triggered, read)), strict=True):
        inserted = attacked - before
        # A row whose trigger lies beyond max_length has no inserted token.
        if inserted:
            rows += 1
            gone += not inserted & (after - before)
    return Proportion(gone, rows)


def _bags(rows: Encoded) -> list[Counter[int]]:
    return [Counter(row.tolist()) for row in ids_by_row(rows)]


def scores_of(facts: Mapping[str, Any]) -> Scores:
    """Return the scores that an evaluation stage reported."""
    from btu.evaluation import Scores

    return Scores(**{name: Proportion(**facts[name]) for name in MEASURED.values()})
