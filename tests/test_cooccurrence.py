"""Counts of items that meet, pairs mined from them, vectors made of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model_parts.cooccurrence import (
    are_strangers,
    cooccurrence_vectors,
    count_pairs,
    frequent_partners,
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def histories(*users: list[int]) -> SimpleNamespace:
    lengths = [len(user) for user in users]
    items = np.concatenate([np.array(user, dtype=np.int32) for user in users])
    return SimpleNamespace(items=items, offsets=np.concatenate([[0], np.cumsum(lengths)]))


def as_dict(met) -> dict[tuple[int, int], float]:
    pairs = zip(met.first.tolist(), met.second.tolist(), strict=True)
    return dict(zip(pairs, met.counts.tolist(), strict=True))


def test_pairs_are_counted_within_users_and_the_window() -> None:
    train = histories([1, 2, 3], [2, 1], [4], [3, 3])
    assert as_dict(count_pairs(train, 5, 10, random())) == {(0, 1): 2, (0, 2): 1, (1, 2): 1}
    assert as_dict(count_pairs(train, 5, 1, random())) == {(0, 1): 2, (1, 2): 1}


def test_what_chance_would_give_adds_up_to_what_happened() -> None:
    users = torch.randint(1, 9, (40, 12), generator=random()).tolist()
    met = count_pairs(histories(*users), 8, 50, random())
    share = met.totals / met.totals.sum()
    torch.testing.assert_close(
        met.expected, met.counts.sum() * 2 * share[met.first] * share[met.second]
    )
    assert met.totals.sum() == 2 * met.counts.sum()


def test_too_many_pairs_are_counted_on_a_sample_of_users(monkeypatch) -> None:
    train = histories(*[[user + 1, user + 2] for user in range(20)])
    everything = count_pairs(train, 30, 5, random())
    monkeypatch.setattr("model_parts.cooccurrence._MOST_PAIRS", 10)
    sampled = count_pairs(train, 30, 5, random())
    assert 0 < sampled.counts.sum() <= 10 < everything.counts.sum()


def test_partners_are_the_closest_by_normalised_count() -> None:
    train = histories([1, 2], [1, 2], [1, 3], [1, 3], [1, 3], [1, 4], [5, 4])
    met = count_pairs(train, 6, 5, random())
    interactions = torch.bincount(torch.tensor(train.items).long(), minlength=7)[1:].float()
    rows, partners = frequent_partners(met, interactions, k=1)
    # 1: c/sqrt = 2/sqrt(12), 3/sqrt(18), (4 was met once only); 4 and 5 have nobody met twice
    assert dict(zip(rows.tolist(), partners.tolist(), strict=True)) == {
        0: 2,
        1: 0,
        2: 0,
        3: 4,
        4: 3,
    }
    rows, partners = frequent_partners(met, interactions, k=5)
    assert partners[rows == 0].tolist() == [2, 1]


def test_strangers_met_no_more_often_than_by_chance() -> None:
    train = histories([1, 2], [1, 2], [3, 4], [3, 4], [1, 3])
    met = count_pairs(train, 6, 5, random())
    one, other = torch.tensor([0, 1, 0, 2, 5, 3]), torch.tensor([1, 0, 3, 0, 0, 3])
    # the pair (1, 3) was met once where chance gives .9; an item is no stranger to itself
    assert are_strangers(met, one, other).tolist() == [False, False, True, False, True, False]
    nobody = count_pairs(histories([1], [2]), 6, 5, random())
    assert are_strangers(nobody, one, other).tolist() == [True] * 5 + [False]


def test_items_that_meet_get_similar_vectors() -> None:
    users = [torch.randint(5, (6,), generator=random(u)) + 1 + 5 * (u % 2) for u in range(60)]
    met = count_pairs(histories(*[u.tolist() for u in users]), 11, 5, random())
    vectors = cooccurrence_vectors(met, 4, random())
    assert vectors.shape == (11, 4)
    cosines = F.normalize(vectors[:10], dim=1) @ F.normalize(vectors[:10], dim=1).T
    same = (torch.arange(10)[:, None] < 5) == (torch.arange(10)[None] < 5)
    assert cosines[same].mean() > cosines[~same].mean() + 0.5
    assert not vectors[10].any(), "nobody met the last item"


def test_vectors_rebuild_the_information_when_wide_enough() -> None:
    users = torch.randint(1, 9, (30, 4), generator=random(1)).tolist()
    met = count_pairs(histories(*users), 8, 2, random())
    wanted = torch.zeros(8, 8)
    wanted[met.first, met.second] = (met.counts / met.expected).log().clamp(min=0)
    wanted = wanted + wanted.T
    values, axes = torch.linalg.eigh(wanted)
    found = cooccurrence_vectors(met, 8, random())
    # U sqrt(S) up to signs and the order of equal values; no products of vectors have S < 0
    nearest = axes @ values.clamp(min=0).diag() @ axes.T
    torch.testing.assert_close(found @ found.T, nearest, rtol=1e-3, atol=1e-3)


def test_two_items_that_meet_only_each_other_get_equal_vectors() -> None:
    met = count_pairs(histories(*[[1 + 2 * (u % 5), 2 + 2 * (u % 5)] for u in range(30)]), 10, 2,
                      random())  # fmt: skip
    vectors = cooccurrence_vectors(met, 10, random())
    assert F.cosine_similarity(vectors[::2], vectors[1::2]).min() > 0.99


@pytest.mark.parametrize("window", [1, 50])
def test_a_history_of_one_item_has_no_pairs(window: int) -> None:
    assert not len(count_pairs(histories([1], [2]), 3, window, random()).counts)
