"""The fused softmax against the plain one, in value and in both gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baseline_models.bsarec import BSARec
from baseline_models.sasrec import SASRec
from data_utils import history_batch
from model_parts import softmax
from model_parts.base import Batch, TrainingData
from model_parts.softmax import item_cross_entropy, keys, queries
from our_models.pmat import PMAT


def both(states, items, targets):
    """(loss, gradient of states, gradient of items) of the plain and of the fused form."""
    results = []
    for function in (lambda s, i, t: F.cross_entropy(s @ i.T, t), item_cross_entropy):
        s, i = states.clone().requires_grad_(), items.clone().requires_grad_()
        loss = function(s, i, targets)
        (3 * loss).backward()  # a factor from upstream must arrive
        results.append((loss.detach(), s.grad, i.grad))
    return results


def inputs(n_positions: int, n_items: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(n_positions * 100 + n_items)
    states = scale * torch.randn(n_positions, 8, generator=generator)
    items = torch.randn(n_items, 8, generator=generator)
    return states, items, torch.randint(n_items, (n_positions,), generator=generator)


@pytest.mark.parametrize("numbers", [1, 1000, 10**7])  # 16 positions a chunk, a few, all at once
@pytest.mark.parametrize(
    ("n_positions", "n_items"), [(1, 7), (5, 1), (37, 50), (48, 16), (100, 31)]
)
def test_equals_cross_entropy(monkeypatch, numbers, n_positions, n_items):
    monkeypatch.setattr(softmax, "_CHUNK_NUMBERS", {"cpu": numbers})
    plain, fused = both(*inputs(n_positions, n_items))
    for wanted, found in zip(plain, fused, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e2, 1e4])
def test_extreme_logits(scale):
    # at 1e4 the probability of most targets underflows to zero: the loss is large, not infinite
    plain, fused = both(*inputs(40, 30, scale))
    for wanted, found in zip(plain, fused, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_no_position_is_no_loss():
    states, items, targets = inputs(1, 5)
    assert item_cross_entropy(states[:0], items, targets[:0]) == 0


def test_without_gradients_only_the_value_is_made():
    states, items, targets = inputs(5, 9)
    with torch.no_grad():
        loss = item_cross_entropy(states, items, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(states @ items.T, targets))


def test_only_one_input_may_need_a_gradient():
    states, items, targets = inputs(5, 9)
    items.requires_grad_()
    item_cross_entropy(states, items, targets).backward()
    found, items.grad = items.grad, None
    F.cross_entropy(states @ items.T, targets).backward()
    torch.testing.assert_close(found, items.grad)


def test_nan_is_not_hidden():
    states, items, targets = inputs(5, 9)
    states[2, 0] = float("nan")
    assert item_cross_entropy(states, items, targets).isnan()


def test_a_temperature_makes_cosines_and_none_leaves_products():
    states, items = torch.randn(3, 8) * 5, torch.randn(4, 8)
    expected = F.cosine_similarity(states[:, None], items[None], dim=2) / 0.1
    torch.testing.assert_close(queries(states, 0.1) @ keys(items, 0.1).T, expected)
    torch.testing.assert_close(queries(states, 0.0) @ keys(items, 0.0).T, states @ items.T)


@pytest.mark.parametrize("model", [SASRec, BSARec, PMAT])
def test_scores_with_a_temperature_do_not_know_how_long_item_vectors_are(model, tiny, task):
    config = tiny(model.name, {f"{model.name}.temperature": 0.1}, dropout=False)
    torch.manual_seed(0)
    made, train = model(config, task.dataset.catalogue), task.split.train
    catalogue = task.dataset.catalogue
    data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
    made.prepare(data, torch.Generator().manual_seed(0))
    made.eval()
    batch = Batch(*map(torch.from_numpy, history_batch(train, np.arange(4), 16)))
    with torch.no_grad():
        scores = made.score(batch)
        assert scores.abs().max() <= 10.01 and scores.std() > 0.1
        if model is not PMAT:  # longer vectors of items that no history has change nothing
            unseen = [i for i in range(1, scores.shape[1] + 1) if not (batch.items == i).any()]
            made.items.weight[unseen] *= 7
            torch.testing.assert_close(made.score(batch), scores, atol=1e-4, rtol=1e-4)
    with torch.enable_grad():
        loss = sum(made.loss(batch._replace(targets=batch.items)).values())
    assert torch.isfinite(loss)
