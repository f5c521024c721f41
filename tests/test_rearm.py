"""REARM: numbers of the official code, size of the paper, graphs and losses by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_toys import (
    assert_same_gradients,
    dense,
    load_weights,
    prefix_batch,
    random_toy,
    reference,
    toy_data,
)

from baseline_models import rearm
from baseline_models.rearm import (
    REARM,
    MetaTransform,
    co_occurrence_edges,
    shares_of,
    similarity,
)
from config import Config
from model_parts.base import TrainingData, count_parameters
from model_parts.collaborative import Triples
from model_parts.graphs import Edges, Neighbours, SparseGraph, co_occurrence

SMALL = {"width": 8, "self_dropout": 0.0, "cross_dropout": 0.0}


def make(data: TrainingData, **own: Any) -> REARM:
    config = Config()
    config.rearm = dataclasses.replace(config.rearm, **(SMALL | own))
    torch.manual_seed(0)
    model = REARM(config, data.catalogue)
    model.prepare(data, torch.Generator().manual_seed(0))
    return model


# ---- numbers of the official code --------------------------------------------------------------

OFFICIAL_SETTINGS = {
    "layers": 3, "user_layers": 1, "item_layers": 2, "user_neighbours": 5, "item_neighbours": 4,
    "user_first": 0.2, "item_first": 0.3, "contrast": 0.3, "orthogonal": 0.2, "temperature": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return reference("rearm")


def stored_graph(matrix: torch.Tensor) -> SparseGraph:
    rows, columns = matrix.nonzero(as_tuple=True)
    return SparseGraph().fill(Edges(rows, columns, matrix[rows, columns]), tuple(matrix.shape))


@pytest.fixture
def model(official) -> REARM:
    """The toy of the reference on the official homogeneous graphs (some neighbours are drawn)."""
    there = np.ones(12, dtype=bool)
    modalities = {name: (official[name].numpy(), there) for name in ("visual", "text")}
    made = make(toy_data(official["pairs"], 14, 12, modalities), **OFFICIAL_SETTINGS)
    load_weights(made, official)
    made.user_graph = stored_graph(official["user_graph"])
    made.item_graph = stored_graph(official["item_graph"])
    return made.train()


def test_vectors_and_scores_are_the_official_ones(model, official):
    users, items = model.vectors()
    torch.testing.assert_close(users, official["users_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(items, official["items_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(users @ items.T, official["scores"], atol=1e-5, rtol=0)


def test_losses_and_gradients_are_the_official_ones(model, official, monkeypatch):
    triples = Triples(official["users"], official["positives"], official["negatives"])
    monkeypatch.setattr(model, "triples", lambda batch: triples)
    parts = model.loss(None)
    for name, value in parts.items():
        torch.testing.assert_close(value, official[name], atol=1e-5, rtol=0)
    sum(parts.values()).backward()
    assert_same_gradients(model, official)
    assert model.user_meta.extract.weight.grad is None


def test_similarity_graphs_are_the_official_ones(model, official):
    features = [official["visual"], official["text"]]
    items = stored(similarity(features, None, 4, [0.3, 0.7]), 12)
    torch.testing.assert_close(items, official["similar_items"], atol=1e-6, rtol=0)
    means = dense(model.bipartite)
    means = means / means.sum(1, keepdim=True)
    users = stored(similarity([means @ x for x in features], None, 5, [0.2, 0.8]), 14)
    torch.testing.assert_close(users, official["similar_users"], atol=1e-6, rtol=0)


def stored(edges: Edges, n: int) -> torch.Tensor:
    return dense(SparseGraph().fill(edges, (n, n)))


@pytest.mark.parametrize(("side", "k", "by_items"), [("user", 5, False), ("item", 4, True)])
def test_co_occurrence_graphs_are_the_official_ones(model, official, side, k, by_items):
    found = co_occurrence(model.bipartite, k, by_items)
    n = len(found.values)
    weights = stored(co_occurrence_edges(found, torch.ones(n), torch.Generator()), n)
    counts = official[f"{side}_counts"].sort(dim=1, descending=True).values
    # rows whose k neighbours neither hang on a tie nor on a draw
    certain = (counts[:, k - 1] > counts[:, k]) & (counts[:, k - 1] > 0)
    assert certain.sum() >= 3
    torch.testing.assert_close(weights[certain], official[f"{side}_co"][certain], atol=1e-6, rtol=0)


# ---- size --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "items", "widths", "rank", "size"),
    [
        (19_445, 7_050, (4096, 384), 3, 121_181_797),  # Baby
        (35_598, 18_357, (4096, 384), 7, 246_682_981),  # Sports
        (22_363, 12_101, (512, 512), 3, 37_842_981),  # Beauty with CLIP features
    ],
)
def test_the_size_is_the_papers(users, items, widths, rank, size):
    shapes = {str(m): (np.broadcast_to(0.0, (items, w)), None) for m, w in enumerate(widths)}
    config = Config()
    config.rearm = dataclasses.replace(config.rearm, rank=rank)
    with torch.device("meta"):  # nothing is allocated
        model = REARM(config, SimpleNamespace(modalities=shapes, item_ids=range(items)))
        for table, width in ((model.users, 64), *zip(model.interests, widths, strict=True)):
            table.fill(torch.empty(users, width))
    frozen = 2 * (128 * 64 + 64) + 4  # meta knowledge, and biases without effect
    assert count_parameters(model) == size - frozen
    assert sum(p.numel() for p in model.parameters()) == size


# ---- graphs ------------------------------------------------------------------------------------


def test_neighbours_that_lack_are_drawn_and_strangers_get_the_most_active():
    values = torch.tensor([[3.0, 1.0, -torch.inf], [-torch.inf] * 3, [2.0, 2.0, 1.0]])
    columns = torch.tensor([[2, 1, 0], [0, 1, 2], [0, 1, 3]])
    degrees = torch.tensor([5, 0, 4, 1])
    found = Neighbours(
        torch.cat([values, torch.full((1, 3), -torch.inf)]), torch.cat([columns, columns[:1]])
    )
    edges = co_occurrence_edges(found, degrees, torch.Generator().manual_seed(0))
    weights = edges.weights.view(4, 3)
    neighbours = edges.columns.view(4, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert neighbours[0, :2].tolist() == [2, 1] and int(neighbours[0, 2]) in {1, 2}
    torch.testing.assert_close(weights[2], F.softmax(torch.tensor([2.0, 2.0, 1.0]), dim=0))
    assert neighbours[1].tolist() == [0, 2, 3]
    torch.testing.assert_close(weights[1], F.softmax(torch.tensor([0.5, 0.4, 0.1]), dim=0))


def test_a_user_without_train_items_gets_finite_vectors():
    data = random_toy()
    pairs = [(user, item) for user in range(19) for item in (user % 15, (user + 4) % 15)]
    data = toy_data(pairs, 20, 15, data.catalogue.modalities)  # user 19 has nothing
    users, items = make(data).vectors()
    assert users.isfinite().all() and items.isfinite().all()


def test_an_item_without_a_modality_is_in_nobodys_row():
    data = random_toy()
    parts = data.catalogue.modalities
    parts["visual"] = parts.pop("m0")
    parts["visual"][1][3] = False
    model = make(data, item_co=0.0, item_first=1.0, item_neighbours=4)
    graph = dense(model.item_graph)
    assert not graph[3].any() and not graph[:, 3].any()
    assert model.vectors()[1].isfinite().all()


def test_the_share_is_that_of_the_pictures():
    assert shares_of(["visual", "text"], 0.2) == pytest.approx([0.2, 0.8])
    assert shares_of(["audio", "visual", "text"], 0.2) == pytest.approx([0.4, 0.2, 0.4])
    assert shares_of(["text", "category"], 0.0) == [0.5, 0.5]
    assert shares_of(["visual"], 0.2) == [1.0]


def test_the_graph_of_items_mixes_both_kinds():
    data = random_toy()
    parts = [dense(make(data, item_co=share).item_graph) for share in (0.0, 1.0, 0.25)]
    torch.testing.assert_close(parts[2], 0.75 * parts[0] + 0.25 * parts[1])


# ---- network and losses ------------------------------------------------------------------------


@torch.no_grad()
def test_the_meta_transform_by_hand():
    meta = MetaTransform(6, 4, 2)
    content, ids = torch.randn(5, 6), torch.randn(5, 4)
    knowledge = content @ meta.extract.weight.T + meta.extract.bias
    down = F.normalize(meta.down(knowledge), dim=1).reshape(5, 4, 2)
    up = F.normalize(meta.up(knowledge), dim=1).reshape(5, 2, 4)
    down, up = down + down.mean(0), up + up.mean(0)
    expected = torch.stack(
        [ids[n] @ F.softmax(down[n], dim=0) @ F.softmax(up[n], dim=0) for n in range(5)]
    )
    torch.testing.assert_close(meta(content, ids), expected)


@torch.no_grad()
def test_features_of_an_item_attend_to_each_other():
    attention = rearm._scalar_attention(0.0).eval()
    x, asking = torch.randn(2, 3), torch.randn(2, 3)
    (wq, wk, wv), (bq, bk, bv) = attention.in_proj_weight[:, 0], attention.in_proj_bias
    logits = (asking * wq + bq)[:, :, None] * (x * wk + bk)[:, None, :]
    mixed = (F.softmax(logits, dim=2) @ (x * wv + bv)[:, :, None])[:, :, 0]
    expected = mixed * attention.out_proj.weight[0, 0]
    torch.testing.assert_close(rearm._attend(attention, asking, x), expected)


def test_orthogonality_by_hand():
    one = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # centred, rows of length 1 along the first axis
    other = torch.tensor([[0.0, 2.0], [0.0, -2.0]])  # along the second
    # products: only (first, second) = 1 + 1
    assert float(rearm._overlap(one, other)) == pytest.approx(4 / 4, rel=1e-4)
    assert float(rearm._overlap(one, torch.ones(2, 2))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("widths", [(5,), (5, 4, 3)])
def test_other_numbers_of_modalities_train(widths):
    data = random_toy(widths=widths)
    model = make(data).train()
    sum(model.loss(prefix_batch(data)).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    users, items = model.vectors()
    assert users.shape[1] == items.shape[1] == (len(widths) + 1) * 8
