"""Groups of users for whom a comparison is repeated: where does a model help, and where not?

Groups come from the data and from what was planted in them, never from results.
"""

from __future__ import annotations

import numpy as np

from data_utils import Sequences
from experiments.runs import Task
from metrics import Ranks

COLD = 5  # train interactions of a cold item, at most


def user_groups(task: Task, ranks: Ranks) -> dict[str, np.ndarray]:
    """Name -> [E] which users of `ranks` belong; groups without users are left out.

    Cold and warm targets (by train interactions; a user with several targets counts as cold when
    all are), the quarters with the shortest and longest histories, histories with and without gaps
    in the features, and on mock the planted leaders and drifters.
    """
    histories = task.split.train_and_valid
    found = {"all users": np.ones(len(ranks.users), dtype=bool)}
    found |= _by_target(task, ranks)
    found |= _by_length(histories.lengths[ranks.users])
    found |= _by_gaps(task, histories, ranks.users)
    found |= _by_plant(task, ranks.users)
    return {name: members for name, members in found.items() if members.any()}


def _by_target(task: Task, ranks: Ranks) -> dict[str, np.ndarray]:
    counts = np.bincount(task.split.train.items, minlength=task.dataset.catalogue.n_items + 1)
    rare = counts[ranks.targets] <= COLD
    cold = np.logical_and.reduceat(rare, ranks.offsets[:-1])
    return {
        f"cold target (≤ {COLD} in train)": cold,
        f"warm target (> {COLD} in train)": ~cold,
    }


def _by_length(lengths: np.ndarray) -> dict[str, np.ndarray]:
    short, long = (int(q) for q in np.quantile(lengths, [0.25, 0.75], method="nearest"))
    if short == long:
        return {}
    return {
        f"short history (≤ {short} items)": lengths <= short,
        f"long history (≥ {long} items)": lengths >= long,
    }


def _by_gaps(task: Task, histories: Sequences, users: np.ndarray) -> dict[str, np.ndarray]:
    parts = [part.present for part in task.dataset.catalogue.modalities.values()]
    if not parts:
        return {}
    # [N] modalities an item lacks: whole numbers, or equal shares would differ in the last bit
    missing = (~np.stack(parts)).sum(0)
    sums = np.concatenate([[0], np.cumsum(missing[histories.items - 1])])
    wanted = len(parts) * np.maximum(histories.lengths[users], 1)
    gaps = np.diff(sums[histories.offsets])[users] / wanted
    if not gaps.any():
        return {}
    limit = np.quantile(gaps, 0.75)
    whole = gaps <= np.quantile(gaps, 0.25)
    much = (
        f"{100 * limit:.{0 if limit > 0.005 else 2}f} % of history or more"
        if limit > 0
        else "in any item of the history"
    )
    return {
        f"modalities missing ({much})": (gaps >= limit) & ~whole,
        "modalities missing least": whole,
    }


def _by_plant(task: Task, users: np.ndarray) -> dict[str, np.ndarray]:
    truth = task.dataset.truth
    if truth is None:
        return {}
    drifts = truth.drift_steps[users] >= 0
    of_group = truth.user_groups[users]
    led = {
        f"planted: {name}, never drifts": (of_group == name) & ~drifts
        for name in np.unique(of_group)
    }
    return led | {"planted: drifts": drifts, "planted: never drifts": ~drifts}
