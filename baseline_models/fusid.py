"""FusID: fuse all that is known of an item first, then cut the result into digits.

Paper: Kim, Hou, McAuley, FusID: Modality-Fused Semantic IDs for Generative Music Recommendation
(arXiv 2601.08764, January 2026); no public code, and the paper's details were read in summaries.
Reproduced: a fusion network (Linear, BatchNorm, ReLU, Linear, LayerNorm) from all inputs in a row
to n sub-embeddings; L = L_cont + alpha (L_cov + L_var) on pairs of items mined from co-occurrence;
k-means at each position on train items only; no digit against conflicts; a GPT-2 that writes the
IDs of a history in a row. Fusion network at the paper's inputs: 8,920,960 parameters.
Differs, since the paper is silent or for other data: inputs are the modalities there are and
co-occurrence vectors (factorised PMI, which word2vec approximates) instead of three texts, audio
and playlists; positives are the top 10 partners of an item by normalised co-occurrence, negatives
are random items met no more often than by chance; distances are over sqrt(2 n d), without which
vectors of unit variance stand 36 apart where 1 is wanted (`literal_distance` gives the printed
form); a fixed number of steps; size of the generator; digits and beams as in tiger.py; items that
share an ID share its probability by their counts in train.
Checked against: no number for Amazon data exists. In the paper (playlists) the regulariser takes
colliding items from 6.23 % to 0 and MRR from 7.54 to 9.58 %: the same direction is expected here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from config import FusID as Settings
from model_parts.base import TrainingData
from model_parts.cooccurrence import (
    Cooccurrence,
    are_strangers,
    behaviour_vectors,
    count_pairs,
    frequent_partners,
)
from model_parts.generative import DecoderRecommender
from model_parts.quantisers import assign, kmeans
from model_parts.stage_one import minimise, seeded

_WORD2VEC_WINDOW = 5


class Pairs(NamedTuple):
    """What the fusion network learns from: items (rows 0..N-1) and those often met with them."""

    items: Tensor  # [P]
    partners: Tensor  # [P]
    met: Cooccurrence

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs that belong together and as many random ones of strangers: one, other, y [<=size].

        y is 1 for the first kind. A random partner that is no stranger is left out.
        """
        chosen = torch.randint(len(self.items), (size // 2,), generator=generator)
        anchors = self.items[torch.randint(len(self.items), (size // 2,), generator=generator)]
        others = torch.randint(len(self.met.totals), (size // 2,), generator=generator)
        kept = are_strangers(self.met, anchors, others) & (self.met.totals[others] > 0)
        one = torch.cat([self.items[chosen], anchors[kept]])
        other = torch.cat([self.partners[chosen], others[kept]])
        together = torch.zeros(len(one))
        together[: len(chosen)] = 1
        return one, other, together


class FusionNetwork(nn.Module):
    """All that is known of an item, [P, inputs], to its n sub-embeddings, [P, n, d]."""

    def __init__(self, inputs: int, hidden: int, digits: int, part: int) -> None:
        super().__init__()
        self.digits = digits
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, digits * part),
            nn.LayerNorm(digits * part),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over n d, then cut."""
        return self.layers(x).unflatten(1, (self.digits, -1))


# --------------------------------------------------------------------------- losses


def pair_loss(one: Tensor, other: Tensor, together: Tensor, literal: bool = False) -> Tensor:
    """L_cont = mean (|1 - y| - D(E_i, E_j))^2 over pairs, [P, n, d], [P, n, d], [P] -> scalar.

    D is the Euclidean distance; over sqrt(2 n d) unless `literal`, so that vectors of unit variance
    that have nothing in common are about 1 apart.
    """
    distance = torch.linalg.vector_norm((one - other).flatten(1), dim=1)
    if not literal:
        distance = distance / math.sqrt(2 * one[0].numel())
    return F.mse_loss(distance, 1 - together)


def covariance_loss(parts: Tensor) -> Tensor:
    """L_cov = 2 / (n (n - 1)) sum_{i<j} |Cov(e_i, e_j)|_F^2 / d over a batch [P, n, d] -> scalar.

    Sub-embeddings that say the same are pushed apart. 0 with a single one.
    """
    _, n, d = parts.shape
    centred = (parts - parts.mean(0)).flatten(1)
    covariance = centred.T @ centred / (len(parts) - 1)
    squares = covariance.square().view(n, d, n, d).sum((1, 3))  # [n, n], each pair twice
    between = squares.sum() - squares.diagonal().sum()
    return between / (max(n * (n - 1), 1) * d)


def variance_loss(parts: Tensor, least: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """L_var = mean over the n d dimensions of max(0, gamma - sqrt(Var + eps)): none dies out."""
    deviation = (parts.flatten(1).var(0) + epsilon).sqrt()
    return F.relu(least - deviation).mean()


# --------------------------------------------------------------------------- tokenizer


def item_inputs(catalogue: Any, in_train: Tensor, behaviour: Tensor) -> Tensor:
    """Everything known of an item in a row, [N, inputs]: each block with unit variance.

    The modalities and the co-occurrence vectors `behaviour` [N, w]; zeros where an item lacks one,
    and a mark that it does. Statistics come from items that occur in train.
    """
    blocks = [(behaviour, behaviour.abs().sum(1) > 0)]
    for features, present in (getattr(catalogue, "modalities", None) or {}).values():
        present = torch.tensor(present, dtype=torch.bool)
        blocks.append((torch.tensor(features, dtype=torch.float32), present))
    columns = []
    for block, present in blocks:
        fitted = block[in_train & present]
        if len(fitted) > 1:
            spread = fitted.std(0)  # a column that is constant in train stays as it is
            block = (block - fitted.mean(0)) / torch.where(spread < 1e-6, 1.0, spread)
        columns.append(block * present[:, None])
        if not bool(present.all()):
            columns.append((~present).float()[:, None])
    return torch.cat(columns, dim=1)


def train_fusion(
    inputs: Tensor, pairs: Pairs, own: Settings, generator: torch.Generator
) -> FusionNetwork:
    """L = L_cont + alpha (L_cov + L_var) on random pairs."""
    network = FusionNetwork(inputs.shape[1], own.hidden, own.digits, own.part).to(inputs.device)

    def loss(_: int) -> Tensor:
        one, other, together = (part.to(inputs.device) for part in pairs.draw(own.pairs, generator))
        parts = network(inputs[torch.cat([one, other])])
        total = pair_loss(parts[: len(one)], parts[len(one) :], together, own.literal_distance)
        if own.alpha:
            total = total + own.alpha * (covariance_loss(parts) + variance_loss(parts))
        return total

    steps = own.tokenizer_steps if len(pairs.items) else 0
    minimise(network, loss, steps, own.fusion_lr, own.fusion_decay)
    return network


def fused_ids(parts: Tensor, in_train: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """k-means at each position, fitted on train items: [N, n, d] -> [N, n], nearest centroids."""
    by_digit = parts.transpose(0, 1).contiguous()  # [n, N, d]
    centroids = kmeans(by_digit[:, in_train], codes, generator)
    return assign(by_digit, centroids)[0].T


def build_ids(
    data: TrainingData, interactions: Tensor, own: Settings, device: Any, generator: torch.Generator
) -> Tensor:
    """Semantic IDs [N, n] of all items: mine pairs, train the fusion network, cluster.

    `interactions` [N] are counts of the train part.
    """
    in_train = interactions > 0
    behaviour, _ = behaviour_vectors(
        data.train, data.n_items, own.behaviour, _WORD2VEC_WINDOW, generator
    )
    inputs = item_inputs(data.catalogue, in_train, behaviour).to(device)
    met = count_pairs(data.train, data.n_items, own.window, generator)
    pairs = Pairs(*frequent_partners(met, interactions, own.partners), met)
    with seeded(generator):
        network = train_fusion(inputs, pairs, own, generator)
    with torch.no_grad():
        parts = network(inputs)
    return fused_ids(parts, in_train.to(device), own.codes, generator)


class FusID(DecoderRecommender):
    """Fused semantic IDs, and a GPT-2 that writes them."""

    name = "fusid"
    ablations = {
        "digits among all codes": {"fusid.among": "all"},
        "no regulariser": {"fusid.alpha": 0.0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "fusid.alpha": [0.1, 0.2, 0.5],
        "fusid.digits": [3, 4, 5],
        "fusid.codes": [32, 256, 512, 1024],
        "fusid.dropout": [0.1, 0.2, 0.3],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own = config.fusid
        super().__init__(config.n_items(catalogue), own, own.digits, config.data.max_history)

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Stage one, on train interactions and the features of items that occur in them."""
        interactions = data.counts.float()
        codes = build_ids(data, interactions, self.own, self.codes.device, generator)
        self.set_codes(codes, interactions)
