"""MMQ."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import MMQ as Settings
from config import Config
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.quantisers import Quantised, kmeans
from model_parts.residual import COMMITMENT, CosineQuantiser, chosen_words, revive
from model_parts.stage_one import minimise, seeded

# Steps of stage one between two looks for codes that nothing uses.
_REVIVE_EVERY = 50
# Items tokenized at once where no gradient is needed.
_ROWS = 8192


class Experts(nn.Module):
    """Perceptrons with one hidden layer that look at the same input, [P, inputs] -> [P, E, w]."""

    def __init__(self, inputs: int, count: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, count * width)
        bound = 1 / math.sqrt(width)
        self.last = nn.Parameter(torch.empty(count, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor) -> Tensor:
        """Each expert's answer."""
        hidden = F.gelu(self.first(x)).unflatten(1, self.bias.shape)  # [P, E, w]
        return torch.einsum("pei,eio->peo", hidden, self.last) + self.bias

    def overlap(self) -> Tensor:
        """|V V^T - I|_F^2 for rows v_i = vec(W_i) / |W_i| of the last layers: 0 if orthogonal."""
        rows = F.normalize(self.last.flatten(1), dim=1)
        return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().sum()


class EuclideanQuantiser(CosineQuantiser):
    """The ablation: the nearest codeword by distance, and nothing is scaled to unit length."""

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> None:
        """Codebooks from k-means of latents [P, L, w]."""
        points = latents.transpose(0, 1).contiguous()
        self.codebooks.copy_(kmeans(points, self.codebooks.shape[1], generator))

    def cosines(self, latents: Tensor) -> Tensor:
        """Minus squared distances to all codewords, [N, L, K]: large where near."""
        points = latents.transpose(0, 1)  # [L, N, w]
        return -torch.cdist(points, self.codebooks).square().transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, L] -> codewords [N, L, w] as they are."""
        return chosen_words(self.codebooks, codes)

    def forward(self, latents: Tensor) -> Quantised:
        """Latents [N, L, w] -> codewords with the gradient of the latents, codes, loss."""
        codes = self.encode(latents.detach())
        words = self.decode(codes)
        loss = (words - latents.detach()).square().sum(2).mean()
        loss = loss + COMMITMENT * (latents - words.detach()).square().sum(2).mean()
        return Quantised(latents + (words - latents).detach(), codes, loss)


# --------------------------------------------------------------------------- tokenizer


class SharedSpecificTokenizer(nn.Module):
    """Experts on all modalities and experts on one each; an item gets one code from every expert.

    Items come as one row of M blocks x = [e_1; ...; e_M] [P, D] and presence [P, M]. The order of
    the L digits: shared experts, then those of each modality.
    """

    def __init__(self, widths: list[int], own: Settings) -> None:
        super().__init__()
        self.widths, self.own = widths, own
        total, width = sum(widths), own.width
        self.shared = Experts(total, own.shared, width)
        self.specific = nn.ModuleList(Experts(size, own.specific, width) for size in widths)
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, own.specific))
            for size in widths
        )
        self.decoder = _decoder(width, total)
        self.decoders = nn.ModuleList(_decoder(width, size) for size in widths)
        digits = own.shared + own.specific * len(widths)
        kind = CosineQuantiser if own.quantiser == "cosine" else EuclideanQuantiser
        self.quantiser = kind(digits, own.codes, width)

    def latents(self, x: Tensor) -> Tensor:
        """[P, D] -> z of every expert, [P, L, w]."""
        parts = x.split(self.widths, dim=1)
        answers = [expert(part) for expert, part in zip(self.specific, parts, strict=True)]
        return torch.cat([self.shared(x), *answers], dim=1)

    def weights(self, x: Tensor) -> Tensor:
        """[P, D] -> weight of every expert, [P, L]: 1 for shared ones, a softmax in each modality."""
        parts = x.split(self.widths, dim=1)
        gates = [gate(part).softmax(1) for gate, part in zip(self.gates, parts, strict=True)]
        return torch.cat([x.new_ones(len(x), self.own.shared), *gates], dim=1)

    def rebuild(self, x: Tensor, present: Tensor, quantised: Tensor) -> tuple[Tensor, Tensor]:
        """L_recon and L_aux from quantised latents [P, L, w]: squared errors, means over items.

        L_recon = |e - dec(sum of all)|^2 and L_aux = sum_m |e_m - dec_m(sum of m's experts)|^2,
        experts weighted by their gates. A modality that an item lacks does not count.
        """
        weighted = quantised * self.weights(x)[:, :, None]
        sizes = [self.own.shared] + [self.own.specific] * len(self.widths)
        sums = [part.sum(1) for part in weighted.split(sizes, dim=1)]
        parts = x.split(self.widths, dim=1)
        together = self.decoder(torch.stack(sums).sum(0)).split(self.widths, dim=1)
        alone = [decode(part) for decode, part in zip(self.decoders, sums[1:], strict=True)]
        known = present.to(x.dtype).T
        return _squares(together, parts, known), _squares(alone, parts, known)

    def losses(self, x: Tensor, present: Tensor, recon: float, aux: float) -> dict[str, Tensor]:
        """The tokenizer's own terms, weighted; those of weight 0 are left out."""
        quantised = self.quantiser(self.latents(x))
        rebuilt, auxiliary = self.rebuild(x, present, quantised.quantised)
        parts = {"recon": recon * rebuilt, "codebook": quantised.loss}
        if aux:
            parts["aux"] = aux * auxiliary
        return parts

    def overlap(self) -> Tensor:
        """L_ortho: the shared group, and the experts of every modality."""
        return torch.stack([group.overlap() for group in (self.shared, *self.specific)]).sum()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """[N, D] -> codes [N, L], in blocks."""
        return torch.cat([self.quantiser.encode(self.latents(rows)) for rows in x.split(_ROWS)])

    def soft_codes(self, x: Tensor, temperature: float) -> Tensor:
        """ind = soft + sg(hard - soft), soft = softmax(cos / tau): [P, D] -> [P, L, K], one-hot
        in value, so that the loss of the generator reaches experts and codewords."""
        soft = (self.quantiser.cosines(self.latents(x)) / temperature).softmax(2)
        hard = F.one_hot(soft.argmax(2), soft.shape[2]).to(soft)
        return soft + (hard - soft).detach()


def _decoder(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


def _squares(found: Any, wanted: Any, known: Tensor) -> Tensor:
    # sum over modalities of |found_m - wanted_m|^2 where item has m, mean over items
    errors = [(f - w).square().sum(1) for f, w in zip(found, wanted, strict=True)]
    return (torch.stack(errors) * known).sum(0).mean()


def train_tokenizer(
    tokenizer: SharedSpecificTokenizer, x: Tensor, present: Tensor, generator: torch.Generator
) -> None:
    """Stage one on items x [P, D], L = 12 L_recon + 10 L_aux + .005 L_ortho and the codebooks."""
    own, quantiser = tokenizer.own, tokenizer.quantiser
    quantiser.start(tokenizer.latents(x), generator)
    used = torch.zeros(quantiser.codebooks.shape[:2], dtype=torch.bool, device=x.device)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(x), (min(own.stage_one_batch, len(x)),), generator=generator)
        chunk = x[rows]
        with torch.no_grad():
            latents = tokenizer.latents(chunk)
            used.scatter_(1, quantiser.encode(latents).T, True)
            if (step + 1) % _REVIVE_EVERY == 0 and step + _REVIVE_EVERY < own.stage_one_steps:
                revive(quantiser.codebooks, used, latents.transpose(0, 1), generator)
                used.zero_()
        parts = tokenizer.losses(chunk, present[rows], own.recon, own.aux)
        return sum(parts.values()) + own.ortho * tokenizer.overlap()

    minimise(tokenizer, loss, own.stage_one_steps, own.stage_one_lr)
