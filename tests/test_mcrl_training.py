"""MCRL alone and with PMAT: construction, the three losses, gradients, joint training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import Config, build_config
from data_utils import train_batch, train_examples
from experiments.mcrl import _of_common_seeds, train_mcrl_model
from experiments.report import Run
from experiments.runs import Task
from model_parts.base import Batch, TrainingData
from model_parts.contrastive import aligned, feature_neighbours, info_nce, one_prefix_each
from model_parts.fusion import nearest_grid_point
from our_models.mcrl import MCRL, PMATWithMCRL, sample_positive_negative_ids
from our_models.pmat import PMAT
from util import seed_everything

LEVELS = {"user", "intra", "inter"}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Config], task: Task) -> Callable[..., MCRL | PMATWithMCRL]:
    """`made("mcrl", {"mcrl.user": 0.0})` -> a prepared model."""

    def make(name: str, settings: dict[str, Any] | None = None) -> MCRL | PMATWithMCRL:
        seed_everything(7)
        config = tiny(name, {"mcrl.stage_one_epochs": 1} | (settings or {}), dropout=False)
        kinds = {"pmat": PMAT, "mcrl": MCRL, "pmat_mcrl": PMATWithMCRL}
        model = kinds[name](config, task.dataset.catalogue)
        train, catalogue = task.split.train, task.dataset.catalogue
        data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
        model.prepare(data, random(7))
        return model

    return make


def examples(model: Any, task: Task) -> Batch:
    train = task.split.train
    found = train_examples(train, model.examples, 16)
    index = np.linspace(0, len(found.users) - 1, 24).astype(int)
    return Batch(*map(torch.from_numpy, train_batch(train, found, index)))


# ---- construction ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MCRL, PMATWithMCRL])
def test_models_are_built_from_a_config_alone(model: type) -> None:
    built = model(build_config({"run.model": model.name}))
    assert built.describe()["parameters"] > 0


# ---- forward and backward ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mcrl", "pmat_mcrl"])
def test_all_three_losses_are_there_and_finite_with_gradients(made, task, name: str) -> None:
    model = made(name)
    parts = model.loss(examples(model, task))
    assert set(parts) >= LEVELS
    assert all(bool(torch.isfinite(part)) and float(part.detach()) > 0 for part in parts.values())
    sum(parts.values()).backward()
    for label, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, label
            assert bool(torch.isfinite(parameter.grad).all()), label


@pytest.mark.parametrize("name", ["mcrl", "pmat_mcrl"])
@pytest.mark.parametrize("level", sorted(LEVELS))
def test_each_level_can_be_switched_off_and_weighed(made, task, name: str, level: str) -> None:
    off = made(name, {f"mcrl.{level}": 0.0})
    assert level not in off.loss(examples(off, task))
    values = []
    for weight in (1.0, 3.0):
        model = made(name, {f"mcrl.{level}": weight, "mcrl.stage_one_epochs": 0})
        torch.manual_seed(3)
        values.append(float(model.loss(examples(model, task))[level].detach()))
    assert values[1] == pytest.approx(3 * values[0], rel=1e-4)


def test_lambdas_scale_the_two_halves(made, task) -> None:
    found = []
    for lambdas in ((1.0, 1.0), (2.0, 0.5)):
        settings = {"mcrl.lambda_pmat": lambdas[0], "mcrl.lambda_mcrl": lambdas[1]}
        model = made("pmat_mcrl", settings | {"mcrl.stage_one_epochs": 0})
        torch.manual_seed(3)
        parts = model.loss(examples(model, task))
        found.append({label: float(part.detach()) for label, part in parts.items()})
    one, other = found
    assert other["item"] == pytest.approx(2 * one["item"], rel=1e-4)
    for level in LEVELS:
        assert other[level] == pytest.approx(0.5 * one[level], rel=1e-4)
    alone = made("pmat_mcrl", {"mcrl.lambda_mcrl": 0.0})
    assert not LEVELS & set(alone.loss(examples(alone, task)))


@pytest.mark.parametrize("level", ["none", "item", "random", "permuted"])
def test_the_user_level_knows_its_users_whatever_weights_look_at(made, task, level: str) -> None:
    model = made("pmat_mcrl", {"pmat.personalised": level}).eval()
    batch = one_prefix_each(examples(model, task))
    asking = model._who_asks(batch, model.view(batch))
    assert len(asking.unique(dim=0)) > 1
    longer = model._who_asks(batch._replace(users=batch.users.flip(0)), model.view(batch))
    assert torch.equal(asking, longer), "the history alone decides"
    parts = model.train().loss(examples(model, task))
    parts["user"].backward()
    network = model.context if model.listens is None else model.listens
    assert all(bool(p.grad.any()) for p in network.parameters())


def test_with_late_weights_every_digit_of_a_modality_learns_from_mcrl(made, task) -> None:
    model = made("pmat_mcrl", {"pmat.fusion": "late"})
    rows = torch.arange(50)
    vectors = model.pure_vectors(rows)  # [P, M, d]
    for m in range(vectors.shape[1]):
        codes = model.atlas[m, rows]
        first = model.own.shared_digits + m * codes.shape[1]
        tokens = codes + model.own.codes * (first + torch.arange(codes.shape[1]))
        torch.testing.assert_close(vectors[:, m], model.tokens(tokens).sum(1))


# ---- pairs -------------------------------------------------------------------------------------


def test_positives_and_forbidden_negatives_by_hand() -> None:
    items = torch.tensor([[1, 2, 0], [4, 5, 6], [7, 3, 0]])
    targets = torch.tensor([[0, 3, 0], [0, 0, 1], [0, 9, 0]])
    batch = Batch(torch.arange(3), items, torch.tensor([2, 3, 2]), targets)
    profiles = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    rows, own, similar, forbidden = sample_positive_negative_ids(batch, profiles)
    assert rows.tolist() == [2, 0, 8]
    assert own.tolist() == [0, 1, 2]
    assert similar.tolist() == [2, 2, 2], "user 2 is most like 0, but has had what 0 took next"
    # user 0 has had item 1; user 2 has had item 3; own and similar items are no negatives
    assert forbidden.tolist() == [[True, True, True], [False, True, True], [True, False, True]]
    # another example of the same user is neither a similar user nor a negative
    twice = batch._replace(users=torch.tensor([0, 1, 0]))
    _, _, similar, forbidden = sample_positive_negative_ids(twice, profiles)
    assert similar.tolist() == [0, 2, 1]
    assert bool(forbidden[0, 2]) and bool(forbidden[2, 0])
    _, _, similar, _ = sample_positive_negative_ids(
        batch._replace(users=torch.zeros(3, dtype=torch.long)), profiles
    )
    assert similar.tolist() == [0, 1, 2]


def test_one_prefix_each_keeps_a_history_and_its_next_item() -> None:
    items = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
    targets = torch.tensor([[2, 3, 7], [0, 8, 0], [0, 0, 0]])
    batch = Batch(torch.tensor([10, 11, 12]), items, torch.tensor([3, 2, 1]), targets)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        found = one_prefix_each(batch)
        assert found.users.tolist() == [10, 11]  # the third has no target
        seen.add(int(found.lengths[0]))
        for row in range(2):
            n = int(found.lengths[row])
            assert torch.equal(found.items[row, :n], items[row, :n])
            assert not found.items[row, n:].any()
            assert found.targets[row].sum() == targets[row, n - 1] > 0
    assert seen == {1, 2, 3}


def test_info_nce_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    positives = torch.tensor([0, 1])
    plain = info_nce(logits, positives)
    first = -math.log(math.exp(2) / (math.exp(2) + math.e + 1))
    second = -math.log(math.e / (1 + math.e + math.exp(3)))
    assert plain.item() == pytest.approx((first + second) / 2)
    forbidden = torch.tensor([[True, False, False], [False, False, True]])
    masked = info_nce(logits, positives, forbidden)  # a positive stays, the large negative goes
    second = -math.log(math.e / (1 + math.e))
    assert masked.item() == pytest.approx((first + second) / 2)
    only = info_nce(logits, positives, forbidden, torch.tensor([0.0, 1.0]))
    assert only.item() == pytest.approx(second)


def test_alignment_is_least_for_equal_forms_and_skips_missing_ones() -> None:
    forms = F.normalize(torch.randn(12, 8, generator=random()), dim=1)
    nobody, counts = torch.zeros(12, 12, dtype=torch.bool), torch.ones(12)
    same = aligned(forms, forms, nobody, 0.1, counts)
    other = aligned(forms, forms.roll(1, 0), nobody, 0.1, counts)
    assert same < other
    spoilt = forms.clone()
    spoilt[3] = 100.0
    counts[3] = 0.0
    assert torch.allclose(
        aligned(forms, spoilt, nobody, 0.1, counts), aligned(forms, forms, nobody, 0.1, counts)
    )


def test_what_is_related_is_no_negative_on_either_side() -> None:
    forms, others = F.normalize(torch.randn(2, 4, 8, generator=random()), dim=2)
    related = torch.zeros(4, 4, dtype=torch.bool)
    related[0, 2] = True
    logits = forms @ others.T / 0.1
    ones = logits.masked_fill(related, float("-inf")).log_softmax(1).diagonal()
    twos = logits.T.masked_fill(related.T, float("-inf")).log_softmax(1).diagonal()
    wanted = -(ones.mean() + twos.mean()) / 2
    torch.testing.assert_close(aligned(forms, others, related, 0.1, torch.ones(4)), wanted)


def test_no_anchor_is_pushed_from_itself_or_its_neighbours(made, monkeypatch) -> None:
    model = made("mcrl")
    seen = []
    monkeypatch.setattr(
        "our_models.mcrl.aligned", lambda *parts: seen.append(parts) or parts[0].new_zeros(())
    )
    rows = torch.arange(50)
    vectors = []

    def looked_up(m: int, wanted: torch.Tensor) -> torch.Tensor:
        vectors.append(wanted)
        return model.encoded_in(m, wanted)

    model.intra_level(looked_up, rows)
    for m, (parts, partners) in enumerate(zip(seen, vectors[1::2], strict=True)):
        near = model.neighbours[m][rows]
        wanted = torch.stack(
            [(partners == row) | torch.isin(partners, near[row]) for row in range(len(rows))]
        )
        assert torch.equal(parts[2] | (rows[:, None] == rows), wanted | (rows[:, None] == rows))
        assert bool((parts[2] & (rows[:, None] != rows)).any())


def test_neighbours_are_the_nearest_present_others() -> None:
    vectors = F.normalize(torch.randn(30, 5, generator=random()), dim=1)
    present = torch.ones(30, dtype=torch.bool)
    present[4] = False
    found = feature_neighbours(vectors, present, 3)
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-9)
    similarity[:, 4] = -9
    assert torch.equal(found[0].sort().values, similarity[0].topk(3).indices.sort().values)
    assert found[4].tolist() == [4, 4, 4]


# ---- what the levels do ------------------------------------------------------------------------


def trained(model: Any, task: Task, steps: int = 80) -> Any:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batch = examples(model, task)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(model.loss(batch).values()).backward()
        optimiser.step()
    return model.eval()


def test_inter_level_aligns_the_shared_parts_only(made, task) -> None:
    settings = {"mcrl.user": 0.0, "mcrl.intra": 0.0, "mcrl.inter": 1.0, "mcrl.commit": 0.0}
    model = made("mcrl", settings)
    rows = torch.nonzero(model.present.all(1))[:, 0]

    def cosines() -> tuple[float, float]:
        items = model.encoded(rows)
        shared = [project(items[:, m]) for m, project in enumerate(model.shared)]
        return (
            float(F.cosine_similarity(*shared).mean()),
            float(F.cosine_similarity(items[:, 0], items[:, 1]).mean()),
        )

    with torch.no_grad():
        before = cosines()
    trained(model, task)
    with torch.no_grad():
        after = cosines()
    assert after[0] > before[0] + 0.2
    assert abs(after[1]) < 0.5  # whole latents stay apart, so that weights keep a meaning


def test_joint_training_lowers_every_level(made, task) -> None:
    model = made("pmat_mcrl", {"mcrl.lambda_mcrl": 1.0})
    batch = examples(model, task)

    def parts() -> dict[str, float]:
        torch.manual_seed(5)
        return {label: float(part.detach()) for label, part in model.loss(batch).items()}

    before = parts()
    trained(model, task)
    after = parts()
    for label in ("item", *LEVELS):
        assert after[label] < before[label], label


def test_stage_one_gives_pmat_its_latents_and_is_then_left_alone(made, task) -> None:
    model = made("pmat_mcrl")
    everything = torch.arange(len(model.counts))
    with torch.no_grad():
        assert torch.allclose(model.latents, model.mcrl.encoded(everything), atol=1e-6)
    assert not any(p.requires_grad for p in model.mcrl.parameters())
    before = model.latents.clone()
    trained(model, task, steps=3)
    assert torch.equal(model.latents, before)


def test_stage_one_follows_from_its_generator_and_codebooks_follow_the_encoders(
    made, task, monkeypatch
) -> None:
    fitted: list[int] = []
    fit = MCRL._fit_codebooks
    monkeypatch.setattr(
        MCRL, "_fit_codebooks", lambda self, g: (fitted.append(int(self.fitted)), fit(self, g))
    )
    model = made("pmat_mcrl", {"mcrl.stage_one_epochs": 3, "mcrl.stage_one_batch": 32})
    assert fitted == [-1, -1, 0, 1], "at first and as each of three passes begins"
    first = model.latents.clone()
    train, catalogue = task.split.train, task.dataset.catalogue
    seed_everything(8)  # the model's own random numbers; the generator is the same
    model.load_state_dict(made("pmat_mcrl", {"mcrl.stage_one_epochs": 0}).state_dict())
    seed_everything(9)
    model.prepare(TrainingData(train, catalogue, train.n_users, catalogue.n_items), random(7))
    assert torch.equal(model.latents, first)


def test_scores_rank_as_the_user_level_trains(made, task) -> None:
    model = made("mcrl").eval()
    batch, rows = examples(model, task), torch.nonzero(model.present.all(1))[:, 0]
    with torch.no_grad():
        items = model.encoded(torch.arange(len(model.counts)))
        query, alpha = model.users(batch)
        points = model.grid[nearest_grid_point(alpha.T, model.grid)]
        trained_on = model._cosines(query * points[:, :, None], items)[:, rows]
        model.atlas = lambda: model.grid[:, None, :]  # codes that lose nothing
        model.quantiser.decode = lambda blend: F.normalize(
            (items * blend[..., None]).flatten(1), dim=1
        ).view_as(items)
        scored = model.score(batch)[:, rows]
    assert torch.equal(scored.argsort(1), trained_on.argsort(1))


def test_items_that_lack_modalities_score_as_the_user_level_trains(made, task) -> None:
    model = made("mcrl").eval()
    for m, rows in enumerate((slice(0, 20), slice(20, 40))):  # one modality each
        model.present[rows] = torch.arange(model.present.shape[1]) == m
    batch = examples(model, task)
    with torch.no_grad():
        items = model.encoded(torch.arange(len(model.counts)))
        query, alpha = model.users(batch)
        trained_on = model._cosines(query * alpha[:, :, None], items)[:, :40]
        model.atlas = lambda: model.grid[:, None, :]  # codes that lose nothing
        model.quantiser.decode = lambda blend: F.normalize(
            (items * blend[..., None]).flatten(1), dim=1
        ).view_as(items)
        scored = model.score(batch)[:, :40]
    ratio = scored / trained_on
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("epochs", [0, 1])
def test_latents_are_those_of_pmat_unless_stage_one_learns(made, epochs: int) -> None:
    sizes = {"mcrl.stage_one_epochs": epochs, "mcrl.stage_one_batch": 100_000}
    plain, joint = made("pmat"), made("pmat_mcrl", sizes)
    same = torch.equal(plain.latents, joint.latents)
    assert same == (epochs == 0), "a batch larger than the data is one step an epoch"


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_digits_that_do_not_cut_a_latent_are_named_or_made_to_fit(tiny, task, fusion: str) -> None:
    settings = {"pmat.personal_digits": 6, "pmat.latent": 16, "pmat.fusion": fusion}
    if fusion == "late":
        PMATWithMCRL(tiny("pmat_mcrl", settings), task.dataset.catalogue)
        return
    for model in (MCRL, PMATWithMCRL):
        with pytest.raises(ValueError, match=r"pmat\.latent=16 .* pmat\.personal_digits=6"):
            model(tiny(model.name, settings), task.dataset.catalogue)


def test_weights_of_mcrl_do_not_depend_on_its_encoders(made, task) -> None:
    """Encoders that bend one modality into a point would otherwise draw all weight there."""
    model = made("mcrl").eval()
    batch = examples(model, task)
    before = model.modality_weights_of(batch)
    with torch.no_grad():
        model.encoders[1][-1].bias += 100.0
    assert torch.equal(model.modality_weights_of(batch), before)
    assert before.std(0).max() > 0.01


def test_mcrl_codes_items_by_the_modalities_they_have(made, task) -> None:
    model = made("mcrl").eval()
    everything = torch.arange(len(model.counts))
    batch = examples(model, task)
    n = len(batch.users)
    alpha = torch.full((n, len(model.encoders)), 0.01)
    alpha[:, 0] = 1 - alpha[:, 1:].sum(1)  # nearly all on a modality that some items lack
    model.users = lambda _: (torch.randn(n, *model.inputs.shape[1:], generator=random()), alpha)
    lacking = everything[~model.present[:, 0] & model.present.any(1)]
    assert len(lacking) > 2
    even = model.present[lacking].float()
    points = nearest_grid_point((even / even.sum(1, keepdim=True)).T, model.grid)
    ids, scores = model.item_ids(batch), model.score(batch)
    assert torch.equal(ids[0, lacking], model.atlas()[points, lacking])
    assert scores[0, lacking].unique().numel() > len(lacking) // 2
    whole = everything[model.present[:, 0]]
    corner = nearest_grid_point(alpha[:1].T, model.grid)
    assert torch.equal(ids[0, whole], model.atlas()[corner, whole])


def test_modality_weights_look_at_the_features_before_mcrl(made, task) -> None:
    plain, joint = made("pmat"), made("pmat_mcrl")
    assert torch.equal(joint.traits, plain.latents)
    assert not torch.allclose(joint.latents, plain.latents, atol=0.1)
    batch = examples(joint, task)
    summaries, weights = joint.summaries(batch.items), joint.modality_weights_of(batch)
    assert torch.equal(summaries, plain.summaries(batch.items))
    joint.latents.neg_()
    assert torch.equal(joint.summaries(batch.items), summaries)
    assert torch.equal(joint.modality_weights_of(batch), weights)


@pytest.mark.parametrize("name", ["mcrl", "pmat_mcrl"])
def test_documented_training_function(tiny, task, tmp_path, name: str) -> None:
    found = train_mcrl_model(tiny(name, {"mcrl.stage_one_epochs": 1}), task, tmp_path / "run")
    assert found["model"] == name
    assert 0 <= found["test"]["ndcg@10"] <= 1
    assert (tmp_path / "run" / "metrics.json").exists()


def test_models_are_compared_on_seeds_that_both_have_finished(caplog) -> None:
    made = [
        Run(Path(), {"model": model, "seed": seed})
        for model, seed in [("pmat", 1), ("pmat", 2), ("pmat_mcrl", 2), ("pmat_mcrl", 3)]
    ]
    with caplog.at_level("WARNING", logger="pmat"):
        common = _of_common_seeds(made)
    assert [(run.model, run.seed) for run in common] == [("pmat", 2), ("pmat_mcrl", 2)]
    assert "[2]" in caplog.text
    assert _of_common_seeds(made[:1] + made[2:3]) == []
