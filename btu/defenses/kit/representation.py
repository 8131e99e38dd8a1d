"""A classifier's representation of a text: the vector that its output layer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from btu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (ids, mask) of a batch -> (batch, hidden), in fp32.
Represent: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that computes a classifier's logits.

    Raises:
        UserError: there is none.
    """
    classes = model.config.num_labels
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no linear layer with {classes} outputs, one for each "
            "class, in front of which a text's representation could be read; use another victim "
            "or another defense."
        )
    # Other layers with as many outputs belong to the body, before the head.
    return layers[-1]


@contextmanager
def representations(model: PreTrainedModel) -> Iterator[Represent]:
    """Yield a function from (ids, mask) to (batch, hidden): the last hidden state, pooled.

    It is the input of the output layer, so pooling is the classifier's own: BERT's pooler, the
    dense layer of RoBERTa's and DistilBERT's head, or the last real token if every token is
    classified, as in GPT-2. For use with `btu.stages.StageRun.in_batches`, with `model` in eval
    mode.

    Raises:
        UserError: the model has no known output layer.
    """
    read: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0])

    def represent(ids: Tensor, mask: Tensor) -> Tensor:
        read.clear()
        model(input_ids=ids, attention_mask=mask.long())
        (hidden,) = read
        if hidden.ndim == 3:  # (batch, tokens, hidden) -> (batch, hidden)
            last = (mask.sum(1) - 1).clamp(min=0)
            hidden = hidden[torch.arange(len(last), device=last.device), last]
        return hidden.float()

    handle = output_layer(model).register_forward_pre_hook(keep)
    try:
        yield represent
    finally:
        handle.remove()
