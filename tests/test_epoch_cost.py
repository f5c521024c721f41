"""The benchmark of what epochs cost."""

from __future__ import annotations

from benchmarks.epoch_cost import main


def test_the_first_model_is_the_measure(capsys, small_flags):
    main(["--model", "sasrec,pmat", "--steps", "2", *small_flags])
    header, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert header.split()[-1] == "ratio"
    assert list(rows) == ["sasrec", "pmat"]
    assert rows["sasrec"][-1] == "1.00"
    assert float(rows["pmat"][-1]) > 0


def test_what_makes_it_faster_is_timed_against_going_without(capsys, small_flags):
    main(["--model", "tiger", "--plain", "--steps", "2", *small_flags])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:18].strip() for line in lines] == ["tiger, plain", "+ dropout, norm", "+ mixed"]
    assert lines[0].split()[-1] == "1.00"


def test_a_model_with_nothing_to_learn_is_refused(capsys, small_flags):
    assert main(["--model", "popularity", *small_flags]) == 2
    assert "popularity" in capsys.readouterr().err


def test_one_step_an_epoch_can_not_be_timed(capsys, small_flags):
    assert main(["--model", "sasrec", *small_flags, "--set", "train.batch_size=60"]) == 2
    assert "train.batch_size=60" in capsys.readouterr().err
