"""Sequence encoders: nothing looks ahead, padding is nothing, the filter is a low-pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_parts.backbone import (
    FrequencyBlock,
    FrequencyFilter,
    Positions,
    PostNormBlock,
    PreNormBlock,
    SelfAttention,
    at_last,
    init_weights,
    low_pass_kernel,
)

WIDTH, T = 8, 7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: SelfAttention(WIDTH, 2, 0.0),
        lambda: PostNormBlock(WIDTH, 2, 16, 0.0, 0.0),
        lambda: PreNormBlock(WIDTH, 2, 16, 0.0, 0.0),
    ],
)
def test_a_later_item_leaves_earlier_states_alone(layer):
    layer, x = layer(), normal(3, T, WIDTH)
    before = layer(x)
    x[:, 4] = normal(3, WIDTH)
    after = layer(x)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=2).min() > 0, "later ones do see it"


def test_attention_equals_torch():
    ours, theirs = SelfAttention(WIDTH, 2, 0.0), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.project_in.weight)
        theirs.in_proj_bias.copy_(ours.project_in.bias)
        theirs.out_proj.load_state_dict(ours.project_out.state_dict())
    x = normal(3, T, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    wanted = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="8 is not a multiple of 3"):
        SelfAttention(8, 3, 0.0)


# --------------------------------------------------------------------------- filter


def low_pass(x: torch.Tensor, cutoff: int) -> torch.Tensor:
    """BSARec's official code: rfft over time, zero beyond `cutoff // 2 + 1`, irfft."""
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    spectrum[:, cutoff // 2 + 1 :] = 0
    return torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")


def circulant(window: int, cutoff: int) -> torch.Tensor:
    lag = (torch.arange(window)[:, None] - torch.arange(window)[None]) % window
    return low_pass_kernel(window, cutoff)[lag]


@pytest.mark.parametrize("window", [2, 3, 8, 9, 50])
@pytest.mark.parametrize("cutoff", [1, 2, 3, 5, 9])
def test_the_kernel_is_the_low_pass_of_the_fourier_transform(window, cutoff):
    x = normal(2, window, 3)
    wanted = low_pass(x, cutoff)
    torch.testing.assert_close(circulant(window, cutoff) @ x, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cutoff", [16, 100])
def test_a_cutoff_beyond_the_window_passes_everything(cutoff):
    x = normal(2, 8, 3)
    torch.testing.assert_close(circulant(8, cutoff) @ x, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_filter_equals_that_of_the_left_padded_window(length):
    # the official code pads on the left with zeros; a circular filter only knows distances
    window, x = 9, normal(2, length, WIDTH)
    layer = FrequencyFilter(window, 3, WIDTH)
    left = torch.cat([x.new_zeros(2, window - length, WIDTH), x], dim=1)
    low = low_pass(left, 3)
    wanted = (low + layer.beta.square() * (left - low))[:, window - length :]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_padding_is_nothing_to_the_filter_block():
    block = FrequencyBlock(9, 3, 0.5, WIDTH, 2, 0.0)
    x, length = normal(1, 4, WIDTH), 4
    alone = block(x, torch.ones(1, length, 1))
    padded = torch.cat([x, normal(1, 3, WIDTH)], dim=1)  # whatever stands in the padding
    present = torch.tensor([1.0] * length + [0.0] * 3)[None, :, None]
    together = block(padded, present)[:, :length]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- the rest


def test_more_history_than_the_window_is_refused():
    places = Positions(T, WIDTH, from_end=True)
    assert places(torch.tensor([T, 2]), T).shape == (2, T, WIDTH)
    with pytest.raises(ValueError, match="a history of 8 items for a model that reads 7"):
        places(torch.tensor([T + 1]), T + 1)


def test_the_last_state_of_each_history():
    states = torch.arange(24.0).view(3, 4, 2)
    last = at_last(states, torch.tensor([1, 4, 0]))
    assert last.tolist() == [[0.0, 1.0], [14.0, 15.0], [0.0, 0.0]]


def test_initial_weights_leave_padding_at_zero():
    module = nn.ModuleList([nn.Embedding(5, 400, padding_idx=0), nn.Linear(400, 40)])
    init_weights(module)
    assert not module[0].weight[0].any() and not module[1].bias.any()
    assert module[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
