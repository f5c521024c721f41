"""The data card: one page that says what a data set is like."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from data_readers.tables import TEST, TRAIN, VALID, Catalogue, Dataset, Sequences

_SECONDS = (10**8, 10**11)  # timestamps in here are taken for seconds since 1970 (1973 to 5138)
_WIDTH = 22  # of the first column


class Ties(NamedTuple):
    """How far equal timestamps leave the order of a history open."""

    pairs: float  # share of neighbours in a history with the same time
    users: float  # share of users with such neighbours
    held_out: float  # share of held-out items that tie with the item before


def data_card(dataset: Dataset, labels: np.ndarray, read_with: str) -> str:
    """Sizes, histories, popularity, features, times and ties as text.

    Args:
        labels: [R], the split used where the data set has none of its own.
        read_with: the settings that decide what is left of the raw files.
    """
    sequences, catalogue = dataset.sequences, dataset.catalogue
    own = dataset.labels is not None
    labels = dataset.labels if own else labels
    users, items, rows = sequences.n_users, catalogue.n_items, len(sequences.items)
    lines = [
        ("read with", read_with),
        ("users", f"{users:,}"),
        ("items", f"{items:,}"),
        ("interactions", f"{rows:,}"),
        ("density", f"{rows / (users * items):.3g}"),
        ("history length", _spread(sequences.lengths)),
        ("split", _split(labels, own)),
        ("item popularity", _popularity(sequences, items)),
        ("repeats", f"{_repeats(sequences):.1%} of interactions are with an item seen before"),
        ("time", _span(sequences.timestamps)),
        ("ties", _tied(find_ties(sequences, labels))),
        ("titles", f"{(catalogue.titles != '').mean():.1%} of items"),
        *_features(catalogue, sequences),
        ("fingerprint", dataset.fingerprint),
    ]
    body = "\n".join(f"  {name:<{_WIDTH}}{value}" for name, value in lines)
    return f"{dataset.name}\n{body}"


def find_ties(sequences: Sequences, labels: np.ndarray) -> Ties:
    """Shares of neighbours, of users and of held-out items whose place in time is not settled."""
    if len(sequences.items) < 2:
        return Ties(0.0, 0.0, 0.0)
    owner = np.repeat(np.arange(sequences.n_users), sequences.lengths)
    neighbours = owner[1:] == owner[:-1]
    tied = neighbours & (np.diff(sequences.timestamps) == 0)
    held_out = np.asarray(labels)[1:] != TRAIN
    return Ties(
        pairs=_share(tied, neighbours),
        users=len(np.unique(owner[1:][tied])) / max(sequences.n_users, 1),
        held_out=_share(tied & held_out, held_out),
    )


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum()) / max(int(whole.sum()), 1)


def _spread(values: np.ndarray) -> str:
    low, middle, high, top = np.quantile(values, [0, 0.5, 0.9, 1]).astype(int)
    return f"mean {values.mean():.1f}, median {middle}, 90 % up to {high}, {low} to {top}"


def _split(labels: np.ndarray, own: bool) -> str:
    kind = "given by the source" if own else "leave one out"
    counts = [int((labels == part).sum()) for part in (TRAIN, VALID, TEST)]
    return "{}: {:,} train, {:,} valid, {:,} test".format(kind, *counts)


def _popularity(sequences: Sequences, n_items: int) -> str:
    counts = np.sort(np.bincount(sequences.items, minlength=n_items + 1)[1:])[::-1]
    top = counts[: max(1, n_items // 100)].sum() / max(counts.sum(), 1)
    untouched = (counts == 0).mean()
    return (
        f"median {int(np.median(counts))} interactions, top 1 % of items take {top:.1%}, "
        f"{untouched:.1%} untouched"
    )


def _repeats(sequences: Sequences) -> float:
    owner = np.repeat(np.arange(sequences.n_users, dtype=np.int64), sequences.lengths)
    width = int(sequences.items.max(initial=0)) + 1
    return 1 - len(np.unique(owner * width + sequences.items)) / max(len(owner), 1)


def _span(times: np.ndarray) -> str:
    real = times[times > 0]  # 0 stands for an unknown time
    if not len(real):
        return "no times"
    first, last = int(real.min()), int(real.max())
    for unit in (1, 1000):  # seconds, or milliseconds as Amazon 2023 has them
        if _SECONDS[0] <= first // unit <= last // unit < _SECONDS[1]:
            days = (datetime.fromtimestamp(t // unit, timezone.utc) for t in (first, last))
            unknown = f", {len(times) - len(real):,} are 0" if len(real) < len(times) else ""
            return " to ".join(f"{day:%Y-%m-%d}" for day in days) + unknown
    return f"{int(times.min())} to {last}: positions, no dates"


def _tied(ties: Ties) -> str:
    return (
        f"{ties.pairs:.1%} of neighbours in a history share a time ({ties.users:.1%} of users), "
        f"{ties.held_out:.1%} of held-out items tie with the one before"
    )


def _features(catalogue: Catalogue, sequences: Sequences) -> list[tuple[str, str]]:
    if not catalogue.modalities:
        return [("features", "none")]
    touched = np.asarray(sequences.items) - 1
    return [
        (
            name,
            f"{part.features.shape[1]} wide, {part.present.mean():.1%} of items, "
            f"{part.present[touched].mean():.1%} of interactions",
        )
        for name, part in catalogue.modalities.items()
    ]
