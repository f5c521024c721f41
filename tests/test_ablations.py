"""Every ablation that a model declares, on a GPU where there is one: it runs, and it acts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_utils import history_batch, train_batch, train_examples
from experiments.runs import MODELS, Task, model_class
from model_parts.base import Batch, TrainingData
from util import seed_everything, torch_generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# So that tiny data have what is taken away: behaviour, enough components for 32 digits, items with
# several IDs, a graph that is refreshed.
SETTINGS = {
    "pmat.with_behaviour": True, "pmat.latent": 32, "mcrl.stage_one_epochs": 1,
    "pctx.blend": 0.9, "pctx.start": 3, "pctx.step": 0, "dgmrec.refresh": 1,
}  # fmt: skip
# Within 20 steps of stage one no code dies, and codebooks are fitted anew at its end.
MAY_DO_NOTHING = {("mmq", "dead codes stay dead"), ("letter", "no diversity")}
CASES = [(name, label) for name in MODELS for label in model_class(name).ablations]


def _two_steps(name: str, overrides: dict[str, Any], tiny: Any, task: Task) -> list[Tensor]:
    """Losses of two steps of a prepared model, and its scores after them."""
    seed_everything(7)
    config = tiny(name, SETTINGS | overrides)
    train, catalogue = task.split.train, task.dataset.catalogue
    model = model_class(name)(config, catalogue).to(DEVICE)
    data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
    model.prepare(data, torch_generator(7, "prepare"))
    examples = train_examples(train, model.examples, config.data.max_history)
    index = np.linspace(0, len(examples.users) - 1, 24).astype(int)
    batch = Batch(*map(torch.from_numpy, train_batch(train, examples, index))).to(DEVICE)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seed_everything(8)
    losses = []
    for epoch in range(2):
        model.begin_epoch(epoch, torch_generator(7, "epoch", epoch))
        model.train()
        optimiser.zero_grad()
        losses.append(sum(model.loss(batch).values()))
        losses[-1].backward()
        optimiser.step()
    users = task.split.test.users
    test = Batch(*map(torch.from_numpy, history_batch(task.split.train_and_valid, users, 16)))
    with torch.inference_mode():
        scores = model.eval().score(test.to(DEVICE))
    return [*(loss.detach().cpu() for loss in losses), scores.cpu()]


@pytest.fixture(scope="module")
def full(tiny: Any, task: Task) -> Any:
    """Two steps of the full model, by its name."""
    made: dict[str, list[Tensor]] = {}
    return lambda name: made.setdefault(name, _two_steps(name, {}, tiny, task))


@pytest.mark.parametrize(("name", "label"), CASES)
def test_an_ablation_trains_ranks_and_changes_something(name, label, full, tiny, task) -> None:
    whole = full(name)
    ablated = _two_steps(name, dict(model_class(name).ablations[label]), tiny, task)
    assert all(bool(torch.isfinite(loss)) for loss in ablated[:-1])
    assert ablated[-1].shape == whole[-1].shape
    assert not ablated[-1].isnan().any()
    same = all(torch.equal(a, b) for a, b in zip(ablated, whole, strict=True))
    assert not same or (name, label) in MAY_DO_NOTHING
