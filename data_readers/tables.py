"""The two things every reader yields: sequences and a catalogue."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

TRAIN, VALID, TEST = 0, 1, 2


class Sequences(NamedTuple):
    """Histories of all users in one flat array; user u owns `items[offsets[u]:offsets[u+1]]`."""

    items: np.ndarray  # [R] int32, 1..N (0 is kept for padding), each user's in time order
    offsets: np.ndarray  # [U+1] int64
    timestamps: np.ndarray  # [R] int64, as in the source; where it has none ..., -2, -1

    @property
    def n_users(self) -> int:
        """Users, those with an empty history included."""
        return len(self.offsets) - 1

    @property
    def timed(self) -> bool:
        """Whether there are times, not just the order of the rows."""
        rows = np.arange(len(self.timestamps)) - np.repeat(self.offsets[1:], self.lengths)
        return bool((self.timestamps != rows).any())

    @property
    def lengths(self) -> np.ndarray:
        """[U] items in each history."""
        return np.diff(self.offsets)

    def of(self, user: int) -> np.ndarray:
        """The history of one user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


class Modality(NamedTuple):
    """Features of one modality. A missing row is all zeros and `present` is False there."""

    features: np.ndarray  # [N, d] float32, standardised over the rows that are present
    present: np.ndarray  # [N] bool


class Catalogue(NamedTuple):
    """Items 1..N; row i-1 of every array belongs to item i."""

    item_ids: np.ndarray  # [N] str, as in the source
    titles: np.ndarray  # [N] str, empty where unknown
    categories: np.ndarray  # [N] str, a coarse label to colour plots by, empty where unknown
    modalities: dict[str, Modality]

    @property
    def n_items(self) -> int:
        """Items in the catalogue, those nobody touched included."""
        return len(self.item_ids)


class Truth(NamedTuple):
    """What the mock generator planted, so that tests and plots can check what a model found."""

    user_weights: np.ndarray  # [U, M] float32, true modality weights before any drift
    drifted_weights: np.ndarray  # [U, M] float32, after the drift (equal where none)
    drift_steps: np.ndarray  # [U] int64, first position under the new weights, -1 = never drifts
    user_groups: np.ndarray  # [U] str: the leading modality, or "mixed"


class Dataset(NamedTuple):
    """One data set as read, before it is split."""

    name: str
    user_ids: np.ndarray  # [U] str, as in the source
    sequences: Sequences
    catalogue: Catalogue
    labels: np.ndarray | None  # [R] int8 TRAIN / VALID / TEST where the source has its own split
    truth: Truth | None  # mock only
    fingerprint: str  # hash of the raw bytes and the reading options

    def checksum(self) -> int:
        """CRC-32 of what is read: users, items, interactions, splits and features.

        Unlike the fingerprint it stays when files are copied.
        """
        sequences, catalogue = self.sequences, self.catalogue
        parts = [*sequences, self.labels, self.user_ids, catalogue.item_ids]
        for name in sorted(catalogue.modalities):
            parts += catalogue.modalities[name]
        found = 0
        for part in parts:
            if part is not None:
                found = zlib.crc32(np.ascontiguousarray(part).view(np.uint8), found)
        return found
