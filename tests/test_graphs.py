"""Sparse graphs against dense matrices, neighbours against brute force, negatives and pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_toys import dense, prefix_batch, random_toy, toy_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_parts import graphs
from model_parts.collaborative import GraphRecommender, bpr, item_features
from model_parts.contrastive import row_nce
from model_parts.graphs import (
    Edges,
    SparseGraph,
    Table,
    co_occurrence,
    column_means,
    draw_negatives,
    interaction_edges,
    isolated,
    joined,
    kept_edges,
    nearest,
    propagate,
    repeated,
    row_means,
    symmetric,
    symmetric_by_rows,
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graph_of(matrix: torch.Tensor) -> SparseGraph:
    rows, columns = matrix.nonzero(as_tuple=True)
    return SparseGraph().fill(Edges(rows, columns, matrix[rows, columns]), tuple(matrix.shape))


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=random(seed))
    return values * (torch.rand(rows, columns, generator=random(seed + 1)) < 0.3)


# ---- products ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_products_and_gradients_are_those_of_the_dense_matrix(n, m, seed):
    matrix = random_matrix(n, m, seed)
    graph = graph_of(matrix)
    for product, other, width in ((graph, matrix, m), (graph.transposed, matrix.T, n)):
        x = torch.randn(width, 3, generator=random(seed + 2)).requires_grad_()
        upstream = torch.randn(len(other), 3, generator=random(seed + 3))
        torch.testing.assert_close(product(x), other @ x, atol=1e-5, rtol=1e-5)
        product(x).backward(upstream)
        torch.testing.assert_close(x.grad, other.T @ upstream, atol=1e-5, rtol=1e-5)


def test_edges_of_one_place_add_up():
    edges = Edges(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), torch.tensor([0.5, 1.0, 2.0]))
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.5]])
    assert torch.equal(dense(SparseGraph().fill(edges, (2, 3))), expected)
    both = joined(edges, edges.scaled(2.0))
    assert torch.equal(dense(SparseGraph().fill(both, (2, 3))), 3 * expected)


def test_a_graph_without_edges_gives_zeros():
    graph = graph_of(torch.zeros(3, 4))
    assert torch.equal(graph(torch.ones(4, 2)), torch.zeros(3, 2))
    assert not graph.contains(torch.tensor([0, 2]), torch.tensor([1, 3])).any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_contains_every_edge_and_nothing_else(n, m, seed):
    matrix = random_matrix(n, m, seed)
    rows = torch.arange(n).repeat_interleave(m)
    columns = torch.arange(m).repeat(n)
    found = graph_of(matrix).contains(rows, columns)
    assert torch.equal(found, matrix[rows, columns] != 0)


def test_degrees_and_edges_come_back():
    matrix = random_matrix(5, 7)
    graph = graph_of(matrix)
    assert torch.equal(graph.row_degrees(), (matrix != 0).sum(1).int())
    assert torch.equal(graph.column_degrees(), (matrix != 0).sum(0).int())
    again = SparseGraph().fill(graph.edges(), (5, 7))
    assert torch.equal(dense(again), matrix)


def test_loading_gives_graphs_and_tables_the_stored_size():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.table = SparseGraph(), Table(3)

    full, empty = Model(), Model()
    full.graph = graph_of(random_matrix(5, 7))
    full.table.fill(torch.randn(5, 3))
    held = list(empty.parameters())  # as an optimiser would
    empty.load_state_dict(full.state_dict())
    assert torch.equal(dense(empty.graph), dense(full.graph))
    assert held[0] is empty.table.weight and torch.equal(held[0], full.table.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):  # a width is not for the data to say
        Table(4).load_state_dict(full.table.state_dict())


# ---- normalisation and propagation -------------------------------------------------------------


def test_repeated_interactions_are_one_edge():
    data = toy_data([(0, 2), (0, 2), (0, 1), (2, 0)], 3, 4, {})
    edges = interaction_edges(data.train)
    found = list(zip(edges.rows.tolist(), edges.columns.tolist(), strict=True))
    assert found == [(0, 1), (0, 2), (2, 0)]
    assert (edges.weights == 1).all()


def test_symmetric_normalisation_by_hand():
    edges = Edges(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.ones(3))
    found = dense(SparseGraph().fill(symmetric(edges, (3, 2)), (3, 2)))  # user 2 has nothing
    expected = torch.tensor([[1 / 2**0.5, 1 / 4**0.5], [0.0, 1 / 2**0.5], [0.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_normalisation_by_row_sums_by_hand():
    edges = Edges(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([1.0, 3.0, 1.0]))
    found = dense(SparseGraph().fill(symmetric_by_rows(edges, 3), (3, 3)))
    expected = torch.tensor([[1 / 4, 3 / 2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_propagation_is_the_mean_over_powers_of_the_whole_matrix():
    R = random_matrix(4, 6).abs()
    users, items = torch.randn(4, 3), torch.randn(6, 3)
    whole = torch.zeros(10, 10)
    whole[:4, 4:], whole[4:, :4] = R, R.T
    x = torch.cat([users, items])
    expected = (x + whole @ x + whole @ whole @ x) / 3
    found = torch.cat(propagate(graph_of(R), users, items, 2))
    torch.testing.assert_close(found, expected)
    square = graph_of(random_matrix(6, 6))
    twice = dense(square) @ dense(square) @ items
    torch.testing.assert_close(repeated(square, items, 2), twice)


def test_means_over_edges_by_hand():
    graph = graph_of(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    x = torch.tensor([[2.0], [4.0], [100.0]])
    assert row_means(graph, x)[:, 0].tolist() == [3.0, 4.0, 0.0]
    assert column_means(graph, x)[:, 0].tolist() == [2.0, 3.0, 0.0]


def test_isolated_nodes_keep_an_edge_to_themselves():
    matrix = torch.arange(1.0, 10).view(3, 3)
    edges = isolated(graph_of(matrix).edges(), torch.tensor([False, True, False]))
    expected = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 0.0], [7.0, 0.0, 9.0]])
    assert torch.equal(dense(SparseGraph().fill(edges, (3, 3))), expected)


# ---- neighbours --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_nearest_rows_are_those_of_brute_force(block, monkeypatch):
    monkeypatch.setattr(graphs, "_BLOCK_NUMBERS", block)
    x = torch.randn(20, 4, generator=random())
    found = nearest(x, 5)
    cosines = F.cosine_similarity(x[:, None], x[None], dim=2)
    torch.testing.assert_close(found.values, cosines.topk(5).values)
    assert (found.columns[:, 0] == torch.arange(20)).all()


def test_a_row_is_its_own_first_neighbour_beside_more_equal_ones_than_there_is_room_for():
    x = torch.randn(3, 4, generator=random()).repeat(10, 1)
    found = nearest(x, 5)
    assert (found.columns[:, 0] == torch.arange(30)).all()
    torch.testing.assert_close(found.values, torch.ones(30, 5))


def test_absent_rows_are_nobodys_neighbours():
    present = torch.ones(20, dtype=torch.bool)
    present[[3, 7]] = False
    edges = nearest(torch.randn(20, 4), 20, present).edges()
    assert len(edges.rows) == 18 * 18
    assert not torch.isin(edges.rows, torch.tensor([3, 7])).any()
    assert not torch.isin(edges.columns, torch.tensor([3, 7])).any()


def test_fewer_rows_than_neighbours():
    assert nearest(torch.randn(3, 2), 10).columns.shape == (3, 3)


@pytest.mark.parametrize("by_items", [False, True])
@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_co_occurrence_counts_are_those_of_the_product(by_items, block, monkeypatch):
    monkeypatch.setattr(graphs, "_BLOCK_NUMBERS", block)
    R = (random_matrix(12, 9) != 0).float()
    found = co_occurrence(graph_of(R), 4, by_items)
    counts = R.T @ R if by_items else R @ R.T
    counts.fill_diagonal_(0)
    best = counts.topk(4).values
    values = torch.where(found.values.isfinite(), found.values, 0.0)
    torch.testing.assert_close(values, best)
    there = found.values.isfinite()
    torch.testing.assert_close(counts.gather(1, found.columns)[there], found.values[there])


# ---- draws -------------------------------------------------------------------------------------


def test_negatives_are_uniform_over_what_the_user_does_not_have():
    graph = graph_of(torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 1, 1, 1]]))
    torch.manual_seed(0)
    items = draw_negatives(graph, torch.tensor([0, 1]).repeat_interleave(3000))
    counts = torch.bincount(items[:3000], minlength=5)
    assert counts[0] == counts[3] == 0
    assert (counts[[1, 2, 4]] > 900).all()
    assert (items[3000:] == 0).all()


def test_a_user_of_everything_still_gets_an_item():
    items = draw_negatives(graph_of(torch.ones(1, 3)), torch.zeros(4, dtype=torch.long))
    assert items.shape == (4,) and items.max() < 3


def test_edges_of_busy_nodes_are_left_out_more_often():
    rows = torch.cat([torch.zeros(50), torch.arange(1, 51)]).long()
    columns = torch.cat([torch.arange(50), torch.arange(50, 100)]).long()
    edges = Edges(rows, columns, torch.ones(100))  # user 0 has 50 items, the others one each
    kept = torch.zeros(2)
    for seed in range(30):
        part = kept_edges(edges, 0.5, random(seed))
        assert len(part.rows) == 50
        assert len(torch.unique(part.columns)) == 50  # without repeats
        kept += torch.tensor([(part.rows == 0).sum(), (part.rows > 0).sum()])
    assert kept[1] > 3 * kept[0]
    same = kept_edges(edges, 0.5, random(3)), kept_edges(edges, 0.5, random(3))
    assert torch.equal(same[0].columns, same[1].columns)


# ---- what static graph models share ------------------------------------------------------------


class Plain(GraphRecommender):
    """Matrix factorisation."""

    calls = 0

    def vectors(self):
        self.calls += 1
        return self.users.weight, self.items

    def loss(self, batch):
        users, positives, negatives = self.triples(batch)
        return {"bpr": bpr(self.users.weight[users], self.items[positives], self.items[negatives])}


@pytest.fixture
def plain() -> tuple[Plain, object]:
    data = random_toy()
    model = Plain(15, 4)
    nn.init.normal_(model.items)
    model.prepare(data, random())
    return model.eval(), data


def test_every_train_interaction_is_a_positive_once(plain):
    model, data = plain
    triples = model.triples(prefix_batch(data))
    found = sorted(zip(triples.users.tolist(), triples.positives.tolist(), strict=True))
    edges = interaction_edges(data.train)
    assert found == list(zip(edges.rows.tolist(), edges.columns.tolist(), strict=True))
    assert not model.bipartite.contains(triples.users, triples.negatives).any()


def test_vectors_are_made_once_and_again_after_training(plain):
    model, data = plain
    batch = prefix_batch(data)
    first = model.score(batch)
    model.score(batch)
    assert model.calls == 1
    model.loss(batch)["bpr"].backward()
    with torch.no_grad():
        model.items -= model.items.grad
    assert not torch.equal(model.score(batch), first)
    assert model.calls == 2
    state = {name: value + 1 for name, value in model.state_dict().items() if name == "items"}
    model.load_state_dict(model.state_dict() | state)
    model.score(batch)
    assert model.calls == 3


def test_missing_features_are_the_mean_of_the_others():
    features = np.arange(8, dtype=np.float32).reshape(4, 2)
    present = np.array([True, False, True, False])
    data = toy_data([(0, 0)], 1, 4, {"text": (features, present)})
    found, known = item_features("X", data.catalogue)
    assert torch.equal(found[0][[1, 3]], torch.tensor([[2.0, 3.0]] * 2))
    assert torch.equal(known[:, 0], torch.from_numpy(present))
    with pytest.raises(ValueError, match="needs item features"):
        item_features("X", toy_data([(0, 0)], 1, 4, {}).catalogue)


def test_row_nce_by_hand():
    one, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # cosines: first row 1 and 1, second row 0 and 0: log 2 each
    assert float(row_nce(one, other, 0.5)) == pytest.approx(np.log(2), rel=1e-5)
    expected = -np.log(np.exp(2) / (np.exp(2) + 1))
    same = torch.eye(2)
    assert float(row_nce(same, same, 0.5)) == pytest.approx(expected, rel=1e-5)
    assert float(row_nce(torch.zeros(0, 2), torch.zeros(0, 2), 0.5)) == 0.0
