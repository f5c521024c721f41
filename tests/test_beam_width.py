"""How many beams a model that writes IDs needs."""

from __future__ import annotations

from benchmarks.beam_width import main
from experiments.runs import run


def test_a_beam_for_every_item_is_enough_and_one_is_not(tiny, task, tmp_path, capsys):
    run(tiny("fusid"), task, tmp_path)
    main([str(tmp_path), "--beams", "1", "50", "80", "--users", "30"])
    one, all_items, more = (line.split() for line in capsys.readouterr().out.splitlines())
    assert all_items[2:6] == more[2:6], "more beams than IDs change nothing"
    assert float(one[3]) < float(all_items[3]), "one beam ends at one ID"


def test_a_model_without_beams_is_named(tiny, task, tmp_path, capsys):
    run(tiny("sasrec"), task, tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "sasrec, which has no beams" in capsys.readouterr().err


def test_no_beams_are_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--beams", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
