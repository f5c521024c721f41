"""Contexts of interactions: an encoder of histories, and what an item means to different users.

    encoder = ContextEncoder(...)      causal Transformer, trained by `train_contexts` (DuoRec)
    every_context(encoder, train)      one vector for each train interaction, its own item included
    condense(contexts, rows, k)        the contexts of every item, brought down to k of them
    merge_rare(counts, vectors, least) which of them are too rare to stand alone

Letters: N items, R train interactions, C condensed contexts, P points, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model_parts.backbone import Positions, PreNormBlock, at_last, init_weights
from model_parts.contrastive import RandomPrefixes, spans, two_view_loss
from model_parts.dropout import Dropout
from model_parts.quantisers import assign, kmeans
from model_parts.softmax import item_cross_entropy
from model_parts.stage_one import minimise

# Batches drawn together and sorted by length: little padding, yet random partners.
_BUCKETS = 8
# Interactions encoded at once.
_ROWS = 2048
# Of a hash: a large odd multiplier, and how many values it takes.
_MULTIPLIER, _HASH_SIZE = 6_364_136_223_846_793_005, 2**31 - 1


# --------------------------------------------------------------------------- encoder


class ContextEncoder(nn.Module):
    """GPT-2 blocks on item embeddings; the state after an item is the context it was met in."""

    def __init__(
        self, n_items: int, window: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.positions = Positions(window, width, from_end=False)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, width, 0.0, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)
        init_weights(self)

    def forward(self, items: Tensor) -> Tensor:
        """[B, T] -> [B, T, d]; each state has seen its own item and those before."""
        lengths = (items > 0).sum(1)
        x = self.dropout(self.items(items) + self.positions(lengths, items.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last(self, items: Tensor) -> Tensor:
        """[B, T] -> [B, d], the state after the whole history."""
        return at_last(self(items), (items > 0).sum(1))


def train_contexts(
    encoder: ContextEncoder,
    prefixes: RandomPrefixes,
    steps: int,
    batch_size: int,
    lr: float,
    contrast: float,
    temperature: float,
    generator: torch.Generator,
) -> None:
    """DuoRec (WSDM 2022) on train prefixes: cross-entropy over all items plus, each times
    `contrast`, NT-Xent of two dropout passes and of a prefix with another one of equal target."""
    if not len(prefixes):
        return
    device = encoder.items.weight.device
    draws = _bucketed_draws(prefixes, batch_size, generator)
    relatives = SameTarget(prefixes)

    def loss(_: int) -> Tensor:
        chosen = next(draws)
        items = prefixes.at(chosen).items.to(device)
        targets = prefixes.items[chosen].to(device) - 1
        state = encoder.last(items)
        total = item_cross_entropy(state, encoder.items.weight[1:], targets)
        if contrast:
            similar = prefixes.at(relatives.draw(chosen, generator)).items.to(device)
            total = total + contrast * two_view_loss(state, encoder.last(items), temperature)
            total = total + contrast * two_view_loss(state, encoder.last(similar), temperature)
        return total

    encoder.requires_grad_(True)
    minimise(encoder, loss, steps, lr)
    encoder.requires_grad_(False)


def _bucketed_draws(
    prefixes: RandomPrefixes, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    while True:
        index = torch.randint(len(prefixes), (_BUCKETS * size,), generator=generator)
        chosen = prefixes.targets[index]
        lengths = (chosen - prefixes.first[chosen]).clamp(max=prefixes.window)
        batches = chosen[lengths.argsort(stable=True)].split(size)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


class SameTarget:
    """Other train interactions with the same item that have a history before them as well."""

    def __init__(self, prefixes: RandomPrefixes) -> None:
        self.items = prefixes.items
        self.order = prefixes.targets[self.items[prefixes.targets].argsort(stable=True)]
        self.counts = torch.bincount(self.items[self.order], minlength=int(self.items.max()) + 1)
        self.begin = self.counts.cumsum(0) - self.counts
        self.place = torch.zeros_like(self.items)  # of an interaction among those of its item
        places = torch.arange(len(self.order)) - self.begin[self.items[self.order]]
        self.place[self.order] = places

    def draw(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Another interaction for each of `chosen` [B]; itself where there is no other."""
        items = self.items[chosen]
        counts = self.counts[items]
        step = 1 + (torch.rand(len(items), generator=generator) * (counts - 1)).long()
        return self.order[self.begin[items] + (self.place[chosen] + step) % counts]


@torch.no_grad()
def every_context(encoder: ContextEncoder, train: Any, window: int) -> Tensor:
    """The state after each of R train interactions, from the window that ends with it: [R, d]."""
    items = torch.tensor(train.items, dtype=torch.long)
    offsets = torch.tensor(train.offsets, dtype=torch.long)
    first = offsets[:-1].repeat_interleave(offsets.diff())
    end = torch.arange(1, len(items) + 1)
    start = torch.maximum(first, end - window)
    contexts = torch.empty(len(items), encoder.items.embedding_dim)
    device = encoder.items.weight.device
    for rows in (end - start).argsort(stable=True).split(_ROWS):  # by length: little padding
        batch = spans(items, start[rows], (end - start)[rows]).to(device)
        contexts[rows] = encoder.last(batch).cpu()
    return contexts


# --------------------------------------------------------------------------- condensation


class Condensed(NamedTuple):
    """The contexts of all items, sorted by item."""

    vectors: Tensor  # [C, d]
    owners: Tensor  # [C] int64, item rows, ascending
    counts: Tensor  # [C] int64, interactions that each stands for


def group_sizes(groups: int, kappa: float) -> list[float]:
    """Share of distinct frequencies in each group: Gamma density at 1..T, shape kappa, scale 1.

    Normalised, rounded to two decimals; what rounding leaves over is split over the two largest.
    """
    logs = [(kappa - 1) * math.log(x) - x for x in range(1, groups + 1)]
    density = [math.exp(value - max(logs)) for value in logs]
    shares = [round(value / sum(density), 2) for value in density]
    largest = sorted(range(groups), key=lambda group: -shares[group])[:2]
    spare = 1 - sum(shares)
    for group in largest:
        shares[group] += spare / len(largest)
    return shares


def contexts_per_item(counts: Tensor, groups: int, start: int, step: int, kappa: float) -> Tensor:
    """How many contexts an item of each frequency gets, counts [N] -> K [N].

    Distinct frequencies u_1 < ... < u_D are dealt out to T groups of `group_sizes`; an item of
    group g = 0, 1, ... gets start + step g, or 1 when it has fewer interactions than that.
    """
    distinct = counts[counts > 0].unique()  # sorted
    bounds, index = [], 0
    for share in group_sizes(groups, kappa):
        index = min(index + int(share * len(distinct) + 1e-9), len(distinct))
        bounds.append(int(distinct[index - 1]) if index else 0)
    bounds[-1] = int(distinct[-1]) if len(distinct) else 0
    group = torch.searchsorted(torch.tensor(bounds), counts).clamp(max=groups - 1)
    wanted = start + step * group
    return torch.where(counts < wanted, 1, wanted)


def condense(
    contexts: Tensor, rows: Tensor, wanted: Tensor, generator: torch.Generator
) -> Condensed:
    """k-means of each item's contexts: contexts [R, d] of item rows [R], wanted [N] clusters each.

    `wanted` must depend on an item's frequency alone, so that items of equal frequency go together.
    Clusters without members are dropped. An item without any context gets the mean of all, count 0.
    """
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=len(wanted))
    begin = counts.cumsum(0) - counts
    vectors, owners, members = [], [], []
    for count in counts.unique().tolist():
        items = torch.nonzero(counts == count)[:, 0]
        if not count:
            vectors.append(contexts.mean(0).expand(len(items), -1))
            owners.append(items)
            members.append(torch.zeros_like(items))
            continue
        k = int(wanted[items[0]])
        sets = contexts[order[begin[items][:, None] + torch.arange(count)]]  # [n, count, d]
        centroids = kmeans(sets, k, generator)
        codes = assign(sets, centroids)[0] + k * torch.arange(len(items))[:, None]
        sizes = torch.bincount(codes.flatten(), minlength=k * len(items))
        kept = sizes > 0
        vectors.append(centroids.flatten(0, 1)[kept])
        owners.append(items.repeat_interleave(k)[kept])
        members.append(sizes[kept])
    by_item = torch.cat(owners).argsort(stable=True)
    return Condensed(*(torch.cat(part)[by_item] for part in (vectors, owners, members)))


def merge_rare(counts: Tensor, vectors: Tensor, least: float) -> Tensor:
    """What each of S contexts of one item is merged into: counts [S], vectors [S, d] -> [S].

    While the rarest has less than a share `least` of the interactions it joins the nearest of the
    others and its count goes there. A context that stays points at itself.
    """
    into = torch.arange(len(counts))
    left = counts.double()
    distance = torch.cdist(vectors, vectors).fill_diagonal_(float("inf"))
    for _ in range(len(counts) - 1):
        rarest = int(left.argmin())
        if left[rarest] >= least * counts.sum():
            break
        nearest = int(distance[rarest].argmin())
        left[nearest] += left[rarest]
        left[rarest] = float("inf")
        distance[:, rarest] = float("inf")
        into[into == rarest] = nearest
    return into


def fixed_uniform(*keys: Tensor | int) -> Tensor:
    """Numbers in [0, 1) that look random and are always the same for the same keys; float64."""
    mixed: Any = 0
    for key in keys:
        mixed = ((mixed ^ key) + 1) * _MULTIPLIER  # wraps around
        mixed = mixed ^ (mixed >> 29)
    return (mixed % _HASH_SIZE).double() / _HASH_SIZE
