"""RPG: the walk on the item graph against exact scores of all items, on a trained run.

    python benchmarks/graph_decoding.py results/baseline_.../rpg_seed42

Prints test metrics and users per second of both ways to decode the same weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import build_config, read_yaml
from data_utils import load_dataset, split_dataset
from experiments.evaluation import evaluate
from experiments.runs import CONFIG, load_model
from metrics import ranking_metrics


def main() -> None:
    """Decode the test users of one run both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    dataset = load_dataset(build_config(overlay=read_yaml(str(arguments.run / CONFIG))))
    split = split_dataset(dataset)
    model, config = load_model(arguments.run, dataset.catalogue)
    for decoding in ("exhaustive", "graph"):
        model.own.decoding = decoding
        start = time.perf_counter()
        found = evaluate(model, split.train_and_valid, split.test, config, torch.device("cpu"))
        seconds = time.perf_counter() - start
        metrics = ranking_metrics(found.masked if config.train.mask_seen else found.unmasked)
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("recall@10", "ndcg@10"))
        print(f"{decoding:<12}{shown}   {len(split.test.users) / seconds:8.0f} users/s")


if __name__ == "__main__":
    main()
