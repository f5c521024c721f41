"""What an epoch of each model costs, as a ratio to the first one named, from a few steps of each.

    python benchmarks/epoch_cost.py --dataset ../shared/data/beauty --model sasrec,bsarec,pmat,rpg
    python benchmarks/epoch_cost.py --dataset ../shared/data/beauty --model tiger --plain

With `--plain` every model is timed three times: with PyTorch's own dropout and RMSNorm in float32,
which the ratio then refers to, with this project's (`model_parts/dropout.py`, `rms_norm.py`), which
differ on a CPU only, and with these and mixed precision, which a CPU without bf16 does not have.

Every model has its preset (`--set` changes all of them): batch size and examples differ, so an
epoch is what the model needs to see all train data once. Stage one is printed beside, not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, read_settings
from config import Config, build_config
from data_utils import bucketed_order
from experiments.runs import Task, load_task, model_class, stage_one
from experiments.training import Trainer
from model_parts import dropout
from model_parts.base import Recommender
from model_parts.rms_norm import RMSNorm
from util import UserError, pick_device, seed_everything


class Cost(NamedTuple):
    """Seconds of stage one and of a step, and steps of an epoch."""

    prepare: float
    step: float
    steps: int

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.step * self.steps


def prepared(config: Config, task: Task, device: torch.device) -> tuple[Recommender, float]:
    """A model after stage one, and the seconds that took.

    Raises UserError for data the model cannot work with.
    """
    seed_everything(config.run.seed)
    try:
        model = model_class(config.run.model)(config, task.dataset.catalogue).to(device)
    except ValueError as error:
        raise UserError(f"{config.run.model}: {error}") from error
    start = time.perf_counter()
    stage_one(model, task, config)
    return model, time.perf_counter() - start


class Way(NamedTuple):
    """How steps are computed: the dropout, the norm, and the type of mixed precision."""

    drop: Callable[[Tensor, float], Tensor]
    norm: Callable[[nn.RMSNorm, Tensor], Tensor]
    autocast: torch.dtype | None


def cost(config: Config, task: Task, steps: int, plain: bool = False) -> dict[str, Cost]:
    """Prepare a model and time `steps` updates after one that is not counted, by label.

    With `plain` the three ways take every batch in turn, so that all meet the same machine.
    Raises UserError for a model that does not learn, or has all its data in one batch.
    """
    device = pick_device(config.run.device)
    model, prepare = prepared(config, task, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, task.split.train, config, Path(folder), device, dict, "")
        if not trainer.parameters:
            raise UserError(f"{model.name} has no epochs: there is nothing to learn.")
        if trainer.steps_per_epoch < 2:
            raise UserError(
                f"{model.name}: train.batch_size={config.train.batch_size} takes all data in one "
                "step, and the first is not timed; --set train.batch_size to less."
            )
        own = dropout.drop, RMSNorm.forward
        ways = {model.name: Way(*own, trainer.autocast)}
        if plain:
            ways = {
                f"{model.name}, plain": Way(F.dropout, nn.RMSNorm.forward, None),
                "+ dropout, norm": Way(*own, None),
                "+ mixed": Way(*own, trainer.autocast),
            }
        lengths = trainer.examples.lengths * (1 if model.bucketed else 0)
        order = bucketed_order(lengths, config.train.batch_size, np.random.default_rng(0))
        model.begin_epoch(0, torch.Generator().manual_seed(0))
        model.train()
        seconds: dict[str, list[float]] = {label: [] for label in ways}
        for batch in trainer._batches(order[: steps + 1]):
            for label, way in ways.items():
                trainer.autocast = way.autocast
                with (
                    patch.object(dropout, "drop", way.drop),
                    patch.object(RMSNorm, "forward", way.norm),
                ):
                    start = time.perf_counter()  # a step ends with a read from the device
                    trainer._step(*batch)
                seconds[label].append(time.perf_counter() - start)
    steps_of_epoch = trainer.steps_per_epoch
    return {k: Cost(prepare, float(np.mean(v[1:])), steps_of_epoch) for k, v in seconds.items()}


@command
def main(arguments: list[str] | None = None) -> None:
    """Time and print."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default="mock", help="as in main.py (default mock)")
    parser.add_argument(
        "--model", default="sasrec,bsarec,pmat,rpg",
        help="models, with commas (default %(default)s)",
    )  # fmt: skip
    parser.add_number("--steps", 10, "timed steps of each model")
    parser.add_argument("--plain", action="store_true", help="also without what makes it faster")
    parser.add_settings()
    asked = parser.parse_args(arguments)
    given = {"run.mode": "baseline", "data.dataset": asked.dataset} | read_settings(asked.set)
    models = asked.model.split(",")
    for name in models:
        model_class(name)  # refuses a misspelt one before the others are timed
    task = load_task(build_config(given))
    print(f"{'':18s}{'stage one':>10s}{'steps':>8s}{'ms/step':>9s}{'epoch':>9s}{'ratio':>8s}")
    first = None
    for name in models:
        found = cost(build_config(given, model=name), task, asked.steps, asked.plain)
        first = None if asked.plain else first
        for way, spent in found.items():
            first = first or spent.epoch
            print(
                f"{way:18s}{spent.prepare:9.1f}s{spent.steps:8d}{1000 * spent.step:9.1f}"
                f"{spent.epoch:8.1f}s{spent.epoch / first:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
