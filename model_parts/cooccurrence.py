"""Which items meet in the histories of users: counts, pairs to train on, and vectors.

Letters: N items, R interactions, P pairs. Items are rows 0..N-1 here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs looked at, at most: 500 MB while they are counted. Beyond that, a sample of the users.
_MOST_PAIRS = 30_000_000
_POWER_ITERATIONS = 4


class Cooccurrence(NamedTuple):
    """Pairs of different items that met, each once, sorted by `first * N + second`."""

    first: Tensor  # [P] int64, smaller than second
    second: Tensor  # [P] int64
    counts: Tensor  # [P] float32, how often they met
    expected: Tensor  # [P] float32, how often they would have if items met by chance
    totals: Tensor  # [N] float32, pairs that each item is in


def count_pairs(train: Any, n_items: int, window: int, generator: torch.Generator) -> Cooccurrence:
    """Pairs of interactions of one user that are at most `window` steps apart.

    `train` has `.items` [R] (1..N) and `.offsets` [U + 1].
    """
    items = torch.tensor(train.items, dtype=torch.long) - 1
    lengths = torch.tensor(train.offsets, dtype=torch.long).diff()
    chosen = _affordable_users(lengths, window, generator)
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    items, owner = items[chosen[owner]], owner[chosen[owner]]
    keys = [torch.zeros(0, dtype=torch.long)]
    for lag in range(1, min(window, int(lengths.max()) - 1 if len(lengths) else 0) + 1):
        left, right = items[:-lag], items[lag:]
        same = (owner[:-lag] == owner[lag:]) & (left != right)
        low, high = torch.minimum(left, right)[same], torch.maximum(left, right)[same]
        keys.append(low * n_items + high)
    met, counts = torch.unique(torch.cat(keys), return_counts=True)
    first, second, counts = met // n_items, met % n_items, counts.float()
    totals = torch.zeros(n_items).index_add_(0, first, counts).index_add_(0, second, counts)
    # an end of a pair is item i with probability totals_i / (2 C), for C pairs in all
    expected = totals[first] * totals[second] / totals.sum().clamp(min=1)
    return Cooccurrence(first, second, counts, expected, totals)


def _affordable_users(lengths: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """[U] bool: everybody, or as many random users as _MOST_PAIRS allows."""
    pairs = lengths * (lengths - 1).clamp(min=0, max=window)
    order = torch.randperm(len(lengths), generator=generator)
    chosen = torch.zeros(len(lengths), dtype=torch.bool)
    chosen[order[pairs[order].cumsum(0) <= _MOST_PAIRS]] = True
    return chosen


# --------------------------------------------------------------------------- pairs


def frequent_partners(
    met: Cooccurrence, interactions: Tensor, k: int, at_least: int = 2
) -> tuple[Tensor, Tensor]:
    """Items and their partners, both [P]: the top k of c_ij / sqrt(c_i c_j) for every item.

    Partners met `at_least` times; fewer where an item has no such partner. `interactions` [N] is c.
    """
    rows = torch.cat([met.first, met.second])
    partners = torch.cat([met.second, met.first])
    counts = met.counts.repeat(2)
    often = counts >= at_least
    has_frequent = torch.zeros(len(interactions), dtype=torch.bool)
    has_frequent[rows[often]] = True
    kept = often | ~has_frequent[rows]
    rows, partners, counts = rows[kept], partners[kept], counts[kept]
    closeness = counts / (interactions[rows] * interactions[partners]).clamp(min=1).sqrt()
    order = closeness.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by item, closest first
    rows, partners = rows[order], partners[order]
    sizes = torch.bincount(rows, minlength=len(interactions))
    place = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]
    return rows[place < k], partners[place < k]


def are_strangers(met: Cooccurrence, one: Tensor, other: Tensor) -> Tensor:
    """Whether items met no more often than by chance (on sparse data: never), [P], [P] -> [P]."""
    n_items = len(met.totals)
    wanted = torch.minimum(one, other) * n_items + torch.maximum(one, other)
    keys = met.first * n_items + met.second
    place = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
    if not len(keys):
        return one != other
    close = (keys[place] == wanted) & (met.counts[place] > met.expected[place])
    return ~close & (one != other)


# --------------------------------------------------------------------------- vectors


def cooccurrence_vectors(met: Cooccurrence, width: int, generator: torch.Generator) -> Tensor:
    """[N, width] vectors whose products approximate positive pointwise mutual information.

    U sqrt(S) of the matrix max(log(c_ij / expected_ij), 0), which is what word2vec factorises
    without saying so (Levy and Goldberg, NeurIPS 2014). Zero for an item that met nobody.
    """
    n_items = len(met.totals)
    information = (met.counts / met.expected).log().clamp(min=0)
    pairs = torch.stack([met.first, met.second])
    matrix = torch.sparse_coo_tensor(
        torch.cat([pairs, pairs.flip(0)], dim=1),
        information.repeat(2),
        (n_items, n_items),
        check_invariants=True,
    ).coalesce()
    rank = min(width, n_items)
    basis = torch.randn(n_items, min(2 * rank, n_items), generator=generator)
    for _ in range(_POWER_ITERATIONS):  # Halko et al. 2011: the range of a power of the matrix
        basis = torch.linalg.qr(matrix @ basis)[0]
    # the matrix is symmetric: its eigenvectors within the basis
    values, axes = torch.linalg.eigh(basis.T @ (matrix @ basis))
    # the matrix has negative ones too, but no vectors have products like these
    strongest = values.argsort(descending=True)[:rank]
    vectors = basis @ axes[:, strongest] * values[strongest].clamp(min=0).sqrt()
    return F.pad(vectors, (0, width - rank))


def behaviour_vectors(
    train: Any, n_items: int, width: int, window: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Collaborative vectors of all items [N, width], and which items have one [N].

    `cooccurrence_vectors` of items at most `window` steps apart, in units of their mean square.
    """
    met = count_pairs(train, n_items, window, generator)
    vectors = cooccurrence_vectors(met, width, generator)
    known = met.totals > 0
    scale = vectors[known].square().mean().sqrt() if bool(known.any()) else torch.tensor(1.0)
    return vectors / scale.clamp(min=1e-12), known
