"""How fast a trained model is, and at what price: latency, throughput, memory, time to train."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from data_utils import Sequences, history_batch
from experiments.training import Trainer
from metrics import latency_summary, throughput
from model_parts.base import Batch, Recommender
from util import Stopwatch, peak_memory_mb

CALLS = {1: 100, 64: 100}  # users asked for at once -> calls that are timed
WARM_UP = 3
MAX_SECONDS, MIN_CALLS = 20.0, 5  # a slow decoder gets fewer calls
FEWEST_FOR_P99 = 100


def measured_speed(
    trainer: Trainer,
    histories: Sequences,
    users: np.ndarray,
    config: Config,
    k: int,
    memory_before: float,
) -> dict[str, Any]:
    """Training time, memory, and the latency of lists of `k` items, as `metrics.json` has them.

    `latency_*` is one user at a time, `latency64_*` is 64 users at once; both count the way from
    histories in memory to lists in memory. `id_generation_ms` is the median time to code the whole
    catalogue for one user (null without semantic IDs; a look-up where IDs are the same for all).
    `peak_memory_mb` is null for a resumed run, of which this process saw the end alone, and where
    the system does not tell.
    """
    model, device, progress = trainer.model, trainer.device, trainer.progress
    grown = peak_memory_mb(device) - memory_before
    single, many = (latencies(model, histories, users, config, device, k, b) for b in CALLS)
    return {
        "parameters": model.describe()["parameters"],
        "prepare_seconds": progress.prepare_seconds,
        "train_seconds": progress.seconds,
        "seconds_per_epoch": progress.seconds / max(progress.epoch, 1),
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "id_generation_ms": _id_generation(model, histories, users, config, device),
        "throughput_users_per_second": throughput(max(CALLS) * len(many), float(sum(many))),
        "peak_memory_mb": None if progress.resumed or math.isnan(grown) else grown,
        **{f"latency_{name}": value for name, value in _summary(single).items()},
        **{f"latency64_{name}": value for name, value in _summary(many).items()},
    }


def _summary(seconds: list[float]) -> dict[str, float | None]:
    """`latency_summary` and the number of calls; no p99 of so few that it is the slowest one."""
    found = latency_summary(seconds) | {"calls": len(seconds)}
    return found if len(seconds) >= FEWEST_FOR_P99 else found | {"p99_ms": None}


@torch.inference_mode()
def latencies(
    model: Recommender,
    histories: Sequences,
    users: np.ndarray,
    config: Config,
    device: torch.device,
    k: int,
    size: int,
) -> list[float]:
    """Seconds of each call of `recommend` for `size` of the `users`, after a warm-up."""
    model.eval()

    def recommend(batch: Batch) -> Tensor:
        return model.recommend(batch.to(device), k).cpu()

    return _timed(recommend, _batches(histories, users, config, size, CALLS[size]))


@torch.inference_mode()
def _id_generation(
    model: Recommender,
    histories: Sequences,
    users: np.ndarray,
    config: Config,
    device: torch.device,
) -> float | None:
    if model.item_ids() is None:
        return None

    def generate(batch: Batch) -> Tensor | None:
        codes = model.item_ids(batch.to(device))
        return None if codes is None else codes.cpu()

    seconds = _timed(generate, _batches(histories, users, config, 1, 20))
    return latency_summary(seconds)["p50_ms"]


def _batches(
    histories: Sequences, users: np.ndarray, config: Config, size: int, calls: int
) -> list[Batch]:
    """`calls` batches after WARM_UP ones; a small data set starts again with its first user."""
    rows = np.resize(users, (WARM_UP + calls) * size).reshape(-1, size)
    window = config.data.max_history
    return [Batch(*map(torch.from_numpy, history_batch(histories, row, window))) for row in rows]


def _timed(call: Callable[[Batch], Any], batches: list[Batch]) -> list[float]:
    for batch in batches[:WARM_UP]:
        call(batch)
    seconds: list[float] = []
    for batch in batches[WARM_UP:]:
        watch = Stopwatch()
        call(batch)
        seconds.append(watch.seconds)
        if sum(seconds) > MAX_SECONDS and len(seconds) >= MIN_CALLS:
            break
    return seconds
