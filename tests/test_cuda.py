"""On a GPU: every model trains there, also in half precision, and ranks as it does on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from data_utils import history_batch
from experiments.runs import BEST, MODELS, load_model, run, train
from model_parts.base import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
every_model = pytest.mark.parametrize("name", list(MODELS))


@every_model
def test_scores_of_trained_weights_are_those_of_the_cpu(name, tiny, task, tmp_path) -> None:
    result = run(tiny(name, {"run.device": "cuda", "train.amp": "off"}), task, tmp_path)
    assert result["environment"]["device"] != "cpu"
    on_cpu, _ = load_model(tmp_path, task.dataset.catalogue)
    on_gpu, _ = load_model(tmp_path, task.dataset.catalogue)
    numpy_batch = history_batch(task.split.train_and_valid, task.split.test.users, 16)
    batch = Batch(*map(torch.from_numpy, numpy_batch))
    cuda = torch.device("cuda")
    with torch.inference_mode():
        ours = on_gpu.to(cuda).score(batch.to(cuda)).cpu()
        theirs = on_cpu.score(batch)
    found = torch.isfinite(theirs) & torch.isfinite(ours)
    assert found.float().mean() > 0.99 * torch.isfinite(theirs).float().mean()
    torch.testing.assert_close(ours[found], theirs[found], rtol=1e-3, atol=1e-3)


@every_model
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains(name, amp, tiny, task, tmp_path: Path) -> None:
    result = run(tiny(name, {"run.device": "cuda", "train.amp": amp}), task, tmp_path)
    assert math.isfinite(result["test"]["ndcg@10"])
    assert (tmp_path / BEST).exists()


# not for models whose stage one runs on the GPU, where sums in any order make other codes
@pytest.mark.parametrize("name", ["sasrec", "tiger"])
def test_a_stopped_run_goes_on_to_the_same_weights(name, tiny, task, tmp_path) -> None:
    settings = {"run.device": "cuda", "train.amp": "off", "train.epochs": 2}
    run(tiny(name, settings), task, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(rows: list) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(tiny(name, settings), task, tmp_path / "parts", on_epoch=stop)
    run(tiny(name, settings), task, tmp_path / "parts")
    whole, _ = load_model(tmp_path / "whole", task.dataset.catalogue)
    parts, _ = load_model(tmp_path / "parts", task.dataset.catalogue)
    for key, value in whole.state_dict().items():
        if value.is_floating_point():
            # atomic sums on a GPU add in any order
            torch.testing.assert_close(parts.state_dict()[key], value, rtol=0.05, atol=0.02)
