"""From a data set to batches: the time-ordered split, train examples, seeded buckets.

The face of `data_readers`: `load_dataset(config)` reads, `split_dataset` holds out, `train_batches`
and `eval_batches` yield numpy batches whose fields are those of `model_parts.base.Batch`.

`python data_utils.py inspect PATH` prints a data card of any data set.
"""

from __future__ import annotations

import argparse
import logging
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

import data_readers
from config import Config, ConfigError, build_config, read_pairs
from data_readers.card import data_card
from data_readers.tables import TEST, TRAIN, VALID, Catalogue, Dataset, Sequences
from util import UserError, say

__all__ = ["Catalogue", "Dataset", "Sequences", "load_dataset", "split_dataset"]


class Targets(NamedTuple):
    """Held-out items of the users that have any."""

    users: np.ndarray  # [E] int64, ascending
    items: np.ndarray  # [R] int32, flat
    offsets: np.ndarray  # [E+1] int64


class Split(NamedTuple):
    """Train histories and the two held-out sets."""

    train: Sequences
    train_and_valid: Sequences  # the history a test prediction starts from
    valid: Targets
    test: Targets


class Examples(NamedTuple):
    """Train examples as spans of the flat train items.

    Example e shows `items[start:start+length]` and predicts the items that follow its positions
    `first_loss .. length-1`; item `start+length` exists for every example.
    """

    users: np.ndarray  # [E] int64
    starts: np.ndarray  # [E] int64
    lengths: np.ndarray  # [E] int64
    first_loss: np.ndarray  # [E] int64


class NumpyBatch(NamedTuple):
    """The fields of `model_parts.base.Batch` before they become tensors."""

    users: np.ndarray  # [B]
    items: np.ndarray  # [B, T]
    lengths: np.ndarray  # [B]
    targets: np.ndarray  # [B, T]


def load_dataset(config: Config) -> Dataset:
    """Read what `config.data` names. Raises util.UserError with one clear sentence."""
    data = config.data
    return data_readers.read(
        data.dataset,
        data_dir=data.data_dir,
        mock=config.mock,
        min_rating=data.min_rating,
        k_core=data.k_core,
        tie_policy=data.tie_policy,
        seed=data.seed,
        features=data.features,
        use_cache=data.cache,
        raw=data_readers.RawChoices(
            data.edition, data.features_from, data.text_encoder, data.image_encoder
        ),
    )


# --------------------------------------------------------------------------- split


def split_dataset(dataset: Dataset) -> Split:
    """Leave-one-out in time order, or the source's own labels where it has them.

    Leave-one-out: of a user with at least three interactions the last is test, the second last
    valid; shorter histories stay in train whole. Nobody is dropped.
    """
    sequences, labels = dataset.sequences, dataset.labels
    if labels is None:
        labels = leave_one_out(sequences)
    return Split(
        train=_select(sequences, labels == TRAIN),
        train_and_valid=_select(sequences, labels != TEST),
        valid=_held_out(sequences, labels == VALID),
        test=_held_out(sequences, labels == TEST),
    )


def leave_one_out(sequences: Sequences) -> np.ndarray:
    """[R] int8 labels: the last interaction is TEST, the one before it VALID."""
    labels = np.full(len(sequences.items), TRAIN, dtype=np.int8)
    ends = sequences.offsets[1:][sequences.lengths >= 3]
    labels[ends - 1] = TEST
    labels[ends - 2] = VALID
    return labels


def _owners(sequences: Sequences) -> np.ndarray:
    return np.repeat(np.arange(sequences.n_users), sequences.lengths)


def _select(sequences: Sequences, keep: np.ndarray) -> Sequences:
    counts = np.bincount(_owners(sequences)[keep], minlength=sequences.n_users)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Sequences(sequences.items[keep], offsets, sequences.timestamps[keep])


def _held_out(sequences: Sequences, keep: np.ndarray) -> Targets:
    users, counts = np.unique(_owners(sequences)[keep], return_counts=True)
    return Targets(users, sequences.items[keep], np.concatenate([[0], np.cumsum(counts)]))


# --------------------------------------------------------------------------- examples


def train_examples(
    train: Sequences, kind: Literal["positions", "prefixes"], max_history: int
) -> Examples:
    """All train examples; every interaction but each user's first is predicted exactly once.

    `positions`: one span a user with a loss at every position; a history longer than the window is
    covered by spans that overlap by half, whose loss starts where the span before ended.
    `prefixes`: one span per predicted item, with a loss at its last position only.
    """
    if kind == "prefixes":
        return _prefixes(train, max_history)
    return _windows(train, max_history)


def _prefixes(train: Sequences, max_history: int) -> Examples:
    predicted = np.maximum(train.lengths - 1, 0)
    users = np.repeat(np.arange(train.n_users), predicted)
    position = _running_index(predicted) + 1  # of the predicted item in its user's history
    lengths = np.minimum(position, max_history)
    starts = train.offsets[users] + position - lengths
    return Examples(users, starts, lengths, lengths - 1)


def _windows(train: Sequences, max_history: int) -> Examples:
    stride = max(max_history // 2, 1)
    inputs = np.maximum(train.lengths - 1, 0)  # the last train item is only ever a target
    extra = np.maximum(-(-(inputs - max_history) // stride), 0)
    windows = np.where(inputs > 0, 1 + extra, 0)
    users = np.repeat(np.arange(train.n_users), windows)
    index = _running_index(windows)
    # every window of a long history is full: the last one is moved back to end at the end
    begin = np.minimum(index * stride, np.maximum(inputs[users] - max_history, 0))
    lengths = np.minimum(inputs[users] - begin, max_history)
    covered = np.where(index > 0, (index - 1) * stride + max_history, 0)
    return Examples(users, train.offsets[users] + begin, lengths, np.maximum(covered - begin, 0))


def _running_index(counts: np.ndarray) -> np.ndarray:
    """[0..c0-1, 0..c1-1, ...] for counts [c0, c1, ...]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


# --------------------------------------------------------------------------- batches


def bucketed_order(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator, megabatch: int = 50
) -> list[np.ndarray]:
    """Random batches of examples of similar length, as index arrays.

    Examples are shuffled, cut into megabatches, sorted by length inside each and cut into batches,
    which are shuffled again: little padding, yet no fixed partners.
    """
    order = rng.permutation(len(lengths))
    span = batch_size * megabatch
    batches = []
    for start in range(0, len(order), span):
        block = order[start : start + span]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def train_batch(train: Sequences, examples: Examples, index: np.ndarray) -> NumpyBatch:
    """The examples `index` as one padded batch."""
    starts, lengths = examples.starts[index], examples.lengths[index]
    position = np.arange(lengths.max())
    real = position < lengths[:, None]
    where = np.where(real, starts[:, None] + position, 0)
    wanted = real & (position >= examples.first_loss[index][:, None])
    items = np.where(real, train.items[where], 0)
    targets = np.where(wanted, train.items[np.where(wanted, where + 1, 0)], 0)
    return NumpyBatch(
        examples.users[index], items.astype(np.int64), lengths, targets.astype(np.int64)
    )


def history_batch(history: Sequences, users: np.ndarray, max_history: int) -> NumpyBatch:
    """The newest `max_history` items of each user; no targets."""
    lengths = np.minimum(history.lengths[users], max_history)
    position = np.arange(max(lengths.max(initial=0), 1))
    real = position < lengths[:, None]
    starts = history.offsets[users + 1] - lengths
    items = np.zeros(real.shape, dtype=np.int64)
    items[real] = history.items[(starts[:, None] + position)[real]]
    return NumpyBatch(users, items, lengths, np.zeros_like(items))


def eval_order(history: Sequences, users: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Positions in `users`, cut into batches of similar history length."""
    order = np.argsort(history.lengths[users], kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def prefetch(batches: Iterator, ahead: int) -> Iterator:
    """The same batches, built by a thread `ahead` steps early (0: in place)."""
    if ahead == 0:
        yield from batches
        return
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(entry: tuple) -> None:
        while not stopped.is_set():  # a reader that left must not hold the thread
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        outcome: BaseException = StopIteration()
        try:
            for batch in batches:
                put((batch, None))
                if stopped.is_set():
                    return
        except BaseException as error:  # handed to the reader, who raises it
            outcome = error
        put((None, outcome))

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            batch, end = ready.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield batch
    finally:
        stopped.set()


# --------------------------------------------------------------------------- data card


def main(arguments: list[str] | None = None) -> int:
    """`inspect PATH`: print a data card. 0 done, 2 the user's mistake."""
    parser = argparse.ArgumentParser(description="Look at a data set as main.py would read it.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print a data card")
    inspect.add_argument("dataset", metavar="PATH", help="a folder, mock, amazon or movielens")
    inspect.add_argument("--data_dir", default="./data", help="folder of the data sets")
    inspect.add_argument("--set", metavar="KEY=VALUE", action="append", default=[])
    found = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pmat").setLevel(logging.INFO)
    try:
        given = {"data.dataset": found.dataset, "data.data_dir": found.data_dir}
        config = build_config(given | read_pairs(found.set))
        dataset = load_dataset(config)
        choices = ("min_rating", "k_core", "tie_policy", "features")
        read_with = ", ".join(f"{key} {getattr(config.data, key)}" for key in choices)
        say(data_card(dataset, leave_one_out(dataset.sequences), read_with))
    except KeyboardInterrupt:
        return 130
    except (ConfigError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
