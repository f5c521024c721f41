"""What MCRL makes of items and users: encoders, queries, and IDs of what they encode.

DESIGN section 6. Encoders z_im = enc_m(f_im) of the whitened features of each modality, a query q_u
and modality weights alpha_u of a history, and a quantiser that follows the encoders. IDs are codes
of blends of the encodings, and items are ranked by their codewords. Which losses shape the encoders
is a matter of the subclass (mcrl.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.base import Batch, Recommender, TrainingData
from model_parts.contrastive import feature_neighbours
from model_parts.fusion import (
    coherence,
    even_weights,
    nearest_grid_point,
    or_all,
)
from model_parts.quantisers import BlendQuantiser
from our_models.tokenizer import digits_of_blends, grid_of_blends, item_latents, largest_divisor

_ENCODER_WIDTH = 256


class ModalityEncoders(Recommender):
    """Encodings of items, queries of users, and IDs between them."""

    counts: Tensor  # [N] train interactions
    inputs: Tensor  # [N, M, z] whitened features, unit rows
    present: Tensor  # [N, M] bool
    neighbours: Tensor  # [M, N, k] rows
    grid: Tensor  # [G, M]
    fitted: Tensor

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__()
        self.own, self.sizes = config.mcrl, config.pmat
        sizes = self.sizes
        self.n_codes = sizes.codes
        n_items = config.n_items(catalogue)
        n_modalities = config.n_modalities(catalogue) + sizes.with_behaviour
        width = sizes.latent
        k = min(self.own.neighbours, max(n_items - 1, 1))
        self.register_buffer("grid", grid_of_blends(n_modalities, sizes))
        self.register_buffer("counts", torch.ones(n_items))
        self.register_buffer("inputs", torch.zeros(n_items, n_modalities, width))
        self.register_buffer("present", torch.ones(n_items, n_modalities, dtype=torch.bool))
        self.register_buffer("fitted", torch.tensor(-1))  # the epoch whose encoders codes are of
        self.register_buffer("neighbours", torch.zeros(n_modalities, n_items, k).long())
        self.encoders = nn.ModuleList(_encoder(width) for _ in range(n_modalities))
        # the shared sub-space: half of the width, from every modality
        self.shared = nn.ModuleList(nn.Linear(width, width // 2) for _ in range(n_modalities))
        self.query = nn.Sequential(
            nn.Linear(2 * n_modalities * width, _ENCODER_WIDTH),
            nn.GELU(),
            nn.Linear(_ENCODER_WIDTH, n_modalities * width),
        )
        self.sharpness = nn.Parameter(torch.tensor(sizes.sharpness))
        late = sizes.fusion == "late"  # PMAT has no blends then, but encoders learn with some
        digits = largest_divisor(width, sizes.personal_digits) if late else digits_of_blends(sizes)
        self.quantiser = BlendQuantiser(n_modalities, width, digits, sizes.codes)
        self._atlas: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda model, _: model.forget_atlas())

    # ----------------------------------------------------------------- representations

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Whitened features, their neighbours and codebooks. Raises ValueError without features."""
        counts = data.counts
        latents, present = item_latents(data, counts > 0, self.sizes, generator)
        self.start_from(counts, latents, present, generator)

    def start_from(
        self, counts: Tensor, inputs: Tensor, present: Tensor, generator: torch.Generator
    ) -> None:
        """Take train counts [N], latents [N, M, z] and presence [N, M]; find neighbours, codes."""
        self.counts.copy_(counts)
        self.inputs.copy_(inputs)
        self.present.copy_(present)
        k = self.neighbours.shape[2]
        for m in range(len(self.encoders)):
            found = feature_neighbours(self.inputs[:, m], self.present[:, m], k)
            last = found[:, -1:].expand(-1, k - found.shape[1])  # again where there are fewer
            self.neighbours[m] = torch.cat([found, last], dim=1)
        self._fit_codebooks(generator)

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Codebooks follow the encoders; not when an epoch is taken up again."""
        if int(self.fitted) < epoch:
            self._fit_codebooks(generator)
            self.fitted.fill_(epoch)

    @torch.no_grad()
    def _fit_codebooks(self, generator: torch.Generator) -> None:
        fitted = self.encoded(torch.nonzero(self.counts > 0)[:, 0])
        points = torch.randint(len(self.grid), (2, len(fitted)), generator=generator)
        blends = (self.grid[points][..., None] * fitted).flatten(0, 1)
        self.quantiser.fit(blends[blends.flatten(1).norm(dim=1) > 0], generator, n_iterations=5)

    def encoded(self, rows: Tensor) -> Tensor:
        """z of items [...] in each modality, [..., M, z]: unit length, zero where missing."""
        distinct, place = rows.unique(return_inverse=True)  # many histories share their items
        parts = [self.encoded_in(m, distinct) for m in range(len(self.encoders))]
        vectors = torch.stack(parts, dim=1)
        return F.embedding(place, vectors.flatten(1)).unflatten(-1, vectors.shape[1:])

    def encoded_in(self, m: int, rows: Tensor) -> Tensor:
        """The same in modality m alone, [P] -> [P, z]."""
        inputs = self.inputs[rows, m]
        return F.normalize(inputs + self.encoders[m](inputs), dim=1) * self.present[rows, m, None]

    @torch.no_grad()
    def _words(self, blends: Tensor) -> Tensor:
        """The codewords of unit blends [P, M, z], scaled to unit length."""
        even = torch.ones(blends.shape[1], 1, device=blends.device)  # they are weighted already
        with torch.autocast(blends.device.type, enabled=False):  # rounded, codes would be others
            codes = self.quantiser.codes(self.quantiser.tables(blends), even)
        return self.quantiser.decode(codes)

    def users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Query q_u [B, M, z] and modality weights alpha_u [B, M] of the histories."""
        seen = batch.items > 0
        rows = (batch.items - 1).clamp(min=0)
        latents = self.encoded(rows) * seen[:, :, None, None]  # [B, T, M, z]
        # of the features: encoders bring a user's items together, and then every user would look
        # coherent in the modality that lets itself be bent most
        has = self.present[rows] & seen[:, :, None]
        known = has.sum(1)  # [B, M]
        sums = (self.inputs[rows] * has[..., None]).sum(1)
        agreement = coherence(sums, known, self.sizes.prior_pairs)
        alpha = torch.softmax(self.sharpness * agreement, dim=1)
        place = torch.arange(seen.shape[1], device=seen.device)
        age = (batch.lengths[:, None] - 1 - place).clamp(min=0)
        recency = (0.7**age * seen)[:, :, None, None]
        recent = (latents * recency).sum(1) / recency.sum(1).clamp(min=1e-6)
        mean = latents.sum(1) / known.clamp(min=1)[..., None]
        query = recent + self.query(torch.cat([mean, recent], dim=1).flatten(1)).view_as(recent)
        return query, alpha

    def _cosines(self, query: Tensor, items: Tensor) -> Tensor:
        # of queries [B, M, z] with items [S, M, z] as long as they are, over the temperature, which
        # would make much of what bf16 rounds off
        with torch.autocast(query.device.type, enabled=False):
            query = F.normalize(query.flatten(1).float(), dim=1)
            return query @ items.flatten(1).float().T / self.own.temperature

    # ----------------------------------------------------------------- items

    def train(self, mode: bool = True) -> ModalityEncoders:
        """As in torch, and `forget_atlas`."""
        self.forget_atlas()
        return super().train(mode)

    def forget_atlas(self) -> None:
        """To be called when the encoders have changed."""
        self._atlas = None

    @torch.no_grad()
    def atlas(self) -> Tensor:
        """Codes of all items under all blends, [G, N, L]; kept while nothing is trained."""
        if self._atlas is not None:
            return self._atlas
        everything = torch.arange(len(self.counts), device=self.counts.device)
        atlas = self.quantiser.atlas(self.encoded(everything), self.grid)
        self._atlas = None if self.training else atlas
        return atlas

    def score(self, batch: Batch) -> Tensor:
        """[B, N]: queries with the codewords of each item's ID, as the user sees it.

        Codewords are as long as the weights of the modalities that the item has, as in the loss.
        """
        query, alpha = self.users(batch)  # alpha counts once: in the codes here, in q in the loss
        points, atlas = self._points(alpha), self.atlas()
        lengths = (alpha.square() @ or_all(self.present).to(alpha.dtype).T).sqrt()  # [B, N]
        scores = query.new_zeros(points.shape)
        for point in points.unique().tolist():  # one [B, N] of scores at a time
            found = self._cosines(query, self.quantiser.decode(atlas[point]))
            scores = torch.where(points == point, found, scores)
        return scores * lengths

    def _points(self, alpha: Tensor) -> Tensor:
        """Blend under which users of weights [B, M] see each item, [B, N]: modalities that an item
        lacks get nothing."""
        patterns, which = or_all(self.present).unique(dim=0, return_inverse=True)  # [Q, M], [N]
        weights = alpha[:, None] * patterns  # [B, Q, M]
        weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
        return nearest_grid_point(weights.permute(2, 0, 1), self.grid)[:, which]

    @torch.no_grad()
    def modality_weights_of(self, batch: Batch) -> Tensor:
        """alpha of each user, the same for all items, [B, M]."""
        return self.users(batch)[1]

    @torch.no_grad()
    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """Codes under each user's weights, [B, N, L]; under even weights without users, [N, L]."""
        if batch is None:
            everything = torch.arange(len(self.counts), device=self.counts.device)
            return self.quantiser.atlas(self.encoded(everything), even_weights(self.grid))[0]
        points, atlas = self._points(self.users(batch)[1]), self.atlas()
        return atlas[points, torch.arange(points.shape[1], device=points.device)]


def _encoder(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, _ENCODER_WIDTH), nn.GELU(), nn.Linear(_ENCODER_WIDTH, width)
    )
