"""What every model must keep: a model is covered by being listed in MODELS.

A model without trainable parameters skips what only makes sense for one that learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from config import Config, build_config, keys, read_yaml, to_dict, value_of
from data_utils import (
    history_batch,
    leave_one_out,
    load_dataset,
    split_dataset,
    train_batch,
    train_examples,
)
from experiments import search
from experiments.runs import BEST, MODELS, RANKS, Task, model_class, run
from experiments.training import Trainer
from model_parts.base import Batch, Recommender, TrainingData, count_parameters
from util import load_checkpoint, save_checkpoint, seed_everything, torch_generator

every_model = pytest.mark.parametrize("name", list(MODELS))
TIMINGS = {"efficiency", "environment"}


class Fitted(NamedTuple):
    """A prepared model after 60 steps on one batch."""

    model: Recommender
    config: Config
    losses: list[float]  # [60], empty without parameters
    gradients: dict[str, Tensor | None]  # of the first step
    histories: Batch  # all test users


def prepared(config: Config, task: Task) -> Recommender:
    seed_everything(7)
    model = model_class(config.run.model)(config, task.dataset.catalogue)
    train, catalogue = task.split.train, task.dataset.catalogue
    data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
    model.prepare(data, torch_generator(7, "prepare"))
    return model


def some_batch(model: Recommender, config: Config, task: Task, size: int = 32) -> Batch:
    """Examples from all over the train set, so that lengths differ."""
    examples = train_examples(task.split.train, model.examples, config.data.max_history)
    index = np.linspace(0, len(examples.users) - 1, size).astype(int)
    return Batch(*map(torch.from_numpy, train_batch(task.split.train, examples, index)))


def histories(task: Task, users: np.ndarray | None = None) -> Batch:
    users = task.split.test.users if users is None else users
    return Batch(*map(torch.from_numpy, history_batch(task.split.train_and_valid, users, 16)))


@pytest.fixture(scope="module")
def fitted(tiny, task) -> Callable[[str], Fitted]:
    """`fitted(name)`, made once for each model."""
    made: dict[str, Fitted] = {}

    def fit(name: str) -> Fitted:
        config = tiny(name, dropout=False)
        model = prepared(config, task)
        losses, gradients = [], {}
        if count_parameters(model):
            trainable = [p for p in model.parameters() if p.requires_grad]
            optimiser = torch.optim.Adam(trainable, lr=0.01)
            batch = some_batch(model, config, task)
            model.begin_epoch(0, torch_generator(7, "epoch", 0))
            model.train()
            for step in range(60):
                loss = sum(model.loss(batch).values())
                optimiser.zero_grad()
                loss.backward()
                if step == 0:
                    named = model.named_parameters()
                    gradients = {n: p.grad for n, p in named if p.requires_grad}
                    gradients = {n: None if g is None else g.clone() for n, g in gradients.items()}
                optimiser.step()
                losses.append(loss.item())
        return Fitted(model.eval(), config, losses, gradients, histories(task))

    def once(name: str) -> Fitted:
        if name not in made:
            made[name] = fit(name)
        return made[name]

    return once


def learner(fitted: Fitted) -> Fitted:
    if not fitted.gradients:
        pytest.skip("nothing to train")
    return fitted


# --------------------------------------------------------------------------- building


@every_model
def test_builds_from_the_defaults_without_data(name):
    config = build_config({"run.model": name})
    model = model_class(name)(config)
    assert model.name == name
    assert model.describe()["parameters"] == count_parameters(model)


@every_model
def test_the_stored_config_builds_the_same_model(name, tiny, task, tmp_path):
    config = tiny(name)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    again = build_config(overlay=read_yaml(str(path)))
    assert to_dict(again) == to_dict(config)
    shapes = [
        {k: v.shape for k, v in model_class(name)(c, task.dataset.catalogue).state_dict().items()}
        for c in (config, again)
    ]
    assert shapes[0] == shapes[1]


@every_model
def test_searches_start_with_the_preset(name):
    for dataset in ("mock", "beauty"):
        config = build_config({"data.dataset": dataset, "run.mode": "hyper", "run.model": name})
        for key, entry in model_class(name).search_space.items():
            assert search._inside(entry, value_of(config, key)), (dataset, key)


@every_model
def test_ablations_and_search_spaces_name_settings_that_exist(name):
    model, known = model_class(name), keys(Config())
    used = [key for overrides in model.ablations.values() for key in overrides]
    assert set(used) | set(model.search_space) <= set(known)
    for overrides in model.ablations.values():
        build_config(overrides | {"run.model": name})


# --------------------------------------------------------------------------- learning


@every_model
def test_one_batch_can_be_learnt_by_heart(name, fitted):
    losses = learner(fitted(name)).losses
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


@every_model
def test_a_finite_gradient_reaches_every_parameter(name, fitted):
    for parameter, gradient in learner(fitted(name)).gradients.items():
        assert gradient is not None, parameter
        assert gradient.isfinite().all(), parameter
        assert gradient.abs().sum() > 0, parameter


@every_model
def test_loss_parts_are_named_scalars(name, fitted, task):
    model, config, *_ = learner(fitted(name))
    parts = model.loss(some_batch(model, config, task))
    assert all(isinstance(part, str) and value.shape == () for part, value in parts.items())


@every_model
def test_half_precision_on_a_cpu_gives_nearly_the_same_loss(name, fitted, tiny, task):
    learner(fitted(name))
    config = tiny(name, dropout=False)
    whole, half = prepared(config, task), prepared(config, task)
    batch = some_batch(whole, config, task)
    for model in (whole, half):
        model.begin_epoch(0, torch_generator(7, "epoch", 0))
        model.train()
    torch.manual_seed(7)
    wanted = sum(whole.loss(batch).values())
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(half.loss(batch).values())
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)
    for parameter, value in half.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), parameter


# --------------------------------------------------------------------------- scores


@every_model
def test_scores_every_item_of_every_user(name, fitted, task):
    model, _, _, _, batch = fitted(name)
    scores = model.score(batch)
    assert scores.shape == (len(batch.users), task.dataset.catalogue.n_items)
    assert scores.isfinite().all()
    assert torch.equal(scores, model.score(batch)), "scoring twice must give the same"


@every_model
def test_recommends_unique_unseen_items_best_first(name, fitted, task):
    model, _, _, _, batch = fitted(name)
    n_items = task.dataset.catalogue.n_items
    lists = model.recommend(batch, 10)
    scores = model.score(batch).gather(1, lists - 1)
    assert lists.min() >= 1 and lists.max() <= n_items
    assert (scores.diff(dim=1) <= 0).all()
    for row, history in zip(lists.tolist(), batch.items.tolist(), strict=True):
        assert len(set(row)) == 10
        assert not set(row) & set(history)
    everything = model.recommend(batch, n_items, mask_seen=False)
    assert (everything.sort(dim=1).values == torch.arange(1, n_items + 1)).all()
    with pytest.raises(ValueError, match="asked for"):
        model.recommend(batch, n_items + 1)


@every_model
def test_a_user_gets_the_same_scores_alone_and_in_company(name, fitted, task):
    model, _, _, _, batch = fitted(name)
    together = model.score(batch)
    for row in (0, 17, len(batch.users) - 1):
        alone = model.score(histories(task, batch.users[row : row + 1].numpy()))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


@every_model
def test_padding_changes_nothing(name, fitted):
    model, _, _, _, batch = fitted(name)
    padded = batch._replace(
        items=torch.nn.functional.pad(batch.items, (0, 4)),
        targets=torch.nn.functional.pad(batch.targets, (0, 4)),
    )
    torch.testing.assert_close(model.score(padded), model.score(batch), rtol=1e-4, atol=1e-5)


@every_model
def test_a_user_without_history_gets_finite_scores(name, fitted):
    model, *_ = fitted(name)
    nothing = torch.zeros(2, 3, dtype=torch.long)
    batch = Batch(torch.tensor([0, 1]), nothing, torch.zeros(2, dtype=torch.long), nothing)
    assert model.score(batch).isfinite().all()
    assert model.recommend(batch, 5).shape == (2, 5)


@every_model
def test_ids_are_whole_numbers_of_every_item(name, fitted, task):
    model, _, _, _, batch = fitted(name)
    n_items = task.dataset.catalogue.n_items
    codes = model.item_ids()
    if codes is None:
        pytest.skip("a model without semantic IDs")
    assert codes.shape[0] == n_items and not codes.is_floating_point()
    assert codes.min() >= 0
    of_users = model.item_ids(batch)
    assert of_users.shape in {codes.shape, (len(batch.users), *codes.shape)}


@every_model
def test_modality_weights_are_shares_of_each_user(name, fitted, task):
    model, _, _, _, batch = fitted(name)
    weights = model.modality_weights_of(batch)
    if weights is None:
        pytest.skip("a model that does not weigh modalities by user")
    assert weights.shape == (len(batch.users), len(task.dataset.catalogue.modalities))
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


@every_model
def test_added_interactions_reach_scores_through_the_graph_alone(name, fitted, task):
    model, _, _, _, batch = fitted(name)
    informed = model.with_interactions(task.split.train_and_valid)
    if informed is None:
        pytest.skip("reads histories")
    before, again = model.score(batch), model.with_interactions(task.split.train)
    assert torch.equal(again.eval().score(batch), before), "nothing was added"
    assert not torch.equal(informed.eval().score(batch), before)
    assert torch.equal(model.score(batch), before), "the model itself keeps its graph"
    pairs = zip(informed.parameters(), model.parameters(), strict=True)
    assert all(one is other for one, other in pairs), "weights are the same"
    back = informed.with_interactions(task.split.train)
    assert torch.equal(back.eval().score(batch), before), "nothing but the graph was changed"


# --------------------------------------------------------------------------- stored and repeated


@every_model
def test_saved_and_loaded_gives_the_same_scores(name, fitted, task, tmp_path):
    model, config, _, _, batch = fitted(name)
    save_checkpoint(tmp_path / "model.pt", {"model": model.state_dict()})
    seed_everything(999)  # nothing may depend on how the new one was initialised
    again = model_class(name)(config, task.dataset.catalogue)
    again.load_state_dict(load_checkpoint(tmp_path / "model.pt")["model"])
    assert torch.equal(again.eval().score(batch), model.score(batch))


def run_in(folder, config: Config, task: Task) -> dict[str, Any]:
    folder.mkdir()
    return run(config, task, folder)


@every_model
def test_the_same_seed_gives_the_same_result(name, tiny, task, tmp_path):
    config = tiny(name, {"train.epochs": 1})
    first, second = (run_in(tmp_path / part, config, task) for part in "ab")
    assert {k: v for k, v in first.items() if k not in TIMINGS} == {
        k: v for k, v in second.items() if k not in TIMINGS
    }
    with np.load(tmp_path / "a" / RANKS) as one, np.load(tmp_path / "b" / RANKS) as two:
        assert all(np.array_equal(one[field], two[field]) for field in one.files)


def with_other_targets(task: Task) -> Task:
    """The same train set, but other items held out.

    Drawn anew, not dealt out among the users: counts of items must not stay the same either.
    """
    sequences = task.dataset.sequences
    held_out = leave_one_out(sequences) > 0
    items = sequences.items.copy()
    rng = np.random.default_rng(3)
    items[held_out] = rng.integers(1, task.dataset.catalogue.n_items + 1, held_out.sum())
    assert (np.bincount(items) != np.bincount(sequences.items)).any()
    dataset = task.dataset._replace(sequences=sequences._replace(items=items))
    return Task(dataset, split_dataset(dataset))


@every_model
def test_training_never_sees_the_held_out_items(name, tiny, task, tmp_path, monkeypatch):
    # Which epoch is kept may depend on valid, so the last one is kept here.
    monkeypatch.setattr(Trainer, "_keep_if_best", lambda self, *_: self._keep_weights())
    config = tiny(name, {"train.patience": 0})
    run_in(tmp_path / "a", config, task)
    run_in(tmp_path / "b", config, with_other_targets(task))
    one, two = (load_checkpoint(tmp_path / part / BEST)["model"] for part in "ab")
    assert one.keys() == two.keys()
    for key in one:  # buffers such as codes, graphs and counts included
        assert torch.equal(one[key], two[key]), key


# --------------------------------------------------------------------------- poor data


def with_modalities(task: Task, modalities: dict) -> Task:
    catalogue = task.dataset.catalogue._replace(modalities=modalities)
    return Task(task.dataset._replace(catalogue=catalogue), task.split)


@every_model
def test_data_without_features_work_or_are_refused_clearly(name, tiny, task):
    bare = with_modalities(task, {})
    try:
        model = prepared(tiny(name), bare)
    except ValueError as error:
        message = str(error)
    else:
        assert model.eval().score(histories(task)).isfinite().all()
        message = "needs no features"
    assert "feature" in message


@every_model
def test_an_item_without_any_feature_is_scored_like_others(name, tiny, task):
    bare = {}
    for modality, (features, present) in task.dataset.catalogue.modalities.items():
        features, present = features.copy(), present.copy()
        features[:3], present[:3] = 0, False
        bare[modality] = (features, present)
    config, poor = tiny(name, dropout=False), with_modalities(task, bare)
    model = prepared(config, poor)
    if count_parameters(model):
        assert sum(model.loss(some_batch(model, config, poor)).values()).isfinite()
    assert model.eval().score(histories(task)).isfinite().all()


# --------------------------------------------------------------------------- worth having


@pytest.fixture(scope="module")
def planted(tiny) -> Task:
    dataset = load_dataset(tiny("popularity", {"mock.n_users": 400, "mock.n_items": 80}))
    return Task(dataset, split_dataset(dataset))


@pytest.mark.slow
@every_model
def test_beats_popularity_on_planted_tastes(name, tiny, planted, tmp_path):
    # an epoch of `positions` has a seventh of the examples
    epochs = {"prefixes": 12, "positions": 60}[model_class(name).examples]
    settings = {"train.epochs": epochs, "train.eval_every": epochs // 4, "train.batch_size": 64}
    config = tiny(name, settings | {"mock.n_users": 400, "mock.n_items": 80}, dropout=False)
    model = model_class(name)(config, planted.dataset.catalogue)
    if not count_parameters(model):
        pytest.skip("nothing to train")
    floor = run_in(tmp_path / "floor", tiny("popularity"), planted)
    found = run_in(tmp_path / "model", config, planted)
    assert found["test"]["ndcg@10"] > 1.3 * floor["test"]["ndcg@10"]
