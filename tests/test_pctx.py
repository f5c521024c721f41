"""Pctx: several semantic IDs an item, which one a context leads to, and how they are read."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baseline_models.pctx import Pctx, PersonalIDs, fuse, make_ids, merge_by_item, votes
from config import Config
from config import Pctx as Settings
from model_parts.base import Batch, TrainingData, count_parameters
from model_parts.contexts import Condensed
from model_parts.trie import NOT_FOUND


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


# ---- the model -----------------------------------------------------------------------------------


def some_model(**own: Any) -> Pctx:
    """Six items; the first has three IDs, the third has two, the others one."""
    config = Config()
    config.data.max_history = 5
    small = {
        "codes": 8, "digits": 3, "width": 16, "layers": 1, "attention_heads": 2, "head_width": 8,
        "inner": 16, "dropout": 0.0, "context": 6, "context_layers": 1, "beams": 9, "passes": 1,
        "replace": 0.0,
    }  # fmt: skip
    config.pctx = dataclasses.replace(config.pctx, **(small | own))
    torch.manual_seed(0)
    model = Pctx(config, SimpleNamespace(item_ids=list("abcdef")))
    begin = torch.tensor([0, 3, 4, 6, 7, 8, 9])
    model.ids.fill(
        vectors=torch.randn(9, 6, generator=random()), begin=begin, first=begin,
        id_of_context=torch.arange(9), weights=torch.tensor([2.0, 5, 1, 1, 3, 4, 1, 1, 1]),
        codes=torch.randint(8, (9, 3), generator=random(2)),
    )  # fmt: skip
    model.set_codes(model.ids.codes[model.ids.main])
    return model.eval()


def test_the_generator_has_the_size_of_tigers() -> None:
    with torch.device("meta"):
        model = Pctx(Config())
    assert count_parameters(model) == 4_590_976


def some_batch() -> Batch:
    items = torch.tensor([[1, 3, 2, 1], [3, 0, 0, 0], [5, 1, 0, 0]])
    targets = torch.tensor([[0, 0, 0, 3], [1, 0, 0, 0], [0, 3, 0, 0]])
    return Batch(torch.arange(3), items, torch.tensor([4, 1, 2]), targets)


def log_probability(model: Pctx, batch: Batch, code: torch.Tensor) -> torch.Tensor:
    """Of one ID [L] after each history, digit by digit: [B]."""
    memory, start = model.read(batch)
    codes = code.expand(len(batch.users), -1)
    given = torch.cat([start[:, 0], model.tokens(model.code_rows(codes))[:, :-1]], dim=1)
    states = model.network.decode(given[:, None], memory)[0][:, 0]
    tables = model.digit_logits(states).log_softmax(2)  # [L, B, K]
    return tables.gather(2, codes.T[:, :, None])[:, :, 0].sum(0)


@torch.no_grad()
def test_an_item_scores_the_sum_of_the_probabilities_of_its_ids() -> None:
    model, batch = some_model(), some_batch()
    each = torch.stack([log_probability(model, batch, code) for code in model.ids.codes], dim=1)
    owned = [torch.logsumexp(part, dim=1) for part in each.split([3, 1, 2, 1, 1, 1], dim=1)]
    torch.testing.assert_close(model.score(batch), torch.stack(owned, dim=1), rtol=1e-4, atol=1e-4)


def test_histories_are_read_by_context_or_at_random() -> None:
    batch = some_batch()
    seen = batch.items > 0
    exact = some_model()
    contexts = exact.encoder(batch.items)[seen]
    wanted = exact.ids.codes[exact.ids.nearest(batch.items[seen] - 1, contexts)]
    assert torch.equal(exact.history_codes(batch)[seen], wanted)
    # two items of one history are the same, yet need not have the same ID
    mixed = some_model(replace=1.0).train()
    drawn = torch.stack([mixed.history_codes(batch)[0, 0] for _ in range(60)])
    own = mixed.ids.codes[:3].tolist()
    assert {tuple(code) for code in drawn.tolist()} == {tuple(code) for code in own}


def test_a_reading_is_repeated_and_readings_differ() -> None:
    model, batch = some_model(replace=1.0), some_batch()
    readings = []
    for reading in (0, 0, *range(1, 9)):
        model.reading = reading
        readings.append(model.history_codes(batch))
    assert torch.equal(readings[0], readings[1])
    assert any(not torch.equal(readings[0], other) for other in readings[2:])


def test_the_context_of_a_target_includes_it() -> None:
    model, batch = some_model(), some_batch()
    whole = torch.tensor([[1, 3, 2, 1, 3], [3, 1, 0, 0, 0], [5, 1, 3, 0, 0]])
    rows = torch.tensor([2, 0, 2])
    wanted = model.ids.nearest(rows, model.encoder.last(whole))
    assert torch.equal(model.target_codes(batch), model.ids.codes[wanted])


def test_votes_by_hand() -> None:
    nothing = NOT_FOUND
    first = torch.tensor([[-1.0, -2.0, -3.0, nothing]])
    second = torch.tensor([[-2.0, -1.0, nothing, nothing]])
    two = torch.tensor([2])
    found = votes([first, second], two)[0]
    # 1 / log2 2 = 1 and 1 / log2 3 = .6309; the third place is no longer counted
    torch.testing.assert_close(found[:2], torch.tensor([1.6309, 1.6309]), rtol=1e-3, atol=1e-3)
    assert found[2:].tolist() == [0, 0]
    likelier = votes([first, torch.tensor([[-1.5, -1.0, nothing, nothing]])], two)[0]
    assert likelier[0] > found[0], "of equal votes the likelier item wins"


def test_the_frozen_encoder_stays_in_evaluation_mode() -> None:
    model = some_model().train()
    assert model.training and model.network.training and not model.encoder.training
    sum(model.loss(some_batch()).values()).backward()
    assert all(p.grad is None for p in model.encoder.parameters())


def stage_one_data() -> TrainingData:
    """Items 1 to 12 occur in train, 13 and 14 do not."""
    users = torch.randint(1, 13, (30, 6), generator=random()).numpy()
    train = SimpleNamespace(items=users.flatten().astype("int32"), offsets=range(0, 181, 6))
    features = torch.randn(14, 8, generator=random(1)).numpy()
    catalogue = SimpleNamespace(
        item_ids=list(range(14)), modalities={"text": (features, [True] * 14)}
    )
    return TrainingData(train, catalogue, 30, 14)


@pytest.mark.parametrize(("own", "most"), [({}, 29), ({"start": 1, "step": 0}, 1)])
def test_stage_one_gives_several_ids_or_one(own: dict[str, int], most: int) -> None:
    data, config = stage_one_data(), Config()
    config.data.max_history = 5
    config.pctx = dataclasses.replace(
        config.pctx, context=8, tokenizer_steps=5, context_batch=16, codes=16, rare=0.0, **own
    )
    model = Pctx(config, data.catalogue)
    model.prepare(data, random())
    per_item = model.ids.first.diff()
    assert per_item.max() <= most and (most == 1 or per_item.max() > 1)
    assert per_item[12:].tolist() == [1, 1], "an item nobody met has one ID"
    assert model.ids.weights.sum() == 180 + 2
    assert torch.equal(model.item_ids(), model.ids.codes[model.ids.main])
