"""What a user types and what comes back: files, tables, one-line errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import runs
from experiments.runs import load_model, load_ranks, load_trained
from main import main
from metrics import ranking_metrics
from util import UserError


@pytest.fixture
def folders(tmp_path) -> list[str]:
    return [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]


@pytest.fixture
def quick(folders, small_flags) -> list[str]:
    return ["--mode", "quick", *folders, *small_flags]


@pytest.fixture
def baseline(folders, small_flags) -> list[str]:
    return ["--mode", "baseline", "--epochs", "1", *folders, *small_flags]


def run_folders(tmp_path: Path) -> list[Path]:
    save = tmp_path / "save"
    return sorted(path for path in save.glob("*") if path.is_dir()) if save.exists() else []


# --------------------------------------------------------------------------- quick


@pytest.mark.parametrize("model", ["popularity", "sasrec"])
def test_quick_writes_a_run_folder_and_prints_a_table(quick, tmp_path, capsys, model):
    assert main([*quick, "--model", model]) == 0
    (folder,) = run_folders(tmp_path)
    assert folder.name.startswith("quick_mock_")
    result = json.loads((folder / "metrics.json").read_text())
    assert {
        "model", "dataset", "seed", "protocol", "valid", "test", "id_quality", "efficiency",
        "environment",
    } <= set(result)  # fmt: skip
    assert result["model"] == model and result["seed"] == 42
    assert set(result["dataset"]) == {"name", "users", "items", "interactions", "crc32"}
    assert result["dataset"]["users"] == 60
    assert result["protocol"]["mask_seen"] is True and result["protocol"]["tie_policy"] == "file"
    wanted = {f"{name}@{k}" for name in ("recall", "ndcg") for k in (5, 10, 20)}
    wanted |= {"mrr", "hit_rate@10"}
    assert wanted <= set(result["valid"]) and wanted <= set(result["test"])
    assert {"coverage@10", "cold_recall@10"} <= set(result["test"])
    assert {"parameters", "latency_p50_ms", "peak_memory_mb"} <= set(result["efficiency"])
    assert {"python", "torch", "device"} <= set(result["environment"])
    printed = capsys.readouterr().out
    assert model in printed and "ndcg@10" in printed and str(folder) in printed
    assert f"{result['test']['ndcg@10']:.4f}" in printed
    assert (tmp_path / "log" / "experiment.log").exists()
    kept = {path.name for path in folder.iterdir()}
    assert kept >= {"config.yaml", "ranks.npz", "best.pt"}
    assert not kept & {"checkpoint.pt", "unfinished"}
    assert not [name for name in kept if name.startswith(".")]


def test_stored_ranks_give_the_reported_metrics(quick, tmp_path):
    assert main([*quick, "--model", "sasrec", "--no-mask_seen"]) == 0
    (folder,) = run_folders(tmp_path)
    result = json.loads((folder / "metrics.json").read_text())
    assert result["protocol"]["mask_seen"] is False
    for name, mask_seen in (("masked", True), ("unmasked", False)):
        found = ranking_metrics(load_ranks(folder / "ranks.npz", mask_seen))
        assert found == pytest.approx(result["test_by_masking"][name])
    assert result["test"]["mrr"] == result["test_by_masking"]["unmasked"]["mrr"]
    with np.load(folder / "ranks.npz") as stored:
        assert stored["user_ids"][0] == "u1" and len(stored["user_ids"]) == 60


def test_a_stored_run_loads_again(quick, tmp_path, task):
    assert main([*quick, "--model", "sasrec"]) == 0
    (folder,) = run_folders(tmp_path)
    model, config = load_model(folder, task.dataset.catalogue)
    assert config.sasrec.width == 16 and not model.training
    stored = torch.load(folder / "best.pt", weights_only=True)
    stored["model"].popitem()
    torch.save(stored, folder / "best.pt")  # as of a version in which the model had less
    with pytest.raises(UserError, match="does not fit sasrec as it is now"):
        load_model(folder, task.dataset.catalogue)


def test_a_folder_of_own_data_works_until_it_changes(
    folders, small_flags, tmp_path, write_folder, capsys
):
    histories = {f"u{u}": [f"i{(u + t) % 9}" for t in range(6)] for u in range(20)}
    features = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    folder = write_folder(tmp_path / "own", histories, text=features)
    arguments = ["--dataset", str(folder), "--model", "sasrec", *folders, *small_flags]
    assert main(arguments) == 0
    (found,) = run_folders(tmp_path)
    assert found.name.startswith("quick_own_")
    assert json.loads((found / "metrics.json").read_text())["dataset"]["interactions"] == 120
    load_trained(found)
    np.save(folder / "text.npy", features[::-1])
    with pytest.raises(UserError, match="made on other data"):
        load_trained(found)
    (found / "unfinished").touch()
    assert main(["--mode", "quick", "--resume", str(found)]) == 2
    assert "made on other data" in capsys.readouterr().err


def test_a_reader_that_has_gone_costs_no_table(tmp_path, small_flags):
    folders = [f"--{name}_dir={tmp_path / name}" for name in ("save", "log", "data")]
    process = subprocess.Popen(
        [sys.executable, "main.py", "--mode", "baseline", "--model", "popularity", *folders,
         *small_flags],
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Traceback" not in said
    (folder,) = (path for path in (tmp_path / "save").iterdir() if path.is_dir())
    assert (folder / "baseline_results.md").exists() and not (folder / "unfinished").exists()
    process.stderr.close()


def test_two_runs_of_one_second_get_two_folders(quick, tmp_path):
    assert main([*quick, "--model", "popularity"]) == 0
    assert main([*quick, "--model", "popularity"]) == 0
    assert len(run_folders(tmp_path)) == 2


def test_settings_come_from_yaml_set_and_flags(quick, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 0.5, clip: 7}\nrun: {model: popularity}\n")
    arguments = [*quick, "--config", str(path), "--set", "train.clip=8", "--lr", "0.25"]
    assert main(arguments) == 0
    (folder,) = run_folders(tmp_path)
    stored = (folder / "config.yaml").read_text()
    assert "clip: 8.0" in stored and "model: popularity" in stored


def test_an_explicit_flag_beats_set(quick, tmp_path):
    arguments = [*quick, "--model", "popularity", "--epochs", "7", "--set", "train.epochs=9"]
    assert main(arguments) == 0
    (folder,) = run_folders(tmp_path)
    assert "epochs: 7" in (folder / "config.yaml").read_text()


# --------------------------------------------------------------------------- baseline


def test_baseline_compares_models_and_seeds(baseline, tmp_path, capsys):
    assert main([*baseline, "--model", "popularity, sasrec", "--seeds", "2"]) == 0
    (folder,) = run_folders(tmp_path)
    names = ["popularity_seed42", "popularity_seed43", "sasrec_seed42", "sasrec_seed43"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names
    for place in (folder, tmp_path / "save"):
        table = pd.read_csv(place / "baseline_results.csv")
        assert set(table["model"]) == {"popularity", "sasrec"} and (table["seeds"] == 2).all()
        assert table["ndcg@10"].is_monotonic_decreasing
        content = json.loads((place / "baseline_results.json").read_text())
        assert len(content["runs"]) == 4 and "full ranking" in content["caption"]
        tex = (place / "baseline_results.tex").read_text()
        assert r"\toprule" in tex and "sasrec" in tex and tex.count(r"\textbf") >= 1
    compared = table.set_index("model")["p (Holm)"]
    assert compared.notna().sum() == 1, "the best model is not compared with itself"
    seeds = [json.loads((folder / name / "metrics.json").read_text()) for name in names]
    assert seeds[2]["test"] != seeds[3]["test"], "another seed is another run"
    assert capsys.readouterr().out.count("sasrec") == 2


def test_a_model_that_crashes_is_reported_and_the_others_go_on(
    baseline, tmp_path, monkeypatch, capsys
):
    class Crash(torch.nn.Module):
        def __init__(self, config, catalogue=None):
            raise RuntimeError("this model is broken")

    module = types.ModuleType("crashing")
    module.Crash = Crash
    monkeypatch.setitem(sys.modules, "crashing", module)
    monkeypatch.setitem(runs.MODELS, "crash", "crashing:Crash")
    assert main([*baseline, "--model", "popularity,crash,sasrec"]) == 1
    captured = capsys.readouterr()
    assert "crash failed: this model is broken" in captured.err
    (folder,) = run_folders(tmp_path)
    table = pd.read_csv(folder / "baseline_results.csv")
    assert set(table["model"]) == {"popularity", "sasrec"}
    said = (folder / "baseline_results.md").read_text()
    assert "Failed or not finished: crash_seed42." in said
    assert (folder / "unfinished").exists(), "--resume tries the broken one again"


def test_resuming_a_baseline_keeps_what_is_finished(baseline, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("crashing")  # has no class of that name
    monkeypatch.setitem(sys.modules, "crashing", module)
    original = runs.MODELS["sasrec"]
    arguments = [*baseline, "--model", "popularity,sasrec"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "fit", broken_for("sasrec", runs.Trainer.fit))
        assert main(arguments) == 1
    (folder,) = run_folders(tmp_path)
    first = (folder / "popularity_seed42" / "metrics.json").stat().st_mtime_ns
    assert main([*arguments, "--resume"]) == 0
    assert run_folders(tmp_path) == [folder]
    assert (folder / "popularity_seed42" / "metrics.json").stat().st_mtime_ns == first
    assert not (folder / "unfinished").exists()
    assert runs.MODELS["sasrec"] == original


def half_done(arguments: list[str], tmp_path: Path, monkeypatch) -> Path:
    """The folder of a baseline of popularity and sasrec in which sasrec is still to be trained."""
    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "fit", broken_for("sasrec", runs.Trainer.fit))
        assert main([*arguments, "--model", "popularity,sasrec"]) == 1
    (folder,) = run_folders(tmp_path)
    return folder


def test_resuming_refuses_runs_that_were_finished_with_other_settings(
    baseline, tmp_path, monkeypatch, capsys
):
    folder = half_done(baseline, tmp_path, monkeypatch)
    stored = folder / "popularity_seed42" / "config.yaml"  # as after an edit of config.py
    stored.write_text(stored.read_text().replace("mask_seen: true", "mask_seen: false"))
    assert main(["--resume", str(folder), f"--log_dir={tmp_path / 'log'}"]) == 2
    assert "train.mask_seen=False, not True" in capsys.readouterr().err


def test_resuming_takes_flags_that_say_the_same(baseline, tmp_path, monkeypatch, capsys):
    folder = half_done(baseline, tmp_path, monkeypatch)
    again = ["--resume", str(folder), f"--log_dir={tmp_path / 'log'}"]
    assert main([*again, "--seeds", "2"]) == 2
    assert "run.seeds=1, not 2" in capsys.readouterr().err
    assert main([*again, "--set", "train.lr=0.3"]) == 2
    assert "not 0.3" in capsys.readouterr().err
    assert main([*again, "--dataset", "mock", "--set", "train.epochs=1", "--seed", "42"]) == 0


def test_runs_of_two_protocols_make_no_table(baseline, tmp_path, capsys):
    assert main([*baseline, "--model", "popularity", "--seeds", "2"]) == 0
    (folder,) = run_folders(tmp_path)
    stored = folder / "popularity_seed43" / "metrics.json"
    stored.write_text(stored.read_text().replace('"mask_seen": true', '"mask_seen": false'))
    assert main(["--mode", "report", "--from", str(folder), f"--log_dir={tmp_path / 'log'}"]) == 2
    assert "differ in mask_seen" in capsys.readouterr().err
    stored.write_text(stored.read_text().replace('"mask_seen": false', '"mask_seen": true'))
    with np.load(stored.parent / "ranks.npz") as ranks:
        arrays = dict(ranks)
    np.savez(stored.parent / "ranks.npz", **arrays | {"targets": arrays["targets"][::-1]})
    assert main(["--mode", "report", "--from", str(folder), f"--log_dir={tmp_path / 'log'}"]) == 2
    assert "were tested on other items" in capsys.readouterr().err


def broken_for(name: str, fit):
    def broken(trainer):
        if trainer.model.name == name:
            raise RuntimeError("out of memory")
        fit(trainer)

    return broken


# --------------------------------------------------------------------------- mistakes


def refused(arguments: list[str], tmp_path: Path, capsys) -> str:
    """The one line that is printed; nothing else happened."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in captured.err
    assert captured.err.rstrip().splitlines()[-1] == errors[0], "the error comes last, in one line"
    assert not run_folders(tmp_path)
    cache = tmp_path / "data" / "cache"
    assert not cache.exists() or not list(cache.iterdir())
    return errors[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--modell", "sasrec"], "Did you mean '--model'"),
        (["--epochs"], "--epochs"),
        (["--epochs", "ten"], "invalid int value: 'ten'"),
        (["--epochs", "-3"], "train.epochs lies between"),
        (["--mode", "basline"], "Did you mean 'baseline'"),
        (["--model", "sasrek"], "Did you mean 'sasrec'"),
        (["--model", ""], "There is no model ''"),
        (["--model", "SASRec"], "Did you mean 'sasrec'"),
        (["--model", "popularity,sasrec"], "--mode baseline compares"),
        (["--from", "somewhere"], "run.source belongs to --mode report"),
        (["--set", "run.label=mine"], "labels are given by the modes"),
        (["--set", "hyper.join=nowhere"], "hyper.join belongs to --mode hyper, not"),
        (["--set", "full.case_users=5"], "full.case_users belongs to --mode full, not"),
        (["--trials", "3"], "hyper.trials belongs to --mode hyper or --mode full"),
        (["--mode", "full", "--set", "full.sizes=5,500"], "full.sizes: 5 items are too few"),
        (["--model", "pmat", "--set", "pmat.personal_digits=7"], "no multiple of pmat.personal"),
        (["--set", "train.lr"], "write it as key=value"),
        (["--set", "train.lrr=1"], "Did you mean 'train.lr'"),
        (["--set", "mock.dims={a: ["], "mock.dims wants a mapping"),
        (["--device", "gpu"], "run.device is one of"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nowhere"], "no run folder"),
        (["stray"], "'stray'"),
        (["--mode", "mcrl", "--model", "sasrec"], "compares pmat and pmat_mcrl, not sasrec"),
        (["--model", "pmat", "--set", "pmat.law=1,a"], "pmat.law wants"),
        (["--model", "pmat", "--set", "pmat.shared_digits=300"], "pmat.shared_digits=300 is more"),
        (["--dataset", "nowhere"], "'nowhere' was not found"),
        (["--set", "mock.n_items=20", "--set", "mock.history_min=11"], "twice history_min"),
    ],
)
def test_a_wrong_flag_is_one_line(quick, tmp_path, capsys, wrong, said):
    assert said in refused([*quick, *wrong], tmp_path, capsys)


def test_a_gpu_that_is_not_there_is_one_line(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in refused([*quick, "--device", "cuda"], tmp_path, capsys)


def test_a_misspelt_model_in_baseline_stops_before_anything_runs(baseline, tmp_path, capsys):
    arguments = [*baseline, "--model", "popularity,sasrek"]
    assert "Did you mean 'sasrec'" in refused(arguments, tmp_path, capsys)


def own_data(tmp_path, write_folder, **features) -> Path:
    histories = {f"u{u}": [f"i{(u + t) % 9}" for t in range(4)] for u in range(9)}
    return write_folder(tmp_path / "own", histories, **features)


def test_times_under_another_name_are_one_line(quick, tmp_path, capsys, write_folder):
    folder = own_data(tmp_path, write_folder)
    table = folder / "interactions.csv"
    rows = table.read_text(encoding="utf-8")
    table.write_text(rows.replace("timestamp", "Time_Stamp"), encoding="utf-8")
    assert "'Time_Stamp' looks like times" in refused(
        [*quick, "--dataset", str(folder)], tmp_path, capsys
    )


def test_tables_say_when_there_are_no_times(quick, tmp_path, capsys, write_folder):
    folder = own_data(tmp_path, write_folder)
    arguments = [*quick, "--model", "popularity", "--dataset", str(folder)]
    assert main(arguments) == 0
    assert "time-ordered leave-one-out" in capsys.readouterr().out
    table = pd.read_csv(folder / "interactions.csv").drop(columns="timestamp")
    table.to_csv(folder / "interactions.csv", index=False)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "leave-one-out in the order of the file" in captured.out
    assert "time" not in captured.out.split("\n")[0].split("leave-one-out")[1]
    assert "There are no time stamps" in captured.out + captured.err


def test_an_unreadable_table_is_one_line(quick, tmp_path, capsys, write_folder):
    folder = own_data(tmp_path, write_folder)
    with open(folder / "interactions.csv", "a", encoding="utf-8") as file:
        file.write("u1,i1,yesterday\n")
    error = refused([*quick, "--dataset", str(folder)], tmp_path, capsys)
    assert "interactions.csv" in error and "38" in error and "yesterday" in error


def test_a_table_that_is_no_text_is_one_line(quick, tmp_path, capsys, write_folder):
    folder = own_data(tmp_path, write_folder)
    (folder / "interactions.csv").write_bytes(bytes(range(256)) * 10)
    error = refused([*quick, "--dataset", str(folder)], tmp_path, capsys)
    assert "interactions.csv" in error


def test_features_of_other_items_are_one_line(quick, tmp_path, capsys, write_folder):
    folder = own_data(tmp_path, write_folder, text=np.ones((8, 5), np.float32))
    error = refused([*quick, "--dataset", str(folder)], tmp_path, capsys)
    assert "text.npy" in error and "8" in error and "9" in error


@pytest.mark.parametrize("model", ["pmat", "tiger"])
def test_features_that_are_the_same_for_all_items_are_named(
    quick, tmp_path, capsys, write_folder, model
):
    folder = own_data(tmp_path, write_folder, text=np.ones((9, 5), np.float32))
    arguments = [*quick, "--model", model, "--dataset", str(folder), "--set", "data.cache=false"]
    error = refused(arguments, tmp_path, capsys)
    assert "features 'text'" in error and "of all items are the same" in error


def test_data_without_held_out_items_are_one_line(quick, tmp_path, capsys, write_folder):
    folder = write_folder(tmp_path / "own", {"u1": ["a", "b"], "u2": ["a"]})
    arguments = [*quick, "--dataset", str(folder), "--set", "data.cache=false"]
    assert "no valid or no test targets" in refused(arguments, tmp_path, capsys)


def test_save_dir_that_is_a_file_is_one_line(quick, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [*quick, "--save_dir", str(tmp_path / "file")]
    assert "Cannot create" in refused(arguments, tmp_path, capsys)


def test_log_dir_that_is_a_file_is_one_line(quick, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "--log_dir" in refused([*quick, "--log_dir", str(tmp_path / "file")], tmp_path, capsys)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("mode", "dataset", "model", "epochs", "batch_size", "lr", "device", "seed",
                 "save_dir", "log_dir", "config", "set", "seeds", "resume", "data_dir", "amp",
                 "num_workers", "trials", "from"):  # fmt: skip
        assert f"--{flag}" in printed
