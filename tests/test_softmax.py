"""The fused softmax against the plain one, in value and in both gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model_parts import softmax
from model_parts.softmax import item_cross_entropy


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
