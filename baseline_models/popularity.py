"""Popularity: the floor every model has to beat. Counts of the train interactions only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from config import Config
from model_parts.base import Batch, Recommender, TrainingData


class Popularity(Recommender):
    """Ranks all items by how often they occur in train; the same list for everybody."""

    name = "popularity"

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(config.n_items(catalogue)))

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Count train interactions of each item."""
        self.counts.copy_(data.counts)

    def score(self, batch: Batch) -> Tensor:
        """[B, N], every row the counts."""
        return self.counts.expand(len(batch.users), -1).clone()
