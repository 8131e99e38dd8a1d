"""The filters of a transformer, of any architecture: attention heads and feed-forward units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

# What `train_only` tells apart: every parameter belongs to one of these.
PARTS = ("attention", "feed_forward", "embeddings", "rest")


@dataclass(frozen=True)
class Filters:
    """The filters of one block: the inputs of its output layer, in `count` equal parts.

    output: the layer that reads them: an `nn.Linear`, or a `Conv1D` as in GPT-2.
    """

    output: nn.Module
    count: int

    @property
    def weight(self) -> Tensor:
        """The output layer's weight, (outputs, inputs); a view if it is stored transposed."""
        from torch import nn

        weight: Tensor = self.output.weight  # type: ignore[assignment]
        return weight if isinstance(self.output, nn.Linear) else weight.T

    def spread(self, values: Tensor) -> Tensor:
        """Expand (count,) values per filter to (inputs,) values per input of the layer."""
        return values.repeat_interleave(self.weight.shape[1] // self.count)


@dataclass(frozen=True)
class Blocks:
    """The matrices of a layer, in order. The last one of each block is its output layer."""

    attention: tuple[nn.Module, ...]
    feed_forward: tuple[nn.Module, ...]


def find_filters(model: nn.Module) -> dict[str, Filters]:
    """Return the attention heads and feed-forward units of every layer, by name.

    Raises:
        UserError: the model's layers have another structure (`find_blocks`).
    """
    heads = int(model.config.num_attention_heads)  # type: ignore[union-attr,arg-type]
    found: dict[str, Filters] = {}
    for number, layer in enumerate(find_blocks(model), 1):
        last = layer.feed_forward[-1]
        found[f"layer {number} heads"] = Filters(layer.attention[-1], heads)
        found[f"layer {number} units"] = Filters(last, _inputs_outputs(last)[0])
    return found


def find_blocks(model: nn.Module) -> list[Blocks]:
    """Return the matrices of attention and feed-forward block of every layer.

    Layers are identified by their number, and matrices by shape and order: the last matrix of a
    layer ends the feed-forward block, those of its width directly before it start that block, and
    the one before those ends the attention block.

    Raises:
        UserError: the model's layers have another structure.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config: Any = model.config
    depth, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    found: list[Blocks] = []
    for layer in stacks[0] if len(stacks) == 1 else ():
        matrices = [m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
        # (inputs, outputs), however the weight is stored.
        shapes = [_inputs_outputs(m) for m in matrices]
        last = len(matrices) - 1
        units = shapes[last][0] if matrices else 0
        opening = last
        while opening > 0 and shapes[opening - 1] == (hidden, units) and units != hidden:
            opening -= 1
        attention = opening - 1
        if (
            opening == last
            or attention < 0
            or shapes[last][1] != hidden
            or shapes[attention][1] != hidden
            or shapes[attention][0] % heads
        ):
            break
        found.append(Blocks(tuple(matrices[:opening]), tuple(matrices[opening:])))
    if len(found) != depth:
        raise UserError(
            f"cannot find the neurons of a {type(model).__name__}: NAD and RNP look for a stack of "
            f"{depth} layers, in each of them an attention block that ends with a matrix to "
            f"{hidden} units from {heads} heads, and behind it a feed-forward block of another "
            "width; use another victim or another defense."
        )
    return found


def train_only(model: nn.Module, parts: Collection[str]) -> None:
    """Let only some parts of a model require gradients.

    parts: of `PARTS`: the matrices, with biases, of the ``attention`` blocks, those of the
        ``feed_forward`` blocks, the word ``embeddings``, and the ``rest`` (positions, norms,
        classifier).

    Raises:
        UserError: the model's layers have another structure (`find_blocks`).
    """
    blocks = find_blocks(model)
    of: dict[str, list[nn.Module]] = {
        "attention": [matrix for layer in blocks for matrix in layer.attention],
        "feed_forward": [matrix for layer in blocks for matrix in layer.feed_forward],
        "embeddings": [model.get_input_embeddings()],  # type: ignore[operator]
    }
    model.requires_grad_("rest" in parts)
    for part, modules in of.items():
        for module in modules:
            module.requires_grad_(part in parts)


def _inputs_outputs(matrix: nn.Module) -> tuple[int, int]:
    from torch import nn

    first, second = matrix.weight.shape  # type: ignore[misc]
    return (second, first) if isinstance(matrix, nn.Linear) else (first, second)


@contextmanager
def masked(filters: Mapping[str, Filters]) -> Iterator[dict[str, nn.Parameter]]:
    """Multiply each filter by a mask, a parameter of its output layer that starts at 1.

    Yields the (filters,) masks by name, and removes them afterwards.
    """
    import torch

    masks: dict[str, nn.Parameter] = {}
    hooks = []
    for name, block in filters.items():
        masks[name] = torch.nn.Parameter(torch.ones(block.count, device=block.weight.device))
        block.output.register_parameter("neuron_mask", masks[name])
        hooks.append(block.output.register_forward_pre_hook(_times_mask(block)))
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()
        for block in filters.values():
            del block.output.neuron_mask


def _times_mask(block: Filters) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(output: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        read, *others = inputs
        mask = block.spread(output.neuron_mask)  # type: ignore[arg-type]
        return (read * mask.to(read.dtype), *others)

    return hook


def prune_filters(
    filters: Mapping[str, Filters], masks: Mapping[str, Tensor], threshold: float
) -> int:
    """Zero the weights that read filters whose mask is at most `threshold`, in place.

    masks: (filters,) by name; filters without one stay as they are. Return the number of pruned
    filters.
    """
    import torch

    pruned = 0
    for name, block in filters.items():
        if name not in masks:
            continue
        gone = masks[name] <= threshold
        pruned += int(gone.sum())
        with torch.no_grad():
            block.weight[:, block.spread(gone).to(block.weight.device)] = 0
    return pruned
