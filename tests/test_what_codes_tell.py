"""The benchmark that asks whether codes know the target: does it see a leak, and only a leak?"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.what_codes_tell import Pairs, as_popular, entropy_over_users, main, matched_auc
from experiments.runs import run
from model_parts.base import Batch


def test_the_other_item_is_as_popular_and_was_never_had():
    counts = np.arange(100)  # the higher its number, the more popular an item is
    targets, had = np.array([40, 90]), [np.arange(26, 46), np.arange(70, 101)]
    for _ in range(20):
        first, second = as_popular(targets, had, counts, np.random.default_rng())
        assert 46 <= first <= 50, "within ten places, and not among those the user had"
        assert 50 <= second < 70, "the search went further, as all items near were had"


def test_entropy_over_users_by_hand():
    codes = np.array([[[0, 3]], [[0, 4]], [[0, 5]], [[0, 6]]])  # one item: 0 bits and 2 bits
    assert entropy_over_users(codes) == pytest.approx(1.0)


@pytest.mark.parametrize("leaks", [True, False])
def test_a_leak_is_seen_and_nothing_else(leaks):
    n_users, n_items = 400, 50
    rng = np.random.default_rng(1)

    def pairs() -> Pairs:
        targets = rng.integers(1, n_items + 1, n_users)
        others = rng.integers(1, n_items + 1, n_users)
        one = torch.ones(n_users, dtype=torch.long)
        answers = torch.from_numpy(targets)
        return Pairs(Batch(one, one[:, None], one, answers[:, None]), (targets, others))

    class Model:
        own = SimpleNamespace(codes=2)
        traits = present = torch.zeros(n_items)
        attention = SimpleNamespace(pairs=lambda *_: torch.full((2, n_users), 0.5))

        def view(self, batch):
            return SimpleNamespace(context=batch.targets[:, 0])

        def pair_points(self, view, rows):
            return (view.context == rows + 1).long() * leaks

        def ids(self, points, rows):
            return points[:, None]

    learn, judge = pairs(), pairs()
    everybody = np.arange(n_users)
    found = matched_auc(Model(), learn, judge, everybody)
    assert found > 0.95 if leaks else found == 0.5
    assert abs(matched_auc(Model(), learn, judge, np.roll(everybody, 1)) - 0.5) < 0.05


def test_the_command_prints_every_figure(tiny, task, tmp_path, capsys):
    config = tiny("pmat")
    folder = tmp_path / "pmat_seed42"
    folder.mkdir()
    run(config, task, folder)
    main([str(folder)])
    shown = capsys.readouterr().out
    for name in ("AUC", "another user's eyes", "entropy of alpha", "collisions", "bits of a digit"):
        assert name in shown
