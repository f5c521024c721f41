"""What does it cost that items share an ID? Two runs, by how many items share the target's ID.

    python benchmarks/shared_ids.py results/baseline_.../mmq_seed42 OTHER_RUN

Groups are made by the IDs of the first run, whose model gives every item one ID. Recall@10 and
NDCG@10 of both runs in each group, seen items masked, and the difference in NDCG@10 with a 95 %
interval over users. Where sharing is what holds the first run back, it is behind where IDs are
shared and level where they are not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command
from experiments.runs import METRICS, RANKS, load_ranks, load_trained
from metrics import Ranks, paired_bootstrap, per_user
from model_parts.generative import GenerativeRecommender
from model_parts.residual import holders
from util import UserError


def line(name: str, users: np.ndarray, one: Ranks, other: Ranks) -> str:
    """One row of the table: the chosen `users` [E] bool in both runs."""
    start = f"{name:<16}{users.sum():>8,}"
    if not users.any():
        return start
    found = [per_user(r, m, 10)[users] for r in (one, other) for m in ("recall", "ndcg")]
    gap = paired_bootstrap(found[1], found[3])
    means = "".join(f"{values.mean():>9.4f}" for values in found)
    return f"{start}{means}  {gap.difference:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"


def finished_ranks(folder: Path) -> Ranks:
    """Masked ranks of the test targets of a run. Raises UserError where it has not finished."""
    if not (folder / RANKS).exists() or not (folder / METRICS).exists():
        raise UserError(f"{folder} is no folder of a finished run: it has no {RANKS}.")
    return load_ranks(folder / RANKS, mask_seen=True)


@command
def main(arguments: list[str] | None = None) -> None:
    """Read both runs, print the table."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run whose IDs make the groups")
    parser.add_argument("beside", type=Path, help="folder of another run on the same data")
    asked = parser.parse_args(arguments)
    one, other = finished_ranks(asked.run), finished_ranks(asked.beside)
    model, _, _ = load_trained(asked.run)
    if not isinstance(model, GenerativeRecommender) or len(model.identifiers()[0]) != len(
        model.codes
    ):
        raise UserError(f"{asked.run} is a run of {model.name}, which has not one ID for an item.")
    same = one.users.tolist() == other.users.tolist() and np.array_equal(one.targets, other.targets)
    if not same or len(one.targets) != len(one.users):
        raise UserError("The two runs have not the same test users with one target each.")
    sharing = holders(model.item_ids()).numpy()[one.targets - 1]
    columns = "".join(f"{title:>9}" for title in ("R@10", "N@10", "beside", "N@10"))
    print(f"{'ID of target':<16}{'users':>8}{columns}  difference in N@10")
    print(line("its own", sharing == 1, one, other))
    print(line("shared by two", sharing == 2, one, other))
    print(line("shared by more", sharing > 2, one, other))


if __name__ == "__main__":
    sys.exit(main())
