"""Time of a SASRec-CE epoch: bucketed batches and fused softmax against the plain form.

    python benchmarks/epoch_time.py [--dataset PATH] [--steps 12]

Plain: every history padded to `max_history` and one [positions, items] softmax with autograd. It is
timed twice: over all positions, as most implementations write it, and with the padding taken out
before the softmax. The three run in turn on the same weights and the same users, without dropout,
so that their losses must agree. Read the ratios; seconds depend on the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baseline_models import SASRec
from benchmarks.command import Parser, command
from config import build_config
from data_utils import Sequences, bucketed_order, train_batch, train_examples
from experiments.runs import load_task
from model_parts.base import Batch
from util import UserError


def beauty_sized(seed: int = 0) -> tuple[Sequences, int]:
    """Random train histories with the sizes of Amazon Beauty: 22,363 users, 12,101 items."""
    rng = np.random.default_rng(seed)
    lengths = 3 + np.minimum(rng.geometric(1 / 4.9, 22_363) - 1, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(1, 12_102, offsets[-1]).astype(np.int32)
    return Sequences(items, offsets, np.arange(len(items))), 12_101


def plain_loss(model: SASRec, batch: Batch, width: int, drop_padding: bool) -> Tensor:
    """The loss as usually written: pad to the full window, softmax with autograd."""
    pad = (0, width - batch.items.shape[1])
    padded = batch._replace(items=F.pad(batch.items, pad), targets=F.pad(batch.targets, pad))
    states, targets = model.encode(padded).flatten(0, 1), padded.targets.flatten() - 1
    if drop_padding:
        states, targets = states[targets >= 0], targets[targets >= 0]
    logits = states @ model.items.weight[1:].T
    return F.cross_entropy(logits, targets, ignore_index=-1)


def timed(step: Callable[[], Tensor], model: SASRec) -> tuple[float, float]:
    """Seconds and loss of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = step()
    loss.backward()
    return time.perf_counter() - start, loss.item()


@command
def main(arguments: list[str] | None = None) -> None:
    """Print seconds per epoch of each form, ratios and the largest difference in loss."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", help="a data folder; random data of Beauty's size without it")
    parser.add_number("--steps", 12, "timed steps of each form")
    parser.add_number("--batch_size", 128, "users of a step")
    asked = parser.parse_args(arguments)
    given = {"sasrec.dropout": 0.0, "data.features": "none"}
    where = {"data.dataset": asked.dataset} if asked.dataset else {}
    config = build_config(given | where, model="sasrec")
    if asked.dataset:
        task = load_task(config)
        train, n_items = task.split.train, task.dataset.catalogue.n_items
    else:
        train, n_items = beauty_sized()
    config.mock.n_items = n_items
    torch.manual_seed(0)
    model = SASRec(config)
    width = config.data.max_history
    examples = train_examples(train, "positions", width)
    order = bucketed_order(examples.lengths, asked.batch_size, np.random.default_rng(0))
    if len(order) < 2:
        raise UserError(
            f"--batch_size {asked.batch_size}: all {len(examples.users):,} users are in one batch, "
            "and the first is not timed; take a smaller one."
        )
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "plain, no padding": []}
    worst = 0.0
    for number, index in enumerate(order[: asked.steps + 1]):
        batch = Batch(*map(torch.from_numpy, train_batch(train, examples, index)))
        forms = {
            "ours": lambda b=batch: model.loss(b)["item"],
            "plain": lambda b=batch: plain_loss(model, b, width, drop_padding=False),
            "plain, no padding": lambda b=batch: plain_loss(model, b, width, drop_padding=True),
        }
        found = {name: timed(step, model) for name, step in forms.items()}
        losses = [loss for _, loss in found.values()]
        worst = max(worst, max(losses) - min(losses))
        if number:  # the first step warms up
            for name, (spent, _) in found.items():
                seconds[name].append(spent)
    print(f"{len(examples.users):,} users, {n_items:,} items, {len(order)} steps an epoch, d=64")
    for name, spent in seconds.items():
        ratio = sum(spent) / sum(seconds["ours"])
        print(f"{name:<20}{np.mean(spent) * len(order):8.1f} s an epoch   {ratio:5.1f} x ours")
    print(f"largest difference in loss: {worst:.1e}")


if __name__ == "__main__":
    sys.exit(main())
