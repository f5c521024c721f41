"""Quality of semantic IDs right after stage one: no generator is trained.

    python benchmarks/tokenizers.py --dataset ../shared/data/beauty --model fusid,mmq,letter
    python benchmarks/tokenizers.py --model fusid --vary fusid.alpha=0 --vary fusid.alpha=0.5
    python benchmarks/tokenizers.py --model mmq --vary mmq.quantiser=euclidean

One line for every model and one more for each `--vary` of its settings; `--set` changes all lines.
Printed: share of items with an ID of their own (1 - conflict rate; 1 for models with a digit for
conflicts), codes in use over all digits and in the worst one, perplexity likewise, agreement with
feature neighbours, seconds of stage one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, ConfigError, build_config, read_pairs
from experiments.personal import measured_ids
from experiments.runs import Task, load_task, model_class, stage_one
from util import UserError, seed_everything

COLUMNS = {
    "uniqueness": "own ID",
    "code_usage": "usage",
    "code_usage_worst_digit": "worst",
    "perplexity": "perplexity",
    "perplexity_worst_digit": "worst",
    "semantic_consistency": "features",
}


def tokenized(config: Config, task: Task) -> tuple[dict[str, float] | None, float]:
    """ID quality after stage one, None for a model without IDs, and how many seconds it took."""
    seed_everything(config.run.seed)
    model = model_class(config.run.model)(config, task.dataset.catalogue)
    start = time.perf_counter()
    stage_one(model, task, config)
    seconds = time.perf_counter() - start
    return measured_ids(model, task.dataset, task.split.train, config), seconds


def main(arguments: list[str] | None = None) -> None:
    """Tokenize and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mock")
    parser.add_argument("--model", default="tiger,letter,cofirec,fusid,mmq,pctx,rpg,pmat")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--vary", metavar="KEY=VALUE", action="append", default=[])
    asked = parser.parse_args(arguments)
    try:
        compare(asked)
    except (ConfigError, UserError) as error:
        parser.error(str(error))


def compare(asked: argparse.Namespace) -> None:
    """One line for every model and change. Raises ConfigError and UserError."""
    given = {"run.mode": "baseline", "data.dataset": asked.dataset} | read_pairs(asked.set)
    for change in asked.vary:  # a misspelt one would have no line
        build_config(given | read_pairs([change]))
    task = load_task(build_config(given))
    print(f"{'':32s}" + "".join(f"{name:>11s}" for name in COLUMNS.values()) + f"{'seconds':>9s}")
    for name in asked.model.split(","):
        for change in ("", *(v for v in asked.vary if v.startswith(f"{name}."))):
            config = build_config(given | read_pairs([change] if change else []), model=name)
            found, seconds = tokenized(config, task)
            if found is None:
                raise UserError(f"{name} has no semantic IDs.")
            values = "".join(f"{found.get(key, float('nan')):11.3f}" for key in COLUMNS)
            print(f"{change or name:32s}{values}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
