"""Theorem 5 on a trained PMAT with MCRL: do the three levels pull where the task wants to go?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data_utils import Sequences
from experiments import bounds_learning
from experiments.bounds import Array, Check
from experiments.theory_model import array, together
from experiments.theory_random import unit
from model_parts.base import Batch
from our_models.mcrl import PMATWithMCRL
from our_models.pmat import PMAT

_LEVELS = ("user", "intra", "inter")
_USERS, _BATCHES = 64, 8


def levels(
    joint: PMATWithMCRL, train: Sequences, window: int, rng: np.random.Generator
) -> tuple[list[Check], dict[str, Any]]:
    """Theorem 5: gradients of the three levels and of the task, on the code vectors.

    Also what one step of the same length does to the task's loss, alone and together.
    """
    joint.eval()
    lengths = np.diff(train.offsets)
    users = np.flatnonzero(lengths >= 3)
    mixtures, steps = [], []
    for _ in range(_BATCHES):
        batch = next_items(train, rng.permutation(users)[:_USERS], window)
        task, pulls = gradients(joint, batch)
        mixtures.append(bounds_learning.Mixture(task, pulls))
        steps.append(decreases(joint, batch, mixtures[-1], pulls, task))
    measured = {
        "cosines": np.mean([m.singles for m in mixtures], axis=0).tolist(),
        "deviations": np.std([m.singles for m in mixtures], axis=0, ddof=1).tolist(),
        "levels": list(_LEVELS),
        "best single": float(np.mean([m.best for m in mixtures])),
        "best mixture": float(np.mean([m.together for m in mixtures])),
        "equal mixture": float(np.mean([m.even for m in mixtures])),
        "decrease": {k: float(np.mean([s[k] for s in steps])) for k in steps[0]},
    }
    return [bounds_learning.synergy(mixtures), inter_pull(joint, batch, rng)], measured


def next_items(train: Sequences, users: Array, window: int) -> Batch:
    """Histories without each user's last train item, which is the target."""
    begins, ends = train.offsets[users], train.offsets[users + 1] - 1
    lengths = np.minimum(ends - begins, window)
    items = np.zeros((len(users), lengths.max()), np.int64)
    targets = np.zeros_like(items)
    for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        items[row, :length] = train.items[end - length : end]
        targets[row, length - 1] = train.items[end]
    fields = (users, items, lengths, targets)
    return Batch(*(torch.from_numpy(np.asarray(f, dtype=np.int64)) for f in fields))


def gradients(joint: PMATWithMCRL, batch: Batch) -> tuple[Array, Array]:
    """Of the task and of the three levels on the code vectors, [d] and [3, d]."""
    parts = joint.loss(batch)
    missing = [name for name in ("item", *_LEVELS) if name not in parts]
    if missing:
        raise ValueError(f"theorem 5 is about three levels; switched off: {', '.join(missing)}")

    def slope(name: str) -> Array:
        found = torch.autograd.grad(parts[name], joint.tokens.weight, retain_graph=True)
        return array(found[0]).ravel()

    return slope("item"), np.stack([slope(name) for name in _LEVELS])


def decreases(
    joint: PMATWithMCRL, batch: Batch, mixture: Any, pulls: Array, task: Array, length: float = 0.05
) -> dict[str, float]:
    """How much the task's loss falls when the code vectors move by `length` of their norm."""
    directions = unit(pulls)
    ways = dict(zip(_LEVELS, directions, strict=True))
    ways |= {"all, equal": directions.sum(0), "best mixture": mixture.weights @ directions}
    ways["task"] = task
    weight = joint.tokens.weight
    with torch.no_grad():
        before = task_loss(joint, batch)
        kept, found = weight.clone(), {}
        for name, way in ways.items():
            way = torch.from_numpy(unit(way)).to(weight).view_as(weight)
            weight.copy_(kept - length * kept.norm() * way)
            found[name] = before - task_loss(joint, batch)
        weight.copy_(kept)
    return found


def task_loss(joint: PMATWithMCRL, batch: Batch) -> float:
    """The item loss alone, with the same sampled items in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(PMAT.loss(joint, batch)["item"])


def inter_pull(joint: PMATWithMCRL, batch: Batch, rng: np.random.Generator) -> Check:
    """Level 3 pulls ID representations only along the rows of the shared projections."""
    rows = batch.targets.max(dim=1).values - 1
    vectors = joint.pure_vectors(rows).detach().requires_grad_()
    loss = joint.mcrl.inter_level(vectors, joint.shared, rows)
    pull = array(torch.autograd.grad(loss, vectors)[0])  # [P, M, d]
    ways = rng.standard_normal(pull.shape)
    return together(
        [
            bounds_learning.confined(pull[:, m], array(projection.weight), ways[:, m])
            for m, projection in enumerate(joint.shared)
        ]
    )
