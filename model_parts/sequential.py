"""The part SASRec-like models share: tied item embeddings, positions, item-level softmax."""

from __future__ import annotations

from torch import Tensor, nn

from model_parts.backbone import Positions, at_last
from model_parts.base import Batch, Recommender
from model_parts.dropout import Dropout
from model_parts.softmax import item_cross_entropy, keys, queries


class SequentialRecommender(Recommender):
    """Item embeddings in, blocks in between, products with the same embeddings out: plain ones, or
    with a `temperature` cosines over it."""

    def __init__(
        self,
        n_items: int,
        max_history: int,
        width: int,
        dropout: float,
        temperature: float,
        blocks: nn.ModuleList,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.items = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.positions = Positions(max_history, width, from_end=True)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = Dropout(dropout)
        self.blocks = blocks

    def encode(self, batch: Batch) -> Tensor:
        """[B, T, d], the state after each position."""
        x = self.items(batch.items) + self.positions(batch.lengths, batch.items.shape[1])
        x = self.dropout(self.norm(x))
        present = (batch.items > 0).to(x.dtype)[:, :, None]
        for block in self.blocks:
            x = block(x, present)
        return x

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over all items, mean over the positions that have a target."""
        wanted = batch.targets > 0
        states = queries(self.encode(batch)[wanted], self.temperature)  # [P, d]
        targets = batch.targets[wanted] - 1
        return {"item": item_cross_entropy(states, self._keys(), targets)}

    def score(self, batch: Batch) -> Tensor:
        """[B, N] products of the last state with all item embeddings."""
        last = at_last(self.encode(batch), batch.lengths)  # [B, d]
        return queries(last, self.temperature) @ self._keys().T

    def _keys(self) -> Tensor:
        return keys(self.items.weight[1:], self.temperature)
