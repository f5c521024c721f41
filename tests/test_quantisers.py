"""k-means, product quantisation and whitening, against planted structure and properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_parts.quantisers import (
    ProductQuantiser,
    assign,
    balanced_rotation,
    kmeans,
    lloyd,
    procrustes,
    whitened_pca,
)

quick = settings(max_examples=40, deadline=None, derandomize=True)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(n: int, width: int, seed: int = 0) -> Tensor:
    """Gaussian points whose neighbouring columns go together: the cut of plain PQ is a bad one."""
    axes = torch.randn(width, width, generator=random(seed + 1000))
    scales = 2.0 ** -torch.arange(width)
    return torch.randn(n, width, generator=random(seed)) @ (scales[:, None] * axes)


def planted(n_clusters: int, each: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Far apart centres [C, 4] and `each` points close to every one of them."""
    centres = 20 * torch.randn(n_clusters, 4, generator=random(7)) + offset
    noise = 0.1 * torch.randn(n_clusters * each, 4, generator=random(8))
    return centres, centres.repeat_interleave(each, dim=0) + noise


# ---- k-means -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_kmeans_finds_planted_clusters(offset: float) -> None:
    # far from the origin |x|^2 - 2xc + |c|^2 loses all its digits unless the points are centred
    centres, points = planted(12, 30, offset)
    found = kmeans(points, 12, random())
    nearest, index = torch.cdist(centres.double(), found.double()).min(1)
    assert sorted(index.tolist()) == list(range(12))
    assert nearest.max() < 0.2


def test_kmeans_is_decided_by_the_generator() -> None:
    points = correlated(300, 6)
    assert torch.equal(kmeans(points, 9, random(1)), kmeans(points, 9, random(1)))
    assert not torch.equal(kmeans(points, 9, random(1)), kmeans(points, 9, random(2)))


def test_kmeans_of_several_sets_clusters_each_alone() -> None:
    centres, points = planted(5, 40)
    found = kmeans(torch.stack([points, -points]), 5, random())
    assert found.shape == (2, 5, 4)
    for truth, books in ((centres, found[0]), (-centres, found[1])):
        assert torch.cdist(truth, books).min(1).values.max() < 0.2


def test_fewer_distinct_points_than_codes_leave_no_error() -> None:
    points = correlated(7, 3).repeat(4, 1)
    books = kmeans(points, 16, random())
    assert torch.isfinite(books).all()
    assert assign(points[None], books[None])[1].max() < 1e-8


def test_kmeans_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        kmeans(torch.empty(0, 3), 4, random())


def test_an_empty_cluster_starts_again_at_a_far_point() -> None:
    centres, points = planted(4, 25)
    useless = torch.full((1, 4), 1e4)  # nearest to nobody, and the last cluster has no centroid
    books = lloyd(points[None], torch.cat([centres[:3], useless])[None], 5)
    assert assign(points[None], books)[0][0].bincount().tolist() == [25] * 4


def test_many_empty_clusters_start_again_at_different_points() -> None:
    points = correlated(50, 4)
    useless = torch.full((20, 4), 1e4)
    books = lloyd(points[None], torch.cat([points[:1], useless])[None], 10)
    assert len(assign(points[None], books)[0].unique()) >= 20


def test_lloyd_steps_never_make_it_worse() -> None:
    points = correlated(400, 5)[None]
    books = points[:, :20]
    errors = [float(assign(points, lloyd(points, books, n))[1].sum()) for n in range(8)]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))


def test_blocks_of_distances_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    points, books = correlated(100, 6)[None], correlated(9, 6, seed=3)[None]
    codes, distance = assign(points, books)
    monkeypatch.setattr("model_parts.quantisers._BLOCK_NUMBERS", 70)
    again, distance_again = assign(points, books)
    assert torch.equal(codes, again)
    assert torch.equal(codes, torch.cdist(points, books).argmin(2))
    torch.testing.assert_close(distance, torch.cdist(points, books).min(2).values.square())
    torch.testing.assert_close(distance, distance_again)


# ---- product quantiser -------------------------------------------------------------------------


def test_codes_survive_the_round_trip() -> None:
    points = correlated(500, 12)
    quantiser = ProductQuantiser(12, 4, 16).fit(points, random())
    codes = torch.randint(16, (200, 4), generator=random(5))
    assert torch.equal(quantiser.encode(quantiser.decode(codes)), codes)
    quantised, own, loss = quantiser(points)
    assert torch.equal(quantiser.encode(quantised), own)
    torch.testing.assert_close(loss, (quantised - points).square().mean())


def test_each_point_gets_the_nearest_of_all_combinations() -> None:
    points = correlated(60, 6)
    quantiser = ProductQuantiser(6, 2, 5).fit(points, random())
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    nearest = every[torch.cdist(points, quantiser.decode(every)).argmin(1)]
    assert torch.equal(quantiser.encode(points), nearest)


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_rotation_beats_plain_cuts_on_correlated_data(seed: int) -> None:
    points = correlated(1000, 16, seed)
    plain = ProductQuantiser(16, 4, 16).fit(points, random(), n_polish=30, rotate=False)
    rotated = ProductQuantiser(16, 4, 16).fit(points, random())
    assert torch.equal(plain.rotation, torch.eye(16))
    assert rotated(points).loss < 0.9 * plain(points).loss


def test_the_rotation_is_orthogonal() -> None:
    eye = torch.eye(12)
    for points in (correlated(300, 12), torch.zeros(30, 12)):
        turn = ProductQuantiser(12, 3, 8).fit(points, random()).rotation
        torch.testing.assert_close(turn @ turn.T, eye, atol=1e-5, rtol=0)


def test_procrustes_recovers_a_planted_rotation() -> None:
    turn = torch.linalg.qr(torch.randn(6, 6, generator=random()))[0]
    points = torch.randn(50, 6, generator=random(1))
    torch.testing.assert_close(procrustes(points, points @ turn), turn, atol=1e-5, rtol=0)


def test_every_part_gets_a_fair_share_of_variance() -> None:
    points = torch.randn(4000, 8, generator=random()) * 2.0 ** -torch.arange(8)
    rotated = (points - points.mean(0)) @ balanced_rotation(points - points.mean(0), 2, random())
    volume = rotated.var(0).log().view(2, 4).sum(1)
    assert (volume[0] - volume[1]).abs() < 1.5  # 11 apart when cut in order


@pytest.mark.parametrize("rotate", [True, False])
def test_nearly_all_codes_are_used(rotate: bool) -> None:
    points = correlated(2000, 8)
    codes = ProductQuantiser(8, 4, 32).fit(points, random(), rotate=rotate).encode(points)
    used = [len(digit.unique()) for digit in codes.T]
    assert min(used) >= 31
    shares = torch.stack([digit.bincount(minlength=32) for digit in codes.T]) / len(points)
    perplexity = (-(shares * shares.clamp(min=1e-9).log()).sum(1)).exp()
    assert perplexity.min() > 16


def test_the_quantiser_is_decided_by_the_generator() -> None:
    points = correlated(300, 8)
    one, same, other = (ProductQuantiser(8, 2, 8).fit(points, random(s)) for s in (1, 1, 2))
    assert torch.equal(one.codebooks, same.codebooks) and torch.equal(one.rotation, same.rotation)
    assert not torch.equal(one.codebooks, other.codebooks)


def test_a_large_catalogue_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_parts.quantisers._POINTS_PER_CODE", 20)
    points = correlated(1000, 8)
    quantiser = ProductQuantiser(8, 2, 8).fit(points, random())
    assert quantiser(points).loss < 0.5 * points.var(0).mean()


def test_a_width_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="10 cannot be cut into 4"):
        ProductQuantiser(10, 4, 8)


def test_a_saved_quantiser_gives_the_same_codes() -> None:
    points = correlated(200, 8)
    quantiser = ProductQuantiser(8, 2, 8).fit(points, random())
    loaded = ProductQuantiser(8, 2, 8)
    loaded.load_state_dict(quantiser.state_dict())
    assert torch.equal(loaded.encode(points), quantiser.encode(points))


@quick
@given(
    n=st.integers(1, 40),
    digits=st.integers(1, 4),
    part=st.integers(1, 3),
    codes=st.integers(1, 12),
    rank=st.integers(0, 12),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    rotate=st.booleans(),
)
def test_any_data_quantise_sanely(
    n: int, digits: int, part: int, codes: int, rank: int, scale: float, rotate: bool
) -> None:
    """Few points, equal points, low rank: codes in range, no worse than everybody's mean."""
    width = digits * part
    source = torch.randn(n, rank, generator=random(1)).round()  # rounded: repeats are common
    points = scale * (source @ torch.randn(rank, width, generator=random(2)) + 1)
    quantiser = ProductQuantiser(width, digits, codes).fit(points, random(), rotate=rotate)
    quantised, own, loss = quantiser(points)
    assert own.shape == (n, digits) and own.dtype == torch.int64
    assert own.min() >= 0 and own.max() < codes
    assert quantised.shape == points.shape and torch.isfinite(quantised).all()
    mean_error = (points - points.mean(0)).square().mean()
    assert loss <= mean_error * (1 + 1e-3) + (1e-6 * scale) ** 2
    # codewords may coincide, what they stand for may not change
    again = quantiser.decode(quantiser.encode(quantised))
    torch.testing.assert_close(again, quantised, atol=1e-4 * scale, rtol=1e-4)


# ---- whitening ---------------------------------------------------------------------------------


def test_components_have_unit_variance_and_no_correlation_on_fitted_rows() -> None:
    features = correlated(600, 10) + 3
    fit_rows = torch.arange(600) < 400
    white = whitened_pca(features, fit_rows, 6)
    assert white.shape == (600, 6)
    torch.testing.assert_close(white[fit_rows].T.cov(), torch.eye(6), atol=2e-3, rtol=0)
    torch.testing.assert_close(white[fit_rows].mean(0), torch.zeros(6), atol=1e-3, rtol=0)


def test_whitening_keeps_the_axes_of_largest_variance() -> None:
    features = torch.randn(2000, 5, generator=random()) * torch.tensor([1.0, 9.0, 0.1, 3.0, 0.3])
    white = whitened_pca(features, torch.ones(2000, dtype=torch.bool), 2)
    correlation = torch.corrcoef(torch.cat([white, features], dim=1).T)[:2, 2:].abs()
    assert correlation.argmax(1).tolist() == [1, 3]
    assert correlation.max(1).values.min() > 0.99


def test_components_beyond_the_explained_variance_are_dropped() -> None:
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.tensor([4.0, 3.0, 0.3, 0.3, 0.3, 0.3])
    everything = torch.ones(400, dtype=torch.bool)
    assert whitened_pca(rows, everything, 6).shape[1] == 6
    assert whitened_pca(rows, everything, 6, explained=0.9).shape[1] == 2
    assert whitened_pca(rows, everything, 6, explained=0.5).shape[1] == 1


def test_components_that_only_hold_rounding_noise_are_dropped() -> None:
    low = torch.randn(500, 4, generator=random()) @ torch.randn(4, 64, generator=random(1)) + 5
    white = whitened_pca(low, torch.ones(500, dtype=torch.bool), 64)
    assert white.shape == (500, 4)
    torch.testing.assert_close(white.T.cov(), torch.eye(4), atol=1e-3, rtol=0)


def test_more_columns_than_items_whiten() -> None:
    features = torch.randn(6, 20, generator=random())
    assert whitened_pca(features, torch.ones(6, dtype=torch.bool), 20).shape == (6, 5)


@pytest.mark.parametrize("n_items", [10, 1000, 3001])
@pytest.mark.parametrize("value", [0.0, 0.1, 7.7])
def test_items_that_are_all_the_same_are_refused(n_items: int, value: float) -> None:
    # the mean of many equal floats is not quite that float: noise must not pass for a component
    with pytest.raises(ValueError, match="features of all items are the same"):
        whitened_pca(torch.full((n_items, 8), value), torch.ones(n_items, dtype=torch.bool), 4)


@pytest.mark.parametrize("n_fitted", [0, 1])
def test_whitening_needs_two_items(n_fitted: int) -> None:
    with pytest.raises(ValueError, match="at least two items"):
        whitened_pca(correlated(5, 3), torch.arange(5) < n_fitted, 2)


def test_rows_outside_the_fit_do_not_move_the_others() -> None:
    features, fit_rows = correlated(100, 6), torch.arange(100) < 90
    white = whitened_pca(features, fit_rows, 4)
    features[95:] += 100
    changed = whitened_pca(features, fit_rows, 4)
    assert torch.equal(changed[:95], white[:95])
    assert not torch.allclose(changed[95:], white[95:])
