"""Digits to items: the fused loss, exact scores and the graph walk, against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_parts.decoding import (
    digit_cross_entropy,
    digit_heads,
    graph_walk,
    score_all_items,
    similarity_graph,
    token_rows,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tables(n_users: int, n_digits: int, n_codes: int) -> Tensor:
    """Log-probabilities [B, m, K]."""
    logits = torch.randn(n_users, n_digits, n_codes, generator=random(1))
    return torch.log_softmax(logits, dim=2)


def item_codes(n_items: int, n_digits: int, n_codes: int) -> Tensor:
    return torch.randint(n_codes, (n_items, n_digits), generator=random(2))


def likeness(n_digits: int, n_codes: int) -> Tensor:
    """Similarity of any two codes of a digit, [m, K, K], as RPG has it."""
    vectors = F.normalize(torch.randn(n_digits, n_codes, 6, generator=random(3)), dim=2)
    return (vectors @ vectors.transpose(1, 2) + 1) / 2


def plain_scores(table: Tensor, codes: Tensor) -> Tensor:
    """Mean over digits, one user, item and digit at a time."""
    return torch.tensor(
        [[sum(row[j, c] for j, c in enumerate(item)) / len(item) for item in codes.tolist()]
         for row in table]
    )  # fmt: skip


# ---- digit heads and loss ----------------------------------------------------------------------


def network(n_positions: int, scale: float = 1.0) -> list[Tensor]:
    """States [P, 5], weight and bias of 3 heads, tokens [3, 7, 5]: all that gets a gradient."""
    shapes = [(n_positions, 5), (15, 5), (15,), (3, 7, 5)]
    parts = [torch.randn(shape, generator=random(i)) for i, shape in enumerate(shapes)]
    parts[3] *= scale
    return [part.requires_grad_() for part in parts]


def plain_heads(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """s + SiLU(W_j s + b_j) as unit vectors, head by head."""
    matrices = zip(weight.split(5), bias.split(5), strict=True)
    heads = [states + F.silu(states @ W.T + b) for W, b in matrices]
    return F.normalize(torch.stack(heads, dim=1), dim=2)


def test_heads_are_unit_vectors_of_residual_layers() -> None:
    states, weight, bias, _ = network(20)
    heads = digit_heads(states, weight, bias)
    torch.testing.assert_close(heads, plain_heads(states, weight, bias))
    torch.testing.assert_close(heads.norm(dim=2), torch.ones(20, 3))


@pytest.mark.parametrize("chunk", [1, 17 * 3 * 7, 50 * 3 * 7, 10**9])  # 16, 17, all, all positions
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_fused_loss_is_cross_entropy(
    chunk: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_parts.decoding._CHUNK_NUMBERS", {"cpu": chunk})
    parts, codes = network(50, scale), item_codes(50, 3, 7)
    fused = digit_cross_entropy(*parts, codes)
    logits = torch.einsum("pmd,mkd->pmk", plain_heads(*parts[:3]), parts[3])
    plain = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(fused, plain)
    # a factor behind the loss has to reach every gradient
    gradients = [torch.autograd.grad(3 * loss, parts) for loss in (fused, plain)]
    for own, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)


def test_the_loss_without_positions_is_zero() -> None:
    parts = network(0)
    loss = digit_cross_entropy(*parts, torch.zeros(0, 3, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert all((part.grad == 0).all() for part in parts)


def test_the_loss_can_be_read_without_gradients() -> None:
    parts, codes = network(5), item_codes(5, 3, 7)
    with torch.no_grad():
        quiet = digit_cross_entropy(*parts, codes)
    torch.testing.assert_close(quiet, digit_cross_entropy(*parts, codes).detach())


# ---- exact scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_digits", [1, 4])
def test_scores_are_the_mean_log_probability_of_an_items_digits(n_digits: int) -> None:
    table, codes = tables(3, n_digits, 6), item_codes(20, n_digits, 6)
    torch.testing.assert_close(score_all_items(table, codes), plain_scores(table, codes))


def test_nobody_gets_no_scores() -> None:
    assert score_all_items(tables(0, 3, 4), item_codes(7, 3, 4)).shape == (0, 7)


def test_token_rows_of_two_digits_never_meet() -> None:
    rows = token_rows(torch.tensor([[0, 0, 3], [4, 4, 4]]), 5)
    assert rows.tolist() == [[0, 5, 13], [4, 9, 14]]


# ---- graph walk --------------------------------------------------------------------------------


def test_neighbours_are_the_most_similar_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_parts.decoding._GRAPH_ROWS", 7)  # several blocks of rows
    codes, similar = item_codes(30, 3, 5), likeness(3, 5)
    graph = similarity_graph(codes, similar, 6)
    digits = torch.arange(3)
    for item in range(30):
        exact = similar[digits, codes[item]][digits, codes].mean(1)
        exact[item] = 2  # itself first
        torch.testing.assert_close(exact[graph[item]], exact.topk(6).values)


def test_every_item_is_its_own_neighbour_even_among_equals() -> None:
    codes = torch.zeros(40, 3, dtype=torch.long)  # forty items with one ID
    graph = similarity_graph(codes, likeness(3, 4), 5)
    assert graph[:, 0].tolist() == list(range(40))


def test_no_edge_leads_out_of_a_small_catalogue() -> None:
    graph = similarity_graph(item_codes(4, 3, 5), likeness(3, 5), 200)
    assert graph.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 4


def test_with_all_edges_the_walk_is_exact() -> None:
    table, codes = tables(3, 4, 6), item_codes(25, 4, 6)
    graph = similarity_graph(codes, likeness(4, 6), 25)
    pool = graph_walk(table, codes, graph, beams=3, steps=1, generator=random())
    found = torch.full((3, 25), float("-inf")).scatter_reduce(1, pool.items, pool.scores, "amax")
    torch.testing.assert_close(found, score_all_items(table, codes))


def test_more_steps_find_better_items() -> None:
    table, codes = tables(40, 4, 8), item_codes(800, 4, 8)
    graph = similarity_graph(codes, likeness(4, 8), 8)
    best = torch.stack(
        [graph_walk(table, codes, graph, 4, n, random()).scores.amax(1) for n in (1, 2, 3, 5, 8)]
    )
    assert (best.diff(dim=0) >= 0).all()  # for every user
    assert best[-1].mean() > best[0].mean() + 0.05


def test_the_walk_is_decided_by_the_generator() -> None:
    table, codes = tables(2, 4, 8), item_codes(300, 4, 8)
    graph = similarity_graph(codes, likeness(4, 8), 5)
    one, same, other = (graph_walk(table, codes, graph, 4, 1, random(s)).items for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@quick
@given(
    n_items=st.integers(1, 30),
    n_edges=st.integers(1, 40),
    beams=st.integers(1, 40),
    steps=st.integers(1, 3),
)
def test_any_walk_scores_what_it_visits_exactly_and_once(
    n_items: int, n_edges: int, beams: int, steps: int
) -> None:
    """Catalogues smaller than the beam or than the edges included."""
    table, codes = tables(2, 3, 4), item_codes(n_items, 3, 4)
    graph = similarity_graph(codes, likeness(3, 4), n_edges)
    pool = graph_walk(table, codes, graph, beams, steps, random())
    exact = score_all_items(table, codes)
    for user in range(2):
        first = torch.isfinite(pool.scores[user])
        visited = pool.items[user][first].tolist()
        assert len(visited) == len(set(visited)) == len(pool.items[user].unique())
        torch.testing.assert_close(pool.scores[user][first], exact[user, visited])
