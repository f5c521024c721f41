"""One run: build the model, train it, rank valid and test, write the run folder."""

from __future__ import annotations

import importlib
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import baseline_models
import our_models
from config import Config, ConfigError, build_config, closest, read_yaml, to_dict
from data_utils import Dataset, Split, history_batch, load_dataset, split_dataset
from experiments.evaluation import Evaluation, evaluate
from experiments.training import BEST, LATEST, Trainer
from metrics import Ranks, cold_recall, coverage, id_quality, latency_summary, ranking_metrics
from model_parts.base import Batch, Recommender, TrainingData
from util import (
    Stopwatch,
    UserError,
    atomic_path,
    environment,
    from_first,
    load_checkpoint,
    peak_memory_mb,
    pick_device,
    rank,
    seed_everything,
    stream_seed,
    torch_generator,
    world_size,
    write_json,
    write_yaml,
)

logger = getLogger("pmat")
MODELS = our_models.MODELS | baseline_models.MODELS
METRICS, RANKS, CONFIG = "metrics.json", "ranks.npz", "config.yaml"
LIST_LENGTH = 10  # of the lists that coverage looks at
LATENCY_QUERIES = 100


class Task(NamedTuple):
    """A data set ready to train on, shared by all runs of one command."""

    dataset: Dataset
    split: Split


def load_task(config: Config) -> Task:
    """Read and split what `config.data` names, and say what was found."""
    dataset = load_dataset(config)
    sequences, catalogue = dataset.sequences, dataset.catalogue
    widths = [f"{name} {part.features.shape[1]}-d" for name, part in catalogue.modalities.items()]
    logger.info(
        "%s: %s users, %s items, %s interactions; features: %s",
        dataset.name, f"{sequences.n_users:,}", f"{catalogue.n_items:,}",
        f"{len(sequences.items):,}", ", ".join(widths) or "none",
    )  # fmt: skip
    split = split_dataset(dataset)
    if not len(split.valid.users) or not len(split.test.users):
        raise UserError(
            f"{dataset.name} has no valid or no test targets: leave-one-out needs users with at "
            "least three interactions, an x_label column needs rows labelled 1 and 2."
        )
    return Task(dataset, split)


def model_class(name: str) -> type[Recommender]:
    """The class of a registered model. Raises ConfigError with the nearest known name."""
    if name not in MODELS:
        known = ", ".join(MODELS)
        raise ConfigError(f"There is no model '{name}' ({known}).{closest(name, list(MODELS))}")
    module, class_name = MODELS[name].split(":")
    return getattr(importlib.import_module(module), class_name)


def run(config: Config, task: Task, folder: Path) -> dict[str, Any]:
    """Train and test one model with one seed in `folder`; returns what `metrics.json` holds.

    A folder that already holds a checkpoint goes on from there. Raises UserError for what the user
    can mend, `experiments.training.Stopped` after a signal.
    """
    device = pick_device(config.run.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    split, catalogue = task.split, task.dataset.catalogue
    seed_everything(config.run.seed)
    model = model_class(config.run.model)(config, catalogue).to(device)
    if rank() == 0:
        write_yaml(folder / CONFIG, to_dict(config))

    def validate() -> dict[str, float]:
        found = evaluate(model, split.train, split.valid, config, device, note="valid")
        return ranking_metrics(found.masked if config.train.mask_seen else found.unmasked)

    trainer = Trainer(
        model, split.train, config, folder, device, validate, task.dataset.fingerprint
    )
    if not trainer.resume():
        watch = Stopwatch()
        _prepare(model, task, config)
        trainer.progress.prepare_seconds = watch.seconds
        seed_everything(stream_seed(config.run.seed, "train", rank()))
    trainer.fit()
    watch = Stopwatch()
    found = evaluate(
        model, split.train_and_valid, split.test, config, device, list_length(task), note="test"
    )
    speed = _speed(model, trainer, task, config, device, len(found.lists) / watch.seconds)
    result = _result(model, config, task, validate(), found) | {
        "efficiency": speed,
        "environment": environment(device),
    }
    if rank() == 0:
        _save_ranks(folder / RANKS, found, task)
        write_json(folder / METRICS, result)
        (folder / LATEST).unlink(missing_ok=True)
    return result


def list_length(task: Task) -> int:
    """LIST_LENGTH, or the whole catalogue where it is smaller."""
    return min(LIST_LENGTH, task.dataset.catalogue.n_items)


def load_model(folder: Path, catalogue: Any) -> tuple[Recommender, Config]:
    """The trained model of a run folder and its settings. Raises UserError without weights."""
    config = build_config(overlay=read_yaml(str(folder / CONFIG)))
    model = model_class(config.run.model)(config, catalogue)
    model.load_state_dict(load_checkpoint(folder / BEST)["model"])
    return model.eval(), config


def _prepare(model: Recommender, task: Task, config: Config) -> None:
    """Stage one. The held-out sets are not handed over, so no model can look at them."""
    train, catalogue = task.split.train, task.dataset.catalogue
    data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
    try:
        model.prepare(data, torch_generator(config.run.seed, "prepare"))
    except ValueError as error:
        raise UserError(f"{model.name}: {error}") from error
    if world_size() > 1:  # all processes go on from the weights and codes of the first
        model.load_state_dict(from_first(model.state_dict()))


def _result(
    model: Recommender, config: Config, task: Task, valid: dict[str, float], found: Evaluation
) -> dict[str, Any]:
    sequences, n_items = task.dataset.sequences, task.dataset.catalogue.n_items
    both = {"masked": found.masked, "unmasked": found.unmasked}
    chosen = both["masked" if config.train.mask_seen else "unmasked"]
    counts = np.bincount(task.split.train.items, minlength=n_items + 1)[1:]
    cold, cold_targets = cold_recall(chosen, counts)
    extra = {
        f"coverage@{LIST_LENGTH}": coverage(found.lists, n_items),
        "cold_recall@10": cold,
        "cold_targets": cold_targets,
    }
    return {
        "model": model.name,
        "dataset": {
            "name": task.dataset.name,
            "users": sequences.n_users,
            "items": n_items,
            "interactions": len(sequences.items),
        },
        "seed": config.run.seed,
        "protocol": {"mask_seen": config.train.mask_seen, "tie_policy": config.data.tie_policy},
        "valid": valid,
        "test": ranking_metrics(chosen) | extra,
        "test_by_masking": {name: ranking_metrics(ranks) for name, ranks in both.items()},
        "id_quality": _id_quality(model, task),
        "description": model.describe(),
    }


def _id_quality(model: Recommender, task: Task) -> dict[str, float] | None:
    codes = model.item_ids()
    if codes is None:
        return None
    parts = [part.features for part in task.dataset.catalogue.modalities.values()]
    features = np.concatenate(parts, axis=1) if parts else None
    return id_quality(codes.cpu().numpy(), model.n_codes, features)


@torch.inference_mode()
def _speed(
    model: Recommender,
    trainer: Trainer,
    task: Task,
    config: Config,
    device: torch.device,
    users_per_second: float,
) -> dict[str, float]:
    """Training time, throughput of the test ranking, latency of single requests."""
    seconds = []
    users = task.split.test.users[:LATENCY_QUERIES]
    warm_up = users[:3]
    for user in np.concatenate([warm_up, users]):
        batch = history_batch(task.split.train_and_valid, np.array([user]), config.data.max_history)
        watch = Stopwatch()
        model.recommend(Batch(*map(torch.from_numpy, batch)).to(device), list_length(task)).cpu()
        seconds.append(watch.seconds)
    progress, latency = trainer.progress, latency_summary(seconds[len(warm_up) :])
    return {
        "parameters": model.describe()["parameters"],
        "prepare_seconds": progress.prepare_seconds,
        "train_seconds": progress.seconds,
        "seconds_per_epoch": progress.seconds / max(progress.epoch, 1),
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "test_users_per_second": users_per_second,
        "peak_memory_mb": peak_memory_mb(device),
    } | {f"latency_{name}": value for name, value in latency.items()}


def _save_ranks(path: Path, found: Evaluation, task: Task) -> None:
    """Ranks of every test target under both conventions; x.5 where items tie."""
    ranks = found.masked
    owners = np.repeat(ranks.users, np.diff(ranks.offsets))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            user_ids=task.dataset.user_ids[owners],
            users=owners.astype(np.int32),
            targets=ranks.targets.astype(np.int32),
            masked=ranks.ranks.astype(np.float32),
            unmasked=found.unmasked.ranks.astype(np.float32),
        )


def load_ranks(path: Path, mask_seen: bool) -> Ranks:
    """The ranks a run stored, under one convention."""
    with np.load(path, allow_pickle=False) as stored:
        users, counts = np.unique(stored["users"], return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        name = "masked" if mask_seen else "unmasked"
        return Ranks(
            users.astype(np.int64),
            stored[name].astype(np.float64),
            offsets,
            stored["targets"].astype(np.int64),
        )
