"""What the tables report: ranking, lists, semantic IDs, speed and significance.

Pure functions on numpy arrays, per user first and averaged last, because significance is computed
over users. Letters: E evaluated users, T held-out targets, N items (numbered 1..N), U users with
IDs of their own, L digits, K codes per digit, M modalities, d width.
`rng` is a numpy Generator or a seed. What a statistic leaves undefined is nan, bad input a
ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

NEIGHBOUR_POOL = 20_000  # items searched for nearest neighbours: exact up to here, sampled beyond
CHUNK = 4_000_000  # numbers held at once by what would otherwise need a very large matrix

Random = np.random.Generator | int

# ---- ranking -----------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Where the held-out items of E users came; user e owns `ranks[offsets[e]:offsets[e+1]]`.

    Every candidate counts, a user's other targets included (plain full ranking).
    """

    users: np.ndarray  # [E] int64, row of the user
    ranks: np.ndarray  # [T] float64, 1 is best; x.5 where an even number of items tie
    offsets: np.ndarray  # [E+1] int64
    targets: np.ndarray  # [T] int64, item numbers 1..N


def tied_rank(higher: np.ndarray | int, equal: np.ndarray | int) -> np.ndarray | float:
    """Average position of an item that `higher` items beat and `equal` others tie with.

    Scoring everything alike gives the middle of the list, (N+1)/2, not the top.

    >>> tied_rank(higher=2, equal=0), tied_rank(higher=0, equal=3)
    (3.0, 2.5)
    """
    return 1 + higher + equal / 2


def per_user(ranks: Ranks, name: str, k: int | None = None) -> np.ndarray:
    """[E] one metric of every user, with binary gains; `mrr` takes no k.

    recall    targets with rank <= k / targets
    ndcg      sum of 1/log2(rank+1) over those / the same sum at ranks 1..min(targets, k)
    mrr       1 / rank of the best target
    hit_rate  1 if any target has rank <= k (equals recall for a single target)

    Ties of several targets at one average position may put more than k of them within k; no list
    holds that many, so hits count up to k and ndcg up to 1.
    Raises ValueError for an unknown name, k < 1, or ranks `check_ranks` refuses.

    User 0 finds one target second; user 1 has two, ranked 1 and 9:

    >>> two = Ranks(np.array([0, 1]), np.array([2.0, 1.0, 9.0]), np.array([0, 1, 3]),
    ...             np.array([7, 4, 5]))
    >>> per_user(two, "recall", 5).tolist(), per_user(two, "mrr").tolist()
    ([1.0, 0.5], [0.5, 1.0])
    >>> per_user(two, "ndcg", 5).round(3).tolist()  # 1/log2(3); 1 / (1 + 1/log2(3))
    [0.631, 0.613]
    """
    check_ranks(ranks)
    starts, counts = ranks.offsets[:-1], np.diff(ranks.offsets)
    if name == "mrr":
        return 1 / np.minimum.reduceat(ranks.ranks, starts)
    if name not in ("recall", "ndcg", "hit_rate"):
        raise ValueError(f"no metric {name!r}: choose recall, ndcg, mrr or hit_rate")
    if k is None or k < 1:
        raise ValueError(f"{name} needs a cutoff k of at least 1, not {k}")
    within = ranks.ranks <= k
    if name == "ndcg":
        gains = np.add.reduceat(within / np.log2(ranks.ranks + 1), starts)
        ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))[np.minimum(counts, k) - 1]
        return np.minimum(gains / ideal, 1)
    hits = np.minimum(np.add.reduceat(within, starts, dtype=np.int64), k)
    return hits / counts if name == "recall" else (hits > 0).astype(float)


def ranking_metrics(ranks: Ranks, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """Means over users: `recall@k`, `ndcg@k`, `hit_rate@k` for every k, and `mrr`."""

    def at_cutoffs(name: str) -> dict[str, float]:
        return {f"{name}@{k}": float(per_user(ranks, name, k).mean()) for k in ks}

    mrr = {"mrr": float(per_user(ranks, "mrr").mean())}
    return at_cutoffs("recall") | at_cutoffs("ndcg") | mrr | at_cutoffs("hit_rate")


def check_ranks(ranks: Ranks) -> None:
    """Raises ValueError unless every rank is finite and >= 1 and every user owns some."""
    users, values, offsets, targets = ranks
    if not np.isfinite(values).all() or (values < 1).any():
        raise ValueError("ranks must be finite and at least 1; were the scores nan?")
    if len(offsets) != len(users) + 1 or offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"offsets do not cut {len(values)} ranks among {len(users)} users")
    if len(users) == 0 or (np.diff(offsets) < 1).any():
        raise ValueError("a user without targets has no metric: leave such users out")
    if targets.shape != values.shape or (targets < 1).any():
        raise ValueError("every rank needs its target, an item number of 1 or more")


# ---- lists and cold items ----------------------------------------------------------------------


def coverage(lists: np.ndarray, n_items: int) -> float:
    """Share of the catalogue in at least one of the recommended `lists` [E, k] of item numbers.

    Raises ValueError for an item twice in one list or outside 1..n_items.

    >>> coverage(np.array([[1, 2], [2, 3]]), n_items=6)
    0.5
    """
    if lists.size and (lists.min() < 1 or lists.max() > n_items):
        raise ValueError(f"lists hold items outside 1..{n_items}")
    ordered = np.sort(lists, axis=1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeats.any():
        raise ValueError(f"list {repeats.argmax()} recommends an item twice")
    return len(np.unique(lists)) / n_items


def cold_recall(
    ranks: Ranks, train_counts: np.ndarray, max_count: int = 5, k: int = 10
) -> tuple[float, int]:
    """Share ranked within k, and number, of targets with at most `max_count` train interactions.

    `train_counts` [N] holds item i at i-1. The mean is over targets, not users; nan if none is
    cold. Raises ValueError for a target beyond N, or ranks `check_ranks` refuses.
    """
    check_ranks(ranks)
    if ranks.targets.max() > len(train_counts):
        raise ValueError(f"target {ranks.targets.max()} is not among {len(train_counts)} items")
    cold = train_counts[ranks.targets - 1] <= max_count
    n_cold = int(cold.sum())
    return (float((ranks.ranks[cold] <= k).mean()) if n_cold else float("nan")), n_cold


# ---- semantic IDs ------------------------------------------------------------------------------


class CodeUsage(NamedTuple):
    """How evenly each digit spreads over its codes."""

    used: np.ndarray  # [L] share of the K codes that occur, 0..1
    perplexity: np.ndarray  # [L] exp(entropy in nats): 1 = all items on one code, K = uniform


def uniqueness(codes: np.ndarray) -> float:
    """1 - share of items whose whole ID another item has too; mean over users for [U, N, L].

    >>> uniqueness(np.array([[0, 1], [0, 1], [2, 0], [3, 0]]))
    0.5
    """
    counts = [np.unique(ids, axis=0, return_counts=True)[1] for ids in _by_user(codes)]
    return float(np.mean([(c == 1).sum() / codes.shape[-2] for c in counts]))


def code_usage(codes: np.ndarray, n_codes: int | Sequence[int]) -> CodeUsage:
    """Use of every digit of `codes` [N, L] or, the mean over users, [U, N, L]: pooled, users who
    each have few codes could hide it from each other.

    `n_codes` is K, or one K per digit. Raises ValueError for a code outside 0..K-1.
    """
    users = _by_user(codes)
    sizes = np.broadcast_to(n_codes, users.shape[2])
    if users.min() < 0 or (users.max(axis=(0, 1)) >= sizes).any():
        raise ValueError(f"codes must lie within 0..K-1 for K = {n_codes}")
    counts = [
        [np.bincount(column, minlength=K) for column, K in zip(ids.T, sizes, strict=True)]
        for ids in users
    ]
    return CodeUsage(
        used=np.mean([[(c > 0).mean() for c in of_user] for of_user in counts], axis=0),
        perplexity=np.mean([np.exp([stats.entropy(c) for c in u]) for u in counts], axis=0),
    )


def semantic_consistency(
    features: np.ndarray, codes: np.ndarray, n_pairs: int = 5000, rng: Random = 0
) -> float:
    """Spearman of cosine(features [N, d]) and share of equal digits, mean over users.

    Among random pairs hardly any two items are alike, which would test the unlike ones only. So
    every sampled item is paired twice, with a random item and with its nearest neighbour: half of
    `n_pairs` each. Rows of zeros (feature missing) are left out; beyond NEIGHBOUR_POOL items, a
    random pool of that size stands for the catalogue.
    Raises ValueError for features that are not finite or not one row per item.
    """
    users = _by_user(codes)
    if len(features) != users.shape[1] or not np.isfinite(features).all():
        raise ValueError(f"need one finite feature row for each of {users.shape[1]} items")
    rng = np.random.default_rng(rng)
    pool = np.flatnonzero(features.any(axis=1))
    pool = rng.choice(pool, min(len(pool), NEIGHBOUR_POOL), replace=False)
    if len(pool) < 2:
        return float("nan")
    left, right, cosines = _random_and_near_pairs(features[pool], n_pairs // 2, rng)
    left, right = pool[left], pool[right]
    overlaps = ((ids[left] == ids[right]).mean(axis=1) for ids in users)
    return float(np.mean([_spearman(cosines, overlap) for overlap in overlaps]))


def personalisation_discrimination(
    codes: np.ndarray, alphas: np.ndarray, n_pairs: int = 20_000, rng: Random = 0
) -> float:
    """Spearman, over pairs of users, of code distance and modality-weight distance.

    Code distance is the share of differing digits (Hamming) over all items of `codes` [U, N, L];
    weight distance the total variation, half the L1 distance, of `alphas` [U, M], or its mean
    over items of [U, N, M]. All pairs up to `n_pairs`, a sample of them beyond.
    Raises ValueError unless codes and finite weights are of the same users.
    """
    if codes.ndim != 3 or len(codes) != len(alphas) or not np.isfinite(alphas).all():
        raise ValueError(f"codes {codes.shape} and finite weights {alphas.shape} must share U")
    first, second = np.triu_indices(len(codes), k=1)
    if len(first) > n_pairs:
        kept = np.random.default_rng(rng).choice(len(first), n_pairs, replace=False)
        first, second = first[kept], second[kept]
    pairs = list(zip(first, second, strict=True))  # one at a time: [pairs, N, L] would not fit
    hamming = [(codes[u] != codes[v]).mean() for u, v in pairs]
    variation = [np.abs(alphas[u] - alphas[v]).sum(axis=-1).mean() / 2 for u, v in pairs]
    return _spearman(hamming, variation)


def churn(codes_before: np.ndarray, codes_after: np.ndarray) -> np.ndarray:
    """[L] share of items (and users, for [U, N, L]) whose digit changed between two times.

    Raises ValueError when the shapes differ.
    """
    if codes_before.shape != codes_after.shape:
        raise ValueError(f"codes changed shape: {codes_before.shape} to {codes_after.shape}")
    return (_by_user(codes_before) != _by_user(codes_after)).mean(axis=(0, 1))


def id_quality(
    codes: np.ndarray,
    n_codes: int | Sequence[int],
    features: np.ndarray | None = None,
    rng: Random = 0,
    alphas: np.ndarray | None = None,
) -> dict[str, float]:
    """All that can be said of `codes` [N, L] or [U, N, L], ready for JSON (so without nan).

    `semantic_consistency` needs features and `personalisation_discrimination` alphas; a
    correlation that is undefined, because one side does not vary, is left out too.
    """
    usage, rng = code_usage(codes, n_codes), np.random.default_rng(rng)
    values = {
        "uniqueness": uniqueness(codes),
        "code_usage": usage.used.mean(),
        "code_usage_worst_digit": usage.used.min(),  # a mean hides one collapsed digit
        "perplexity": usage.perplexity.mean(),
        "perplexity_worst_digit": usage.perplexity.min(),
    }
    if features is not None:
        values["semantic_consistency"] = semantic_consistency(features, codes, rng=rng)
    if alphas is not None:
        discrimination = personalisation_discrimination(codes, alphas, rng=rng)
        values["personalisation_discrimination"] = discrimination
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _by_user(codes: np.ndarray) -> np.ndarray:
    """Codes as [U, N, L], one user where they are shared; ValueError for anything else."""
    if codes.ndim not in (2, 3) or not codes.size or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers [N, L] or [U, N, L], not {codes.shape}")
    return codes if codes.ndim == 3 else codes[None]


def _random_and_near_pairs(
    features: np.ndarray, n_anchors: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left rows, right rows and cosines of n_anchors random, then n_anchors nearest, pairs."""
    n = len(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    anchors = rng.integers(n, size=n_anchors)
    others = (anchors + rng.integers(1, n, size=n_anchors)) % n  # anyone but the anchor itself
    nearest = np.empty_like(anchors)
    cosines = np.empty((2, n_anchors))
    step = max(1, CHUNK // n)
    for start in range(0, n_anchors, step):
        part = slice(start, start + step)
        similar = unit[anchors[part]] @ unit.T  # [step, n]
        rows = np.arange(len(similar))
        similar[rows, anchors[part]] = -np.inf
        nearest[part] = similar.argmax(axis=1)
        cosines[:, part] = similar[rows, others[part]], similar[rows, nearest[part]]
    return np.tile(anchors, 2), np.concatenate([others, nearest]), cosines.ravel()


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; nan where one side is constant. Both are shares or cosines, so rounding
    to 6 decimals only keeps float32 noise from making an order among equals."""
    x, y = np.round(x, 6), np.round(y, 6)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


# ---- efficiency --------------------------------------------------------------------------------


def latency_summary(seconds: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Percentiles and mean, in milliseconds, of single-call times in seconds.

    Raises ValueError when there is no call, or a time is not finite.
    """
    milliseconds = 1000 * _finite(seconds)
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99]).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "mean_ms": float(milliseconds.mean())}


def throughput(n: int, seconds: float) -> float:
    """Things done per second. Raises ValueError unless the time is positive."""
    if not seconds > 0:
        raise ValueError(f"{n} things in {seconds} s is no throughput")
    return n / seconds


# ---- significance ------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Mean of a - b over users with its bootstrap interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    rng: Random = 0,
) -> Comparison:
    """Is the mean of a [E] over users different from that of b [E], the same users in order?

    Users are drawn with replacement; the interval is the percentile one. For the p-value the
    resampled means are shifted to the null by the observed mean m (Efron and Tibshirani 1993,
    ch. 16): p = (1 + #{|m* - m| >= |m|}) / (1 + n_resamples), never 0.
    Raises ValueError unless a and b are finite and of one length, the confidence inside (0, 1)
    and n_resamples at least 1.
    """
    differences = _paired(a, b)
    if not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(f"no {confidence} interval from {n_resamples} resamples")
    rng = np.random.default_rng(rng)
    n = len(differences)
    step = max(1, CHUNK // n)
    sums = np.empty(n_resamples)  # sums, not means: exact for hits, so ties with m count
    for start in range(0, n_resamples, step):
        part = sums[start : start + step]
        part[:] = differences[rng.integers(n, size=(len(part), n))].sum(axis=1)
    total = differences.sum()
    extreme = np.count_nonzero(np.abs(sums - total) >= abs(total))
    low, high = np.quantile(sums / n, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Comparison(float(total / n), low, high, (1 + int(extreme)) / (1 + n_resamples))


def holm(p_values: np.ndarray | Sequence[float]) -> np.ndarray:
    """Adjusted p-values in the given order (Holm 1979): reject those <= alpha, family-wise.

    The i-th smallest of m is multiplied by m-i+1, may not fall below the one before it, and stops
    at 1. Raises ValueError for a p outside [0, 1].

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values lie within [0, 1]")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)


def effect_size(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's d_z of paired users [E]: mean(a - b) / std(a - b), ddof 1.

    nan where all differences are equal or there is one user. Raises ValueError for values that
    are not finite or not of one length.
    """
    differences = _paired(a, b)
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():  # equal but for rounding
        return float("nan")
    return float(differences.mean() / differences.std(ddof=1))


def mean_std(values: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) over seeds; one seed has no deviation: nan, not 0.

    Raises ValueError when there is no value or one is not finite.
    """
    values = _finite(values)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def average_over_seeds(runs: Sequence[np.ndarray]) -> np.ndarray:
    """[E] mean over runs of the same users, so that a bootstrap resamples users and not runs.

    Raises ValueError for no run or runs of different length.
    """
    if len({np.shape(run) for run in runs}) != 1:
        raise ValueError(f"runs must share their users, got {[np.shape(run) for run in runs]}")
    return np.mean(runs, axis=0)


def _finite(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """One or more finite numbers as a float64 vector, or ValueError."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"need a vector of finite values, got shape {values.shape}")
    return values


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[E] a - b of the same users, or ValueError."""
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} users cannot be paired with {len(b)}")
    return a - b
