"""PMAT: a personalised multimodal adaptive tokenizer and the generator that speaks its codes.

DESIGN section 5. An item has `shared_digits` codes that are the same for everybody, from all its
modalities together, and `personal_digits` codes of a blend x_i(u) of its modalities whose weights
alpha_m(u, i) depend on user and item. Everything nonlinear happens before the blend; codes are an
argmax over blended tables (quantisers.BlendQuantiser), so no item is encoded again for a user.
Weights are resolved to a grid of G blends: codes of all items under all blends are one static atlas
[G, N, L], and decoding from it is exact.

An item's vector is the sum of its code vectors. With one head for all digits, ranking by
sum_l log p_l equals ranking by <h_u, sum_l E_l[C_u[i, l]]> (DESIGN 5.5), plus beta <h_u, e_i> for
the model with a dense residual; beta = 0 is the pure-ID model.

Loss: softmax over items, every candidate coded under the same user (DESIGN 5.6), so that making
codes easy helps the negatives as much as the target. The context q_u that weights depend on is made
of the history before the target only, so codes can not tell it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.backbone import FrequencyBlock, Positions, at_last, init_weights
from model_parts.base import Batch, Recommender, TrainingData
from model_parts.decoding import token_rows
from model_parts.fusion import (
    ModalityAttention,
    coherence,
    nearest_grid_point,
    random_grid_points,
    simplex_grid,
)
from model_parts.quantisers import BlendQuantiser, ProductQuantiser, whitened_pca

# Contexts of other users that the control with permuted users looks through.
_STRANGERS = 1024
# Users and items scored at once, to bound memory.
_SCORED_NUMBERS = 4_000_000


class View(NamedTuple):
    """Through whose eyes items are coded."""

    context: Tensor  # [B, c]
    users: Tensor  # [B]


class PMAT(Recommender):
    """Personalised semantic IDs, decoded exactly."""

    name = "pmat"
    examples = "prefixes"
    ablations = {
        "even weights": {"pmat.personalised": "none"},
        "item weights": {"pmat.personalised": "item"},
        "user weights": {"pmat.personalised": "user"},
        "random weights": {"pmat.personalised": "random"},
        "weights of another user": {"pmat.personalised": "permuted"},
        "late weights on fixed digits": {"pmat.fusion": "late"},
        "user vector as prefix": {"pmat.personalised": "none", "pmat.prefix": True},
        "no shared digits": {"pmat.shared_digits": 0, "pmat.personal_digits": 32},
        "weights never updated": {"pmat.dynamic": False},
        "no consistency": {"pmat.consistency": 0.0},
        "dense residual": {"pmat.beta": 1.0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "pmat.dropout": (0.2, 0.6),
        "pmat.shared_digits": [8, 16, 24],
        "pmat.personal_digits": [8, 16, 32],
        "pmat.beta": [0.0, 0.25, 0.5, 1.0],
    }

    counts: Tensor  # [N] train interactions
    latents: Tensor  # [N, M, z] unit rows, zero where missing
    present: Tensor  # [N, M] bool
    shared_codes: Tensor  # [N, L_s]
    atlas: Tensor  # [G, N, L_f]
    strangers: Tensor  # [1024, summary], histories of random users

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__()
        own, window = config.pmat, config.data.max_history
        self.own = own
        self.n_codes = own.codes
        n_items, n_modalities = config.n_items(catalogue), config.n_modalities(catalogue)
        grid = simplex_grid(n_modalities, own.grid)
        summary = n_modalities * (own.latent + 1) + 1
        self.register_buffer("grid", grid)
        self.register_buffer("corners", grid.argmax(0))  # [M] blends of one modality alone
        self.register_buffer("law", _law(own.law, len(grid)))
        self.register_buffer("counts", torch.ones(n_items))
        self.register_buffer("latents", torch.zeros(n_items, n_modalities, own.latent))
        self.register_buffer("present", torch.ones(n_items, n_modalities, dtype=torch.bool))
        self.register_buffer("shared_codes", torch.zeros(n_items, own.shared_digits).long())
        self.register_buffer("atlas", torch.zeros(len(grid), n_items, own.personal_digits).long())
        self.register_buffer("strangers", torch.zeros(_STRANGERS, summary))
        self.quantiser = BlendQuantiser(n_modalities, own.latent, own.personal_digits, own.codes)
        # with late weights a modality's digits are words of its own
        meanings = n_modalities if own.fusion == "late" else 1
        digits = own.shared_digits + meanings * own.personal_digits
        self.tokens = nn.Embedding(digits * own.codes, own.width)
        self.residual = nn.Embedding(n_items, own.width) if own.beta else None
        self.positions = Positions(window, own.width, from_end=True)
        self.norm = nn.LayerNorm(own.width, eps=1e-12)
        self.dropout = nn.Dropout(own.dropout)
        self.blocks = nn.ModuleList(
            FrequencyBlock(window, own.cutoff, own.filter, own.width, own.heads, own.dropout)
            for _ in range(own.layers)
        )
        init_weights(self)
        # a sum of L code vectors should be as long as one item embedding of the baselines
        nn.init.normal_(
            self.tokens.weight, std=0.02 / math.sqrt(own.shared_digits + own.personal_digits)
        )
        level = "user_item" if own.personalised == "permuted" else own.personalised
        self.attention = ModalityAttention(
            own.context + n_modalities, own.latent, n_modalities, own.attention, level
        )
        self.attention.start_from_coherence(own.sharpness)
        learns = level.startswith("user") or own.prefix
        self.context_width = own.context + n_modalities if learns else 1
        self.context = nn.Sequential(nn.Linear(summary, own.context), nn.GELU()) if learns else None
        self.prefix = nn.Linear(self.context_width, own.width, bias=False) if own.prefix else None

    # ----------------------------------------------------------------- tokenizer

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Latents of every modality, shared codes, and the atlas of personal codes.

        Fitted on items that occur in train; all items are encoded. Raises ValueError without
        features.
        """
        items = torch.tensor(data.train.items, dtype=torch.long)
        self.counts.copy_(torch.bincount(items, minlength=data.n_items + 1)[1:])
        latents, present = whitened_latents(
            data.catalogue, self.counts > 0, self.own.latent, generator
        )
        self.latents.copy_(latents)
        self.present.copy_(present)
        self.fit_codes(generator)
        self._meet_strangers(data, generator)

    def fit_codes(self, generator: torch.Generator) -> None:
        """Codebooks and codes of the latents as they are."""
        in_train = self.counts > 0
        if self.own.shared_digits:
            together = self.latents.flatten(1)
            together = whitened_pca(together, in_train, together.shape[1])
            width = together.shape[1] - together.shape[1] % self.own.shared_digits
            quantiser = ProductQuantiser(width, self.own.shared_digits, self.own.codes)
            quantiser.fit(together[in_train][:, :width], generator)
            self.shared_codes.copy_(quantiser.encode(together[:, :width]))
        fitted = self.latents[in_train]
        points = torch.randint(len(self.grid), (4, len(fitted)), generator=generator)
        blends = (self.grid[points][..., None] * fitted).flatten(0, 1)  # [4 N, M, z]
        blends = blends[blends.flatten(1).norm(dim=1) > 0]  # all weight on a missing modality
        self.quantiser.fit(blends, generator)
        self.atlas.copy_(self.quantiser.atlas(self.latents, self.grid))

    def _meet_strangers(self, data: TrainingData, generator: torch.Generator) -> None:
        # histories of random users, at random moments
        offsets = torch.tensor(data.train.offsets)
        items = torch.tensor(data.train.items, dtype=torch.long)
        active = torch.nonzero(offsets.diff() > 0)[:, 0]
        for row, user in enumerate(
            active[torch.randint(len(active), (_STRANGERS,), generator=generator)].tolist()
        ):
            history = items[offsets[user] : offsets[user + 1]]
            end = int(torch.randint(1, len(history) + 1, (), generator=generator))
            self.strangers[row] = self.summaries(history[None, :end])[0, -1]

    # ----------------------------------------------------------------- weights

    def summaries(self, items: Tensor) -> Tensor:
        """What the history up to each position looks like in each modality, [B, T, M (z + 1) + 1].

        Running mean of the unit latents, the log of the number of items, and how coherent the items
        are in each modality: their mean pairwise cosine, 1 when all agree and 0 when they do not,
        which tells how much the modality matters to this user.
        """
        seen = items > 0
        rows = (items - 1).clamp(min=0)
        known = self.present[rows] & seen[:, :, None]  # [B, T, M]
        sums = (self.latents[rows] * known[..., None]).cumsum(1)
        counts = known.cumsum(1)
        means = sums / counts.clamp(min=1)[..., None]
        length = seen.cumsum(1).float().log1p()[..., None]
        return torch.cat([means.flatten(2), length, coherence(sums, counts)], dim=2)

    def contexts(self, batch: Batch) -> Tensor:
        """q_u before the first item and after each one, [B, T + 1, c]."""
        B, T = batch.items.shape
        if self.context is None:
            return self.tokens.weight.new_zeros(B, T + 1, 1)
        summaries = self.summaries(batch.items)
        if self.own.personalised == "permuted":
            summaries = self.strangers[batch.users % _STRANGERS][:, None].expand(-1, T, -1)
        elif not self.own.dynamic:  # what the first items said holds for ever
            summaries = summaries[:, torch.arange(T).clamp(max=self.own.warm_items - 1)]
        summaries = F.pad(summaries, (0, 0, 1, 0))
        return torch.cat([self.context(summaries), summaries[..., -len(self.corners) :]], dim=2)

    def pair_points(self, view: View, rows: Tensor) -> Tensor:
        """Blend under which each of P users sees one item, [P]."""
        if self.own.personalised == "random":
            return random_grid_points(view.users, rows, self.law)
        weights = self.attention.pairs(view.context, self.latents[rows], self.present[rows])
        return nearest_grid_point(weights, self.grid)

    def modality_weights(self, view: View, rows: Tensor) -> Tensor:
        """alpha of each of B users for each of S items, [M, B, S]."""
        if self.own.personalised == "random":
            points = random_grid_points(view.users[:, None], rows[None], self.law)
            return self.grid[points].permute(2, 0, 1)
        return self.attention(view.context, self.latents[rows], self.present[rows])

    # ----------------------------------------------------------------- vectors

    def fixed_vectors(self, rows: Tensor) -> Tensor:
        """The part of an item's vector that is the same for everybody: [P] -> [P, d]."""
        vectors = self._sum(self.shared_codes[rows], 0)
        return vectors if self.residual is None else vectors + self.own.beta * self.residual(rows)

    def personal_vectors(self, points: Tensor, rows: Tensor) -> Tensor:
        """Sum of the personal code vectors of items under blends, both [P] -> [P, d]."""
        return self._sum(self.atlas[points, rows], self.own.shared_digits)

    def every_personal_vector(self, rows: Tensor) -> Tensor:
        """The same under all blends, [G, S, d]; with late weights, in each modality, [M, S, d]."""
        if self.own.fusion == "late":
            own = self.own
            firsts = own.shared_digits + own.personal_digits * torch.arange(len(self.corners))
            codes = self.atlas[self.corners][:, rows]
            return torch.stack([self._sum(c, int(f)) for c, f in zip(codes, firsts, strict=True)])
        codes = self.atlas[:, rows]  # [G, S, L]
        return self._sum(codes.flatten(0, 1), self.own.shared_digits).view(*codes.shape[:2], -1)

    def _sum(self, codes: Tensor, first_digit: int) -> Tensor:
        if not codes.shape[1]:
            return self.tokens.weight.new_zeros(len(codes), self.own.width)
        tokens = token_rows(codes, self.own.codes) + first_digit * self.own.codes
        return F.embedding_bag(tokens, self.tokens.weight, mode="sum")

    def history_vectors(self, view: View, rows: Tensor) -> Tensor:
        """Items of histories as their users see them now, [P, d]."""
        if self.own.fusion == "late":
            weights = self.attention.pairs(view.context, self.latents[rows], self.present[rows])
            personal = (weights[:, :, None] * self.every_personal_vector(rows)).sum(0)
        else:
            personal = self.personal_vectors(self.pair_points(view, rows), rows)
        return self.fixed_vectors(rows) + personal

    # ----------------------------------------------------------------- generator

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """State after each history [B, d] and q_u at every step, [B, T + 1, c]."""
        B, T = batch.items.shape
        contexts = self.contexts(batch)
        seen = batch.items > 0
        rows = batch.items[seen] - 1
        owner = seen.nonzero()[:, 0]  # [P]
        # history and candidates speak the same codes: those the user has now
        context = _at(contexts, batch.lengths)[owner]
        vectors = self.history_vectors(View(context, batch.users[owner]), rows)
        x = vectors.new_zeros(B, T, self.own.width)
        x = x.masked_scatter(seen[:, :, None], vectors)
        x = self.dropout(self.norm(x + self.positions(batch.lengths, T)))
        for block in self.blocks:
            x = block(x, seen[:, :, None].to(x.dtype))
        state = at_last(x, batch.lengths)
        if self.prefix is not None:
            state = state + self.prefix(_at(contexts, batch.lengths))
        return state, contexts

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Softmax over the target and sampled items, all coded under the same user."""
        states, contexts = self.encode(batch)
        view = View(_at(contexts, batch.lengths), batch.users)
        targets = batch.targets.max(dim=1).values - 1  # [B], a prefix has one target
        rows, labels, correction = self._candidates(targets)
        scores = self._scores(states, view, rows, learn=True) + correction
        parts = {"item": F.cross_entropy(scores, labels)}
        if self.own.digit_loss:
            parts["digits"] = self.own.digit_loss * self._digit_loss(states, view, targets)
        if self.own.consistency and self.own.personalised.startswith("user"):
            before = View(_at(contexts, (batch.lengths - 1).clamp(min=0)), batch.users)
            parts["consistency"] = self.own.consistency * self._drift(before, view, targets)
        return parts

    def _candidates(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items to tell the target from: rows [S], where each target is [B], correction [B, S].

        All items when the catalogue is small, else the targets of the batch and a uniform sample.
        Scores of sampled items are raised by -log of how often they are expected in the sample, so
        that the softmax estimates the one over the whole catalogue.
        """
        n_items, n_sampled = len(self.counts), self.own.negatives
        if n_sampled + len(targets) >= n_items:
            everything = torch.arange(n_items, device=targets.device)
            return everything, targets, self.counts.new_zeros(1, 1)
        labels = torch.arange(len(targets), device=targets.device)
        sampled = torch.randint(n_items, (n_sampled,), device=targets.device)
        rows = torch.cat([targets, sampled])
        expected = len(targets) * self.counts[rows] / self.counts.sum() + n_sampled / n_items
        correction = -expected.log().expand(len(targets), -1).clone()
        correction.masked_fill_(rows[None] == targets[:, None], float("-inf"))  # no second copy
        correction[labels, labels] = 0.0
        return rows, labels, correction

    def _scores(self, states: Tensor, view: View, rows: Tensor, learn: bool = False) -> Tensor:
        """[B, S] scores of items `rows`, each in the codes the user sees it with.

        With `learn`, the weights get a gradient: a choice of blend has none, so the score is taken
        to change with alpha_m as much as the item's codes under modality m alone score higher.
        """
        fixed = states @ self.fixed_vectors(rows).T
        weights = self.modality_weights(view, rows)  # [M, B, S]
        every = states @ self.every_personal_vector(rows).transpose(1, 2)  # [G or M, B, S]
        if self.own.fusion == "late":
            return fixed + (weights * every).sum(0)
        points = nearest_grid_point(weights.detach(), self.grid)  # [B, S]
        scores = fixed + every.gather(0, points[None])[0]
        if not (learn and weights.requires_grad):
            return scores
        pure = every.detach()[self.corners]  # [M, B, S], each modality alone
        return scores + (pure * (weights - weights.detach())).sum(0)

    def _digit_loss(self, states: Tensor, view: View, targets: Tensor) -> Tensor:
        """Mean over digits of -log softmax(<h_u, E_l>)[code of the target], as in RPG."""
        codes = self.ids(self.pair_points(view, targets), targets)  # [B, L]
        B, digits = codes.shape
        tokens = self.tokens.weight[: digits * self.own.codes]
        logits = (states @ tokens.T).view(B * digits, self.own.codes)
        return F.cross_entropy(logits, codes.flatten())

    def _drift(self, before: View, now: View, rows: Tensor) -> Tensor:
        """Semantic consistency: KL(alpha of the last step || alpha now), mean over targets."""
        old, new = (
            self.attention.pairs(view.context, self.latents[rows], self.present[rows])
            for view in (before, now)
        )
        return F.kl_div(new.clamp(min=1e-9).log(), old.detach(), reduction="sum") / len(rows)

    def score(self, batch: Batch) -> Tensor:
        """[B, N] exact scores of all items, in blocks of items to bound memory."""
        states, contexts = self.encode(batch)
        view = View(_at(contexts, batch.lengths), batch.users)
        rows = torch.arange(len(self.counts), device=states.device)
        block = max(1, _SCORED_NUMBERS // max(len(states), 1))
        return torch.cat([self._scores(states, view, part) for part in rows.split(block)], dim=1)

    # ----------------------------------------------------------------- IDs

    def view(self, batch: Batch) -> View:
        """How the users of a batch see items after their whole histories."""
        return View(_at(self.contexts(batch), batch.lengths), batch.users)

    @torch.no_grad()
    def modality_weights_of(self, batch: Batch) -> Tensor | None:
        """alpha of each user, mean over items, [B, M]; missing modalities count 0."""
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return self.modality_weights(self.view(batch), rows).mean(2).T

    def ids(self, points: Tensor, rows: Tensor) -> Tensor:
        """Codes of items under blends, both [P] -> [P, L]."""
        return torch.cat([self.shared_codes[rows], self.atlas[points, rows]], dim=1)

    @torch.no_grad()
    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """Codes as each user sees them now, [B, N, L]; under even weights without users, [N, L]."""
        rows = torch.arange(len(self.counts), device=self.counts.device)
        if batch is None:
            return self.ids(torch.zeros_like(rows), rows)
        points = nearest_grid_point(self.modality_weights(self.view(batch), rows), self.grid)
        return torch.stack([self.ids(p, rows) for p in points])

    def describe(self) -> dict[str, Any]:
        """Adds the number of blends and the digits of an ID."""
        digits = self.own.shared_digits + self.own.personal_digits
        return super().describe() | {"blends": len(self.grid), "digits": digits}


# --------------------------------------------------------------------------- helpers


def whitened_latents(
    catalogue: Any, in_train: Tensor, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unit latents of each modality [N, M, width], zero where missing, and presence [N, M].

    Raises ValueError for a catalogue without features.
    """
    modalities = list((getattr(catalogue, "modalities", None) or {}).values())
    if not modalities:
        raise ValueError("PMAT needs item features (text.npy, visual.npy, ...) to make IDs of.")
    latents, present = [], []
    for features, known in modalities:
        known = torch.tensor(known, dtype=torch.bool)
        features = torch.tensor(features, dtype=torch.float32)
        white = whitened_pca(features, in_train & known, width)
        white = F.pad(white, (0, width - white.shape[1]))
        # a random rotation spreads the principal components evenly over sub-vectors
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        latents.append(F.normalize(white @ rotation, dim=1) * known[:, None])
        present.append(known)
    return torch.stack(latents, dim=1), torch.stack(present, dim=1)


def _law(text: str, n_points: int) -> Tensor:
    """Probabilities of the grid points from "0.2,0.5,..."; even for an empty text."""
    if not text:
        return torch.full((n_points,), 1 / n_points)
    law = torch.tensor([float(part) for part in text.split(",")])
    if len(law) != n_points or bool((law < 0).any()) or not float(law.sum()):
        raise ValueError(f"pmat.law wants {n_points} numbers of at least 0, one for each blend")
    return law


def _at(steps: Tensor, index: Tensor) -> Tensor:
    """[B, T, c] and [B] -> [B, c]."""
    return steps[torch.arange(len(steps), device=steps.device), index]
