"""Run folders that nobody shares, and what models are handed."""

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

from experiments import runs
from experiments.requests import REQUEST
from experiments.runs import METRICS, MODELS, VALID_IN_GRAPH, run
from experiments.training import LATEST, Trainer
from main import main
from util import claim

ROOT = Path(__file__).parent.parent


@pytest.fixture
def quick(tmp_path, small_flags) -> list[str]:
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    return ["--mode", "quick", *folders, *small_flags]


def run_folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "save").glob("*"))


# --------------------------------------------------------------------------- what a model is handed


@pytest.mark.parametrize("name", list(MODELS))
def test_stage_one_is_handed_the_train_part_only(name, tiny, task, tmp_path, monkeypatch):
    model_class, handed = runs.model_class(name), []
    prepare = model_class.prepare

    def watched(model, data, generator):
        handed.append(data)
        prepare(model, data, generator)

    monkeypatch.setattr(model_class, "prepare", watched)
    run(tiny(name, {"train.epochs": 0}), task, tmp_path)
    (data,) = handed
    held_out = 2 * task.dataset.sequences.n_users
    assert data.train is task.split.train
    assert len(data.train.items) == len(task.dataset.sequences.items) - held_out
    assert set(data._fields) == {"train", "catalogue", "n_users", "n_items"}
    assert data.catalogue is task.dataset.catalogue


@pytest.mark.parametrize("name", ["dgmrec", "rearm", "ammrm", "sasrec", "popularity"])
def test_graph_models_are_tested_a_second_time_with_the_valid_items(
    name, tiny, task, tmp_path, monkeypatch
):
    model_class, handed = runs.model_class(name), []
    with_interactions = model_class.with_interactions

    def watched(model, interactions):
        handed.append(interactions)
        return with_interactions(model, interactions)

    monkeypatch.setattr(model_class, "with_interactions", watched)
    result = run(tiny(name), task, tmp_path)
    if name in ("sasrec", "popularity"):
        assert VALID_IN_GRAPH not in result
        return
    (interactions,) = handed
    assert interactions is task.split.train_and_valid, "no test target is handed over"
    assert set(result[VALID_IN_GRAPH]) <= set(result["test"])
    assert result[VALID_IN_GRAPH] != {k: result["test"][k] for k in result[VALID_IN_GRAPH]}


# --------------------------------------------------------------------------- small and poor data


@pytest.mark.parametrize("n_users", [1, 2])
def test_a_handful_of_users_is_enough(quick, tmp_path, write_folder, n_users):
    histories = {f"u{user}": ["a", "b", "c", "d", "e"] for user in range(n_users)}
    folder = write_folder(tmp_path / "own", histories)
    assert main([*quick, "--model", "sasrec", "--dataset", str(folder)]) == 0
    (found,) = run_folders(tmp_path)
    speed = json.loads((found / METRICS).read_text())["efficiency"]
    assert speed["latency_p50_ms"] > 0


def test_a_mistake_found_before_training_leaves_no_folder(quick, tmp_path, capsys, write_folder):
    histories = {f"u{user}": ["a", "b", "c", "d"] for user in range(5)}
    folder = write_folder(tmp_path / "own", histories)  # no features to make IDs of
    assert main([*quick, "--model", "rpg", "--dataset", str(folder)]) == 2
    assert "needs item features" in capsys.readouterr().err
    assert not run_folders(tmp_path)


# --------------------------------------------------------------------------- two at once


@pytest.fixture
def interrupted(quick, tmp_path, monkeypatch) -> tuple[Path, list[str]]:
    """A run stopped after one step, and the flags it had."""
    flags = [*quick, "--model", "sasrec"]
    with monkeypatch.context() as patch:
        step = Trainer._step
        patch.setattr(
            Trainer, "_step", lambda *given: (step(*given), signal.raise_signal(signal.SIGTERM))
        )
        assert main(flags) == 130
    (folder,) = run_folders(tmp_path)
    return folder, flags


def test_a_run_that_is_going_on_is_not_resumed(interrupted, tmp_path, capsys):
    folder, flags = interrupted
    before = (folder / LATEST).read_bytes()
    with claim(folder / REQUEST):  # as another process would
        assert main([*flags, "--resume", str(folder)]) == 2
        assert "another process is working on that run" in capsys.readouterr().err
        assert main([*flags, "--resume"]) == 0
        assert "starting afresh" in capsys.readouterr().err
    assert (folder / LATEST).read_bytes() == before
    assert len(run_folders(tmp_path)) == 2
    assert main([*flags, "--resume"]) == 0  # let go: now it can be finished
    assert (folder / METRICS).exists() and len(run_folders(tmp_path)) == 2


def test_a_run_holds_its_folder_while_it_trains(quick, tmp_path, monkeypatch):
    holds, step = [], Trainer._step

    def watched(*given):
        step(*given)
        (folder,) = run_folders(tmp_path)
        holds.append(claim(folder / REQUEST) is None)

    monkeypatch.setattr(Trainer, "_step", watched)
    assert main([*quick, "--model", "sasrec"]) == 0
    assert holds and all(holds)
    (folder,) = run_folders(tmp_path)
    with claim(folder / REQUEST) as free:
        assert free is not None


@pytest.mark.parametrize("content", [b"\xff\xfe", b"flags: abc\noverlay: {}\n", b"- 1\n", b""])
def test_a_request_nobody_can_read_does_not_block_resume(quick, tmp_path, content):
    broken = tmp_path / "save" / "quick_mock_broken"
    broken.mkdir(parents=True)
    (broken / "unfinished").touch()
    (broken / REQUEST).write_bytes(content)
    assert main([*quick, "--model", "popularity", "--resume"]) == 0
    assert main([*quick, "--model", "popularity", "--resume", str(broken)]) == 2


# --------------------------------------------------------------------------- several processes


def children(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "main.py" in line]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(quick, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    flags = [*quick, "--model", "sasrec", "--epochs", "5000", "--set", "train.patience=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "main.py", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("save/*/epochs.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(max(children(process)), signal.SIGTERM)  # not the one that writes checkpoints
    said = process.communicate(timeout=120)[0]
    assert said.count("Stopped. Add --resume") == 2, said[-2000:]
    assert "RuntimeError" not in said
    (folder,) = run_folders(tmp_path)
    progress = torch.load(folder / LATEST, weights_only=True)["progress"]
    assert np.isfinite(progress["seconds"]) and progress["global_step"] > 0
