"""AMMRM: noise filters, cross-modal enhancement and self-gated user preference on graphs.

Paper: Tan et al., AMMRM: an adaptive multi-modal recommendation model with noise filtering and
modal feature enhancement, Springer, 2025 (no code). Reproduced from the text: modality features
gate the item's ID, E_m = E_id * sigmoid(W2 (W1 X_m + b1) + b2); every epoch a share rho of the
edges is left out, those between busy users and popular items most likely; item graphs of each
modality; attention across modalities with residual; LightGCN (2 layers) of behaviour and each
modality; modality parts of items gated by behaviour; user vectors gated by themselves and summed
(UPFAM); BPR, InfoNCE of modality and behaviour, squared norms; the full graph at test.

Open in the text, chosen here: d 64, K 10, tau .2, rho .1, the weight of InfoNCE .01 (the paper's
lambda_c = .2 is called a temperature in one place). Which items attend to which across modalities:
all pairs would be an N x N map, so an item attends to its K nearest items of the modality it asks
and to itself. All propagations start from the same user table. Raw features are frozen. The item is
its behaviour vector plus the gated modality parts. Also different: any number of modalities (the
query is the mean of the others); an item without a modality stays alone in its graph; Adam with the
project's preset rates (paper 5e-4, batch 1024).
Checked against: hand-computed cases only. Published, random split: Baby R@20 .1017 / N@20 .0463,
Sports .1149 / .0521, Clothing .0981 / .0441.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from model_parts.base import Batch, TrainingData
from model_parts.collaborative import GraphRecommender, bpr, item_features, mean_of_others
from model_parts.contrastive import row_nce
from model_parts.graphs import (
    SparseGraph,
    kept_edges,
    nearest,
    propagate,
    repeated,
    symmetric,
    symmetric_by_rows,
)


class AMMRM(GraphRecommender):
    """Graph collaborative filtering with gates against the noise of modalities."""

    name = "ammrm"
    ablations = {
        "all edges": {"ammrm.edge_dropout": 0.0},
        "no item graphs": {"ammrm.mm_layers": 0},
        "no contrast": {"ammrm.contrast": 0.0},
    }
    search_space = {
        "train.lr": (3e-4, 5e-3, "log"),
        "ammrm.edge_dropout": [0.1, 0.3, 0.5],
        "ammrm.contrast": [0.001, 0.01, 0.1, 0.2],
        "ammrm.temperature": [0.1, 0.2, 0.5],
    }

    neighbours: Tensor  # [M, N, K] rows an item attends to in each modality, itself first

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own, n_items = config.ammrm, config.n_items(catalogue)
        super().__init__(n_items, own.width)
        widths, d = config.modality_widths(catalogue), own.width
        self.own = own
        for m, width in enumerate(widths):
            self.register_buffer(f"features_{m}", torch.zeros(n_items, width))
        k = min(own.neighbours, n_items)
        self.register_buffer("neighbours", torch.zeros(len(widths), n_items, k).long())
        self.project = nn.ModuleList(nn.Linear(width, d) for width in widths)
        self.filters = nn.ModuleList(SelfGate(d) for _ in widths)
        self.across = nn.ModuleList(
            NeighbourAttention(d, own.heads) for _ in widths if len(widths) > 1
        )
        self.separate = nn.ModuleList(SelfGate(d) for _ in widths)  # modality by behaviour
        self.user_gates = nn.ModuleList(SelfGate(d) for _ in range(len(widths) + 1))
        nn.init.xavier_uniform_(self.items)
        self.pruned = SparseGraph()
        self.item_graphs = nn.ModuleList(SparseGraph() for _ in widths)

    @torch.no_grad()
    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Graphs of train and of features. Raises ValueError without features."""
        features, present = item_features("AMMRM", data.catalogue)
        super().prepare(data, generator)
        self.pruned.fill(self.normalised.edges(), (data.n_users, data.n_items))
        for m, (rows, graph) in enumerate(zip(features, self.item_graphs, strict=True)):
            getattr(self, f"features_{m}").copy_(rows)
            found = nearest(rows, self.own.neighbours, present[:, m])
            itself = torch.arange(data.n_items)[:, None].expand_as(found.columns)
            there = torch.isfinite(found.values)
            self.neighbours[m] = torch.where(there, found.columns, itself)
            edges = found.edges()
            ones = edges._replace(weights=torch.ones(len(edges.rows)))
            graph.fill(symmetric_by_rows(ones, data.n_items), (data.n_items, data.n_items))

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Leave out other edges than before."""
        super().begin_epoch(epoch, generator)
        if not self.own.edge_dropout:
            return
        shape = (len(self.users.weight), len(self.items))
        kept = kept_edges(self.bipartite.edges().cpu(), 1 - self.own.edge_dropout, generator)
        self.pruned.fill(symmetric(kept, shape), shape)

    # ----------------------------------------------------------------- network

    def content(self) -> list[Tensor]:
        """Items in each modality, [N, d]: filtered, smoothed on the item graph, enhanced."""
        parts = []
        for m, (project, gate) in enumerate(zip(self.project, self.filters, strict=True)):
            filtered = gate(self.items, by=project(getattr(self, f"features_{m}")))
            parts.append(repeated(self.item_graphs[m], filtered, self.own.mm_layers))
        if len(parts) == 1:
            return parts
        return [
            x + attend(mean_of_others(parts, m), x, self.neighbours[m])
            for m, (x, attend) in enumerate(zip(parts, self.across, strict=True))
        ]

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gated parts of user and item vectors: behaviour first, then each modality."""
        graph, layers = (self.pruned if self.training else self.normalised), self.own.ui_layers
        start = self.users.weight
        users, items = propagate(graph, start, self.items, layers)
        user_parts, item_parts = [users], [items]
        for x, separate in zip(self.content(), self.separate, strict=True):
            of_users, of_items = propagate(graph, start, x, layers)
            user_parts.append(of_users)
            item_parts.append(separate(of_items, by=items))
        gated = [gate(x, by=x) for gate, x in zip(self.user_gates, user_parts, strict=True)]
        return gated, item_parts

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Sums of all parts."""
        users, items = self.parts()
        return sum(users), sum(items)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """BPR, InfoNCE of modality and behaviour for users and items, squared norms."""
        own, (users, positives, negatives) = self.own, self.triples(batch)
        user_parts, item_parts = self.parts()
        user, positive, negative = (
            sum(user_parts)[users], sum(item_parts)[positives], sum(item_parts)[negatives]
        )  # fmt: skip
        contrast = _agreement(user_parts, users, own.temperature)
        contrast = contrast + _agreement(item_parts, positives, own.temperature)
        squares = sum(x.square().sum() for x in (user, positive, negative))
        return {
            "bpr": bpr(user, positive, negative),
            "contrast": own.contrast * contrast,
            "norm": own.norm * 0.5 * squares / len(users),
        }


class SelfGate(nn.Module):
    """x * sigmoid(W by + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        """[R, d] gated by [R, d]."""
        return x * torch.sigmoid(self.gate(by))


class NeighbourAttention(nn.Module):
    """Multi-head attention of each row to a given few rows, as `nn.MultiheadAttention` computes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, asking: Tensor, x: Tensor, neighbours: Tensor) -> Tensor:
        """Queries [N, d], keys and values from x [N, d] at rows [N, K] -> [N, d]."""
        N, d = x.shape
        query = self.query(asking).view(N, self.heads, -1)
        key = self.key(x).view(N, self.heads, -1)[neighbours]  # [N, K, heads, d/heads]
        value = self.value(x).view(N, self.heads, -1)[neighbours]
        logits = torch.einsum("nhd,nkhd->nhk", query, key) / (d // self.heads) ** 0.5
        mixed = torch.einsum("nhk,nkhd->nhd", torch.softmax(logits, dim=2), value)
        return self.out(mixed.reshape(N, d))


def _agreement(parts: list[Tensor], rows: Tensor, temperature: float) -> Tensor:
    """InfoNCE of the sum of modality parts with the behaviour part of the same rows."""
    behaviour, *content = (x[rows] for x in parts)
    return row_nce(sum(content), behaviour, temperature)
