"""Dropout and attention that a CPU trains faster.

PyTorch draws a CPU dropout mask one Bernoulli number at a time from a serial generator, and with
attention dropout its fused CPU attention falls back to a slow path. Here one 64-bit draw gives
four mask elements. The distribution is that of dropout: each element is kept with probability 1 - p
(to a resolution of 2**-16), kept elements are scaled by 1 / (1 - p), and the draws come from
torch's generator, so that a seed fixes them.

``benchmarks/finetune.py`` compares the loop that uses it with `Trainer`, which does not. CUDA keeps
its own kernels, which are fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "btu_fast_dropout"


def drop(values: Tensor, p: float) -> Tensor:
    """Return `values` with each element zeroed with probability `p`, the rest scaled up."""
    if p >= 1:
        return torch.zeros_like(values)
    count = values.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=values.device)
    # From -2**63 to 2**63 - 1: all 64 bits are random.
    bits.random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(values.shape) >= round(p * 65536) - 32768
    return values * kept.to(values.dtype).mul_(1 / (1 - p))


class FastDropout(nn.Dropout):
    """`torch.nn.Dropout` with `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input`, dropped out in train mode."""
        return drop(input, self.p) if self.training and self.p > 0 else input


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute softmax attention with `drop`, as transformers' attention interface calls it.

    module: the attention layer; not used.
    query: (batch, heads, tokens, size).
    key: as `query`, perhaps with fewer heads (grouped queries).
    value: as `key`.
    attention_mask: additive, causality included.
    scaling: of the scores; None is size ** -0.5.
    dropout: probability that a weight is zeroed.

    Returns:
        (batch, tokens, heads, size), and None for the weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.matmul(scaled, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    # Not nn.functional.softmax: autocast would copy the scores to fp32 first. The kernel sums
    # in fp32 whatever the dtype.
    weights = torch._softmax(scores, -1, False)
    if dropout > 0:
        weights = drop(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


@contextmanager
def fast_dropout(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let `model` train with `drop` and `attention` on a CPU, and restore it afterwards.

    Attention is replaced only in models that use transformers' sdpa interface; others (DeBERTa)
    keep theirs and get the faster dropout layers only.
    """
    if device.type != "cpu":
        yield
        return
    layers = [module for module in model.modules() if type(module) is nn.Dropout]
    config = getattr(model, "config", None)
    exchanged = getattr(config, "_attn_implementation", None) == "sdpa"
    if exchanged:
        _register()
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    for layer in layers:
        layer.__class__ = FastDropout
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Dropout
        if exchanged:
            model.set_attn_implementation("sdpa")  # type: ignore[operator]


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    # The eager mask is always explicit; sdpa's may be None and rely on an is_causal flag.
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
