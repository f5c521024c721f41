"""Both transformers: caches, padding and causality change nothing they should not; sizes; T5."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model_parts.base import count_parameters
from model_parts.seq2seq import DecoderOnly, EncoderDecoder, RelativePositions, keep_beams

WIDTH = 16


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=random(seed))


def encoder_decoder(layers: int = 2, dropout: float = 0.0) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(WIDTH, layers, 3, 4, 32, dropout).eval()


def decoder_only(layers: int = 2) -> DecoderOnly:
    torch.manual_seed(0)
    return DecoderOnly(WIDTH, layers, 2, 32, 0.0, positions=20).eval()


def lengths_to_mask(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


# ---- encoder-decoder ---------------------------------------------------------------------------


def test_the_size_is_that_of_t5() -> None:
    # d 128, 4 + 4 layers, 6 heads of 64, inner 1024: facts give 4.59 M with 1027 token rows
    network = EncoderDecoder(128, 4, 6, 64, 1024, 0.1)
    attention, feed_forward, norm = 4 * 128 * 384, 2 * 128 * 1024, 128
    encoder = 4 * (attention + feed_forward + 2 * norm)
    decoder = 4 * (2 * attention + feed_forward + 3 * norm)
    rest = 2 * (32 * 6 + norm) + 128  # positions, last norms, start vector
    assert count_parameters(network) == encoder + decoder + rest == 4_459_776


@torch.no_grad()
def test_one_input_at_a_time_with_a_cache_equals_all_at_once() -> None:
    network, y = encoder_decoder(), vectors(3, 2, 5)
    memory, _ = network.encode(vectors(3, 7, seed=2), lengths_to_mask([7, 4, 1], 7))
    whole, _ = network.decode(y, memory)
    cache, parts = None, []
    for step in range(5):
        states, cache = network.decode(y[:, :, step : step + 1], memory, cache)
        parts.append(states)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_beams_go_on_from_the_parents_that_were_kept() -> None:
    network, y = encoder_decoder(), vectors(2, 3, 2)
    memory, _ = network.encode(vectors(2, 4, seed=2), lengths_to_mask([4, 2], 4))
    _, cache = network.decode(y, memory)
    parents = torch.tensor([[2, 0, 0, 1], [1, 1, 2, 0]])
    further = vectors(2, 4, 1, seed=5)
    states, _ = network.decode(further, memory, keep_beams(cache, parents))
    chosen = torch.stack([y[user, parents[user]] for user in range(2)])
    expected, _ = network.decode(torch.cat([chosen, further], dim=2), memory)
    torch.testing.assert_close(states, expected[:, :, -1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_of_the_history_changes_nothing() -> None:
    network, x, y = encoder_decoder(), vectors(2, 6), vectors(2, 1, 3, seed=2)
    alone, _ = network.decode(
        y[:1], network.encode(x[:1, :3], torch.ones(1, 3, dtype=torch.bool))[0]
    )
    padded, _ = network.decode(y, network.encode(x, lengths_to_mask([3, 6], 6))[0])
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_decoder_does_not_look_ahead_and_the_encoder_does() -> None:
    network, x, y = encoder_decoder(), vectors(1, 5), vectors(1, 1, 4, seed=2)
    present = torch.ones(1, 5, dtype=torch.bool)
    before, _ = network.decode(y, network.encode(x, present)[0])
    changed = y.clone()
    changed[:, :, 2] += 1
    after, _ = network.decode(changed, network.encode(x, present)[0])
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2])
    assert not torch.allclose(after[:, :, 2:], before[:, :, 2:])
    x[:, -1] += 1  # the last token of the history reaches even the first state
    other, _ = network.decode(y, network.encode(x, present)[0])
    assert not torch.allclose(other[:, :, 0], before[:, :, 0])


@torch.no_grad()
def test_users_and_beams_do_not_mix() -> None:
    network, x, y = encoder_decoder(), vectors(2, 5), vectors(2, 3, 2, seed=2)
    present = torch.ones(2, 5, dtype=torch.bool)
    before, _ = network.decode(y, network.encode(x, present)[0])
    x[0] += 1
    y[1, 2] += 1
    after, _ = network.decode(y, network.encode(x, present)[0])
    torch.testing.assert_close(after[1, :2], before[1, :2])
    assert not torch.allclose(after[0], before[0])


def test_attention_is_softmax_of_products_plus_bias() -> None:
    network = encoder_decoder(layers=1)
    attention, x = network.encoder[0].own, vectors(1, 3)[0]
    queries, (keys, values) = attention.query(x), attention.keys_values(x)
    bias = network.encoder_positions(3, 3)
    heads = []
    for head in range(3):
        scores = queries[:, 4 * head : 4 * head + 4] @ keys[head].T + bias[head]
        heads.append(torch.softmax(scores, dim=1) @ values[head])
    expected = attention.project_out(torch.cat(heads, dim=1))
    found = attention(x[None], attention.keys_values(x[None]), bias[None])
    torch.testing.assert_close(found[0], expected)


def test_distances_share_buckets_as_in_t5() -> None:
    both, one = (RelativePositions(2, 8, both_ways=way) for way in (True, False))
    ahead = torch.tensor([0, -1, -7, -8, -15, -16, -127, -500, 1, 7, 8, 500])

    # 16 buckets a side: 8 single distances, then 8 on a log scale up to 128
    def far(distance: int, single: int) -> int:
        growth = math.log(distance / single) / math.log(128 / single)
        return single + int(growth * single)

    expected = [0, 1, 7, 8, far(15, 8), far(16, 8), 15, 15, 17, 23, 24, 31]
    assert both.buckets(ahead).tolist() == expected
    # causal: 16 single distances, then 16; what lies ahead counts as distance 0
    assert one.buckets(ahead).tolist() == [0, 1, 7, 8, 15, 16, 31, 31, 0, 0, 0, 0]


# ---- decoder only ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5, 5], [5, 2], [1, 4]])
def test_memory_and_cache_equal_the_full_forward_pass(lengths: list[int]) -> None:
    network, x, y = decoder_only(), vectors(2, 5), vectors(2, 3, 2, seed=2)
    memory, start = network.encode(x, lengths_to_mask(lengths, 5))
    first, cache = network.decode(start, memory)
    cache = keep_beams(cache, torch.zeros(2, 3, dtype=torch.int64))
    found = [first.expand(-1, 3, -1, -1)]
    for step in range(2):
        states, cache = network.decode(y[:, :, step : step + 1], memory, cache)
        found.append(states)
    for user, length in enumerate(lengths):
        for beam in range(3):
            row = torch.cat([x[user, :length], y[user, beam]])[None]
            expected = network(row)[0, length - 1 :]
            shown = torch.cat([part[user, beam] for part in found])
            torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_no_state_of_the_decoder_depends_on_later_tokens() -> None:
    network, x = decoder_only(), vectors(2, 6)
    before = network(x)
    x[:, 4:] *= -1
    torch.testing.assert_close(network(x)[:, :4], before[:, :4])
    assert not torch.allclose(network(x)[:, 4:], before[:, 4:])
