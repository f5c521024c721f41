"""The benchmark that looks at semantic IDs before any generator is trained."""

from __future__ import annotations

import pytest

from benchmarks.tokenizers import main
from experiments.training import Trainer


def test_a_change_has_a_line_of_its_own(capsys, small_flags, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("a generator was trained"))
    main(["--model", "rpg,letter", "--vary", "letter.codes=4", *small_flags])
    header, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines}
    assert list(rows) == ["rpg", "letter", "letter.codes=4"]
    assert header.split()[:3] == ["own", "ID", "usage"]
    perplexity = {name: row[3] for name, row in rows.items()}
    assert perplexity["letter.codes=4"] <= 4 < perplexity["letter"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "sasrec"], "sasrec has no semantic IDs"),
        (["--model", "leter"], "letter"),
        (["--set", "letter.code=4"], "letter.codes"),
        (["--set", "letter.codes"], "write it as key=value"),
        (["--model", "letter", "--vary", "leter.codes=4"], "letter.codes"),
        (["--model", "letter", "--vary", "fusid.codes=4"], "a setting of no model"),
    ],
)
def test_mistakes_are_one_line(capsys, small_flags, flags, message):
    assert main([*small_flags, *flags]) == 2
    assert message in capsys.readouterr().err
