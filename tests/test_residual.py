"""Residual and cosine codes: round trips, usage, dead codes that revive, IDs made unique."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_parts.residual import (
    RQVAE,
    CosineQuantiser,
    ResidualQuantiser,
    colliding_share,
    repair_last_digit,
    revive,
    train_autoencoder,
    with_collision_digit,
)

quick = settings(max_examples=25, deadline=None, derandomize=True)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int = 200, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=random(seed))


def nested_clusters() -> tuple[Tensor, Tensor, Tensor]:
    """Points in 4 far groups of 4 nearer ones each, and both group numbers."""
    coarse = 100 * torch.eye(4).repeat_interleave(4 * 10, dim=0)
    fine = 10 * torch.eye(4).repeat_interleave(10, dim=0).repeat(4, 1)
    noise = 0.1 * torch.randn(160, 4, generator=random(1))
    group = torch.arange(16).repeat_interleave(10)
    return coarse + fine + noise, group // 4, group


def autoencoder(width: int = 6, seed: int = 0, **sizes: int) -> RQVAE:
    chosen = {"latent": 4, "digits": 2, "codes": 8, "hidden": 32, "depth": 1} | sizes
    return RQVAE(width, generator=random(seed), **chosen)


# ---- residual k-means --------------------------------------------------------------------------


def test_digits_go_from_coarse_to_fine() -> None:
    data, coarse, fine = nested_clusters()
    codes = ResidualQuantiser(4, 2, 4).fit(data, random()).encode(data)
    assert len(torch.unique(torch.stack([codes[:, 0], coarse], 1), dim=0)) == 4  # one to one
    assert len(codes.unique(dim=0)) == 16
    assert len(torch.unique(torch.cat([codes, fine[:, None]], 1), dim=0)) == 16


@quick
@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10_000))
def test_what_codes_stand_for_gets_the_same_first_code_and_more_levels_less_error(
    n, digits, n_codes, seed
) -> None:
    data = points(n, 3, seed)
    quantiser = ResidualQuantiser(3, digits, n_codes).fit(data, random(seed), n_iterations=5)
    quantised, codes, loss = quantiser(data)
    assert codes.shape == (n, digits) and codes.min() >= 0 and codes.max() < n_codes
    torch.testing.assert_close(quantiser.decode(codes), quantised)
    torch.testing.assert_close(loss, (quantised - data).square().mean())
    shorter = ResidualQuantiser(3, 1, n_codes)
    shorter.codebooks.copy_(quantiser.codebooks[:1])
    assert loss <= shorter(data).loss + 1e-5
    assert torch.equal(shorter.encode(data)[:, 0], codes[:, 0])


def test_every_code_is_used_and_as_many_points_as_codes_leave_no_error() -> None:
    data = points(300, 6)
    codes = ResidualQuantiser(6, 3, 16).fit(data, random()).encode(data)
    assert all(len(digit.unique()) == 16 for digit in codes.T)
    assert ResidualQuantiser(6, 1, 20).fit(data[:20], random())(data[:20]).loss < 1e-10


# ---- autoencoder -------------------------------------------------------------------------------


def test_quantising_sums_the_nearest_codewords_of_each_rest() -> None:
    model = autoencoder()
    torch.nn.init.normal_(model.codebooks, generator=random(2))
    latents = points(5, 4, seed=3)
    found = model.quantise(latents)
    for row, latent in enumerate(latents):
        rest = latent.clone()
        for level in range(2):
            code = (model.codebooks[level] - rest).square().sum(1).argmin()
            assert found.codes[row, level] == code
            rest = rest - model.codebooks[level, code]
        torch.testing.assert_close(found.quantised[row], latent - rest)
    latents = model.encoder(points(5))
    assert torch.equal(model.encode(points(5)), model.quantise(latents).codes)
    torch.testing.assert_close(model.leftovers(points(5))[0], latents)


def test_gradients_pass_straight_through_and_reach_all_parts() -> None:
    model = autoencoder()
    model.fit_codebooks(points(), random())
    latents = points(7, 4).requires_grad_()
    (3 * model.quantise(latents).quantised).sum().backward()
    torch.testing.assert_close(latents.grad, torch.full((7, 4), 3.0))
    assert model.codebooks.grad is None  # codewords move by their own loss only
    model(points(50)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_training_rebuilds_points_and_uses_all_codes() -> None:
    data, _, _ = nested_clusters()
    data = (data - data.mean(0)) / data.std()
    model = autoencoder(4, codes=6)
    train_autoencoder(model, data, random(), steps=300, batch_size=64, lr=1e-2)
    found = model(data)
    assert (found.quantised - data).square().mean() < 0.1 * data.square().mean()
    assert all(len(digit.unique()) >= 5 for digit in found.codes.T)
    torch.testing.assert_close(model.decode(found.codes), found.quantised)


def test_training_is_decided_by_the_generator() -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(made))  # must not matter
        model = autoencoder(seed=seed)
        train_autoencoder(model, points(), random(seed), steps=5)
        made.append(model.encode(points()))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_an_extra_loss_is_minimised_too_and_no_points_are_refused() -> None:
    model, data = autoencoder(), points()
    wanted = 2 * data[:, :4] + 1
    with pytest.raises(ValueError, match="at least one item"):
        train_autoencoder(model, data[:0], random(), steps=1)

    def extra(rows, latent):
        return 10 * (latent.quantised - wanted[rows]).square().mean()

    @torch.no_grad()
    def distance() -> float:
        return float((model.quantise(model.encoder(data)).quantised - wanted).square().mean())

    model.fit_codebooks(data, random())
    before = distance()
    train_autoencoder(model, data, random(), steps=150, lr=1e-2, extra=extra)
    assert distance() < 0.7 * before


def test_codes_follow_latents_that_another_loss_carries_away() -> None:
    model, data = autoencoder(codes=16), points(400)
    far = 50 * torch.randn(400, 4, generator=random(3))

    def extra(rows, latent):
        return (latent.quantised - far[rows]).square().mean()

    train_autoencoder(model, data, random(), steps=90, batch_size=64, lr=1e-2, extra=extra)
    with torch.no_grad():
        latents = model.encoder(data)
        rest = latents - model.quantise(latents).quantised
    assert rest.square().mean() < 0.35 * latents.var(0).mean()


def test_dead_codes_come_back_to_life() -> None:
    model, data = autoencoder(), points()
    with torch.no_grad():
        model.fit_codebooks(data, random())
        model.codebooks[0, 2:] = 1e3  # far from everything
    codes = model.encode(data)
    used = torch.zeros(2, 8, dtype=torch.bool).scatter_(1, codes.T, True)
    assert used[0].sum() == 2
    kept = model.codebooks[0, :2].clone()
    revive(model.codebooks, used, model.leftovers(data), random())
    assert len(model.encode(data)[:, 0].unique()) >= 6
    assert torch.equal(model.codebooks[0, :2], kept)


# ---- cosine ------------------------------------------------------------------------------------


def test_the_cosine_code_does_not_depend_on_length() -> None:
    quantiser, data = CosineQuantiser(2, 8, 4), torch.randn(100, 2, 4, generator=random())
    quantiser.start(data, random())
    codes = quantiser.encode(data)
    assert torch.equal(quantiser.encode(data * torch.rand(100, 2, 1, generator=random(1))), codes)
    cosines = torch.cosine_similarity(data[:, :, None], quantiser.codebooks[None], dim=3)
    assert torch.equal(cosines.argmax(2), codes)
    torch.testing.assert_close(quantiser.cosines(data), cosines)
    assert all(len(part.unique()) == 8 for part in codes.T)
    assert torch.equal(quantiser.encode(quantiser.decode(codes)), codes)  # round trip


def test_the_cosine_loss_pulls_codewords_and_vectors_together() -> None:
    quantiser, data = CosineQuantiser(2, 8, 4), torch.randn(50, 2, 4, generator=random())
    quantiser.start(data, random())
    data.requires_grad_()
    found = quantiser(data)
    words, directions = quantiser.decode(found.codes), torch.nn.functional.normalize(data, dim=2)
    torch.testing.assert_close(found.quantised, words)
    expected = 1.25 * (2 - 2 * (words * directions).sum(2)).mean()  # unit vectors
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    assert quantiser.codebooks.grad.abs().sum() > 0 and data.grad.abs().sum() > 0


# ---- unique IDs --------------------------------------------------------------------------------


@quick
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10_000))
def test_a_collision_digit_counts_within_equal_codes(n, digits, n_codes, seed) -> None:
    codes = torch.randint(n_codes, (n, digits), generator=random(seed))
    longer = with_collision_digit(codes, 64)
    assert torch.equal(longer[:, :-1], codes)
    assert colliding_share(longer) == 0.0
    met: dict[tuple, int] = {}
    for own, digit in zip(map(tuple, codes.tolist()), longer[:, -1].tolist(), strict=True):
        assert digit == met.get(own, 0)
        met[own] = digit + 1


def test_more_equal_items_than_codes_share_ids_evenly() -> None:
    longer = with_collision_digit(torch.zeros(10, 2, dtype=torch.int64), 4)
    assert torch.bincount(longer[:, 2]).tolist() == [3, 3, 2, 2]
    assert colliding_share(longer) == 1.0


def test_collisions_move_to_the_nearest_free_last_code() -> None:
    # items 0, 1, 2 share (0, 1); item 3 holds (0, 0), item 4 is elsewhere
    codes = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 0], [2, 1]])
    table = torch.tensor(
        [[9.0, 2.0, 3.0, 4.0], [0.1, 1.0, 5.0, 8.0], [0.1, 3.0, 1.0, 9.0]] + 2 * [[0.0] * 4]
    )
    repaired = repair_last_digit(codes, lambda rows: table[rows])
    # item 1 is nearest and stays; then item 0 takes code 2 (0 is held by item 3), item 2 gets 3
    assert repaired.tolist() == [[0, 2], [0, 1], [0, 3], [0, 0], [2, 1]]


@quick
@given(st.integers(1, 50), st.integers(2, 8), st.integers(0, 10_000))
def test_repair_leaves_only_what_no_code_is_left_for(n, n_codes, seed) -> None:
    codes = torch.randint(n_codes, (n, 2), generator=random(seed))
    table = torch.rand(n, n_codes, generator=random(seed + 1))
    repaired = repair_last_digit(codes, lambda rows: table[rows])
    assert torch.equal(repaired[:, 0], codes[:, 0])
    for first in codes[:, 0].unique():
        members = repaired[codes[:, 0] == first, 1]
        assert len(members.unique()) == min(len(members), n_codes)
