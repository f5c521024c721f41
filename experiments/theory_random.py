"""Instances that nobody trained: every bound of theory_analysis.md on random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments import bounds, bounds_learning, bounds_retrieval, bounds_updates
from experiments.bounds import Array, Check, Tables, make_tables

# theorem -> its checks
Checks = dict[int, list[Check]]


class Instance(NamedTuple):
    """Random items and a quantiser made of their own blends."""

    latents: Array  # [N, M, z], unit
    codebooks: Array  # [L, K, M, s], unit
    tables: Tables


def make_instance(
    rng: np.random.Generator,
    items: int = 30,
    modalities: int = 3,
    digits: int = 8,
    codes: int = 16,
    part: int = 4,
    latents: Array | None = None,
) -> Instance:
    """Codewords are the directions that blends of random items have."""
    if latents is None:
        latents = unit(rng.standard_normal((items, modalities, digits * part)))
    rows = rng.integers(items, size=(digits, codes))
    weights = rng.dirichlet(np.ones(modalities), (digits, codes))
    pieces = latents.reshape(items, modalities, digits, part)[rows, :, np.arange(digits)[:, None]]
    words = weights[..., None] * pieces  # [L, K, M, s]
    words = words / np.linalg.norm(words, axis=(2, 3), keepdims=True)
    return Instance(latents, words, make_tables(latents, words))


def random_checks(rng: np.random.Generator) -> Checks:
    """All six theorems."""
    return {
        1: _drift_of_ids(rng),
        2: _updates(rng),
        3: _consistency(rng),
        4: _discrimination(rng),
        5: _levels(rng),
        6: _retrieval(rng),
    }


def _drift_of_ids(rng: np.random.Generator) -> list[Check]:
    made = make_instance(rng)
    items, modalities, _ = made.latents.shape
    one = rng.dirichlet(np.ones(modalities), items)
    other = toward(one, rng.dirichlet(np.ones(modalities), items), 0.1)
    step = np.array([1.0, -1.0] + [0.0] * (modalities - 2)) * 0.01
    lines = rng.dirichlet(np.ones(modalities), 20)
    codes = codes_under(made.tables)
    fine = make_instance(rng, modalities=2, digits=4, codes=64, part=1)
    ends = np.array([[0.95, 0.05], [0.05, 0.95]])[:, None].repeat(items, 1)  # [2, N, 2]
    return [
        bounds.isometry(made.latents, one, other),
        bounds.rounding(rng.dirichlet(np.ones(modalities), 500), 4),
        bounds.directions(made.latents, one, other, 16),
        bounds.changed_digits(made.tables, one, other),
        bounds.separated_digits(fine.latents, fine.codebooks, *ends),
        *bounds.crossings(codes, 8, 16, lines, step),
        bounds.without_rounding(codes, 16, lines, step),
    ]


def _updates(rng: np.random.Generator) -> list[Check]:
    modalities, rate, made = 3, 0.3, make_instance(rng)
    walk = random_walk(rng, 40, modalities, 0.05)
    starts = rng.dirichlet(np.ones(modalities), 50)
    start = rng.dirichlet(np.ones(modalities), len(made.latents))
    targets = np.stack([random_walk(rng, 40, modalities, 0.1) for _ in start], axis=1)
    path = bounds.to_grid(bounds_updates.blended(start, targets, rate), 64)
    codes = bounds_updates.follow(made.tables, path, 0.3)
    one, other = (bounds_updates.blended(place, walk[1:], rate) for place in starts[:2])
    still = np.broadcast_to([0.55, 0.3, 0.15], (30, *starts.shape))
    resting = bounds_updates.blended(starts, still, rate)
    return [
        bounds_updates.contraction(one, other, rate),
        bounds_updates.tracking(one, walk, rate),
        bounds_updates.averaging(0.5 * np.array([1.0, -1.0, 0.0]), rate, 12),
        bounds_updates.settled(resting, still[0], rate, 4),
        bounds_updates.churn(made.tables, path, codes, 0.3),
        bounds_updates.travel(made.tables, path, codes, 0.3),
    ]


def _consistency(rng: np.random.Generator) -> list[Check]:
    made, margin = make_instance(rng), 0.1
    items, modalities, _ = made.latents.shape
    start, targets = rng.dirichlet(np.ones(modalities), (2, items))
    path = bounds.to_grid(bounds_updates.blended(start, np.repeat(targets[None], 10, 0), 0.3), 16)
    codes = bounds_updates.follow(made.tables, path, margin)
    words, state = rng.standard_normal((codes.shape[2], 16, 32)), rng.standard_normal(32)
    digits = np.arange(len(words))
    old, new = (words[digits, kept].sum(1) @ state for kept in (codes[0], codes[-1]))
    length, shifts = float(np.linalg.norm(state)), np.abs(old - new)
    return [
        bounds_updates.fidelity(made.tables, path, codes, margin),
        bounds_updates.score_shift(words, length, shifts, codes[0], codes[-1]),
        bounds_updates.pinsker(start, toward(start, targets, 0.3)),
    ]


def _discrimination(rng: np.random.Generator) -> list[Check]:
    anchors = unit(rng.standard_normal((40, 16)))
    keys = unit(anchors + 0.15 * rng.standard_normal(anchors.shape))
    made = make_instance(rng, codes=32)
    coarse = rng.integers(4, size=(200, 3))
    words = rng.standard_normal((3, 4, 8))
    states = rng.standard_normal((30, 8))
    scores = states @ words[np.arange(3), coarse].sum(1).T
    return [
        *_information(rng),
        *bounds_learning.separation(anchors @ keys.T, np.arange(40), 0.1),
        bounds_learning.collisions(scores, scores.argmax(1), np.repeat(coarse[None], 30, 0)),
        *bounds_learning.code_distance(*word_cosines(made, 0.05)),
    ]


def _information(rng: np.random.Generator, keys: int = 4) -> list[Check]:
    """Of 4 contexts and 6 items with 3 codes, for the best critic, one with noise and noise."""
    of_items, of_codes = [], []
    for truth, noise in [(1.0, 0.0), (1.0, 0.5), (0.0, 0.5)] * 8:
        joint = rng.dirichlet(np.full(24, 0.2)).reshape(4, 6) + 1e-9
        joint /= joint.sum()
        codes = rng.permutation([0, 0, 0, 1, 1, 2])
        coded = bounds_learning.joint_of_codes(joint, codes)
        sees_items, sees_codes = (
            truth * np.log(p / np.outer(p.sum(1), p.sum(0))) + noise * rng.standard_normal(p.shape)
            for p in (joint, coded)
        )
        of_items.append(bounds_learning.certified_information(joint, sees_items, keys))
        of_codes.append(
            bounds_learning.certified_information(joint, sees_codes[:, codes], keys)[:1]
            + bounds_learning.certified_information(coded, sees_codes, 1)[1:]
        )
    items, codes = np.array(of_items).T, np.array(of_codes).T
    most = np.log(keys)
    return [
        Check("information the loss certifies", items[1], items[0], most),
        Check("information the loss certifies, codes", codes[1], codes[0], most),
        Check("information of codes", codes[2], codes[1], np.log(4)),
    ]


def word_cosines(made: Instance, temperature: float) -> tuple[Array, Array, float, float]:
    """What `code_distance` takes: items under even weights against the words of all codes."""
    items, modalities, _ = made.latents.shape
    weights = np.full((items, modalities), 1 / modalities)
    codes = made.tables.codes(weights)
    digits = np.arange(codes.shape[1])
    words = made.codebooks[digits, codes].transpose(0, 2, 1, 3).reshape(items, -1)
    x = unit(bounds.fused(made.latents, weights))
    cosines = x @ (words / np.sqrt(len(digits))).T
    return cosines, codes, float(made.tables.diameter.max()), temperature


def _levels(rng: np.random.Generator) -> list[Check]:
    goals = rng.standard_normal((100, 12))
    mixtures = [
        bounds_learning.Mixture(goal, goal + 2 * rng.standard_normal((3, 12))) for goal in goals
    ]
    root = rng.standard_normal((12, 12))
    hessian = root @ root.T
    tries = goals[1:40] + 2 * hessian @ goals[0]
    latents = aligned_latents(rng, 40, 3, 16, 0.5)
    one, other = rng.dirichlet(np.ones(3), 2)
    return [
        bounds_learning.synergy(mixtures),
        bounds_learning.descent(hessian, goals[0], tries),
        *bounds_learning.inertness(latents, one, other),
    ]


def aligned_latents(
    rng: np.random.Generator, items: int, modalities: int, width: int, cosine: float
) -> Array:
    """Unit latents [N, M, z] whose modalities have this cosine with each other on average."""
    shared = unit(rng.standard_normal((items, 1, width)))
    own = unit(rng.standard_normal((items, modalities, width)))
    return unit(np.sqrt(cosine) * shared + np.sqrt(1 - cosine) * own)


def alignment(rng: np.random.Generator, cosines: Array) -> dict[str, list[float]]:
    """What two users still see differently as the modalities of an item are aligned.

    Digits that differ, of codes of our blend and of one by addition, and how much the similarity of
    two items changes from user to user, with its bound.
    """
    users = rng.dirichlet(np.ones(3), (20, 2))
    rows = []
    for cosine in cosines:
        latents = aligned_latents(rng, 60, 3, 32, float(cosine))
        ours = codes_under(make_instance(rng, 60, latents=latents, codes=32).tables)
        added = codes_of_sums(latents, rng)
        parts = []
        for one, other in users:
            similar = bounds_learning.inertness(latents, one, other)[0]
            seen = [codes(np.stack([one, other])) for codes in (ours, added)]  # two of [2, N, L]
            differ = [(first != second).mean() for first, second in seen]
            parts.append([*differ, similar.measured.mean(), similar.bound.mean()])
        rows.append([float(cosine), *np.mean(parts, axis=0)])
    names = ("cosine", "digits", "digits_of_sums", "similarity", "similarity_bound")
    return dict(zip(names, np.array(rows).T.tolist(), strict=True))


def codes_of_sums(
    latents: Array, rng: np.random.Generator, digits: int = 8, codes: int = 32
) -> Callable[[Array], Array]:
    """Product codes of a blend by addition, sum_m alpha_m z_m, as `codes_under`."""
    items, modalities, _ = latents.shape
    weights = rng.dirichlet(np.ones(modalities), (codes, items))
    pick = rng.integers(items, size=(codes, digits))
    sums = np.einsum("knm,nmz->knz", weights, latents).reshape(codes, items, digits, -1)
    words = sums[np.arange(codes)[:, None], pick, np.arange(digits)]  # [K, L, s]

    def look(weights: Array) -> Array:
        blend = np.einsum("gm,nmz->gnz", weights, latents).reshape(len(weights), items, digits, -1)
        distance = ((blend[:, :, None] - words[None, None]) ** 2).sum(-1)  # [G, N, K, L]
        return distance.argmin(2)

    return look


def _retrieval(rng: np.random.Generator) -> list[Check]:
    codes = rng.integers(8, size=(400, 4))
    tables = np.log(rng.dirichlet(np.full(8, 0.5), (40, 4)) + 1e-9)
    graph = rng.integers(400, size=(400, 12))
    start = rng.integers(400, size=8)
    return [
        bounds_retrieval.colliding_pairs(codes, 8),
        *bounds_retrieval.beam_loss(tables, codes, 6),
        bounds_retrieval.walk_work(tables[0], codes, graph, 8, 6, start),
    ]


# --------------------------------------------------------------------------- pieces


def unit(vectors: Array) -> Array:
    """The same directions, length one over the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-300)


def toward(one: Array, other: Array, share: float) -> Array:
    """A point of the way from one to the other."""
    return (1 - share) * one + share * other


def random_walk(rng: np.random.Generator, steps: int, modalities: int, size: float) -> Array:
    """Weights [steps, M] that move a little at a time and stay in the simplex."""
    path = [rng.dirichlet(np.ones(modalities))]
    for _ in range(steps - 1):
        path.append(toward(path[-1], rng.dirichlet(np.ones(modalities)), size))
    return np.stack(path)


def codes_under(tables: Tables) -> Callable[[Array], Array]:
    """weights [G, M] -> codes [G, N, L] of all items under the same weights."""

    def look(weights: Array) -> Array:
        n_items = len(tables.table)
        return tables.codes(np.repeat(weights[:, None], n_items, 1))

    return look
