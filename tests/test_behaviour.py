"""The modality made of train histories."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from model_parts.behaviour import behaviour_vectors, cooccurrence


class Histories(NamedTuple):
    items: np.ndarray
    offsets: np.ndarray


def histories(*users: list[int]) -> Histories:
    lengths = np.cumsum([0, *(len(user) for user in users)])
    return Histories(np.array([i for user in users for i in user], dtype=np.int32), lengths)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_counts_by_hand() -> None:
    counts = cooccurrence(histories([1, 2, 3], [2, 1], [4, 4]), 5, window=2).to_dense()
    expected = torch.zeros(5, 5)
    expected[0, 1] = expected[1, 0] = 2.0  # neighbours twice
    expected[1, 2] = expected[2, 1] = 1.0
    expected[0, 2] = expected[2, 0] = 0.5  # two steps apart
    assert torch.equal(counts, expected)  # users do not touch, nothing is its own neighbour


def test_items_taken_together_are_close_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.permutation(np.arange(1, 11) + 10 * (u % 3))[:6].tolist() for u in range(90)]
    vectors, known = behaviour_vectors(histories(*groups), 31, 8, random())
    assert known[:30].all()
    assert not known[30]
    assert torch.equal(vectors[30], torch.zeros(8))
    assert torch.allclose(vectors[:30].norm(dim=1), torch.ones(30), atol=1e-5)
    cosines = vectors[:30] @ vectors[:30].T
    same = torch.arange(30)[:, None] // 10 == torch.arange(30)[None] // 10
    assert cosines[same].mean() > cosines[~same].mean() + 0.3


def test_eigenvectors_are_those_of_the_matrix() -> None:
    rng = np.random.default_rng(1)
    train = histories(*(rng.integers(1, 13, 8).tolist() for _ in range(40)))
    counts = cooccurrence(train, 12).to_dense()
    totals = counts.sum(1)
    ratio = counts * totals.sum() / torch.outer(totals, totals)
    values, axes = torch.linalg.eigh(ratio.log1p())
    order = values.abs().argsort(descending=True)[:3]
    exact = torch.nn.functional.normalize(axes[:, order] * values[order].abs().sqrt(), dim=1)
    found, _ = behaviour_vectors(train, 12, 3, random())
    assert torch.allclose(found @ found.T, exact @ exact.T, atol=1e-3)


def test_width_beyond_the_catalogue_is_filled_with_zeros() -> None:
    vectors, _ = behaviour_vectors(histories([1, 2, 3]), 3, 6, random())
    assert vectors.shape == (3, 6)
    assert not vectors[:, 3:].any()


@pytest.mark.parametrize("users", [([],), ([1], [2])])
def test_histories_without_pairs_give_no_vectors(users: tuple[list[int], ...]) -> None:
    vectors, known = behaviour_vectors(histories(*users), 4, 2, random())
    assert not known.any()
    assert not vectors.any()
