"""Has a user's interest moved, and how do IDs follow: detection, blending, hysteresis.

A divergence between two halves of a history is positive even when nothing has changed, and how
large depends on length and user (facts 3.5: KL of topics .31 on average for 3 against 5 events), so
one threshold for all fires on many. Here every history is its own null: if nothing has changed its
order means nothing, and a random order looks the same. A pull between neighbouring items is order
too, so where there is one, alarms are more frequent than the level of the test. Letters: n items of
a history, R orders of it, M modalities, z width of a latent, L digits, K codes per digit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model_parts.fusion import coherence

# Two orders with the same halves add up to the same number only up to rounding.
_ROUNDING = 1e-5


class Drift(NamedTuple):
    """What a test for a change of interest found."""

    p_value: float  # share of random orders of the same history that look as changed as it does
    divergence: float  # KL(new || old): nats, times items where the cut was searched for
    cut: int  # first position of the new interest


NO_DRIFT = Drift(1.0, 0.0, 0)


# --------------------------------------------------------------------------- detection


@torch.no_grad()
def detect_drift(
    latents: Tensor,
    present: Tensor,
    generator: torch.Generator,
    permutations: int = 200,
    sharpness: float = 4.0,
    margin: int = 2,
) -> Drift:
    """Has the modality that matters to a user changed? One history, oldest first.

    latents [n, M, z] unit rows, present [n, M]. Interest in modalities is softmax(sharpness *
    coherence); the divergence is the largest over cuts t of KL(after t || before t) times k1 k2 /
    (k1 + k2), k known items on each side: without that factor, cuts near an end would always win.
    A history with no room for `margin` items on each side has not drifted.
    """
    n = len(latents)
    if n < 2 * margin:
        return NO_DRIFT
    orders = _orders(n, permutations, generator).to(latents.device)
    sums = (latents * present[..., None])[orders].cumsum(1)  # [R, n, M, z]
    counts = present[orders].cumsum(1)  # [R, n, M]
    cuts = slice(margin - 1, n - margin)  # position t - 1 holds the sums of the first t items
    before, after = sums[:, cuts], sums[:, -1:] - sums[:, cuts]
    known, left = counts[:, cuts], counts[:, -1:] - counts[:, cuts]
    old = torch.log_softmax(sharpness * coherence(before, known), dim=2)  # [R, cuts, M]
    new = torch.log_softmax(sharpness * coherence(after, left), dim=2)
    items = (known * left / (known + left).clamp(min=1)).mean(2)
    divergence, place = ((new.exp() * (new - old)).sum(2) * items).max(1)  # [R]
    return Drift(_p_value(divergence), float(divergence[0]), int(place[0]) + margin)


@torch.no_grad()
def topic_drift(
    topics: Tensor,
    n_topics: int,
    generator: torch.Generator,
    permutations: int = 200,
    recent: float = 1 / 3,
) -> Drift:
    """Have the topics changed? topics [n] int64 of one history (level-1 codes), oldest first.

    The divergence is KL(short || long) of topic frequencies, .5 added to every count: short are the
    last `recent` share of the items, long are those before them.
    """
    n = len(topics)
    cut = n - max(1, round(recent * n))
    if cut < 1:
        return NO_DRIFT
    ordered = topics[_orders(n, permutations, generator).to(topics.device)]  # [R, n]
    long, short = (_frequencies(part, n_topics) for part in (ordered[:, :cut], ordered[:, cut:]))
    divergence = (short * (short / long).log()).sum(1)
    return Drift(_p_value(divergence), float(divergence[0]), cut)


def _orders(n: int, permutations: int, generator: torch.Generator) -> Tensor:
    """The order as it is and random ones after it, [1 + permutations, n]."""
    shuffled = torch.rand(permutations, n, generator=generator).argsort(1)
    return torch.cat([torch.arange(n)[None], shuffled])


def _p_value(divergence: Tensor) -> float:
    """(1 + #{null >= observed}) / (1 + permutations), the observed one first in [R]."""
    observed = divergence[0]
    extreme = int((divergence >= observed - _ROUNDING * (1 + observed)).sum())
    return extreme / len(divergence)


def _frequencies(topics: Tensor, n_topics: int) -> Tensor:
    """[R, n] -> [R, n_topics], smoothed."""
    counts = torch.full((len(topics), n_topics), 0.5, device=topics.device)
    counts.scatter_add_(1, topics, torch.ones_like(topics, dtype=counts.dtype))
    return counts / counts.sum(1, keepdim=True)


# --------------------------------------------------------------------------- update


def blend_weights(old: Tensor, new: Tensor, rate: float) -> Tensor:
    """alpha <- (1 - rate) old + rate new, any shape; rate 1 gives `new` to the last bit."""
    return (1 - rate) * old + rate * new


def digits_with_hysteresis(scores: Tensor, old_codes: Tensor, margin: float) -> Tensor:
    """Best code of each digit, but the old one unless the best scores more than `margin` higher.

    scores [..., L, K], old_codes [..., L] int64 -> [..., L]. Margin 0 is a plain argmax in which
    ties keep the old code.
    """
    best = scores.max(-1)
    old = scores.gather(-1, old_codes[..., None])[..., 0]
    return torch.where(best.values > old + margin, best.indices, old_codes)
