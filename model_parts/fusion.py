"""User-item modality attention on a grid: which blend of an item's modalities a user sees.

Weights are resolved to the simplex grid {0, 1/r, ..., 1}^M with sum 1, so that the codes of every
item under every blend fit into one small table (the atlas). Weights are laid out modality first,
[M, ...]: M is two or three, and a softmax over a last axis that short is slow. Letters: B users,
S items, P user-item pairs, M modalities, G grid points, z width of a latent, d_a attention width.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

# Logit of a modality an item lacks: e^-1e4 is 0 in any precision.
_MISSING = -1e4
# Multipliers of a hash of (user, item): large primes.
_USER_PRIME, _ITEM_PRIME, _HASH_SIZE = 2_654_435_761, 40_503_001, 2**31 - 1


# --------------------------------------------------------------------------- the grid


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


def even_weights(grid: Tensor) -> Tensor:
    """All modalities alike, [1, M], for a grid [G, M], on which that blend need not be."""
    return torch.full_like(grid[:1], 1 / grid.shape[1])


def next_grid_points(grid: Tensor) -> Tensor:
    """For each modality and point the point with one step more of the modality, taken from the
    largest other weight: [G, M] -> [M, G] int64. The point of one modality alone is its own."""
    n_points, modalities = grid.shape
    step = grid[grid > 0].min()
    rows = []
    for m in range(modalities):
        others = grid.clone()
        others[:, m] = -1.0
        moved = grid.clone()
        moved[:, m] += step
        moved[torch.arange(n_points), others.argmax(1)] -= step
        rows.append(
            torch.cdist(moved, grid).argmin(1).where(grid[:, m] < 1, torch.arange(n_points))
        )
    return torch.stack(rows)


def nearest_grid_point(weights: Tensor, grid: Tensor) -> Tensor:
    """Index of the grid point nearest to each weight vector: [M, ...] -> [...] int64."""
    flat = weights.flatten(1)
    # in float32 also under autocast, so that training and test see the same codes
    with torch.autocast(flat.device.type, enabled=False):
        closeness = torch.addmm(-0.5 * grid.square().sum(1, keepdim=True), grid, flat)  # [G, ...]
    best, index = closeness[0], torch.zeros_like(flat[0], dtype=torch.long)
    for point, other in enumerate(closeness[1:], start=1):  # many times faster than argmax(0)
        index.masked_fill_(other > best, point)
        best = torch.maximum(best, other)
    return index.view(weights.shape[1:])


def or_all(present: Tensor) -> Tensor:
    """Presence [..., M] in which an item that has nothing counts as one that has everything: its
    codes are constant, and weights must be something."""
    return present | ~present.any(-1, keepdim=True)


def random_grid_points(users: Tensor, rows: Tensor, law: Tensor) -> Tensor:
    """A point for each user and item that is always the same and tells nothing: the control.

    users and rows broadcast against each other; law [G] are the probabilities of the points.
    """
    mixed = (users * _USER_PRIME) ^ ((rows + 1) * _ITEM_PRIME)
    mixed = (mixed ^ (mixed >> 13)) * _ITEM_PRIME
    uniform = ((mixed ^ (mixed >> 17)) % _HASH_SIZE).double() / _HASH_SIZE
    bounds = law.double().cumsum(0) / law.double().sum()
    return torch.searchsorted(bounds, uniform, right=True).clamp(max=len(law) - 1)


# --------------------------------------------------------------------------- the attention


def coherence(sums: Tensor, counts: Tensor, prior: float = 0.0) -> Tensor:
    """Mean cosine of two different items of a set, per modality: sums [..., M, z] of their unit
    latents, counts [..., M] of how many there are -> [..., M], 0 for fewer than two.

    `prior` pairs of cosine 0 are counted in: two or three items say little about a user.
    """
    pairs = counts * (counts - 1)
    total = sums.square().sum(-1) - counts
    return total / (pairs + prior).clamp(min=1) * (pairs > 0)


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

    @torch.no_grad()
    def start_from_coherence(self, sharpness: float) -> None:
        """Let alpha begin as softmax(sharpness * coherence), the last M numbers of a context."""
        if self.of_user is not None:
            nn.init.zeros_(self.of_user.weight)
            nn.init.zeros_(self.of_user.bias)
            self.of_user.weight[:, -self.modalities :] = sharpness * torch.eye(self.modalities)

    def user_side(self, context: Tensor) -> Tensor:
        """Contexts [B, c] -> [B, M, 2 + d_a]: 1, the user's own term, the query if there is one.

        The logit of a pair is the dot product of its sides, modality by modality.
        """
        parts = [context.new_ones(len(context), self.modalities, 1)]
        # in float32 also under autocast, for the reason of `nearest_grid_point`
        with torch.autocast(context.device.type, enabled=False):
            of_user = self.of_user
            own = torch.zeros_like(parts[0]) if of_user is None else of_user(context)[..., None]
            parts.append(own)
            if self.query is not None:
                query = self.query(context).unflatten(1, (self.modalities, -1))
                parts.append(query * self.scale)
        return torch.cat(parts, dim=2)

    def item_side(self, latents: Tensor, present: Tensor) -> Tensor:
        """Items [S, M, z], [S, M] -> [S, M, 2 + d_a]: the item's own term, 1, the key."""
        own = (~or_all(present)).to(latents.dtype) * _MISSING
        with torch.autocast(latents.device.type, enabled=False):
            if self.of_item is not None:
                own = own + self.of_item(latents.flatten(1))
            parts = [own[..., None], latents.new_ones(*own.shape, 1)]
            return torch.cat(parts if self.key is None else [*parts, self.key(latents)], dim=2)

    def forward(self, context: Tensor, latents: Tensor, present: Tensor) -> Tensor:
        """Every user with every item: [B, c], [S, M, z], [S, M] -> weights [M, B, S]."""
        return blend_weights_of(self.user_side(context), self.item_side(latents, present))

    def pairs(self, context: Tensor, latents: Tensor, present: Tensor) -> Tensor:
        """Each user with one item: [P, c], [P, M, z], [P, M] -> weights [M, P]."""
        logits = self.user_side(context) * self.item_side(latents, present)
        return torch.softmax(logits.sum(2).T, dim=0)


def blend_weights_of(users: Tensor, items: Tensor) -> Tensor:
    """Sides of B users [B, M, a] and S items [S, M, a] -> weights [M, B, S]."""
    # in float32 also under autocast, for the reason of `nearest_grid_point`
    with torch.autocast(users.device.type, enabled=False):
        return torch.softmax(torch.bmm(users.transpose(0, 1), items.permute(1, 2, 0)), dim=0)
