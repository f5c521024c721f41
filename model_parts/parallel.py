"""What models that predict all digits of an ID at once share: a subclass supplies the codes.

    class MyModel(ParallelRecommender):
        def __init__(self, config, catalogue=None):
            own = config.my_model              # has what `config.ParallelHeads` declares
            super().__init__(config.n_items(catalogue), own, own.digits, config.data.max_history)
        def prepare(self, data, generator):
            self.codes.copy_(codes)            # [N, m]

RPG (arXiv 2506.05781): an item enters as the mean of its m token vectors; GPT-2 blocks; one head a
digit, g_j(s) = s + SiLU(W_j s + b_j) with W_j = 0 at first; cosine logits over temperature against
the tied token rows. To be overridden: `entering`, where items enter in another way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.backbone import Positions, PreNormBlock, at_last, init_weights
from model_parts.base import Batch, Recommender
from model_parts.decoding import digit_cross_entropy, digit_heads, score_all_items, token_rows
from model_parts.residual import colliding_share

_INIT_STD = 0.02


class ParallelRecommender(Recommender):
    """A causal Transformer on IDs of items, m digit heads on top."""

    codes: Tensor  # [N, m] int64, row i-1 is item i

    def __init__(self, n_items: int, own: Any, digits: int, max_history: int) -> None:
        super().__init__()
        self.own, self.digits, self.n_codes = own, digits, own.codes
        # row 0 is padding, code c of digit j is row c + K j + 1, the last row is the paper's EOS
        self.tokens = nn.Embedding(digits * own.codes + 2, own.width, padding_idx=0)
        self.positions = Positions(max_history, own.width, from_end=False)
        self.dropout = nn.Dropout(own.embedding_dropout)
        self.blocks = nn.ModuleList(
            PreNormBlock(own.width, own.heads, own.inner, 0.0, own.attention_dropout)
            for _ in range(own.layers)
        )
        self.norm = nn.LayerNorm(own.width, eps=1e-12)
        self.heads = nn.Linear(own.width, digits * own.width)  # W_1..W_m in one product
        self.register_buffer("codes", torch.zeros(n_items, digits, dtype=torch.int64))
        self._init_weights()

    def _init_weights(self) -> None:
        init_weights(self, _INIT_STD)
        for block in self.blocks:  # GPT-2: residual branches start smaller the deeper the network
            for layer in (block.attention.project_out, block.feed_forward.contract):
                nn.init.normal_(layer.weight, std=_INIT_STD / math.sqrt(2 * self.own.layers))
        nn.init.zeros_(self.heads.weight)
        bound = 1 / math.sqrt(self.own.width)
        nn.init.uniform_(self.heads.bias, -bound, bound)

    # ----------------------------------------------------------------- network

    def entering(self, items: Tensor) -> Tensor:
        """Items [P], 1..N -> what enters for them [P, d], the mean of their token vectors."""
        tokens = token_rows(self.codes[items - 1], self.n_codes) + 1
        return F.embedding_bag(tokens, self.tokens.weight, mode="mean")

    def encode(self, batch: Batch) -> Tensor:
        """[B, T, d], the state after each position."""
        B, T = batch.items.shape
        present = batch.items > 0
        vectors = self.entering(batch.items[present])
        x = vectors.new_zeros(B, T, self.own.width).masked_scatter(present[:, :, None], vectors)
        x = self.dropout(x + self.positions(batch.lengths, T))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def digit_tokens(self) -> Tensor:
        """The token table as unit vectors of each digit, [m, K, d]."""
        rows = self.tokens.weight[1:-1].view(self.digits, self.n_codes, self.own.width)
        return F.normalize(rows.float(), dim=2)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next item's digits, mean over positions and digits (eq. 3)."""
        wanted = batch.targets > 0
        states = self.encode(batch)[wanted]  # [P, d]
        tokens = self.digit_tokens() / self.own.temperature
        codes = self.codes[batch.targets[wanted] - 1]
        head = self.heads
        return {"digits": digit_cross_entropy(states, head.weight, head.bias, tokens, codes)}

    # ----------------------------------------------------------------- items

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Of every code of every digit, for the item after each history: [B, m, K]."""
        last = at_last(self.encode(batch), batch.lengths)
        heads = digit_heads(last, self.heads.weight, self.heads.bias)  # [B, m, d]
        tokens = self.digit_tokens() / self.own.temperature
        logits = torch.bmm(heads.transpose(0, 1), tokens.transpose(1, 2))  # [m, B, K]
        return torch.log_softmax(logits.float(), dim=2).transpose(0, 1)

    def score(self, batch: Batch) -> Tensor:
        """[B, N] mean log-probability of each item's digits, exact."""
        return score_all_items(self.log_probabilities(batch), self.codes)

    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """The codes, [N, m]: the same for every user."""
        return self.codes

    def describe(self) -> dict[str, Any]:
        """Adds the share of items whose ID nobody else has."""
        return super().describe() | {"unique_ids": 1 - colliding_share(self.codes)}
