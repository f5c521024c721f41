"""Serving: what PMAT knows of each user between requests, and how it follows them.

A user's IDs stay as they are until a test says that the interest has moved (model_parts/drift.py).
Then weights move part of the way and digits change where that pays; shared digits never do. The
generator always sees the history as it is now, in the codes the user has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_parts.backbone import at_last
from model_parts.base import Batch
from model_parts.decoding import token_rows
from model_parts.drift import Drift, blend_weights, detect_drift, digits_with_hysteresis
from model_parts.fusion import nearest_grid_point
from our_models.pmat import PMAT


@dataclass
class _State:
    """One user."""

    history: list[int]  # item numbers, oldest first
    weights: Tensor  # alpha [M, N], not resolved to the grid, so that small steps add up
    codes: Tensor  # [N, L_f] int64, personal digits
    start: int = 0  # first position after the last accepted drift


class Server:
    """IDs and recommendations of one user at a time, kept up to date as items come in.

    Args:
        model: a trained PMAT with early fusion; it is put into evaluation mode.
        histories: has `.items` [R] (1..N) and `.offsets` [U + 1]; other users start with nothing.
        p_value: weights move when the test says at most this. Every update tests anew, so chances
            of a false alarm add up.
        threshold: if above 0, weights move when the divergence exceeds it, whatever the p-value:
            one bound for all, which knows nothing of chance (facts 3.5). For comparisons only.
        rate: how far weights move, 1 = all the way.
        margin: how much higher the blended score of a new code must be, times sqrt(L): a sub-vector
            is 1 / sqrt(L) long, and a margin should not depend on the number of digits.
        permutations, seed: random orders of the test.
    """

    def __init__(
        self,
        model: PMAT,
        histories: Any,
        p_value: float = 0.01,
        threshold: float = 0.0,
        rate: float = 0.5,
        margin: float = 0.05,
        permutations: int = 200,
        seed: int = 0,
    ) -> None:
        if model.own.fusion != "early":
            raise ValueError("with late weights codes do not depend on users: nothing to keep")
        self.model = model.eval()
        self.histories = histories
        self.p_value, self.threshold = p_value, threshold
        self.rate, self.margin, self.permutations = rate, margin, permutations
        self.generator = torch.Generator().manual_seed(seed)
        self.window = model.positions.table.num_embeddings
        self.rows = torch.arange(len(model.counts), device=model.counts.device)
        with torch.no_grad():
            self.fixed = model.fixed_vectors(self.rows)  # [N, d]
        self.states: dict[int, _State] = {}

    # ----------------------------------------------------------------- requests

    def item_ids(self, user: int) -> Tensor:
        """The user's codes of all items, [N, L]."""
        return torch.cat([self.model.shared_codes, self._of(user).codes], dim=1)

    @torch.no_grad()
    def recommend(self, user: int, k: int) -> Tensor:
        """Item numbers (1..N) the user has not had, best first, [k].

        Raises ValueError when there are fewer than k of them.
        """
        seen = self.rows.new_tensor(sorted(set(self._of(user).history)))
        if k > len(self.rows) - len(seen):
            raise ValueError(f"asked for {k} items of {len(self.rows) - len(seen)} not seen yet")
        scores = self.scores(user)
        scores[seen - 1] = float("-inf")
        return scores.topk(k).indices + 1

    @torch.no_grad()
    def scores(self, user: int) -> Tensor:
        """Scores of all items in the codes the user has, [N]."""
        model, codes = self.model, self._of(user).codes
        state = self._encode(user)  # [1, d]
        # <h, E> for each digit and code, looked up for each item: no [N, d] sums for each user
        table = model.tokens.weight[model.own.shared_digits * model.own.codes :] @ state[0]
        tokens = token_rows(codes, model.own.codes)
        personal = table.index_select(0, tokens.flatten()).view(tokens.shape).sum(1)
        return self.fixed @ state[0] + personal

    @torch.no_grad()
    def update(self, user: int, items: Sequence[int], force: bool = False) -> Drift:
        """Append items; on drift, or with `force`, move weights and codes. `cut` is in the history.

        Raises ValueError for items outside the catalogue; nothing is changed then.
        """
        items = [int(item) for item in items]
        if not all(1 <= item <= len(self.rows) for item in items):
            raise ValueError(f"items are numbered 1 to {len(self.rows)}")
        state = self._of(user)
        state.history.extend(items)
        drift = self._detect(state)
        by_divergence, by_chance = drift.divergence > self.threshold, drift.p_value <= self.p_value
        drifted = by_divergence if self.threshold else by_chance
        if drifted:
            state.start = drift.cut
        if drifted or force:
            self._move(user, state)
        return drift

    # ----------------------------------------------------------------- state

    def _of(self, user: int) -> _State:
        if user not in self.states:
            history: list[int] = []
            if 0 <= user < len(self.histories.offsets) - 1:
                begin, end = self.histories.offsets[user : user + 2]
                history = [int(item) for item in self.histories.items[begin:end]]
            weights = self._weights(user, history)
            self.states[user] = _State(history, weights, self._codes(weights))
        return self.states[user]

    def _batch(self, user: int, history: list[int]) -> Batch:
        """What the model sees: the newest items, one of padding if there are none."""
        newest = self.rows.new_tensor([history[-self.window :] or [0]])
        users, lengths = newest.new_tensor([user]), (newest > 0).sum(1)
        return Batch(users, newest, lengths, torch.zeros_like(newest))

    @torch.no_grad()
    def _weights(self, user: int, history: list[int]) -> Tensor:
        """alpha-hat, [M, N]: of the whole history, as the model learned them, not from the cut on;
        so rate 1 is a full recomputation."""
        view = self.model.view(self._batch(user, history))
        if self.model.own.personalised == "random":
            return self.model.modality_weights(view, self.rows)[:, 0]
        # as modality_weights, without a copy of all latents
        return self.model.attention(view.context, self.model.latents, self.model.present)[:, 0]

    def _codes(self, weights: Tensor) -> Tensor:
        return self.model.atlas[nearest_grid_point(weights, self.model.grid), self.rows]

    def _detect(self, state: _State) -> Drift:
        start = max(state.start, len(state.history) - self.window)  # bounds the cost
        rows = self.rows.new_tensor(state.history[start:]) - 1
        known = self.model.latents[rows], self.model.present[rows]
        drift = detect_drift(*known, self.generator, self.permutations)
        return drift._replace(cut=start + drift.cut)

    def _move(self, user: int, state: _State) -> None:
        wanted = self._weights(user, state.history)
        state.weights = blend_weights(state.weights, wanted, self.rate)
        best = self._codes(state.weights)
        if self.margin:  # else nothing to weigh up, and rounding must not keep a digit
            row, digit = torch.nonzero(best != state.codes, as_tuple=True)  # [P] digits at stake
            pair = torch.stack([state.codes[row, digit], best[row, digit]], dim=1)  # [P, 2]
            scores = self._digit_scores(state.weights, row, digit, pair)
            keep = torch.zeros_like(pair[:, :1])
            choice = digits_with_hysteresis(scores[:, None], keep, self.margin)  # 0 old, 1 new
            best[row, digit] = pair.gather(1, choice)[:, 0]
        state.codes = best

    def _digit_scores(self, weights: Tensor, row: Tensor, digit: Tensor, codes: Tensor) -> Tensor:
        """Blended table scores of two codes [P, 2] of one digit of one item, both [P] -> [P, 2]."""
        model = self.model  # the atlas knows the best code: two entries of a table are enough
        points = model.grid[nearest_grid_point(weights[:, row], model.grid)]  # [P, M]
        n_digits, _, n_modalities, width = model.quantiser.codebooks.shape
        parts = model.latents.view(-1, n_modalities, n_digits, width)[row, :, digit]  # [P, M, s]
        words = model.quantiser.codebooks[digit[:, None], codes]  # [P, 2, M, s]
        return n_digits**0.5 * torch.einsum("pm,pms,pcms->pc", points, parts, words)

    def _encode(self, user: int) -> Tensor:
        """State after the history, its items in the codes the user has: [1, d], as PMAT.encode."""
        model, state = self.model, self._of(user)
        batch = self._batch(user, state.history)
        rows = batch.items[0, : int(batch.lengths)] - 1
        personal = model._sum(state.codes[rows], model.own.shared_digits)
        x = batch.items.new_zeros(1, batch.items.shape[1], model.own.width, dtype=self.fixed.dtype)
        x[0, : len(rows)] = self.fixed[rows] + personal
        x = model.norm(x + model.positions(batch.lengths, x.shape[1]))
        for block in model.blocks:
            x = block(x, (batch.items > 0)[:, :, None].to(x.dtype))
        last = at_last(x, batch.lengths)
        if model.prefix is not None:
            last = last + model.prefix(model.view(batch).context)
        return last
