"""Pctx: several semantic IDs an item, which one a context leads to, and how they are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from baseline_models.pctx import PersonalIDs, fuse, make_ids, merge_by_item
from config import Config
from config import Pctx as Settings
from model_parts.contexts import Condensed


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**own: Any) -> Settings:
    return dataclasses.replace(Config().pctx, **({"codes": 8, "digits": 3} | own))


def condensed(n_items: int = 20, each: int = 3, counts: tuple[int, ...] = (6, 5, 1)) -> Condensed:
    """`each` contexts of every item, far apart; the third one of an item is rare."""
    vectors = torch.randn(n_items * each, 6, generator=random())
    owners = torch.arange(n_items).repeat_interleave(each)
    return Condensed(vectors, owners, torch.tensor(counts).repeat(n_items))


def tables(n_items: int = 20, **own: Any) -> PersonalIDs:
    features = torch.randn(n_items, 5, generator=random(1))
    made = PersonalIDs(n_items, 6, 3)
    made.fill(**make_ids(condensed(n_items), features, settings(**own), random()))
    return made


# ---- making IDs ----------------------------------------------------------------------------------


def test_fused_vectors_hold_white_contexts_and_features() -> None:
    contexts, features = condensed(), torch.randn(20, 5, generator=random(1))
    x = fuse(contexts, features, 0.25)
    assert x.shape == (60, 6 + 5)
    torch.testing.assert_close(x[:, :6].var(0), torch.full((6,), 0.25**2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x[7, 6:], 0.75 * features[2])


def test_items_have_several_ids_and_no_two_items_share_one() -> None:
    made = tables(rare=0.0)
    per_item = made.first.diff()
    assert per_item.min() >= 1 and per_item.max() > 1 and per_item.sum() == len(made.codes)
    assert len(made.codes.unique(dim=0)) == len(made.codes)
    assert made.weights.sum() == 20 * 12


def test_equal_codes_of_one_item_are_one_id() -> None:
    made = tables(codes=2, digits=2, rare=0.0)  # one digit of two codes, and the last one
    for item in range(20):
        own = made.codes[made.first[item] : made.first[item + 1]]
        assert len(own[:, 0].unique()) == len(own) <= 2


def test_rare_ids_join_another_one_of_their_item() -> None:
    kept, merged = tables(rare=0.0), tables(rare=0.2)
    assert len(merged.codes) < len(kept.codes)
    shares = (
        merged.weights
        / torch.zeros(20).double().index_add_(0, merged.owners, merged.weights)[merged.owners]
    )
    assert bool((shares >= 0.2).all())
    assert merged.weights.sum() == kept.weights.sum(), "no interaction is lost"
    # every context still leads to an ID of its own item
    owners = torch.arange(20).repeat_interleave(3)
    assert torch.equal(merged.owners[merged.id_of_context], owners)


def test_items_are_merged_one_by_one() -> None:
    owners = torch.tensor([0, 0, 1, 2, 2, 2])
    counts = torch.tensor([9.0, 1, 1, 4, 5, 1])
    vectors = torch.tensor([[0.0], [1], [0], [5], [7], [8]])
    assert merge_by_item(owners, counts, vectors, 0.2).tolist() == [0, 0, 2, 3, 4, 4]


# ---- choosing IDs --------------------------------------------------------------------------------


def test_a_context_leads_to_the_nearest_one_of_its_item() -> None:
    made = tables(rare=0.2)
    contexts = condensed().vectors
    rows = torch.arange(20).repeat_interleave(3)
    shuffled = torch.randperm(60, generator=random(3))
    found = made.nearest(rows[shuffled], contexts[shuffled] + 0.01)
    assert torch.equal(found, made.id_of_context[shuffled])
    assert made.nearest(rows[:0], contexts[:0]).shape == (0,)


def test_ids_are_drawn_by_their_share_of_the_interactions() -> None:
    made = PersonalIDs(2, 1, 1)
    made.fill(
        codes=torch.arange(4)[:, None], first=torch.tensor([0, 1, 4]),
        weights=torch.tensor([5, 1, 2, 1]),
    )  # fmt: skip
    rows = torch.ones(4000, dtype=torch.long)
    found = made.drawn(rows, torch.rand(4000, generator=random()).double())
    shares = torch.bincount(found, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 0.25, 0.5, 0.25]), atol=0.03, rtol=0)
    assert made.drawn(torch.tensor([0, 1]), torch.tensor([0.0, 0.9999]).double()).tolist() == [0, 3]
    assert made.main.tolist() == [0, 2]


def test_tables_of_any_length_can_be_loaded() -> None:
    made, fresh = tables(), PersonalIDs(20, 6, 3)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.codes, made.codes) and torch.equal(fresh.main, made.main)
    with pytest.raises(RuntimeError):
        fresh.load_state_dict({"codes": made.codes})
