"""RPG: the walk on the item graph against exact scores of all items, on a trained run.

    python benchmarks/graph_decoding.py results/baseline_.../rpg_seed42
    python benchmarks/graph_decoding.py RUN --walks 20,200,3 100,500,3 [--users 5000]

Prints test metrics and users per second of exact scores and of each walk (beams, edges, steps; if
none is named, the run's own) on the same weights and users. A walk sorts its candidates, beams x
edges of them in each step, so it pays where the catalogue is much larger than that.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baseline_models.rpg import RPG
from benchmarks.command import Parser, command, positive_int
from data_utils import Targets
from experiments.evaluation import evaluate
from experiments.runs import load_trained
from metrics import ranking_metrics
from util import UserError


@command
def main(arguments: list[str] | None = None) -> None:
    """Decode the test users of one run both ways."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of rpg")
    parser.add_argument(
        "--walks", nargs="*", type=_walk, metavar="WALK",
        help="beams,edges,steps of each (default those of the run)",
    )  # fmt: skip
    parser.add_number("--users", None, "test users, at random")
    asked = parser.parse_args(arguments)
    model, config, task = load_trained(asked.run)
    if not isinstance(model, RPG):
        raise UserError(f"{asked.run} is a run of {model.name}; only rpg walks on a graph.")
    split = task.split
    own, test = model.own, some_users(split.test, asked.users)
    for walk in (None, *(asked.walks or [(own.beams, own.edges, own.steps)])):
        own.decoding = "graph" if walk else "exhaustive"
        if walk:
            own.beams, own.edges, own.steps = walk
            model.forget_graph()
            start = time.perf_counter()
            model.graph()
            print(f"graph built in {time.perf_counter() - start:.1f} s", flush=True)
        start = time.perf_counter()
        found = evaluate(model, split.train_and_valid, test, config, torch.device("cpu"))
        seconds = time.perf_counter() - start
        metrics = ranking_metrics(found.under(config.train.mask_seen))
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("recall@10", "ndcg@10"))
        name = "graph {},{},{}".format(*walk) if walk else "exhaustive"
        print(f"{name:<16}{shown}   {len(test.users) / seconds:8.0f} users/s", flush=True)


def some_users(targets: Targets, count: int | None) -> Targets:
    """Those of `count` random users."""
    if not count or count >= len(targets.users):
        return targets
    rows = np.sort(np.random.default_rng(0).permutation(len(targets.users))[:count])
    items = [targets.items[targets.offsets[r] : targets.offsets[r + 1]] for r in rows]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in items])])
    return Targets(targets.users[rows], np.concatenate(items), offsets)


def _walk(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"wants beams,edges,steps such as 20,200,3, not '{text}'")
    beams, edges, steps = map(positive_int, parts)
    return beams, edges, steps


if __name__ == "__main__":
    sys.exit(main())
