"""Mode `mcrl`: PMAT alone, PMAT with MCRL, and what the difference is worth."""

from __future__ import annotations

import json
import shutil
from logging import getLogger
from pathlib import Path
from typing import Any

from config import Config
from experiments import plots, report
from experiments.modes import Request, announce, finish, open_folder, run_once
from experiments.runs import BEST, METRICS, RANKS, Task, load_ranks, load_task, run
from experiments.training import EPOCHS
from metrics import average_over_seeds, paired_bootstrap, per_user
from util import atomic_path, rank, write_json

logger = getLogger("pmat")
ALONE, JOINT = "pmat", "pmat_mcrl"
# model -> how its checkpoint is called
CHECKPOINTS = {ALONE: "MCRL_Exp_PMAT_only", JOINT: "MCRL_Exp_PMAT_MCRL_joint"}


def train_mcrl_model(config: Config, task: Task | None = None, folder: Path | str = ".") -> dict:
    """Train and test the model of `config.run.model` (mcrl, pmat_mcrl, ...) into `folder`.

    Returns what `metrics.json` holds. Reads and splits the data set when `task` is not given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return run(config, task or load_task(config), folder)


def run_mcrl_experiment(request: Request) -> int:
    """The three steps, `--seeds` runs each; returns the number of failed runs.

    1 PMAT alone, 2 PMAT and MCRL jointly, 3 their comparison. Weights are copied to `checkpoints/`
    beside the results folder, the comparison goes to `mcrl_experiment_*.json`.
    """
    config = request.config(ALONE)
    task = load_task(config)
    announce(config)
    with open_folder(request, config) as folder:
        places = {
            folder / f"{model}_seed{seed}": (model, seed)
            for model in CHECKPOINTS
            for seed in range(config.run.seed, config.run.seed + config.run.seeds)
        }
        failed = [
            place
            for place, (model, seed) in places.items()
            if not run_once(request.config(model), seed, task, place, isolate=False)
        ]
        if rank() == 0:
            _conclude(folder, places, config)
            finish(folder, failed)
    return len(failed)


def _conclude(folder: Path, places: dict[Path, tuple[str, int]], config: Config) -> None:
    print(report.text_table(list(places)))
    results = Path(config.run.save_dir)
    checkpoints = results.resolve().parent / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for place, (model, seed) in places.items():
        name = f"{CHECKPOINTS[model]}_{folder.name.split('_', 1)[1]}_seed{seed}.pth"
        with atomic_path(checkpoints / name) as path:
            shutil.copy(place / BEST, path)
    content = _comparison(places, config.train.mask_seen)
    name = f"mcrl_experiment_{folder.name.split('_', 1)[1]}"
    for target in (folder, results):
        write_json(target / f"{name}.json", content)
    joint = [place for place, (model, _) in places.items() if model == JOINT]
    plots.loss_curves(_epochs(joint[0]), folder / "mcrl_losses")
    found = content["comparison"]
    print(
        f"\nNDCG@10 of PMAT+MCRL minus PMAT: {found['difference']:+.4f} "
        f"(95 % interval {found['low']:+.4f} to {found['high']:+.4f})"
    )


def _comparison(places: dict[Path, tuple[str, int]], mask_seen: bool) -> dict[str, Any]:
    runs = [json.loads((place / METRICS).read_text(encoding="utf-8")) for place in places]
    users = {
        model: average_over_seeds(
            [
                per_user(load_ranks(place / RANKS, mask_seen), "ndcg", 10)
                for place, (name, _) in places.items()
                if name == model
            ]
        )
        for model in CHECKPOINTS
    }
    return {
        "caption": report.caption(runs[0]),
        "runs": runs,
        "losses": {place.name: _epochs(place) for place in places},
        "comparison": paired_bootstrap(users[JOINT], users[ALONE])._asdict(),
    }


def _epochs(place: Path) -> list[dict[str, Any]]:
    lines = (place / EPOCHS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
