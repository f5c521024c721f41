"""Pctx."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from config import Pctx as Settings
from model_parts.base import Batch, TrainingData
from model_parts.contexts import (
    Condensed,
    ContextEncoder,
    condense,
    contexts_per_item,
    every_context,
    merge_rare,
    train_contexts,
)
from model_parts.contrastive import RandomPrefixes
from model_parts.item_vectors import chosen_modalities, item_vectors
from model_parts.quantisers import whitened_pca
from model_parts.residual import ResidualQuantiser, with_collision_digit
from model_parts.stage_one import seeded


class PersonalIDs(nn.Module):
    """The semantic IDs of all items, several each, and which contexts lead to which of them.

    Everything is sorted by item: contexts `begin[i] .. begin[i+1]-1` and IDs
    `first[i] .. first[i+1]-1` are those of item i.
    """

    vectors: Tensor  # [C, d] condensed contexts
    begin: Tensor  # [N + 1]
    id_of_context: Tensor  # [C], which ID a context stands for
    codes: Tensor  # [F, L]
    first: Tensor  # [N + 1]
    weights: Tensor  # [F] train interactions of each ID, at least 1

    def __init__(self, n_items: int, width: int, digits: int) -> None:
        super().__init__()
        one_each = torch.arange(n_items + 1)
        self.register_buffer("vectors", torch.zeros(n_items, width))
        self.register_buffer("begin", one_each)
        self.register_buffer("id_of_context", one_each[:-1].clone())
        self.register_buffer("codes", torch.zeros(n_items, digits, dtype=torch.int64))
        self.register_buffer("first", one_each.clone())
        self.register_buffer("weights", torch.ones(n_items, dtype=torch.float64))

    def fill(self, **tables: Tensor) -> None:
        """Replace tables by others, of any length."""
        for name, table in tables.items():
            setattr(self, name, table.to(getattr(self, name)))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # how many IDs there are is known after stage one only
        self.fill(**{name: state[prefix + name] for name in self._buffers if prefix + name in state})
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def owners(self) -> Tensor:
        """[F], the item of each ID."""
        items = torch.arange(len(self.first) - 1, device=self.first.device)
        return items.repeat_interleave(self.first.diff())

    def nearest(self, rows: Tensor, contexts: Tensor) -> Tensor:
        """The ID of items [P] that each was met with in contexts [P, d]: [P]."""
        sizes = self.begin.diff()[rows]
        point = torch.arange(len(rows), device=rows.device).repeat_interleave(sizes)
        place = torch.arange(len(point), device=rows.device) - (sizes.cumsum(0) - sizes)[point]
        candidate = self.begin[rows][point] + place
        distance = (contexts[point] - self.vectors[candidate]).square().sum(1)
        widest = int(sizes.max()) if len(rows) else 1
        table = contexts.new_full((len(rows), widest), float("inf"))
        table[point, place] = distance
        return self.id_of_context[self.begin[rows] + table.argmin(1)]

    def drawn(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """An ID of items [P], by its share of the interactions; uniform [P] in [0, 1) decides."""
        mass = self.weights.cumsum(0)
        before = torch.cat([mass.new_zeros(1), mass])
        begin, end = before[self.first[rows]], before[self.first[rows + 1]]
        found = torch.searchsorted(mass, begin + uniform * (end - begin), right=True)
        return found.clamp(max=self.first[rows + 1] - 1)

    @property
    def main(self) -> Tensor:
        """[N], the most frequent ID of each item."""
        n_items = len(self.first) - 1
        best = self.weights.new_zeros(n_items).scatter_reduce(0, self.owners, self.weights, "amax")
        index = torch.arange(len(self.codes), device=self.codes.device)
        candidate = torch.where(self.weights == best[self.owners], index, len(index))
        start = index.new_full((n_items,), len(index))
        return start.scatter_reduce(0, self.owners, candidate, "amin")


# --------------------------------------------------------------------------- tokenizer


def make_ids(
    condensed: Condensed, features: Tensor, own: Settings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Tables of `PersonalIDs` from condensed contexts and item features [N, f].

    Contexts are fused with the features of their item and quantised; contexts of one item with
    equal codes become one ID, rare IDs join the nearest one of their item (`merge_rare`), and a
    last digit tells IDs of different items apart.
    """
    n_items = len(features)
    fused = fuse(condensed, features, own.blend)
    quantiser = ResidualQuantiser(fused.shape[1], own.digits - 1, own.codes)
    quantiser.fit(fused[condensed.counts > 0], generator)
    coarse = quantiser.encode(fused)
    labels = torch.cat([condensed.owners[:, None], coarse], dim=1)
    ids, id_of_context = torch.unique(labels, dim=0, return_inverse=True)  # sorted by item
    counts = torch.zeros(len(ids)).index_add_(0, id_of_context, condensed.counts.float())
    shares = condensed.counts.clamp(min=1).float()
    sums = torch.zeros(len(ids), condensed.vectors.shape[1])
    sums.index_add_(0, id_of_context, condensed.vectors * shares[:, None])
    vectors = sums / torch.zeros(len(ids)).index_add_(0, id_of_context, shares)[:, None]
    into = merge_by_item(ids[:, 0], counts, vectors, own.rare)
    kept = into == torch.arange(len(ids))
    number = kept.cumsum(0) - 1  # of an ID among those kept
    weights = torch.zeros(int(kept.sum())).index_add_(0, number[into], counts)
    return {
        "vectors": condensed.vectors,
        "begin": _starts(condensed.owners, n_items),
        "id_of_context": number[into][id_of_context],
        "codes": with_collision_digit(ids[kept, 1:], own.codes),
        "first": _starts(ids[kept, 0], n_items),
        "weights": weights.clamp(min=1),
    }


def fuse(condensed: Condensed, features: Tensor, blend: float) -> Tensor:
    """x = [a W context; (1 - a) features of the item], W whitening to at most 64 components."""
    fitted = condensed.counts > 0
    white = whitened_pca(condensed.vectors, fitted, _CONTEXT_WIDTH)
    return torch.cat([blend * white, (1 - blend) * features[condensed.owners]], dim=1)


def merge_by_item(owners: Tensor, counts: Tensor, vectors: Tensor, least: float) -> Tensor:
    """`merge_rare` for every item: owners [F] ascending -> [F], the ID each one is merged into."""
    into = torch.arange(len(owners))
    sizes = torch.unique_consecutive(owners, return_counts=True)[1]
    ends = sizes.cumsum(0)
    for begin, end in zip((ends - sizes)[sizes > 1].tolist(), ends[sizes > 1].tolist(), strict=True):
        into[begin:end] = begin + merge_rare(counts[begin:end], vectors[begin:end], least)
    return into


def _starts(owners: Tensor, n_items: int) -> Tensor:
    # where each item begins in a table sorted by owner, [N + 1]
    return torch.searchsorted(owners, torch.arange(n_items + 1))


_CONTEXT_WIDTH, _FEATURE_WIDTH = 64, 128
