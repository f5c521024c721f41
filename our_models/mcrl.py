"""MCRL: three levels of contrastive learning that shape the space semantic IDs live in.

DESIGN section 6. Three InfoNCE losses, each with a weight of its own (0 switches it off):
1. user: q_u of the history with the representation, under the user's modality weights, of what the
   user engaged next and of what the most similar user of the batch engaged next; items of the
   history are no negatives (sota.md 3.4);
2. intra: in each modality, an item with one of its nearest neighbours in the features;
3. inter: the shared parts s_im of one item in different modalities, in the shared sub-space only,
   since aligning everything leaves nothing to personalise (sota.md 3.4: cosine .97, .03 bit).

`MCRL` learns the encoders of encoders.py, of which IDs are made, and recommends by itself, with
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
from model_parts.base import Batch, TrainingData
from model_parts.contrastive import (
    RandomPrefixes,
    aligned,
    cosines,
    info_nce,
    one_prefix_each,
)
from model_parts.stage_one import counted, seeded
from our_models.encoders import ModalityEncoders
from our_models.pmat import PMAT
from our_models.weights import View


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
    alike = cosines(profiles, profiles)
    one_user = batch.users[:, None] == batch.users[None]
    similar = alike.masked_fill(one_user, float("-inf")).argmax(1).where(~one_user.all(1), own)
    in_history = (batch.items[:, :, None] == rows[None, None] + 1).any(1)
    similar = similar.where(~in_history[own, similar], own)
    same = (rows[:, None] == rows[None]) | (rows[similar][:, None] == rows[None])
    return rows, own, similar, in_history | same | one_user


class MCRL(ModalityEncoders):
    """The encoders, shaped by three contrastive levels."""

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
            parts["intra"] = weight.intra * self.intra_level(self.encoded_in, rows)
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
        """Items with a feature neighbour, modality by modality; vectors(m, rows) -> [B, d]."""
        k = self.neighbours.shape[2]
        losses = []
        for m in range(self.neighbours.shape[0]):
            near = self.neighbours[m][rows]  # [B, k]
            partners = near.gather(1, torch.randint(k, (len(rows), 1), device=rows.device))[:, 0]
            # neither the anchor itself nor any of its neighbours is a negative
            related = (rows[:, None] == rows) | (rows[:, None] == partners)
            related = related | (near[:, :, None] == partners).any(1)
            known, pair = self.present[rows, m].float(), (vectors(m, rows), vectors(m, partners))
            losses.append(aligned(*pair, related, self.own.temperature, known))
        return torch.stack(losses).mean()

    def inter_level(self, items: Tensor, projections: nn.ModuleList, rows: Tensor) -> Tensor:
        """The shared parts of each pair of modalities; items [B, M, d]. 0 with one modality."""
        parts = [project(x) for x, project in zip(items.unbind(1), projections, strict=True)]
        losses, same = [items.new_zeros(())], rows[:, None] == rows
        for m, n in combinations(range(len(parts)), 2):
            both = (self.present[rows, m] & self.present[rows, n]).float()
            losses.append(aligned(parts[m], parts[n], same, self.own.temperature, both))
        return torch.stack(losses).sum() / max(len(losses) - 1, 1)


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
        prefixes = RandomPrefixes(data.train, self.mix.window)
        if not (self.mix.stage_one_epochs and len(prefixes)):
            return  # what encoders make of items before they have learnt is noise
        self._learn_encoders(prefixes, generator)
        everything = torch.arange(data.n_items, device=self.counts.device)
        with torch.no_grad():
            self.latents.copy_(self.mcrl.encoded(everything))

    def _learn_encoders(self, prefixes: RandomPrefixes, generator: torch.Generator) -> None:
        size = min(self.mix.stage_one_batch, len(prefixes))
        steps = self.mix.stage_one_epochs * len(prefixes) // size
        self.mcrl.requires_grad_(True)
        optimiser = torch.optim.AdamW(self.mcrl.parameters(), lr=self.mix.stage_one_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        with seeded(generator):
            for step in counted(steps):
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
            parts["intra"] = self.mix.intra * self.mcrl.intra_level(self.pure_vectors_in, rows)
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
        modalities = range(self.latents.shape[1])
        return torch.stack([self.pure_vectors_in(m, rows) for m in modalities], dim=1)

    def pure_vectors_in(self, m: int, rows: Tensor) -> Tensor:
        """The same under modality m alone, [P, d]."""
        if self.own.fusion == "late":  # a modality has digits of its own
            return self.personal_vectors_in(m, rows)
        return self.personal_vectors(self.corners[m].expand(len(rows)), rows)
