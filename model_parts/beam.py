"""Beam search over semantic IDs that exist, for all users and beams at once.

    beams = beam_search(decoder, trie, width)        width: a number, or one for each user [B]
    trie.item_scores(beams.leaves, beams.scores)     [B, N]

A decoder has two methods: `start()` returns log-probabilities of the first digit [B, 1, K], and
`advance(parents [B, W], codes [B, W])` those of the next one [B, W, K] after beam w went on from
beam `parents[:, w]` with `codes[:, w]`. With as many beams as IDs the search is exact.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model_parts.trie import Trie


class Decoder(Protocol):
    """What predicts one digit after the other."""

    def start(self) -> Tensor:
        """Log-probabilities of the first digit, [B, 1, K]."""

    def advance(self, parents: Tensor, codes: Tensor) -> Tensor:
        """Keep beams `parents` [B, W], append `codes` [B, W]: the next digit's, [B, W, K]."""


class Beams(NamedTuple):
    """The best IDs found, best first. Where fewer exist than asked for, scores end with -inf."""

    leaves: Tensor  # [B, W] int64, leaves of the trie
    scores: Tensor  # [B, W], log-probability of the whole ID


def beam_search(decoder: Decoder, trie: Trie, width: int | Tensor, existing: bool = False) -> Beams:
    """The `width` best IDs by the sum of their digits' log-probabilities; with `existing`, of
    those given that the ID exists so far. Users with a smaller width than others of their batch
    find what they would find alone."""
    widest = width if isinstance(width, int) else int(width.max())
    table = decoder.start()
    nodes = torch.zeros_like(table[:, :, 0], dtype=torch.int64)
    scores = table.new_zeros(table.shape[:2])
    last = len(trie.levels) - 1
    for level in range(last + 1):
        options = trie.children(level, nodes)  # [B, W, C]
        totals = table.gather(2, options.codes).masked_fill_(~options.exist, float("-inf"))
        totals = totals.log_softmax(2) if existing else totals
        totals = totals.add_(scores[:, :, None]).flatten(1)
        # never more beams than prefixes of this length exist
        kept = min(widest, totals.shape[1], trie.levels[level].n_children)
        scores, chosen = totals.topk(kept, dim=1)
        if not isinstance(width, int):
            surplus = torch.arange(kept, device=scores.device) >= width[:, None]
            scores = scores.masked_fill(surplus, float("-inf"))
        parents, rank = chosen // options.codes.shape[2], chosen % options.codes.shape[2]
        nodes = options.first.gather(1, parents) + rank
        # a beam that led nowhere has score -inf and must still point at something
        nodes = nodes.clamp(max=trie.levels[level].n_children - 1)
        if level < last:
            codes = options.codes.flatten(1).gather(1, chosen)
            if existing and level == last - 1:
                table = _last_digit(decoder, parents, codes, trie.levels[last].counts[nodes] > 1)
            else:
                table = decoder.advance(parents, codes)
    return Beams(nodes, scores)


def _last_digit(decoder: Decoder, parents: Tensor, codes: Tensor, open_ends: Tensor) -> Tensor:
    """`advance` where a beam has a choice left, `open_ends` [B, W]; 0 elsewhere, since of one
    digit that exists the probability is 1. Only the last digit may leave beams out."""
    most = max(int(open_ends.sum(1).max()), 1)
    columns = open_ends.int().argsort(dim=1, descending=True)[:, :most]
    found = decoder.advance(parents.gather(1, columns), codes.gather(1, columns))
    table = found.new_zeros(*parents.shape, found.shape[2])
    return table.scatter_(1, columns[:, :, None].expand_as(found), found)
