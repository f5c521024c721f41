"""Time and peak memory of the graphs of the multimodal baselines, on random data.

    python benchmarks/graph_memory.py                # a tenth of MovieLens-25M, a minute or two
    python benchmarks/graph_memory.py --share 1      # 162k users, 62k items, 25M interactions

Builds the bipartite graph, co-occurrence of users and of items, neighbours of items by features and
of users by interests, and multiplies. Exit code 1 when the peak is above --limit_gb.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, number
from model_parts.graphs import (
    SparseGraph,
    co_occurrence,
    interaction_edges,
    nearest,
    propagate,
    row_means,
    symmetric,
)
from util import peak_memory_mb


def random_train(n_users: int, n_items: int, n_interactions: int, seed: int = 0) -> SimpleNamespace:
    """Flat histories: activity and popularity fall off like a power law."""
    rng = np.random.default_rng(seed)
    activity = rng.pareto(1.5, n_users) + 0.2
    lengths = np.maximum(activity / activity.sum() * n_interactions, 1).astype(np.int64)
    popularity = np.arange(1, n_items + 1) ** -0.8
    bounds = np.cumsum(popularity / popularity.sum())
    items = np.searchsorted(bounds, rng.random(lengths.sum())).clip(max=n_items - 1) + 1
    return SimpleNamespace(
        items=items.astype(np.int32), offsets=np.concatenate([[0], np.cumsum(lengths)])
    )


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print how long a step took and the peak so far."""
    start = time.perf_counter()
    yield
    peak = peak_memory_mb(torch.device("cpu")) / 1024
    print(f"{name:<32}{time.perf_counter() - start:8.1f} s   peak {peak:5.2f} GB", flush=True)


@command
@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Build everything once; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_number("--users", 162_000, "users of the whole data")
    parser.add_number("--items", 62_000, "items of the whole data")
    parser.add_number("--interactions", 25_000_000, "interactions of the whole data")
    parser.add_number("--share", 0.1, "share of all three that is used", number(float, 0))
    parser.add_number("--width", 384, "width of the features")
    parser.add_number("--neighbours", 40, "neighbours of a node")
    parser.add_number("--limit_gb", 8.0, "exit code 1 above this peak", number(float, 0))
    asked = parser.parse_args(arguments)
    n_users, n_items, n_interactions = (
        max(1, int(asked.share * n)) for n in (asked.users, asked.items, asked.interactions)
    )
    shape = (n_users, n_items)
    with step("random interactions"):
        train = random_train(*shape, n_interactions)
        edges = interaction_edges(train)
    print(f"{n_users:,} users, {n_items:,} items, {len(edges.rows):,} edges")
    with step("bipartite graphs"):
        graph = SparseGraph().fill(edges, shape)
        normalised = SparseGraph().fill(symmetric(edges, shape), shape)
    with step("co-occurrence of items"):
        co_occurrence(graph, asked.neighbours, by_items=True)
    with step("co-occurrence of users"):
        co_occurrence(graph, asked.neighbours)
    features = torch.randn(n_items, asked.width)
    with step("nearest items"):
        nearest(features, asked.neighbours)
    with step("nearest users by interests"):
        nearest(row_means(graph, features), asked.neighbours)
    with step("propagation, 64-d, one layer"):
        propagate(normalised, torch.randn(n_users, 64), torch.randn(n_items, 64), 1)
    return int(peak_memory_mb(torch.device("cpu")) / 1024 > asked.limit_gb)


if __name__ == "__main__":
    sys.exit(main())
