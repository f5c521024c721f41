"""Dropout and attention with dropout, cheap on a CPU, too.

PyTorch draws every kept or dropped component on a CPU with a number of its own, one after another,
which took a fifth of a training step of TIGER. Here one draw of 64 bits decides on
four components. On a GPU both are PyTorch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CELLS = 2**16  # values of a 16-bit draw


class Dropout(nn.Module):
    """`nn.Dropout`, whose rate is met to one part in 65,536."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, as it is outside of training."""
        return drop(x, self.rate) if self.training else x

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.rate}"


def drop(x: Tensor, rate: float) -> Tensor:
    """x with a share `rate` of its components set to zero, the others larger to make up for it."""
    if rate == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # which cannot trace `_kept`
        return F.dropout(x, rate)
    return x * _kept(x, rate)


def _kept(x: Tensor, rate: float) -> Tensor:
    """Zero at what is dropped, 1 / share kept elsewhere, like x."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    cells = draws.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(rate * _CELLS), _CELLS - 1)
    return (cells >= dropped - _CELLS // 2).to(x.dtype).mul_(_CELLS / (_CELLS - dropped))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    rate: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`: queries [..., t, h], keys and values [..., S, h] ->
    [..., t, h]. `mask` is bool, True where one may look, or is added to the scores; `rate` is the
    dropout of attention weights; `scale` defaults to 1 / sqrt(h). Every query must see a key."""
    if rate == 0 or queries.device.type != "cpu":
        return F.scaled_dot_product_attention(
            queries, keys, values, mask, rate, is_causal=causal, scale=scale
        )
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    scores = (queries * scale if scale != 1 else queries) @ keys.transpose(-1, -2)
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    elif mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    # mixed precision takes the softmax in float32: dropped after it is back to that of the values
    return drop(torch.softmax(scores, dim=-1).to(values.dtype), rate) @ values
