"""Distances between Gaussians, and the attention made of them."""

from __future__ import annotations

import pytest
import torch

from model_parts.stochastic import (
    Gaussian,
    StochasticAttention,
    StochasticBlock,
    distance,
    distances,
    positive,
    ranking_losses,
)


def gaussians(*shape: int, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, raw = torch.randn(2, *shape, generator=generator)
    return Gaussian(mean, positive(raw))


def test_distance_by_hand():
    a = Gaussian(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))
    b = Gaussian(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 25.0]))
    assert float(distance(a, b)) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert float(distance(a, a)) == 0.0


def test_all_pairs_at_once_are_the_distances_one_by_one():
    a, b = gaussians(3, 5, 4), gaussians(3, 7, 4, seed=1)
    one_by_one = distance(Gaussian(*(x[:, :, None] for x in a)), Gaussian(*(x[:, None] for x in b)))
    torch.testing.assert_close(distances(a, b), one_by_one)


def test_distances_keep_their_precision_under_autocast():
    a, b = gaussians(5, 4), gaussians(7, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a.mean @ b.mean.T).dtype == torch.bfloat16
        found = distances(a, b)
    assert torch.equal(found, distances(a, b))


def test_a_covariance_is_never_negative_and_its_root_has_a_slope_everywhere():
    raw = torch.tensor([-200.0, -1.0, 0.0, 3.0], requires_grad=True)
    cov = positive(raw)
    assert (cov >= 0).all()
    Gaussian(torch.zeros(4), cov).root().sum().backward()
    assert raw.grad.isfinite().all()


def test_ranking_losses_by_hand():
    def at(x: float) -> Gaussian:
        return Gaussian(torch.tensor([[x]]), torch.tensor([[1.0]]))

    bpr, hinge = ranking_losses(at(0.0), at(3.0), at(4.0))
    assert float(bpr) == pytest.approx(torch.nn.functional.softplus(torch.tensor(9.0 - 16.0)))
    assert float(hinge) == pytest.approx(9.0 - 1.0)  # the two items are nearer to each other
    assert float(ranking_losses(at(0.0), at(1.0), at(4.0))[1]) == 0.0


@torch.no_grad()
def test_the_first_position_attends_to_itself_and_nobody_to_what_follows():
    attention, x = StochasticAttention(8, 2, 0.0, encode_mean=True).eval(), gaussians(1, 5, 8)
    changed = Gaussian(*(part.clone() for part in x))
    changed.mean[:, 3:] += 1.0
    for before, after in zip(attention(x), attention(changed), strict=True):
        torch.testing.assert_close(before[:, :3], after[:, :3])
        assert not torch.allclose(before[:, 3:], after[:, 3:])
    alone = attention(Gaussian(*(part[:, :1] for part in x)))
    torch.testing.assert_close(alone.cov, attention(x).cov[:, :1])


@torch.no_grad()
def test_means_that_are_not_encoded_leave_as_they_came_but_steer_the_attention():
    block, x = StochasticBlock(8, 2, 0.0, encode_mean=False).eval(), gaussians(2, 5, 8)
    out = block(x)
    assert torch.equal(out.mean, x.mean)
    moved = block(Gaussian(x.mean.flip(1), x.cov))
    assert not torch.allclose(out.cov, moved.cov)
    assert (out.cov >= 0).all()


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="not a multiple"):
        StochasticAttention(8, 3, 0.0, encode_mean=False)
