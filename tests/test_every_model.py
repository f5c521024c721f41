"""The battery: what every model of the project must do. A new model is covered by being listed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from config import build_config, to_dict
from data_utils import history_batch, train_batch, train_examples
from experiments.runs import MODELS, Task, model_class, run
from model_parts.base import Batch, Recommender, TrainingData, count_parameters
from util import seed_everything, torch_generator

EVERY = pytest.mark.parametrize("name", list(MODELS))
N_ITEMS = 50


def build(name: str, data: TrainingData, **settings: object) -> Recommender:
    """A prepared model of the small catalogue."""
    config = small_config(name, **settings)
    seed_everything(0)
    model = model_class(name)(config, data.catalogue)
    model.prepare(data, torch_generator(0, "prepare"))
    return model.eval()


def real_batch(model: Recommender, data: TrainingData, size: int = 16) -> Batch:
    """Train examples in the form the model asks for."""
    examples = train_examples(data.train, model.examples, 10)
    index = np.linspace(0, len(examples.users) - 1, size).astype(int)
    return Batch(*map(torch.from_numpy, train_batch(data.train, examples, index)))


def learns(model: Recommender) -> bool:
    """False for a model without parameters."""
    return count_parameters(model) > 0


@EVERY
def test_builds_from_the_config_alone(name: str) -> None:
    model = model_class(name)(build_config(model=name))
    assert model.name == name
    assert model.describe()["parameters"] == count_parameters(model)


@EVERY
def test_settings_survive_the_round_trip(name: str) -> None:
    settings = to_dict(small_config(name))
    flat = {f"{s}.{k}": v for s, leaves in settings.items() for k, v in leaves.items()}
    assert to_dict(build_config(overlay=flat)) == settings


@EVERY
def test_scores_every_item(name: str, training_data: TrainingData, batch: Batch) -> None:
    scores = build(name, training_data).score(batch)
    assert scores.shape == (3, N_ITEMS)
    assert torch.isfinite(scores).all()


@EVERY
def test_recommends_unseen_items_once(name: str, training_data: TrainingData, batch: Batch) -> None:
    items = build(name, training_data).recommend(batch, 20)
    for row, seen in zip(items.tolist(), batch.items.tolist(), strict=True):
        assert len(set(row)) == 20
        assert all(1 <= item <= N_ITEMS for item in row)
        assert not set(row) & set(seen)
    with pytest.raises(ValueError, match="catalogue"):
        build(name, training_data).recommend(batch, N_ITEMS + 1)


@EVERY
def test_a_user_alone_gets_the_same_scores(
    name: str, training_data: TrainingData, batch: Batch
) -> None:
    model = build(name, training_data)
    together = model.score(batch)
    for row, length in enumerate(batch.lengths.tolist()):
        alone = Batch(*(field[row : row + 1] for field in batch))
        alone = alone._replace(items=alone.items[:, :length], targets=alone.targets[:, :length])
        torch.testing.assert_close(model.score(alone)[0], together[row], rtol=1e-4, atol=1e-5)


@EVERY
def test_more_padding_changes_nothing(
    name: str, training_data: TrainingData, batch: Batch
) -> None:
    model = build(name, training_data)
    wide = torch.nn.functional.pad(batch.items, (0, 4))
    padded = batch._replace(items=wide, targets=torch.nn.functional.pad(batch.targets, (0, 4)))
    torch.testing.assert_close(model.score(padded), model.score(batch), rtol=1e-4, atol=1e-5)


@EVERY
def test_an_empty_history_is_scored(name: str, training_data: TrainingData) -> None:
    zeros = torch.zeros(1, 1, dtype=torch.long)
    empty = Batch(zeros[0], zeros, zeros[0], zeros)
    assert torch.isfinite(build(name, training_data).score(empty)).all()


@EVERY
def test_finite_gradients_reach_every_parameter(name: str, training_data: TrainingData) -> None:
    model = build(name, training_data).train()
    if not learns(model):
        pytest.skip("nothing to learn")
    for _ in range(3):  # layers that start at zero pass a gradient on only after a step
        loss = sum(model.loss(real_batch(model, training_data)).values())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@EVERY
def test_one_batch_is_learnt_by_heart(name: str, training_data: TrainingData) -> None:
    model = build(name, training_data).train()
    if not learns(model):
        pytest.skip("nothing to learn")
    batch = real_batch(model, training_data, size=8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss = sum(model.loss(batch).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.85 * losses[0]


@EVERY
def test_saved_weights_give_the_same_scores(
    name: str, training_data: TrainingData, batch: Batch, tmp_path: Path
) -> None:
    model = build(name, training_data)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    seed_everything(1)
    other = model_class(name)(small_config(name), training_data.catalogue).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other.score(batch), model.score(batch))


@EVERY
def test_the_same_seed_gives_the_same_run(name: str, task: Task, tmp_path: Path) -> None:
    results = []
    for place in ("first", "second"):
        folder = tmp_path / place
        folder.mkdir()
        result = run(small_config(name, train__epochs=1), task, folder)
        results.append({key: result[key] for key in ("valid", "test", "id_quality")})
    assert json.dumps(results[0]) == json.dumps(results[1])


def shuffled_targets(task: Task) -> Task:
    """The same train part; valid and test targets are permuted among users."""
    rng = np.random.default_rng(3)
    split = task.split
    valid = split.valid._replace(items=rng.permutation(split.valid.items))
    test = split.test._replace(items=rng.permutation(split.test.items))
    history = split.train_and_valid._replace(items=split.train_and_valid.items.copy())
    history.items[history.offsets[1:][valid.users] - 1] = valid.items
    return task._replace(split=split._replace(valid=valid, test=test, train_and_valid=history))


@EVERY
def test_held_out_items_do_not_reach_training(
    name: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permuting valid and test targets leaves weights, codes and statistics bit-identical."""
    import experiments.training as training

    last = {}

    def keep_last(self: training.Trainer) -> None:  # the last state, not the best on valid
        last[len(last)] = {k: v.clone() for k, v in self.model.state_dict().items()}
        original(self)

    original = training.Trainer.save
    monkeypatch.setattr(training.Trainer, "save", keep_last)
    states = []
    for number, data in enumerate((task, shuffled_targets(task))):
        folder = tmp_path / str(number)
        folder.mkdir()
        last.clear()
        result = run(small_config(name, train__patience=0), data, folder)
        kept = last[max(last)] if last else torch.load(folder / "best.pt")["model"]
        states.append((kept, result["test"]))
    for key, tensor in states[0][0].items():
        assert torch.equal(tensor, states[1][0][key]), key
    assert states[0][1] != states[1][1]  # the targets did change


@EVERY
@pytest.mark.slow
def test_beats_popularity_on_planted_data(name: str, tmp_path: Path) -> None:
    settings = {"mock.n_users": 400, "mock.n_items": 150, "mock.history_max": 25}
    config = build_config({**settings, "train.epochs": 15, "train.lr": 2e-3}, model=name)
    if not learns(model_class(name)(config)):
        pytest.skip("nothing to learn")
    from experiments.runs import load_task

    data = load_task(config)
    floor = build_config(settings, model="popularity")
    for place in ("own", "floor"):
        (tmp_path / place).mkdir()
    own = run(config, data, tmp_path / "own")["test"]["ndcg@10"]
    assert own > 1.3 * run(floor, data, tmp_path / "floor")["test"]["ndcg@10"]


@EVERY
def test_semantic_ids_are_codes_of_every_item(
    name: str, training_data: TrainingData, batch: Batch
) -> None:
    model = build(name, training_data)
    codes = model.item_ids()
    if codes is None:
        pytest.skip("no semantic IDs")
    assert codes.shape[0] == N_ITEMS
    assert codes.min() >= 0
    per_user = model.item_ids(batch)
    assert per_user.shape[-2:] == codes.shape


@EVERY
def test_history_is_read_from_its_newest_end(name: str, task: Task) -> None:
    """A history longer than the window is cut at its oldest end, and the model still scores it."""
    config = small_config(name, data__max_history=3)
    seed_everything(0)
    split, catalogue = task.split, task.dataset.catalogue
    model = model_class(name)(config, catalogue)
    data = TrainingData(split.train, catalogue, split.train.n_users, catalogue.n_items)
    model.prepare(data, torch_generator(0, "prepare"))
    cut = history_batch(split.train, np.array([0]), 3)
    assert cut.items[0].tolist() == split.train.of(0)[-3:].tolist()
    assert model.eval().score(Batch(*map(torch.from_numpy, cut))).shape == (1, N_ITEMS)
