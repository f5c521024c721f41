"""Full ranking of held-out items, both masking conventions at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from data_utils import Sequences, Targets, eval_order, history_batch
from metrics import Ranks, tied_rank
from model_parts.base import Batch, Recommender, mask_items
from util import UserError, gather_objects, rank, world_size


class Evaluation(NamedTuple):
    """Ranks of every held-out target, and the lists users would see."""

    masked: Ranks
    unmasked: Ranks
    lists: np.ndarray  # [E, top] items under the protocol's masking, [E, 0] when not asked for

    def under(self, mask_seen: bool) -> Ranks:
        """The ranks of the convention that a run is judged by."""
        return self.masked if mask_seen else self.unmasked


@torch.inference_mode()
def evaluate(
    model: Recommender,
    history: Sequences,
    targets: Targets,
    config: Config,
    device: torch.device,
    top: int = 0,
    note: str = "evaluating",
) -> Evaluation:
    """Rank the targets of all users among the whole catalogue; users are shared by processes.

    Seen items are those of the whole `history`, also where the model only sees its newest part. A
    target is never masked, even when the user has seen it before. Ties rank at the average
    position. Raises UserError when the model produces NaN.
    """
    model.eval()
    slots = _slots(targets)  # [E, G] positions in targets.items, -1 where a user has fewer
    ranks = np.zeros((2, len(targets.items)))
    lists = np.zeros((len(targets.users), top), dtype=np.int32)
    batches = eval_order(history, targets.users, config.train.eval_batch_size)
    mine = batches[rank() :: world_size()]
    hidden = None if rank() == 0 else True
    for rows in tqdm(mine, desc=note, leave=False, disable=hidden, mininterval=0.5):
        users = targets.users[rows]
        batch = Batch(
            *map(torch.from_numpy, history_batch(history, users, config.data.max_history))
        )
        scores = model.score(batch.to(device)).float()
        if bool(torch.isnan(scores).any()):
            raise UserError(
                f"Model {model.name} scored NaN; lower the learning rate and run again."
            )
        seen = torch.from_numpy(history_batch(history, users, 10**9).items).to(device)
        wanted = slots[rows]
        items = np.where(wanted >= 0, targets.items[wanted], 0).astype(np.int64)
        found = rank_targets(scores, torch.from_numpy(items).to(device), seen)
        ranks[:, wanted[wanted >= 0]] = found.cpu().numpy()[:, wanted >= 0]
        if top:
            shown = mask_items(scores, seen) if config.train.mask_seen else scores
            lists[rows] = (shown.topk(top, dim=1).indices + 1).cpu().numpy()
    ranks, lists = _gather(ranks, lists)
    offsets, items = np.asarray(targets.offsets), np.asarray(targets.items, dtype=np.int64)
    masked, unmasked = (Ranks(np.asarray(targets.users), row, offsets, items) for row in ranks)
    return Evaluation(masked, unmasked, lists)


def rank_targets(scores: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
    """[2, B, G] ranks of `targets` [B, G] (0 = none): seen items left out, and all items counted.

    scores [B, N]; seen [B, S] items with repeats and padding. The masked rank is the unmasked one
    less the seen items that beat the target, so the catalogue is compared only once.
    """
    seen = _without_repeats(seen)
    seen_scores = scores.gather(1, (seen - 1).clamp(min=0))  # [B, S]
    ranks = []
    for column in targets.unbind(1):
        own = scores.gather(1, (column - 1).clamp(min=0)[:, None])  # [B, 1]
        higher, equal = (scores > own).sum(1), (scores == own).sum(1) - 1
        counts = (seen > 0) & (seen != column[:, None])
        seen_higher = (counts & (seen_scores > own)).sum(1)
        seen_equal = (counts & (seen_scores == own)).sum(1)
        masked = tied_rank(higher - seen_higher, equal - seen_equal)
        ranks.append(torch.stack([masked, tied_rank(higher, equal)]))
    return torch.stack(ranks, dim=2)


def _without_repeats(items: Tensor) -> Tensor:
    ordered = items.sort(dim=1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, 0)


def _slots(targets: Targets) -> np.ndarray:
    counts = np.diff(targets.offsets)
    column = np.arange(counts.max(initial=1))
    return np.where(column < counts[:, None], targets.offsets[:-1, None] + column, -1)


def _gather(ranks: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = gather_objects((ranks, lists))  # every entry was filled by exactly one process
    return sum(part[0] for part in parts), sum(part[1] for part in parts)
