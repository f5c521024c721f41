"""How many beams does a model that writes IDs need? On a trained run, valid part only.

    python benchmarks/beam_width.py results/baseline_.../tiger_seed42
    python benchmarks/beam_width.py RUN --beams 10 20 50 200 --users 4000

Prints valid Recall@10, Recall@20, NDCG@10 and NDCG@20 (seen items masked or not, as the run had
it) and users per second for each number of beams, on the same weights and users. To each number one
beam is added for every item of the history: seen items take places before they are masked.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, positive_int
from benchmarks.graph_decoding import some_users
from experiments.evaluation import evaluate
from experiments.runs import load_trained
from metrics import ranking_metrics
from model_parts.generative import GenerativeRecommender
from util import UserError

_SHOWN = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")


@command
def main(arguments: list[str] | None = None) -> None:
    """Decode the valid part with each number of beams."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of a model that writes IDs")
    parser.add_argument(
        "--beams", nargs="+", type=positive_int, default=[10, 20, 50, 200], metavar="N",
        help="numbers of beams to try (default 10 20 50 200)",
    )  # fmt: skip
    parser.add_number("--users", None, "valid users, at random")
    asked = parser.parse_args(arguments)
    model, config, task = load_trained(asked.run)
    if not isinstance(model, GenerativeRecommender):
        raise UserError(f"{asked.run} is a run of {model.name}, which has no beams.")
    valid = some_users(task.split.valid, asked.users)
    for model.own.beams in asked.beams:
        start = time.perf_counter()
        found = evaluate(model, task.split.train, valid, config, torch.device("cpu"))
        seconds = time.perf_counter() - start
        metrics = ranking_metrics(found.under(config.train.mask_seen))
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in _SHOWN)
        rate = len(valid.users) / seconds
        print(f"{model.own.beams:4d} beams  {shown}  {rate:8.0f} users/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
