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

from data_utils import Targets
from experiments.evaluation import evaluate
from experiments.runs import load_trained
from metrics import ranking_metrics
from util import UserError


def main(flags: list[str] | None = None) -> None:
    """Decode the test users of one run both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--walks", nargs="*", type=_walk, help="beams,edges,steps")
    parser.add_argument("--users", type=int, help="so many test users, at random (all)")
    arguments = parser.parse_args(flags)
    try:
        model, config, task = load_trained(arguments.run)
    except UserError as error:
        parser.error(str(error))
    split = task.split
    own, test = model.own, some_users(split.test, arguments.users)
    for walk in (None, *(arguments.walks or [(own.beams, own.edges, own.steps)])):
        own.decoding = "graph" if walk else "exhaustive"
        if walk:
            own.beams, own.edges, own.steps = walk
            model.forget_graph()
        start = time.perf_counter()
        found = evaluate(model, split.train_and_valid, test, config, torch.device("cpu"))
        seconds = time.perf_counter() - start
        metrics = ranking_metrics(found.masked if config.train.mask_seen else found.unmasked)
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
    beams, edges, steps = map(int, text.split(","))
    return beams, edges, steps


if __name__ == "__main__":
    main()
