"""Toy inputs for the graph models, and the stored numbers of official code to compare with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_parts.base import Batch, TrainingData
from model_parts.graphs import SparseGraph

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def reference(name: str) -> dict[str, Tensor]:
    """Arrays of tests/fixtures/<name>.npz; README.md there says where they come from."""
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def toy_data(
    pairs: Any, n_users: int, n_items: int, modalities: dict[str, tuple[Any, Any]]
) -> TrainingData:
    """Train data of (user, item) pairs, items from 0; `modalities` name -> (features, present)."""
    pairs = sorted((int(user), int(item)) for user, item in pairs)
    counts = np.bincount([user for user, _ in pairs], minlength=n_users)
    train = SimpleNamespace(
        items=np.array([item + 1 for _, item in pairs], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
    )
    catalogue = SimpleNamespace(
        modalities={name: (np.asarray(x), np.asarray(p)) for name, (x, p) in modalities.items()},
        item_ids=[str(item) for item in range(n_items)],
    )
    return TrainingData(train, catalogue, n_users, n_items)


def random_toy(
    n_users: int = 20, n_items: int = 15, widths: tuple[int, ...] = (5, 4), seed: int = 0
) -> TrainingData:
    """Users with two to five random items; all features there."""
    rng = np.random.default_rng(seed)
    pairs = [
        (user, item)
        for user in range(n_users)
        for item in rng.choice(n_items, rng.integers(2, 6), replace=False)
    ]
    features = {
        f"m{m}": (rng.normal(size=(n_items, width)).astype(np.float32), np.ones(n_items, bool))
        for m, width in enumerate(widths)
    }
    return toy_data(pairs, n_users, n_items, features)


def prefix_batch(data: TrainingData) -> Batch:
    """All prefixes of all train histories."""
    rows = []
    offsets, items = data.train.offsets, torch.tensor(data.train.items, dtype=torch.long)
    for user in range(data.n_users):
        history = items[offsets[user] : offsets[user + 1]]
        rows += [(user, history[:end], history[end]) for end in range(1, len(history))]
    lengths = torch.tensor([len(history) for _, history, _ in rows])
    shown = nn.utils.rnn.pad_sequence([history for _, history, _ in rows], batch_first=True)
    targets = torch.zeros_like(shown)
    targets[torch.arange(len(rows)), lengths - 1] = torch.stack([target for *_, target in rows])
    return Batch(torch.tensor([user for user, *_ in rows]), shown, lengths, targets)


def load_weights(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Every `weight/<name>` of a reference into the parameter of that name."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in stored.items():
            if key.startswith("weight/"):
                own[key.removeprefix("weight/")].copy_(value)


def assert_same_gradients(model: nn.Module, stored: dict[str, Tensor], atol: float = 1e-5) -> None:
    """Every `gradient/<name>` of a reference is the parameter's gradient."""
    own = dict(model.named_parameters())
    names = [key for key in stored if key.startswith("gradient/")]
    assert names
    for key in names:
        found = own[key.removeprefix("gradient/")].grad
        torch.testing.assert_close(found, stored[key], atol=atol, rtol=1e-4, msg=key)


def dense(graph: SparseGraph) -> Tensor:
    """The graph as a dense matrix."""
    return graph(torch.eye(len(graph.back_offsets) - 1))
