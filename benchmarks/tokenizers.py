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

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, read_settings
from benchmarks.epoch_cost import prepared
from config import Config, build_config, read_pairs
from experiments.personal import measured_ids
from experiments.runs import Task, load_task, model_class
from util import UserError

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
    model, seconds = prepared(config, task, torch.device("cpu"))
    return measured_ids(model, task.dataset, task.split.train, config), seconds


def _concerns(change: str, name: str) -> bool:
    return change.partition(".")[0] in name.split("_")  # pmat_mcrl has the settings of both


@command
def main(arguments: list[str] | None = None) -> None:
    """Tokenize and print."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default="mock", help="as in main.py (default mock)")
    parser.add_argument(
        "--model", default="tiger,letter,cofirec,fusid,mmq,pctx,rpg,pmat",
        help="models, with commas (default %(default)s)",
    )  # fmt: skip
    parser.add_settings()
    parser.add_argument(
        "--vary", metavar="KEY=VALUE", action="append", default=[],
        help="one more line for the model that this is a setting of; may be repeated",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    given = {"run.mode": "baseline", "data.dataset": asked.dataset} | read_settings(asked.set)
    models = asked.model.split(",")
    for name in models:
        model_class(name)  # refuses a misspelt one before the others are tokenized
    for change in asked.vary:  # a misspelt one would have no line
        build_config(given | read_pairs([change]))
        if not any(_concerns(change, name) for name in models):
            raise UserError(f"--vary {change} is a setting of no model in --model {asked.model}.")
    task = load_task(build_config(given))
    print(f"{'':32s}" + "".join(f"{name:>11s}" for name in COLUMNS.values()) + f"{'seconds':>9s}")
    for name in models:
        for change in ("", *(v for v in asked.vary if _concerns(v, name))):
            config = build_config(given | read_pairs([change] if change else []), model=name)
            found, seconds = tokenized(config, task)
            if found is None:
                raise UserError(f"{name} has no semantic IDs.")
            values = "".join(f"{found.get(key, float('nan')):11.3f}" for key in COLUMNS)
            print(f"{change or name:32s}{values}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
