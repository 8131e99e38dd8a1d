"""The stages of a cell, in the paper's order: poison, fine-tune, defend, tune, evaluate.

`prepare` declares what every defense of a cell starts from, `Defense.stages` adds its own,
`evaluation` scores any model among them. Stages with equal keys are one stage: a sweep over a
defense's threshold pays for the poisoned model once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.attacks.poisoning import ATTACKS, Attack, PoisonSpec, poison, triggered_eval
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.defenses.base import ORIGINALS
from btu.defenses.kit.screening import ids_by_row
from btu.errors import UserError
from btu.findings import INCOMING, Screened, incoming_of
from btu.foundation import Foundation, tune
from btu.metrics import Proportion
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
    write_table,
)
from btu.stages import Stage, StageRun, plain, stage
from btu.types import BoolArray, Corpus, Rows, as_bytes
from btu.victims import VictimSpec, folder_identity, weight_files

if TYPE_CHECKING:
    from btu.evaluation import Scores
    from btu.training import Encoded


HIDDEN, TRIGGERED = "hidden.parquet", "triggered.parquet"


@dataclass(frozen=True)
class Prepared:
    """The stages before any defense. Only `foundation` is for defenses.

    originals: the model fine-tuned on the rows before the poison, for controls that ask for it.
    """

    poisoned: Stage
    triggered: Stage
    evaluation_rows: Stage
    foundation: Foundation
    eval_rows: int
    originals: Stage

    @cached_property
    def hidden(self) -> frozenset[str]:
        """The keys of the stages that no defense may read.

        They hold the mask, the trigger, or the rows that are reported on.
        """
        tops = (self.poisoned, self.evaluation_rows)
        return frozenset(stage.key for top in tops for stage in top.closure())

    @cached_property
    def shared(self) -> frozenset[str]:
        """The keys of the stages that are there whatever the defense is, but for evaluations."""
        base = self.foundation
        tops = (base.rows, base.clean, base.model, base.tuned)
        return self.hidden | {stage.key for top in tops for stage in top.closure()}

    @cached_property
    def incoming(self) -> Stage:
        """What a screening defense is asked at inference: texts, and nothing else of them."""
        rows = self.evaluation_rows
        texts = Stage(
            "evaluation texts",
            evaluation_texts,
            {"data": rows.config["data"]},
            {"triggered": self.triggered},
            {"data": rows.where["data"]},
            kind="host",
        )
        return Stage(
            "incoming texts",
            incoming_texts,
            {},
            {"texts": texts},
            kind="host",
        )

    @cached_property
    def forbidden(self) -> frozenset[str]:
        """The keys of all that no stage of a defense may read; a screen reads `incoming`."""
        base = self.foundation
        # Without poison the originals are the training rows, which are open to all.
        tops = (base.rows, base.clean, base.tuned)
        given = {stage.key for top in tops for stage in top.closure()}
        told = {stage.key for top in (self.incoming, self.originals) for stage in top.closure()}
        return self.hidden | (told - given)

    def foundation_for(self, needs: Collection[str]) -> Foundation:
        """Return what a defense with these needs starts from."""
        if ORIGINALS not in needs:
            return self.foundation
        return dataclasses.replace(self.foundation, originals=self.originals)


def prepare(
    *,
    data: DataSpec,
    data_fingerprints: Mapping[str, str],
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

    data_fingerprints, victim_identity: what stands in the keys for the rows of each role
    (`Corpus.fingerprints`) and for the weights; a path does not act. A stage has the fingerprint
    of the role that it reads, so that more rows in one role leave what rests on the others.
    counts: of the corpus (`Corpus.counts`), for estimates.
    """
    where_data, where_victim = plain(data), plain(victim)
    attack_class = ATTACKS.load(poison.name)
    model = attack_params.get("model")
    attack_acts = dict(attack_params)
    if model is not None:
        attack_acts["model"] = _model_identity(model)
    where_attack = dict(attack_params)
    version = getattr(attack_class, "VERSION", 1)
    # A paraphrase model is worth a device; words are inserted without one.
    kind = "host" if model is None else "stage"
    poisoned = Stage(
        "poison",
        poison_rows,
        {
            "data": data_fingerprints["train"],
            "attack": {**plain(poison), **attack_acts},
            "attack_version": version,
            "seed": seed,
        },
        where={"data": where_data, "attack": where_attack},
        kind=kind,
    )
    # How much of the training set is poisoned, and which rows, does not act on these.
    triggered = Stage(
        "triggered rows",
        triggered_rows,
        {
            "data": data_fingerprints["eval"],
            "attack": {
                "name": poison.name,
                "target_label": poison.target_label,
                **attack_acts,
            },
            "attack_version": version,
            "seed": seed,
        },
        where={"data": where_data, "attack": where_attack},
        kind=kind,
    )
    extend = getattr(attack_class, "poison_stages", None)
    if extend is not None:
        poisoned, triggered = extend(attack_class(**attack_params), poisoned, triggered)
        names = (poisoned.name, triggered.name)
        if names != ("poison", "triggered rows"):
            raise ValueError(
                f"attack '{poison.name}': poison_stages must keep the names 'poison' and "
                f"'triggered rows', by which the scorer finds them, got {names}."
            )
    if poison.poison_rate == 0:
        # No attack is at work on these rows: all attacks share one clean model.
        poisoned = _unpoisoned("poison", data_fingerprints["train"], where_data)
    reads = {"identity": victim_identity, "max_length": victim.max_length}
    clean = Stage(
        "clean rows",
        clean_rows,
        {"data": data_fingerprints["clean"], "victim": reads},
        where={"data": where_data, "victim": where_victim},
        kind="host",
    )
    scored = Stage(
        "evaluation rows",
        evaluation_rows,
        {
            "data": data_fingerprints["eval"],
            "victim": reads,
            "attack": {"name": poison.name, **attack_acts},
        },
        {"triggered": triggered},
        {"data": where_data, "victim": where_victim, "attack": where_attack},
        kind="host",
    )
    base = foundation(
        poisoned,
        clean,
        victim=victim,
        victim_identity=victim_identity,
        train=train,
        tuning=tuning,
        seed=seed,
        counts=counts,
    )
    originals = _fine_tuned(
        _unpoisoned("clean originals", data_fingerprints["train"], where_data),
        ("training rows (clean originals)", "fine-tune on clean originals"),
        reads,
        where_victim,
        train,
        seed,
        counts,
    )
    eval_rows = counts.get("rows_eval", 0)
    return Prepared(poisoned, triggered, scored, base, eval_rows, originals)


def _unpoisoned(name: str, fingerprint: str, where_data: Mapping[str, Any]) -> Stage:
    return Stage(
        name,
        unpoisoned_rows,
        {"data": fingerprint},
        where={"data": where_data},
        kind="host",
    )


def _fine_tuned(
    poisoned: Stage,
    names: tuple[str, str],
    reads: Mapping[str, Any],
    where_victim: Mapping[str, Any],
    train: TrainSettings,
    seed: int,
    counts: Mapping[str, int],
) -> Stage:
    """Declare the tokenizing of rows and a fine-tune on them; names: of the two stages."""
    rows = Stage(
        names[0],
        training_rows,
        {"victim": reads},
        {"poison": poisoned},
        {"victim": where_victim},
        kind="host",
    )
    return Stage(
        names[1],
        fine_tune,
        {"victim": reads, "train": plain(train), "seed": seed},
        {"rows": rows},
        {"victim": where_victim},
        units=counts.get("rows_train", 0) * train.epochs,
        model=True,
    )


def foundation(
    poisoned: Stage,
    clean_rows: Stage,
    *,
    victim: VictimSpec,
    victim_identity: str,
    train: TrainSettings,
    tuning: TuningSettings,
    seed: int,
    counts: Mapping[str, int],
) -> Foundation:
    """Declare what a defense starts from, on rows that `poisoned` writes as `poison_rows` does."""
    where_victim = plain(victim)
    reads = {"identity": victim_identity, "max_length": victim.max_length}
    names = ("training rows", "poisoned fine-tune")
    fine_tuned = _fine_tuned(poisoned, names, reads, where_victim, train, seed, counts)
    rows = fine_tuned.inputs["rows"]
    tuned = Stage(
        "clean tuning (control)",
        clean_tune,
        {
            "victim": reads,
            "tuning": plain(tuning.applied_to(train)),
            "seed": seed,
        },
        {"clean": clean_rows, "model": fine_tuned},
        {"victim": where_victim},
        units=counts.get("rows_clean", 0) * tuning.epochs,
        model=True,
    )
    return Foundation(
        rows,
        clean_rows,
        fine_tuned,
        tuned,
        reads,
        # Where the data are, a defense need not know: the rows before the poison are there.
        {"victim": where_victim},
        train,
        tuning,
        seed,
        counts.get("rows_train", 0),
        counts.get("rows_clean", 0),
    )


def evaluation(prepared: Prepared, model: Stage, name: str, kind: str = "stage") -> Stage:
    """Declare the scoring of a model: CACC, ASR and FTR."""
    return Stage(
        f"evaluate {name}",
        evaluate_model,
        {"precision": prepared.foundation.train.precision},
        {"rows": prepared.evaluation_rows, "model": model},
        # Whether code that comes with the model may be run.
        prepared.foundation.where,
        kind=kind,
        units=prepared.eval_rows,
    )


def evaluation_screened(prepared: Prepared, model: Stage, screened: Stage, name: str) -> Stage:
    """Declare the scoring of a model that a screening stage stands before.

    screened: what `Screens.screen` returned for `Prepared.incoming`.
    """
    came = prepared.incoming
    return Stage(
        f"evaluate {name}",
        evaluate_screened,
        {"precision": prepared.foundation.train.precision, "victim": prepared.foundation.victim},
        {
            "rows": prepared.evaluation_rows,
            "texts": came.inputs["texts"],
            "incoming": came,
            "screened": screened,
            "model": model,
        },
        prepared.foundation.where,
        kind="cell",
        units=prepared.eval_rows,
    )


# What the stages do ------------------------------------------------------------------------------


@stage(version=2)
def poison_rows(run: StageRun) -> dict[str, Any]:
    """Poison the training rows."""
    corpus = corpus_of(run, "train")
    spec, attack = _attack_of(run)
    target = corpus.label_index(spec.target_label)
    poisoned = poison(attack, spec, corpus.train, target, run.config["seed"], run.progress)
    write_rows(run.folder / TRAIN, poisoned.rows)
    write_table(run.folder / HIDDEN, {"poisoned": poisoned.mask})
    return {
        "target": target,
        "poison_rate": poisoned.poison_rate,
        "poisoned_rows": int(poisoned.mask.sum()),
        "relabeled_rows": poisoned.relabeled,
        "label_names": list(corpus.label_names),
    }


@stage(version=1)
def unpoisoned_rows(run: StageRun) -> dict[str, Any]:
    """Hand the training rows on as they are: what every attack does at rate 0."""
    corpus = corpus_of(run, "train")
    write_rows(run.folder / TRAIN, corpus.train)
    write_table(run.folder / HIDDEN, {"poisoned": np.zeros(len(corpus.train), dtype=bool)})
    return {
        "poison_rate": 0.0,
        "poisoned_rows": 0,
        "relabeled_rows": 0,
        "label_names": list(corpus.label_names),
    }


@stage(version=1)
def triggered_rows(run: StageRun) -> dict[str, Any]:
    """Write the evaluation rows that can be attacked, with the trigger and without it."""
    corpus = corpus_of(run, "eval")
    spec, attack = _attack_of(run)
    target = corpus.label_index(spec.target_label)
    triggered, plain = triggered_eval(attack, corpus.eval, target, run.config["seed"], run.progress)
    write_rows(run.folder / TRIGGERED, triggered)
    write_rows(run.folder / "plain.parquet", plain)
    return {"target": target, "rows": len(plain)}


@stage(version=2)
def training_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize what the victim and the defender read; the mask stays behind."""
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
    """Tokenize what models are scored on, and the trigger's tokens, for the scorer alone."""
    corpus = corpus_of(run, "eval")
    victim = victim_of(run, len(corpus.label_names))
    victim.encode(corpus.eval).save(run.folder / "clean.safetensors")
    for role in ("triggered", "plain"):
        rows = read_rows(run.inputs["triggered"] / f"{role}.parquet")
        victim.encode(rows).save(run.folder / f"{role}.safetensors")
    params = run.where["attack"]
    attack: Attack = ATTACKS.load(run.config["attack"]["name"])(**params)
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
    """Fine-tune the model on the clean rows: the control of the defenses that end with this."""
    model = model_of(run, "model")
    tune(run, model, "clean tuning (control)")
    save_model(model, run.folder)
    return {}


@stage(version=1)
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
    resolved = resolve_precision(precision, run.device)
    run.precisions.add(resolved)
    return {**counts, "precision": resolved}


@stage(version=1)
def evaluation_texts(run: StageRun) -> dict[str, Any]:
    """Write the texts behind the evaluation rows, by what they are scored for."""
    corpus = corpus_of(run, "eval")
    write_rows(run.folder / "clean.parquet", corpus.eval)
    for role in ("triggered", "plain"):
        name = f"{role}.parquet"
        write_rows(run.folder / name, read_rows(run.inputs["triggered"] / name))
    return {}


@stage(version=1)
def incoming_texts(run: StageRun) -> dict[str, Any]:
    """Write each text once, in the order of their hashes: nothing says which are triggered."""
    texts = {
        text
        for role in ("clean", "triggered", "plain")
        for text in read_rows(run.inputs["texts"] / f"{role}.parquet").texts
    }
    held = sorted(as_bytes(texts), key=lambda text: hashlib.sha256(text).digest())
    write_table(run.folder / INCOMING, {"text": held})
    return {"texts": len(held)}


@stage(version=1)
def evaluate_screened(run: StageRun) -> dict[str, Any]:
    """Count the hits behind CACC, ASR and FTR of a model behind a screen.

    A text that was turned away is neither right nor attacked, and counts among the rows: CACC, ASR
    and FTR are shares of all rows. FRR: clean rows turned away. FAR: triggered rows let through.
    Both are there only where the screen turns texts away at all; where it changes texts, how much
    it changes, and in how many triggered rows it takes out the whole of what was inserted.
    """
    from btu.training import resolve_precision

    screened = Screened.load(run.inputs["screened"])
    place = {text: i for i, text in enumerate(incoming_of(run.inputs["incoming"]).texts)}
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
    counts = {}
    wanted = {"clean": "cacc", "triggered": "asr", "plain": "ftr"}
    for number, (role, measure) in enumerate(wanted.items()):
        rows = read_rows(run.inputs["texts"] / f"{role}.parquet")
        at = np.array([place[text] for text in rows.texts])
        accepted[role] = screened.accepted[at]
        given[role] = read[role] = load_encoded(run.inputs["rows"] / f"{role}.safetensors")
        if screened.texts is not None:
            texts = tuple(screened.texts[i] for i in at)
            read[role] = victim.encode(Rows(texts, rows.labels))
            changed[role] = np.array([a != b for a, b in zip(texts, rows.texts, strict=True)])
        logits = run.predict(
            model, read[role], precision=precision, stage="evaluate", of=(number, len(wanted))
        )
        hit = logits.argmax(1) == (read[role].labels.numpy() if role == "clean" else target)
        counts[measure] = {"hits": int((hit & accepted[role]).sum()), "n": len(hit)}
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
    resolved = resolve_precision(precision, run.device)
    return {**counts, "measured": measured, "precision": resolved}


def _inserted_gone(plain: Encoded, triggered: Encoded, read: Encoded) -> Proportion:
    """Count the rows in which nothing is left of what the trigger's insertion added.

    Tokens are compared as multisets: the trigger's words may stand in the text itself.
    """
    gone, rows = 0, 0
    for before, attacked, after in zip(*map(_bags, (plain, triggered, read)), strict=True):
        inserted = attacked - before
        # A row that max_length leaves without a trigger has nothing to take out.
        if inserted:
            rows += 1
            gone += not inserted & (after - before)
    return Proportion(gone, rows)


def _bags(rows: Encoded) -> list[Counter[int]]:
    return [Counter(row.tolist()) for row in ids_by_row(rows)]


def scores_of(facts: Mapping[str, Any]) -> Scores:
    """Return the scores that an evaluation stage reported."""
    from btu.evaluation import Scores

    return Scores(**{name: Proportion(**facts[name]) for name in ("cacc", "asr", "ftr")})


def mask_of(folder: Path) -> BoolArray:
    """Return the (rows,) hidden mask of a ``poison`` stage's folder. For scorers alone."""
    import pyarrow.parquet as pq

    mask: BoolArray = pq.read_table(folder / HIDDEN)["poisoned"].to_numpy().astype(bool)
    return mask


def corpus_of(run: StageRun, role: str) -> Corpus:
    """Return the corpus, whose rows of `role` are checked to be those that were planned with.

    Raises:
        UserError: they differ from those that the key was made of.
    """
    spec = DataSpec(**run.where["data"])
    planned = run.config["data"]
    corpus, fingerprints = _corpus(spec)
    if fingerprints[role] != planned:
        # Planned after this process read it, perhaps.
        _corpus.cache_clear()
        corpus, fingerprints = _corpus(spec)
    if fingerprints[role] != planned:
        raise UserError(
            f"data '{spec.name}' has the {role} rows {fingerprints[role][:12]} here, but the sweep "
            f"was planned with {planned[:12]}: they changed, or differ between nodes; launch "
            "again with --retry-failed, with the same files everywhere."
        )
    return corpus


# A worker computes many stages of few corpora; nobody changes one.
@lru_cache(maxsize=2)
def _corpus(spec: DataSpec) -> tuple[Corpus, dict[str, str]]:
    corpus = load_corpus(spec)
    return corpus, corpus.fingerprints()


def _attack_of(run: StageRun) -> tuple[PoisonSpec, Attack]:
    """Return the attack; of the spec, what does not act in the stage is as by default.

    Raises:
        UserError: the files of its model differ from those that the key was made of.
    """
    acts = run.config["attack"]
    names = [f.name for f in dataclasses.fields(PoisonSpec) if f.name in acts]
    spec = PoisonSpec(**{name: acts[name] for name in names})
    model, planned = run.where["attack"].get("model"), run.config["attack"].get("model")
    if model is not None and _model_identity(model) != planned:
        raise UserError(
            f"attack.model '{model}' is {_model_identity(model)[:20]} here, but the sweep was "
            f"planned with {planned[:20]}: its files changed, or differ between nodes; launch "
            "again with --retry-failed, with the same files everywhere."
        )
    attack: Attack = ATTACKS.load(spec.name)(**run.where["attack"])
    return spec, attack


def _model_identity(model: str) -> str:
    """Return what stands for a paraphrase model in keys: its files' hash, or a hub name."""
    folder = Path(model)
    return folder_identity(folder, weight_files(folder)) if folder.is_dir() else model
