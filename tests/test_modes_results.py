"""Modes baseline, ablation and report: what is in the folder, and whether it says the truth."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import efficiency, modes, plots_ids, runs
from experiments.comparisons import ablation_table, compared, efficiency_table, reference
from experiments.groups import user_groups
from experiments.personal import IDS, TIMELINE, WEIGHTS, extreme_users, modality_weights
from experiments.report import Entry, caption, entries, protocol, read_runs, unfinished
from experiments.runs import MODELS, Task, load_model, load_ranks, model_class
from experiments.tables import P_VALUE, Column, Table, cells, html, latex, markdown
from experiments.training import Stopped, Trainer
from main import main
from metrics import Ranks, paired_bootstrap, per_user

TWO = {"no shared digits": {"pmat.shared_digits": 0}, "even weights": {"pmat.personalised": "none"}}


# --------------------------------------------------------------------------- tables


@pytest.fixture
def table() -> Table:
    frame = pd.DataFrame(
        {
            "model": ["a_b", "c&d", "e"],
            "ndcg@10": [0.30004, 0.3, 0.1],
            "ndcg@10 std": [0.01, float("nan"), float("nan")],
            "ndcg@10 mark": ["*", None, "†"],
            "ms": [3.0, float("nan"), 1.0],
        }
    )
    columns = [
        Column("model", "Model", "s"),
        Column("ndcg@10", "N@10", best=1),
        Column("ms", "ms", ".1f", -1),
    ]
    return Table("t", "Title", "Caption with 95 % and _", columns, frame, rule="model")


def test_best_is_bold_and_second_underlined_in_every_form(table):
    text = latex(table)
    # what reads the same is marked the same: .30004 and .3 are both .3000
    assert text.count(r"\textbf{0.3000}") == 2, "and nobody is second behind two"
    assert r"\underline{0.1000}" not in text
    assert r"\textbf{1.0}" in text and r"\underline{3.0}" in text, "least ms is best"
    assert markdown(table).count("**0.3000**") == 2 and "<u>3.0</u>" in markdown(table)
    assert html(table).count("<b>0.3000</b>") == 2


def test_missing_values_are_dashes_and_marks_are_superscripts(table):
    rows = cells(table)
    assert rows[1][2].text == "–" and rows[1][1].deviation == "" and rows[1][1].mark == ""
    assert "$^{*}$" in latex(table) and r"$^{\dagger}$" in latex(table)
    assert "nan" not in latex(table) + markdown(table) + html(table)
    assert r"$\pm$ 0.0100" in latex(table)


def assert_well_formed(text: str) -> None:
    """Braces and environments balance, every row has as many cells as the head."""
    bare = re.sub(r"\\.", "", text)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert sorted(opened) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    counts = {len(re.findall(r"(?<!\\)&", row)) for row in rows}
    shapes = re.search(r"\\begin\{tabular\}\{(.+)\}", text)[1]
    width = len(re.sub(r"p\{\w+\}", "p", shapes))
    assert counts == {width - 1}
    assert not re.search(r"(?<!\\)[%#_]", text.replace("{%\n", "{\n")), "unescaped"


def test_latex_is_well_formed(table):
    assert_well_formed(latex(table))
    wide = table._replace(columns=[table.columns[0]] + [table.columns[1]] * 12)
    assert_well_formed(latex(wide))
    assert r"\resizebox{\ifdim\width>\linewidth" in latex(wide)
    long = table._replace(
        frame=table.frame.assign(model="a name of more than forty characters it is")
    )
    assert_well_formed(latex(long))
    assert r"\begin{tabular}{p{" in latex(long)


def test_titles_cannot_break_a_markdown_table(table):
    odd = table._replace(frame=table.frame.assign(model="C++ <vector> a|b\nsecond *line*"))
    rows = markdown(odd).split("|---", 1)[1].splitlines()[1:]
    assert len(rows) == len(table.frame)
    assert r"C++ &lt;vector> a\|b second \*line\*" in rows[0]


@pytest.mark.parametrize(
    ("split", "timed", "said"),
    [("of the source", False, False), ("of the source", True, True), ("leave-one-out", True, True)],
)
def test_a_caption_speaks_of_ties_only_where_there_are_times(split, timed, said):
    data = {"name": "shop", "users": 9, "items": 9, "interactions": 99}
    protocol = {"mask_seen": True, "tie_policy": "shuffle", "split": split, "timed": timed}
    text = caption({"dataset": data, "protocol": protocol})
    assert ("equal time stamps" in text) == said


def test_runs_that_were_never_begun_are_named_as_missing(tiny, task, tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(modes, "run", stopped)
    request = SimpleNamespace(config=lambda model, changes: tiny(model))
    jobs = [modes.Job(tmp_path / f"{name}_seed42", name, 42, {}) for name in ("sasrec", "rpg")]
    with pytest.raises(Stopped):
        modes.run_jobs(request, jobs, task)
    assert unfinished(tmp_path) == ["rpg_seed42", "sasrec_seed42"]


# --------------------------------------------------------------------------- baseline


@pytest.fixture(scope="module")
def baseline_folder(tmp_path_factory, small_flags, newest) -> Path:
    """A finished baseline of a model without training, one with digits and ours; two seeds."""
    place = tmp_path_factory.mktemp("baseline")
    folders = [f"--{name}_dir={place / name}" for name in ("save", "log", "data")]
    arguments = ["--mode", "baseline", "--model", "popularity,rpg,pmat", "--seeds", "2"]
    assert main([*arguments, "--epochs", "1", *folders, *small_flags]) == 0
    return newest(place)


def test_every_model_trains_when_none_is_named(
    mode_flags, tmp_path, trained, monkeypatch, fast_outputs
):
    for name in list(MODELS):
        if name not in ("popularity", "sasrec"):
            monkeypatch.delitem(runs.MODELS, name)
    assert main(["--mode", "baseline", *mode_flags, "--seeds", "3"]) == 0
    expected = [f"{name}_seed{seed}" for name in ("popularity", "sasrec") for seed in (42, 43, 44)]
    assert sorted(trained) == expected


def test_resume_trains_only_what_is_missing(mode_flags, tmp_path, trained, fast_outputs, newest):
    arguments = ["--mode", "baseline", "--model", "popularity,sasrec", "--seeds", "2", *mode_flags]
    assert main(arguments) == 0
    folder = newest(tmp_path)
    shutil.rmtree(folder / "sasrec_seed43")  # as if it had been killed before that run
    (folder / "unfinished").touch()
    trained.clear()
    assert main([*arguments, "--resume"]) == 0
    assert trained == ["sasrec_seed43"] and newest(tmp_path) == folder
    assert len(json.loads((folder / "baseline_results.json").read_text())["runs"]) == 4


def test_baseline_leaves_tables_and_figures(baseline_folder):
    names = {path.name for path in baseline_folder.iterdir()}
    stems = ("baseline_results", "group_results", "id_quality", "efficiency")
    assert names >= {f"{stem}.{end}" for stem in stems for end in ("csv", "tex", "md")}
    figures = ("baseline_top10_metrics", "learning_curves", "modality_weights_pmat",
               "drift_timeline_pmat", "id_space_pmat", "id_space_rpg")  # fmt: skip
    assert names >= {f"{stem}.{end}" for stem in figures for end in ("pdf", "png")}
    latest = {path.name for path in baseline_folder.parent.iterdir() if path.is_file()}
    assert latest >= {f"baseline_results.{end}" for end in ("csv", "json", "tex", "md")}
    assert "baseline_top10_metrics.png" in latest


def test_every_table_says_how_it_was_measured(baseline_folder):
    for path in baseline_folder.glob("*.tex"):
        text = path.read_text()
        assert_well_formed(text)
        for word in ("mock: 60 users", "leave-one-out", "full ranking", "seen items masked",
                     "equal scores", "seeds 42, 43"):  # fmt: skip
            assert word in text, (path.name, word)


def test_models_are_tested_against_the_best_baseline(baseline_folder):
    table = pd.read_csv(baseline_folder / "baseline_results.csv").set_index("model")
    valid = pd.Series(
        {e.model: np.mean([run.result["valid"]["ndcg@10"] for run in e.runs])
         for e in entries(read_runs(baseline_folder))}
    )  # fmt: skip
    best = valid[["popularity", "rpg"]].idxmax()
    compared = table["compared with"].dropna()
    assert set(compared) == {best} and best not in compared.index
    found = {entry.model: entry.users() for entry in entries(read_runs(baseline_folder))}
    by_hand = paired_bootstrap(found["pmat"], found[best])
    row = table.loc["pmat"]
    assert row["ndcg@10 difference"] == pytest.approx(by_hand.difference)
    assert (row["low"], row["high"]) == pytest.approx((by_hand.low, by_hand.high))
    assert row["p (Holm)"] >= row["p"]
    for _, row in table.dropna(subset="p (Holm)").iterrows():
        mark = "" if row["p (Holm)"] >= 0.05 else "*" if row["ndcg@10 difference"] > 0 else "†"
        assert ("" if pd.isna(row["ndcg@10 mark"]) else row["ndcg@10 mark"]) == mark


def test_the_reference_is_chosen_on_valid(baseline_folder):
    def with_valid(name: str, value: float) -> Entry:
        entry = next(e for e in found if e.model == name)
        valid = {"valid": {"ndcg@10": value}}
        return entry._replace(runs=[run._replace(result=run.result | valid) for run in entry.runs])

    found = entries(read_runs(baseline_folder))
    for best, other in (("rpg", "popularity"), ("popularity", "rpg")):
        assert reference([with_valid(best, 0.2), with_valid(other, 0.1)]).model == best


def test_speed_on_several_machines_is_not_ranked(baseline_folder):
    found = entries(read_runs(baseline_folder))
    same = efficiency_table(found)
    assert "Machine" not in [column.title for column in same.columns]
    assert any(column.best for column in same.columns) and " threads" in same.caption
    last = found[-1].runs[-1]
    elsewhere = last.result["environment"] | {"device": "another GPU"}
    slow = last.result["efficiency"] | {"train_seconds": 1e6}
    changed = last._replace(
        result=last.result | {"environment": elsewhere, "efficiency": slow}
    )  # the second seed of a row: it must not enter the mean of the first
    mixed = efficiency_table(
        [*found[:-1], found[-1]._replace(runs=[*found[-1].runs[:-1], changed])]
    )
    assert mixed.frame["train_seconds"].max() < 1e6
    mixed = efficiency_table([*found[:-1], found[-1]._replace(runs=[changed])])
    assert not any(column.best for column in mixed.columns)
    assert "another GPU" in markdown(mixed) and "different machines" in mixed.caption


def test_rows_of_other_seeds_are_said_to_be(baseline_folder):
    first, second = (run for run in read_runs(baseline_folder) if run.model == "pmat")
    assert "not every row" not in protocol([first, second])
    other = first._replace(result=first.result | {"model": "other", "seed": 44})
    third = second._replace(result=second.result | {"model": "other"})
    assert "not every row has all of them" in protocol([first, second, other, third])


def test_no_p_value_is_printed_as_zero():
    frame = pd.DataFrame({"model": ["a", "b", "c"], "p": [0.0002, 0.001, float("nan")]})
    columns = [Column("model", "Model", "s"), Column("p", "p", P_VALUE)]
    shown = [row[1].text for row in cells(Table("t", "T", "", columns, frame))]
    assert shown == ["<0.001", "0.001", "–"]


def test_a_p99_wants_a_hundred_calls():
    many, few = efficiency._summary([0.002] * 100), efficiency._summary([0.002] * 30)
    assert many["p99_ms"] == few["p50_ms"] == pytest.approx(2.0)
    assert few["p99_ms"] is None and few["calls"] == 30


def test_small_groups_are_shown_and_not_compared(baseline_folder):
    table = pd.read_csv(baseline_folder / "group_results.csv")
    small = table["users"] < 20
    assert small.any() and not small.all()
    assert table.loc[small, "pmat"].notna().all()
    assert table.loc[small, "pmat difference"].isna().all()
    assert table.loc[~small, "pmat difference"].notna().all()


def test_models_that_were_best_at_their_last_epoch_are_named(baseline_folder):
    caption = json.loads((baseline_folder / "baseline_results.json").read_text())["caption"]
    named = caption.partition("more training might raise them: ")[2].rstrip(".").split(", ")
    stopped = []
    for entry in entries(read_runs(baseline_folder)):
        speeds = [run.result["efficiency"] for run in entry.runs]
        if all(speed["best_epoch"] == speed["epochs"] > 0 for speed in speeds):
            stopped.append(entry.model)
    assert [name for name in named if name] == stopped


def test_the_valid_item_in_the_graph_is_a_second_line_below_all_models(
    mode_flags, tmp_path, newest, fast_outputs, capsys
):
    arguments = ["--mode", "baseline", "--model", "popularity,ammrm", "--seeds", "2"]
    assert main([*arguments, *mode_flags]) == 0
    second = "ammrm, valid item in graph"
    assert capsys.readouterr().out.count(second) == 2, "on the screen one for each seed"
    folder = newest(tmp_path)
    table = pd.read_csv(folder / "baseline_results.csv").set_index("model")
    assert set(table.index[:2]) == {"popularity", "ammrm"} and table.index[2] == second
    stored = [run.result for run in read_runs(folder) if run.model == "ammrm"]
    by_hand = np.mean([result["test_with_valid_in_graph"]["recall@10"] for result in stored])
    assert table.loc[second, "recall@10"] == pytest.approx(by_hand)
    by_hand = np.mean([result["test"]["recall@10"] for result in stored])
    assert table.loc["ammrm", "recall@10"] == pytest.approx(by_hand)
    assert np.isnan(table.loc[second, "p"])
    text = (folder / "baseline_results.tex").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(second)]
    assert "textbf" not in line and "underline" not in line
    assert text.split(second)[0].rstrip().endswith(r"\midrule")


def test_report_rebuilds_the_same_tables_without_training(
    baseline_folder, tmp_path, monkeypatch, capsys, fast_outputs
):
    copy = tmp_path / "copy"
    shutil.copytree(baseline_folder, copy)
    made = {p.name: p.read_bytes() for p in copy.iterdir() if p.suffix in (".csv", ".tex", ".md")}
    pictures = {path.name for path in copy.glob("*.png")}
    for path in copy.iterdir():
        if path.is_file() and path.name != "request.yaml":
            path.unlink()

    def refuse(*_):
        raise AssertionError("mode report must not train")

    monkeypatch.setattr(Trainer, "fit", refuse)
    arguments = ["--mode", "report", "--from", str(copy), f"--log_dir={tmp_path}"]
    assert main(arguments) == 0
    assert {name: (copy / name).read_bytes() for name in made} == made
    assert {path.name for path in copy.glob("*.png")} == pictures
    assert main(["--mode", "report", f"--log_dir={tmp_path}"]) == 2
    assert "--from" in capsys.readouterr().err
    assert main([*arguments[:2], "--from", str(tmp_path), f"--log_dir={tmp_path}"]) == 2
    capsys.readouterr()
    assert main([*arguments, "--model", "pmat"]) == 2
    assert "run.model is of a run that trains" in capsys.readouterr().err


def test_report_names_a_damaged_file(baseline_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(baseline_folder, copy)
    damaged = copy / "pmat_seed42" / "metrics.json"
    damaged.write_text(damaged.read_text()[:50])
    assert main(["--mode", "report", "--from", str(copy), f"--log_dir={tmp_path}"]) == 2
    assert f"{damaged} is damaged" in capsys.readouterr().err


def test_report_refuses_other_data(baseline_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(baseline_folder, copy)
    request = (copy / "request.yaml").read_text().replace("mock.n_users: '60'", "mock.n_users: 70")
    assert "70" in request
    (copy / "request.yaml").write_text(request)
    assert main(["--mode", "report", "--from", str(copy), f"--log_dir={tmp_path}"]) == 2
    assert "60 users" in capsys.readouterr().err
    request = (copy / "request.yaml").read_text().replace("mock.n_users: 70", "mock.n_users: '60'")
    (copy / "request.yaml").write_text(request.replace("flags:", "flags:\n  data.seed: 7"))
    assert main(["--mode", "report", "--from", str(copy), f"--log_dir={tmp_path}"]) == 2
    assert "tested on other items" in capsys.readouterr().err


def test_report_refuses_other_features(baseline_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(baseline_folder, copy)
    request = (copy / "request.yaml").read_text()
    (copy / "request.yaml").write_text(request.replace("flags:", "flags:\n  data.features: text"))
    assert main(["--mode", "report", "--from", str(copy), f"--log_dir={tmp_path}"]) == 2
    assert "made on other data" in capsys.readouterr().err


def test_report_refuses_what_a_config_file_asks_in_vain(baseline_folder, tmp_path, capsys):
    overlay = tmp_path / "other.yaml"
    overlay.write_text("train: {lr: 5.0}\n")
    arguments = ["--mode", "report", "--from", str(baseline_folder), f"--log_dir={tmp_path}"]
    assert main([*arguments, "--config", str(overlay)]) == 2
    assert "train.lr is of a run that trains" in capsys.readouterr().err


# --------------------------------------------------------------------------- what runs write


def test_weights_and_ids_are_those_of_the_model(baseline_folder, task):
    place = baseline_folder / "pmat_seed42"
    model, config = load_model(place, task.dataset.catalogue)
    histories = task.split.train_and_valid
    weights = pd.read_csv(place / WEIGHTS).set_index("user_id")
    assert list(weights) == ["visual", "text", "planted visual", "planted text"]
    assert len(weights) == 60
    assert weights[["visual", "text"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-4)
    truth = task.dataset.truth.drifted_weights
    assert weights[["planted visual", "planted text"]].to_numpy() == pytest.approx(truth, abs=1e-4)

    ids = pd.read_csv(place / IDS, keep_default_na=False)
    everybody = np.arange(60)
    found = modality_weights(model, histories, everybody, config)
    users = extreme_users(everybody, found)
    leaders = weights["visual"].nlargest(2).index.tolist()
    assert set(leaders) <= set(task.dataset.user_ids[users])
    assert set(ids["user_id"]) == {"", *task.dataset.user_ids[users]}
    common = ids[ids["user_id"] == ""]["digits"].str.split().tolist()
    assert np.array_equal(np.array(common, dtype=int), model.item_ids().numpy())
    timeline = pd.read_csv(place / TIMELINE)
    last = timeline.groupby("user_id")[["visual", "text"]].last()
    assert last.to_numpy() == pytest.approx(
        weights.loc[last.index, ["visual", "text"]].to_numpy(), abs=1e-4
    )
    assert not (baseline_folder / "popularity_seed42" / IDS).exists()
    assert not (baseline_folder / "rpg_seed42" / WEIGHTS).exists()


def test_quality_and_speed_have_what_the_tables_print(baseline_folder):
    found = {run.folder.name: run.result for run in read_runs(baseline_folder)}
    ours, theirs = found["pmat_seed42"]["id_quality"], found["rpg_seed42"]["id_quality"]
    assert {"uniqueness_per_user", "churn", "semantic_consistency"} <= set(ours)
    assert 0 <= ours["churn"] <= 1
    assert "churn" not in theirs and found["popularity_seed42"]["id_quality"] is None
    for result in found.values():
        speed = result["efficiency"]
        assert speed["latency_calls"] == 100
        assert speed["latency_p50_ms"] <= speed["latency_p95_ms"] <= speed["latency_p99_ms"]
        assert {f"latency64_{p}_ms" for p in ("p50", "p95", "p99")} <= set(speed)
        assert speed["throughput_users_per_second"] > 0 and speed["peak_memory_mb"] >= 0
        assert (speed["id_generation_ms"] is None) == (result["id_quality"] is None)


# --------------------------------------------------------------------------- groups


def test_groups_by_hand(task):
    users = np.arange(60)
    histories = task.split.train_and_valid
    counts = np.bincount(task.split.train.items, minlength=51)
    ranks = Ranks(users, np.ones(60), np.arange(61), task.split.test.items.astype(np.int64))
    groups = user_groups(task, ranks)
    assert groups["all users"].all()
    cold = counts[ranks.targets] <= 5
    assert cold.any() and np.array_equal(groups["cold target (≤ 5 in train)"], cold)
    (short,) = (name for name in groups if name.startswith("short"))
    limit = int(re.search(r"\d+", short)[0])
    assert np.array_equal(groups[short], histories.lengths <= limit)
    (gaps,) = (name for name in groups if name.startswith("modalities missing ("))
    missing = [part.present for part in task.dataset.catalogue.modalities.values()]
    lacks = (~np.stack(missing)).sum(0)
    mean = np.array(
        [lacks[histories.of(user) - 1].sum() / histories.lengths[user] for user in users]
    )
    assert np.array_equal(groups[gaps], mean >= np.quantile(mean, 0.75))
    assert np.array_equal(groups["modalities missing least"], mean <= np.quantile(mean, 0.25))
    truth = task.dataset.truth
    assert np.array_equal(groups["planted: drifts"], truth.drift_steps >= 0)
    assert not (groups["planted: visual, never drifts"] & groups["planted: drifts"]).any()


def test_a_group_of_gaps_says_how_large_they_are_at_least(task):
    catalogue, users = task.dataset.catalogue, np.arange(60)
    rarest = np.bincount(task.split.train_and_valid.items, minlength=51)[1:].argmin()
    gaps = {name: part._replace(present=np.arange(50) != rarest)
            for name, part in catalogue.modalities.items()}  # fmt: skip
    changed = task._replace(
        dataset=task.dataset._replace(catalogue=catalogue._replace(modalities=gaps))
    )
    ranks = Ranks(users, np.ones(60), np.arange(61), task.split.test.items.astype(np.int64))
    found = user_groups(changed, ranks)["modalities missing (in any item of the history)"]
    with_it = [rarest + 1 in task.split.train_and_valid.of(user) for user in users]
    assert found.tolist() == with_it and 0 < sum(with_it) < 15


def test_groups_of_data_without_features_or_truth(task):
    bare = task.dataset._replace(
        catalogue=task.dataset.catalogue._replace(modalities={}), truth=None
    )
    ranks = Ranks(np.arange(60), np.ones(60), np.arange(61), task.split.test.items.astype(np.int64))
    names = user_groups(Task(bare, task.split), ranks)
    assert not [name for name in names if "planted" in name or "missing" in name]


# --------------------------------------------------------------------------- ablation


def test_ablations_are_compared_with_their_full_model(
    mode_flags, tmp_path, trained, monkeypatch, newest
):
    idle = {"the same": {"pmat.dynamic": True}}  # changes nothing and is not trained
    monkeypatch.setattr(model_class("pmat"), "ablations", TWO | idle)
    assert main(["--mode", "ablation", "--model", "pmat", *mode_flags]) == 0
    assert trained == ["pmat_seed42", "pmat--no-shared-digits_seed42", "pmat--even-weights_seed42"]
    folder = newest(tmp_path)
    table = pd.read_csv(folder / "ablation_results.csv").set_index("variant")
    assert table.index[0] == "full model" and set(table.index[1:]) == set(TWO)
    full, other = (
        per_user(load_ranks(folder / name / "ranks.npz", True), "ndcg", 10)
        for name in ("pmat_seed42", "pmat--even-weights_seed42")
    )
    row = table.loc["even weights"]
    assert row["difference"] == pytest.approx((other - full).mean())
    assert row["low"] <= row["difference"] <= row["high"] and row["p (Holm)"] >= row["p"]
    assert np.isnan(table.loc["full model", "difference"])
    stored = (folder / "pmat--even-weights_seed42" / "config.yaml").read_text()
    assert "personalised: none" in stored and "label: even weights" in stored
    assert_well_formed((folder / "ablation_results.tex").read_text())
    assert (folder / "ablation_bars.png").stat().st_size > 5000
    assert (tmp_path / "save" / "ablation_results.json").exists()
    assert not (tmp_path / "save" / "baseline_results.csv").exists(), "that is another mode's"


def test_ablations_of_other_seeds_and_few_users_are_shown_but_not_compared(
    mode_flags, tmp_path, trained, fast_outputs, newest
):
    base = ["--mode", "baseline", "--model", "popularity", "--seeds", "2", *mode_flags]
    assert main(base) == 0
    full, other = read_runs(newest(tmp_path))
    other = other._replace(result=other.result | {"label": "something else"})
    table = ablation_table(entries([full, other], ablations=True)).frame
    assert table["difference"].isna().all() and (table["difference mark"] == "").all()
    assert compared(np.ones(19), np.zeros(19)) == {}
    assert compared(np.ones(20), np.zeros(20))["low"] == 1.0
    many, few = np.zeros(1000), np.zeros(1000)
    few[:9] = 1.0
    assert compared(few, many) == {}, "nine users cannot speak for a thousand"
    assert compared(many, many)["difference"] == 0.0


@pytest.mark.parametrize("settings", [["mock.n_users=15"], ["data.features=text"]])
def test_few_users_and_fewer_modalities_have_all_tables(
    mode_flags, tmp_path, fast_outputs, newest, settings
):
    changes = [part for pair in settings for part in ("--set", pair)]
    assert main(["--mode", "baseline", "--model", "popularity,pmat", *mode_flags, *changes]) == 0
    table = pd.read_csv(newest(tmp_path) / "group_results.csv")
    assert "pmat difference" in table
    assert (newest(tmp_path) / "efficiency.csv").exists()


def test_any_model_with_a_declared_dictionary_can_be_ablated(
    mode_flags, tmp_path, trained, monkeypatch, fast_outputs, newest
):
    monkeypatch.setattr(model_class("sasrec"), "ablations", {"three layers": {"sasrec.layers": 3}})
    assert main(["--mode", "ablation", "--model", "sasrec", "--seeds", "2", *mode_flags]) == 0
    assert len(trained) == 4
    table = pd.read_csv(newest(tmp_path) / "ablation_results.csv")
    assert (table["seeds"] == 2).all() and len(table) == 2


def test_a_model_without_ablations_is_refused_in_one_line(mode_flags, tmp_path, capsys):
    assert main(["--mode", "ablation", "--model", "popularity", *mode_flags]) == 2
    assert "declares no ablations" in capsys.readouterr().err
    assert not (tmp_path / "save").exists()


def test_an_ablation_that_crashes_is_left_out(
    mode_flags, tmp_path, monkeypatch, capsys, fast_outputs, newest
):
    monkeypatch.setattr(model_class("pmat"), "ablations", TWO)
    fit = Trainer.fit

    def broken(trainer):
        if "even" in trainer.folder.name:
            raise torch.OutOfMemoryError("out of memory")
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", broken)
    assert main(["--mode", "ablation", "--model", "pmat", *mode_flags]) == 1
    assert "pmat (even weights) failed: out of memory" in capsys.readouterr().err
    table = pd.read_csv(newest(tmp_path) / "ablation_results.csv")
    assert set(table["variant"]) == {"full model", "no shared digits"}
    assert (newest(tmp_path) / "unfinished").exists()


def test_dollar_signs_of_the_data_begin_no_formula(tmp_path, monkeypatch):
    monkeypatch.setattr(plots_ids, "_tsne", lambda digits, seed: np.ones((len(digits), 2)))
    items = [f"i{n}$_$" for n in range(8)]
    rows = [
        {"user_id": user, "item_id": item, "digits": f"{n} {len(user)}"}
        for user in ("", "$u$_$", "v$")
        for n, item in enumerate(items)
    ]
    categories = dict.fromkeys(items, "under $10_$")
    plots_ids.id_space(pd.DataFrame(rows), categories, tmp_path / "space")
    assert (tmp_path / "space.png").stat().st_size > 0
