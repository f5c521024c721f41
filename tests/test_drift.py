"""Tests of a change of interest, on histories without one, with a planted one, and on mock data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_readers.mock import make_mock
from model_parts.drift import (
    NO_DRIFT,
    Drift,
    blend_weights,
    detect_drift,
    digits_with_hysteresis,
    topic_drift,
)
from our_models.tokenizer import whitened_latents

quick = settings(max_examples=40, deadline=None, derandomize=True)
# Largest distance of 300 uniform numbers from the diagonal, exceeded once in 100 times.
KOLMOGOROV_300 = 1.63 / 300**0.5


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def aimless(n: int, generator: torch.Generator, modalities: int = 2) -> tuple[Tensor, Tensor]:
    """A history whose order means nothing: coherent in modality 0, one row in ten missing."""
    latents = torch.randn(n, modalities, 8, generator=generator)
    latents[:, 0] += 1.0
    present = torch.rand(n, modalities, generator=generator) > 0.1
    return F.normalize(latents, dim=2) * present[..., None], present


def planted(before: int, after: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coherent in modality 0 up to the cut, in modality 1 from there on."""
    latents = torch.randn(before + after, 2, 8, generator=generator)
    latents[:before, 0, 0] += 12.0
    latents[before:, 1, 0] += 12.0
    return F.normalize(latents, dim=2), torch.ones(before + after, 2, dtype=torch.bool)


def many(test: Callable[[int, torch.Generator], Drift], lengths: range) -> list[Drift]:
    generator = random(3)
    return [test(lengths[i % len(lengths)], generator) for i in range(300)]


def aimless_topics(n: int, generator: torch.Generator) -> Drift:
    return topic_drift(torch.randint(6, (n,), generator=generator), 6, generator)


def aimless_drift(n: int, generator: torch.Generator) -> Drift:
    return detect_drift(*aimless(n, generator), generator)


# ---- the null ----------------------------------------------------------------------------------


def test_p_values_of_histories_without_drift_are_uniform() -> None:
    p = torch.tensor([d.p_value for d in many(aimless_drift, range(8, 40))]).sort().values
    expected = torch.arange(1, 301) / 300
    assert (p - expected).abs().max() < KOLMOGOROV_300


def test_p_values_of_topics_are_not_too_small() -> None:
    p = torch.tensor([d.p_value for d in many(aimless_topics, range(8, 40))])
    # counts are few, so ties make it err to the safe side
    for level in (0.01, 0.05, 0.1, 0.3, 0.5):
        assert (p <= level).float().mean() < level + KOLMOGOROV_300


def test_p_values_are_exact_fractions() -> None:
    for seed in range(20):
        p = aimless_drift(12, random(seed)).p_value
        assert p == round(p * 201) / 201  # so that a level like .05 can be met


def test_null_is_that_of_the_length_and_a_threshold_is_not() -> None:
    short, long = (many(aimless_topics, range(n, n + 1)) for n in (8, 60))
    threshold = torch.tensor([d.divergence for d in long]).quantile(0.9)
    assert torch.tensor([d.divergence for d in short]).gt(threshold).float().mean() > 0.5
    for found in (short, long):
        assert torch.tensor([d.p_value for d in found]).le(0.1).float().mean() < 0.17


@pytest.mark.parametrize("n", [6, 60])
def test_false_alarms_do_not_depend_on_the_length(n: int) -> None:
    p = torch.tensor([d.p_value for d in many(aimless_drift, range(n, n + 1))])
    assert p.le(0.1).float().mean() < 0.17


def test_short_or_uniform_histories_have_not_drifted() -> None:
    latents, present = aimless(3, random())
    assert detect_drift(latents, present, random()) == NO_DRIFT
    assert detect_drift(latents[:0], present[:0], random()) == NO_DRIFT
    assert topic_drift(torch.zeros(1, dtype=torch.long), 4, random()) == NO_DRIFT
    same = latents[:1].expand(12, -1, -1)
    found = detect_drift(same, torch.ones(12, 2, dtype=torch.bool), random())
    assert found.p_value == 1.0
    assert found.divergence == pytest.approx(0.0, abs=1e-4)


def test_modality_nobody_has_changes_nothing_into_nan() -> None:
    latents, present = planted(8, 8, random())
    latents[:, 1], present[:, 1] = 0.0, False
    found = detect_drift(latents, present, random())
    assert found.divergence >= 0.0
    assert 0.0 < found.p_value <= 1.0


# ---- planted changes ---------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(10, 10), (6, 20), (20, 6)])
def test_planted_change_is_found_where_it_is(before: int, after: int) -> None:
    found = detect_drift(*planted(before, after, random()), random(1))
    assert found.p_value <= 0.01
    assert abs(found.cut - before) <= 1
    assert found.divergence > 1.0


def test_planted_change_of_topics_is_found() -> None:
    old, new = torch.tensor([0, 1] * 8), torch.tensor([2, 3] * 4)
    found = topic_drift(torch.cat([old, new]), 6, random())
    assert found.p_value <= 0.01
    assert found.cut == len(old)
    mixed = torch.tensor([0, 1] * 12)
    assert topic_drift(mixed, 6, random()).p_value > 0.5


def test_result_is_decided_by_the_generator() -> None:
    history = aimless(20, random())
    assert detect_drift(*history, random(1)) == detect_drift(*history, random(1))


def test_drift_of_mock_users_is_told_apart() -> None:
    data = make_mock(n_users=200, history_min=20, history_max=60)
    assert data.truth is not None
    generator = random()
    everything = torch.ones(data.catalogue.n_items, dtype=torch.bool)
    latents, present = whitened_latents(data.catalogue, everything, 8, generator)
    found = []
    for user in range(200):
        rows = torch.tensor(data.sequences.of(user)).long() - 1
        found.append(detect_drift(latents[rows], present[rows], generator))
    p = torch.tensor([d.p_value for d in found])
    steps = torch.tensor(data.truth.drift_steps)
    moved, stayed = p[steps >= 0], p[steps < 0]
    ahead = (moved[:, None] < stayed).float() + 0.5 * (moved[:, None] == stayed)
    assert ahead.mean() >= 0.9  # AUC
    assert (stayed <= 0.01).float().mean() <= 0.05
    assert (moved <= 0.01).float().mean() >= 0.8
    errors = torch.tensor([d.cut for d in found]) - steps
    assert errors[(steps >= 0) & (p <= 0.01)].abs().median() <= 2


# ---- update ------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_blend_is_a_contraction_and_stays_a_distribution(seed: int, rate: float) -> None:
    old, target = torch.rand(2, 3, 20, generator=random(seed)).softmax(1)
    new = blend_weights(old, target, rate)
    assert torch.all((new - target).abs() <= (1 - rate) * (old - target).abs() + 1e-6)
    assert torch.allclose(new.sum(0), torch.ones(20))


def test_blend_goes_all_the_way_exactly() -> None:
    old, target = torch.rand(2, 3, 20, generator=random())
    assert torch.equal(blend_weights(old, target, 1.0), target)
    assert torch.equal(blend_weights(old, target, 0.0), old)


def test_hysteresis_keeps_or_changes_as_told() -> None:
    scores = torch.tensor([[[1.0, 1.3, 0.0], [2.0, 0.0, 0.5]]])  # [1, L, K]
    old = torch.tensor([[0, 2]])
    assert digits_with_hysteresis(scores, old, 0.5).tolist() == [[0, 0]]
    assert digits_with_hysteresis(scores, old, 0.2).tolist() == [[1, 0]]
    assert digits_with_hysteresis(scores, old, 9.0).tolist() == [[0, 2]]


def test_hysteresis_without_margin_is_argmax_and_ties_keep_the_old() -> None:
    scores = torch.randn(50, 4, 9, generator=random())
    old = torch.randint(9, (50, 4), generator=random(1))
    assert torch.equal(digits_with_hysteresis(scores, old, 0.0), scores.argmax(2))
    assert torch.equal(digits_with_hysteresis(torch.zeros_like(scores), old, 0.0), old)


@quick
@given(st.integers(0, 10_000))
def test_larger_margin_changes_fewer_digits(seed: int) -> None:
    scores = torch.randn(30, 4, 9, generator=random(seed))
    old = torch.randint(9, (30, 4), generator=random(seed + 1))
    changes = [
        int((digits_with_hysteresis(scores, old, margin) != old).sum())
        for margin in (0.0, 0.5, 1.0, 2.0, 9.0)
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] == 0
