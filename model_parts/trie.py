"""Prefix tree of valid semantic IDs as flat tables: what a beam may continue with is one gather.

    trie = Trie(codes [I, L], owners [I], n_items)     ID i belongs to item owners[i] (0-based)
    trie.children(level, nodes [B, W])                 codes and nodes one digit further
    trie.item_scores(leaves [B, W], scores [B, W])     [B, N]

An item may have several IDs (their probabilities are added) and an ID several items (they tie).
The distinct IDs are sorted, so the children of a node lie side by side and have consecutive
numbers. A level is one padded table of codes, a row for each node: memory is nodes times the most
children of a node, and looking up what all beams may continue with copies rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Score of an item that no beam ended at: worse than any, yet a number, so that it still ranks
# before the items that a caller masks with -inf.
NOT_FOUND = torch.finfo(torch.float32).min


class Level(NamedTuple):
    """The step from all prefixes of one length (nodes) to those with one digit more (children)."""

    codes: Tensor  # [nodes, C] int32, digits of the children, 0 behind the last one
    counts: Tensor  # [nodes] int64, children
    first: Tensor  # [nodes] int64, number of the first child

    @property
    def n_children(self) -> int:
        """Prefixes with one digit more."""
        return int(self.first[-1] + self.counts[-1])


class Children(NamedTuple):
    """What each beam can continue with, C = most children of any node of the level."""

    codes: Tensor  # [B, W, C] int64
    exist: Tensor  # [B, W, C] bool
    first: Tensor  # [B, W] int64, the node after the first code; the next ones follow


class Trie:
    """Valid IDs and the items they stand for, on the device of `codes`."""

    def __init__(self, codes: Tensor, owners: Tensor, n_items: int) -> None:
        """codes [I, L], owners [I] 0-based items. Raises ValueError without an ID."""
        if not len(codes):
            raise ValueError("a trie needs at least one semantic ID")
        ids, self.leaf_of_id = torch.unique(codes, dim=0, return_inverse=True)  # sorted
        self.owners, self.n_items, self.n_leaves = owners, n_items, len(ids)
        self.one_id_each = torch.equal(owners, torch.arange(n_items, device=owners.device))
        self.levels = _levels(ids)

    def children(self, level: int, nodes: Tensor) -> Children:
        """The continuations of nodes [B, W], which have `level` digits (0: the root, node 0)."""
        table = self.levels[level]
        rank = torch.arange(table.codes.shape[1], device=nodes.device)
        exist = rank < table.counts[nodes][:, :, None]
        codes = table.codes.index_select(0, nodes.flatten()).view(exist.shape)
        return Children(codes.long(), exist, table.first[nodes])

    def allowed(self, codes: Tensor, n_codes: int) -> Tensor:
        """With which of K codes IDs go on after each prefix of valid IDs [P, L]: [L, P, K] bool."""
        found = torch.zeros(*codes.T.shape, n_codes, dtype=torch.bool, device=codes.device)
        nodes = torch.zeros_like(codes[:, :1])
        for level, own in enumerate(codes.split(1, dim=1)):
            options = self.children(level, nodes)
            which = options.codes[:, 0].where(options.exist[:, 0], own)  # padding: what is there
            found[level].scatter_(1, which, True)
            rank = ((which == own) & options.exist[:, 0]).int().argmax(1, keepdim=True)
            nodes = options.first + rank
        return found

    def item_scores(self, leaves: Tensor, scores: Tensor) -> Tensor:
        """Log-probability of every item [B, N] from that of leaves [B, W]; `NOT_FOUND` elsewhere.

        log sum exp over the IDs of an item (facts 2.4: multi-facet merge). A leaf with score -inf
        counts as not found.
        """
        by_leaf = scores.new_full((len(scores), self.n_leaves), float("-inf"))
        by_leaf = by_leaf.scatter_reduce(1, leaves, scores, "amax")
        by_id = by_leaf[:, self.leaf_of_id]
        by_item = by_id if self.one_id_each else self._merge(by_id)
        return by_item.clamp(min=NOT_FOUND)

    def _merge(self, by_id: Tensor) -> Tensor:
        # [B, I] -> [B, N], log sum exp over the IDs of each item
        owners = self.owners.expand(len(by_id), -1)
        none = by_id.new_full((len(by_id), self.n_items), float("-inf"))
        top = none.scatter_reduce(1, owners, by_id, "amax").clamp(min=NOT_FOUND)
        shares = (by_id - top.gather(1, owners)).exp()
        return top + torch.zeros_like(top).scatter_add(1, owners, shares).log()


def _levels(ids: Tensor) -> list[Level]:
    """Tables of each digit for sorted distinct ids [leaves, L]."""
    differs = ids[1:] != ids[:-1]  # [leaves - 1, L]
    parents = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    levels = []
    for digit in range(ids.shape[1]):
        new = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        new[1:] = differs[:, : digit + 1].any(1)
        parent = parents[new]  # of every child
        counts = torch.bincount(parent)
        first = counts.cumsum(0) - counts
        codes = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32, device=ids.device)
        rank = torch.arange(len(parent), device=ids.device) - first[parent]
        codes[parent, rank] = ids[new, digit].int()
        levels.append(Level(codes, counts, first))
        parents = new.cumsum(0) - 1
    return levels
