"""Through whose eyes items are coded: modality weights alpha_m(u, i) from a user's history.

DESIGN section 5.3. A context q_u sums up the history before the target, never the target itself;
attention makes weights of it and of the item's latents, which are resolved to a blend of the grid,
under which the tokenizer knows the item's codes. The controls (random weights, another user's, the
user's or the item's alone, weights that stay as the first items made them) are here, too.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.base import Batch, TrainingData
from model_parts.dropout import Dropout
from model_parts.fusion import (
    ModalityAttention,
    coherence,
    nearest_grid_point,
    or_all,
    random_grid_points,
)
from our_models.tokenizer import PersonalTokenizer

# Contexts of other users that the control with permuted users looks through.
_STRANGERS = 1024


class View(NamedTuple):
    """Through whose eyes items are coded."""

    context: Tensor  # [P, c]
    users: Tensor  # [P]


class PersonalWeights(PersonalTokenizer):
    """The tokenizer, and weights under which a user sees an item."""

    law: Tensor  # [G] how often the control with random weights has each blend
    strangers: Tensor  # [1024, summary], histories of random users

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__(config, catalogue)
        self.window = config.data.max_history
        n_modalities = len(self.corners)
        summary = n_modalities * (self.own.latent + 1) + 1
        self.register_buffer("law", _law(self.own.law, len(self.grid)))
        self.register_buffer("strangers", torch.zeros(_STRANGERS, summary))

    def make_attention(self) -> None:
        """The layers of the weights; a subclass calls this after it has drawn its own."""
        own, n_modalities = self.own, len(self.corners)
        level = "user_item" if own.personalised == "permuted" else own.personalised
        self.attention = ModalityAttention(
            own.context + n_modalities, own.latent, n_modalities, own.attention, level
        )
        self.attention.start_from_coherence(own.sharpness)
        learns = level.startswith("user") or own.prefix
        self.context_width = own.context + n_modalities if learns else 1
        self.context = self.context_network() if learns else None

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """The tokenizer, and histories of random users at random moments for the control."""
        super().prepare(data, generator)
        offsets = torch.tensor(data.train.offsets)
        items = torch.tensor(data.train.items, dtype=torch.long, device=self.counts.device)
        active = torch.nonzero(offsets.diff() > 0)[:, 0]
        for row, user in enumerate(
            active[torch.randint(len(active), (_STRANGERS,), generator=generator)].tolist()
        ):
            history = items[offsets[user] : offsets[user + 1]]
            end = int(torch.randint(1, len(history) + 1, (), generator=generator))
            seen = history[max(0, end - self.window) : end]  # as much as the model sees of anybody
            self.strangers[row] = self.summaries(seen[None])[0, -1]

    # ----------------------------------------------------------------- contexts

    def summaries(self, items: Tensor) -> Tensor:
        """What the history up to each position looks like in each modality, [B, T, M (z + 1) + 1].

        Running mean of the unit latents, the log of the number of items, and how coherent the items
        are in each modality: their mean pairwise cosine, shrunk towards 0 for few items, which
        tells how much the modality matters to this user.
        """
        seen = items > 0
        rows = (items - 1).clamp(min=0)
        known = self.present[rows] & seen[:, :, None]  # [B, T, M]
        sums = (self.traits[rows] * known[..., None]).cumsum(1)
        counts = known.cumsum(1)
        means = sums / counts.clamp(min=1)[..., None]
        length = seen.cumsum(1).float().log1p()[..., None]
        agreement = coherence(sums, counts, self.own.prior_pairs)
        return torch.cat([means.flatten(2), length, agreement], dim=2)

    def contexts(self, batch: Batch) -> Tensor:
        """q_u before the first item and after each one, [B, T + 1, c]."""
        T = batch.items.shape[1]
        summaries = self.summaries(batch.items)
        if self.own.personalised == "permuted":
            summaries = self.strangers[batch.users % _STRANGERS][:, None].expand(-1, T, -1)
        elif not self.own.dynamic:  # what the first items said holds for ever
            steps = torch.arange(T, device=summaries.device)
            summaries = summaries[:, steps.clamp(max=self.own.warm_items - 1)]
        return self.context_of(F.pad(summaries, (0, 0, 1, 0)), self.context)

    def context_network(self) -> nn.Module:
        """What makes contexts of summaries."""
        network = nn.Linear(self.strangers.shape[1], self.own.context), nn.GELU()
        return nn.Sequential(*network, Dropout(self.own.dropout))

    def context_of(self, summaries: Tensor, network: nn.Module | None) -> Tensor:
        """q_u of summaries [..., summary]: [..., c]; one zero where nothing depends on it."""
        if network is None:
            return summaries.new_zeros(*summaries.shape[:-1], 1)
        return torch.cat([network(summaries), summaries[..., -len(self.corners) :]], dim=-1)

    def view(self, batch: Batch) -> View:
        """How the users of a batch see items after their whole histories."""
        contexts = self.contexts(batch)
        everybody = torch.arange(len(contexts), device=contexts.device)
        return View(contexts[everybody, batch.lengths], batch.users)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What modality weights come from learns more slowly than the rest: it starts from
        coherence, which is a good guess, and could otherwise turn codes into hidden scores. Where
        no weight looks at the context it is a prefix and no more, and learns like the rest."""
        weighing = [self.attention]
        if self.attention.of_user is not None:
            weighing.append(self.context)
        return self.slowed(weighing, self.own.attention_rate)

    # ----------------------------------------------------------------- weights

    def pair_points(self, view: View, rows: Tensor) -> Tensor:
        """Blend under which each of P users sees one item, [P]."""
        if self.own.personalised == "random":
            return nearest_grid_point(self.random_weights(view.users, rows), self.grid)
        weights = self.attention.pairs(view.context, self.traits[rows], self.present[rows])
        return nearest_grid_point(weights, self.grid)

    def random_weights(self, users: Tensor, rows: Tensor) -> Tensor:
        """alpha of the control, of users and items that broadcast, [M, ...]: a blend drawn by the
        law. As with learned weights a modality that the item lacks gets nothing; where the others
        have nothing either, they share evenly."""
        present = or_all(self.present[rows]).float()
        known = self.grid[random_grid_points(users, rows, self.law)] * present  # [..., M]
        known = torch.where(known.sum(-1, keepdim=True) > 0, known, present.expand_as(known))
        return (known / known.sum(-1, keepdim=True).clamp(min=1e-6)).movedim(-1, 0)

    def modality_weights(self, view: View, rows: Tensor) -> Tensor:
        """alpha of each of B users for each of S items, [M, B, S]."""
        if self.own.personalised == "random":
            return self.random_weights(view.users[:, None], rows[None])
        return self.attention(view.context, self.traits[rows], self.present[rows])

    def blends(self, view: View, rows: Tensor) -> Tensor:
        """Blend under which each of B users sees each of S items, [B, S]."""
        return nearest_grid_point(self.modality_weights(view, rows), self.grid)

    # ----------------------------------------------------------------- IDs

    @torch.no_grad()
    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """Codes as each user sees them now, [B, N, L]; under even weights without users, [N, L].

        With late weights nothing about a code depends on users: the digits of all modalities.
        """
        if batch is None:
            return self.common_ids()
        if self.own.fusion == "late":
            return self.common_ids().expand(len(batch.users), -1, -1)
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return torch.stack([self.ids(p, rows) for p in self.blends(self.view(batch), rows)])

    @torch.no_grad()
    def blend_law(self) -> Tensor:
        """Share of each blend among random users and items that lack no modality (all items where
        there are none), [G]: what `pmat.law` wants."""
        whole = self.present.all(1)
        rows = torch.nonzero(whole if whole.any() else ~whole)[:, 0]
        rows = rows[:: len(rows) // 500 + 1]
        contexts = self.context_of(self.strangers, self.context)
        view = View(contexts, torch.arange(_STRANGERS, device=rows.device))
        points = self.blends(view, rows)
        return torch.bincount(points.flatten(), minlength=len(self.grid)) / points.numel()

    def describe(self) -> dict[str, Any]:
        """Adds the share of each blend among users and items (`pmat.law` of the control)."""
        return super().describe() | {"law": [round(p, 4) for p in self.blend_law().tolist()]}

    @torch.no_grad()
    def modality_weights_of(self, batch: Batch) -> Tensor:
        """alpha of each user, mean over all items, [B, M]."""
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return self.modality_weights(self.view(batch), rows).mean(2).T


def _law(text: str, n_points: int) -> Tensor:
    """Probabilities of the grid points from "0.2,0.5,..."; even for an empty text."""
    if not text:
        return torch.full((n_points,), 1 / n_points)
    with contextlib.suppress(ValueError):
        law = torch.tensor([float(part) for part in text.split(",")])
        if len(law) == n_points and bool((law >= 0).all()) and float(law.sum()):
            return law
    raise ValueError(f"pmat.law wants {n_points} numbers of at least 0, one for each blend")
