"""Beam search on tensors against the same search with a Python callback for each beam.

    python benchmarks/beam_search.py [--users 128] [--beams 50] [--items 12101]

The callback is how prefix-constrained search is usually plugged into a language model: for every
beam a function looks up which codes may follow its prefix, and a mask is filled row by row. Both
searches get the same log-probabilities and must find the same IDs. Times are printed for the
search alone (digits' log-probabilities from a table), as one ratio, and for the whole decoding with
the network of TIGER's preset.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baseline_models.tiger import TIGER
from benchmarks.command import Parser, command
from config import build_config
from model_parts.base import Batch
from model_parts.beam import Beams, Decoder, beam_search
from model_parts.generative import Writer
from model_parts.residual import with_collision_digit
from model_parts.trie import Trie
from util import UserError

DIGITS, CODES = 4, 256


class Table:
    """A decoder without a network: the next digit's log-probabilities depend on the last code."""

    def __init__(self, users: int) -> None:
        self.first = torch.log_softmax(torch.randn(users, 1, CODES), dim=2)
        self.next = torch.log_softmax(torch.randn(CODES, CODES), dim=1)

    def start(self) -> Tensor:
        """See beam.Decoder."""
        return self.first

    def advance(self, parents: Tensor, codes: Tensor) -> Tensor:
        """See beam.Decoder."""
        return torch.embedding(self.next, codes)


def allowed_codes(codes: Tensor) -> dict[tuple[int, ...], list[int]]:
    """Prefix -> codes that may follow."""
    found: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for own in codes.tolist():
        for digit, code in enumerate(own):
            found[tuple(own[:digit])].add(code)
    return {prefix: sorted(following) for prefix, following in found.items()}


def callback_search(
    decoder: Decoder, allowed: Callable[[tuple[int, ...]], list[int]], width: int
) -> tuple[Tensor, Tensor]:
    """IDs [B, W, L] and scores [B, W] of the search that asks `allowed` for every beam."""
    table = decoder.start()
    scores = table.new_zeros(table.shape[:2])
    ids = torch.zeros(*table.shape[:2], 0, dtype=torch.int64)
    for digit in range(DIGITS):
        mask = torch.full_like(table, float("-inf"))
        for user, beams in enumerate(ids.tolist()):
            for beam, prefix in enumerate(beams):
                mask[user, beam, allowed(tuple(prefix))] = 0
        totals = (scores[:, :, None] + table + mask).flatten(1)
        scores, chosen = totals.topk(min(width, totals.shape[1]), dim=1)
        parents, codes = chosen // CODES, chosen % CODES
        kept = ids.gather(1, parents[:, :, None].expand(-1, -1, digit))
        ids = torch.cat([kept, codes[:, :, None]], dim=2)
        if digit < DIGITS - 1:
            table = decoder.advance(parents, codes)
    return ids, scores


def seconds(*works: Callable[[], object], repeats: int = 3) -> list[float]:
    """The fastest of some runs of each; they take turns, so that a busy machine hits all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, own in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def same(beams: Beams, codes: Tensor, ids: Tensor, scores: Tensor) -> bool:
    """Whether both searches found the same IDs (in any order of ties) with the same scores."""
    if not torch.allclose(beams.scores, scores, atol=1e-4):
        return False
    leaves = torch.unique(codes, dim=0)
    first = [set(map(tuple, leaves[row].tolist())) for row in beams.leaves]
    return all(
        len(one & set(map(tuple, row))) >= len(one) - 1
        for one, row in zip(first, ids.tolist(), strict=True)
    )


def compare(label: str, make: Callable[[], Decoder], codes: Tensor, trie: Trie, width: int) -> None:
    """Check that both searches agree, then print their times and the ratio."""
    look_up = allowed_codes(codes).__getitem__
    assert same(beam_search(make(), trie, width), codes, *callback_search(make(), look_up, width))
    slow, fast = seconds(
        lambda: callback_search(make(), look_up, width), lambda: beam_search(make(), trie, width)
    )
    print(
        f"{label:<18}tensors {1e3 * fast:8.1f} ms   callback {1e3 * slow:8.1f} ms   "
        f"ratio {slow / fast:.1f}"
    )


@command
@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Time both searches, without and with a network."""
    parser = Parser(__doc__)
    parser.add_number("--users", 128, "users in the batch")
    parser.add_number("--beams", 50, "beams of each user")
    parser.add_number("--items", 12_101, "items, of random IDs")
    asked = parser.parse_args(arguments)
    users, n_items = asked.users, asked.items
    torch.manual_seed(0)
    # three digits as uneven as real ones, and one that tells equal items apart
    levels = (CODES * torch.rand(n_items, DIGITS - 1).square()).long()
    codes = with_collision_digit(levels, CODES)
    trie = Trie(codes, torch.arange(n_items), n_items)
    starts = trie.levels[0].n_children
    if asked.beams > starts:  # the callback would be asked for prefixes that no item has
        raise UserError(
            f"--beams {asked.beams}: the IDs of {n_items:,} items start with {starts} different "
            "codes; take no more beams than that, or more --items."
        )
    table = Table(users)
    compare("search alone", lambda: table, codes, trie, asked.beams)

    config = build_config({"run.model": "tiger", "data.dataset": "any"})
    config.mock.n_items = n_items
    model = TIGER(config)
    items = torch.randint(1, n_items + 1, (users, 7))
    batch = Batch(torch.arange(users), items, torch.full((users,), 7), items)
    memory, start = model.eval().read(batch)
    compare("with the network", lambda: Writer(model, memory, start), codes, trie, asked.beams)


if __name__ == "__main__":
    sys.exit(main())
