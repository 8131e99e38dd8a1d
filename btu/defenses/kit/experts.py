"""A product of experts: a model and a shallow one, trained together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from btu.errors import UserError
from btu.training import logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Experts(nn.Module):
    """The product of a main and a shallow classifier of the same architecture.

    main, shallow: their weights are the parameters of this module.
    beta: exponent of the shallow one's probabilities.
    """

    def __init__(self, main: PreTrainedModel, shallow: PreTrainedModel, beta: float) -> None:
        super().__init__()
        self.main, self.shallow, self.beta = main, shallow, beta
        # Both have the attention of the first: the training loop exchanges it by these two names.
        self.config = main.config

    def set_attn_implementation(self, name: str) -> None:
        """Set the attention of both models."""
        self.main.set_attn_implementation(name)
        self.shallow.set_attn_implementation(name)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (batch, classes) log-probabilities: of the product, the main, the shallow one.

        With beta 0 the shallow model is not computed, and its probabilities are uniform.
        """
        main = logits_of(self.main, ids, mask).log_softmax(dim=-1)
        if self.beta == 0:
            return main, main, torch.zeros_like(main).log_softmax(dim=-1)
        shallow = logits_of(self.shallow, ids, mask).log_softmax(dim=-1)
        return (main + self.beta * shallow).log_softmax(dim=-1), main, shallow


def keep_first_layers(model: PreTrainedModel, layers: int) -> None:
    """Cut a model to its first `layers` layers, in place. Its embeddings and its head stay.

    Raises:
        UserError: it has fewer layers, or not one stack of them.
    """
    depth = int(model.config.num_hidden_layers)
    if layers > depth:
        raise UserError(f"defense.layers is {layers}, but the victim has {depth} layers; lower it.")
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(stacks) != 1:
        raise UserError(
            f"cannot cut a {type(model).__name__} to {layers} layers: it has {len(stacks)} stacks "
            f"of {depth} layers, and one is needed; use another victim or another defense."
        )
    parent, name, stack = stacks[0]
    setattr(parent, name, stack[:layers])
    # Some models count their layers by the config.
    model.config.num_hidden_layers = layers


def adamw_of(
    experts: Experts, learning_rate: float, shallow_learning_rate: float, weight_decay: float
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Return the optimizer for `btu.training.fit`: its AdamW, with a learning rate per model."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        trained = {id(weight) for weight in parameters}
        groups: list[dict[str, Any]] = []
        for model, rate in (
            (experts.main, learning_rate),
            (experts.shallow, shallow_learning_rate),
        ):
            weights = [weight for weight in model.parameters() if id(weight) in trained]
            for decay, chosen in (
                (weight_decay, [weight for weight in weights if weight.ndim > 1]),
                (0.0, [weight for weight in weights if weight.ndim <= 1]),
            ):
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)

    return make


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return each row's mean of KL(one, other) and KL(other, one), in nats: (rows,).

    one, other: (rows, classes) log-probabilities.
    """
    distance: Tensor = ((one.exp() - other.exp()) * (one - other)).sum(dim=-1) / 2
    return distance
