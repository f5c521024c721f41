"""Items and states as Gaussians, and the self-attention between them (STOSA, WWW 2022).

A Gaussian here has a diagonal covariance, so its squared 2-Wasserstein distance to another one is
|mean difference|^2 + |difference of the square roots of the covariances|^2. Up to a term that is
the same for all keys, minus that distance is a dot product of a query (mean, root, 1) with a key
(2 mean, 2 root, -|mean|^2 - sum of the covariance): attention, scores and a softmax over all items
are plain matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.dropout import Dropout

_LEAST_COVARIANCE = 1e-24  # keeps the slope of the square root finite


class Gaussian(NamedTuple):
    """Means and covariances (their diagonals, not negative), both [..., d]."""

    mean: Tensor
    cov: Tensor

    def at(self, index: Tensor) -> Gaussian:
        """The Gaussians at an index or mask of the leading dimensions."""
        return Gaussian(self.mean[index], self.cov[index])

    def root(self) -> Tensor:
        """Square roots of the covariances [..., d]."""
        return self.cov.clamp(min=_LEAST_COVARIANCE).sqrt()

    def size(self) -> Tensor:
        """Squared distance to a point at the origin [...]."""
        return self.mean.square().sum(-1) + self.cov.sum(-1)

    def queries(self) -> Tensor:
        """[..., 2d + 1]; `queries @ keys^T` is `closeness`."""
        return torch.cat([self.mean, self.root(), torch.ones_like(self.mean[..., :1])], dim=-1)

    def keys(self) -> Tensor:
        """[..., 2d + 1], see `queries`."""
        return torch.cat([2 * self.mean, 2 * self.root(), -self.size()[..., None]], dim=-1)


def positive(x: Tensor) -> Tensor:
    """elu(x) + 1: any number into a covariance. In float32, since small ones are differences."""
    return F.elu(x.float()) + 1


def distance(a: Gaussian, b: Gaussian) -> Tensor:
    """Squared Wasserstein distance of each to its partner, [..., d] twice -> [...]."""
    return (a.mean - b.mean).square().sum(-1) + (a.root() - b.root()).square().sum(-1)


def distances(a: Gaussian, b: Gaussian) -> Tensor:
    """Squared Wasserstein distances of all pairs, [..., P, d] and [..., N, d] -> [..., P, N].

    Rounding grows with the sizes, not with the distance: what `distance` gives is more exact.
    """
    return a.size()[..., None] - closeness(a, b)


def closeness(a: Gaussian, b: Gaussian) -> Tensor:
    """Minus `distances(a, b)`, plus the size of a, which no softmax or ranking over b can tell.

    In float32 also under autocast: a small difference of large numbers.
    """
    with torch.autocast(a.mean.device.type, enabled=False):
        a, b = (Gaussian(x.mean.float(), x.cov.float()) for x in (a, b))
        return a.queries() @ b.keys().transpose(-1, -2)


def ranking_losses(state: Gaussian, good: Gaussian, bad: Gaussian) -> tuple[Tensor, Tensor]:
    """BPR and the hinge of P states [P, d] with an item to be near to and one to be far from.

    BPR wants the good item nearer than the bad one; the hinge (pvn) wants it nearer to the state
    than to the bad item. Means over P.
    """
    near, far = distance(state, good), distance(state, bad)
    return F.softplus(near - far).mean(), F.relu(near - distance(good, bad)).mean()


class StochasticBlock(nn.Module):
    """Self-attention by distance and feed-forward layers on means and covariances, post-norm.

    Without `encode_mean` the means leave as they came and only steer the attention.
    """

    def __init__(self, width: int, heads: int, dropout: float, encode_mean: bool) -> None:
        super().__init__()
        self.attention = StochasticAttention(width, heads, dropout, encode_mean)
        self.mean_feed_forward = EluFeedForward(width, dropout) if encode_mean else nn.Identity()
        self.cov_feed_forward = EluFeedForward(width, dropout)

    def forward(self, x: Gaussian) -> Gaussian:
        """[B, T, d] -> [B, T, d]; each position sees itself and those before it."""
        x = self.attention(x)
        return Gaussian(self.mean_feed_forward(x.mean), positive(self.cov_feed_forward(x.cov)))


class StochasticAttention(nn.Module):
    """Causal attention with softmax(-distance / sqrt(d / heads)) as weights A.

    Independent Gaussians add up: the covariance of the mixture takes the squares of A. One
    LayerNorm serves both streams. Raises ValueError when the width is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, dropout: float, encode_mean: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.mean_in = nn.Linear(width, (3 if encode_mean else 2) * width)
        self.cov_in = nn.Linear(width, 3 * width)
        self.mean_out = nn.Linear(width, width) if encode_mean else None
        self.cov_out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = Dropout(dropout)

    def forward(self, x: Gaussian) -> Gaussian:
        """[B, T, d] -> [B, T, d]; covariances leave without a sign, the feed-forward mends it."""
        means = self._by_head(self.mean_in(x.mean))  # query, key and value if means are encoded
        covs = self._by_head(positive(self.cov_in(x.cov)))
        weights = self._weights(Gaussian(means[0], covs[0]), Gaussian(means[1], covs[1]))
        cov = self._add(x.cov, self.cov_out(_joined(weights.square() @ covs[2])))
        if self.mean_out is None:
            return Gaussian(x.mean, cov)
        return Gaussian(self._add(x.mean, self.mean_out(_joined(weights @ means[2]))), cov)

    def _by_head(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, n d] -> n of [B, heads, T, d / heads]."""
        parts = x.chunk(x.shape[-1] // self.norm.normalized_shape[0], dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)

    def _weights(self, queries: Gaussian, keys: Gaussian) -> Tensor:
        """[B, heads, T, T]."""
        T, d = queries.mean.shape[-2:]
        future = torch.ones(T, T, dtype=torch.bool, device=queries.mean.device).triu(1)
        logits = closeness(queries, keys) / d**0.5
        return torch.softmax(logits.masked_fill(future, float("-inf")), dim=-1)

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        return self.norm(x + self.dropout(change))


class EluFeedForward(nn.Module):
    """Two linear layers around ELU, added to their input and normalised."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ELU(), nn.Linear(4 * width, width), Dropout(dropout)
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.norm(x + self.layers(x))


def _joined(x: Tensor) -> Tensor:
    """[B, heads, T, d / heads] -> [B, T, d]."""
    return x.transpose(1, 2).flatten(2)
