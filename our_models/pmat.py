"""PMAT: a personalised multimodal adaptive tokenizer and the generator that speaks its codes.

DESIGN section 5. An item has `shared_digits` codes that are the same for everybody, from all its
modalities together, and `personal_digits` codes of a blend x_i(u) = sum_m alpha_m(u, i) z_im whose
weights depend on user and item. Everything nonlinear happens before the blend; codes are an argmax
over blended tables (quantisers.BlendQuantiser), so no item is encoded again for a user. Weights are
resolved to a grid of G blends: codes of all items under all blends are one static atlas [G, N, L],
and decoding from it is exact.

An item's vector is the sum of its code vectors. With one head for all digits, ranking by
sum_l log p_l equals ranking by <h_u, sum_l E_l[C_u[i, l]]> (DESIGN 5.5), plus beta <h_u, e_i> for
the model with a dense residual; `residual: false` is the pure-ID model.

Loss: softmax over items, every candidate coded under the same user (DESIGN 5.6), so that making
codes easy helps the negatives as much as the target. The context q_u that weights depend on is made
of the history before the target only, so codes can not tell it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.backbone import FrequencyBlock, Positions, at_last, init_weights
from model_parts.base import Batch, Recommender, TrainingData
from model_parts.decoding import token_rows
from model_parts.fusion import ModalityAttention, nearest_grid_point, simplex_grid
from model_parts.quantisers import BlendQuantiser, ProductQuantiser, whitened_pca


class PMAT(Recommender):
    """Personalised semantic IDs, decoded exactly."""

    name = "pmat"
    examples = "prefixes"

    counts: Tensor  # [N] train interactions
    latents: Tensor  # [N, M, z] unit rows, zero where missing
    present: Tensor  # [N, M] bool
    shared_codes: Tensor  # [N, L_s]
    atlas: Tensor  # [G, N, L_f]

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__()
        own, window = config.pmat, config.data.max_history
        self.own = own
        self.n_codes = own.codes
        n_items, n_modalities = config.n_items(catalogue), config.n_modalities(catalogue)
        digits = own.shared_digits + own.personal_digits
        grid = simplex_grid(n_modalities, own.grid)
        self.register_buffer("grid", grid)
        self.register_buffer("counts", torch.ones(n_items))
        self.register_buffer("latents", torch.zeros(n_items, n_modalities, own.latent))
        self.register_buffer("present", torch.ones(n_items, n_modalities, dtype=torch.bool))
        self.register_buffer("shared_codes", torch.zeros(n_items, own.shared_digits).long())
        self.register_buffer("atlas", torch.zeros(len(grid), n_items, own.personal_digits).long())
        self.quantiser = BlendQuantiser(own.latent, own.personal_digits, own.codes)
        self.tokens = nn.Embedding(digits * own.codes, own.width)
        self.residual = nn.Embedding(n_items, own.width) if own.residual else None
        summary = n_modalities * (own.latent + 1) + 1
        self.context = nn.Sequential(nn.Linear(summary, own.context), nn.GELU())
        self.attention = ModalityAttention(
            own.context, own.latent, n_modalities, own.attention, own.personalised
        )
        self.positions = Positions(window, own.width, from_end=True)
        self.norm = nn.LayerNorm(own.width, eps=1e-12)
        self.dropout = nn.Dropout(own.dropout)
        self.blocks = nn.ModuleList(
            FrequencyBlock(window, own.cutoff, own.filter, own.width, own.heads, own.dropout)
            for _ in range(own.layers)
        )
        init_weights(self)
        # a sum of L code vectors should be as long as one item embedding of the baselines
        nn.init.normal_(self.tokens.weight, std=0.02 / math.sqrt(digits))
        if self.residual is not None:
            nn.init.zeros_(self.residual.weight)

    # ----------------------------------------------------------------- tokenizer

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Latents of every modality, shared codes, and the atlas of personal codes.

        Fitted on items that occur in train; all items are encoded. Raises ValueError without
        features.
        """
        modalities = list((getattr(data.catalogue, "modalities", None) or {}).values())
        if not modalities:
            raise ValueError("PMAT needs item features (text.npy, visual.npy, ...) to make IDs of.")
        items = torch.tensor(data.train.items, dtype=torch.long)
        self.counts.copy_(torch.bincount(items, minlength=data.n_items + 1)[1:])
        in_train = self.counts > 0
        latents, present = [], []
        for features, known in modalities:
            known = torch.tensor(known, dtype=torch.bool)
            white = whitened_pca(
                torch.tensor(features, dtype=torch.float32), in_train & known, self.own.latent
            )
            white = F.pad(white, (0, self.own.latent - white.shape[1]))
            latents.append(F.normalize(white @ _rotation(self.own.latent, generator), dim=1))
            present.append(known)
        self.present.copy_(torch.stack(present, dim=1))
        self.latents.copy_(torch.stack(latents, dim=1) * self.present[:, :, None])
        self._fit_codes(in_train, generator)

    def _fit_codes(self, in_train: Tensor, generator: torch.Generator) -> None:
        together = self.latents.flatten(1)
        together = whitened_pca(together, in_train, together.shape[1])
        width = together.shape[1] - together.shape[1] % self.own.shared_digits
        quantiser = ProductQuantiser(width, self.own.shared_digits, self.own.codes)
        quantiser.fit(together[in_train][:, :width], generator)
        self.shared_codes.copy_(quantiser.encode(together[:, :width]))
        fitted = self.latents[in_train]
        points = torch.randint(len(self.grid), (4, len(fitted)), generator=generator)
        blends = torch.einsum("rnm,nmz->rnz", self.grid[points], fitted).flatten(0, 1)
        blends = blends[blends.norm(dim=1) > 0]  # all weight on a missing modality
        self.quantiser.fit(blends, generator)
        self.atlas.copy_(self.quantiser.atlas(self.latents, self.grid))

    # ----------------------------------------------------------------- weights

    def contexts(self, items: Tensor) -> Tensor:
        """q after each position, [B, T, c]: what the history so far looks like in each modality.

        Running mean of the unit latents, its length (1 when all items agree, near 0 when they do
        not: how much the modality matters to this user) and the log of the number of items.
        """
        seen = items > 0
        rows = (items - 1).clamp(min=0)
        known = self.present[rows] & seen[:, :, None]  # [B, T, M]
        latents = self.latents[rows] * known[..., None]
        means = latents.cumsum(1) / known.cumsum(1).clamp(min=1)[..., None]
        length = seen.cumsum(1).float().log1p()[..., None]
        summary = torch.cat([means.flatten(2), means.norm(dim=3), length], dim=2)
        return self.context(summary)

    def grid_points(self, weights: Tensor) -> Tensor:
        """Index of the blend that weights [..., M] resolve to."""
        return nearest_grid_point(weights, self.grid)

    # ----------------------------------------------------------------- vectors

    def shared_vectors(self, rows: Tensor) -> Tensor:
        """Sum of the shared code vectors of items [P] -> [P, d]."""
        return self._sum(self.shared_codes[rows], 0)

    def personal_vectors(self, points: Tensor, rows: Tensor) -> Tensor:
        """Sum of the personal code vectors of items [P] under blends [P] -> [P, d]."""
        return self._sum(self.atlas[points, rows], self.own.shared_digits)

    def _sum(self, codes: Tensor, first_digit: int) -> Tensor:
        tokens = token_rows(codes, self.own.codes) + first_digit * self.own.codes
        return F.embedding_bag(tokens, self.tokens.weight, mode="sum")

    def fixed_vectors(self, rows: Tensor) -> Tensor:
        """The part of an item's vector that is the same for everybody, [P, d]."""
        vectors = self.shared_vectors(rows)
        return vectors if self.residual is None else vectors + self.residual(rows)

    # ----------------------------------------------------------------- generator

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """State after each history [B, d] and the context its weights come from [B, c]."""
        contexts = self.contexts(batch.items)  # [B, T, c]
        before = F.pad(contexts, (0, 0, 1, 0))[:, :-1]  # an item is coded by what came before it
        seen = batch.items > 0
        rows = batch.items[seen] - 1
        weights = self.attention.pairs(before[seen], self.latents[rows], self.present[rows])
        vectors = self.fixed_vectors(rows) + self.personal_vectors(self.grid_points(weights), rows)
        x = vectors.new_zeros(*batch.items.shape, vectors.shape[1])
        x = x.masked_scatter(seen[:, :, None], vectors)
        x = self.dropout(self.norm(x + self.positions(batch.lengths, x.shape[1])))
        for block in self.blocks:
            x = block(x, seen[:, :, None].to(x.dtype))
        return at_last(x, batch.lengths), at_last(contexts, batch.lengths)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Softmax over the target and sampled items, all coded under the same user."""
        states, context = self.encode(batch)
        targets = batch.targets.max(dim=1).values - 1  # [B], a prefix has one target
        rows, labels, correction = self._candidates(targets)
        scores = self._scores(states, context, rows, soft=True) + correction
        return {"item": F.cross_entropy(scores, labels)}

    def _candidates(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items to tell the target from: rows [S], where each target is [B], correction [B, S].

        All items when the catalogue is small, else the targets of the batch and a uniform sample.
        Scores of sampled items are raised by -log of how often they are expected in the sample, so
        that the softmax estimates the one over the whole catalogue.
        """
        n_items, n_sampled = len(self.counts), self.own.negatives
        if n_sampled + len(targets) >= n_items:
            return (
                torch.arange(n_items, device=targets.device),
                targets,
                self.counts.new_zeros(1, 1),
            )
        labels = torch.arange(len(targets), device=targets.device)
        sampled = torch.randint(n_items, (n_sampled,), device=targets.device)
        rows = torch.cat([targets, sampled])
        expected = len(targets) * self.counts[rows] / self.counts.sum() + n_sampled / n_items
        correction = -expected.log().expand(len(targets), -1).clone()
        correction.masked_fill_(rows[None] == targets[:, None], float("-inf"))  # no second copy
        correction[labels, labels] = 0.0
        return rows, labels, correction

    def _scores(self, states: Tensor, context: Tensor, rows: Tensor, soft: bool = False) -> Tensor:
        """[B, S] scores of items `rows`, each in the codes the user sees it with.

        With `soft`, the gradient is that of a mixture of all blends, weighted by how near they are
        to alpha: a hard choice of blend alone would teach the attention nothing.
        """
        latents, present = self.latents[rows], self.present[rows]
        fixed = states @ self.fixed_vectors(rows).T
        weights = self.attention(context, latents, present)  # [B, S, M]
        every = torch.stack(  # [G, B, S]
            [
                states @ self.personal_vectors(point.expand(len(rows)), rows).T
                for point in torch.arange(len(self.grid), device=rows.device)
            ]
        )
        hard = every.gather(0, self.grid_points(weights)[None])[0]
        if not soft:
            return fixed + hard
        near = weights @ self.grid.T - 0.5 * self.grid.square().sum(1)
        mixture = torch.softmax(2 * self.own.grid**2 * near, dim=2).permute(2, 0, 1)  # [G, B, S]
        mixed = (mixture * every).sum(0)
        return fixed + mixed + (hard - mixed).detach()

    def score(self, batch: Batch) -> Tensor:
        """[B, N] exact scores of all items, in blocks of items to bound memory."""
        states, context = self.encode(batch)
        rows = torch.arange(len(self.counts), device=states.device)
        return torch.cat(
            [self._scores(states, context, part) for part in rows.split(16_384)], dim=1
        )

    # ----------------------------------------------------------------- IDs

    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """Codes as each user sees them now, [B, N, L]; under even weights without users, [N, L]."""
        if batch is None:
            return torch.cat([self.shared_codes, self.atlas[0]], dim=1)
        personal = self.atlas.gather(
            0, self.blends(batch)[:, :, None].expand(-1, -1, self.atlas.shape[2])
        )
        return torch.cat([self.shared_codes.expand(len(personal), -1, -1), personal], dim=2)

    @torch.no_grad()
    def modality_weights(self, batch: Batch) -> Tensor:
        """alpha of every user for every item, [B, N, M]."""
        context = at_last(self.contexts(batch.items), batch.lengths)
        return self.attention(context, self.latents, self.present)

    def blends(self, batch: Batch) -> Tensor:
        """Which blend each user sees each item under, [B, N]."""
        return self.grid_points(self.modality_weights(batch))

    def describe(self) -> dict[str, Any]:
        """Adds the number of blends and the digits of an ID."""
        digits = self.own.shared_digits + self.own.personal_digits
        return super().describe() | {"blends": len(self.grid), "digits": digits}


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random rotation: spreads the variance of principal components evenly over sub-vectors."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
