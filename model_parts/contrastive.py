"""Contrastive pieces: InfoNCE with forbidden negatives, CLUB, feature neighbours, random prefixes.

Letters: B anchors, S keys, N items, T positions, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.base import Batch

# Similarities held at once when neighbours are sought: 32 MB of floats.
_BLOCK_NUMBERS = 8_000_000


def info_nce(
    logits: Tensor,
    positives: Tensor,
    forbidden: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean of -log softmax(logits)[positive] over anchors: [B, S], [B] -> scalar.

    `forbidden` [B, S] keys are no negatives (a positive never is forbidden); anchors of weight 0
    in `weights` [B] do not count. 0 when no anchor counts.
    """
    if forbidden is not None:
        kept = torch.zeros_like(forbidden).scatter_(1, positives[:, None], True)
        logits = logits.masked_fill(forbidden & ~kept, float("-inf"))
    losses = F.cross_entropy(logits, positives, reduction="none")
    if weights is None:
        return losses.mean()
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def aligned(
    one: Tensor, other: Tensor, related: Tensor, temperature: float, counts: Tensor
) -> Tensor:
    """Symmetric InfoNCE of row i of `one` with row i of `other`, vectors [B, d].

    `related` [B, B] says which rows of `other` (columns) are no negatives of which of `one`: the
    same item, or one that is as good a partner. Rows with counts 0 lack a form: they are no anchors
    and no negatives.
    """
    logits = cosines(one, other) / temperature
    absent = (counts == 0)[None]
    own = torch.arange(len(one), device=one.device)
    there = info_nce(logits, own, related | absent, counts)
    return 0.5 * (there + info_nce(logits.T, own, related.T | absent, counts))


def row_nce(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """InfoNCE of row i of `one` with row i of `other`, all rows of `other` beside it, [P, d] each.

    mean_i [logsumexp_j <a_i, b_j> / tau - <a_i, b_i> / tau] of unit rows; 0 without rows.
    """
    if not len(one):
        return one.sum()
    logits = cosines(one, other) / temperature
    return info_nce(logits, torch.arange(len(one), device=one.device))


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """[B, d], [S, d] -> [B, S], in float32 also under autocast: a small temperature would make
    much of what bf16 rounds off."""
    with torch.autocast(one.device.type, enabled=False):
        return F.normalize(one.float(), dim=1) @ F.normalize(other.float(), dim=1).T


class Club(nn.Module):
    """Contrastive log-ratio upper bound of mutual information, from q(y | x), a diagonal Gaussian.

    Cheng et al., CLUB, ICML 2020, in its sampled form. Fit it by `misfit`, then lower `bound`.
    """

    def __init__(self, width: int, inner: int = 32) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.log_variance = nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), nn.Tanh()
        )

    def misfit(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood of y [P, d] given x [P, d] up to constants, mean over rows."""
        log_variance = self.log_variance(x)
        error = (self.mean(x) - y).square() / log_variance.exp()
        return (error + log_variance).sum(1).mean()

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        """Half the mean gain of the own y over that of a random row."""
        mean, precision = self.mean(x), (-self.log_variance(x)).exp()
        other = y[torch.randperm(len(y)).to(y.device)]
        gain = ((mean - other).square() - (mean - y).square()) * precision
        return 0.5 * gain.sum(1).mean()


@torch.no_grad()
def feature_neighbours(vectors: Tensor, present: Tensor, k: int) -> Tensor:
    """The k most similar other items, [N, k] rows: unit vectors [N, d], presence [N].

    Only present items are neighbours; one that is absent is its own neighbour.
    """
    n_items = len(vectors)
    k = min(k, max(int(present.sum()) - 1, 1))
    found = []
    for rows in torch.arange(n_items, device=vectors.device).split(
        max(1, _BLOCK_NUMBERS // n_items)
    ):
        similarity = vectors[rows] @ vectors.T
        similarity[:, ~present] = float("-inf")
        similarity.scatter_(1, rows[:, None], float("-inf"))
        found.append(similarity.topk(k, dim=1).indices)
    own = torch.arange(n_items, device=vectors.device)[:, None]
    return torch.where(present[:, None], torch.cat(found), own)


class RandomPrefixes:
    """Prefixes of train histories, drawn anew: what a tokenizer of stage one trains on."""

    def __init__(self, train: Any, window: int) -> None:
        self.items = torch.tensor(train.items, dtype=torch.long)
        offsets = torch.tensor(train.offsets, dtype=torch.long)
        lengths = offsets.diff()
        self.first = offsets[:-1].repeat_interleave(lengths)  # [R] start of the user's history
        self.owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        position = torch.arange(len(self.items))
        self.targets = position[position > self.first]  # all but each user's first
        self.window = window

    def __len__(self) -> int:
        return len(self.targets)

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` examples with one target each; histories are cut to the window."""
        return self.at(self.targets[torch.randint(len(self.targets), (size,), generator=generator)])

    def at(self, chosen: Tensor) -> Batch:
        """The prefixes before the interactions `chosen` [B], whose items are the targets."""
        start = torch.maximum(self.first[chosen], chosen - self.window)
        lengths = chosen - start
        items = spans(self.items, start, lengths)
        targets = torch.zeros_like(items)
        targets.scatter_(1, lengths[:, None] - 1, self.items[chosen][:, None])
        return Batch(self.owner[chosen], items, lengths, targets)


def one_prefix_each(batch: Batch) -> Batch:
    """Of every user with targets, the history up to a random one of them and that target alone."""
    wanted = batch.targets > 0
    chances = torch.rand(wanted.shape, device=wanted.device).masked_fill(~wanted, -1.0)
    last = chances.argmax(1)[:, None]  # [B, 1]
    steps = torch.arange(wanted.shape[1], device=wanted.device)[None]
    prefixes = Batch(
        batch.users, batch.items * (steps <= last), last[:, 0] + 1, batch.targets * (steps == last)
    )
    return Batch(*(field[wanted.any(1)] for field in prefixes))


def spans(items: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
    """items[start : start + length] of each of B spans as rows padded with 0, [B, T]."""
    steps = torch.arange(int(lengths.max()))[None]
    inside = steps < lengths[:, None]
    return items[(start[:, None] + steps).clamp(max=len(items) - 1)] * inside


def two_view_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent: each of 2 B vectors finds its other view among 2 B - 1, [B, d], [B, d] -> scalar.

    Cosines over the temperature; the other 2 B - 2 vectors are negatives (DuoRec, WSDM 2022).
    """
    both = F.normalize(torch.cat([one, other]), dim=1)
    own = torch.arange(len(both), device=both.device)
    itself = torch.eye(len(both), dtype=torch.bool, device=both.device)
    return info_nce(both @ both.T / temperature, (own + len(one)) % len(both), itself)
