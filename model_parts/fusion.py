"""User-item modality attention on a grid: which blend of an item's modalities a user sees.

Weights are resolved to the simplex grid {0, 1/r, ..., 1}^M with sum 1, so that the codes of every
item under every blend fit into one small table (the atlas). Letters: B users, N items,
M modalities, G grid points, z width of a latent, d_a attention width.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def simplex_grid(modalities: int, resolution: int) -> Tensor:
    """All weight vectors with steps of 1/resolution, [G, M]; the first is the most even one.

    G is the number of ways to write `resolution` as a sum of M counts: 5 for M 2 and r 4, 15 for
    M 3 and r 4.
    """
    counts = [
        point
        for point in itertools.product(range(resolution + 1), repeat=modalities)
        if sum(point) == resolution
    ]
    counts.sort(key=lambda point: (max(point) - min(point), point))
    return torch.tensor(counts, dtype=torch.float32) / resolution


def nearest_grid_point(weights: Tensor, grid: Tensor) -> Tensor:
    """Index of the grid point nearest to each weight vector: [..., M] -> [...] int64."""
    return (weights @ grid.T - 0.5 * grid.square().sum(1)).argmax(-1)


class ModalityAttention(nn.Module):
    """alpha_m(u, i) = softmax_m(<W_q q_u, W_k z_im> / sqrt(d_a) + <w_m, q_u> + b_m), DESIGN 5.3.

    The logit is a dot product of a user side and an item side, so all items of a user cost one
    matrix product. A missing modality gets weight 0. `level` drops terms for the controls:
    `user_item` has all, `user` only the user's, `item` only the item's, `none` gives even weights.
    """

    def __init__(self, context: int, latent: int, modalities: int, width: int, level: str) -> None:
        super().__init__()
        self.modalities = modalities
        self.scale = width**-0.5
        self.query = nn.Linear(context, width * modalities) if level == "user_item" else None
        self.key = nn.Linear(latent, width, bias=False) if level == "user_item" else None
        self.of_user = nn.Linear(context, modalities) if level.startswith("user") else None
        self.of_item = nn.Linear(latent * modalities, modalities) if level == "item" else None

    def forward(self, context: Tensor, latents: Tensor, present: Tensor) -> Tensor:
        """Every user with every item: context [B, c], latents [N, M, z] -> weights [B, N, M]."""
        logits = context.new_zeros(len(context), *present.shape)
        if self.query is not None and self.key is not None:
            queries = self._queries(context)  # [B, M, d_a]
            logits = logits + torch.einsum("bmw,nmw->bnm", queries, self.key(latents))
        return self._weights(logits, context[:, None], latents[None], present)

    def pairs(self, context: Tensor, latents: Tensor, present: Tensor) -> Tensor:
        """Each user with one item: context [P, c], latents [P, M, z] -> weights [P, M]."""
        logits = context.new_zeros(present.shape)
        if self.query is not None and self.key is not None:
            logits = logits + (self._queries(context) * self.key(latents)).sum(2)
        return self._weights(logits, context, latents, present)

    def _queries(self, context: Tensor) -> Tensor:
        assert self.query is not None
        return self.query(context).unflatten(1, (self.modalities, -1)) * self.scale

    def _weights(self, logits: Tensor, context: Tensor, latents: Tensor, present: Tensor) -> Tensor:
        if self.of_user is not None:
            logits = logits + self.of_user(context)
        if self.of_item is not None:
            logits = logits + self.of_item(latents.flatten(-2))
        # finite, so that an item without any modality gets even weights and not NaN
        return torch.softmax(logits.masked_fill(~present, -1e9), dim=-1)
