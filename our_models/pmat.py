"""PMAT: a personalised multimodal adaptive tokenizer and the generator that speaks its codes.

DESIGN section 5. An item has codes that are the same for everybody and codes of a blend x_i(u) of
its modalities (tokenizer.py) whose weights alpha_m(u, i) depend on user and item (weights.py).
Everything nonlinear happens before the blend, so no item is encoded again for a user.

An item's vector is the sum of its code vectors. With one head for all digits, ranking by
sum_l log p_l equals ranking by <h_u, sum_l E_l[C_u[i, l]]> (DESIGN 5.5), plus beta <h_u, e_i> for
the model with a dense residual; beta = 0 is the pure-ID model. With `temperature` the score is the
cosine of the two over it. An item of the history enters with the codes its user had for it once it
had come: its own context is among the inputs only.

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
from model_parts.base import Batch
from model_parts.chunked import chunked_sum
from model_parts.decoding import token_rows
from model_parts.dropout import Dropout
from model_parts.fusion import blend_weights_of, nearest_grid_point
from model_parts.quantisers import projected_codewords
from model_parts.softmax import keys, queries
from our_models.weights import PersonalWeights, View

# Score of one unit of log(1 + train count), where IDs are equal.
_TIE_BREAK = 1e-4
# Numbers held at once where users meet items: 8 MB, so that they stay in cache.
_PAIR_NUMBERS = {"cpu": 2_000_000, "cuda": 256_000_000}


class PMAT(PersonalWeights):
    """Personalised semantic IDs, decoded exactly."""

    name = "pmat"
    ablations = {
        "even weights": {"pmat.personalised": "none"},
        "item weights": {"pmat.personalised": "item"},
        "user weights": {"pmat.personalised": "user"},
        "random weights": {"pmat.personalised": "random"},
        "weights of another user": {"pmat.personalised": "permuted"},
        "late weights on fixed digits": {"pmat.fusion": "late"},
        "user vector as prefix": {"pmat.personalised": "none", "pmat.prefix": True},
        "no shared digits": {"pmat.shared_digits": 0, "pmat.personal_digits": 32},
        "16 shared digits": {"pmat.shared_digits": 16, "pmat.personal_digits": 16},
        "weights never updated": {"pmat.dynamic": False},
        "no behaviour": {"pmat.with_behaviour": False},
        "no consistency": {"pmat.consistency": 0.0},
        "random code vectors at first": {"pmat.start_from_codewords": False},
        "dense residual": {"pmat.beta": 1.0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "pmat.dropout": (0.2, 0.6),
        "pmat.shared_digits": [8, 16, 32],
        "pmat.personal_digits": [8, 16, 32],
        "pmat.beta": [0.0, 0.25, 0.5, 1.0],
        "pmat.sharpness": (1.0, 16.0, "log"),
        "pmat.temperature": [0.0, 0.04, 0.06, 0.1],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__(config, catalogue)
        own, window = self.own, self.window
        self.tokens = nn.Embedding(self.n_digits * own.codes, own.width)
        self.residual = nn.Embedding(len(self.counts), own.width) if own.beta else None
        # the filter of BSARec looks both ways, so it needs an example for every prefix
        self.examples = "positions" if own.causal else "prefixes"
        self.positions = Positions(window, own.width, from_end=not own.causal)
        self.norm = nn.LayerNorm(own.width, eps=1e-12)
        self.dropout = Dropout(own.dropout)
        self.blocks = nn.ModuleList(
            FrequencyBlock(
                window, own.cutoff, own.filter, own.width, own.heads, own.dropout, own.causal
            )
            for _ in range(own.layers)
        )
        init_weights(self)
        nn.init.normal_(self.tokens.weight, std=self._token_length() / math.sqrt(own.width))
        self.make_attention()
        self.prefix = nn.Linear(self.context_width, own.width, bias=False) if own.prefix else None

    def _token_length(self) -> float:
        # a sum of L code vectors should be as long as one item embedding of the baselines
        return 0.02 * math.sqrt(self.own.width / self.n_digits)

    @torch.no_grad()
    def fit_codes(self, generator: torch.Generator) -> None:
        """Codebooks, codes, and code vectors that start out where their codewords are: items that
        are alike begin alike."""
        super().fit_codes(generator)
        if not self.own.start_from_codewords:
            return
        books = [self.shared_quantiser.codebooks] if self.own.shared_digits else []
        late = self.own.fusion == "late"
        personal = self.quantisers if late else [self.quantiser]
        books += [quantiser.codebooks.flatten(2) for quantiser in personal]
        rows = torch.cat([projected_codewords(book, self.own.width, generator) for book in books])
        self.tokens.weight.copy_(rows * self._token_length())

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
            return torch.stack([self.personal_vectors_in(m, rows) for m in range(len(self.atlas))])
        codes = self.atlas[:, rows]  # [G, S, L]
        return self._sum(codes.flatten(0, 1), self.own.shared_digits).view(*codes.shape[:2], -1)

    def personal_vectors_in(self, m: int, rows: Tensor) -> Tensor:
        """With late weights, the sum over the digits of modality m, [S] -> [S, d]."""
        codes = self.atlas[m, rows]  # [S, L]
        return self._sum(codes, self.own.shared_digits + m * codes.shape[1])

    def _sum(self, codes: Tensor, first_digit: int) -> Tensor:
        if not codes.shape[1]:
            return self.tokens.weight.new_zeros(len(codes), self.own.width)
        tokens = token_rows(codes, self.own.codes) + first_digit * self.own.codes
        return F.embedding_bag(tokens, self.tokens.weight, mode="sum")

    def history_vectors(self, view: View, rows: Tensor) -> Tensor:
        """Items of histories as their users see them, one item of each view, [P, d]."""
        if self.own.fusion == "late":
            weights = self.attention.pairs(view.context, self.traits[rows], self.present[rows])
            personal = (weights[:, :, None] * self.every_personal_vector(rows)).sum(0)
        else:
            personal = self.personal_vectors(self.pair_points(view, rows), rows)
        return self.fixed_vectors(rows) + personal

    # ----------------------------------------------------------------- generator

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """State after each position [B, T, d], and q_u before the first and after each item."""
        contexts = self.contexts(batch)
        seen = batch.items > 0
        view = View(contexts[:, 1:][seen], _owners(batch.users, seen))
        vectors = self.history_vectors(view, batch.items[seen] - 1)
        states = self.generate(vectors, batch)
        if self.prefix is not None:
            states = states + self.prefix(contexts[:, 1:])
        return states, contexts

    def last_states(self, batch: Batch) -> Tensor:
        """h_u, the state after each whole history, [B, d]."""
        return at_last(self.encode(batch)[0], batch.lengths)

    def generate(self, vectors: Tensor, batch: Batch) -> Tensor:
        """The sequence model on vectors [P, d] of all items of the histories: [B, T, d]."""
        B, T = batch.items.shape
        seen = (batch.items > 0)[:, :, None]
        x = vectors.new_zeros(B, T, self.own.width).masked_scatter(seen, vectors)
        x = self.dropout(self.norm(x + self.positions(batch.lengths, T)))
        for block in self.blocks:
            x = block(x, seen.to(x.dtype))
        return x

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Softmax over each target and sampled items, all coded under the same user."""
        states, contexts = self.encode(batch)
        wanted = batch.targets > 0
        view = View(contexts[:, 1:][wanted], _owners(batch.users, wanted))
        states, targets = states[wanted], batch.targets[wanted] - 1
        parts = {"item": self._item_loss(states, view, targets)}
        if self.own.digit_loss:
            parts["digits"] = self.own.digit_loss * self._digit_loss(states, view, targets)
        if self.own.consistency and self.own.personalised.startswith("user"):
            before = View(contexts[:, :-1][wanted], view.users)
            parts["consistency"] = self.own.consistency * self._drift(before, view, targets)
        return parts

    def _item_loss(self, states: Tensor, view: View, targets: Tensor) -> Tensor:
        rows, labels, correction = self._candidates(targets)
        states = queries(states, self.own.temperature)
        split = (states, self.attention.user_side(view.context), view.users, labels)
        numbers = _PAIR_NUMBERS.get(states.device.type, 256_000_000)
        size = max(1, numbers // (len(self.grid) * len(rows)))
        total = chunked_sum(self._chunk_loss, split, (*self._items(rows), correction), size)
        return total / max(len(states), 1)

    def _chunk_loss(
        self, states: Tensor, sides: Tensor, users: Tensor, labels: Tensor, *items: Tensor
    ) -> Tensor:
        *items, correction = items
        scores = self._pair_scores(states, sides, users, *items, learn=True) + correction
        own = -correction[labels][:, None]  # the target is in the sample for certain
        scores = scores.scatter_add(1, labels[:, None], own)
        return F.cross_entropy(scores, labels, reduction="sum")

    def _candidates(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items to tell targets [P] from: rows [S], where each target is [P], correction [S].

        All items when the catalogue is small, else all targets of the batch and a uniform sample.
        Scores are raised by -log of the chance that an item is among them, so that the softmax
        estimates the one over the whole catalogue.
        """
        n_items, n_sampled = len(self.counts), self.own.negatives
        if n_sampled + len(targets) >= n_items:
            everything = torch.arange(n_items, device=targets.device)
            return everything, targets, self.counts.new_zeros(n_items)
        sampled = torch.randint(n_items, (n_sampled,), device=targets.device)
        rows, where = torch.cat([targets, sampled]).unique(return_inverse=True)
        absent = (1 - self.counts[rows] / self.counts.sum()) ** len(targets)
        absent = absent * (1 - 1 / n_items) ** n_sampled
        return rows, where[: len(targets)], -(1 - absent).log()

    def _items(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What scores need to know of items [S]: vectors under all blends (with late weights, in
        each modality), sides, rows."""
        sides = self.attention.item_side(self.traits[rows], self.present[rows])
        vectors = self.fixed_vectors(rows) + self.every_personal_vector(rows)  # [G or M, S, d]
        return keys(vectors, self.own.temperature), sides, rows

    def _scores(self, states: Tensor, view: View, rows: Tensor, learn: bool = False) -> Tensor:
        """[P, S] scores of items `rows`, each in the codes the user sees it with."""
        sides = self.attention.user_side(view.context)
        states = queries(states, self.own.temperature)
        return self._pair_scores(states, sides, view.users, *self._items(rows), learn=learn)

    def _pair_scores(
        self,
        states: Tensor,
        sides: Tensor,
        users: Tensor,
        vectors: Tensor,
        item_sides: Tensor,
        rows: Tensor,
        learn: bool,
    ) -> Tensor:
        """With `learn`, the weights get a gradient: a choice of blend has none, so the score is
        taken to change with alpha_m as it does from one blend of the grid to the next towards m.
        (Codes under m alone in its place would pull all weight to a single modality.)"""
        products = states @ vectors.flatten(0, 1).T  # one product for all blends
        products = products.view(len(states), len(vectors), len(rows))  # [P, G or M, S]
        if self.own.fusion == "late":  # weights add up to 1
            return (blend_weights_of(sides, item_sides).transpose(0, 1) * products).sum(1)
        if self.own.personalised == "random":
            drawn = self.random_weights(users[:, None], rows[None])
            points = nearest_grid_point(drawn, self.grid)
            return products.gather(1, points[:, None])[:, 0]
        weights = blend_weights_of(sides, item_sides)  # [M, P, S]
        points = nearest_grid_point(weights.detach(), self.grid)  # [P, S]
        scores = products.gather(1, points[:, None])[:, 0]
        if not (learn and weights.requires_grad):
            return scores
        products = products.detach()
        slopes = torch.stack([products.gather(1, to[points][:, None])[:, 0] for to in self.towards])
        return scores + self.own.grid * (slopes * (weights - weights.detach())).sum(0)

    def _digit_loss(self, states: Tensor, view: View, targets: Tensor) -> Tensor:
        """Mean over digits of -log softmax(<h_u, E_l>)[code of the target], as in RPG."""
        if self.own.fusion == "late":
            codes = self.common_ids()[targets]
        else:
            codes = self.ids(self.pair_points(view, targets), targets)  # [B, L]
        B, digits = codes.shape
        tokens = self.tokens.weight[: digits * self.own.codes]
        logits = (states @ tokens.T).view(B * digits, self.own.codes)
        return F.cross_entropy(logits, codes.flatten())

    def _drift(self, before: View, now: View, rows: Tensor) -> Tensor:
        """Semantic consistency: KL(alpha of the last step || alpha now), mean over targets."""
        old, new = (
            self.attention.pairs(view.context, self.traits[rows], self.present[rows])
            for view in (before, now)
        )
        return F.kl_div(new.clamp(min=1e-9).log(), old.detach(), reduction="sum") / len(rows)

    def score(self, batch: Batch) -> Tensor:
        """[B, N] exact scores of all items, in blocks of items to bound memory."""
        states, view = self.last_states(batch), self.view(batch)
        rows = torch.arange(len(self.counts), device=states.device)
        numbers = _PAIR_NUMBERS.get(states.device.type, 256_000_000)
        block = max(1, numbers // (len(self.grid) * max(len(states), 1)))
        found = [self._scores(states, view, part) for part in rows.split(block)]
        return torch.cat(found, dim=1) + self.tie_break()

    def tie_break(self) -> Tensor:
        """What orders items that have one ID for a user, by how often train has them: [N], little
        beside the differences between scores of different IDs."""
        return _TIE_BREAK * self.counts.log1p()


def _owners(users: Tensor, where: Tensor) -> Tensor:
    """Users [B] of the True positions of where [B, T], in their order."""
    return users[where.nonzero()[:, 0]]
