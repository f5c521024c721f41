"""Mode full: one command, stopped and resumed, ends with a folder and a report of everything."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from config import build_config
from experiments import full
from experiments.case_study import CASES
from experiments.document import Section, write_document
from experiments.full import SIZES, _mock_of_size, measure_sizes, sizes
from experiments.requests import Request
from experiments.runs import METRICS, load_model, model_class
from experiments.tables import Column, Table
from experiments.training import Trainer
from main import main

pytest.importorskip("optuna")
ROOT = Path(__file__).parent.parent
MODELS = ("popularity", "pmat", "pmat_mcrl")
ABLATION = {"even weights": {"pmat.personalised": "none"}}
EXPECTED = [
    "popularity_seed42", "pmat_seed42", "pmat_mcrl_seed42", "pmat--even-weights_seed42",
    "pmat_mcrl--even-weights_seed42", "pmat_0", "pmat_1", "pmat--tuned_seed42",
]  # fmt: skip


@pytest.fixture
def flags(mode_flags, monkeypatch) -> list[str]:
    for name in ("pmat", "pmat_mcrl"):
        monkeypatch.setattr(model_class(name), "ablations", ABLATION)
    more = ("full.sizes=50,60", "mcrl.stage_one_epochs=1", "pmat.beta=0.0")
    extra = [part for setting in more for part in ("--set", setting)]
    names = ["--model", ",".join(MODELS), "--trials", "2"]
    return ["--mode", "full", *names, *mode_flags, *extra]


# --------------------------------------------------------------------------- all of it


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_flags, make_outputs_fast) -> Path:
    """The folder of a finished mode full."""
    place = tmp_path_factory.mktemp("full")
    folders = [f"--{name}_dir={place / name}" for name in ("save", "log", "data")]
    with pytest.MonkeyPatch.context() as patch:
        make_outputs_fast(patch)
        for name in ("pmat", "pmat_mcrl"):
            patch.setattr(model_class(name), "ablations", ABLATION)
        arguments = ["--mode", "full", "--model", ",".join(MODELS), "--trials", "2", "--epochs",
                     "1", *folders, *small_flags, "--set", "full.sizes=50,60",
                     "--set", "pmat.with_behaviour=true"]  # fmt: skip
        assert main(arguments) == 0
    (folder,) = (path for path in (place / "save").iterdir() if path.is_dir())
    return folder


class Links(HTMLParser):
    """What a page loads or points at, and whether its tags balance."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.open, self.tags = [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_with_everything_in_it(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    found = Links()
    found.feed(page)
    assert not found.open
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.links)
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert found.tags["img"] >= 10 and found.tags["table"] >= 9
    for title in ("Comparison of models", "Groups of users", "Ablations", "MCRL",
                  "Search", "Semantic IDs", "Drift of interest", "Efficiency",
                  "Case study"):  # fmt: skip
        assert f"{title}" in page
    assert str(finished.parent.parent) not in page, "no path of this machine"
    markdown = (finished / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == found.tags["img"]
    assert all((finished / picture).exists() for picture in pictures)


def test_every_table_of_the_report_says_how_it_was_measured(finished):
    markdown = (finished / "report.md").read_text(encoding="utf-8")
    captions = re.findall(r"^\*\*(.+?)\.\*\* (.+)$", markdown, flags=re.M)
    assert len(captions) >= 9
    for title, text in captions:
        assert "bold" in text, title
        if "catalogue size" not in title:  # that one measures time on mock catalogues
            for word in ("60 users", "leave-one-out", "masked", "equal scores", "seed 42"):
                assert word in text, (title, word)


def test_every_part_left_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"baseline_results.csv", "ablation_results.tex", "latency_by_size.pdf",
                     "mcrl_losses.png", "mcrl_comparison.md", "case_study.json"}  # fmt: skip
    assert (finished / "hyper" / "hyper_results.csv").exists()
    assert not (finished / "unfinished").exists()
    checkpoints = {path.name for path in (finished.parent.parent / "checkpoints").iterdir()}
    assert {name.split("_mock")[0] for name in checkpoints} == {
        "MCRL_Exp_PMAT_only", "MCRL_Exp_PMAT_MCRL_joint",
    }  # fmt: skip
    assert list(finished.parent.glob("mcrl_experiment_mock_*.json"))
    speed = json.loads((finished / SIZES).read_text())
    assert set(speed) == set(MODELS)
    assert [row["items"] for row in speed["pmat"]] == [50, 60]


def test_the_case_study_is_true(finished, task):
    content = json.loads((finished / CASES).read_text())
    place = finished / f"{content['model']}_seed42"
    model, _ = load_model(place, task.dataset.catalogue)
    ids = task.dataset.user_ids.tolist()
    items = task.dataset.catalogue.item_ids.tolist()
    histories = task.split.train_and_valid
    weights = pd.read_csv(place / "modality_weights.csv").set_index("user_id")
    for case in content["users"]:
        user = ids.index(case["user_id"])
        seen = [items[item - 1] for item in histories.of(user)]
        assert [item["item_id"] for item in case["history"]] == seen[-5:]
        listed = [item["item_id"] for item in case["recommended"]]
        assert len(set(listed)) == 5 and not set(listed) & set(seen)
        target = items[task.split.test.items[user] - 1]
        assert [item["item_id"] for item in case["target"]] == [target]
        assert [item["is_target"] for item in case["recommended"]] == [i == target for i in listed]
        for name, value in case["weights"].items():
            assert value == pytest.approx(weights.loc[case["user_id"], name], abs=1e-4)
    codes = np.array(content["item"]["ids"])
    assert codes.shape == (len(content["users"]), 8) and (codes < model.n_codes).all()


def test_report_mode_rebuilds_the_report(finished, tmp_path, monkeypatch, fast_outputs):
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    made = {name: (copy / name).read_bytes() for name in ("report.md", "report.html")}
    tables = {path: path.read_bytes() for path in copy.rglob("*.csv")}
    for path in copy.glob("*.*"):
        if path.is_file() and path.name not in ("request.yaml", SIZES, CASES):
            path.unlink()

    def refuse(*_):
        raise AssertionError("mode report must not train")

    monkeypatch.setattr(Trainer, "fit", refuse)
    assert main(["--mode", "report", "--from", str(copy), f"--log_dir={tmp_path}"]) == 0
    assert (copy / "report.md").read_bytes() == made["report.md"]
    assert {path: path.read_bytes() for path in tables} == tables
    assert (copy / "report.html").read_bytes() == made["report.html"]


# --------------------------------------------------------------------------- stopped and broken


def test_a_stopped_run_repeats_nothing(flags, tmp_path, monkeypatch, newest, fast_outputs):
    finished, fit, stops = [], Trainer.fit, [2, 4, 6]

    def train(trainer):
        if len(finished) in stops:
            stops.remove(len(finished))
            raise KeyboardInterrupt
        fit(trainer)
        finished.append(trainer.folder.name)

    monkeypatch.setattr(Trainer, "fit", train)
    for _ in range(3):
        assert main([*flags, "--resume"]) == 130
    assert main([*flags, "--resume"]) == 0
    assert finished == EXPECTED
    assert len(list((tmp_path / "save").glob("full_*"))) == 1
    assert not (newest(tmp_path) / "unfinished").exists()


@pytest.mark.slow
def test_a_model_that_crashes_is_named_in_the_report(
    flags, tmp_path, monkeypatch, newest, fast_outputs
):
    fit = Trainer.fit

    def broken(trainer):
        if trainer.model.name == "pmat_mcrl":
            raise RuntimeError("out of memory")
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", broken)
    assert main(flags) == 1
    folder = newest(tmp_path)
    said = (folder / "report.md").read_text()
    assert "Not finished, so missing from the tables: pmat_mcrl--even-weights_seed42, " in said
    assert "| pmat |" in said and "even weights" in said and "Search" in said
    assert (folder / "unfinished").exists()
    monkeypatch.setattr(Trainer, "fit", fit)
    assert main([*flags, "--resume"]) == 0
    assert "Not finished" not in (folder / "report.md").read_text()


@pytest.mark.slow
def test_killed_with_nine_and_resumed(tmp_path, small_flags):
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    arguments = [sys.executable, "main.py", "--mode", "full", "--model", "popularity,sasrec,pmat",
                 "--trials", "2", "--epochs", "1", *folders, *small_flags,
                 "--set", "full.sizes=50", "--set", "pmat.latent=32", "--resume"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(done(tmp_path)) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done(tmp_path)
    assert len(before) >= 4
    assert subprocess.run(arguments, cwd=ROOT, env=environment).returncode == 0
    after = done(tmp_path)
    assert {path: after[path] for path in before} == before, "what was finished is untouched"
    ablations = len(model_class("pmat").ablations) - 1  # mock has no behaviour to leave out
    assert len(after) == 3 + ablations + 1
    (report,) = tmp_path.glob("save/*/report.html")
    assert report.stat().st_size > 100_000


def done(tmp_path: Path) -> dict[Path, int]:
    found = tmp_path.glob(f"save/**/{METRICS}")
    return {path: path.stat().st_mtime_ns for path in found}


# --------------------------------------------------------------------------- small things


def test_full_on_mock_is_moderate():
    config = build_config({"run.mode": "full"})
    assert config.mock.n_users <= 300 and config.hyper.trials <= 10 and config.run.seeds == 1
    asked = build_config({"run.mode": "full", "mock.n_users": 700})
    assert asked.mock.n_users == 700, "what the user says wins"
    assert build_config({"run.mode": "baseline"}).mock.n_users == 600


def test_sizes_are_measured_on_mock_data_whatever_the_data_set_wants(task):
    config = build_config({"data.dataset": "own/folder", "data.k_core": 5, "data.min_rating": 4.0})
    made = _mock_of_size(config, task, 30).dataset
    assert made.catalogue.n_items == 30
    assert made.catalogue.modalities.keys() == task.dataset.catalogue.modalities.keys()


def test_latency_is_measured_again_on_another_machine(finished, task, tmp_path, monkeypatch):
    content = json.loads((finished / SIZES).read_text())
    content["pmat"] = []  # it failed
    content["pmat_mcrl"] = [row | {"machine": "another GPU"} for row in content["pmat_mcrl"]]
    (tmp_path / SIZES).write_text(json.dumps(content))
    measured = []
    monkeypatch.setattr(
        full, "_sizes_of", lambda config, *_: measured.append(config.run.model) or [{"new": 1}]
    )
    measure_sizes(Request({}, {}, None), MODELS, task, tmp_path)
    again = json.loads((tmp_path / SIZES).read_text())
    assert measured == ["pmat", "pmat_mcrl"]
    assert again == content | {"pmat": [{"new": 1}], "pmat_mcrl": [{"new": 1}]}


def test_sizes_are_numbers(capsys, flags, tmp_path):
    assert sizes(build_config({"full.sizes": "300, 20"})) == [20, 300]
    assert main([*flags, "--set", "full.sizes=many"]) == 2
    assert "full.sizes wants numbers" in capsys.readouterr().err
    assert not (tmp_path / "save").exists(), "said before hours of training"


def test_text_of_a_report_is_escaped(tmp_path):
    frame = pd.DataFrame({"model": ["<b>&"], "x": [1.0]})
    table = Table("t", "T", "<script>", [Column("model", "Model", "s"), Column("x", "X")], frame)
    write_document(tmp_path, "A & B", [Section("<S>", ["1 < 2"], [table]), Section("empty", [])])
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;b&gt;&amp;" in page and "1 &lt; 2" in page
    assert "empty" not in page
    Links().feed(page)
