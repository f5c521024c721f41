"""Metrics against hand-computed cases, brute force, scipy and sklearn."""

from __future__ import annotations

import doctest
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.metrics import coverage_error, label_ranking_average_precision_score, ndcg_score

import metrics
from metrics import Ranks, per_user, ranking_metrics, tied_rank

quick = settings(max_examples=60, deadline=None, derandomize=True)

# One to three targets for each of up to five users; ranks may be x.5.
several = st.lists(
    st.lists(st.integers(2, 60).map(lambda twice: twice / 2), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


def make_ranks(*of_users: list[float], targets: list[int] | None = None) -> Ranks:
    """Ranks of users given one list each."""
    values = np.array([rank for ranks in of_users for rank in ranks], dtype=float)
    offsets = np.cumsum([0] + [len(ranks) for ranks in of_users])
    items = np.arange(1, len(values) + 1) if targets is None else np.array(targets)
    return Ranks(np.arange(len(of_users)), values, offsets, items)


def rank_all(scores: np.ndarray, relevant: np.ndarray) -> Ranks:
    """Full ranking with `tied_rank`, as the evaluation does it; `relevant` [E, N] bool."""
    rows, items = np.nonzero(relevant)
    own = scores[rows, items][:, None]
    higher = (scores[rows] > own).sum(axis=1)
    equal = (scores[rows] == own).sum(axis=1) - 1
    offsets = np.concatenate([[0], np.cumsum(relevant.sum(axis=1))])
    return Ranks(np.arange(len(scores)), tied_rank(higher, equal), offsets, items + 1)


HAND = make_ranks([3], [1, 12, 4], [25])  # user 1 has three targets
DISCOUNT = {rank: 1 / np.log2(rank + 1) for rank in (1, 2, 3, 4, 12)}


def test_docstring_examples_hold():
    result = doctest.testmod(metrics)
    assert result.failed == 0
    assert result.attempted >= 7


# ---- ranking -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("recall", 2, [0, 1 / 3, 0]),
        ("recall", 3, [1, 1 / 3, 0]),
        ("recall", 5, [1, 2 / 3, 0]),
        ("recall", 20, [1, 1, 0]),
        ("hit_rate", 2, [0, 1, 0]),
        ("hit_rate", 5, [1, 1, 0]),
        ("mrr", None, [1 / 3, 1, 1 / 25]),
        ("ndcg", 1, [0, 1, 0]),  # the ideal list of length 1 holds one of the three
        ("ndcg", 2, [0, 1 / (1 + DISCOUNT[2]), 0]),
        ("ndcg", 5, [0.5, (1 + DISCOUNT[4]) / (1.5 + DISCOUNT[2]), 0]),
        ("ndcg", 20, [0.5, (1 + DISCOUNT[4] + DISCOUNT[12]) / (1.5 + DISCOUNT[2]), 0]),
    ],
)
def test_per_user_by_hand(name, k, expected):
    np.testing.assert_allclose(per_user(HAND, name, k), expected, atol=1e-12)


def test_ranking_metrics_average_users_not_targets():
    result = ranking_metrics(HAND)
    assert list(result) == [
        *("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20"),
        *("mrr", "hit_rate@5", "hit_rate@10", "hit_rate@20"),
    ]
    assert result["recall@5"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # pooled it would be 3/5
    assert result["mrr"] == pytest.approx((1 / 3 + 1 + 1 / 25) / 3)
    assert result["hit_rate@20"] == pytest.approx(2 / 3)
    assert list(ranking_metrics(HAND, ks=(1,))) == ["recall@1", "ndcg@1", "mrr", "hit_rate@1"]
    assert all(type(value) is float for value in result.values())


def test_targets_tied_across_the_cutoff_cannot_overfill_the_list():
    tied = make_ranks([2, 2, 2])  # three targets share ranks 1..3, two places
    assert per_user(tied, "recall", 2) == pytest.approx([2 / 3])
    assert per_user(tied, "ndcg", 2) == pytest.approx([1])


@quick
@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(1, 4), st.integers(2, 12)), elements=st.integers(0, 3)
    )
)
def test_tied_rank_is_the_average_position(scores):
    everything = np.ones(scores.shape, dtype=bool)
    ranks = rank_all(scores, everything).ranks.reshape(scores.shape)
    for row, values in zip(ranks, scores, strict=True):
        places = sorted(values.tolist(), reverse=True)
        for rank, value in zip(row, values, strict=True):
            assert rank == np.mean([i for i, v in enumerate(places, start=1) if v == value])
    np.testing.assert_array_equal(ranks, stats.rankdata(-scores, axis=1))


@quick
@given(st.integers(20, 400), st.integers(0, 2**32 - 1))
def test_scoring_everything_alike_is_not_above_chance(n_items, seed):
    targets = np.random.default_rng(seed).integers(n_items, size=8)
    ranks = rank_all(np.zeros((8, n_items)), np.eye(n_items, dtype=bool)[targets])
    np.testing.assert_array_equal(ranks.ranks, (n_items + 1) / 2)
    np.testing.assert_array_equal(ranks.targets, targets + 1)
    assert ranking_metrics(ranks)["recall@10"] <= 10 / n_items


@quick
@given(several, st.integers(1, 30))
def test_metrics_are_bounded_and_grow_with_k(of_users, k):
    ranks = make_ranks(*of_users)
    for name in ("recall", "ndcg", "hit_rate"):
        now, later = per_user(ranks, name, k), per_user(ranks, name, k + 1)
        assert ((now >= 0) & (now <= 1)).all()
        if name != "ndcg":  # with several targets the ideal grows too
            assert (later >= now - 1e-12).all()
    single = make_ranks(*([own[0]] for own in of_users))
    assert (per_user(single, "ndcg", k + 1) >= per_user(single, "ndcg", k)).all()
    np.testing.assert_array_equal(per_user(single, "recall", k), per_user(single, "hit_rate", k))


@quick
@given(several, st.integers(1, 12))
def test_a_user_alone_equals_that_user_among_others(of_users, k):
    together = make_ranks(*of_users)
    for name in ("recall", "ndcg", "mrr", "hit_rate"):
        alone = [per_user(make_ranks(own), name, k)[0] for own in of_users]
        np.testing.assert_allclose(per_user(together, name, k), alone, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_agrees_with_sklearn_where_nothing_ties(k):
    rng = np.random.default_rng(k)
    scores = rng.permuted(np.tile(np.arange(30.0), (40, 1)), axis=1)
    relevant = rng.random((40, 30)) < 0.1
    relevant[np.arange(40), rng.integers(30, size=40)] = True
    assert relevant.sum(axis=1).max() > 3
    ranks = rank_all(scores, relevant)
    assert per_user(ranks, "ndcg", k).mean() == pytest.approx(ndcg_score(relevant, scores, k=k))
    one = np.eye(30, dtype=bool)[rng.integers(30, size=40)]
    single = rank_all(scores, one)
    assert per_user(single, "mrr").mean() == pytest.approx(
        label_ranking_average_precision_score(one, scores)
    )
    assert single.ranks.mean() == pytest.approx(coverage_error(one, scores))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (make_ranks([1], [np.nan]), "finite"),
        (make_ranks([1], [np.inf]), "finite"),
        (make_ranks([1], [0.5]), "at least 1"),
        (make_ranks([1], []), "without targets"),
        (make_ranks(), "without targets"),
        (make_ranks([1], [2])._replace(offsets=np.array([0, 1])), "offsets"),
        (make_ranks([1], [2])._replace(offsets=np.array([0, 1, 3])), "offsets"),
        (make_ranks([1], [2])._replace(offsets=np.array([1, 1, 2])), "offsets"),
        (make_ranks([1], [2], targets=[4, 0]), "item number"),
        (make_ranks([1], [2], targets=[4]), "its target"),
    ],
)
def test_broken_ranks_are_refused(ranks, message):
    for use in (ranking_metrics, lambda r: metrics.cold_recall(r, np.zeros(9))):
        with pytest.raises(ValueError, match=message):
            use(ranks)


def test_unknown_metrics_and_cutoffs_are_refused():
    with pytest.raises(ValueError, match="precision"):
        per_user(HAND, "precision", 5)
    for k in (0, None):
        with pytest.raises(ValueError, match="cutoff"):
            per_user(HAND, "recall", k)


# ---- lists and cold items ----------------------------------------------------------------------


def test_coverage_counts_distinct_items_of_the_catalogue():
    lists = np.array([[4, 1, 2], [1, 4, 2], [5, 1, 4]])
    assert metrics.coverage(lists, n_items=10) == pytest.approx(0.4)
    assert metrics.coverage(lists, n_items=5) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1, 2, 3], [4, 5, 4]], "list 1 "),
        ([[1, 2, 0]], "outside"),
        ([[1, 2, 6]], "outside"),
    ],
)
def test_coverage_refuses_repeats_and_foreign_items(lists, message):
    with pytest.raises(ValueError, match=message):
        metrics.coverage(np.array(lists), n_items=5)


def test_cold_recall_by_hand():
    counts = np.array([0, 5, 6, 1])  # items 1, 2 and 4 are cold at five
    ranks = make_ranks([10], [11], [1], [3], targets=[1, 2, 3, 4])
    value, number = metrics.cold_recall(ranks, counts)
    assert (value, number) == (pytest.approx(2 / 3), 3)
    assert metrics.cold_recall(ranks, counts, max_count=0) == (1.0, 1)
    assert metrics.cold_recall(ranks, counts, max_count=6, k=1) == (0.25, 4)
    value, number = metrics.cold_recall(ranks, counts + 9)
    assert np.isnan(value) and number == 0
    with pytest.raises(ValueError, match="target 4"):
        metrics.cold_recall(ranks, counts[:3])


# ---- semantic IDs ------------------------------------------------------------------------------


def test_uniqueness_by_hand():
    three_share = np.array([[1, 2], [1, 2], [1, 2], [2, 1], [1, 1]])
    assert metrics.uniqueness(three_share) == pytest.approx(2 / 5)
    all_differ = np.array([[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]])
    assert metrics.uniqueness(all_differ) == 1
    assert metrics.uniqueness(np.stack([three_share, all_differ])) == pytest.approx(0.7)


@quick
@given(hnp.arrays(np.int64, (9, 2), elements=st.integers(0, 2)))
def test_uniqueness_by_comparing_all_pairs(codes):
    shared = [any((codes[i] == codes[j]).all() for j in range(9) if j != i) for i in range(9)]
    assert metrics.uniqueness(codes) == pytest.approx(1 - np.mean(shared))


def test_code_usage_by_hand():
    codes = np.array([[0, 3, 0], [1, 3, 1], [0, 3, 2], [1, 3, 0]])
    usage = metrics.code_usage(codes, 4)
    np.testing.assert_allclose(usage.used, [0.5, 0.25, 0.75])
    np.testing.assert_allclose(usage.perplexity, [2, 1, 2**1.5])  # entropy of 1/2 1/4 1/4
    np.testing.assert_allclose(metrics.code_usage(codes, [2, 4, 3]).used, [1, 0.25, 1])
    both = metrics.code_usage(np.stack([codes, 3 - codes]), 4)  # pooled they would use more
    np.testing.assert_allclose(both.used, usage.used)
    np.testing.assert_allclose(both.perplexity, usage.perplexity)


def test_code_usage_refuses_codes_outside_the_book():
    for bad in (np.array([[0, 4]]), np.array([[0, -1]])):
        with pytest.raises(ValueError, match="within 0"):
            metrics.code_usage(bad, 4)
    with pytest.raises(ValueError, match="within 0"):
        metrics.code_usage(np.array([[2, 0]]), [2, 4])


@pytest.mark.parametrize("codes", [np.zeros((4, 2)), np.zeros(4, int), np.zeros((0, 2), int)])
def test_codes_of_the_wrong_kind_are_refused(codes):
    for use in (metrics.uniqueness, lambda c: metrics.code_usage(c, 4)):
        with pytest.raises(ValueError, match="integers"):
            use(codes)


@pytest.fixture
def hashed():
    """Features, and codes that are the signs of random projections of them: consistent IDs."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)).astype(np.float32)
    return features, (features @ rng.normal(size=(6, 24)) > 0).astype(np.int64)


def test_semantic_consistency_tells_consistent_codes_from_shuffled(hashed):
    features, codes = hashed
    shuffled = np.random.default_rng(1).permutation(codes)
    assert metrics.semantic_consistency(features, codes, 2000, 0) > 0.8
    assert abs(metrics.semantic_consistency(features, shuffled, 2000, 0)) < 0.1
    both = metrics.semantic_consistency(features, np.stack([codes, shuffled]), 2000, 0)
    alone = [metrics.semantic_consistency(features, c, 2000, 0) for c in (codes, shuffled)]
    assert both == pytest.approx(np.mean(alone))
    assert metrics.semantic_consistency(features, codes, 2000, 1) not in alone


def test_semantic_consistency_sees_that_near_twins_share_codes():
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(200, 16)), 2, axis=0) + 0.01 * rng.normal(size=(400, 16))
    codes = np.repeat(rng.integers(64, size=(200, 4)), 2, axis=0)  # else unrelated to features
    assert metrics.semantic_consistency(features, codes, 2000, rng) > 0.5


def test_pairs_are_half_random_and_half_true_nearest_neighbours(hashed, monkeypatch):
    features, _ = hashed
    monkeypatch.setattr(metrics, "CHUNK", 7 * len(features))  # seven anchors at a time
    left, right, cosines = metrics._random_and_near_pairs(features, 50, np.random.default_rng(3))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    table = unit @ unit.T
    np.testing.assert_allclose(cosines, table[left, right], rtol=1e-5)
    np.fill_diagonal(table, -2)
    np.testing.assert_array_equal(left[:50], left[50:])
    np.testing.assert_array_equal(right[50:], table[left[50:]].argmax(axis=1))
    assert (right != left).all() and len(np.unique(right[:50] - left[:50])) > 30
    left, right, _ = metrics._random_and_near_pairs(features[:3], 90, np.random.default_rng(0))
    assert (right != left).all()


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    x, y = rng.random(50), rng.integers(4, size=50) / 4
    assert metrics._spearman(x, x + y) == pytest.approx(stats.spearmanr(x, x + y).statistic)
    assert metrics._spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)  # ties


def test_semantic_consistency_leaves_out_missing_features_and_undefined_cases(hashed):
    features, codes = hashed
    features[::3] = 0
    changed = codes.copy()
    changed[::3] = 1 - changed[::3]
    value = metrics.semantic_consistency(features, codes, 500, 0)
    assert value == metrics.semantic_consistency(features, changed, 500, 0)
    assert np.isnan(metrics.semantic_consistency(features, np.zeros_like(codes), 500, 0))
    assert np.isnan(metrics.semantic_consistency(np.zeros_like(features), codes, 500, 0))
    noise = 1e-7 * np.random.default_rng(0).normal(size=features.shape)
    alike = (1 + noise).astype(np.float32)  # cosines differ by rounding only
    assert np.isnan(metrics.semantic_consistency(alike, codes, 500, 0))
    for bad in (features[:-1], np.full_like(features, np.nan)):
        with pytest.raises(ValueError, match="finite feature row"):
            metrics.semantic_consistency(bad, codes, 500, 0)


def test_a_pool_bounds_the_neighbour_search(hashed, monkeypatch):
    features, codes = hashed
    monkeypatch.setattr(metrics, "NEIGHBOUR_POOL", 40)
    seen = []
    inner = metrics._random_and_near_pairs
    monkeypatch.setattr(
        metrics,
        "_random_and_near_pairs",
        lambda f, n, rng: seen.append((len(f), n)) or inner(f, n, rng),
    )
    assert metrics.semantic_consistency(features, codes, 500, 0) > 0.6
    assert seen == [(40, 250)]  # 250 anchors, 500 pairs


def test_personalisation_discrimination_matches_scipy_and_finds_the_planted_order():
    rng = np.random.default_rng(0)
    first = rng.random(12)
    alphas = np.stack([first, 1 - first], axis=1)
    planted = (first[:, None, None] > rng.random((1, 80, 3))).astype(np.int64)
    value = metrics.personalisation_discrimination(planted, alphas)
    hamming, variation = pdist(planted.reshape(12, -1), "hamming"), pdist(alphas, "cityblock") / 2
    assert value == pytest.approx(stats.spearmanr(hamming, variation).statistic)
    assert value > 0.95
    per_item = np.repeat(alphas[:, None], 80, axis=1)
    assert metrics.personalisation_discrimination(planted, per_item) == pytest.approx(value)
    sampled = metrics.personalisation_discrimination(planted, alphas, n_pairs=30, rng=1)
    assert 0.9 < sampled < 1 and sampled != value
    unrelated = rng.permutation(planted)
    assert abs(metrics.personalisation_discrimination(unrelated, alphas)) < 0.5


def test_weights_per_item_are_compared_item_by_item():
    """Users 0 and 1 swap their weights between two items: mean weights agree, weights do not."""
    alphas = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 0], [0.5, 0.5]]], dtype=float)
    codes = np.array([[[0], [1]], [[1], [0]], [[0], [0]]])  # distances 01: 1, 02: .5, 12: .5
    # variation 01: 1, 02: .25, 12: .75 -> ranks 3 1 2 against 3 1.5 1.5
    expected = stats.spearmanr([3, 1, 2], [3, 1.5, 1.5]).statistic
    assert metrics.personalisation_discrimination(codes, alphas) == pytest.approx(expected)


def test_discrimination_of_shared_ids_is_undefined_and_strangers_are_refused():
    alphas = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    same = np.zeros((5, 4, 2), dtype=int)
    assert np.isnan(metrics.personalisation_discrimination(same, alphas))
    for codes, weights in ((same, alphas[:4]), (same[0], alphas), (same, alphas * np.nan)):
        with pytest.raises(ValueError, match="share U"):
            metrics.personalisation_discrimination(codes, weights)


def test_churn_by_hand():
    before = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    after = np.array([[0, 9], [2, 3], [4, 9], [9, 9]])
    np.testing.assert_allclose(metrics.churn(before, after), [0.25, 0.75])
    per_user_codes = np.stack([before, before]), np.stack([after, before])
    np.testing.assert_allclose(metrics.churn(*per_user_codes), [0.125, 0.375])
    with pytest.raises(ValueError, match="shape"):
        metrics.churn(before, after[:3])


def test_id_quality_gathers_floats_for_json(hashed):
    features, codes = hashed
    sizes = [2] * 20 + [8] * 4  # only two codes of the last digits are used
    usage = metrics.code_usage(codes, sizes)
    report = metrics.id_quality(codes, sizes)
    assert report["code_usage_worst_digit"] == 0.25 < report["code_usage"] < 1
    assert report == {
        "uniqueness": metrics.uniqueness(codes),
        "code_usage": pytest.approx(usage.used.mean()),
        "code_usage_worst_digit": pytest.approx(usage.used.min()),
        "perplexity": pytest.approx(usage.perplexity.mean()),
        "perplexity_worst_digit": pytest.approx(usage.perplexity.min()),
    }
    personal = np.stack([codes, 1 - codes, np.roll(codes, 1, axis=0)])
    alphas = np.array([[1, 0], [0, 1], [0.4, 0.6]])
    full = metrics.id_quality(personal, 2, features, rng=5, alphas=alphas)
    assert set(full) - set(report) == {"semantic_consistency", "personalisation_discrimination"}
    assert full["semantic_consistency"] == metrics.semantic_consistency(features, personal, rng=5)
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert "semantic_consistency" not in metrics.id_quality(0 * codes, 2, features)


# ---- efficiency --------------------------------------------------------------------------------


def test_latency_and_throughput_by_hand():
    times = np.random.default_rng(0).permutation(np.arange(1, 101)) / 1000
    assert metrics.latency_summary(times) == {
        "p50_ms": pytest.approx(50.5),
        "p95_ms": pytest.approx(95.05),
        "p99_ms": pytest.approx(99.01),
        "mean_ms": pytest.approx(50.5),
    }
    assert metrics.latency_summary([0.002] * 9 + [0.1])["mean_ms"] == pytest.approx(11.8)
    assert metrics.throughput(30, 1.5) == 20
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="throughput"):
            metrics.throughput(30, seconds)
    for bad in ([], [0.1, np.nan]):
        with pytest.raises(ValueError, match="finite"):
            metrics.latency_summary(bad)


# ---- significance ------------------------------------------------------------------------------


def test_bootstrap_interval_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.exponential(size=40), rng.exponential(size=40)
    for confidence in (0.95, 0.8):
        ours = metrics.paired_bootstrap(a, b, 20_000, confidence, rng)
        theirs = stats.bootstrap(
            (a - b,),
            np.mean,
            method="percentile",
            n_resamples=20_000,
            confidence_level=confidence,
            rng=1,
        ).confidence_interval
        assert ours.difference == pytest.approx((a - b).mean())
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)
    assert metrics.paired_bootstrap(a, b, rng=4) == metrics.paired_bootstrap(a, b, rng=4)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([0, 2], 0.5),  # resampled means 0, 1, 2 (1/4, 1/2, 1/4): shifted, half reach |m| = 1
        ([-1, 3], 0.5),
        ([1, 3], 0.0),  # means 1, 2, 3: none is 2 away from 2
        ([1, -1], 1.0),
        ([0, 0, 3], 15 / 27),  # sums 0, 3, 6, 9 (8, 12, 6, 1 of 27): all but 3 reach 3 +- 3
    ],
)
def test_bootstrap_p_value_by_hand(differences, p_value):
    result = metrics.paired_bootstrap(np.array(differences), np.zeros(len(differences)), 9_999)
    assert result.p_value == pytest.approx(max(p_value, 1e-4), abs=0.02 if 0 < p_value < 1 else 0)


def test_bootstrap_is_calibrated_on_equal_models():
    rng = np.random.default_rng(0)
    results = [
        metrics.paired_bootstrap(rng.random(60), rng.random(60), 400, rng=rng) for _ in range(300)
    ]
    rejected = np.mean([result.p_value <= 0.05 for result in results])
    covered = np.mean([result.low <= 0 <= result.high for result in results])
    assert 0.02 < rejected < 0.1
    assert 0.9 < covered < 0.98
    assert 0.4 < np.mean([result.p_value for result in results]) < 0.6


def test_bootstrap_is_paired_and_finds_a_clear_difference():
    rng = np.random.default_rng(0)
    a = 10 * rng.random(200)  # users differ a hundred times more than the models do
    b = a - 0.1 + 0.1 * rng.normal(size=200)
    result = metrics.paired_bootstrap(a, b)
    assert 0 < result.low < result.difference < result.high
    assert result.p_value < 0.001
    mirrored = metrics.paired_bootstrap(b, a)
    np.testing.assert_allclose(
        mirrored, (-result.difference, -result.high, -result.low, result.p_value)
    )
    assert metrics.paired_bootstrap(a, a) == (0, 0, 0, 1)


def test_bootstrap_chunks_change_nothing_and_bound_memory(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    whole = metrics.paired_bootstrap(a, b, 1001)
    monkeypatch.setattr(metrics, "CHUNK", 350)  # seven resamples at a time
    np.testing.assert_allclose(metrics.paired_bootstrap(a, b, 1001), whole)
    monkeypatch.undo()
    a, b = rng.random(22_000), rng.random(22_000)
    tracemalloc.start()
    metrics.paired_bootstrap(a, b, n_resamples=1500)  # 264 MB as one matrix of floats
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_significance_refuses_what_it_cannot_pair():
    good = np.ones(3)
    for bad in (np.ones(4), np.array([1, 2, np.nan]), np.ones((3, 1)), np.ones(0)):
        for use in (metrics.paired_bootstrap, metrics.effect_size):
            with pytest.raises(ValueError, match=r"users|finite"):
                use(good, bad)
    for options in ({"confidence": 1.0}, {"confidence": 0.0}, {"n_resamples": 0}):
        with pytest.raises(ValueError, match="interval"):
            metrics.paired_bootstrap(good, good, **options)


def test_holm_by_hand():
    np.testing.assert_allclose(
        metrics.holm([0.01, 0.04, 0.03, 0.005]), [3 * 0.01, 0.06, 2 * 0.03, 4 * 0.005]
    )
    np.testing.assert_allclose(metrics.holm([0.9, 0.6, 0.02]), [1, 1, 0.06])
    np.testing.assert_allclose(metrics.holm([0.2, 0.2]), [0.4, 0.4])
    assert metrics.holm([]).shape == (0,)
    for bad in ([0.1, 1.1], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="within"):
            metrics.holm(bad)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    adjusted = metrics.holm(p_values)
    rejected = set()
    for left, index in zip(range(len(p_values), 0, -1), np.argsort(p_values), strict=True):
        if p_values[index] * left > alpha:
            break
        rejected.add(int(index))
    assert set(np.flatnonzero(adjusted <= alpha).tolist()) == rejected
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()
    assert ((adjusted >= p_values) & (adjusted <= 1)).all()


def test_effect_size_by_hand_and_by_t_test():
    assert metrics.effect_size(np.array([2, 4, 6]), np.array([1, 2, 3])) == pytest.approx(2)
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(30)
    t = stats.ttest_rel(a, b).statistic
    assert metrics.effect_size(a, b) == pytest.approx(t / np.sqrt(30))
    assert np.isnan(metrics.effect_size(a, a - 0.1))  # constant but for rounding
    assert np.isnan(metrics.effect_size(a, a)) and np.isnan(metrics.effect_size(a[:1], b[:1]))


def test_mean_std_over_seeds():
    assert metrics.mean_std([1, 2, 3, 4]) == pytest.approx((2.5, np.sqrt(5 / 3)))
    assert metrics.mean_std([2.0, 2.0]) == (2.0, 0.0)
    mean, std = metrics.mean_std([0.3])
    assert mean == 0.3 and np.isnan(std)
    for bad in ([], [1, np.nan]):
        with pytest.raises(ValueError, match="finite"):
            metrics.mean_std(bad)


def test_average_over_seeds_keeps_users_apart():
    runs = [np.array([0, 1, 1]), np.array([1, 1, 0]), np.array([0, 1, 0])]
    np.testing.assert_allclose(metrics.average_over_seeds(runs), [1 / 3, 1, 1 / 3])
    for bad in ([], [np.ones(3), np.ones(2)]):
        with pytest.raises(ValueError, match="share their users"):
            metrics.average_over_seeds(bad)
