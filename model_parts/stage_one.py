"""What stages one share: a short training loop that says where it is, and random numbers that
follow from a generator."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from logging import getLogger

import torch
from torch import Tensor, nn

logger = getLogger("pmat")


@contextlib.contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Weight initialisation and dropout in this block depend on `generator` alone."""
    seed = int(torch.randint(2**62, (), generator=generator))
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def counted(steps: int) -> Iterator[int]:
    """0 .. steps - 1; once a minute the log says where it is, as stages one can take several."""
    said = time.monotonic()
    for step in range(steps):
        if time.monotonic() - said > 60:
            said = time.monotonic()
            logger.info("stage one: step %d of %d", step, steps)
        yield step


def minimise(
    network: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> None:
    """AdamW with a cosine schedule on `loss(step)`; leaves the network in evaluation mode.

    Raises ValueError when the loss stops being finite.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    network.train()
    for step in counted(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        if not bool(norm.isfinite()):
            raise ValueError(f"the loss of stage one was not finite at step {step + 1}")
        optimiser.step()
    network.eval()
