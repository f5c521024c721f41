"""Bounds of theory_analysis.md: never violated, never idle; the first wording really is false."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import (
    bounds,
    bounds_learning,
    bounds_retrieval,
    bounds_updates,
    find_mode,
    theory_server,
)
from experiments.bounds import Check, make_tables
from experiments.theory import run_theory
from experiments.theory_model import Trained, retrieval
from experiments.theory_random import (
    aligned_latents,
    alignment,
    codes_under,
    make_instance,
    random_checks,
    toward,
    unit,
)
from experiments.theory_server import Followed, follow, updates
from main import main
from model_parts.base import TrainingData
from model_parts.fusion import nearest_grid_point, simplex_grid
from our_models.pmat import PMAT
from util import seed_everything

ROOT = Path(__file__).parent.parent
SEEDS = st.integers(0, 2**32 - 1)
# Bounds that are known to say little: theory_analysis.md says so.
WEAK = {
    "digits that must differ",
    "levels together",
    "digit changes, by the way of weights",
}  # on tiny data


def names(checks: dict[int, list[Check]]) -> dict[str, dict]:
    return {check.name: check.summary() for found in checks.values() for check in found}


def violated(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.summary()["violations"]}


@pytest.fixture(scope="module")
def seen(tiny, task):
    """`seen({"pmat.beta": 1.0})` -> an untrained model with fitted codes, as the checks see it."""

    def make(settings: dict | None = None) -> Trained:
        seed_everything(7)
        config = tiny("pmat", {"pmat.grid": 4} | (settings or {}), dropout=False)
        train, catalogue = task.split.train, task.dataset.catalogue
        model = PMAT(config, catalogue)
        data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
        model.prepare(data, torch.Generator().manual_seed(7))
        return Trained(model, train, config.data.max_history, np.random.default_rng(0))

    return make


# ---- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_bound_holds_and_says_something_on_random_instances(seed: int) -> None:
    found = names(random_checks(np.random.default_rng(seed)))
    assert len(found) >= 25
    for name, summary in found.items():
        assert summary["violations"] == 0, name
        assert summary["informative"] > 0.3, f"{name} is vacuous"
        assert summary["tightness"] > 0.005, name


@pytest.mark.parametrize(("bound", "measured"), [(1.0, 1.1), (0.0, 0.01)])
def test_a_violated_bound_is_counted(bound: float, measured: float) -> None:
    above = Check("x", np.array([bound, 2.0]), np.array([measured, 1.0]), 5.0)
    assert above.summary()["violations"] == 1
    below = Check("x", np.array([measured, 1.0]), np.array([bound, 2.0]), 0.0, lower=True)
    assert below.summary()["violations"] == 1
    equal = Check("x", np.array([measured, 1.0]), np.array([bound, 1.0]), 0.0, exact=True)
    assert equal.summary()["violations"] == 1
    nothing = Check("x", np.array([bound, 2.0]), np.array([np.nan, 1.0]), 5.0)
    assert nothing.summary()["violations"] == 1


def test_tolerance_is_a_share_of_small_values() -> None:
    small = Check("x", np.array([1e-3]), np.array([1.01e-3]), 1.0)
    assert small.summary()["violations"] == 1
    assert small._replace(measured=np.array([1.00001e-3])).summary()["violations"] == 0
    assert small._replace(slack=1e-4).summary()["violations"] == 0


def test_checks_of_equalities_and_of_the_shared_rows_can_fail() -> None:
    rng = np.random.default_rng(0)
    latents, weights = unit(rng.standard_normal((9, 3, 8))), rng.dirichlet(np.ones(3), (2, 9))
    latents[:, 1] = 0.0  # missing, and yet it has weight
    assert bounds.isometry(latents, *weights).summary()["violations"] > 6
    noise = bounds_updates.averaging(np.array([0.5, -0.5]), 0.3, 8)
    wrong = noise._replace(bound=1.05 * noise.bound)
    assert noise.summary()["violations"] == 0 and wrong.summary()["violations"] == 8
    projection = rng.standard_normal((4, 8))
    inside = rng.standard_normal((20, 4)) @ projection
    inside[3] = 0.0  # an anchor that nothing pulls
    ways = rng.standard_normal((20, 8))
    check = bounds_learning.confined(1e-6 * inside, projection, ways)
    assert check.summary()["violations"] == 0 and check.summary()["instances"] == 38
    outside = bounds_learning.confined(1e-6 * ways, projection, rng.standard_normal((20, 8)))
    assert outside.summary()["violations"] >= 20


# ---- theorem 1 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [1.0, 1e3, 1e9])
def test_no_constant_saves_the_first_wording(constant: float) -> None:
    tables = make_tables(np.ones((1, 2, 1)), np.array([[[[1.0], [0.0]], [[0.0], [1.0]]]]))
    half = 0.1 / constant
    one, other = np.array([[0.5 + half, 0.5 - half]]), np.array([[0.5 - half, 0.5 + half]])
    differ = (tables.codes(one) != tables.codes(other)).mean()
    assert differ == 1.0 > constant * np.linalg.norm(one - other)
    check = bounds.changed_digits(tables, one, other)  # the right form knows of the wall
    assert check.bound == check.measured == 1.0


@given(seed=SEEDS, modalities=st.integers(2, 5), r=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_largest_remainders_are_the_nearest_grid_point(seed: int, modalities: int, r: int) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(modalities), 20)
    mine = bounds.to_grid(weights, r)
    np.testing.assert_allclose(mine.sum(1), 1)
    np.testing.assert_allclose(mine * r, np.rint(mine * r), atol=1e-9)
    if modalities <= 3:
        grid = simplex_grid(modalities, r)
        theirs = grid[nearest_grid_point(torch.from_numpy(weights.T).float(), grid)].numpy()
        far = [np.linalg.norm(x - weights, axis=1) for x in (mine, theirs)]
        np.testing.assert_allclose(far[0], far[1], atol=1e-6)
    assert bounds.rounding(weights, r).summary()["violations"] == 0


@pytest.mark.parametrize(("modalities", "half"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_rounding_radius_is_attained(modalities: int, half: int) -> None:
    r = 4
    weights = np.full((1, modalities), half / modalities / r)  # all fractional parts are half / M
    weights[0, 0] += (r - half) / r
    found = bounds.rounding(weights, r)
    np.testing.assert_allclose(found.measured, found.bound, rtol=1e-6)


@given(seed=SEEDS, distance=st.floats(0.001, 1.0), modalities=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_digits_change_only_where_margins_allow(seed, distance, modalities) -> None:
    rng = np.random.default_rng(seed)
    made = make_instance(rng, items=12, modalities=modalities, digits=4, codes=8)
    one, other = rng.dirichlet(np.ones(modalities), (2, 12))
    other = toward(one, other, distance)
    assert bounds.changed_digits(made.tables, one, other).summary()["violations"] == 0
    # a step shorter than the margin in any direction changes nothing
    nu = bounds.margins(made.tables, one).min(1)
    way = other - one
    step = 0.999 * np.minimum(nu / np.linalg.norm(way, axis=1), 1)
    near = one + step[:, None] * way
    np.testing.assert_array_equal(made.tables.codes(one), made.tables.codes(near))


def test_a_margin_is_the_distance_to_the_wall() -> None:
    rng = np.random.default_rng(5)
    made = make_instance(rng, items=40, modalities=2, digits=4, codes=8)
    one = np.tile([0.5, 0.5], (40, 1))
    nu = bounds.margins(made.tables, one)
    crossed = np.zeros_like(nu, dtype=bool)
    codes = made.tables.codes(one)
    for sign in (1, -1):
        for item, digit in np.argwhere(nu < 0.7):  # the wall is inside the simplex
            beyond = one.copy()
            beyond[item] += sign * 1.001 * nu[item, digit] * np.array([1, -1]) / np.sqrt(2)
            crossed[item, digit] |= made.tables.codes(beyond)[item, digit] != codes[item, digit]
    assert crossed[nu < 0.7].all() and (nu < 0.7).sum() > 20


@given(seed=SEEDS, length=st.floats(0.005, 0.6), r=st.integers(2, 20))
@settings(max_examples=15, deadline=None)
def test_expected_changes_of_a_step(seed: int, length: float, r: int) -> None:
    rng = np.random.default_rng(seed)
    made = make_instance(rng, items=6, digits=4, codes=8)
    way = rng.standard_normal(3)
    way = length * unit(way - way.mean())
    lines, codes = rng.dirichlet(np.ones(3), 4), codes_under(made.tables)
    counted, a_priori = bounds.crossings(codes, r, 8, lines, way)
    assert not violated([counted, a_priori, bounds.without_rounding(codes, 8, lines, way)])
    assert (a_priori.bound >= counted.bound).all()


def test_as_many_changes_as_there_can_be() -> None:
    def codes(weights):  # one code for each of 5 grid points
        return np.rint(4 * weights[:, :1]).astype(int)[:, :, None]

    for check in bounds.crossings(codes, 4, 5, np.array([[0.3, 0.7]]), np.array([0.05, -0.05])):
        np.testing.assert_allclose(check.measured, check.bound)
    free = bounds.without_rounding(codes, 5, np.array([[0.3, 0.7]]), np.array([0.05, -0.05]), 2000)
    np.testing.assert_allclose(free.measured, free.bound, rtol=0.01)


def test_without_rounding_a_code_that_was_left_does_not_come_back() -> None:
    rng = np.random.default_rng(2)
    made = make_instance(rng, items=20, digits=4, codes=6)
    one, other = np.eye(3)[:2]
    codes = codes_under(made.tables)(toward(one, other, np.linspace(0, 1, 300)[:, None]))
    changes = (codes[1:] != codes[:-1]).sum(0)
    distinct = np.array([[len(set(c)) for c in item] for item in codes.transpose(1, 2, 0)])
    np.testing.assert_array_equal(changes, distinct - 1)
    assert changes.max() > 1


@given(seed=SEEDS, modalities=st.integers(2, 4), r=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_walls_of_a_cell_are_where_rounding_changes(seed: int, modalities: int, r: int) -> None:
    rng = np.random.default_rng(seed)
    weights, others = rng.dirichlet(np.ones(modalities), (2, 30))
    gamma = bounds.wall_distance(weights, r)
    far = np.linalg.norm(others - weights, axis=1)
    near = toward(weights, others, np.minimum(0.999 * gamma / far, 1)[:, None])
    np.testing.assert_allclose(bounds.to_grid(near, r), bounds.to_grid(weights, r))
    pairs = [(m, n) for m in range(modalities) for n in range(modalities) if m != n]
    steps = np.stack([np.eye(modalities)[m] - np.eye(modalities)[n] for m, n in pairs])
    beyond = weights[:, None] + 1.001 * gamma[:, None, None] * steps / np.sqrt(2)
    inside = (beyond >= 0).all((1, 2))  # the wall is in the simplex
    moved = np.abs(bounds.to_grid(beyond, r) - bounds.to_grid(weights, r)[:, None]).max(-1) > 1e-9
    assert moved.any(1)[inside].all()


def test_ids_of_users_who_come_together() -> None:
    rng = np.random.default_rng(4)
    made = make_instance(rng, items=60, digits=4, codes=16)
    slope, context, way = rng.standard_normal((60, 3, 5)), *rng.standard_normal((2, 5))
    chi = bounds.sensitivity(slope, np.ones((60, 3), bool))

    def look(contexts):
        logits = slope @ contexts
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return weights, made.tables.codes(bounds.to_grid(weights, 4))

    shares, (weights, codes) = [], look(context)
    for step in (0.3, 0.1, 0.01, 0.001):
        reach = chi * step * np.linalg.norm(way)
        pair = codes, look(context + step * way)[1]
        checks = bounds.near_users(made.tables, 4, reach, weights, pair)
        assert not violated(list(checks))
        shares.append([check.bound.mean() for check in checks])
        if step == 0.3:
            assert checks[1].measured.mean() > 0.02
            idle = bounds.near_users(made.tables, 4, 0 * reach, weights, pair)
            assert "digits of near users, by walls" in violated(list(idle))
    margins, walls = np.array(shares).T
    assert walls[0] > walls[1] > walls[2] > walls[3] and walls[3] < 0.02
    assert margins[3] > 0.1  # what the resolution of the grid leaves of the other form


def test_mean_over_places_agrees_with_drawing_places() -> None:
    rng = np.random.default_rng(3)
    made = make_instance(rng, items=10, modalities=2)
    step = np.array([0.1, -0.1])
    codes = codes_under(made.tables)
    check, _ = bounds.crossings(codes, 8, 16, np.array([[0.5, 0.5]]), step)
    first = rng.random(20_000)
    one = np.stack([first, 1 - first], 1)
    inside = first + 0.1 <= 1
    grid = np.stack([np.arange(9) / 8, 1 - np.arange(9) / 8], 1)
    table = codes(grid)
    here, there = (np.rint(8 * x[:, 0]).astype(int) for x in (one[inside], one[inside] + step))
    drawn = (table[here] != table[there]).mean((1, 2)).sum() / len(first)
    assert check.measured[0] == pytest.approx(drawn, abs=0.01)


# ---- theorems 2 and 3 --------------------------------------------------------------------------


@given(seed=SEEDS, rate=st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_updates_contract_track_and_settle(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.dirichlet(np.ones(3), 15)
    starts = rng.dirichlet(np.ones(3), 2)
    one, other = (bounds_updates.blended(start, targets[1:], rate) for start in starts)
    still = np.broadcast_to(targets[0], (300, *starts.shape))
    checks = [
        bounds_updates.contraction(one, other, rate),
        bounds_updates.tracking(one, targets, rate),
        bounds_updates.averaging(0.1 * rng.standard_normal(3), rate, 6),
        bounds_updates.settled(bounds_updates.blended(starts, still, rate), still[0], rate, 4),
    ]
    assert not violated(checks)


def test_tracking_is_attained_on_a_straight_line() -> None:
    steps = np.arange(200)[:, None] * np.array([0.004, -0.004])
    targets = np.array([0.1, 0.9]) + steps
    path = bounds_updates.blended(targets[0], targets[1:], 0.2)
    check = bounds_updates.tracking(path, targets, 0.2)
    np.testing.assert_allclose(check.measured, check.bound, atol=1e-12)
    assert check.bound[-1] == pytest.approx(0.8 / 0.2 * 0.004 * np.sqrt(2), rel=1e-3)


def test_rest_comes_when_it_is_said_and_not_before() -> None:
    target, start = np.array([[0.65, 0.35]]), np.array([[0.9, 0.1]])  # the wall is at .75
    path = bounds_updates.blended(start, np.repeat(target[None], 9, 0), 0.5)
    check = bounds_updates.settled(path, target, 0.5, 2)
    assert check.bound == check.measured == 2
    codes = np.zeros((10, 1, 1), int)
    codes[5:] = 1  # changed by update 5
    assert bounds_updates.settled(path, target, 0.5, 2, codes).measured == 5


RULES = {
    "as it is": lambda old, new, rate: (1 - rate) * old + rate * new,
    "rate cubed": lambda old, new, rate: (1 - rate**3) * old + rate**3 * new,
    "never moves": lambda old, new, rate: old,
    "the other way round": lambda old, new, rate: rate * old + (1 - rate) * new,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_rule_of_the_server_is_seen(seen, monkeypatch, rule: str) -> None:
    monkeypatch.setattr(theory_server, "_SHUFFLED", 2)
    users = Followed(seen(), np.random.default_rng(0))
    assert np.abs(users.targets[0][0] - users.targets[0][-1]).max() > 0.01
    monkeypatch.setattr("our_models.serving.blend_weights", RULES[rule])
    exact = {"weights off their recursion", "two starts come together"}
    wrong = violated(updates(users, rate=0.4))
    assert (not wrong) if rule == "as it is" else exact <= wrong
    if rule in ("rate cubed", "never moves"):
        assert "updates until codes rest" in wrong


def test_scores_of_the_server_move_with_its_codes(seen) -> None:
    one = seen()
    history = one.train.items[one.train.offsets[0] : one.train.offsets[1]]
    held = follow(one, history, 1.0, 0.0)
    length, shifts, old, new = theory_server.rescored(held)
    words = one.words()[one.model.own.shared_digits :]
    digits = np.arange(len(words))
    state = held.server._encode(0).detach().numpy()[0]
    by_hand = (words[digits, new] - words[digits, old]).sum(1) @ state
    np.testing.assert_allclose(shifts, np.abs(by_hand), atol=1e-5)
    assert length == pytest.approx(np.linalg.norm(state)) and shifts.max() > 1e-3


@pytest.mark.parametrize("settings", [{"pmat.temperature": 0.1}, {"pmat.beta": 1.0}])
def test_scores_that_are_no_sums_over_digits_are_seen(seen, settings) -> None:
    found = {tuple(s): retrieval(seen(s), np.random.default_rng(0))[0] for s in ({}, settings)}
    plain, other = found.values()
    assert plain.name == "scores off the table's" and not violated([plain])
    assert violated([other])


def test_a_digit_that_starts_on_a_wall_changes_as_soon_as_its_budget_allows() -> None:
    tables = make_tables(np.ones((1, 2, 1)), np.array([[[[1.0], [0.0]], [[0.0], [1.0]]]]))
    margin, places = 0.3, np.array([0.5, 0.34, 0.66, 0.34, 0.66])  # scores differ by .32
    path = np.stack([places, 1 - places], 1)[:, None]  # a zigzag between two codes
    codes = bounds_updates.follow(tables, path, margin)
    first = bounds_updates.churn(tables, path[:2], codes[:2], margin)
    assert first.bound == first.measured == 1
    every = bounds_updates.churn(tables, path, codes, margin)
    assert every.bound == every.measured == 4  # no more often than weights move
    way = bounds_updates.travel(tables, path, codes, margin)
    assert way.measured == 4 and way.bound == pytest.approx(7 * 0.32 / margin)


@pytest.mark.parametrize("digits", [1, 4])
def test_fidelity_is_attained_where_every_digit_is_short_by_the_margin(digits: int) -> None:
    margin, weights = 0.1, np.array([[0.5, 0.5]])
    table = np.zeros((1, digits, 2, 2))
    table[:, :, 1] = margin / np.sqrt(digits)
    tables = bounds.Tables(table, np.ones(digits))
    kept = np.zeros((1, digits), int)
    check = bounds_updates.fidelity(tables, weights, kept, margin)
    np.testing.assert_allclose(check.measured, check.bound)


def test_p_values_that_are_too_small_or_too_large_are_seen() -> None:
    rng, levels = np.random.default_rng(0), np.array([0.005, 0.01, 0.05, 0.5])
    right = rng.integers(1, 101, 2000) / 100
    assert not bounds_updates.alarms_on_noise(right, levels, 99).summary()["violations"]
    assert not bounds_updates.false_alarms(right, levels).summary()["violations"]
    for wrong in (right - 0.01, right / 2, np.ones(2000), np.sqrt(right)):
        assert bounds_updates.alarms_on_noise(wrong, levels, 99).summary()["violations"]
    for small in (right - 0.01, right / 2):
        assert bounds_updates.false_alarms(small, levels).summary()["violations"]


@given(seed=SEEDS, margin=st.floats(0.02, 1.0))
@settings(max_examples=15, deadline=None)
def test_hysteresis_keeps_its_budget_and_its_price(seed: int, margin: float) -> None:
    rng = np.random.default_rng(seed)
    made = make_instance(rng, items=8, digits=4, codes=8)
    path = bounds.to_grid(rng.dirichlet(np.ones(3), (12, 8)), 8)
    codes = bounds_updates.follow(made.tables, path, margin)
    for check in (bounds_updates.churn, bounds_updates.travel, bounds_updates.fidelity):
        assert not violated([check(made.tables, path, codes, margin)])


def test_more_hysteresis_is_more_stable_and_less_faithful() -> None:
    rng = np.random.default_rng(0)
    made = make_instance(rng)
    path = bounds.to_grid(rng.dirichlet(np.ones(3), (20, len(made.latents))), 8)
    changes, lost = [], []
    for margin in (0.01, 0.3, 1.0):
        codes = bounds_updates.follow(made.tables, path, margin)
        changes.append(bounds_updates.churn(made.tables, path, codes, margin).measured.mean())
        lost.append(bounds_updates.fidelity(made.tables, path, codes, margin).measured.mean())
    assert changes[0] > changes[1] > changes[2] and lost[0] < lost[1] < lost[2]


# ---- theorems 4 and 5 --------------------------------------------------------------------------


def test_information_certified_with_the_true_density_grows_with_keys() -> None:
    joint = np.array([[0.4, 0.1], [0.1, 0.4]])
    critic = np.log(joint / 0.25)
    found = [bounds_learning.certified_information(joint, critic, keys) for keys in (2, 4, 8)]
    certified, information, entropy = zip(*found, strict=True)
    assert certified[0] < certified[1] < certified[2] < information[0] < entropy[0]
    assert information[0] == pytest.approx(0.8 * np.log(1.6) + 0.2 * np.log(0.4))
    assert entropy[0] == pytest.approx(np.log(2))


def test_codes_bound_the_information_of_critics_that_see_them_and_of_no_others() -> None:
    joint = 0.94 * np.eye(4) / 4 + 0.005 * (1 - np.eye(4))
    joint, codes = joint / joint.sum(), np.array([0, 0, 1, 1])
    coded = bounds_learning.joint_of_codes(joint, codes)
    density, of_codes = (np.log(p / np.outer(p.sum(1), p.sum(0))) for p in (joint, coded))
    _, information, entropy = bounds_learning.certified_information(coded, of_codes, 1)
    certified = [
        bounds_learning.certified_information(joint, critic, 4)[0]
        for critic in (of_codes[:, codes], density)
    ]
    assert certified[0] < information < entropy == pytest.approx(np.log(2))
    assert certified[1] > information


def test_digit_bounds_are_attained_by_the_difference_of_two_ids() -> None:
    codes, digits = np.array([[0, 0, 0, 0], [1, 1, 1, 0]]), 4  # words 0 and 1 are orthogonal
    words = np.eye(2)[codes].reshape(2, -1) / np.sqrt(digits)
    anchors = unit(np.stack([words[0] - words[1], words[1] - words[0]]))
    checks = bounds_learning.code_distance(anchors @ words.T, codes, np.sqrt(2), 0.3)
    for check in checks:
        np.testing.assert_allclose(check.bound, 0.75)
        np.testing.assert_allclose(check.measured, 0.75)


@given(seed=SEEDS, temperature=st.floats(0.03, 1.0))
@settings(max_examples=25, deadline=None)
def test_small_losses_mean_margins_and_digits(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    anchors, keys = unit(rng.standard_normal((2, 12, 6)))
    checks = bounds_learning.separation(anchors @ keys.T, np.arange(12), temperature)
    assert all(check.summary()["violations"] == 0 for check in checks)


def test_margin_bounds_are_attained_by_equal_negatives() -> None:
    similarity = np.array([[0.9, 0.1, 0.1, 0.1]])
    _, mean = bounds_learning.separation(similarity, np.array([0]), 0.2)
    np.testing.assert_allclose(mean.bound, mean.measured)


@given(seed=SEEDS, levels=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_levels_help_exactly_where_the_residual_says(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    goal = rng.standard_normal(4)
    mixture = bounds_learning.Mixture(goal, rng.standard_normal((levels, 4)))
    assert bounds_learning.synergy([mixture]).summary()["violations"] == 0
    if mixture.best > 0 and abs(mixture.gain) > 1e-9:
        assert mixture.together > mixture.best
    elif mixture.best > 0:
        assert mixture.together == pytest.approx(mixture.best, abs=1e-4)


def test_three_levels_can_be_worse_than_one() -> None:
    mixture = bounds_learning.Mixture(
        np.array([1.0, 0.0]), np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    )
    assert mixture.best == mixture.together == pytest.approx(1.0)
    assert mixture.even == pytest.approx(5**-0.5)


def test_alignment_takes_meaning_from_ours_and_digits_from_sums() -> None:
    found = alignment(np.random.default_rng(0), np.array([0.0, 0.99]))
    assert found["similarity"][1] < 0.3 * found["similarity"][0]
    assert found["similarity_bound"][1] < 0.5 * found["similarity_bound"][0]
    assert found["digits_of_sums"][1] < 0.5 * found["digits_of_sums"][0]
    assert found["digits"][1] > 0.5 * found["digits"][0]


def test_inertness_in_the_limit() -> None:
    rng = np.random.default_rng(1)
    latents = aligned_latents(rng, 10, 3, 8, 1.0)
    for check in bounds_learning.inertness(latents, *rng.dirichlet(np.ones(3), 2)):
        np.testing.assert_allclose(check.measured, 0, atol=1e-7)
        np.testing.assert_allclose(check.bound, 0, atol=1e-6)


def test_rotations_of_modalities_leave_similarities() -> None:
    rng = np.random.default_rng(1)
    latents, weights = aligned_latents(rng, 10, 3, 8, 0.9), rng.dirichlet(np.ones(3), 2)
    turns = np.linalg.qr(rng.standard_normal((3, 8, 8)))[0]
    turned = np.einsum("imz,mzy->imy", latents, turns)
    plain, _ = bounds_learning.inertness(latents, *weights)
    other, sums = bounds_learning.inertness(turned, *weights)
    np.testing.assert_allclose(other.measured, plain.measured)
    assert (other.measured <= plain.bound).all() and (plain.bound < 0.8 * other.bound).mean() > 0.9
    assert (sums.measured > bounds_learning.inertness(latents, *weights)[1].bound).any()


def test_alignment_leaves_weights_of_user_and_item_a_say() -> None:
    rng = np.random.default_rng(1)
    latents = aligned_latents(rng, 2, 3, 8, 1.0)
    for first, second in [*rng.dirichlet(np.ones(3), (5, 2)), np.eye(3)[[0, 0]], np.eye(3)[:2]]:
        x, y = unit(bounds.fused(latents, np.stack([first, second])))
        cosine = latents[0, 0] @ latents[1, 0] * (unit(first) @ unit(second))
        assert x @ y == pytest.approx(cosine)
    assert x @ y == 0 != latents[0, 0] @ latents[1, 0]  # the last pair has nothing in common


# ---- theorem 6 ---------------------------------------------------------------------------------


@given(seed=SEEDS, beams=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_certain_beam_is_exact(seed: int, beams: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(4, size=(40, 3))
    table = rng.standard_normal((3, 4))
    found = bounds_retrieval.beam_search(table, codes, beams)
    best = table[np.arange(3), codes].sum(1).max()
    if found.score >= found.ceiling:
        assert found.score == pytest.approx(best)
    assert best <= max(found.score, found.ceiling) + 1e-9


def test_a_wide_beam_is_certain_and_a_narrow_one_may_be_wrong() -> None:
    codes = np.array([[0, 1], [1, 0]])
    table = np.array([[1.0, 0.9], [5.0, 0.0]])
    narrow, wide = (bounds_retrieval.beam_search(table, codes, b) for b in (1, 2))
    assert narrow.item == 0 and narrow.score < narrow.ceiling
    assert wide.item == 1 and wide.score >= wide.ceiling


def test_break_even_of_the_table() -> None:
    digits, codes, width = 16, 256, 64
    even = digits * codes * width / (width - digits)
    for n, cheaper in ((int(even) - 1, False), (int(even) + 2, True)):
        count = bounds_retrieval.work(n, digits, codes, width)
        assert (count["table"] < count["dense"]) is cheaper


# ---- the document and the mode -----------------------------------------------------------------


def test_formulas_render_on_github() -> None:
    """Markdown eats backslashes before punctuation and underscores after it, GitHub some macros."""
    text = (ROOT / "theory_analysis.md").read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0
    blocks = re.findall(r"```math\n(.*?)```", text, re.S)
    prose = re.sub(r"```math\n.*?```", "", text, flags=re.S)
    assert prose.count("$") % 2 == 0
    inline = re.findall(r"\$([^$]+)\$", prose)
    assert len(blocks) > 10 and len(inline) > 200
    for formula in [*inline, *blocks]:
        assert formula.count("{") - formula.count("\\{") == formula.count("}") - formula.count(
            "\\}"
        ), formula
        assert "operatorname" not in formula
    for formula in inline:
        assert not re.search(r"\\[^A-Za-z]", formula), formula
        assert not re.search(r"(^|[^A-Za-z0-9])_", formula), formula
        assert not re.search(r"[<>*`]", formula), formula
        assert formula == formula.strip(), formula
        assert "\n\n" not in formula, formula
    assert not re.search(r"\$[A-Za-z0-9]", re.sub(r"\$[^$]+\$", "$", prose)), "letter after $"


def test_theory_refuses_what_the_theorems_are_not_about(tmp_path, small_flags, capsys) -> None:
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    base = ["--mode", "theory", *folders, *small_flags]
    assert main([*base, "--model", "rpg"]) == 2
    assert "leave --model out" in capsys.readouterr().err
    assert main([*base, "--set", "pmat.fusion=late"]) == 2
    assert "late" in capsys.readouterr().err
    for weights in ("random", "none"):
        assert main([*base, "--set", f"pmat.personalised={weights}"]) == 2
        assert f"{weights} has no attention" in capsys.readouterr().err
    for setting in ("pmat.temperature=0.1", "pmat.beta=1.0"):
        assert main([*base, "--set", setting]) == 2
        assert "leave pmat.temperature and pmat.beta at 0" in capsys.readouterr().err
    assert main([*base, "--set", "mock.dims={text: 8}"]) == 2
    assert "two modalities" in capsys.readouterr().err


def test_theory_writes_bounds_and_figures(tmp_path, small_flags, capsys) -> None:
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    assert find_mode("theory") is run_theory
    assert main(["--mode", "theory", "--epochs", "1", *folders, *small_flags]) == 0
    (folder,) = [path for path in (tmp_path / "save").iterdir() if path.is_dir()]
    content = json.loads((folder / "theory.json").read_text())
    for place in ("random instances", "trained model"):
        assert list(content[place]) == [f"theorem {number}" for number in range(1, 7)]
        for checks in content[place].values():
            for name, found in checks.items():
                assert found["violations"] == 0, name
                assert found["informative"] > 0 or name in WEAK, name
    for number in range(1, 7):
        for ending in ("pdf", "png"):
            assert (folder / f"theorem_{number}.{ending}").stat().st_size > 5_000
    assert "VIOLATED" not in capsys.readouterr().out
    assert (tmp_path / "save" / "theory.json").exists()
