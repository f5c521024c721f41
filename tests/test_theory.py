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

from experiments import bounds, bounds_learning, bounds_retrieval, find_mode
from experiments.bounds import Check, make_tables
from experiments.theory import run_theory
from experiments.theory_random import (
    aligned_latents,
    alignment,
    codes_under,
    make_instance,
    random_checks,
    toward,
    unit,
)
from main import main
from model_parts.fusion import nearest_grid_point, simplex_grid

ROOT = Path(__file__).parent.parent
SEEDS = st.integers(0, 2**32 - 1)
# Bounds that are known to say little: theory_analysis.md says so.
WEAK = {"digits that must differ", "levels together"}  # on tiny data


def names(checks: dict[int, list[Check]]) -> dict[str, dict]:
    return {check.name: check.summary() for found in checks.values() for check in found}


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


def test_checks_of_equalities_and_of_the_shared_rows_can_fail() -> None:
    rng = np.random.default_rng(0)
    latents, weights = unit(rng.standard_normal((9, 3, 8))), rng.dirichlet(np.ones(3), (2, 9))
    latents[:, 1] = 0.0  # missing, and yet it has weight
    assert bounds.isometry(latents, *weights).summary()["violations"] > 6
    noise = bounds.averaging(np.array([0.5, -0.5]), 0.3, 8)
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
    check = bounds.crossings(codes_under(made.tables), r, rng.dirichlet(np.ones(3), 4), way)
    assert check.summary()["violations"] == 0


def test_mean_over_places_agrees_with_drawing_places() -> None:
    rng = np.random.default_rng(3)
    made = make_instance(rng, items=10, modalities=2)
    step = np.array([0.1, -0.1])
    codes = codes_under(made.tables)
    check = bounds.crossings(codes, 8, np.array([[0.5, 0.5]]), step)
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
    for check in (
        bounds.contraction(*starts, targets, rate),
        bounds.tracking(starts[0], targets, rate),
        bounds.averaging(0.1 * rng.standard_normal(3), rate, 6),
        bounds.settled(starts, targets[0], rate, 4),
    ):
        assert check.summary()["violations"] == 0, check.name


def test_tracking_is_attained_on_a_straight_line() -> None:
    steps = np.arange(200)[:, None] * np.array([0.004, -0.004])
    check = bounds.tracking(np.array([0.1, 0.9]), np.array([0.1, 0.9]) + steps, 0.2)
    np.testing.assert_allclose(check.measured, check.bound, atol=1e-12)
    assert check.bound[-1] == pytest.approx(0.8 / 0.2 * 0.004 * np.sqrt(2), rel=1e-3)


@given(seed=SEEDS, margin=st.floats(0.02, 1.0))
@settings(max_examples=15, deadline=None)
def test_hysteresis_keeps_its_budget_and_its_price(seed: int, margin: float) -> None:
    rng = np.random.default_rng(seed)
    made = make_instance(rng, items=8, digits=4, codes=8)
    path = bounds.to_grid(rng.dirichlet(np.ones(3), (12, 8)), 8)
    codes = bounds.follow(made.tables, path, margin)
    assert bounds.churn(made.tables, path, codes, margin).summary()["violations"] == 0
    assert bounds.fidelity(made.tables, path, codes, margin).summary()["violations"] == 0


def test_more_hysteresis_is_more_stable_and_less_faithful() -> None:
    rng = np.random.default_rng(0)
    made = make_instance(rng)
    path = bounds.to_grid(rng.dirichlet(np.ones(3), (20, len(made.latents))), 8)
    changes, lost = [], []
    for margin in (0.01, 0.3, 1.0):
        codes = bounds.follow(made.tables, path, margin)
        changes.append(bounds.churn(made.tables, path, codes, margin).measured.mean())
        lost.append(bounds.fidelity(made.tables, path, codes, margin).measured.mean())
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
