"""The benchmark that serves users as their items come in."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.follow_drift import beginnings, main, shuffled
from data_utils import Sequences
from experiments.runs import run


def test_beginnings_keep_the_oldest_items_of_every_user():
    items, offsets = np.arange(1, 9, dtype=np.int32), np.array([0, 5, 5, 6, 8])
    half = beginnings(Sequences(items, offsets, np.arange(8)), 0.5)
    assert [half.of(user).tolist() for user in range(4)] == [[1, 2, 3], [], [6], [7]]


def test_shuffled_histories_keep_their_items():
    items, offsets = np.arange(1, 41, dtype=np.int32), np.array([0, 25, 25, 40])
    mixed = shuffled(Sequences(items, offsets, np.arange(40)))
    assert not np.array_equal(mixed.items, items)
    for user in range(3):
        assert sorted(mixed.of(user)) == items[offsets[user] : offsets[user + 1]].tolist()


@pytest.fixture(scope="module")
def lines(tiny, task, tmp_path_factory):
    """`lines(*flags)` -> what the command prints for a small run."""
    folder = tmp_path_factory.mktemp("drift") / "pmat_seed42"
    folder.mkdir()
    run(tiny("pmat", {"pmat.grid": 4}), task, folder)

    def printed(capsys, *flags: str) -> dict[str, list[str]]:
        main([str(folder), *flags])
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
        return {row[0]: row for row in rows}

    return printed


def test_each_way_is_printed_and_stale_codes_differ(lines, capsys):
    found = lines(capsys, "--users", "20", "--step", "3")
    assert float(found["recomputed"][1]) == 0.0
    assert float(found["stale"][1]) > 0.0


def test_with_the_whole_history_known_nothing_is_stale(lines, capsys):
    found = lines(capsys, "--users", "20", "--known", "1")
    assert {float(found[way][1]) for way in ("stale", "updated", "recomputed")} == {0.0}
    assert len({found[way][3] for way in ("stale", "updated", "recomputed")}) == 1
