"""The embedded data set: a generator with planted modality weights, tastes and drift.

The model behind the data. Item i has, in each modality m on its own, a random topic and a unit
latent v_im near that topic's centre; features are a random linear map of v_im plus noise. User u
has weights α*_u on the simplex and a taste t_um in each modality. The next item is drawn from

    softmax_i( sharpness · Σ_m α*_um <(1 - PULL) t_um + PULL · recent_um, v_im>  +  popularity_i )

over items not yet in the history, where recent_um is the mean latent of the last items. A user's
choices are therefore coherent in the modalities that carry weight and arbitrary in the others.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from data_readers.features import standardise
from data_readers.tables import Catalogue, Dataset, Modality, Sequences, Truth
from util import UserError

LATENT = 8  # width of each modality's latent space
SPREAD = 0.5  # distance of items from their topic's centre, and of tastes from a favourite topic's
PULL = 0.4  # share of the last items, against the lasting taste, in what a user wants next
RECENT = 3  # how many items "the last" are
POPULARITY = 0.5  # standard deviation of the item bias
LEADING, OTHERS, MIXED = 16.0, 1.5, 8.0  # Dirichlet concentrations of the true weights
CANDIDATES = 8192  # a block of users chooses among at most so many items: bounded memory
BLOCK = 256  # users whose next items are drawn together


class Items(NamedTuple):
    """The latent side of the catalogue."""

    topics: np.ndarray  # [N, M] int
    latents: np.ndarray  # [N, M, LATENT] float32, unit length
    bias: np.ndarray  # [N] float32
    centres: np.ndarray  # [M, n_topics, LATENT] float32, unit length


class Users(NamedTuple):
    """What users want; the weights before and after the drift, and when it comes."""

    tastes: np.ndarray  # [U, M, LATENT] float32, unit length
    before: np.ndarray  # [U, M] float32
    after: np.ndarray  # [U, M] float32
    steps: np.ndarray  # [U] int64, -1 = never
    groups: np.ndarray  # [U] int, index of the leading modality, M = mixed
    lengths: np.ndarray  # [U] int64


def make_mock(
    *,
    n_users: int = 600,
    n_items: int = 500,
    dims: dict[str, int] | None = None,
    history_min: int = 6,
    history_max: int = 30,
    drift_share: float = 0.2,
    missing_share: float = 0.1,
    n_topics: int = 8,
    sharpness: float = 16.0,
    noise: float = 0.3,
    seed: int = 42,
) -> Dataset:
    """Generate a data set and its Truth; weights there are in the order of `modalities`.

    Histories are uniform in [history_min, history_max] but never longer than half the catalogue.
    `drift_share` of the users change their leading modality once, between 30 % and 70 % of their
    history. An item lacks each modality with probability `missing_share`, never all of them.
    Raises UserError for sizes that contradict each other.
    """
    dims = dict(dims or {"visual": 32, "text": 48, "audio": 16})
    _check(n_users, n_items, dims, history_min, history_max, drift_share, missing_share)
    # One stream each, so that more users leave the items as they were.
    for_items, for_users, for_walk = map(
        np.random.default_rng, np.random.SeedSequence(seed).spawn(3)
    )
    items = _make_items(for_items, n_items, len(dims), n_topics)
    longest = min(history_max, n_items // 2)
    lengths = for_users.integers(history_min, longest + 1, n_users)
    users = _make_users(for_users, items.centres, lengths, drift_share)
    sequences = _walk(for_walk, items, users, sharpness)
    modalities = _observe(for_items, items.latents, dims, missing_share, noise)

    names = np.array([*dims, "mixed"])
    numbers = np.arange(1, n_items + 1).astype(str)
    topics = items.topics[:, 0].astype(str)
    return Dataset(
        name="mock",
        user_ids=np.char.add("u", np.arange(1, n_users + 1).astype(str)),
        sequences=sequences,
        catalogue=Catalogue(
            item_ids=np.char.add("i", numbers),
            titles=np.char.add("item ", numbers),
            categories=np.char.add(f"{names[0]} topic ", topics),
            modalities=modalities,
        ),
        labels=None,
        truth=Truth(users.before, users.after, users.steps, names[users.groups]),
        fingerprint=_fingerprint(sequences, modalities),
    )


def _check(n_users, n_items, dims, history_min, history_max, drift_share, missing_share) -> None:
    problems = {
        "n_users must be at least 1": n_users < 1,
        "dims must name at least one modality, each with a width of at least 1": (
            not dims or min(dims.values()) < 1
        ),
        "history_min must be at least 3 (train, valid, test)": history_min < 3,
        "history_max must not be below history_min": history_max < history_min,
        f"n_items must be at least twice history_min ({2 * history_min})": (
            n_items < 2 * history_min
        ),
        "drift_share must lie in [0, 1]": not 0 <= drift_share <= 1,
        "missing_share must lie in [0, 1)": not 0 <= missing_share < 1,
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"mock data: {problem}.")


def _make_items(rng: np.random.Generator, n_items: int, n_modalities: int, n_topics: int) -> Items:
    centres = _unit(rng.standard_normal((n_modalities, n_topics, LATENT), np.float32))
    topics = rng.integers(0, n_topics, (n_items, n_modalities))
    latents = _near(rng, centres[np.arange(n_modalities), topics])
    bias = POPULARITY * rng.standard_normal(n_items, np.float32)
    return Items(topics, latents, bias, centres)


def _make_users(
    rng: np.random.Generator, centres: np.ndarray, lengths: np.ndarray, drift_share: float
) -> Users:
    n_users, (n_modalities, n_topics) = len(lengths), centres.shape[:2]
    favourite = rng.integers(0, n_topics, (n_users, n_modalities))
    tastes = _near(rng, centres[np.arange(n_modalities), favourite])
    groups = rng.integers(0, n_modalities + 1, n_users)  # every modality leads, or none does
    before = _weights(rng, groups, n_modalities)

    drifts = (rng.random(n_users) < drift_share) & (n_modalities > 1)
    steps = np.where(drifts, np.rint(lengths * rng.uniform(0.3, 0.7, n_users)), -1).astype(np.int64)
    leader = before.argmax(axis=1)
    hop = rng.integers(1, max(n_modalities, 2), n_users)
    moved = _weights(rng, (leader + hop) % n_modalities, n_modalities)
    after = np.where(drifts[:, None], moved, before)
    return Users(tastes, before, after, steps, groups, lengths)


def _weights(rng: np.random.Generator, groups: np.ndarray, n_modalities: int) -> np.ndarray:
    """[U, M] Dirichlet draws: mass on the group's modality, or even for the mixed group."""
    shape = np.full((len(groups), n_modalities), OTHERS)
    shape[groups == n_modalities] = MIXED
    led = np.flatnonzero(groups < n_modalities)
    shape[led, groups[led]] = LEADING
    draws = rng.gamma(shape)
    return (draws / draws.sum(axis=1, keepdims=True)).astype(np.float32)


def _walk(rng: np.random.Generator, items: Items, users: Users, sharpness: float) -> Sequences:
    """Draw all histories, a block of users at a time, one step of the block at a time."""
    n_users, n_items = len(users.lengths), len(items.latents)
    offsets = np.concatenate([[0], np.cumsum(users.lengths)])
    flat = np.empty(offsets[-1], np.int32)
    for start in range(0, n_users, BLOCK):
        stop = min(start + BLOCK, n_users)
        some = np.arange(n_items)
        if n_items > CANDIDATES:
            some = rng.choice(n_items, CANDIDATES, replace=False)
        block = Users(*(field[start:stop] for field in users))
        picks = _walk_block(rng, items.latents[some], items.bias[some], block, sharpness)
        kept = np.arange(picks.shape[1]) < block.lengths[:, None]
        flat[offsets[start] : offsets[stop]] = some[picks[kept]] + 1
    start = np.repeat(rng.integers(1_577_836_800, 1_609_459_200, n_users), users.lengths)  # in 2020
    elapsed = np.cumsum(1 + rng.exponential(2 * 86_400, len(flat)).astype(np.int64))
    elapsed -= np.repeat(elapsed[offsets[:-1]], users.lengths)  # each history starts at 0
    return Sequences(flat, offsets, start + elapsed)


def _walk_block(
    rng: np.random.Generator, latents: np.ndarray, bias: np.ndarray, users: Users, sharpness: float
) -> np.ndarray:
    """[B, longest] picks among the C candidates; beyond a user's length they are to be ignored."""
    n, longest = len(users.lengths), int(users.lengths.max())
    flat = latents.reshape(len(latents), -1).T  # [M·LATENT, C]
    picks = np.empty((n, longest), np.int64)
    everyone = np.arange(n)[:, None]
    for step in range(longest):
        wanted = users.tastes
        if step:
            recent = latents[picks[:, max(0, step - RECENT) : step]].mean(axis=1)  # [B, M, LATENT]
            wanted = (1 - PULL) * wanted + PULL * recent
        drifted = (users.steps >= 0) & (step >= users.steps)
        weights = np.where(drifted[:, None], users.after, users.before)  # [B, M]
        scores = sharpness * ((weights[:, :, None] * wanted).reshape(n, -1) @ flat) + bias  # [B, C]
        # Gumbel-max draws from the softmax: -log of an exponential variate is a Gumbel variate.
        with np.errstate(divide="ignore"):
            scores -= np.log(rng.standard_exponential(scores.shape, np.float32))
        scores[everyone, picks[:, :step]] = -np.inf
        picks[:, step] = scores.argmax(axis=1)
    return picks


def _observe(
    rng: np.random.Generator, latents: np.ndarray, dims: dict, missing_share: float, noise: float
) -> dict[str, Modality]:
    """Features the models see: a random map of each latent plus noise, some rows missing."""
    n_items = len(latents)
    present = rng.random((n_items, len(dims))) >= missing_share
    bare = np.flatnonzero(~present.any(axis=1))
    present[bare, rng.integers(0, len(dims), len(bare))] = True
    observed = {}
    for m, (name, width) in enumerate(dims.items()):
        features = latents[:, m] @ rng.standard_normal((LATENT, width), np.float32)
        features += noise * rng.standard_normal((n_items, width), np.float32)
        observed[name] = standardise(features, present[:, m])
    return observed


def _near(rng: np.random.Generator, centres: np.ndarray) -> np.ndarray:
    """Unit vectors around the given unit vectors."""
    jitter = rng.standard_normal(centres.shape, np.float32) * (SPREAD / np.sqrt(LATENT))
    return _unit(centres + jitter.astype(np.float32))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _fingerprint(sequences: Sequences, modalities: dict[str, Modality]) -> str:
    """Of the data, not of the settings: numpy may change its random streams between versions."""
    digest = hashlib.blake2b(repr(list(modalities)).encode(), digest_size=16)
    for array in [*sequences, *(array for modality in modalities.values() for array in modality)]:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
