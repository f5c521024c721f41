"""Digits to items: the loss on digits, exact scores of a catalogue, and a walk on a graph of items.

Parallel decoding (RPG, arXiv 2506.05781): one state predicts all m digits at once, so an item's
score is the mean over digits of log p_j(c_j) and needs a table look-up, no beam search over tokens.
Letters: B users, P positions, N items, m digits, K codes per digit, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at once by the loss: 4 MB on a CPU stay in cache; a GPU wants larger products.
_CHUNK_NUMBERS = {"cpu": 1_000_000, "cuda": 64_000_000}
# Rows of the item graph built at once.
_GRAPH_ROWS = 512


# --------------------------------------------------------------------------- digit heads


def digit_heads(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Unit vectors of g_j(s) = s + SiLU(W_j s + b_j), one for each digit.

    states [P, d], weight [m * d, d] and bias [m * d] of all heads in one -> [P, m, d].
    """
    return _head_parts(states, weight, bias)[0]


def _head_parts(states: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # unit heads [P, m, d], their norms before [P, m, 1], what goes into SiLU [P, m * d]
    inner = F.linear(states, weight, bias).float()
    heads = F.silu(inner).view(len(states), -1, states.shape[1]) + states[:, None]
    norms = torch.linalg.vector_norm(heads, dim=2, keepdim=True).clamp(min=1e-12)
    return heads / norms, norms, inner


class _FusedDigitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, codes: Tensor
    ) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        loss, gradients = _chunked_loss(states, weight, bias, tokens, codes, with_gradient)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * upstream for gradient in ctx.saved_tensors), None


def digit_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, codes: Tensor
) -> Tensor:
    """Mean over positions and digits of -log softmax(<g_j, tokens_j>)[code_j], g of `digit_heads`.

    states [P, d], weight [m * d, d], bias [m * d], codes [P, m], tokens [m, K, d]: unit vectors
    over the temperature. The plain form reads and writes [P, m, d] and [P, m, K] a dozen times;
    here each chunk of positions goes forward and backward at once while it is in cache, and only
    gradients of the four inputs survive.
    """
    return _FusedDigitCrossEntropy.apply(states, weight, bias, tokens, codes)


def _chunked_loss(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    tokens: Tensor,
    codes: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = (states, weight, bias, tokens)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in inputs] if with_gradient else []
    table = tokens.float()
    n_digits, n_codes, _ = table.shape
    rows = max(16, _CHUNK_NUMBERS.get(states.device.type, 64_000_000) // (n_digits * n_codes))
    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        chunk, wanted = states[part].float(), codes[part].T[:, :, None]  # [p, d], [m, p, 1]
        heads, norms, inner = _head_parts(chunk, weight, bias)
        by_digit = heads.transpose(0, 1)  # [m, p, d]
        logits = torch.bmm(by_digit, table.transpose(1, 2)).float()  # [m, p, K]
        log_probabilities = torch.log_softmax(logits, dim=2)
        total -= log_probabilities.gather(2, wanted).sum()
        if not with_gradient:
            continue
        slope = log_probabilities.exp_()  # softmax - one-hot, the gradient of the logits
        slope.scatter_add_(2, wanted, slope.new_full(wanted.shape, -1.0))
        sums[3].baddbmm_(slope.transpose(1, 2), by_digit)
        pull = torch.bmm(slope, table).float().transpose(0, 1)  # [p, m, d], for the unit heads
        # through u = g / |g|: drop what points along u
        pull = (pull - heads * (heads * pull).sum(2, keepdim=True)) / norms
        inner_pull = torch.ops.aten.silu_backward(pull.reshape(len(chunk), -1), inner)
        sums[0][part] = pull.sum(1) + inner_pull @ weight
        sums[1].addmm_(inner_pull.T, chunk)
        sums[2] += inner_pull.sum(0)
    scale = 1.0 / max(codes.numel(), 1)
    # without gradients there are no sums, hence no strict pairing
    pairs = zip(sums, inputs, strict=False)
    return total * scale, tuple(found.mul_(scale).to(given.dtype) for found, given in pairs)


# --------------------------------------------------------------------------- exact scores


def score_all_items(table: Tensor, codes: Tensor) -> Tensor:
    """Mean over digits of table[b, j, codes[i, j]]: table [B, m, K], codes [N, m] -> [B, N].

    The users are laid out last, so that one look-up adds a whole row of B numbers.
    """
    n_users, n_digits, n_codes = table.shape
    rows = table.reshape(n_users, n_digits * n_codes).T.contiguous()  # [m * K, B]
    return F.embedding_bag(token_rows(codes, n_codes), rows, mode="sum").T / n_digits


def token_rows(codes: Tensor, n_codes: int) -> Tensor:
    """Rows of a flat [m * K, ...] table: code c of digit j is row c + K j. [N, m] -> [N, m]."""
    return codes + n_codes * torch.arange(codes.shape[1], device=codes.device)


# --------------------------------------------------------------------------- graph walk


class Pool(NamedTuple):
    """Candidates of a graph walk. A candidate met twice has score -inf the second time."""

    items: Tensor  # [B, C] int64, 0..N-1
    scores: Tensor  # [B, C]


def similarity_graph(codes: Tensor, digit_tables: Tensor, n_edges: int) -> Tensor:
    """The `n_edges` most similar items of every item, itself first: [N, min(n_edges, N)] int64.

    codes [N, m]; digit_tables [m, K, K] similarity of any two codes of a digit. Similarity of two
    items is the mean over digits (facts 1.6), i.e. the score of one item in the table of the other.
    """
    n_items, n_digits = codes.shape
    digits = torch.arange(n_digits, device=codes.device)
    neighbours = []
    for rows in torch.arange(n_items, device=codes.device).split(_GRAPH_ROWS):
        similarity = score_all_items(digit_tables[digits, codes[rows]], codes)  # [rows, N]
        # an item with the very same codes must not take the place of the item itself
        similarity.scatter_(1, rows[:, None], float("inf"))
        neighbours.append(similarity.topk(min(n_edges, n_items), dim=1).indices)
    return torch.cat(neighbours)


def graph_walk(
    table: Tensor,
    codes: Tensor,
    graph: Tensor,
    beams: int,
    steps: int,
    generator: torch.Generator,
) -> Pool:
    """Climb the graph from random items: `steps` times replace the beam by its best neighbours.

    table [B, m, K], codes [N, m], graph [N, E] -> the candidates of the last step, C = beams * E;
    the best of them are the result. Every user starts from the same random items, so that a user's
    list does not depend on the batch it is in. The cost does not depend on N.
    """
    n_users, n_items = len(table), len(codes)
    by_digit = codes.T.contiguous()
    beam = torch.randint(n_items, (beams,), generator=generator).to(codes.device)
    beam = beam.expand(n_users, beams)
    for _ in range(steps):
        # sorted, so that repeats are neighbours
        items = graph[beam].flatten(1).sort(dim=1).values  # [B, C]
        scores = _score_some_items(table, by_digit, items)
        scores[:, 1:].masked_fill_(items[:, 1:] == items[:, :-1], float("-inf"))
        best = scores.topk(min(beams, items.shape[1]), dim=1).indices
        beam = items.gather(1, best)
    return Pool(items, scores)


def _score_some_items(table: Tensor, by_digit: Tensor, items: Tensor) -> Tensor:
    """table [B, m, K], by_digit [m, N], items [B, C] -> [B, C], digit by digit to bound memory."""
    total = table.new_zeros(items.shape)
    for digit, codes in enumerate(by_digit):
        total += table[:, digit].gather(1, codes[items])
    return total / len(by_digit)
