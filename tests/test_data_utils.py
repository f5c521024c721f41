"""Splits, examples and batches, by hand and by property."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_readers.tables import TEST, TRAIN, VALID, Dataset, Sequences
from data_utils import (
    bucketed_order,
    eval_order,
    history_batch,
    leave_one_out,
    prefetch,
    split_dataset,
    train_batch,
    train_examples,
)

KINDS = ("positions", "prefixes")


def sequences(*histories: list[int]) -> Sequences:
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int64)
    return Sequences(items, offsets, np.arange(len(items)))


def dataset(histories: list[list[int]], labels: list[int] | None = None) -> Dataset:
    marks = None if labels is None else np.array(labels, dtype=np.int8)
    users = np.array([f"u{i}" for i in range(len(histories))])
    return Dataset("hand", users, sequences(*histories), None, marks, None, "")


def lists(found: Sequences) -> list[list[int]]:
    return [found.of(user).tolist() for user in range(found.n_users)]


# --------------------------------------------------------------------------- split


def test_the_last_item_is_test_and_the_one_before_valid():
    split = split_dataset(dataset([[1, 2, 3, 4], [5, 6, 7]]))
    assert lists(split.train) == [[1, 2], [5]]
    assert split.valid.items.tolist() == [3, 6] and split.test.items.tolist() == [4, 7]


def test_short_histories_stay_in_train_whole_and_nobody_is_dropped():
    split = split_dataset(dataset([[], [1], [2, 3], [4, 5, 6]]))
    assert lists(split.train) == [[], [1], [2, 3], [4]]
    assert split.valid.users.tolist() == split.test.users.tolist() == [3]
    assert split.valid.items.tolist() == [5] and split.test.items.tolist() == [6]


def test_a_test_history_ends_with_the_valid_item():
    split = split_dataset(dataset([[1, 2, 3, 4], [5, 6]]))
    assert lists(split.train_and_valid) == [[1, 2, 3], [5, 6]]


def test_labels_of_the_source_may_hold_out_several_items():
    labels = [TRAIN, VALID, TEST, TEST, TRAIN, TRAIN, TEST]
    split = split_dataset(dataset([[1, 2, 3, 4], [5, 6], [7]], labels))
    assert lists(split.train) == [[1], [5, 6], []]
    assert lists(split.train_and_valid) == [[1, 2], [5, 6], []]
    assert split.test.users.tolist() == [0, 2]
    assert split.test.items.tolist() == [3, 4, 7] and split.test.offsets.tolist() == [0, 2, 3]
    assert split.valid.users.tolist() == [0] and split.valid.offsets.tolist() == [0, 1]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_every_interaction_is_in_exactly_one_part(lengths):
    labels = leave_one_out(sequences(*[[1] * length for length in lengths]))
    counts = Counter(labels.tolist())
    held = sum(length >= 3 for length in lengths)
    assert counts[TEST] == counts[VALID] == held
    assert counts[TRAIN] == sum(lengths) - 2 * held


# --------------------------------------------------------------------------- examples


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), window=st.integers(2, 12))
def test_each_interaction_but_the_first_is_predicted_exactly_once(kind, lengths, window):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    train = sequences(*[list(range(a + 1, b + 1)) for a, b in pairwise(starts)])
    examples = train_examples(train, kind, window)
    predicted = Counter()
    for user, start, length, first in zip(*examples, strict=True):
        own = starts[user]
        assert 1 <= length <= window
        assert own <= start and start + length < starts[user + 1]
        for position in range(first, length):
            target = start + position + 1
            predicted[target] += 1
            # what comes before the target within the history, and how much of it is shown
            available, shown = target - own, position + 1
            wanted = min(available, window)
            assert shown == wanted if kind == "prefixes" else 2 * shown >= wanted
    expected = [i for a, b in pairwise(starts) for i in range(a + 1, b)]
    assert predicted == Counter(expected)


def test_a_batch_by_hand():
    train = sequences([1, 2, 3], [4], [5, 6, 7, 8, 9])
    examples = train_examples(train, "positions", 50)
    batch = train_batch(train, examples, np.array([1, 0]))
    assert batch.users.tolist() == [2, 0] and batch.lengths.tolist() == [4, 2]
    assert batch.items.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 9], [2, 3, 0, 0]]


def test_windows_of_a_long_history_by_hand():
    # 6 inputs in a window of 4: the second window moves back to be full and learns the rest only
    train = sequences([1, 2, 3, 4, 5, 6, 7])
    examples = train_examples(train, "positions", 4)
    batch = train_batch(train, examples, np.arange(2))
    assert batch.items.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert batch.targets.tolist() == [[2, 3, 4, 5], [0, 0, 6, 7]]


def test_prefixes_by_hand():
    train = sequences([1, 2, 3, 4])
    examples = train_examples(train, "prefixes", 2)
    batch = train_batch(train, examples, np.arange(3))
    assert batch.items.tolist() == [[1, 0], [1, 2], [2, 3]]
    assert batch.targets.tolist() == [[2, 0], [0, 3], [0, 4]]


def test_a_history_keeps_its_newest_items():
    batch = history_batch(sequences([1, 2, 3, 4], [], [5]), np.array([2, 0, 1]), 3)
    assert batch.items.tolist() == [[5, 0, 0], [2, 3, 4], [0, 0, 0]]
    assert batch.lengths.tolist() == [1, 3, 0]
    assert not batch.targets.any()


def test_users_without_any_history_still_make_a_batch():
    batch = history_batch(sequences([], []), np.array([0, 1]), 5)
    assert batch.items.tolist() == [[0], [0]] and batch.lengths.tolist() == [0, 0]


# --------------------------------------------------------------------------- order


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 9))
def test_an_epoch_visits_every_example_once(lengths, batch_size):
    order = bucketed_order(np.array(lengths), batch_size, np.random.default_rng(0), megabatch=3)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(lengths)))
    assert max(map(len, order)) <= batch_size


def test_the_order_depends_on_the_generator_only():
    lengths = np.random.default_rng(1).integers(1, 50, 500)
    one, two, other = (
        np.concatenate(bucketed_order(lengths, 16, np.random.default_rng(seed)))
        for seed in (5, 5, 6)
    )
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_batches_hold_little_padding():
    lengths = np.random.default_rng(1).integers(1, 50, 2000)
    order = bucketed_order(lengths, 20, np.random.default_rng(0))
    padded = sum(len(index) * lengths[index].max() for index in order)
    assert padded < 1.1 * lengths.sum()


def test_evaluation_visits_every_user_once():
    history = sequences([1], [1, 2, 3], [], [4, 5])
    order = np.concatenate(eval_order(history, np.array([0, 2, 3]), 2))
    assert sorted(order.tolist()) == [0, 1, 2]


# --------------------------------------------------------------------------- prefetch


def no_thread_beyond(before: set[threading.Thread]) -> bool:
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    return not set(threading.enumerate()) - before


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetching_yields_the_same_batches(ahead):
    before = set(threading.enumerate())
    assert list(prefetch(iter(range(20)), ahead)) == list(range(20))
    assert list(prefetch(iter([]), ahead)) == []
    assert no_thread_beyond(before)


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_while_building_a_batch_reaches_the_loop(ahead):
    def broken():
        yield 1
        raise KeyError("broken")

    batches = prefetch(broken(), ahead)
    assert next(batches) == 1
    with pytest.raises(KeyError, match="broken"):
        next(batches)


@pytest.mark.parametrize("n_batches", [1000, 3, 2])
def test_a_loop_that_stops_early_leaves_no_thread_behind(n_batches):
    # with 3 and 2 batches the source is exhausted while the queue is full
    before = set(threading.enumerate())
    batches = prefetch(iter(range(n_batches)), 2)
    assert next(batches) == 0
    time.sleep(0.3)  # the thread fills the queue
    batches.close()
    assert no_thread_beyond(before)
