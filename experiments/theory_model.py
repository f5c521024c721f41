"""The same bounds on a trained PMAT: its latents, codebooks, weights, server and code vectors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_utils import Sequences, history_batch
from experiments import bounds, bounds_learning, bounds_retrieval
from experiments.bounds import Array, Check, Tables, make_tables
from experiments.theory_random import Checks, unit
from model_parts.base import Batch
from our_models.pmat import PMAT
from our_models.serving import Server

# Items and users looked at: enough for means, few enough for a minute.
_ITEMS, _USERS, _FOLLOWED, _SHUFFLED, _GRAPH = 120, 24, 6, 150, 500


class Trained:
    """A trained PMAT as plain arrays: some items, some users, what each sees."""

    def __init__(
        self, model: PMAT, train: Sequences, window: int, rng: np.random.Generator
    ) -> None:
        self.model, self.train, self.window = model.eval(), train, window
        present = array(model.present)
        some = np.flatnonzero(present.any(1))
        self.rows = np.sort(rng.permutation(some)[:_ITEMS])
        self.present = present[self.rows]
        self.latents = array(model.latents)[self.rows]
        self.traits = array(model.traits)[self.rows]
        self.codebooks = array(model.quantiser.codebooks)
        self.tables: Tables = make_tables(self.latents, self.codebooks)
        self.r = model.own.grid
        enough = np.flatnonzero(np.diff(train.offsets) >= 4)
        self.users = rng.permutation(enough)[:_USERS]
        self.batch = self.histories(self.users, train)
        with torch.no_grad():
            view = model.view(self.batch)
            weights = model.modality_weights(view, torch.from_numpy(self.rows))
            self.states = array(model.last_states(self.batch))  # [B, d]
        self.contexts = array(view.context)  # [B, c]
        self.weights = shares(np.moveaxis(array(weights), 0, -1))  # [B, N, M]
        self.ids = model.item_ids(self.batch).numpy()[:, self.rows]  # [B, N, L]
        self.targets = [weights for weights, _ in followed(self, 1.0, 0.0)]  # of each [n, N, M]
        self.p_values = shuffled_p_values(self, rng)

    def histories(self, users: Array, sequences: Any) -> Batch:
        """The batch of these users."""
        return Batch(*map(torch.from_numpy, history_batch(sequences, users, self.window)))

    def personal(self, ids: Array) -> Array:
        """The personal digits of whole IDs."""
        return ids[..., self.model.own.shared_digits :]

    def atlas(self, weights: Array) -> Array:
        """Codes that the model keeps for weights [G, M] on its grid: [G, N, L]."""
        grid = array(self.model.grid)
        points = ((weights[:, None] - grid[None]) ** 2).sum(-1).argmin(1)
        return self.model.atlas.numpy()[points][:, self.rows]

    def words(self) -> Array:
        """Code vectors of all digits, [L, K, d]."""
        return array(self.model.tokens.weight).reshape(
            -1, self.model.own.codes, self.model.own.width
        )


def array(tensor: torch.Tensor) -> Array:
    """float64 for the checks (bool stays bool)."""
    values = tensor.detach().cpu().numpy()
    return values if values.dtype == bool else values.astype(np.float64)


def shares(weights: Array) -> Array:
    """Weights that sum to one in float64 too."""
    return weights / weights.sum(-1, keepdims=True)


def model_checks(seen: Trained, rng: np.random.Generator) -> Checks:
    """All theorems but the fifth, which is about another model (theory_levels.py)."""
    return {
        1: drift_of_ids(seen, rng),
        2: updates(seen),
        3: consistency(seen),
        4: discrimination(seen),
        6: retrieval(seen, rng),
    }


def drift_of_ids(seen: Trained, rng: np.random.Generator) -> list[Check]:
    """Theorem 1 between users who stand next to each other in a random list."""
    found: dict[str, list[Check]] = {}
    personal = seen.personal(seen.ids)
    for u in range(len(seen.users) - 1):
        one, other = seen.weights[u], seen.weights[u + 1]
        codes = (personal[u], personal[u + 1])
        rounded = bounds.to_grid(one, seen.r), bounds.to_grid(other, seen.r)
        for check in (
            bounds.isometry(seen.latents, one, other),
            bounds.directions(seen.latents, one, other, seen.r),
            bounds.changed_digits(seen.tables, *rounded, codes),
            bounds.separated_digits(seen.latents, seen.codebooks, *rounded),
        ):
            found.setdefault(check.name, []).append(check)
    modalities = seen.weights.shape[-1]
    starts = rng.dirichlet(np.ones(modalities), 20)
    step = np.array([1.0, -1.0] + [0.0] * (modalities - 2)) * 0.05 if modalities > 1 else None
    checks = [together(parts) for parts in found.values()]
    checks.append(bounds.rounding(seen.weights, seen.r))
    if step is not None:
        checks.append(bounds.crossings(seen.atlas, seen.r, starts, step))
    slope = attention_slope(seen)
    checks.append(bounds.attention(slope, seen.present, seen.contexts, seen.weights))
    return checks


def together(parts: list[Check]) -> Check:
    """All instances of several checks of the same kind as one."""
    trivial = [np.broadcast_to(part.trivial, np.shape(part.measured)) for part in parts]
    fields = ([p.bound for p in parts], [p.measured for p in parts], trivial)
    bound, measured, trivial = (np.concatenate([np.ravel(x) for x in field]) for field in fields)
    return parts[0]._replace(bound=bound, measured=measured, trivial=trivial)


def attention_slope(seen: Trained) -> Array:
    """A_i: how the logits of an item depend on the context, [N, M, c]."""
    attention = seen.model.attention
    modalities, width = seen.present.shape[1], seen.contexts.shape[1]
    slope = np.zeros((len(seen.rows), modalities, width))
    if attention.of_user is not None:
        slope += array(attention.of_user.weight)
    if attention.query is not None:
        queries = array(attention.query.weight).reshape(modalities, -1, width)
        keys = seen.traits @ array(attention.key.weight).T  # [N, M, d_a]
        slope += np.einsum("nma,mac->nmc", keys, queries) * queries.shape[1] ** -0.5
    return slope


# --------------------------------------------------------------------------- the server


def followed(seen: Trained, rate: float, margin: float) -> list[tuple[Array, Array]]:
    """Weights [n + 1, N, M] and personal codes [n + 1, N, L] of users served item by item."""
    found = []
    for user in seen.users[:_FOLLOWED]:
        begin, end = seen.train.offsets[user : user + 2]
        items = seen.train.items[begin:end]
        start = SimpleNamespace(items=items[:2], offsets=np.array([0, 2]))
        # moved by force alone, from the first item on
        server = Server(seen.model, start, settled=0, p_value=0.0, rate=rate, margin=margin)
        server.item_ids(0)
        states = [_look(server, seen.rows)]
        for item in items[2:]:
            server.update(0, [int(item)], force=True)
            states.append(_look(server, seen.rows))
        weights, codes = zip(*states, strict=True)
        found.append((np.stack(weights), np.stack(codes)))
    return found


def _look(server: Server, rows: Array) -> tuple[Array, Array]:
    items = server.states[0].items
    return shares(array(items.weights).T[rows]), items.codes.numpy()[rows].copy()


def updates(seen: Trained, rate: float = 0.5, margin: float = 0.5) -> list[Check]:
    """Theorem 2: targets as the model asks for them, churn as the server makes it."""
    targets = seen.targets
    even = np.full_like(targets[0][0], 1 / targets[0].shape[-1])
    served = followed(seen, rate, margin)
    paths = [(bounds.to_grid(weights, seen.r), codes) for weights, codes in served]
    tracked = [bounds.tracking(t[0], t, 0.3) for t in targets]
    return [
        together([bounds.contraction(even[0], t[0, 0], t[:, 0], rate) for t in targets]),
        together(tracked),
        together(
            [bounds.settled(even[:1], t[-1, n], rate, seen.r) for t in targets for n in (0, -1)]
        ),
        together([bounds.churn(seen.tables, *path, margin) for path in paths]),
    ]


def consistency(seen: Trained, margin: float = 0.05) -> list[Check]:
    """Theorem 3 on the server's own states, and its drift test on shuffled histories."""
    served = followed(seen, 0.5, margin)
    words = seen.words()[seen.model.own.shared_digits :]
    kept, shifts, moves = [], [], []
    for weights, codes in served:
        kept.append(bounds.fidelity(seen.tables, bounds.to_grid(weights, seen.r), codes, margin))
        shifts.append(bounds.score_shift(words, seen.states[0], codes[0], codes[-1]))
        moves.append(bounds.pinsker(weights[:-1], weights[1:]))
    levels_ = np.array([0.01, 0.05, 0.1, 0.2, 0.5])
    alarms = bounds.false_alarms(seen.p_values, levels_)
    return [together(kept), together(shifts), together(moves), alarms]


def shuffled_p_values(seen: Trained, rng: np.random.Generator) -> Array:
    """Of the server's test on histories in random order, where nothing can have drifted."""
    lengths = np.diff(seen.train.offsets)
    users = np.flatnonzero(lengths >= 6)
    if not len(users):
        raise ValueError("the drift test needs users with at least 6 train interactions")
    found = []
    for number, user in enumerate(rng.permutation(users)[:_SHUFFLED]):
        items = seen.train.items[seen.train.offsets[user] : seen.train.offsets[user + 1]]
        items = rng.permutation(items)
        start = SimpleNamespace(items=items[:-1], offsets=np.array([0, len(items) - 1]))
        server = Server(seen.model, start, permutations=99, seed=number)
        found.append(server.update(0, [int(items[-1])]).p_value)
    return np.array(found)


# --------------------------------------------------------------------------- codes


def digit_scores(seen: Trained) -> tuple[Array, Array, Array]:
    """Of each user: next train item [B] (0-based), tables [B, L, K] and all codes [B, N, L].

    The history ends before that item.
    """
    ends = seen.train.offsets[seen.users + 1] - 1
    targets = seen.train.items[ends] - 1
    pieces = [
        seen.train.items[seen.train.offsets[u] : e] for u, e in zip(seen.users, ends, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    shorter = Sequences(np.concatenate(pieces), offsets, np.zeros(offsets[-1], np.int64))
    batch = seen.histories(np.arange(len(pieces)), shorter)
    batch = batch._replace(users=torch.from_numpy(seen.users))
    with torch.no_grad():
        states = array(seen.model.last_states(batch))
    tables = np.einsum("bd,lkd->blk", states, seen.words())
    return targets.astype(np.int64), tables, seen.model.item_ids(batch).numpy()


def prefix_losses(seen: Trained) -> list[Check]:
    """The loss of items told apart by their first p digits only, against its collisions."""
    targets, tables, codes = digit_scores(seen)
    users = np.arange(len(tables))[:, None]
    scores = np.zeros(codes.shape[:2])
    checks = []
    for digit in range(codes.shape[2]):
        scores = scores + tables[users, digit, codes[:, :, digit]]
        checks.append(bounds_learning.collisions(scores, targets, codes[:, :, : digit + 1]))
    return checks


def discrimination(seen: Trained, temperature: float = 0.05) -> list[Check]:
    """Theorem 4: collisions of prefixes; every item against the words of all codes."""
    cosines, codes = discrimination_inputs(seen)
    own = np.arange(len(codes))
    return [
        together(prefix_losses(seen)),
        *bounds_learning.separation(cosines, own, temperature),
        *bounds_learning.code_distance(
            cosines, codes, float(seen.tables.diameter.max()), temperature
        ),
    ]


def discrimination_inputs(seen: Trained) -> tuple[Array, Array]:
    """Items under even weights: cosines [N, N] with the words of all codes, codes [N, L]."""
    even = bounds.to_grid(np.where(seen.present, 1 / seen.present.sum(1, keepdims=True), 0), seen.r)
    codes = seen.tables.codes(even)
    digits = np.arange(codes.shape[1])
    words = seen.codebooks[digits, codes].transpose(0, 2, 1, 3).reshape(len(codes), -1)
    return unit(bounds.fused(seen.latents, even)) @ (words / np.sqrt(len(digits))).T, codes


# --------------------------------------------------------------------------- retrieval


def retrieval(seen: Trained, rng: np.random.Generator) -> list[Check]:
    """Theorem 6: memory of the buffers, prefixes, beams and walks over a user's codes."""
    _, tables, codes = digit_scores(seen)
    shifted = tables - tables.max(2, keepdims=True)  # a digit's normaliser ranks nothing
    logs = shifted - np.log(np.exp(shifted).sum(2, keepdims=True))
    some = codes[0][rng.permutation(codes.shape[1])[:_GRAPH]]
    overlap = (some[:, None] == some[None]).mean(-1)
    edges = min(16, max(2, len(overlap) // 10))
    graph = np.argsort(-overlap, axis=1, kind="stable")[:, :edges]
    start = rng.integers(len(graph), size=4)
    return [
        memory_of(seen),
        bounds_retrieval.colliding_pairs(codes[0], seen.model.own.codes),
        *bounds_retrieval.beam_loss(logs, codes[0], 16),
        bounds_retrieval.walk_work(tables[0], some, graph, 4, 5, start),
    ]


def memory_of(seen: Trained) -> Check:
    """Bytes of the model's buffers, against codes of all users kept one by one."""
    model, own = seen.model, seen.model.own
    n, modalities = model.present.shape
    blends = len(model.grid)
    parts = bounds_retrieval.memory(
        n, own.shared_digits, own.personal_digits, own.codes, own.width, blends, modalities,
        own.latent,
    )  # fmt: skip
    tensors = (model.shared_codes, model.atlas, model.tokens.weight, model.latents)
    measured = sum(t.numel() * t.element_size() for t in tensors)
    formula = sum(parts[name] for name in ("codes", "atlas", "words", "latents"))
    per_user = formula + parts["atlas"] * (seen.train.n_users - blends) // blends
    return Check("bytes of a model", *(np.array([float(x)]) for x in (formula, measured, per_user)))


def dial(seen: Trained, margins: Array, rate: float = 0.5) -> dict[str, list[float]]:
    """Hysteresis turned up, along the weights that the server asks for."""
    rows = []
    for margin in map(float, margins):
        parts = []
        for wanted in seen.targets:
            path = bounds.to_grid(bounds.blended(wanted[0], wanted[1:], rate), seen.r)
            codes = bounds.follow(seen.tables, path, margin)
            churned = bounds.churn(seen.tables, path, codes, margin)
            lost = bounds.fidelity(seen.tables, path, codes, margin)
            pairs = (churned.measured, churned.bound, lost.measured, lost.bound)
            parts.append([x.mean() for x in pairs])
        rows.append([margin, *np.mean(parts, axis=0)])
    names = ("margin", "churn", "churn_bound", "lost", "lost_bound")
    return dict(zip(names, np.array(rows).T.tolist(), strict=True))
