"""MMQ: shared and modality-specific experts, one codebook each, tuned with the generator.

Paper: MMQ: Multimodal Mixture-of-Quantization Tokenization for Semantic ID Generation and User
Behavioral Adaptation (arXiv 2508.15281; WSDM 2026); no public code, and the paper's details were
read in summaries. Reproduced: two shared experts on all modalities and two on each alone, an ID of
one code from every expert; gates within a modality; cosine codebooks; stage one with L = 12 L_recon
+ 10 L_aux + .005 L_ortho; stage two, in which histories are read through soft codes
ind = soft + sg(hard - soft), so that the loss of the generator reaches experts and codebooks, with
.5 L_recon + .5 L_aux.
Differs, since the paper is silent: experts are perceptrons with one hidden layer, L_ortho acts on
their last weights; latents have unit length like codewords; codebooks learn by |sg(z) - q|^2 +
.25 |z - sg(q)|^2, start from k-means, and unused codes are revived (L_recon alone gives them no
gradient); tau .1; IDs are refreshed at each epoch of stage two and frozen after it; the tokenizer
learns at a hundredth of the generator's rate (at a tenth, 14 to 20 % of all digits change in every
epoch, and N@10 halved on mock data with an earlier preset: .0595, against .1104 and .1126 without
stage two). The modalities are those there are, each cut to 256 principal components of unit
length (the paper has text by Qwen3 and pictures by a private encoder). The generator is
TIGER's instead of HeterRec, digits and beams as in tiger.py; items that share an ID share its
probability by their counts in train.
Checked against: Beauty R@10 .0675 / N@10 .0384 (their encoders), codebook use 1.00 and entropy near
ln K; without stage two N@5 falls from .2661 to .1606 on their industrial data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import MMQ as Settings
from config import Config
from model_parts.base import Batch, TrainingData
from model_parts.generative import Seq2SeqRecommender, newest_items
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.quantisers import Quantised, kmeans
from model_parts.residual import COMMITMENT, CosineQuantiser, chosen_words, revive
from model_parts.seq2seq import Memory
from model_parts.stage_one import minimise, seeded

# Steps of stage one between two looks for codes that nothing uses.
_REVIVE_EVERY = 50
# Items tokenized at once where no gradient is needed.
_ROWS = 8192
# Widest input of a modality.
_INPUT_WIDTH = 256
# Weight of the codebook term in stage two: as small beside L_recon as in stage one.
_TUNED_CODEBOOK = 0.04


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
        total, width = sum(widths), own.expert_width
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
        """[P, D] -> weight of every expert, [P, L]: shared 1, a softmax in each modality."""
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

    def losses(
        self,
        latents: Tensor,
        x: Tensor,
        present: Tensor,
        recon: float,
        aux: float,
        codebook: float = 1.0,
    ) -> dict[str, Tensor]:
        """The tokenizer's own terms, weighted; without weight L_aux is left out.

        `latents` [P, L, w] are those of x.
        """
        quantised = self.quantiser(latents)
        rebuilt, auxiliary = self.rebuild(x, present, quantised.quantised)
        parts = {"recon": recon * rebuilt, "codebook": codebook * quantised.loss}
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

    def soft_codes(self, latents: Tensor, temperature: float) -> Tensor:
        """ind = soft + sg(hard - soft), soft = softmax(cos / tau): [P, L, w] -> [P, L, K], one-hot
        in value, so that the loss of the generator reaches experts and codewords."""
        soft = (self.quantiser.cosines(latents) / temperature).softmax(2)
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
        latents = tokenizer.latents(chunk)
        with torch.no_grad():
            used.scatter_(1, quantiser.encode(latents).T, True)
            due = (step + 1) % _REVIVE_EVERY == 0 and step + _REVIVE_EVERY < own.tokenizer_steps
            if own.revive and due:
                revive(quantiser.codebooks, used, latents.transpose(0, 1), generator)
                used.zero_()
        parts = tokenizer.losses(latents, chunk, present[rows], own.recon, own.aux)
        return sum(parts.values()) + own.ortho * tokenizer.overlap()

    minimise(tokenizer, loss, own.tokenizer_steps, own.stage_one_lr)


# --------------------------------------------------------------------------- model


class MMQ(Seq2SeqRecommender):
    """The tokenizer above and a T5 that writes its codes."""

    name = "mmq"
    ablations = {
        "digits among all codes": {"mmq.among": "all"},
        "no cosine quantiser": {"mmq.quantiser": "euclidean"},
        "dead codes stay dead": {"mmq.revive": False},
        "no auxiliary loss": {"mmq.aux": 0.0},
        "no orthogonality": {"mmq.ortho": 0.0},
        "no stage two": {"mmq.tune_epochs": 0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "mmq.softness": [0.05, 0.1, 0.2],
        "mmq.codes": [32, 100, 256],
        "mmq.dropout": [0.1, 0.2, 0.3],
    }

    inputs: Tensor  # [N, D] modalities in a row, unit length each, zero where missing
    present: Tensor  # [N, M] bool
    drawn: Tensor  # [N, L] random codes, for items without features
    refreshed: Tensor  # the epoch whose weights the codes are of

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own, n_items = config.mmq, config.n_items(catalogue)
        widths = _input_widths(config, catalogue)
        super().__init__(n_items, own, own.shared + own.specific * len(widths))
        self.tokenizer = SharedSpecificTokenizer(widths, own)
        self.tokenizer.requires_grad_(own.tune_epochs > 0)
        self.register_buffer("inputs", torch.zeros(n_items, sum(widths)))
        self.register_buffer("present", torch.ones(n_items, len(widths), dtype=torch.bool))
        self.register_buffer("drawn", torch.zeros(n_items, self.digits, dtype=torch.int64))
        self.register_buffer("refreshed", torch.tensor(-1))
        self.tuning = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The tokenizer learns more slowly than the generator."""
        return self.slowed([self.tokenizer], self.own.tune_rate)

    # ----------------------------------------------------------------- the two stages

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Stage one, on items that occur in train. Raises ValueError without features."""
        in_train = rows_in_train(data.train, data.n_items)
        blocks, present = [], []
        modalities = chosen_modalities(data.catalogue, "all", "MMQ")
        for width, (name, pair) in zip(self.tokenizer.widths, modalities.items(), strict=True):
            vectors, known = item_vectors({name: pair}, in_train, width, whiten=False)
            vectors = F.pad(vectors, (0, width - vectors.shape[1]))
            blocks.append(F.normalize(vectors, dim=1))
            present.append(known)
        self.inputs.copy_(torch.cat(blocks, dim=1))
        self.present.copy_(torch.stack(present, dim=1))
        rows = torch.nonzero(in_train.to(self.present.device) & self.present.any(1))[:, 0]
        with seeded(generator):
            self.tokenizer.requires_grad_(True)
            train_tokenizer(self.tokenizer, self.inputs[rows], self.present[rows], generator)
            self.tokenizer.requires_grad_(self.own.tune_epochs > 0)
        self.drawn.copy_(torch.randint(self.n_codes, self.drawn.shape, generator=generator))
        self.set_codes(self.current_codes(), data.counts)

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """In stage two, the IDs to predict are those of the tokenizer as it is now."""
        self.tuning = epoch < self.own.tune_epochs
        stale = int(self.refreshed) < epoch  # not when an epoch is taken up again
        if stale and self.own.tune_epochs and epoch <= self.own.tune_epochs:
            self.set_codes(self.current_codes())
            self.refreshed.fill_(epoch)

    def current_codes(self) -> Tensor:
        """What the tokenizer makes of all items, [N, L]; random codes of items without features."""
        known = self.present.any(1, keepdim=True)
        return torch.where(known, self.tokenizer.encode(self.inputs), self.drawn)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next ID; in stage two, where the history is read through soft codes,
        also .5 L_recon + .5 L_aux on its items."""
        if not (self.training and self.tuning):
            return super().loss(batch)
        newest = newest_items(batch, self.own.history)
        items = newest.items.where(newest.items > 0, newest.items[:1, :1])  # no item of its own
        distinct, place = items.unique(return_inverse=True)
        rows = distinct - 1
        inputs, present = self.inputs[rows], self.present[rows]
        weight, auxiliary = self.own.tune, self.own.tune if self.own.aux else 0.0
        with torch.autocast(inputs.device.type, enabled=False):  # half precision changes codes
            latents = self.tokenizer.latents(inputs)
            parts = self.tokenizer.losses(
                latents, inputs, present, weight, auxiliary, _TUNED_CODEBOOK
            )
            codes = self.soft_codes(latents, rows)
        words = self.tokens.weight[: self.digits * self.n_codes].unflatten(0, (self.digits, -1))
        vectors = torch.bmm(codes.transpose(0, 1), words).transpose(0, 1)  # [U, L, d]
        soft = F.embedding(place, vectors.flatten(1))
        memory, start = self.read_softly(newest, soft)
        return {"digits": self.target_loss(batch, memory, start)} | parts

    def read_softly(self, batch: Batch, soft: Tensor) -> tuple[Memory, Tensor]:
        """`read` with token vectors [B, T, L d] in place of the codes of the history."""
        rows, present = self.history_rows(batch)
        x = F.pad(soft.unflatten(2, (self.digits, -1)).flatten(1, 2), (0, 0, 0, 1))
        place = torch.arange(rows.shape[1], device=rows.device)
        ends = place == (batch.lengths * self.digits)[:, None]
        return self.network.encode(torch.where(ends[:, :, None], self.tokens(rows), x), present)

    def soft_codes(self, latents: Tensor, rows: Tensor) -> Tensor:
        """Codes of items `rows` [U], with a gradient for the tokenizer: [U, L, K]."""
        codes = self.tokenizer.soft_codes(latents, self.own.softness)
        drawn = F.one_hot(self.drawn[rows], self.n_codes).to(codes.dtype)
        return torch.where(self.present[rows].any(1)[:, None, None], codes, drawn)


def _input_widths(config: Config, catalogue: Any) -> list[int]:
    if catalogue is None:
        widths = list(config.mock.dims.values())
    else:
        widths = [features.shape[1] for features, _ in catalogue.modalities.values()]
    return [min(width, _INPUT_WIDTH) for width in widths] or [1]
