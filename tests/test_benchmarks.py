"""Mistakes on the command line of the scripts in benchmarks/: one sentence, exit code 2."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.command import Parser, command, number, share
from config import build_config, read_pairs
from experiments.runs import load_ranks, load_task, run
from util import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "command")


def mistake(capsys: pytest.CaptureFixture, script: str, *flags: str) -> str:
    """What the script says of wrong flags: one line, exit code 2."""
    assert importlib.import_module(f"benchmarks.{script}").main(list(flags)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script, capsys, monkeypatch):
    seen = []

    def look(self, arguments=None):
        seen.extend(self._actions)
        raise UserError("looked")

    monkeypatch.setattr(Parser, "parse_args", look)
    mistake(capsys, script)
    assert len(seen) > 1 and all(action.help for action in seen)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_flag_is_named(script, capsys):
    assert "--sed" in mistake(capsys, script, "any", "--sed", "3")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("beam_search", "--items 2 --beams 3", "--beams 3"),
        ("beam_width", "nowhere", "nowhere is no folder of a trained run"),
        ("epoch_cost", "--model sasrek", "Did you mean 'sasrec'"),
        ("epoch_cost", "--set run.model=sasrec", "--set run.model"),
        ("epoch_time", "--dataset nowhere", "dataset 'nowhere' was not found"),
        ("epoch_time", "--dataset mock --batch_size 9999", "--batch_size 9999"),
        ("exchange_ids", "--ids pctx", "pctx does not write the digits of one fixed ID"),
        ("exchange_ids", "--generator sasrec", "sasrec does not write the digits"),
        ("exchange_ids", "--generator cofirec --ids letter", "cofirec writes 5 digits"),
        ("follow_drift", "nowhere --known 2", "--known: wants a number from 0 to 1, not '2'"),
        ("graph_decoding", "nowhere --walks 1,2", "--walks"),
        ("graph_memory", "--share x", "--share"),
        ("keep_record", "nowhere", "nowhere holds no records"),
        ("keep_record", "nowhere --restore runs --dataset mock", "nowhere holds no records"),
        ("keep_record", "nowhere --restore runs", "--dataset"),
        ("keep_record", "place nowhere", "nowhere is no finished run"),
        ("missing_modalities", "--rates 0,x", "--rates"),
        ("missing_modalities", "--modality smell", "no modality 'smell'"),
        ("missing_modalities", "--set dgmrec.fill_missing=no", "--set dgmrec.fill_missing"),
        ("planted_truth", "--set foo=1", "no setting 'foo'"),
        ("planted_truth", "--seeds 0", "--seeds: wants a whole number of at least 1, not '0'"),
        ("read_ratings", "--ratings 0", "--ratings"),
        ("read_ratings", "--folder nowhere", "--folder nowhere"),
        ("serving_latency", "--items 0", "--items"),
        ("shared_ids", "nowhere elsewhere", "nowhere is no folder of a finished run"),
        ("tokenizers", "--model letter --vary leter.codes=8", "Did you mean 'letter.codes'"),
        ("tokenizers", "--model pmat --set data.features=none", "PMAT needs item features"),
        ("what_codes_tell", "nowhere --users 1", "--users"),
    ],
)
def test_a_wrong_value_is_named(script, flags, message, capsys):
    assert message in mistake(capsys, script, *flags.split())


def test_a_generator_on_its_own_ids_is_the_model(capsys, tmp_path):
    same = ["mock.n_users=60", "mock.n_items=40", "train.epochs=3", "train.eval_every=1"]
    flags = [part for pair in same for part in ("--set", pair)]
    arguments = ["--generator", "tiger", "--ids", "tiger", "--until", "2", *flags]
    assert importlib.import_module("benchmarks.exchange_ids").main(arguments) == 0
    config = build_config({"run.mode": "baseline", "run.model": "tiger"} | read_pairs(same))
    run(config, load_task(config), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    shown = "  ".join(f"{row['epoch']}: {row['valid']['ndcg@10']:.4f}" for row in rows[:2])
    assert capsys.readouterr().out.strip().endswith(shown)


def test_users_are_grouped_by_how_many_share_the_id_of_their_target(capsys, tmp_path):
    small = ["mock.n_users=60", "mock.n_items=40", "train.epochs=1", "fusid.codes=3"]
    places = [tmp_path / name for name in ("fusid", "popularity")]
    for place in places:
        chosen = {"run.mode": "baseline", "run.model": place.name}
        config = build_config(chosen | read_pairs(small))
        place.mkdir()
        run(config, load_task(config), place)
    assert importlib.import_module("benchmarks.shared_ids").main([*map(str, places)]) == 0
    rows = capsys.readouterr().out.strip().splitlines()[-3:]
    ids = pd.read_csv(places[0] / "semantic_ids.csv").set_index("item_id")["digits"]
    targets = load_ranks(places[0] / "ranks.npz", mask_seen=True).targets
    sizes = ids.map(ids.value_counts()).to_numpy()[targets - 1]
    counts = [(sizes == 1).sum(), (sizes == 2).sum(), (sizes > 2).sum()]
    assert [int(row[16:24]) for row in rows] == counts and counts[0] and counts[1]
    assert "popularity, which has not one ID" in mistake(
        capsys, "shared_ids", str(places[1]), str(places[0])
    )


def test_a_script_ends_with_the_code_and_no_traceback():
    script = ROOT / "benchmarks/read_ratings.py"
    done = subprocess.run(
        [sys.executable, str(script), "--ratings", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def interrupted(arguments: list[str] | None) -> None:
    raise KeyboardInterrupt


def test_exit_codes_and_defects_pass_through(tmp_path):
    assert command(lambda arguments: None)() == 0
    assert command(lambda arguments: 1)() == 1
    assert command(lambda arguments: (tmp_path / "nowhere").read_text())() == 2
    assert command(interrupted)() == 130
    with pytest.raises(ZeroDivisionError):
        command(lambda arguments: 1 / 0)()


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "-0.5", "1.5"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="wants a number from 0 to 1"):
        share(text)


def test_numbers_within_the_limits_are_read():
    assert share("0") == 0 and share("1") == 1 and number(int, 20)("20") == 20
    with pytest.raises(ArgumentTypeError, match="wants a whole number of at least 20, not"):
        number(int, 20)("20.5")
