"""PRISM: numbers of the released code on both hosts, sizes, the experts' losses, what is pooled."""

from __future__ import annotations

import dataclasses
import json
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_toys import (
    FIXTURES,
    assert_same_gradients,
    load_weights,
    prefix_batch,
    random_toy,
    reference,
)
from torch import nn

from baseline_models import prism
from baseline_models.prism import PRISM, Experts, Gate
from config import Config
from model_parts.base import Batch, TrainingData, count_parameters
from model_parts.stochastic import StochasticBlock


def make_config(**own: Any) -> Config:
    config = Config()
    config.data.max_history = 10
    small = {"width": 8, "heads": 2, "dropout": 0.0, "gate_dropout": 0.0}
    config.prism = dataclasses.replace(config.prism, **(small | own))
    return config


def make(data: TrainingData, **own: Any) -> PRISM:
    torch.manual_seed(0)
    model = PRISM(make_config(**own), data.catalogue)
    model.prepare(data, torch.Generator().manual_seed(0))
    return model


class Waves:
    """Stands in for `torch.randn_like`: the k-th call gives sin((k + 1/2) j)."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.sin(torch.arange(x.numel()) * (self.calls + 0.5)).reshape(x.shape).to(x)


def wave(n: int, speed: float) -> torch.Tensor:
    """sin(speed (j + 1)) of j below n, the same on every machine."""
    return torch.sin(speed * (torch.arange(n, dtype=torch.float64) + 1)).float()


@torch.no_grad()
def fill_with_waves(model: PRISM) -> None:
    """Parameters that only their names and sizes decide; those of LayerNorm's scale around 1."""
    for name, parameter in model.named_parameters():
        values = 0.3 * wave(parameter.numel(), 1 + zlib.crc32(name.encode()) / 2**32)
        parameter.copy_(values.view_as(parameter) + float(name.endswith("norm.weight")))


# ---- numbers of the released code: SASRec ------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return reference("prism")


@pytest.fixture
def model(official, monkeypatch) -> PRISM:
    modalities = {
        name: (official[name].numpy(), np.ones(20, dtype=bool)) for name in ("visual", "text")
    }
    catalogue = SimpleNamespace(modalities=modalities, item_ids=range(20))
    made = PRISM(make_config(), catalogue).train()
    load_weights(made, official)
    monkeypatch.setattr(torch, "randn_like", Waves())
    return made


def batch_of(official) -> Batch:
    users = torch.arange(len(official["items"]))
    return Batch(users, official["items"], official["lengths"], official["targets"])


def test_states_and_expert_losses_are_the_released_ones(model, official):
    states, losses = model.encode(batch_of(official))
    there = (official["items"] > 0)[:, :, None]
    torch.testing.assert_close(states * there, official["states"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sum(losses.values()), official["expert_loss"], atol=1e-5, rtol=0)


def test_loss_and_gradients_are_the_released_ones(model, official, monkeypatch):
    wanted = official["targets"] > 0
    monkeypatch.setattr(
        prism, "draw_negatives", lambda graph, users: official["negatives"][wanted] - 1
    )
    parts = model.loss(batch_of(official))
    torch.testing.assert_close(parts["item"], official["loss"], atol=1e-5, rtol=0)
    sum(parts.values()).backward()
    assert_same_gradients(model, official)


@torch.no_grad()
def test_scores_are_the_released_ones(model, official):
    found = model.eval().score(batch_of(official))
    torch.testing.assert_close(found, official["scores"], atol=1e-5, rtol=0)


# ---- numbers of the released code: STOSA, as released and with its means encoded ---------------


@pytest.fixture(params=["released", "encoded"])
def stosa(request, monkeypatch) -> tuple[PRISM, Batch, dict[str, Any]]:
    """The model full of waves, the batch, and the numbers to find."""
    stored = json.loads((FIXTURES / "prism_stosa.json").read_text(encoding="utf-8"))
    n_items = 12
    modalities = {m: (np.zeros((n_items, 6), np.float32), None) for m in ("visual", "text")}
    catalogue = SimpleNamespace(modalities=modalities, item_ids=range(n_items))
    config = make_config(host="stosa", layers=2, encode_mean=request.param == "encoded")
    model = PRISM(config, catalogue).train()
    fill_with_waves(model)
    items, targets, negatives = (
        nn.utils.rnn.pad_sequence([torch.tensor(row) for row in stored[name]], batch_first=True)
        for name in ("items", "targets", "negatives")
    )
    lengths = (items > 0).sum(1)
    monkeypatch.setattr(torch, "randn_like", Waves())
    monkeypatch.setattr(prism, "draw_negatives", lambda *_: negatives[negatives > 0] - 1)
    return model, Batch(torch.arange(len(items)), items, lengths, targets), stored[request.param]


def assert_near(found: torch.Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)


def test_gaussian_states_are_the_released_ones(stosa):
    model, batch, wanted = stosa
    states, losses = model.encode(batch)
    there = batch.items > 0
    assert_near(states.mean[there], wanted["mean"])
    assert_near(states.cov[there], wanted["cov"])
    assert_near(sum(losses.values()), wanted["expert_loss"])


def test_ranking_losses_and_gradients_are_the_released_ones(stosa):
    model, batch, wanted = stosa
    parts = model.loss(batch)
    assert_near(parts["item"], wanted["item"])
    assert_near(parts["pvn"], wanted["pvn"])
    sum(parts.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == wanted["gradients"].keys()
    for name, gradient in gradients.items():
        along = (gradient.flatten() * wave(gradient.numel(), 1.0)).sum()
        assert_near(torch.stack([gradient.norm(), along]), wanted["gradients"][name])


@torch.no_grad()
def test_scores_are_minus_the_released_distances(stosa):
    model, batch, wanted = stosa
    assert_near(model.eval().score(batch), wanted["scores"])


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "experts", "gate"), [(256, 394_752, 657_924), (64, 99_072, 41_604)]
)
def test_experts_and_gate_have_the_papers_sizes(width, experts, gate):
    assert count_parameters(Experts(2, width, 128)) == experts
    assert count_parameters(Gate(4, width, 0.3, 0.7)) == gate


def size_on_beauty(**own: Any) -> int:
    """At the paper's width and window, without allocating anything."""
    shapes = {m: (np.broadcast_to(0.0, (12_101, 512)), None) for m in ("visual", "text")}
    config = Config()
    config.data.max_history = 100
    config.prism = dataclasses.replace(config.prism, **own)
    with torch.device("meta"):
        return count_parameters(
            PRISM(config, SimpleNamespace(modalities=shapes, item_ids=range(12_101)))
        )


def test_the_size_on_beauty_is_the_releases_less_its_phantom_item():
    assert size_on_beauty() == 17_623_044 - (256 + 2 * 512)


def test_the_size_on_stosa_is_the_releases_less_what_nothing_reads():
    phantom_item, user_margins = 2 * (256 + 2 * 512), 22_363
    second_encoder = count_parameters(StochasticBlock(256, 4, 0.0, encode_mean=True))
    whole = 35_793_759 - phantom_item - user_margins - second_encoder
    assert size_on_beauty(host="stosa", encode_mean=True) == whole
    value_and_output, feed_forward = 2 * (256 * 256 + 256), 8 * 256 * 256 + 7 * 256
    assert size_on_beauty(host="stosa") == whole - value_and_output - feed_forward
    assert user_margins + second_encoder + value_and_output + feed_forward == 2_259_035


# ---- the experts' losses -----------------------------------------------------------------------


def test_expert_losses_by_hand(monkeypatch):
    experts = Experts(2, 1, 1)
    for j, expert in enumerate(experts.experts):  # linear where it matters: gelu(x) = x for large x
        expert[0].weight.data = torch.tensor([[1.0, 2.0]])
        expert[0].bias.data = torch.tensor([100.0])
        expert[2].weight.data = torch.tensor([[1.0 + j]])
        expert[2].bias.data = torch.tensor([-100.0 * (1.0 + j)])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    whole, losses = experts([torch.tensor([[3.0]]), torch.tensor([[0.5]])])
    # expert j says (1 + j) (v + 2 t) = (1 + j) 4; without v (1 + j) 1, without t (1 + j) 3
    assert [float(x.detach()) for x in whole] == pytest.approx([4, 8, 12, 16], abs=1e-3)
    image = max(0, (4 - 3) - (4 - 1) + 1)  # near to "text replaced", far from "image replaced"
    text = max(0, 2 * (4 - 1) - 2 * (4 - 3) + 1)
    assert float(losses["unique"].detach()) == pytest.approx(image + text, abs=1e-3)
    assert float(losses["synergy"].detach()) == pytest.approx(1.0, abs=1e-4)  # all point one way
    assert float(losses["redundancy"].detach()) == pytest.approx(0.0, abs=1e-4)


def test_experts_can_not_share_parameters():
    # of one and the same expert the last two losses would add up to a constant
    experts = Experts(2, 4, 8)
    assert len({id(p) for expert in experts.experts for p in expert.parameters()}) == 4 * 4


def test_scoring_draws_no_noise(monkeypatch):
    data = random_toy()
    model, batch = make(data).eval(), prefix_batch(data)

    def refuse(x):
        raise AssertionError("noise is for the loss only")

    monkeypatch.setattr(torch, "randn_like", refuse)
    model.score(batch)


def test_the_gate_mixes_with_a_softmax():
    gate = Gate(3, 2, 0.0, 0.5)
    torch.nn.init.zeros_(gate.layers[3].weight)
    gate.layers[3].bias.data = torch.tensor([0.0, 0.5, 1.0])
    views = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 5.0]])]
    weights = F.softmax(torch.tensor([0.0, 1.0, 2.0]), dim=0)
    expected = sum(w * v for w, v in zip(weights, views, strict=True))
    torch.testing.assert_close(gate(views, torch.zeros(1, 2)), expected)


# ---- what is pooled ----------------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "leaks"), [("window", True), ("causal", False)])
@pytest.mark.parametrize("host", ["sasrec", "stosa"])
def test_only_the_released_pooling_lets_a_position_see_what_follows(pooling, leaks, host):
    model = make(random_toy(), pooling=pooling, host=host).eval()
    items = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 9]])
    batch = Batch(torch.zeros(2).long(), items, torch.full((2,), 4), items)
    with torch.no_grad():
        states, _ = model.encode(batch)
    if host == "stosa":
        states = torch.cat(states, dim=2)
    differs = (states[0, :3] - states[1, :3]).abs().max() > 1e-6
    assert bool(differs) == leaks


@torch.no_grad()
def test_causal_pooling_ends_with_the_mean_of_the_history():
    model = make(random_toy(), pooling="causal")
    x = torch.arange(12.0).view(1, 4, 3)
    present = torch.tensor([[True, True, True, False]])
    pooled = model._pooled(x, torch.full((3,), 7.0), present)
    torch.testing.assert_close(pooled[0, 2], x[0, :3].mean(0))
    torch.testing.assert_close(pooled[0, 0], x[0, 0])


@torch.no_grad()
def test_empty_slots_of_the_window_count_as_released():
    model = make(random_toy())  # a window of 10
    x = torch.ones(1, 4, 3)
    present = torch.tensor([[True, True, False, False]])
    pooled = model._pooled(x, torch.full((3,), 5.0), present)
    torch.testing.assert_close(pooled[0, 0], torch.full((3,), (2 * 1 + 8 * 5) / 10))


@pytest.mark.parametrize("host", ["sasrec", "stosa"])
def test_the_row_of_empty_slots_never_learns(host):
    data = random_toy()
    model = make(data, host=host).train()
    sum(model.loss(prefix_batch(data)).values()).backward()
    streams = [model] if host == "sasrec" else [model, model.cov]
    for table in (table for stream in streams for table in (stream.items, *stream.features)):
        assert not table.weight.grad[0].any()
        assert table.weight.grad[1:].any()


# ---- scores of STOSA ---------------------------------------------------------------------------


@torch.no_grad()
def test_the_softmax_of_stosa_is_one_of_minus_distances():
    data = random_toy()
    model, batch = make(data, host="stosa", objective="softmax").eval(), prefix_batch(data)
    targets = batch.targets[batch.targets > 0]  # one a prefix, at its end
    found = model.loss(batch)["item"]
    torch.testing.assert_close(found, F.cross_entropy(model.score(batch), targets - 1))


# ---- data --------------------------------------------------------------------------------------


def test_an_item_without_a_modality_gets_noise_there_and_keeps_the_rest():
    data = random_toy()
    data.catalogue.modalities["m0"][1][3] = False
    model = make(data)
    missing, text = model.features[0].weight[4].detach(), model.features[1].weight[4].detach()
    assert 0 < float(missing.abs().max()) < 0.1
    torch.testing.assert_close(text, torch.tensor(data.catalogue.modalities["m1"][0][3]))


def test_both_streams_of_stosa_start_from_the_same_features():
    data = random_toy()
    data.catalogue.modalities["m0"][1][3] = False
    model = make(data, host="stosa")
    for mean, cov in zip(model.features, model.cov.features, strict=True):
        assert torch.equal(mean.weight[1:], cov.weight[1:])
        assert not torch.equal(mean.weight[0], cov.weight[0])


@pytest.mark.parametrize("widths", [(5,), (5, 4, 3)])
@pytest.mark.parametrize("objective", ["sampled", "softmax"])
@pytest.mark.parametrize("host", ["sasrec", "stosa"])
def test_other_numbers_of_modalities_and_the_other_objective_train(widths, objective, host):
    data = random_toy(widths=widths)
    model = make(data, objective=objective, host=host).train()
    parts = model.loss(prefix_batch(data))
    sum(parts.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_negatives_are_items_the_user_does_not_have(monkeypatch):
    data = random_toy()
    model, seen = make(data).train(), []
    real = prism.draw_negatives
    monkeypatch.setattr(
        prism,
        "draw_negatives",
        lambda graph, users: seen.append((users, real(graph, users))) or seen[-1][1],
    )
    model.loss(prefix_batch(data))
    users, items = seen[0]
    assert not model.bipartite.contains(users, items).any()
