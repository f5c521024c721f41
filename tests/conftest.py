"""Small data sets and settings shared by the tests."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from config import Config, build_config
from experiments.runs import Task, load_task
from model_parts.base import Batch, TrainingData

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give

SMALL = {
    "mock.n_users": 60,
    "mock.n_items": 50,
    "mock.history_min": 6,
    "mock.history_max": 12,
    "train.batch_size": 32,
    "train.epochs": 2,
    "data.max_history": 10,
    "rpg.digits": 4,
    "rpg.codes": 8,
    "rpg.width": 32,
    "rpg.inner": 32,
    "rpg.heads": 2,
    "rpg.pca": 16,
    "pmat.shared_digits": 4,
    "pmat.personal_digits": 4,
    "pmat.codes": 8,
    "pmat.latent": 8,
    "pmat.width": 32,
    "sasrec.width": 32,
    "sasrec.inner": 32,
    "bsarec.width": 32,
}


def small_config(model: str, **settings: object) -> Config:
    """Settings of a model that trains in a blink; dots of keys are written as two underscores."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return build_config({**SMALL, "run.device": "cpu", **changed}, model=model)


@pytest.fixture(scope="session")
def task() -> Task:
    """The small mock data set, read and split."""
    return load_task(small_config("popularity"))


@pytest.fixture(scope="session")
def training_data(task: Task) -> TrainingData:
    """What a model may see of it."""
    train, catalogue = task.split.train, task.dataset.catalogue
    return TrainingData(train, catalogue, train.n_users, catalogue.n_items)


@pytest.fixture
def batch() -> Batch:
    """Three users with histories of 4, 2 and 5 items and a target after every position."""
    items = torch.tensor([[3, 7, 9, 2, 0], [11, 4, 0, 0, 0], [5, 6, 8, 10, 12]])
    targets = torch.tensor([[7, 9, 2, 14, 0], [4, 20, 0, 0, 0], [6, 8, 10, 12, 1]])
    return Batch(torch.tensor([0, 1, 2]), items, torch.tensor([4, 2, 5]), targets)


def write_folder(
    path: Path, rows: list[tuple], items: list[str], features: dict[str, np.ndarray] | None = None
) -> Path:
    """A data set in the folder layout; rows are (user, item, timestamp[, rating])."""
    path.mkdir(parents=True, exist_ok=True)
    header = ["user_id", "item_id", "timestamp", "rating"][: len(rows[0])]
    with open(path / "interactions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    with open(path / "items.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["item_id", "title"], *((i, f"title {i}") for i in items)])
    for name, array in (features or {}).items():
        np.save(path / f"{name}.npy", array)
    return path
