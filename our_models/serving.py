"""Serving: what PMAT knows of each user between requests, and how it follows them.

The IDs of a user who has hardly any items are made anew with each of them. After that they stay as
they are until a test says that the interest has moved (model_parts/drift.py). Then weights move
part of the way and digits change where that pays; shared digits never do. The generator always
sees the history as it is now, each item in the codes the user had for it when it came in, or since
the last move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from model_parts.backbone import at_last
from model_parts.base import Batch
from model_parts.decoding import token_rows
from model_parts.drift import (
    NO_DRIFT,
    Drift,
    blend_weights,
    detect_drift,
    digits_with_hysteresis,
    topic_drift,
)
from model_parts.fusion import blend_weights_of, nearest_grid_point
from model_parts.softmax import queries
from our_models.pmat import PMAT, View


@dataclass
class _Coded:
    """R items as one user sees them."""

    rows: Tensor  # [R]
    weights: Tensor  # alpha [M, R], not resolved to the grid, so that small steps add up
    codes: Tensor  # [R, L_f] int64, personal digits


@dataclass
class _State:
    """One user."""

    history: list[int]  # item numbers, oldest first
    items: _Coded  # the whole catalogue
    past: _Coded  # the newest items of the history, as many as the generator looks at
    start: int = 0  # first position after the last accepted drift
    due: int = 0  # length of the history at which the next test is worth its chance of an alarm
    lengths: Tensor | None = None  # of the vectors of all items [N], kept while codes are


class Server:
    """IDs and recommendations of one user at a time, kept up to date as items come in.

    Users are rows 0, 1, ... of `dataset.user_ids`, items the numbers 1..N (row n - 1 of the
    catalogue); anything that is no whole number raises TypeError.

    Args:
        model: a trained PMAT with early fusion; it is put into evaluation mode.
        histories: has `.items` [R] (1..N) and `.offsets` [U + 1]; other users start with nothing.
        settled: a history that had fewer items is coded anew with every update, without a test:
            what hardly any items said of a user is not worth keeping.
        p_value: weights move when the test says at most this.
        growth: an update tests when there are so many times the items there were at the last test,
            counted from the last accepted drift. With 1 every update does, and chances of a false
            alarm add up item by item.
        threshold: if above 0, weights move when the divergence exceeds it, whatever the p-value:
            one bound for all, which knows nothing of chance (facts 3.5). For comparisons only.
        rate: how far weights move, 1 = all the way.
        margin: how much higher the blended score of a new code must be, times sqrt(L): a sub-vector
            is 1 / sqrt(L) long, and a margin should not depend on the number of digits.
        permutations, seed: random orders of the test.
        by: what is tested: the modality that matters to the user (`coherence`), or the topics, the
            first digits of the history (`topics`).

    Whoever was asked for is kept in `states`, N x (8 L_f + 4 M) bytes each for L_f personal digits;
    `states.pop(user)` lets one go, with the items that came since the start.
    """

    def __init__(
        self,
        model: PMAT,
        histories: Any,
        settled: int = 3,
        p_value: float = 0.01,
        growth: float = 1.5,
        threshold: float = 0.0,
        rate: float = 0.5,
        margin: float = 0.05,
        permutations: int = 200,
        seed: int = 0,
        by: str = "coherence",
    ) -> None:
        if not isinstance(model, PMAT):
            raise TypeError(f"a server needs a PMAT, not a {type(model).__name__}")
        if model.own.fusion != "early":
            raise ValueError("with late weights codes do not depend on users: nothing to keep")
        if by not in ("coherence", "topics"):
            raise ValueError(f"by is {by!r}; it must be coherence or topics")
        if not 0 <= rate <= 1 or growth < 1 or margin < 0 or permutations < 1 or settled < 0:
            raise ValueError(
                "rate is 0 to 1, growth and permutations are >= 1, margin and settled are >= 0"
            )
        if not threshold and 0 < p_value < 1 / (1 + permutations):
            raise ValueError(
                f"p_value={p_value} takes {math.ceil(1 / p_value) - 1} permutations or more: with "
                f"{permutations} no p-value is so small, and nothing would ever move"
            )
        self.model, self.by = model.eval(), by
        self.histories = histories
        self.settled = settled
        self.p_value, self.growth, self.threshold = p_value, growth, threshold
        self.rate, self.margin, self.permutations = rate, margin, permutations
        self.seed, self.generator = seed, torch.Generator()
        self.window = model.window
        self.rows = torch.arange(len(model.counts), device=model.counts.device)
        with torch.no_grad():
            self.fixed = model.fixed_vectors(self.rows)  # [N, d]
            self.tie_break = model.tie_break()
            self.topics = model.common_ids()[:, 0] if by == "topics" else None
            # what weights need to know of items, the same for every user [N, M, a]; items lie next
            # to each other in memory, as the product with a user's side reads them
            sides = model.attention.item_side(model.traits, model.present)
            self.sides = sides.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        self.states: dict[int, _State] = {}

    # ----------------------------------------------------------------- requests

    def item_ids(self, user: int) -> Tensor:
        """The user's codes of all items, [N, L]."""
        return torch.cat([self.model.shared_codes, self._of(user).items.codes], dim=1)

    @torch.no_grad()
    def recommend(self, user: int, k: int) -> Tensor:
        """Item numbers (1..N) the user has not had, best first, [k].

        Raises ValueError when there are fewer than k of them or k is below 0, TypeError when it is
        no whole number.
        """
        seen = self.rows.new_tensor(sorted(set(self._of(user).history)))
        if not 0 <= index(k) <= len(self.rows) - len(seen):
            raise ValueError(f"asked for {k} items of {len(self.rows) - len(seen)} not seen yet")
        scores = self.scores(user)
        scores[seen - 1] = float("-inf")
        return scores.topk(k).indices + 1

    @torch.no_grad()
    def scores(self, user: int) -> Tensor:
        """Scores of all items in the codes the user has, [N]."""
        model, known = self.model, self._of(user)
        codes, tau = known.items.codes, self.model.own.temperature
        state = queries(self._encode(user), tau)  # [1, d]
        # <h, E> for each digit and code, looked up for each item: no [N, d] sums for each user
        table = model.tokens.weight[model.own.shared_digits * model.own.codes :] @ state[0]
        tokens = token_rows(codes, model.own.codes)
        personal = table.index_select(0, tokens.flatten()).view(tokens.shape).sum(1)
        scores = self.fixed @ state[0] + personal
        if tau:
            if known.lengths is None:
                vectors = self.fixed + model._sum(codes, model.own.shared_digits)
                known.lengths = vectors.norm(dim=1).clamp(min=1e-12)
            scores = scores / known.lengths
        return scores + self.tie_break

    @torch.no_grad()
    def update(self, user: int, items: Sequence[int], force: bool = False) -> Drift:
        """Append items; on drift, or with `force`, move weights and codes. `cut` is in the history;
        the p-value is 1 where no test was due, as for users whose history is not `settled`.

        Raises ValueError for items outside the catalogue; nothing is changed then.
        """
        items = [index(item) for item in items]
        if not all(1 <= item <= len(self.rows) for item in items):
            raise ValueError(f"items are numbered 1 to {len(self.rows)}")
        state = self._of(user)
        if not items and not force:
            return NO_DRIFT
        if len(state.history) < self.settled:
            self.states[index(user)] = self._fresh(user, state.history + items)
            return NO_DRIFT
        state.history.extend(items)
        state.past = self._appended(state, self.rows.new_tensor(items) - 1)
        length = len(state.history)
        tests = length >= state.due
        # the same orders are drawn whoever was served before (a hash of numbers is always the same)
        self.generator.manual_seed(hash((self.seed, index(user), length)) & (2**63 - 1))
        drift = self._detect(state) if tests else NO_DRIFT
        by_divergence, by_chance = drift.divergence > self.threshold, drift.p_value <= self.p_value
        drifted = tests and (by_divergence if self.threshold else by_chance)
        if drifted:
            state.start = drift.cut
        if tests:
            state.due = state.start + math.ceil(self.growth * (length - state.start))
        if drifted or force:
            self._move(user, state)
        return drift

    # ----------------------------------------------------------------- state

    def _of(self, user: int) -> _State:
        user = index(user)  # TypeError for the user's id in place of the row
        if user < 0:
            raise ValueError(f"users are numbered from 0, not {user}")
        if user not in self.states:
            history: list[int] = []
            if 0 <= user < len(self.histories.offsets) - 1:
                begin, end = self.histories.offsets[user : user + 2]
                history = [int(item) for item in self.histories.items[begin:end]]
            self.states[user] = self._fresh(user, history)
        return self.states[user]

    def _fresh(self, user: int, history: list[int]) -> _State:
        """A user whose codes are all made now."""
        weights, past = self._weights(user, history)
        rows = self.rows.new_tensor(history[-self.window :]) - 1
        return _State(
            history,
            _Coded(self.rows, weights, self._codes(weights, self.rows)),
            _Coded(rows, past, self._codes(past, rows)),
        )

    def _appended(self, state: _State, new: Tensor) -> _Coded:
        """The past with new rows at its end, coded as the user sees items now."""
        past, items = state.past, state.items
        return _Coded(
            torch.cat([past.rows, new])[-self.window :],
            torch.cat([past.weights, items.weights[:, new]], dim=1)[:, -self.window :],
            torch.cat([past.codes, items.codes[new]])[-self.window :],
        )

    def _batch(self, user: int, history: list[int]) -> Batch:
        """What the model sees: the newest items, one of padding if there are none."""
        newest = self.rows.new_tensor([history[-self.window :] or [0]])
        users, lengths = newest.new_tensor([user]), (newest > 0).sum(1)
        return Batch(users, newest, lengths, torch.zeros_like(newest))

    @torch.no_grad()
    def _weights(self, user: int, history: list[int]) -> tuple[Tensor, Tensor]:
        """alpha-hat of all items after the history [M, N], and of each of its T newest items when
        it came [M, T]. Of the whole history, as the model learned them, not from the cut on; so
        rate 1 is a full recomputation."""
        model, batch = self.model, self._batch(user, history)
        past, contexts = batch.items[0, : int(batch.lengths)] - 1, model.contexts(batch)[0]
        view = View(contexts[len(past)][None], batch.users)
        if model.own.personalised == "random":
            then = model.grid[model.pair_points(view, past)].T
            return model.modality_weights(view, self.rows)[:, 0], then
        now = blend_weights_of(model.attention.user_side(view.context), self.sides)[:, 0]
        contexts = contexts[1 : len(past) + 1]
        return now, model.attention.pairs(contexts, model.traits[past], model.present[past])

    def _codes(self, weights: Tensor, rows: Tensor) -> Tensor:
        return self.model.atlas[nearest_grid_point(weights, self.model.grid), rows]

    def _detect(self, state: _State) -> Drift:
        start = max(state.start, len(state.history) - self.window)  # bounds the cost
        rows = self.rows.new_tensor(state.history[start:]) - 1
        if self.by == "topics":
            drift = topic_drift(
                self.topics[rows], self.model.n_codes, self.generator, self.permutations
            )
        else:
            known = self.model.traits[rows], self.model.present[rows]
            drift = detect_drift(*known, self.generator, self.permutations)
        return drift._replace(cut=start + drift.cut)

    def _move(self, user: int, state: _State) -> None:
        now, then = self._weights(user, state.history)
        state.items = self._followed(state.items, now)
        state.past = self._followed(state.past, then)
        state.lengths = None

    def _followed(self, coded: _Coded, wanted: Tensor) -> _Coded:
        """Weights part of the way to `wanted` [M, R], and the digits that this pays for."""
        weights = blend_weights(coded.weights, wanted, self.rate)
        best = self._codes(weights, coded.rows)
        if self.margin:  # else nothing to weigh up, and rounding must not keep a digit
            place, digit = torch.nonzero(best != coded.codes, as_tuple=True)  # [P] digits at stake
            pair = torch.stack([coded.codes[place, digit], best[place, digit]], dim=1)  # [P, 2]
            scores = self._digit_scores(weights[:, place], coded.rows[place], digit, pair)
            keep = torch.zeros_like(pair[:, :1])
            choice = digits_with_hysteresis(scores[:, None], keep, self.margin)  # 0 old, 1 new
            best[place, digit] = pair.gather(1, choice)[:, 0]
        return _Coded(coded.rows, weights, best)

    def _digit_scores(self, weights: Tensor, row: Tensor, digit: Tensor, codes: Tensor) -> Tensor:
        """Blended table scores of two codes [P, 2] of one digit of one item, both [P], under
        weights [M, P]: [P, 2]."""
        model = self.model  # the atlas knows the best code: two entries of a table are enough
        points = model.grid[nearest_grid_point(weights, model.grid)]  # [P, M]
        n_digits, _, n_modalities, width = model.quantiser.codebooks.shape
        parts = model.latents.view(-1, n_modalities, n_digits, width)[row, :, digit]  # [P, M, s]
        words = model.quantiser.codebooks[digit[:, None], codes]  # [P, 2, M, s]
        return n_digits**0.5 * torch.einsum("pm,pms,pcms->pc", points, parts, words)

    def _encode(self, user: int) -> Tensor:
        """State after the history, its items in the codes the user had for them: [1, d]."""
        model, state = self.model, self._of(user)
        batch = self._batch(user, state.history)
        vectors = self.fixed[state.past.rows]
        vectors = vectors + model._sum(state.past.codes, model.own.shared_digits)
        last = at_last(model.generate(vectors, batch), batch.lengths)
        if model.prefix is not None and state.history:  # of nothing there is no state to add to
            last = last + model.prefix(model.view(batch).context)
        return last
