"""Theorems 2 and 3 of theory_analysis.md as numbers: how weights and codes move, and what it costs.

As in bounds.py nothing is shared with the models: a path of weights or codes is given, of the
server or of `blended`, and held against its bound. Paths are [n + 1, ..., M]: n updates.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from experiments.bounds import TIES, Array, Check, Tables, to_grid, wall_distance

# --------------------------------------------------------------------------- theorem 2


def blended(start: Array, targets: Array, rate: float) -> Array:
    """alpha_n = (1 - rate) alpha_{n-1} + rate target_n: [..., M] and n targets, [n + 1, ..., M]."""
    path = [start]
    for target in targets:
        path.append((1 - rate) * path[-1] + rate * target)
    return np.stack(path)


def recursion(path: Array, targets: Array, rate: float) -> Check:
    """Weights that somebody holds, path [n + 1, ..., M], are those of `blended`: distance 0."""
    wanted = blended(targets[0], targets[1:], rate)
    off = np.linalg.norm(path - wanted, axis=-1)
    return Check("weights off their recursion", np.zeros_like(off), off, np.sqrt(2.0), exact=True)


def contraction(one: Array, other: Array, rate: float) -> Check:
    """Two paths [n + 1, ..., M] with the same targets: each update shrinks the gap by 1 - rate."""
    measured = np.linalg.norm(one - other, axis=-1)
    bound = _powers(rate, measured) * measured[0]
    return Check("two starts come together", bound, measured, np.sqrt(2.0), exact=True)


def tracking(path: Array, targets: Array, rate: float) -> Check:
    """|alpha_n - target_n| <= (1-rate)^n e_0 + step (1-rate) (1 - (1-rate)^n) / rate.

    path and targets [n + 1, ..., M]; `step` is the largest step of the targets, e_0 the distance of
    the start from the first one.
    """
    measured = np.linalg.norm(path - targets, axis=-1)  # [n + 1, ...]
    step = np.linalg.norm(np.diff(targets, axis=0), axis=-1).max(0)
    kept = _powers(rate, measured)
    bound = kept * measured[0] + step * (1 - rate) * (1 - kept) / rate
    return Check("tracking of moving weights", bound, measured, np.sqrt(2.0))


def _powers(rate: float, like: Array) -> Array:
    # (1 - rate)^n for the first axis of `like`, to be multiplied with it
    return (1 - rate) ** np.arange(len(like)).reshape(-1, *[1] * (like.ndim - 1))


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


def settled(path: Array, target: Array, rate: float, r: int, codes: Array | None = None) -> Check:
    """Updates towards one target [P, M] until rounded weights, and codes if given, stay.

    path [n + 1, P, M], codes [n + 1, P, L]. Rest comes with the first n above log(e_0 / gamma) /
    -log(1 - rate), gamma the distance of the target from the walls of its cell. Targets so near to
    a wall that rounding decides on which side they are are left out.
    """
    gamma = wall_distance(target, r)
    clear = gamma > TIES
    distance = np.linalg.norm(path[0] - target, axis=-1)
    with np.errstate(divide="ignore"):  # a start on the target itself: minus infinity
        needed = np.log(distance / gamma.clip(1e-9)) / -np.log1p(-rate)
    bound = np.maximum(np.floor(needed + 1e-9) + 1, 0)
    away = (np.abs(to_grid(path, r) - to_grid(target, r)) > 1e-9).any(-1)  # [n + 1, P]
    last = _after_last(away)
    if codes is not None:
        last = np.maximum(last, _after_last((codes[1:] != codes[:-1]).any(-1)))
    return Check("updates until codes rest", bound[clear], last[clear].astype(float), np.inf)


def _after_last(flags: Array) -> Array:
    """One more than the last index at which flags [n, P] are up, 0 where none is: [P]."""
    return np.where(flags.any(0), len(flags) - np.argmax(flags[::-1], axis=0), 0)


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
    bound = np.floor(budget + TIES).clip(max=cells[:, None]).mean(-1)
    return Check("digit changes with hysteresis", bound, changes.mean(-1), cells)


def travel(tables: Tables, path: Array, codes: Array, margin: float) -> Check:
    """The second form of the budget: Gamma / margin times the way of the rounded weights.

    For path [n + 1, N, M] and codes [n + 1, N, L]; Gamma is the largest distance of two codewords.
    """
    steps = np.diff(path, axis=0)
    bound = tables.diameter.max() / margin * np.linalg.norm(steps, axis=-1).sum(0)
    cells = (np.abs(steps) > 1e-9).any(-1).sum(0).astype(float)
    measured = (codes[1:] != codes[:-1]).sum(0).mean(-1)
    return Check("digit changes, by the way of weights", bound, measured, cells)


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


def score_shift(words: Array, length: float, shifts: Array, old: Array, new: Array) -> Check:
    """|s(C) - s(C')| <= |h| Gamma_E (digits that differ), for a state of this length.

    words E [L, K, d], codes [N, L]; shifts [N] are what the scores of somebody's codes moved by.
    """
    squares = (words**2).sum(-1)
    gaps = squares[:, :, None] + squares[:, None] - 2 * np.einsum("lka,lja->lkj", words, words)
    reach = length * np.sqrt(gaps.max().clip(0))
    differ = (old != new).sum(1)
    return Check("scores after digits changed", reach * differ, shifts, reach * len(words))


def pinsker(old: Array, new: Array) -> Check:
    """|alpha - beta|^2 <= KL(alpha || beta): what the consistency loss bounds."""
    safe = np.where(old > 0, old, 1.0)
    divergence = (old * np.log(safe / np.where(old > 0, new.clip(1e-30), 1.0))).sum(-1)
    return Check("moves of weights, by KL", divergence, ((old - new) ** 2).sum(-1), 2.0)


def false_alarms(p_values: Array, levels: Array) -> Check:
    """P(p <= a) <= a where nothing has drifted: share of p-values [n] at or below each level."""
    share = _share_below(p_values, levels)
    slack = _chance(levels, len(p_values))
    return Check("false alarms of the drift test", levels, share, 1.0, slack=slack)


def alarms_on_noise(p_values: Array, levels: Array, permutations: int) -> Check:
    """Of statistics that do not tie: P(p <= a) = floor(a (R + 1)) / (R + 1), R permutations."""
    wanted = np.floor(levels * (permutations + 1) + 1e-9) / (permutations + 1)
    share = _share_below(p_values, levels)
    slack = _chance(wanted, len(p_values))
    return Check("alarms of the drift test on noise", wanted, share, 1.0, exact=True, slack=slack)


def _share_below(p_values: Array, levels: Array) -> Array:
    return (p_values[None] <= levels[:, None] + 1e-9).mean(1)


def _chance(share: Array, draws: int) -> Array:
    # four standard errors: seven levels are looked at for every seed that somebody may take
    return 4 * np.sqrt(share * (1 - share) / draws)
