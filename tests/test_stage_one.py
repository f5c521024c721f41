"""The training loop and the random numbers that stages one share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_parts.stage_one import counted, minimise, seeded


def test_random_numbers_follow_from_the_generator_and_nothing_else_changes() -> None:
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        with seeded(torch.Generator().manual_seed(5)):
            drawn.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    with seeded(torch.Generator().manual_seed(6)):
        assert not torch.equal(torch.rand(3), drawn[0])


def test_a_gradient_is_taken_even_where_the_caller_wants_none() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad(), seeded(torch.Generator().manual_seed(0)):
        minimise(layer, lambda _: (layer(torch.ones(1, 1)) - 3).square().mean(), 300, lr=0.1)
    assert layer(torch.ones(1, 1)).item() == pytest.approx(3, abs=1e-2)
    assert not layer.training


def test_parameters_that_are_frozen_stay_and_no_step_changes_nothing() -> None:
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    weight, bias = layer.weight.item(), layer.bias.item()
    minimise(layer, lambda _: layer(torch.ones(1, 1)).square().mean(), 0, lr=0.1)
    assert layer.weight.item() == weight
    minimise(layer, lambda _: layer(torch.ones(1, 1)).square().mean(), 5, lr=0.1)
    assert layer.weight.item() != weight and layer.bias.item() == bias


def test_a_loss_that_is_not_finite_is_said_with_its_step() -> None:
    layer = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not finite at step 3"):
        minimise(layer, lambda step: layer.weight.sum() / (2 - step), 10, lr=0.1)


def test_a_long_stage_says_where_it_is(monkeypatch, caplog):
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr("model_parts.stage_one.time.monotonic", lambda: next(now))
    with caplog.at_level("INFO", logger="pmat"):
        assert list(counted(8)) == list(range(8))
    assert caplog.messages and caplog.messages[0].startswith("stage one: step 2 of 8")
