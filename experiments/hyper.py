"""Mode `hyper`: a search over the settings a model declares, judged by valid NDCG@10 alone.

The study is a SQLite file in the run folder, so a search can be stopped, resumed, given more trials
(`--resume RUN --trials 40`) and shared: `--mode hyper --set hyper.join=RUN`, started as often as
there are processors or machines that see the folder, works on its trials. Trial 0 is the preset.
A trial that was cut off goes on from its checkpoint. Test is looked at once, when the best trial is
trained anew; if more trials find a better one, that one takes its place.
"""

from __future__ import annotations

import shutil
from logging import getLogger
from pathlib import Path
from typing import Any

import pandas as pd

from config import MODE_MODELS, build_config, read_yaml, value_of
from experiments import plots, report
from experiments.modes import Job, conduct, run_jobs, seeds_of
from experiments.requests import Request, resumed_request
from experiments.runs import CONFIG, Task, load_task, model_class
from experiments.search import (
    STUDY,
    Search,
    address,
    best_changes,
    import_optuna,
    open_study,
    short,
)
from experiments.tables import Column, Table, write_table
from metrics import mean_std
from util import UserError, atomic_path, from_first, rank, say, write_json

logger = getLogger("pmat")
TUNED = "tuned"  # label of the runs with the best settings


def hyper(request: Request) -> int:
    """Search, then train and test the best settings; returns the number of failed runs."""
    import_optuna()
    if request.config().hyper.join:
        return _join(request)
    return conduct(request, models_to_search(request), search_and_test)


def models_to_search(request: Request) -> tuple[str, ...]:
    """Those named, or the default. Raises UserError for one that declares no search space."""
    names = request.models(MODE_MODELS["hyper"])
    for name in names:
        if not model_class(name).search_space:
            raise UserError(f"--model {name} declares no search space (see its file).")
    return names


def search_and_test(request: Request, task: Task, folder: Path) -> list[Path]:
    """The part of mode hyper; returns the folders of the runs that failed."""
    failed, names = [], models_to_search(request)
    for name in names:
        Search(request, task, folder, name).work(wait=True)
    for name in names:
        best = from_first(best_changes(folder, name) if rank() == 0 else None)
        if best is None:
            logger.error("%s: no trial has finished, so there is nothing to test.", name)
            failed.append(folder / name)
            continue
        changes = {**best, "run.label": TUNED}
        jobs = [
            Job(folder / f"{name}--{TUNED}_seed{seed}", name, seed, changes)
            for seed in seeds_of(request.config())
        ]
        if rank() == 0:
            for job in jobs:
                _drop_unless_best(job.place, best)
        from_first(None)  # the others wait
        failed += run_jobs(request, jobs, task)
    return failed


def _has(folder: Path, best: dict[str, Any]) -> bool:
    """Whether a run has the settings that are the best ones now."""
    made = build_config(overlay=read_yaml(str(folder / CONFIG)))
    return all(value_of(made, key) == value for key, value in best.items())


def _drop_unless_best(folder: Path, best: dict[str, Any]) -> None:
    if (folder / CONFIG).exists() and not _has(folder, best):
        logger.info("Better settings were found: %s is trained anew.", folder.name)
        shutil.rmtree(folder)


def _join(request: Request) -> int:
    """Work on the trials of a search that somebody else started, on this machine's terms."""
    folder = Path(request.config().hyper.join)
    stored = resumed_request(str(folder), request.without("hyper.join"), "hyper.join=")
    if not (folder / STUDY).exists():
        raise UserError(f"hyper.join={folder}: no search has begun there (no {STUDY}).")
    task = load_task(stored.config())
    for name in models_to_search(stored):
        Search(stored, task, folder, name).work(wait=False)
    say(f"\nThe trials of {folder} are done or in other hands.")
    return 0


# --------------------------------------------------------------------------- results


def write_hyper(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """`hyper_results.*`, `hyper_trials_<model>.csv` and the figures of every study of the folder.

    Returns the table of the tuned models. Raises UserError without optuna.
    """
    if not (folder / STUDY).exists():
        return []
    optuna = import_optuna()
    names = optuna.get_all_study_names(address(folder))
    tuned = {e.model: e for e in report.entries(report.read_runs(folder), True) if e.label == TUNED}
    content, rows = {}, []
    for name in names:
        study = open_study(folder, name)
        trials, importance = trials_frame(study), _importance(study)
        with atomic_path(folder / f"hyper_trials_{name}.csv") as path:
            trials.to_csv(path, index=False)
        _draw(folder, name, trials, importance)
        best = best_changes(folder, name)
        if name in tuned and not all(_has(run.folder, best) for run in tuned[name].runs):
            logger.warning(
                "%s: better settings than those tested were found; --mode hyper --resume %s tests "
                "them.", name, folder,
            )  # fmt: skip
            tuned.pop(name)
        content[name] = {
            "space": model_class(name).search_space,
            "best": best,
            "trials": trials.to_dict("records"),
            "importance": importance,
            "runs": [run.result for run in tuned[name].runs] if name in tuned else [],
        }
        if name in tuned:
            rows.append(_tuned_row(tuned[name], trials, best))
    if not rows:
        logger.warning("No tuned model has been tested yet: no table of the search.")
        return []
    table = _table(pd.DataFrame(rows), [run for entry in tuned.values() for run in entry.runs])
    table = report.with_missing(table, report.unfinished(folder))
    for place in [folder] if latest is None else [folder, latest]:
        write_table(table, place)
        write_json(place / "hyper_results.json", content | {"caption": table.caption})
    say(report.text_table([run for entry in tuned.values() for run in entry.runs]))
    return [table]


def trials_frame(study: Any) -> pd.DataFrame:
    """One row per trial: number, state, value (best valid NDCG@10 so far), epochs, seconds and the
    settings. Trials that were cut off and taken up again appear once."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        seen = trial.intermediate_values
        if trial.state.name not in ("COMPLETE", "PRUNED"):
            continue
        value = trial.value if trial.state.name == "COMPLETE" else max(seen.values(), default=None)
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name,
                "value": value,
                "epochs": max(seen, default=0),
                "seconds": trial.user_attrs.get("seconds"),
                "preset": trial.user_attrs.get("preset", False),
                **trial.params,
            }
        )
    return pd.DataFrame(rows)


def _importance(study: Any) -> dict[str, float]:
    """fANOVA over finished trials; empty where there are too few or all are alike."""
    optuna = import_optuna()
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}


def _draw(folder: Path, name: str, trials: pd.DataFrame, importance: dict[str, float]) -> None:
    if trials.empty:
        return
    space = model_class(name).search_space
    logarithmic = [key for key, entry in space.items() if "log" in entry]
    plots.search_history(trials, folder / f"hyper_{name}_history")
    plots.search_slices(trials, logarithmic, folder / f"hyper_{name}_slices")
    if importance:
        plots.search_importance(importance, folder / f"hyper_{name}_importance")


def _tuned_row(entry: report.Entry, trials: pd.DataFrame, best: dict[str, Any]) -> dict[str, Any]:
    row = {
        "model": entry.model,
        "settings": ", ".join(f"{key} {short(value)}" for key, value in best.items()),
        "trials": len(trials),
        "pruned": int((trials["state"] == "PRUNED").sum()),
        "preset": trials.loc[trials["preset"], "value"].max(),
        "best trial": trials.loc[trials["state"] == "COMPLETE", "value"].max(),
    }
    for name in ("recall@10", "ndcg@10"):
        values = [run.result["test"][name] for run in entry.runs]
        row[name], row[f"{name} std"] = mean_std(values)
    return row


def _table(frame: pd.DataFrame, runs: list[report.Run]) -> Table:
    note = (
        "The best of several trials on valid is an optimistic figure; test: the best settings "
        "trained anew, looked at once. No test result took part in the search. Nothing is bold."
    )
    columns = [
        Column("model", "Model", "s"), Column("trials", "Trials", "d"),
        Column("pruned", "Pruned", "d"), Column("preset", "valid N@10, preset"),
        Column("best trial", "valid N@10, best"), Column("recall@10", "test R@10"),
        Column("ndcg@10", "test N@10"), Column("settings", "Best settings", "s"),
    ]  # fmt: skip
    return Table(
        "hyper_results", "Hyper-parameter search", f"{report.protocol(runs)} {note}", columns, frame
    )
