"""What a classifier makes of a text: the vector that its output layer reads."""

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
    """Return the linear layer that a classifier's logits come from.

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
            "class, in front of which a text's representation could be read; take another victim "
            "or another defense."
        )
    # Whatever else has as many outputs stands in the body, before the head.
    return layers[-1]


@contextmanager
def representations(model: PreTrainedModel) -> Iterator[Represent]:
    """Yield a function from (ids, mask) to (batch, hidden): the last hidden state, pooled.

    It is what the output layer reads, so that pooling is the classifier's own: BERT's pooler, the
    dense layer of RoBERTa's and DistilBERT's head, the last real token where, as in GPT-2, every
    token is classified. For `btu.stages.StageRun.in_batches`; `model` in eval mode has no dropout
    on the way.

    Raises:
        UserError: the model has no output layer that is understood.
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
