"""`python data_utils.py inspect PATH`: the figures of the card, and one line for a mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_readers.card import find_ties
from data_readers.tables import Sequences
from data_utils import leave_one_out, main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two users; the last two items of the first tie, one item is met twice, one never."""
    path = tmp_path / "shop"
    path.mkdir()
    rows = ["u,a,100000000", "u,b,200000000", "u,a,300000000", "u,c,300000000", "v,b,100000000"]
    header = "user_id,item_id,timestamp\n"
    (path / "interactions.csv").write_text(header + "\n".join(rows), encoding="utf-8")
    (path / "items.csv").write_text("item_id,title\na,A\nb,B\nc,\nd,D\n", encoding="utf-8")
    np.save(path / "text.npy", np.array([[1.0, 2], [3, 4], [np.nan] * 2, [np.nan] * 2]))
    return path


def card(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, str]:
    assert main(["inspect", *arguments]) == 0
    found = re.findall(r"^  (\S.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE)
    return dict(found)


def test_the_card_has_the_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = card(capsys, str(folder), "--data_dir", str(tmp_path))
    assert (found["users"], found["items"], found["interactions"]) == ("2", "4", "5")
    assert found["density"] == "0.625"
    assert found["history length"] == "mean 2.5, median 2, 90 % up to 3, 1 to 4"
    assert found["split"] == "leave one out: 3 train, 1 valid, 1 test"
    assert "25.0% untouched" in found["item popularity"]
    assert found["repeats"].startswith("20.0%")
    assert found["time"] == "1973-03-03 to 1979-07-05"
    assert found["ties"].startswith(
        "33.3% of neighbours in a history share a time (50.0% of users)"
    )
    assert "50.0% of held-out items tie" in found["ties"]
    assert found["titles"].startswith("75.0%")
    assert found["text"] == "2 wide, 50.0% of items, 80.0% of interactions"


def test_times_in_milliseconds_and_unknown_ones_are_understood(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "interactions.csv").write_text(
        "user_id,item_id,timestamp\nu,a,1577836800000\nu,b,1609459200000\nu,c,0\n", encoding="utf-8"
    )
    found = card(capsys, str(folder), "--data_dir", str(tmp_path))
    assert found["time"] == "2020-01-01 to 2021-01-01, 1 are 0"


def test_fractions_of_a_second_tell_interactions_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "interactions.csv").write_text(
        "user_id,item_id,timestamp\nu,a,0.75\nu,b,0.25\nu,c,0.5\n", encoding="utf-8"
    )
    found = card(capsys, str(folder), "--data_dir", str(tmp_path))
    assert found["ties"].startswith("0.0%")
    assert found["time"] != "no times"


def test_a_reader_that_has_gone_is_no_mistake() -> None:
    process = subprocess.Popen(
        [sys.executable, "data_utils.py", "inspect", "mock"],
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == b""
    process.stderr.close()


def test_settings_are_those_of_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = card(capsys, str(folder), "--data_dir", str(tmp_path), "--set", "data.features=none")
    assert found["features"] == "none"
    assert "features none" in found["read with"]
    assert card(capsys, "mock", "--set", "mock.n_users=20")["users"] == "20"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "dataset 'nowhere' was not found"),
        (["mock", "--set", "data.k_core"], "write it as key=value"),
        (["mock", "--set", "data.kcore=3"], "Did you mean 'data.k_core'"),
        (["mock", "--set", "data.features=audio"], "data.features is one of auto, text"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(["inspect", *arguments, "--data_dir", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_ties_do_not_reach_over_users() -> None:
    sequences = Sequences(np.arange(1, 7), np.array([0, 3, 6]), np.array([1, 2, 3, 3, 3, 4]))
    ties = find_ties(sequences, leave_one_out(sequences))
    assert (ties.pairs, ties.users, ties.held_out) == (0.25, 0.5, 0.25)
