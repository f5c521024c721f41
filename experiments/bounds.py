"""Theorem 1 of theory_analysis.md as numbers: bounds beside what they bound, and what all need.

Formulas are derived here anew in float64 and share no code with the models, so that a mistake in
one is not repeated in the other. Letters: N items, M modalities, z width of a latent, L digits,
K codes, s = z / L; weights are laid out items first, [..., N, M]; r steps of the grid of weights.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Margins of codes smaller than this may fall either way: the models compute in float32.
TIES = 1e-4
# What may be beyond a bound: a share of it, and what float32 leaves of a difference that is zero.
_RELATIVE, _ROUNDING = 1e-4, 1e-6


class Check(NamedTuple):
    """One bound on many instances. `trivial` is what one knows without the theorem."""

    name: str
    bound: Array
    measured: Array
    trivial: Array | float
    lower: bool = False  # the bound holds from below
    exact: bool = False  # it is an equality, so being short of it is a violation, too
    slack: Array | float = 0.0  # for a share of random draws: how far chance may take it

    def violated(self) -> Array:
        """Which instances are beyond their bound; what is no number counts as beyond."""
        gap = np.asarray(self.bound) - self.measured if self.lower else self.measured - self.bound
        gap = np.abs(gap) if self.exact else gap
        return np.asarray(~(gap <= self.slack + _RELATIVE * np.abs(self.bound) + _ROUNDING))

    def summary(self) -> dict[str, Any]:
        """Numbers for the table: means, violations, tightness, and how often it says anything.

        `tightness` is the smaller of the two means over the larger: 1 for an equality, 0 where a
        lower bound is negative.
        `informative` is the share of instances on which the bound beats the trivial one.
        """
        bound, measured = np.mean(self.bound), np.mean(self.measured)
        small, large = sorted((bound, measured))
        gain = self.bound - self.trivial if self.lower else self.trivial - np.asarray(self.bound)
        return {
            "kind": "equal" if self.exact else "lower" if self.lower else "upper",
            "instances": int(np.size(self.measured)),
            "bound": float(bound),
            "measured": float(measured),
            "trivial": float(np.mean(self.trivial)) if np.isfinite(self.trivial).all() else None,
            "violations": int(self.violated().sum()),
            "tightness": float(max(small, 0.0) / large) if large > _ROUNDING else 1.0,
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


def wall_distance(weights: Array, r: int) -> Array:
    """gamma: how far weights [..., M] are from the walls of their cell of the grid, [...].

    A wall is where the grid point with one step more of m and one less of n is as near; a grid
    point that has nothing of n has no such neighbour.
    """
    cell = to_grid(weights, r)
    off = weights - cell
    gap = (1 / r - off[..., :, None] + off[..., None, :]) / np.sqrt(2)  # [..., m, n]
    alone = np.eye(weights.shape[-1], dtype=bool) | (cell < 1e-9)[..., None, :]
    return np.where(alone, np.inf, gap).min((-2, -1))


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
    allowed = margins(tables, one) + margins(tables, other) <= distance + TIES
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
    must = (angle > errors + others + TIES).mean(-1)
    return Check("digits that must differ", must, (first != second).mean(-1), 0.0, lower=True)


def crossings(atlas: Any, r: int, n_codes: int, start: Array, step: Array) -> tuple[Check, Check]:
    """Expected digit changes of a step, over all places on the line of weights through `start`.

    start [P, M] in the simplex, step [M] with sum 0; `atlas(weights [G, M])` -> [G, N, L] codes.
    A line of length l with B walls changes on at most a share |step| B / l of its places. The first
    check takes the walls that there are, the second as many as there can be.
    """
    length = float(np.linalg.norm(step))
    lines = [_line(atlas, r, point, step / length, length) for point in start]
    measured, jumps, spans = np.array(lines).T
    most = _most_walls(r, n_codes, step / length, spans)
    name = "digits that differ over places"
    return (
        Check(f"{name}, walls counted", length * jumps / spans, measured, 1.0),
        Check(f"{name}, a priori", length * most / spans, measured, 1.0),
    )


def _most_walls(r: int, n_codes: int, unit: Array, spans: Array) -> Array:
    """Changes of a rounded digit along lines of these lengths: at most as many as steps of rho."""
    speeds = np.array([abs(unit[m] - unit[n]) for m, n in combinations(range(len(unit)), 2)])
    speeds = speeds[speeds > 1e-12]
    steps = r * speeds.sum() * spans + len(speeds)
    return steps.clip(max=min(r, n_codes - 1)) if len(unit) == 2 else steps


def _ends(point: Array, unit: Array) -> tuple[float, float]:
    """Where the line through `point` enters and leaves the simplex."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.where(unit == 0, np.nan, -point / unit)
    return float(np.nanmax(ends[unit > 0])), float(np.nanmin(ends[unit < 0]))


def _line(
    atlas: Any, r: int, point: Array, unit: Array, length: float
) -> tuple[float, float, float]:
    """Share of changed digits averaged over the line, exact; changes along it; its length."""
    low, high = _ends(point, unit)
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
    return mass / span, jumps, span


def without_rounding(
    codes: Any, n_codes: int, start: Array, step: Array, places: int = 200
) -> Check:
    """`crossings` of codes at weights that are not rounded: a digit changes at most K - 1 times.

    `codes(weights [G, M])` -> [G, N, L]. Measured at `places` places, evenly along each line.
    """
    length = float(np.linalg.norm(step))
    unit = step / length
    bound, measured = [], []
    for point in start:
        low, high = _ends(point, unit)
        here = low + (high - low) * (np.arange(places) + 0.5) / places
        here = here[here + length <= high]
        differ = codes(point + here[:, None] * unit) != codes(
            point + (here + length)[:, None] * unit
        )
        measured.append(differ.sum() / (differ[0].size * places) if len(here) else 0.0)
        bound.append(length * (n_codes - 1) / (high - low))
    name = "digits that differ over places, not rounded"
    return Check(name, np.array(bound), np.array(measured), 1.0)


def sensitivity(slope: Array, present: Array) -> Array:
    """chi_i = 1/2 |Pi A_i|, by how much weights follow contexts: slope A [N, M, c], present [N, M].

    A are the slopes of the logits; Pi takes off their mean over the modalities an item has.
    """
    count = present.sum(-1).clip(1)[:, None, None]
    inner = slope * present[..., None]
    inner = (inner - inner.sum(1, keepdims=True) / count) * present[..., None]
    return 0.5 * np.linalg.norm(inner, ord=2, axis=(1, 2))


def attention(chi: Array, contexts: Array, weights: Array) -> Check:
    """|alpha_u - alpha_v| <= chi_i |q_u - q_v| for users next to each other in a list.

    chi [N], contexts [B, c], weights [B, N, M].
    """
    moved = np.linalg.norm(np.diff(contexts, axis=0), axis=-1)[:, None]
    measured = np.linalg.norm(np.diff(weights, axis=0), axis=-1)
    return Check("weights against contexts", moved * chi, measured, np.sqrt(2.0))


def near_users(
    tables: Tables, r: int, reach: Array, weights: Array, codes: tuple[Array, Array]
) -> tuple[Check, Check]:
    """The corollary of theorem 1: digits [N, L] of two users against their contexts alone.

    `reach` [N] is chi_i |q_u - q_v|, weights [N, M] are of the first user. A digit differs only if
    a margin is at most reach + 2 delta, an ID only if weights are within reach of a wall of their
    cell.
    """
    measured = (codes[0] != codes[1]).mean(-1)
    rounded = reach + 2 * rounding_radius(weights.shape[-1], r)
    allowed = margins(tables, to_grid(weights, r)) <= rounded[:, None] + TIES
    crossed = wall_distance(weights, r) <= reach + _ROUNDING
    return (
        Check("digits of near users, by margins", allowed.mean(-1), measured, 1.0),
        Check("digits of near users, by walls", crossed.astype(float), measured, 1.0),
    )
