"""The grid of blends, modality attention, codes of blends by table look-up, chunked losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_parts.chunked import chunked_sum
from model_parts.fusion import (
    ModalityAttention,
    coherence,
    nearest_grid_point,
    next_grid_points,
    random_grid_points,
    simplex_grid,
)
from model_parts.quantisers import BlendQuantiser

quick = settings(max_examples=30, deadline=None, derandomize=True)
B, S, C, Z = 5, 7, 6, 8


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the grid ----------------------------------------------------------------------------------


@quick
@given(st.integers(1, 4), st.integers(1, 6))
def test_grid_has_every_split_once(modalities: int, resolution: int) -> None:
    grid = simplex_grid(modalities, resolution)
    assert len(grid) == math.comb(resolution + modalities - 1, modalities - 1)
    assert len(grid.unique(dim=0)) == len(grid)
    assert torch.allclose(grid.sum(1), torch.ones(len(grid)))
    spread = grid.max(1).values - grid.min(1).values
    assert spread[0] == spread.min()


@quick
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 5))
def test_nearest_point_is_the_nearest(seed: int, modalities: int, resolution: int) -> None:
    grid = simplex_grid(modalities, resolution)
    weights = torch.randn(modalities, 40, generator=random(seed)).softmax(0)
    distance = (weights.T[:, None] - grid).norm(dim=2)
    chosen = distance.gather(1, nearest_grid_point(weights, grid)[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-5)


def test_next_point_has_one_step_more() -> None:
    grid = simplex_grid(3, 4)
    at = {tuple((4 * point).int().tolist()): index for index, point in enumerate(grid)}
    towards = next_grid_points(grid)
    for m, point, expected in [
        (0, (1, 1, 2), (2, 1, 1)),
        (2, (1, 3, 0), (1, 2, 1)),
        (1, (4, 0, 0), (3, 1, 0)),
        (1, (0, 4, 0), (0, 4, 0)),
    ]:
        assert towards[m, at[point]] == at[expected]
    for m, row in enumerate(towards):
        gained = grid[row, m] - grid[:, m]
        assert torch.equal(gained, torch.where(grid[:, m] < 1, 0.25, 0.0))


def test_random_points_are_fixed_and_follow_the_law() -> None:
    law = torch.tensor([0.5, 0.3, 0.2])
    users, rows = torch.arange(200)[:, None], torch.arange(300)[None]
    points = random_grid_points(users, rows, law)
    assert torch.equal(points[3:4, 5:6], random_grid_points(users[3:4], rows[:, 5:6], law))
    shares = torch.bincount(points.flatten()) / points.numel()
    assert torch.allclose(shares, law, atol=0.01)
    assert abs(float(torch.corrcoef(torch.stack([points[0], points[1]]).float())[0, 1])) < 0.15


# ---- the attention -----------------------------------------------------------------------------


def some(level: str) -> tuple[ModalityAttention, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    attention = ModalityAttention(C, Z, 3, 4, level)
    present = torch.rand(S, 3, generator=random()) > 0.3
    present[0], present[1] = True, False
    latents = F.normalize(torch.randn(S, 3, Z, generator=random(1)), dim=2) * present[..., None]
    return attention, torch.randn(B, C, generator=random(2)), latents, present


@pytest.mark.parametrize("level", ["user_item", "user", "item", "none"])
def test_weights_are_a_distribution_over_what_an_item_has(level: str) -> None:
    attention, context, latents, present = some(level)
    weights = attention(context, latents, present)
    assert weights.shape == (3, B, S)
    assert torch.allclose(weights.sum(0), torch.ones(B, S))
    missing = (~present).T[:, None].expand(-1, B, -1) & present.any(1)
    assert float(weights[missing].detach().abs().max()) == 0.0
    if level in ("item", "none"):
        assert torch.allclose(weights[:, :1].expand(-1, B, -1), weights)
    if level == "none":
        assert torch.allclose(weights[:, 0, 0], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("level", ["user_item", "user", "item", "none"])
def test_pairs_are_entries_of_the_whole(level: str) -> None:
    attention, context, latents, present = some(level)
    whole = attention(context, latents, present)
    users, items = torch.tensor([0, 3, 4, 4]), torch.tensor([2, 6, 0, 1])
    pairs = attention.pairs(context[users], latents[items], present[items])
    assert torch.allclose(pairs, whole[:, users, items], atol=1e-6)


def test_attention_is_its_formula() -> None:
    attention, context, latents, present = some("user_item")
    present[:] = True
    u, i = 2, 3
    query = attention.query(context[u]).view(3, 4)
    key = attention.key(latents[i])
    logits = (query * key).sum(1) / math.sqrt(4) + attention.of_user(context[u])
    found = attention(context, latents, present)[:, u, i]
    assert torch.allclose(found, logits.softmax(0), atol=1e-6)


def test_coherence_is_the_mean_cosine_of_pairs() -> None:
    rows = F.normalize(torch.randn(6, 1, Z, generator=random()), dim=2)
    cosines = rows[:, 0] @ rows[:, 0].T
    expected = (cosines.sum() - 6) / 30
    found = coherence(rows.sum(0), torch.tensor([6]))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert coherence(rows[0], torch.tensor([1])).item() == 0.0
    shrunk = coherence(rows.sum(0), torch.tensor([6]), prior=10.0)
    assert shrunk.item() == pytest.approx(expected.item() * 30 / 40, abs=1e-6)


# ---- codes of blends ---------------------------------------------------------------------------


def fitted() -> tuple[BlendQuantiser, torch.Tensor]:
    latents = F.normalize(torch.randn(300, 2, Z, generator=random()), dim=2)
    weights = torch.rand(300, 2, 1, generator=random(1))
    quantiser = BlendQuantiser(2, Z, 4, 8)
    return quantiser.fit(latents * weights, random(2)), latents


@quick
@given(st.integers(0, 10_000))
def test_table_codes_are_the_nearest_codewords_of_the_blend(seed: int) -> None:
    """digit_l = argmax <x_l, c> over unit codewords = argmin |x_l / |x_l| - c|, with no tables."""
    quantiser, latents = fitted()
    weights = torch.rand(2, 300, generator=random(seed)).softmax(0)
    codes = quantiser.codes(quantiser.tables(latents), weights)
    blend = (latents * weights.T[..., None]).view(300, 2, 4, Z // 4)
    for digit in range(4):
        words = quantiser.codebooks[digit].flatten(1)
        part = F.normalize(blend[:, :, digit].flatten(1), dim=1)
        distance = torch.cdist(part, words)
        chosen = distance.gather(1, codes[:, digit : digit + 1])[:, 0]
        assert torch.allclose(chosen, distance.min(1).values, atol=1e-3)


def test_atlas_is_exact_on_the_grid() -> None:
    quantiser, latents = fitted()
    grid = simplex_grid(2, 4)
    atlas = quantiser.atlas(latents, grid, block=64)
    for point, weights in enumerate(grid):
        exact = quantiser.codes(quantiser.tables(latents), weights[:, None].expand(-1, 300))
        assert torch.equal(atlas[point], exact)
    assert bool((atlas[1] != atlas[2]).any())


def test_length_of_a_blend_does_not_matter() -> None:
    quantiser, latents = fitted()
    weights = torch.rand(2, 300, generator=random(5))
    tables = quantiser.tables(latents)
    assert torch.equal(quantiser.codes(tables, weights), quantiser.codes(tables, 0.3 * weights))


def test_codewords_are_unit_and_stand_for_unit_blends() -> None:
    quantiser, latents = fitted()
    lengths = quantiser.codebooks.flatten(2).norm(dim=2)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
    even = torch.full((2, 300), 0.5)
    decoded = quantiser.decode(quantiser.codes(quantiser.tables(latents), even))
    blends = F.normalize((latents * 0.5).flatten(1), dim=1)
    assert torch.allclose(decoded.flatten(1).norm(dim=1), torch.ones(300), atol=1e-5)
    assert float((decoded.flatten(1) * blends).sum(1).mean()) > 0.7


# ---- a loss in chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunks_give_the_plain_loss_and_gradients(rows: int) -> None:
    def loss(x, labels, table):
        return F.cross_entropy(x @ table.T, labels, reduction="sum")

    x = torch.randn(10, 3, generator=random(), requires_grad=True)
    table = torch.randn(6, 3, generator=random(1), requires_grad=True)
    labels = torch.arange(10) % 6
    plain = loss(x, labels, table)
    expected = torch.autograd.grad(plain, [x, table])
    found = chunked_sum(loss, (x, labels), (table,), rows)
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(2 * found, [x, table]), expected, strict=True):
        assert torch.allclose(one, 2 * other, atol=1e-5)


def test_chunks_pass_by_what_wants_no_gradient() -> None:
    x = torch.randn(4, 3, generator=random(), requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    total = chunked_sum(lambda a, b, c: (a * b).sum(), (x,), (torch.ones(3), unused), 2)
    total.backward()
    assert torch.equal(x.grad, torch.ones(4, 3))
    assert unused.grad is None or not bool(unused.grad.any())
