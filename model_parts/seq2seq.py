"""Transformers that write a semantic ID: T5-like encoder-decoder and GPT-2-like decoder.

Both work on vectors and share three calls, so that a model need not know which one it has:

    memory, start = network.encode(x [B, S, d], present [B, S])    read the history
    states, cache = network.decode(y [B, W, t, d], memory, cache)  t more inputs of W beams
    cache = keep_beams(cache, parents [B, W'])                     beams that go on

`start` [B, 1, 1, d] is the first input of `decode`; the state after it predicts the first digit.
`cache=None` begins. The beams of a user share one memory, nothing is repeated for them. Training
is the same call with W = 1 and all inputs at once (`EncoderDecoder`), or `DecoderOnly.forward`.
Letters: B users, W beams, S tokens of a history, t new inputs, d width, H heads, h head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.backbone import PreNormBlock, check_window
from model_parts.dropout import Dropout, attend
from model_parts.rms_norm import RMSNorm

KeysValues = tuple[Tensor, Tensor]


class Memory(NamedTuple):
    """A history as the decoder sees it."""

    layers: list[KeysValues]  # keys and values of each layer, [B, H, S, h]
    present: Tensor  # [B, 1, 1, S] bool, tokens that may be attended to
    lengths: Tensor  # [B] how many


Cache = list[KeysValues]  # of each layer, [B, W, H, t, h]


def keep_beams(cache: Cache, parents: Tensor) -> Cache:
    """The cache of beams `parents` [B, W']: every new beam goes on from its parent."""
    rows = torch.arange(len(parents), device=parents.device)[:, None]
    return [(keys[rows, parents], values[rows, parents]) for keys, values in cache]


# --------------------------------------------------------------------------- encoder-decoder


class EncoderDecoder(nn.Module):
    """T5 (Raffel et al. 2020, version 1.0): RMSNorm first, relative positions, ReLU, no biases.

    Attention is not scaled by sqrt(h); the initial weights make up for it. One table of relative
    positions serves all layers of a side. Dropout is on the input, on attention weights and after
    every branch, not within the feed-forward layers, where T5 has it, too.
    """

    def __init__(
        self, width: int, layers: int, heads: int, head_width: int, inner: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = (width, heads, head_width, inner, dropout)
        self.start = nn.Parameter(torch.randn(width))
        self.encoder = nn.ModuleList(_Layer(*sizes, cross=False) for _ in range(layers))
        self.decoder = nn.ModuleList(_Layer(*sizes, cross=True) for _ in range(layers))
        self.encoder_positions = RelativePositions(heads, width, both_ways=True)
        self.decoder_positions = RelativePositions(heads, width, both_ways=False)
        self.encoder_norm = RMSNorm(width, eps=1e-6)
        self.decoder_norm = RMSNorm(width, eps=1e-6)
        self.dropout = Dropout(dropout)

    def encode(self, x: Tensor, present: Tensor) -> tuple[Memory, Tensor]:
        """x [B, S, d], present [B, S] bool with at least one token each -> memory, first input."""
        visible = present[:, None, None]
        bias = self.encoder_positions(x.shape[1], x.shape[1])[None]  # [1, H, S, S]
        bias = bias.masked_fill(~visible, float("-inf"))
        x = self.dropout(x)
        for layer in self.encoder:
            x = layer.read(x, bias)
        x = self.dropout(self.encoder_norm(x))
        layers = [layer.cross.keys_values(x) for layer in self.decoder]
        start = self.start.expand(len(x), 1, 1, -1)
        return Memory(layers, visible, present.sum(1)), start

    def decode(self, y: Tensor, memory: Memory, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """y [B, W, t, d] -> states [B, W, t, d] and the cache with these inputs."""
        before = cache[0][0].shape[3] if cache else 0
        bias = self.decoder_positions(y.shape[2], before + y.shape[2])  # [H, t, before + t]
        y, grown = self.dropout(y), []
        for index, layer in enumerate(self.decoder):
            past = cache[index] if cache else None
            y, now = layer.write(y, bias, memory.layers[index], memory.present, past)
            grown.append(now)
        return self.dropout(self.decoder_norm(y)), grown


class _Layer(nn.Module):
    """One T5 layer: self-attention, attention to the memory (`cross`), feed-forward."""

    def __init__(
        self, width: int, heads: int, head_width: int, inner: int, dropout: float, cross: bool
    ) -> None:
        super().__init__()
        self.own = _Attention(width, heads, head_width, dropout)
        self.own_norm = RMSNorm(width, eps=1e-6)
        if cross:
            self.cross = _Attention(width, heads, head_width, dropout)
            self.cross_norm = RMSNorm(width, eps=1e-6)
        self.expand = _linear(width, inner, width**-0.5)
        self.contract = _linear(inner, width, inner**-0.5)
        self.feed_forward_norm = RMSNorm(width, eps=1e-6)
        self.dropout = Dropout(dropout)

    def read(self, x: Tensor, bias: Tensor) -> Tensor:
        """Encoder side: x [B, S, d], bias [B, H, S, S] -> [B, S, d]."""
        normal = self.own_norm(x)
        x = x + self.dropout(self.own(normal, self.own.keys_values(normal), bias))
        return self._feed_forward(x)

    def write(
        self, y: Tensor, bias: Tensor, memory: KeysValues, present: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Decoder side: y [B, W, t, d] -> the same shape, and the grown cache of this layer."""
        B, W, t, d = y.shape
        normal = self.own_norm(y)
        now = self.own.keys_values(normal)
        if past is not None:
            now = torch.cat([past[0], now[0]], dim=3), torch.cat([past[1], now[1]], dim=3)
        y = y + self.dropout(self.own(normal, now, bias))
        # all inputs of all beams of a user are queries to the one memory
        queries = self.cross_norm(y).view(B, W * t, d)
        y = y + self.dropout(self.cross(queries, memory, present)).view(B, W, t, d)
        return self._feed_forward(y), now

    def _feed_forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.expand(self.feed_forward_norm(x)))
        return x + self.dropout(self.contract(inner))


class _Attention(nn.Module):
    """Multi-head attention whose heads need not add up to the width; no scaling, no biases."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inside = heads * head_width
        self.query = _linear(width, inside, (width * head_width) ** -0.5)
        self.key_value = _linear(width, 2 * inside, width**-0.5)
        self.project_out = _linear(inside, width, inside**-0.5)

    def keys_values(self, x: Tensor) -> KeysValues:
        """x [..., S, d] -> keys and values [..., H, S, h]."""
        split = self.key_value(x).unflatten(-1, (2, self.heads, -1))
        keys, values = split.unbind(-3)
        return keys.transpose(-2, -3), values.transpose(-2, -3)

    def forward(self, x: Tensor, memory: KeysValues, mask: Tensor) -> Tensor:
        """Queries x [..., t, d]; mask [..., t, S] bool, or added to the scores -> [..., t, d]."""
        queries = self.query(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        rate = self.dropout if self.training else 0.0
        mixed = attend(queries, *memory, mask, rate=rate, scale=1.0)
        return self.project_out(mixed.transpose(-2, -3).flatten(-2))


class RelativePositions(nn.Module):
    """T5's bias on attention scores: one number for each head and bucket of distances.

    Half of the buckets hold one distance each, the others grow with the logarithm of the distance
    up to `_FARTHEST`. Where the decoder must not look ahead the bias is -inf.
    """

    _BUCKETS, _FARTHEST = 32, 128

    def __init__(self, heads: int, width: int, both_ways: bool) -> None:
        super().__init__()
        self.both_ways = both_ways
        self.table = nn.Embedding(self._BUCKETS, heads)
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, queries: int, keys: int) -> Tensor:
        """[H, queries, keys]; the last query stands at the position of the last key."""
        device = self.table.weight.device
        position = torch.arange(keys, device=device)
        ahead = position[None] - position[keys - queries :, None]  # key minus query
        bias = self.table(self.buckets(ahead)).permute(2, 0, 1)
        return bias if self.both_ways else bias.masked_fill(ahead > 0, float("-inf"))

    def buckets(self, ahead: Tensor) -> Tensor:
        """Distances key minus query -> rows of the table."""
        count = self._BUCKETS // 2 if self.both_ways else self._BUCKETS
        distance = ahead.abs() if self.both_ways else (-ahead).clamp(min=0)
        single = count // 2
        growth = (count - single) / math.log(self._FARTHEST / single)
        far = single + (growth * (distance.clamp(min=1) / single).log()).long()
        bucket = torch.where(distance < single, distance, far.clamp(max=count - 1))
        return bucket + count * (ahead > 0) if self.both_ways else bucket


def _linear(width: int, out: int, std: float) -> nn.Linear:
    layer = nn.Linear(width, out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


# --------------------------------------------------------------------------- decoder only


class DecoderOnly(nn.Module):
    """GPT-2: learned absolute positions, causal blocks with LayerNorm first.

    Padding comes at the end, so causal attention keeps it out. `encode` leaves the last token of a
    history to `decode`, as its first input.
    """

    def __init__(
        self, width: int, layers: int, heads: int, inner: int, dropout: float, positions: int
    ) -> None:
        super().__init__()
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, inner, dropout, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, d] -> the state after every token [B, S, d]; what training needs."""
        check_window(x.shape[1], len(self.positions.weight), "tokens")
        x = self.dropout(x + self.positions.weight[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, x: Tensor, present: Tensor) -> tuple[Memory, Tensor]:
        """x [B, S, d], present [B, S] bool, padding last -> memory, first input of `decode`."""
        check_window(x.shape[1], len(self.positions.weight), "tokens")
        earlier = present.sum(1) - 1
        start = x[torch.arange(len(x), device=x.device), earlier][:, None, None]
        visible = torch.arange(x.shape[1], device=x.device) < earlier[:, None]
        x = self.dropout(x + self.positions.weight[: x.shape[1]])
        layers = []
        for block in self.blocks:
            layers.append(_queries_keys_values(block, x)[1:])
            x = block(x)
        return Memory(layers, visible[:, None, None], earlier), start

    def decode(self, y: Tensor, memory: Memory, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """y [B, W, 1, d], one input at a time -> states [B, W, 1, d] and the grown cache."""
        before = cache[0][0].shape[3] if cache else 0
        place = self.positions(memory.lengths + before)  # [B, d]
        y, grown = self.dropout(y + place[:, None, None]), []
        for index, block in enumerate(self.blocks):
            queries, *now = _queries_keys_values(block, y)
            if cache:
                now = [torch.cat(pair, dim=3) for pair in zip(cache[index], now, strict=True)]
            mixed = _attend_to_both(queries, memory.layers[index], memory.present, tuple(now))
            y = y + block.dropout(block.attention.project_out(mixed))
            y = y + block.dropout(block.feed_forward(block.feed_forward_norm(y)))
            grown.append(tuple(now))
        return self.norm(y), grown


def _queries_keys_values(block: PreNormBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., t, d] -> three times [..., H, t, h]."""
    split = block.attention.project_in(block.attention_norm(x))
    split = split.unflatten(-1, (3, block.attention.heads, -1))
    return tuple(part.transpose(-2, -3) for part in split.unbind(-3))


def _attend_to_both(
    queries: Tensor, memory: KeysValues, present: Tensor, own: KeysValues
) -> Tensor:
    """One softmax over the memory, which all beams share, and each beam's own inputs.

    queries [B, W, H, 1, h], memory [B, H, S, h], present [B, 1, 1, S], own [B, W, H, t, h] ->
    [B, W, 1, H * h].
    """
    scale = queries.shape[-1] ** -0.5
    asked = queries[:, :, :, 0].transpose(1, 2) * scale  # [B, H, W, h]
    shared = (asked @ memory[0].transpose(2, 3)).masked_fill(~present, float("-inf"))
    alone = (queries * scale) @ own[0].transpose(3, 4)  # [B, W, H, 1, t]
    alone = alone[:, :, :, 0].transpose(1, 2)  # [B, H, W, t]
    weights = torch.softmax(torch.cat([shared, alone], dim=3).float(), dim=3).to(shared.dtype)
    n_shared = shared.shape[3]
    mixed = weights[..., :n_shared] @ memory[1]  # [B, H, W, h]
    mixed = mixed + (weights[..., n_shared:].transpose(1, 2)[:, :, :, None] @ own[1])[
        :, :, :, 0
    ].transpose(1, 2)
    return mixed.transpose(1, 2).flatten(2)[:, :, None]
