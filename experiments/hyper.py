"""Mode `hyper`: a search over the settings a model declares, judged by valid NDCG@10 alone.

The study is a SQLite file in the run folder, so a search can be stopped, resumed, given more trials
(`--resume RUN --trials 40`) and shared: `--mode hyper --set hyper.join=RUN`, started as often as
there are processors or machines that see the folder, works on its trials. Trial 0 is the preset.
A trial that was cut off goes on from its checkpoint. Test is looked at once, when the best trial is
trained anew.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from config import MODE_MODELS, Config
from experiments import plots, report
from experiments.modes import Job, conduct, run_jobs, seeds_of
from experiments.requests import Request, read_request
from experiments.runs import Task, load_task, model_class, train
from experiments.tables import Column, Table, write_table
from experiments.training import BEST, LATEST, Stopped
from metrics import mean_std
from util import Stopwatch, UserError, atomic_path, claim, from_first, rank, stream_seed, write_json

logger = getLogger("pmat")
STUDY, LOCK = "study.db", "lock"
TUNED = "tuned"  # label of the runs with the best settings
POLL_SECONDS = 2.0  # between looks at the trials of other processes
NEWBORN_SECONDS = 60.0  # a trial this young may not have its folder yet


class Pruned(Exception):
    """The trial is worse than the median of the others at the same epoch."""


class Proposal(NamedTuple):
    """What one trial is to train."""

    place: str
    changes: dict[str, Any]


def hyper(request: Request) -> int:
    """Search, then train and test the best settings; returns the number of failed runs."""
    import_optuna()
    join = request.config().hyper.join
    if join:
        return _join(Path(join))
    return conduct(request, models_to_search(request), search_and_test)


def import_optuna() -> Any:
    """The package, without its chatter. Raises UserError when it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("mode hyper needs the package optuna: pip install optuna.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def models_to_search(request: Request) -> tuple[str, ...]:
    """Those named, or the default. Raises UserError for one that declares no search space."""
    names = request.models(MODE_MODELS["hyper"])
    for name in names:
        if not model_class(name).search_space:
            raise UserError(f"--model {name} declares no search space (see its file).")
    return names


def search_and_test(request: Request, task: Task, folder: Path) -> list[Path]:
    """The part of mode hyper; returns the folders of the runs that failed."""
    failed = []
    for name in models_to_search(request):
        Search(request, task, folder, name).work(wait=True)
        best = from_first(_best_changes(folder, name) if rank() == 0 else None)
        if best is None:
            logger.error("%s: no trial has finished, so there is nothing to test.", name)
            failed.append(folder / name)
            continue
        changes = {**best, "run.label": TUNED}
        jobs = [
            Job(folder / f"{name}--{TUNED}_seed{seed}", name, seed, changes)
            for seed in seeds_of(request.config())
        ]
        failed += run_jobs(request, jobs, task)
    return failed


def _join(folder: Path) -> int:
    """Work on the trials of a search that somebody else started."""
    stored = read_request(folder)
    if not (folder / STUDY).exists():
        raise UserError(f"hyper.join={folder}: no search has begun there (no {STUDY}).")
    task = load_task(stored.config())
    for name in models_to_search(stored):
        Search(stored, task, folder, name).work(wait=False)
    print(f"\nThe trials of {folder} are done or in other hands.")
    return 0


# --------------------------------------------------------------------------- the study


def open_study(folder: Path, model: str) -> Any:
    """The study of one model in the folder's SQLite file, made when it is not there."""
    optuna = import_optuna()
    storage = optuna.storages.RDBStorage(
        _address(folder),
        engine_kwargs={"connect_args": {"timeout": 100}},  # seconds to wait for other writers
    )
    return optuna.create_study(
        storage=storage, study_name=model, direction="maximize", load_if_exists=True
    )


def _address(folder: Path) -> str:
    return f"sqlite:///{(folder / STUDY).resolve()}"


def _best_changes(folder: Path, model: str) -> dict[str, Any] | None:
    trials = [t for t in open_study(folder, model).trials if t.state.name == "COMPLETE"]
    return max(trials, key=lambda t: t.value).params if trials else None


class Search:
    """One process at work on the study of one model.

    With several processes under torchrun, the first one holds the study and tells the others.
    """

    def __init__(self, request: Request, task: Task, folder: Path, model: str) -> None:
        self.request, self.folder, self.model = request, folder, model
        self.task = without_test(task)
        self.config = request.config(model)
        asked = request.flags | request.overlay
        self.space = {k: v for k, v in model_class(model).search_space.items() if k not in asked}
        if not self.space:
            raise UserError(f"{model}: every setting of its search space is fixed by the command.")
        self.study, self.trial = None, None
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.study = open_study(folder, model)
            self._start_with_preset()

    def work(self, wait: bool) -> None:
        """Train trials until there are `hyper.trials`; with `wait`, until others are done too."""
        while True:
            plan = from_first(self._next() if rank() == 0 else None)
            if isinstance(plan, Proposal):
                self._train(plan)
            elif plan == "others" and wait:
                time.sleep(POLL_SECONDS)
            else:
                return

    def _start_with_preset(self) -> None:
        values = {key: getattr(*_owner(self.config, key)) for key in self.space}
        inside = all(_inside(self.space[key], value) for key, value in values.items())
        if inside and not self.study.trials:
            self.study.enqueue_trial(values, user_attrs={"preset": True})

    def _next(self) -> Proposal | str:
        """The next trial, or "others" when the last ones are in other hands, or "done"."""
        self._revive()
        trials = self.study.get_trials(deepcopy=False)
        states = [trial.state.name for trial in trials]
        taken = {trial.user_attrs.get("place") for trial in trials} - {None}
        if "WAITING" in states or len(taken) < self.config.hyper.trials:
            return self._propose()
        return "others" if "RUNNING" in states else "done"

    def _revive(self) -> None:
        """Trials whose process has died wait again, with their folder and so their checkpoint."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name != "RUNNING":
                continue
            place = trial.user_attrs.get("place")
            if place is None or not (self.folder / place).exists():
                age = (datetime.now() - trial.datetime_start).total_seconds()
                if age < NEWBORN_SECONDS:
                    continue
            else:
                lock = claim(self.folder / place / LOCK)
                if lock is None:
                    continue
                lock.close()
            state = import_optuna().trial.TrialState
            with contextlib.suppress(ValueError, RuntimeError):  # another process was faster
                self.study.tell(trial.number, state=state.FAIL)
                kept = {k: v for k, v in trial.user_attrs.items() if k in ("place", "preset")}
                self.study.enqueue_trial(trial.params, user_attrs=kept)

    def _propose(self) -> Proposal:
        trial = self.trial = self.study.ask()
        self._seed(trial.number)
        place = trial.user_attrs.get("place") or f"trials/{self.model}_{trial.number}"
        (self.folder / place).mkdir(parents=True, exist_ok=True)
        self.lock = claim(self.folder / place / LOCK)
        trial.set_user_attr("place", place)
        return Proposal(place, {key: _suggest(trial, key, s) for key, s in self.space.items()})

    def _seed(self, number: int) -> None:
        """Of its own for each trial, so that neither a resumed study nor a second process draws
        the same settings again (optuna issue 3255)."""
        optuna, own = import_optuna(), self.config.hyper
        seed = stream_seed(self.config.run.seed, "hyper", self.model, number) % 2**32
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=own.startup, seed=seed, constant_liar=True
        )
        self.study.pruner = optuna.pruners.MedianPruner(n_startup_trials=own.startup)

    # ----------------------------------------------------------------- one trial

    def _train(self, plan: Proposal) -> None:
        """Train one trial and tell the study; a stopped one is left to be revived."""
        place = self.folder / plan.place
        shown = ", ".join(f"{key}={_short(value)}" for key, value in plan.changes.items())
        logger.info("\n%s: %s", plan.place, shown)
        config = self.request.config(self.model, plan.changes)
        watch, value, state = Stopwatch(), None, "COMPLETE"
        try:
            value = train(config, self.task, place, self._watcher()).trainer.progress.best
        except Pruned:
            state = "PRUNED"
            logger.info("pruned")
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            state = "FAIL"
            known = isinstance(error, UserError)
            logger.error("%s failed: %s", plan.place, error, exc_info=None if known else error)
        if rank() == 0:
            self._tell(value, state, watch.seconds)
            for name in (LATEST, BEST):  # the best settings are trained anew
                (place / name).unlink(missing_ok=True)
            self.lock.close()

    def _tell(self, value: float | None, state: str, seconds: float) -> None:
        self.trial.set_user_attr("seconds", seconds)
        self.study.tell(self.trial, value, getattr(import_optuna().trial.TrialState, state))

    def _watcher(self) -> Callable[[list[dict[str, Any]]], None]:
        """Reports every epoch's valid NDCG@10 once and raises Pruned where the study says so."""
        reported: set[int] = set()

        def watch(rows: list[dict[str, Any]]) -> None:
            known = [row for row in rows if "valid" in row]
            if not known or known[-1]["epoch"] in reported:
                return
            if rank() == 0:
                for row in known:
                    if row["epoch"] not in reported:
                        self.trial.report(row["valid"]["ndcg@10"], row["epoch"])
            reported.update(row["epoch"] for row in known)
            if from_first(rank() == 0 and self.trial.should_prune()):
                raise Pruned

        return watch


def without_test(task: Task) -> Task:
    """The same task with nothing of the test part in it, so no trial can look at it."""
    split = task.split
    dataset = task.dataset._replace(sequences=split.train_and_valid, labels=None)
    return Task(dataset, split._replace(train_and_valid=split.train, test=split.valid))


def _owner(config: Config, key: str) -> tuple[Any, str]:
    section, leaf = key.split(".")
    return getattr(config, section), leaf


def _inside(space: Any, value: Any) -> bool:
    if isinstance(space, list):
        return value in space
    return space[0] <= value <= space[1]


def _suggest(trial: Any, key: str, space: Any) -> Any:
    """A value of one entry of `search_space` (see model_parts.base.Recommender)."""
    if isinstance(space, list):
        return trial.suggest_categorical(key, space)
    low, high, *scale = space
    whole = isinstance(low, int) and isinstance(high, int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(key, low, high, log="log" in scale)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------- results


def write_hyper(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """`hyper_results.*`, `hyper_trials_<model>.csv` and the figures of every study of the folder.

    Returns the table of the tuned models. Raises UserError without optuna.
    """
    if not (folder / STUDY).exists():
        return []
    optuna = import_optuna()
    names = optuna.get_all_study_names(_address(folder))
    tuned = {e.model: e for e in report.entries(report.read_runs(folder), True) if e.label == TUNED}
    content, rows = {}, []
    for name in names:
        study = open_study(folder, name)
        trials, importance = trials_frame(study), _importance(study)
        with atomic_path(folder / f"hyper_trials_{name}.csv") as path:
            trials.to_csv(path, index=False)
        _draw(folder, name, trials, importance)
        content[name] = {
            "space": model_class(name).search_space,
            "best": _best_changes(folder, name),
            "trials": trials.to_dict("records"),
            "importance": importance,
            "runs": [run.result for run in tuned[name].runs] if name in tuned else [],
        }
        if name in tuned:
            rows.append(_tuned_row(tuned[name], trials, content[name]["best"]))
    if not rows:
        logger.warning("No tuned model has been tested yet: no table of the search.")
        return []
    table = _table(pd.DataFrame(rows), [run for entry in tuned.values() for run in entry.runs])
    for place in [folder] if latest is None else [folder, latest]:
        write_table(table, place)
        write_json(place / "hyper_results.json", content | {"caption": table.caption})
    print(report.text_table([run for entry in tuned.values() for run in entry.runs]))
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
        "settings": ", ".join(f"{key} {_short(value)}" for key, value in best.items()),
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
        "Preset and best trial: valid NDCG@10; R@10 and N@10: test, of the best settings trained "
        "anew, looked at once. No test result took part in the search. Nothing is bold."
    )
    columns = [
        Column("model", "Model", "s"), Column("trials", "Trials", "d"),
        Column("pruned", "Pruned", "d"), Column("preset", "Preset"),
        Column("best trial", "Best trial"), Column("recall@10", "R@10"),
        Column("ndcg@10", "N@10"), Column("settings", "Best settings", "s"),
    ]  # fmt: skip
    return Table(
        "hyper_results", "Hyper-parameter search", f"{report.protocol(runs)} {note}", columns, frame
    )
