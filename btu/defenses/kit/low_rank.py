"""Low-rank updates of a model's matrices: learned beside frozen weights, then merged into them.

Imports torch: import it where a stage runs, not where it is declared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from btu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowRank(nn.Module):
    """What is added to the output of a matrix: factors * (up @ down @ input).

    down: (rank, inputs), drawn as PyTorch draws a linear layer's weight.
    up: (outputs, rank), zeros at first, so that the model is unchanged before its first step.
    factors: (outputs,) fixed.
    """

    def __init__(self, inputs: int, rank: int, factors: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        drawn = torch.rand(rank, inputs, generator=generator) * 2 - 1
        self.down = nn.Parameter(drawn * bound)
        self.up = nn.Parameter(torch.zeros(len(factors), rank))
        self.factors: Tensor
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        low = nn.functional.linear(nn.functional.linear(given, self.down), self.up)
        return low * self.factors.to(low.dtype)

    def update(self) -> Tensor:
        """Return the (outputs, inputs) matrix that does the same."""
        return self.factors[:, None] * (self.up @ self.down)


def group_factors(outputs: int, scalings: Sequence[float]) -> Tensor:
    """Return (outputs,) the scaling of each output: one per group of about equal size, in order."""
    number = torch.arange(outputs) * len(scalings) // outputs
    return torch.tensor(list(scalings), dtype=torch.float32)[number]


@contextmanager
def low_rank(
    model: PreTrainedModel, rank: int, alpha: float, scalings: Sequence[float], seed: int
) -> Iterator[dict[str, LowRank]]:
    """Give each matrix below the classifier a low-rank update; merge the updates at the end.

    Within the context only the updates and the classifier (all that lies outside of the base model)
    require gradients. Afterwards the model has the modules that it had, with other weights, and all
    its parameters require gradients.

    rank: of every update.
    alpha: an update is multiplied by alpha / rank.
    scalings: of the groups of outputs (`group_factors`).
    seed: draws the updates.

    Yields the updates by the names of their matrices.

    Raises:
        UserError: the model has no part outside of its base model, or a matrix whose smaller side
            is not above the rank.
    """
    matrices = _matrices(model)
    for name, matrix in matrices.items():
        side = min(matrix.weight.shape)  # type: ignore[arg-type]
        if rank >= side:
            raise UserError(
                f"defense.rank must be below the smaller side of every matrix, got {rank}: {name} "
                f"of a {type(model).__name__} has {side}; lower it."
            )
    generator = torch.Generator().manual_seed(seed)
    model.base_model.requires_grad_(False)
    updates: dict[str, LowRank] = {}
    hooks = []
    for name, matrix in matrices.items():
        inputs, outputs = _inputs_outputs(matrix)
        factors = group_factors(outputs, scalings) * (alpha / rank)
        updates[name] = LowRank(inputs, rank, factors, generator)
        matrix.register_module("low_rank", updates[name])
        hooks.append(matrix.register_forward_hook(_add))
    try:
        yield updates
    finally:
        for hook in hooks:
            hook.remove()
        for name, matrix in matrices.items():
            _merge(matrix, updates[name])
            del matrix.low_rank
        model.requires_grad_(True)


def _add(matrix: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    added: Tensor = matrix.low_rank(inputs[0])
    return output + added


def _merge(matrix: Any, update: LowRank) -> None:
    with torch.no_grad():
        added = update.update().to(matrix.weight.device)
        matrix.weight += added if isinstance(matrix, nn.Linear) else added.T


def _matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the matrices of the base model by name.

    Raises:
        UserError: the classifier cannot be told from the base model.
    """
    from transformers.pytorch_utils import Conv1D

    inner = {id(parameter) for parameter in model.base_model.parameters()}
    if all(id(parameter) in inner for parameter in model.parameters()):
        raise UserError(
            f"cannot tell the classifier of a {type(model).__name__} from the rest of the model, "
            "and MuScleLoRA trains it as it is; use another victim or another defense."
        )
    return {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _inputs_outputs(matrix: nn.Module) -> tuple[int, int]:
    first, second = matrix.weight.shape  # type: ignore[misc]
    return (second, first) if isinstance(matrix, nn.Linear) else (first, second)
