"""TIGER, LETTER, CoFiRec: sizes of the papers, tokenizers, their losses."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baseline_models.cofirec import CoFiRec, coarse_to_fine
from baseline_models.letter import LETTER, alignment_loss, cluster_codewords, diversity_loss
from baseline_models.tiger import TIGER
from config import Config
from model_parts.base import Batch, TrainingData, count_parameters
from model_parts.cooccurrence import behaviour_vectors
from model_parts.residual import colliding_share

N_ITEMS, N_USERS = 60, 40
CLASSES = {"tiger": TIGER, "letter": LETTER, "cofirec": CoFiRec}
SMALL = {
    "width": 16, "layers": 1, "attention_heads": 2, "head_width": 8, "inner": 32, "codes": 8,
    "latent": 4, "hidden": 16, "depth": 1, "tokenizer_steps": 60,
}  # fmt: skip


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_data(groups: int = 6, **modalities: Any) -> TrainingData:
    """Users stay within one of `groups` of items; by default the text tells the groups apart.

    The last five items occur in nobody's train history.
    """
    rng = np.random.default_rng(0)
    of_group = [
        np.arange(1, N_ITEMS - 4)[np.arange(N_ITEMS - 5) % groups == g] for g in range(groups)
    ]
    items = np.concatenate([rng.permutation(of_group[u % groups])[:6] for u in range(N_USERS)])
    offsets = np.arange(N_USERS + 1) * 6
    if not modalities:
        centres = rng.normal(size=(groups, 12))
        features = centres[np.arange(N_ITEMS) % groups] + 0.3 * rng.normal(size=(N_ITEMS, 12))
        modalities = {"text": (features.astype(np.float32), np.ones(N_ITEMS, dtype=bool))}
    catalogue = SimpleNamespace(modalities=modalities, item_ids=list(map(str, range(N_ITEMS))))
    train = SimpleNamespace(items=items.astype(np.int32), offsets=offsets)
    return TrainingData(train, catalogue, N_USERS, N_ITEMS)


def make_model(name: str, data: TrainingData | None = None, seed: int = 0, **own: Any) -> Any:
    """A prepared small model in evaluation mode."""
    data, config = data or make_data(), Config()
    setattr(config, name, dataclasses.replace(getattr(config, name), **(SMALL | own)))
    torch.manual_seed(0)
    model = CLASSES[name](config, data.catalogue)
    model.prepare(data, random(seed))
    return model.eval()


def batch_of(n_items: int, size: int = 4) -> Batch:
    items = torch.randint(1, n_items + 1, (size, 5), generator=random(3))
    targets = torch.zeros_like(items)
    targets[:, -1] = torch.arange(1, size + 1)
    return Batch(torch.arange(size), items, torch.full((size,), 5), targets)


# ---- sizes of the papers -----------------------------------------------------------------------

T5 = 4_459_776  # tests/test_seq2seq.py counts it


@pytest.mark.parametrize(
    ("name", "digits", "size"),
    [
        ("tiger", 4, T5 + (4 * 256 + 1) * 128),  # 3 levels and one for collisions: 4,590,976
        ("letter", 4, T5 + (4 * 256 + 1) * 128),
        ("cofirec", 5, T5 + (5 * 256 + 1) * 128),  # mock: 3 modalities, behaviour, collisions
    ],
)
def test_the_defaults_are_the_papers_and_learn(name: str, digits: int, size: int) -> None:
    torch.manual_seed(0)
    model = CLASSES[name](Config())
    assert count_parameters(model) == size
    n_items = len(model.codes)
    model.set_codes(torch.randint(256, (n_items, digits), generator=random()))
    optimiser, batch = torch.optim.AdamW(model.parameters(), lr=1e-3), batch_of(n_items)
    losses = []
    for _ in range(2):
        optimiser.zero_grad()
        losses.append(model.loss(batch)["digits"])
        losses[-1].backward()
        optimiser.step()
    assert losses[0].isfinite() and losses[1] < losses[0]


def test_user_tokens_of_the_paper_cost_two_thousand_rows_and_tell_users_apart() -> None:
    data = make_data()
    plain, model = make_model("tiger", data), make_model("tiger", data, user_tokens=2000)
    assert count_parameters(model) - count_parameters(plain) == 2000 * 16
    batch = batch_of(N_ITEMS, 2)
    same = batch._replace(items=batch.items[:1].expand(2, -1))
    one, other = plain.score(same)
    torch.testing.assert_close(one, other)
    one, other = model.score(same)
    assert not torch.allclose(one, other)
    modulo = model.score(same._replace(users=torch.tensor([0, 2000])))  # they share a token
    torch.testing.assert_close(modulo[0], modulo[1])


# ---- tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own"),
    [("tiger", {}), ("tiger", {"tokenizer": "rqvae"}), ("tiger", {"tokenizer": "random"}),
     ("letter", {}), ("cofirec", {"codes": 12})],
)  # fmt: skip
def test_ids_are_unique_and_follow_from_the_seed(name: str, own: dict[str, Any]) -> None:
    one, same, other = (make_model(name, seed=seed, **own).codes for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert colliding_share(one) == 0.0
    assert one.min() >= 0 and one.max() < own.get("codes", 8)


@pytest.mark.parametrize(("name", "own"), [("tiger", {}), ("tiger", {"tokenizer": "rqvae"}),
                                           ("letter", {}), ("cofirec", {})])  # fmt: skip
def test_similar_items_share_their_first_digit(name: str, own: dict[str, Any]) -> None:
    first = make_model(name, **own).codes[:, 0]
    group = torch.arange(N_ITEMS) % 6
    alike, same = first[:, None] == first, group[:, None] == group
    assert alike[same].float().mean() > alike[~same].float().mean() + 0.4


def test_collaborative_alignment_brings_items_of_the_same_users_together() -> None:
    rng = np.random.default_rng(1)  # features that say nothing of who takes what
    noise = rng.normal(size=(N_ITEMS, 12)).astype(np.float32)
    data = make_data(text=(noise, np.ones(N_ITEMS, dtype=bool)))
    group = torch.arange(N_ITEMS - 5) % 6
    same = group[:, None] == group

    def gap(**own: Any) -> float:
        learns = {"tokenizer_steps": 300, "hidden": 64, "beta": 0.0}
        codes = make_model("letter", data, **learns, **own).codes[:-5]
        overlap = (codes[:, None] == codes).float().mean(2)
        return float(overlap[same].mean() - overlap[~same].mean())

    assert gap(alpha=3.0) > gap(alpha=0.0) + 0.1


def test_behaviour_brings_items_of_the_same_users_together() -> None:
    data = make_data()
    vectors, known = behaviour_vectors(data.train, N_ITEMS, 6, 5, random())
    in_train = torch.zeros(N_ITEMS, dtype=torch.bool)
    in_train[torch.tensor(data.train.items).long() - 1] = True
    assert torch.equal(known, in_train) and (vectors[~known] == 0).all()
    torch.testing.assert_close(vectors[known].square().mean(), torch.tensor(1.0))
    cosines = F.normalize(vectors[known]) @ F.normalize(vectors[known]).T
    group = (torch.arange(N_ITEMS) % 6)[known]
    same = group[:, None] == group
    assert cosines[same].mean() > cosines[~same].mean() + 0.5


def test_without_items_that_were_met_together_the_last_level_is_random() -> None:
    data = make_data()
    alone = data.train.items.reshape(N_USERS, 6)[:, :1].repeat(6, axis=1).reshape(-1)
    train = SimpleNamespace(items=alone, offsets=data.train.offsets)
    codes = make_model("cofirec", data._replace(train=train)).codes
    assert len(codes[:, 1].unique()) == SMALL["codes"]


def test_levels_go_from_coarse_to_fine_and_can_be_turned_round() -> None:
    assert coarse_to_fine(["visual", "text", "audio", "category"]) == [
        "category", "text", "visual", "audio",
    ]  # fmt: skip
    rng = np.random.default_rng(2)
    present = np.ones(N_ITEMS, dtype=bool)
    kind = np.eye(4, dtype=np.float32)[np.arange(N_ITEMS) % 4]
    text = rng.normal(size=(N_ITEMS, 6)).astype(np.float32)
    data = make_data(text=(text, present), category=(kind, present))
    codes = make_model("cofirec", data).codes  # category, text, behaviour, collisions
    assert codes.shape == (N_ITEMS, 4)
    pairs = torch.stack([codes[:, 0], torch.arange(N_ITEMS) % 4], dim=1)
    assert len(pairs.unique(dim=0)) == 4  # the first digit is the category
    turned = make_model("cofirec", data, order="fine").codes
    assert torch.equal(turned[:, 2], codes[:, 0])
    assert make_model("cofirec", data, collaborative=False).codes.shape == (N_ITEMS, 3)


@pytest.mark.parametrize("name", ["tiger", "letter", "cofirec"])
def test_held_back_items_do_not_touch_the_codes_of_the_others(name: str) -> None:
    data = make_data()
    features, present = data.catalogue.modalities["text"]
    changed = features.copy()
    changed[-5:] = 7 - 3 * changed[-5:]  # in nobody's train history
    before = make_model(name, data).codes[:-5]
    after = make_model(name, make_data(text=(changed, present))).codes[:-5]
    assert (before == after)[:, 0].all()
    # a digit that separates collisions may move where such an item joins a group
    assert (before == after).float().mean() > 0.9


# ---- losses of LETTER --------------------------------------------------------------------------


def test_alignment_is_cross_entropy_in_the_batch_without_false_negatives() -> None:
    quantised = torch.randn(3, 4, generator=random())
    behaviour = torch.randn(10, 4, generator=random(1))
    rows = torch.tensor([2, 5, 2])  # item 2 twice
    logits = quantised @ behaviour[rows].T
    expected = -torch.stack(
        [
            logits[0, 0] - logits[0, [0, 1]].logsumexp(0),
            logits[1, 1] - logits[1].logsumexp(0),
            logits[2, 2] - logits[2, [1, 2]].logsumexp(0),
        ]
    ).mean()
    torch.testing.assert_close(alignment_loss(quantised, behaviour, rows), expected)
    assert alignment_loss(quantised[:0], behaviour, rows[:0]) == 0


def test_diversity_draws_a_codeword_to_its_cluster() -> None:
    books = torch.randn(1, 3, 4, generator=random())
    clusters = torch.tensor([[0, 0, 1]])  # codeword 2 is alone
    logits = (books[0] @ books[0].T).masked_fill(torch.eye(3, dtype=torch.bool), float("-inf"))
    expected = F.cross_entropy(logits[:2], torch.tensor([1, 0]))
    found = diversity_loss(books, clusters, torch.tensor([[0], [1]]), random())
    torch.testing.assert_close(found, expected)
    assert diversity_loss(books, clusters, torch.tensor([[2]]), random()) == 0
    with_lonely = diversity_loss(books, clusters, torch.tensor([[0], [1], [2]]), random())
    torch.testing.assert_close(with_lonely, expected * 2 / 3)


def test_clusters_hold_near_codewords() -> None:
    books = torch.tensor([[[0.0, 0], [0, 0.1], [9, 9], [9, 9.1]]]).repeat(2, 1, 1)
    for level in cluster_codewords(books, 2, random()):
        assert level[0] == level[1] and level[2] == level[3] and level[0] != level[2]


@pytest.mark.parametrize("name", ["letter", "cofirec"])
def test_the_temperature_sharpens_the_loss_and_leaves_scores_alone(name: str) -> None:
    plain, sharp = (make_model(name, temperature=tau) for tau in (1.0, 0.5))
    batch = batch_of(N_ITEMS)
    torch.testing.assert_close(plain.score(batch), sharp.score(batch))
    states = torch.randn(5, plain.digits, 16, generator=random())
    codes = torch.randint(8, (5, plain.digits), generator=random())
    logits = plain.digit_logits(states).transpose(0, 1)  # [P, L, K]
    for model, tau in ((plain, 1.0), (sharp, 0.5)):
        expected = F.cross_entropy(logits.flatten(0, 1) / tau, codes.flatten())
        torch.testing.assert_close(model.digit_loss(states, codes), expected)
