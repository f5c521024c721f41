"""Mode `mcrl`: PMAT alone, PMAT with MCRL, and what the difference is worth."""

from __future__ import annotations

import shutil
from logging import getLogger
from pathlib import Path
from typing import Any

import pandas as pd

from config import Config, ConfigError
from experiments import comparisons, plots, report
from experiments.modes import conduct, model_jobs, run_jobs
from experiments.requests import Request
from experiments.runs import BEST, Task, load_task, run
from experiments.tables import P_VALUE, Column, Table, write_table
from util import atomic_path, say, write_json

logger = getLogger("pmat")
ALONE, JOINT = "pmat", "pmat_mcrl"
_SHOWN = ("recall@10", "ndcg@10")
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
    beside the results folder, the comparison goes to `mcrl_experiment_*.json`. Raises ConfigError
    for other models.
    """
    others = set(request.models(())) - set(CHECKPOINTS)
    if others:
        raise ConfigError(
            f"--mode mcrl compares {' and '.join(CHECKPOINTS)}, not {min(others)}; leave --model "
            "out, or use --mode baseline."
        )
    return conduct(request, tuple(CHECKPOINTS), train_both)


def train_both(request: Request, task: Task, folder: Path) -> list[Path]:
    """Steps 1 and 2; returns the folders of the runs that failed."""
    return run_jobs(request, model_jobs(request, tuple(CHECKPOINTS), folder), task)


def write_comparison(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """Step 3 from the runs in `folder`; with `latest`, copies of the weights and of the JSON."""
    runs = [made for made in report.read_runs(folder) if made.model in CHECKPOINTS]
    runs = [made for made in runs if not made.label]
    compared_runs = _of_common_seeds(runs)
    if not compared_runs:
        say(report.text_table(runs))
        logger.warning("Both models must have finished before they can be compared.")
        return []
    found = {entry.model: entry for entry in report.entries(compared_runs)}
    content = _comparison(found, compared_runs)
    name = f"mcrl_experiment_{folder.name.split('_', 1)[-1]}"
    for place in [folder] if latest is None else [folder, latest]:
        write_json(place / f"{name}.json", content)
    if latest is not None:
        _copy_weights(runs, latest.resolve().parent / "checkpoints", folder)
    plots.loss_curves(found[JOINT].epochs(), folder / "mcrl_losses")
    compared = content["comparison"]
    begun = [name for name in report.unfinished(folder) if name.split("_seed")[0] in CHECKPOINTS]
    table = report.with_missing(_table(found, compared_runs, compared), begun)
    write_table(table, folder)
    say(report.text_table(runs))
    say("\nNDCG@10 of PMAT+MCRL minus PMAT: " + _said(compared))
    return [table]


def _said(compared: dict[str, float]) -> str:
    if not compared:
        return "not compared, too few users differ"
    return (
        f"{compared['difference']:+.4f} "
        f"(95 % interval {compared['low']:+.4f} to {compared['high']:+.4f})"
    )


def _of_common_seeds(runs: list[report.Run]) -> list[report.Run]:
    """Those of seeds that both models have finished."""
    seeds = {model: {made.seed for made in runs if made.model == model} for model in CHECKPOINTS}
    common = set.intersection(*seeds.values())
    if common and common != set.union(*seeds.values()):
        logger.warning("Compared are seeds that both models have finished: %s.", sorted(common))
    return [made for made in runs if made.seed in common]


def _table(
    found: dict[str, report.Entry], runs: list[report.Run], compared: dict[str, float]
) -> Table:
    rows = [
        {
            "model": model,
            **{name: found[model].users(name.split("@")[0]).mean() for name in _SHOWN},
            **(compared if model == JOINT else {}),
        }
        for model in CHECKPOINTS
    ]
    columns = [
        Column("model", "Model", "s"), *map(comparisons.plain_metric, _SHOWN),
        Column("difference", "Δ NDCG@10", "+.4f"), Column("low", "low", "+.4f"),
        Column("high", "high", "+.4f"), Column("p", "p", P_VALUE),
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=[*frame, *(c.key for c in columns if c.key not in frame)])
    note = (
        "R: recall, N: NDCG. Δ in NDCG@10 with a 95 % interval and p, one comparison, "
        f"{comparisons.USERS_ONLY}. Nothing is bold."
    )
    title = "PMAT alone and with MCRL"
    caption = f"{report.protocol(runs)} {note}"
    return Table("mcrl_comparison", title, caption, columns, frame)


def _copy_weights(runs: list[report.Run], checkpoints: Path, folder: Path) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    for made in runs:
        name = f"{CHECKPOINTS[made.model]}_{folder.name.split('_', 1)[-1]}_seed{made.seed}.pth"
        with atomic_path(checkpoints / name) as path:
            shutil.copy(made.folder / BEST, path)


def _comparison(found: dict[str, report.Entry], runs: list[report.Run]) -> dict[str, Any]:
    compared = comparisons.compared(found[JOINT].users(), found[ALONE].users())
    return {
        "caption": report.caption(runs[0].result),
        "runs": [made.result for made in runs],
        "losses": {f"{made.model}_seed{made.seed}": made.epochs() for made in runs},
        "comparison": compared,
    }
