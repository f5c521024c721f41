"""RPG: the tokenizer, the size of the paper, scores and both ways to decode."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baseline_models.rpg import RPG
from config import Config
from model_parts.base import Batch, TrainingData, count_parameters
from model_parts.trie import NOT_FOUND

N_ITEMS = 60


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_config(**own: Any) -> Config:
    """A model small enough to train in a blink; `own` settings of RPG."""
    config = Config()
    config.data.max_history = 8
    small = {"digits": 4, "codes": 8, "width": 16, "heads": 2, "inner": 32, "pca": 8}
    config.rpg = dataclasses.replace(config.rpg, **(small | own))
    return config


def make_data(n_items: int = N_ITEMS, **modalities: Any) -> TrainingData:
    """Items 1..N-5 occur in train. Without `modalities` there are 12 text features of all items."""
    if not modalities:
        features = np.random.default_rng(0).normal(size=(n_items, 12)).astype(np.float32)
        modalities = {"text": (features, np.ones(n_items, dtype=bool))}
    train = SimpleNamespace(items=np.arange(1, n_items - 4, dtype=np.int32))
    catalogue = SimpleNamespace(
        modalities=modalities, item_ids=[str(item) for item in range(n_items)]
    )
    return TrainingData(train, catalogue, 3, n_items)


def make_model(data: TrainingData | None = None, seed: int = 0, **own: Any) -> RPG:
    """A prepared model in evaluation mode."""
    data = data or make_data()
    torch.manual_seed(0)
    model = RPG(make_config(**own), data.catalogue)
    model.prepare(data, random(seed))
    return model.eval()


def make_batch(n_items: int = N_ITEMS) -> Batch:
    """Five users with histories of 8, 5, 3, 1 and 0 items."""
    lengths = torch.tensor([8, 5, 3, 1, 0])
    walks = torch.randint(1, n_items + 1, (5, 9), generator=random(3))
    inside = torch.arange(8) < lengths[:, None]
    return Batch(torch.arange(5), walks[:, :8] * inside, lengths, walks[:, 1:] * inside)


# ---- size and training -------------------------------------------------------------------------


@pytest.mark.parametrize(("digits", "size"), [(16, 8_528_384), (32, 13_581_824)])
def test_the_size_is_the_papers(digits: int, size: int) -> None:
    config = Config()
    config.rpg = dataclasses.replace(config.rpg, digits=digits)
    with torch.device("meta"):  # nothing is allocated
        assert count_parameters(RPG(config)) == size


def test_finite_gradients_reach_every_parameter() -> None:
    model = make_model().train()
    model.loss(make_batch())["digits"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_loss_is_cross_entropy_of_the_next_items_digits() -> None:
    model, batch = make_model(), make_batch()
    total, count = 0.0, 0
    for user in range(5):
        for length in range(1, int(batch.lengths[user]) + 1):
            history = batch.items[user : user + 1, :length]
            scores = model.score(Batch(batch.users[:1], history, torch.tensor([length]), history))
            total -= float(scores[0, batch.targets[user, length - 1] - 1].detach())
            count += 1
    assert float(model.loss(batch)["digits"].detach()) == pytest.approx(total / count, rel=1e-4)


def test_one_batch_can_be_learned_by_heart() -> None:
    model = make_model(embedding_dropout=0.0, attention_dropout=0.0, width=32).train()
    batch = make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss = model.loss(batch)["digits"]
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    scores = model.eval().score(batch)
    rows = torch.arange(4)  # the last user has no history
    wanted = scores[rows, batch.targets[rows, batch.lengths[:4] - 1] - 1]
    # an item with the very same ID may tie
    assert (scores[:4] > wanted[:, None] + 1e-4).sum() == 0


# ---- tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["opq", "random"])
def test_codes_are_decided_by_the_seed(tokenizer: str) -> None:
    one, same, other = (make_model(seed=s, tokenizer=tokenizer).codes for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (N_ITEMS, 4)
    assert one.min() >= 0 and one.max() < 8


def test_code_vectors_begin_as_long_whatever_codes_are() -> None:
    def length(start: bool, tokenizer: str) -> float:
        model = make_model(start_from_codewords=start, tokenizer=tokenizer)
        return float(model.tokens.weight[1:-1].detach().norm(dim=1).mean())

    assert length(True, "random") == pytest.approx(length(True, "opq"), rel=0.1)
    assert length(False, "opq") < 0.2 * length(True, "opq")


def test_similar_items_get_similar_codes() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(6, 12))
    features = np.repeat(centres, 10, axis=0) + 0.05 * rng.normal(size=(60, 12))
    codes = make_model(make_data(text=(features, np.ones(60, dtype=bool))), pca=4).codes
    overlap = (codes[:, None] == codes).float().mean(2)
    group = torch.arange(60) // 10
    same = group[:, None] == group
    assert overlap[same].mean() > overlap[~same].mean() + 0.4


def test_items_outside_train_do_not_touch_the_other_codes() -> None:
    data = make_data()
    before = make_model(data).codes
    features = data.catalogue.modalities["text"][0].copy()
    features[-1] = 100 * features[-1] + 7  # item 60 is in nobody's train history
    after = make_model(make_data(text=(features, np.ones(N_ITEMS, dtype=bool)))).codes
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_items_without_text_get_codes_of_their_own() -> None:
    data = make_data()
    features, present = data.catalogue.modalities["text"]
    present = present.copy()
    present[10:30] = False
    codes = make_model(make_data(text=(features * present[:, None], present))).codes
    assert len(codes[10:30].unique(dim=0)) >= 19  # not all at the mean vector
    # and what their rows hold does not matter
    odd = np.where(present[:, None], features, np.float32(1e6))
    assert torch.equal(make_model(make_data(text=(odd, present))).codes, codes)


def test_a_catalogue_without_features_is_refused() -> None:
    empty = make_data()._replace(catalogue=SimpleNamespace(modalities={}, item_ids=["a"] * N_ITEMS))
    model = RPG(make_config(), empty.catalogue)
    with pytest.raises(ValueError, match="needs item features"):
        model.prepare(empty, random())
    make_model(empty, tokenizer="random")  # the way out that the message names


def test_without_text_the_other_modalities_are_used() -> None:
    features = np.random.default_rng(2).normal(size=(N_ITEMS, 5)).astype(np.float32)
    present = np.ones(N_ITEMS, dtype=bool)
    data = make_data(visual=(features, present), audio=(features[:, ::-1].copy(), present))
    assert make_model(data).describe()["unique_ids"] > 0.5


@pytest.mark.parametrize(("columns", "digits"), [(3, 8), (6, 4), (12, 16)])
def test_fewer_components_than_digits_still_tell_items_apart(columns: int, digits: int) -> None:
    features = np.random.default_rng(4).normal(size=(N_ITEMS, columns)).astype(np.float32)
    model = make_model(make_data(text=(features, np.ones(N_ITEMS, dtype=bool))), digits=digits)
    assert min(len(digit.unique()) for digit in model.codes.T) >= 6
    assert model.describe()["unique_ids"] > 0.8


# ---- scores ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("digits", [4, 8])
def test_no_modality_is_left_out_when_digits_do_not_divide_the_components(digits: int) -> None:
    draw, known = np.random.default_rng(1), np.ones(N_ITEMS, dtype=bool)

    def features(width: int) -> tuple[np.ndarray, np.ndarray]:
        return draw.normal(size=(N_ITEMS, width)).astype(np.float32), known

    text, audio, other = features(9), features(2), features(2)
    codes = [
        make_model(make_data(text=text, audio=last), digits=digits, pca=0, features="all").codes
        for last in (audio, other)
    ]
    assert not torch.equal(*codes)


def test_scores_are_mean_log_probabilities_of_digits() -> None:
    model, batch = make_model(), make_batch()
    states = model.encode(batch)
    for user, length in enumerate(batch.lengths.tolist()):
        state = states[user, length - 1] if length else torch.zeros(16)
        heads = state + F.silu(model.heads(state)).view(4, 16)  # [m, d]
        tokens = model.tokens.weight[1:-1].view(4, 8, 16)
        logits = torch.cosine_similarity(heads[:, None], tokens, dim=2) / model.own.temperature
        table = torch.log_softmax(logits, dim=1)
        exact = torch.stack([table[torch.arange(4), codes].mean() for codes in model.codes])
        torch.testing.assert_close(model.score(batch)[user], exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_item_enters_as_the_mean_of_its_tokens() -> None:
    model = make_model(layers=1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(Batch(*(torch.tensor(part) for part in ([0], [[9]], [1], [[0]]))))
    rows = model.codes[8] + 8 * torch.arange(4) + 1
    expected = model.tokens.weight[rows].mean(0) + model.positions.table.weight[0]
    torch.testing.assert_close(seen[0][0, 0], expected)


@torch.no_grad()
def test_the_graph_with_all_edges_ranks_as_exhaustive_scoring() -> None:
    batch = make_batch()
    graph = make_model(decoding="graph", edges=N_ITEMS, beams=2, steps=1)
    exact = make_model(decoding="exhaustive")
    torch.testing.assert_close(graph.score(batch), exact.score(batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_graph_scores_what_it_visits_and_nothing_else() -> None:
    batch = make_batch()
    walked = make_model(decoding="graph", edges=5, beams=3, steps=2).score(batch)
    exact = make_model().score(batch)
    visited = walked > NOT_FOUND
    assert (visited.sum(1) >= 5).all() and (visited.sum(1) <= 15).all()
    torch.testing.assert_close(walked[visited], exact[visited], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_catalogue_smaller_than_the_beam_is_ranked() -> None:
    model = make_model(make_data(8), decoding="graph")  # 20 beams, 200 edges
    items = model.recommend(make_batch(8), 8, mask_seen=False)
    assert items.sort(dim=1).values.tolist() == [list(range(1, 9))] * 5


@torch.no_grad()
def test_what_the_walk_did_not_reach_comes_before_what_was_seen() -> None:
    batch = make_batch()
    found = make_model(decoding="graph", edges=3, beams=2, steps=1).recommend(batch, 20)
    seen = (found[:, :, None] == batch.items[:, None]).any(2)
    assert not seen.any()


@torch.no_grad()
def test_new_weights_get_a_new_graph() -> None:
    batch = make_batch()
    model = make_model(decoding="graph", edges=5, beams=3)
    clone = copy.deepcopy(model)
    clone.score(batch)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.tokens.weight, generator=random(9))
    # a copy must forget its own graph, not that of the model it was copied from
    clone.load_state_dict(other.state_dict())
    assert torch.equal(clone.graph(), other.graph())
    assert torch.equal(clone.score(batch), other.score(batch))


def test_training_gets_a_new_graph() -> None:
    model = make_model(decoding="graph", edges=5)
    model.score(make_batch())
    model.train().loss(make_batch())["digits"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    fresh = make_model(decoding="graph", edges=5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.graph(), fresh.graph())
