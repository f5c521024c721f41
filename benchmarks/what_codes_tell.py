"""What the codes and modality weights of a trained PMAT give away, and how steady they are.

    python benchmarks/what_codes_tell.py results/baseline_.../pmat_seed42 [RUN ...] [--users 4000]

For each run of `pmat` or `pmat_mcrl`, on test users:
- Does an item's code know that it is the target? A logistic regression sees nothing but alpha(u, i)
  and the codes of item i in the eyes of user u. It learns, on one half of the users, to tell their
  last train item from an item as popular that they did not have, and is judged on the test targets
  of the other half (then the other way round). AUC is the share of pairs in the right order; .5 is
  nothing. In another user's eyes it is what items alone tell, such as a fashion.
- Entropy of alpha over its largest value; variance of alpha_m over users (mean over items) and over
  the items that have all modalities (mean over users): how much of it depends on either.
- Share of items whose ID is not unique for a user, of those whose first personal digit changes
  when one more item arrives (in codes made anew, as the generator sees them, and in those that the
  server keeps), entropy of a personal digit over users, in bits.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, number
from data_utils import Sequences, history_batch
from experiments.personal import without_newest
from experiments.runs import Task, load_trained
from metrics import uniqueness
from model_parts.base import Batch
from our_models.pmat import PMAT
from our_models.serving import Server
from util import UserError

MEASURED_USERS = 64  # whose codes of all items are compared


class Pairs(NamedTuple):
    """What each of E users took next, and an item as popular that the user never had."""

    histories: Batch  # up to then
    items: tuple[np.ndarray, np.ndarray]  # [E] each, 1..N: the target, the other


# --------------------------------------------------------------------------- is a target given away


def as_popular(
    targets: np.ndarray, had: list[np.ndarray], counts: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """For each target [E] an item near it in the order of counts [N] that the user never had."""
    order = np.lexsort((rng.random(len(counts)), counts))
    place = np.argsort(order)
    found = []
    for target, items in zip(targets, had, strict=True):
        near = np.zeros(0, int)
        reach = 10
        while not len(near) and reach < 2 * len(order):
            around = order[max(0, place[target - 1] - reach) : place[target - 1] + reach + 1] + 1
            near = np.setdiff1d(around, items)
            reach *= 2
        found.append(rng.choice(near))
    return np.array(found)


def both_pairs(task: Task, users: np.ndarray, window: int) -> tuple[Pairs, Pairs]:
    """With the last train items of the users, to learn from, and with their test targets."""
    split, rng = task.split, np.random.default_rng(0)
    counts = np.bincount(split.train.items, minlength=task.dataset.catalogue.n_items + 1)[1:]
    had = [task.dataset.sequences.of(user) for user in users]
    last = split.train.items[split.train.offsets[1:][users] - 1]
    rows = np.searchsorted(split.test.users, users)
    nexts = split.test.items[split.test.offsets[:-1][rows]]
    found = []
    for histories, targets in ((without_newest(split.train), last), (split.train_and_valid, nexts)):
        others = as_popular(targets, had, counts, rng)
        found.append(Pairs(batch_of(histories, users, window), (targets.astype(int), others)))
    return found[0], found[1]


def batch_of(histories: Sequences, users: np.ndarray, window: int) -> Batch:
    """The newest items of these users."""
    return Batch(*map(torch.from_numpy, history_batch(histories, users, window)))


def matched_auc(model: PMAT, learn: Pairs, judge: Pairs, eyes: np.ndarray) -> float:
    """Share of pairs in the right order, ties a half; user e sees with the eyes of eyes[e]."""
    learnt, judged = (
        [looks(model, Batch(*(x[eyes] for x in pairs.histories)), items) for items in pairs.items]
        for pairs in (learn, judge)
    )
    half, right = np.arange(len(eyes)) % 2 == 0, []
    for known in (half, ~half):
        labels = np.repeat([1, 0], known.sum())
        fitted = LogisticRegression(C=0.1, max_iter=500)
        fitted.fit(vstack([rows[known] for rows in learnt]), labels)
        target, other = (fitted.decision_function(rows[~known]) for rows in judged)
        right.append((target > other) + 0.5 * (target == other))
    return float(np.concatenate(right).mean())


@torch.inference_mode()
def looks(model: PMAT, histories: Batch, items: np.ndarray) -> csr_matrix:
    """alpha(u, i) and the one-hot codes of one item of each of E users, [E, M + L K]."""
    view, rows = model.view(histories), torch.from_numpy(items) - 1
    codes = model.ids(model.pair_points(view, rows), rows).numpy()
    alpha = model.attention.pairs(view.context, model.traits[rows], model.present[rows]).T
    E, digits = codes.shape
    columns = codes + model.own.codes * np.arange(digits)
    bounds = np.arange(0, E * digits + 1, digits)
    words = csr_matrix(
        (np.ones(E * digits), columns.ravel(), bounds), (E, digits * model.own.codes)
    )
    return hstack([csr_matrix(alpha.numpy()), words]).tocsr()


# --------------------------------------------------------------------------- steadiness


@torch.inference_mode()
def habits(model: PMAT, task: Task, users: np.ndarray, window: int) -> dict[str, float]:
    """Entropy and variance of alpha, collisions, churn of the first digit, entropy of IDs."""
    now, before = task.split.train_and_valid, without_newest(task.split.train_and_valid)
    histories = batch_of(now, users, window)
    shared = model.own.shared_digits
    codes = model.item_ids(histories).numpy()
    old = model.item_ids(batch_of(before, users, window)).numpy()
    rows = torch.arange(codes.shape[1])
    alpha = model.modality_weights(model.view(histories), rows).numpy()  # [M, U, N]
    complete = model.present.all(1).numpy()
    entropy = -(alpha * np.log(np.maximum(alpha, 1e-12))).sum(0).mean()
    return {
        "entropy of alpha": float(entropy / math.log(len(alpha))),
        "its variance over users": float(alpha.var(1).mean()),
        "its variance over items": float(alpha[:, :, complete].var(2).mean()),
        "collisions": 1 - uniqueness(codes),
        "first digit changed": float((codes[:, :, shared] != old[:, :, shared]).mean()),
        "the same, as served": served_churn(Server(model, before), now, users),
        "bits of a digit": float(entropy_over_users(codes[:, :, shared:])),
    }


def served_churn(server: Server, now: Sequences, users: np.ndarray) -> float:
    """Share of first personal digits that change when the server is told the newest item."""
    shared, changed = server.model.own.shared_digits, 0.0
    for user in users:
        kept = server.item_ids(user)[:, shared]
        server.update(user, now.of(user)[-1:])
        changed += float((server.item_ids(user)[:, shared] != kept).float().mean())
    return changed / len(users)


def entropy_over_users(codes: np.ndarray) -> float:
    """Entropy of each item's digits [U, N, L] among users, in bits, mean over items and digits."""
    ordered = np.sort(codes, axis=0)
    total = 0.0
    for column in ordered.reshape(len(codes), -1).T:
        share = np.diff(np.flatnonzero(np.r_[True, column[1:] != column[:-1], True])) / len(codes)
        total -= float((share * np.log2(share)).sum())
    return total / codes[0].size


# --------------------------------------------------------------------------- the command


@command
def main(arguments: list[str] | None = None) -> None:
    """Measure and print, one line a run."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pmat or pmat_mcrl runs")
    parser.add_number("--users", 4000, "test users, at random", number(int, 2))
    found = parser.parse_args(arguments)
    for run in found.runs:
        model, config, task = load_trained(run)
        if not isinstance(model, PMAT) or model.own.fusion != "early":
            raise UserError(f"{run} is no run of pmat or pmat_mcrl with early fusion.")
        if model.own.personalised == "random":
            raise UserError(f"{run} has drawn weights: there is no alpha to look at.")
        lengths = task.split.train.lengths[task.split.test.users]
        rng, users = np.random.default_rng(0), task.split.test.users[lengths > 1]
        users = np.sort(rng.permutation(users)[: found.users])
        learn, judge = both_pairs(task, users, config.data.max_history)
        own = np.arange(len(users))
        print(f"{run.name}, {len(users):,} test users of {task.dataset.name}")
        values = {
            "AUC": matched_auc(model, learn, judge, own),
            "AUC in another user's eyes": matched_auc(model, learn, judge, np.roll(own, 1)),
        } | habits(model, task, users[:MEASURED_USERS], config.data.max_history)
        for name, value in values.items():
            print(f"  {name:28s}{value:8.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
