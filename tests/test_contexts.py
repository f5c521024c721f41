"""Contexts of interactions: the encoder, its losses, how many contexts an item has, merging."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_parts.contexts import (
    ContextEncoder,
    SameTarget,
    condense,
    contexts_per_item,
    every_context,
    group_sizes,
    merge_rare,
    train_contexts,
)
from model_parts.contrastive import RandomPrefixes, two_view_loss


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def histories(*users: list[int]) -> SimpleNamespace:
    lengths = [len(user) for user in users]
    items = np.concatenate([np.array(user, dtype=np.int32) for user in users])
    return SimpleNamespace(items=items, offsets=np.concatenate([[0], np.cumsum(lengths)]))


# ---- encoder -----------------------------------------------------------------------------------


def test_a_context_has_seen_its_item_and_those_before_it() -> None:
    torch.manual_seed(0)
    encoder = ContextEncoder(9, 6, 8, 1, 2, 0.0).eval()
    train = histories([1, 2, 3, 4, 5, 6, 7, 8], [3, 2])
    contexts = every_context(encoder, train, window=4)
    assert contexts.shape == (10, 8)
    with torch.no_grad():
        torch.testing.assert_close(contexts[0], encoder(torch.tensor([[1]]))[0, 0])
        torch.testing.assert_close(contexts[7], encoder(torch.tensor([[5, 6, 7, 8]]))[0, 3])
        torch.testing.assert_close(contexts[9], encoder(torch.tensor([[3, 2, 0]]))[0, 1])


def test_two_views_against_the_formula() -> None:
    one, other = torch.randn(3, 4, generator=random(1)), torch.randn(3, 4, generator=random(2))
    both = F.normalize(torch.cat([one, other]), dim=1)
    total = 0.0
    for i in range(6):
        logits = [float(both[i] @ both[j]) / 0.5 for j in range(6) if j != i]
        total += math.log(sum(map(math.exp, logits))) - float(both[i] @ both[(i + 3) % 6]) / 0.5
    assert float(two_view_loss(one, other, 0.5)) == pytest.approx(total / 6, rel=1e-5)


def test_a_relative_is_another_prefix_with_the_same_target() -> None:
    train = histories([1, 2, 3], [4, 2, 5], [2, 6], [5, 2])
    prefixes = RandomPrefixes(train, 5)
    relatives = SameTarget(prefixes)
    chosen = torch.tensor([1, 2] * 50)  # the 2 of the first user, and a 3 that is alone
    found = relatives.draw(chosen, random())
    # the 2 that opens a history has none before it
    assert set(found[::2].tolist()) == {4, 9}
    assert set(found[1::2].tolist()) == {2}


def test_training_lowers_the_loss_of_the_next_item_and_then_freezes() -> None:
    torch.manual_seed(0)
    # 1 2 3 4 1 2 3 4 ...: the next item is certain
    train = histories(*[[(start + step) % 4 + 1 for step in range(6)] for start in range(20)])
    encoder = ContextEncoder(4, 6, 16, 1, 2, 0.1)
    train_contexts(encoder, RandomPrefixes(train, 6), 60, 16, 1e-2, 0.2, 0.07, random())
    with torch.no_grad():
        scores = encoder.last(torch.tensor([[1, 2, 3], [4, 1, 0]])) @ encoder.items.weight[1:].T
    assert (scores.argmax(1) + 1).tolist() == [4, 2]
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


# ---- how many contexts ---------------------------------------------------------------------------


def test_group_sizes_follow_the_gamma_density() -> None:
    # x^1 e^-x at 1, 2, 3: .3679, .2707, .1494, i.e. shares .4669, .3436, .1896
    assert group_sizes(3, 2.0) == pytest.approx([0.47, 0.34, 0.19])
    # the rounded shares add up to .99: each of the two largest gets half of the rest
    shares = group_sizes(10, 4.5)
    assert sum(shares) == pytest.approx(1)
    assert shares[2] == pytest.approx(0.215) and shares[3] == pytest.approx(0.215)
    assert shares[0] == 0.03 and shares[9] == 0.01


def test_any_shape_of_the_density_is_possible() -> None:
    shares = group_sizes(10, 1000.0)
    assert sum(shares) == pytest.approx(1) and shares[9] == pytest.approx(1)


def test_frequent_items_get_more_contexts() -> None:
    counts = torch.tensor([0, 1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 100])
    # 11 distinct counts; shares .47, .34, .19: five of them (1..40), three (50..70), the rest
    assert contexts_per_item(counts, 3, 2, 4, 2.0).tolist() == [
        1, 1, 2, 2, 2, 2, 6, 6, 6, 10, 10, 10, 10
    ]  # fmt: skip
    # an item met twice cannot have six contexts
    assert contexts_per_item(torch.tensor([2, 2]), 1, 6, 0, 2.0).tolist() == [1, 1]
    assert contexts_per_item(torch.tensor([5, 9]), 1, 1, 0, 2.0).tolist() == [1, 1]


# ---- condensation --------------------------------------------------------------------------------


def test_condensing_finds_the_two_ways_an_item_is_met() -> None:
    near = 0.01 * torch.randn(10, 2, generator=random())
    places = torch.tensor([[0.0, 0], [0, 0], [9, 9], [0, 0], [9, 9], [5, 5], [5, 5], [5, 5]])
    rows = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2])
    found = condense(places + near[:8], rows, torch.tensor([2, 1, 1]), random())
    assert found.owners.tolist() == [0, 0, 1, 2]
    assert sorted(found.counts.tolist()[:2]) == [2, 3] and found.counts.tolist()[2:] == [0, 3]
    big = found.vectors[:2][found.counts[:2].argmax()]
    torch.testing.assert_close(big, (places + near[:8])[[0, 1, 3]].mean(0))
    torch.testing.assert_close(found.vectors[2], (places + near[:8]).mean(0))


def test_rare_contexts_join_the_nearest() -> None:
    vectors = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    # 5 % joins 10 (then 45 %), 10 % joins 0 (then 55 %)
    into = merge_rare(torch.tensor([45.0, 10, 40, 5]), vectors, 0.2)
    assert into.tolist() == [0, 0, 2, 2]
    assert merge_rare(torch.tensor([45.0, 10, 40, 5]), vectors, 0.0).tolist() == [0, 1, 2, 3]
    # rarest first: 9 % joins 10 %, and together they may stay
    assert merge_rare(torch.tensor([81.0, 10, 9]), vectors[[0, 2, 3]], 0.15).tolist() == [0, 1, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1))
def test_what_is_left_is_frequent_enough(counts: list[int], least: float) -> None:
    numbers = torch.tensor(counts).float()
    into = merge_rare(numbers, torch.randn(len(counts), 3, generator=random()), least)
    assert torch.equal(into[into], into), "whatever others join stays itself"
    sums = torch.zeros(len(counts)).index_add_(0, into, numbers)
    left = sums[into.unique()]
    assert len(left) == 1 or bool((left >= least * numbers.sum() - 1e-6).all())
    assert sums.sum() == numbers.sum()
