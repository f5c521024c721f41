"""A modality made of behaviour: which items occur near each other in train histories.

Positive pointwise mutual information of items within a window, and its leading eigenvectors: what
word2vec factorises (Levy and Goldberg, NIPS 2014). Train interactions only, so it can be a feature
of any model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDS, _SPARE = 8, 16  # of the subspace iteration, and columns beyond those asked for


def cooccurrence(train: Any, n_items: int, window: int = 5) -> Tensor:
    """Sparse symmetric [N, N]: sum over pairs at most `window` steps apart of 1 / distance.

    `train` has `.items` [R] (1..N) and `.offsets` [U + 1]; pairs never cross users.
    """
    items = torch.tensor(train.items, dtype=torch.long) - 1
    lengths = torch.tensor(train.offsets, dtype=torch.long).diff()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    pairs, weights = [], []
    for distance in range(1, window + 1):
        together = owner[distance:] == owner[:-distance]
        pair = torch.stack([items[distance:][together], items[:-distance][together]])
        pair = pair[:, pair[0] != pair[1]]
        pairs += [pair, pair.flip(0)]
        weights.append(torch.full((2 * pair.shape[1],), 1 / distance))
    index, values = torch.cat(pairs, dim=1), torch.cat(weights)
    shape = (n_items, n_items)
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False).coalesce()


@torch.no_grad()
def behaviour_vectors(
    train: Any, n_items: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unit vectors [N, width] of items that occur near others in train, and which those are [N].

    U sqrt|S| of the leading eigenpairs of log(1 + PMI ratio), by subspace iteration.
    """
    counts = cooccurrence(train, n_items)
    totals = torch.sparse.sum(counts, dim=1).to_dense()
    rows, columns = counts.indices()
    ratio = counts.values() * totals.sum() / (totals[rows] * totals[columns])
    matrix = torch.sparse_coo_tensor(
        counts.indices(), ratio.log1p(), counts.shape, is_coalesced=True, check_invariants=False
    )
    kept = min(width, n_items)
    span = torch.randn(n_items, min(kept + _SPARE, n_items), generator=generator)
    for _ in range(_ROUNDS):
        span = torch.linalg.qr(matrix @ span).Q
    values, turn = torch.linalg.eigh(span.T @ (matrix @ span))
    order = values.abs().argsort(descending=True)[:kept]
    vectors = (span @ turn[:, order]) * values[order].abs().sqrt()
    known = totals > 0
    vectors = F.normalize(F.pad(vectors, (0, width - kept)), dim=1) * known[:, None]
    return vectors, known
