"""Latency of one user's request: codes of all items, and the scores over them.

    python benchmarks/serving_latency.py [--items 12101] [--requests 200]

An untrained PMAT with the settings used on real data and random features of Beauty's sizes: the
work does not depend on what weights have learned. A first request computes the user's weights,
personal codes (shared ones are the same for all users) and scores; later ones only scores. Writing
out whole IDs is one more copy. Read the ratio to a dense product of the same catalogue too:
milliseconds depend on the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, number
from config import build_config
from model_parts.base import TrainingData
from our_models.pmat import PMAT
from our_models.serving import Server

HISTORY = 9  # mean length of Beauty


def random_catalogue(n_items: int, n_users: int, seed: int = 0) -> TrainingData:
    """Two modalities of Beauty's widths, and histories that make a third."""
    rng = np.random.default_rng(seed)
    known = np.ones(n_items, dtype=bool)
    features = {
        name: (rng.standard_normal((n_items, width), np.float32), known)
        for name, width in (("text", 384), ("category", 64))
    }
    catalogue = SimpleNamespace(modalities=features, item_ids=np.arange(n_items), n_items=n_items)
    items = rng.integers(1, n_items + 1, n_users * HISTORY).astype(np.int32)
    train = SimpleNamespace(items=items, offsets=np.arange(n_users + 1) * HISTORY)
    return TrainingData(train, catalogue, n_users, n_items)


def milliseconds(request: Callable[[int], object], requests: int) -> np.ndarray:
    """Time of `request(user)` for users 0, 1, ...; the first ten are not counted."""
    found = []
    for user in range(requests + 10):
        start = time.perf_counter()
        request(user)
        found.append(1000 * (time.perf_counter() - start))
    return np.array(found[10:])


@command
def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = Parser(__doc__)
    parser.add_number("--items", 12_101, "items of the catalogue", number(int, 2))
    parser.add_number("--requests", 200, "timed requests of each kind")
    found = parser.parse_args(arguments)
    data = random_catalogue(found.items, 2 * found.requests + 20)
    config = build_config({"run.mode": "baseline", "run.model": "pmat", "data.dataset": "beauty"})
    model = PMAT(config, data.catalogue)
    model.prepare(data, torch.Generator().manual_seed(0))
    server = Server(model, data.train)
    dense = torch.randn(found.items, model.own.width)
    state = torch.randn(model.own.width)

    rows = {
        "codes of all items and scores (first request of a user)": milliseconds(
            server.scores, found.requests
        ),
        "scores in the codes the user has": milliseconds(server.scores, found.requests),
        "whole IDs of all items written out": milliseconds(server.item_ids, found.requests),
        "dense product of the same catalogue": milliseconds(
            lambda _: dense @ state, found.requests
        ),
    }
    print(f"{found.items:,} items, {model.n_digits} digits, {len(model.grid)} blends")
    for label, times in rows.items():
        p50, p95, p99 = np.percentile(times, (50, 95, 99))
        print(f"{label:58s} p50 {p50:6.2f}  p95 {p95:6.2f}  p99 {p99:6.2f} ms")


if __name__ == "__main__":
    sys.exit(main())
