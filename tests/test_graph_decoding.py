"""The benchmark of RPG's two ways to decode."""

from __future__ import annotations

from benchmarks.graph_decoding import main
from experiments.runs import run


def test_a_walk_over_all_items_finds_what_exact_scores_find(tiny, task, tmp_path, capsys):
    run(tiny("rpg"), task, tmp_path)
    main([str(tmp_path), "--users", "30", "--walks", "50,50,1", "1,2,1"])
    lines = capsys.readouterr().out.splitlines()
    exact, everything, little = [line for line in lines if "graph built" not in line]
    assert exact.split()[1:5] == everything.split()[2:6]
    assert float(little.split()[3]) < float(exact.split()[2])


def test_a_model_without_a_graph_is_named(tiny, task, tmp_path, capsys):
    run(tiny("sasrec"), task, tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "is a run of sasrec" in capsys.readouterr().err
