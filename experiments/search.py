"""A search over the settings a model declares: one study, any number of processes at work on it.

Trials are judged by valid NDCG@10 and get a task without a test part. What holds the work together
is on disk: the study in SQLite, and for each trial a folder with its checkpoint and a lock, so that
a trial whose process has died is noticed and goes on from where it was.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from config import value_of
from experiments.requests import Request
from experiments.runs import Task, model_class, train
from experiments.training import BEST, LATEST, Stopped
from util import Stopwatch, UserError, claim, from_first, rank, stream_seed

logger = getLogger("pmat")
STUDY, LOCK = "study.db", "lock"
POLL_SECONDS = 2.0  # between looks at the trials of other processes


class Pruned(Exception):
    """The trial is worse than the median of the others at the same epoch."""


class Proposal(NamedTuple):
    """What one trial is to train."""

    place: str
    changes: dict[str, Any]


def import_optuna() -> Any:
    """The package, without its chatter. Raises UserError when it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("mode hyper needs the package optuna: pip install optuna.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(folder: Path, model: str) -> Any:
    """The study of one model in the folder's SQLite file, made when it is not there."""
    optuna = import_optuna()
    storage = optuna.storages.RDBStorage(
        address(folder),
        engine_kwargs={"connect_args": {"timeout": 100}},  # seconds to wait for other writers
    )
    return optuna.create_study(
        storage=storage, study_name=model, direction="maximize", load_if_exists=True
    )


def address(folder: Path) -> str:
    """Where the studies of a folder are, as optuna writes it."""
    return f"sqlite:///{(folder / STUDY).resolve()}"


def best_changes(folder: Path, model: str) -> dict[str, Any] | None:
    """The settings of the finished trial with the best valid NDCG@10; None without one."""
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
        self.study = self.trial = self.lock = None  # the first process has them
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.study = open_study(folder, model)
            self._refuse_other_data()
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

    def _refuse_other_data(self) -> None:
        # trials on other data would be compared as if they were on these
        here, made = self.task.dataset.checksum(), self.study.user_attrs.get("data")
        if made is None and not self.study.trials:
            self.study.set_user_attr("data", here)
        elif made not in (None, here):
            raise UserError(
                f"{self.folder}: the trials of {self.model} were made on other data: what is read "
                f"for {self.task.dataset.name} has changed since; start a new search."
            )

    def _start_with_preset(self) -> None:
        values = {key: value_of(self.config, key) for key in self.space}
        outside = [key for key, value in values.items() if not _inside(self.space[key], value)]
        if outside:
            logger.warning(
                "The preset is no trial: its %s=%s is not in the search space of %s.",
                outside[0], values[outside[0]], self.model,
            )  # fmt: skip
        elif not self.study.trials:
            self.study.enqueue_trial(values, user_attrs={"preset": True})

    def _next(self) -> Proposal | str:
        """The next trial, or "others" when the last ones are in other hands, or "done"."""
        with self._alone():
            self._revive()
            trials = self.study.get_trials(deepcopy=False)
            states = [trial.state.name for trial in trials]
            taken = {trial.user_attrs.get("place") for trial in trials} - {None}
            if "WAITING" in states or len(taken) < self.config.hyper.trials:
                return self._propose()
        return "others" if "RUNNING" in states else "done"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time looks for a trial, so none is taken twice."""
        path = self.folder / f"{STUDY}.{LOCK}"
        path.touch()
        while (lock := claim(path)) is None:
            time.sleep(0.05)
        with lock:
            yield

    def _revive(self) -> None:
        """Trials whose process has died wait again, with their folder and so their checkpoint."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and self._is_dead(trial):
                self.study.tell(trial.number, state=import_optuna().trial.TrialState.FAIL)
                kept = {k: v for k, v in trial.user_attrs.items() if k in ("place", "preset")}
                # what it was told to try, also where it died before it had asked for all of it
                told = trial.system_attrs.get("fixed_params", {})
                self.study.enqueue_trial(told | trial.params, user_attrs=kept)

    def _is_dead(self, trial: Any) -> bool:
        """Whether nobody holds the lock of a running trial, or it never got one."""
        place = trial.user_attrs.get("place")
        if place is None or not (self.folder / place).exists():
            return True
        lock = claim(self.folder / place / LOCK)
        if lock:
            lock.close()
        return lock is not None

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
        shown = ", ".join(f"{key}={short(value)}" for key, value in plan.changes.items())
        logger.info("\n%s: %s", plan.place, shown)
        config = self.request.config(self.model, plan.changes)
        watch, value, state = Stopwatch(), None, "COMPLETE"
        try:
            value = train(config, self.task, place, self._watcher()).trainer.progress.best
        except Pruned:
            state = "PRUNED"
            logger.info("pruned")
        except (Stopped, KeyboardInterrupt):
            self._release()
            raise
        except Exception as error:
            state = "FAIL"
            known = isinstance(error, UserError)
            logger.error("%s failed: %s", plan.place, error, exc_info=None if known else error)
        if rank() == 0:
            self._tell(value, state, watch.seconds)
            for name in (LATEST, BEST):  # the best settings are trained anew
                (place / name).unlink(missing_ok=True)
            self._release()

    def _tell(self, value: float | None, state: str, seconds: float) -> None:
        self.trial.set_user_attr("seconds", seconds)
        state = getattr(import_optuna().trial.TrialState, state)
        # another process may have taken it for dead, where there are no locks
        self.study.tell(self.trial, value, state, skip_if_finished=True)

    def _release(self) -> None:
        if self.lock:
            self.lock.close()

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


def short(value: Any) -> str:
    """A setting in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
