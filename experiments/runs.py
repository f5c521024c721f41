"""One run: build the model, train it, rank valid and test, write the run folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import baseline_models
import our_models
from config import Config, ConfigError, build_config, closest, read_yaml, to_dict
from data_utils import Dataset, Split, load_dataset, split_dataset
from experiments import personal
from experiments.efficiency import measured_speed
from experiments.evaluation import Evaluation, evaluate
from experiments.training import BEST, LATEST, Progress, Trainer
from metrics import Ranks, cold_recall, coverage, ranking_metrics
from model_parts.base import Recommender, TrainingData
from util import (
    Stopwatch,
    UserError,
    atomic_path,
    environment,
    from_first,
    load_checkpoint,
    machine_name,
    pick_device,
    rank,
    reset_peak_memory,
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
VALID_IN_GRAPH = "test_with_valid_in_graph"  # second test metrics of models that read no history
UNTIMED = "leave-one-out in the order of the file"
LIST_LENGTH = 10  # of the lists that coverage looks at


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
    if config.data.dataset == "movielens" and not config.data.edition:
        logger.info("Presets of one edition, such as those of ml-1m, come with data.edition=ml-1m.")
    if not ordered_by_time(dataset):
        logger.info("There are no time stamps: the order of the rows of each user counts.")
        if config.data.tie_policy == "shuffle":
            logger.warning("data.tie_policy=shuffle changes nothing where there are no times.")
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


class Trained(NamedTuple):
    """A model at its best epoch on valid; nothing has looked at test yet."""

    model: Recommender
    trainer: Trainer
    device: torch.device
    validate: Callable[[], dict[str, float]]
    memory_before: float  # MB that the process held before the run


def train(
    config: Config,
    task: Task,
    folder: Path,
    on_epoch: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Trained:
    """Train one model with one seed in `folder`; uses the train and valid parts of `task` only.

    A folder that already holds a checkpoint goes on from there. `on_epoch` is the one of Trainer.
    Raises UserError for what the user can mend, `experiments.training.Stopped` after a signal.
    """
    device = pick_device(config.run.device)
    memory_before = reset_peak_memory(device)
    split, catalogue = task.split, task.dataset.catalogue
    seed_everything(config.run.seed)
    try:
        model = model_class(config.run.model)(config, catalogue).to(device)
    except ValueError as error:
        raise UserError(f"{config.run.model}: {error}") from error
    if rank() == 0:
        write_yaml(folder / CONFIG, to_dict(config))

    validate = partial(valid_metrics, model, task, config, device)
    trainer = Trainer(
        model, split.train, config, folder, device, validate, task.dataset.fingerprint, on_epoch
    )
    if not trainer.resume():
        watch = Stopwatch()
        if type(model).prepare is not Recommender.prepare:
            logger.info("preparing codes, graphs or statistics from the train part ...")
        stage_one(model, task, config)
        if world_size() > 1:  # all processes go on from the weights and codes of the first
            model.load_state_dict(from_first(model.state_dict()))
        trainer.progress.prepare_seconds = watch.seconds
        seed_everything(stream_seed(config.run.seed, "train", rank()))
    here = environment(device, config.train.amp)
    trainer.progress.machines.append(f"{machine_name(here)} in {here['training']}")
    trainer.fit()
    return Trained(model, trainer, device, validate, memory_before)


def valid_metrics(
    model: Recommender, task: Task, config: Config, device: torch.device
) -> dict[str, float]:
    """Metrics of the current weights on valid, under the masking of `config`."""
    found = evaluate(model, task.split.train, task.split.valid, config, device, note="valid")
    return ranking_metrics(found.under(config.train.mask_seen))


def run(config: Config, task: Task, folder: Path) -> dict[str, Any]:
    """Train one model as `train` does, test it once; returns what `metrics.json` holds."""
    model, trainer, device, validate, memory_before = train(config, task, folder)
    split = task.split
    found = evaluate(
        model, split.train_and_valid, split.test, config, device, list_length(task), note="test"
    )
    histories = split.train_and_valid
    result = _result(model, config, task, validate(), found) | {
        "efficiency": measured_speed(
            trainer, histories, split.test.users, config, list_length(task), memory_before
        ),
        "environment": environment(device, config.train.amp) | _begun_on(trainer.progress),
    }
    result |= _with_valid_in_graph(model, config, task, device)
    if rank() == 0:
        _save_ranks(folder / RANKS, found, task)
        personal.write_personal(folder, model, task.dataset, histories, config)
        write_json(folder / METRICS, result)
        (folder / LATEST).unlink(missing_ok=True)
    return result


def _begun_on(progress: Progress) -> dict[str, str]:
    """Other machines that a resumed run was trained on before."""
    before = [made for made in dict.fromkeys(progress.machines) if made != progress.machines[-1]]
    return {"begun_on": ", ".join(before)} if before else {}


def list_length(task: Task) -> int:
    """LIST_LENGTH, or the whole catalogue where it is smaller."""
    return min(LIST_LENGTH, task.dataset.catalogue.n_items)


def load_trained(folder: Path) -> tuple[Recommender, Config, Task]:
    """The trained model of a run folder, its settings and its data.

    Raises UserError where the folder holds no weights or the data are not what they were.
    """
    if not (folder / BEST).exists():
        raise UserError(f"{folder} is no folder of a trained run: it has no {BEST}.")
    task = load_task(build_config(overlay=read_yaml(str(folder / CONFIG))))
    refuse_other_data(folder, task)
    return *load_model(folder, task.dataset.catalogue), task


def refuse_other_data(folder: Path, task: Task) -> None:
    """Raise UserError where the run that finished in `folder` saw other data than `task` holds.

    An unfinished run says so when it is resumed; older ones kept no checksum and are let through.
    """
    path = folder / METRICS
    if not path.exists():
        return
    made = json.loads(path.read_text(encoding="utf-8"))["dataset"].get("crc32")
    if made not in (None, task.dataset.checksum()):
        raise UserError(
            f"{folder} was made on other data: what is read for {task.dataset.name} has changed "
            "since; bring the old files back, or start a new run."
        )


def load_model(folder: Path, catalogue: Any) -> tuple[Recommender, Config]:
    """The trained model of a run folder and its settings.

    Raises UserError without weights, or with those of another version of the model.
    """
    config = build_config(overlay=read_yaml(str(folder / CONFIG)))
    model = model_class(config.run.model)(config, catalogue)
    try:
        model.load_state_dict(load_checkpoint(folder / BEST)["model"])
    except RuntimeError as error:
        raise UserError(
            f"{folder / BEST} does not fit {config.run.model} as it is now; train it again, or use "
            f"the version that made it. ({str(error).splitlines()[-1].strip()})"
        ) from error
    return model.eval(), config


def training_data(task: Task) -> TrainingData:
    """What a model may see: the held-out sets are not in it."""
    train, catalogue = task.split.train, task.dataset.catalogue
    return TrainingData(train, catalogue, train.n_users, catalogue.n_items)


def stage_one(model: Recommender, task: Task, config: Config) -> None:
    """`prepare` with `training_data`. Raises UserError for data the model cannot work with."""
    try:
        model.prepare(training_data(task), torch_generator(config.run.seed, "prepare"))
    except ValueError as error:
        raise UserError(f"{model.name}: {error}") from error


def _result(
    model: Recommender, config: Config, task: Task, valid: dict[str, float], found: Evaluation
) -> dict[str, Any]:
    sequences, n_items = task.dataset.sequences, task.dataset.catalogue.n_items
    both = {"masked": found.masked, "unmasked": found.unmasked}
    chosen = found.under(config.train.mask_seen)
    counts = np.bincount(task.split.train.items, minlength=n_items + 1)[1:]
    cold, cold_targets = cold_recall(chosen, counts)
    extra = {
        f"coverage@{LIST_LENGTH}": coverage(found.lists, n_items),
        "cold_recall@10": cold,
        "cold_targets": cold_targets,
    }
    return {
        "model": model.name,
        "label": config.run.label,
        "dataset": {
            "name": task.dataset.name,
            "users": sequences.n_users,
            "items": n_items,
            "interactions": len(sequences.items),
            "crc32": task.dataset.checksum(),
        },
        "seed": config.run.seed,
        "protocol": {
            "mask_seen": config.train.mask_seen,
            "tie_policy": config.data.tie_policy,
            "split": split_name(task.dataset),
            "timed": ordered_by_time(task.dataset),
        },
        "valid": valid,
        "test": ranking_metrics(chosen) | extra,
        "test_by_masking": {name: ranking_metrics(ranks) for name, ranks in both.items()},
        "id_quality": personal.measured_ids(
            model, task.dataset, task.split.train_and_valid, config
        ),
        "description": model.describe(),
    }


def split_name(dataset: Dataset) -> str:
    """How the held-out items were chosen; the mock data come in the order they were made."""
    if dataset.labels is not None:
        return "of the source"
    return "leave-one-out" if ordered_by_time(dataset) else UNTIMED


def ordered_by_time(dataset: Dataset) -> bool:
    """Whether histories are in the order of their times, not in that of the file."""
    return dataset.truth is not None or dataset.sequences.timed


def _with_valid_in_graph(
    model: Recommender, config: Config, task: Task, device: torch.device
) -> dict[str, dict[str, float]]:
    """Test metrics of the same weights once the valid items, which every history holds at test, are
    in the user-item graph; empty for a model that reads histories."""
    split = task.split
    informed = model.with_interactions(split.train_and_valid)
    if informed is None:
        return {}
    note = "test, valid item in graph"
    found = evaluate(informed, split.train_and_valid, split.test, config, device, note=note)
    return {VALID_IN_GRAPH: ranking_metrics(found.under(config.train.mask_seen))}


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
