"""Records of finished runs: packed ranks come back exactly, and mode report reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import keep_record as records
from config import build_config
from experiments.runs import load_ranks, load_task, run
from main import main
from util import UserError


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A data folder, the runs made on it, and the place of their records."""
    base = tmp_path_factory.mktemp("records")
    data, runs, place = base / "shop", base / "runs", base / "kept"
    data.mkdir()
    rng = np.random.default_rng(0)
    rows = [
        f"u{user},i{item},{time}"
        for user in range(40)
        for time, item in enumerate(rng.permutation(25)[: rng.integers(5, 12)])
    ]
    (data / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    items = "\n".join(f"i{item},item {item}" for item in range(25))
    (data / "items.csv").write_text(f"item_id,title\n{items}\n")
    for model, seed in (("popularity", 42), ("sasrec", 42), ("sasrec", 43)):
        flags = {
            "data.dataset": str(data), "data.data_dir": str(base), "run.model": model,
            "run.seed": seed, "run.device": "cpu", "train.epochs": 1, "sasrec.width": 8,
        }  # fmt: skip
        config = build_config(flags, model=model)
        folder = runs / f"{model}_seed{seed}"
        run(config, load_task(config), folder)
        records.keep(folder, place, "")
    return data, runs, place


def test_ranks_come_back_as_they_were(kept) -> None:
    _, runs, place = kept
    for record in place.iterdir():
        found = records.unpack(record)
        for masked, name in ((True, "masked"), (False, "unmasked")):
            np.testing.assert_array_equal(
                found[name], load_ranks(runs / record.name / "ranks.npz", masked).ranks
            )


def test_the_table_averages_seeds_and_compares_users(kept) -> None:
    *_, place = kept
    lines = records.table(place, against="popularity").splitlines()
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines[2:]}
    stored = [
        json.loads((place / f"sasrec_seed{seed}" / "metrics.json").read_text()) for seed in (42, 43)
    ]
    mean = np.mean([run["test_by_masking"]["masked"]["ndcg@10"] for run in stored])
    assert rows["sasrec"][1] == "2" and rows["sasrec"][4].startswith(f"{mean:.4f} ± ")
    theirs = json.loads((place / "popularity_seed42" / "metrics.json").read_text())
    gain = mean - theirs["test_by_masking"]["masked"]["ndcg@10"]
    assert rows["sasrec"][-1].startswith(f"{gain:+.4f} (")
    with pytest.raises(UserError, match="no such record; there are popularity, sasrec"):
        records.table(place, against="tiger")


def test_a_record_is_no_run_and_of_one_data_set(kept, tmp_path, capsys) -> None:
    *_, place = kept
    again, folder = tmp_path / "again", tmp_path / "restored"
    assert records.main([str(again), str(place / "sasrec_seed42")]) == 2
    assert "sasrec_seed42 is a record already" in capsys.readouterr().err
    assert not again.exists()
    assert records.main([str(place), "--restore", str(folder), "--dataset", "mock"]) == 2
    assert "is not of --dataset mock" in capsys.readouterr().err


def test_mode_report_reads_restored_records(kept, tmp_path, capsys) -> None:
    data, _, place = kept
    folder, old = tmp_path / "restored", place / "popularity_seed42" / "metrics.json"
    old.write_text(old.read_text().replace('"split": "leave-one-out', '"split": "as it was called'))
    records.restore(place, folder, str(data), "baseline")
    assert main(["--mode", "report", "--from", str(folder), "--data_dir", str(tmp_path)]) == 0
    assert "sasrec" in capsys.readouterr().out
    assert (folder / "baseline_results.tex").exists()


def test_records_of_another_order_are_not_restored_or_compared(kept, tmp_path, capsys) -> None:
    data, runs, place = kept
    other = tmp_path / "other"
    shutil.copytree(place, other)
    with np.load(runs / "popularity_seed42" / "ranks.npz") as ranks:
        turned = dict(ranks) | {"targets": ranks["targets"][::-1]}
    np.savez(tmp_path / "ranks.npz", **turned)
    records.pack(tmp_path / "ranks.npz", other / "popularity_seed42" / "ranks.npz")
    flags = ["--restore", str(tmp_path / "restored"), "--dataset", str(data)]
    assert records.main([str(other), *flags]) == 2
    assert "popularity_seed42 is not of --dataset" in capsys.readouterr().err
    metrics = other / "popularity_seed42" / "metrics.json"
    metrics.write_text(
        metrics.read_text().replace('"tie_policy": "file"', '"tie_policy": "shuffle"')
    )
    with pytest.raises(UserError, match="were not tested alike"):
        records.table(other, against="popularity")
    assert "popularity" in records.table(other)


def test_an_ablation_is_no_record_of_the_full_model(kept, tmp_path) -> None:
    _, runs, _ = kept
    for label, seed in (("", 42), ("No such thing", 43)):
        folder = tmp_path / f"run{seed}"
        shutil.copytree(runs / "sasrec_seed43", folder)
        stored = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(stored | {"label": label}))
        records.keep(folder, tmp_path / "place", "")
    names = {path.name for path in (tmp_path / "place").iterdir()}
    assert names == {"sasrec_seed43", "sasrec-no-such-thing_seed43"}


def test_a_record_is_not_written_over_by_another_run(kept, tmp_path) -> None:
    _, runs, _ = kept
    records.keep(runs / "sasrec_seed43", tmp_path / "place", "")
    records.keep(runs / "sasrec_seed43", tmp_path / "place", "")  # the same run may come again
    other = tmp_path / "other"
    shutil.copytree(runs / "sasrec_seed42", other)
    stored = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(stored | {"seed": 43}))
    with pytest.raises(UserError, match="another run"):
        records.keep(other, tmp_path / "place", "")
