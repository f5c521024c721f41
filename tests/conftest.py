"""Tiny data and settings that all tests share.

Everything runs on one thread: sums then come out in the same order, and equal means equal.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import Config, build_config
from config import keys as all_keys
from data_utils import load_dataset, split_dataset
from experiments import efficiency, plots, plots_ids
from experiments.runs import Task
from experiments.training import Trainer

torch.set_num_threads(1)

# Histories (6 to 12) are shorter than the window, so that a test can add padding behind them.
DATA = {
    "mock.n_users": 60,
    "mock.n_items": 50,
    "mock.dims": {"visual": 6, "text": 8},
    "mock.history_min": 6,
    "mock.history_max": 12,
    "data.max_history": 16,
    "run.device": "cpu",
    "train.batch_size": 32,
    "train.epochs": 2,
    "train.lr": 0.01,
    "train.amp": "off",  # not every CPU has half precision
}
# By the name of a setting in any model's section: a new model gets small by using these names.
SIZES = {
    "width": 16, "inner": 32, "layers": 1, "heads": 2, "digits": 4, "shared_digits": 4,
    "personal_digits": 4, "codes": 16, "latent": 8, "context": 16, "attention": 8, "grid": 2,
    "attention_heads": 2, "head_width": 8, "hidden": 16, "depth": 1, "tokenizer_steps": 20,
    "part": 8, "behaviour": 8, "pairs": 64, "expert_width": 16, "stage_one_batch": 64,
    "context_batch": 32, "passes": 2, "beams": 10,
}  # fmt: skip
SHARED_SECTIONS = ("run", "data", "mock", "train")


def small(**more: Any) -> dict[str, Any]:
    """Dotted keys of a tiny run; `more` by leaf name for all models (`dropout=0.0`)."""
    sizes = SIZES | more
    own = {
        key: sizes[key.split(".")[1]]
        for key in all_keys(Config())
        if key.split(".")[0] not in SHARED_SECTIONS and key.split(".")[1] in sizes
    }
    return DATA | own


NO_DROPOUT = {
    leaf.name: 0.0
    for section in dataclasses.fields(Config)
    for leaf in dataclasses.fields(section.default_factory)
    if "dropout" in leaf.name
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """`tiny("sasrec", {"train.epochs": 1}, dropout=False)` -> a tiny configuration."""

    def make(
        model: str = "sasrec", settings: dict[str, Any] | None = None, dropout: bool = True
    ) -> Config:
        base = small(**({} if dropout else NO_DROPOUT))
        return build_config(base | (settings or {}) | {"run.model": model}, model=model)

    return make


@pytest.fixture(scope="session")
def task(tiny) -> Task:
    """The tiny mock data set, split."""
    dataset = load_dataset(tiny())
    return Task(dataset, split_dataset(dataset))


@pytest.fixture(scope="session")
def small_flags() -> list[str]:
    """The tiny settings as `--set` flags, for tests that go through main.py."""
    return [
        part for key, value in small().items() if key != "train.epochs"
        for part in ("--set", f"{key}={value}")
    ]  # fmt: skip


@pytest.fixture
def mode_flags(tmp_path, small_flags) -> list[str]:
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    return ["--epochs", "1", *folders, *small_flags]


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The folder of every training that is started, in order."""
    started, fit = [], Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self: (started.append(self.folder.name), fit(self))[1]
    )
    return started


@pytest.fixture(scope="session")
def make_outputs_fast() -> Callable[[pytest.MonkeyPatch], None]:
    """Figures are drawn but not rendered, speed is measured on few calls: for other questions."""

    def make(monkeypatch: pytest.MonkeyPatch) -> None:
        pixel = base64.b64decode(
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
            "rkJggg=="
        )

        def save(figure, path):
            (path.parent / f"{path.name}.pdf").touch()
            (path.parent / f"{path.name}.png").write_bytes(pixel)

        monkeypatch.setattr(plots, "save", save)
        monkeypatch.setattr(plots_ids, "_tsne", lambda digits, seed: np.zeros((len(digits), 2)))
        monkeypatch.setattr(efficiency, "CALLS", {1: 2, 64: 1})

    return make


@pytest.fixture
def fast_outputs(monkeypatch, make_outputs_fast) -> None:
    """`make_outputs_fast` for one test."""
    make_outputs_fast(monkeypatch)


@pytest.fixture(scope="session")
def newest() -> Callable[[Path], Path]:
    """`newest(tmp_path)` -> the newest run folder below `save`."""
    return lambda place: max(path for path in (place / "save").iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """`write_folder(path, {"u1": ["a", "b"]}, text=features)` -> a folder data set."""

    def write(
        path: Path,
        histories: dict[str, list[str]],
        items: list[str] | None = None,
        **features: np.ndarray,
    ) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        rows = [
            f"{user},{item},{time}"
            for user, history in histories.items()
            for time, item in enumerate(history)
        ]
        (path / "interactions.csv").write_text(
            "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n", encoding="utf-8"
        )
        items = items or sorted({item for history in histories.values() for item in history})
        (path / "items.csv").write_text(
            "item_id,title\n" + "".join(f"{item},title of {item}\n" for item in items),
            encoding="utf-8",
        )
        for name, matrix in features.items():
            np.save(path / f"{name}.npy", matrix)
        return path

    return write


@pytest.fixture(autouse=True)
def _quiet_logger():
    """main.py points the logger at the screen of one test; take that away from the next one."""
    yield
    logger = logging.getLogger("pmat")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
