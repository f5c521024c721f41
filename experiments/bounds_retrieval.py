"""Theorem 6 of theory_analysis.md as numbers: work, memory and exactness of ways to retrieve.

Letters: N items, L digits (L_s shared, L_f personal), K codes, M modalities, G blends, d width,
b beams, E edges, t steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.bounds import Array, Check


def work(
    n: int, digits: int, codes: int, width: int, blends: int = 1, modalities: int = 1,
    attention: int = 0, personal: int = 0, beams: int = 0, edges: int = 0, steps: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Operations of one request: multiply-adds, or look-ups with an addition where it says so."""
    table = digits * codes * width
    choice = n * modalities * (attention + blends)
    return {
        "dense": n * width,
        "table": table + n * digits,
        "atlas": table + choice + n * digits,
        "no atlas": table + n * modalities * (attention + personal * codes) + n * digits,
        "walk": table + steps * beams * edges * digits,
        "beam": table + digits * beams * codes,
    }


def memory(
    n: int, shared: int, personal: int, codes: int, width: int, blends: int, modalities: int,
    latent: int, code_bytes: int = 8,
) -> dict[str, int]:  # fmt: skip
    """Bytes of each part; floats have 4. The model keeps codes in 8 bytes, 1 is enough to 256."""
    return {
        "dense": 4 * n * width,
        "codes": code_bytes * n * shared,
        "atlas": code_bytes * blends * n * personal,
        "words": 4 * (shared + personal) * codes * width,
        "latents": 4 * n * modalities * latent,
    }


def table_scores(by_digits: Array, scores: Array) -> Check:
    """Sums of table entries [B, N] are the scores of the model [B, N]: distance 0.

    As a share of the range of each request's scores, which is what one knows without the equality.
    """
    off = np.abs(by_digits - scores) / np.ptp(scores, axis=1, keepdims=True).clip(1e-12)
    return Check("scores off the table's", np.zeros_like(off), off, 1.0, exact=True)


def colliding_pairs(codes: Array, n_codes: int) -> Check:
    """Pairs of items with equal first p digits, p = 1..L: at least (N^2 / K^p - N) / 2."""
    n, digits = codes.shape
    measured, bound = [], []
    for p in range(1, digits + 1):
        sizes = np.unique(codes[:, :p], axis=0, return_counts=True)[1].astype(float)
        measured.append((sizes * (sizes - 1)).sum() / 2)
        bound.append(max(0.0, (n * n * float(n_codes) ** -p - n) / 2))
    return Check("pairs that share a prefix", np.array(bound), np.array(measured), 0.0, lower=True)


class Found(NamedTuple):
    """What a beam search found; no item behind a dropped prefix scores above `ceiling`."""

    item: int
    score: float
    ceiling: float
    expanded: int  # codes looked at


def beam_search(table: Array, codes: Array, beams: int) -> Found:
    """The best item by beam search on the trie of codes [N, L]; table [L, K] of digit scores.

    A prefix that is dropped can reach at most its score plus the best of every digit to come.
    """
    digits, n_codes = table.shape
    rest = np.append(np.cumsum(table.max(1)[::-1])[::-1], 0.0)  # best from digit l on
    prefixes = [(0.0, np.arange(len(codes)))]
    ceiling, expanded = -np.inf, 0
    for digit in range(digits):
        children = []
        for score, rows in prefixes:
            found = codes[rows, digit]
            expanded += n_codes
            children += [(score + table[digit, c], rows[found == c]) for c in np.unique(found)]
        children.sort(key=lambda child: -child[0])
        for score, _ in children[beams:]:
            ceiling = max(ceiling, score + rest[digit + 1])
        prefixes = children[:beams]
    score, rows = prefixes[0]
    return Found(int(rows[0]), float(score), float(ceiling), expanded)


def beam_loss(tables: Array, codes: Array, beams: int) -> tuple[Check, Check]:
    """Score lost by the beam against its certificate, and codes looked at against b K L.

    tables [P, L, K], codes [N, L]; the trivial bounds are the range of scores and N L.
    """
    n, digits = codes.shape
    rows = []
    for table in tables:
        exact = table[np.arange(digits), codes].sum(1)
        found = beam_search(table, codes, beams)
        lost = exact.max() - found.score
        certificate = max(0.0, found.ceiling - found.score)
        rows.append((lost, certificate, np.ptp(exact), found.expanded))
    lost, certificate, spread, expanded = np.array(rows).T
    most = np.full(len(rows), float(beams * tables.shape[2] * digits))
    return (
        Check("score lost by the beam", certificate, lost, spread),
        Check(
            "codes a beam looks at (arithmetic)",
            most,
            expanded,
            float(n * tables.shape[2] * digits),
        ),
    )


def walk_work(
    table: Array, codes: Array, graph: Array, beams: int, steps: int, start: Array
) -> Check:
    """Items scored by a walk on a graph [N, E]: at most b E a step, whatever N, by construction."""
    digits = np.arange(codes.shape[1])
    beam, scored = start[:beams], []
    for _ in range(steps):
        met = np.unique(graph[beam])
        scored.append(len(met))
        scores = table[digits, codes[met]].sum(1)
        beam = met[np.argsort(-scores)[:beams]]
    bound = np.full(steps, float(beams * graph.shape[1]))
    name = "items a walk scores in a step (arithmetic)"
    return Check(name, bound, np.array(scored, float), float(len(codes)))
