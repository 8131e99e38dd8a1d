"""Reconstructive Neuron Pruning (RNP): unlearn clean rows, recover them, prune the other filters.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang: Reconstructive Neuron Pruning for Backdoor Defense (ICML 2023,
arXiv 2305.14876). Reference code: bboylyg/RNP at 966e060, for images.

Three steps, on a few hundred clean rows:

1. Unlearn: gradient ascent on the clean rows, until the model's accuracy on them is about chance.
   The backdoor remains.
2. Recover: freeze the unlearned model and learn a mask in [0, 1] over its filters that lowers the
   loss on the same rows. Masks of clean filters stay high; masks of the backdoor's filters fall.
3. Prune: in the poisoned model, prune the filters whose mask is at most a threshold.

The original, on CIFAR-10 with ResNet-18 and 500 rows: ascent on all parameters with SGD at 0.01
until the accuracy is at most 0.2 (chance 0.1); masks start at 1, SGD at 0.2, loss times 0.2, 20
epochs; threshold swept on the test set. ASR 100 -> 1.7 at threshold 0.3, accuracy 92.8.

No port to text transformers was found. Differences here, and their reasons:

- A filter is an intermediate unit of a feed-forward block, or an attention head. A mask multiplies
  the inputs of the block's output layer (all units of a head by one number). The original masks the
  scale of batch norm, which a transformer does not have: layer norm scales units of the residual
  stream, which are not filters.
- Pruning zeroes the filter's columns in the output layer, so that the saved model needs no masks.
  The layer's bias stays, like that of batch norm in the original.
- The ascent ends relative to chance (`unlearn_stop`): 0.2 is below chance with two classes.
  Accuracy is averaged over the last `STOP_BATCHES` batches, as an ascent can go from 0.9 to 0 in
  one epoch.
- The ascent uses AdamW. The masks are learned by SGD as in the original, here with momentum 0.9:
  Adam moves all masks about equally, so that they do not separate filters. The rate is 1.0, without
  the loss factor of 0.2; the masks' gradients are not clipped.
- ``tuning``: a short fine-tune on clean rows follows the pruning, which the original does not have:
  filters of a transformer that serve the backdoor serve clean rows too, and tuning restores
  accuracy. It does not keep the pruned filters at zero.
- ``filters`` may add the word ``embeddings``, where a text backdoor lives too. See below.
- ``unlearn_parts`` may limit the ascent to some parts of the model. The original, and the default,
  train all parameters.
- A null threshold is chosen on clean rows that the steps above have not used: the largest on a grid
  up to which accuracy, after tuning, falls by at most `max_clean_loss`. The model is the one that
  was measured. If no threshold qualifies, the model stays the poisoned one.

**Word embeddings as filters.** A mask of an embedding row scales its distance from a base row:
base + mask * (row - base). A pruned row is its base row. By default the base is the row of "no
token" (padding): the model then cannot tell the token from any other pruned one, as zeroing removes
all that a unit contributes. The alternative is the token's pretrained row, which removes only what
training changed in it.

The paper's criterion does not cover all rows. The masks are learned on clean rows, and a token that
does not occur in them has no gradient: neither in the ascent, which leaves its row where the
poisoned training put it, nor in the recovery, which leaves its mask at 1. A rare trigger is such a
token, so the paper's criterion would always keep it. `unseen_rows` decides about these rows:
``kept`` is the paper's criterion, ``pruned`` prunes all of them at every threshold, and ``moved``
orders them by how far the poisoned training moved them. The mask is then the share of these rows
that moved further: a threshold of 0.1 prunes the tenth that moved most. Only tokens of the training
rows are candidates, since no others can be a trigger. Special tokens are never pruned. The cost of
losing rare words is measured like that of all pruning, on held-out clean rows, which have rare
words of their own. A trigger of common words is not unseen, and its rows have learned masks.
Pruned tokens are reported as flagged (`Suspects.flagged`).

Two by-products come from the paper: the class whose clean rows the unlearned model still predicts
correctly is taken to be the attack's target (`Suspects.target`), and training rows whose label it
still finds likely are suspicious (`Suspects.rows`).

With two classes, the class that survives the ascent need not be the target: it was the target in
one of two draws of the 500 rows on one poisoned model. On SST-2 with MiniLM the defaults do not
remove BadNets; ``docs/defenses.md`` lists what was tried.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL, Given
from btu.defenses.kit.embedding_rows import (
    BASES,
    UNSEEN,
    base_rows,
    masked_rows,
    occurring,
    prune_rows,
    unseen_masks,
)
from btu.defenses.kit.neurons import (
    PARTS,
    Filters,
    find_filters,
    masked,
    prune_filters,
    train_only,
)
from btu.errors import UserError, unknown
from btu.findings import Suspects
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.settings import TrainSettings, check_count, check_fraction, check_positive
from btu.stage_files import (
    clean_rows_of,
    model_of,
    read_table,
    save_model,
    training_rows_of,
    victim_of,
    write_table,
)
from btu.stages import Stage, StageRun, as_config, stage
from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from btu.training import Encoded
    from btu.victims import Victim


MASKS, JUDGED = "masks.safetensors", "judged.parquet"
# What may be pruned -> how the names of such filters end (`find_filters`); the word embeddings have
# one array of masks, of this name.
ENDINGS = {"feed_forward": " units", "heads": " heads"}
EMBEDDINGS = "embeddings"
FILTERS = (*ENDINGS, EMBEDDINGS)
NEURONS = tuple(ENDINGS)
# The accuracy that ends the ascent is averaged over this many batches.
STOP_BATCHES = 3
# Thresholds to try if none is given. Masks start at 1, so 1 is not a threshold.
GRID = tuple(step / 20 for step in range(20))
# Fewer if each is followed by tuning, which takes longer.
TUNED_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
MOMENTUM = 0.9


@dataclass(frozen=True)
class NeuronPruning:
    """Reconstructive Neuron Pruning.

    clean_rows: number of reserved clean rows, drawn at random, for unlearning and recovery. The
        others are held out to choose the threshold.
    filters: what is pruned: a list of ``feed_forward`` units, attention ``heads`` and word
        ``embeddings``, or one of them. Null is units and heads.
    embedding_base: what a pruned embedding row becomes: the ``neutral`` row, or the token's
        ``pretrained`` one. Like `unseen_rows`, it has an effect if `filters` has ``embeddings``.
    unseen_rows: the masks of tokens in the training rows that the rows of the recovery do not
        contain: ordered by how far training ``moved`` them, all ``pruned``, or all ``kept``.
    unlearn_parts: what the ascent trains: a list of ``attention``, ``feed_forward``, word
        ``embeddings`` and the ``rest`` (positions, norms, classifier), or one of them. Null is the
        whole model.
    unlearn_stop: the ascent ends when the accuracy is at most this many times chance, which is
        1 / classes; above 0.
    unlearn_epochs: passes by which the ascent must have ended.
    unlearn_learning_rate: AdamW's, constant.
    recover_learning_rate: that of SGD with momentum 0.9, constant.
    recover_epochs: passes of the recovery over the rows.
    batch_size: rows per step, for unlearning and recovery.
    threshold: filters with masks up to this value are pruned, in [0, 1); null chooses it by
        `max_clean_loss`.
    max_clean_loss: the accuracy on the held-out clean rows that pruning, including tuning if any,
        may cost, in [0, 1]; has an effect if `threshold` is null. If the lowest threshold on the
        grid costs more, nothing is done: the model stays the poisoned one, without tuning,
        ``neurons_pruned`` is 0, and there is neither a ``prune_threshold`` nor a ``prune_cost``.
    tuning: whether to fine-tune after the pruning, before its cost is measured, on the clean rows
        that are not held out: those unlearned and half of the rest.
    tune_epochs, tune_learning_rate: for that fine-tune; null takes those of the sweep's `tuning`.
        They have an effect only with `tuning`.
    """

    clean_rows: int = 500
    unlearn_stop: float = 1.1
    unlearn_epochs: int = 20
    unlearn_learning_rate: float = 5e-6
    recover_epochs: int = 5
    recover_learning_rate: float = 1.0
    batch_size: int = 32
    threshold: float | None = None
    max_clean_loss: float = 0.02
    tuning: bool = True
    tune_epochs: int | None = 2
    tune_learning_rate: float | None = 2e-4
    filters: Any = None
    embedding_base: str = "neutral"
    unseen_rows: str = "moved"
    unlearn_parts: Any = None

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL, CLEAN_ROWS)

    def __post_init__(self) -> None:
        # The dataclass is frozen; the values used then appear in the config.
        filters = NEURONS if self.filters is None else self.filters
        object.__setattr__(self, "filters", _chosen("defense.filters", filters, FILTERS))
        if self.unlearn_parts is not None:
            parts = _chosen("defense.unlearn_parts", self.unlearn_parts, PARTS)
            object.__setattr__(self, "unlearn_parts", parts)
        for name, choices in (("embedding_base", BASES), ("unseen_rows", UNSEEN)):
            if getattr(self, name) not in choices:
                raise unknown(f"defense.{name}", getattr(self, name), choices)
        for name in ("clean_rows", "unlearn_epochs", "recover_epochs", "batch_size"):
            check_count(f"defense.{name}", getattr(self, name))
        for name in ("unlearn_stop", "unlearn_learning_rate", "recover_learning_rate"):
            check_positive(f"defense.{name}", getattr(self, name))
        check_fraction("defense.max_clean_loss", self.max_clean_loss)
        if self.tune_epochs is not None:
            check_count("defense.tune_epochs", self.tune_epochs)
        if self.tune_learning_rate is not None:
            check_positive("defense.tune_learning_rate", self.tune_learning_rate)
        if self.threshold is not None:
            check_fraction("defense.threshold", self.threshold)
            if self.threshold == 1:
                raise UserError(
                    "defense.threshold must be below 1, got 1: masks are at most 1, so that "
                    "everything would be pruned."
                )

    def check(self, given: Given) -> None:
        """Raise a `UserError` if no rows are held out, or the ascent would end at its start."""
        if given.clean_rows <= self.clean_rows:
            raise UserError(
                f"defense.clean_rows must be below the {given.clean_rows} clean rows that there "
                f"are, got {self.clean_rows}: pruning is measured on the rest; lower it, or raise "
                "data.max_clean_rows."
            )
        if self.unlearn_stop >= given.classes:
            raise UserError(
                f"defense.unlearn_stop must be below the number of classes, {given.classes}, got "
                f"{self.unlearn_stop:g}: it is in units of chance, and "
                f"{self.unlearn_stop / given.classes:g} is an accuracy that every model is below."
            )

    def stages(self, base: Foundation) -> Stage:
        """Declare unlearning, recovery, judging by the unlearned model, and pruning.

        All thresholds share all stages but the last.
        """
        rows = {"clean_rows": self.clean_rows}
        unlearned = base.stage(
            unlearn,
            "unlearn clean rows",
            {
                **rows,
                "stop": self.unlearn_stop,
                # Left out where it has its default, as in the keys of earlier results.
                **({} if self.unlearn_parts is None else {"parts": self.unlearn_parts}),
                "train": as_config(
                    self._train(base, self.unlearn_epochs, self.unlearn_learning_rate),
                ),
            },
            {"clean": base.clean, "model": base.model},
            units=self.clean_rows * 2,
            model=True,
        )
        embeddings, read = self._embeddings(base)
        recovered = base.stage(
            recover,
            "recover neurons",
            {
                **rows,
                **({} if self.filters == list(NEURONS) else {"filters": self.filters}),
                **embeddings,
                "train": as_config(
                    dataclasses.replace(
                        self._train(base, self.recover_epochs, self.recover_learning_rate),
                        max_grad_norm=None,
                    )
                ),
            },
            {"clean": base.clean, "unlearned": unlearned, **read},
            units=self.clean_rows * self.recover_epochs,
        )
        judged = base.stage(
            judge,
            "judge training rows",
            {"precision": base.train.precision},
            {"rows": base.rows, "clean": base.clean, "unlearned": unlearned},
            units=(base.train_rows + base.clean_rows) // 3,
        )
        return self._pruned(base, recovered, judged)

    def _embeddings(self, base: Foundation) -> tuple[dict[str, Any], dict[str, Stage]]:
        """Return what the recovery needs for masks of embedding rows: its config, its inputs."""
        if EMBEDDINGS not in self.filters:
            return {}, {}
        config = {"base": self.embedding_base, "unseen": self.unseen_rows}
        moved = {"model": base.model} if self.unseen_rows == "moved" else {}
        return config, {"rows": base.rows, **moved}

    def _pruned(self, base: Foundation, recovered: Stage, judged: Stage) -> Stage:
        chosen: dict[str, Any] = {"threshold": self.threshold}
        if self.threshold is None:
            chosen["max_clean_loss"] = self.max_clean_loss
        if EMBEDDINGS in self.filters:
            chosen["base"] = self.embedding_base
        tuning: dict[str, Any] = {}
        passes = 1
        if self.tuning:
            settings = base.tuning.applied_to(base.train)
            if self.tune_epochs is not None:
                settings = dataclasses.replace(settings, epochs=self.tune_epochs)
            if self.tune_learning_rate is not None:
                settings = dataclasses.replace(settings, learning_rate=self.tune_learning_rate)
            tuning = {"tuning": as_config(settings)}
            # About three thresholds are tried.
            passes = settings.epochs * (3 if self.threshold is None else 1)
        return base.stage(
            prune,
            "prune neurons",
            {
                "clean_rows": self.clean_rows,
                **chosen,
                "precision": base.train.precision,
                **tuning,
            },
            {"clean": base.clean, "model": base.model, "masks": recovered, "judged": judged},
            units=base.clean_rows * passes,
            kind="cell",
            model=True,
        )

    def _train(self, base: Foundation, epochs: int, learning_rate: float) -> TrainSettings:
        return TrainSettings(
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=self.batch_size,
            precision=base.train.precision,
            weight_decay=0.0,
            warmup_fraction=0.0,
            schedule="constant",
            max_grad_norm=base.train.max_grad_norm,
        )


def _chosen(name: str, value: Any, known: tuple[str, ...]) -> list[str]:
    """Return the names in a list, or the one name, in the order of `known`, each once.

    Raises:
        UserError: there is none, or one that is not known.
    """
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise UserError(
            f"{name} must be a list of at least one of {', '.join(known)}, got {value!r}."
        )
    for one in names:
        if one not in known:
            raise unknown(name, one, known)
    return [one for one in known if one in names]


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def unlearn(run: StageRun) -> dict[str, Any]:
    """Raise the poisoned model's loss on clean rows until its accuracy is about chance.

    Raises:
        UserError: the epochs did not suffice, or the model's neurons cannot be found.
    """
    from btu.training import cross_entropy

    model = model_of(run, "model")
    # A victim whose neurons cannot be found is refused before anything is trained.
    find_filters(model)
    if "parts" in run.config:
        train_only(model, run.config["parts"])
    settings = TrainSettings(**run.config["train"])
    data, _, _ = _split(run)
    bar = run.config["stop"] / run.facts("clean")["classes"]
    batches = min(STOP_BATCHES, -(-len(data) // settings.batch_size))
    last: deque[float] = deque(maxlen=batches)
    steps = 0

    def objective(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, logits = cross_entropy(model, ids, mask, labels)
        return -loss, logits

    def low_enough(accuracy: float) -> bool:
        nonlocal steps
        steps += 1
        last.append(accuracy)
        return len(last) == batches and sum(last) / batches <= bar

    run.fit(
        model,
        data,
        settings,
        seed=derive_seed(run.config["seed"], "neuron unlearning"),
        stage="unlearn clean rows",
        objective=objective,
        after_step=low_enough,
    )
    reached = sum(last) / batches
    if reached > bar:
        raise UserError(
            f"RNP's ascent left an accuracy of {reached:.2f} on {len(data)} clean rows after "
            f"{settings.epochs} epochs, above {bar:.2f}; raise defense.unlearn_learning_rate "
            f"({settings.learning_rate:g}) or defense.unlearn_epochs."
        )
    save_model(model, run.folder)
    return {"steps": steps, "accuracy": reached}


@stage(version=2)
def recover(run: StageRun) -> dict[str, Any]:
    """Learn which filters of the unlearned model recover the clean rows.

    Writes ``masks.safetensors``: a (filters,) mask in [0, 1] for each of `find_filters` that may be
    pruned, by name, and a (vocabulary,) one for the word embeddings if they may.
    """
    import torch
    from safetensors.torch import save_file

    model = model_of(run, "unlearned").requires_grad_(False)
    rows, _, _ = _split(run)
    kinds = run.config.get("filters", NEURONS)
    victim = victim_of(run) if EMBEDDINGS in kinds else None
    with ExitStack() as stack:
        masks = stack.enter_context(masked(_filters(model, kinds)))
        if victim is not None:
            base = base_rows(victim, run.config["base"])
            seen = occurring(victim, rows, len(base))
            masks[EMBEDDINGS] = stack.enter_context(masked_rows(model, base, seen))

        def clip(_: float) -> bool:
            with torch.no_grad():
                for mask in masks.values():
                    mask.clamp_(0, 1)
            return False

        run.fit(
            model,
            rows,
            TrainSettings(**run.config["train"]),
            seed=derive_seed(run.config["seed"], "neuron recovery"),
            stage="recover neurons",
            after_step=clip,
            # Steps in proportion to the gradients: masks with large gradients fall first.
            optimizer_of=lambda masks: torch.optim.SGD(
                masks, lr=run.config["train"]["learning_rate"], momentum=MOMENTUM
            ),
        )
        found = {name: mask.detach().cpu().contiguous() for name, mask in masks.items()}
        logits = run.predict(
            model, rows, precision=run.config["train"]["precision"], stage="recover neurons"
        )
        right = logits.argmax(axis=1) == rows.labels.numpy()
    if victim is not None:
        found[EMBEDDINGS] *= torch.from_numpy(_unseen(run, victim, seen)).float()
    save_file(found, run.folder / MASKS)
    return {
        "recovered_accuracy": float(right.mean()),
        "filters": sum(len(mask) for mask in found.values()),
    }


def _filters(model: PreTrainedModel, kinds: Sequence[str]) -> dict[str, Filters]:
    endings = tuple(ending for kind, ending in ENDINGS.items() if kind in kinds)
    return {name: block for name, block in find_filters(model).items() if name.endswith(endings)}


def _unseen(run: StageRun, victim: Victim, seen: BoolArray) -> FloatArray:
    """Return the masks of the rows that the recovery cannot learn; 1 for those that it learned."""
    unseen = occurring(victim, training_rows_of(run), len(seen)) & ~seen
    moved = np.zeros(len(seen))
    if run.config["unseen"] == "moved":
        model: Any = model_of(run, "model")
        rows = model.get_input_embeddings().weight.detach()
        moved = (rows - base_rows(victim, "pretrained")).norm(dim=1).double().numpy()
    return unseen_masks(moved, unseen, run.config["unseen"])


@stage(version=1)
def judge(run: StageRun) -> dict[str, Any]:
    """Measure what the unlearned model still predicts, for clean rows by class and training rows.

    Writes ``judged.parquet``: ``suspicion``, (training rows,), its log-probability of the row's own
    label.
    """
    from btu.training import logits_of

    model = model_of(run, "unlearned")
    classes = run.facts("clean")["classes"]
    clean, train = clean_rows_of(run), training_rows_of(run)
    precision, stage = run.config["precision"], "judge training rows"
    right = run.predict(model, clean, precision=precision, stage=stage, of=(0, 2)).argmax(axis=1)
    labels = clean.labels.numpy()

    def likelihoods(ids: Tensor, mask: Tensor) -> Tensor:
        return logits_of(model, ids, mask).log_softmax(dim=-1)

    likely = run.in_batches(model, train, likelihoods, precision=precision, stage=stage, of=(1, 2))
    suspicion = likely[np.arange(len(train)), train.labels.numpy()]
    write_table(run.folder / JUDGED, {"suspicion": suspicion.astype(np.float64)})
    recalls = class_recalls(right, labels, classes)
    # A class without clean rows has no recall, and cannot be guessed.
    target = None if np.isnan(recalls).all() else int(np.nanargmax(recalls))
    return {"target": target, "unlearned_accuracy": float((right == labels).mean())}


def class_recalls(predicted: IntArray, labels: IntArray, classes: int) -> FloatArray:
    """Return the (classes,) share of each class's rows that are predicted; NaN without rows."""
    rows = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    recalls: FloatArray = np.divide(hits, rows, out=np.full(classes, np.nan), where=rows > 0)
    return recalls


@stage(version=2)
def prune(run: StageRun) -> dict[str, Any]:
    """Prune the filters that did not recover in the poisoned model; tune it if configured."""
    from safetensors.torch import load_file

    masks = load_file(run.inputs["masks"] / MASKS)
    tried, model = _tried(run, masks)
    affordable = 1.0 if run.config["threshold"] is not None else run.config["max_clean_loss"]
    chosen = largest_affordable(tried, affordable)
    # The model is then the poisoned one. A cost of 0 would look like a free pruning: leave it out.
    measured = {"neurons_pruned": 0, "prune_cost": math.nan}
    tokens = None
    if EMBEDDINGS in masks:
        tokens = () if chosen is None else _tokens(masks[EMBEDDINGS], chosen.threshold)
        measured["tokens_pruned"] = len(tokens)
    if chosen is not None:
        measured |= {
            "neurons_pruned": chosen.pruned - len(tokens or ()),
            "prune_cost": chosen.cost,
            "prune_threshold": chosen.threshold,
        }
    save_model(model, run.folder)
    judged = run.facts("judged")
    suspicion = read_table(run.inputs["judged"] / JUDGED)["suspicion"]
    measured |= {
        "unlearned_accuracy": judged["unlearned_accuracy"],
        "recovered_accuracy": run.facts("masks")["recovered_accuracy"],
    }
    found = Suspects(tokens, rows=suspicion, target=judged["target"])
    return {
        **found.save(run.folder),
        "measured": measured,
        "tried": [dataclasses.asdict(threshold) for threshold in tried],
    }


def _tokens(masks: Tensor, threshold: float) -> tuple[int, ...]:
    """Return the tokens whose rows are pruned, those with the lowest masks first."""
    order = masks.argsort(stable=True)
    return tuple(order[masks[order] <= threshold].tolist())


@dataclass(frozen=True)
class Tried:
    """The effect of a threshold: filters pruned, accuracy lost on held-out clean rows."""

    threshold: float
    pruned: int
    cost: float


def largest_affordable(tried: Sequence[Tried], affordable: float) -> Tried | None:
    """Return the last of `tried` (by rising threshold) before the first that costs too much.

    Later thresholds are ignored even if they cost less: accuracy that rises by more pruning does so
    by chance. None if the first costs too much.
    """
    chosen = None
    for candidate in tried:
        if candidate.cost > affordable:
            break
        chosen = candidate
    return chosen


def _tried(run: StageRun, masks: Mapping[str, Tensor]) -> tuple[list[Tried], PreTrainedModel]:
    """Prune at the threshold, or at rising ones until accuracy falls by too much.

    Return the effect of each, and the model of the last that does not cost too much.
    """
    config = run.config
    given, tuning = config["threshold"], config.get("tuning")
    grid = (given,) if given is not None else GRID if tuning is None else TUNED_GRID
    _, tuned_on, held_out = _split(run)

    def accuracy(model: PreTrainedModel, number: int) -> float:
        where = {"precision": config["precision"], "stage": "prune neurons"}
        logits = run.predict(model, held_out, **where, of=(number, len(grid) + 1))
        return float((logits.argmax(axis=1) == held_out.labels.numpy()).mean())

    base = None
    if EMBEDDINGS in masks:
        base = base_rows(victim_of(run, run.facts("clean")["classes"]), config["base"])
    kept = model_of(run, "model")
    before = accuracy(kept, 0)
    tried: list[Tried] = []
    for number, threshold in enumerate(grid, 1):
        # A larger threshold also prunes all filters of a smaller one.
        pruned = sum(int((mask <= threshold).sum()) for mask in masks.values())
        if tried and pruned == tried[-1].pruned:
            tried.append(dataclasses.replace(tried[-1], threshold=threshold))
            continue
        model = model_of(run, "model")
        prune_filters(find_filters(model), masks, threshold)
        if base is not None:
            prune_rows(model, base, masks[EMBEDDINGS], threshold)
        if tuning is not None:
            run.fit(
                model,
                tuned_on,
                TrainSettings(**tuning),
                seed=derive_seed(config["seed"], "clean tuning"),
                stage="clean tuning (defended)",
            )
        tried.append(Tried(threshold, pruned, before - accuracy(model, number)))
        if given is None and tried[-1].cost > config["max_clean_loss"]:
            break
        kept = model
    return tried, kept


def _split(run: StageRun) -> tuple[Encoded, Encoded, Encoded]:
    """Return the clean rows for unlearning, those for tuning, and those held out.

    Without tuning, all rows that are not unlearned are held out.
    """
    clean = clean_rows_of(run)
    rng = np.random.default_rng(derive_seed(run.config["seed"], "unlearned rows"))
    order = rng.permutation(len(clean))
    rows = run.config["clean_rows"]
    tuned = rows + (len(clean) - rows) // 2 if "tuning" in run.config else rows
    first, second, third = order[:rows], order[:tuned], order[tuned:]
    return clean.take(np.sort(first)), clean.take(np.sort(second)), clean.take(np.sort(third))
