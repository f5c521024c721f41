"""PMAT: what codes may depend on, exact decoding, the loss, and every control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from config import Config
from experiments.runs import Task
from model_parts.base import Batch, TrainingData
from model_parts.fusion import nearest_grid_point
from our_models.pmat import PMAT
from util import seed_everything


def training_data(task: Task) -> TrainingData:
    train, catalogue = task.split.train, task.dataset.catalogue
    return TrainingData(train, catalogue, train.n_users, catalogue.n_items)


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Config], task: Task) -> Callable[..., PMAT]:
    """`made({"pmat.grid": 4})` -> a prepared, untrained model whose user sides differ."""

    def make(settings: dict[str, Any] | None = None) -> PMAT:
        seed_everything(7)
        config = tiny("pmat", {"pmat.grid": 4} | (settings or {}), dropout=False)
        model = PMAT(config, task.dataset.catalogue)
        model.prepare(training_data(task), torch.Generator().manual_seed(7))
        return model.eval()

    return make


def histories(task: Task, n: int = 6) -> Batch:
    """Train histories of the first users, each position predicting the next item."""
    train = task.split.train
    rows = [torch.tensor(train.of(user)).long() for user in range(n)]
    T = max(len(row) for row in rows) - 1
    items, targets = torch.zeros(2, n, T, dtype=torch.long)
    for i, row in enumerate(rows):
        items[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
    return Batch(torch.arange(n), items, (items > 0).sum(1), targets)


# ---- nothing looks ahead -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pmat.prefix": True}, {"pmat.fusion": "late"}])
def test_states_and_codes_know_nothing_of_later_items(made, task, settings) -> None:
    model, batch = made(settings), histories(task)
    other = batch._replace(items=batch.items.clone())
    other.items[:, 4:] = (other.items[:, 4:] * 7) % 50 + 1
    other.items[:, 4:] *= batch.items[:, 4:] > 0
    (states, contexts), (others, changed) = model.encode(batch), model.encode(other)
    assert torch.allclose(states[:, :4], others[:, :4], atol=1e-6)
    assert torch.allclose(contexts[:, :5], changed[:, :5], atol=1e-6)
    assert not torch.allclose(states[:, 4:], others[:, 4:], atol=1e-3)


def test_a_filter_that_looks_both_ways_learns_from_prefixes(made, task) -> None:
    model = made({"pmat.causal": False})
    assert (model.examples, made().examples) == ("prefixes", "positions")
    batch = histories(task)
    other = batch._replace(items=batch.items.clone())
    other.items[:, 4:] = (other.items[:, 4:] * 7) % 50 + 1
    other.items[:, 4:] *= batch.items[:, 4:] > 0
    states, others = model.encode(batch)[0], model.encode(other)[0]
    assert not torch.allclose(states[:, :4], others[:, :4], atol=1e-4)


def test_another_target_leaves_every_code_unchanged(made, task) -> None:
    model, batch = made(), histories(task)
    other = batch._replace(targets=(batch.targets * 3) % 50 * (batch.targets > 0))
    assert torch.equal(model.item_ids(batch), model.item_ids(other))
    assert torch.equal(model.score(batch), model.score(other))


# ---- exactness ---------------------------------------------------------------------------------


def test_scores_are_sums_over_the_codes_the_user_sees(made, task) -> None:
    model, batch = made(), histories(task)
    ids = model.item_ids(batch)  # [B, N, L]
    digits = torch.arange(ids.shape[2]) * model.own.codes
    vectors = model.tokens.weight[ids + digits].sum(2)  # [B, N, d]
    states, _ = model.encode(batch)
    last = states[torch.arange(len(batch.users)), batch.lengths - 1]
    expected = (vectors @ last[:, :, None])[..., 0] + model.tie_break()
    assert torch.allclose(model.score(batch), expected, atol=1e-5)


def test_items_with_one_id_come_in_order_of_their_train_counts(made, task) -> None:
    model, batch = made({"pmat.shared_digits": 0}), histories(task)
    model.atlas[:, 1:4] = model.atlas[:, :1]
    model.counts[:4] = torch.tensor([2.0, 9.0, 1.0, 5.0])
    # codes depend on what an item has, too: all four see the same blend
    model.latents[1:4], model.present[1:4] = model.latents[0], model.present[0]
    scores = model.score(batch)[:, :4]
    assert (scores.argsort(1, descending=True) == torch.tensor([1, 3, 0, 2])).all()
    assert (scores.amax(1) - scores.amin(1) < 1e-3).all()


def test_atlas_codes_are_codes_of_the_users_blend(made, task) -> None:
    model, batch = made(), histories(task)
    rows = torch.arange(50)
    weights = model.modality_weights(model.view(batch), rows)  # [M, B, N]
    points = model.grid[nearest_grid_point(weights, model.grid)]  # [B, N, M]
    tables = model.quantiser.tables(model.latents)
    ids = model.item_ids(batch)[:, :, model.own.shared_digits :]
    for user in range(len(batch.users)):
        assert torch.equal(ids[user], model.quantiser.codes(tables, points[user].T))


def test_small_catalogue_loss_is_the_exact_softmax(made, task) -> None:
    model, batch = made(), histories(task)
    expected = []
    for user in range(len(batch.users)):
        for step in range(int(batch.lengths[user])):
            cut = batch.items[user : user + 1, : step + 1]
            one = Batch(batch.users[user : user + 1], cut, torch.tensor([step + 1]), cut * 0)
            target = batch.targets[user, step : step + 1] - 1
            expected.append(F.cross_entropy(model.score(one), target))
    found = model.loss(batch)["item"]
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-4)


def test_weights_learn_from_the_next_blends(made) -> None:
    """alpha_m gains what one more step towards modality m would: not what m alone would."""
    model = made({"pmat.personal_digits": 2, "pmat.shared_digits": 0})
    G, (M, r) = len(model.grid), (model.grid.shape[1], 4)
    # two users in an even context: the first has weights at one grid point, seen with one item
    sides = torch.zeros(1, M, 2)
    sides[..., 0], weights = 1.0, torch.tensor([0.5, 0.25, 0.25][:M])
    sides[0, :, 1] = (weights / weights.sum()).log()
    sides.requires_grad_()
    items = torch.zeros(1, M, 2)
    items[..., 1] = 1.0
    every = torch.randn(G, 1, model.own.width)
    state = torch.randn(1, model.own.width)
    score = model._pair_scores(
        state, sides, torch.zeros(1).long(), every, items, torch.zeros(1).long(), learn=True
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(score.sum(), sides)
    by_blend = every[:, 0] @ state[0]
    alpha = sides[0, :, 1].softmax(0).detach()
    here = int(nearest_grid_point(alpha[:, None], model.grid)[0])
    slopes = r * torch.stack([by_blend[int(to[here])] for to in model.towards])
    expected = alpha * (slopes - (alpha * slopes).sum())  # through the softmax
    assert torch.allclose(gradient[0, :, 1], expected, atol=1e-4)
    assert score.item() == pytest.approx(by_blend[here].item(), abs=1e-5)


def test_a_grid_of_too_many_blends_is_refused(tiny, task) -> None:
    with pytest.raises(ValueError, match=r"pmat.grid=64 gives .* blends of 3 modalities"):
        PMAT(tiny("pmat", {"pmat.grid": 64, "pmat.with_behaviour": True}), task.dataset.catalogue)


def test_candidates_are_raised_by_their_chance_to_be_there(made) -> None:
    model = made({"pmat.negatives": 10})
    model.counts.copy_(torch.arange(1, 51))
    targets = torch.multinomial(model.counts / model.counts.sum(), 4000, replacement=True)
    hits, chances = torch.zeros(50), torch.zeros(50)
    for draw in targets.view(-1, 8)[:500]:
        rows, where, correction = model._candidates(draw)
        assert torch.equal(rows[where], draw)
        assert len(rows.unique()) == len(rows)
        hits[rows] += 1
        chances[rows] = (-correction).exp()
    assert torch.allclose(hits / 500, chances, atol=0.08)


# ---- what weights depend on --------------------------------------------------------------------


def codes_of(model: PMAT, batch: Batch) -> torch.Tensor:
    return model.item_ids(batch)[:, :, model.own.shared_digits :]


def test_same_item_has_different_ids_for_different_users(made, task) -> None:
    model, batch = made(), histories(task)
    personal, shared = codes_of(model, batch), model.item_ids(batch)[:, :, :4]
    assert bool((personal[0] != personal[1]).any())
    assert torch.equal(shared[0], shared[1])
    twin = Batch(*(field[:1].expand(2, *field.shape[1:]) for field in batch))
    assert torch.equal(codes_of(model, twin)[0], codes_of(model, twin)[1])


@pytest.mark.parametrize("level", ["none", "item"])
def test_without_users_codes_are_the_same_for_everybody(made, task, level) -> None:
    codes = codes_of(made({"pmat.personalised": level}), histories(task))
    assert torch.equal(codes, codes[:1].expand_as(codes))


def test_user_weights_are_the_same_for_all_complete_items(made, task) -> None:
    model, batch = made({"pmat.personalised": "user"}), histories(task)
    complete = torch.nonzero(model.present.all(1))[:, 0]
    weights = model.modality_weights(model.view(batch), complete)
    assert torch.allclose(weights, weights[:, :, :1].expand_as(weights), atol=1e-6)
    assert weights[0, :, 0].std() > 0


@pytest.mark.parametrize("level", ["random", "permuted"])
def test_controls_do_not_look_at_the_users_own_history(made, task, level) -> None:
    model, batch = made({"pmat.personalised": level}), histories(task)
    other = batch._replace(items=batch.items.flip(0), lengths=batch.lengths.flip(0))
    assert torch.equal(codes_of(model, batch), codes_of(model, other))
    codes = codes_of(model, batch)
    assert bool((codes[0] != codes[1]).any())


def test_strangers_are_histories_as_long_as_the_model_sees_any(tiny, task) -> None:
    seed_everything(7)
    model = PMAT(tiny("pmat", {"data.max_history": 3}), task.dataset.catalogue)
    model.prepare(training_data(task), torch.Generator().manual_seed(7))
    M, z = model.latents.shape[1:]
    assert model.strangers[:, M * z].max() == torch.tensor(3.0).log1p()


@pytest.mark.parametrize(("level", "rate"), [("none", 1.0), ("user", 0.1), ("random", 1.0)])
def test_a_user_vector_that_is_only_a_prefix_learns_at_the_full_rate(made, level, rate) -> None:
    model = made({"pmat.personalised": level, "pmat.prefix": True, "pmat.attention_rate": 0.1})
    rates = {id(p): group["rate"] for group in model.parameter_groups() for p in group["params"]}
    assert {rates[id(p)] for p in model.context.parameters()} == {rate}
    assert rates[id(model.prefix.weight)] == 1.0


def test_weights_that_are_never_updated_stay_as_the_first_items_said(made, task) -> None:
    model, batch = made({"pmat.dynamic": False, "pmat.warm_items": 2}), histories(task)
    short = batch._replace(items=batch.items[:, :2], lengths=batch.lengths.clamp(max=2))
    assert torch.equal(codes_of(model, batch), codes_of(model, short))
    assert not torch.equal(codes_of(made(), batch), codes_of(made(), short))


def test_late_weights_leave_ids_alone_and_still_personalise_scores(made, task) -> None:
    model, batch = made({"pmat.fusion": "late"}), histories(task)
    ids = model.item_ids(batch)
    assert ids.shape[2] == 4 + 2 * 2  # as many digits as with early fusion
    assert torch.equal(ids[0], ids[1])
    weights = model.modality_weights(model.view(batch), torch.arange(50))
    assert weights[0].std(0).max() > 0


def test_with_late_weights_a_modality_has_codebooks_of_its_own(made) -> None:
    model = made({"pmat.fusion": "late"})
    for m, quantiser in enumerate(model.quantisers):
        assert quantiser.codebooks.shape[2] == 1
        known = model.present[:, m]
        words = quantiser.decode(model.atlas[m])[:, 0]
        close = F.cosine_similarity(words, model.latents[:, m])[known].mean()
        shuffled = F.cosine_similarity(words.roll(1, 0), model.latents[:, m])[known].mean()
        assert close > shuffled + 0.3
        assert all(len(digit.unique()) > 12 for digit in model.atlas[m][known].T)  # of 16


def test_ids_for_nobody_in_particular_are_even_though_a_third_is_no_half(made) -> None:
    model = made({"pmat.with_behaviour": True, "pmat.grid": 2})
    thirds = torch.full((3, 50), 1 / 3)
    codes = model.quantiser.codes(model.quantiser.tables(model.latents), thirds)
    assert torch.equal(model.item_ids()[:, model.own.shared_digits :], codes)
    assert not torch.equal(model.atlas[0], codes)


@pytest.mark.parametrize("level", ["user_item", "user", "item", "none", "random"])
def test_an_item_without_any_modality_has_weights_and_scores(made, task, level: str) -> None:
    model, batch = made({"pmat.personalised": level}), histories(task)
    model.present[7], model.latents[7] = False, 0.0
    weights = model.modality_weights(model.view(batch), torch.arange(50))
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1:]))
    assert torch.isfinite(model.score(batch)).all()


def test_even_weights_need_a_grid_that_leaves_room_for_them(made) -> None:
    with pytest.raises(ValueError, match=r"pmat\.grid=2"):
        made({"pmat.grid": 1, "pmat.personalised": "none"})


def test_law_of_the_random_control_is_kept(made, task) -> None:
    law = [0.7, 0.1, 0.1, 0.05, 0.05]
    text = ",".join(map(str, law))
    model = made({"pmat.personalised": "random", "pmat.law": text})
    assert torch.allclose(model.blend_law(), torch.tensor(law), atol=0.01)
    view = model.view(histories(task))
    weights = model.modality_weights(view, torch.arange(50))  # [M, B, S]
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1:]))
    assert not weights.permute(2, 0, 1)[~model.present].any()  # as with learned weights
    with pytest.raises(ValueError, match="5 numbers"):
        made({"pmat.law": "0.5,0.5"})


# ---- parts -------------------------------------------------------------------------------------


def test_behaviour_is_one_more_modality(made, task) -> None:
    model = made({"pmat.with_behaviour": True, "pmat.grid": 2})
    assert model.latents.shape[1] == 3
    assert model.grid.shape == (6, 3)
    items = torch.tensor(task.split.train.items).long().unique() - 1
    assert model.present[items, 2].all()
    assert torch.isfinite(model.loss(histories(task))["item"])


def test_even_weights_are_even_though_a_third_is_no_half(made, task) -> None:
    model = made({"pmat.with_behaviour": True, "pmat.grid": 2, "pmat.personalised": "none"})
    ids, shared = model.item_ids(histories(task)), model.own.shared_digits
    whole = model.present.all(1)
    assert whole.any() and not whole.all()
    everywhere = torch.full((3, len(whole)), 1 / 3)
    codes = model.quantiser.codes(model.quantiser.tables(model.latents), everywhere)
    assert torch.equal(ids[:, whole, shared:], codes[whole].expand(len(ids), -1, -1))
    # an item that lacks a modality: even among those it has
    assert torch.equal(ids[:, ~whole, shared:], codes[~whole].expand(len(ids), -1, -1))


def test_codebooks_are_made_for_the_blends_in_use(made, task) -> None:
    def closeness(settings: dict[str, Any]) -> float:
        model = made({"pmat.grid": 3, "pmat.with_behaviour": True} | settings)
        items = torch.tensor(task.split.train.items).long().unique() - 1
        blends = (model.latents[items] / 3).flatten(1)  # blend 0 is the even one
        words = model.quantiser.decode(model.atlas[0, items]).flatten(1)
        return float(torch.nn.functional.cosine_similarity(blends, words).mean())

    assert closeness({"pmat.personalised": "none"}) > closeness({}) + 0.01


def test_beta_scales_a_dense_vector(made) -> None:
    model, rows = made({"pmat.beta": 0.5}), torch.arange(50)
    with torch.no_grad():
        dense = model.residual.weight.clone()
        model.residual.weight.zero_()
        pure = model.fixed_vectors(rows)
        model.residual.weight.copy_(dense)
    assert torch.allclose(model.fixed_vectors(rows) - pure, 0.5 * dense, atol=1e-6)


def test_consistency_is_zero_when_weights_stay(made, task) -> None:
    batch = histories(task)
    moving = made({"pmat.consistency": 1.0}).loss(batch)["consistency"]
    resting = made({"pmat.consistency": 1.0, "pmat.sharpness": 0.0, "pmat.personalised": "user"})
    assert moving > 0
    assert resting.loss(batch)["consistency"].item() == pytest.approx(0.0, abs=1e-6)


def test_digit_loss_is_the_mean_over_digits(made, task) -> None:
    model, batch = made({"pmat.digit_loss": 1.0, "pmat.personalised": "none"}), histories(task)
    states, _ = model.encode(batch)
    wanted = batch.targets > 0
    ids = model.item_ids()[batch.targets[wanted] - 1]
    tables = model.tokens.weight.view(8, 16, -1)
    losses = [F.cross_entropy(states[wanted] @ tables[j].T, ids[:, j]) for j in range(8)]
    found = model.loss(batch)["digits"]
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_features_are_needed(tiny, task) -> None:
    model = PMAT(tiny("pmat"), task.dataset.catalogue)
    bare = training_data(task)._replace(catalogue=None)
    with pytest.raises(ValueError, match="needs item features"):
        model.prepare(bare, torch.Generator())
