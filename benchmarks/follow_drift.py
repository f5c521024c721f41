"""Do real users drift, and does following them help? A trained PMAT, served as items come in.

    python benchmarks/follow_drift.py results/baseline_.../pmat_seed42 [--known 0.5] [--step 5]

Each test user starts with the older half of the history (`--known`); the rest comes `--step` items
at a time. The generator always reads the whole history; what differs is how old the codes are:
- stale: the codes of the first half, for ever;
- updated: as the server does it, part of the way when the test finds drift, with hysteresis;
- recomputed: all codes anew from the whole history.
Prints in how many users the test finds drift (p <= .01 in the whole history) and in how many the
server moved on the way, each in order and shuffled, where every alarm is a false one; personal
digits that differ from recomputed ones, Recall@10 and NDCG@10 of the test item (seen items masked),
and the gain in NDCG@10 over stale codes with a 95 % interval over users: all, and those the server
moved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, share
from data_utils import Sequences
from experiments.evaluation import rank_targets
from experiments.runs import Task, load_trained
from metrics import Ranks, paired_bootstrap, per_user
from model_parts.drift import detect_drift
from our_models.pmat import PMAT
from our_models.serving import Server
from util import UserError

ALARM = 0.01  # p-value, as the server has it


class Served(NamedTuple):
    """What E users got."""

    ranks: dict[str, Ranks]  # of their test items, by way
    moved: np.ndarray  # [E] bool, drift was found on the way
    moved_shuffled: float  # share of users in whom it was found when items come in random order
    apart: dict[str, float]  # share of personal digits that differ from recomputed ones


def beginnings(histories: Sequences, share: float) -> Sequences:
    """The oldest `share` of every history, at least one item of those that have any."""
    lengths = np.minimum(np.ceil(share * histories.lengths), histories.lengths).astype(np.int64)
    place = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], histories.lengths)
    kept = place < np.repeat(lengths, histories.lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Sequences(histories.items[kept], offsets, histories.timestamps[kept])


def shuffled(histories: Sequences) -> Sequences:
    """Every history in a random order."""
    rng = np.random.default_rng(0)
    parts = [rng.permutation(histories.of(user)) for user in range(histories.n_users)]
    return histories._replace(items=np.concatenate(parts))


def follow(server: Server, whole: Sequences, user: int, step: int) -> bool:
    """Serve what the server does not know yet of a history; was there an alarm?"""
    rest = whole.of(user)[len(server.histories.of(user)) :]
    tests = [server.update(user, rest[at : at + step]) for at in range(0, len(rest), step)]
    return any(test.p_value <= ALARM for test in tests)


def serve(model: PMAT, task: Task, users: np.ndarray, share: float, step: int) -> Served:
    """Bring the test users up to date in all three ways and rank their test items."""
    whole, test = task.split.train_and_valid, task.split.test
    known = beginnings(whole, share)
    servers = {
        "stale": Server(model, known, settled=0, p_value=0.0),
        "updated": Server(model, known, p_value=ALARM),
        "recomputed": Server(model, whole),
    }
    mixed = shuffled(whole)
    on_mixed = Server(model, beginnings(mixed, share), p_value=ALARM)
    found: dict[str, list[np.ndarray]] = {way: [] for way in servers}
    apart, moved, false_alarms = dict.fromkeys(servers, 0.0), [], []
    for user in tqdm(users, disable=None, leave=False):
        moved.append(follow(servers["updated"], whole, user, step))
        false_alarms.append(follow(on_mixed, mixed, user, step))
        on_mixed.states.clear()
        servers["stale"].update(user, whole.of(user)[known.lengths[user] :])
        row = np.searchsorted(test.users, user)
        target = torch.tensor(test.items[test.offsets[row] : test.offsets[row + 1]]).long()
        seen, shared = torch.tensor(whole.of(user)).long(), model.own.shared_digits
        truth = servers["recomputed"].item_ids(user)[:, shared:]
        for way, server in servers.items():
            masked, _ = rank_targets(server.scores(user)[None], target[None], seen[None])
            found[way].append(masked[0].numpy())
            differ = (server.item_ids(user)[:, shared:] != truth).float().mean()
            apart[way] += float(differ) / len(users)
            server.states.clear()
    rows = np.searchsorted(test.users, users)
    counts = test.offsets[rows + 1] - test.offsets[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    items = np.concatenate([test.items[test.offsets[r] : test.offsets[r + 1]] for r in rows])
    ranks = {
        way: Ranks(users, np.concatenate(parts), offsets, items.astype(np.int64))
        for way, parts in found.items()
    }
    return Served(ranks, np.array(moved), float(np.mean(false_alarms)), apart)


def drifted(model: PMAT, histories: Sequences, users: np.ndarray, window: int) -> np.ndarray:
    """Share of users with p <= ALARM in their newest items: in order, and in random order."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    alarms = np.zeros(2)
    for user in users:
        items = histories.of(user)[-window:]
        for row, order in enumerate((items, rng.permutation(items))):
            rows = torch.tensor(order).long() - 1
            test = detect_drift(model.traits[rows], model.present[rows], generator)
            alarms[row] += test.p_value <= ALARM
    return alarms / len(users)


@command
def main(arguments: list[str] | None = None) -> None:
    """Serve and print."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a pmat or pmat_mcrl run")
    parser.add_number("--known", 0.5, "share of each history that the server starts with", share)
    parser.add_number("--step", 5, "items of an update")
    parser.add_number("--users", 1000, "test users, at random")
    asked = parser.parse_args(arguments)
    model, config, task = load_trained(asked.run)
    if not isinstance(model, PMAT) or model.own.fusion != "early":
        raise UserError(f"{asked.run} is no run of pmat or pmat_mcrl with early fusion.")
    everybody = task.split.test.users
    chosen = np.random.default_rng(0).permutation(len(everybody))[: asked.users]
    users = everybody[np.sort(chosen)]
    histories = task.split.train_and_valid
    in_order, by_chance = drifted(model, histories, users, config.data.max_history)
    served = serve(model, task, users, asked.known, asked.step)
    print(f"{asked.run.name}, {len(users):,} test users of {task.dataset.name}")
    print(f"drift in {in_order:.1%} of the users, in {by_chance:.1%} when items are shuffled")
    moved = f"codes moved on the way in {served.moved.mean():.1%}"
    print(f"{moved}, in {served.moved_shuffled:.1%} when items are shuffled\n")
    print(f"{'codes':12s}{'differ':>8s}{'R@10':>8s}{'N@10':>8s}  N@10 minus stale: all; moved only")
    ndcg = {way: per_user(ranks, "ndcg", 10) for way, ranks in served.ranks.items()}
    for way, ranks in served.ranks.items():
        recall = per_user(ranks, "recall", 10).mean()
        line = f"{way:12s}{served.apart[way]:8.4f}{recall:8.4f}{ndcg[way].mean():8.4f}  "
        if way != "stale":
            groups = [np.ones(len(users), bool), served.moved]
            line += "; ".join(_gain(ndcg[way][g], ndcg["stale"][g]) for g in groups if g.any())
        print(line, flush=True)


def _gain(own: np.ndarray, stale: np.ndarray) -> str:
    gain = paired_bootstrap(own, stale)
    return f"{gain.difference:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


if __name__ == "__main__":
    sys.exit(main())
