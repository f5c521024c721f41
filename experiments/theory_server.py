"""Theorems 2 and 3 on the server of a trained PMAT: what it holds, and what the model asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from data_utils import Sequences
from experiments import bounds_updates
from experiments.bounds import Array, Check, to_grid
from experiments.theory_model import Trained, array, by_name, even_weights, shares, together
from our_models.serving import Server, detect_drift

# Users followed item by item, shuffled histories, histories of noise.
_FOLLOWED, _SHUFFLED, _NOISE = 6, 600, 2000
_PERMUTATIONS = 99
# Forced updates of a history that stays as it is: halved so often, nothing is left of a distance.
_RESTING = 24


class Served(NamedTuple):
    """A user whom a server has followed, and its states on the items looked at."""

    server: Server
    first: Array  # [all items, L] the codes at first
    weights: Array  # [n + 1, N, M]
    codes: Array  # [n + 1, N, L], personal digits

    def path(self) -> Array:
        """Weights on the grid of the model, as codes see them."""
        return to_grid(self.weights, self.server.model.own.grid)


class Followed:
    """Some users of a trained model, served item by item."""

    def __init__(self, seen: Trained, rng: np.random.Generator) -> None:
        self.seen = seen
        offsets, items = seen.train.offsets, seen.train.items
        self.histories = [items[offsets[u] : offsets[u + 1]] for u in seen.users[:_FOLLOWED]]
        self.targets = [asked(seen, history) for history in self.histories]
        self.p_values = shuffled_p_values(seen, rng)

    def served(self, rate: float, margin: float, start: Array | None = None) -> list[Served]:
        """All users, each from two items to the end of the history."""
        return [follow(self.seen, h, rate, margin, start=start) for h in self.histories]


def asked(seen: Trained, history: Array) -> Array:
    """What the model, without any server, says after two items and after each later one: [n, N, M].

    A history that begins anew with each prefix, so that no earlier state can be in it.
    """
    prefixes = [history[:end] for end in range(2, len(history) + 1)]
    offsets = np.concatenate([[0], np.cumsum([len(prefix) for prefix in prefixes])])
    sequences = Sequences(np.concatenate(prefixes), offsets, np.zeros(offsets[-1], np.int64))
    batch = seen.histories(np.arange(len(prefixes)), sequences)
    batch = batch._replace(users=torch.zeros_like(batch.users))  # the server's user 0
    with torch.no_grad():
        return seen.looks(seen.model.view(batch))[0]


def follow(
    seen: Trained,
    history: Array,
    rate: float,
    margin: float,
    at_rest: int = 0,
    start: Array | None = None,
) -> Served:
    """A server that gets the third item and the next ones and moves with each of them, or, if
    `at_rest`, gets the whole history and moves so many times without another item.

    `start` [all items, M] takes the place of the weights at first.
    """
    known, updates = history[:2], [[int(item)] for item in history[2:]]
    if at_rest:
        known, updates = history, [[]] * at_rest
    given = SimpleNamespace(items=known, offsets=np.array([0, len(known)]))
    # moved by force alone, from the first item on
    server = Server(seen.model, given, settled=0, p_value=0.0, rate=rate, margin=margin)
    server.item_ids(0)
    held = server.states[0]
    if start is not None:
        held.items.weights = torch.from_numpy(start.T).to(held.items.weights)
    first, states = held.items.codes.numpy().copy(), [_look(server, seen.rows)]
    for items in updates:
        server.update(0, items, force=True)
        states.append(_look(server, seen.rows))
    weights, codes = zip(*states, strict=True)
    return Served(server, first, np.stack(weights), np.stack(codes))


def _look(server: Server, rows: Array) -> tuple[Array, Array]:
    items = server.states[0].items
    return shares(array(items.weights).T[rows]), items.codes.numpy()[rows].copy()


def updates(users: Followed, rate: float = 0.5, margin: float = 0.5) -> list[Check]:
    """Theorem 2 on states of the server, against what the model asks for."""
    seen = users.seen
    served = users.served(rate, margin)
    even = even_weights(array(seen.model.present))
    others = users.served(rate, margin, even)
    checks = []
    for ours, other, targets in zip(served, others, users.targets, strict=True):
        checks += [
            bounds_updates.recursion(ours.weights, targets, rate),
            bounds_updates.contraction(ours.weights, other.weights, rate),
            bounds_updates.tracking(ours.weights, targets, rate),
            bounds_updates.churn(seen.tables, ours.path(), ours.codes, margin),
            bounds_updates.travel(seen.tables, ours.path(), ours.codes, margin),
        ]
    *moving, churn, travel = by_name(checks)
    return [*moving, _rest(users, rate, margin, even), churn, travel]


def _rest(users: Followed, rate: float, margin: float, start: Array) -> Check:
    """Updates until weights and codes stay, of histories that stay as they are."""
    seen, checks = users.seen, []
    for history, targets in zip(users.histories, users.targets, strict=True):
        still = follow(seen, history, rate, margin, at_rest=_RESTING, start=start)
        path = (still.weights, targets[-1], rate, seen.r, still.codes)
        checks.append(bounds_updates.settled(*path))
    return together(checks)


def consistency(users: Followed, rng: np.random.Generator, margin: float = 0.05) -> list[Check]:
    """Theorem 3 on the server's own states, and its drift test where nothing has drifted."""
    seen, checks = users.seen, []
    words = seen.words()[seen.model.own.shared_digits :]
    for held in users.served(0.5, margin):
        checks += [
            bounds_updates.fidelity(seen.tables, held.path(), held.codes, margin),
            bounds_updates.score_shift(words, *rescored(held)),
            bounds_updates.pinsker(held.weights[:-1], held.weights[1:]),
        ]
    levels = np.array([0.005, 0.01, 0.05, 0.1, 0.2, 0.5])
    return [
        *by_name(checks),
        bounds_updates.false_alarms(users.p_values, levels[1:]),
        bounds_updates.alarms_on_noise(noise_p_values(rng), levels, _PERMUTATIONS),
    ]


@torch.no_grad()
def rescored(held: Served) -> tuple[float, Array, Array, Array]:
    """Length of the state of the generator, and by how much the server's own scores of all items
    move when the first codes take the place of the last, the state as it is: [N]; both codes."""
    server, items = held.server, held.server.states[0].items
    last = items.codes
    now = array(server.scores(0))
    items.codes = torch.from_numpy(held.first)
    before = array(server.scores(0))
    items.codes = last
    length = float(np.linalg.norm(array(server._encode(0))))
    return length, np.abs(now - before), held.first, last.numpy()


def shuffled_p_values(seen: Trained, rng: np.random.Generator) -> Array:
    """Of the server's test on histories in random order, where nothing can have drifted."""
    users = np.flatnonzero(np.diff(seen.train.offsets) >= 6)
    if not len(users):
        raise ValueError("the drift test needs users with at least 6 train interactions")
    shuffled = [
        rng.permutation(seen.train.items[seen.train.offsets[user] : seen.train.offsets[user + 1]])
        for user in rng.choice(users, _SHUFFLED)
    ]
    known = [items[:-1] for items in shuffled]  # the last one comes in
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in known])])
    given = SimpleNamespace(items=np.concatenate(known), offsets=offsets)
    server = Server(seen.model, given, permutations=_PERMUTATIONS)
    found = []
    for row, items in enumerate(shuffled):
        found.append(server.update(row, [int(items[-1])]).p_value)
        server.states.pop(row)
    return np.array(found)


def noise_p_values(rng: np.random.Generator, length: int = 40) -> Array:
    """Of the same test on items that have nothing to do with each other, too many to tie."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    present = torch.ones(length, 2, dtype=torch.bool)
    found = []
    for _ in range(_NOISE):
        latents = torch.randn(length, 2, 4, generator=generator)
        latents = torch.nn.functional.normalize(latents, dim=-1)
        found.append(detect_drift(latents, present, generator, _PERMUTATIONS).p_value)
    return np.array(found)


def dial(users: Followed, margins: Array, rate: float = 0.5) -> dict[str, list[float]]:
    """Hysteresis turned up, along the weights that the model asks for."""
    tables, rows = users.seen.tables, []
    for margin in map(float, margins):
        parts = []
        for wanted in users.targets:
            path = to_grid(bounds_updates.blended(wanted[0], wanted[1:], rate), users.seen.r)
            codes = bounds_updates.follow(tables, path, margin)
            churned = bounds_updates.churn(tables, path, codes, margin)
            lost = bounds_updates.fidelity(tables, path, codes, margin)
            pairs = (churned.measured, churned.bound, lost.measured, lost.bound)
            parts.append([x.mean() for x in pairs])
        rows.append([margin, *np.mean(parts, axis=0)])
    names = ("margin", "churn", "churn_bound", "lost", "lost_bound")
    return dict(zip(names, np.array(rows).T.tolist(), strict=True))
