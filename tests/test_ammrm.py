"""AMMRM: its formulas by hand, the pruned graph, attention across modalities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_toys import dense, prefix_batch, random_toy
from torch import nn

from baseline_models.ammrm import AMMRM, NeighbourAttention, SelfGate
from config import Config
from model_parts.base import TrainingData, count_parameters
from model_parts.collaborative import Triples


def make(data: TrainingData, **own: Any) -> AMMRM:
    config = Config()
    small = {"width": 8, "heads": 2, "neighbours": 4}
    config.ammrm = dataclasses.replace(config.ammrm, **(small | own))
    torch.manual_seed(0)
    model = AMMRM(config, data.catalogue)
    model.prepare(data, torch.Generator().manual_seed(0))
    return model.eval()


@torch.no_grad()
def test_vectors_follow_the_formulas():
    data = random_toy()
    model = make(data)
    R = dense(model.bipartite)
    A = R / (R.sum(1, keepdim=True) * R.sum(0).clamp(min=1)).sqrt()

    def lightgcn(users, items):
        once = A @ items, A.T @ users
        twice = A @ once[1], A.T @ once[0]
        return (users + once[0] + twice[0]) / 3, (items + once[1] + twice[1]) / 3

    def gated(layer, x, by):
        return x * torch.sigmoid(by @ layer.gate.weight.T + layer.gate.bias)

    smooth = []
    for m, features in enumerate((model.features_0, model.features_1)):
        filtered = gated(model.filters[m], model.items, model.project[m](features))
        smooth.append(dense(model.item_graphs[m]) @ filtered)
    content = [
        smooth[m] + model.across[m](smooth[1 - m], smooth[m], model.neighbours[m]) for m in (0, 1)
    ]
    users, items = lightgcn(model.users.weight, model.items)
    user = gated(model.user_gates[0], users, users)
    item = items
    for m in (0, 1):
        of_users, of_items = lightgcn(model.users.weight, content[m])
        user = user + gated(model.user_gates[m + 1], of_users, of_users)
        item = item + gated(model.separate[m], of_items, items)
    found = model.vectors()
    torch.testing.assert_close(found[0], user, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], item, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_to_all_items_is_multi_head_attention():
    ours, torchs = NeighbourAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    layers = (ours.query, ours.key, ours.value)
    torchs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
    for layer in (*layers, ours.out):
        layer.bias.normal_()
    torchs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    torchs.out_proj.load_state_dict(ours.out.state_dict())
    asking, x = torch.randn(6, 8), torch.randn(6, 8)
    everybody = torch.arange(6).expand(6, 6)
    expected = torchs(asking[None], x[None], x[None])[0][0]
    torch.testing.assert_close(ours(asking, x, everybody), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_gate_by_hand():
    gate = SelfGate(2)
    gate.gate.weight.copy_(torch.eye(2))
    gate.gate.bias.copy_(torch.tensor([0.0, 1.0]))
    found = gate(torch.tensor([[2.0, 4.0]]), by=torch.tensor([[0.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0]]))


def test_losses_by_hand(monkeypatch):
    model = make(random_toy(), contrast=0.5, temperature=0.2, norm=0.1)
    users, positives, negatives = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.zeros(3)
    triples = Triples(users, positives, negatives.long())
    monkeypatch.setattr(model, "triples", lambda batch: triples)
    parts = model.loss(None)
    with torch.no_grad():
        (u_id, *u_modal), (i_id, *i_modal) = model.parts()
        u, i = u_id + sum(u_modal), i_id + sum(i_modal)
        u, p, n = u[users], i[positives], i[triples.negatives]
        expected = -F.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        torch.testing.assert_close(parts["bpr"], expected)
        squares = (u**2).sum() + (p**2).sum() + (n**2).sum()
        torch.testing.assert_close(parts["norm"], 0.1 * 0.5 * squares / 3)
        total = 0.0
        for modal, behaviour, rows in ((u_modal, u_id, users), (i_modal, i_id, positives)):
            a, b = F.normalize(sum(modal)[rows]), F.normalize(behaviour[rows])
            total = total + F.cross_entropy(a @ b.T / 0.2, torch.arange(3))
        torch.testing.assert_close(parts["contrast"], 0.5 * total)


def test_an_epoch_has_its_own_edges_and_scores_have_all():
    data = random_toy()
    model = make(data, edge_dropout=0.3)
    full = dense(model.normalised) > 0
    seen = []
    for epoch in range(2):
        model.begin_epoch(epoch, torch.Generator().manual_seed(epoch))
        pruned = dense(model.pruned) > 0
        assert not (pruned & ~full).any()
        assert int(pruned.sum()) == -int(-float(full.sum()) * 0.7 // 1)
        seen.append(pruned)
    assert (seen[0] != seen[1]).any()
    assert torch.equal(dense(model.normalised) > 0, full)
    with torch.no_grad():
        in_training = model.train().vectors()[0]
        assert (in_training != model.eval().vectors()[0]).any()


def test_an_item_without_a_modality_attends_to_itself_only():
    data = random_toy()
    data.catalogue.modalities["m0"][1][3] = False
    model = make(data)
    assert (model.neighbours[0, 3] == 3).all()
    assert not (model.neighbours[0] == 3)[torch.arange(15) != 3].any()
    assert not dense(model.item_graphs[0])[3].any()
    assert all(x.isfinite().all() for x in model.vectors())


def test_parameters_are_counted_by_a_closed_form():
    data = random_toy(n_users=20, n_items=15, widths=(5, 4))
    d, M = 8, 2
    square = (d + 1) * d
    own = (20 + 15) * d + (5 + 1) * d + (4 + 1) * d  # tables and projections
    own += 2 * M * square + 4 * M * square + (M + 1) * square  # gates of items, attention, users
    assert count_parameters(make(data)) == own


@pytest.mark.parametrize("widths", [(5,), (5, 4, 3)])
def test_other_numbers_of_modalities_train(widths):
    data = random_toy(widths=widths)
    model = make(data).train()
    sum(model.loss(prefix_batch(data)).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
