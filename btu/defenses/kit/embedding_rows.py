"""Masks of word-embedding rows: a mask scales how far a token's row is from its base row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.types import BoolArray, FloatArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from btu.training import Encoded
    from btu.victims import Victim

BASES = ("neutral", "pretrained")
UNSEEN = ("moved", "pruned", "kept")


def base_rows(victim: Victim, base: str) -> torch.Tensor:
    """Return the (vocabulary, hidden) rows that a mask of 0 gives the tokens.

    base: ``pretrained``, each token's own row before any training; or ``neutral``, for all tokens
        the row of "no token" (`Victim.neutral_row`).
    """
    # The classifier is drawn from the seed, the word embeddings are not.
    fresh: Any = victim.new_model(0)
    pretrained: torch.Tensor = fresh.get_input_embeddings().weight.detach()
    if base == "pretrained":
        return pretrained.clone()
    return victim.neutral_row(pretrained).expand_as(pretrained).clone()


@contextmanager
def masked_rows(model: nn.Module, base: Tensor, learnable: BoolArray) -> Iterator[nn.Parameter]:
    """Let each word embedding be base + mask * (row - base), with masks that start at 1.

    base: (vocabulary, hidden). learnable: (vocabulary,) the masks of other tokens are 1 whatever
    their value. Yields the (vocabulary,) masks, a parameter of the table, and removes them
    afterwards.
    """
    import torch

    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    # A table of its own class: some models scale what they look up.
    plain = copy.deepcopy(table).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(base)
    masks = torch.nn.Parameter(torch.ones(len(base), device=table.weight.device))
    table.register_module("base_rows", plain)
    table.register_parameter("row_mask", masks)
    table.register_buffer("row_learnable", torch.from_numpy(learnable), persistent=False)

    def hook(table: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = inputs[0]
        mask = torch.where(table.row_learnable, table.row_mask, 1.0)[ids][..., None]
        plain: Tensor = table.base_rows(ids)
        # In this form a mask of 1 changes no bit.
        return output + (mask.to(output.dtype) - 1) * (output - plain)

    handle = table.register_forward_hook(hook)
    try:
        yield masks
    finally:
        handle.remove()
        del table.base_rows, table.row_mask, table.row_learnable


def prune_rows(model: nn.Module, base: Tensor, masks: Tensor, threshold: float) -> None:
    """Replace the rows whose mask is at most `threshold` by their base rows, in place."""
    import torch

    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    gone = (masks <= threshold).to(weight.device)
    with torch.no_grad():
        weight[gone] = base.to(weight.device)[gone]


def occurring(victim: Victim, data: Encoded, vocabulary: int) -> BoolArray:
    """Return (vocabulary,) which tokens occur in the rows; special tokens count as not occurring.

    They stand in every row, and without them a text is no text.
    """
    found: BoolArray = data.counts(vocabulary) > 0
    found[[i for i in victim.tokenizer.all_special_ids if i < vocabulary]] = False
    return found


def unseen_masks(moved: FloatArray, unseen: BoolArray, choice: str) -> FloatArray:
    """Return the (vocabulary,) masks of rows that have no gradient; 1 for all others.

    moved: (vocabulary,) how far each row is from its pretrained one. unseen: (vocabulary,) the rows
    without a gradient. choice: ``kept`` gives them 1, ``pruned`` 0, and ``moved`` the share of the
    unseen rows that moved more.
    """
    masks = np.ones(len(moved))
    if choice == "pruned":
        masks[unseen] = 0.0
    elif choice == "moved" and unseen.any():
        own = moved[unseen]
        # (rows up to this distance) are not further; all others are.
        further = len(own) - np.searchsorted(np.sort(own), own, side="right")
        masks[unseen] = further / len(own)
    return masks
