"""LETTER: semantic IDs that know who was bought with whom, and use their codes evenly.

Paper: Wang et al., Learnable Item Tokenization for Generative Recommendation, CIKM 2024 (arXiv
2405.07314). Reproduced: an RQ-VAE (4 x 256 codewords of width 32) trained with
    L = reconstruction + codebooks + alpha L_CF + beta L_div
    L_CF  = cross-entropy, among the items j of a batch, of <z^_i, h_j> at j = i (eq. 4)
    L_div = cross-entropy, among all codewords but its own, of <c, .> at a member of c's cluster
            (eq. 5), for the codeword c that an item chose at each level
z^ is the straight-through sum of codewords and h a frozen collaborative vector; codewords are
clustered anew from time to time. Then TIGER's generator with the ranking-guided loss, a token
cross-entropy of logits over tau (eq. 7). The released script sets tau = 1, which changes nothing;
the paper tunes 0.7 to 1. As in the code, tau is in the loss only and not in the beam search.
Differs: h comes from co-occurrence in train (factorised PMI, seconds) instead of a SASRec;
clusters of codewords are plain k-means, not bounded in size, and a codeword alone in its cluster
has no L_div; all items that chose a codeword in a step share its random positive; collisions are
mended greedily (the nearest free last code) instead of with Sinkhorn's algorithm; codebooks are
fitted anew every 50 steps, by k-means, since latents run away from codewords that AdamW moves, so
that L_div, which moves codewords alone, has little left to say; a number of steps instead of 20,000
epochs. alpha is 1 in the presets: with the paper's .02
L_CF hardly moves an ID here, where features have variance 1. Generator: see tiger.py (no text
vocabulary).
Checked against: Beauty R@10 .0672 / N@10 .0364 (paper), .0645 / .0343 (Cornac's re-run of the
released code); seen items not masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from model_parts.base import TrainingData
from model_parts.cooccurrence import behaviour_vectors
from model_parts.generative import Seq2SeqRecommender
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.quantisers import Quantised, assign, kmeans
from model_parts.residual import RQVAE, repair_last_digit, train_autoencoder

# Steps between two clusterings of the codewords.
_CLUSTER_EVERY = 50


class LETTER(Seq2SeqRecommender):
    """TIGER with a learnt tokenizer and a temperature in the loss."""

    name = "letter"
    ablations = {
        "digits among all codes": {"letter.among": "all"},
        "no collaborative alignment": {"letter.alpha": 0.0},
        "no diversity": {"letter.beta": 0.0},
        "plain loss": {"letter.temperature": 1.0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "letter.alpha": (0.005, 5.0, "log"),
        "letter.beta": [1e-5, 1e-4, 1e-3],
        "letter.temperature": [0.7, 0.8, 0.9, 1.0],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__(config.n_items(catalogue), config.letter, config.letter.digits)
        self.temperature = config.letter.temperature

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Train the tokenizer on items of the train part, code all items, mend collisions."""
        own = self.own
        modalities = chosen_modalities(data.catalogue, own.features, "LETTER")
        in_train = rows_in_train(data.train, data.n_items)
        vectors, known = item_vectors(modalities, in_train, 0, whiten=False)
        behaviour = behaviour_vectors(data.train, data.n_items, own.latent, own.window, generator)
        fitted = in_train & known
        model = RQVAE(
            vectors.shape[1], own.latent, own.digits, own.codes, own.hidden, own.depth, generator
        )
        extra = self._extra_losses(model, *(part[fitted] for part in behaviour), generator)
        train_autoencoder(model, vectors[fitted], generator, own.tokenizer_steps, extra=extra)
        codes = torch.randint(own.codes, self.codes.shape, generator=generator)
        codes[known] = model.encode(vectors)[known]  # an item without features keeps random ones
        rests, last = model.leftovers(vectors)[-1], model.codebooks[-1].detach()
        codes = repair_last_digit(codes, lambda rows: torch.cdist(rests[rows], last))
        self.set_codes(codes, data.counts)

    def _extra_losses(
        self, model: RQVAE, behaviour: Tensor, known: Tensor, generator: torch.Generator
    ) -> Callable[[Tensor, Quantised], Tensor]:
        """alpha L_CF + beta L_div of a batch; behaviour [P, z] and known [P] of its items."""
        own, step, clusters = self.own, itertools.count(), None

        def losses(rows: Tensor, latent: Quantised) -> Tensor:
            nonlocal clusters
            if next(step) % _CLUSTER_EVERY == 0:
                clusters = cluster_codewords(model.codebooks.detach(), own.groups, generator)
            chosen = known[rows]
            aligned = alignment_loss(latent.quantised[chosen], behaviour, rows[chosen])
            diverse = diversity_loss(model.codebooks, clusters, latent.codes, generator)
            return own.alpha * aligned + own.beta * diverse

        return losses


def alignment_loss(quantised: Tensor, behaviour: Tensor, rows: Tensor) -> Tensor:
    """L_CF: quantised [B, z] of items rows [B], behaviour [P, z] of all; 0 for an empty batch.

    An item that a batch holds twice is not its own negative.
    """
    if not len(rows):
        return quantised.sum()
    logits = quantised @ behaviour[rows].T
    twice = rows[:, None] == rows[None]
    twice.fill_diagonal_(False)
    own = torch.arange(len(rows), device=rows.device)
    return F.cross_entropy(logits.masked_fill(twice, float("-inf")), own)


def cluster_codewords(codebooks: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Codebooks [L, K, z] -> cluster of every codeword [L, K]."""
    centres = kmeans(codebooks, min(groups, codebooks.shape[1]), generator, n_iterations=10)
    return assign(codebooks, centres)[0]


def diversity_loss(
    codebooks: Tensor, clusters: Tensor, codes: Tensor, generator: torch.Generator
) -> Tensor:
    """L_div of codes [B, L], mean over items and levels; clusters [L, K].

    The positive of a codeword is a random other one of its cluster; one that is alone in its
    cluster counts 0.
    """
    itself = torch.eye(codebooks.shape[1], dtype=torch.bool, device=codebooks.device)
    partners = (clusters[:, :, None] == clusters[:, None]) & ~itself  # [L, K, K]
    draw = torch.rand(partners.shape, generator=generator).to(codebooks.device)
    positive = (draw * partners).argmax(2)  # [L, K]
    logits = torch.bmm(codebooks, codebooks.transpose(1, 2)).masked_fill(itself, float("-inf"))
    loss = F.cross_entropy(logits.flatten(0, 1), positive.flatten(), reduction="none")
    loss = loss.view_as(positive) * partners.any(2)  # [L, K]
    return loss[torch.arange(codes.shape[1], device=codes.device), codes].mean()
