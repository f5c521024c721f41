"""Theorems 4 and 5 of theory_analysis.md as numbers: what contrastive learning does to codes.

Letters: B anchors, J keys, N items, M modalities, L digits, d width.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.optimize import nnls
from scipy.special import logsumexp

from experiments.bounds import Array, Check

# --------------------------------------------------------------------------- theorem 4


def certified_information(joint: Array, critic: Array, keys: int) -> tuple[float, float, float]:
    """log J - loss, the mutual information and the entropy of y, in nats, all exact.

    joint [X, Y] probabilities, critic [X, Y]; the loss is the expectation over one pair from the
    joint and keys - 1 independent y, summed over all of them.
    """
    of_x, of_y = joint.sum(1), joint.sum(0)
    loss = 0.0
    for others in product(range(len(of_y)), repeat=keys - 1):
        rest = logsumexp(critic[:, others], axis=1) if others else np.full(len(of_x), -np.inf)
        total = np.logaddexp(critic, rest[:, None])
        loss += np.prod(of_y[list(others)]) * (joint * (total - critic)).sum()
    ratio = np.where(joint > 0, joint / np.outer(of_x, of_y), 1.0)
    information = (joint * np.log(ratio)).sum()
    entropy = -(of_y * np.log(np.where(of_y > 0, of_y, 1.0))).sum()
    return float(np.log(keys) - loss), float(information), float(entropy)


def joint_of_codes(joint: Array, codes: Array) -> Array:
    """Probabilities [X, C] of contexts and codes: joint [X, Y] of items, whose codes are [Y]."""
    return joint @ np.eye(codes.max() + 1)[codes]


def info_nce(similarity: Array, positives: Array, temperature: float = 1.0) -> Array:
    """Loss of each anchor: similarity [B, J], positives [B] -> [B]."""
    logits = similarity / temperature
    return logsumexp(logits, axis=1) - logits[np.arange(len(logits)), positives]


def _margins(similarity: Array, positives: Array) -> Array:
    # s_b - s_j for the J - 1 negatives of each anchor, [B, J - 1]
    rows = np.arange(len(similarity))
    gaps = similarity[rows, positives][:, None] - similarity
    kept = np.ones_like(gaps, dtype=bool)
    kept[rows, positives] = False
    return gaps[kept].reshape(len(gaps), -1)


def separation(similarity: Array, positives: Array, temperature: float) -> tuple[Check, Check]:
    """Margin of the positive over the nearest negative, and over the mean negative, by the loss.

    min >= tau log 1 / (e^loss - 1), mean >= tau log (J - 1) / (e^loss - 1). `similarity` are
    cosines, hence the trivial bound of -2.
    """
    gaps = _margins(similarity, positives)
    excess = np.expm1(info_nce(similarity, positives, temperature)).clip(1e-300)
    nearest = -temperature * np.log(excess)
    mean = nearest + temperature * np.log(gaps.shape[1])
    return (
        Check("margin over the nearest negative", nearest, gaps.min(1), -2.0, lower=True),
        Check("margin over the mean negative", mean, gaps.mean(1), -2.0, lower=True),
    )


def collisions(scores: Array, targets: Array, codes: Array) -> Check:
    """loss >= log(1 + n), n other items with the target's code: scores [B, N], codes [B, N, L]."""
    rows = np.arange(len(scores))
    same = (codes == codes[rows, targets][:, None]).all(-1).sum(1) - 1
    loss = info_nce(scores, targets)
    return Check("loss with colliding codes", np.log1p(same), loss, 0.0, lower=True)


def code_distance(
    similarity: Array, codes: Array, diameter: float, temperature: float
) -> tuple[Check, Check]:
    """Share of digits in which an item differs from the others, by margins and by the loss.

    similarity [N, N] of unit fused vectors with unit words of all codes; codes [N, L]. Per pair
    (margin / Gamma)^2, on average over negatives (tau log((N - 1) / (e^loss - 1)) / Gamma)^2.
    """
    own = np.arange(len(codes))
    differ = (codes[:, None] != codes[None]).mean(-1)
    others = ~np.eye(len(codes), dtype=bool)
    gaps = _margins(similarity, own)
    pairs = (gaps.clip(0) / diameter) ** 2
    differ = differ[others].reshape(gaps.shape)
    excess = np.expm1(info_nce(similarity, own, temperature)).clip(1e-300)
    mean = temperature * (np.log(gaps.shape[1]) - np.log(excess))
    by_loss = (mean.clip(0) / diameter) ** 2
    return (
        Check("digits two items differ in", pairs, differ, 0.0, lower=True),
        Check("mean digits, by the loss", by_loss, differ.mean(1), 0.0, lower=True),
    )


# --------------------------------------------------------------------------- theorem 5


class Mixture:
    """How well levels with gradients [k, d] serve a target with gradient [d], alone and together.

    All cosines; `gain` is what the best second level adds to the squared cosine of the best one,
    0 when no level helps it.
    """

    def __init__(self, target: Array, levels: Array) -> None:
        goal = target / np.linalg.norm(target)
        units = levels / np.linalg.norm(levels, axis=1, keepdims=True).clip(1e-300)
        self.singles = units @ goal
        best = int(self.singles.argmax())
        self.best = max(float(self.singles[best]), 0.0)
        self.weights = nnls(units.T, goal)[0]
        direction = self.weights @ units
        norm = np.linalg.norm(direction)
        self.together = float(direction @ goal / norm) if norm else 0.0
        self.even = float(units.sum(0) @ goal / np.linalg.norm(units.sum(0)).clip(1e-300))
        rest = units - np.outer(units @ units[best], units[best])  # what the best level lacks
        rest = rest / np.linalg.norm(rest, axis=1, keepdims=True).clip(1e-12)
        added = np.delete(rest @ goal, best).max(initial=0.0)
        self.gain = float(max(added, 0.0) ** 2) if self.best else 0.0


def synergy(mixtures: list[Mixture]) -> Check:
    """Squared cosine of the best mixture >= that of the best level + gain; trivial: no gain."""
    single = np.array([m.best**2 for m in mixtures])
    bound = single + [m.gain for m in mixtures]
    measured = np.array([m.together**2 for m in mixtures])
    return Check("levels together", bound, measured, single, lower=True)


def descent(hessian: Array, point: Array, directions: Array) -> Check:
    """Decrease of a quadratic in one step along -direction: at least |g|^2 cos^2 / (2 beta)."""
    gradient = hessian @ point
    smoothness = np.linalg.eigvalsh(hessian)[-1]
    measured, bound = [], []
    for direction in directions:
        product_ = float(direction @ gradient)
        rate = max(product_, 0.0) / (smoothness * (direction @ direction))
        after = point - rate * direction
        measured.append(0.5 * (point @ hessian @ point - after @ hessian @ after))
        bound.append(max(product_, 0.0) ** 2 / (2 * smoothness * (direction @ direction)))
    return Check("decrease in one step", np.array(bound), np.array(measured), 0.0, lower=True)


def inertness(latents: Array, one: Array, other: Array) -> tuple[Check, Check]:
    """What aligned modalities leave of personalisation; latents [N, M, z] unit, weights [M].

    First: |K_alpha - K_beta| <= 2 TV sin((phi_i + phi_j) / 2) for the cosine K of the fused vectors
    of two items, TV that of the squared weights, phi_i the largest angle between two modalities of
    an item. Second: |sum_m (alpha - beta) z_m| <= 2 TV sin(phi_i / 2) for a blend by addition.
    """
    least = np.einsum("imz,inz->imn", latents, latents).min((1, 2)).clip(-1, 1)
    angles = np.arccos(least)  # [N]
    cosines = np.einsum("imz,jmz->mij", latents, latents)
    shares = [w**2 / (w**2).sum() for w in (one, other)]
    varied = 0.5 * np.abs(shares[0] - shares[1]).sum()
    pairs = np.triu_indices(len(latents), 1)
    measured = np.abs(np.einsum("m,mij->ij", shares[0] - shares[1], cosines))[pairs]
    both = (angles[:, None] + angles[None]).clip(max=np.pi)[pairs]
    bound = 2 * varied * np.sin(both / 2)
    moved = 0.5 * np.abs(one - other).sum()
    blend = np.linalg.norm(np.einsum("m,imz->iz", one - other, latents), axis=-1)
    return (
        Check("similarity of items, user to user", bound, measured, 2 * varied),
        Check("blend by addition, user to user", 2 * moved * np.sin(angles / 2), blend, 2 * moved),
    )


def confined(gradient: Array, projection: Array, direction: Array) -> Check:
    """|<g, v>| <= |g| |P v|, P onto the rows of the shared projection: where level 3 can hurt.

    gradients [B, d] of level 3 for latents, projection [d / 2, d], directions [B, d]. All are taken
    at unit length; anchors without a gradient are left out. The bound is sharp for v = g, which a
    gradient with any part off the rows violates, so that direction is checked as well.
    """
    basis = np.linalg.svd(projection, full_matrices=False)[2]
    pulled = np.linalg.norm(gradient, axis=1) > 0
    gradient, direction = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (gradient[pulled], direction[pulled])
    )
    direction = np.concatenate([direction, gradient])
    bound = np.linalg.norm(direction @ basis.T, axis=1)
    measured = np.abs((np.tile(gradient, (2, 1)) * direction).sum(1))
    return Check("pull of the inter-modal level", bound, measured, 1.0)
