"""MCRL: three levels of contrastive learning that shape the space semantic IDs live in.

DESIGN section 6. Three InfoNCE losses, each with a weight of its own (0 switches it off):
1. user: q_u of the history with the representation, under the user's modality weights, of what the
   user engaged next and of what the most similar user of the batch engaged next; items of the
   history are no negatives (sota.md 3.4);
2. intra: in each modality, an item with one of its nearest neighbours in the features;
3. inter: the shared parts s_im of one item in different modalities, in the shared sub-space only,
   since aligning everything leaves nothing to personalise (sota.md 3.4: cosine .97, .03 bit).

`MCRL` learns encoders z_im = enc_m(f_im), of which IDs are made, and recommends by itself, with
quantised vectors. `PMATWithMCRL` takes the latents of PMAT from these encoders (stage one, with
train interactions only) and keeps the three levels on the code vectors while the generator learns:
L = lambda_pmat L_pmat + lambda_mcrl L_mcrl.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.backbone import at_last
from model_parts.base import Batch, Recommender, TrainingData
from model_parts.contrastive import (
    RandomPrefixes,
    aligned,
    feature_neighbours,
    info_nce,
    one_prefix_each,
)
from model_parts.fusion import (
    coherence,
    even_weights,
    nearest_grid_point,
    or_all,
    simplex_grid,
)
from model_parts.quantisers import BlendQuantiser
from model_parts.stage_one import seeded
from our_models.pmat import PMAT, View
from our_models.tokenizer import digits_of_blends, item_latents, largest_divisor

_ENCODER_WIDTH = 256


def sample_positive_negative_ids(
    batch: Batch, profiles: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who is pulled to what in the user level, among the targets of the batch.

    profiles [B, p] say which users are alike: q_u, of which PMAT also makes the weights alpha.
    Returns rows of the targets [B] (0-based items), the position among them of each user's own next
    item [B] and of the next item of the most similar other user [B] (the own one where there is no
    other, or the user has had that item), and which targets are no negatives of a user [B, B]:
    those in the user's history, what else the user engaged, and what equals a positive.
    """
    rows = batch.targets.max(dim=1).values - 1
    own = torch.arange(len(rows), device=rows.device)
    alike = F.normalize(profiles, dim=1) @ F.normalize(profiles, dim=1).T
    one_user = batch.users[:, None] == batch.users[None]
    similar = alike.masked_fill(one_user, float("-inf")).argmax(1).where(~one_user.all(1), own)
    in_history = (batch.items[:, :, None] == rows[None, None] + 1).any(1)
    similar = similar.where(~in_history[own, similar], own)
    same = (rows[:, None] == rows[None]) | (rows[similar][:, None] == rows[None])
    return rows, own, similar, in_history | same | one_user


class MCRL(Recommender):
    """Contrastive encoders of items and users; IDs are the codes of the encoded items."""

    name = "mcrl"
    examples = "prefixes"
    ablations = {
        "no user level": {"mcrl.user": 0.0},
        "no intra-modal level": {"mcrl.intra": 0.0},
        "no inter-modal level": {"mcrl.inter": 0.0},
        "user level alone": {"mcrl.intra": 0.0, "mcrl.inter": 0.0},
        "intra-modal level alone": {"mcrl.user": 0.0, "mcrl.inter": 0.0},
        "inter-modal level alone": {"mcrl.user": 0.0, "mcrl.intra": 0.0},
    }
    search_space = {
        "mcrl.temperature": (0.03, 0.3, "log"),
        "mcrl.intra": (0.01, 1.0, "log"),
        "mcrl.inter": (0.01, 1.0, "log"),
    }

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
        self.register_buffer("grid", simplex_grid(n_modalities, sizes.grid))
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
        """z of items [P] in each modality, [P, M, z]: unit length, zero where missing."""
        inputs = self.inputs[rows]
        parts = [x + encode(x) for x, encode in zip(inputs.unbind(1), self.encoders, strict=True)]
        return F.normalize(torch.stack(parts, dim=1), dim=2) * self.present[rows][..., None]

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
        latents = batch.items.new_zeros(*batch.items.shape, 1, 1).float()
        latents = latents.expand(-1, -1, *self.inputs.shape[1:]).clone()  # [B, T, M, z]
        latents[seen] = self.encoded(batch.items[seen] - 1)
        rows = (batch.items - 1).clamp(min=0)
        # of the features: encoders bring a user's items together, and then every user would look
        # coherent in the modality that lets itself be bent most
        has = self.present[rows] & seen[:, :, None]
        known = has.sum(1)  # [B, M]
        sums = (self.inputs[rows] * has[..., None]).sum(1)
        agreement = coherence(sums, known, self.sizes.prior_pairs)
        alpha = torch.softmax(self.sharpness * agreement, dim=1)
        age = (batch.lengths[:, None] - 1 - torch.arange(seen.shape[1], device=seen.device)).clamp(
            0
        )
        recency = (0.7**age * seen)[:, :, None, None]
        recent = (latents * recency).sum(1) / recency.sum(1).clamp(min=1e-6)
        mean = latents.sum(1) / known.clamp(min=1)[..., None]
        query = recent + self.query(torch.cat([mean, recent], dim=1).flatten(1)).view_as(recent)
        return query, alpha

    # ----------------------------------------------------------------- the three levels

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The levels that are switched on and the distance to the codes, each times its weight."""
        query, alpha = self.users(batch)
        rows, own, similar, forbidden = sample_positive_negative_ids(batch, query.flatten(1))
        items, weight = self.encoded(rows), self.own
        blends = F.normalize((items * alpha[:, :, None]).flatten(1), dim=1).view_as(items)
        parts = {"commit": weight.commit * F.mse_loss(blends, self._words(blends))}
        if weight.user:
            logits = self._cosines(query * alpha[:, :, None], items)
            logits = logits - (self.counts[rows] + 1).log()  # popular items are drawn more often
            parts["user"] = weight.user * self.user_level(logits, own, similar, forbidden)
        if weight.intra:
            parts["intra"] = weight.intra * self.intra_level(self.encoded, rows)
        if weight.inter:
            shared = self.inter_level(items, self.shared, rows)
            parts["inter"] = weight.inter * shared
        return parts

    def user_level(self, logits: Tensor, own: Tensor, similar: Tensor, forbidden: Tensor) -> Tensor:
        """InfoNCE of users with their next items and, less, with those of similar users."""
        share = self.own.similar
        loss = info_nce(logits, own, forbidden)
        return (
            loss if not share else (1 - share) * loss + share * info_nce(logits, similar, forbidden)
        )

    def intra_level(self, vectors: Any, rows: Tensor) -> Tensor:
        """Items with a feature neighbour, modality by modality; vectors(rows) -> [B, M, d]."""
        k = self.neighbours.shape[2]
        anchors, losses = vectors(rows), []
        for m in range(self.neighbours.shape[0]):
            near = self.neighbours[m][rows]  # [B, k]
            partners = near.gather(1, torch.randint(k, (len(rows), 1), device=rows.device))[:, 0]
            # neither the anchor itself nor any of its neighbours is a negative
            related = (rows[:, None] == rows) | (rows[:, None] == partners)
            for column in near.T:
                related = related | (column[:, None] == partners)
            known = self.present[rows, m].float()
            others = vectors(partners)[:, m]
            losses.append(aligned(anchors[:, m], others, related, self.own.temperature, known))
        return torch.stack(losses).mean()

    def inter_level(self, items: Tensor, projections: nn.ModuleList, rows: Tensor) -> Tensor:
        """The shared parts of each pair of modalities; items [B, M, d]. 0 with one modality."""
        parts = [project(x) for x, project in zip(items.unbind(1), projections, strict=True)]
        losses, same = [items.new_zeros(())], rows[:, None] == rows
        for m, n in combinations(range(len(parts)), 2):
            both = (self.present[rows, m] & self.present[rows, n]).float()
            losses.append(aligned(parts[m], parts[n], same, self.own.temperature, both))
        return torch.stack(losses).sum() / max(len(losses) - 1, 1)

    def _cosines(self, query: Tensor, items: Tensor) -> Tensor:
        # of queries [B, M, z] with items [S, M, z], over the temperature
        query = F.normalize(query.flatten(1), dim=1)
        return query @ items.flatten(1).T / self.own.temperature

    # ----------------------------------------------------------------- items

    def train(self, mode: bool = True) -> MCRL:
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
        """[B, N]: queries with the codewords of each item's ID, as the user sees it."""
        query, alpha = self.users(batch)  # alpha counts once: in the codes here, in q in the loss
        points, atlas = self._points(alpha), self.atlas()
        scores = query.new_zeros(points.shape)
        for point in points.unique().tolist():  # one [B, N] of scores at a time
            found = self._cosines(query, self.quantiser.decode(atlas[point]))
            scores = torch.where(points == point, found, scores)
        return scores

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


class PMATWithMCRL(PMAT):
    """PMAT on MCRL's latents, with the three levels on its code vectors."""

    name = "pmat_mcrl"
    ablations = PMAT.ablations | MCRL.ablations | {"no stage one": {"mcrl.stage_one_epochs": 0}}
    search_space = PMAT.search_space | MCRL.search_space

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__(config, catalogue)
        self.mix = config.mcrl
        self.mcrl = MCRL(config, catalogue)
        self.mcrl.requires_grad_(False)  # what IDs are made of stays as stage one left it
        # on code vectors the levels have a query and a shared sub-space of their own
        width = config.pmat.width
        self.listens = self.context_network() if self.context is None else None
        self.asks = nn.Linear(config.pmat.context + self.latents.shape[1], width)
        self.shared = nn.ModuleList(
            nn.Linear(width, width // 2) for _ in range(self.latents.shape[1])
        )

    @property
    def traits(self) -> Tensor:
        """The features before MCRL: encoders bring a user's items together, and on what they make
        every user would look coherent in the modality that lets itself be bent most."""
        return self.mcrl.inputs

    def learn_latents(self, data: TrainingData, generator: torch.Generator) -> None:
        """Stage one: MCRL's encoders on random train prefixes; IDs are made of what they say."""
        super().learn_latents(data, generator)
        self.mcrl.start_from(self.counts, self.latents, self.present, generator)
        self._learn_encoders(data, generator)
        everything = torch.arange(data.n_items, device=self.counts.device)
        with torch.no_grad():
            self.latents.copy_(self.mcrl.encoded(everything))

    def _learn_encoders(self, data: TrainingData, generator: torch.Generator) -> None:
        prefixes = RandomPrefixes(data.train, self.mix.window)
        size = self.mix.stage_one_batch
        steps = self.mix.stage_one_epochs * len(prefixes) // size
        if not steps:
            return
        self.mcrl.requires_grad_(True)
        optimiser = torch.optim.AdamW(self.mcrl.parameters(), lr=self.mix.stage_one_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        with seeded(generator):
            for step in range(steps):
                self.mcrl.begin_epoch(step * size // len(prefixes), generator)
                optimiser.zero_grad(set_to_none=True)
                batch = prefixes.draw(size, generator).to(self.counts.device)
                sum(self.mcrl.loss(batch).values()).backward()
                optimiser.step()
                schedule.step()
        self.mcrl.requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """PMAT's parts and the three levels, each already weighted."""
        own = {name: self.mix.lambda_pmat * part for name, part in super().loss(batch).items()}
        if not self.mix.lambda_mcrl:
            return own
        levels = self._levels(batch)
        return own | {name: self.mix.lambda_mcrl * part for name, part in levels.items()}

    def _levels(self, batch: Batch) -> dict[str, Tensor]:
        batch = one_prefix_each(batch)
        view = self.view(batch)
        user = self._who_asks(batch, view)
        rows, own, similar, forbidden = sample_positive_negative_ids(batch, user)
        parts = {}
        if self.mix.user:
            logits = self._scores(self.asks(user), view, rows, learn=True)
            logits = logits - (self.counts[rows] + 1).log()
            parts["user"] = self.mix.user * self.mcrl.user_level(logits, own, similar, forbidden)
        if self.mix.intra:
            parts["intra"] = self.mix.intra * self.mcrl.intra_level(self.pure_vectors, rows)
        if self.mix.inter:
            shared = self.mcrl.inter_level(self.pure_vectors(rows), self.shared, rows)
            parts["inter"] = self.mix.inter * shared
        return parts

    def _who_asks(self, batch: Batch, view: View) -> Tensor:
        """q_u of the user level, [B, c]: of the user's own history also in the controls, in which
        weights look at something else or at nothing."""
        if self.own.dynamic and self.own.personalised in ("user", "user_item"):
            return view.context
        summary = at_last(self.summaries(batch.items), batch.lengths)
        return self.context_of(summary, self.context if self.listens is None else self.listens)

    def pure_vectors(self, rows: Tensor) -> Tensor:
        """ID representations of items under each modality alone, [P, M, d]."""
        if self.own.fusion == "late":  # a modality has digits of its own
            return self.every_personal_vector(rows).transpose(0, 1)
        return torch.stack(
            [self.personal_vectors(g.expand(len(rows)), rows) for g in self.corners], 1
        )


def _encoder(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, _ENCODER_WIDTH), nn.GELU(), nn.Linear(_ENCODER_WIDTH, width)
    )
