"""REARM: homogeneous user and item graphs, refined contrast of modalities, on a bipartite graph.

Paper: Ma et al., Refining Contrastive Learning and Homography Relations for Multi-Modal
Recommendation, ACM MM 2025 (arXiv 2508.13745); formulas of the official code. Reproduced: user and
item graphs that mix co-occurrence with similarity of interests or features; attention between the
scalar features of an item, within and across modalities; LightGCN for content and IDs; a meta
network that gives every node a low-rank transform of its ID; BPR, contrast and orthogonality of
modalities. As released, the layer that extracts meta knowledge never learns: its output is
detached, so here it is frozen. Size at the paper's setting (4096-d and 384-d features):
121,181,797 parameters on Baby, mostly raw features of users and items, which are trainable tables.

Differs: graphs are built of train alone and never cached (the official caches go by the name of the
data set); negatives avoid the user's train items, not the held-out ones (a leak of the release);
any number of modalities: `*_first` is the share of the pictures in the mixed graphs, the first of
the paper's two modalities, and the others share the rest (all alike where there are no pictures: on
Beauty the text comes first, and the paper's 0 left it out of the item graph), cross-attention asks
with the mean of the other modalities, pairs of modalities are contrasted; an item without a
modality has no edges in its graph and the mean of the others as features; a user without train
items has no interest, not NaN; a row is among its nearest also where more rows than there is room
for equal it; which of equally frequent neighbours come first is up to torch.topk, as there.
Set by the loop: AdamW with decay `train.weight_decay` (official 5e-4 at lr 5e-5 on Baby). The
weight of orthogonality grows with the square of the batch and is meant for 2048.
Checked against: numbers of the official code on toy data (tests/test_rearm.py). Published, second
hand: Sports R@20 .1231, Clothing .0998 under the random split; Beauty R@10 .0954 leave-one-out is
from PRISM's table and not explained there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.base import Batch, TrainingData
from model_parts.collaborative import GraphRecommender, bpr, item_features, mean_of_others
from model_parts.contrastive import row_nce
from model_parts.graphs import (
    Edges,
    Neighbours,
    SparseGraph,
    Table,
    co_occurrence,
    joined,
    nearest,
    propagate,
    repeated,
    row_means,
)


class Side(NamedTuple):
    """What is known of all users, or of all items."""

    ids: Tensor  # [R, d]
    content: list[Tensor]  # M of [R, d]


class REARM(GraphRecommender):
    """Graph collaborative filtering with homogeneous graphs and modal-shared, modal-unique parts"""

    name = "rearm"
    ablations = {
        "no co-occurrence": {"rearm.user_co": 0.0, "rearm.item_co": 0.0},
        "co-occurrence alone": {"rearm.user_co": 1.0, "rearm.item_co": 1.0},
        "no homogeneous graphs": {"rearm.user_layers": 0, "rearm.item_layers": 0},
        "no contrast": {"rearm.contrast": 0.0},
        "no orthogonality": {"rearm.orthogonal": 0.0},
    }
    search_space = {
        "train.lr": (3e-4, 5e-3, "log"),
        "rearm.rank": [3, 7],
        "rearm.user_co": [0.4, 0.7, 0.9],
        "rearm.user_first": [0.0, 0.2, 0.5],
        "rearm.item_first": [0.0, 0.2, 0.5],
        "rearm.user_neighbours": [25, 40],
        "rearm.contrast": [1e-6, 5e-6, 1e-4, 1e-3],
        "rearm.temperature": [0.03, 0.6, 1.5],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own, n_items = config.rearm, config.n_items(catalogue)
        super().__init__(n_items, own.width)
        widths, d = config.modality_widths(catalogue), own.width
        M = len(widths)
        self.own = own
        self.features = nn.ParameterList(torch.zeros(n_items, width) for width in widths)
        self.interests = nn.ModuleList(Table(width) for width in widths)
        self.project_items = nn.ModuleList(nn.Linear(width, d) for width in widths)
        self.project_users = nn.ModuleList(nn.Linear(width, d) for width in widths)
        self.within = nn.ModuleList(_scalar_attention(own.self_dropout) for _ in widths)
        self.across = nn.ModuleList(_scalar_attention(own.cross_dropout) for _ in widths if M > 1)
        self.norm = nn.LayerNorm(d)  # one for all uses, like the activation
        self.activate = nn.PReLU()
        self.user_meta = MetaTransform(M * d, d, own.rank)
        self.item_meta = MetaTransform(M * d, d, own.rank)
        nn.init.normal_(self.items, std=0.1)
        for layer in (*self.project_items, *self.project_users):
            nn.init.xavier_normal_(layer.weight)
        self.user_graph, self.item_graph = SparseGraph(), SparseGraph()

    # ----------------------------------------------------------------- before training

    def first_users(self, n_users: int, generator: torch.Generator) -> Tensor:
        """N(0, 0.1), as for items."""
        return 0.1 * torch.randn(n_users, self.own.width, generator=generator)

    @torch.no_grad()
    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """All graphs and tables from train. Raises ValueError without features."""
        features, present = item_features("REARM", data.catalogue)
        features = [rows.to(self.items.device) for rows in features]
        super().prepare(data, generator)
        own = self.own
        interests = [row_means(self.bipartite, rows) for rows in features]
        for m, (rows, interest) in enumerate(zip(features, interests, strict=True)):
            self.features[m].copy_(rows)
            self.interests[m].fill(interest)
        known = list(present.T.to(self.items.device))
        names = list(data.catalogue.modalities)
        shares = shares_of(names, own.user_first), shares_of(names, own.item_first)
        users = similarity(interests, None, own.user_neighbours, shares[0])
        items = similarity(features, known, own.item_neighbours, shares[1])
        in_common = taken_together(self.bipartite, own.user_neighbours, False, generator)
        self.user_graph.fill(blended(in_common, users, own.user_co), (data.n_users, data.n_users))
        in_common = taken_together(self.bipartite, own.item_neighbours, True, generator)
        self.item_graph.fill(blended(in_common, items, own.item_co), (data.n_items, data.n_items))

    # ----------------------------------------------------------------- network

    def sides(self) -> tuple[Side, Side]:
        """Users and items after all graphs, before the meta transform."""
        users = self._homogeneous(
            self.users.weight, [table.weight for table in self.interests], self.project_users,
            self.user_graph, self.own.user_layers,
        )  # fmt: skip
        items = self._homogeneous(
            self.items, list(self.features), self.project_items,
            self.item_graph, self.own.item_layers,
        )  # fmt: skip
        users_content = torch.cat([self.activate(x) for x in users.content], dim=1)
        items_content = torch.cat(self._attended(items.content), dim=1)
        layers, M = self.own.layers, len(self.features)
        content = propagate(self.normalised, users_content, items_content, layers)
        ids = propagate(self.normalised, users.ids, items.ids, layers)
        return tuple(Side(i, list(c.chunk(M, 1))) for i, c in zip(ids, content, strict=True))

    def _homogeneous(
        self, ids: Tensor, raw: list[Tensor], project: nn.ModuleList, graph: SparseGraph, n: int
    ) -> Side:
        """Graph^n [ID | projected content], rows at unit length as a whole."""
        parts = [layer(x) for layer, x in zip(project, raw, strict=True)]
        x = F.normalize(repeated(graph, torch.cat([ids, *parts], dim=1), n))
        ids, *content = x.chunk(len(parts) + 1, dim=1)
        return Side(ids, content)

    def _attended(self, content: list[Tensor]) -> list[Tensor]:
        """Attention between an item's scalar features: within each modality, then across."""
        content = [
            self.activate(self.norm(x + _attend(attention, x, x)))
            for attention, x in zip(self.within, content, strict=True)
        ]
        if len(content) == 1:
            return content
        return [
            self.activate(self.norm(x + _attend(attention, mean_of_others(content, m), x)))
            for m, (attention, x) in enumerate(zip(self.across, content, strict=True))
        ]

    def _represent(self, side: Side, meta: MetaTransform) -> Tensor:
        """[prelu(F_m) + D for each m | prelu(shared) + D], [R, (M + 1) d]."""
        shared = meta(torch.cat(side.content, dim=1), side.ids)
        return torch.cat([self.activate(x) + side.ids for x in (*side.content, shared)], dim=1)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Final vectors of users and items."""
        users, items = self.sides()
        return self._represent(users, self.user_meta), self._represent(items, self.item_meta)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """BPR, contrast of modalities on unique nodes, orthogonality on the pairs as they come."""
        own, triples = self.own, self.triples(batch)
        users, items = self.sides()
        user_vectors = self._represent(users, self.user_meta)
        item_vectors = self._represent(items, self.item_meta)
        every_item = torch.unique(torch.cat([triples.positives, triples.negatives]))
        every_user = torch.unique(triples.users)
        contrast = _contrast(items.content, every_item, own.temperature)
        contrast = contrast + _contrast(users.content, every_user, own.temperature)
        overlap = _overlaps(users.content, triples.users)
        overlap = overlap + _overlaps(items.content, triples.positives)
        return {
            "bpr": bpr(
                user_vectors[triples.users],
                item_vectors[triples.positives],
                item_vectors[triples.negatives],
            ),
            "contrast": own.contrast * contrast,
            "orthogonal": own.orthogonal * overlap,
        }


class MetaTransform(nn.Module):
    """A low-rank transform of each node's ID, made of what its content and behaviour say."""

    def __init__(self, width_in: int, width: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.extract = nn.Linear(width_in, width).requires_grad_(False)  # see the docstring above
        self.down, self.up = (
            nn.Sequential(
                nn.Linear(width, width * rank), nn.PReLU(), nn.Linear(width * rank, width * rank)
            )
            for _ in range(2)
        )

    def forward(self, content: Tensor, ids: Tensor) -> Tensor:
        """[R, M d], [R, d] -> (D W1) W2 with own W1 [d, r], W2 [r, d] for each row, [R, d]."""
        knowledge = self.extract(content).detach()
        down = F.normalize(self.down(knowledge)).view(len(ids), -1, self.rank)
        up = F.normalize(self.up(knowledge)).view(len(ids), self.rank, -1)
        # softmax over the d entries of a column of W1, over the r rows of W2
        down = torch.softmax(down + down.mean(0), dim=1)
        up = torch.softmax(up + up.mean(0), dim=1)
        return torch.einsum("na,nar,nrb->nb", ids, down, up)


# --------------------------------------------------------------------------- graphs


def shares_of(names: list[str], visual: float) -> list[float]:
    """beta_m of each modality: `visual` of pictures, the rest even; without pictures all even."""
    others = len(names) - 1
    if "visual" not in names or not others:
        return [1 / len(names)] * len(names)
    return [visual if name == "visual" else (1 - visual) / others for name in names]


def similarity(
    vectors: list[Tensor], present: list[Tensor] | None, k: int, shares: list[float]
) -> Edges:
    """sum_m beta_m cos_m / k over the k nearest rows in each modality, itself included."""
    parts = []
    for m, (x, share) in enumerate(zip(vectors, shares, strict=True)):
        found = nearest(x, k, present[m] if present else None)
        parts.append(found.edges().scaled(share / found.values.shape[1]).cpu())
    return joined(*parts)


def taken_together(
    bipartite: SparseGraph, k: int, by_items: bool, generator: torch.Generator
) -> Edges:
    """Users who took the same items (or items taken by the same users), weights adding up to 1."""
    degrees = bipartite.column_degrees() if by_items else bipartite.row_degrees()
    return co_occurrence_edges(co_occurrence(bipartite, k, by_items), degrees, generator)


def co_occurrence_edges(found: Neighbours, degrees: Tensor, generator: torch.Generator) -> Edges:
    """Weights softmax(counts) over k neighbours of each row.

    A row with fewer is filled up by drawing from those it has; a row without any gets the k most
    active nodes, weighted by softmax of their share of interactions.
    """
    values, columns = (field.cpu() for field in found)
    n, k = values.shape
    there = torch.isfinite(values)
    counts = there.sum(1, keepdim=True)
    drawn = (torch.rand(n, k, generator=generator) * counts).long()
    slots = torch.where(there, torch.arange(k), drawn)
    values, columns = values.gather(1, slots), columns.gather(1, slots)
    alone, active = counts[:, 0] == 0, degrees.float().cpu().topk(k)
    columns[alone], values[alone] = active.indices, active.values / active.values.sum().clamp(min=1)
    rows = torch.arange(n)[:, None].expand(n, k)
    return Edges(rows.flatten(), columns.flatten(), torch.softmax(values, dim=1).flatten())


def blended(one: Edges, other: Edges, share: float) -> Edges:
    """share x one + (1 - share) x other."""
    return joined(one.scaled(share), other.scaled(1 - share))


# --------------------------------------------------------------------------- attention and losses


def _scalar_attention(dropout: float) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(1, 1, dropout=dropout, batch_first=True)
    # adds the same to all features of a row, which the LayerNorm after it takes away again
    attention.out_proj.bias.requires_grad_(False)
    return attention


def _attend(attention: nn.MultiheadAttention, asking: Tensor, x: Tensor) -> Tensor:
    """The d features of a row as d tokens of width 1: [R, d], [R, d] -> [R, d]."""
    # to a CPU half precision means twice the time here: a width of 1 leaves it nothing to save
    with torch.autocast("cpu", enabled=False):
        tokens = x.float()[:, :, None]
        asking = asking.float()[:, :, None]
        return attention(asking, tokens, tokens, need_weights=False)[0][:, :, 0]


def _pairs(content: list[Tensor], rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    chosen = [x[rows] for x in content]
    return [(a, b) for i, a in enumerate(chosen) for b in chosen[i + 1 :]]


def _contrast(content: list[Tensor], rows: Tensor, temperature: float) -> Tensor:
    """InfoNCE of two modalities of the same nodes, summed over pairs of modalities."""
    pairs = _pairs(content, rows)
    return sum((row_nce(a, b, temperature) for a, b in pairs), content[0].new_zeros(()))


def _overlaps(content: list[Tensor], rows: Tensor) -> Tensor:
    """Mean square of the d x d products of two modalities, columns centred, rows at unit length."""
    pairs = _pairs(content, rows)
    return sum((_overlap(a, b) for a, b in pairs), content[0].new_zeros(()))


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    centred = [x - x.mean(0) for x in (one, other)]
    one, other = (x / (x.norm(dim=1, keepdim=True).detach() + 1e-6) for x in centred)
    return (one.T @ other).square().mean()
