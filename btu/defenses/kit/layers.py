"""The hidden states of all layers: one stage for the clean rows, one for incoming texts.

Defenses that judge a text by its hidden states share both stages. What such a defense estimates
comes from one part of the clean rows, and its bar from the other part: texts that an estimate has
seen lie closer to it than others, and a bar from them would reject too many texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.defenses.kit.screening import save_values
from btu.errors import UserError
from btu.findings import incoming_of
from btu.foundation import Foundation
from btu.seeding import derive_seed
from btu.stage_files import clean_rows_of, model_of, victim_of
from btu.stages import Stage, StageRun, stage
from btu.types import IntArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from btu.training import Encoded

POOLINGS = ("position", "mean")
CLEAN, INCOMING = "clean hidden states", "incoming hidden states"


def layer_stages(
    base: Foundation, model: Stage, incoming: Stage, pooling: str = "position"
) -> dict[str, Stage]:
    """Declare the hidden states of the clean rows and of the incoming texts.

    They are returned by the roles ``clean`` and ``incoming``. Defenses with the same `pooling`
    share them.

    pooling: ``position`` takes the token that the classifier reads, ``mean`` the mean over a text's
        tokens.
    """
    config = {"pooling": pooling, "precision": base.train.precision}
    reads = {"clean": base.clean, "model": model}
    clean = base.stage(clean_layers, CLEAN, config, reads, units=base.clean_rows)
    came = base.stage(incoming_layers, INCOMING, config, {**reads, "incoming": incoming})
    return {"clean": clean, "incoming": came}


def check_clean_rows(name: str, rows: int, classes: int) -> None:
    """Raise a `UserError` if there are too few clean rows to estimate on and to hold out.

    Two rows of a class are the fewest that vary, and one is held out.

    name: of the defense. rows: number of clean rows. classes: number of classes.
    """
    least = 3 * classes
    if rows < least:
        raise UserError(
            f"defense '{name}' estimates on two clean rows or more of each of {classes} classes "
            f"and computes its bar from others, and the data have {rows}; "
            f"raise data.max_clean_rows to at least {least}."
        )


def split_by_class(labels: IntArray, held_out: float, seed: int) -> tuple[IntArray, IntArray]:
    """Draw the indices of the clean rows to estimate on, and of those to hold out.

    Of each class at least two rows are for the estimate, and one of three or more is held out. A
    class without rows has none in either.

    labels: (clean rows,). held_out: the share of each class's rows to hold out.

    Raises:
        UserError: fewer than two rows are held out.
    """
    rng = np.random.default_rng(derive_seed(seed, "held-out clean rows"))
    learned, held = [], []
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        count = min(len(rows) - 2, max(1, round(held_out * len(rows)))) if len(rows) > 2 else 0
        held.append(rows[:count])
        learned.append(rows[count:])
    found = np.sort(np.concatenate(learned)), np.sort(np.concatenate(held))
    if len(found[1]) < 2:
        raise UserError(
            f"defense.held_out {held_out} leaves {len(found[1])} of {len(labels)} clean rows for "
            "the bar, and at least two are needed; raise it, or raise data.max_clean_rows."
        )
    return found


@contextmanager
def layer_states(
    model: PreTrainedModel, pooling: str
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Yield a function from (ids, mask) to (batch, layers, hidden), in fp32, without embeddings.

    For use with `btu.stages.StageRun.in_batches`, with `model` in eval mode. The position that the
    classifier reads is a text's last token where every token is classified (GPT-2, Llama), in an
    encoder-decoder, and where the model summarizes at the end (XLNet); otherwise it is the first.
    The layers of an encoder-decoder are those of the encoder, then those of the decoder.

    pooling: one of `POOLINGS`.

    Raises:
        UserError: the model has no known output layer, or its layers do not keep a text's length.
    """
    import torch

    from btu.defenses.kit.representation import output_layer

    dimensions: list[int] = []
    handle = output_layer(model).register_forward_pre_hook(
        lambda _, inputs: dimensions.append(inputs[0].ndim)
    )
    last = _reads_the_end(model)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        dimensions.clear()
        output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        layers = _layers_of(model, output, ids)
        if pooling == "mean":
            weight = mask[:, :, None].float()
            total = weight.sum(1).clamp(min=1)
            return torch.stack([(x.float() * weight).sum(1) / total for x in layers], 1)
        place = torch.zeros_like(ids[:, 0])
        if last or dimensions[-1] == 3:
            place = (mask.sum(1) - 1).clamp(min=0)
        rows = torch.arange(len(place), device=place.device)
        return torch.stack([layer[rows, place].float() for layer in layers], 1)

    try:
        yield states
    finally:
        handle.remove()


def _reads_the_end(model: PreTrainedModel) -> bool:
    summary = getattr(getattr(model, "sequence_summary", None), "summary_type", None)
    return summary == "last" or bool(model.config.is_encoder_decoder)


def _layers_of(model: PreTrainedModel, output: Any, ids: Tensor) -> list[Tensor]:
    """Return each layer's (batch, tokens, hidden) states, without those of the embeddings."""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    stacks = [getattr(output, name, None) or () for name in names]
    layers = [layer for stack in stacks for layer in stack[1:]]
    if not layers or any(layer.shape[:2] != ids.shape for layer in layers):
        raise UserError(
            f"{type(model).__name__} does not return a hidden state of each token from each "
            "layer, which DAN and BadActs read; use another victim or another defense."
        )
    return layers


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def clean_layers(run: StageRun) -> dict[str, Any]:
    """Write the clean rows' hidden states: ``hidden``, (rows, layers, hidden), and ``label``."""
    clean = clean_rows_of(run)
    return _write_layers(run, clean, CLEAN, label=clean.labels.numpy())


@stage(version=1)
def incoming_layers(run: StageRun) -> dict[str, Any]:
    """Write the incoming texts' hidden states: ``hidden``, (texts, layers, hidden)."""
    victim = victim_of(run, run.facts("clean")["classes"])
    return _write_layers(run, victim.encode(incoming_of(run.inputs["incoming"])), INCOMING)


def _write_layers(run: StageRun, rows: Encoded, name: str, **more: IntArray) -> dict[str, Any]:
    model = model_of(run, "model")
    with layer_states(model, run.config["pooling"]) as states:
        hidden = run.in_batches(model, rows, states, precision=run.config["precision"], stage=name)
    save_values(run.folder, hidden=hidden, **more)
    return {"rows": len(rows), "layers": hidden.shape[1]}
