"""MMQ: experts, gates, losses against hand-computed values, codebook use, stage two."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from baseline_models.mmq import (
    MMQ,
    EuclideanQuantiser,
    Experts,
    SharedSpecificTokenizer,
    train_tokenizer,
)
from config import MMQ as Settings
from config import Config
from experiments.training import Trainer
from model_parts.base import Batch

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
    full = made.losses(made.latents(x), x, present, 12.0, 10.0)
    half = made.losses(made.latents(x), x, present, 6.0, 0.0)
    assert full.keys() == {"recon", "codebook", "aux"} and half.keys() == {"recon", "codebook"}
    torch.testing.assert_close(full["recon"], 2 * half["recon"])


def test_the_reconstruction_reaches_experts_through_the_quantiser() -> None:
    made = tokenizer()
    x, present = items(20)
    made.losses(made.latents(x), x, present, 1.0, 1.0)["recon"].backward()
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
    before = sum(made.losses(made.latents(x), x, present, 1.0, 1.0).values())
    train_tokenizer(made, x, present, random())
    parts = made.losses(made.latents(x), x, present, 1.0, 1.0)
    assert sum(parts.values()).item() < 0.5 * before.item()
    codes = made.encode(x)
    assert usage(codes, 16) > 0.95
    shares = torch.bincount(codes[:, 0], minlength=16) / len(codes)
    entropy = -float((shares * shares.clamp(min=1e-9).log()).sum())
    assert entropy > 0.85 * math.log(16)


# ---- stage two -----------------------------------------------------------------------------------


def test_dead_codes_start_anew_unless_switched_off(monkeypatch) -> None:
    x, present = items()
    used = {}
    for revive in (True, False):
        made = tokenizer(revive=revive)
        far = torch.zeros_like(made.quantiser.codebooks)
        far[..., 0] = 1  # all codewords alike: the first takes all items
        monkeypatch.setattr(made.quantiser, "start", lambda *_, c=made, f=far: _set(c, f))
        train_tokenizer(made, x, present, random())
        used[revive] = min(len(column.unique()) for column in made.encode(x).T)
    assert used[False] <= 4 and used[True] >= 12


def _set(made: SharedSpecificTokenizer, words: torch.Tensor) -> None:
    made.quantiser.codebooks.data.copy_(words)


def test_soft_codes_are_one_hot_in_value_and_soft_in_gradient() -> None:
    made = tokenizer()
    x, _ = items(9)
    codes = made.soft_codes(made.latents(x), 0.1)
    hard = F.one_hot(made.encode(x), 16).float()
    torch.testing.assert_close(codes, hard)
    table = torch.randn(16, generator=random())
    (codes @ table).sum().backward()
    for name in ("quantiser.codebooks", "shared.last", "specific.0.last"):
        gradient = dict(made.named_parameters())[name].grad
        assert gradient is not None and float(gradient.abs().sum()) > 0, name


def some_model(**own: Any) -> MMQ:
    """200 items, random codebooks, no dropout."""
    config = Config()
    config.data.max_history = 5
    sizes = {
        "width": 16, "layers": 1, "attention_heads": 2, "head_width": 8, "inner": 16, "dropout": 0.0
    }  # fmt: skip
    config.mmq = dataclasses.replace(config.mmq, **(SMALL | sizes | {"tune_epochs": 2} | own))
    x, present = items()
    modalities = {"text": (x[:, :5], None), "visual": (x[:, 5:], None)}
    torch.manual_seed(0)
    model = MMQ(config, SimpleNamespace(item_ids=range(200), modalities=modalities))
    torch.nn.init.normal_(model.tokenizer.quantiser.codebooks)
    model.inputs.copy_(x)
    model.present.copy_(present)
    return model.train()


def some_batch() -> Batch:
    histories = torch.tensor([[1, 30, 2, 1], [7, 0, 0, 0], [150, 9, 0, 0]])
    targets = torch.tensor([[0, 0, 0, 3], [8, 0, 0, 0], [0, 44, 0, 0]])
    return Batch(torch.arange(3), histories, torch.tensor([4, 1, 2]), targets)


def test_soft_histories_read_like_hard_ones() -> None:
    model = some_model()
    model.begin_epoch(0, random())
    soft = model.loss(some_batch())
    hard = model.eval().loss(some_batch())
    assert soft.keys() == {"digits", "recon", "aux", "codebook"} and hard.keys() == {"digits"}
    torch.testing.assert_close(soft["digits"], hard["digits"])


def test_the_generators_loss_reaches_the_tokenizer_in_stage_two_only() -> None:
    model = some_model()
    for epoch in (0, 2):
        model.zero_grad()
        model.begin_epoch(epoch, random())
        model.loss(some_batch())["digits"].backward()
        reached = {
            name for name, p in model.tokenizer.named_parameters()
            if p.grad is not None and p.grad.any()
        }  # fmt: skip
        assert ({"quantiser.codebooks", "shared.last", "specific.1.first.weight"} <= reached) == (
            epoch == 0
        )
    assert not any(p.requires_grad for p in some_model(tune_epochs=0).tokenizer.parameters())


def test_ids_follow_the_tokenizer_once_an_epoch_and_are_frozen_after_stage_two() -> None:
    model = some_model()

    def codes_after(epoch: int) -> torch.Tensor:
        with torch.no_grad():
            model.tokenizer.quantiser.codebooks.copy_(
                torch.randn(model.tokenizer.quantiser.codebooks.shape, generator=random(epoch))
            )
        model.begin_epoch(epoch, random())
        return model.codes.clone()

    first = codes_after(0)
    assert torch.equal(first, codes_after(0)), "an epoch taken up again keeps its IDs"
    second, last = codes_after(1), codes_after(2)
    assert not torch.equal(first, second) and not torch.equal(second, last)
    assert torch.equal(last, codes_after(3)) and torch.equal(last, codes_after(4))


def test_items_without_features_have_random_codes_of_their_own() -> None:
    model = some_model()
    lacking = torch.arange(200) >= 140
    model.inputs[lacking], model.present[lacking] = 0.0, False
    model.drawn.copy_(torch.randint(model.n_codes, model.drawn.shape, generator=random()))
    model.begin_epoch(0, random())
    assert len(model.codes[lacking].unique(dim=0)) > 55
    assert torch.equal(model.codes[~lacking], model.tokenizer.encode(model.inputs)[~lacking])
    soft = model.loss(some_batch())["digits"]  # item 150 has no features
    torch.testing.assert_close(soft, model.eval().loss(some_batch())["digits"])


def test_the_tokenizer_learns_more_slowly() -> None:
    model = some_model(tune_rate=0.1)
    rates = {id(p): group["rate"] for group in model.parameter_groups() for p in group["params"]}
    assert rates.keys() == {id(p) for p in model.parameters()}
    assert rates[id(model.tokenizer.shared.last)] == 0.1 and rates[id(model.tokens.weight)] == 1.0


def test_the_loop_takes_over_the_share_of_the_learning_rate(tiny, task, tmp_path) -> None:
    config = tiny("mmq", {"train.epochs": 1, "mmq.tune_rate": 0.25})
    model = MMQ(config, task.dataset.catalogue)
    trainer = Trainer(
        model, task.split.train, config, tmp_path, torch.device("cpu"),
        lambda: {"ndcg@10": 0.0}, "data",
    )  # fmt: skip
    trainer.fit()
    whole, tokenizer = (group["lr"] for group in trainer.optimiser.param_groups)
    assert tokenizer == pytest.approx(0.25 * whole) and whole > 0


def test_of_items_that_share_an_id_the_popular_one_comes_first() -> None:
    model = some_model()
    interactions = torch.ones(200)
    interactions[[5, 9]] = torch.tensor([7.0, 3.0])
    model.set_codes(torch.zeros(200, 6, dtype=torch.long), interactions)
    scores = model.eval().score(some_batch())
    assert bool((scores.topk(2).indices == torch.tensor([5, 9])).all())
    share = (scores - scores.logsumexp(1, keepdim=True)).exp()  # of the one ID
    expected = (interactions + 0.3) / (interactions + 0.3).sum()
    torch.testing.assert_close(share, expected.expand_as(share), atol=1e-5, rtol=1e-4)
