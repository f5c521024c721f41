"""Item-level softmax cross-entropy over a whole catalogue, in fused chunks.

The plain form keeps a [positions, items] tensor for backward (Beauty: 1,500 x 12,101 floats a step,
written and read several times). Here each chunk of positions is multiplied, normalised and
differentiated at once while its logits are in cache; only gradients of the inputs survive.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at once. On a CPU 24 MB stays near the last-level cache; a GPU wants larger products.
_CHUNK_NUMBERS = {"cpu": 6_000_000, "cuda": 128_000_000}
# Rows of a matrix product that are a multiple of this run about twice as fast (vector width).
_ROW_MULTIPLE = 16


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss, state_grad, item_grad = _chunked_loss(states, items, targets, needs_gradient)
        if needs_gradient:
            ctx.save_for_backward(state_grad, item_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        state_grad, item_grad = ctx.saved_tensors
        return state_grad * upstream, item_grad * upstream, None


def queries(states: Tensor, temperature: float) -> Tensor:
    """What items are multiplied with, [..., d]: unit vectors over tau; with tau 0 as they are."""
    return F.normalize(states, dim=-1) / temperature if temperature else states


def keys(items: Tensor, temperature: float) -> Tensor:
    """What `queries` are multiplied with, [..., d]: unit vectors; with tau 0 as they are."""
    return F.normalize(items, dim=-1) if temperature else items


def item_cross_entropy(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Mean over P positions of -log softmax(states items^T)[target].

    states [P, d], items [N, d], targets [P] rows of `items` (0-based). Equal to
    `F.cross_entropy(states @ items.T, targets)` up to rounding, with gradients for both inputs.
    """
    return _FusedCrossEntropy.apply(states, items, targets)


def _chunked_loss(
    states: Tensor, items: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n_positions, n_items = len(states), len(items)
    table = F.pad(items.float(), (0, 0, 0, -n_items % _ROW_MULTIPLE))
    rows = max(_ROW_MULTIPLE, _CHUNK_NUMBERS.get(states.device.type, 128_000_000) // len(table))
    total = states.new_zeros((), dtype=torch.float32)
    state_grad = torch.empty_like(states) if with_gradient else states
    item_grad = torch.zeros_like(table) if with_gradient else table
    for start in range(0, n_positions, rows):
        chunk = states[start : start + rows].float()
        target = targets[start : start + rows]
        logits = (chunk @ table.T).float()
        logits[:, n_items:] = float("-inf")
        probabilities = torch.softmax(logits, dim=1)
        picked = probabilities.gather(1, target[:, None])
        # log of a probability that underflowed would be -inf: fall back to log-softmax there
        if bool((picked < 1e-30).any()):
            total += F.cross_entropy(logits, target, reduction="sum")
        else:
            total -= picked.log().sum()
        if with_gradient:
            probabilities.scatter_add_(1, target[:, None], picked.new_full(picked.shape, -1.0))
            state_grad[start : start + rows] = probabilities @ table
            item_grad.addmm_(probabilities.T, chunk)
    scale = 1.0 / max(n_positions, 1)
    if with_gradient:
        state_grad = state_grad.mul_(scale)
        item_grad = item_grad[:n_items].mul_(scale).to(items.dtype)
    return total * scale, state_grad, item_grad
