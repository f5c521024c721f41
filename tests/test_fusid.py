"""FusID: the fusion network, its losses against hand-computed values, fewer conflicts."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from baseline_models.fusid import (
    FusionNetwork,
    Pairs,
    build_ids,
    covariance_loss,
    fused_ids,
    item_inputs,
    pair_loss,
    variance_loss,
)
from config import Config
from model_parts.base import TrainingData, count_parameters
from model_parts.cooccurrence import count_pairs, frequent_partners
from model_parts.residual import colliding_share


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- network and losses --------------------------------------------------------------------------


def test_the_fusion_network_has_the_papers_size() -> None:
    with torch.device("meta"):
        # three texts of 1024, audio 512, co-occurrence 128
        network = FusionNetwork(3 * 1024 + 512 + 128, 2048, 5, 128)
    assert count_parameters(network) == 8_920_960


def test_sub_embeddings_are_normalised_together() -> None:
    torch.manual_seed(0)
    parts = FusionNetwork(6, 16, 3, 4).eval()(torch.randn(5, 6))
    assert parts.shape == (5, 3, 4)
    torch.testing.assert_close(parts.flatten(1).mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        parts.flatten(1).var(1, unbiased=False), torch.ones(5), rtol=1e-3, atol=1e-3
    )


def test_pair_loss_by_hand() -> None:
    one = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    other = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    together = torch.tensor([1.0, 0.0])
    # distances 2 and 1; wanted 0 and 1
    assert float(pair_loss(one, other, together, literal=True)) == pytest.approx((4 + 0) / 2)
    # over sqrt(2 * 4)
    scaled = ((2 / 8**0.5) ** 2 + (1 - 1 / 8**0.5) ** 2) / 2
    assert float(pair_loss(one, other, together)) == pytest.approx(scaled)


def test_equal_items_have_a_finite_gradient() -> None:
    parts = torch.zeros(2, 2, 3, requires_grad=True)
    pair_loss(parts[:1], parts[1:], torch.ones(1)).backward()
    assert parts.grad is not None and bool(parts.grad.isfinite().all())


def test_covariance_loss_by_hand() -> None:
    # e_1 = (a, b), e_2 = (a, 0): the cross-covariances are Var(a) and Cov(b, a)
    a, b = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([0.0, 1.0, 1.0, 2.0])
    parts = torch.stack([torch.stack([a, b], 1), torch.stack([a, 0 * a], 1)], dim=1)
    covariance = np.cov(a.numpy(), b.numpy())
    wanted = (covariance[0, 0] ** 2 + covariance[0, 1] ** 2) / 2  # 2 / (2 * 1), d = 2
    assert float(covariance_loss(parts)) == pytest.approx(wanted, rel=1e-5)
    assert float(covariance_loss(parts[:, :1])) == 0


def test_variance_loss_by_hand() -> None:
    parts = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[0.0, 5.0]]])
    wanted = (1 - math.sqrt(1e-4)) / 2  # the second dimension varies enough
    assert float(variance_loss(parts)) == pytest.approx(wanted, rel=1e-5)


# ---- what goes in --------------------------------------------------------------------------------


def test_inputs_are_standardised_on_train_and_mark_what_is_missing() -> None:
    features = np.array([[1.0, 2], [3, 2], [100, 7], [5, 9]], dtype=np.float32)
    present = np.array([True, True, True, False])
    catalogue = SimpleNamespace(modalities={"text": (features, present)})
    in_train = torch.tensor([True, True, False, True])
    behaviour = torch.tensor([[1.0], [3.0], [0.0], [5.0]])
    inputs = item_inputs(catalogue, in_train, behaviour)
    # behaviour, its mark, two features, their mark
    assert inputs.shape == (4, 5)
    assert inputs[:, 1].tolist() == [0, 0, 1, 0] and inputs[:, 4].tolist() == [0, 0, 0, 1]
    assert not inputs[2, 0] and not inputs[3, 2:4].any()
    assert inputs[:2, 2].sum() == 0 and inputs[1, 2] > 0, "centred on the first two items"


def test_a_column_that_is_constant_in_train_stays_small_for_others() -> None:
    features = np.array([[1.0, 2], [1, 5], [3, 4]], dtype=np.float32)
    catalogue = SimpleNamespace(modalities={"text": (features, np.ones(3, dtype=bool))})
    inputs = item_inputs(catalogue, torch.tensor([True, True, False]), torch.ones(3, 1))
    assert inputs.abs().max() <= 2


def test_half_of_a_draw_belongs_together() -> None:
    users = [[1, 2], [1, 2], [3, 4], [3, 4], [5, 6], [5, 6], [7], [8]]
    items = np.concatenate(users).astype(np.int32)
    train = SimpleNamespace(items=items, offsets=np.cumsum([0] + [len(u) for u in users]))
    met = count_pairs(train, 8, 5, random())
    pairs = Pairs(*frequent_partners(met, torch.ones(8) * 2, 10), met)
    one, other, together = pairs.draw(2000, random())
    assert int(together.sum()) == 1000
    met_pairs = {(0, 1), (2, 3), (4, 5)}
    found = list(zip(one.tolist(), other.tolist(), together.tolist(), strict=True))
    assert all(((min(a, b), max(a, b)) in met_pairs) == bool(y) for a, b, y in found)
    # items that met nobody take no part
    assert {6, 7}.isdisjoint(one.tolist() + other.tolist())


# ---- identifiers ---------------------------------------------------------------------------------


def redundant_data(n_items: int = 300) -> TrainingData:
    """Two modalities that say the same, and users who stay within one of ten topics."""
    rng = np.random.default_rng(0)
    topics = np.arange(n_items) % 10
    latent = 0.5 * rng.normal(size=(10, 16))[topics] + rng.normal(size=(n_items, 16))
    features = {
        name: ((latent @ rng.normal(size=(16, width))).astype(np.float32), np.ones(n_items, bool))
        for name, width in (("text", 16), ("visual", 12))
    }
    users = [rng.choice(np.nonzero(topics == u % 10)[0], 6) + 1 for u in range(200)]
    train = SimpleNamespace(
        items=np.concatenate(users).astype(np.int32), offsets=np.arange(0, 1201, 6)
    )
    return TrainingData(train, SimpleNamespace(modalities=features), 200, n_items)


SMALL: dict[str, Any] = {
    "digits": 4, "codes": 24, "part": 8, "hidden": 32, "behaviour": 8, "tokenizer_steps": 150,
    "pairs": 256,
}  # fmt: skip


def test_the_regulariser_lowers_conflicts_on_redundant_features() -> None:
    data, shares = redundant_data(), {}
    interactions = torch.bincount(torch.tensor(data.train.items).long(), minlength=301)[1:]
    for alpha in (0.0, 0.2, 1.0):
        own = dataclasses.replace(Config().fusid, **SMALL, alpha=alpha)
        ids = build_ids(data, interactions, own, "cpu", random())
        assert ids.shape == (300, 4) and int(ids.min()) >= 0 and int(ids.max()) < 24
        shares[alpha] = colliding_share(ids)
    assert shares[0.2] < 0.9 * shares[0.0]
    assert shares[1.0] < 0.5 * shares[0.0]


def test_centroids_come_from_train_items_only() -> None:
    parts = torch.tensor([0.0, 1.0, 10.0, 11.0, 500.0])[:, None, None].expand(-1, 2, 3)
    in_train = torch.tensor([True, True, True, True, False])
    ids = fused_ids(parts, in_train, 2, random())
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[2], ids[3])
    assert torch.equal(ids[4], ids[3]), "an unseen item has no centroid of its own"
