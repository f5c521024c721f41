"""The contract every model keeps and the loop relies on (nothing here knows a particular model).

A model is built as `Model(config, catalogue)`, where `config.n_items(catalogue)` is N; without a
catalogue, `Model(config)` has the sizes of the mock data.

Letters used for shapes throughout the project:
B batch, T positions of a padded history, N items, M modalities, L digits of a semantic ID,
K codes per digit, d width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """What a model sees of B users. Histories are left-aligned: padding (0) comes at the end."""

    users: Tensor  # [B] int64, row of the user
    items: Tensor  # [B, T] int64, history, oldest first; items are 1..N, 0 is padding
    lengths: Tensor  # [B] int64, items in each history (0 for a user without one)
    targets: Tensor  # [B, T] int64, the item that follows each position, 0 = no loss there

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(field.to(device, non_blocking=True) for field in self))


class TrainingData(NamedTuple):
    """All that a model may look at before and during training: no held-out target is in here.

    `train` has `.items` ([R] int32, 1..N), `.offsets` ([U+1] int64) and `.timestamps` ([R] int64);
    `catalogue` has `.modalities`, a dict name -> (features [N, d_m] float32, present [N] bool),
    `.titles` and `.item_ids`. Row i-1 of a feature matrix belongs to item i.
    """

    train: Any
    catalogue: Any
    n_users: int
    n_items: int

    @property
    def counts(self) -> Tensor:
        """Train interactions of every item, [N] int64."""
        items = torch.tensor(self.train.items, dtype=torch.int64)
        return torch.bincount(items, minlength=self.n_items + 1)[1:]


class Recommender(nn.Module):
    """A model of the project: `loss` trains it, `score` ranks the catalogue.

    Class attributes declare what the loop and the modes may do with it:
    `examples` says how train histories become examples: `positions` (one example a user, a loss
    at every position) or `prefixes` (one example for every position, a loss at its end);
    `bucketed` whether histories of similar length share a batch (a model that does not read
    histories wants random partners instead);
    `ablations` maps a label to config overrides; `search_space` maps a config key to
    `(low, high)` or `(low, high, "log")` or a list of choices.
    """

    name: ClassVar[str] = ""
    examples: ClassVar[Literal["positions", "prefixes"]] = "positions"
    bucketed: ClassVar[bool] = True
    ablations: ClassVar[dict[str, dict[str, Any]]] = {}
    search_space: ClassVar[dict[str, Any]] = {}
    n_codes: int = 0  # codes per digit of `item_ids`; 0 for a model without semantic IDs

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Stage one, before the first epoch: tokenizer, graphs, statistics. Nothing by default.

        Results must live in buffers, so that a checkpoint restores them and `prepare` need not
        run again on resume.
        """

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Called before each epoch (resampled graphs, annealing). Nothing by default."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains: `params`, and `rate`, their share of the learning rate."""
        return self.slowed([], 1.0)

    def slowed(self, parts: list[nn.Module], rate: float) -> list[dict[str, Any]]:
        """`parameter_groups` of a model whose `parts` learn at `rate`, a share of the full rate."""
        slow = [p for part in parts for p in part.parameters() if p.requires_grad]
        known = {id(p) for p in slow}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": others, "rate": 1.0}]
        return [*groups, {"params": slow, "rate": rate}] if slow else groups

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar parts, already weighted: their sum is minimised. Means over targets."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def score(self, batch: Batch) -> Tensor:
        """[B, N] scores of all items for each history, higher is better; column j is item j+1."""
        raise NotImplementedError(f"{type(self).__name__} has no score")

    @torch.no_grad()
    def recommend(self, batch: Batch, k: int, mask_seen: bool = True) -> Tensor:
        """[B, k] item numbers (1..N), best first; with `mask_seen` items of the history, as far as
        the batch has it, come after all others.

        Raises ValueError when k is below 0 or larger than the catalogue.
        """
        scores = self.score(batch)
        if not 0 <= k <= scores.shape[1]:
            raise ValueError(f"asked for {k} items of a catalogue of {scores.shape[1]}")
        if mask_seen:
            scores = mask_items(scores, batch.items)
        return scores.topk(k, dim=1).indices + 1

    def item_ids(self, batch: Batch | None = None) -> Tensor | None:
        """Semantic IDs: [N, L], or [B, N, L] where they depend on the user; None without IDs."""
        return None

    def modality_weights_of(self, batch: Batch) -> Tensor | None:
        """How much each modality counts for each user: [B, M], rows sum to 1, mean over items.

        M in the order of the catalogue. None for a model that does not weigh modalities by user.
        """
        return None

    def with_interactions(self, interactions: Any) -> Recommender | None:
        """The same weights with a user-item graph of these interactions, for scoring only.

        `interactions` has the fields of `TrainingData.train` and the same users. None for a model
        that reads histories, which needs no graph to hear of a new item; this one is not changed.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Facts worth keeping beside the metrics; a model adds its own."""
        return {"parameters": count_parameters(self)}


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers, shared tensors counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def mask_items(scores: Tensor, items: Tensor) -> Tensor:
    """Copy of `scores` [B, N] with `items` [B, T] (0 = none) at minus infinity."""
    padded = torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1)  # column 0 takes padding
    return padded.scatter(1, items, float("-inf"))[:, 1:]
