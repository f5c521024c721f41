"""RMSNorm on a CPU: the values, gradients and types of PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_parts.rms_norm import RMSNorm


def _pair(width: int) -> tuple[RMSNorm, nn.RMSNorm]:
    own, theirs = RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
    with torch.no_grad():
        own.weight.copy_(torch.randn(width))
    theirs.load_state_dict(own.state_dict())
    return own, theirs


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8), (1, 1, 8)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    own, theirs = _pair(8)
    x = torch.randn(shape, requires_grad=True)
    pull = torch.randn(shape)
    found = torch.autograd.grad((own(x) * pull).sum(), [x, own.weight])
    wanted = torch.autograd.grad((theirs(x) * pull).sum(), [x, theirs.weight])
    torch.testing.assert_close(own(x), theirs(x))
    torch.testing.assert_close(found, wanted)


def test_the_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(1)
    norm = RMSNorm(4, eps=0.1).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(norm, {"weight": w}, x), norm.weight
    )


def test_an_input_of_zeros_stays_finite() -> None:
    norm = RMSNorm(4, eps=1e-6)
    x = torch.zeros(2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert norm(x).eq(0).all()
    assert x.grad.isfinite().all()


def test_mixed_precision_gives_what_a_linear_layer_makes_of_it() -> None:
    torch.manual_seed(2)
    own, theirs = _pair(16)
    linear = nn.Linear(16, 16)
    x = torch.randn(7, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x).dtype == torch.bfloat16
        found, wanted = linear(own(x)), linear(theirs(x))
    torch.testing.assert_close(found, wanted)
    found.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert own.weight.grad.dtype == torch.float32


def test_what_it_cannot_do_is_refused_rather_than_wrong() -> None:
    norm = RMSNorm(4, eps=1e-6)
    x = torch.randn(4, requires_grad=True)
    (slope,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
