"""What generating missing modalities is worth to DGMRec, by how many items miss one.

    python benchmarks/missing_modalities.py [--dataset mock] [--modality visual] [--seeds 3]
        [--rates 0,0.2,0.4,0.6] [--keep FOLDER] [--set key=value ...]

Takes one modality from a random share of the items that have it (rate 0: the data as they are, with
what they miss by themselves) and trains DGMRec with and without generation (`dgmrec.fill_missing`).
The items are drawn by `data.seed`, the same for all seeds of the model, and a higher rate takes the
modality from some more. Features are generated for items that miss exactly one modality. Prints
Recall@20 and NDCG@10 on test (seen items masked), mean over seeds, and the gain in NDCG@10 with a
95 % interval over users: for all test users, and for those whose target lacks or has the modality.
Read the last two together: without generation, items alone in their graph (an edge of weight 1 to
themselves) tend to longer vectors, so lists hold too many of them, at the cost of the others.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, read_settings, share
from config import build_config
from data_readers.missing import without_modality
from data_utils import split_dataset
from experiments.runs import RANKS, Task, load_ranks, load_task, run
from metrics import Ranks, average_over_seeds, paired_bootstrap, per_user

VARIED = ("run.seed", "dgmrec.fill_missing")  # from run to run, so not by --set


class Outcome(NamedTuple):
    """Metrics of every test user, [E] each, means over seeds."""

    recall: np.ndarray  # at 20
    ndcg: np.ndarray  # at 10


def settings(given: dict[str, Any], fill: bool, seed: int) -> dict[str, Any]:
    """Dotted keys of one run."""
    chosen = {"dgmrec.fill_missing": fill, "run.seed": seed}
    return {"run.mode": "baseline", "run.model": "dgmrec"} | given | chosen


def trained_ranks(
    task: Task, given: dict[str, Any], fill: bool, seeds: range, place: Path
) -> list[Ranks]:
    """Masked ranks of the test targets, one a seed; the runs are in `place`."""
    found = []
    for seed in seeds:
        folder = place / f"{'with' if fill else 'without'}_seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)  # goes on if there is a checkpoint
        run(build_config(settings(given, fill, seed)), task, folder)
        found.append(load_ranks(folder / RANKS, mask_seen=True))
    return found


def outcome(ranks: list[Ranks]) -> Outcome:
    """Per user, averaged over seeds."""
    return Outcome(
        average_over_seeds([per_user(one, "recall", 20) for one in ranks]),
        average_over_seeds([per_user(one, "ndcg", 10) for one in ranks]),
    )


def lacking(ranks: Ranks, present: np.ndarray) -> np.ndarray:
    """[E] bool: users with a target among the items that are not `present` [N]."""
    return np.logical_or.reduceat(~present[ranks.targets - 1], ranks.offsets[:-1])


def line(group: str, users: np.ndarray, on: Outcome, off: Outcome) -> str:
    """One row of the table: the chosen `users` [E] bool with and without generation."""
    start = f"  {group:<16}{users.sum():>7,}"
    if not users.any():
        return start
    on, off = (Outcome(*(values[users] for values in one)) for one in (on, off))
    gain = paired_bootstrap(on.ndcg, off.ndcg)
    means = "".join(f"{x.mean():>9.4f}" for x in (on.recall, off.recall, on.ndcg, off.ndcg))
    return f"{start}{means}  {gain.difference:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


@command
def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default="mock", help="as in main.py (default mock)")
    parser.add_argument("--modality", help="what is taken away (default the data set's first)")
    parser.add_argument(
        "--rates", type=_rates, default="0,0.2,0.4,0.6", metavar="SHARES",
        help="shares of items that lose it, with commas (default %(default)s)",
    )  # fmt: skip
    parser.add_number("--seeds", 3, "runs of each kind")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="let the runs stay here")
    parser.add_settings()
    found = parser.parse_args(arguments)
    given = {"data.dataset": found.dataset} | read_settings(found.set, *VARIED)
    config = build_config(settings(given, True, 42))
    task = load_task(config)
    modality = found.modality or next(iter(task.dataset.catalogue.modalities), "visual")
    poorer = [  # all of them first, so that a wrong rate is refused before anything is trained
        without_modality(task.dataset, modality, rate, config.data.seed) for rate in found.rates
    ]
    seeds = range(42, 42 + found.seeds)
    head = "".join(f"{title:>9}" for title in ("R@20", "without", "N@10", "without"))
    print(f"\n{'test users':<18}{'number':>7}{head}  gain in N@10 by generation")
    with tempfile.TemporaryDirectory() as scratch:
        for rate, dataset in zip(found.rates, poorer, strict=True):
            left = Task(dataset, split_dataset(dataset))
            place = (found.keep or Path(scratch)) / f"{modality}_without_{rate:g}"
            ranks = trained_ranks(left, given, True, seeds, place)
            on, off = outcome(ranks), outcome(trained_ranks(left, given, False, seeds, place))
            present = dataset.catalogue.modalities[modality].present
            lack = lacking(ranks[0], present)
            print(
                f"{rate:.0%} of {task.dataset.name}'s {modality} taken away, "
                f"{1 - present.mean():.1%} of all items lack it"
            )
            print(line("all", np.ones_like(lack), on, off))
            print(line("target lacks it", lack, on, off))
            print(line("target has it", ~lack, on, off), flush=True)


def _rates(text: str) -> list[float]:
    return [share(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
