"""Is it the IDs or the generator? Trains the generator of one model on the IDs of others.

    python benchmarks/exchange_ids.py --dataset ../shared/data/beauty --generator fusid --ids tiger

For models that write one ID for each item (tiger, letter, cofirec, fusid), of as many digits and
codes; IDs may also be those of mmq after stage one. The generator keeps its preset and schedule;
`--until` ends it early. Printed for every set of IDs: NDCG@10 on valid after each evaluation
(`--set train.eval_every=N`). Test is not looked at.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, read_settings
from benchmarks.epoch_cost import prepared
from config import Config, build_config
from experiments.runs import Task, load_task, model_class, training_data, valid_metrics
from experiments.training import Trainer
from model_parts.generative import GenerativeRecommender
from util import UserError, pick_device, seed_everything, stream_seed


class _Enough(Exception):
    """As many epochs as were asked for are done."""


def check_roles(generator: str, makers: list[str]) -> None:
    """Raises UserError where a model cannot play its part, ConfigError where there is none.

    Makers give every item one ID; the generator also reads and writes no other IDs than that.
    """
    alone = (generator,)
    plain_in = {"identifiers": (*alone, *makers), "history_codes": alone, "begin_epoch": alone}
    for part, names in plain_in.items():
        for name in names:
            found = model_class(name)
            plain = issubclass(found, GenerativeRecommender)
            if not plain or getattr(found, part) is not getattr(GenerativeRecommender, part):
                raise UserError(f"{name} does not write the digits of one fixed ID for every item.")


def curve(config: Config, task: Task, codes: Tensor, until: int) -> list[tuple[int, float]]:
    """Valid NDCG@10 by epoch of the generator `config.run.model` on IDs `codes` [N, L]."""
    device = pick_device(config.run.device)
    seed_everything(config.run.seed)
    model: Any = model_class(config.run.model)(config, task.dataset.catalogue).to(device)
    if codes.shape != model.codes.shape or int(codes.max()) >= model.n_codes:
        raise UserError(
            f"{model.name} writes {model.digits} digits of {model.n_codes} codes, not these IDs of "
            f"{codes.shape[1]}: --set their digits and codes alike."
        )
    model.set_codes(codes, training_data(task).counts)
    validate = partial(valid_metrics, model, task, config, device)
    rows: list[dict[str, Any]] = []

    def after_epoch(done: list[dict[str, Any]]) -> None:
        rows[:] = done
        if len(done) >= until:
            raise _Enough

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model, task.split.train, config, Path(scratch), device, validate, "", after_epoch
        )
        seed_everything(stream_seed(config.run.seed, "train", 0))  # own IDs: the run of main.py
        with suppress(_Enough):
            trainer.fit()
    return [(row["epoch"], row["valid"]["ndcg@10"]) for row in rows if row.get("valid")]


@command
def main(arguments: list[str] | None = None) -> None:
    """Train and print."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default="mock", help="as in main.py (default mock)")
    parser.add_argument("--generator", default="tiger", help="what is trained (default tiger)")
    parser.add_argument(
        "--ids", default="tiger,letter", help="whose IDs, with commas (default tiger,letter)"
    )
    parser.add_number("--until", None, "epochs to train of those in the schedule")
    parser.add_settings()
    asked = parser.parse_args(arguments)
    given = {"run.mode": "baseline", "data.dataset": asked.dataset} | read_settings(asked.set)
    makers = asked.ids.split(",")
    check_roles(asked.generator, makers)
    config = build_config(given, model=asked.generator)
    until = asked.until or config.train.epochs
    task = load_task(config)
    for name in makers:
        maker, _ = prepared(build_config(given, model=name), task, torch.device("cpu"))
        found = curve(config, task, maker.codes, until)
        shown = "  ".join(f"{epoch}: {ndcg:.4f}" for epoch, ndcg in found)
        print(f"{asked.generator} on IDs of {name}, valid NDCG@10 by epoch  {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
