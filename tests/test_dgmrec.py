"""DGMRec: numbers of the official code, size of the paper, generation and refresh."""

from __future__ import annotations

import dataclasses
import signal
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

from baseline_models import dgmrec
from baseline_models.dgmrec import DGMRec, perturbed
from config import Config
from experiments.runs import run
from experiments.training import BEST, Stopped, Trainer
from model_parts.base import TrainingData, count_parameters
from model_parts.collaborative import Triples
from model_parts.contrastive import Club
from util import load_checkpoint


def make(data: TrainingData, **own: Any) -> DGMRec:
    config = Config()
    config.dgmrec = dataclasses.replace(config.dgmrec, **({"width": 8, "neighbours": 4} | own))
    torch.manual_seed(0)
    model = DGMRec(config, data.catalogue)
    model.prepare(data, torch.Generator().manual_seed(0))
    return model


# ---- numbers of the official code --------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return reference("dgmrec")


@pytest.fixture
def model(official, monkeypatch) -> DGMRec:
    """The toy of the reference, without the noise."""
    present = {}
    for name in ("visual", "text"):
        present[name] = np.ones(16, dtype=bool)
        present[name][official[f"missing_{name}"].numpy()] = False
    modalities = {name: (official[name].numpy(), present[name]) for name in present}
    made = make(toy_data(official["pairs"], 12, 16, modalities), tau_behaviour=0.35)
    load_weights(made, official)
    monkeypatch.setattr(dgmrec, "perturbed", lambda x, generator=None: x)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
    return made


def triples(official) -> Triples:
    return Triples(official["users"], official["positives"], official["negatives"])


def test_item_graphs_are_the_official_ones(model, official):
    for m, graph in enumerate(model.item_graphs):
        torch.testing.assert_close(dense(graph), official[f"graph/{m}"], atol=1e-6, rtol=0)


def test_scores_are_the_official_ones(model, official):
    users, items = model.vectors()
    torch.testing.assert_close(users @ items.T, official["scores"], atol=1e-5, rtol=0)


def test_loss_and_gradients_are_the_official_ones(model, official, monkeypatch):
    monkeypatch.setattr(model, "triples", lambda batch: triples(official))
    loss = sum(model.loss(None).values())
    torch.testing.assert_close(loss, official["loss"], atol=1e-5, rtol=0)
    loss.backward()
    assert_same_gradients(model, official)


@torch.no_grad()
def test_generated_features_and_refreshed_graphs_are_the_official_ones(model, official):
    model.generate()
    for m in range(2):
        torch.testing.assert_close(
            model.features[m].detach(), official[f"generated/{m}"], atol=1e-5, rtol=0
        )
        model.refresh(m)
        torch.testing.assert_close(
            dense(model.item_graphs[m]), official[f"refreshed/{m}"], atol=1e-5, rtol=0
        )
    users, items = model.vectors()
    torch.testing.assert_close(users @ items.T, official["refreshed_scores"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_estimator_misses_by_as_much_as_the_official_one(model, official):
    general, specific = model.disentangled()
    found = model.clubs[0].misfit(specific[0], general[0])
    torch.testing.assert_close(found, official["misfit"], atol=1e-5, rtol=0)


# ---- size --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "items", "widths", "size"),
    [
        (19_445, 7_050, (4096, 384), 34_476_928),  # Baby
        (35_598, 18_357, (4096, 384), 86_889_728),  # Sports
        (22_363, 12_101, (512, 512), 14_906_176),  # Beauty with CLIP features
    ],
)
def test_the_size_is_the_papers(users, items, widths, size):
    shapes = {str(m): (np.broadcast_to(0.0, (items, w)), None) for m, w in enumerate(widths)}
    catalogue = SimpleNamespace(modalities=shapes, item_ids=range(items))
    with torch.device("meta"):  # nothing is allocated
        model = DGMRec(Config(), catalogue)
        model.users.fill(torch.empty(users, 64))
    assert count_parameters(model) == size
    assert sum(p.numel() for p in model.clubs.parameters()) == 33_536 / 2  # the user ones are idle


# ---- formulas ----------------------------------------------------------------------------------


@torch.no_grad()
def test_vectors_follow_the_formulas_for_three_modalities():
    data = random_toy(widths=(5, 4, 3))
    model = make(data)
    views = model.views()
    R = dense(model.bipartite)
    S = [dense(graph) for graph in model.item_graphs]
    for m in range(3):
        X = model.features[m]
        raw = torch.sigmoid(model.shared(torch.tanh(model.encode_general[m](X))))
        liked = R.T @ torch.tanh(model.users.weight @ model.prefer[m].weight.T)
        preference = liked / R.sum(0)[:, None].clamp(min=1)
        general = S[m] @ S[m] @ (preference * raw)
        torch.testing.assert_close(views.general[m], general, atol=1e-5, rtol=0)
        of_users = (R @ general) / R.sum(1, keepdim=True)
        torch.testing.assert_close(views.user_general[m], of_users, atol=1e-5, rtol=0)
    _, items = views.fused()
    expected = views.items + (sum(views.general) / 3 + sum(views.specific)) / 4
    torch.testing.assert_close(items, expected)


def test_bound_of_mutual_information_by_hand(monkeypatch):
    club = Club(2)
    for layer in (club.mean[2], club.log_variance[2]):
        torch.nn.init.zeros_(layer.weight)
    club.mean[2].bias.data = torch.tensor([1.0, 0.0])
    club.log_variance[2].bias.data = torch.tensor([0.0, 0.0])  # variance 1
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor([1, 0]))
    general = torch.tensor([[1.0, 0.0], [3.0, 2.0]])  # squared distances from the mean: 0 and 8
    specific = torch.zeros(2, 2)
    assert float(club.misfit(specific, general).detach()) == pytest.approx(4.0)
    assert float(club.bound(specific, general).detach()) == pytest.approx(0.0)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor([1, 1]))
    assert float(club.bound(specific, general).detach()) == pytest.approx(0.5 * (8 + 0) / 2)


def test_noise_points_outwards_and_has_length_one_tenth():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    change = perturbed(x) - x
    assert (change * x.sign() >= 0).all()
    torch.testing.assert_close(change.norm(dim=1), torch.full((50,), 0.1))


# ---- missing modalities ------------------------------------------------------------------------


def with_missing() -> TrainingData:
    data = random_toy()
    for m, items in ((0, [2, 3]), (1, [3, 4])):
        data.catalogue.modalities[f"m{m}"][1][items] = False
    return data


@torch.no_grad()
def test_items_that_lack_a_modality_are_alone_in_its_graph():
    model = make(with_missing())
    graph = dense(model.item_graphs[0])
    for item in (2, 3):
        alone = F.one_hot(torch.tensor(item), 15).float()
        torch.testing.assert_close(graph[item], alone)
        torch.testing.assert_close(graph[:, item], alone)


def test_only_what_misses_exactly_one_modality_is_generated():
    model = make(with_missing())
    before = [x.detach().clone() for x in model.features]
    model.begin_epoch(0, torch.Generator().manual_seed(1))
    changed = [(x.detach() != old).any(1) for x, old in zip(model.features, before, strict=True)]
    assert changed[0].nonzero()[:, 0].tolist() == [2]
    assert changed[1].nonzero()[:, 0].tolist() == [4]
    assert torch.equal(dense(model.item_graphs[0])[2], F.one_hot(torch.tensor(2), 15).float())


def test_without_generation_missing_features_and_their_graphs_stay_as_they_are():
    model = make(with_missing(), fill_missing=False, refresh=1)
    before = [x.detach().clone() for x in model.features]
    graphs = [dense(graph) for graph in model.item_graphs]
    for epoch in range(3):
        model.begin_epoch(epoch, torch.Generator().manual_seed(epoch))
    assert all(torch.equal(x, old) for x, old in zip(model.features, before, strict=True))
    pairs = zip(model.item_graphs, graphs, strict=True)
    assert all(torch.equal(dense(graph), old) for graph, old in pairs)


def test_graphs_are_refreshed_every_fifth_epoch_and_resuming_does_not_repeat_it():
    model = make(with_missing(), alpha=0.4)
    for epoch in range(4):
        model.begin_epoch(epoch, torch.Generator().manual_seed(epoch))
    before = dense(model.item_graphs[0])
    model.begin_epoch(4, torch.Generator().manual_seed(4))
    after = dense(model.item_graphs[0])
    changed = (before != after).any(1).nonzero()[:, 0].tolist()
    assert changed == [2, 3]
    assert float(after[2, 2].detach()) >= 0.6  # 60 % of the old row, an edge to itself
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.begin_epoch(4, torch.Generator().manual_seed(4))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_one_modality_alone_trains():
    data = random_toy(widths=(5,))
    model = make(data)
    model.begin_epoch(0, torch.Generator().manual_seed(0))
    loss = sum(model.loss(prefix_batch(data)).values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_fitting_the_estimators_lowers_their_misfit_and_touches_nothing_else():
    model = make(random_toy())
    with torch.no_grad():
        general, specific = model.disentangled()
    rest = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("clubs")}
    before = float(model.clubs[0].misfit(specific[0], general[0]).detach())
    for epoch in range(5):
        model._fit_clubs(torch.Generator().manual_seed(epoch))
    assert float(model.clubs[0].misfit(specific[0], general[0]).detach()) < before
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)
    assert not any(p.requires_grad for p in model.clubs.parameters())


def test_a_run_stopped_within_an_epoch_goes_on_as_if_nothing_had_happened(
    tiny, task, tmp_path, monkeypatch
):
    monkeypatch.setattr(Trainer, "_keep_if_best", lambda self, *_: self._keep_weights())
    config = tiny("dgmrec", {"train.epochs": 2, "train.patience": 0, "dgmrec.refresh": 1})
    (tmp_path / "whole").mkdir()
    run(config, task, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    step = Trainer._step

    def step_and_stop(trainer, *given):
        step(trainer, *given)
        if trainer.progress.global_step == trainer.steps_per_epoch + 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_and_stop)
        with pytest.raises(Stopped):
            run(config, task, tmp_path / "parts")
    run(config, task, tmp_path / "parts")
    one, two = (load_checkpoint(tmp_path / part / BEST)["model"] for part in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
