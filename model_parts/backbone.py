"""Sequence encoders on right-padded histories.

Histories are left-aligned, so causal attention alone keeps padding out: a padded position can only
be seen by later ones, which are padding too. No padding mask is ever built.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.dropout import Dropout, attend


class SelfAttention(nn.Module):
    """Multi-head causal self-attention, [B, T, d] -> [B, T, d]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each position attends to itself and those before it."""
        B, T, d = x.shape
        q, k, v = self.project_in(x).view(B, T, 3, self.heads, d // self.heads).unbind(2)
        mixed = attend(
            q.transpose(1, 2),  # [B, heads, T, d/heads]
            k.transpose(1, 2),
            v.transpose(1, 2),
            causal=True,
            rate=self.dropout if self.training else 0.0,
        )
        return self.project_out(mixed.transpose(1, 2).reshape(B, T, d))


class FeedForward(nn.Module):
    """Two linear layers around GELU (`approximate="tanh"` is GPT-2's)."""

    def __init__(self, width: int, inner: int, approximate: str = "none") -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.contract(F.gelu(self.expand(x), approximate=self.approximate))


class PostNormBlock(nn.Module):
    """BERT-style block (SASRec as S3-Rec and RecBole write it): LayerNorm after each sum."""

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.feed_forward = FeedForward(width, inner)
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """[B, T, d] -> [B, T, d]; `present` is there for blocks that must see the padding."""
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class PreNormBlock(nn.Module):
    """GPT-2 block: LayerNorm before each branch."""

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.attention = SelfAttention(width, heads, attention_dropout)
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-12)
        self.feed_forward = FeedForward(width, inner, approximate="tanh")
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class FrequencyFilter(nn.Module):
    """Low frequencies as they are, high ones rescaled per dimension by beta^2 (BSARec, eq. 8).

    `causal` keeps the part of the kernel that looks back: what the last position of a history gets
    anyway.
    """

    def __init__(self, window: int, cutoff: int, width: int, causal: bool = False) -> None:
        super().__init__()
        lag = torch.arange(window)[:, None] - torch.arange(window)[None]
        low = low_pass_kernel(window, cutoff)[lag % window]
        self.register_buffer("low", low * (lag >= 0) if causal else low, persistent=False)
        self.beta = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d], zero at padding -> [B, T, d]; only relative distance matters."""
        T = x.shape[1]
        low = self.low[:T, :T] @ x
        return low + self.beta.square() * (x - low)


class FrequencyBlock(nn.Module):
    """BSARec block (AAAI 2024): filter and attention side by side, then the feed-forward layer.

    The paper's filter is not causal: train on prefixes with a loss at their last position only.
    With `causal` every position may have a loss.
    """

    def __init__(
        self,
        window: int,
        cutoff: int,
        alpha: float,
        width: int,
        heads: int,
        dropout: float,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.filter = FrequencyFilter(window, cutoff, width, causal)
        self.filter_norm = nn.LayerNorm(width, eps=1e-12)
        self.attention = SelfAttention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.feed_forward = FeedForward(width, 4 * width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """x [B, T, d]; present [B, T, 1] is 0 at padding, which the filter must not see."""
        filtered = self.filter_norm(x + self.dropout(self.filter(x * present)))
        attended = self.attention_norm(x + self.dropout(self.attention(x)))
        x = self.alpha * filtered + (1 - self.alpha) * attended
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Positions(nn.Module):
    """Learned positions counted from either end of the window.

    `from_end=True` gives the newest item of every history the last row, as left-padded models do;
    otherwise the oldest item has row 0, as in GPT-2.
    """

    def __init__(self, max_history: int, width: int, from_end: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(max_history, width)
        self.from_end = from_end

    def forward(self, lengths: Tensor, n_positions: int) -> Tensor:
        """lengths [B] -> [B, T, d] (or [1, T, d] where the length does not matter).

        Raises ValueError for a history longer than the window.
        """
        check_window(n_positions, self.table.num_embeddings, "items")
        index = torch.arange(n_positions, device=lengths.device)[None]
        if self.from_end:
            index = (index + self.table.num_embeddings - lengths[:, None]).clamp(
                0, self.table.num_embeddings - 1
            )
        return self.table(index)


def check_window(given: int, window: int, what: str) -> None:
    """Raises ValueError for more positions than a model was built for."""
    if given > window:
        raise ValueError(
            f"a history of {given} {what} for a model that reads {window} (data.max_history): give "
            "it the newest ones only"
        )


def init_weights(module: nn.Module, std: float = 0.02, mean: float = 0.0) -> None:
    """Normal(mean, std) for linear and embedding weights, zero biases, as in BERT and GPT-2."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, mean, std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


def at_last(states: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, d] -> [B, d], the state after each whole history; zeros for an empty one."""
    rows = torch.arange(len(states), device=states.device)
    last = states[rows, (lengths - 1).clamp(min=0)]
    return last * (lengths > 0).to(last.dtype)[:, None]


def low_pass_kernel(window: int, cutoff: int) -> Tensor:
    """[window] circular kernel that keeps the lowest `cutoff // 2 + 1` frequencies of a real DFT.

    Multiplying by its circulant matrix equals rfft -> zero the rest -> irfft (BSARec eq. 8).
    """
    kept = min(cutoff, window) // 2 + 1  # a window has no frequency beyond Nyquist
    lag = torch.arange(window, dtype=torch.float64)
    kernel = torch.full((window,), 1.0, dtype=torch.float64)
    for frequency in range(1, kept):
        # the Nyquist frequency of an even window has no mirror image, all others count twice
        weight = 1.0 if 2 * frequency == window else 2.0
        kernel += weight * torch.cos(2 * math.pi * frequency * lag / window)
    return (kernel / window).float()
