"""PRISM on SASRec or STOSA: experts of unique, synergistic and redundant content beside item IDs.

Paper: Personalized Recommendation via Information Synergy Module, WWW 2026 (arXiv 2601.10944).
Reproduced: the interaction expert layer and the adaptive fusion layer of the released code, inside
its SASRec and inside its STOSA (`prism.host`); the losses, one sampled negative at every position;
weights 0.1 of the four expert losses. The released SASRec file does not run (its feature tables are
never made); repaired here as its STOSA sibling has them. Name them PRISM+SASRec and PRISM+STOSA:
the paper's best rows are PRISM+InDiRec, whose code is not released. Sizes at the paper's setting
(width 256, two 512-d modalities) on Beauty, with the phantom item that the release adds: 17,623,044
parameters on SASRec, 35,793,759 on STOSA, of which 2,259,035 never learn and do not exist here.

As released, not as in the paper: expert losses act on pooled embeddings, not on predictions; the
triplets are Euclidean with margin 1; the dropout inside experts has no effect. And as released, the
experts pool the whole training window, so that a position sees its own targets: a mismatch between
training and test, which `prism.pooling=causal` (running means) removes. Means run over all slots of
the window, with fixed random vectors in the empty ones, so they depend on `data.max_history`
(official 100, here 50).
STOSA as released: items and states are Gaussians; means and covariances have tables and projections
of their own but share experts, gate and LayerNorm (losses averaged); covariances meet the input
dropout twice. A misspelt name throws the encoder's means away, so the state's mean is its window
embedding and the value, output and feed-forward layers of the means never learn: they are left out
here, unless `prism.encode_mean` mends it. Left out too: a second encoder and a margin per user,
which nothing reads. Candidates never see features.
Differs: any number of modalities, one uniqueness expert each; a missing feature row is N(0, 0.02)
noise in that modality only; negatives are drawn outside the user's train items (the release leaves
out held-out items as well, a leak) and candidates are the real items; positions are counted from
the newest item and no work is done on padding, which gives the same states; no BPR term is ever
infinite; no optimiser step on random items before the first epoch; batches as in sasrec.py.
Checked against: numbers of the released code on toy data (tests/test_prism.py). Published on
Beauty, seen items masked: PRISM+SASRec R@10 .0681 / N@10 .0343, its SASRec .0534 / .0247;
PRISM+STOSA .0762 / .0481, its STOSA .0648 / .0339.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PRISM as PrismConfig
from config import Config
from model_parts.backbone import Positions, PostNormBlock, at_last, init_weights
from model_parts.base import Batch, Recommender, TrainingData
from model_parts.collaborative import item_features
from model_parts.dropout import Dropout
from model_parts.graphs import SparseGraph, draw_negatives, interaction_edges
from model_parts.softmax import item_cross_entropy
from model_parts.stochastic import Gaussian, StochasticBlock, distances, positive, ranking_losses

_MARGIN, _EPS = 1.0, 1e-7
_NOISE_OF_MISSING = 0.02
_MEAN_OF_INIT = {"sasrec": 0.0, "stosa": 0.01}


class Stream(nn.Module):
    """One view of a window: embeddings of items and positions, features and their projections."""

    def __init__(self, n_items: int, modality_widths: list[int], width: int, window: int) -> None:
        super().__init__()
        # row 0 fills the empty slots of a window: random, and it never learns
        self.items = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.features = nn.ModuleList(
            nn.Embedding(n_items + 1, raw, padding_idx=0) for raw in modality_widths
        )
        self.project = nn.ModuleList(nn.Linear(raw, width) for raw in modality_widths)
        self.positions = Positions(window, width, from_end=True)

    def content(self, items: Tensor) -> list[Tensor]:
        """Projected features of items [B, T]: M of [B, T, d]."""
        return [p(table(items)) for table, p in zip(self.features, self.project, strict=True)]

    def empty(self) -> tuple[Tensor, list[Tensor]]:
        """What an empty slot holds: its item embedding [d], and its content, M of [d]."""
        rows = [table.weight[0].detach() for table in self.features]
        content = [project(row) for row, project in zip(rows, self.project, strict=True)]
        return self.items.weight[0].detach(), content


class PRISM(Recommender, Stream):
    """A sequence model whose window embedding has a mixture of modality experts added.

    It is its own first stream: the only one of SASRec, the means of STOSA.
    """

    name = "prism"
    ablations = {
        "on STOSA": {"prism.host": "stosa"},
        "on STOSA with its means encoded": {"prism.host": "stosa", "prism.encode_mean": True},
        "experts see the items so far": {"prism.pooling": "causal"},
        "full softmax": {"prism.objective": "softmax"},
        "no uniqueness loss": {"prism.unique": 0.0},
        "no synergy loss": {"prism.synergy": 0.0},
        "no redundancy loss": {"prism.redundancy": 0.0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "prism.width": [64, 256],
        "prism.dropout": (0.2, 0.6),
        "prism.unique": [0.05, 0.1, 0.2],
        "prism.synergy": [0.05, 0.1, 0.2],
        "prism.redundancy": [0.05, 0.1, 0.2, 0.5],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own, window = config.prism, config.data.max_history
        widths, d = config.modality_widths(catalogue), own.width
        sizes = (config.n_items(catalogue), widths, d, window)
        super().__init__(*sizes)
        self.own, self.window = own, window
        self.cov = Stream(*sizes) if own.host == "stosa" else None
        self.experts = Experts(len(widths), d, own.expert)
        self.gate = Gate(len(widths) + 2, d, own.gate_dropout, own.temperature)
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.dropout = Dropout(own.dropout)
        self.blocks = nn.ModuleList(_block(own) for _ in range(own.layers))
        self.bipartite = SparseGraph()  # who took what in train, for the negatives
        mean = _MEAN_OF_INIT[own.host]
        init_weights(self, mean=mean)
        for stream in self._streams():
            for table in (stream.items, *stream.features):
                nn.init.normal_(table.weight, mean, 0.02)

    @torch.no_grad()
    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Feature tables and train interactions. Raises ValueError without features."""
        features, present = item_features("PRISM", data.catalogue)
        for m, rows in enumerate(features):
            noise = _NOISE_OF_MISSING * torch.randn(rows.shape, generator=generator)
            rows = torch.where(present[:, m, None], rows, noise)
            for stream in self._streams():
                table = stream.features[m]
                table.weight[1:] = rows.to(table.weight)
        self.bipartite.fill(interaction_edges(data.train), (data.n_users, data.n_items))

    def _streams(self) -> list[Stream]:
        return [self] if self.cov is None else [self, self.cov]

    # ----------------------------------------------------------------- network

    def encode(self, batch: Batch) -> tuple[Tensor | Gaussian, dict[str, Tensor]]:
        """The state after each position [B, T, d], and the losses of the experts."""
        x, losses = self._window(self, batch)
        if self.cov is not None:
            cov, others = self._window(self.cov, batch)
            x = Gaussian(F.elu(x), positive(self.dropout(cov)))
            losses = {name: (loss + others[name]) / 2 for name, loss in losses.items()}
        for block in self.blocks:
            x = block(x)
        return x, losses

    def _window(self, stream: Stream, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What goes into the blocks [B, T, d], and the losses of the experts."""
        present = batch.items > 0
        ids, content = stream.items(batch.items), stream.content(batch.items)
        empty_id, empty = stream.empty()
        pooled = [self._pooled(x, e, present) for x, e in zip(content, empty, strict=True)]
        mixture, losses = self._mixture(pooled, self._pooled(ids, empty_id, present), present)
        positions = stream.positions(batch.lengths, batch.items.shape[1])
        return self.dropout(self.norm(ids + mixture + sum(content) + positions)), losses

    def _mixture(
        self, content: list[Tensor], ids: Tensor, present: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """e_m of each window [B, 1, d], or of each position [B, T, d] with causal pooling."""
        which = present if self.own.pooling == "causal" else torch.ones_like(present[:, :1])
        views, losses = self.experts([x[which] for x in content], with_losses=self.training)
        mixed = self.gate(views, ids[which])  # [P, d]
        weights = {name: getattr(self.own, name) for name in losses}
        mixture = mixed.new_zeros(*which.shape, mixed.shape[1])
        mixture = mixture.masked_scatter(which[:, :, None], mixed)
        return mixture, {name: weights[name] * loss for name, loss in losses.items()}

    def _pooled(self, x: Tensor, empty: Tensor, present: Tensor) -> Tensor:
        """Mean of [B, T, d] over the window, empty slots at `empty` [d]: [B, 1, d]; or the running
        mean over the items so far, [B, T, d]."""
        x = x * present[:, :, None]
        if self.own.pooling == "causal":
            return x.cumsum(1) / present.cumsum(1).clamp(min=1)[:, :, None]
        absent = self.window - present.sum(1)[:, None, None]
        return (x.sum(1, keepdim=True) + absent * empty) / self.window

    # ----------------------------------------------------------------- losses and scores

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The next item against a random one (or all others), and the experts' losses.

        Against a random one: BCE on SASRec, BPR and a hinge (`pvn`) on STOSA.
        """
        states, losses = self.encode(batch)
        wanted = batch.targets > 0
        targets = batch.targets[wanted]  # [P]
        states = states[wanted] if self.cov is None else states.at(wanted)  # [P, d]
        if self.own.objective == "softmax":
            return {"item": self._softmax_loss(states, targets)} | losses
        users = batch.users[:, None].expand_as(wanted)[wanted]
        negatives = draw_negatives(self.bipartite, users) + 1
        return self._sampled_losses(states, targets, negatives) | losses

    def _softmax_loss(self, states: Tensor | Gaussian, targets: Tensor) -> Tensor:
        if self.cov is None:
            return item_cross_entropy(states, self.items.weight[1:], targets - 1)
        with torch.autocast(targets.device.type, enabled=False):  # for the reason of `closeness`
            return item_cross_entropy(states.queries(), self._all_items().keys(), targets - 1)

    def _sampled_losses(
        self, states: Tensor | Gaussian, targets: Tensor, negatives: Tensor
    ) -> dict[str, Tensor]:
        if self.cov is None:
            good = (states * self.items(targets)).sum(1)
            bad = (states * self.items(negatives)).sum(1)
            return {"item": (F.softplus(-good) + F.softplus(bad)).mean()}
        good, bad = (
            Gaussian(self.items(items), positive(self.cov.items(items)))
            for items in (targets, negatives)
        )
        item, pvn = ranking_losses(states, good, bad)
        return {"item": item, "pvn": self.own.pvn * pvn}

    def score(self, batch: Batch) -> Tensor:
        """[B, N] dot products of the last state with the item embeddings; on STOSA minus the
        squared Wasserstein distances."""
        states, _ = self.encode(batch)
        if self.cov is None:
            return at_last(states, batch.lengths) @ self.items.weight[1:].T
        last = Gaussian(*(at_last(x, batch.lengths) for x in states))
        return -distances(last, self._all_items())

    def _all_items(self) -> Gaussian:
        """The items of STOSA, [N, d]."""
        return Gaussian(self.items.weight[1:], positive(self.cov.items.weight[1:]))


def _block(own: PrismConfig) -> nn.Module:
    if own.host == "stosa":
        return StochasticBlock(own.width, own.heads, own.dropout, own.encode_mean)
    return PostNormBlock(own.width, own.heads, 4 * own.width, own.dropout, 0.0)


class Experts(nn.Module):
    """One expert for what is unique to each modality, one for synergy, one for redundancy."""

    def __init__(self, n_modalities: int, width: int, inner: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(n_modalities * width, inner), nn.GELU(), nn.Linear(inner, width)
            )
            for _ in range(n_modalities + 2)
        )

    def forward(
        self, inputs: list[Tensor], with_losses: bool = True
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Summaries [P, d] of M modalities -> outputs of M + 2 experts, and their losses.

        A loss compares an expert's output with what it says when one modality is replaced by
        noise, which is drawn anew for every expert and modality.
        """
        whole = [expert(torch.cat(inputs, dim=1)) for expert in self.experts]
        if not with_losses:
            return whole, {}
        broken = [
            [expert(torch.cat(_with_noise(inputs, m), dim=1)) for m in range(len(inputs))]
            for expert in self.experts
        ]
        unique = sum(_uniqueness(whole[m], broken[m], m) for m in range(len(inputs)))
        synergy = _mean_cosine(whole[-2], broken[-2])
        redundancy = 1 - _mean_cosine(whole[-1], broken[-1])
        return whole, {"unique": unique, "synergy": synergy, "redundancy": redundancy}


class Gate(nn.Module):
    """Weights of the experts from their outputs and the mean item embedding; their mixture."""

    def __init__(self, n_experts: int, width: int, dropout: float, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.layers = nn.Sequential(
            nn.Linear((n_experts + 1) * width, 2 * width), nn.GELU(), Dropout(dropout),
            nn.Linear(2 * width, n_experts),
        )  # fmt: skip

    def forward(self, views: list[Tensor], ids: Tensor) -> Tensor:
        """Expert outputs and mean IDs, [P, d] each -> [P, d]."""
        logits = self.layers(torch.cat([*views, ids], dim=1))
        weights = torch.softmax(logits / self.temperature, dim=1)
        return torch.einsum("pj,jpd->pd", weights, torch.stack(views))


def _with_noise(inputs: list[Tensor], m: int) -> list[Tensor]:
    """The inputs with the m-th replaced by N(0, 1) noise."""
    return [*inputs[:m], torch.randn_like(inputs[m]), *inputs[m + 1 :]]


def _uniqueness(whole: Tensor, broken: list[Tensor], m: int) -> Tensor:
    """Closer to what remains without the others than to what remains without modality m: triplets
    max(0, d(whole, without another) - d(whole, without m) + 1), mean over the others."""
    others = broken[:m] + broken[m + 1 :]
    if not others:
        return whole.new_zeros(())
    far = F.pairwise_distance(whole, broken[m], eps=_EPS)
    near = [F.pairwise_distance(whole, other, eps=_EPS) for other in others]
    return sum(F.relu(d - far + _MARGIN).mean() for d in near) / len(others)


def _mean_cosine(whole: Tensor, broken: list[Tensor]) -> Tensor:
    return sum(F.cosine_similarity(whole, other, dim=1).mean() for other in broken) / len(broken)
