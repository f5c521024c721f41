"""Theorems 1 to 3 of theory_analysis.md as numbers: each bound beside what it bounds.

Formulas are derived here anew in float64 and share no code with the models, so that a mistake in
one is not repeated in the other. Letters: N items, M modalities, z width of a latent, L digits,
K codes, s = z / L; weights are laid out items first, [..., N, M]; r steps of the grid of weights.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Rounding noise of float32, in which the models compute.
_NOISE = 1e-4


class Check(NamedTuple):
    """One bound on many instances. `trivial` is what one knows without the theorem."""

    name: str
    bound: Array
    measured: Array
    trivial: Array | float
    lower: bool = False  # the bound holds from below
    exact: bool = False  # it is an equality, so being short of it is a violation, too

    def excess(self) -> Array:
        """How far each instance is beyond its bound; at most rounding noise if it holds."""
        gap = np.asarray(self.bound) - self.measured if self.lower else self.measured - self.bound
        gap = np.abs(gap) if self.exact else gap
        return np.asarray(gap / np.maximum(1.0, np.abs(self.bound)))

    def summary(self) -> dict[str, Any]:
        """Numbers for the table: means, violations, tightness, and how often it says anything.

        `tightness` is the smaller of the two means over the larger: 1 for an equality, 0 where a
        lower bound is negative.
        `informative` is the share of instances on which the bound beats the trivial one.
        """
        bound, measured = np.mean(self.bound), np.mean(self.measured)
        small, large = (bound, measured) if self.lower else (measured, bound)
        gain = self.bound - self.trivial if self.lower else self.trivial - np.asarray(self.bound)
        return {
            "kind": "equal" if self.exact else "lower" if self.lower else "upper",
            "instances": int(np.size(self.measured)),
            "bound": float(bound),
            "measured": float(measured),
            "trivial": float(np.mean(self.trivial)) if np.isfinite(self.trivial).all() else None,
            "violations": int((self.excess() > _NOISE).sum()),
            "tightness": float(max(small, 0.0) / large) if large > 0 else 1.0,
            "informative": float(np.mean(gain > 1e-6)),
        }


# --------------------------------------------------------------------------- items and codes


class Tables(NamedTuple):
    """T[i, l, k, m] = <z_im^l, c_lk^m>: all that codes of N items hang on."""

    table: Array  # [N, L, K, M]
    diameter: Array  # [L], the largest distance of two codewords of a digit

    def scores(self, weights: Array) -> Array:
        """Blended scores under weights [..., N, M]: [..., N, L, K]."""
        return np.einsum("nlkm,...nm->...nlk", self.table, weights)

    def codes(self, weights: Array) -> Array:
        """argmax of the blended scores, [..., N, L]."""
        return self.scores(weights).argmax(-1)


def make_tables(latents: Array, codebooks: Array) -> Tables:
    """From latents [N, M, z] and codebooks [L, K, M, s] of unit codewords."""
    digits, codes, modalities, _ = codebooks.shape
    parts = latents.reshape(len(latents), modalities, digits, -1)  # [N, M, L, s]
    words = codebooks.reshape(digits, codes, -1)
    squares = 2 - 2 * np.einsum("lka,lja->lkj", words, words)
    diameter = np.sqrt(squares.max((1, 2)).clip(0))
    return Tables(np.einsum("nmls,lkms->nlkm", parts, codebooks), diameter)


def fused(latents: Array, weights: Array) -> Array:
    """x(alpha): latents [N, M, z], weights [..., N, M] -> [..., N, M z]."""
    blend = weights[..., None] * latents
    return blend.reshape(*blend.shape[:-2], -1)


def margins(tables: Tables, weights: Array) -> Array:
    """nu: distance, in the space of weights, to the nearest wall of a digit's cell, [N, L].

    The wall between the best code k and code j is where <alpha, t_k - t_j> = 0; its distance within
    the plane of weights that sum to one is the gap of the scores over |t_k - t_j - mean|.
    """
    scores = tables.scores(weights)
    best = scores.argmax(-1)[..., None]
    gap = np.take_along_axis(scores, best, -1) - scores  # [N, L, K]
    slope = np.take_along_axis(tables.table, best[..., None], 2) - tables.table
    length = np.linalg.norm(slope - slope.mean(-1, keepdims=True), axis=-1)
    distance = np.full_like(gap, np.inf)
    np.divide(gap, length, out=distance, where=length > 1e-12)
    np.put_along_axis(distance, best, np.inf, -1)
    return distance.min(-1)


def to_grid(weights: Array, r: int) -> Array:
    """The nearest weights that are multiples of 1 / r, by largest remainders: [..., M]."""
    scaled = weights * r
    floor = np.floor(scaled + 1e-9)
    rest = scaled - floor
    missing = np.rint(r - floor.sum(-1, keepdims=True))
    rank = np.argsort(np.argsort(-rest, axis=-1, kind="stable"), axis=-1)
    return (floor + (rank < missing)) / r


def rounding_radius(modalities: int, r: int) -> float:
    """delta = sqrt(floor(M / 2) ceil(M / 2) / M) / r: the farthest weights are from the grid."""
    half = modalities // 2
    return float(np.sqrt(half * (modalities - half) / modalities) / r)


# --------------------------------------------------------------------------- theorem 1


def isometry(latents: Array, one: Array, other: Array) -> Check:
    """|x(alpha) - x(beta)| = |alpha - beta|; weights [N, M], zero where a modality is missing."""
    measured = np.linalg.norm(fused(latents, one) - fused(latents, other), axis=-1)
    lengths = np.linalg.norm(one, axis=-1) + np.linalg.norm(other, axis=-1)
    bound = np.linalg.norm(one - other, axis=-1)
    return Check("fused vectors as far apart as weights", bound, measured, lengths, exact=True)


def rounding(weights: Array, r: int) -> Check:
    """|rho(alpha) - alpha| <= delta; the trivial bound is the diagonal of a grid cell."""
    measured = np.linalg.norm(to_grid(weights, r) - weights, axis=-1)
    delta = rounding_radius(weights.shape[-1], r)
    diagonal = np.sqrt(weights.shape[-1]) / r
    return Check("rounding of weights", np.full_like(measured, delta), measured, diagonal)


def directions(latents: Array, one: Array, other: Array, r: int) -> Check:
    """Unit fused vectors of rounded weights: at most sqrt(M) (|alpha - beta| + 2 delta) apart."""
    modalities = one.shape[-1]
    parts = [fused(latents, to_grid(weights, r)) for weights in (one, other)]
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in parts)
    moved = np.linalg.norm(one - other, axis=-1) + 2 * rounding_radius(modalities, r)
    measured = np.linalg.norm(first - second, axis=-1)
    return Check("directions after rounding", np.sqrt(modalities) * moved, measured, np.sqrt(2.0))


def changed_digits(tables: Tables, one: Array, other: Array, codes: Any = None) -> Check:
    """Share of digits that differ against the share whose two margins allow it, for each item.

    `codes` are those the model uses, a pair of [N, L]; by default they are computed here.
    """
    distance = np.linalg.norm(one - other, axis=-1)[:, None]
    allowed = margins(tables, one) + margins(tables, other) <= distance + _NOISE
    first, second = codes if codes is not None else (tables.codes(one), tables.codes(other))
    measured = (first != second).mean(-1)
    return Check("digits that differ, by margins", allowed.mean(-1), measured, 1.0)


def separated_digits(latents: Array, codebooks: Array, one: Array, other: Array) -> Check:
    """The converse: sub-vectors farther apart in angle than both are from their codewords."""
    digits, codes, modalities, _ = codebooks.shape
    words = codebooks.reshape(digits, codes, -1)

    def look(weights: Array) -> tuple[Array, Array, Array]:
        blend = (weights[..., None] * latents).reshape(len(latents), modalities, digits, -1)
        parts = blend.transpose(0, 2, 1, 3).reshape(len(latents), digits, -1)
        parts = parts / np.linalg.norm(parts, axis=-1, keepdims=True).clip(1e-12)
        cosines = np.einsum("nla,lka->nlk", parts, words)
        return parts, cosines.argmax(-1), np.arccos(cosines.max(-1).clip(-1, 1))

    (x, first, errors), (y, second, others) = look(one), look(other)
    angle = np.arccos((x * y).sum(-1).clip(-1, 1))
    must = (angle > errors + others + _NOISE).mean(-1)
    return Check("digits that must differ", must, (first != second).mean(-1), 0.0, lower=True)


def crossings(atlas: Any, r: int, start: Array, step: Array) -> Check:
    """Expected digit changes of a step, over all places on the line of weights through `start`.

    start [P, M] in the simplex, step [M] with sum 0; `atlas(weights [G, M])` -> [G, N, L] codes.
    A line of length l with B walls changes on at most a share |step| B / l of its places.
    """
    length = float(np.linalg.norm(step))
    pairs = [_line(atlas, r, point, step / length, length) for point in start]
    measured, bound = np.array(pairs).T
    return Check("digits that differ, on average over places", bound, measured, 1.0)


def _line(atlas: Any, r: int, point: Array, unit: Array, length: float) -> tuple[float, float]:
    """Share of changed digits averaged over the line, exact, and its bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.where(unit == 0, np.nan, -point / unit)
    low, high = np.nanmax(ends[unit > 0]), np.nanmin(ends[unit < 0])
    walls = []  # of the grid's cells: alpha_m - alpha_n is a multiple of 1 / r there
    for m, n in combinations(range(len(unit)), 2):
        speed = unit[m] - unit[n]
        if abs(speed) > 1e-12:
            edges = sorted(((point + t * unit)[m] - (point + t * unit)[n]) * r for t in (low, high))
            steps = np.arange(np.ceil(edges[0]), np.floor(edges[1]) + 1) / r
            walls.append((steps - (point[m] - point[n])) / speed)
    walls = np.unique(np.concatenate(walls))
    walls = walls[(walls > low) & (walls < high)]
    places = np.concatenate([[low], walls, [high]])
    middles = (places[1:] + places[:-1]) / 2
    codes = atlas(to_grid(point + middles[:, None] * unit, r))  # [pieces, N, L]
    jumps = (codes[1:] != codes[:-1]).mean((1, 2)).sum()
    span = high - low
    cuts = np.concatenate([walls, walls - length, [low, high - length]])
    cuts = np.unique(cuts[(cuts >= low) & (cuts <= high - length)]) if length < span else low
    mass = 0.0
    for left, right in zip(np.atleast_1d(cuts)[:-1], np.atleast_1d(cuts)[1:], strict=True):
        middle = (left + right) / 2
        here, there = np.searchsorted(walls, [middle, middle + length])
        mass += (right - left) * (codes[here] != codes[there]).mean()
    return mass / span, length * jumps / span


def attention(slope: Array, present: Array, contexts: Array, weights: Array) -> Check:
    """|alpha_u - alpha_v| <= 1/2 |Pi A_i| |q_u - q_v| for users next to each other in a list.

    slope A [N, M, c] of the logits, present [N, M], contexts [B, c], weights [B, N, M].
    """
    count = present.sum(-1).clip(1)[:, None, None]
    inner = slope * present[..., None]
    inner = (inner - inner.sum(1, keepdims=True) / count) * present[..., None]
    constant = 0.5 * np.linalg.norm(inner, ord=2, axis=(1, 2))  # [N]
    moved = np.linalg.norm(np.diff(contexts, axis=0), axis=-1)[:, None]
    measured = np.linalg.norm(np.diff(weights, axis=0), axis=-1)
    return Check("weights against contexts", moved * constant, measured, np.sqrt(2.0))


# --------------------------------------------------------------------------- theorem 2


def blended(start: Array, targets: Array, rate: float) -> Array:
    """alpha_n = (1 - rate) alpha_{n-1} + rate target_n: [..., M] and n targets, [n + 1, ..., M]."""
    path = [start]
    for target in targets:
        path.append((1 - rate) * path[-1] + rate * target)
    return np.stack(path)


def contraction(one: Array, other: Array, targets: Array, rate: float) -> Check:
    """Two starts, the same targets [n, M]: the distance falls by 1 - rate in each update."""
    paths = [blended(start, targets, rate) for start in (one, other)]
    measured = np.linalg.norm(paths[0] - paths[1], axis=-1)
    bound = (1 - rate) ** np.arange(len(measured)) * measured[0]
    return Check("two starts come together", bound, measured, np.sqrt(2.0), exact=True)


def tracking(start: Array, targets: Array, rate: float) -> Check:
    """|alpha_n - target_n| <= (1-rate)^n e_0 + d (1-rate) (1 - (1-rate)^n) / rate.

    targets [n, ..., M]; d is the largest step of the targets, e_0 the distance of the start from
    the first one.
    """
    measured = np.linalg.norm(blended(start, targets[1:], rate) - targets, axis=-1)  # [n, ...]
    step = np.linalg.norm(np.diff(targets, axis=0), axis=-1).max(0)
    kept = (1 - rate) ** np.arange(len(measured)).reshape(-1, *[1] * (measured.ndim - 1))
    bound = kept * measured[0] + step * (1 - rate) * (1 - kept) / rate
    return Check("tracking of moving weights", bound, measured, np.sqrt(2.0))


def averaging(noise: Array, rate: float, steps: int) -> Check:
    """Mean squared error under independent noise, over all sequences of +-noise [M], exactly:

    |noise|^2 rate (1 - (1 - rate)^2n) / (2 - rate) after n updates.
    """
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * steps)).reshape(steps, -1)
    path = blended(np.zeros((signs.shape[1], len(noise))), signs[..., None] * noise, rate)
    measured = (path**2).sum(-1).mean(1)[1:]
    kept = (1 - rate) ** (2.0 * np.arange(1, steps + 1))
    bound = (noise**2).sum() * rate / (2 - rate) * (1 - kept)
    return Check("error under noise", bound, measured, (noise**2).sum(), exact=True)


def settled(start: Array, target: Array, rate: float, r: int) -> Check:
    """Updates towards one target until the rounded weights stay: starts [P, M], target [M]."""
    cell = to_grid(target, r)
    roots = [p for p in _roots(len(target)) if ((cell + p / r) >= -1e-9).all()]
    # distance of the target from the walls of its cell
    gaps = [(1 / r - (p * (target - cell)).sum()) / np.sqrt(2) for p in np.array(roots)]
    distance = np.linalg.norm(start - target, axis=-1)
    with np.errstate(divide="ignore"):  # a start on the target itself: minus infinity
        needed = np.log(distance / max(min(gaps), 1e-9)) / -np.log1p(-rate)
    bound = np.maximum(np.ceil(needed) + 1, 0)
    horizon = int(bound.max()) + 2
    path = blended(start, np.broadcast_to(target, (horizon, *start.shape)), rate)
    away = (np.abs(to_grid(path, r) - cell) > 1e-9).any(-1)  # [n + 1, P]
    last = np.where(away.any(0), len(away) - np.argmax(away[::-1], axis=0), 0)
    return Check("updates until codes rest", bound, last.astype(float), np.inf)


def _roots(modalities: int) -> list[Array]:
    unit = np.eye(modalities)
    return [unit[m] - unit[n] for m in range(modalities) for n in range(modalities) if m != n]


def follow(tables: Tables, path: Array, margin: float) -> Array:
    """Codes with hysteresis along rounded weights path [n + 1, N, M]: [n + 1, N, L]."""
    digits = tables.table.shape[1]
    codes = [tables.codes(path[0])]
    for weights in path[1:]:
        scores = np.sqrt(digits) * tables.scores(weights)
        old = np.take_along_axis(scores, codes[-1][..., None], -1)[..., 0]
        codes.append(np.where(scores.max(-1) > old + margin, scores.argmax(-1), codes[-1]))
    return np.stack(codes)


def churn(tables: Tables, path: Array, codes: Array, margin: float) -> Check:
    """Changes of each item's digits along a path, on average over digits, against the budget.

    Between two changes of a digit the scores of two codes must swing by `margin`, and a step from
    alpha to beta swings them by at most the range over codes of score(beta) - score(alpha). The
    trivial bound counts the updates in which the rounded weights moved at all.
    """
    digits = tables.table.shape[1]
    swing = np.zeros(tables.table.shape[:2])
    for before, after in pairwise(path):
        moved = tables.scores(after - before)
        swing += moved.max(-1) - moved.min(-1)
    cells = (np.abs(np.diff(path, axis=0)) > 1e-9).any(-1).sum(0).astype(float)  # [N]
    changes = (codes[1:] != codes[:-1]).sum(0)
    budget = np.sqrt(digits) * swing / margin  # [N, L]
    bound = np.floor(budget + _NOISE).clip(max=cells[:, None]).mean(-1)
    return Check("digit changes with hysteresis", bound, changes.mean(-1), cells)


# --------------------------------------------------------------------------- theorem 3


def fidelity(tables: Tables, weights: Array, codes: Array, margin: float) -> Check:
    """Cosine of x with the words of kept codes: at most margin / |alpha| below the best ones."""
    scores = tables.scores(weights)
    kept = np.take_along_axis(scores, codes[..., None], -1)[..., 0]
    length = np.linalg.norm(weights, axis=-1)
    scale = np.sqrt(scores.shape[-2]) * length
    measured = (scores.max(-1) - kept).sum(-1) / scale
    worst = (scores.max(-1) - scores.min(-1)).sum(-1) / scale
    return Check("cosine lost to hysteresis", margin / length, measured, worst)


def score_shift(words: Array, state: Array, old: Array, new: Array) -> Check:
    """|s(C) - s(C')| <= |h| R (digits that differ); words [L, K, d], state [d], codes [N, L]."""
    digits = np.arange(words.shape[0])
    measured = np.abs((words[digits, old] - words[digits, new]).sum(1) @ state)
    squares = (words**2).sum(-1)
    gaps = squares[:, :, None] + squares[:, None] - 2 * np.einsum("lka,lja->lkj", words, words)
    reach = np.linalg.norm(state) * np.sqrt(gaps.max().clip(0))
    differ = (old != new).sum(1)
    return Check("scores after digits changed", reach * differ, measured, reach * len(digits))


def pinsker(old: Array, new: Array) -> Check:
    """|alpha - beta|^2 <= KL(alpha || beta): what the consistency loss bounds."""
    safe = np.where(old > 0, old, 1.0)
    divergence = (old * np.log(safe / np.where(old > 0, new.clip(1e-30), 1.0))).sum(-1)
    return Check("moves of weights, by KL", divergence, ((old - new) ** 2).sum(-1), 2.0)


def false_alarms(p_values: Array, levels: Array) -> Check:
    """Share of p-values at or below each level, less three standard errors, against the level."""
    share = (p_values[None] <= levels[:, None]).mean(1)
    error = np.sqrt(levels * (1 - levels) / len(p_values))
    return Check("false alarms of the drift test", levels, np.maximum(share - 3 * error, 0), 1.0)
