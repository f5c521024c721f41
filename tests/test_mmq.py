"""MMQ: experts, gates, losses against hand-computed values, codebook use, stage two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from baseline_models.mmq import (
    EuclideanQuantiser,
    Experts,
    SharedSpecificTokenizer,
    train_tokenizer,
)
from config import MMQ as Settings
from config import Config

SMALL: dict[str, Any] = {
    "codes": 16, "expert_width": 12, "tokenizer_steps": 200, "stage_one_batch": 128,
}  # fmt: skip


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**own: Any) -> Settings:
    return dataclasses.replace(Config().mmq, **(SMALL | own))


def tokenizer(widths: tuple[int, ...] = (5, 3), **own: Any) -> SharedSpecificTokenizer:
    torch.manual_seed(0)
    made = SharedSpecificTokenizer(list(widths), settings(**own))
    torch.nn.init.normal_(made.quantiser.codebooks)
    return made


def items(n: int = 200, widths: tuple[int, ...] = (5, 3)) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of each modality around 30 places, all present."""
    parts = []
    for seed, width in enumerate(widths):
        places = torch.randn(30, width, generator=random(seed))
        noise = torch.randn(n, width, generator=random(seed + 9))
        parts.append(F.normalize(places[torch.arange(n) % 30] + 0.3 * noise, dim=1))
    return torch.cat(parts, dim=1), torch.ones(n, len(widths), dtype=torch.bool)


# ---- parts ---------------------------------------------------------------------------------------


def test_one_code_for_each_expert_in_a_fixed_order() -> None:
    made = tokenizer(shared=1, specific=2)
    x, _ = items(7)
    latents = made.latents(x)
    assert latents.shape == (7, 1 + 2 * 2, 12) and made.encode(x).shape == (7, 5)
    torch.testing.assert_close(latents[:, :1], made.shared(x))
    torch.testing.assert_close(latents[:, 1:3], made.specific[0](x[:, :5]))
    torch.testing.assert_close(latents[:, 3:], made.specific[1](x[:, 5:]))


def test_gates_sum_to_one_in_each_modality_and_shared_experts_have_none() -> None:
    made = tokenizer()
    weights = made.weights(items()[0])
    assert bool((weights[:, :2] == 1).all()) and bool((weights > 0).all())
    torch.testing.assert_close(weights[:, 2:4].sum(1), torch.ones(200))
    torch.testing.assert_close(weights[:, 4:].sum(1), torch.ones(200))
    assert weights[:, 2].std() > 0, "they depend on the item"


def test_overlap_of_experts_by_hand() -> None:
    experts = Experts(3, 2, 2)
    with torch.no_grad():
        experts.last.copy_(torch.tensor([[[1.0, 0], [0, 1]], [[2.0, 0], [0, 0]]]))
    # the rows (1, 0, 0, 1) / sqrt 2 and (1, 0, 0, 0): cosine 1 / sqrt 2, twice off the diagonal
    assert experts.overlap().item() == pytest.approx(2 * 0.5)


def test_reconstruction_terms_by_hand() -> None:
    made = tokenizer()
    x, present = items(6)
    present[0, 1] = False
    quantised = torch.randn(6, 6, 12, generator=random(1))
    gates = made.weights(x)[:, :, None]
    shared, text, visual = (quantised * gates).split(2, dim=1)
    total = made.decoder(shared.sum(1) + text.sum(1) + visual.sum(1))
    error = (total - x).square()
    error[0, 5:] = 0
    recon, aux = made.rebuild(x, present, quantised)
    torch.testing.assert_close(recon, error.sum(1).mean())
    text_error = (made.decoders[0](text.sum(1)) - x[:, :5]).square().sum(1)
    visual_error = (made.decoders[1](visual.sum(1)) - x[:, 5:]).square().sum(1)
    visual_error[0] = 0
    torch.testing.assert_close(aux, (text_error + visual_error).mean())


def test_terms_are_weighted_and_without_weight_left_out() -> None:
    made = tokenizer()
    x, present = items(20)
    full = made.losses(x, present, 12.0, 10.0)
    half = made.losses(x, present, 6.0, 0.0)
    assert full.keys() == {"recon", "codebook", "aux"} and half.keys() == {"recon", "codebook"}
    torch.testing.assert_close(full["recon"], 2 * half["recon"])


def test_the_reconstruction_reaches_experts_through_the_quantiser() -> None:
    made = tokenizer()
    x, present = items(20)
    made.losses(x, present, 1.0, 1.0)["recon"].backward()
    gradient = made.shared.last.grad
    assert gradient is not None and float(gradient.abs().sum()) > 0
    assert made.quantiser.codebooks.grad is None or not made.quantiser.codebooks.grad.any(), (
        "a straight-through estimate leaves the codewords alone"
    )


def test_the_ablation_takes_the_nearest_codeword() -> None:
    quantiser = EuclideanQuantiser(1, 2, 2)
    with torch.no_grad():
        quantiser.codebooks.copy_(torch.tensor([[[10.0, 0.0], [0.5, 0.5]]]))
    latents = torch.tensor([[[1.0, 0.1]]])
    assert quantiser.encode(latents).item() == 1, "the other one has the larger cosine"
    found = quantiser(latents)
    torch.testing.assert_close(found.quantised, quantiser.codebooks[:, 1:].detach())
    # |q - z|^2 and a quarter of it
    assert found.loss.item() == pytest.approx(1.25 * (0.25 + 0.16))


# ---- stage one -----------------------------------------------------------------------------------


def usage(codes: torch.Tensor, n_codes: int) -> float:
    return sum(len(column.unique()) for column in codes.T) / (codes.shape[1] * n_codes)


def test_stage_one_rebuilds_items_and_uses_its_codebooks() -> None:
    x, present = items(400)
    made = tokenizer()
    before = sum(made.losses(x, present, 1.0, 1.0).values())
    train_tokenizer(made, x, present, random())
    parts = made.losses(x, present, 1.0, 1.0)
    assert sum(parts.values()).item() < 0.5 * before.item()
    codes = made.encode(x)
    assert usage(codes, 16) > 0.95
    shares = torch.bincount(codes[:, 0], minlength=16) / len(codes)
    entropy = -float((shares * shares.clamp(min=1e-9).log()).sum())
    assert entropy > 0.85 * math.log(16)


# ---- stage two -----------------------------------------------------------------------------------


def test_soft_codes_are_one_hot_in_value_and_soft_in_gradient() -> None:
    made = tokenizer()
    x, _ = items(9)
    codes = made.soft_codes(x, 0.1)
    hard = F.one_hot(made.encode(x), 16).float()
    torch.testing.assert_close(codes, hard)
    table = torch.randn(16, generator=random())
    (codes @ table).sum().backward()
    for name in ("quantiser.codebooks", "shared.last", "specific.0.last"):
        gradient = dict(made.named_parameters())[name].grad
        assert gradient is not None and float(gradient.abs().sum()) > 0, name
