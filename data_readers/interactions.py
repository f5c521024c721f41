"""Rows of who touched what when -> Sequences: order, duplicates, rating threshold, k-core."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from data_readers.tables import Sequences
from util import UserError

log = logging.getLogger("pmat")

TIE_POLICIES = ("file", "shuffle")
FEATURES = ("auto", "text", "visual", "none")


@dataclass(frozen=True)
class Options:
    """What the user may choose about reading; part of the fingerprint. Raises UserError."""

    min_rating: float = 0.0  # drop interactions rated below
    k_core: int = 0  # drop users and items until each has this many interactions
    tie_policy: str = "file"  # equal timestamps of a user: file order, or seeded shuffle
    seed: int = 42  # of that shuffle
    features: str = "auto"  # all there are, only "text" or "visual", or "none"

    def __post_init__(self) -> None:
        if self.tie_policy not in TIE_POLICIES:
            raise UserError(f"tie_policy is {self.tie_policy!r}; it must be one of {TIE_POLICIES}.")
        if self.features not in FEATURES:
            raise UserError(f"features is {self.features!r}; it must be one of {FEATURES}.")
        if self.k_core < 0:
            raise UserError(f"k_core is {self.k_core}; it must be 0 (off) or more.")

    def identity(self) -> dict:
        """The choices that can change the result: without a shuffle all seeds share a cache."""
        chosen = asdict(self)
        if self.tie_policy != "shuffle":
            del chosen["seed"]
        return chosen


DEFAULTS = Options()


class RawFile(Protocol):
    """The file that rows came from, to name in messages: `parsing.Table` is one."""

    path: Path

    def line(self, row: int) -> int:
        """Line of the file on which row `row` (from 0) starts."""


class Interactions(NamedTuple):
    """Rows in file order. Codes of users count up in order of first appearance."""

    users: np.ndarray  # [R] int, 0..U-1
    items: np.ndarray  # [R] int, 0..N-1: rows of the catalogue
    timestamps: np.ndarray | None  # [R] number; None: file order is all there is
    ratings: np.ndarray | None  # [R] float64
    labels: np.ndarray | None  # [R] int8


class Arranged(NamedTuple):
    """Sequences over the users and items that remain."""

    sequences: Sequences
    labels: np.ndarray | None  # [R] int8, aligned with sequences.items
    users: np.ndarray  # [U'] which user codes remain, in order
    items: np.ndarray  # [N'] which item codes remain, in order


def arrange(
    raw: Interactions, n_items: int, options: Options, source: RawFile, *, once: bool = False
) -> Arranged:
    """Sort by user and time, drop duplicates, apply min_rating, then k_core.

    With `once` (opinions, not visits) only the first of a user's interactions with an item counts,
    also when min_rating then drops it.
    Users and items are dropped only by k_core; min_rating alone may leave a history empty. Raises
    UserError where nothing remains or min_rating finds no ratings.
    """
    n_users = int(raw.users.max()) + 1
    order = time_order(raw, options)  # everything below narrows this index into the raw rows
    repeated = _seen_before(raw, order, n_items) if once else _duplicates(raw, order)
    if repeated.any():
        same = "user and item" if once else "user, item and timestamp"
        log.warning(
            "%s: dropped %d rows that repeat an earlier %s, first at line %d",
            source.path, repeated.sum(), same, source.line(order[repeated].min()),
        )  # fmt: skip
        order = order[~repeated]
    if options.min_rating > 0:
        if raw.ratings is None:
            raise UserError(
                f"{source.path} has no column 'rating', which min_rating={options.min_rating} "
                "needs; add the column or set min_rating to 0."
            )
        order = order[raw.ratings[order] >= options.min_rating]
    users = items = None
    if options.k_core:
        order = order[k_core(raw.users[order], raw.items[order], options.k_core)]
        users, items = np.unique(raw.users[order]), np.unique(raw.items[order])
    if not len(order):
        raise UserError(
            f"{source.path}: no interaction is left with min_rating={options.min_rating} and "
            f"k_core={options.k_core}; lower them."
        )
    users = np.arange(n_users) if users is None else users
    items = np.arange(n_items) if items is None else items

    lengths = np.bincount(raw.users[order], minlength=n_users)[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    number = np.zeros(n_items, np.int32)
    number[items] = np.arange(1, len(items) + 1)
    if raw.timestamps is None:
        timestamps = np.arange(len(order)) - np.repeat(offsets[1:], lengths)  # ..., -2, -1
    else:
        timestamps = raw.timestamps[order]
        if (timestamps % 1).any():  # fractions of a second: what is kept is the order
            timestamps = np.unique(timestamps, return_inverse=True)[1]
        timestamps = timestamps.astype(np.int64)
    labels = None if raw.labels is None else raw.labels[order]
    sequences = Sequences(number[raw.items[order]], offsets, timestamps)
    return Arranged(sequences, labels, users, items)


def time_order(raw: Interactions, options: Options) -> np.ndarray:
    """[R] row indices by user, then time. Ties keep file order or are shuffled by the seed."""
    if raw.timestamps is None:
        return np.argsort(raw.users, kind="stable")
    if options.tie_policy == "file":
        return np.lexsort((raw.timestamps, raw.users))  # lexsort is stable
    ties = np.random.default_rng(options.seed).permutation(len(raw.users))
    return np.lexsort((ties, raw.timestamps, raw.users))


def _duplicates(raw: Interactions, order: np.ndarray) -> np.ndarray:
    """[R] bool over `order`: the same user, item, timestamp and label as an earlier row."""
    repeated = np.zeros(len(order), bool)
    if raw.timestamps is None:
        return repeated  # a repeat is then one more step of the history
    users, times = raw.users[order], raw.timestamps[order]
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    if not same.any():
        return repeated
    # Only rows that tie on user and time can be duplicates: few, so this second sort is cheap.
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    run = np.cumsum(~np.append(False, same))[tied]
    item, row = raw.items[order[tied]], order[tied]
    # of a row of train and one of test neither repeats the other: the split is the source's
    label = np.zeros(len(row), np.int8) if raw.labels is None else raw.labels[row]
    by_item = np.lexsort((row, label, item, run))
    again = np.all([np.diff(key[by_item]) == 0 for key in (run, item, label)], axis=0)
    repeated[tied[by_item[1:][again]]] = True
    return repeated


def _seen_before(raw: Interactions, order: np.ndarray, n_items: int) -> np.ndarray:
    """[R] bool over `order`: the user had this item before, at whatever time."""
    pairs = raw.users[order].astype(np.int64) * n_items
    pairs += raw.items[order]
    return pd.Series(pairs, copy=False).duplicated().to_numpy()


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """[R] bool: rows of the largest subset in which every user and item has at least k rows."""
    left = np.arange(len(users))
    while True:
        keep = (np.bincount(users[left])[users[left]] >= k) if len(left) else np.ones(0, bool)
        if len(left):
            keep &= np.bincount(items[left])[items[left]] >= k
        if keep.all():
            break
        left = left[keep]
    mask = np.zeros(len(users), bool)
    mask[left] = True
    return mask
