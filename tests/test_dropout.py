"""Dropout and attention with dropout on a CPU: the law of PyTorch's own, from fewer draws."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_parts import dropout
from model_parts.dropout import Dropout, attend, drop


@given(st.integers(0, 70), st.floats(0.01, 0.99), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_component_is_dropped_or_made_larger(n, rate, seed):
    torch.manual_seed(seed)
    x = torch.arange(1.0, n + 1)
    y = drop(x, rate)
    torch.testing.assert_close(y[y != 0], x[y != 0] / (1 - rate), rtol=2e-3, atol=0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.85])
def test_the_rate_is_met_and_draws_are_independent(rate):
    torch.manual_seed(1)
    kept = drop(torch.ones(1000, 999), rate) > 0
    error = 4 * math.sqrt(rate * (1 - rate) / kept.numel())
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=error + 2**-16)
    for shift in (1, 2, 3, 4):  # neighbours share a draw of 64 bits
        both = kept.flatten()[shift:] & kept.flatten()[:-shift]
        assert float(both.float().mean()) == pytest.approx((1 - rate) ** 2, abs=4 * error)
    columns = kept.float().mean(0)
    spread = math.sqrt(rate * (1 - rate) / len(kept))
    assert float(columns.std()) == pytest.approx(spread, rel=0.1)


def test_the_gradient_goes_where_the_value_went():
    x = torch.randn(40, 3, requires_grad=True)
    y = drop(x, 0.4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_the_seed_decides_and_nothing_is_dropped_outside_of_training():
    x, layer = torch.randn(50, 7), Dropout(0.3)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert layer.eval()(x) is x
    assert drop(x, 0.0) is x
    assert drop(x, 1.0).abs().max() == 0 or drop(x, 1.0).count_nonzero() < 3


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_is_that_of_torch_where_nothing_falls_out(mask, scale, monkeypatch):
    monkeypatch.setattr(dropout, "drop", lambda x, rate: x)
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 4, 5, 8)
    visible = torch.rand(2, 1, 5, 5) < 0.5
    visible[..., 0] = True
    given = {"bool": visible, "added": torch.randn(2, 4, 5, 5).masked_fill(~visible, -math.inf)}
    arguments = (queries, keys, values, given.get(mask))
    ours = attend(*arguments, causal=mask == "causal", rate=0.5, scale=scale)
    theirs = F.scaled_dot_product_attention(*arguments, is_causal=mask == "causal", scale=scale)
    torch.testing.assert_close(ours, theirs)


def test_attention_drops_weights():
    torch.manual_seed(0)
    same = torch.ones(1, 1, 4000, 4)
    mixed = attend(same[:, :, :2], same, same, rate=0.25)
    assert mixed.std() > 0
    torch.testing.assert_close(mixed, torch.ones_like(mixed), atol=0.05, rtol=0)
