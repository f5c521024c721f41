"""Mode hyper: trials that are done are never done again, and none of them sees test."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from config import build_config
from data_utils import leave_one_out, split_dataset
from experiments import search
from experiments.requests import Request
from experiments.runs import Task, model_class
from experiments.search import Pruned, Search, best_changes, open_study, without_test
from experiments.training import LATEST, Trainer
from main import main
from util import UserError, claim

optuna = pytest.importorskip("optuna")
SPACE = {
    "train.clip": (0.5, 2.0, "log"),
    "sasrec.dropout": [0.2, 0.5],
    "train.warmup_steps": (0, 4),
}


@pytest.fixture(autouse=True)
def _small_search(monkeypatch, fast_outputs):
    monkeypatch.setattr(model_class("sasrec"), "search_space", SPACE)
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)


@pytest.fixture
def flags(mode_flags) -> list[str]:
    return ["--mode", "hyper", "--model", "sasrec", "--trials", "4", *mode_flags]


def trials_in(folder: Path) -> list:
    return open_study(folder, "sasrec").trials


def places(folder: Path, state: str) -> list[str]:
    return [t.user_attrs["place"] for t in trials_in(folder) if t.state.name == state]


# --------------------------------------------------------------------------- a whole search


def test_a_search_ends_with_the_best_settings_tested_once(flags, tmp_path, trained, newest):
    assert main(flags) == 0
    folder = newest(tmp_path)
    assert trained == [f"sasrec_{n}" for n in range(4)] + ["sasrec--tuned_seed42"]
    trials = trials_in(folder)
    assert trials[0].params == {
        "train.clip": 1.0, "sasrec.dropout": 0.2, "train.warmup_steps": 0,
    }, "trial 0 is the preset"  # fmt: skip
    assert all(0.5 <= trial.params["train.clip"] <= 2 for trial in trials)
    assert len({trial.params["train.clip"] for trial in trials}) == 4
    for trial in trials:
        rows = (folder / trial.user_attrs["place"] / "epochs.jsonl").read_text().splitlines()
        valid = [json.loads(row)["valid"]["ndcg@10"] for row in rows]
        assert trial.value == pytest.approx(max(valid))
        assert not (folder / trial.user_attrs["place"] / "metrics.json").exists()
    best = max(trials, key=lambda trial: trial.value)
    tuned = json.loads((folder / "sasrec--tuned_seed42" / "metrics.json").read_text())
    table = pd.read_csv(folder / "hyper_results.csv").iloc[0]
    assert table["best trial"] == pytest.approx(best.value)
    assert table["preset"] == pytest.approx(trials[0].value)
    assert table["ndcg@10"] == pytest.approx(tuned["test"]["ndcg@10"])
    stored = (folder / "sasrec--tuned_seed42" / "config.yaml").read_text()
    assert f"clip: {best.params['train.clip']}" in stored
    content = json.loads((tmp_path / "save" / "hyper_results.json").read_text())
    assert len(content["sasrec"]["trials"]) == 4 and content["sasrec"]["best"] == best.params
    assert {f"hyper_sasrec_{what}.png" for what in ("history", "slices", "importance")} <= {
        path.name for path in folder.glob("*.png")
    }
    assert not (folder / "unfinished").exists()


@pytest.mark.slow
def test_more_trials_are_added_to_a_study(flags, tmp_path, trained, newest):
    assert main(flags) == 0
    folder = newest(tmp_path)
    before = [trial.params for trial in trials_in(folder)]
    trained.clear()
    assert main([*flags[:4], "--trials", "6", *flags[6:], "--resume", str(folder)]) == 0
    assert trained == ["sasrec_4", "sasrec_5"], "neither old trials nor the tested run again"
    after = [trial.params for trial in trials_in(folder)]
    assert after[:4] == before and len(after) == 6
    assert not [params for params in after[4:] if params in before], "no trial is drawn twice"


def test_better_settings_found_later_are_tested_in_place_of_the_old_ones(
    flags, tmp_path, trained, newest, capsys
):
    assert main(flags) == 0
    folder = newest(tmp_path)
    study = open_study(folder, "sasrec")
    better = {"train.clip": 1.5, "sasrec.dropout": 0.5, "train.warmup_steps": 1}
    spaces = trials_in(folder)[0].distributions
    study.add_trial(optuna.trial.create_trial(
        params=better, distributions=spaces, value=0.9, user_attrs={"place": "trials/sasrec_4"},
    ))  # fmt: skip
    trained.clear()
    capsys.readouterr()
    own = [flag for flag in flags if flag.startswith(("--log_dir", "--data_dir"))]
    main(["--mode", "report", "--from", str(folder), *own])
    assert "better settings than those tested" in capsys.readouterr().err
    assert main([*flags, "--resume", str(folder)]) == 0
    assert trained == ["sasrec--tuned_seed42"]
    assert "clip: 1.5" in (folder / "sasrec--tuned_seed42" / "config.yaml").read_text()


@pytest.mark.slow
def test_the_same_seed_searches_the_same_way(flags, tmp_path, newest):
    assert main(flags) == 0
    first = newest(tmp_path)
    assert main(flags) == 0
    second = newest(tmp_path)
    assert first != second
    one, two = ([(t.params, t.value) for t in trials_in(place)] for place in (first, second))
    assert one == two


# --------------------------------------------------------------------------- stopped and resumed


def test_a_stopped_trial_goes_on_from_its_checkpoint(flags, tmp_path, monkeypatch, newest):
    flags = [*flags, "--epochs", "3"]
    with monkeypatch.context() as patch:
        save, seen = Trainer.save, []

        def stop_in_the_second_trial(trainer):
            save(trainer)
            seen.append(trainer.folder.name)
            if seen.count("sasrec_1") == 2:  # after its second epoch
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Trainer, "save", stop_in_the_second_trial)
        assert main(flags) == 130
    folder = newest(tmp_path)
    assert places(folder, "RUNNING") == ["trials/sasrec_1"]
    settings = trials_in(folder)[1].params
    epochs = []
    end = Trainer._end_epoch
    monkeypatch.setattr(
        Trainer,
        "_end_epoch",
        lambda self, epoch, watch: (
            epochs.append((self.folder.name, epoch)), end(self, epoch, watch),
        ),
    )  # fmt: skip
    assert main([*flags, "--resume"]) == 0
    assert epochs[0] == ("sasrec_1", 2), "epochs 0 and 1 are not trained again"
    assert "sasrec_0" not in {name for name, _ in epochs}
    done = {t.user_attrs["place"]: t for t in trials_in(folder) if t.state.name == "COMPLETE"}
    assert sorted(done) == [f"trials/sasrec_{n}" for n in (0, 1, 3, 4)]  # 2 is the revived one
    revived = done["trials/sasrec_1"]
    assert revived.params == settings and sorted(revived.intermediate_values) == [1, 2, 3]
    assert not list(folder.glob(f"trials/*/{LATEST}"))


def test_a_trial_of_a_living_process_is_left_alone(tmp_path, mode_flags, tiny, task):
    request = asked(mode_flags)
    one, two = (Search(request, task, tmp_path, "sasrec") for _ in range(2))
    first, second = one._next(), two._next()
    assert first.place != second.place and first.changes != second.changes
    assert len(places(tmp_path, "RUNNING")) == 2
    one.lock.close()  # as when its process dies
    again = two._next()
    assert again.place == first.place and again.changes == first.changes
    assert len(places(tmp_path, "RUNNING")) == 2


def test_a_trial_that_died_before_its_settings_were_asked_for_tries_the_same(
    tmp_path, mode_flags, task
):
    request = asked(mode_flags)
    one, two = (Search(request, task, tmp_path, "sasrec") for _ in range(2))
    told = {"sasrec.dropout": 0.5, "train.clip": 1.25, "train.warmup_steps": 3}
    one.study.enqueue_trial(told)
    one.study.ask()  # and dies
    assert two._next().changes == told


def asked(flags: list[str], **more: object) -> Request:
    pairs = [f.split("=", 1) for f in flags if "." in f and "=" in f and not f.startswith("--")]
    return Request(dict(pairs) | {"run.model": "sasrec", "hyper.trials": 3} | more, {}, None)


@pytest.mark.slow
def test_another_process_can_help(flags, tmp_path, newest, monkeypatch, trained, capsys):
    assert main(flags) == 0
    folder = newest(tmp_path)
    request = folder / "request.yaml"
    request.write_text(request.read_text().replace("hyper.trials: 4", "hyper.trials: 6"))
    trained.clear()
    helper = ["--mode", "hyper", "--set", f"hyper.join={folder}", "--log_dir", str(tmp_path)]
    with claim(request):  # the owner is at work
        assert main(helper) == 0
    assert trained == ["sasrec_4", "sasrec_5"], "trials only: the owner tests the best"
    assert newest(tmp_path) == folder
    assert main([*helper[:3], f"hyper.join={tmp_path}", *helper[4:]]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert main([*helper, "--lr", "0.5"]) == 2
    assert f"hyper.join={folder}: that run has train.lr" in capsys.readouterr().err


def test_the_owner_waits_for_trials_in_other_hands(tmp_path, mode_flags, task, monkeypatch):
    request = asked(mode_flags)
    mine, other = (Search(request, task, tmp_path, "sasrec") for _ in range(2))
    plan = other._next()
    naps = []

    def nap(seconds):  # the other one finishes meanwhile
        naps.append(seconds)
        other._train(plan)

    monkeypatch.setattr(search.time, "sleep", nap)
    mine.work(wait=True)
    assert len(naps) == 1 and len(places(tmp_path, "COMPLETE")) == 3


# --------------------------------------------------------------------------- pruning and failures


def test_a_trial_below_the_median_is_pruned(tmp_path, mode_flags, task, monkeypatch):
    request = asked(mode_flags, **{"hyper.startup": 2, "hyper.trials": 3, "train.epochs": 3})
    values = {"sasrec_0": [0.3, 0.3, 0.3], "sasrec_1": [0.2, 0.3, 0.3], "sasrec_2": [0.1, 0.9, 1]}

    def scripted(config, task, place, watch):
        rows = []
        for epoch, value in enumerate(values[place.name]):
            rows.append({"epoch": epoch + 1, "valid": {"ndcg@10": value}})
            watch(rows)
        progress = type("Progress", (), {"best": max(values[place.name])})
        return type("Trained", (), {"trainer": type("T", (), {"progress": progress})})

    monkeypatch.setattr(search, "train", scripted)
    Search(request, task, tmp_path, "sasrec").work(wait=True)
    states = [trial.state.name for trial in trials_in(tmp_path)]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert trials_in(tmp_path)[2].intermediate_values == {1: 0.1}, "cut off after one epoch"
    assert best_changes(tmp_path, "sasrec") == trials_in(tmp_path)[0].params


def test_pruning_reaches_through_the_loop(tmp_path, tiny, task):
    config = tiny("sasrec", {"train.epochs": 5})

    def watch(rows):
        if len(rows) == 2:
            raise Pruned

    with pytest.raises(Pruned):
        search.train(config, without_test(task), tmp_path, watch)
    assert len((tmp_path / "epochs.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_trial_that_crashes_counts_and_the_others_go_on(
    flags, tmp_path, monkeypatch, newest, capsys
):
    fit = Trainer.fit

    def broken(trainer):
        if trainer.folder.name == "sasrec_1":
            raise RuntimeError("out of memory")
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", broken)
    assert main(flags) == 0
    assert "sasrec_1 failed: out of memory" in capsys.readouterr().err
    states = [trial.state.name for trial in trials_in(newest(tmp_path))]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_search_without_a_finished_trial_is_a_failure(flags, monkeypatch, capsys):
    def broken(trainer):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "fit", broken)
    assert main(flags) == 1
    assert "no trial has finished" in capsys.readouterr().err


# --------------------------------------------------------------------------- no look at test


def test_trials_never_see_test(tmp_path, mode_flags, task):
    blind = without_test(task)
    kept = leave_one_out(task.dataset.sequences) < 2
    assert np.array_equal(blind.dataset.sequences.items, task.dataset.sequences.items[kept])
    assert np.array_equal(blind.split.test.items, task.split.valid.items)
    assert blind.split.train_and_valid is task.split.train

    sequences = task.dataset.sequences
    items = sequences.items.copy()
    last = leave_one_out(sequences) == 2
    items[last] = np.random.default_rng(0).integers(1, 51, last.sum())
    dataset = task.dataset._replace(sequences=sequences._replace(items=items))
    other = Task(dataset, split_dataset(dataset))
    studies = []
    for name, one in (("a", task), ("b", other)):
        Search(asked(mode_flags), one, tmp_path / name, "sasrec").work(wait=True)
        studies.append([(t.params, t.value) for t in trials_in(tmp_path / name)])
    assert studies[0] == studies[1]


# --------------------------------------------------------------------------- mistakes


def test_settings_of_the_command_are_not_searched(tmp_path, mode_flags, task):
    request = asked(mode_flags, **{"train.clip": 0.7})
    plan = Search(request, task, tmp_path, "sasrec")._next()
    assert set(plan.changes) == {"sasrec.dropout", "train.warmup_steps"}
    assert request.config("sasrec", plan.changes).train.clip == 0.7


def test_trials_on_other_data_are_not_mixed(tmp_path, mode_flags, task):
    Search(asked(mode_flags), task, tmp_path, "sasrec")
    Search(asked(mode_flags), task, tmp_path, "sasrec")  # the same again is welcome
    items = task.dataset.sequences.items.copy()
    items[0] = items[0] % 50 + 1
    dataset = task.dataset._replace(sequences=task.dataset.sequences._replace(items=items))
    with pytest.raises(UserError, match="made on other data"):
        Search(asked(mode_flags), Task(dataset, split_dataset(dataset)), tmp_path, "sasrec")


def test_a_missing_package_is_one_sentence(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "error: mode hyper needs the package optuna: pip install optuna."
    assert not (tmp_path / "save").exists()


def test_a_model_without_a_search_space_is_refused(flags, capsys, tmp_path):
    assert main([*flags, "--model", "popularity"]) == 2
    assert "declares no search space" in capsys.readouterr().err


@pytest.mark.parametrize("trials", ["0", "many"])
def test_a_number_of_trials_that_cannot_be(flags, trials, capsys):
    assert main([*flags, "--trials", trials]) == 2
    assert "trials" in capsys.readouterr().err


def test_the_default_number_of_trials():
    assert build_config({"run.mode": "hyper"}).hyper.trials == 20
