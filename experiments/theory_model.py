"""Theorems 1, 4 and 6 on a trained PMAT: its latents, codebooks, weights and code vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from data_utils import Sequences, history_batch
from experiments import bounds, bounds_learning, bounds_retrieval
from experiments.bounds import Array, Check, Tables, make_tables
from experiments.theory_random import codes_under, unit
from model_parts.base import Batch
from our_models.pmat import PMAT
from our_models.weights import View

# Items and users looked at: enough for means, few enough for a minute.
_ITEMS, _USERS, _GRAPH = 120, 24, 500
# How far contexts go towards those of another user, for theorem 1 on users who are alike.
_NEAR = 0.01


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
            self.weights, _ = self.looks(view)  # [B, N, M]
        self.contexts = array(view.context)  # [B, c]
        self.ids = model.item_ids(self.batch).numpy()[:, self.rows]  # [B, N, L]

    def histories(self, users: Array, sequences: Any) -> Batch:
        """The batch of these users."""
        return Batch(*map(torch.from_numpy, history_batch(sequences, users, self.window)))

    def personal(self, ids: Array) -> Array:
        """The personal digits of whole IDs."""
        return ids[..., self.model.own.shared_digits :]

    @torch.no_grad()
    def looks(self, view: View) -> tuple[Array, Array]:
        """Weights [B, N, M] and personal codes [B, N, L] that the model makes of contexts."""
        rows = torch.from_numpy(self.rows)
        weights = self.model.modality_weights(view, rows)  # [M, B, N]
        codes = self.model.atlas[self.model.blends(view, rows), rows]
        return shares(np.moveaxis(array(weights), 0, -1)), codes.numpy()

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


def even_weights(present: Array) -> Array:
    """The same for every modality that an item has, [N, M]; for all if it has none."""
    known = present | ~present.any(1, keepdims=True)
    return known / known.sum(1, keepdims=True)


def drift_of_ids(seen: Trained, rng: np.random.Generator) -> list[Check]:
    """Theorem 1 between users who stand next to each other in a random list."""
    checks = []
    personal = seen.personal(seen.ids)
    for u in range(len(seen.users) - 1):
        one, other = seen.weights[u], seen.weights[u + 1]
        codes = (personal[u], personal[u + 1])
        rounded = bounds.to_grid(one, seen.r), bounds.to_grid(other, seen.r)
        checks += [
            bounds.isometry(seen.latents, one, other),
            bounds.directions(seen.latents, one, other, seen.r),
            bounds.changed_digits(seen.tables, *rounded, codes),
            bounds.separated_digits(seen.latents, seen.codebooks, *rounded),
        ]
    modalities = seen.weights.shape[-1]
    starts = rng.dirichlet(np.ones(modalities), 20)
    step = np.array([1.0, -1.0] + [0.0] * (modalities - 2)) * 0.05
    n_codes = seen.model.own.codes
    chi = bounds.sensitivity(attention_slope(seen), seen.present)
    return [
        *by_name(checks),
        bounds.rounding(seen.weights, seen.r),
        *bounds.crossings(seen.atlas, seen.r, n_codes, starts, step),
        bounds.without_rounding(codes_under(seen.tables), n_codes, starts, step),
        bounds.attention(chi, seen.contexts, seen.weights),
        *near_users(seen, chi),
    ]


def near_users(seen: Trained, chi: Array) -> list[Check]:
    """The corollary for contexts that have gone a little way to those of the next user."""
    contexts = torch.from_numpy(seen.contexts).float()
    near = torch.lerp(contexts[:-1], contexts[1:], _NEAR)
    one, other = (seen.looks(View(x, seen.batch.users[:-1])) for x in (contexts[:-1], near))
    gaps = np.linalg.norm(array(near - contexts[:-1]), axis=1)
    checks: list[Check] = []
    for weights, *codes, gap in zip(one[0], one[1], other[1], gaps, strict=True):
        checks += bounds.near_users(seen.tables, seen.r, gap * chi, weights, tuple(codes))
    return by_name(checks)


def by_name(checks: list[Check]) -> list[Check]:
    """Checks of one name as one, in the order in which names first come."""
    names = dict.fromkeys(check.name for check in checks)
    return [together([check for check in checks if check.name == name]) for name in names]


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


# --------------------------------------------------------------------------- codes


class Requests(NamedTuple):
    """What the generator says to the history of each user without its last train item."""

    targets: Array  # [B] that item, 0-based
    tables: Array  # [B, L, K] scores of code vectors
    codes: Array  # [B, N, L] of all items, as the user sees them
    scores: Array  # [B, N] the model's own, without what orders items of equal IDs

    def by_digits(self) -> Array:
        """Scores of all items as sums of table entries, [B, N]."""
        users, digits = np.arange(len(self.tables))[:, None, None], np.arange(self.codes.shape[2])
        return self.tables[users, digits, self.codes].sum(2)


def requests(seen: Trained) -> Requests:
    """One request for each user."""
    ends = seen.train.offsets[seen.users + 1] - 1
    targets = seen.train.items[ends] - 1
    pieces = [
        seen.train.items[seen.train.offsets[u] : e] for u, e in zip(seen.users, ends, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    shorter = Sequences(np.concatenate(pieces), offsets, np.zeros(offsets[-1], np.int64))
    batch = seen.histories(np.arange(len(pieces)), shorter)
    batch = batch._replace(users=torch.from_numpy(seen.users))
    model = seen.model
    with torch.no_grad():
        states = array(model.last_states(batch))
        scores = array(model.score(batch)) - array(model.tie_break())
    tables = np.einsum("bd,lkd->blk", states, seen.words())
    return Requests(targets.astype(np.int64), tables, model.item_ids(batch).numpy(), scores)


def prefix_losses(seen: Trained) -> list[Check]:
    """The loss of items told apart by their first p digits only, against its collisions."""
    asked = requests(seen)
    users = np.arange(len(asked.tables))[:, None]
    scores = np.zeros(asked.codes.shape[:2])
    checks = []
    for digit in range(asked.codes.shape[2]):
        scores = scores + asked.tables[users, digit, asked.codes[:, :, digit]]
        codes = asked.codes[:, :, : digit + 1]
        checks.append(bounds_learning.collisions(scores, asked.targets, codes))
    return checks


def discrimination(seen: Trained, temperature: float = 0.05) -> list[Check]:
    """Theorem 4: collisions of prefixes under the learned generator; the rest says how well the
    quantiser tells items apart, each against the words of all codes, and nothing about training."""
    cosines, codes = discrimination_inputs(seen)
    own = np.arange(len(codes))
    diameter = float(seen.tables.diameter.max())
    quantiser = [
        *bounds_learning.separation(cosines, own, temperature),
        *bounds_learning.code_distance(cosines, codes, diameter, temperature),
    ]
    return [
        together(prefix_losses(seen)),
        *(check._replace(name=f"{check.name} (quantiser)") for check in quantiser),
    ]


def discrimination_inputs(seen: Trained) -> tuple[Array, Array]:
    """Items under even weights: cosines [N, N] with the words of all codes, codes [N, L]."""
    even = bounds.to_grid(even_weights(seen.present), seen.r)
    codes = seen.tables.codes(even)
    digits = np.arange(codes.shape[1])
    words = seen.codebooks[digits, codes].transpose(0, 2, 1, 3).reshape(len(codes), -1)
    return unit(bounds.fused(seen.latents, even)) @ (words / np.sqrt(len(digits))).T, codes


# --------------------------------------------------------------------------- retrieval


def retrieval(seen: Trained, rng: np.random.Generator) -> list[Check]:
    """Theorem 6: the table's scores, memory of the buffers, prefixes, beams and walks."""
    asked = requests(seen)
    tables, codes = asked.tables, asked.codes
    shifted = tables - tables.max(2, keepdims=True)  # a digit's normaliser ranks nothing
    logs = shifted - np.log(np.exp(shifted).sum(2, keepdims=True))
    some = codes[0][rng.permutation(codes.shape[1])[:_GRAPH]]
    overlap = (some[:, None] == some[None]).mean(-1)
    edges = min(16, max(2, len(overlap) // 10))
    graph = np.argsort(-overlap, axis=1, kind="stable")[:, :edges]
    start = rng.integers(len(graph), size=4)
    return [
        bounds_retrieval.table_scores(asked.by_digits(), asked.scores),
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
    name = "bytes of codes, words, latents (arithmetic)"
    return Check(name, *(np.array([float(x)]) for x in (formula, measured, per_user)))
