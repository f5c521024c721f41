"""Ranks of held-out items against brute force, under both masking conventions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_readers.tables import Sequences
from data_utils import Targets
from experiments import runs
from experiments.evaluation import evaluate, rank_targets
from metrics import ranking_metrics
from model_parts.base import Batch, Recommender
from util import UserError

CPU = torch.device("cpu")


def average_rank(scores: list[float], target: int, candidates: set[int]) -> float:
    """Mean of the best and the worst place that `target` can take among equals."""
    own = scores[target - 1]
    rivals = [scores[item - 1] for item in candidates - {target}]
    best = 1 + sum(score > own for score in rivals)
    worst = best + sum(score == own for score in rivals)
    return (best + worst) / 2


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_ranks_equal_brute_force(data):
    n_items, n_users = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 4))
    # few different scores: many ties; histories and targets repeat items and hold padding
    scores = data.draw(arrays(np.float32, (n_users, n_items), elements=st.sampled_from([0, 1, 2])))
    items = st.integers(0, n_items)
    seen = data.draw(arrays(np.int64, (n_users, 6), elements=items))
    targets = data.draw(arrays(np.int64, (n_users, 3), elements=items))
    masked, unmasked = rank_targets(*map(torch.from_numpy, (scores, targets, seen))).tolist()
    catalogue = set(range(1, n_items + 1))
    for user in range(n_users):
        unseen = catalogue - set(seen[user].tolist())
        for slot, target in enumerate(targets[user].tolist()):
            if target:
                row = scores[user].tolist()
                assert masked[user][slot] == average_rank(row, target, unseen)
                assert unmasked[user][slot] == average_rank(row, target, catalogue)


class Known(Recommender):
    """Scores that are written down: row u of a table."""

    name = "known"

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.lengths: list[int] = []

    def score(self, batch: Batch) -> torch.Tensor:
        self.lengths += batch.lengths.tolist()
        return self.table[batch.users].clone()


HISTORY = Sequences(
    np.array([1, 2, 2, 4, 3, 5], np.int32), np.array([0, 4, 4, 6]), np.arange(6)
)  # user 0: 1 2 2 4; user 1: nothing; user 2: 3 5
TARGETS = Targets(np.array([0, 2]), np.array([3, 2, 1], np.int32), np.array([0, 2, 3]))


def test_both_conventions_by_hand(tiny):
    #                      1    2    3    4    5
    table = torch.tensor([[5.0, 4.0, 3.0, 9.0, 1.0], [0.0] * 5, [1.0, 2.0, 9.0, 3.0, 1.0]])
    found = evaluate(Known(table), HISTORY, TARGETS, tiny(), CPU, top=2)
    # user 0 has seen 1, 2, 4: item 3 is left alone with 5; target 2 was seen but stays in
    # user 2 has seen 3, 5: item 1 is behind 4 and 2, and ties with 5 where that counts
    assert found.masked.ranks.tolist() == [1.0, 1.0, 3.0]
    assert found.unmasked.ranks.tolist() == [4.0, 3.0, 4.5]
    assert found.masked.users.tolist() == [0, 2] and found.masked.targets.tolist() == [3, 2, 1]
    assert found.lists.tolist() == [[3, 5], [4, 2]]


def test_lists_follow_the_protocol(tiny):
    table = torch.tensor([[5.0, 4.0, 3.0, 9.0, 1.0]] * 3)
    config = tiny(settings={"train.mask_seen": False})
    assert evaluate(Known(table), HISTORY, TARGETS, config, CPU, top=2).lists[0].tolist() == [4, 1]


def test_seen_items_are_masked_beyond_the_window_of_the_model(tiny):
    model = Known(torch.tensor([[5.0, 4.0, 3.0, 9.0, 1.0]] * 3))
    found = evaluate(model, HISTORY, TARGETS, tiny(settings={"data.max_history": 2}), CPU)
    assert max(model.lengths) == 2
    assert found.masked.ranks[0] == 1.0  # items 1 and 2 are out of its sight, yet masked


def test_a_model_that_scores_nan_is_stopped(tiny):
    table = torch.zeros(3, 5)
    table[2, 1] = float("nan")
    with pytest.raises(UserError, match="known scored NaN"):
        evaluate(Known(table), HISTORY, TARGETS, tiny(), CPU)


@pytest.mark.parametrize("value", [0.0, float("-inf")])
def test_scoring_all_items_alike_is_not_above_chance(tiny, task, value):
    n_users, n_items = task.dataset.sequences.n_users, task.dataset.catalogue.n_items
    model = Known(torch.full((n_users, n_items), value))
    found = evaluate(model, task.split.train_and_valid, task.split.test, tiny(), CPU)
    metrics = ranking_metrics(found.unmasked)
    assert all(metrics[f"recall@{k}"] <= k / n_items for k in (5, 10, 20))
    assert metrics["mrr"] <= 2 / n_items


def test_a_run_starts_each_prediction_from_what_came_before_the_target(
    tiny, task, tmp_path, monkeypatch
):
    asked = []

    def watched(model, history, targets, *rest, **more):
        asked.append((history, targets, more["note"]))
        return evaluate(model, history, targets, *rest, **more)

    monkeypatch.setattr(runs, "evaluate", watched)
    runs.run(tiny("popularity"), task, tmp_path)
    assert {note for _, _, note in asked} == {"valid", "test"}
    for history, targets, note in asked:
        held_out = {"valid": 2, "test": 1}[note]
        for user, target in zip(targets.users, targets.items, strict=True):
            whole = task.dataset.sequences.of(user).tolist()
            assert history.of(user).tolist() == whole[:-held_out]
            assert target == whole[-held_out]


def test_the_batch_size_of_evaluation_changes_nothing(tiny, task):
    shape = (task.dataset.sequences.n_users, task.dataset.catalogue.n_items)
    model = Known(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    history, targets = task.split.train_and_valid, task.split.test
    one, two = (
        evaluate(model, history, targets, tiny(settings={"train.eval_batch_size": s}), CPU, top=5)
        for s in (1, 1000)
    )
    assert np.array_equal(one.masked.ranks, two.masked.ranks)
    assert np.array_equal(one.lists, two.lists)
