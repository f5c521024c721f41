"""A loss over many rows, differentiated a few rows at a time.

A softmax over P positions and S items with several numbers for each pair makes tensors of hundreds
of megabytes that autograd would write, keep and read again. Here each chunk of positions is scored,
and differentiated while its numbers are in cache; only gradients of the inputs survive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], rows: int, n_split: int, *tensors: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[3:]
        sums = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        total = torch.zeros((), device=tensors[0].device)
        for start in range(0, len(tensors[0]), rows):
            cut = slice(start, start + rows)
            parts = [
                (t[cut] if i < n_split else t).detach().requires_grad_(wanted[i])
                for i, t in enumerate(tensors)
            ]
            with torch.enable_grad():
                part = function(*parts)
            total += part.detach()
            if any(wanted):
                leaves = [p for p, w in zip(parts, wanted, strict=True) if w]
                found = iter(torch.autograd.grad(part, leaves, allow_unused=True))
                for i, sink in enumerate(sums):
                    gradient = next(found) if sink is not None else None
                    if sink is not None and gradient is not None:
                        (sink[cut] if i < n_split else sink).add_(gradient)
        ctx.save_for_backward(*(s for s in sums if s is not None))
        ctx.wanted = wanted
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        return None, None, None, *(next(saved) * upstream if w else None for w in ctx.wanted)


def chunked_sum(
    function: Callable[..., Tensor], split: Sequence[Tensor], shared: Sequence[Tensor], rows: int
) -> Tensor:
    """Sum of `function(*chunk, *shared)` over chunks of `rows` rows of the tensors in `split`.

    `function` returns a scalar and must reach tensors that want a gradient only through its
    arguments. Equal to `function(*split, *shared)` for a sum over rows, up to rounding.
    """
    return _ChunkedSum.apply(function, rows, len(split), *split, *shared)
