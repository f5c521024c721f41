"""The loop: schedule, early stopping, checkpoints that go on where they stopped, bad losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from config import Config
from data_readers.tables import Sequences
from experiments import runs
from experiments.runs import METRICS, RANKS, Task, run
from experiments.training import BEST, LATEST, Stopped, Trainer
from main import main
from model_parts.base import Batch, Recommender
from util import (
    UserError,
    autocast_type,
    environment,
    load_checkpoint,
    machine_name,
    save_checkpoint,
    write_json,
)

CPU = torch.device("cpu")
TIMINGS = {"efficiency", "environment"}


class Toy(Recommender):
    """One weight vector; the loss of step s is `losses[s]` times its sum, 1 beyond the list."""

    name = "toy"

    def __init__(self, losses: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.losses = list(losses)
        self.on_step = lambda: None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        self.on_step()
        factor = self.losses.pop(0) if self.losses else 1.0
        return {"toy": factor * self.weight.sum()}


def toy_trainer(
    tiny, folder: Path, model: Toy, settings: dict, n_users: int = 8, valid=lambda: 0.5
) -> Trainer:
    """8 users with 3 train items each; batches of 2: 4 steps an epoch."""
    train = Sequences(
        np.arange(1, 3 * n_users + 1, dtype=np.int32),
        np.arange(0, 3 * n_users + 1, 3),
        np.arange(3 * n_users),
    )
    config = tiny(settings={"train.batch_size": 2, "train.lr": 0.1} | settings)
    return Trainer(model, train, config, folder, CPU, lambda: {"ndcg@10": valid()}, "data")


# --------------------------------------------------------------------------- schedule, clipping


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.05, 0.1, 0.1, 0.5 / 6, 0.4 / 6, 0.3 / 6, 0.2 / 6, 0.1 / 6]),
        ("cosine", [0.05, 0.1, 0.1, 0.0933013, 0.075, 0.05, 0.025, 0.0066987]),
    ],
)
def test_learning_rate_by_hand(tiny, tmp_path, schedule, expected):
    # 8 steps, two of them warm-up, then six of decay
    model, rates = Toy(), []
    settings = {"train.schedule": schedule, "train.warmup_steps": 2}
    trainer = toy_trainer(tiny, tmp_path, model, settings)
    model.on_step = lambda: rates.append(trainer.optimiser.param_groups[0]["lr"])
    trainer.fit()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_takes_a_quarter_of_a_short_training_at_most(tiny, tmp_path):
    model, rates = Toy(), []
    settings = {"train.schedule": "constant", "train.warmup_steps": 500}
    trainer = toy_trainer(tiny, tmp_path, model, settings)
    model.on_step = lambda: rates.append(trainer.optimiser.param_groups[0]["lr"])
    trainer.fit()  # 8 steps
    assert rates == pytest.approx([0.05] + [0.1] * 7)


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (100.0, 10 * 3**0.5), (0.0, 10 * 3**0.5)])
def test_gradients_are_clipped(tiny, tmp_path, clip, norm):
    model, norms = Toy((10.0,) * 100), []
    trainer = toy_trainer(tiny, tmp_path, model, {"train.clip": clip, "train.epochs": 1})
    step = trainer.optimiser.step

    def watched() -> None:
        norms.append(float(model.weight.grad.norm()))
        step()

    trainer.optimiser.step = watched
    trainer.fit()
    assert norms == pytest.approx([norm] * 4, rel=1e-4)


# --------------------------------------------------------------------------- early stopping


def test_the_best_epoch_is_kept_and_training_stops_when_patience_is_out(tiny, tmp_path):
    valid, seen = iter([0.1, 0.3, 0.2, 0.3, 0.9]), []
    model = Toy()

    def validate() -> float:
        seen.append(model.weight.detach().clone())
        return next(valid)

    settings = {"train.patience": 2, "train.epochs": 9}
    trainer = toy_trainer(tiny, tmp_path, model, settings, valid=validate)
    trainer.fit()
    assert len(seen) == 4  # epochs 3 and 4 are no better than 2
    assert trainer.progress.best_epoch == 2
    assert torch.equal(model.weight, seen[1])
    assert torch.equal(load_checkpoint(tmp_path / BEST)["model"]["weight"], seen[1])


def test_patience_zero_never_stops_and_evaluation_may_be_rarer(tiny, tmp_path):
    values = iter([0.3, 0.2, 0.1])
    settings = {"train.patience": 0, "train.epochs": 5, "train.eval_every": 2}
    trainer = toy_trainer(tiny, tmp_path, Toy(), settings, valid=lambda: next(values))
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    assert [("valid" in row) for row in rows] == [False, True, False, True, True]


@pytest.mark.parametrize(("has_bf16", "amp", "used"), [
    (True, "auto", torch.bfloat16), (True, "fp16", torch.bfloat16), (True, "off", None),
    (False, "auto", None), (False, "bf16", None),
])  # fmt: skip
def test_a_cpu_has_half_precision_where_it_multiplies_it(has_bf16, amp, used, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    cpu = torch.device("cpu")
    assert autocast_type(amp, cpu) == used
    assert environment(cpu, amp)["training"] == ("bfloat16" if used else "float32")


def test_nothing_to_learn_from_is_said(tiny, tmp_path):
    trainer = toy_trainer(tiny, tmp_path, Toy(), {}, n_users=0)
    with pytest.raises(UserError, match="no user has two train interactions"):
        trainer.fit()


# --------------------------------------------------------------------------- bad losses


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_bad_loss_is_skipped_and_the_rate_halved(tiny, tmp_path, bad):
    model, weights, rates = Toy((1.0, bad, 1.0)), [], []
    trainer = toy_trainer(tiny, tmp_path, model, {"train.epochs": 1})

    def note() -> None:
        weights.append(model.weight.detach().clone())
        rates.append(trainer.optimiser.param_groups[0]["lr"])

    model.on_step = note
    trainer.fit()
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert trainer.progress.bad_steps == 0


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_bad_gradient_of_a_finite_loss_spoils_no_weights(tiny, tmp_path, clip):
    class Root(Toy):
        def loss(self, batch: Batch) -> dict[str, Tensor]:
            parts = super().loss(batch)
            zero = (self.weight - self.weight.detach()).abs().sum()
            # sqrt(0) is 0, and its slope times 0 is nan
            return parts | ({"root": (0 * zero).sqrt()} if len(self.losses) == 2 else {})

    model = Root((1.0, 1.0, 1.0))
    trainer = toy_trainer(tiny, tmp_path, model, {"train.epochs": 1, "train.clip": clip})
    trainer.fit()
    assert model.weight.isfinite().all()
    assert trainer.optimiser.param_groups[0]["lr"] == pytest.approx(0.05)
    assert trainer.progress.lr_scale == 1.0, "the next epoch starts with the full rate again"


def test_five_bad_steps_in_a_row_end_the_run_and_keep_the_batch(tiny, tmp_path):
    model = Toy((1.0, *[float("nan")] * 5))
    trainer = toy_trainer(tiny, tmp_path, model, {"train.epochs": 9})
    with pytest.raises(UserError, match=r"not finite 5 times in a row .*bad_batch\.pt"):
        trainer.fit()
    assert model.weight.isfinite().all()
    batch = Batch(**torch.load(tmp_path / "bad_batch.pt", weights_only=True))
    assert batch.items.shape == (2, 2)


def test_a_gradient_that_never_is_a_number_ends_a_run_in_fp16_too(tiny, tmp_path):
    class Broken(Toy):
        def loss(self, batch: Batch) -> dict[str, Tensor]:
            zero = (self.weight - self.weight.detach()).abs().sum()
            return super().loss(batch) | {"root": (0 * zero).sqrt()}

    trainer = toy_trainer(tiny, tmp_path, Broken((1.0,) * 40), {"train.epochs": 20})
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # overflow explains four steps
    with pytest.raises(UserError, match="not finite 5 times in a row"):
        trainer.fit()
    assert 40 - len(trainer.model.losses) == 4 + 5


# --------------------------------------------------------------------------- checkpoints


def stop_after(monkeypatch, steps: int) -> None:
    """A real SIGTERM while step number `steps` is running."""
    original, done = Trainer._step, [0]

    def step(self, batch, counts):
        original(self, batch, counts)
        done[0] += 1
        if done[0] == steps:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", step)


def finished(folder: Path, config: Config, task: Task) -> tuple:
    """All that a run leaves except the time it took."""
    folder.mkdir(exist_ok=True)
    result = {k: v for k, v in run(config, task, folder).items() if k not in TIMINGS}
    rows = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]
    with np.load(folder / RANKS) as ranks:
        return result, losses, ranks["masked"].tolist()


@pytest.mark.parametrize("steps", [1, 3, 8, 9, 14])  # in an epoch of 8 steps; 8 is its last one
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tiny, task, tmp_path, monkeypatch, steps, workers
):
    # dropout is on, so that the random state matters
    settings = {"train.batch_size": 8, "train.epochs": 3, "train.num_workers": workers}
    config = tiny("sasrec", settings)
    whole = finished(tmp_path / "whole", config, task)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped):
            finished(tmp_path / "parts", config, task)
    assert not (tmp_path / "parts" / METRICS).exists()
    assert finished(tmp_path / "parts", config, task) == whole
    one, two = (load_checkpoint(tmp_path / part / BEST)["model"] for part in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "parts" / LATEST).exists()


def test_a_run_stopped_twice_goes_on_too(tiny, task, tmp_path, monkeypatch):
    config = tiny("sasrec", {"train.batch_size": 8})
    whole = finished(tmp_path / "whole", config, task)
    for steps in (3, 2):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Stopped):
                finished(tmp_path / "parts", config, task)
    assert finished(tmp_path / "parts", config, task) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmq", "pctx", "mcrl"])
def test_ids_that_change_in_training_or_vary_in_number_go_on_too(
    name, tiny, task, tmp_path, monkeypatch
):
    config = tiny(name, {"train.batch_size": 64, "train.epochs": 2})
    whole = finished(tmp_path / "whole", config, task)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)  # in the middle of the second epoch of 6 or so
        with pytest.raises(Stopped):
            finished(tmp_path / "parts", config, task)
    assert finished(tmp_path / "parts", config, task) == whole


@pytest.fixture
def stopped(tiny, task, tmp_path, monkeypatch) -> Path:
    """The folder of a run that was stopped after two steps."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            finished(tmp_path / "run", tiny(settings={"train.batch_size": 8}), task)
    return tmp_path / "run"


def test_a_checkpoint_holds_no_code(stopped):
    state = torch.load(stopped / LATEST, weights_only=True)
    assert state["progress"]["global_step"] == 2


def test_a_checkpoint_of_other_data_is_refused(stopped, tiny, task):
    other = task._replace(dataset=task.dataset._replace(fingerprint="other"))
    with pytest.raises(UserError, match="trained on other data"):
        run(tiny(settings={"train.batch_size": 8}), other, stopped)


def test_a_checkpoint_of_other_settings_is_refused_by_name(stopped, tiny, task):
    config = tiny(settings={"train.batch_size": 8, "sasrec.width": 8})
    with pytest.raises(UserError, match=r"made with sasrec\.width=16, not 8"):
        run(config, task, stopped)


def test_where_it_runs_may_change_between_stop_and_resume(stopped, tiny, task):
    settings = {"train.batch_size": 8, "run.save_dir": "elsewhere", "train.num_workers": 1}
    assert finished(stopped, tiny(settings=settings), task)


def test_a_resumed_run_names_all_its_machines_and_no_peak_of_one(stopped, tiny, task, monkeypatch):
    here = runs.environment(torch.device("cpu"), "off")
    monkeypatch.setattr(runs, "environment", lambda *_: here | {"device": "another"})
    result = run(tiny(settings={"train.batch_size": 8}), task, stopped)
    assert result["environment"]["device"] == "another"
    assert result["environment"]["begun_on"] == f"{machine_name(here)} in {here['training']}"
    assert result["efficiency"]["peak_memory_mb"] is None


def test_a_broken_checkpoint_is_named(stopped, tiny, task):
    (stopped / LATEST).write_bytes(b"half of a checkpoi")
    with pytest.raises(UserError, match=r"checkpoint\.pt is no readable checkpoint"):
        run(tiny(settings={"train.batch_size": 8}), task, stopped)


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"a": torch.zeros(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="Cannot write"):
            save_checkpoint(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_checkpoint(path)["a"], torch.zeros(3))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


def test_processes_that_resume_do_not_share_their_dropout(tiny, tmp_path, monkeypatch):
    trainer, drawn = toy_trainer(tiny, tmp_path, Toy(), {}), []
    trainer.save()
    monkeypatch.setattr("experiments.training.world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr("experiments.training.rank", lambda number=number: number)
        assert trainer.resume()
        drawn.append(float(torch.rand(())))
    assert drawn[0] != drawn[1]


# --------------------------------------------------------------------------- through main.py


@pytest.fixture
def flags(tmp_path, small_flags) -> list[str]:
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    return ["--mode", "quick", "--model", "sasrec", *folders, *small_flags]


def only_run(tmp_path: Path, folder: str = "save") -> Path:
    (found,) = (tmp_path / folder).iterdir()
    return found


def test_sigterm_leaves_a_checkpoint_and_resume_goes_on(flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(flags) == 130
    assert "--resume" in capsys.readouterr().err
    folder = only_run(tmp_path)
    assert (folder / LATEST).exists() and not (folder / METRICS).exists()
    assert main([*flags, "--resume"]) == 0
    assert only_run(tmp_path) == folder and (folder / METRICS).exists()
    assert not (folder / "unfinished").exists()


def test_resume_needs_the_same_settings(flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(flags) == 130
    folder = str(only_run(tmp_path))
    assert main([*flags, "--resume", folder, "--set", "train.clip=3"]) == 2
    assert "train.clip" in capsys.readouterr().err
    # without a folder: no run has these settings, so it starts afresh and says so
    assert main([*flags, "--resume", "--set", "train.clip=3"]) == 0
    assert "starting afresh" in capsys.readouterr().err
    assert len(list((tmp_path / "save").iterdir())) == 2


def test_a_run_of_another_version_does_not_block_resume(flags, tmp_path):
    old = tmp_path / "save" / "quick_mock_old"
    old.mkdir(parents=True)
    (old / "unfinished").touch()
    (old / "request.yaml").write_text("flags: {train.no_such_key: 1}\noverlay: {}\n")
    assert main([*flags, "--resume"]) == 0


def start(arguments: list[str], *before: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *before, "main.py", *arguments],
        cwd=Path(__file__).parent.parent, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def stored(folder: Path) -> dict:
    result = json.loads((folder / METRICS).read_text())
    return {key: value for key, value in result.items() if key not in TIMINGS}


def in_folder(flags: list[str], tmp_path: Path, folder: str) -> list[str]:
    return [*flags, "--save_dir", str(tmp_path / folder)]


def lines_of_epochs(save_dir: Path) -> int:
    return sum(len(path.read_text()) for path in save_dir.glob("*/epochs.jsonl"))


@pytest.mark.slow
def test_kill_9_and_resume_give_the_metrics_of_an_undisturbed_run(flags, tmp_path):
    flags = [*flags, "--epochs", "40", "--set", "train.patience=0"]
    flags += ["--set", "train.checkpoint_minutes=0"]  # a checkpoint after every step
    assert main(in_folder(flags, tmp_path, "whole")) == 0

    process = start(in_folder(flags, tmp_path, "parts"))
    deadline = time.monotonic() + 120
    while not lines_of_epochs(tmp_path / "parts") and time.monotonic() < deadline:
        time.sleep(0.005)  # until the first of 40 epochs is over
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = only_run(tmp_path, "parts")
    assert (folder / LATEST).exists() and not (folder / METRICS).exists()

    again = start([*in_folder(flags, tmp_path, "parts"), "--resume"])
    assert "Resuming" in again.communicate(timeout=300)[1]
    assert stored(folder) == stored(only_run(tmp_path, "whole"))


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(flags, tmp_path):
    # dropout is drawn by each process for itself, so it is off
    flags = [*flags, "--set", "sasrec.dropout=0", "--seeds", "1", "--epochs", "4"]
    assert main(in_folder(flags, tmp_path, "one")) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(in_folder(flags, tmp_path, "two"), *torchrun)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-2000:]
    one, two = stored(only_run(tmp_path, "one")), stored(only_run(tmp_path, "two"))
    for part in ("valid", "test"):
        assert two[part] == pytest.approx(one[part], abs=1e-4)


# --------------------------------------------------------------------------- batches


class Reader(Toy):
    """Remembers how much the histories of each batch differ in length."""

    examples = "prefixes"

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[int] = []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        self.spreads.append(int(batch.lengths.max() - batch.lengths.min()))
        return super().loss(batch)


@pytest.mark.parametrize("bucketed", [True, False])
def test_histories_share_a_batch_by_length_only_where_the_model_reads_them(
    tiny, tmp_path, bucketed
):
    lengths = np.full(40, 9)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    train = Sequences(np.ones(offsets[-1], dtype=np.int32), offsets, np.arange(offsets[-1]))
    config = tiny(settings={"train.batch_size": 40, "train.epochs": 1})
    model = Reader()
    model.bucketed = bucketed
    Trainer(model, train, config, tmp_path, CPU, lambda: {"ndcg@10": 0.5}, "data").fit()
    assert len(model.spreads) == 8
    assert (np.mean(model.spreads) < 2) == bucketed
